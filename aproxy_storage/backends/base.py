"""The contract of an original backend, and everything that all of them share.

To write a backend, subclass `Backend`, set `capabilities`, implement the hooks ``_write _read _stat _discard`` and
those of ``_list _copy _url _upload_form`` that the capabilities promise, and hold it to
``aproxy_storage.testing.backends.BackendTests``. The public methods check the key, apply the deadline, map native
errors and say where they happened, once, here.
"""

from __future__ import annotations

import abc
import asyncio
import logging
from collections.abc import AsyncIterator, Awaitable, Mapping
from types import TracebackType
from typing import Any, ClassVar, Self, TypeVar

from ..blocking import came_from_outside
from ..cleanup import Cleanup
from ..content import Source, Taken
from ..errors import (
    BackendUnavailable,
    ConfigurationError,
    DeadlineExceeded,
    NotFound,
    NotSupported,
    StorageError,
    from_os_error,
)
from ..paths import check_path, local_path
from ..records import ByteRange, Capabilities, ObjectInfo, UploadForm
from ..timeouts import Alarm, Timeouts

__all__ = ["DEFAULT_CHUNK_BYTES", "Backend", "Reader", "Reading"]

_log = logging.getLogger(__name__)

T = TypeVar("T")

DEFAULT_CHUNK_BYTES = 1 << 20


class Reader:
    """The bytes of one object, or of a range of it, in chunks: an async iterator that knows its `info`.

    `info.size` is the size of the whole object, whatever the range. A backend subclasses it or passes an iterator.
    """

    def __init__(self, info: ObjectInfo, chunks: AsyncIterator[bytes] | None = None, *, data: bytes = b"") -> None:
        self.info = info
        self.data: bytes | None = None if chunks is not None else data  # the whole answer, where it is at hand
        self._chunks = chunks

    def __aiter__(self) -> AsyncIterator[bytes]:
        return self

    async def __anext__(self) -> bytes:
        if self._chunks is not None:
            return await anext(self._chunks)
        return self.take()

    def take(self) -> bytes:
        """Return the answer that is at hand, as the only chunk."""
        data, self.data = self.data, b""
        if not data:
            raise StopAsyncIteration
        return data

    async def aclose(self) -> None:
        """Release what the reader holds; idempotent."""
        close = getattr(self._chunks, "aclose", None)
        if close is not None:
            await close()


