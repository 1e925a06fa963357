"""Objects in the memory of this process, for tests and examples."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from types import MappingProxyType
from typing import Self

from ..content import Source
from ..errors import AlreadyExists, NotFound
from ..paths import new_token
from ..records import ByteRange, Capabilities, ObjectInfo
from ..timeouts import Timeouts
from ..urls import URL
from .base import Backend, Reader

__all__ = ["MemoryBackend"]


@dataclass(frozen=True, slots=True)
class _Object:
    info: ObjectInfo
    data: bytes


class MemoryBackend(Backend):
    """Keeps objects in a dict, with all promises of a real backend but to survive the process.

    May be used from several loops and threads at once. Nothing is visible before it is whole; a reader keeps the
    object it has opened. Memory: everything that is stored, and a write's content once more. `aclose` keeps the
    objects.
    """

    capabilities = Capabilities(
        conditional_create=True,
        range_read=True,
        list=True,
        modified_time=True,
        server_copy=True,
        metadata=True,
        content_type=True,
        tokens=True,
    )

    def __init__(self, *, timeouts: Timeouts | None = None) -> None:
        super().__init__(timeouts=timeouts)
        self._objects: dict[str, _Object] = {}
        self._lock = threading.Lock()

    @classmethod
    def from_url(cls, url: str) -> Self:
        """Make a new, empty one of ``memory:``, with ``timeouts.…`` as the only parameters."""
        parsed = URL.parse(url)
        return cls(**parsed.options(timeouts=True))

    def full_path(self, key: str) -> str:
        return f"memory://{id(self):x}/{key}"

    async def _write(
        self,
        key: str,
        source: Source,
        *,
        content_type: str | None,
        metadata: Mapping[str, str],
        token: str | None,
        durable: bool,
    ) -> ObjectInfo:
        if source.data is not None:
            data = source.data
        else:
            try:
                async with contextlib.aclosing(source.chunks()) as chunks:
                    data = b"".join([chunk async for chunk in chunks])
            except asyncio.CancelledError as error:
                error.outcome_unknown = False  # type: ignore[attr-defined]
                raise
        now = datetime.now(UTC)
        # Always a token, so that an object without one cannot be taken for one whose writer is unknown.
        token = token or new_token()
        return self._insert(
            _Object(
                ObjectInfo(
                    key,
                    size=len(data),
                    modified_at=now,
                    changed_at=now,
                    etag=token,
                    content_type=content_type,
                    metadata=MappingProxyType(dict(metadata)),
                    token=token,
                ),
                data,
            )
        )

    def _insert(self, found: _Object) -> ObjectInfo:
        """Make the object visible: the last step, without an await, so that no cancellation can come after it."""
        with self._lock:
            if found.info.key in self._objects:
                raise AlreadyExists(f"{found.info.key!r} exists already")
            self._objects[found.info.key] = found
        return found.info

    def _get(self, key: str) -> _Object:
        try:
            return self._objects[key]
        except KeyError:
            raise NotFound(f"there is no object {key!r}") from None

    async def _read(self, key: str, byte_range: ByteRange | None, chunk_bytes: int) -> Reader:
        found = self._get(key)
        start, stop = (byte_range or ByteRange()).resolve(len(found.data))
        if stop - start <= chunk_bytes:
            return Reader(found.info, data=found.data[start:stop])
        return Reader(found.info, _chunks(found.data, start, stop, chunk_bytes))

    async def _stat(self, key: str) -> ObjectInfo:
        return self._get(key).info

    async def _discard(self, key: str, *, token: str | None) -> None:
        with self._lock:
            found = self._objects.get(key)
            if found is not None and (token is None or token == found.info.token):
                del self._objects[key]

    async def _copy(self, key: str, new_key: str, *, token: str | None, durable: bool) -> ObjectInfo:
        found = self._get(key)
        now, token = datetime.now(UTC), token or new_token()
        info = replace(found.info, key=new_key, modified_at=now, changed_at=now, etag=token, token=token)
        return self._insert(_Object(info, found.data))

    async def _list(self, prefix: str, *, after: str | None, delimiter: str | None) -> AsyncIterator[ObjectInfo]:
        with self._lock:
            keys = sorted(key for key in self._objects if key.startswith(prefix) and (after is None or key > after))
        last = after
        for key in keys:
            at = key.find(delimiter, len(prefix)) if delimiter else -1
            if at < 0:
                if found := self._objects.get(key):
                    yield found.info
            elif (rolled := key[: at + len(delimiter or "")]) != last:
                last = rolled
                yield ObjectInfo(rolled, is_prefix=True)


async def _chunks(data: bytes, start: int, stop: int, chunk_bytes: int) -> AsyncIterator[bytes]:
    for at in range(start, stop, chunk_bytes):
        yield data[at : min(at + chunk_bytes, stop)]
