"""How a call enters the loop of the bridge: by a task of our own, or through asgiref's `async_to_sync`. For `bridge`.

Both use what asgiref does not document. The first way tells it, by one attribute, which executor thread-sensitive code
is for; the second makes `async_to_sync` take our loop. So the bridge looks, once a process, whether the first still
does what it did, and goes the second where not: three times as long a way, into the same loop.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import logging
import os
import threading
from collections.abc import Callable, Coroutine
from importlib.metadata import version
from typing import Any, Protocol, TypeVar

from asgiref.current_thread_executor import CurrentThreadExecutor
from asgiref.sync import AsyncToSync, SyncToAsync, sync_to_async

from ._call import Call
from ._contexts import get_executor, set_executor
from ._loop import Running

__all__ = ["AsgirefEntry", "Entry", "OwnEntry", "choose_entry"]

T = TypeVar("T")

_log = logging.getLogger(__name__)

_LOOP, _PID, _TASKS = "main_event_loop", "main_event_loop_pid", "task_context"  # of SyncToAsync.threadlocal
_NOTHING = object()


class Entry(Protocol):
    """One way into a loop."""

    def call(self, running: Running, function: Callable[[], Coroutine[Any, Any, T]], grace: float) -> T:
        """Run ``await function()`` in the loop and wait; thread-sensitive code of it runs in this thread meanwhile.

        Interrupted (KeyboardInterrupt), it cancels the coroutine and serves its cleanup for `grace` seconds.
        """


class OwnEntry:
    """A task in the loop, and an executor for this thread, both made here; the thread runs the loop where it may."""

    def call(self, running: Running, function: Callable[[], Coroutine[Any, Any, T]], grace: float) -> T:
        outer = get_executor()
        local = SyncToAsync.threadlocal
        before = _attributes(local)
        call = Call(running, function, outer)
        try:
            return call.run(grace)
        finally:
            set_executor(outer)
            if call.served:  # asgiref has told this thread that it came from the loop
                _set_attributes(local, before)


class AsgirefEntry:
    """`async_to_sync` itself, made to believe that the calling thread came from the given loop."""

    def call(self, running: Running, function: Callable[[], Coroutine[Any, Any, T]], grace: float) -> T:
        loop = running.loop
        task: asyncio.Task[Any] | None = None
        executor: Any = None

        async def arrived() -> T:
            nonlocal task, executor
            task = asyncio.current_task()
            executor = get_executor()
            return await function()

        local = SyncToAsync.threadlocal
        before = _attributes(local)
        # Not the list of the loop that this thread was started from: that loop would cancel our task, from its thread.
        _set_attributes(local, {_LOOP: loop, _PID: os.getpid(), _TASKS: None})
        try:
            return AsyncToSync(arrived)()
        except (Exception, asyncio.CancelledError):
            raise
        except BaseException:  # came up in this thread while it waited
            if task is not None and not task.done():
                _interrupt(loop, task, executor, grace)
            raise
        finally:
            _set_attributes(local, before)


def _interrupt(loop: asyncio.AbstractEventLoop, task: asyncio.Task[Any], executor: Any, grace: float) -> None:
    """Cancel the task, and run what it asks of this thread, until it has ended or `grace` seconds are over."""
    over: concurrent.futures.Future[None] = concurrent.futures.Future()

    def end(_: object = None) -> None:
        if not over.done():
            over.set_result(None)

    def cancel() -> None:
        task.add_done_callback(end)
        loop.call_later(grace, end)
        task.cancel()

    loop.call_soon_threadsafe(cancel)
    if isinstance(executor, CurrentThreadExecutor):
        executor.run_until_future(over)
    else:
        concurrent.futures.wait([over], grace)


def _attributes(local: threading.local) -> dict[str, Any]:
    return {name: getattr(local, name, _NOTHING) for name in (_LOOP, _PID, _TASKS)}


def _set_attributes(local: threading.local, values: dict[str, Any]) -> None:
    for name, value in values.items():
        if value is not _NOTHING:
            setattr(local, name, value)
        elif hasattr(local, name):
            delattr(local, name)


def choose_entry(running: Running, grace: float) -> Entry:
    """Return the first way that leads into the loop, with thread-sensitive code in the calling thread.

    Raises:
        RuntimeError: this asgiref has neither.
    """
    installed = version("asgiref")
    if _works(first := OwnEntry(), running, grace):
        return first
    _log.warning("asgiref %s is not as the bridge knows it; calls go into the loop through async_to_sync", installed)
    if _works(second := AsgirefEntry(), running, grace):
        return second
    raise RuntimeError(f"asgiref {installed} does not run thread-sensitive code in the thread that waits for it")


def _works(entry: Entry, running: Running, grace: float) -> bool:
    async def look() -> tuple[asyncio.AbstractEventLoop, int]:
        return asyncio.get_running_loop(), await sync_to_async(threading.get_ident)()

    try:
        return entry.call(running, look, grace) == (running.loop, threading.get_ident())
    except Exception:
        _log.debug("the bridge cannot use %s", type(entry).__name__, exc_info=True)
        return False
