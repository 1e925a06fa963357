"""An event loop for a thread that may block: what is asked of worker threads it does itself, there and then.

Most of what synchronous code pays for an asynchronous storage is the waking of threads: into the loop, from there to a
worker, and back, for each step. Where every step is blocking work by nature (a directory, SQLite, Django's ORM), the
caller can do it himself. So the coroutines of the library stay the only text of its procedures, and run in the calling
thread as plain calls would.

What has no thread to be left to knows no deadline either: a system call that hangs holds its caller, as it does in
every synchronous storage.
"""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import heapq
import logging
import queue
import threading
import time
from collections import deque
from collections.abc import Callable, Coroutine
from typing import Any, ParamSpec, TypeVar, TypeVarTuple

__all__ = ["BlockingLoop", "blocking_loop", "run_blocking"]

P = ParamSpec("P")
T = TypeVar("T")
Ts = TypeVarTuple("Ts")

_log = logging.getLogger(__name__)

_GRACE = 5.0  # seconds that an interrupted coroutine has for its cleanup, and tasks that a call has left behind


class BlockingLoop(asyncio.AbstractEventLoop):
    """A loop without a selector, so without sockets, which belongs to one thread and runs one coroutine at a time.

    Tasks, futures, timers and answers of other threads work as in any loop. `perform` is what makes it worth while.
    """

    def __init__(self) -> None:
        self._ready: deque[asyncio.Handle] = deque()
        self._timers: list[asyncio.TimerHandle] = []
        self._from_threads: queue.SimpleQueue[asyncio.Handle] = queue.SimpleQueue()
        self._tasks: set[asyncio.Task[Any]] = set()  # that a call has started beside itself
        self._running = False
        self._closed = False

    # -- for the library

    def perform(self, function: Callable[..., T], *args: Any) -> asyncio.Future[T]:
        """Call ``function(*args)`` now; return its outcome as a future that is done."""
        future: asyncio.Future[T] = self.create_future()
        try:
            future.set_result(function(*args))
        except StopIteration as error:  # a future refuses it
            wrong = RuntimeError("the function raised StopIteration")
            wrong.__cause__ = error
            future.set_exception(wrong)
        except Exception as error:
            future.set_exception(error)
        return future

    def apart(self, function: Callable[P, T], /, *args: P.args, **kwargs: P.kwargs) -> T:
        """Return ``function(*args)``, called as in a thread without a loop: Django's ORM refuses to work in one's."""
        asyncio._set_running_loop(None)
        try:
            return function(*args, **kwargs)
        finally:
            asyncio._set_running_loop(self)

    def run(self, work: Coroutine[Any, Any, T]) -> T:
        """Run `work` to its end; return its result, or raise its error.

        What a signal handler raises meanwhile, KeyboardInterrupt above all, comes up in `work` where that is at it,
        else cancels it; its cleanup runs before that goes on.
        """
        task = asyncio.Task(work, loop=self)
        self._running = True
        asyncio._set_running_loop(self)
        try:
            try:
                while not task.done():
                    self._turn(None)
            except BaseException:
                self._end({task})
                raise
            if self._tasks:
                self._end(self._tasks, cancel=False)
        finally:
            asyncio._set_running_loop(None)
            self._running = False
            if self._timers:
                self._timers = [timer for timer in self._timers if not timer.cancelled()]
                heapq.heapify(self._timers)
        return task.result()

    def _end(self, tasks: set[asyncio.Task[Any]], *, cancel: bool = True) -> None:
        """Run until `tasks` have ended; cancelled now, or when the grace is over."""
        for _ in range(2):
            if cancel:
                for task in tasks:
                    task.cancel()
            until = self.time() + _GRACE
            while (left := [task for task in tasks if not task.done()]) and self.time() < until:
                self._turn(until)
            cancel = True
            if not left:
                break
        for task in tasks:
            if task.done() and not task.cancelled():
                task.exception()  # it is known: what is raised says more

    def _turn(self, until: float | None) -> None:
        """Run what is ready; where nothing is, wait for a timer or another thread, until `until` at the latest."""
        ready, timers, others = self._ready, self._timers, self._from_threads
        if not ready and others.empty():
            ends = [when for when in (until, timers[0].when() if timers else None) if when is not None]
            with contextlib.suppress(queue.Empty):
                ready.append(others.get(timeout=max(0.0, min(ends) - self.time()) if ends else None))
        while not others.empty():  # this thread is the only one that takes
            ready.append(others.get())
        now = self.time() if timers else 0.0
        while timers and timers[0].when() <= now:
            ready.append(heapq.heappop(timers))
        for _ in range(len(ready)):
            handle = ready.popleft()
            if not handle.cancelled():
                handle._run()

    # -- what tasks, futures and timers ask of a loop

    def call_soon(
        self, callback: Callable[[*Ts], object], *args: *Ts, context: contextvars.Context | None = None
    ) -> asyncio.Handle:
        handle = asyncio.Handle(callback, args, self, context)
        self._ready.append(handle)
        return handle

    def call_soon_threadsafe(
        self, callback: Callable[[*Ts], object], *args: *Ts, context: contextvars.Context | None = None
    ) -> asyncio.Handle:
        if self._closed:
            raise RuntimeError("Event loop is closed")
        handle = asyncio.Handle(callback, args, self, context)
        self._from_threads.put(handle)
        return handle

    def call_later(
        self, delay: float, callback: Callable[[*Ts], object], *args: *Ts, context: contextvars.Context | None = None
    ) -> asyncio.TimerHandle:
        return self.call_at(self.time() + delay, callback, *args, context=context)

    def call_at(
        self, when: float, callback: Callable[[*Ts], object], *args: *Ts, context: contextvars.Context | None = None
    ) -> asyncio.TimerHandle:
        timer = asyncio.TimerHandle(when, callback, args, self, context)
        heapq.heappush(self._timers, timer)
        return timer

    def _timer_handle_cancelled(self, handle: asyncio.TimerHandle) -> None:
        """Do nothing: `run` sweeps."""

    def create_future(self) -> asyncio.Future[Any]:
        return asyncio.Future(loop=self)

    def create_task(self, coro: Any, *, name: str | None = None, context: Any = None, **options: Any) -> Any:
        task = asyncio.Task(coro, loop=self, name=name, context=context, **options)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    def run_in_executor(self, executor: Any, func: Callable[..., T], *args: Any) -> asyncio.Future[T]:  # type: ignore[override]
        return self.perform(func, *args)

    def time(self) -> float:
        return time.monotonic()

    def get_debug(self) -> bool:
        return False

    def call_exception_handler(self, context: dict[str, Any]) -> None:
        _log.error(context.get("message", "an error in a callback"), exc_info=context.get("exception"))

    def is_running(self) -> bool:
        return self._running

    def is_closed(self) -> bool:
        return self._closed

    def close(self) -> None:
        self._closed = True


def blocking_loop() -> BlockingLoop | None:
    """Return the running loop if it is one whose thread may block."""
    loop = asyncio._get_running_loop()
    return loop if type(loop) is BlockingLoop else None


def run_blocking(work: Coroutine[Any, Any, T]) -> T:
    """Run `work` in this thread, which must not run a loop, and return its result.

    Only for what needs no socket: see ``works_here`` of backends and meta-backends.

    Raises:
        RuntimeError: this thread runs a loop.
    """
    if asyncio._get_running_loop() is not None:
        work.close()
        raise RuntimeError("this thread runs an event loop, which must not block: await the call there")
    owner = _mine.owner
    if owner.loop.is_running():  # a call from within `apart`
        owner = _Owner()
    return owner.loop.run(work)


class _Owner:
    """Closes a loop with the thread that it belongs to, so that `PerLoop` lets go of it."""

    def __init__(self) -> None:
        self.loop = BlockingLoop()  # type: ignore[abstract]  # it has no sockets, signals and processes

    def __del__(self) -> None:
        self.loop.close()


class _Mine(threading.local):
    def __init__(self) -> None:
        self.owner = _Owner()


_mine = _Mine()
