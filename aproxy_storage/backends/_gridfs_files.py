"""The documents of a GridFS bucket: what ours look like, and what those of other programs tell; pure functions.

A file of ours has the ``_id`` ``key\\token\\nonce``: no legal key holds a backslash, so that the chunks of a broken
write are found by its key and token, and no two writes ever share a chunk. ``aproxy_token`` is in our documents alone;
a partial unique index on the file name leaves those of others as they are, which may have several revisions of a name.
"""

from __future__ import annotations

from collections.abc import Mapping
from datetime import datetime
from types import MappingProxyType
from typing import Any

from pymongo import ASCENDING, IndexModel

from ..errors import IntegrityError
from ..paths import new_token, successor
from ..records import ObjectInfo

__all__ = ["CHUNK_INDEXES", "FILE_INDEXES", "chunk_size", "file_id", "info_of", "of_write"]

FILE_INDEXES = (
    IndexModel([("filename", ASCENDING), ("uploadDate", ASCENDING)], name="filename_1_uploadDate_1"),
    IndexModel(
        [("filename", ASCENDING)],
        name="aproxy_filename",
        unique=True,
        partialFilterExpression={"aproxy_token": {"$exists": True}},
    ),
    IndexModel([("aproxy_discarded.key", ASCENDING)], name="aproxy_discarded", sparse=True),
)
CHUNK_INDEXES = (IndexModel([("files_id", ASCENDING), ("n", ASCENDING)], name="files_id_1_n_1", unique=True),)


def file_id(key: str, token: str) -> str:
    """Return an ``_id`` for a write of `key`; another one each time."""
    return f"{key}\\{token}\\{new_token()}"


def of_write(key: str, token: str) -> dict[str, Any]:
    """Return the condition that ``files_id`` is of some write of `key` with `token`."""
    start = f"{key}\\{token}\\"
    return {"$gte": start, "$lt": successor(start)}


def chunk_size(document: Mapping[str, Any]) -> int:
    """Return the size of a file's chunks, all but the last.

    Raises:
        IntegrityError: the document does not say.
    """
    size = document.get("chunkSize")
    if not isinstance(size, int | float) or size < 1:
        raise IntegrityError(f"the GridFS file {document.get('filename')!r} has no usable chunkSize: {size!r}")
    return int(size)


def info_of(document: Mapping[str, Any]) -> ObjectInfo:
    """Return what is known of a file, of ours or another program's."""
    uploaded: datetime | None = document.get("uploadDate")
    metadata = document.get("metadata")
    kept = metadata if isinstance(metadata, Mapping) else {}
    return ObjectInfo(
        document["filename"],
        size=int(document.get("length") or 0),
        modified_at=uploaded,
        changed_at=uploaded,
        etag=str(document["_id"]).rpartition("\\")[2],
        # At the top by an older custom, which the drivers keep; today's is in the metadata.
        content_type=document.get("contentType") or kept.get("contentType"),
        metadata=MappingProxyType(
            {str(name): value if isinstance(value, str) else str(value) for name, value in kept.items()}
        ),
        token=document.get("aproxy_token"),
    )
