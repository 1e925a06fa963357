"""Looks at the files of callers, which may be on a disk that hangs: what to know of it, without asking that disk."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable
from typing import Any, TypeVar

from .errors import ContentError

__all__ = ["Looks"]

T = TypeVar("T")

HUNG = 10.0  # seconds without an answer after which the thread of a look does not count any more
GIVEN_UP = 60.0  # seconds without an answer after which a look speaks against its directory
MOST_GIVEN_UP = 4  # looks into one directory that may be so before further ones are refused


class Looks:
    """The looks under way in worker threads, one a thread. Not bound to a loop; the threads may be of several pools.

    By directories: on which device or mount a file is, only a look at it would tell, which may hang.
    """

    def __init__(self) -> None:
        self.fresh()

    def fresh(self) -> None:
        """Forget them: after a fork none of their threads is here."""
        self._under_way: dict[int, tuple[str, float]] = {}  # thread -> directory, begin; each step on it is atomic

    def at(self, path: str | bytes | os.PathLike[Any], function: Callable[..., T], *args: Any) -> T:
        """Call `function`, which looks at the file `path`, in this thread, and return its result."""
        me = threading.get_ident()
        self._under_way[me] = (_directory(path), time.monotonic())
        try:
            return function(*args)
        finally:
            self._under_way.pop(me, None)

    def hung(self) -> set[int]:
        """Return the threads whose looks hang."""
        late = time.monotonic() - HUNG
        return {thread for thread, (_, began) in tuple(self._under_way.items()) if began <= late}

    def check(self, path: str | bytes | os.PathLike[Any]) -> None:
        """Raise ContentError if looks into the directory of `path` hang, so that one more would only cost a thread."""
        if len(self._under_way) < MOST_GIVEN_UP:
            return
        late, directory = time.monotonic() - GIVEN_UP, _directory(path)
        under_way = tuple(self._under_way.values())
        if sum(where == directory and began <= late for where, began in under_way) >= MOST_GIVEN_UP:
            raise ContentError(
                f"{os.fsdecode(path)!r} was not read: {MOST_GIVEN_UP} looks at files of its directory have had no "
                f"answer for {GIVEN_UP:g} seconds; try again when its disk or server answers"
            )


def _directory(path: str | bytes | os.PathLike[Any]) -> str:
    return os.path.dirname(os.fsdecode(path))
