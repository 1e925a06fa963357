"""Copy files from one storage, or from an original without records, into another storage."""

from __future__ import annotations

import asyncio
import contextlib
import os
from collections.abc import AsyncGenerator, AsyncIterator
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, Literal, NamedTuple
from urllib.parse import urlsplit

from ..backends.base import Backend
from ..content import Source
from ..errors import AlreadyExists, ConfigurationError, ContentError, NotFound, StorageError
from ..proxy import ProxyStorage
from ..records import PENDING, STORED, MetaRecord, ObjectInfo
from .bulk import Result, run_many

__all__ = ["Copied", "copy_files", "why_taken"]


@dataclass(frozen=True, slots=True)
class Copied:
    """What became of one file that did not fail.

    `action`: ``copied``; ``replaced`` (another file was there); ``skipped`` (the same file was there); ``kept``
    (another one was there, and was to be left alone); ``gone`` (deleted from the source meanwhile).
    """

    action: Literal["copied", "replaced", "skipped", "kept", "gone"]
    path: str
    size: int | None = None


async def copy_files(
    source: ProxyStorage | Backend,
    target: ProxyStorage,
    prefix: str = "",
    *,
    after: str | None = None,
    using: str | None = None,
    on_conflict: Literal["fail", "replace", "skip"] = "fail",
    verify: bool = True,
    concurrency: int = 8,
) -> AsyncGenerator[Result[str, Copied], None]:
    """Copy the files whose name in `source` begins with `prefix` into `target`; yield a `Result` for each as it ends.

    A backend needs no records: what it lists is copied under its keys. Names are preserved, below the ``prefix=`` that
    the storages may have. The source is only read. A file that is in the target with the same checksum is skipped, so
    that the same call resumes what was interrupted; without a checksum on the source's side (a backend never has one)
    the bytes of both are compared where their sizes agree, which reads the source, and the target not unless its
    record has no checksum. One that appears in both at once, or fails, is the error of its result; the rest goes on.

    Args:
        after: only names greater than this, in byte order.
        using: the original of the target to use, instead of what its placement says.
        on_conflict: what to do where the target has another file of that name: ``"fail"`` gives AlreadyExists for it,
            ``"replace"`` takes the source's, ``"skip"`` leaves it alone.
        verify: compare what is read with the checksum in the source's record, where there is one.
        concurrency: files in flight.

    Memory: that of `concurrency` saves, and one page of the listing, however many names there are. If the caller stops
    or is cancelled, copies in flight are undone, and what was yielded is stored.

    A directory, bucket or table of the target's that lies inside the source is left out, its SQLite database too.

    Raises (of the whole, not of a file):
        ConfigurationError: the source is an original of the target, to which the files would go once more.
        StorageError: the source cannot be listed.
    """
    if on_conflict not in ("fail", "replace", "skip"):
        raise ValueError(f"on_conflict={on_conflict!r}: one of 'fail', 'replace', 'skip'")
    origin: Any
    if isinstance(source, ProxyStorage):
        origin = _Records(source)
    else:
        origin = _Objects(source, await asyncio.to_thread(_own_keys, source, target, using))
    work = _Copying(origin, target, using, on_conflict, verify)
    with contextlib.suppress(StorageError):  # what a killed run was amid, and whose lease is over, is in our way
        await target.tidy()
    results = run_many(target, origin.list(prefix, after), work.copy, name=origin.name, concurrency=concurrency)
    async with contextlib.aclosing(results):
        async for result in results:
            yield result
    with contextlib.suppress(StorageError):  # the next one does it
        await target.tidy()


class _Records:
    """The files of a storage."""

    def __init__(self, storage: ProxyStorage) -> None:
        self.storage = storage

    def list(self, prefix: str, after: str | None) -> AsyncIterator[MetaRecord]:
        begin = self.storage.prefix
        return self.storage.list(begin + prefix, after=None if after is None else begin + after)

    def name(self, record: MetaRecord) -> str:
        return record.path.removeprefix(self.storage.prefix)

    def known(self, record: MetaRecord) -> tuple[int | None, str | None, str | None]:
        """Return size, checksum and content type, as far as they are known."""
        return record.size, record.checksum, record.content_type

    def open(self, record: MetaRecord, chunk_bytes: int, verify: bool) -> Any:
        return self.storage.open(record, verify=verify and record.checksum is not None)

    async def gone(self, record: MetaRecord) -> bool:
        return not await self.storage.exists(record)


