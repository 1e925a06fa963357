"""What a reviewer found between two statements: somebody else acts just there, and no file of his is lost."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Iterable
from dataclasses import replace
from datetime import UTC, datetime
from typing import Any
from unittest.mock import AsyncMock

import pytest

from aproxy_storage import (
    AlreadyExists,
    BackendUnavailable,
    Conflict,
    MetaRecord,
    NotFound,
    Original,
    ProxyStorage,
    Replicate,
)
from aproxy_storage.backends.base import Reader
from aproxy_storage.backends.memory import MemoryBackend
from aproxy_storage.content import Source
from aproxy_storage.leases import DatabaseTime
from aproxy_storage.meta_backends.memory import MemoryMetaBackend
from aproxy_storage.records import Revision
from aproxy_storage.timeouts import elapsed
from aproxy_storage.tools.reconcile import reconcile
from tests.verbs.test_transactions import TransactionalMeta, read

pytestmark = pytest.mark.asyncio


class TokenlessBackend(MemoryBackend):
    """As Django's storages are: nothing tells whose an object is."""

    capabilities = replace(MemoryBackend.capabilities, tokens=False)

    async def _discard(self, key: str, *, token: str | None) -> None:
        await super()._discard(key, token=None)


@pytest.mark.parametrize("exact", [False, True])
async def test_a_save_in_a_transaction_leaves_the_file_of_that_name_alone(exact: bool) -> None:
    meta = TransactionalMeta()
    storage = ProxyStorage("media", originals=TokenlessBackend(), meta=meta)
    await storage.save("a.txt", b"first")
    async with meta.atomic():
        if exact:
            with pytest.raises(AlreadyExists):
                await storage.write_to("a.txt", b"second", exclusive=True)
        else:
            path = await storage.save("a.txt", b"second")
            assert path != "a.txt"
            assert await read(storage, path) == b"second"
    assert await read(storage, "a.txt") == b"first"
    await storage.aclose()


async def test_the_bytes_of_a_save_whose_name_was_reserved_meanwhile_go() -> None:
    meta = TransactionalMeta()
    storage = ProxyStorage("media", originals=MemoryBackend(), meta=meta)
    reserved = MetaRecord(
        path="a.txt",
        proxy_storage_name="media",
        original_storage_name="default",
        original_storage_path="a.txt",
        state="pending",
        token="another",
        version=1,
    )
    await meta.create(reserved, lease=60.0)  # its bytes are not there yet
    async with meta.atomic():
        path = await storage.save("a.txt", b"x")
    assert path != "a.txt"
    assert [info.key async for info in storage.get_original().list()] == [path]
    await storage.aclose()


class StallingMeta(MemoryMetaBackend):
    """Deletes a record, and does not answer."""

    def __init__(self) -> None:
        super().__init__()
        self.deleted = asyncio.Event()

    async def _delete(self, path: str, expect: Revision | None) -> bool:
        answer = await super()._delete(path, expect)
        if not self.deleted.is_set():
            self.deleted.set()
            await asyncio.Event().wait()
        return answer


async def test_a_cancelled_delete_spares_the_next_file_of_that_name() -> None:
    meta = StallingMeta()
    storage = ProxyStorage("media", originals=MemoryBackend(), meta=meta)
    await storage.save("a.txt", b"old")
    deletion = asyncio.create_task(storage.delete("a.txt"))
    async with asyncio.timeout(30):
        await meta.deleted.wait()
    assert await storage.save("a.txt", b"new") == "a.txt"
    deletion.cancel()
    with pytest.raises(asyncio.CancelledError):
        await deletion
    await storage.cleanup.drain(within=30.0)
    assert await read(storage, "a.txt") == b"new"
    await storage.aclose()


class PeekingStorage(ProxyStorage):
    """Looks at the content before it is stored."""

    async def get_data_for_meta_backend_save(self, *, content: Source, **kwargs: Any) -> dict[str, Any]:
        return {"head": (await content.peek(4)).decode()}


async def pieces() -> AsyncIterator[bytes]:
    for piece in (b"one ", b"two ", b"three"):
        yield piece


