"""How content becomes a stored file: the procedures behind save, replace, copy and move (J5, J6, J8).

Which original gets it is the affair of `attempts` and `replication`; here is what the record says before and after.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

from .attempts import Attempts, Job, Placed, Try
from .content import Source
from .errors import AlreadyExists, Conflict, ContentError, NotFound, StorageError, outcome_unknown
from .journal import Held
from .paths import alternative, new_token, token_key
from .records import PENDING, STORED, MetaRecord, Place
from .writes import Content, Transfer, Write

if TYPE_CHECKING:
    from .proxy import ProxyStorage

__all__ = ["Writing"]

_MAX_NAMES = 100  # free names tried before giving up: 62**7 are possible, so more means that something else is wrong
_MAX_RETRIES = 20  # compare-and-sets lost in a row to others who changed the same record


class Writing:
    """The writing side of one storage. Keeps no state of its own."""

    def __init__(self, storage: ProxyStorage) -> None:
        self._storage = storage
        self._attempts = Attempts(storage)

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
            since = asyncio.get_running_loop().time()
            try:
                reserved = await storage.meta.reserve(record, lease=storage.lease, spare=spare)
            except AlreadyExists:
                if exact:
                    raise
                path = self.next_name(path, candidates, max_length)
                continue
            except BaseException as error:
                if outcome_unknown(error):
                    await self._finish(storage.journal.undo(record, certain=False), "undo of a reservation")
                raise
            if reserved is None:
                return await self._store_in_transaction(record, candidates, write, exact, max_length, forced)
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
            except BaseException:
                await self._finish(journal.undo(held.record, certain=not job.unsure), "undo of a save")
                raise
        self._clear_losers(stored, job)
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

    def _placed(self, placed: Placed, unsure: Sequence[Place]) -> tuple[dict[str, Any], float | None]:
        """Return the changes that make a record one of a file that is whole at `placed`, and its lease."""
        first, *copies = (replace(place, state="good") for place in placed.good)
        changes = {
            "original_storage_name": first.original,
            "original_storage_path": first.key,
            "places": (*copies, *unsure),
            **placed.written.fields(),
        }
        return changes, self._storage.journal.lease_for(unsure)

    def _clear_losers(self, record: MetaRecord, job: Job) -> None:
        if job.losers:
            work = self._forget_losers(record, job.losers)
            self._storage.cleanup.start(work, name=f"removal of what lost the race for {record.path!r}")

    async def _forget_losers(self, record: MetaRecord, losers: Sequence[tuple[asyncio.Task[Any], Try]]) -> None:
        """Remove what attempts that were left behind have written, as far as it is known that nothing more comes.

        The rest stays named as doubtful, for `tidy` and reconcile.
        """
        journal = self._storage.journal
        await asyncio.wait([task for task, _ in losers], timeout=self._storage.timeouts.cleanup)
        places = [one.place for task, one in losers if task.done() and one.certain]
        if not places or not await journal.discard(places, record):
            return
        for _ in range(_MAX_RETRIES):
            rest = tuple(place for place in record.places if place not in places)
            try:
                await journal.change(record, {"places": rest}, lease=journal.lease_for(rest))
                return
            except Conflict:
                try:
                    current = await journal.meta.get(record.path)
                except NotFound:
                    return
                if current.token != record.token or current.state != STORED:
                    return  # whoever has deleted it removes these places too
                record = current

    async def _give_token_key(self, held: Held, place: Place) -> Place:
        record = held.record
        fresh = replace(place, key=self._token_key(record.path, new_token(), place.original))
        if place.original == record.original_storage_name:
            changes: dict[str, Any] = {"original_storage_path": fresh.key}
        else:
            changes = {"places": tuple(fresh if other == place else other for other in record.places)}
        held.record = await self._storage.journal.change(record, changes)
        return fresh

    # -- J8: inside a caller's transaction

    async def _store_in_transaction(
        self,
        record: MetaRecord,
        candidates: Sequence[str],
        write: Write,
        exact: bool,
        max_length: int | None,
        forced: bool,
    ) -> MetaRecord:
        """Bytes first, then one write of the record: a reservation would be invisible, and would hold locks.

        The exclusive write arbitrates between simultaneous saves of one name, so a taken key means a taken name.
        """
        storage = self._storage
        for _ in range(_MAX_NAMES):
            places = [self._place(record, name, storage.keys) for name in candidates]
            job = Job(write, record.token, _no_lease, forced=forced)
            placed: Placed | None = None
            try:
                placed = await self._attempts.place(job, places)
                changes, lease = self._placed(placed, job.unsure)
                stored = await storage.meta.create(replace(record, state=STORED, **changes), lease=lease)
                self._clear_losers(stored, job)
                return stored
            except AlreadyExists:
                if exact:
                    await self._finish(self._discard_own(job, placed, record), "removal of bytes without a record")
                    raise
            except BaseException as error:
                # A record that may still come to be keeps its bytes; without one, a scan finds them.
                if placed is None or not outcome_unknown(error):
                    await self._finish(self._discard_own(job, placed, record), "removal of bytes without a record")
                raise
            # Whichever was taken, bytes of ours at the key would have no record.
            await self._discard_own(job, placed, record)
            path = self.next_name(record.path, candidates, max_length)
            token = new_token()
            key = self._key(path, token, candidates[0], storage.keys)
            record = replace(record, path=path, token=token, original_storage_path=key)
        raise AlreadyExists(f"no free name for {record.path!r} in {_MAX_NAMES} tries", path=record.path)

    async def _discard_own(self, job: Job, placed: Placed | None, record: MetaRecord) -> None:
        """Discard what a save without a record has written: not what lay at a key that it found taken."""
        await self._storage.journal.discard([*(placed.good if placed is not None else ()), *job.unsure], record)

    # -- J6: new bytes for an existing file

    async def swap(
        self,
        record: MetaRecord,
        candidates: Sequence[str],
        write: Write,
        *,
        pinned: bool,
        forced: bool = False,
        same_bytes: bool = False,
        key: str | None = None,
    ) -> MetaRecord:
        """Write under new keys and make them the file's; the old bytes stay for `keep_replaced` seconds.

        `pinned`: only `record` as it is may be replaced; otherwise whatever it has become, while it is there.
        `key`: one that no other record names, instead of a new one.
        `same_bytes`: they are only moved, so that further copies stay what they are.
        """
        storage, journal = self._storage, self._storage.journal
        self._attempts.check_any(candidates, forced=forced)
        self._check_replayable(write, candidates)
        new = [Place(name, key or self._token_key(record.path, new_token(), name), "doubtful") for name in candidates]
        for place in new:
            storage.get_original(place.original).check_key(place.key)
        since = asyncio.get_running_loop().time()
        named = await self._with_latest(record, pinned, lambda now: {"places": (*now.places, *new)})
        with journal.leases.hold(named, since=since, follow=not pinned) as held:
            # No lease is asked for before each write: the keys are new, and can never be another's.
            job = Job(write, named.token, _no_lease, forced=forced)
            try:
                placed = await self._attempts.place(job, new)
                fields, _ = self._placed(placed, job.unsure)

                def swapped(now: MetaRecord) -> dict[str, Any]:
                    if not set(new) <= set(now.places):  # reconcile took them for abandoned
                        raise Conflict(f"the replacement of {now.path!r} took longer than its lease", path=now.path)
                    gone = {(place.original, place.key) for place in new}
                    old = [replace(now.primary, state="surplus")]
                    for place in now.places:
                        # The same key in another original is another place.
                        if (place.original, place.key) in gone or place == now.primary:
                            continue
                        stale = place.state == "good" and not same_bytes
                        old.append(replace(place, state="surplus") if stale else place)
                    return {**fields, "places": (*old, *fields["places"])}

                until = time.monotonic() + max(journal.settle, journal.lease)
                stored = await self._with_latest(held.record, pinned, swapped)
            except BaseException as error:
                # Of a lost swap every place is doubtful; else those are certain that the attempts were sure of.
                unsure = new if outcome_unknown(error) else job.unsure
                await self._finish(self._take_back(held.record, new, unsure), "undo of a replacement")
                raise
        self._clear_losers(stored, job)
        if storage.keep_replaced <= 0:
            stored = await self._drop_after_commit(stored, until)
        return stored

    async def make_primary(self, record: MetaRecord, place: Place) -> MetaRecord:
        """Let reads and URLs of `record` go to `place`, one of its good ones; the former one becomes surplus."""
        former = replace(record.primary, state="surplus")
        others = (other for other in record.places if other not in (place, record.primary))
        places = (former, *others)
        changes = {"original_storage_name": place.original, "original_storage_path": place.key, "places": places}
        journal = self._storage.journal
        return await journal.change(record, changes, lease=journal.lease_for(places))

    async def add_copy(self, record: MetaRecord, original: str, source: Place) -> MetaRecord:
        """Give a stored file one more copy, in `original`, read from `source`; return the new record.

        The copy counts when it is whole and has the recorded checksum.

        Raises:
            IntegrityError: what is at `source` is not the file. Conflict: it was changed meanwhile. And as `save`.
        """
        storage, journal = self._storage, self._storage.journal
        new = Place(original, self._token_key(record.path, new_token(), original), "doubtful")
        since = asyncio.get_running_loop().time()
        named = await self._with_latest(record, True, lambda now: {"places": (*now.places, new)})
        write = Transfer(storage, named, (source,))
        with journal.leases.hold(named, since=since) as held:
            job = Job(write, named.token, held.check, forced=True)
            try:
                await self._attempts.attempt(job, Try(new))

                def with_copy(now: MetaRecord) -> dict[str, Any]:
                    return {"places": tuple(replace(at, state="good") if at == new else at for at in now.places)}

                return await self._with_latest(held.record, True, with_copy)
            except BaseException as error:
                unsure = [new] if outcome_unknown(error) else job.unsure
                await self._finish(self._take_back(held.record, [new], unsure), "undo of a copy")
                raise
            finally:
                await write.aclose()

    async def _with_latest(
        self,
        record: MetaRecord,
        pinned: bool,
        change: Callable[[MetaRecord], dict[str, Any]],
    ) -> MetaRecord:
        """Compare-and-set `record`; unless `pinned`, what others have made of it meanwhile.

        A conflict is also how the echo of our own statement looks, sent again by a driver after a lost connection,
        so what is there already is accepted.
        """
        journal = self._storage.journal
        for _ in range(_MAX_RETRIES):
            changes = change(record)
            try:
                return await journal.change(record, changes, lease=journal.lease_for(changes["places"]))
            except StorageError as error:
                if not error.outcome_unknown and not isinstance(error, Conflict):
                    raise
                lost = error
            try:
                current = await journal.meta.get(record.path)
            except StorageError:
                raise lost from None  # gone, or not to be settled: what is unknown of the change stays unknown
            ours = current.token == record.token and current.state == STORED
            if ours and current.version == record.version + 1 and current.places == changes["places"]:
                return current
            if not ours or pinned or not isinstance(lost, Conflict):
                raise lost
            record = current
        raise Conflict(f"{record.path!r} is changed by others faster than it can be replaced", path=record.path)

    async def _take_back(self, record: MetaRecord, new: Sequence[Place], unsure: Sequence[Place]) -> None:
        """Undo a replacement: first its places are given up by compare-and-set, so that a swap whose answer was lost
        cannot take effect any more; then the bytes go, then their names leave the record."""
        journal = self._storage.journal
        for _ in range(_MAX_RETRIES):
            try:
                current = await journal.meta.get(record.path)
            except NotFound:
                current = None
            if current is None or current.token != record.token or current.state != STORED:
                await journal.discard(new, record)  # deleted, or renamed: then only if nobody names it
                return
            if any(replace(place, state="good") in current.good_places() for place in new):
                return  # swapped in after all
            if not set(new) & set(current.places):  # reconcile has given them up already
                await journal.discard(new, record)
                return
            others = tuple(other for other in current.places if other not in new)
            settling = tuple(replace(place, state="settling") for place in new)
            given_up = (*others, *settling)
            try:
                current = await journal.change(current, {"places": given_up}, lease=journal.lease_for(given_up))
                if await journal.discard(new, record) and len(unsure) < len(new):
                    left = (*others, *(replace(place, state="settling") for place in unsure))
                    await journal.change(current, {"places": left}, lease=journal.lease_for(left))
                return  # of what is left the lease runs out, and reconcile discards it again
            except Conflict:
                continue

    async def _drop_after_commit(self, record: MetaRecord, until: float) -> MetaRecord:
        """Discard the old bytes now; in a caller's transaction when it commits, for it may be rolled back (J8)."""
        latest = record

        async def drop() -> None:
            nonlocal latest
            latest = await self._drop_surplus(record, until)

        await self._storage.meta.after_commit(drop)
        return latest

    async def _drop_surplus(self, record: MetaRecord, until: float) -> MetaRecord:
        journal = self._storage.journal
        surplus = [place for place in record.places if place.state == "surplus"]
        others = tuple(place for place in record.places if place.state != "surplus")
        try:
            if await journal.discard(surplus, record, until=until):
                return await journal.change(record, {"places": others}, lease=journal.lease_for(others))
        except StorageError:
            pass  # it stays named: reconcile does it
        return record

    # -- shared

    async def _finish(self, work: Any, name: str) -> None:
        await self._storage.cleanup.finish(work, within=self._storage.timeouts.cleanup, name=name)

    def _check_replayable(self, write: Write, candidates: Sequence[str]) -> None:
        if len(candidates) > 1 and self._storage.placement.limits.copies == 1 and not write.source.replayable:
            raise ContentError(
                "the content can be read only once and must not be kept (spool_bytes=None), so there is nothing for "
                "a second original; hand over bytes, a path or a file that can seek, or name one with using="
            )

    def _key(self, path: str, token: str, original: str, keys: str) -> str:
        if keys == "token":
            return self._token_key(path, token, original)
        return path[len(self._storage.prefix) :]

    def _token_key(self, path: str, token: str, original: str) -> str:
        capabilities = self._storage.get_original(original).capabilities
        return token_key(
            path.removeprefix(self._storage.prefix),
            token,
            max_bytes=capabilities.max_key_bytes,
            max_segment_bytes=capabilities.max_segment_bytes,
        )

    def next_name(self, path: str, candidates: Sequence[str], max_length: int | None) -> str:
        """Return the next name to try for `path`, legal for all `candidates`."""
        max_bytes, max_segment_bytes = self._limits(candidates)
        return alternative(path, max_length=max_length, max_bytes=max_bytes, max_segment_bytes=max_segment_bytes)

    def fitting(self, path: str, candidates: Sequence[str], max_length: int | None) -> str:
        """Return `path`, or where that is too long, or its last part is, the name that would be tried next."""
        max_bytes, max_segment_bytes = self._limits(candidates)
        last = path[path.rfind("/") + 1 :]
        if (
            len(path.encode()) <= max_bytes
            and (max_segment_bytes is None or len(last.encode()) <= max_segment_bytes)
            and (max_length is None or len(path) <= max_length)
        ):
            return path
        return self.next_name(path, candidates, max_length)

    def _limits(self, candidates: Sequence[str]) -> tuple[int, int | None]:
        """Return how many bytes a path may have, and one part of it, for its key to be legal for all `candidates`."""
        all_of_them = [self._storage.get_original(name).capabilities for name in candidates]
        segments = [one.max_segment_bytes for one in all_of_them if one.max_segment_bytes is not None]
        longest = min(one.max_key_bytes for one in all_of_them) + len(self._storage.prefix.encode())
        return min(self._storage.max_path_bytes, longest), min(segments, default=None)

    # -- what is written

    def write_of(self, source: Source, name: str, content_type: str | None) -> Write:
        """Return the `Write` that puts `source` wherever it is asked to."""
        return Content(source, name, content_type, durable=self._storage.durable)

    def transfer_of(self, record: MetaRecord) -> Write:
        """Return the `Write` that takes the bytes of a stored file, on the server where that can be."""
        return Transfer(self._storage, record)


def _no_lease() -> None:
    """Stand in for the check of a lease where there is none that matters."""
