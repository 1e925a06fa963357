"""Records as MongoDB documents, and the filters that find them; pure functions.

A document has the fields of a record by their names. What is None or empty may be left out, so that documents of
django-proxy-storage, which know no `state`, `token` and `version`, are records as they are: in filters too.
``unfinished`` is ours alone: true while something is left to do for the record, so that one small index serves
`list_unfinished`. Fields that no record has go to `native`, ``_id`` among them.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from datetime import UTC, datetime, timedelta
from typing import Any

from ..paths import successor
from ..records import STORED, MetaRecord, Place, Revision, State
from ._rows import dump_extra

__all__ = ["change", "expected", "matching", "places_of", "to_document", "to_record"]

_TIMES = frozenset({"lease", "created_at", "updated_at"})
_TEXTS = ("proxy_storage_name", "original_storage_name", "original_storage_path", "token")
_OTHERS = ("size", "checksum", "content_type", "name")
_KNOWN = frozenset({"path", "state", "version", "places", "extra", "unfinished", *_TIMES, *_TEXTS, *_OTHERS})

Document = dict[str, Any]


def to_document(record: MetaRecord, lease: float | None, now: datetime) -> Document:
    """Return the document of a new record; `now` fills in the times that it does not bring along.

    Raises:
        NotSupported: `extra` holds something that JSON cannot.
    """
    document: Document = {
        "path": record.path,
        "proxy_storage_name": record.proxy_storage_name,
        "original_storage_name": record.original_storage_name,
        "original_storage_path": record.original_storage_path,
        "state": record.state,
        "token": record.token,
        "version": record.version,
        "created_at": now if record.created_at is None else _moment(record.created_at),
        "updated_at": now if record.updated_at is None else _moment(record.updated_at),
    }
    for name in _OTHERS:
        value = getattr(record, name)
        if value is not None:
            document[name] = value
    if record.places:
        document["places"] = _dumped(record.places)
    if lease is not None:
        document["lease"] = now + timedelta(seconds=lease)
    if lease is not None or record.state != STORED:
        document["unfinished"] = True
    if record.extra:
        document["extra"] = _portable(record.extra)
    return document


def to_record(document: Mapping[str, Any]) -> MetaRecord:
    """Return the record of a document, of ours or of django-proxy-storage's."""
    get = document.get
    places, extra = get("places"), get("extra")
    return MetaRecord(
        document["path"],
        get("proxy_storage_name") or "",
        get("original_storage_name") or "",
        get("original_storage_path") or "",
        get("state") or STORED,
        get("token") or "",
        get("version") or 0,
        places_of(places) if places else (),
        get("lease"),
        get("size"),
        get("checksum"),
        get("content_type"),
        get("name"),
        get("created_at"),
        get("updated_at"),
        extra if isinstance(extra, dict) else {},
        {name: value for name, value in document.items() if name not in _KNOWN},
    )


def change(
    changes: Mapping[str, Any], now: datetime, lease: float | None, *, lease_changes: bool
) -> Document | list[Document]:
    """Return the update of one document: of ``$set``, or a pipeline where only the document can tell whether it is
    ``unfinished`` afterwards.

    Raises:
        NotSupported: `extra` holds something that JSON cannot.
    """
    new: Document = {"updated_at": now}
    for name, value in changes.items():
        if name == "places":
            value = _dumped(value)
        elif name == "extra":
            value = _portable(value)
        new[name] = value
    if lease_changes:
        new["lease"] = None if lease is None else now + timedelta(seconds=lease)
    state = changes.get("state")
    if (lease_changes and lease is not None) or state not in (None, STORED):
        new["unfinished"] = True
    elif lease_changes and state == STORED:
        new["unfinished"] = False
    elif lease_changes or state == STORED:
        later_state = {"$literal": state} if state is not None else {"$ifNull": ["$state", STORED]}
        later_lease = None if lease_changes else {"$ifNull": ["$lease", None]}
        new = {name: {"$literal": value} for name, value in new.items()}
        new["unfinished"] = {"$or": [{"$ne": [later_state, STORED]}, {"$ne": [later_lease, None]}]}
        return [{"$set": new}]
    return {"$set": new}


# -- filters


def expected(path: str, expect: Revision | None) -> Document:
    """Return the filter of a compare-and-set."""
    if expect is None:
        return {"path": path}
    return {"path": path, "token": _or_missing(expect.token, ""), "version": _or_missing(expect.version, 0)}


def matching(
    proxy_storage_name: str | None,
    state: State | None,
    *,
    prefix: str = "",
    lower: str = "",
    inclusive: bool = True,
) -> Document:
    """Return the filter of a listing: paths that begin with `prefix`, from `lower` on."""
    paths: Document = {"$gte" if inclusive else "$gt": lower}
    end = successor(prefix)
    if end is not None:
        paths["$lt"] = end
    found: Document = {"path": paths}
    if proxy_storage_name is not None:
        found["proxy_storage_name"] = _or_missing(proxy_storage_name, "")
    if state is not None:
        found["state"] = _or_missing(state, STORED)
    return found


def _or_missing(value: Any, default: Any) -> Any:
    """Let documents without the field have the default."""
    return {"$in": [value, None]} if value == default else value


# -- values


def places_of(listed: Iterable[Mapping[str, Any]]) -> tuple[Place, ...]:
    """Return the places of a document."""
    return tuple(Place(one["original"], one["key"], one["state"], one.get("due")) for one in listed)


def _dumped(places: Iterable[Place]) -> list[Document]:
    return [
        {"original": place.original, "key": place.key, "state": place.state}
        | ({} if place.due is None else {"due": place.due})
        for place in places
    ]


def _portable(extra: Mapping[str, Any]) -> Document:
    """Return a copy that any other meta-backend would keep the same: what JSON can say."""
    copied: Document = json.loads(dump_extra(extra))
    return copied


def _moment(given: datetime) -> datetime:
    """Return what BSON keeps of a moment: milliseconds."""
    given = given.astimezone(UTC)
    return given.replace(microsecond=given.microsecond // 1000 * 1000)
