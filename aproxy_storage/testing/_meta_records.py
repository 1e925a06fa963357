"""The promises of one record: `create`, `reserve`, `get`, `exists`, `update` and `delete`, and what `extra` keeps."""

from __future__ import annotations

import asyncio
from datetime import UTC, datetime
from typing import Any

import pytest

from ..errors import AlreadyExists, Conflict, InvalidPath, NotFound, NotSupported
from ..meta_backends.base import MetaBackend
from ..records import DELETING, PENDING, STORED, MetaRecord, Place, Revision
from ._meta_hooks import AWKWARD, MetaBackendHooks, listed, make_record, make_reservation

__all__ = ["ChangeTests", "CreateTests"]


@pytest.mark.asyncio
class CreateTests(MetaBackendHooks):
    # -- create

    async def test_create_returns_what_get_returns(self, meta: MetaBackend) -> None:
        made = datetime(2024, 2, 29, 12, 30, 15, 123457 if self.keeps_microseconds else 123000, tzinfo=UTC)
        record = make_record(
            "a/日本.txt",
            state=PENDING,
            version=3,
            places=(Place("s3", "k/日本", "doubtful"), Place("fs", "old", "surplus", 1795320867.339447)),
            size=2**40,
            checksum="sha256:" + "0f" * 32,
            content_type="text/plain; charset=utf-8",
            name="Ω 'quoted' \"name\".txt",
            created_at=made,
            extra={"owner": 7},
        )
        stored = await meta.create(record)
        assert await meta.get(record.path) == stored
        for field in record:
            if field not in ("updated_at", "owner"):
                assert stored[field] == record[field], field
        assert stored.extra == {"owner": 7}
        assert stored.updated_at is not None
        row = await self.row_behind(meta, record.path)
        assert row is not None
        for field in ("path", "proxy_storage_name", "original_storage_path", "state", "token", "version", "size"):
            assert row[field] == record[field], field

    async def test_create_fills_in_the_times_of_now_in_utc(self, meta: MetaBackend) -> None:
        record = await meta.create(make_record("a"))
        assert record.created_at is not None
        assert record.updated_at is not None
        assert record.created_at.utcoffset() is not None
        assert abs((record.created_at - datetime.now(UTC)).total_seconds()) < 6 * 3600

    async def test_create_keeps_the_first_on_a_taken_path(self, meta: MetaBackend) -> None:
        first = await meta.create(make_record("a", original_storage_path="1"))
        with pytest.raises(AlreadyExists) as caught:
            await meta.create(make_record("a", original_storage_path="2"))
        assert caught.value.path == "a"
        assert not caught.value.outcome_unknown
        assert await meta.get("a") == first
        assert len(await self.rows_behind(meta)) == 1

    async def test_create_again_with_the_own_token_succeeds(self, meta: MetaBackend) -> None:
        record = make_record("a", state=PENDING)
        await meta.create(record)
        moved = await meta.update("a", {"state": STORED, "version": 1})
        assert await meta.create(record) == moved
        assert (await meta.get("a")).state == STORED
        assert len(await self.rows_behind(meta)) == 1

    async def test_an_empty_token_is_nobodys(self, meta: MetaBackend) -> None:
        await meta.create(make_record("a", token=""))
        with pytest.raises(AlreadyExists):
            await meta.create(make_record("a", token=""))

    async def test_create_has_one_winner_among_200_tasks(self, meta: MetaBackend) -> None:
        records = [make_record("contested", original_storage_path=str(number)) for number in range(200)]
        answers = await asyncio.gather(*map(meta.create, records), return_exceptions=True)
        winners = [answer for answer in answers if isinstance(answer, MetaRecord)]
        assert len(winners) == 1
        assert sum(isinstance(answer, AlreadyExists) for answer in answers) == 199
        assert (await meta.get("contested")).token == winners[0].token

    async def test_paths_that_differ_in_case_or_normal_form_are_two(self, meta: MetaBackend) -> None:
        paths = ["photo.jpg", "Photo.jpg", "photo.jpg ", "\u00e9", "e\u0301", "straße", "strasse"]
        for path in paths:
            await meta.create(make_record(path))
        for path in paths:
            assert (await meta.get(path)).path == path
        assert await meta.count() == len(paths)

    async def test_long_and_awkward_paths(self, meta: MetaBackend) -> None:
        for path in [*AWKWARD, "日" * 341, "x" * 1024, "../etc/passwd", "/srv/old/absolute.jpg", "C:\\old"]:
            record = await meta.create(make_record(path, name=path))
            assert await meta.get(path) == record
            assert (await self.row_behind(meta, path) or {})["path"] == path
            await meta.delete(path)
            assert not await meta.exists(path)

    async def test_text_that_cannot_be_encoded(self, meta: MetaBackend) -> None:
        with pytest.raises(InvalidPath):
            await meta.create(make_record("lone\ud800", original_storage_path=""))
        await meta.create(make_record("a"))
        with pytest.raises(InvalidPath):
            await meta.update("a", {"path": "lone\ud800"})
        assert await listed(meta.list()) == ["a"]

    async def test_lookups_take_any_text(self, meta: MetaBackend) -> None:
        await meta.create(make_record("a"))
        for path in ["", "lone\ud800", "nul\0", "a\0", "x" * 5000, "%", "'", ".", "$where", "a\n"]:
            assert not await meta.exists(path)
            with pytest.raises(NotFound):
                await meta.get(path)
            with pytest.raises(NotFound):
                await meta.delete(path)
            with pytest.raises(NotFound):
                await meta.update(path, {"size": 1})
            assert await meta.owners("fs", [path]) == {}
        assert await meta.get_many(["lone\ud800", "a"]) == [None, await meta.get("a")]

    # -- reserve, get, exists

    async def test_reserve_is_seen_at_once(self, meta: MetaBackend) -> None:
        record, spare = make_reservation("a")
        reserved = await meta.reserve(record, lease=60.0, spare=spare)
        assert reserved is not None
        assert (reserved.state, reserved.token, reserved.original_storage_path) == (PENDING, record.token, "a")
        assert reserved.lease is not None
        assert await meta.get("a") == reserved
        assert (await self.row_behind(meta, "a") or {})["original_storage_path"] == "a"
        again = await meta.reserve(record, lease=60.0, spare=spare)  # the answer was lost: ours all the same
        assert again == await meta.get("a")
        other, spare = make_reservation("a")
        with pytest.raises(AlreadyExists):
            await meta.reserve(other, lease=60.0, spare=spare)
        assert (await meta.get("a")).token == record.token

    async def test_reserve_leaves_keys_that_others_name(self, meta: MetaBackend) -> None:
        await meta.create(make_record("renamed", original_storage_path="a"))
        await meta.create(make_record("dying", original_storage_path="b", state=DELETING, proxy_storage_name="else"))
        await meta.create(make_record("further", places=(Place("s3", "c", "surplus"), Place("fs", "d", "doubtful"))))
        for path, taken in [("a", True), ("b", True), ("c", False), ("d", True), ("e", False)]:
            record, spare = make_reservation(path)
            reserved = await meta.reserve(record, lease=60.0, spare=spare)
            assert reserved is not None
            expected = spare if taken else record
            assert reserved.original_storage_path == expected.original_storage_path, path
            assert (reserved.path, reserved.token, reserved.places) == (path, record.token, expected.places)
            assert reserved.lease is not None
            assert await meta.get(path) == reserved
            key = expected.original_storage_path
            assert await meta.owners("fs", [key]) == {key: [path]}
        record, spare = make_reservation("f", places=(Place("s3", "c", "doubtful"),))
        reserved = await meta.reserve(record, lease=60.0, spare=spare)
        assert reserved is not None
        assert reserved.original_storage_path == spare.original_storage_path
        assert await meta.owners("s3", ["c"]) == {"c": ["further"]}

    async def test_get_of_nothing(self, meta: MetaBackend) -> None:
        with pytest.raises(NotFound) as caught:
            await meta.get("no/such")
        assert (caught.value.operation, caught.value.path) == ("get", "no/such")
        assert caught.value.backend

    async def test_exists_filters(self, meta: MetaBackend) -> None:
        await meta.create(make_record("a", state=PENDING, proxy_storage_name="one"))
        assert await meta.exists("a")
        assert await meta.exists("a", state=PENDING)
        assert not await meta.exists("a", state=STORED)
        assert await meta.exists("a", proxy_storage_name="one")
        assert not await meta.exists("a", proxy_storage_name="two")
        assert not await meta.exists("a", proxy_storage_name="")
        assert not await meta.exists("a", state=STORED, proxy_storage_name="one")
        assert not await meta.exists("A")

    async def test_rows_of_other_programs(self, meta: MetaBackend) -> None:
        await self.insert_behind(
            meta,
            path="old/1.txt",
            proxy_storage_name="media",
            original_storage_name="fs",
            original_storage_path="media/old/1.txt",
        )
        record = await meta.get("old/1.txt")
        assert (record.state, record.version, record.token, record.lease) == (STORED, 0, "", None)
        assert await meta.exists("old/1.txt", state=STORED)
        assert not await meta.exists("old/1.txt", state=PENDING)
        assert await listed(meta.list("old", state=STORED)) == ["old/1.txt"]
        assert await meta.count(state=STORED) == 1
        assert await meta.list_unfinished(force=True) == []
        assert await meta.owners("fs", ["media/old/1.txt"]) == {"media/old/1.txt": ["old/1.txt"]}
        changed = await meta.update("old/1.txt", {"state": DELETING, "version": 1}, expect=record.revision)
        assert (changed.state, changed.version) == (DELETING, 1)
        await meta.delete("old/1.txt", expect=Revision("", 1))


