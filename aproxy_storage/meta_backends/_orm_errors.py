"""Which error of ours stands for which of Django's, and of the driver behind it."""

from __future__ import annotations

from typing import Any

from django.core.exceptions import (
    AppRegistryNotReady,
    FieldError,
    ImproperlyConfigured,
    ObjectDoesNotExist,
    ValidationError,
)
from django.db import DatabaseError, DataError, Error, IntegrityError, InterfaceError, OperationalError
from django.db.transaction import TransactionManagementError
from django.db.utils import ConnectionDoesNotExist

from ..errors import (
    AccessDenied,
    BackendUnavailable,
    ConfigurationError,
    Conflict,
    DeadlineExceeded,
    NotSupported,
    OutOfSpace,
    StorageError,
)
from ..errors import IntegrityError as Damaged

__all__ = ["DJANGO_ERRORS", "NotConnected", "orm_error"]


class NotConnected(Exception):
    """There is no connection: nothing has been sent. The reason is its ``__cause__``."""


#: Whatever Django raises of itself.
DJANGO_ERRORS = (
    Error,
    ConnectionDoesNotExist,
    AppRegistryNotReady,
    ImproperlyConfigured,
    FieldError,
    ObjectDoesNotExist,
    ValidationError,
    NotConnected,
)


def orm_error(error: Exception, what: str, alias: str) -> StorageError | None:
    """Return our error for one that Django raised, None for any other. `what` says what was tried."""
    if isinstance(error, NotConnected):
        cause = error.__cause__
        return _connecting(cause, what, alias) if isinstance(cause, Exception) else None
    if isinstance(error, ConnectionDoesNotExist):
        return ConfigurationError(f"there is no database {alias!r} in DATABASES")
    if isinstance(error, AppRegistryNotReady | ImproperlyConfigured):
        return ConfigurationError(
            f"Django is not set up ({_brief(error)}): set DJANGO_SETTINGS_MODULE and call django.setup()"
        )
    if isinstance(error, TransactionManagementError):
        return BackendUnavailable(
            f"could not {what}: the caller's transaction is broken, it must be rolled back first", retryable=False
        )
    if isinstance(error, DatabaseError | InterfaceError):
        found = _of_postgres(error, what) or _of_sqlite(error, what)
        if found is not None:
            return found
        if isinstance(error, IntegrityError):
            return Conflict(f"could not {what}: {_brief(error)}", retryable=False)
        if isinstance(error, DataError):
            return NotSupported(f"could not {what}: {_brief(error)}")
        # Whatever else a connection ends with: the statement may have been done.
        lost = isinstance(error, OperationalError | InterfaceError)
        return BackendUnavailable(f"could not {what}: {_brief(error)}", retryable=lost, outcome_unknown=lost)
    return None


def _connecting(error: Exception, what: str, alias: str) -> StorageError:
    text = str(error)
    if any(sign in text for sign in ("authentication failed", "no password supplied", "does not exist")):
        return ConfigurationError(
            f"could not {what}: the database server refuses {alias!r}: {_brief(error)} (see DATABASES[{alias!r}])"
        )
    if "unable to open database file" in text:
        return BackendUnavailable(
            f"could not {what}: SQLite cannot open the file of {alias!r}: its directory must exist and be writable"
        )
    if isinstance(error, ImproperlyConfigured):
        return ConfigurationError(f"the database {alias!r} cannot be used: {_brief(error)}")
    return BackendUnavailable(f"could not {what}: no connection to the database {alias!r}: {_brief(error)}")


def _of_postgres(error: Exception, what: str) -> StorageError | None:
    state = getattr(error.__cause__, "sqlstate", None) or getattr(error.__cause__, "pgcode", None)
    if not state:
        return None
    why = f"could not {what}: {_brief(error)}"
    if state in ("42P01", "42703"):
        return _not_migrated(why)
    if state in ("42501", "28000", "28P01"):
        return AccessDenied(why)
    if state in ("40001", "40P01"):
        return Conflict(why)  # serialisation failure, deadlock
    if state == "57014":
        return DeadlineExceeded(why)  # statement_timeout: the server has undone it
    if state in ("53100", "53200"):
        return OutOfSpace(why) if state == "53100" else BackendUnavailable(why)
    if state[:2] in ("53", "55") or state == "25006":
        return BackendUnavailable(why)
    if state[:2] == "XX":
        return Damaged(why)
    if state[:2] in ("08", "57"):
        return BackendUnavailable(why, outcome_unknown=True)
    return None


def _of_sqlite(error: Exception, what: str) -> StorageError | None:
    text = str(error)
    why = f"could not {what}: {_brief(error)}"
    if text.startswith("no such table") or "no such column" in text or "has no column named" in text:
        return _not_migrated(why)
    if "is locked" in text:
        return BackendUnavailable(
            f"{why} (another connection holds SQLite's only write lock; OPTIONS timeout= says how long to wait)"
        )
    if text == "interrupted":
        return DeadlineExceeded(why)
    if "disk is full" in text:
        return OutOfSpace(why)
    if "malformed" in text or "not a database" in text:
        return Damaged(why)
    if "readonly database" in text:
        return AccessDenied(why)
    return None


def _not_migrated(why: str) -> ConfigurationError:
    return ConfigurationError(f"{why}. The table is not there as its model says: run manage.py migrate")


def _brief(error: Any) -> str:
    """Return the first line of a message; PostgreSQL's others show the statement."""
    return str(error).strip().partition("\n")[0]
