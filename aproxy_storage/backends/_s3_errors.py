"""What S3's errors mean: botocore's, and those of aiohttp that botocore lets through. No error text of the service is
quoted, because it may hold parts of a signed request."""

from __future__ import annotations

import socket
import ssl
from typing import Any

import aiohttp
from botocore import exceptions as botocore_errors

from ..errors import (
    AccessDenied,
    AlreadyExists,
    BackendUnavailable,
    ConfigurationError,
    Conflict,
    DeadlineExceeded,
    IntegrityError,
    InvalidPath,
    NotFound,
    NotSupported,
    OutOfSpace,
    StorageError,
)

__all__ = [
    "BROKEN",
    "code_of",
    "has_request_id",
    "is_throttled",
    "is_transient",
    "map_error",
    "was_answered_out_of_order",
    "was_never_sent",
]

#: What a request, or the body of an answer, raises when its connection breaks, or ends too early. aiobotocore calls a
#: reset one EndpointConnectionError, as it does one that never was: `was_never_sent` tells them apart, so ask it first.
BROKEN = (
    botocore_errors.HTTPClientError,
    botocore_errors.ConnectionError,
    botocore_errors.IncompleteReadError,
    aiohttp.ClientError,
    ConnectionError,
)

_NOT_FOUND = {"NoSuchKey", "NoSuchVersion", "NotFound"}
_WITHOUT_BODY = {"HeadBucket", "HeadObject"}  # operations that are answered by the status alone
_TAKEN = {"PreconditionFailed", "412"}
_IN_THE_WAY = {"ConditionalRequestConflict", "OperationAborted", "409"}
_GONE_UPLOAD = {"NoSuchUpload"}
_THROTTLED = {
    "BandwidthLimitExceeded", "RequestLimitExceeded", "RequestThrottled", "SlowDown", "SlowDownRead", "SlowDownWrite",
    "Throttling", "ThrottlingException", "TooManyRequests", "TooManyRequestsException",
}  # fmt: skip
_SLOW_CLIENT = {"RequestTimeout"}
_DAMAGED = {"BadDigest", "IncompleteBody", "InvalidDigest", "XAmzContentChecksumMismatch", "XAmzContentSHA256Mismatch"}
_NO_DIRECTORY = {"XMinioObjectExistsAsDirectory", "XMinioParentIsObject"}
_ARCHIVED = {"InvalidObjectState", "ObjectNotInActiveTierError"}
_FULL = {"InsufficientStorage", "QuotaExceeded", "XMinioStorageFull", "EntityTooLarge"}
_BAD_NAME = {"InvalidObjectName", "InvalidURI", "KeyTooLongError", "XMinioInvalidObjectName"}
_ELSEWHERE = {
    "AuthorizationHeaderMalformed", "IllegalLocationConstraintException", "PermanentRedirect", "Redirect",
    "TemporaryRedirect",
}  # fmt: skip
_REDIRECTS = (301, 302, 307, 308)

_DENIED = {
    "AccessDenied": "the credentials are good, but not for this. Give them the right (docs/s3.md lists those needed)",
    "AccountProblem": "there is a problem with the account",
    "AllAccessDisabled": "all access is disabled",
    "ExpiredToken": "the temporary credentials have expired: get new ones",
    "ExpiredTokenException": "the temporary credentials have expired: get new ones",
    "InvalidAccessKeyId": "there is no such access key: look at access_key, or at the environment that it comes from",
    "InvalidToken": "the session token is not valid: get new temporary credentials",
    "NotSignedUp": "the account is not signed up for S3",
    "RequestExpired": "the request was too old when it arrived: set this machine's clock",
    "RequestTimeTooSkewed": "this machine's clock and the service's differ by more than 15 minutes: set the clock",
    "SignatureDoesNotMatch": "the secret key does not belong to the access key, or a proxy changes the requests",
    "TokenRefreshRequired": "the temporary credentials have to be renewed",
    "Unauthorized": "the service does not take the request for signed: look at the credentials, and at proxies",
    "401": "the service, or something in front of it, does not take the request for signed: look at the credentials",
    "403": "the credentials are wrong, or not good for this. Without the right to list the bucket, an object that "
    "does not exist is answered so too",
}


