"""Cancel a coroutine at each of its awaits, one after the other: no timing, nothing left to luck."""

from __future__ import annotations

import asyncio
import types
from collections.abc import AsyncIterator, Callable, Coroutine, Generator
from typing import Any, TypeVar

__all__ = ["EVERY_WAY", "Interruption", "interruptions"]

T = TypeVar("T")

#: How a task may be cancelled: as it begins to wait; when what it waits for has just come; at two awaits in a row.
EVERY_WAY = ("waiting", "answered", "twice")

_LIMIT = 5000  # awaits of one call: more means that it never ends


class Interruption:
    """One run of the work, cancelled at await number `at`.

    Attributes:
        error: the CancelledError, or what became of it; None if the work returned.
        whole: the work came to its end without having been cancelled.
    """

    def __init__(self, way: str, at: int) -> None:
        self.way = way
        self.at = at
        self.error: BaseException | None = None
        self.cancelled = False

    def __str__(self) -> str:
        return f"cancelled at await {self.at} ({self.way})"

    @property
    def whole(self) -> bool:
        return not self.cancelled

    async def run(self, work: Coroutine[Any, Any, Any]) -> None:
        """Run `work` in a task of its own and wait for the end of it."""
        task = asyncio.ensure_future(self._cancelling(work))
        await asyncio.wait([task])
        try:
            await task
        except BaseException as error:  # a CancelledError comes with what the backend noted on it
            self.error = error

    async def _cancelling(self, work: Coroutine[Any, Any, T]) -> T:
        return await _step_by_step(work, self._at_await)

    def _at_await(self, number: int, waited_for: Any) -> None:
        if number != self.at and not (self.way == "twice" and number == self.at + 1):
            return
        task = asyncio.current_task()
        assert task is not None
        self.cancelled = True
        if self.way == "answered" and asyncio.isfuture(waited_for):
            # Registered before the task's own callback, so that the answer is there and is not looked at any more.
            waited_for.add_done_callback(lambda _: task.cancel())
        else:
            task.cancel()


async def interruptions(
    make_work: Callable[[], Coroutine[Any, Any, Any]], *, ways: tuple[str, ...] = EVERY_WAY
) -> AsyncIterator[Interruption]:
    """Run fresh work again and again, cancelled at its first await, its second … until it comes to its end.

    For each way and await one `Interruption` is given, when its work has ended; the last of each way is `whole`.
    Whoever iterates sets the stage anew.
    """
    for way in ways:
        for at in range(1, _LIMIT):
            interruption = Interruption(way, at)
            await interruption.run(make_work())
            if interruption.whole and interruption.error is not None:
                raise interruption.error
            yield interruption
            if interruption.whole:
                break
        else:
            raise AssertionError(f"the work still waits at await number {_LIMIT}")


@types.coroutine
def _step_by_step(work: Coroutine[Any, Any, T], at_await: Callable[[int, Any], None]) -> Generator[Any, Any, T]:
    """Await `work`, and tell of each await before the loop sees it."""
    number = 0
    step: Callable[[], Any] = lambda: work.send(None)  # noqa: E731
    while True:
        try:
            waited_for = step()
        except StopIteration as stop:
            result: T = stop.value
            return result
        number += 1
        at_await(number, waited_for)
        try:
            value = yield waited_for
        except BaseException as error:
            step = _thrower(work, error)
        else:
            step = _sender(work, value)


def _sender(work: Coroutine[Any, Any, Any], value: Any) -> Callable[[], Any]:
    return lambda: work.send(value)


def _thrower(work: Coroutine[Any, Any, Any], error: BaseException) -> Callable[[], Any]:
    return lambda: work.throw(error)
