"""Context variables that change threads, those of asgiref's `Local` among them."""

from __future__ import annotations

import contextvars

import asgiref.local
import asgiref.sync

__all__ = ["BOUND_TO_THREADS", "take_over"]

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
