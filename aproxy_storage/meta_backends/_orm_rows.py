"""What `ORMMetaBackend` does in the thread of Django's ORM: one synchronous function per operation.

Each takes Django's connection first. In a transaction of the caller's it leaves that usable, whatever goes wrong.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

from django.apps import apps
from django.db import DataError, IntegrityError, connections, router, transaction

from ..errors import AlreadyExists, ConfigurationError, Conflict, NotFound, StorageError
from ..paths import sqlite_files, successor
from ..records import DELETING, MetaRecord, Revision, State
from ._orm_dependents import all_rows, check_deletable, refusal
from ._orm_table import NewRow, Table
from .base import UNCHANGED, Unchanged

__all__ = ["PARAMETERS", "Batch", "Rows", "in_transaction"]

A = TypeVar("A")

#: How many values are looked up in one statement; old builds of SQLite take 999.
PARAMETERS = 900

#: Answers some of many items at once, by their places; the others are left for one at a time.
Batch = Callable[[Any, Sequence[tuple[Any, ...]]], dict[int, Any]]


class Rows:
    """The rows of one model."""

    def __init__(self, model: type[Any] | str, using: str | None, original: str) -> None:
        self.given = model
        self.using = using
        self._original = original
        self._tables: dict[str, Table] = {}
        self._lock = threading.Lock()

    def __str__(self) -> str:
        return f"ORMMetaBackend({self.given if isinstance(self.given, str) else self.given._meta.label})"

    def alias(self) -> str:
        """Return the name of the database.

        Raises:
            ConfigurationError: there is no such model.
        """
        return self.using if self.using is not None else str(router.db_for_write(self._model()))

    def files(self) -> Sequence[str]:
        """Return the files of the database where it is one of SQLite."""
        connection = connections[self.alias()]
        name = str(connection.settings_dict["NAME"])
        if connection.vendor != "sqlite" or not name or connection.is_in_memory_db():
            return ()
        return sqlite_files(name)

    def _model(self) -> type[Any]:
        if not isinstance(self.given, str):
            return self.given
        try:
            found: type[Any] = apps.get_model(self.given)
        except (LookupError, ValueError) as error:
            raise ConfigurationError(f"there is no model {self.given!r}: {error}") from error
        return found

    def table(self, connection: Any) -> Table:
        """Return what is known of the model's table there, found out at the first call."""
        table = self._tables.get(connection.alias)
        if table is None:
            with self._lock:
                table = self._tables[connection.alias] = Table(self._model(), connection, self._original)
        return table

    def check(self, connection: Any) -> None:
        """Fail as every other call would unless the table is there with all its columns."""
        self.get(connection, "")

    # -- one record

    def insert(self, connection: Any, record: MetaRecord, lease: float | None) -> MetaRecord:
        return self._insert_row(connection, self.table(connection).row_of(record, connection), lease)

    def _insert_row(self, connection: Any, new: NewRow, lease: float | None) -> MetaRecord:
        table, record = self.table(connection), new.record
        columns, values = table.with_lease(new, lease)
        guarded = False
        if connection.vendor == "postgresql":
            values.append(record.path)
            # Where the key is the path, whoever has written the bytes has the name. With keys that nobody else can
            # have, two transactions could wait for each other's names.
            guarded = connection.in_atomic_block and not record.path.endswith(record.original_storage_path)
            if guarded:
                values.append(record.path)
        with _savepoint(connection, needed=table.can_fail({"extra": record.extra})):
            rows = _fetch(connection, table.insert(columns, guarded=guarded), values)
        if rows:
            return table.inserted({record.path: new}, rows, connection)[0]
        found = self.get(connection, record.path)
        if found is not None and record.token and found.token == record.token:
            return found  # sent before, without an answer
        raise self._taken(record.path)

    def reserve(self, connection: Any, record: MetaRecord, lease: float, spare: MetaRecord) -> MetaRecord | None:
        # In a transaction too: what cannot be kept is refused before the bytes are written.
        new = self.table(connection).row_of(record, connection)
        if in_transaction(connection):
            connection.validate_no_broken_transaction()
            return None
        reserved = self._insert_row(connection, new, lease)
        places = {(place.original, place.key) for place in record.all_places()}
        if places == {(place.original, place.key) for place in spare.all_places()}:
            return reserved
        # Asked after the insert: whoever renamed a file away from this path had committed before it could succeed.
        for key, original, owner in self.owners(connection, [key for _, key in places]):
            if (original, key) in places and owner != record.path:
                changes = {
                    "original_storage_path": spare.original_storage_path,
                    "places": spare.places,
                    "version": record.version + 1,
                }
                return self.change(connection, record.path, changes, reserved.revision, UNCHANGED)
        return reserved

    def get(self, connection: Any, path: str) -> MetaRecord | None:
        table = self.table(connection)
        if not table.is_storable(path):
            return None
        rows = _fetch(connection, table.get, (path,))
        return table.records(rows, connection)[0] if rows else None

    def look(self, connection: Any, path: str) -> tuple[str, str] | None:
        """Return state and storage of the record of `path`."""
        table = self.table(connection)
        rows = _fetch(connection, table.exists, (path,)) if table.is_storable(path) else []
        return rows[0] if rows else None

    def change(
        self,
        connection: Any,
        path: str,
        changes: Mapping[str, Any],
        expect: Revision | None,
        lease: float | Unchanged | None,
    ) -> MetaRecord:
        table = self.table(connection)
        if not table.is_storable(path):
            raise self._absent(path, expect)
        if changes.get("state") == DELETING and table.has_dependents:
            # From here on bytes are removed, and then the record. What would keep that keeps the bytes too.
            with transaction.atomic(using=connection.alias):
                check_deletable(connection, self._held(connection, path, expect), path)
                return self._change(connection, path, changes, expect, lease)
        return self._change(connection, path, changes, expect, lease)

    def _change(
        self,
        connection: Any,
        path: str,
        changes: Mapping[str, Any],
        expect: Revision | None,
        lease: float | Unchanged | None,
    ) -> MetaRecord:
        table = self.table(connection)
        row = table.changes_of(changes, connection)
        target = changes.get("path", path)
        values = list(row.values())
        if not isinstance(lease, Unchanged):
            values.append(lease)
        values.append(path)
        text = table.update(row, lease=not isinstance(lease, Unchanged), moves=target != path)
        if target != path:
            values.append(target)
        if expect is not None:
            text += table.expecting
            values += expect
        try:
            with _savepoint(connection, needed=table.can_fail(changes)):
                rows = _fetch(connection, f"{text} RETURNING {table.columns}", values)
        except IntegrityError as error:
            if target == path or self.look(connection, target) is None:
                raise
            raise self._taken(target) from error
        if rows:
            return table.records(rows, connection)[0]
        if target != path:
            found = self.get(connection, path)
            if found is not None and expect in (None, found.revision):
                raise self._taken(target)
        raise self._absent(path, expect)

    def remove(self, connection: Any, path: str, expect: Revision | None) -> bool:
        table = self.table(connection)
        if not table.is_storable(path):
            return False
        try:
            if table.has_dependents:
                with transaction.atomic(using=connection.alias):
                    # Django selects first and deletes afterwards, so the row is held meanwhile.
                    found = self._held(connection, path, expect)
                    rows = all_rows(table.model, connection.alias)
                    gone = rows.filter(pk__in=[row.pk for row in found]).delete()[1] if found else {}
                    return bool(gone.get(table.label))
            text = table.delete
            values: list[Any] = [path]
            if expect is not None:
                text += table.expecting
                values += expect
            with connection.cursor() as cursor:
                cursor.execute(text, values)
                return bool(cursor.rowcount > 0)
        except IntegrityError as error:
            # Not Conflict, which says that somebody else was first.
            raise refusal(error, path) from error

    def _held(self, connection: Any, path: str, expect: Revision | None) -> list[Any]:
        """Return the row of `path`, or none where it is not as expected; nobody changes it, or begins to refer to it,
        before the transaction ends."""
        wanted = {"path": path} if expect is None else {"path": path, "token": expect[0], "version": expect[1]}
        table = self.table(connection)
        if connection.vendor == "sqlite":
            with connection.cursor() as cursor:
                cursor.execute(table.lock)
        rows = all_rows(table.model, connection.alias)
        return list(rows.select_for_update().filter(**wanted))

    def remove_or_raise(self, connection: Any, path: str, expect: Revision | None) -> None:
        if not self.remove(connection, path, expect):
            raise self._absent(path, expect)

    def _taken(self, path: str) -> AlreadyExists:
        return AlreadyExists(f"{self} holds a record of {path!r} already", path=path)

    def _absent(self, path: str, expect: Revision | None) -> StorageError:
        if expect is not None:
            return Conflict(f"the record of {path!r} is gone or has changed", path=path)
        return NotFound(f"{self} holds no record of {path!r}", path=path)

    # -- many records

    def each(
        self,
        connection: Any,
        function: Callable[..., A],
        items: Sequence[tuple[Any, ...]],
        refused: Callable[[Exception, str], StorageError],
        batch: Batch | None,
    ) -> list[A | StorageError]:
        """Call ``function(connection, *item)`` for each item, which begins with a path or a record, all in one
        transaction; return answers and errors in order. `refused` makes the error of one item ours.

        Where the database refuses the transaction, each item has one of its own: foreign keys, for one, are looked at
        when it commits. Not in a caller's, which says so when that commits.
        """

        def each_of(answers: dict[int, A | StorageError], *, together: bool) -> list[A | StorageError]:
            for place in _in_order([place for place in range(len(items)) if place not in answers], items):
                try:
                    answers[place] = function(connection, *items[place])
                except (StorageError, IntegrityError, DataError) as error:
                    if together and (connection.needs_rollback or _is_broken(connection)):
                        raise
                    answers[place] = refused(error, _path(items[place]))
            return [answers[place] for place in range(len(items))]

        try:
            with transaction.atomic(using=connection.alias):
                found = {} if batch is None else batch(connection, items)
                return each_of(dict(found), together=True)
        except (StorageError, IntegrityError, DataError):
            if connection.in_atomic_block:
                raise
        return each_of({}, together=False)

    def insert_many(self, connection: Any, items: Sequence[tuple[Any, ...]]) -> dict[int, MetaRecord]:
        """Insert by few statements what can be inserted so; leave the others."""
        table = self.table(connection)
        rows: dict[str, NewRow] = {}
        places: dict[str, int] = {}
        groups: dict[tuple[str, ...], list[tuple[str, list[Any]]]] = {}
        for place, (record, lease) in enumerate(items):
            if record.path in places or table.can_fail({"extra": record.extra}):
                continue
            with contextlib.suppress(StorageError):  # said when it is its turn
                new = rows[record.path] = table.row_of(record, connection)
                columns, values = table.with_lease(new, lease)
                groups.setdefault(columns, []).append((record.path, values))
                places[record.path] = place
        inserted: dict[int, MetaRecord] = {}
        for columns, group in groups.items():
            group.sort(key=lambda each: each[0])
            size = max(1, (connection.features.max_query_params or 30_000) // len(columns))
            for start in range(0, len(group), size):
                part = [values for _, values in group[start : start + size]]
                text = table.insert(columns, rows=len(part), plain=True)
                found = _fetch(connection, text, [value for values in part for value in values])
                inserted.update((places[record.path], record) for record in table.inserted(rows, found, connection))
        return inserted

    def get_many(self, connection: Any, paths: Sequence[str]) -> list[MetaRecord]:
        table = self.table(connection)
        storable = [path for path in paths if table.is_storable(path)]
        if not storable:
            return []
        text = table.get.replace("= %s", f"IN ({_marks(storable)})")
        return table.records(_fetch(connection, text, storable), connection)

    # -- listings

    def page(
        self,
        connection: Any,
        prefix: str,
        lower: str,
        inclusive: bool,
        limit: int,
        proxy_storage_name: str | None,
        state: State | None,
    ) -> list[MetaRecord]:
        table = self.table(connection)
        text = table.page.format(">=" if inclusive else ">")
        text, values = _filtered(table, text, lower, prefix, proxy_storage_name, state)
        if not all(map(table.is_storable, values)):
            return []
        return table.records(_fetch(connection, text + table.in_order, [*values, limit]), connection)

    def unfinished(
        self,
        connection: Any,
        proxy_storage_name: str | None,
        older_than: float,
        after: str | None,
        limit: int,
        force: bool,
    ) -> list[MetaRecord]:
        table = self.table(connection)
        if not table.is_storable(after or ""):
            return []
        text = table.unfinished.format(">=" if after is None else ">")
        values: list[Any] = [after or ""]
        if proxy_storage_name is not None:
            text += table.of_storage
            values.append(proxy_storage_name)
        if not force:
            text += table.is_over
            values.append(older_than)
        return table.records(_fetch(connection, text + table.in_order, [*values, limit]), connection)

    def owners(self, connection: Any, keys: Sequence[str]) -> list[tuple[str, str, str]]:
        """Return (key, original, path) for every place that a record names at one of `keys`."""
        table = self.table(connection)
        storable = [key for key in keys if table.is_storable(key)]
        if not storable:
            return []
        rows = _fetch(connection, table.owners.format(_marks(storable)), storable * 3)
        if table.has_original_name:
            return rows
        return [(key, original or table.original, path) for key, original, path in rows]

    def count(self, connection: Any, prefix: str, proxy_storage_name: str | None, state: State | None) -> int:
        table = self.table(connection)
        text, values = _filtered(table, table.count, prefix, prefix, proxy_storage_name, state)
        if not all(map(table.is_storable, values)):
            return 0
        return int(_fetch(connection, text, values)[0][0])


def in_transaction(connection: Any) -> bool:
    """Return whether the caller is inside ``atomic()``.

    Raises:
        ConfigurationError: he manages transactions by hand; nothing tells us when they commit.
    """
    if not connection.in_atomic_block and not connection.get_autocommit():
        raise ConfigurationError(
            f"autocommit is off for the database {connection.alias!r}: use transaction.atomic() instead"
        )
    return bool(connection.in_atomic_block)


def _is_broken(connection: Any) -> bool:
    """Return whether PostgreSQL has given the transaction up: its COMMIT would undo everything, and not say so."""
    failed = 3  # INERROR, in both versions of psycopg
    return connection.vendor == "postgresql" and bool(connection.connection.info.transaction_status == failed)


def _fetch(connection: Any, text: str, values: Sequence[Any]) -> list[Any]:
    with connection.cursor() as cursor:
        cursor.execute(text, values)
        # All of them: an SQLite statement that is not read to its end stays open, and its transaction with it.
        rows: list[Any] = cursor.fetchall()
        return rows


def _savepoint(connection: Any, *, needed: bool) -> contextlib.AbstractContextManager[None]:
    """Keep a statement that may be refused from breaking the transaction, where one is open."""
    if needed and connection.in_atomic_block:
        atomic: contextlib.AbstractContextManager[None] = transaction.atomic(using=connection.alias)
        return atomic
    return contextlib.nullcontext()


def _filtered(
    table: Table, text: str, lower: str, prefix: str, proxy_storage_name: str | None, state: State | None
) -> tuple[str, list[str]]:
    values = [lower]
    conditions = ((table.below, successor(prefix)), (table.of_storage, proxy_storage_name), (table.in_state, state))
    for condition, value in conditions:
        if value is not None:
            text += condition
            values.append(value)
    return text, values


def _path(item: tuple[Any, ...]) -> str:
    return item[0].path if isinstance(item[0], MetaRecord) else str(item[0])


def _in_order(places: list[int], items: Sequence[tuple[Any, ...]]) -> list[int]:
    """Sort by path, so that two callers do not wait for each other's rows; but items that rename depend on theirs."""
    if any("path" in part for place in places for part in items[place] if isinstance(part, dict)):
        return places
    return sorted(places, key=lambda place: _path(items[place]))


def _marks(values: Sequence[Any]) -> str:
    return ", ".join(["%s"] * len(values))
