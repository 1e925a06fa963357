"""put, get and cat."""

import asyncio
import os
import signal
import subprocess
import threading
from pathlib import Path

import pytest
from django.db import connections
from django.test import override_settings

from aproxy_storage import Place, ProxyStorage
from aproxy_storage.backends.memory import MemoryBackend
from aproxy_storage.cli.output import Bar
from aproxy_storage.cli.transfer import _get_one
from aproxy_storage.cli.trees import Draft
from aproxy_storage.meta_backends.memory import MemoryMetaBackend
from tests.cli.conftest import Run, command, contents, environment, leave_record, stored, tree
from tests.django_support.setup import configure

# -- put


def test_a_file_keeps_its_name(run: Run) -> None:
    Path("a.txt").write_text("here")
    done = run("put", "a.txt")
    assert done.lines == ["stored  a.txt  file=a.txt"]
    assert stored() == {"a.txt": b"here"}


def test_a_file_gets_another_path(run: Run) -> None:
    tree(Path("t"))
    run("put", "t/a.txt", "--to", "x/y.txt")
    run("put", "t/a.txt", "--to", "dir/")
    run("put", "t/a.txt", "t/b/c.txt", "--to", "both")
    assert set(stored()) == {"x/y.txt", "dir/a.txt", "both/a.txt", "both/c.txt"}


@pytest.mark.parametrize(
    ("args", "prefix"),
    [(["t"], "t/"), (["t/"], "t/"), (["t", "--to", "web"], "web/"), (["t", "--to", "in/"], "in/t/"), (["."], "t/")],
)
def test_a_tree(run: Run, args: list[str], prefix: str) -> None:
    tree(Path("t"))
    run("put", "-r", *args)
    assert stored() == {prefix + name: data for name, data in contents(Path("t")).items()}


def test_a_storage_does_not_store_itself(run: Run) -> None:
    Path("aproxy.toml").write_text('storages.m = { originals = "file:o", meta = "sqlite:m.sqlite3" }')
    tree(Path("t"))
    run("put", "-r", "t", "--to", "x")
    run("put", "-r", ".", "--to", "y")
    names = {f"t/{name}" for name in contents(Path("t"))}
    assert {name for name in contents(Path("o")) if name.startswith("y/")} == {f"y/{name}" for name in names}


