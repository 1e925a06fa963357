"""Files of a BridgeStorage as Django wants them: blocking, buffered, in text or bytes.

Reading goes over an `AsyncFile` in large blocks, because every call into the loop costs some 100 µs whatever it
brings. Opening brings the first block; a file that is no longer needs no further call. Writing goes into a temporary
file and is published in one call when the file is closed: so it is all or nothing, the temporary file can be written in
every mode, and inside a transaction that one call belongs to it.
"""

from __future__ import annotations

import contextlib
import io
import random
import shutil
import time
import warnings
from collections.abc import Callable
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

from asgiref.sync import sync_to_async
from django.conf import settings
from django.core.files.base import File

from aproxy_storage import AsyncFile, Conflict, MetaRecord, NotFound
from aproxy_storage.kinds import memory_inside

from .bridge import Bridge
from .spool import Spool

if TYPE_CHECKING:
    from .storage import BridgeStorage

__all__ = [
    "BLOCK_BYTES",
    "FIRST_BYTES",
    "BridgeFile",
    "ReadFirst",
    "ReadingFile",
    "WritingFile",
    "in_callers_thread",
    "is_small",
    "open_for_reading",
    "read_whole",
]

FIRST_BYTES = 256 << 10  # brought by the call that opens
BLOCK_BYTES = 1 << 20  # brought by each further one
_SPOOL_BYTES = 1 << 20  # written bytes that are kept in memory
_MAX_TRIES = 100  # to append behind what others append meanwhile: of those who meet, one gets through

#: What opening for reading brings: the open file, its first bytes, whether these are all of it.
ReadFirst = tuple[AsyncFile, bytes, bool]


class BridgeFile(File):
    """A file of a BridgeStorage. Not to be shared between threads.

    Attributes:
        name: its path.
        mode: as given to `open`.
        record: its record, as it was when the file was opened or published.
    """

    DEFAULT_CHUNK_SIZE = FIRST_BYTES

    record: MetaRecord | None = None

    def __init__(self, storage: BridgeStorage, file: Any, asked: str | MetaRecord, mode: str) -> None:
        super().__init__(file, asked.path if isinstance(asked, MetaRecord) else asked)
        self.mode = mode
        self._storage = storage
        self._asked = asked

    def __exit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if exc_type is None:
            self.close()
        else:
            self.abort()

    def open(self, mode: str | None = None) -> Self:
        """Go to the start; open again where it is closed, or for another mode."""
        if not self.closed and (mode is None or mode == self.mode):
            self.seek(0)
            return self
        self.close()
        again = self._storage.open(self._asked, mode or self.mode)
        self.__class__ = again.__class__
        self.__dict__.update(again.__dict__)
        again.__dict__.clear()  # what it held is ours now
        return self

    def abort(self) -> None:
        """Close without publishing anything; idempotent."""
        self.close()


class ReadingFile(BridgeFile):
    """A stored file, open for reading; pinned to one version of it, as `AsyncFile` is."""

    def __init__(self, storage: BridgeStorage, opened: ReadFirst, asked: str | MetaRecord, mode: str) -> None:
        handle, first, whole = opened
        self.record = handle.record
        self._bytes = handle.size
        self._blocks: _Blocks | None = None
        binary: Any
        if whole:
            binary = _Bytes(first)
        else:
            self._blocks = _Blocks(storage.bridge, handle, first)
            binary = io.BufferedReader(self._blocks, BLOCK_BYTES)
        file = binary if "b" in mode else io.TextIOWrapper(binary, encoding="utf-8")
        super().__init__(storage, file, asked, mode)

    @property
    def size(self) -> int:
        return self._bytes

    def close(self) -> None:
        if self._blocks is not None and self.file is not None:
            self._blocks.release()
        if self.file is not None:
            self.file.close()


async def open_for_reading(opening: Any) -> ReadFirst:
    """Return the open file, its first bytes, and whether these are all of it; then it is closed already."""
    handle: AsyncFile = await opening
    try:
        first = await handle.read(FIRST_BYTES)
        whole = len(first) >= handle.size
    except BaseException:
        await handle.aclose()
        raise
    if whole:
        await handle.aclose()
    return handle, first, whole


async def read_whole(opening: Any) -> ReadFirst | None:
    """As `open_for_reading`, of a file that has no more than the first bytes; None if it has."""
    async with opening as handle:
        first = await handle.read(FIRST_BYTES)
        return (handle, first, True) if len(first) >= handle.size else None


