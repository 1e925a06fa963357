"""Threads, forks and contexts: whose thread, connection and transaction a call uses."""

from __future__ import annotations

import asyncio
import contextlib
import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from asgiref.sync import ThreadSensitiveContext, async_to_sync, sync_to_async
from django.db import connections, transaction

from aproxy_storage import AlreadyExists
from aproxy_storage.meta_backends.orm import ORMMetaBackend
from aproxy_storage.testing.meta_backends import make_record
from sync_bridge.models import StoredFile

ROOT = Path(__file__).parents[2]


def test_the_thread_is_the_callers(django_database: Path) -> None:
    meta = ORMMetaBackend(StoredFile)
    seen: list[int] = []

    def note(execute, sql, params, many, context):  # type: ignore[no-untyped-def]
        seen.append(threading.get_ident())
        return execute(sql, params, many, context)

    with connections["default"].execute_wrapper(note):
        async_to_sync(meta.create)(make_record("a"))
        async_to_sync(meta.get)("a")
    assert len(seen) >= 2
    assert set(seen) == {threading.get_ident()}


@pytest.mark.asyncio
async def test_every_request_has_its_own_transaction(postgres_database: str) -> None:
    meta = ORMMetaBackend(StoredFile, postgres_database)
    everybody = threading.Barrier(4)

    def view(number: int) -> int:
        try:
            with transaction.atomic(using=postgres_database):
                async_to_sync(meta.create)(make_record(f"a{number}"))
                everybody.wait(30)
                seen: int = async_to_sync(meta.count)()
                everybody.wait(30)
            return seen
        finally:
            connections[postgres_database].close()

    async def request(number: int) -> int:
        async with ThreadSensitiveContext():
            return await sync_to_async(view)(number)

    assert await asyncio.gather(*map(request, range(4))) == [1, 1, 1, 1]
    assert await meta.count() == 4
    await meta.aclose()


def test_threads_that_create_the_same_paths(database: str) -> None:
    meta = ORMMetaBackend(StoredFile, database)
    paths = [f"{number:02}" for number in range(25)]
    won: list[str] = []

    async def work() -> None:
        answers = await meta.create_many([make_record(path) for path in paths[::2]])
        won.extend(answer.path for answer in answers if not isinstance(answer, Exception))  # type: ignore[union-attr]
        for path in paths:
            with contextlib.suppress(AlreadyExists):
                won.append((await meta.create(make_record(path))).path)

    def run() -> None:
        try:
            async_to_sync(work)()
        finally:
            connections.close_all()

    threads = [threading.Thread(target=run) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert sorted(won) == paths


RACER = """
import asyncio, sys
from tests.django_support.setup import add_database, configure, postgres_settings
configure()
add_database("db", postgres_settings(sys.argv[1], options=sys.argv[2]))
from aproxy_storage import AlreadyExists
from aproxy_storage.meta_backends.orm import ORMMetaBackend
from aproxy_storage.testing.meta_backends import make_record

meta = ORMMetaBackend("sync_bridge.StoredFile", "db")
paths = iter([f"{number:04}" for number in range(int(sys.argv[3]))])

async def work():
    for path in paths:
        try:
            print((await meta.create(make_record(path))).path)
        except AlreadyExists:
            pass

async def main():
    await asyncio.gather(*(work() for _ in range(100)))
    await meta.aclose()

sys.stdin.readline()  # all of them at once
asyncio.run(main())
"""


@pytest.mark.parametrize("count", [150, pytest.param(1000, marks=pytest.mark.soak)])
def test_processes_that_create_the_same_paths(postgres_database: str, postgres_url: str, count: int) -> None:
    command = [sys.executable, "-c", RACER, postgres_url, f"-c search_path={postgres_database}", str(count)]
    environment = {name: value for name, value in os.environ.items() if name != "DJANGO_SETTINGS_MODULE"}
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    racers = [subprocess.Popen(command, cwd=ROOT, env=environment, **pipes) for _ in range(8)]
    for racer in racers:
        assert racer.stdin is not None
        racer.stdin.write("\n")
        racer.stdin.flush()
    won = [path for racer in racers for path in racer.communicate(timeout=120)[0].split()]
    assert [racer.returncode for racer in racers] == [0] * 8
    assert sorted(won) == [f"{number:04}" for number in range(count)]


FORKER = """
import asyncio, os, sys
from django.conf import settings
from tests.django_support.setup import add_database, configure, postgres_settings, sqlite_settings
configure()
kind, where = sys.argv[1:3]
add_database("db", sqlite_settings(where) if kind == "sqlite" else postgres_settings(where, options=sys.argv[3]))
if len(sys.argv) > 4:
    from django.db import connections
    connections["db"].cursor().execute("PRAGMA journal_mode=wal")
from asgiref.sync import async_to_sync
from aproxy_storage.meta_backends.orm import ORMMetaBackend
from aproxy_storage.testing.meta_backends import make_record
from sync_bridge.models import StoredFile

meta = ORMMetaBackend(StoredFile, "db")

async def use(name):
    for number in range(10):
        await meta.create(make_record(f"{name}/{number}"))
        assert (await meta.get(f"{name}/{number}")).path
    return await meta.count(f"{name}/")

def both(name):
    # Once in asgiref's thread, once in this one.
    assert asyncio.run(use(name)) == 10
    assert async_to_sync(use)(name + "-sync") == 10

both("before")
for child in range(3):
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            both(f"child-{child}")
            code = 0
        finally:
            os._exit(code)
    both(f"parent-{child}")
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
both("after")

async def total():
    number = await meta.count()
    await meta.aclose()
    return number

print(asyncio.run(total()))
from django.db import connections
connections.close_all()
"""


@pytest.mark.parametrize("kind", ["sqlite", "postgresql"])
def test_both_sides_of_a_fork_go_on(kind: str, request: pytest.FixtureRequest) -> None:
    if kind == "sqlite":
        arguments = [kind, str(request.getfixturevalue("django_database"))]
    else:
        alias = request.getfixturevalue("postgres_database")
        arguments = [kind, request.getfixturevalue("postgres_url"), f"-c search_path={alias}"]
    environment = {name: value for name, value in os.environ.items() if name != "DJANGO_SETTINGS_MODULE"}
    done = subprocess.run(
        [sys.executable, "-c", FORKER, *arguments],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.split() == ["160"]
    assert "Traceback" not in done.stderr


def test_without_django() -> None:
    code = """
import sys
sys.modules["django"] = None
try:
    import aproxy_storage.meta_backends.orm
except ImportError as error:
    print(error)
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert "pip install 'aproxy-storage[django]'" in done.stdout, done.stdout + done.stderr


def test_without_a_set_up_django() -> None:
    """Importing needs no settings; using says what is missing."""
    code = """
import asyncio
from aproxy_storage import ConfigurationError
from aproxy_storage.meta_backends.orm import ORMMetaBackend
meta = ORMMetaBackend("app.Model")
try:
    asyncio.run(meta.get("a"))
except ConfigurationError as error:
    print(error)
"""
    environment = {name: value for name, value in os.environ.items() if name != "DJANGO_SETTINGS_MODULE"}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=60
    )
    assert "call django.setup()" in done.stdout, done.stdout + done.stderr
