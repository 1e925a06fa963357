"""The backend of examples/custom_backend.py keeps every promise of the suite."""

import asyncio
import contextlib
import importlib.util
import sqlite3
import subprocess
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio

from aproxy_storage import Capabilities
from aproxy_storage.testing.backends import BackendTests

PROGRAM = Path(__file__).parents[2] / "examples" / "custom_backend.py"
_spec = importlib.util.spec_from_file_location("custom_backend", PROGRAM)
assert _spec is not None
assert _spec.loader is not None
example: Any = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(example)


class TestTableBackend(BackendTests):
    memory_bytes = None  # an object is in memory as a whole

    @pytest_asyncio.fixture
    async def backend(self, tmp_path: Path) -> AsyncIterator[Any]:
        async with example.TableBackend(tmp_path / "objects.sqlite3") as backend:
            yield backend

    async def behind(self, backend: Any, statement: str, *values: Any) -> list[Any]:
        def execute() -> list[Any]:
            with contextlib.closing(sqlite3.connect(backend.path, isolation_level=None, timeout=30)) as connection:
                connection.execute("CREATE TABLE IF NOT EXISTS objects (key TEXT PRIMARY KEY, data BLOB, token TEXT)")
                return connection.execute(statement, values).fetchall()

        return await asyncio.to_thread(execute)

    async def put_behind(self, backend: Any, key: str, data: bytes) -> None:
        await self.behind(backend, "INSERT INTO objects VALUES (?, ?, NULL)", key, data)

    async def get_behind(self, backend: Any, key: str) -> bytes | None:
        rows = await self.behind(backend, "SELECT data FROM objects WHERE key = ?", key)
        return rows[0][0] if rows else None

    async def list_behind(self, backend: Any) -> list[str]:
        return [key for (key,) in await self.behind(backend, "SELECT key FROM objects")]


def test_what_it_claims() -> None:
    claimed = Capabilities(conditional_create=True, range_read=True, list=True, tokens=True)
    assert example.TableBackend.capabilities == claimed


def test_its_url(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert example.TableBackend.from_url("table:o.sqlite3").path == str(tmp_path / "o.sqlite3")


def test_the_program(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-W", "error", PROGRAM], cwd=tmp_path, capture_output=True, text=True, timeout=60
    )
    assert (done.returncode, done.stdout) == (0, "hello.txt b'Hello from a table'\n"), done.stderr
