"""`PostgresMetaBackend` against the suite, and what only PostgreSQL can do or suffer."""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping, Sequence
from typing import Any

import asyncpg
import pytest_asyncio

from aproxy_storage.meta_backends.postgres import PostgresMetaBackend
from aproxy_storage.testing.meta_backends import MetaBackendTests

NOW = "extract(epoch FROM clock_timestamp())"


class PostgresTests(MetaBackendTests):
    extra_keeps_nul = False
    behind: asyncpg.Connection

    @pytest_asyncio.fixture(autouse=True)
    async def look_behind(self, postgres_behind: asyncpg.Connection) -> None:
        self.behind = postgres_behind

    async def row_behind(self, meta: PostgresMetaBackend, path: str) -> Mapping[str, Any] | None:
        row = await self.behind.fetchrow(f'SELECT * FROM "{meta.table}" WHERE path = $1', path)
        return None if row is None else dict(row)

    async def rows_behind(self, meta: PostgresMetaBackend) -> Sequence[Mapping[str, Any]]:
        return [dict(row) for row in await self.behind.fetch(f'SELECT * FROM "{meta.table}"')]

    async def insert_behind(self, meta: PostgresMetaBackend, **columns: Any) -> None:
        marks = ", ".join(f"${number + 1}" for number in range(len(columns)))
        text = f'INSERT INTO "{meta.table}" ({", ".join(columns)}) VALUES ({marks})'
        await self.behind.execute(text, *columns.values())

    async def expire_lease_behind(self, meta: PostgresMetaBackend, path: str, *, ago: float = 1.0) -> None:
        text = f'UPDATE "{meta.table}" SET lease = {NOW} - $2::float8 WHERE path = $1'
        await self.behind.execute(text, path, ago)


class TestPostgres(PostgresTests):
    @pytest_asyncio.fixture
    async def meta(self, postgres_url: str, postgres_table: str) -> AsyncIterator[PostgresMetaBackend]:
        async with PostgresMetaBackend(postgres_url, table=postgres_table) as meta:
            yield meta


class TestEachAlone(PostgresTests):
    """Without coalescing."""

    @pytest_asyncio.fixture
    async def meta(self, postgres_url: str, postgres_table: str) -> AsyncIterator[PostgresMetaBackend]:
        async with PostgresMetaBackend(postgres_url, table=postgres_table, coalesce=False) as meta:
            yield meta
