"""ls, stat, rm, mv, cp and adopt."""

import asyncio
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from aproxy_storage import Place, ProxyStorage, Replicate
from aproxy_storage.backends.memory import MemoryBackend
from aproxy_storage.cli.files import _adopt_instead
from aproxy_storage.meta_backends.memory import MemoryMetaBackend
from tests.cli.conftest import Run, leave_record, stored, tree


@pytest.fixture(autouse=True)
def _some_files(here: Path, run: Run) -> None:
    tree(Path("t"))
    run("put", "-r", "t")


def test_one_level(run: Run) -> None:
    assert run("ls").lines == ["t/"]
    assert run("ls", "t/").lines == ["t/a.txt", "t/b/", "t/empty"]
    assert run("ls", "t/a").lines == ["t/a.txt"]
    assert run("ls", "nowhere").lines == []


def test_all_levels(run: Run) -> None:
    assert run("ls", "-r").lines == ["t/a.txt", "t/b/c.txt", "t/b/d/e.bin", "t/empty"]
    assert run("ls", "-r", "--after", "t/a.txt", "-n", "2").lines == ["t/b/c.txt", "t/b/d/e.bin"]


def test_long_lines(run: Run) -> None:
    lines = run("ls", "-l", "t/").lines
    assert lines[0].split()[:2] == ["5", "bytes"]
    assert lines[0].split()[4:] == ["default", "t/a.txt"]
    assert lines[1].split() == ["t/b/"]
    assert len({line.index("t/") for line in lines}) == 1, "one column"
    assert run("ls", "-lr", "t/b/d").lines[0].split()[:2] == ["76.8", "kB"]


def test_lines_of_json(run: Run) -> None:
    rows = run("ls", "--json", "t/").rows
    assert rows[1] == {"directory": "t/b/"}
    assert rows[0]["path"] == "t/a.txt"
    assert rows[0]["size"] == 5
    assert rows[0]["checksum"].startswith("sha256:")
    assert rows[0]["created_at"].endswith("+00:00")


def test_names_cannot_steer_the_terminal(run: Run) -> None:
    import asyncio

    from aproxy_storage import MetaRecord
    from aproxy_storage.meta_backends.sqlite import SQLiteMetaBackend

    async def write() -> None:
        async with SQLiteMetaBackend("aproxy-data/records.sqlite3") as meta:
            await meta.create(MetaRecord(path="u/\x1b[2J\n日本語", proxy_storage_name="default"))

    asyncio.run(write())
    assert run("ls", "u/").lines == ["u/\\x1b[2J\\n日本語"]


def test_stat(run: Run) -> None:
    done = run("stat", "t/a.txt", "t/empty")
    lines = [line.split(maxsplit=1) for line in done.lines if line]
    assert ["path", "t/a.txt"] in lines
    assert ["size", "5 bytes"] in lines
    assert ["type", "text/plain"] in lines
    assert ["bytes", f"at  {Path('aproxy-data/files/t/a.txt').absolute()}"] in lines
    assert len(lines) == 20
    assert "size  76.8 kB (76,800 bytes)" in run("stat", "t/b/d/e.bin").out
    (row,) = run("stat", "t/a.txt", "--json").rows
    assert row["full_path"] == str(Path("aproxy-data/files/t/a.txt").absolute())
    done = run("stat", "t/x", "t/a.txt", code=1)
    assert ("has no file" in done.err, done.lines[0].split()) == (True, ["path", "t/a.txt"])


def test_rm(run: Run) -> None:
    assert run("rm", "t/a.txt", "t/empty").lines[0].startswith("deleted  t/")
    assert set(stored()) == {"t/b/c.txt", "t/b/d/e.bin"}
    done = run("rm", "t/a.txt", "t/b/c.txt", code=1)
    assert "failed  t/a.txt" in done.err
    assert set(stored()) == {"t/b/d/e.bin"}
    run("rm", "t/a.txt", "--missing-ok")


def test_rm_of_a_tree_asks_before(run: Run) -> None:
    done = run("rm", "-r", "t/b", code=2)
    assert "Delete 2 files of storage 'default'?" in done.err
    assert "say --yes" in done.err
    assert len(stored()) == 4
    run("rm", "-r", "t/b", "--yes")
    assert set(stored()) == {"t/a.txt", "t/empty"}
    run("rm", "-ry", ".")
    assert not stored()


@pytest.mark.parametrize("nothing", ["", "/", "//"])
def test_rm_of_everything_is_said_with_a_dot(run: Run, nothing: str) -> None:
    """As an unset variable of a script gives it."""
    done = run("rm", "-r", "--yes", "t/b", nothing, code=2)
    assert ". is everything" in done.err
    assert len(stored()) == 4
    assert ". is everything" in run("get", "-r", nothing, "-o", "out", code=2).err


def test_rm_of_a_tree_takes_a_file_too(run: Run) -> None:
    run("put", "t/a.txt", "--to", "t/b.txt")
    run("rm", "-r", "--yes", "t/a.txt", "t/b", "t/b/d")
    assert set(stored()) == {"t/empty", "t/b.txt"}


