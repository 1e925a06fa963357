"""What is asked of a Django storage, in its threads. Knows Django's contract, and not Django."""

from __future__ import annotations

import contextlib
import copy
import inspect
import logging
import os
from collections.abc import Mapping
from datetime import datetime
from typing import Any

from ..errors import AlreadyExists, BackendUnavailable, NotFound, NotSupported, StorageError
from ..feeds import Handle
from ..records import ByteRange
from ..threads import Workers
from ._django_content import Attempt, Held, InterruptedContent, Pipe
from ._django_errors import NO_FILE, map_error
from ._syncing import sync_file

__all__ = ["Opened", "delete", "listdir", "save", "stat", "url"]

_log = logging.getLogger(__name__)


def save(
    storage: Any, name: str, content: Held | Pipe, file: Any, attempt: Attempt, durable: bool, exclusive: bool
) -> None:
    """Have the storage save the whole `content` as `name`, and nothing else; what fails is deleted again.

    `file`: the content as Django's File. `durable`: a file of this machine is on the disk then; of a service its answer
    has to do. `exclusive`: the storage creates a file only where there is none; what is there after a failure is ours.
    """
    try:
        _save(storage, name, content, file, attempt, durable, exclusive)
    finally:
        content.release()


def _save(
    storage: Any, name: str, content: Held | Pipe, file: Any, attempt: Attempt, durable: bool, exclusive: bool
) -> None:
    if exclusive:
        storage = _without_other_names(storage)
    if storage.exists(name):
        raise AlreadyExists(f"{name!r} is there already")
    if attempt.withdrawn:
        raise InterruptedContent("nobody waits for this write any more")
    try:
        given = str(storage.save(name, file)).replace("\\", "/")
    except BaseException as error:
        if not isinstance(error, FileExistsError):
            with contextlib.suppress(Exception):
                delete(storage, name)
        raise
    if given != name:
        _remove(storage, given)
        raise AlreadyExists(f"the storage has named {name!r} otherwise: it is taken; the other file is deleted again")
    try:
        content.finish()
    except BaseException:
        with contextlib.suppress(Exception):
            delete(storage, name)
        raise
    if durable:
        with contextlib.suppress(NotImplementedError):
            path = storage.path(name)
            if os.path.exists(path):  # InMemoryStorage has paths, and nothing there
                sync_file(path)
    if not attempt.publish():
        delete(storage, name)


def _without_other_names(storage: Any) -> Any:
    """Return a copy of the storage that refuses a taken name, also one that was taken a moment ago. Left to choose
    another one, it could fail there, and the file to delete again would be somebody else's."""
    strict = copy.copy(storage)

    def refuse_taken(name: str, max_length: int | None = None) -> str:
        if strict.exists(name):
            raise AlreadyExists(f"{name!r} is there already")
        return name

    strict.get_available_name = refuse_taken
    return strict


def _remove(storage: Any, name: str) -> None:
    try:
        storage.delete(name)
    except Exception:
        _log.warning("%s: could not delete %r, which was stored under a name that nobody has asked for", storage, name)
        raise


def delete(storage: Any, name: str) -> None:
    """Delete the file if there is one. Some storages raise where there is none: Dropbox's, or one that is told 404."""
    try:
        if _has_paths(storage, name):  # there are directories, and some storages delete them as readily
            storage.open(name, "rb").close()
        storage.delete(name)
    except Exception as error:
        if not _is_missing(storage, name, error):
            raise


def _has_paths(storage: Any, name: str) -> bool:
    try:
        storage.path(name)
    except NotImplementedError:
        return False
    return True


def _is_missing(storage: Any, name: str, error: Exception) -> bool:
    """Return whether `error` means that there is no such file: by what it is, or, where it says nothing definite, by
    the word of the storage."""
    mapped = error if isinstance(error, StorageError) else map_error(error, "")
    if isinstance(mapped, NotFound):
        return True
    definite = mapped is not None and (type(mapped) is not BackendUnavailable or mapped.retryable)
    return not definite and not _knows(storage, name)


def _knows(storage: Any, name: str) -> bool:
    """Return whether there is such a file, as the storage says; True where it does not answer."""
    try:
        return bool(storage.exists(name))
    except Exception:
        return True


def exists(storage: Any, name: str) -> bool:
    return bool(storage.exists(name))


def stat(storage: Any, name: str) -> tuple[int | None, datetime | None]:
    try:
        size = _size_of(storage, name)
    except Exception as error:
        if _is_missing(storage, name, error):
            raise FileNotFoundError(name) from error
        raise
    _check_empty(storage, name, size)
    moment: datetime | None = None
    with contextlib.suppress(NotImplementedError):
        moment = storage.get_modified_time(name)
    if moment is not None and moment.tzinfo is None:
        moment = moment.astimezone()  # of this machine, where USE_TZ is off
    return size, moment


