"""Records as rows of a Django model: its columns, what may be put into them, and the statements.

The statements are written here and sent through Django's connection: `QuerySet` would compile each anew, which costs
more than the database takes for it, and it can neither say whether an INSERT … ON CONFLICT inserted, nor return the
row that an UPDATE has changed. Columns, values and conversions are those of the model's fields.

Nothing here knows an event loop; everything runs in a thread of Django's.
"""

from __future__ import annotations

import json
import re
import zlib
from collections.abc import Iterable, Mapping, Sequence
from datetime import UTC, datetime
from typing import Any, NamedTuple

from django.conf import settings
from django.core.exceptions import FieldDoesNotExist, ValidationError
from django.db.models import Field, Model
from django.db.models.expressions import DatabaseDefault
from django.utils import timezone

from ..errors import ConfigurationError, InvalidPath, NotSupported
from ..paths import shown
from ..records import MetaRecord, Place
from ._orm_dependents import relations_to
from ._rows import COLUMNS, dump_extra, moment_of

__all__ = ["VENDORS", "Native", "NewRow", "Table"]

#: The clock of the database, in seconds since 1970. Not now(), which stands still inside a transaction.
_CLOCK = {
    "postgresql": "extract(epoch FROM clock_timestamp())::float8",
    "sqlite": "(julianday('now') - 2440587.5) * 86400.0",
}
#: Django's names of the kinds of databases that can keep records.
VENDORS = frozenset(_CLOCK)
# One encoder and no options per call: json.dumps builds an encoder for every call that has any.
_encode = json.JSONEncoder(ensure_ascii=False, separators=(",", ":")).encode
_OPTIONAL = frozenset({"original_storage_name", "extra"})
_TIMES = ("created_at", "updated_at")
#: NUL as JSON writes it, and not a backslash before "u0000".
_NUL = re.compile(r"(?<!\\)(?:\\\\)*\\u0000")


class Native(dict[str, Any]):
    """What a row adds to its record, and the name of the `database` in which it is."""

    __slots__ = ("database",)
    database: str


class NewRow(NamedTuple):
    """A record as a row to be inserted, by column and without the lease, and what of it no column repeats."""

    record: MetaRecord
    values: dict[str, Any]
    created_at: datetime
    updated_at: datetime
    extra: str | None


