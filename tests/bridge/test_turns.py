"""Whose turn it is to run the loop of the bridge: the keeper's, or that of a thread that is alone with its call."""

import asyncio
import contextlib
import contextvars
import gc
import os
import random
import signal
import socket
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

import pytest
from asgiref.local import Local
from asgiref.sync import SyncToAsync, async_to_sync, sync_to_async

from sync_bridge import _loop
from sync_bridge._call import Call
from sync_bridge._contexts import BOUND_TO_THREADS
from sync_bridge.bridge import Bridge, BridgeClosed, SyncCallOnEventLoop
from tests.bridge.test_bridge import in_child, wait_until

T = TypeVar("T")


@pytest.fixture
def bridge() -> Iterator[Bridge]:
    one = Bridge("test-turns", grace=2.0)
    yield one
    one.close()


def in_a_thread(function: Callable[[], T]) -> T:
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(function).result(60)


async def whose_thread() -> int:
    await asyncio.sleep(0)
    return threading.get_ident()


def take_the_loop(bridge: Bridge) -> None:
    """Call until this thread has run the loop itself; the keeper lets go of it after a call that came alone."""
    end = time.monotonic() + 30
    while bridge.call(whose_thread) != threading.get_ident():
        assert time.monotonic() < end


def turns(bridge: Bridge) -> int:
    assert bridge._current is not None
    return bridge._current._turns


# -- one caller


def test_a_thread_that_is_alone_runs_the_loop_itself(bridge: Bridge) -> None:
    def calls() -> None:
        take_the_loop(bridge)
        before = turns(bridge)
        for _ in range(100):
            assert bridge.call(whose_thread) in {threading.get_ident(), keeper(bridge)}
        assert turns(bridge) > before

    in_a_thread(calls)


def keeper(bridge: Bridge) -> int | None:
    assert bridge._current is not None
    return bridge._current.thread.ident


def test_the_main_thread_never_does_because_signal_handlers_may_raise_there(bridge: Bridge) -> None:
    in_a_thread(lambda: take_the_loop(bridge))
    assert {bridge.call(whose_thread) for _ in range(50)} == {keeper(bridge)}


def test_thread_sensitive_code_has_the_callers_thread_and_no_running_loop_in_it(bridge: Bridge) -> None:
    def look() -> tuple[int, object]:
        return threading.get_ident(), asyncio._get_running_loop()

    async def work() -> Any:
        both = await asyncio.gather(*(sync_to_async(look)() for _ in range(3)))
        return [await whose_thread(), *both, await sync_to_async(look)()]

    def calls() -> None:
        take_the_loop(bridge)
        me = threading.get_ident()
        for _ in range(20):
            thread, *looks = bridge.call(work)
            assert thread in {me, keeper(bridge)}
            assert looks == [(me, None)] * 4

    in_a_thread(calls)


def test_calls_nest_and_a_plain_async_to_sync_inside_comes_to_the_same_loop(bridge: Bridge) -> None:
    async def loop() -> asyncio.AbstractEventLoop:
        await asyncio.sleep(0)
        return asyncio.get_running_loop()

    def inside(depth: int) -> set[object]:
        return {async_to_sync(loop)(), bridge.call(loop), *(bridge.call(down, depth - 1) if depth else ())}

    async def down(depth: int) -> set[object]:
        return {await loop(), *await sync_to_async(inside)(depth)}

    def calls() -> None:
        take_the_loop(bridge)
        for _ in range(10):
            assert bridge.call(down, 3) == {bridge.call(loop)}
        assert async_to_sync(loop)() is not bridge.call(loop)  # out here it is as it was

    in_a_thread(calls)


def test_on_the_loop_a_call_is_refused_whoever_runs_it(bridge: Bridge) -> None:
    async def inside() -> None:
        with pytest.raises(SyncCallOnEventLoop):
            bridge.call(whose_thread)

    in_a_thread(lambda: (take_the_loop(bridge), [bridge.call(inside) for _ in range(10)]))