def test_a_tree_from_within(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    tree(Path("t/u"))
    monkeypatch.chdir("t")
    run("put", "-r", ".", "--to", "x")
    assert set(stored()) == {f"x/u/{name}" for name in ("a.txt", "b/c.txt", "b/d/e.bin", "empty")}


def test_a_repeated_upload_skips_what_is_there(run: Run) -> None:
    tree(Path("t"))
    run("put", "-r", "t")
    Path("t/new.txt").write_text("new")
    done = run("put", "-r", "t")
    assert sorted(line.split()[0] for line in done.lines) == ["skipped"] * 4 + ["stored"]
    assert "1 stored" in done.err
    assert "4 skipped" in done.err
    assert stored() == {f"t/{name}": data for name, data in contents(Path("t")).items()}


@pytest.mark.parametrize(
    ("policy", "code", "action", "count"),
    [("fail", 1, "failed", 1), ("replace", 0, "replaced", 1), ("keep-both", 0, "stored", 2), ("skip", 0, "kept", 1)],
)
def test_a_path_with_other_bytes(run: Run, policy: str, code: int, action: str, count: int) -> None:
    file = Path("a.txt")
    file.write_text("before")
    run("put", file)
    file.write_text("behind")  # as long: only the checksum tells
    done = run("put", file, "--on-conflict", policy, "--json", code=code)
    assert [row["action"] for row in done.rows] == [action]
    listed = run("ls", "--json").rows
    assert len(listed) == count
    assert run("cat", "a.txt").out == ("behind" if policy == "replace" else "before")
    assert {run("cat", row["path"]).out for row in listed} <= {"before", "behind"}


def test_what_was_lost_on_the_way_is_said(run: Run) -> None:
    Path("a.txt").write_text("before")
    run("put", "a.txt")
    Path("a.txt").write_text("after")
    done = run("put", "a.txt", code=1)
    assert "--on-conflict replace, keep-both or skip says what to do" in done.err


@pytest.mark.parametrize("policy", ["fail", "replace", "keep-both", "skip"])
def test_what_a_killed_run_was_amid_gets_no_other_name(run: Run, policy: str) -> None:
    tree(Path("t"))
    run("put", "t/a.txt", "--to", "t/")
    leave_record("t/empty", lease=600)
    for _ in range(2):
        done = run("put", "-r", "t", "--on-conflict", policy, code=1)
        assert "failed  t/empty: 't/empty' is taken until " in done.err
        assert "reconcile --apply --force" in done.err
        assert set(run("ls", "-r").lines) == set(stored()) == {"t/a.txt", "t/b/c.txt", "t/b/d/e.bin"}
    run("reconcile", "--apply", "--force", "--yes")
    assert "1 stored" in run("put", "-r", "t", "--on-conflict", policy).err
    assert set(stored()) == {"t/a.txt", "t/b/c.txt", "t/b/d/e.bin", "t/empty"}


def test_standard_input_gets_no_other_name_either(run: Run, run_process: Run) -> None:
    tree(Path("t"))
    run("put", "t/a.txt")
    leave_record("in.bin", lease=600)
    done = run_process("put", "-", "--to", "in.bin", input=b"x", code=1)
    assert "'in.bin' is taken until " in done.err
    assert set(stored()) == {"a.txt"}


def test_what_is_over_is_cleared_away_before_the_transfer(run: Run, run_process: Run) -> None:
    tree(Path("t"))
    run("put", "t/a.txt")
    for name in ("c.txt", "in.bin"):
        leave_record(name, lease=0, state="deleting", places=(Place("default", name, "settling"),))
        if name == "c.txt":
            assert run("put", "t/b/c.txt").lines == ["stored  c.txt  file=t/b/c.txt"]
        else:
            run_process("put", "-", "--to", name, input=b"x")
    assert run("ls").lines == ["a.txt", "c.txt", "in.bin"]


def test_a_path_of_another_storage(run: Run) -> None:
    """Storages that share a table share its paths."""
    tree(Path("t"))
    run("put", "t/a.txt")
    leave_record("empty", lease=600, proxy_storage_name="other", state="stored")
    assert "'empty' is a file of storage 'other'" in run("put", "t/empty", code=1).err
    assert run("put", "t/empty", "--on-conflict", "keep-both").lines[0].startswith("stored  empty_")


def test_damaged_and_lost_files_are_repaired(run: Run) -> None:
    tree(Path("t"))
    run("put", "-r", "t")
    Path("aproxy-data/files/t/a.txt").write_text("f1rst")
    os.unlink("aproxy-data/files/t/b/c.txt")
    assert {line.split()[0] for line in run("put", "-r", "t").lines} == {"skipped"}, "the records are as they were"
    done = run("put", "-r", "t", "--repair")
    assert sorted(line.split()[:2] for line in done.lines if not line.startswith("skipped")) == [
        ["repaired", "t/a.txt"],
        ["repaired", "t/b/c.txt"],
    ]
    assert run("verify", "-q").code == 0
    assert run("cat", "t/a.txt", "t/b/c.txt").out == "firstsecond"


def test_json_tells_of_every_file(run: Run) -> None:
    tree(Path("t"))
    rows = {row["path"]: row for row in run("put", "-r", "t", "--json").rows}
    assert rows["t/a.txt"] == {"action": "stored", "path": "t/a.txt", "file": "t/a.txt", "size": 5}
    assert len(rows) == 4


def test_problems_with_one_file_do_not_stop_the_others(run: Run) -> None:
    tree(Path("t"))
    os.mkfifo("t/pipe")
    os.symlink("nowhere", "t/broken")
    os.symlink("a.txt", "t/link")
    os.symlink("..", "t/loop")
    os.symlink("a" * 300, "t/long")
    Path(os.fsdecode(b"t/\xff.txt")).write_text("not UTF-8")
    Path("t/back\\slash").write_text("")
    done = run("put", "-r", "t", "t/nothing", code=1)
    assert set(stored()) == {"t/a.txt", "t/b/c.txt", "t/b/d/e.bin", "t/empty", "t/link"}
    assert "t/pipe is no regular file" in done.err
    assert "read t/broken" in done.err
    assert "read t/long" in done.err
    assert "\\udcff.txt" in done.err
    assert "backslashes are not allowed" in done.err
    assert "read t/nothing" in done.err
    assert "5 stored" in done.err
    assert "6 failed" in done.err


def test_a_directory_needs_r(run: Run) -> None:
    tree(Path("t"))
    done = run("put", "t", code=1)
    assert "say -r" in done.err
    assert not stored()


def test_two_sources_of_one_name(run: Run) -> None:
    tree(Path("t"))
    tree(Path("u"))
    done = run("put", "t/a.txt", "u/a.txt", code=2)
    assert "t/a.txt and u/a.txt would both be named 'a.txt'" in done.err


def test_which_original(run: Run) -> None:
    Path("aproxy.toml").write_text(
        '[storages.m]\noriginals = { one = "file:one", two = "file:two" }\nmeta = "sqlite:m.sqlite3"\nprefix = "p"'
    )
    Path("a.txt").write_text("x")
    run("put", "a.txt", "--using", "two")
    assert contents(Path("two")) == {"a.txt": b"x"}
    assert run("ls").lines == ["p/a.txt"]
    assert run("put", "a.txt").lines == ["skipped  p/a.txt  file=a.txt"]
    assert "no original 'three'" in run("put", "a.txt", "--using", "three", code=2).err


def test_standard_input(run: Run, run_process: Run) -> None:
    run_process("put", "-", "--to", "in.bin", input=b"from a pipe" * 100_000)
    assert stored() == {"in.bin": b"from a pipe" * 100_000}
    done = run_process("put", "-", "--to", "in.bin", input=b"other", code=1)
    assert "--on-conflict" in done.err
    run_process("put", "-", "--to", "in.bin", "--on-conflict", "replace", input=b"other")
    assert run("cat", "in.bin").out == "other"
    assert "needs a path" in run("put", "-", code=2).err
    assert "goes alone" in run("put", "-", "b", "--to", "c", code=2).err


def test_a_file_with_the_name_of_standard_input(run: Run) -> None:
    Path("-").write_text("a file")
    run("put", "./-", "--to", "dash")
    run("put", "./-")
    assert stored() == {"dash": b"a file", "-": b"a file"}


# -- get


def test_a_file_comes_back(run: Run) -> None:
    Path("a.txt").write_text("here")
    run("put", "a.txt", "--to", "x/y.txt")
    assert run("get", "x/y.txt").lines == ["fetched  x/y.txt  file=y.txt"]
    assert Path("y.txt").read_text() == "here"
    run("get", "x/y.txt", "-o", "deep/er/z.txt")
    run("get", "x/y.txt", "-o", "deep")
    assert contents(Path("deep")) == {"er/z.txt": b"here", "y.txt": b"here"}


@pytest.mark.parametrize(("args", "root"), [(["t"], "t"), (["t/", "-o", "out"], "out"), ([".", "-o", "out"], "out/t")])
def test_a_tree_comes_back(run: Run, args: list[str], root: str) -> None:
    tree(Path("t"))
    before = contents(Path("t"))
    run("put", "-r", "t")
    os.rename("t", "away")
    done = run("get", "-r", *args)
    assert contents(Path(root)) == before
    assert "4 fetched" in done.err
    again = run("get", "-r", *args)
    assert [line.split()[0] for line in again.lines] == ["skipped"] * 4


def test_local_files_are_not_overwritten_unless_forced(run: Run) -> None:
    Path("a.txt").write_text("stored")
    run("put", "a.txt")
    Path("a.txt").write_text("local!")
    assert "--force" in run("get", "a.txt", code=1).err
    assert Path("a.txt").read_text() == "local!"
    run("get", "a.txt", "--force")
    assert Path("a.txt").read_text() == "stored"


def test_what_cannot_be_looked_at_is_there_all_the_same(run: Run) -> None:
    Path("a.txt").write_text("stored")
    run("put", "a.txt", "--to", "b.txt")
    os.symlink("a" * 300, "b.txt")
    assert "--force" in run("get", "b.txt", code=1).err
    assert "File name too long" in run("get", "b.txt", "-o", "b" * 300, code=1).err
    run("get", "b.txt", "--force")
    assert Path("b.txt").read_text() == "stored"


def test_a_slash_at_the_end_means_a_directory(run: Run) -> None:
    for name in ("a", "b"):
        Path(name).write_text(name)
        run("put", name, "--to", f"x/{name}")
        run("get", f"x/{name}", "-o", "backup/", "-f")
    assert contents(Path("backup")) == {"a": b"a", "b": b"b"}
    run("get", "x/a", "-o", "b/", "-f", code=1)
    assert Path("b").read_text() == "b"


def test_what_is_no_regular_file_is_not_replaced(run: Run) -> None:
    Path("a").write_text("stored")
    run("put", "a")
    os.mkfifo("pipe")
    os.symlink("pipe", "link")
    Path("local").write_text("local")
    os.symlink("local", "current")
    (Path("tree") / "a").mkdir(parents=True)
    for args in (["a", "-o", "pipe"], ["a", "-o", "link"], ["-r", ".", "-o", "tree"]):
        assert "is no regular file" in run("get", *args, "-f", code=1).err
    assert Path("pipe").is_fifo()
    assert os.readlink("link") == "pipe"
    run("get", "a", "-o", "current", "-f")
    assert os.readlink("current") == "local"
    assert Path("local").read_text() == "stored"


def test_a_damaged_file_never_appears(run: Run) -> None:
    Path("a.txt").write_text("stored")
    run("put", "a.txt", "--to", "b.txt")
    Path("aproxy-data/files/b.txt").write_text("Stored")
    assert "differ from its record" in run("get", "b.txt", code=1).err
    assert sorted(os.listdir()) == ["a.txt", "aproxy-data"]


def test_nothing_there(run: Run) -> None:
    Path("a.txt").write_text("stored")
    run("put", "a.txt")
    assert "has no file 'b.txt'" in run("get", "b.txt", code=1).err
    assert "nothing below 'b/'" in run("get", "-r", "b", code=1).err


def test_an_old_record_leads_not_out_of_the_directory(run: Run) -> None:
    """Records of before may hold absolute paths."""
    from aproxy_storage import MetaRecord
    from aproxy_storage.meta_backends.sqlite import SQLiteMetaBackend

    Path("a.txt").write_text("x")
    run("put", "a.txt")

    async def write() -> None:
        async with SQLiteMetaBackend("aproxy-data/records.sqlite3") as meta:
            for path in ("/etc/passwd", "x/../../out.txt"):
                await meta.create(
                    MetaRecord(
                        path=path,
                        proxy_storage_name="default",
                        original_storage_name="default",
                        original_storage_path="a.txt",
                        token=path,
                    )
                )

    asyncio.run(write())
    done = run("get", "-r", ".", "-o", "in/side", code=1)
    assert done.err.count("is not a legal path") == 2
    assert contents(Path("in")) == {"side/a.txt": b"x"}


@pytest.mark.asyncio
@pytest.mark.parametrize("cancels", [1, 2])
async def test_an_interrupted_file_leaves_nothing_behind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cancels: int
) -> None:
    """The thread that makes the hidden file is not stopped by a cancellation, and may be late."""
    entered, go_on, made = threading.Event(), threading.Event(), threading.Event()
    create = Draft.create

    def late(self: Draft) -> None:
        entered.set()
        assert go_on.wait(60)
        create(self)
        made.set()

    monkeypatch.setattr(Draft, "create", late)
    storage = ProxyStorage("media", originals=MemoryBackend(), meta=MemoryMetaBackend())
    await storage.save("a", b"x")
    task = asyncio.create_task(_get_one(storage, await storage.get("a"), tmp_path / "a", False, Bar()))
    assert await asyncio.to_thread(entered.wait, 60)
    for _ in range(cancels):
        task.cancel()
        for _ in range(20):  # what ends at once has ended then
            await asyncio.sleep(0)
    go_on.set()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert await asyncio.to_thread(made.wait, 60)
    assert not list(tmp_path.iterdir())


