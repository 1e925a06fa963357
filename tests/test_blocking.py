"""The loop of a thread that may block: what a coroutine meets there, and what of it no other thread is asked for."""

import asyncio
import contextlib
import gc
import os
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from aproxy_storage import AlreadyExists, ProxyStorage, blocking
from aproxy_storage.backends.filesystem import FileSystemBackend
from aproxy_storage.backends.memory import MemoryBackend
from aproxy_storage.blocking import BlockingLoop, blocking_loop, run_blocking
from aproxy_storage.fallback import Fallback, Original
from aproxy_storage.loops import PerLoop
from aproxy_storage.meta_backends.memory import MemoryMetaBackend
from aproxy_storage.meta_backends.sqlite import SQLiteMetaBackend
from aproxy_storage.records import MetaRecord
from aproxy_storage.threads import Workers
from aproxy_storage.tools.reconcile import reconcile

ROOT = Path(__file__).parent.parent


def in_thread(function: Callable[[], Any]) -> Any:
    """Return what `function` returns in a thread of its own."""
    answer: list[Any] = []
    thread = threading.Thread(target=lambda: answer.append(function()))
    thread.start()
    thread.join(30)
    return answer[0]


# -- the loop


def test_a_coroutine_runs_in_the_calling_thread_as_in_any_loop() -> None:
    async def work() -> list[Any]:
        loop = asyncio.get_running_loop()
        told: list[Any] = [type(loop) is BlockingLoop, blocking_loop() is loop, loop.is_running()]
        told.append(threading.get_ident())
        await asyncio.sleep(0)
        await asyncio.sleep(0.01)
        answer = loop.create_future()
        threading.Timer(0.01, loop.call_soon_threadsafe, (answer.set_result, "from a thread")).start()
        told.append(await answer)
        told += await asyncio.gather(asyncio.sleep(0.02, "late"), asyncio.sleep(0.01, "early"))
        told.append(await asyncio.to_thread(threading.get_ident))
        return told

    me = threading.get_ident()
    assert run_blocking(work()) == [True, True, True, me, "from a thread", "late", "early", me]
    assert blocking_loop() is None
    with pytest.raises(RuntimeError, match="no running event loop"):
        asyncio.get_running_loop()


def test_deadlines_and_errors_are_those_of_any_loop() -> None:
    async def late() -> None:
        async with asyncio.timeout(0.02):
            await asyncio.Event().wait()

    async def wrong() -> None:
        raise KeyError("x")

    async def spinning() -> None:
        async with asyncio.timeout(0.02):
            while True:  # noqa: ASYNC110
                await asyncio.sleep(0)

    for work, error in ((late, TimeoutError), (wrong, KeyError), (spinning, TimeoutError)):
        with pytest.raises(error):
            run_blocking(work())


def test_an_error_in_a_callback_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    async def work() -> str:
        asyncio.get_running_loop().call_soon(lambda: 1 / 0)
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        return "done"

    assert run_blocking(work()) == "done"
    assert "ZeroDivisionError" in caplog.text


def test_what_was_started_beside_a_call_ends_with_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(blocking, "_GRACE", 0.05)
    ended: list[str] = []
    tasks = []

    async def beside(seconds: float, name: str) -> None:
        try:
            await asyncio.sleep(seconds)
            ended.append(name)
        except asyncio.CancelledError:
            ended.append(f"{name} cancelled")
            raise

    async def work() -> None:
        tasks.append(asyncio.create_task(beside(0.01, "short")))
        tasks.append(asyncio.create_task(beside(60, "endless")))

    run_blocking(work())
    assert ended == ["short", "endless cancelled"]
    assert all(task.done() for task in tasks)


@pytest.mark.parametrize("where", ["in the work", "while it waits"])
def test_an_interrupt_comes_up_after_the_cleanup(where: str) -> None:
    told: list[str] = []

    def interrupt() -> None:
        raise KeyboardInterrupt

    async def work() -> None:
        try:
            if where == "in the work":
                interrupt()
            asyncio.get_running_loop().call_later(0.01, interrupt)
            await asyncio.sleep(60)
        finally:
            await asyncio.sleep(0.01) if where == "while it waits" else None
            told.append("cleaned up")

    with pytest.raises(KeyboardInterrupt):
        run_blocking(work())
    assert told == ["cleaned up"]
    assert run_blocking(asyncio.sleep(0, "goes on")) == "goes on"


