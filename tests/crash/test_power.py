"""With durability="power" every step is on the disk before the next one counts on it: from a trace of system calls."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.crash.arena import Arena

ROOT = Path(__file__).resolve().parents[2]
CALLS = (
    "write,pwrite64,writev,pwritev,copy_file_range,ftruncate,fsync,fdatasync,sync_file_range,"
    "linkat,link,mkdirat,mkdir,renameat,renameat2,rename,unlinkat,unlink,rmdir"
)

_WHOLE = re.compile(r"(\d+) +(\w+)\((.*)\) += (-?\d+)")
_BEGUN = re.compile(r"(\d+) +(\w+)\((.*) <unfinished \.\.\.>")
_ENDED = re.compile(r"(\d+) +<\.\.\. (\w+) resumed>.*\) += (-?\d+)")


@dataclass
class Call:
    """One system call that succeeded: from line `begun` to line `ended` of the trace."""

    name: str
    arguments: str
    begun: int
    ended: int = -1

    @property
    def target(self) -> str:
        """The path of the descriptor that is the first argument, or the first argument itself."""
        found = re.match(r"(?:\w+<([^>]*)>|\"([^\"]*)\")", self.arguments)
        return (found[1] or found[2] or "") if found else ""

    @property
    def path(self) -> str:
        """The path of what gets or loses a name: (directory, name), or a whole path."""
        parts = re.findall(r"<([^>]*)>, \"([^\"]*)\"", self.arguments)
        return os.path.join(*parts[-1]) if parts else self.target


def parse(trace: str) -> list[Call]:
    calls: list[Call] = []
    under_way: dict[str, Call] = {}
    for number, line in enumerate(trace.splitlines()):
        if found := _WHOLE.match(line):
            if int(found[4]) >= 0:
                calls.append(Call(found[2], found[3], number, number))
        elif found := _BEGUN.match(line):
            under_way[found[1]] = Call(found[2], found[3], number)
            calls.append(under_way[found[1]])
        elif (found := _ENDED.match(line)) and found[1] in under_way:
            call = under_way.pop(found[1])
            call.ended = number if int(found[3]) >= 0 else -1
    return [call for call in calls if call.ended >= 0]


class Trace:
    """The calls between two marks, and questions about their order."""

    def __init__(self, calls: list[Call], root: Path) -> None:
        self.calls = calls
        self.root = root

    def between(self, first: str, last: str) -> Trace:
        marks = {
            call.arguments.split('"')[1].rstrip(";"): call for call in self.calls if call.target.endswith("/marks")
        }
        begin, end = marks[first], marks[last]
        return Trace([call for call in self.calls if begin.ended < call.ended and call.begun < end.begun], self.root)

    def all(self, what: Callable[[Call], bool]) -> list[Call]:
        return [call for call in self.calls if what(call)]

    def after(self, other: Call, what: Callable[[Call], bool]) -> Call:
        """Return the first of `what` that begins when `other` is over."""
        found = [call for call in self.calls if call.begun > other.ended and what(call)]
        assert found, f"nothing of the kind after {other}; there is:\n" + "\n".join(map(str, self.calls))
        return found[0]

    # -- kinds of calls

    def log_written(self, call: Call) -> bool:
        return call.name == "pwrite64" and call.target.endswith("-wal")

    def log_synced(self, call: Call) -> bool:
        return call.name in ("fsync", "fdatasync") and call.target.endswith("-wal")

    def bytes_written(self, call: Call) -> bool:
        return call.name in ("write", "writev", "pwrite64", "copy_file_range") and self.in_originals(call.target)

    def file_synced(self, call: Call) -> bool:
        return call.name in ("fsync", "fdatasync") and self.in_originals(call.target) and not self._directory(call)

    def linked(self, call: Call) -> bool:
        return call.name in ("link", "linkat")

    def unlinked(self, call: Call) -> bool:
        return call.name in ("unlink", "unlinkat") and "AT_REMOVEDIR" not in call.arguments

    def made(self, call: Call) -> bool:
        return call.name in ("mkdir", "mkdirat")

    def synced(self, directory: str | Path) -> Callable[[Call], bool]:
        return lambda call: call.name == "fsync" and call.target == str(directory)

    def in_originals(self, path: str) -> bool:
        return any(path.startswith(f"{self.root / name}/") for name in ("a", "b"))

    def _directory(self, call: Call) -> bool:
        # A file that is being written has no name yet, or a hidden one.
        return "(deleted)" not in call.arguments and ".aproxy-" not in call.arguments

    # -- what must be so

    def committed_before(self, step: Call) -> Call:
        """Hold the log to be synced, with something new in it, before `step` begins; return that sync."""
        written = self.all(self.log_written)
        assert written, "nothing was written to the log"
        synced = self.after(written[0], self.log_synced)
        assert synced.ended < step.begun, f"{step} begins before {synced} is over"
        return synced

    def written_durably(self, last: Call) -> Call:
        """Hold the new file and every new directory to be synced before `last`; return the link of the file."""
        written = self.all(self.bytes_written)
        linked = self.all(self.linked)
        assert written
        assert len(linked) == 1
        file_synced = self.after(written[-1], self.file_synced)
        assert file_synced.ended < linked[0].begun, "the file gets its name before its bytes are on the disk"
        directories = {os.path.dirname(linked[0].path)}
        directories |= {os.path.dirname(made.path) for made in self.all(self.made)}
        for directory in directories:
            synced = self.after(linked[0], self.synced(directory))
            assert synced.ended < last.begun, f"{directory} is not on the disk before {last}"
        return linked[0]


@pytest.fixture(scope="module")
def trace(tmp_path_factory: pytest.TempPathFactory) -> Trace:
    strace = shutil.which("strace")
    if strace is None:
        pytest.skip("strace is not installed (apt-get install strace), so no order of system calls can be seen")
    root = tmp_path_factory.mktemp("power").resolve()
    probe = subprocess.run([strace, "-o", os.devnull, "true"], capture_output=True, text=True, check=False)
    if probe.returncode:
        pytest.skip(f"strace may not trace here: {probe.stderr.strip()}")
    Arena(root).make()
    subprocess.run(
        [strace, "-f", "-y", "-e", f"trace={CALLS}", "-o", str(root / "trace"),
         sys.executable, "-m", "tests.crash.powered", str(root)],
        cwd=ROOT, check=True, timeout=120,
    )  # fmt: skip
    return Trace(parse((root / "trace").read_text(errors="replace")), root)


@pytest.mark.parametrize("what", ["small", "large"])
def test_a_save_is_on_the_disk_when_it_is_acknowledged(trace: Trace, what: str) -> None:
    save = trace.between(f"save {what}", f"saved {what}")
    first_byte = save.all(save.bytes_written)[0]
    reserved = save.committed_before(first_byte)
    commit = save.all(lambda call: save.log_written(call) and call.begun > first_byte.ended)[0]
    save.written_durably(commit)
    save.after(commit, save.log_synced)  # and the acknowledgement comes after, because it ends this part
    first_mkdir = (save.all(save.made) or [first_byte])[0]
    assert reserved.ended < first_mkdir.begun
    assert (what == "large") == bool(save.all(save.made))


@pytest.mark.parametrize(("verb", "done"), [("replace", "replaced"), ("move", "moved")])
def test_new_bytes_are_on_the_disk_before_the_record_names_them_and_old_ones_go_after(
    trace: Trace, verb: str, done: str
) -> None:
    part = trace.between(verb, done)
    first_byte = part.all(part.bytes_written)[0]
    part.committed_before(first_byte)
    swap = part.all(lambda call: part.log_written(call) and call.begun > first_byte.ended)[0]
    part.written_durably(swap)
    swapped = part.after(swap, part.log_synced)
    gone = part.all(part.unlinked)
    assert len(gone) == 1
    assert swapped.ended < gone[0].begun, "the old bytes go before it is on the disk that they are not needed"


def test_a_delete_is_on_the_disk_before_the_bytes_go(trace: Trace) -> None:
    delete = trace.between("delete", "deleted")
    gone = delete.all(delete.unlinked)
    assert len(gone) == 1
    delete.committed_before(gone[0])


@pytest.mark.parametrize(("verb", "done"), [("replace", "replaced"), ("move", "moved"), ("delete", "deleted")])
def test_bytes_are_gone_from_the_disk_before_their_name_leaves_the_record(trace: Trace, verb: str, done: str) -> None:
    """Else a file might come back with the power, and no record would name it."""
    part = trace.between(verb, done)
    gone = part.all(part.unlinked)[0]
    directory = os.path.dirname(gone.path)
    for removed in part.all(lambda call: "AT_REMOVEDIR" in call.arguments):
        directory = min(directory, os.path.dirname(removed.path), key=len)
    synced = part.after(gone, part.synced(directory))
    forgotten = part.after(gone, part.log_written)
    assert synced.ended < forgotten.begun


def test_a_root_that_was_made_is_on_the_disk_too(trace: Trace) -> None:
    part = trace.between("make a root", "made a root")
    made = part.all(part.made)
    assert [call.target for call in made] == [str(trace.root / "made")]
    part.after(made[0], part.synced(trace.root))
