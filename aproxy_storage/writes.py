"""What is written: a caller's content, or the bytes of a stored file. Each can be put anywhere, more than once."""

from __future__ import annotations

import abc
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .backends.base import Backend
from .content import Source
from .errors import Conflict, ContentError, IntegrityError, NotFound, StorageError
from .feeds import AsyncFeed
from .records import MetaRecord, Place
from .sniffing import guess_content_type

if TYPE_CHECKING:
    from .proxy import ProxyStorage

__all__ = ["Content", "Transfer", "Write", "Written"]


@dataclass(frozen=True, slots=True)
class Written:
    """What is known of content that has been written."""

    size: int | None
    checksum: str | None
    content_type: str | None

    def fields(self) -> dict[str, Any]:
        return {"size": self.size, "checksum": self.checksum, "content_type": self.content_type}


class Write(abc.ABC):
    """Puts one content at any key of any original, as often as it is asked to.

    `source` is what is read. `failure`: why it could not be, where it is another original that failed, and not the
    one that was written to.
    """

    source: Source
    failure: StorageError | None = None

    @abc.abstractmethod
    async def put(
        self, backend: Backend, key: str, token: str, *, source: Source | None = None, movable: bool = True
    ) -> Written:
        """Write the content at `key`.

        Args:
            source: the same content once more, for writes that run side by side.
            movable: a temporary file may be moved; false where a later attempt may need it.
        """

    @abc.abstractmethod
    async def written(self) -> Written:
        """Return what is known after a whole pass over `source`."""

    async def hold(self, limit: int) -> bytes | None:
        """Return the content, held in memory, where it is known to have at most `limit` bytes."""
        source = self.source
        if source.data is None:
            if source.size is None or source.size > limit:
                return None
            source.data = b"".join([chunk async for chunk in source.chunks()])
        await source.measure()
        return source.data if len(source.data) <= limit else None

    @abc.abstractmethod
    async def content_type(self) -> str | None:
        """Return the content type; to be asked for before the first pass begins."""

    async def aclose(self) -> None:
        """Release what the content holds, where that is ours."""
        return


class Content(Write):
    """What the caller of `save` or `replace` has handed over. Whoever made the source closes it."""

    def __init__(self, source: Source, name: str, content_type: str | None, *, durable: bool) -> None:
        self.source = source
        self._name = name
        self._type = content_type
        self._guessed = content_type is not None
        self._durable = durable
        self._temporary = source.temporary_path

    async def content_type(self) -> str | None:
        if not self._guessed:
            source = self.source
            head = source.data[:4096] if source.data is not None else await source.peek()
            self._guessed = True
            self._type = guess_content_type(self._name, head, source.content_type)
        return self._type

    async def put(
        self, backend: Backend, key: str, token: str, *, source: Source | None = None, movable: bool = True
    ) -> Written:
        kind = await self.content_type()
        if source is not None:  # one of several side by side: who has started them asks for `written`
            await backend.write(key, source, content_type=kind, token=token, durable=self._durable)
            return Written(source.seen_size, None, kind)
        source = self.source
        if self._temporary is not None:
            source.temporary_path = self._temporary if movable else None
            source.path = None if movable else Path(self._temporary)
        await backend.write(key, source, content_type=kind, token=token, durable=self._durable)
        return Written(self.source.seen_size, self.source.checksum, kind)

    async def written(self) -> Written:
        return Written(self.source.seen_size, self.source.checksum, self._type)


class Transfer(Write):
    """The bytes of a stored file, for `copy`, `move` and `reconcile`; copied on the server where that can be.

    Args:
        places: where to read them from; by default wherever the record has good ones.
    """

    def __init__(self, storage: ProxyStorage, record: MetaRecord, places: tuple[Place, ...] | None = None) -> None:
        self._storage = storage
        self._record = record
        self._places = record.good_places() if places is None else places
        algorithm = record.checksum.partition(":")[0] if record.checksum else storage.checksum
        self.source = Source(algorithm, storage.chunk_bytes, None)
        self.source.size = record.size
        self.source.begin = lambda limit, ahead: AsyncFeed(self._chunks, limit, None)

    async def content_type(self) -> str | None:
        return self._record.content_type

    async def _chunks(self) -> AsyncIterator[bytes]:
        """Read the bytes; whatever fails here is the fault of where they are, not of where they go."""
        record = self._record
        try:
            opened = await self._storage.open_bytes(record, self._places, slots=False)
            async with opened as reading:
                size = reading.info.size
                if None not in (size, record.size) and size != record.size:
                    raise IntegrityError(f"{record.path!r} has {size} bytes in {opened.backend}", path=record.path)
                count = 0
                async for chunk in reading:
                    count += len(chunk)
                    yield chunk
                if size is not None and count != size:
                    raise IntegrityError(f"only {count} of {size} bytes of {record.path!r} came", path=record.path)
        except StorageError as error:
            self.failure = error
            raise

    async def put(
        self, backend: Backend, key: str, token: str, *, source: Source | None = None, movable: bool = True
    ) -> Written:
        record = self._record
        storage = self._storage
        try:
            if source is None and (place := self._on_the_server(backend)) is not None:
                info = await backend.copy(place.key, key, token=token, durable=storage.durable)
                return await self._checked(info.size, record.checksum)
            kind = record.content_type
            await backend.write(key, source or self.source, content_type=kind, token=token, durable=storage.durable)
        except NotFound as error:
            raise await self._gone(error) from error
        except ContentError as error:
            if self.failure is None:
                raise
            raise await self.why(error) from error
        # One of several that run side by side does not know the checksum: who started them asks for `written`.
        return await self.written() if source is None else Written(None, None, kind)

    async def why(self, error: ContentError) -> StorageError:
        """Return what the failure of the content is really: one of the original that has it, or of the record."""
        failure = self.failure
        if isinstance(failure, NotFound):
            return await self._gone(failure)
        if failure is None:
            return error
        if isinstance(failure, IntegrityError):
            await self._check_unmoved()
        return failure

    async def _gone(self, error: NotFound) -> StorageError:
        await self._check_unmoved()
        self.failure = IntegrityError(f"the bytes of {self._record.path!r} are gone", path=self._record.path)
        return self.failure

    def _on_the_server(self, backend: Backend) -> Place | None:
        if not backend.capabilities.server_copy:
            return None
        originals = self._storage.originals
        first = next(iter(originals))
        return next((place for place in self._places if originals.get(place.original or first) is backend), None)

    async def written(self) -> Written:
        return await self._checked(self.source.seen_size, self.source.checksum)

    async def _checked(self, size: int | None, checksum: str | None) -> Written:
        record = self._record
        await self._check_unmoved()
        if (record.size is not None and size != record.size) or (record.checksum and checksum != record.checksum):
            self.failure = IntegrityError(
                f"the bytes of {record.path!r} differ from its record: {size} bytes, {checksum}", path=record.path
            )
            raise self.failure
        return Written(size, checksum, record.content_type)

    async def _check_unmoved(self) -> None:
        """Raise NotFound or Conflict if what was read at a key of the record need not be its bytes: it was deleted
        or replaced meanwhile, and the key may be another file's by now."""
        record = self._record
        try:
            current = await self._storage.get(record.path)
            if not current.has_bytes_of(record):
                raise Conflict(f"{record.path!r} was replaced or moved while it was read", path=record.path)
        except StorageError as error:
            self.failure = error
            raise

    async def aclose(self) -> None:
        await self.source.aclose()