class _Objects:
    """The objects of an original backend, of which nobody has kept records."""

    def __init__(self, backend: Backend, left_out: _LeftOut) -> None:
        self.backend = backend
        self.left_out = left_out

    async def list(self, prefix: str, after: str | None) -> AsyncIterator[ObjectInfo]:
        async for info in self.backend.list(prefix, after=after):
            if not info.key.startswith(self.left_out.below) and info.key not in self.left_out.keys:
                yield info

    def name(self, info: ObjectInfo) -> str:
        return info.key

    def known(self, info: ObjectInfo) -> tuple[int | None, str | None, str | None]:
        return info.size, None, info.content_type

    def open(self, info: ObjectInfo, chunk_bytes: int, verify: bool) -> Any:
        return self.backend.read(info.key, chunk_bytes=chunk_bytes)

    async def gone(self, info: ObjectInfo) -> bool:
        try:
            await self.backend.stat(info.key)
        except NotFound:
            # What is listed, but can be asked for by no name, is not found either: InvalidPath says that.
            self.backend.check_key(info.key)
            return True
        return False


class _Copying:
    def __init__(self, origin: Any, target: ProxyStorage, using: str | None, on_conflict: str, verify: bool) -> None:
        self._origin = origin
        self._target = target
        self._using = using
        self._on_conflict = on_conflict
        self._verify = verify

    async def copy(self, item: Any) -> Copied:
        """Copy one file, if it is not there."""
        name = self._origin.name(item)
        path = self._target.prefix + name
        try:
            present = await self._present(path)
            if present is None:
                try:
                    return Copied("copied", path, await self._store(item, path))
                except AlreadyExists as error:
                    present = await self._present(path)  # somebody, a copy beside this one perhaps, was faster
                    if present is None:
                        raise await why_taken(self._target, path) from error
            return await self._meet(item, path, present)
        except NotFound:
            if await self._origin.gone(item):
                return Copied("gone", path)
            raise

    async def _present(self, path: str) -> MetaRecord | None:
        try:
            return await self._target.get(path)
        except NotFound:
            return None

    async def _meet(self, item: Any, path: str, present: MetaRecord) -> Copied:
        """Compare with the file that the target has already."""
        if await self._is_same(item, present):
            return Copied("skipped", path, present.size)
        if self._on_conflict == "skip":
            return Copied("kept", path, present.size)
        if self._on_conflict == "replace":
            return Copied("replaced", path, await self._replace(item, present))
        raise AlreadyExists(f"{path!r} is there already, with other bytes; on_conflict says what to do", path=path)

    async def _is_same(self, item: Any, present: MetaRecord) -> bool:
        size, checksum, _ = self._origin.known(item)
        if None not in (size, present.size) and size != present.size:
            return False
        if checksum and present.checksum and _algorithm(checksum) == _algorithm(present.checksum):
            return bool(checksum == present.checksum)
        algorithm = _algorithm(present.checksum or checksum or "sha256:")
        theirs = checksum if checksum and _algorithm(checksum) == algorithm else None
        ours = present.checksum if present.checksum and _algorithm(present.checksum) == algorithm else None
        if theirs is None:
            theirs = await self._checksum(self._origin.open(item, self._target.chunk_bytes, False), algorithm)
        if ours is None:
            ours = await self._checksum(self._target.open(present), algorithm)
        return theirs == ours

    async def _checksum(self, opening: Any, algorithm: str) -> str | None:
        async with opening as reader:
            source = Source.of(reader, chunk_bytes=self._target.chunk_bytes, checksum=algorithm)
            async with contextlib.aclosing(source.chunks()) as chunks:
                async for _ in chunks:
                    pass
            return source.checksum

    async def _store(self, item: Any, path: str) -> int | None:
        async with self._reading(item) as (content, options):
            # At exactly this path: another name would be another file the next time.
            record = await self._target.write_to(path, content, exclusive=True, extra=_extra(item), **options)
        return record.size

    async def _replace(self, item: Any, present: MetaRecord) -> int | None:
        async with self._reading(item) as (content, options):
            record = await self._target.replace(present.path, content, expect_version=present.revision, **options)
        return record.size

    @contextlib.asynccontextmanager
    async def _reading(self, item: Any) -> AsyncIterator[tuple[AsyncIterator[bytes], dict[str, Any]]]:
        """Open a file of the source; give its content, and what is known of it as options of a save."""
        size, _, content_type = self._origin.known(item)
        try:
            async with self._origin.open(item, self._target.chunk_bytes, self._verify) as reader:
                info = getattr(reader, "info", None)
                if content_type is None and info is not None:
                    content_type = info.content_type
                if content_type in _GIVEN_TO_EVERYTHING:
                    content_type = None
                if size is None and info is not None:
                    size = info.size
                # Not the file itself, which could seek: what is verified is read once, from its start.
                yield _chunks(reader), {"size": size, "content_type": content_type, "using": self._using}
        except ContentError as error:
            cause = error.__cause__
            if isinstance(cause, StorageError):  # the source's own word is the better reason
                raise cause from cause.__cause__
            raise


