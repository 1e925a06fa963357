"""A record that is read by stands for one file: whoever has checked a permission by it gets no other."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

from aproxy_storage import ByteRange, Conflict, MetaRecord, NotFound, ProxyStorage
from aproxy_storage.backends.memory import MemoryBackend
from aproxy_storage.meta_backends.memory import MemoryMetaBackend
from tests.verbs.conftest import Make, content_of

pytestmark = pytest.mark.asyncio

ADAS = b"Ada's letter"


async def read(storage: ProxyStorage, record: MetaRecord, how: str) -> bytes:
    if how == "stream":
        return b"".join([chunk async for chunk in storage.stream(record)])
    part = ByteRange(0, 100) if how == "range" else None
    async with storage.open(record, verify=how == "verify", byte_range=part) as file:
        return await file.read()


@pytest.mark.parametrize("how", ["stream", "open", "range", "verify"])
@pytest.mark.parametrize("bobs", [b"Bob's letter", b"Bob's, of another length", None])
async def test_a_record_never_reads_the_next_file_of_its_path(make: Make, how: str, bobs: bytes | None) -> None:
    storage = make()
    record = await storage.get(await storage.save("cv.txt", ADAS))
    await storage.delete("cv.txt")
    if bobs is not None:
        assert await storage.save("cv.txt", bobs) == "cv.txt"
    with pytest.raises(NotFound):
        await read(storage, record, how)
    if bobs is not None:
        assert await content_of(storage, "cv.txt") == bobs


async def test_a_stream_that_is_begun_late_is_of_the_file_that_was_checked(storage: ProxyStorage) -> None:
    chunks = storage.stream(await storage.get(await storage.save("cv.txt", ADAS)))
    await storage.delete("cv.txt")
    await storage.save("cv.txt", b"Bob's letter")
    with pytest.raises(NotFound):
        await anext(chunks)


@pytest.mark.parametrize("checksum", ["sha256", None])
async def test_a_record_follows_its_bytes_and_not_others(make: Make, checksum: str | None) -> None:
    storage = make(keep_replaced=0.0, checksum=checksum)
    record = await storage.get(await storage.save("cv.txt", ADAS))
    await storage.update("cv.txt", extra={"seen": True})
    assert await read(storage, record, "open") == ADAS
    moved = await storage.move("cv.txt", "b")
    if checksum is None:  # nothing says that these are the bytes of before
        with pytest.raises(Conflict, match="get the record again"):
            await read(storage, record, "open")
    else:
        assert await read(storage, record, "stream") == ADAS
    assert await read(storage, moved, "open") == ADAS
    await storage.replace("cv.txt", b"Bob's letter")
    for old in (record, moved):
        with pytest.raises(Conflict):
            await read(storage, old, "stream")
    await storage.restore_key("cv.txt")
    assert await read(storage, await storage.get("cv.txt"), "verify" if checksum else "open") == b"Bob's letter"


async def test_replaced_bytes_are_read_by_their_record_while_they_last(make: Make) -> None:
    storage = make(keep_replaced=60.0)
    record = await storage.get(await storage.save("cv.txt", ADAS))
    await storage.replace("cv.txt", ADAS.upper())
    assert await read(storage, record, "open") == ADAS
    for place in (await storage.get("cv.txt")).places:  # as if their time had come
        await storage.get_original(place.original).discard(place.key)
    with pytest.raises(Conflict):
        await read(storage, record, "open")
    async with storage.open_current(record) as file:
        assert await file.read() == ADAS.upper()


@pytest.mark.parametrize("how", ["stream", "open", "range"])
@pytest.mark.parametrize("checksum", ["sha256", None])
@pytest.mark.parametrize("replaced_again", [False, True])
async def test_a_record_never_reads_other_bytes_that_came_to_its_key(
    make: Make, how: str, checksum: str | None, replaced_again: bool
) -> None:
    storage = make(keep_replaced=60.0, checksum=checksum)
    record = await storage.get(await storage.save("cv.txt", ADAS))
    await storage.replace("cv.txt", b"Bob's letter")
    assert await read(storage, record, how) == ADAS
    assert (await storage.restore_key("cv.txt")).primary == record.primary
    if replaced_again:  # the key is one of replaced bytes once more, but not of Ada's
        await storage.replace("cv.txt", b"Eve's letter")
    with pytest.raises(Conflict, match="get the record again"):
        await read(storage, record, how)
    with pytest.raises(Conflict):
        await storage.copy(record, "copy.txt")
    assert await storage.meta.count() == 1


class CountingMeta(MemoryMetaBackend):
    gets = 0

    async def _get(self, path: str) -> MetaRecord | None:
        self.gets += 1
        return await super()._get(path)


class Nameless(MemoryBackend):
    """Does not say whose an object is."""

    async def _read(self, *args: Any) -> Any:
        reader = await super()._read(*args)
        reader.info = replace(reader.info, token=None)
        return reader


@pytest.mark.parametrize(
    ("backend", "keys", "by_record"),
    [(MemoryBackend, "token", 0), (MemoryBackend, "path", 1), (Nameless, "token", 1)],
    ids=["keys that never come back", "keys that may", "without tokens"],
)
async def test_only_what_has_to_be_looked_up_is(backend: Callable[[], Any], keys: str, by_record: int) -> None:
    meta = CountingMeta()
    storage = ProxyStorage("media", originals=backend(), meta=meta, keys=keys)
    record = await storage.get(await storage.save("x", b"abc"))

    async def lookups(opening: Any) -> int:
        meta.gets = 0
        async with opening as file:
            assert await file.read() == b"abc"
        return meta.gets

    assert await lookups(storage.open("x")) == 1
    assert await lookups(storage.open_current(record)) == 0
    assert await lookups(storage.open(record)) == by_record
    await storage.aclose()


async def test_records_of_the_predecessor_are_told_apart_by_their_key() -> None:
    meta = CountingMeta()
    original = MemoryBackend()
    storage = ProxyStorage("media", originals=original, meta=meta)
    await original.write("x", b"abc")

    def row(number: int) -> MetaRecord:
        return MetaRecord(
            path="x", proxy_storage_name="media", original_storage_path="x", size=3, native={"id": number}
        )

    rows = iter([row(1), row(2)])

    async def get(path: str) -> MetaRecord:
        return next(rows)

    meta.get = get  # type: ignore[method-assign]
    async with storage.open(row(1)) as file:
        assert await file.read() == b"abc"
    with pytest.raises(NotFound):
        await storage.open(row(1))
    await storage.aclose()
