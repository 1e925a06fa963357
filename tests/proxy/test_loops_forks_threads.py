"""One storage object, a constant of a module, used from several event loops, threads and processes.

Each test runs a program in a process of its own, where every warning is an error and every leak can be counted.
"""

from __future__ import annotations

import asyncio
import os
import sqlite3
import sys
from pathlib import Path

import pytest

from tests.proxy.support import REPOSITORY, SAFETY, assert_sound

pytestmark = pytest.mark.asyncio

# What every program begins with: a module-level storage, and eyes for leaks.
PRELUDE = """
import asyncio, logging, os, sys, threading, time, traceback
from pathlib import Path
from tests.proxy.support import storage_in

directory = Path(sys.argv[1])
storage = storage_in(directory, **eval(sys.argv[2]))
# Debug mode tells of slow callbacks: a busy machine is no finding.
logging.getLogger("asyncio").addFilter(lambda record: not record.getMessage().startswith("Executing "))


async def work(label, count=5):
    'Use every verb; nothing of one label may be seen under another.'
    async def one(number):
        content = f"{label} {number}".encode()
        path = await storage.save(f"{label}/{number}.txt", content)
        async with storage.open(path, verify=True) as file:
            assert await file.read() == content
        await storage.replace(path, content * 2)
        assert await storage.size(path) == 2 * len(content)
        path = (await storage.rename(path, f"{label}/renamed {number}.txt")).path
        copy = await storage.copy(path, f"{label}/copy {number}.txt")
        await storage.delete(copy)
        assert not await storage.exists(copy)
    async with asyncio.timeout(60), asyncio.TaskGroup() as group:
        for number in range(count):
            group.create_task(one(number))
    found = [record.path async for record in storage.list(f"{label}/")]
    assert found == sorted(f"{label}/renamed {number}.txt" for number in range(count)), found


async def work_and_close(label):
    await work(label)
    await storage.aclose()


def descriptors():
    return {fd: os.readlink(f"/proc/self/fd/{fd}") for fd in os.listdir("/proc/self/fd")
            if os.path.exists(f"/proc/self/fd/{fd}")}


def open_now():
    'The descriptors of the storage, and the threads, but for those that all storages share: they end when idle.'
    return (
        [name for name in descriptors().values() if str(directory) in name],
        [thread.name for thread in threading.enumerate()
         if thread is not threading.main_thread() and not thread.name.startswith("aproxy_storage-")],
    )


def assert_nothing_open():
    'Threads end a moment after they were told to; wait for that, not longer than a test may take.'
    for _ in range(1000):
        left = open_now()
        if left == ([], []):
            return
        time.sleep(0.01)
    raise AssertionError(f"left open: {left}")


def in_child(function):
    'Fork; run the function in the child; return its pid.'
    pid = os.fork()
    if pid:
        return pid
    code = 1
    try:
        function()
        code = 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stderr.flush()
        os._exit(code)


def wait(*pids):
    for pid in pids:
        _, status = os.waitpid(pid, 0)
        assert status == 0, f"a child ended with {status}"
"""


async def run(directory: Path, program: str, **options: object) -> dict[str, bytes]:
    """Run `program` after `PRELUDE`, hold that it was quiet and left all sound; return the files it has stored."""
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        *("-X", "dev", "-W", "error"),
        # Python 3.12 warns of every fork beside threads; that this library survives it is what is tested.
        *("-W", "ignore:This process:DeprecationWarning"),
        *("-c", PRELUDE + program, str(directory), repr(options)),
        cwd=REPOSITORY,
        env={**os.environ, "PYTHONPATH": str(REPOSITORY), "PYTHONASYNCIODEBUG": "0"},
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    try:
        async with asyncio.timeout(SAFETY):
            output, errors = await process.communicate()
    except TimeoutError:
        process.kill()
        await process.communicate()
        raise
    assert (process.returncode, errors.decode(), output.decode()) == (0, "", "")
    with sqlite3.connect(directory / "meta.sqlite3") as connection:
        assert connection.execute("PRAGMA integrity_check").fetchall() == [("ok",)]
    connection.close()
    return await assert_sound(directory)


def stored(*labels: str, count: int = 5) -> dict[str, bytes]:
    return {
        f"{label}/renamed {number}.txt": f"{label} {number}".encode() * 2 for label in labels for number in range(count)
    }


# -- loops


async def test_two_loops_in_two_threads_at_once(tmp_path: Path) -> None:
    program = """
errors = []

def run_loop(label):
    try:
        for turn in range(3):
            barrier.wait()
            asyncio.run(work_and_close(f"{label}{turn}") if turn == 1 else work(f"{label}{turn}"))
    except BaseException as error:
        errors.append(error)
        barrier.abort()

barrier = threading.Barrier(2)
threads = [threading.Thread(target=run_loop, args=(label,)) for label in "ab"]
for thread in threads:
    thread.start()
for thread in threads:
    thread.join()
assert not errors, errors
asyncio.run(storage.aclose())
assert_nothing_open()
"""
    assert await run(tmp_path, program) == stored("a0", "a1", "a2", "b0", "b1", "b2")


