"""Routers that decide by request: what a call has begun goes on in the database in which it began."""

from __future__ import annotations

import asyncio
import contextvars
import dataclasses
import shutil
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from asgiref.sync import async_to_sync, sync_to_async
from django.db import transaction
from django.test import override_settings

from aproxy_storage import ProxyStorage, registry
from aproxy_storage.backends.filesystem import FileSystemBackend
from aproxy_storage.meta_backends.orm import ORMMetaBackend
from sync_bridge import BridgeStorage
from sync_bridge.bridge import bridge
from sync_bridge.fields import ProxyFieldFile
from sync_bridge.models import StoredFile
from tests.django_support.setup import sqlite_settings

tenant: contextvars.ContextVar[str] = contextvars.ContextVar("tenant", default="default")


class ByTenant:
    """A router as of a site with a database per tenant."""

    def db_for_read(self, model: Any, **hints: Any) -> str:
        return tenant.get()

    db_for_write = db_for_read


@pytest.fixture
def other(
    django_database: Path, migrated_sqlite: Path, tmp_path: Path, added: Callable[[dict[str, Any]], str]
) -> Iterator[str]:
    """The database of a tenant, beside ``default``."""
    shutil.copyfile(migrated_sqlite, tmp_path / "other.sqlite3")
    with override_settings(DATABASE_ROUTERS=[ByTenant()]):
        yield added(sqlite_settings(tmp_path / "other.sqlite3"))


@pytest.fixture
def storage(other: str, tmp_path: Path) -> Iterator[ProxyStorage]:
    (tmp_path / "media").mkdir()
    original = FileSystemBackend(tmp_path / "media")
    storage = ProxyStorage("media", originals=original, meta=ORMMetaBackend(StoredFile), keep_replaced=0)
    yield storage
    registry.unregister("media")  # a BridgeStorage makes it known
    async_to_sync(storage.aclose)()


def rows(alias: str) -> list[tuple[str, str]]:
    return list(StoredFile.objects.using(alias).values_list("path", "state"))


def files(tmp_path: Path) -> list[str]:
    return sorted(path.name for path in (tmp_path / "media").iterdir() if not path.name.startswith("."))


@pytest.mark.asyncio
@pytest.mark.parametrize("verb", ["save", "replace"])
async def test_a_lease_is_renewed_where_it_was_taken(storage: ProxyStorage, other: str, verb: str) -> None:
    leases, renewed = storage.journal.leases, []

    async def content() -> AsyncIterator[bytes]:
        yield b"1"
        round_ = leases._rounds.get()
        (held,) = round_.held
        held.since = then = held.since - leases.seconds / 2
        contextvars.Context().run(leases._tick, round_)
        await storage.cleanup.drain(within=20)
        renewed.append(held.since > then)
        yield b"2"

    tenant.set(other)
    path = "a.txt"
    if verb == "replace":
        await storage.save(path, b"0")
        await storage.replace(path, content())
    else:
        await storage.save(path, content())
    assert renewed == [True]
    assert await storage.size(path) == 2
    assert [await sync_to_async(rows)(alias) for alias in ("default", other)] == [[], [(path, "stored")]]


@pytest.mark.asyncio
@pytest.mark.parametrize("verb", ["save", "replace"])
async def test_what_is_cancelled_is_undone_where_it_began(
    storage: ProxyStorage, other: str, tmp_path: Path, verb: str
) -> None:
    begun = asyncio.Event()

    async def content() -> AsyncIterator[bytes]:
        yield b"1"
        begun.set()
        await asyncio.Event().wait()

    tenant.set(other)
    if verb == "replace":
        await storage.save("a.txt", b"0")
    task = asyncio.create_task(getattr(storage, verb)("a.txt", content()))
    await begun.wait()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    await storage.cleanup.drain(within=20)
    if verb == "replace":
        assert [place.state for place in (await storage.get("a.txt")).places] == ["settling"], "no longer doubtful"
        assert len(files(tmp_path)) == 1
    else:
        assert files(tmp_path) == []
        assert await sync_to_async(rows)(other) == []
    assert await sync_to_async(rows)("default") == []


@pytest.mark.parametrize("enter", [lambda work, *args: async_to_sync(work)(*args), bridge.call])
def test_bytes_go_with_the_transaction_of_their_database(
    storage: ProxyStorage, other: str, tmp_path: Path, enter: Callable[..., Any]
) -> None:
    def request() -> None:
        tenant.set(other)
        enter(storage.save, "a.txt", b"1")
        with transaction.atomic(using=other):
            enter(storage.delete, "a.txt")
            tenant.set("default")

    contextvars.copy_context().run(request)
    assert (rows("default"), rows(other), files(tmp_path)) == ([], [], [])


