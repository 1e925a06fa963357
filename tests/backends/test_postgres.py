"""`PostgresBackend` against the suite, and what only PostgreSQL can do or suffer."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Coroutine

import asyncpg
import pytest
import pytest_asyncio

from aproxy_storage.backends import postgres
from aproxy_storage.backends.postgres import PostgresBackend
from aproxy_storage.errors import (
    AccessDenied,
    BackendUnavailable,
    ConfigurationError,
    IntegrityError,
    NotFound,
    outcome_unknown,
)
from aproxy_storage.futures import over
from aproxy_storage.records import Capabilities
from aproxy_storage.testing.backends import BackendTests

_FOREIGN_CHUNK = 100_000  # another length than ours


@pytest_asyncio.fixture
async def backend(
    postgres_url: str, postgres_table: str, postgres_behind: asyncpg.Connection
) -> AsyncIterator[PostgresBackend]:
    async with PostgresBackend(postgres_url, table=postgres_table) as backend:
        await backend.setup()
        yield backend


class TestPostgresBackend(BackendTests):
    behind: asyncpg.Connection

    @pytest_asyncio.fixture(autouse=True)
    async def look_behind(self, postgres_behind: asyncpg.Connection) -> None:
        self.behind = postgres_behind

    async def put_behind(self, backend: PostgresBackend, key: str, data: bytes) -> None:
        async with self.behind.transaction():
            number = await self.behind.fetchval(
                f'INSERT INTO "{backend.table}" (key, size, chunk_bytes) VALUES ($1, $2, $3) RETURNING id',
                key, len(data), _FOREIGN_CHUNK,
            )  # fmt: skip
            await self.behind.executemany(
                f'INSERT INTO "{backend.table}_chunks" VALUES ($1, $2, $3)',
                [
                    (number, at // _FOREIGN_CHUNK, data[at : at + _FOREIGN_CHUNK])
                    for at in range(0, len(data), _FOREIGN_CHUNK)
                ],
            )

    async def get_behind(self, backend: PostgresBackend, key: str) -> bytes | None:
        found = await self.behind.fetchrow(f'SELECT id, size FROM "{backend.table}" WHERE key = $1', key)
        if found is None:
            return None
        rows = await self.behind.fetch(
            f'SELECT number, data FROM "{backend.table}_chunks" WHERE object = $1 ORDER BY number', found["id"]
        )
        assert [row["number"] for row in rows] == list(range(len(rows)))
        data = b"".join(row["data"] for row in rows)
        assert len(data) == found["size"]
        return data

    async def list_behind(self, backend: PostgresBackend) -> list[str]:
        objects, chunks = f'"{backend.table}"', f'"{backend.table}_chunks"'
        keys = await self.behind.fetch(f"SELECT key FROM {objects}")
        orphans = await self.behind.fetch(
            f"SELECT DISTINCT object FROM {chunks} WHERE object NOT IN (SELECT id FROM {objects})"
        )
        return [*(row["key"] for row in keys), *(f"chunks of {row['object']}" for row in orphans)]


def test_capabilities() -> None:
    assert PostgresBackend.capabilities == Capabilities(
        conditional_create=True,
        range_read=True,
        list=True,
        modified_time=True,
        server_copy=True,
        metadata=True,
        content_type=True,
        tokens=True,
    )


BIG = bytes(range(256)) * 5000  # five chunks


@pytest.mark.asyncio
@pytest.mark.parametrize("number", [0, 3])
async def test_a_lost_chunk_is_damage(
    backend: PostgresBackend, postgres_behind: asyncpg.Connection, number: int
) -> None:
    await backend.write("key", BIG)
    await postgres_behind.execute(f'DELETE FROM "{backend.table}_chunks" WHERE number = $1', number)
    with pytest.raises(IntegrityError, match="key"):
        async with backend.read("key", chunk_bytes=1000) as reader:
            async for _ in reader:
                pass


@pytest.mark.asyncio
@pytest.mark.parametrize("borrowed", [False, True])
async def test_slow_uploads_leave_connections_to_others(
    postgres_url: str, postgres_table: str, postgres_behind: asyncpg.Connection, borrowed: bool
) -> None:
    release = asyncio.Event()

    async def slowly() -> AsyncIterator[bytes]:
        yield BIG
        await release.wait()
        yield b"end"

    async def under_way() -> int:
        text = "SELECT count(*) FROM pg_stat_activity WHERE xact_start IS NOT NULL AND application_name = $1"
        count: int = await postgres_behind.fetchval(text, postgres_table)
        return count

    url = f"{postgres_url}{'&' if '?' in postgres_url else '?'}application_name={postgres_table}"
    async with contextlib.AsyncExitStack() as stack:
        if borrowed:
            pool = await stack.enter_async_context(asyncpg.create_pool(url, min_size=0, max_size=4))
            backend = PostgresBackend(pool=pool, table=postgres_table)
        else:
            backend = PostgresBackend(url, table=postgres_table, max_connections=4)
        await stack.enter_async_context(backend)
        uploads = [asyncio.ensure_future(backend.write(f"slow{number}", slowly())) for number in range(6)]
        async with asyncio.timeout(30):
            while await under_way() < 2:  # noqa: ASYNC110  both that may be under way have begun
                await asyncio.sleep(0.01)
            await backend.write("quick", b"x")
            assert (await backend.stat("quick")).size == 1
            assert await under_way() == 2
            release.set()
            assert {info.size for info in await asyncio.gather(*uploads)} == {len(BIG) + 3}


@pytest.mark.asyncio
async def test_one_connection_is_too_few(postgres_url: str, postgres_table: str) -> None:
    """It would be an upload's for as long as the content takes, which may come over a connection too."""
    with pytest.raises(ConfigurationError, match="max_connections"):
        PostgresBackend(postgres_url, max_connections=1)
    async with asyncpg.create_pool(postgres_url, min_size=0, max_size=1) as pool:
        backend = PostgresBackend(pool=pool, table=postgres_table)
        with pytest.raises(ConfigurationError, match="max_size"):
            await backend.setup()


