"""How an object is read: one GET, resumed where its connection breaks, or several ranges at a time."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncIterator
from typing import Any

from ..cleanup import Cleanup
from ..errors import BackendUnavailable, Conflict, NotFound, StorageError
from ..futures import outcome_of, seen
from ..records import ByteRange, ObjectInfo
from ._s3_client import Connection, Slot, pause
from ._s3_errors import BROKEN, code_of
from ._s3_objects import size_of
from .base import Reader

__all__ = ["Download", "DownloadReader", "ParallelDownload", "range_header"]

_RESUMES = 4  # in a row, without a byte in between


def range_header(byte_range: ByteRange) -> str | None:
    """Return the Range header; None where the range is empty, whatever the size."""
    if byte_range.suffix is not None:
        return f"bytes=-{byte_range.suffix}" if byte_range.suffix else None
    if byte_range.end is None:
        return f"bytes={byte_range.start}-"
    return f"bytes={byte_range.start}-{byte_range.end - 1}" if byte_range.end > byte_range.start else None


class Download:
    """The bytes of one object from `start` on, as one stream. A broken connection is taken up again where it broke,
    if the object is still the same one.

    Attributes:
        answer: of the first request.
        size: of the whole object.
        start, stop: which bytes of it are read.
    """

    answer: Any
    size: int
    stop: int

    def __init__(self, connection: Connection, what: str, target: dict[str, Any]) -> None:
        self._connection = connection
        self._what = what
        self._target = target  # Bucket and Key
        self._body: Any = None
        self._slot: Slot | None = None
        self._whole = False  # the body is the object from its first byte to its last
        self._loop = asyncio.get_running_loop()
        self.start = 0

    async def open(self, byte_range: ByteRange | None = None, *, etag: str | None = None) -> None:
        """Send the first request. `byte_range` is not empty; with an `etag` the object has to be of that version.

        Raises:
            StorageError; its cause has the code InvalidRange where the object ends before the range.
        """
        params = {} if byte_range is None else {"Range": range_header(byte_range)}
        if etag is not None:
            params["IfMatch"] = etag
        await self._request(params)
        try:
            length = size_of(self.answer, self._what)
        except StorageError:
            self.close()
            raise
        if byte_range is None:
            self.size = length
            self._whole = True
        else:
            self.start, self.size = self._content_range()
        self.stop = self.start + length

    async def _request(self, params: dict[str, Any]) -> None:
        self.answer, self._slot = await self._connection.stream("get_object", self._what, **self._target, **params)
        self._body = self.answer["Body"]

    def _content_range(self) -> tuple[int, int]:
        """Return the first byte that is answered, and the size of the whole."""
        text = str(self.answer.get("ContentRange") or "")  # bytes 10-19/100
        try:
            first, size = text.removeprefix("bytes ").split("/")
            return int(first.partition("-")[0]), int(size)
        except ValueError:
            self.close()
            raise BackendUnavailable(
                f"could not {self._what}: the service has ignored the range", retryable=False
            ) from None

    async def read(self, limit: int) -> bytes:
        """Return the next bytes, at most `limit`; empty at the end.

        Raises:
            Conflict: the object changed or vanished before its connection could be taken up again.
            BackendUnavailable, and as `open`. What the driver finds out itself: FlexibleChecksumError.
        """
        failures = 0
        while self.start < self.stop:
            try:
                if self._body is None:
                    await self._resume()
                piece: bytes = await self._body.read(min(limit, self.stop - self.start))
                cause: Exception | None = None  # else it ended before its time
            except BROKEN as error:
                cause = error
            except BaseException:
                self.close()
                raise
            else:
                if piece:
                    self.start += len(piece)
                    if self.start == self.stop:
                        await self._end()
                    return piece
            self.close()
            if failures == _RESUMES:
                raise BackendUnavailable(
                    f"could not {self._what}: the connection broke {failures + 1} times in a row at byte {self.start}"
                ) from cause
            await pause(failures)
            failures += 1
        return b""

    async def _end(self) -> None:
        """Let the driver compare the checksum, and give the connection back."""
        try:
            # It compares when it is asked for more than there is, and only bodies that have one. That of the whole
            # object says nothing of a part, and so nothing of what is left of a read that was taken up again.
            if self._whole and hasattr(self._body, "_validate_checksum"):
                await self._body.read(1)
        finally:
            self.close()

    async def _resume(self) -> None:
        first = self.answer
        self._whole = False
        etag = first.get("ETag")
        if not etag:
            raise BackendUnavailable(
                f"could not {self._what}: the connection broke, and without an ETag it cannot be taken up again"
            )
        try:
            await self._request({"Range": f"bytes={self.start}-{self.stop - 1}", "IfMatch": etag})
        except StorageError as error:
            raise (_changed(error, self._what) or error) from error.__cause__
        if self.answer.get("ETag") != etag or self._content_range()[0] != self.start:
            self.close()
            raise Conflict(f"could not {self._what}: the object was replaced while it was read")
        self.answer = first

    async def rest(self, limit: int) -> deque[bytes]:
        """Return all that is left, in pieces as they have come, of at most `limit` bytes."""
        pieces: deque[bytes] = deque()
        while piece := await self.read(limit):
            pieces.append(piece)
        return pieces

    async def chunks(self, chunk_bytes: int) -> AsyncIterator[bytes]:
        """Yield what is left, in chunks of at most `chunk_bytes`."""
        try:
            while chunk := await self.read(chunk_bytes):
                yield chunk
        finally:
            self.close()

    def close(self) -> None:
        """Give the connection back, or end it if there are bytes left in it; idempotent."""
        body, self._body = self._body, None
        slot, self._slot = self._slot, None
        _give_back(body, slot)

    def __del__(self) -> None:
        # A reader that was forgotten. The collector may run in any thread.
        if self._slot is not None and not self._loop.is_closed():
            self._loop.call_soon_threadsafe(_give_back, self._body, self._slot)


class DownloadReader(Reader):
    """What `S3Backend` gives for one stream."""

    def __init__(self, info: ObjectInfo, download: Download, chunk_bytes: int) -> None:
        super().__init__(info)
        self.data = None
        self._download = download
        self._chunk_bytes = chunk_bytes

    async def __anext__(self) -> bytes:
        chunk = await self._download.read(self._chunk_bytes)
        if not chunk:
            raise StopAsyncIteration
        return chunk

    async def aclose(self) -> None:
        self._download.close()


def _give_back(body: Any, slot: Slot | None) -> None:
    if body is not None:
        body.close()
    if slot is not None:
        slot.release()


class _Range:
    """What has come of one range and is not handed on yet, and the task that fetches it."""

    def __init__(self) -> None:
        self._pieces: deque[bytes] = deque()
        self._news = asyncio.Event()
        self.task: asyncio.Task[None] | None = None

    def add(self, piece: bytes) -> None:
        self._pieces.append(piece)
        self._news.set()

    def run(self, task: asyncio.Task[None]) -> None:
        self.task = task
        task.add_done_callback(seen)  # of those that nobody asks for any more
        task.add_done_callback(lambda _: self._news.set())

    async def next(self) -> bytes:
        """Return the next piece as soon as it is there; empty at the end."""
        assert self.task is not None
        while not self._pieces:
            if self.task.done():
                outcome_of(self.task)
                return b""
            self._news.clear()
            await self._news.wait()
        return self._pieces.popleft()


class ParallelDownload:
    """The bytes of one object in ranges of `part_bytes`, `parts` of them under way at a time. All are of the version
    that the first one has met. Memory: parts × part_bytes."""

    def __init__(self, first: Download, stop: int, part_bytes: int, parts: int, cleanup: Cleanup) -> None:
        self._first = first
        self._etag = first.answer.get("ETag")
        self._next = first.stop
        self._stop = stop
        self._part_bytes = part_bytes
        self._parts = parts
        self._cleanup = cleanup
        self._ranges: deque[_Range] = deque()

    async def chunks(self, chunk_bytes: int) -> AsyncIterator[bytes]:
        """Yield the bytes in order, in chunks of at most `chunk_bytes`, as they come: on a slow line the ranges are
        long under way, and a reader to whom nothing is given for `idle` seconds is given up."""
        try:
            self._fill(chunk_bytes)
            while chunk := await self._first.read(chunk_bytes):
                yield chunk
            while self._ranges:
                while chunk := await self._ranges[0].next():
                    yield chunk
                self._ranges.popleft()
                self._fill(chunk_bytes)
        finally:
            self._first.close()
            for each in self._ranges:
                if each.task is not None:
                    each.task.cancel()

    def _fill(self, chunk_bytes: int) -> None:
        # One range less than `parts`, because that one is with the consumer.
        while self._next < self._stop and len(self._ranges) < self._parts - 1:
            end = min(self._next + self._part_bytes, self._stop)
            new = _Range()
            work = self._fetch(ByteRange(self._next, end), chunk_bytes, new)
            new.run(self._cleanup.start(work, name="read of a range", log=False))
            self._ranges.append(new)
            self._next = end

    async def _fetch(self, byte_range: ByteRange, chunk_bytes: int, into: _Range) -> None:
        part = Download(self._first._connection, self._first._what, self._first._target)
        try:
            await part.open(byte_range, etag=self._etag)
            if part.answer.get("ETag") != self._etag or part.stop != byte_range.end:
                raise Conflict(f"could not {part._what}: the object was replaced while it was read")
            while piece := await part.read(chunk_bytes):
                into.add(piece)
        except StorageError as error:
            raise (_changed(error, part._what) or error) from error.__cause__
        finally:
            part.close()


def _changed(error: StorageError, what: str) -> Conflict | None:
    """Return the error for an object that is not the one any more that we began with; None for other errors."""
    if isinstance(error, NotFound):
        return Conflict(f"could not {what}: the object was removed while it was read")
    if code_of(error) in ("PreconditionFailed", "412", "InvalidRange"):
        return Conflict(f"could not {what}: the object was replaced while it was read")
    return None
