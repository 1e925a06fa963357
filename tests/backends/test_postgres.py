"""`PostgresBackend` against the suite, and what only PostgreSQL can do or suffer."""

from __future__ import annotations

from collections.abc import AsyncIterator

import asyncpg
import pytest_asyncio

from aproxy_storage.backends.postgres import PostgresBackend
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
