"""The faults do what they say, and wrapped backends without faults keep every promise."""

import asyncio
import errno
import multiprocessing
import os
import signal
from collections.abc import AsyncIterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio

from aproxy_storage.backends.filesystem import FileSystemBackend
from aproxy_storage.backends.memory import MemoryBackend
from aproxy_storage.errors import AlreadyExists, BackendUnavailable, DeadlineExceeded, NotFound, OutOfSpace
from aproxy_storage.meta_backends.memory import MemoryMetaBackend
from aproxy_storage.records import MetaRecord
from aproxy_storage.testing.backends import BackendTests
from aproxy_storage.testing.faults import (
    Crash,
    Fail,
    FaultyBackend,
    FaultyMetaBackend,
    Hang,
    Late,
    Lie,
    Plan,
    Slow,
    at,
)
from aproxy_storage.timeouts import Timeouts
from tests.backends.test_memory import MemoryBehind
from tests.meta_backends.test_memory import InMemory


class InnerBehind(MemoryBehind):
    async def put_behind(self, backend: Any, key: str, data: bytes) -> None:
        await super().put_behind(backend.inner, key, data)

    async def get_behind(self, backend: Any, key: str) -> bytes | None:
        return await super().get_behind(backend.inner, key)

    async def list_behind(self, backend: Any) -> list[str]:
        return await super().list_behind(backend.inner)


class TestWithoutFaults(InnerBehind, BackendTests):
    memory_bytes = None

    @pytest_asyncio.fixture
    async def backend(self) -> AsyncIterator[FaultyBackend]:
        async with FaultyBackend(MemoryBackend()) as backend:
            yield backend

    async def test_capabilities_are_data(self, backend: FaultyBackend) -> None:
        assert backend.capabilities == MemoryBackend.capabilities


class MetaBehind(InMemory):
    async def row_behind(self, meta: Any, path: str) -> Mapping[str, Any] | None:
        return await super().row_behind(meta.inner, path)

    async def rows_behind(self, meta: Any) -> Sequence[Mapping[str, Any]]:
        return await super().rows_behind(meta.inner)

    async def insert_behind(self, meta: Any, **columns: Any) -> None:
        await super().insert_behind(meta.inner, **columns)

    async def expire_lease_behind(self, meta: Any, path: str, *, ago: float = 1.0) -> None:
        await super().expire_lease_behind(meta.inner, path, ago=ago)


class TestMetaWithoutFaults(MetaBehind):
    @pytest_asyncio.fixture
    async def meta(self) -> AsyncIterator[FaultyMetaBackend]:
        async with FaultyMetaBackend(MemoryMetaBackend()) as meta:
            yield meta


async def content(backend: FaultyBackend, key: str) -> bytes:
    async with backend.read(key) as reader:
        return b"".join([chunk async for chunk in reader])


@pytest.mark.asyncio
async def test_fail_does_nothing_and_raises_for_each_call_or_for_one() -> None:
    backend = FaultyBackend(
        MemoryBackend(),
        Plan(write=Fail(BackendUnavailable("out of order")), stat=at(2, Fail(OSError(errno.ENOSPC, "full")))),
    )
    for _ in range(2):
        with pytest.raises(BackendUnavailable, match="out of order") as caught:
            await backend.write("key", b"x")
        assert caught.value.operation == "write"
    backend.plan.set(write=None)
    await backend.write("key", b"x")
    await backend.stat("key")
    with pytest.raises(OutOfSpace):  # mapped by the wrapped backend
        await backend.stat("key")
    await backend.stat("key")
    assert backend.plan.calls["stat"] == 3
    assert backend.plan.log[-1] == ("stat", "key")


@pytest.mark.asyncio
async def test_lie_has_done_its_work() -> None:
    backend = FaultyBackend(MemoryBackend(), Plan(write=Lie(), discard=Lie(), read=at(1, Lie())))
    with pytest.raises(DeadlineExceeded) as caught:
        await backend.write("key", b"x")
    assert caught.value.outcome_unknown
    with pytest.raises(DeadlineExceeded):
        await content(backend, "key")
    assert await content(backend, "key") == b"x"
    with pytest.raises(DeadlineExceeded):
        await backend.discard("key")
    with pytest.raises(NotFound):
        await backend.stat("key")


