"""A meta-backend in one table of a PostgreSQL database, through asyncpg."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Hashable, Mapping, Sequence
from typing import Any, ClassVar, Literal, Self, TypeVar

from ..clients.postgres import Database, lock_timed_out, map_error, storable, undid_itself
from ..errors import ConfigurationError, InvalidPath, StorageError
from ..loops import PerLoop
from ..paths import successor
from ..records import MetaRecord, Revision, State
from ..timeouts import Timeouts
from ..urls import URL, boolean, choice
from ._coalescing import Coalescer
from ._postgres_rows import changes_of, row_of, to_record
from ._postgres_schema import prepare
from ._postgres_sql import Statements
from ._postgres_table import Change, New, Removal, Renewal, Table, failed
from .base import UNCHANGED, MetaBackend, Unchanged, check_changes

__all__ = ["PostgresMetaBackend"]

T = TypeVar("T")

_CHUNK = 500  # items of one call in one statement


class PostgresMetaBackend(MetaBackend):
    """Keeps the records in a table of a PostgreSQL database (12 or later). Any number of processes may use it.

    A pool of connections per event loop, opened on first use. What many tasks ask for at the same time goes to the
    server in one statement (see `_coalescing`); one that fails because of a row is taken apart, so that this row
    alone fails. Memory is that of the answers, and of what waits.

    Schema, table and indexes are made on first use. The table may also be one that Django made for a model of
    `sync_bridge`; then what is missing is added, or said.

    Times and leases are by the clock of the server.

    Cancelled or timed out before it was sent, a call does nothing; after that its outcome is unknown. Every
    statement is a transaction of its own and happens as a whole or not at all.

    Args:
        dsn: ``postgresql://user:password@host/database?…``, as asyncpg reads it.
        pool: instead of `dsn`: an asyncpg pool, which is borrowed and serves its own event loop only; or a function
            that returns a new pool, or an awaitable of one, for the running loop, which is closed by `aclose`.
        table, schema: their names, letters, digits and underscores. Without a schema the ``search_path`` decides.
        durability: ``"power"``: refuse to work (`ConfigurationError`) where the server is set up to lose answered
            commits with the power. ``"process"``: take it as it is.
        coalesce: send what many tasks ask for at the same time in one statement.
        max_connections: of one event loop.
        connect_options: further keyword arguments of `asyncpg.connect`: ``ssl``, ``server_settings`` …
        timeouts: `operation` limits every call, waiting for a connection included.

    Raises, from every call:
        BackendUnavailable: the server cannot be reached, stops, or is short of something.
        DeadlineExceeded: no answer within `timeouts.operation`.
        ConfigurationError: wrong user, password, database or schema, a table that is not ours or is newer.
        AccessDenied: the user lacks a right.
        OutOfSpace: the server's disk is full.
        NotSupported: a value that PostgreSQL or JSON cannot keep, NUL characters above all.
    """

    keeps_deadlines: ClassVar[bool] = True
    _durable_with: ClassVar[str] = "needs durability='power' (in a URL: ?durability=power)"

    def __init__(
        self,
        dsn: str | None = None,
        *,
        pool: Any = None,
        table: str = "aproxy_files",
        schema: str | None = None,
        durability: Literal["process", "power"] = "process",
        coalesce: bool = True,
        max_connections: int = 10,
        connect_options: Mapping[str, Any] | None = None,
        timeouts: Timeouts | None = None,
    ) -> None:
        if durability not in ("process", "power"):
            raise ConfigurationError(f"durability is 'process' or 'power', not {durability!r}")
        limits = timeouts or Timeouts()
        self.table = table if schema is None else f"{schema}.{table}"
        self._sql = Statements(table, schema)
        self._database = Database(
            dsn,
            pool,
            max_connections=max_connections,
            # Half of it, so that the error can say that nothing was sent before the deadline strikes.
            connect_timeout=None if limits.operation is None else limits.operation / 2,
            connect_options=connect_options,
            grace=limits.cleanup,
        )
        super().__init__(timeouts=limits)
        self._records = Table(self._database, self._sql, str(self))
        self.durable = durability == "power"
        self.coalesce = coalesce
        self._ready = False  # the table is there, as far as this process knows
        self._preparing: PerLoop[asyncio.Lock] = PerLoop(asyncio.Lock)
        self._coalescer = Coalescer(
            self.cleanup,
            limits.operation,
            apart=undid_itself,
            held=lock_timed_out,
            places=lambda: max(1, self._database.max_connections // 2),
            failed=self._failed,
        )

    @classmethod
    def from_url(cls, url: str) -> Self:
        """Make one of a ``postgresql:`` URL. The query may hold table, schema, durability, coalesce, max_connections
        and timeouts; the rest is asyncpg's.

        Raises:
            ConfigurationError: it cannot be read.
        """
        parsed = URL.parse(url)
        own: dict[str, Callable[[str], Any]] = {
            "table": str,
            "schema": str,
            "durability": choice("process", "power"),
            "coalesce": boolean,
            "max_connections": int,
        }
        options = parsed.options(timeouts=True, others=True, **own)
        return cls(parsed.rest("timeouts", *own), **options)

    def __str__(self) -> str:
        return f"PostgresMetaBackend({self._database}, {self.table})"

    # -- ways to the server; each keeps the deadline

    async def _ask(
        self,
        kind: Hashable,
        item: Any,
        alone: Callable[[Any], Awaitable[Any]],
        together: Callable[[Sequence[Any]], Awaitable[Sequence[Any]]],
        *,
        key: str | None = None,
    ) -> Any:
        """Return the answer for `item`, alone or together with what others ask for."""
        if not self._ready:
            await self._within(self._prepare())
        if self.coalesce:
            return await self._coalescer.ask(kind, item, alone, together, key=key)
        return await self._coalescer.by_itself(kind, item, alone)

    async def _within(self, work: Awaitable[T]) -> T:
        async with asyncio.timeout(self.timeouts.operation):
            return await work

    async def _fetch(self, text: str, *values: Any) -> list[Any]:
        async with asyncio.timeout(self.timeouts.operation):
            if not self._ready:
                await self._prepare()
            return await self._database.fetch(text, *values)

    async def setup(self) -> None:
        """Make schema, table and indexes where they are missing; idempotent, also under a race of processes.

        Raises:
            ConfigurationError: the table there is newer than this library knows, or lacks columns.
            AccessDenied: the user may not make them. And as every call.
        """
        self._ready = False
        await self._call("setup", None, self._within(self._prepare()))

    async def _prepare(self) -> None:
        async with self._preparing.get():
            if self._ready:
                return
            async with self._database.use() as connection:
                await prepare(connection, self._sql, durable=self.durable)
            self._ready = True

    async def _aclose(self) -> None:
        await self._database.aclose()

    def _map_error(self, error: Exception, what: str) -> StorageError:
        mapped = map_error(error, what)
        if isinstance(mapped, ConfigurationError):
            self._ready = False  # the table may have been dropped or changed: look again
        return mapped

    # -- create and reserve

    async def _create(self, record: MetaRecord, lease: float | None) -> MetaRecord:
        made: MetaRecord = await self._ask(
            "create", self._new(record, lease), self._records.insert, self._records.insert_many
        )
        return made

    def _new(self, record: MetaRecord, lease: float | None, spare: MetaRecord | None = None) -> New:
        self._check_path(record.path)
        if spare is None:
            return New(row_of(record, lease))
        return New(row_of(record, lease), row_of(spare, lease), record.all_places())

    async def _reserve(self, record: MetaRecord, lease: float, spare: MetaRecord) -> MetaRecord | None:
        new = self._new(record, lease, spare)
        made: MetaRecord = await self._ask("reserve", new, self._records.reserve, self._records.reserve_many)
        return made

    def _check_path(self, path: str) -> None:
        if not storable(path):
            raise InvalidPath("a path with NUL characters or lone surrogates cannot be stored", path=path)

    # -- get and exists

    async def _get(self, path: str) -> MetaRecord | None:
        if not storable(path):
            return None
        found: MetaRecord | None = await self._ask("get", path, self._records.select, self._records.select_many)
        return found

    async def _exists(self, path: str, state: State | None, proxy_storage_name: str | None) -> bool:
        if not storable(path):
            return False
        row = await self._ask("exists", path, self._records.look, self._records.look_many)
        return (
            row is not None
            and (state is None or row[1] == state)
            and (proxy_storage_name is None or row[2] == proxy_storage_name)
        )

    # -- update

    async def _update(
        self, path: str, changes: Mapping[str, Any], expect: Revision | None, lease: float | Unchanged | None
    ) -> MetaRecord:
        change = self._changing(path, changes, expect, lease)
        changed: MetaRecord = await self._ask(
            change.kind, change, self._records.change, self._records.change_many, key=path
        )
        return changed

    def _changing(
        self, path: str, changes: Mapping[str, Any], expect: Revision | None, lease: float | Unchanged | None
    ) -> Change:
        if "path" in changes:
            self._check_path(changes["path"])
        if not _possible(path, expect):
            raise self._records.absent(path, expect)
        values = changes_of(changes)
        if not isinstance(lease, Unchanged):
            values["lease"] = lease
        return Change(path, values, expect)

    # -- delete

    async def _delete(self, path: str, expect: Revision | None) -> bool:
        if not _possible(path, expect):
            return False
        gone: bool = await self._ask(
            "delete", Removal(path, expect), self._records.remove, self._records.remove_many, key=path
        )
        return gone

    # -- many records

    async def create_many(
        self, records: Sequence[MetaRecord], *, lease: float | None = None
    ) -> list[MetaRecord | StorageError]:
        def make(record: MetaRecord) -> New:
            return self._new(record, lease)

        chunks = _chunks([(record.path, (record,)) for record in records])
        return await self._many("create", chunks, make, self._records.insert, self._records.insert_many)

    async def update_many(
        self,
        updates: Sequence[tuple[str, Mapping[str, Any], Revision | None]],
        *,
        lease: float | Unchanged | None = UNCHANGED,
    ) -> list[MetaRecord | StorageError]:
        for _, changes, _ in updates:
            check_changes(changes)

        def make(path: str, changes: Mapping[str, Any], expect: Revision | None) -> Change:
            return self._changing(path, changes, expect, lease)

        # One statement for a run of those that set the same columns, each of another path.
        chunks = _chunks([(update[0], update) for update in updates], kind=_kind_of_update, distinct=True)
        return await self._many("update", chunks, make, self._records.change, self._records.change_many)

    async def _renew(self, records: Sequence[MetaRecord], lease: float) -> list[MetaRecord | StorageError]:
        def make(record: MetaRecord) -> Renewal:
            return Renewal(record.path, record.revision, lease)

        chunks = _chunks([(record.path, (record,)) for record in records])
        return await self._many("renew", chunks, make, self._records.renew, self._records.renew_many)

    async def delete_many(self, items: Sequence[tuple[str, Revision | None]]) -> list[StorageError | None]:
        def make(path: str, expect: Revision | None) -> Removal:
            if not _possible(path, expect):
                raise self._records.absent(path, expect)
            return Removal(path, expect)

        chunks = _chunks([(item[0], item) for item in items], distinct=True)
        gone = await self._many("delete", chunks, make, self._records.remove, self._records.remove_many)
        answers: list[StorageError | None] = []
        for one, (path, expect) in zip(gone, items, strict=True):
            absent = None if one else self._located(self._records.absent(path, expect), "delete", path)
            answers.append(one if isinstance(one, StorageError) else absent)
        return answers

    async def get_many(self, paths: Sequence[str]) -> list[MetaRecord | None]:
        async def get(chunk: Sequence[str]) -> list[MetaRecord | None]:
            wanted = list({path for path in chunk if storable(path)})
            rows = {row[0]: row for row in await self._call("get_many", None, self._fetch(self._sql.get_many, wanted))}
            return [to_record(rows[path]) if path in rows else None for path in chunk]

        return await _two_at_once(get, [paths[start : start + _CHUNK] for start in range(0, len(paths), _CHUNK)])

    async def _many(
        self,
        operation: str,
        chunks: Sequence[_Chunk],
        make: Callable[..., Any],
        alone: Callable[[Any], Awaitable[Any]],
        together: Callable[[Sequence[Any]], Awaitable[Sequence[Any]]],
    ) -> list[Any]:
        """Return the answer for each (path, arguments of `make`): what `alone` or `together` gave, or an error."""

        async def one(chunk: _Chunk) -> list[Any]:
            answers: dict[int, Any] = {}
            items: dict[int, Any] = {}
            for number, (_, arguments) in enumerate(chunk):
                try:
                    items[number] = make(*arguments)
                except StorageError as error:
                    answers[number] = error.with_traceback(None)
            if items:
                got = await self._in_parts(operation, list(items.values()), alone, together)
                answers |= zip(items, got, strict=True)
            for number, (path, _) in enumerate(chunk):
                if isinstance(answers[number], StorageError):
                    self._located(answers[number], operation, path)
            return [answers[number] for number in range(len(chunk))]

        paths = {path for chunk in chunks for path, _ in chunk}
        if len(paths) == sum(map(len, chunks)):
            return await _two_at_once(one, chunks)
        return [answer for chunk in chunks for answer in await one(chunk)]  # in their order

    async def _in_parts(
        self,
        operation: str,
        items: list[Any],
        alone: Callable[[Any], Awaitable[Any]],
        together: Callable[[Sequence[Any]], Awaitable[Sequence[Any]]],
    ) -> list[Any]:
        """Do all in one statement; where that has undone itself because of one of them, each half by itself."""
        try:
            if len(items) == 1:
                return [await self._coalescer.by_itself(operation, items[0], lambda item: self._first(alone(item)))]
            return list(await self._within(self._first(together(items))))
        except Exception as error:
            if len(items) == 1 or not undid_itself(error):
                return [self._failure(error, f"{operation} {item.path!r} in {self}") for item in items]
        half = len(items) // 2
        return [
            *await self._in_parts(operation, items[:half], alone, together),
            *await self._in_parts(operation, items[half:], alone, together),
        ]

    async def _first(self, work: Awaitable[T]) -> T:
        if not self._ready:
            await self._prepare()
        return await work

    def _failed(self, kind: Any, item: Any, error: Exception) -> StorageError:
        """Return an error of its own for one of those that shared a statement."""
        verb = kind if isinstance(kind, str) else kind[0]
        path = item if isinstance(item, str) else item.path
        return self._failure(error, f"{verb} {path!r} in {self}")

    def _failure(self, error: Exception, what: str) -> StorageError:
        """Return an error of its own for one of many."""
        failure = failed(error, what)
        if isinstance(failure, ConfigurationError):
            self._ready = False
        return failure

    def _located(self, error: StorageError, operation: str, path: str) -> StorageError:
        return error.located(operation=operation, path=path, backend=str(self))

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
        upper = successor(prefix)
        if not (storable(prefix) and storable(lower)):
            return []
        text = self._sql.page(inclusive=inclusive, bounded=upper is not None)
        bound = () if upper is None else (upper,)
        return [to_record(row) for row in await self._fetch(text, lower, proxy_storage_name, state, limit, *bound)]

    async def _list_unfinished(
        self, proxy_storage_name: str | None, older_than: float, after: str | None, limit: int, force: bool
    ) -> Sequence[MetaRecord]:
        text = self._sql.unfinished(after=after is not None)
        bound = () if after is None else (after,)
        return [to_record(row) for row in await self._fetch(text, proxy_storage_name, force, older_than, limit, *bound)]

    async def _owners(self, original_storage_name: str | None, keys: Sequence[str]) -> Mapping[str, Sequence[str]]:
        owners: dict[str, Sequence[str]] = {}
        for start in range(0, len(keys), _CHUNK):
            chunk = keys[start : start + _CHUNK]
            owners |= await self._within(self._first(self._records.owners(original_storage_name, chunk)))
        return owners

    async def _count(self, prefix: str, proxy_storage_name: str | None, state: State | None) -> int:
        upper = successor(prefix)
        if not storable(prefix):
            return 0
        text = self._sql.count(bounded=upper is not None)
        bound = () if upper is None else (upper,)
        return int((await self._fetch(text, prefix, proxy_storage_name, state, *bound))[0][0])


def _possible(path: str, expect: Revision | None) -> bool:
    """Return whether there can be such a record."""
    return storable(path) and (expect is None or storable(expect.token))


def _kind_of_update(arguments: tuple[Any, ...]) -> Any:
    _, changes, expect = arguments
    return (*changes, expect is None)


#: Calls for one statement: each the path it is about, and its arguments.
_Chunk = list[tuple[str, tuple[Any, ...]]]


def _chunks(
    calls: Sequence[tuple[str, tuple[Any, ...]]],
    *,
    kind: Callable[[tuple[Any, ...]], Any] = lambda _: None,
    distinct: bool = False,
) -> list[_Chunk]:
    """Cut `calls` into runs of one kind for a statement each; with `distinct`, of different paths."""
    chunks: list[_Chunk] = []
    paths: set[str] = set()
    last: Any = None
    for path, arguments in calls:
        this = kind(arguments)
        if not chunks or len(chunks[-1]) == _CHUNK or this != last or (distinct and path in paths):
            chunks.append([])
            paths = set()
        chunks[-1].append((path, arguments))
        paths.add(path)
        last = this
    return chunks


async def _two_at_once(work: Callable[[T], Awaitable[list[Any]]], chunks: Sequence[T]) -> list[Any]:
    """Return what `work` gives for all `chunks`: while the server has one, the next is made ready."""
    if len(chunks) < 2:
        return [answer for chunk in chunks for answer in await work(chunk)]
    answers: dict[int, list[Any]] = {}
    left = iter(enumerate(chunks))

    async def worker() -> None:
        for number, chunk in left:
            answers[number] = await work(chunk)

    try:
        async with asyncio.TaskGroup() as group:
            for _ in range(2):
                group.create_task(worker())
    except ExceptionGroup as failed:
        raise failed.exceptions[0] from failed.exceptions[0].__cause__
    return [answer for number in range(len(chunks)) for answer in answers[number]]
