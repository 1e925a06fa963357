"""Fallback: several originals, one after the other. Pure decisions: no I/O, no clock."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from .breaker import Breaker
from .errors import (
    AlreadyExists,
    BackendUnavailable,
    ConfigurationError,
    Conflict,
    ContentError,
    IntegrityError,
    InvalidPath,
    NotSupported,
    OutOfSpace,
    StorageError,
)
from .placement import Limits, Placement, Request, as_order, in_order
from .timeouts import Timeouts, is_whole

if TYPE_CHECKING:
    from .backends.base import Backend

__all__ = ["Fallback", "Original", "is_outage", "names"]

_BREAKER = Breaker()

#: Nobody's outage: the same content under the same name would fare no better elsewhere, or not be the same file.
_NEVER = (AlreadyExists, InvalidPath, ContentError, Conflict, IntegrityError, ConfigurationError, NotSupported)

#: What a bug in a backend or a driver raises. Hidden behind a fallback it would never be found.
_BUGS = (LookupError, TypeError, ValueError, AttributeError, ArithmeticError, AssertionError, NameError)


@dataclass(frozen=True, slots=True)
class Original:
    """An original backend with rules of its own: ``originals={"fs": Original(FileSystemBackend(…), …)}``.

    Args:
        backend: the original.
        fallback_on: exceptions, of this library or of the driver, after which `Fallback` tries the next original
            besides those it always does. Matched against the error and what caused it. Errors of the name, of
            the content and conflicts never fall back.
        max_concurrency: calls at a time: writes, and reads being opened. Further ones wait, which counts against
            their attempt; they leave when the circuit opens. None: no limit.
        timeouts: ``idle`` takes the place of the placement's ``attempt_timeout`` for this original.
    """

    backend: Backend
    fallback_on: tuple[type[BaseException], ...] = ()
    max_concurrency: int | None = None
    timeouts: Timeouts | None = None

    def __post_init__(self) -> None:
        given: Any = self.fallback_on
        if isinstance(given, type):  # as `except` takes it
            object.__setattr__(self, "fallback_on", given := (given,))
        if not all(isinstance(each, type) and issubclass(each, BaseException) for each in given):
            raise ConfigurationError(f"fallback_on={given!r}: exception classes")
        if self.max_concurrency is not None and not (is_whole(self.max_concurrency) and self.max_concurrency >= 1):
            raise ConfigurationError(f"max_concurrency={self.max_concurrency!r}: at least 1, or None for no limit")


class Fallback(Placement):
    """Try the originals in turn, each within limits, until one has the file.

    Args:
        order: names of the originals to try; None: all, as given.
        attempt_timeout: seconds that one original may go without progress in a phase: until it asks for the first
            chunk, from chunk to chunk, from the last one to its answer. A large healthy stream is never killed,
            and waiting for the caller's content is not counted.
        source_timeout: seconds that the caller's content may take for each next chunk; then ContentError.
        deadline: seconds for all attempts of one call together; then DeadlineExceeded.
        hedge_after: seconds after which the next original is started beside one that has not finished; the first
            to finish wins, the others are cancelled and cleaned up after. None: no hedging. Costs a task per attempt.
        hedge_max_bytes: content of known size up to this is hedged, and held in memory.
        breaker: when an original is skipped without being tried. None: never.
        spool_bytes: of content that can be read only once, so much is kept in memory for the next attempt, and more
            in a temporary file. None: it is never kept, and so refused with ContentError before anything is written.

    An outage falls back: BackendUnavailable, DeadlineExceeded, OutOfSpace, and what an `Original` names in
    `fallback_on`. Everything else is raised at once. When all fail, the last error is raised, with the earlier ones
    in its notes and in ``attempts``. ``using=`` tries one original only, whatever its circuit says.
    """

    tries_several: ClassVar[bool] = True

    def __init__(
        self,
        order: Sequence[str] | None = None,
        *,
        attempt_timeout: float | None = 10.0,
        source_timeout: float | None = 300.0,
        deadline: float | None = 3600.0,
        hedge_after: float | None = None,
        hedge_max_bytes: int = 1 << 20,
        breaker: Breaker | None = _BREAKER,
        spool_bytes: int | None = 1 << 20,
    ) -> None:
        self.order = as_order(order)
        self.limits = Limits(
            attempt_timeout=attempt_timeout,
            source_timeout=source_timeout,
            deadline=deadline,
            hedge_after=hedge_after,
            hedge_max_bytes=hedge_max_bytes,
            breaker=breaker,
            spool_bytes=spool_bytes,
        )

    async def candidates(self, request: Request, originals: Sequence[str]) -> Sequence[str]:
        return in_order(self.order, originals)

    def falls_back(self, error: StorageError) -> bool:
        return is_outage(error)

    def read_order(self, originals: Sequence[str]) -> Sequence[str]:
        return nearest(self.order, originals)

    def _check(self, originals: Sequence[str]) -> None:
        in_order(self.order, originals)


def nearest(order: Sequence[str] | None, originals: Sequence[str]) -> Sequence[str]:
    """Return `originals`, those named in `order` first."""
    if order is None:
        return originals
    return sorted(originals, key=lambda name: order.index(name) if name in order else len(order))


def is_outage(error: StorageError) -> bool:
    """Return whether `error` says that an original is out of order or full, rather than that the call was wrong."""
    if isinstance(error, _NEVER):
        return False
    if isinstance(error, OutOfSpace):
        return True
    return isinstance(error, BackendUnavailable) and not (error.retryable is False and _is_bug(error.__cause__))


def names(fallback_on: tuple[type[BaseException], ...], error: StorageError) -> bool:
    """Return whether `fallback_on` names `error` or one of its causes, and it is an error of the original at all."""
    if not fallback_on or isinstance(error, _NEVER):
        return False
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, fallback_on):
            return True
        cause = cause.__cause__
    return False


def _is_bug(cause: BaseException | None) -> bool:
    return isinstance(cause, _BUGS)
