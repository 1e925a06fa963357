"""The loop of the bridge, and whose turn it is to run it.

A loop in a thread of its own is entered by waking that thread and left by being woken, and a wake-up often takes longer
than what is to be done. So the thread here, the keeper, runs the loop only while nobody else does: a calling thread
that finds itself alone runs it until its call is over. After `REST` seconds without such a call, or as soon as somebody
else needs the loop, the keeper has it again. (The pattern is Leader/Followers, of Schmidt and others, "Pattern-Oriented
Software Architecture 2", with the one follower that is always there.)

Two things callers never do: run the loop while others wait for it, so that each runs its own call alone; and run it in
the main thread, where a signal handler may raise between any two instructions, so in somebody else's task.
"""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import logging
import os
import sys
import threading
import time
import weakref
from collections.abc import Callable
from typing import Any, Protocol, TypeVarTuple

from ._contexts import BOUND_TO_THREADS, take_over

__all__ = ["Caller", "Running", "SharedLoop"]

Ts = TypeVarTuple("Ts")

_log = logging.getLogger(__name__)

REST = 0.005  # seconds for which the keeper leaves the loop to callers, and a background task may have to wait
_PATIENCE = 1.0  # seconds after which the keeper looks whether it waits for somebody who has gone
_LOOK = 0.01  # seconds between two looks whether calls have ended
_RAISE_IN_THREADS = ("dramatiq", "func_timeout", "stopit")  # libraries that raise in the middle of somebody's thread
_CROWD = 32  # tasks
_SWEEPS = 8  # rounds that a caller runs for others, before it wakes the keeper for what is left


class Caller(Protocol):
    """A call, as far as the loop knows it."""

    thread: int
    leads: bool

    def begin(self) -> None:
        """Start the task, unless it has begun. On the loop, or in the thread whose turn it is."""

    def wanted(self) -> bool:
        """Return whether the calling thread has something else to do than to run the loop."""

    def ring(self) -> None:
        """Wake the calling thread. From any thread."""

    def abandon(self) -> None:
        """End with a CancelledError, unless it has ended: the loop has."""


class SharedLoop(asyncio.SelectorEventLoop):
    """A loop that several threads run in turns. Between two turns it counts as running: somebody will go on.

    Args:
        wake: takes no lock, and wakes whoever goes on.
    """

    kept = False  # by a keeper
    runner = 0  # the thread whose turn it is

    def __init__(self, wake: Callable[[], None]) -> None:
        super().__init__()
        self.kept = True
        self._wake = wake
        self._last_runner = 0
        self._tasks: weakref.WeakSet[asyncio.Task[Any]] = weakref.WeakSet()

    def is_running(self) -> bool:
        return (self.kept and threading.get_ident() != self.runner) or super().is_running()

    def call_soon_threadsafe(
        self, callback: Callable[[*Ts], object], *args: *Ts, context: contextvars.Context | None = None
    ) -> asyncio.Handle:
        handle = super().call_soon_threadsafe(callback, *args, context=context)
        if not self.runner:  # looked at after the callback was put in, and set to 0 before its queue is looked at
            self._wake()
        return handle

    def create_task(
        self, coro: Any, *, context: contextvars.Context | None = None, **options: Any
    ) -> asyncio.Task[Any]:
        if context is None:
            context = contextvars.copy_context()
        task: asyncio.Task[Any] = super().create_task(coro, context=context, **options)
        if BOUND_TO_THREADS:
            if sys.version_info < (3, 12):
                task._variables = context  # type: ignore[attr-defined]
            self._tasks.add(task)
        return task

    def begin_turn(self) -> None:
        """Make this thread the one that runs the loop, and bring the variables of its tasks here."""
        self.runner = thread = threading.get_ident()
        if thread != self._last_runner:
            self._last_runner = thread
            for task in list(self._tasks):
                context = _variables_of(task)
                with contextlib.suppress(RuntimeError):  # somebody else is in it
                    context.run(take_over, context.copy())

    def has_callbacks(self) -> bool:
        """Return whether there is something to run right now."""
        return bool(self._ready)  # type: ignore[attr-defined]

    def is_crowded(self) -> bool:
        """Return whether it has so many tasks that to change threads takes longer than it saves."""
        return len(self._tasks) > _CROWD

    def run_on(self) -> None:
        """Run until `stop`, whatever tasks do to end the process: it is not theirs, nor is the thread."""
        while True:
            try:
                self.run_forever()
                return
            except (SystemExit, KeyboardInterrupt) as error:
                _log.error("a task on the loop of the bridge raised %r, which ends that task only", error)

    def sweep(self) -> None:
        """Run what is ready, and what that makes ready, for a few rounds, and do not wait."""
        for _ in range(_SWEEPS):
            if not self.has_callbacks():
                break
            self.stop()
            self.run_on()