class Table:
    """One model on one kind of database.

    Raises:
        ConfigurationError: the model cannot keep records there; the message says what to change.
    """

    def __init__(self, model: type[Any], connection: Any, original: str) -> None:
        meta = model._meta.concrete_model._meta
        self.model = meta.concrete_model
        self.label = meta.label
        self.name = meta.db_table
        self.original = original
        self.vendor: str = connection.vendor
        _check_database(connection, self.label)
        if len(meta.local_concrete_fields) != len(meta.concrete_fields):
            raise ConfigurationError(
                f"{self.label} keeps its columns in several tables (multi-table inheritance); give ORMMetaBackend a"
                " model whose bases are abstract"
            )
        self.fields = self._record_fields(meta)
        apart = {"lease", "extra", *_TIMES}
        self._plain = [(name, field.column) for name, field in self.fields.items() if name not in apart]
        self.has_original_name = "original_storage_name" in self.fields
        self.has_extra = "extra" in self.fields
        #: Rules of the model's own about columns that every record has: any row may be refused.
        self.refuses = bool(meta.constraints or meta.unique_together) or any(
            field.unique and not field.primary_key and name != "path" for name, field in self.fields.items()
        )
        taken = {field.name for field in self.fields.values()}
        self.custom: list[Any] = [
            field for field in meta.concrete_fields if field.name not in taken and not field.primary_key
        ]
        self._custom_by_key = {
            key: field for field in self.custom if not field.generated for key in (field.name, field.attname)
        }
        self._has_pre_save = [field for field in self.custom if type(field).pre_save is not Field.pre_save]
        #: What a new row gets in columns that nobody names, where that is always the same.
        self._constants = {
            field: field.get_db_prep_save(field.get_default(), connection)
            for field in self.custom
            if not (field.generated or field in self._has_pre_save or callable(field.default))
            and not isinstance(field.get_default(), DatabaseDefault)
            and (field.null or field.get_default() is not None)
        }
        #: Where NULL is not what a new row gets.
        self._null_says = {
            field
            for field in self.custom
            if field.null and (callable(field.default) or field.get_default() is not None)
        }
        #: What the database fills in by itself: every value that is sent costs microseconds on both sides.
        self._implied = [
            (field.column, field.db_default)
            for field in (*self.fields.values(), *self.custom)
            if isinstance(field.db_default, str | int)
        ]
        self._converted = [
            (at, field) for at, field in enumerate(self.custom) if _converters(field, self.name, connection)
        ]
        self._pk = meta.pk.attname
        self.lease = self.fields["lease"].column
        #: Whether others have to be told of a delete: Django follows foreign keys itself, the database does not.
        self.has_dependents = any(relations_to(meta)) or any(
            hasattr(field, "bulk_related_objects") for field in meta.private_fields
        )
        self._write_statements(meta, connection)

    def _record_fields(self, meta: Any) -> dict[str, Any]:
        fields: dict[str, Any] = {}
        missing = []
        for name in COLUMNS:
            try:
                field = meta.get_field(name)
            except FieldDoesNotExist:
                field = None
            if field is not None and field.concrete and not field.is_relation:
                fields[name] = field
            elif name not in _OPTIONAL:
                missing.append(name)
        if missing:
            raise ConfigurationError(
                f"{self.label} lacks the columns {', '.join(missing)}: let it inherit from"
                " sync_bridge.models.ProxyStorageModelBase, then run makemigrations and migrate"
            )
        if not fields["path"].unique:
            raise ConfigurationError(f"{self.label}.path must be unique=True: two files could have one name")
        return fields

    def _write_statements(self, meta: Any, connection: Any) -> None:
        quote = connection.ops.quote_name
        postgres = self.vendor == "postgresql"
        self.table = t = quote(self.name)
        # Always with the table: SQLite takes "name" alone for a text where there is no such column.
        self.column = column = {name: f"{t}.{quote(field.column)}" for name, field in self.fields.items()}
        path, key, places = column["path"], column["original_storage_path"], column["places"]
        self._path = quote(self.fields["path"].column)
        self.clock = clock = _CLOCK[self.vendor]
        # Text in byte order, also where the column of a model of the user's has the collation of a locale.
        self._ordered = ordered = f'{path} COLLATE "C"' if postgres else path
        further = (f"{t}.{quote(field.column)}" for field in (meta.pk, *self.custom))
        own = ", ".join(further)
        self.columns = ", ".join([*column.values(), own])
        #: What a new row does not know before.
        self._returned = f"{path}, {column['lease']}, {own}"
        self._quote = quote
        self._seed = zlib.crc32(self.name.encode())
        self._inserts: dict[tuple[Any, ...], str] = {}
        self.get = f"SELECT {self.columns} FROM {t} WHERE {path} = %s"
        self.exists = f"SELECT {column['state']}, {column['proxy_storage_name']} FROM {t} WHERE {path} = %s"
        self.delete = f"DELETE FROM {t} WHERE {path} = %s"
        #: Changes nothing. A transaction on SQLite that begins with it waits its turn; one that reads first, and
        #: writes then, is refused at once where another one writes.
        self.lock = f"UPDATE {t} SET {self._path} = {self._path} WHERE 0"
        self.expecting = f" AND {column['token']} = %s AND {column['version']} = %s"
        # In the words of the partial indexes of `sync_bridge.models`, or SQLite would not see that it may use them.
        self.unfinished = (
            f"SELECT {self.columns} FROM {t}"
            f" WHERE ({column['lease']} IS NOT NULL OR NOT ({column['state']} = 'stored'))"
            f" AND {ordered} {{}} %s"
        )
        self.is_over = f" AND ({column['lease']} IS NULL OR {column['lease']} <= {clock} - %s)"
        self.of_storage = f" AND {column['proxy_storage_name']} = %s"
        self.in_state = f" AND {column['state']} = %s"
        self.page = f"SELECT {self.columns} FROM {t} WHERE {ordered} {{}} %s"
        self.count = f"SELECT count(*) FROM {t} WHERE {ordered} >= %s"
        self.below = f" AND {ordered} < %s"
        self.in_order = f" ORDER BY {ordered} LIMIT %s"
        name = column.get("original_storage_name", "''")
        if postgres:
            each = f"jsonb_array_elements({places}::jsonb) AS place"
            its_original, its_key = "place->>0", "place->>1"
        else:
            each = f"json_each({places}) AS place"
            its_original, its_key = "json_extract(place.value, '$[0]')", "json_extract(place.value, '$[1]')"
        self.owners = (
            f"SELECT {path}, {name}, {path} FROM {t} WHERE {path} IN ({{0}}) AND {key} = {path}"
            f" UNION ALL SELECT {key}, {name}, {path} FROM {t} WHERE NOT ({key} = {path}) AND {key} IN ({{0}})"
            f" UNION ALL SELECT {its_key}, {its_original}, {path} FROM {t}, {each}"
            f" WHERE NOT ({places} = '[]') AND {its_key} IN ({{0}})"
        )

    # -- statements that depend on the values

    def with_lease(self, new: NewRow, lease: float | None) -> tuple[tuple[str, ...], list[Any]]:
        """Return columns and values of a row with its lease."""
        if lease is None:
            return tuple(new.values), list(new.values.values())
        return (*new.values, self.lease), [*new.values.values(), lease]

    def insert(self, columns: tuple[str, ...], *, rows: int = 1, guarded: bool = False, plain: bool = False) -> str:
        """Return the statement that inserts `rows` rows and returns what `inserted` takes, for those that were.

        Unless `plain` it does not wait for another transaction that changes or deletes a row of that path; on
        PostgreSQL it takes the path once more for that. With `guarded`, and the path yet again, nor for one that is
        about to insert it: for a caller that holds a transaction open himself.
        """
        found = self._inserts.get((columns, rows, guarded, plain))
        if found is not None:
            return found
        values = ", ".join(f"{self.clock} + %s" if name == self.lease else "%s" for name in columns)
        text = f"INSERT INTO {self.table} ({', '.join(map(self._quote, columns))})"
        if self.vendor == "postgresql" and not plain:
            text += f" SELECT {values} WHERE NOT EXISTS (SELECT 1 FROM {self.table} WHERE {self.column['path']} = %s)"
            if guarded:
                text += f" AND pg_try_advisory_xact_lock(hashtextextended(%s, {self._seed}))"
        else:
            text += " VALUES " + ", ".join([f"({values})"] * rows)
        text += f" ON CONFLICT ({self._path}) DO NOTHING RETURNING {self._returned}"
        if len(self._inserts) < 1000:
            self._inserts[columns, rows, guarded, plain] = text
        return text

    def update(self, columns: Iterable[str], *, lease: bool, moves: bool) -> str:
        """Return the statement that sets `columns`, and last the lease where wanted, of the row of one path.

        `moves`: the path is among the columns; then nothing is done where the new one is taken. One that another
        transaction is about to insert is found out by the unique constraint.
        """
        sets = [f"{self._quote(name)} = %s" for name in columns]
        if lease:
            sets.append(f"{self._quote(self.lease)} = {self.clock} + %s")
        text = f"UPDATE {self.table} SET {', '.join(sets)} WHERE {self.column['path']} = %s"
        if moves:
            text += f" AND NOT EXISTS (SELECT 1 FROM {self.table} AS other WHERE other.{self._path} = %s)"
        return text

    # -- from records to values

    def row_of(self, record: MetaRecord, connection: Any) -> NewRow:
        """Return `record` as a row.

        Raises:
            InvalidPath, NotSupported: a value does not fit its column.
            ConfigurationError: there is no column for a field of ``extra``, or none is given for a column without
                a default.
        """
        values: dict[str, Any] = {}
        for name, column in self._plain:
            value = getattr(record, name)
            if value is not None:
                values[column] = self._prepared(name, value, connection)
        now = datetime.now(UTC)
        times = record.created_at or now, record.updated_at or now
        for name, moment in zip(_TIMES, times, strict=True):
            values[self.fields[name].column] = self._moment(moment, connection)
        self._check_original(record.original_storage_name)
        custom, rest = self._split(record.extra)
        extra = self._extra_text(rest) if self.has_extra else None
        if extra is not None:
            values[self.fields["extra"].column] = extra
        values.update(self._custom_values(custom, connection, adding=True))
        for column, default in self._implied:
            if values.get(column) == default:
                del values[column]
        return NewRow(record, values, *times, extra)

    def changes_of(self, changes: Mapping[str, Any], connection: Any) -> dict[str, Any]:
        """Return what to set for `changes`, by column. Raises as `row_of`."""
        row: dict[str, Any] = {}
        for name, value in changes.items():
            if name == "extra":
                custom, rest = self._split(value)
                if self.has_extra:
                    row[self.fields["extra"].column] = self._extra_text(rest)
                row.update(self._custom_values(custom, connection, adding=False))
            elif name == "original_storage_name" and not self.has_original_name:
                self._check_original(value)
            else:
                row[self.fields[name].column] = self._prepared(name, value, connection)
        row[self.fields["updated_at"].column] = self._moment(datetime.now(UTC), connection)
        return row

    def can_fail(self, changes: Mapping[str, Any]) -> bool:
        """Return whether the database may refuse these values, so that a transaction needs a savepoint."""
        if self.refuses or "path" in changes:
            return True
        return not self._custom_by_key.keys().isdisjoint(changes.get("extra", ()))

    def is_storable(self, text: str) -> bool:
        """Return whether a column could hold `text`: what cannot be there need not be asked for."""
        if not text.isascii():
            try:
                text.encode()
            except UnicodeEncodeError:
                return False
        return self.vendor != "postgresql" or "\0" not in text

    def _prepared(self, name: str, value: Any, connection: Any) -> Any:
        if name == "places":
            return _encode([place.as_list() for place in value]) if value else "[]"
        if isinstance(value, str):
            self._check_text(name, value, self.fields[name])
        elif isinstance(value, datetime):
            return self._moment(value, connection)
        return value

    @staticmethod
    def _moment(value: datetime, connection: Any) -> Any:
        # Under USE_TZ=False Django keeps local time.
        return connection.ops.adapt_datetimefield_value(value if settings.USE_TZ else timezone.make_naive(value))

    def _check_text(self, name: str, value: str, field: Any) -> None:
        is_path = name in ("path", "original_storage_path")
        error = InvalidPath if is_path else NotSupported
        if not self.is_storable(value):
            raise error(f"{self.label}.{name} cannot hold {shown(value)}: a lone surrogate or a NUL", path=None)
        limit = field.max_length
        if limit is not None and len(value) > limit:
            # PostgreSQL would refuse it too, but by breaking the caller's transaction; SQLite would not.
            raise error(f"{self.label}.{name} holds {limit} characters, not the {len(value)} of {shown(value)}")

    def _check_original(self, name: str) -> None:
        if not self.has_original_name and name not in ("", self.original):
            raise ConfigurationError(
                f"{self.label} has no column original_storage_name, so all its files are in {self.original!r}, not in"
                f" {name!r}: add sync_bridge.models.OriginalStorageNameMixin to its bases (then makemigrations and"
                f" migrate), or give ORMMetaBackend original={name!r}"
            )

    def _split(self, extra: Mapping[str, Any]) -> tuple[dict[Any, Any], dict[str, Any]]:
        """Return the values that have a column, by field, and the others."""
        custom: dict[Any, Any] = {}
        rest: dict[str, Any] = {}
        for key, value in extra.items():
            field = self._custom_by_key.get(key)
            if field is None:
                rest[key] = value
            else:
                custom[field] = value
        if rest and not self.has_extra:
            raise ConfigurationError(
                f"{self.label} has no column for {', '.join(map(repr, rest))}: add it, or a JSONField named extra for"
                " everything without a column, then run makemigrations and migrate"
            )
        return custom, rest

    def _extra_text(self, rest: Mapping[str, Any]) -> str | None:
        if not rest:
            return None if self.fields["extra"].null else "{}"
        text = dump_extra(rest)
        if not self.is_storable(text) or (self.vendor == "postgresql" and _NUL.search(text)):
            raise NotSupported(f"{self.label}.extra cannot hold text with a lone surrogate or a NUL")
        return text

    def _custom_values(self, given: Mapping[Any, Any], connection: Any, *, adding: bool) -> dict[str, Any]:
        row: dict[str, Any] = {}
        instance = None
        for field in self.custom:
            if field.generated:
                continue
            if field not in given and field in self._constants:
                if not adding or self._constants[field] is not None:
                    row[field.column] = self._constants[field]
                continue
            value = given[field] if field in given else field.get_default()
            if isinstance(value, DatabaseDefault):
                continue  # the database's business when a row is new, and left alone afterwards
            if field in self._has_pre_save:
                instance = instance or self.model()
                setattr(instance, field.attname, value)
                value = field.pre_save(instance, adding)
            if value is None and not field.null and field not in given:
                if not adding:
                    continue
                raise ConfigurationError(
                    f"{self.label}.{field.name} has no default: give it in extra=, or from"
                    " get_data_for_meta_backend_save of the storage"
                )
            row[field.column] = self._custom_value(field, value, connection)
        return row

    def _custom_value(self, field: Any, value: Any, connection: Any) -> Any:
        if isinstance(value, Model) and field.is_relation:
            value = getattr(value, field.target_field.attname)
        try:
            prepared = field.get_db_prep_save(value, connection)
        except (TypeError, ValueError, ArithmeticError, ValidationError) as error:
            raise NotSupported(f"{self.label}.{field.name} cannot hold {shown(str(value))}: {error}") from error
        if prepared is None and not field.null:
            raise NotSupported(f"{self.label}.{field.name} cannot be None")
        if isinstance(prepared, str):
            self._check_text(field.name, prepared, field)
        return prepared

    # -- from rows to records

    def records(self, rows: Sequence[Sequence[Any]], connection: Any) -> list[MetaRecord]:
        """Return the records of rows with `columns`."""
        converters = self._converters_for(connection) if rows else ()
        return [self._record(row, converters, connection) for row in rows]

    def inserted(self, new: Mapping[str, NewRow], rows: Sequence[Sequence[Any]], connection: Any) -> list[MetaRecord]:
        """Return the records of `new`, by path, that `insert` has inserted, as `records` would."""
        converters = self._converters_for(connection) if rows else ()
        return [self._inserted(new[row[0]], row, converters, connection) for row in rows]

    def _converters_for(self, connection: Any) -> Sequence[Any]:
        return [
            (at, _converters(field, self.name, connection), field.get_col(self.name)) for at, field in self._converted
        ]

    def _inserted(self, new: NewRow, row: Sequence[Any], converters: Sequence[Any], connection: Any) -> MetaRecord:
        record = new.record
        extra = _loaded(new.extra)
        native = self._own_columns(row[2:], converters, connection, extra)
        return MetaRecord(
            record.path,
            record.proxy_storage_name,
            record.original_storage_name if self.has_original_name else self.original,
            record.original_storage_path,
            record.state,
            record.token,
            record.version,
            record.places,
            _lease(row[1]),
            record.size,
            record.checksum,
            record.content_type,
            record.name,
            new.created_at,
            new.updated_at,
            extra,
            native,
        )

    def _record(self, row: Sequence[Any], converters: Sequence[Any], connection: Any) -> MetaRecord:
        values = dict(zip(self.fields, row, strict=False))
        extra = _loaded(values["extra"]) if self.has_extra else {}
        native = self._own_columns(row[len(self.fields) :], converters, connection, extra)
        places = values["places"]
        return MetaRecord(
            values["path"],
            values["proxy_storage_name"],
            values["original_storage_name"] if self.has_original_name else self.original,
            values["original_storage_path"],
            values["state"],
            values["token"],
            values["version"],
            () if places == "[]" else tuple(Place(*place) for place in json.loads(places)),
            _lease(values["lease"]),
            values["size"],
            values["checksum"],
            values["content_type"],
            values["name"],
            _moment(values["created_at"], connection),
            _moment(values["updated_at"], connection),
            extra,
            native,
        )

    def _own_columns(
        self, row: Sequence[Any], converters: Sequence[Any], connection: Any, extra: dict[str, Any]
    ) -> dict[str, Any]:
        """Return the primary key and the model's own columns; add those to `extra` that say something."""
        native = Native({self._pk: row[0]})
        native.database = connection.alias
        if self.custom:
            own = list(row[1:])
            for at, functions, expression in converters:
                for function in functions:
                    own[at] = function(own[at], expression, connection)
            for field, value in zip(self.custom, own, strict=True):
                native[field.attname] = value
                if field.generated or (value is None and field not in self._null_says):
                    continue
                # What a new row gets anyway says nothing.
                if value != field.get_default():
                    extra[field.attname] = value
        return native


