"""Uploads in parts: what becomes of the content, of the parts and of the upload when something fails or takes long."""

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import pytest
from botocore.exceptions import ClientError

from aproxy_storage import Fallback, ProxyStorage
from aproxy_storage.backends import _s3_client
from aproxy_storage.backends.memory import MemoryBackend
from aproxy_storage.backends.s3 import S3Backend
from aproxy_storage.meta_backends.memory import MemoryMetaBackend
from aproxy_storage.testing._backend_hooks import pattern

pytestmark = pytest.mark.asyncio


@pytest.fixture(autouse=True)
def _impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_s3_client, "_PATIENCE", 0.001)
    monkeypatch.setattr(_s3_client, "_LONG_PATIENCE", 0.001)


def refusal(code: str, status: int) -> ClientError:
    """Return what botocore raises for an answer with this code."""
    return ClientError({"Error": {"Code": code}, "ResponseMetadata": {"HTTPStatusCode": status}}, "Operation")


class Client:
    """A client of a bucket without objects. Subclasses say what is different."""

    async def head_object(self, **params: Any) -> dict[str, Any]:
        raise refusal("404", 404)

    async def create_multipart_upload(self, **params: Any) -> dict[str, Any]:
        return {"UploadId": "1"}

    async def upload_part(self, **params: Any) -> dict[str, Any]:
        return {"ETag": f'"{params["PartNumber"]}"'}

    async def complete_multipart_upload(self, **params: Any) -> dict[str, Any]:
        return {"ETag": '"whole"'}

    async def abort_multipart_upload(self, **params: Any) -> dict[str, Any]:
        return {}


# -- a part that fails


async def test_a_part_that_fails_leaves_the_content_for_the_next_original() -> None:
    """It fails while the next chunk is waited for. An asynchronous generator that is cancelled there is over."""
    waited_for, given_up = asyncio.Event(), asyncio.Event()

    class Throttled(Client):
        tries = 0

        async def upload_part(self, **params: Any) -> dict[str, Any]:
            await waited_for.wait()
            self.tries += 1
            if self.tries == 4:
                given_up.set()
            raise refusal("SlowDown", 503)

    content = pattern(13 << 20)

    async def chunks() -> AsyncIterator[bytes]:
        for start in range(0, 12 << 20, 1 << 20):
            yield content[start : start + (1 << 20)]
        waited_for.set()
        await given_up.wait()
        for _ in range(100):  # turns of the loop, in which the upload learns of it
            await asyncio.sleep(0)
        yield content[12 << 20 :]

    client = Throttled()
    memory = MemoryBackend()
    originals = {"s3": S3Backend("bucket", client=client), "memory": memory}
    async with ProxyStorage("m", originals=originals, meta=MemoryMetaBackend(), placement=Fallback()) as storage:
        path = await storage.save("key", chunks())
        async with memory.read(path) as reader:
            assert b"".join([chunk async for chunk in reader]) == content
    assert client.tries == 4, "the second part was sent although the first had failed"
