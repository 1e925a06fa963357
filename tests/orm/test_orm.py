"""`ORMMetaBackend` against the suite, on SQLite and PostgreSQL."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio
from asgiref.sync import sync_to_async
from django.db import connections

from aproxy_storage.meta_backends.orm import ORMMetaBackend
from aproxy_storage.records import MetaRecord, Place
from aproxy_storage.testing.meta_backends import MetaBackendTests, make_record, make_reservation
from tests.django_support.setup import postgres_settings

CLOCKS = {
    "sqlite": "(julianday('now') - 2440587.5) * 86400.0",
    "postgresql": "extract(epoch from clock_timestamp())",
}


class ORMTests(MetaBackendTests):
    @pytest_asyncio.fixture
    async def meta(self, database: str) -> AsyncIterator[ORMMetaBackend]:
        async with ORMMetaBackend("sync_bridge.StoredFile", using=database) as meta:
            yield meta

    async def fetch(self, meta: ORMMetaBackend, sql: str, values: Sequence[Any] = ()) -> list[dict[str, Any]]:
        def run() -> list[dict[str, Any]]:
            with connections[meta.using].cursor() as cursor:
                cursor.execute(sql, values)
                if cursor.description is None:
                    return []
                names = [column[0] for column in cursor.description]
                return [dict(zip(names, row, strict=True)) for row in cursor.fetchall()]

        return await sync_to_async(run)()

    async def row_behind(self, meta: ORMMetaBackend, path: str) -> Mapping[str, Any] | None:
        rows = await self.fetch(meta, "SELECT * FROM sync_bridge_storedfile WHERE path = %s", (path,))
        return rows[0] if rows else None

    async def rows_behind(self, meta: ORMMetaBackend) -> Sequence[Mapping[str, Any]]:
        return await self.fetch(meta, "SELECT * FROM sync_bridge_storedfile")

    async def insert_behind(self, meta: ORMMetaBackend, **columns: Any) -> None:
        marks = ", ".join(["%s"] * len(columns))
        await self.fetch(
            meta, f"INSERT INTO sync_bridge_storedfile ({', '.join(columns)}) VALUES ({marks})", list(columns.values())
        )

    async def expire_lease_behind(self, meta: ORMMetaBackend, path: str, *, ago: float = 1.0) -> None:
        clock = CLOCKS[connections[meta.using].vendor]
        await self.fetch(meta, f"UPDATE sync_bridge_storedfile SET lease = {clock} - %s WHERE path = %s", (ago, path))


class TestOnSQLite(ORMTests):
    @pytest.fixture
    def database(self, django_database: Path) -> str:
        return "default"


class TestOnPostgreSQL(ORMTests):
    extra_keeps_nul = False

    @pytest.fixture
    def database(self, postgres_database: str) -> str:
        return postgres_database


@pytest.mark.asyncio
async def test_values_that_are_bound_by_the_server(
    postgres_database: str, postgres_url: str, added: Callable[[dict[str, Any]], str]
) -> None:
    """PostgreSQL gets the values apart from the statements, and has to find their types."""
    options = f"-c search_path={postgres_database}"
    alias = added(postgres_settings(postgres_url, options=options, server_side_binding=True))
    async with ORMMetaBackend("sync_bridge.StoredFile", alias) as meta:
        made = await meta.create(make_record("a", extra={"x": [1.5, "é"], "field": "cv"}, size=2**40), lease=60)
        assert await meta.get("a") == made
        record, spare = make_reservation("b", places=(Place("s3", "k", "doubtful"),))
        assert await meta.reserve(record, lease=60.0, spare=spare) == await meta.get("b")
        changed = await meta.update("a", {"path": "c", "extra": {"y": 2}, "size": None}, lease=None)
        assert changed == await meta.get("c")
        assert (changed.lease, changed.extra) == (None, {"y": 2})
        assert all(
            isinstance(each, MetaRecord) for each in await meta.create_many([make_record("d"), make_record("e")])
        )
        assert [record.path async for record in meta.list("", after="b", proxy_storage_name="media")] == ["c", "d", "e"]
        assert [record.path for record in await meta.list_unfinished(force=True)] == ["b"]
        assert await meta.list_unfinished(older_than=5.0) == []
        assert await meta.owners("s3", ["k", "a"]) == {"k": ["b"]}
        assert await meta.count("c", state="stored") == 1
        assert await meta.delete_many([("d", None), ("e", None)]) == [None, None]
