"""Context variables that change threads, those of asgiref's `Local` among them; one tells whose thread code is for."""

from __future__ import annotations

import contextvars
import threading
from typing import Any

import asgiref.local
import asgiref.sync

__all__ = ["BOUND_TO_THREADS", "get_executor", "renew_lock", "set_executor", "take_over"]

_CURRENT = "current"  # of AsyncToSync.executors
_LOCKS = {"_lock", "_thread_lock"}  # of a Local; the second until asgiref 3.11
_NOTHING = object()

#: What a Local keeps is visible in one thread, also where its context variable goes along to another (asgiref 3.12 on).
BOUND_TO_THREADS = hasattr(asgiref.local, "_Storage")


def take_over(context: contextvars.Context) -> None:
    """Give this thread, and the context it is in, the variables of `context`."""
    restore = getattr(asgiref.sync, "_restore_context", None)
    if restore is not None:
        restore(context)
        return
    for variable, value in context.items():
        if variable.get(_NOTHING) is not value:
            variable.set(value)


def get_executor() -> Any:
    """Return the executor for thread-sensitive code of this context; None: asgiref's own choice."""
    return getattr(_executors(), _CURRENT, None)


def set_executor(executor: Any) -> None:
    """Make `executor` the one for thread-sensitive code of this context."""
    setattr(_executors(), _CURRENT, executor)


def renew_lock() -> None:
    """Give asgiref's `Local` of the executors a lock that is free. For the child of a fork: another thread of the
    parent may have had the one it inherits, and every `sync_to_async` would wait for it for ever."""
    executors: Any = asgiref.sync.AsyncToSync.executors
    for name in _LOCKS & vars(executors).keys():
        object.__setattr__(executors, name, threading.RLock())


def _executors() -> Any:
    # What lies behind the Local is a context variable, and needs no lock. The Local has one, and an exception that a
    # signal handler raises right after it was taken leaves it taken: the loop would wait for it for ever.
    executors = asgiref.sync.AsyncToSync.executors
    return getattr(executors, "_storage", executors)
