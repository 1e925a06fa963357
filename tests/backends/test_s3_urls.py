"""URLs, signed and public, as a browser would use them; forms to upload with; and where the arguments come from."""

import asyncio
import base64
import json
import os
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Mapping
from types import SimpleNamespace
from typing import Any
from urllib.parse import parse_qs, urlsplit

import aiohttp
import pytest
from aiobotocore.session import get_session

from aproxy_storage.backends._s3_settings import from_django_storages
from aproxy_storage.backends.s3 import CloudFrontKey, S3Backend
from aproxy_storage.config import original_from_url
from aproxy_storage.errors import AccessDenied, ConfigurationError, InvalidPath, NotSupported
from tests.backends.test_s3 import backend_of
from tests.services.s3 import S3Server, S3Service

pytestmark = pytest.mark.asyncio


def ask(
    url: str, method: str = "GET", data: bytes | None = None, **headers: str
) -> tuple[int, Mapping[str, str], bytes]:
    """Ask without any credentials; return status, headers and body."""
    request = urllib.request.Request(url, data, {name.replace("_", "-"): text for name, text in headers.items()})
    request.method = method
    try:
        with urllib.request.urlopen(request, timeout=10) as answer:
            return answer.status, answer.headers, answer.read()
    except urllib.error.HTTPError as error:
        with error:
            return error.code, error.headers, error.read()


async def test_signed_urls_open_for_everybody(s3_service: S3Service) -> None:
    async with backend_of(s3_service) as backend:
        await backend.write("日本/a b.txt", b"hello", content_type="text/plain")
        url = await backend.url("日本/a b.txt", expires_in=60)
        status, headers, body = await asyncio.to_thread(ask, url)
        assert (status, headers["Content-Type"], body) == (200, "text/plain", b"hello")
        tampered = await asyncio.to_thread(ask, url.replace("Signature=", "Signature=0"))
        assert tampered[0] == 403
        bare = await asyncio.to_thread(ask, url.partition("?")[0])
        assert bare[0] == 403


async def test_signed_url_ends(s3_service: S3Service) -> None:
    async with backend_of(s3_service) as backend:
        await backend.write("key", b"hello")
        url = await backend.url("key", expires_in=1)
        async with asyncio.timeout(10):
            while (await asyncio.to_thread(ask, url))[0] == 200:  # noqa: ASYNC110
                await asyncio.sleep(0.2)
        assert (await asyncio.to_thread(ask, url))[0] == 403


async def test_headers_of_the_answer(s3_service: S3Service) -> None:
    async with backend_of(s3_service) as backend:
        await backend.write("key", b"hello", content_type="text/plain")
        url = await backend.url(
            "key", download_name='Zeugnis "für" 日本.pdf', response_headers={"Cache-Control": "no-store"}
        )
        _, got, _ = await asyncio.to_thread(ask, url)
        assert got["Cache-Control"] == "no-store"
        assert got["Content-Disposition"] == (
            'attachment; filename="Zeugnis _f_r_ __.pdf"; '
            "filename*=UTF-8''Zeugnis%20%22f%C3%BCr%22%20%E6%97%A5%E6%9C%AC.pdf"
        )
        with pytest.raises(NotSupported):
            await backend.url("key", response_headers={"X-Frame-Options": "DENY"})
        with pytest.raises(NotSupported):
            await backend.url("key", method="PATCH")
        with pytest.raises(NotSupported):
            await backend.url("key", colour="blue")


async def test_signed_put(s3_service: S3Service) -> None:
    async with backend_of(s3_service) as backend:
        url = await backend.url("key", method="PUT", content_type="image/png")
        refused = await asyncio.to_thread(ask, url, "PUT", b"hello", Content_Type="text/html")
        assert refused[0] == 403
        taken = await asyncio.to_thread(ask, url, "PUT", b"hello", Content_Type="image/png")
        assert taken[0] == 200
        assert (await backend.stat("key")).content_type == "image/png"


async def test_public_urls(s3_server: S3Server) -> None:
    async with backend_of(s3_server.public.fresh(), querystring_auth=False) as backend:
        await backend.write("dir/a b.txt", b"for all")
        url = await backend.url("dir/a b.txt")
        assert "?" not in url
        assert (await asyncio.to_thread(ask, url))[2] == b"for all"
        with pytest.raises(NotSupported, match="signed URLs only"):
            await backend.url("dir/a b.txt", download_name="x")
        assert "X-Amz-Signature" in await backend.url("dir/a b.txt", method="PUT"), "everybody may write"


