"""`SQLiteMetaBackend` against the suite, and what only SQLite can do or suffer."""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
import sqlite3
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio

from aproxy_storage import ProxyStorage, threads
from aproxy_storage.backends.memory import MemoryBackend
from aproxy_storage.errors import (
    AlreadyExists,
    BackendUnavailable,
    ConfigurationError,
    Conflict,
    DeadlineExceeded,
    IntegrityError,
    NotFound,
    NotSupported,
    OutOfSpace,
    StorageError,
)
from aproxy_storage.meta_backends import _sqlite_engine
from aproxy_storage.meta_backends._sqlite_threads import Writer
from aproxy_storage.meta_backends.sqlite import SQLiteMetaBackend
from aproxy_storage.paths import new_token
from aproxy_storage.records import PENDING, MetaRecord, Place, Revision
from aproxy_storage.testing.meta_backends import MetaBackendTests, make_record
from aproxy_storage.timeouts import Timeouts

ROOT = Path(__file__).parents[2]
NOW = "(julianday('now') - 2440587.5) * 86400.0"


@contextlib.contextmanager
def behind(path: str | Path) -> Iterator[sqlite3.Connection]:
    """Give a connection of our own to the file."""
    connection = sqlite3.connect(path, isolation_level=None, timeout=10)
    connection.row_factory = sqlite3.Row
    try:
        yield connection
    finally:
        connection.close()


class TestSQLite(MetaBackendTests):
    @pytest_asyncio.fixture
    async def meta(self, tmp_path: Path) -> AsyncIterator[SQLiteMetaBackend]:
        async with SQLiteMetaBackend(tmp_path / "meta.db") as meta:
            yield meta

    async def row_behind(self, meta: SQLiteMetaBackend, path: str) -> Mapping[str, Any] | None:
        with behind(meta.path) as connection:
            row = connection.execute("SELECT * FROM aproxy_files WHERE path = ?", (path,)).fetchone()
            return None if row is None else dict(row)

    async def rows_behind(self, meta: SQLiteMetaBackend) -> Sequence[Mapping[str, Any]]:
        with behind(meta.path) as connection:
            return [dict(row) for row in connection.execute("SELECT * FROM aproxy_files")]

    async def insert_behind(self, meta: SQLiteMetaBackend, **columns: Any) -> None:
        with behind(meta.path) as connection:
            names, marks = ", ".join(columns), ", ".join("?" * len(columns))
            connection.execute(f"INSERT INTO aproxy_files ({names}) VALUES ({marks})", list(columns.values()))

    async def expire_lease_behind(self, meta: SQLiteMetaBackend, path: str, *, ago: float = 1.0) -> None:
        with behind(meta.path) as connection:
            connection.execute(f"UPDATE aproxy_files SET lease = {NOW} - ? WHERE path = ?", (ago, path))


# -- group commit


@pytest.mark.asyncio
async def test_a_failed_statement_undoes_only_itself(tmp_path: Path) -> None:
    async with SQLiteMetaBackend(tmp_path / "meta.db") as meta:
        with behind(meta.path) as connection:
            connection.execute(
                "CREATE TRIGGER no_evil BEFORE INSERT ON aproxy_files WHEN NEW.path LIKE '%7' "
                "BEGIN SELECT RAISE(ABORT, 'evil'); END"
            )
        answers = await asyncio.gather(
            *(meta.create(make_record(f"{number:02}")) for number in range(50)), return_exceptions=True
        )
        failed = [number for number, answer in enumerate(answers) if isinstance(answer, BaseException)]
        assert failed == [7, 17, 27, 37, 47]
        for number in failed:
            assert isinstance(answers[number], StorageError)
            assert not answers[number].outcome_unknown
        assert [record.path async for record in meta.list()] == [f"{n:02}" for n in range(50) if n % 10 != 7]


@pytest.mark.asyncio
async def test_writes_that_wait_together_share_a_transaction(tmp_path: Path) -> None:
    async with SQLiteMetaBackend(tmp_path / "meta.db") as meta:
        began: list[str] = []
        held = meta._engine.writing()
        assert held.cursor is not None
        held.cursor.connection.set_trace_callback(lambda text: began.append(text) if text.startswith("BEGIN") else None)
        await asyncio.gather(*(meta.create(make_record(str(number))) for number in range(64)))
        assert len(began) < 16
        assert await meta.count() == 64


