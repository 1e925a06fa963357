"""Routers that decide by request: what a call has begun goes on in the database in which it began."""

from __future__ import annotations

import asyncio
import contextvars
import shutil
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from asgiref.sync import async_to_sync, sync_to_async
from django.db import transaction
from django.test import override_settings

from aproxy_storage import ProxyStorage
from aproxy_storage.backends.filesystem import FileSystemBackend
from aproxy_storage.meta_backends.orm import ORMMetaBackend
from sync_bridge.bridge import bridge
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
