# ruff: noqa: SIM115  the files are closed by the exit stack of each test
"""The content of a save: every kind of it, whole, measured, replayed, watched, cancelled."""

from __future__ import annotations

import array
import asyncio
import contextlib
import errno
import hashlib
import io
import mmap
import os
import pathlib
import socket
import tempfile
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from typing import Any

import aiofiles
import pytest
from django.core.files.base import ContentFile, File
from django.core.files.uploadedfile import InMemoryUploadedFile, SimpleUploadedFile, TemporaryUploadedFile
from hypothesis import given
from hypothesis import strategies as st
from starlette.datastructures import Headers, UploadFile

from aproxy_storage import content as content_module
from aproxy_storage import feeds, kinds, looks, spool
from aproxy_storage.content import Source
from aproxy_storage.digest import hash_workers
from aproxy_storage.errors import ConfigurationError, ContentError
from aproxy_storage.threads import Workers
from tests.django_support.setup import configure

configure()

CHUNK = 4096
SIZES = [0, 1, CHUNK - 1, CHUNK, 3 * CHUNK + 17]


def payload(size: int) -> bytes:
    return bytes(range(251)) * (size // 251) + bytes(range(size % 251))


class Made:
    """One content of one kind, and how to see that its file was left open."""

    def __init__(self, content: Any, still_open: Callable[[], bool] = lambda: True, replayable: bool = True) -> None:
        self.content = content
        self.still_open = still_open
        self.replayable = replayable


class Maker:
    def __init__(self, directory: pathlib.Path, stack: contextlib.AsyncExitStack) -> None:
        self.directory = directory
        self.stack = stack

    def _path(self, data: bytes) -> pathlib.Path:
        path = self.directory / "some.bin"
        path.write_bytes(data)
        return path

    def _open(self, file: Any) -> Any:
        self.stack.callback(file.close)
        return file

    async def bytes(self, data: bytes) -> Made:
        return Made(data)

    async def bytearray(self, data: bytes) -> Made:
        return Made(bytearray(data))

    async def memoryview(self, data: bytes) -> Made:
        return Made(memoryview(data + data)[: len(data)])

    async def array(self, data: bytes) -> Made:
        return Made(array.array("B", data))

    async def path(self, data: bytes) -> Made:
        return Made(self._path(data))

    async def bytes_io(self, data: bytes) -> Made:
        file = io.BytesIO(data)
        file.seek(0, os.SEEK_END)
        return Made(file, lambda: not file.closed)

    async def bytes_io_subclass(self, data: bytes) -> Made:
        class Counting(io.BytesIO):
            pass

        file = Counting(data)
        return Made(file, lambda: not file.closed)

    async def file(self, data: bytes) -> Made:
        file = self._open(open(self._path(data), "rb"))
        file.seek(0, os.SEEK_END)
        return Made(file, lambda: not file.closed)

    async def raw_file(self, data: bytes) -> Made:
        file = self._open(open(self._path(data), "rb", buffering=0))
        return Made(file, lambda: not file.closed)

    async def temporary_file(self, data: bytes) -> Made:
        file = self._open(tempfile.SpooledTemporaryFile(max_size=100))
        file.write(data)
        return Made(file, lambda: not file.closed)

    async def pipe(self, data: bytes) -> Made:
        reading, writing = os.pipe()
        thread = threading.Thread(target=_write_and_close, args=(writing, data))
        thread.start()
        self.stack.callback(thread.join)
        file = self._open(open(reading, "rb"))
        return Made(file, lambda: not file.closed, replayable=False)

    async def django_file(self, data: bytes) -> Made:
        file = File(self._open(open(self._path(data), "rb")), name="dir/some.bin")
        return Made(file, lambda: not file.closed)

    async def django_content_file(self, data: bytes) -> Made:
        file = ContentFile(data, name="some.bin")
        return Made(file, lambda: not file.closed)

    async def django_own_chunks(self, data: bytes) -> Made:
        class Reversed(ContentFile):
            def chunks(self, chunk_size: int | None = None) -> Iterator[bytes]:
                yield self.file.getvalue()[::-1]

        return Made(Reversed(data[::-1], name="some.bin"))

    async def django_own_read(self, data: bytes) -> Made:
        class Inverting(InMemoryUploadedFile):
            def read(self, *args: int) -> bytes:
                return _inverted(self.file.read(*args))

        file = Inverting(io.BytesIO(_inverted(data)), "field", "some.bin", "x/y", len(data), None)
        return Made(file, lambda: not file.closed)

    async def django_own_seek(self, data: bytes) -> Made:
        class Late(File):
            def seek(self, *args: int) -> int:
                self.file = io.BytesIO(data)
                return self.file.seek(*args)

        return Made(Late(io.BytesIO(b"not yet"), name="some.bin"))

    async def django_own_file(self, data: bytes) -> Made:
        class Other(ContentFile):
            @property
            def file(self) -> io.BytesIO:
                return other

            @file.setter
            def file(self, file: io.BytesIO) -> None:
                vars(self)["file"] = file

        other = io.BytesIO(data)
        return Made(Other(b"not this", name="some.bin"), lambda: not other.closed)

    async def django_chunks_of_one_object(self, data: bytes) -> Made:
        file = ContentFile(b"not this", name="some.bin")
        file.chunks = lambda chunk_size=None: iter([data])
        return Made(file, lambda: not file.closed)

    async def django_simple_upload(self, data: bytes) -> Made:
        file = SimpleUploadedFile("some.bin", data, content_type="x/y")
        return Made(file, lambda: not file.closed)

    async def django_memory_upload(self, data: bytes) -> Made:
        file = InMemoryUploadedFile(io.BytesIO(data), "field", "some.bin", "x/y", len(data), None)
        return Made(file, lambda: not file.closed)

    async def django_temporary_upload(self, data: bytes) -> Made:
        file = TemporaryUploadedFile("some.bin", "x/y", len(data), None)
        self.stack.callback(file.close)
        file.write(data)  # not flushed: as an upload handler leaves it
        return Made(file, lambda: not file.closed)

    async def starlette_upload(self, data: bytes) -> Made:
        spooled = self._open(tempfile.SpooledTemporaryFile(max_size=100))
        upload = UploadFile(spooled, size=0, filename="some.bin", headers=Headers({"content-type": "x/y"}))
        await upload.write(data)
        return Made(upload, lambda: not spooled.closed)

    async def aiofiles_handle(self, data: bytes) -> Made:
        handle = await self.stack.enter_async_context(aiofiles.open(self._path(data), "rb"))
        await handle.read(3)
        return Made(handle, lambda: not handle.closed)

    async def stream_reader(self, data: bytes) -> Made:
        reader = asyncio.StreamReader()
        reader.feed_data(data)
        reader.feed_eof()
        return Made(reader, replayable=False)

    async def async_generator(self, data: bytes) -> Made:
        return Made(_pieces_async(data), replayable=False)

    async def async_iterable(self, data: bytes) -> Made:
        class Stream:
            def __aiter__(self) -> AsyncIterator[bytes]:
                return _pieces_async(data)

        return Made(Stream(), replayable=False)

    async def generator(self, data: bytes) -> Made:
        return Made(_pieces(data), replayable=False)

    async def iterator(self, data: bytes) -> Made:
        return Made(iter([data[:5], bytearray(data[5:100]), memoryview(data[100:])]), replayable=False)

    async def list(self, data: bytes) -> Made:
        return Made(list(_pieces(data)))

    async def mixed_list(self, data: bytes) -> Made:
        return Made([data[:7], b"", bytearray(data[7:])])

    async def mapped_memory(self, data: bytes) -> Made:
        if not data:
            return Made(io.BytesIO())  # there is no empty mapping
        with open(self._path(data), "rb") as file:
            mapped = self._open(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))
        return Made(mapped, lambda: not mapped.closed)


