"""A meta-backend in the memory of the process, for tests, demonstrations and caches that may be lost."""

from __future__ import annotations

import threading
import time
from bisect import bisect_left, bisect_right, insort
from collections.abc import Callable, Mapping, Sequence
from itertools import islice
from typing import Any, ClassVar, Self

from ..errors import AlreadyExists, Conflict, InvalidPath, NotFound, StorageError
from ..paths import successor
from ..records import STORED, MetaRecord, Revision, State
from ..urls import URL
from ._rows import COLUMNS, changed, to_record, to_row
from .base import MetaBackend, Unchanged

__all__ = ["MemoryMetaBackend"]

_PATH, _PROXY, _ORIGINAL, _KEY, _STATE, _TOKEN, _VERSION, _PLACES, _LEASE = range(9)
assert COLUMNS[:9][_LEASE] == "lease"


class MemoryMetaBackend(MetaBackend):
    """Keeps the records in a dict, with the same promises as a database, except that they die with the process.

    It may be used from several event loops and threads at once; a call holds a lock for microseconds and never
    waits for anything else, so there is nothing to time out and nothing that a cancellation could leave half done.
    A fork gives the child a copy of its own.

    Args:
        clock: returns seconds; leases are kept by it. A test may pass its own and move it. `time.monotonic` by
            default, so that a step of the host's clock ends no lease.
    """

    keeps_deadlines: ClassVar[bool] = True
    _durable_with: ClassVar[str] = "keeps them in memory"

    def __init__(self, *, clock: Callable[[], float] = time.monotonic) -> None:
        super().__init__()
        self._clock = clock
        self._epoch = time.time() - clock()  # shown times are epoch seconds; only differences of `clock` count
        self._rows: dict[str, list[Any]] = {}  # never changed in place: a reader may hold one
        self._paths: list[str] = []  # sorted; Python orders text by code point, which is the byte order of UTF-8
        self._unfinished: set[str] = set()
        self._owners_of: dict[tuple[str, str], set[str]] = {}  # (original, key) -> paths
        self._lock = threading.RLock()  # reentrant: a subclass may group calls

    @classmethod
    def from_url(cls, url: str) -> Self:
        """Make a new, empty one of ``memory:``, which has no parameters."""
        return cls(**URL.parse(url).options())

    def now(self) -> float:
        """Return this database's time, in seconds since 1970 as of its making."""
        return self._epoch + self._clock()

    # -- hooks

    async def _create(self, record: MetaRecord, lease: float | None) -> MetaRecord:
        with self._lock:
            return self._insert(record, lease)

    def _insert(self, record: MetaRecord, lease: float | None) -> MetaRecord:
        path = _encodable(record.path)
        taken = self._rows.get(path)
        if taken is not None:
            if record.token and taken[_TOKEN] == record.token:
                return to_record(taken)
            raise AlreadyExists(f"{self} holds a record of {path!r} already", path=path)
        now = self.now()
        row = to_row(record, None if lease is None else now + lease, now)
        self._put(row)
        return to_record(row)

    async def _reserve(self, record: MetaRecord, lease: float, spare: MetaRecord) -> MetaRecord | None:
        with self._lock:
            for place in record.all_places():
                if self._owners_of.get((place.original, place.key), set()) - {record.path}:
                    return self._insert(spare, lease)
            return self._insert(record, lease)

    async def _get(self, path: str) -> MetaRecord | None:
        row = self._rows.get(path)
        return None if row is None else to_record(row)

    async def _exists(self, path: str, state: State | None, proxy_storage_name: str | None) -> bool:
        row = self._rows.get(path)
        return row is not None and _matches(row, proxy_storage_name, state)

    async def _update(
        self, path: str, changes: Mapping[str, Any], expect: Revision | None, lease: float | Unchanged | None
    ) -> MetaRecord:
        with self._lock:
            row = self._expected(path, expect)
            if row is None:
                raise _absent(self, path, expect)
            new, _ = changed(row, changes, now := self.now())
            if not isinstance(lease, Unchanged):
                new[_LEASE] = None if lease is None else now + lease
            if new[_PATH] != path and _encodable(new[_PATH]) in self._rows:
                raise AlreadyExists(f"{self} holds a record of {new[_PATH]!r} already", path=new[_PATH])
            self._drop(row)
            self._put(new)
            return to_record(new)

    async def _delete(self, path: str, expect: Revision | None) -> bool:
        with self._lock:
            row = self._expected(path, expect)
            if row is None:
                return False
            self._drop(row)
            return True

    def _expected(self, path: str, expect: Revision | None) -> list[Any] | None:
        row = self._rows.get(path)
        if row is None or expect is None or (row[_TOKEN], row[_VERSION]) == (expect.token, expect.version):
            return row
        return None

    async def _page(
        self,
        prefix: str,
        lower: str,
        inclusive: bool,
        limit: int,
        proxy_storage_name: str | None,
        state: State | None,
    ) -> Sequence[MetaRecord]:
        with self._lock:
            start = (bisect_left if inclusive else bisect_right)(self._paths, lower)
            rows = (self._rows[self._paths[at]] for at in range(start, self._end(prefix)))
            wanted = (row for row in rows if _matches(row, proxy_storage_name, state))
            return [to_record(row) for row in islice(wanted, limit)]

    async def _list_unfinished(
        self, proxy_storage_name: str | None, older_than: float, after: str | None, limit: int, force: bool
    ) -> Sequence[MetaRecord]:
        with self._lock:
            over = self.now() - older_than
            paths = sorted(self._unfinished)
            rows = (self._rows[path] for path in paths[0 if after is None else bisect_right(paths, after) :])
            wanted = (
                row
                for row in rows
                if (force or row[_LEASE] is None or row[_LEASE] <= over) and _matches(row, proxy_storage_name, None)
            )
            return [to_record(row) for row in islice(wanted, limit)]

    async def _owners(self, original_storage_name: str | None, keys: Sequence[str]) -> Mapping[str, Sequence[str]]:
        with self._lock:
            originals = (
                {original_storage_name} if original_storage_name is not None else {o for o, _ in self._owners_of}
            )
            found = ((key, {p for o in originals for p in self._owners_of.get((o, key), ())}) for key in keys)
            return {key: sorted(paths) for key, paths in found if paths}

    async def _count(self, prefix: str, proxy_storage_name: str | None, state: State | None) -> int:
        with self._lock:
            span = range(bisect_left(self._paths, prefix), self._end(prefix))
            return sum(_matches(self._rows[self._paths[at]], proxy_storage_name, state) for at in span)

    # -- the row and its indexes; called with the lock held

    def _put(self, row: list[Any]) -> None:
        path = row[_PATH]
        self._rows[path] = row
        insort(self._paths, path)
        if row[_LEASE] is not None or row[_STATE] != STORED:
            self._unfinished.add(path)
        for place in self._places(row):
            self._owners_of.setdefault(place, set()).add(path)

    def _drop(self, row: list[Any]) -> None:
        path = row[_PATH]
        del self._rows[path]
        del self._paths[bisect_left(self._paths, path)]
        self._unfinished.discard(path)
        for place in self._places(row):
            owners = self._owners_of[place]
            owners.discard(path)
            if not owners:
                del self._owners_of[place]

    @staticmethod
    def _places(row: list[Any]) -> set[tuple[str, str]]:
        places = {(row[_ORIGINAL], row[_KEY])}
        if row[_PLACES] != "[]":
            places.update((place.original, place.key) for place in to_record(row).places)
        return places

    def _end(self, prefix: str) -> int:
        upper = successor(prefix)
        return len(self._paths) if upper is None else bisect_left(self._paths, upper)


def _matches(row: list[Any], proxy_storage_name: str | None, state: State | None) -> bool:
    return (state is None or row[_STATE] == state) and (proxy_storage_name is None or row[_PROXY] == proxy_storage_name)


def _absent(meta: MetaBackend, path: str, expect: Revision | None) -> StorageError:
    if expect is not None:
        return Conflict(f"the record of {path!r} is gone or has changed", path=path)
    return NotFound(f"{meta} holds no record of {path!r}", path=path)


def _encodable(path: str) -> str:
    """Refuse what no database could keep, so that a test in memory finds it too."""
    try:
        path.encode()
    except UnicodeEncodeError as error:
        raise InvalidPath("a path with lone surrogates cannot be stored", path=path) from error
    return path
