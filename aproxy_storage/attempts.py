"""How the attempts of one save are made: in turn, or hedged. What a placement decides is carried out here.

An attempt puts the content at one place. It begins at the gate of the original, is limited by the watch over its
phases, and ends with an outcome that the gate, the log and the storage's `on_attempt` are told. Attempts in turn run
in the caller's own task; only hedged ones have tasks, because only these have to be left behind.
"""

from __future__ import annotations

import asyncio
import contextvars
import logging
from collections import deque
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

from .cleanup import patience
from .content import Source
from .errors import (
    AlreadyExists,
    BackendUnavailable,
    Conflict,
    ContentError,
    DeadlineExceeded,
    StorageError,
    outcome_unknown,
)
from .fallback import is_outage, names
from .futures import outcome_of, seen
from .gates import Admission, Gate, Kind, Outcome
from .records import Place
from .timeouts import Alarm, IdleWatch
from .writes import Write, Written

if TYPE_CHECKING:
    from .proxy_reading import ReadingVerbs
    from .proxy_writing import WritingVerbs

__all__ = ["Attempt", "Attempts", "Job", "Placed", "Try", "note", "spent_on", "tell", "verdict_of"]

_log = logging.getLogger(__name__)

#: What says nothing about an original: the content, or somebody else, was first.
_CALLERS = (ContentError, Conflict)

# Content in memory of up to so many bytes is one phase: a watch over several would cost a small save a tenth.
_SMALL = 256 << 10
_UNDO = 0.5  # seconds that an attempt waits at most for its original to take back what it has begun


@dataclass(frozen=True, slots=True)
class Attempt:
    """What the `on_attempt` of a storage is told: one attempt to write to, or to open for reading at, an original.

    Attributes:
        storage, original: their names.
        kind: ``"write"`` or ``"read"``.
        outcome: see `gates.Outcome`; ``"ok"`` is success.
        seconds: that it took, waiting for a slot and for the content included.
        size: bytes written, where it succeeded; of a read, of the whole object where known.
        error: why it failed.
    """

    storage: str
    original: str
    kind: Kind
    outcome: Outcome
    seconds: float
    size: int | None = None
    error: BaseException | None = None


class Placed(NamedTuple):
    """Where the content of a save is whole, the primary place first, and what is known of it."""

    good: tuple[Place, ...]
    written: Written


class Try:
    """One attempt: its place, which moves to a token key where the key is taken, and how sure its end is."""

    __slots__ = ("admission", "begun", "certain", "outrun", "place", "waiting")

    def __init__(self, place: Place, admission: Admission | None = None) -> None:
        self.place = place
        self.admission = admission  # of one that was let in before it has started
        self.waiting = False  # for a slot
        self.begun = False  # something was sent to the original
        self.certain = False  # ended, and nothing of it can still take effect
        self.outrun = False  # given up because another attempt was faster


@dataclass(slots=True)
class Job:
    """One save, as its attempts see it.

    Attributes:
        check: raises Conflict where the lease is over; asked right before each write.
        named: the places that the record names already.
        name: names one more, before anything is sent there; returns it, perhaps with another key.
        rekey: names a token key instead of one that is taken; None: a taken key is the caller's affair.
        careful: ask whether the key is taken before the content is touched, because it cannot be read twice.
        forced: the caller has named the original, so it is tried even when its circuit is open.
        whole: filled with the places where an attempt has put the content, whatever becomes of the save.
        unsure: filled with the places where bytes may be, or may still land, although they are not wanted.
        losers: attempts that were left behind, with their tasks.
        errors: of the attempts that failed, oldest first.
    """

    write: Write
    token: str
    check: Callable[[], None]
    named: Sequence[Place] = ()
    name: Callable[[Place], Awaitable[Place]] | None = None
    rekey: Callable[[Place], Awaitable[Place]] | None = None
    careful: bool = False
    forced: bool = False
    whole: list[Place] = field(default_factory=list)
    unsure: list[Place] = field(default_factory=list)
    losers: list[tuple[asyncio.Task[Any], Try]] = field(default_factory=list)
    errors: list[StorageError] = field(default_factory=list)
    fatal: BaseException | None = None  # of the meta-backend, in the middle of an attempt
    naming: asyncio.Lock = field(default_factory=asyncio.Lock)  # one change of the record at a time

    def begin(self, one: Try) -> None:
        self.check()
        one.begun = True

    def doubt(self, place: Place) -> None:
        if place not in self.unsure:
            self.unsure.append(place)


