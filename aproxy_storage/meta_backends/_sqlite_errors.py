"""What goes wrong in SQLite, in the words of this library."""

from __future__ import annotations

import re
import sqlite3

from ..errors import (
    AccessDenied,
    BackendUnavailable,
    ConfigurationError,
    IntegrityError,
    NotSupported,
    OutOfSpace,
    StorageError,
)

__all__ = ["code_of", "sqlite_error"]


_BY_CODE: dict[int, tuple[type[StorageError], str]] = {
    sqlite3.SQLITE_BUSY: (BackendUnavailable, "another process keeps it locked"),
    sqlite3.SQLITE_LOCKED: (BackendUnavailable, "it is locked"),
    sqlite3.SQLITE_READONLY: (AccessDenied, "the file or its directory is not writable"),
    sqlite3.SQLITE_PERM: (AccessDenied, "no permission"),
    sqlite3.SQLITE_CORRUPT: (IntegrityError, "the file is damaged; restore it, or rescue it with sqlite3's .recover"),
    sqlite3.SQLITE_NOTADB: (ConfigurationError, "the file is not an SQLite database"),
    sqlite3.SQLITE_FULL: (OutOfSpace, "the disk or the quota is full"),
    sqlite3.SQLITE_CANTOPEN: (BackendUnavailable, "it cannot be opened; does its directory exist, is it writable?"),
    sqlite3.SQLITE_IOERR: (BackendUnavailable, "the disk failed"),
    sqlite3.SQLITE_TOOBIG: (NotSupported, "a value is too big for SQLite"),
}


def code_of(error: BaseException) -> int | None:
    code: int | None = getattr(error, "sqlite_errorcode", None)
    return None if code is None else code & 0xFF  # the rest says more, but no more that we act on


def sqlite_error(error: BaseException, path: str) -> StorageError:
    """Return our error for one of sqlite3's about the file at `path`; the native one becomes its cause.

    A failed statement has undone itself, so the outcome is known; a failed COMMIT is judged where it happens.
    """
    if isinstance(error, StorageError):
        return error
    code = code_of(error)
    native = str(error)
    cls: type[StorageError]
    if getattr(error, "sqlite_errorcode", None) == sqlite3.SQLITE_READONLY_DBMOVED:
        cls, reason = BackendUnavailable, "the file was moved or deleted"
    elif code in _BY_CODE:
        cls, reason = _BY_CODE[code]
    elif re.search(r"no such (table|column|index)|has no column", native):
        cls, reason = ConfigurationError, "its table is not the one this library makes"
    else:
        mapped: StorageError = BackendUnavailable(
            f"{path}: unexpected {type(error).__name__} ({native})",
            retryable=False,
            outcome_unknown=not isinstance(error, sqlite3.Error),
        )
        mapped.__cause__ = error
        return mapped
    mapped = cls(f"{path}: {reason} ({native})")
    mapped.__cause__ = error
    return mapped
