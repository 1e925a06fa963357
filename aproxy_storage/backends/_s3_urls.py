"""URLs for browsers: public ones, signed ones by S3's and CloudFront's rules, and forms to upload with."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any
from urllib.parse import quote, urlencode, urlsplit, urlunsplit

from ..errors import ConfigurationError, MissingDependency, NotSupported
from ..records import UploadForm
from ._s3_client import Connection

__all__ = ["CloudFrontKey", "Links"]

MAX_EXPIRY = 604_800.0  # seconds that a signed URL lives at most: a rule of S3

_TOO_LONG = (
    "S3 takes signed URLs that live for up to 7 days (604800 seconds). Make them when they are asked for, let what "
    "everybody may read be public (querystring_auth=False), or let CloudFront sign (cloudfront=)"
)

_METHODS = {"GET": "get_object", "HEAD": "head_object", "PUT": "put_object", "DELETE": "delete_object"}

# What a signed GET may change in the answer: the header -> the parameter of GetObject.
_RESPONSE_HEADERS = {
    "cache-control": "ResponseCacheControl",
    "content-disposition": "ResponseContentDisposition",
    "content-encoding": "ResponseContentEncoding",
    "content-language": "ResponseContentLanguage",
    "content-type": "ResponseContentType",
    "expires": "ResponseExpires",
}


class CloudFrontKey:
    """Signs URLs of a CloudFront distribution with a private RSA key, in PEM. The key is read at the first use."""

    def __init__(self, key_id: str, private_key: str | bytes) -> None:
        self.key_id = key_id
        self._pem = private_key.encode() if isinstance(private_key, str) else private_key
        self._signer: Any = None

    def __repr__(self) -> str:
        return f"<CloudFrontKey {self.key_id!r}>"

    async def sign(self, url: str, expires_in: float) -> str:
        """Return `url` signed for `expires_in` seconds.

        Raises:
            MissingDependency: cryptography is not installed. ConfigurationError: it is no RSA key.
        """
        if self._signer is None:
            self._signer = self._make_signer()
        until = datetime.now(UTC) + timedelta(seconds=expires_in)
        # A signature takes a millisecond, and the same URL a hundred of them on a page.
        signed: str = await asyncio.to_thread(
            self._signer.generate_presigned_url, url, date_less_than=until.replace(tzinfo=None)
        )
        return signed

    def _make_signer(self) -> Any:
        from botocore.signers import CloudFrontSigner

        return CloudFrontSigner(self.key_id, _rsa_signer(self._pem))


def _rsa_signer(pem: bytes) -> Callable[[bytes], bytes]:
    try:
        from cryptography.hazmat.primitives import hashes, serialization
        from cryptography.hazmat.primitives.asymmetric import padding, rsa
    except ImportError as error:
        raise MissingDependency.of("cryptography", "cloudfront") from error
    try:
        key = serialization.load_pem_private_key(pem, password=None)
    except (ValueError, TypeError) as error:
        raise ConfigurationError("the CloudFront key is no private key in PEM, or has a password") from error
    if not isinstance(key, rsa.RSAPrivateKey):
        raise ConfigurationError("the CloudFront key is not an RSA key")

    def sign(message: bytes) -> bytes:
        return key.sign(message, padding.PKCS1v15(), hashes.SHA1())  # CloudFront takes no other

    return sign


@dataclass(frozen=True, slots=True)
class Links:
    """Makes the URLs and forms of one bucket.

    `domain` is one of the caller's, whose URLs `cloudfront` signs; `signed`: not everybody may read.

    Raises:
        ConfigurationError: S3 takes no URL that lives for `expires_in` seconds.
    """

    bucket: str
    domain: str | None
    protocol: str
    cloudfront: CloudFrontKey | None
    signed: bool
    expires_in: float

    def __post_init__(self) -> None:
        if self.signed and self.domain is None and self.expires_in > MAX_EXPIRY:
            raise ConfigurationError(f"expires_in={self.expires_in:g}: {_TOO_LONG}")

    async def url(
        self,
        connect: Callable[[], Connection],
        key: str,
        *,
        method: str,
        expires_in: float | None,
        headers: Mapping[str, str],
        download_name: str | None,
        content_type: str | None,
    ) -> str:
        """See `S3Backend.url`; `key` is the whole one, and the client is made only where S3 signs.

        Raises:
            NotSupported.
        """
        operation = _operation_of(method)
        params: dict[str, Any] = _response_params(headers, download_name)
        if params and operation != "get_object":
            raise NotSupported(f"the headers of the answer to a {method} cannot be changed")
        seconds = self.expires_in if expires_in is None else expires_in
        if self.domain is not None and operation == "get_object":
            url = _custom_url(self.protocol, self.domain, key, params)
            if self.cloudfront is None or not self.signed:
                return url
            return await self.cloudfront.sign(url, seconds)
        public = not self.signed and operation in ("get_object", "head_object")
        if public and params:
            raise NotSupported("S3 changes headers of its answer for signed URLs only: querystring_auth=True")
        if content_type is not None and operation == "put_object":
            params["ContentType"] = content_type
        if not public and seconds > MAX_EXPIRY:
            raise NotSupported(f"a URL cannot be signed for {seconds:g} seconds: {_TOO_LONG}")
        connection = connect()
        signer = await connection.signer()
        with connection.noting_credentials():
            url = await signer.generate_presigned_url(
                operation, Params={"Bucket": self.bucket, "Key": key, **params}, ExpiresIn=max(1, round(seconds))
            )
        return _without_query(url) if public else url

    async def form(
        self,
        connect: Callable[[], Connection],
        key: str,
        fields: Mapping[str, str],
        *,
        expires_in: float,
        max_bytes: int,
    ) -> UploadForm:
        """Return a form that uploads up to `max_bytes` to the whole `key`, with exactly these `fields`.

        Raises:
            NotSupported.
        """
        if expires_in > MAX_EXPIRY:
            raise NotSupported(f"no form can be made for {expires_in:g} seconds: S3 takes none of more than 604800")
        conditions: list[Any] = [*({name: value} for name, value in fields.items())]
        conditions.append(["content-length-range", 0, max_bytes])
        connection = connect()
        signer = await connection.signer()
        expires_at, lives = datetime.now(UTC) + timedelta(seconds=expires_in), max(1, round(expires_in))
        with connection.noting_credentials():
            answer = await signer.generate_presigned_post(
                self.bucket, key, Fields=dict(fields), Conditions=conditions, ExpiresIn=lives
            )
        return UploadForm(answer["url"], answer["fields"], expires_at)


def _operation_of(method: str) -> str:
    """Return the client's operation for a method that can be signed.

    Raises:
        NotSupported.
    """
    try:
        return _METHODS[method.upper()]
    except KeyError:
        raise NotSupported(f"a URL cannot be signed for {method!r}, only for {', '.join(_METHODS)}") from None


def _content_disposition(download_name: str) -> str:
    """Return the header that makes a browser save the file under a name of any script (RFC 6266)."""
    plain = "".join(char if " " <= char <= "~" and char not in '"\\%' else "_" for char in download_name)
    header = f'attachment; filename="{plain}"'
    return header if plain == download_name else f"{header}; filename*=UTF-8''{quote(download_name, safe='')}"


def _response_params(headers: Mapping[str, str], download_name: str | None) -> dict[str, str]:
    """Return the parameters of GetObject that change these headers of the answer.

    Raises:
        NotSupported: S3 cannot change one of them.
    """
    wanted = {name.lower(): value for name, value in headers.items()}
    if download_name is not None:
        wanted.setdefault("content-disposition", _content_disposition(download_name))
    unknown = set(wanted) - set(_RESPONSE_HEADERS)
    if unknown:
        raise NotSupported(f"S3 cannot change {sorted(unknown)} in its answer, only {sorted(_RESPONSE_HEADERS)}")
    return {_RESPONSE_HEADERS[name]: value for name, value in wanted.items()}


def _custom_url(protocol: str, domain: str, key: str, params: Mapping[str, str]) -> str:
    """Return the URL of an object on a domain of the caller's, a CDN's mostly."""
    query = {_header_of(name): value for name, value in params.items()}
    url = f"{protocol}//{domain.strip('/')}/{quote(key, safe='/~')}"
    return f"{url}?{urlencode(query)}" if query else url


def _header_of(param: str) -> str:
    header = next(header for header, name in _RESPONSE_HEADERS.items() if name == param)
    return f"response-{header}"


def _without_query(url: str) -> str:
    """Return `url` without its query, where S3 has its signature."""
    return urlunsplit(urlsplit(url)._replace(query=""))