def test_a_draft_withdraws_itself(tmp_path: Path) -> None:
    draft = Draft(tmp_path / "a")
    draft.create()
    draft.write(b"half")
    draft.withdraw()
    draft.withdraw()
    assert not list(tmp_path.iterdir())


# -- cat


@pytest.mark.parametrize(
    ("part", "expected"),
    [(None, "0123456789"), ("0-0", "0"), ("2-4", "234"), ("7-", "789"), ("-2", "89"), ("5-100", "56789"), ("50-", "")],
)
def test_cat_writes_a_range(run: Run, part: str | None, expected: str) -> None:
    Path("a.txt").write_text("0123456789")
    run("put", "a.txt")
    assert run("cat", "a.txt", *([] if part is None else ["--range", part])).out == expected


@pytest.mark.parametrize("part", ["", "-", "5-2", "x", "1-2-3"])
def test_wrong_ranges(run: Run, part: str) -> None:
    Path("a.txt").write_text("0123456789")
    run("put", "a.txt")
    assert "--range" in run("cat", "a.txt", "--range", part, code=2).err


def test_cat_goes_on_after_a_file_that_is_not_there(run: Run) -> None:
    Path("a.txt").write_text("0123456789")
    run("put", "a.txt")
    done = run("cat", "nothing", "a.txt", code=1)
    assert (done.out, "failed  nothing" in done.err) == ("0123456789", True)