@pytest.mark.parametrize("close", [True, False], ids=["with aclose", "without aclose"])
async def test_ten_runs_in_a_row(tmp_path: Path, close: bool) -> None:
    program = f"""
for turn in range(10):
    asyncio.run({"work_and_close" if close else "work"}(f"run{{turn}}"))
    if {close}:
        assert_nothing_open()
    else:
        # What one run opened serves the next: 8 + 1 + 2 + 1 threads; the root, three files for each connection, and as
        # many kept in mind.
        files, threads = open_now()
        assert len(threads) <= 12, threads
        assert len(files) <= 13, files
if not {close}:
    asyncio.run(storage.aclose())
assert_nothing_open()
"""
    assert await run(tmp_path, program) == stored(*(f"run{turn}" for turn in range(10)))


async def test_runs_that_end_amid_calls(tmp_path: Path) -> None:
    """A loop that goes away with saves under way; what they have left, reconcile finishes."""
    program = """
async def leave_early(turn):
    tasks = [asyncio.create_task(storage.save(f"left {turn}/{number}", b"x" * 300_000)) for number in range(20)]
    for _ in range(turn * 3):
        await asyncio.sleep(0)
    # asyncio.run cancels them

for turn in range(8):
    asyncio.run(leave_early(turn))
asyncio.run(work_and_close("after"))
assert_nothing_open()
"""
    files = await run(tmp_path, program)
    assert stored("after").items() <= files.items()
    assert all(content == b"x" * 300_000 for path, content in files.items() if path.startswith("left"))


async def test_a_storage_that_is_never_closed_lets_the_interpreter_end(tmp_path: Path) -> None:
    assert await run(tmp_path, 'asyncio.run(work("a"))\n') == stored("a")


# -- forks


@pytest.mark.parametrize("closed", [True, False], ids=["closed before", "open"])
async def test_both_sides_of_a_fork_go_on(tmp_path: Path, closed: bool) -> None:
    program = f"""
asyncio.run({"work_and_close" if closed else "work"}("before"))

def child():
    asyncio.run(work("child"))
    inner = in_child(lambda: asyncio.run(work_and_close("grandchild")))
    asyncio.run(work_and_close("child again"))
    wait(inner)
    assert_nothing_open_of_mine()

def assert_nothing_open_of_mine():
    for _ in range(1000):
        if not open_now()[1]:
            return
        time.sleep(0.01)
    raise AssertionError(open_now())

pids = [in_child(child)]
asyncio.run(work("parent"))
wait(*pids)
asyncio.run(work_and_close("parent again"))
assert_nothing_open()
"""
    labels = ("before", "child", "grandchild", "child again", "parent", "parent again")
    assert await run(tmp_path, program) == stored(*labels)


async def test_forks_inside_a_running_loop(tmp_path: Path) -> None:
    program = """
async def main():
    await work("before")
    pids = []
    for number in range(3):
        pids.append(in_child(lambda: threadless(f"child{number}")))
        await work(f"parent{number}")
    await asyncio.to_thread(wait, *pids)
    await storage.aclose()

def threadless(label):
    asyncio.set_event_loop(None)
    asyncio._set_running_loop(None)
    asyncio.run(work_and_close(label))

asyncio.run(main())
assert_nothing_open()
"""
    labels = ("before", *(f"{side}{number}" for side in ("child", "parent") for number in range(3)))
    assert await run(tmp_path, program) == stored(*labels)


async def test_forks_while_another_thread_is_amid_calls(tmp_path: Path) -> None:
    program = """
errors, turns, done = [], [], threading.Event()

def busy():
    async def main():
        while not done.is_set():
            await work(f"busy{len(turns)}")
            turns.append(None)
        await storage.aclose()
    try:
        asyncio.run(main())
    except BaseException as error:
        errors.append(error)

thread = threading.Thread(target=busy)
thread.start()
for number in range(6):
    before = len(turns)
    wait(in_child(lambda: asyncio.run(work_and_close(f"child{number}"))))
    while len(turns) == before and not errors:  # it goes on
        time.sleep(0.001)
done.set()
thread.join()
assert not errors, errors
assert_nothing_open()
Path(directory, "turns").write_text(str(len(turns)))
"""
    files = await run(tmp_path, program)
    turns = int((tmp_path / "turns").read_text())
    labels = (*(f"busy{number}" for number in range(turns)), *(f"child{number}" for number in range(6)))
    assert files == stored(*labels)
