"""What a file system does to those who trust it: full, read-only, unmounted, replaced, linked elsewhere, hung."""

import asyncio
import contextlib
import errno
import gc
import multiprocessing
import os
import stat
import subprocess
import threading
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import pytest

from aproxy_storage.backends import _draft, _posix, filesystem
from aproxy_storage.backends.filesystem import FileSystemBackend
from aproxy_storage.content import Source
from aproxy_storage.errors import (
    AccessDenied,
    AlreadyExists,
    BackendUnavailable,
    Conflict,
    ContentError,
    DeadlineExceeded,
    InvalidPath,
    NotFound,
    NotSupported,
    OutOfSpace,
    outcome_unknown,
)
from aproxy_storage.records import ByteRange
from aproxy_storage.testing._backend_hooks import BIG, pattern, pieces
from aproxy_storage.timeouts import Timeouts
from tests.backends.test_filesystem import everything_below

pytestmark = pytest.mark.asyncio


@pytest.fixture(params=["unnamed", "hidden"])
def backend(request: pytest.FixtureRequest, tmp_path: Path) -> FileSystemBackend:
    made = FileSystemBackend(tmp_path / "root")
    if request.param == "hidden":
        made._tree.anonymous = False
    return made


async def content(backend: FileSystemBackend, key: str, **options: Any) -> bytes:
    async with backend.read(key, **options) as reader:
        return b"".join([chunk async for chunk in reader])


# -- the root


async def test_root_is_made_but_not_its_parents(tmp_path: Path) -> None:
    made = FileSystemBackend(tmp_path / "new")
    assert not Path(made.root).exists(), "constructors only store"
    await made.write("a", b"x")
    assert os.listdir(made.root) == ["a"]
    with pytest.raises(BackendUnavailable, match="its parent"):
        await FileSystemBackend(tmp_path / "no" / "such").write("a", b"x")
    with pytest.raises(BackendUnavailable):
        await FileSystemBackend(tmp_path / "other", create_root=False).stat("a")
    assert os.listdir(tmp_path) == ["new"]


async def test_vanished_root_is_an_outage_and_is_not_made_anew(backend: FileSystemBackend, tmp_path: Path) -> None:
    await backend.write("a", b"x")
    os.rename(backend.root, tmp_path / "elsewhere")
    calls = {
        "write": lambda: backend.write("b", b"x"),
        "stream": lambda: backend.write("b", pieces(pattern(BIG))),
        "read": lambda: content(backend, "a"),
        "stat": lambda: backend.stat("a"),
        "discard": lambda: backend.discard("a"),
        "copy": lambda: backend.copy("a", "b"),
        "list": lambda: anext(aiter(backend.list())),
    }
    for again in (False, True):
        for name, call in calls.items():
            with pytest.raises(BackendUnavailable, match="root"):
                await call()
            assert not Path(backend.root).exists(), f"{name} has made the root again"
        if not again:
            await backend.aclose()  # not even then
    os.rename(tmp_path / "elsewhere", backend.root)
    assert await content(backend, "a") == b"x"


async def test_replaced_root_is_an_outage(backend: FileSystemBackend, tmp_path: Path) -> None:
    await backend.write("a", b"x")
    os.rename(backend.root, tmp_path / "elsewhere")
    os.mkdir(backend.root)  # as the mount point that an unmounted disk leaves
    with pytest.raises(BackendUnavailable, match="different directory"):
        await backend.stat("a")
    with pytest.raises(BackendUnavailable, match="different directory"):
        await backend.write("b", b"x")
    assert os.listdir(backend.root) == []
    os.rmdir(backend.root)
    Path(backend.root).write_bytes(b"a file")
    with pytest.raises(BackendUnavailable, match="not a directory"):
        await backend.discard("a")
    os.unlink(backend.root)
    os.mkdir(backend.root)
    await backend.aclose()  # the operator says that it is meant
    await backend.write("b", b"x")


