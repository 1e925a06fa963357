"""How copies are made: several originals written from one pass over the content, and copies that are missing later.

What `Replicate` decides is carried out here. `place_copies` is for a save, `Mender` for reconcile.
"""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import AsyncIterator, Sequence

from .attempts import Attempts, Job, Placed, Try, note, spent_on
from .content import Source
from .errors import AlreadyExists, BackendUnavailable, ContentError, StorageError
from .futures import outcome_of
from .placement import Limits
from .records import Place
from .writes import Write

__all__ = ["place_copies"]

_log = logging.getLogger(__name__)

_AHEAD = 4  # chunks that one original may lag behind before the others wait for it
_SMALL = 256 << 10  # bytes; content of up to so many is hashed before it is written, not beside
_STOP = 0.5  # seconds to wait for those that are dropped, so that nothing goes on after the return


async def place_copies(attempts: Attempts, job: Job, places: Sequence[Place], limits: Limits) -> Placed:
    """Write the content of `job` to the first ``limits.copies`` of `places` whose circuit is not open.

    Returns when all have it or have failed; at the deadline, if at least ``limits.quorum`` have it.

    Raises:
        BackendUnavailable, DeadlineExceeded …: below the quorum; the last error, with the others in ``attempts``.
        ContentError: the content failed. What an original refuses although it is in order, at once.
    """
    run = _Copies(attempts, job, limits)
    try:
        run.choose(places)
        return await run.place()
    except BaseException:
        await run.stop()
        raise


class _Copies:
    """The copies of one save."""

    def __init__(self, attempts: Attempts, job: Job, limits: Limits) -> None:
        self._attempts = attempts
        self._job = job
        self._limits = limits
        self._chosen: list[Try] = []
        self._running: dict[asyncio.Task[Placed], Try] = {}
        self._good: list[Place] = []
        clock = asyncio.get_running_loop().time
        self._clock = clock
        self._deadline = None if limits.deadline is None else clock() + limits.deadline

    def choose(self, places: Sequence[Place]) -> None:
        """Let attempts in at as many of `places` as there shall be copies.

        Here, not when each starts: where one original is to be probed, of all saves at a time one gets it, and the
        others have to take the next original.
        """
        for place in places:
            one = self._attempts.admit(self._job, place)
            if one is not None:
                self._chosen.append(one)
                if len(self._chosen) == self._limits.copies:
                    return
        if len(self._chosen) < self._limits.quorum:
            raise BackendUnavailable(
                f"{len(self._chosen)} of {len(places)} originals are not left alone at the moment, "
                f"and a save needs {self._limits.quorum}: nothing was tried"
            )

    async def place(self) -> Placed:
        """Write the content with all attempts that were let in."""
        job, write, chosen = self._job, self._job.write, self._chosen
        order = {one.place.original: index for index, one in enumerate(chosen)}
        data = write.source.data
        try:
            if data is not None:
                if len(data) <= _SMALL:
                    await write.source.measure()
                for one in chosen:
                    self._start(one, Source.of(data, checksum=None))
                await write.source.measure()  # of large content, beside the writes
            else:
                job.careful = job.rekey is not None  # its part of the stream cannot be read twice
                tee = _Tee(write, len(chosen), self._attempts.chunk_bytes)
                for one, branch in zip(chosen, tee.branches, strict=True):
                    task = self._start(one, branch.source())
                    task.add_done_callback(branch.close)
                await self._pump(tee)
            await self._wait()
        except ContentError as error:
            if job.write.failure is None:
                raise
            raise job.write.failure from error
        written = await write.written()
        async with job.naming:  # none is cut short in the middle of a change of the record
            await self.stop()
        return Placed(tuple(sorted(self._good, key=lambda place: order[place.original])), written)

    def _start(self, one: Try, source: Source) -> asyncio.Task[Placed]:
        task = self._attempts.start(self._job, one, source)
        self._running[task] = one
        return task

    async def _pump(self, tee: _Tee) -> None:
        """Feed the originals until the content ends, or too few are left, or the deadline is over."""
        limit = asyncio.timeout_at(self._deadline)
        try:
            async with limit:
                async for chunk in tee.chunks():
                    await tee.give(chunk)
                    self._collect(still=True)
        except TimeoutError:
            if not limit.expired():
                raise
            return
        tee.end()

    async def _wait(self) -> None:
        while self._running:
            left = None if self._deadline is None else self._deadline - self._clock()
            if left is not None and left <= 0:
                break
            await asyncio.wait(self._running, timeout=left, return_when=asyncio.FIRST_COMPLETED)
            self._collect(still=True)
        if len(self._good) < self._limits.quorum:
            raise self._last() if self._job.errors else self._too_late()

    def _collect(self, *, still: bool) -> None:
        """Take note of the attempts that have ended; raise where the save cannot succeed any more."""
        job = self._job
        for task in [task for task in self._running if task.done()]:
            one = self._running.pop(task)
            try:
                self._good += outcome_of(task).good
            except AlreadyExists as error:  # between the look and the write; its content is spent
                job.errors.append(error)
            except StorageError as error:
                if not self._attempts.falls_back(job, one.place, error):
                    raise note(error, job.errors)  # noqa: B904  it is the error itself
                job.errors.append(error)
                _log.warning(
                    "a copy could not be written to the original %r: %s", one.place.original, error,
                    extra={"original": one.place.original, "fallback": True},
                )  # fmt: skip
        if still and len(self._good) + len(self._running) < self._limits.quorum:
            raise self._last()

    def _last(self) -> StorageError:
        job = self._job
        last = job.errors.pop()
        if isinstance(last, AlreadyExists) and job.rekey is not None and job.write.source.spent:
            last = spent_on(last)
        return note(last, job.errors)

    def _too_late(self) -> BackendUnavailable:
        return BackendUnavailable(
            f"{len(self._good)} of {self._limits.copies} copies were done at the deadline of "
            f"{self._limits.deadline:g} seconds, and a save needs {self._limits.quorum}"
        )

    async def stop(self) -> None:
        """Drop those that are not done; they are not waited for beyond a moment."""
        tasks = [task for task in self._running if not task.done()]
        self._attempts.leave(self._job, self._running, outrun=False)
        for one in self._chosen:  # whoever has not started by now never does
            self._attempts.release(one)
        if tasks:
            await asyncio.wait(tasks, timeout=_STOP)


