"""Bounded worker threads for blocking backends, where small jobs that wait together share a hop.

A hop into a thread and back costs more than most of the work done there: a wake-up of the worker, one of the event
loop. So a worker takes what waits, up to `share` jobs, and answers with one wake-up of the loop.

Why not ``ThreadPoolExecutor``: it wakes the loop for every job, and joins its threads when the interpreter exits, so
that one call hung in the kernel would keep the process alive for ever. These threads are daemons.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
import os
import threading
import time
from collections import deque
from collections.abc import Callable, Set
from typing import Any, ParamSpec, TypeVar

from .blocking import blocking_loop
from .errors import BackendUnavailable, DeadlineExceeded
from .loops import PerLoop

__all__ = ["Job", "Workers"]

P = ParamSpec("P")
T = TypeVar("T")

_PATIENCE = 0.01  # seconds that a batch of small jobs takes at most, while nothing waits for a disk or a network
_TICK = 0.05  # seconds between two looks at deadlines and stuck batches, while anything is under way
_SPARE = 7  # times `max_workers`: threads that may be started in the place of hung ones
_IDLE = 10.0  # seconds after which a worker without work ends

_OVER: concurrent.futures.Future[Any] = concurrent.futures.Future()  # in the place of one that has its answer
_OVER.set_result(None)


def _nothing() -> None:
    pass


class Job:
    """One function to be called in a worker, and where its answer goes."""

    __slots__ = ("answers", "deadline", "error", "function", "future", "started", "value")

    def __init__(
        self,
        function: Callable[[], Any],
        future: asyncio.Future[Any] | concurrent.futures.Future[Any],
        answers: _Answers | None,
    ) -> None:
        self.function = function
        self.future = future
        self.answers = answers  # None: the future is a concurrent one, and is answered at once
        self.deadline: float | None = None
        self.started = False
        self.value: Any = None
        self.error: BaseException | None = None

    def run(self) -> None:
        """Call the function and keep its result or error; called in the worker."""
        self.started = True
        # Nothing that the job has held outlives it, although the watch for deadlines holds the job until its next
        # tick: the arguments and results of a fast stream are many chunks by then.
        function, self.function = self.function, _nothing
        try:
            self.value = function()
        except StopIteration as error:
            # A future refuses it, and a coroutine that raised it would seem to have returned.
            self.error = RuntimeError("the function raised StopIteration")
            self.error.__cause__ = error
        except BaseException as error:
            self.error = error
        del self  # no cycle: error -> traceback -> frame -> job -> future -> error

    def drop(self) -> bool:
        """Let go of what a job holds whose future is done and that never began; return whether it is such a one."""
        # In this order, and `claim` the other way round: a worker that claims it now sees that it is done.
        if not self.future.done() or self.started:
            return False
        self.function = _nothing
        return True

    def resolve(self) -> None:
        """Give the result or error to whoever waits; called where the future may be touched."""
        error, self.error = self.error, None
        value, self.value = self.value, None
        future, self.future = self.future, _OVER
        if future.done():  # cancelled, or past its deadline
            return
        if error is None:
            future.set_result(value)
        else:
            future.set_exception(error)


class _Answers:
    """The loop side: delivers finished jobs and watches deadlines. One per event loop, used in its thread;
    workers only append to `done` and call `wake`."""

    def __init__(self, workers: Workers) -> None:
        self.loop = asyncio.get_running_loop()
        self.workers = workers
        self.done: deque[Job] = deque()
        self.watched: list[Job] = []
        self.timer: asyncio.TimerHandle | None = None

    def watch(self, job: Job) -> None:
        self.watched.append(job)
        if self.timer is None:
            self.timer = self.loop.call_later(_TICK, self.tick)

    def wake(self) -> None:
        with contextlib.suppress(RuntimeError):  # the loop is closed: nobody waits any more
            self.loop.call_soon_threadsafe(self.deliver)

    def deliver(self) -> None:
        done = self.done
        while done:
            done.popleft().resolve()

    def tick(self) -> None:
        """One timer for all: a timer per call would cost more than many a call."""
        self.workers.rescue()
        self.deliver()  # a finished job of a batch whose next job hangs is not kept waiting
        now = self.loop.time()
        watched, self.watched = self.watched, []
        dropped = False
        for job in watched:
            if job.future.done():
                dropped = job.drop() or dropped
                continue
            if job.deadline is not None and now >= job.deadline:
                # First done, then the look at `started`; `claim` does it the other way round. So of two that meet
                # at least one sees the other: what is said not to have begun is never run.
                error = DeadlineExceeded(outcome_unknown=True)
                job.future.set_exception(error)
                error.outcome_unknown = job.started
                where = "running in" if error.outcome_unknown else "waiting for"
                error.args = (f"no answer in time while {where} a worker thread",)
                dropped = job.drop() or dropped
            else:
                self.watched.append(job)
        if dropped:
            self.workers.forget()
        self.timer = self.loop.call_later(_TICK, self.tick) if self.watched else None


class _Nap:
    """The sleep of one idle worker."""

    __slots__ = ("dismissed", "signal")

    def __init__(self) -> None:
        self.signal = threading.Lock()  # held while the worker sleeps, released by whoever wakes it up
        self.signal.acquire()
        self.dismissed = False  # woken up in order to end


class Workers(concurrent.futures.Executor):
    """At most `max_workers` daemon threads, started on demand, ended when idle, started again after a fork.

    Args:
        name: begins the names of the threads.
        max_workers: threads; a job that hangs takes one out of service, so a hung disk starves only its owner.
        max_waiting: jobs that may wait; more raise BackendUnavailable at once.
        share: jobs that one worker takes in one go at most.
        hung: returns the threads, of whatever pool, that are known to hang. Up to seven times `max_workers` of ours do
            not count as workers, so that others take their places.

    Also a ``concurrent.futures.Executor``, for libraries that take one, such as aiofiles.

    What keeps a job from being forgotten: while jobs wait, some worker is awake, and a worker looks for jobs before it
    falls asleep or ends, under the lock. Awake are ``_count`` less the sleepers; of these, those of ``_running`` are at
    their batches, those of ``_looking`` are about to look again, and the rest have just been started or roused. So
    only threads that live may be counted, and a job that nobody would look at is not left in the queue.
    """

    def __init__(
        self,
        name: str,
        max_workers: int,
        *,
        max_waiting: int = 10_000,
        share: int = 16,
        hung: Callable[[], Set[int]] = frozenset,
    ) -> None:
        if max_workers < 1 or share < 1:
            raise ValueError("max_workers and share must be at least 1")
        self._name = name
        self._max_workers = max_workers
        self._max_waiting = max_waiting
        self._share = share
        self._hung = hung
        self._answers: PerLoop[_Answers] = PerLoop(lambda: _Answers(self))
        self._pid = 0
        self._fresh()

    def _fresh(self) -> None:
        self._pid = os.getpid()
        self._lock = threading.Lock()
        self._jobs: deque[Job] = deque()
        self._count = 0  # workers that have not ended and were not asked to
        self._serial = 0
        self._sleepers: list[_Nap] = []  # idle workers, the one that fell asleep last at the end
        self._looking: set[int] = set()  # threads that have done their batch and will look for the next one at once
        self._running: dict[int, tuple[float, deque[Job]]] = {}  # thread -> when its batch began, what is left of it

    # -- the asyncio side

    def call(self, function: Callable[..., T], *args: Any, timeout: float | None) -> asyncio.Future[T]:
        """Have `function` called in a worker; return the future of its result, bound to the running loop.

        After `timeout` seconds, queueing included, the future fails with DeadlineExceeded; a job that has not begun
        by then, or whose future was cancelled before it began, is never run, and lets go of what it holds within a
        tick. One that has begun runs to its end.

        In a thread that may block (see `blocking`) it is called there, now, without any limit.

        Raises:
            BackendUnavailable: too many jobs wait already, or there is no worker and none can be started; nothing is
                done then.
        """
        if (here := blocking_loop()) is not None:
            return here.perform(function, *args)
        answers = self._answers.get()
        future: asyncio.Future[T] = answers.loop.create_future()
        job = Job(lambda: function(*args), future, answers)
        if timeout is not None:
            job.deadline = answers.loop.time() + timeout
        self._put(job)
        answers.watch(job)
        return future

    def _put(self, job: Job) -> None:
        if self._pid != os.getpid():
            self._fresh()
        with self._lock:
            if len(self._jobs) >= self._max_waiting:
                raise BackendUnavailable(
                    f"{self._name}: {self._max_waiting} jobs wait for {self._max_workers} worker threads already"
                )
            self._jobs.append(job)
            if job.answers is None or self._share == 1 or self._is_slow():  # nobody would come back to rouse later
                self._rouse_for(1)

    def _is_slow(self) -> bool:
        """Return whether no worker will look at the jobs soon.

        Small jobs are mostly system calls, each of which lets go of the GIL; several workers at them, and the loop,
        take longer to get it back than the calls take. So one does them all, until it is seen to be slow: then the
        jobs wait for something (a disk, a network), and more workers help. `rescue` looks again at every tick.
        """
        awake = self._count - len(self._sleepers)
        if awake > len(self._running):
            return False
        late = time.monotonic() - _PATIENCE
        return all(began < late for began, _ in self._running.values())

    def _rouse_for(self, new: int) -> None:
        """Rouse a worker for the last so many jobs, which were just put; take them back if there is none for them.

        Raises:
            BackendUnavailable: they were taken back.
        """
        try:
            self._rouse()
        except BackendUnavailable:
            for _ in range(new):
                self._jobs.pop()
            raise

    def _rouse(self) -> None:
        """Have one more worker look at the jobs, if one is to be had; called with the lock held.

        Raises:
            BackendUnavailable: there is no worker at all, and none can be started; never while another one lives.
        """
        if len(self._jobs) <= len(self._looking):
            return  # whoever puts a job because of an answer is often faster than the worker that gave the answer
        if self._sleepers:
            # The one that worked last: its memory is warm. Passing on big chunks takes half the time that it takes
            # with the workers in turn, which is what a condition variable would do.
            self._sleepers.pop().signal.release()
        elif self._count < self._max_workers or self._count < self._max_workers + self._count_hung():
            self._serial += 1
            thread = threading.Thread(target=self._serve, name=f"{self._name}-{self._serial}", daemon=True)
            self._count += 1
            try:
                thread.start()
            except (RuntimeError, MemoryError) as error:  # the limit of the system, perhaps for a moment only
                self._count -= 1
                if self._count == 0:
                    raise BackendUnavailable(f"{self._name}: no worker thread could be started: {error}") from error

    def _count_hung(self) -> int:
        return min(len(self._hung() & self._running.keys()), self._max_workers * _SPARE)

    # -- the worker side

    def _serve(self) -> None:
        nap = _Nap()
        me = threading.get_ident()
        while (batch := self._next_batch(nap)) is not None:
            try:
                self.run_batch(batch)
            except BaseException:  # a bug in a subclass: the thread is lost, its place is not
                with self._lock:
                    self._looking.discard(me)
                    self._count -= 1
                raise
            finally:
                with self._lock:
                    self._running.pop(me, None)

    def _next_batch(self, nap: _Nap) -> deque[Job] | None:
        """Wait for jobs and take some; None when the worker is to end."""
        while True:
            with self._lock:
                self._looking.discard(threading.get_ident())
                if len(self._jobs) > self._share and self._is_slow():
                    self._rouse()
                if self._jobs:
                    # A fair part of what waits, so that the others who are awake find something to do too.
                    take = min(self._share, -(-len(self._jobs) // (self._count - len(self._sleepers))))
                    batch = deque(self._jobs.popleft() for _ in range(take))
                    self._running[threading.get_ident()] = (time.monotonic(), batch)
                    return batch
                self._sleepers.append(nap)
            if not nap.signal.acquire(timeout=_IDLE):
                with self._lock:
                    if nap in self._sleepers:
                        self._sleepers.remove(nap)
                        self._count -= 1
                        return None
                nap.signal.acquire()  # woken up just after the time was over
            if nap.dismissed:
                return None

    def run_batch(self, batch: deque[Job]) -> None:
        """Run the jobs of `batch`, taking each out before it starts, and hand the answers over at the end.

        Called in a worker. A subclass may wrap the whole batch, in a transaction for example.
        """
        answered: set[_Answers] = set()
        while True:
            try:
                job = batch.popleft()  # atomic: `rescue` takes from the other end
            except IndexError:
                break
            if self.claim(job):
                job.run()
                self.answer(job, answered)
            del job  # see `Job.run`, whose frame leads here
        if answered:
            self._looking.add(threading.get_ident())
        for answers in answered:
            answers.wake()

    @staticmethod
    def claim(job: Job) -> bool:
        """Return whether `job` is still wanted; from here on a concurrent future cannot be cancelled any more."""
        if isinstance(job.future, concurrent.futures.Future):
            return job.future.set_running_or_notify_cancel()
        job.started = True  # before the look, see `_Answers.tick`
        return not job.future.done()

    @staticmethod
    def answer(job: Job, answered: set[_Answers]) -> None:
        """Give a job that has run its answer, or put it up for the wake-up of its loop, noted in `answered`."""
        if job.answers is None:
            job.resolve()
        else:
            job.answers.done.append(job)
            answered.add(job.answers)

    def rescue(self) -> None:
        """Put jobs that wait behind a long or hung one of their batch back into the queue."""
        if not self._running:
            return
        now = time.monotonic()
        with self._lock:
            for began, batch in self._running.values():
                if now - began < _TICK:
                    continue
                while True:
                    try:
                        self._jobs.appendleft(batch.pop())
                    except IndexError:
                        break
            if self._jobs and self._is_slow():
                self._rouse()

    def forget(self) -> None:
        """Take the jobs out of the queue that nobody waits for any more, so that others may wait in their place."""
        with self._lock:
            wanted = [job for job in self._jobs if job.answers is None or not job.future.done()]
            self._jobs.clear()
            self._jobs.extend(wanted)

    # -- concurrent.futures.Executor

    def submit(self, fn: Callable[P, T], /, *args: P.args, **kwargs: P.kwargs) -> concurrent.futures.Future[T]:
        """Have `fn` called in a worker; return a concurrent future."""
        future: concurrent.futures.Future[T] = concurrent.futures.Future()
        self._put(Job(lambda: fn(*args, **kwargs), future, None))
        return future

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        """Let idle workers end at once; busy ones end when they have been idle for a while, as always.

        Does not wait, whatever `wait` says. The pool can be used again at once.
        """
        if self._pid != os.getpid():
            return
        with self._lock:
            self._count -= len(self._sleepers)
            while self._sleepers:
                nap = self._sleepers.pop()
                nap.dismissed = True
                nap.signal.release()
