"""A PostgreSQL that dies, hangs or loses its answers, behind Django's ORM."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from asgiref.sync import sync_to_async
from django.core.management import call_command
from django.db import connections

from aproxy_storage import BackendUnavailable, DeadlineExceeded, ProxyStorage, StorageError, Timeouts
from aproxy_storage.backends.filesystem import FileSystemBackend
from aproxy_storage.meta_backends.orm import ORMMetaBackend
from aproxy_storage.records import PENDING
from aproxy_storage.testing.meta_backends import make_record
from aproxy_storage.tools.reconcile import reconcile
from sync_bridge.models import StoredFile
from tests.django_support.setup import postgres_settings
from tests.services.cutting_proxy import CuttingProxy
from tests.services.postgres import PostgresServer

pytestmark = pytest.mark.asyncio


@pytest.fixture(scope="module")
def server() -> Iterator[PostgresServer]:
    """A server of this module's own; every test leaves it running."""
    server = PostgresServer()
    try:
        server.start()
        yield server
    finally:
        server.stop()


@pytest.fixture
def own_database(server: PostgresServer, added: Callable[[dict[str, Any]], str]) -> str:
    name = added(postgres_settings(server.url))
    call_command("migrate", "sync_bridge", database=name, interactive=False, verbosity=0)
    with connections[name].cursor() as cursor:
        cursor.execute("TRUNCATE sync_bridge_storedfile")
    connections[name].close()
    return name


async def test_a_read_survives_the_restart_of_an_idle_server(server: PostgresServer, own_database: str) -> None:
    meta = ORMMetaBackend(StoredFile, own_database)
    record = await meta.create(make_record("a"))
    await asyncio.to_thread(server.kill9)
    await asyncio.to_thread(server.start)
    assert await meta.get("a") == record
    await meta.aclose()


async def test_a_hung_server_hits_the_deadline(server: PostgresServer, own_database: str) -> None:
    meta = ORMMetaBackend(StoredFile, own_database, timeouts=Timeouts(operation=1.0))
    await meta.create(make_record("a"))
    server.pause()
    try:
        began = time.monotonic()
        answers = await asyncio.gather(
            meta.create(make_record("b")), *(meta.get("a") for _ in range(5)), return_exceptions=True
        )
        assert time.monotonic() - began < 10
        assert {type(answer) for answer in answers} == {DeadlineExceeded}
        assert isinstance(answers[0], StorageError)
        assert answers[0].outcome_unknown, "it had been sent"
    finally:
        server.resume()
    await sync_to_async(lambda: None)()  # the thread is free again, after what it was at
    assert await ORMMetaBackend(StoredFile, own_database).get("b") is not None
    await meta.aclose()


async def sound(storage: ProxyStorage, directory: Path) -> dict[str, bytes]:
    """Reconcile; hold that records and bytes belong together; return the files."""
    await reconcile(storage, dry_run=False, force=True)
    found: dict[str, bytes] = {}
    keys = set()
    async for record in storage.meta.list():
        assert (record.state, record.lease) == ("stored", None), record
        async with storage.open(record.path, verify=True) as file:
            found[record.path] = await file.read()
        keys.add(record.original_storage_path)
    assert keys == {path.name for path in directory.iterdir() if not path.name.startswith(".")}
    return found


async def test_a_killed_server_loses_and_orphans_nothing(
    server: PostgresServer, own_database: str, tmp_path: Path
) -> None:
    meta = ORMMetaBackend(StoredFile, own_database)
    storage = ProxyStorage("media", originals=FileSystemBackend(tmp_path), meta=meta)
    saved: dict[str, bytes] = {}
    refused: list[BaseException] = []
    ending = False

    async def load(worker: int) -> None:
        number = 0
        while not ending:
            number += 1
            name, content = f"{worker}-{number}", f"{worker}/{number}".encode()
            try:
                saved[await storage.save(name, content)] = content
            except StorageError as error:
                refused.append(error)
                await asyncio.sleep(0.01)

    async def until(count: int) -> None:
        while len(saved) < count:  # noqa: ASYNC110  a poll is enough for a test
            await asyncio.sleep(0.01)

    async with asyncio.TaskGroup() as group:
        for worker in range(8):
            group.create_task(load(worker))
        await until(40)
        await asyncio.to_thread(server.kill9)
        with pytest.raises(BackendUnavailable) as caught:
            await meta.get("x")
        assert caught.value.retryable
        await asyncio.to_thread(server.start)
        await until(len(saved) + 40)
        ending = True
    assert refused
    assert {type(error) for error in refused} <= {BackendUnavailable, DeadlineExceeded}, refused
    found = await sound(storage, tmp_path)
    assert saved.items() <= found.items()
    await storage.aclose()


# -- a lost answer


@contextlib.asynccontextmanager
async def cut_off(
    server: PostgresServer, added: Callable[[dict[str, Any]], str], directory: Path
) -> AsyncIterator[tuple[CuttingProxy, ProxyStorage]]:
    """Give a storage whose records are reached through a proxy that can lose answers."""
    async with CuttingProxy(server.socket_path) as proxy:
        alias = added(postgres_settings(f"postgresql://postgres@127.0.0.1:{proxy.port}/postgres?sslmode=disable"))
        meta = ORMMetaBackend(StoredFile, alias, timeouts=Timeouts(operation=10.0))
        storage = ProxyStorage("media", originals=FileSystemBackend(directory), meta=meta, keep_replaced=0)
        yield proxy, storage
        await storage.aclose()


async def test_a_create_whose_answer_was_lost_is_ours(
    server: PostgresServer, own_database: str, added: Any, tmp_path: Path
) -> None:
    async with cut_off(server, added, tmp_path) as (proxy, storage):
        record = make_record("a", state=PENDING)
        proxy.cut(record.token)
        with pytest.raises(BackendUnavailable) as caught:
            await storage.meta.create(record)
        assert caught.value.outcome_unknown
        assert proxy.cuts == 1
        assert (await storage.meta.create(record)).token == record.token
        assert await storage.meta.count() == 1


async def test_every_lost_answer_of_every_verb_is_settled(
    server: PostgresServer, own_database: str, added: Any, tmp_path: Path
) -> None:
    """The answer to the first statement about the file is lost, in the next round that to the second, and so on."""
    settled: dict[str, list[bool]] = {}
    async with cut_off(server, added, tmp_path) as (proxy, storage):
        verbs: dict[str, Callable[[str], Any]] = {
            "save": lambda path: storage.save(path, b"new"),
            "replace": lambda path: storage.replace(path, b"new"),
            "delete": storage.delete,
        }
        for verb, work in verbs.items():
            for number in range(20):
                path = f"{verb}-{number:02}.txt"
                if verb != "save":
                    await storage.save(path, b"old")
                cuts = proxy.cuts
                proxy.cut(path, after=number)
                try:
                    await work(path)
                    succeeded = True
                except BackendUnavailable:
                    succeeded = False
                lost = proxy.cuts > cuts
                proxy.cut(b"")
                found = (await sound(storage, tmp_path)).get(path)
                if succeeded:
                    assert found == (None if verb == "delete" else b"new"), (verb, number)
                elif verb == "save":
                    assert found is None, number
                else:
                    assert found in (b"old", b"new") or verb == "delete", (verb, number)
                if not lost:
                    break
                settled.setdefault(verb, []).append(succeeded)
    assert any(settled["save"]), settled
    assert any(settled["replace"]), settled
    assert len(settled["delete"]) >= 2, settled
