"""Read every file and compare it with its record."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncGenerator

from ..errors import IntegrityError, NotFound
from ..proxy import ProxyStorage
from ..records import MetaRecord
from .bulk import Result, run_many

__all__ = ["verify"]


async def verify(
    storage: ProxyStorage, prefix: str = "", *, after: str | None = None, concurrency: int = 8
) -> AsyncGenerator[Result[str, MetaRecord], None]:
    """Read the files below `prefix` and compare size and checksum; yield a `Result` for each, in no fixed order.

    The error of a damaged file is an IntegrityError; of one without a checksum too, unless its size is wrong (then
    that is said). Files deleted meanwhile are left out. Memory: one chunk per file in flight. `after` resumes.
    """

    async def check(record: MetaRecord) -> MetaRecord:
        async with storage.open(record, verify=record.checksum is not None) as file:
            async for _ in file:
                pass
        if record.checksum is None:
            raise IntegrityError(f"{record.path!r} has the right size, but no checksum to compare", path=record.path)
        return record

    records = storage.list(prefix, after=after)
    results = run_many(storage, records, check, name=lambda record: record.path, concurrency=concurrency)
    async with contextlib.aclosing(results):
        async for result in results:
            if not isinstance(result.error, NotFound):
                yield result