@pytest.mark.asyncio
class ChangeTests(MetaBackendHooks):
    # -- update

    async def test_update_returns_the_new_record(self, meta: MetaBackend) -> None:
        old = await meta.create(make_record("a", state=PENDING, extra={"x": 1}, size=1))
        changes: dict[str, Any] = {
            "original_storage_name": "s3",
            "original_storage_path": "k",
            "state": STORED,
            "version": 1,
            "places": (Place("fs", "a", "surplus"),),
            "size": 9,
            "checksum": "sha256:00",
            "content_type": "a/b",
            "name": "n",
            "extra": {"y": [2]},
        }
        new = await meta.update("a", changes)
        for field, value in changes.items():
            assert new[field] == value, field
        assert (new.path, new.token, new.created_at) == (old.path, old.token, old.created_at)
        assert await meta.get("a") == new
        row = await self.row_behind(meta, "a")
        assert row is not None
        assert (row["state"], row["version"], row["size"]) == (STORED, 1, 9)

    async def test_update_touches_only_what_it_names(self, meta: MetaBackend) -> None:
        old = await meta.create(make_record("a", extra={"x": 1}, places=(Place("s3", "k"),), size=5), lease=600)
        new = await meta.update("a", {"name": "n"})
        for field in old:
            if field not in ("name", "updated_at", "x"):
                assert new[field] == old[field], field
        assert new.extra == old.extra

    async def test_update_compares_the_token(self, meta: MetaBackend) -> None:
        await meta.create(make_record("a", token="mine", version=4))
        with pytest.raises(Conflict):
            await meta.update("a", {"size": 1}, expect=Revision("other", 4))
        assert (await meta.get("a")).size is None

    async def test_update_compares_the_version(self, meta: MetaBackend) -> None:
        await meta.create(make_record("a", token="mine", version=4))
        for version in (3, 5):
            with pytest.raises(Conflict):
                await meta.update("a", {"size": 1}, expect=Revision("mine", version))
        assert (await meta.get("a")).size is None
        assert (await meta.update("a", {"size": 1}, expect=Revision("mine", 4))).size == 1

    async def test_update_has_one_winner_per_version(self, meta: MetaBackend) -> None:
        record = await meta.create(make_record("a"))
        work = (meta.update("a", {"version": 1, "size": n}, expect=record.revision) for n in range(50))
        answers = await asyncio.gather(*work, return_exceptions=True)
        assert sum(isinstance(answer, MetaRecord) for answer in answers) == 1
        assert sum(isinstance(answer, Conflict) for answer in answers) == 49

    async def test_update_of_what_is_gone(self, meta: MetaBackend) -> None:
        with pytest.raises(NotFound):
            await meta.update("gone", {"size": 1})
        with pytest.raises(Conflict):
            await meta.update("gone", {"size": 1}, expect=Revision("t", 0))
        assert await self.rows_behind(meta) == []

    async def test_update_moves_the_path(self, meta: MetaBackend) -> None:
        record = await meta.create(make_record("old", extra={"x": 1}))
        moved = await meta.update("old", {"path": "new", "version": 1}, expect=record.revision)
        assert moved.path == "new"
        assert moved.original_storage_path == "old"
        assert await self.row_behind(meta, "old") is None
        assert await meta.get("new") == moved
        assert await listed(meta.list()) == ["new"]
        assert await meta.owners("fs", ["old", "new"]) == {"old": ["new"]}
        await meta.create(make_record("old", original_storage_path="2"))

    async def test_update_onto_a_taken_path(self, meta: MetaBackend) -> None:
        one = await meta.create(make_record("one"))
        two = await meta.create(make_record("two"))
        with pytest.raises(AlreadyExists):
            await meta.update("one", {"path": "two", "size": 7})
        with pytest.raises(AlreadyExists):
            await meta.update("one", {"path": "two"}, expect=one.revision)
        assert [await meta.get("one"), await meta.get("two")] == [one, two]
        assert (await meta.update("one", {"path": "one", "size": 1})).size == 1

    async def test_update_refuses_unknown_fields(self, meta: MetaBackend) -> None:
        record = await meta.create(make_record("a"))
        for field in ("token", "lease", "created_at", "proxy_storage_name", "nonsense", "id"):
            with pytest.raises(ValueError, match=field):
                await meta.update("a", {"size": 1, field: "x"})
            with pytest.raises(ValueError, match=field):
                await meta.update_many([("a", {"size": 1}, None), ("a", {field: "x"}, None)])
        assert await meta.get("a") == record

    async def test_arguments_are_left_alone(self, meta: MetaBackend) -> None:
        extra = {"deep": {"list": [1]}}
        changes: dict[str, Any] = {"extra": extra, "places": (Place("s3", "k"),), "size": 1}
        await meta.create(make_record("a", extra=extra))
        await meta.update("a", changes, lease=5)
        await meta.update_many([("a", changes, None)])
        assert changes == {"extra": {"deep": {"list": [1]}}, "places": (Place("s3", "k"),), "size": 1}
        extra["deep"]["list"].append(2)  # the caller's, from now on: not the database's
        record = await meta.get("a")
        assert record.extra == {"deep": {"list": [1]}}
        record.extra["deep"]["list"].append(3)
        assert (await meta.get("a")).extra == {"deep": {"list": [1]}}

    # -- delete

    async def test_delete(self, meta: MetaBackend) -> None:
        await meta.create(make_record("a"))
        await meta.create(make_record("ab"))
        await meta.delete("a")
        assert await self.row_behind(meta, "a") is None
        assert not await meta.exists("a")
        with pytest.raises(NotFound):
            await meta.delete("a")
        assert await listed(meta.list()) == ["ab"]

    async def test_delete_compares_token_and_version(self, meta: MetaBackend) -> None:
        await meta.create(make_record("a", token="mine", version=4))
        for wrong in (Revision("other", 4), Revision("mine", 3), Revision("mine", 5), Revision("", 0)):
            with pytest.raises(Conflict):
                await meta.delete("a", expect=wrong)
        assert await meta.exists("a")
        await meta.delete("a", expect=Revision("mine", 4))
        with pytest.raises(Conflict):
            await meta.delete("a", expect=Revision("mine", 4))

    # -- extra

    async def test_extra_round_trip(self, meta: MetaBackend) -> None:
        extra: dict[str, Any] = {
            "none": None,
            "bools": [True, False],
            "integers": [0, -1, 2**53 + 1, self.extra_integer, -self.extra_integer],
            "floats": [0.5, -1e300, 1e-7],
            "text": "日本 😀 'quotes' \"double\" back\\slash {} [] %s ? :x $1 \u2028 \x7f",
            "nested": {"a": {"b": [{"c": []}, {}, ""]}},
            "clé with spaces": 1,
            "path": "shadowed",
        }
        if self.extra_keeps_nul:
            extra["nul"] = "a\0b"
        record = await meta.create(make_record("a", extra=extra))
        assert record.extra == extra
        stored = await meta.get("a")
        assert stored.extra == extra
        assert [type(value) for value in stored.extra["bools"]] == [bool, bool]
        assert stored["text"] == extra["text"]
        assert stored["path"] == "a"
        assert (await meta.update("a", {"extra": {}})).extra == {}
        assert (await meta.get("a")).extra == {}

    async def test_extra_that_cannot_be_kept(self, meta: MetaBackend) -> None:
        record = await meta.create(make_record("a"))
        with pytest.raises(NotSupported) as caught:
            await meta.create(make_record("b", extra={"x": object()}))
        assert not caught.value.outcome_unknown
        with pytest.raises(NotSupported):
            await meta.update("a", {"extra": {"x": object()}, "size": 3})
        assert await meta.get("a") == record
        assert await listed(meta.list()) == ["a"]
