"""How an object is read: one GET, resumed where its connection breaks."""

from __future__ import annotations

from typing import Any

import obstore

from ..errors import BackendUnavailable, Conflict
from ..records import ByteRange, ObjectInfo
from ._obstore_errors import NativeError, code_of
from .base import Reader

__all__ = ["Download", "is_beyond_the_end", "range_option"]


def range_option(byte_range: ByteRange) -> Any:
    """Return the range as obstore takes it; None where it can hold no byte."""
    if byte_range.suffix is not None:
        return {"suffix": byte_range.suffix} if byte_range.suffix else None
    if byte_range.end is None:
        return {"offset": byte_range.start}
    return (byte_range.start, byte_range.end) if byte_range.end > byte_range.start else None


def is_beyond_the_end(error: Exception) -> bool:
    """Return whether the object ends before the range begins."""
    text = str(error)
    return code_of(error) in ("InvalidRange", "416") or any(words in text for words in _BEYOND)


_BEYOND = ("Invalid range", "InvalidGetRange", "InvalidRange")


class Download(Reader):
    """The bytes from `answer`, and after a broken connection from another one, of the same version of the object."""

    def __init__(self, store: Any, path: str, info: ObjectInfo, answer: Any, chunk_bytes: int) -> None:
        super().__init__(info)
        self.data = None
        self._store = store
        self._path = path
        self._chunk_bytes = chunk_bytes
        self._at, self._stop = answer.range
        self._begun_at = -1
        self._stream: Any = None
        self._rest: bytes = b""
        self._offset = 0
        self._open(answer)

    def _open(self, answer: Any) -> None:
        # A chunk is as large as this at least, and by one read of the socket larger.
        self._stream = aiter(answer.stream(min_chunk_size=max(1, self._chunk_bytes // 2)))
        self._begun_at = self._at

    async def __anext__(self) -> bytes:
        while not self._rest:
            if self._at >= self._stop or self._stream is None:
                raise StopAsyncIteration
            await self._more()
        limit = self._chunk_bytes
        if self._offset == 0 and len(self._rest) <= limit:
            chunk, self._rest = self._rest, b""
            return chunk
        chunk = self._rest[self._offset : self._offset + limit]
        self._offset += len(chunk)
        if self._offset >= len(self._rest):
            self._rest, self._offset = b"", 0
        return chunk

    async def _more(self) -> None:
        try:
            piece = await anext(self._stream)
        except StopAsyncIteration:
            piece = b""  # too early
        except NativeError as error:
            if self._at == self._begun_at:  # nothing has come since it was opened
                raise
            await self._resume(error)
            return
        if not piece:
            if self._at == self._begun_at:
                raise BackendUnavailable(f"the answer for {self.info.key!r} ended at byte {self._at} of {self._stop}")
            await self._resume(None)
            return
        self._at += len(piece)
        self._rest = piece

    async def _resume(self, error: Exception | None) -> None:
        """Ask for the rest, if it is still that of the same object."""
        etag = self.info.etag
        if etag is None:
            raise BackendUnavailable(
                f"the connection broke at byte {self._at} of {self.info.key!r}, which has no ETag to go on with"
            ) from error
        try:
            answer = await obstore.get_async(
                self._store, self._path, options={"range": (self._at, self._stop), "if_match": etag}
            )
        except (NativeError, FileNotFoundError) as lost:
            if type(lost).__name__ in ("PreconditionError", "FileNotFoundError"):
                raise Conflict(f"{self.info.key!r} was replaced or removed while it was read") from lost
            raise
        if tuple(answer.range) != (self._at, self._stop):
            raise BackendUnavailable(f"the service answered with another part of {self.info.key!r} than was asked for")
        self._open(answer)

    async def aclose(self) -> None:
        self._stream, self._rest = None, b""  # what is dropped closes its connection
