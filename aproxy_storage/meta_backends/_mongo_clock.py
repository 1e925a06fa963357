"""The clock of a MongoDB server, read without asking it each time."""

from __future__ import annotations

import asyncio
import math
from datetime import UTC, datetime, timedelta
from typing import Any

from ..timeouts import elapsed as _elapsed  # a lease must not begin in the past after a sleep

__all__ = ["ServerClock"]

_FRESH = 10.0  # seconds for which one answer is good: clocks drift apart by less than a millisecond in that time


class ServerClock:
    """Tells the server's time.

    An insert cannot ask for ``$$NOW``, and an upsert that can takes the server half as long again. So leases are begun
    by `now`: the server's time as asked for at most ten seconds ago, and counted on from there by a local clock that
    nobody can set. It is never less than the server's and at most one round trip more, so that no lease is shorter than
    it should be. Whether one is over is decided by `read`, which asks there and then and is never more.
    """

    def __init__(self, database: Any) -> None:
        self._database = database
        self._lock = asyncio.Lock()
        self._ahead: float | None = None  # server's time (seconds since 1970) minus ours, at the most
        self._asked = 0.0

    async def now(self) -> datetime:
        """Return the server's time in UTC, in whole milliseconds."""
        if self._ahead is None or _elapsed() - self._asked > _FRESH:
            async with self._lock:
                if self._ahead is None or _elapsed() - self._asked > _FRESH:
                    await self.read()
        assert self._ahead is not None, "it was asked for, and nothing was awaited since"
        milliseconds = math.ceil((_elapsed() + self._ahead) * 1000)
        return _EPOCH + timedelta(milliseconds=milliseconds)

    async def read(self) -> datetime:
        """Ask the server for its time, and return its answer."""
        before = _elapsed()
        answer = await self._database.command("hello")
        told: datetime = answer["localTime"]
        if told.tzinfo is None:  # as the client decodes it
            told = told.replace(tzinfo=UTC)
        # It was told after `before`, and cut to milliseconds.
        self._ahead, self._asked = told.timestamp() + 0.001 - before, before
        return told

    def forget(self) -> None:
        """Ask anew before the next answer: the server may be another one."""
        self._ahead = None


_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
