"""The tree of files below one root, seen synchronously: what the workers of `FileSystemBackend` run.

How a directory is reached is in `_directories`, how a file is written in `_draft`.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import math
import os
import stat
from collections.abc import Sequence

from ..errors import AccessDenied, DeadlineExceeded, NotFound
from ..records import ByteRange
from ..timeouts import elapsed
from ._directories import LISTED, Directories
from ._handles import HIDDEN, Handle, NoXattrs, Opened, close_all, read_token, temporary_name

__all__ = ["Permit", "Tree", "is_text"]

_log = logging.getLogger(__name__)

# O_NONBLOCK: opening a FIFO that lies where a file should be must not wait for its writer.
_READ = os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK


class Permit:
    """Leave to remove a name within `seconds` (None: whenever), until it is withdrawn.

    A worker that hung in the kernel looks at it right before it removes: by then the name may be another file's.
    """

    __slots__ = ("_until", "_withdrawn")

    def __init__(self, seconds: float | None) -> None:
        # Not for the loop alone to say: after the whole process was stopped, the worker may be the first to run.
        self._until = math.inf if seconds is None else elapsed() + seconds
        self._withdrawn = False

    def withdraw(self) -> None:
        """Have nothing removed from now on; called when nobody waits for the removal any more."""
        self._withdrawn = True

    def check(self) -> None:
        """Raise DeadlineExceeded if nothing may be removed any more."""
        if self._withdrawn or elapsed() >= self._until:
            raise DeadlineExceeded("the time for the removal was over before it was its turn; nothing was removed")


class Tree(Directories):
    """The files below `root`. As with its directories, all methods block, and nothing is bound to a thread."""

    def __init__(self, root: str, *, create: bool, file_mode: int | None, directory_mode: int | None) -> None:
        super().__init__(root, create=create, mode=directory_mode)
        self.file_mode = file_mode
        #: Whether files without a name can be made and published here; None: not tried yet.
        self.anonymous: bool | None = None

    # -- looking

    def open(self, key: str) -> Opened:
        """Open the file `key` for reading.

        Raises:
            NotFound: there is none, or no regular file. AccessDenied: it is a link.
        """
        with self.parent(key) as (at, name):
            try:
                opened = Opened(key, os.open(name, _READ, dir_fd=at))
            except OSError as error:
                if error.errno in (errno.ELOOP, errno.EMLINK):
                    self.refuse_link(name, at)
                if error.errno == errno.ENXIO:  # a socket
                    raise NotFound(f"{key!r} is not a regular file") from error
                raise
            if not stat.S_ISREG(opened.status.st_mode):
                opened.close()
                raise NotFound(f"{key!r} is not a regular file")
            return opened

    def read(self, key: str, byte_range: ByteRange | None, limit: int) -> tuple[Opened, int, int, bytes]:
        """Open `key`; return it, where the range begins and ends, and the first bytes of it, up to `limit`."""
        opened = self.open(key)
        start, stop = (byte_range or ByteRange()).resolve(opened.status.st_size)
        data = opened.read(start, min(stop, start + limit)) if stop > start else b""
        if stop - start <= limit:
            opened.close()
        return opened, start, stop, data

    def stat(self, key: str) -> tuple[os.stat_result, str | None]:
        """Return the status and the token of the file `key`."""
        with self.parent(key) as (at, name):
            status = os.stat(name, dir_fd=at, follow_symlinks=False)
            if stat.S_ISLNK(status.st_mode):
                self.refuse_link(name, at)
            if not stat.S_ISREG(status.st_mode):
                raise NotFound(f"{key!r} is not a regular file")
            try:
                handle = Handle(os.open(name, _READ, dir_fd=at))
            except PermissionError:  # it can be seen, but its token cannot be read
                return status, None
            try:
                with contextlib.suppress(NoXattrs):
                    return os.fstat(handle.fd), read_token(handle.fd)
                return os.fstat(handle.fd), None
            finally:
                handle.close()

    def is_taken(self, key: str) -> bool:
        """Return whether anything lies at `key` or in its way, of whatever kind."""
        try:
            with self.parent(key) as (at, name):
                os.stat(name, dir_fd=at, follow_symlinks=False)
        except NotFound as error:
            return isinstance(error.__cause__, NotADirectoryError)
        except AccessDenied:  # of a link; that of the system is none yet
            return True
        return True

    # -- removing

    def discard(self, key: str, token: str | None, permit: Permit) -> None:
        """Remove the file `key`, the temporary of the write `token`, and the directories left empty.

        Raises:
            OSError: natively. DeadlineExceeded: `permit` is over. AccessDenied: without a token, a link lies where the
                file or one of its directories should be: it may have been moved to where the link leads.
        """
        names = self.parts(key)
        root = self.enter()
        if names is None:
            return
        try:
            directories = self.descend(root.fd, names[:-1])
        except FileNotFoundError:
            self.prune_rest(root.fd, names)
            return
        except NotADirectoryError:
            return  # never written there
        except AccessDenied:
            if token is None:  # a directory that was moved away, and the file with it
                raise
            return  # not even through a link
        except OSError as error:
            if error.errno == errno.ENAMETOOLONG:
                return
            raise
        at, name = (directories[-1] if directories else root.fd), names[-1]
        try:
            if token is not None:
                permit.check()
                with contextlib.suppress(FileNotFoundError):
                    os.unlink(temporary_name(name, token), dir_fd=at)
            if self._may_remove(at, name, key, token):
                permit.check()  # between this and the next line a thread may still hang: see design.md, J2
                with contextlib.suppress(FileNotFoundError):
                    os.unlink(name, dir_fd=at)
            self.prune(root.fd, names, directories)
        finally:
            close_all(directories)

    def sync_discard(self, key: str) -> None:
        """Write to the disk what is left of the directories of the file `key`, up to the root.

        All of them: what was pruned may be back already, made anew by another write.
        """
        names = self.parts(key)
        root = self.enter()
        for depth in range(len(names or ()) - 1, -1, -1):
            try:
                directories = self.descend(root.fd, (names or ())[:depth])
            except (FileNotFoundError, NotADirectoryError, AccessDenied):
                continue
            except OSError as error:
                if error.errno == errno.ENAMETOOLONG:
                    continue
                raise
            try:
                self.sync(root.fd, directories)
            except FileNotFoundError:  # pruned at this moment
                continue
            finally:
                close_all(directories)
            return

    def _may_remove(self, at: int, name: str, key: str, token: str | None) -> bool:
        try:
            mode = os.stat(name, dir_fd=at, follow_symlinks=False).st_mode
            if not stat.S_ISREG(mode):
                if token is None and stat.S_ISLNK(mode):
                    self.refuse_link(name, at)
                return False  # a directory, a link, a pipe: not an object of ours
            if token is None:
                return True
            return self.token_at(at, name) == token
        except FileNotFoundError:
            return False
        except OSError as error:
            if error.errno in (errno.ENAMETOOLONG, errno.ELOOP):
                return False
            raise
        except NoXattrs:
            _log.warning(
                "%r below %r stays: the file system keeps no extended attributes, so that it cannot be told "
                "whether the write that is undone left it, or somebody else",
                key,
                self.root,
            )
            return False

    @staticmethod
    def token_at(at: int, name: str) -> str | None:
        """Return the token of the file `name`, None where it has none.

        Raises:
            NoXattrs: the file system could not have kept one. OSError: natively.
        """
        handle = Handle(os.open(name, _READ, dir_fd=at))
        try:
            return read_token(handle.fd)
        finally:
            handle.close()

    # -- listing

    def children(self, names: Sequence[str]) -> list[str]:
        """Return what lies in a directory, in byte order of the keys below it; directories end in a slash.

        Temporaries, links and special files are left out, and names that are not UTF-8, because no key names them.
        A directory that is missing is empty.
        """
        root = self.enter()
        try:
            directories = self.descend(root.fd, names)
        except (FileNotFoundError, NotADirectoryError, AccessDenied):
            return []
        found = []
        try:
            fd = os.open(".", LISTED, dir_fd=directories[-1] if directories else root.fd)
            try:
                with os.scandir(fd) as entries:
                    for entry in entries:
                        name = entry.name
                        if name.startswith(HIDDEN):
                            continue
                        if entry.is_dir(follow_symlinks=False):
                            name += "/"  # sorts as the keys below it do: "a-b" < "a/x" < "a0"
                        elif not entry.is_file(follow_symlinks=False):
                            continue
                        if not name.isascii() and not is_text(name):
                            _log.debug("not listed: %r below %r is not UTF-8", name, self.root)
                            continue
                        found.append(name)
            finally:
                os.close(fd)
        except FileNotFoundError:  # pruned at this moment
            return []
        except PermissionError:
            if list(names) != ["lost+found"]:
                raise
            # Of every ext4 disk, and root's alone. Elsewhere what cannot be listed must not seem to be empty.
            _log.warning("not listed: 'lost+found' below %r, which may not be read", self.root)
            return []
        finally:
            close_all(directories)
        found.sort()  # code points order as their UTF-8 bytes do
        return found

    def statuses(self, names: Sequence[str], files: Sequence[str]) -> list[tuple[str, os.stat_result]]:
        """Return the status of each of `files` in the directory `names` that is still there."""
        root = self.enter()
        try:
            directories = self.descend(root.fd, names)
        except (FileNotFoundError, NotADirectoryError, AccessDenied):
            return []
        found = []
        try:
            at = directories[-1] if directories else root.fd
            for name in files:
                with contextlib.suppress(FileNotFoundError):
                    status = os.stat(name, dir_fd=at, follow_symlinks=False)
                    if stat.S_ISREG(status.st_mode):
                        found.append((name, status))
        finally:
            close_all(directories)
        return found


def is_text(name: str) -> bool:
    """Return whether a key can name it: names that are not UTF-8 come with surrogates."""
    try:
        name.encode()
    except UnicodeEncodeError:
        return False
    return True
