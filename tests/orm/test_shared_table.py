"""`PostgresMetaBackend` on the table of a Django model, beside `ORMMetaBackend`: each reads what the other writes."""

from __future__ import annotations

import pytest

from aproxy_storage import Conflict
from aproxy_storage.meta_backends.orm import ORMMetaBackend
from aproxy_storage.meta_backends.postgres import PostgresMetaBackend
from aproxy_storage.records import DELETING, Place, Revision
from aproxy_storage.testing.meta_backends import make_record, make_reservation


@pytest.mark.asyncio
async def test_both_backends_on_one_table(postgres_url: str, postgres_database: str) -> None:
    orm = ORMMetaBackend("sync_bridge.StoredFile", postgres_database)
    async with PostgresMetaBackend(postgres_url, table="sync_bridge_storedfile", schema=postgres_database) as meta:
        by_postgres = await meta.create(make_record("a", extra={"x": 1}, places=(Place("s3", "k1"),)), lease=60.0)
        by_orm = await orm.create(make_record("b/é", extra={"y": [2]}, places=(Place("s3", "k2"),)), lease=60.0)
        for backend in (meta, orm):
            assert await backend.get("a") == by_postgres
            assert await backend.get("b/é") == by_orm
            assert await backend.owners("s3", ["k1", "k2"]) == {"k1": ["a"], "k2": ["b/é"]}
            assert [record.path async for record in backend.list()] == ["a", "b/é"]
            assert [record.path for record in await backend.list_unfinished(force=True)] == ["a", "b/é"]
        record, spare = make_reservation("c")
        reserved = await meta.reserve(record, lease=60.0, spare=spare)
        assert reserved == await orm.get("c")
        await meta.update("b/é", {"state": DELETING, "version": 1}, expect=by_orm.revision)
        with pytest.raises(Conflict):
            await orm.delete("b/é", expect=by_orm.revision)
        await orm.delete("b/é", expect=Revision(by_orm.token, 1))
        assert await meta.count() == 2
    await orm.aclose()
