"""Hedged saves: the first to finish wins, nobody waits for a loser, and losers leave nothing behind."""

from __future__ import annotations

import asyncio
import io
from collections.abc import Awaitable, Callable
from typing import Any

import pytest

from aproxy_storage import BackendUnavailable, Breaker, DeadlineExceeded, Fallback, InvalidPath
from aproxy_storage.records import STORED
from aproxy_storage.testing.faults import Fail, Fault, Hang, Late, Lie, Slow
from tests.placement.support import World, content_of, once, run
from tests.placement.test_limits import taken

HEDGED = Fallback(hedge_after=1, attempt_timeout=5, breaker=None)


def test_the_next_original_starts_beside_one_that_is_slow() -> None:
    async def main() -> None:
        async with World(HEDGED) as world:
            world.plan["a"].set(write=Hang())
            world.plan["b"].set(write=Slow(0.5))
            assert await taken(world.storage.save("x", b"1")) == 1.5
            assert await world.where("x") == "b"
            await world.assert_clean()
            assert await world.keys("a") == []

    run(main())


def test_no_second_attempt_where_the_first_is_in_time() -> None:
    async def main() -> None:
        async with World(HEDGED) as world:
            world.plan["a"].set(write=Slow(0.9))
            assert await taken(world.storage.save("x", b"1")) == 0.9
            assert world.plan["b"].calls["write"] == 0
            assert (await world.storage.get("x")).places == ()

    run(main())


def test_a_failure_starts_the_next_one_at_once() -> None:
    async def main() -> None:
        async with World(HEDGED, "abc") as world:
            world.plan["a"].set(write=Hang())
            world.plan["b"].set(write=Fail(BackendUnavailable("down")))
            assert await taken(world.storage.save("x", b"1")) == 1
            assert await world.where("x") == "c"

    run(main())


def test_a_slow_first_may_still_win() -> None:
    async def main() -> None:
        async with World(HEDGED) as world:
            world.plan["a"].set(write=Slow(1.5))
            world.plan["b"].set(write=Hang())
            assert await taken(world.storage.save("x", b"1")) == 1.5
            assert await world.where("x") == "a"
            await world.assert_clean()
            assert (await world.keys("a"), await world.keys("b")) == (["x"], [])

    run(main())


def test_all_fail_and_the_last_error_has_the_earlier_ones() -> None:
    async def main() -> None:
        async with World(HEDGED, "abc") as world:
            for name in "abc":
                world.plan[name].set(write=Fail(BackendUnavailable(f"{name} is down")))
            with pytest.raises(BackendUnavailable, match="c is down") as caught:
                await world.storage.save("x", b"1")
            assert [str(error) for error in caught.value.attempts] == ["a is down", "b is down"]
            await world.assert_clean()
            assert await world.meta.count() == 0

    run(main())


def test_an_error_that_does_not_fall_back_ends_the_race() -> None:
    async def main() -> None:
        async with World(HEDGED) as world:
            world.plan["a"].set(write=Hang())
            world.plan["b"].set(write=Fail(InvalidPath("not here")))
            with pytest.raises(InvalidPath):
                await world.storage.save("x", b"1")
            await world.assert_clean()
            assert await world.meta.count() == 0

    run(main())


def test_two_that_finish_in_the_same_instant_leave_one_file() -> None:
    async def main() -> None:
        async with World(HEDGED) as world:
            world.plan["a"].set(write=Slow(2))
            world.plan["b"].set(write=Slow(1))
            assert await taken(world.storage.save("x", b"1")) == 2
            record = await world.storage.get("x")
            assert record.original_storage_name == "a", "of two the nearer one"
            await world.storage.cleanup.drain(within=10)
            assert (await world.keys("a"), await world.keys("b")) == (["x"], [])
            assert (await world.storage.get("x")).places == ()
            assert (await world.storage.get("x")).lease is None
            await world.assert_clean()

    run(main())


