"""Records as rows of PostgreSQL, and back. Pure functions."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from datetime import datetime
from decimal import Decimal
from types import MappingProxyType
from typing import Any

from ..records import STORED, MetaRecord, Place
from ._rows import COLUMNS, dump_extra, dump_places, moment_of

__all__ = ["changes_of", "created", "row_of", "to_record"]

_NO_EXTRA: Mapping[str, Any] = MappingProxyType({})

# jsonb keeps numbers as decimals, and would give 1e300 back as an integer of 301 digits, which it is not.
_LARGE_FLOAT = re.compile(r'"(?:[^"\\]|\\.)*"|(-?[0-9.]+e\+[0-9]+)')


def _extra(extra: Mapping[str, Any]) -> str:
    text = dump_extra(extra)
    if "e+" in text:
        text = _LARGE_FLOAT.sub(lambda found: f"{Decimal(found[1]):f}.0" if found[1] else found[0], text)
    return text


def row_of(record: MetaRecord, lease: float | None) -> list[Any]:
    """Return the values of a new row, in the order of `COLUMNS`; `lease` in seconds from now.

    Raises:
        NotSupported: ``extra`` holds what JSON cannot.
    """
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
        record.created_at,
        record.updated_at,
        _extra(record.extra),
    ]


def changes_of(changes: Mapping[str, Any]) -> dict[str, Any]:
    """Return the values of the columns that `changes` (fields of a record) set.

    Raises:
        NotSupported: as `row_of`.
    """
    values = dict(changes)
    if "places" in values:
        values["places"] = dump_places(values["places"])
    if "extra" in values:
        values["extra"] = _extra(values["extra"])
    return values


def to_record(row: Sequence[Any]) -> MetaRecord:
    """Return the record of a row with `COLUMNS`. What a program that knows less has left NULL has its default."""
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
        proxy_storage_name or "",
        original_storage_name or "",
        original_storage_path or "",
        state or STORED,
        token or "",
        version or 0,
        () if places == "[]" or not places else tuple(Place(*place) for place in json.loads(places)),
        None if lease is None else moment_of(lease),
        size,
        checksum,
        content_type,
        name,
        created_at,
        updated_at,
        _NO_EXTRA if extra == "{}" else json.loads(extra),  # a fresh object each time: nobody shares it
    )


def created(values: Sequence[Any], lease: float | None, created_at: datetime, updated_at: datetime) -> MetaRecord:
    """Return the record of a row that was inserted with `values`, and what the database has filled in."""
    row = list(values)
    row[_LEASE], row[_CREATED_AT], row[_UPDATED_AT] = lease, created_at, updated_at
    return to_record(row)


_LEASE, _CREATED_AT, _UPDATED_AT = map(COLUMNS.index, ("lease", "created_at", "updated_at"))