@pytest.mark.asyncio
async def test_late_lands_when_told_to() -> None:
    late = Late()
    backend = FaultyBackend(MemoryBackend(), Plan(write=at(1, late)))

    async def stream() -> AsyncIterator[bytes]:
        yield b"first"

    with pytest.raises(DeadlineExceeded) as caught:
        await backend.write("key", stream())
    assert caught.value.outcome_unknown
    with pytest.raises(NotFound):
        await backend.stat("key")
    await backend.write("key", b"second")
    (landed,) = await late.land()
    assert isinstance(landed, AlreadyExists)
    await backend.discard("key")
    assert await late.land() == []
    backend.plan.set(write=late)
    with pytest.raises(DeadlineExceeded):
        await backend.write("key", stream())
    await late.land()
    assert await content(backend, "key") == b"first"


@pytest.mark.asyncio
async def test_hanging_service_meets_the_deadlines_of_the_backend() -> None:
    hang = Hang()
    limits = Timeouts(operation=0.02, idle=0.02)
    backend = FaultyBackend(MemoryBackend(), Plan(write=hang, stat=hang, read=hang, chunk=hang), timeouts=limits)
    await backend.inner.write("key", b"x")
    with pytest.raises(DeadlineExceeded):
        await backend.write("other", b"x")
    with pytest.raises(DeadlineExceeded):
        await backend.stat("key")
    with pytest.raises(DeadlineExceeded):
        await content(backend, "key")
    backend.plan.set(read=None)
    with pytest.raises(DeadlineExceeded):
        await content(backend, "key")
    assert hang.reached.is_set()
    hang.release()
    assert (await backend.stat("key")).size == 1


@pytest.mark.asyncio
async def test_slow_service_answers_in_the_end() -> None:
    backend = FaultyBackend(MemoryBackend(), Plan(write=Slow(0.001), chunk=Slow(0.001), item=Slow(0.001)))
    await backend.write("key", b"x")
    assert await content(backend, "key") == b"x"
    assert [info.key async for info in backend.list()] == ["key"]


def _crash(root: str, after: bool) -> None:
    async def work() -> None:
        backend = FaultyBackend(FileSystemBackend(root), Plan(write=at(2, Crash(after=after))))
        await backend.write("one", b"1")
        await backend.write("two", b"2")

    asyncio.run(work())


@pytest.mark.parametrize("after", [False, True])
def test_crash_kills_the_process_before_or_after_the_effect(tmp_path: Path, after: bool) -> None:
    process = multiprocessing.get_context("spawn").Process(target=_crash, args=(str(tmp_path), after))
    process.start()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    assert sorted(os.listdir(tmp_path)) == (["one", "two"] if after else ["one"])


@pytest.mark.asyncio
async def test_meta_backend_with_faults() -> None:
    meta = FaultyMetaBackend(MemoryMetaBackend(), Plan(update=Lie(), delete=at(1, Fail(BackendUnavailable("down")))))
    async with meta:
        await meta.create(MetaRecord("a", token="t"))
        with pytest.raises(DeadlineExceeded) as caught:
            await meta.update("a", {"size": 5})
        assert caught.value.outcome_unknown
        assert (await meta.get("a")).size == 5
        assert [record.path async for record in meta.list()] == ["a"]
        with pytest.raises(BackendUnavailable):
            await meta.delete("a")
        await meta.delete("a")
        with pytest.raises(NotFound):
            await meta.get("a")
        assert meta.plan.calls["delete"] == 2


@pytest.mark.asyncio
async def test_hanging_meta_backend_meets_its_deadline() -> None:
    meta = FaultyMetaBackend(MemoryMetaBackend(), Plan(get=Hang()), timeouts=Timeouts(operation=0.02))
    with pytest.raises(DeadlineExceeded):
        await meta.get("a")
