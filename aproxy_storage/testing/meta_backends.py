"""The conformance suite of meta-backends: subclass `MetaBackendTests`, and it is yours.

::

    class TestMine(MetaBackendTests):
        @pytest_asyncio.fixture
        async def meta(self):
            async with MyMetaBackend(...) as meta:      # empty
                yield meta

        async def row_behind(self, meta, path): ...     # with the database's own means, not through `meta`

Needs pytest and pytest-asyncio. The hooks look and act behind the meta-backend's back, so that an error which it
makes both ways cannot hide.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Callable, Coroutine, Mapping, Sequence
from dataclasses import replace
from datetime import UTC, datetime
from typing import Any

import pytest

from ..errors import AlreadyExists, Conflict, InvalidPath, NotFound, NotSupported, StorageError
from ..meta_backends.base import UNCHANGED, MetaBackend
from ..paths import new_token
from ..records import DELETING, PENDING, STORED, CommonPrefix, MetaRecord, Place, Revision

__all__ = ["MetaBackendTests", "make_record"]

# What a locale, UTF-16 or a regular expression would sort or match otherwise.
_AWKWARD = [
    " lead",
    "!",
    "%",
    "%25",
    "A",
    "Z/z",
    "[a-z]",
    "_",
    "a",
    "a b",
    "a!",
    "a$",
    "a'b\"c;--",
    "a*",
    "a/",
    "a/b",
    "a0",
    "aa",
    "ab",
    "a_",
    "a{2}",
    "e\u0301",
    "~",
    "é",
    "日本/写真.jpg",
    "日本語",
    "\ud7ff",
    "\ue000",
    "\uffff",
    "\U00010000",
    "😀/a",
    "\U0010ffff",
]
AWKWARD = sorted(_AWKWARD, key=str.encode)


def make_record(path: str, **fields: Any) -> MetaRecord:
    """Return a stored record of the storage ``media`` whose bytes are in ``fs`` under its path."""
    defaults: dict[str, Any] = {
        "proxy_storage_name": "media",
        "original_storage_name": "fs",
        "original_storage_path": path,
        "token": new_token(),
    }
    return MetaRecord(path, **(defaults | fields))


def make_reservation(path: str, **fields: Any) -> tuple[MetaRecord, MetaRecord]:
    """Return the pending record of a save to `path`, and its spare with a key that nobody can have."""
    record = make_record(path, state=PENDING, **fields)
    return record, replace(record, original_storage_path=f"{path}_{record.token}", places=())


async def listed(items: AsyncIterator[MetaRecord | CommonPrefix]) -> list[str]:
    """Return the paths of a listing."""
    return [item.path async for item in items]


def others(function: Callable[[], Coroutine[Any, Any, Any]], *, count: int) -> list[Any]:
    """Run ``function()`` in `count` threads with an event loop each, at once; return the results."""
    results: list[Any] = []

    def run() -> None:
        try:
            results.append(asyncio.run(function()))
        except BaseException as error:
            results.append(error)

    threads = [threading.Thread(target=run) for _ in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for result in results:
        if isinstance(result, BaseException):
            raise result
    return results


@pytest.mark.asyncio
class MetaBackendTests:
    """Every promise of `MetaBackend`, one test each. The fixture ``meta`` gives an empty, ready meta-backend."""

    #: The widest integer that `extra` keeps exactly, and whether a NUL survives in its texts.
    extra_integer: int = 2**63 - 1
    extra_keeps_nul: bool = True

    # -- hooks

    async def row_behind(self, meta: Any, path: str) -> Mapping[str, Any] | None:
        """Return what the database holds for `path`, by column, read without `meta`."""
        raise NotImplementedError

    async def rows_behind(self, meta: Any) -> Sequence[Mapping[str, Any]]:
        """Return everything the database holds, read without `meta`."""
        raise NotImplementedError

    async def insert_behind(self, meta: Any, **columns: Any) -> None:
        """Put in a row with these columns only, as a program that knows no state, token and version would."""
        raise NotImplementedError

    async def expire_lease_behind(self, meta: Any, path: str, *, ago: float = 1.0) -> None:
        """Let the lease of `path` have run out `ago` seconds ago, by the database's clock."""
        raise NotImplementedError

    # -- create

    async def test_create_returns_what_get_returns(self, meta: MetaBackend) -> None:
        made = datetime(2024, 2, 29, 12, 30, 15, 123457, tzinfo=UTC)
        record = make_record(
            "a/日本.txt",
            state=PENDING,
            version=3,
            places=(Place("s3", "k/日本", "doubtful"), Place("fs", "old", "surplus")),
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

    # -- leases

    async def test_leases(self, meta: MetaBackend) -> None:
        record = await meta.create(make_record("a", state=PENDING), lease=600.0)
        assert record.created_at is not None
        assert record.lease is not None
        assert abs((record.lease - record.created_at).total_seconds() - 600) < 2
        assert (await meta.update("a", {"size": 1})).lease == record.lease
        assert (await meta.update("a", {"size": 2}, lease=UNCHANGED)).lease == record.lease
        later = await meta.update("a", {}, lease=6000.0)
        assert later.lease is not None
        assert later.lease > record.lease
        assert (await meta.get("a")).lease == later.lease
        assert (await meta.update("a", {"state": STORED}, lease=None)).lease is None
        assert (await meta.get("a")).lease is None
        assert (await meta.create(make_record("b"))).lease is None

    async def test_unfinished_are_those_whose_lease_is_over(self, meta: MetaBackend) -> None:
        for path, state, lease in [
            ("a-live", PENDING, 600.0),
            ("b-over", PENDING, 600.0),
            ("c-none", DELETING, None),
            ("d-none", PENDING, None),
            ("e-done", STORED, None),
            ("f-surplus", STORED, 600.0),
            ("g-surplus-over", STORED, 600.0),
        ]:
            await meta.create(make_record(path, state=state), lease=lease)
        await self.expire_lease_behind(meta, "b-over")
        await self.expire_lease_behind(meta, "g-surplus-over")
        assert [r.path for r in await meta.list_unfinished()] == ["b-over", "c-none", "d-none", "g-surplus-over"]
        forced = [r.path for r in await meta.list_unfinished(force=True)]
        assert forced == ["a-live", "b-over", "c-none", "d-none", "f-surplus", "g-surplus-over"]
        await meta.update("b-over", {}, lease=600.0)
        await meta.update("c-none", {"state": STORED})
        await meta.delete("d-none")
        assert [r.path for r in await meta.list_unfinished()] == ["g-surplus-over"]

    async def test_unfinished_for_some_time(self, meta: MetaBackend) -> None:
        await meta.create(make_record("fresh", state=PENDING), lease=600.0)
        await meta.create(make_record("long", state=PENDING), lease=600.0)
        await self.expire_lease_behind(meta, "fresh", ago=5.0)
        await self.expire_lease_behind(meta, "long", ago=7200.0)
        assert [r.path for r in await meta.list_unfinished(older_than=3600.0)] == ["long"]
        assert [r.path for r in await meta.list_unfinished()] == ["fresh", "long"]

    async def test_unfinished_by_storage_and_in_pages(self, meta: MetaBackend) -> None:
        for number in range(20):
            await meta.create(make_record(f"{number:02}", state=PENDING, proxy_storage_name=f"s{number % 2}"))
        page = await meta.list_unfinished(proxy_storage_name="s1", limit=4)
        assert [r.path for r in page] == ["01", "03", "05", "07"]
        for record in page:
            await meta.delete(record.path)
        page = await meta.list_unfinished(proxy_storage_name="s1", limit=4, after=(page[-1].path,))
        assert [r.path for r in page] == ["09", "11", "13", "15"]
        page = await meta.list_unfinished(proxy_storage_name="s1", limit=4, after=(page[-1].path,))
        assert [r.path for r in page] == ["17", "19"]
        assert await meta.list_unfinished(after=("19",)) == []

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

    # -- many

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

    # -- listings

    async def test_list_is_in_byte_order(self, meta: MetaBackend) -> None:
        await meta.create_many([make_record(path) for path in reversed(AWKWARD)])
        assert await listed(meta.list()) == AWKWARD
        for at, path in enumerate(AWKWARD):
            assert await listed(meta.list(after=path, limit=3)) == AWKWARD[at + 1 : at + 4], path

    async def test_list_by_prefix_takes_it_literally(self, meta: MetaBackend) -> None:
        await meta.create_many([make_record(path) for path in AWKWARD])
        for prefix in ("", *"a%_[.^日é\ud7ff\U0010ffff", "a_", "a%", "a/", "a*", "a{"):
            expected = [path for path in AWKWARD if path.startswith(prefix)]
            assert await listed(meta.list(prefix)) == expected, prefix
            assert await meta.count(prefix) == len(expected), prefix

    async def test_list_after(self, meta: MetaBackend) -> None:
        await meta.create_many([make_record(path) for path in ("a/1", "a/2", "a/3", "b/1")])
        assert await listed(meta.list("a/", after="a/1")) == ["a/2", "a/3"]
        assert await listed(meta.list("a/", after="a/15")) == ["a/2", "a/3"]
        assert await listed(meta.list("a/", after="A")) == ["a/1", "a/2", "a/3"]
        assert await listed(meta.list("a/", after="a/3")) == []
        assert await listed(meta.list("a/", after="b")) == []

    async def test_list_limit(self, meta: MetaBackend) -> None:
        await meta.create_many([make_record(f"{number:04}") for number in range(1007)])
        everything = [f"{number:04}" for number in range(1007)]
        for limit in (0, 1, 2, 499, 500, 501, 1000, 1006, 1007, 1008, None):
            assert await listed(meta.list(limit=limit)) == everything[:limit], limit

    async def test_list_filters(self, meta: MetaBackend) -> None:
        await meta.create_many(
            [
                make_record(f"{number:04}", proxy_storage_name=f"s{number % 3}", state=(PENDING, STORED)[number % 2])
                for number in range(1800)
            ]
        )
        wanted = [f"{number:04}" for number in range(1800) if number % 3 == 1 and number % 2]
        assert await listed(meta.list(proxy_storage_name="s1", state=STORED)) == wanted
        assert await listed(meta.list("0", proxy_storage_name="s1", state=STORED, limit=7, after="0007")) == wanted[2:9]
        assert await meta.count(proxy_storage_name="s1", state=STORED) == len(wanted)
        assert await meta.count("00", proxy_storage_name="s1", state=STORED) == sum(p < "01" for p in wanted)
        assert await meta.count(state=DELETING) == 0
        assert await meta.count(proxy_storage_name="") == 0

    async def test_list_returns_whole_records(self, meta: MetaBackend) -> None:
        record = await meta.create(make_record("a", extra={"x": [1]}, places=(Place("s3", "k"),)), lease=60)
        assert [item async for item in meta.list()] == [record]
        assert list(await meta.list_unfinished(force=True)) == [record]

    async def test_list_with_a_delimiter(self, meta: MetaBackend) -> None:
        paths = ["a.txt", "d/1", "d/2", "d/e/3", "d0", "d/", "é/1", "é/2", "z//1"]
        await meta.create_many([make_record(path) for path in paths])
        assert await listed(meta.list(delimiter="/")) == ["a.txt", "d/", "d0", "z/", "é/"]
        assert await listed(meta.list("d/", delimiter="/")) == ["d/", "d/1", "d/2", "d/e/"]
        assert await listed(meta.list("z/", delimiter="/")) == ["z//"]
        assert await listed(meta.list("d", delimiter="/")) == ["d/", "d0"]
        kinds = [isinstance(item, CommonPrefix) async for item in meta.list(delimiter="/")]
        assert kinds == [False, True, False, True, True]

    async def test_list_pages_with_a_delimiter(self, meta: MetaBackend) -> None:
        paths = [f"d{d:02}/{f:04}" for d in range(3) for f in range(620)] + [f"f{f:04}" for f in range(530)]
        await meta.create_many([make_record(path) for path in paths])
        whole = ["d00/", "d01/", "d02/", *(f"f{f:04}" for f in range(530))]
        assert await listed(meta.list(delimiter="/")) == whole
        for limit in (1, 2, 3, 4, 100):
            got: list[str] = []
            while page := await listed(meta.list(delimiter="/", after=got[-1] if got else None, limit=limit)):
                got += page
                if len(got) >= 105:
                    break
            assert got == whole[: len(got)], limit
        assert await listed(meta.list("d01/", delimiter="/", limit=502)) == [f"d01/{f:04}" for f in range(502)]

    async def test_list_while_records_come_and_go(self, meta: MetaBackend) -> None:
        await meta.create_many([make_record(f"{number:05}") for number in range(0, 3000, 2)])
        seen: list[str] = []
        async for record in meta.list():
            number = int(record.path)
            if number % 600 == 0:
                await meta.create(make_record(f"{number + 1001:05}"))  # ahead: may be seen
                if number:
                    await meta.create(make_record(f"{number - 1:05}"))  # behind: must not disturb
                await meta.delete(record.path)
            seen.append(record.path)
        assert seen == sorted(set(seen))
        assert {f"{number:05}" for number in range(0, 3000, 2)} <= set(seen)

    # -- owners

    async def test_owners_by_the_primary_place(self, meta: MetaBackend) -> None:
        await meta.create(make_record("a", original_storage_path="k1"))
        await meta.create(make_record("b", original_storage_path="k2", state=PENDING), lease=60)
        await meta.create(make_record("c", original_storage_path="k2", state=DELETING, proxy_storage_name="other"))
        await meta.create(make_record("d", original_storage_path="k1", original_storage_name="s3"))
        await meta.create(make_record("k3"))
        found = await meta.owners("fs", iter(["k1", "k2", "k3", "none", "k1", "%", ""]))
        assert {key: sorted(paths) for key, paths in found.items()} == {"k1": ["a"], "k2": ["b", "c"], "k3": ["k3"]}
        assert await meta.owners("s3", ["k1", "k2"]) == {"k1": ["d"]}
        assert await meta.owners("no", ["k1"]) == {}
        assert await meta.owners("fs", []) == {}

    async def test_owners_by_further_places(self, meta: MetaBackend) -> None:
        places = (Place("s3", "日本/k'1"), Place("fs", "k2", "doubtful"), Place("fs", "a", "surplus"))
        await meta.create(make_record("a", places=places))
        await meta.create(make_record("b", places=(Place("fs", "k2", "surplus"),), state=DELETING))
        assert await meta.owners("s3", ["日本/k'1", "k2", "a"]) == {"日本/k'1": ["a"]}
        found = await meta.owners("fs", ["k2", "a", "b"])
        assert {key: sorted(paths) for key, paths in found.items()} == {"k2": ["a", "b"], "a": ["a"], "b": ["b"]}

    async def test_owners_follow_changes(self, meta: MetaBackend) -> None:
        await meta.create(make_record("a", places=(Place("s3", "one"), Place("s3", "two"))))
        await meta.update("a", {"places": (Place("s3", "two"), Place("s3", "three"))})
        keys = ["one", "two", "three"]
        assert await meta.owners("s3", keys) == {"two": ["a"], "three": ["a"]}
        await meta.update("a", {"path": "b"})
        assert await meta.owners("s3", keys) == {"two": ["b"], "three": ["b"]}
        await meta.update("b", {"path": "c", "places": (Place("s3", "one"),), "original_storage_path": "moved"})
        assert await meta.owners("s3", keys) == {"one": ["c"]}
        assert await meta.owners("fs", ["a", "moved"]) == {"moved": ["c"]}
        await meta.update("c", {"places": ()})
        assert await meta.owners("s3", keys) == {}
        await meta.update("c", {"places": (Place("s3", "one"),)})
        await meta.delete("c")
        assert await meta.owners("s3", keys) == {}
        assert await meta.owners("fs", ["moved"]) == {}

    async def test_owners_of_many_keys(self, meta: MetaBackend) -> None:
        records = [make_record(f"{n:05}", original_storage_path=f"k{n:05}") for n in range(1100)]
        await meta.create_many(records)
        found = await meta.owners("fs", [f"k{n:05}" for n in range(1300)])
        assert found == {f"k{n:05}": [f"{n:05}"] for n in range(1100)}

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

    # -- life

    async def test_after_commit_runs_at_once(self, meta: MetaBackend) -> None:
        ran: list[int] = []

        async def callback() -> None:
            ran.append(1)

        await meta.after_commit(callback)
        assert ran == [1]

    async def test_setup_again(self, meta: MetaBackend) -> None:
        record = await meta.create(make_record("a"))
        await asyncio.gather(*(meta.setup() for _ in range(8)))
        others(meta.setup, count=4)
        assert await meta.get("a") == record

    async def test_aclose_twice_and_use_after_it(self, meta: MetaBackend) -> None:
        await meta.aclose()
        await meta.aclose()
        record = await meta.create(make_record("a"))
        await meta.aclose()
        assert await meta.get("a") == record
        await asyncio.gather(meta.aclose(), meta.get("a"), meta.aclose())
        assert await meta.get("a") == record

    async def test_several_loops_and_threads(self, meta: MetaBackend) -> None:
        async def work() -> int:
            won = 0
            for answer in await asyncio.gather(
                *(meta.create(make_record(f"{number:03}")) for number in range(50)), return_exceptions=True
            ):
                assert isinstance(answer, MetaRecord | AlreadyExists), repr(answer)
                won += isinstance(answer, MetaRecord)
            assert await meta.count() == 50
            await meta.aclose()
            return won

        results = await asyncio.to_thread(others, work, count=4)
        assert sum(results) == 50
        assert await meta.count() == 50

    async def test_one_loop_after_another(self, meta: MetaBackend) -> None:
        def rounds() -> None:
            for number in range(10):
                asyncio.run(self._one_round(meta, number))

        await asyncio.to_thread(rounds)
        assert await meta.count() == 10

    @staticmethod
    async def _one_round(meta: MetaBackend, number: int) -> None:
        await meta.create(make_record(str(number)))
        assert await meta.count() == number + 1
        if number % 2:  # a loop that ends without aclose must not hurt the next one
            await meta.aclose()

    async def test_cancelled_calls_leave_it_usable(self, meta: MetaBackend) -> None:
        await meta.create_many([make_record(f"old/{number}") for number in range(64)])
        works: list[Callable[[int], Coroutine[Any, Any, Any]]] = [
            lambda n: meta.create(make_record(f"new/{n}")),
            lambda n: meta.update(f"old/{n}", {"size": n, "version": 1}),
            lambda n: meta.get(f"old/{n}"),
            lambda n: meta.create_many([make_record(f"many/{n}/{m}") for m in range(20)]),
            lambda n: listed(meta.list("old/")),
            lambda n: meta.delete(f"old/{n + 32}"),
        ]
        loop = asyncio.get_running_loop()
        for number, work in ((n, work) for work in works for n in range(10)):
            task = loop.create_task(work(number))
            for _ in range(number % 5):  # at another await point each time
                await asyncio.sleep(0)
            if number > 5:
                await asyncio.sleep(0.0005 * number)
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)
        for record in [record async for record in meta.list()]:
            if record.path.startswith("old/") and record.version:  # whole or not at all
                assert record.size == int(record.path[4:])
        await meta.create(make_record("after"))
        assert await meta.exists("after")
        assert await listed(meta.list()) == sorted(row["path"] for row in await self.rows_behind(meta))

    async def test_errors_say_what_where_and_by_whom(self, meta: MetaBackend) -> None:
        await meta.create(make_record("a"))
        failures: list[tuple[str, Callable[[], Coroutine[Any, Any, Any]]]] = [
            ("create", lambda: meta.create(make_record("a"))),
            ("get", lambda: meta.get("no")),
            ("update", lambda: meta.update("no", {})),
            ("delete", lambda: meta.delete("no")),
            ("update", lambda: meta.update("a", {}, expect=Revision("x", 1))),
        ]
        for operation, work in failures:
            with pytest.raises(StorageError) as caught:
                await work()
            assert caught.value.operation == operation
            assert caught.value.path in ("a", "no")
            assert repr(caught.value.path) in str(caught.value)