class _Tee:
    """One pass over the content of a write, for several originals."""

    def __init__(self, write: Write, count: int, chunk_bytes: int) -> None:
        self._write = write
        self.branches = [_Branch(write.source, chunk_bytes) for _ in range(count)]

    def chunks(self) -> AsyncIterator[bytes]:
        return self._write.source.chunks()

    async def give(self, chunk: bytes) -> None:
        """Hand `chunk` to every branch; waits for those that lag too far behind."""
        for branch in self.branches:
            await branch.give(chunk)

    def end(self) -> None:
        for branch in self.branches:
            branch.end()


class _Branch:
    """The chunks of the one pass, for one original: an asynchronous iterator with a bounded buffer."""

    def __init__(self, source: Source, chunk_bytes: int) -> None:
        self._of = source
        self._chunk_bytes = chunk_bytes
        self._chunks: deque[bytes] = deque()
        self._ended = False
        self._closed = False
        self._moved = asyncio.Event()

    def source(self) -> Source:
        return Source.of(self, size=self._of.size, chunk_bytes=self._chunk_bytes, checksum=None)

    async def give(self, chunk: bytes) -> None:
        while len(self._chunks) >= _AHEAD and not self._closed:
            self._moved.clear()
            await self._moved.wait()
        if not self._closed:
            self._chunks.append(chunk)
            self._moved.set()

    def end(self) -> None:
        self._ended = True
        self._moved.set()

    def close(self, _: object = None) -> None:
        """Take no more: the original is done, or has failed."""
        self._closed = True
        self._chunks.clear()
        self._moved.set()

    def __aiter__(self) -> AsyncIterator[bytes]:
        return self

    async def __anext__(self) -> bytes:
        while not self._chunks:
            if self._ended:
                raise StopAsyncIteration
            self._moved.clear()
            await self._moved.wait()
        self._moved.set()
        return self._chunks.popleft()