@pytest.mark.asyncio
@pytest.mark.parametrize("fatal", ["statement", "commit"])
async def test_a_lost_transaction_fails_every_member(tmp_path: Path, fatal: str) -> None:
    async with SQLiteMetaBackend(tmp_path / "meta.db") as meta:
        await meta.create(make_record("before"))
        with behind(meta.path) as connection:
            if fatal == "statement":  # a full disk, seen from inside: the whole transaction is rolled back
                connection.execute(
                    "CREATE TRIGGER full BEFORE INSERT ON aproxy_files WHEN NEW.path = '40' "
                    "BEGIN SELECT RAISE(ROLLBACK, 'gone'); END"
                )
            else:  # found out when the transaction is to be committed
                connection.executescript(
                    "CREATE TABLE parent (id INTEGER PRIMARY KEY);"
                    "CREATE TABLE child (id REFERENCES parent DEFERRABLE INITIALLY DEFERRED);"
                    "CREATE TRIGGER bad AFTER INSERT ON aproxy_files WHEN NEW.path = '40' "
                    "BEGIN INSERT INTO child VALUES (1); END"
                )
        held = meta._engine.writing()
        assert held.cursor is not None
        held.cursor.execute("PRAGMA foreign_keys = ON")
        running, release = threading.Event(), threading.Event()
        # So that all of them wait together, behind a transaction of its own.
        blocker = meta._engine.writer.call(lambda: running.set() or release.wait(), timeout=None)
        await asyncio.to_thread(running.wait)
        # The second of the two that are the same fails too, but because of a row that goes with the transaction.
        names = ["same", "same", *(f"{number:02}" for number in range(60))]
        tasks = [asyncio.ensure_future(meta.create(make_record(name))) for name in names]
        await asyncio.sleep(0.02)
        release.set()
        await blocker
        answers = await asyncio.gather(*tasks, return_exceptions=True)
        lost = {name for name, answer in zip(names, answers, strict=True) if isinstance(answer, BaseException)}
        assert lost >= {"same", *(f"{number:02}" for number in range(41))}
        assert {type(answer) for answer in answers} <= {MetaRecord, BackendUnavailable}
        there = {record.path async for record in meta.list()}
        assert there == {"before", *names} - lost
        assert (await meta.create(make_record("after"))).path == "after"


CHILD_THAT_DIES = """
import asyncio, sys
from aproxy_storage.meta_backends._sqlite_threads import Writer
from aproxy_storage.meta_backends.sqlite import SQLiteMetaBackend
from aproxy_storage.testing.meta_backends import make_record

async def main():
    meta = SQLiteMetaBackend(sys.argv[1])
    async def work(worker):
        for number in range(100000):
            path = f"{worker}/{number}"
            await meta.create(make_record(path))
            acknowledged = path
            if number % 3 == 1:
                await meta.delete(path)
                acknowledged = "-" + path
            print(acknowledged, flush=True)
    await asyncio.gather(*map(work, range(30)))

asyncio.run(main())
"""


def script(text: str, *arguments: object, **options: Any) -> subprocess.Popen[str]:
    """Start a Python process that runs `text`."""
    return subprocess.Popen(
        [sys.executable, "-W", "error", "-c", text, *map(str, arguments)],
        stdout=subprocess.PIPE,
        text=True,
        cwd=ROOT,
        **options,
    )


def finish(process: subprocess.Popen[str], timeout: float = 60.0) -> str:
    """Wait for a process that must succeed; return what it printed."""
    output, _ = process.communicate(timeout=timeout)
    assert process.returncode == 0, output
    return output


@pytest.mark.asyncio
async def test_kill_loses_nothing_acknowledged(tmp_path: Path) -> None:
    path = tmp_path / "meta.db"
    for _ in range(3):
        process = script(CHILD_THAT_DIES, path)
        assert process.stdout is not None
        lines = []
        for line in process.stdout:
            lines.append(line.strip())
            if len(lines) == 500:
                process.kill()
        process.wait()
        process.stdout.close()
        assert len(lines) >= 500
        async with SQLiteMetaBackend(path) as meta:
            there = {record.path async for record in meta.list()}
            acknowledged = {line for line in lines if line[0] != "-"}
            assert acknowledged <= there
            assert not {line[1:] for line in lines if line[0] == "-"} & there
            with behind(path) as connection:
                assert connection.execute("PRAGMA integrity_check").fetchone()[0] == "ok"
            await meta.delete_many([(name, None) for name in there])


# -- several processes

RACER = """
import asyncio, sys
from aproxy_storage.errors import AlreadyExists
from aproxy_storage.meta_backends._sqlite_threads import Writer
from aproxy_storage.meta_backends.sqlite import SQLiteMetaBackend
from aproxy_storage.testing.meta_backends import make_record

async def main():
    meta = SQLiteMetaBackend(sys.argv[1])
    won = []
    paths = iter([f"{number:03}" for number in range(250)])
    async def work():
        for path in paths:
            try:
                await meta.create(make_record(path, name=sys.argv[2]))
                won.append(path)
            except AlreadyExists:
                pass
    await asyncio.gather(*(work() for _ in range(100)))
    await meta.aclose()
    print(" ".join(won))

asyncio.run(main())
"""


@pytest.mark.asyncio
async def test_processes_race_for_the_schema_and_for_paths(tmp_path: Path) -> None:
    path = tmp_path / "meta.db"  # not there yet: they race for making it, too
    racers = [script(RACER, path, name) for name in "abcd"]
    won = {name: finish(racer).split() for name, racer in zip("abcd", racers, strict=True)}
    assert sorted(path for paths in won.values() for path in paths) == [f"{number:03}" for number in range(250)]
    async with SQLiteMetaBackend(path) as meta:
        for name, paths in won.items():
            assert all(record and record.name == name for record in await meta.get_many(paths))


