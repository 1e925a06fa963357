"""The one door from synchronous code into an event loop.

One long-lived loop per process, started by the first call, with a daemon thread that keeps it. A plain
``async_to_sync`` makes a new loop for every call, so that no pool or client survives the call that made it. The rest is
as with asgiref: context variables go in and come back, and thread-sensitive `sync_to_async` code, Django's ORM above
all, runs in the *calling* thread, with its connection and in its transaction, because the caller serves it while it
waits. `_loop` says who runs the loop when, `_asgiref` how a call goes in.
"""

from __future__ import annotations

import asyncio
import atexit
import contextlib
import contextvars
import logging
import os
import sys
import threading
import weakref
from collections.abc import Awaitable, Callable
from typing import ParamSpec, TypeVar

from ._asgiref import choose_entry
from ._contexts import renew_lock
from ._loop import Running

__all__ = ["Bridge", "BridgeClosed", "BridgeError", "SyncCallOnEventLoop", "bridge", "refuse_on_event_loop"]

P = ParamSpec("P")
T = TypeVar("T")

_log = logging.getLogger(__name__)

_START = 10.0  # seconds that the thread may take to start


class BridgeError(RuntimeError):
    """The bridge cannot be used here; the message says why, and the way out."""


class BridgeClosed(BridgeError):
    """The bridge was closed, by the end of the process above all, before or during the call."""


class SyncCallOnEventLoop(BridgeError):
    """A synchronous method was called in a thread with a running event loop, which it would have blocked."""


def refuse_on_event_loop(what: str, instead: str = "the method of the same name with an a before it") -> None:
    """Raise SyncCallOnEventLoop if the calling thread runs an event loop. Costs less than a microsecond.

    `what` was called, `instead` is what to await in its place.
    """
    if asyncio._get_running_loop() is not None:
        raise SyncCallOnEventLoop(
            f"{what} was called in a thread with a running event loop, which it would block: await {instead}, "
            "or move the synchronous code into a thread: await sync_to_async(function)(...). That function has to do "
            "all of it: a file field opens its file when `read` is looked up (lambda: document.file.read())"
        )


