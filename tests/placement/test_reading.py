"""Reads: the healthy and the near first, failing over at any moment, hedged; never NotFound for an outage."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from aproxy_storage import (
    AccessDenied,
    BackendUnavailable,
    Breaker,
    ByteRange,
    ConfigurationError,
    Conflict,
    DeadlineExceeded,
    Fallback,
    IntegrityError,
    NotFound,
    ProxyStorage,
    Replicate,
)
from aproxy_storage.testing.faults import Fail, Hang, Slow, at
from tests.placement.support import World, content_of, run
from tests.placement.test_limits import taken

DOWN = Fail(BackendUnavailable("out of order"))
GONE = Fail(NotFound("not there"))
DATA = bytes(range(256)) * 40


@pytest.mark.parametrize(
    ("fault", "error"), [(DOWN, BackendUnavailable), (Hang(), DeadlineExceeded), (GONE, IntegrityError)]
)
def test_a_read_that_cannot_reach_its_only_original_says_so(fault: Any, error: type[Exception]) -> None:
    async def main() -> None:
        async with World(Fallback(attempt_timeout=5)) as world:
            await world.storage.save("x", b"1")
            world.plan["a"].set(read=fault)
            with pytest.raises(error) as caught:
                await content_of(world.storage, "x")
            assert not isinstance(caught.value, NotFound)
            assert isinstance(caught.value, BackendUnavailable) == (error is not IntegrityError)

    run(main())


def test_reads_of_a_file_whose_circuit_is_open_do_not_wait() -> None:
    async def main() -> None:
        async with World(Fallback(attempt_timeout=5, breaker=Breaker(failures=2, reset_after=60))) as world:
            await world.storage.save("x", b"1")
            world.plan["a"].set(read=Hang())
            waited = []
            for _ in range(4):
                since = asyncio.get_running_loop().time()
                with pytest.raises(BackendUnavailable) as caught:
                    await content_of(world.storage, "x")
                waited.append(asyncio.get_running_loop().time() - since)
            assert waited == [5, 5, 0, 0]
            assert "it is tried again soon" in str(caught.value)
            assert "using=" not in str(caught.value), "open has no such thing"
            world.plan["a"].set(read=None)
            await asyncio.sleep(60)
            assert await content_of(world.storage, "x") == b"1"

    run(main())


@pytest.mark.parametrize("fault", [DOWN, GONE, Hang()], ids=["down", "gone", "hung"])
def test_a_read_fails_over_to_a_copy(fault: Any) -> None:
    async def main() -> None:
        async with World(Replicate(attempt_timeout=5)) as world:
            await world.storage.save("x", DATA)
            world.plan["a"].set(read=fault)
            assert await content_of(world.storage, "x") == DATA
            assert world.outcomes("read")[-1] == ("b", "ok")

    run(main())


def test_what_cannot_be_reached_is_not_gone() -> None:
    """One copy is gone, the other one out of reach: that is no lost file."""

    async def main() -> None:
        async with World(Replicate()) as world:
            await world.storage.save("x", DATA)
            for one, other in ("ab", "ba"):
                world.plan[one].set(read=GONE)
                world.plan[other].set(read=DOWN)
                with pytest.raises(BackendUnavailable) as caught:
                    await content_of(world.storage, "x")
                assert [type(error) for error in caught.value.attempts] == [NotFound]
            for name in "ab":
                world.plan[name].set(read=GONE)
            with pytest.raises(IntegrityError):
                await content_of(world.storage, "x")

    run(main())


def test_a_read_that_breaks_off_goes_on_at_a_copy_where_it_was() -> None:
    async def main() -> None:
        async with World(Replicate(), chunk_bytes=1000) as world:
            await world.storage.save("x", DATA)
            for at_chunk in range(1, 11):
                world.plan["a"].set(chunk=at(at_chunk, DOWN))
                assert await content_of(world.storage, "x") == DATA
                async with world.storage.open("x", byte_range=ByteRange(300, 9000)) as file:
                    world.plan["a"].set(chunk=at(min(at_chunk, 8), DOWN))
                    assert b"".join([chunk async for chunk in file]) == DATA[300:9000]
            world.plan["a"].set(chunk=at(3, DOWN))
            world.plan["b"].set(chunk=at(2, DOWN))
            with pytest.raises(BackendUnavailable):
                await content_of(world.storage, "x")
            world.heal()
            async with world.storage.open("x") as file:
                world.plan["a"].set(chunk=DOWN, read=DOWN)
                assert await file.read(10) == DATA[:10]
                await file.seek(5000)
                assert await file.read() == DATA[5000:]

    run(main())


def test_a_read_that_hangs_in_the_middle_goes_on_at_a_copy() -> None:
    async def main() -> None:
        async with World(Replicate(attempt_timeout=5), chunk_bytes=1000) as world:
            await world.storage.save("x", DATA)
            world.plan["a"].set(chunk=at(3, Hang()))
            assert await taken(content_of(world.storage, "x")) == 5

    run(main())


def test_a_read_of_one_copy_that_breaks_off_raises() -> None:
    async def main() -> None:
        async with World(Fallback(), chunk_bytes=1000) as world:
            await world.storage.save("x", DATA)
            world.plan["a"].set(chunk=at(3, DOWN))
            with pytest.raises(BackendUnavailable):
                await content_of(world.storage, "x")

    run(main())


@pytest.mark.parametrize("after", [None, 1], ids=["in turn", "hedged"])
def test_a_file_with_a_copy_in_an_original_that_has_left_is_read_copied_and_mended(after: float | None) -> None:
    async def main() -> None:
        async with World(Replicate(2, hedge_after=after, breaker=None), "abc") as world:
            await world.storage.save("x", DATA)
            before = world.storage
            world.storage = storage = ProxyStorage(
                "media",
                originals={name: before.originals[name] for name in "bc"},
                meta=before.meta,
                placement=before.placement,
            )
            assert await content_of(storage, "x") == DATA
            assert (await storage.size("x"), storage._preferred(await storage.get("x")).original) == (len(DATA), "b")
            assert await content_of(storage, await storage.copy("x", "y")) == DATA
            world.plan["b"].set(read=DOWN)
            with pytest.raises(BackendUnavailable) as caught:
                await content_of(storage, "x")
            assert [type(error) for error in caught.value.attempts] == [ConfigurationError]
            world.plan["b"].set(read=GONE)
            with pytest.raises(ConfigurationError, match="no original 'a'"):
                await content_of(storage, "x")
            world.heal()
            report = await world.reconcile(force=False)
            assert report.counts == {"failed": 1, "copied": 1}, "one copy is where nobody can look"
            world.plan["b"].set(read=DOWN)
            assert await content_of(storage, "x") == DATA

    run(main())


def test_near_and_healthy_copies_are_read_first() -> None:
    async def main() -> None:
        placement = Replicate(3, order=["c", "a", "b"], breaker=Breaker(failures=1, reset_after=60))
        async with World(placement, "abc") as world:
            await world.storage.save("x", DATA)

            async def reader() -> str:
                await content_of(world.storage, "x")
                return next(each.original for each in reversed(world.attempts) if each.kind == "read")

            assert await reader() == "c"
            world.plan["c"].set(read=DOWN)
            assert await reader() == "a"
            asked = world.plan["c"].calls["read"]
            assert await reader() == "a"
            assert world.plan["c"].calls["read"] == asked, "it is not even asked while its circuit is open"
            world.heal()
            await asyncio.sleep(60)
            assert await reader() == "c"

    run(main())


def test_a_read_is_hedged() -> None:
    async def main() -> None:
        async with World(Replicate(hedge_after=1, attempt_timeout=10, breaker=None)) as world:
            await world.storage.save("x", DATA)
            world.plan["a"].set(read=Hang())
            assert await taken(content_of(world.storage, "x")) == 1
            world.plan["a"].set(read=Slow(1.5))
            world.plan["b"].set(read=Slow(3))
            assert await taken(content_of(world.storage, "x")) == 1.5
            world.plan["a"].set(read=Slow(2))
            world.plan["b"].set(read=Slow(1))  # in the same instant: one of them is closed again
            assert await taken(content_of(world.storage, "x")) == 2
            world.plan["a"].set(read=DOWN)
            world.plan["b"].set(read=None)
            assert await taken(content_of(world.storage, "x")) == 0
            world.plan["b"].set(read=DOWN)
            with pytest.raises(BackendUnavailable):
                await content_of(world.storage, "x")

    run(main())


@pytest.mark.parametrize("how", ["the caller is cancelled", "another copy refuses"])
def test_a_hedged_read_that_nobody_has_won_says_nothing_about_an_original(how: str) -> None:
    async def main() -> None:
        breaker = Breaker(failures=1, reset_after=60)
        async with World(Replicate(hedge_after=1, attempt_timeout=10, breaker=breaker)) as world:
            await world.storage.save("x", DATA)
            world.plan["a"].set(read=Slow(5))
            world.plan["b"].set(read=Slow(5) if how == "the caller is cancelled" else Fail(AccessDenied("no")))
            reading = asyncio.ensure_future(content_of(world.storage, "x"))
            await asyncio.sleep(2)
            reading.cancel()
            await asyncio.wait([reading])
            await world.storage.cleanup.drain(within=10)
            assert ("a", "cancelled") in world.outcomes("read")
            traffic = [part.reads for part in await world.storage.health() if part.reads is not None]
            assert [(each.breaker, each.failures) for each in traffic] == [("closed", 0)] * 2

    run(main())


def test_a_hedged_read_that_waited_for_a_slot_says_nothing_about_its_original() -> None:
    async def main() -> None:
        placement = Replicate(hedge_after=1, attempt_timeout=10, breaker=Breaker(failures=2, reset_after=60))
        async with World(placement, rules={"a": {"max_concurrency": 1}}) as world:
            await world.storage.save("x", DATA)
            world.plan["a"].set(read=Slow(0.9))
            assert await taken(asyncio.gather(*(content_of(world.storage, "x") for _ in range(5)))) == 1
            await world.storage.cleanup.drain(within=10)
            told = [outcome for name, outcome in world.outcomes("read") if name == "a"]
            assert sorted(told) == ["crowded", "crowded", "crowded", "ok", "outrun"]
            assert world.storage.gates["a"].allows("read")

    run(main())


def test_a_copy_of_another_length_is_passed_over() -> None:
    async def main() -> None:
        async with World(Replicate()) as world:
            await world.storage.save("x", DATA)
            await world.inner["a"].discard("x")
            await world.inner["a"].write("x", b"cut")
            assert await content_of(world.storage, "x") == DATA
            await world.inner["b"].discard("x")
            await world.inner["b"].write("x", b"cut too")
            with pytest.raises(IntegrityError):
                await content_of(world.storage, "x")

    run(main())


def test_a_replaced_file_is_never_read_from_an_old_copy() -> None:
    async def main() -> None:
        async with World(Replicate(), keep_replaced=60.0) as world:
            await world.storage.save("x", b"old")
            async with world.storage.open("x") as reader:
                world.plan["b"].set(write=DOWN)
                await world.storage.replace("x", b"new")
                world.plan["a"].set(read=DOWN)
                with pytest.raises(BackendUnavailable):
                    await content_of(world.storage, "x")
                assert await reader.read() == b"old"
            world.heal()
            assert await content_of(world.storage, "x") == b"new"
            await world.assert_clean()
            assert await content_of(world.storage, "x") == b"new"

    run(main())


def test_an_open_file_whose_copies_are_replaced_and_gone_is_a_conflict() -> None:
    async def main() -> None:
        async with World(Replicate(), keep_replaced=0.0, chunk_bytes=1000) as world:
            await world.storage.save("x", DATA)
            async with world.storage.open("x") as reader:
                await reader.read(10)
                await world.storage.replace("x", b"new")
                await reader.seek(5000)
                with pytest.raises(Conflict):
                    await reader.read()

    run(main())


def test_a_copy_under_another_key_is_read_there_after_a_seek() -> None:
    async def main() -> None:
        async with World(Replicate(order=["a", "b"]), chunk_bytes=1000) as world:
            await world.storage.save("x", DATA)
            await world.inner["a"].discard("x")
            assert (await world.reconcile()).counts["copied"] == 1
            asked = world.meta_plan.calls["get"]
            async with world.storage.open("x") as reader:
                assert world.outcomes("read")[-1] == ("a", "ok")
                assert await world.keys("a") != ["x"]
                await reader.seek(5000)
                assert await reader.read() == DATA[5000:]
            assert world.meta_plan.calls["get"] == asked + 1, "only for opening it: an ETag tells what is there"

    run(main())


def test_urls_and_sizes_are_those_of_a_copy_that_is_in_order() -> None:
    async def main() -> None:
        async with World(Replicate(2, breaker=Breaker(failures=1, reset_after=60))) as world:
            await world.storage.save("x", DATA)
            record = await world.storage.get("x")
            assert world.storage._preferred(record).original == "a"
            world.plan["a"].set(read=DOWN)
            await content_of(world.storage, "x")
            assert world.storage._preferred(record).original == "b"
            assert await world.storage.size("x") == len(DATA)

    run(main())


def test_cancelled_reads_close_what_they_have_opened() -> None:
    async def main() -> None:
        for ticks in range(12):
            async with World(Replicate(hedge_after=1, breaker=None)) as world:
                await world.storage.save("x", DATA)
                world.plan["a"].set(read=Slow(2))
                world.plan["b"].set(read=Slow(1))
                reading = asyncio.ensure_future(content_of(world.storage, "x"))
                await asyncio.sleep(2)
                for _ in range(ticks):
                    await asyncio.sleep(0)
                reading.cancel()
                await asyncio.wait([reading])
                await world.storage.cleanup.drain(within=10)
                traffic = [part.reads for part in await world.storage.health() if part.reads is not None]
                assert [each.in_flight for each in traffic] == [0, 0]

    run(main())