@pytest.mark.asyncio
@pytest.mark.parametrize("content", [b"small", BIG], ids=["small", "big"])
async def test_a_write_cancelled_at_its_end_knows_that_nothing_is_there(
    backend: PostgresBackend, monkeypatch: pytest.MonkeyPatch, content: bytes
) -> None:
    monkeypatch.setattr(postgres, "_PATIENCE", 60.0)  # that of a busy machine

    async def cancelled_meanwhile(deciding: asyncio.Task[object]) -> None:
        monkeypatch.setattr(postgres, "over", over)
        write.cancel()
        await over(deciding)

    monkeypatch.setattr(postgres, "over", cancelled_meanwhile)
    write = asyncio.ensure_future(backend.write("key", content))
    with pytest.raises(asyncio.CancelledError) as caught:
        await write
    assert outcome_unknown(caught.value) is False
    with pytest.raises(NotFound):
        await backend.stat("key")


@pytest.mark.asyncio
@pytest.mark.parametrize("moment", ["waiting", "amid", "copying", "cut off"])
async def test_before_its_commit_a_write_knows_that_nothing_is_there(
    backend: PostgresBackend, monkeypatch: pytest.MonkeyPatch, moment: str
) -> None:
    begun = asyncio.Event()

    async def hang(*args: object) -> None:
        begun.set()
        if moment == "cut off":
            raise ConnectionResetError
        await asyncio.Event().wait()

    async def content() -> AsyncIterator[bytes]:
        yield BIG
        await hang()

    if moment == "copying":
        await backend.write("key", BIG)
    if moment in ("copying", "cut off"):
        monkeypatch.setattr(backend, "_begin", hang)
    if moment == "waiting":  # until another upload has ended
        monkeypatch.setattr(backend._uploads.get(), "acquire", hang)
    source = BIG if moment in ("waiting", "cut off") else content()
    work = backend.copy("key", "new") if moment == "copying" else backend.write("new", source)
    task = asyncio.ensure_future(work)
    await begun.wait()
    if moment != "cut off":
        task.cancel()
    with pytest.raises((asyncio.CancelledError, BackendUnavailable)) as caught:
        await task
    assert outcome_unknown(caught.value) is False
    with pytest.raises(NotFound):
        await backend.stat("new")


@pytest.mark.asyncio
async def test_tables_of_others_and_of_tomorrow_are_refused(
    postgres_url: str, postgres_table: str, postgres_behind: asyncpg.Connection
) -> None:
    backends = [PostgresBackend(postgres_url, table=postgres_table) for _ in range(6)]
    await asyncio.gather(*(backend.setup() for backend in backends))
    for backend in backends:
        await backend.aclose()
    for comment, reason in (("aproxy-storage objects 99", "99"), ("my pictures", "another program")):
        await postgres_behind.execute(f"""COMMENT ON TABLE "{postgres_table}" IS '{comment}'""")
        with pytest.raises(ConfigurationError, match=reason):
            await backends[0].setup()
        await backends[0].aclose()
    with pytest.raises(ConfigurationError):
        PostgresBackend(postgres_url, table="x" * 60)  # there would be no room for _chunks


