"""AsyncFile and AsyncWriter: positions, verification, and files that appear whole or not at all."""

import asyncio
import io
from collections.abc import AsyncIterator, Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from aproxy_storage import (
    AlreadyExists,
    BackendUnavailable,
    ByteRange,
    Conflict,
    ContentError,
    DeadlineExceeded,
    IntegrityError,
    InvalidPath,
    MetaRecord,
    NotFound,
    NotSupported,
    ObjectInfo,
    ProxyStorage,
    Route,
    Source,
    by_content_type,
    proxy_writing,
)
from aproxy_storage.backends.base import Reader
from aproxy_storage.backends.memory import MemoryBackend
from aproxy_storage.meta_backends.memory import MemoryMetaBackend
from aproxy_storage.openings import Opened
from aproxy_storage.testing.faults import Fail, Fault, Hang
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
        with pytest.raises(ValueError, match="whence=9"):
            await file.seek(0, 9)
        await file.seek(-3, 2)
        assert await file.read(None) == CONTENT[-3:]
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


class Gated(MemoryBackend):
    """Takes nothing before the gate is open."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = asyncio.Event()

    async def _write(self, key: str, source: Source, **options: Any) -> ObjectInfo:
        await self.gate.wait()
        return await super()._write(key, source, **options)


def gated() -> tuple[ProxyStorage, Gated]:
    backend = Gated()
    return ProxyStorage("media", originals=backend, meta=MemoryMetaBackend(), chunk_bytes=4), backend


@pytest.mark.parametrize("length", [1, 3, 4, 5, 9])
async def test_writes_of_several_tasks_stay_in_one_piece(length: int) -> None:
    storage, backend = gated()
    backend.gate.set()
    pieces = [bytes([65 + i]) * length for i in range(20)]
    async with storage.open("x", "wb") as file:
        await asyncio.gather(*(file.write(piece) for piece in pieces))
        assert await file.tell() == 20 * length
    content = await content_of(storage, "x")
    assert sorted(content[at : at + length] for at in range(0, len(content), length)) == pieces


async def test_a_cancelled_write_adds_nothing_or_publishes_nothing() -> None:
    storage, backend = gated()
    file = await storage.open("x", "wb")
    long = asyncio.create_task(file.write(b"a" * 41))
    short = asyncio.create_task(file.write(b"bcd"))
    closing = asyncio.create_task(file.aclose())
    await asyncio.sleep(0)
    assert not long.done()
    short.cancel()
    backend.gate.set()
    with pytest.raises(asyncio.CancelledError):
        await short
    assert await long == 41
    await closing  # not before what was being written is
    assert await content_of(storage, "x") == b"a" * 41

    backend.gate.clear()
    file = await storage.open("y", "wb")
    long = asyncio.create_task(file.write(b"a" * 41))
    await asyncio.sleep(0)
    long.cancel()
    with pytest.raises(asyncio.CancelledError):
        await long
    assert await file.tell() == 0
    backend.gate.set()
    with pytest.raises(ContentError, match="half-way"):
        await file.write(b"a" * 41)
    with pytest.raises(ContentError, match="half-way"):
        await file.aclose()
    assert not await storage.exists("y")


@pytest.mark.parametrize("way", ["aclose", "with"])
@pytest.mark.parametrize("end", ["stored", "fails", "cancelled", "aborted", "too late"])
async def test_who_closes_a_writer_while_another_task_does_is_told_the_outcome(
    make: Make, monkeypatch: pytest.MonkeyPatch, end: str, way: str
) -> None:
    storage = make()
    begun, go_on = asyncio.Event(), asyncio.Event()
    publish = storage.journal.publish

    async def slow(*args: Any, **options: Any) -> Any:
        if end == "too late":
            record = await publish(*args, **options)
        begun.set()
        try:
            await go_on.wait()
        except asyncio.CancelledError:
            if end != "too late":
                raise
            return record
        if end == "fails":
            raise Conflict("somebody else was faster")
        return await publish(*args, **options)

    monkeypatch.setattr(storage.journal, "publish", slow)
    file = await storage.open("a", "wb")
    await file.write(b"data")
    first = asyncio.create_task(file.aclose())
    await begun.wait()
    second, gone = (
        asyncio.create_task(file.aclose() if way == "aclose" else file.__aexit__(None, None, None)) for _ in range(2)
    )
    await asyncio.sleep(0)
    assert not second.done()
    gone.cancel()
    await asyncio.wait((gone,))
    assert gone.cancelled()
    assert not first.done(), "who only waits does not end it"
    if end == "aborted":
        await file.abort()
    elif end in ("cancelled", "too late"):
        first.cancel()
    else:
        go_on.set()
    outcomes = await asyncio.gather(first, second, return_exceptions=True)
    expected = {
        "stored": (None, None),
        "fails": (Conflict, Conflict),
        "cancelled": (asyncio.CancelledError, BackendUnavailable),
        "aborted": (BackendUnavailable, BackendUnavailable),
        "too late": (asyncio.CancelledError, None),
    }[end]
    assert [outcome and type(outcome) for outcome in outcomes] == list(expected)
    await file.aclose()  # delivered already
    stored = end in ("stored", "too late")
    assert (file.record is not None) is await storage.exists("a") is stored


async def test_a_writer_belongs_to_its_loop() -> None:
    storage, backend = gated()
    backend.gate.set()
    file, other = await storage.open("x", "wb"), await storage.open("y", "wb")
    await file.write(b"abc")

    async def elsewhere() -> None:
        with pytest.raises(NotSupported, match="another event loop"):
            await file.write(b"defghi")
        with pytest.raises(NotSupported, match="another event loop"):
            await file.aclose()
        await other.abort()

    await asyncio.to_thread(asyncio.run, elsewhere())
    await file.aclose()
    assert await content_of(storage, "x") == b"abc"
    await other.abort()
    assert not await storage.exists("y")


async def test_writers_of_one_new_name_follow_each_other() -> None:
    storage, backend = gated()
    files = [await storage.open("x", "wb") for _ in range(3)]
    for number, file in enumerate(files):
        await file.write(b"%d" % number)
    closing = [asyncio.create_task(file.aclose()) for file in files]
    while await storage.meta.count(state="pending") != 1:  # noqa: ASYNC110
        await asyncio.sleep(0)
    backend.gate.set()
    await asyncio.gather(*closing)
    assert await content_of(storage, "x") in (b"0", b"1", b"2")
    assert await storage.meta.count() == 1


async def test_a_writer_waits_for_a_save_of_its_name_only_so_long(monkeypatch: pytest.MonkeyPatch) -> None:
    storage, backend = gated()
    saving = asyncio.create_task(storage.save("x", b"old"))
    while not await storage.meta.count(state="pending"):  # noqa: ASYNC110
        await asyncio.sleep(0)
    monkeypatch.setattr(proxy_writing, "_PATIENCE", 0.02)
    with pytest.raises(Conflict, match="somebody else") as caught:
        async with storage.open("x", "wb") as file:
            await file.write(b"new")
    assert caught.value.retryable
    with pytest.raises(AlreadyExists):
        async with storage.open("x", "xb"):
            pass
    backend.gate.set()
    assert await saving == "x"
    assert await content_of(storage, "x") == b"old"


async def test_the_time_of_ones_own_content_is_not_counted_as_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    storage, backend = gated()
    storage.placement = Route(by_content_type({"image/*": "default"}))  # which looks at the content
    saving: asyncio.Task[str] | None = None
    now = 0.0

    async def content(*, done: bool) -> AsyncIterator[bytes]:
        nonlocal saving, now
        saving = asyncio.create_task(storage.save("x", b"theirs"))
        while not await storage.meta.count(state="pending"):  # noqa: ASYNC110
            await asyncio.sleep(0)
        if done:
            backend.gate.set()
            await saving
        now += 1000.0
        yield b"mine"

    async def get(path: str) -> MetaRecord:
        record = await MemoryMetaBackend.get(storage.meta, path)
        if record.state == "pending":
            backend.gate.set()  # it is over soon after it was first seen
        return record

    monkeypatch.setattr(storage.meta, "get", get)
    monkeypatch.setattr(proxy_writing, "time", SimpleNamespace(monotonic=lambda: now))
    for done in (True, False):
        backend.gate.clear()
        await storage.write_to("x", content(done=done), exclusive=False)
        assert saving is not None
        assert await saving == "x"
        assert await content_of(storage, "x") == b"mine"
        await storage.delete("x")


class _ThirdFails:
    """Chunks with a fault before the third one."""

    def __init__(self, chunks: AsyncIterator[bytes], fault: Fault) -> None:
        self._chunks = chunks
        self._fault = fault
        self._count = 0

    def __aiter__(self) -> AsyncIterator[bytes]:
        return self

    async def __anext__(self) -> bytes:
        self._count += 1
        if self._count != 3:
            return await anext(self._chunks)
        return await self._fault(lambda: anext(self._chunks))


async def _third_fails(chunks: AsyncIterator[bytes], fault: Fault) -> AsyncIterator[bytes]:
    async for chunk in _ThirdFails(chunks, fault):
        yield chunk


class FailsOnce(MemoryBackend):
    """The first reading fails at its third chunk: an iterator of it could go on, a generator is at its end then."""

    def __init__(self, kind: Callable[[AsyncIterator[bytes], Fault], AsyncIterator[bytes]]) -> None:
        super().__init__()
        self._kind = kind
        self.fault: Fault = Fail(DeadlineExceeded("no answer"))
        self.healthy = False

    async def _read(self, key: str, byte_range: ByteRange | None, chunk_bytes: int) -> Reader:
        reader = await super()._read(key, byte_range, chunk_bytes)
        if not self.healthy:
            self.healthy = True
            reader = Reader(reader.info, self._kind(reader, self.fault))
        return reader


@pytest.fixture(params=[_ThirdFails, _third_fails])
def fails_once(request: pytest.FixtureRequest) -> FailsOnce:
    return FailsOnce(request.param)


SIXTEEN = b"0123456789abcdef"


@pytest.mark.parametrize("verify", [False, True])
@pytest.mark.parametrize("way", ["read", "readinto", "in parts", "chunks"])
async def test_a_read_that_fails_loses_nothing(fails_once: FailsOnce, verify: bool, way: str) -> None:
    async def whole() -> bytes:
        if way == "read":
            return await file.read()
        if way == "readinto":
            buffer = bytearray(len(SIXTEEN))
            return bytes(buffer[: await file.readinto(buffer)])
        parts = [part async for part in file] if way == "chunks" else [await file.read(5) for _ in range(4)]
        return b"".join(parts)

    storage = ProxyStorage("media", originals=fails_once, meta=MemoryMetaBackend(), chunk_bytes=4)
    await storage.save("x", SIXTEEN)
    async with storage.open("x", verify=verify) as file:
        got = b""
        with pytest.raises(DeadlineExceeded):
            got = await whole()
        at = await file.tell()
        assert at == {"read": 0, "readinto": 0, "in parts": 5, "chunks": 8}[way]
        got = await whole()
        assert got == SIXTEEN[at:]
        assert await file.tell() == len(SIXTEEN)


async def test_a_read_whose_caller_gave_up_loses_nothing(fails_once: FailsOnce) -> None:
    fails_once.fault = hang = Hang()
    storage = ProxyStorage("media", originals=fails_once, meta=MemoryMetaBackend(), chunk_bytes=4)
    await storage.save("x", SIXTEEN)
    async with storage.open("x", verify=True) as file:
        assert await file.read(2) == SIXTEEN[:2]
        reading = asyncio.ensure_future(file.read())
        await asyncio.wait_for(hang.reached.wait(), 10)
        reading.cancel()
        with pytest.raises(asyncio.CancelledError):
            await reading
        assert await file.tell() == 2
        assert await file.read() == SIXTEEN[2:]


async def test_a_verified_file_is_still_verified_after_a_failure(fails_once: FailsOnce) -> None:
    storage = ProxyStorage("media", originals=fails_once, meta=MemoryMetaBackend(), chunk_bytes=4)
    await storage.save("x", SIXTEEN)
    await fails_once.discard("x")
    await fails_once.write("x", b"0123456789abcdeF")
    async with storage.open("x", verify=True) as file:
        with pytest.raises(DeadlineExceeded):
            await file.read()
        for _ in range(2):
            with pytest.raises(IntegrityError, match="differ"):
                await file.read()


class Watched(MemoryBackend):
    """Knows which readings are open; the second one waits until it may begin."""

    def __init__(self, etags: bool) -> None:
        super().__init__()
        self.etags = etags
        self.count = 0
        self.broken = False
        self.open: list[Reader] = []
        self.waits, self.go_on = asyncio.Event(), asyncio.Event()

    async def _read(self, key: str, byte_range: ByteRange | None, chunk_bytes: int) -> Reader:
        self.count += 1
        if self.count == 2 and self.etags:
            await self.wait()
        reader = await super()._read(key, byte_range, chunk_bytes)
        info = reader.info if self.etags else replace(reader.info, etag=None)
        backend = self

        class Noted(Reader):
            async def __anext__(self) -> bytes:
                if backend.broken:
                    raise BackendUnavailable("broken off")
                return await super().__anext__()

            async def aclose(self) -> None:
                backend.open.remove(self)

        noted = Noted(info, reader._chunks, data=reader.data or b"")
        self.open.append(noted)
        return noted

    async def wait(self) -> None:
        self.waits.set()
        await self.go_on.wait()


@pytest.mark.parametrize("where", ["reopened", "the record is asked", "another copy"])
async def test_a_file_closed_while_it_opens_anew_keeps_nothing_open(where: str) -> None:
    backend = Watched(etags=where != "the record is asked")
    storage = ProxyStorage("media", originals=backend, meta=MemoryMetaBackend(), chunk_bytes=4)
    await storage.save("x", SIXTEEN)
    file = await storage.open("x")
    assert await file.read(2) == SIXTEEN[:2]
    if where == "another copy":
        place = file._place
        backend.broken = True

        async def elsewhere(failed: Any, rest: ByteRange) -> Opened:
            return Opened(place, backend, await backend.read("x", byte_range=rest, chunk_bytes=4).__aenter__())

        file._elsewhere = elsewhere
    else:
        await file.seek(9)
        if where == "the record is asked":

            async def still_at(place: Any) -> bool:
                await backend.wait()
                return True

            file._still_at = still_at
    read = asyncio.create_task(file.read(5))
    await asyncio.wait_for(backend.waits.wait(), 10)
    await file.aclose()
    backend.go_on.set()
    with pytest.raises(BackendUnavailable, match="was closed while it was read"):
        await read
    assert backend.open == []
    assert backend.count == 2
