"""Disks that are full, gone, read-only or hung, and databases that are locked, damaged or full.

Always a clear StorageError that says where; nothing that was stored is lost, and when the trouble is over nothing is
left over.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
import subprocess
import threading
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import pytest

from aproxy_storage import (
    AccessDenied,
    BackendUnavailable,
    ConfigurationError,
    DeadlineExceeded,
    IntegrityError,
    NotFound,
    OutOfSpace,
    ProxyStorage,
    StorageError,
    Timeouts,
)
from aproxy_storage.backends.filesystem import FileSystemBackend
from aproxy_storage.meta_backends.sqlite import SQLiteMetaBackend
from aproxy_storage.tools.reconcile import reconcile
from tests.proxy.support import SAFETY, assert_sound, contents, on_disk, process, storage_in

pytestmark = pytest.mark.asyncio


def assert_clear(error: StorageError, *, path: str | None = None) -> None:
    """Hold that `error` says what was tried, on what and by whom."""
    assert error.operation, repr(error)
    assert error.backend, repr(error)
    if path is not None:
        assert error.path == path, repr(error)
    assert str(error)
    assert "Traceback" not in str(error)


@contextlib.contextmanager
def mounted(directory: Path, size: str, *options: str) -> Iterator[None]:
    """Mount a small disk at `directory`; skip the test where that is not allowed."""
    directory.mkdir(exist_ok=True)
    command = ["mount", "-t", "tmpfs", "-o", ",".join([f"size={size}", *options]), "tmpfs", str(directory)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        reason = done.stderr.strip()
        failed = done.returncode != 0
    except OSError as error:
        reason, failed = str(error), True
    if failed:
        pytest.skip(f"cannot mount a tmpfs (needs root on Linux): {reason}")
    try:
        yield
    finally:
        subprocess.run(["umount", "-l", str(directory)], check=True)


def remount(directory: Path, how: str) -> None:
    subprocess.run(["mount", "-o", f"remount,{how}", str(directory)], check=True)


def needs_xattrs(directory: Path) -> None:
    """Skip where the small disk keeps no extended attributes: an undo could not tell whose bytes lie there."""
    probe = directory / "probe"
    probe.touch()
    try:
        os.setxattr(probe, "user.aproxy.probe", b"x")
    except OSError as error:
        pytest.skip(f"tmpfs keeps no user attributes here (needs Linux 6.6): {error}")
    finally:
        probe.unlink()


async def chunks(count: int, size: int = 64 << 10) -> AsyncIterator[bytes]:
    for _ in range(count):
        yield os.urandom(size)


# -- full disks


async def test_a_full_disk_under_saves(tmp_path: Path) -> None:
    files = tmp_path / "files"
    with mounted(files, "2m"):
        needs_xattrs(files)
        async with asyncio.timeout(SAFETY), storage_in(tmp_path) as storage:
            stored = {await storage.save(f"{number}.bin", bytes([number]) * 100_000): number for number in range(5)}
            for big in (b"x" * (3 << 20), chunks(48)):
                with pytest.raises(OutOfSpace) as caught:
                    await storage.save("big.bin", big)
                assert_clear(caught.value)
                assert not caught.value.outcome_unknown
            with pytest.raises(OutOfSpace):
                await storage.replace("0.bin", b"x" * (3 << 20))

            async def fill(number: int) -> bool:
                try:
                    path = await storage.save(f"many/{number}.bin", bytes([number]) * 150_000)
                except OutOfSpace:
                    return False
                stored[path] = number
                return True

            async with asyncio.TaskGroup() as group:
                tasks = [group.create_task(fill(number)) for number in range(30)]
            won = sum(task.result() for task in tasks)
            assert 0 < won < 30
            # Nothing of the failed saves takes room.
            assert len(on_disk(tmp_path)) == len(stored)
            for path, number in stored.items():
                assert set((await contents(storage))[path]) == {number}
            for number in range(5):
                await storage.delete(f"{number}.bin")
                del stored[f"{number}.bin"]
            assert await storage.save("after.bin", b"y" * 300_000) == "after.bin"
            assert await storage.save("big.bin", b"small now") == "big.bin"
        assert (await assert_sound(tmp_path)).keys() == {*stored, "after.bin", "big.bin"}


async def test_a_full_disk_under_the_records(tmp_path: Path) -> None:
    """The files are elsewhere; the database cannot even note that a save is to be undone."""
    disk = tmp_path / "disk"
    with mounted(disk, "1m"):
        (tmp_path / "files").mkdir()
        meta = SQLiteMetaBackend(disk / "meta.sqlite3")
        async with asyncio.timeout(SAFETY), storage_in(tmp_path, meta=meta, lease=1.0, settle=0.0) as storage:
            path = await storage.save("first.txt", b"first")
            ballast = disk / "ballast"
            with ballast.open("wb", buffering=0) as file, contextlib.suppress(OSError):
                while True:
                    file.write(b"x" * 4096)
            saved: dict[str, bytes] = {"first.txt": b"first"}
            errors = []
            for number in range(400):
                try:
                    saved[await storage.save(f"{number}.txt", b"x", extra={"pad": "y" * 2000})] = b"x"
                except StorageError as error:
                    errors.append(error)
                    if len(errors) == 3:
                        break
            assert errors
            for error in errors:
                assert isinstance(error, OutOfSpace | BackendUnavailable), repr(error)
                assert_clear(error)
                assert "meta.sqlite3" in str(error)
            async with storage.open(path) as file:  # reading goes on
                assert await file.read() == b"first"
            ballast.unlink()
            assert await storage.save("after.txt", b"after") == "after.txt"
            saved["after.txt"] = b"after"
            while await storage.tidy():  # noqa: ASYNC110
                await asyncio.sleep(0.05)
            report = await reconcile(storage, dry_run=False, force=True)
            assert not report.counts.get("failed"), report
            assert await contents(storage) == saved
            assert on_disk(tmp_path).keys() == saved.keys()


# -- roots


async def test_a_read_only_root(tmp_path: Path) -> None:
    files = tmp_path / "files"
    with mounted(files, "2m"):
        async with asyncio.timeout(SAFETY), storage_in(tmp_path) as storage:
            await storage.save("a.txt", b"there")
            await storage.save("b.txt", b"there too")
            remount(files, "ro")
            with pytest.raises(BackendUnavailable) as caught:
                await storage.save("c.txt", b"new")
            assert_clear(caught.value)
            with pytest.raises(BackendUnavailable) as caught:
                await storage.replace("a.txt", b"new")
            assert_clear(caught.value)
            async with storage.open("a.txt") as file:
                assert await file.read() == b"there"
            await storage.delete("b.txt")  # it is deleted; that its bytes cannot go yet is logged
            assert not await storage.exists("b.txt")
            remount(files, "rw")
        assert await assert_sound(tmp_path) == {"a.txt": b"there"}


@pytest.mark.parametrize("instead", ["nothing", "a file", "another directory"])
async def test_a_root_that_is_gone(tmp_path: Path, instead: str) -> None:
    files, away = tmp_path / "files", tmp_path / "away"
    async with asyncio.timeout(SAFETY), storage_in(tmp_path) as storage:
        await storage.save("a.txt", b"there")
        await storage.save("b.txt", b"there too")
        files.rename(away)
        if instead == "a file":
            files.write_bytes(b"in the way")
        elif instead == "another directory":
            files.mkdir()
            (files / "a.txt").write_bytes(b"of somebody else")
        for attempt in (
            lambda: storage.save("c.txt", b"new"),
            lambda: storage.save("c.txt", chunks(20)),
            lambda: storage.replace("a.txt", b"new"),
            lambda: storage.open("a.txt"),
            lambda: storage.copy("a.txt", "copy.txt"),
        ):
            with pytest.raises(BackendUnavailable, match="root") as caught:
                await attempt()
            assert_clear(caught.value)
            assert caught.value.retryable
        assert await storage.exists("a.txt")
        await storage.delete("b.txt")
        health = {answer.name: answer.ok for answer in await storage.health()}
        assert health == {"fs": False, "meta": True}
        # Never made anew below an unmounted disk, and nothing of others is touched.
        if instead == "nothing":
            assert not files.exists()
        elif instead == "a file":
            assert files.read_bytes() == b"in the way"
            files.unlink()
        else:
            assert on_disk(tmp_path) == {"a.txt": b"of somebody else"}
            shutil.rmtree(files)
        away.rename(files)
        async with storage.open("a.txt") as file:  # back again, without a restart
            assert await file.read() == b"there"
        await storage.save("d.txt", b"after")
    assert await assert_sound(tmp_path) == {"a.txt": b"there", "d.txt": b"after"}


async def test_a_directory_in_the_place_of_a_file_and_the_other_way_round(tmp_path: Path) -> None:
    files = tmp_path / "files"
    async with asyncio.timeout(SAFETY), storage_in(tmp_path) as storage:
        await storage.save("a.txt", b"a")
        await storage.save("d/b.txt", b"b")
        (files / "a.txt").unlink()
        (files / "a.txt").mkdir()
        (files / "a.txt/theirs").write_bytes(b"theirs")
        shutil.rmtree(files / "d")
        (files / "d").write_bytes(b"theirs too")
        for path in ("a.txt", "d/b.txt"):
            with pytest.raises(IntegrityError) as caught:
                await storage.open(path)
            assert_clear(caught.value, path=path)
            await storage.replace(path, b"new") if path == "a.txt" else None
            await storage.delete(path)
            assert not await storage.exists(path)
        assert on_disk(tmp_path).keys() >= {"a.txt/theirs", "d"}
        shutil.rmtree(files / "a.txt")
        (files / "d").unlink()
    assert await assert_sound(tmp_path) == {}


# -- the database


async def test_records_locked_by_another_process(tmp_path: Path) -> None:
    meta = SQLiteMetaBackend(tmp_path / "meta.sqlite3", timeouts=Timeouts(operation=1.0))
    async with asyncio.timeout(SAFETY), storage_in(tmp_path, meta=meta) as storage:
        await storage.save("a.txt", b"there")
        async with process("hold_lock", tmp_path) as other:
            await other.expect("locked")
            for attempt in (
                lambda: storage.save("b.txt", b"new"),
                lambda: storage.replace("a.txt", b"new"),
                lambda: storage.delete("a.txt"),
                lambda: storage.rename("a.txt", "c.txt"),
            ):
                with pytest.raises(BackendUnavailable) as caught:  # DeadlineExceeded is one
                    await attempt()
                assert_clear(caught.value)
                assert "meta.sqlite3" in f"{caught.value} {caught.value.backend}"
            async with storage.open("a.txt") as file:  # readers wait for nobody
                assert await file.read() == b"there"
            await other.tell("let go")
            assert not await other.end()
        await storage.replace("a.txt", b"after")
    assert await assert_sound(tmp_path) == {"a.txt": b"after"}


async def test_records_locked_amid_a_save(tmp_path: Path) -> None:
    """The bytes are there already, and neither their commit nor their undo can be noted."""
    meta = SQLiteMetaBackend(tmp_path / "meta.sqlite3", timeouts=Timeouts(operation=1.0))
    async with (
        asyncio.timeout(SAFETY),
        storage_in(tmp_path, meta=meta) as storage,
        contextlib.AsyncExitStack() as stack,
    ):
        await storage.save("a.txt", b"there")

        async def locking() -> AsyncIterator[bytes]:
            yield b"half "
            other = await stack.enter_async_context(process("hold_lock", tmp_path))
            await other.expect("locked")
            yield b"whole"

        for attempt in (lambda: storage.save("b.txt", locking()), lambda: storage.replace("a.txt", locking())):
            with pytest.raises(BackendUnavailable) as caught:
                await attempt()
            assert_clear(caught.value)
            await stack.aclose()
        assert not await storage.exists("b.txt")
        async with storage.open("a.txt") as file:
            assert await file.read() == b"there"
    assert await assert_sound(tmp_path) == {"a.txt": b"there"}


@pytest.mark.parametrize("garbage", [b"this is no database " * 500, b"SQLite format 3\0" + b"\xff" * 9000])
async def test_a_file_of_garbage_in_the_place_of_the_records(tmp_path: Path, garbage: bytes) -> None:
    (tmp_path / "meta.sqlite3").write_bytes(garbage)
    storage = storage_in(tmp_path)
    async with asyncio.timeout(SAFETY):
        for attempt in (
            lambda: storage.save("a.txt", b"new"),
            lambda: storage.get("a.txt"),
            lambda: storage.exists("a.txt"),
            lambda: storage.delete("a.txt"),
            lambda: storage.open("a.txt"),
        ):
            with pytest.raises(StorageError, match=r"meta\.sqlite3") as caught:
                await attempt()
            assert isinstance(caught.value, ConfigurationError | IntegrityError), repr(caught.value)
            assert_clear(caught.value)
        await storage.aclose()
    assert (tmp_path / "meta.sqlite3").read_bytes() == garbage
    assert not (tmp_path / "files").exists() or on_disk(tmp_path) == {}


async def test_pages_of_the_database_overwritten(tmp_path: Path) -> None:
    """Damage in the midst: an error that names the file, for reads and writes; no file is touched."""
    async with asyncio.timeout(SAFETY):
        async with storage_in(tmp_path) as storage:
            for number in range(200):
                await storage.save(f"{number:03}.txt", b"x", extra={"pad": "y" * 500})
        before = on_disk(tmp_path)
        database = tmp_path / "meta.sqlite3"
        size = database.stat().st_size
        with database.open("r+b") as file:
            file.seek(4096)
            file.write(os.urandom(size - 4096))
        storage = storage_in(tmp_path)
        for attempt in (
            lambda: storage.save("new.txt", b"new"),
            lambda: storage.delete("100.txt"),
            lambda: storage.open("100.txt"),
        ):
            with pytest.raises(StorageError, match=r"meta\.sqlite3") as caught:
                await attempt()
            assert_clear(caught.value)
        await storage.aclose()
    assert on_disk(tmp_path) == before


async def test_the_directory_of_the_records_is_gone(tmp_path: Path) -> None:
    storage = storage_in(tmp_path, meta=SQLiteMetaBackend(tmp_path / "missing/meta.sqlite3"))
    async with asyncio.timeout(SAFETY):
        with pytest.raises((BackendUnavailable, AccessDenied), match=r"meta\.sqlite3") as caught:
            await storage.save("a.txt", b"new")
        assert_clear(caught.value)
        await storage.aclose()


# -- a write that hangs in the kernel


class Hung(FileSystemBackend):
    """The next publishing of a file blocks its worker thread, as a dead disk does, until `release` is set."""

    def __init__(self, root: Path, **options: Any) -> None:
        super().__init__(root, **options)
        self.release = threading.Event()
        self.blocked = threading.Event()
        self.hang = False
        real = self._tree.below

        def below(*args: Any) -> Any:
            if self.hang:
                self.hang = False
                self.blocked.set()
                self.release.wait()
            return real(*args)

        self._tree.below = below  # type: ignore[method-assign]


@pytest.mark.parametrize("kind", ["bytes", "stream"])
async def test_a_write_hung_in_the_kernel_holds_up_nobody_else(tmp_path: Path, kind: str) -> None:
    hung = Hung(tmp_path / "files", timeouts=Timeouts(idle=0.5, cleanup=0.5))
    originals = {"fs": hung, "other": FileSystemBackend(tmp_path / "files")}
    storage = ProxyStorage("media", originals=originals, meta=SQLiteMetaBackend(tmp_path / "meta.sqlite3"))
    async with asyncio.timeout(SAFETY), storage:
        await storage.save("there.txt", b"there")
        hung.hang = True
        save = asyncio.ensure_future(storage.save("hung.txt", b"x" * 300_000 if kind == "bytes" else chunks(10)))
        while not hung.blocked.is_set():  # noqa: ASYNC110
            await asyncio.sleep(0.01)
        # All this ends although the thread is provably still blocked.
        for number in range(30):
            path = await storage.save(f"{number}.txt", b"fast", using="other")
            same = await storage.save(f"same {number}.txt", b"fast")
            for one in (path, same, "there.txt"):
                assert await storage.exists(one)
                async with storage.open(one) as file:
                    await file.read()
            await storage.delete(path)
            await storage.delete(same)
        with pytest.raises(DeadlineExceeded) as caught:
            await save
        assert_clear(caught.value)
        assert not hung.release.is_set()
        assert not await storage.exists("hung.txt")
        hung.release.set()
    assert await assert_sound(tmp_path, "other") == {"there.txt": b"there"}


async def test_all_workers_of_one_original_hung(tmp_path: Path) -> None:
    """Not even then does another original of the same storage wait, and what waits in vain is told so."""
    hung = Hung(tmp_path / "files", max_workers=1, timeouts=Timeouts(idle=1.0, operation=1.0, cleanup=1.0))
    originals = {"fs": hung, "other": FileSystemBackend(tmp_path / "files")}
    storage = ProxyStorage("media", originals=originals, meta=SQLiteMetaBackend(tmp_path / "meta.sqlite3"))
    async with asyncio.timeout(SAFETY), storage:
        await storage.save("there.txt", b"there")
        hung.hang = True
        save = asyncio.ensure_future(storage.save("hung.txt", b"hung"))
        while not hung.blocked.is_set():  # noqa: ASYNC110
            await asyncio.sleep(0.01)
        await storage.save("fast.txt", b"fast", using="other")
        async with storage.open("fast.txt") as file:
            assert await file.read() == b"fast"
        for attempt in (lambda: storage.open("there.txt"), lambda: storage.save("waits.txt", b"waits")):
            with pytest.raises(DeadlineExceeded) as caught:
                await attempt()
            assert_clear(caught.value)
        assert await storage.exists("there.txt")
        with pytest.raises(DeadlineExceeded):
            await save
        hung.release.set()
    found = await assert_sound(tmp_path, "other")
    assert found == {"there.txt": b"there", "fast.txt": b"fast"}


async def test_a_fifo_in_the_place_of_a_file_is_not_waited_for(tmp_path: Path) -> None:
    async with asyncio.timeout(SAFETY), storage_in(tmp_path) as storage:
        await storage.save("a.txt", b"a")
        (tmp_path / "files/a.txt").unlink()
        os.mkfifo(tmp_path / "files/a.txt")
        os.mkfifo(tmp_path / "files/new.txt")
        with pytest.raises(IntegrityError) as caught:
            await storage.open("a.txt")
        assert_clear(caught.value, path="a.txt")
        assert await storage.save("new.txt", b"new") == "new.txt"
        async with storage.open("new.txt") as file:
            assert await file.read() == b"new"
        with pytest.raises(NotFound):
            await storage.adopt("a.txt", name="adopted.txt")
        await storage.delete("a.txt")
        await storage.delete("new.txt")
        for fifo in ("a.txt", "new.txt"):  # theirs: not touched
            assert (tmp_path / "files" / fifo).is_fifo()
    assert await assert_sound(tmp_path) == {}
