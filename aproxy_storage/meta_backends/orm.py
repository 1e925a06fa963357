"""A meta-backend in a table of Django's: one row of a model per file, in the caller's transaction."""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
from collections.abc import Awaitable, Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any, ClassVar, Self, TypeVar
from urllib.parse import urlsplit

from ..blocking import blocking_loop, run_blocking
from ..errors import BackendUnavailable, ConfigurationError, MissingDependency, StorageError, copies_of
from ..records import MetaRecord, Revision, State
from ..timeouts import Timeouts
from ..urls import URL, boolean
from .base import UNCHANGED, MetaBackend, Unchanged, check_changes

try:
    from asgiref.sync import async_to_sync
    from django.db import transaction

    from ._orm_errors import DJANGO_ERRORS, NotConnected, orm_error
    from ._orm_rows import PARAMETERS, Batch, Rows, in_transaction
    from ._orm_table import VENDORS, Native
    from ._orm_thread import in_djangos_thread, in_this_thread
except ModuleNotFoundError as error:
    raise MissingDependency.of("Django", "django") from error

__all__ = ["ORMMetaBackend"]

A = TypeVar("A")

_CHUNK = 250  # items of one call that share a hop and a transaction

_Aliases = contextvars.ContextVar[Mapping[Rows, str]]

#: The database that the last call of this context went to. Routers may decide by request or by thread, which what the
#: call has begun does not know where it goes on without its caller: the renewal of a lease, the undo of a save.
_asked: _Aliases = contextvars.ContextVar("aproxy_storage.orm.asked", default=MappingProxyType({}))
#: The database that all calls of this context go to, whatever routers say; or who knows it.
_settled = contextvars.ContextVar[Mapping[Rows, "str | _Question"]](
    "aproxy_storage.orm.settled", default=MappingProxyType({})
)


def _set(variable: contextvars.ContextVar[Any], rows: Rows, alias: str) -> None:
    known = variable.get()
    if known.get(rows) != alias:
        variable.set({**known, rows: alias})


class _Alias:
    """Names the database for one call: that of this context, else what the routers say in the thread of the call."""

    __slots__ = ("_ask", "answer")

    def __init__(self, rows: Rows) -> None:
        settled = _settled.get().get(rows)
        self.answer = settled if isinstance(settled, str) else None
        self._ask = settled if isinstance(settled, _Question) else rows.alias

    def __call__(self) -> str:
        if self.answer is None:
            self.answer = self._ask()
        return self.answer


class _Question:
    """Names the database that a call made now would go to; asked later, routers are asked in the context of now.

    They may go by the thread as well: where this is none that runs a loop, they are asked in it, at once.
    """

    __slots__ = ("_answer", "_context", "_rows")

    def __init__(self, rows: Rows) -> None:
        self._rows = rows
        self._context = contextvars.copy_context()
        self._answer: str | None = None
        if asyncio._get_running_loop() is None:
            with contextlib.suppress(Exception):  # said by the call
                self._answer = rows.alias()

    def __call__(self) -> str:
        if self._answer is None:
            self._answer = self._context.run(self._rows.alias)
        return self._answer


class _Pin(contextlib.AbstractContextManager[None]):
    """Has the calls inside of it go to one database."""

    __slots__ = ("_before", "_rows", "_to")

    def __init__(self, rows: Rows, to: str | _Question) -> None:
        self._rows = rows
        self._to = to

    def __enter__(self) -> None:
        self._before = _settled.set({**_settled.get(), self._rows: self._to})

    def __exit__(self, *_: object) -> None:
        _settled.reset(self._before)


