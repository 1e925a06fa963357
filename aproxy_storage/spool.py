"""Keeps content that can be read only once, while it is read, for a second attempt. Used by `content` alone."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import tempfile
from collections.abc import Callable
from typing import IO, Any

from .errors import ContentError
from .feeds import SETTLE, Feed, Handle, readers
from .futures import seen

__all__ = ["Spool", "SpoolFeed"]


class Spool:
    """A one-shot feed, kept while it is read, so that later passes begin with what is kept and then go on.

    Up to `memory` bytes are kept in memory, more in an anonymous temporary file. Without `keep` only what was read
    before the first pass (by a peek) is kept, and given away by it.
    """

    def __init__(self, live: Feed, limit: int, *, keep: bool, memory: int) -> None:
        self.live = live
        self.keep = keep
        self.limit = limit
        self._memory = memory
        self._kept: list[bytes] | None = []  # None: on disk
        self._length = 0
        self._file: IO[bytes] | None = None
        self._handle = Handle(self._release)
        self._writing: asyncio.Future[int] | None = None
        self._failure: ContentError | None = None

    async def read_at(self, index: int, position: int) -> bytes:
        """Return the chunk that begins at byte `position`, the `index`-th one while all is in memory."""
        await self._written()
        if position < self._length:
            if self._kept is not None:
                return self._kept[index]
            return await self._disk(lambda: self._read(position))
        chunk = await self.live.read()  # no await from here on: what was taken from the caller is kept
        if chunk:
            self._keep(chunk)
        return chunk

    def drop_first(self) -> bytes:
        """Return and forget the first kept chunk; for a pass that nobody will repeat."""
        if self._kept:
            chunk = self._kept.pop(0)
            self._length -= len(chunk)
            return chunk
        return b""

    def _keep(self, chunk: bytes) -> None:
        self._length += len(chunk)
        if self._kept is not None:
            self._kept.append(chunk)
            if self._length <= self._memory:
                return
            chunks, self._kept, start = self._kept, None, 0
        else:
            chunks, start = [chunk], self._length - len(chunk)
        self._writing = readers.call(self._handle.use, lambda: self._write(chunks, start), 0, timeout=None)

    async def _written(self) -> None:
        if self._writing is not None:
            if not self._writing.done():
                await asyncio.wait((self._writing,))  # not cancelled with us: a later pass needs what it writes
            writing, self._writing = self._writing, None
            try:
                writing.result()
            except OSError as error:
                self._failure = _spool_failed(error)
                self._failure.__cause__ = error
        if self._failure is not None:
            raise self._failure

    async def _disk(self, function: Callable[[], bytes]) -> bytes:
        try:
            return await readers.call(self._handle.use, function, b"", timeout=None)
        except OSError as error:
            raise _spool_failed(error) from error

    def _write(self, chunks: list[bytes], start: int) -> int:
        if self._file is None:
            self._file = tempfile.TemporaryFile(prefix="aproxy_storage-")  # noqa: SIM115  closed by _release
        self._file.seek(start)
        for chunk in chunks:
            self._file.write(chunk)
        self._file.flush()
        return start

    def _read(self, position: int) -> bytes:
        assert self._file is not None
        self._file.seek(position)
        return self._file.read(min(self.limit, self._length - position))

    def _release(self) -> None:
        if self._file is not None:
            with contextlib.suppress(OSError):
                self._file.close()

    async def aclose(self) -> None:
        """Release the spool and the live feed."""
        self.live.close()
        self._kept, self._length = [], 0
        if self._file is not None or self._writing is not None:
            # In a worker: removing a large file takes a while.
            await asyncio.wait((readers.call(self._handle.close, timeout=None),), timeout=SETTLE)
            if self._writing is not None:
                self._writing.add_done_callback(seen)
        await self.live.aclose()


def _spool_failed(error: OSError) -> ContentError:
    where = tempfile.gettempdir()
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return ContentError(
            f"no space left in {where} to keep the content for another attempt; "
            "point TMPDIR elsewhere, or hand over content that can be read again"
        )
    return ContentError(f"could not keep the content in {where} for another attempt: {error.strerror or error}")


class SpoolFeed:
    """One pass over a `Spool`."""

    def __init__(self, spool: Spool, *, peek: bool = False) -> None:
        self._spool = spool
        self._giving = not spool.keep and not peek
        self._index = 0
        self._position = 0
        self._closed = False

    async def read(self) -> bytes:
        if self._closed:
            return b""
        if self._giving:
            return self._spool.drop_first() or await self._spool.live.read()
        chunk = await self._spool.read_at(self._index, self._position)
        self._index += 1
        self._position += len(chunk)
        return chunk

    def close(self) -> None:
        self._closed = True
        if self._giving:
            self._spool.live.close()

    async def aclose(self) -> None:
        self._closed = True
        if self._giving:
            await self._spool.live.aclose()

    def under_way(self) -> asyncio.Future[Any] | None:
        return None
