"""What kind of content a caller has handed over. By duck typing: no framework is imported. For `content`, bridges."""

from __future__ import annotations

import contextlib
import inspect
import io
import os
import stat
from collections.abc import Callable, Iterator, Mapping, Sequence, Set
from typing import TYPE_CHECKING, Any

from .errors import ContentError
from .feeds import AsyncFeed, AsyncFilePieces, InlineFeed, ThreadFeed, encoded, looks

if TYPE_CHECKING:
    from .content import Source

__all__ = ["memory_inside", "recognise"]

_COPY_BYTES = 4 << 20  # bytes; a bytearray or a list of chunks up to this size is copied into `data`

_MAX_WRAPPERS = 8  # around a file

_TAKEN = (
    "bytes, bytearray, memoryview, str, a path object, a file open for reading (synchronous or asynchronous), "
    "a Django File, a Starlette UploadFile, or an iterable (synchronous or asynchronous) of bytes"
)

# Where all that Django's own chunks() uses is Django's too, the file inside holds all there is to know.
_DJANGO_FILES = ("django.core.files.base", "django.core.files.uploadedfile", "django.core.files.utils")

_DISK_FILES = (io.FileIO, io.BufferedReader, io.BufferedRandom, io.TextIOWrapper)


def recognise(source: Source, content: Any) -> None:
    """Fill in `source` for `content`: what it declares, and how a pass over it is begun.

    Raises:
        ContentError: it is nothing that can be read, a path that no file can have, or text with lone surrogates.
    """
    read = getattr(content, "read", None)
    if isinstance(content, str):
        source.data = encoded(content)
    elif isinstance(content, bytes | bytearray | memoryview):
        _buffer(source, memoryview(content))
    elif isinstance(content, type | Mapping | Set):
        raise _refused(content)
    elif isinstance(content, os.PathLike):
        _path(source, content)
    elif callable(getattr(content, "chunks", None)) and callable(read):
        _django_file(source, content)
    elif type(content) in (io.BytesIO, io.StringIO):
        source.data = _in_memory(content)
    elif callable(read):
        if inspect.iscoroutinefunction(read) or hasattr(content, "__aiter__"):
            _async_file(source, content)
        else:
            _file(source, content)
    elif (view := _view(content)) is not None:
        _buffer(source, view)
    elif hasattr(content, "__aiter__"):
        timeout = source.timeout
        source.replayable = False
        source.begin = lambda limit, ahead: AsyncFeed(content.__aiter__, limit, timeout)
    elif isinstance(content, list | tuple):
        _sequence(source, content)
    elif hasattr(content, "__iter__"):
        _iterable(source, content)
    else:
        raise _refused(content)


def _view(content: Any) -> memoryview | None:
    try:
        return memoryview(content)
    except TypeError:
        return None


def _refused(content: Any) -> ContentError:
    kind = content.__name__ if isinstance(content, type) else type(content).__name__
    return ContentError(f"cannot read content from {kind}; taken are {_TAKEN}")


def _buffer(source: Source, view: memoryview) -> None:
    if view.nbytes <= _COPY_BYTES or not view.c_contiguous:
        source.data = bytes(view)
        return
    flat = view.cast("B")
    source.size = len(flat)

    def slices(limit: int) -> Iterator[memoryview]:
        return (flat[start : start + limit] for start in range(0, len(flat), limit))

    source.begin = lambda limit, ahead: InlineFeed(slices(limit), limit)


def _in_memory(file: Any) -> bytes | None:
    """Return what an io object in memory holds, without copying; None for anything else, or a closed one."""
    if type(file) is io.BytesIO and not file.closed:
        return file.getvalue()
    if type(file) is io.StringIO and not file.closed:
        return encoded(file.getvalue())
    return None


def memory_inside(content: Any) -> io.BytesIO | io.StringIO | None:
    """Return the file in memory whose bytes are those of `content`, a Django File; None where there is no such file, or
    a subclass may have a say in what is read."""
    attributes = getattr(content, "__dict__", {})
    inner = attributes.get("file")  # not `content.file`: that of a FieldFile would open the stored file here and now
    if type(inner) not in (io.BytesIO, io.StringIO) or "chunks" in attributes:
        return None
    for name in ("chunks", "read", "seek"):
        if _module_of(type(content), name) not in _DJANGO_FILES:
            return None
    own = _module_of(type(content), "file"), _module_of(type(content), "__getattribute__")
    return inner if own == (None, "builtins") else None


def _module_of(cls: type, name: str) -> str | None:
    """Return the module of the class that gives `cls` this attribute."""
    return next((base.__module__ for base in cls.__mro__ if name in vars(base)), None)


def _path(source: Source, content: os.PathLike[Any]) -> None:
    path = content
    where = os.fspath(content)
    if not _possible(where):
        raise ContentError(f"{where!r} cannot be the path of a file")
    source.path = path
    source.name = os.path.basename(os.fsdecode(where)) or None

    source.look = lambda: os.stat(where).st_size
    source.opens = True
    _threaded(source, lambda limit: _pieces_of(where, limit))


def _possible(path: str | bytes) -> bool:
    """Return whether a file system could be asked for `path`, which else fails with a ValueError."""
    try:
        return b"\0" not in os.fsencode(path)
    except UnicodeEncodeError:
        return False


