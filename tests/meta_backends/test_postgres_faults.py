"""What becomes of saves and records when PostgreSQL dies, hangs, or its answer is lost."""

from __future__ import annotations

import asyncio
import contextlib
import json
import sys
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any

import asyncpg
import pytest

from aproxy_storage import BackendUnavailable, DeadlineExceeded, NotFound, ProxyStorage, StorageError, Timeouts
from aproxy_storage.backends.filesystem import FileSystemBackend
from aproxy_storage.backends.postgres import PostgresBackend
from aproxy_storage.meta_backends.postgres import PostgresMetaBackend
from aproxy_storage.records import PENDING
from aproxy_storage.testing.meta_backends import make_record
from aproxy_storage.tools.reconcile import reconcile
from tests.services.cutting_proxy import CuttingProxy
from tests.services.postgres import PostgresServer

pytestmark = pytest.mark.asyncio

ROOT = Path(__file__).parents[2]
BIG = bytes(range(256)) * 3000  # several chunks


async def assert_sound(storage: ProxyStorage, directory: Path) -> dict[str, bytes]:
    """Reconcile by force, and hold that nothing is left over; return all contents, each of which has its checksum."""
    report = await reconcile(storage, dry_run=False, force=True)
    assert report.counts.get("failed", 0) == 0, report.findings
    assert (await reconcile(storage, dry_run=True, force=True)).counts == {}
    found: dict[str, bytes] = {}
    named = []
    async for record in storage.list():
        named.append(record.original_storage_path)
        async with storage.open(record, verify=True) as file:
            found[record.path] = await file.read()
    assert await storage.meta.count() == len(found), "records that nobody can see are left"
    original = storage.get_original("")
    if isinstance(original, PostgresBackend):
        assert [info.key async for info in original.list()] == sorted(named)
        async with original._database.use() as connection:
            chunks, objects = original._sql.chunks, original._sql.objects
            orphans = f"SELECT count(*) FROM {chunks} WHERE object NOT IN (SELECT id FROM {objects})"
            assert await connection.fetchval(orphans) == 0
    else:
        files = [str(path.relative_to(directory)) for path in directory.rglob("*") if path.is_file()]
        assert sorted(files) == sorted(named)
    return found


# -- a dying server


@pytest.mark.parametrize("original", ["filesystem", "postgres"])
async def test_killed_amid_a_load_of_saves(own_postgres: PostgresServer, tmp_path: Path, original: str) -> None:
    limits = Timeouts(operation=5.0, idle=5.0, cleanup=5.0)
    url = own_postgres.url
    backend = FileSystemBackend(tmp_path) if original == "filesystem" else PostgresBackend(url, timeouts=limits)
    storage = ProxyStorage("media", originals=backend, meta=PostgresMetaBackend(url, timeouts=limits), timeouts=limits)
    saved: dict[str, bytes] = {}
    deleted: set[str] = set()
    unsure: set[str] = set()
    refused: list[StorageError] = []
    ending = asyncio.Event()

    async def work(number: int) -> None:
        turn = 0
        while not ending.is_set():
            turn += 1
            content = f"{number} {turn} ".encode() + (BIG if turn % 5 == 0 else b"")
            try:
                path = await storage.save(f"{number}/{turn}", content)
                saved[path] = content
                if turn % 3 == 0:
                    unsure.add(path)
                    await storage.delete(path)
                    deleted.add(path)
            except StorageError as error:
                refused.append(error)
                await asyncio.sleep(0.01)

    async def more(count: int) -> None:
        wanted = len(saved) + count
        while len(saved) < wanted:  # noqa: ASYNC110
            await asyncio.sleep(0.01)

    async with storage:
        async with asyncio.timeout(60), asyncio.TaskGroup() as group:
            for number in range(24):
                group.create_task(work(number))
            for _ in range(2):
                await more(150)
                await asyncio.to_thread(own_postgres.kill9)
                await asyncio.sleep(0.1)
                await asyncio.to_thread(own_postgres.start)
            await more(150)  # the pools have healed
            ending.set()
        assert refused
        assert {type(error) for error in refused} <= {BackendUnavailable, DeadlineExceeded}, refused
        found = await assert_sound(storage, tmp_path)
    for path, content in saved.items():
        if path not in unsure:
            assert found.get(path) == content, f"{path} is lost"
        elif path in deleted:
            assert path not in found, f"{path} has come back"


