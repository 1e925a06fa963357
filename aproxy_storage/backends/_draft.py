"""A file on its way into a `Tree`: from the first byte to the moment it can be seen. Runs in the workers."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import functools
import hashlib
import logging
import os
import stat
import threading
import time
from collections.abc import Callable
from typing import Any, TypeVar

from ..errors import AlreadyExists, Conflict, ContentError
from ._handles import Handle, Opened, close_all, mark, temporary_name, write_all
from ._posix import Tree
from ._taking import TakenFile, may_be_taken

__all__ = ["CallersFile", "Draft", "Withdrawn", "hash_part"]

_log = logging.getLogger(__name__)

T = TypeVar("T")

_FICLONE = 0x40049409  # linux/fs.h: share the blocks of another file
_NO_TMPFILE = {errno.EOPNOTSUPP, errno.ENOTSUP, errno.EISDIR, errno.EINVAL}
_NO_COPY_RANGE = {errno.EXDEV, errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOTSUP, errno.EPERM, errno.EIO}
_NO_LINKS = {errno.EPERM, errno.EOPNOTSUPP, errno.ENOTSUP, errno.ENOSYS}
# Of a link from elsewhere: another mount of the same disk, another quota; not ours to link; too many links.
_NO_MOVE = {errno.EXDEV, errno.EPERM, errno.EMLINK}
_STEP = 1 << 20  # bytes read at once where the kernel cannot copy by itself
_PIECE = 256 << 10  # bytes hashed at once: what a core's cache holds


class Withdrawn(Exception):
    """The task that wanted this draft is gone."""


class _NotTaken(Exception):
    """The caller's file cannot become the object: it is not his alone, or has no name any more."""


@functools.cache
def _links_descriptors() -> bool:
    """Return whether a file without a name can be given one: by its entry below /proc."""
    return hasattr(os, "O_TMPFILE") and os.path.isdir("/proc/self/fd")


