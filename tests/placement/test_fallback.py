"""Fallback in turn: the predecessor's cases, each of its faults as a case that is none here, and what comes on top.

django-proxy-storage's functional tests of its fallback and of several originals are here in asynchronous form.
"""

from __future__ import annotations

import asyncio
import io
import logging
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest

from aproxy_storage import (
    AccessDenied,
    AlreadyExists,
    Backend,
    BackendUnavailable,
    Breaker,
    ConfigurationError,
    ContentError,
    DeadlineExceeded,
    Fallback,
    NotFound,
    Original,
    OutOfSpace,
    ProxyStorage,
)
from aproxy_storage.backends.filesystem import FileSystemBackend
from aproxy_storage.backends.memory import MemoryBackend
from aproxy_storage.meta_backends.memory import MemoryMetaBackend
from aproxy_storage.meta_backends.sqlite import SQLiteMetaBackend
from aproxy_storage.testing.faults import Fail, Fault, Hang, Late, Lie, Slow, at
from tests.placement.support import World, content_of, once, run

DOWN = Fail(BackendUnavailable("out of order"))


# -- the predecessor's cases


def test_the_first_original_is_used_by_default_and_using_forces_another() -> None:
    async def main() -> None:
        async with World(Fallback()) as world:
            assert await world.where(await world.storage.save("x", b"1")) == "a"
            assert await world.where(await world.storage.save("x", b"2", using="b")) == "b"
            assert await world.where(await world.storage.save("x", b"3")) == "a"

    run(main())


def test_an_error_that_nobody_named_is_raised_at_once() -> None:
    async def main() -> None:
        async with World(Fallback()) as world:
            world.plan["a"].set(write=Fail(IndexError("a bug in a driver")))
            with pytest.raises(BackendUnavailable) as caught:
                await world.storage.save("x", b"1")
            assert isinstance(caught.value.__cause__, IndexError)
            assert world.plan["b"].calls["write"] == 0
            await world.assert_clean()

    run(main())


def test_an_error_that_the_original_names_falls_back_and_the_record_says_where_to() -> None:
    async def main() -> None:
        async with World(Fallback(), rules={"a": {"fallback_on": (IndexError, PermissionError)}}) as world:
            world.plan["a"].set(write=[Fail(IndexError("named")), Fail(AccessDenied("named by its base"))])
            for name in ("x", "y"):
                path = await world.storage.save(name, b"content")
                assert await world.where(path) == "b"
                assert await content_of(world.storage, path) == b"content"
            assert await world.keys("a") == []
            await world.assert_clean()

    run(main())


def test_an_error_named_by_one_original_is_not_named_by_the_next() -> None:
    async def main() -> None:
        async with World(Fallback(), "abc", rules={"a": {"fallback_on": (KeyError,)}}) as world:
            for name in "ab":
                world.plan[name].set(write=Fail(KeyError("x")))
            with pytest.raises(BackendUnavailable) as caught:
                await world.storage.save("x", b"1")
            assert isinstance(caught.value.__cause__, KeyError)
            assert world.plan["c"].calls["write"] == 0

    run(main())


def test_when_all_fail_the_last_error_is_raised_with_the_earlier_ones() -> None:
    async def main() -> None:
        async with World(Fallback(), "abc") as world:
            for name in "abc":
                world.plan[name].set(write=Fail(OutOfSpace(f"{name} is full")))
            with pytest.raises(OutOfSpace, match="c is full") as caught:
                await world.storage.save("x", b"1")
            assert [str(error) for error in caught.value.attempts] == ["a is full", "b is full"]
            assert [note for note in caught.value.__notes__ if "a is full" in note]
            await world.assert_clean()
            assert await world.meta.count() == 0

    run(main())


def test_using_an_original_that_fails_falls_back_to_nothing() -> None:
    async def main() -> None:
        async with World(Fallback()) as world:
            world.plan["a"].set(write=DOWN)
            with pytest.raises(BackendUnavailable):
                await world.storage.save("x", b"1", using="a")
            assert world.plan["b"].calls["write"] == 0

    run(main())


