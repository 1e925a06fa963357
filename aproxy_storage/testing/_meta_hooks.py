"""What the parts of the meta-backend suite share: the hooks, records to begin with, and awkward paths."""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

from ..paths import new_token
from ..records import PENDING, CommonPrefix, MetaRecord

__all__ = ["AWKWARD", "MetaBackendHooks", "listed", "make_record", "make_reservation"]

# What a locale, UTF-16 or a regular expression would sort or match otherwise.
_AWKWARD = [
    " lead",
    "!",
    "%",
    "%25",
    "A",
    "Z/z",
    "[a-z]",
    "_",
    "a",
    "a b",
    "a!",
    "a$",
    "a'b\"c;--",
    "a*",
    "a/",
    "a/b",
    "a0",
    "aa",
    "ab",
    "a_",
    "a{2}",
    "e\u0301",
    "~",
    "é",
    "日本/写真.jpg",
    "日本語",
    "\ud7ff",
    "\ue000",
    "\uffff",
    "\U00010000",
    "😀/a",
    "\U0010ffff",
]
AWKWARD = sorted(_AWKWARD, key=str.encode)


def make_record(path: str, **fields: Any) -> MetaRecord:
    """Return a stored record of the storage ``media`` whose bytes are in ``fs`` under its path."""
    defaults: dict[str, Any] = {
        "proxy_storage_name": "media",
        "original_storage_name": "fs",
        "original_storage_path": path,
        "token": new_token(),
    }
    return MetaRecord(path, **(defaults | fields))


def make_reservation(path: str, **fields: Any) -> tuple[MetaRecord, MetaRecord]:
    """Return the pending record of a save to `path`, and its spare with a key that nobody can have."""
    record = make_record(path, state=PENDING, **fields)
    return record, replace(record, original_storage_path=f"{path}_{record.token}", places=())


async def listed(items: AsyncIterator[MetaRecord | CommonPrefix]) -> list[str]:
    """Return the paths of a listing."""
    return [item.path async for item in items]


class MetaBackendHooks:
    """What a subclass supplies."""

    #: The widest integer that `extra` keeps exactly, and whether a NUL survives in its texts.
    extra_integer: int = 2**63 - 1
    extra_keeps_nul: bool = True
    #: A moment that is given comes back to the microsecond; else to the millisecond.
    keeps_microseconds: bool = True

    async def row_behind(self, meta: Any, path: str) -> Mapping[str, Any] | None:
        """Return what the database holds for `path`, by column, read without `meta`."""
        raise NotImplementedError

    async def rows_behind(self, meta: Any) -> Sequence[Mapping[str, Any]]:
        """Return everything the database holds, read without `meta`."""
        raise NotImplementedError

    async def insert_behind(self, meta: Any, **columns: Any) -> None:
        """Put in a row with these columns only, as a program that knows no state, token and version would."""
        raise NotImplementedError

    async def expire_lease_behind(self, meta: Any, path: str, *, ago: float = 1.0) -> None:
        """Let the lease of `path` have run out `ago` seconds ago, by the database's clock."""
        raise NotImplementedError