@pytest.mark.asyncio
async def test_calls_of_one_context_go_where_the_router_says(storage: ProxyStorage, other: str) -> None:
    for alias in ("default", other, "default"):
        tenant.set(alias)
        await storage.save(f"{alias}.txt", b"1")
    assert len(await sync_to_async(rows)("default")) == 2
    assert await sync_to_async(rows)(other) == [(f"{other}.txt", "stored")]


def in_request(alias: str, work: Callable[[], Any]) -> Any:
    """Return what ``work()`` of a request of that tenant returns, whose middleware then forgets the tenant."""
    token = tenant.set(alias)
    try:
        return work()
    finally:
        tenant.reset(token)


async def both_save(storage: ProxyStorage, other: str, size: int = 1) -> None:
    """Let each of the tenants save a file ``a.txt`` that says whose it is."""
    for alias in ("default", other):
        tenant.set(alias)
        assert await storage.save("a.txt", alias.encode() * size) == "a.txt"
    tenant.set("default")


async def chunks(items: AsyncIterator[bytes]) -> bytes:
    return b"".join([chunk async for chunk in items])


@pytest.mark.asyncio
@pytest.mark.parametrize("how", ["name", "record", "bridge", "bridge, by record", "bridge, reading through", "field"])
async def test_a_stream_is_of_the_database_of_its_request(storage: ProxyStorage, other: str, how: str) -> None:
    storage.keys = "token"
    await both_save(storage, other)
    record = await in_context(other, lambda: storage.get("a.txt"))
    bridged = BridgeStorage(storage=storage, read_through="through" in how)
    given = record if "record" in how else "a.txt"

    def respond() -> AsyncIterator[bytes]:
        if how == "field":
            return ProxyFieldFile(None, SimpleNamespace(storage=bridged), "a.txt").stream()
        return bridged.astream(given) if "bridge" in how else storage.stream(given)

    # The record alone says where it came from: its response may be made when its request is over.
    begun = respond() if given is record else in_request(other, respond)
    assert await chunks(begun) == other.encode()


async def in_context(alias: str, work: Callable[[], Any]) -> Any:
    """Await ``work()`` where the router names `alias`."""
    token = tenant.set(alias)
    try:
        return await work()
    finally:
        tenant.reset(token)


@pytest.mark.parametrize("by_thread", [True, False])
def test_a_stream_that_a_synchronous_view_returns_is_of_its_database(
    storage: ProxyStorage, other: str, monkeypatch: pytest.MonkeyPatch, by_thread: bool
) -> None:
    storage.keys = "token"
    for alias in ("default", other):
        in_request(alias, lambda alias=alias: async_to_sync(storage.save)("a.txt", alias.encode()))
    here = threading.local()
    if by_thread:
        monkeypatch.setattr(ByTenant, "db_for_write", lambda self, model, **hints: getattr(here, "tenant", "default"))
        here.tenant = other
        begun = storage.stream("a.txt")
        del here.tenant
    else:
        begun = in_request(other, lambda: storage.stream("a.txt"))
    assert async_to_sync(chunks)(begun) == other.encode()


@pytest.mark.asyncio
async def test_an_open_file_asks_the_database_that_it_was_opened_in(
    storage: ProxyStorage, other: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    storage.keys, storage.chunk_bytes = "token", 4
    read = FileSystemBackend._read

    async def nameless(self: Any, *args: Any) -> Any:
        reader = await read(self, *args)
        reader.info = dataclasses.replace(reader.info, etag=None, token=None)
        return reader

    monkeypatch.setattr(FileSystemBackend, "_read", nameless)
    await both_save(storage, other, size=8)
    record = await in_context(other, lambda: storage.get("a.txt"))
    for given in ("a.txt", record):
        async with await in_context(other, lambda given=given: storage.open(given)) as file:
            assert await file.read(2) == other.encode()[:2]
            await file.seek(len(other))  # opens it anew, for which the record is looked at
            assert await file.read() == other.encode() * 7
    async with storage.open(record) as file:  # looked up once more, as nothing else says whose bytes they are
        assert await file.read() == other.encode() * 8


@pytest.mark.asyncio
async def test_all_pages_of_a_listing_are_of_one_database(
    storage: ProxyStorage, other: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("aproxy_storage.meta_backends.base._PAGE", 1)
    for alias, names in (("default", "abc"), (other, "de")):
        for name in names:
            await in_context(alias, lambda name=name: storage.save(name, b"1"))
    listed = in_request(other, storage.list)
    assert [record.path async for record in listed] == ["d", "e"]
