"""Services that are S3 but for a habit: nothing is overwritten, left out or thought gone because of it."""

import hashlib
from typing import Any

import pytest
from botocore.exceptions import ClientError

from aproxy_storage.backends.s3 import S3Backend
from aproxy_storage.errors import AccessDenied, AlreadyExists, BackendUnavailable, ConfigurationError

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

    async def put_object(self, **params: Any) -> dict[str, Any]:
        self.asked.append(("put_object", params))
        return self._put(params["Body"].read(), **params)

    async def copy_object(self, **params: Any) -> dict[str, Any]:
        self.asked.append(("copy_object", params))
        return {"CopyObjectResult": self._put(self.content(params["CopySource"]["Key"]), **params)}

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


async def test_copies_are_not_conditional_where_writes_are_not() -> None:
    with pytest.raises(ConfigurationError, match="conditional_copies"):
        S3Backend("bucket", conditional_writes=False, conditional_copies=True)


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
    keys = [f"key{number}" for number in range(1500)]
    client = Singly(code, status, **{f"p/{key}": b"x" for key in [*keys, "kept", "locked"]})
    backend = S3Backend("bucket", prefix="p", client=client)
    results = await backend.delete_many([*keys, "gone", "locked"])
    locked = results.pop("locked")
    assert results == dict.fromkeys([*keys, "gone"])
    assert isinstance(locked, AccessDenied)
    assert (locked.operation, locked.path, locked.backend) == ("delete_many", "locked", str(backend))
    assert set(client.objects) == {"p/kept", "p/locked"}
    assert sum(operation == "delete_objects" for operation, _ in client.asked) == 1, "it was asked again"


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
