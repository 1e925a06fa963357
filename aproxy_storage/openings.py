"""Opening the bytes of a file at one of its places: the healthy ones first, then the near ones.

What `attempts` is for writing, this is for reading.
"""

from __future__ import annotations

import asyncio
import contextvars
import logging
from collections import deque
from collections.abc import Sequence
from typing import TYPE_CHECKING

from .attempts import note, tell, verdict_of
from .backends.base import Backend, Reading
from .errors import BackendUnavailable, ConfigurationError, DeadlineExceeded, NotFound, StorageError
from .futures import outcome_of
from .gates import Outcome
from .records import ByteRange, MetaRecord, Place
from .timeouts import Alarm

if TYPE_CHECKING:
    from .proxy_reading import ReadingVerbs

__all__ = ["Opened", "in_read_order", "open_bytes"]

_log = logging.getLogger(__name__)

_OUTRUN = "outrun"  # what an attempt is cancelled with when another one was faster


class Opened:
    """The bytes of a file, open at one place; an async context manager that closes them."""

    __slots__ = ("backend", "place", "reading")

    def __init__(self, place: Place, backend: Backend, reading: Reading) -> None:
        self.place = place
        self.backend = backend
        self.reading = reading

    async def aclose(self) -> None:
        await self.reading.__aexit__(None, None, None)

    async def __aenter__(self) -> Reading:
        return self.reading

    async def __aexit__(self, *_: object) -> None:
        await self.aclose()


def in_read_order(storage: ReadingVerbs, places: Sequence[Place]) -> Sequence[Place]:
    """Return `places` in the order in which they are tried: the near ones first, then those whose circuit is open, then
    those in originals that the storage does not have any more."""
    if len(places) < 2:
        return places
    names = {place: place.original or next(iter(storage.originals)) for place in places}
    order = list(storage.placement.read_order(list(names.values())))

    def rank(place: Place) -> tuple[int, int]:
        if not _is_configured(storage, place):
            return 2, 0
        return int(not storage.gate_of(place.original).allows("read")), order.index(names[place])

    return sorted(places, key=rank)


def _is_configured(storage: ReadingVerbs, place: Place) -> bool:
    return not place.original or place.original in storage.originals


async def open_bytes(
    storage: ReadingVerbs,
    record: MetaRecord,
    places: Sequence[Place],
    byte_range: ByteRange | None = None,
    *,
    slots: bool = True,
) -> Opened:
    """Open the bytes of `record` at one of `places`.

    `slots`: wait for one of the original's. Not for the source of a copy, whose target may be the same original: it
    has one already, and would wait for itself.

    Raises:
        NotFound: they are at none of them. Where one could not be asked, the error of that, with the others in
        ``attempts``: what cannot be reached is not gone. ConfigurationError: the storage has not got the original any
        more, and no other one that could be asked has them either.
    """
    ordered = in_read_order(storage, places)
    if len(ordered) == 1:
        return await _open_at(storage, ordered[0], byte_range, slots)
    after = storage.placement.limits.hedge_after
    errors: list[StorageError] = []
    opened = await (_in_turn(storage, ordered, byte_range, slots, errors) if after is None else
                    _hedged(storage, ordered, byte_range, slots, errors, after))  # fmt: skip
    if opened is not None:
        return opened
    out_of_reach = [error for error in errors if not isinstance(error, NotFound)]
    passing = [error for error in out_of_reach if not isinstance(error, ConfigurationError)]  # it may be back soon
    last = (passing or out_of_reach or errors)[-1]
    raise note(last, [error for error in errors if error is not last])


async def _in_turn(
    storage: ReadingVerbs,
    places: Sequence[Place],
    byte_range: ByteRange | None,
    slots: bool,
    errors: list[StorageError],
) -> Opened | None:
    for place in places:
        try:
            return await _open_at(storage, place, byte_range, slots)
        except StorageError as error:
            _goes_on(storage, place, error)
            errors.append(error)
    return None


