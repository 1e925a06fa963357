"""How long the outside world may take, in seconds: the limits, and the watch over one without progress."""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import math
import time
from collections.abc import Iterator
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass, replace
from types import TracebackType
from typing import Any, Self

from .loops import PerLoop

__all__ = ["Alarm", "IdleWatch", "Timeouts", "elapsed", "is_number", "is_whole", "progress", "unhurried"]


def elapsed() -> float:
    """Return seconds by a clock that nobody can set and that goes on while the machine sleeps, where there is one: by
    when something had to be done, others see by clocks that do not sleep."""
    return time.clock_gettime(time.CLOCK_BOOTTIME) if hasattr(time, "CLOCK_BOOTTIME") else time.monotonic()


@dataclass(frozen=True, slots=True, kw_only=True)
class Timeouts:
    """Limits in seconds. None says aloud: wait for ever.

    Attributes:
        operation: one small call at a backend or a meta-backend (stat, discard, one statement), queueing included.
        idle: a read or a write may go this long without progress at the original. A large healthy stream is
            never killed by it. Time spent waiting for the caller's content is not counted.
        source: the caller's content may take this long for each next chunk; then the save fails with ContentError.
        cleanup: how long a failed or cancelled call waits for its own undo before it leaves the rest to the
            owner's cleanup task and to reconcile.
    """

    operation: float | None = 30.0
    idle: float | None = 60.0
    source: float | None = 300.0
    cleanup: float = 10.0

    def __post_init__(self) -> None:
        for name in ("operation", "idle", "source", "cleanup"):
            seconds = getattr(self, name)
            if seconds is None and name != "cleanup":
                continue
            if seconds is None or not seconds > 0:
                rest = "" if name == "cleanup" else ", or None for no limit"
                raise ValueError(f"Timeouts({name}={seconds!r}): seconds must be positive{rest}")

    def but(self, **changes: float | None) -> Timeouts:
        """Return a copy with some limits changed."""
        return replace(self, **changes)  # type: ignore[arg-type]


def is_number(value: object) -> bool:
    """Return whether `value` is a number, true and false apart."""
    return isinstance(value, int | float) and not isinstance(value, bool)


def is_whole(value: object) -> bool:
    """Return whether `value` is a whole number, true and false apart."""
    return isinstance(value, int) and not isinstance(value, bool)


class Alarm:
    """Raise TimeoutError from a ``with`` block after `seconds` (None: never), as ``asyncio.timeout`` does.

    Cheaper, because a loop has one timer for all its alarms: it is set for the earliest, and moved only when it rings
    or an earlier one comes. Alarms of equal length, entered one after the other and left in time, cost no timer at all.
    """

    __slots__ = ("_alarms", "_before", "_expired", "_seconds", "_task", "when")

    def __init__(self, seconds: float | None) -> None:
        self._seconds = seconds
        self._alarms: _Alarms | None = None
        self._task: asyncio.Task[Any] | None = None
        self._before = 0
        self._expired = False
        self.when = math.inf  # by the loop's clock

    def __enter__(self) -> Self:
        if self._seconds is not None:
            task = asyncio.current_task()
            if task is None:
                raise RuntimeError("an alarm needs a task that it can interrupt")
            self._task, self._before = task, task.cancelling()
            self._alarms = _here()
            self._alarms.entered.add(self)
            self.go_on()
        return self

    def __exit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._alarms is None or self._task is None:
            return
        self._alarms.entered.discard(self)
        if self._expired and self._task.uncancel() <= self._before and exc_type is asyncio.CancelledError:
            raise TimeoutError(f"not over within {self._seconds:g} seconds") from exc

    def expired(self) -> bool:
        """Return whether the limit was reached, so that a TimeoutError is this one's."""
        return self._expired

    def pause(self) -> None:
        """Stop the clock."""
        self.when = math.inf

    def go_on(self) -> None:
        """Start the clock anew."""
        if self._alarms is not None and self._seconds is not None:
            self.when = self._alarms.loop.time() + self._seconds
            self._alarms.watch(self.when)

    def ring(self) -> None:
        """Interrupt the task."""
        self._expired = True
        assert self._task is not None
        self._task.cancel()


class _Alarms:
    """The alarms of one event loop, and their timer."""

    def __init__(self) -> None:
        self.loop = asyncio.get_running_loop()
        self.entered: set[Alarm] = set()
        self._timer: asyncio.TimerHandle | None = None

    def watch(self, when: float) -> None:
        """See to it that the timer rings at `when` at the latest."""
        if self._timer is not None:
            if self._timer.when() <= when:
                return
            self._timer.cancel()
        self._timer = self.loop.call_at(when, self._ring)

    def _ring(self) -> None:
        self._timer = None
        now = self.loop.time()
        for alarm in [alarm for alarm in self.entered if alarm.when <= now]:
            self.entered.discard(alarm)
            alarm.ring()
        first = min((alarm.when for alarm in self.entered), default=math.inf)
        if first < math.inf:
            self.watch(first)


_alarms: PerLoop[_Alarms] = PerLoop(_Alarms)
_latest: _Alarms | None = None


def _here() -> _Alarms:
    """Return the alarms of the running loop; those asked for last without a look-up, because every save asks."""
    global _latest
    found = _latest
    if found is None or found.loop is not asyncio.get_running_loop():
        found = _latest = _alarms.get()
    return found


_watching: contextvars.ContextVar[IdleWatch | None] = contextvars.ContextVar("aproxy_storage.watching", default=None)


def progress() -> None:
    """Tell the watch over this task's work that it gets on; for a backend that takes no chunks, as in a copy."""
    watch = _watching.get()
    if watch is not None:
        watch.go_on()


@contextlib.contextmanager
def unhurried() -> Iterator[None]:
    """Stop the clock of the watch over this task's work: for a service that works by itself, and shows in a way of its
    own that it does. Whoever uses it keeps a limit. Not to be nested, nor used by several tasks of one work."""
    watch = _watching.get()
    if watch is not None:
        watch.pause()
    try:
        yield
    finally:
        if watch is not None:
            watch.go_on()


class IdleWatch(AbstractAsyncContextManager["IdleWatch"]):
    """Raise TimeoutError when the block makes no progress for `seconds` (None: never) while the clock is running.

    Whoever sees progress calls `go_on`; whoever waits for something that is not to be counted, `pause`. Both are
    passed on to `outer`, the watch around this one. `pause` and `go_on` may be called from any task of the loop, and
    `progress` where only the context is at hand.
    """

    __slots__ = ("_alarm", "_outer", "_reset", "_seconds")

    def __init__(self, seconds: float | None, outer: IdleWatch | None = None) -> None:
        self._seconds = seconds
        self._outer = outer
        self._alarm = Alarm(seconds)

    async def __aenter__(self) -> Self:
        self._alarm.__enter__()
        self._reset = _watching.set(self)
        return self

    async def __aexit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        _watching.reset(self._reset)
        try:
            self._alarm.__exit__(exc_type, exc, traceback)
        except TimeoutError as error:
            raise TimeoutError(f"no progress for {self._seconds:g} seconds") from error.__cause__

    def expired(self) -> bool:
        """Return whether the limit was reached, so that a TimeoutError is this one's."""
        return self._alarm.expired()

    def pause(self) -> None:
        """Stop the clock."""
        if self._outer is not None:
            self._outer.pause()
        self._alarm.pause()

    def go_on(self) -> None:
        """Start the clock anew."""
        if self._outer is not None:
            self._outer.go_on()
        self._alarm.go_on()
