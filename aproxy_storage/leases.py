"""Leases of records: kept alive while a save takes long, and what they tell of the time of the database."""

from __future__ import annotations

import asyncio
import logging
from typing import NamedTuple

from .cleanup import Cleanup
from .errors import Conflict, NotFound, StorageError
from .loops import PerLoop
from .meta_backends.base import MetaBackend
from .records import STORED, MetaRecord
from .timeouts import elapsed

__all__ = ["DatabaseTime", "Held", "Leases"]

_log = logging.getLogger(__name__)


class DatabaseTime(NamedTuple):
    """What time it is by the database's clock, as the answer to a statement has shown: `shown` seconds since 1970, at
    some moment between `since` and `until` by `timeouts.elapsed`."""

    shown: float
    since: float
    until: float

    @classmethod
    def of(cls, record: MetaRecord, seconds: float | None, since: float) -> DatabaseTime | None:
        """Return what `record` shows, which was given a lease of `seconds` by a statement sent at `since`."""
        if record.lease is None or seconds is None:
            return None
        return cls(record.lease.timestamp() - seconds, since, elapsed())

    def earliest(self) -> float:
        """Return a moment that is not later than now."""
        return self.shown + elapsed() - self.until

    def latest(self) -> float:
        """Return a moment that is not earlier than now."""
        return self.shown + elapsed() - self.since


class Leases:
    """Renews the leases of saves that take long: one timer per loop for all of them."""

    def __init__(self, meta: MetaBackend, cleanup: Cleanup, seconds: float) -> None:
        self._meta = meta
        self._cleanup = cleanup
        self.seconds = seconds
        self._rounds: PerLoop[_Round] = PerLoop(_Round)

    def hold(self, record: MetaRecord, *, since: float, follow: bool = False) -> Held:
        """Return a context manager that keeps the lease of `record` alive.

        `since`: `timeouts.elapsed` before the statement that took the lease was sent. `follow`: whatever others make
        of the record meanwhile, as long as it is stored and the same file.
        """
        return Held(self._rounds.get(), self, record, since, follow, self._meta._database_asked())

    def start(self, round_: _Round) -> None:
        round_.timer = asyncio.get_running_loop().call_later(self.seconds / 6, self._tick, round_)

    def _tick(self, round_: _Round) -> None:
        if not round_.held:
            round_.timer = None
            return
        self.start(round_)
        now = elapsed()
        due: dict[str | None, list[Held]] = {}
        for held in round_.held:
            if now - held.since >= self.seconds / 3 and not held.renewing:
                held.renewing = True
                due.setdefault(held.database, []).append(held)
        for database, some in due.items():
            context = self._meta._context_for(database)
            self._cleanup.start(self._renew(some), name="renewal of leases", context=context)

    async def _renew(self, due: list[Held]) -> None:
        begun = elapsed()
        try:
            answers = await self._meta._renew([held.record for held in due], self.seconds)
        finally:
            for held in due:
                held.renewing = False
        for held, answer in zip(due, answers, strict=True):
            if isinstance(answer, StorageError):
                # Its commit will find out; nothing is lost. Tried again at the next tick.
                _log.info("the lease of %r could not be renewed: %s", held.record.path, answer)
                if held.follow and isinstance(answer, Conflict):
                    await self._follow(held)
            else:
                held.since = begun

    async def _follow(self, held: Held) -> None:
        record = held.record
        try:
            current = await self._meta.get(record.path)
        except NotFound:
            return
        if held.record is record and current.token == record.token and current.state == STORED:
            held.record = current


class _Round:
    """The leases held in one event loop, and the timer that looks at them."""

    def __init__(self) -> None:
        self.held: set[Held] = set()
        self.timer: asyncio.TimerHandle | None = None


class Held:
    """One lease that is being kept alive. Its user sets `record` to what the record has become."""

    __slots__ = ("_leases", "_round", "database", "follow", "record", "renewing", "since")

    def __init__(
        self, round_: _Round, leases: Leases, record: MetaRecord, since: float, follow: bool, database: str | None
    ) -> None:
        self._round = round_
        self._leases = leases
        self.record = record
        self.follow = follow
        self.database = database
        self.renewing = False
        self.since = since

    def check(self) -> None:
        """Raise Conflict if the lease has run out (this process was stopped, or cannot reach the meta-backend):
        somebody else may have undone the save by now, and its keys may be theirs."""
        if elapsed() - self.since >= self._leases.seconds:
            raise Conflict(f"the save of {self.record.path!r} lost its lease of {self._leases.seconds} seconds")

    def __enter__(self) -> Held:
        self._round.held.add(self)
        if self._round.timer is None:
            self._leases.start(self._round)
        return self

    def __exit__(self, *_: object) -> None:
        self._round.held.discard(self)
