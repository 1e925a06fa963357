"""Files stored in a transaction that may be rolled back: then their records are gone, and their bytes are not.

Django keeps no file that an object has stored once for a second time: after a rollback the object is saved again with
the same path. So the record is kept beside the object until it is committed, to be made again.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, MutableMapping
from dataclasses import replace
from typing import Any

from django.db import connections

from aproxy_storage import AlreadyExists, Conflict, MetaRecord, NotFound, Place, ProxyStorage
from aproxy_storage.digest import hash_constructor
from aproxy_storage.paths import alternative
from aproxy_storage.records import DELETING, STORED

__all__ = ["hold", "is_any_transaction_open", "make_again"]

_MAX_NAMES = 100  # tried before giving up, as by a save


def is_any_transaction_open() -> bool:
    """Return whether this thread is inside ``atomic()``, of whichever database."""
    return any(connection.in_atomic_block for connection in connections.all(initialized_only=True))


async def hold(proxy: ProxyStorage, path: str, holder: MutableMapping[str, Any], key: str) -> None:
    """Put the record of a file that was just stored under `path` into ``holder[key]``, until it is committed."""
    record: MetaRecord | None = None
    committed = False

    async def forget() -> None:
        nonlocal committed
        committed = True
        if record is not None and holder.get(key) is record:
            del holder[key]

    holder.pop(key, None)
    await proxy.meta.after_commit(forget)
    if not committed:
        with contextlib.suppress(NotFound):  # deleted, or read from a replica
            record = holder[key] = replace(await proxy.get(path), native={})


async def make_again(proxy: ProxyStorage, held: MetaRecord, max_length: int | None) -> MetaRecord | None:
    """Create the record `held` again if a rollback has taken it away; return it, None where there is nothing to do.

    Only that of a new file, and with nothing but places at which its own bytes are: whatever else it has named may be
    somebody else's by now. Where somebody has its path it gets another, of at most `max_length` characters. No byte is
    touched.

    Raises:
        NotFound: its bytes are gone too, or somebody else's are in their place; or they were a replacement, and the
            file has its old ones again. AlreadyExists: another record has its bytes, or another file its path; or no
            free path was found. InvalidPath: none fits. And what its original and the meta-backend raise,
            `BackendUnavailable` above all. Nothing was done then.
    """
    # The database is asked, and not what waits for the commit: a savepoint that was made by hand is rolled back without
    # a trace there.
    there: MetaRecord | None = None
    with contextlib.suppress(NotFound):
        there = await proxy.meta.get(held.path)
    if there is not None and _is_as_stored(there, held):
        return None
    others = [record for record in await _owners(proxy, held.good_places()) if record.path != held.path]
    ours = [record for record in others if _is_as_stored(record, held)]
    if ours and (there is None or ours[0].state == DELETING):
        return None  # renamed, or deleted, in a transaction that goes on
    if ours:
        raise _is_another(held)
    if not _is_new(held):
        raise NotFound(
            f"the replacement of {held.path!r} was rolled back; give the field its file once more, or load the object "
            "anew to keep the old one",
            operation="save",
            path=held.path,
        )
    whole = [place for place in held.good_places() if await _has_its_bytes(proxy, place, held)]
    if not whole:
        raise NotFound(
            f"the save of {held.path!r} was rolled back, and its bytes are gone: give the field its file once more",
            operation="save",
            path=held.path,
            backend=str(proxy.get_original(held.original_storage_name)),
        )
    if there is not None and there.state == STORED and _place(there.primary) in map(_place, whole):
        return None  # it was adopted
    if await _owners(proxy, whole):
        raise _is_another(held)
    made = await _create(proxy, _at(held, whole), max_length)
    if any(owner.path != made.path for owner in await _owners(proxy, whole)):
        with contextlib.suppress(Conflict):
            await proxy.meta.delete(made.path, expect=made.revision)
        raise AlreadyExists(
            f"the bytes of {held.path!r} were adopted at the same moment", operation="save", path=held.path
        )
    return made


def _is_new(held: MetaRecord) -> bool:
    """Return whether the file was stored by the record `held`; not so where that has replaced another's bytes."""
    return held.version == 1


def _is_as_stored(record: MetaRecord, held: MetaRecord) -> bool:
    """Return whether `record` says that `held` was not rolled back, whatever has been done with it since.

    A replaced file has the token of its old bytes: there the new ones have to be named.
    """
    if (record.proxy_storage_name, record.token) != (held.proxy_storage_name, held.token):
        return False
    named = map(_place, record.all_places())
    return _is_new(held) or (record.version >= held.version and _place(held.primary) in named)


def _is_another(held: MetaRecord) -> AlreadyExists:
    return AlreadyExists(
        f"{held.path!r} is another file by now, or none; set the field to the path that its own file has",
        operation="save",
        path=held.path,
    )


def _place(place: Place) -> tuple[str, str]:
    return place.original, place.key


async def _owners(proxy: ProxyStorage, places: Iterable[Place]) -> list[MetaRecord]:
    """Return all records that name one of `places`."""
    found: set[str] = set()
    for place in places:
        owners = await proxy.meta.owners(place.original or next(iter(proxy.originals)), [place.key])
        found.update(owners.get(place.key, ()))
    records = await proxy.meta.get_many(sorted(found)) if found else ()
    return [record for record in records if record is not None]


async def _has_its_bytes(proxy: ProxyStorage, place: Place, held: MetaRecord) -> bool:
    """Return whether the bytes at `place` are those that were stored. Where the original does not say by which write
    they came, they are read, and have to have the checksum."""
    original = proxy.get_original(place.original)
    algorithm = (held.checksum or "").partition(":")[0]
    try:
        info = await original.stat(place.key)
        if info.token is not None or info.size not in (None, held.size) or not algorithm:
            return info.token == held.token and info.size in (None, held.size)
        digest = hash_constructor(algorithm)()
        async with original.read(place.key) as reading:
            async for chunk in reading:
                digest.update(chunk)
    except NotFound:
        return False
    return f"{algorithm}:{digest.hexdigest()}" == held.checksum


def _at(held: MetaRecord, whole: list[Place]) -> MetaRecord:
    first, *copies = whole
    return replace(
        held,
        original_storage_name=first.original,
        original_storage_path=first.key,
        places=tuple(copies),
        lease=None,
    )


async def _create(proxy: ProxyStorage, record: MetaRecord, max_length: int | None) -> MetaRecord:
    wished = record.path
    for _ in range(_MAX_NAMES):
        try:
            return await proxy.meta.create(record)
        except AlreadyExists:
            path = alternative(wished, max_length=max_length, max_bytes=proxy.max_path_bytes)
            record = replace(record, path=path)
    raise AlreadyExists(f"no free name for {wished!r} in {_MAX_NAMES} tries", operation="save", path=wished)
