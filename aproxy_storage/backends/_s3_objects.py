"""What S3 says of an object, and what we say of one to S3."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from email.errors import HeaderParseError
from email.header import Header, decode_header, make_header
from types import MappingProxyType
from typing import Any

from ..errors import BackendUnavailable, ConfigurationError
from ..records import ObjectInfo

__all__ = [
    "TOKEN",
    "ObjectParameters",
    "described",
    "every_request_of",
    "info_of",
    "listed",
    "parameters_of",
    "size_of",
]

#: Further parameters of PutObject for all objects, or for each by its key.
ObjectParameters = Mapping[str, Any] | Callable[[str], Mapping[str, Any]]

#: The name of the user-defined metadata that keeps the token of a write (``x-amz-meta-aproxy-token``).
TOKEN = "aproxy-token"

# What a copy takes over, by the names in the answer of HeadObject, which are those of the requests too.
_KEPT_BY_COPIES = ("CacheControl", "ContentDisposition", "ContentEncoding", "ContentLanguage", "ContentType")

_OURS = {"Bucket", "Key", "Body", "ContentLength", "IfMatch", "IfNoneMatch", "UploadId"}
_EVERYWHERE = ("ExpectedBucketOwner", "RequestPayer")  # what S3 wants of those who read too


def every_request_of(given: ObjectParameters | None) -> dict[str, Any]:
    """Return which of these parameters every request has to have.

    Raises:
        ConfigurationError: one of them would do harm.
    """
    if given is None or callable(given):
        return {}
    allowed = _allowed(given)
    return {name: allowed[name] for name in _EVERYWHERE if name in allowed}


def parameters_of(
    given: ObjectParameters, key: str, content_type: str | None, metadata: Mapping[str, str], token: str
) -> dict[str, Any]:
    """Return the parameters of the request that begins an object: what is `given` for all, and what is its own.

    Raises:
        ConfigurationError: one of those for all would do harm.
    """
    params = dict(_allowed(given(key) if callable(given) else given))
    if content_type is not None:
        params["ContentType"] = content_type
    params["Metadata"] = metadata_of({**params.get("Metadata", {}), **metadata}, token)
    return params


def _allowed(params: Mapping[str, Any]) -> Mapping[str, Any]:
    if not _OURS.isdisjoint(params):
        raise ConfigurationError(f"object_parameters: {sorted(_OURS.intersection(params))} are not for the caller")
    if any(name.startswith("SSECustomer") for name in params):
        raise ConfigurationError(
            "object_parameters: with a key of yours (SSE-C) objects could be written, but not read. Let the service "
            "keep the key: ServerSideEncryption, SSEKMSKeyId"
        )
    return params


def metadata_of(metadata: Mapping[str, str], token: str) -> dict[str, str]:
    """Return the user-defined metadata of a new object. Values are headers, so that other than ASCII is encoded as
    in those of mail (RFC 2047), as S3 itself answers it; and what looks like that."""
    encoded = {
        name: value if value.isascii() and "=?" not in value else Header(value, "utf-8", maxlinelen=100_000).encode()
        for name, value in metadata.items()
    }
    return {**encoded, TOKEN: token}


def size_of(answer: Mapping[str, Any], what: str) -> int:
    """Return how many bytes the answer of HeadObject or GetObject is about.

    Raises:
        BackendUnavailable: it does not say.
    """
    try:
        return int(answer["ContentLength"])
    except KeyError:
        raise BackendUnavailable(
            f"could not {what}: the service does not tell the size (Content-Length). Look at proxies in front of it, "
            "which must not compress, nor send in chunks",
            retryable=False,
        ) from None


def info_of(key: str, answer: Mapping[str, Any], *, size: int | None = None) -> ObjectInfo:
    """Return what the answer of HeadObject or GetObject says. Of a range `size` has to be given."""
    metadata = dict(answer.get("Metadata") or {})
    token = metadata.pop(TOKEN, None)
    moment = answer.get("LastModified")
    return ObjectInfo(
        key,
        size=size_of(answer, f"look at {key!r}") if size is None else size,
        modified_at=moment,
        changed_at=moment,  # no caller can set it
        etag=answer.get("ETag"),
        content_type=answer.get("ContentType"),
        metadata=MappingProxyType({name: _decoded(value) for name, value in metadata.items()}),
        token=token,
    )


def _decoded(value: str) -> str:
    if "=?" not in value:
        return value
    try:
        return str(make_header(decode_header(value)))
    except (ValueError, LookupError, HeaderParseError):
        return value


def listed(key: str, entry: Mapping[str, Any]) -> ObjectInfo:
    """Return what one entry of a listing says."""
    moment = entry.get("LastModified")
    return ObjectInfo(key, size=entry.get("Size"), modified_at=moment, changed_at=moment, etag=entry.get("ETag"))


def described(answer: Mapping[str, Any], params: Mapping[str, Any]) -> dict[str, Any]:
    """Return the parameters that give a copy what the original has, and the token of `params`; also from those what the
    original has not."""
    kept: dict[str, Any] = {name: answer[name] for name in _KEPT_BY_COPIES if answer.get(name)}
    ours = params["Metadata"]
    return {**params, **kept, "Metadata": {**ours, **(answer.get("Metadata") or {}), TOKEN: ours[TOKEN]}}
