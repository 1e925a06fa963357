"""Worker threads: shared hops, hung jobs, deadlines, several loops, forks."""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
import gc
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path

import aiofiles
import pytest

from aproxy_storage import threads
from aproxy_storage.errors import BackendUnavailable, DeadlineExceeded
from aproxy_storage.threads import Workers


def _threads_of(name: str) -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name.startswith(f"{name}-")]


async def _until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(10):
        while not condition():  # noqa: ASYNC110  what is waited for happens in other threads
            await asyncio.sleep(0.005)


@contextlib.contextmanager
def blocker() -> Iterator[threading.Event]:
    """An event that is set at the end whatever happens, so that no worker outlives its test."""
    event = threading.Event()
    try:
        yield event
    finally:
        event.set()


@pytest.mark.asyncio
async def test_call_runs_elsewhere_and_gives_the_result() -> None:
    workers = Workers("t-result", 2)
    assert await workers.call(threading.get_ident, timeout=5) != threading.get_ident()
    assert await workers.call(divmod, 7, 2, timeout=None) == (3, 1)


@pytest.mark.asyncio
async def test_error_reaches_the_caller_without_a_reference_cycle() -> None:
    workers = Workers("t-error", 1)

    class Held:
        pass

    def fail() -> None:
        held = Held()
        alive.append(weakref.ref(held))
        raise ValueError("no")

    alive: list[weakref.ref[Held]] = []
    gc.disable()
    try:
        with contextlib.suppress(ValueError):
            await workers.call(fail, timeout=5)
        await _until(lambda: alive[0]() is None)  # its frame is gone with the error, without the collector
    finally:
        gc.enable()


@pytest.mark.asyncio
async def test_finished_job_keeps_neither_its_arguments_nor_its_result(monkeypatch: pytest.MonkeyPatch) -> None:
    # The watch for deadlines looks at a job until its next tick: at full speed that is many chunks of a stream.
    monkeypatch.setattr(threads, "_TICK", 3600.0)
    workers = Workers("t-memory", 1)

    class Chunk:
        pass

    argument = Chunk()
    result = await workers.call(lambda _: Chunk(), argument, timeout=5)
    await workers.call(int, timeout=5)  # the worker has let go of the first job
    seen = [weakref.ref(argument), weakref.ref(result)]
    del argument, result
    assert [reference() for reference in seen] == [None, None]


@pytest.mark.asyncio
async def test_stop_iteration_reaches_the_caller_as_runtime_error() -> None:
    workers = Workers("t-stop", 1)
    with pytest.raises(RuntimeError) as caught:
        await asyncio.wait_for(workers.call(next, iter(()), timeout=None), 5)
    assert isinstance(caught.value.__cause__, StopIteration)
    assert await asyncio.wait_for(workers.call(int, "7", timeout=None), 5) == 7


@pytest.mark.asyncio
async def test_jobs_that_wait_together_share_a_hop(monkeypatch: pytest.MonkeyPatch) -> None:
    wakes = 0
    wake = threads._Answers.wake

    def counted(self: threads._Answers) -> None:
        nonlocal wakes
        wakes += 1
        wake(self)

    monkeypatch.setattr(threads._Answers, "wake", counted)
    workers = Workers("t-share", 1, share=16)
    with blocker() as free:
        first = workers.call(free.wait, timeout=None)
        await _until(lambda: not workers._jobs)
        rest = [workers.call(threading.get_ident, timeout=None) for _ in range(32)]
        free.set()
        await first
        assert len(set(await asyncio.gather(*rest))) == 1
    assert wakes == 3  # the blocked one, and twice sixteen


@pytest.mark.asyncio
async def test_rest_of_a_hung_batch_is_rescued() -> None:
    workers = Workers("t-rescue", 2, share=16)
    with blocker() as free, blocker() as hung:
        held = [workers.call(free.wait, timeout=None) for _ in range(2)]
        await _until(lambda: not workers._jobs)
        stuck = workers.call(hung.wait, timeout=None)
        rest = [workers.call(int, str(n), timeout=None) for n in range(6)]
        free.set()
        assert await asyncio.wait_for(asyncio.gather(*rest), 5) == list(range(6))
        assert not stuck.done()
        hung.set()
        await asyncio.gather(stuck, *held)


