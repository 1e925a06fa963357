"""Single operations of many tasks, carried out together: what waits at the same time shares one statement.

The first of them, when nothing else is under way, goes alone and at once, in its caller's own task. What comes while
something is under way, or while there was company the last time, waits until the event loop has run every task that
is ready, and goes together. So nobody waits for company that does not come, and a lone caller pays nothing.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Hashable, Sequence
from typing import Any

from ..cleanup import Cleanup
from ..errors import BackendUnavailable, DeadlineExceeded, StorageError
from ..loops import PerLoop

__all__ = ["Coalescer"]

_SHARE = 256  # operations in one statement at most
_FLYING = 2  # statements of one kind under way at a time
_MAX_WAITING = 100_000
_TICK = 0.05  # seconds between two looks at the deadlines of those who wait
_PAUSE = 0.05  # seconds until a row that was held is asked for again


class _Job:
    __slots__ = ("deadline", "future", "item", "key", "sent")

    def __init__(self, item: Any, key: Hashable, future: asyncio.Future[Any], deadline: float) -> None:
        self.item = item
        self.key = key
        self.future = future
        self.deadline = deadline
        self.sent = False


class _Queue:
    """The operations of one kind, in one event loop."""

    __slots__ = ("alone", "busy", "flying", "scheduled", "together", "waiting")

    def __init__(
        self,
        alone: Callable[[Any], Awaitable[Any]],
        together: Callable[[Sequence[Any]], Awaitable[Sequence[Any]]],
    ) -> None:
        self.alone = alone
        self.together = together
        self.waiting: list[_Job] = []
        self.flying = 0
        self.busy = False  # the last time there was company
        self.scheduled = False


class _Here:
    """What belongs to one event loop."""

    def __init__(self) -> None:
        self.loop = asyncio.get_running_loop()
        self.queues: dict[Hashable, _Queue] = {}
        self.watched: list[_Job] = []  # the oldest first
        self.ticking = False
        self.waiting = 0
        self.apart: asyncio.Semaphore | None = None  # since the first statement that was taken apart


class Coalescer:
    """Runs single operations together.

    Args:
        cleanup: holds the tasks in which statements for many run.
        timeout: seconds for one operation, waiting included; None for no limit.
        apart: whether an error of a statement for many means that it did nothing because of one of them; then each
            is tried alone.
        held: whether an error, raised or answered, means that nothing was done because somebody holds the row, for
            which no statement waits long; then the one that wants this row is tried until there is no time left.
        places: returns how many are tried again at a time in the running loop, so that those who wait for rows do not
            have all connections.
        failed: returns a new error of ours for one operation, given its kind and item, whose statement has failed.
    """

    def __init__(
        self,
        cleanup: Cleanup,
        timeout: float | None,
        *,
        apart: Callable[[BaseException], bool],
        held: Callable[[BaseException], bool],
        places: Callable[[], int],
        failed: Callable[[Any, Any, Exception], StorageError],
    ) -> None:
        self._cleanup = cleanup
        self._timeout = timeout
        self._apart = apart
        self._held = held
        self._places = places
        self._failed = failed
        self._here: PerLoop[_Here] = PerLoop(_Here)

    async def ask(
        self,
        kind: Hashable,
        item: Any,
        alone: Callable[[Any], Awaitable[Any]],
        together: Callable[[Sequence[Any]], Awaitable[Sequence[Any]]],
        *,
        key: Hashable = None,
    ) -> Any:
        """Return the answer for `item`: of ``alone(item)``, or its part of the answers of ``together(items)``.

        Items of one `kind` may share a statement, unless they have the same `key`.

        Cancelled while it waits, it does nothing; after that its outcome is unknown.

        Raises:
            DeadlineExceeded: no answer in time. BackendUnavailable: too many wait already. And what `alone` raises,
            or an answer of `together` that is an error.
        """
        here = self._here.get()
        queue = here.queues.get(kind)
        if queue is None:
            queue = here.queues[kind] = _Queue(alone, together)
        if not (queue.flying or queue.waiting or queue.busy):
            queue.flying = 1
            return await self._lone(here, kind, item, alone, queue)
        if here.waiting >= _MAX_WAITING:
            raise BackendUnavailable(f"{_MAX_WAITING} operations wait already")
        job = _Job(item, key, here.loop.create_future(), here.loop.time() + (self._timeout or 0.0))
        queue.waiting.append(job)
        here.waiting += 1
        self._next(here, kind, queue)
        if self._timeout is not None:
            here.watched.append(job)
            if not here.ticking:
                here.ticking = True
                here.loop.call_later(_TICK, self._tick, here)
        return await job.future

    async def by_itself(self, kind: Hashable, item: Any, alone: Callable[[Any], Awaitable[Any]]) -> Any:
        """Return ``alone(item)``, at once and never in company; otherwise as `ask`."""
        return await self._lone(self._here.get(), kind, item, alone, None)

    async def _lone(
        self, here: _Here, kind: Hashable, item: Any, alone: Callable[[Any], Awaitable[Any]], queue: _Queue | None
    ) -> Any:
        deadline = here.loop.time() + (self._timeout or 0.0)
        try:
            async with asyncio.timeout(self._timeout):
                return await alone(item)
        except Exception as error:
            if not self._held(error):
                raise
        finally:
            if queue is not None:
                queue.flying -= 1
                self._next(here, kind, queue)
        job = _Job(item, None, here.loop.create_future(), deadline)
        self._try_again(here, kind, alone, job)
        return await job.future

    def _next(self, here: _Here, kind: Hashable, queue: _Queue) -> None:
        """See to it that those who wait are sent, once the loop has run the tasks that are ready."""
        if queue.waiting:
            if not queue.scheduled and queue.flying < _FLYING:
                queue.scheduled = True
                here.loop.call_soon(self._send, here, kind, queue)
        elif not (queue.flying or queue.busy):
            here.queues.pop(kind, None)

    def _send(self, here: _Here, kind: Hashable, queue: _Queue) -> None:
        queue.scheduled = False
        jobs, left = self._split(queue.waiting, here.loop.time())
        here.waiting -= len(queue.waiting) - len(left)
        queue.waiting = left
        queue.busy = len(jobs) > 1
        if jobs:
            queue.flying += 1
            self._cleanup.start(self._fly(here, kind, queue, jobs), name="statement for many", log=False)
        self._next(here, kind, queue)

    async def _fly(self, here: _Here, kind: Hashable, queue: _Queue, jobs: list[_Job]) -> None:
        for job in jobs:
            job.sent = True
        try:
            async with asyncio.timeout(self._timeout):
                answers = await queue.together([job.item for job in jobs])
        except Exception as error:
            if self._apart(error):
                for job in jobs:
                    self._try_again(here, kind, queue.alone, job)
            else:
                for job in jobs:
                    if not job.future.done():
                        job.future.set_exception(self._failed(kind, job.item, error))
        except BaseException:  # cut short by a drain that took too long
            for job in jobs:
                _answer(job, _cut_short())
            raise
        else:
            for job, answer in zip(jobs, answers, strict=True):
                if isinstance(answer, StorageError) and self._held(answer):
                    self._try_again(here, kind, queue.alone, job)
                else:
                    _answer(job, answer)
        finally:
            queue.flying -= 1
            self._next(here, kind, queue)

    def _try_again(self, here: _Here, kind: Hashable, alone: Callable[[Any], Awaitable[Any]], job: _Job) -> None:
        """Try a job alone, in a task of its own, until there is an answer or its time is over."""
        places = here.apart = here.apart or asyncio.Semaphore(self._places())
        self._cleanup.start(self._fly_alone(places, kind, alone, job), name="statement", log=False)

    async def _fly_alone(
        self, places: asyncio.Semaphore, kind: Hashable, alone: Callable[[Any], Awaitable[Any]], job: _Job
    ) -> None:
        job.sent = False
        try:
            async with asyncio.timeout_at(job.deadline if self._timeout is not None else None):
                while True:
                    async with places:
                        if job.future.done():  # its caller is gone
                            return
                        job.sent = True
                        try:
                            _answer(job, await alone(job.item))
                            return
                        except Exception as error:
                            if not self._held(error):
                                raise
                        job.sent = False
                    await asyncio.sleep(_PAUSE)
        except Exception as error:
            if isinstance(error, TimeoutError) and not job.sent:
                self._expire(job)
            else:
                _answer(job, self._failed(kind, job.item, error))
        except BaseException:
            _answer(job, _cut_short())
            raise

    def _split(self, waiting: list[_Job], now: float) -> tuple[list[_Job], list[_Job]]:
        """Return those that can share the next statement, and those that wait on; who has given up is in neither."""
        jobs: list[_Job] = []
        left: list[_Job] = []
        keys: set[Hashable] = set()
        for number, job in enumerate(waiting):
            if len(jobs) == _SHARE:
                return jobs, left + waiting[number:]
            if self._timeout is not None and job.deadline <= now:
                self._expire(job)
            if job.future.done():
                continue
            if job.key is not None and job.key in keys:
                left.append(job)
                continue
            keys.add(job.key)
            jobs.append(job)
        return jobs, left

    def _expire(self, job: _Job) -> None:
        if not job.future.done():
            state = "without an answer" if job.sent else "waiting for others"
            text = f"no time was left after {self._timeout:g} seconds, {state}"
            job.future.set_exception(DeadlineExceeded(text, outcome_unknown=job.sent))

    def _tick(self, here: _Here) -> None:
        now = here.loop.time()
        for job in here.watched:
            if job.deadline > now:  # all have the same time, so those after it have more
                break
            self._expire(job)
        here.watched = [job for job in here.watched if not job.future.done()]
        here.ticking = bool(here.watched)
        if here.watched:
            here.loop.call_later(_TICK, self._tick, here)


def _cut_short() -> StorageError:
    return BackendUnavailable("closed while the statement was under way", outcome_unknown=True)


def _answer(job: _Job, answer: Any) -> None:
    if job.future.done():  # its caller is gone
        return
    if isinstance(answer, StorageError):
        job.future.set_exception(answer)
    else:
        job.future.set_result(answer)
