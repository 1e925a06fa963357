"""verify and reconcile."""

import contextlib
import os
import sqlite3
from pathlib import Path

import pytest

from tests.cli.conftest import Run, leave_record, stored, tree


@pytest.fixture(autouse=True)
def _some_files(here: Path, run: Run) -> None:
    tree(Path("t"))
    run("put", "-r", "t")


def test_sound_files(run: Run) -> None:
    done = run("verify")
    assert sorted(done.lines) == ["ok  t/a.txt", "ok  t/b/c.txt", "ok  t/b/d/e.bin", "ok  t/empty"]
    assert "4 ok" in done.err
    assert run("verify", "-q").out == ""
    assert len(run("verify", "t/b", "--json").rows) == 2


def test_damaged_and_missing_files(run: Run) -> None:
    Path("aproxy-data/files/t/a.txt").write_text("f1rst")
    os.unlink("aproxy-data/files/t/empty")
    done = run("verify", code=1)
    assert len(done.lines) == 2
    assert "failed  t/a.txt: the bytes of 't/a.txt' differ" in done.err
    assert "failed  t/empty: the bytes of 't/empty' are gone" in done.err
    failed = [row for row in run("verify", "--json", code=1).rows if row["action"] == "failed"]
    assert {row["kind"] for row in failed} == {"IntegrityError"}


def test_missing_checksums_are_recorded(run: Run) -> None:
    Path("aproxy.toml").write_text('storages.m = { originals = "file:o", meta = "sqlite:m.sqlite3" }')
    run("put", "t/a.txt")
    with contextlib.closing(sqlite3.connect("m.sqlite3")) as connection:
        connection.execute("UPDATE aproxy_files SET checksum = NULL")
        connection.commit()
    assert "--record-missing" in run("verify", code=1).err
    assert run("verify", "--record-missing").lines == ["ok  a.txt"]
    run("verify")
    Path("o/a.txt").write_text("f1rst")
    run("verify", "--record-missing", code=1)


def test_reconcile_says_before_it_does(run: Run) -> None:
    leave_record("half.txt", lease=0)
    # The storage tidies up when it is closed: so a dry run of the command is seen beside one that did nothing yet.
    done = run("reconcile")
    assert done.lines == ["undone    half.txt"]
    assert "--apply does it" in done.err
    assert "nothing is left over" in run("reconcile", "--apply").err


def test_reconcile_applies(run: Run) -> None:
    leave_record("half.txt", lease=0)
    (row,) = run("reconcile", "--apply", "--json").rows
    # Its bytes may still land, for all that anybody knows: it is looked at once more, after `settle`.
    assert row == {"action": "settling", "path": "half.txt", "original": "default"}
    assert run("reconcile", "--json").rows == []


def test_after_a_restore_no_bytes_are_removed(run: Run) -> None:
    leave_record("old.txt", lease=0, state="deleting", original_storage_path="t/a.txt")
    before = stored()
    # Neither may tidy up when the storage is closed.
    assert "say --yes" in run("reconcile", "--restored", "--apply", code=2).err
    assert run("reconcile", "--restored").lines == ["deleted   old.txt"]
    assert run("reconcile", "--restored", "--apply", "--yes").lines == ["deleted   old.txt"]
    assert stored() == before
    run("verify", "-q")


def test_force_is_asked_for_twice(run: Run) -> None:
    assert "say --yes" in run("reconcile", "--force", "--apply", code=2).err
    run("reconcile", "--force", "--apply", "--yes")


def test_a_scan_knows_the_other_storages_of_the_file(run: Run) -> None:
    Path("aproxy.toml").write_text(
        """
        storages.one = { originals.fs = "file:shared", meta = "sqlite:one.sqlite3" }
        storages.two = { originals.fs = "file:shared", meta = "sqlite:two.sqlite3" }
        """
    )
    run("put", "t/a.txt", "-s", "one")
    run("put", "t/b/c.txt", "-s", "two")
    done = run("reconcile", "-s", "one", "--scan", "--min-age", "0s", "--apply")
    assert done.lines == []
    assert run("cat", "c.txt", "-s", "two").out == "second"
    # Its records lost, a file is an orphan.
    run("put", "t/b/d/e.bin", "-s", "two")
    for end in ("", "-wal", "-shm"):
        Path(f"two.sqlite3{end}").unlink(missing_ok=True)
    done = run("reconcile", "-s", "one", "--scan", "--min-age", "0s", "--apply")
    assert sorted(done.lines) == ["removed   c.txt", "removed   e.bin"]


def test_times_are_checked(run: Run) -> None:
    assert "write 90s, 15m, 24h or 7d" in run("reconcile", "--min-age", "soon", code=2).err


def test_nothing_is_done_to_live_files(run: Run) -> None:
    run("reconcile", "--apply", "--scan", "--min-age", "0s")
    assert len(stored()) == 4


def test_a_lost_file_is_a_failure(run: Run) -> None:
    Path("aproxy.toml").write_text(
        """
        [storages.twice]
        originals = { a = "file:a", b = "file:b" }
        placement = { policy = "replicate", copies = 2 }
        meta = "sqlite:twice.sqlite3"
        """
    )
    run("put", "t/a.txt", "t/b/c.txt")
    os.unlink("a/a.txt")
    assert "1  copies whose bytes are gone" in run("reconcile").err
    os.unlink("b/a.txt")
    done = run("reconcile", code=1)
    assert "failed  a.txt: every copy of 'a.txt' is gone or damaged" in done.err
    assert "1  files of which no copy is left" in done.err


def test_a_prefix_of_nothing_is_not_verified(run: Run) -> None:
    tree(Path("t"))
    run("put", "-r", "t")
    assert "no file whose path begins with 'nosuch/'" in run("verify", "nosuch/", code=1).err
    assert len(run("verify", "t/").lines) == 4
    run("rm", "-r", ".", "--yes")
    assert run("verify").lines == []


def test_health_asks_the_originals_though_the_records_are_away(run: Run) -> None:
    Path("m.sqlite3").mkdir()
    done = run("health", "--original", "file:o", "--meta", "sqlite:m.sqlite3", code=1)
    assert (done.lines, "failed  meta" in done.err) == (["ok  default"], True)
