"""What S3 says of an object, and what we say of one to S3."""

from __future__ import annotations

from collections.abc import Mapping
from email.header import Header, decode_header, make_header
from types import MappingProxyType
from typing import Any

from ..records import ObjectInfo

__all__ = ["TOKEN", "described", "info_of", "listed", "metadata_of"]

#: The name of the user-defined metadata that keeps the token of a write (``x-amz-meta-aproxy-token``).
TOKEN = "aproxy-token"

# What a copy takes over, by the names in the answer of HeadObject, which are those of the requests too.
_KEPT_BY_COPIES = ("CacheControl", "ContentDisposition", "ContentEncoding", "ContentLanguage", "ContentType")


def metadata_of(metadata: Mapping[str, str], token: str) -> dict[str, str]:
    """Return the user-defined metadata of a new object. Values are headers, so that other than ASCII is encoded as
    in those of mail (RFC 2047), as S3 itself answers it."""
    encoded = {
        name: value if value.isascii() else Header(value, "utf-8", maxlinelen=100_000).encode()
        for name, value in metadata.items()
    }
    return {**encoded, TOKEN: token}


def info_of(key: str, answer: Mapping[str, Any], *, size: int | None = None) -> ObjectInfo:
    """Return what the answer of HeadObject or GetObject says. Of a range `size` has to be given."""
    metadata = dict(answer.get("Metadata") or {})
    token = metadata.pop(TOKEN, None)
    moment = answer.get("LastModified")
    return ObjectInfo(
        key,
        size=answer["ContentLength"] if size is None else size,
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
    except (ValueError, LookupError):
        return value


def listed(key: str, entry: Mapping[str, Any]) -> ObjectInfo:
    """Return what one entry of a listing says."""
    moment = entry.get("LastModified")
    return ObjectInfo(key, size=entry.get("Size"), modified_at=moment, changed_at=moment, etag=entry.get("ETag"))


def described(answer: Mapping[str, Any], token: str) -> dict[str, Any]:
    """Return the parameters that give a copy what the original has, and a token of its own."""
    params: dict[str, Any] = {name: answer[name] for name in _KEPT_BY_COPIES if answer.get(name)}
    params["Metadata"] = {**(answer.get("Metadata") or {}), TOKEN: token}
    return params
