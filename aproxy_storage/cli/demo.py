"""``demo``: import a real tree, read it back, kill a second import half way, and clean up after it."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import shutil
import sys
import sysconfig
import tempfile
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from time import perf_counter
from typing import Annotated

import typer

from ..backends.filesystem import FileSystemBackend
from ..errors import ConfigurationError
from ..meta_backends.sqlite import SQLiteMetaBackend
from ..proxy import ProxyStorage
from ..records import MetaRecord
from ..tools.bulk import run_many
from ..tools.reconcile import reconcile
from .files import describe
from .output import Output, Tally, duration, size
from .session import FAILED, Session, command
from .transfer import put_files
from .trees import Local, checksum_of, files_below

__all__ = ["Demo", "demo", "pick", "register"]

_FILES = 3000
_LARGEST = 20_000_000
_LEFT_OUT = {"__pycache__", "site-packages", "dist-packages"}  # the latter two lie in the standard library
_IN_FLIGHT = 16  # saves of the child that are half done when it is killed


def register(app: typer.Typer) -> None:
    """Add this command to `app`."""
    command(app)(demo)


async def demo(
    session: Session,
    tree: Annotated[
        Path | None,
        typer.Argument(help="A directory to import; by default the packages of this Python.", show_default=False),
    ] = None,
    files: Annotated[int, typer.Option("--files", min=50, help="At most so many files.")] = _FILES,
    directory: Annotated[
        Path | None,
        typer.Option("--directory", metavar="DIR", help="Where to store them, and to leave them; must not exist.",
                     show_default=False),
    ] = None,
) -> None:  # fmt: skip
    """See it work: import some thousand files, verify them, kill an import half way, clean up, count what is left."""
    found = await asyncio.to_thread(pick, tree or Path(sysconfig.get_path("purelib")), files)
    if tree is None and len(found) < files:  # not much is installed here
        found += await asyncio.to_thread(pick, Path(sysconfig.get_path("stdlib")), files - len(found), "python")
    if len(found) < 50:
        raise ConfigurationError(f"{tree} has only {len(found)} files; the demo needs 50")
    if directory is not None:
        try:
            directory.mkdir(parents=True)
        except FileExistsError:
            raise ConfigurationError(f"{directory} is there already; the demo wants a directory of its own") from None
    with contextlib.ExitStack() as stack:
        if directory is None:
            directory = Path(tempfile.mkdtemp(prefix="aproxy-demo-"))
            stack.callback(shutil.rmtree, directory, ignore_errors=True)
        good = await Demo(session.out, directory, found).run()
    if not good:
        raise typer.Exit(FAILED)


def pick(tree: Path, count: int, name: str = "packages") -> list[Local]:
    """Return up to `count` files below `tree` under `name`, without caches, giants, and other packages' installs."""
    found: list[Local] = []
    for local in files_below(tree, name, recursive=True):
        if len(found) == count:
            break
        if local.error is None and local.size <= _LARGEST and not _LEFT_OUT & set(local.name.split("/")):
            found.append(local)
    return found


def _storage(directory: Path) -> ProxyStorage:
    return ProxyStorage(
        "demo", originals=FileSystemBackend(directory / "files"), meta=SQLiteMetaBackend(directory / "records.sqlite3")
    )


