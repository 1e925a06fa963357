"""How content becomes a new file: the procedure behind save and copy (J5), and inside a caller's transaction (J8).

Which original gets it is the affair of `attempts` and `replication`; here is what the record says before and after.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

from .attempts import Job, Placed, spent_on
from .content import Source
from .errors import AlreadyExists, NotFound, StorageError, outcome_unknown
from .leases import Held
from .paths import new_token
from .records import DELETING, PENDING, STORED, MetaRecord, Place
from .swapping import Swapping, no_lease
from .timeouts import Alarm, elapsed
from .writes import Content, Transfer, Write

__all__ = ["Writing"]

_MAX_NAMES = 100  # free names tried before giving up: 62**7 are possible, so more means that something else is wrong


class Writing(Swapping):
    """The writing side of one storage. Keeps no state of its own."""

    # -- J5: a new file

    async def store(
        self,
        path: str,
        candidates: Sequence[str],
        write: Write,
        fields: Mapping[str, Any],
        *,
        exact: bool = False,
        max_length: int | None = None,
        forced: bool = False,
    ) -> MetaRecord:
        """Store under `path`, or under the next free name unless `exact`; return the stored record.

        `forced`: the caller has named the original, so it is tried whatever its circuit says.
        """
        storage = self._storage
        self._attempts.check_any(candidates, forced=forced)
        self._check_replayable(write, candidates)
        candidates = self._attempts.healthy_first(candidates)
        # Who is tried in turn is named in turn: a second place in every record would cost each save a sixth.
        named = candidates if self._attempts.side_by_side else candidates[:1]
        for _ in range(_MAX_NAMES):
            token = new_token()
            record = self._reservation(path, token, named, fields, keys=storage.keys)
            spare = record
            if storage.keys != "token":
                spare = self._reservation(path, token, named, fields, keys="token")
            since = elapsed()
            try:
                reserved = await storage.meta.reserve(record, lease=storage.lease, spare=spare)
            except AlreadyExists:
                if not exact:
                    path = self.next_name(path, candidates, max_length)
                elif not await self._is_left(path):
                    raise
                continue
            except BaseException as error:
                if outcome_unknown(error):
                    undo = storage.journal.undo(record, certain=storage.meta.in_order)
                    await self._finish(undo, "undo of a reservation")
                raise
            if reserved is None:
                return await self._store_in_transaction(
                    path, candidates, write, fields, exact=exact, max_length=max_length, forced=forced
                )
            return await self._write_reserved(reserved, since, candidates, write, forced)
        raise AlreadyExists(f"no free name for {path!r} in {_MAX_NAMES} tries", operation="save", path=path)

    def _reservation(
        self, path: str, token: str, candidates: Sequence[str], fields: Mapping[str, Any], *, keys: str
    ) -> MetaRecord:
        """Return the pending record that names the places a byte may go to at first (J1)."""
        first, *others = candidates
        return MetaRecord(
            path=path,
            proxy_storage_name=self._storage.name,
            original_storage_name=first,
            original_storage_path=self._key(path, token, first, keys),
            state=PENDING,
            token=token,
            version=1,
            places=tuple(Place(name, self._key(path, token, name, keys), "doubtful") for name in others),
            **fields,
        )

    async def _write_reserved(
        self, record: MetaRecord, since: float, candidates: Sequence[str], write: Write, forced: bool
    ) -> MetaRecord:
        storage, journal = self._storage, self._storage.journal
        with journal.leases.hold(record, since=since) as held:
            job = Job(
                write,
                record.token,
                held.check,
                rekey=partial(self._give_token_key, held),
                careful=not write.source.replayable and storage.keys == "path",
                forced=forced,
            )
            job.named = list(record.all_places())
            later = candidates[len(job.named) :]
            if later:
                job.name = partial(self._name_place, held)
            places = [*job.named, *(self._place(record, name, storage.keys) for name in later)]
            try:
                placed = await self._attempts.place(job, places)
                changes, lease = self._placed(placed, job.unsure)
                stored = await journal.publish(held.record, changes, lease=lease)
            except BaseException as error:
                work = journal.undo(held.record, certain=not job.unsure)
                await self._undo(write, work, "undo of a save", error)
                raise
        self._clear_losers(stored, job)
        await self._release(write)
        return stored

    def _place(self, record: MetaRecord, original: str, keys: str) -> Place:
        return Place(original, self._key(record.path, record.token, original, keys), "doubtful")

    async def _name_place(self, held: Held, place: Place) -> Place:
        """Let the record of a save name one more place, before a byte goes there (J1); return it.

        A key that the record of a renamed file names is not taken: its bytes must not be taken for ours.
        """
        record, journal = held.record, self._storage.journal
        owners = (await journal.meta.owners(place.original, [place.key])).get(place.key, ())
        if any(owner != record.path for owner in owners):
            place = self._place(record, place.original, "token")
        held.record = await journal.change(record, {"places": (*record.places, place)})
        return place

    async def _give_token_key(self, held: Held, place: Place) -> Place:
        record = held.record
        fresh = replace(place, key=self._token_key(record.path, new_token(), place.original))
        if place.original == record.original_storage_name:
            changes: dict[str, Any] = {"original_storage_path": fresh.key}
        else:
            changes = {"places": tuple(fresh if other == place else other for other in record.places)}
        held.record = await self._storage.journal.change(record, changes)
        return fresh

    async def _is_left(self, path: str) -> bool:
        """Return whether `path` may be free by now, because whoever had it is gone, or is being deleted and has
        stepped aside.

        Raises:
            AlreadyExists: a save of it was undone, but part of that is without an answer.
        """
        storage = self._storage
        try:
            record = await storage.meta.get(path)
        except NotFound:
            return True
        if record.proxy_storage_name != storage.name or record.state != DELETING:
            return False
        if await storage.journal.step_aside(record):
            return True
        since = "now on" if record.lease is None else f"{record.lease:%Y-%m-%d %H:%M:%S %Z} on"
        raise AlreadyExists(
            f"there is no file {path!r}, but what was sent for one was not answered, so that the name is kept until "
            f"reconcile (or tidy) has made sure of it, which it can from {since}; another name is free now",
            operation="save", path=path, backend=repr(storage),
        )  # fmt: skip

    # -- J8: inside a caller's transaction

    async def _store_in_transaction(
        self,
        path: str,
        candidates: Sequence[str],
        write: Write,
        fields: Mapping[str, Any],
        *,
        exact: bool,
        max_length: int | None,
        forced: bool,
    ) -> MetaRecord:
        """Bytes first, then one write of the record: a reservation would be invisible, and would hold locks.

        The exclusive write arbitrates between simultaneous saves of one name, so a taken key means a taken name.
        """
        storage, source = self._storage, write.source
        # A file that is an object already is not taken in again, nor is what was read to its end.
        once = source.temporary_path is not None or not source.replayable
        for _ in range(_MAX_NAMES):
            if (exact or source.data is None) and await storage.meta.exists(path):
                if not exact:
                    path = self.next_name(path, candidates, max_length)
                elif not await self._is_left(path):
                    raise AlreadyExists(f"there is a file {path!r} already", operation="save", path=path)
                continue
            keys = await self._keys_without_owner(path, candidates)
            if keys == "path" and not source.replayable and await self._is_key_taken(path, candidates, forced=forced):
                if exact:
                    raise AlreadyExists(f"something without a record has the key of {path!r}", path=path)
                path = self.next_name(path, candidates, max_length)
                continue
            record = self._reservation(path, new_token(), candidates[:1], fields, keys=keys)
            job = Job(write, record.token, no_lease, forced=forced)
            placed: Placed | None = None
            try:
                placed = await self._attempts.place(job, [self._place(record, name, keys) for name in candidates])
                rename = partial(self.next_name, candidates=candidates, max_length=max_length)
                stored = await self._create_placed(record, placed, job, rename if once and not exact else None)
            except AlreadyExists as error:
                if exact or source.spent:
                    await self._undo(write, self._discard_own(job, record), "removal of bytes without a record", error)
                    if exact:
                        raise
                    raise spent_on(error)  # noqa: B904  it has its cause
            except BaseException as error:
                # A record that may still come to be keeps its bytes; without one, a scan finds them.
                if placed is None or not outcome_unknown(error):
                    await self._undo(write, self._discard_own(job, record), "removal of bytes without a record", error)
                else:
                    await self._let_go(write)
                raise
            else:
                self._clear_losers(stored, job)
                await self._release_after_commit(write)
                return stored
            # Whichever was taken, bytes of ours at the key would have no record.
            await self._discard_own(job, record)
            path = self.next_name(path, candidates, max_length)
        raise AlreadyExists(f"no free name for {path!r} in {_MAX_NAMES} tries", operation="save", path=path)

    async def _keys_without_owner(self, path: str, candidates: Sequence[str]) -> str:
        """Return the style of keys by which no record of another file names a key of `path` in one of `candidates`: a
        file that was renamed or is still being deleted has its key, although there may be no bytes at it any more."""
        storage = self._storage
        if storage.keys == "path":
            key = path[len(storage.prefix) :]
            for name in candidates:
                if (await storage.meta.owners(name, [key])).get(key):
                    return "token"
        return storage.keys

    async def _is_key_taken(self, path: str, candidates: Sequence[str], *, forced: bool) -> bool:
        """Return whether the key of `path` is seen to be taken in one of the originals that are written to at first.

        One that cannot be asked is left to the attempt at it, which may do without.
        """
        storage, key = self._storage, path[len(self._storage.prefix) :]
        gates = [storage.gate_of(name) for name in candidates]
        asked = [gate for gate in gates if forced or gate.allows("write")]
        for gate in asked[: storage.placement.limits.copies]:
            try:
                with Alarm(gate.attempt_timeout):
                    if await storage.get_original(gate.name).is_taken(key):
                        return True
            except (StorageError, TimeoutError):
                continue
        return False

    async def _create_placed(
        self, record: MetaRecord, placed: Placed, job: Job, rename: Callable[[str], str] | None
    ) -> MetaRecord:
        """Create the record of bytes that are there; with `rename` under the next free name, where the path was taken
        meanwhile: of content that there is only once, these bytes are all that is left.

        Raises:
            AlreadyExists: the path is taken. And as `MetaBackend.create`.
        """
        changes, lease = self._placed(placed, job.unsure)
        for _ in range(_MAX_NAMES):
            try:
                return await self._storage.meta.create(replace(record, state=STORED, **changes), lease=lease)
            except AlreadyExists:
                if rename is None:
                    raise
                record = replace(record, path=rename(record.path))
        raise AlreadyExists(f"no free name for {record.path!r} in {_MAX_NAMES} tries", path=record.path)

    async def _discard_own(self, job: Job, record: MetaRecord) -> None:
        """Discard what a save without a record has written: not what lay at a key that it found taken."""
        await self._storage.journal.discard(dict.fromkeys((*job.whole, *job.unsure)), record)

    # -- what is written

    def write_of(self, source: Source, name: str, content_type: str | None) -> Write:
        """Return the `Write` that puts `source` wherever it is asked to."""
        return Content(source, name, content_type, durable=self._storage.durable)

    def transfer_of(self, record: MetaRecord) -> Write:
        """Return the `Write` that takes the bytes of a stored file, on the server where that can be."""
        return Transfer(self._storage, record)