class ORMMetaBackend(MetaBackend):
    """Keeps the records as rows of a Django model, on PostgreSQL or SQLite.

    Every call is one synchronous function in the thread of Django's ORM, so it uses the caller's connection and takes
    part in his transaction. Inside ``atomic()`` the journal is one write after the bytes, and no byte is removed
    before the commit (J8 of docs/design.md). Outside, each call is a transaction of its own. Calls from one context
    run one after another, as all of Django's ORM does.

    Fields of ``extra`` go to the model's columns of that name, the others to its JSON column ``extra`` if it has one.
    A column comes back in ``extra`` where its value (None, too) is not its default, and always in ``native``, with the
    primary key. Signals and ``save()`` of the model are not called, its managers are not asked; ``pre_save`` and
    ``get_db_prep_save`` of its fields are. Deletes that other models must follow go through Django's; whether these
    forbid it is found out before the first byte goes.

    Leases are kept by the clock of the database, ``created_at`` and ``updated_at`` by that of the caller.

    Cancelled or timed out before it began, a call does nothing. What has begun runs on in its thread, and what comes
    after it in that thread has to wait for it: its outcome is unknown, but it ends all or nothing. Memory is that of
    the answers.

    Args:
        model: a model with the columns of `sync_bridge.models.ProxyStorageModelBase`, or its name ``"app.Model"``.
        using: the database; by default the one that the routers name for writes. It is read from too: a replica may
            not have seen yet what was just saved.
        original: for a model without the column ``original_storage_name``, the original that holds all its files.
        durable: the database keeps what it has answered when the power is lost, as PostgreSQL does as it comes;
            needed for ``ProxyStorage(durability="power")``.
        timeouts: `operation` limits every call, waiting for the thread included.

    Raises, from every call:
        BackendUnavailable: the database cannot be reached, or another connection holds SQLite's write lock.
        DeadlineExceeded: no answer within `timeouts.operation`.
        ConfigurationError: Django is not set up, there is no such model or database, the table is not migrated, the
            database refuses name or password, or there is no column for a field of ``extra``.
        Conflict: a deadlock or a serialisation failure of the database; a constraint of the model's own.
        AccessDenied: rows of other models refer to a record that is to be deleted, or to become ``deleting``, by a
            foreign key that forbids it.
        InvalidPath, NotSupported: a value that its column cannot hold; found before anything is sent.
    """

    keeps_deadlines: ClassVar[bool] = True
    works_here: ClassVar[bool] = True
    driver_errors: ClassVar[tuple[type[BaseException], ...]] = DJANGO_ERRORS

    #: The kinds of databases that can keep records, by their ``vendor``.
    vendors: ClassVar[frozenset[str]] = VENDORS

    #: How a callback of `after_commit` is awaited in the thread that commits. `sync_bridge` puts its own way here.
    run_callback: ClassVar[Callable[[Callable[[], Awaitable[None]]], Any]] = staticmethod(
        lambda callback: async_to_sync(callback)()
    )

    _durable_with: ClassVar[str] = (
        "needs durable=True (in a URL, as in OPTIONS: django-orm://app.Model?durable=true), where the database does"
    )

    def __init__(
        self,
        model: type[Any] | str,
        using: str | None = None,
        *,
        original: str = "default",
        durable: bool = False,
        timeouts: Timeouts | None = None,
    ) -> None:
        self.model = model
        self.using = using
        self._rows = Rows(model, using, original)
        super().__init__(timeouts=timeouts)
        self.durable = durable

    @classmethod
    def from_url(cls, url: str) -> Self:
        """Return the meta-backend that ``django-orm://app.Model?using=alias`` names.

        Parameters: ``using``, ``original``, ``durable``, ``timeouts.*``.

        Raises:
            ConfigurationError: the URL names no model, or has an unknown parameter.
        """
        parsed = URL.parse(url)
        model = urlsplit(url).netloc  # as it is written: hosts know no capitals, models do
        if model.count(".") != 1 or parsed.path.strip("/"):
            raise ConfigurationError(f"{parsed} names no model: write django-orm://app.Model")
        return cls(model, **parsed.options(timeouts=True, using=str, original=str, durable=boolean))

    def __str__(self) -> str:
        return str(self._rows)

    def _local_files(self) -> Sequence[str]:
        try:
            return self._rows.files()
        except Exception:  # Django is not set up, there is no such database, or a router fails
            return ()

    # -- hops

    async def _run(self, function: Callable[..., A], *args: Any, repeatable: bool = False) -> A:
        alias = self._rows.alias if self.using is not None else _Alias(self._rows)
        try:
            return await in_djangos_thread(alias, function, *args, limit=self.timeouts.operation, repeatable=repeatable)
        except NotConnected as error:
            raise self._map_error(error, f"use {self}") from error.__cause__
        finally:
            if isinstance(alias, _Alias) and alias.answer is not None:
                _set(_asked, self._rows, alias.answer)

    def _database_asked(self) -> str | None:
        if self.using is not None:
            return None
        settled = _settled.get().get(self._rows)
        return settled if isinstance(settled, str) else _asked.get().get(self._rows)

    def _context_for(self, database: str | None) -> contextvars.Context:
        context = contextvars.Context()
        if database is not None:
            context.run(_set, _settled, self._rows, database)
        return context

    def pin(self, record: MetaRecord | None = None) -> contextlib.AbstractContextManager[None]:
        if self.using is not None:
            return contextlib.nullcontext()
        came_from = record.native.database if record is not None and isinstance(record.native, Native) else None
        return _Pin(self._rows, came_from or _settled.get().get(self._rows) or _Question(self._rows))

    @property
    def looks_here(self) -> bool:
        return True

    def look_here(self, path: str) -> MetaRecord | None:
        try:
            return in_this_thread(_Alias(self._rows), self._rows.get, path)
        except NotConnected as error:
            raise self._map_error(error, f"use {self}") from error.__cause__
        except StorageError as error:
            error.located(operation="get", path=path, backend=str(self))
            raise
        except Exception as error:
            what = f"get {path!r} in {self}"
            raise self._map_error(error, what).located(operation="get", path=path, backend=str(self)) from error

    async def _read(self, function: Callable[..., A], *args: Any) -> A:
        return await self._run(function, *args, repeatable=True)

    def _map_error(self, error: Exception, what: str) -> StorageError:
        return orm_error(error, what, self.using or "default") or super()._map_error(error, what)

    # -- one record

    async def _create(self, record: MetaRecord, lease: float | None) -> MetaRecord:
        return await self._run(self._rows.insert, record, lease)

    async def _reserve(self, record: MetaRecord, lease: float, spare: MetaRecord) -> MetaRecord | None:
        try:
            return await self._run(self._rows.reserve, record, lease, spare)
        except BackendUnavailable as error:
            error.outcome_unknown = True  # the statement after the insert may be the one that failed
            raise

    async def _get(self, path: str) -> MetaRecord | None:
        return await self._read(self._rows.get, path)

    async def _exists(self, path: str, state: State | None, proxy_storage_name: str | None) -> bool:
        found = await self._read(self._rows.look, path)
        return (
            found is not None
            and (state is None or found[0] == state)
            and (proxy_storage_name is None or found[1] == proxy_storage_name)
        )

    async def _update(
        self, path: str, changes: Mapping[str, Any], expect: Revision | None, lease: float | Unchanged | None
    ) -> MetaRecord:
        return await self._run(self._rows.change, path, dict(changes), expect, lease)

    async def _delete(self, path: str, expect: Revision | None) -> bool:
        return await self._run(self._rows.remove, path, expect)

    # -- many records

    async def create_many(
        self, records: Sequence[MetaRecord], *, lease: float | None = None
    ) -> list[MetaRecord | StorageError]:
        items = [(record, lease) for record in records]
        return await self._many("create", self._rows.insert, items, self._rows.insert_many)

    async def update_many(
        self,
        updates: Sequence[tuple[str, Mapping[str, Any], Revision | None]],
        *,
        lease: float | Unchanged | None = UNCHANGED,
    ) -> list[MetaRecord | StorageError]:
        for _, changes, _ in updates:
            check_changes(changes)
        items = [(path, dict(changes), expect, lease) for path, changes, expect in updates]
        return await self._many("update", self._rows.change, items)

    async def delete_many(self, items: Sequence[tuple[str, Revision | None]]) -> list[StorageError | None]:
        return await self._many("delete", self._rows.remove_or_raise, items)

    async def _many(
        self,
        operation: str,
        function: Callable[..., A],
        items: Sequence[tuple[Any, ...]],
        batch: Batch | None = None,
    ) -> list[A | StorageError]:
        """Call ``function(connection, *item)`` for each; return answers and errors in order.

        A chunk is one hop and one transaction (where the database refuses that, one per item), after a cancellation
        done or not as a whole, and those after it are not done.
        """

        def refused(error: Exception, path: str) -> StorageError:
            mapped = error if isinstance(error, StorageError) else self._map_error(error, f"{operation} {path!r}")
            if mapped is not error:
                mapped.__cause__ = error
            # An error that is kept, not raised, must not keep a frame and all other answers alive.
            return mapped.located(operation=operation, path=path, backend=str(self)).with_traceback(None)

        answers: list[A | StorageError] = []
        for start in range(0, len(items), _CHUNK):
            chunk = items[start : start + _CHUNK]
            try:
                work = self._run(self._rows.each, function, chunk, refused, batch)
                answers += await self._call(f"{operation}_many", None, work)
            except StorageError as error:
                answers += copies_of(error, operation, (item[0] for item in chunk), str(self))
        return answers

    async def get_many(self, paths: Sequence[str]) -> list[MetaRecord | None]:
        found: dict[str, MetaRecord] = {}
        wanted = list(dict.fromkeys(paths))
        for start in range(0, len(wanted), PARAMETERS):
            work = self._read(self._rows.get_many, wanted[start : start + PARAMETERS])
            found.update((record.path, record) for record in await self._call("get_many", None, work))
        return [found.get(path) for path in paths]

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
        return await self._read(self._rows.page, prefix, lower, inclusive, limit, proxy_storage_name, state)

    async def _list_unfinished(
        self, proxy_storage_name: str | None, older_than: float, after: str | None, limit: int, force: bool
    ) -> Sequence[MetaRecord]:
        return await self._read(self._rows.unfinished, proxy_storage_name, older_than, after, limit, force)

    async def _owners(self, original_storage_name: str | None, keys: Sequence[str]) -> Mapping[str, Sequence[str]]:
        owners: dict[str, set[str]] = {}
        size = PARAMETERS // 3  # each key is asked for in three ways
        for start in range(0, len(keys), size):
            for key, original, path in await self._read(self._rows.owners, keys[start : start + size]):
                if original_storage_name in (None, original):
                    owners.setdefault(key, set()).add(path)
        return {key: sorted(paths) for key, paths in owners.items()}

    async def _count(self, prefix: str, proxy_storage_name: str | None, state: State | None) -> int:
        return await self._read(self._rows.count, prefix, proxy_storage_name, state)

    # -- life

    async def after_commit(self, callback: Callable[[], Awaitable[None]]) -> None:
        run: Callable[[Any], Any] = _run_here if blocking_loop() is not None else type(self).run_callback
        if not await self._call("after_commit", None, self._run(self._register, callback, run)):
            await callback()

    def _register(self, connection: Any, callback: Callable[[], Awaitable[None]], run: Callable[[Any], Any]) -> bool:
        """Return whether there is a transaction whose commit will await `callback`."""
        if not in_transaction(connection):
            return False

        def in_its_database() -> None:
            with _Pin(self._rows, connection.alias):
                run(callback)

        # Robust: it is committed; what goes wrong now is logged, and must not reach the caller or stop others.
        transaction.on_commit(in_its_database, using=connection.alias, robust=True)
        return True

    async def setup(self) -> None:
        """Check that the table is there with all its columns; tables are made by ``manage.py migrate``.

        Raises:
            ConfigurationError: it is not, or the model lacks a column; the message says what to do.
        """
        await self._call("setup", None, self._read(self._rows.check))

    async def _aclose(self) -> None:
        """Close the connection of this context, unless a transaction is open. Django opens another when needed."""
        await self._call("aclose", None, self._run(_close))


def _run_here(callback: Callable[[], Awaitable[None]]) -> None:
    """Await `callback` in the thread that commits: it is the one that has asked for it, and may block."""

    async def awaited() -> None:
        await callback()

    run_blocking(awaited())


def _close(connection: Any) -> None:
    if not connection.in_atomic_block:
        connection.close()
