"""A caller's temporary file that becomes an object without a copy: one file under two names, until its record is there.

The order of the steps, and why it is that one, is in docs/design.md, §4.1. All of it runs in the workers.
"""

from __future__ import annotations

import logging
import os
import stat

from ._handles import TOKEN_XATTR, NoXattrs, Opened, read_token

__all__ = ["TakenFile", "may_be_taken"]

_log = logging.getLogger(__name__)


def may_be_taken(file: Opened) -> bool:
    """Return whether `file` could be claimed just now; a look before all of it is hashed."""
    status = os.fstat(file.fd)
    if status.st_nlink != 1 or os.geteuid() not in (0, status.st_uid) or not status.st_mode & stat.S_IWUSR:
        return False
    try:
        return read_token(file.fd) is None
    except (NoXattrs, OSError):
        return False


class TakenFile:
    """The caller's file while it becomes an object. Its old name is his until `release`.

    The token marks the object, as it marks any, and it is the claim too: only one of several writes can be the first to
    set it. So nobody else takes a file in that is claimed, is an object, or was left by a crash in between.
    """

    def __init__(self, file: Opened, *, durable: bool = False) -> None:
        self._file = file
        self._durable = durable
        self._mode: int | None = None  # that it had before, while it is claimed
        self._final = 0  # that of an object

    @property
    def claimed(self) -> bool:
        return self._mode is not None

    @property
    def names(self) -> int:
        """How many names the file has; 0: it was removed while it was open."""
        return os.fstat(self._file.fd).st_nlink

    def claim(self, token: str, mode: int) -> bool:
        """Give the file `token`, and the part of `mode` that gives nobody more than he had; the rest follows when the
        old name is gone. False: it is not the caller's alone, or does not let itself be marked; then it is as it was.
        """
        fd = self._file.fd
        before = os.fstat(fd)
        if before.st_nlink != 1 or not self._has_its_name():
            return False
        try:
            os.setxattr(fd, TOKEN_XATTR, token.encode(), os.XATTR_CREATE)
        except OSError:  # whatever it is, a copy works, or tells it better
            return False
        self._mode, self._final = stat.S_IMODE(before.st_mode), mode
        try:
            if self._mode != mode:  # also where that changes nothing yet: what refuses it now would refuse the rest
                os.fchmod(fd, self._mode & mode)
        except OSError:
            self.give_back()
            return False
        return True

    def give_back(self) -> None:
        """Make a claimed file what it was, unless an object is the same file still."""
        mode, self._mode = self._mode, None
        if mode is None or self.names > 1:
            return
        fd = self._file.fd
        if stat.S_IMODE(os.fstat(fd).st_mode) != mode:
            os.fchmod(fd, mode)
        os.removexattr(fd, TOKEN_XATTR)

    def settle(self) -> None:
        """`give_back` where the object is gone; one that is still there may have a record, and gets its mode."""
        if self.names > 1:
            self._complete()
        else:
            self.give_back()

    def release(self) -> None:
        """Take the old name away, if the object is still there under another; give that its mode; close the file."""
        try:
            if self.names > 1 and self._has_its_name():
                os.unlink(self._file.key)
        except OSError as error:
            _log.warning("a stored upload keeps its second name %r: %r", self._file.key, error)
        try:
            if self.names > 1 or not self._has_its_name():  # else the object is gone, and this is the caller's file
                self._complete()
        finally:
            self._file.close()

    def _complete(self) -> None:
        """Give the object its mode."""
        fd = self._file.fd
        try:
            if stat.S_IMODE(os.fstat(fd).st_mode) != self._final:
                os.fchmod(fd, self._final)
                if self._durable:
                    os.fsync(fd)
        except OSError as error:
            _log.warning("a stored upload, %r, does not get the mode %o: %r", self._file.key, self._final, error)

    def _has_its_name(self) -> bool:
        try:
            return os.path.samestat(os.lstat(self._file.key), os.fstat(self._file.fd))
        except OSError:
            return False
