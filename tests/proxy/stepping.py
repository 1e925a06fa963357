"""Run a coroutine and interrupt it at a chosen one of its suspensions.

A suspension is a moment at which the coroutine gives control back to the event loop: exactly where a cancellation can
reach it. Interrupting at the first, the second … until a run ends before its turn comes tries every await point.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Coroutine, Generator, Iterable
from dataclasses import dataclass
from typing import Any

__all__ = ["Interrupted", "Run", "Stepped", "cancelling", "every_step", "run_stepped"]

SAFETY = 60.0  # seconds after which a run is given up: a hang is a failure, not a hung test run
QUIET_RUNS = 3  # so many successive runs have to end before their turn comes, because threads make the number vary


class Stepped:
    """Awaits `work`, and calls `interrupt` at each of its suspensions (the first is 1) that is listed in `at`.

    `late`: not when the suspension begins, but when what is waited for has come to pass and the task has not yet seen
    it. A cancellation then loses an answer that was there: the nastier half of the moments.

    Attributes:
        count: suspensions so far.
        interrupts: how often `interrupt` was called.
    """

    def __init__(
        self, work: Coroutine[Any, Any, Any], at: Iterable[int], interrupt: Callable[[], object], *, late: bool = False
    ) -> None:
        self.count = 0
        self.interrupts = 0
        self._work = work
        self._at = frozenset(at)
        self._interrupt = interrupt
        self._late = late

    def __await__(self) -> Generator[Any, Any, Any]:
        work = self._work
        resume: Callable[[], Any] = lambda: work.send(None)  # noqa: E731
        while True:
            try:
                waited_for = resume()
            except StopIteration as stop:
                return stop.value
            self.count += 1
            if self.count in self._at:
                self._let_interrupt(waited_for)
            try:
                answer = yield waited_for
            except BaseException as error:
                resume = lambda error=error: work.throw(error)  # noqa: E731
            else:
                resume = lambda answer=answer: work.send(answer)  # noqa: E731

    def _let_interrupt(self, waited_for: Any) -> None:
        if not self._late:
            self._now()
        elif waited_for is None:  # a bare yield: asyncio.sleep(0)
            asyncio.get_running_loop().call_soon(self._now)
        else:
            # Added before the task adds its own wake-up, and therefore called before it.
            waited_for.add_done_callback(lambda _: self._now())

    def _now(self) -> None:
        self.interrupts += 1
        self._interrupt()


@dataclass(frozen=True, slots=True)
class Run:
    """How one interrupted run has ended."""

    suspensions: int
    interrupts: int
    value: Any = None
    error: BaseException | None = None

    @property
    def cancelled(self) -> bool:
        return isinstance(self.error, asyncio.CancelledError)


#: Wraps a coroutine into one that is stepped: called with it and the suspensions; returns (coroutine, its Stepped).
Interrupted = Callable[[Coroutine[Any, Any, Any], Iterable[int]], tuple[Coroutine[Any, Any, Any], Stepped]]


def cancelling(*, late: bool = False) -> Interrupted:
    """Return the plainest interruption: ``task.cancel()``."""

    def wrap(work: Coroutine[Any, Any, Any], at: Iterable[int]) -> tuple[Coroutine[Any, Any, Any], Stepped]:
        task: asyncio.Task[Any] | None = None

        def cancel() -> None:
            assert task is not None
            task.cancel()

        stepped = Stepped(work, at, cancel, late=late)

        async def run() -> Any:
            nonlocal task
            task = asyncio.current_task()
            return await stepped

        return run(), stepped

    return wrap


async def run_stepped(work: Coroutine[Any, Any, Any], at: Iterable[int], interrupted: Interrupted) -> Run:
    """Run `work` in a task of its own, interrupted at the suspensions `at`; return how it has ended."""
    coroutine, stepped = interrupted(work, at)
    task = asyncio.create_task(coroutine)
    done, _ = await asyncio.wait({task}, timeout=SAFETY)
    if not done:
        task.cancel()
        raise AssertionError(f"interrupted at {sorted(at)}, it hangs: {task!r}")
    if task.cancelled():
        return Run(stepped.count, stepped.interrupts, error=asyncio.CancelledError())
    if task.exception() is not None:
        return Run(stepped.count, stepped.interrupts, error=task.exception())
    return Run(stepped.count, stepped.interrupts, value=task.result())


async def every_step(
    one: Callable[[tuple[int, ...]], Coroutine[Any, Any, Run]],
    *,
    first: tuple[int, ...] = (),
    quiet_runs: int = QUIET_RUNS,
    limit: int = 500,
) -> AsyncIterator[tuple[tuple[int, ...], Run]]:
    """Call `one` with the suspensions to interrupt at, ``(*first, 1)``, ``(*first, 2)`` …, counted on from the last of
    `first`, until `quiet_runs` runs in a row end before their turn comes; yield each with its run."""
    quiet = 0
    start = first[-1] if first else 0
    for step in range(1, limit):
        at = (*first, start + step)
        run = await one(at)
        yield at, run
        quiet = quiet + 1 if run.interrupts < len(at) else 0
        if quiet == quiet_runs:
            return
    raise AssertionError(f"still suspended after {limit} suspensions")