def test_open_and_delete_go_to_the_recorded_original_though_the_other_holds_the_same_name() -> None:
    async def main() -> None:
        async with World(Fallback()) as world:
            world.plan["a"].set(write=at(1, DOWN))
            path = await world.storage.save("x", b"in b")
            await world.inner["a"].write("x", b"somebody else's")
            assert await content_of(world.storage, path) == b"in b"
            await world.storage.delete(path)
            assert (await world.keys("a"), await world.keys("b")) == (["x"], [])

    run(main())


def test_the_next_save_begins_at_the_first_original_again() -> None:
    async def main() -> None:
        async with World(Fallback()) as world:
            world.plan["a"].set(write=at(1, DOWN))
            assert await world.where(await world.storage.save("x", b"1")) == "b"
            assert await world.where(await world.storage.save("y", b"2")) == "a"

    run(main())


# -- the predecessor's faults


def test_using_of_one_task_never_touches_another_task() -> None:
    """It kept the original of the latest call on the shared instance: a file in a, recorded in b."""

    async def main() -> None:
        async with World(Fallback()) as world:
            world.plan["a"].set(write=Slow(5))

            async def save(number: int) -> None:
                using = "ab"[number % 2]
                path = await world.storage.save(f"{number}", f"{number}".encode(), using=using)
                assert await world.where(path) == using
                assert await content_of(world.storage, path) == f"{number}".encode()

            await asyncio.gather(*(save(number) for number in range(40)))

    run(main())


@pytest.mark.parametrize("where", ["reserve", "update"])
def test_an_error_of_the_meta_backend_is_not_taken_for_one_of_the_original(where: str) -> None:
    """It went on to the next original, and left a copy in the first."""

    async def main() -> None:
        async with World(Fallback(), rules={"a": {"fallback_on": (Exception,)}}) as world:
            world.meta_plan.set(**{where: Fail(BackendUnavailable("the database is down"))})
            with pytest.raises(BackendUnavailable, match="database"):
                await world.storage.save("x", b"1")
            assert world.plan["b"].calls["write"] == 0
            await world.assert_clean()
            assert await world.meta.count() == 0

    run(main())


@pytest.mark.parametrize(("statement", "writes"), [(1, [1, 0, 0]), (2, [1, 1, 0])], ids=["naming", "commit"])
def test_the_meta_backend_goes_down_in_the_middle_of_a_fallback(statement: int, writes: list[int]) -> None:
    """No further copy is made, and the error is the meta-backend's."""

    async def main() -> None:
        async with World(Fallback(), "abc", rules={"b": {"fallback_on": (Exception,)}}) as world:
            world.plan["a"].set(write=DOWN)
            world.meta_plan.set(update=[None] * (statement - 1) + [Fail(BackendUnavailable("database down"))] * 20)
            with pytest.raises(BackendUnavailable, match="database"):
                await world.storage.save("x", b"1")
            assert [world.plan[name].calls["write"] for name in "abc"] == writes
            await world.assert_clean()
            assert await world.meta.count() == 0

    run(main())


def test_the_meta_backend_goes_down_while_an_attempt_changes_the_record() -> None:
    """A key that is taken makes an attempt ask the meta-backend for another one."""

    async def main() -> None:
        async with World(Fallback(), rules={"a": {"fallback_on": (Exception,)}}) as world:
            await world.inner["a"].write("x", b"somebody else's")
            world.meta_plan.set(update=at(1, Fail(BackendUnavailable("the database is down"))))
            with pytest.raises(BackendUnavailable, match="database"):
                await world.storage.save("x", b"1")
            assert world.plan["b"].calls["write"] == 0
            assert world.outcomes() == [("a", "aborted")]
            assert await world.keys("a") == ["x"]

    run(main())


def half_reader(backend: MemoryBackend) -> Backend:
    """An original that takes a part of the content, and then fails."""

    class Half(MemoryBackend):
        async def _write(self, key: str, source: Any, **options: Any) -> Any:
            async for _ in source.chunks():
                raise BackendUnavailable("broke down in the middle")
            raise BackendUnavailable("broke down at an empty file")

    return Half()