class Backend(abc.ABC):
    """Keeps bytes under keys.

    Objects are module-level constants: constructors only store, everything bound to a loop or a process is made on
    first use and may be made again after `aclose` or a fork. Every method may be called from any event loop.
    """

    capabilities: Capabilities
    #: The address of the service, where one is given: in two services the same `full_path` names two objects.
    endpoint: str | None = None
    #: True where every hook keeps its own deadlines, because a timer per call would cost more than the call.
    keeps_deadlines: ClassVar[bool] = False
    #: True where all that waits is done by `Workers`, so that a thread that may block can do it (see `blocking`). Each
    #: class says it for itself: a subclass may await what needs a loop.
    works_here: ClassVar[bool] = False

    def __init__(self, *, timeouts: Timeouts | None = None) -> None:
        self.timeouts = timeouts or Timeouts()
        self.cleanup = Cleanup(self)

    def __str__(self) -> str:
        return type(self).__name__

    @classmethod
    def from_url(cls, url: str) -> Self:
        """Make a backend of a URL, as configuration files hold it. Opens and connects nothing; see `urls`.

        Raises:
            ConfigurationError: this class has no URL form, or the URL is wrong. The message holds no secret of it.
        """
        raise ConfigurationError(f"{cls.__name__} has no URL form; make it in Python")

    # -- the contract

    async def write(
        self,
        key: str,
        source: Any,
        *,
        size: int | None = None,
        content_type: str | None = None,
        metadata: Mapping[str, str] | None = None,
        token: str | None = None,
        durable: bool = False,
    ) -> ObjectInfo:
        """Create the object `key` from `source` (a `Source`, or anything `Source.of` takes).

        All or nothing: after an error, a cancellation or a crash nothing is visible at the key, and a truncated
        source never becomes an object. `token` names this write: it is kept with the object where
        ``capabilities.tokens``, and names what a broken write leaves, so that `discard` finds it.
        A `Source` whose `taken` is set afterwards keeps its temporary file until that is released; content of another
        kind has given it up.
        `durable`: the object survives a power failure from the moment of the return on.

        Returns:
            What is known of the new object, the size at least.

        Raises:
            AlreadyExists: the key is taken; the object there is untouched.
            ContentError: the source failed, was shorter or longer than `size`; nothing is stored.
            InvalidPath, AccessDenied, OutOfSpace, BackendUnavailable, DeadlineExceeded.

        After an error or a cancellation whose ``outcome_unknown`` (see `errors.outcome_unknown`) is true the object
        may still appear.
        """
        self.check_key(key)
        prepared = source if isinstance(source, Source) else Source.of(source, size=size)
        work = self._write(
            key, prepared, content_type=content_type, metadata=metadata or {}, token=token, durable=durable
        )
        try:
            info = await self._call("write", key, work if self.keeps_deadlines else self._watched(prepared, work), None)
            if prepared is not source and prepared.taken is not None:
                await self._release(prepared.taken)
            return info
        finally:
            if prepared is not source:
                await prepared.aclose()

    async def _release(self, taken: Taken) -> None:
        try:
            await self.cleanup.finish(taken.release(), within=self.timeouts.cleanup, name="release of an upload")
        except asyncio.CancelledError as error:
            error.outcome_unknown = True  # type: ignore[attr-defined]
            raise

    def read(self, key: str, *, byte_range: ByteRange | None = None, chunk_bytes: int = DEFAULT_CHUNK_BYTES) -> Reading:
        """Return an async context manager that gives a `Reader` of the object's bytes.

        Bounded memory, one round trip where the service allows it, pinned to one version of the object: if that
        vanishes or changes under the reader, ``Conflict`` is raised, never a mixture returned.

        Raises (on entering):
            NotFound, AccessDenied, BackendUnavailable, DeadlineExceeded.
        """
        if chunk_bytes < 1:
            raise ValueError("chunk_bytes must be positive")
        return Reading(self, key, byte_range, chunk_bytes)

    async def stat(self, key: str) -> ObjectInfo:
        """Return what the service knows of the object.

        Raises:
            NotFound: there is none. AccessDenied, BackendUnavailable, DeadlineExceeded.
        """
        return await self._call("stat", key, self._stat(key), self.timeouts.operation)

    async def is_taken(self, key: str) -> bool:
        """Return whether a write would find `key` taken: by an object, or by whatever else the service keeps there.

        For content that can be read only once: by the time that `write` says so it may be spent. No promise for later.

        Raises:
            AccessDenied, BackendUnavailable, DeadlineExceeded.
        """
        return await self._call("is_taken", key, self._is_taken(key), self.timeouts.operation)

    async def discard(self, key: str, *, token: str | None = None, durable: bool = False) -> None:
        """Remove the object and whatever a broken write of it left; idempotent.

        With `token`, only what that write may have left: an object known to carry another token, or none where
        the service could have kept one, stays. Names that could never have been written are silently gone already.
        `durable`: the object does not come back after a power failure from the moment of the return on.

        Raises:
            AccessDenied, BackendUnavailable, DeadlineExceeded.
        """
        await self._call("discard", key, self._discard(key, token=token), self.timeouts.operation)
        if durable:
            await self._call("discard", key, self._sync_discard(key), self.timeouts.operation)

    def list(
        self, prefix: str = "", *, after: str | None = None, delimiter: str | None = None
    ) -> AsyncIterator[ObjectInfo]:
        """Iterate over the objects whose key begins with `prefix` and is greater than `after`, in byte order.

        With a `delimiter`, keys with that text after the prefix are rolled up into one entry with `is_prefix`.
        Memory is bounded by one directory or page.

        Raises:
            NotSupported: see ``capabilities.list``. BackendUnavailable, DeadlineExceeded.
        """
        self._need(self.capabilities.list, "list")
        return self._mapped_iterator("list", prefix, self._list(prefix, after=after, delimiter=delimiter))

    async def copy(
        self,
        key: str,
        new_key: str,
        *,
        token: str | None = None,
        durable: bool = False,
        content_type: str | None = None,
    ) -> ObjectInfo:
        """Copy an object on the server, with the promises of `write`.

        The copy has the content type of the original, or `content_type`, which only backends with
        ``capabilities.upload_form`` have to take.

        Raises:
            NotSupported: see ``capabilities.server_copy``. NotFound, AlreadyExists, and as `write`.
        """
        self._need(self.capabilities.server_copy, "copy")
        self.check_key(new_key)
        options: dict[str, Any] = {} if content_type is None else {"content_type": content_type}
        return await self._call("copy", key, self._copy(key, new_key, token=token, durable=durable, **options), None)

    async def url(self, key: str, *, expires_in: float | None = None, **options: Any) -> str:
        """Return a public URL, or a signed one valid for `expires_in` seconds.

        Raises:
            NotSupported: see ``capabilities.url``.
        """
        self._need(self.capabilities.url, "url")
        return await self._call("url", key, self._url(key, expires_in=expires_in, **options), self.timeouts.operation)

    async def upload_form(
        self, key: str, *, token: str, expires_in: float, max_bytes: int, content_type: str | None = None
    ) -> UploadForm:
        """Return a form with which a browser can create the object `key`, once or again, for `expires_in` seconds.

        The service refuses more than `max_bytes` bytes, and another content type than `content_type` where that is
        given. `token` is kept with the object as with `write`. An object that is there already is overwritten.

        Raises:
            NotSupported: see ``capabilities.upload_form``. InvalidPath.
        """
        self._need(self.capabilities.upload_form, "make an upload form")
        self.check_key(key)
        work = self._upload_form(
            key, token=token, expires_in=expires_in, max_bytes=max_bytes, content_type=content_type
        )
        return await self._call("upload_form", key, work, self.timeouts.operation)

    def full_path(self, key: str) -> str:
        """Return the name a human would use, e.g. ``/srv/media/om.png`` or ``s3://bucket/om.png``."""
        return key

    def _local_root(self) -> str | None:
        """Return the directory of this machine that all objects are in; None where there is none. May block."""
        return local_path(self.full_path(""))

    async def aclose(self) -> None:
        """Release what the running loop holds; idempotent. The backend can be used again afterwards."""
        await self.cleanup.drain(within=self.timeouts.cleanup)
        await self._aclose()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.aclose()

    def check_key(self, key: str) -> None:
        """Raise InvalidPath unless a new object may be named `key`; before any I/O."""
        capabilities = self.capabilities
        check_path(key, max_bytes=capabilities.max_key_bytes, max_segment_bytes=capabilities.max_segment_bytes)

    # -- the hooks

    @abc.abstractmethod
    async def _write(
        self,
        key: str,
        source: Source,
        *,
        content_type: str | None,
        metadata: Mapping[str, str],
        token: str | None,
        durable: bool,
    ) -> ObjectInfo: ...

    @abc.abstractmethod
    async def _read(self, key: str, byte_range: ByteRange | None, chunk_bytes: int) -> Reader: ...

    @abc.abstractmethod
    async def _stat(self, key: str) -> ObjectInfo: ...

    @abc.abstractmethod
    async def _discard(self, key: str, *, token: str | None) -> None: ...

    async def _is_taken(self, key: str) -> bool:
        """Return whether `key` is taken. To be overridden where what is no object is in the way of one too."""
        try:
            await self.stat(key)
        except NotFound:
            return False
        return True

    async def _sync_discard(self, key: str) -> None:
        """Make the discard of `key` survive a power failure, where its answer alone does not promise that."""

    def _list(self, prefix: str, *, after: str | None, delimiter: str | None) -> AsyncIterator[ObjectInfo]:
        raise NotImplementedError

    async def _copy(self, key: str, new_key: str, *, token: str | None, durable: bool) -> ObjectInfo:
        raise NotImplementedError

    async def _url(self, key: str, *, expires_in: float | None, **options: Any) -> str:
        raise NotImplementedError

    async def _upload_form(
        self, key: str, *, token: str, expires_in: float, max_bytes: int, content_type: str | None
    ) -> UploadForm:
        raise NotImplementedError

    async def _aclose(self) -> None:
        pass

    def _map_error(self, error: Exception, what: str) -> StorageError:
        """Return our error for a native one. Extend it with the driver's; fall back to this."""
        if isinstance(error, TimeoutError):
            return DeadlineExceeded(f"could not {what} in time", outcome_unknown=True)
        if isinstance(error, OSError):
            return from_os_error(error, what)
        return BackendUnavailable(
            f"could not {what}: unexpected {type(error).__name__}", retryable=False, outcome_unknown=True
        )

    # -- what the public methods share

    async def _watched(self, source: Source, work: Awaitable[T]) -> T:
        async with source.watched(self.timeouts.idle):
            return await work

    async def _call(self, operation: str, key: str, work: Awaitable[T], seconds: float | None) -> T:
        try:
            if seconds is None or self.keeps_deadlines:
                return await work
            with Alarm(seconds):
                return await work
        except StorageError as error:
            error.located(operation=operation, path=key, backend=str(self))
            raise
        except Exception as error:
            if came_from_outside(error):
                raise
            raise self._located(error, operation, key) from error

    def _located(self, error: Exception, operation: str, key: str) -> StorageError:
        mapped = error if isinstance(error, StorageError) else self._map_error(error, f"{operation} {key!r} in {self}")
        return mapped.located(operation=operation, path=key, backend=str(self))

    async def _mapped_iterator(self, operation: str, key: str, items: AsyncIterator[T]) -> AsyncIterator[T]:
        try:
            async for item in items:
                yield item
        except StorageError as error:
            error.located(operation=operation, path=key, backend=str(self))
            raise
        except Exception as error:
            raise self._located(error, operation, key) from error

    def _need(self, capability: bool, operation: str) -> None:
        if not capability:
            raise NotSupported(f"{self} cannot {operation}", operation=operation, backend=str(self))


