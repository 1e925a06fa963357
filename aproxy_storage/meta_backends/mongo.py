"""A meta-backend in a MongoDB collection, by PyMongo's asynchronous driver or by Motor."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Any, Concatenate, ParamSpec, Self, TypeVar

from ..clients.mongo import (
    DUPLICATE_KEY,
    JOURNALLED,
    Databases,
    is_storable,
    mongo_error,
)
from ..errors import (
    AlreadyExists,
    BackendUnavailable,
    ConfigurationError,
    Conflict,
    MissingDependency,
    NotFound,
    StorageError,
    copies_of,
)
from ..records import MetaRecord, Revision, State
from ..timeouts import Timeouts
from ..urls import URL
from ._mongo_collection import Collection
from ._mongo_documents import (
    Document,
    change,
    expected,
    matching,
    places_of,
    to_document,
    to_record,
)
from .base import UNCHANGED, MetaBackend, Unchanged, check_changes

try:
    import bson
    from bson.raw_bson import RawBSONDocument
    from pymongo import DeleteOne, ReturnDocument, WriteConcern
    from pymongo.errors import BulkWriteError, ConnectionFailure, DuplicateKeyError, OperationFailure
except ImportError as error:
    raise MissingDependency.of("pymongo", "mongo") from error

__all__ = ["MongoMetaBackend"]

_NO_LIMIT = contextlib.nullcontext()  # but that of every call, see `MetaBackend._call`

A = TypeVar("A")
P = ParamSpec("P")

_CHUNK = 500  # items of one call that share a statement
_AT_ONCE = 16  # statements of one update_many in flight


class MongoMetaBackend(MetaBackend):
    """Keeps the records as documents of one MongoDB collection (MongoDB 4.2 or newer).

    Every write is acknowledged by a majority of the servers and journalled, and every answer comes from the primary,
    whatever the settings of the client that is passed. Memory is that of the answers, a page or 500 documents at most.
    Documents made by django-proxy-storage are records as they are.

    Times have milliseconds. Leases are kept by the server's clock, see `_mongo_clock`.

    A call that ended without an answer (cancelled, timed out, connection lost) may have taken effect or not, as one
    whole; the drivers repeat a statement once by themselves, which the server recognises.

    Args:
        database: one of

            * a URI that names a database, ``mongodb://host/name``: a client of its own for each event loop and process,
              closed by `aclose`, or else with the loop
            * a database of ``pymongo.AsyncMongoClient`` or of Motor's ``AsyncIOMotorClient``: borrowed, never closed,
              good for one event loop and process
            * a function without arguments that returns such a database: asked once for each event loop and process;
              what it returns is borrowed

        collection: its name.
        write_concern: another one, for those who know what they give up.
        timeouts: `operation` limits every call, the search for a server included.

    Raises, from every call:
        BackendUnavailable, DeadlineExceeded: no server answers, or not in time.
        AccessDenied: the user lacks rights.
        ConfigurationError: wrong user name or password; a database of another event loop; a collection with several
            documents of one path.
        NotSupported: a value that MongoDB or JSON cannot keep, or a record of more than 16 MiB.
    """

    _durable_with = "needs a write_concern with j=True, as it has by default"

    def __init__(
        self,
        database: Any,
        collection: str = "aproxy_files",
        *,
        write_concern: WriteConcern | None = None,
        timeouts: Timeouts | None = None,
    ) -> None:
        limits = timeouts or Timeouts()
        concern = write_concern or JOURNALLED
        if not concern.acknowledged:
            raise ConfigurationError("a write that nobody acknowledges cannot be relied on; write_concern needs w >= 1")
        self._databases = Databases(
            database, lambda found: Collection(found, collection, concern), seconds=limits.operation
        )
        self.collection = collection
        self.durable = bool(concern.document.get("j"))
        super().__init__(timeouts=limits)

    @classmethod
    def from_url(cls, url: str) -> Self:
        """Make one of ``mongodb://host/name?collection=files``; what else the query holds is the driver's."""
        parsed = URL.parse(url)
        options = parsed.options(timeouts=True, others=True, collection=str)
        return cls(parsed.rest("collection", "timeouts"), **options)

    def __str__(self) -> str:
        return f"MongoMetaBackend({self._databases.name}.{self.collection})"

    # -- one statement, or a few that belong together

    async def _on(
        self, work: Callable[Concatenate[Collection, P], Awaitable[A]], *args: P.args, **options: P.kwargs
    ) -> A:
        with self._databases.use() as used, self._databases.limit() if used.in_threads else _NO_LIMIT:
            try:
                if not used.ready:
                    await used.prepare(str(self))
                return await work(used, *args, **options)
            except ConnectionFailure:
                used.clock.forget()
                raise

    async def setup(self) -> None:
        await self._call("setup", None, self._on(_nothing))

    async def _aclose(self) -> None:
        await self._databases.aclose(self.timeouts.cleanup)

    def _map_error(self, error: Exception, what: str) -> StorageError:
        return mongo_error(error, what) or super()._map_error(error, what)

    # -- one record

    async def _create(self, record: MetaRecord, lease: float | None) -> MetaRecord:
        return await self._on(self._insert, record, lease)

    async def _insert(self, used: Collection, record: MetaRecord, lease: float | None) -> MetaRecord:
        document = to_document(record, lease, await used.clock.now())
        try:
            await used.files.insert_one(document)
        except DuplicateKeyError as error:
            _check_index(error.details, error)
            taken = await used.one({"path": record.path})
            if taken is not None and _is_own(taken, record):
                return to_record(taken)
            raise self._taken(record.path) from error
        return to_record(document)

    async def _reserve(self, record: MetaRecord, lease: float, spare: MetaRecord) -> MetaRecord | None:
        try:
            return await self._on(self._insert_or_spare, record, lease, spare)
        except BackendUnavailable as error:
            error.outcome_unknown = True  # the statement after the insert may be the one that failed
            raise

    async def _insert_or_spare(
        self, used: Collection, record: MetaRecord, lease: float, spare: MetaRecord
    ) -> MetaRecord:
        # First the record, then the look: somebody who renames at the same instant sees ours, or we see his.
        reserved = await self._insert(used, record, lease)
        wanted = {(place.original, place.key) for place in record.all_places()}
        for document in await used.naming([key for _, key in wanted]):
            if document["path"] != record.path and wanted & _places(document):
                changes = {
                    "original_storage_path": spare.original_storage_path,
                    "places": spare.places,
                    "version": reserved.version + 1,
                }
                return await self._change(used, record.path, changes, reserved.revision, UNCHANGED)
        return reserved

    async def _get(self, path: str) -> MetaRecord | None:
        if not is_storable(path):
            return None
        document = await self._on(Collection.one, {"path": path})
        return None if document is None else to_record(document)

    async def _exists(self, path: str, state: State | None, proxy_storage_name: str | None) -> bool:
        if not is_storable(path):
            return False
        wanted = {**matching(proxy_storage_name, state), "path": path}
        return await self._on(Collection.one, wanted, {"_id": True}) is not None

    async def _update(
        self, path: str, changes: Mapping[str, Any], expect: Revision | None, lease: float | Unchanged | None
    ) -> MetaRecord:
        return await self._on(self._change, path, changes, expect, lease)

    async def _change(
        self,
        used: Collection,
        path: str,
        changes: Mapping[str, Any],
        expect: Revision | None,
        lease: float | Unchanged | None,
    ) -> MetaRecord:
        if not is_storable(path):
            raise self._absent(path, expect)
        now = await used.clock.now()
        if isinstance(lease, Unchanged):
            update = change(changes, now, None, lease_changes=False)
        else:
            update = change(changes, now, lease, lease_changes=True)
        try:
            document = await used.files.find_one_and_update(
                expected(path, expect), update, return_document=ReturnDocument.AFTER
            )
        except DuplicateKeyError as error:
            _check_index(error.details, error)
            raise self._taken(changes["path"]) from error
        if document is None:
            raise self._absent(path, expect)
        return to_record(document)

    async def _delete(self, path: str, expect: Revision | None) -> bool:
        if not is_storable(path):
            return False
        return await self._on(Collection.delete, expected(path, expect))

    def _taken(self, path: str) -> AlreadyExists:
        return AlreadyExists(f"{self} holds a record of {path!r} already", path=path)

    def _absent(self, path: str, expect: Revision | None) -> StorageError:
        if expect is not None:
            return Conflict(f"the record of {path!r} is gone or has changed", path=path)
        return NotFound(f"{self} holds no record of {path!r}", path=path)

    # -- many records

    async def create_many(
        self, records: Sequence[MetaRecord], *, lease: float | None = None
    ) -> list[MetaRecord | StorageError]:
        answers: list[MetaRecord | StorageError] = []
        for chunk in _chunks(records):
            paths = [record.path for record in chunk]
            answers += await self._chunk("create", paths, self._on(self._insert_each, chunk, lease))
        return [
            answer if isinstance(answer, MetaRecord) else self._located("create", record.path, answer)
            for record, answer in zip(records, answers, strict=True)
        ]

    async def _insert_each(
        self, used: Collection, records: Sequence[MetaRecord], lease: float | None
    ) -> list[MetaRecord | StorageError]:
        now = await used.clock.now()
        answers: list[MetaRecord | StorageError | None] = [None] * len(records)
        raw: list[RawBSONDocument] = []
        numbers: list[int] = []  # of the records that can be sent
        for number, record in enumerate(records):
            try:
                document = {"_id": bson.ObjectId(), **to_document(record, lease, now)}
                # Encoded one by one, so that one that cannot be kept does not keep the others out.
                raw.append(RawBSONDocument(bson.encode(document)))
            except Exception as error:
                answers[number] = self._mapped(error, "create", record.path)
            else:
                numbers.append(number)
                answers[number] = to_record(document)
        failed: dict[int, Mapping[str, Any]] = {}
        if raw:
            try:
                await used.files.insert_many(raw, ordered=False)
            except BulkWriteError as error:
                if error.details.get("writeConcernErrors"):
                    raise
                failed = {numbers[one["index"]]: one for one in error.details["writeErrors"]}
        taken = {}
        if failed:
            paths = [records[number].path for number in failed]
            taken = {document["path"]: document for document in await used.found({"path": {"$in": paths}})}
        for number, told in failed.items():
            record = records[number]
            if told.get("code") != DUPLICATE_KEY:
                answers[number] = self._mapped(
                    OperationFailure(str(told.get("errmsg")), told.get("code"), dict(told)), "create", record.path
                )
            elif record.path in taken and _is_own(taken[record.path], record):
                answers[number] = to_record(taken[record.path])
            else:
                answers[number] = _refused_by(told) or self._taken(record.path)
        return [answer for answer in answers if answer is not None]

    async def get_many(self, paths: Sequence[str]) -> list[MetaRecord | None]:
        found: dict[str, Document] = {}
        for chunk in _chunks([path for path in dict.fromkeys(paths) if is_storable(path)]):
            documents = await self._call("get_many", None, self._on(Collection.found, {"path": {"$in": chunk}}))
            found |= {document["path"]: document for document in documents}
        return [to_record(found[path]) if path in found else None for path in paths]

    async def update_many(
        self,
        updates: Sequence[tuple[str, Mapping[str, Any], Revision | None]],
        *,
        lease: float | Unchanged | None = UNCHANGED,
    ) -> list[MetaRecord | StorageError]:
        # A bulk write tells how many documents it has changed, not which. So these are single statements, side by side.
        for _, changes, _ in updates:
            check_changes(changes)
        answers: list[MetaRecord | StorageError | None] = [None] * len(updates)

        async def work(numbers: Any) -> None:
            for number in numbers:
                path, changes, expect = updates[number]
                try:
                    answers[number] = await self.update(path, changes, expect=expect, lease=lease)
                except StorageError as error:
                    answers[number] = error.with_traceback(None)

        for turn in _without_repetition([{path, changes.get("path", path)} for path, changes, _ in updates]):
            numbers = iter(turn)
            async with asyncio.TaskGroup() as group:
                for _ in range(min(_AT_ONCE, len(turn))):
                    group.create_task(work(numbers))
        return [answer for answer in answers if answer is not None]

    async def delete_many(self, items: Sequence[tuple[str, Revision | None]]) -> list[StorageError | None]:
        """Remove many (path, expect); the answer for each is None, or the error of `delete`.

        Where somebody else removes the same record in the same instant, both may be told that they have.
        """
        answers: list[StorageError | None] = []
        for chunk in _chunks(items):
            paths = [path for path, _ in chunk]
            answers += await self._chunk("delete", paths, self._on(self._delete_each, chunk))
        return [
            None if answer is None else self._located("delete", path, answer)
            for (path, _), answer in zip(items, answers, strict=True)
        ]

    async def _delete_each(
        self, used: Collection, items: Sequence[tuple[str, Revision | None]]
    ) -> list[StorageError | None]:
        paths = [path for path, _ in items if is_storable(path)]
        documents = await used.found({"path": {"$in": paths}}, {"path": True, "token": True, "version": True})
        there = {document["path"]: document for document in documents}
        answers: list[StorageError | None] = []
        chosen: dict[Any, int] = {}  # _id -> number of the item
        statements = []
        for number, (path, expect) in enumerate(items):
            document = there.get(path)
            if document is None or not (expect is None or _revision(document) == expect):
                answers.append(self._absent(path, expect))
                continue
            answers.append(None)
            del there[path]  # a second item of the same path comes too late
            chosen[document["_id"]] = number
            statements.append(DeleteOne({**expected(path, expect), "_id": document["_id"]}))
        if not statements:
            return answers
        result = await used.files.bulk_write(statements, ordered=False)
        if result.deleted_count != len(statements):  # somebody has changed or removed some since the look
            for document in await used.found({"_id": {"$in": list(chosen)}}, {"_id": True}):
                number = chosen[document["_id"]]
                answers[number] = self._absent(*items[number])
        return answers

    async def _chunk(self, operation: str, paths: Sequence[str], work: Awaitable[list[Any]]) -> list[Any]:
        """Return the answers of one statement for many, or its error for each."""
        try:
            return await self._call(f"{operation}_many", None, work)
        except StorageError as error:
            # Of several statements the last may be the one that failed.
            error.outcome_unknown = error.outcome_unknown or isinstance(error, BackendUnavailable)
            return copies_of(error, operation, paths, str(self))

    def _mapped(self, error: Exception, operation: str, path: str) -> StorageError:
        mapped = error if isinstance(error, StorageError) else self._map_error(error, f"{operation} {path!r}")
        if mapped is not error:
            mapped.__cause__ = error
        return mapped.with_traceback(None)

    def _located(self, operation: str, path: str, error: StorageError) -> StorageError:
        return error.located(operation=operation, path=path, backend=str(self))

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
        if not is_storable(prefix) or not is_storable(lower):
            return []
        wanted = matching(proxy_storage_name, state, prefix=prefix, lower=lower, inclusive=inclusive)
        return [to_record(document) for document in await self._on(Collection.page, wanted, limit)]

    async def _list_unfinished(
        self, proxy_storage_name: str | None, older_than: float, after: str | None, limit: int, force: bool
    ) -> Sequence[MetaRecord]:
        wanted = {**matching(proxy_storage_name, None, lower=after or "", inclusive=after is None), "unfinished": True}
        seconds = None if force else older_than
        return [to_record(document) for document in await self._on(Collection.unfinished, wanted, limit, seconds)]

    async def _owners(self, original_storage_name: str | None, keys: Sequence[str]) -> Mapping[str, Sequence[str]]:
        owners: dict[str, list[str]] = {}
        for chunk in _chunks([key for key in keys if is_storable(key)]):
            asked = set(chunk)
            for document in await self._on(Collection.naming, chunk):
                named = {
                    key
                    for original, key in _places(document)
                    if key in asked and original_storage_name in (None, original)
                }
                for key in named:
                    owners.setdefault(key, []).append(document["path"])
        return {key: sorted(paths) for key, paths in owners.items()}

    async def _count(self, prefix: str, proxy_storage_name: str | None, state: State | None) -> int:
        if not is_storable(prefix):
            return 0
        return await self._on(Collection.count, matching(proxy_storage_name, state, prefix=prefix, lower=prefix))