def test_a_call_within_a_call_has_a_loop_of_its_own() -> None:
    async def inner() -> asyncio.AbstractEventLoop:
        await asyncio.sleep(0.001)
        return asyncio.get_running_loop()

    async def outer() -> tuple[object, object]:
        here = blocking_loop()
        assert here is not None
        assert here.apart(asyncio._get_running_loop) is None
        return here, here.apart(run_blocking, inner())

    mine, other = run_blocking(outer())
    assert mine is not other


def test_a_thread_takes_its_loop_along() -> None:
    made: PerLoop[object] = PerLoop(list)

    async def use() -> asyncio.AbstractEventLoop:
        made.get()
        return asyncio.get_running_loop()

    loops = [weakref.ref(in_thread(lambda: run_blocking(use()))) for _ in range(3)]
    in_thread(lambda: run_blocking(use()))
    gc.collect()
    assert [loop() for loop in loops] == [None] * 3


def test_a_thread_with_a_loop_is_refused() -> None:
    async def outer() -> asyncio.AbstractEventLoop:
        with pytest.raises(RuntimeError, match="await the call"):
            run_blocking(asyncio.sleep(0))
        return asyncio.get_running_loop()

    assert type(asyncio.run(outer())) is not BlockingLoop


# -- workers and records


def test_a_job_for_workers_is_done_at_once() -> None:
    workers = Workers("never started", 1)

    def stop() -> None:
        raise StopIteration

    async def work() -> list[Any]:
        told: list[Any] = [await workers.call(threading.get_ident, timeout=1.0)]
        for wrong in (lambda: 1 / 0, stop):
            future = workers.call(wrong, timeout=1.0)
            assert future.done()
            told.append(type(future.exception()))
        return told

    assert run_blocking(work()) == [threading.get_ident(), ZeroDivisionError, RuntimeError]
    assert not any(thread.name.startswith("never started") for thread in threading.enumerate())


def storage_in(directory: Path, **options: Any) -> ProxyStorage:
    return ProxyStorage(
        "here", originals=FileSystemBackend(directory / "files"), meta=SQLiteMetaBackend(directory / "r.db"), **options
    )


async def rounds(storage: ProxyStorage) -> None:
    path = await storage.save("a/b.txt", b"one")
    assert await storage.save("a/b.txt", b"two") != path
    await storage.replace(path, b"three" * 1000)
    async with storage.open(path) as file:
        assert await file.read() == b"three" * 1000
    await storage.copy(path, "c.txt")
    await storage.rename("c.txt", "d.txt")
    with pytest.raises(AlreadyExists):
        await storage.write_to("d.txt", b"", exclusive=True)
    assert [record.path async for record in storage.list("")][-1] == "d.txt"
    for record in [record async for record in storage.list("")]:
        await storage.delete(record.path)


def test_all_verbs_work_without_another_thread_for_bytes(tmp_path: Path) -> None:
    storage = storage_in(tmp_path)
    assert storage.works_here
    run_blocking(rounds(storage))
    names = {thread.name for thread in threading.enumerate()}
    assert not {name for name in names if str(tmp_path) in name}, "no worker was started"
    assert run_blocking(reconcile(storage, dry_run=False, force=True)).clean
    assert not [path for path in (tmp_path / "files").rglob("*") if path.is_file()]
    run_blocking(storage.aclose())


def test_only_what_needs_no_loop_works_here(tmp_path: Path) -> None:
    class Hooked(ProxyStorage):
        pass

    class Watched(FileSystemBackend):
        async def write(self, *args: Any, **options: Any) -> Any:
            await asyncio.sleep(0)
            return await super().write(*args, **options)

    files, records = FileSystemBackend(tmp_path / "f"), SQLiteMetaBackend(tmp_path / "r.db")
    not_here = {
        "hooks": Hooked("x", originals=files, meta=records),
        "a backend of somebody's": ProxyStorage("x", originals=Watched(tmp_path / "f"), meta=records),
        "shared memory": ProxyStorage("x", originals=MemoryBackend(), meta=records),
        "memory": ProxyStorage("x", originals=files, meta=MemoryMetaBackend()),
        "several": ProxyStorage("x", originals={"a": files, "b": FileSystemBackend(tmp_path / "g")}, meta=records),
        "a fallback": ProxyStorage("x", originals=files, meta=records, placement=Fallback()),
        "tidying": ProxyStorage("x", originals=files, meta=records, tidy_every=60),
        "slots": ProxyStorage("x", originals=Original(files, max_concurrency=2), meta=records),
    }
    assert ProxyStorage("x", originals=files, meta=records).works_here
    assert [why for why, storage in not_here.items() if storage.works_here] == []


