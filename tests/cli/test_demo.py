"""The demo shows what it says, and notices when it is not so."""

import io
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

import pytest

from aproxy_storage.cli.demo import Demo, pick
from aproxy_storage.cli.output import Output
from tests.cli.conftest import Run, stored

PACKAGE = Path(__file__).parents[2] / "aproxy_storage"


def test_the_whole_demo(run_process: Run, here: Path) -> None:
    done = run_process("demo", PACKAGE, "--files", "60", "--directory", "kept")
    for words in (
        "60 files stored in",
        "60 files read back, every checksum right in",
        "sha256:",
        "files/s",
        "30  files are stored, as it was told",
        "16  saves are left half done",
        "90  files are stored",
        "0  lost files",
        "0  files on the disk that no record names",
        "Nothing lost, nothing left over. What to try next",
    ):
        assert words in done.out
    assert len(stored(here / "kept")) == 90


def test_its_own_directory_is_removed_and_no_other_is_taken(run: Run, here: Path) -> None:
    (here / "taken").mkdir()
    assert "is there already" in run("demo", PACKAGE, "--directory", "taken", code=2).err
    (here / "small").mkdir()
    assert "has only 0 files" in run("demo", "small", code=2).err


def test_what_it_picks(tmp_path: Path) -> None:
    for name in ("b/1.py", "b/__pycache__/1.pyc", "a/2.py"):
        (tmp_path / name).parent.mkdir(exist_ok=True, parents=True)
        (tmp_path / name).write_text(name)
    assert [local.name for local in pick(tmp_path, 10)] == ["packages/a/2.py", "packages/b/1.py"]
    assert len(pick(tmp_path, 1)) == 1


def flip_a_byte(step: str, directory: Path) -> None:
    if step == "imported":
        file = next(path for path in sorted((directory / "files").rglob("*.py")) if path.stat().st_size)
        data = bytearray(file.read_bytes())
        data[len(data) // 2] ^= 1
        file.write_bytes(data)


def leave_a_file(step: str, directory: Path) -> None:
    if step == "reconciled":
        (directory / "files" / "stray").write_text("x")


def lose_a_file(step: str, directory: Path) -> None:
    if step == "reconciled":
        next((directory / "files" / "packages").rglob("*.py")).unlink()


@pytest.mark.parametrize(
    ("meddle", "says"),
    [
        (flip_a_byte, "differ from its record"),
        (leave_a_file, "1 files on the disk that no record names"),
        (lose_a_file, "1 records without their file"),
    ],
)
@pytest.mark.asyncio
async def test_it_notices(meddle: object, says: str, tmp_path: Path) -> None:
    out, err = io.StringIO(), io.StringIO()
    with redirect_stdout(out), redirect_stderr(err):
        demo = Demo(Output(), tmp_path, pick(PACKAGE, 50), meddle=meddle)  # type: ignore[arg-type]
        good = await demo.run()
    assert not good
    assert any(says in problem for problem in demo.problems), demo.problems
    assert "NOT AS IT SHOULD BE" in out.getvalue()
    assert "Nothing lost" not in out.getvalue()
