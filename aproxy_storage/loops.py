"""One loop-bound resource per event loop and process."""

from __future__ import annotations

import asyncio
import os
import threading
import weakref
from collections.abc import Callable
from typing import Generic, TypeVar

__all__ = ["PerLoop"]

T = TypeVar("T")

_forgetting = threading.Lock()


def _after_fork() -> None:
    global _forgetting
    _forgetting = threading.Lock()  # another thread of the parent may have held the old one


os.register_at_fork(after_in_child=_after_fork)


class PerLoop(Generic[T]):
    """Give each event loop its own instance of what `factory` makes, on first use in that loop.

    Storages are module-level constants used from several loops (ASGI, the sync bridge, tests) and across forks.
    Whatever is bound to a loop lives in here. Nothing crosses a fork: the child forgets the parent's instances
    without closing them, because closing would speak on sockets that the parent still uses, and keeps them
    referenced, because collecting them would close them too.
    """

    def __init__(self, factory: Callable[[], T]) -> None:
        self._factory = factory
        self._pid = os.getpid()
        self._lock = threading.Lock()
        self._items: weakref.WeakKeyDictionary[asyncio.AbstractEventLoop, T] = weakref.WeakKeyDictionary()
        self._of_parents: list[object] = []

    def get(self) -> T:
        """Return the running loop's instance, made now if there is none yet."""
        loop = asyncio.get_running_loop()
        if self._pid != os.getpid():
            self._forget_parent()
        try:
            return self._items[loop]
        except KeyError:
            with self._lock:
                if loop not in self._items:
                    # What an asyncio.run() that is over left behind would keep its loop alive through its value.
                    for other in [other for other in self._items if other.is_closed()]:
                        del self._items[other]
                    self._items[loop] = self._factory()
                return self._items[loop]

    def pop(self) -> T | None:
        """Forget and return the running loop's instance; None if it has none."""
        loop = asyncio.get_running_loop()
        if self._pid != os.getpid():
            self._forget_parent()
        with self._lock:
            return self._items.pop(loop, None)

    def _forget_parent(self) -> None:
        with _forgetting:
            if self._pid == os.getpid():  # another thread was faster, and its loop may have its instance already
                return
            if self._items:
                self._of_parents.append(self._items)
            # A fork may have happened while another thread held the lock.
            self._lock = threading.Lock()
            self._items = weakref.WeakKeyDictionary()
            self._pid = os.getpid()
