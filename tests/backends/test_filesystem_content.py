"""Content that is moved, cloned or copied, and objects that others change."""

import asyncio
import errno
import math
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
from aproxy_storage.timeouts import Timeouts
from tests.backends.test_filesystem import content, everything_below

pytestmark = pytest.mark.asyncio


# -- moved, cloned, copied


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


async def test_upload_on_another_file_system_is_copied(
    backend: FileSystemBackend, monkeypatch: pytest.MonkeyPatch
) -> None:
    shm = Path("/dev/shm")
    if not shm.is_dir() or shm.stat().st_dev == Path(backend.root).parent.stat().st_dev:
        pytest.skip("needs /dev/shm on a file system of its own")
    upload = shm / f"aproxy-test-{os.getpid()}"
    # Not by a worker of the backend: if that disk hangs, it is not the backend's fault.
    monkeypatch.setattr(_draft.Draft, "copy", lambda *_: pytest.fail("read as if it were our own"))
    try:
        upload.write_bytes(pattern(BIG))
        for temporary in (True, False):
            source = Source.of(upload)
            if temporary:
                source.temporary_path, source.path = str(upload), None
            await backend.write(f"copied-{temporary}", source)
            assert await content(backend, f"copied-{temporary}") == pattern(BIG)
    finally:
        upload.unlink(missing_ok=True)


@pytest.mark.parametrize("size", [1000, BIG])
@pytest.mark.parametrize("refusal", [errno.EXDEV, errno.EPERM, errno.EMLINK, "mount"])
async def test_upload_that_cannot_be_linked_is_copied(
    backend: FileSystemBackend, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, refusal: int | str, size: int
) -> None:
    """As on another mount of the same disk: it is the same device, and yet no link leads from one to the other."""
    upload = tmp_path / "upload"
    upload.write_bytes(pattern(size))
    link, links = os.link, []

    def refusing(*args: Any, **options: Any) -> None:
        links.append(args)
        if isinstance(refusal, int) and len(links) == 1:
            raise OSError(refusal, os.strerror(refusal))
        link(*args, **options)

    monkeypatch.setattr(_draft.os, "link", refusing)
    if refusal == "mount":  # then it is known before all of it has been hashed
        monkeypatch.setattr(_draft, "_mount_of", lambda fd: b"%d" % fd)
    source = Source.of(upload)
    source.temporary_path, source.path = str(upload), None
    await backend.write("dir/a", source)
    assert await content(backend, "dir/a") == upload.read_bytes() == pattern(size)
    assert (source.seen_size, source.checksum) == (size, Source.of(pattern(size)).checksum)
    assert len(links) == (1 if refusal == "mount" else 2)
    assert sorted(everything_below(backend.root)) == ["dir/", "dir/a"]
    assert upload.stat().st_ino != Path(backend.root, "dir/a").stat().st_ino


@pytest.mark.parametrize("step", ["open", "pread"])
@pytest.mark.parametrize("kind", ["path", "temporary"])
async def test_file_of_the_caller_that_hangs_is_not_blamed_on_the_backend(
    backend: FileSystemBackend, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, step: str
) -> None:
    backend.timeouts = Timeouts(idle=5.0)
    path = tmp_path / "on a dead disk"
    path.write_bytes(b"x" * 1000)
    source = Source.of(path, timeout=0.1)
    clock: list[float] = []
    if kind == "temporary":
        source.temporary_path, source.path = str(path), None
        monkeypatch.setattr(_draft.Draft, "take", lambda *_: None)
    back = threading.Event()
    real = getattr(_draft.CallersFile, step)

    def hung(self: Any, *args: Any) -> Any:
        clock.append(watch._alarm.when)
        assert back.wait(60)
        return real(*args) if step == "open" else real(self, *args)

    monkeypatch.setattr(_draft.CallersFile, step, classmethod(hung) if step == "open" else hung)
    try:
        with pytest.raises(ContentError, match="gave nothing"):
            async with source.watched(5.0) as watch:  # as a placement watches an attempt
                await backend.write("a", source)
    finally:
        back.set()
    assert clock == [math.inf], "it is not counted"
    assert not Path(backend.root, "a").exists()


async def test_file_of_another_device_is_read_as_any_content(
    backend: FileSystemBackend, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "content"
    path.write_bytes(pattern(BIG))

    def elsewhere(draft: _draft.Draft, source: Any, *_: Any) -> None:
        draft.begin()
        assert source.status.st_size == BIG
        os.truncate(path, length)

    monkeypatch.setattr(_draft.Draft, "copy_from", elsewhere)
    for length in (BIG, 10, 0):  # whatever it has become since its size was looked at
        source = Source.of(path)
        await backend.write(f"{length}", source)
        assert await content(backend, f"{length}") == pattern(BIG)[:length]
        assert source.checksum == Source.of(pattern(BIG)[:length]).checksum
        path.write_bytes(pattern(BIG))


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


async def test_path_that_is_no_regular_file(backend: FileSystemBackend, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")
    with pytest.raises(ContentError, match="is no regular file"):
        await asyncio.wait_for(backend.write("piped", tmp_path / "fifo"), 5)
    assert everything_below(backend.root) == []
    await backend.write("device", Path("/dev/null"))
    assert await content(backend, "device") == b""
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
