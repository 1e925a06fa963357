"""The life of the connections of both PostgreSQL backends, and the errors of a wrong set-up."""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import subprocess
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import asyncpg
import pytest

from aproxy_storage import (
    AccessDenied,
    AlreadyExists,
    Backend,
    BackendUnavailable,
    ConfigurationError,
    MetaBackend,
    ProxyStorage,
)
from aproxy_storage.backends.postgres import PostgresBackend
from aproxy_storage.clients.postgres import map_error, undid_itself
from aproxy_storage.config import meta_backend_from_url, original_from_url
from aproxy_storage.meta_backends.postgres import PostgresMetaBackend
from aproxy_storage.testing.meta_backends import make_record
from tests.services.postgres import PASSWORD_ROLE, PostgresServer

ROOT = Path(__file__).parents[2]
PLAIN = "s3cr3t"
SECRET = "s3cr3t-paßwort/@:#?"

#: Both kinds, and a call that needs the server.
BOTH: list[tuple[type[Any], Callable[[Any], Any]]] = [
    (PostgresMetaBackend, lambda meta: meta.create(make_record("a"))),
    (PostgresBackend, lambda backend: backend.write("a", b"x")),
]
both = pytest.mark.parametrize(("kind", "call"), BOTH, ids=["meta", "original"])


def with_parameter(url: str, parameter: str) -> str:
    return f"{url}{'&' if '?' in url else '?'}{parameter}"


# -- loops and pools


@both
def test_a_loop_that_ends_takes_its_connections_along(
    postgres_url: str, postgres_table: str, kind: type[Any], call: Any
) -> None:
    """Without aclose; a ResourceWarning would fail this test."""
    url = with_parameter(postgres_url, f"application_name={postgres_table}")

    async def count() -> int:
        connection = await asyncpg.connect(postgres_url)
        try:
            text = "SELECT count(*) FROM pg_stat_activity WHERE application_name = $1"
            found: int = await connection.fetchval(text, postgres_table)
            return found
        finally:
            await connection.execute(f'DROP TABLE IF EXISTS "{postgres_table}", "{postgres_table}_chunks"')
            await connection.close()

    backend = kind(url, table=postgres_table)
    asyncio.run(call(backend))
    for _ in range(100):
        if asyncio.run(count()) == 0:
            break
    else:
        pytest.fail("a connection is left")


@both
@pytest.mark.asyncio
async def test_a_borrowed_pool_is_not_closed(
    postgres_url: str, postgres_table: str, postgres_behind: asyncpg.Connection, kind: type[Any], call: Any
) -> None:
    async with asyncpg.create_pool(postgres_url, min_size=0, max_size=3) as pool:
        async with kind(pool=pool, table=postgres_table) as backend:
            await call(backend)
        assert await pool.fetchval("SELECT 1") == 1
        backend = kind(pool=pool, table=postgres_table)
        with pytest.raises(ConfigurationError, match="event loop"):
            await asyncio.to_thread(asyncio.run, call(backend))


@both
@pytest.mark.asyncio
async def test_a_function_makes_a_pool_for_each_loop(
    postgres_url: str, postgres_table: str, postgres_behind: asyncpg.Connection, kind: type[Any], call: Any
) -> None:
    made = []

    async def json_as_objects(connection: asyncpg.Connection) -> None:
        for name in ("json", "jsonb"):
            await connection.set_type_codec(name, schema="pg_catalog", encoder=str, decoder=lambda _: 1 / 0)

    def make() -> Any:
        pool = asyncpg.create_pool(postgres_url, min_size=0, max_size=2, init=json_as_objects)
        made.append(pool)
        return pool

    backend = kind(pool=make, table=postgres_table)
    await call(backend)
    if isinstance(backend, PostgresMetaBackend):
        assert (await backend.update("a", {"extra": {"x": 1}})).extra == (await backend.get("a")).extra == {"x": 1}
    await asyncio.to_thread(asyncio.run, backend.aclose())
    await backend.aclose()
    assert [pool.is_closing() for pool in made] == [True]


