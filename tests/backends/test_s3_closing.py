"""What becomes of requests that are under way when the backend is closed: they fail, and say what they do not know."""

import asyncio
import contextlib
from collections.abc import AsyncIterator
from typing import Any
from unittest.mock import Mock

import pytest

from aproxy_storage.backends.s3 import S3Backend
from aproxy_storage.errors import BackendUnavailable
from aproxy_storage.timeouts import Timeouts
from tests.backends.fake_s3 import Answer, Asked, FakeS3

pytestmark = pytest.mark.asyncio

SHORT = Timeouts(cleanup=0.2)  # so long `aclose` waits for what is under way


class Hanging:
    """A service without objects that leaves one kind of request without an answer until it is told to go on."""

    def __init__(self, method: str, query: str) -> None:
        self._kind = (method, query)
        self.asked = asyncio.Event()
        self.go_on = asyncio.Event()

    async def __call__(self, asked: Asked) -> Answer:
        if asked.method == self._kind[0] and asked.query.startswith(self._kind[1]):
            self.asked.set()
            await self.go_on.wait()
        if asked.method in ("HEAD", "GET"):
            return Answer(404)
        return Answer(200, {"ETag": '"1"'}, b"<R><UploadId>1</UploadId><ETag>1</ETag></R>")

    @contextlib.asynccontextmanager
    async def writing(self, size: int) -> AsyncIterator[tuple[S3Backend, asyncio.Future[Any], FakeS3]]:
        """Give a backend, and its write that waits for the answer."""
        fake = FakeS3(self)
        async with fake.backend(timeouts=SHORT, multipart_bytes=1 << 16) as backend:
            try:
                writing = asyncio.ensure_future(backend.write("key", b"x" * size))
                async with asyncio.timeout(20):
                    await self.asked.wait()
                    yield backend, writing, fake
            finally:
                self.go_on.set()
                writing.cancel()
                await asyncio.wait([writing])


@pytest.mark.parametrize(
    ("method", "query", "size"),
    [("PUT", "", 10), ("POST", "uploads", 1 << 17), ("POST", "uploadId", 1 << 17)],
    ids=["one piece", "beginning", "completion"],
)
async def test_a_write_that_closing_cuts_short_is_neither_cancelled_nor_certain(
    method: str, query: str, size: int
) -> None:
    """A CancelledError that nobody has asked for would be taken for nothing by a TaskGroup: the write would be lost
    without a word."""
    async with Hanging(method, query).writing(size) as (backend, writing, _):
        await backend.aclose()
        with pytest.raises(BackendUnavailable) as caught:
            await writing
        assert caught.value.outcome_unknown
        assert caught.value.retryable


async def test_parts_make_no_new_client_after_closing() -> None:
    """It would be on a connection that nobody knows any more, and so never be closed."""
    async with Hanging("PUT", "").writing(1 << 17) as (backend, writing, fake):
        connection = backend._connections.get()
        await backend.aclose()
        with pytest.raises(BackendUnavailable):
            await writing
        await backend.cleanup.drain(within=5)
        assert connection._client is None, "a client that nobody closes"
        assert not any(asked.method == "DELETE" for asked in fake.asked), "sent after the end"
        with pytest.raises(BackendUnavailable, match="closed"):
            await connection.call("head_object", "look", Bucket="bucket", Key="key")


async def test_a_client_that_is_made_while_its_connection_is_closed_is_closed_too() -> None:
    begun, go_on, ended = asyncio.Event(), asyncio.Event(), asyncio.Event()

    class Session:
        """It fetches credentials, say."""

        @contextlib.asynccontextmanager
        async def create_client(self, *_: Any, **__: Any) -> AsyncIterator[Any]:
            begun.set()
            await go_on.wait()
            yield Mock()
            ended.set()

        def get_component(self, name: str) -> Any:
            return Mock()

        async def get_credentials(self) -> None:
            return None

    backend = S3Backend("bucket", session=Session())
    looking = asyncio.ensure_future(backend.stat("key"))
    await begun.wait()
    await backend.aclose()
    go_on.set()
    with pytest.raises(BackendUnavailable, match="closed"):
        await looking
    assert ended.is_set()
