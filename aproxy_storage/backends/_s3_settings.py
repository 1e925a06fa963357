"""The settings of django-storages, read as they are, and ``s3://`` URLs: both become arguments of `S3Backend`."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from typing import Any
from urllib.parse import urlsplit

from ..errors import ConfigurationError
from ..urls import URL, boolean, choice, optional
from ._s3_urls import CloudFrontKey

__all__ = ["configured_endpoint", "from_django_storages", "from_url", "is_amazon"]

# Not all hosts of Amazon's: on some of them its customers run services of their own.
_AMAZON = re.compile(
    r"(?:.+\.)?s3(?:-[a-z0-9-]+)?(?:\.dualstack)?(?:\.[a-z]{2}(?:-[a-z]+)+-\d+)?(?:\.vpce)?\.amazonaws\.com(?:\.cn)?"
)

# Argument -> names of the setting without its prefix, the first that is set counts.
_NAMES: dict[str, tuple[str, ...]] = {
    "bucket": ("STORAGE_BUCKET_NAME",),
    "prefix": ("LOCATION",),
    "access_key": ("S3_ACCESS_KEY_ID", "ACCESS_KEY_ID"),
    "secret_key": ("S3_SECRET_ACCESS_KEY", "SECRET_ACCESS_KEY"),
    "session_token": ("SESSION_TOKEN", "SECURITY_TOKEN"),
    "profile": ("S3_SESSION_PROFILE",),
    "endpoint_url": ("S3_ENDPOINT_URL",),
    "region": ("S3_REGION_NAME",),
    "addressing_style": ("S3_ADDRESSING_STYLE",),
    "verify": ("S3_VERIFY",),
    "proxies": ("S3_PROXIES",),
    "config": ("S3_CLIENT_CONFIG",),
    "object_parameters": ("S3_OBJECT_PARAMETERS",),
    "custom_domain": ("S3_CUSTOM_DOMAIN",),
    "url_protocol": ("S3_URL_PROTOCOL",),
    "querystring_auth": ("QUERYSTRING_AUTH",),
    "expires_in": ("QUERYSTRING_EXPIRE",),
}

# Shared by the buckets of one account, so that a second prefix takes them from AWS_, as django-private-storage does.
_SHARED = {"access_key", "secret_key", "session_token", "region", "url_protocol"}


def configured_endpoint(endpoint_url: str | None, client: Any) -> str | None:
    """Return the endpoint that requests will go to, of the argument, the client or the environment; None: Amazon's own.
    One that only the AWS configuration file names is not seen."""
    if client is not None:
        found = getattr(getattr(client, "meta", None), "endpoint_url", None) or endpoint_url
    elif endpoint_url is not None:
        return endpoint_url
    elif os.environ.get("AWS_IGNORE_CONFIGURED_ENDPOINT_URLS", "").lower() == "true":
        return None
    else:
        found = os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL")
    return None if is_amazon(found) else found or None


def is_amazon(endpoint_url: str | None) -> bool:
    """Return whether an endpoint is one of Amazon's S3; None and nothing stand for one."""
    return not endpoint_url or _AMAZON.fullmatch(urlsplit(endpoint_url).hostname or "") is not None


def from_django_storages(settings: Any, prefix: str) -> dict[str, Any]:
    """Return the arguments that `settings`, an object with attributes or a mapping, stands for.

    Raises:
        ConfigurationError: no bucket is named, or a setting asks for what there is not here.
    """

    def get(name: str, default: Any = None) -> Any:
        if isinstance(settings, Mapping):
            return settings.get(name, default)
        return getattr(settings, name, default)

    found: dict[str, Any] = {}
    for argument, names in _NAMES.items():
        prefixes = (prefix, "AWS_") if argument in _SHARED else (prefix,)
        for full_name in (start + name for start in prefixes for name in names):
            if (value := get(full_name)) not in (None, ""):  # as django-storages has it
                found[argument] = value
                break
    if not found.get("bucket"):
        raise ConfigurationError(f"the setting {prefix}STORAGE_BUCKET_NAME is missing: the bucket to use")
    if found.get("profile"):
        found.pop("access_key", None)
        found.pop("secret_key", None)
    if not found.get("prefix"):
        found.pop("prefix", None)
    if get(f"{prefix}IS_GZIPPED"):
        raise ConfigurationError(
            f"{prefix}IS_GZIPPED: content is stored as it comes. Compress before saving and give ContentEncoding, or "
            "let the CDN compress"
        )
    if get(f"{prefix}S3_USE_SSL") is False and not found.get("endpoint_url"):
        raise ConfigurationError(f"{prefix}S3_USE_SSL=False: give {prefix}S3_ENDPOINT_URL with http:// instead")
    if acl := get(f"{prefix}DEFAULT_ACL"):
        found["object_parameters"] = {"ACL": acl, **found.get("object_parameters", {})}
    if (transfer := get(f"{prefix}S3_TRANSFER_CONFIG")) is not None:
        found["part_bytes"] = transfer.multipart_chunksize
        found["parts"] = transfer.max_request_concurrency
    key_id, key = get(f"{prefix}CLOUDFRONT_KEY_ID"), get(f"{prefix}CLOUDFRONT_KEY")
    if bool(key_id) != bool(key):
        raise ConfigurationError(f"{prefix}CLOUDFRONT_KEY_ID and {prefix}CLOUDFRONT_KEY belong together: give both")
    if key_id:
        found["cloudfront"] = CloudFrontKey(key_id, key)
    return found


def from_url(text: str) -> dict[str, Any]:
    """Return the arguments that ``s3://bucket/prefix?region=…`` stands for.

    Raises:
        ConfigurationError: it names no bucket, or has an unknown parameter.
    """
    parsed = URL.parse(text)
    if not parsed.host or parsed.port is not None:
        raise ConfigurationError(f"{parsed} names no bucket: s3://bucket/prefix?endpoint_url=https://host:port")
    found: dict[str, Any] = {"bucket": parsed.host}
    if parsed.path.strip("/"):
        found["prefix"] = parsed.path.strip("/")
    if (parsed.username is None) != (parsed.password is None):
        raise ConfigurationError(f"{parsed}: an access key needs its secret: s3://KEY:SECRET@bucket")
    if parsed.username is not None:
        found.update(access_key=parsed.username, secret_key=parsed.password)
    options = parsed.options(
        timeouts=True,
        endpoint_url=str,
        public_endpoint_url=str,
        region=str,
        session_token=str,
        profile=str,
        addressing_style=choice("auto", "path", "virtual"),
        verify=_verify,
        pool_size=int,
        pool_timeout=optional(float),
        connect_timeout=float,
        checksums=choice("when_required", "when_supported"),
        sign_payload=boolean,
        conditional_writes=boolean,
        conditional_copies=boolean,
        custom_domain=str,
        url_protocol=str,
        querystring_auth=boolean,
        expires_in=float,
        part_bytes=int,
        parts=int,
        multipart_bytes=int,
        parallel_reads=int,
        flat_listings=boolean,
        max_segment_bytes=int,
    )
    return {**found, **options}


def _verify(text: str) -> bool | str:
    try:
        return boolean(text)
    except ValueError:
        return text  # the file with the certificates
