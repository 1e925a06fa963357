"""How content becomes a stored file: the procedures behind save, replace, copy, move and adopt (J5, J6, J8)."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Protocol

from .backends.base import Backend
from .content import Source
from .errors import AlreadyExists, Conflict, IntegrityError, NotFound, StorageError, outcome_unknown
from .journal import Held
from .paths import alternative, new_token, token_key
from .records import PENDING, STORED, MetaRecord, Place
from .sniffing import guess_content_type

if TYPE_CHECKING:
    from .proxy import ProxyStorage

__all__ = ["Writing", "Written"]

_MAX_NAMES = 100  # free names tried before giving up: 62**7 are possible, so more means that something else is wrong
_MAX_RETRIES = 20  # compare-and-sets lost in a row to others who changed the same record


@dataclass(frozen=True, slots=True)
class Written:
    """What is known of content that has been written."""

    size: int | None
    checksum: str | None
    content_type: str | None

    def fields(self) -> dict[str, Any]:
        return {"size": self.size, "checksum": self.checksum, "content_type": self.content_type}


class Write(Protocol):
    """Puts the content at `key` of an original, as often as it is called."""

    def __call__(self, backend: Backend, key: str, token: str) -> Awaitable[Written]: ...


class Writing:
    """The writing side of one storage. Keeps no state of its own."""

    def __init__(self, storage: ProxyStorage) -> None:
        self._storage = storage

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
        careful: bool = False,
    ) -> MetaRecord:
        """Store under `path`, or under the next free name unless `exact`; return the stored record.

        `careful`: the content cannot be read twice, so whether the key is free is asked before it is touched.
        """
        storage = self._storage
        for _ in range(_MAX_NAMES):
            token = new_token()
            record = self._reservation(path, token, candidates, fields, keys=storage.keys)
            spare = record
            if storage.keys != "token":
                spare = self._reservation(path, token, candidates, fields, keys="token")
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
                return await self._store_in_transaction(record, candidates, write, exact, max_length)
            return await self._write_reserved(reserved, since, candidates, write, careful)
        raise AlreadyExists(f"no free name for {path!r} in {_MAX_NAMES} tries", operation="save", path=path)

    def _reservation(
        self, path: str, token: str, candidates: Sequence[str], fields: Mapping[str, Any], *, keys: str
    ) -> MetaRecord:
        """Return the pending record that names every place a byte may go to (J1)."""
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
        self, record: MetaRecord, since: float, candidates: Sequence[str], write: Write, careful: bool
    ) -> MetaRecord:
        journal = self._storage.journal
        with journal.leases.hold(record, since=since) as held:
            unsure: list[Place] = []  # where bytes may still land although the attempt is over
            try:
                place, written = await self._write_somewhere(held, candidates, write, careful, unsure)
                changes = {
                    "original_storage_name": place.original,
                    "original_storage_path": place.key,
                    "places": tuple(unsure),
                    **written.fields(),
                }
                return await journal.publish(held.record, changes, lease=journal.lease_for(unsure))
            except BaseException:
                await self._finish(journal.undo(held.record, certain=not unsure), "undo of a save")
                raise

    async def _write_somewhere(
        self, held: Held, candidates: Sequence[str], write: Write, careful: bool, unsure: list[Place]
    ) -> tuple[Place, Written]:
        """Try the candidates in order, as far as the placement falls back; the last error is raised."""
        places = {place.original: place for place in held.record.all_places()}
        errors: list[StorageError] = []
        for name in candidates[:-1]:
            try:
                return await self._attempt(held, places[name], write, careful, unsure)
            except StorageError as error:
                if not self._storage.placement.falls_back(error):
                    _note(error, errors)
                    raise
                errors.append(error)
        try:
            return await self._attempt(held, places[candidates[-1]], write, careful, unsure)
        except StorageError as error:
            _note(error, errors)
            raise

    async def _attempt(
        self, held: Held, place: Place, write: Write, careful: bool, unsure: list[Place]
    ) -> tuple[Place, Written]:
        """Write to one original; where somebody else's object has the key, under a token key instead."""
        backend = self._storage.get_original(place.original)
        token = held.record.token
        try:
            try:
                if not careful or not await self._is_taken(backend, place.key):
                    held.check()
                    return place, await write(backend, place.key, token)
            except AlreadyExists:
                pass
            # Not ours, so its name leaves the record before anybody could take it for ours and discard it.
            place = await self._give_token_key(held, place)
            held.check()
            return place, await write(backend, place.key, token)
        except BaseException as error:
            if outcome_unknown(error):
                unsure.append(place)
            raise

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
        self, record: MetaRecord, candidates: Sequence[str], write: Write, exact: bool, max_length: int | None
    ) -> MetaRecord:
        """Bytes first, then one write of the record: a reservation would be invisible, and would hold locks.

        The exclusive write arbitrates between simultaneous saves of one name, so a taken key means a taken name.
        """
        storage = self._storage
        name = candidates[0]
        backend = storage.get_original(name)
        for _ in range(_MAX_NAMES):
            key = record.original_storage_path
            place = Place(name, key, "doubtful")
            written: Written | None = None
            try:
                written = await write(backend, key, record.token)
                return await storage.meta.create(replace(record, state=STORED, places=(), **written.fields()))
            except AlreadyExists:
                if exact:
                    await self._finish(storage.journal.discard([place], record), "removal of bytes without a record")
                    raise
            except BaseException as error:
                # A record that may still come to be keeps its bytes; without one, a scan finds them.
                if written is None or not outcome_unknown(error):
                    await self._finish(storage.journal.discard([place], record), "removal of bytes without a record")
                raise
            # Whichever was taken, bytes of ours at the key would have no record; another's do not carry our token.
            await storage.journal.discard([place], record)
            path = self.next_name(record.path, candidates, max_length)
            token = new_token()
            record = replace(
                record, path=path, token=token, original_storage_path=self._key(path, token, name, storage.keys)
            )
        raise AlreadyExists(f"no free name for {record.path!r} in {_MAX_NAMES} tries", path=record.path)

    # -- J6: new bytes for an existing file

    async def swap(
        self,
        record: MetaRecord,
        original: str,
        write: Write,
        fields: Mapping[str, Any],
        *,
        pinned: bool,
    ) -> MetaRecord:
        """Write under a new key and make it the file's; the old bytes stay for `keep_replaced` seconds.

        `pinned`: only `record` as it is may be replaced; otherwise whatever it has become, while it is there.
        """
        storage, journal = self._storage, self._storage.journal
        backend = storage.get_original(original)
        new = Place(original, self._token_key(record.path, new_token(), original), "doubtful")
        backend.check_key(new.key)
        since = asyncio.get_running_loop().time()
        named = await self._with_latest(record, pinned, lambda now: {"places": (*now.places, new)})
        with journal.leases.hold(named, since=since, follow=not pinned) as held:
            try:
                written = await write(backend, new.key, named.token)

                def swapped(now: MetaRecord) -> dict[str, Any]:
                    if new not in now.places:  # reconcile took it for abandoned
                        raise Conflict(f"the replacement of {now.path!r} took longer than its lease", path=now.path)
                    old = replace(now.primary, state="surplus")
                    others = tuple(
                        place
                        for place in now.places
                        # The same key in another original is another place.
                        if place != new and (place.original, place.key) != (old.original, old.key)
                    )
                    return {
                        "original_storage_name": new.original,
                        "original_storage_path": new.key,
                        "places": (old, *others),
                        **written.fields(),
                        **fields,
                    }

                until = time.monotonic() + max(journal.settle, journal.lease)
                stored = await self._with_latest(held.record, pinned, swapped)
            except BaseException as error:
                unsure = outcome_unknown(error)
                await self._finish(self._take_back(held.record, new, unsure=unsure), "undo of a replacement")
                raise
        if storage.keep_replaced <= 0:
            stored = await self._drop_after_commit(stored, until)
        return stored

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
            except NotFound:
                raise lost from None
            ours = current.token == record.token and current.state == STORED
            if ours and current.version == record.version + 1 and current.places == changes["places"]:
                return current
            if not ours or pinned or not isinstance(lost, Conflict):
                raise lost
            record = current
        raise Conflict(f"{record.path!r} is changed by others faster than it can be replaced", path=record.path)

    async def _take_back(self, record: MetaRecord, place: Place, *, unsure: bool) -> None:
        """Undo a replacement: first its place is given up by compare-and-set, so that a swap whose answer was lost
        cannot take effect any more; then the bytes go, then their name leaves the record."""
        journal = self._storage.journal
        for _ in range(_MAX_RETRIES):
            try:
                current = await journal.meta.get(record.path)
            except NotFound:
                current = None
            if current is None or current.token != record.token or current.state != STORED:
                await journal.discard([place], record)  # deleted, or renamed: then only if nobody names it
                return
            if current.primary.key == place.key:
                return  # swapped in after all
            if place not in current.places:  # reconcile has given it up already
                await journal.discard([place], record)
                return
            others = tuple(other for other in current.places if other != place)
            given_up = (*others, replace(place, state="settling"))
            try:
                current = await journal.change(current, {"places": given_up}, lease=journal.lease_for(given_up))
                if await journal.discard([place], record) and not unsure:
                    await journal.change(current, {"places": others}, lease=journal.lease_for(others))
                return  # else the lease runs out, and reconcile discards it again
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

    @staticmethod
    async def _is_taken(backend: Backend, key: str) -> bool:
        try:
            await backend.stat(key)
        except NotFound:
            return False
        return True

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
        segments = [self._storage.get_original(name).capabilities.max_segment_bytes for name in candidates]
        return alternative(
            path,
            max_length=max_length,
            max_bytes=self._storage.max_path_bytes,
            max_segment_bytes=min((limit for limit in segments if limit is not None), default=None),
        )

    # -- what is written

    def write_of(self, source: Source, name: str, content_type: str | None) -> Write:
        """Return the `Write` that puts `source` wherever it is asked to."""
        storage = self._storage

        async def write(backend: Backend, key: str, token: str) -> Written:
            kind = content_type
            if kind is None:
                head = source.data[:4096] if source.data is not None else await source.peek()
                kind = guess_content_type(name, head) or source.content_type
            await backend.write(key, source, content_type=kind, token=token, durable=storage.durable)
            return Written(source.seen_size, source.checksum, kind)

        return write

    def transfer_of(self, record: MetaRecord) -> Write:
        """Return the `Write` that takes the bytes of a stored file, on the server where that can be."""
        storage = self._storage
        origin = storage.get_original(record.original_storage_name)

        async def write(backend: Backend, key: str, token: str) -> Written:
            kind = record.content_type
            try:
                if backend is origin and backend.capabilities.server_copy:
                    info = await backend.copy(record.original_storage_path, key, token=token, durable=storage.durable)
                    size, checksum = info.size, record.checksum
                else:
                    algorithm = record.checksum.partition(":")[0] if record.checksum else storage.checksum
                    async with origin.read(record.original_storage_path, chunk_bytes=storage.chunk_bytes) as reading:
                        source = Source.of(
                            reading, size=reading.info.size, chunk_bytes=storage.chunk_bytes, checksum=algorithm
                        )
                        await backend.write(key, source, content_type=kind, token=token, durable=storage.durable)
                    size, checksum = source.seen_size, source.checksum
            except NotFound as error:
                await self._check_unmoved(record)
                raise IntegrityError(f"the bytes of {record.path!r} are gone", path=record.path) from error
            await self._check_unmoved(record)
            if (record.size is not None and size != record.size) or (record.checksum and checksum != record.checksum):
                raise IntegrityError(
                    f"the bytes of {record.path!r} differ from its record: {size} bytes, {checksum}", path=record.path
                )
            return Written(size, checksum, kind)

        return write

    async def _check_unmoved(self, record: MetaRecord) -> None:
        """Raise NotFound or Conflict if what was read at the key of `record` need not be its bytes: it was deleted or
        replaced meanwhile, and the key may be another file's by now."""
        current = await self._storage.get(record.path)
        if not current.has_bytes_of(record):
            raise Conflict(f"{record.path!r} was replaced or moved while it was read", path=record.path)


def _note(error: StorageError, earlier: Sequence[StorageError]) -> None:
    """Say in `error` what was tried before it."""
    error.attempts = tuple(earlier)
    for other in earlier:
        error.add_note(f"tried before: {other}")
