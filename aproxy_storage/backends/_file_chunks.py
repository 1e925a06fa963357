"""Reading an open file of a `FileSystemBackend`, a chunk ahead of who consumes it."""

from __future__ import annotations

import asyncio

from ..errors import BackendUnavailable
from ..futures import seen
from ..threads import Workers
from ._handles import Opened

__all__ = ["FileChunks"]


class FileChunks:
    """The chunks of an open file, the next one being read while the consumer has the one before.

    Not an aiofiles handle: a read that was cancelled may or may not have moved its position, so that it could not be
    asked for again, and opening, reading and closing a small file would be three hops.
    """

    def __init__(
        self,
        workers: Workers,
        timeout: float | None,
        opened: Opened,
        start: int,
        stop: int,
        first: bytes,
        chunk_bytes: int,
    ) -> None:
        self._workers = workers
        self._timeout = timeout
        self._key = opened.key
        self._opened: Opened | None = opened
        self._at = start
        self._stop = stop
        self._chunk_bytes = chunk_bytes
        self._first: bytes | None = first
        self._ahead: asyncio.Future[bytes] | None = None
        self._abandoned = False  # a read that nobody waits for may be under way

    def __aiter__(self) -> FileChunks:
        return self

    async def __anext__(self) -> bytes:
        if self._at >= self._stop:
            raise StopAsyncIteration
        if self._opened is None:
            raise self._closed()
        if self._first is not None:
            data, self._first = self._first, None
        else:
            self._order()
            assert self._ahead is not None
            try:
                data = await self._ahead
            except BaseException:
                self._forget()
                raise
            if self._opened is None:  # in between the answer and now
                raise self._closed()
            self._ahead = None
        self._at += len(data)
        if self._at < self._stop:
            self._order()
        else:
            await self.aclose()
        return data

    def _order(self) -> None:
        if self._ahead is None:
            assert self._opened is not None
            stop = min(self._at + self._chunk_bytes, self._stop)
            self._ahead = self._workers.call(self._opened.read, self._at, stop, timeout=self._timeout)
            self._ahead.add_done_callback(seen)

    def _forget(self) -> None:
        ahead, self._ahead = self._ahead, None
        if ahead is None:
            return
        if not ahead.done():
            # Not cancelled: a task that waits for it would take that for a cancellation of its own.
            ahead.set_exception(self._closed())
        # Given up or out of time, its worker may still be at it.
        if ahead.cancelled() or ahead.exception() is not None:
            self._abandoned = True

    def _closed(self) -> BackendUnavailable:
        return BackendUnavailable(f"{self._key!r} was closed while it was read", retryable=False)

    async def aclose(self) -> None:
        """Let go of the file; a read that is under way keeps it open until its end."""
        self._forget()
        opened, self._opened = self._opened, None
        if opened is not None and not self._abandoned:
            opened.close()