class Reading:
    """What `Backend.read` returns: opens on entering, maps errors and keeps the idle limit while iterating."""

    __slots__ = ("_backend", "_byte_range", "_chunk_bytes", "_key", "_reader", "data", "info")

    info: ObjectInfo

    def __init__(self, backend: Backend, key: str, byte_range: ByteRange | None, chunk_bytes: int) -> None:
        self._backend = backend
        self._key = key
        self._byte_range = byte_range
        self._chunk_bytes = chunk_bytes
        self._reader: Reader | None = None

    async def __aenter__(self) -> Self:
        backend = self._backend
        self._reader = await backend._call(
            "read", self._key, backend._read(self._key, self._byte_range, self._chunk_bytes), backend.timeouts.idle
        )
        self.info = self._reader.info
        self.data: bytes | None = self._reader.data
        return self

    async def __aexit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        reader, self._reader = self._reader, None
        if reader is not None:
            await reader.aclose()

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> bytes:
        reader = self._reader
        if reader is None:
            raise StopAsyncIteration
        if reader.data is not None:
            return reader.take()
        backend = self._backend
        try:
            if backend.keeps_deadlines:
                return await anext(reader)
            with Alarm(backend.timeouts.idle):
                return await anext(reader)
        except StopAsyncIteration:
            raise
        except Exception as error:
            mapped = backend._located(error, "read", self._key)
            if mapped is error:
                raise
            raise mapped from error