def test_a_thread_whose_turn_does_not_come_leaves_the_write_to_the_writer(tmp_path: Path) -> None:
    meta = SQLiteMetaBackend(tmp_path / "r.db")
    record = MetaRecord("a", "s", "o", "k", token="t")
    run_blocking(meta.setup())
    held = meta._engine.writing()
    with held.lock:
        answer = threading.Thread(target=lambda: run_blocking(meta.create(record)))
        answer.start()
        time.sleep(0.1)
        assert answer.is_alive()
    answer.join(30)
    assert run_blocking(meta.get("a")).token == "t"
    assert any(thread.name.startswith("aproxy-sqlite-r.db-writer") for thread in threading.enumerate())
    run_blocking(meta.aclose())


def test_an_interrupt_within_a_transaction_undoes_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    meta = SQLiteMetaBackend(tmp_path / "r.db")
    run_blocking(meta.create(MetaRecord("before", "s", "o", "k1", token="t")))
    insert = SQLiteMetaBackend._insert

    def interrupted(self: SQLiteMetaBackend, *args: Any) -> MetaRecord:
        insert(self, *args)
        raise KeyboardInterrupt

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(SQLiteMetaBackend, "_insert", interrupted)
        run_blocking(meta.create(MetaRecord("a", "s", "o", "k2", token="t")))
    run_blocking(meta.create(MetaRecord("after", "s", "o", "k3", token="t")))

    async def paths() -> list[str]:
        return [record.path async for record in meta.list("")]

    assert run_blocking(paths()) == ["after", "before"]
    run_blocking(meta.aclose())


@pytest.mark.parametrize("at", ["create", "remove"])
def test_an_interrupt_of_a_save_leaves_nothing(at: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The bytes have just got their name, or are about to."""
    from aproxy_storage.backends._draft import Draft

    storage = storage_in(tmp_path)
    create = Draft.create

    def interrupted(self: Draft, data: bytes) -> Any:
        if at == "create":
            create(self, data)
        raise KeyboardInterrupt

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(Draft, "create", interrupted)
        run_blocking(storage.save("a.txt", b"x"))
    with contextlib.suppress(FileNotFoundError):
        assert not [path for path in (tmp_path / "files").rglob("*") if path.is_file()]
    assert not run_blocking(storage.exists("a.txt"))
    run_blocking(reconcile(storage, dry_run=False, force=True))
    assert run_blocking(storage.save("a.txt", b"y")) == "a.txt"
    run_blocking(storage.aclose())


def test_threads_and_loops_race_for_the_same_names(tmp_path: Path) -> None:
    """Threads that block, and a loop, over one storage: every name is given once, every file has its bytes."""
    storage = storage_in(tmp_path)
    taken: list[tuple[str, bytes]] = []

    def save(number: int) -> None:
        for turn in range(25):
            data = b"%d of %d" % (turn, number)
            taken.append((run_blocking(storage.save(f"{turn}.txt", data)), data))

    async def in_a_loop() -> None:
        async def one(turn: int) -> None:
            data = b"%d in a loop" % turn
            taken.append((await storage.save(f"{turn}.txt", data), data))

        async with asyncio.TaskGroup() as group:
            for turn in range(25):
                group.create_task(one(turn))
        await storage.aclose()

    threads = [threading.Thread(target=save, args=(number,)) for number in range(6)]
    threads.append(threading.Thread(target=lambda: asyncio.run(in_a_loop())))
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert len({path for path, _ in taken}) == len(taken) == 7 * 25

    async def compare() -> None:
        for path, data in taken:
            async with storage.open(path, verify=True) as file:
                assert await file.read() == data

    run_blocking(compare())
    run_blocking(storage.aclose())


@pytest.mark.parametrize("kind", ["KeyboardInterrupt", "Signal"])
def test_signals_at_any_moment_leave_all_in_order(kind: str, tmp_path: Path) -> None:
    """In a process of its own: a signal may come up within the locks of a coverage tool too."""
    kept = {key: value for key, value in os.environ.items() if not key.startswith(("COV", "PYTEST"))}
    done = subprocess.run(
        [sys.executable, "-m", "tests.signals", kind, tmp_path],
        env={**kept, "PYTHONPATH": str(ROOT)},
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert int(done.stdout) > 10, "signals that arrived"
