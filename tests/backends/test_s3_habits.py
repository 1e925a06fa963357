"""Services that are S3 but for a habit: nothing is overwritten, left out or thought gone because of it."""

import hashlib
from typing import Any

import pytest
from botocore.config import Config
from botocore.exceptions import ClientError

from aproxy_storage.backends.s3 import S3Backend
from aproxy_storage.errors import AccessDenied, AlreadyExists, BackendUnavailable, ConfigurationError
from tests.backends.fake_s3 import Answer, FakeS3, error
from tests.backends.test_s3_errors import every_verb

pytestmark = pytest.mark.asyncio


def refusal(operation: str, code: str, status: int) -> ClientError:
    """Return what botocore raises where the service answers with this code."""
    headers = {"x-amz-request-id": "1"}
    answer = {"Error": {"Code": code}, "ResponseMetadata": {"HTTPStatusCode": status, "HTTPHeaders": headers}}
    return ClientError(answer, operation)  # type: ignore[arg-type]


class Objects:
    """A client of a bucket that knows no ``If-None-Match``."""

    def __init__(self, **contents: bytes) -> None:
        self.objects: dict[str, dict[str, Any]] = {}
        self.closed = False  # the body of an answer
        self.asked: list[tuple[str, dict[str, Any]]] = []
        for key, content in contents.items():
            self._put(content, Key=key)

    def _put(self, content: bytes, **params: Any) -> dict[str, Any]:
        etag = hashlib.md5(content).hexdigest()
        self.objects[params["Key"]] = {"ContentLength": len(content), "ETag": etag, "content": content, **params}
        return {"ETag": etag}

    def content(self, key: str) -> bytes:
        return bytes(self.objects[key]["content"])

    async def head_object(self, **params: Any) -> dict[str, Any]:
        self.asked.append(("head_object", params))
        try:
            return self.objects[params["Key"]]
        except KeyError:
            raise refusal("HeadObject", "404", 404) from None

    async def get_object(self, **params: Any) -> dict[str, Any]:
        return {**await self.head_object(**params), "Body": self}

    def close(self) -> None:
        self.closed = True

    async def put_object(self, **params: Any) -> dict[str, Any]:
        self.asked.append(("put_object", params))
        return self._put(params["Body"].read(), **params)

    async def copy_object(self, **params: Any) -> dict[str, Any]:
        self.asked.append(("copy_object", params))
        return {"CopyObjectResult": self._put(self.content(params["CopySource"]["Key"]), **params)}

    async def create_multipart_upload(self, **params: Any) -> dict[str, Any]:
        self.begun, self.copied = params, b""
        return {"UploadId": "1"}

    async def upload_part(self, **params: Any) -> dict[str, Any]:
        self.copied += params["Body"].read()
        return {"ETag": "1"}

    async def abort_multipart_upload(self, **params: Any) -> dict[str, Any]:
        self.asked.append(("abort_multipart_upload", params))
        return {}

    async def upload_part_copy(self, **params: Any) -> dict[str, Any]:
        self.asked.append(("upload_part_copy", params))
        content = self.content(params["CopySource"]["Key"])
        if "CopySourceRange" in params and len(content) <= 5 << 20:  # as Amazon has it
            raise refusal("UploadPartCopy", "InvalidRequest", 400)
        self.copied = content
        return {"CopyPartResult": {"ETag": "1"}}

    async def complete_multipart_upload(self, **params: Any) -> dict[str, Any]:
        self.asked.append(("complete_multipart_upload", params))
        return self._put(self.copied, **{**self.begun, **params})

    async def delete_object(self, **params: Any) -> dict[str, Any]:
        """Answer as Google Cloud Storage does."""
        self.asked.append(("delete_object", params))
        if params["Key"] not in self.objects:
            raise refusal("DeleteObject", "NoSuchKey", 404)
        if params["Key"].endswith("locked"):
            raise refusal("DeleteObject", "AccessDenied", 403)
        del self.objects[params["Key"]]
        return {}

    async def delete_objects(self, **params: Any) -> dict[str, Any]:
        self.asked.append(("delete_objects", params))
        for each in params["Delete"]["Objects"]:
            del self.objects[each["Key"]]
        return {}


# -- services without conditional requests


async def test_nothing_is_copied_onto_what_is_there() -> None:
    """A copy of nothing is a PUT of nothing."""
    client = Objects(empty=b"", taken=b"precious")
    backend = S3Backend("bucket", client=client, conditional_writes=False)
    with pytest.raises(AlreadyExists):
        await backend.copy("empty", "taken")
    assert client.content("taken") == b"precious"
    await backend.copy("empty", "free")
    assert client.content("free") == b""


