"""The content of a save: anything a caller may hand over, as chunks that are counted and hashed on the way."""

from __future__ import annotations

import asyncio
import contextlib
import os
from collections.abc import AsyncIterator, Callable
from types import TracebackType
from typing import Any, Protocol, Self, TypeVar

from .digest import INLINE_BYTES, Digest, digest_inline, hash_constructor, hash_workers
from .errors import ContentError, DeadlineExceeded
from .feeds import SETTLE, Feed, InlineFeed, lookers, looks, silent
from .kinds import recognise
from .sniffing import guess_content_type
from .spool import Spool, SpoolFeed
from .timeouts import IdleWatch

__all__ = ["Chunks", "Source", "guess_content_type", "hash_workers"]

T = TypeVar("T")

PEEK_BYTES = 64 * 1024


class Taken(Protocol):
    """A temporary file of the caller's that is an object by now, and has its old name still."""

    async def release(self) -> None:
        """Take the old name away: the object has a record, so that the file is the caller's no more."""

    async def give_back(self) -> None:
        """Make the file what it was, after the object was removed; nothing where it is there still."""

    async def settle(self) -> None:
        """`give_back`, where nobody knows whether there is a record: an object that is there still is made complete,
        but the file keeps its old name too."""


class Source:
    """Content that can be read in chunks and, where `replayable`, again from the start.

    One object serves one save: every attempt of it calls `chunks` anew. Not to be shared between tasks; only where
    `data` is set may several passes run at a time. Files are read from position 0 where they can seek, as Django
    does, and are never closed; generators are. Text is encoded as UTF-8. A file or an iterator that is not
    asynchronous is read in a worker thread, with the context variables of the caller of the first `chunks`.

    A backend may write `data` in one go instead of iterating, where it is not None: `seen_size` and `checksum` are
    then computed when asked for, inline; above 64 KiB it should await `measure` first, or iterate `chunks`.

    Attributes:
        name: the name that the content itself carries (Django's ``File.name``, a path's last part), or None.
        size: the exact number of bytes where it is known beforehand or declared, else None.
        content_type: as the content itself declares it (an upload), or None.
        replayable: `chunks` can be called again after a first pass has begun.
        path: a file of the caller's that may be read, linked by reflink or copied, never moved; or None.
        temporary_path: a file that a backend may make its object without a copy (Django's ``temporary_file_path()``),
            or None. It keeps its name, and `taken` is set: the object may still be taken back.
        taken: what is to be done about such a file once its record is stored, or the object removed again; else None.
        data: the whole content where it is in memory already, else None.
        algorithm: the hashlib name of the checksum that is computed, or None.
        seen_size, checksum: of the last complete pass (``"sha256:…"``); None before, checksum also where turned off.
    """

    __slots__ = (
        "_begun", "_checksum", "_chunk_bytes", "_head", "_live", "_new_hash", "_seen_size", "_spool",
        "_watch", "algorithm", "begin", "content_type", "data", "look", "name", "opens", "path", "replayable",
        "size", "taken", "temporary_path", "timeout",
    )  # fmt: skip

    name: str | None
    size: int | None
    content_type: str | None
    replayable: bool
    path: os.PathLike[str] | None
    temporary_path: str | None
    data: bytes | None
    algorithm: str | None

    def __init__(self, algorithm: str | None, chunk_bytes: int, timeout: float | None) -> None:
        self.name = self.size = self.content_type = self.path = self.temporary_path = self.data = None
        self.taken: Taken | None = None
        self.replayable = True
        self.algorithm = algorithm
        self._new_hash = None if algorithm is None else hash_constructor(algorithm)
        self._chunk_bytes = chunk_bytes
        self.timeout = timeout
        self.begin: Callable[[int, bool], Feed] | None = None  # (chunk_bytes, ahead) -> a pass from the start
        self.look: Callable[[], int] | None = None  # at a file of the disk, in a worker thread: its size just now
        self.opens = False  # each pass opens a file of its own
        self._spool: Spool | None = None  # of one-shot content, whether it is kept or not
        self._begun = False
        self._live: Feed | None = None
        self._head: bytes | None = None
        self._watch: IdleWatch | None = None
        self._seen_size: int | None = None
        self._checksum: str | None = None

    @classmethod
    def of(
        cls,
        content: Any,
        *,
        size: int | None = None,
        chunk_bytes: int = 1 << 20,
        checksum: str | None = "sha256",
        timeout: float | None = None,
        spool: bool = False,
        spool_bytes: int = 1 << 20,
    ) -> Source:
        """Return the source for `content`; nothing is read yet.

        Args:
            content: bytes-like, text, a path object (opened and closed here, never moved; no FIFO), a synchronous or
                asynchronous file, a Django File, a Starlette UploadFile, an iterable or asynchronous iterable of
                bytes, or a Source, which is returned as it is.
            size: bytes that the content has to have.
            chunk_bytes: the most that a chunk holds; about three chunks are in memory at a time.
            checksum: a hashlib name, or None.
            timeout: seconds that the content may take for each next chunk.
            spool: keep one-shot content while it is read, so that it becomes replayable.
            spool_bytes: how much of it is kept in memory before a temporary file is used.

        Raises:
            ContentError: it is none of these, a path that no file can have, or is known not to have `size` bytes.
            ConfigurationError: hashlib knows no such checksum of a fixed length.
        """
        if isinstance(content, Source):
            return content._declared(size)
        if chunk_bytes < 1:
            raise ValueError("chunk_bytes must be positive")
        source = cls(checksum, chunk_bytes, timeout)
        if type(content) is bytes:
            source.data = content
        else:
            recognise(source, content)
        if source.data is not None:
            source.size = len(source.data)
        elif not source.replayable:
            assert source.begin is not None
            source._spool = Spool(source.begin(chunk_bytes, True), chunk_bytes, keep=spool, memory=spool_bytes)
            source.replayable = spool
        return source if size is None else source._declared(size)

    def _declared(self, size: int | None) -> Source:
        if size is not None and self.size is not None and size != self.size:
            raise ContentError(f"the content has {self.size} bytes, not {size} as declared")
        self.size = self.size if size is None else size
        return self

    @property
    def spool(self) -> bool:
        """One-shot content is kept while it is read, so that it is replayable. May be set until it is read."""
        return self._spool is not None and self._spool.keep

    @spool.setter
    def spool(self, keep: bool) -> None:
        if self._spool is not None and not self._begun:
            self._spool.keep = self.replayable = keep

    # -- size and checksum

    @property
    def seen_size(self) -> int | None:
        """The number of bytes of the last complete pass."""
        return len(self.data) if self.data is not None else self._seen_size

    @property
    def checksum(self) -> str | None:
        """The checksum of the last complete pass, or of `data`; None where turned off, or before a pass."""
        if self._checksum is None and self.data is not None and self._new_hash is not None:
            if len(self.data) <= INLINE_BYTES:
                self._checksum = f"{self.algorithm}:{digest_inline(self._new_hash, self.data)}"
            else:
                self._checksum = f"{self.algorithm}:{self._new_hash(self.data).hexdigest()}"
        return self._checksum

    async def likely_size(self) -> int | None:
        """Return `size`, or else how large a file of the disk is just now: it may change until it has been read.

        Raises:
            ContentError: too many looks into its directory hang.
        """
        if self.size is None and self.look is not None:
            with contextlib.suppress(OSError, ValueError):
                return await self._look(self.look)
        return self.size

    def _look(self, function: Callable[..., T], *args: Any) -> asyncio.Future[T]:
        path = self.temporary_path or self.path
        if path is None:
            return lookers.call(function, *args, timeout=self.timeout)
        looks.check(path)
        return lookers.call(looks.at, path, function, *args, timeout=self.timeout)

    async def ask(self, function: Callable[..., T], *args: Any) -> T:
        """Call `function`, which looks at a file of the caller's, in a worker thread of the content's, and return its
        result. As with a chunk, whoever consumes the content is not blamed for the time, nor for his disk.

        Raises:
            ContentError: there is no answer, or no thread, within the timeout; or too many looks into the directory of
                the file hang, so that it is not tried. And what `function` raises.
        """
        watch = self._watch
        if watch is not None:
            watch.pause()
        try:
            return await self._look(function, *args)
        except DeadlineExceeded as error:
            if error.outcome_unknown:
                raise silent(self.timeout) from error
            raise ContentError(
                f"no thread was free to look at the content for {self.timeout:g} seconds: those of other content hang"
            ) from error
        finally:
            if watch is not None:
                watch.go_on()

    async def measure(self) -> None:
        """Compute the checksum of `data`, in a worker thread where it is large; nothing for other content."""
        data, new_hash = self.data, self._new_hash
        if data is None or new_hash is None or self._checksum is not None or len(data) <= INLINE_BYTES:
            return
        digest = await hash_workers.call(new_hash, data, timeout=None)
        self._checksum = f"{self.algorithm}:{digest.hexdigest()}"

    def measured(self, size: int, checksum: str | None) -> None:
        """Take the size and checksum that a backend has found by reading `path` or `temporary_path` itself.

        Raises:
            ContentError: the declared size is another.
        """
        if self.size is not None and size != self.size:
            raise _wrong_size(self.size, size)
        self._seen_size, self._checksum = size, checksum

    # -- reading

    def chunks(self) -> Chunks:
        """Read the content once, from the start: non-empty `bytes` of at most `chunk_bytes`.

        A pass begins when its first chunk is asked for, and ends an unfinished one before it.

        Raises:
            ContentError: the content has been read before and cannot be read again (before anything is read);
                while iterating: it failed (the native error is the cause), took longer than the timeout,
                or was shorter or longer than `size`.
        """
        self._check_replay()
        return Chunks(self)

    @property
    def spent(self) -> bool:
        """Whether it has been read, wholly or in part, and cannot be read again."""
        return self._begun and not self.replayable

    def _check_replay(self) -> None:
        if self.spent:
            raise ContentError(
                "the content can be read only once, and has been; "
                "hand over bytes, a path or a file that can seek, or let it be spooled"
            )

    async def _new_feed(self) -> Feed:
        """Begin a pass; the one before is over."""
        if self.data is not None:
            self._begun = True
            return InlineFeed((self.data,), self._chunk_bytes)
        self._check_replay()
        self._begun = True
        await self._end_live()
        if self._spool is not None:
            self._live = SpoolFeed(self._spool)
        else:
            assert self.begin is not None
            self._live = self.begin(self._chunk_bytes, True)
        return self._live

    async def _end_live(self) -> None:
        live = self._live
        if live is None:
            return
        await live.aclose()
        job = live.under_way()
        if job is not None and not job.done():
            # It is the caller's file that this read is in: two at a time would mix up its position.
            await asyncio.wait((job,), timeout=self.timeout)
            if not job.done():
                raise silent(self.timeout)
        self._live = None

    async def peek(self, count: int = 4096) -> bytes:
        """Return the first bytes (up to `count`, at most 64 KiB) without consuming them.

        Raises:
            ContentError: as `chunks`; also while a pass is under way, unless as much has been peeked at before.
        """
        count = min(count, PEEK_BYTES)
        if self.data is not None:
            return self.data[:count]
        if self._head is None or len(self._head) < min(count, PEEK_BYTES):
            self._head = await self._read_head(count)
        return self._head[:count]

    async def _read_head(self, count: int) -> bytes:
        if self._live is not None or self.spent:
            raise ContentError("the first bytes can be looked at only before the content is read")
        if self._spool is not None:
            feed: Feed = SpoolFeed(self._spool, peek=True)
        else:
            assert self.begin is not None
            feed = self.begin(PEEK_BYTES, False)
        head = b""
        try:
            while len(head) < count:
                chunk = await feed.read()
                if not chunk:
                    break
                head += chunk
        except BaseException:
            self._live = feed  # so that the next pass waits for a read that is still under way
            raise
        finally:
            feed.close()
        return head[:PEEK_BYTES]

    def watched(self, seconds: float | None) -> Watching:
        """Limit the time without progress of whoever consumes the chunks.

        The async context manager raises TimeoutError when for `seconds` no chunk is asked for: before the first, from
        one handed out to the next, after the last until the block is left. Time spent waiting for the content
        is not counted. ``expired()`` of the `IdleWatch` that it yields tells this TimeoutError from others. None: no
        limit.
        """
        return Watching(self, seconds)

    async def aclose(self, *, within: float = SETTLE) -> None:
        """Release the spool and end a pass under way; idempotent. The caller's file stays open.

        Waits at most `within` seconds for a read of an open file that can seek: until that is over its position is not
        the caller's. What was given as a path has no such position, and is not waited for. A later save of the same
        open file waits for it too, as long as for any content.
        """
        live, self._live = self._live, None
        spool, self._spool = self._spool, None
        if live is None and spool is None:
            return
        self._begun, self.replayable = True, self.replayable and spool is None
        try:
            if live is not None:
                await live.aclose()
                job = None if self.opens else live.under_way()
                if job is not None and not job.done():
                    await asyncio.wait((job,), timeout=within)
        finally:
            if spool is not None:
                await spool.aclose()


