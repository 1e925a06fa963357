"""What a Django storage may do with the content, and with the files that it opens, without harm to the bytes."""

import asyncio
import contextlib
import hashlib
import io
import os
import threading
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import pytest

from aproxy_storage import BackendUnavailable, ByteRange, ContentError, NotSupported, OutOfSpace
from aproxy_storage.backends._django_content import InterruptedContent
from aproxy_storage.content import Source
from tests.backends.test_django_storage import files_below
from tests.django_support.setup import configure

configure()

from django.core.files.base import ContentFile, File  # noqa: E402
from django.core.files.storage import FileSystemStorage  # noqa: E402

from aproxy_storage.backends.django import DjangoStorageBackend  # noqa: E402

# -- storages that do not read to the end


class Reading(FileSystemStorage):
    """Reads the content in its own way, and says when it has saved."""

    def __init__(self, root: Path, read: Callable[[Any], bytes]) -> None:
        super().__init__(root)
        self._read = read
        self.saved = threading.Event()

    def _save(self, name: str, content: Any) -> str:
        data = self._read(content)
        given = str(super()._save(name, ContentFile(data)))
        self.saved.set()
        return given


async def with_a_late_end(storage: Reading, *more: bytes) -> AsyncIterator[bytes]:
    """Yield 900 kB, and `more` or the end only when the storage has saved."""
    for _ in range(3):
        yield b"x" * 300_000
    await asyncio.to_thread(storage.saved.wait, 30)
    for chunk in more:
        yield chunk


@pytest.mark.asyncio
async def test_content_longer_than_declared_is_refused_whatever_the_storage_reads(tmp_path: Path) -> None:
    storage = Reading(tmp_path, lambda content: content.read(content.size))
    async with DjangoStorageBackend(storage) as backend:
        with pytest.raises(ContentError, match="900000 as declared"):
            await backend.write("key", with_a_late_end(storage, b"one more"), size=900_000)
    assert files_below(tmp_path) == []


@pytest.mark.asyncio
async def test_a_storage_that_reads_only_the_beginning_has_failed(tmp_path: Path) -> None:
    storage = Reading(tmp_path, lambda content: content.read(100_000))
    async with DjangoStorageBackend(storage) as backend:
        with pytest.raises(BackendUnavailable, match="only the first 100000 bytes") as caught:
            await backend.write("key", with_a_late_end(storage))
    assert not caught.value.retryable
    assert not caught.value.outcome_unknown
    assert files_below(tmp_path) == []


@pytest.mark.asyncio
async def test_size_and_checksum_are_known_also_where_the_end_comes_late(tmp_path: Path) -> None:
    storage = Reading(tmp_path, lambda content: content.read(900_000))
    source = Source.of(with_a_late_end(storage))
    async with DjangoStorageBackend(storage) as backend:
        info = await backend.write("key", source)
    assert (info.size, source.checksum) == (900_000, f"sha256:{hashlib.sha256(b'x' * 900_000).hexdigest()}")
    assert (tmp_path / "key").read_bytes() == b"x" * 900_000


@pytest.mark.asyncio
async def test_whoever_still_reads_for_a_failed_save_is_let_go(tmp_path: Path) -> None:
    """A storage whose helper goes on reading when the save itself has failed."""
    helpers: list[threading.Thread] = []
    begun = threading.Event()

    def read(content: Any) -> bytes:
        def go_on() -> None:
            with contextlib.suppress(InterruptedContent):
                while content.read(100_000):
                    begun.set()

        helpers.append(threading.Thread(target=go_on, daemon=True))
        helpers[0].start()
        begun.wait(30)
        raise OSError(28, "No space left on device")

    async def endless() -> AsyncIterator[bytes]:
        yield b"x" * 300_000
        await asyncio.Event().wait()

    async with DjangoStorageBackend(Reading(tmp_path, read)) as backend:
        with pytest.raises(OutOfSpace):
            await backend.write("key", endless())
    await asyncio.to_thread(helpers[0].join, 30)
    assert not helpers[0].is_alive()


# -- storages that ask for the size


@pytest.mark.asyncio
async def test_the_size_can_be_asked_for_in_the_middle(tmp_path: Path) -> None:
    def read(content: Any) -> bytes:
        first = content.read(100_000)
        assert (content.size, content.tell()) == (900_000, 100_000)
        return bytes(first + b"".join(content.chunks()))

    data = bytes(range(250)) * 3600
    async with DjangoStorageBackend(Reading(tmp_path, read)) as backend:
        await backend.write("key", iter([data[:300_000], data[300_000:700_000], data[700_000:]]))
    assert (tmp_path / "key").read_bytes() == data


