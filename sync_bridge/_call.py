"""One call into the loop of the bridge: its task, and the executor for the thread that waits for it.

In the main thread a signal handler may raise between any two instructions. So nothing here takes a lock that the loop
takes too; a lock that stays taken would stop the loop for everybody. Sets and deques change in one step each.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
import contextvars
import functools
import os
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Coroutine
from types import TracebackType
from typing import Any, Generic, TypeVar

from ._contexts import set_executor, take_over
from ._loop import Running

__all__ = ["Call"]

T = TypeVar("T")

_AGAIN = 1.0  # seconds after which a task that has not begun is asked for again: something may have hit its beginning
_NO_VARIABLES = contextvars.Context()


class Call(concurrent.futures.Executor, Generic[T]):
    """A coroutine function that a thread waits for.

    Args:
        outer: the executor for this thread's thread-sensitive code until now.

    Attributes:
        thread: the one that waits.
        leads: whether it may run the loop itself.
        served: whether thread-sensitive code was called.
        context: of the thread, and in the end of the task.
    """

    def __init__(self, running: Running, function: Callable[[], Coroutine[Any, Any, T]], outer: Any) -> None:
        self.running = running
        self.thread = threading.get_ident()
        self.leads = _may_lead(outer)
        self.context = contextvars.copy_context()
        self.begun = False
        self.served = False
        self._function: Callable[[], Coroutine[Any, Any, T]] | None = function
        self._outer = outer
        self._task: asyncio.Task[None] | None = None
        self._posted = False
        self._started = False
        self._over = False
        self._closed = False
        self._value: Any = None
        self._error: BaseException | None = None
        self._items: deque[Any] = deque()
        self._bell = threading.Lock()  # released to ring it
        self._bell.acquire()

    def run(self, grace: float) -> T:
        """Run it, and return its result. Interrupted, cancel it, and serve its cleanup for `grace` seconds."""
        running = self.running
        outermost = running.register(self)
        try:
            try:
                self._serve()
            except BaseException:
                self._interrupt(grace)
                raise
        finally:
            try:
                running.give_back(self)  # where an exception came up in this thread right before
            finally:
                running.deregister(self, outermost)
            self._close()
            take_over(self.context)
            self.context = _NO_VARIABLES  # its own holds this object
        return self._result()

    def _result(self) -> T:
        try:
            if self._error is not None:
                raise self._error
            value: T = self._value
            return value
        finally:
            del self._error, self._value, self  # no cycle: error -> traceback -> this frame -> error

    # -- in the loop

    def begin(self) -> None:
        """Start the task. On the loop, or in the thread whose turn it is."""
        if self.begun or self._over:
            return
        if self.running.leader is not self:
            self.running.stop_leading()  # there are two callers now
        self.begun = True
        # Held until it is over; it belongs to the thread that waits for it, which cancels it when it is interrupted.
        self._task = self.running.loop.create_task(self._run(), context=self.context.copy())
        self._task.add_done_callback(self._ended)

    async def _run(self) -> None:
        self._started = True
        if self.running.leader is not self:
            take_over(self.context)
        set_executor(self)
        function, self._function = self._function, None  # what it starts holds this object, and not its arguments
        assert function is not None
        try:
            self._value = await function()
        except BaseException as error:
            self._error = error
        task = self._task  # which the calling thread forgets as soon as it has looked
        self.context = contextvars.copy_context()
        self._over = True
        self._attend()
        if task is not None:
            task.remove_done_callback(self._ended)

    def _ended(self, task: asyncio.Task[None]) -> None:
        """Tell the thread of an end that it was not told of: what is raised in the one that leads may hit anything."""
        self._end_with(asyncio.CancelledError() if task.cancelled() else task.exception())

    def abandon(self) -> None:
        """End with a CancelledError, unless it has ended."""
        if not self._over:
            self._end_with(asyncio.CancelledError())

    def _end_with(self, error: BaseException | None) -> None:
        if not self._over:
            self._error = error if self._error is None else self._error
            self._over = True
        if not self._closed:
            self._attend()

    def _attend(self) -> None:
        """Have the calling thread look at what is new."""
        running = self.running
        on_loop = asyncio._get_running_loop() is running.loop
        if running.leader is not self:
            running.waiting.discard(self)
            if not (on_loop and running.rest_for(self)):
                self.ring()
        elif on_loop:
            running.stop_leading()
        else:
            running.loop.call_soon_threadsafe(running.stop_leading)

    def ring(self) -> None:
        """Wake the calling thread. From any thread."""
        with contextlib.suppress(RuntimeError):  # it has rung
            self._bell.release()

    # -- the executor

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Any:
        """Have `fn` called in the thread of this call; when that is over, of the one around it.

        Returns a future of the running loop, which ``run_in_executor`` takes as well; without one a concurrent one.
        """
        loop = asyncio._get_running_loop()
        future: Any = concurrent.futures.Future() if loop is not self.running.loop else loop.create_future()
        item = _Item(functools.partial(fn, *args, **kwargs), future)
        self._items.append(item)
        if self._closed:
            with contextlib.suppress(ValueError):  # the thread has it
                self._items.remove(item)
                if self._outer is None:
                    raise RuntimeError("the call has ended, and what it left behind cannot use its thread any more")
                return self._outer.submit(fn, *args, **kwargs)
        self._attend()
        return future

    # What asgiref's own executors look at in the one around them, when a task has outlived theirs.

    @property
    def _broken(self) -> bool:
        return self._closed

    @property
    def _old_executor(self) -> Any:
        return self._outer

    @property
    def _work_items(self) -> deque[Any]:
        return self._items

    @property
    def _work_ready(self) -> _Ready:
        return _Ready(self._attend)

    # -- in the calling thread

    def wanted(self) -> bool:
        """Return whether the calling thread has something else to do than to run the loop."""
        return self._over or bool(self._items)

    def _serve(self, until: float | None = None) -> None:
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
            elif answer is not None:
                running.loop.call_soon_threadsafe(answer)
            elif not self._wait(until):
                return

    def _wait(self, until: float | None) -> bool:
        """Wait for the keeper to run the loop, until there is something to do here; False after `until`."""
        running = self.running
        seconds = -1.0 if until is None else max(0.0, until - time.monotonic())
        if not (self.begun or self._over):
            self._posted = True
            running.loop.call_soon_threadsafe(self.begin)
            seconds = _AGAIN if until is None else seconds
        try:
            running.waiting.add(self)
            running.need_keeper()
            return self.wanted() or self._bell.acquire(timeout=seconds) or until is None
        finally:
            running.waiting.discard(self)

    def _interrupt(self, grace: float) -> None:
        """Cancel the task, and do what it asks of this thread, until it has ended or `grace` seconds are over."""
        if self._over or not (self.begun or self._posted) or os.getpid() != self.running.pid:
            return

        def cancel() -> None:
            if self._task is not None:
                self._task.cancel()
            if not self._started:  # and never will be
                self.abandon()

        with contextlib.suppress(RuntimeError):  # the loop is closed
            self.running.loop.call_soon_threadsafe(cancel)
            self._serve(until=time.monotonic() + grace)

    def _close(self) -> None:
        """Take no more work; what came in until now is done here, unless this is a child of the process it was for."""
        self._closed = True
        if os.getpid() != self.running.pid:
            self._items.clear()
        while self._items:
            self.served = True
            answer = self._items.popleft().run()
            with contextlib.suppress(RuntimeError):  # the loop is closed
                if answer is not None:
                    self.running.loop.call_soon_threadsafe(answer)
        self._task = None


def _may_lead(outer: Any) -> bool:
    """Return whether this thread, in its present state, may run what others have put into the loop as well."""
    if threading.get_ident() == threading.main_thread().ident:
        return False  # signal handlers
    if outer is not None and not isinstance(outer, Call):
        return False  # asgiref's executors take nothing from their own thread
    if sys.exc_info()[1] is not None:
        return False  # it would be the context of everybody's errors
    try:
        sys._getframe(sys.getrecursionlimit() // 2)
    except ValueError:
        return True
    return False  # not enough stack left


class _Item:
    """Something to call in another thread, and where to tell its outcome."""

    def __init__(self, function: Callable[[], Any], future: Any) -> None:
        self._function = function
        self._future = future

    def run(self) -> Callable[[], object] | None:
        """Call it; return what is to be called on the loop then."""
        future = self._future
        if isinstance(future, asyncio.Future) and future.cancelled():
            return None
        try:
            return functools.partial(_tell, future, self._function(), None)
        except BaseException as error:
            return functools.partial(_tell, future, None, error)
        finally:
            del future, self


def _tell(future: Any, value: Any, error: BaseException | None) -> None:
    try:
        if future.cancelled():
            return
        if isinstance(error, StopIteration):  # a future refuses it
            wrong = RuntimeError("thread-sensitive code raised StopIteration")
            wrong.__cause__ = error
            error = wrong
        if error is None:
            future.set_result(value)
        else:
            future.set_exception(error)
    except (asyncio.InvalidStateError, concurrent.futures.InvalidStateError):
        pass  # cancelled meanwhile
    finally:
        del error, future


class _Ready:
    """A condition as far as asgiref uses it, without its lock."""

    def __init__(self, notify: Callable[[], None]) -> None:
        self.notify = notify

    def __enter__(self) -> None:
        pass

    def __exit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        pass
