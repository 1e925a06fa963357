"""How long the outside world may take, in seconds: the limits, and the watch over one without progress."""

from __future__ import annotations

import asyncio
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass, replace
from types import TracebackType
from typing import Self

__all__ = ["IdleWatch", "Timeouts"]


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


class IdleWatch(AbstractAsyncContextManager["IdleWatch"]):
    """Raise TimeoutError when the block makes no progress for `seconds` (None: never) while the clock is running.

    Whoever sees progress calls `go_on`; whoever waits for something that is not to be counted, `pause`. Both are
    passed on to `outer`, the watch around this one. `pause` and `go_on` may be called from any task of the loop.
    """

    __slots__ = ("_outer", "_seconds", "_timeout")

    def __init__(self, seconds: float | None, outer: IdleWatch | None = None) -> None:
        self._seconds = seconds
        self._outer = outer
        self._timeout: asyncio.Timeout | None = None

    async def __aenter__(self) -> Self:
        if self._seconds is not None:
            timeout = asyncio.timeout(self._seconds)
            await timeout.__aenter__()
            self._timeout = timeout
        return self

    async def __aexit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._timeout is None:
            return
        try:
            await self._timeout.__aexit__(exc_type, exc, traceback)
        except TimeoutError as error:
            raise TimeoutError(f"no progress for {self._seconds:g} seconds") from error.__cause__

    def expired(self) -> bool:
        """Return whether the limit was reached, so that a TimeoutError is this one's."""
        return self._timeout is not None and self._timeout.expired()

    def pause(self) -> None:
        """Stop the clock."""
        if self._outer is not None:
            self._outer.pause()
        if self._timeout is not None and not self._timeout.expired():
            self._timeout.reschedule(None)

    def go_on(self) -> None:
        """Start the clock anew."""
        if self._outer is not None:
            self._outer.go_on()
        if self._timeout is not None and self._seconds is not None and not self._timeout.expired():
            self._timeout.reschedule(asyncio.get_running_loop().time() + self._seconds)