class Bridge:
    """Runs coroutine functions on a loop of its own, for callers that cannot await.

    Args:
        name: of the thread.
        grace: seconds that `close` waits for calls under way, and that an interrupted call has for its cleanup.

    May be used from any number of threads. After a fork the child starts a thread and a loop of its own on first use,
    and leaves the parent's connections alone. Django's `bridge` lives as long as the process; close others.
    """

    def __init__(self, name: str = "aproxy_storage-bridge", *, grace: float = 5.0) -> None:
        self.name = name
        self.grace = grace
        self._closers: dict[Callable[[], Awaitable[object]], None] = {}
        self._closed = False
        self._of_parents: list[object] = []
        self._current: Running | None = None
        self._lock = threading.Lock()
        _bridges.add(self)

    def __repr__(self) -> str:
        return f"<Bridge {self.name!r}>"

    def call(self, function: Callable[P, Awaitable[T]], /, *args: P.args, **kwargs: P.kwargs) -> T:
        """Run ``await function(*args, **kwargs)`` on the loop of the bridge; return its result, or raise its error.

        A KeyboardInterrupt, or whatever else a signal handler raises, cancels the coroutine. It then has `grace`
        seconds to clean up, thread-sensitive code of it in this thread as always, before the interrupt goes on.

        Raises:
            SyncCallOnEventLoop: this thread runs an event loop. No coroutine has been made then.
            BridgeClosed: the bridge was closed, before the call or during it.
            BridgeError: threads do not work here (gevent, uWSGI without ``--enable-threads``).
        """
        if asyncio._get_running_loop() is not None:
            refuse_on_event_loop(f"the synchronous side of {_name_of(function)}()", f"{_name_of(function)}() itself")
        token = object()
        running = self._enter(token)

        async def on_bridge() -> T:
            if asyncio.get_running_loop() is not running.loop:  # asgiref takes a new loop where ours is closed
                raise BridgeClosed(f"{self.name} was closed during the call of {_name_of(function)}")
            return await function(*args, **kwargs)

        try:
            result: T = running.entry.call(running, on_bridge, self.grace)
            return result
        except asyncio.CancelledError:
            if running.closing:
                raise BridgeClosed(f"{self.name} was closed during the call of {_name_of(function)}") from None
            raise
        finally:
            running.leave(token)

    def end(self, function: Callable[[], Awaitable[object]]) -> None:
        """Call what closes something, and wait; in the thread of a loop, do not wait. Nothing after the end."""
        running = self._current
        if asyncio._get_running_loop() is not None or (running is not None and running.has_turn()):
            self.post(function)
            return
        with contextlib.suppress(BridgeClosed):
            self.call(function)

    def post(self, function: Callable[[], Awaitable[object]]) -> None:
        """Have ``await function()`` run on the loop, and do not wait. Takes no lock, so that destructors may use it.

        Does nothing where there is no loop any more. An error is logged.
        """
        running = self._current
        if running is None or running.closing:
            return

        async def quietly() -> None:
            try:
                await function()
            except Exception as error:
                _log.warning("%s failed: %r", _name_of(function), error)

        def start() -> None:
            task = running.loop.create_task(quietly(), context=contextvars.Context())
            _posted.add(task)
            task.add_done_callback(_posted.discard)

        with contextlib.suppress(RuntimeError):  # the loop is closed
            running.loop.call_soon_threadsafe(start)

    def on_close(self, closer: Callable[[], Awaitable[object]]) -> None:
        """Have `closer` awaited on the loop when the bridge is closed: last come, first closed; each one once.

        It runs when the interpreter ends, where executors take nothing any more (``asyncio.to_thread`` fails).
        """
        self._closers.setdefault(closer)

    def close(self) -> None:
        """Refuse new calls, let those under way end within `grace`, run the closers, end loop and thread.

        What still runs then is cancelled; its callers get BridgeClosed. Idempotent.
        """
        running = self._current
        if running is not None and (asyncio._get_running_loop() is running.loop or running.has_turn()):
            raise SyncCallOnEventLoop(f"{self.name} cannot be closed from its own loop")
        with self._lock:
            self._closed = True
            running = self._current
        if running is None or running.closing:
            return
        running.close_to_calls(self.grace)
        if running.thread.is_alive():
            try:
                # As a call of this thread: thread-sensitive code of a closer runs here, executors are gone by now.
                running.entry.call(running, self._run_closers, self.grace)
            except Exception:
                _log.exception("%s: closing failed", self.name)
            if not running.stop(self.grace + 1.0):
                _log.warning("%s: its loop is blocked and did not stop within %g seconds", self.name, self.grace + 1.0)
        self._current = None

    async def _run_closers(self) -> None:
        for closer in reversed(list(self._closers)):
            try:
                async with asyncio.timeout(self.grace):
                    await closer()
            except Exception as error:
                _log.warning("%s: %s failed: %r", self.name, _name_of(closer), error)

    def _enter(self, token: object) -> Running:
        running = self._current
        if running is None:
            running = self._start()
        if running.has_turn():  # in a destructor, where the loop comes to a stand or sets out
            raise SyncCallOnEventLoop(f"this thread runs the loop of {self.name}: it cannot wait for it")
        if not running.enter(token):
            raise BridgeClosed(f"{self.name} is closed: the process is ending")
        return running

    def _start(self) -> Running:
        with self._lock:
            if self._closed:
                raise BridgeClosed(f"{self.name} is closed: the process is ending")
            if self._current is None:
                _check_threads()
                running = Running(self.name)
                if not running.ready.wait(_START):
                    raise BridgeError(
                        f"the thread {self.name!r} did not start within {_START:g} seconds; {_THREADS_NEEDED}"
                    )
                try:
                    running.entry = choose_entry(running, self.grace)
                except BaseException as error:
                    running.stop(self.grace)
                    if isinstance(error, Exception):
                        raise BridgeError(f"{self.name} cannot be used: {error}") from error
                    raise
                self._current = running
            return self._current

    def _forget_parent(self) -> None:
        # The child has the parent's sockets and its epoll instance, but not its thread. Closing a pool would say
        # goodbye on the parent's connections, and taking a descriptor out would take it out of the parent's epoll
        # set: nothing is touched, and nothing collected.
        self._of_parents.append((self._current, self._closers))
        self._current = None
        self._closers = dict(self._closers)
        self._lock = threading.Lock()


def _name_of(function: Callable[..., object]) -> str:
    return getattr(function, "__qualname__", None) or repr(function)


# -- where threads do not work

_THREADS_NEEDED = "the bridge needs threads: start uWSGI with --enable-threads, gunicorn with sync or gthread workers"


def who_patched_threads() -> str | None:
    """Return the name of the library that has put something else in the place of threads. Several of its greenlets
    share what Python keeps for a thread, the running event loop above all."""
    patched = getattr(sys.modules.get("gevent.monkey"), "is_module_patched", None)
    if patched is not None and patched("threading"):
        return "gevent"
    patched = getattr(sys.modules.get("eventlet.patcher"), "is_monkey_patched", None)
    return "eventlet" if patched is not None and patched("thread") else None


def _check_threads() -> None:
    """Raise BridgeError where a thread would not be one, or would not run."""
    if (patcher := who_patched_threads()) is not None:
        raise BridgeError(f"{patcher} has patched threading, so that an event loop would stop it; {_THREADS_NEEDED}")
    options = getattr(sys.modules.get("uwsgi"), "opt", None)
    if options is not None and not {"enable-threads", "threads"} & {_text(key) for key in options}:
        raise BridgeError(f"uWSGI runs without threads; {_THREADS_NEEDED}")


def _text(value: str | bytes) -> str:
    return value.decode() if isinstance(value, bytes) else value


# -- the life of the process

_bridges: weakref.WeakSet[Bridge] = weakref.WeakSet()
_posted: set[asyncio.Task[None]] = set()  # a task that nobody holds may be collected while it runs


def _after_fork() -> None:
    renew_lock()
    for one in list(_bridges):
        one._forget_parent()
    _posted.clear()


def _at_exit() -> None:
    for one in list(_bridges):
        one.close()


os.register_at_fork(after_in_child=_after_fork)
# Plain atexit, on purpose: it runs after other threads and executors' workers have been joined, so that their last
# calls still come through. threading's own hook would close the bridge first, and lose their files.
atexit.register(_at_exit)

#: The bridge of this process.
bridge = Bridge()
