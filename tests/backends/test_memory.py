"""The memory backend keeps every promise of the suite."""

import asyncio
from collections.abc import AsyncIterator
from datetime import UTC, datetime
from typing import Any

import pytest
import pytest_asyncio

from aproxy_storage.backends import memory
from aproxy_storage.backends.memory import MemoryBackend
from aproxy_storage.errors import outcome_unknown
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


@pytest.mark.asyncio
async def test_a_write_cancelled_amid_its_content_knows_that_nothing_is_there() -> None:
    begun = asyncio.Event()

    async def content() -> AsyncIterator[bytes]:
        yield b"x"
        begun.set()
        await asyncio.Event().wait()

    write = asyncio.ensure_future(MemoryBackend().write("key", content()))
    await begun.wait()
    write.cancel()
    with pytest.raises(asyncio.CancelledError) as caught:
        await write
    assert outcome_unknown(caught.value) is False


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
