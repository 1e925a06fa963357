"""The machinery under `SQLiteMetaBackend`: connections, the writer thread with group commit, the reader threads.

Four rules keep it safe:

* A connection is touched only with the lock of its `Held` taken. It belongs to one worker thread, which opens it;
  `Engine.close` and a fork close it from outside.
* Nothing crosses a fork. SQLite counts its POSIX locks per process in memory, and a child inherits the counts without
  the locks: it believes that it holds a lock, takes none, and when the parent closes the database the log is deleted
  under the child, with what the child commits. (The usual advice, to open a new connection in the child, does not
  help: the counts are kept per file.) So every connection is closed before a fork, in the parent, and both sides
  open theirs again when they need one.
* A write is answered after its COMMIT.
* A connection whose file is not at its path any more is left. Writes would be acknowledged, and gone. Another file
  there is not opened beside the log of the former one: SQLite would apply that, and destroy it. Nor after a `close`,
  which leaves the log of a file that was moved where it is.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
import math
import os
import sqlite3
import threading
import time
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import quote

from ..blocking import blocking_loop
from ..errors import BackendUnavailable, ConfigurationError, StorageError
from ._sqlite_errors import code_of
from ._sqlite_files import Database, File, file_at, logs_of
from ._sqlite_threads import Readers, Writer

__all__ = ["Engine", "Held"]

T = TypeVar("T")

LOOK_EVERY = (
    0.1  # seconds for which a connection that reads is taken to be at the file of its path; one that writes never
)
_FORK_WAIT = 5.0  # seconds that a fork waits for a statement under way


class Held:
    """One connection, or the place for one."""

    __slots__ = ("broken", "cursor", "file", "lock", "seen")

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.cursor: sqlite3.Cursor | None = None
        self.file: File = None  # which one was opened
        self.seen = -math.inf  # when it was last seen at its path, by the monotonic clock
        self.broken = False

    def close(self) -> None:
        """Close the connection; called with the lock held. An open transaction is rolled back."""
        cursor, self.cursor, self.broken = self.cursor, None, False
        if cursor is None:
            return
        connection = cursor.connection
        with contextlib.suppress(sqlite3.Error):
            if connection.in_transaction:
                connection.rollback()
        # A cursor that still holds a statement would keep the connection, with its locks, alive behind the scenes.
        cursor.close()
        connection.close()


class Engine:
    """The threads and connections of one database file in this process; made again by itself after a fork.

    Args:
        path: absolute path of the file.
        synchronous: SQLite's level, ``"NORMAL"`` or ``"FULL"``.
        busy_timeout: seconds that a statement waits for the locks of other processes.
        readers: reader threads at most, each with a connection of its own. One does all that takes microseconds:
            several would only fight for the interpreter's lock. The others do what may take longer.
        prepare: called with the writer's connection once it is open: makes or checks the schema.
    """

    def __init__(
        self,
        path: str,
        *,
        synchronous: str,
        busy_timeout: float,
        readers: int,
        prepare: Callable[[sqlite3.Cursor], None],
    ) -> None:
        self.path = path
        self.synchronous = synchronous
        self.busy_timeout = busy_timeout
        self.prepare = prepare
        self.ready = False  # the file and its schema are there, as far as this process knows
        self.name = f"aproxy-sqlite-{Path(path).name}"
        self.writer = Writer(self, f"{self.name}-writer")
        self.lookups = Readers(self, f"{self.name}-lookup", 1)
        self.scans = Readers(self, f"{self.name}-scan", readers - 1) if readers > 1 else self.lookups
        self._hooked = False
        self._of_parents: list[object] = []
        self._used = False  # since the start or the last `close`, by this process or one that it was forked from
        self._last: Database | None = None  # the one that was opened last for writing; closed, if its log was left
        self._fresh()

    def _fresh(self) -> None:
        self._pid = os.getpid()
        self._lock = threading.Lock()
        self._writing = Held()
        self._shared = Held()  # for those who look something up in their own thread, one after another
        self._held = [self._writing, self._shared]  # and those of the readers that live
        self._local = threading.local()
        self.ready = False

    # -- used in worker threads

    def writing(self) -> Held:
        """Return the writer's connection, opened or not."""
        self._check_process()
        self._close_before_forks()
        return self._writing

    def reading(self) -> Held:
        """Return the calling reader thread's connection, opened or not."""
        self._check_process()
        held: Held | None = getattr(self._local, "held", None)
        if held is None:
            held = self._local.held = Held()
            with self._lock:
                self._held.append(held)
            self._close_before_forks()
        return held

    def leave(self) -> None:
        """Close the calling thread's reading connection: the thread ends."""
        held: Held | None = getattr(self._local, "held", None)
        if held is not None and self._pid == os.getpid():
            with self._lock:
                if held in self._held:
                    self._held.remove(held)
            with held.lock:
                held.close()

    def open_writing(self, held: Held) -> sqlite3.Cursor:
        """Return the cursor of the writer's connection, opened now if need be, with the schema in place."""
        self._leave_moved(held)
        if held.cursor is None:
            held.cursor = cursor = self._connect("rwc")
            try:
                use_wal(cursor, self.busy_timeout)
                cursor.execute(f"PRAGMA synchronous = {self.synchronous}")
                self.prepare(cursor)
            except BaseException:
                held.close()
                raise
            self._last = Database(self.path)
            held.file = self._last.file
            self._used = self.ready = True
        return held.cursor

    def open_reading(self, held: Held) -> sqlite3.Cursor:
        """Return the cursor of a reading connection, opened now if need be."""
        if held.cursor is None or time.monotonic() - held.seen > LOOK_EVERY:  # not for each: it costs a look-up a tenth
            self._leave_moved(held)
            held.seen = time.monotonic()
        if held.cursor is None:
            held.file = file_at(self.path)
            # Not mode=ro: whoever comes first after a crash recovers the log, and that is a write.
            held.cursor = cursor = self._connect("rw")
            try:
                cursor.execute("PRAGMA query_only = ON")
            except BaseException:
                held.close()
                raise
        return held.cursor

    def _leave_moved(self, held: Held) -> None:
        """Close the connection to a file that was moved away or deleted: what is written there is lost.

        Raises:
            BackendUnavailable: there is no file any more. It is not made anew: with none of its records, files would be
                taken for absent. Or there is another, and beside it the log of the former one.
        """
        if held.cursor is None and not self._used and self._last is None:
            return
        file = file_at(self.path)
        if held.cursor is not None and held.file != file:
            held.close()
            self.ready = False
        if file is None and self._used:
            raise BackendUnavailable(
                f"{self.path}: the file was moved or deleted while it was in use; put it back (a backup only after "
                f"removing {' and '.join(logs_of(self.path))}), or close the storage and open it again to begin with "
                "an empty one"
            )
        if held.cursor is None and self._last is not None and file not in (None, self._last.file):
            left = self._last.left_beside(self.path)
            if left:
                raise BackendUnavailable(
                    f"{self.path} is another file than before, with the log of the former one beside it, which SQLite "
                    f"would apply to it: put the former file back, or stop what uses it and remove "
                    f"{' and '.join(left)}, before any restart: a new process would not know"
                )

    def _connect(self, mode: str) -> sqlite3.Cursor:
        # check_same_thread: `close` and a fork close from another thread, with the lock held.
        connection = sqlite3.connect(
            f"file:{quote(os.fsencode(self.path))}?mode={mode}",
            uri=True,
            timeout=self.busy_timeout,
            isolation_level=None,
            check_same_thread=False,
        )
        return connection.cursor()

    def _check_process(self) -> None:
        if self._pid == os.getpid():
            return
        # A fork that Python was not told of: the connections could not be closed before it.
        if any(held.cursor is not None for held in self._held):
            raise ConfigurationError(
                f"{self.path} was open when this process was forked by something other than os.fork; "
                "SQLite would corrupt it. Await aclose() before such a fork"
            )
        self._fresh()

    # -- used in any thread

    def look_here(self, function: Callable[..., T], args: tuple[Any, ...]) -> T:
        """Return ``function(cursor, *args)``, a matter of microseconds, called in this thread."""
        self._check_process()
        self._close_before_forks()
        held = self._shared
        with held.lock:
            try:
                return function(self.open_reading(held), *args)
            except sqlite3.Error:
                held.close()
                raise

    # -- used in event loop threads

    def write(self, function: Callable[..., T], args: tuple[Any, ...], timeout: float | None) -> asyncio.Future[T]:
        """Call ``function(transaction, *args)`` in the writer; return the future of its answer after the COMMIT."""
        if (here := blocking_loop()) is not None:
            return self.writer.call_here(here, function, args, timeout)
        return self.writer.call(self.writer.run, function, args, timeout=timeout)

    def look_up(self, function: Callable[..., T], args: tuple[Any, ...], timeout: float | None) -> asyncio.Future[T]:
        """Call ``function(cursor, *args)``, a matter of microseconds, in a reader; return the future of its answer."""
        if (here := blocking_loop()) is not None:
            return here.perform(self.look_here, function, args)
        return self.lookups.call(self.lookups.run, function, args, timeout=timeout)

    def scan(self, function: Callable[..., T], args: tuple[Any, ...], timeout: float | None) -> asyncio.Future[T]:
        """Call ``function(cursor, *args)``, which may take longer, in a reader; return the future of its answer."""
        return self.scans.call(self.scans.run, function, args, timeout=timeout)

    async def close(self, within: float) -> None:
        """Close the connections that are not in use within `within` seconds, and let the threads end."""
        done: concurrent.futures.Future[None] = concurrent.futures.Future()
        done.set_running_or_notify_cancel()  # it cannot be cancelled: only who waits for it can
        # A thread of its own: the last one to close moves the log into the database, which takes its time.
        name = f"{self.name}-closer"
        threading.Thread(target=self._close, args=(done, time.monotonic() + within), name=name, daemon=True).start()
        with contextlib.suppress(TimeoutError):  # it goes on by itself
            await asyncio.wait_for(asyncio.wrap_future(done), within + 1.0)

    def _close(self, done: concurrent.futures.Future[None], until: float) -> None:
        try:
            self._close_all(until)
            self.lookups.shutdown()
            self.scans.shutdown()
            self.writer.shutdown()
        except BaseException as error:
            done.set_exception(error)
        else:
            done.set_result(None)

    def _close_all(self, until: float) -> None:
        self._check_process()
        with self._lock:
            every = list(self._held)
            self.ready = False
        # The writer's last: the last one to close moves the log into the database and deletes it.
        for one in reversed(every):
            if not one.lock.acquire(timeout=max(0.0, until - time.monotonic())):
                continue
            try:
                if one is self._writing and one.cursor is not None:
                    _optimize(one.cursor)
                one.close()
                if one is self._writing:  # not before: until here somebody may write
                    self._used = False
                    if not self._has_left_log():
                        self._last = None  # it holds descriptors
            finally:
                one.lock.release()

    def _has_left_log(self) -> bool:
        """Return whether a log of ours lies where its file is not any more, as far as can be seen."""
        try:
            return (
                self._last is not None
                and file_at(self.path) != self._last.file
                and bool(self._last.left_beside(self.path))
            )
        except StorageError:
            return True

    # -- around a fork

    def _close_before_forks(self) -> None:
        if not self._hooked:
            _install(self)
            self._hooked = True

    def before_fork(self) -> list[threading.Lock]:
        """Close every connection and return the locks taken, to be released after the fork in the parent."""
        if self._pid != os.getpid():
            return []
        taken = []
        if self._lock.acquire(timeout=_FORK_WAIT):
            taken.append(self._lock)
        until = time.monotonic() + _FORK_WAIT
        for held in reversed(self._held):
            if held.lock.acquire(timeout=max(0.0, until - time.monotonic())):
                taken.append(held.lock)
                held.close()
        return taken

    def after_fork_in_child(self) -> None:
        """Forget the parent's threads and locks."""
        if any(held.cursor is not None for held in self._held):
            return  # a statement took too long: `_check_process` refuses to go on, rather than corrupt
        self._of_parents.append((self._held, self._local))
        self._fresh()