def test_what_a_call_left_behind_may_not_use_its_thread(bridge: Bridge) -> None:
    outcome: list[object] = []

    async def later() -> None:
        await asyncio.sleep(0.05)
        try:
            await sync_to_async(threading.get_ident)()
        except RuntimeError as error:
            outcome.append(str(error))

    async def leave_behind() -> asyncio.Task[None]:
        return asyncio.create_task(later())

    in_a_thread(lambda: (take_the_loop(bridge), bridge.call(leave_behind)))
    wait_until(lambda: bool(outcome))
    assert "has ended" in str(outcome[0])


# -- several


def test_variables_stay_with_a_call_whose_loop_changes_threads(bridge: Bridge) -> None:
    """asgiref's Local, Django's language and time zone among them, is bound to the thread that it was set in."""
    variable, local = contextvars.ContextVar("variable", default=""), Local()
    began, second_came, looked = threading.Event(), threading.Event(), threading.Event()

    async def look() -> list[Any]:
        return [threading.get_ident(), variable.get(), local.text, await sync_to_async(threading.get_ident)()]

    async def late() -> list[Any]:
        await asyncio.to_thread(second_came.wait, 30)
        return await look()

    async def long() -> list[list[Any]]:
        before = await look()
        child = asyncio.create_task(late())
        began.set()
        of_child = await child
        local.text = "changed"
        after = await look()
        looked.set()
        return [before, of_child, after]

    async def second() -> None:
        second_came.set()
        await asyncio.to_thread(looked.wait, 30)

    def first() -> tuple[int, list[list[Any]], str]:
        take_the_loop(bridge)
        variable.set("here")
        local.text = "too"
        return threading.get_ident(), bridge.call(long), local.text

    with ThreadPoolExecutor(2) as pool:
        one = pool.submit(first)
        assert began.wait(30)
        pool.submit(bridge.call, second).result(30)
        me, (before, of_child, after), text = one.result(30)
    assert before == [me, "here", "too", me]
    assert of_child == [keeper(bridge), "here", "too", me]
    assert after == [keeper(bridge), "here", "changed", me]
    assert text == "changed"


def test_a_second_caller_does_not_wait_for_the_call_of_the_first(bridge: Bridge) -> None:
    began, go = threading.Event(), threading.Event()
    seen: list[int] = []

    async def long() -> None:
        seen.append(await whose_thread())
        began.set()
        await asyncio.to_thread(go.wait, 30)
        seen.append(await whose_thread())

    def first() -> int:
        take_the_loop(bridge)
        bridge.call(long)
        return threading.get_ident()

    with ThreadPoolExecutor(2) as pool:
        one = pool.submit(first)
        assert began.wait(30)
        try:
            assert pool.submit(bridge.call, whose_thread).result(30) == keeper(bridge)
        finally:
            go.set()
        assert seen[0] == one.result(30)
    assert seen[1] == keeper(bridge)  # whom the first has left the loop to


def test_thread_sensitive_code_that_waits_for_another_thread_does_not_stop_the_loop(bridge: Bridge) -> None:
    """As an ORM call does that waits for the lock of another transaction, which ends only after a call of its own."""
    began, other_came = threading.Event(), threading.Event()

    def wait() -> bool:
        began.set()
        return other_came.wait(30)

    def first() -> bool:
        take_the_loop(bridge)
        return bridge.call(sync_to_async(wait))

    def second() -> None:
        began.wait(30)
        bridge.call(asyncio.sleep, 0.01)
        other_came.set()

    with ThreadPoolExecutor(2) as pool:
        one, two = pool.submit(first), pool.submit(second)
        two.result(30)
        assert one.result(30)


def test_background_tasks_go_on_while_callers_have_the_loop_and_while_nobody_calls(bridge: Bridge) -> None:
    left, right = socket.socketpair()
    left.setblocking(False)
    echoed: list[bytes] = []

    async def echo() -> None:
        loop = asyncio.get_running_loop()
        while data := await loop.sock_recv(left, 10):
            await asyncio.sleep(0.001)
            echoed.append(data)
            await loop.sock_sendall(left, data)

    async def start() -> asyncio.Task[None]:
        return asyncio.create_task(echo())

    right.settimeout(30)

    def calls() -> None:
        take_the_loop(bridge)
        bridge.call(start)
        for number in range(60):
            right.sendall(b"%d" % number)
            if number % 3 == 1:
                bridge.call(whose_thread)
            elif number % 3 == 2:
                time.sleep(2 * _loop.REST)
            assert right.recv(10) == b"%d" % number

    with left, right:
        in_a_thread(calls)
        right.shutdown(socket.SHUT_WR)
        wait_until(lambda: bridge.call(others) == 0)
    assert len(echoed) == 60


