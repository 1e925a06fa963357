"""AsyncFile and AsyncWriter: positions, verification, and files that appear whole or not at all."""

import asyncio
import io
from pathlib import Path

import pytest

from aproxy_storage import AlreadyExists, Conflict, IntegrityError, InvalidPath, NotFound, NotSupported, ProxyStorage
from aproxy_storage.tools.reconcile import reconcile
from tests.verbs.conftest import Make, content_of, keys_of

pytestmark = pytest.mark.asyncio

CONTENT = bytes(range(256)) * 20_000  # 5 MB: several chunks


async def test_read_seek_tell_like_a_file(storage: ProxyStorage) -> None:
    path = await storage.save("big", CONTENT)
    plain = io.BytesIO(CONTENT)
    async with storage.open(path) as file:
        assert file.size == len(CONTENT)
        for offset, whence, count in [(10, 0, 5), (0, 1, 3_000_000), (-7, 2, 100), (5, 0, 0), (-2, 1, 4), (0, 2, 1)]:
            assert await file.seek(offset, whence) == plain.seek(offset, whence)
            assert await file.read(count) == plain.read(count)
            assert await file.tell() == plain.tell()
        await file.seek(0)
        buffer = bytearray(2_500_000)
        assert await file.readinto(buffer) == len(buffer)
        assert buffer == CONTENT[: len(buffer)]
        assert await file.read() == CONTENT[len(buffer) :]
        assert await file.read() == b""
        with pytest.raises(ValueError, match="before the start"):
            await file.seek(-1)
    with pytest.raises(ValueError, match="closed"):
        await file.read()


async def test_awaited_handle(storage: ProxyStorage) -> None:
    file = await storage.open(await storage.save("x", b"abc"))
    assert [chunk async for chunk in file] == [b"abc"]
    await file.aclose()
    await file.aclose()


async def test_verify_finds_a_flipped_byte(storage: ProxyStorage) -> None:
    path = await storage.save("x", CONTENT)
    original = storage.get_original("a")
    await original.discard("x")
    await original.write("x", CONTENT[:-1] + b"?")
    with pytest.raises(IntegrityError, match="differ"):
        await content_of(storage, path)
    async with storage.open(path) as file:  # unverified reading goes on
        assert len(await file.read()) == len(CONTENT)
    async with storage.open(path, verify=True) as file:
        with pytest.raises(NotSupported):
            await file.seek(1)
    await storage.save("plain", b"abc")
    async with storage.open("plain", verify=True) as file:
        assert await file.read(2) + await file.read(2) == b"abc"


async def test_deleted_under_the_reader(make: Make) -> None:
    storage = make(chunk_bytes=65536)
    path = await storage.save("x", CONTENT)
    async with storage.open(path) as file:
        first = await file.read(10)
        await storage.delete(path)
        assert first == CONTENT[:10]
        await file.seek(4_000_000)  # a new read of the key, which is gone
        with pytest.raises(Conflict, match="open it again"):
            await file.read(10)
    with pytest.raises(NotFound):
        await storage.open(path)


async def test_written_file_appears_whole_on_a_clean_exit(storage: ProxyStorage) -> None:
    async with storage.open("new/file.bin", "wb") as file:
        for start in range(0, len(CONTENT), 300_000):
            await file.write(CONTENT[start : start + 300_000])
            assert not await storage.exists("new/file.bin")
        assert await file.tell() == len(CONTENT)
    assert file.record is not None
    assert file.record.path == "new/file.bin"
    assert await content_of(storage, "new/file.bin") == CONTENT
    async with storage.open("new/file.bin", "wb") as file:
        await file.write(b"replaced")
    assert await content_of(storage, "new/file.bin") == b"replaced"
    async with storage.open("empty", "xb"):
        pass
    assert await content_of(storage, "empty") == b""


async def test_exclusive_writing(storage: ProxyStorage) -> None:
    await storage.save("x", b"old")
    with pytest.raises(AlreadyExists):
        await storage.open("x", "xb")
    first, second = await storage.open("y", "xb"), await storage.open("y", "xb")
    await first.write(b"1")
    await second.write(b"2")
    results = await asyncio.gather(first.aclose(), second.aclose(), return_exceptions=True)
    assert sorted(type(result).__name__ for result in results) == ["AlreadyExists", "NoneType"]
    assert await storage.size("y") == 1
    with pytest.raises(InvalidPath):
        await storage.open("../y", "wb")
    with pytest.raises(ValueError, match="mode"):
        storage.open("x", "r+")  # type: ignore[call-overload]


@pytest.mark.parametrize("size", [3, 5_000_000])
async def test_an_exception_publishes_nothing(make: Make, size: int) -> None:
    storage = make(keep_replaced=0.0)
    await storage.save("x", b"old")
    for path in ("x", "y"):
        with pytest.raises(RuntimeError, match="changed my mind"):
            async with storage.open(path, "wb") as file:
                await file.write(bytes(size))
                raise RuntimeError("changed my mind")
    assert await content_of(storage, "x") == b"old"
    assert not await storage.exists("y")
    await storage.cleanup.drain(within=10)
    await reconcile(storage, dry_run=False, force=True)
    assert await keys_of(storage.get_original("a")) == ["x"]


async def test_a_cancelled_writer_publishes_nothing(storage: ProxyStorage) -> None:
    started = asyncio.Event()

    async def write() -> None:
        async with storage.open("x", "wb") as file:
            await file.write(bytes(3_000_000))
            started.set()
            await asyncio.sleep(60)

    task = asyncio.create_task(write())
    await started.wait()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert not await storage.exists("x")
    await reconcile(storage, dry_run=False, force=True)
    assert await keys_of(storage.get_original("a")) == []


async def test_a_failing_original_is_reported_to_the_writer(make: Make, tmp_path: Path) -> None:
    storage = make()
    await storage.save("dir/file", b"")
    file = await storage.open("dir/file/below", "wb")
    if "Memory" in str(storage.get_original("a")):
        await file.abort()
        return
    with pytest.raises(InvalidPath):
        for _ in range(20):
            await file.write(bytes(1_000_000))
        await file.aclose()
    await file.abort()