@pytest.mark.asyncio
async def test_many_wait_for_few_connections(
    postgres_url: str, postgres_table: str, postgres_behind: asyncpg.Connection
) -> None:
    async with PostgresBackend(postgres_url, table=postgres_table, max_connections=2) as backend:
        data = os.urandom(600_000)
        await asyncio.gather(*(backend.write(str(number), data) for number in range(12)))
        assert [info.size async for info in backend.list()] == [len(data)] * 12


def test_both_sides_of_a_fork(postgres_url: str, postgres_table: str) -> None:
    script = """
import asyncio, os, sys, traceback
from aproxy_storage.backends.postgres import PostgresBackend
from aproxy_storage.meta_backends.postgres import PostgresMetaBackend
from aproxy_storage.testing.meta_backends import make_record

url, table = sys.argv[1:]
meta = PostgresMetaBackend(url, table=table, schema=table)
backend = PostgresBackend(url, table=table + "o", schema=table)

async def work(name):
    await asyncio.gather(*(meta.create(make_record(f"{name}/{number}")) for number in range(50)))
    await backend.write(name, name.encode() * 100_000)

async def main():
    await work("before")
    pid = os.fork()
    if pid == 0:
        try:  # in a loop of its own; the parent's must not run here, it would read what the parent waits for
            asyncio.run(work("child"))
        except BaseException:
            traceback.print_exc()
            os._exit(1)
        os._exit(0)
    await work("parent")
    _, status = await asyncio.to_thread(os.waitpid, pid, 0)
    assert status == 0, status
    await work("after")
    assert await meta.count() == 200
    assert len([info async for info in backend.list()]) == 4
    async with meta._database.use() as connection:
        await connection.execute(f'DROP SCHEMA "{table}" CASCADE')
    await meta.aclose()
    await backend.aclose()

asyncio.run(main())
"""
    command = [sys.executable, "-c", script, postgres_url, postgres_table]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr


# -- prepared statements behind a pooler


