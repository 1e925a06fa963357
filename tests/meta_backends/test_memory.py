"""`MemoryMetaBackend` against the suite, and its clock."""

from __future__ import annotations

import copy
import math
from collections.abc import AsyncIterator, Mapping, Sequence
from datetime import timedelta, timezone
from typing import Any

import pytest
import pytest_asyncio

from aproxy_storage.meta_backends._orm_table import _lease as orm_lease
from aproxy_storage.meta_backends._postgres_rows import to_record as postgres_record
from aproxy_storage.meta_backends._rows import COLUMNS
from aproxy_storage.meta_backends.memory import MemoryMetaBackend
from aproxy_storage.records import PENDING
from aproxy_storage.testing.meta_backends import MetaBackendTests, make_record

DEFAULTS = {"state": "stored", "token": "", "version": 0, "places": "[]", "extra": "{}"}


class InMemory(MetaBackendTests):
    """The hooks for `MemoryMetaBackend` and its mutants."""

    async def row_behind(self, meta: MemoryMetaBackend, path: str) -> Mapping[str, Any] | None:
        row = meta._rows.get(path)
        return None if row is None else dict(zip(COLUMNS, row, strict=True))

    async def rows_behind(self, meta: MemoryMetaBackend) -> Sequence[Mapping[str, Any]]:
        return [dict(zip(COLUMNS, row, strict=True)) for row in copy.copy(meta._rows).values()]

    async def insert_behind(self, meta: MemoryMetaBackend, **columns: Any) -> None:
        meta._put([(DEFAULTS | columns).get(column) for column in COLUMNS])

    async def expire_lease_behind(self, meta: MemoryMetaBackend, path: str, *, ago: float = 1.0) -> None:
        meta._rows[path][COLUMNS.index("lease")] = meta.now() - ago


class TestMemory(InMemory):
    @pytest_asyncio.fixture
    async def meta(self) -> AsyncIterator[MemoryMetaBackend]:
        async with MemoryMetaBackend() as meta:
            yield meta


@pytest.mark.asyncio
@pytest.mark.parametrize("seconds", [math.inf, -math.inf, math.nan, 1e12, -1e12])
async def test_a_moment_that_nothing_can_show_hides_no_record(seconds: float) -> None:
    meta = MemoryMetaBackend()
    await meta.create(make_record("a"))
    times = {"lease": seconds, "created_at": seconds, "updated_at": seconds}
    await InMemory().insert_behind(meta, path="b", **times)
    assert [record.path async for record in meta.list()] == ["a", "b"]
    lease = (await meta.get("b")).lease
    assert lease is not None
    assert lease.astimezone(timezone(timedelta(hours=14))).year in (1, 9999)
    row = [DEFAULTS.get(column) for column in COLUMNS]
    row[COLUMNS.index("lease")] = seconds
    assert postgres_record(row).lease == orm_lease(seconds) == lease


@pytest.mark.asyncio
async def test_leases_go_by_the_clock_given() -> None:
    now = 1000.0
    meta = MemoryMetaBackend(clock=lambda: now)
    record = await meta.create(make_record("a", state=PENDING), lease=60.0)
    assert record.lease is not None
    assert record.created_at is not None
    assert (record.lease - record.created_at).total_seconds() == pytest.approx(60.0)
    now = 1059.0
    assert await meta.list_unfinished() == []
    now = 1061.0
    assert [r.path for r in await meta.list_unfinished()] == ["a"]
    assert await meta.list_unfinished(older_than=5.0) == []
    now = 1066.0
    assert [r.path for r in await meta.list_unfinished(older_than=5.0)] == ["a"]