class _Bytes(io.BytesIO):
    """The bytes of a small file, which are only read."""

    def writable(self) -> bool:
        return False

    def write(self, data: Any) -> int:
        raise io.UnsupportedOperation("not writable: the file was opened for reading")

    def writelines(self, lines: Any) -> None:
        self.write(lines)

    def truncate(self, size: int | None = None) -> int:
        return self.write(size)


class _Blocks(io.RawIOBase):
    """The bytes of an `AsyncFile` that is open on the loop of the bridge."""

    def __init__(self, bridge: Bridge, handle: AsyncFile, first: bytes) -> None:
        self._bridge = bridge
        self._handle: AsyncFile | None = handle
        self._first = first
        self._size = handle.size
        self._position = 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self._size}[whence]
        if base + offset < 0:
            raise ValueError(f"seek to {base + offset}, before the start of the file")
        self._position = base + offset
        return self._position

    def tell(self) -> int:
        return self._position

    def readinto(self, buffer: Any) -> int:
        view = memoryview(buffer).cast("B")
        if self._position < len(self._first):
            data = self._first[self._position : self._position + len(view)]
            view[: len(data)] = data
            done = len(data)
        elif self._position >= self._size:
            done = 0
        else:
            done = self._bridge.call(self._read_into, view)
        self._position += done
        return done

    async def _read_into(self, view: memoryview) -> int:
        handle = self._open_handle()
        await handle.seek(self._position)
        return await handle.readinto(view)

    def readall(self) -> bytes:
        data = self._bridge.call(self._read_rest) if self._position < self._size else b""
        self._position += len(data)
        return data

    async def _read_rest(self) -> bytes:
        handle = self._open_handle()
        await handle.seek(self._position)
        return await handle.read()

    def _open_handle(self) -> AsyncFile:
        if self._handle is None:
            raise ValueError("I/O operation on closed file")
        return self._handle

    def release(self) -> None:
        """Close the handle, and wait until it is."""
        handle, self._handle = self._handle, None
        if handle is not None:
            self._bridge.end(handle.aclose)

    def close(self) -> None:
        # Without a `release` before it this is the garbage collector, in whatever thread: nothing may wait.
        handle, self._handle = self._handle, None
        if handle is not None:
            self._bridge.post(handle.aclose)
        super().close()


class WritingFile(BridgeFile):
    """A file open for writing. It appears under its path, whole, when it is closed.

    After an exception in the ``with`` block, and where it is never closed, nothing is published. What others have
    written meanwhile is not lost: with ``"a"`` the new bytes go behind theirs, with ``"r+"`` closing fails, as it does
    with ``"a"`` where `fileno` was asked for: whoever did that may have written anywhere.
    """

    def __init__(self, storage: BridgeStorage, name: str, mode: str) -> None:
        self._spool = self._new_spool()
        self._spool.for_reading = "+" in mode
        self._exclusive = "x" in mode
        self._appends = "a" in mode
        self._published = False
        self._over: MetaRecord | None = None  # the file whose bytes are in the spool, the first so many
        self._loaded = 0
        file: Any = self._spool if "b" in mode else io.TextIOWrapper(self._spool, encoding="utf-8")
        super().__init__(storage, file, name, mode)
        try:
            if self._exclusive:
                if storage._has_file(name):
                    raise FileExistsError(f"{name!r} exists already")
            elif "w" not in mode:
                self._load(self._spool, must_exist=not self._appends)
                self._spool.changed = False
                self._spool.appends = self._appends
                if not self._appends:
                    self._spool.seek(0)
        except BaseException:
            self.abort()
            raise

    @staticmethod
    def _new_spool() -> Spool:
        return Spool(max_size=_SPOOL_BYTES, dir=settings.FILE_UPLOAD_TEMP_DIR)

    def _load(self, spool: Spool, *, must_exist: bool) -> None:
        self._over, self._loaded = None, 0
        try:
            with self._storage.open(self.name, "rb") as old:
                for block in old.chunks(BLOCK_BYTES):
                    self._loaded += spool.write(block)
                self._over = old.record
        except FileNotFoundError:
            if must_exist:
                raise

    @property
    def size(self) -> int:
        self.file.flush()
        at = self._spool.tell()
        try:
            return self._spool.seek(0, io.SEEK_END)
        finally:
            self._spool.seek(at)

    def close(self) -> None:
        """Publish the file; idempotent.

        Raises:
            Conflict: with ``"r+"``, somebody else has changed the file. And what `ProxyStorage.save` or `replace`
            raises. Then nothing is published.
        """
        if self._published or self.file is None or self.file.closed:
            return
        self._published = True
        try:
            self.file.flush()  # and drop the buffer for reading: whoever has the descriptor may have written
            if self.mode[0] in "wx":
                self.record = self._storage.publish(self.name, self._spool, exclusive=self._exclusive)
            elif self._spool.changed:
                self.record = self._append() if self._appends else self._publish(self._spool)
        finally:
            self.file.close()

    def _publish(self, spool: Spool) -> MetaRecord:
        """Publish over the file that was loaded; where there was none, as a new one."""
        return self._storage.publish(self.name, spool, exclusive=self._over is None, over=self._over)

    def _append(self) -> MetaRecord:
        spool, start = self._spool, self._loaded
        for tries in range(1, _MAX_TRIES + 1):
            try:
                return self._publish(spool)
            except (Conflict, NotFound, FileExistsError):
                if tries == _MAX_TRIES or self._spool.cut_to < start:  # what was there may be part of what was written
                    raise
            finally:
                if spool is not self._spool:
                    spool.close()
            time.sleep(random.uniform(0.0, 0.01))  # others append too, and are not to meet us again
            spool = self._new_spool()
            self._load(spool, must_exist=False)
            self._spool.seek(start)
            shutil.copyfileobj(self._spool.bytes_file, spool, BLOCK_BYTES)
        raise AssertionError("the last try returns or raises")

    def abort(self) -> None:
        self._published = True
        if self.file is not None:
            self._spool.close()  # first: what a text layer still holds is not wanted
            with contextlib.suppress(ValueError):
                self.file.close()

    def __del__(self) -> None:
        if not self.__dict__.get("_published", True):
            self.abort()
            warnings.warn(
                f"{self.name!r} was opened for writing and never closed: nothing was published",
                ResourceWarning,
                source=self,
                stacklevel=2,
            )