async def test_urls_are_signed_for_the_name_that_browsers_know() -> None:
    options: dict[str, Any] = {"access_key": "a", "secret_key": "b", "region": "eu-central-1"}
    async with S3Backend(
        "bucket", endpoint_url="http://minio:9000", public_endpoint_url="https://files.example.org", **options
    ) as backend:
        url = await backend.url("a/b.txt", expires_in=600)
        assert url.startswith("https://files.example.org/bucket/a/b.txt?")
        query = parse_qs(urlsplit(url).query)
        assert query["X-Amz-Expires"] == ["600"]
        assert query["X-Amz-SignedHeaders"] == ["host"]
        form = await backend.upload_form("a/b.txt", token="t", expires_in=60, max_bytes=10)
        assert form.url.startswith("https://files.example.org/")
    async with S3Backend("bucket", **options) as backend:
        assert (await backend.url("k")).startswith("https://bucket.s3.eu-central-1.amazonaws.com/k?")
        assert "AWSAccessKeyId" not in await backend.url("k"), "the old signature"


WEEK = 7 * 86_400


async def test_urls_signed_for_longer_than_a_week_are_refused() -> None:
    """S3 would refuse whoever has one: those who come from the old signature have expiries of a year."""
    options: dict[str, Any] = {"access_key": "a", "secret_key": "b", "region": "eu-central-1"}
    with pytest.raises(ConfigurationError, match="7 days"):
        S3Backend("bucket", expires_in=WEEK + 1, **options)
    with pytest.raises(ConfigurationError, match="7 days"):
        S3Backend.from_settings({"AWS_STORAGE_BUCKET_NAME": "b", "AWS_QUERYSTRING_EXPIRE": 365 * 86_400})
    async with S3Backend("bucket", expires_in=WEEK, **options) as backend:
        assert "X-Amz-Expires=604800" in await backend.url("key")
        with pytest.raises(NotSupported, match="7 days"):
            await backend.url("key", expires_in=WEEK + 1)
    async with S3Backend("bucket", querystring_auth=False, expires_in=WEEK + 1, **options) as backend:
        assert "?" not in await backend.url("key"), "nothing is signed"
        with pytest.raises(NotSupported, match="7 days"):
            await backend.url("key", method="PUT")


class Signer(CloudFrontKey):
    async def sign(self, url: str, expires_in: float) -> str:
        return f"{url}?{expires_in:g}"


async def test_cloudfront_signs_for_longer_than_a_week() -> None:
    backend = S3Backend("bucket", custom_domain="cdn.example.org", cloudfront=Signer("KEYID", ""), expires_in=WEEK + 1)
    assert await backend.url("key") == f"https://cdn.example.org/key?{WEEK + 1}"
    with pytest.raises(NotSupported, match="7 days"):
        await backend.url("key", method="PUT")


async def test_form_for_a_name_that_the_service_would_fill_in_is_refused() -> None:
    """What is uploaded with ${filename} in its key may have any name that begins like it."""
    options: dict[str, Any] = {"access_key": "a", "secret_key": "b", "region": "eu-central-1"}
    async with S3Backend("bucket", **options) as backend:
        with pytest.raises(InvalidPath, match="filename"):
            await backend.upload_form("photos/${filename}", token="t", expires_in=60, max_bytes=10)
        form = await backend.upload_form("photos/$filename", token="t", expires_in=60, max_bytes=10)
        policy = json.loads(base64.b64decode(form.fields["policy"]))
        assert {"key": "photos/$filename"} in policy["conditions"]
    async with S3Backend("bucket", prefix="a${filename}", **options) as backend:
        with pytest.raises(InvalidPath, match="filename"):
            await backend.upload_form("key", token="t", expires_in=60, max_bytes=10)


async def test_form_for_longer_than_a_week_is_refused() -> None:
    """S3 would take none of its uploads after that."""
    options: dict[str, Any] = {"access_key": "a", "secret_key": "b", "region": "eu-central-1"}
    async with S3Backend("bucket", **options) as backend:
        assert await backend.upload_form("key", token="t", expires_in=WEEK, max_bytes=10)
        with pytest.raises(NotSupported, match="604800"):
            await backend.upload_form("key", token="t", expires_in=WEEK + 1, max_bytes=10)