KINDS = [name for name in vars(Maker) if not name.startswith("_")]


def _write_and_close(descriptor: int, data: bytes) -> None:
    with open(descriptor, "wb") as file, contextlib.suppress(BrokenPipeError):
        file.write(data)


def _inverted(data: bytes) -> bytes:
    return data.translate(bytes(range(255, -1, -1)))


def _pieces(data: bytes, length: int = 100) -> Iterator[bytes]:
    for start in range(0, len(data), length):
        yield data[start : start + length]
        yield b""


async def _pieces_async(data: bytes, length: int = 100) -> AsyncIterator[bytes]:
    for piece in _pieces(data, length):
        await asyncio.sleep(0)
        yield piece


async def drain(source: Source) -> bytes:
    chunks = [chunk async for chunk in source.chunks()]
    assert all(type(chunk) is bytes and 0 < len(chunk) <= source._chunk_bytes for chunk in chunks)
    return b"".join(chunks)


def sha256(data: bytes) -> str:
    return f"sha256:{hashlib.sha256(data).hexdigest()}"


@pytest.fixture
def directory() -> Iterator[pathlib.Path]:
    with tempfile.TemporaryDirectory() as name:
        yield pathlib.Path(name)


@contextlib.asynccontextmanager
async def made(kind: str, data: bytes, directory: pathlib.Path) -> AsyncIterator[Made]:
    async with contextlib.AsyncExitStack() as stack:
        yield await getattr(Maker(directory, stack), kind)(data)


@pytest.mark.asyncio
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("kind", KINDS)
async def test_every_kind_is_read_whole_and_left_open(kind: str, size: int, directory: pathlib.Path) -> None:
    data = payload(size)
    async with made(kind, data, directory) as it:
        source = Source.of(it.content, chunk_bytes=CHUNK)
        assert source.replayable is it.replayable
        assert source.size in (None, size)
        assert await drain(source) == data
        assert source.seen_size == size
        assert source.checksum == sha256(data)
        if it.replayable:
            assert await drain(source) == data
        else:
            with pytest.raises(ContentError, match="only once"):
                source.chunks()
        await source.aclose()
        await source.aclose()
        assert it.still_open()


@pytest.mark.asyncio
@pytest.mark.parametrize("kind", KINDS)
async def test_peek_takes_nothing_away(kind: str, directory: pathlib.Path) -> None:
    data = payload(3 * CHUNK + 17)
    async with made(kind, data, directory) as it:
        source = Source.of(it.content, chunk_bytes=CHUNK)
        assert await source.peek(10) == data[:10]
        assert await source.peek(CHUNK + 5) == data[: CHUNK + 5]
        assert await source.peek(10) == data[:10]
        assert await source.peek(1 << 30) == data
        assert await drain(source) == data
        assert source.checksum == sha256(data)
        assert await source.peek(10) == data[:10]
        await source.aclose()
        assert it.still_open()


