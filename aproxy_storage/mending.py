"""Brings a file to its number of copies: missing ones are made from a good one, surplus ones given up.

For `tools.reconcile`, which asks for every file of a storage that replicates. Every change of the record is a
compare-and-set, so that it may run beside anything.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from .attempts import verdict_of
from .errors import BackendUnavailable, Conflict, IntegrityError, NotFound, StorageError
from .fallback import is_outage
from .gates import Outcome
from .records import MetaRecord, ObjectInfo, Place
from .replicate import Replicate, Todo, what_is_to_do
from .writes import Transfer

if TYPE_CHECKING:
    from .proxy import ProxyStorage

__all__ = ["Mended", "mend"]


_MAX_LEFT = (
    3  # places in one original at which something may be left; no further copy is tried there before they are gone
)


@dataclass(frozen=True, slots=True)
class Mended:
    """What was done, or would be, about one copy: ``copied``, ``dropped`` (surplus), ``missing`` (its bytes are gone),
    ``damaged``, ``failed`` (see `error`); or about the file: ``lost`` (no copy of it is left), ``moved on`` (somebody
    has changed it meanwhile).
    """

    action: str
    original: str
    error: StorageError | None = None


async def mend(storage: ProxyStorage, record: MetaRecord, *, dry_run: bool) -> list[Mended]:
    """Bring `record`, of a storage whose placement is `Replicate`, to its number of copies; return what was done.

    Each copy is asked for its size. One that is made is compared with the recorded checksum, read from its source,
    before it counts. A copy whose original is out of reach counts as there: nothing is made in its stead. But it is
    no source, and where no other copy is seen nothing is given up. Where a copy cannot be made, the next original is
    tried; one whose circuit is open is not.
    """
    placement = storage.placement
    if not isinstance(placement, Replicate):
        return []
    work = _Mender(storage, record)
    await work.look()
    if not await work.confirm():
        return work.done
    if not work.seen:
        if not work.unseen:
            error = IntegrityError(f"every copy of {record.path!r} is gone or damaged", path=record.path)
            work.done.append(Mended("lost", record.original_storage_name, error))
        return work.done
    good = [place for place in record.good_places() if place in work.seen or place in work.unseen]
    targets = placement.targets(list(storage.originals))
    todo = what_is_to_do(record, good, targets, placement.limits.copies, work.first)
    if work.unseen:
        todo = replace(todo, drop=())  # what cannot be seen may be gone: no other copy is given up for it
    if dry_run:
        work.done += [Mended("copied", name) for name in todo.make]
        work.done += [Mended("dropped", work.name_of(place)) for place in todo.drop]
        return work.done
    try:
        await work.give_up(good, todo.drop)
        await work.make(todo)
    except (Conflict, NotFound) as error:
        work.done.append(Mended("moved on", record.original_storage_name, error))
    except StorageError as error:
        work.done.append(Mended("failed", error.backend or "", error))
    return work.done


class _Mender:
    """The copies of one file. `record` is what the file has become by the latest change.

    Its good places are `seen` (the bytes are there, as far as one can see without reading them), `unseen` (out of
    reach) or `lost` (nothing is there, or not the file).
    """

    def __init__(self, storage: ProxyStorage, record: MetaRecord) -> None:
        self.storage = storage
        self.record = record
        self.first = next(iter(storage.originals))
        self.done: list[Mended] = []
        self.seen: list[Place] = []
        self.unseen: list[Place] = []
        self.lost: list[Place] = []

    def name_of(self, place: Place) -> str:
        return place.original or self.first

    async def look(self) -> None:
        """Ask each place for its size."""
        for place in self.record.good_places():
            try:
                info = await self._stat(place)
            except NotFound as error:
                self._lose(place, "missing", error)
            except StorageError as error:
                self.unseen.append(place)
                self.done.append(Mended("failed", self.name_of(place), error))
            else:
                if None not in (info.size, self.record.size) and info.size != self.record.size:
                    self._lose(place, "damaged", None)
                else:
                    self.seen.append(place)

    async def _stat(self, place: Place) -> ObjectInfo:
        """Ask the original of `place` for what is there, past its circuit: of one that hangs not every file waits."""
        storage = self.storage
        backend, gate = storage.get_original(place.original), storage.gate_of(place.original)
        admission = gate.start("read")
        outcome: Outcome = "cancelled"
        try:
            info = await backend.stat(place.key)
            outcome = "ok"
        except StorageError as error:
            outcome = verdict_of(error, None, gate.fallback_on)
            raise
        finally:
            gate.finish(admission, outcome)
        return info

    async def confirm(self) -> bool:
        """Return whether the record is still the one that was looked at: of a file that was replaced or deleted since,
        nothing is missing."""
        if not self.lost:
            return True
        record = self.record
        try:
            current = await self.storage.get(record.path)
            if current.token == record.token and current.good_places() == record.good_places():
                return True
        except NotFound:
            pass
        except StorageError as error:
            self.done = [Mended("failed", error.backend or "", error)]
            return False
        self.done = [Mended("moved on", record.original_storage_name)]
        return False

    def _lose(self, place: Place, what: str, error: StorageError | None) -> None:
        self.lost.append(place)
        self.done.append(Mended(what, self.name_of(place), error))

    async def give_up(self, good: Sequence[Place], drop: Sequence[Place]) -> None:
        """Let the record name what is surplus as surplus, what is gone as gone, and a good place first."""
        record = self.record
        if not drop and not self.lost:
            return
        kept = [place for place in good if place not in drop]
        first = record.primary if record.primary in kept else next(place for place in kept if place in self.seen)
        # Nothing of ours is at a lost place. Should something come to be there, only what carries our token goes.
        gone = [replace(place, state="settling") for place in self.lost]
        surplus = [replace(place, state="surplus") for place in drop]
        others = [place for place in record.places if place.state != "good"]
        places = (*(place for place in kept if place != first), *surplus, *gone, *others)
        await self._change(first, places)
        self.done += [Mended("dropped", self.name_of(place)) for place in drop]

    async def _change(self, first: Place, places: tuple[Place, ...]) -> None:
        journal = self.storage.journal
        changes = {"original_storage_name": first.original, "original_storage_path": first.key, "places": places}
        self.record = await journal.change(self.record, changes, lease=journal.lease_for(places))

    async def make(self, todo: Todo) -> None:
        """Make the copies that are wanted; where one cannot be, in the next original that is left.

        Raises:
            Conflict, NotFound: the file was changed meanwhile. And as the meta-backend.
        """
        wanted = len(todo.make)
        sources = list(self.seen)
        for original in (*todo.make, *todo.spare):
            if not wanted or not sources:
                return
            try:
                await self._ask(original)
            except StorageError as error:
                self.done.append(Mended("failed", original, error))
            else:
                wanted -= await self._copy_to(original, sources)

    async def _ask(self, original: str) -> None:
        """Raise the error of an original that a copy is not worth trying in now.

        One that the record names already as a place where something is left to remove is asked whether it answers: else
        every run would add a name to the record for as long as it is away. So it would in one that answers, but lets
        nothing be removed: there a few names are the limit.
        """
        if not self.storage.gate_of(original).allows("write"):
            raise BackendUnavailable(f"the original {original!r} is left alone: its circuit is open", backend=original)
        left = [place for place in self.record.places if self.name_of(place) == original]
        if not left:
            return
        try:
            await self._stat(left[0])
        except StorageError as error:
            if is_outage(error):
                raise
        if sum(place.state in ("doubtful", "settling") for place in left) >= _MAX_LEFT:
            raise BackendUnavailable(
                f"what copies of {self.record.path!r} may have left in the original {original!r} could not be removed "
                "yet, and no further one is tried before; the log says why. Where the original refuses, let this "
                "storage remove objects there; reconcile does the rest after `settle`",
                backend=original,
            )

    async def _copy_to(self, original: str, sources: list[Place]) -> bool:
        """Make a copy in `original`, from the first of `sources` that turns out to be whole; return whether it is made.

        Sources that turn out not to be are removed from `sources`.
        """
        last: StorageError | None = None
        for source in list(sources):
            write = Transfer(self.storage, self.record, (source,))
            try:
                self.record = await self.storage._writing.add_copy(self.record, original, write)
            except Conflict:
                raise
            except StorageError as error:
                self.record = await self._latest()
                if write.failure is None:
                    self.done.append(Mended("failed", original, error))
                    return False
                sources.remove(source)
                # A damaged one stays named: who reads with verify=True is told; nothing is thrown away for a bad disk.
                what = "damaged" if isinstance(error, IntegrityError) else "failed"
                self.done.append(Mended(what, self.name_of(source), error))
                last = error
            else:
                self.done.append(Mended("copied", original))
                return True
            finally:
                await write.aclose()
        self.done.append(Mended("failed", original, last))
        return False

    async def _latest(self) -> MetaRecord:
        """Return the record as it is after a copy that failed.

        Raises:
            Conflict, NotFound: it stands for other bytes by now. And as `MetaBackend.get`.
        """
        record = self.record
        current = await self.storage.get(record.path)
        if current.token != record.token or current.good_places() != record.good_places():
            raise Conflict(f"{record.path!r} was changed while it was copied", path=record.path)
        return current
