"""The threads of `SQLiteMetaBackend`: one that writes with group commit, and a few that read."""

from __future__ import annotations

import asyncio
import os
import sqlite3
import threading
import time
from collections import deque
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any, TypeVar

from ..blocking import BlockingLoop, came_from_outside
from ..errors import BackendUnavailable, StorageError, copy_of
from ..threads import Job, Workers
from ._sqlite_errors import code_of, sqlite_error

if TYPE_CHECKING:
    from ._sqlite_engine import Engine, Held

__all__ = ["Readers", "Transaction", "Writer"]

T = TypeVar("T")

_SHARE = 256  # jobs in one transaction at most
_TURN = 0.01  # seconds that a thread which writes itself waits for its turn: a hundred times what a transaction takes


class Transaction:
    """The write transaction under way: the cursor, and the database's time, which is read once and only if needed."""

    __slots__ = ("_now", "cursor")

    def __init__(self, cursor: sqlite3.Cursor) -> None:
        self.cursor = cursor
        self._now: float | None = None

    @property
    def alive(self) -> bool:
        """Whether it goes on: a full disk or failed I/O ends the whole transaction with the statement."""
        return self.cursor.connection.in_transaction

    @property
    def now(self) -> float:
        """Seconds since 1970 by SQLite's clock, in milliseconds as it keeps it."""
        if self._now is None:
            row = self.cursor.execute("SELECT round((julianday('now') - 2440587.5) * 86400.0, 3)").fetchone()
            self._now = float(row[0])
        return self._now


class _Gathered:
    """What the tasks of one event loop ask for until it next looks for events. Used in its thread only."""

    __slots__ = ("answers", "jobs", "loop", "workers")

    def __init__(self, workers: _Gathering, answers: Any) -> None:
        self.workers = workers
        self.answers = answers
        self.loop: asyncio.AbstractEventLoop = answers.loop
        self.jobs: list[Job] = []

    def hand_over(self) -> None:
        jobs, self.jobs = self.jobs, []
        try:
            self.workers.put_all(jobs)
        except BackendUnavailable as error:  # nobody is there to raise it to
            _fail(deque(jobs), error)


class _Gathering(Workers):
    """Workers that are handed all that the tasks of a loop ask for in one go, when the loop has run them all.

    Woken up by the first of 64 tasks, a worker would fight with the others for the interpreter's lock, losing it and
    waiting for it at every statement. Woken up once, it has them all, and the lock, while the loop sleeps.
    """

    def __init__(self, name: str, max_workers: int, *, max_waiting: int, share: int) -> None:
        super().__init__(name, max_workers, max_waiting=max_waiting, share=share)
        self._here = threading.local()

    def call(self, function: Callable[..., T], *args: Any, timeout: float | None) -> asyncio.Future[T]:
        loop = asyncio.get_running_loop()
        gathered: _Gathered | None = getattr(self._here, "gathered", None)
        if gathered is None or gathered.loop is not loop or self._pid != os.getpid():
            gathered = self._here.gathered = _Gathered(self, self._answers.get())
        future: asyncio.Future[T] = loop.create_future()
        job = Job(partial(function, *args), future, gathered.answers)
        if timeout is not None:
            job.deadline = loop.time() + timeout
        if gathered.jobs:
            if len(self._jobs) + len(gathered.jobs) >= self._max_waiting:
                raise BackendUnavailable(f"{self._name}: {self._max_waiting} calls wait already")
            gathered.jobs.append(job)
        elif not self._jobs and len(self._running) <= len(self._looking):
            self.put_all([job])  # all quiet: who asks for one thing after the other is not kept waiting
        else:
            gathered.jobs.append(job)
            loop.call_soon(gathered.hand_over)
        gathered.answers.watch(job)
        return future

    def put_all(self, jobs: list[Job]) -> None:
        """Put `jobs` into the queue.

        Raises:
            BackendUnavailable: there is no worker and none can be started; none of them is done.
        """
        if self._pid != os.getpid():
            self._fresh()
        with self._lock:
            self._jobs.extend(jobs)
            self._rouse_for(len(jobs))


class _JobHere(Job):
    """A job of the calling thread, where a signal handler may raise in the middle of it."""

    def run(self) -> None:
        super().run()
        if self.error is not None and came_from_outside(self.error, sqlite3.Error):
            raise self.error