async def test_root_replaced_during_a_write(backend: FileSystemBackend, tmp_path: Path) -> None:
    async def replacing() -> AsyncIterator[bytes]:
        yield pattern(BIG)
        yield pattern(BIG)
        os.rename(backend.root, tmp_path / "elsewhere")
        os.mkdir(backend.root)
        yield b"end"

    with pytest.raises(BackendUnavailable, match="different directory"):
        await backend.write("dir/a", replacing())
    assert os.listdir(backend.root) == []


async def test_root_may_be_a_link_itself(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to("real")
    linked = FileSystemBackend(tmp_path / "link")
    await linked.write("a/b", b"x")
    assert (tmp_path / "real" / "a" / "b").read_bytes() == b"x"
    assert linked.full_path("a/b") == f"{tmp_path}/link/a/b"


# -- links and special files


async def test_no_link_below_the_root_is_followed(backend: FileSystemBackend, tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "secret").write_bytes(b"secret")
    await backend.write("inside/file", b"x")
    root = Path(backend.root)
    (root / "out").symlink_to(outside)
    (root / "up").symlink_to("..")
    (root / "in").symlink_to("inside")
    (root / "file").symlink_to(outside / "secret")
    (root / "dangling").symlink_to(outside / "new")
    for key in ("out/secret", "up/outside/secret", "in/file", "file", "dangling"):
        with pytest.raises(AccessDenied, match="symbolic link"):
            await content(backend, key)
        with pytest.raises(AccessDenied, match="symbolic link"):
            await backend.stat(key)
        with pytest.raises((AlreadyExists, AccessDenied)):
            await backend.write(key, b"overwritten")
        await backend.discard(key)
        await backend.discard(key, token="sometoken000")
    for key in ("out/new", "up/new", "out/dir/new"):
        with pytest.raises(AccessDenied, match="symbolic link"):
            await backend.write(key, b"x")
        with pytest.raises(AccessDenied, match="symbolic link"):
            await backend.write(key, pieces(pattern(BIG)))
    assert [info.key async for info in backend.list()] == ["inside/file"]
    assert [info.key async for info in backend.list("out/")] == []
    assert (outside / "secret").read_bytes() == b"secret"
    assert os.listdir(outside) == ["secret"]
    assert sorted(os.listdir(root)) == ["dangling", "file", "in", "inside", "out", "up"]


async def test_directory_swapped_for_a_link_while_writing(backend: FileSystemBackend, tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    root = Path(backend.root)
    await backend.write("dir/other", b"x")

    async def swapping() -> AsyncIterator[bytes]:
        yield pattern(BIG)
        yield pattern(BIG)
        (root / "dir").rename(root / "was")
        (root / "dir").symlink_to(outside)
        yield b"end"

    with pytest.raises(AccessDenied):
        await backend.write("dir/new", swapping())
    assert os.listdir(outside) == []


async def test_special_files_are_neither_opened_nor_removed(backend: FileSystemBackend) -> None:
    await backend.write("dir/file", b"x")
    fifo = Path(backend.root, "fifo")
    os.mkfifo(fifo)
    for key in ("fifo", "dir"):
        with pytest.raises(NotFound):
            await content(backend, key)
        with pytest.raises(NotFound):
            await backend.stat(key)
        with pytest.raises(AlreadyExists):
            await backend.write(key, b"x")
        await backend.discard(key)
        await backend.discard(key, token="sometoken000")
    assert fifo.is_fifo()
    assert [info.key async for info in backend.list()] == ["dir/file"]


async def test_file_where_a_directory_is_needed(backend: FileSystemBackend) -> None:
    await backend.write("a", b"x")
    for body in (b"y", pieces(pattern(BIG))):
        with pytest.raises(InvalidPath, match="needs a directory"):
            await backend.write("a/b", body)
    with pytest.raises(NotFound):
        await backend.stat("a/b")
    await backend.discard("a/b")
    assert everything_below(backend.root) == ["a"]


async def test_temporaries_are_no_keys(backend: FileSystemBackend) -> None:
    await backend.write("dir/a", b"x")
    hidden = Path(backend.root, "dir", ".aproxy-abc-00000000.part")
    hidden.write_bytes(b"half")
    key = f"dir/{hidden.name}"
    with pytest.raises(InvalidPath, match="temporaries"):
        await backend.write(key, b"x")
    with pytest.raises(NotFound):
        await backend.stat(key)
    await backend.discard(key)
    assert hidden.exists()
    assert [info.key async for info in backend.list()] == ["dir/a"]


async def test_names_that_are_not_utf8_are_not_listed(backend: FileSystemBackend) -> None:
    await backend.write("a", b"x")
    Path(backend.root, os.fsdecode(b"caf\xe9")).write_bytes(b"latin-1")
    assert [info.key async for info in backend.list()] == ["a"]


# -- modes


@pytest.fixture(params=[0o022, 0o077, 0o000])
def umask(request: pytest.FixtureRequest) -> Iterator[int]:
    before = os.umask(request.param)
    try:
        yield request.param
    finally:
        os.umask(before)


def mode_of(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


@pytest.mark.parametrize("anonymous", [None, False])
@pytest.mark.parametrize("file_mode", [None, 0o644, 0o600, 0o440, 0o666])
@pytest.mark.parametrize("directory_mode", [None, 0o755, 0o700, 0o777])
async def test_modes(
    tmp_path: Path, umask: int, file_mode: int | None, directory_mode: int | None, anonymous: bool | None
) -> None:
    root = tmp_path / "root"
    made = FileSystemBackend(root, file_mode=file_mode, directory_mode=directory_mode)
    made._tree.anonymous = anonymous
    upload = tmp_path / "upload"
    upload.touch(0o600)
    upload.write_bytes(b"uploaded")
    moved = Source.of(upload)
    moved.temporary_path, moved.path = str(upload), None
    for name, body in {"small": b"x", "big": pieces(pattern(BIG)), "path": Path(__file__), "moved": moved}.items():
        await made.write(f"a/b/{name}", body)
        wanted = 0o666 & ~umask if file_mode is None else file_mode
        assert oct(mode_of(root / "a" / "b" / name)) == oct(wanted), name
    for directory in (root, root / "a", root / "a" / "b"):
        assert mode_of(directory) == (0o777 & ~umask if directory_mode is None else directory_mode)


async def test_inherited_setgid_bit_stays(tmp_path: Path) -> None:
    root = tmp_path / "root"
    root.mkdir()
    root.chmod(0o2775)
    await FileSystemBackend(root, directory_mode=0o750).write("a/b", b"x")
    assert mode_of(root / "a") == 0o2750


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
    path = tmp_path / "content"
    path.write_bytes(pattern(BIG))
    copy = _draft.Draft.copy

    def truncating(self: _draft.Draft, source: Any, count: int) -> int:
        os.truncate(path, 50_000)
        return copy(self, source, count)

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


# -- faults of the disk


@contextlib.contextmanager
def mounted(directory: Path, *options: str) -> Iterator[None]:
    directory.mkdir(exist_ok=True)
    command = ["mount", "-t", "tmpfs", *options, "tmpfs", str(directory)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        pytest.skip("needs mount(8)")
    if done.returncode:
        pytest.skip(f"needs the right to mount: {done.stderr.strip()}")
    try:
        yield
    finally:
        subprocess.run(["umount", "-l", str(directory)], check=True)


def remount_read_only(directory: Path) -> None:
    subprocess.run(["mount", "-o", "remount,ro", str(directory)], check=True)


async def test_full_disk(backend: FileSystemBackend, tmp_path: Path) -> None:
    big = tmp_path / "big"
    big.write_bytes(pattern(BIG))
    with mounted(Path(backend.root), "-o", "size=1m,nr_inodes=20"):
        await backend.write("kept", b"x" * 100_000)
        for body in (b"y" * 1_000_000, pieces(pattern(BIG)), big):
            with pytest.raises(OutOfSpace) as caught:
                await backend.write("dir/new", body)
            assert not caught.value.outcome_unknown
            assert everything_below(backend.root) == ["kept"]
        for number in range(30):
            try:
                await backend.write(f"small/{number}", b"")
            except OutOfSpace:
                break
        else:
            pytest.fail("thirty files on twenty inodes")
        assert await content(backend, "kept") == b"x" * 100_000
        await backend.aclose()


async def test_read_only_disk(backend: FileSystemBackend) -> None:
    root = Path(backend.root)
    with mounted(root):
        await backend.write("dir/kept", b"x")
        remount_read_only(root)
        for key in ("new", "dir/new", "new/new"):
            for body in (b"y", pieces(pattern(BIG))):
                with pytest.raises(BackendUnavailable) as caught:
                    await backend.write(key, body)
                assert not caught.value.outcome_unknown
        with pytest.raises(BackendUnavailable):
            await backend.discard("dir/kept")
        await backend.discard("dir/missing")
        assert await content(backend, "dir/kept") == b"x"
        await backend.aclose()


async def test_unmounted_disk(backend: FileSystemBackend) -> None:
    with mounted(Path(backend.root)):
        await backend.write("a", b"x")
    with pytest.raises(BackendUnavailable, match="different directory"):
        await backend.write("b", b"x")
    assert os.listdir(backend.root) == []


@pytest.mark.parametrize(
    ("number", "error"),
    [(errno.EIO, BackendUnavailable), (errno.EROFS, BackendUnavailable), (errno.ESTALE, BackendUnavailable),
     (errno.EDQUOT, OutOfSpace), (errno.EACCES, AccessDenied)],
)  # fmt: skip
async def test_errors_of_the_system_calls_are_mapped(
    backend: FileSystemBackend, monkeypatch: pytest.MonkeyPatch, number: int, error: type[Exception]
) -> None:
    def broken(*_: Any, **__: Any) -> Any:
        raise OSError(number, os.strerror(number))

    await backend.write("kept", b"x")
    for call in ("write", "link"):
        with monkeypatch.context() as patch:
            patch.setattr(_posix.os, call, broken)
            for body in (b"y", pieces(pattern(BIG))):
                with pytest.raises(error) as caught:
                    await backend.write("dir/new", body)
                assert isinstance(caught.value.__cause__, OSError)
                assert not outcome_unknown(caught.value), "nothing of it can be there"
        assert everything_below(backend.root) == ["kept"]
    with monkeypatch.context() as patch:
        patch.setattr(_posix.os, "pread", broken)
        with pytest.raises(error):
            await content(backend, "kept")
        patch.setattr(_posix.os, "unlink", broken)
        with pytest.raises(error):
            await backend.discard("kept")


async def test_answer_of_the_link_is_lost(backend: FileSystemBackend, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on NFS: the link is made, the answer lost, and the repeated call finds its own work."""
    link = os.link

    def twice(*args: Any, **options: Any) -> None:
        link(*args, **options)
        link(*args, **options)

    monkeypatch.setattr(_posix.os, "link", twice)
    await backend.write("a", b"x")
    assert await content(backend, "a") == b"x"


async def test_durable_write_fails_with_the_sync_of_the_directory(
    backend: FileSystemBackend, monkeypatch: pytest.MonkeyPatch
) -> None:
    await backend.write("kept", b"x")
    fsync = os.fsync

    def failing(fd: int) -> None:
        if stat.S_ISDIR(os.fstat(fd).st_mode):
            raise OSError(errno.EIO, "no disk")
        fsync(fd)

    monkeypatch.setattr(_posix.os, "fsync", failing)
    with pytest.raises(BackendUnavailable):
        await backend.write("dir/a", b"x", durable=True)
    assert everything_below(backend.root) == ["kept"]


async def test_order_of_a_durable_write(backend: FileSystemBackend, monkeypatch: pytest.MonkeyPatch) -> None:
    events = []
    fsync, link = os.fsync, os.link

    def noted_fsync(fd: int) -> None:
        events.append(os.path.relpath(os.readlink(f"/proc/self/fd/{fd}"), backend.root) if is_directory(fd) else "file")
        fsync(fd)

    def is_directory(fd: int) -> bool:
        return stat.S_ISDIR(os.fstat(fd).st_mode)

    def noted_link(*args: Any, **options: Any) -> None:
        events.append("link")
        link(*args, **options)

    monkeypatch.setattr(_posix.os, "fsync", noted_fsync)
    monkeypatch.setattr(_posix.os, "link", noted_link)
    await backend.write("root/is", b"made")
    await backend.discard("root/is")
    for body in (b"x", pieces(pattern(BIG))):
        events.clear()
        await backend.write("a/b/c", body, durable=True)
        assert events == ["file", "link", "a/b", "a", "."]
        await backend.discard("a/b/c")
    events.clear()
    await backend.write("a", b"x")
    assert events == ["link"]


# -- extended attributes


@pytest.fixture
def no_xattrs(monkeypatch: pytest.MonkeyPatch) -> None:
    def unsupported(*_: Any, **__: Any) -> Any:
        raise OSError(errno.ENOTSUP, "not supported")

    monkeypatch.setattr(_posix.os, "setxattr", unsupported)
    monkeypatch.setattr(_posix.os, "getxattr", unsupported)


@pytest.mark.usefixtures("no_xattrs")
async def test_without_extended_attributes(backend: FileSystemBackend, caplog: pytest.LogCaptureFixture) -> None:
    await backend.write("a", b"x", token="tokenOfA0000")
    assert (await backend.stat("a")).token is None
    await backend.discard("a", token="tokenOfA0000")
    assert await content(backend, "a") == b"x", "it might have been somebody else's"
    assert "cannot be told" in caplog.text
    await backend.discard("a")
    assert everything_below(backend.root) == []


async def test_discard_removes_the_temporary_of_a_killed_write(tmp_path: Path) -> None:
    made = FileSystemBackend(tmp_path / "root")
    made._tree.anonymous = False
    token = "tokenOfKill0"
    process = multiprocessing.get_context("spawn").Process(target=_killed_write, args=(made.root, token))
    process.start()
    await asyncio.to_thread(process.join)
    (directory, left) = sorted(everything_below(made.root))
    assert directory == "dir/"
    assert left.endswith(".part")
    assert [info.key async for info in made.list()] == []
    await made.discard("dir/other", token=token)
    await made.discard("dir/key", token="anotherToken")
    assert sorted(everything_below(made.root)) == [directory, left]
    await made.discard("dir/key", token=token)
    assert everything_below(made.root) == []


def _killed_write(root: str, token: str) -> None:
    async def dying() -> AsyncIterator[bytes]:
        yield pattern(BIG)
        yield pattern(BIG)
        yield pattern(BIG)
        os.kill(os.getpid(), 9)
        yield b""

    made = FileSystemBackend(root)
    made._tree.anonymous = False
    asyncio.run(made.write("dir/key", dying(), token=token))


async def test_earlier_attempt_that_is_still_alive_does_not_publish(tmp_path: Path) -> None:
    """Two attempts with one token share the hidden name: the later one takes over, the earlier one notices."""
    made = FileSystemBackend(tmp_path / "root")
    made._tree.anonymous = False
    under_way = asyncio.Event()

    async def slow() -> AsyncIterator[bytes]:
        yield pattern(BIG, seed=1)
        yield pattern(BIG, seed=1)
        under_way.set()
        await second
        yield b"end"

    first = asyncio.ensure_future(made.write("key", slow(), token="sameToken000"))
    second = asyncio.ensure_future(_after(under_way, made))
    with pytest.raises((Conflict, AlreadyExists)):
        await first
    assert await content(made, "key") == b"second"
    assert everything_below(made.root) == ["key"]


async def _after(event: asyncio.Event, made: FileSystemBackend) -> None:
    await event.wait()
    await made.write("key", b"second", token="sameToken000")


# -- hung threads


class Stuck:
    """Blocks whoever calls it in a thread, as a disk that does not answer."""

    def __init__(self, real: Any) -> None:
        self.real = real
        self.reached = threading.Event()
        self.release = threading.Event()

    def __call__(self, *args: Any, **options: Any) -> Any:
        self.reached.set()
        assert self.release.wait(60)
        return self.real(*args, **options)


async def until(event: threading.Event) -> None:
    await asyncio.to_thread(event.wait, 60)


async def test_hung_write_ends_at_its_deadline_and_starves_nobody_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hung = FileSystemBackend(tmp_path / "hung", timeouts=Timeouts(idle=0.1, operation=0.1), max_workers=2)
    healthy = FileSystemBackend(tmp_path / "healthy")
    await hung.write("kept", b"x")
    stuck = Stuck(_draft.write_all)
    monkeypatch.setattr(_draft, "write_all", stuck)
    try:
        for number in range(3):  # the third finds no thread at all
            with pytest.raises(DeadlineExceeded) as caught:
                await hung.write(f"dir/{number}", b"x")
            assert not caught.value.outcome_unknown, "it will look at the flag before it publishes"
        with pytest.raises(DeadlineExceeded):
            await hung.stat("kept")
        monkeypatch.setattr(_draft, "write_all", stuck.real)
        await healthy.write("a", b"x")
    finally:
        stuck.release.set()
    await hung.write("other", b"x")
    await hung.aclose()
    assert sorted(everything_below(hung.root)) == ["kept", "other"]


async def test_write_that_hangs_in_the_link_is_taken_back(
    backend: FileSystemBackend, monkeypatch: pytest.MonkeyPatch
) -> None:
    stuck = Stuck(os.link)
    monkeypatch.setattr(_posix.os, "link", stuck)
    task = asyncio.ensure_future(backend.write("dir/a", b"x"))
    await until(stuck.reached)
    task.cancel()
    await asyncio.sleep(0)
    stuck.release.set()
    with pytest.raises(asyncio.CancelledError) as caught:
        await task
    assert not outcome_unknown(caught.value)
    assert everything_below(backend.root) == []


async def test_write_that_hangs_in_the_link_for_ever_is_unknown(
    backend: FileSystemBackend, monkeypatch: pytest.MonkeyPatch
) -> None:
    backend.timeouts = Timeouts(idle=0.1, cleanup=0.1)
    stuck = Stuck(os.link)
    monkeypatch.setattr(_posix.os, "link", stuck)
    try:
        with pytest.raises(DeadlineExceeded) as caught:
            await backend.write("dir/a", b"x")
        assert caught.value.outcome_unknown
    finally:
        stuck.release.set()
    backend.timeouts = Timeouts()
    await backend.aclose()
    assert everything_below(backend.root) == []


async def test_cancelled_reader_closes_its_file_when_the_read_is_over(
    backend: FileSystemBackend, monkeypatch: pytest.MonkeyPatch
) -> None:
    await backend.write("a", pattern(BIG))
    before = descriptors(backend)
    async with backend.read("a", chunk_bytes=1 << 16) as reader:
        stuck = Stuck(os.pread)
        monkeypatch.setattr(_posix.os, "pread", stuck)
        await anext(reader)  # was read when the file was opened; the next one is read ahead
        await until(stuck.reached)
    assert len(descriptors(backend)) > len(before), "closed under a thread that reads from it"
    stuck.release.set()
    await until_open(backend, *before)


# -- races


def _storm(root: str, seed: int) -> None:
    async def storm() -> None:
        made = FileSystemBackend(root, max_workers=4)

        async def work(number: int) -> None:
            for turn in range(25):
                key = f"a/b{turn % 2}/{seed}-{number}"
                await made.write(key, b"x" if number % 2 else pieces(pattern(300_000)))
                await made.discard(key)

        async with asyncio.TaskGroup() as group:
            for number in range(8):
                group.create_task(work(number))
        await made.aclose()

    asyncio.run(storm())


async def test_directories_come_and_go_under_several_processes(tmp_path: Path) -> None:
    root = tmp_path / "root"
    root.mkdir()
    context = multiprocessing.get_context("spawn")
    processes = [context.Process(target=_storm, args=(str(root), seed)) for seed in range(4)]
    for process in processes:
        process.start()
    for process in processes:
        await asyncio.to_thread(process.join)
    assert [process.exitcode for process in processes] == [0] * 4
    assert everything_below(root) == []


async def test_prune_between_every_two_steps(backend: FileSystemBackend, monkeypatch: pytest.MonkeyPatch) -> None:
    """The directory is removed again right after it was made, and right before the link."""
    opened, linked = os.open, os.link
    root = Path(backend.root)
    left: dict[str, int] = {}

    def gone(step: str) -> None:
        if left.get(step):
            left[step] -= 1
            with contextlib.suppress(OSError):
                os.rmdir(root / "a" / "b")
                os.rmdir(root / "a")

    def open_after(path: Any, flags: int, *args: Any, **options: Any) -> int:
        gone(str(path))
        return opened(path, flags, *args, **options)

    def link_after(*args: Any, **options: Any) -> None:
        gone("link")
        linked(*args, **options)

    monkeypatch.setattr(_posix.os, "open", open_after)
    monkeypatch.setattr(_posix.os, "link", link_after)
    for key, data in (("a/b/small", b"x"), ("a/b/big", pattern(BIG))):
        hidden = _posix.temporary_name(key[4:], "tokenOfPrune")
        left.update({"a": 3, "b": 3, ".": 3, hidden: 3, "link": 3})
        await backend.write(key, pieces(data), token="tokenOfPrune")
        assert await content(backend, key) == data
        # Nothing can be pruned before a link where the file has a hidden name there already.
        used = {"a", "b"} | ({hidden} if backend._tree.anonymous is False else {".", "link"})
        assert not any(left[step] for step in used), left
        await backend.discard(key)


async def test_use_in_a_forked_child(backend: FileSystemBackend) -> None:
    await backend.write("parent", b"x")
    pid = os.fork()
    if pid == 0:  # a new loop in the child, as a prefork server has
        code = 1
        try:
            asyncio._set_running_loop(None)
            loop = asyncio.new_event_loop()
            loop.run_until_complete(backend.write("child", b"y"))
            loop.run_until_complete(backend.aclose())
            code = 0
        finally:
            os._exit(code)
    _, status = await asyncio.to_thread(os.waitpid, pid, 0)
    assert os.waitstatus_to_exitcode(status) == 0
    assert await content(backend, "child") == b"y"
    assert await content(backend, "parent") == b"x"


# -- leaks


def descriptors(backend: FileSystemBackend) -> list[str]:
    """Return what this process holds open at or below the root."""
    gc.collect()
    found = []
    for name in os.listdir("/proc/self/fd"):
        with contextlib.suppress(OSError):
            target = os.readlink(f"/proc/self/fd/{name}")
            if target.startswith(backend.root):
                found.append(target.replace(" (deleted)", ""))
    return sorted(found)


async def until_open(backend: FileSystemBackend, *expected: str) -> None:
    """Wait until only these are open: a job that nobody waits for lets go of its file within a tick of the workers."""
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(10):
            while descriptors(backend) != sorted(expected):  # noqa: ASYNC110
                await asyncio.sleep(0.01)
    assert descriptors(backend) == sorted(expected)


async def test_no_descriptor_and_no_thread_is_left(backend: FileSystemBackend, tmp_path: Path) -> None:
    await backend.write("a", pattern(BIG))
    await backend.write("dir/b", b"x")
    for _ in range(3):
        await content(backend, "a", chunk_bytes=1 << 16)
        async with backend.read("a", chunk_bytes=1 << 16) as reader:
            await anext(reader)
        for body in (pieces(pattern(BIG), fail_after=BIG // 2), tmp_path / "missing"):
            with pytest.raises(ContentError):
                await backend.write("new/c", body)
        for key in ("a", "missing/x", "dir"):
            with contextlib.suppress(AlreadyExists):
                await backend.write(key, b"x")
            with contextlib.suppress(NotFound):
                await backend.stat(key + "/x")
        with pytest.raises(AlreadyExists):
            await backend.copy("a", "dir/b")
        assert len([info async for info in backend.list(delimiter="/")])
    await until_open(backend, backend.root)
    await backend.aclose()
    await until_open(backend)
    threads = [thread for thread in threading.enumerate() if backend.root in thread.name]
    for thread in threads:  # idle ones are told to end
        await asyncio.to_thread(thread.join, 10)
    assert not any(thread.is_alive() for thread in threads)
