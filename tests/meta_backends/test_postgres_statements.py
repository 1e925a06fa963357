"""What `PostgresMetaBackend` sends to the server: together, apart, through the indexes, and into which table."""

from __future__ import annotations

import asyncio
import re
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import asyncpg
import pytest
import pytest_asyncio

from aproxy_storage.errors import AlreadyExists, ConfigurationError, DeadlineExceeded, NotSupported, StorageError
from aproxy_storage.leases import Leases
from aproxy_storage.meta_backends import _postgres_sql
from aproxy_storage.meta_backends.postgres import PostgresMetaBackend
from aproxy_storage.records import DELETING, PENDING, STORED, MetaRecord, Place, Revision
from aproxy_storage.testing.meta_backends import make_record, make_reservation

ROOT = Path(__file__).parents[2]

pytestmark = pytest.mark.asyncio


@pytest_asyncio.fixture
async def meta(
    postgres_url: str, postgres_table: str, postgres_behind: asyncpg.Connection
) -> AsyncIterator[PostgresMetaBackend]:
    async with PostgresMetaBackend(postgres_url, table=postgres_table) as meta:
        yield meta


async def statements(meta: PostgresMetaBackend, monkeypatch: pytest.MonkeyPatch, work: Any) -> list[str]:
    """Return the texts that `work` sends."""
    texts: list[str] = []
    for name in ("fetch", "fetchrow", "fetchval"):
        inner = getattr(asyncpg.Connection, name)

        async def spy(connection: Any, text: str, *values: Any, inner: Any = inner, **options: Any) -> Any:
            texts.append(text)
            return await inner(connection, text, *values, **options)

        monkeypatch.setattr(asyncpg.Connection, name, spy)
    await work
    return texts


# -- together