class Draft:
    """One write. Its steps run in workers, one after the other, each as
    ``workers.call(draft.run, step, …)``.

    A thread cannot be cancelled. So the task that gives up *withdraws* the draft: a step that has not begun never
    does, one under way looks at the flag right before the file gets its name, and once more right after; whichever
    side comes last removes what is left. A withdrawn draft therefore is either never seen, or was for a moment.

    A file without a name (O_TMPFILE) is preferred: the kernel removes it, whatever happens. Where the file system has
    none, a hidden name in the same directory does; `Tree.discard` with the write's token finds it after a crash.
    """

    def __init__(self, tree: Tree, key: str, token: str, *, durable: bool = False) -> None:
        self.key = key
        self._tree = tree
        self._names = key.split("/")
        self._token = token
        self._durable = durable
        self._handle: Handle | None = None
        self._temporary: str | None = None  # its name, where the file has one already
        self._taken: TakenFile | None = None  # the caller's, where the file is that
        self._made: list[str] = []
        self._status: os.stat_result  # of the whole file
        self._marked = False  # it carries the token
        self._lock = threading.Lock()
        self._busy = False
        self._withdrawn = False
        self._published = False  # or may be
        self._when_idle: Callable[[], None] | None = None

    # -- for the task

    def withdraw(self) -> None:
        """Give the draft up. Never waits for a step."""
        with self._lock:
            self._withdrawn = True

    @property
    def certain(self) -> bool:
        """Whether a withdrawn draft is not published, and never will be."""
        return not self._published

    @property
    def left(self) -> bool:
        """Whether there is something that `remove` must remove, or a step under way that will."""
        return self._busy or self._anything

    @property
    def status(self) -> os.stat_result:
        """Of the whole file, once it has its name."""
        return self._status

    @property
    def begun(self) -> bool:
        """Whether there is a file to `write` to already."""
        return self._handle is not None

    @property
    def pinned(self) -> bool:
        """Whether the published file is still open: without a token, only so its inode number cannot become that of
        another file, which a late removal would take for this one."""
        return self._handle is not None

    def unpin(self) -> None:
        """Close it; in a worker, because a network file system may wait there."""
        handle, self._handle = self._handle, None
        if handle is not None:
            handle.close()  # whoever else refers to it is the task, which would close it in the loop

    @property
    def handle(self) -> Handle:
        """The open file, for reading; whoever keeps the reference keeps it open."""
        if self._handle is None:
            raise Withdrawn
        return self._handle

    def when_idle(self, callback: Callable[[], None]) -> bool:
        """Have `callback` called by the worker at the end of the step under way; return False if there is none."""
        with self._lock:
            if self._busy:
                self._when_idle = callback
            return self._busy

    def leave(self) -> None:
        """Take note that no step is under way: the thread that did them is back, perhaps from an interrupt."""
        self._busy = False

    # -- for the worker

    def run(self, step: Callable[..., T], *args: Any) -> T:
        """Do one step; away with everything if it fails, or if the draft is withdrawn by the end of it."""
        with self._lock:
            if self._withdrawn:
                raise Withdrawn
            self._busy = True
        try:
            return step(*args)
        except BaseException:
            self._withdrawn = True
            raise
        finally:
            self._idle()

    def remove(self) -> None:
        """Remove what is left of a withdrawn draft, unless a step under way will."""
        with self._lock:
            if self._busy:
                return
            self._busy = True
        self._idle()

    @property
    def _anything(self) -> bool:
        return self._published or self._handle is not None or bool(self._made)

    def _idle(self) -> None:
        removed = False
        callback = None
        while True:
            with self._lock:
                if removed or not (self._withdrawn and self._anything):
                    self._busy = False
                    callback, self._when_idle = self._when_idle, None
                    break
            try:
                self._remove()
            except Exception as error:
                _log.warning("what is left of a write of %r could not be removed: %r", self.key, error)
            removed = True
        if callback is not None:
            callback()

    def _remove(self) -> None:
        made, self._made = self._made, []
        temporary, self._temporary = self._temporary, None
        taken, self._taken = self._taken, None
        try:
            if made or temporary is not None or self._published:
                self._remove_names(temporary, prune=bool(made))
        finally:
            self._handle = None
            if taken is not None:  # after the name: what has no token could not be told to be ours
                taken.give_back()

    def _remove_names(self, temporary: str | None, *, prune: bool) -> None:
        root = self._tree.enter()
        try:
            directories = self._tree.descend(root.fd, self._names[:-1])
        except (FileNotFoundError, NotADirectoryError):
            self._published = False
            return
        try:
            at = directories[-1] if directories else root.fd
            if temporary is not None:
                with contextlib.suppress(FileNotFoundError):
                    os.unlink(temporary, dir_fd=at)
            if self._published:
                if self._is_ours(at):
                    os.unlink(self._names[-1], dir_fd=at)
                self._published = False
            if prune:
                self._tree.prune(root.fd, self._names, directories)
        finally:
            close_all(directories)

    # -- the steps

    def create(self, data: bytes) -> os.stat_result:
        """Write and publish a small file: everything in one hop."""

        def work(at: int, root: int, directories: list[int]) -> os.stat_result:
            if self._handle is None:
                write_all(self._open_at(at), data)
                self._complete()
            return self._publish_at(at, root, directories)

        return self._finished(work)

    def begin(self) -> None:
        """Open the file that the following steps write to."""
        if self._handle is None:
            self._tree.below(self._names, self._made, lambda at, _root, _directories: self._open_at(at))

    def write(self, data: bytes | memoryview) -> None:
        """Append `data`."""
        self.begin()
        write_all(self.handle.fd, data)

    def finish(self, data: bytes) -> os.stat_result:
        """Append `data` and give the file its name.

        Raises:
            AlreadyExists: the name is taken.
        """
        self.begin()
        if data:
            write_all(self.handle.fd, data)
        self._complete()
        return self._finished(self._publish_at)

    def create_hashed(self, data: bytes, algorithm: str | None) -> tuple[os.stat_result, str | None]:
        """`create`, and return the checksum too."""
        checksum = f"{algorithm}:{hashlib.new(algorithm, data).hexdigest()}" if algorithm else None
        return self.create(data), checksum

    def copy_from(self, source: Opened, count: int, seconds: float) -> int | None:
        """Share the blocks of `source`, or else begin to `copy` it; return the bytes that are there now.

        None: it is the caller's and not on the disk that the draft is on, which must not be blamed for that one.
        """
        self.begin()
        try:
            fcntl.ioctl(self.handle.fd, _FICLONE, source.fd)
        except OSError:
            if isinstance(source, CallersFile) and source.status.st_dev != os.fstat(self.handle.fd).st_dev:
                return None
            return self.copy(source, count, seconds)
        return os.lseek(self.handle.fd, 0, os.SEEK_END)

    def copy(self, source: Opened, count: int, seconds: float) -> int:
        """Append further bytes of `source`, `count` and again as many for about `seconds`; return the bytes that are
        there now."""
        at = os.lseek(self.handle.fd, 0, os.SEEK_CUR)
        until = time.monotonic() + seconds
        while True:
            before, at = at, self._copy_slice(source, at, at + count)
            if at - before < count or time.monotonic() >= until or self._withdrawn:
                return at

    def _copy_slice(self, source: Opened, at: int, stop: int) -> int:
        try:
            while at < stop and hasattr(os, "copy_file_range"):  # Python has it on Linux only
                step = os.copy_file_range(source.fd, self.handle.fd, stop - at, at)
                if step == 0:  # the end; or a special file system that cannot do it and does not say so
                    break
                at += step
        except OSError as error:
            if error.errno not in _NO_COPY_RANGE:
                raise
        while at < stop and (data := source.pread(min(_STEP, stop - at), at)):
            write_all(self.handle.fd, data)
            at += len(data)
        return at

    def take(self, file: CallersFile) -> int | None:
        """Let `file`, which stays the caller's, be what `move` gives a name to, and return its size; None: copy it.

        Raises:
            AlreadyExists: the name is taken.
        """
        if self._tree.file_mode is None or file.is_link:  # the mode it would have got is not known
            return None
        if not _links_descriptors() or not may_be_taken(file):
            return None

        def can_be_linked(at: int, _root: int, _directories: list[int]) -> bool:
            self._check_free(at)
            return _share_a_mount(at, file)

        if not self._tree.below(self._names, self._made, can_be_linked):
            return None
        self._handle, self._taken = file, TakenFile(file, durable=self._durable)
        return file.status.st_size

    def move(self) -> TakenFile | None:
        """Give the caller's file the object's name too, and return it; None: it cannot be, and is as it was.

        Raises:
            AlreadyExists: the name is taken.
        """
        taken = self._taken
        assert taken is not None

        def work(at: int, root: int, directories: list[int]) -> os.stat_result:
            if not taken.claimed:
                # First: were the name the file's own, it would be marked as an object of this write and then removed.
                self._check_free(at)
                self._claim(taken)
            return self._publish_at(at, root, directories)

        try:
            self._finished(work)
            return taken
        except _NotTaken:
            pass
        except OSError as error:
            if error.errno not in _NO_MOVE:
                raise
        with self._lock:
            self._handle = self._taken = None
            self._published = self._marked = False
        taken.give_back()
        return None

    # -- the parts of the steps

    def _finished(self, work: Callable[[int, int, list[int]], os.stat_result]) -> os.stat_result:
        status = self._tree.below(self._names, self._made, work)
        with self._lock:
            if self._withdrawn:
                raise Withdrawn
            # From here on nothing is left to be removed but, should the task be cancelled now, the object itself.
            self._made = []
            if self._taken is not None:
                self._handle = None  # not closed: what becomes of the old name is seen by it
            elif self._marked:
                self.unpin()
        return status

    def _open_at(self, at: int) -> int:
        tree = self._tree
        mode = 0o666 if tree.file_mode is None else tree.file_mode | 0o600  # its owner must still mark it
        if tree.anonymous is not False and _links_descriptors():
            try:
                self._handle = Handle(os.open(".", os.O_TMPFILE | os.O_RDWR | os.O_CLOEXEC, mode, dir_fd=at))
            except OSError as error:
                if error.errno not in _NO_TMPFILE:
                    raise
            else:
                tree.anonymous = True
                return self._handle.fd
        if not tree.anonymous:  # else it is a mount below the root that has none
            tree.anonymous = False
        name = temporary_name(self._names[-1], self._token)
        flags = os.O_CREAT | os.O_EXCL | os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC
        try:
            handle = Handle(os.open(name, flags, mode, dir_fd=at))
        except FileExistsError:
            # Left by an earlier attempt of the same write. Should that still be alive, it notices before it links.
            os.unlink(name, dir_fd=at)
            handle = Handle(os.open(name, flags, mode, dir_fd=at))
        self._temporary = name
        self._handle = handle
        return handle.fd

    def _complete(self) -> None:
        """All of the file but its name: token, mode, and the way to the disk."""
        fd = self.handle.fd
        self._marked = mark(fd, self._token)
        mode = self._tree.file_mode
        self._status = os.fstat(fd)
        if mode is not None and stat.S_IMODE(self._status.st_mode) != mode:
            os.fchmod(fd, mode)
        if self._durable:
            os.fsync(fd)

    def _check_free(self, at: int) -> None:
        try:
            os.stat(self._names[-1], dir_fd=at, follow_symlinks=False)
        except FileNotFoundError:
            return
        raise self._exists()

    def _claim(self, taken: TakenFile) -> None:
        mode = self._tree.file_mode
        if mode is None or not taken.claim(self._token, mode):
            raise _NotTaken
        self._marked = True
        self._status = os.fstat(self.handle.fd)
        if self._durable:
            os.fsync(self.handle.fd)

    def _publish_at(self, at: int, root: int, directories: list[int]) -> os.stat_result:
        with self._lock:
            if self._withdrawn:
                raise Withdrawn
            self._published = True
        try:
            self._link(at)
        except (AlreadyExists, Conflict, FileNotFoundError, _NotTaken):
            self._published = False
            raise
        if self._temporary is not None:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(self._temporary, dir_fd=at)
            self._temporary = None
        if self._durable:
            self._tree.sync(root, directories)  # should that fail, `run` removes the file again
        return self._status

    def _link(self, at: int) -> None:
        name = self._names[-1]
        try:
            if self._temporary is not None:
                if not self._lies_at(at, self._temporary):
                    raise Conflict(f"another attempt of the write {self._token} of {self.key!r} has taken over")
                os.link(self._temporary, name, src_dir_fd=at, dst_dir_fd=at, follow_symlinks=False)
            else:
                os.link(f"/proc/self/fd/{self.handle.fd}", name, dst_dir_fd=at, follow_symlinks=True)
        except FileNotFoundError:
            if self._taken is not None and not self._taken.names:
                raise _NotTaken from None
            raise
        except OSError as error:
            # A network file system repeats a call whose answer was lost, and finds our own file. The caller's alone is
            # that only by a second name: the one that is found could be his.
            if self._lies_at(at) and (self._taken is None or self._taken.names > 1):
                return
            if isinstance(error, FileExistsError):
                raise self._exists() from error
            if error.errno in _NO_LINKS and self._taken is None:
                hint = "without hard links (exFAT, FAT, some FUSE) no file system can keep files here; choose another"
                raise OSError(error.errno, f"{error.strerror} ({hint})") from error
            raise

    def _exists(self) -> AlreadyExists:
        return AlreadyExists(f"{self.key!r} exists already below {self._tree.root!r}")

    def _is_ours(self, at: int) -> bool:
        """Return whether the file under the name is this one, however long ago it was published."""
        if not self._lies_at(at):
            return False
        try:
            return self._handle is not None or self._tree.token_at(at, self._names[-1]) == self._token
        except FileNotFoundError:
            return False

    def _lies_at(self, at: int, name: str | None = None) -> bool:
        try:
            found = os.stat(self._names[-1] if name is None else name, dir_fd=at, follow_symlinks=False)
        except FileNotFoundError:
            return False
        return os.path.samestat(found, self._status)


