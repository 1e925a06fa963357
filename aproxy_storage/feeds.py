"""How content is read: one pass over a file or an iterator, cut into chunks. Used by `content` alone.

A *feed* is one pass. Blocking content is read in a worker thread, one chunk ahead of the consumer; asynchronous
content in the consumer's own task. Neither needs a task of its own, so there is none to lose.
"""

from __future__ import annotations

import asyncio
import contextvars
import inspect
import logging
import os
import threading
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterable, Iterator
from typing import Any, Protocol, TypeVar

from .errors import ContentError
from .futures import seen
from .looks import Looks
from .threads import Workers

__all__ = [
    "AsyncFeed",
    "AsyncFilePieces",
    "Cutter",
    "Feed",
    "Handle",
    "InlineFeed",
    "ThreadFeed",
    "encoded",
    "failed",
    "lookers",
    "looks",
    "readers",
    "silent",
    "to_bytes",
]

_log = logging.getLogger(__name__)

T = TypeVar("T")

SMALL = 64 * 1024  # bytes; smaller pieces are put together, larger ones passed on without copying
HOLD = 0.25  # seconds for which pieces are held back at most, once more of them have to be waited for
SETTLE = 10.0  # seconds that closing the caller's generators may take

looks = Looks()
os.register_at_fork(after_in_child=looks.fresh)

# One blocked source takes one thread. Nothing is ever refused: each pass has one job at most.
readers = Workers("aproxy_storage-content", 32, max_waiting=1 << 30, share=1, hung=looks.hung)
# What is over in microseconds, unless a disk hangs: one thread does it all until then.
lookers = Workers("aproxy_storage-paths", 32, max_waiting=1 << 30, hung=looks.hung)


def to_bytes(piece: Any) -> bytes:
    """Return what the caller's file or iterator gave as bytes; text as UTF-8, as Django writes it.

    Raises:
        ContentError: it is neither, or text with lone surrogates.
    """
    if type(piece) is bytes:
        return piece
    if isinstance(piece, str):
        return encoded(piece)
    if isinstance(piece, bytes | bytearray | memoryview):
        return bytes(piece)
    if piece is None:
        raise ContentError("the content is a non-blocking file that had nothing to read; hand over a blocking one")
    raise ContentError(f"the content gave {type(piece).__name__} where bytes or text were expected")


def encoded(text: str) -> bytes:
    """Return `text` as UTF-8.

    Raises:
        ContentError: it has lone surrogates.
    """
    try:
        return text.encode()
    except UnicodeEncodeError as error:
        raise ContentError(
            "the text has lone surrogates, which UTF-8 cannot hold; encode it and hand over bytes"
        ) from error


def failed(error: BaseException) -> ContentError:
    """Return the error for content that failed with `error`, which should become its cause."""
    # Not its text: that of a driver may hold a signed URL.
    reason = getattr(error, "strerror", None) if isinstance(error, OSError) else None
    return ContentError(f"the content failed while it was read: {reason or type(error).__name__}")


def silent(seconds: float | None) -> ContentError:
    """Return the error for content that let us wait too long."""
    return ContentError(f"the content gave nothing for {seconds:g} seconds")


