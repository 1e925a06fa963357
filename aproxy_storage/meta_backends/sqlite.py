"""A meta-backend in one SQLite file, with its own writer thread and group commit."""

from __future__ import annotations

import os
import sqlite3
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar, Literal, Self, TypeVar

from ..errors import (
    AlreadyExists,
    ConfigurationError,
    Conflict,
    InvalidPath,
    NotFound,
    NotSupported,
    StorageError,
    copies_of,
)
from ..paths import sqlite_files, successor
from ..records import MetaRecord, Revision, State
from ..timeouts import Timeouts
from ..urls import URL, choice
from ._rows import changed, to_record, to_row, values_of
from ._sqlite_engine import Engine
from ._sqlite_errors import sqlite_error
from ._sqlite_schema import Statements, prepare
from ._sqlite_threads import Transaction
from .base import UNCHANGED, MetaBackend, Unchanged, check_changes

__all__ = ["SQLiteMetaBackend"]

A = TypeVar("A")

_CHUNK = 500  # items of one call that share a hop, and a share of a transaction
_PATH, _TOKEN, _VERSION, _LEASE = 0, 5, 6, 8


class SQLiteMetaBackend(MetaBackend):
    """Keeps the records in a table of one SQLite file in WAL mode. Any number of processes may use it at once.

    One thread per process writes: what waits together shares one transaction, and is answered after its COMMIT. A
    statement that fails undoes only itself. A few reader threads see the last commit and never wait for a writer.
    At most `readers` + 1 threads and connections, opened on first use; memory is that of the answers.

    The file and its tables are made on first use. Before an ``os.fork`` the connections are closed, for which it may
    wait 5 seconds for a statement under way; where that is not enough the child gets ConfigurationError from every
    call, and the parent goes on. `_sqlite_engine` says why.

    Times and leases are by SQLite's clock, which is that of the host: several hosts must not share the file (SQLite's
    WAL forbids it anyway).

    Cancelled or timed out before it began, a call does nothing; after that its outcome is unknown, and the
    transaction it is part of ends all or nothing.

    Args:
        path: the file; its directory must exist. Relative to the working directory of now.
        table: name of the table; several may live in one file.
        durability: ``"process"``: what was answered survives the death of the process; ``"power"``: and the loss of
            power, for one fsync per transaction.
        readers: reader threads.
        timeouts: `operation` limits every call, waiting for a thread and for other processes' locks included.
        busy_timeout: seconds to wait for locks of other processes; by default four fifths of `timeouts.operation`,
            so that the error can name the reason before the deadline strikes.

    Raises, from every call:
        BackendUnavailable: the file is locked by another process, cannot be opened, or the disk fails.
        DeadlineExceeded: no answer within `timeouts.operation`.
        ConfigurationError: the file is not an SQLite database, or its schema is newer than this library.
        IntegrityError: the file is damaged.
        AccessDenied: the file or its directory is not writable.
        OutOfSpace: the disk is full.
        NotSupported: a value that SQLite or JSON cannot keep, or a trigger that keeps a record from being written.
    """

    keeps_deadlines: ClassVar[bool] = True
    works_here: ClassVar[bool] = True
    in_order: ClassVar[bool] = True  # one thread writes, and a transaction is answered by the library, not by a server
    driver_errors: ClassVar[tuple[type[BaseException], ...]] = (sqlite3.Error,)

    _durable_with: ClassVar[str] = "needs durability='power' (in a URL: ?durability=power)"

    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        table: str = "aproxy_files",
        durability: Literal["process", "power"] = "process",
        readers: int = 2,
        timeouts: Timeouts | None = None,
        busy_timeout: float | None = None,
    ) -> None:
        name = os.fspath(path)
        if name in ("", ":memory:") or name.startswith("file:"):
            raise ConfigurationError(
                f"SQLiteMetaBackend needs the path of a file, not {name!r}; for records in memory use MemoryMetaBackend"
            )
        if durability not in ("process", "power"):
            raise ConfigurationError(f"durability is 'process' or 'power', not {durability!r}")
        if readers < 1:
            raise ConfigurationError(f"readers must be at least 1, not {readers}")
        self.path = os.path.abspath(name)
        super().__init__(timeouts=timeouts)
        if busy_timeout is None:
            busy_timeout = 0.8 * self.timeouts.operation if self.timeouts.operation is not None else 3600.0
        self.durable = durability == "power"
        self._sql = Statements(table)
        self._engine = Engine(
            self.path,
            synchronous="FULL" if self.durable else "NORMAL",
            busy_timeout=busy_timeout,
            readers=readers,
            prepare=lambda cursor: prepare(cursor, self._sql, self.path),
        )

    @classmethod
    def from_url(cls, url: str) -> Self:
        """Make one of ``sqlite:////srv/records.sqlite3?durability=power``, or of a relative ``sqlite:///records.sqlite3``.

        By the custom of this scheme an absolute path has four slashes. The parameters are the arguments of the class.
        """
        parsed = URL.parse(url)
        options = parsed.options(
            table=str,
            durability=choice("process", "power"),
            readers=int,
            busy_timeout=float,
            timeouts=True,
        )
        return cls(parsed.database_path(), **options)

    def __str__(self) -> str:
        return f"SQLiteMetaBackend({self.path})"

    def _local_files(self) -> Sequence[str]:
        return sqlite_files(self.path)

    # -- hops: a write goes to the writer, a read to a reader, once the tables are there

    async def _write(self, function: Callable[..., A], *args: Any) -> A:
        return await self._engine.write(function, args, self.timeouts.operation)

    async def _look_up(self, function: Callable[..., A], *args: Any) -> A:
        if not self._engine.ready:
            await self._setup()
        return await self._engine.look_up(function, args, self.timeouts.operation)

    async def _scan(self, function: Callable[..., A], *args: Any) -> A:
        if not self._engine.ready:
            await self._setup()
        return await self._engine.scan(function, args, self.timeouts.operation)

    async def setup(self) -> None:
        await self._call("setup", None, self._setup())

    async def _setup(self) -> None:
        await self._engine.write(_nothing, (), self.timeouts.operation)

    async def _aclose(self) -> None:
        await self._engine.close(self.timeouts.cleanup)

    def _map_error(self, error: Exception, what: str) -> StorageError:
        if isinstance(error, sqlite3.Error):
            return sqlite_error(error, self.path)
        if isinstance(error, UnicodeEncodeError):
            return InvalidPath(f"could not {what}: text with lone surrogates cannot be stored")
        if isinstance(error, OverflowError):
            return NotSupported(f"could not {what}: SQLite keeps integers of 64 bits")
        return super()._map_error(error, what)

    # -- one record

    async def _create(self, record: MetaRecord, lease: float | None) -> MetaRecord:
        return await self._write(self._insert, record, lease)

    def _insert(self, transaction: Transaction, record: MetaRecord, lease: float | None) -> MetaRecord:
        now = transaction.now
        row = to_row(record, None if lease is None else now + lease, now)
        cursor = transaction.cursor
        if cursor.execute(self._sql.insert, row).rowcount:
            return to_record(row)
        taken = cursor.execute(self._sql.get, (record.path,)).fetchone()
        if taken is None:
            raise self._swallowed("take the record of", record.path)
        if record.token and taken[_TOKEN] == record.token:
            return to_record(taken)
        raise AlreadyExists(f"{self} holds a record of {record.path!r} already", path=record.path)

    async def _reserve(self, record: MetaRecord, lease: float, spare: MetaRecord) -> MetaRecord | None:
        return await self._write(self._insert_or_spare, record, lease, spare)

    def _insert_or_spare(
        self, transaction: Transaction, record: MetaRecord, lease: float, spare: MetaRecord
    ) -> MetaRecord:
        # One transaction, one hop: between the look and the insert nobody else can write.
        for place in record.all_places():
            values = (place.key, place.original, record.path)
            if transaction.cursor.execute(self._sql.is_named_elsewhere, values).fetchone()[0]:
                return self._insert(transaction, spare, lease)
        return self._insert(transaction, record, lease)

    async def _get(self, path: str) -> MetaRecord | None:
        return await self._look_up(self._select, path)

    def _select(self, cursor: sqlite3.Cursor, path: str) -> MetaRecord | None:
        try:
            row = cursor.execute(self._sql.get, (path,)).fetchone()
        except UnicodeEncodeError:
            return None
        return None if row is None else to_record(row)

    @property
    def looks_here(self) -> bool:
        return self._engine.ready

    def look_here(self, path: str) -> MetaRecord | None:
        try:
            return self._engine.look_here(self._select, (path,))
        except StorageError as error:
            error.located(operation="get", path=path, backend=str(self))
            raise
        except Exception as error:
            raise self._map_error(error, "get").located(operation="get", path=path, backend=str(self)) from error

    async def _exists(self, path: str, state: State | None, proxy_storage_name: str | None) -> bool:
        row = await self._look_up(self._look, path)
        return (
            row is not None
            and (state is None or row[0] == state)
            and (proxy_storage_name is None or row[1] == proxy_storage_name)
        )

    def _look(self, cursor: sqlite3.Cursor, path: str) -> tuple[str, str] | None:
        try:
            row: tuple[str, str] | None = cursor.execute(self._sql.exists, (path,)).fetchone()
        except UnicodeEncodeError:
            return None
        return row

    async def _update(
        self, path: str, changes: Mapping[str, Any], expect: Revision | None, lease: float | Unchanged | None
    ) -> MetaRecord:
        return await self._write(self._change, path, dict(changes), expect, lease)

    def _change(
        self,
        transaction: Transaction,
        path: str,
        changes: Mapping[str, Any],
        expect: Revision | None,
        lease: float | Unchanged | None,
    ) -> MetaRecord:
        # Reading first is atomic here: the transaction is the only writer. It tells apart what went wrong, and
        # needs no RETURNING, which the SQLite of some supported systems does not have.
        cursor = transaction.cursor
        try:
            row = cursor.execute(self._sql.get, (path,)).fetchone()
        except UnicodeEncodeError:
            row = None
        if row is None or (expect is not None and (row[_TOKEN], row[_VERSION]) != (expect.token, expect.version)):
            raise self._absent(path, expect)
        new, columns = changed(row, changes, transaction.now)
        if not isinstance(lease, Unchanged):
            new[_LEASE] = None if lease is None else transaction.now + lease
            columns.append("lease")
        try:
            done = cursor.execute(self._sql.update(tuple(columns)), (*values_of(new, columns), path))
        except sqlite3.IntegrityError as error:
            if error.sqlite_errorcode not in (sqlite3.SQLITE_CONSTRAINT_PRIMARYKEY, sqlite3.SQLITE_CONSTRAINT_UNIQUE):
                raise
            if not any(column.endswith(".path") for column in str(error).partition(": ")[2].split(", ")):
                raise NotSupported(f"{self}: a constraint of the table forbids it ({error})", path=path) from error
            raise AlreadyExists(f"{self} holds a record of {new[_PATH]!r} already", path=new[_PATH]) from error
        if not done.rowcount:
            raise self._swallowed("change the record of", path)
        return to_record(new)

    def _absent(self, path: str, expect: Revision | None) -> StorageError:
        if expect is not None:
            return Conflict(f"the record of {path!r} is gone or has changed", path=path)
        return NotFound(f"{self} holds no record of {path!r}", path=path)

    def _swallowed(self, what: str, path: str) -> StorageError:
        return NotSupported(f"{self} does not {what} {path!r}: a trigger of the table keeps it from that", path=path)

    async def _delete(self, path: str, expect: Revision | None) -> bool:
        return await self._write(self._remove, path, expect)

    def _remove(self, transaction: Transaction, path: str, expect: Revision | None) -> bool:
        try:
            if expect is None:
                done = transaction.cursor.execute(self._sql.delete, (path,))
            else:
                done = transaction.cursor.execute(self._sql.delete_expected, (path, *expect))
        except UnicodeEncodeError:
            return False
        if done.rowcount:
            return True
        row = transaction.cursor.execute(self._sql.get, (path,)).fetchone()
        if row is not None and (expect is None or (row[_TOKEN], row[_VERSION]) == expect):
            raise self._swallowed("delete the record of", path)
        return False

    # -- many records

    async def create_many(
        self, records: Sequence[MetaRecord], *, lease: float | None = None
    ) -> list[MetaRecord | StorageError]:
        return await self._many("create", self._insert, [(record.path, record, lease) for record in records])

    async def update_many(
        self,
        updates: Sequence[tuple[str, Mapping[str, Any], Revision | None]],
        *,
        lease: float | Unchanged | None = UNCHANGED,
    ) -> list[MetaRecord | StorageError]:
        for _, changes, _ in updates:
            check_changes(changes)
        items = [(path, path, dict(changes), expect, lease) for path, changes, expect in updates]
        return await self._many("update", self._change, items)

    async def delete_many(self, items: Sequence[tuple[str, Revision | None]]) -> list[StorageError | None]:
        answers = await self._many("delete", self._remove_or_raise, [(path, path, expect) for path, expect in items])
        return [answer if isinstance(answer, StorageError) else None for answer in answers]

    def _remove_or_raise(self, transaction: Transaction, path: str, expect: Revision | None) -> bool:
        if not self._remove(transaction, path, expect):
            raise self._absent(path, expect)
        return True

    async def _many(
        self, operation: str, function: Callable[..., A], items: list[tuple[Any, ...]]
    ) -> list[A | StorageError]:
        """Call ``function(transaction, *rest)`` for each (path, *rest); return answers and errors in order.

        A chunk shares one transaction. After a cancellation the chunk under way is done or not, as a whole, and
        those after it are not.
        """
        answers: list[A | StorageError] = []
        for start in range(0, len(items), _CHUNK):
            chunk = items[start : start + _CHUNK]
            try:
                answers += await self._call(
                    f"{operation}_many", None, self._write(self._each, operation, function, chunk)
                )
            except StorageError as error:
                answers += copies_of(error, operation, (path for path, *_ in chunk), str(self))
        return answers

    def _each(
        self, transaction: Transaction, operation: str, function: Callable[..., A], items: list[tuple[Any, ...]]
    ) -> list[A | StorageError]:
        answers: list[A | StorageError] = []
        for path, *rest in items:
            try:
                answers.append(function(transaction, *rest))
            except Exception as error:
                if not transaction.alive:
                    raise
                mapped = error if isinstance(error, StorageError) else self._map_error(error, f"{operation} {path!r}")
                if mapped is not error:
                    mapped.__cause__ = error
                mapped.located(operation=operation, path=path, backend=str(self))
                # An error that is kept, not raised, must not keep this frame and all other answers alive.
                answers.append(mapped.with_traceback(None))
        return answers

    async def get_many(self, paths: Sequence[str]) -> list[MetaRecord | None]:
        found: list[MetaRecord | None] = []
        for start in range(0, len(paths), _CHUNK):
            chunk = paths[start : start + _CHUNK]
            found += await self._call("get_many", None, self._scan(self._select_each, chunk))
        return found

    def _select_each(self, cursor: sqlite3.Cursor, paths: Sequence[str]) -> list[MetaRecord | None]:
        return [self._select(cursor, path) for path in paths]

    # -- listings

    async def _page(
        self,
        prefix: str,
        lower: str,
        inclusive: bool,
        limit: int,
        proxy_storage_name: str | None,
        state: State | None,
    ) -> Sequence[MetaRecord]:
        text = self._sql.page_from if inclusive else self._sql.page_after
        return await self._scan(self._rows, text, (lower, _upper(prefix), proxy_storage_name, state, limit))

    async def _list_unfinished(
        self, proxy_storage_name: str | None, older_than: float, after: str | None, limit: int, force: bool
    ) -> Sequence[MetaRecord]:
        text = self._sql.unfinished_from_start if after is None else self._sql.unfinished
        return await self._scan(self._rows, text, (after or "", proxy_storage_name, force, older_than, limit))

    def _rows(self, cursor: sqlite3.Cursor, text: str, values: tuple[Any, ...]) -> list[MetaRecord]:
        try:
            return [to_record(row) for row in cursor.execute(text, values).fetchall()]
        except UnicodeEncodeError:
            return []

    async def _owners(self, original_storage_name: str | None, keys: Sequence[str]) -> Mapping[str, Sequence[str]]:
        owners: dict[str, Sequence[str]] = {}
        for start in range(0, len(keys), _CHUNK):
            owners |= await self._scan(self._owning, original_storage_name, keys[start : start + _CHUNK])
        return owners

    def _owning(self, cursor: sqlite3.Cursor, original: str | None, keys: Sequence[str]) -> dict[str, Sequence[str]]:
        owners: dict[str, Sequence[str]] = {}
        for key in keys:  # in SQLite a statement costs no round trip
            try:
                paths = [row[0] for row in cursor.execute(self._sql.owners, (key, original)).fetchall()]
            except UnicodeEncodeError:
                continue
            if paths:
                owners[key] = paths
        return owners

    async def _count(self, prefix: str, proxy_storage_name: str | None, state: State | None) -> int:
        return await self._scan(self._number, (prefix, _upper(prefix), proxy_storage_name, state))

    def _number(self, cursor: sqlite3.Cursor, values: tuple[Any, ...]) -> int:
        try:
            return int(cursor.execute(self._sql.count, values).fetchone()[0])
        except UnicodeEncodeError:
            return 0


def _upper(prefix: str) -> str | bytes:
    """Return what is greater than every text that begins with `prefix`. SQLite sorts every BLOB after every text."""
    return successor(prefix) or b""


def _nothing(transaction: Transaction) -> None:
    """Be a write, so that the writer opens the file and makes the tables."""
