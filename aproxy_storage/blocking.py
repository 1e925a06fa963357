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

from .errors import StorageError

__all__ = ["BlockingLoop", "blocking_loop", "came_from_outside", "run_blocking"]

P = ParamSpec("P")
T = TypeVar("T")
Ts = TypeVarTuple("Ts")

_log = logging.getLogger(__name__)

_NOTHING = object()
#: What work raises of itself. Soft time limits and the like are of other kinds.
_WITHIN = (StorageError, OSError, ValueError, TypeError, LookupError, ArithmeticError, AttributeError, AssertionError,
           RuntimeError, MemoryError, ImportError)  # fmt: skip
_GRACE = 5.0  # seconds that an interrupted coroutine has for its cleanup, and tasks that a call has left behind


class _Callback:
    """What a handle is here besides: it knows whether it has begun. An interrupt right before that must not lose it."""

    begun = False

    def _run(self: Any) -> None:
        self.begun = True  # from here on nothing is called but the callback
        try:
            self._context.run(self._callback, *self._args)
        except (SystemExit, KeyboardInterrupt):
            raise
        except BaseException as error:
            self._loop.call_exception_handler({"message": f"an error in {self._callback!r}", "exception": error})


class _Handle(_Callback, asyncio.Handle):
    pass


class _Timer(_Callback, asyncio.TimerHandle):
    pass


class BlockingLoop(asyncio.AbstractEventLoop):
    """A loop without a selector, so without sockets, which belongs to one thread and runs one coroutine at a time.

    Tasks, futures, timers and answers of other threads work as in any loop. `perform` is what makes it worth while.

    In the main thread a signal handler may raise between any two instructions: on Ctrl-C, or when a soft time limit of
    a task is over. So no callback is taken out of the queue before it has begun, and whatever was set is reset in a
    ``finally`` whose only call is the one that resets it.
    """

    def __init__(self) -> None:
        self._ready: deque[_Handle | _Timer] = deque()  # other threads put in too
        self._timers: list[_Timer] = []
        self._woken: queue.SimpleQueue[None] = queue.SimpleQueue()
        self._tasks: set[asyncio.Task[Any]] = set()  # that a call has started beside itself
        self._running = False
        self._closed = False

    # -- for the library

    def perform(self, function: Callable[..., T], *args: Any) -> asyncio.Future[T]:
        """Call ``function(*args)`` now; return its outcome as a future that is done."""
        future: asyncio.Future[T] = self.create_future()
        try:
            value = function(*args)
        except StopIteration as error:  # a future refuses it
            wrong = RuntimeError("the function raised StopIteration")
            wrong.__cause__ = error
            future.set_exception(wrong)
        except Exception as error:
            future.set_exception(error)
        else:
            future.set_result(value)
        try:
            return future
        finally:
            del future, function, args  # no cycle: error -> traceback -> this frame -> future -> error

    def apart(self, function: Callable[P, T], /, *args: P.args, **kwargs: P.kwargs) -> T:
        """Return ``function(*args)``, called as in a thread without a loop: Django's ORM refuses to work in one's."""
        try:
            asyncio._set_running_loop(None)
            return function(*args, **kwargs)
        finally:
            asyncio._set_running_loop(self)

    def run(self, work: Coroutine[Any, Any, T]) -> T:
        """Run `work` to its end; return its result, or raise its error. Context variables it sets stay set.

        What a signal handler raises meanwhile comes up in `work` where that is at it, else cancels it; its cleanup runs
        before that goes on.
        """
        task: asyncio.Task[T] | None = None
        context = contextvars.copy_context()
        try:
            self._running = True
            asyncio._set_running_loop(self)
            task = asyncio.Task(work, loop=self, context=context)
            while not task.done():
                self._turn(None)
            if self._tasks:
                self._end(self._tasks, cancel=False)
        except BaseException:
            if task is None:  # or made, and not yet known here
                work.close()
                self._ready.clear()
            else:
                self._end({task, *self._tasks})
            raise
        finally:
            self._running = False
            asyncio._set_running_loop(None)
        while not self._woken.empty():  # by what had been taken up before there was a need to wait
            self._woken.get()
        if self._timers:
            self._timers = [timer for timer in self._timers if not timer.cancelled()]
            heapq.heapify(self._timers)
        for variable, value in context.items():
            if variable.get(_NOTHING) is not value:
                variable.set(value)
        return task.result()

    def _end(self, tasks: set[asyncio.Task[Any]], *, cancel: bool = True) -> None:
        """Run until `tasks` have ended; cancelled now, or when the grace is over."""
        for _ in range(2):
            if cancel:
                for task in list(tasks):
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
        ready, timers = self._ready, self._timers
        if not ready:
            ends = [when for when in (until, timers[0].when() if timers else None) if when is not None]
            with contextlib.suppress(queue.Empty):
                self._woken.get(timeout=max(0.0, min(ends) - self.time()) if ends else None)
        now = self.time() if timers else 0.0
        while timers and timers[0].when() <= now:
            ready.append(timers[0])
            heapq.heappop(timers)
        for _ in range(len(ready)):
            handle = ready[0]
            try:
                if not (handle.begun or handle.cancelled()):
                    handle._run()
                handle.begun = True
            finally:
                if handle.begun:
                    ready.popleft()

    # -- what tasks, futures and timers ask of a loop

    def call_soon(
        self, callback: Callable[[*Ts], object], *args: *Ts, context: contextvars.Context | None = None
    ) -> asyncio.Handle:
        handle = _Handle(callback, args, self, context)
        self._ready.append(handle)
        return handle

    def call_soon_threadsafe(
        self, callback: Callable[[*Ts], object], *args: *Ts, context: contextvars.Context | None = None
    ) -> asyncio.Handle:
        if self._closed:
            raise RuntimeError("Event loop is closed")
        handle = _Handle(callback, args, self, context)
        self._ready.append(handle)
        self._woken.put(None)
        return handle

    def call_later(
        self, delay: float, callback: Callable[[*Ts], object], *args: *Ts, context: contextvars.Context | None = None
    ) -> asyncio.TimerHandle:
        return self.call_at(self.time() + delay, callback, *args, context=context)

    def call_at(
        self, when: float, callback: Callable[[*Ts], object], *args: *Ts, context: contextvars.Context | None = None
    ) -> asyncio.TimerHandle:
        timer = _Timer(when, callback, args, self, context)
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


def came_from_outside(error: BaseException, *drivers: type[BaseException]) -> bool:
    """Return whether `error` seems to be a signal handler's, raised in a thread that blocks: there it comes up in the
    middle of anything, and must reach the caller as it is. `drivers`: the errors of the drivers that may be at work."""
    return blocking_loop() is not None and not isinstance(error, (*_WITHIN, *drivers))


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