async def why_taken(storage: ProxyStorage, path: str) -> AlreadyExists:
    """Return the error for a `path` that has no file of `storage` and cannot be stored at either: who has it, until
    when, and what helps. `aproxy put` gives it too."""
    try:
        record = await storage.meta.get(path)
    except NotFound:
        return AlreadyExists(f"{path!r} was taken, and is free by now; store it again", path=path)
    if record.proxy_storage_name != storage.name:
        other = record.proxy_storage_name
        return AlreadyExists(f"{path!r} is a file of storage {other!r}, which shares the records", path=path)
    if record.state == STORED:
        return AlreadyExists(f"{path!r} was stored by somebody else meanwhile", path=path)
    why = "a save of it is under way, or was killed" if record.state == PENDING else "it is being removed"
    if record.lease is None or record.lease <= datetime.now(UTC):
        return AlreadyExists(f"{path!r} is taken: {why}; reconcile --apply ends that, then store it again", path=path)
    return AlreadyExists(
        f"{path!r} is taken until {record.lease:%Y-%m-%d %H:%M:%S} UTC: {why}. Store it again then; where nothing else"
        " uses the storage, reconcile --apply --force frees it now",
        path=path,
    )


class _LeftOut(NamedTuple):
    """Objects of the source that are the target's: those whose key begins like one of `below`, and `keys`."""

    below: tuple[str, ...] = ()
    keys: tuple[str, ...] = ()


def _own_keys(source: Backend, target: ProxyStorage, using: str | None) -> _LeftOut:
    """Return what of `source` is the target's own.

    Raises:
        ConfigurationError: all are, and its copies would be among them.
    """
    here = _place(source)
    below: list[str] = []
    for name, original in target.originals.items():
        there = _place(original)
        if source is original or (here is not None and here == there):
            if using in (None, name):
                raise ConfigurationError(
                    f"the source is the original {name!r} of the storage {target.name!r}: nothing has to be copied. "
                    "ProxyStorage.adopt (manage.py proxystorage_adopt) gives its files records where they are; "
                    "another original takes copies of them with using="
                )
        elif here is not None and there is not None and there[0] == here[0] and there[1].startswith(here[1]):
            below.append(there[1].removeprefix(here[1]))
    keys: tuple[str, ...] = ()
    if here is not None:
        keys = tuple(file.removeprefix(here[1]) for file in target.meta._local_files() if file.startswith(here[1]))
    return _LeftOut(tuple(below), keys)


def _place(backend: Backend) -> tuple[str, str] | None:
    """Return the service, and what the names of all objects begin with there; None where it cannot be told. Blocks."""
    if (path := backend._local_root()) is not None:
        return "", os.path.join(os.path.realpath(path), "")
    begin = backend.full_path("")
    if begin.startswith(("s3://", "gs://", "az://", "postgresql://", "django://")):
        return _service(backend.endpoint or ""), begin
    return None


def _service(endpoint: str) -> str:
    """Return one name for all spellings of an endpoint; empty for Amazon, where no two buckets have one name."""
    url = urlsplit(endpoint.rstrip("/"))
    host = url.netloc.rpartition("@")[2].lower().removesuffix(":443").removesuffix(":80")
    return "" if host.endswith(".amazonaws.com") else f"{host}{url.path}"


# What services say of objects of which nobody has told them more.
_GIVEN_TO_EVERYTHING = ("application/octet-stream", "binary/octet-stream")


async def _chunks(reader: Any) -> AsyncIterator[bytes]:
    async for chunk in reader:
        yield chunk


def _algorithm(checksum: str) -> str:
    return checksum.partition(":")[0]


def _extra(item: Any) -> Any:
    return item.extra if isinstance(item, MetaRecord) else None
