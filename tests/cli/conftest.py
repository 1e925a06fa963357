"""The command line in an empty directory: in this process where that will do, in one of its own where it must."""

import asyncio
import contextlib
import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from aproxy_storage import MetaRecord
from aproxy_storage.cli.app import app
from aproxy_storage.meta_backends.sqlite import SQLiteMetaBackend

REPOSITORY = Path(__file__).parents[2]
Run = Callable[..., "Done"]


@dataclass
class Done:
    """How a command ended, and what it wrote."""

    code: int
    out: str
    err: str

    @property
    def lines(self) -> list[str]:
        return self.out.splitlines()

    @property
    def rows(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in self.lines]


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Be in an empty directory, with no configuration and no terminal."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("APROXY_CONFIG", raising=False)
    for name in ("FORCE_COLOR", "TTY_COMPATIBLE", "PY_COLORS"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NO_COLOR", "1")
    monkeypatch.setenv("COLUMNS", "200")
    return tmp_path


@pytest.fixture
def run() -> Run:
    """Run ``aproxy …`` in this process; `code` is what the exit code must be."""

    def run(*args: object, code: int | None = 0) -> Done:
        result = CliRunner().invoke(app, [str(arg) for arg in args])
        if result.exception is not None and not isinstance(result.exception, SystemExit):
            raise result.exception
        done = Done(result.exit_code, result.stdout, result.stderr)
        assert code is None or done.code == code, done
        return done

    return run


def command(*args: object) -> list[str]:
    return [sys.executable, "-W", "error", "-m", "aproxy_storage", *map(str, args)]


def environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(REPOSITORY)}


@pytest.fixture
def run_process() -> Run:
    """Run ``aproxy …`` in a process of its own, with warnings as errors."""

    def run(*args: object, code: int | None = 0, **options: Any) -> Done:
        ended = subprocess.run(command(*args), env=environment(), capture_output=True, timeout=60, **options)
        done = Done(ended.returncode, ended.stdout.decode(), ended.stderr.decode())
        assert code is None or done.code == code, done
        return done

    return run


def tree(root: Path, **files: bytes) -> Path:
    """Make a directory with a few files of every depth, and `files`."""
    contents = {"a.txt": b"first", "b/c.txt": b"second", "b/d/e.bin": bytes(range(256)) * 300, "empty": b"", **files}
    for name, data in contents.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    return root


def contents(root: Path) -> dict[str, bytes]:
    """Return every file below `root`."""
    return {str(path.relative_to(root)): path.read_bytes() for path in root.rglob("*") if path.is_file()}


def stored(root: Path = Path("aproxy-data")) -> dict[str, bytes]:
    """Return what lies in the original of the storage that needs no configuration."""
    with contextlib.suppress(FileNotFoundError):
        return contents(root / "files")
    return {}


def leave_record(path: str, *, lease: float, root: Path = Path("aproxy-data"), **fields: Any) -> None:
    """Leave what a save leaves that died before its bytes were written; its lease ends in so many seconds."""
    record = MetaRecord(
        path=path,
        **{
            "proxy_storage_name": "default",
            "original_storage_name": "default",
            "original_storage_path": path,
            "state": "pending",
            "token": "abandoned",
            "version": 1,
            **fields,
        },
    )

    async def write() -> None:
        async with SQLiteMetaBackend(root / "records.sqlite3") as meta:
            await meta.create(record, lease=lease)

    asyncio.run(write())
