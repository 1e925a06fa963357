"""The content of a save as the file that a synchronous storage reads in its thread. Knows nothing of Django."""

from __future__ import annotations

import asyncio
import contextlib
import io
import threading
from collections import deque
from collections.abc import Iterator
from typing import Any

from ..errors import BackendUnavailable

__all__ = ["Attempt", "Held", "InterruptedContent", "Pipe"]

_AHEAD = 2  # chunks that wait for the storage
_LOOK = 1.0  # seconds between two looks whether the event loop is still there


class InterruptedContent(Exception):
    """Raised in the storage's thread: the content has failed, or its caller has gone away."""


class _Named:
    """What storages ask a file for, besides its bytes."""

    name: str | None
    content_type: str | None

    def open(self, mode: str | None = None) -> Any:
        """Begin at the start, as Django's files do; this one is open."""
        self.seek(0)  # type: ignore[attr-defined]
        return self

    def multiple_chunks(self, chunk_size: int | None = None) -> bool:
        return True


class Held(_Named, io.BytesIO):
    """Small content, which is in memory, can seek and knows its size."""

    def __init__(self, data: bytes, name: str, content_type: str | None) -> None:
        super().__init__(data)
        self.name = name
        self.size = len(data)
        if content_type is not None:  # storages guess it where there is none
            self.content_type = content_type

    def chunks(self, chunk_size: int | None = None) -> Iterator[bytes]:
        self.seek(0)
        yield self.getvalue()

    def finish(self) -> None:
        """Nothing: its end was seen before the storage was asked."""


class Pipe(_Named):
    """A file without an end that is known, fed by an event loop; the storage's thread waits for each chunk.

    It can be read once. ``seek(0)`` before the first read is allowed, because many storages begin so.
    """

    closed = False

    def __init__(self, name: str, content_type: str | None, size: int | None) -> None:
        self.name = name
        if content_type is not None:
            self.content_type = content_type
        if size is not None:
            self.size = size
        self._loop = asyncio.get_running_loop()
        self._room = asyncio.Event()
        self._changed = threading.Condition()
        self._chunks: deque[bytes] = deque()
        self._ended = False
        self._failed = False
        self._rest = b""
        self._position = 0

    # -- the event loop's side

    async def put(self, chunk: bytes) -> None:
        """Hand a chunk over, when there is room for it."""
        while True:
            with self._changed:
                if len(self._chunks) < _AHEAD:
                    self._chunks.append(chunk)
                    self._changed.notify()
                    return
                self._room.clear()
            await self._room.wait()

    def end(self) -> None:
        """Say that this was all."""
        with self._changed:
            self._ended = True
            self._changed.notify()

    def fail(self) -> None:
        """Let the next read of the storage raise."""
        with self._changed:
            self._failed = True
            self._chunks.clear()
            self._changed.notify()

    # -- the storage's side

    def _next(self) -> bytes:
        with self._changed:
            while not self._chunks and not self._ended and not self._failed:
                if not self._changed.wait(_LOOK) and self._loop.is_closed():
                    self._failed = True
            if self._failed:
                raise InterruptedContent("the content was interrupted")
            chunk = self._chunks.popleft() if self._chunks else b""
        with contextlib.suppress(RuntimeError):  # the loop is closed
            self._loop.call_soon_threadsafe(self._room.set)
        return chunk

    def read(self, size: int | None = -1) -> bytes:
        wanted = None if size is None or size < 0 else size
        parts: list[bytes] = []
        while wanted is None or wanted > 0:
            piece = self._rest or self._next()
            self._rest = b""
            if not piece:
                break
            if wanted is not None:
                piece, self._rest = piece[:wanted], piece[wanted:]
                wanted -= len(piece)
            parts.append(piece)
        data = parts[0] if len(parts) == 1 else b"".join(parts)
        self._position += len(data)
        return data

    def chunks(self, chunk_size: int | None = None) -> Iterator[bytes]:
        while piece := self._rest or self._next():
            self._rest = b""
            self._position += len(piece)
            yield piece

    def finish(self) -> None:
        """Wait for the end of the content, which the storage has to have read up to when it has saved.

        A storage that reads as much as it was told may come back before the end is known. Only with the end do size
        and checksum exist, and only there content is found to be longer than it was declared.

        Raises:
            BackendUnavailable: there is more, which the storage has not read.
            InterruptedContent: the content has failed.
        """
        if self._rest or self._next():
            raise BackendUnavailable(
                f"the storage has read only the first {self._position} bytes of the content, and called that saved",
                retryable=False,
            )

    def __iter__(self) -> Iterator[bytes]:
        return self.chunks()

    def readable(self) -> bool:
        return True

    def writable(self) -> bool:
        return False

    def seekable(self) -> bool:
        return False

    def tell(self) -> int:
        return self._position

    def seek(self, offset: int, whence: int = 0) -> int:
        if (offset, whence) != (0, 0) or self._position:
            raise io.UnsupportedOperation("this content comes once, and from its start")
        return 0

    def close(self) -> None:
        """Nothing: it is closed by whoever feeds it."""


class Attempt:
    """Whether a write is still wanted when the storage has ended it."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._withdrawn = False
        self._published = False

    def publish(self) -> bool:
        """Let the object stay; return False if its caller has gone away. Called in the storage's thread."""
        with self._lock:
            self._published = not self._withdrawn
            return self._published

    def withdraw(self) -> bool:
        """Do not let it stay; return False if it was published already."""
        with self._lock:
            self._withdrawn = True
            return not self._published

    @property
    def withdrawn(self) -> bool:
        return self._withdrawn
