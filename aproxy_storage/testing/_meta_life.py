"""The promises of `setup`, `aclose` and `after_commit`, of errors, of cancellation and of event loops."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Coroutine
from typing import Any

import pytest

from ..errors import AlreadyExists, StorageError
from ..meta_backends.base import MetaBackend
from ..records import MetaRecord, Revision
from ._meta_hooks import MetaBackendHooks, listed, make_record

__all__ = ["LifeTests"]


def others(function: Callable[[], Coroutine[Any, Any, Any]], *, count: int) -> list[Any]:
    """Run ``function()`` in `count` threads with an event loop each, at once; return the results."""
    results: list[Any] = []

    def run() -> None:
        try:
            results.append(asyncio.run(function()))
        except BaseException as error:
            results.append(error)

    threads = [threading.Thread(target=run) for _ in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for result in results:
        if isinstance(result, BaseException):
            raise result
    return results


@pytest.mark.asyncio
class LifeTests(MetaBackendHooks):
    async def test_after_commit_runs_at_once(self, meta: MetaBackend) -> None:
        ran: list[int] = []

        async def callback() -> None:
            ran.append(1)

        await meta.after_commit(callback)
        assert ran == [1]

    async def test_setup_again(self, meta: MetaBackend) -> None:
        record = await meta.create(make_record("a"))
        await asyncio.gather(*(meta.setup() for _ in range(8)))
        others(meta.setup, count=4)
        assert await meta.get("a") == record

    async def test_aclose_twice_and_use_after_it(self, meta: MetaBackend) -> None:
        await meta.aclose()
        await meta.aclose()
        record = await meta.create(make_record("a"))
        await meta.aclose()
        assert await meta.get("a") == record
        await asyncio.gather(meta.aclose(), meta.get("a"), meta.aclose())
        assert await meta.get("a") == record

    async def test_several_loops_and_threads(self, meta: MetaBackend) -> None:
        async def work() -> int:
            won = 0
            for answer in await asyncio.gather(
                *(meta.create(make_record(f"{number:03}")) for number in range(50)), return_exceptions=True
            ):
                assert isinstance(answer, MetaRecord | AlreadyExists), repr(answer)
                won += isinstance(answer, MetaRecord)
            assert await meta.count() == 50
            await meta.aclose()
            return won

        results = await asyncio.to_thread(others, work, count=4)
        assert sum(results) == 50
        assert await meta.count() == 50

    async def test_one_loop_after_another(self, meta: MetaBackend) -> None:
        def rounds() -> None:
            for number in range(10):
                asyncio.run(self._one_round(meta, number))

        await asyncio.to_thread(rounds)
        assert await meta.count() == 10

    @staticmethod
    async def _one_round(meta: MetaBackend, number: int) -> None:
        await meta.create(make_record(str(number)))
        assert await meta.count() == number + 1
        if number % 2:  # a loop that ends without aclose must not hurt the next one
            await meta.aclose()

    async def test_cancelled_calls_leave_it_usable(self, meta: MetaBackend) -> None:
        await meta.create_many([make_record(f"old/{number}") for number in range(64)])
        works: list[Callable[[int], Coroutine[Any, Any, Any]]] = [
            lambda n: meta.create(make_record(f"new/{n}")),
            lambda n: meta.update(f"old/{n}", {"size": n, "version": 1}),
            lambda n: meta.get(f"old/{n}"),
            lambda n: meta.create_many([make_record(f"many/{n}/{m}") for m in range(20)]),
            lambda n: listed(meta.list("old/")),
            lambda n: meta.delete(f"old/{n + 32}"),
        ]
        loop = asyncio.get_running_loop()
        for number, work in ((n, work) for work in works for n in range(10)):
            task = loop.create_task(work(number))
            for _ in range(number % 5):  # at another await point each time
                await asyncio.sleep(0)
            if number > 5:
                await asyncio.sleep(0.0005 * number)
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)
        for record in [record async for record in meta.list()]:
            if record.path.startswith("old/") and record.version:  # whole or not at all
                assert record.size == int(record.path[4:])
        await meta.create(make_record("after"))
        assert await meta.exists("after")
        for left in reversed(range(100)):  # a statement whose caller is gone may land between the two looks
            seen, behind = await listed(meta.list()), sorted(row["path"] for row in await self.rows_behind(meta))
            if seen == behind:
                break
            assert left, f"listed are {seen}, there are {behind}"
            await asyncio.sleep(0.02)

    async def test_errors_say_what_where_and_by_whom(self, meta: MetaBackend) -> None:
        await meta.create(make_record("a"))
        failures: list[tuple[str, Callable[[], Coroutine[Any, Any, Any]]]] = [
            ("create", lambda: meta.create(make_record("a"))),
            ("get", lambda: meta.get("no")),
            ("update", lambda: meta.update("no", {})),
            ("delete", lambda: meta.delete("no")),
            ("update", lambda: meta.update("a", {}, expect=Revision("x", 1))),
        ]
        for operation, work in failures:
            with pytest.raises(StorageError) as caught:
                await work()
            assert caught.value.operation == operation
            assert caught.value.path in ("a", "no")
            assert repr(caught.value.path) in str(caught.value)
