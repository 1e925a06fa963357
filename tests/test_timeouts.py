"""Limits in seconds, and the watch over progress."""

from __future__ import annotations

import asyncio
import dataclasses
import math

import pytest

from aproxy_storage.timeouts import IdleWatch, Timeouts


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
