"""Records as flat rows: what a meta-backend that keeps plain columns needs to store one and to read it back.

Pure functions. ``extra`` and ``places`` are kept as JSON text, moments as seconds since 1970 in UTC, so that a
row reads the same in every database and in the hands of a human.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from datetime import UTC, datetime
from types import MappingProxyType
from typing import Any

from ..errors import NotSupported
from ..records import MetaRecord, Place

__all__ = ["COLUMNS", "changed", "dump_extra", "dump_places", "moment_of", "to_record", "to_row", "values_of"]

#: The columns of a row, in the order of the fields of `MetaRecord`.
COLUMNS = (
    "path",
    "proxy_storage_name",
    "original_storage_name",
    "original_storage_path",
    "state",
    "token",
    "version",
    "places",
    "lease",
    "size",
    "checksum",
    "content_type",
    "name",
    "created_at",
    "updated_at",
    "extra",
)

_INDEX = {column: index for index, column in enumerate(COLUMNS)}
_UPDATED_AT = _INDEX["updated_at"]
_NO_EXTRA: Mapping[str, Any] = MappingProxyType({})

# One encoder and no options per call: json.dumps builds an encoder for every call that has any.
_encode = json.JSONEncoder(ensure_ascii=False, allow_nan=False, separators=(",", ":")).encode

Row = Sequence[Any]


def dump_extra(extra: Mapping[str, Any]) -> str:
    """Return `extra` as JSON text.

    Raises:
        NotSupported: it holds something that JSON cannot, NaN and infinity included.
    """
    if not extra:
        return "{}"
    try:
        return _encode(dict(extra))
    except (TypeError, ValueError, RecursionError) as error:
        raise NotSupported(f"extra must be representable in JSON: {error}") from error


def dump_places(places: Iterable[Place]) -> str:
    return _encode([place.as_list() for place in places]) if places else "[]"


def values_of(row: Row, columns: Iterable[str]) -> list[Any]:
    """Return the values of `columns` in `row`."""
    return [row[_INDEX[column]] for column in columns]


def to_row(record: MetaRecord, lease: float | None, now: float) -> list[Any]:
    """Return the row of a new record.

    `lease` is the moment it runs out and `now` the database's time, both in seconds since 1970; `now` fills in the
    times that the record does not bring along.

    Raises:
        NotSupported: as `dump_extra`.
    """
    created, updated = record.created_at, record.updated_at
    return [
        record.path,
        record.proxy_storage_name,
        record.original_storage_name,
        record.original_storage_path,
        record.state,
        record.token,
        record.version,
        dump_places(record.places),
        lease,
        record.size,
        record.checksum,
        record.content_type,
        record.name,
        now if created is None else created.timestamp(),
        now if updated is None else updated.timestamp(),
        dump_extra(record.extra),
    ]


_FIRST, _LAST = datetime(1, 1, 2, tzinfo=UTC), datetime(9999, 12, 30, tzinfo=UTC)  # in every time zone


def moment_of(seconds: float) -> datetime:
    """Return a moment in seconds since 1970. One that no datetime can be becomes the first or the last there is: a row
    that somebody has got wrong must not hide all others."""
    try:
        return datetime.fromtimestamp(seconds, UTC)
    except (ValueError, OverflowError, OSError):
        return _FIRST if seconds < 0 else _LAST


def to_record(row: Row, native: Mapping[str, Any] = _NO_EXTRA) -> MetaRecord:
    """Return the record of a row with `COLUMNS`."""
    (
        path,
        proxy_storage_name,
        original_storage_name,
        original_storage_path,
        state,
        token,
        version,
        places,
        lease,
        size,
        checksum,
        content_type,
        name,
        created_at,
        updated_at,
        extra,
    ) = row
    return MetaRecord(
        path,
        proxy_storage_name,
        original_storage_name,
        original_storage_path,
        state,
        token,
        version,
        () if places == "[]" else tuple(Place(*place) for place in json.loads(places)),
        None if lease is None else moment_of(lease),
        size,
        checksum,
        content_type,
        name,
        None if created_at is None else moment_of(created_at),
        None if updated_at is None else moment_of(updated_at),
        _NO_EXTRA if extra == "{}" else json.loads(extra),  # a fresh object each time: nobody shares it
        native,
    )


def changed(row: Row, changes: Mapping[str, Any], now: float) -> tuple[list[Any], list[str]]:
    """Return a copy of `row` with `changes` (fields of a record) and the time of the change, and the columns it sets.

    Raises:
        NotSupported: as `dump_extra`.
    """
    new = list(row)
    for name, value in changes.items():
        if name == "places":
            value = dump_places(value)
        elif name == "extra":
            value = dump_extra(value)
        new[_INDEX[name]] = value
    new[_UPDATED_AT] = now
    return new, [*changes, "updated_at"]
