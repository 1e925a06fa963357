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
from aproxy_storage.paths import alternative

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

    Where somebody has its path by now it gets another, of at most `max_length` characters. No byte is touched.

    Raises:
        NotFound: its bytes are gone too, or somebody else's are in their place. AlreadyExists: another record has its
        bytes, and another file its path; or no free path was found. InvalidPath: none fits. And what its original
        and the meta-backend raise, `BackendUnavailable` above all. Nothing was done then.
    """
    places = held.good_places()
    there: MetaRecord | None = None
    with contextlib.suppress(NotFound):
        there = await proxy.meta.get(held.path)
    if there is not None and _is_of_its_file(there, held):
        return None
    if await _owners(proxy, places):
        if there is None:
            return None  # it was renamed; or adopted, under another name
        raise AlreadyExists(
            f"{held.path!r} is another file by now; set the field to the path that its own file has",
            operation="save",
            path=held.path,
        )
    whole = [place for place in places if await _is_its_object(proxy, place, held)]
    if not whole:
        raise NotFound(
            f"the save of {held.path!r} was rolled back, and its bytes are gone: give the field its file once more",
            operation="save",
            path=held.path,
            backend=str(proxy.get_original(held.original_storage_name)),
        )
    others = tuple(place for place in held.places if place.state != "good")
    made = await _create(proxy, _at(held, whole, others), max_length, proxy.journal.lease_for(others))
    if any(owner != made.path for owner in await _owners(proxy, whole)):
        with contextlib.suppress(Conflict):
            await proxy.meta.delete(made.path, expect=made.revision)
        raise AlreadyExists(
            f"the bytes of {held.path!r} were adopted at the same moment", operation="save", path=held.path
        )
    return made


def _is_of_its_file(record: MetaRecord, held: MetaRecord) -> bool:
    """Return whether `record` is `held`, whatever has been done with it since, or one that has adopted its bytes."""
    if record.proxy_storage_name != held.proxy_storage_name:
        return False
    return record.token == held.token or record.primary == held.primary


async def _owners(proxy: ProxyStorage, places: Iterable[Place]) -> list[str]:
    """Return the paths of all records that name one of `places`."""
    found: list[str] = []
    for place in places:
        owners = await proxy.meta.owners(place.original or next(iter(proxy.originals)), [place.key])
        found += owners.get(place.key, ())
    return found


async def _is_its_object(proxy: ProxyStorage, place: Place, held: MetaRecord) -> bool:
    """Return whether the bytes at `place` are those that were stored. Where the original does not say by which write
    they came, the size has to do."""
    try:
        info = await proxy.get_original(place.original).stat(place.key)
    except NotFound:
        return False
    return info.token == held.token if info.token is not None else info.size in (None, held.size)


def _at(held: MetaRecord, whole: list[Place], others: tuple[Place, ...]) -> MetaRecord:
    first, *copies = whole
    return replace(
        held,
        original_storage_name=first.original,
        original_storage_path=first.key,
        places=(*copies, *others),
        lease=None,
    )


async def _create(proxy: ProxyStorage, record: MetaRecord, max_length: int | None, lease: float | None) -> MetaRecord:
    wished = record.path
    for _ in range(_MAX_NAMES):
        try:
            return await proxy.meta.create(record, lease=lease)
        except AlreadyExists:
            path = alternative(wished, max_length=max_length, max_bytes=proxy.max_path_bytes)
            record = replace(record, path=path)
    raise AlreadyExists(f"no free name for {wished!r} in {_MAX_NAMES} tries", operation="save", path=wished)