def _size_of(storage: Any, name: str) -> int:
    if not _has_paths(storage, name):
        with contextlib.suppress(NotImplementedError):
            return int(storage.size(name))  # of its file Dropbox's knows the size only when it has fetched it
    with contextlib.closing(storage.open(name, "rb")) as file:  # unlike exists(), takes no directory for a file
        size = _size(file)
    return int(storage.size(name)) if size is None else size


def _check_empty(storage: Any, name: str, size: int) -> None:
    """Raise FileNotFoundError where a file seems to be empty, and is none: django-storages' FTP says 0 of both."""
    if size == 0 and not _knows(storage, name):
        raise FileNotFoundError(name)


def _size(file: Any) -> int | None:
    try:
        return int(file.size)
    except (AttributeError, NotImplementedError, TypeError):
        return None


def url(storage: Any, name: str, expires_in: float | None, options: Mapping[str, Any]) -> str:
    if expires_in is not None:
        options = {**options, "expire": int(expires_in)}
    known = inspect.signature(storage.url).parameters
    if unknown := sorted(name for name in options if name not in known):
        raise NotSupported(f"the url() of {type(storage).__name__} takes no {', '.join(unknown)}")
    try:
        return str(storage.url(name, **options))
    except ValueError as error:  # FileSystemStorage without a base_url
        raise NotSupported(f"{type(storage).__name__} has no URLs as it is set up") from error


def listdir(storage: Any, directory: str) -> tuple[list[str], list[str]]:
    try:
        directories, files = storage.listdir(directory)
    except Exception as error:
        # Of the root no storage need know whether it exists: what fails there has failed.
        if not isinstance(error, NO_FILE) and not (directory and _is_missing(storage, directory, error)):
            raise
        return [], []
    return [str(name) for name in directories if name], [str(name) for name in files if name]


class Opened:
    """A file of the storage, read in its threads, one call at a time; closed by whoever comes last."""

    def __init__(self, name: str, byte_range: ByteRange, chunk_bytes: int) -> None:
        self._name = name
        self._range = byte_range
        self._chunk_bytes = chunk_bytes
        self._file: Any = None
        self._at = 0
        self._stop: int | None = None
        self._handle = Handle(self._release)

    def first(self, storage: Any) -> tuple[int | None, bytes, bool]:
        """Open the file; return its size, the first chunk, and whether that is all."""
        nothing: tuple[int | None, bytes, bool] = (None, b"", True)
        return self._handle.use(lambda: self._first(storage), nothing)

    def _first(self, storage: Any) -> tuple[int | None, bytes, bool]:
        try:
            return self._begin(storage)
        except Exception as error:
            if _is_missing(storage, self._name, error):
                raise FileNotFoundError(self._name) from error
            raise

    def _begin(self, storage: Any) -> tuple[int | None, bytes, bool]:
        self._file = file = storage.open(self._name, "rb")
        size = _size(file)
        if size is None:
            size = int(storage.size(self._name))
        _check_empty(storage, self._name, size)
        self._at, self._stop = self._range.resolve(size)
        data = self._read()
        return size, data, self._at >= self._stop

    def next(self, _: Any) -> bytes:
        """Return the next chunk, empty at the end."""
        return self._handle.use(self._read, b"")

    def _read(self) -> bytes:
        assert self._stop is not None
        wanted = min(self._chunk_bytes, self._stop - self._at)
        if wanted <= 0:
            return b""
        data = self._read_there(wanted)
        if data and self._file.tell() != self._at + len(data):
            # django-storages' FTP and SFTP fetch the file with the first read, which then begins at its start, whatever
            # was sought before.
            data = self._read_there(wanted)
            if self._file.tell() != self._at + len(data):
                raise BackendUnavailable(
                    f"{self._name!r} cannot be read from byte {self._at} on: the storage's file does not stay there",
                    retryable=False,
                )
        if not data:
            raise BackendUnavailable(f"{self._name!r} ended at byte {self._at}, and should have had {self._stop}")
        self._at += len(data)
        return data

    def _read_there(self, wanted: int) -> bytes:
        if self._file.tell() != self._at:  # it begins elsewhere, or is shared with others (InMemoryStorage)
            self._file.seek(self._at)
        return bytes(self._file.read(wanted))

    def _release(self) -> None:
        file, self._file = self._file, None
        if file is not None:
            try:
                file.close()
            except Exception:
                _log.warning("closing %r failed", self._name, exc_info=True)

    def give_up(self, workers: Workers) -> None:
        """Close the file in a worker, now or when its call under way ends; does not wait."""
        with contextlib.suppress(BackendUnavailable):
            workers.submit(self._handle.close)
