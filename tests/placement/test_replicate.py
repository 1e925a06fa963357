"""Replicate: several originals from one pass, and a quorum."""

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
    NotFound,
    OutOfSpace,
    Placement,
    ProxyStorage,
    Replicate,
    Route,
)
from aproxy_storage.backends.filesystem import FileSystemBackend
from aproxy_storage.content import Source
from aproxy_storage.meta_backends.memory import MemoryMetaBackend
from aproxy_storage.placement import by_content_type, by_suffix, route_by
from aproxy_storage.testing.faults import Fail, Fault, Hang, Lie, Slow
from tests.placement.support import Meanwhile, World, content_of, copies, once, run
from tests.placement.test_limits import slowly, taken

DOWN = Fail(BackendUnavailable("out of order"))
MEBIBYTE = 1 << 20


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


@pytest.mark.parametrize(
    ("placement", "says"),
    [
        (Replicate(3), "copies=3"),
        (Replicate(2, order=["a", "z"]), r"order names \['z'\]"),
        (Fallback(["z"]), r"order names \['z'\]"),
        (Route(by_suffix({".a": "z"})), r"leads to \['z'\]"),
        (Route(by_content_type({"a/*": "a"}, default="z")), r"leads to \['z'\]"),
        (route_by(suffixes={".a": "a"}, content_types={"a/b": "z"}), r"leads to \['z'\]"),
    ],
)
def test_a_storage_is_not_made_with_a_placement_for_other_originals(placement: Placement, says: str) -> None:
    with pytest.raises(ConfigurationError, match=says):
        World(placement, "ab")


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
            assert await copies(world, "y") == ["b", "a"]  # nor is one given up
            assert (await world.storage.get("y")).lease is None
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


def test_a_move_to_a_copy_gives_the_former_place_up_where_one_copy_is_wanted() -> None:
    async def main() -> None:
        async with World(Replicate(2), "ab") as world:
            await world.storage.save("x", b"1")
            world.storage.placement = First()
            await world.storage.move("x", "b")
            assert await copies(world, "x") == ["b"]
            await world.assert_clean()
            assert await world.keys("a") == []
            assert await content_of(world.storage, "x") == b"1"

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