@dataclass
class Demo:
    """The demo, step by step; each step says what it sees, and `problems` collects what should not be.

    Attributes:
        meddle: called with the directory after the import, and once more at the end: for tests, which damage it.
    """

    out: Output
    directory: Path
    files: list[Local]
    meddle: Callable[[str, Path], None] = lambda step, directory: None
    problems: list[str] = field(default_factory=list)

    async def run(self) -> bool:
        """Do all steps; return whether everything was as it should be."""
        amount = sum(local.size for local in self.files)
        self._say(f"Importing {len(self.files):,} files, {size(amount)}, into {self.directory}")
        async with _storage(self.directory) as storage:
            session = Session(Output(quiet=True))
            session.out.terminal = False
            began = perf_counter()
            with self.out.progress("importing", len(self.files)) as bar:
                await put_files(session, storage, iter(self.files), bar)
            self._speed("stored", session.tally, amount, perf_counter() - began)
            if session.tally.failed:
                self._problem(f"{session.tally.failed} files could not be stored")
            self.meddle("imported", self.directory)
            await self._list(storage)
            await self._read_back(storage, amount)
        acknowledged = await self._kill_an_import()
        async with _storage(self.directory) as storage:
            await self._clean_up(storage, acknowledged)
        self._end()
        return not self.problems

    async def _list(self, storage: ProxyStorage) -> None:
        records = [record async for record in storage.list()]
        self._say(f"\nThe list has {len(records):,} files. The first three, and the record of one:\n")
        for record in records[:3]:
            self._say(f"{size(record.size):>12}  {record.path}")
        self._say("")
        if records:
            record = max(records, key=lambda record: record.size or 0)
            where = storage.get_original(record.original_storage_name).full_path(record.original_storage_path)
            for name, value in describe(record, where):
                self._say(f"{name:>12}  {value}")
        if {record.path for record in records} != {local.name for local in self.files}:
            self._problem("the list is not what was imported")

    async def _read_back(self, storage: ProxyStorage, amount: int) -> None:
        """Read every file, compare it with its record, and the record with the file that was imported."""
        sources = {local.name: local for local in self.files}

        async def check(record: MetaRecord) -> bool:
            async with storage.open(record, verify=True) as file:
                async for _ in file:
                    pass
            return record.checksum == await asyncio.to_thread(checksum_of, sources[record.path].file, "sha256")

        began = perf_counter()
        tally = Tally()
        with self.out.progress("reading back", len(self.files)) as bar:
            results = run_many(storage, storage.list(), check, name=lambda record: record, concurrency=8)
            async with contextlib.aclosing(results):
                async for result in results:
                    if result.error is not None:
                        self._problem(str(result.error))
                    elif not result.value:
                        self._problem(f"{result.item.path} is not what was imported")
                    else:
                        tally.add("read", result.item.size)
                    bar.advance(result.item.size)
        self._say("")
        self._speed("read back, every checksum right" if not self.problems else "read back", tally, amount,
                    perf_counter() - began)  # fmt: skip

    async def _kill_an_import(self) -> set[str]:
        """Let another process import the files again, and kill it half way; return what it was told is stored."""
        self._say(f"\nA second process imports them again. It is killed amid {_IN_FLIGHT} saves:")
        half = len(self.files) // 2
        child = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", __name__, str(self.directory), str(half)),
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
        )
        assert child.stdin is not None
        assert child.stdout is not None
        acknowledged: set[str] = set()
        try:
            for local in self.files:
                child.stdin.write(json.dumps([str(local.file), local.name]).encode() + b"\n")
            child.stdin.write_eof()
            while line := await asyncio.wait_for(child.stdout.readline(), 60):
                if line == b"half way\n":
                    break
                acknowledged.add(json.loads(line))
            else:
                self._problem("the second process ended by itself")
        finally:
            with contextlib.suppress(ProcessLookupError):
                child.kill()
            await child.communicate()
        self._say(f"{len(acknowledged):>8,}  files are stored, as it was told")
        return acknowledged

    async def _clean_up(self, storage: ProxyStorage, acknowledged: set[str]) -> None:
        report = await reconcile(storage, dry_run=True, force=True)
        self._say(f"{sum(report.counts.values()):>8,}  saves are left half done, and nobody will finish them")
        if not report.counts:
            self._problem("the kill hit no save in flight, so it has shown nothing")
        report = await reconcile(storage, dry_run=False, force=True)
        self._say("\nAfter aproxy reconcile --apply --force:")
        self.meddle("reconciled", self.directory)
        left = await reconcile(storage, dry_run=True, force=True)
        records = {record.path: record async for record in storage.list()}
        lost = acknowledged | {local.name for local in self.files}
        lost -= records.keys()
        on_disk = await asyncio.to_thread(lambda: set(_all_files(self.directory / "files")))
        named = {record.original_storage_path for record in records.values()}
        numbers = {
            "failed": report.counts.get("failed", 0),
            "left to do": sum(left.counts.values()) + await storage.meta.count() - len(records),
            "lost files": len(lost),
            "files on the disk that no record names": len(on_disk - named),
            "records without their file": len(named - on_disk),
        }
        self._say(f"{len(records):>8,}  files are stored")
        for name, number in numbers.items():
            self._say(f"{number:>8,}  {name}")
            if number:
                self._problem(f"{number} {name}")

    def _say(self, text: str) -> None:
        self.out.line(text)
        sys.stdout.flush()  # in a pipe too: what comes next takes a while

    def _speed(self, what: str, tally: Tally, amount: int, seconds: float) -> None:
        count = sum(tally.counts.values())
        rate = f"{count / seconds:,.0f} files/s, {size(round(amount / seconds))}/s"
        self._say(f"{count:,} files {what} in {duration(seconds)}: {rate}")

    def _problem(self, text: str) -> None:
        self.problems.append(text)
        self.out.problem(text)

    def _end(self) -> None:
        if self.problems:
            self._say(f"\nNOT AS IT SHOULD BE: {len(self.problems)} problems.")
            return
        next_steps = {
            "put -r DIRECTORY": "store a tree of your own, in ./aproxy-data; repeat it: what is there is skipped",
            "ls -l": "see what is there",
            "verify": "read it all and compare the checksums",
            "--help": "everything else",
        }
        self._say("\nNothing lost, nothing left over. What to try next:\n")
        for arguments, meaning in next_steps.items():
            self._say(f"    {_command()} {arguments:<18}{meaning}")
        self._say("")


