"""Reading a file of GridFS: a few chunks per statement, and the next ones fetched while the caller has these."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Awaitable, Callable, Mapping
from typing import Any

from ..errors import Conflict, IntegrityError
from ..futures import over
from ..records import ObjectInfo
from ._gridfs_files import chunk_size
from .base import Reader

__all__ = ["GridReader", "fetch"]

_BATCH_BYTES = 2 << 20  # of chunks in one statement, of which two are held at a time

Fetch = Callable[[int, int], Awaitable[list[bytes]]]  # numbers of the first chunk, and of that after the last


class GridReader(Reader):
    """The bytes from `start` to `stop` of one file, in pieces of at most `piece_bytes`."""

    def __init__(
        self,
        info: ObjectInfo,
        document: Mapping[str, Any],
        begin: Callable[[int, int], asyncio.Task[list[bytes]]],
        *,
        start: int,
        stop: int,
        piece_bytes: int,
    ) -> None:
        super().__init__(info)
        self.data = None
        self._begin = begin
        self._size = chunk_size(document)
        self._piece_bytes = piece_bytes
        self._next, self._end = start // self._size, -(-stop // self._size)
        self._skip = start % self._size
        self._left = stop - start
        self._step = max(1, _BATCH_BYTES // self._size)
        self._pieces: deque[bytes] = deque()
        self._ahead: asyncio.Task[list[bytes]] | None = None
        self._fetch_ahead()

    async def __anext__(self) -> bytes:
        while not self._pieces:
            ahead = self._ahead
            if ahead is None:
                raise StopAsyncIteration
            await over(ahead)
            self._ahead = None
            chunks = ahead.result()
            self._fetch_ahead()
            for chunk in chunks:
                self._cut(chunk)
        return self._pieces.popleft()

    async def aclose(self) -> None:
        # A fetch under way is left to end by itself: cancelled, it would take its connection with it.
        self._ahead = None
        self._pieces.clear()

    def _fetch_ahead(self) -> None:
        if self._next < self._end:
            first, self._next = self._next, min(self._next + self._step, self._end)
            self._ahead = self._begin(first, self._next)

    def _cut(self, chunk: bytes) -> None:
        skip, self._skip = self._skip, 0
        stop = min(len(chunk), skip + self._left)
        self._left -= stop - skip
        if skip == 0 and stop == len(chunk) <= self._piece_bytes:
            self._pieces.append(chunk)
            return
        for start in range(skip, stop, self._piece_bytes):
            self._pieces.append(chunk[start : min(start + self._piece_bytes, stop)])


async def fetch(files: Any, chunks: Any, document: Mapping[str, Any], first: int, end: int) -> list[bytes]:
    """Return the chunks `first` to `end` - 1 of a file.

    Raises:
        Conflict: the file has been removed.
        IntegrityError: chunks are missing, or have the wrong size.
    """
    size, length = chunk_size(document), int(document["length"])
    wanted = {"files_id": document["_id"], "n": {"$gte": first, "$lt": end}}
    cursor = chunks.find(wanted, {"_id": False, "n": True, "data": True}).sort("n", 1).batch_size(end - first + 1)
    found = await cursor.to_list(None)
    data = [bytes(one["data"]) for one in found]
    whole = [int(one["n"]) for one in found] == list(range(first, end)) and all(
        len(chunk) == min(size, length - number * size) for number, chunk in enumerate(data, first)
    )
    if whole:
        return data
    name = document["filename"]
    if await files.find_one({"_id": document["_id"], "filename": name}, {"_id": True}) is None:
        raise Conflict(f"the file {name!r} was removed while it was read")
    raise IntegrityError(f"the GridFS file {name!r} lacks some of its chunks {first} to {end - 1}, or has wrong ones")
