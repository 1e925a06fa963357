"""A circuit breaker as a pure state machine: no clock, no lock, no I/O. `gates.Gate` gives it all three."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from .errors import ConfigurationError
from .timeouts import is_number, is_whole

__all__ = ["Breaker", "BreakerState", "CircuitBreaker", "Ticket"]

BreakerState = Literal["closed", "open", "half-open"]

#: What an admitted call is: one of many, or the one that finds out whether the original is back.
Ticket = Literal["normal", "probe"]


@dataclass(frozen=True, slots=True)
class Breaker:
    """When an original is left alone, and for how long.

    Args:
        failures: so many failed attempts in a row open the circuit: the original is skipped.
        reset_after: seconds until one attempt is let through to find out; its success closes the circuit.
    """

    failures: int = 5
    reset_after: float = 10.0

    def __post_init__(self) -> None:
        failures = is_whole(self.failures) and self.failures >= 1
        if not (failures and is_number(self.reset_after) and self.reset_after > 0):
            raise ConfigurationError(
                f"{self}: failures must be a whole number, at least 1, and reset_after more than 0 seconds"
            )


class CircuitBreaker:
    """The state of one circuit. Every `begin` that is answered with a ticket is followed by one of the other three.

    Attempts that began before the circuit opened change nothing any more when they end: of a thousand that time out
    together the fifth opens it, and the others do not keep it open for longer.
    """

    __slots__ = ("_failures", "_opened_at", "_probe_at", "settings", "state")

    def __init__(self, settings: Breaker) -> None:
        self.settings = settings
        self.state: BreakerState = "closed"
        self._failures = 0
        self._opened_at = 0.0
        self._probe_at: float | None = None  # when the probe that is under way began

    def allows(self, now: float) -> bool:
        """Return whether `begin` would give a ticket at `now` (seconds, of any clock that does not go back)."""
        if self.state == "closed":
            return True
        patience = self.settings.reset_after
        if self._probe_at is not None:
            # A probe that takes for ever, a slow upload for example, does not lock everybody else out.
            return now - self._probe_at >= patience
        return now - self._opened_at >= patience

    def begin(self, now: float) -> Ticket | None:
        """Admit an attempt, or return None: the original is to be skipped."""
        if not self.allows(now):
            return None
        if self.state == "closed":
            return "normal"
        self.state, self._probe_at = "half-open", now
        return "probe"

    def succeeded(self, ticket: Ticket) -> bool:
        """Take note that an attempt was answered; return whether that closed the circuit."""
        if self.state == "closed":
            self._failures = 0
        elif ticket == "probe":
            self.state, self._failures, self._probe_at = "closed", 0, None
            return True
        return False

    def failed(self, ticket: Ticket, now: float) -> bool:
        """Take note that an attempt failed; return whether that opened the circuit."""
        if self.state == "closed":
            self._failures += 1
            if self._failures < self.settings.failures:
                return False
        elif ticket != "probe":
            return False
        self.state, self._opened_at, self._probe_at = "open", now, None
        return True

    def abandoned(self, ticket: Ticket) -> None:
        """Take note that an attempt ended without saying anything about the original: the next one may probe."""
        if ticket == "probe" and self.state == "half-open":
            self._probe_at = None