def use_wal(cursor: sqlite3.Cursor, within: float) -> None:
    """Switch the database to a write-ahead log, if it is not; that needs it alone for a moment."""
    until = time.monotonic() + within
    while True:
        try:
            cursor.execute("PRAGMA journal_mode = WAL").fetchall()
        except sqlite3.OperationalError as error:
            # Where waiting might be a deadlock SQLite does not wait: two that open a new file at once meet here.
            if code_of(error) != sqlite3.SQLITE_BUSY or time.monotonic() >= until:
                raise
            time.sleep(0.01)
        else:
            return


def _optimize(cursor: sqlite3.Cursor) -> None:
    """Let SQLite refresh its statistics, if that needs no waiting."""
    with contextlib.suppress(sqlite3.Error):  # a courtesy to later queries: nothing depends on it
        cursor.execute("PRAGMA busy_timeout = 0").fetchall()
        cursor.execute("PRAGMA analysis_limit = 400").fetchall()
        cursor.execute("PRAGMA optimize").fetchall()


# -- forks

_engines: weakref.WeakSet[Engine] = weakref.WeakSet()
_engines_lock = threading.Lock()
_taken: list[threading.Lock] = []
_installed = False


def _install(engine: Engine) -> None:
    """Have the connections of `engine` closed before a fork. On first use, because importing does nothing."""
    global _installed
    with _engines_lock:
        _engines.add(engine)
        if not _installed:
            _installed = True
            os.register_at_fork(before=_before_fork, after_in_parent=_after_in_parent, after_in_child=_after_in_child)


def _before_fork() -> None:
    _engines_lock.acquire()
    for engine in list(_engines):
        _taken.extend(engine.before_fork())


def _after_in_parent() -> None:
    while _taken:
        _taken.pop().release()
    _engines_lock.release()


def _after_in_child() -> None:
    global _engines_lock
    _taken.clear()
    _engines_lock = threading.Lock()
    for engine in list(_engines):
        engine.after_fork_in_child()