@pytest.mark.asyncio
async def test_locked_by_another_process(tmp_path: Path) -> None:
    path = tmp_path / "meta.db"
    async with SQLiteMetaBackend(path, busy_timeout=0.2) as meta:
        await meta.create(make_record("a"))
        with behind(path) as connection:
            connection.execute("BEGIN IMMEDIATE")
            with pytest.raises(BackendUnavailable) as caught:
                await meta.create(make_record("b"))
            assert caught.value.retryable
            assert not caught.value.outcome_unknown
            assert str(path) in str(caught.value)
            assert await meta.exists("a")  # a reader waits for no writer
            assert (await meta.create_many([make_record("b"), make_record("c")])) != []
            connection.execute("ROLLBACK")
        await meta.create(make_record("b"))
        assert await meta.count() == 2


@pytest.mark.asyncio
async def test_what_timed_out_or_was_cancelled_in_the_queue_is_not_run(tmp_path: Path) -> None:
    path = tmp_path / "meta.db"
    async with SQLiteMetaBackend(path, timeouts=Timeouts(operation=1.0), busy_timeout=20.0) as meta:
        with behind(path) as connection:
            connection.execute("BEGIN IMMEDIATE")
            task = asyncio.ensure_future(meta.create(make_record("cancelled")))
            await asyncio.sleep(0.05)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            with pytest.raises(DeadlineExceeded) as caught:
                await meta.create(make_record("late"))
            assert not caught.value.outcome_unknown
            connection.execute("ROLLBACK")
        await meta.create(make_record("fine"))
        assert [record.path async for record in meta.list()] == ["fine"]


