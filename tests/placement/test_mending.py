"""Replicate and reconcile: copies made and taken away later, with originals that are away, damaged, changed."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest

from aproxy_storage import (
    AccessDenied,
    BackendUnavailable,
    Breaker,
    DeadlineExceeded,
    IntegrityError,
    MetaRecord,
    OutOfSpace,
    Place,
    ProxyStorage,
    Replicate,
)
from aproxy_storage.backends.filesystem import FileSystemBackend
from aproxy_storage.mending import mend
from aproxy_storage.meta_backends.sqlite import SQLiteMetaBackend
from aproxy_storage.testing.faults import Fail, Late, Lie, at
from aproxy_storage.tools.reconcile import reconcile
from tests.placement.support import Meanwhile, World, content_of, copies, run

DOWN = Fail(BackendUnavailable("out of order"))


def test_reconcile_makes_a_copy_that_was_lost_and_names_it() -> None:
    async def main() -> None:
        async with World(Replicate(2), "abc") as world:
            await world.storage.save("x", b"1")
            await world.inner["a"].discard("x")
            dry = await reconcile(world.storage)
            assert dry.counts == {"missing": 1, "copied": 1}
            assert await copies(world, "x") == ["a", "b"], "a dry run changes nothing"
            report = await world.reconcile(force=False)
            assert report.counts == {"missing": 1, "copied": 1}
            assert await copies(world, "x") == ["b", "a"]
            assert len(await world.keys("a")) == 1
            await world.assert_clean()
            world.plan["b"].set(read=DOWN)
            assert await content_of(world.storage, "x") == b"1"

    run(main())


def test_reconcile_makes_no_copy_of_a_damaged_one() -> None:
    """The source is compared with the recorded checksum before the new copy counts."""

    async def main() -> None:
        async with World(Replicate(3, quorum=1), "abc") as world:
            world.plan["c"].set(write=DOWN)
            await world.storage.save("x", b"good")
            await world.inner["a"].discard("x")
            await world.inner["a"].write("x", b"evil")
            world.heal()
            report = await world.reconcile(force=False)
            assert report.counts == {"damaged": 1, "copied": 1}
            assert not report.clean
            key = next(place.key for place in (await world.storage.get("x")).good_places() if place.original == "c")
            async with world.inner["c"].read(key) as reading:
                assert reading.data == b"good"
            assert len(await world.keys("c")) == 1

    run(main())


def test_reconcile_without_a_whole_copy_throws_nothing_away() -> None:
    async def main() -> None:
        async with World(Replicate(2), "ab") as world:
            world.plan["b"].set(write=DOWN)
            await world.storage.save("x", b"good")
            await world.inner["a"].discard("x")
            await world.inner["a"].write("x", b"evil")
            world.heal()
            report = await world.reconcile(force=False)
            assert report.counts == {"damaged": 1, "failed": 1}
            assert (await world.keys("a"), await world.keys("b")) == (["x"], [])
            await world.inner["a"].discard("x")
            assert (await world.reconcile(force=False)).counts == {"missing": 1, "lost": 1}
            assert await copies(world, "x") == ["a"], "the record still says where it was"

    run(main())


@pytest.mark.parametrize("dry_run", [True, False])
@pytest.mark.parametrize("how", ["gone", "cut"])
def test_reconcile_says_that_a_file_is_lost(how: str, dry_run: bool) -> None:
    async def main() -> None:
        async with World(Replicate(2)) as world:
            await world.storage.save("x", b"1")
            await world.storage.save("y", b"22")
            for name in "ab":
                await world.inner[name].discard("y")
                if how == "cut":
                    await world.inner[name].write("y", b"2")
            report = await reconcile(world.storage, dry_run=dry_run)
            assert report.counts == {"missing" if how == "gone" else "damaged": 2, "lost": 1}
            assert not report.clean
            (lost,) = [finding for finding in report.findings if finding.action == "lost"]
            assert lost.path == "y"
            assert isinstance(lost.error, IntegrityError)
            world.plan["b"].set(stat=DOWN)
            report = await reconcile(world.storage, dry_run=dry_run)
            assert "lost" not in report.counts, "the copy that is out of reach may be there"

    run(main())


@pytest.mark.parametrize("dry_run", [True, False])
@pytest.mark.parametrize("lost", ["a", "ab"])
@pytest.mark.parametrize("what", ["deleted", "replaced", "saved anew"])
def test_reconcile_misses_nothing_of_a_file_that_was_changed_meanwhile(what: str, lost: str, dry_run: bool) -> None:
    async def main() -> None:
        async with World(Replicate(2), keep_replaced=0.0) as world:
            await world.storage.save("x", b"1")
            record = await world.storage.get("x")
            if what == "replaced":
                await world.storage.replace("x", b"2")
            else:
                await world.storage.delete("x")
            if lost == "a":  # it has been looked at before the other copy was removed
                await world.inner["b"].write("x", b"1")
            elif what == "saved anew":
                await world.storage.save("x", b"2")
                for name in "ab":
                    await world.inner[name].discard("x")
            assert [each.action for each in await mend(world.storage, record, dry_run=dry_run)] == ["moved on"]

    run(main())


def test_reconcile_that_cannot_ask_whether_a_file_is_still_there_goes_on() -> None:
    async def main() -> None:
        async with World(Replicate(2)) as world:
            for name in "xy":
                await world.storage.save(name, b"1")
                await world.inner["a"].discard(name)
            world.meta_plan.set(get=at(1, DOWN))
            report = await world.reconcile(force=False)
            assert report.counts == {"failed": 1, "missing": 1, "copied": 1}

    run(main())


def test_reconcile_removes_surplus_copies_after_they_were_kept() -> None:
    async def main() -> None:
        async with World(Replicate(3), "abc") as world:
            await world.storage.save("x", b"1")
            world.storage.placement = Replicate(2, order=["b", "c", "a"])
            report = await world.reconcile(force=False)
            assert report.counts == {"dropped": 1}
            assert await copies(world, "x") == ["a", "b"], "the primary one stays, then the nearest"
            assert [len(await world.keys(name)) for name in "abc"] == [1, 1, 1], "kept for those who read it"
            await world.assert_clean()
            assert [len(await world.keys(name)) for name in "abc"] == [1, 1, 0]
            world.storage.placement = Replicate(2, order=["b", "c"])
            await world.assert_clean()
            assert sorted(await copies(world, "x")) == ["b", "c"], "copies leave an original that is not in the order"

    run(main())


def test_a_record_without_the_name_of_an_original_has_its_bytes_in_the_first() -> None:
    """As in the tables of django-proxy-storage."""

    async def main() -> None:
        async with World(Replicate(2, order=["a", "b", "c"]), "abc", keep_replaced=0.0) as world:
            await world.inner["a"].write("x", b"1")
            await world.meta.create(MetaRecord("x", "media", "", "x"))
            assert (await world.storage.move("x", "a")).primary == Place("", "x"), "it is there"
            assert (await world.reconcile(force=False)).counts == {"copied": 1}
            assert await copies(world, "x") == ["", "b"]
            assert (await world.storage.get("x")).original_storage_path == "x"
            assert (await world.reconcile()).counts == {}
            record = MetaRecord("y", "media", "b", "y", places=(Place("", "y"),))
            assert world.storage._preferred(record) == Place("", "y"), "the nearest"
            world.storage.placement = Replicate(2, order=["b", "c"])
            await world.inner["a"].discard("x")
            report = await world.reconcile(force=False)
            assert [(each.action, each.original) for each in report.findings] == [("missing", "a"), ("copied", "c")]
            assert await copies(world, "x") == ["b", "c"]

    run(main())


def test_reconcile_makes_nothing_in_the_stead_of_a_copy_that_is_out_of_reach() -> None:
    async def main() -> None:
        async with World(Replicate(2), "abc") as world:
            await world.storage.save("x", b"1")
            world.plan["a"].set(stat=DOWN)
            report = await world.reconcile(force=False)
            assert report.counts == {"failed": 1}
            assert await copies(world, "x") == ["a", "b"]
            assert await world.keys("c") == []

    run(main())


def test_reconcile_copies_only_from_what_it_sees() -> None:
    """What is out of reach is no source; one that cannot be read after all leaves the next one."""

    async def main() -> None:
        async with World(Replicate(4, quorum=1, breaker=None), "abcd") as world:
            await world.storage.save("x", b"1")
            await world.inner["d"].discard("x")
            world.plan["a"].set(stat=DOWN, read=DOWN)
            world.plan["b"].set(read=DOWN)
            report = await world.reconcile(force=False)
            assert report.counts == {"missing": 1, "failed": 2, "copied": 1}
            assert [each.original for each in report.findings] == ["a", "d", "b", "d"]
            assert await copies(world, "x") == ["a", "b", "c", "d"]
            await world.inner["d"].discard((await world.keys("d"))[0])
            world.plan["c"].set(read=DOWN)
            assert "copied" not in (await world.reconcile(force=False)).counts
            assert await copies(world, "x") == ["a", "b", "c"]
            await world.assert_clean()
            assert await copies(world, "x") == ["a", "b", "c", "d"]

    run(main())


@pytest.mark.parametrize("how", ["gone", "cut"])
def test_reconcile_gives_nothing_up_for_a_copy_that_it_does_not_see(how: str) -> None:
    async def main() -> None:
        async with World(Replicate(2, breaker=None)) as world:
            await world.storage.save("x", b"whole")
            await world.inner["b"].discard("x")
            if how == "cut":
                await world.inner["b"].write("x", b"who")
            world.plan["a"].set(stat=DOWN, read=DOWN)
            for _ in range(3):
                report = await world.reconcile()
                assert report.counts == {"failed": 1, "missing" if how == "gone" else "damaged": 1}
            assert await copies(world, "x") == ["a", "b"]
            assert await world.keys("b") == ([] if how == "gone" else ["x"]), "the last bytes within reach"
            world.heal()
            assert (await world.reconcile()).counts["copied"] == 1
            assert await content_of(world.storage, "x") == b"whole"

    run(main())


@pytest.mark.parametrize("circuit", [None, Breaker(failures=1, reset_after=60)], ids=["asked", "circuit"])
def test_reconcile_goes_past_an_original_that_is_away(circuit: Breaker | None) -> None:
    async def main() -> None:
        async with World(Replicate(2, breaker=circuit), "abc") as world:
            away = dict.fromkeys(("write", "stat", "read", "discard"), DOWN)
            world.plan["b"].set(**away)
            await world.storage.save("x", b"1")
            world.plan["c"].set(**away)
            for _ in range(4):
                report = await world.reconcile(force=False)
                assert report.counts["failed"] >= 2
                record = await world.storage.get("x")
                assert len(record.places) <= 2, "a run adds no name for an original that is still away"
            world.plan["c"].faults.clear()
            await asyncio.sleep(60)
            assert (await world.reconcile(force=False)).counts["copied"] == 1
            assert await copies(world, "x") == ["a", "c"]
            await asyncio.sleep(60)
            await world.assert_clean()
            assert await copies(world, "x") == ["a", "c"]

    run(main())


@pytest.mark.parametrize("force", [False, True])
def test_reconcile_adds_no_names_without_end_for_an_original_that_refuses(force: bool) -> None:
    async def main() -> None:
        async with World(Replicate(2, 1), "abc") as world:
            await world.storage.save("x", b"1")
            await world.inner["b"].discard("x")
            denied = Fail(AccessDenied("403"))
            world.plan["b"].set(write=denied, discard=denied)
            world.plan["c"].set(write=denied, discard=denied)
            counts = []
            for _ in range(8):
                report = await world.reconcile(force=force)
                assert report.counts["failed"] >= 2
                counts.append(len((await world.storage.get("x")).places))
            assert counts[-1] == counts[2] <= 6
            denied_in_c = [each for each in report.findings if each.original == "c"]
            assert "let this storage remove" in str(denied_in_c[0].error)
            world.plan["c"].set(write=None, discard=None)
            await world.reconcile()  # removes what is left
            assert await copies(world, "x") == ["a", "c"]
            await world.assert_clean()

    run(main())


@pytest.mark.parametrize("left", [False, True], ids=["look", "ask"])
def test_reconcile_waits_for_a_hanging_original_no_longer_than_its_circuit_is_closed(left: bool) -> None:
    """Asked is one that has a good copy, and one that has something left to remove."""

    async def main() -> None:
        async with World(Replicate(2, 1, breaker=Breaker(failures=2, reset_after=60))) as world:
            if left:
                world.plan["b"].set(write=DOWN)
            for name in "uvwxyz":
                await world.storage.save(name, b"1")
                if left:
                    await world.meta.update(name, {"places": (Place("b", f"{name}_token", "settling"),)})
            await asyncio.sleep(60)
            asked = 0

            async def hang() -> None:
                nonlocal asked
                asked += 1
                await asyncio.sleep(30)
                raise DeadlineExceeded("no answer")

            world.plan["b"].set(stat=Meanwhile(hang), write=None)
            started = asyncio.get_running_loop().time()
            for wanted in (2, 3):
                report = await world.reconcile(force=False)
                assert report.counts == {"failed": 6}
                assert asked == wanted
                await asyncio.sleep(60)
            assert asyncio.get_running_loop().time() - started < 3 * 30 + 2 * 60 + 1
            world.heal()
            assert (await world.reconcile(force=False)).counts == ({"copied": 6} if left else {})

    run(main())


def test_reconcile_leaves_a_file_that_was_replaced_while_a_copy_of_it_failed() -> None:
    async def main() -> None:
        async with World(Replicate(3, quorum=1, breaker=None), "abcd", keep_replaced=0.0) as world:
            world.plan["c"].set(write=DOWN)
            await world.storage.save("x", b"old")

            async def change() -> None:
                world.heal()
                await world.storage.replace("x", b"new")
                raise BackendUnavailable("out of order")

            world.plan["c"].set(write=Meanwhile(change))
            report = await world.reconcile(force=False)
            assert report.counts == {"moved on": 1}
            assert await content_of(world.storage, "x") == b"new"
            await world.assert_clean()

    run(main())


@pytest.mark.parametrize("fault", [DOWN, Lie(), Late(), Fail(OutOfSpace("full"))], ids=["down", "lie", "late", "full"])
def test_a_copy_that_reconcile_cannot_make_leaves_nothing(fault: Any) -> None:
    async def main() -> None:
        async with World(Replicate(2), "ab") as world:
            world.plan["b"].set(write=DOWN)
            await world.storage.save("x", b"1")
            world.plan["b"].set(write=fault)
            report = await world.reconcile(force=False)
            assert report.counts == {"failed": 1}
            assert await content_of(world.storage, "x") == b"1"
            if isinstance(fault, Late):
                await fault.land()
            await world.assert_clean()
            assert await copies(world, "x") == ["a", "b"]

    run(main())


@pytest.mark.parametrize("what", ["replace", "delete", "rename"])
def test_a_file_that_is_changed_while_reconcile_copies_it(what: str) -> None:
    async def main() -> None:
        async with World(Replicate(2), "ab", keep_replaced=0.0) as world:
            world.plan["b"].set(write=DOWN)
            await world.storage.save("x", b"old")
            world.plan["b"].set(write=Meanwhile(lambda: change(world)))

            async def change(world: World) -> None:
                world.plan["b"].set(write=None)
                if what == "replace":
                    await world.storage.replace("x", b"new")
                elif what == "delete":
                    await world.storage.delete("x")
                else:
                    await world.storage.rename("x", "y")

            await world.reconcile(force=False)
            await world.assert_clean()
            files = {record.path async for record in world.storage.list()}
            assert files == {"replace": {"x"}, "delete": set(), "rename": {"y"}}[what]
            for path in files:
                assert await content_of(world.storage, path) == (b"new" if what == "replace" else b"old")
                assert len(await copies(world, path)) == 2

    run(main())


@pytest.mark.asyncio
async def test_two_directories_one_of_which_is_wiped(tmp_path: Path) -> None:
    """rm -rf of one root, the directory made anew, and reconcile: every file has its two copies again."""
    import shutil

    storage = ProxyStorage(
        "media",
        originals={name: FileSystemBackend(tmp_path / name) for name in "ab"},
        meta=SQLiteMetaBackend(tmp_path / "meta.sqlite3"),
        placement=Replicate(2),
    )
    async with storage:
        for number in range(5):
            await storage.save(f"d/{number}", b"%d" % number * (1 + 300_000 * (number % 2)))
        shutil.rmtree(tmp_path / "a")
        for number in range(5):
            assert await content_of(storage, f"d/{number}") == b"%d" % number * (1 + 300_000 * (number % 2))
        path = await storage.save("meanwhile", b"one copy")
        assert [place.original for place in (await storage.get(path)).good_places()] == ["b"]
        (tmp_path / "a").mkdir()
        await storage.get_original("a").aclose()  # it takes the new directory for its root from here on
        for gate in storage.gates.values():
            gate._fresh()
        report = await reconcile(storage, dry_run=False, force=True)
        assert report.counts["copied"] == 6
        await reconcile(storage, dry_run=False, force=True)
        async for record in storage.list():
            assert sorted(place.original for place in record.all_places()) == ["a", "b"]
            assert record.lease is None
        assert len([path for path in (tmp_path / "a").rglob("*") if path.is_file()]) == 6