async def _hedged(
    storage: ReadingVerbs,
    places: Sequence[Place],
    byte_range: ByteRange | None,
    slots: bool,
    errors: list[StorageError],
    after: float,
) -> Opened | None:
    left = deque(places)
    running: dict[asyncio.Task[Opened], Place] = {}
    why = "not wanted any more"  # by a caller that is cancelled, or for an error that no other copy would mend
    try:
        while left or running:
            if left:
                place = left.popleft()
                task = storage.cleanup.start(
                    _open_at(storage, place, byte_range, slots),
                    name=f"opening at {place.original!r}", context=contextvars.copy_context(), log=False,
                )  # fmt: skip
                running[task] = place
            done, _ = await asyncio.wait(running, timeout=after if left else None, return_when=asyncio.FIRST_COMPLETED)
            for task in [task for task in running if task in done]:
                try:
                    opened = outcome_of(task)
                except StorageError as error:
                    _goes_on(storage, running.pop(task), error)
                    errors.append(error)
                else:
                    del running[task]
                    why = _OUTRUN
                    return opened
        return None
    finally:
        for task in running:
            task.cancel(why)
            task.add_done_callback(lambda done: _close_late(storage, done))


def _close_late(storage: ReadingVerbs, task: asyncio.Task[Opened]) -> None:
    if not task.cancelled() and task.exception() is None:
        storage.cleanup.start(task.result().aclose(), name="closing of a read that was outrun")


def _goes_on(storage: ReadingVerbs, place: Place, error: StorageError) -> None:
    """Log that a copy could not be opened; raise what no other copy would mend."""
    if _is_configured(storage, place) and not isinstance(error, NotFound):
        verdict = verdict_of(error, None, storage.gate_of(place.original).fallback_on)
        if verdict not in ("failed", "timeout"):
            raise error
    _log.warning(
        "a copy in the original %r could not be opened, trying the next one: %s", place.original, error,
        extra={"storage": storage.name, "original": place.original, "fallback": True},
    )  # fmt: skip


async def _open_at(storage: ReadingVerbs, place: Place, byte_range: ByteRange | None, slots: bool) -> Opened:
    backend = storage.get_original(place.original)
    gate = storage.gate_of(place.original)
    reading = backend.read(place.key, byte_range=byte_range, chunk_bytes=storage.chunk_bytes)
    try:
        admission = gate.start("read")
    except BackendUnavailable as error:
        tell(storage, gate.name, "read", "skipped", 0.0, error=error)
        raise
    outcome: Outcome = "cancelled"
    failure: BaseException | None = None
    size: int | None = None
    seconds = gate.attempt_timeout
    waiting = slots = slots and gate.has_slots
    try:
        if seconds is None and not slots:
            await reading.__aenter__()
        else:
            limit = Alarm(seconds)
            try:
                with limit:
                    if slots:
                        await gate.slot(admission)
                    waiting = False
                    await reading.__aenter__()
            except TimeoutError as error:
                if isinstance(error, StorageError) or not limit.expired():
                    raise
                if waiting:
                    raise BackendUnavailable(
                        f"no slot of the original {gate.name!r} was free within {seconds:g} seconds", backend=gate.name
                    ) from error
                raise DeadlineExceeded(
                    f"the original {gate.name!r} did not answer within {seconds:g} seconds", backend=gate.name
                ) from error
        outcome, size = "ok", reading.info.size
    except StorageError as error:
        failure = error
        outcome = "crowded" if waiting else verdict_of(error, None, gate.fallback_on)
        raise
    except BaseException as error:
        failure = error
        if error.args == (_OUTRUN,):
            outcome = "crowded" if waiting else "outrun"
        raise
    finally:
        took = gate.finish(admission, outcome)
        tell(storage, gate.name, "read", outcome, took, size=size, error=failure)
    return Opened(place, backend, reading)
