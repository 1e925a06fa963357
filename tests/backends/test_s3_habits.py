"""Services that are S3 but for a habit: nothing is overwritten, left out or thought gone because of it."""

import hashlib
from typing import Any

import pytest
from botocore.exceptions import ClientError

from aproxy_storage.backends.s3 import S3Backend
from aproxy_storage.errors import AlreadyExists, ConfigurationError

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
