"""Attempt timeouts, deadlines, circuits and slots, in a loop in which time is free: what is counted is exact.

`loop.time()` is what the callers of a real loop would have waited, apart from the work itself.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import pytest

from aproxy_storage import (
    AccessDenied,
    AlreadyExists,
    BackendUnavailable,
    Breaker,
    ContentError,
    DeadlineExceeded,
    Fallback,
    Timeouts,
)
from aproxy_storage.content import Source
from aproxy_storage.testing.faults import Fail, Fault, Hang, Slow, at
from tests.placement.support import World, content_of, once, run

DOWN = Fail(BackendUnavailable("out of order"))


async def taken(work: Awaitable[Any]) -> float:
    """Return how many seconds `work` took."""
    clock = asyncio.get_running_loop().time
    since = clock()
    await work
    return round(clock() - since, 6)


# -- attempt_timeout


def test_a_hung_original_costs_one_attempt_timeout() -> None:
    async def main() -> None:
        async with World(Fallback(attempt_timeout=5)) as world:
            world.plan["a"].set(write=Hang())
            assert await taken(world.storage.save("x", b"1")) == 5
            record = await world.storage.get("x")
            assert record.original_storage_name == "b"
            assert [place.state for place in record.places] == ["doubtful"], "it may still land"
            assert world.outcomes() == [("a", "timeout"), ("b", "ok")]

    run(main())


def test_a_thousand_saves_against_a_hung_original_wait_one_timeout_and_then_none() -> None:
    async def main() -> None:
        async with World(Fallback(attempt_timeout=5, breaker=Breaker(failures=5, reset_after=60))) as world:
            world.plan["a"].set(write=Hang())
            assert await taken(asyncio.gather(*(world.storage.save(f"{n}", b"1") for n in range(1000)))) == 5
            tried = world.plan["a"].calls["write"]
            assert await taken(asyncio.gather(*(world.storage.save(f"n{n}", b"1") for n in range(1000)))) == 0
            assert world.plan["a"].calls["write"] == tried, "the circuit is open: nobody asks"
            world.plan["a"].set(write=None)
            await asyncio.sleep(60)
            names = [await world.where(await world.storage.save(f"back{n}", b"1")) for n in range(3)]
            assert names == ["a"] * 3, "one probe has found out"

    run(main())


def test_one_probe_at_a_time_finds_out_whether_the_original_is_back() -> None:
    async def main() -> None:
        async with World(Fallback(attempt_timeout=5, breaker=Breaker(failures=1, reset_after=60))) as world:
            world.plan["a"].set(write=Hang())
            await world.storage.save("x", b"1")
            await asyncio.sleep(60)
            before = world.plan["a"].calls["write"]
            times = await asyncio.gather(*(taken(world.storage.save(f"{n}", b"1")) for n in range(100)))
            assert sorted(times) == [0] * 99 + [5]
            assert world.plan["a"].calls["write"] == before + 1

    run(main())


async def slowly(pieces: int, seconds: float, size: int = 100_000) -> AsyncIterator[bytes]:
    for _ in range(pieces):
        await asyncio.sleep(seconds)
        yield b"x" * size


def test_a_large_healthy_stream_is_never_killed() -> None:
    """Each chunk takes most of the limit: the source, the original, both."""

    async def main() -> None:
        async with World(Fallback(attempt_timeout=5, source_timeout=100, deadline=None)) as world:

            class Taking(Fault):
                async def __call__(self, call: Callable[[], Awaitable[Any]]) -> Any:
                    return await call()

            world.plan["a"].set(write=Taking())
            inner = world.inner["a"]
            plain = inner._write

            async def slow_write(key: str, source: Source, **options: Any) -> Any:
                chunks = []
                async for chunk in source.chunks():
                    chunks.append(chunk)
                    await asyncio.sleep(4)
                await asyncio.sleep(4)
                return await plain(key, Source.of(b"".join(chunks)), **options)

            inner._write = slow_write  # type: ignore[method-assign]
            path = await world.storage.save("x", slowly(20, 50))
            assert await world.where(path) == "a"
            assert asyncio.get_running_loop().time() > 1000

    # The checksum of large chunks comes from a thread, which the virtual clock does not wait for.
    run(main())


@pytest.mark.parametrize("phase", ["before the first chunk", "between chunks", "after the last chunk"])
def test_every_phase_without_progress_is_limited(phase: str) -> None:
    async def main() -> None:
        async with World(Fallback(attempt_timeout=5)) as world:
            plain = world.inner["a"]._write

            async def stuck(key: str, source: Source, **options: Any) -> Any:
                if phase == "before the first chunk":
                    await asyncio.Event().wait()
                chunks = []
                async for chunk in source.chunks():
                    chunks.append(chunk)
                    if phase == "between chunks" and len(chunks) == 2:
                        await asyncio.Event().wait()
                await asyncio.Event().wait()
                return await plain(key, Source.of(b"".join(chunks)), **options)

            world.inner["a"]._write = stuck  # type: ignore[method-assign]
            assert await taken(world.storage.save("x", slowly(4, 0.5, 1000))) == pytest.approx(7, abs=1)
            assert await world.where("x") == "b"
            assert await content_of(world.storage, "x") == b"x" * 4000

    run(main())


def test_a_source_that_does_not_come_is_the_callers_fault() -> None:
    """No fallback, and nothing is held against the original."""

    async def main() -> None:
        breaker = Breaker(failures=1)
        async with World(Fallback(attempt_timeout=5, source_timeout=20, breaker=breaker)) as world:
            for save in (
                lambda: world.storage.save("x", slowly(3, 30), content_type="a/b"),  # no look ahead for the type
                lambda: world.storage.save("y", failing(), content_type="a/b"),
            ):
                with pytest.raises(ContentError):
                    await save()
            assert world.plan["b"].calls["write"] == 0
            assert world.outcomes() == [("a", "aborted")] * 2
            assert world.storage.gates["a"].allows("write")
            await world.assert_clean()

    run(main())


async def failing() -> AsyncIterator[bytes]:
    yield b"some" * 3000
    raise OSError("the caller's disk")


def test_a_source_that_fails_is_never_read_for_another_original() -> None:
    async def main() -> None:
        async with World(Fallback(), rules={"a": {"fallback_on": (Exception,)}}) as world:
            with pytest.raises(ContentError) as caught:
                await world.storage.save("x", failing(), content_type="a/b")
            assert isinstance(caught.value.__cause__, OSError)
            assert [world.plan[name].calls["write"] for name in "ab"] == [1, 0]

    run(main())


def test_an_original_may_have_an_attempt_timeout_of_its_own() -> None:
    async def main() -> None:
        rules = {"a": {"timeouts": Timeouts(idle=2)}}
        async with World(Fallback(attempt_timeout=5), "abc", rules) as world:
            for name in "ab":
                world.plan[name].set(write=Hang())
            assert await taken(world.storage.save("x", b"1")) == 7
            assert await world.where("x") == "c"

    run(main())


def test_the_deadline_ends_the_whole_call() -> None:
    async def main() -> None:
        async with World(Fallback(attempt_timeout=5, deadline=12), "abcd") as world:
            for name in "abcd":
                world.plan[name].set(write=Hang())
            since = asyncio.get_running_loop().time()
            with pytest.raises(DeadlineExceeded, match="deadline of 12 seconds") as caught:
                await world.storage.save("x", b"1")
            assert asyncio.get_running_loop().time() - since == 12
            assert len(caught.value.attempts) == 2
            assert world.plan["d"].calls["write"] == 0
            await world.assert_clean()

    run(main())


def test_a_slow_meta_backend_is_not_held_against_an_original() -> None:
    """Naming the next place, or another key, takes longer than an attempt may."""

    async def main() -> None:
        async with World(Fallback(attempt_timeout=5, breaker=Breaker(failures=1))) as world:
            await world.inner["b"].write("x", b"somebody else's")
            world.plan["a"].set(write=DOWN)
            world.meta_plan.set(update=[Slow(20)] * 3)
            assert await taken(world.storage.save("x", b"1")) == 60
            assert world.outcomes() == [("a", "failed"), ("b", "ok")]

    run(main())


def test_no_limits_where_none_are_wanted() -> None:
    async def main() -> None:
        quiet = Timeouts(operation=None, idle=None)
        async with World(Fallback(attempt_timeout=None, deadline=None, source_timeout=None, breaker=None)) as world:
            for original in world.storage.originals.values():
                original.timeouts = quiet
            world.plan["a"].set(write=Slow(100_000))
            assert await taken(world.storage.save("x", b"1")) == 100_000
            assert await world.where("x") == "a"

    run(main())


def test_a_hung_undo_of_a_timed_out_attempt_is_not_waited_for() -> None:
    """A backend that waits for its service to take the write back, as it should, is left to it after half a second."""

    async def main() -> None:
        async with World(Fallback(attempt_timeout=5)) as world:
            backend = world.storage.get_original("a")

            async def hung(key: str, source: Source, **options: Any) -> Any:
                try:
                    await asyncio.Event().wait()
                finally:
                    await backend.cleanup.finish(asyncio.sleep(1000), within=10)

            world.inner["a"]._write = hung  # type: ignore[method-assign]
            assert await taken(world.storage.save("x", b"1")) == 5.5
            with pytest.raises(DeadlineExceeded):
                await world.storage.save("y", b"1", using="a")

    run(main())


# -- circuits


def test_all_circuits_open_is_said_at_once_and_using_tries_even_then() -> None:
    async def main() -> None:
        async with World(Fallback(attempt_timeout=5, breaker=Breaker(failures=1, reset_after=60))) as world:
            for name in "ab":
                world.plan[name].set(write=DOWN)
            with pytest.raises(BackendUnavailable):
                await world.storage.save("x", b"1")
            statements = world.meta_plan.calls.total()
            path = "x"
            for verb in (lambda: world.storage.save("y", b"1"), lambda: world.storage.save("z", once(b"1"))):
                with pytest.raises(BackendUnavailable, match="circuits of all originals are open"):
                    await verb()
            assert world.meta_plan.calls.total() == statements, "not even a reservation was made"
            world.plan["b"].set(write=None)
            path = await world.storage.save("x", b"1", using="b")
            assert await world.where(path) == "b"
            with pytest.raises(BackendUnavailable, match="out of order"):
                await world.storage.save("x", b"1", using="a")

    run(main())


def test_circuits_of_writes_and_reads_are_two() -> None:
    """A full or read-only disk can still be read."""

    async def main() -> None:
        async with World(Fallback(breaker=Breaker(failures=1, reset_after=60))) as world:
            path = await world.storage.save("x", b"1")
            world.plan["a"].set(write=DOWN)
            await world.storage.save("y", b"1")
            assert not world.storage.gates["a"].allows("write")
            assert await content_of(world.storage, path) == b"1"

    run(main())


@pytest.mark.parametrize("error", [AccessDenied("no"), AlreadyExists("there")])
def test_an_original_that_refuses_is_in_order(error: Exception) -> None:
    async def main() -> None:
        async with World(Fallback(breaker=Breaker(failures=2))) as world:
            for number in range(5):
                faults = [DOWN, Fail(error), Fail(error)]
                world.plan["a"].set(write=faults)
                await world.storage.save(f"x{number}", b"1")
                with pytest.raises((PermissionError, FileExistsError)):
                    await world.storage.save(f"y{number}", b"1")
            assert world.storage.gates["a"].allows("write")

    run(main())


def test_a_cancellation_says_nothing_about_the_original() -> None:
    async def main() -> None:
        async with World(Fallback(breaker=Breaker(failures=1))) as world:
            hang = Hang()
            world.plan["a"].set(write=hang)
            for number in range(3):
                saving = asyncio.ensure_future(world.storage.save(f"{number}", b"1"))
                await asyncio.sleep(1)
                saving.cancel()
                await asyncio.wait([saving])
            assert world.storage.gates["a"].allows("write")

    run(main())


# -- slots


class Counted(Fault):
    """Takes a second, and counts how many it has at a time."""

    def __init__(self) -> None:
        self.now = self.most = 0

    async def __call__(self, call: Callable[[], Awaitable[Any]]) -> Any:
        self.now += 1
        self.most = max(self.most, self.now)
        try:
            await asyncio.sleep(1)
            return await call()
        finally:
            self.now -= 1


def test_an_original_with_four_slots_never_sees_five() -> None:
    async def main() -> None:
        async with World(Fallback(), rules={"a": {"max_concurrency": 4}}) as world:
            counted = Counted()
            world.plan["a"].set(write=counted, read=counted)

            async def one(number: int) -> None:
                path = await world.storage.save(f"{number}", b"1")
                if number % 2:
                    await content_of(world.storage, path)
                if number % 3 == 0:
                    await world.storage.replace(path, b"2")

            tasks = [asyncio.ensure_future(one(number)) for number in range(40)]
            await asyncio.sleep(3.5)
            for task in tasks[::7]:
                task.cancel()
            await asyncio.wait(tasks)
            assert counted.most == 4
            counted.most = 0
            await asyncio.gather(*(one(number) for number in range(100, 108)))
            assert counted.most == 4, "a slot was lost"

    run(main())


def test_waiting_for_a_slot_counts_against_the_attempt_and_not_against_the_circuit() -> None:
    async def main() -> None:
        rules = {"a": {"max_concurrency": 1}}
        async with World(Fallback(attempt_timeout=5, breaker=Breaker(failures=2)), rules=rules) as world:
            world.plan["a"].set(write=[Slow(4.5)] * 20)
            times = await asyncio.gather(*(taken(world.storage.save(f"{n}", b"1")) for n in range(6)))
            assert sorted(times) == [4.5, 5, 5, 5, 5, 5]
            assert ("a", "crowded") in world.outcomes()
            assert world.storage.gates["a"].allows("write")
            for number in range(6):
                record = await world.storage.get(str(number))
                # Who never came to its turn has sent nothing, and leaves nothing to clear.
                assert bool(record.places) == ((record.original_storage_name, record.places != ()) == ("b", True))

    run(main())


def test_who_waits_for_a_slot_leaves_when_the_circuit_opens() -> None:
    async def main() -> None:
        rules = {"a": {"max_concurrency": 2}}
        async with World(Fallback(attempt_timeout=5, breaker=Breaker(failures=1)), rules=rules) as world:
            world.plan["a"].set(write=[Slow(1), *[Hang()] * 200])
            world.plan["a"].faults["write"] = [Fail3(), *[Hang()] * 200]
            times = await asyncio.gather(*(taken(world.storage.save(f"{n}", b"1")) for n in range(50)))
            assert sorted(times) == [3] * 49 + [5], "all but the one that had begun have left after three seconds"

    run(main())


class Fail3(Fault):
    async def __call__(self, call: Callable[[], Awaitable[Any]]) -> Any:
        await asyncio.sleep(3)
        raise BackendUnavailable("out of order")


def test_at_gives_the_fault_to_one_call_only() -> None:
    async def main() -> None:
        async with World(Fallback(breaker=Breaker(failures=2))) as world:
            for _ in range(5):
                world.plan["a"].set(write=at(1, DOWN))
                assert await world.where(await world.storage.save("x", b"1")) == "b"
                assert await world.where(await world.storage.save("x", b"1")) == "a", "a success forgets failures"

    run(main())
