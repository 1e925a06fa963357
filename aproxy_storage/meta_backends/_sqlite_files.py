"""Which files an SQLite database is, so that one that was moved or replaced is told from the one that is open."""

from __future__ import annotations

import contextlib
import os

from ..errors import from_os_error

__all__ = ["Database", "File", "file_at", "logs_of"]

File = tuple[int, int] | None  # device and inode; None: there is none


def file_at(path: str) -> File:
    try:
        return _number(os.stat(path))
    except FileNotFoundError:
        return None
    except OSError as error:
        raise from_os_error(error, f"find {path}") from error


def logs_of(path: str) -> tuple[str, str]:
    """Return the paths of the log and its index; SQLite puts them beside what a symbolic link leads to."""
    real = os.path.realpath(path)
    return f"{real}-wal", f"{real}-shm"


class Database:
    """The files of the database at `path`, which is open."""

    __slots__ = ("_logs", "_main")

    def __init__(self, path: str) -> None:
        self._main = _Pinned(path)
        self._logs = [_Pinned(log) for log in logs_of(path)]

    @property
    def file(self) -> File:
        return self._main.file

    def left_beside(self, path: str) -> list[str]:
        """Return the paths at which its log and the index of that still are, for a database at `path`."""
        return [
            log
            for log, ours in zip(logs_of(path), self._logs, strict=True)
            if ours.file is not None and ours.file == file_at(log)
        ]


class _Pinned:
    """The file at a path. Where the system can (Linux), its number goes to no other file as long as this is kept."""

    __slots__ = ("_descriptor", "file")

    def __init__(self, path: str) -> None:
        self._descriptor: int | None = None
        # Not opened as usual: to close that would release the locks of SQLite.
        flags: int | None = getattr(os, "O_PATH", None)
        if flags is not None:
            with contextlib.suppress(OSError):  # no such file, or no descriptor is left
                self._descriptor = os.open(path, flags)
        self.file = file_at(path) if self._descriptor is None else _number(os.fstat(self._descriptor))

    def __del__(self) -> None:
        if self._descriptor is not None:
            os.close(self._descriptor)


def _number(found: os.stat_result) -> tuple[int, int]:
    return found.st_dev, found.st_ino
