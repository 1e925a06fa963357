"""Which storage is meant, how a command ends, what it writes where."""

import asyncio
import contextlib
import io
import json
import os
import pty
import signal
import sqlite3
import subprocess
import sys
import time
from pathlib import Path

import pytest

from aproxy_storage import BackendUnavailable
from aproxy_storage.cli.output import Bar, Output, Tally, WatchedFile, duration, parse_duration, printable, size
from aproxy_storage.cli.session import Session
from tests.cli.conftest import Run, command, environment, stored, tree

COMMANDS = [
    "adopt",
    "cat",
    "copy",
    "cp",
    "demo",
    "get",
    "health",
    "ls",
    "mv",
    "put",
    "reconcile",
    "rm",
    "stat",
    "verify",
]


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_explains_itself(run: Run, name: str) -> None:
    out = run(name, "--help").out
    for option in ("--json", "--quiet", "--config", "--storage", "--original", "--meta"):
        assert option in out
    assert f"aproxy {name}" in out or name in out


def test_the_list_of_commands(run: Run) -> None:
    out = run("--help").out
    assert all(f" {name} " in out for name in COMMANDS)
    assert "130 interrupted" in out
    assert run("--version").out.startswith("aproxy-storage 0.")
    assert "--help" in run(code=2).err + run(code=2).out


# -- which storage


def test_without_any_storage_nothing_is_made(run: Run, here: Path) -> None:
    for args in (["ls"], ["stat", "x"], ["verify"], ["reconcile"], ["get", "x"], ["rm", "x"]):
        done = run(*args, code=2)
        assert "there is no storage here" in done.err
        assert "aproxy put FILE" in done.err
    assert not list(here.iterdir())


def test_a_storage_of_urls(run: Run) -> None:
    Path("a.txt").write_text("x")
    where = ("--original", "file:there", "--meta", "sqlite:///r.sqlite3")
    run("put", "a.txt", *where)
    assert run("ls", *where).lines == ["a.txt"]
    assert Path("there/a.txt").exists()
    assert "go together" in run("ls", "--meta", "memory:", code=2).err
    assert "either --config" in run("ls", *where, "--config", "x", code=2).err
    assert "names a host" in run("ls", "--original", "file://x", "--meta", "memory:", code=2).err