class _InCallersThread:
    """Blocking content that is read in the thread of the caller, who waits for the bridge.

    That is where Django would read it, and where its database connection and transaction are.
    """

    def __init__(
        self, pieces: Callable[[int], Any], *, name: str | None, content_type: str | None, again: bool
    ) -> None:
        self.name = name
        self.content_type = content_type
        self.file = self  # is asked whether it can seek
        self.error: Exception | None = None  # raised by the content itself
        self._pieces = pieces
        self._again = again
        self._iterator: Any = None

    def seekable(self) -> bool:
        return self._again

    async def seek(self, position: int) -> int:
        self._iterator = None
        return position

    async def read(self, size: int) -> Any:
        return await sync_to_async(self._next)(size)

    def _next(self, size: int) -> Any:
        try:
            if self._iterator is None:
                self._iterator = iter(self._pieces(max(size, FIRST_BYTES)))
            for piece in self._iterator:
                if piece:
                    return piece
            return b""
        except Exception as error:
            self.error = error
            raise


def in_callers_thread(content: Any) -> Any:
    """Return `content` such that a call over the bridge reads it in the calling thread.

    What is in memory, or in a temporary file that can be moved, is returned as it is: nobody reads it.
    """
    if isinstance(content, Spool) and isinstance(content._file, io.BytesIO):
        return content._file.getvalue()
    if isinstance(content, Spool):
        return _InCallersThread(content.pieces, name=None, content_type=None, again=True)
    if not isinstance(content, File) and not callable(getattr(content, "chunks", None)):
        return content
    if callable(getattr(content, "temporary_file_path", None)):
        return content
    if memory_inside(content) is not None:
        return content
    return _InCallersThread(
        content.chunks,
        name=getattr(content, "name", None),
        content_type=getattr(content, "content_type", None),
        again=_seekable(content),
    )


def is_small(content: Any) -> bool:
    """Return whether `content`, as `in_callers_thread` returns it, is in memory and no longer than the first bytes."""
    inner = memory_inside(content) or content
    if type(inner) is io.BytesIO:
        # Not by its buffer: content that shares its bytes with somebody would be copied for that.
        return not inner.closed and len(inner.getvalue()) <= FIRST_BYTES
    if type(inner) is io.StringIO:
        size = getattr(content, "size", None)
        return isinstance(size, int) and size <= FIRST_BYTES
    return isinstance(inner, bytes | str) and len(inner) <= FIRST_BYTES


def _seekable(content: Any) -> bool:
    try:
        return bool(content.seekable())
    except Exception:  # closed (it may open itself again), or none of its methods
        return False
