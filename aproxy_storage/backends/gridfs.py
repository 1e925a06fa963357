"""An original backend in MongoDB's GridFS, by PyMongo's asynchronous driver or by Motor."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from typing import Any, Concatenate, ParamSpec, Self, TypeVar

from ..clients.mongo import JOURNALLED, Databases, collection_of, ensure_indexes, is_storable, mongo_error
from ..content import Source
from ..errors import BackendUnavailable, ConfigurationError, MissingDependency, NotFound, StorageError
from ..futures import outcome_of, over, seen
from ..paths import new_token, successor
from ..records import ByteRange, Capabilities, ObjectInfo
from ..timeouts import Timeouts
from ..urls import URL
from ._gridfs_files import CHUNK_INDEXES, FILE_INDEXES, file_id, info_of, of_write
from ._gridfs_reader import GridReader, fetch
from ._gridfs_upload import Upload
from .base import Backend, Reader

try:
    from pymongo import ASCENDING, DESCENDING
except ImportError as error:
    raise MissingDependency.of("pymongo", "mongo") from error

__all__ = ["GridFSBackend"]

A = TypeVar("A")
P = ParamSpec("P")

_PAGE = 500
_FEW = 4
_SCHEME = "gridfs+"


class GridFSBackend(Backend):
    """Keeps objects as files of one GridFS bucket (MongoDB 4.2 or newer).

    The key is the file name. Every GridFS program can read what is written here, and what others have written can be
    read, listed and adopted; of several revisions of a name the newest counts. Names of ours are unique by an index of
    ours; against another program that writes the same name in the same instant nothing can help.

    A file is visible when it is whole: its document is written last, acknowledged by a majority of the servers and
    journalled, as everything is here. An error or a cancellation removes the chunks that were written; what a killed
    process leaves, `discard` with the token of that write finds.

    Memory: a write holds about 10 MiB (two statements of 1 MiB on their way, each as chunks, encoded and half sent, the
    next one, and the chunks of the source), a read about 8 MiB (two statements of 2 MiB, each as received and decoded),
    a listing one page of 500 documents.

    Args:
        database: as for `MongoMetaBackend`: a URI that names a database, a database of PyMongo Async or of Motor, or a
            function that returns one.
        bucket: the prefix of the two collections, ``fs.files`` and ``fs.chunks``.
        chunk_bytes: of new files. Documents are limited to 16 MiB.
        timeouts: `operation` limits each statement too, the search for a server included.

    Raises, from every call:
        BackendUnavailable, DeadlineExceeded: no server answers, or not in time.
        AccessDenied: the user lacks rights.
        ConfigurationError: wrong user name or password; a database of another event loop.
    """

    capabilities = Capabilities(
        conditional_create=True,
        range_read=True,
        list=True,
        modified_time=True,
        metadata=True,
        content_type=True,
        tokens=True,
    )

    def __init__(
        self, database: Any, *, bucket: str = "fs", chunk_bytes: int = 255 << 10, timeouts: Timeouts | None = None
    ) -> None:
        if not 1 <= chunk_bytes <= 15 << 20:
            raise ConfigurationError(f"a chunk has 1 byte to 15 MiB, not {chunk_bytes}: MongoDB keeps it in a document")
        if not bucket:
            raise ConfigurationError("a bucket needs a name, the prefix of its two collections; the usual one is 'fs'")
        limits = timeouts or Timeouts()
        self._databases = Databases(database, lambda found: _Bucket(found, bucket), seconds=limits.operation)
        self.bucket = bucket
        self.chunk_bytes = chunk_bytes
        super().__init__(timeouts=limits)

    @classmethod
    def from_url(cls, url: str) -> Self:
        """Make one of ``gridfs+mongodb://host/name?bucket=fs``; what else the query holds is the driver's."""
        parsed = URL.parse(url)
        options = parsed.options(timeouts=True, others=True, bucket=str, chunk_bytes=int)
        return cls(parsed.rest("bucket", "chunk_bytes", "timeouts").removeprefix(_SCHEME), **options)

    def __str__(self) -> str:
        return f"GridFSBackend({self._databases.name}.{self.bucket})"

    def full_path(self, key: str) -> str:
        return f"gridfs://{self._databases.name}/{self.bucket}/{key}"

    # -- statements: in tasks of ours, which no cancellation of a caller reaches. What is cancelled in the driver may
    # take effect after everything that would undo it; and it takes its connection with it.

    def _start(self, work: Callable[[], Awaitable[A]]) -> asyncio.Task[A]:
        task = self.cleanup.start(self._limited(work), name="a statement of GridFS", log=False)
        task.add_done_callback(seen)
        return task

    async def _limited(self, work: Callable[[], Awaitable[A]]) -> A:
        with self._databases.limit():
            return await work()

    async def _on(self, work: Callable[Concatenate[_Bucket, P], Awaitable[A]], *args: P.args, **options: P.kwargs) -> A:
        task = self._start(lambda: self._prepared(work, *args, **options))
        await over(task)
        return outcome_of(task)

    async def _prepared(
        self, work: Callable[Concatenate[_Bucket, P], Awaitable[A]], *args: P.args, **options: P.kwargs
    ) -> A:
        with self._databases.use() as bucket:
            if not bucket.ready:
                await bucket.prepare(str(self))
            return await work(bucket, *args, **options)

    async def _aclose(self) -> None:
        await self._databases.aclose(self.timeouts.cleanup)

    def _map_error(self, error: Exception, what: str) -> StorageError:
        return mongo_error(error, what) or super()._map_error(error, what)

    # -- the hooks

    async def _write(
        self,
        key: str,
        source: Source,
        *,
        content_type: str | None,
        metadata: Mapping[str, str],
        token: str | None,
        durable: bool,
    ) -> ObjectInfo:
        token = token or new_token()
        await self._on(_ready)
        with self._databases.use() as bucket:
            upload = Upload(
                bucket.files,
                bucket.chunks,
                self._start,
                key=key,
                id_=file_id(key, token),
                chunk_bytes=self.chunk_bytes,
            )
            try:
                async with contextlib.aclosing(source.chunks()) as chunks:
                    async for chunk in chunks:
                        await upload.add(chunk)
                document: dict[str, Any] = {
                    "filename": key,
                    "length": upload.size,
                    "chunkSize": self.chunk_bytes,
                    "metadata": dict(metadata),
                    "aproxy_token": token,
                }
                if content_type is not None:
                    document["contentType"] = content_type
                return info_of(await upload.finish(document))
            except BaseException as error:
                await self.cleanup.finish(
                    upload.undo(), within=self.timeouts.cleanup, name=f"undo of a write of {key!r}"
                )
                if isinstance(error, Exception) and not isinstance(error, StorageError):
                    mapped = self._map_error(error, f"write {key!r} in {self}")
                    # A statement without an answer may land after its undo.
                    mapped.outcome_unknown = mapped.outcome_unknown or not upload.gone
                    raise mapped from error
                if isinstance(error, BackendUnavailable):
                    error.outcome_unknown = error.outcome_unknown or not upload.gone
                else:
                    error.outcome_unknown = not upload.gone  # type: ignore[attr-defined]
                raise

    async def _newest(self, key: str) -> dict[str, Any]:
        found = await self._on(_Bucket.newest, key) if is_storable(key) else None
        if found is None:
            raise NotFound(f"there is no file {key!r} in {self}")
        return found

    async def _read(self, key: str, byte_range: ByteRange | None, chunk_bytes: int) -> Reader:
        document = await self._newest(key)
        info = info_of(document)
        assert info.size is not None
        start, stop = (byte_range or ByteRange()).resolve(info.size)
        if start == stop:
            return Reader(info)

        def begin(first: int, end: int) -> asyncio.Task[list[bytes]]:
            return self._start(lambda: self._prepared(_Bucket.fetch, document, first, end))

        return GridReader(info, document, begin, start=start, stop=stop, piece_bytes=chunk_bytes)

    async def _stat(self, key: str) -> ObjectInfo:
        return info_of(await self._newest(key))

    async def _discard(self, key: str, *, token: str | None) -> None:
        if is_storable(key):
            await self._on(_Bucket.discard, key, token)

    async def _list(self, prefix: str, *, after: str | None, delimiter: str | None) -> AsyncIterator[ObjectInfo]:
        if not is_storable(prefix) or (after is not None and not is_storable(after)):
            return
        lower, inclusive = (after, False) if after is not None and after >= prefix else (prefix, True)
        if (
            delimiter
            and after is not None
            and after.startswith(prefix)
            and _rolled_up(after, prefix, delimiter) == after
        ):
            skip = successor(after)  # it is a common prefix of an earlier page
            if skip is None:
                return
            lower, inclusive = skip, True
        # Of a page that begins with a "directory" only the first name is used: ask for little until files follow.
        room = _FEW if delimiter else _PAGE
        while True:
            async with asyncio.timeout(self.timeouts.operation):
                page, more = await self._on(_Bucket.page, prefix, lower, inclusive, room)
            room = min(4 * room, _PAGE)
            for document in page:
                name = document["filename"]
                rolled = _rolled_up(name, prefix, delimiter) if delimiter else None
                lower, inclusive = name, False
                if rolled is None:
                    yield info_of(document)
                    continue
                yield ObjectInfo(rolled, is_prefix=True)
                skip = successor(rolled)
                if skip is None:
                    return
                lower, inclusive, more, room = skip, True, True, _FEW
                break  # what is left of the page may lie below the common prefix
            if not more:
                return


