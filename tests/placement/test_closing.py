"""A storage that is closed beside its callers: what takes too long is cut short, and who waits for it is told so."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from aproxy_storage import BackendUnavailable, Fallback, Placement, Replicate, Timeouts
from aproxy_storage.testing.faults import Hang
from tests.placement.support import World, content_of, once, run

HEDGED = Fallback(hedge_after=10, attempt_timeout=60, breaker=None)
COPIES = Replicate(2, quorum=1, attempt_timeout=60, breaker=None)
SHORT = Timeouts(cleanup=1)


async def reached(hangs: dict[str, Hang], names: str) -> None:
    for name in names:
        await hangs[name].reached.wait()


@pytest.mark.parametrize(("placement", "begun"), [(COPIES, "ab"), (HEDGED, "a")], ids=["copies", "hedged"])
@pytest.mark.parametrize("streamed", [False, True], ids=["bytes", "stream"])
@pytest.mark.parametrize("way", ["save", "open"])
def test_a_save_cut_short_by_a_close_says_so(placement: Placement, begun: str, way: str, streamed: bool) -> None:
    async def main() -> None:
        async with World(placement, timeouts=SHORT) as world:
            hangs = {name: Hang() for name in "ab"}
            for name, hang in hangs.items():
                world.plan[name].set(write=hang)

            async def save() -> None:
                if way == "save":
                    await world.storage.save("x", once(b"content") if streamed else b"content", size=7)
                    return
                async with world.storage.open("x", "wb") as file:
                    await file.write(b"content")
                    if streamed:
                        await file.write(bytes(world.storage.chunk_bytes))  # more, while the original hangs

            saving = asyncio.ensure_future(save())
            await reached(hangs, begun)
            await world.storage.aclose()
            with pytest.raises(BackendUnavailable, match="closed while") as caught:
                await saving
            assert caught.value.outcome_unknown
            assert world.plan["b"].calls["write"] == len(begun) - 1, "nothing was begun after the close"
            assert not await world.storage.exists("x")
            await world.storage.cleanup.drain(within=60)
            await world.assert_clean()

    run(main())


def test_a_copy_cut_short_by_a_close_is_one_that_failed() -> None:
    async def main() -> None:
        async with World(COPIES, timeouts=SHORT) as world:
            hang = Hang()
            world.plan["b"].set(write=hang)
            saving = asyncio.ensure_future(world.storage.save("x", b"1"))
            await hang.reached.wait()
            await world.storage.aclose()
            assert await saving == "x"
            assert await content_of(world.storage, "x") == b"1"
            await world.assert_clean()

    run(main())


def test_a_read_cut_short_by_a_close_says_so() -> None:
    async def main() -> None:
        placement = Replicate(2, hedge_after=10, attempt_timeout=60, breaker=None)
        async with World(placement, timeouts=SHORT) as world:
            await world.storage.save("x", b"1")
            hangs = {name: Hang() for name in "ab"}
            for name, hang in hangs.items():
                world.plan[name].set(read=hang)
            reading = asyncio.ensure_future(content_of(world.storage, "x"))
            await reached(hangs, "ab")
            await world.storage.aclose()
            with pytest.raises(BackendUnavailable, match="closed while"):
                await reading

    run(main())


def test_a_caller_who_is_cancelled_beside_a_close_is_cancelled() -> None:
    async def main() -> None:
        async with World(COPIES, timeouts=SHORT) as world:
            hangs = {name: Hang() for name in "ab"}
            for name, hang in hangs.items():
                world.plan[name].set(write=hang)
            saving: Any = asyncio.ensure_future(world.storage.save("x", b"1"))
            await reached(hangs, "ab")
            closing = asyncio.ensure_future(world.storage.aclose())
            saving.cancel()
            await closing
            with pytest.raises(asyncio.CancelledError):
                await saving

    run(main())
