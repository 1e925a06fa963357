"""Replicate: several originals from one pass, a quorum, and copies that reconcile makes and takes away."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest

from aproxy_storage import (
    AccessDenied,
    BackendUnavailable,
    Breaker,
    ConfigurationError,
    ContentError,
    DeadlineExceeded,
    Fallback,
    First,
    IntegrityError,
    NotFound,
    OutOfSpace,
    Placement,
    ProxyStorage,
    Replicate,
)
from aproxy_storage.backends.filesystem import FileSystemBackend
from aproxy_storage.content import Source
from aproxy_storage.mending import mend
from aproxy_storage.meta_backends.memory import MemoryMetaBackend
from aproxy_storage.meta_backends.sqlite import SQLiteMetaBackend
from aproxy_storage.testing.faults import Fail, Fault, Hang, Late, Lie, Slow, at
from aproxy_storage.tools.reconcile import reconcile
from tests.placement.support import World, content_of, once, run
from tests.placement.test_limits import slowly, taken

DOWN = Fail(BackendUnavailable("out of order"))
MEBIBYTE = 1 << 20


async def copies(world: World, path: str) -> list[str]:
    return [place.original for place in (await world.storage.get(path)).good_places()]


@pytest.mark.parametrize(
    "content", [b"", b"small", b"l" * (3 * MEBIBYTE), "once", "declared"], ids=lambda each: str(each)[:5]
)
def test_every_copy_is_whole_and_named(content: Any) -> None:
    async def main() -> None:
        async with World(Replicate(2), "abc") as world:
            data = b"once" * 200_000 if isinstance(content, str) else content
            size = len(data) if content == "declared" else None
            path = await world.storage.save("x", once(data) if isinstance(content, str) else data, size=size)
            record = await world.storage.get(path)
            assert [(place.original, place.key, place.state) for place in record.all_places()] == [
                ("a", "x", "good"), ("b", "x", "good"),
            ]  # fmt: skip
            assert record.lease is None
            assert record.size == len(data)
            for name in "ab":
                async with world.inner[name].read("x") as reading:
                    assert b"".join([chunk async for chunk in reading]) == data
            assert await content_of(world.storage, path) == data
            assert await world.keys("c") == []
            await world.assert_clean()

    asyncio.run(main())


def test_one_pass_over_the_content() -> None:
    async def main() -> None:
        passes = 0

        async def content() -> AsyncIterator[bytes]:
            nonlocal passes
            passes += 1
            for _ in range(30):
                yield b"x" * 100_000

        async with World(Replicate(3), "abc") as world:
            await world.storage.save("x", content())
            assert passes == 1
            assert await copies(world, "x") == ["a", "b", "c"]

    asyncio.run(main())


def test_an_original_that_is_away_costs_a_copy_and_no_save() -> None:
    async def main() -> None:
        for content in (b"1", b"1" * MEBIBYTE):
            async with World(Replicate(2), "ab") as world:
                world.plan["a"].set(write=DOWN)
                await world.storage.save("x", content)
                assert await copies(world, "x") == ["b"]
                assert (await world.storage.get("x")).places == ()
                await world.assert_clean()
                assert await copies(world, "x") == ["b", "a"], "reconcile has made the missing one"

    asyncio.run(main())


def test_below_the_quorum_the_save_fails_and_leaves_nothing() -> None:
    async def main() -> None:
        for content in (b"1", b"1" * MEBIBYTE):
            for fault in (DOWN, Lie(), Fail(OutOfSpace("full"))):
                async with World(Replicate(3, quorum=2), "abc") as world:
                    world.plan["a"].set(write=fault)
                    world.plan["c"].set(write=DOWN)
                    with pytest.raises((BackendUnavailable, OutOfSpace)) as caught:
                        await world.storage.save("x", content)
                    assert len(caught.value.attempts) == 1
                    with pytest.raises(NotFound):
                        await world.storage.get("x")
                    await world.assert_clean()
                    assert await world.meta.count() == 0

    asyncio.run(main())


@pytest.mark.parametrize("how", ["below the quorum", "cancelled", "taken at one"])
def test_inside_a_transaction_a_save_that_fails_leaves_no_copy_without_a_record(how: str) -> None:
    class InTransaction(MemoryMetaBackend):
        async def reserve(self, *args: Any, **options: Any) -> None:
            return None

    async def main() -> None:
        async with World(Replicate(3, quorum=3, breaker=None), "abc") as world:
            world.storage.meta = world.storage.journal.meta = InTransaction()
            lagging = Hang()
            world.plan["c"].set(write=lagging)
            saving = asyncio.ensure_future(world.storage.save("x", b"1"))
            await lagging.reached.wait()
            await asyncio.sleep(1)  # of the loop's own time: the two other copies are done, and known to be
            assert [await world.keys(name) for name in "ab"] == [["x"], ["x"]]
            if how == "taken at one":
                await world.inner["c"].write("x", b"somebody else's")
                lagging.release()
            elif how == "cancelled":
                saving.cancel()  # otherwise the attempt comes to its timeout
            await asyncio.wait([saving])
            if how == "taken at one":
                assert await saving != "x", "a taken key means a taken name"
                await world.storage.delete(saving.result())
            else:
                assert saving.cancelled() or isinstance(saving.exception(), BackendUnavailable)
            assert [await world.keys(name) for name in "ab"] == [[], []]
            assert await world.keys("c") == (["x"] if how == "taken at one" else [])

    run(main())


def test_what_an_original_refuses_is_raised_at_once() -> None:
    async def main() -> None:
        async with World(Replicate(2), "ab") as world:
            world.plan["a"].set(write=Fail(AccessDenied("no")))
            world.plan["b"].set(write=Hang())
            with pytest.raises(AccessDenied):
                await world.storage.save("x", b"1")
            await world.assert_clean()
            assert await world.meta.count() == 0

    run(main())


def test_a_content_that_fails_leaves_nothing() -> None:
    async def failing() -> AsyncIterator[bytes]:
        yield b"x" * 500_000
        raise OSError("the caller's disk")

    async def main() -> None:
        async with World(Replicate(2), "ab") as world:
            for content, size in ((failing(), None), (once(b"short"), 6), (once(b"l" * 600_000), 599_999)):
                with pytest.raises(ContentError):
                    await world.storage.save("x", content, size=size)
            assert all(outcome in ("aborted", "cancelled") for _, outcome in world.outcomes())
            await world.assert_clean()
            assert await world.meta.count() == 0

    asyncio.run(main())


def test_a_hung_original_is_dropped_after_its_attempt_timeout() -> None:
    async def main() -> None:
        async with World(Replicate(2, attempt_timeout=5, breaker=Breaker(failures=1, reset_after=60))) as world:
            world.plan["a"].set(write=Hang())
            assert await taken(world.storage.save("x", b"1")) == 5
            record = await world.storage.get("x")
            assert record.original_storage_name == "b"
            assert [(place.original, place.state) for place in record.places] == [("a", "doubtful")]
            assert await taken(world.storage.save("y", b"1")) == 0, "its circuit is open"
            await asyncio.sleep(60)
            await world.assert_clean()
            assert sorted(await copies(world, "x")) == ["a", "b"]

    run(main())


def test_a_save_returns_at_the_deadline_if_the_quorum_has_it() -> None:
    async def main() -> None:
        async with World(Replicate(3, quorum=2, deadline=4, attempt_timeout=100, breaker=None), "abc") as world:
            world.plan["b"].set(write=Slow(50))
            assert await taken(world.storage.save("x", b"1")) == 4
            assert await copies(world, "x") == ["a", "c"]
            wrote = world.outcomes()
            await asyncio.sleep(200)
            assert world.outcomes() == wrote, "nothing goes on after the return"
            assert await world.keys("b") == []
            world.plan["c"].set(write=Slow(50))
            with pytest.raises(BackendUnavailable, match="1 of 3 copies were done at the deadline of 4 seconds"):
                await world.storage.save("y", b"1")
            await world.assert_clean()
            assert await world.meta.count() == 1

    run(main())


def test_the_deadline_holds_for_one_copy_too() -> None:
    async def main() -> None:
        async with World(Replicate(2, deadline=4, attempt_timeout=100, breaker=None)) as world:
            world.plan["a"].set(write=Slow(50))
            with pytest.raises(DeadlineExceeded, match="deadline of 4 seconds"):
                await world.storage.save("x", b"1", using="a")
            assert asyncio.get_running_loop().time() < 5
            await world.assert_clean()
            assert await world.meta.count() == 0

    run(main())


class AnswersLate(Fault):
    """The service does its work at once, and says so after `seconds`."""

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds

    async def __call__(self, call: Callable[[], Awaitable[Any]]) -> Any:
        answer = await call()
        await asyncio.sleep(self.seconds)
        return answer


def test_the_deadline_cuts_no_change_of_the_record_short() -> None:
    """Else the record has moved on without the save knowing, and its commit is a Conflict."""

    async def main() -> None:
        async with World(Replicate(2, quorum=1, deadline=4, attempt_timeout=100, breaker=None)) as world:
            await world.inner["b"].write("x", b"foreign")
            world.plan["b"].set(write=[None, Hang()])  # taken; then under a key that was named meanwhile
            world.meta_plan.set(update=[AnswersLate(10)])
            assert await world.storage.save("x", b"1") == "x"
            assert await copies(world, "x") == ["a"]
            await world.inner["b"].discard("x")
            world.heal()
            await world.reconcile()
            await world.assert_clean()
            assert await copies(world, "x") == ["a", "b"]

    run(main())


class TakesChunks(Fault):
    """Stands for an original that takes `seconds` for each chunk, or no more than `most`."""

    def __init__(self, seconds: float = 0.0, most: int | None = None) -> None:
        self.seconds, self.most = seconds, most
        self.taken = 0

    def install(self, backend: Any) -> None:
        plain = backend._write

        async def write(key: str, source: Source, **options: Any) -> Any:
            parts = []
            async for chunk in source.chunks():
                parts.append(chunk)
                self.taken += 1
                if self.taken == self.most:
                    await asyncio.Event().wait()
                await asyncio.sleep(self.seconds)
            return await plain(key, Source.of(b"".join(parts)), **options)

        backend._write = write


def test_a_slow_original_holds_the_others_up_no_further_than_its_buffer() -> None:
    async def main() -> None:
        async with World(Replicate(2, attempt_timeout=5, breaker=None), chunk_bytes=1000, checksum=None) as world:
            fast, slow = TakesChunks(), TakesChunks(most=2)
            fast.install(world.inner["a"])
            slow.install(world.inner["b"])
            saving = asyncio.ensure_future(world.storage.save("x", slowly(50, 0.001, 1000), content_type="a/b"))
            await asyncio.sleep(3)
            assert slow.taken == 2
            assert fast.taken == 2 + 4 + 1, "four chunks are held for the slow one, and one is in hand"
            await saving
            assert asyncio.get_running_loop().time() < 6, "then it is dropped, and the others go on"
            assert await copies(world, "x") == ["a"]

    run(main())


@pytest.mark.parametrize("quorum", [1, 2])
@pytest.mark.parametrize("size", [1, MEBIBYTE, None], ids=["small", "large", "stream"])
def test_who_does_not_get_to_probe_an_original_takes_the_next_one(quorum: int, size: int | None) -> None:
    async def main() -> None:
        placement = Replicate(2, quorum, breaker=Breaker(failures=1, reset_after=60))
        async with World(placement, "abc") as world:
            world.plan["a"].set(write=DOWN)
            with contextlib.suppress(BackendUnavailable):
                await world.storage.save("first", b"1")
            world.plan["a"].set(write=Slow(1))
            await asyncio.sleep(60)
            contents = [once(b"12345") if size is None else b"1" * size for _ in range(6)]
            paths = await asyncio.gather(*(world.storage.save("x", content) for content in contents))
            found = [await copies(world, path) for path in paths]
            assert sorted(found) == [["a", "b"], *[["b", "c"]] * 5]
            assert await copies(world, await world.storage.save("x", b"1")) == ["a", "b"], "it is back"

    run(main())


def test_an_attempt_that_was_let_in_and_never_started_leaves_the_probe_to_the_next() -> None:
    async def main() -> None:
        placement = Replicate(2, 2, breaker=Breaker(failures=1, reset_after=60))
        async with World(placement, "ab") as world:
            gates = world.storage.gates
            gates["a"].finish(gates["a"].start("write"), "failed")
            await asyncio.sleep(60)
            gates["b"].finish(gates["b"].start("write"), "failed")
            with pytest.raises(BackendUnavailable, match="1 of 2 originals"):
                await world.storage.save("x", b"1")
            await asyncio.sleep(59)
            assert gates["a"].allows("write")
            await asyncio.sleep(1)
            for ticks in range(20):
                saving = asyncio.ensure_future(world.storage.save("x", b"1"))
                for _ in range(ticks):
                    await asyncio.sleep(0)
                saving.cancel()
                await asyncio.wait([saving])
                assert [gate.traffic("write").in_flight for gate in gates.values()] == [0, 0]
                assert [gate.allows("write") for gate in gates.values()] == [True, True]
            await world.assert_clean()

    run(main())


def test_slow_but_steady_is_waited_for() -> None:
    async def main() -> None:
        async with World(Replicate(2, attempt_timeout=5), chunk_bytes=1000, checksum=None) as world:
            TakesChunks().install(world.inner["a"])
            TakesChunks(seconds=4).install(world.inner["b"])
            await world.storage.save("x", slowly(30, 0.001, 1000), content_type="a/b")
            assert await copies(world, "x") == ["a", "b"]
            assert asyncio.get_running_loop().time() > 100

    run(main())


@pytest.mark.parametrize("ticks", range(20))
def test_a_cancelled_save_leaves_nothing(ticks: int) -> None:
    async def main() -> None:
        async with World(Replicate(3), "abc") as world:
            world.plan["b"].set(write=Slow(1))
            world.plan["c"].set(write=Hang())
            saving = asyncio.ensure_future(world.storage.save("x", b"1"))
            if ticks % 2:
                await asyncio.sleep(1)
            for _ in range(ticks):
                await asyncio.sleep(0)
            saving.cancel()
            await asyncio.wait([saving])
            assert saving.cancelled()
            await world.assert_clean()
            assert await world.meta.count() == 0

    run(main())


def test_foreign_files_at_the_keys_are_left_alone() -> None:
    async def main() -> None:
        for content in (b"1", b"1" * MEBIBYTE):
            async with World(Replicate(2)) as world:
                await world.inner["b"].write("x", b"somebody else's")
                await world.storage.save("x", content)
                record = await world.storage.get("x")
                assert [place.original for place in record.good_places()] == ["a", "b"]
                assert record.places[0].key != "x"
                async with world.inner["b"].read("x") as reading:
                    assert reading.data == b"somebody else's"
                await world.storage.delete("x")
                assert (await world.keys("a"), await world.keys("b")) == ([], ["x"])

    asyncio.run(main())


@pytest.mark.parametrize("size", [10, None], ids=["bytes", "stream"])
def test_a_key_taken_between_the_look_and_the_write_costs_a_stream_one_copy(size: int | None) -> None:
    async def main() -> None:
        async with World(Replicate(3, 1), "abc") as world:

            async def take() -> None:
                world.heal()
                await world.inner["c"].write("x", b"somebody else's")

            world.plan["c"].set(write=Meanwhile(take))
            assert await world.storage.save("x", once(b"1" * 10) if size is None else b"1" * size) == "x"
            assert await copies(world, "x") == ["a", "b", *(["c"] if size else [])]
            assert await content_of(world.storage, "x") == b"1" * 10
            async with world.inner["c"].read("x") as reading:
                assert reading.data == b"somebody else's"

    run(main())


@pytest.mark.asyncio
@pytest.mark.parametrize("placement", [First(), Fallback(), Replicate(2)], ids=lambda each: type(each).__name__)
@pytest.mark.parametrize("what", ["directory", "link"])
async def test_a_stream_is_not_spent_on_a_key_that_something_else_has(
    what: str, placement: Placement, tmp_path: Path
) -> None:
    originals = {name: FileSystemBackend(tmp_path / name) for name in "ab"}
    async with ProxyStorage("media", originals=originals, meta=MemoryMetaBackend(), placement=placement) as storage:
        await originals["a"].write("inner/file", b"1")
        if what == "link":
            (tmp_path / "a" / "x").symlink_to("/dev/null")
        path = await storage.save("inner" if what == "directory" else "x", once(b"content"))
        record = await storage.get(path)
        assert record.original_storage_path != path
        assert len(record.good_places()) == placement.limits.copies
        assert await content_of(storage, path) == b"content"


def test_too_few_originals_are_said_before_anything_is_written() -> None:
    async def main() -> None:
        async with World(Replicate(3), "ab") as world:
            with pytest.raises(ConfigurationError, match="copies=3"):
                await world.storage.save("x", b"1")
            assert await world.meta.count() == 0

    run(main())


def test_using_one_original_makes_one_copy_and_reconcile_the_other() -> None:
    async def main() -> None:
        async with World(Replicate(2), "abc") as world:
            await world.storage.save("x", b"1", using="c")
            assert await copies(world, "x") == ["c"]
            await world.assert_clean()
            assert await copies(world, "x") == ["c", "a"]

    run(main())


def test_replace_copy_move_delete_and_rename_of_a_replicated_file() -> None:
    async def main() -> None:
        async with World(Replicate(2), "abc", keep_replaced=0.0) as world:
            await world.storage.save("x", b"old")
            await world.storage.replace("x", b"new")
            assert await copies(world, "x") == ["a", "b"]
            assert [len(await world.keys(name)) for name in "abc"] == [1, 1, 0]
            assert await world.storage.copy("x", "y") == "y"
            assert await copies(world, "y") == ["a", "b"]
            writes = world.plan["b"].calls["write"]
            await world.storage.move("y", "b")  # a copy is there already: no byte moves
            assert await copies(world, "y") == ["b"]
            assert world.plan["b"].calls["write"] == writes
            await world.storage.move("x", "c")
            assert await copies(world, "x") == ["c", "b"]
            await world.storage.rename("x", "z")
            for path in ("y", "z"):
                assert await content_of(world.storage, path) == b"new"
            await world.assert_clean()
            assert len(await copies(world, "y")) == len(await copies(world, "z")) == 2
            for path in ("y", "z"):
                assert await content_of(world.storage, path) == b"new"
                await world.storage.delete(path)
            await world.assert_clean()
            assert [await world.keys(name) for name in "abc"] == [[], [], []]

    run(main())


def test_a_copy_of_a_file_reads_from_whichever_copy_answers() -> None:
    async def main() -> None:
        async with World(Replicate(2), "abc") as world:
            await world.storage.save("x", b"1" * 5000)
            world.plan["a"].set(read=DOWN, copy=DOWN)
            await world.storage.copy("x", "y", using="c")
            assert await content_of(world.storage, "y") == b"1" * 5000
            await world.storage.move("x", "c")
            assert await content_of(world.storage, "x") == b"1" * 5000

    run(main())


# -- reconcile


def test_reconcile_makes_a_copy_that_was_lost_and_names_it() -> None:
    async def main() -> None:
        async with World(Replicate(2), "abc") as world:
            await world.storage.save("x", b"1")
            await world.inner["a"].discard("x")
            dry = await reconcile(world.storage)
            assert dry.counts == {"missing": 1, "copied": 1}
            assert await copies(world, "x") == ["a", "b"], "a dry run changes nothing"
            report = await world.reconcile(force=False)
            assert report.counts == {"missing": 1, "copied": 1}
            assert await copies(world, "x") == ["b", "a"]
            assert len(await world.keys("a")) == 1
            await world.assert_clean()
            world.plan["b"].set(read=DOWN)
            assert await content_of(world.storage, "x") == b"1"

    run(main())


def test_reconcile_makes_no_copy_of_a_damaged_one() -> None:
    """The source is compared with the recorded checksum before the new copy counts."""

    async def main() -> None:
        async with World(Replicate(3, quorum=1), "abc") as world:
            world.plan["c"].set(write=DOWN)
            await world.storage.save("x", b"good")
            await world.inner["a"].discard("x")
            await world.inner["a"].write("x", b"evil")
            world.heal()
            report = await world.reconcile(force=False)
            assert report.counts == {"damaged": 1, "copied": 1}
            assert not report.clean
            key = next(place.key for place in (await world.storage.get("x")).good_places() if place.original == "c")
            async with world.inner["c"].read(key) as reading:
                assert reading.data == b"good"
            assert len(await world.keys("c")) == 1

    run(main())


def test_reconcile_without_a_whole_copy_throws_nothing_away() -> None:
    async def main() -> None:
        async with World(Replicate(2), "ab") as world:
            world.plan["b"].set(write=DOWN)
            await world.storage.save("x", b"good")
            await world.inner["a"].discard("x")
            await world.inner["a"].write("x", b"evil")
            world.heal()
            report = await world.reconcile(force=False)
            assert report.counts == {"damaged": 1, "failed": 1}
            assert (await world.keys("a"), await world.keys("b")) == (["x"], [])
            await world.inner["a"].discard("x")
            assert (await world.reconcile(force=False)).counts == {"missing": 1, "lost": 1}
            assert await copies(world, "x") == ["a"], "the record still says where it was"

    run(main())


@pytest.mark.parametrize("dry_run", [True, False])
@pytest.mark.parametrize("how", ["gone", "cut"])
def test_reconcile_says_that_a_file_is_lost(how: str, dry_run: bool) -> None:
    async def main() -> None:
        async with World(Replicate(2)) as world:
            await world.storage.save("x", b"1")
            await world.storage.save("y", b"22")
            for name in "ab":
                await world.inner[name].discard("y")
                if how == "cut":
                    await world.inner[name].write("y", b"2")
            report = await reconcile(world.storage, dry_run=dry_run)
            assert report.counts == {"missing" if how == "gone" else "damaged": 2, "lost": 1}
            assert not report.clean
            (lost,) = [finding for finding in report.findings if finding.action == "lost"]
            assert lost.path == "y"
            assert isinstance(lost.error, IntegrityError)
            world.plan["b"].set(stat=DOWN)
            report = await reconcile(world.storage, dry_run=dry_run)
            assert "lost" not in report.counts, "the copy that is out of reach may be there"

    run(main())


@pytest.mark.parametrize("dry_run", [True, False])
@pytest.mark.parametrize("lost", ["a", "ab"])
@pytest.mark.parametrize("what", ["deleted", "replaced", "saved anew"])
def test_reconcile_misses_nothing_of_a_file_that_was_changed_meanwhile(what: str, lost: str, dry_run: bool) -> None:
    async def main() -> None:
        async with World(Replicate(2), keep_replaced=0.0) as world:
            await world.storage.save("x", b"1")
            record = await world.storage.get("x")
            if what == "replaced":
                await world.storage.replace("x", b"2")
            else:
                await world.storage.delete("x")
            if lost == "a":  # it has been looked at before the other copy was removed
                await world.inner["b"].write("x", b"1")
            elif what == "saved anew":
                await world.storage.save("x", b"2")
                for name in "ab":
                    await world.inner[name].discard("x")
            assert [each.action for each in await mend(world.storage, record, dry_run=dry_run)] == ["moved on"]

    run(main())


def test_reconcile_that_cannot_ask_whether_a_file_is_still_there_goes_on() -> None:
    async def main() -> None:
        async with World(Replicate(2)) as world:
            for name in "xy":
                await world.storage.save(name, b"1")
                await world.inner["a"].discard(name)
            world.meta_plan.set(get=at(1, DOWN))
            report = await world.reconcile(force=False)
            assert report.counts == {"failed": 1, "missing": 1, "copied": 1}

    run(main())


def test_reconcile_removes_surplus_copies_after_they_were_kept() -> None:
    async def main() -> None:
        async with World(Replicate(3), "abc") as world:
            await world.storage.save("x", b"1")
            world.storage.placement = Replicate(2, order=["b", "c", "a"])
            report = await world.reconcile(force=False)
            assert report.counts == {"dropped": 1}
            assert await copies(world, "x") == ["a", "b"], "the primary one stays, then the nearest"
            assert [len(await world.keys(name)) for name in "abc"] == [1, 1, 1], "kept for those who read it"
            await world.assert_clean()
            assert [len(await world.keys(name)) for name in "abc"] == [1, 1, 0]
            world.storage.placement = Replicate(2, order=["b", "c"])
            await world.assert_clean()
            assert sorted(await copies(world, "x")) == ["b", "c"], "copies leave an original that is not in the order"

    run(main())


def test_reconcile_makes_nothing_in_the_stead_of_a_copy_that_is_out_of_reach() -> None:
    async def main() -> None:
        async with World(Replicate(2), "abc") as world:
            await world.storage.save("x", b"1")
            world.plan["a"].set(stat=DOWN)
            report = await world.reconcile(force=False)
            assert report.counts == {"failed": 1}
            assert await copies(world, "x") == ["a", "b"]
            assert await world.keys("c") == []

    run(main())


def test_reconcile_copies_only_from_what_it_sees() -> None:
    """What is out of reach is no source; one that cannot be read after all leaves the next one."""

    async def main() -> None:
        async with World(Replicate(4, quorum=1, breaker=None), "abcd") as world:
            await world.storage.save("x", b"1")
            await world.inner["d"].discard("x")
            world.plan["a"].set(stat=DOWN, read=DOWN)
            world.plan["b"].set(read=DOWN)
            report = await world.reconcile(force=False)
            assert report.counts == {"missing": 1, "failed": 2, "copied": 1}
            assert [each.original for each in report.findings] == ["a", "d", "b", "d"]
            assert await copies(world, "x") == ["a", "b", "c", "d"]
            await world.inner["d"].discard((await world.keys("d"))[0])
            world.plan["c"].set(read=DOWN)
            assert "copied" not in (await world.reconcile(force=False)).counts
            assert await copies(world, "x") == ["a", "b", "c"]
            await world.assert_clean()
            assert await copies(world, "x") == ["a", "b", "c", "d"]

    run(main())


@pytest.mark.parametrize("how", ["gone", "cut"])
def test_reconcile_gives_nothing_up_for_a_copy_that_it_does_not_see(how: str) -> None:
    async def main() -> None:
        async with World(Replicate(2, breaker=None)) as world:
            await world.storage.save("x", b"whole")
            await world.inner["b"].discard("x")
            if how == "cut":
                await world.inner["b"].write("x", b"who")
            world.plan["a"].set(stat=DOWN, read=DOWN)
            for _ in range(3):
                report = await world.reconcile()
                assert report.counts == {"failed": 1, "missing" if how == "gone" else "damaged": 1}
            assert await copies(world, "x") == ["a", "b"]
            assert await world.keys("b") == ([] if how == "gone" else ["x"]), "the last bytes within reach"
            world.heal()
            assert (await world.reconcile()).counts["copied"] == 1
            assert await content_of(world.storage, "x") == b"whole"

    run(main())


@pytest.mark.parametrize("circuit", [None, Breaker(failures=1, reset_after=60)], ids=["asked", "circuit"])
def test_reconcile_goes_past_an_original_that_is_away(circuit: Breaker | None) -> None:
    async def main() -> None:
        async with World(Replicate(2, breaker=circuit), "abc") as world:
            away = dict.fromkeys(("write", "stat", "read", "discard"), DOWN)
            world.plan["b"].set(**away)
            await world.storage.save("x", b"1")
            world.plan["c"].set(**away)
            for _ in range(4):
                report = await world.reconcile(force=False)
                assert report.counts["failed"] >= 2
                record = await world.storage.get("x")
                assert len(record.places) <= 2, "a run adds no name for an original that is still away"
            world.plan["c"].faults.clear()
            await asyncio.sleep(60)
            assert (await world.reconcile(force=False)).counts["copied"] == 1
            assert await copies(world, "x") == ["a", "c"]
            await asyncio.sleep(60)
            await world.assert_clean()
            assert await copies(world, "x") == ["a", "c"]

    run(main())


def test_reconcile_leaves_a_file_that_was_replaced_while_a_copy_of_it_failed() -> None:
    async def main() -> None:
        async with World(Replicate(3, quorum=1, breaker=None), "abcd", keep_replaced=0.0) as world:
            world.plan["c"].set(write=DOWN)
            await world.storage.save("x", b"old")

            async def change() -> None:
                world.heal()
                await world.storage.replace("x", b"new")
                raise BackendUnavailable("out of order")

            world.plan["c"].set(write=Meanwhile(change))
            report = await world.reconcile(force=False)
            assert report.counts == {"moved on": 1}
            assert await content_of(world.storage, "x") == b"new"
            await world.assert_clean()

    run(main())


@pytest.mark.parametrize("fault", [DOWN, Lie(), Late(), Fail(OutOfSpace("full"))], ids=["down", "lie", "late", "full"])
def test_a_copy_that_reconcile_cannot_make_leaves_nothing(fault: Any) -> None:
    async def main() -> None:
        async with World(Replicate(2), "ab") as world:
            world.plan["b"].set(write=DOWN)
            await world.storage.save("x", b"1")
            world.plan["b"].set(write=fault)
            report = await world.reconcile(force=False)
            assert report.counts == {"failed": 1}
            assert await content_of(world.storage, "x") == b"1"
            if isinstance(fault, Late):
                await fault.land()
            await world.assert_clean()
            assert await copies(world, "x") == ["a", "b"]

    run(main())


@pytest.mark.parametrize("what", ["replace", "delete", "rename"])
def test_a_file_that_is_changed_while_reconcile_copies_it(what: str) -> None:
    async def main() -> None:
        async with World(Replicate(2), "ab", keep_replaced=0.0) as world:
            world.plan["b"].set(write=DOWN)
            await world.storage.save("x", b"old")
            world.plan["b"].set(write=Meanwhile(lambda: change(world)))

            async def change(world: World) -> None:
                world.plan["b"].set(write=None)
                if what == "replace":
                    await world.storage.replace("x", b"new")
                elif what == "delete":
                    await world.storage.delete("x")
                else:
                    await world.storage.rename("x", "y")

            await world.reconcile(force=False)
            await world.assert_clean()
            files = {record.path async for record in world.storage.list()}
            assert files == {"replace": {"x"}, "delete": set(), "rename": {"y"}}[what]
            for path in files:
                assert await content_of(world.storage, path) == (b"new" if what == "replace" else b"old")
                assert len(await copies(world, path)) == 2

    run(main())


class Meanwhile(Fault):
    def __init__(self, change: Callable[[], Awaitable[None]]) -> None:
        self.change = change

    async def __call__(self, call: Callable[[], Awaitable[Any]]) -> Any:
        await self.change()
        return await call()


@pytest.mark.asyncio
async def test_two_directories_one_of_which_is_wiped(tmp_path: Path) -> None:
    """rm -rf of one root, the directory made anew, and reconcile: every file has its two copies again."""
    import shutil

    storage = ProxyStorage(
        "media",
        originals={name: FileSystemBackend(tmp_path / name) for name in "ab"},
        meta=SQLiteMetaBackend(tmp_path / "meta.sqlite3"),
        placement=Replicate(2),
    )
    async with storage:
        for number in range(5):
            await storage.save(f"d/{number}", b"%d" % number * (1 + 300_000 * (number % 2)))
        shutil.rmtree(tmp_path / "a")
        for number in range(5):
            assert await content_of(storage, f"d/{number}") == b"%d" % number * (1 + 300_000 * (number % 2))
        path = await storage.save("meanwhile", b"one copy")
        assert [place.original for place in (await storage.get(path)).good_places()] == ["b"]
        (tmp_path / "a").mkdir()
        await storage.get_original("a").aclose()  # it takes the new directory for its root from here on
        for gate in storage.gates.values():
            gate._fresh()
        report = await reconcile(storage, dry_run=False, force=True)
        assert report.counts["copied"] == 6
        await reconcile(storage, dry_run=False, force=True)
        async for record in storage.list():
            assert sorted(place.original for place in record.all_places()) == ["a", "b"]
            assert record.lease is None
        assert len([path for path in (tmp_path / "a").rglob("*") if path.is_file()]) == 6
