"""Many files at once: what is in flight is bounded, items are pulled lazily, nothing outlives the caller."""

from __future__ import annotations

import asyncio
import contextvars
import gc
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import aclosing
from typing import Any

import pytest

from aproxy_storage import InvalidPath, NotFound, ProxyStorage
from aproxy_storage.backends.memory import MemoryBackend
from aproxy_storage.meta_backends.memory import MemoryMetaBackend

SAFETY = 30.0
CALLER: contextvars.ContextVar[str] = contextvars.ContextVar("caller", default="nobody")


class CountingBackend(MemoryBackend):
    """Counts what is in flight; a write waits for `gate` where there is one."""

    def __init__(self) -> None:
        super().__init__()
        self.in_flight = self.most = self.begun = 0
        self.gate: asyncio.Event | None = None
        self.slow: Callable[[str], bool] = lambda key: True

    async def _turn(self, key: str, gate: asyncio.Event | None = None) -> None:
        self.in_flight += 1
        self.begun += 1
        self.most = max(self.most, self.in_flight)
        try:
            for _ in range(3):
                await asyncio.sleep(0)
            if gate is not None and self.slow(key):
                await gate.wait()
        finally:
            self.in_flight -= 1

    async def _write(self, key: str, *args: Any, **kwargs: Any) -> Any:
        await self._turn(key, self.gate)
        return await super()._write(key, *args, **kwargs)

    async def _discard(self, key: str, **kwargs: Any) -> None:
        await self._turn(key)
        await super()._discard(key, **kwargs)


@pytest.fixture
def backend() -> CountingBackend:
    return CountingBackend()


@pytest.fixture
def storage(backend: CountingBackend) -> ProxyStorage:
    return ProxyStorage("media", originals=backend, meta=MemoryMetaBackend())


class Items:
    """An iterable of items, made on the way, that counts how many were pulled; sync or async."""

    def __init__(self, count: int, fail_at: int | None = None, content: Callable[[int], Any] = lambda n: b"x") -> None:
        self.count = count
        self.fail_at = fail_at
        self.content = content
        self.pulled = 0
        self.closed = False

    def _item(self) -> tuple[str, Any]:
        if self.pulled == self.fail_at:
            raise ZeroDivisionError("the items failed")
        self.pulled += 1
        return f"{self.pulled}.txt", self.content(self.pulled)

    def __iter__(self) -> Iterator[tuple[str, Any]]:
        while self.pulled < self.count:
            yield self._item()

    async def in_async(self) -> AsyncIterator[tuple[str, Any]]:
        try:
            while self.pulled < self.count:
                await asyncio.sleep(0)
                yield self._item()
        finally:
            self.closed = True


def as_given(items: Items, kind: str) -> Any:
    return iter(items) if kind == "sync" else items.in_async()


async def paths(storage: ProxyStorage) -> set[str]:
    return {record.path async for record in storage.list()}


async def turns(count: int = 50) -> None:
    """Let everybody else go on until nobody can."""
    for _ in range(count):
        await asyncio.sleep(0)


def tasks_now() -> set[asyncio.Task[Any]]:
    return asyncio.all_tasks() - {asyncio.current_task()}  # type: ignore[arg-type]


both_kinds = pytest.mark.parametrize("kind", ["sync", "async"])


@both_kinds
@pytest.mark.parametrize("concurrency", [1, 2, 7, 64])
@pytest.mark.asyncio
async def test_everything_is_saved_with_a_bounded_number_in_flight(
    storage: ProxyStorage, backend: CountingBackend, kind: str, concurrency: int
) -> None:
    async with asyncio.timeout(SAFETY):
        items = Items(50)
        results = [result async for result in storage.save_many(as_given(items, kind), concurrency=concurrency)]
        assert {result.value for result in results} == {f"{n}.txt" for n in range(1, 51)}
        assert all(result.ok and result.item == result.value for result in results)
        assert backend.most <= concurrency
        assert backend.most == min(concurrency, 50) or kind == "async"  # those may come too slowly
        assert await paths(storage) == {f"{n}.txt" for n in range(1, 51)}


