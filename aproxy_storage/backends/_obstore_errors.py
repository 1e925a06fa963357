"""What obstore's errors mean. Most of them are one class with a long text, which is looked into, and never quoted:
it holds the answer of the service, and on some services the URL with its signature."""

from __future__ import annotations

import re

from ..errors import (
    AccessDenied,
    AlreadyExists,
    BackendUnavailable,
    ConfigurationError,
    Conflict,
    DeadlineExceeded,
    InvalidPath,
    NotFound,
    NotSupported,
    OutOfSpace,
    StorageError,
)

try:
    from obstore import exceptions as native
except ImportError as _error:
    from ..errors import MissingDependency

    raise MissingDependency.of("obstore", "obstore") from _error

__all__ = ["NativeError", "code_of", "map_error"]

#: What obstore raises, besides ``FileNotFoundError`` and ``ValueError``.
NativeError: type[Exception] = native.BaseError

_DENIED = {
    "AccessDenied": "the credentials are good, but not for this",
    "AuthenticationFailed": "the credentials are wrong",
    "AuthorizationFailure": "the credentials are good, but not for this",
    "ExpiredToken": "the temporary credentials have expired: get new ones",
    "InvalidAccessKeyId": "there is no such access key",
    "InvalidToken": "the session token is not valid: get new temporary credentials",
    "RequestTimeTooSkewed": "this machine's clock and the service's differ too much: set the clock",
    "SignatureDoesNotMatch": "the secret key does not belong to the access key, or a proxy changes the requests",
}
_NO_CONTAINER = {"NoSuchBucket", "ContainerNotFound", "ContainerBeingDeleted"}
_ELSEWHERE = {"AuthorizationHeaderMalformed", "PermanentRedirect", "TemporaryRedirect"}
_FULL = {"EntityTooLarge", "InsufficientStorage", "QuotaExceeded", "RequestBodyTooLarge", "XMinioStorageFull"}
_BAD_NAME = {"InvalidObjectName", "InvalidResourceName", "InvalidURI", "KeyTooLongError", "XMinioParentIsObject"}
_NOT_FOUND = {"BlobNotFound", "NoSuchKey"}
_IN_THE_WAY = {"ConditionalRequestConflict", "OperationAborted"}
_THROTTLED = {"ServerBusy", "SlowDown", "Throttling", "TooManyRequests"}

# Where services answer who this machine is; asked when there are no credentials at hand.
_METADATA_SERVERS = ("169.254.169.254", "169.254.170.2", "metadata.google.internal")

_ERRNO = {2: NotFound, 13: AccessDenied, 1: AccessDenied, 28: OutOfSpace, 122: OutOfSpace, 27: OutOfSpace}
_NOT_A_DIRECTORY, _IS_A_DIRECTORY, _NAME_TOO_LONG = 20, 21, 36


def code_of(error: BaseException) -> str:
    """Return the code that the service has answered with, or in its place the status; empty where there is neither."""
    text = str(error)
    found = re.search(r"<Code>(\w+)</Code>", text) or re.search(r'code: "(\w+)"', text)
    found = found or re.search(r"status code: (\d{3})", text)
    return found[1] if found else ""


def map_error(error: Exception, what: str) -> StorageError | None:
    """Return the StorageError for an error of obstore; None for one of somebody else's."""
    failed = f"could not {what}"
    if isinstance(error, native.AlreadyExistsError):
        return AlreadyExists(f"{failed}: there is an object already")
    if isinstance(error, native.PreconditionError | native.NotModifiedError):
        return Conflict(f"{failed}: the object has changed")
    if isinstance(error, native.UnknownConfigurationKeyError):
        return ConfigurationError(f"{failed}: obstore knows no such setting; see the cause")
    if isinstance(error, FileNotFoundError) and error.errno is None:  # obstore's has none
        return _of_code(error, failed) or NotFound(f"{failed}: there is no such object")
    if isinstance(error, native.PermissionDeniedError | native.UnauthenticatedError):
        return _of_code(error, failed) or AccessDenied(f"{failed}: access denied")
    if isinstance(error, native.InvalidPathError):
        return InvalidPath(f"{failed}: the store does not take such a name")
    if isinstance(error, native.NotSupportedError) or type(error) is NotImplementedError:
        return NotSupported(f"{failed}: the store cannot do that")
    if isinstance(error, NativeError):
        return _of_code(error, failed) or _of_text(error, failed)
    return None


