"""The directories below one root, seen synchronously: opened, made, pruned and synced.

Each is opened from its parent's descriptor, without following links, so that neither a link nor a directory renamed
meanwhile leads out of the root. Directories come and go while others work: a step that finds one pruned makes it again.
"""

from __future__ import annotations

import contextlib
import errno
import os
import stat
import weakref
from collections.abc import Callable, Iterator, Sequence
from typing import TypeVar

from ..errors import AccessDenied, BackendUnavailable, InvalidPath, NotFound
from ._handles import HIDDEN, Handle, close_all

__all__ = ["LISTED", "Directories"]

T = TypeVar("T")

# O_PATH needs no right to read the directory, and works on it without waking an automounter's listing.
_DIRECTORY = os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC | getattr(os, "O_PATH", os.O_RDONLY)
LISTED = os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_RDONLY

_TRIES = 1000  # how often a directory may be pruned under one write; a limit only against an endless loop


class _Root(Handle):
    """The root, kept open so that its inode number cannot be given to another directory."""

    __slots__ = ("identity",)

    def __init__(self, fd: int) -> None:
        super().__init__(fd)
        status = os.fstat(fd)
        self.identity = (status.st_dev, status.st_ino)


# Not locked, so that a fork cannot leave it so.
_trees: weakref.WeakValueDictionary[int, Directories] = weakref.WeakValueDictionary()


