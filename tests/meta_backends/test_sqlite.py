"""`SQLiteMetaBackend` against the suite, and what only SQLite can do or suffer."""

from __future__ import annotations

import contextlib
import sqlite3
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest_asyncio

from aproxy_storage.meta_backends.sqlite import SQLiteMetaBackend
from aproxy_storage.testing.meta_backends import MetaBackendTests

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
