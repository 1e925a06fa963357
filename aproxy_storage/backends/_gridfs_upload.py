"""One write into GridFS: chunks first, a few statements in flight; the file's document last, which makes it visible."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

from pymongo import ReturnDocument
from pymongo.errors import ConnectionFailure, DuplicateKeyError, PyMongoError

from ..errors import AlreadyExists
from ..futures import outcome_of

__all__ = ["Upload"]

_BATCH_BYTES = 1 << 20  # of chunks in one statement
_IN_FLIGHT = 2  # statements; each holds its chunks once as they are, and once encoded

Start = Callable[[Callable[[], Awaitable[Any]]], "asyncio.Task[Any]"]


class Upload:
    """The chunks and the document of one file.

    No statement is ever cancelled: `start` makes a task of it that outlives its caller. A cancelled one may still take
    effect after everything else, and then nobody would remove what it left.

    Args:
        files, chunks: the two collections of the bucket.
        start: runs a statement in a task that its owner holds, within the limit for one call.
        key, id_: the name of the file, and its ``_id``, which is nobody else's.
        chunk_bytes: size of a chunk.
    """

    def __init__(self, files: Any, chunks: Any, start: Start, *, key: str, id_: str, chunk_bytes: int) -> None:
        self._files = files
        self._chunks = chunks
        self._start = start
        self._key = key
        self._id = id_
        self._chunk_bytes = chunk_bytes
        self._rest = b""
        self._batch: list[dict[str, Any]] = []
        self._number = 0  # of the next chunk
        # Beside the first chunks: is there a file of that name, of ours or another program's?
        self._taken = start(lambda: files.find_one({"filename": key}, {"_id": True}))
        self._in_flight: set[asyncio.Task[Any]] = {self._taken}
        self.size = 0
        self.gone = True  # nothing was written, or all is known to be removed

    async def add(self, data: bytes) -> None:
        """Take more of the content.

        Raises:
            AlreadyExists: the key is taken; nothing is known to be removed yet.
        """
        self.size += len(data)
        data, self._rest = self._rest + data if self._rest else data, b""
        step = self._chunk_bytes
        whole = len(data) - len(data) % step
        for start in range(0, whole, step):
            await self._append(data[start : start + step])
        self._rest = data[whole:]

    async def finish(self, document: dict[str, Any]) -> dict[str, Any]:
        """Write what is left, then make the file visible with `document`; return it as stored.

        Raises:
            AlreadyExists: the key is taken.
        """
        if self._rest:
            await self._append(self._rest)
        self._flush()
        await self._until(0)
        self.gone = False
        publishing = self._start(lambda: self._publish(document))
        self._in_flight.add(publishing)
        await self._until(0)
        published: dict[str, Any] = outcome_of(publishing)
        return published

    async def undo(self) -> None:
        """Remove all that was written, once nothing is on its way any more."""
        while self._in_flight:
            done, self._in_flight = await asyncio.wait(self._in_flight)
            for task in done:
                task.exception()  # retrieved: it is known, or does not matter any more
        if self.gone:
            return
        await self._start(lambda: self._files.delete_one({"_id": self._id}))
        await self._start(lambda: self._chunks.delete_many({"files_id": self._id}))
        self.gone = True

    async def _append(self, data: bytes) -> None:
        self._batch.append({"files_id": self._id, "n": self._number, "data": data})
        self._number += 1
        if len(self._batch) * self._chunk_bytes >= _BATCH_BYTES:
            await self._until(_IN_FLIGHT - 1)
            self._flush()

    def _flush(self) -> None:
        batch, self._batch = self._batch, []
        if batch:
            self.gone = False
            self._in_flight.add(self._start(lambda: self._chunks.insert_many(batch)))

    async def _until(self, count: int) -> None:
        """Wait until at most `count` statements are in flight."""
        while len(self._in_flight) > count:
            done, self._in_flight = await asyncio.wait(self._in_flight, return_when=asyncio.FIRST_COMPLETED)
            for task in done:
                if outcome_of(task) is not None and task is self._taken:
                    raise self._already_exists()

    async def _publish(self, document: dict[str, Any]) -> dict[str, Any]:
        try:
            # An upsert, so that the server dates it. The filter never finds anything: the _id is new.
            published: dict[str, Any] = await self._files.find_one_and_update(
                {"_id": self._id},
                {"$set": document, "$currentDate": {"uploadDate": True}},
                upsert=True,
                return_document=ReturnDocument.AFTER,
            )
            return published
        except DuplicateKeyError as error:
            raise self._already_exists() from error
        except ConnectionFailure as error:  # the answer was lost, perhaps the answer alone
            try:
                found: dict[str, Any] | None = await self._files.find_one({"_id": self._id})
            except PyMongoError:
                found = None
            if found is None:
                raise error
            return found

    def _already_exists(self) -> AlreadyExists:
        return AlreadyExists(f"there is a file {self._key!r} already", path=self._key)
