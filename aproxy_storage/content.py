"""The content of a save: anything a caller may hand over, as chunks that are counted and hashed on the way."""

from __future__ import annotations

import os
from collections.abc import AsyncIterator
from contextlib import AbstractAsyncContextManager
from typing import Any

__all__ = ["Source"]


class Source:
    """Content that can be read in chunks and, where `replayable`, again from the start.

    One object serves one save: every attempt of it calls `chunks` anew. Not to be shared between tasks.

    Attributes:
        name: the name that the content itself carries (Django's ``File.name``, a path's last part), or None.
        size: the exact number of bytes where it is known beforehand or declared, else None.
        content_type: as the content itself declares it (an upload), or None.
        replayable: `chunks` can be called again after a first pass has begun.
        path: a file of the caller's that may be read, linked by reflink or copied, never moved; or None.
        temporary_path: a file that may be *moved* (Django's ``temporary_file_path()``), or None.
        data: the whole content where it is in memory already, else None.
        seen_size, checksum: of the last complete pass (``"sha256:…"``); None before, checksum also where turned off.
    """

    name: str | None
    size: int | None
    content_type: str | None
    replayable: bool
    path: os.PathLike[str] | None
    temporary_path: str | None
    data: bytes | None
    seen_size: int | None
    checksum: str | None

    @classmethod
    def of(
        cls,
        content: Any,
        *,
        size: int | None = None,
        chunk_bytes: int = 1 << 20,
        checksum: str | None = "sha256",
        timeout: float | None = None,
        spool: bool = False,
        spool_bytes: int = 1 << 20,
    ) -> Source:
        """Return the source for `content`."""
        raise NotImplementedError

    def chunks(self) -> AsyncIterator[bytes]:
        """Read the content once, from the start."""
        raise NotImplementedError

    async def peek(self, count: int = 4096) -> bytes:
        """Return the first bytes (up to `count`, at most 64 KiB) without consuming them."""
        raise NotImplementedError

    def watched(self, seconds: float | None) -> AbstractAsyncContextManager[None]:
        """Limit the time without progress of whoever consumes the chunks."""
        raise NotImplementedError

    def measured(self, size: int, checksum: str | None) -> None:
        """Take the size and checksum that a backend has found by reading `path` itself."""
        raise NotImplementedError

    async def aclose(self) -> None:
        """Release the spool."""
