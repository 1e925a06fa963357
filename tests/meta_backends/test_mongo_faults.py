"""Servers that die, hang and lose answers, under records and files in MongoDB, with both drivers."""

from __future__ import annotations

import asyncio
import contextlib
import subprocess
import sys
from collections.abc import AsyncIterator, Awaitable
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio
from pymongo import AsyncMongoClient

from aproxy_storage import (
    AlreadyExists,
    BackendUnavailable,
    Conflict,
    MetaRecord,
    NotFound,
    ProxyStorage,
    StorageError,
    Timeouts,
)
from aproxy_storage.backends.gridfs import GridFSBackend
from aproxy_storage.meta_backends.mongo import MongoMetaBackend
from aproxy_storage.testing.meta_backends import make_record
from aproxy_storage.tools.reconcile import reconcile
from tests.backends.test_gridfs import everything_in
from tests.services.cutting_proxy import CuttingProxy
from tests.services.mongo import DRIVERS, FORGOTTEN_SOCKETS, Borrowed, MongoServer, in_database

ROOT = Path(__file__).parents[2]

pytestmark = FORGOTTEN_SOCKETS


@pytest_asyncio.fixture(params=DRIVERS)
async def database(request: pytest.FixtureRequest, own_mongo: MongoServer) -> AsyncIterator[Any]:
    """Give what a user passes for a database of a server that may die."""
    if request.param == "pymongo":
        yield f"{own_mongo.url}/app"
        return
    borrowed = Borrowed("motor", own_mongo.url, "app")
    yield borrowed
    await borrowed.close()


def storage_of(database: Any, *, seconds: float) -> ProxyStorage:
    limits = Timeouts(operation=seconds, idle=2 * seconds, cleanup=seconds)
    return ProxyStorage(
        "media",
        originals=GridFSBackend(database, timeouts=limits),
        meta=MongoMetaBackend(database, timeouts=limits),
        timeouts=limits,
    )


async def assert_sound(url: str, acknowledged: dict[str, bytes], *, gone: set[str] = frozenset()) -> None:  # type: ignore[assignment]
    """Reconcile as if nothing else were alive; then every acknowledged file is there, and nothing without a record."""
    async with AsyncMongoClient(url) as client, storage_of(f"{url}/app", seconds=20.0) as storage:
        for _ in range(2):
            report = await reconcile(storage, dry_run=False, force=True)
        assert report.clean, report
        records = [record async for record in storage.meta.list()]
        assert {record.state for record in records} <= {"stored"}
        paths = {record.path for record in records}
        assert acknowledged.keys() <= paths
        assert not gone & paths
        assert sorted(await everything_in(client["app"])) == sorted(record.original_storage_path for record in records)
        for path, content in acknowledged.items():
            async with storage.open(path, verify=True) as file:
                assert await file.read() == content


@pytest.mark.asyncio
async def test_killed_amid_a_load_of_saves(database: Any, own_mongo: MongoServer) -> None:
    acknowledged: dict[str, bytes] = {}
    deleted: set[str] = set()
    failures: list[BaseException] = []
    ending = asyncio.Event()

    async def work(worker: int) -> None:
        number = 0
        while not ending.is_set():
            number += 1
            content = f"{worker}/{number};".encode() * 20
            try:
                path = await storage.save(f"{worker}/{number}.txt", content)
                acknowledged[path] = content
                if number % 3 == 0:
                    del acknowledged[path]
                    await storage.delete(path)
                    deleted.add(path)
            except StorageError as error:
                failures.append(error)

    async def until(count: int) -> None:
        while len(acknowledged) < count:  # noqa: ASYNC110  many tasks count
            await asyncio.sleep(0.01)

    async with storage_of(database, seconds=4.0) as storage:
        async with asyncio.timeout(120), asyncio.TaskGroup() as group:
            for worker in range(16):
                group.create_task(work(worker))
            await until(40)
            own_mongo.kill9()
            await asyncio.sleep(0.3)
            await asyncio.to_thread(own_mongo.start)
            await until(len(acknowledged) + 40)  # it heals by itself
            ending.set()
    assert {type(failure).__name__ for failure in failures} <= {"BackendUnavailable", "DeadlineExceeded"}, failures
    await assert_sound(own_mongo.url, acknowledged, gone=deleted)


@pytest.mark.asyncio
async def test_hung_server_hits_the_deadline(database: Any, own_mongo: MongoServer) -> None:
    limits = Timeouts(operation=1.0, idle=1.0, cleanup=1.0)
    async with (
        MongoMetaBackend(database, timeouts=limits) as meta,
        GridFSBackend(database, timeouts=limits) as backend,
    ):
        await meta.create(make_record("a"))
        await backend.write("a", b"x" * 3_000_000)
        own_mongo.pause()
        try:
            async with backend.read("a") as _reading:
                pytest.fail("a stopped server has answered")
        except BackendUnavailable:
            pass

        async def listed() -> None:
            async for _ in backend.list():
                pass

        async with asyncio.timeout(60):
            answers = await asyncio.gather(
                meta.get("a"),
                meta.create(make_record("b")),
                meta.update("a", {"size": 1}),
                meta.delete("a"),
                meta.count(),
                meta.list_unfinished(),
                backend.stat("a"),
                backend.write("b", b"x"),
                backend.discard("b"),
                listed(),
                return_exceptions=True,
            )
            [many] = await meta.create_many([make_record("c")])
        for answer in (*answers, many):
            assert isinstance(answer, BackendUnavailable), repr(answer)
        own_mongo.resume()
        async with asyncio.timeout(30):
            while True:  # the driver may first have to learn that the server is back
                with contextlib.suppress(BackendUnavailable):
                    await meta.create(make_record("after"))
                    break
        assert (await meta.get("after")).path == "after"