@pytest.mark.parametrize(
    "content",
    [b"hello world", "hello world", io.BytesIO(b"hello world"), [b"hello ", b"world"], iter([b"hello ", b"world"])],
    ids=["bytes", "text", "file", "list", "iterator"],
)
def test_each_attempt_reads_the_content_from_the_start(content: Any) -> None:
    """It did not rewind: the second original got the rest, or nothing."""

    async def main() -> None:
        storage = ProxyStorage(
            "media",
            originals={"a": half_reader(MemoryBackend()), "b": MemoryBackend()},
            meta=MemoryMetaBackend(),
            placement=Fallback(),
        )
        async with storage:
            assert await content_of(storage, await storage.save("x", content)) == b"hello world"

    asyncio.run(main())


class Upload:
    """As Django's TemporaryUploadedFile: content that may be moved."""

    name = "upload.bin"
    closed = False

    def __init__(self, path: Path) -> None:
        self.path = path
        self.file = path.open("rb")
        self.size = path.stat().st_size

    def temporary_file_path(self) -> str:
        return str(self.path)

    def read(self, size: int = -1) -> bytes:
        return self.file.read(size)

    def seek(self, position: int) -> int:
        return self.file.seek(position)

    def seekable(self) -> bool:
        return True

    def chunks(self, size: int = 1 << 16) -> Any:
        self.file.seek(0)
        while chunk := self.file.read(size):
            yield chunk


@pytest.mark.asyncio
@pytest.mark.parametrize("size", [10, 3 << 20])
@pytest.mark.parametrize("broken", [False, True])
async def test_an_upload_is_moved_by_the_last_attempt_only(tmp_path: Path, size: int, broken: bool) -> None:
    """A first storage that had moved it away and then failed left nothing for the second."""

    class Full(FileSystemBackend):
        async def _write(self, *args: Any, **options: Any) -> Any:
            info = await super()._write(*args, **options)
            await self._discard(info.key, token=None)
            raise OutOfSpace("full after all")

    kind = Full if broken else FileSystemBackend
    upload = tmp_path / "upload"
    upload.write_bytes(b"u" * size)
    storage = ProxyStorage(
        "media",
        originals={"a": kind(tmp_path / "a"), "b": FileSystemBackend(tmp_path / "b")},
        meta=SQLiteMetaBackend(tmp_path / "meta.sqlite3"),
        placement=Fallback(),
    )
    async with storage:
        content = Upload(upload)
        path = await storage.save("x", content)
        content.file.close()
        assert await content_of(storage, path) == b"u" * size
        assert (await storage.get(path)).original_storage_name == ("b" if broken else "a")
        assert upload.exists() == (not broken)


def test_a_save_without_originals_is_refused_with_a_reason() -> None:
    """It raised None."""
    with pytest.raises(ConfigurationError):
        ProxyStorage("x", originals={}, meta=MemoryMetaBackend(), placement=Fallback())


def test_a_lost_race_for_a_name_takes_the_next_name_and_leaves_no_orphan() -> None:
    async def main() -> None:
        async with World(Fallback()) as world:
            world.plan["a"].set(write=DOWN)
            paths = await asyncio.gather(*(world.storage.save("x.txt", b"%d" % number) for number in range(20)))
            assert len(set(paths)) == 20
            await world.assert_clean()

    run(main())


def test_a_fallback_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    """It dropped all errors but the last without a word."""

    async def main() -> None:
        async with World(Fallback()) as world:
            world.plan["a"].set(write=DOWN)
            await world.storage.save("x", b"1")

    with caplog.at_level(logging.WARNING):
        run(main())
    (entry,) = [entry for entry in caplog.records if getattr(entry, "fallback", False)]
    assert (entry.original, entry.storage) == ("a", "media")  # type: ignore[attr-defined]
    assert "out of order" in entry.getMessage()


# -- what comes on top