@pytest.mark.parametrize("concurrency", [1, 5])
@pytest.mark.asyncio
async def test_deletes_are_bounded_too(storage: ProxyStorage, backend: CountingBackend, concurrency: int) -> None:
    async with asyncio.timeout(SAFETY):
        async for _ in storage.save_many(Items(20)):
            pass
        backend.most = 0
        wanted = [f"{n}.txt" for n in range(1, 26)]  # five of them do not exist
        results = [result async for result in storage.delete_many(wanted, concurrency=concurrency)]
        assert backend.most == concurrency
        assert len(results) == 25
        assert [type(result.error) for result in results if not result.ok] == [NotFound] * 5
        assert await paths(storage) == set()
        assert not backend._objects
        again = [result async for result in storage.delete_many(wanted, concurrency=concurrency, missing_ok=True)]
        assert all(result.ok for result in again)
        assert len(again) == 25


@both_kinds
@pytest.mark.asyncio
async def test_items_are_pulled_no_further_than_what_is_in_flight_or_waits(storage: ProxyStorage, kind: str) -> None:
    """A slow consumer holds everything up: `concurrency` in flight or held up at the door, as many results waiting."""
    async with asyncio.timeout(SAFETY):
        items = Items(100)
        taken = 0
        async with aclosing(storage.save_many(as_given(items, kind), concurrency=4)) as results:
            async for result in results:
                assert result.ok
                taken += 1
                await turns()
                assert items.pulled <= taken + 4 + 4
        assert taken == 100


@both_kinds
@pytest.mark.asyncio
async def test_items_are_pulled_one_by_one_while_saves_wait(
    storage: ProxyStorage, backend: CountingBackend, kind: str
) -> None:
    async with asyncio.timeout(SAFETY):
        items = Items(100)
        backend.gate = asyncio.Event()
        async with aclosing(storage.save_many(as_given(items, kind), concurrency=4)) as results:
            first = asyncio.ensure_future(anext(results))
            await turns()
            assert items.pulled == backend.in_flight == 4
            backend.gate.set()
            assert (await first).ok
        assert not tasks_now()


@pytest.mark.asyncio
async def test_nothing_begins_before_the_first_result_is_asked_for(storage: ProxyStorage) -> None:
    async with asyncio.timeout(SAFETY):
        items = Items(10)
        results = storage.save_many(iter(items))
        await turns()
        assert items.pulled == 0
        assert not tasks_now()
        await results.aclose()
        assert await paths(storage) == set()


@both_kinds
@pytest.mark.asyncio
async def test_an_error_of_one_item_is_its_result(storage: ProxyStorage, kind: str) -> None:
    async with asyncio.timeout(SAFETY):

        def content(number: int) -> Any:
            return object() if number == 3 else b"x"

        items = Items(9, content=content)
        results = {result.item: result async for result in storage.save_many(as_given(items, kind), concurrency=2)}
        assert len(results) == 9
        assert [name for name, result in results.items() if not result.ok] == ["3.txt"]
        assert results["3.txt"].value is None
        bad = [result async for result in storage.save_many([("../x", b"x"), ("ok", b"x")])]
        assert sorted((result.item, type(result.error)) for result in bad) == [
            ("../x", InvalidPath),
            ("ok", type(None)),
        ]


@both_kinds
@pytest.mark.asyncio
async def test_an_error_of_the_items_ends_the_whole_with_that_error(
    storage: ProxyStorage, backend: CountingBackend, kind: str
) -> None:
    async with asyncio.timeout(SAFETY):
        items = Items(50, fail_at=10)
        backend.gate = asyncio.Event()
        backend.slow = lambda key: key == "9.txt"
        yielded = []
        with pytest.raises(ZeroDivisionError, match="the items failed"):
            async for result in storage.save_many(as_given(items, kind), concurrency=3):
                yielded.append(result.value)  # noqa: PERF401  what came before the error is wanted
        assert not tasks_now()
        assert backend.in_flight == 0
        assert set(yielded) <= await paths(storage)
        assert "9.txt" not in await paths(storage)  # was in flight, is undone
        assert set(backend._objects) == await paths(storage)


@pytest.mark.asyncio
async def test_an_error_that_is_no_storage_error_ends_the_whole(storage: ProxyStorage) -> None:
    """An item that is no pair is a mistake of the caller's program."""
    async with asyncio.timeout(SAFETY):
        with pytest.raises(IndexError):
            async for _ in storage.save_many([("a.txt", b"x"), ("b.txt",)], concurrency=2):
                pass
        assert not tasks_now()
        with pytest.raises(TypeError):
            async for _ in storage.save_many(17):  # type: ignore[arg-type]
                pass