async def others() -> int:
    return len(asyncio.all_tasks()) - 1


def test_what_other_threads_and_destructors_put_in_is_done_at_once(bridge: Bridge) -> None:
    done: list[int] = []

    class Forgotten:
        def __del__(self) -> None:
            bridge.post(close)

    async def close() -> None:
        done.append(await whose_thread())

    def calls() -> None:
        for number in range(5):
            for _ in range(10):
                bridge.call(whose_thread)
            cycle: list[Any] = [Forgotten()]
            cycle.append(cycle)
            del cycle
            gc.collect()
            wait_until(lambda number=number: len(done) == number + 1)  # type: ignore[misc]

    in_a_thread(calls)


def test_a_storm_of_callers_of_every_kind(bridge: Bridge) -> None:
    count = 150

    async def plain(value: int) -> int:
        return value

    async def sleeping(value: int) -> int:
        await asyncio.sleep(random.random() / 1000)
        return value

    async def asking(value: int, thread: int) -> int:
        for _ in range(2):
            assert await sync_to_async(threading.get_ident)() == thread
        return value

    async def nesting(value: int) -> int:
        return await sync_to_async(bridge.call)(sleeping, value)

    async def threads(value: int) -> int:
        return sum(await asyncio.gather(*(asyncio.to_thread(bridge.call, plain, value) for _ in range(2)))) - value

    async def failing(value: int) -> int:
        await asyncio.sleep(0)
        raise KeyError(value)

    def caller(seed: int) -> int:
        dice = random.Random(seed)
        me = threading.get_ident()
        for number in range(count):
            kind = dice.randrange(7)
            if kind == 6:
                time.sleep(dice.random() / 100)
            elif kind == 5:
                with pytest.raises(KeyError):
                    bridge.call(failing, number)
            elif kind == 4:
                assert bridge.call(asking, number, me) == number
            else:
                assert bridge.call((plain, sleeping, nesting, threads)[kind], number) == number
        return turns(bridge)

    bridge.call(plain, 0)
    for callers in (1, 2, 8):
        with ThreadPoolExecutor(callers) as pool:
            before = turns(bridge)
            running = [pool.submit(caller, seed) for seed in range(callers)]
            caller(99) if callers == 8 else None  # and the main thread
            assert all(one.result(120) > before for one in running) or callers > 1
    assert bridge._current is not None
    assert not bridge._current._callers
    assert not bridge._current.calls
    assert not bridge._current.waiting


# -- what a thread brings along, and must not bring into the work of others


def leads(bridge: Bridge) -> bool:
    """Call ten times; return whether this thread has run the loop itself."""
    before = turns(bridge)
    for _ in range(10):
        bridge.call(whose_thread)
    return turns(bridge) > before


