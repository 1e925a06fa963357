"""`PostgresMetaBackend` against the suite, and what only PostgreSQL can do or suffer."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Mapping, Sequence
from typing import Any

import asyncpg
import pytest
import pytest_asyncio

from aproxy_storage.meta_backends.postgres import PostgresMetaBackend
from aproxy_storage.paths import new_token
from aproxy_storage.testing.meta_backends import MetaBackendTests

NOW = "extract(epoch FROM clock_timestamp())"


@pytest.fixture
def table() -> str:
    return f"t_{new_token()}"


@pytest_asyncio.fixture
async def behind(postgres_url: str, table: str) -> AsyncIterator[asyncpg.Connection]:
    """A connection of our own; the table is dropped at the end."""
    connection = await asyncpg.connect(postgres_url)
    yield connection
    await connection.execute(f'DROP TABLE IF EXISTS "{table}"')
    await connection.close()


class PostgresTests(MetaBackendTests):
    extra_keeps_nul = False
    behind: asyncpg.Connection

    @pytest_asyncio.fixture(autouse=True)
    async def look_behind(self, behind: asyncpg.Connection) -> None:
        self.behind = behind

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
    async def meta(self, postgres_url: str, table: str) -> AsyncIterator[PostgresMetaBackend]:
        async with PostgresMetaBackend(postgres_url, table=table) as meta:
            yield meta


class TestEachAlone(PostgresTests):
    """Without coalescing."""

    @pytest_asyncio.fixture
    async def meta(self, postgres_url: str, table: str) -> AsyncIterator[PostgresMetaBackend]:
        async with PostgresMetaBackend(postgres_url, table=table, coalesce=False) as meta:
            yield meta