@pytest.mark.asyncio
async def test_content_whose_size_was_asked_for_first_can_be_read_twice(tmp_path: Path) -> None:
    def read(content: Any) -> bytes:
        assert len(content) == 900_000
        assert content.seekable()
        first = content.read()
        content.seek(0)
        assert b"".join(content.chunks()) == first
        return bytes(first)

    async with DjangoStorageBackend(Reading(tmp_path, read)) as backend:
        await backend.write("key", iter([b"x" * 300_000] * 3))
    assert (tmp_path / "key").read_bytes() == b"x" * 900_000


@pytest.mark.asyncio
async def test_a_storage_that_reads_a_part_of_what_was_kept_has_failed(tmp_path: Path) -> None:
    storage = Reading(tmp_path, lambda content: content.read(content.size - 1))
    async with DjangoStorageBackend(storage) as backend:
        with pytest.raises(BackendUnavailable, match="only the first 899999 bytes"):
            await backend.write("key", iter([b"x" * 300_000] * 3))
    assert files_below(tmp_path) == []


@pytest.mark.parametrize("change", [-1, +1])
@pytest.mark.asyncio
async def test_a_file_of_another_size_than_the_storage_was_told_is_refused(tmp_path: Path, change: int) -> None:
    path = tmp_path / "file"
    path.write_bytes(bytes(10 << 20))  # more than is ahead of the storage

    def read(content: Any) -> bytes:
        os.truncate(path, content.size + change)
        data = b""
        while content.tell() < content.size:  # as Dropbox's: without an end, where the end comes early
            data += content.read(1 << 20)
        return data

    async with DjangoStorageBackend(Reading(tmp_path / "root", read)) as backend:
        with pytest.raises(ContentError, match="changed while it was read"):
            await backend.write("key", path)
    assert files_below(tmp_path / "root") == []


@pytest.mark.asyncio
async def test_a_storage_that_reads_content_twice_is_told_so(tmp_path: Path) -> None:
    """The service is not to blame: no circuit breaker may count it, and nothing may still appear."""

    def read(content: Any) -> bytes:
        hashlib.sha256(content.read())
        content.seek(0)
        return bytes(content.read())

    async with DjangoStorageBackend(Reading(tmp_path, read)) as backend:
        with pytest.raises(NotSupported, match="reads the content more than once") as caught:
            await backend.write("key", iter([b"x" * 300_000] * 3))
        assert not caught.value.outcome_unknown
        await backend.write("small", b"x")
    assert files_below(tmp_path) == ["small"]


# -- files that are fetched by their first read


class FetchedByTheFirstRead(File):
    """As the files of django-storages' FTP and SFTP: a placeholder until the first read, which starts at 0."""

    fetches = 0

    def __init__(self, data: bytes, times: int) -> None:
        super().__init__(io.BytesIO(), "file")
        self.size = len(data)
        self._data = data
        self._times = times

    def read(self, size: int = -1) -> bytes:
        if self.fetches < self._times:
            self.fetches += 1
            self.file = io.BytesIO(self._data)
        return bytes(self.file.read(size))


class Fetching(FileSystemStorage):
    times = 1

    def _open(self, name: str, mode: str = "rb") -> File:
        return FetchedByTheFirstRead(Path(self.path(name)).read_bytes(), self.times)


@pytest.mark.asyncio
async def test_ranges_are_right_where_the_first_read_begins_anew(tmp_path: Path) -> None:
    async with DjangoStorageBackend(Fetching(tmp_path)) as backend:
        await backend.write("key", b"0123456789")
        for byte_range, expected in (
            (ByteRange(4, 8), b"4567"),
            (ByteRange(9), b"9"),
            (ByteRange(0, 4), b"0123"),
            (None, b"0123456789"),
        ):
            async with backend.read("key", byte_range=byte_range, chunk_bytes=3) as reader:
                assert b"".join([chunk async for chunk in reader]) == expected


@pytest.mark.asyncio
async def test_a_file_that_does_not_stay_where_it_is_put_is_not_read(tmp_path: Path) -> None:
    storage = Fetching(tmp_path)
    storage.times = 1000
    async with DjangoStorageBackend(storage) as backend:
        await backend.write("key", b"0123456789")
        with pytest.raises(BackendUnavailable, match="byte 4") as caught:
            async with backend.read("key", byte_range=ByteRange(4, 8)):
                pass
    assert not caught.value.retryable
