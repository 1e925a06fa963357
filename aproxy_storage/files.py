"""The handle that reads a stored file, with seek and tell; and `Opening`, which `ProxyStorage.open` returns."""

from __future__ import annotations

import hashlib
import io
import logging
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Generator, Sequence
from contextlib import AbstractAsyncContextManager, AbstractContextManager, AsyncExitStack
from types import TracebackType
from typing import TYPE_CHECKING, Any, Generic, Self, TypeVar

from .digest import INLINE_BYTES
from .errors import (
    BackendUnavailable,
    Conflict,
    DeadlineExceeded,
    IntegrityError,
    NotFound,
    NotSupported,
    StorageError,
)
from .records import ByteRange, MetaRecord, Place
from .timeouts import Alarm

if TYPE_CHECKING:
    from .backends.base import Reading
    from .file_writer import AsyncWriter
    from .openings import Opened

    #: Opens the rest of a file at another copy than those that have failed; None: there is no other.
    Elsewhere = Callable[[Sequence[Place], ByteRange], Awaitable[Opened | None]]
    #: Says whether the bytes of the file are certainly at a place where something was opened before it was asked.
    StillAt = Callable[[Place], Awaitable[bool]]

__all__ = ["AsyncFile", "Opening", "chunks_of"]

_log = logging.getLogger(__name__)

F = TypeVar("F", bound="AsyncFile | AsyncWriter")