@both_kinds
@pytest.mark.asyncio
async def test_a_break_undoes_what_is_in_flight(storage: ProxyStorage, backend: CountingBackend, kind: str) -> None:
    async with asyncio.timeout(SAFETY):
        items = Items(50)
        backend.gate = asyncio.Event()
        backend.slow = lambda key: key not in ("1.txt", "2.txt")
        yielded = []
        async with aclosing(storage.save_many(as_given(items, kind), concurrency=5)) as results:
            async for result in results:
                yielded.append(result.value)
                if len(yielded) == 2:
                    break
            await turns()
            assert backend.in_flight == 5
        # At once, not some time after:
        assert not tasks_now()
        assert backend.in_flight == 0
        assert await paths(storage) == {"1.txt", "2.txt"} == set(yielded)
        assert set(backend._objects) == {"1.txt", "2.txt"}
        assert [record.state async for record in storage.meta.list() if record.state == "pending"] == []
        assert items.closed or kind == "sync"


@pytest.mark.asyncio
async def test_a_cancelled_consumer_undoes_what_is_in_flight(storage: ProxyStorage, backend: CountingBackend) -> None:
    async with asyncio.timeout(SAFETY):
        backend.gate = asyncio.Event()
        backend.slow = lambda key: key != "1.txt"
        yielded = []

        async def consume() -> None:
            async for result in storage.save_many(Items(50), concurrency=5):
                yielded.append(result.value)  # noqa: PERF401

        task = asyncio.create_task(consume())
        await turns()
        assert yielded == ["1.txt"]
        assert backend.in_flight == 5
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert not tasks_now()
        assert await paths(storage) == {"1.txt"} == set(backend._objects)


@pytest.mark.asyncio
async def test_an_error_that_nobody_waits_for_any_more_is_no_complaint_of_the_loop(
    storage: ProxyStorage, backend: CountingBackend
) -> None:
    """The items fail while the consumer is busy with a result, and is then cancelled."""
    complaints: list[Any] = []
    asyncio.get_running_loop().set_exception_handler(lambda _, context: complaints.append(context))
    async with asyncio.timeout(SAFETY):

        async def consume() -> None:
            async with aclosing(storage.save_many(Items(50, fail_at=2), concurrency=1)) as results:
                async for _ in results:
                    await asyncio.sleep(SAFETY)

        task = asyncio.create_task(consume())
        await turns()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        del task
        await turns()
    gc.collect()
    await asyncio.sleep(0)
    assert not complaints


@both_kinds
@pytest.mark.asyncio
async def test_no_items(storage: ProxyStorage, kind: str) -> None:
    async with asyncio.timeout(SAFETY):
        assert [result async for result in storage.save_many(as_given(Items(0), kind))] == []
        assert [result async for result in storage.delete_many([])] == []
        assert not tasks_now()


@pytest.mark.asyncio
async def test_at_least_one_at_a_time(storage: ProxyStorage) -> None:
    async with asyncio.timeout(SAFETY):
        with pytest.raises(ValueError, match="concurrency"):
            async for _ in storage.save_many(Items(1), concurrency=0):
                pass


@both_kinds
@pytest.mark.asyncio
async def test_the_callers_context_is_seen_by_items_and_content(storage: ProxyStorage, kind: str) -> None:
    seen: set[tuple[str, str]] = set()

    async def in_async() -> AsyncIterator[bytes]:
        seen.add(("async content", CALLER.get()))
        yield b"x"

    def in_sync() -> Iterator[bytes]:
        seen.add(("sync content", CALLER.get()))  # in a worker thread
        yield b"x"

    def content(number: int) -> Any:
        seen.add(("items", CALLER.get()))
        return in_async() if number % 2 else in_sync()

    async with asyncio.timeout(SAFETY):
        token = CALLER.set("request 7")
        try:
            async for result in storage.save_many(as_given(Items(6, content=content), kind), concurrency=2):
                assert result.ok
        finally:
            CALLER.reset(token)
    assert seen == {(what, "request 7") for what in ("items", "async content", "sync content")}


@pytest.mark.asyncio
async def test_names_that_collide_get_a_path_each(storage: ProxyStorage) -> None:
    async with asyncio.timeout(SAFETY):
        results = [r async for r in storage.save_many((("same.txt", b"%d" % n) for n in range(20)), concurrency=20)]
        assert len({result.value for result in results}) == 20
        for result in results:
            async with storage.open(result.value) as file:
                assert await file.read() in {b"%d" % n for n in range(20)}
