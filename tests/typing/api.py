"""Typical use of each verb, as a type checker sees it: checked by `make lint`, never run."""

from collections.abc import AsyncIterator, Mapping, Sequence
from pathlib import Path
from typing import Any, assert_type

from aproxy_storage import (
    AsyncFile,
    AsyncWriter,
    Backend,
    ByteRange,
    CommonPrefix,
    Health,
    MetaBackend,
    MetaRecord,
    ObjectInfo,
    ProxyStorage,
    Request,
    Revision,
    Route,
    Source,
    StorageError,
    Timeouts,
)
from aproxy_storage.backends.filesystem import FileSystemBackend
from aproxy_storage.backends.memory import MemoryBackend
from aproxy_storage.config import load, meta_backend_from_url, original_from_url, storage_from_urls
from aproxy_storage.meta_backends.memory import MemoryMetaBackend
from aproxy_storage.meta_backends.sqlite import SQLiteMetaBackend
from aproxy_storage.registry import get_storage, register
from aproxy_storage.tools.reconcile import Report, reconcile
from aproxy_storage.tools.verify import verify


def by_type(request: Request) -> str | None:
    return "images" if request.name.endswith(".png") else None


media = ProxyStorage(
    "media",
    originals={"files": FileSystemBackend("media"), "images": FileSystemBackend(Path("images"), file_mode=0o600)},
    meta=SQLiteMetaBackend("media.sqlite3", durability="power", timeouts=Timeouts(operation=5.0)),
    placement=Route(by_type),
    durability="power",
)
ProxyStorage("one", originals=MemoryBackend(), meta=MemoryMetaBackend())
ProxyStorage("pairs", originals=[("a", MemoryBackend()), ("b", MemoryBackend())], meta=MemoryMetaBackend())


class Invoices(ProxyStorage):
    name = "invoices"
    originals = {"memory": MemoryBackend()}  # noqa: RUF012  as a Django setting would be: nobody changes it
    meta = MemoryMetaBackend()

    async def choose_original(self, name: str, source: Source, **kwargs: Any) -> str | None:
        return None if source.size is None else "memory"

    async def get_data_for_meta_backend_save(
        self, *, path: str, original_storage_path: str, original_name: str, content: Source, **kwargs: Any
    ) -> Mapping[str, Any]:
        return {"first": (await content.peek(1)).hex()}


def configure() -> None:
    assert_type(load(Path("aproxy.toml")), dict[str, ProxyStorage])
    assert_type(original_from_url("file:media"), Backend)
    assert_type(meta_backend_from_url("memory:"), MetaBackend)
    assert_type(storage_from_urls("memory:", "memory:", prefix="a"), ProxyStorage)
    assert_type(FileSystemBackend.from_url("file:media"), FileSystemBackend)


async def write(content: AsyncIterator[bytes]) -> None:
    assert_type(await media.save("a.txt", b"bytes"), str)
    assert_type(await media.save(None, Path("a.txt"), using="files", max_length=100), str)
    assert_type(await media.save("a.txt", content, content_type="text/plain", extra={"owner": 7}, size=3), str)
    record = await media.replace("a.txt", "text", expect_version=3)
    record = await media.replace("a.txt", "text", expect_version=record.revision)
    assert_type(record, MetaRecord)
    assert_type(await media.copy(record, "b.txt", using="files"), str)
    assert_type(await media.move("a.txt", "images"), MetaRecord)
    assert_type(await media.rename(record, "c.txt"), MetaRecord)
    assert_type(await media.adopt("old.txt", name="new.txt"), str)
    assert_type(await media.update("a.txt", extra={}), MetaRecord)
    await media.delete("a.txt", missing_ok=True)
    async with media.open("d.txt", "wb") as file:
        assert_type(file, AsyncWriter)
        assert_type(await file.write(b"part"), int)
    assert_type(await media.open("e.txt", "xb"), AsyncWriter)


async def read(record: MetaRecord) -> None:
    async with media.open("a.txt", verify=True) as file:
        assert_type(file, AsyncFile)
        assert_type(await file.read(10), bytes)
        assert_type(await file.seek(-5, 2), int)
        async for chunk in file:
            assert_type(chunk, bytes)
    assert_type(await media.open(record, byte_range=ByteRange.last(5)), AsyncFile)
    async for chunk in media.stream(record, byte_range=ByteRange(0, 10)):
        assert_type(chunk, bytes)
    assert_type(await media.get("a.txt"), MetaRecord)
    assert_type(await media.get_many(["a.txt"]), Sequence[MetaRecord | None])
    assert_type(await media.exists(record), bool)
    assert_type(await media.size("a.txt"), int)
    assert_type(await media.url("a.txt", expires_in=60.0), str)
    assert_type(await media.urls(["a.txt"]), dict[str, str])
    async for each in media.list("letters/", limit=10):
        assert_type(each, MetaRecord)
    async for entry in media.list(delimiter="/"):
        assert_type(entry, MetaRecord | CommonPrefix)


async def look(record: MetaRecord) -> None:
    assert_type(record.size, int | None)
    assert_type(record.revision, Revision)
    assert_type(record.extra, Mapping[str, Any])
    assert_type(record.get_proxy_storage(), ProxyStorage)
    assert_type(record.get_original_storage(), Backend)
    assert_type(register(media), ProxyStorage)
    assert_type(get_storage("media"), ProxyStorage)
    assert_type(media.get_original("files"), Backend)
    async for info in media.get_original().list("letters/"):
        assert_type(info, ObjectInfo)


async def care() -> None:
    assert_type(await media.health(), Sequence[Health])
    assert_type(await media.tidy(), int)
    assert_type(await reconcile(media, dry_run=False), Report)
    async for result in verify(media):
        assert_type(result.item, str)
        assert_type(result.value, MetaRecord | None)
        assert_type(result.error, StorageError | None)
    async with media as same:
        assert_type(same, ProxyStorage)
    await media.aclose()
