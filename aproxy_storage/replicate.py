"""Replicate: several originals at once. Pure decisions: no I/O, no clock."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from .breaker import Breaker
from .errors import ConfigurationError, StorageError
from .fallback import is_outage, nearest
from .placement import Limits, Placement, Request, as_order, in_order
from .records import MetaRecord, Place
from .timeouts import is_whole

__all__ = ["Replicate", "Todo", "what_is_to_do"]

_BREAKER = Breaker()


class Replicate(Placement):
    """Write every file to several originals at once, from one pass over the content.

    Args:
        copies: originals that a file is written to: the first so many of `order` whose circuit is not open.
        quorum: so many copies make a save. None: one less than `copies`, so that one original may be away.
        order: names of the originals, the nearest first; None: all, as given. Reads prefer the healthy and the near.
        attempt_timeout: seconds that one original may go without progress; then it is dropped.
        source_timeout: seconds that the caller's content may take for each next chunk; then ContentError.
        deadline: seconds after which a save returns with at least `quorum` copies, or fails.
        hedge_after: seconds after which a read is opened at the next copy beside the one that has not answered.
        breaker: when an original is skipped without being tried. None: never.

    A save returns when all copies are done, or have failed, or at the deadline; nothing goes on after it. Below the
    quorum it fails and leaves nothing. Missing copies are made by `tools.reconcile`, which looks at every record.
    A slow original is waited for when it lags four chunks behind, until `attempt_timeout` without progress.
    """

    tries_several: ClassVar[bool] = True

    def __init__(
        self,
        copies: int = 2,
        quorum: int | None = None,
        order: Sequence[str] | None = None,
        *,
        attempt_timeout: float | None = 10.0,
        source_timeout: float | None = 300.0,
        deadline: float | None = 3600.0,
        hedge_after: float | None = None,
        breaker: Breaker | None = _BREAKER,
    ) -> None:
        self.order = as_order(order)
        self.limits = Limits(
            attempt_timeout=attempt_timeout,
            source_timeout=source_timeout,
            deadline=deadline,
            hedge_after=hedge_after,
            breaker=breaker,
            copies=copies,
            quorum=max(1, copies - 1) if quorum is None and is_whole(copies) else 1 if quorum is None else quorum,
        )

    async def candidates(self, request: Request, originals: Sequence[str]) -> Sequence[str]:
        return self.targets(originals)

    def targets(self, originals: Sequence[str]) -> Sequence[str]:
        """Return the originals that copies may be in, the nearest first.

        Raises:
            ConfigurationError: there are fewer than `copies`.
        """
        targets = in_order(self.order, originals)
        if len(targets) < self.limits.copies:
            raise ConfigurationError(
                f"Replicate(copies={self.limits.copies}) needs so many originals, and has {list(targets)}"
            )
        return targets

    def falls_back(self, error: StorageError) -> bool:
        return is_outage(error)

    def read_order(self, originals: Sequence[str]) -> Sequence[str]:
        return nearest(self.order, originals)

    def _check(self, originals: Sequence[str]) -> None:
        self.targets(originals)


@dataclass(frozen=True, slots=True)
class Todo:
    """What brings a file to its number of copies: places to make, others where one of them fails, places to give up."""

    make: tuple[str, ...] = ()
    drop: tuple[Place, ...] = ()
    spare: tuple[str, ...] = ()

    def __bool__(self) -> bool:
        return bool(self.make or self.drop)


def what_is_to_do(
    record: MetaRecord, good: Sequence[Place], targets: Sequence[str], copies: int, first: str = ""
) -> Todo:
    """Return what `record` wants, whose bytes are whole at `good`, to have `copies` of them in `targets`.

    One copy an original counts; a place without the name of one is in `first`. Copies elsewhere are surplus, but only
    once there are enough in `targets`; among those, the nearest are kept, and the primary one before all.
    """
    ranked = sorted(
        (place for place in good if (place.original or first) in targets),
        key=lambda place: (place != record.primary, targets.index(place.original or first)),
    )
    kept: dict[str, Place] = {}
    for place in ranked:
        if len(kept) < copies:
            kept.setdefault(place.original or first, place)
    if len(kept) < copies:
        free = [name for name in targets if name not in kept]
        wanted = copies - len(kept)
        return Todo(make=tuple(free[:wanted]), spare=tuple(free[wanted:]))
    return Todo(drop=tuple(place for place in good if place not in kept.values()))
