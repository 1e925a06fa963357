"""The contract of a meta-backend, and everything that all of them share.

To write one, subclass `MetaBackend`, implement the underscored hooks, and hold it to
``aproxy_storage.testing.meta_backends.MetaBackendTests``.
"""

from __future__ import annotations

import abc
import contextlib
import contextvars
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Mapping, Sequence
from typing import Any, ClassVar, Self, TypeVar, overload

from ..blocking import came_from_outside
from ..cleanup import Cleanup
from ..errors import (
    BackendUnavailable,
    ConfigurationError,
    Conflict,
    DeadlineExceeded,
    NotFound,
    NotSupported,
    StorageError,
    from_os_error,
)
from ..paths import successor
from ..records import CommonPrefix, MetaRecord, Revision, State
from ..timeouts import Alarm, Timeouts

__all__ = ["CHANGEABLE", "UNCHANGED", "MetaBackend", "Unchanged", "check_changes"]

T = TypeVar("T")

#: What `update` may change. Everything else of a record is fixed at its creation.
CHANGEABLE = frozenset(
    {
        "path",
        "original_storage_name",
        "original_storage_path",
        "state",
        "version",
        "places",
        "size",
        "checksum",
        "content_type",
        "name",
        "extra",
    }
)


class Unchanged:
    """The type of `UNCHANGED`: leave the lease as it is."""


UNCHANGED = Unchanged()

_PAGE = 500
_FEW = 4


