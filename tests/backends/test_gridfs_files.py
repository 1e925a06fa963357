"""GridFS shared with other programs, and what broken writes and discards leave in it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
import pytest_asyncio
from bson import ObjectId
from gridfs import AsyncGridFSBucket
from pymongo import AsyncMongoClient

from aproxy_storage import (
    AlreadyExists,
    BackendUnavailable,
    ByteRange,
    Conflict,
    IntegrityError,
    NotFound,
    ProxyStorage,
    Timeouts,
)
from aproxy_storage.backends.gridfs import GridFSBackend
from aproxy_storage.meta_backends.memory import MemoryMetaBackend
from tests.backends.test_gridfs import everything_in
from tests.services.cutting_proxy import CuttingProxy
from tests.services.mongo import DRIVERS, FORGOTTEN_SOCKETS, Borrowed, MongoServer, in_database

pytestmark = FORGOTTEN_SOCKETS

DATA = bytes(range(256)) * 5000  # 1.28 MB: six chunks


@pytest_asyncio.fixture(params=DRIVERS)
async def backend(request: pytest.FixtureRequest, mongo_url: str, mongo_database: Any) -> AsyncIterator[GridFSBackend]:
    borrowed = Borrowed(request.param, mongo_url, mongo_database.name)
    async with GridFSBackend(borrowed) as made:
        yield made
    await borrowed.close()


async def content(backend: GridFSBackend, key: str, byte_range: ByteRange | None = None) -> bytes:
    async with backend.read(key, byte_range=byte_range) as reader:
        return b"".join([chunk async for chunk in reader])


# -- files of other programs


@pytest.mark.asyncio
async def test_newest_revision_of_another_program(backend: GridFSBackend, mongo_database: Any) -> None:
    theirs = AsyncGridFSBucket(mongo_database, chunk_size_bytes=100_000)
    for number in range(3):
        id_ = await theirs.upload_from_stream("C:\\photos\\om.png", DATA + bytes([number]), metadata={"number": number})
        at = datetime(2020, 1, 1 + number, tzinfo=UTC)
        await mongo_database["fs.files"].update_one(
            {"_id": id_}, {"$set": {"uploadDate": at, "contentType": "image/png"}}
        )
    info = await backend.stat("C:\\photos\\om.png")
    assert (info.size, info.content_type, info.token) == (len(DATA) + 1, "image/png", None)
    assert info.modified_at == info.changed_at == datetime(2020, 1, 3, tzinfo=UTC)
    assert (info.etag, dict(info.metadata)) == (str(id_), {"number": "2"})
    assert await content(backend, "C:\\photos\\om.png") == DATA + b"\2"
    assert await content(backend, "C:\\photos\\om.png", ByteRange(99_998, 200_005)) == DATA[99_998:200_005]
    assert [(one.key, one.size) async for one in backend.list()] == [("C:\\photos\\om.png", len(DATA) + 1)]
    await backend.discard("C:")
    await backend.discard("C:\\photos\\om.png", token="nobodysToken")
    assert await content(backend, "C:\\photos\\om.png") == DATA + b"\2"
    await backend.discard("C:\\photos\\om.png")
    assert await everything_in(mongo_database) == []


@pytest.mark.asyncio
async def test_revisions_across_pages(backend: GridFSBackend, mongo_database: Any) -> None:
    start = datetime(2020, 1, 1, tzinfo=UTC)
    await mongo_database["fs.files"].insert_many(
        [
            {"filename": f"{number // 400}", "length": number, "chunkSize": 9, "uploadDate": start + timedelta(number)}
            for number in range(1201)
        ]
    )
    found = [(one.key, one.size) async for one in backend.list()]
    assert found == [("0", 399), ("1", 799), ("2", 1199), ("3", 1200)]


@pytest.mark.asyncio
async def test_adopted_file(backend: GridFSBackend, mongo_database: Any) -> None:
    theirs = AsyncGridFSBucket(mongo_database)
    await theirs.upload_from_stream("old/om.png", DATA)
    async with ProxyStorage("media", originals=backend, meta=MemoryMetaBackend()) as storage:
        path = await storage.adopt("old/om.png")
        async with storage.open(path) as file:
            assert await file.read() == DATA
        assert (await storage.get(path)).size == len(DATA)
        with pytest.raises(AlreadyExists):
            await backend.write("old/om.png", b"other")
        await storage.delete(path)
    assert await everything_in(mongo_database) == []


@pytest.mark.asyncio
async def test_other_programs_read_ours(backend: GridFSBackend, mongo_database: Any) -> None:
    await backend.write("a/b.bin", DATA, content_type="x/y", metadata={"author": "x"}, token="tokenOfWrite")
    async with await AsyncGridFSBucket(mongo_database).open_download_stream_by_name("a/b.bin") as found:
        assert await found.read() == DATA
        assert (found.length, found.content_type, found.metadata) == (len(DATA), "x/y", {"author": "x"})
        assert abs(found.upload_date.replace(tzinfo=UTC) - datetime.now(UTC)) < timedelta(hours=6)


@pytest.mark.asyncio
async def test_buckets_and_chunk_sizes(mongo_url: str, mongo_database: Any) -> None:
    url = in_database(mongo_url, mongo_database.name)
    async with GridFSBackend(url, bucket="photos", chunk_bytes=10_000) as photos, GridFSBackend(url) as usual:
        await photos.write("a", DATA)
        with pytest.raises(NotFound):
            await usual.stat("a")
        await usual.write("a", b"other")
        assert await content(photos, "a") == DATA
        assert await content(photos, "a", ByteRange(9_999, 50_001)) == DATA[9_999:50_001]
    assert await mongo_database["photos.chunks"].count_documents({}) == len(DATA) // 10_000
    names = set(await mongo_database["photos.files"].index_information())
    assert names == {"_id_", "filename_1_uploadDate_1", "aproxy_filename", "aproxy_discarded"}


# -- what is broken


@pytest.mark.asyncio
async def test_chunks_of_a_killed_writer_are_found_by_its_token(backend: GridFSBackend, mongo_database: Any) -> None:
    await backend.write("dir/key", b"kept", token="tokenOfKept0")
    chunks = mongo_database["fs.chunks"]
    for key, token in (("dir/key", "tokenOfDead0"), ("dir/key", "tokenOfDead1"), ("dir/ke", "tokenOfDead0")):
        for number in range(3):
            id_ = f"{key}\\{token}\\abcdefghijkl"
            await chunks.insert_one({"files_id": id_, "n": number, "data": b"x" * 1000})
    await backend.discard("dir/key", token="tokenOfDead0")
    left = await everything_in(mongo_database)
    assert sorted(left) == [
        "chunks of dir/ke\\tokenOfDead0\\abcdefghijkl",
        "chunks of dir/key\\tokenOfDead1\\abcdefghijkl",
        "dir/key",
    ]
    assert await content(backend, "dir/key") == b"kept"


@pytest.mark.asyncio
async def test_broken_discard_is_finished_by_the_next(backend: GridFSBackend, mongo_database: Any) -> None:
    await backend.write("key", DATA, token="tokenOfFirst")
    files = mongo_database["fs.files"]
    hidden = {"aproxy_discarded": {"key": "key", "token": "tokenOfFirst"}}
    await files.update_one({"filename": "key"}, {"$set": hidden, "$unset": {"filename": "", "aproxy_token": ""}})
    with pytest.raises(NotFound):
        await backend.stat("key")
    assert [one async for one in backend.list()] == []
    await backend.write("key", b"second", token="tokenOfOther")
    await backend.discard("key", token="tokenOfFirst")
    assert await everything_in(mongo_database) == ["key"]
    assert await content(backend, "key") == b"second"


@pytest.mark.asyncio
async def test_discard_spares_a_write_under_way(backend: GridFSBackend, mongo_database: Any) -> None:
    begun, go_on = asyncio.Event(), asyncio.Event()

    async def slowly() -> AsyncIterator[bytes]:
        for _ in range(5):
            yield DATA
        begun.set()
        await go_on.wait()
        yield DATA

    writing = asyncio.ensure_future(backend.write("key", slowly()))
    await begun.wait()
    await backend.discard("key")
    await backend.discard("key", token="tokenOfOther")
    go_on.set()
    await writing
    assert await content(backend, "key") == DATA * 6


@pytest.mark.asyncio
async def test_missing_chunks(backend: GridFSBackend, mongo_database: Any) -> None:
    await backend.write("key", DATA * 4)
    async with backend.read("key", chunk_bytes=1 << 18) as reader:
        await anext(reader)
        await backend.discard("key")
        with pytest.raises(Conflict, match="removed"):
            async for _ in reader:
                pass
    await backend.write("key", DATA)
    await mongo_database["fs.chunks"].delete_one({"n": 2})
    with pytest.raises(IntegrityError, match="lacks some of its chunks"):
        await content(backend, "key")
    await mongo_database["fs.files"].insert_one({"_id": ObjectId(), "filename": "odd", "length": 5})
    with pytest.raises(IntegrityError, match="chunkSize"):
        await content(backend, "odd")


@pytest.mark.asyncio
@pytest.mark.parametrize("retry", ["true", "false"])
async def test_every_lost_answer_of_a_write(own_mongo: MongoServer, retry: str) -> None:
    async with CuttingProxy(("127.0.0.1", own_mongo.port)) as proxy:
        url = f"mongodb://127.0.0.1:{proxy.port}/app?directConnection=true&retryWrites={retry}&retryReads={retry}"
        async with GridFSBackend(url, timeouts=Timeouts(operation=10.0)) as backend:
            await backend.write("warm.up", b"x")
            for number in range(12):
                key, token = f"marker-{number:02}", f"token{number:07}"
                cuts = proxy.cuts
                proxy.cut(key, after=number)
                try:
                    await backend.write(key, b"content", token=token)
                except BackendUnavailable as error:
                    if not error.outcome_unknown:
                        with pytest.raises(NotFound):
                            await backend.stat(key)
                    proxy.cut(b"")
                    await backend.discard(key, token=token)
                else:
                    proxy.cut(b"")
                    assert await content(backend, key) == b"content"
                    await backend.discard(key)
                if proxy.cuts == cuts:
                    break
            else:
                pytest.fail("a write takes more statements than were cut")
            proxy.cut(b"")
            assert proxy.cuts >= 3
            left = [one.key async for one in backend.list()]
        async with AsyncMongoClient(own_mongo.url) as client:
            assert sorted(await everything_in(client["app"])) == left == ["warm.up"]


@pytest.mark.asyncio
async def test_what_aclose_cuts_short_is_no_cancellation(
    backend: GridFSBackend, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun = asyncio.Event()

    async def hang(work: object) -> None:
        begun.set()
        await asyncio.Event().wait()

    monkeypatch.setattr(backend, "_limited", hang)
    for verb in (backend.stat("key"), backend.write("key", b"small")):
        begun.clear()
        asked = asyncio.ensure_future(verb)
        await begun.wait()
        await backend.cleanup.drain(within=0.01)
        monkeypatch.undo()
        with pytest.raises(BackendUnavailable, match="closed") as caught:
            await asked
        assert caught.value.outcome_unknown
        monkeypatch.setattr(backend, "_limited", hang)
    monkeypatch.undo()