@pytest.mark.asyncio
async def test_a_save_cancelled_while_it_reserves_its_path_leaves_the_path_free(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    entered, go_on = threading.Event(), threading.Event()
    run = Writer.run

    def held(self: Writer, *args: Any) -> Any:
        done = run(self, *args)  # inserted, and to be committed whoever still wants it
        entered.set()
        assert go_on.wait(30)
        return done

    meta = SQLiteMetaBackend(tmp_path / "meta.db")
    async with ProxyStorage("media", originals=MemoryBackend(), meta=meta) as storage:
        await meta.setup()
        monkeypatch.setattr(Writer, "run", held)
        saving = asyncio.create_task(storage.save("a.txt", b"x"))
        assert await asyncio.to_thread(entered.wait, 30)
        saving.cancel()
        asyncio.get_running_loop().call_soon(go_on.set)
        with pytest.raises(asyncio.CancelledError):
            await saving
        await storage.cleanup.drain(within=30)
        assert await meta.count() == 0
        assert (await storage.write_to("a.txt", b"y", exclusive=True)).path == "a.txt"


# -- files that are not what they should be


@pytest.mark.asyncio
@pytest.mark.parametrize("name", ["", ":memory:", "file:x?mode=memory"])
async def test_memory_is_refused(name: str) -> None:
    with pytest.raises(ConfigurationError, match="MemoryMetaBackend"):
        SQLiteMetaBackend(name)


@pytest.mark.asyncio
async def test_bad_settings() -> None:
    for options in ({"table": 'x"; DROP'}, {"table": ""}, {"durability": "maybe"}, {"readers": 0}):
        with pytest.raises((ConfigurationError, ValueError)):
            SQLiteMetaBackend("x.db", **options)  # type: ignore[arg-type]


async def refused(meta: SQLiteMetaBackend, error: type[StorageError], *, reads: bool = True) -> None:
    """Assert that every kind of call ends in `error`, which names the file, and in nothing native."""
    calls: list[Callable[[], Coroutine[Any, Any, Any]]] = [
        lambda: meta.create(make_record("b")),
        lambda: meta.update("a", {"size": 1}),
        lambda: meta.delete("a"),
    ]
    if reads:
        calls += [meta.setup, lambda: meta.get("a"), lambda: meta.exists("a"), meta.count]
        calls += [lambda: meta.get_many(["a"]), lambda: meta.owners("fs", ["a"]), meta.list_unfinished]
    for call in calls:
        with pytest.raises(error) as caught:
            await call()
        assert meta.path in str(caught.value)
        assert caught.value.__cause__ is not None or error is ConfigurationError
    answers = await meta.create_many([make_record("b"), make_record("c")])
    assert [type(answer) for answer in answers] == [error, error]
    await meta.aclose()


@pytest.mark.asyncio
async def test_not_a_database(tmp_path: Path) -> None:
    path = tmp_path / "meta.db"
    path.write_bytes(b"Dear diary, " * 500)
    await refused(SQLiteMetaBackend(path), ConfigurationError)
    assert path.read_bytes() == b"Dear diary, " * 500


@pytest.mark.asyncio
async def test_directory_missing_or_in_the_way(tmp_path: Path) -> None:
    meta = SQLiteMetaBackend(tmp_path / "no" / "meta.db")
    await refused(meta, BackendUnavailable)
    (tmp_path / "no").mkdir()
    await meta.create(make_record("a"))  # it has come: nothing needs to be started again
    await meta.aclose()
    await refused(SQLiteMetaBackend(tmp_path), BackendUnavailable)


@pytest.mark.asyncio
async def test_damaged(tmp_path: Path) -> None:
    path = tmp_path / "meta.db"
    async with SQLiteMetaBackend(path) as meta:
        await meta.create_many([make_record(f"{number:05}", name="x" * 100) for number in range(2000)])
    data = bytearray(path.read_bytes())
    for page in range(4096 * 8, len(data) - 4096, 4096):  # the first pages hold the schema
        data[page : page + 512] = b"\xff" * 512
    path.write_bytes(data)
    meta = SQLiteMetaBackend(path)
    with pytest.raises(IntegrityError, match=r"meta\.db"):
        [record async for record in meta.list()]
    answers = await asyncio.gather(
        *(meta.get(f"{number:05}") for number in range(2000)),
        *(meta.delete(f"{number:05}") for number in range(2000)),
        return_exceptions=True,
    )
    kinds = {type(answer) for answer in answers}
    assert IntegrityError in kinds
    assert kinds <= {IntegrityError, NotFound, MetaRecord, type(None)}
    await meta.aclose()


@pytest.mark.asyncio
async def test_a_newer_schema_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "meta.db"
    async with SQLiteMetaBackend(path) as meta:
        await meta.create(make_record("a"))
    with behind(path) as connection:
        connection.execute("PRAGMA user_version = 2")
    await refused(SQLiteMetaBackend(path), ConfigurationError)
    with behind(path) as connection:
        connection.execute("PRAGMA user_version = 1")
    async with SQLiteMetaBackend(path) as meta:
        assert await meta.exists("a")


@pytest.mark.asyncio
async def test_text_in_utf_16_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "meta.db"
    with behind(path) as connection:
        connection.execute("PRAGMA encoding = 'UTF-16'")
        connection.execute("CREATE TABLE t (x)")
    await refused(SQLiteMetaBackend(path), ConfigurationError)


@pytest.mark.asyncio
async def test_the_table_is_dropped(tmp_path: Path) -> None:
    async with SQLiteMetaBackend(tmp_path / "meta.db") as meta:
        await meta.create(make_record("a"))
        with behind(meta.path) as connection:
            connection.execute("DROP TABLE aproxy_files")
        await refused(meta, ConfigurationError, reads=False)


@pytest.mark.parametrize("what", ["INSERT", "UPDATE", "DELETE"])
@pytest.mark.asyncio
async def test_a_trigger_that_swallows_a_write_is_named(tmp_path: Path, what: str) -> None:
    async with SQLiteMetaBackend(tmp_path / "meta.db") as meta:
        there = await meta.create(make_record("a"))
        with behind(meta.path) as connection:
            connection.execute(f"CREATE TRIGGER t BEFORE {what} ON aproxy_files BEGIN SELECT RAISE(IGNORE); END")
        new, other = make_record("b"), Revision("another", 1)
        calls: dict[str, Callable[[], Coroutine[Any, Any, object]]] = {
            "INSERT": lambda: meta.create(new),
            "UPDATE": lambda: meta.update("a", {"size": 7}, expect=there.revision),
            "DELETE": lambda: meta.delete("a", expect=there.revision),
        }
        with pytest.raises(NotSupported, match="a trigger"):
            await calls[what]()
        if what == "INSERT":
            with pytest.raises(NotSupported, match="a trigger"):
                await meta.reserve(new, lease=1.0, spare=new)
            with pytest.raises(AlreadyExists):
                await meta.create(make_record("a", token="another"))
        if what == "DELETE":
            with pytest.raises(NotSupported, match="a trigger"):
                await meta.delete("a")
            with pytest.raises(Conflict):
                await meta.delete("a", expect=other)
            with pytest.raises(NotFound):
                await meta.delete("absent")
            many = await meta.delete_many([("a", None), ("a", other)])
            assert [type(answer) for answer in many] == [NotSupported, Conflict]
        assert await meta.get("a") == there
        assert not await meta.exists("b")


async def calls_of(meta: SQLiteMetaBackend, name: str) -> list[type[BaseException] | None]:
    """Return how a write, a look-up and a listing end."""
    ended: list[type[BaseException] | None] = []
    for call in (meta.create(make_record(name)), meta.exists("a"), meta.get_many(["a"])):
        try:
            await call
        except StorageError as error:
            ended.append(type(error))
        else:
            ended.append(None)
    return ended


def move(path: Path, to: str) -> None:
    for suffix in ("", "-wal", "-shm"):
        path.with_name(path.name + suffix).rename(path.with_name(to + suffix))


@pytest.mark.asyncio
async def test_nothing_is_acknowledged_into_a_file_that_was_moved(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_sqlite_engine, "LOOK_EVERY", -1.0)
    path = tmp_path / "meta.db"
    async with SQLiteMetaBackend(path) as meta, SQLiteMetaBackend(path) as other:
        for each in (meta, other):
            assert await calls_of(each, f"a{each is other}") == [None, None, None]
        move(path, "away.db")
        assert await calls_of(meta, "b") == [BackendUnavailable] * 3
        assert meta.looks_here is False
        assert not path.exists()  # an empty one would make every file absent
        with pytest.raises(BackendUnavailable, match="put it back"):
            other.look_here("aFalse")
        move(path.with_name("away.db"), "meta.db")
        assert await calls_of(meta, "c") == [None, None, None]
        async with SQLiteMetaBackend(tmp_path / "restored.db") as restored:
            await restored.create(make_record("old"))
        move(path, "former.db")
        (tmp_path / "restored.db").rename(path)
        assert [await meta.exists(name) for name in ("c", "old")] == [False, True]
        assert await meta.create(make_record("d"))
        assert await other.exists("d")


@pytest.mark.parametrize(
    ("way", "closed"),
    [(way, closed) for way in ("replaced", "moved", "deleted") for closed in (None, "after")]
    + [("moved", "before"), ("deleted", "before")],
)
@pytest.mark.asyncio
async def test_a_backup_is_not_opened_with_the_log_of_the_former_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, way: str, closed: str | None
) -> None:
    """It was, after an `aclose` before or after the backup came: SQLite leaves the log of a file that was moved."""
    monkeypatch.setattr(_sqlite_engine, "LOOK_EVERY", -1.0)
    path, away = tmp_path / "meta.db", tmp_path / "away.db"
    wal, shm = tmp_path / "meta.db-wal", tmp_path / "meta.db-shm"
    async with SQLiteMetaBackend(path) as meta:
        await meta.create_many([make_record("a")])
        with behind(path) as live, behind(tmp_path / "backup.db") as copy:
            live.backup(copy)
            copy.execute("PRAGMA journal_mode = DELETE")
        assert await meta.create(make_record("b"))
        if way != "deleted":  # there, nothing that reads keeps the file open
            assert await meta.get_many(["a"])
            assert meta.look_here("a")
        backup, inode = (tmp_path / "backup.db").read_bytes(), path.stat().st_ino
        if way != "replaced":
            path.rename(away) if way == "moved" else path.unlink()
            with pytest.raises(BackendUnavailable, match=f"removing {wal} and {shm}"):
                meta.look_here("a")
            assert await calls_of(meta, "c") == [BackendUnavailable] * 3
            copies = [tmp_path / f"copy{number}" for number in range(30)]
            for each in copies:
                each.write_bytes(backup)
            if closed == "before":
                await meta.aclose()
            # A file system gives the inodes of files that are gone to others soon.
            max(copies, key=lambda each: each.stat().st_ino == inode).rename(path)
        else:
            path.rename(away)
            (tmp_path / "backup.db").rename(path)
        if closed == "after":
            await meta.aclose()
        for _ in range(2):
            assert await calls_of(meta, "c") == [BackendUnavailable] * 3
            with pytest.raises(BackendUnavailable, match=f"remove {wal} and {shm}, before any restart"):
                meta.look_here("a")
            if closed is not None:
                await meta.aclose()
        assert path.read_bytes() == backup
        if away.exists():
            away.rename(path)
            assert await calls_of(meta, "d") == [None, None, None]
            assert [await meta.exists(name) for name in "abcd"] == [True, True, False, True]
            path.rename(away)
            path.write_bytes(backup)
            assert await calls_of(meta, "e") == [BackendUnavailable] * 3
        wal.unlink()
        with pytest.raises(BackendUnavailable, match=f"remove {shm}"):
            await meta.create(make_record("e"))
        shm.unlink()
        assert await calls_of(meta, "e") == [None, None, None]
        assert [await meta.exists(name) for name in "abcde"] == [True, False, False, False, True]
        with behind(path) as connection:
            assert connection.execute("PRAGMA integrity_check").fetchone()[0] == "ok"