def _share_a_mount(at: int, file: Opened) -> bool:
    """Return whether `file` can be linked into the directory `at`: a disk that is mounted twice is one device only."""
    return os.fstat(at).st_dev == file.status.st_dev and _mount_of(at) == _mount_of(file.fd)


def _mount_of(fd: int) -> bytes | None:
    """Return by which mount `fd` was opened; None where that cannot be asked."""
    with contextlib.suppress(OSError), open(f"/proc/self/fdinfo/{fd}", "rb") as lines:
        return next((line for line in lines if line.startswith(b"mnt_id:")), None)
    return None


def hash_part(handle: Handle, state: Any, start: int, stop: int) -> None:
    """Feed the bytes from `start` to `stop` of an open file on to a hash."""
    # One buffer: fresh memory for each piece would cost more than the reading.
    buffer = memoryview(bytearray(min(_PIECE, stop - start)))
    while start < stop and (count := os.preadv(handle.fd, [buffer[: stop - start]], start)):
        state.update(buffer[:count])
        start += count


class CallersFile(Opened):
    """A file that the caller has handed over: if it cannot be read, that is the content's fault, not the backend's.

    Raises:
        ContentError: in `open` and in `pread`.
    """

    __slots__ = ("data", "is_link")

    changed_error = ContentError

    def __init__(self, key: str, fd: int) -> None:
        super().__init__(key, fd)
        self.is_link = False
        self.data: bytes | None = None  # all of it, once it was read

    @classmethod
    def open(cls, path: str | bytes | os.PathLike[Any], small: int) -> CallersFile | None:
        """Return the regular file at `path`, with its `data` where it has at most `small` bytes; None if it is
        something else."""
        try:
            if not stat.S_ISREG(os.stat(path).st_mode):  # asked first: opening a pipe has effects
                return None
            opened = cls(os.fsdecode(path), os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK))
            opened.is_link = os.path.islink(path)
        except OSError as error:
            raise _unreadable(path, error) from error
        opened.read_all(small)
        return opened

    def read_all(self, small: int) -> None:
        """Read the `data` if there are at most `small` bytes, and close the file then."""
        if self.status.st_size <= small:
            data = self.pread(small + 1, 0)
            if len(data) <= small:  # else it grows, or is one of the kernel's, which do not know their size
                self.data = data
                self.close()

    def pread(self, count: int, offset: int) -> bytes:
        try:
            return super().pread(count, offset)
        except OSError as error:
            raise _unreadable(self.key, error) from error


def _unreadable(path: Any, error: OSError) -> ContentError:
    return ContentError(f"the content cannot be read from {path!r}: {error.strerror}")