# -- lost answers (J3)


@pytest_asyncio.fixture
async def cutting(own_mongo: MongoServer) -> AsyncIterator[CuttingProxy]:
    async with CuttingProxy(("127.0.0.1", own_mongo.port)) as proxy:
        yield proxy


async def refused(work: Awaitable[Any]) -> StorageError | None:
    """Return the error of a call whose answer was lost; None where the driver has sent it again and all is well."""
    try:
        await work
    except BackendUnavailable as error:
        return error if error.outcome_unknown else pytest.fail("the outcome is not known")
    except Conflict as error:
        # The echo of a statement that was sent again, which the journal settles. mongod recognises it; SecantusDB not.
        return error
    return None


@pytest.mark.asyncio
@pytest.mark.parametrize("retry", ["true", "false"])
async def test_lost_answers_are_settled_by_the_token(cutting: CuttingProxy, retry: str) -> None:
    url = f"mongodb://127.0.0.1:{cutting.port}/app?directConnection=true&retryWrites={retry}&retryReads={retry}"
    async with MongoMetaBackend(url, timeouts=Timeouts(operation=10.0)) as meta:
        record = make_record("the/path")
        cutting.cut("the/path")
        assert (retry == "false") == bool(await refused(meta.create(record)))
        again = await meta.create(record)  # it had landed, and is recognised
        assert again.token == record.token
        with pytest.raises(AlreadyExists):
            await meta.create(make_record("the/path"))
        cutting.cut("the/path")
        await refused(meta.update("the/path", {"version": 1, "size": 7}, expect=record.revision))
        changed = await meta.get("the/path")
        assert (changed.version, changed.size) == (1, 7)
        cutting.cut("the/path")
        await refused(meta.delete("the/path", expect=changed.revision))
        with pytest.raises(NotFound):
            await meta.get("the/path")
        assert cutting.cuts == 3


@pytest.mark.asyncio
@pytest.mark.parametrize("retry", ["true", "false"])
async def test_every_lost_answer_of_save_and_delete(cutting: CuttingProxy, own_mongo: MongoServer, retry: str) -> None:
    url = f"mongodb://127.0.0.1:{cutting.port}/app?directConnection=true&retryWrites={retry}&retryReads={retry}"
    acknowledged: dict[str, bytes] = {}
    deleted: set[str] = set()
    async with storage_of(url, seconds=10.0) as storage:
        await storage.save("warm.up", b"")
        acknowledged["warm.up"] = b""
        for number in range(24):
            name = f"marker-{number:02}"
            cuts = cutting.cuts
            cutting.cut(name, after=number)
            try:
                path = await storage.save(f"{name}.txt", name.encode())
                acknowledged[path] = name.encode()
                if number % 2:
                    del acknowledged[path]
                    await storage.delete(path)
                    deleted.add(path)
            except BackendUnavailable:
                pass
            if cutting.cuts == cuts and number % 2:
                break  # there was no such statement: all have been lost once
        else:
            pytest.fail("a save and a delete take more statements than were cut")
        cutting.cut(b"")
    assert cutting.cuts >= 8
    await assert_sound(own_mongo.url, acknowledged, gone=deleted)


# -- many processes

RACER = """
import asyncio, sys
from aproxy_storage.errors import AlreadyExists
from aproxy_storage.meta_backends.mongo import MongoMetaBackend
from aproxy_storage.testing.meta_backends import make_record

async def main():
    won = []
    paths = iter([f"{number:04}" for number in range(int(sys.argv[4]))])
    async with MongoMetaBackend(sys.argv[1]) as meta:
        async def work():
            for path in paths:
                try:
                    await meta.create(make_record(path, name=sys.argv[2]))
                    won.append(path)
                except AlreadyExists:
                    pass
        async with asyncio.TaskGroup() as group:
            for _ in range(int(sys.argv[3])):
                group.create_task(work())
    print(" ".join(won))

asyncio.run(main())
"""


async def race(url: str, *, processes: int, tasks: int, paths: int) -> None:
    racers = [
        await asyncio.create_subprocess_exec(
            *(sys.executable, "-W", "error", "-c", RACER, url, str(number), str(tasks), str(paths)),
            stdout=subprocess.PIPE,
            cwd=ROOT,
        )
        for number in range(processes)
    ]
    won = {}
    for number, racer in enumerate(racers):
        output, _ = await asyncio.wait_for(racer.communicate(), 600)
        assert racer.returncode == 0
        won[str(number)] = output.decode().split()
    assert sorted(path for each in won.values() for path in each) == [f"{number:04}" for number in range(paths)]
    async with MongoMetaBackend(url) as meta:
        for name, each in won.items():
            records = await meta.get_many(each)
            assert all(isinstance(record, MetaRecord) and record.name == name for record in records)


@pytest.mark.asyncio
async def test_processes_race_for_the_indexes_and_for_paths(mongo_url: str, mongo_database: Any) -> None:
    await race(in_database(mongo_url, mongo_database.name), processes=3, tasks=30, paths=100)


@pytest.mark.asyncio
@pytest.mark.soak
async def test_eight_processes_with_a_hundred_tasks_each(mongo_url: str, mongo_database: Any) -> None:
    await race(in_database(mongo_url, mongo_database.name), processes=8, tasks=100, paths=1000)