@pytest.mark.asyncio
async def test_a_file_that_was_deleted_is_made_anew_after_aclose(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_sqlite_engine, "LOOK_EVERY", -1.0)
    meta = SQLiteMetaBackend(tmp_path / "meta.db")
    await meta.create(make_record("a"))
    for path in tmp_path.iterdir():
        path.unlink()
    assert await calls_of(meta, "b") == [BackendUnavailable] * 3
    await meta.aclose()
    assert await calls_of(meta, "b") == [None, None, None]
    await meta.aclose()


@pytest.mark.asyncio
async def test_an_empty_file_is_begun_beside_the_log_of_one_that_was_moved(tmp_path: Path) -> None:
    meta, path = SQLiteMetaBackend(tmp_path / "meta.db"), tmp_path / "meta.db"
    await meta.create(make_record("a"))
    path.rename(tmp_path / "away.db")
    await meta.aclose()
    assert path.with_name("meta.db-wal").exists()
    assert await calls_of(meta, "b") == [None, None, None]
    assert not await meta.exists("a")
    await meta.aclose()
    assert meta._engine._last is None  # it holds descriptors


@pytest.mark.asyncio
async def test_nothing_is_acknowledged_into_a_deleted_file_beside_aclose(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    meta = SQLiteMetaBackend(tmp_path / "meta.db")
    await meta.create(make_record("a"))
    loop = asyncio.get_running_loop()
    shared, close = meta._engine._shared, _sqlite_engine.Held.close
    ended: list[type[BaseException] | None] = []

    def close_late(held: _sqlite_engine.Held) -> None:
        if held is shared and not ended:  # the writer's connection is still open
            for path in tmp_path.iterdir():
                path.unlink()
            ended.extend(asyncio.run_coroutine_threadsafe(calls_of(meta, "b"), loop).result(10))
        close(held)

    monkeypatch.setattr(_sqlite_engine.Held, "close", close_late)
    await meta.aclose()
    assert ended == [BackendUnavailable] * 3
    assert list(tmp_path.iterdir()) == []
    assert await meta.create(make_record("b"))  # closed, it begins anew
    await meta.aclose()


@pytest.mark.asyncio
async def test_what_fails_for_many_is_the_error_of_each(tmp_path: Path) -> None:
    meta = SQLiteMetaBackend(tmp_path)  # a directory
    for operation, answers in (
        ("create", await meta.create_many([make_record("a"), make_record("b")])),
        ("delete", await meta.delete_many([("a", None), ("b", None)])),
    ):
        errors = [answer for answer in answers if isinstance(answer, BackendUnavailable)]
        assert [(error.path, error.operation) for error in errors] == [("a", operation), ("b", operation)]
        assert errors[0] is not errors[1]
    await meta.aclose()


READ_ONLY = """
import asyncio, os, sys
from aproxy_storage.errors import AccessDenied, StorageError
from aproxy_storage.meta_backends._sqlite_threads import Writer
from aproxy_storage.meta_backends.sqlite import SQLiteMetaBackend
from aproxy_storage.testing.meta_backends import make_record

if os.geteuid() == 0:  # root may write anything
    os.setgid(65534)
    os.setuid(65534)

async def main():
    meta = SQLiteMetaBackend(sys.argv[1])
    for call in (meta.setup, lambda: meta.create(make_record("b")), lambda: meta.exists("a")):
        try:
            print("answer", await call())
        except StorageError as error:
            assert sys.argv[1] in str(error), error
            print(type(error).__name__, error.retryable)
    await meta.aclose()

asyncio.run(main())
"""


@pytest.mark.asyncio
async def test_read_only_file_or_directory(tmp_path_factory: pytest.TempPathFactory) -> None:
    base = Path(tempfile.mkdtemp(prefix="aproxy-ro-", dir="/tmp"))
    try:
        base.chmod(0o755)
        async with SQLiteMetaBackend(base / "meta.db") as meta:
            await meta.create(make_record("a"))
        (base / "meta.db").chmod(0o444)
        if os.geteuid() != 0:
            base.chmod(0o555)
        for target in (base / "meta.db", base / "new.db"):
            lines = finish(script(READ_ONLY, target)).splitlines()
            assert lines, target
            assert lines[1].startswith(("AccessDenied", "BackendUnavailable")), (target, lines)
            assert "answer None" not in lines[1:], (target, lines)
    finally:
        base.chmod(0o755)
        shutil.rmtree(base)


def run(*command: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, capture_output=True, text=True, check=False)


@pytest.mark.asyncio
async def test_full_disk(tmp_path: Path) -> None:
    mount = tmp_path / "small"
    mount.mkdir()
    done = run("mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(mount))
    if done.returncode:
        pytest.skip(f"cannot mount a small tmpfs: {done.stderr.strip()}")
    try:
        meta = SQLiteMetaBackend(mount / "meta.db")
        kept: list[str] = []
        failures: list[BaseException] = []
        for start in range(0, 20000, 64):
            names = [f"{number:05}" for number in range(start, start + 64)]
            answers = await asyncio.gather(
                *(meta.create(make_record(name, name="x" * 200)) for name in names), return_exceptions=True
            )
            kept += [name for name, answer in zip(names, answers, strict=True) if isinstance(answer, MetaRecord)]
            failures += [answer for answer in answers if isinstance(answer, BaseException)]
            if failures:
                break
        assert failures
        assert {type(failure) for failure in failures} == {OutOfSpace}
        assert not any(failure.outcome_unknown for failure in failures if isinstance(failure, OutOfSpace))
        assert [record.path async for record in meta.list()] == kept  # no more and no less than was acknowledged
        await meta.aclose()
        assert len(await meta.get_many(kept)) == len(kept)
        await meta.aclose()
    finally:
        run("umount", "-l", str(mount))


# -- forks

FORKS = """
import asyncio, os, sqlite3, sys
from aproxy_storage.meta_backends._sqlite_threads import Writer
from aproxy_storage.meta_backends.sqlite import SQLiteMetaBackend
from aproxy_storage.testing.meta_backends import make_record

meta = SQLiteMetaBackend(sys.argv[1])

async def work(name, count):
    async def one(number):
        await meta.create(make_record(f"{name}/{number:04}"))
        assert await meta.exists(f"{name}/{number:04}")
    await asyncio.gather(*map(one, range(count)))

async def parent():
    await work("warm", 50)
    busy = asyncio.ensure_future(work("parent", 400))
    children = []
    for number in range(6):
        await asyncio.sleep(0.01)       # amid the parent's own work
        pid = os.fork()
        if not pid:
            return number
        children.append(pid)
    await busy
    await meta.aclose()                 # the children still use it: their log must not be deleted
    for pid in children:
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    await work("end", 10)
    await meta.aclose()
    return None

def run():
    loop = asyncio.new_event_loop()
    number = None
    try:
        number = loop.run_until_complete(parent())
    except BaseException:
        import traceback
        traceback.print_exc()
        os._exit(1)
    return number

number = run()
if number is not None:
    asyncio._set_running_loop(None)
    try:
        asyncio.run(work(f"child{number}", 100))
        if number % 2:
            asyncio.run(meta.aclose())
    except BaseException:
        import traceback
        traceback.print_exc()
        os._exit(1)
    os._exit(0)
connection = sqlite3.connect(sys.argv[1])
print(connection.execute("PRAGMA integrity_check").fetchone()[0])
print(connection.execute("SELECT count(*) FROM aproxy_files").fetchone()[0])
connection.close()
"""


@pytest.mark.asyncio
async def test_fork_with_warm_connections(tmp_path: Path) -> None:
    lines = finish(script(FORKS, tmp_path / "meta.db")).split()
    assert lines == ["ok", str(50 + 400 + 6 * 100 + 10)]


FORK_AMID_A_STATEMENT = """
import asyncio, os, sqlite3, sys
from aproxy_storage.errors import ConfigurationError
from aproxy_storage.meta_backends import _sqlite_engine
from aproxy_storage.meta_backends._sqlite_threads import Writer
from aproxy_storage.meta_backends.sqlite import SQLiteMetaBackend
from aproxy_storage.testing.meta_backends import make_record

_sqlite_engine._FORK_WAIT = 0.05
meta = SQLiteMetaBackend(sys.argv[1])

async def child():
    for call in (meta.setup, lambda: meta.exists("a"), lambda: meta.create(make_record("c"))):
        try:
            await call()
        except ConfigurationError:
            pass
        else:
            return 1
    return 0

async def parent():
    await meta.create(make_record("a"))
    locker = sqlite3.connect(sys.argv[1], isolation_level=None)
    locker.execute("BEGIN IMMEDIATE")
    waiting = asyncio.ensure_future(meta.create(make_record("b")))
    await asyncio.sleep(0.2)            # the writer waits for the lock, in the middle of SQLite
    pid = os.fork()
    if not pid:
        asyncio._set_running_loop(None)
        os._exit(asyncio.run(child()))
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    locker.execute("ROLLBACK")
    locker.close()
    await waiting
    print(await meta.count())
    await meta.aclose()

asyncio.run(parent())
"""


@pytest.mark.asyncio
async def test_fork_amid_a_statement_is_refused_in_the_child(tmp_path: Path) -> None:
    assert finish(script(FORK_AMID_A_STATEMENT, tmp_path / "meta.db")).split() == ["2"]


# -- several tables, leases, plans, leaks


@pytest.mark.asyncio
async def test_a_unique_index_of_another_column_is_not_a_taken_path(tmp_path: Path) -> None:
    async with SQLiteMetaBackend(tmp_path / "meta.db") as meta:
        await meta.create_many([make_record(path, name=path) for path in ("a", "b")])
        with behind(meta.path) as connection:
            connection.execute("CREATE UNIQUE INDEX names ON aproxy_files (name)")
            connection.commit()
        with pytest.raises(NotSupported, match=r"aproxy_files\.name"):
            await meta.update("a", {"path": "c", "name": "b"})
        with pytest.raises(AlreadyExists, match="'b'"):
            await meta.update("a", {"path": "b"})


@pytest.fixture
def no_threads(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Return a list: while it is not empty, no thread can be started whose name ends as one of its items says."""
    endings: list[str] = []
    start = threading.Thread.start

    def refuse(thread: threading.Thread) -> None:
        if any(ending in thread.name for ending in endings):
            raise RuntimeError("can't start new thread")
        start(thread)

    monkeypatch.setattr(threading.Thread, "start", refuse)
    return endings


@pytest.mark.asyncio
async def test_a_thread_that_cannot_be_started_is_tried_again(tmp_path: Path, no_threads: list[str]) -> None:
    meta = SQLiteMetaBackend(tmp_path / "meta.db")
    for ending, ask in (("-writer-", meta.create), ("-lookup-", lambda record: meta.get(record.path))):
        no_threads.append(ending)
        with pytest.raises(BackendUnavailable) as caught:
            await ask(make_record("x"))
        assert caught.value.retryable
        assert not caught.value.outcome_unknown
        no_threads.clear()
        assert (await asyncio.wait_for(ask(make_record("x")), 10)).path == "x"
    await meta.aclose()


@pytest.mark.asyncio
async def test_what_is_handed_over_together_and_finds_no_thread_is_answered(
    tmp_path: Path, no_threads: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(threads, "_IDLE", 0.02)
    async with SQLiteMetaBackend(tmp_path / "meta.db") as meta:
        writer = meta._engine.writer
        release = threading.Event()
        first = writer.call(release.wait, timeout=None)
        ran: list[int] = []
        rest = [writer.call(ran.append, number, timeout=None) for number in range(3)]
        release.set()
        until = time.monotonic() + 30
        while writer._count:  # the loop stands still meanwhile, and has not handed the rest over
            assert time.monotonic() < until
            time.sleep(0.005)
        no_threads.append("-writer-")
        for answer in await asyncio.wait_for(asyncio.gather(*rest, return_exceptions=True), 10):
            assert isinstance(answer, BackendUnavailable)
            assert not answer.outcome_unknown
        no_threads.clear()
        assert await first
        await meta.create(make_record("x"))
        assert not ran


@pytest.mark.asyncio
async def test_two_tables_in_one_file(tmp_path: Path) -> None:
    path = tmp_path / "meta.db"
    async with SQLiteMetaBackend(path, table="one") as one, SQLiteMetaBackend(path, table="two") as two:
        await one.create(make_record("a", places=(Place("s3", "k"),)))
        await two.create(make_record("a", name="two"))
        assert (await two.get("a")).name == "two"
        assert await two.owners("s3", ["k"]) == {}
        await one.delete("a")
        assert await two.exists("a")


@pytest.mark.asyncio
async def test_leases_ignore_the_callers_clock(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async with SQLiteMetaBackend(tmp_path / "meta.db") as meta:
        await meta.create(make_record("live", state=PENDING), lease=600.0)
        await meta.create(make_record("over", state=PENDING), lease=-1.0)
        real = time.time
        for hours in (-2, 2):
            monkeypatch.setattr(time, "time", lambda hours=hours: real() + 3600 * hours)
            assert [record.path for record in await meta.list_unfinished()] == ["over"]
            await meta.update("live", {}, lease=600.0)


@pytest.mark.asyncio
async def test_every_lookup_uses_an_index(tmp_path: Path) -> None:
    async with SQLiteMetaBackend(tmp_path / "meta.db") as meta:
        sql = meta._sql
        texts = {
            "get": (sql.get, 1),
            "exists": (sql.exists, 1),
            "delete": (sql.delete_expected, 3),
            "page": (sql.page_after, 5),
            "unfinished": (sql.unfinished, 5),
            "owners": (sql.owners, 2),
            "count": (sql.count, 4),
        }
        with behind(meta.path) as connection:
            for name, (text, marks) in texts.items():
                plan = connection.execute(f"EXPLAIN QUERY PLAN {text}", [""] * marks).fetchall()
                details = [row["detail"] for row in plan]
                assert not [detail for detail in details if "SCAN aproxy_files" in detail and "INDEX" not in detail], (
                    name,
                    details,
                )
                if name != "owners":
                    assert not [detail for detail in details if "TEMP B-TREE" in detail], (name, details)


@pytest.mark.asyncio
async def test_nothing_is_left_after_aclose(tmp_path: Path) -> None:
    def ours() -> list[str]:
        return [thread.name for thread in threading.enumerate() if "aproxy-sqlite-leak" in thread.name]

    def descriptors() -> list[str]:
        links = []
        for name in os.listdir("/proc/self/fd"):
            with contextlib.suppress(OSError):
                links.append(os.readlink(f"/proc/self/fd/{name}"))
        return [link for link in links if str(tmp_path) in link]

    meta = SQLiteMetaBackend(tmp_path / "leak.db", readers=3)
    for _ in range(3):
        await asyncio.gather(*(meta.create(make_record(new_token())) for _ in range(100)))
        await asyncio.gather(*(meta.count() for _ in range(100)))
        assert ours()
        assert descriptors()
        await meta.aclose()
        assert descriptors() == []
        assert sorted(path.name for path in tmp_path.iterdir()) == ["leak.db"]
        for _ in range(1500):
            if not ours():
                break
            await asyncio.sleep(0.01)
        assert ours() == []


@pytest.mark.asyncio
@pytest.mark.parametrize("how", ["cancelled", "late"])
async def test_an_aclose_that_nobody_waits_for_any_more_goes_on_quietly(
    tmp_path: Path, how: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    failures: list[Any] = []
    monkeypatch.setattr(threading, "excepthook", failures.append)
    meta = SQLiteMetaBackend(tmp_path / "meta.db")
    await meta.create(make_record("x"))
    engine = meta._engine
    with engine._writing.lock:  # the writer has answered, and lets go of it in a moment
        pass
    go_on = threading.Event()
    close_all = engine._close_all

    def wait_first(until: float) -> None:
        go_on.wait(30)
        close_all(until)

    monkeypatch.setattr(engine, "_close_all", wait_first)
    try:
        closing = asyncio.create_task(engine.close(-1.0 if how == "late" else 30.0))
        await asyncio.sleep(0)  # its thread runs
        (thread,) = [thread for thread in threading.enumerate() if thread.name == f"{engine.name}-closer"]
        if how == "cancelled":
            closing.cancel()
        await asyncio.wait({closing})
        assert closing.cancelled() == (how == "cancelled")
    finally:
        go_on.set()
    await asyncio.to_thread(thread.join, 30)
    assert not failures
    assert all(held.cursor is None for held in engine._held)


@pytest.mark.asyncio
async def test_durability(tmp_path: Path) -> None:
    for durability, durable, level in (("process", False, 1), ("power", True, 2)):
        async with SQLiteMetaBackend(tmp_path / "meta.db", durability=durability) as meta:  # type: ignore[arg-type]
            assert meta.durable is durable
            cursor = meta._engine.writing().cursor
            assert cursor is not None
            assert cursor.execute("PRAGMA synchronous").fetchone()[0] == level
            assert cursor.execute("PRAGMA journal_mode").fetchone()[0] == "wal"
            await meta.create(make_record(durability))