@pytest.mark.asyncio
@pytest.mark.parametrize("kind", KINDS)
async def test_declared_size_short_and_long(kind: str, directory: pathlib.Path) -> None:
    data = payload(3 * CHUNK)
    for declared in (len(data) - 1, len(data) + 1, 0):
        async with made(kind, data, directory) as it:
            taken = b""
            with pytest.raises(ContentError, match=f"not {declared} as declared"):
                source = Source.of(it.content, size=declared, chunk_bytes=CHUNK)
                async for chunk in source.chunks():
                    taken += chunk
            assert len(taken) <= declared  # what is too long is never handed out
            assert it.still_open()
    async with made(kind, data, directory) as it:
        source = Source.of(it.content, size=len(data), chunk_bytes=CHUNK)
        assert source.size == len(data)
        assert await drain(source) == data
        await source.aclose()


@pytest.mark.asyncio
@pytest.mark.parametrize("kind", KINDS)
async def test_left_in_the_middle_then_again_from_the_start(kind: str, directory: pathlib.Path) -> None:
    data = payload(5 * CHUNK + 1)
    async with made(kind, data, directory) as it:
        source = Source.of(it.content, chunk_bytes=CHUNK, spool=True, spool_bytes=2 * CHUNK)
        assert source.replayable
        assert source.spool is not it.replayable
        for stop in (1, 3, 2):
            chunks = source.chunks()
            for _ in range(stop):
                await anext(chunks)
        assert await drain(source) == data
        assert source.checksum == sha256(data)
        assert await drain(source) == data
        await source.aclose()
        assert it.still_open()


@pytest.mark.asyncio
@pytest.mark.parametrize("kind", KINDS)
async def test_cancelled_at_every_step(kind: str, directory: pathlib.Path) -> None:
    data = payload(3 * CHUNK + 1)
    for turns in range(12):
        async with made(kind, data, directory) as it:
            source = Source.of(it.content, chunk_bytes=CHUNK)
            task = asyncio.create_task(drain(source))
            for _ in range(turns):
                await asyncio.sleep(0)
            task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                assert await task == data
            if it.replayable:
                assert await drain(source) == data
            await source.aclose()
            assert it.still_open()
    await asyncio.sleep(0)
    assert asyncio.all_tasks() == {asyncio.current_task()}


@pytest.mark.asyncio
async def test_no_descriptor_of_ours_is_left(directory: pathlib.Path) -> None:
    path = directory / "a.bin"
    path.write_bytes(payload(100_000))
    before = set(os.listdir("/proc/self/fd"))
    for turns in range(6):
        source = Source.of(path, chunk_bytes=CHUNK)
        task = asyncio.create_task(drain(source))
        for _ in range(turns * 3):
            await asyncio.sleep(0)
        task.cancel()
        await asyncio.wait({task})
        await source.aclose()
        spooled = Source.of(_pieces(payload(50_000)), spool=True, spool_bytes=10, chunk_bytes=CHUNK)
        chunks = spooled.chunks()
        for _ in range(turns):
            await anext(chunks)
        await spooled.aclose()
    async with asyncio.timeout(5):
        while set(os.listdir("/proc/self/fd")) != before:  # noqa: ASYNC110  a worker ends its last read first
            await asyncio.sleep(0.01)


# -- what is taken, and what it says of itself


@pytest.mark.parametrize("content", [None, 7, object(), {}, {b"a"}, bytes, io.BytesIO, 1.5])
def test_anything_else_is_refused_before_any_io(content: Any) -> None:
    with pytest.raises(ContentError, match="taken are bytes, bytearray"):
        Source.of(content)


@pytest.mark.parametrize("path", ["a\0b", "\ud800"])
def test_a_path_that_no_file_can_have_is_refused_before_any_io(path: str) -> None:
    with pytest.raises(ContentError, match="cannot be the path of a file"):
        Source.of(pathlib.Path(path))

    class Upload(File):
        def temporary_file_path(self) -> str:
            return path

    assert Source.of(Upload(io.BytesIO(b"data"))).temporary_path is None


@pytest.mark.asyncio
@pytest.mark.parametrize("pieces", [[b"ok", 7], (n for n in [1, 2])])
async def test_pieces_must_be_bytes_or_text(pieces: Any) -> None:
    with pytest.raises(ContentError, match="gave int where bytes or text"):
        await drain(Source.of(pieces))


@pytest.mark.asyncio
@pytest.mark.parametrize("text", ["\ud800", ["a", "\ud800"], io.StringIO("\ud800"), ContentFile("\ud800")])
async def test_text_that_utf_8_cannot_hold(text: Any) -> None:
    with pytest.raises(ContentError, match="surrogates"):
        await drain(Source.of(text))


@pytest.mark.asyncio
async def test_text_is_utf_8(directory: pathlib.Path) -> None:
    text = "Grüße, 世界\n" * 500
    path = directory / "a.txt"
    path.write_text(text, encoding="utf-8")
    with open(path, encoding="utf-8") as file:
        for content in (
            text, io.StringIO(text), file, ContentFile(text, name="a.txt"), [text], iter([text]),
            File(io.StringIO(text)),
        ):  # fmt: skip
            source = Source.of(content, chunk_bytes=CHUNK)
            assert source.size in (None, len(text.encode()))
            assert (await drain(source)).decode() == text
            assert await drain(source) if source.replayable else True
            await source.aclose()
    async with aiofiles.open(path, encoding="utf-8") as handle:
        assert (await drain(Source.of(handle))).decode() == text