async def test_what_many_tasks_ask_for_at_once_is_one_statement(
    meta: PostgresMetaBackend, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def work() -> None:
        records = [make_record(f"{number:03}") for number in range(64)]
        made = await asyncio.gather(*map(meta.create, records))
        await asyncio.gather(*(meta.get(record.path) for record in made))
        await asyncio.gather(*(meta.exists(record.path) for record in made))
        changes = {"state": STORED, "version": 1}
        made = await asyncio.gather(*(meta.update(r.path, changes, expect=r.revision, lease=5.0) for r in made))
        await asyncio.gather(*(meta.delete(record.path, expect=record.revision) for record in made))

    texts = await statements(meta, monkeypatch, work())
    # The first of each kind goes at once, and alone; all the others share a statement.
    assert len(texts) == 2 * 5, texts


async def test_who_is_alone_waits_for_nobody(meta: PostgresMetaBackend, monkeypatch: pytest.MonkeyPatch) -> None:
    async def work() -> None:
        for number in range(5):
            await meta.create(make_record(str(number)))

    assert await statements(meta, monkeypatch, work()) == [meta._sql.insert] * 5


async def test_coalescing_can_be_turned_off(
    postgres_url: str,
    postgres_table: str,
    postgres_behind: asyncpg.Connection,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async with PostgresMetaBackend(postgres_url, table=postgres_table, coalesce=False) as meta:
        work = asyncio.gather(*(meta.create(make_record(str(number))) for number in range(20)))
        assert await statements(meta, monkeypatch, work) == [meta._sql.insert] * 20


async def test_changes_of_one_record_do_not_share_a_statement(meta: PostgresMetaBackend) -> None:
    await meta.create(make_record("a", token="t"))
    answers = await asyncio.gather(*(meta.update("a", {"size": number}) for number in range(100)))
    assert sorted(record.size or 0 for record in answers) == list(range(100))


async def test_a_cancelled_caller_takes_nobody_along(meta: PostgresMetaBackend) -> None:
    tasks = [asyncio.ensure_future(meta.create(make_record(f"{number:02}"))) for number in range(60)]
    await asyncio.sleep(0)  # they have asked
    for task in tasks[::3]:
        task.cancel()
    answers = await asyncio.gather(*tasks, return_exceptions=True)
    kept = [f"{number:02}" for number in range(60) if number % 3]
    assert [answer.path for answer in answers if isinstance(answer, MetaRecord)] == kept
    assert sum(isinstance(answer, asyncio.CancelledError) for answer in answers) == 20
    assert {record.path async for record in meta.list()} >= set(kept)


# -- apart


async def test_a_failing_row_fails_itself_alone(meta: PostgresMetaBackend, postgres_behind: asyncpg.Connection) -> None:
    await postgres_behind.execute(f"""ALTER TABLE "{meta.table}" ADD CONSTRAINT no_evil CHECK (path NOT LIKE '%7')""")
    expected = [f"{number:02}" for number in range(50) if number % 10 != 7]
    records = [make_record(f"{number:02}") for number in range(50)]
    for attempt in ("at once", "in one call"):
        if attempt == "at once":
            answers: Any = await asyncio.gather(*map(meta.create, records), return_exceptions=True)
        else:
            answers = await meta.create_many(records)
        failed = [number for number, answer in enumerate(answers) if not isinstance(answer, MetaRecord)]
        assert failed == [7, 17, 27, 37, 47]
        for number in failed:
            answer = answers[number]
            assert isinstance(answer, NotSupported), repr(answer)
            assert not answer.outcome_unknown
            assert (answer.path, answer.backend) == (f"{number:02}", str(meta))
        assert [record.path async for record in meta.list()] == expected
        await postgres_behind.execute(f'DELETE FROM "{meta.table}"')


async def test_values_that_cannot_be_kept_fail_alone(meta: PostgresMetaBackend) -> None:
    good = [make_record(f"good{number}") for number in range(10)]
    evil = [
        make_record("nul", extra={"x": "a\0b"}),
        make_record("surrogate", extra={"x": "\ud800"}),
        make_record("name", name="a\0b"),
        make_record("key", original_storage_path="\ud800"),
        make_record("size", size=2**70),
    ]
    answers = await asyncio.gather(*map(meta.create, [*good, *evil]), return_exceptions=True)
    assert [type(answer) for answer in answers] == [MetaRecord] * 10 + [NotSupported] * 5
    await meta.delete_many([(record.path, None) for record in good])
    answers = list(await meta.create_many([*good, *evil]))
    assert [type(answer) for answer in answers] == [MetaRecord] * 10 + [NotSupported] * 5
    changes = [meta.update(f"good{number}", {"size": 2**70 if number == 3 else number}) for number in range(10)]
    changed = await asyncio.gather(*changes, return_exceptions=True)
    assert [isinstance(answer, StorageError) for answer in changed] == [number == 3 for number in range(10)]


async def test_rows_that_a_transaction_holds_keep_only_their_own_waiting(
    postgres_url: str,
    postgres_table: str,
    postgres_behind: asyncpg.Connection,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(_postgres_sql, "_HURRY", _postgres_sql._HURRY.replace("500ms", "50ms"))
    async with PostgresMetaBackend(postgres_url, table=postgres_table, max_connections=4) as meta:
        await meta.create_many([make_record(f"{number:02}") for number in range(30)])
        transaction = postgres_behind.transaction()
        await transaction.start()
        await postgres_behind.execute(f"""INSERT INTO "{meta.table}" (path) VALUES ('held')""")
        await postgres_behind.execute(f"""UPDATE "{meta.table}" SET size = 1 WHERE path BETWEEN '15' AND '19'""")
        held = asyncio.ensure_future(meta.create(make_record("held")))
        creates = [held, *(asyncio.ensure_future(meta.create(make_record(f"new{number}"))) for number in range(30))]
        updates = [asyncio.ensure_future(meta.update(f"{number:02}", {"size": 2})) for number in range(30)]
        waiting = {held, *updates[15:20]}  # more than there are connections
        await asyncio.wait({*creates, *updates} - waiting, timeout=20)
        assert {task for task in (*creates, *updates) if not task.done()} == waiting
        assert await meta.exists("held") is False
        await transaction.rollback()
        assert (await held).path == "held"
        assert {record.size for record in await asyncio.gather(*updates)} == {2}


@pytest.mark.parametrize("coalesce", [True, False])
async def test_single_calls_wait_for_held_rows_without_a_connection(
    postgres_url: str,
    postgres_table: str,
    postgres_behind: asyncpg.Connection,
    monkeypatch: pytest.MonkeyPatch,
    coalesce: bool,
) -> None:
    monkeypatch.setattr(_postgres_sql, "_HURRY", _postgres_sql._HURRY.replace("500ms", "10ms"))
    tried: list[str] = []
    async with PostgresMetaBackend(postgres_url, table=postgres_table, max_connections=2, coalesce=coalesce) as meta:
        await meta.create_many([make_record(path, token="t") for path in ("a", "b", "c", "d", "e", "free")])
        inner = meta._coalescer._held
        meta._coalescer._held = lambda error: inner(error) and not tried.append(str(error))
        transaction = postgres_behind.transaction()
        await transaction.start()
        await postgres_behind.execute(f"""INSERT INTO "{meta.table}" (path) VALUES ('new'), ('newer')""")
        await postgres_behind.execute(f"""SELECT FROM "{meta.table}" WHERE path < 'f' FOR UPDATE""")
        reservation, spare = make_reservation("newer")
        waiting = [
            asyncio.ensure_future(call)
            for call in (
                meta.create(make_record("new")),
                meta.reserve(reservation, lease=60.0, spare=spare),
                meta.update("a", {"size": 2}),
                meta.update("b", {"size": 2}, expect=Revision("t", 0)),
                meta.delete("c"),
                meta.delete("d", expect=Revision("t", 0)),
                meta.update_many([("e", {"size": 2}, None)]),
            )
        ]
        async with asyncio.timeout(20):
            while len(tried) < 3 * len(waiting):
                assert await meta.exists("free")
        assert not any(task.done() for task in waiting)
        await transaction.rollback()
        new, newer, *changed = await asyncio.gather(*waiting)
        assert (new.path, newer.path) == ("new", "newer")
        assert [one.size for one in (*changed[:2], *changed[-1])] == [2, 2, 2]
        assert [record.path async for record in meta.list()] == ["a", "b", "e", "free", "new", "newer"]


async def test_a_lease_is_renewed_beside_rows_that_a_transaction_holds(
    meta: PostgresMetaBackend, postgres_behind: asyncpg.Connection
) -> None:
    made = [await meta.create(make_record(path, token=path), lease=20.0) for path in ("free", "held", "gone")]
    await meta.delete("gone")
    leases = Leases(meta, meta.cleanup, 60.0)
    free, held, gone = (leases.hold(record, since=-100.0) for record in made)
    transaction = postgres_behind.transaction()
    await transaction.start()
    await postgres_behind.execute(f"""SELECT FROM "{meta.table}" WHERE path = 'held' FOR UPDATE""")
    async with asyncio.timeout(10):
        await leases._renew([free, held, gone])
    assert (free.since > 0, held.since, gone.since) == (True, -100.0, -100.0)
    before, after = made[0].lease, (await meta.get("free")).lease
    assert before is not None
    assert after is not None
    assert 30 < (after - before).total_seconds() < 60
    await transaction.rollback()
    await leases._renew([held])
    assert held.since > 0
    assert (await meta.get("held")).revision == made[1].revision


async def test_one_that_goes_alone_after_company_is_as_one_alone(
    meta: PostgresMetaBackend, postgres_behind: asyncpg.Connection
) -> None:
    await meta.create_many([make_record(path) for path in ("a", "b", "taken")])
    first, second = await asyncio.gather(
        meta.update("a", {"path": "c"}), meta.update("b", {"path": "taken"}), return_exceptions=True
    )
    assert isinstance(first, MetaRecord)
    assert isinstance(second, AlreadyExists)


async def test_a_unique_index_of_another_column_is_not_a_taken_path(
    meta: PostgresMetaBackend, postgres_behind: asyncpg.Connection
) -> None:
    await meta.create_many([make_record(path, name=path) for path in ("a", "b")])
    await postgres_behind.execute(f'CREATE UNIQUE INDEX ON "{meta.table}" (name)')
    with pytest.raises(NotSupported, match="_name_idx"):
        await meta.update("a", {"path": "c", "name": "b"})
    with pytest.raises(AlreadyExists, match="'b'"):
        await meta.update("a", {"path": "b"})


async def test_what_was_inserted_is_answered_though_the_look_at_the_others_fails(
    meta: PostgresMetaBackend, monkeypatch: pytest.MonkeyPatch
) -> None:
    await meta.create(make_record("taken"))
    inner = asyncpg.Connection.fetch

    async def fetch(connection: Any, text: str, *values: Any, **options: Any) -> Any:
        if text == meta._sql.get_many:
            raise asyncpg.QueryCanceledError("statement timeout")
        return await inner(connection, text, *values, **options)

    monkeypatch.setattr(asyncpg.Connection, "fetch", fetch)
    answers = await meta.create_many([make_record(path) for path in ("a", "taken", "b")])
    assert [type(answer) for answer in answers] == [MetaRecord, DeadlineExceeded, MetaRecord]
    assert answers[1].path == "taken"


@pytest.mark.parametrize("company", [0, 3])
async def test_a_trigger_that_swallows_rows_is_named(
    meta: PostgresMetaBackend, postgres_behind: asyncpg.Connection, company: int
) -> None:
    await meta.create(make_record("there"))
    await postgres_behind.execute(f"""
        CREATE FUNCTION {meta.table}() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN RETURN NULL; END $$;
        CREATE TRIGGER swallow BEFORE INSERT ON "{meta.table}" FOR EACH ROW WHEN (NEW.path LIKE 'x%')
            EXECUTE FUNCTION {meta.table}()""")
    try:
        reservation, spare = make_reservation("x")
        others = [meta.create(make_record(f"x{number}")) for number in range(company)]
        others += [meta.create(make_record(f"good{number}")) for number in range(company)]
        answers = await asyncio.gather(
            meta.create(make_record("xy")),
            meta.reserve(reservation, lease=60.0, spare=spare),
            *others,
            return_exceptions=True,
        )
        for answer in answers[: 2 + company]:
            assert isinstance(answer, NotSupported), repr(answer)
            assert "trigger" in str(answer)
        assert all(isinstance(answer, MetaRecord) for answer in answers[2 + company :])
        assert isinstance((await meta.create_many([make_record("xz")]))[0], NotSupported)
    finally:
        await postgres_behind.execute(f"DROP FUNCTION {meta.table} CASCADE")


# -- reserve


@pytest.mark.parametrize("company", [0, 5])
async def test_a_record_renamed_while_its_path_is_waited_for_keeps_its_key(
    meta: PostgresMetaBackend,
    postgres_behind: asyncpg.Connection,
    company: int,
) -> None:
    await meta.create(make_record("old"))
    transaction = postgres_behind.transaction()
    await transaction.start()
    await postgres_behind.execute(f"""UPDATE "{meta.table}" SET path = 'new' WHERE path = 'old'""")
    reservations = [make_reservation(path) for path in ("old", *(f"other{number}" for number in range(company)))]
    tasks = [asyncio.ensure_future(meta.reserve(one, lease=60.0, spare=spare)) for one, spare in reservations]
    await asyncio.sleep(0.1)
    assert not tasks[0].done()
    await transaction.commit()
    reserved = await asyncio.gather(*tasks)
    wanted = [spare if record.path == "old" else record for record, spare in reservations]
    assert [one and one.original_storage_path for one in reserved] == [one.original_storage_path for one in wanted]
    assert await meta.owners("fs", ["old"]) == {"old": ["new"]}


# -- indexes


async def test_every_statement_has_its_index(meta: PostgresMetaBackend, postgres_behind: asyncpg.Connection) -> None:
    records = [
        make_record(f"{number:05}", state=PENDING if number % 1000 == 0 else STORED, extra={"n": number})
        for number in range(12_000)
    ]
    await meta.create_many(records)
    await meta.create_many(
        [make_record(f"renamed{n}", original_storage_path=f"k{n}", places=(Place("s3", f"p{n}"),)) for n in range(50)]
    )
    await postgres_behind.execute(f'ANALYZE "{meta.table}"')
    sql = meta._sql
    keys = [f"{number:05}" for number in range(0, 5000, 100)]
    calls: list[tuple[Any, ...]] = [
        (sql.get, "00001"),
        (sql.get_many, keys),
        (sql.exists_many, keys),
        (sql.page(inclusive=True, bounded=True), "00", "media", STORED, 500, "01"),
        (sql.page(inclusive=False, bounded=False), "05000", "media", STORED, 500),
        (sql.unfinished(after=False), "media", False, 0.0, 500),
        (sql.unfinished(after=True), "media", False, 0.0, 500, "05"),
        (sql.owners, keys, "fs"),
        (sql.owners, keys, None),
        (sql.update(("size",), expecting=True, many=True), keys, [""] * 50, [0] * 50, [1] * 50),
        (sql.renew_many, keys, [""] * 50, [0] * 50, [60.0] * 50),
        (sql.delete_many, keys, [None] * 50, [None] * 50),
    ]
    record, spare = make_reservation("k1")
    new = meta._new(record, 60.0, spare)
    place = ([new.path], ["fs"], ["k1"])
    calls.append((sql.reserve, *([value] for value in new.values), [new.spare[3]], [new.spare[7]], *place))
    for text, *values in calls:
        plan = "\n".join(row[0] for row in await postgres_behind.fetch(f"EXPLAIN {text}", *values))
        assert "Seq Scan" not in plan, f"{text}\n{plan}"


# -- the table


async def test_setup_under_a_race(postgres_url: str, postgres_table: str, postgres_behind: asyncpg.Connection) -> None:
    metas = [PostgresMetaBackend(postgres_url, table=postgres_table, schema=f"S_{postgres_table}") for _ in range(8)]
    try:
        await asyncio.gather(*(meta.setup() for meta in metas))
        await asyncio.gather(*(meta.create(make_record(str(number))) for number, meta in enumerate(metas)))
        assert await metas[0].count() == 8
        assert str(metas[0]).endswith(f"S_{postgres_table}.{postgres_table})")
    finally:
        for meta in metas:
            await meta.aclose()
        await postgres_behind.execute(f'DROP SCHEMA "S_{postgres_table}" CASCADE')


async def test_a_newer_table_is_refused(meta: PostgresMetaBackend, postgres_behind: asyncpg.Connection) -> None:
    await postgres_behind.execute(f"""COMMENT ON TABLE "{meta.table}" IS 'aproxy-storage schema 99'""")
    with pytest.raises(ConfigurationError, match="99"):
        await meta.setup()


async def test_a_table_of_another_program(
    postgres_url: str,
    postgres_table: str,
    postgres_behind: asyncpg.Connection,
) -> None:
    """As Django makes it: an id, the database's own collation, and no more columns than it knows."""
    await postgres_behind.execute(
        f'CREATE TABLE "{postgres_table}" (id serial PRIMARY KEY, path varchar(255) NOT NULL UNIQUE, '
        "proxy_storage_name varchar(50) NOT NULL, original_storage_path varchar(255) NOT NULL)"
    )
    await postgres_behind.execute(f"""INSERT INTO "{postgres_table}" VALUES (1, 'old.txt', 'media', '/srv/old.txt')""")
    meta = PostgresMetaBackend(postgres_url, table=postgres_table)
    with pytest.raises(ConfigurationError, match=r"lacks the columns .*state.*docs/postgres\.md"):
        await meta.setup()
    page = (ROOT / "docs" / "postgres.md").read_text()
    (migration,) = re.findall(r"```sql\n(ALTER TABLE media_file.*?)```", page, re.DOTALL)
    await postgres_behind.execute(migration.replace("media_file", f'"{postgres_table}"'))
    async with meta:
        record = await meta.get("old.txt")
        assert (record.state, record.version, record.original_storage_path) == (STORED, 0, "/srv/old.txt")
        await meta.create_many([make_record(path) for path in ("Z", "a-b", "ab", "a b", "é")])
        assert [record.path async for record in meta.list()] == ["Z", "a b", "a-b", "ab", "old.txt", "é"]
        assert (await meta.update("old.txt", {"version": 1}, expect=record.revision)).version == 1
        await postgres_behind.execute("SET enable_seqscan = off; SET enable_sort = off")
        page = meta._sql.page(inclusive=True, bounded=False)
        plan = await postgres_behind.fetch(f"EXPLAIN {page}", "a", None, None, 10)
        assert f"{postgres_table}_order" in str(plan), plan


async def test_an_index_that_is_not_valid_is_named(
    meta: PostgresMetaBackend, postgres_behind: asyncpg.Connection
) -> None:
    """As CREATE INDEX CONCURRENTLY leaves it when it fails."""
    index = f"{meta.table}_unfinished"
    await postgres_behind.execute(
        f"""UPDATE pg_index SET indisvalid = false WHERE indexrelid = '"{index}"'::regclass"""
    )
    with pytest.raises(ConfigurationError, match=f'DROP INDEX "{index}"'):
        await meta.setup()
    await postgres_behind.execute(f'DROP INDEX "{index}"')
    await meta.setup()


async def test_names_are_checked() -> None:
    for options in ({"table": 'x"; DROP TABLE y'}, {"table": ""}, {"schema": "a.b"}, {"table": "x" * 64}):
        with pytest.raises(ConfigurationError):
            PostgresMetaBackend("postgresql://host/db", **options)


async def test_long_table_names_have_indexes_of_their_own(
    postgres_url: str,
    postgres_behind: asyncpg.Connection,
    postgres_table: str,
) -> None:
    name = (postgres_table + "x" * 63)[:63]
    async with PostgresMetaBackend(postgres_url, table=name) as meta:
        found = await postgres_behind.fetchval("SELECT count(*) FROM pg_indexes WHERE tablename = $1", name)
        assert found == 1 + len(_postgres_sql.Statements(name, None).create_indexes)
        await meta.setup()
    await postgres_behind.execute(f'DROP TABLE "{name}"')


async def test_a_table_that_was_dropped_is_made_again(
    meta: PostgresMetaBackend, postgres_behind: asyncpg.Connection
) -> None:
    await meta.create(make_record("a", state=DELETING))
    await postgres_behind.execute(f'DROP TABLE "{meta.table}"')
    with pytest.raises(ConfigurationError, match="setup"):
        await meta.get("a")
    await meta.setup()
    await meta.create(make_record("a"))
    with pytest.raises(AlreadyExists):
        await meta.create(make_record("a"))
