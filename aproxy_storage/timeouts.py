"""How long the outside world may take: one value object, in seconds."""

from __future__ import annotations

from dataclasses import dataclass, replace

__all__ = ["Timeouts"]


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
            if seconds is not None and not seconds > 0:
                raise ValueError(f"Timeouts({name}={seconds!r}): seconds must be positive, or None for no limit")

    def but(self, **changes: float | None) -> Timeouts:
        """Return a copy with some limits changed."""
        return replace(self, **changes)  # type: ignore[arg-type]