class Writer(_Gathering):
    """One thread, where the writes that wait together share a transaction."""

    def __init__(self, engine: Engine, name: str) -> None:
        super().__init__(name, 1, max_waiting=100_000, share=_SHARE)
        self._engine = engine
        self._transaction: Transaction

    def run(self, function: Callable[..., T], args: tuple[Any, ...]) -> T:
        return function(self._transaction, *args)

    def call_here(
        self, loop: BlockingLoop, function: Callable[..., T], args: tuple[Any, ...], timeout: float | None
    ) -> asyncio.Future[T]:
        """Have it done in a transaction of its own by the calling thread, which may block; where others are at it, by
        the writer thread, so that those who wait share a transaction, and one sync of the disk."""
        future: asyncio.Future[T] = loop.create_future()
        job = _JobHere(partial(self.run, function, args), future, None)
        try:
            held = self._engine.writing()
        except StorageError as error:
            _fail(deque((job,)), error)
            return future
        until = time.monotonic() + (0.0 if self._engine.synchronous == "FULL" else _TURN)
        while held.lock.locked():
            if time.monotonic() >= until:
                return self.call(self.run, function, args, timeout=timeout)
            time.sleep(_TURN / 50)
        with held.lock:  # not by `acquire`: an interrupt between that and what releases it would keep it for ever
            try:
                self._run_transaction(held, deque((job,)))
            except BaseException:  # an interrupt of this thread: the transaction must not stay open
                held.close()
                raise
        return future

    def rescue(self) -> None:
        """Do nothing: there is no other thread that could take what waits behind a slow transaction."""

    def run_batch(self, batch: deque[Job]) -> None:
        while batch:
            try:
                held = self._engine.writing()
            except StorageError as error:
                _fail(batch, error)
                return
            with held.lock:
                self._run_transaction(held, batch)

    def _run_transaction(self, held: Held, batch: deque[Job]) -> None:
        try:
            cursor = self._engine.open_writing(held)
            cursor.execute("BEGIN IMMEDIATE")
        except Exception as error:
            if came_from_outside(error, sqlite3.Error):
                raise
            held.close()
            _fail(batch, sqlite_error(error, self._engine.path))
            return
        self._transaction = Transaction(cursor)
        connection = cursor.connection
        ran: list[Job] = []
        failure: StorageError | None = None
        while batch:
            job = batch.popleft()
            if not self.claim(job):
                continue
            job.run()
            ran.append(job)
            if job.error is not None and not connection.in_transaction:
                # Full disk, failed I/O and the like end the whole transaction, not only the statement.
                failure = sqlite_error(job.error, self._engine.path)
                break
        if failure is None:
            try:
                cursor.execute("COMMIT")
            except Exception as error:
                if came_from_outside(error, sqlite3.Error):
                    raise
                failure = sqlite_error(error, self._engine.path)
                # A log that could not be written is not committed; one that could not be synced may be found again.
                failure.outcome_unknown = code_of(error) not in (sqlite3.SQLITE_FULL, sqlite3.SQLITE_BUSY)
        if failure is not None:
            held.close()  # rolls back what is open
        answered: set[Any] = set()
        for job in ran:
            # An AlreadyExists or Conflict may be about a row that has gone with the transaction: it is no answer.
            if failure is not None and not isinstance(job.error, sqlite3.Error):
                job.error = copy_of(failure)
            self.answer(job, answered)
        if answered and not batch:
            self._looking.add(threading.get_ident())
        for answers in answered:
            answers.wake()


class Readers(_Gathering):
    """A few threads with a read-only connection each, which see the last commit and wait for no writer."""

    def __init__(self, engine: Engine, name: str, count: int) -> None:
        super().__init__(name, count, max_waiting=100_000, share=64)
        self._engine = engine
        self._mine = threading.local()

    def run(self, function: Callable[..., T], args: tuple[Any, ...]) -> T:
        held = self._mine.held
        try:
            return function(held.cursor, *args)
        except sqlite3.Error:
            held.broken = True
            raise

    def run_batch(self, batch: deque[Job]) -> None:
        try:
            held = self._mine.held = self._engine.reading()
            with held.lock:
                cursor = self._engine.open_reading(held)
                try:
                    # One snapshot for all: taking SQLite's locks costs as much as a lookup. It is taken after the
                    # last of them was asked for, so each sees what was answered before.
                    if len(batch) > 1:
                        cursor.execute("BEGIN")
                    super().run_batch(batch)
                    if cursor.connection.in_transaction:
                        cursor.execute("COMMIT")
                except sqlite3.Error:
                    held.broken = True
                    raise
                finally:
                    if held.broken:
                        held.close()
        except Exception as error:
            _fail(batch, sqlite_error(error, self._engine.path))

    def _serve(self) -> None:
        try:
            super()._serve()
        finally:
            self._engine.leave()


def _fail(batch: deque[Job], error: StorageError) -> None:
    """Answer all of `batch` with `error`, none of them having run."""
    answered: set[Any] = set()
    while batch:
        job = batch.popleft()
        if Workers.claim(job):
            job.error = copy_of(error)
            Workers.answer(job, answered)
    for answers in answered:
        answers.wake()