@contextlib.asynccontextmanager
async def another_makes_tables(server: PostgresServer) -> AsyncIterator[Callable[[], Awaitable[bool]]]:
    """Be a process that is making the table "other"; give a function that tells whether another one waits for that."""
    connection = await asyncpg.connect(server.url)
    await connection.execute("BEGIN")
    await connection.execute("SELECT pg_advisory_xact_lock(hashtextextended($1, 0))", 'aproxy-storage "other"')

    async def waiting() -> bool:
        text = "SELECT EXISTS (SELECT 1 FROM pg_locks WHERE locktype = 'advisory' AND NOT granted)"
        found: bool = await connection.fetchval(text)
        return found

    try:
        yield waiting
    finally:
        await connection.close()


async def test_a_hanging_server_is_met_by_the_deadline(own_postgres: PostgresServer) -> None:
    meta = PostgresMetaBackend(own_postgres.url, timeouts=Timeouts(operation=1.0, cleanup=1.0))
    backend = PostgresBackend(own_postgres.url, timeouts=Timeouts(operation=1.0, idle=1.0, cleanup=1.0))
    other = PostgresMetaBackend(own_postgres.url, table="other", timeouts=Timeouts(operation=1.0, cleanup=1.0))
    async with meta, backend, contextlib.aclosing(other), another_makes_tables(own_postgres) as others_waiting:
        record = await meta.create(make_record("a"))
        await backend.write("a", BIG)
        async with backend.read("a") as reader:
            await anext(reader)
            in_the_middle = asyncio.ensure_future(other.setup())
            while not (in_the_middle.done() or await others_waiting()):  # noqa: ASYNC110
                await asyncio.sleep(0.001)
            own_postgres.pause()
            try:
                async with asyncio.timeout(30):
                    calls: list[Any] = [
                        in_the_middle,
                        other.get("a"),
                        meta.get("a"),
                        meta.exists("a"),
                        meta.update("a", {"version": 1}, expect=record.revision),
                        meta.delete("b"),
                        anext(meta.list()),
                        meta.count(),
                        meta.owners("fs", ["a"]),
                        anext(reader),
                        backend.stat("a"),
                        backend.write("small", b"x"),
                        backend.write("large", BIG),
                        backend.discard("b"),
                        backend.copy("a", "c"),
                        anext(backend.list()),
                        *(meta.create(make_record(f"new/{number}")) for number in range(40)),
                    ]
                    answers = await asyncio.gather(*calls, return_exceptions=True)
                    assert {type(answer) for answer in answers} == {DeadlineExceeded}, answers
                    many = await meta.create_many([make_record("many")])
                    assert isinstance(many[0], DeadlineExceeded)
                    with pytest.raises(DeadlineExceeded):
                        await meta.setup()
            finally:
                own_postgres.resume()
        for attempt in range(50):  # what was cut off is still being worked off
            with contextlib.suppress(BackendUnavailable):
                assert (await meta.get("a")).token == record.token
                assert (await backend.stat("a")).size == len(BIG)
                break
            await asyncio.sleep(0.02 * attempt)
        else:
            pytest.fail("the pools have not healed")


# -- a lost answer


@contextlib.asynccontextmanager
async def cut_off(server: PostgresServer, tmp_path: Path) -> AsyncIterator[tuple[CuttingProxy, ProxyStorage]]:
    """Give a storage whose meta-backend is reached through a proxy that can lose answers."""
    async with CuttingProxy(server.socket_path) as proxy:
        url = f"postgresql://postgres@127.0.0.1:{proxy.port}/postgres?sslmode=disable"
        meta = PostgresMetaBackend(url, timeouts=Timeouts(operation=10.0))
        async with ProxyStorage("media", originals=FileSystemBackend(tmp_path), meta=meta) as storage:
            yield proxy, storage


async def test_a_create_whose_answer_was_lost_is_ours(own_postgres: PostgresServer, tmp_path: Path) -> None:
    async with cut_off(own_postgres, tmp_path) as (proxy, storage):
        record = make_record("a", state=PENDING)
        await storage.meta.setup()
        proxy.cut("a")
        with pytest.raises(BackendUnavailable) as caught:
            await storage.meta.create(record)
        assert caught.value.outcome_unknown
        assert proxy.cuts == 1
        assert (await storage.meta.create(record)).token == record.token
        assert await storage.meta.count() == 1


