"""How a call enters the loop of the bridge: by a task of our own, or through asgiref's `async_to_sync`. For `bridge`.

Both use what asgiref does not document. The first way tells it, by one attribute, which executor thread-sensitive code
is for; the second makes `async_to_sync` take our loop. So the bridge looks, once a process, whether the first still
does what it did, and goes the second where not: three times as long a way, into the same loop.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
import contextvars
import functools
import logging
import os
import threading
import time
from collections import deque
from collections.abc import Callable, Coroutine
from importlib.metadata import version
from typing import Any, Generic, Protocol, TypeVar, cast

from asgiref.current_thread_executor import CurrentThreadExecutor
from asgiref.sync import AsyncToSync, SyncToAsync, sync_to_async

from ._contexts import take_over
from ._loop import Running

__all__ = ["AsgirefEntry", "Entry", "OwnEntry", "choose_entry"]

T = TypeVar("T")

_log = logging.getLogger(__name__)

_CURRENT = "current"  # of AsyncToSync.executors
_LOOP, _PID, _TASKS = "main_event_loop", "main_event_loop_pid", "task_context"  # of SyncToAsync.threadlocal
_NOTHING = object()
_NO_VARIABLES = contextvars.Context()
_AGAIN = 1.0  # seconds after which a task that has not begun is asked for again: something may have hit its beginning


class Entry(Protocol):
    """One way into a loop."""

    def call(self, running: Running, function: Callable[[], Coroutine[Any, Any, T]], grace: float) -> T:
        """Run ``await function()`` in the loop and wait; thread-sensitive code of it runs in this thread meanwhile.

        Interrupted (KeyboardInterrupt), it cancels the coroutine and serves its cleanup for `grace` seconds.
        """


class OwnEntry:
    """A task in the loop, and an executor for this thread, both made here; the thread runs the loop where it may."""

    def call(self, running: Running, function: Callable[[], Coroutine[Any, Any, T]], grace: float) -> T:
        outer = getattr(AsyncToSync.executors, _CURRENT, None)
        call: _Call[T] = _Call(running, function, outer)
        local = SyncToAsync.threadlocal
        before = _attributes(local)
        thread = call.thread
        nested = thread in running.callers
        try:
            running.callers.add(thread)
            running.calls.add(call)
            try:
                call.serve()
            except BaseException:
                call.interrupt(grace)
                raise
        finally:
            try:
                running.give_back(call)  # where an exception came up in this thread right before
            finally:
                running.calls.discard(call)
                if not nested:
                    running.callers.discard(thread)
            call.close()
            if call.served:  # asgiref has told this thread that it came from the loop
                _set_attributes(local, before)
            take_over(call.context)
            setattr(AsyncToSync.executors, _CURRENT, outer)
            call.context = _NO_VARIABLES  # its own holds it
        return call.result()


class _Call(concurrent.futures.Executor, Generic[T]):
    """One call: its task, and the executor for the thread that waits for it."""

    def __init__(self, running: Running, function: Callable[[], Coroutine[Any, Any, T]], outer: Any) -> None:
        self.running = running
        self.thread = threading.get_ident()
        self.context = contextvars.copy_context()  # in the end, that of the task
        self.begun = False
        self.served = False
        self._function = function
        self._outer = outer
        self._task: asyncio.Task[None] | None = None
        self._posted = False
        self._started = False
        self._over = False
        self._closed = False
        self._value: Any = None
        self._error: BaseException | None = None
        self._items: deque[_Item] = deque()
        self._bell = threading.Lock()  # released to ring it
        self._bell.acquire()

    def result(self) -> T:
        try:
            if self._error is not None:
                raise self._error
            value: T = self._value
            return value
        finally:
            del self._error, self  # no cycle: error -> traceback -> this frame -> error

    # -- in the loop

    def begin(self) -> None:
        if self.running.leader is not self:
            self.running.stop_leading()  # there are two callers now
        self.begun = True
        self._task = self.running.loop.create_task(self._run(), context=self.context.copy())

    async def _run(self) -> None:
        self._started = True
        if self.running.leader is not self:
            take_over(self.context)
        setattr(AsyncToSync.executors, _CURRENT, self)
        try:
            self._value = await self._function()
        except BaseException as error:
            self._error = error
        self.context = contextvars.copy_context()
        self._over = True
        self._attend()

    def abandon(self) -> None:
        if not self._over:
            self._error = asyncio.CancelledError()
            self._over = True
            self._attend()

    def _attend(self) -> None:
        """Have the calling thread look at what is new."""
        running = self.running
        if running.leader is not self:
            self._ring()
            if asyncio._get_running_loop() is running.loop:
                running.may_rest(self)
        elif asyncio._get_running_loop() is running.loop:
            running.stop_leading()
        else:
            running.loop.call_soon_threadsafe(running.stop_leading)

    def _ring(self) -> None:
        with contextlib.suppress(RuntimeError):  # it has rung
            self._bell.release()

    # -- the executor

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> concurrent.futures.Future[Any]:
        """Have `fn` called in the thread of this call; when that is over, of the one around it."""
        item = _Item(functools.partial(fn, *args, **kwargs))
        self._items.append(item)
        if self._closed:
            with contextlib.suppress(ValueError):  # the thread has it
                self._items.remove(item)
                if self._outer is None:
                    raise RuntimeError("the call has ended, and what it left behind cannot use its thread any more")
                return cast("concurrent.futures.Future[Any]", self._outer.submit(fn, *args, **kwargs))
        self._attend()
        return item.future

    # -- in the calling thread

    def wanted(self) -> bool:
        return self._over or bool(self._items)

    def serve(self, until: float | None = None) -> None:
        """Run the loop, or wait for it, and do what the task asks of this thread; until the task has ended."""
        running = self.running
        while not self._over or self._items:
            answer = None
            if self._items:
                self.served = True
                answer = self._items.popleft().run()
                if os.getpid() != running.pid:
                    raise RuntimeError(
                        "the process was forked during the call: the loop is the parent's; end the child, or exec"
                    )
            if until is None and running.take(self):
                running.lead(self, answer)
                continue
            if answer is not None:
                answer()
                continue
            left = -1.0 if until is None else max(0.0, until - time.monotonic())
            if not self.begun:
                self._posted = True
                running.loop.call_soon_threadsafe(self._begin_once)
                left = _AGAIN if until is None else left
            if not self._bell.acquire(timeout=left) and until is not None:
                return

    def _begin_once(self) -> None:
        if not self.begun:
            self.begin()

    def interrupt(self, grace: float) -> None:
        """Cancel the task, and run what it asks of this thread, until it has ended or `grace` seconds are over."""
        if self._over or not (self.begun or self._posted) or os.getpid() != self.running.pid:
            return

        def cancel() -> None:
            if self._task is not None:
                self._task.cancel()
            if not self._started:  # and never will be
                self.abandon()

        with contextlib.suppress(RuntimeError):  # the loop is closed
            self.running.loop.call_soon_threadsafe(cancel)
            self.serve(until=time.monotonic() + grace)

    def close(self) -> None:
        """Take no more work; what came in until now is done here."""
        self._closed = True
        while self._items:
            self._items.popleft().run()()
        self._task = None


class _Item:
    """Something to call in another thread."""

    def __init__(self, function: Callable[[], Any]) -> None:
        self.function = function
        self.future: concurrent.futures.Future[Any] = concurrent.futures.Future()

    def run(self) -> Callable[[], object]:
        """Call it; return what tells the outcome, for the time when the caller wants it told."""
        future = self.future
        if not future.set_running_or_notify_cancel():
            return _nothing
        try:
            return functools.partial(future.set_result, self.function())
        except BaseException as error:
            return functools.partial(future.set_exception, error)
        finally:
            del future, self


def _nothing() -> None:
    """Do nothing."""


class AsgirefEntry:
    """`async_to_sync` itself, made to believe that the calling thread came from the given loop."""

    def call(self, running: Running, function: Callable[[], Coroutine[Any, Any, T]], grace: float) -> T:
        loop = running.loop
        task: asyncio.Task[Any] | None = None
        executor: Any = None

        async def arrived() -> T:
            nonlocal task, executor
            task = asyncio.current_task()
            executor = getattr(AsyncToSync.executors, _CURRENT, None)
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
