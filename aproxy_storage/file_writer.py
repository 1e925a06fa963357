"""The handle that writes a file, which appears only when it is whole."""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

from .errors import ContentError, IntegrityError, NotSupported
from .futures import outcome_of, seen
from .records import MetaRecord

if TYPE_CHECKING:
    from .proxy_writing import WritingVerbs

__all__ = ["AsyncWriter"]


class AsyncWriter:
    """A file open for writing. It appears under its path, whole, when it is closed without an exception.

    Until then nothing is visible; an exception in the ``async with`` block, a cancellation or a crash publishes
    nothing. Holds at most three chunks in memory. Several tasks of one event loop may write to it: what each `write` is
    given stays in one piece. In another loop than the one that it was opened in it can only be given up.
    """

    def __init__(self, storage: WritingVerbs, path: str, mode: str, chunk_bytes: int) -> None:
        self.name = path
        self.mode = mode
        self.closed = False
        self.record: MetaRecord | None = None  # of the new file, once it is published
        #: Awaited by `aclose` with that record; returns what it is then. For those who open files on behalf of others.
        self._then: Callable[[MetaRecord], Awaitable[MetaRecord]] | None = None
        self._chunk_bytes = chunk_bytes
        self._pending = bytearray()  # less than a chunk
        self._chunks: deque[bytes] = deque()
        self._ended = False
        self._torn = False  # of some write a part was passed on, and the rest never came
        self._turn = asyncio.Lock()  # held while a write is passed on, and by `aclose`
        self._loop = asyncio.get_running_loop()
        self._closing: asyncio.Future[None] | None = None  # while a task is in `aclose`
        self._moved = asyncio.Event()  # something was put, taken or ended
        self._written = 0
        self._task = storage.cleanup.start(
            storage.write_to(path, self._drain(), exclusive=mode == "xb"),
            name=f"writing of {path!r}",
            context=contextvars.copy_context(),
            log=False,
        )
        self._task.add_done_callback(lambda _: self._moved.set())

    async def write(self, data: Any) -> int:
        """Add `data` (bytes-like); return its length in bytes. Waits while the original is slower than the caller.

        A write that is cancelled has added nothing, and may be tried again; or, where a part of it was on its way
        already (it is longer than a chunk), the file can no more be published: writing on, or closing, raises.

        Raises:
            The error of the save, as soon as it is known. BackendUnavailable: the storage was closed meanwhile.
            ContentError: an earlier write was cancelled half-way. NotSupported: this is another event loop.
        """
        self._check_writable()
        view = memoryview(data).cast("B")
        if self._turn.locked() or len(self._pending) + len(view) >= self._chunk_bytes:
            async with self._turn:
                self._check_writable()
                await self._add(view)
        else:
            self._pending += view
        self._written += len(view)
        return len(view)

    async def tell(self) -> int:
        """Return how many bytes were written."""
        return self._written

    async def aclose(self) -> None:
        """Publish the file, once the writes under way are over; idempotent. A cancellation here publishes nothing,
        unless it comes too late for that.

        While another task is closing it, waits for that and raises the same, but when cancelled leaves it alone. Does
        nothing once that is over, or after `abort`.

        Raises:
            ContentError: a write was cancelled half-way. NotSupported: this is another event loop; nothing is done.
            BackendUnavailable: the storage was closed, or the other task that was closing the file was cancelled.
            Whatever `ProxyStorage.save` or `replace` raises.
        """
        if (closing := self._closing) is not None:
            self._check_loop()
            await asyncio.wait((closing,))
            return closing.result()
        if self.closed:
            return
        self._check_loop()
        closing = self._closing = self._loop.create_future()
        closing.add_done_callback(seen)
        try:
            await self._publish()
        except Exception as error:
            closing.set_exception(error)
            raise
        except BaseException:
            self._task.add_done_callback(lambda _: self._tell(closing))
            raise
        else:
            closing.set_result(None)
        finally:
            self._closing = None

    def _tell(self, closing: asyncio.Future[None]) -> None:
        """Tell those who wait for a task that was closing the file, and was cancelled, what has come of it."""
        try:
            self.record = outcome_of(self._task)
        except BaseException as error:  # also what is to end the process: they hear of it instead of waiting on
            closing.set_exception(error)
        else:
            closing.set_result(None)

    async def _publish(self) -> None:
        try:
            async with self._turn:
                self._check_writable()
                if self._pending:
                    await self._room()
                    self._pass_on(bytes(self._pending))
                self.closed = True
                self._ended = True
                self._moved.set()
                await asyncio.wait({self._task})
        except BaseException:
            await self.abort()
            raise
        self.record = outcome_of(self._task)
        if self._then is not None:
            self.record = await self._then(self.record)

    async def abort(self) -> None:
        """Publish nothing; idempotent."""
        self.closed = True
        if asyncio.get_running_loop() is self._loop:
            self._task.cancel()
            await asyncio.wait({self._task})
        else:
            with contextlib.suppress(RuntimeError):  # closed; and what ran in it was cancelled
                self._loop.call_soon_threadsafe(self._task.cancel)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if exc_type is None:
            await self.aclose()
        elif not self.closed:
            await self.abort()

    def _check_writable(self) -> None:
        if self.closed:
            raise ValueError(f"{self.name!r} is closed")
        self._check_loop()
        if self._torn:
            raise ContentError(
                f"a write to {self.name!r} was cancelled half-way, so the file would have a hole; open it anew",
                operation="write", path=self.name,
            )  # fmt: skip

    def _check_loop(self) -> None:
        if asyncio.get_running_loop() is not self._loop:
            raise NotSupported(
                f"{self.name!r} was opened for writing in another event loop; open, write and close it in one",
                operation="write", path=self.name,
            )  # fmt: skip

    async def _add(self, view: memoryview) -> None:
        """Pass on what fills a chunk, and keep the rest."""
        start = 0
        try:
            while len(self._pending) + len(view) - start >= self._chunk_bytes:
                await self._room()
                stop = start + self._chunk_bytes - len(self._pending)
                self._pass_on(bytes(self._pending) + view[start:stop] if self._pending else bytes(view[start:stop]))
                start = stop
        except BaseException:
            self._torn = start > 0 and not self._task.done()  # else the save has an error of its own
            raise
        self._pending += view[start:]

    async def _room(self) -> None:
        while self._chunks and not self._task.done():
            self._moved.clear()
            await self._moved.wait()
        if self._task.done():
            outcome_of(self._task)  # raises: it cannot be finished before the end of the content
            raise IntegrityError(f"the writing of {self.name!r} ended before its content did")

    def _pass_on(self, chunk: bytes) -> None:
        """Hand a chunk over that begins with what is pending; there is room for it."""
        self._pending.clear()
        self._chunks.append(chunk)
        self._moved.set()

    async def _drain(self) -> AsyncIterator[bytes]:
        while True:
            if self._chunks:
                chunk = self._chunks.popleft()
                self._moved.set()
                yield chunk
            elif self._ended:
                return
            else:
                self._moved.clear()
                await self._moved.wait()
