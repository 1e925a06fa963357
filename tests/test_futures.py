"""Waiting for futures that belong to others."""

from __future__ import annotations

import asyncio

import pytest

from aproxy_storage.errors import BackendUnavailable
from aproxy_storage.futures import outcome_of, over


@pytest.mark.asyncio
@pytest.mark.parametrize("end", ["result", "error", "cancel"])
@pytest.mark.parametrize("before", [True, False])
async def test_any_end_is_waited_for_and_none_is_raised(end: str, before: bool) -> None:
    future: asyncio.Future[int] = asyncio.get_running_loop().create_future()

    def come_to_its_end() -> None:
        if end == "result":
            future.set_result(1)
        elif end == "error":
            future.set_exception(OSError())
        else:
            future.cancel()

    if before:
        come_to_its_end()
    waiting = asyncio.ensure_future(over(future))
    await asyncio.sleep(0)
    if not before:
        assert not waiting.done()
        come_to_its_end()
    await waiting
    assert future.done()
    assert future.cancelled() or bool(future.exception()) == (end == "error")


@pytest.mark.asyncio
async def test_who_waits_may_be_cancelled_and_the_future_goes_on() -> None:
    future: asyncio.Future[int] = asyncio.get_running_loop().create_future()
    waiters = [asyncio.ensure_future(over(future)) for _ in range(2)]
    await asyncio.sleep(0)
    waiters[0].cancel()
    with pytest.raises(asyncio.CancelledError):
        await waiters[0]
    assert not future.done()
    future.set_result(1)
    await waiters[1]


@pytest.mark.asyncio
async def test_a_waiter_cancelled_as_the_answer_comes_is_cancelled() -> None:
    future: asyncio.Future[int] = asyncio.get_running_loop().create_future()
    waiter = asyncio.ensure_future(over(future))
    await asyncio.sleep(0)
    future.set_result(1)
    waiter.cancel()
    with pytest.raises(asyncio.CancelledError):
        await waiter


@pytest.mark.asyncio
async def test_the_outcome_of_a_task_is_its_result_its_error_or_that_it_was_cut_short() -> None:
    async def fail() -> None:
        raise OSError("no")

    result = asyncio.create_task(asyncio.sleep(0, 7))
    failed = asyncio.create_task(fail())
    cut_short = asyncio.create_task(asyncio.Event().wait(), name="a long work")
    await asyncio.wait({result, failed})
    cut_short.cancel()
    await asyncio.wait({cut_short})
    assert outcome_of(result) == 7
    with pytest.raises(OSError, match="no"):
        outcome_of(failed)
    with pytest.raises(BackendUnavailable, match="a long work") as caught:
        outcome_of(cut_short)
    assert caught.value.outcome_unknown