@pytest.mark.parametrize("size", [0, 5, 6 << 20])
async def test_nothing_is_written_onto_what_is_there(size: int) -> None:
    """By one request, and in parts."""
    client = Objects(taken=b"precious")
    backend = S3Backend("bucket", client=client, conditional_writes=False, multipart_bytes=1 << 20, parts=1)
    with pytest.raises(AlreadyExists):
        await backend.write("taken", b"x" * size)
    assert client.content("taken") == b"precious"
    await backend.write("free", b"x" * size)
    assert client.content("free") == b"x" * size
    parts = [params for operation, params in client.asked if operation == "complete_multipart_upload"]
    assert len(parts) == (size > 1 << 20)
    assert all("IfNoneMatch" not in params for _, params in client.asked)


async def test_copies_are_not_conditional_where_writes_are_not() -> None:
    with pytest.raises(ConfigurationError, match="conditional_copies"):
        S3Backend("bucket", conditional_writes=False, conditional_copies=True)


# -- copies


async def test_small_objects_are_not_copied_in_ranges() -> None:
    """Amazon takes ranges of more than 5 MiB only, however its endpoint is named."""
    client = Objects(old=b"x")
    backend = S3Backend("bucket", client=client, conditional_copies=False)
    await backend.copy("old", "new")
    assert client.content("new") == b"x"
    backend._copy_part_bytes = 4 << 20
    client._put(b"x" * (6 << 20), Key="large")
    await backend.copy("large", "copy")
    ranges = [params.get("CopySourceRange") for operation, params in client.asked if operation == "upload_part_copy"]
    assert ranges == [None, "bytes=0-4194303", "bytes=4194304-6291455"]


async def test_large_objects_are_copied_in_ranges_where_small_ones_are_not() -> None:
    """As Amazon has it, which copies up to 5 GiB with one request."""
    client = Objects(old=b"x")
    backend = S3Backend("bucket", client=client, conditional_copies=True)
    backend._copy_part_bytes = 4 << 20
    client._put(b"x" * (4 << 20), Key="whole")
    await backend.copy("whole", "1")
    client._put(b"y" * (6 << 20), Key="large")
    client.asked.clear()
    await backend.copy("large", "2")
    changes = [operation for operation, _ in client.asked if operation != "head_object"]
    assert changes == ["upload_part_copy", "upload_part_copy", "complete_multipart_upload"]
    assert client.asked[-1][1]["IfNoneMatch"] == "*"
    assert (client.content("1"), client.content("2")) == (b"x" * (4 << 20), b"y" * (6 << 20))


# -- answers that lack something


@pytest.mark.parametrize("verb", ["read", "stat", "copy"])
async def test_a_size_that_is_not_told_is_missed_by_name(verb: str) -> None:
    """A proxy that sends in chunks, or compresses, takes it out."""
    client = Objects(key=b"x")
    del client.objects["key"]["ContentLength"]
    backend = S3Backend("bucket", client=client)
    with pytest.raises(BackendUnavailable, match="Content-Length") as caught:
        if verb == "read":
            async with backend.read("key"):
                pass
        else:
            await (backend.stat("key") if verb == "stat" else backend.copy("key", "new"))
    assert not caught.value.retryable
    assert verb != "read" or client.closed


# -- metadata


async def test_metadata_that_cannot_be_decoded_is_told_as_it_is() -> None:
    client = Objects(key=b"x")
    client.objects["key"]["Metadata"] = {"title": "=?utf-8?b?A?="}
    info = await S3Backend("bucket", client=client).stat("key")
    assert info.metadata == {"title": "=?utf-8?b?A?="}


# -- removing


async def test_what_is_gone_already_is_discarded() -> None:
    backend = S3Backend("bucket", client=Objects())
    await backend.discard("gone")


class Singly(Objects):
    def __init__(self, code: str, status: int, **contents: bytes) -> None:
        super().__init__(**contents)
        self.refusal = refusal("DeleteObjects", code, status)

    async def delete_objects(self, **params: Any) -> dict[str, Any]:
        self.asked.append(("delete_objects", params))
        raise self.refusal


@pytest.mark.parametrize(
    ("code", "status"), [("MissingContentMD5", 400), ("InvalidRequest", 400), ("NotImplemented", 501), ("405", 405)]
)
async def test_services_that_do_not_remove_many_objects_at_once(code: str, status: int) -> None:
    keys = [f"key{number}" for number in range(1001)]
    client = Singly(code, status, **{f"p/{key}": b"x" for key in [*keys, "kept", "locked"]})
    backend = S3Backend("bucket", prefix="p", client=client)
    results = await backend.delete_many([*keys, "gone", "locked"])
    locked = results.pop("locked")
    assert results == dict.fromkeys([*keys, "gone"])
    assert isinstance(locked, AccessDenied)
    assert (locked.operation, locked.path, locked.backend) == ("delete_many", "locked", str(backend))
    assert set(client.objects) == {"p/kept", "p/locked"}
    assert sum(operation == "delete_objects" for operation, _ in client.asked) == 1, "it was asked again"