def test_cat_writes_bytes_of_several_files_as_they_are(run: Run, run_process: Run) -> None:
    Path("a").write_bytes(bytes(range(256)) * 10_000)
    run("put", "a")
    ended = subprocess.run(command("cat", "a", "a"), env=environment(), capture_output=True, timeout=60, check=True)
    assert ended.stdout == Path("a").read_bytes() * 2


def test_a_reader_that_has_had_enough(run: Run) -> None:
    Path("a").write_bytes(bytes(3_000_000))
    run("put", "a")
    with subprocess.Popen(
        command("cat", "a"), env=environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        assert process.stdout.read(10) == bytes(10)
        process.stdout.close()
        errors = process.stderr.read().decode()
        assert process.wait(60) == 128 + signal.SIGPIPE, errors
    assert errors == ""


def test_what_the_storages_of_the_file_keep_is_left_out_of_a_tree(run: Run) -> None:
    Path("aproxy.toml").write_text(
        """
        storages.default = { originals = "file:one", meta = "sqlite:one.sqlite3" }
        storages.other = { originals = "file:two", meta = "sqlite:two.sqlite3" }
        """
    )
    Path("a.txt").write_text("a")
    run("put", "a.txt", "-s", "other")
    run("put", "-r", ".")
    assert run("ls", "-r").lines == ["a.txt"]
    run("put", "-r", "two", "aproxy.toml")  # named
    assert run("ls", "-r").lines == ["a.txt", "aproxy.toml", "two/a.txt"]


def test_what_django_keeps_is_left_out_of_a_tree(run: Run, here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    configure()
    monkeypatch.setitem(connections.settings["default"], "NAME", str(here / "django.sqlite3"))
    Path("aproxy.toml").write_text(
        """
        storages.default = { originals = "django://default", meta = "sqlite:m.sqlite3" }
        storages.other = { originals = "memory:", meta = "django-orm://sync_bridge.StoredFile" }
        """
    )
    Path("a.txt").write_text("a")
    for end in ("", "-wal", "-shm", "-journal"):
        Path(f"django.sqlite3{end}").touch()
    files = {"default": {"BACKEND": "django.core.files.storage.FileSystemStorage"}}
    with override_settings(MEDIA_ROOT="media", STORAGES=files):
        for _ in range(2):
            run("put", "-r", ".")
    assert set(contents(Path("media"))) == {"a.txt"}
