"""The storages that the verbs are tested on: everything in memory, and the embedded default."""

from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio

from aproxy_storage import Backend, ProxyStorage
from aproxy_storage.backends.filesystem import FileSystemBackend
from aproxy_storage.backends.memory import MemoryBackend
from aproxy_storage.meta_backends.memory import MemoryMetaBackend
from aproxy_storage.meta_backends.sqlite import SQLiteMetaBackend

Make = Callable[..., ProxyStorage]


@pytest_asyncio.fixture(params=["memory", "embedded"])
async def make(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[Make]:
    """Return a function that makes storages over originals ``a`` and ``b``; they share one meta-backend."""
    originals: dict[str, Backend]
    meta: Any
    if request.param == "memory":
        originals, meta = {"a": MemoryBackend(), "b": MemoryBackend()}, MemoryMetaBackend()
    else:
        originals = {name: FileSystemBackend(tmp_path / name) for name in "ab"}
        meta = SQLiteMetaBackend(tmp_path / "meta.db")
    made: list[ProxyStorage] = []

    def make_one(name: str = "media", **options: Any) -> ProxyStorage:
        kind = options.pop("kind", ProxyStorage)
        storage: ProxyStorage = kind(name, **{"originals": originals, "meta": meta, **options})
        made.append(storage)
        return storage

    yield make_one
    for storage in made:
        await storage.aclose()


@pytest.fixture
def storage(make: Make) -> ProxyStorage:
    return make()


async def content_of(storage: ProxyStorage, path: str) -> bytes:
    async with storage.open(path, verify=True) as file:
        return await file.read()


async def keys_of(backend: Backend) -> list[str]:
    return [info.key async for info in backend.list()]