def _pieces_of(path: Any, limit: int) -> Iterator[bytes]:
    looks.check(path)
    mode = looks.at(path, os.stat, path).st_mode
    if stat.S_ISFIFO(mode) or stat.S_ISSOCK(mode):  # opening it may wait for ever; and each pass would read the rest
        raise ContentError(f"{os.fsdecode(path)!r} is no regular file; open it and hand over the open file")
    with looks.at(path, lambda: open(path, "rb", buffering=0)) as file:
        while piece := looks.at(path, file.read, limit):
            yield piece


def _django_file(source: Source, content: Any) -> None:
    source.name = _text(content, "name")
    source.content_type = _text(content, "content_type")
    source.data = _in_memory(memory_inside(content))
    if source.data is not None:
        return
    locate = getattr(content, "temporary_file_path", None)
    if callable(locate):
        where = locate()
        if isinstance(where, str):
            # What the caller has written to it must be in the file before somebody reads or moves it by name.
            with contextlib.suppress(Exception):
                content.flush()
            with contextlib.suppress(OSError, ValueError):
                source.size = os.stat(where).st_size
                source.temporary_path = where
    closed = getattr(content, "closed", False)
    path = source.temporary_path
    if path is not None and closed:
        source.look = lambda: os.stat(path).st_size
        source.opens = True
        _threaded(source, lambda limit: _pieces_of(path, limit))
        return
    # A closed file may open itself again (FieldFile does), but whether it can seek then is unknown.
    source.replayable = not closed and _seekable(content)
    source.look = _look_at(content)
    _threaded(source, lambda limit: iter(content.chunks(limit)), _inside(content))


def _file(source: Source, content: Any) -> None:
    name = _text(content, "name")
    source.name = os.path.basename(name) or None if name else None
    source.replayable = _seekable(content)
    source.look = _look_at(content)
    first = not source.replayable

    def pieces(limit: int) -> Iterator[Any]:
        if not first:
            content.seek(0)
        while True:
            piece = content.read(limit)
            if not piece and piece is not None:
                return
            yield piece

    _threaded(source, pieces, _inside(content))


def _async_file(source: Source, content: Any) -> None:
    name = _text(content, "filename") or _text(content, "name")
    source.name = os.path.basename(name) or None if name else None
    source.content_type = _text(content, "content_type")
    if source.content_type is not None and isinstance(size := getattr(content, "size", None), int):
        source.size = size
    seek = getattr(content, "seek", None)
    # Its own seekable() may be a coroutine; the file inside (Starlette: file, aiofiles: _file, AnyIO: wrapped) tells.
    inner = next((file for key in ("file", "_file", "wrapped") if (file := getattr(content, key, None))), None)
    source.replayable = callable(seek) and (inner is None or _seekable(inner))
    source.look = _look_at(inner)
    rewind = source.replayable
    timeout = source.timeout
    source.begin = lambda limit, ahead: AsyncFeed(lambda: AsyncFilePieces(content, limit, rewind), limit, timeout)


def _sequence(source: Source, content: Sequence[Any]) -> None:
    pieces = tuple(content)
    if all(type(piece) is bytes for piece in pieces):
        source.size = sum(map(len, pieces))
        if source.size <= _COPY_BYTES:
            source.data = b"".join(pieces)
            return
    source.begin = lambda limit, ahead: InlineFeed(pieces, limit)


def _iterable(source: Source, content: Any) -> None:
    source.replayable = False
    timeout = source.timeout
    release = content.close if inspect.isgenerator(content) else None
    source.begin = lambda limit, ahead: ThreadFeed(lambda: iter(content), limit, timeout, ahead=ahead, release=release)


def _threaded(source: Source, pieces: Callable[[int], Iterator[Any]], file: object = None) -> None:
    timeout = source.timeout
    source.begin = lambda limit, ahead: ThreadFeed(lambda: pieces(limit), limit, timeout, ahead=ahead, file=file)


def _inside(file: Any) -> object:
    """Return the file that is wrapped in Django's or tempfile's objects: wrapped anew for each save, it is the same."""
    for _ in range(_MAX_WRAPPERS):
        inner = getattr(file, "__dict__", {}).get("file")
        if inner is None:
            break
        file = inner
    return file


def _seekable(file: Any) -> bool:
    seekable = getattr(file, "seekable", None)
    if not callable(seekable):
        return callable(getattr(file, "seek", None))
    try:
        return seekable() is True
    except Exception:  # closed, or a wrapper around something odd: then it is read once, from where it is
        return False


def _look_at(file: Any) -> Callable[[], int] | None:
    """Return what looks how large an open file of the disk is; None for anything else."""
    if not isinstance(file, _DISK_FILES):  # a wrapper: a Django File, or a NamedTemporaryFile
        file = getattr(file, "__dict__", {}).get("file")
    # Not of any type: for its fileno() a SpooledTemporaryFile moves to the disk.
    return (lambda: os.fstat(file.fileno()).st_size) if isinstance(file, _DISK_FILES) else None


def _text(content: Any, name: str) -> str | None:
    value = getattr(content, name, None)
    return value if isinstance(value, str) and value else None