def _command() -> str:
    """Return how this command is called from here: in a clone it is in no PATH."""
    own = Path(sys.executable).parent / "aproxy"
    if not own.exists():
        return "python -m aproxy_storage"
    return "aproxy" if shutil.which("aproxy") == str(own) else min(str(own), os.path.relpath(own), key=len)


def _all_files(root: Path) -> Iterator[str]:
    for directory, _, names in os.walk(root):
        for name in names:
            yield os.path.relpath(os.path.join(directory, name), root)


# -- the process that is killed


async def _second_import(directory: Path, half: int) -> None:
    """Store what stdin names, and say so; after `half` of it hang in the middle of every save."""
    loop = asyncio.get_running_loop()
    lines = await loop.run_in_executor(None, sys.stdin.read)
    files = [json.loads(line) for line in lines.splitlines()]
    hanging = asyncio.Semaphore(0)
    never = asyncio.Event()

    def say(line: str) -> None:
        sys.stdout.write(line + "\n")
        sys.stdout.flush()

    async def content(file: str) -> AsyncIterator[bytes]:
        data = await asyncio.to_thread(Path(file).read_bytes)
        yield data[: len(data) // 2] or b"."
        hanging.release()
        await never.wait()

    async def say_when() -> None:
        for _ in range(_IN_FLIGHT):
            await hanging.acquire()
        say("half way")

    def items() -> Iterator[tuple[str, object]]:
        for number, (file, name) in enumerate(files):
            yield f"again/{name}", Path(file) if number < half else content(file)

    async with _storage(directory) as storage, asyncio.TaskGroup() as group:
        group.create_task(say_when())
        async for result in storage.save_many(items(), concurrency=_IN_FLIGHT):
            if result.value is not None:
                say(json.dumps(result.value))


if __name__ == "__main__":
    asyncio.run(_second_import(Path(sys.argv[1]), int(sys.argv[2])))