@pytest.mark.asyncio
async def test_what_each_kind_says_of_itself(directory: pathlib.Path) -> None:
    data = payload(3 * CHUNK)
    name = dict.fromkeys(KINDS)
    name |= dict.fromkeys(
        ["path", "file", "raw_file", "django_content_file", "django_own_chunks", "django_own_read",
         "django_own_seek", "django_own_file", "django_chunks_of_one_object", "django_simple_upload",
         "django_memory_upload", "django_temporary_upload", "starlette_upload", "aiofiles_handle"], "some.bin"
    )  # fmt: skip
    name["django_file"] = "dir/some.bin"
    typed = {"django_simple_upload", "django_memory_upload", "django_temporary_upload", "starlette_upload"}
    whole = {
        "bytes", "bytearray", "memoryview", "array", "bytes_io", "list", "django_content_file", "django_simple_upload",
        "django_memory_upload",
    }  # fmt: skip
    for kind in KINDS:
        async with made(kind, data, directory) as it:
            source = Source.of(it.content)
            assert source.name == name[kind], kind
            assert source.content_type == ("x/y" if kind in typed | {"django_own_read"} else None), kind
            assert source.data == (data if kind in whole else None), kind
            known = kind in typed | whole
            assert source.size == (len(data) if known else None), kind
            assert (source.path is it.content) is (kind == "path")
            assert (source.temporary_path is not None) is (kind == "django_temporary_upload")
            if source.temporary_path is not None:
                assert pathlib.Path(source.temporary_path).read_bytes() == data
            await source.aclose()


@pytest.mark.asyncio
async def test_closed_upload_is_read_from_its_temporary_file(tmp_path: pathlib.Path) -> None:
    path = tmp_path / "upload"
    path.write_bytes(payload(10_000))

    class Upload(File):
        def temporary_file_path(self) -> str:
            return str(path)

    content = Upload(path.open("rb"))
    content.close()
    source = Source.of(content)
    assert source.replayable
    for _ in range(2):
        assert b"".join([chunk async for chunk in source.chunks()]) == payload(10_000)


@pytest.mark.asyncio
async def test_bytes_are_not_copied() -> None:
    data = payload(10_000)
    for content in (data, io.BytesIO(data), ContentFile(data), SimpleUploadedFile("a", data)):
        assert Source.of(content).data is data
    assert await anext(Source.of(data).chunks()) is data


@pytest.mark.asyncio
async def test_large_buffer_is_read_in_slices() -> None:
    data = bytearray(payload(5 << 20))
    source = Source.of(data)
    assert source.data is None
    assert source.size == len(data)
    assert await drain(source) == data
    assert await drain(source) == data
    odd = memoryview(bytes(range(256)) * 100)[::2]
    assert await drain(Source.of(odd)) == bytes(odd)


@pytest.mark.asyncio
async def test_a_source_is_taken_as_it_is() -> None:
    source = Source.of(_pieces(b"abc"))
    assert Source.of(source) is source
    assert Source.of(source, size=3) is source
    assert source.size == 3
    with pytest.raises(ContentError, match="has 3 bytes, not 4"):
        Source.of(source, size=4)
    assert await drain(source) == b"abc"


def test_checksum_must_be_known() -> None:
    for name in ("sha-nonsense", "shake_128", ""):
        with pytest.raises(ConfigurationError, match="checksum="):
            Source.of(b"", checksum=name)
    assert Source.of(b"x", checksum="md5").checksum == f"md5:{hashlib.md5(b'x').hexdigest()}"
    assert Source.of(b"x", checksum="blake2b").checksum == f"blake2b:{hashlib.blake2b(b'x').hexdigest()}"


@pytest.mark.asyncio
async def test_without_checksum(directory: pathlib.Path) -> None:
    for kind in KINDS:
        async with made(kind, payload(9000), directory) as it:
            source = Source.of(it.content, checksum=None)
            assert await drain(source) == payload(9000)
            assert (source.seen_size, source.checksum) == (9000, None)
            await source.aclose()


# -- measuring without a pass


@pytest.mark.asyncio
@pytest.mark.parametrize("size", [0, 10, 65_536, 65_537, 1_000_000])
async def test_data_in_one_go(size: int) -> None:
    data = payload(size)
    assert (Source.of(data).seen_size, Source.of(data).checksum) == (size, sha256(data))
    source = Source.of(data)
    await source.measure()
    assert (source.seen_size, source.checksum) == (size, sha256(data))


@pytest.mark.asyncio
async def test_measured_by_the_backend(directory: pathlib.Path) -> None:
    path = directory / "a"
    path.write_bytes(b"12345")
    source = Source.of(path)
    assert (source.seen_size, source.checksum) == (None, None)
    source.measured(5, "sha256:x")
    assert (source.seen_size, source.checksum) == (5, "sha256:x")
    with pytest.raises(ContentError, match="has 5 bytes, not 6"):
        Source.of(path, size=6).measured(5, None)


@pytest.mark.asyncio
async def test_file_that_changed_since_is_measured_anew(directory: pathlib.Path) -> None:
    path = directory / "a"
    path.write_bytes(b"12345")
    source = Source.of(path)
    assert await drain(source) == b"12345"
    path.write_bytes(b"123")
    assert await drain(source) == b"123"
    assert (source.seen_size, source.checksum) == (3, sha256(b"123"))


# -- the loop is never held up