async def _nothing(used: Collection) -> None:
    """Be a call that does nothing but prepare."""


def _places(document: Document) -> set[tuple[str, str]]:
    found = {(place.original, place.key) for place in places_of(document.get("places") or ())}
    found.add((document.get("original_storage_name") or "", document.get("original_storage_path") or ""))
    return found


def _revision(document: Document) -> Revision:
    return Revision(document.get("token") or "", document.get("version") or 0)


def _is_own(document: Document, record: MetaRecord) -> bool:
    """Return whether `document` is what an earlier try of ours to create `record` has made."""
    return bool(record.token and document.get("token") == record.token)


def _check_index(details: Mapping[str, Any] | None, error: DuplicateKeyError) -> None:
    """Tell a taken path from what an index that somebody has added refuses: another name would not help there."""
    refused = _refused_by(details or {})
    if refused is not None:
        raise refused from error


def _refused_by(details: Mapping[str, Any]) -> ConfigurationError | None:
    pattern = details.get("keyPattern", {"path": 1})
    if "path" in pattern:
        return None
    return ConfigurationError(
        f"a unique index that is not ours refuses the record: {dict(pattern)}; drop it, or make it not unique"
    )


def _chunks(items: Sequence[A]) -> list[Sequence[A]]:
    return [items[start : start + _CHUNK] for start in range(0, len(items), _CHUNK)]


def _without_repetition(named: Sequence[set[str]]) -> list[list[int]]:
    """Return the numbers of the items in turns, in order, such that no two of a turn name the same path."""
    turns: list[list[int]] = []
    busy: set[str] = set()
    for number, names in enumerate(named):
        if not turns or names & busy:
            turns.append([])
            busy = set()
        turns[-1].append(number)
        busy |= names
    return turns