@pytest.mark.asyncio
async def test_a_write_that_aclose_cuts_short_is_no_cancellation(
    backend: PostgresBackend, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun = asyncio.Event()

    async def hang(work: Coroutine[object, object, object]) -> None:
        work.close()
        begun.set()
        await asyncio.Event().wait()

    monkeypatch.setattr(backend, "_in_time", hang)
    write = asyncio.ensure_future(backend.write("key", b"small"))
    await begun.wait()
    await backend.cleanup.drain(within=0.01)
    with pytest.raises(BackendUnavailable, match="closed") as caught:
        await write
    assert caught.value.outcome_unknown


@pytest.mark.asyncio
async def test_who_does_not_own_old_tables_is_sent_to_their_owner(
    backend: PostgresBackend, postgres_url: str, postgres_behind: asyncpg.Connection
) -> None:
    table, role = backend.table, f"{backend.table}_web".lower()
    await backend.setup()
    await postgres_behind.execute(f"""
        COMMENT ON TABLE "{table}" IS 'aproxy-storage objects 1'; DROP INDEX "{table}_id_key";
        CREATE ROLE "{role}"; GRANT SELECT, INSERT, UPDATE, DELETE ON "{table}", "{table}_chunks" TO "{role}";
        GRANT USAGE ON SEQUENCE "{table}_id_seq" TO "{role}"
        """)
    options = {"server_settings": {"role": role}}
    try:
        async with PostgresBackend(postgres_url, table=table, connect_options=options) as web:
            with pytest.raises(AccessDenied, match="owner await setup"):
                await web.stat("a")
            await backend.setup()
            await web.write("a", b"x")
            await web.write("b", BIG)
            await web.discard("a")
    finally:
        await postgres_behind.execute(f'DROP OWNED BY "{role}"; DROP ROLE "{role}"')


async def content_of(backend: PostgresBackend, key: str) -> bytes:
    async with backend.read(key) as reader:
        return b"".join([chunk async for chunk in reader])


async def set_back(backend: PostgresBackend, behind: asyncpg.Connection) -> None:
    """Make the sequence of ids begin again, as it does where only rows were restored or replicated."""
    await behind.execute(f"""SELECT setval(pg_get_serial_sequence('"{backend.table}"', 'id'), 1, false)""")


@pytest.mark.asyncio
async def test_an_id_that_is_in_use_is_never_given_again(
    backend: PostgresBackend, postgres_behind: asyncpg.Connection
) -> None:
    for key in ("a", "empty", "c"):
        await backend.write(key, b"" if key == "empty" else key.encode())
    await set_back(backend, postgres_behind)
    for content in (b"", b"x", BIG):
        with pytest.raises(ConfigurationError, match="ids") as caught:
            await backend.write("new", content)
        assert not caught.value.outcome_unknown
        await backend.discard("new")
    await set_back(backend, postgres_behind)
    await postgres_behind.execute(str(caught.value).partition("as its owner: ")[2])
    for number, content in enumerate((b"", b"x", BIG)):
        await backend.write(f"new{number}", content)
        assert await content_of(backend, f"new{number}") == content
        await backend.discard(f"new{number}")
    assert await content_of(backend, "a") == b"a"
    assert await content_of(backend, "c") == b"c"


@pytest.mark.asyncio
async def test_tables_of_version_1_get_unique_ids(
    backend: PostgresBackend, postgres_url: str, postgres_behind: asyncpg.Connection
) -> None:
    table = backend.table
    await backend.write("a", b"content of a")
    await postgres_behind.execute(f"""
        DROP INDEX IF EXISTS "{table}_id_key";
        COMMENT ON TABLE "{table}" IS 'aproxy-storage objects 1';
        INSERT INTO "{table}" (key, id, size, chunk_bytes)
            SELECT e.key, id, 0, 262144 FROM "{table}", (VALUES ('empty'), ('void')) AS e (key)""")
    await set_back(backend, postgres_behind)
    others = [PostgresBackend(postgres_url, table=table) for _ in range(3)]
    await asyncio.gather(*(other.setup() for other in others))
    for other in others:
        await other.aclose()
    await backend.discard("empty")
    await backend.write("new", b"")
    await backend.discard("new")
    assert await content_of(backend, "void") == b""
    assert await content_of(backend, "a") == b"content of a"
    unique = f"""SELECT count(*) = count(DISTINCT id) FROM "{table}" """
    assert await postgres_behind.fetchval(unique)
    await backend.setup()
