"""The S3 backend keeps every promise of the suite, against a real service: in one piece, in parts, without a prefix."""

import asyncio
import contextlib
import os
from collections.abc import AsyncIterator
from typing import Any

import pytest
import pytest_asyncio

from aproxy_storage.backends.s3 import S3Backend
from aproxy_storage.records import Capabilities
from aproxy_storage.testing._backend_life import LifeTests
from aproxy_storage.testing._backend_reads import ReadTests
from aproxy_storage.testing._backend_writes import CancellationTests, WriteTests
from aproxy_storage.testing.backends import BackendTests
from tests.services.s3 import S3Service

ON_SEAWEEDFS = "APROXY_TEST_S3_URL" not in os.environ  # then it is our own server


def backend_of(service: S3Service, **options: Any) -> S3Backend:
    """Return a backend of the tests' own prefix, that knows of SeaweedFS's directories, with small parts."""
    known: dict[str, Any] = {"prefix": service.prefix, "max_segment_bytes": 255, "flat_listings": False}
    if ON_SEAWEEDFS:
        known["conditional_copies"] = True
    return S3Backend(**{**service.options, **known, "part_bytes": 5 << 20, "parts": 2, **options})


class ObjectsBehind:
    """How the tests look into and change the bucket, with a client of botocore's own."""

    service: S3Service
    client: Any
    writers = 8  # more, and SeaweedFS makes them wait for seconds

    @pytest.fixture(autouse=True)
    def _behind(self, s3_service: S3Service, s3_client: Any) -> None:
        self.service, self.client = s3_service, s3_client

    def _at(self, key: str) -> dict[str, str]:
        return {"Bucket": self.service.bucket, "Key": self.service.prefix + key}

    async def put_behind(self, backend: Any, key: str, data: bytes) -> None:
        await asyncio.to_thread(self.client.put_object, Body=data, **self._at(key))

    async def get_behind(self, backend: Any, key: str) -> bytes | None:
        try:
            answer = await asyncio.to_thread(self.client.get_object, **self._at(key))
        except self.client.exceptions.NoSuchKey:
            return None
        with contextlib.closing(answer["Body"]) as body:
            return await asyncio.to_thread(body.read)  # type: ignore[no-any-return]

    async def list_behind(self, backend: Any) -> list[str]:
        return await asyncio.to_thread(self.service.everything, self.client)


class TestS3Backend(ObjectsBehind, BackendTests):
    """Content in one piece, copies with one request; a read is one stream."""

    options: dict[str, Any] = {}  # noqa: RUF012

    @pytest_asyncio.fixture
    async def backend(self, s3_service: S3Service) -> AsyncIterator[S3Backend]:
        async with backend_of(s3_service, **self.options) as backend:
            yield backend


class TestS3BackendInParts(ObjectsBehind, WriteTests, CancellationTests, ReadTests, LifeTests):
    """Content and copies by multipart uploads, reads by ranges, although there is no need; listings are the same."""

    options = {"multipart_bytes": 1 << 16, "conditional_copies": False, "parallel_reads": 2}  # noqa: RUF012

    @pytest_asyncio.fixture
    async def backend(self, s3_service: S3Service) -> AsyncIterator[S3Backend]:
        async with backend_of(s3_service, **self.options) as backend:
            backend._range_bytes = 1 << 20
            yield backend

    async def test_one_of_many_simultaneous_writers_wins(self, backend: Any) -> None:
        _needs_exclusive_completion()
        await super().test_one_of_many_simultaneous_writers_wins(backend)

    async def test_one_of_many_simultaneous_copies_wins(self, backend: Any) -> None:
        _needs_exclusive_completion()
        await super().test_one_of_many_simultaneous_copies_wins(backend)


def _needs_exclusive_completion() -> None:
    if ON_SEAWEEDFS:
        pytest.skip("SeaweedFS lets several simultaneous CompleteMultipartUpload win, see docs/s3.md")


def test_capabilities_are_these() -> None:
    assert S3Backend.capabilities == Capabilities(
        conditional_create=True,
        range_read=True,
        list=True,
        url=True,
        modified_time=True,
        server_copy=True,
        metadata=True,
        content_type=True,
        tokens=True,
        upload_form=True,
    )
    made = S3Backend("bucket", prefix="a/prefix", conditional_writes=False, max_segment_bytes=255)
    assert made.capabilities.max_key_bytes == 1024 - len("a/prefix/")
    assert made.capabilities.max_segment_bytes == 255
    assert not made.capabilities.conditional_create
