"""Cleanup that survives the cancellation of the caller it cleans up for.

``finally: await close()`` is lost when the waiting task is cancelled a second time, and inside a cancelled scope of
AnyIO at once. So the work runs in a task that the *owner* (a storage, a backend) holds and that its ``aclose()``
drains. This module is the only place of the library that makes a bare task.
"""

from __future__ import annotations

import asyncio
import contextvars
import logging
import math
import weakref
from collections.abc import Coroutine
from typing import Any

from .loops import PerLoop

__all__ = ["Cleanup", "patience"]

_log = logging.getLogger(__name__)

#: The most seconds that `Cleanup.finish` waits in this context. An attempt that can fall back does not wait for a hung
#: original to take back what it was given up for.
patience: contextvars.ContextVar[float] = contextvars.ContextVar("aproxy_storage.cleanup.patience", default=math.inf)


class Cleanup:
    """The cleanup tasks of one owner, per event loop.

    Args:
        owner: what tasks and logs call by its ``str()``, which is asked for on first use: in a constructor it may lack
            what its name is made of.
    """

    def __init__(self, owner: object) -> None:
        self._owner_ref = weakref.ref(owner) if not isinstance(owner, str) else None  # no cycle
        self._owner = owner if isinstance(owner, str) else ""
        self._tasks: PerLoop[set[asyncio.Task[Any]]] = PerLoop(set)

    def start(
        self,
        work: Coroutine[Any, Any, Any],
        *,
        name: str = "cleanup",
        context: contextvars.Context | None = None,
        log: bool = True,
    ) -> asyncio.Task[Any]:
        """Run `work` in a task of the owner's, and return that task. Its failure is logged unless its starter
        takes the result (`log` is false).

        Its context is empty unless given: that keeps it from holding on to the variables (request, connection,
        transaction) of a call that is going away.
        """
        if not self._owner and self._owner_ref is not None:
            self._owner = str(self._owner_ref())
        tasks = self._tasks.get()
        task = asyncio.get_running_loop().create_task(
            work, name=f"aproxy_storage {self._owner}: {name}", context=context or contextvars.Context()
        )
        tasks.add(task)
        task.add_done_callback(tasks.discard)
        if log:
            task.add_done_callback(self._log_failure)
        return task

    async def finish(
        self,
        work: Coroutine[Any, Any, Any],
        *,
        within: float,
        name: str = "cleanup",
        context: contextvars.Context | None = None,
    ) -> bool:
        """Run `work` in a task of the owner's, as `start` does, and wait for it at most `within` seconds (see also
        `patience`); return whether it ended.

        A failure of `work` is logged, not raised: the caller is on its way out with an error of its own.
        If the caller is cancelled while it waits, the CancelledError is raised and `work` goes on.
        """
        task = self.start(work, name=name, context=context)
        done, _ = await asyncio.wait({task}, timeout=min(within, patience.get()))
        return bool(done)

    async def drain(self, *, within: float) -> None:
        """Wait until this loop's cleanup tasks have ended, those included that are started meanwhile.

        Those that take longer than `within` seconds are cancelled. May be called from one of them, which then
        is not waited for.
        """
        tasks = self._tasks.get()  # not taken out: a task that nobody holds may be collected while it runs
        clock = asyncio.get_running_loop().time
        deadline = clock() + within
        while pending := tasks - {asyncio.current_task()}:
            left = deadline - clock()
            if left <= 0:
                _log.warning("%s: %d cleanup tasks cut short; reconcile will finish them", self._owner, len(pending))
                for task in pending:
                    task.cancel()
                await asyncio.wait(pending, timeout=1.0)
                break
            await asyncio.wait(pending, timeout=left)
        if not tasks:
            self._tasks.pop()

    def _log_failure(self, task: asyncio.Task[Any]) -> None:
        if not task.cancelled() and (error := task.exception()) is not None:
            _log.warning("%s: %s failed; reconcile will finish it: %r", self._owner, task.get_name(), error)