async def test_custom_domain() -> None:
    backend = S3Backend("bucket", prefix="media", custom_domain="cdn.example.org")
    assert await backend.url("ä b.txt") == "https://cdn.example.org/media/%C3%A4%20b.txt"
    assert await backend.url("x", download_name="y.txt") == (
        "https://cdn.example.org/media/x?response-content-disposition=attachment%3B+filename%3D%22y.txt%22"
    )


async def test_cloudfront_signature() -> None:
    rsa = pytest.importorskip("cryptography.hazmat.primitives.asymmetric.rsa")
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import padding

    key = rsa.generate_private_key(65537, 2048)
    pem = key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    backend = S3Backend("bucket", custom_domain="cdn.example.org", cloudfront=CloudFrontKey("KEYID", pem))
    assert "BEGIN" not in repr(CloudFrontKey("KEYID", pem))
    url = await backend.url("a.txt", expires_in=600)
    query = {name: values[0] for name, values in parse_qs(urlsplit(url).query).items()}
    assert query["Key-Pair-Id"] == "KEYID"
    policy = {
        "Statement": [
            {
                "Resource": "https://cdn.example.org/a.txt",
                "Condition": {"DateLessThan": {"AWS:EpochTime": int(query["Expires"])}},
            }
        ]
    }
    signature = base64.b64decode(query["Signature"].translate(str.maketrans("-_~", "+=/")))
    signed = json.dumps(policy, separators=(",", ":")).encode()
    key.public_key().verify(signature, signed, padding.PKCS1v15(), hashes.SHA1())
    with pytest.raises(ConfigurationError, match="PEM"):
        await S3Backend("b", custom_domain="c", cloudfront=CloudFrontKey("k", "nonsense")).url("a")


async def test_upload_form(s3_service: S3Service) -> None:
    async with backend_of(s3_service) as backend, aiohttp.ClientSession() as browser:

        async def post(content: bytes, **changed: str) -> int:
            data = aiohttp.FormData()
            for name, value in {**form.fields, **changed}.items():
                data.add_field(name, value)
            data.add_field("file", content, filename="my.png")
            async with browser.post(form.url, data=data) as answer:
                return answer.status

        form = await backend.upload_form(
            "dir/key", token="tokenOfForm0", expires_in=60, max_bytes=10, content_type="image/png"
        )
        assert await post(b"x" * 11) >= 400, "too large"
        assert await post(b"x", **{"Content-Type": "text/html"}) == 403
        assert await post(b"x", key=f"{s3_service.prefix}other") == 403
        assert await post(b"hello") in (200, 204)
        info = await backend.stat("dir/key")
        assert (info.size, info.content_type, info.token) == (5, "image/png", "tokenOfForm0")
        assert "tokenOfForm0" not in repr(form), "the fields are a credential"


# -- where the arguments come from


async def test_object_parameters(s3_service: S3Service) -> None:
    given = {"CacheControl": "max-age=60", "ContentLanguage": "de", "Metadata": {"a": "1"}}
    async with backend_of(s3_service, object_parameters=given, multipart_bytes=1 << 16) as backend:
        for key, size in (("small", 1), ("large", 1 << 20)):
            await backend.write(key, b"x" * size, metadata={"note": "größer"})
            _, headers, _ = await asyncio.to_thread(ask, await backend.url(key))
            assert (headers["Cache-Control"], headers["Content-Language"]) == ("max-age=60", "de")
            assert (await backend.stat(key)).metadata == {"a": "1", "note": "größer"}
    by_name = lambda key: {"ContentType": "text/css"} if key.endswith(".css") else {}  # noqa: E731
    async with backend_of(s3_service.fresh(), object_parameters=by_name) as backend:
        for key in ("a.css", "a.txt"):
            await backend.write(key, b"x")
        assert (await backend.stat("a.css")).content_type == "text/css"
        assert (await backend.stat("a.txt")).content_type != "text/css"


