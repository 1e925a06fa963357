"""A disk that is full, read-only, broken or hung, and one without extended attributes."""

import asyncio
import contextlib
import errno
import multiprocessing
import os
import stat
import subprocess
import threading
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import pytest

from aproxy_storage import ProxyStorage, Replicate
from aproxy_storage.backends import _draft, _posix
from aproxy_storage.backends.filesystem import FileSystemBackend
from aproxy_storage.content import Source
from aproxy_storage.errors import (
    AccessDenied,
    AlreadyExists,
    BackendUnavailable,
    Conflict,
    DeadlineExceeded,
    OutOfSpace,
    outcome_unknown,
)
from aproxy_storage.meta_backends.memory import MemoryMetaBackend
from aproxy_storage.testing._backend_hooks import BIG, pattern, pieces
from aproxy_storage.timeouts import Timeouts
from tests.backends.test_filesystem import content, descriptors, everything_below, until_open

pytestmark = pytest.mark.asyncio


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


@pytest.mark.parametrize("kind", ["bytes", "large", "stream"])
async def test_a_thread_that_cannot_be_started(tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    large = tmp_path / "large"
    large.write_bytes(pattern(BIG))
    backend = FileSystemBackend(tmp_path / "root")
    refused: list[str] = []
    start = threading.Thread.start

    def refuse(thread: threading.Thread) -> None:
        if backend.root in thread.name and not refused:
            refused.append(thread.name)
            raise RuntimeError("can't start new thread")
        start(thread)

    monkeypatch.setattr(threading.Thread, "start", refuse)
    for expected in (BackendUnavailable, None):
        body = {"bytes": b"x", "large": large, "stream": pieces(pattern(BIG))}[kind]
        with pytest.raises(expected) if expected else contextlib.nullcontext() as caught:
            await asyncio.wait_for(backend.write("x", body), 30)
        if expected:
            assert refused
            assert caught.value.retryable
            assert not caught.value.outcome_unknown
            assert everything_below(backend.root) == []
    assert everything_below(backend.root) == ["x"]
    await backend.aclose()


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


async def test_file_system_without_hard_links(backend: FileSystemBackend, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(*_: Any, **__: Any) -> Any:
        raise OSError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(_posix.os, "link", refused)
    with pytest.raises(AccessDenied, match=r"not permitted \(without hard links .* choose another"):
        await backend.write("a", b"x")


async def test_full_disk_that_gives_directories_no_links(
    backend: FileSystemBackend, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As some FUSE do; a directory that is still there was not removed."""
    fstat, calls = os.fstat, []

    def no_links(fd: int) -> os.stat_result:
        found = fstat(fd)
        return os.stat_result((*found[:3], 0, *found[4:10])) if stat.S_ISDIR(found.st_mode) else found

    def full(*_: Any, **__: Any) -> Any:
        calls.append(1)
        raise OSError(errno.ENOSPC, "No space left on device")

    await backend.write("dir/kept", b"x")
    monkeypatch.setattr(_posix.os, "fstat", no_links)
    monkeypatch.setattr(_posix.os, "link", full)
    for key in ("a", "dir/a"):
        with pytest.raises(OutOfSpace):
            await backend.write(key, b"x")
    assert len(calls) == 2


async def test_mount_below_the_root_without_unnamed_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    backend = FileSystemBackend(tmp_path / "root")
    await backend.write("dir/a", b"x")
    opened, mount = os.open, Path(backend.root, "dir").stat().st_ino

    def without(path: Any, flags: int, *args: Any, **options: Any) -> int:
        if flags & os.O_TMPFILE == os.O_TMPFILE and os.fstat(options["dir_fd"]).st_ino == mount:
            raise OSError(errno.EOPNOTSUPP, "Operation not supported")
        return opened(path, flags, *args, **options)

    monkeypatch.setattr(_posix.os, "open", without)
    await backend.write("b", b"x")
    await backend.write("dir/b", b"x")
    assert backend._tree.anonymous, "elsewhere there are some"
    assert sorted(everything_below(backend.root)) == ["b", "dir/", "dir/a", "dir/b"]


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
    hung = FileSystemBackend(tmp_path / "hung", timeouts=Timeouts(idle=0.5, operation=0.5), max_workers=2)
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


@pytest.mark.parametrize("token", [None, "tokenOfOld00"])
@pytest.mark.parametrize("ended", ["timeout", "cancelled", "stopped"])
async def test_discard_that_hung_for_too_long_spares_the_next_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ended: str, token: str | None
) -> None:
    operation = 0.1 if ended == "timeout" else 30.0
    hung = FileSystemBackend(tmp_path / "root", timeouts=Timeouts(operation=operation), max_workers=1)
    await hung.write("a", b"old", token="tokenOfOld00")
    stuck = Stuck(hung._tree.enter)
    monkeypatch.setattr(hung._tree, "enter", stuck)
    task = asyncio.ensure_future(hung.discard("a", token=token))
    await until(stuck.reached)
    if ended == "cancelled":
        task.cancel()
    elif ended == "stopped":  # all of the process, or it slept with its machine: nobody has said yet that it is over
        later = _posix.elapsed() + operation
        monkeypatch.setattr(_posix, "elapsed", lambda: later)
    if ended != "stopped":
        with pytest.raises((DeadlineExceeded, asyncio.CancelledError)):
            await task
    other = FileSystemBackend(hung.root)
    await other.discard("a")
    await other.write("a", b"new", token="tokenOfOld00")  # the same one: what is looked at is the time
    stuck.release.set()
    if ended == "stopped":
        with pytest.raises(DeadlineExceeded, match="nothing was removed"):
            await task
    assert (await hung.stat("a")).size == 3, "asked after the discard, in the same thread"
    assert await content(other, "a") == b"new"


@pytest.mark.parametrize("kind", ["small", "moved"])
@pytest.mark.parametrize("xattrs", [True, False])
async def test_undo_of_a_write_that_hung_for_too_long_spares_the_next_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest, xattrs: bool, kind: str
) -> None:
    if not xattrs:
        request.getfixturevalue("no_xattrs")
    hung = FileSystemBackend(tmp_path / "root", timeouts=Timeouts(cleanup=0.05), max_workers=1)
    other = FileSystemBackend(hung.root)
    await hung.write("kept", b"x")
    upload = tmp_path / "upload"
    upload.write_bytes(b"old")
    source = Source.of(upload)
    if kind == "moved":
        source.temporary_path, source.path = str(upload), None
    published = Stuck(lambda status: status)
    finished, remove = _draft.Draft._finished, _draft.Draft._remove_names
    removing = Stuck(remove)
    monkeypatch.setattr(_draft.Draft, "_finished", lambda draft, work: published(finished(draft, work)))
    monkeypatch.setattr(_draft.Draft, "_remove_names", lambda *args, **options: removing(*args, **options))
    task = asyncio.ensure_future(hung.write("a", source, token="tokenOfOld00"))
    await until(published.reached)
    task.cancel()
    with pytest.raises(asyncio.CancelledError) as caught:
        await task
    assert outcome_unknown(caught.value)
    published.release.set()
    await until(removing.reached)
    monkeypatch.setattr(_draft.Draft, "_finished", finished)
    await other.discard("a")
    if xattrs:  # ext4 would give the same number, others at times
        monkeypatch.setattr(_draft.os.path, "samestat", lambda *_: True)
    await other.write("a", b"new", token="tokenOfNew00")
    removing.release.set()
    await hung.stat("kept")  # asked after the undo, in the same thread
    assert await content(other, "a") == b"new"


@pytest.mark.usefixtures("no_xattrs")
async def test_file_without_a_token_is_closed_after_the_answer(backend: FileSystemBackend) -> None:
    await backend.write("a", b"x")
    await backend.write("b", pieces(pattern(BIG)))
    await until_open(backend, backend.root)


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


@pytest.mark.parametrize("answered", [False, True])
async def test_file_that_is_closed_while_another_task_reads_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, answered: bool
) -> None:
    """The reader is told: a CancelledError would end his TaskGroup without a word, as if this were all of the file."""
    backends = {name: FileSystemBackend(tmp_path / name) for name in "ab"}
    async with ProxyStorage(
        "media", originals=backends, meta=MemoryMetaBackend(), placement=Replicate(2), chunk_bytes=1 << 16
    ) as storage:
        path = await storage.save("x", pattern(BIG))
        file = await storage.open(path)
        reading = backends["a"].read("x", chunk_bytes=1 << 16)
        reader = await reading.__aenter__()
        stuck = Stuck(os.pread)
        monkeypatch.setattr(_posix.os, "pread", stuck)
        for source in (file, reader):
            await anext(source)  # was read when it was opened; the next one is read ahead
        readers = [asyncio.ensure_future(read_on(source)) for source in (file, reader)]
        await asyncio.sleep(0)
        if answered:  # the chunk is there when the file is closed, and its reader has not seen it yet
            for chunks in (file._reading._reader._chunks, reader._reader._chunks):
                chunks._ahead.set_result(b"x" * (1 << 16))
        await file.aclose()
        await reading.__aexit__(None, None, None)
        stuck.release.set()
        for task in readers:
            with pytest.raises(BackendUnavailable, match="closed while it was read"):
                await task
        for backend in backends.values():
            await until_open(backend, backend.root)


async def read_on(chunks: AsyncIterator[bytes]) -> None:
    async for _ in chunks:
        pass


async def test_reader_whose_next_chunk_is_out_of_time_closes_its_file_when_the_read_is_over(
    backend: FileSystemBackend, monkeypatch: pytest.MonkeyPatch
) -> None:
    await backend.write("a", pattern(BIG))
    before = descriptors(backend)
    backend.timeouts = Timeouts(idle=0.1)
    async with backend.read("a", chunk_bytes=1 << 16) as reader:
        stuck = Stuck(os.pread)
        monkeypatch.setattr(_posix.os, "pread", stuck)
        await anext(reader)
        await until(stuck.reached)
        await asyncio.sleep(0.5)  # nobody asks for the chunk that is read ahead, and its time runs out
    assert len(descriptors(backend)) > len(before), "closed under a thread that reads from it"
    stuck.release.set()
    await until_open(backend, *before)