@pytest.mark.parametrize("ticks", range(12))
def test_a_loser_that_finishes_around_the_end_leaves_nothing(ticks: int) -> None:
    """Its last step is moved, one turn of the loop at a time, across the commit of the winner."""

    class Turns(Fault):
        async def __call__(self, call: Callable[[], Awaitable[Any]]) -> Any:
            await asyncio.sleep(2)
            for _ in range(ticks):
                await asyncio.sleep(0)
            return await call()

    async def main() -> None:
        async with World(HEDGED) as world:
            world.plan["a"].set(write=Turns())
            world.plan["b"].set(write=Slow(1))
            await world.storage.save("x", b"1")
            assert await content_of(world.storage, "x") == b"1"
            await world.storage.cleanup.drain(within=10)
            await world.assert_clean()
            assert len(await world.keys("a") + await world.keys("b")) == 1

    run(main())


@pytest.mark.parametrize("ticks", range(25))
def test_a_caller_that_is_cancelled_in_the_race_leaves_nothing(ticks: int) -> None:
    async def main() -> None:
        async with World(HEDGED) as world:
            world.plan["a"].set(write=Slow(2))
            world.plan["b"].set(write=Slow(1))
            saving = asyncio.ensure_future(world.storage.save("x", b"1"))
            await asyncio.sleep(2)
            for _ in range(ticks):
                await asyncio.sleep(0)
            saving.cancel()
            await asyncio.wait([saving])
            await world.assert_clean()
            lying = await world.keys("a") + await world.keys("b")
            if saving.cancelled():
                assert len(lying) == await world.meta.count() <= 1  # it may have been too late for that
            else:
                assert (await content_of(world.storage, "x"), len(lying)) == (b"1", 1)

    run(main())


@pytest.mark.parametrize("fault", [Lie(), Late()], ids=["lie", "late"])
def test_a_loser_without_an_answer_stays_named_until_its_bytes_are_gone(fault: Any) -> None:
    class ThenUnknown(Fault):
        async def __call__(self, call: Callable[[], Awaitable[Any]]) -> Any:
            try:
                await asyncio.sleep(100)
            except asyncio.CancelledError:
                await asyncio.sleep(0)
                return await fault(call)

    async def main() -> None:
        async with World(HEDGED) as world:
            world.plan["a"].set(write=ThenUnknown())
            await world.storage.save("x", b"1")
            await world.storage.cleanup.drain(within=10)
            record = await world.storage.get("x")
            assert [(place.original, place.state) for place in record.places] == [("a", "doubtful")]
            if isinstance(fault, Late):
                await fault.land()
            assert await world.keys("a") == ["x"]
            await world.assert_clean()
            assert await world.keys("a") == []

    run(main())


def test_the_circuit_opens_for_an_original_that_always_loses() -> None:
    """It never comes to its timeout, so being outrun has to count; then nobody waits for `hedge_after` either."""

    async def main() -> None:
        placement = Fallback(hedge_after=1, attempt_timeout=5, breaker=Breaker(failures=3, reset_after=60))
        async with World(placement) as world:
            world.plan["a"].set(write=Hang())
            assert [await taken(world.storage.save("x", b"1")) for _ in range(4)] == [1, 1, 1, 0]
            assert ("a", "outrun") in world.outcomes()
            world.plan["a"].set(write=None)
            await asyncio.sleep(60)
            assert await world.where(await world.storage.save("y", b"1")) == "a"

    run(main())


def test_to_be_outrun_while_waiting_for_a_slot_is_no_failure() -> None:
    async def main() -> None:
        placement = Fallback(hedge_after=1, attempt_timeout=5, breaker=Breaker(failures=2, reset_after=60))
        async with World(placement, rules={"a": {"max_concurrency": 1}}) as world:
            world.plan["a"].set(write=Slow(0.9))
            assert await taken(asyncio.gather(*(world.storage.save(f"{n}", b"1") for n in range(5)))) == 1
            await world.storage.cleanup.drain(within=10)
            told = [outcome for name, outcome in world.outcomes() if name == "a"]
            assert sorted(told) == ["crowded", "crowded", "crowded", "ok", "outrun"]
            assert world.storage.gates["a"].allows("write")

    run(main())