async def test_every_lost_answer_of_every_verb_is_settled(own_postgres: PostgresServer, tmp_path: Path) -> None:
    """The answer to the first statement about the file is lost, in the next round that to the second, and so on."""
    outcomes: dict[str, list[bool]] = {}
    async with cut_off(own_postgres, tmp_path) as (proxy, storage):
        for verb in ("save", "replace", "delete"):
            for number in range(20):
                path = f"{verb}-{number:02}.txt"
                if verb != "save":
                    await storage.save(path, b"old")
                cuts = proxy.cuts
                proxy.cut(path, after=number)
                try:
                    if verb == "save":
                        assert await storage.save(path, b"new") == path
                    elif verb == "replace":
                        await storage.replace(path, b"new")
                    else:
                        await storage.delete(path)
                    succeeded = True
                except BackendUnavailable:
                    succeeded = False
                lost = proxy.cuts > cuts
                proxy.cut(b"")
                found = (await assert_sound(storage, tmp_path)).get(path)
                if succeeded:
                    assert found == (None if verb == "delete" else b"new"), (verb, number)
                elif verb == "save":
                    assert found is None, (verb, number)
                else:
                    assert found in (b"old", b"new", None), (verb, number)
                    assert found is not None or verb == "delete", (verb, number)
                if not lost:
                    break
                outcomes.setdefault(verb, []).append(succeeded)
    # The commit of a save, which comes second, is settled by the token; so is the swap of a replace.
    assert outcomes["save"][1], outcomes
    assert any(outcomes["replace"]), outcomes
    assert len(outcomes["delete"]) >= 2, outcomes


async def test_a_write_whose_commit_has_no_answer_is_found_by_its_token(
    own_postgres: PostgresServer, tmp_path: Path
) -> None:
    async with CuttingProxy(own_postgres.socket_path) as proxy:
        url = f"postgresql://postgres@127.0.0.1:{proxy.port}/postgres?sslmode=disable"
        async with PostgresBackend(url) as backend:
            await backend.setup()
            for content, marker in ((b"small", "tokenOfSmall"), (BIG, "COMMIT\0")):  # not: READ COMMITTED
                proxy.cut(marker)
                with pytest.raises(BackendUnavailable) as caught:
                    await backend.write("key", content, token="tokenOfSmall")
                assert caught.value.outcome_unknown
                assert (await backend.stat("key")).token == "tokenOfSmall"
                await backend.discard("key", token="tokenOfOther")
                await backend.discard("key", token="tokenOfSmall")
                with pytest.raises(NotFound):
                    await backend.stat("key")
            assert proxy.cuts == 2


# -- many processes

_CREATE = """
import asyncio, json, sys
from aproxy_storage import AlreadyExists
from aproxy_storage.meta_backends.postgres import PostgresMetaBackend
from aproxy_storage.testing.meta_backends import make_record

async def main(url, table):
    won = []
    async with PostgresMetaBackend(url, table=table, max_connections=5) as meta:
        print("ready", flush=True)
        sys.stdin.readline()

        async def create(task):  # each path is wanted by two tasks of each process
            for number in range(10 * task, 10 * task + 20):
                path = f"{number % 1000:04}"
                try:
                    await meta.create(make_record(path))
                except AlreadyExists:
                    continue
                won.append(path)

        async with asyncio.TaskGroup() as group:
            for task in range(100):
                group.create_task(create(task))
    print(json.dumps(won))

asyncio.run(main(*sys.argv[1:]))
"""


async def test_of_eight_processes_one_creates_each_path(
    postgres_url: str, postgres_table: str, postgres_behind: asyncpg.Connection
) -> None:
    processes = [
        await asyncio.create_subprocess_exec(
            sys.executable, "-W", "error", "-c", _CREATE, postgres_url, postgres_table,
            stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE, cwd=ROOT,
        )
        for _ in range(8)
    ]  # fmt: skip
    for process in processes:
        assert process.stdout is not None
        assert await process.stdout.readline() == b"ready\n"
    outputs = await asyncio.gather(*(process.communicate(b"\n") for process in processes))
    won = [path for output, _ in outputs for path in json.loads(output)]
    assert len(won) == len(set(won)) == 1000
    assert await postgres_behind.fetchval(f'SELECT count(*) FROM "{postgres_table}"') == 1000
