"""Read every file and compare it with its record."""

from __future__ import annotations

import asyncio
import contextlib
from collections import deque
from collections.abc import AsyncGenerator
from typing import Any

from ..errors import IntegrityError, NotFound
from ..proxy import ProxyStorage
from ..records import MetaRecord
from .bulk import Result, run_many

__all__ = ["verify"]

_AHEAD = 1000  # files that may be begun while one before them is still read


async def verify(
    storage: ProxyStorage, prefix: str = "", *, after: str | None = None, concurrency: int = 8
) -> AsyncGenerator[Result[str, MetaRecord], None]:
    """Read the files below `prefix` and compare size and checksum; yield a `Result` for each, in byte order of paths.

    The error of a damaged file is an IntegrityError; of one without a checksum too, unless its size is wrong (then
    that is said). Files deleted meanwhile are left out. `after` resumes: given the path of the last result seen, it
    leaves out nothing that was not read. Memory: one chunk per file in flight, and up to a thousand records that wait
    for a file before theirs.
    """
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
        async with storage.open(record, verify=record.checksum is not None) as file:
            async for _ in file:
                pass
        if record.checksum is None:
            raise IntegrityError(f"{record.path!r} has the right size, but no checksum to compare", path=record.path)
        return record

    results = run_many(storage, listed(), check, name=lambda record: record.path, concurrency=concurrency)
    async with contextlib.aclosing(results):
        async for result in results:
            ended[result.item] = result
            while begun and begun[0] in ended:
                room.release()
                first = ended.pop(begun.popleft())
                if not isinstance(first.error, NotFound):
                    yield first
