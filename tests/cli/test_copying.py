"""`aproxy copy`: from storages and from buckets without records, again and again."""

from pathlib import Path

import pytest

from tests.cli.conftest import Run

CONFIG = """
[storages.live]
originals.default = "file:live"
meta = "sqlite:live.sqlite3"

[storages.staging]
originals.default = "file:staging"
meta = "sqlite:staging.sqlite3"
"""


@pytest.fixture
def files(here: Path) -> dict[str, bytes]:
    (here / "aproxy.toml").write_text(CONFIG)
    files = {"a.txt": b"first", "dir/b.bin": b"x" * 3_000_000, "日本.txt": b""}
    for name, data in files.items():
        path = here / "bucket" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    return files


def tree(root: Path) -> dict[str, bytes]:
    return {str(path.relative_to(root)): path.read_bytes() for path in root.rglob("*") if path.is_file()}


def test_from_a_bucket_and_from_a_storage(run: Run, here: Path, files: dict[str, bytes]) -> None:
    done = run("copy", "file:bucket", "live")
    assert sorted(done.lines) == sorted(f"copied  {name}" for name in files)
    assert "3 copied (3.0 MB)" in done.err
    assert tree(here / "live") == files
    done = run("copy", "live", "staging", "--json")
    assert {row["path"]: row["action"] for row in done.rows} == dict.fromkeys(files, "copied")
    assert tree(here / "staging") == files
    assert "3 skipped" in run("copy", "live", "staging").err
    assert "1 skipped" not in run("copy", "live", "staging", "--prefix", "dir/", "--quiet").err


def test_a_failure_is_told_and_the_rest_goes_on(run: Run, here: Path, files: dict[str, bytes]) -> None:
    run("copy", "file:bucket", "staging", "--prefix", "a")
    (here / "bucket" / "a.txt").write_bytes(b"other")
    done = run("copy", "file:bucket", "staging", code=1)
    assert "failed  a.txt: 'a.txt' is there already, with other bytes" in done.err
    assert tree(here / "staging") == files
    assert "kept  a.txt" in run("copy", "file:bucket", "staging", "--on-conflict", "skip").lines
    assert "replaced  a.txt" in run("copy", "file:bucket", "staging", "--on-conflict", "replace").lines
    assert "replaced" not in run("copy", "file:bucket", "staging", "--on-conflict", "replace").out


def test_wrong_ends_are_named(run: Run, files: dict[str, bytes]) -> None:
    assert "neither a storage" in run("copy", "nonsense", "staging", code=2).err
    assert "no storage 'nonsense'" in run("copy", "live", "nonsense", code=2).err
    assert "both the storage" in run("copy", "live", "live", code=2).err
    assert "no original" in run("copy", "nonsense://x", "live", code=2).err
    assert "ProxyStorage.adopt" in run("copy", "file:live", "live", code=2).err
