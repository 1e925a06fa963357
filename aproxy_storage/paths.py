"""What a legal path is, and which name to try next when one is taken. Pure functions."""

from __future__ import annotations

import os
import re
import string
from collections import deque

from .errors import InvalidPath

__all__ = [
    "MAX_PATH_BYTES",
    "alternative",
    "check_path",
    "local_path",
    "new_token",
    "shown",
    "sqlite_files",
    "successor",
    "token_key",
]

MAX_PATH_BYTES = 1024

_ALPHABET = string.ascii_letters + string.digits
_SUFFIX_LENGTH = 7  # as Django's get_alternative_name
_TOKEN_LENGTH = 12  # 62**12: 71 bits

# C0, DEL and C1 controls, the backslash, and the two separators that split lines in logs and listings.
_FORBIDDEN = frozenset([*map(chr, range(0x20)), *map(chr, range(0x7F, 0xA0)), "\\", "\u2028", "\u2029"])


# What most paths look like; those that do not are looked at more closely.
_PLAIN = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9_. -]*(?:/[A-Za-z0-9_-][A-Za-z0-9_. -]*)*")


def check_path(
    path: str | os.PathLike[str], *, max_bytes: int = MAX_PATH_BYTES, max_segment_bytes: int | None = None
) -> str:
    """Return `path` as text if it may name a new file.

    Legal is: not empty, relative, parts separated by ``/``, no part empty or ``.`` or ``..``, no control
    character, no backslash, at most `max_bytes` in UTF-8, each part at most `max_segment_bytes`.
    Nothing is normalised: what is accepted is stored exactly.

    Raises:
        InvalidPath: it may not, with the reason.
    """
    text = os.fspath(path)
    if not isinstance(text, str):
        raise InvalidPath(f"a path is text, not {type(path).__name__}")
    if len(text) <= min(max_bytes, max_segment_bytes or max_bytes) and _PLAIN.fullmatch(text):
        return text
    if not text:
        raise InvalidPath("a path cannot be empty", path=text)
    if len(text) > max_bytes:  # before encoding: a megabyte of name costs nothing
        raise _invalid(text, f"longer than {max_bytes} bytes")
    try:
        encoded = text.encode()
    except UnicodeEncodeError:
        raise _invalid(text, "not encodable as UTF-8 (lone surrogates)") from None
    if len(encoded) > max_bytes:
        raise _invalid(text, f"longer than {max_bytes} bytes in UTF-8")
    if not _FORBIDDEN.isdisjoint(text):
        raise _invalid(text, "control characters and backslashes are not allowed")
    if text[0] == "/":
        raise _invalid(text, "it must be relative (no leading slash)")
    for part in text.split("/"):
        if part in ("", ".", ".."):
            raise _invalid(text, "empty, '.' and '..' parts are not allowed")
        if max_segment_bytes is not None and len(part.encode()) > max_segment_bytes:
            raise _invalid(text, f"the part {shown(part)} is longer than {max_segment_bytes} bytes")
    return text


def new_token() -> str:
    """Return a random name for one reservation: 12 letters and digits, 71 bits."""
    return _random(_TOKEN_LENGTH)


def token_key(path: str, token: str, *, max_bytes: int = MAX_PATH_BYTES, max_segment_bytes: int | None = None) -> str:
    """Return the key ``dir/stem_TOKEN.ext`` for `path`. Where that is too long the stem, then the extension give way,
    and in the end directories: a key need not look like its path, but every path must have one. So must one from
    before there were rules; its illegal parts are left out."""
    if not _FORBIDDEN.isdisjoint(path):
        path = "".join("_" if character in _FORBIDDEN else character for character in path)
    *directories, base = path.split("/")
    directories = [part for part in directories if part not in ("", ".", "..")]
    if max_segment_bytes is not None:
        directories = [part for part in directories if len(part.encode()) <= max_segment_bytes]
    while True:
        try:
            return _decorated("/".join([*directories, base]), token, max_bytes, max_segment_bytes, in_bytes=True)
        except InvalidPath:
            if not directories:
                raise
            directories.pop()


