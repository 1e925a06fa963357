"""What the parts of the backend suite share: the hooks, and content that misbehaves."""

from __future__ import annotations

import functools
from collections.abc import AsyncIterator
from typing import Any

import pytest

from ..backends.base import Backend
from ..content import Source
from ..errors import NotFound
from ..records import ByteRange

__all__ = ["BIG", "PIECE", "BackendHooks", "pattern", "pieces"]

PIECE = 64 << 10
BIG = 3 * (1 << 20) + 17  # bytes: several chunks and hops of every backend, and no round number


@functools.lru_cache(maxsize=64)
def pattern(size: int, seed: int = 0) -> bytes:
    """Return bytes in which every place can be told from its neighbours, and each seed from the others."""
    block = bytes((index * 7 + seed * 31 + (index >> 8)) & 0xFF for index in range(65521))  # a prime: no period in 2**n
    return (block * (size // len(block) + 1))[:size]


async def pieces(data: bytes, *, fail_after: int | None = None) -> AsyncIterator[bytes]:
    """Yield `data` in pieces, as a one-shot stream; raise after `fail_after` bytes."""
    for start in range(0, max(len(data), 1), PIECE):
        if fail_after is not None and start >= fail_after:
            raise OSError("the content is gone")
        yield data[start : start + PIECE]


class BackendHooks:
    """What a subclass supplies, and what the tests ask through it."""

    #: Names that differ in case, or in the Unicode normal form, are different objects.
    keeps_case: bool = True
    keeps_normal_forms: bool = True
    #: Bytes of Python's memory that a 32 MiB write or read may take at most; None: it keeps everything in memory.
    memory_bytes: int | None = 16 << 20
    #: Simultaneous writers of one key.
    writers: int = 32

    async def put_behind(self, backend: Any, key: str, data: bytes) -> None:
        """Put an object there without `backend`; it has no token."""
        raise NotImplementedError

    async def get_behind(self, backend: Any, key: str) -> bytes | None:
        """Return the bytes at `key`, None where nothing is; without `backend`."""
        raise NotImplementedError

    async def list_behind(self, backend: Any) -> list[str]:
        """Return every name that the service holds: objects, temporaries, unfinished uploads, empty directories."""
        raise NotImplementedError

    # -- for the tests

    @staticmethod
    def need(backend: Backend, *capabilities: str) -> None:
        for name in capabilities:
            if not getattr(backend.capabilities, name):
                pytest.skip(f"{backend} does not claim {name}")

    @staticmethod
    async def content(backend: Backend, key: str, byte_range: ByteRange | None = None, **options: Any) -> bytes:
        async with backend.read(key, byte_range=byte_range, **options) as reader:
            return b"".join([chunk async for chunk in reader])

    @staticmethod
    async def keys(backend: Backend, *args: Any, **options: Any) -> list[str]:
        return [info.key async for info in backend.list(*args, **options)]

    async def nothing_at(self, backend: Backend, key: str, when: object = "") -> None:
        """Assert that there is no object, to the backend and behind its back."""
        assert await self.get_behind(backend, key) is None, f"something lies at {key!r} {when}"
        with pytest.raises(NotFound):
            await backend.stat(key)

    async def nothing_left(self, backend: Backend, when: object = "") -> None:
        """Assert that the service is empty once the backend's own cleanup has ended."""
        await backend.aclose()
        left = await self.list_behind(backend)
        assert not left, f"left behind {when}: {left}"

    @staticmethod
    def source(content: Any, **options: Any) -> Source:
        return Source.of(content, **options)
