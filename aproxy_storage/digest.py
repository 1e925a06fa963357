"""Checksums of a stream, computed beside the event loop where that pays."""

from __future__ import annotations

import asyncio
import hashlib
import os
import threading
from collections import deque
from collections.abc import Callable
from typing import Any

from .errors import ConfigurationError
from .threads import Workers

__all__ = ["INLINE_BYTES", "Digest", "digest_inline", "hash_constructor", "hash_workers"]

INLINE_BYTES = 64 * 1024  # hashing as much takes less time than a hop into a thread and back

# hashlib lets go of the GIL from 2048 bytes on. For small content that costs more than the hash: with busy worker
# threads, getting it back takes longer than all the rest of a small save.
_KEEPS_GIL_BYTES = 2047

# hashlib lets go of the GIL, so hashing overlaps with reading and writing, and never holds up the loop.
hash_workers = Workers("aproxy_storage-hash", max(2, min(4, os.cpu_count() or 2)), max_waiting=1 << 30, share=1)


class Digest:
    """The checksum of one pass over some content: chunks go in with `add`, in order.

    Large chunks are hashed in a worker while the caller goes on. One chunk may wait behind the one being hashed, so
    that the worker need not be woken up again for each: await `room` before the next one is fetched.
    """

    __slots__ = ("_busy", "_hash", "_job", "_lock", "_loop", "_room", "_waiting")

    def __init__(self, constructor: Callable[[], Any]) -> None:
        self._hash = constructor()
        self._lock = threading.Lock()
        self._waiting: deque[bytes] = deque()
        self._busy = False  # a worker is at it, or about to be
        self._job: asyncio.Future[None] | None = None
        self._room: asyncio.Future[None] | None = None
        self._loop: asyncio.AbstractEventLoop | None = None

    def add(self, chunk: bytes) -> None:
        """Hash `chunk` after those before it: now if it is small, else in a worker."""
        if self._job is None and len(chunk) <= INLINE_BYTES:
            self._hash.update(chunk)
            return
        with self._lock:
            self._waiting.append(chunk)
            if self._busy:
                return
            self._busy = True
        if self._loop is None:
            self._loop = asyncio.get_running_loop()
        self._job = hash_workers.call(self._work, timeout=None)

    def _work(self) -> None:
        while True:
            with self._lock:
                if not self._waiting:
                    self._busy = False
                    return
                chunk = self._waiting.popleft()
                room = self._room
            if room is not None:
                assert self._loop is not None
                try:
                    self._loop.call_soon_threadsafe(_settle, room)
                except RuntimeError:  # the loop is closed: nobody waits any more
                    return
            self._hash.update(chunk)

    async def room(self) -> None:
        """Wait until no chunk waits to be hashed."""
        if self._job is None:
            return
        with self._lock:
            if not self._waiting:
                return
            self._room = asyncio.get_running_loop().create_future()
        await self._room
        self._room = None

    async def hexdigest(self) -> str:
        """Return the checksum of all chunks."""
        if self._job is not None:
            await self._job
        digest: str = self._hash.hexdigest()
        return digest

    def drop(self) -> None:
        """Forget what still waits: nobody wants the checksum any more."""
        with self._lock:
            self._waiting.clear()


def digest_inline(constructor: Callable[[], Any], data: bytes) -> str:
    """Return the checksum of at most `INLINE_BYTES`, without letting go of the GIL."""
    hashed = constructor()
    for start in range(0, len(data), _KEEPS_GIL_BYTES):
        hashed.update(data[start : start + _KEEPS_GIL_BYTES])
    digest: str = hashed.hexdigest()
    return digest


def _settle(future: asyncio.Future[None]) -> None:
    if not future.done():
        future.set_result(None)


_constructors: dict[str, Callable[..., Any]] = {"sha256": hashlib.sha256}


def hash_constructor(algorithm: str) -> Callable[..., Any]:
    """Return what makes a new hash object, given optional first bytes.

    Raises:
        ConfigurationError: hashlib knows no such algorithm of a fixed length.
    """
    known = _constructors.get(algorithm)
    if known is not None:
        return known
    try:
        fixed = hashlib.new(algorithm).digest_size > 0  # shake_128 and its like have no length of their own
    except (ValueError, TypeError):
        fixed = False
    if not fixed:
        raise ConfigurationError(f"checksum={algorithm!r}: hashlib has no such algorithm of a fixed length")

    def constructor(data: bytes = b"") -> Any:
        return hashlib.new(algorithm, data)

    _constructors[algorithm] = constructor
    return constructor