def _check_database(connection: Any, label: str) -> None:
    if connection.vendor not in VENDORS:
        raise ConfigurationError(
            f"ORMMetaBackend keeps records on PostgreSQL and SQLite; the database {connection.alias!r} of {label} is"
            f" {connection.display_name}"
        )
    if not connection.features.can_return_columns_from_insert:
        raise ConfigurationError("ORMMetaBackend needs SQLite 3.35 or newer (RETURNING)")


def _converters(field: Any, table: str, connection: Any) -> list[Any]:
    column = field.get_col(table)
    return [*connection.ops.get_db_converters(column), *column.get_db_converters(connection)]


def _lease(value: float | None) -> datetime | None:
    return None if value is None else moment_of(value)


def _moment(value: Any, connection: Any) -> datetime | None:
    if value is None:
        return None
    moment = datetime.fromisoformat(value) if isinstance(value, str) else value
    if moment.tzinfo is None:
        moment = moment.replace(tzinfo=connection.timezone) if settings.USE_TZ else timezone.make_aware(moment)
    return moment.astimezone(UTC)


def _loaded(value: Any) -> dict[str, Any]:
    if isinstance(value, str):
        value = {} if value == "{}" else _decode(value)
    return value if isinstance(value, dict) else {}


def _integer(text: str) -> int | float:
    # PostgreSQL writes out a float like 1e300 as three hundred digits.
    return int(text) if len(text) <= 20 else float(text)


_decode = json.JSONDecoder(parse_int=_integer).decode
