"""Cleanup that outlives the call it cleans up for."""

from __future__ import annotations

import asyncio
import contextvars
import gc
import logging

import pytest

from aproxy_storage.backends.memory import MemoryBackend
from aproxy_storage.cleanup import Cleanup

request: contextvars.ContextVar[str] = contextvars.ContextVar("request", default="none")


@pytest.mark.asyncio
async def test_finish_waits_within_its_bound() -> None:
    cleanup = Cleanup("owner")
    done = asyncio.Event()
    assert await cleanup.finish(asyncio.sleep(0), within=5)
    assert not await cleanup.finish(done.wait(), within=0.01)
    done.set()
    await cleanup.drain(within=5)


@pytest.mark.asyncio
async def test_work_goes_on_when_the_waiter_is_cancelled_twice() -> None:
    cleanup = Cleanup("owner")
    go_on, ended = asyncio.Event(), []

    async def work() -> None:
        await go_on.wait()
        ended.append(True)

    task = asyncio.create_task(cleanup.finish(work(), within=10))
    await asyncio.sleep(0)
    task.cancel()
    await asyncio.sleep(0)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    go_on.set()
    await cleanup.drain(within=5)
    assert ended


@pytest.mark.asyncio
async def test_context_is_empty_unless_given() -> None:
    cleanup = Cleanup("owner")
    request.set("mine")
    seen = []

    async def look() -> None:
        seen.append(request.get())

    await cleanup.start(look())
    await cleanup.start(look(), context=contextvars.copy_context())
    assert seen == ["none", "mine"]


@pytest.mark.asyncio
async def test_failure_is_logged_not_raised(caplog: pytest.LogCaptureFixture) -> None:
    cleanup = Cleanup("owner")

    async def fail() -> None:
        raise OSError("disk on fire")

    with caplog.at_level(logging.WARNING):
        assert await cleanup.finish(fail(), within=5, name="undo")
        await asyncio.sleep(0)
    assert "owner: aproxy_storage owner: undo failed" in caplog.text
    assert "disk on fire" in caplog.text


@pytest.mark.asyncio
async def test_drain_cuts_short_what_takes_too_long(caplog: pytest.LogCaptureFixture) -> None:
    cleanup = Cleanup("owner")
    task = cleanup.start(asyncio.Event().wait())
    await cleanup.drain(within=0.01)
    assert task.cancelled()
    assert "1 cleanup tasks cut short" in caplog.text
    await cleanup.drain(within=1)  # nothing left: at once


@pytest.mark.asyncio
async def test_drain_waits_for_what_is_started_meanwhile() -> None:
    cleanup = Cleanup("owner")
    ended = []

    async def late() -> None:
        await asyncio.sleep(0.01)
        ended.append("late")

    async def early() -> None:
        await asyncio.sleep(0.01)
        cleanup.start(late())
        ended.append("early")

    cleanup.start(early())
    await cleanup.drain(within=5)
    assert ended == ["early", "late"]


@pytest.mark.asyncio
async def test_tasks_are_still_held_after_a_cancelled_drain() -> None:
    cleanup = Cleanup("owner")
    ended = []

    async def work() -> None:
        await asyncio.sleep(0.05)
        ended.append(True)

    cleanup.start(work())
    drain = asyncio.create_task(cleanup.drain(within=5))
    await asyncio.sleep(0)
    drain.cancel()
    await asyncio.wait({drain})
    gc.collect()  # the loop itself holds its tasks weakly
    await cleanup.drain(within=5)
    assert ended


@pytest.mark.asyncio
async def test_drain_inside_of_a_cleanup_task_does_not_wait_for_itself() -> None:
    cleanup = Cleanup("owner")
    async with asyncio.timeout(5):
        await cleanup.start(cleanup.drain(within=60))


def test_loops_have_their_own_tasks() -> None:
    cleanup = Cleanup("owner")

    async def leave_one_behind() -> None:
        cleanup.start(asyncio.Event().wait())
        await asyncio.sleep(0)

    asyncio.run(leave_one_behind())  # ends it
    asyncio.run(cleanup.drain(within=5))


@pytest.mark.asyncio
async def test_the_owner_is_asked_for_its_name_when_it_is_needed() -> None:
    class Late(MemoryBackend):
        def __init__(self) -> None:
            super().__init__()
            self.place = "here"

        def __str__(self) -> str:
            return f"Late({self.place})"

    backend = Late()
    assert backend.cleanup.start(asyncio.sleep(0)).get_name().startswith("aproxy_storage Late(here)")
    await backend.aclose()
