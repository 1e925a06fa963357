"""How a file that is in an original already gets its record."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from .errors import AlreadyExists, Conflict, StorageError
from .paths import alternative, new_token
from .records import MetaRecord
from .sniffing import guess_content_type

if TYPE_CHECKING:
    from .proxy_writing import WritingVerbs

__all__ = ["adopt"]


async def adopt(
    storage: WritingVerbs,
    original: str,
    key: str,
    path: str,
    name: str,
    *,
    content_type: str | None,
    extra: Mapping[str, Any],
) -> MetaRecord:
    """Create the record of the bytes at `key`, under `path` or the next free name; return it. See
    `ProxyStorage.adopt`."""
    info = await storage.get_original(original).stat(key)
    owners = (await storage.meta.owners(original, [key])).get(key, ())
    if owners:
        raise AlreadyExists(
            f"the bytes at {original}:{key} belong to {owners[0]!r} already", operation="adopt", path=key
        )
    kind = content_type or info.content_type or guess_content_type(name, b"")
    while True:
        record = MetaRecord(
            path=path,
            proxy_storage_name=storage.name,
            original_storage_name=original,
            original_storage_path=key,
            token=new_token(),
            version=1,
            size=info.size,
            content_type=kind,
            name=name,
            extra=dict(extra),
        )
        try:
            adopted = await storage.meta.create(record)
        except AlreadyExists:
            path = alternative(path, max_bytes=storage.max_path_bytes)
            continue
        await _give_way_to_rivals(storage, adopted)
        return adopted


async def _give_way_to_rivals(storage: WritingVerbs, adopted: MetaRecord) -> None:
    """Withdraw a record if somebody else has adopted its bytes at the same time: of two at least one sees the
    other. Bytes of two files they must not be, for the end of one would be the end of both."""
    original, key = adopted.original_storage_name, adopted.original_storage_path
    try:
        owners = (await storage.meta.owners(original, [key])).get(key, ())
    except StorageError as error:
        error.outcome_unknown = True  # the question has failed, but the file is adopted
        raise
    rivals = [owner for owner in owners if owner != adopted.path]
    if not rivals:
        return
    with contextlib.suppress(Conflict):
        await storage.meta.delete(adopted.path, expect=adopted.revision)
    raise AlreadyExists(
        f"the bytes at {original}:{key} were taken for {rivals[0]!r} at the same time", operation="adopt", path=key
    )