class Attempts:
    """The attempts of one storage. Keeps no state of its own."""

    def __init__(self, storage: WritingVerbs) -> None:
        self._storage = storage

    @property
    def chunk_bytes(self) -> int:
        return self._storage.chunk_bytes

    def admit(self, job: Job, place: Place) -> Try | None:
        """Return an attempt at `place` that is let in, for who chooses among several before any of them starts; None:
        its circuit is open. `release` must follow, unless `attempt` has begun.
        """
        try:
            return Try(place, self._storage.gate_of(place.original).start("write", forced=job.forced))
        except BackendUnavailable:
            return None

    def release(self, one: Try) -> None:
        """Give back the admission of an attempt that will not be started; one that has started is left alone."""
        admission, one.admission = one.admission, None
        if admission is not None:
            self._storage.gate_of(one.place.original).finish(admission, "cancelled")

    @property
    def side_by_side(self) -> bool:
        """Whether several attempts of one save may run at a time."""
        limits = self._storage.placement.limits
        return limits.hedge_after is not None or limits.copies > 1

    def healthy_first(self, originals: Sequence[str]) -> Sequence[str]:
        """Return `originals` in their order, those at the end that would be skipped now."""
        gate_of = self._storage.gate_of
        for name in originals:
            if not gate_of(name).allows("write"):
                return sorted(originals, key=lambda name: not gate_of(name).allows("write"))
        return originals

    def check_any(self, originals: Sequence[str], *, forced: bool) -> None:
        """Raise BackendUnavailable if every one of `originals` would be skipped now."""
        gate_of = self._storage.gate_of
        if forced:
            return
        for name in originals:
            if gate_of(name).allows("write"):
                return
        raise BackendUnavailable(
            f"the circuits of all originals are open ({', '.join(originals)}): nothing was tried; "
            "try again soon, or now with using="
        )

    async def place(self, job: Job, places: Sequence[Place]) -> Placed:
        """Write the content of `job` at one of `places`.

        Raises:
            DeadlineExceeded: the placement's deadline is over. Else the error of the last attempt, with the earlier
            ones in ``attempts``; and what the meta-backend raises.
        """
        limits = self._storage.placement.limits
        if limits.deadline is None or (limits.copies > 1 and len(places) > 1):  # copies are counted at the deadline
            return await self._place(job, places)
        deadline = Alarm(limits.deadline)
        try:
            with deadline:
                return await self._place(job, places)
        except TimeoutError as error:
            if isinstance(error, StorageError) or not deadline.expired():
                raise
            over = DeadlineExceeded(f"the attempts took longer than the deadline of {limits.deadline:g} seconds")
            raise note(over, job.errors) from error

    async def _place(self, job: Job, places: Sequence[Place]) -> Placed:
        limits = self._storage.placement.limits
        await job.write.content_type()  # which may wait for the content: not at the expense of an original
        if limits.copies > 1 and len(places) > 1:
            from .replication import place_copies

            return await place_copies(self, job, places, limits)
        if limits.hedge_after is not None and len(places) > 1:
            data = await self._held(job, limits.hedge_max_bytes)
            if data is not None:
                return await self._hedged(job, places, data, limits.hedge_after)
        return await self._in_turn(job, places)

    async def _held(self, job: Job, limit: int) -> bytes | None:
        try:
            return await job.write.hold(limit)
        except ContentError as error:
            raise job.write.failure or error from error

    # -- in turn

    async def _in_turn(self, job: Job, places: Sequence[Place]) -> Placed:
        for place in places:
            last = place is places[-1]
            one = Try(place)
            try:
                return await self.attempt(job, one, movable=last)
            except StorageError as error:
                if last or not self.falls_back(job, place, error):
                    raise note(error, job.errors)  # noqa: B904  it is the error itself
                job.errors.append(error)
                # One whose circuit is open has been warned of, once.
                _log.log(
                    logging.WARNING if one.begun else logging.INFO,
                    "the original %r failed, trying the next one: %s", place.original, error,
                    extra={"storage": self._storage.name, "original": place.original, "fallback": True},
                )  # fmt: skip
        raise AssertionError("unreachable: there is at least one place")

    def falls_back(self, job: Job, place: Place, error: StorageError) -> bool:
        """Return whether another original may be tried after `error` of an attempt at `place`."""
        if error is job.fatal or error is job.write.failure:
            return False
        if names(self._storage.gate_of(place.original).fallback_on, error):
            return True
        return not isinstance(error, _CALLERS) and self._storage.placement.falls_back(error)

    # -- side by side

    async def _hedged(self, job: Job, places: Sequence[Place], data: bytes, after: float) -> Placed:
        """Start the next attempt whenever one has failed, or not finished after so many seconds."""
        left = deque(places)
        running: dict[asyncio.Task[Placed], Try] = {}
        placed: Placed | None = None
        try:
            while left or running:
                if left:
                    one = Try(left.popleft())
                    running[self.start(job, one, Source.of(data, checksum=None))] = one
                done, _ = await asyncio.wait(
                    running, timeout=after if left else None, return_when=asyncio.FIRST_COMPLETED
                )
                for task in [task for task in running if task in done]:
                    one = running.pop(task)
                    try:
                        answer = outcome_of(task)
                    except StorageError as error:
                        # After one that was cut short by an `aclose` no other is begun.
                        goes_on = not task.cancelled() and self.falls_back(job, one.place, error)
                        if placed is None and not goes_on:
                            raise note(error, job.errors)  # noqa: B904  it is the error itself
                        job.errors.append(error)
                        continue
                    if placed is None:
                        placed = answer
                    else:  # in the same instant
                        job.doubt(one.place)
                        job.losers.append((task, one))
                if placed is not None:
                    placed = placed._replace(written=await job.write.written())
                    async with job.naming:  # a loser is not cut short in the middle of a change of the record
                        self.leave(job, running, outrun=True)
                    return placed
            raise note(job.errors.pop(), job.errors)
        except BaseException:
            self.leave(job, running, outrun=False)
            raise

    def start(self, job: Job, one: Try, source: Source) -> asyncio.Task[Placed]:
        """Start an attempt beside others, with the same content once more; return its task, held by the storage."""
        task = self._storage.cleanup.start(
            self.attempt(job, one, source=source, movable=False),
            name=f"attempt at {one.place.original!r}",
            context=contextvars.copy_context(),
            log=False,
        )
        task.add_done_callback(seen)
        return task

    @staticmethod
    def leave(job: Job, running: dict[asyncio.Task[Placed], Try], *, outrun: bool) -> None:
        """Cancel attempts without waiting for them; their places stay named until their bytes are known to be gone."""
        for task, one in running.items():
            if one.certain and (task.cancelled() or task.exception() is not None):
                continue
            one.outrun = outrun
            task.cancel()
            job.doubt(one.place)
            job.losers.append((task, one))
        running.clear()

    # -- one attempt

    async def attempt(self, job: Job, one: Try, *, source: Source | None = None, movable: bool = True) -> Placed:
        """Put the content at one place, within the limits of its original."""
        storage = self._storage
        gate = storage.gate_of(one.place.original)
        try:
            admission = one.admission or gate.start("write", forced=job.forced)
            one.admission = None
        except BackendUnavailable as error:
            one.certain = True
            tell(storage, gate.name, "write", "skipped", 0.0, error=error)
            raise
        outcome: Outcome = "cancelled"
        written: Written | None = None
        failure: BaseException | None = None
        try:
            written = await self._limited(job, one, gate, admission, source, movable)
            outcome = "ok"
            one.certain = True
            job.whole.append(one.place)
            return Placed((one.place,), written)
        except StorageError as error:
            failure = error
            own = error is job.fatal or error is job.write.failure
            outcome = "aborted" if own else verdict_of(error, one, gate.fallback_on)
            raise
        except BaseException as error:
            failure = error
            if one.outrun:
                outcome = "crowded" if one.waiting else "outrun"
            raise
        finally:
            if failure is not None:
                one.certain = not one.begun or not outcome_unknown(failure)
                if not one.certain:
                    job.doubt(one.place)
            seconds = gate.finish(admission, outcome)
            tell(
                storage, gate.name, "write", outcome, seconds,
                size=None if written is None else written.size, error=failure,
            )  # fmt: skip

    async def _limited(
        self, job: Job, one: Try, gate: Gate, admission: Admission, source: Source | None, movable: bool
    ) -> Written:
        name, seconds = gate.name, gate.attempt_timeout
        if seconds is None:
            return await self._put(job, one, gate, admission, source, movable, None)
        hurry = patience.set(_UNDO)
        watch: IdleWatch | Alarm | None = None
        content = source or job.write.source
        try:
            if content.data is not None and len(content.data) <= _SMALL:  # all of it is one phase
                with Alarm(seconds) as watch:
                    return await self._put(job, one, gate, admission, source, movable, watch)
            async with content.watched(seconds) as watch:
                return await self._put(job, one, gate, admission, source, movable, watch)
        except TimeoutError as error:
            if isinstance(error, StorageError) or watch is None or not watch.expired():
                raise
            if one.waiting:
                raise BackendUnavailable(
                    f"no slot of the original {name!r} was free within {seconds:g} seconds", backend=name
                ) from error
            raise _too_slow(name, seconds, error) from error
        finally:
            patience.reset(hurry)

    async def _put(
        self,
        job: Job,
        one: Try,
        gate: Gate,
        admission: Admission,
        source: Source | None,
        movable: bool,
        watch: IdleWatch | Alarm | None,
    ) -> Written:
        if gate.has_slots:
            one.waiting = True
            await gate.slot(admission)
            one.waiting = False
        backend = self._storage.get_original(one.place.original)
        put = job.write.put
        if job.name is not None and one.place not in job.named:
            await self._rename(job, one, job.name, watch)
        try:
            if not job.careful or not await backend.is_taken(one.place.key):
                job.begin(one)
                return await put(backend, one.place.key, job.token, source=source, movable=movable)
        except AlreadyExists as error:
            if job.rekey is None or (source is not None and source.spent):
                raise
            if source is None and job.write.source.spent:  # a source of its own can be read yet
                raise spent_on(error)  # noqa: B904  it has its cause
        assert job.rekey is not None  # `careful` is only who has one
        # Not ours, so its name leaves the record before anybody could take it for ours and discard it.
        await self._rename(job, one, job.rekey, watch)
        job.begin(one)
        return await put(backend, one.place.key, job.token, source=source, movable=movable)

    @staticmethod
    async def _rename(
        job: Job, one: Try, change: Callable[[Place], Awaitable[Place]], watch: IdleWatch | Alarm | None
    ) -> None:
        """Change the place in the record. The time is the meta-backend's, and so are errors: no other original mends
        them."""
        if watch is not None:
            watch.pause()
        async with job.naming:
            try:
                one.place = await change(one.place)
            except BaseException as error:
                job.fatal = error
                raise
        if watch is not None:
            watch.go_on()


