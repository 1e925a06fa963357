"""Content that is moved, cloned or copied, and objects that others change."""

import errno
import os
import threading
from pathlib import Path
from typing import Any

import pytest

from aproxy_storage.backends import _draft, filesystem
from aproxy_storage.backends.filesystem import FileSystemBackend
from aproxy_storage.content import Source
from aproxy_storage.errors import (
    AlreadyExists,
    Conflict,
    ContentError,
    NotSupported,
)
from aproxy_storage.records import ByteRange
from aproxy_storage.testing._backend_hooks import BIG, pattern
from tests.backends.test_filesystem import content, everything_below

pytestmark = pytest.mark.asyncio


# -- moved, cloned, copied


async def test_upload_is_moved_not_copied(backend: FileSystemBackend, tmp_path: Path) -> None:
    for checksum in ("sha256", None):
        upload = tmp_path / "upload"
        upload.write_bytes(pattern(BIG))
        inode = upload.stat().st_ino
        source = Source.of(upload, checksum=checksum)
        source.temporary_path, source.path = str(upload), None
        await backend.write(f"moved-{checksum}", source, token="tokenOfMove0")
        assert not upload.exists()
        assert Path(backend.root, f"moved-{checksum}").stat().st_ino == inode
        assert (await backend.stat(f"moved-{checksum}")).token == "tokenOfMove0"


async def test_refused_upload_stays_where_it_is(backend: FileSystemBackend, tmp_path: Path) -> None:
    upload = tmp_path / "upload"
    upload.write_bytes(pattern(BIG))
    source = Source.of(upload)
    source.temporary_path, source.path = str(upload), None
    await backend.write("taken", b"x")
    with pytest.raises(AlreadyExists):
        await backend.write("taken", source)
    source.size = 5
    with pytest.raises(ContentError):
        await backend.write("dir/free", source)
    assert upload.read_bytes() == pattern(BIG)
    assert everything_below(backend.root) == ["taken"]


async def test_upload_on_another_file_system_is_copied(backend: FileSystemBackend) -> None:
    shm = Path("/dev/shm")
    if not shm.is_dir() or shm.stat().st_dev == Path(backend.root).parent.stat().st_dev:
        pytest.skip("needs /dev/shm on a file system of its own")
    upload = shm / f"aproxy-test-{os.getpid()}"
    try:
        upload.write_bytes(pattern(BIG))
        source = Source.of(upload)
        source.temporary_path, source.path = str(upload), None
        await backend.write("copied", source)
        assert await content(backend, "copied") == pattern(BIG)
    finally:
        upload.unlink(missing_ok=True)


@pytest.mark.parametrize("checksum", ["sha256", None])
@pytest.mark.parametrize("kernel", ["copies", "refuses", "copies nothing"])
async def test_large_files_are_copied_slice_by_slice(
    backend: FileSystemBackend, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kernel: str, checksum: str | None
) -> None:
    monkeypatch.setattr(filesystem, "_SLICE", 100_000)
    monkeypatch.setattr(filesystem, "_STRETCH", 0.0)

    def refuse(*_: Any) -> int:
        raise OSError(errno.EXDEV, "cross-device")

    if kernel != "copies":
        monkeypatch.setattr(_draft.os, "copy_file_range", refuse if kernel == "refuses" else lambda *_: 0)
    path = tmp_path / "content"
    path.write_bytes(pattern(BIG))
    source = Source.of(path, checksum=checksum)
    await backend.write("a", source)
    assert await content(backend, "a") == pattern(BIG)
    twin = Source.of(pattern(BIG), checksum=checksum)
    assert (source.seen_size, source.checksum) == (BIG, twin.checksum)
    await backend.copy("a", "b")
    assert await content(backend, "b") == pattern(BIG)


async def test_file_that_changes_while_it_is_copied(
    backend: FileSystemBackend, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(filesystem, "_SLICE", 100_000)
    monkeypatch.setattr(filesystem, "_STRETCH", 0.0)
    path = tmp_path / "content"
    path.write_bytes(pattern(BIG))
    copy = _draft.Draft.copy

    def truncating(self: _draft.Draft, source: Any, count: int, seconds: float) -> int:
        os.truncate(path, 50_000)
        return copy(self, source, count, seconds)

    monkeypatch.setattr(_draft.Draft, "copy", truncating)
    with pytest.raises(ContentError, match="changed"):
        await backend.write("dir/a", path)
    assert everything_below(backend.root) == []


async def test_path_that_is_no_regular_file_is_streamed(backend: FileSystemBackend, tmp_path: Path) -> None:
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    writer = threading.Thread(target=lambda: fifo.write_bytes(pattern(BIG)))
    writer.start()
    await backend.write("piped", fifo)
    writer.join()
    assert await content(backend, "piped") == pattern(BIG)
    await backend.write("kernel", Path("/proc/self/status"))
    assert await content(backend, "kernel")


async def test_object_overwritten_in_place_while_it_is_read(backend: FileSystemBackend) -> None:
    for damage in ("truncated", "overwritten"):
        await backend.write("a", pattern(BIG))
        path = Path(backend.root, "a")
        os.utime(path, ns=(0, 0))
        with pytest.raises(Conflict):
            async with backend.read("a", chunk_bytes=1 << 16) as reader:
                got = await anext(reader)
                if damage == "truncated":
                    os.truncate(path, 1 << 17)
                else:
                    with path.open("r+b") as file:
                        file.write(b"?" * BIG)
                async for chunk in reader:
                    got += chunk
        assert pattern(BIG).startswith(got[: 1 << 16])
        await backend.discard("a")


async def test_ranges_beyond_two_chunks(backend: FileSystemBackend) -> None:
    await backend.write("a", pattern(BIG))
    got = await content(backend, "a", byte_range=ByteRange(12345, BIG - 7), chunk_bytes=100_003)
    assert got == pattern(BIG)[12345 : BIG - 7]


async def test_urls(tmp_path: Path) -> None:
    made = FileSystemBackend(tmp_path, base_url="https://media.example/files")
    assert await made.url("a b/ü?.txt") == "https://media.example/files/a%20b/%C3%BC%3F.txt"
    with pytest.raises(NotSupported, match="never expires"):
        await made.url("a", expires_in=60)
