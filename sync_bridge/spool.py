"""The temporary file behind a file that is open for writing."""

from __future__ import annotations

import io
import os
import sys
import tempfile
from collections.abc import Iterator
from typing import Any

if sys.platform != "win32":
    import fcntl

__all__ = ["Spool"]


class Spool(tempfile.SpooledTemporaryFile[bytes]):
    """What is written, and whether anything was."""

    changed = False
    appends = False  # whatever the position, writes go to the end
    for_reading = True  # by the user
    cut_to = sys.maxsize  # the least size that it was truncated to

    @property
    def bytes_file(self) -> Any:
        """The file itself, which may be read whatever the user may."""
        return self._file

    def pieces(self, size: int) -> Iterator[bytes]:
        """Read it from its start."""
        self.seek(0)
        return iter(lambda: self._file.read(size), b"")

    def fileno(self) -> int:
        """Move to a file of the disk and return its descriptor. Nobody sees what is done with that, so from now on
        anything may have been written, and any of the bytes that were there changed."""
        descriptor = super().fileno()
        self.flush()
        self.changed = True
        self.cut_to = 0
        if self.appends:
            os.lseek(descriptor, 0, os.SEEK_END)
            if sys.platform != "win32":
                flags = fcntl.fcntl(descriptor, fcntl.F_GETFL)
                fcntl.fcntl(descriptor, fcntl.F_SETFL, flags | os.O_APPEND)
        return descriptor

    def readable(self) -> bool:
        return self.for_reading

    def read(self, *args: Any) -> Any:
        return self._source().read(*args)

    def read1(self, *args: Any) -> Any:
        return self._source().read(*args)

    def readline(self, *args: Any) -> Any:
        return self._source().readline(*args)

    def readlines(self, *args: Any) -> Any:
        return self._source().readlines(*args)

    def __iter__(self) -> Iterator[bytes]:
        return iter(self._source())

    def _source(self) -> Any:
        if not self.for_reading and not self.closed:
            raise io.UnsupportedOperation("not readable")
        return self._file

    def write(self, data: Any) -> int:
        self.changed = True
        if self.appends:
            self.seek(0, io.SEEK_END)
        return super().write(data)

    def writelines(self, lines: Any) -> None:
        for line in lines:
            self.write(line)

    def truncate(self, size: int | None = None) -> int:
        self.changed = True
        size = self.tell() if size is None else size
        self.cut_to = min(self.cut_to, size)
        super().truncate(size)
        return size