@pytest.mark.asyncio
async def test_large_chunks_are_hashed_and_files_read_in_other_threads(
    monkeypatch: pytest.MonkeyPatch, directory: pathlib.Path
) -> None:
    hashed: dict[int, set[int]] = {}

    class Spy:
        digest_size = 32

        def __init__(self, data: bytes = b"") -> None:
            self._hash = hashlib.sha256(data)

        def update(self, data: bytes) -> None:
            hashed.setdefault(threading.get_ident(), set()).add(len(data))
            self._hash.update(data)

        def hexdigest(self) -> str:
            return self._hash.hexdigest()

    monkeypatch.setitem(__import__("aproxy_storage.digest", fromlist=["x"])._constructors, "sha256", Spy)
    here = threading.get_ident()
    data = payload((1 << 20) + 10)
    path = directory / "a"
    path.write_bytes(data)
    readers = []

    class File(io.BytesIO):
        def read(self, count: int | None = -1) -> bytes:
            readers.append(threading.get_ident())
            return super().read(count)

    for content in (data, path, File(data)):
        hashed.clear()
        source = Source.of(content, chunk_bytes=1 << 18)
        assert await drain(source) == data
        assert source.checksum == sha256(data)
        assert hashed.get(here, set()) <= {10}
        assert 1 << 18 in set().union(*(sizes for thread, sizes in hashed.items() if thread != here))
    assert readers
    assert here not in readers


@pytest.mark.asyncio
async def test_small_pieces_are_put_together_and_large_ones_cut() -> None:
    for make in (_pieces, _pieces_async):
        lengths = [len(chunk) async for chunk in Source.of(make(payload(1_000_000)), chunk_bytes=1 << 17).chunks()]
        assert len(lengths) < 20
        assert sum(lengths) == 1_000_000
        lengths = [len(c) async for c in Source.of(make(payload(1_000_000), 999_999), chunk_bytes=1 << 17).chunks()]
        assert max(lengths) == 1 << 17


