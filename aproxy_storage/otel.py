"""Spans for OpenTelemetry: one for each save, replacement and opening of a file, and in it one for each attempt.

::

    from aproxy_storage.otel import instrument

    stop = instrument(media)  # or with tracer_provider=
    ...
    stop()

Needs ``pip install 'aproxy-storage[otel]'``. Names and contents of files stay out of spans; paths do too, unless asked.
"""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, Any, TypeVar

from .errors import MissingDependency

if TYPE_CHECKING:
    from .attempts import Attempt
    from .proxy import ProxyStorage

__all__ = ["instrument"]

T = TypeVar("T")

_VERBS = {"_save": "save", "replace": "replace", "_open_file": "open"}


def instrument(storage: ProxyStorage, *, tracer_provider: Any = None, paths: bool = False) -> Callable[[], None]:
    """Let `storage` make spans; return a function that ends it.

    Args:
        tracer_provider: by default the global one.
        paths: put the path, or the wished name, into the spans of verbs.

    Its `on_attempt`, if it has one, is called as before.

    Raises:
        MissingDependency: opentelemetry-api is not installed.
    """
    try:
        from opentelemetry import trace
    except ImportError as error:
        raise MissingDependency.of("opentelemetry-api", "otel") from error
    tracer = trace.get_tracer("aproxy_storage", tracer_provider=tracer_provider)
    before = storage.on_attempt

    def spanned(verb: str, call: Callable[..., Awaitable[T]]) -> Callable[..., Awaitable[T]]:
        async def wrapper(path: Any, *args: Any, **options: Any) -> T:
            with tracer.start_as_current_span(f"aproxy_storage.{verb}") as span:
                span.set_attribute("aproxy_storage.storage", storage.name)
                if paths and path is not None:
                    span.set_attribute("aproxy_storage.path", str(getattr(path, "path", path)))
                return await call(path, *args, **options)

        return wrapper

    def on_attempt(attempt: Attempt) -> None:
        # It is over: the span is made afterwards, with the times that it had.
        end = time.time_ns()
        span = tracer.start_span(
            f"aproxy_storage.attempt {attempt.kind}", start_time=end - int(attempt.seconds * 1_000_000_000)
        )
        span.set_attribute("aproxy_storage.storage", attempt.storage)
        span.set_attribute("aproxy_storage.original", attempt.original)
        span.set_attribute("aproxy_storage.outcome", attempt.outcome)
        if attempt.size is not None:
            span.set_attribute("aproxy_storage.bytes", attempt.size)
        if attempt.error is not None:
            span.set_attribute("error.type", type(attempt.error).__name__)
            if attempt.outcome not in ("cancelled", "outrun"):
                span.set_status(trace.StatusCode.ERROR)
        span.end(end_time=end)
        if before is not None:
            before(attempt)

    wrapped = {name: spanned(verb, getattr(storage, name)) for name, verb in _VERBS.items()}
    vars(storage).update(wrapped)
    storage.on_attempt = on_attempt

    def stop() -> None:
        for name, wrapper in wrapped.items():
            if vars(storage).get(name) is wrapper:
                delattr(storage, name)
        storage.on_attempt = before

    return stop
