"""The collection of the records as one event loop uses it: the statements, the indexes, the server's clock."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from datetime import timedelta
from typing import Any

from pymongo import ASCENDING, IndexModel, WriteConcern

from ..clients.mongo import collection_of, ensure_indexes, runs_in_threads
from ._mongo_clock import ServerClock
from ._mongo_documents import Document

__all__ = ["Collection"]

_BATCH = 500  # documents of one answer of the server

_INDEXES = (
    # Named and made as django-proxy-storage does.
    IndexModel([("path", ASCENDING)], name="path_1", unique=True),
    IndexModel([("original_storage_path", ASCENDING)], name="aproxy_original_storage_path"),
    IndexModel([("places.key", ASCENDING)], name="aproxy_places_key", sparse=True),
    IndexModel(
        [("unfinished", ASCENDING), ("path", ASCENDING)],
        name="aproxy_unfinished",
        partialFilterExpression={"unfinished": True},
    ),
)

_PLACES = {"path": True, "original_storage_name": True, "original_storage_path": True, "places": True}


class Collection:
    """The collection as one event loop uses it."""

    def __init__(self, database: Any, name: str, concern: WriteConcern) -> None:
        self.files = collection_of(database, name, concern)
        self.clock = ServerClock(database)
        self.in_threads = runs_in_threads(database)
        self.ready = False
        self._preparing = asyncio.Lock()

    async def one(self, wanted: Document, fields: Mapping[str, Any] | None = None) -> Document | None:
        document: Document | None = await self.files.find_one(wanted, fields)
        return document

    async def count(self, wanted: Document) -> int:
        return int(await self.files.count_documents(wanted))

    async def delete(self, wanted: Document) -> bool:
        return bool((await self.files.delete_one(wanted)).deleted_count)

    async def found(self, wanted: Document, fields: Mapping[str, Any] | None = None) -> list[Document]:
        documents: list[Document] = await self.files.find(wanted, fields).batch_size(_BATCH).to_list(None)
        return documents

    async def naming(self, keys: Sequence[str]) -> list[Document]:
        """Return the path and the places of the records that name one of `keys`, in whatever original.

        Look-ups each served by its index: for an ``$or`` of both some servers read every document. The first is made
        again at the end, where a key was looked for and not found: it may have moved from one field to the other.
        """
        found = await self.found({"original_storage_path": {"$in": keys}}, _PLACES)
        found += await self.found({"places.key": {"$in": keys}}, _PLACES)
        named = {document["original_storage_path"] for document in found}
        named |= {place["key"] for document in found for place in document.get("places") or ()}
        if missing := [key for key in keys if key not in named]:
            found += await self.found({"original_storage_path": {"$in": missing}}, _PLACES)
        return list({document["_id"]: document for document in found}.values())

    async def page(self, wanted: Document, limit: int) -> list[Document]:
        cursor = self.files.find(wanted).sort("path", ASCENDING).limit(limit).batch_size(limit)
        documents: list[Document] = await cursor.to_list(None)
        return documents

    async def unfinished(self, wanted: Document, limit: int, older_than: float | None) -> list[Document]:
        if older_than is not None:
            over = await self.clock.read() - timedelta(seconds=older_than)
            wanted["$or"] = [{"lease": None}, {"lease": {"$lte": over}}]
        return await self.page(wanted, limit)

    async def prepare(self, shown: str) -> None:
        """Make the indexes that are missing."""
        async with self._preparing:
            if self.ready:
                return
            await ensure_indexes(self.files, _INDEXES, shown)
            self.ready = True
