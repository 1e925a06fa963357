"""What the errors of Django's storages mean: Django's own, and those of drivers that this library does not know, told
by what they have in common. None of them is imported."""

from __future__ import annotations

import io
from collections.abc import Mapping
from typing import Any

from ..errors import (
    AccessDenied,
    BackendUnavailable,
    ConfigurationError,
    Conflict,
    DeadlineExceeded,
    InvalidPath,
    NotFound,
    NotSupported,
    OutOfSpace,
    StorageError,
    from_os_error,
)
from ._django_content import InterruptedContent

__all__ = ["NO_FILE", "map_error"]

# What storages say of a directory, or of a name below a file; FileExistsError is Django's own way.
NO_FILE = (FileNotFoundError, IsADirectoryError, NotADirectoryError, FileExistsError)


def map_error(error: Exception, what: str) -> StorageError | None:
    failed = f"could not {what}"
    bases = {cls.__name__ for cls in type(error).__mro__}
    if "SuspiciousOperation" in bases:
        return InvalidPath(f"{failed}: the storage refuses such a name")
    if "ImproperlyConfigured" in bases:
        return ConfigurationError(f"{failed}: the storage is not configured; see the cause")
    if isinstance(error, NotImplementedError):
        return NotSupported(f"{failed}: the storage cannot do that")
    if isinstance(error, io.UnsupportedOperation):  # an OSError too, but nothing that a service has done
        if what.startswith("write "):
            return NotSupported(
                f"{failed}: the storage reads the content more than once, which a stream allows up to 256 KiB only; "
                "with max_workers=1 content of any size is kept in a temporary file"
            )
        return NotSupported(f"{failed}: the storage's files cannot do that")
    if isinstance(error, NO_FILE):
        if what.startswith("write "):
            return InvalidPath(f"{failed}: a file stands in the place of a directory, or the other way round")
        return NotFound(f"{failed}: there is no such file")
    if isinstance(error, PermissionError):
        return AccessDenied(f"{failed}: access denied")
    if isinstance(error, TimeoutError):
        return DeadlineExceeded(f"{failed} in time", outcome_unknown=True)
    if isinstance(error, InterruptedContent):
        return Conflict(f"{failed}: the content was interrupted")
    if isinstance(error, OSError) and error.errno is not None and error.strerror:
        return from_os_error(error, what)
    name, status = type(error).__name__, _status(error)
    if status in (401, 403):
        return AccessDenied(f"{failed}: access denied ({status})")
    if status == 404:
        if "Bucket" in (code := _code(error)) or "Container" in code:
            return ConfigurationError(f"{failed}: the service has no such bucket")
        return NotFound(f"{failed}: the service has no such object, or no such bucket")
    if status in (413, 507):
        return OutOfSpace(f"{failed}: no room, or too large ({status})")
    if status == 429 or (status or 0) >= 500:
        # What stands before a service may give up while the service goes on.
        unknown = status != 429
        return BackendUnavailable(
            f"{failed}: the service is out of order, or asks to slow down ({status})", outcome_unknown=unknown
        )
    if status is not None:
        return BackendUnavailable(f"{failed}: the service refused the request ({status})", retryable=False)
    if "Timeout" in name:
        return DeadlineExceeded(f"{failed} in time ({name})", outcome_unknown=True)
    if "Credential" in name:
        return ConfigurationError(f"{failed}: there are no credentials, or only a part ({name})")
    if isinstance(error, OSError) or "Connect" in name or "Transport" in name or "SSL" in name:
        # Not its text: that of requests holds the URL.
        return BackendUnavailable(f"{failed}: the service cannot be reached ({name})", outcome_unknown=True)
    return None


def _status(error: Exception) -> int | None:
    """Return the HTTP status that an error carries, as botocore, requests, Azure's and Google's clients keep it."""
    response: Any = getattr(error, "response", None)
    if isinstance(response, Mapping):
        found: Any = response.get("ResponseMetadata", {}).get("HTTPStatusCode")
    else:
        found = getattr(response, "status_code", None)
    for name in ("status_code", "code", "status"):
        found = found if isinstance(found, int) else getattr(error, name, None)
    return found if isinstance(found, int) and 100 <= found < 600 else None


def _code(error: Exception) -> str:
    """Return the word that botocore's and Azure's clients have for the error."""
    response: Any = getattr(error, "response", None)
    if isinstance(response, Mapping):
        return str(response.get("Error", {}).get("Code", ""))
    return str(getattr(error, "error_code", ""))
