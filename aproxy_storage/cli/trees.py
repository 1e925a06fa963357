"""The local side of a transfer: trees of files to be sent, files that appear whole or not at all."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import os
from collections.abc import AsyncIterator, Callable, Container, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from stat import S_ISDIR, S_ISREG
from typing import Any

from ..errors import AlreadyExists, ConfigurationError, ContentError, StorageError, from_os_error
from ..futures import over, seen
from ..paths import check_path, new_token
from ..records import MetaRecord

__all__ = [
    "Draft",
    "Local",
    "batches",
    "checksum_of",
    "files_below",
    "has_bytes_of",
    "named",
    "target_below",
    "to_its_end",
]


@dataclass(frozen=True, slots=True)
class Local:
    """A local file, the name that it is to have in the storage, and its size; or why it cannot be read."""

    file: Path
    name: str
    size: int = 0
    error: StorageError | None = None


def named(sources: list[Path], to: str | None) -> list[tuple[Path, str]]:
    """Return each source with the name that it is to have: its own, below `to` or, of a single one, `to` itself.

    Raises:
        ConfigurationError: two sources would have the same name, or one has none.
    """
    into = "" if to is None else to if to.endswith("/") or not to else to + "/"
    if to and len(sources) == 1 and not to.endswith("/"):
        return [(sources[0], to)]
    pairs: dict[str, Path] = {}
    for source in sources:
        own = source.name if source.name not in ("", "..") else source.resolve().name
        name = (into + own) if source != Path() else into.rstrip("/")
        if name in pairs:
            raise ConfigurationError(
                f"{pairs[name]} and {source} would both be named {name!r}; send one after the other"
            )
        pairs[name] = source
    return [(source, name) for name, source in pairs.items()]


def files_below(source: Path, name: str, *, recursive: bool, spare: Container[str] = frozenset()) -> Iterator[Local]:
    """Find the files of `source`, itself or, of a directory, those below it, by name.

    Files and directories whose real path is in `spare` are left out.

    Links to files are followed, links to directories are not: they may lead anywhere. What is neither, and what
    cannot be read, has an error.
    """
    try:
        status = source.stat()
    except OSError as error:
        yield Local(source, name or str(source), error=from_os_error(error, f"read {source}"))
        return
    if S_ISDIR(status.st_mode):
        if not recursive:
            yield Local(source, name, error=ContentError(f"{source} is a directory; say -r to send what is below it"))
            return
        yield from _below(source, name, os.path.realpath(source), spare)
    elif S_ISREG(status.st_mode):
        yield Local(source, name, status.st_size)
    else:
        yield Local(source, name, error=ContentError(f"{source} is no regular file"))


def _below(directory: Path, name: str, real: str, spare: Container[str]) -> Iterator[Local]:
    if real in spare:
        return
    try:
        with os.scandir(directory) as entries:
            found = sorted(entries, key=lambda entry: entry.name)
    except OSError as error:
        yield Local(directory, name, error=from_os_error(error, f"list {directory}"))
        return
    for entry in found:
        inner = f"{name}/{entry.name}" if name else entry.name
        path = directory / entry.name
        if entry.is_dir(follow_symlinks=False):
            yield from _below(path, inner, os.path.join(real, entry.name), spare)
        elif os.path.join(real, entry.name) in spare:
            continue
        elif not entry.is_symlink() or not os.path.isdir(path):  # Path.is_dir raises what a bad link may give
            yield from files_below(path, inner, recursive=False)


async def batches(items: Iterable[Local], count: int) -> AsyncIterator[list[Local]]:
    """Take `count` items at a time, in a thread: looking at a disk blocks."""
    iterator = iter(items)
    while batch := await asyncio.to_thread(lambda: list(islice(iterator, count))):
        yield batch


def checksum_of(file: Path, algorithm: str) -> str:
    """Return the checksum of a local file as records hold it, ``sha256:…``.

    Raises:
        ContentError: it cannot be read.
    """
    try:
        with file.open("rb") as opened:
            return f"{algorithm}:{hashlib.file_digest(opened, algorithm).hexdigest()}"
    except OSError as error:
        raise ContentError(f"cannot read {file}: {error.strerror}") from error


async def has_bytes_of(file: Path, record: MetaRecord) -> bool:
    """Return whether a local file has the size and the checksum of `record`; false where that has no checksum.

    Raises:
        ContentError: the file cannot be read.
    """
    algorithm, _, expected = (record.checksum or "").partition(":")
    if not expected:
        return False
    try:
        if (await asyncio.to_thread(file.stat)).st_size != record.size:
            return False
    except OSError as error:
        raise ContentError(f"cannot read {file}: {error.strerror}") from error
    return await asyncio.to_thread(checksum_of, file, algorithm) == record.checksum


def target_below(directory: Path, path: str) -> Path:
    """Return where the file `path` of a storage goes below a local directory.

    Raises:
        InvalidPath: it would lie outside; old records may hold absolute paths.
    """
    return directory / check_path(path)


async def to_its_end(work: Callable[..., None], *args: Any, **options: Any) -> None:
    """Run a method of a `Draft` in a thread. A cancellation stops no thread, so it is raised when that is done: what
    was made by then can be withdrawn."""
    job = asyncio.get_running_loop().run_in_executor(None, partial(work, *args, **options))
    cancelled: asyncio.CancelledError | None = None
    while not job.done():
        try:
            await over(job)
        except asyncio.CancelledError as error:
            cancelled = error
    if cancelled is not None:
        seen(job)
        raise cancelled
    job.result()


class Draft:
    """A local file that is being written; it appears under its name when it is published.

    Until then its bytes are in a hidden file beside it, which `withdraw` removes.

    Raises, from every method:
        StorageError: for the native error.
    """

    def __init__(self, target: Path) -> None:
        self.target = target
        self._draft = target.parent / f".aproxy-{new_token()}.part"
        self._descriptor: int | None = None

    def create(self) -> None:
        """Make the hidden file, and the directories above it."""
        with self._mapped():
            self.target.parent.mkdir(parents=True, exist_ok=True)
            self._descriptor = os.open(self._draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)

    def write(self, data: bytes) -> None:
        """Add bytes."""
        assert self._descriptor is not None
        with self._mapped():
            view = memoryview(data)
            while view:
                view = view[os.write(self._descriptor, view) :]

    def publish(self, *, replace: bool) -> None:
        """Give the file its name.

        Raises:
            AlreadyExists: it is taken, and `replace` is false.
        """
        self._close()
        with self._mapped():
            if replace:
                os.replace(self._draft, self.target)
                return
            try:
                os.link(self._draft, self.target)
            except FileExistsError:
                raise AlreadyExists(f"{self.target} is there already") from None
            except OSError:  # a file system without hard links
                if os.path.lexists(self.target):
                    raise AlreadyExists(f"{self.target} is there already") from None
                os.rename(self._draft, self.target)

    def withdraw(self) -> None:
        """Remove the hidden file, if it is still there; idempotent."""
        self._close()
        with contextlib.suppress(OSError):
            os.unlink(self._draft)

    def _close(self) -> None:
        descriptor, self._descriptor = self._descriptor, None
        if descriptor is not None:
            os.close(descriptor)

    @contextlib.contextmanager
    def _mapped(self) -> Iterator[None]:
        try:
            yield
        except StorageError:
            raise
        except OSError as error:
            raise from_os_error(error, f"write {self.target}") from error
