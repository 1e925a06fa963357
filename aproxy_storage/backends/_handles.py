"""Open files: descriptors that close themselves, tokens in extended attributes, the names of temporaries."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import zlib
from collections.abc import Sequence

from ..errors import Conflict, StorageError

__all__ = ["HIDDEN", "Handle", "NoXattrs", "Opened", "close_all", "mark", "read_token", "temporary_name", "write_all"]

HIDDEN = ".aproxy-"  # begins the names of temporaries; no key may have a part that begins so
TOKEN_XATTR = "user.aproxy.token"

_NO_XATTRS = {errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS}


class Handle:
    """An open descriptor, closed with the last reference: a job that still runs in a worker keeps it open.

    Closing a descriptor that another thread is using would let the kernel give its number to another file.
    """

    __slots__ = ("fd",)

    def __init__(self, fd: int) -> None:
        self.fd = fd

    def close(self) -> None:
        fd, self.fd = self.fd, -1
        if fd >= 0:
            os.close(fd)

    def __del__(self, _suppress: type[contextlib.suppress] = contextlib.suppress) -> None:
        with _suppress(Exception):
            self.close()


class Opened(Handle):
    """A file open for reading, as it was when it was opened."""

    __slots__ = ("key", "status")

    changed_error: type[StorageError] = Conflict

    def __init__(self, key: str, fd: int) -> None:
        super().__init__(fd)
        self.key = key
        self.status = os.fstat(fd)

    def pread(self, count: int, offset: int) -> bytes:
        """Return `count` bytes, fewer only at the end."""
        data = os.pread(self.fd, count, offset)
        while len(data) < count and (more := os.pread(self.fd, count - len(data), offset + len(data))):
            data += more  # Linux reads at most 2 GiB a call, a network file system what it likes
        return data

    def read(self, start: int, stop: int) -> bytes:
        """Return the bytes from `start` to `stop`.

        Raises:
            Conflict: the file has changed since it was opened.
        """
        data = self.pread(stop - start, start)
        if len(data) < stop - start:
            raise Conflict(f"{self.key!r} has become shorter while it was read", path=self.key)
        now, then = os.fstat(self.fd), self.status
        if (now.st_mtime_ns, now.st_size) != (then.st_mtime_ns, then.st_size):
            raise Conflict(f"{self.key!r} was written to while it was read", path=self.key)
        return data


class NoXattrs(Exception):
    """The file system keeps no extended attributes."""


def close_all(descriptors: Sequence[int]) -> None:
    """Close directories."""
    for fd in descriptors:
        os.close(fd)


def write_all(fd: int, data: bytes | memoryview) -> None:
    """Write all of `data`."""
    written = os.write(fd, data)
    if written < len(data):
        view = memoryview(data)
        while written < len(data):
            written += os.write(fd, view[written:])


def read_token(fd: int) -> str | None:
    """Return the token of an open file, None where it has none.

    Raises:
        NoXattrs: the file system could not have kept one.
    """
    if not hasattr(os, "getxattr"):  # Python has it on Linux only
        raise NoXattrs
    try:
        return os.getxattr(fd, TOKEN_XATTR).decode(errors="replace")
    except OSError as error:
        if error.errno == errno.ENODATA:
            return None
        if error.errno in _NO_XATTRS:
            raise NoXattrs from error
        raise


def mark(fd: int, token: str) -> bool:
    """Keep the token with an open file; return whether the file system can."""
    if not hasattr(os, "setxattr"):
        return False
    try:
        os.setxattr(fd, TOKEN_XATTR, token.encode())
    except OSError as error:
        if error.errno not in _NO_XATTRS:
            raise
        return False
    return True


def temporary_name(name: str, token: str) -> str:
    """Return the name of the temporary of one write: short, whatever the length of `name`, and known to `discard`."""
    if not (token.isascii() and token.isalnum() and len(token) <= 64):
        token = hashlib.blake2b(token.encode(errors="replace"), digest_size=12).hexdigest()
    return f"{HIDDEN}{token}-{zlib.crc32(os.fsencode(name)):08x}.part"