async def test_copy_keeps_what_the_object_has(s3_service: S3Service) -> None:
    for options in ({"conditional_copies": True}, {"conditional_copies": False}):
        async with backend_of(s3_service.fresh(), **options) as backend:
            backend._copy_part_bytes = 5 << 20 if not options["conditional_copies"] else 1 << 30
            data = os.urandom(12 << 20)
            await backend.write("a", data, content_type="text/x-a", metadata={"note": "b"}, token="tokenOfTheA0")
            await backend.copy("a", "b", token="tokenOfTheB0")
            info = await backend.stat("b")
            assert (info.content_type, info.metadata, info.token) == ("text/x-a", {"note": "b"}, "tokenOfTheB0")
            async with backend.read("b") as reader:
                assert b"".join([chunk async for chunk in reader]) == data


async def test_delete_many(s3_service: S3Service) -> None:
    async with backend_of(s3_service) as backend:
        keys = [f"key{number}" for number in range(20)]
        for key in [*keys, "kept"]:
            await backend.write(key, b"x")
        assert await backend.delete_many([*keys, "never"]) == dict.fromkeys([*keys, "never"])
        assert [info.key async for info in backend.list()] == ["kept"]


async def test_sessions_and_clients(s3_service: S3Service) -> None:
    """Both kinds of session, and a client that stays the caller's."""
    sessions: list[Any] = [get_session()]
    try:
        import aioboto3
    except ImportError:
        print("aioboto3 is not installed: its session is not tried")
    else:
        sessions.append(aioboto3.Session())
    for session in sessions:
        async with backend_of(s3_service.fresh(), session=session) as backend:
            await backend.write("key", b"x")
    connection = {
        "endpoint_url": s3_service.endpoint_url,
        "region_name": s3_service.region,
        "aws_access_key_id": s3_service.access_key,
        "aws_secret_access_key": s3_service.secret_key,
    }
    async with get_session().create_client("s3", **connection) as client:
        backend = S3Backend(s3_service.bucket, prefix=s3_service.prefix, client=client)
        async with backend:
            await backend.write("key", b"x" * 100)
        async with backend:
            assert (await backend.stat("key")).size == 100, "aclose has closed what was lent to it"
        await backend.stat("key")

        async def elsewhere() -> None:
            with pytest.raises(ConfigurationError, match="another event loop"):
                await backend.stat("key")

        await asyncio.to_thread(asyncio.run, elsewhere())
        await backend.aclose()


async def test_settings_of_django_storages() -> None:
    settings = SimpleNamespace(
        AWS_STORAGE_BUCKET_NAME="public",
        AWS_LOCATION="media/",
        AWS_ACCESS_KEY_ID="AK",
        AWS_SECRET_ACCESS_KEY="SK",
        AWS_S3_REGION_NAME="eu-central-1",
        AWS_S3_ENDPOINT_URL="https://minio.example.org",
        AWS_QUERYSTRING_AUTH=False,
        AWS_DEFAULT_ACL="public-read",
        AWS_S3_OBJECT_PARAMETERS={"CacheControl": "max-age=86400"},
        AWS_S3_FILE_OVERWRITE=False,
        AWS_PRIVATE_STORAGE_BUCKET_NAME="private",
        AWS_PRIVATE_QUERYSTRING_EXPIRE=600,
    )
    public = S3Backend.from_settings(settings)
    assert public.full_path("x") == "s3://public/media/x"
    assert public._options.endpoint_url == "https://minio.example.org"
    assert public._object_parameters == {"ACL": "public-read", "CacheControl": "max-age=86400"}
    assert "?" not in await public.url("x")
    private = S3Backend.from_settings(settings, prefix="AWS_PRIVATE_", pool_size=3)
    assert private.full_path("x") == "s3://private/x"
    assert (private._options.access_key, private._options.region) == ("AK", "eu-central-1")
    assert private._options.endpoint_url is None, "only credentials, region and protocol are shared"
    assert private._options.pool_size == 3
    assert "X-Amz-Expires=600" in await private.url("x")
    for backend in (public, private):
        await backend.aclose()
    with pytest.raises(ConfigurationError, match="AWS_OTHER_STORAGE_BUCKET_NAME"):
        S3Backend.from_settings(settings, prefix="AWS_OTHER_")
    for name, value in (("AWS_IS_GZIPPED", True), ("AWS_CLOUDFRONT_KEY_ID", "K"), ("AWS_S3_USE_SSL", False)):
        with pytest.raises(ConfigurationError, match=name):
            S3Backend.from_settings({"AWS_STORAGE_BUCKET_NAME": "b", name: value})


