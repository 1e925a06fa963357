"""Brings a file to its number of copies: missing ones are made from a good one, surplus ones given up.

For `tools.reconcile`, which asks for every file of a storage that replicates. Every change of the record is a
compare-and-set, so that it may run beside anything.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from .errors import Conflict, IntegrityError, NotFound, StorageError
from .records import MetaRecord, Place
from .replicate import Replicate, what_is_to_do

if TYPE_CHECKING:
    from .proxy import ProxyStorage

__all__ = ["Mended", "mend"]


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
    before it counts. A copy whose original is out of reach counts as there: nothing is made in its stead.
    """
    placement = storage.placement
    if not isinstance(placement, Replicate):
        return []
    work = _Mender(storage, record)
    good = await work.look()
    if not await work.confirm():
        return work.done
    if not good:
        error = IntegrityError(f"every copy of {record.path!r} is gone or damaged", path=record.path)
        return [*work.done, Mended("lost", record.original_storage_name, error)]
    targets = placement.targets(list(storage.originals))
    todo = what_is_to_do(record, good, targets, placement.limits.copies)
    if work.out_of_reach:
        todo = replace(todo, drop=())  # what cannot be seen may be gone: no other copy is given up for it
    if dry_run:
        work.done += [Mended("copied", name) for name in todo.make]
        work.done += [Mended("dropped", place.original) for place in todo.drop]
        return work.done
    try:
        await work.give_up(good, todo.drop)
        for name in todo.make:
            await work.make(name, [place for place in good if place not in todo.drop])
    except Conflict as error:
        work.done.append(Mended("moved on", record.original_storage_name, error))
    except StorageError as error:
        work.done.append(Mended("failed", error.backend or "", error))
    return work.done


class _Mender:
    """The copies of one file. `record` is what the file has become by the latest change."""

    def __init__(self, storage: ProxyStorage, record: MetaRecord) -> None:
        self.storage = storage
        self.record = record
        self.done: list[Mended] = []
        self.out_of_reach = False  # a copy could not be asked for its size
        self._lost: list[Place] = []  # nothing is there, or not the file

    async def look(self) -> list[Place]:
        """Return the places whose bytes are there, as far as one can see without reading them."""
        good = []
        for place in self.record.good_places():
            try:
                info = await self.storage.get_original(place.original).stat(place.key)
            except NotFound as error:
                self._lose(place, "missing", error)
                continue
            except StorageError as error:
                self.out_of_reach = True
                self.done.append(Mended("failed", place.original, error))
            else:
                if None not in (info.size, self.record.size) and info.size != self.record.size:
                    self._lose(place, "damaged", None)
                    continue
            good.append(place)
        return good

    async def confirm(self) -> bool:
        """Return whether the record is still the one that was looked at: of a file that was replaced or deleted since,
        nothing is missing."""
        if not self._lost:
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
        self._lost.append(place)
        self.done.append(Mended(what, place.original, error))

    async def give_up(self, good: Sequence[Place], drop: Sequence[Place]) -> None:
        """Let the record name what is surplus as surplus, what is gone as gone, and a good place first."""
        record = self.record
        if not drop and not self._lost:
            return
        kept = [place for place in good if place not in drop]
        first = record.primary if record.primary in kept else kept[0]
        # Nothing of ours is at a lost place. Should something come to be there, only what carries our token goes.
        gone = [replace(place, state="settling") for place in self._lost]
        surplus = [replace(place, state="surplus") for place in drop]
        others = [place for place in record.places if place.state != "good"]
        places = (*(place for place in kept if place != first), *surplus, *gone, *others)
        await self._change(first, places)
        self.done += [Mended("dropped", place.original) for place in drop]

    async def _change(self, first: Place, places: tuple[Place, ...]) -> None:
        journal = self.storage.journal
        changes = {"original_storage_name": first.original, "original_storage_path": first.key, "places": places}
        self.record = await journal.change(self.record, changes, lease=journal.lease_for(places))

    async def make(self, original: str, sources: list[Place]) -> None:
        """Make one more copy in `original`, from the first of `sources` that turns out to be whole.

        Raises:
            Conflict: the file was changed meanwhile. IntegrityError: no source is whole.
        """
        for source in list(sources):
            try:
                self.record = await self.storage._writing.add_copy(self.record, original, source)
            except IntegrityError as error:
                # It stays named: whoever reads with verify=True is told, and nothing is thrown away for a bad disk.
                self.done.append(Mended("damaged", source.original, error))
                sources.remove(source)
                if not sources:
                    raise
                self.record = await self.storage.get(self.record.path)
            else:
                self.done.append(Mended("copied", original))
                return