def test_a_storage_of_a_file(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    Path("a.txt").write_text("x")
    Path("c.toml").write_text(
        'storages.one = { originals = "file:one", meta = "sqlite:1" }\n'
        'storages.two = { originals = "file:two", meta = "sqlite:2" }\n'
    )
    assert "which storage? --storage NAME, one of: one, two" in run("ls", "--config", "c.toml", code=2).err
    run("put", "a.txt", "-c", "c.toml", "-s", "two")
    monkeypatch.setenv("APROXY_CONFIG", "c.toml")
    assert run("ls", "-s", "two").lines == ["a.txt"]
    assert run("ls", "-s", "one").lines == []
    assert "no storage 'three'; there are: one, two" in run("ls", "-s", "three", code=2).err
    Path("c.toml").write_text('storages.one = { originals = "file:one", mata = "sqlite:1" }\n')
    done = run("ls", code=2)
    assert "c.toml:1: 'mata' is unknown" in done.err
    assert "Traceback" not in done.err


def test_one_named_default_is_the_default(run: Run) -> None:
    Path("aproxy.toml").write_text(
        'storages.one = { originals = "memory:", meta = "memory:" }\n'
        'storages.default = { originals = "file:d", meta = "sqlite:2" }\n'
    )
    Path("a.txt").write_text("x")
    run("put", "a.txt")
    assert Path("d/a.txt").exists()


def test_a_name_without_a_configuration_makes_nothing(run: Run, here: Path) -> None:
    Path("a.txt").write_text("x")
    assert "there is no storage 'nosuch'" in run("put", "a.txt", "-s", "nosuch", code=2).err
    assert os.listdir() == ["a.txt"]
    run("put", "a.txt", "-s", "default")


def test_a_configuration_that_leads_nowhere_is_not_another_storage(run: Run, here: Path) -> None:
    Path("a.txt").write_text("x")
    os.symlink("unmounted/aproxy.toml", "aproxy.toml")
    assert "cannot read the configuration aproxy.toml: No such file" in run("put", "a.txt", code=2).err
    assert sorted(os.listdir()) == ["a.txt", "aproxy.toml"]


# -- how it ends


def test_without_the_extra_it_says_what_to_install(here: Path) -> None:
    for missing in ("typer", "rich"):
        program = (
            "import sys\n"
            f"sys.modules[{missing!r}] = None\n"
            "from aproxy_storage.__main__ import main\n"
            "try:\n    main()\n"
            "except SystemExit as ending:\n    sys.exit(ending.code)\n"
        )
        done = subprocess.run(
            [sys.executable, "-c", program], env=environment(), capture_output=True, text=True, timeout=60
        )
        assert done.returncode == 2
        assert done.stderr == (
            f"aproxy needs {missing}, which is not installed. Install it with: pip install 'aproxy-storage[cli]'\n"
        )


@pytest.mark.parametrize(
    ("number", "code", "word"),
    [(signal.SIGINT, 130, "interrupted"), (signal.SIGTERM, 143, "told to stop")],
)
def test_a_signal_stops_it_cleanly(run: Run, number: int, code: int, word: str) -> None:
    """Standard input that never ends keeps the save in the middle for as long as it takes."""
    # A test runner may have us ignore Ctrl-C, and a process inherits that.
    listening = "import signal; signal.signal(signal.SIGINT, signal.default_int_handler); "
    program = listening + "import runpy; runpy.run_module('aproxy_storage', run_name='__main__')"
    with subprocess.Popen(
        [sys.executable, "-W", "error", "-c", program, "put", "-", "--to", "half.bin"],
        env=environment(),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    ) as process:
        assert process.stdin is not None
        process.stdin.write(bytes(1_000_000))
        process.stdin.flush()
        wait_for_pending_record()
        process.send_signal(number)
        out, err = process.communicate(timeout=60)
    assert process.returncode == code, err
    assert word in err.decode()
    assert "what was under way is undone" in err.decode()
    assert b"Traceback" not in err
    assert out == b""
    assert not stored()
    assert run("reconcile", "--json", "--force").rows == []


def wait_for_pending_record() -> None:
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        with contextlib.suppress(sqlite3.Error):
            if Path("aproxy-data/records.sqlite3").exists():
                with contextlib.closing(sqlite3.connect("aproxy-data/records.sqlite3")) as connection:
                    if connection.execute("SELECT count(*) FROM aproxy_files").fetchone()[0]:
                        return
        time.sleep(0.02)
    raise AssertionError("no save began")


def test_what_was_done_is_said_when_it_is_interrupted(capsys: pytest.CaptureFixture[str]) -> None:
    async def work(session: Session) -> None:
        await session.storage()
        for _ in range(3):
            session.did("stored", "a.txt", 1000)
        os.kill(os.getpid(), signal.SIGINT)
        await asyncio.sleep(60)

    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # under xdist it is ignored
    try:
        assert Session(Output(quiet=True), creates=True).run(work) == 130
    finally:
        signal.signal(signal.SIGINT, before)
    out, err = capsys.readouterr()
    assert out == ""
    assert "interrupted: 3 stored (3.0 kB); what was under way is undone" in err


def test_on_a_terminal_there_is_a_bar_and_a_summary(run: Run) -> None:
    tree(Path("t"))
    master, slave = pty.openpty()
    env = {**environment(), "TERM": "xterm", "COLUMNS": "200"}
    with subprocess.Popen(command("put", "-r", "t"), env=env, stdout=subprocess.PIPE, stderr=slave) as process:
        os.close(slave)
        seen = b""
        while True:
            try:
                seen += os.read(master, 10_000)
            except OSError:
                break
        assert process.stdout is not None
        assert process.stdout.read() == b"", "no line for each file"
        assert process.wait(60) == 0
    os.close(master)
    text = seen.decode()
    assert "storing" in text
    assert "4/4" in text
    assert "files/s" in text
    assert "4 stored" in text


def test_a_large_file_moves_the_bar_while_it_is_under_way(here: Path) -> None:
    moved: list[int] = []

    class Recorder(Bar):
        def moved(self, count: int) -> None:
            moved.append(count)

    Path("large").write_bytes(bytes(5_000_000))
    with WatchedFile("large", Recorder()) as file:
        while file.read(1 << 20):
            pass
        assert sum(moved) == 5_000_000
        assert len(moved) >= 5
        file.seek(0)
        assert sum(moved) == 0, "a second attempt begins anew"


def test_names_are_shown_as_they_are(capsys: pytest.CaptureFixture[str]) -> None:
    Output().failed("em/a:key:b[red].txt", BackendUnavailable("no :key: here"))
    assert "failed  em/a:key:b[red].txt: no :key: here" in capsys.readouterr().err


def test_json_is_valid_in_every_encoding(monkeypatch: pytest.MonkeyPatch) -> None:
    for encoding in ("utf-8", "latin-1", "ascii"):
        written = io.BytesIO()
        stream = io.TextIOWrapper(written, encoding=encoding, errors="backslashreplace")
        monkeypatch.setattr(sys, "stdout", stream)
        Output(as_json=True).json({"path": "é 写\udcff"})
        stream.flush()
        assert json.loads(written.getvalue().decode(encoding)) == {"path": "é 写\udcff"}
        monkeypatch.undo()


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="there is no /dev/full here")
def test_output_that_cannot_be_written(run: Run) -> None:
    Path("a.txt").write_text("x")
    run("put", "a.txt")
    with open("/dev/full", "w") as full:
        done = subprocess.run(command("ls"), env=environment(), stdout=full, stderr=subprocess.PIPE, timeout=60)
    assert (done.returncode, done.stderr.decode().count("\n")) == (1, 1)
    assert b"could not write the output: No space left on device" in done.stderr
    closed = subprocess.run(["sh", "-c", 'exec "$@" >&-', "-", *command("ls")], env=environment(), timeout=60)
    assert closed.returncode == 0


