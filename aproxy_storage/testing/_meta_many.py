"""The promises of the calls that take many records: an answer for each."""

from __future__ import annotations

import pytest

from ..errors import AlreadyExists, Conflict, InvalidPath, NotFound
from ..meta_backends.base import MetaBackend
from ..records import PENDING, MetaRecord, Revision
from ._meta_hooks import MetaBackendHooks, listed, make_record

__all__ = ["ManyTests"]


@pytest.mark.asyncio
class ManyTests(MetaBackendHooks):
    async def test_create_many_answers_each(self, meta: MetaBackend) -> None:
        own = make_record("own", state=PENDING)
        await meta.create(own)
        await meta.create(make_record("taken"))
        records = [make_record(path) for path in ("one", "taken", "two", "one", "three")] + [own]
        answers = await meta.create_many(records, lease=60.0)
        kinds = [type(answer) for answer in answers]
        assert kinds == [MetaRecord, AlreadyExists, MetaRecord, AlreadyExists, MetaRecord, MetaRecord]
        assert [a.path for a in answers] == ["one", "taken", "two", "one", "three", "own"]
        assert answers[0] == await meta.get("one")
        assert (await meta.get("three")).lease is not None
        assert (await meta.get("one")).token == records[0].token
        assert await meta.count() == 5
        assert await meta.create_many([]) == []

    async def test_create_many_beyond_a_chunk(self, meta: MetaBackend) -> None:
        await meta.create(make_record("00700"))
        answers = await meta.create_many([make_record(f"{number:05}") for number in range(1203)])
        assert [isinstance(answer, MetaRecord) for answer in answers].count(False) == 1
        assert isinstance(answers[700], AlreadyExists)
        assert await meta.count() == 1203
        assert len(await self.rows_behind(meta)) == 1203

    async def test_create_many_goes_on_after_what_cannot_be_kept(self, meta: MetaBackend) -> None:
        answers = await meta.create_many(
            [make_record("a"), make_record("b\ud800", original_storage_path=""), make_record("c")]
        )
        assert [isinstance(answer, MetaRecord) for answer in answers] == [True, False, True]
        assert isinstance(answers[1], InvalidPath)
        assert await listed(meta.list()) == ["a", "c"]

    async def test_get_many_keeps_order_and_gaps(self, meta: MetaBackend) -> None:
        records = {path: await meta.create(make_record(path)) for path in ("a", "b", "c")}
        wanted = ["c", "no", "a", "c", "", "b"]
        assert await meta.get_many(wanted) == [records.get(path) for path in wanted]
        assert await meta.get_many([]) == []
        many = [f"{number:05}" for number in range(1001)] + ["a"]
        assert (await meta.get_many(many))[-1] == records["a"]

    async def test_update_many_answers_each(self, meta: MetaBackend) -> None:
        for path in ("a", "b", "c"):
            await meta.create(make_record(path, token="t" + path))
        answers = await meta.update_many(
            [
                ("a", {"version": 1, "size": 1}, Revision("ta", 0)),
                ("b", {"version": 1}, Revision("tb", 9)),
                ("no", {"size": 1}, None),
                ("b", {"path": "c"}, None),
                ("a", {"size": 2}, Revision("ta", 1)),
                ("c", {"extra": {"x": 1}}, None),
            ],
            lease=60.0,
        )
        assert [type(a) for a in answers] == [MetaRecord, Conflict, NotFound, AlreadyExists, MetaRecord, MetaRecord]
        assert ((await meta.get("a")).size, (await meta.get("c")).extra) == (2, {"x": 1})
        assert (await meta.get("a")).lease is not None
        assert (await meta.get("b")).lease is None
        assert answers[5] == await meta.get("c")
        assert await meta.update_many([]) == []

    async def test_delete_many_answers_each(self, meta: MetaBackend) -> None:
        for path in ("a", "b", "c"):
            await meta.create(make_record(path, token="t" + path))
        answers = await meta.delete_many(
            [("a", None), ("no", None), ("b", Revision("x", 0)), ("c", Revision("tc", 0)), ("a", None)]
        )
        assert [type(answer) for answer in answers] == [type(None), NotFound, Conflict, type(None), NotFound]
        assert await listed(meta.list()) == ["b"]
        assert await meta.delete_many([]) == []