@pytest.mark.asyncio
async def test_answer_of_a_finished_job_is_not_held_back_by_a_hung_one_of_its_batch() -> None:
    workers = Workers("t-behind", 1, share=16)
    with blocker() as free, blocker() as hung:
        held = workers.call(free.wait, timeout=None)
        await _until(lambda: not workers._jobs)
        quick = workers.call(int, "1", timeout=None)
        stuck = workers.call(hung.wait, timeout=None)
        free.set()
        assert await asyncio.wait_for(quick, 5) == 1
        assert not stuck.done()
        hung.set()
        await asyncio.gather(stuck, held)


@pytest.mark.asyncio
async def test_deadline_of_a_queued_and_of_a_running_job() -> None:
    workers = Workers("t-deadline", 1)
    ran = []
    with blocker() as free:
        running = workers.call(free.wait, timeout=0.1)
        await _until(lambda: not workers._jobs)
        queued = workers.call(ran.append, 1, timeout=0.1)
        with pytest.raises(DeadlineExceeded, match="running in") as of_running:
            await running
        with pytest.raises(DeadlineExceeded, match="waiting for") as of_queued:
            await queued
        assert of_running.value.outcome_unknown
        assert not of_queued.value.outcome_unknown
    assert await workers.call(int, "3", timeout=5) == 3
    assert not ran  # what nobody waits for any more is not begun


@pytest.mark.asyncio
@pytest.mark.parametrize("ended", ["cancelled", "out of time"])
async def test_job_that_ends_before_it_began_holds_nothing_and_is_in_nobodys_way(ended: str) -> None:
    workers = Workers("t-given-up", 1, max_waiting=1)

    class Chunk:
        pass

    argument = Chunk()
    seen = weakref.ref(argument)
    with blocker() as free:
        held = workers.call(free.wait, timeout=None)
        await _until(lambda: not workers._jobs)
        job = workers.call(id, argument, timeout=0.01 if ended == "out of time" else None)
        del argument
        if ended == "cancelled":
            job.cancel()
        await asyncio.wait((job,))
        await _until(lambda: not workers._jobs)  # at the next tick: the thread still hangs
        assert seen() is None
        last = workers.call(int, "3", timeout=5)
        free.set()
        await held
    assert await last == 3
    if not job.cancelled():
        assert isinstance(job.exception(), DeadlineExceeded)


@pytest.mark.asyncio
async def test_cancelled_before_it_began_is_never_run() -> None:
    workers = Workers("t-cancel", 1)
    ran = []
    with blocker() as free:
        held = workers.call(free.wait, timeout=None)
        await _until(lambda: not workers._jobs)
        job = workers.call(ran.append, 1, timeout=None)
        submitted = workers.submit(ran.append, 2)
        job.cancel()
        assert submitted.cancel()
        free.set()
        await held
    await workers.call(int, timeout=5)
    assert not ran


@pytest.mark.asyncio
async def test_running_concurrent_future_cannot_be_cancelled() -> None:
    workers = Workers("t-running", 1)
    with blocker() as free:
        future = workers.submit(free.wait)
        await _until(future.running)
        assert not future.cancel()
    assert await asyncio.wrap_future(future)


@pytest.mark.asyncio
async def test_full_queue_is_refused_at_once() -> None:
    workers = Workers("t-full", 1, max_waiting=2)
    with blocker() as free:
        jobs = [workers.call(free.wait, timeout=None)]
        await _until(lambda: not workers._jobs)
        jobs += [workers.call(bool, timeout=None) for _ in range(2)]
        with pytest.raises(BackendUnavailable, match="t-full: 2 jobs wait for 1"):
            workers.call(bool, timeout=None)
        free.set()
        await asyncio.gather(*jobs)
    assert await workers.call(int, "5", timeout=5) == 5


@pytest.mark.asyncio
async def test_no_more_threads_than_allowed_and_a_second_job_gets_a_second_one() -> None:
    workers = Workers("t-most", 2, share=1)
    await workers.call(bool, timeout=5)  # one idle worker
    with blocker() as free:
        jobs = [workers.call(free.wait, timeout=None) for _ in range(2)]
        await _until(lambda: not workers._jobs)  # both are running: the second did not wait for the first
        jobs += [workers.call(free.wait, timeout=None) for _ in range(5)]
        await asyncio.sleep(0.1)
        assert len(_threads_of("t-most")) == 2
        free.set()
        await asyncio.gather(*jobs)