@pytest.mark.parametrize(
    ("content", "hedged"),
    [
        (b"1" * 100, True), (b"1" * 101, False), (io.BytesIO(b"1" * 100), True), ([b"1" * 50] * 2, True),
        ([b"1" * 50] * 3, False), ("1" * 100, True),
    ],
)  # fmt: skip
def test_content_up_to_hedge_max_bytes_is_hedged(content: Any, hedged: bool) -> None:
    async def main() -> None:
        async with World(Fallback(hedge_after=1, attempt_timeout=5, hedge_max_bytes=100, breaker=None)) as world:
            world.plan["a"].set(write=Hang())
            assert await taken(world.storage.save("x", content)) == (1 if hedged else 5)
            assert set(await content_of(world.storage, "x")) == {ord("1")}

    run(main())


def test_a_stream_of_declared_size_is_hedged_and_of_unknown_size_not() -> None:
    async def main() -> None:
        async with World(HEDGED) as world:
            world.plan["a"].set(write=Hang())
            assert await taken(world.storage.save("x", once(b"1234"), size=4)) == 1
            assert await taken(world.storage.save("y", once(b"1234"))) == 5
            for path in ("x", "y"):
                assert await content_of(world.storage, path) == b"1234"
            record = await world.storage.get("x")
            assert (record.size, record.checksum) == ((await world.storage.get("y")).size, record.checksum)

    run(main())


def test_replace_and_copy_are_hedged() -> None:
    async def main() -> None:
        async with World(HEDGED, keep_replaced=0.0) as world:
            path = await world.storage.save("x", b"old")
            world.plan["a"].set(write=Hang(), copy=Hang())
            assert await taken(world.storage.replace(path, b"new")) == 1
            assert await content_of(world.storage, path) == b"new"
            assert await taken(world.storage.copy(path, "y")) == 0, "begins where the file is, in b"
            world.plan["b"].set(write=Hang(), copy=Hang())
            world.plan["a"].set(write=None)
            assert await taken(world.storage.copy(path, "z")) == 1
            assert await content_of(world.storage, "z") == b"new"
            await world.assert_clean()

    run(main())


def test_a_taken_key_in_the_race_changes_the_record_without_harm() -> None:
    """The slow attempt asks for a token key while the fast one commits: one of them waits for the other."""

    async def main() -> None:
        for wait in (0.9, 1.0, 1.1):
            async with World(HEDGED) as world:
                await world.inner["a"].write("x", b"somebody else's")
                await world.inner["b"].write("x", b"somebody else's")
                world.plan["a"].set(write=[Slow(1.5), Slow(wait)])
                world.plan["b"].set(write=[Slow(0.5), Slow(0.5)])
                world.meta_plan.set(update=[Slow(0.2)] * 10)
                path = await world.storage.save("x", b"1")
                assert await content_of(world.storage, path) == b"1"
                await world.storage.cleanup.drain(within=10)
                world.heal()
                await world.reconcile()
                for name in "ab":
                    async with world.inner[name].read("x") as reading:
                        assert reading.data == b"somebody else's"
                assert len(await world.keys("a") + await world.keys("b")) == 3

    run(main())


def test_a_hedged_save_with_a_deadline() -> None:
    async def main() -> None:
        async with World(Fallback(hedge_after=1, attempt_timeout=50, deadline=10, breaker=None)) as world:
            for name in "ab":
                world.plan[name].set(write=Hang())
            with pytest.raises(DeadlineExceeded, match="deadline"):
                await world.storage.save("x", b"1")
            assert asyncio.get_running_loop().time() < 25
            await world.assert_clean()
            assert [record.state async for record in world.meta.list()] in ([], [STORED])

    run(main())
