"""Every exception this library raises on purpose.

::

    StorageError                      root: operation, path, backend, retryable, outcome_unknown
    ├── NotFound                      (FileNotFoundError)
    ├── AlreadyExists                 (FileExistsError)
    ├── InvalidPath                   (ValueError)
    ├── AccessDenied                  (PermissionError)
    ├── NotSupported                  (NotImplementedError)
    ├── Conflict                      somebody else changed it first
    ├── BackendUnavailable            (ConnectionError)
    │   └── DeadlineExceeded          (TimeoutError)
    ├── OutOfSpace                    (OSError)
    ├── ContentError                  the source failed, was short or long, or cannot be replayed
    ├── IntegrityError                stored bytes are gone or differ from the record
    └── ConfigurationError
        └── MissingDependency         (ImportError); names the pip line

The native error stays as ``__cause__``. No message holds a credential or a signed query.
"""

from __future__ import annotations

import errno
from collections.abc import Iterable
from typing import Any, ClassVar, Self

__all__ = [
    "AccessDenied",
    "AlreadyExists",
    "BackendUnavailable",
    "ConfigurationError",
    "Conflict",
    "ContentError",
    "DeadlineExceeded",
    "IntegrityError",
    "InvalidPath",
    "MissingDependency",
    "NotFound",
    "NotSupported",
    "OutOfSpace",
    "StorageError",
    "from_os_error",
    "outcome_unknown",
]


class StorageError(Exception):
    """The root of all errors of this library.

    Attributes:
        operation: the verb that failed (``"write"``, ``"save"`` …), where known.
        path: the path or key it was about, where known.
        backend: the backend that failed, as text, where known.
        retryable: the same call may succeed later without a change of its arguments.
        outcome_unknown: the operation may have taken effect, or may still do so.
        attempts: the errors of earlier originals, oldest first, where a placement tried several.
    """

    default_retryable: ClassVar[bool] = False
    default_errno: ClassVar[int | None] = None

    def __init__(
        self,
        message: str = "",
        *,
        operation: str | None = None,
        path: str | None = None,
        backend: str | None = None,
        retryable: bool | None = None,
        outcome_unknown: bool = False,
    ) -> None:
        super().__init__(message)
        self.operation = operation
        self.path = path
        self.backend = backend
        self.retryable = self.default_retryable if retryable is None else retryable
        self.outcome_unknown = outcome_unknown
        self.attempts: tuple[BaseException, ...] = ()
        # With errno but no strerror, OSError still prints our message.
        self.errno: int | None = self.default_errno

    def located(self, *, operation: str, path: str | None, backend: str) -> Self:
        """Fill in where the error happened, unless a layer nearer to it already has; return self."""
        self.operation = self.operation or operation
        if self.path is None:
            self.path = path
        self.backend = self.backend or backend
        return self

    def __reduce__(self) -> tuple[Any, ...]:
        message = self.args[0] if self.args else ""
        # ImportError keeps `path` in a slot of its own, outside of the dictionary.
        return (type(self), (message,), {**self.__dict__, "path": self.path})


class NotFound(StorageError, FileNotFoundError):
    """There is no such file."""

    default_errno = errno.ENOENT


class AlreadyExists(StorageError, FileExistsError):
    """The path or key is taken."""

    default_errno = errno.EEXIST


class InvalidPath(StorageError, ValueError):
    """The path can never name a file here; raised before any I/O."""


class AccessDenied(StorageError, PermissionError):
    """The service refused: missing rights or wrong credentials."""

    default_errno = errno.EACCES


class NotSupported(StorageError, NotImplementedError):
    """This backend cannot do that at all; see its ``capabilities``."""


class Conflict(StorageError):
    """Somebody else changed the record or the object first; read it again and decide."""

    default_retryable = True


class BackendUnavailable(StorageError, ConnectionError):
    """The service cannot be reached or is out of order."""

    default_retryable = True


class DeadlineExceeded(BackendUnavailable, TimeoutError):
    """No answer in time. What was asked for may still take effect, see ``outcome_unknown``."""

    default_errno = errno.ETIMEDOUT


class OutOfSpace(StorageError, OSError):
    """The disk, the quota or the bucket is full."""

    default_errno = errno.ENOSPC


class ContentError(StorageError):
    """The content to be saved failed, was shorter or longer than declared, or cannot be read again."""


class IntegrityError(StorageError):
    """The stored bytes are gone, or differ from what the record says."""


class ConfigurationError(StorageError):
    """The storage is put together wrongly; no file was touched."""


class MissingDependency(ConfigurationError, ImportError):
    """A package of an optional extra is not installed; the message names the pip line."""

    @classmethod
    def of(cls, package: str, extra: str) -> MissingDependency:
        """Return the error that tells how to install `extra`, which brings `package`."""
        return cls(f"{package} is not installed. Install it with: pip install 'aproxy-storage[{extra}]'")


def outcome_unknown(error: BaseException) -> bool:
    """Return whether the operation that raised `error` may have taken effect, or may still do so.

    Errors that say nothing about it, a cancellation above all, count as unknown. A backend that knows better
    after a cancellation sets ``outcome_unknown = False`` on the ``CancelledError``.
    """
    return bool(getattr(error, "outcome_unknown", True))


def copy_of(error: StorageError) -> StorageError:
    """Return a copy: an exception that several tasks raise would collect the tracebacks of all of them."""
    copy = type(error)(
        str(error.args[0]) if error.args else "", retryable=error.retryable, outcome_unknown=error.outcome_unknown
    )
    copy.__cause__ = error.__cause__
    return copy


def copies_of(error: StorageError, operation: str, paths: Iterable[str], backend: str) -> list[StorageError]:
    """Return the error of one statement for many as the error of each of them."""
    return [copy_of(error).located(operation=operation, path=path, backend=backend) for path in paths]


_ERRNO_CLASSES: dict[int, type[StorageError]] = {
    errno.ENOENT: NotFound,
    errno.EEXIST: AlreadyExists,
    errno.EACCES: AccessDenied,
    errno.EPERM: AccessDenied,
    errno.ENAMETOOLONG: InvalidPath,
    errno.EILSEQ: InvalidPath,
    errno.ELOOP: InvalidPath,
    errno.EISDIR: InvalidPath,
    errno.ENOTDIR: InvalidPath,
    errno.ENOSPC: OutOfSpace,
    errno.EDQUOT: OutOfSpace,
    errno.EFBIG: OutOfSpace,
    errno.ETIMEDOUT: DeadlineExceeded,
}


def from_os_error(error: OSError, what: str) -> StorageError:
    """Return the StorageError for a native `error`; anything not listed is an outage (EIO, EROFS, ESTALE …).

    `what` says in words what was tried, e.g. ``"write 'a.txt'"``.
    """
    cls = _ERRNO_CLASSES.get(error.errno or 0, BackendUnavailable)
    reason = error.strerror or str(error) or type(error).__name__
    return cls(f"could not {what}: {reason}")