@pytest.mark.asyncio
async def test_no_two_connections_call_their_statements_the_same(
    postgres_url: str, postgres_table: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else a pooler that passes connections on lets one process execute what another one has prepared."""
    named: list[set[str]] = []
    for _ in range(2):
        monkeypatch.setattr("asyncpg.connection._uid", 0)  # as in another process
        meta = PostgresMetaBackend(postgres_url, table=postgres_table)
        async with meta, meta._database.use() as connection:
            rows = await connection.fetch("SELECT name FROM pg_prepared_statements")
            named.append({row["name"] for row in rows})
    assert all(named)
    assert not named[0] & named[1]


@both
@pytest.mark.asyncio
async def test_a_pooler_without_prepared_statements_is_named(
    postgres_url: str, postgres_table: str, postgres_behind: asyncpg.Connection, kind: type[Any], call: Any
) -> None:
    async with kind(postgres_url, table=postgres_table) as backend:
        await call(backend)
        async with backend._database.use() as connection:
            await connection.execute("DEALLOCATE ALL")  # as on a server connection that is another's
        with pytest.raises(ConfigurationError, match=r"statement_cache_size.*max_prepared_statements") as caught:
            await call(backend)
        assert not caught.value.outcome_unknown


def test_a_statement_of_somebody_else_is_the_fault_of_a_pooler() -> None:
    for fields in ({"C": "42P05"}, {"C": "26000"}, {"C": "08P01", "R": "exec_bind_message"}):
        native = asyncpg.PostgresError.new({**fields, "M": "prepared statement"})
        error = map_error(native, "get")
        assert isinstance(error, ConfigurationError)
        assert "max_prepared_statements" in str(error)
        assert not error.outcome_unknown
        assert not undid_itself(native)
    assert isinstance(map_error(asyncpg.PostgresError.new({"C": "08P01", "M": "x"}), "get"), BackendUnavailable)


# -- another isolation by default


async def waits(behind: asyncpg.Connection, name: str, count: int = 1) -> None:
    """Wait until so many connections of the application `name` wait for a lock."""
    text = "SELECT count(*) FROM pg_stat_activity WHERE wait_event_type = 'Lock' AND application_name = $1"
    async with asyncio.timeout(20):
        while await behind.fetchval(text, name) < count:
            await asyncio.sleep(0.001)
            await behind.execute("SELECT pg_stat_clear_snapshot()")


@pytest.mark.asyncio
@pytest.mark.parametrize("isolation", ["repeatable read", "serializable"])
async def test_any_isolation_may_be_the_default(
    postgres_url: str, postgres_table: str, postgres_behind: asyncpg.Connection, isolation: str
) -> None:
    settings = {"default_transaction_isolation": isolation, "application_name": postgres_table}
    options: dict[str, Any] = {"table": postgres_table, "connect_options": {"server_settings": settings}}
    metas = [PostgresMetaBackend(postgres_url, **options) for _ in range(2)]
    backend = PostgresBackend(postgres_url, **{**options, "table": f"{postgres_table}o"})
    behind = postgres_behind
    try:
        # Of two that make the table, the second sees what the first has made.
        lock = "SELECT pg_advisory_xact_lock(hashtextextended($1, 0))"
        async with behind.transaction():
            await behind.execute(lock, f'aproxy-storage "{postgres_table}"')
            made = [asyncio.ensure_future(meta.setup()) for meta in metas]
            await waits(behind, postgres_table, 2)
        await asyncio.gather(*made)
        # What somebody has changed meanwhile is changed again.
        await metas[0].create(make_record("a"))
        async with behind.transaction():
            await behind.execute(f"""UPDATE "{postgres_table}" SET size = 1""")
            changed = asyncio.ensure_future(metas[0].update("a", {"name": "x"}))
            await waits(behind, postgres_table)
        record = await changed
        assert (record.size, record.name) == (1, "x")
        # A key that somebody has taken meanwhile is taken, for files of every size.
        await backend.setup()
        for content in (b"x", b"x" * 600_000):
            async with behind.transaction():
                await behind.execute(f"""INSERT INTO "{backend.table}" (key, size, chunk_bytes) VALUES ('k', 0, 1)""")
                written = asyncio.ensure_future(backend.write("k", content))
                await waits(behind, postgres_table)
            with pytest.raises(AlreadyExists):
                await written
            await backend.discard("k")
    finally:
        for one in (*metas, backend):
            await one.aclose()
        await behind.execute(f'DROP TABLE IF EXISTS "{backend.table}", "{backend.table}_chunks"')


# -- durability


@pytest.mark.asyncio
async def test_power_is_refused_where_the_server_does_not_have_it(own_postgres: PostgresServer) -> None:
    url = own_postgres.url
    meta = PostgresMetaBackend(url, durability="power")
    assert meta.durable
    with pytest.raises(ConfigurationError, match=r"fsync and full_page_writes is off"):
        await meta.setup()
    with (own_postgres.data / "postgresql.conf").open("a") as file:
        file.write("fsync = on\nfull_page_writes = on\n")
    await asyncio.to_thread(own_postgres.kill9)
    await asyncio.to_thread(own_postgres.start)
    async with meta:
        await meta.create(make_record("a"))
    assert own_postgres._process is not None
    with (own_postgres.data / "postgresql.conf").open("a") as file:
        file.write("synchronous_commit = off\n")
    own_postgres._process.send_signal(signal.SIGHUP)
    await asyncio.sleep(0.5)  # it has read its configuration again
    with pytest.raises(ConfigurationError, match="synchronous_commit is off"):
        await meta.setup()
    await meta.aclose()


@pytest.mark.asyncio
async def test_a_durable_write_is_synced_whatever_the_default(own_postgres: PostgresServer) -> None:
    """Seen by what a crash leaves: an unsynced commit is in the memory of the server only, for up to 0.6 seconds."""
    with (own_postgres.data / "postgresql.conf").open("a") as file:
        file.write("synchronous_commit = off\nwal_writer_delay = 10s\n")
    own_postgres.kill9()
    own_postgres.start()
    async with PostgresBackend(own_postgres.url) as backend:
        await backend.write("warm", b"up", durable=True)
        await backend.write("old", b"x", durable=True)
        await backend.write("small", b"x", durable=True)
        await backend.write("large", b"x" * 600_000, durable=True)
        await backend.copy("large", "copy", durable=True)
        await backend.discard("old", durable=True)
        own_postgres.kill9()
        own_postgres.start()
        for _ in range(20):  # the pool heals
            try:
                assert [info.key async for info in backend.list()] == ["copy", "large", "small", "warm"]
                break
            except BackendUnavailable:
                await asyncio.sleep(0.05)
        else:
            pytest.fail("the pool has not healed")


# -- a wrong set-up


async def refusal(make: Callable[[], Any], call: Any) -> Exception:
    """Return the error of a first call, made by hand and in a traceback as a user would see it."""
    with pytest.raises(ConfigurationError) as caught:
        backend = make()
        try:
            await call(backend)
        finally:
            await backend.aclose()
    return caught.value


@both
@pytest.mark.asyncio
async def test_wrong_set_ups_name_the_way_out_and_no_password(
    own_postgres: PostgresServer, kind: type[Any], call: Any, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    connection = await asyncpg.connect(own_postgres.url)
    await connection.execute(f"CREATE ROLE {PASSWORD_ROLE} LOGIN PASSWORD 'right'")
    await connection.execute("CREATE ROLE nobody LOGIN; REVOKE CREATE ON SCHEMA public FROM PUBLIC")
    wrong = own_postgres.url_of("postgres", user=PASSWORD_ROLE, password=SECRET)
    missing = own_postgres.url_of("no_such_database", password=SECRET)
    cases: list[tuple[str, Callable[[], Any], str]] = [
        ("password", lambda: kind(wrong), "user with this password"),
        ("database", lambda: kind(missing), "createdb"),
        ("user", lambda: kind(own_postgres.url_of("postgres", user="no_such", password=SECRET)), "user"),
        ("scheme", lambda: kind(f"mysql://me:{PLAIN}@host/db"), "postgresql://"),
        ("quoting", lambda: kind(f"postgresql://me:{SECRET}@host/db"), "%"),
        ("at", lambda: kind(f"postgresql://me:{PLAIN}@part@host/db"), "%40"),
        ("number", lambda: kind(f"postgresql://me:123/{PLAIN}@host/db"), "%"),
        ("nothing", lambda: kind(), "dsn"),
        ("too much", lambda: kind("postgresql://host/db", pool=object()), "dsn"),
        ("unknown option", lambda: kind(own_postgres.url, connect_options={"no_such": 1}), "options"),
        ("no pool", lambda: kind(pool=object()), "function"),
        ("option", lambda: kind(own_postgres.url, connect_options={"ssl": PLAIN}), "options"),
        ("connections", lambda: kind(own_postgres.url, max_connections=0), "max_connections"),
        ("table of another", lambda: kind(own_postgres.url, table="foreign"), "another table"),
    ]
    await connection.execute('CREATE TABLE "foreign" (x integer)')
    await connection.close()
    for name, make, way_out in cases:
        error = await refusal(make, call)
        texts = [str(error), repr(error), "".join(traceback.format_exception(error))]
        assert way_out in str(error), (name, str(error))
        for text in texts:
            assert PLAIN not in text, (name, text)
    for text in (str(kind(wrong)), repr(kind(wrong))):
        assert PLAIN not in text
    assert PLAIN not in caplog.text
    with pytest.raises(AccessDenied, match="GRANT"):
        async with kind(own_postgres.url_of("postgres", user="nobody")) as backend:
            await call(backend)


@both
@pytest.mark.asyncio
async def test_a_missing_table_that_may_not_be_made(own_postgres: PostgresServer, kind: type[Any], call: Any) -> None:
    async with kind(own_postgres.url) as backend:
        await call(backend)
        connection = await asyncpg.connect(own_postgres.url)
        for name in ("aproxy_files", "aproxy_objects", "aproxy_objects_chunks"):
            await connection.execute(f"DROP TABLE IF EXISTS {name}")
        await connection.close()
        with pytest.raises(ConfigurationError, match="setup"):
            await call(backend)


@both
@pytest.mark.asyncio
async def test_nobody_answers(kind: type[Any], call: Any) -> None:
    backend = kind("postgresql://127.0.0.1:1/x")
    with pytest.raises(BackendUnavailable) as caught:
        await call(backend)
    assert not caught.value.outcome_unknown
    assert caught.value.retryable
    await backend.aclose()


@pytest.mark.parametrize("module", ["backends.postgres", "meta_backends.postgres"])
def test_a_missing_driver_names_the_pip_line(module: str) -> None:
    script = f"""
import sys
sys.modules["asyncpg"] = None
from aproxy_storage import MissingDependency
try:
    import aproxy_storage.{module}
except MissingDependency as error:
    assert isinstance(error, ImportError)
    print(error)
"""
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert "pip install 'aproxy-storage[postgres]'" in done.stdout, done.stderr


# -- URLs


@pytest.mark.asyncio
async def test_urls(postgres_url: str, postgres_table: str, postgres_behind: asyncpg.Connection) -> None:
    own = f"table={postgres_table}&timeouts.operation=7&max_connections=3"
    meta: MetaBackend = meta_backend_from_url(with_parameter(postgres_url, f"{own}&coalesce=false&durability=process"))
    original: Backend = original_from_url(
        with_parameter(postgres_url, f"{own}&timeouts.idle=none".replace("t_", "t_o"))
    )
    assert isinstance(meta, PostgresMetaBackend)
    assert isinstance(original, PostgresBackend)
    assert (meta.table, meta.coalesce, meta.timeouts.operation) == (postgres_table, False, 7.0)
    assert original.timeouts.idle is None
    async with ProxyStorage("media", originals=original, meta=meta) as storage:
        path = await storage.save("a.txt", b"hello")
        async with storage.open(path) as file:
            assert await file.read() == b"hello"
        assert original.full_path(path).endswith(f"{original.table}/a.txt")
    await postgres_behind.execute(f'DROP TABLE "{original.table}", "{original.table}_chunks"')


def test_the_command_line(own_postgres: PostgresServer, tmp_path: Path) -> None:
    url = own_postgres.url
    (tmp_path / "aproxy.toml").write_text(f'[storages.media]\noriginals = "{url}"\nmeta = "{url}"\n')
    (tmp_path / "hello.txt").write_text("hello\n")
    written = ""
    for arguments in (["put", "hello.txt"], ["cat", "hello.txt"], ["verify"], ["reconcile"]):
        command = [sys.executable, "-W", "error", "-m", "aproxy_storage", *arguments]
        environment = {**os.environ, "PYTHONPATH": str(ROOT)}
        done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=60)
        assert done.returncode == 0, (arguments, done.stdout, done.stderr)
        written += done.stdout
    assert "hello" in written.split()


def test_wrong_urls() -> None:
    for cls in (PostgresMetaBackend, PostgresBackend):
        for url in (
            "postgresql://h/d?max_connections=x",
            "postgresql://h/d?table=a.b",
            "postgresql://h/d?timeouts.idle=-1",
        ):
            with pytest.raises(ConfigurationError):
                cls.from_url(url)
    with pytest.raises(ConfigurationError, match="durability"):
        PostgresMetaBackend.from_url("postgresql://h/d?durability=none")