class AsyncFile:
    """A stored file, open for reading. Positions count from the start of the opened range.

    Pinned to one version of the file: replaced or deleted meanwhile, it goes on reading the old bytes while they
    last, and raises Conflict when they are gone; never a mixture. Where the original knows no ETags (Django's
    storages), a read that has to open the bytes anew (after a `seek` or a failure) asks for the record, and raises
    Conflict also where the old bytes may still be there. Holds one chunk in memory. Not to be shared between tasks.
    ``async for`` gives chunks.

    A read that fails or is cancelled has read nothing: the next one begins where it began, with ``verify=True`` too.

    Attributes:
        record: the record as it was when the file was opened.
        size: bytes of the opened range.
        closed: whether `aclose` was called.
    """

    def __init__(
        self, record: MetaRecord, opened: Opened, byte_range: ByteRange | None, chunk_bytes: int, verify: bool,
        still_at: StillAt, elsewhere: Elsewhere | None = None, patience: float | None = None,
    ) -> None:  # fmt: skip
        self._still_at = still_at
        self._elsewhere = elsewhere
        self._patience = patience  # seconds for each chunk, where there is another copy to go to
        self._failed: list[Place] = []  # copies that broke off
        self.record = record
        self.name = record.path
        self.mode = "rb"
        self.closed = False
        self._backend, self._place = opened.backend, opened.place
        self._chunk_bytes = chunk_bytes
        self._reading: Reading | None = opened.reading
        info = opened.reading.info
        self._etag = info.etag
        total = info.size if info.size is not None else record.size
        if total is None:
            raise IntegrityError(f"neither the record nor {opened.backend} knows the size of {record.path!r}")
        start, stop = (byte_range or ByteRange()).resolve(total)
        self._start = start
        self.size = stop - start
        self._position = 0  # where the next read begins
        self._at = 0  # where the next chunk of `_reading` begins; -1: nothing of it can be used any more
        self._buffer = b""  # what was taken from `_reading`, from `_position` on
        self._hash = _hasher(record) if verify else None  # of what was read, up to `_position`

    async def read(self, size: int | None = -1) -> bytes:
        """Read up to `size` bytes, to the end if negative or None; fewer only at the end.

        Raises:
            IntegrityError: the bytes end too early, or (``verify=True``, at the end) differ from the record.
            Conflict: the bytes are gone. BackendUnavailable, DeadlineExceeded.
        """
        self._check_open()
        left = max(0, self.size - self._position)
        wanted = left if size is None or size < 0 else min(size, left)
        parts: list[bytes] = []
        position, hashed = self._position, self._hash
        try:
            while wanted > 0:
                chunk = self._buffer or await self._next_chunk()
                if len(chunk) > wanted:
                    chunk, self._buffer = chunk[:wanted], chunk[wanted:]
                else:
                    self._buffer = b""
                parts.append(chunk)
                wanted -= len(chunk)
                await self._advance(chunk)
            if self._position >= self.size:
                self._verify_end()
        except BaseException:
            self._set_back(position, hashed)
            raise
        return parts[0] if len(parts) == 1 else b"".join(parts)

    async def readinto(self, buffer: Any) -> int:
        """Read into a writable buffer; return the number of bytes, fewer than its length only at the end."""
        view = memoryview(buffer).cast("B")
        done = 0
        position, hashed = self._position, self._hash
        try:
            while done < len(view):
                data = await self.read(min(len(view) - done, self._chunk_bytes))
                if not data:
                    break
                view[done : done + len(data)] = data
                done += len(data)
        except BaseException:
            self._set_back(position, hashed)
            raise
        return done

    async def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        """Move to `offset`; return the new position. Needs no round trip: the next read opens there.

        Raises:
            ValueError: before the start, or no such `whence`. NotSupported: the file was opened with ``verify=True``.
        """
        self._check_open()
        bases = {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self.size}
        if whence not in bases:
            raise ValueError(f"seek with whence={whence!r}: one of 0, 1, 2")
        target = bases[whence] + offset
        if target < 0:
            raise ValueError(f"seek to {target}, before the start of the file")
        if target == self._position:
            return target
        if self._hash is not None:
            raise NotSupported("a file opened with verify=True is read from start to end", path=self.name)
        ahead = target - self._position
        self._buffer = self._buffer[ahead:] if 0 < ahead < len(self._buffer) else b""
        self._position = target
        return target

    async def tell(self) -> int:
        """Return the position of the next read."""
        self._check_open()
        return self._position

    def __aiter__(self) -> AsyncIterator[bytes]:
        return self

    async def __anext__(self) -> bytes:
        self._check_open()
        if self._position >= self.size:
            self._verify_end()
            raise StopAsyncIteration
        position, hashed = self._position, self._hash
        try:
            chunk = self._buffer or await self._next_chunk()
            self._buffer = b""
            await self._advance(chunk)
        except BaseException:
            self._set_back(position, hashed)
            raise
        return chunk

    async def aclose(self) -> None:
        """Release the connection or descriptor; idempotent."""
        self.closed = True
        self._buffer = b""
        await self._stop_reading()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.aclose()

    async def _advance(self, chunk: bytes) -> None:
        """Take note that `chunk` was read."""
        if self._hash is not None:
            self._hash = await self._hash.updated(chunk)
        self._position += len(chunk)

    def _set_back(self, position: int, hashed: _Verifier | None) -> None:
        """Forget what a call that fails has read since `position`, and have the next one read anew: of a reading that
        has failed nobody knows where it is, and it may say from now on that it is at its end."""
        self._position, self._hash = position, hashed
        self._buffer, self._at = b"", -1

    async def _next_chunk(self) -> bytes:
        """Return the next non-empty bytes at `_position`; called only where the size says that there are some."""
        if self.closed:
            raise self._closed_meanwhile()
        if self._reading is None or self._at != self._position:
            await self._read_from(self._position)
        assert self._reading is not None
        try:
            chunk = await self._chunk_of(self._reading)
        except NotFound as error:
            raise self._vanished() from error
        except BackendUnavailable as error:
            if self.closed:
                raise
            try:
                goes_on = await self._go_on_elsewhere(error)
            except NotFound as gone:
                raise self._vanished() from gone
            if not goes_on:
                raise
            return await self._next_chunk()
        if not chunk or self._at + len(chunk) > self.size:
            raise IntegrityError(
                f"{self.name!r} should have {self.size} bytes, {self._backend} gave "
                f"{'only' if not chunk else 'at least'} {self._at + len(chunk)}",
                operation="read", path=self.name, backend=str(self._backend),
            )  # fmt: skip
        self._at += len(chunk)
        return chunk

    async def _chunk_of(self, reading: Reading) -> bytes:
        if self._patience is None or self._elsewhere is None:
            return await anext(reading, b"")
        try:
            with Alarm(self._patience):
                return await anext(reading, b"")
        except TimeoutError as error:
            if isinstance(error, StorageError):
                raise
            raise DeadlineExceeded(f"no chunk came from {self._backend} within {self._patience:g} seconds") from error

    async def _go_on_elsewhere(self, error: StorageError) -> bool:
        """Go on at another copy, from where this one broke off; return False if there is none."""
        if self._elsewhere is None:
            return False
        await self._stop_reading()
        rest = ByteRange(self._start + self._position, self._start + self.size)
        opened = await self._elsewhere(self._failed, rest)
        if opened is None:
            return False
        _log.warning("the reading of %r broke off, and goes on in %s: %s", self.name, opened.backend, error)
        self._failed.append(opened.place)
        self._backend, self._place = opened.backend, opened.place
        self._reading, self._etag, self._at = opened.reading, opened.reading.info.etag, self._position
        await self._check_reading()
        return True

    async def _read_from(self, position: int) -> None:
        await self._stop_reading()
        part = ByteRange(self._start + position, self._start + self.size)
        reading = self._backend.read(self._place.key, byte_range=part, chunk_bytes=self._chunk_bytes)
        try:
            await reading.__aenter__()
        except NotFound as error:
            raise self._vanished() from error
        self._reading, self._at = reading, position
        await self._check_reading()
        etag = reading.info.etag
        if etag != self._etag or (etag is None and not await self._still_at(self._place)):
            await self._stop_reading()
            raise self._vanished()
        await self._check_reading()

    async def _check_reading(self) -> None:
        """End the reading that was just begun, if the file was closed meanwhile; nobody else would."""
        if self.closed:
            await self._stop_reading()
            raise self._closed_meanwhile()

    async def _stop_reading(self) -> None:
        reading, self._reading = self._reading, None
        if reading is not None:
            await reading.__aexit__(None, None, None)

    def _verify_end(self) -> None:
        if self._hash is not None:
            self._hash.check(self.name)

    def _vanished(self) -> Conflict:
        return Conflict(
            f"{self.name!r} was replaced or deleted while it was read; open it again", operation="read", path=self.name
        )

    def _closed_meanwhile(self) -> BackendUnavailable:
        return BackendUnavailable(f"{self.name!r} was closed while it was read", retryable=False)

    def _check_open(self) -> None:
        if self.closed:
            raise ValueError(f"{self.name!r} is closed")


