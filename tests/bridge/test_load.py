"""Many threads over one pool, forks amid running calls, and processes that end in the middle of one."""

import os
import random
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import asyncpg
import pytest
from django.core.files.base import ContentFile

from aproxy_storage import ProxyStorage
from aproxy_storage.backends.filesystem import FileSystemBackend
from aproxy_storage.meta_backends.postgres import PostgresMetaBackend
from aproxy_storage.meta_backends.sqlite import SQLiteMetaBackend
from sync_bridge import BridgeStorage
from sync_bridge.bridge import bridge
from tests.bridge.test_bridge import in_child

CONNECTIONS = 4


@pytest.fixture(params=["sqlite", "sqlite over the bridge", "postgres"])
def storage(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[BridgeStorage]:
    meta: Any
    if request.param == "postgres":
        url = request.getfixturevalue("postgres_url")
        meta = PostgresMetaBackend(url, table=f"bridge_{os.getpid()}", max_connections=CONNECTIONS)
    else:
        meta = SQLiteMetaBackend(tmp_path / "records.sqlite3")
    proxy = ProxyStorage("load", originals=FileSystemBackend(tmp_path / "f"), meta=meta)
    yield (storage := BridgeStorage(storage=proxy, direct=request.param == "sqlite"))
    if request.param == "postgres":
        bridge.call(drop, url, f"bridge_{os.getpid()}")
    bridge.call(storage.proxy.aclose)


async def drop(url: str, table: str) -> None:
    connection = await asyncpg.connect(url)
    await connection.execute(f'DROP TABLE IF EXISTS "{table}"')
    await connection.close()


async def server_processes(url: str) -> int:
    """Count the connections, those of this question left out."""
    connection = await asyncpg.connect(url)
    try:
        count: int = await connection.fetchval(
            "SELECT count(*) FROM pg_stat_activity WHERE backend_type = 'client backend' AND pid <> pg_backend_pid()"
        )
        return count
    finally:
        await connection.close()


def mixed_calls(storage: BridgeStorage, thread: int, count: int, errors: list[BaseException]) -> None:
    dice = random.Random(thread)
    mine: dict[str, bytes] = {}
    try:
        for number in range(count):
            kind = dice.randrange(6)
            if kind <= 1 or not mine:
                data = b"%d-%d" % (thread, number)
                mine[storage.save(f"{dice.randrange(20)}/shared.txt", ContentFile(data))] = data
                continue
            path = dice.choice(list(mine))
            if kind == 2:
                with storage.open(path) as file:
                    assert file.read() == mine[path]
            elif kind == 3:
                assert storage.exists(path)
                assert storage.size(path) == len(mine[path])
            elif kind == 4:
                mine[path] = b"replaced by %d" % thread
                storage.replace(path, ContentFile(mine[path]))
            else:
                storage.delete(path)
                del mine[path]  # by now it may be another thread's
        for path, data in mine.items():
            with storage.open(path) as file:
                assert file.read() == data
    except BaseException as error:
        errors.append(error)


def storm(storage: BridgeStorage, threads: int, count: int) -> None:
    errors: list[BaseException] = []
    running = [threading.Thread(target=mixed_calls, args=(storage, number, count, errors)) for number in range(threads)]
    for thread in running:
        thread.start()
    for thread in running:
        thread.join()
    assert not errors
    assert sum(thread.name == "aproxy_storage-bridge" for thread in threading.enumerate()) == 1


@pytest.mark.parametrize("count", [40, pytest.param(1_000, marks=pytest.mark.soak)])
def test_sixteen_threads_share_one_pool(storage: BridgeStorage, count: int, request: pytest.FixtureRequest) -> None:
    on_postgres = isinstance(storage.proxy.meta, PostgresMetaBackend)
    url = request.getfixturevalue("postgres_url") if on_postgres else ""
    before = bridge.call(server_processes, url) if on_postgres else 0
    storm(storage, 16, count)
    if on_postgres:
        assert bridge.call(server_processes, url) - before <= CONNECTIONS


def test_a_thread_that_is_alone_uses_the_same_pool(storage: BridgeStorage) -> None:
    """It runs the loop of the bridge itself, in turns with the keeper."""
    storm(storage, 1, 100)
    storm(storage, 2, 50)


def test_twenty_forks_amid_running_calls_share_nothing(storage: BridgeStorage) -> None:
    path = storage.save("kept.txt", ContentFile(b"kept"))
    stop, errors = threading.Event(), []

    def caller() -> None:
        while not stop.is_set():
            try:
                storage.delete(storage.save("passing.txt", ContentFile(b"x")))
            except BaseException as error:
                errors.append(error)
                return

    def child() -> bool:
        with storage.open(path) as file:
            return file.read() == b"kept" and storage.save("child.txt", ContentFile(b"c")).startswith("child")

    threads = [threading.Thread(target=caller) for _ in range(3)]
    for thread in threads:
        thread.start()
    try:
        answers = [in_child(child) for _ in range(20)]
    finally:
        stop.set()
        for thread in threads:
            thread.join()
    assert not errors
    assert all(answers)
    assert len(storage.listdir("")[1]) == 21
    assert storage.open(path).read() == b"kept"


PROGRAM = """
import os, signal, sys, threading, time
from pathlib import Path
from django.conf import settings
settings.configure(USE_TZ=True)
from django.core.files.base import ContentFile
from sync_bridge import BridgeStorage
from sync_bridge.bridge import bridge

directory = Path(sys.argv[1])
storage = BridgeStorage(name="x", original=f"file://{directory}/files", meta=f"sqlite:///{directory}/records.sqlite3",
                        direct=sys.argv[2] == "directly")
storage.save("first.txt", ContentFile(b"1"))

def saving():
    while True:
        storage.delete(storage.save("again.txt", ContentFile(bytes(100_000))))

def late():
    time.sleep(0.3)
    print(storage.save("late.txt", ContentFile(b"late")), flush=True)

threading.excepthook = lambda args: None if "Closed" in args.exc_type.__name__ else threading.__excepthook__(args)
threading.Thread(target=late).start()
for _ in range(4):
    threading.Thread(target=saving, daemon=True).start()
time.sleep(0.3)
"""


@pytest.mark.parametrize(
    ("end", "code"), [("", 0), ("raise SystemExit(3)", 3), ("os.kill(os.getpid(), signal.SIGINT)", -signal.SIGINT)]
)
@pytest.mark.parametrize("how", ["directly", "over the bridge"])
def test_the_process_ends_in_the_middle_of_calls(how: str, end: str, code: int, tmp_path: Path) -> None:
    command = [sys.executable, "-X", "dev", "-W", "error", "-c", PROGRAM + end, str(tmp_path), how]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == code, done.stderr
    assert "late.txt" in done.stdout
    assert "Warning" not in done.stderr, done.stderr
    assert "never awaited" not in done.stderr
    assert ("Traceback" in done.stderr) == (code < 0), done.stderr
    assert {path.name for path in (tmp_path / "files").iterdir()} >= {"first.txt", "late.txt"}