def verdict_of(error: StorageError, one: Try | None, fallback_on: tuple[type[BaseException], ...]) -> Outcome:
    """Return what `error` of an attempt says about its original."""
    if one is not None and one.waiting:
        return "crowded"
    if isinstance(error, _CALLERS):
        return "aborted"
    if is_outage(error) or names(fallback_on, error):
        return "timeout" if isinstance(error, DeadlineExceeded) else "failed"
    return "refused"


def note(error: StorageError, earlier: Sequence[StorageError]) -> StorageError:
    """Say in `error` what was tried before it; return it."""
    if earlier:
        error.attempts = tuple(earlier)
        for other in earlier:
            error.add_note(f"tried before: {other}")
    return error


def spent_on(error: AlreadyExists) -> ContentError:
    """Return what `error` is to whoever has handed over content that can be read only once, and was read for it."""
    spent = ContentError(
        f"the content can be read only once, and while it was read something came to where it was to go ({error}); "
        "save it again, or hand over bytes, a path or a file that can seek"
    )
    spent.__cause__ = error
    return spent


def tell(
    storage: ReadingVerbs,
    original: str,
    kind: Kind,
    outcome: Outcome,
    seconds: float,
    *,
    size: int | None = None,
    error: BaseException | None = None,
) -> None:
    """Tell the log and the storage's `on_attempt` how an attempt ended."""
    if _log.isEnabledFor(logging.DEBUG):
        _log.debug(
            "%s at %r: %s after %.3f s", kind, original, outcome, seconds,
            extra={
                "storage": storage.name, "original": original, "kind": kind, "outcome": outcome, "seconds": seconds,
                "bytes": size,
            },
        )  # fmt: skip
    if storage.on_attempt is not None:
        try:
            storage.on_attempt(Attempt(storage.name, original, kind, outcome, seconds, size, error))
        except Exception:
            _log.exception("on_attempt of storage %r failed; the attempt is not affected", storage.name)


def _too_slow(name: str, seconds: float, error: TimeoutError) -> DeadlineExceeded:
    # Below is the cancellation by which the watch has ended the attempt: the backend may know how it was left.
    unknown = outcome_unknown(error.__cause__) if error.__cause__ is not None else True
    return DeadlineExceeded(
        f"no progress at the original {name!r} for {seconds:g} seconds", backend=name, outcome_unknown=unknown
    )