def test_a_thread_that_handles_an_exception_or_has_little_stack_left_does_not_run_the_loop(bridge: Bridge) -> None:
    def deep(depth: int) -> bool:
        return deep(depth - 1) if depth else leads(bridge)

    def calls() -> None:
        take_the_loop(bridge)
        assert leads(bridge)
        assert not deep(sys.getrecursionlimit() // 2)
        try:
            raise KeyError
        except KeyError:
            assert not leads(bridge)
        wait_until(lambda: leads(bridge))

    in_a_thread(calls)


def test_with_many_tasks_in_the_loop_it_stays_where_it_is(bridge: Bridge) -> None:
    done = asyncio.Event()

    async def start() -> list[asyncio.Task[Any]]:
        return [asyncio.create_task(done.wait()) for _ in range(2 * _loop._CROWD)]

    async def end(tasks: list[asyncio.Task[Any]]) -> None:
        done.set()
        await asyncio.gather(*tasks)

    def calls() -> None:
        take_the_loop(bridge)
        tasks = bridge.call(start)
        assert leads(bridge) is not BOUND_TO_THREADS  # with an asgiref that binds nothing, tasks cost nothing
        bridge.call(end, tasks)
        tasks.clear()
        wait_until(lambda: leads(bridge))

    in_a_thread(calls)


def test_a_thread_that_serves_asgiref_already_leaves_the_loop_to_the_keeper(bridge: Bridge) -> None:
    """A task that it leaves behind would submit to asgiref's executor from the thread of that, which it refuses."""
    outcome: list[object] = []

    async def later() -> None:
        await asyncio.sleep(0.05)
        outcome.append(await sync_to_async(threading.get_ident)())

    async def leave_behind() -> asyncio.Task[None]:
        return asyncio.create_task(later())

    def view() -> None:
        bridge.call(leave_behind)
        for _ in range(20):
            bridge.call(asyncio.sleep, 0.01)

    async def main() -> None:
        await sync_to_async(view)()
        await asyncio.sleep(0.1)

    def calls() -> int:
        async_to_sync(main)()
        return threading.get_ident()

    assert outcome == [in_a_thread(calls)]


def test_what_a_plain_async_to_sync_left_behind_finds_the_thread_of_the_call_around(bridge: Bridge) -> None:
    outcome: list[object] = []

    async def later(go: asyncio.Event) -> None:
        await go.wait()
        outcome.append(await sync_to_async(threading.get_ident)())

    async def leave_behind(go: asyncio.Event) -> asyncio.Task[None]:
        return asyncio.create_task(later(go))

    async def around() -> None:
        go = asyncio.Event()
        task = await sync_to_async(async_to_sync(leave_behind))(go)
        go.set()
        await task

    bridge.call(around)  # where the keeper runs the loop
    assert outcome == [threading.get_ident()]


def test_a_task_that_would_end_the_process_ends_itself_alone(bridge: Bridge, caplog: pytest.LogCaptureFixture) -> None:
    async def leave() -> None:
        raise SystemExit("of a background task")

    async def start() -> asyncio.Task[None]:
        task = asyncio.create_task(leave())
        await asyncio.sleep(0.01)
        return task

    def calls() -> None:
        take_the_loop(bridge)
        assert isinstance(bridge.call(start).exception(), SystemExit)

    in_a_thread(calls)
    assert isinstance(bridge.call(start).exception(), SystemExit)
    assert caplog.text.count("of a background task") == 2


def test_what_a_call_has_started_does_not_hold_its_arguments_and_result(bridge: Bridge) -> None:
    class Payload:
        pass

    kept: list[asyncio.Task[Any]] = []

    async def work(payload: Payload) -> Payload:
        kept.append(asyncio.create_task(asyncio.sleep(30)))
        return Payload()

    argument = Payload()
    result = bridge.call(work, argument)
    payloads = [weakref.ref(argument), weakref.ref(result)]
    del argument, result
    assert [payload() for payload in payloads] == [None, None]


# -- what comes in between


def test_a_destructor_in_the_thread_whose_turn_it_is_does_not_wait_for_the_loop(bridge: Bridge) -> None:
    seen: list[object] = []

    async def close() -> None:
        seen.append("closed")

    class Forgotten:
        def __del__(self) -> None:
            assert bridge._current is not None
            assert bridge._current.has_turn()
            bridge.end(close)
            try:
                bridge.call(close)
            except SyncCallOnEventLoop as error:
                seen.append(error)

    class Answer:
        """Told to the loop where the thread has its turn and the loop does not run yet."""

        def __init__(self, forgotten: Forgotten) -> None:
            self.forgotten = [forgotten]

        def begin_turn(self) -> None:
            self.forgotten.clear()

    def calls() -> None:
        take_the_loop(bridge)
        assert bridge._current is not None
        loop, answer = bridge._current.loop, Answer(Forgotten())
        begin_turn = loop.begin_turn  # type: ignore[attr-defined]
        loop.begin_turn = lambda: (begin_turn(), answer.begin_turn())  # type: ignore[attr-defined]
        bridge.call(whose_thread)

    in_a_thread(calls)
    wait_until(lambda: len(seen) == 2)
    assert isinstance(seen[0], SyncCallOnEventLoop)
    assert seen[1] == "closed"


def test_on_its_own_loop_the_bridge_cannot_be_closed_whoever_runs_it(bridge: Bridge) -> None:
    async def close() -> None:
        with pytest.raises(SyncCallOnEventLoop):
            bridge.close()

    bridge.call(close)
    in_a_thread(lambda: (take_the_loop(bridge), bridge.call(close)))
    assert bridge.call(asyncio.sleep, 0, "open") == "open"


def test_closed_on_another_loop_its_closers_run(bridge: Bridge) -> None:
    closed = []

    async def closer() -> None:
        closed.append(await whose_thread())

    async def main() -> None:
        bridge.close()

    bridge.on_close(closer)
    in_a_thread(lambda: (take_the_loop(bridge), asyncio.run(main())))
    assert len(closed) == 1


def test_a_call_interrupted_before_it_began_never_begins(bridge: Bridge, monkeypatch: pytest.MonkeyPatch) -> None:
    bridge.call(asyncio.sleep, 0)
    began = []

    async def work() -> None:
        began.append(1)

    def interrupted(*_: object) -> bool:
        self._posted = True
        raise KeyboardInterrupt

    wait, self = Call._wait, None

    def first_interrupted(call: Any, until: float | None) -> bool:
        nonlocal self
        if until is not None:
            return wait(call, until)
        self = call
        return interrupted()

    monkeypatch.setattr(Call, "_wait", first_interrupted)
    with pytest.raises(KeyboardInterrupt):
        bridge.call(work)
    monkeypatch.undo()
    bridge.call(asyncio.sleep, 0.05)
    assert not began


def test_work_that_came_too_late_leaves_no_trace_of_the_loop_in_its_thread(bridge: Bridge) -> None:
    async def loop() -> asyncio.AbstractEventLoop:
        return asyncio.get_running_loop()

    def calls() -> None:
        call: Any = Call(current(bridge), loop, None)
        future = call.submit(lambda: SyncToAsync.threadlocal.__setattr__("main_event_loop", current(bridge).loop))
        call._close()
        assert future.cancelled() or call.served

    in_a_thread(calls)


def current(bridge: Bridge) -> Any:
    bridge.call(asyncio.sleep, 0)
    return bridge._current


@pytest.mark.parametrize("seed", range(3))
def test_interrupts_in_the_main_thread_stop_the_loop_for_nobody(seed: int) -> None:
    """As a soft time limit does, between any two instructions, again and again, in a process that goes on."""
    assert_it_lives_through(INTERRUPTED, seed)


def assert_it_lives_through(program: str, seed: int) -> None:
    command = [sys.executable, "-c", program, str(seed)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert (done.returncode, done.stdout) == (0, "alive\n"), done.stderr


INTERRUPTED = """
import asyncio, faulthandler, random, signal, sys, threading, time
from asgiref.sync import sync_to_async
from sync_bridge.bridge import bridge

faulthandler.dump_traceback_later(100, exit=True)
dice = random.Random(int(sys.argv[1]))

class Limit(Exception):
    pass

within = False

def ring(*_):
    if within:
        raise Limit

async def work():
    for _ in range(3):
        await sync_to_async(sum)((1, 2))
        await asyncio.sleep(0)

signal.signal(signal.SIGALRM, ring)
bridge.grace = 2.0
bridge.call(work)
raised = 0
while raised < 40:
    signal.setitimer(signal.ITIMER_REAL, dice.uniform(1e-5, 3e-3))
    try:
        within = True
        bridge.call(work)
    except Limit:
        raised += 1
    finally:
        within = False
    signal.setitimer(signal.ITIMER_REAL, 0)
thread = threading.Thread(target=lambda: [bridge.call(work) for _ in range(20)])
thread.start()
thread.join()
print("alive")
"""


class Limit(BaseException):
    """Raised in a thread from outside."""


@pytest.mark.parametrize("seed", range(4))
def test_exceptions_raised_in_the_thread_that_leads_stop_the_loop_for_nobody(seed: int) -> None:
    """Not in libraries that are known to do so: with them nobody leads. In that thread anything may be lost: asyncio
    cannot go on where a task's next step was not put into the queue."""
    assert_it_lives_through(RAISED_FROM_OUTSIDE, seed)


RAISED_FROM_OUTSIDE = """
import asyncio, contextlib, ctypes, faulthandler, os, random, sys, threading, time
from sync_bridge.bridge import bridge

faulthandler.dump_traceback_later(100, exit=True)
dice = random.Random(int(sys.argv[1]))

class Limit(BaseException):
    pass

async def busy():
    for _ in range(20):
        await asyncio.sleep(0)

def limited():
    while True:
        with contextlib.suppress(Limit):
            while True:
                bridge.call(busy)

def other():
    for _ in range(60):
        time.sleep(dice.random() / 50)
        bridge.call(busy)

bridge.call(busy)
leads = threading.Thread(target=limited, daemon=True)
leads.start()
others = threading.Thread(target=other)
others.start()
while others.is_alive():
    time.sleep(dice.random() / 50)
    ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(leads.ident), ctypes.py_object(Limit))
bridge.call(busy)
print("alive", flush=True)
os._exit(0)
"""


def test_a_call_ends_though_an_exception_hits_its_end(bridge: Bridge, monkeypatch: pytest.MonkeyPatch) -> None:
    attend, hit = Call._attend, threading.Event()

    def attend_later(call: Any) -> None:
        if not hit.is_set():
            hit.set()
            raise Limit
        attend(call)

    def calls() -> int:
        take_the_loop(bridge)
        monkeypatch.setattr(Call, "_attend", attend_later)
        with contextlib.suppress(Limit):
            bridge.call(whose_thread)
        return bridge.call(asyncio.sleep, 0, 7)

    assert in_a_thread(calls) == 7
    assert hit.is_set()


def test_a_thread_that_has_its_result_before_the_task_is_over_is_told_once(
    bridge: Bridge, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    attend = Call._attend
    told = []

    def attend_and_wait(call: Call[Any]) -> None:
        attend(call)
        if call._over:
            told.append(call)
            wait_until(lambda: call._closed)

    monkeypatch.setattr(Call, "_attend", attend_and_wait)
    assert bridge.call(whose_thread) == keeper(bridge)  # from the main thread
    bridge.close()
    assert len(told) == len(set(told))
    assert not caplog.records


@pytest.mark.parametrize("rests", [0, 20], ids=["while it rests", "after its rest"])
def test_the_keeper_takes_a_turn_that_nobody_gave_back(
    bridge: Bridge, monkeypatch: pytest.MonkeyPatch, rests: int
) -> None:
    """In whichever of its two places it waits; a machine that stalls lets this look at one of them twice."""

    def calls() -> None:
        take_the_loop(bridge)
        monkeypatch.setattr(_loop.Running, "give_back", lambda *_: None)
        bridge.call(whose_thread)
        monkeypatch.undo()

    in_a_thread(calls)
    time.sleep(rests * _loop.REST)
    assert bridge.call(asyncio.sleep, 0, 7) == 7


def test_a_child_of_thread_sensitive_code_says_that_it_has_lost_its_loop(bridge: Bridge) -> None:
    async def fork() -> int:
        return await sync_to_async(os.fork)()

    def calls() -> int:
        take_the_loop(bridge)
        parent = os.getpid()
        try:
            child = bridge.call(fork)
        except RuntimeError as error:
            os._exit(7 if "forked" in str(error) and os.getpid() != parent else 8)
        if os.getpid() != parent:
            os._exit(9)
        return child

    signal.alarm(60)
    try:
        child = in_a_thread(calls)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7
    finally:
        signal.alarm(0)


def test_a_child_leaves_what_else_the_call_asked_of_its_thread_to_the_parent(bridge: Bridge) -> None:
    reading, writing = os.pipe()

    def write() -> None:
        os.write(writing, b"p" if os.getpid() == parent else b"c")

    async def fork_and_write() -> int:
        child, _ = await asyncio.gather(sync_to_async(os.fork)(), sync_to_async(write)())
        return child

    def calls() -> int:
        try:
            return bridge.call(fork_and_write)
        except RuntimeError:
            if os.getpid() != parent:
                os._exit(0)
            raise

    parent = os.getpid()
    signal.alarm(60)
    try:
        os.waitpid(in_a_thread(calls), 0)
        os.close(writing)
        assert os.read(reading, 10) == b"p"
    finally:
        signal.alarm(0)
        os.close(reading)


def test_forks_while_a_caller_has_the_loop(bridge: Bridge) -> None:
    stop = threading.Event()

    def calls() -> None:
        take_the_loop(bridge)
        while not stop.is_set():
            bridge.call(asyncio.sleep, 0.0001)

    def in_child_thread() -> bool:
        return in_a_thread(lambda: (take_the_loop(bridge), bridge.call(asyncio.sleep, 0, True))[1])

    with ThreadPoolExecutor(1) as pool:
        running = pool.submit(calls)
        try:
            assert all(in_child(in_child_thread) for _ in range(10))
        finally:
            stop.set()
        running.result(30)


def test_closing_ends_the_call_that_leads(bridge: Bridge) -> None:
    bridge.grace = 0.2
    began = threading.Event()

    async def hang() -> None:
        began.set()
        await asyncio.sleep(60)

    def first() -> None:
        take_the_loop(bridge)
        with pytest.raises(BridgeClosed):
            bridge.call(hang)

    with ThreadPoolExecutor(1) as pool:
        running = pool.submit(first)
        assert began.wait(30)
        bridge.close()
        running.result(30)


def test_a_loop_that_stopped_ends_calls_that_have_not_begun(bridge: Bridge) -> None:
    bridge.call(asyncio.sleep, 0)
    running = bridge._current
    assert running is not None
    blocked, go = threading.Event(), threading.Event()

    async def block() -> None:
        blocked.set()
        go.wait(30)

    with ThreadPoolExecutor(2) as pool:
        first = pool.submit(bridge.call, block)
        blocked.wait(30)
        second = pool.submit(bridge.call, whose_thread)
        wait_until(lambda: len(running.calls) == 2)
        running.closing = True
        running._ended = True
        running.loop.call_soon_threadsafe(running.loop.stop)
        go.set()
        running.thread.join(30)
        assert first.exception(30) is None or isinstance(first.exception(), BridgeClosed)
        assert second.exception(30) is None or isinstance(second.exception(), BridgeClosed)


def test_with_loops_of_another_kind_the_keeper_alone_runs_them(monkeypatch: pytest.MonkeyPatch) -> None:
    class Other(asyncio.SelectorEventLoop):
        pass

    monkeypatch.setattr(asyncio, "new_event_loop", Other)
    bridge = Bridge("other")
    with contextlib.closing(bridge):
        threads = in_a_thread(lambda: {bridge.call(whose_thread) for _ in range(20)})
        assert threads == {keeper(bridge)}
        assert in_a_thread(lambda: bridge.call(sync_to_async(threading.get_ident)) == threading.get_ident())


@pytest.mark.parametrize("library", sorted(_loop._RAISE_IN_THREADS))
def test_where_exceptions_are_raised_in_threads_callers_never_run_the_loop(
    bridge: Bridge, library: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, library, type(sys)(library))
    assert in_a_thread(lambda: {bridge.call(whose_thread) for _ in range(20)}) == {keeper(bridge)}


ENDING = """
import asyncio, logging, sys, threading, time
from sync_bridge.bridge import bridge
# Debug mode tells of slow callbacks: a busy machine is no finding.
logging.getLogger("asyncio").addFilter(lambda record: not record.getMessage().startswith("Executing "))
bridge.grace = 0.5
def calls():
    while True:
        bridge.call(asyncio.sleep, float(sys.argv[1]))
threading.excepthook = lambda args: None
threading.Thread(target=calls, daemon=True).start()
time.sleep(0.3)
"""


@pytest.mark.parametrize("seconds", ["0", "0.001", "60"])
def test_the_process_ends_while_a_daemon_has_the_loop(seconds: str) -> None:
    command = [sys.executable, "-X", "dev", "-W", "error", "-c", ENDING, seconds]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert not done.stderr