async def test_a_thousand_objects_are_removed_with_one_request() -> None:
    keys = [f"key{number}" for number in range(2001)]
    client = Objects(**dict.fromkeys([*keys, "kept"], b"x"))
    assert await S3Backend("bucket", client=client).delete_many(keys) == dict.fromkeys(keys)
    assert set(client.objects) == {"kept"}
    assert [len(params["Delete"]["Objects"]) for _, params in client.asked] == [1000, 1000, 1]


async def test_a_refusal_of_all_is_not_taken_for_one_of_the_batch() -> None:
    client = Singly("InternalSomething", 400, key=b"x")
    with pytest.raises(BackendUnavailable):
        await S3Backend("bucket", client=client).delete_many(["key"])
    assert set(client.objects) == {"key"}


async def test_keys_that_no_object_can_have_do_not_keep_the_others() -> None:
    client = Objects(key=b"x")
    impossible = ["", "a/../b", "nul\0", "k" * 2000, "\udc80"]
    backend = S3Backend("bucket", client=client)
    assert await backend.delete_many([*impossible, "key"]) == dict.fromkeys([*impossible, "key"])
    assert not client.objects
    assert await backend.delete_many([""]) == {"": None}


async def test_a_put_is_sent_at_once_and_without_further_checksums() -> None:
    """Not every service knows them, and who has to be asked first costs a round trip."""
    server = FakeS3(lambda asked: Answer(200, {"ETag": '"1"'}))
    async with server.backend() as backend:
        for size in (0, 5, 3 << 20):
            await backend.write(f"{size}", b"x" * size)
    assert [(asked.method, len(asked.body)) for asked in server.asked] == [("PUT", 0), ("PUT", 5), ("PUT", 3 << 20)]
    for asked in server.asked:
        assert "expect" not in asked.headers
        assert not [name for name in asked.headers if "checksum" in name]


# -- parameters of all objects


@pytest.mark.parametrize("one_request", [True, False])
async def test_copies_have_what_all_objects_have(one_request: bool) -> None:
    """What the original has itself counts first. Its tags S3 does not tell."""
    client = Objects(old=b"x")
    client.objects["old"] |= {"CacheControl": "no-store", "Metadata": {"note": "old", "aproxy-token": "ofTheOld0000"}}
    given = {"Tagging": "a=b", "CacheControl": "private", "Metadata": {"note": "all", "team": "all"}}
    backend = S3Backend("bucket", client=client, object_parameters=given, conditional_copies=one_request)
    await backend.copy("old", "new", token="ofTheNew0000")
    new = client.objects["new"]
    assert new["Metadata"] == {"note": "old", "team": "all", "aproxy-token": "ofTheNew0000"}
    assert (new["Tagging"], new["CacheControl"]) == ("a=b", "no-store")
    assert new.get("TaggingDirective") == ("REPLACE" if one_request else None)
    plain = S3Backend("bucket", client=client, conditional_copies=one_request)
    await plain.copy("new", "untagged")
    assert "TaggingDirective" not in client.objects["untagged"]


@pytest.mark.parametrize(
    ("wrong", "hint"), [("Key", "'Key'"), ("SSECustomerKey", "SSE-C"), ("SSECustomerAlgorithm", "SSE-C")]
)
async def test_parameters_that_do_harm_are_refused(wrong: str, hint: str) -> None:
    with pytest.raises(ConfigurationError, match=hint):
        S3Backend("bucket", object_parameters={wrong: "x"})
    client = Objects()
    backend = S3Backend("bucket", client=client, object_parameters=lambda key: {wrong: "x"})
    with pytest.raises(ConfigurationError, match=hint):
        await backend.write("key", b"x")
    assert not client.asked


async def test_who_pays_is_said_with_every_request() -> None:
    fake = FakeS3(lambda asked: error(403, "AccessDenied"))
    parameters = {"RequestPayer": "requester", "ExpectedBucketOwner": "111122223333", "CacheControl": "private"}
    async with fake.backend(object_parameters=parameters) as backend:
        await every_verb(backend)
        await backend._connections.get().check_bucket("look", "bucket")
    for asked in fake.asked:
        assert asked.headers["x-amz-expected-bucket-owner"] == "111122223333", asked
        payer = None if str(asked) == "HEAD /bucket" else "requester"  # that request costs nothing
        assert asked.headers.get("x-amz-request-payer") == payer, asked


# -- the number of connections


