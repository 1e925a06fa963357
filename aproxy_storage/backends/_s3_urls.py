"""URLs for browsers: public ones, signed ones by S3's and CloudFront's rules, and forms to upload with."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping
from datetime import UTC, datetime, timedelta
from typing import Any
from urllib.parse import quote, urlencode, urlsplit, urlunsplit

from ..errors import ConfigurationError, MissingDependency, NotSupported

__all__ = ["CloudFrontKey", "content_disposition", "custom_url", "operation_of", "response_params", "without_query"]

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


def operation_of(method: str) -> str:
    """Return the client's operation for a method that can be signed.

    Raises:
        NotSupported.
    """
    try:
        return _METHODS[method.upper()]
    except KeyError:
        raise NotSupported(f"a URL cannot be signed for {method!r}, only for {', '.join(_METHODS)}") from None


def content_disposition(download_name: str) -> str:
    """Return the header that makes a browser save the file under a name of any script (RFC 6266)."""
    plain = "".join(char if " " <= char <= "~" and char not in '"\\%' else "_" for char in download_name)
    header = f'attachment; filename="{plain}"'
    return header if plain == download_name else f"{header}; filename*=UTF-8''{quote(download_name, safe='')}"


def response_params(headers: Mapping[str, str], download_name: str | None) -> dict[str, str]:
    """Return the parameters of GetObject that change these headers of the answer.

    Raises:
        NotSupported: S3 cannot change one of them.
    """
    wanted = {name.lower(): value for name, value in headers.items()}
    if download_name is not None:
        wanted.setdefault("content-disposition", content_disposition(download_name))
    unknown = set(wanted) - set(_RESPONSE_HEADERS)
    if unknown:
        raise NotSupported(f"S3 cannot change {sorted(unknown)} in its answer, only {sorted(_RESPONSE_HEADERS)}")
    return {_RESPONSE_HEADERS[name]: value for name, value in wanted.items()}


def custom_url(protocol: str, domain: str, key: str, params: Mapping[str, str]) -> str:
    """Return the URL of an object on a domain of the caller's, a CDN's mostly."""
    query = {_header_of(name): value for name, value in params.items()}
    url = f"{protocol}//{domain.strip('/')}/{quote(key, safe='/~')}"
    return f"{url}?{urlencode(query)}" if query else url


def _header_of(param: str) -> str:
    header = next(header for header, name in _RESPONSE_HEADERS.items() if name == param)
    return f"response-{header}"


def without_query(url: str) -> str:
    """Return `url` without its query, where S3 has its signature."""
    return urlunsplit(urlsplit(url)._replace(query=""))


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
