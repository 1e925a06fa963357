"""The statements on the table of `PostgresMetaBackend`, for one record and for many at once. Without deadlines."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterable, Sequence
from typing import Any, NamedTuple

from ..clients.postgres import Database, UniqueViolation, map_error, storable
from ..errors import AlreadyExists, Conflict, NotFound, NotSupported, StorageError
from ..records import MetaRecord, Place, Revision
from ._postgres_rows import created, to_record
from ._postgres_sql import Statements
from ._rows import COLUMNS

__all__ = ["Change", "New", "Removal", "Renewal", "Table", "failed"]

_TURNS = 5  # of an insertion that finds its path taken, and then nobody there
_KEY, _TOKEN, _PLACES = map(COLUMNS.index, ("original_storage_path", "token", "places"))


class New(NamedTuple):
    """A record to be inserted: its row, and of a reservation the row of its spare and its places."""

    values: list[Any]
    spare: Sequence[Any] = ()
    places: tuple[Place, ...] = ()

    @property
    def path(self) -> str:
        path: str = self.values[0]
        return path


class Change(NamedTuple):
    path: str
    values: dict[str, Any]
    expect: Revision | None

    @property
    def kind(self) -> tuple[Any, ...]:
        """What changes have in common that can share a statement."""
        return ("update", self.expect is None, *self.values)


class Removal(NamedTuple):
    path: str
    expect: Revision | None


class Renewal(NamedTuple):
    path: str
    expect: Revision
    lease: float


class Table:
    """The records in one table.

    What is done to many at once is one statement. It is done as a whole or not at all; where only one of them is at
    fault, `clients.postgres.undid_itself` is true of the error, and the caller tries them apart.

    Args:
        name: how error messages call it.
    """

    def __init__(self, database: Database, sql: Statements, name: str) -> None:
        self._database = database
        self._sql = sql
        self._name = name

    # -- insert

    async def insert(self, new: New) -> MetaRecord:
        for _ in range(_TURNS):
            row = await self._database.fetchrow(self._sql.insert, *new.values)
            if row is not None:
                return created(new.values, *row[1:])
            taken = await self._database.fetchrow(self._sql.get, new.path)
            if taken is not None:  # else it was deleted between the two
                return _raised(self._own(new, taken))
        raise self._swallowed(new)

    async def insert_many(self, items: Sequence[New]) -> list[MetaRecord | StorageError]:
        columns = _transposed([new.values for new in _first_of_each_path(items)])
        return await self._insert_each(items, self.insert, self._sql.insert_many, *columns)

    async def reserve(self, new: New, turns: int = _TURNS) -> MetaRecord:
        if not turns:
            raise self._swallowed(new)
        return _raised((await self.reserve_many([new], turns))[0])

    async def reserve_many(self, items: Sequence[New], turns: int = _TURNS) -> list[MetaRecord | StorageError]:
        async def again(new: New) -> MetaRecord:
            return await self.reserve(new, turns - 1)

        sent = _first_of_each_path(items)
        spares = [(*new.values, new.spare[_KEY], new.spare[_PLACES]) for new in sent]
        places = [(new.path, place.original, place.key) for new in sent for place in new.places]
        columns = (*_transposed(spares), *_transposed(places))
        return await self._insert_each(items, again, self._sql.reserve, *columns)

    async def _insert_each(
        self, items: Sequence[New], alone: Callable[[New], Awaitable[MetaRecord]], text: str, *columns: Sequence[Any]
    ) -> list[MetaRecord | StorageError]:
        """Insert many in one statement; look in another at those whose path was taken, by others or by one another."""
        made = {row[0]: row for row in await self._database.fetch(text, *columns)}
        taken: dict[str, Any] = {}
        failure: Exception | None = None
        if len(made) < len(items):
            try:
                paths = list({new.path for new in items})
                taken = {row[0]: row for row in await self._database.fetch(self._sql.get_many, paths)}
            except Exception as error:  # theirs alone: those that were inserted are there
                failure = error
        answers: list[MetaRecord | StorageError] = []
        for new in items:
            row = made.pop(new.path, None)
            if row is not None:
                answers.append(await self._inserted(new, row) if new.spare else created(new.values, *row[1:]))
            elif new.path in taken:
                answers.append(self._own(new, taken[new.path]))
            elif failure is not None:
                answers.append(failed(failure, f"create {new.path!r} in {self._name}"))
            else:  # deleted between the two
                answers.append(await self._answer(alone(new), new))
        return answers

    async def _inserted(self, new: New, row: Any) -> MetaRecord | StorageError:
        """Return the record of a reservation whose row came to be."""
        _, lease, created_at, updated_at, key, places, was_there = row
        if (key, places) == (new.spare[_KEY], new.spare[_PLACES]):
            return created(new.spare, lease, created_at, updated_at)
        record = created(new.values, lease, created_at, updated_at)
        if not was_there:
            return record
        # There was a record of this path when the statement began, and it has let go of it: was it renamed?
        answer = await self._answer(self._look_again(new, record), new)
        if isinstance(answer, StorageError):
            answer.outcome_unknown = True  # it is reserved, only not known with which key
        return answer

    async def _look_again(self, new: New, record: MetaRecord) -> MetaRecord:
        for place in new.places:
            owners = (await self.owners(place.original, [place.key])).get(place.key, ())
            if any(owner != record.path for owner in owners):
                values = {"original_storage_path": new.spare[_KEY], "places": new.spare[_PLACES]}
                return await self.change(
                    Change(record.path, {**values, "version": record.version + 1}, record.revision)
                )
        return record

    async def _answer(self, work: Awaitable[MetaRecord], new: New) -> MetaRecord | StorageError:
        try:
            return await work
        except Exception as error:
            return failed(error, f"create {new.path!r} in {self._name}")

    def _swallowed(self, new: New) -> StorageError:
        return NotSupported(
            f"{self._name} does not take the record of {new.path!r}, though there is none: a BEFORE INSERT trigger or "
            "a row-level security policy of the table keeps it out or hides it",
            path=new.path,
        )

    def _own(self, new: New, taken: Any) -> MetaRecord | StorageError:
        """Return the record that has the path already, if it is ours, from a call whose answer was lost."""
        if new.values[_TOKEN] and new.values[_TOKEN] == taken["token"]:
            return to_record(taken)
        return AlreadyExists(f"{self._name} holds a record of {new.path!r} already", path=new.path)

    # -- select

    async def select(self, path: str) -> MetaRecord | None:
        row = await self._database.fetchrow(self._sql.get, path)
        return None if row is None else to_record(row)

    async def select_many(self, paths: Sequence[str]) -> list[MetaRecord | None]:
        rows = {row[0]: row for row in await self._database.fetch(self._sql.get_many, paths)}
        # A record for each who asked: two callers must not share what is in `extra`.
        return [to_record(rows[path]) if path in rows else None for path in paths]

    async def look(self, path: str) -> Any:
        return await self._database.fetchrow(self._sql.exists, path)

    async def look_many(self, paths: Sequence[str]) -> list[Any]:
        rows = {row[0]: row for row in await self._database.fetch(self._sql.exists_many, paths)}
        return [rows.get(path) for path in paths]

    # -- update

    async def change(self, change: Change) -> MetaRecord:
        text = self._sql.update(tuple(change.values), expecting=change.expect is not None, many=False)
        values = (*(change.expect or ()), *change.values.values())
        try:
            row = await self._database.fetchrow(text, change.path, *values)
        except UniqueViolation as error:
            taken = change.values.get("path")
            if taken is None or not await self._is_of_paths(error):
                raise
            raise AlreadyExists(f"{self._name} holds a record of {taken!r} already", path=taken) from error
        if row is None:
            raise self.absent(change.path, change.expect)
        return to_record(row)

    async def _is_of_paths(self, error: Any) -> bool:
        """Return whether the unique index that has refused a row is of paths."""
        columns = await self._database.fetch(self._sql.index_columns, self._sql.name, error.constraint_name)
        return "path" in [row[0] for row in columns]

    async def change_many(self, items: Sequence[Change]) -> list[MetaRecord | StorageError]:
        """Change many in one statement: each another path, all the same columns."""
        text = self._sql.update(tuple(items[0].values), expecting=items[0].expect is not None, many=True)
        # In one order everywhere, so that two statements do not wait for each other's rows.
        values = [
            (change.path, *(change.expect or ()), *change.values.values()) for change in sorted(items, key=_path_of)
        ]
        rows = await self._database.fetch(text, *_transposed(values))
        # By the old path: the new one is what the row shows.
        records = {row["old_path"]: to_record(row[:-1]) for row in rows}
        return [records.get(change.path) or self.absent(change.path, change.expect) for change in items]

    async def renew(self, item: Renewal) -> MetaRecord | StorageError:
        return (await self.renew_many([item]))[0]

    async def renew_many(self, items: Sequence[Renewal]) -> list[MetaRecord | StorageError]:
        """Set the leases of many in one statement, which waits for nobody: a row that is held is left as it is."""
        values = [(item.path, *item.expect, item.lease) for item in items]
        rows = await self._database.fetch(self._sql.renew_many, *_transposed(values))
        records = {row["path"]: to_record(row) for row in rows}
        return [
            records.get(item.path)
            or Conflict(f"the record of {item.path!r} is gone, has changed or is held by a transaction", path=item.path)
            for item in items
        ]

    def absent(self, path: str, expect: Revision | None) -> StorageError:
        if expect is not None:
            return Conflict(f"the record of {path!r} is gone or has changed", path=path)
        return NotFound(f"{self._name} holds no record of {path!r}", path=path)

    # -- delete

    async def remove(self, item: Removal) -> bool:
        text = self._sql.delete if item.expect is None else self._sql.delete_expected
        return await self._database.fetchrow(text, item.path, *(item.expect or ())) is not None

    async def remove_many(self, items: Sequence[Removal]) -> list[bool]:
        """Remove many in one statement: each another path."""
        values = [(item.path, *(item.expect or (None, None))) for item in sorted(items, key=_path_of)]
        gone = {row[0] for row in await self._database.fetch(self._sql.delete_many, *_transposed(values))}
        return [item.path in gone for item in items]

    # -- owners

    async def owners(self, original: str | None, keys: Iterable[str]) -> dict[str, Sequence[str]]:
        """Return the paths of the records that name each of `keys`."""
        found: dict[str, Sequence[str]] = {}
        rows = await self._database.fetch(self._sql.owners, [key for key in keys if storable(key)], original)
        for key, path in rows:
            found[key] = [*found.get(key, ()), path]
        return found


def failed(error: Exception, what: str) -> StorageError:
    """Return an error of its own for one of many."""
    mapped = map_error(error, what)
    if mapped is error:
        unknown = mapped.outcome_unknown
        mapped = type(mapped)(str(error), path=mapped.path, retryable=mapped.retryable, outcome_unknown=unknown)
    mapped.__cause__ = error
    # An error that is kept, not raised, must not keep this frame and all other answers alive.
    return mapped.with_traceback(None)


def _raised(answer: MetaRecord | StorageError) -> MetaRecord:
    if isinstance(answer, StorageError):
        raise answer
    return answer


def _path_of(item: Any) -> str:
    path: str = item.path
    return path


def _first_of_each_path(items: Sequence[New]) -> list[New]:
    """Return the items without those whose path came before, in one order everywhere: two statements that insert
    the same paths must not wait for each other's."""
    return sorted({new.path: new for new in reversed(items)}.values(), key=_path_of)


def _transposed(rows: Sequence[Sequence[Any]]) -> list[list[Any]]:
    """Return the columns of `rows`."""
    return [list(column) for column in zip(*rows, strict=True)]
