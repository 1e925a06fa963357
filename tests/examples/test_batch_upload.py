"""The batch uploader stores all, once, goes on after an outage, and says what failed."""

import asyncio
import importlib.util
import os
import runpy
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from aproxy_storage import BackendUnavailable, ProxyStorage
from aproxy_storage.backends.memory import MemoryBackend
from aproxy_storage.meta_backends.memory import MemoryMetaBackend

ROOT = Path(__file__).parents[2]
PROGRAM = ROOT / "examples" / "batch_upload.py"
_spec = importlib.util.spec_from_file_location("batch_upload", PROGRAM)
assert _spec is not None
assert _spec.loader is not None
example: Any = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(example)


def run(cwd: Path, *args: object, code: int = 0) -> str:
    environment = {name: value for name, value in os.environ.items() if name != "APROXY_CONFIG"}
    done = subprocess.run(
        [sys.executable, "-W", "error", PROGRAM, *map(str, args)],
        cwd=cwd, env={**environment, "PYTHONPATH": str(ROOT)}, capture_output=True, timeout=60,
    )  # fmt: skip
    said = done.stderr.decode()  # as bytes: in text, a carriage return would be a new line
    assert done.returncode == code, said
    return said[said.rindex("\r") + 1 :]


def make_tree(root: Path, count: int) -> dict[str, bytes]:
    made = {}
    for number in range(count):
        path = root / f"{number % 7}" / f"{number}.txt"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"file {number}")
        made[f"{root.name}/{path.relative_to(root)}"] = path.read_bytes()
    return made


def test_a_tree_is_uploaded_once(tmp_path: Path) -> None:
    made = make_tree(tmp_path / "tree", 700)
    assert run(tmp_path, "tree") == "700 files stored, 0 failed\n"
    stored = tmp_path / "aproxy-data" / "files"
    assert {str(path.relative_to(stored)): path.read_bytes() for path in stored.rglob("*.txt")} == made
    (tmp_path / "tree" / "new.txt").write_text("new")
    assert run(tmp_path, "tree") == "1 files stored, 0 failed\n"


def test_what_cannot_be_listed_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_tree(tmp_path / "tree", 3)
    scandir = os.scandir

    def refuse(path: Any) -> Any:
        if str(path).endswith("/1"):
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refuse)
    failures: list[Any] = []
    found = [name for name, _ in example.files_below(tmp_path / "tree", failures.append)]
    assert found == ["tree/0/0.txt", "tree/2/2.txt"]
    assert [error.filename for error in failures] == [str(tmp_path / "tree" / "1")]


def test_what_is_no_directory_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["batch_upload.py", str(tmp_path / "nothing")])
    with pytest.raises(SystemExit, match="2"):
        runpy.run_path(str(PROGRAM), run_name="__main__")


def test_what_failed_is_named(tmp_path: Path) -> None:
    make_tree(tmp_path / "tree", 3)
    (tmp_path / "tree" / "back\\slash").write_text("x")
    said = run(tmp_path, "tree", code=1)
    assert "3 files stored, 1 failed" in said
    assert "backslashes are not allowed" in said


class Shaky(MemoryBackend):
    """Out of order at the first write of every key, and counts how many writes it has at a time."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.most = 0
        self.seen: set[str] = set()

    async def _write(self, key: str, *args: Any, **options: Any) -> Any:
        if key not in self.seen:
            self.seen.add(key)
            raise BackendUnavailable("out of order")
        self.now += 1
        self.most = max(self.most, self.now)
        try:
            await asyncio.sleep(0)
            return await super()._write(key, *args, **options)
        finally:
            self.now -= 1


@pytest.mark.asyncio
async def test_it_tries_again_and_is_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(example.random, "uniform", lambda low, high: 0.0)
    made = make_tree(tmp_path / "tree", 60)
    backend = Shaky()
    failures: list[Any] = []
    async with ProxyStorage("batch", originals=backend, meta=MemoryMetaBackend()) as storage:
        paths = [path async for path in example.upload(storage, tmp_path / "tree", concurrency=5, failures=failures)]
    assert not failures
    assert sorted(paths) == sorted(made)
    assert 1 < backend.most <= 5
