"""The hop into the thread in which Django's ORM runs, with a deadline, and what keeps it alive.

asgiref chooses the thread: that of the synchronous caller where there is one, so that his connection and transaction
are used; else that of the request (`ThreadSensitiveContext`); else one for the whole process. It runs one call after
another.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

from asgiref.sync import AsyncToSync, SyncToAsync, sync_to_async
from django.db import InterfaceError, OperationalError, connections

from ..blocking import blocking_loop
from ..errors import DeadlineExceeded
from ._orm_errors import NotConnected

__all__ = ["in_djangos_thread", "in_this_thread"]

T = TypeVar("T")


class _Job:
    """One call. Either the thread begins it or its waiting caller takes it back, never both."""

    __slots__ = ("_ticket", "alias", "args", "function", "repeatable")

    def __init__(
        self, alias: Callable[[], str], function: Callable[..., Any], args: tuple[Any, ...], repeatable: bool
    ) -> None:
        self.alias = alias
        self.function = function
        self.args = args
        self.repeatable = repeatable
        self._ticket = [None]

    def take(self) -> bool:
        """Return whether nobody else has taken it before."""
        try:
            self._ticket.pop()
        except IndexError:
            return False
        return True


async def in_djangos_thread(
    alias: Callable[[], str],
    function: Callable[..., T],
    *args: Any,
    limit: float | None,
    repeatable: bool = False,
) -> T:
    """Return ``function(connection, *args)``, called in the thread of Django's ORM.

    `alias` is called there too, and names the database. After `limit` seconds, those in the queue included, the
    caller is released; what runs then runs on, what still waits never begins. `repeatable`: a read, done once more
    if the connection turns out to have been lost. A thread that may block (see `blocking`) is Django's own: there it
    is called at once, and nobody can be released.

    Raises:
        NotConnected: the database could not be reached.
        DeadlineExceeded. And what `function` raises.
    """
    _watch_forks()
    job = _Job(alias, function, args, repeatable)
    if (here := blocking_loop()) is not None:
        value: T = here.apart(_perform, job)
        return value
    clock = asyncio.timeout(limit)
    try:
        async with clock:
            result: T = await _perform_there(job)
            return result
    except TimeoutError as error:
        if not clock.expired():
            raise
        begun = not job.take()
        raise DeadlineExceeded(
            f"no answer from Django's ORM within {limit:g} seconds"
            + ("" if begun else ": its thread is busy with something else, nothing was begun"),
            outcome_unknown=begun and not repeatable,
        ) from error
    except asyncio.CancelledError as error:
        if job.take():
            error.outcome_unknown = False  # type: ignore[attr-defined]
        raise


def in_this_thread(alias: Callable[[], str], function: Callable[..., T], *args: Any) -> T:
    """Return ``function(connection, *args)``, a read, called here and now.

    Raises:
        NotConnected: the database could not be reached. And what `function` raises.
    """
    _watch_forks()
    result: T = _perform(_Job(alias, function, args, True))
    return result


def _perform(job: _Job) -> Any:
    if not job.take():
        return None
    connection = connections[job.alias()]
    _mend(connection)
    was_open = connection.connection is not None
    try:
        connection.ensure_connection()
    except Exception as error:
        raise NotConnected from error
    try:
        return job.function(connection, *job.args)
    except (OperationalError, InterfaceError):
        if not _mend(connection) or not (job.repeatable and was_open):
            raise
    # The server was restarted since the last call, say.
    try:
        connection.ensure_connection()
    except Exception as error:
        raise NotConnected from error
    return job.function(connection, *job.args)


_perform_anywhere = sync_to_async(_perform, thread_sensitive=True)


async def _perform_there(job: _Job) -> Any:
    """Perform `job` in the thread that asgiref would choose."""
    executor = getattr(AsyncToSync.executors, "current", None)
    if executor is None:
        return await _perform_anywhere(job)
    # A synchronous caller waits, and serves his thread. There the job finds his own context as it is, so that none
    # has to be carried over: that takes longer than many a statement.
    return await asyncio.wrap_future(executor.submit(_perform, job))


def _mend(connection: Any) -> bool:
    """Close a connection that has broken, so that the next use opens another; return whether it was closed.

    Django does so between requests only, and there may never be one. In a transaction nothing can be mended.
    """
    if not connection.errors_occurred or connection.in_atomic_block or connection.connection is None:
        return False
    if connection.is_usable():
        connection.errors_occurred = False
        return False
    connection.close()
    return True


# -- forks

_kept: list[Any] = []  # of the parent's: not to be closed here, so not to be collected either
_watched = False


def _watch_forks() -> None:
    global _watched
    if not _watched:
        _watched = True
        os.register_at_fork(after_in_child=_after_fork)


def _after_fork() -> None:
    # asgiref's thread is not there in the child, but its executor takes it for idle: every call would hang.
    _kept.append(SyncToAsync.single_thread_executor)
    SyncToAsync.single_thread_executor = ThreadPoolExecutor(max_workers=1)
    # Django would go on using the parent's connections. To close one would say goodbye to the parent's server.
    for connection in connections.all(initialized_only=True):
        if connection.connection is not None and not connection.in_atomic_block:
            _kept.append(connection.connection)
            connection.connection = None
            connection.errors_occurred = False
