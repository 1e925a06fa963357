"""Any synchronous Django storage as an original: FileSystemStorage, those of django-storages, your own."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from dataclasses import replace
from typing import Any, Self, TypeVar
from urllib.parse import unquote

from ..content import Source
from ..errors import (
    BackendUnavailable,
    ConfigurationError,
    InvalidPath,
    MissingDependency,
    NotFound,
    StorageError,
    outcome_unknown,
)
from ..futures import over, seen
from ..paths import MAX_PATH_BYTES, check_path, shown
from ..records import ByteRange, Capabilities, ObjectInfo
from ..threads import Workers
from ..timeouts import Timeouts
from ..urls import URL, optional
from . import _django_calls as calls
from ._django_content import Attempt, Held, Pipe
from ._django_errors import map_error
from .base import Backend, Reader

try:
    from django.core import exceptions as django_errors
    from django.core.files.base import File
except ImportError as _error:
    raise MissingDependency.of("django", "django") from _error

__all__ = ["DjangoStorageBackend"]

T = TypeVar("T")

_SMALL = 256 << 10  # bytes of content that is handed over as a whole


class DjangoStorageBackend(Backend):
    """Keeps objects in a Django storage, below a prefix of its names if you like.

    Args:
        storage: an alias of ``STORAGES``, the dotted path of a class, or an instance. An alias or a path is looked up
            on first use.
        prefix: begins every name in the storage, followed by a slash; keys of this backend are without it.
        exclusive: the storage's ``save`` never overwrites, also of two simultaneous ones. By default this is known of
            an instance of ``FileSystemStorage`` alone; of all others a write looks first, and of two simultaneous
            writers of one key both may believe that they have won. With ``ProxyStorage(keys="token")`` no two do.
        max_workers: threads of this backend for writes, and as many for all else. A storage that hangs blocks these
            and nothing else, above all not the one thread in which Django runs thread-sensitive code. 1: one thread for
            everything, for a storage with a single connection (django-storages' FTP); content of more than 256 KiB is
            then kept in a temporary file before the storage is asked, and all calls wait for each other.
        max_segment_bytes: what the storage allows for one part of a name.
        timeouts: ``operation`` limits a call, ``idle`` each step of a read or a write; make that longer for a storage
            which collects the whole content before it sends it.

    Content streams through the storage's thread, a few chunks ahead of it; up to 256 KiB are handed over as a whole. A
    storage that asks for the size of content that does not know it (an iterator, a file object) waits until all of it
    lies in a temporary file. One that has not read the content to its end has failed.

    A storage that shows an unfinished file shows it here too (``FileSystemStorage`` does; `FileSystemBackend` on the
    same directory does not); what a failed write leaves is deleted, what a crash leaves is found by reconcile, which
    knows the key. One that gives the file another name than it was asked for has met another writer: that file is
    deleted again, and AlreadyExists raised. A cancelled write is deleted as soon as the storage's thread comes back.

    Objects carry no token: `discard` removes what lies at the key. Nothing is copied on the server. Ranges are read by
    seeking, for which some storages fetch everything first, and some (django-storages' S3) keep everything in memory
    unless told otherwise. The database connections that a storage opens in these threads are closed as at the end of
    a request.

    Memory: about five chunks a write and two a read, besides what the storage takes; a listing holds the names of one
    directory a level.
    """

    capabilities = Capabilities(range_read=True, list=True, url=True, modified_time=True)

    def __init__(
        self,
        storage: Any,
        *,
        prefix: str = "",
        exclusive: bool | None = None,
        max_workers: int = 8,
        max_segment_bytes: int | None = None,
        timeouts: Timeouts | None = None,
    ) -> None:
        if not isinstance(storage, str) and not callable(getattr(storage, "save", None)):
            raise ConfigurationError(
                f"{type(storage).__name__} is no Django storage; give an alias of STORAGES, a dotted path, an instance"
            )
        self._given = storage
        self._name = storage if isinstance(storage, str) else storage.__class__.__name__
        self.prefix = f"{check_path(prefix.strip('/'))}/" if prefix.strip("/") else ""
        super().__init__(timeouts=timeouts)
        files = not isinstance(storage, str) and _is_file_system(storage)
        if exclusive is None:
            exclusive = files and not getattr(storage, "_allow_overwrite", False)
        self.capabilities = replace(
            self.capabilities,
            conditional_create=exclusive,
            max_key_bytes=MAX_PATH_BYTES - len(self.prefix.encode()),
            max_segment_bytes=255 if files and max_segment_bytes is None else max_segment_bytes,
        )
        self._workers = Workers(f"Django storage {self._name}", max_workers, share=1)
        # Threads of their own, because a write may wait for content that is read from this very storage; but `_keep`.
        self._writers = (
            self._workers if max_workers == 1 else Workers(f"Django storage {self._name}, writes", max_workers, share=1)
        )
        self._storage: Any = None

    @classmethod
    def from_url(cls, url: str) -> Self:
        """Make one of ``django://alias`` or ``django://alias/prefix``, or of a dotted path in place of the alias.

        The parameters are arguments of the class.

        Raises:
            ConfigurationError: the URL cannot be understood.
        """
        parsed = URL.parse(url)
        # As it is written: a host is in small letters, an alias need not be.
        name, _, prefix = url.partition("://")[2].partition("?")[0].partition("/")
        if not name or "@" in name or ":" in name or "#" in url:
            raise ConfigurationError(f"{parsed} names no storage: django://alias/prefix")
        options = parsed.options(timeouts=True, max_workers=int, max_segment_bytes=optional(int))
        return cls(unquote(name), prefix=unquote(prefix), **options)

    def __str__(self) -> str:
        return f"{type(self).__name__}({self._name + '/' + self.prefix.rstrip('/') if self.prefix else self._name!r})"

    def full_path(self, key: str) -> str:
        storage = self._storage if isinstance(self._given, str) else self._given  # an alias is not looked up for this
        if storage is not None:
            with contextlib.suppress(Exception):  # no file of this machine, or no settings
                return str(storage.path(self.prefix + key))
        below = str(getattr(storage, "location", "") or "").strip("/")
        return f"django://{self._name}/{below + '/' if below else ''}{self.prefix}{key}"

    def _local_root(self) -> str | None:
        with contextlib.suppress(Exception):  # no such alias, or no settings
            self._resolved()
        return super()._local_root()

    # -- the storage, and calls of it in its threads

    def _resolved(self) -> Any:
        if self._storage is None:
            self._storage = _resolve(self._given) if isinstance(self._given, str) else self._given
        return self._storage

    def _call_storage(
        self, function: Callable[..., T], *args: Any, timeout: float | None, what: str, writes: bool = False
    ) -> asyncio.Future[T]:
        def work() -> T:
            try:
                return function(self._resolved(), *args)
            except Exception as error:
                raise self._mapped(error, what) from error
            finally:
                _close_old_connections()

        return (self._writers if writes else self._workers).call(work, timeout=timeout)

    def _mapped(self, error: Exception, what: str) -> StorageError:
        return error if isinstance(error, StorageError) else self._map_error(error, what)

    def _map_error(self, error: Exception, what: str) -> StorageError:
        return map_error(error, what) or super()._map_error(error, what)

    # -- writing

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
        try:
            if source.data is not None:
                await source.measure()
                await self._save(key, Held(source.data), content_type, durable)
            else:
                await self._stream(key, source, content_type, durable)
        except asyncio.CancelledError as error:
            if not hasattr(error, "outcome_unknown"):  # the storage was not asked yet
                error.outcome_unknown = False  # type: ignore[attr-defined]
            raise
        return ObjectInfo(key, size=source.seen_size)

    async def _stream(self, key: str, source: Source, content_type: str | None, durable: bool) -> None:
        async with contextlib.aclosing(source.chunks()) as chunks:
            head: list[bytes] = []
            count = 0
            async for chunk in chunks:
                head.append(chunk)
                count += len(chunk)
                if count > _SMALL:
                    break
            else:
                await self._save(key, Held(b"".join(head)), content_type, durable)
                return
            pipe = Pipe(source.size, source.path)

            async def feed() -> None:
                while head:
                    await pipe.put(head.pop(0))
                async for chunk in chunks:
                    await pipe.put(chunk)
                pipe.end()

            try:
                if self._writers is self._workers:
                    await self._keep(pipe, head, chunks)
                    await self._save(key, pipe, content_type, durable)
                else:
                    await self._save(key, pipe, content_type, durable, feed)
            finally:
                pipe.fail()  # whoever still reads, a thread of the storage's own, is let go

    async def _keep(self, pipe: Pipe, head: list[bytes], chunks: AsyncIterator[bytes]) -> None:
        """Keep the content before the storage is asked: its only thread must not wait for content, which may have to
        be read from this very storage."""
        try:
            while head:
                await self._workers.call(pipe.keep, head.pop(0), timeout=self.timeouts.idle)
            async for chunk in chunks:
                await self._workers.call(pipe.keep, chunk, timeout=self.timeouts.idle)
            await self._workers.call(pipe.keep_no_more, timeout=self.timeouts.idle)
        except BaseException:
            with contextlib.suppress(BackendUnavailable):
                self._workers.submit(pipe.release)  # after what it still does
            raise

    async def _save(
        self,
        key: str,
        content: Held | Pipe,
        content_type: str | None,
        durable: bool,
        feed: Callable[[], Any] | None = None,
    ) -> None:
        """Have the storage save `content`, which `feed` feeds; leave nothing where that fails or is cancelled."""
        attempt = Attempt()
        saving = self._call_storage(
            calls.save,
            self.prefix + key,
            content,
            _Handed(content, self.prefix + key, content_type),
            attempt,
            durable,
            self.capabilities.conditional_create,
            timeout=None,
            what=f"write {key!r} in {self}",
            writes=True,
        )
        saving.add_done_callback(seen)
        try:
            if feed is None:
                await over(saving)
            else:
                await self._feed(feed, saving)
        except BaseException as error:
            ended = attempt.withdraw()
            if isinstance(content, Pipe):
                content.fail()
            await self._take_back(key, saving, ended, error)
            raise
        saving.result()

    async def _feed(self, feed: Callable[[], Any], saving: asyncio.Future[None]) -> None:
        """Feed the content until it ends, or until the storage has failed; then wait for the storage.

        A save that has succeeded has seen the end of the content (`Pipe.finish`), so the only early signal is that of a
        failure. Two orders are possible. The content ends first: `feed` returns, and the outcome is waited for. The
        storage fails first, a full disk say, while `feed` waits for the caller's next chunk or for room: `stop` cancels
        this task to wake it up, and takes that back, because it is no cancellation of the caller's; a second one that
        came from outside meanwhile stays. `stop` may have been called for already when the content ends in the same
        turn of the loop, so it looks whether there is still something to stop.
        """
        feeding = asyncio.current_task()
        assert feeding is not None
        stopped = fed = False

        def stop(_: Any) -> None:
            nonlocal stopped
            if not fed and (saving.cancelled() or saving.exception() is not None):
                stopped = True
                feeding.cancel()

        saving.add_done_callback(stop)
        try:
            await feed()
        except asyncio.CancelledError:
            if not stopped or feeding.uncancel() > 0:
                raise
            return
        finally:
            fed = True
            saving.remove_done_callback(stop)
        if stopped:
            feeding.uncancel()
        await over(saving)

    async def _take_back(self, key: str, saving: asyncio.Future[None], withdrawn: bool, error: BaseException) -> None:
        """Wait a little until the storage's thread has ended and removed what it made."""
        certain = False

        async def wait() -> None:
            nonlocal certain
            await over(saving)
            if not withdrawn:
                await self._discard(key, token=None)
            failure = None if saving.cancelled() else saving.exception()
            certain = failure is None or not outcome_unknown(failure)

        try:
            await self.cleanup.finish(wait(), within=self.timeouts.cleanup, name=f"undo of a write of {key!r}")
        except asyncio.CancelledError as second:
            error = second
            raise
        finally:
            if isinstance(error, asyncio.CancelledError | StorageError):
                error.outcome_unknown = not certain  # type: ignore[union-attr]

    # -- reading

    def _asked(self, key: str, operation: str) -> str:
        """Return the name in the storage of an object that may be there.

        Raises:
            NotFound: there can be no object of that name.
        """
        try:
            self.check_key(key)
        except InvalidPath as error:
            raise NotFound(f"could not {operation} {shown(key)} in {self}: there can be no such object") from error
        return self.prefix + key

    async def _read(self, key: str, byte_range: ByteRange | None, chunk_bytes: int) -> Reader:
        name = self._asked(key, "read")
        opened = calls.Opened(name, byte_range or ByteRange(), chunk_bytes)
        what = f"read {key!r} in {self}"
        try:
            size, data, whole = await self._call_storage(opened.first, timeout=self.timeouts.idle, what=what)
        except BaseException:
            opened.give_up(self._workers)
            raise
        info = ObjectInfo(key, size=size)
        if whole:
            opened.give_up(self._workers)
            return Reader(info, data=data)
        return _OpenedReader(info, self, opened, data, what)

    async def _stat(self, key: str) -> ObjectInfo:
        name = self._asked(key, "look up")
        size, moment = await self._call_storage(
            calls.stat, name, timeout=self.timeouts.operation, what=f"look up {key!r} in {self}"
        )
        return ObjectInfo(key, size=size, modified_at=moment)

    async def _is_taken(self, key: str) -> bool:
        """Besides what `stat` sees, ask the storage as before a write: a directory is no file, but has the name."""
        if await super()._is_taken(key):
            return True
        try:
            name = self._asked(key, "look up")
        except NotFound:
            return False
        return await self._call_storage(
            calls.exists, name, timeout=self.timeouts.operation, what=f"look up {key!r} in {self}"
        )

    async def _discard(self, key: str, *, token: str | None) -> None:
        try:
            name = self._asked(key, "discard")
        except NotFound:
            return
        await self._call_storage(calls.delete, name, timeout=self.timeouts.operation, what=f"discard {key!r} in {self}")

    async def _url(self, key: str, *, expires_in: float | None, **options: Any) -> str:
        name = self._asked(key, "give the URL of")
        return await self._call_storage(
            calls.url,
            name,
            expires_in,
            options,
            timeout=self.timeouts.operation,
            what=f"give the URL of {key!r} in {self}",
        )

    # -- listing

    async def _list(self, prefix: str, *, after: str | None, delimiter: str | None) -> AsyncIterator[ObjectInfo]:
        last = after
        async for key in self._walk(prefix, after, roll_up=delimiter == "/"):
            if delimiter == "/":
                yield ObjectInfo(key, is_prefix=key.endswith("/"))
                continue
            at = key.find(delimiter, len(prefix)) if delimiter else -1
            if at < 0:
                yield ObjectInfo(key)
            elif (rolled := key[: at + len(delimiter or "")]) != last:
                last = rolled
                yield ObjectInfo(rolled, is_prefix=True)

    async def _walk(self, prefix: str, after: str | None, *, roll_up: bool) -> AsyncIterator[str]:
        """Yield keys in byte order, one directory after the other; with `roll_up` the directories of one."""
        base = prefix[: prefix.rfind("/") + 1]
        if any(part in ("", ".", "..") for part in base.split("/")[:-1]):
            return
        levels = [iter(await self._directory(base))]
        while levels:
            key = next(levels[-1], "")
            if not key:
                levels.pop()
            elif not key.startswith(prefix):
                continue
            elif key[-1] != "/":
                if after is None or key > after:
                    yield key
            elif after is not None and key <= after and not after.startswith(key):
                continue
            elif not roll_up:
                levels.append(iter(await self._directory(key)))
            elif after != key:
                # A directory without files is none; one that `after` lies in may hold nothing more.
                async with contextlib.aclosing(self._walk(key, after, roll_up=False)) as inside:  # type: ignore[type-var]
                    async for _ in inside:
                        yield key
                        break

    async def _directory(self, base: str) -> list[str]:
        directories, files = await self._call_storage(
            calls.listdir,
            (self.prefix + base).rstrip("/"),
            timeout=self.timeouts.operation,
            what=f"list {base!r} in {self}",
        )
        return sorted([*(base + name.strip("/") + "/" for name in directories), *(base + name for name in files)])


class _OpenedReader(Reader):
    """Chunks of a file of the storage, one call of its threads for each."""

    def __init__(
        self, info: ObjectInfo, backend: DjangoStorageBackend, opened: calls.Opened, data: bytes, what: str
    ) -> None:
        super().__init__(info)
        self._backend = backend
        self._opened: calls.Opened | None = opened
        self._first = data
        self.data = None
        self._what = what

    async def __anext__(self) -> bytes:
        data, self._first = self._first, b""
        if not data and self._opened is not None:
            backend = self._backend
            data = await backend._call_storage(self._opened.next, timeout=backend.timeouts.idle, what=self._what)
        if not data:
            raise StopAsyncIteration
        return data

    async def aclose(self) -> None:
        opened, self._opened = self._opened, None
        if opened is not None:
            opened.give_up(self._backend._workers)


# -- Django


class _Handed(File):  # type: ignore[misc]  # Django is untyped
    """The content of a write as Django's contract has it: what is not said here is asked of ``file``, the size too."""

    file: Held | Pipe

    def __init__(self, content: Held | Pipe, name: str, content_type: str | None) -> None:
        super().__init__(content, name)
        if content_type is not None:  # storages guess it where there is none
            self.content_type = content_type

    def open(self, mode: str | None = None, *args: Any, **kwargs: Any) -> Self:
        """Begin at the start; Django's own would open a file of this machine that has the same name."""
        self.seek(0)
        return self

    def close(self) -> None:
        """Nothing: it is closed by whoever has made it."""

    def multiple_chunks(self, chunk_size: int | None = None) -> bool:
        return isinstance(self.file, Pipe)

    def chunks(self, chunk_size: int | None = None) -> Iterator[bytes]:
        return self.file.chunks()


def _resolve(given: str) -> Any:
    """Return the storage of an alias, or an instance of the class that a dotted path names."""
    from django.core.files.storage import InvalidStorageError, storages
    from django.utils.module_loading import import_string

    try:
        if "." in given:
            return import_string(given)()
        return storages[given]
    except InvalidStorageError as error:
        raise ConfigurationError(f"STORAGES has no usable storage {given!r}; see the cause") from error
    except (django_errors.ImproperlyConfigured, django_errors.AppRegistryNotReady) as error:
        raise ConfigurationError(f"Django or the storage {given!r} is not configured; see the cause") from error
    except (ImportError, TypeError) as error:
        module = f" ({error.name})" if isinstance(error, ImportError) and error.name else ""
        raise ConfigurationError(f"the storage {given!r} cannot be made: {type(error).__name__}{module}") from error


def _is_file_system(storage: Any) -> bool:
    from django.core.files.storage import FileSystemStorage

    # Its type is another than its class where Django's lazy objects, such as default_storage, stand before it.
    return isinstance(storage, FileSystemStorage) and storage.__class__._save is FileSystemStorage._save


def _close_old_connections() -> None:
    """As at the end of a request: what a storage has opened in this thread and Django's settings do not keep."""
    from django.conf import settings
    from django.db import connections

    if not settings.configured:
        return
    for connection in connections.all(initialized_only=True):
        connection.close_if_unusable_or_obsolete()