class _Bucket:
    """The two collections as one event loop uses them."""

    def __init__(self, database: Any, name: str) -> None:
        self.files = collection_of(database, f"{name}.files", JOURNALLED)
        self.chunks = collection_of(database, f"{name}.chunks", JOURNALLED)
        self.ready = False
        self._preparing = asyncio.Lock()

    async def prepare(self, shown: str) -> None:
        """Make the indexes that are missing: those of every GridFS bucket, and ours."""
        async with self._preparing:
            if not self.ready:
                await ensure_indexes(self.files, FILE_INDEXES, f"files of {shown}")
                await ensure_indexes(self.chunks, CHUNK_INDEXES, f"chunks of {shown}")
                self.ready = True

    async def newest(self, key: str) -> dict[str, Any] | None:
        found: dict[str, Any] | None = await self.files.find_one({"filename": key}, sort=[("uploadDate", DESCENDING)])
        return found

    async def fetch(self, document: Mapping[str, Any], first: int, end: int) -> list[bytes]:
        return await fetch(self.files, self.chunks, document, first, end)

    async def page(self, prefix: str, lower: str, inclusive: bool, limit: int) -> tuple[list[dict[str, Any]], bool]:
        """Return the newest documents of the next names in byte order, and whether there may be more."""
        names: dict[str, Any] = {"$gte" if inclusive else "$gt": lower}
        end = successor(prefix)
        if end is not None:
            names["$lt"] = end
        order = [("filename", ASCENDING), ("uploadDate", ASCENDING)]
        found = await self.files.find({"filename": names}).sort(order).limit(limit).batch_size(limit).to_list(None)
        newest = {document["filename"]: document for document in found}  # of several, the last stays
        more = len(found) == limit
        if more:  # newer ones of the last name may be on the next page
            last = found[-1]["filename"]
            document = await self.newest(last)
            if document is not None:
                newest[last] = document
        return list(newest.values()), more

    async def discard(self, key: str, token: str | None) -> None:
        """Take the documents out of sight, then remove chunks and documents: a discard that was broken off in between
        is finished by the next one, and no reader sees a file without its chunks."""
        named: dict[str, Any] = {"filename": key}
        hidden: dict[str, Any] = {"aproxy_discarded.key": key}
        if token is not None:
            named["aproxy_token"] = hidden["aproxy_discarded.token"] = token
        hide = {"aproxy_discarded": {"key": "$filename", "token": "$aproxy_token"}}
        await self.files.update_many(named, [{"$set": hide}, {"$unset": ["filename", "aproxy_token"]}])
        ids = [document["_id"] for document in await self.files.find(hidden, {"_id": True}).to_list(None)]
        if ids:
            await self.chunks.delete_many({"files_id": {"$in": ids}})
        if token is not None:  # and the chunks of a write that never came to its document
            await self.chunks.delete_many({"files_id": of_write(key, token)})
        if ids:
            await self.files.delete_many({"_id": {"$in": ids}})


async def _ready(bucket: _Bucket) -> None:
    """Be a call that does nothing but make the indexes."""


def _rolled_up(name: str, prefix: str, delimiter: str) -> str | None:
    at = name.find(delimiter, len(prefix))
    return None if at < 0 else name[: at + len(delimiter)]