def test_order_chooses_and_sorts() -> None:
    async def main() -> None:
        async with World(Fallback(order=["c", "a"]), "abc") as world:
            assert await world.where(await world.storage.save("x", b"1")) == "c"
            world.plan["c"].set(write=DOWN)
            assert await world.where(await world.storage.save("x", b"1")) == "a"
            world.plan["a"].set(write=DOWN)
            with pytest.raises(BackendUnavailable):
                await world.storage.save("x", b"1")
            assert world.plan["b"].calls["write"] == 0

    run(main())


def test_every_place_is_named_before_a_byte_goes_there() -> None:
    async def main() -> None:
        async with World(Fallback(), "abc") as world:
            hangs = {name: Hang() for name in "abc"}
            for name in "abc":
                world.plan[name].set(write=Unknown(hangs[name]))
            saving = asyncio.ensure_future(world.storage.save("x", b"1"))
            for number, name in enumerate("abc", 1):
                await hangs[name].reached.wait()
                (record,) = [record async for record in world.meta.list()]
                assert [place.original for place in record.all_places()] == list("abc")[:number]
                assert world.meta_plan.calls["update"] == number - 1, "an original that works costs no write of its own"
                hangs[name].release()
            with pytest.raises(DeadlineExceeded):
                await saving
            await world.assert_clean()
            assert await world.meta.count() == 0

    run(main())


class Unknown(Fault):
    """Waits, and then stores without an answer."""

    def __init__(self, hang: Hang) -> None:
        self.hang = hang

    async def __call__(self, call: Callable[[], Awaitable[Any]]) -> Any:
        await self.hang(call)
        raise DeadlineExceeded("the answer was lost", outcome_unknown=True)


def test_a_place_that_a_renamed_file_has_is_not_taken() -> None:
    async def main() -> None:
        async with World(Fallback()) as world:
            await world.storage.save("x", b"renamed", using="b")
            await world.storage.rename("x", "y")
            world.plan["a"].set(write=DOWN)
            record = await world.storage.get(await world.storage.save("x", b"new"))
            assert record.original_storage_name == "b"
            assert record.original_storage_path != "x"
            await world.storage.delete("x")
            assert await content_of(world.storage, "y") == b"renamed"
            await world.assert_clean()

    run(main())


def test_who_is_left_alone_is_not_named_at_all() -> None:
    async def main() -> None:
        async with World(Fallback(breaker=Breaker(failures=1, reset_after=60))) as world:
            world.plan["a"].set(write=DOWN)
            await world.storage.save("x", b"1")
            world.meta_plan.calls.clear()
            await world.storage.save("y", b"1")
            assert world.meta_plan.calls["update"] == 1, "the commit, and nothing else"

    run(main())


@pytest.mark.parametrize("fault", [Lie(), Late()], ids=["lie", "late"])
def test_what_may_still_land_is_named_in_the_record_and_removed_without_a_scan(fault: Any) -> None:
    async def main() -> None:
        async with World(Fallback()) as world:
            world.plan["a"].set(write=fault)
            path = await world.storage.save("x", b"1")
            record = await world.storage.get(path)
            assert record.original_storage_name == "b"
            assert [(place.original, place.state) for place in record.places] == [("a", "doubtful")]
            assert record.lease is not None
            if isinstance(fault, Late):
                await fault.land()
            assert await world.keys("a") == ["x"]
            await world.assert_clean()
            assert (await world.keys("a"), await world.keys("b")) == ([], ["x"])
            assert await content_of(world.storage, path) == b"1"

    run(main())


def test_a_failure_that_is_certain_leaves_nothing_to_clear() -> None:
    async def main() -> None:
        async with World(Fallback()) as world:
            world.plan["a"].set(write=DOWN)
            record = await world.storage.get(await world.storage.save("x", b"1"))
            assert (record.places, record.lease) == ((), None)

    run(main())


