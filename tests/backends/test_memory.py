"""The memory backend keeps every promise of the suite."""

from collections.abc import AsyncIterator
from datetime import UTC, datetime
from typing import Any

import pytest_asyncio

from aproxy_storage.backends import memory
from aproxy_storage.backends.memory import MemoryBackend
from aproxy_storage.records import Capabilities, ObjectInfo
from aproxy_storage.testing.backends import BackendTests


class MemoryBehind:
    """How the tests look into and change a `MemoryBackend` without its methods."""

    async def put_behind(self, backend: Any, key: str, data: bytes) -> None:
        backend._objects[key] = memory._Object(ObjectInfo(key, size=len(data), modified_at=datetime.now(UTC)), data)

    async def get_behind(self, backend: Any, key: str) -> bytes | None:
        found = backend._objects.get(key)
        return None if found is None else found.data

    async def list_behind(self, backend: Any) -> list[str]:
        return list(backend._objects)


class TestMemoryBackend(MemoryBehind, BackendTests):
    memory_bytes = None

    @pytest_asyncio.fixture
    async def backend(self) -> AsyncIterator[MemoryBackend]:
        async with MemoryBackend() as backend:
            yield backend


def test_capabilities_are_these() -> None:
    assert MemoryBackend.capabilities == Capabilities(
        conditional_create=True,
        range_read=True,
        list=True,
        modified_time=True,
        server_copy=True,
        metadata=True,
        content_type=True,
        tokens=True,
    )