async def test_content_that_was_looked_at_is_whole_when_the_name_turns_out_to_be_taken(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    storage = PeekingStorage("media", originals=MemoryBackend(), meta=MemoryMetaBackend())
    await storage.save("a.txt", b"first")
    answers = iter([False])  # to the first question, as if the other save had come just after it
    get = storage.get

    async def late(path: Any) -> MetaRecord:
        if next(answers, None) is False:
            raise NotFound("not yet")
        return await get(path)

    monkeypatch.setattr(storage, "get", late)
    await storage.write_to("a.txt", pieces(), exclusive=False)
    assert await read(storage, "a.txt") == b"one two three"
    await storage.aclose()


class WithoutServerCopy(MemoryBackend):
    capabilities = replace(MemoryBackend.capabilities, server_copy=False)


async def test_a_copy_needs_one_slot_of_its_original() -> None:
    originals = {"a": Original(WithoutServerCopy(), max_concurrency=1)}
    storage = ProxyStorage("media", originals=originals, meta=MemoryMetaBackend())
    content = b"x" * 3_000_000
    await storage.save("a", content)
    async with asyncio.timeout(30):
        await storage.copy("a", "b")
    assert await read(storage, "b") == content
    await storage.aclose()


class AdoptingBackend(MemoryBackend):
    """Somebody adopts the second file while a scan looks at the first."""

    storage: ProxyStorage | None = None

    async def _stat(self, key: str) -> Any:
        storage, self.storage = self.storage, None
        if storage is not None:
            await storage.adopt("b")
        return await super()._stat(key)


async def test_a_scan_leaves_what_was_adopted_meanwhile() -> None:
    backend = AdoptingBackend()
    storage = ProxyStorage("media", originals=backend, meta=MemoryMetaBackend())
    for key in "ab":
        await backend.write(key, b"x", token=f"tokenOf{key}")
    backend.storage = storage
    report = await reconcile(storage, scan=True, dry_run=False, min_age=-1.0)
    assert report.counts == {"removed": 1}
    async with storage.open("b") as file:
        assert await file.read() == b"x"
    await storage.aclose()


class Unreachable(MemoryBackend):
    down = False

    async def _stat(self, key: str) -> Any:
        if self.down:
            raise BackendUnavailable("down")
        return await super()._stat(key)


async def test_no_copy_is_given_up_while_another_is_out_of_reach() -> None:
    backends = {"a": MemoryBackend(), "b": Unreachable(), "c": MemoryBackend()}
    meta = MemoryMetaBackend()
    many = ProxyStorage("media", originals=backends, meta=meta, placement=Replicate(copies=3))
    await many.save("x", b"x")
    few = ProxyStorage("media", originals=backends, meta=meta, placement=Replicate(copies=2))
    backends["b"].down = True  # type: ignore[attr-defined]
    report = await reconcile(few, dry_run=False)
    assert "dropped" not in report.counts
    assert len((await few.get("x")).good_places()) == 3
    backends["b"].down = False  # type: ignore[attr-defined]
    assert (await reconcile(few, dry_run=False)).counts["dropped"] == 1
    await few.aclose()


class BreakingOff(MemoryBackend):
    """Gives one chunk of a file, and then no more."""

    async def _read(self, key: str, byte_range: Any, chunk_bytes: int) -> Any:
        reader = await super()._read(key, byte_range, chunk_bytes)

        async def one_chunk() -> AsyncIterator[bytes]:
            async for chunk in reader:
                yield chunk
                raise BackendUnavailable("broken off")

        return Reader(reader.info, one_chunk())


async def test_a_read_never_goes_on_in_another_file() -> None:
    originals = {"a": BreakingOff(), "b": MemoryBackend()}
    storage = ProxyStorage(
        "media", originals=originals, meta=MemoryMetaBackend(), placement=Replicate(copies=2), chunk_bytes=4,
        settle=0.0, keep_replaced=0.0,
    )  # fmt: skip
    await storage.save("x", b"old content")
    async with storage.open("x") as file:
        assert await anext(file) == b"old "
        await storage.delete("x")
        for original in originals.values():
            await original.discard("x")
        await storage.meta.delete("x") if await storage.meta.exists("x") else None
        assert await storage.save("x", b"NEW CONTENT") == "x"
        with pytest.raises(Conflict):
            await read_all(file)
    await storage.aclose()


async def read_all(file: AsyncIterator[bytes]) -> Iterable[bytes]:
    return [chunk async for chunk in file]


sleeps = pytest.mark.skipif(
    not hasattr(time, "CLOCK_BOOTTIME"), reason="no clock here goes on while the machine sleeps"
)


def sleep_an_hour(monkeypatch: pytest.MonkeyPatch) -> None:
    since_boot = time.clock_gettime
    monkeypatch.setattr(time, "clock_gettime", lambda clock: since_boot(clock) + 3600)  # and time.monotonic stood still


@sleeps
async def test_a_removal_is_not_begun_after_the_machine_has_slept_past_its_lease(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    storage = ProxyStorage("media", originals=MemoryBackend(), meta=MemoryMetaBackend())
    path = await storage.save("a.txt", b"1")
    marked = await storage.journal.mark(await storage.get(path))
    sleep_an_hour(monkeypatch)
    assert await storage.journal.sweep(marked) == "failed"
    assert (await storage.get_original("default").stat("a.txt")).size == 1, "it may be another's by now"
    await storage.aclose()


@sleeps
async def test_no_bytes_are_written_after_the_machine_has_slept_past_the_lease_of_the_save(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    meta = MemoryMetaBackend()
    storage = ProxyStorage("media", originals=MemoryBackend(), meta=meta)
    reserve = meta.reserve

    async def reserve_and_sleep(*args: Any, **options: Any) -> MetaRecord | None:
        reserved = await reserve(*args, **options)
        sleep_an_hour(monkeypatch)
        return reserved

    monkeypatch.setattr(meta, "reserve", reserve_and_sleep)
    writes = AsyncMock()
    monkeypatch.setattr(storage.get_original("default"), "write", writes)
    with pytest.raises(Conflict, match="lost its lease"):
        await storage.save("a.txt", b"1")
    assert not writes.called, "the key may be another's by now"
    await storage.aclose()


@sleeps
async def test_a_lease_is_renewed_when_the_machine_has_slept_for_a_part_of_it(monkeypatch: pytest.MonkeyPatch) -> None:
    storage = ProxyStorage("media", originals=MemoryBackend(), meta=MemoryMetaBackend(), lease=7200.0)
    leases, renewed = storage.journal.leases, []

    async def content() -> AsyncIterator[bytes]:
        (held,) = leases._rounds.get().held
        sleep_an_hour(monkeypatch)
        held.check()
        then = held.since
        leases._tick(leases._rounds.get())
        await storage.cleanup.drain(within=20)
        renewed.append(held.since - then)
        yield b"1"

    await storage.save("a.txt", content())
    assert renewed[0] >= 3600
    await storage.aclose()


@sleeps
async def test_the_time_of_the_database_goes_on_while_the_machine_sleeps(monkeypatch: pytest.MonkeyPatch) -> None:
    record = MetaRecord(path="a", lease=datetime.fromtimestamp(1000.0, UTC))
    shown = DatabaseTime.of(record, 60.0, elapsed())
    assert shown is not None
    sleep_an_hour(monkeypatch)
    assert 940.0 + 3600 <= shown.earliest() <= shown.latest()