# -- words


def test_sizes_and_times_that_a_person_reads() -> None:
    assert [size(count) for count in (None, 0, 1, 999, 1_234_567)] == ["?", "0 bytes", "1 byte", "999 bytes", "1.2 MB"]
    assert [duration(seconds) for seconds in (0.31, 125, 3720)] == ["0.3 s", "2 min 5 s", "1 h 2 min"]
    assert [parse_duration(text) for text in ("90", "1.5m", "24h", "7d")] == [90, 90, 86_400, 604_800]
    for wrong in ("", "x", "-1s", "1w"):
        with pytest.raises(ValueError, match="90s, 15m"):
            parse_duration(wrong)
    assert printable("a\x1b\udc80\u202eb é") == "a\\x1b\\udc80\\u202eb é"


def test_an_error_is_told_with_its_notes(capsys: pytest.CaptureFixture[str]) -> None:
    async def work(session: Session) -> None:
        error = BackendUnavailable("the last one is out of order")
        error.add_note("before: the first one was full")
        raise error

    assert Session(Output()).run(work) == 1
    assert "aproxy: the last one is out of order; before: the first one was full" in capsys.readouterr().err


def test_a_tally_in_words() -> None:
    tally = Tally()
    assert tally.sentence() == ""
    for _ in range(1200):
        tally.add("stored", 1000)
    tally.add("skipped")
    tally.failed = 2
    assert tally.sentence() == "1,200 stored, 1 skipped (1.2 MB), 2 failed"


@pytest.mark.parametrize(
    "args",
    [
        ["copy", "django://no_such", "default"],
        ["ls", "--original", "memory:", "--meta", "django-orm://no_such.Model"],
        ["ls", "-c", "django.toml"],
        ["ls"],
    ],
)
def test_django_is_set_up_where_a_url_is_one_of_its(
    run: Run, here: Path, monkeypatch: pytest.MonkeyPatch, args: list[str]
) -> None:
    calls: list[bool] = []
    monkeypatch.setattr("django.setup", lambda: calls.append(str(here) in sys.path))
    monkeypatch.setattr(sys, "path", list(sys.path))
    Path("django.toml").write_text('storages.a = { originals = "memory:", meta = "django-orm://no_such.Model" }')
    Path("aproxy.toml").write_text('storages.default = { originals = "memory:", meta = "memory:" }')
    monkeypatch.delenv("DJANGO_SETTINGS_MODULE", raising=False)
    run(*args, code=None)
    assert calls == []
    monkeypatch.setenv("DJANGO_SETTINGS_MODULE", "no_such_settings")
    run(*args, code=None)
    assert calls == ([] if args == ["ls"] else [True])

    def setup() -> None:
        raise ModuleNotFoundError("No module named 'no_such_settings'")

    monkeypatch.setattr("django.setup", setup)
    if calls:
        assert "No module named 'no_such_settings'" in run(*args, code=2).err
