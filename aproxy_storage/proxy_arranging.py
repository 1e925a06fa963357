"""The verbs of a ProxyStorage for files that are there already: under another name, in another place, or taken in."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping, Sequence
from typing import Any

from .adopting import adopt
from .content import Source
from .errors import AlreadyExists, NotFound, StorageError
from .meta_backends.base import UNCHANGED
from .placement import Request
from .proxy_reading import Path
from .proxy_writing import WritingVerbs
from .records import OWNER_FIELDS, STORED, MetaRecord

__all__ = ["ArrangingVerbs"]

_log = logging.getLogger(__name__)

_MAX_WAITING = 100  # files, each of which has the key of the one before


class ArrangingVerbs(WritingVerbs):
    """What moves the files of a storage about, or copies them. Each verb is done wholly or not at all."""

    async def copy(self, path: Path, name: str | os.PathLike[str], *, using: str | None = None) -> str:
        """Copy a file to `name`, or to the next free name; return the path. The copy has bytes of its own.

        It has the extra fields of the file too, but for those that say which object that belongs to (Django's file
        fields set them): who may see the object need not be one who may see the copy.

        Raises:
            NotFound, IntegrityError: of the file that is copied. And as `save`.
        """
        new_path = self._new_path(os.fspath(name), exact=False)
        record = await self._record(path)
        write = self._writing.transfer_of(record)
        try:
            candidates = await self._copy_candidates(record, write.source, using)
            for candidate in candidates:
                self.get_original(candidate).check_key(new_path.removeprefix(self.prefix))
            fields = {"name": os.fspath(name), "extra": _without_owner(record.extra)}
            stored = await self._writing.store(new_path, candidates, write, fields, forced=using is not None)
            return stored.path
        finally:
            await write.aclose()

    async def _copy_candidates(self, record: MetaRecord, source: Source, using: str | None) -> Sequence[str]:
        """Return where a copy may go: `using`, else where the file is, and where else the placement tries."""
        here = [place.original or next(iter(self.originals)) for place in record.good_places()]
        own = using or next((name for name in here if name in self.originals), here[0])
        self.get_original(own)
        if using is not None or not self.placement.tries_several:
            return [own]
        request = Request(record.path, source, record.content_type, record.extra)
        candidates = await self.placement.candidates(request, list(self.originals))
        if self.placement.limits.copies > 1 or own not in candidates:
            return candidates
        return [own, *(candidate for candidate in candidates if candidate != own)]

    async def move(self, path: Path, using: str) -> MetaRecord:
        """Move the bytes of a file into the original `using`; the path stays. Return the new record.

        Where `using` has a copy already, that becomes the one that the record names first, and no byte moves. The
        former one stays a copy where the placement wants several.

        Raises:
            NotFound, IntegrityError, Conflict (deleted or replaced meanwhile); the file is where it was then.
            BackendUnavailable, DeadlineExceeded: where it is, or where it should go, is out of reach.
        """
        self.get_original(using)
        record = await self._record(path)
        first = next(iter(self.originals))
        if (record.original_storage_name or first) == using:
            return record
        there = (place for place in record.good_places() if (place.original or first) == using)
        if (place := next(there, None)) is not None:
            return await self._writing.make_primary(record, place)
        write = self._writing.transfer_of(record)
        try:
            return await self._writing.swap(record, [using], write, pinned=True, forced=True, same_bytes=True)
        finally:
            await write.aclose()

    async def restore_key(self, path: Path) -> MetaRecord:
        """Let the key of a file be its path again, which it is not after `replace` and `rename`; return its record.

        For directories that are published as they are, where the key is the URL. Replaced bytes are discarded now,
        whatever `keep_replaced` says, because one of them may have the key; then the file is copied there, on the
        server where that can be, and changes over in one step. Where another file of this storage has the key, as after
        renamings that pass names on, that one gets its own first. Where the key is somebody else's all the same, or
        something cannot be reached, the file stays as it is, or, exchanged with one that cannot be copied, gets a key
        that nobody else can have; that is logged.

        Raises:
            NotFound; Conflict: replaced, renamed or deleted meanwhile. And as `move`.
        """
        return await self._restore_key(path, ())

    async def _restore_key(self, path: Path, waiting: tuple[str, ...], *, again: bool = False) -> MetaRecord:
        """As `restore_key`, for the files `waiting`, the last of which waits for the key that this one has. `again`:
        whoever had the key has been asked for it."""
        record = await self._record(path)
        original, key = record.original_storage_name or next(iter(self.originals)), record.path[len(self.prefix) :]
        if record.original_storage_path == key or self.keys != "path":
            return record
        states = {place.state for place in record.places}
        if states & {"doubtful", "settling"}:
            return record  # somebody is about to replace it, or a removal may still be under way
        if "surplus" in states:
            done = await self.journal.finish(record, early=True)
            if done == "failed":
                await self.journal.doubt_removal(await self.get(record.path))
            if done != "cleared":
                return await self.get(record.path)
            record = await self.get(record.path)
        if (await self.meta.owners(original, [key])).get(key):
            # A file that was renamed keeps its key, and its deletion would take ours with it.
            if again or not await self._give_up_key(original, key, (*waiting, record.path)):
                return await self.get(record.path)
            return await self._restore_key(record.path, waiting, again=True)
        write = self._writing.transfer_of(record)
        try:
            moved = await self._writing.swap(
                record, [original], write, pinned=True, forced=True, same_bytes=True, key=key
            )
        except AlreadyExists:
            return await self.get(record.path)
        finally:
            await write.aclose()
        await self.journal.finish(moved, early=True)
        return await self.get(record.path)

    async def _give_up_key(self, original: str, key: str, waiting: tuple[str, ...]) -> bool:
        """Let the files that have `key` although their paths say another get their own; return whether it is free."""
        owners = (await self.meta.owners(original, [key])).get(key, ())
        for owner in await self.meta.get_many(list(owners)):
            if owner is None:
                continue
            place = (owner.original_storage_name or next(iter(self.originals)), owner.original_storage_path)
            known = owner.proxy_storage_name == self.name and owner.state == STORED and place == (original, key)
            if not known or len(waiting) > _MAX_WAITING:
                return False
            try:
                if owner.path in waiting:  # they have exchanged their names
                    await self._take_token_key(owner, original)
                else:
                    await self._restore_key(owner.path, waiting)
            except NotFound:  # deleted or renamed meanwhile
                continue
            except StorageError as error:
                _log.warning("%r keeps the key %r, which the path of another file is: %s", owner.path, key, error)
                return False
        return not (await self.meta.owners(original, [key])).get(key)

    async def _take_token_key(self, record: MetaRecord, original: str) -> None:
        write = self._writing.transfer_of(record)
        try:
            moved = await self._writing.swap(record, [original], write, pinned=True, forced=True, same_bytes=True)
        finally:
            await write.aclose()
        await self.journal.finish(moved, early=True)

    async def rename(self, path: Path, new_path: str | os.PathLike[str]) -> MetaRecord:
        """Give a file another path; no byte moves. Return the new record.

        Raises:
            NotFound; AlreadyExists: `new_path` is taken; Conflict: changed by somebody else meanwhile.
        """
        target = self._new_path(os.fspath(new_path), exact=True)
        record = await self._record(path)
        if target == record.path:
            return record
        return await self.journal.publish(
            record,
            {"path": target, "original_storage_path": record.original_storage_path},
            lease=UNCHANGED,
        )

    async def adopt(
        self,
        original_storage_path: str,
        *,
        name: str | os.PathLike[str] | None = None,
        using: str | None = None,
        content_type: str | None = None,
        extra: Mapping[str, Any] | None = None,
    ) -> str:
        """Take in a file that is in an original already; return its path. Its bytes are not touched.

        From then on it is a file like any other: `delete` removes its bytes. No checksum is recorded.

        Raises:
            NotFound: there is nothing at that key. AlreadyExists: a record names these bytes already.
        """
        given = os.fspath(name) if name is not None else original_storage_path
        path = self._new_path(given, exact=True)
        original = using or next(iter(self.originals))
        adopted = await adopt(
            self, original, original_storage_path, path, given, content_type=content_type, extra=extra or {}
        )
        return adopted.path


def _without_owner(extra: Mapping[str, Any]) -> Mapping[str, Any]:
    if not extra.keys() >= {"content_type_id", "object_id"}:  # a "field" alone may be anybody's
        return extra
    return {key: value for key, value in extra.items() if key not in OWNER_FIELDS}
