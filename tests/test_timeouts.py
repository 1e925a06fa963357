"""Limits in seconds, and the watch over progress."""

from __future__ import annotations

import asyncio
import dataclasses
import math

import pytest

from aproxy_storage.timeouts import Alarm, IdleWatch, Timeouts, progress


def test_defaults_are_finite_and_changed_by_copy() -> None:
    timeouts = Timeouts()
    assert all(getattr(timeouts, field.name) > 0 for field in dataclasses.fields(timeouts))
    changed = timeouts.but(idle=None, operation=3.0)
    assert (changed.idle, changed.operation, changed.source) == (None, 3.0, timeouts.source)
    assert timeouts == Timeouts()


@pytest.mark.parametrize("name", ["operation", "idle", "source", "cleanup"])
@pytest.mark.parametrize("seconds", [0, -1, math.nan])
def test_nonsense_is_refused(name: str, seconds: float) -> None:
    with pytest.raises(ValueError, match=f"{name}=.*positive"):
        Timeouts(**{name: seconds})


def test_cleanup_has_a_bound_always() -> None:
    with pytest.raises(ValueError, match="cleanup=None"):
        Timeouts(cleanup=None)  # type: ignore[arg-type]


def test_only_by_keyword_and_frozen() -> None:
    with pytest.raises(TypeError):
        Timeouts(3)  # type: ignore[call-arg, misc]
    with pytest.raises(dataclasses.FrozenInstanceError):
        Timeouts().idle = 3  # type: ignore[misc]


@pytest.mark.asyncio
async def test_watch_expires_unless_there_is_progress() -> None:
    async with IdleWatch(0.3) as watch:
        for _ in range(15):
            await asyncio.sleep(0.03)
            watch.go_on()
        watch.pause()
        await asyncio.sleep(0.4)
    with pytest.raises(TimeoutError, match=r"no progress for 0\.05 seconds"):
        async with IdleWatch(0.05) as watch:
            watch.pause()
            watch.go_on()
            await asyncio.sleep(5)
    assert watch.expired()


@pytest.mark.asyncio
async def test_progress_counts_for_the_outer_watch_too() -> None:
    async with IdleWatch(0.3) as outer:
        async with IdleWatch(0.3, outer) as inner:
            for _ in range(15):
                await asyncio.sleep(0.03)
                inner.go_on()
        async with IdleWatch(None, outer) as inner:
            inner.pause()
            await asyncio.sleep(0.4)
            inner.go_on()
    with pytest.raises(TimeoutError, match=r"0\.05"):
        async with IdleWatch(0.05) as outer:
            async with IdleWatch(None, outer):
                await asyncio.sleep(5)


@pytest.mark.asyncio
async def test_errors_of_the_block_pass() -> None:
    for error in (ValueError("x"), TimeoutError("x"), asyncio.CancelledError()):
        with pytest.raises(type(error)) as caught:
            async with IdleWatch(5):
                raise error
        assert caught.value is error


@pytest.mark.asyncio
async def test_progress_reaches_the_watch_of_the_context() -> None:
    progress()  # nobody watches
    async with IdleWatch(0.3) as watch:
        async with IdleWatch(0.3, watch):
            for _ in range(15):
                await asyncio.sleep(0.03)
                progress()
        for _ in range(15):
            await asyncio.sleep(0.03)
            progress()


@pytest.mark.asyncio
async def test_alarms_ring_in_their_order_and_only_once() -> None:
    async def sleeper(seconds: float | None, nap: float) -> bool:
        alarm = Alarm(seconds)
        try:
            with alarm:
                await asyncio.sleep(nap)
        except TimeoutError:
            assert alarm.expired()
            await asyncio.sleep(0)  # no cancellation is left over
            task = asyncio.current_task()
            assert task is not None
            assert task.cancelling() == 0
            return True
        return False

    wanted = [(0.2, 5.0, True), (0.05, 5.0, True), (5.0, 0.01, False), (None, 0.1, False), (0.1, 5.0, True)]
    answers = await asyncio.gather(*(sleeper(seconds, nap) for seconds, nap, _ in wanted))
    assert answers == [rings for _, _, rings in wanted]


@pytest.mark.asyncio
async def test_an_alarm_inside_an_alarm() -> None:
    with pytest.raises(TimeoutError):
        with Alarm(0.05) as outer:
            with Alarm(5) as inner:
                await asyncio.sleep(5)
    assert outer.expired()
    assert not inner.expired()
    with Alarm(5):
        with pytest.raises(TimeoutError):
            with Alarm(0.05):
                await asyncio.sleep(5)


@pytest.mark.asyncio
async def test_a_cancellation_passes_through_an_alarm() -> None:
    async def work() -> None:
        with Alarm(5):
            await asyncio.sleep(5)

    task = asyncio.ensure_future(work())
    await asyncio.sleep(0.01)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