class _Verifier:
    """The hash of what was read so far; never changed, so that a read that fails can go back to it."""

    def __init__(self, hashed: Any, expected: str) -> None:
        self._hash = hashed
        self._expected = expected

    async def updated(self, chunk: bytes) -> _Verifier:
        """Return the one after `chunk`."""
        hashed = self._hash.copy()
        if len(chunk) <= INLINE_BYTES:
            hashed.update(chunk)
        else:
            from .content import hash_workers

            await hash_workers.call(hashed.update, chunk, timeout=None)
        return _Verifier(hashed, self._expected)

    def check(self, name: str) -> None:
        if self._hash.hexdigest() != self._expected:
            raise IntegrityError(
                f"the bytes of {name!r} differ from its record: {self._hash.name} is {self._hash.hexdigest()}, "
                f"recorded was {self._expected}",
                operation="read", path=name,
            )  # fmt: skip


def _hasher(record: MetaRecord) -> _Verifier:
    algorithm, _, expected = (record.checksum or "").partition(":")
    if not expected:
        raise IntegrityError(
            f"{record.path!r} cannot be verified: its record holds no checksum (saved with checksum=None, or adopted)",
            operation="open", path=record.path,
        )  # fmt: skip
    return _Verifier(hashlib.new(algorithm), expected)


class Opening(Generic[F]):
    """What `ProxyStorage.open` returns: await it, or enter it with ``async with``, for the open file."""

    __slots__ = ("_file", "_open")

    def __init__(self, open_: Callable[[], Coroutine[Any, Any, F]]) -> None:
        self._open = open_
        self._file: F | None = None

    def __await__(self) -> Generator[Any, None, F]:
        return self._open().__await__()

    async def __aenter__(self) -> F:
        self._file = file = await self._open()
        return file

    async def __aexit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        file, self._file = self._file, None
        if file is not None:
            await file.__aexit__(exc_type, exc, traceback)


async def chunks_of(
    open_: Callable[[], AbstractAsyncContextManager[AsyncFile]], where: AbstractContextManager[None]
) -> AsyncIterator[bytes]:
    """Iterate over the chunks of the file that `open_` opens, inside of `where`, when the first is asked for."""
    async with AsyncExitStack() as stack:
        with where:
            file = await stack.enter_async_context(open_())
        async for chunk in file:
            yield chunk
