"""`MongoMetaBackend` against the suite, with both drivers, and what only MongoDB can do or suffer."""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping, Sequence
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
import pytest_asyncio

from aproxy_storage.meta_backends.mongo import MongoMetaBackend
from aproxy_storage.testing.meta_backends import MetaBackendTests
from tests.services.mongo import DRIVERS, FORGOTTEN_SOCKETS, Borrowed, in_database

pytestmark = FORGOTTEN_SOCKETS


class TestMongo(MetaBackendTests):
    keeps_microseconds = False

    @pytest.fixture(params=DRIVERS)
    def given(self, request: pytest.FixtureRequest, mongo_url: str, mongo_database: Any) -> Any:
        """What users pass: a URI, which PyMongo Async serves, or a function that gives a database of Motor."""
        if request.param == "pymongo":
            return in_database(mongo_url, mongo_database.name)
        return Borrowed("motor", mongo_url, mongo_database.name)

    @pytest_asyncio.fixture
    async def meta(self, given: Any, mongo_database: Any) -> AsyncIterator[MongoMetaBackend]:
        async with MongoMetaBackend(given, "files") as meta:
            self.files = mongo_database["files"]
            yield meta
        if isinstance(given, Borrowed):
            await given.close()

    async def row_behind(self, meta: MongoMetaBackend, path: str) -> Mapping[str, Any] | None:
        found: Mapping[str, Any] | None = await self.files.find_one({"path": path})
        return found

    async def rows_behind(self, meta: MongoMetaBackend) -> Sequence[Mapping[str, Any]]:
        found: Sequence[Mapping[str, Any]] = await self.files.find().to_list()
        return found

    async def insert_behind(self, meta: MongoMetaBackend, **columns: Any) -> None:
        await self.files.insert_one(columns)

    async def expire_lease_behind(self, meta: MongoMetaBackend, path: str, *, ago: float = 1.0) -> None:
        over = datetime.now(UTC) - timedelta(seconds=ago)
        done = await self.files.update_one({"path": path}, {"$set": {"lease": over}})
        assert done.matched_count == 1
