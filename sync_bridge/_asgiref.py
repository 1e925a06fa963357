"""How a call enters the loop of the bridge: through asgiref's `async_to_sync`, or beside it. Used by `bridge` alone.

The first way sets attributes that asgiref does not document, the same since version 3.3. So the bridge looks, once a
process, whether they still do what they did; where not, it goes the second way, which needs less of asgiref and costs
about as much.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextvars
import logging
import os
import threading
from collections.abc import Callable, Coroutine
from importlib.metadata import version
from typing import Any, Protocol, TypeVar

import asgiref.sync
from asgiref.current_thread_executor import CurrentThreadExecutor
from asgiref.sync import AsyncToSync, SyncToAsync, sync_to_async

__all__ = ["AsgirefEntry", "BesideEntry", "Entry", "choose_entry"]

T = TypeVar("T")

_log = logging.getLogger(__name__)

_LOOP, _PID, _TASKS = "main_event_loop", "main_event_loop_pid", "task_context"
_NOTHING = object()


class Entry(Protocol):
    """One way into a loop."""

    def call(self, loop: asyncio.AbstractEventLoop, function: Callable[[], Coroutine[Any, Any, T]], grace: float) -> T:
        """Run ``await function()`` in `loop` and wait; thread-sensitive code of it runs in this thread meanwhile.

        Interrupted (KeyboardInterrupt), it cancels the coroutine and serves its cleanup for `grace` seconds.
        """


class _Call:
    """What is known on the loop of one call, for the thread that waits for it."""

    __slots__ = ("executor", "task")

    def __init__(self) -> None:
        self.task: asyncio.Task[Any] | None = None
        self.executor: Any = None

    def interrupt(self, loop: asyncio.AbstractEventLoop, grace: float) -> None:
        """Cancel the coroutine, and run what it asks of this thread, until it has ended or `grace` seconds are over."""
        task = self.task
        if task is None or task.done():
            return
        over: concurrent.futures.Future[None] = concurrent.futures.Future()

        def end(_: object = None) -> None:
            if not over.done():
                over.set_result(None)

        def cancel() -> None:
            task.add_done_callback(end)
            loop.call_later(grace, end)
            task.cancel()

        loop.call_soon_threadsafe(cancel)
        if isinstance(self.executor, CurrentThreadExecutor):
            self.executor.run_until_future(over)
        else:
            concurrent.futures.wait([over], grace)


class AsgirefEntry:
    """`async_to_sync` itself, made to believe that the calling thread came from the given loop."""

    def call(self, loop: asyncio.AbstractEventLoop, function: Callable[[], Coroutine[Any, Any, T]], grace: float) -> T:
        call = _Call()

        async def arrived() -> T:
            call.task = asyncio.current_task()
            call.executor = getattr(AsyncToSync.executors, "current", None)
            return await function()

        local = SyncToAsync.threadlocal
        before = [(name, getattr(local, name, _NOTHING)) for name in (_LOOP, _PID, _TASKS)]
        setattr(local, _LOOP, loop)
        setattr(local, _PID, os.getpid())
        # Not the list of the loop that this thread was started from: that loop would cancel our task, from its thread.
        setattr(local, _TASKS, None)
        try:
            return AsyncToSync(arrived)()
        except (Exception, asyncio.CancelledError):
            raise
        except BaseException:  # came up in this thread while it waited
            call.interrupt(loop, grace)
            raise
        finally:
            for name, value in before:
                if value is not _NOTHING:
                    setattr(local, name, value)
                elif hasattr(local, name):
                    delattr(local, name)


class BesideEntry:
    """A task in the loop, and an executor for this thread, both made here."""

    def call(self, loop: asyncio.AbstractEventLoop, function: Callable[[], Coroutine[Any, Any, T]], grace: float) -> T:
        call = _Call()
        outer = getattr(AsyncToSync.executors, "current", None)
        call.executor = executor = _new_executor(outer)
        context = contextvars.copy_context()
        after = context
        result: concurrent.futures.Future[T] = concurrent.futures.Future()

        async def arrived() -> None:
            nonlocal after
            call.task = asyncio.current_task()
            _take_over(context)
            AsyncToSync.executors.current = executor
            try:
                value = await function()
            except BaseException as error:
                after = contextvars.copy_context()
                result.set_exception(error)
            else:
                after = contextvars.copy_context()
                result.set_result(value)

        loop.call_soon_threadsafe(lambda: loop.create_task(arrived(), context=context.copy()))
        try:
            executor.run_until_future(result)
        except BaseException:
            call.interrupt(loop, grace)
            raise
        finally:
            _take_over(after)
            AsyncToSync.executors.current = outer
        return result.result()


def _new_executor(outer: Any) -> Any:
    try:
        return CurrentThreadExecutor(outer)
    except TypeError:  # of an asgiref older than ours
        return CurrentThreadExecutor()  # type: ignore[call-arg]


def _take_over(context: contextvars.Context) -> None:
    """Give this thread the variables of `context`."""
    restore = getattr(asgiref.sync, "_restore_context", None)  # knows about asgiref.local.Local too
    if restore is not None:
        restore(context)
        return
    for variable, value in context.items():
        if variable.get(_NOTHING) is not value:
            variable.set(value)


def choose_entry(loop: asyncio.AbstractEventLoop, grace: float) -> Entry:
    """Return the first way that leads into `loop`, with thread-sensitive code in the calling thread.

    Raises:
        RuntimeError: this asgiref has neither.
    """
    installed = version("asgiref")
    if _works(first := AsgirefEntry(), loop, grace):
        return first
    _log.warning("asgiref %s is not as the bridge knows it; calls go into the loop beside it", installed)
    if _works(second := BesideEntry(), loop, grace):
        return second
    raise RuntimeError(f"asgiref {installed} does not run thread-sensitive code in the thread that waits for it")


def _works(entry: Entry, loop: asyncio.AbstractEventLoop, grace: float) -> bool:
    async def look() -> tuple[asyncio.AbstractEventLoop, int]:
        return asyncio.get_running_loop(), await sync_to_async(threading.get_ident)()

    try:
        return entry.call(loop, look, grace) == (loop, threading.get_ident())
    except Exception:
        _log.debug("the bridge cannot use %s", type(entry).__name__, exc_info=True)
        return False
