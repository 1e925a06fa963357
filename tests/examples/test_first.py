"""The first program: it stores what it is given, and says the truth about what comes back."""

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent.parent
PROGRAM = ROOT / "examples" / "first.py"


def run(*args: object, cwd: Path, before: str = "") -> subprocess.CompletedProcess[str]:
    """Run the program in a process of its own, after the statements `before`."""
    code = f"import runpy, sys\n{before}\nrunpy.run_path(sys.argv[0], run_name='__main__')"
    code = f"import sys; sys.argv[:] = sys.argv[1:]\n{code}"
    command = [sys.executable, "-W", "error", "-c", code, str(PROGRAM), *map(str, args)]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=60)


def test_it_stores_and_checks_each_file(tmp_path: Path) -> None:
    small, large = tmp_path / "small.txt", tmp_path / "large.bin"
    small.write_text("Hello")
    large.write_bytes(bytes(range(256)) * 20_000)

    done = run(small, large, cwd=tmp_path)

    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert lines[0].split() == ["small.txt", "5", "bytes", "sha256", "185f8db32271", "ok"]
    assert lines[1].split()[:2] == ["large.bin", "5120000"]
    assert lines[1].endswith("ok")
    assert (tmp_path / "aproxy-data" / "files" / "small.txt").read_text() == "Hello"


def test_a_second_run_overwrites_nothing(tmp_path: Path) -> None:
    file = tmp_path / "a.txt"
    for text in ("first", "second"):
        file.write_text(text)
        assert run("--data", "kept", file, cwd=tmp_path).returncode == 0

    stored = [path.read_text() for path in (tmp_path / "kept" / "files").iterdir()]
    assert sorted(stored) == ["first", "second"]


def test_a_file_that_cannot_be_read_is_named_and_the_others_are_stored(tmp_path: Path) -> None:
    (tmp_path / "here.txt").write_text("here")

    done = run("missing.txt", "here.txt", cwd=tmp_path)

    assert done.returncode == 1
    assert "missing.txt" in done.stderr
    assert "No such file" in done.stderr
    assert done.stdout.split()[0] == "here.txt"


def test_a_damaged_file_makes_it_fail(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("as it was")
    # The disk turns a bit: what is read back is not what was written.
    damage = """
from aproxy_storage import ProxyStorage
from pathlib import Path
save = ProxyStorage.save
async def save_and_damage(self, name, content, **options):
    path = await save(self, name, content, **options)
    Path('aproxy-data/files', path).write_text('as it wAs')
    return path
ProxyStorage.save = save_and_damage
"""
    done = run("a.txt", cwd=tmp_path, before=damage)

    assert done.returncode == 1, done.stderr
    assert done.stdout.rstrip().endswith("DAMAGED")


def test_no_arguments_explain_themselves(tmp_path: Path) -> None:
    done = run(cwd=tmp_path)
    assert done.returncode == 2
    assert "FILE" in done.stderr