class Directories:
    """The directories below `root`. All methods block; nothing in here is bound to a thread, a loop or a process.

    A forked child may go on with its copies of the descriptors: they have no state that could be shared.
    """

    def __init__(self, root: str, *, create: bool, mode: int | None) -> None:
        self.root = root
        self.directory_mode = mode
        self._create = create
        self._seen = False
        self._handle: _Root | None = None
        _trees[id(self)] = self

    # -- the root

    def enter(self) -> _Root:
        """Return the open root, having looked that it still is what it was.

        The caller keeps the reference for as long as it uses the descriptor.

        Raises:
            BackendUnavailable: the root is gone, no directory, or another one than at first.
        """
        # Not locked: of two threads that open it at once either handle will do.
        handle = self._handle
        if handle is None:
            handle = self._handle = self._open_root()
        try:
            status = os.stat(self.root)
        except OSError as error:
            raise self._no_root(error) from error
        if (status.st_dev, status.st_ino) != handle.identity:
            what = "a different directory" if stat.S_ISDIR(status.st_mode) else "not a directory"
            raise BackendUnavailable(
                f"the root {self.root!r} is {what} now: replaced, unmounted, or mounted over. Nothing was touched; "
                "aclose() makes the backend accept what is there"
            )
        return handle

    def leave(self) -> None:
        """Forget the root; its descriptor is closed as soon as no job uses it."""
        self._handle = None

    def _open_root(self) -> _Root:
        flags = _DIRECTORY & ~os.O_NOFOLLOW  # the root itself may be a link
        try:
            try:
                fd = os.open(self.root, flags)
            except FileNotFoundError:
                if not self._create:
                    raise
                # A root that was here once and is gone is an unmounted disk or a mistake: never made anew. But only
                # a second look tells that from one which another thread has made since the first.
                if not self._seen:
                    self._make_directory(self.root, None)
                    with contextlib.suppress(PermissionError):  # it may be written to, but not read: nothing to be done
                        self._sync(os.path.dirname(self.root))
                fd = os.open(self.root, flags)
        except OSError as error:
            raise self._no_root(error) from error
        self._seen = True
        return _Root(fd)

    def _no_root(self, error: OSError) -> BackendUnavailable:
        hint = "" if self._seen or not self._create else "; its parent directory must exist"
        return BackendUnavailable(f"the root {self.root!r} cannot be used: {error.strerror}{hint}")

    # -- directories

    @staticmethod
    def parts(key: str) -> list[str] | None:
        """Return the parts of `key`; None if it could never name a file below the root."""
        names = key.split("/")
        for name in names:
            if name in ("", ".", "..") or "\0" in name or name.startswith(HIDDEN):
                return None
        try:
            os.fsencode(key)
        except UnicodeEncodeError:
            return None
        return names

    def descend(self, root: int, names: Sequence[str], made: list[str] | None = None) -> list[int]:
        """Open the directories `names`, each below the one before; return their descriptors.

        With a list `made`, missing ones are made and named in it.

        Raises:
            FileNotFoundError: one is missing; with `made`: it was pruned at this moment, try again from the root.
            NotADirectoryError: something else lies there. AccessDenied: a link lies there.
        """
        opened: list[int] = []
        at = root
        try:
            for name in names:
                try:
                    fd = os.open(name, _DIRECTORY, dir_fd=at)
                except FileNotFoundError:
                    if made is None:
                        raise
                    if self._make_directory(name, at):
                        made.append(name)
                    fd = os.open(name, _DIRECTORY, dir_fd=at)
                except OSError as error:
                    if error.errno in (errno.ENOTDIR, errno.ELOOP, errno.EMLINK):
                        self.refuse_link(name, at)
                    raise
                opened.append(fd)
                at = fd
        except BaseException:
            close_all(opened)
            raise
        return opened

    def below(self, names: Sequence[str], made: list[str], work: Callable[[int, int, list[int]], T]) -> T:
        """Call ``work(parent, root, directories)``, all descriptors, for the file `names`.

        Missing directories are made and named in `made`; where one is pruned before `work` has put something into
        it, all is done again, so `work` must bear being repeated after an OSError.
        """
        for _ in range(_TRIES):
            root = self.enter()
            try:
                directories = self.descend(root.fd, names[:-1], made)
            except FileNotFoundError:
                continue
            except NotADirectoryError as error:
                raise InvalidPath(
                    f"a file lies where {'/'.join(names)!r} needs a directory; choose another key"
                ) from error
            at = directories[-1] if directories else root.fd
            try:
                return work(at, root.fd, directories)
            except FileNotFoundError:
                continue
            except OSError:
                # ext4 does not say "no such directory" of one that was removed, but "not permitted". Some FUSE give
                # every directory no links.
                if os.fstat(at).st_nlink or self._is_still_there(root.fd, names[:-1], at):
                    raise
                continue
            finally:
                close_all(directories)
        raise BackendUnavailable(f"the directory of {'/'.join(names)!r} was removed {_TRIES} times while it was needed")

    def _is_still_there(self, root: int, names: Sequence[str], directory: int) -> bool:
        try:
            found = self.descend(root, names)
        except FileNotFoundError:
            return False
        try:
            return os.path.samestat(os.fstat(found[-1] if found else root), os.fstat(directory))
        finally:
            close_all(found)

    @contextlib.contextmanager
    def parent(self, key: str) -> Iterator[tuple[int, str]]:
        """Open the directory of `key` for a look-up; give its descriptor and the last part of the key.

        Raises:
            NotFound: there is no such directory, or `key` is no possible name.
        """
        root = self.enter()
        names = self.parts(key)
        if names is None:
            raise NotFound(f"{key!r} cannot name a file here")
        with self._missing(key):
            directories = self.descend(root.fd, names[:-1])
        try:
            with self._missing(key):
                yield directories[-1] if directories else root.fd, names[-1]
        finally:
            close_all(directories)

    @contextlib.contextmanager
    def _missing(self, key: str) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            if error.errno in (errno.ENOENT, errno.ENOTDIR, errno.ENAMETOOLONG, errno.EISDIR) and not isinstance(
                error, NotFound
            ):
                raise NotFound(f"there is no file {key!r} below {self.root!r}") from error
            raise

    def prune(self, root: int, names: Sequence[str], directories: Sequence[int]) -> None:
        """Remove the directories of the file `names` from the innermost one outwards, while they are empty, and none
        is the root of another tree: that would look unmounted."""
        for depth in range(len(directories) - 1, -1, -1):
            try:
                if len(_trees) > 1 and self._is_a_root(names[: depth + 1], directories[depth]):
                    return
                os.rmdir(names[depth], dir_fd=directories[depth - 1] if depth else root)
            except OSError:  # not empty, gone already, or not ours to remove: in any case the end
                return

    def _is_a_root(self, names: Sequence[str], directory: int) -> bool:
        """Return whether a directory below this root is that of another tree of this process. No other disk is asked
        for it, which might hang: known are the paths as they were given, and the roots that are open."""
        status = os.fstat(directory)
        identity = (status.st_dev, status.st_ino)
        paths = {os.path.join(root, *names) for root in (self.root, os.path.realpath(self.root))}
        for reference in _trees.valuerefs():
            tree = reference()
            if tree is None or tree is self:
                continue
            handle = tree._handle
            if tree.root in paths or (handle is not None and handle.identity == identity):
                return True
        return False

    def prune_rest(self, root: int, names: Sequence[str]) -> None:
        """Remove what a write of the file `names` has left that was killed before all its directories were made."""
        for depth in range(len(names) - 2, 0, -1):
            try:
                directories = self.descend(root, names[:depth])
            except (FileNotFoundError, NotADirectoryError, AccessDenied):
                continue
            try:
                self.prune(root, names, directories)
            finally:
                close_all(directories)
            return

    def sync(self, root: int, directories: Sequence[int]) -> None:
        """Write the directories and the root to the disk.

        All of them: who made one of them may not have synced it.
        """
        for fd in (*reversed(directories), root):
            self._sync(".", fd)

    @staticmethod
    def _sync(path: str, at: int | None = None) -> None:
        listed = os.open(path, LISTED if at is not None else LISTED & ~os.O_NOFOLLOW, dir_fd=at)
        try:
            os.fsync(listed)
        finally:
            os.close(listed)

    def _make_directory(self, name: str, at: int | None) -> bool:
        try:
            os.mkdir(name, 0o777 if self.directory_mode is None else self.directory_mode, dir_fd=at)
        except FileExistsError:
            return False
        if self.directory_mode is not None:  # exactly that, whatever the umask; but an inherited setgid bit stays
            fd = os.open(name, LISTED, dir_fd=at)
            try:
                mode = stat.S_IMODE(os.fstat(fd).st_mode)
                wanted = self.directory_mode | mode & stat.S_ISGID
                if mode != wanted:
                    os.fchmod(fd, wanted)
            finally:
                os.close(fd)
        return True

    @staticmethod
    def refuse_link(name: str, at: int) -> None:
        """Raise AccessDenied if `name` is a link."""
        try:
            mode = os.stat(name, dir_fd=at, follow_symlinks=False).st_mode
        except OSError:
            return
        if stat.S_ISLNK(mode):
            raise AccessDenied(
                f"{name!r} is a symbolic link; links below the root are not followed. Mount a directory there instead"
            )