@pytest.mark.asyncio
async def test_threads_that_hang_are_made_up_for_within_bounds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(threads, "_SPARE", 2)
    hung: set[int] = set()
    workers = Workers("t-hung", 1, share=1, hung=lambda: hung)
    begun: list[int] = []
    with blocker() as event:

        def hang() -> None:
            begun.append(threading.get_ident())
            event.wait(60)

        jobs = [workers.call(hang, timeout=60)]
        await _until(lambda: len(begun) == 1)
        late = workers.call(int, timeout=60)
        assert len(_threads_of("t-hung")) == 1
        hung.update(begun)
        assert await asyncio.wait_for(late, 10) == 0, "also what waited already"
        for count in (2, 3):
            jobs.append(workers.call(hang, timeout=60))
            await _until(lambda count=count: len(begun) == count)  # type: ignore[misc]
            hung.update(begun)
        late = workers.call(int, timeout=60)
        assert len(_threads_of("t-hung")) == 3
        assert not late.done()
    assert await asyncio.wait_for(late, 10) == 0
    await asyncio.gather(*jobs)


@pytest.mark.asyncio
async def test_one_after_the_other_needs_one_thread() -> None:
    workers = Workers("t-one", 8, share=1)
    idents = {await workers.call(threading.get_ident, timeout=5) for _ in range(50)}
    assert len(idents) == 1


def test_two_loops_in_two_threads_get_their_own_answers() -> None:
    workers = Workers("t-loops", 2)

    async def work(start: int) -> list[int]:
        return await asyncio.gather(*[workers.call(int, str(n), timeout=10) for n in range(start, start + 500)])

    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        answers = [pool.submit(asyncio.run, work(start)) for start in (0, 1000)]
        assert [future.result(60) for future in answers] == [list(range(500)), list(range(1000, 1500))]


def test_answer_for_a_loop_that_is_closed_is_dropped() -> None:
    workers = Workers("t-closed", 1)
    with blocker() as free:

        async def leave() -> None:
            workers.call(free.wait, timeout=None).cancel()
            workers.call(bool, timeout=None)
            await asyncio.sleep(0)

        asyncio.run(leave())
        free.set()
    assert asyncio.run(_int(workers)) == 1


async def _int(workers: Workers) -> int:
    return await workers.call(int, "1", timeout=5)


@pytest.mark.asyncio
async def test_shutdown_ends_idle_threads_and_the_pool_goes_on() -> None:
    workers = Workers("t-shutdown", 3, share=1)
    with blocker() as free:
        jobs = [workers.call(free.wait, timeout=None) for _ in range(3)]
        await _until(lambda: len(_threads_of("t-shutdown")) == 3 and not workers._jobs)
        free.set()
        await asyncio.gather(*jobs)
    await _until(lambda: len(workers._sleepers) == 3)
    workers.shutdown()
    await _until(lambda: not _threads_of("t-shutdown"))
    assert await workers.call(int, "2", timeout=5) == 2
    assert len(_threads_of("t-shutdown")) == 1


