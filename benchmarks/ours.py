"""The contender: a ProxyStorage over the filesystem and SQLite, used as its documentation says."""

from pathlib import Path
from typing import Any

from aproxy_storage import ProxyStorage
from aproxy_storage.backends.filesystem import FileSystemBackend
from aproxy_storage.meta_backends.sqlite import SQLiteMetaBackend
from aproxy_storage.records import MetaRecord


class Store:
    def __init__(self, directory: Path, **settings: Any) -> None:
        (directory / "files").mkdir(parents=True, exist_ok=True)
        self.meta = SQLiteMetaBackend(directory / "meta.db")
        originals = FileSystemBackend(directory / "files")
        self.storage = ProxyStorage("bench", originals=originals, meta=self.meta, **settings)

    async def __aenter__(self) -> "Store":
        await self.meta.setup()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.storage.aclose()

    async def save(self, name: str, content: bytes | Path) -> str:
        return await self.storage.save(name, content)

    async def exists(self, path: str) -> bool:
        return await self.storage.exists(path)

    async def read(self, path: str) -> bytes:
        async with self.storage.open(path) as file:
            return await file.read()

    async def delete(self, path: str) -> None:
        await self.storage.delete(path)

    async def stream(self, path: str) -> int:
        """Read a big file chunk by chunk; return its size."""
        total = 0
        async with self.storage.open(path) as file:
            async for chunk in file:
                total += len(chunk)
        return total

    async def page(self, prefix: str, after: str | None, limit: int) -> list[str]:
        return [record.path async for record in self.storage.list(prefix, after=after, limit=limit)]

    async def fill(self, paths: list[str]) -> None:
        """Create records of files that do not exist, straight in the meta-backend."""
        for start in range(0, len(paths), 10_000):
            records = [
                MetaRecord(path=path, proxy_storage_name="bench", original_storage_path=path, size=4096)
                for path in paths[start : start + 10_000]
            ]
            await self.meta.create_many(records)