def _variables_of(task: asyncio.Task[Any]) -> contextvars.Context:
    if sys.version_info >= (3, 12):
        return task.get_context()
    context: contextvars.Context = task._variables  # type: ignore[attr-defined]
    return context


class Running:
    """One loop with its keeper, and the calls under way in it. A fork forgets it as a whole.

    Nobody but the keeper runs it where Python makes loops of another kind (uvloop, Windows), or where a library is
    loaded that raises exceptions in threads.
    """

    def __init__(self, name: str) -> None:
        self.pid = os.getpid()
        self.closing = False
        self.ready = threading.Event()
        self.entry: Any = None
        self.calls: set[Caller] = set()
        self.waiting: set[Caller] = set()  # those whose threads wait for the keeper to run the loop
        self._callers: dict[int, Caller] = {}  # by thread
        self._under_way: set[object] = set()
        self._ended = False
        self._turn: dict[str, Caller | Running] = {}  # whose it is; a keeper's is that of the loop itself
        self._turns = 0  # of callers
        self._rests_for: Caller | None = None
        self._keeper_waits = False  # for its turn
        self._bell = threading.Lock()  # released to wake the keeper
        self._bell.acquire()
        loop = asyncio.new_event_loop()
        if type(loop) is asyncio.SelectorEventLoop and sys.platform != "win32":
            loop.close()
            loop = SharedLoop(self._wake)
        self.loop: asyncio.AbstractEventLoop = loop
        # In an empty context: neither the thread nor what is born of it may keep the first caller's variables.
        self.thread = threading.Thread(target=contextvars.Context().run, args=(self._keep,), name=name, daemon=True)
        self.thread.start()

    # -- calls

    def enter(self, call: object) -> bool:
        """Count a call in; False once the loop is closing."""
        self._under_way.add(call)
        if self.closing:
            self._under_way.discard(call)
            return False
        return True

    def leave(self, call: object) -> None:
        self._under_way.discard(call)

    def close_to_calls(self, grace: float) -> None:
        """Let no further call in; wait for those under way at most `grace` seconds."""
        self.closing = True
        end = time.monotonic() + grace
        while self._under_way and time.monotonic() < end:
            time.sleep(_LOOK)

    def register(self, caller: Caller) -> bool:
        """Make `caller` known; return whether it is the outermost call of its thread."""
        outermost = self._callers.get(caller.thread) not in self.calls
        self.calls.add(caller)
        if outermost:
            self._callers[caller.thread] = caller
        return outermost

    def deregister(self, caller: Caller, outermost: bool) -> None:
        self.calls.discard(caller)
        self.waiting.discard(caller)
        if outermost:
            self._callers.pop(caller.thread, None)

    # -- turns

    @property
    def leader(self) -> Caller | Running | None:
        """Return the call whose thread runs the loop, this object where the keeper does, None where nobody does."""
        return self._turn.get("of")

    def _take(self, who: Caller | Running) -> bool:
        # One step, so that an exception raised in this thread cannot come between taking and knowing.
        return self._turn.setdefault("of", who) is who

    def has_turn(self) -> bool:
        """Return whether it is the turn of this thread, which then must not wait for the loop."""
        leader = self.leader
        thread = self.thread.ident if leader is self else getattr(leader, "thread", None)
        return leader is not None and thread == threading.get_ident()

    def give_back(self, who: Caller | Running) -> None:
        """End the turn of `who`, if it is theirs."""
        if self._turn.get("of") is not who:
            return
        try:
            if isinstance(self.loop, SharedLoop):
                self.loop.runner = 0
        finally:
            self._turn.pop("of", None)
            if self._keeper_waits or self._is_needed():
                self._wake()

    def _is_needed(self) -> bool:
        """Return whether the loop has to be run although no caller does."""
        loop = self.loop
        return (
            not isinstance(loop, SharedLoop)
            or loop.has_callbacks()
            or bool(self.waiting)
            or len(self._callers) > 1
            or self._ended
        )

    def _may_lead(self, caller: Caller) -> bool:
        return (
            caller.leads
            and isinstance(self.loop, SharedLoop)
            and len(self._callers) == 1
            and not self._ended
            and not self.loop.is_crowded()
            and not any(map(sys.modules.__contains__, _RAISE_IN_THREADS))
        )

    # -- turns of callers

    def take(self, caller: Caller) -> bool:
        """Take the turn if nobody has it, and no other thread waits for the loop. `lead` gives it back."""
        return self._may_lead(caller) and asyncio._get_running_loop() is None and self._take(caller)

    def lead(self, caller: Caller, answer: Callable[[], object] | None = None) -> None:
        """Run the loop in this thread until `stop_leading`, and give the turn back. `answer` goes in first."""
        loop = self.loop
        assert isinstance(loop, SharedLoop)
        try:
            self._turns += 1
            loop.begin_turn()
            if answer is not None:
                answer()
            caller.begin()
            if not caller.wanted():
                loop.run_on()
            if len(self._callers) == 1:
                loop.sweep()
        finally:
            self.give_back(caller)

    def stop_leading(self) -> None:
        """Have a caller that leads come out of the loop. On the loop."""
        if self.leader is not self:
            self.loop.stop()

    def need_keeper(self) -> None:
        """Have the keeper run the loop if nobody does."""
        if self.leader is None:
            self._wake()

    def rest_for(self, caller: Caller) -> bool:
        """Have the keeper give its turn back and wake `caller` then; False if that could not take the turn. On the
        loop."""
        if self.leader is not self or self._rests_for is not None or not self._may_lead(caller):
            return False
        self._rests_for = caller
        self.loop.stop()
        return True

    # -- the keeper

    def _wake(self) -> None:
        with contextlib.suppress(RuntimeError):  # it is awake, or will be
            self._bell.release()

    def _keep(self) -> None:
        asyncio.set_event_loop(self.loop)
        self.loop.call_soon(self.ready.set)
        try:
            while not self._ended:
                self._take_when_free()
                try:
                    self._run()
                    self._bell.acquire(blocking=False)  # what it rang for has been done, or is in the queue
                finally:
                    self.give_back(self)
                    caller, self._rests_for = self._rests_for, None
                    if caller is not None:
                        caller.ring()  # not before, or it would find the turn taken
                if caller is not None:
                    self._rest()
        finally:
            self._take_when_free()
            self._end()

    def _take_when_free(self) -> None:
        self._keeper_waits = True
        while not self._take(self):
            self._wait_for_leader()
        self._keeper_waits = False

    def _wait_for_leader(self) -> None:
        """Wait until the one that leads gives its turn back, or end it: exceptions may hit even the end of a call."""
        if self._bell.acquire(timeout=_PATIENCE):
            return
        leader = self.leader
        # Looked at again: what a call that is over has not given back by then, it never will.
        if leader is not None and leader not in self.calls and self.leader is leader:
            self._turn.pop("of", None)

    def _run(self) -> None:
        loop = self.loop
        if not isinstance(loop, SharedLoop):
            loop.run_forever()
            return
        loop.begin_turn()
        loop.run_on()
        if self._rests_for is not None:
            loop.sweep()

    def _rest(self) -> None:
        """Leave the loop to callers for as long as they come, and as nobody else needs it."""
        seen = self._turns
        while not self._is_needed():
            if not self._bell.acquire(timeout=REST) and seen == self._turns:
                if self.leader is None:
                    return
                self._keeper_waits = True  # for a caller that stays longer
                if self.leader is not None:
                    self._wait_for_leader()
                self._keeper_waits = False
            seen = self._turns

    def _end(self) -> None:
        loop = self.loop
        if isinstance(loop, SharedLoop):
            loop.begin_turn()
            loop.kept = False
        try:
            loop.call_soon(loop.stop)  # and with it what `stop` may have left
            loop.run_forever()
            tasks = asyncio.all_tasks(loop)
            for task in tasks:
                task.cancel()
            if tasks:
                loop.run_until_complete(asyncio.wait(tasks, timeout=5.0))
            loop.run_until_complete(loop.shutdown_asyncgens())
        except Exception:
            _log.exception("the loop of the bridge did not end cleanly")
        finally:
            asyncio.set_event_loop(None)
            loop.close()
            for call in list(self.calls):
                call.abandon()

    def stop(self, grace: float) -> bool:
        """End the loop and its thread, cancelling what still runs; return whether they have ended."""
        self._ended = True
        with contextlib.suppress(RuntimeError):  # ended already
            self.loop.call_soon_threadsafe(self.loop.stop)
        self._wake()
        self.thread.join(grace)
        return not self.thread.is_alive()