async def test_empty_settings_are_unset() -> None:
    """As django-storages has it: os.environ.get(name, "") is a common way to give them."""
    names = (
        "LOCATION", "S3_ACCESS_KEY_ID", "ACCESS_KEY_ID", "SECRET_ACCESS_KEY", "SESSION_TOKEN", "S3_SESSION_PROFILE",
        "S3_ENDPOINT_URL", "S3_REGION_NAME", "S3_ADDRESSING_STYLE", "S3_VERIFY", "S3_CUSTOM_DOMAIN", "S3_URL_PROTOCOL",
        "DEFAULT_ACL", "CLOUDFRONT_KEY_ID", "CLOUDFRONT_KEY",
    )  # fmt: skip
    empty = {f"AWS_{name}": "" for name in names}
    assert from_django_storages({"AWS_STORAGE_BUCKET_NAME": "b", **empty}, "AWS_") == {"bucket": "b"}
    shared = {"AWS_ACCESS_KEY_ID": "AK", "AWS_SECRET_ACCESS_KEY": "SK", "AWS_PRIVATE_ACCESS_KEY_ID": ""}
    found = from_django_storages({"AWS_PRIVATE_STORAGE_BUCKET_NAME": "p", **shared}, "AWS_PRIVATE_")
    assert found == {"bucket": "p", "access_key": "AK", "secret_key": "SK"}


async def test_url_of_a_backend(s3_service: S3Service) -> None:
    backend = original_from_url(
        "s3://AK:s%2FK@bucket/some/prefix?endpoint_url=http://127.0.0.1:9000&region=eu-west-1&addressing_style=path"
        "&pool_size=8&querystring_auth=no&timeouts.idle=5&multipart_bytes=70000&session_token=t%2Bk&url_protocol=http:"
        "&custom_domain=cdn.example.org"
    )
    assert isinstance(backend, S3Backend)
    assert backend.full_path("x") == "s3://bucket/some/prefix/x"
    assert (backend._options.access_key, backend._options.secret_key) == ("AK", "s/K")
    assert backend.timeouts.idle == 5
    assert backend._options.session_token == "t+k"
    assert backend._multipart_bytes == 70_000
    assert await backend.url("x") == "http://cdn.example.org/some/prefix/x"
    assert "s/K" not in repr(backend._options)
    for wrong in ("s3:///x", "s3://bucket?colour=blue", "s3://AK@bucket"):
        with pytest.raises(ConfigurationError):
            S3Backend.from_url(wrong)


async def test_credentials_of_the_environment(s3_service: S3Service, monkeypatch: pytest.MonkeyPatch) -> None:
    if s3_service.access_key is None or s3_service.secret_key is None:
        pytest.skip("the service under test takes them from there already")
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", s3_service.access_key)
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", s3_service.secret_key)
    async with backend_of(s3_service, access_key=None, secret_key=None) as backend:
        await backend.write("key", b"x")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "another")
    async with backend_of(s3_service, access_key=None, secret_key=None) as backend:
        with pytest.raises(AccessDenied):
            await backend.write("other", b"x")


async def test_nonsense_is_refused_at_once() -> None:
    for wrong in (
        {"bucket": ""},
        {"bucket": "a/b"},
        {"bucket": "b", "access_key": "a"},
        {"bucket": "b", "part_bytes": 1 << 20},
        {"bucket": "b", "multipart_bytes": 100 << 20},
        {"bucket": "b", "cloudfront": CloudFrontKey("k", "p")},
        {"bucket": "b", "client": object(), "session": object()},
    ):
        with pytest.raises(ConfigurationError):
            S3Backend(**wrong)  # type: ignore[arg-type]


async def test_missing_driver_names_the_extra() -> None:
    program = (
        "import sys; sys.modules['aiobotocore'] = sys.modules['aiobotocore.config'] = None\n"
        "import aproxy_storage\n"
        "try:\n    import aproxy_storage.backends.s3\n"
        "except aproxy_storage.MissingDependency as error:\n    assert 'aproxy-storage[s3]' in str(error), error\n"
        "else:\n    raise SystemExit('it was imported')"
    )
    await asyncio.to_thread(subprocess.run, [sys.executable, "-c", program], check=True)
