"""What stands before each original: its circuit breakers, its slots, and the counts that `health` gives.

One gate per original of a storage and per process, used from any event loop and thread. `start` and `finish` cost a
lock and a few counters; only who has to wait for a slot awaits anything.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from .breaker import Breaker, BreakerState, CircuitBreaker, Ticket
from .errors import BackendUnavailable

__all__ = ["Admission", "Gate", "Kind", "Outcome", "Traffic"]

_log = logging.getLogger(__name__)

#: Writing and opening for reading have circuits of their own: a full or read-only disk can still be read.
Kind = Literal["write", "read"]

#: How a call ended: ``"ok"``; ``"failed"``: an outage; ``"timeout"``: no progress in time; ``"refused"``: the error was
#: the call's own, the original is in order; ``"outrun"``: too slow, another original was faster; ``"aborted"``: the
#: content failed, or the record; ``"cancelled"``; ``"skipped"``: the circuit is open, nothing was tried;
#: ``"crowded"``: no slot was free in time, or before another original was done.
Outcome = Literal["ok", "failed", "timeout", "refused", "outrun", "aborted", "cancelled", "skipped", "crowded"]

_BAD: frozenset[Outcome] = frozenset({"failed", "timeout", "outrun"})
_ANSWERED: frozenset[Outcome] = frozenset({"ok", "refused"})

_MINUTES = 5  # that counts and quantiles look back on
_KEPT = 512  # latest calls of each kind that are remembered for them


@dataclass(frozen=True, slots=True)
class Traffic:
    """What went through one gate in the last five minutes; quantiles are of the latest 512 calls at most.

    Attributes:
        breaker: of the circuit for this kind; None: the placement has none.
        in_flight: calls under way, without those that are `waiting` for a slot.
        calls: that ended. failures: outages, timeouts and those that another original outran.
        p50, p99: seconds that successful calls took; None: there was none.
    """

    breaker: BreakerState | None = None
    in_flight: int = 0
    waiting: int = 0
    calls: int = 0
    failures: int = 0
    p50: float | None = None
    p99: float | None = None


class Admission:
    """One call that was let in."""

    __slots__ = ("has_slot", "kind", "pid", "since", "ticket")

    def __init__(self, kind: Kind, ticket: Ticket | None, since: float, pid: int) -> None:
        self.kind = kind
        self.ticket = ticket
        self.since = since
        self.pid = pid
        self.has_slot = False


class _Waiter:
    __slots__ = ("future", "granted", "kind", "loop")

    def __init__(self, kind: Kind) -> None:
        self.kind = kind
        self.loop = asyncio.get_running_loop()
        self.future: asyncio.Future[None] = self.loop.create_future()
        self.granted = False

    def answer(self, error: BackendUnavailable | None = None) -> bool:
        """Wake it up, from whatever thread; return False if its loop is gone."""

        def wake() -> None:
            if not self.future.done():
                if error is None:
                    self.future.set_result(None)
                else:
                    self.future.set_exception(error)

        try:
            self.loop.call_soon_threadsafe(wake)
        except RuntimeError:  # closed
            return False
        return True


class Gate:
    """The gate of the original `name`.

    Args:
        breaker: settings of its circuits; None: it always lets in.
        max_concurrency: calls at a time; None: any number.
        fallback_on, attempt_timeout: what its attempts go by; kept here, where they look for it.
        clock: seconds that never go back.
    """

    def __init__(
        self,
        name: str,
        *,
        breaker: Breaker | None = None,
        max_concurrency: int | None = None,
        fallback_on: tuple[type[BaseException], ...] = (),
        attempt_timeout: float | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.name = name
        self.fallback_on = fallback_on
        self.attempt_timeout = attempt_timeout
        self._settings = breaker
        self._slots = max_concurrency
        self._clock = clock
        self._fresh()

    def _fresh(self) -> None:
        self._pid = os.getpid()
        self._lock = threading.Lock()
        self._busy = 0
        self._waiters: deque[_Waiter] = deque()
        self._in_flight: dict[Kind, int] = {"write": 0, "read": 0}
        self._breakers: dict[Kind, CircuitBreaker] = {}
        if self._settings is not None:
            self._breakers = {kind: CircuitBreaker(self._settings) for kind in self._in_flight}
        self._ended: dict[Kind, deque[tuple[float, float, Outcome]]] = {
            kind: deque(maxlen=_KEPT) for kind in self._in_flight
        }

    def _forget_parent(self) -> bool:
        """Begin anew and return True where this is the first call after a fork: what is in flight is the parent's, and
        so is the thread that may have had the lock."""
        if self._pid == os.getpid():
            return False
        self._fresh()
        return True

    def allows(self, kind: Kind) -> bool:
        """Return whether `start` would let a call in now."""
        breaker = self._breakers.get(kind)
        if breaker is None or breaker.state == "closed":
            return True
        if self._forget_parent():
            return True
        with self._lock:
            return breaker.allows(self._clock())

    def start(self, kind: Kind, *, forced: bool = False) -> Admission:
        """Let one call in; `finish` must follow.

        Raises:
            BackendUnavailable: the circuit is open, and the call is not `forced`.
        """
        self._forget_parent()
        now = self._clock()
        breaker = self._breakers.get(kind)
        with self._lock:
            ticket: Ticket | None = None
            if breaker is not None:
                ticket = breaker.begin(now)
                if ticket is None:
                    if not forced:
                        raise self._is_open(kind)
                    ticket = "normal"
            self._in_flight[kind] += 1
        return Admission(kind, ticket, now, self._pid)

    @property
    def has_slots(self) -> bool:
        """Whether `slot` has to be awaited before the original is called."""
        return self._slots is not None

    async def slot(self, admission: Admission) -> None:
        """Wait until the call may go on; `finish` gives the slot back.

        Raises:
            BackendUnavailable: the circuit has opened meanwhile.
        """
        with self._lock:
            if self._slots is None or self._busy < self._slots:
                self._busy += 1
                admission.has_slot = True
                return
            waiter = _Waiter(admission.kind)
            self._waiters.append(waiter)
        try:
            await waiter.future
        except BaseException:
            with self._lock:
                with contextlib.suppress(ValueError):
                    self._waiters.remove(waiter)
                admission.has_slot = waiter.granted  # at the very moment of the cancellation: `finish` passes it on
            raise
        admission.has_slot = True

    def finish(self, admission: Admission, outcome: Outcome) -> float:
        """Take note of how a call ended, and let the next one in; return the seconds that it took."""
        now = self._clock()
        kind, ticket = admission.kind, admission.ticket
        seconds = now - admission.since
        if admission.pid != os.getpid():
            return seconds  # begun before a fork
        breaker = self._breakers.get(kind)
        opened = closed = False
        with self._lock:
            self._in_flight[kind] -= 1
            if outcome not in ("cancelled", "aborted"):
                self._ended[kind].append((now, seconds, outcome))
            if breaker is not None and ticket is not None:
                if outcome in _BAD:
                    opened = breaker.failed(ticket, now)
                elif outcome in _ANSWERED:
                    closed = breaker.succeeded(ticket)
                else:
                    breaker.abandoned(ticket)
            left = self._leave(kind) if opened else []
            if admission.has_slot:
                admission.has_slot = False
                self._pass_on()
        for waiter in left:
            waiter.answer(self._is_open(kind))
        if opened:
            _log.warning(
                "the circuit of %r for calls that %s is open: no more of them for %g seconds",
                self.name, kind, self._settings.reset_after if self._settings else 0.0,
                extra={"original": self.name, "kind": kind, "breaker": "open"},
            )  # fmt: skip
        elif closed:
            _log.warning(
                "the circuit of %r for calls that %s is closed again",
                self.name, kind, extra={"original": self.name, "kind": kind, "breaker": "closed"},
            )  # fmt: skip
        return seconds

    def _leave(self, kind: Kind) -> list[_Waiter]:
        left = [waiter for waiter in self._waiters if waiter.kind == kind]
        self._waiters = deque(waiter for waiter in self._waiters if waiter.kind != kind)
        return left

    def _pass_on(self) -> None:
        """Give the slot to whoever has waited longest; called with the lock held."""
        while self._waiters:
            waiter = self._waiters.popleft()
            if waiter.future.done():
                continue  # cancelled, and about to say so
            waiter.granted = True
            if waiter.answer():
                return
        self._busy -= 1

    def _is_open(self, kind: Kind) -> BackendUnavailable:
        return BackendUnavailable(
            f"the original {self.name!r} is left alone: its circuit is open after failures in a row; "
            "it is tried again soon" + (", or now with using=" if kind == "write" else "")
        )

    def traffic(self, kind: Kind) -> Traffic:
        """Return what is known of the calls of one kind."""
        self._forget_parent()
        since = self._clock() - 60 * _MINUTES
        breaker = self._breakers.get(kind)
        with self._lock:
            ended = [each for each in self._ended[kind] if each[0] >= since]
            waiting = sum(waiter.kind == kind for waiter in self._waiters)
            in_flight = self._in_flight[kind]
        times = sorted(seconds for _, seconds, outcome in ended if outcome == "ok")
        return Traffic(
            breaker=None if breaker is None else breaker.state,
            in_flight=in_flight - waiting,
            waiting=waiting,
            calls=len(ended),
            failures=sum(outcome in _BAD for _, _, outcome in ended),
            p50=_quantile(times, 0.50),
            p99=_quantile(times, 0.99),
        )


def _quantile(times: list[float], share: float) -> float | None:
    return times[min(len(times) - 1, int(share * len(times)))] if times else None