class MetaBackend(abc.ABC):
    """Keeps one record per path.

    Constructors only store; everything bound to a loop or a process is made on first use. The schema is made on
    first use too, or by `setup`. Every method may be called from any event loop.

    A *lease* is given in seconds from now and is kept by the clock of the database, never by the caller's.
    """

    #: True where every hook keeps its own deadlines, because a timer per call would cost more than the call.
    keeps_deadlines: ClassVar[bool] = False
    #: As that of `Backend`.
    works_here: ClassVar[bool] = False
    #: True where nothing lands late or twice: what was asked for and cancelled is done before what the same loop asks
    #: for after it, or never.
    in_order: ClassVar[bool] = False
    #: Where it works here: the roots of what its driver raises.
    driver_errors: ClassVar[tuple[type[BaseException], ...]] = ()
    #: True where an answered write survives the loss of power.
    durable: bool = False
    #: How one is made for which that is true, to be put after "it".
    _durable_with: ClassVar[str] = "does not say that its records do (`durable`)"

    def __init__(self, *, timeouts: Timeouts | None = None) -> None:
        self.timeouts = timeouts or Timeouts()
        self.cleanup = Cleanup(self)

    def __str__(self) -> str:
        return type(self).__name__

    @classmethod
    def from_url(cls, url: str) -> Self:
        """Make a meta-backend of a URL, as configuration files hold it. Opens and connects nothing; see `urls`.

        Raises:
            ConfigurationError: this class has no URL form, or the URL is wrong. The message holds no secret of it.
        """
        raise ConfigurationError(f"{cls.__name__} has no URL form; make it in Python")

    # -- one record

    async def create(self, record: MetaRecord, *, lease: float | None = None) -> MetaRecord:
        """Insert `record`; return it as stored, with the times and the lease filled in.

        A conflict with a record that carries the same token is the answer to our own retry: success.

        Raises:
            AlreadyExists: the path is taken, decided by the database's unique constraint.
            BackendUnavailable, DeadlineExceeded: possibly with ``outcome_unknown``.
        """
        return await self._call("create", record.path, self._create(record, lease))

    async def reserve(self, record: MetaRecord, *, lease: float, spare: MetaRecord) -> MetaRecord | None:
        """Insert a ``pending`` record that others can see at once; return it as stored.

        Where a record of another path names one of its places (a renamed file keeps its key, and so does one that is
        still being deleted), `spare` is inserted instead: the same record with keys that nobody can have.

        Returns:
            None where nobody else could see it, because the caller is inside a transaction: nothing was done then.

        Raises:
            As `create`.
        """
        return await self._call("reserve", record.path, self._reserve(record, lease, spare))

    async def get(self, path: str) -> MetaRecord:
        """Return the record of `path`, whatever its state.

        Raises:
            NotFound: there is none. BackendUnavailable, DeadlineExceeded.
        """
        record = await self._call("get", path, self._get(path))
        if record is None:
            raise NotFound(f"{self} holds no record of {path!r}", operation="get", path=path, backend=str(self))
        return record

    @property
    def looks_here(self) -> bool:
        """Whether `look_here` can answer now: where the database is asked by synchronous calls anyway."""
        return False

    def look_here(self, path: str) -> MetaRecord | None:
        """Return the record of `path`, whatever its state, or None; in the calling thread, for synchronous code that
        needs no event loop for that. Nothing limits its time but the database. Only where `looks_here`.

        Raises:
            BackendUnavailable, and what the class says.
        """
        raise NotSupported(f"{self} can only be asked from an event loop")

    async def exists(self, path: str, *, state: State | None = None, proxy_storage_name: str | None = None) -> bool:
        """Return whether there is a record of `path`, in this state and of this storage where given."""
        return await self._call("exists", path, self._exists(path, state, proxy_storage_name))

    async def update(
        self,
        path: str,
        changes: Mapping[str, Any],
        *,
        expect: Revision | None = None,
        lease: float | Unchanged | None = UNCHANGED,
    ) -> MetaRecord:
        """Change fields of one record atomically; return the new record.

        `changes` may hold the fields in `CHANGEABLE` (``extra`` replaces the whole mapping). ``version`` is the
        caller's to move: the journal does it with state, path or places. `lease` in seconds from the database's
        now; None ends it.

        Raises:
            Conflict: with `expect`, the record is gone or has another token or version.
            NotFound: without `expect`, there is no such record.
            AlreadyExists: ``changes["path"]`` is taken.
            AccessDenied: ``changes["state"]`` is ``deleting``, and the database would not let the record go.
            ValueError: `changes` names a field that is not in `CHANGEABLE`.
            BackendUnavailable, DeadlineExceeded.
        """
        check_changes(changes)
        return await self._call("update", path, self._update(path, changes, expect, lease))

    async def delete(self, path: str, *, expect: Revision | None = None) -> None:
        """Remove one record.

        Raises:
            Conflict: with `expect`, the record is gone or has another token or version.
            NotFound: without `expect`, there is no such record.
            AccessDenied: the database does not let it go, because of what refers to it.
            BackendUnavailable, DeadlineExceeded.
        """
        if await self._call("delete", path, self._delete(path, expect)):
            return
        if expect is not None:
            raise Conflict(f"the record of {path!r} is gone or has changed", operation="delete", path=path)
        raise NotFound(f"{self} holds no record of {path!r}", operation="delete", path=path, backend=str(self))

    # -- many records: an answer per item, in order; an item's error does not touch the others

    async def create_many(
        self, records: Sequence[MetaRecord], *, lease: float | None = None
    ) -> list[MetaRecord | StorageError]:
        """Insert many; the answer for each is the record, or the error `create` would have raised."""
        return [await _answer(self.create(record, lease=lease)) for record in records]

    async def get_many(self, paths: Sequence[str]) -> list[MetaRecord | None]:
        """Return the records of `paths` in their order, None where there is none."""
        return [await self._call("get_many", path, self._get(path)) for path in paths]

    async def update_many(
        self,
        updates: Sequence[tuple[str, Mapping[str, Any], Revision | None]],
        *,
        lease: float | Unchanged | None = UNCHANGED,
    ) -> list[MetaRecord | StorageError]:
        """Change many (path, changes, expect); the answer for each is the record, or the error of `update`.

        Raises:
            ValueError: one of the `changes` names an unknown field; then nothing was changed.
        """
        for _, changes, _ in updates:
            check_changes(changes)
        return [
            await _answer(self.update(path, changes, expect=expect, lease=lease)) for path, changes, expect in updates
        ]

    async def delete_many(self, items: Sequence[tuple[str, Revision | None]]) -> list[StorageError | None]:
        """Remove many (path, expect); the answer for each is None, or the error of `delete`."""
        return [await _answer(self.delete(path, expect=expect)) for path, expect in items]

    async def _renew(self, records: Sequence[MetaRecord], lease: float) -> list[MetaRecord | StorageError]:
        """Give each of `records` that has not changed a lease of `lease` seconds; the answer for each, as of
        `update_many`. Override it where others can hold a record: no other one may wait for that."""
        return await self.update_many([(record.path, {}, record.revision) for record in records], lease=lease)

    # -- listings

    @overload
    def list(
        self,
        prefix: str = "",
        *,
        after: str | None = None,
        limit: int | None = None,
        delimiter: None = None,
        proxy_storage_name: str | None = None,
        state: State | None = None,
    ) -> AsyncIterator[MetaRecord]: ...

    @overload
    def list(
        self,
        prefix: str = "",
        *,
        after: str | None = None,
        limit: int | None = None,
        delimiter: str,
        proxy_storage_name: str | None = None,
        state: State | None = None,
    ) -> AsyncIterator[MetaRecord | CommonPrefix]: ...

    def list(
        self,
        prefix: str = "",
        *,
        after: str | None = None,
        limit: int | None = None,
        delimiter: str | None = None,
        proxy_storage_name: str | None = None,
        state: State | None = None,
    ) -> AsyncIterator[Any]:
        """Iterate over the records whose path begins with `prefix` and is greater than `after`, in byte order.

        By keyset, a page at a time: memory is bounded, a page costs the same wherever it lies, and what is added or
        removed meanwhile neither repeats nor hides others. With a `delimiter`, paths with that text after the prefix
        are rolled up into one `CommonPrefix`, which counts towards `limit`. All pages are of the database that this
        call goes to, whenever they are asked for.

        Raises (when iterated):
            BackendUnavailable, DeadlineExceeded.
        """
        return self._listed(prefix, after, limit, delimiter, proxy_storage_name, state, self.pin())

    async def _listed(
        self,
        prefix: str,
        after: str | None,
        limit: int | None,
        delimiter: str | None,
        proxy_storage_name: str | None,
        state: State | None,
        where: contextlib.AbstractContextManager[None],
    ) -> AsyncIterator[Any]:
        lower, inclusive = (after, False) if after is not None and after >= prefix else (prefix, True)
        if delimiter is not None and after is not None and after.startswith(prefix):
            head = _rolled_up(after, prefix, delimiter)
            if head is not None and head == after:  # `after` is itself a common prefix of an earlier page
                skip = successor(head)
                if skip is None:
                    return
                lower, inclusive = skip, True
        left = limit
        # Of a page that begins with a "directory" only the first record is used: ask for little until files follow.
        room = _PAGE if delimiter is None else _FEW
        while left is None or left > 0:
            size = room if left is None else min(room, left)
            with where:
                work = self._page(prefix, lower, inclusive, size, proxy_storage_name, state)
                page = await self._call("list", prefix, work)
            for record in page:
                rolled = _rolled_up(record.path, prefix, delimiter) if delimiter is not None else None
                if left is not None:
                    left -= 1
                if rolled is None:
                    lower, inclusive = record.path, False
                    yield record
                    continue
                yield CommonPrefix(rolled)
                skip = successor(rolled)
                if skip is None:
                    return
                lower, inclusive = skip, True
                room = _FEW
                break  # what is left of the page may lie below the common prefix
            else:
                if len(page) < size:
                    return
                room = min(4 * room, _PAGE)

    async def list_unfinished(
        self,
        *,
        proxy_storage_name: str | None = None,
        older_than: float = 0.0,
        after: tuple[Any, ...] | None = None,
        limit: int = _PAGE,
        force: bool = False,
    ) -> Sequence[MetaRecord]:
        """Return one page of the records with something left to do, in an order that `after` continues.

        Those are the records with a lease that ran out at least `older_than` seconds ago by the database's clock
        (`force`: with any lease), and ``pending`` or ``deleting`` ones without a lease. Served by an index.
        `after` is ``(record.path,)`` of the last one of the page before; pages are in byte order of the path.
        """
        return await self._call(
            "list_unfinished",
            None,
            self._list_unfinished(proxy_storage_name, older_than, after[0] if after else None, limit, force),
        )

    async def owners(self, original_storage_name: str | None, keys: Iterable[str]) -> Mapping[str, Sequence[str]]:
        """Return, for each of `keys` that a record of any storage and state names as a place in that original (None:
        in any), the paths of those records. Keys that nobody names are absent from the answer."""
        return await self._call("owners", None, self._owners(original_storage_name, list(dict.fromkeys(keys))))

    async def count(
        self, prefix: str = "", *, proxy_storage_name: str | None = None, state: State | None = None
    ) -> int:
        """Return how many records begin with `prefix`."""
        return await self._call("count", prefix, self._count(prefix, proxy_storage_name, state))

    # -- life

    async def after_commit(self, callback: Callable[[], Awaitable[None]]) -> None:
        """Await `callback` now; inside a caller's transaction, when that commits, and never if it rolls back."""
        await callback()

    def pin(self, record: MetaRecord | None = None) -> contextlib.AbstractContextManager[None]:
        """Return what has the calls inside of it go to the database to which one made now would go, or from which
        `record` came; for what is begun or goes on later, when the caller may have turned to another one.

        Entered any number of times, one after another. Does something only where the caller's context decides.
        """
        return contextlib.nullcontext()

    async def setup(self) -> None:
        """Make schema and indexes where they are missing; idempotent, also under a race of processes.

        Raises:
            ConfigurationError: the schema there is newer than this library knows.
        """

    async def aclose(self) -> None:
        """Release what the running loop holds; idempotent. The meta-backend can be used again afterwards."""
        await self.cleanup.drain(within=self.timeouts.cleanup)
        await self._aclose()

    async def __aenter__(self) -> Self:
        await self.setup()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.aclose()

    # -- the hooks

    @abc.abstractmethod
    async def _create(self, record: MetaRecord, lease: float | None) -> MetaRecord: ...

    async def _reserve(self, record: MetaRecord, lease: float, spare: MetaRecord) -> MetaRecord | None:
        """Override it where the database can do this in one statement or transaction."""
        reserved = await self._create(record, lease)
        for place in record.all_places():
            owners = (await self._owners(place.original, [place.key])).get(place.key, ())
            if any(owner != record.path for owner in owners):
                changes = {
                    "original_storage_path": spare.original_storage_path,
                    "places": spare.places,
                    "version": record.version + 1,
                }
                return await self._update(record.path, changes, reserved.revision, UNCHANGED)
        return reserved

    @abc.abstractmethod
    async def _get(self, path: str) -> MetaRecord | None: ...

    @abc.abstractmethod
    async def _exists(self, path: str, state: State | None, proxy_storage_name: str | None) -> bool: ...

    @abc.abstractmethod
    async def _update(
        self, path: str, changes: Mapping[str, Any], expect: Revision | None, lease: float | Unchanged | None
    ) -> MetaRecord:
        """Raise NotFound, Conflict or AlreadyExists as `update` promises."""

    @abc.abstractmethod
    async def _delete(self, path: str, expect: Revision | None) -> bool:
        """Return whether a record was removed."""

    @abc.abstractmethod
    async def _page(
        self,
        prefix: str,
        lower: str,
        inclusive: bool,
        limit: int,
        proxy_storage_name: str | None,
        state: State | None,
    ) -> Sequence[MetaRecord]:
        """Return up to `limit` records that begin with `prefix`, from `lower` on (without it unless `inclusive`)."""

    @abc.abstractmethod
    async def _list_unfinished(
        self, proxy_storage_name: str | None, older_than: float, after: str | None, limit: int, force: bool
    ) -> Sequence[MetaRecord]: ...

    @abc.abstractmethod
    async def _owners(self, original_storage_name: str | None, keys: Sequence[str]) -> Mapping[str, Sequence[str]]: ...

    @abc.abstractmethod
    async def _count(self, prefix: str, proxy_storage_name: str | None, state: State | None) -> int: ...

    async def _aclose(self) -> None:
        pass

    def _local_files(self) -> Sequence[str]:
        """Return the files of this machine that the records may be in, each by its real path."""
        return ()

    def _database_asked(self) -> str | None:
        """Return the database that the last call of this context went to; None where calls of all contexts go to the
        same. Override both where the caller's context decides."""
        return None

    def _context_for(self, database: str | None) -> contextvars.Context:
        """Return the context for work that goes on without its caller: empty, but calls go to `database`."""
        return contextvars.Context()

    def _later(self) -> contextvars.Context:
        """Return the context for work that goes on without the caller of this context."""
        return self._context_for(self._database_asked())

    def _map_error(self, error: Exception, what: str) -> StorageError:
        """Return our error for a native one. Extend it with the driver's; fall back to this."""
        if isinstance(error, TimeoutError):
            return DeadlineExceeded(f"could not {what} in time", outcome_unknown=True)
        if isinstance(error, OSError):
            return from_os_error(error, what)
        return BackendUnavailable(
            f"could not {what}: unexpected {type(error).__name__}", retryable=False, outcome_unknown=True
        )

    async def _call(self, operation: str, path: str | None, work: Awaitable[T]) -> T:
        try:
            if self.keeps_deadlines or self.timeouts.operation is None:
                return await work
            with Alarm(self.timeouts.operation):
                return await work
        except StorageError as error:
            error.located(operation=operation, path=path, backend=str(self))
            raise
        except Exception as error:
            if came_from_outside(error, *self.driver_errors):
                raise
            what = f"{operation} {path!r} in {self}" if path else f"{operation} in {self}"
            raise self._map_error(error, what).located(operation=operation, path=path, backend=str(self)) from error


def check_changes(changes: Mapping[str, Any]) -> None:
    """Raise ValueError unless `changes` names fields in `CHANGEABLE` only."""
    unknown = changes.keys() - CHANGEABLE
    if unknown:
        raise ValueError(f"a record has no changeable field {sorted(unknown)}; use extra")


def _rolled_up(path: str, prefix: str, delimiter: str) -> str | None:
    """Return the common prefix that `path` is rolled up into, None if it stands for itself."""
    at = path.find(delimiter, len(prefix))
    return None if at < 0 else path[: at + len(delimiter)]


async def _answer(work: Awaitable[T]) -> T | StorageError:
    try:
        return await work
    except StorageError as error:
        return error
