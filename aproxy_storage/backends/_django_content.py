"""The content of a save as the file that a synchronous storage reads in its thread. Knows nothing of Django."""

from __future__ import annotations

import asyncio
import contextlib
import io
import os
import stat
import tempfile
import threading
from collections import deque
from collections.abc import Iterator
from typing import IO

from ..errors import BackendUnavailable, ContentError, OutOfSpace

__all__ = ["Attempt", "Held", "InterruptedContent", "Pipe"]

_AHEAD = 2  # chunks that wait for the storage
_LOOK = 1.0  # seconds between two looks whether the event loop is still there
_IN_MEMORY = 1 << 20  # bytes of kept content; more goes into a temporary file


class InterruptedContent(Exception):
    """Raised in the storage's thread: the content has failed, or its caller has gone away."""


class Held(io.BytesIO):
    """Small content, which is in memory, can seek and knows its size."""

    def __init__(self, data: bytes) -> None:
        super().__init__(data)
        self.size = len(data)

    def chunks(self) -> Iterator[bytes]:
        self.seek(0)
        yield self.getvalue()

    def finish(self) -> None:
        """Nothing: its end was seen before the storage was asked."""

    def release(self) -> None:
        """Nothing: memory."""


class Pipe:
    """A file fed by an event loop; the storage's thread waits for each chunk.

    Its size is that of `path` where the content is a file, or else not known before the end. A storage that asks for it
    all the same, as Dropbox's does, gets it: the rest of the content is kept in a temporary file first. Content that is
    kept from the start, so or by `keep`, can seek; else it can be read once, where ``seek(0)`` before the first read is
    allowed, because many storages begin so.
    """

    closed = False

    def __init__(self, size: int | None, path: os.PathLike[str] | None) -> None:
        self._size = size  # what the storage may be told, and then relies on
        self._path = path
        self._loop = asyncio.get_running_loop()
        self._room = asyncio.Event()
        self._changed = threading.Condition()
        self._chunks: deque[bytes] = deque()
        self._ended = False
        self._failed = False
        self._rest = memoryview(b"")
        self._taken = 0  # bytes of the chunks that have come to the storage's side
        self._position = 0
        self._furthest = 0  # how far the storage has read
        self._kept: IO[bytes] | None = None  # holds what is not read yet
        self._kept_from = 0  # the position at which it begins

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

    def keep(self, chunk: bytes | memoryview) -> None:
        """Keep a chunk instead of handing it over.

        Raises:
            OutOfSpace: the temporary file has no room.
        """
        try:
            if self._kept is None:
                self._kept = tempfile.SpooledTemporaryFile(_IN_MEMORY, prefix="aproxy-")  # noqa: SIM115  see `release`
                self._kept_from = self._taken = self._position
            self._kept.write(chunk)
        except OSError as error:
            raise OutOfSpace(
                f"could not keep the content in a temporary file in {tempfile.gettempdir()}: {error.strerror}"
            ) from error
        self._taken += len(chunk)

    def keep_no_more(self) -> None:
        """Let what has been kept be read: that was all."""
        assert self._kept is not None
        self._kept.seek(0)
        self._size = self._taken

    def _keep_rest(self) -> None:
        """Read the content to its end and keep what the storage has not read, so that the size is known."""
        rest, self._rest = self._rest, memoryview(b"")
        self.keep(rest)
        while piece := self._next():
            self.keep(piece)
        self.keep_no_more()

    @property
    def size(self) -> int:
        if self._size is None and self._path is not None:
            with contextlib.suppress(OSError):
                found = os.stat(self._path)
                if stat.S_ISREG(found.st_mode) and found.st_size >= self._taken:
                    self._size = found.st_size
        if self._size is None:
            self._keep_rest()
        assert self._size is not None
        return self._size

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

    def _read_on(self) -> bytes | memoryview:
        """Return what the storage has not read of the last chunk, or the next one; empty at the end.

        Raises:
            ContentError: the content has another size than the storage was told.
        """
        if self._rest:
            rest, self._rest = self._rest, memoryview(b"")
            return rest
        chunk = self._next()
        self._taken += len(chunk)
        if self._size is not None and (self._taken > self._size or (not chunk and self._taken < self._size)):
            raise ContentError(f"the content should have {self._size} bytes, and has changed while it was read")
        return chunk

    def read(self, size: int | None = -1) -> bytes:
        wanted = None if size is None or size < 0 else size
        if self._kept is not None:
            data = self._kept.read(-1 if wanted is None else wanted)
        else:
            data = self._read_pieces(wanted)
        self._move(self._position + len(data))
        return data

    def _read_pieces(self, wanted: int | None) -> bytes:
        parts: list[bytes | memoryview] = []
        while wanted is None or wanted > 0:
            piece = self._read_on()
            if not piece:
                break
            if wanted is not None:
                if len(piece) > wanted:
                    view = memoryview(piece)
                    piece, self._rest = view[:wanted], view[wanted:]
                wanted -= len(piece)
            parts.append(piece)
        return bytes(parts[0]) if len(parts) == 1 else b"".join(parts)

    def _move(self, position: int) -> None:
        self._position = position
        self._furthest = max(self._furthest, position)

    def chunks(self) -> Iterator[bytes]:
        if self.seekable():
            self.seek(0)
        while piece := self._piece():
            yield piece

    def _piece(self) -> bytes:
        if self._kept is not None:
            return self.read(_IN_MEMORY)
        piece = bytes(self._read_on())
        self._move(self._position + len(piece))
        return piece

    def finish(self) -> None:
        """Wait for the end of the content, which the storage has to have read up to when it has saved.

        A storage that reads as much as it was told may come back before the end is known. Only with the end do size
        and checksum exist, and only there content is found to be longer than it was declared.

        Raises:
            BackendUnavailable: there is more, which the storage has not read.
            ContentError, InterruptedContent: the content has failed.
        """
        more = self._read_on() if self._kept is None else self._furthest < self._taken
        if more:
            raise BackendUnavailable(
                f"the storage has read only the first {self._furthest} bytes of the content, and called that saved",
                retryable=False,
            )

    def readable(self) -> bool:
        return True

    def writable(self) -> bool:
        return False

    def seekable(self) -> bool:
        return self._kept is not None and self._kept_from == 0

    def tell(self) -> int:
        return self._position

    def seek(self, offset: int, whence: int = 0) -> int:
        if self._kept is not None:
            position = offset + (0, self._position, self._size or 0)[whence]
            if position >= self._kept_from:
                self._kept.seek(position - self._kept_from)
                self._position = position
                return position
        elif (offset, whence) == (0, 0) and not self._position:
            return 0
        raise io.UnsupportedOperation("this content comes once, and from its start")

    def close(self) -> None:
        """Nothing: it is closed by whoever feeds it."""

    def release(self) -> None:
        """Let go of what has been kept; idempotent."""
        if self._kept is not None:
            self._kept.close()


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