@pytest.mark.asyncio
async def test_slow_content_is_not_held_back(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(feeds, "HOLD", 0.0)
    more = threading.Event()

    def slow() -> Iterator[bytes]:
        yield b"first"
        more.wait(10)
        yield b"second"

    chunks = Source.of(slow()).chunks()
    assert await asyncio.wait_for(anext(chunks), 5) == b"first"
    more.set()
    assert await anext(chunks) == b"second"

    async def slow_async() -> AsyncIterator[bytes]:
        yield b"first"
        await asyncio.sleep(10)

    chunks = Source.of(slow_async()).chunks()
    assert await asyncio.wait_for(anext(chunks), 5) == b"first"
    await chunks.aclose()


@pytest.mark.asyncio
async def test_no_more_than_three_chunks_are_read_beforehand() -> None:
    given_out = 0

    def counted() -> Iterator[bytes]:
        nonlocal given_out
        for _ in range(50):
            given_out += 1
            yield bytes(100_000)

    taken = 0
    async for _ in Source.of(counted(), chunk_bytes=100_000).chunks():
        taken += 1
        await asyncio.sleep(0.002)
        assert given_out <= taken + 1
    assert taken == 50


@pytest.mark.asyncio
async def test_context_of_the_caller_reaches_his_generator() -> None:
    import contextvars

    variable: contextvars.ContextVar[bytes] = contextvars.ContextVar("variable", default=b"lost")
    variable.set(b"kept")

    def pieces() -> Iterator[bytes]:
        yield variable.get()

    assert await drain(Source.of(pieces())) == b"kept"


# -- content that fails


def _failing(error: BaseException) -> Iterator[bytes]:
    yield payload(2 * CHUNK)
    raise error


async def _failing_async(error: BaseException) -> AsyncIterator[bytes]:
    yield payload(2 * CHUNK)
    raise error


@pytest.mark.asyncio
@pytest.mark.parametrize("make", [_failing, _failing_async])
@pytest.mark.parametrize("spooled", [False, True])
async def test_error_of_the_content_is_the_cause(make: Any, spooled: bool) -> None:
    boom = ValueError("https://secret")
    source = Source.of(make(boom), chunk_bytes=CHUNK, spool=spooled)
    with pytest.raises(ContentError, match="ValueError") as caught:
        await drain(source)
    assert caught.value.__cause__ is boom
    assert "secret" not in str(caught.value)
    if spooled:  # an iterator that has failed looks like one at its end; the copy must not end there
        with pytest.raises(ContentError, match="ValueError"):
            await drain(source)
    assert source.checksum is None
    await source.aclose()


@pytest.mark.asyncio
async def test_missing_file_is_a_content_error(directory: pathlib.Path) -> None:
    with pytest.raises(ContentError, match="No such file") as caught:
        await drain(Source.of(directory / "missing"))
    assert isinstance(caught.value.__cause__, FileNotFoundError)
    with pytest.raises(ContentError):
        await Source.of(directory / "missing").peek()


@pytest.mark.asyncio
async def test_pipe_or_socket_with_a_name_is_refused(directory: pathlib.Path) -> None:
    os.mkfifo(directory / "fifo")
    with socket.socket(socket.AF_UNIX) as bound:
        bound.bind(str(directory / "socket"))
        for name in ("fifo", "socket"):  # each pass would read what the one before, such as a peek, has left
            for read in (Source.peek, drain):
                with pytest.raises(ContentError, match=f"{name}' is no regular file; open it and"):
                    await read(Source.of(directory / name, timeout=5))


@pytest.mark.asyncio
async def test_a_path_that_hangs_is_not_waited_for_at_the_end(
    directory: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (directory / "a").write_bytes(b"data")
    back, over = threading.Event(), threading.Event()

    def hung(*args: Any, **options: Any) -> Any:
        back.wait(60)
        over.set()
        return open(*args, **options)

    monkeypatch.setattr(kinds, "open", hung, raising=False)
    source = Source.of(directory / "a", timeout=0.05)
    try:
        with pytest.raises(ContentError, match="gave nothing"):
            await drain(source)
        async with asyncio.timeout(5):
            await source.aclose(within=60)
        assert not over.is_set()
    finally:
        back.set()
    assert over.wait(10)


@pytest.mark.asyncio
@pytest.mark.parametrize("error", [asyncio.CancelledError(), SystemExit(3)])
async def test_cancellation_and_exit_pass_through(error: BaseException) -> None:
    async def pieces() -> AsyncIterator[bytes]:
        yield b""
        raise error

    with pytest.raises(type(error)):
        await anext(Source.of(pieces()).chunks())


@pytest.mark.asyncio
async def test_interrupted_content_is_not_taken_for_its_end() -> None:
    """A cancelled async generator is over: a second attempt must not store what came until then."""

    async def pieces() -> AsyncIterator[bytes]:
        yield payload(CHUNK)
        await asyncio.sleep(60)
        yield payload(CHUNK)

    source = Source.of(pieces(), chunk_bytes=CHUNK, spool=True)
    task = asyncio.create_task(drain(source))
    await asyncio.sleep(0.02)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    with pytest.raises(ContentError, match="interrupted"):
        await drain(source)
    await source.aclose()


@pytest.mark.asyncio
async def test_cancelled_while_a_spooled_iterator_is_read_loses_nothing() -> None:
    more = threading.Event()

    def pieces() -> Iterator[bytes]:
        yield payload(CHUNK)
        more.wait(10)
        yield payload(CHUNK)[::-1]

    source = Source.of(pieces(), chunk_bytes=CHUNK, spool=True)
    task = asyncio.create_task(drain(source))
    await asyncio.sleep(0.02)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    more.set()
    assert await drain(source) == payload(CHUNK) + payload(CHUNK)[::-1]
    await source.aclose()


@pytest.mark.asyncio
async def test_generators_are_closed_when_a_pass_is_given_up() -> None:
    closed = []

    def pieces() -> Iterator[bytes]:
        try:
            while True:
                yield payload(CHUNK)
        finally:
            closed.append(threading.get_ident())

    async def pieces_async() -> AsyncIterator[bytes]:
        try:
            while True:
                yield payload(CHUNK)
        finally:
            closed.append(0)

    source = Source.of(pieces(), chunk_bytes=CHUNK)
    await anext(source.chunks())
    await source.aclose()
    async with asyncio.timeout(5):
        while not closed:  # noqa: ASYNC110
            await asyncio.sleep(0.01)
    assert closed.pop() != threading.get_ident()
    for peeked in (False, True):
        source = Source.of(pieces_async(), chunk_bytes=CHUNK)
        await (source.peek() if peeked else anext(source.chunks()))
        await source.aclose()
        assert closed.pop() == 0


@pytest.mark.asyncio
async def test_replay_waits_for_the_read_that_is_still_in_the_file() -> None:
    data = payload(4 * CHUNK)
    entered, go_on = threading.Event(), threading.Event()

    class Slow(io.BytesIO):
        inside = 0

        def read(self, count: int | None = -1) -> bytes:
            self.inside += 1
            assert self.inside == 1, "two reads at a time"
            if self.tell() == 2 * CHUNK and not go_on.is_set():
                entered.set()
                go_on.wait(10)
            piece = super().read(count)
            self.inside -= 1
            return piece

    source = Source.of(Slow(data), chunk_bytes=CHUNK)
    task = asyncio.create_task(drain(source))
    while not entered.is_set():  # noqa: ASYNC110
        await asyncio.sleep(0.001)
    task.cancel()
    await asyncio.wait({task})
    again = asyncio.create_task(drain(source))
    await asyncio.sleep(0.02)
    go_on.set()
    assert await again == data
    await source.aclose()


class Gated(io.BytesIO):
    """A file whose reads of `piece` bytes each wait for the gate, once they have taken `free` of them."""

    def __init__(self, data: bytes, *, free: int) -> None:
        super().__init__(data)
        self.free, self.gate, self.entered = free, threading.Event(), threading.Event()
        self.count, self.inside = 0, 0

    def read(self, count: int | None = -1) -> bytes:
        self.inside += 1
        assert self.inside == 1, "two reads at a time"
        self.count += 1
        if self.count > self.free and not self.gate.is_set():
            self.entered.set()
            self.gate.wait(10)
        piece = super().read(10)
        self.inside -= 1
        return piece


def _as_file(file: io.BytesIO) -> Any:
    return file


def _as_django_file(file: io.BytesIO) -> Any:
    return File(file, "x")


@pytest.mark.asyncio
@pytest.mark.parametrize("wrap", [_as_file, _as_django_file])
async def test_a_pass_that_is_closed_takes_no_further_piece(wrap: Callable[[Any], Any]) -> None:
    file = Gated(payload(CHUNK), free=2)
    source = Source.of(wrap(file), chunk_bytes=CHUNK)
    task = asyncio.create_task(anext(source.chunks()))
    await asyncio.to_thread(file.entered.wait, 10)
    task.cancel()
    await asyncio.wait({task})
    closing = asyncio.create_task(source.aclose())
    await asyncio.sleep(0)
    assert not closing.done()  # the file is not the caller's yet
    file.gate.set()
    await closing
    assert file.count == 3
    assert await drain(Source.of(wrap(file), chunk_bytes=CHUNK)) == payload(CHUNK)


@pytest.mark.asyncio
@pytest.mark.parametrize("wrap", [_as_file, _as_django_file])
async def test_the_next_source_of_a_file_waits_for_the_read_of_the_last(wrap: Callable[[Any], Any]) -> None:
    file = Gated(payload(CHUNK), free=2)
    source = Source.of(wrap(file), chunk_bytes=CHUNK)
    task = asyncio.create_task(anext(source.chunks()))
    await asyncio.to_thread(file.entered.wait, 10)
    task.cancel()
    await asyncio.wait({task})
    await source.aclose(within=0)
    impatient = Source.of(wrap(file), chunk_bytes=CHUNK, timeout=0.01)
    with pytest.raises(ContentError, match=r"gave nothing|still being read"):
        await drain(impatient)
    await impatient.aclose()
    again = asyncio.create_task(drain(Source.of(wrap(file), chunk_bytes=CHUNK)))
    await asyncio.sleep(0.01)  # for a worker that would not wait
    assert (file.count, again.done()) == (3, False)
    file.gate.set()
    assert await again == payload(CHUNK)
    assert not feeds._left._files


# -- the spool


@pytest.mark.asyncio
@pytest.mark.parametrize("spool_bytes", [0, CHUNK, 1 << 20])
async def test_spool_in_memory_and_on_disk(spool_bytes: int) -> None:
    data = payload(20 * CHUNK + 5)
    source = Source.of(_pieces_async(data), chunk_bytes=CHUNK, spool=True, spool_bytes=spool_bytes)
    for _ in range(3):
        assert await drain(source) == data
    assert (source._spool is not None and source._spool._file is not None) is (spool_bytes < len(data))
    await source.aclose()
    with pytest.raises(ContentError, match="only once"):
        source.chunks()


@pytest.mark.asyncio
async def test_spool_may_be_asked_for_until_the_content_is_read() -> None:
    source = Source.of(_pieces(b"abc"))
    await source.peek()
    source.spool = True
    assert source.replayable
    assert await drain(source) == await drain(source) == b"abc"
    source = Source.of(_pieces(b"abc"))
    assert await drain(source) == b"abc"
    source.spool = True
    assert not source.replayable
    source = Source.of(b"abc")
    source.spool = True
    assert not source.spool


@pytest.mark.asyncio
@pytest.mark.parametrize(("number", "says"), [(errno.ENOSPC, "no space left .* TMPDIR"), (errno.EIO, "could not keep")])
async def test_broken_spool_says_so_and_stays_broken(monkeypatch: pytest.MonkeyPatch, number: int, says: str) -> None:
    class Full:
        def seek(self, position: int) -> None: ...
        def close(self) -> None: ...
        def write(self, data: bytes) -> None:
            raise OSError(number, os.strerror(number))

    monkeypatch.setattr(spool.tempfile, "TemporaryFile", lambda **_: Full())
    source = Source.of(_pieces(payload(10 * CHUNK)), chunk_bytes=CHUNK, spool=True, spool_bytes=10)
    for _ in range(2):
        with pytest.raises(ContentError, match=says) as caught:
            await drain(source)
        assert isinstance(caught.value.__cause__, OSError)
    await source.aclose()


# -- time


@pytest.mark.asyncio
@pytest.mark.parametrize("kind", ["sync", "async", "file"])
async def test_silent_content_fails(kind: str) -> None:
    free = threading.Event()

    def pieces() -> Iterator[bytes]:
        yield payload(CHUNK)
        free.wait(10)

    async def pieces_async() -> AsyncIterator[bytes]:
        yield payload(CHUNK)
        await asyncio.sleep(10)

    reading, writing = os.pipe()
    with open(reading, "rb") as file, open(writing, "wb", buffering=0) as other:
        other.write(payload(CHUNK))
        content: Any = {"sync": pieces, "async": pieces_async, "file": lambda: file}[kind]()
        source = Source.of(content, chunk_bytes=CHUNK, timeout=0.05)
        chunks = source.chunks()
        assert await anext(chunks) == payload(CHUNK)
        with pytest.raises(ContentError, match=r"gave nothing for 0\.05 seconds"):
            await anext(chunks)
        await source.aclose()
        free.set()
        other.close()
        await hash_workers.call(bool, timeout=5)


@pytest.mark.asyncio
async def test_paths_that_hang_are_in_nobody_elses_way(
    directory: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(looks, "HUNG", 0.0)  # as if the clock had gone on
    for pool in ("lookers", "readers"):
        workers = Workers(f"t-{pool}", 1, share=1, hung=feeds.looks.hung)
        monkeypatch.setattr(feeds, pool, workers)
        if pool == "lookers":
            monkeypatch.setattr(content_module, pool, workers)
    for name in ("dead", "well"):
        (directory / name).mkdir()
        (directory / name / "file").write_bytes(b"data")
    dead, well = (directory / name / "file" for name in ("dead", "well"))
    free = threading.Event()
    begun: list[int] = []

    def hang(*_: Any) -> None:
        begun.append(threading.get_ident())
        free.wait(60)

    try:
        hung = []
        for count in range(1, looks.MOST_GIVEN_UP + 1):
            hung.append(asyncio.create_task(Source.of(dead, timeout=60).ask(hang)))
            async with asyncio.timeout(10):
                while len(begun) < count:  # noqa: ASYNC110  in other threads
                    await asyncio.sleep(0.001)
        async with asyncio.timeout(10):
            assert await Source.of(dead).likely_size() == 4, "they may only be slow"
            monkeypatch.setattr(looks, "GIVEN_UP", 0.0)
            for look in (Source.likely_size, Source.peek, drain, lambda source: source.ask(os.stat, dead)):
                with pytest.raises(ContentError, match="dead/file' was not read: 4 looks at files of its directory"):
                    await look(Source.of(dead))
            assert await Source.of(well).likely_size() == await Source.of(well).ask(int, 4) == 4
            assert await drain(Source.of(well)) == b"data"
    finally:
        free.set()
        await asyncio.gather(*hung)
    assert await drain(Source.of(dead)) == b"data"


@pytest.mark.asyncio
async def test_waiting_for_a_thread_is_told_from_silence(
    directory: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(content_module, "lookers", Workers("t-busy", 1, share=1))
    free = threading.Event()
    busy = content_module.lookers.call(free.wait, 60, timeout=None)
    try:
        with pytest.raises(ContentError, match=r"no thread was free to look at the content for 0\.05 seconds"):
            await Source.of(directory / "a", timeout=0.05).ask(os.stat, directory)
    finally:
        free.set()
        await busy


@pytest.mark.asyncio
async def test_time_of_the_consumer_is_not_the_contents(directory: pathlib.Path) -> None:
    for kind in ("generator", "async_generator", "path", "aiofiles_handle"):
        async with made(kind, payload(3 * CHUNK), directory) as it:
            source = Source.of(it.content, chunk_bytes=CHUNK, timeout=0.3)
            async for _ in source.chunks():
                await asyncio.sleep(0.4)
            assert source.seen_size == 3 * CHUNK
            await source.aclose()


@pytest.mark.asyncio
async def test_content_that_dribbles_is_not_silent() -> None:
    async def pieces() -> AsyncIterator[bytes]:
        for _ in range(50):
            await asyncio.sleep(0.01)
            yield b"x"

    assert len(await drain(Source.of(pieces(), timeout=0.3))) == 50


@pytest.mark.asyncio
async def test_watch_counts_the_consumer_alone() -> None:
    async def slow() -> AsyncIterator[bytes]:
        for _ in range(3):
            await asyncio.sleep(0.4)
            yield payload(CHUNK)

    source = Source.of(slow(), chunk_bytes=CHUNK)
    async with source.watched(0.3) as watch:
        assert await drain(source) == payload(CHUNK) * 3
    assert not watch.expired()
    async with source.watched(None) as watch:
        await asyncio.sleep(0.01)
    assert not watch.expired()


@pytest.mark.asyncio
@pytest.mark.parametrize("where", ["before", "between", "after"])
async def test_watch_ends_a_consumer_without_progress(where: str) -> None:
    source = Source.of([payload(CHUNK)] * 3, chunk_bytes=CHUNK)
    source.data = None
    source.begin = lambda limit, ahead: feeds.InlineFeed([payload(CHUNK)] * 3, limit)
    watch = None
    with pytest.raises(TimeoutError, match=r"no progress for 0\.05 seconds"):
        async with source.watched(0.05) as watch:
            chunks = source.chunks()
            if where == "before":
                await asyncio.sleep(5)
            await anext(chunks)
            if where == "between":
                await asyncio.sleep(5)
            async for _ in chunks:
                pass
            await asyncio.sleep(5)
    assert watch is not None
    assert watch.expired()
    async with source.watched(5) as watch:  # the next attempt starts afresh
        assert len(await drain(source)) == 3 * CHUNK


@pytest.mark.asyncio
async def test_watch_leaves_other_timeouts_alone() -> None:
    source = Source.of(b"x")
    with pytest.raises(TimeoutError, match="mine"):
        async with source.watched(5) as watch:
            raise TimeoutError("mine")
    assert not watch.expired()
    task = asyncio.create_task(_watch_and_sleep(source))
    await asyncio.sleep(0.01)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task


async def _watch_and_sleep(source: Source) -> None:
    async with source.watched(5):
        await asyncio.sleep(5)


@pytest.mark.asyncio
async def test_consumer_that_reads_on_after_it_has_expired_gets_no_odd_error() -> None:
    source = Source.of(b"x" * 10)
    with pytest.raises(TimeoutError, match="no progress"):
        async with source.watched(0.02):
            try:
                await asyncio.sleep(5)
            finally:
                assert await drain(source) == b"x" * 10


# -- any cut of any data


@given(
    st.lists(st.binary(max_size=40), max_size=30), st.integers(1, 50), st.sampled_from([0, 3, 30]), st.booleans()
)  # fmt: skip
def test_any_pieces_any_chunk_size(pieces: list[bytes], chunk_bytes: int, stop: int, asynchronous: bool) -> None:
    whole = b"".join(pieces)

    async def stream() -> AsyncIterator[bytes]:
        for piece in pieces:
            yield piece

    async def check() -> None:
        content: Any = stream() if asynchronous else iter(pieces)
        source = Source.of(content, chunk_bytes=chunk_bytes, spool=True, spool_bytes=20)
        assert await source.peek(7) == whole[:7]
        chunks = source.chunks()
        for _ in range(stop):
            await anext(chunks, None)
        assert await drain(source) == whole
        assert await drain(source) == whole
        assert source.checksum == sha256(whole)
        await source.aclose()

    asyncio.run(check())