def map_error(error: Exception, what: str) -> StorageError:
    """Return the StorageError for a native `error`; `what` says what was tried, e.g. ``"read 'a.txt' in …"``."""
    if isinstance(error, botocore_errors.ClientError):
        return _of_answer(error, what)
    if isinstance(error, botocore_errors.NoCredentialsError | botocore_errors.PartialCredentialsError):
        return ConfigurationError(
            f"could not {what}: there are no credentials, or only a part. Pass access_key and secret_key, or set "
            "AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, a profile, or a role of the machine. If it has one, the "
            "server that gives its credentials has not answered; they are looked for again in some seconds"
        )
    if isinstance(error, botocore_errors.ProfileNotFound | botocore_errors.ConfigParseError):
        return ConfigurationError(f"could not {what}: the AWS profile or its file cannot be read")
    if isinstance(error, botocore_errors.CredentialRetrievalError | botocore_errors.TokenRetrievalError):
        return AccessDenied(f"could not {what}: the credentials could not be fetched ({type(error).__name__})")
    if isinstance(error, botocore_errors.SSLError | ssl.SSLError | aiohttp.ClientSSLError):
        return BackendUnavailable(
            f"could not {what}: there was no TLS connection. Look at the certificate of the endpoint, and at verify=",
            retryable=False,
        )
    if isinstance(error, botocore_errors.FlexibleChecksumError):
        return IntegrityError(f"could not {what}: the bytes that came do not fit the checksum of the object")
    if isinstance(error, botocore_errors.ConnectTimeoutError):
        return DeadlineExceeded(f"could not {what}: no connection in time")
    if isinstance(error, botocore_errors.ReadTimeoutError | TimeoutError):
        return DeadlineExceeded(f"could not {what} in time", outcome_unknown=True)
    if was_never_sent(error):
        return BackendUnavailable(f"could not {what}: the endpoint cannot be reached")
    if isinstance(error, BROKEN):
        return BackendUnavailable(f"could not {what}: the connection broke", outcome_unknown=True)
    if isinstance(error, botocore_errors.BotoCoreError | ValueError):
        # Something is wrong with the arguments (a bad endpoint, a parameter that is none): nothing was sent.
        return ConfigurationError(f"could not {what}: {type(error).__name__} before anything was sent; see the cause")
    return BackendUnavailable(
        f"could not {what}: unexpected {type(error).__name__}", retryable=False, outcome_unknown=True
    )


def code_of(error: BaseException | None) -> str:
    """Return the code of an error that the service has answered, of it or of its cause; empty for all others."""
    if isinstance(error, StorageError):
        error = error.__cause__
    return str(error.response.get("Error", {}).get("Code", "")) if isinstance(error, _ClientError) else ""


_ClientError = botocore_errors.ClientError


def has_request_id(error: StorageError) -> bool:
    """Return whether the answer has the number that S3 gives a request. Without it the answer may be that of something
    in front of the service."""
    native = error.__cause__
    metadata = native.response.get("ResponseMetadata", {}) if isinstance(native, _ClientError) else {}
    return "x-amz-request-id" in metadata.get("HTTPHeaders", {})


def is_transient(error: Exception) -> bool:
    """Return whether the same request may well succeed a moment later."""
    if isinstance(error, _ClientError):
        code = code_of(error)
        if _is_throttled(error) or code in _SLOW_CLIENT | _IN_THE_WAY:
            return True
        return was_answered_out_of_order(error) and not _is_final(error, code)
    if isinstance(error, botocore_errors.SSLError | botocore_errors.ReadTimeoutError | ssl.SSLError):
        return False  # a timeout has cost as much time as there was
    if isinstance(error, aiohttp.ClientSSLError | aiohttp.InvalidURL):
        return False
    lost = botocore_errors.ConnectionError | botocore_errors.ConnectionClosedError | aiohttp.ClientError
    return isinstance(error, lost | ConnectionError)


def was_never_sent(error: BaseException) -> bool:
    """Return whether the request cannot have reached the service: there was no connection."""
    if isinstance(error, botocore_errors.ConnectTimeoutError):
        return True
    native = getattr(error, "kwargs", {}).get("error") if isinstance(error, botocore_errors.BotoCoreError) else error
    # A proxy has said no to CONNECT: then the request itself was not sent.
    return isinstance(native, aiohttp.ClientConnectorError | aiohttp.ClientHttpProxyError | socket.gaierror)


