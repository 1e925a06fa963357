"""The bridge alone: whose loop, whose thread, whose variables; interrupts, forks, the end of the process."""

import asyncio
import contextlib
import contextvars
import faulthandler
import gc
import os
import signal
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from asgiref.local import Local
from asgiref.sync import AsyncToSync, ThreadSensitiveContext, async_to_sync, sync_to_async

from sync_bridge import _asgiref, _contexts
from sync_bridge._asgiref import AsgirefEntry, OwnEntry
from sync_bridge.bridge import Bridge, BridgeClosed, BridgeError, SyncCallOnEventLoop

BOTH_WAYS = pytest.mark.parametrize("bridge", ["own", "asgiref"], indirect=True)


@pytest.fixture
def bridge(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[Bridge]:
    through_asgiref = getattr(request, "param", "own") == "asgiref"
    if through_asgiref:
        monkeypatch.setattr(_asgiref, "OwnEntry", AsgirefEntry)
    one = Bridge("test-bridge", grace=2.0)
    one.call(asyncio.sleep, 0)
    assert isinstance(entry_of(one), AsgirefEntry if through_asgiref else OwnEntry)
    yield one
    one.close()


def entry_of(bridge: Bridge) -> Any:
    assert bridge._current is not None
    return bridge._current.entry


async def which_loop() -> asyncio.AbstractEventLoop:
    return asyncio.get_running_loop()


# -- one loop, the caller's thread


@BOTH_WAYS
def test_all_threads_share_one_loop(bridge: Bridge) -> None:
    with ThreadPoolExecutor(8) as pool:
        loops = set(pool.map(lambda _: bridge.call(which_loop), range(200)))
    assert len(loops) == 1
    assert sum(thread.name == "test-bridge" for thread in threading.enumerate()) == 1


@BOTH_WAYS
def test_thread_sensitive_code_runs_in_the_calling_thread(bridge: Bridge) -> None:
    async def ask() -> int:
        return await sync_to_async(threading.get_ident)()

    assert bridge.call(ask) == threading.get_ident()
    with ThreadPoolExecutor(1) as pool:
        assert pool.submit(lambda: bridge.call(ask) == threading.get_ident()).result()


@BOTH_WAYS
def test_context_variables_go_in_and_come_back(bridge: Bridge) -> None:
    variable, local = contextvars.ContextVar("variable", default=0), Local()

    async def look_and_change() -> tuple[int, str]:
        seen = variable.get(), local.text
        variable.set(2)
        local.text = "out"
        return seen

    variable.set(1)
    local.text = "in"
    assert bridge.call(look_and_change) == (1, "in")
    assert (variable.get(), local.text) == (2, "out")


@BOTH_WAYS
def test_calls_nest(bridge: Bridge) -> None:
    async def down(depth: int) -> list[int]:
        here = await sync_to_async(threading.get_ident)()
        return [here, *(await sync_to_async(bridge.call)(down, depth - 1))] if depth else [here]

    assert bridge.call(down, 5) == [threading.get_ident()] * 6

    async def from_a_foreign_thread() -> asyncio.AbstractEventLoop:
        return await asyncio.to_thread(bridge.call, which_loop)

    assert bridge.call(from_a_foreign_thread) is bridge.call(which_loop)


@BOTH_WAYS
def test_errors_are_those_of_the_coroutine(bridge: Bridge) -> None:
    async def fail() -> None:
        raise KeyError("k")

    async def cancel_itself() -> None:
        raise asyncio.CancelledError

    with pytest.raises(KeyError, match="k"):
        bridge.call(fail)
    with pytest.raises(asyncio.CancelledError):
        bridge.call(cancel_itself)
    assert bridge._current is not None
    assert not bridge._current._under_way
    assert not bridge._current.calls
    assert not bridge._current._callers


def test_asgiref_is_as_it_was_afterwards(bridge: Bridge) -> None:
    async def main() -> None:
        def both() -> tuple[object, object]:
            return bridge.call(which_loop), async_to_sync(which_loop)()

        bridged, plain = await sync_to_async(both)()
        assert plain is asyncio.get_running_loop()
        assert bridged is not plain
        async with ThreadSensitiveContext():
            assert await sync_to_async(bridge.call)(which_loop) is bridged

    asyncio.run(main())
    own = async_to_sync(which_loop)()  # this thread came from nowhere: a loop of its own, closed by now
    assert own is not bridge.call(which_loop)
    assert own.is_closed()


# -- on a loop thread


def test_a_call_on_an_event_loop_is_refused_before_a_coroutine_is_made(bridge: Bridge) -> None:
    made = []

    async def work() -> None:
        """Never made here."""

    def factory() -> Any:
        made.append(1)
        return work()

    async def main() -> None:
        with pytest.raises(SyncCallOnEventLoop, match=r"await .*sync_to_async"):
            bridge.call(factory)

    asyncio.run(main())
    bridge.call(main)  # the bridge's own loop is one too
    assert not made


# -- interrupts


@BOTH_WAYS
def test_an_interrupt_cancels_and_the_cleanup_still_has_this_thread(bridge: Bridge) -> None:
    steps: list[Any] = []

    async def work() -> None:
        try:
            threading.Timer(0.05, os.kill, (os.getpid(), signal.SIGINT)).start()
            await asyncio.sleep(30)
        except asyncio.CancelledError:
            steps.append(await sync_to_async(threading.get_ident)())
            raise

    with pytest.raises(KeyboardInterrupt):
        bridge.call(work)
    assert steps == [threading.get_ident()]
    assert bridge.call(which_loop)


def test_a_cleanup_that_hangs_delays_an_interrupt_for_the_grace_only() -> None:
    bridge = Bridge(grace=0.1)

    async def work() -> None:
        threading.Timer(0.05, os.kill, (os.getpid(), signal.SIGINT)).start()
        while True:
            with contextlib.suppress(asyncio.CancelledError):
                await asyncio.sleep(1.0)
                return

    with pytest.raises(KeyboardInterrupt):
        bridge.call(work)
    bridge.close()


# -- what nobody waits for


def wait_until(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)


def test_what_is_posted_has_no_context_of_the_caller(bridge: Bridge, caplog: pytest.LogCaptureFixture) -> None:
    variable = contextvars.ContextVar("variable", default="clean")
    variable.set("request")
    seen: list[str] = []

    async def look() -> None:
        seen.append(variable.get())
        raise ValueError("logged, not raised")

    bridge.post(look)
    wait_until(lambda: "ValueError" in caplog.text)
    assert seen == ["clean"]


# -- closing


@BOTH_WAYS
def test_closing_ends_waiting_calls(bridge: Bridge) -> None:
    bridge.grace = 0.2
    began, errors = threading.Semaphore(0), []

    async def hang() -> None:
        began.release()
        await asyncio.sleep(60)

    def caller() -> None:
        try:
            bridge.call(hang)
        except BaseException as error:
            errors.append(type(error))

    threads = [threading.Thread(target=caller) for _ in range(4)]
    for thread in threads:
        thread.start()
    for _ in threads:
        began.acquire()
    bridge.close()
    for thread in threads:
        thread.join(10)
    assert errors == [BridgeClosed] * 4
    with pytest.raises(BridgeClosed):
        bridge.call(which_loop)
    bridge.close()


def test_closers_run_on_the_loop_in_reverse_and_a_failing_one_stops_nobody(caplog: pytest.LogCaptureFixture) -> None:
    bridge, closed = Bridge(grace=0.2), []

    def closer(name: str) -> Any:
        async def close() -> None:
            closed.append((name, asyncio.get_running_loop(), await sync_to_async(threading.get_ident)()))
            if name == "failing":
                raise OSError("gone")
            if name == "hanging":
                await asyncio.sleep(60)

        return close

    for name in ("first", "hanging", "failing", "last"):
        bridge.on_close(closer(name))
    loop = bridge.call(which_loop)
    bridge.close()
    here = threading.get_ident()
    assert closed == [(name, loop, here) for name in ("last", "failing", "hanging", "first")]
    assert caplog.text.count("failed") == 2
    assert loop.is_closed()


def test_a_bridge_that_was_never_used_starts_no_thread() -> None:
    before = threading.active_count()
    Bridge().close()
    assert threading.active_count() == before


# -- the start


def test_an_asgiref_that_has_changed_is_noticed_and_gone_around(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    # The attribute is set as before, and asgiref looks elsewhere.
    monkeypatch.setattr(_contexts, "_CURRENT", "executor_of_asgiref_5")
    bridge = Bridge()

    async def ask() -> tuple[object, int]:
        return asyncio.get_running_loop(), await sync_to_async(threading.get_ident)()

    with contextlib.closing(bridge):
        assert bridge.call(ask) == (bridge.call(which_loop), threading.get_ident())
        assert isinstance(entry_of(bridge), AsgirefEntry)
    assert "not as the bridge knows it" in caplog.text


def test_an_asgiref_that_cannot_be_used_at_all_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_asgiref, "_works", lambda *_: False)
    bridge = Bridge("unusable")
    with pytest.raises(BridgeError, match="asgiref"):
        bridge.call(which_loop)
    wait_until(lambda: not any(thread.name == "unusable" for thread in threading.enumerate()))


@pytest.mark.parametrize(
    ("module", "attributes"),
    [
        ("gevent.monkey", {"is_module_patched": lambda name: name == "threading"}),
        ("eventlet.patcher", {"is_monkey_patched": lambda name: name == "thread"}),
        ("uwsgi", {"opt": {b"processes": b"2"}}),
    ],
)
def test_where_threads_do_not_work_the_bridge_is_refused(
    module: str, attributes: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, module, type("Module", (), attributes))
    with pytest.raises(BridgeError, match="--enable-threads"):
        Bridge().call(which_loop)


def test_gevent_itself_is_refused() -> None:
    program = """
from gevent import monkey
monkey.patch_all()
import asyncio
from sync_bridge.bridge import BridgeError, bridge
try:
    bridge.call(asyncio.sleep, 0)
except BridgeError as error:
    print(error)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60)
    assert "gevent has patched threading" in done.stdout, done.stderr


# -- forks


@BOTH_WAYS
def test_twenty_forks_amid_running_calls(bridge: Bridge) -> None:
    async def work() -> int:
        await asyncio.sleep(0.001)
        return os.getpid()

    stop, errors = threading.Event(), []

    def caller() -> None:
        while not stop.is_set():
            try:
                assert bridge.call(work) == os.getpid()
            except BaseException as error:
                errors.append(error)
                return

    threads = [threading.Thread(target=caller) for _ in range(4)]
    for thread in threads:
        thread.start()
    try:
        for _ in range(20):
            assert in_child(lambda: bridge.call(work) == os.getpid())
    finally:
        stop.set()
        for thread in threads:
            thread.join()
    assert not errors


@BOTH_WAYS
def test_a_fork_while_another_thread_holds_the_lock_of_asgiref(bridge: Bridge) -> None:
    executors = vars(AsyncToSync.executors)
    lock = executors.get("_lock") or executors["_thread_lock"]  # as asgiref before 3.12 calls it
    held, forked = threading.Event(), threading.Event()

    def hold() -> None:
        with lock:
            held.set()
            forked.wait(60)

    holder = threading.Thread(target=hold)
    holder.start()
    held.wait(60)
    try:
        assert in_child(lambda: bridge.call(sync_to_async(threading.get_ident)) == threading.get_ident())
    finally:
        forked.set()
        holder.join()


def in_child(check: Callable[[], bool]) -> bool:
    """Fork, and return whether `check` was true in the child."""
    child = os.fork()
    if child == 0:
        faulthandler.register(signal.SIGALRM, chain=True)
        signal.alarm(20)
        code = 1
        try:
            code = 0 if check() else 2
        except BaseException:
            traceback.print_exc()
        os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


def test_a_child_leaves_the_parents_resources_alone(bridge: Bridge) -> None:
    closed = []

    async def close() -> None:
        closed.append(os.getpid())

    bridge.on_close(close)
    loop = bridge.call(which_loop)

    def child() -> bool:
        other = bridge.call(which_loop)
        gc.collect()
        bridge.close()
        return other is not loop and closed == [os.getpid()]

    assert in_child(child)
    assert not closed
    assert bridge.call(which_loop) is loop


# -- the end of the process

ENDING = """
import asyncio, os, threading, time
from concurrent.futures import ThreadPoolExecutor
from sync_bridge.bridge import bridge

async def close():
    print("closed", flush=True)

async def work(seconds=0.0):
    await asyncio.sleep(seconds)
    return "done"

def late(seconds):
    time.sleep(seconds)
    os.write(1, f"late {bridge.call(work)}\\n".encode())  # in one piece: two may end at once

bridge.grace = 1.0
bridge.on_close(close)
bridge.call(work)
"""


@pytest.mark.parametrize(
    ("end", "code", "late"),
    [
        ("", 0, 0),
        ("raise SystemExit(3)", 3, 0),
        ("1 / 0", 1, 0),
        ("threading.Thread(target=late, args=(0.2,)).start()", 0, 1),
        ("pool = ThreadPoolExecutor(2); [pool.submit(late, 0.1) for _ in range(4)]", 0, 4),
        # Daemons in the middle of calls: one that ends in time, and some that never would.
        ("threading.Thread(target=bridge.call, args=(work, 0.2), daemon=True).start(); time.sleep(0.1)", 0, 0),
        (
            (
                "threading.excepthook = lambda args: None\n"
                "for _ in range(4): threading.Thread(target=bridge.call, args=(work, 60), daemon=True).start()\n"
                "time.sleep(0.1)"
            ),
            0,
            0,
        ),
    ],
)
def test_the_process_ends_cleanly(end: str, code: int, late: int) -> None:
    command = [sys.executable, "-X", "dev", "-W", "error", "-c", ENDING + end]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == code, done.stderr
    assert done.stdout.count("closed") == 1
    assert done.stdout.count("late done") == late
    assert "Warning" not in done.stderr
    assert "never awaited" not in done.stderr
    assert ("Traceback" in done.stderr) == (code == 1), done.stderr


@BOTH_WAYS
def test_a_cancelled_request_leaves_the_call_of_its_thread_alone(bridge: Bridge) -> None:
    """asgiref cancels what a thread has called, in the loop that the thread was started from. Ours is another loop."""
    ended = threading.Event()

    async def work() -> None:
        try:
            await asyncio.sleep(1.0)
        finally:
            ended.set()

    async def request() -> None:
        view = asyncio.create_task(sync_to_async(bridge.call, thread_sensitive=False)(work))
        await asyncio.sleep(0.2)
        view.cancel()
        with pytest.raises(asyncio.CancelledError):
            await view

    asyncio.run(request())
    assert ended.wait(30.0)
    assert bridge.call(which_loop) is not None
