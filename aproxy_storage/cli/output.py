"""Results to stdout, messages and progress to stderr: a bar on a terminal, plain lines in a pipe, JSON if asked for."""

from __future__ import annotations

import contextlib
import io
import json
import os
import re
import sys
from collections.abc import Iterator
from datetime import datetime
from typing import Any

from rich.console import Console
from rich.filesize import decimal
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    SpinnerColumn,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
)

from ..errors import StorageError
from ..records import MetaRecord

__all__ = [
    "Bar",
    "Output",
    "Tally",
    "WatchedFile",
    "described",
    "duration",
    "parse_duration",
    "printable",
    "reason",
    "size",
    "when",
]


def size(count: int | None) -> str:
    """Return a number of bytes as a person reads it: ``1.2 MB``; ``?`` where it is not known."""
    return "?" if count is None else decimal(count)


def when(instant: datetime | None) -> str:
    """Return an instant in local time, to the second; ``?`` where it is not known."""
    return "?" if instant is None else instant.astimezone().strftime("%Y-%m-%d %H:%M:%S")


def duration(seconds: float) -> str:
    """Return a duration as a person reads it: ``0.3 s``, ``2 min 5 s``, ``1 h 2 min``."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes = round(seconds) // 60
    return f"{minutes} min {round(seconds) % 60} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"


def parse_duration(text: str) -> float:
    """Return the seconds of ``90``, ``90s``, ``15m``, ``24h`` or ``7d``.

    Raises:
        ValueError: it is none of these.
    """
    found = re.fullmatch(r"(\d+(?:\.\d+)?)([smhd]?)", text.strip())
    if found is None:
        raise ValueError(f"{text!r} is no duration; write 90s, 15m, 24h or 7d")
    return float(found[1]) * {"": 1, "s": 1, "m": 60, "h": 3600, "d": 86_400}[found[2]]


def printable(text: str) -> str:
    """Return `text` fit for a terminal: what could be a control sequence, or is no text at all, is escaped."""
    return "".join(char if char.isprintable() else ascii(char)[1:-1] for char in text)


def reason(error: BaseException) -> str:
    """Return what an error says, its notes included: of several originals each has its own."""
    return "; ".join([str(error), *getattr(error, "__notes__", ())])


def described(record: MetaRecord) -> dict[str, Any]:
    """Return what ``--json`` tells of a record."""
    return {
        "path": record.path,
        "size": record.size,
        "content_type": record.content_type,
        "checksum": record.checksum,
        "created_at": record.created_at,
        "updated_at": record.updated_at,
        "name": record.name,
        "storage": record.proxy_storage_name,
        "original": record.original_storage_name,
        "key": record.original_storage_path,
        "version": record.version,
        "extra": dict(record.extra),
    }


class Tally:
    """How many files met which fate, and how many bytes they have."""

    def __init__(self) -> None:
        self.counts: dict[str, int] = {}
        self.bytes = 0
        self.failed = 0

    def add(self, action: str, count: int | None = 0) -> None:
        """Count a file of `count` bytes."""
        self.counts[action] = self.counts.get(action, 0) + 1
        self.bytes += count or 0

    def sentence(self) -> str:
        """Return it in words: ``12 stored, 3 skipped (4.5 MB), 1 failed``; nothing where nothing was counted."""
        parts = [f"{count:,} {action}" for action, count in self.counts.items()]
        text = ", ".join(parts)
        if text and self.bytes:
            text += f" ({size(self.bytes)})"
        if self.failed:
            text += f"{', ' if text else ''}{self.failed:,} failed"
        return text


class Bar:
    """A progress bar over files; without a terminal, nothing. May be moved from any thread.

    Attributes:
        shown: there is a terminal on which it is drawn.
    """

    def __init__(self, progress: Progress | None = None, task: TaskID | None = None) -> None:
        self.shown = progress is not None
        self._progress = progress
        self._task = task
        self._bytes = 0

    def advance(self, count: int | None = 0) -> None:
        """Count one more file, and `count` bytes."""
        self._move(1, count or 0)

    def moved(self, count: int) -> None:
        """Count bytes of a file that is not done yet; negative where they have to be moved again."""
        self._move(0, count)

    def _move(self, files: int, count: int) -> None:
        if self._progress is not None and self._task is not None:
            self._bytes += count
            self._progress.update(self._task, advance=files, bytes=size(self._bytes))


class WatchedFile(io.FileIO):
    """A local file that tells a bar of every piece that is read from it."""

    def __init__(self, path: str | os.PathLike[str], bar: Bar) -> None:
        super().__init__(os.fspath(path), "rb")
        self._bar = bar
        self._count = 0

    def read(self, limit: int | None = -1, /) -> bytes:
        data = super().read(-1 if limit is None else limit)
        self._count += len(data)
        self._bar.moved(len(data))
        return data

    def seek(self, offset: int, whence: int = os.SEEK_SET, /) -> int:
        """Go back to the start for a second attempt; what was told does not count any more."""
        self._bar.moved(-self._count)
        self._count = 0
        return super().seek(offset, whence)


class Output:
    """Where a command writes.

    Attributes:
        as_json: results are lines of JSON.
        quiet: no progress, no summary, no line for what went well.
        terminal: there is a terminal to draw on.
    """

    def __init__(self, *, as_json: bool = False, quiet: bool = False) -> None:
        self.as_json = as_json
        self.quiet = quiet
        self._console = Console(stderr=True, highlight=False, soft_wrap=True, markup=False, emoji=False)
        self.terminal = self._console.is_terminal

    def line(self, text: str) -> None:
        """Write one line of results."""
        sys.stdout.write(text + "\n")

    def json(self, value: dict[str, Any]) -> None:
        """Write one line of JSON; instants in ISO 8601."""
        # What another encoding cannot show would be written in escapes that are none of JSON.
        ascii_only = (sys.stdout.encoding or "").lower().replace("-", "") != "utf8"
        self.line(json.dumps(value, ensure_ascii=ascii_only, default=_plain))

    def done(self, action: str, path: str, *, told: bool = False, **fields: Any) -> None:
        """Tell what became of one file.

        `told`: it is what was asked for, so that it is written on a terminal too, where a bar shows the rest.
        """
        if self.as_json:
            self.json({"action": action, "path": path, **fields})
        elif not self.quiet and (told or not self.terminal):
            rest = "".join(f"  {name}={printable(str(value))}" for name, value in fields.items() if name == "file")
            self.line(f"{action}  {printable(path)}{rest}")

    def failed(self, path: str, error: StorageError, **fields: Any) -> None:
        """Tell that one file failed, and why."""
        if self.as_json:
            self.json({"action": "failed", "path": path, "error": str(error), "kind": type(error).__name__, **fields})
        else:
            self._console.print(f"failed  {printable(path)}: {printable(reason(error))}", style="red")

    def note(self, text: str) -> None:
        """Write a remark to stderr, unless the output is to be quiet or JSON."""
        if not (self.quiet or self.as_json):
            self._console.print(text)

    def problem(self, text: str) -> None:
        """Write what went wrong to stderr, always."""
        self._console.print(f"aproxy: {printable(text)}", style="bold red")

    def summary(self, tally: Tally) -> None:
        """Write what was done in all, where that is more than one file."""
        if sum(tally.counts.values()) + tally.failed > 1:
            self.note(tally.sentence())

    @contextlib.contextmanager
    def progress(self, what: str, total: int | None = None) -> Iterator[Bar]:
        """Show a bar while the block runs, on a terminal."""
        if not self.terminal or self.quiet or self.as_json:
            yield Bar()
            return
        columns = (
            SpinnerColumn(),
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("files  {task.fields[bytes]}"),
            TimeElapsedColumn(),
        )
        with Progress(*columns, console=self._console, transient=True) as progress:
            yield Bar(progress, progress.add_task(what, total=total, bytes="0 bytes"))


def _plain(value: Any) -> Any:
    return value.isoformat() if isinstance(value, datetime) else str(value)
