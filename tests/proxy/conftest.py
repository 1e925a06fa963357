"""Storages for the tests of `ProxyStorage`."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import pytest_asyncio

from aproxy_storage import ProxyStorage
from aproxy_storage.backends.memory import MemoryBackend
from aproxy_storage.meta_backends.memory import MemoryMetaBackend
from tests.proxy.support import storage_in


@pytest_asyncio.fixture
async def fs_storage(tmp_path: Path) -> AsyncIterator[ProxyStorage]:
    """Files below ``tmp_path / "files"``, records in SQLite beside them."""
    async with storage_in(tmp_path) as storage:
        yield storage


@pytest_asyncio.fixture
async def memory_storage() -> AsyncIterator[ProxyStorage]:
    """Files and records in memory."""
    async with ProxyStorage("media", originals=MemoryBackend(), meta=MemoryMetaBackend()) as storage:
        yield storage