def _of_code(error: Exception, failed: str) -> StorageError | None:
    code = code_of(error)
    if code in _NO_CONTAINER:
        return ConfigurationError(f"{failed}: there is no such bucket or container. Create it, or look at its name")
    if code in _ELSEWHERE:
        return ConfigurationError(f"{failed}: the bucket is in another region; look at region= ({code})")
    if code in _DENIED:
        return AccessDenied(f"{failed}: {_DENIED[code]} ({code})")
    if code in _NOT_FOUND or code == "404":
        return NotFound(f"{failed}: there is no such object")
    if code in _IN_THE_WAY:
        return Conflict(f"{failed}: another request for the same object was under way ({code})")
    if code in _FULL or code in ("413", "507"):
        return OutOfSpace(f"{failed}: no room, or too large ({code})")
    if code in _BAD_NAME:
        return InvalidPath(f"{failed}: the service does not take such a name ({code})")
    if code in _THROTTLED or code == "429":
        return BackendUnavailable(f"{failed}: the service asks to slow down ({code})")
    if code == "NotImplemented" or code == "501":
        return NotSupported(f"{failed}: the service cannot do that. See conditional_writes= in docs/obstore.md")
    if re.fullmatch(r"4\d\d", code):
        return BackendUnavailable(f"{failed}: the service refused the request ({code})", retryable=False)
    if code and not code.startswith("5"):  # a code that is not listed here; what it means depends on the status
        status = re.search(r"status code: (\d{3})", str(error))
        if status and status[1][0] == "4":
            return BackendUnavailable(f"{failed}: the service refused the request ({code})", retryable=False)
    if code:
        return BackendUnavailable(f"{failed}: the service is out of order ({code})", outcome_unknown=True)
    return None


def _of_text(error: Exception, failed: str) -> StorageError:
    text = str(error)
    if os_error := re.search(r"\(os error (\d+)\)", text):
        number = int(os_error[1])
        if number in (_NOT_A_DIRECTORY, _IS_A_DIRECTORY, _NAME_TOO_LONG):
            return InvalidPath(f"{failed}: a file stands in the place of a directory, or the name is too long")
        if "HTTP" not in text:
            cls = _ERRNO.get(number, BackendUnavailable)
            return cls(f"{failed}: the file system refused (errno {number})")
    if "InvalidPath" in text or "trailing '/#" in text:
        return InvalidPath(f"{failed}: the store does not take such a name")
    if any(host in text for host in _METADATA_SERVERS):
        return ConfigurationError(
            f"{failed}: there are no credentials: none were passed, none are in the environment, and no metadata "
            "server of a cloud answers here"
        )
    if "BadScheme" in text:
        return ConfigurationError(f"{failed}: plain http: is not allowed; give client_options={{'allow_http': True}}")
    if re.search(r"kind: Connect\b", text):
        # Nothing was sent.
        return BackendUnavailable(f"{failed}: the endpoint cannot be reached")
    if re.search(r"kind: Timeout\b|TimedOut", text):
        return DeadlineExceeded(f"{failed}: no answer in time", outcome_unknown=True)
    if re.search(r"kind: (Interrupted|Request|Decode|Unknown)\b|HTTP error", text):
        return BackendUnavailable(f"{failed}: the connection broke", outcome_unknown=True)
    return BackendUnavailable(f"{failed}: {type(error).__name__}; see the cause", outcome_unknown=True)
