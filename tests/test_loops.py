"""One resource per event loop and process."""

from __future__ import annotations

import asyncio
import gc
import subprocess
import sys
import threading
import weakref

import pytest

from aproxy_storage.loops import PerLoop


class Pool:
    """Stands for a pool of connections; knows its loop, as they do."""

    def __init__(self) -> None:
        self.loop = asyncio.get_running_loop()


def test_one_per_loop() -> None:
    per_loop = PerLoop(Pool)

    async def twice() -> tuple[Pool, Pool]:
        return per_loop.get(), per_loop.get()

    first, second = asyncio.run(twice()), asyncio.run(twice())
    assert first[0] is first[1]
    assert second[0] is second[1]
    assert first[0] is not second[0]


@pytest.mark.asyncio
async def test_pop_forgets() -> None:
    per_loop = PerLoop(Pool)
    assert per_loop.pop() is None
    pool = per_loop.get()
    assert per_loop.pop() is pool
    assert per_loop.pop() is None
    assert per_loop.get() is not pool


def test_needs_a_running_loop() -> None:
    with pytest.raises(RuntimeError, match="no running event loop"):
        PerLoop(Pool).get()


@pytest.mark.asyncio
async def test_failing_factory_leaves_nothing() -> None:
    answers = iter([OSError("no"), "pool"])

    def make() -> object:
        answer = next(answers)
        if isinstance(answer, OSError):
            raise answer
        return answer

    per_loop = PerLoop(make)
    with pytest.raises(OSError, match="no"):
        per_loop.get()
    assert per_loop.get() == "pool"


def test_closed_loops_are_let_go() -> None:
    per_loop = PerLoop(Pool)

    async def use() -> weakref.ref[asyncio.AbstractEventLoop]:
        return weakref.ref(per_loop.get().loop)

    loops = [asyncio.run(use()) for _ in range(5)]
    gc.collect()
    assert [loop() is not None for loop in loops[:-1]] == [False] * 4


def test_first_use_in_many_threads_at_once() -> None:
    """Each loop keeps the instance that it got first, whoever else comes at the same time."""
    switch_interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    mixed = []
    try:
        for _ in range(300):
            per_loop = PerLoop(Pool)
            start = threading.Barrier(4)

            async def use(per_loop: PerLoop[Pool] = per_loop, start: threading.Barrier = start) -> None:
                start.wait()
                first = per_loop.get()
                await asyncio.sleep(0)
                if per_loop.get() is not first or first.loop is not asyncio.get_running_loop():
                    mixed.append(first)

            threads = [threading.Thread(target=lambda use=use: asyncio.run(use())) for _ in range(4)]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
    finally:
        sys.setswitchinterval(switch_interval)
    assert not mixed


_FORK = """
import asyncio, gc, os
from aproxy_storage.loops import PerLoop

class Connection:
    def __init__(self):
        self.pid = os.getpid()
    def __del__(self):
        if os.getpid() != self.pid:
            os.write(2, b"closed in the child")

per_loop = PerLoop(Connection)
async def in_child():
    other = per_loop.get()
    return other.pid == os.getpid() and per_loop.get() is other and per_loop.pop() is other
async def parent():
    mine = per_loop.get()
    child = os.fork()
    if child == 0:
        del mine
        ok = asyncio.run(in_child())
        gc.collect()
        os._exit(0 if ok else 1)
    _, status = os.waitpid(child, 0)
    assert os.waitstatus_to_exitcode(status) == 0
    assert per_loop.get() is mine
asyncio.run(parent())
"""


def test_nothing_crosses_a_fork() -> None:
    done = subprocess.run([sys.executable, "-c", _FORK], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (0, "")
