"""Objects as rows of a PostgreSQL database, for those who want to back up one database and nothing else."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Iterator, Mapping
from types import MappingProxyType
from typing import Any, Self, TypeVar

from ..clients.postgres import Database, UniqueViolation, map_error, storable
from ..content import Source
from ..errors import (
    AlreadyExists,
    ConfigurationError,
    Conflict,
    IntegrityError,
    NotFound,
    StorageError,
    outcome_unknown,
)
from ..futures import outcome_of, over
from ..loops import PerLoop
from ..paths import new_token, successor
from ..records import ByteRange, Capabilities, ObjectInfo
from ..timeouts import Timeouts
from ..urls import URL
from ._postgres_sql import CHUNK_BYTES, Statements, prepare
from .base import Backend, Reader

__all__ = ["PostgresBackend"]

T = TypeVar("T")

_PAGE = 500
_FEW = 4
_AT_ONCE = 4  # chunks in one statement: 1 MiB
_COPIED_AT_ONCE = 64
_PATIENCE = 1.0  # seconds that a cancelled write waits for its own undo
_RESERVED = 2  # connections that uploads leave to those who want one for a moment
_TOO_FEW = (
    "is too few for PostgresBackend: an upload has a connection for as long as its content takes, which may come over "
    "another one. Take 2 or more; of more than 2, uploads leave 2 to others"
)


class PostgresBackend(Backend):
    """Keeps objects in two tables of a PostgreSQL database (12 or later): one row each, and one for every 256 KiB.

    Content of one chunk is written, and read, in one round trip. More is written in one transaction, which ends with
    the object's own row: before that nobody sees anything, and of two writers of a key one succeeds. The transaction
    has a connection for as long as the content takes to come; `max_connections` - 2 (of a borrowed pool: its
    ``max_size`` - 2) can be under way in an event loop, the next ones wait (`timeouts.idle`). Readers have a
    connection only while a chunk is fetched. What they have found they read to its end or, if it is discarded
    meanwhile, to a `Conflict`.

    Memory: 1 MiB a read; 2 MiB a write, besides those of the content.

    Schema and tables are made on first use. Token, content type and metadata are kept.

    Args:
        dsn, pool, max_connections, connect_options: as of `meta_backends.postgres.PostgresMetaBackend`; 2 connections
            at least. One pool may serve both.
        table: of the objects; that of the chunks has ``_chunks`` after it.
        schema: where they are. Without one the ``search_path`` decides.
        timeouts: `operation` limits a statement of `stat`, `discard` and `list`, `idle` each step of the others.

    Raises, besides what each method says: ConfigurationError (wrong user, password, database, schema; a table that is
    another program's, or newer), AccessDenied (a right is lacking), OutOfSpace (the server's disk is full).
    """

    capabilities = Capabilities(
        conditional_create=True,
        range_read=True,
        list=True,
        modified_time=True,
        server_copy=True,
        metadata=True,
        content_type=True,
        tokens=True,
    )

    def __init__(
        self,
        dsn: str | None = None,
        *,
        pool: Any = None,
        table: str = "aproxy_objects",
        schema: str | None = None,
        max_connections: int = 10,
        connect_options: Mapping[str, Any] | None = None,
        timeouts: Timeouts | None = None,
    ) -> None:
        limits = timeouts or Timeouts()
        self.table = table if schema is None else f"{schema}.{table}"
        self._sql = Statements(table, schema)
        self._database = Database(
            dsn,
            pool,
            max_connections=max_connections,
            connect_timeout=None if limits.operation is None else limits.operation / 2,
            connect_options=connect_options,
            grace=limits.cleanup,
        )
        super().__init__(timeouts=limits)
        self._ready = False
        self._preparing: PerLoop[asyncio.Lock] = PerLoop(asyncio.Lock)
        if pool is None and max_connections == 1:
            raise ConfigurationError(f"max_connections=1 {_TOO_FEW}")
        self._uploads: PerLoop[asyncio.Semaphore] = PerLoop(
            lambda: asyncio.Semaphore(max(1, self._database.max_connections - _RESERVED))
        )

    @classmethod
    def from_url(cls, url: str) -> Self:
        """Make one of a ``postgresql:`` URL. The query may hold table, schema, max_connections and timeouts; the
        rest is asyncpg's.

        Raises:
            ConfigurationError: it cannot be read.
        """
        parsed = URL.parse(url)
        own: dict[str, Callable[[str], Any]] = {"table": str, "schema": str, "max_connections": int}
        options = parsed.options(timeouts=True, others=True, **own)
        return cls(parsed.rest("timeouts", *own), **options)

    def __str__(self) -> str:
        return f"PostgresBackend({self._database}, {self.table})"

    def full_path(self, key: str) -> str:
        return f"postgresql://{self._database}/{self.table}/{key}"

    async def setup(self) -> None:
        """Make schema and tables where they are missing, or bring those of an older version to this one; idempotent,
        also under a race of processes.

        Raises:
            ConfigurationError: the tables are newer than this library knows, or another program's.
            AccessDenied: the user may not make them, or is not their owner. BackendUnavailable, DeadlineExceeded.
        """
        self._ready = False
        await self._call("setup", "", self._prepare(), self.timeouts.operation)

    async def _prepare_once(self) -> None:
        if not self._ready:
            await self._prepare()

    async def _prepare(self) -> None:
        async with self._preparing.get():
            if not self._ready:
                async with self._database.use() as connection:
                    if self._database.max_connections < 2:
                        raise ConfigurationError(f"a pool with max_size=1 {_TOO_FEW}")
                    await prepare(connection, self._sql)
                self._ready = True

    async def _aclose(self) -> None:
        await self._database.aclose()

    def _map_error(self, error: Exception, what: str) -> StorageError:
        if isinstance(error, UniqueViolation):
            where: Any = error
            if where.table_name == self._sql.chunk_table or where.constraint_name == self._sql.id_index:
                return ConfigurationError(
                    f"could not {what}, and did nothing: the next ids of objects are in use, as after a restore of "
                    f"rows alone or a switch of logical replication. Run as its owner: {self._sql.catch_up}"
                )
        mapped = map_error(error, what)
        if not outcome_unknown(error):
            mapped.outcome_unknown = False
        return mapped

    # -- write

    async def _write(
        self,
        key: str,
        source: Source,
        *,
        content_type: str | None,
        metadata: Mapping[str, str],
        token: str | None,
        durable: bool,
    ) -> ObjectInfo:
        draft = _Draft(key, token or new_token(), content_type, metadata, durable)
        with draft.certain_until_published():
            await self._prepare_once()
            return await self._write_draft(draft, source)

    async def _write_draft(self, draft: _Draft, source: Source) -> ObjectInfo:
        if source.data is not None and len(source.data) <= CHUNK_BYTES:
            return await self._write_small(draft, source.data)
        async with contextlib.aclosing(source.chunks()) as chunks:
            pieces = _Pieces(chunks)
            first = await pieces.take(_AT_ONCE)
            if len(first) < 2:
                return await self._write_small(draft, b"".join(first))
            await self._database.open()  # only then it is known how many connections a pool of the caller's has
            async with self._uploads.get():
                return await self._write_large(draft, first, pieces)

    async def _write_small(self, draft: _Draft, data: bytes) -> ObjectInfo:
        async def insert() -> Any:
            values = draft.row(len(data), CHUNK_BYTES)
            return await self._database.fetchrow(self._sql.write_small, *values, data, draft.durable)

        return await self._published(draft, len(data), insert())

    async def _write_large(self, draft: _Draft, batch: list[bytes], pieces: _Pieces) -> ObjectInfo:
        async with contextlib.AsyncExitStack() as stack:
            connection = await stack.enter_async_context(self._database.use())
            # Until it is handed over: whatever happens costs the connection, and with it the transaction, at once.
            stack.push(_cut(connection))
            object_id = await self._begin(connection, draft)
            number = size = 0
            while batch:
                numbers = list(range(number, number + len(batch)))
                await connection.execute(self._sql.add_chunks, object_id, numbers, batch)
                number += len(batch)
                size += sum(map(len, batch))
                batch = await pieces.take(_AT_ONCE)
            return await self._publish(stack, connection, draft, object_id, size, CHUNK_BYTES)

    async def _begin(self, connection: Any, draft: _Draft) -> int:
        """Begin a transaction; return the id of the object to be."""
        # Whatever the server's default: the last statement is to see who has taken the key meanwhile.
        await connection.execute("BEGIN ISOLATION LEVEL READ COMMITTED")
        if draft.durable:
            await connection.execute(self._sql.sync)
        object_id: int | None = await connection.fetchval(self._sql.begin, draft.key)
        if object_id is None:
            raise AlreadyExists(f"{draft.key!r} exists already")
        return object_id

    async def _publish(
        self,
        stack: contextlib.AsyncExitStack,
        connection: Any,
        draft: _Draft,
        object_id: int,
        size: int,
        chunk_bytes: int,
    ) -> ObjectInfo:
        held = stack.pop_all()

        async def insert() -> Any:
            async with held:
                row = await connection.fetchrow(self._sql.publish, *draft.row(size, chunk_bytes), object_id)
                if row is None:
                    raise AlreadyExists(f"{draft.key!r} exists already")
                await connection.execute("COMMIT")
                return row

        return await self._published(draft, size, insert())

    async def _published(self, draft: _Draft, size: int, work: Coroutine[Any, Any, Any]) -> ObjectInfo:
        """Run `work`, which makes the object visible and returns its row, None if the key is taken.

        It runs in a task of the backend's, to its end: who is cancelled now cannot know whether the object is there.
        Then it is removed again, after `work`, so that nothing lands late.
        """
        draft.published = True
        task = self.cleanup.start(self._in_time(work), name="end of a write", log=False)
        try:
            await over(task)
        except asyncio.CancelledError as error:
            undoing = self.cleanup.start(self._undo(draft.key, task), name="undo of a write")
            await asyncio.wait({undoing}, timeout=_PATIENCE)
            undone = undoing.done() and undoing.exception() is None and undoing.result()
            error.outcome_unknown = not undone  # type: ignore[attr-defined]
            raise
        row = outcome_of(task)
        if row is None:
            raise AlreadyExists(f"{draft.key!r} exists already")
        return draft.info(size, row["id"], row["modified_at"])

    async def _undo(self, key: str, task: asyncio.Task[Any]) -> bool:
        """Remove the object that `task` makes, if it does; return whether it is certain that nothing is there."""
        await over(task)
        if task.cancelled():
            return False
        if (error := task.exception()) is not None:
            return isinstance(error, Exception) and not self._map_error(error, "write").outcome_unknown
        row = task.result()
        if row is not None:
            async with asyncio.timeout(self.timeouts.operation):
                await self._database.fetch(self._sql.undo, key, row["id"])
        return True

    # -- read and stat

    async def _read(self, key: str, byte_range: ByteRange | None, chunk_bytes: int) -> Reader:
        wanted = byte_range or ByteRange()
        row = await self._row(
            self._sql.read, key, min(wanted.start, _MAX), _limited(wanted.end), _limited(wanted.suffix)
        )
        data, start, stop = row["data"], row["start"], row["stop"]
        if data is None and start < stop:
            raise IntegrityError(f"the object {key!r} lacks chunks")
        if stop - start <= min(chunk_bytes, len(data or b"")):
            return Reader(_info(row), data=data or b"")
        return Reader(_info(row), self._read_on(row, chunk_bytes))

    async def _read_on(self, row: Any, chunk_bytes: int) -> AsyncIterator[bytes]:
        data, at, stop, length = row["data"], row["start"], row["stop"], row["chunk_bytes"]
        fetched = max(1, min(chunk_bytes, _AT_ONCE * length) // length)
        while True:
            for begin in range(0, len(data), chunk_bytes):
                yield data[begin : begin + chunk_bytes]
            at += len(data)
            if at >= stop:
                return
            data = await self._fetch_chunks(row, at // length, fetched)
            if at + len(data) > stop:
                data = data[: stop - at]

    async def _fetch_chunks(self, row: Any, number: int, count: int) -> bytes:
        found = await self._database.fetch(self._sql.read_chunks, row["id"], number, number + count)
        left = -(-row["size"] // row["chunk_bytes"]) - number
        if [one["number"] for one in found] != list(range(number, number + min(count, left))):
            still = await self._database.fetchrow(self._sql.stat, row["key"])
            if still is not None and still["id"] == row["id"]:
                raise IntegrityError(f"the object {row['key']!r} lacks chunks")
            raise Conflict(f"the object {row['key']!r} was discarded while it was read")
        return b"".join([one["data"] for one in found])

    async def _stat(self, key: str) -> ObjectInfo:
        return _info(await self._row(self._sql.stat, key))

    async def _row(self, text: str, key: str, *values: Any) -> Any:
        row = None
        if storable(key):
            await self._prepare_once()
            row = await self._database.fetchrow(text, key, *values)
        if row is None:
            raise NotFound(f"there is no object {key!r}")
        return row

    # -- discard, list, copy

    async def _discard(self, key: str, *, token: str | None) -> None:
        if not storable(key) or not storable(token or ""):
            return
        await self._prepare_once()
        await self._database.fetch(self._sql.discard, key, token)

    async def _list(self, prefix: str, *, after: str | None, delimiter: str | None) -> AsyncIterator[ObjectInfo]:
        if not (storable(prefix) and storable(after or "")):
            return
        lower: str | None
        lower, inclusive = (after, False) if after is not None and after >= prefix else (prefix, True)
        if (
            delimiter
            and after is not None
            and after.startswith(prefix)
            and after == _rolled_up(after, prefix, delimiter)
        ):
            # It is itself a common prefix that was given.
            lower, inclusive = successor(after), True
        upper = successor(prefix)
        # Of a page that begins with a "directory" only the first key is used: ask for little until objects follow.
        room = _FEW if delimiter else _PAGE
        while lower is not None:
            page = await self._page(lower, inclusive, upper, room)
            for row in page:
                rolled = _rolled_up(row["key"], prefix, delimiter) if delimiter else None
                if rolled is not None:
                    yield ObjectInfo(rolled, is_prefix=True)
                    lower, inclusive, room = successor(rolled), True, _FEW
                    break
                lower, inclusive = row["key"], False
                yield _info(row)
            else:
                if len(page) < room:
                    return
                room = min(4 * room, _PAGE)

    async def _page(self, lower: str, inclusive: bool, upper: str | None, limit: int) -> list[Any]:
        text = self._sql.page(inclusive=inclusive, bounded=upper is not None)
        async with asyncio.timeout(self.timeouts.operation):
            await self._prepare_once()
            return await self._database.fetch(text, lower, limit, *(() if upper is None else (upper,)))

    async def _copy(self, key: str, new_key: str, *, token: str | None, durable: bool) -> ObjectInfo:
        row = await self._in_time(self._row(self._sql.stat, key))
        info = _info(row)
        draft = _Draft(new_key, token or new_token(), info.content_type, info.metadata, durable)
        with draft.certain_until_published():
            return await self._copy_rows(key, row, draft)

    async def _copy_rows(self, key: str, row: Any, draft: _Draft) -> ObjectInfo:
        length = row["chunk_bytes"]
        async with self._uploads.get(), contextlib.AsyncExitStack() as stack:
            connection = await self._in_time(stack.enter_async_context(self._database.use()))
            stack.push(_cut(connection))
            object_id = await self._in_time(self._begin(connection, draft))
            total = -(-row["size"] // length)
            for number in range(0, total, _COPIED_AT_ONCE):
                stop = min(number + _COPIED_AT_ONCE, total)
                done = await self._in_time(
                    connection.execute(self._sql.copy_chunks, object_id, row["id"], number, stop)
                )
                if done != f"INSERT 0 {stop - number}":
                    raise Conflict(f"the object {key!r} was discarded while it was copied")
            return await self._publish(stack, connection, draft, object_id, row["size"], length)

    async def _in_time(self, work: Awaitable[T]) -> T:
        async with asyncio.timeout(self.timeouts.idle):
            return await work


class _Draft:
    """An object to be."""

    __slots__ = ("content_type", "durable", "key", "metadata", "published", "token")

    def __init__(
        self, key: str, token: str, content_type: str | None, metadata: Mapping[str, str], durable: bool
    ) -> None:
        self.key = key
        self.token = token
        self.content_type = content_type
        self.metadata = dict(metadata)
        self.durable = durable
        self.published = False  # a statement that makes it visible may have been sent

    @contextlib.contextmanager
    def certain_until_published(self) -> Iterator[None]:
        """Note on what ends the block before that, a cancellation above all, that nothing is there."""
        try:
            yield
        except BaseException as error:
            if not self.published and not isinstance(error, StorageError):
                error.outcome_unknown = False  # type: ignore[attr-defined]
            raise

    def row(self, size: int, chunk_bytes: int) -> tuple[Any, ...]:
        metadata = json.dumps(self.metadata, ensure_ascii=False) if self.metadata else None
        return self.key, size, chunk_bytes, self.token, self.content_type, metadata

    def info(self, size: int, object_id: int, modified_at: Any) -> ObjectInfo:
        return ObjectInfo(
            self.key,
            size=size,
            modified_at=modified_at,
            changed_at=modified_at,
            etag=str(object_id),
            content_type=self.content_type,
            metadata=MappingProxyType(self.metadata),
            token=self.token,
        )


def _info(row: Any) -> ObjectInfo:
    key, size, modified_at, token, content_type, metadata, object_id = row[:7]
    return ObjectInfo(
        key,
        size=size,
        modified_at=modified_at,
        changed_at=modified_at,
        etag=str(object_id),
        content_type=content_type,
        metadata=MappingProxyType(json.loads(metadata) if metadata else {}),
        token=token,
    )


_MAX = 1 << 62  # beyond every object


def _limited(number: int | None) -> int | None:
    return None if number is None else min(number, _MAX)


def _cut(connection: Any) -> Callable[..., None]:
    """Return what ends `connection` on the way out of a block that failed."""

    def cut(kind: Any, error: Any, traceback: Any) -> None:
        if error is not None:
            connection.terminate()

    return cut


def _rolled_up(key: str, prefix: str, delimiter: str) -> str | None:
    """Return the common prefix that `key` is rolled up into, None if it stands for itself."""
    at = key.find(delimiter, len(prefix))
    return None if at < 0 else key[: at + len(delimiter)]


class _Pieces:
    """Content in pieces of CHUNK_BYTES; the last may be shorter. Not a generator: nothing is left to be finalised."""

    def __init__(self, chunks: AsyncIterator[bytes]) -> None:
        self._chunks = chunks
        self._ready: deque[bytes] = deque()
        self._rest = b""
        self._over = False

    async def take(self, count: int) -> list[bytes]:
        """Return the next `count` pieces; fewer at the end, and none after it."""
        while len(self._ready) < count and not self._over:
            chunk = await anext(self._chunks, None)
            if chunk is None:
                self._over = True
                if self._rest:
                    self._ready.append(self._rest)
                break
            data = self._rest + chunk if self._rest else chunk
            whole = len(data) - len(data) % CHUNK_BYTES
            self._ready.extend(data[at : at + CHUNK_BYTES] for at in range(0, whole, CHUNK_BYTES))
            self._rest = data[whole:]
        return [self._ready.popleft() for _ in range(min(count, len(self._ready)))]
