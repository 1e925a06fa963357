"""The obstore backend keeps every promise of the suite, over S3, a directory and memory."""

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import obstore
import pytest
import pytest_asyncio
from obstore.store import LocalStore, MemoryStore

from aproxy_storage.backends.obstore import ObstoreBackend
from aproxy_storage.testing.backends import BackendTests
from tests.backends.test_filesystem import everything_below
from tests.backends.test_s3 import ObjectsBehind
from tests.services.s3 import S3Service


def settings_of(service: S3Service) -> dict[str, Any]:
    """Return the connection as obstore names it."""
    settings = {
        "endpoint": service.endpoint_url,
        "region": service.region,
        "access_key_id": service.access_key,
        "secret_access_key": service.secret_key,
    }
    return {name: value for name, value in settings.items() if value is not None}


def backend_of(service: S3Service, **options: Any) -> ObstoreBackend:
    """Return a backend of the tests' own prefix; SeaweedFS has files and directories underneath."""
    given = {
        "prefix": service.prefix,
        "max_segment_bytes": 255,
        "flat_listings": False,
        **settings_of(service),
        **options,
    }
    return ObstoreBackend(f"s3://{service.bucket}", **given)


class TestS3Store(ObjectsBehind, BackendTests):
    @pytest_asyncio.fixture
    async def backend(self, s3_service: S3Service) -> AsyncIterator[ObstoreBackend]:
        async with backend_of(s3_service) as backend:
            yield backend


class TestLocalStore(BackendTests):
    root: Path

    @pytest_asyncio.fixture
    async def backend(self, tmp_path: Path) -> AsyncIterator[ObstoreBackend]:
        self.root = tmp_path / "root"
        self.root.mkdir()
        async with ObstoreBackend(LocalStore(self.root, automatic_cleanup=True)) as backend:
            yield backend

    async def put_behind(self, backend: Any, key: str, data: bytes) -> None:
        path = self.root / key
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)

    async def get_behind(self, backend: Any, key: str) -> bytes | None:
        try:
            return await asyncio.to_thread((self.root / key).read_bytes)
        except (FileNotFoundError, NotADirectoryError, IsADirectoryError):
            return None

    async def list_behind(self, backend: Any) -> list[str]:
        return everything_below(self.root)


class TestMemoryStore(BackendTests):
    memory_bytes = None
    store: MemoryStore

    @pytest_asyncio.fixture
    async def backend(self) -> AsyncIterator[ObstoreBackend]:
        self.store = MemoryStore()
        async with ObstoreBackend(self.store) as backend:
            yield backend

    async def put_behind(self, backend: Any, key: str, data: bytes) -> None:
        await obstore.put_async(self.store, key, data)

    async def get_behind(self, backend: Any, key: str) -> bytes | None:
        try:
            return bytes(await (await obstore.get_async(self.store, key)).bytes_async())
        except FileNotFoundError:
            return None

    async def list_behind(self, backend: Any) -> list[str]:
        return [entry["path"] for entry in await obstore.list(self.store).collect_async()]


@pytest.mark.asyncio
async def test_metadata_that_cannot_be_decoded_is_told_as_it_is() -> None:
    store = MemoryStore()
    obstore.put(store, "key", b"x", attributes={"title": "=?utf-8?b?A?="})
    backend = ObstoreBackend(store)
    assert (await backend.stat("key")).metadata == {"title": "=?utf-8?b?A?="}
    async with backend.read("key") as reader:
        assert reader.data == b"x"