class Watching:
    """What `Source.watched` returns. A class, because a generator would cost each small write as much as its timer."""

    __slots__ = ("_outer", "_seconds", "_source", "_watch")

    def __init__(self, source: Source, seconds: float | None) -> None:
        self._source = source
        self._seconds = seconds

    async def __aenter__(self) -> IdleWatch:
        source = self._source
        self._outer = source._watch
        self._watch = source._watch = IdleWatch(self._seconds, self._outer)
        return await self._watch.__aenter__()

    async def __aexit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._source._watch = self._outer
        await self._watch.__aexit__(exc_type, exc, traceback)


class Chunks(AsyncIterator[bytes]):
    """One pass over a `Source`. Not a generator: nothing is left to be finalised when it is dropped half-way."""

    __slots__ = ("_count", "_digest", "_feed", "_over", "_source")

    def __init__(self, source: Source) -> None:
        self._source = source
        self._feed: Feed | None = None
        self._digest = None if source._new_hash is None else Digest(source._new_hash)
        self._count = 0
        self._over = False

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> bytes:
        if self._over:
            raise StopAsyncIteration
        watch = self._source._watch
        if watch is not None:
            watch.pause()
        try:
            chunk = await self._next()
        except BaseException:
            self._end()
            raise
        finally:
            if watch is not None:
                watch.go_on()
        if not chunk:
            raise StopAsyncIteration
        return chunk

    async def _next(self) -> bytes:
        source = self._source
        if self._feed is None:
            self._feed = await source._new_feed()
        if self._digest is not None:
            await self._digest.room()
        chunk = await self._feed.read()
        size = source.size
        self._count += len(chunk)
        if size is not None and (self._count > size or (not chunk and self._count < size)):
            raise _wrong_size(size, self._count, more=bool(chunk))
        if chunk:
            if self._digest is not None:
                self._digest.add(chunk)  # while the consumer has it
            return chunk
        checksum = None if self._digest is None else f"{source.algorithm}:{await self._digest.hexdigest()}"
        self._end()
        source._seen_size, source._checksum = self._count, checksum
        return b""

    def _end(self) -> None:
        self._over = True
        if self._digest is not None:
            self._digest.drop()
        if self._feed is not None:
            self._feed.close()
            if self._source._live is self._feed and self._feed.under_way() is None:
                self._source._live = None

    async def aclose(self) -> None:
        """End the pass; idempotent."""
        self._end()
        if self._feed is not None:
            await self._feed.aclose()


def _wrong_size(declared: int, found: int, *, more: bool = False) -> ContentError:
    return ContentError(f"the content has {'at least ' if more else ''}{found} bytes, not {declared} as declared")
