"""What asyncio has no cheap word for: waiting for a future that is not ours to cancel, asking it, and not asking it."""

from __future__ import annotations

import asyncio
from typing import Any, TypeVar

from .errors import BackendUnavailable

__all__ = ["outcome_of", "over", "seen"]

T = TypeVar("T")


def seen(future: asyncio.Future[Any]) -> None:
    """Keep asyncio from complaining about the error of a future that nobody asks any more."""
    if not future.cancelled():
        future.exception()


def outcome_of(task: asyncio.Task[T]) -> T:
    """Return the result of a `task` that is done and that its owner holds, or raise its error.

    Raises:
        BackendUnavailable: it was cut short, by an `aclose` that did not wait any longer. Its CancelledError would tell
            a caller that he himself was cancelled, and a TaskGroup drops such a caller without a word.
    """
    if task.cancelled():
        raise BackendUnavailable(f"closed while this was under way: {task.get_name()}", outcome_unknown=True)
    return task.result()


async def over(future: asyncio.Future[Any]) -> None:
    """Wait until `future` is done, whatever comes of it. Who is cancelled meanwhile leaves it alone.

    As ``asyncio.wait((future,))``, which takes five times as long: as long as many a small request's own code.
    """
    if future.done():
        return
    waiter = future.get_loop().create_future()

    def wake(_: object) -> None:
        if not waiter.done():
            waiter.set_result(None)

    future.add_done_callback(wake)
    try:
        await waiter
    finally:
        future.remove_done_callback(wake)
