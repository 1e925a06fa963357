"""`GridFSBackend` against the suite, with both drivers, and what only GridFS can do or suffer."""

from __future__ import annotations

from collections.abc import AsyncIterator
from datetime import UTC, datetime
from typing import Any

import pytest
import pytest_asyncio
from bson import ObjectId
from gridfs import AsyncGridFSBucket
from gridfs.errors import NoFile

from aproxy_storage.backends.gridfs import GridFSBackend
from aproxy_storage.records import Capabilities
from aproxy_storage.testing.backends import BackendTests
from tests.services.mongo import DRIVERS, FORGOTTEN_SOCKETS, Borrowed, in_database

pytestmark = FORGOTTEN_SOCKETS


class TestGridFS(BackendTests):
    @pytest.fixture(params=DRIVERS)
    def given(self, request: pytest.FixtureRequest, mongo_url: str, mongo_database: Any) -> Any:
        """What users pass: a URI, which PyMongo Async serves, or a function that gives a database of Motor."""
        if request.param == "pymongo":
            return in_database(mongo_url, mongo_database.name)
        return Borrowed("motor", mongo_url, mongo_database.name)

    @pytest_asyncio.fixture
    async def backend(self, given: Any, mongo_database: Any) -> AsyncIterator[GridFSBackend]:
        self.database = mongo_database
        self.bucket = AsyncGridFSBucket(mongo_database)
        async with GridFSBackend(given) as backend:
            yield backend
        if isinstance(given, Borrowed):
            await given.close()

    # By the driver's own bucket, as any other program would.

    async def put_behind(self, backend: GridFSBackend, key: str, data: bytes) -> None:
        if data:
            await self.bucket.upload_from_stream(key, data)
            return
        # The same document, in one statement instead of three: a test makes a thousand empty files.
        empty = {
            "_id": ObjectId(),
            "filename": key,
            "length": 0,
            "chunkSize": 255 << 10,
            "uploadDate": datetime.now(UTC),
        }
        await self.database["fs.files"].insert_one(empty)

    async def get_behind(self, backend: GridFSBackend, key: str) -> bytes | None:
        try:
            async with await self.bucket.open_download_stream_by_name(key) as found:
                data: bytes = await found.read()
                return data
        except NoFile:
            return None

    async def list_behind(self, backend: GridFSBackend) -> list[str]:
        return await everything_in(self.database)


async def everything_in(database: Any, bucket: str = "fs") -> list[str]:
    """Return the name of every file, and something for each chunk that belongs to none."""
    names, ids = [], []
    async for document in database[f"{bucket}.files"].find():
        names.append(document.get("filename") or f"hidden: {document['_id']}")
        ids.append(document["_id"])
    orphans = await database[f"{bucket}.chunks"].distinct("files_id", {"files_id": {"$nin": ids}})
    return names + [f"chunks of {one}" for one in orphans]


def test_capabilities() -> None:
    assert GridFSBackend.capabilities == Capabilities(
        conditional_create=True,
        range_read=True,
        list=True,
        modified_time=True,
        metadata=True,
        content_type=True,
        tokens=True,
    )