def test_rm_of_a_tree_minds_what_is_not_there(run: Run) -> None:
    done = run("rm", "-r", "--yes", "t/nothing", "t/b", code=1)
    assert "failed  t/nothing: there is no file 't/nothing', and nothing below it" in done.err
    assert set(stored()) == {"t/a.txt", "t/empty"}
    run("rm", "-r", "--yes", "t/nothing", code=1)
    run("rm", "-r", "--missing-ok", "t/nothing")


def test_mv(run: Run) -> None:
    assert run("mv", "t/a.txt", "u/b.txt").lines == ["renamed  u/b.txt"]
    run("mv", "u/b.txt", "v/")
    assert run("cat", "v/b.txt").out == "first"
    assert "t/a.txt" in stored(), "no byte moves"
    assert run("mv", "v/b.txt", "t/empty", code=1).err
    assert "where to?" in run("mv", "v/b.txt", code=2).err


def test_mv_to_another_original(run: Run) -> None:
    Path("aproxy.toml").write_text(
        '[storages.m]\noriginals = { one = "file:one", two = "file:two" }\nmeta = "sqlite:m.sqlite3"'
    )
    run("put", "t/a.txt", "--to", "x.txt")
    (row,) = run("mv", "x.txt", "y.txt", "--using", "two", "--json").rows[1:]
    assert row["path"] == "y.txt"
    assert run("stat", "y.txt", "--json").rows[0]["original"] == "two"


def test_cp(run: Run) -> None:
    assert run("cp", "t/a.txt", "u/").lines == ["copied  u/a.txt"]
    (row,) = run("cp", "t/a.txt", "u/a.txt", "--json").rows
    assert row["path"].startswith("u/a_")
    assert run("cat", "u/a.txt", row["path"]).out == "firstfirst"


def _restore_records(work: Callable[[], object]) -> None:
    """Do `work` between a backup of the records and their restore."""
    shutil.copy("aproxy-data/records.sqlite3", "backup")
    work()
    for file in Path("aproxy-data").glob("records.sqlite3*"):
        file.unlink()
    shutil.copy("backup", "aproxy-data/records.sqlite3")


def test_a_record_is_forgotten_without_its_bytes_and_these_are_adopted(run: Run) -> None:
    def work() -> None:
        run("rm", "t/a.txt")
        Path("t/a.txt").write_text("Bob's")
        run("put", "t/a.txt", "--to", "t/a.txt")

    _restore_records(work)
    assert "t/a.txt" in run("verify", code=1).err
    # His bytes never become hers.
    assert "were not written for 't/a.txt'" in run("adopt", "t/a.txt", "--instead", code=1).err
    done = run("rm", "--keep-bytes", "t/nothing", "t/a.txt", code=1)
    assert (done.lines[-1:], "failed  t/nothing" in done.err) == (["forgotten  t/a.txt"], True)
    assert run("adopt", "t/a.txt").lines == ["adopted  t/a.txt"]
    assert run("cat", "t/a.txt").out == "Bob's"
    run("rm", "-r", "--keep-bytes", ".", code=2)


def test_the_record_of_a_replaced_file_stands_for_what_is_there(run: Run) -> None:
    def work() -> None:
        Path("t/a.txt").write_text("second version")
        run("put", "t/a.txt", "--to", "t/a.txt", "--on-conflict", "replace")
        os.unlink("aproxy-data/files/t/a.txt")  # as when `keep_replaced` is over

    _restore_records(work)
    (key,) = (name for name in stored() if name.startswith("t/a_"))
    run("cat", "t/a.txt", code=1)
    assert run("adopt", key, "t/a.txt", "--instead").lines == ["adopted  t/a.txt"]
    assert run("cat", "t/a.txt").out == "second version"
    run("verify", "--record-missing")


def test_copies_of_bytes_for_which_others_stand_now_are_named_until_they_are_gone() -> None:
    async def main() -> None:
        a, b = MemoryBackend(), MemoryBackend()
        placement = Replicate(2)
        async with ProxyStorage("m", originals={"a": a, "b": b}, meta=MemoryMetaBackend(), placement=placement) as m:
            old = await m.get(await m.save("x", b"old"))
            await a.discard("x")
            await a.write("x_new", b"newer", token=old.token)
            await _adopt_instead(m, "x_new", "x", None)
            record = await m.get("x")
            assert (record.good_places(), record.places) == ((Place("a", "x_new"),), (Place("b", "x", "settling"),))
            assert record.lease is not None
            assert await m.journal.finish(record, force=True) == "cleared"
            assert [info.key async for info in b.list()] == []

    asyncio.run(main())


def test_a_record_with_something_left_to_do_is_not_forgotten(run: Run) -> None:
    leave_record("half.txt", lease=60, state="stored", places=(Place("default", "k", "doubtful"),))
    assert "reconcile" in run("rm", "--keep-bytes", "half.txt", code=1).err
