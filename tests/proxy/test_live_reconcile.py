"""Saves that live on beside a reconcile, hosts with a wrong clock, frozen processes, writes that land too late."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from aproxy_storage import Conflict, DeadlineExceeded, NotFound, ProxyStorage, Source
from aproxy_storage.backends.filesystem import FileSystemBackend
from aproxy_storage.tools.reconcile import Report, reconcile
from tests.proxy.support import SAFETY, assert_sound, on_disk, process, storage_in

pytestmark = pytest.mark.asyncio

LEASE = 1.0  # short, so that uploads outlive it; renewed after a third of it, on a busy machine too
OPTIONS = {"lease": LEASE, "settle": 0.2}


async def lines(count: int, *, over: float) -> AsyncIterator[bytes]:
    """Give `count` lines, spread over so many seconds: content that outlives a lease."""
    for number in range(count):
        yield f"line {number}\n".encode()
        await asyncio.sleep(over / count)


LINES = b"".join(f"line {number}\n".encode() for number in range(10))


@contextlib.asynccontextmanager
async def reconciling(storage: ProxyStorage) -> AsyncIterator[Report]:
    """Reconcile over and over while the block runs; give what was found so far."""
    total = Report(dry_run=False)

    async def loop() -> None:
        while True:
            report = await reconcile(storage, dry_run=False, scan=True)
            for finding in report.findings:
                total.add(finding)
            await asyncio.sleep(0.02)

    task = asyncio.ensure_future(loop())
    try:
        yield total
    finally:
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task


# -- live


@pytest.mark.parametrize("keys", ["path", "token"])
async def test_a_slow_upload_outlives_its_lease_beside_reconcile(tmp_path: Path, keys: Any) -> None:
    async with (
        asyncio.timeout(SAFETY),
        storage_in(tmp_path, keys=keys, **OPTIONS) as storage,
        storage_in(tmp_path, keys=keys, **OPTIONS) as other,
        reconciling(other) as found,
    ):
        assert await storage.save("slow.txt", lines(10, over=2 * LEASE)) == "slow.txt"
    assert not found.counts.keys() - {"young"}
    assert await assert_sound(tmp_path) == {"slow.txt": LINES}


async def test_a_slow_replacement_outlives_its_lease_while_others_change_its_record(tmp_path: Path) -> None:
    """Every change of the record moves the version that a renewal compares."""
    async with (
        asyncio.timeout(SAFETY),
        storage_in(tmp_path, **OPTIONS, keep_replaced=0.1) as storage,
        storage_in(tmp_path, **OPTIONS, keep_replaced=0.1) as other,
    ):
        path = await storage.save("a.txt", b"first")
        begun = asyncio.Event()

        async def content() -> AsyncIterator[bytes]:
            begun.set()
            async for line in lines(10, over=2.5 * LEASE):
                yield line

        async with reconciling(other):
            slow = asyncio.ensure_future(storage.replace(path, content()))
            await begun.wait()
            await other.replace(path, b"second")  # quick, and done long before
            await slow
    assert await assert_sound(tmp_path) == {"a.txt": LINES}


async def test_a_slow_upload_beside_reconcile_in_another_process(tmp_path: Path) -> None:
    async with asyncio.timeout(SAFETY), process("reconcile_in_a_loop", tmp_path, **OPTIONS) as other:
        await other.expect("ready")
        async with storage_in(tmp_path, **OPTIONS) as storage:
            assert await storage.save("slow.txt", lines(10, over=2 * LEASE)) == "slow.txt"
        await other.tell("stop")
        rounds, counts = await other.hear()
        assert not await other.end()
        assert rounds > 0
        assert not counts.keys() - {"young"}
    assert await assert_sound(tmp_path) == {"slow.txt": LINES}


async def test_reconcilers_whose_clocks_are_off_undo_nothing(tmp_path: Path) -> None:
    async with (
        asyncio.timeout(SAFETY),
        process("reconcile_in_a_loop", tmp_path, hours_off=2.0, **OPTIONS) as ahead,
        process("reconcile_in_a_loop", tmp_path, hours_off=-2.0, **OPTIONS) as behind,
    ):
        await ahead.expect("ready")
        await behind.expect("ready")
        async with storage_in(tmp_path, **OPTIONS) as storage:
            await storage.save("slow.txt", lines(10, over=2 * LEASE))
        for other in (ahead, behind):
            await other.tell("stop")
            rounds, counts = await other.hear()
            assert not await other.end()
            assert rounds > 0
            assert not counts.keys() - {"young"}
    assert await assert_sound(tmp_path) == {"slow.txt": LINES}


async def test_savers_whose_clocks_are_off_are_not_undone(tmp_path: Path) -> None:
    async with (
        asyncio.timeout(SAFETY),
        process("upload_with_wrong_clock", tmp_path, name="ahead.txt", hours_off=2.0, **OPTIONS) as ahead,
        process("upload_with_wrong_clock", tmp_path, name="behind.txt", hours_off=-2.0, **OPTIONS) as behind,
        storage_in(tmp_path, **OPTIONS) as storage,
        reconciling(storage) as found,
    ):
        await ahead.expect("ready")
        await behind.expect("ready")
        for number in range(10):
            for saver in (ahead, behind):
                await saver.tell(f"line {number}\n")
                await saver.expect("taken")
            await asyncio.sleep(2 * LEASE / 10)
        for saver, name in ((ahead, "ahead.txt"), (behind, "behind.txt")):
            await saver.tell("end")
            await saver.expect(["saved", name])
            await saver.expect("bye")
            assert not await saver.end()
        assert not found.counts.keys() - {"young"}
    assert await assert_sound(tmp_path) == {"ahead.txt": LINES, "behind.txt": LINES}


# -- frozen


async def until_undone(found: Report, *actions: str) -> None:
    """Wait until the reconcile has done one of `actions`."""
    while not found.counts.keys() & set(actions):  # noqa: ASYNC110
        await asyncio.sleep(0.02)


@pytest.mark.parametrize("settled", [False, True], ids=["undone", "undone and settled"])
async def test_a_process_frozen_for_longer_than_its_lease(tmp_path: Path, settled: bool) -> None:
    """Woken up, it finds that its save was undone, and leaves nothing; nor does it touch what is there now."""
    options = {"lease": LEASE, "settle": 0.2 if settled else 900.0}
    async with (
        asyncio.timeout(SAFETY),
        process("upload", tmp_path, name="a.txt", **options) as saver,
        storage_in(tmp_path, **options) as storage,
    ):
        await saver.expect("ready")
        await saver.tell("from before the frost\n")
        await saver.expect("taken")
        os.kill(saver.pid, signal.SIGSTOP)
        async with reconciling(storage) as found:
            await until_undone(found, *(["undone", "deleted"] if settled else ["settling"]))
        path = await storage.save("a.txt", b"new")
        assert (path == "a.txt") is settled  # while anything may still land there, nobody else gets the name
        os.kill(saver.pid, signal.SIGCONT)
        await saver.tell("end")
        kind, _ = await saver.hear()
        assert kind == "Conflict"
        await saver.expect("bye")
        await saver.end()
        async with storage.open(path) as file:
            assert await file.read() == b"new"
    assert await assert_sound(tmp_path) == {path: b"new"}


async def test_a_process_frozen_for_longer_than_its_lease_that_nobody_has_noticed(tmp_path: Path) -> None:
    async with asyncio.timeout(SAFETY), process("upload", tmp_path, name="a.txt", **OPTIONS) as saver:
        await saver.expect("ready")
        await saver.tell("all of it")
        await saver.expect("taken")
        os.kill(saver.pid, signal.SIGSTOP)
        await asyncio.sleep(2 * LEASE)
        os.kill(saver.pid, signal.SIGCONT)
        await saver.tell("end")
        outcome, _ = await saver.hear()
        await saver.expect("bye")
        await saver.end()
    expected = {"a.txt": b"all of it"} if outcome == "saved" else {}
    assert await assert_sound(tmp_path) == expected


async def test_a_killed_process_is_undone_when_its_lease_is_over(tmp_path: Path) -> None:
    async with (
        asyncio.timeout(SAFETY),
        process("upload", tmp_path, name="a.txt", **OPTIONS) as saver,
        storage_in(tmp_path, **OPTIONS) as storage,
    ):
        await saver.expect("ready")
        await saver.tell("half of it\n")
        await saver.expect("taken")
        await saver.kill()
        async with reconciling(storage) as found:
            await until_undone(found, "undone", "deleted")
        assert await storage.meta.count() == 0
        assert on_disk(tmp_path) == {}
        assert await storage.save("a.txt", b"again") == "a.txt"
    assert await assert_sound(tmp_path) == {"a.txt": b"again"}


# -- writes that land after their undo


class Late(FileSystemBackend):
    """Its next write ends without an answer and lands when told to."""

    armed = False

    async def write(self, key: str, source: Any, **kwargs: Any) -> Any:
        if not self.armed:
            return await super().write(key, source, **kwargs)
        self.armed = False
        data = b"".join([chunk async for chunk in source.chunks()])
        self.land = lambda: super(Late, self).write(key, Source.of(data), **kwargs)
        raise DeadlineExceeded(f"no answer to the write of {key!r}", outcome_unknown=True)


@pytest.mark.parametrize("keys", ["path", "token"])
async def test_a_write_that_lands_after_its_undo(tmp_path: Path, keys: Any) -> None:
    original = Late(tmp_path / "files")
    async with (
        asyncio.timeout(SAFETY),
        storage_in(tmp_path, original=original, keys=keys, lease=2.0, settle=0.2) as storage,
    ):
        original.armed = True
        with pytest.raises(DeadlineExceeded):
            await storage.save("a.txt", b"late")
        assert not await storage.exists("a.txt")
        # The name is not free: the bytes may still land under its key.
        assert await storage.save("a.txt", b"again") != "a.txt"
        await original.land()
        assert b"late" in on_disk(tmp_path).values()
        assert not await storage.exists("a.txt")
        with pytest.raises(NotFound):
            await storage.get("a.txt")
        assert [record.size async for record in storage.list()] == [5]
        with pytest.raises(NotFound):
            async with storage.open("a.txt"):
                pass
        async with reconciling(storage) as found:
            await until_undone(found, "deleted")
        assert list(on_disk(tmp_path).values()) == [b"again"]
        assert await storage.save("a.txt", b"third") == "a.txt"
    assert sorted((await assert_sound(tmp_path)).values()) == [b"again", b"third"]


async def test_a_replacement_that_lands_after_its_undo(tmp_path: Path) -> None:
    original = Late(tmp_path / "files")
    options = {"lease": 1.0, "settle": 0.2, "keep_replaced": 0.1}
    async with asyncio.timeout(SAFETY), storage_in(tmp_path, original=original, **options) as storage:
        path = await storage.save("a.txt", b"old")
        original.armed = True
        with pytest.raises(DeadlineExceeded):
            await storage.replace(path, b"late")
        await original.land()
        async with storage.open(path) as file:
            assert await file.read() == b"old"
        async with reconciling(storage) as found:
            await until_undone(found, "cleared")
        assert on_disk(tmp_path) == {"a.txt": b"old"}
        assert (await storage.get(path)).lease is None
    assert await assert_sound(tmp_path) == {"a.txt": b"old"}


# -- what is replaced


class LateDiscard(FileSystemBackend):
    """Its next discard ends without an answer and lands when told to."""

    armed = False

    async def discard(self, key: str, **kwargs: Any) -> None:
        if not self.armed:
            return await super().discard(key, **kwargs)
        self.armed = False
        self.land = lambda: super(LateDiscard, self).discard(key, **kwargs)
        raise DeadlineExceeded(f"no answer to the discard of {key!r}", outcome_unknown=True)


async def test_a_discard_of_replaced_bytes_that_lands_late_hits_no_other_file(tmp_path: Path) -> None:
    """The key of the first bytes is as the path was; once the file has another path, a new one would like it."""
    original = LateDiscard(tmp_path / "files")
    async with asyncio.timeout(SAFETY), storage_in(tmp_path, original=original, keep_replaced=0.0) as storage:
        await storage.save("a.txt", b"old")
        original.armed = True
        await storage.replace("a.txt", b"new")
        async with storage_in(tmp_path, keep_replaced=0.0) as other:
            await reconcile(other, dry_run=False)
            await other.rename("a.txt", "b.txt")
            assert await other.save("a.txt", b"another") == "a.txt"
        await original.land()
        async with storage.open("a.txt") as file:
            assert await file.read() == b"another"
    assert await assert_sound(tmp_path) == {"a.txt": b"another", "b.txt": b"new"}


async def test_replaced_bytes_stay_for_open_handles_and_go_afterwards(tmp_path: Path) -> None:
    async with asyncio.timeout(SAFETY), storage_in(tmp_path, chunk_bytes=4) as storage:
        path = await storage.save("a.txt", b"old bytes of the file")
        async with storage.open(path) as handle, storage.open(path) as seeking:
            assert await handle.read(4) == b"old "
            await storage.replace(path, b"new")
            assert await storage.tidy() == 0
            assert len(on_disk(tmp_path)) == 2
            assert await handle.read() == b"bytes of the file"
            await seeking.seek(4)  # opens the key anew
            assert await seeking.read(5) == b"bytes"
            async with storage.open(path) as file:
                assert await file.read() == b"new"
            # The time is over, as far as this is concerned.
            assert (await reconcile(storage, dry_run=False, force=True)).counts == {"cleared": 1}
            assert list(on_disk(tmp_path).values()) == [b"new"]
            await seeking.seek(0)
            with pytest.raises(Conflict, match=r"a\.txt"):
                await seeking.read()
    assert await assert_sound(tmp_path) == {"a.txt": b"new"}


async def test_tidy_and_aclose_clear_what_was_replaced(tmp_path: Path) -> None:
    async with asyncio.timeout(SAFETY):
        for clear in ("tidy", "aclose"):
            async with storage_in(tmp_path, keep_replaced=0.05) as storage:
                path = await storage.save(f"{clear}.txt", b"old")
                await storage.replace(path, b"new")
                await asyncio.sleep(0.1)
                if clear == "tidy":
                    assert await storage.tidy() == 1
                    assert b"old" not in on_disk(tmp_path).values()
            assert b"old" not in on_disk(tmp_path).values()
    assert await assert_sound(tmp_path) == {"tidy.txt": b"new", "aclose.txt": b"new"}