def alternative(
    path: str,
    *,
    max_length: int | None = None,
    max_bytes: int = MAX_PATH_BYTES,
    max_segment_bytes: int | None = None,
) -> str:
    """Return the next name to try for a taken `path`: ``dir/stem_XXXXXXX.ext``, all suffixes kept.

    `max_length` counts characters of the whole path, as Django's does; the stem gives way.

    Raises:
        InvalidPath: nothing of the stem would be left within `max_length`, or within the other limits.
    """
    mark = _random(_SUFFIX_LENGTH)
    candidate = _decorated(path, mark, max_bytes, max_segment_bytes, in_bytes=True)
    if max_length is None or len(candidate) <= max_length:
        return candidate
    candidate = _decorated(path, mark, max_length, None, in_bytes=False)
    return check_path(candidate, max_bytes=max_bytes, max_segment_bytes=max_segment_bytes)


def successor(prefix: str) -> str | None:
    """Return the smallest text greater than everything that begins with `prefix`; None where there is none.

    The order is that of code points, which is also the byte order of UTF-8.
    """
    while prefix:
        point = ord(prefix[-1]) + 1
        if point == 0xD800:  # surrogates cannot be encoded
            point = 0xE000
        if point <= 0x10FFFF:
            return prefix[:-1] + chr(point)
        prefix = prefix[:-1]
    return None


def _decorated(path: str, mark: str, limit: int, segment_limit: int | None, *, in_bytes: bool) -> str:
    directory, _, base = path.rpartition("/")
    # The suffixes of PurePath, which Django keeps too: what follows the first dot that does not begin the name.
    dot = -1 if base.endswith(".") else base.find(".", len(base) - len(base.lstrip(".")))
    stem, extension = (base, "") if dot < 0 else (base[:dot], base[dot:])
    head = f"{directory}/" if directory else ""

    def length(text: str) -> int:
        return len(text.encode()) if in_bytes else len(text)

    room = limit - length(head)
    if segment_limit is not None:
        room = min(room, segment_limit)
    room -= length(mark) + 1
    if room - length(extension) < 1 and length(extension) > 16:
        # "suffixes" of this length are part of the name, not a type
        stem, extension = base, ""
    room -= length(extension)
    if room < 1:
        raise _invalid(path, f"no free name fits into {limit} {'bytes' if in_bytes else 'characters'}")
    while length(stem) > room:
        stem = stem[: max(room, 1)] if not in_bytes else stem.encode()[:room].decode(errors="ignore")
    return f"{head}{stem}_{mark}{extension}"


_pool: deque[str] = deque()
_pool_pid = 0


def _random(length: int) -> str:
    """Return random letters and digits, from a pool: the system call lets go of the GIL, and with busy worker
    threads it takes longer to get it back than to do all the rest of a small save."""
    global _pool_pid
    if _pool_pid != os.getpid():  # what a child shares with its parent is not random
        _pool.clear()
        _pool_pid = os.getpid()
    try:
        return _pool.pop()[:length]
    except IndexError:
        drawn = os.urandom(64 * _TOKEN_LENGTH * 2)
        # 248 = 4 * 62: what is above would make some characters more likely than others.
        chars = [_ALPHABET[byte % 62] for byte in drawn if byte < 248]
        for start in range(0, len(chars) - _TOKEN_LENGTH, _TOKEN_LENGTH):
            _pool.append("".join(chars[start : start + _TOKEN_LENGTH]))
        return _pool.pop()[:length]


def shown(text: str) -> str:
    """Return `text` as messages show it: escaped, and of bounded length."""
    return repr(text if len(text) <= 80 else f"{text[:60]}…{text[-12:]}")


def _invalid(text: str, reason: str) -> InvalidPath:
    return InvalidPath(f"{shown(text)} is not a legal path: {reason}", path=text if len(text) <= 2048 else text[:2048])


def local_path(address: str) -> str | None:
    """Return the path in the file system that `address`, of `Backend.full_path`, stands for; None where it is none."""
    path = address.removeprefix("file://")
    return path if os.path.isabs(path) else None


def sqlite_files(path: str) -> tuple[str, ...]:
    """Return the real paths of an SQLite database and of the files that SQLite makes beside it."""
    return tuple(os.path.realpath(path) + end for end in ("", "-wal", "-shm", "-journal"))