@pytest.mark.asyncio
async def test_idle_threads_end_by_themselves(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(threads, "_IDLE", 0.02)
    workers = Workers("t-idle", 2)
    for _ in range(20):  # also: what is put just when a worker gives up is not lost
        assert await asyncio.wait_for(workers.call(int, "1", timeout=None), 5) == 1
        await asyncio.sleep(0.02)
    await _until(lambda: not _threads_of("t-idle"))
    assert workers._count == 0


@pytest.mark.asyncio
async def test_worker_lost_to_a_bug_is_replaced(monkeypatch: pytest.MonkeyPatch) -> None:
    class Broken(Workers):
        def run_batch(self, batch: object) -> None:
            raise ZeroDivisionError

    seen: list[object] = []
    monkeypatch.setattr(threading, "excepthook", seen.append)
    workers = Broken("t-broken", 1)
    for expected in (1, 2):
        workers.submit(bool)
        await _until(lambda expected=expected: len(seen) == expected)  # type: ignore[misc]
    assert workers._count == 0


class NoThreads:
    """Keeps the pool `name` from starting threads while `failing` is set; counts what it has kept back."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
        self.failing: Exception | None = RuntimeError("can't start new thread")
        self.refused = 0
        start = threading.Thread.start

        def refuse(thread: threading.Thread) -> None:
            if self.failing is not None and thread.name.startswith(name):
                self.refused += 1
                raise self.failing
            start(thread)

        monkeypatch.setattr(threading.Thread, "start", refuse)


@pytest.mark.asyncio
@pytest.mark.parametrize("error", [RuntimeError("can't start new thread"), MemoryError()])
@pytest.mark.parametrize("share", [1, 16])
async def test_thread_that_cannot_be_started_is_told_and_tried_again(
    share: int, error: Exception, monkeypatch: pytest.MonkeyPatch
) -> None:
    no_threads = NoThreads(monkeypatch, "t-unstarted")
    no_threads.failing = error
    workers = Workers("t-unstarted", 2, share=share)
    ran: list[int] = []
    for put in (lambda: workers.call(ran.append, 1, timeout=None), lambda: workers.submit(ran.append, 1)):
        with pytest.raises(BackendUnavailable, match="t-unstarted: no worker thread could be started") as caught:
            put()
        assert caught.value.retryable
        assert not caught.value.outcome_unknown
    no_threads.failing = None
    await workers.call(ran.append, 2, timeout=5)
    assert ran == [2], "who was told that nothing was done is not done after all"


@pytest.mark.asyncio
async def test_thread_that_cannot_be_started_beside_others_is_done_without(monkeypatch: pytest.MonkeyPatch) -> None:
    no_threads = NoThreads(monkeypatch, "t-beside")
    no_threads.failing = None
    workers = Workers("t-beside", 3, share=2)
    with blocker() as free:
        held = workers.call(free.wait, timeout=None)
        await _until(lambda: not workers._jobs)
        no_threads.failing = RuntimeError("can't start new thread")
        rest = [workers.call(int, str(n), timeout=None) for n in range(6)]
        await _until(lambda: no_threads.refused > 0)  # at a tick: the one worker is seen to be slow
        free.set()
        assert await asyncio.wait_for(asyncio.gather(*rest), 10) == list(range(6))
        await held
    no_threads.failing = None
    with blocker() as free:
        jobs = [workers.call(free.wait, timeout=None) for _ in range(3)]
        await _until(lambda: len(_threads_of("t-beside")) == 3)  # all of them are still to be had
        free.set()
        await asyncio.gather(*jobs)


@pytest.mark.asyncio
async def test_aiofiles_runs_on_it(tmp_path: Path) -> None:
    workers = Workers("t-aiofiles", 1)
    name = tmp_path / "a.bin"
    async with aiofiles.open(name, "wb", executor=workers) as file:
        await file.write(b"12345")
        with pytest.raises(ValueError, match="whence"):
            await file.seek(0, 17)
    async with aiofiles.open(name, "rb", executor=workers) as file:
        assert await file.read() == b"12345"
    assert len(_threads_of("t-aiofiles")) == 1


_FORK = """
import asyncio, os, sys, time, warnings
from aproxy_storage.threads import Workers
warnings.simplefilter("ignore", DeprecationWarning)  # fork with threads: what this is about
workers = Workers("forked", 2)
async def work():
    return await workers.call(os.getpid, timeout=10)
assert asyncio.run(work()) == os.getpid()
child = os.fork()
if child == 0:
    ok = asyncio.run(work()) == os.getpid()
    workers.shutdown()
    os._exit(0 if ok else 1)
_, status = os.waitpid(child, 0)
assert os.waitstatus_to_exitcode(status) == 0
assert asyncio.run(work()) == os.getpid()
print("both sides work")
"""

_HUNG_AT_EXIT = """
import asyncio, threading
from aproxy_storage.threads import Workers
async def main():
    Workers("hung", 1).call(threading.Event().wait, timeout=None)
    await asyncio.sleep(0.1)
asyncio.run(main())
print("over")
"""


@pytest.mark.parametrize(("script", "said"), [(_FORK, "both sides work"), (_HUNG_AT_EXIT, "over")])
def test_in_a_process_of_its_own(script: str, said: str) -> None:
    began = time.monotonic()
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert said in done.stdout
    assert time.monotonic() - began < 50


def test_nonsense_is_refused() -> None:
    with pytest.raises(ValueError, match="at least 1"):
        Workers("t-none", 0)
