"""The promises of `list`, `count`, `list_unfinished` and `owners`, and of the leases that tell the unfinished."""

from __future__ import annotations

import pytest

from ..meta_backends.base import UNCHANGED, MetaBackend
from ..records import DELETING, PENDING, STORED, CommonPrefix, Place
from ._meta_hooks import AWKWARD, MetaBackendHooks, listed, make_record

__all__ = ["LeaseTests", "ListTests", "OwnerTests"]


@pytest.mark.asyncio
class LeaseTests(MetaBackendHooks):
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


@pytest.mark.asyncio
class ListTests(MetaBackendHooks):
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
        assert await listed(meta.list("é", after="d/", delimiter="/")) == ["é/"]
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
                if len(got) >= limit + 5:
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


@pytest.mark.asyncio
class OwnerTests(MetaBackendHooks):
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