def test_replace_falls_back() -> None:
    async def main() -> None:
        async with World(Fallback(), keep_replaced=0.0) as world:
            path = await world.storage.save("x", b"old")
            world.plan["a"].set(write=[DOWN, Lie()])
            record = await world.storage.replace(path, once(b"new"))
            assert (record.original_storage_name, record.places) == ("b", ())
            assert await content_of(world.storage, path) == b"new"
            record = await world.storage.replace(path, b"newer")
            assert [(place.original, place.state) for place in record.places] == [("a", "doubtful")]
            assert await content_of(world.storage, path) == b"newer"
            await world.assert_clean()
            assert await world.keys("a") == []

    run(main())


def test_a_replacement_that_fails_everywhere_leaves_the_file_as_it_was() -> None:
    async def main() -> None:
        async with World(Fallback()) as world:
            path = await world.storage.save("x", b"old")
            world.plan["a"].set(write=Lie())
            world.plan["b"].set(write=DOWN)
            with pytest.raises(BackendUnavailable) as caught:
                await world.storage.replace(path, b"new")
            assert isinstance(caught.value.attempts[0], DeadlineExceeded)
            assert await content_of(world.storage, path) == b"old"
            await world.assert_clean()
            assert await content_of(world.storage, path) == b"old"

    run(main())


def test_copy_falls_back_and_begins_where_the_file_is() -> None:
    async def main() -> None:
        async with World(Fallback()) as world:
            path = await world.storage.save("x", b"1", using="b")
            assert await world.where(await world.storage.copy(path, "y")) == "b"
            world.plan["b"].set(copy=DOWN)
            copy = await world.storage.copy(path, "z")
            assert await world.where(copy) == "a"
            assert await content_of(world.storage, copy) == b"1"
            await world.assert_clean()

    run(main())


def test_move_goes_to_the_one_that_was_named_or_nowhere() -> None:
    async def main() -> None:
        async with World(Fallback(), "abc", keep_replaced=0.0) as world:
            path = await world.storage.save("x", b"1")
            world.plan["b"].set(write=at(1, DOWN))
            with pytest.raises(BackendUnavailable):
                await world.storage.move(path, "b")
            assert await world.where(path) == "a"
            await world.storage.move(path, "b")
            assert await world.where(path) == "b"
            await world.assert_clean()

    run(main())


@pytest.mark.parametrize("verb", ["copy", "copy using", "move"])
@pytest.mark.parametrize(
    ("fault", "error"),
    [
        ({"read": DOWN}, BackendUnavailable),
        ({"chunk": DOWN}, BackendUnavailable),
        ({"read": Fail(AccessDenied("no"))}, AccessDenied),
    ],
    ids=["not opened", "broken off", "denied"],
)
def test_a_transfer_from_an_original_that_fails_says_so(verb: str, fault: Any, error: type[Exception]) -> None:
    """Its bytes are another original's, not the caller's: no ContentError, and no circuit of the target."""

    async def main() -> None:
        async with World(Fallback(breaker=Breaker(failures=1)), chunk_bytes=1000) as world:
            path = await world.storage.save("x", b"1" * 5000)
            world.plan["a"].set(**fault, copy=DOWN)
            for _ in range(3):
                with pytest.raises(error) as caught:
                    if verb == "move":
                        await world.storage.move(path, "b")
                    else:
                        await world.storage.copy(path, "y", using="b" if verb == "copy using" else None)
                assert not isinstance(caught.value, ContentError)
                if error is BackendUnavailable:  # what the reads have opened is not what this is about
                    for gate in world.storage.gates.values():
                        gate._fresh()
            assert all(outcome in ("aborted", "failed") for name, outcome in world.outcomes() if name == "b")
            assert ("b", "failed") not in world.outcomes()
            await world.assert_clean()

    run(main())


def test_a_transfer_from_a_failing_original_says_so_under_every_placement() -> None:
    async def main() -> None:
        from aproxy_storage import First

        async with World(First()) as world:
            path = await world.storage.save("x", b"1")
            world.plan["a"].set(read=DOWN)
            with pytest.raises(BackendUnavailable):
                await world.storage.move(path, "b")
            with pytest.raises(BackendUnavailable):
                await world.storage.copy(path, "y", using="b")
            assert await content_of_healed(world, path) == b"1"

    run(main())