def is_throttled(error: Exception) -> bool:
    """Return whether the service asks for patience."""
    return isinstance(error, _ClientError) and (_is_throttled(error) or _status(error) == 503)


def was_answered_out_of_order(error: Exception) -> bool:
    """Return whether somebody has answered that it did not work, and the request may have been carried out."""
    return isinstance(error, _ClientError) and _status(error) >= 500


def _is_throttled(error: Any) -> bool:
    # A 503 may come from a balancer that has lost a request on its way: then it may have been carried out.
    return code_of(error) in _THROTTLED or _status(error) == 429


def _status(error: Any) -> int:
    return int(error.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0) or 0)


def _is_final(error: Any, code: str) -> bool:
    return code in _FULL or code == "NotImplemented" or _status(error) in (501, 507)


def _of_answer(error: Any, what: str) -> StorageError:
    code, status = code_of(error), _status(error)
    failed = f"could not {what}"
    if code in _NOT_FOUND or (code == "404" and error.operation_name in _WITHOUT_BODY):
        return NotFound(f"{failed}: there is no such object")
    if code == "NoSuchBucket":
        return ConfigurationError(f"{failed}: there is no such bucket at this endpoint. Create it, or look at bucket=")
    if code in _TAKEN:
        return AlreadyExists(f"{failed}: there is an object already")
    if code in _IN_THE_WAY:
        return Conflict(f"{failed}: another request for the same object was under way ({code})")
    if code in _GONE_UPLOAD:
        return Conflict(f"{failed}: the multipart upload is gone; somebody, or a rule of the bucket, has ended it")
    if code in _ELSEWHERE or status in _REDIRECTS:
        headers = error.response.get("ResponseMetadata", {}).get("HTTPHeaders", {})
        region = error.response["Error"].get("Region") or headers.get("x-amz-bucket-region")
        if region is None:
            return ConfigurationError(
                f"{failed}: the service sends requests elsewhere, and does not say which region that is. Look at "
                f"region=, and at endpoint_url=: should it begin with https:? ({code})"
            )
        return ConfigurationError(
            f"{failed}: the bucket is in another region (it says {region!r}); look at region= ({code})"
        )
    if code in _DENIED:
        return AccessDenied(f"{failed}: {_DENIED[code]} ({code})")
    if code in _FULL or status in (413, 507):
        return OutOfSpace(f"{failed}: no room, or too large ({code})")
    if code in _BAD_NAME:
        return InvalidPath(f"{failed}: the service does not take such a name ({code})")
    if code in _NO_DIRECTORY:
        return InvalidPath(f"{failed}: an object lies in the place of a directory, or a directory in its ({code})")
    if code in _DAMAGED:
        return BackendUnavailable(f"{failed}: the bytes were damaged on the way ({code})")
    if code in _ARCHIVED:
        return BackendUnavailable(f"{failed}: the object is archived; restore it first", retryable=False)
    if code == "NotImplemented" or status == 501:
        return NotSupported(f"{failed}: the service cannot do that ({code}). See conditional_writes= in docs/s3.md")
    if _is_throttled(error):
        return BackendUnavailable(f"{failed}: the service asks to slow down ({code})")
    if code in _SLOW_CLIENT:
        return BackendUnavailable(f"{failed}: the service has waited too long for the content ({code})")
    if status in (401, 403):
        return AccessDenied(f"{failed}: {_DENIED['401'] if status == 401 else 'access denied'} ({code or status})")
    if code == "400" and error.operation_name in _WITHOUT_BODY:
        return BackendUnavailable(
            f"{failed}: the service refused the request, and here it gives no reason (400). Have temporary credentials "
            "expired, or is the region another one?",
            retryable=False,
        )
    if status == 404 and code in ("404", ""):
        return BackendUnavailable(
            f"{failed}: something answered 404 (not found) that does not speak S3. Look at endpoint_url, and at the "
            "balancer or proxy in front of the service"
        )
    if status >= 500:
        return BackendUnavailable(f"{failed}: the service is out of order ({code or status})", outcome_unknown=True)
    return BackendUnavailable(f"{failed}: the service refused the request ({code or status})", retryable=False)
