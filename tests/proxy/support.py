"""What the tests of `ProxyStorage` share: storages, what lies on the disk, and other processes."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import sqlite3
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

from aproxy_storage import ProxyStorage
from aproxy_storage.backends.filesystem import FileSystemBackend
from aproxy_storage.meta_backends.sqlite import SQLiteMetaBackend
from aproxy_storage.tools.reconcile import reconcile

REPOSITORY = Path(__file__).parents[2]
SAFETY = 60  # seconds after which a test that hangs fails


def storage_in(
    directory: Path,
    *further: str,
    original: FileSystemBackend | None = None,
    meta: SQLiteMetaBackend | None = None,
    **options: Any,
) -> ProxyStorage:
    """Return a storage with its files in ``directory/files`` and its records in ``directory/meta.sqlite3``.

    `further`: names of originals in the same directory.
    """
    originals = {"fs": original or FileSystemBackend(directory / "files")}
    return ProxyStorage(
        "media",
        originals=originals | {name: FileSystemBackend(directory / "files") for name in further},
        meta=meta or SQLiteMetaBackend(directory / "meta.sqlite3"),
        **options,
    )


def on_disk(directory: Path) -> dict[str, bytes]:
    """Return every file below ``directory/files``, temporaries included, with its content."""
    root = directory / "files"
    return {str(path.relative_to(root)): path.read_bytes() for path in root.rglob("*") if path.is_file()}


async def contents(storage: ProxyStorage) -> dict[str, bytes]:
    """Read every file of `storage`, each compared with its checksum."""
    found = {}
    async for record in storage.list():
        async with storage.open(record, verify=True) as file:
            found[record.path] = await file.read()
    return found


async def assert_sound(directory: Path, *further: str, **options: Any) -> dict[str, bytes]:
    """Reconcile by force (nothing else may be alive), and hold that nothing is left over; return all contents.

    `further`: names of originals in the same directory.

    Nothing lost: every stored file can be read and has its checksum. Nothing untracked: what is on the disk is
    exactly what the records name. The database is whole.
    """
    async with storage_in(directory, *further, **options) as storage:
        report = await reconcile(storage, dry_run=False, force=True)
        assert report.counts.get("failed", 0) == 0, report.findings
        assert (await reconcile(storage, dry_run=True, force=True)).counts == {}
        found = await contents(storage)
        named = [record.original_storage_path async for record in storage.list()]
        assert await storage.meta.count() == len(found), "records that nobody can see are left"
    assert len(named) == len(set(named)), "two records name the same bytes"
    assert sorted(on_disk(directory)) == sorted(named)
    with contextlib.closing(sqlite3.connect(directory / "meta.sqlite3")) as connection:
        assert connection.execute("PRAGMA integrity_check").fetchall() == [("ok",)]
    return found


class Process:
    """Another process that runs one function of `tests.proxy.processes`; JSON lines go in both directions."""

    def __init__(self, process: asyncio.subprocess.Process, name: str) -> None:
        self._process = process
        self.name = name
        self.pid = process.pid

    async def tell(self, message: Any) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(message).encode() + b"\n")
        await self._process.stdin.drain()

    async def hear(self) -> Any:
        assert self._process.stdout is not None
        line = await self._process.stdout.readline()
        if not line:
            _, errors = await self._process.communicate()
            raise AssertionError(f"process {self.name!r} ended with {self._process.returncode}:\n{errors.decode()}")
        return json.loads(line)

    async def expect(self, message: Any) -> None:
        heard = await self.hear()
        assert heard == message, f"process {self.name!r} said {heard!r}, not {message!r}"

    async def end(self) -> str:
        """Wait for a clean end; return what was written to stderr."""
        _, errors = await self._process.communicate()
        assert self._process.returncode == 0, f"{self.name!r} ended with {self._process.returncode}:\n{errors.decode()}"
        return errors.decode()

    async def kill(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            self._process.kill()
        await self._process.communicate()


@contextlib.asynccontextmanager
async def process(function: str, directory: Path, /, **arguments: Any) -> AsyncIterator[Process]:
    """Run ``tests.proxy.processes.<function>(directory, **arguments)`` in a process, with warnings as errors."""
    started = await asyncio.create_subprocess_exec(
        sys.executable,
        *("-X", "dev", "-W", "error"),
        # Python 3.12 warns of every fork beside threads; that this one survives it is what is tested here.
        *("-W", "ignore:This process:DeprecationWarning"),
        *("-m", "tests.proxy.processes", function, str(directory), json.dumps(arguments)),
        cwd=REPOSITORY,
        env={**os.environ, "PYTHONPATH": str(REPOSITORY)},
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    other = Process(started, function)
    try:
        yield other
    finally:
        if started.returncode is None:
            await other.kill()