async def content_of_healed(world: World, path: str) -> bytes:
    await world.assert_clean()
    return await content_of(world.storage, path)


def test_inside_a_transaction_the_record_names_what_may_still_land() -> None:
    """J8: bytes first; the doubtful place is in the one write of the record."""

    class InTransaction(MemoryMetaBackend):
        async def reserve(self, *args: Any, **options: Any) -> None:
            return None

    async def main() -> None:
        async with World(Fallback()) as world:
            world.meta = InTransaction()
            world.storage.meta = world.storage.journal.meta = world.meta
            world.plan["a"].set(write=[DOWN, Lie()])
            for name, places in (("x", []), ("y", ["a"])):
                record = await world.storage.get(await world.storage.save(name, b"1"))
                assert record.original_storage_name == "b"
                assert [place.original for place in record.places] == places
            await world.inner["a"].write("z", b"somebody else's")
            assert await world.storage.save("z", b"1") != "z", "a taken key means a taken name"
            with pytest.raises(AlreadyExists):
                await world.storage.write_to("x", b"1", exclusive=True)

    run(main())


def test_names_and_content_are_refused_before_any_original_is_tried() -> None:
    async def main() -> None:
        async with World(Fallback(), rules={"a": {"fallback_on": (Exception,)}}) as world:
            for name, content in (("../x", b""), ("x", iter([b"abc"]))):
                with pytest.raises((ValueError, ContentError)):
                    await world.storage.save(name, content, size=2)
            assert world.plan["b"].calls["write"] == 0
            assert await world.meta.count() == 0

    asyncio.run(main())


def test_a_cancelled_save_tries_nothing_more() -> None:
    async def main() -> None:
        async with World(Fallback()) as world:
            hang = Hang()
            world.plan["a"].set(write=hang)
            saving = asyncio.ensure_future(world.storage.save("x", b"1"))
            await hang.reached.wait()
            saving.cancel()
            with pytest.raises(asyncio.CancelledError):
                await saving
            assert world.plan["b"].calls["write"] == 0
            assert world.outcomes() == [("a", "cancelled")]
            await world.assert_clean()

    run(main())


def test_delete_of_a_file_that_fell_back_removes_what_is_doubtful_too() -> None:
    async def main() -> None:
        async with World(Fallback()) as world:
            world.plan["a"].set(write=Lie())
            path = await world.storage.save("x", b"1")
            await world.storage.delete(path)
            with pytest.raises(NotFound):
                await world.storage.get(path)
            assert (await world.keys("a"), await world.keys("b")) == ([], [])
            await world.assert_clean()
            assert await world.meta.count() == 0

    run(main())


def test_an_original_may_be_given_with_or_without_rules() -> None:
    plain, ruled = MemoryBackend(), MemoryBackend()
    storage = ProxyStorage(
        "media", originals=[("a", plain), ("b", Original(ruled, max_concurrency=2))], meta=MemoryMetaBackend()
    )
    assert storage.originals == {"a": plain, "b": ruled}
    assert storage.get_original("b") is ruled
    alone = ProxyStorage("media", originals=Original(plain), meta=MemoryMetaBackend())
    assert alone.originals == {"default": plain}


async def never() -> AsyncIterator[bytes]:
    raise AssertionError("the content was touched")
    yield b""


def test_content_that_cannot_be_kept_is_refused_before_anything_is_written() -> None:
    async def main() -> None:
        async with World(Fallback(spool_bytes=None)) as world:
            for save in (
                lambda: world.storage.save("x", never()),
                lambda: world.storage.replace("kept", never()),
            ):
                await world.storage.write_to("kept", b"1", exclusive=False)
                with pytest.raises(ContentError, match="spool_bytes"):
                    await save()
            assert [record.path async for record in world.meta.list()] == ["kept"]
            assert await world.storage.save("x", once(b"one original needs no second pass"), using="a") == "x"

    run(main())
