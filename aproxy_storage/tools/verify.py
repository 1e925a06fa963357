"""Read every file and compare it with its record; give checksums to those that have none."""

from __future__ import annotations

import asyncio
import contextlib
from collections import deque
from collections.abc import AsyncGenerator
from typing import Any

from ..digest import Digest, hash_constructor
from ..errors import ConfigurationError, Conflict, IntegrityError, NotFound
from ..files import AsyncFile
from ..proxy import ProxyStorage
from ..records import MetaRecord
from .bulk import Result, run_many

__all__ = ["verify"]

_AHEAD = 1000  # files that may be begun while one before them is still read
_MAX_RETRIES = 20  # times in a row that somebody else changed the record while the file was read


async def verify(
    storage: ProxyStorage,
    prefix: str = "",
    *,
    after: str | None = None,
    concurrency: int = 8,
    record_missing: bool = False,
) -> AsyncGenerator[Result[str, MetaRecord], None]:
    """Read the files below `prefix` and compare size and checksum; yield a `Result` for each, in byte order of paths.

    The error of a damaged file is an IntegrityError; of one without a checksum too, unless its size is wrong (then
    that is said). Files deleted meanwhile are left out. `after` resumes: given the path of the last result seen, it
    leaves out nothing that was not read. Memory: one chunk per file in flight, and up to a thousand records that wait
    for a file before theirs.

    Args:
        record_missing: record the checksum of what is read for files that have none (adopted ones, and uploads straight
            from browsers), by the storage's algorithm, instead of the error. From then on it is compared. One that is
            replaced meanwhile keeps the checksum of its new bytes.

    Raises (of the whole, not of a file):
        ConfigurationError: `record_missing`, and the storage has ``checksum=None``.
        StorageError: the files cannot be listed.
    """
    if record_missing and storage.checksum is None:
        raise ConfigurationError(f"storage {storage.name!r} computes no checksums (checksum=None), so it records none")
    algorithm = storage.checksum if record_missing else None
    room = asyncio.Semaphore(_AHEAD)
    begun: deque[str] = deque()  # in the order of the listing
    ended: dict[str, Result[str, MetaRecord]] = {}

    async def listed() -> AsyncGenerator[MetaRecord, None]:
        listing: Any = storage.list(prefix, after=after)
        async with contextlib.aclosing(listing):
            async for record in listing:
                await room.acquire()
                begun.append(record.path)
                yield record

    async def check(record: MetaRecord) -> MetaRecord:
        return await _check(storage, record, algorithm)

    results = run_many(storage, listed(), check, name=lambda record: record.path, concurrency=concurrency)
    async with contextlib.aclosing(results):
        async for result in results:
            ended[result.item] = result
            while begun and begun[0] in ended:
                room.release()
                first = ended.pop(begun.popleft())
                if not isinstance(first.error, NotFound):
                    yield first


async def _check(storage: ProxyStorage, record: MetaRecord, algorithm: str | None) -> MetaRecord:
    """Read one file; return its record, which is given a checksum where it has none and there is an `algorithm`."""
    for _ in range(_MAX_RETRIES):
        known = record.checksum is not None
        if known or algorithm is None:
            async with storage.open_current(record, verify=known) as file:
                async for _ in file:
                    pass
            if known:
                return record
            raise IntegrityError(
                f"{record.path!r} has the right size, but no checksum to compare; record_missing=True"
                " (--record-missing) records that of what is there",
                path=record.path,
            )
        async with storage.open_current(record) as file:
            record = file.record  # which may be newer by now
            checksum = await _checksum(file, algorithm)
        try:
            return await storage.meta.update(record.path, {"checksum": checksum}, expect=record.revision)
        except Conflict:
            record = await storage.get(record.path)  # replaced, or moved: what it has become is read
    raise Conflict(f"{record.path!r} changed again and again while it was read", operation="verify", path=record.path)


async def _checksum(file: AsyncFile, algorithm: str) -> str:
    digest = Digest(hash_constructor(algorithm))
    try:
        async for chunk in file:
            digest.add(chunk)
            await digest.room()
        return f"{algorithm}:{await digest.hexdigest()}"
    finally:
        digest.drop()
