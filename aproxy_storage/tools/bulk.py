"""Many files at once: bounded in flight and in memory, results as they come, an error per item."""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
from collections.abc import AsyncGenerator, AsyncIterable, Awaitable, Callable, Iterable
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from ..errors import StorageError
from ..proxy import Path, ProxyStorage

__all__ = ["Result", "delete_many", "run_many", "save_many"]

I = TypeVar("I")  # noqa: E741
R = TypeVar("R")


@dataclass(frozen=True, slots=True)
class Result(Generic[I, R]):
    """What became of one item: its `value`, or its `error`."""

    item: I
    value: R | None = None
    error: StorageError | None = None

    @property
    def ok(self) -> bool:
        """Whether it was done."""
        return self.error is None


async def save_many(
    storage: ProxyStorage,
    items: Iterable[tuple[str, Any]] | AsyncIterable[tuple[str, Any]],
    *,
    concurrency: int = 32,
    **options: Any,
) -> AsyncGenerator[Result[str, str], None]:
    """Save pairs of (name, content); yield a `Result` (the name, the path) for each as it is done.

    At most `concurrency` saves are in flight, and as many results wait to be taken; `items` is read no further ahead,
    so contents may be made on the way. `options` go to every `save`. A StorageError of one item is its result;
    anything else ends the whole. If the caller stops or is cancelled, saves in flight are cancelled and undone; what
    was yielded is stored.
    """
    results = run_many(
        storage,
        items,
        lambda item: storage.save(item[0], item[1], **options),
        name=lambda item: item[0],
        concurrency=concurrency,
    )
    async with contextlib.aclosing(results):  # closing a generator does not close the one that it iterates over
        async for result in results:
            yield result
    with contextlib.suppress(StorageError):  # the next one does it
        await storage.tidy()


async def delete_many(
    storage: ProxyStorage,
    paths: Iterable[Path] | AsyncIterable[Path],
    *,
    concurrency: int = 32,
    missing_ok: bool = False,
) -> AsyncGenerator[Result[Path, None], None]:
    """Delete `paths`; yield a `Result` for each as it is done. Bounds and cancellation as `save_many`."""
    results = run_many(
        storage,
        paths,
        lambda path: storage.delete(path, missing_ok=missing_ok),
        name=lambda path: path,
        concurrency=concurrency,
    )
    async with contextlib.aclosing(results):
        async for result in results:
            yield result


async def run_many(
    storage: ProxyStorage,
    items: Iterable[I] | AsyncIterable[I],
    work: Callable[[I], Awaitable[R]],
    *,
    name: Callable[[I], Any],
    concurrency: int,
) -> AsyncGenerator[Result[Any, R], None]:
    """Await `work` for every item, at most `concurrency` at a time; yield results as they come."""
    if concurrency < 1:
        raise ValueError("concurrency must be at least 1")
    results: asyncio.Queue[Result[Any, R] | None] = asyncio.Queue()
    room = asyncio.Semaphore(concurrency)  # for results; not the queue's size, so that the end mark always fits
    feed = _Feed(items)

    async def worker() -> None:
        async for item in feed:
            result: Result[Any, R]
            try:
                result = Result(name(item), value=await work(item))
            except StorageError as error:
                result = Result(name(item), error=error)
            del item  # its content may be large, and the queue may be full
            await room.acquire()
            results.put_nowait(result)

    async def supervise() -> None:
        try:
            async with asyncio.TaskGroup() as group:
                for _ in range(concurrency):
                    group.create_task(worker())
        finally:
            await feed.aclose()
            results.put_nowait(None)

    # In the caller's context: a Django connection or a request id goes with the work.
    supervisor = storage.cleanup.start(
        supervise(), name="work on many files", context=contextvars.copy_context(), log=False
    )
    try:
        while (result := await results.get()) is not None:
            room.release()
            yield result
        await supervisor
    except BaseExceptionGroup as group:
        raise _single(group) from None
    finally:
        supervisor.cancel()
        await asyncio.wait({supervisor})


class _Feed(Generic[I]):
    """Hands the items of one iterable to several workers."""

    def __init__(self, items: Iterable[I] | AsyncIterable[I]) -> None:
        self._async = aiter(items) if isinstance(items, AsyncIterable) else None
        self._sync = iter(items) if isinstance(items, Iterable) else None
        if self._async is None and self._sync is None:
            raise TypeError(f"items must be iterable, not {type(items).__name__}")
        self._lock = asyncio.Lock()

    def __aiter__(self) -> _Feed[I]:
        return self

    async def __anext__(self) -> I:
        if self._async is not None:
            async with self._lock:  # an async generator takes one caller at a time
                return await anext(self._async)
        assert self._sync is not None
        try:
            return next(self._sync)
        except StopIteration:
            raise StopAsyncIteration from None

    async def aclose(self) -> None:
        close = getattr(self._async, "aclose", None)
        if close is not None:
            await close()


def _single(group: BaseExceptionGroup[BaseException]) -> BaseException:
    error: BaseException = group
    while isinstance(error, BaseExceptionGroup) and len(error.exceptions) == 1:
        error = error.exceptions[0]
    return error