class Cutter:
    """Cuts pieces of any size into chunks of at most `limit` bytes; puts small pieces together."""

    __slots__ = ("_length", "_offset", "_parts", "_rest", "_small", "limit")

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self._small = min(SMALL, max(1, limit // 2))
        self._parts: list[bytes] = []  # small pieces, fewer than `limit` bytes together
        self._length = 0
        self._rest = b""  # a large piece after them, cut from `_offset` on
        self._offset = 0

    @property
    def ready(self) -> bool:
        """Nothing more must be added before `take`."""
        return bool(self._rest) or self._length > self.limit - self._small

    def __bool__(self) -> bool:
        return bool(self._rest or self._parts)

    def add(self, piece: bytes) -> None:
        """Add a piece; only while not `ready`."""
        if len(piece) >= self._small:
            self._rest = piece
        elif piece:
            self._parts.append(piece)
            self._length += len(piece)

    def take(self) -> bytes:
        """Return the next chunk, empty if there is nothing."""
        if self._parts:
            chunk = self._parts[0] if len(self._parts) == 1 else b"".join(self._parts)
            self._parts.clear()
            self._length = 0
            return chunk
        rest, start = self._rest, self._offset
        stop = start + self.limit
        if stop < len(rest):
            self._offset = stop
            return rest[start:stop]
        self._rest, self._offset = b"", 0
        return rest[start:] if start else rest


class Handle:
    """Something that one worker at a time uses and that whoever comes last releases: a worker or the closer."""

    def __init__(self, release: Callable[[], None]) -> None:
        self._release = release
        self._lock = threading.Lock()
        self._busy = False
        self._closed = False

    def use(self, function: Callable[[], T], closed: T) -> T:
        """Call `function` in a worker and return its result; `closed` after `close`."""
        with self._lock:
            if self._closed:
                return closed
            self._busy = True
        try:
            return function()
        finally:
            with self._lock:
                self._busy = False
                last: bool = self._closed
            if last:
                self._release()

    def close(self) -> None:
        """Release it now, or when the call under way ends; idempotent, does not wait."""
        with self._lock:
            if self._closed:
                return
            self._closed = True
            if self._busy:
                return
        self._release()


class _Left:
    """The files that a worker is still reading although the pass was given up, and who waits for them.

    By the ids of the files: as long as one is named here, the worker's pass keeps it alive. Not bound to a loop: the
    next save of a file may come from another one.
    """

    def __init__(self) -> None:
        self.fresh()

    def fresh(self) -> None:
        self._changed = threading.Condition()
        self._files: Counter[int] = Counter()

    def add(self, file: object) -> None:
        with self._changed:
            self._files[id(file)] += 1
            self._changed.notify_all()

    def remove(self, file: object) -> None:
        with self._changed:
            self._files[id(file)] -= 1
            self._files += Counter()  # drops what is at nought
            self._changed.notify_all()

    def wait_for(self, file: object, timeout: float | None, unless: Callable[[], bool]) -> bool:
        """Wait in a worker until nobody is reading `file`; return whether that is so, or `unless` has become so."""
        if id(file) not in self._files:
            return True
        with self._changed:
            return self._changed.wait_for(lambda: id(file) not in self._files or unless(), timeout)


_left = _Left()
os.register_at_fork(after_in_child=_left.fresh)


class Feed(Protocol):
    """One pass over the content."""

    async def read(self) -> bytes:
        """Return the next chunk, empty at the end; ContentError where the content fails."""

    def close(self) -> None:
        """Stop: nothing new is begun, what is ours is released. Idempotent, does not wait."""

    async def aclose(self) -> None:
        """Close, and wait within a bound where closing means to await the caller's code."""

    def under_way(self) -> asyncio.Future[Any] | None:
        """Return the blocking call that may still be in the content after `close`."""


class InlineFeed:
    """A pass over what is in memory already."""

    def __init__(self, pieces: Iterable[Any], limit: int) -> None:
        self._pieces = iter(pieces)
        self._cutter = Cutter(limit)

    async def read(self) -> bytes:
        cutter = self._cutter
        while not cutter.ready:
            try:
                piece = next(self._pieces)
            except StopIteration:
                break
            cutter.add(to_bytes(piece))
        return cutter.take()

    def close(self) -> None:
        self._pieces = iter(())
        self._cutter = Cutter(self._cutter.limit)

    async def aclose(self) -> None:
        self.close()

    def under_way(self) -> asyncio.Future[Any] | None:
        return None


class ThreadFeed:
    """A pass over a blocking iterator, read in a worker thread, with `ahead` one chunk before it is asked for.

    The job under way survives the cancellation of whoever waits for it, so that a spooled source loses nothing. Once
    the pass is closed, it takes no further piece. `file`: what has one position for all passes over it, so that a pass
    begins only when no worker is left in it by another one.
    """

    def __init__(
        self,
        pieces: Callable[[], Iterator[Any]],
        limit: int,
        timeout: float | None,
        *,
        ahead: bool = True,
        release: Callable[[], None] | None = None,
        file: object = None,
    ) -> None:
        self._open = pieces
        self._file = file
        self._iterator: Iterator[Any] | None = None
        self._cutter = Cutter(limit)
        self._timeout = timeout
        self._ahead = ahead
        self._extra_release = release  # closes the caller's generator: his code, never to be run on the loop
        self._handle = Handle(self._release)
        self._context = contextvars.copy_context()
        self._pending: asyncio.Future[tuple[bytes, bool]] | None = None
        self._ended = False
        self._closed = False
        self._counted = False  # in `_left`
        self._failure: ContentError | None = None

    async def read(self) -> bytes:
        if self._failure is not None:
            raise self._failure
        if self._ended:
            return b""
        future = self._pending or self._ask()
        self._pending = future
        try:
            if not future.done():
                await asyncio.wait((future,), timeout=self._timeout)
                if not future.done():
                    raise silent(self._timeout)
            chunk, self._ended = future.result()
        except ContentError as error:
            self._failure = error
            raise
        except Exception as error:
            # Kept: an iterator that has failed looks like one at its end when it is asked again.
            self._failure = failed(error)
            raise self._failure from error
        self._pending = self._ask() if self._ahead and not self._ended else None
        return chunk

    def _ask(self) -> asyncio.Future[tuple[bytes, bool]]:
        return readers.call(self._handle.use, self._pull_in_context, (b"", True), timeout=None)

    def _pull_in_context(self) -> tuple[bytes, bool]:
        return self._context.run(self._pull)

    def _pull(self) -> tuple[bytes, bool]:
        """Return the next chunk, and whether it is known to be the last."""
        cutter = self._cutter
        if self._iterator is None:
            if self._file is not None and not _left.wait_for(self._file, self._timeout, lambda: self._closed):
                raise ContentError("the content is still being read by a save that was given up; open it anew")
            self._iterator = self._open()
        give_up = time.monotonic() + HOLD
        while not cutter.ready and not self._closed:
            try:
                piece = next(self._iterator)
            except StopIteration:
                return cutter.take(), True
            cutter.add(to_bytes(piece))
            if time.monotonic() > give_up and cutter:
                break
        return cutter.take(), False

    def _release(self) -> None:
        try:
            if self._extra_release is not None:
                self._extra_release()
            elif inspect.isgenerator(self._iterator):  # ours, or that of Django's chunks()
                self._iterator.close()
        except Exception:
            _log.warning("closing the content failed", exc_info=True)
        finally:
            if self._counted:
                _left.remove(self._file)

    def close(self) -> None:
        self._ended = True
        if self._closed:
            return
        if self._pending is not None:
            self._pending.add_done_callback(seen)  # nobody will ask for it any more
            if self._file is not None and not self._pending.done():
                self._counted = True
                _left.add(self._file)
        self._closed = True
        if self._extra_release is None:
            self._handle.close()
        else:
            readers.submit(self._handle.close)

    async def aclose(self) -> None:
        self.close()

    def under_way(self) -> asyncio.Future[Any] | None:
        return self._pending


class AsyncFeed:
    """A pass over an asynchronous iterator, read in the task of the consumer."""

    def __init__(self, pieces: Callable[[], AsyncIterator[Any]], limit: int, timeout: float | None) -> None:
        self._open = pieces
        self._iterator: AsyncIterator[Any] | None = None
        self._cutter = Cutter(limit)
        self._timeout = timeout
        self._ended = False
        self._failure: ContentError | None = None

    async def read(self) -> bytes:
        if self._failure is not None:
            raise self._failure
        if not self._ended and not self._cutter.ready:
            limit = asyncio.timeout(self._timeout)
            try:
                async with limit:
                    await self._collect(limit)
            except ContentError as error:
                self._failure = error
                raise
            except Exception as error:
                self._failure = silent(self._timeout) if limit.expired() else failed(error)
                raise self._failure from error
            except BaseException:
                # A cancelled generator is over, and would look as if the content had ended here.
                self._failure = ContentError("the content was interrupted while it was read, and cannot go on")
                raise
        return self._cutter.take()

    async def _collect(self, limit: asyncio.Timeout) -> None:
        clock = asyncio.get_running_loop().time
        cutter = self._cutter
        if self._iterator is None:
            self._iterator = self._open()
        began = rescheduled = clock()
        while not cutter.ready:
            try:
                piece = await anext(self._iterator)
            except StopAsyncIteration:
                self._ended = True
                return
            cutter.add(to_bytes(piece))
            now = clock()
            if now - began > HOLD and cutter:
                return
            # The limit is one for each piece, but moving a timer for every hundred bytes would cost more than they.
            if self._timeout is not None and now - rescheduled > self._timeout / 16 and not limit.expired():
                limit.reschedule(now + self._timeout)
                rescheduled = now

    def close(self) -> None:
        self._ended = True
        self._cutter = Cutter(self._cutter.limit)

    async def aclose(self) -> None:
        self.close()
        iterator = self._iterator
        if inspect.isasyncgen(iterator):
            try:
                async with asyncio.timeout(SETTLE):
                    await iterator.aclose()
            except Exception:
                _log.warning("closing the content failed", exc_info=True)

    def under_way(self) -> asyncio.Future[Any] | None:
        return None


class AsyncFilePieces:
    """The reads of an asynchronous file, from its start where it can seek."""

    def __init__(self, file: Any, limit: int, rewind: bool) -> None:
        self._file = file
        self._limit = limit
        self._rewind = rewind

    def __aiter__(self) -> AsyncFilePieces:
        return self

    async def __anext__(self) -> Any:
        if self._rewind:
            self._rewind = False
            await self._file.seek(0)
        piece = await self._file.read(self._limit)
        if not piece:
            raise StopAsyncIteration
        return piece