async def test_the_drivers_own_number_of_connections_counts() -> None:
    """What it has no connection for would wait inside of it, until it is given up for idle."""

    class Client:
        class meta:  # noqa: N801
            config = Config(max_pool_connections=2)

    for options, expected in (
        ({"config": Config(max_pool_connections=2)}, 2),
        ({"config": Config(max_pool_connections=200)}, 200),
        ({"config": Config(connect_timeout=1), "pool_size": 5}, 5),
        ({"client": Client(), "pool_size": 5}, 2),
        ({"client": Client(), "pool_size": 1}, 1),
        ({"client": Objects(), "pool_size": 5}, 5),
    ):
        connection = S3Backend("bucket", pool_timeout=0.001, **options)._connections.get()
        slots = [await connection.slot("look") for _ in range(expected)]
        with pytest.raises(BackendUnavailable, match=f"all {expected} connections"):
            await connection.slot("look")
        for slot in slots:
            slot.release()


# -- which service it is


class Meta:
    def __init__(self, endpoint_url: str) -> None:
        self.endpoint_url = endpoint_url


class Elsewhere(Objects):
    def __init__(self, endpoint_url: str) -> None:
        super().__init__(old=b"x")
        self.meta = Meta(endpoint_url)


@pytest.mark.parametrize(
    ("environment", "options", "expected"),
    [
        ({}, {}, None),
        ({"AWS_ENDPOINT_URL": "http://minio:9000"}, {}, "http://minio:9000"),
        ({"AWS_ENDPOINT_URL_S3": "http://minio:9000", "AWS_ENDPOINT_URL": "http://sqs"}, {}, "http://minio:9000"),
        ({"AWS_ENDPOINT_URL": "http://minio", "AWS_IGNORE_CONFIGURED_ENDPOINT_URLS": "true"}, {}, None),
        ({"AWS_ENDPOINT_URL": "https://s3.eu-west-1.amazonaws.com"}, {}, None),
        ({"AWS_ENDPOINT_URL": "http://minio"}, {"endpoint_url": "http://ceph"}, "http://ceph"),
        ({"AWS_ENDPOINT_URL": "https://ec2-1.compute.amazonaws.com"}, {}, "https://ec2-1.compute.amazonaws.com"),
        ({"AWS_ENDPOINT_URL": "http://minio"}, {"client": Elsewhere("http://ceph")}, "http://ceph"),
        ({"AWS_ENDPOINT_URL": "http://minio"}, {"client": Elsewhere("https://s3.eu-west-1.amazonaws.com")}, None),
    ],
)
async def test_the_service_is_known_however_it_is_named(
    environment: dict[str, str], options: dict[str, Any], expected: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Only of Amazon it is known that no copy with one request overwrites."""
    for name in ("AWS_ENDPOINT_URL", "AWS_ENDPOINT_URL_S3", "AWS_IGNORE_CONFIGURED_ENDPOINT_URLS"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    backend = S3Backend("bucket", **options)
    assert backend.endpoint == expected
    assert backend._conditional_copies == (expected is None)


@pytest.mark.parametrize(
    ("endpoint", "is_amazon"),
    [
        ("https://s3.amazonaws.com", True),
        ("https://s3.eu-west-1.amazonaws.com/", True),
        ("https://s3-us-west-2.amazonaws.com", True),
        ("https://S3.dualstack.us-gov-west-1.amazonaws.com:443", True),
        ("https://s3-accelerate.dualstack.amazonaws.com", True),
        ("https://s3.cn-north-1.amazonaws.com.cn", True),
        ("https://bucket.vpce-1a2b-3c4d.s3.us-east-1.vpce.amazonaws.com", True),
        ("https://minio-12.eu-west-1.elb.amazonaws.com", False),
        ("https://s3-minio-12.elb.eu-west-1.amazonaws.com", False),
        ("https://s3.eu-west-1.elb.amazonaws.com", False),
        ("https://ec2-1-2-3-4.eu-west-1.compute.amazonaws.com", False),
        ("https://s3.amazonaws.com.example.org", False),
        ("https://minio", False),
    ],
)
async def test_amazon_is_known_by_its_endpoints(endpoint: str, is_amazon: bool) -> None:
    """Others run their services on its machines."""
    backend = S3Backend("bucket", endpoint_url=endpoint)
    assert backend._conditional_copies == is_amazon
    assert backend.endpoint == endpoint, "requests go there"
    assert not S3Backend("bucket", endpoint_url=endpoint, conditional_writes=False)._conditional_copies


async def test_access_points_are_named_like_buckets() -> None:
    arn = "arn:aws:s3:eu-west-1:111122223333:accesspoint/media"
    async with S3Backend(arn, region="eu-west-1", access_key="a", secret_key="b") as backend:
        url = await backend.url("a.txt")
    assert url.startswith("https://media-111122223333.s3-accesspoint.eu-west-1.amazonaws.com/a.txt?")
