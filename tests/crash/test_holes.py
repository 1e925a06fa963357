"""Holes that a kill at a step cannot find: operations that take effect late, and names that are used again.

Each test was red once.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from aproxy_storage import AlreadyExists, DeadlineExceeded, Placement, ProxyStorage, StorageError
from aproxy_storage.backends.filesystem import FileSystemBackend
from aproxy_storage.meta_backends.sqlite import SQLiteMetaBackend
from aproxy_storage.records import PENDING, MetaRecord
from aproxy_storage.tools.reconcile import reconcile
from tests.crash.arena import Arena

pytestmark = pytest.mark.asyncio


@pytest.fixture
def arena(tmp_path: Path) -> Arena:
    return Arena(tmp_path).make()


class SlowFiles(FileSystemBackend):
    """A file system whose next operation of one kind waits at the door until it is let in."""

    def __init__(self, root: Any, **options: Any) -> None:
        super().__init__(root, **options)
        self.slow = ""
        self.reached = asyncio.Event()
        self.go_on = asyncio.Event()
        self.late: asyncio.Task[None] | None = None

    async def _wait(self, what: str) -> None:
        if self.slow == what:
            self.slow = ""
            self.reached.set()
            await self.go_on.wait()

    async def copy(self, key: str, new_key: str, **options: Any) -> Any:
        await self._wait("copy")
        return await super().copy(key, new_key, **options)

    async def discard(self, key: str, **options: Any) -> None:
        async def discard() -> None:
            await self._wait("discard")
            await super(SlowFiles, self).discard(key, **options)

        # As a request on its way to a server: who sent it may go away, and it arrives all the same.
        self.late = asyncio.get_running_loop().create_task(discard())
        await asyncio.shield(self.late)


class SlowRecords(SQLiteMetaBackend):
    """A process that is stopped after its next change of a record has been made."""

    stop = False

    def __init__(self, path: Any, **options: Any) -> None:
        super().__init__(path, **options)
        self.reached = asyncio.Event()
        self.go_on = asyncio.Event()

    async def update(self, path: str, changes: Any, **options: Any) -> MetaRecord:
        record = await super().update(path, changes, **options)
        if self.stop:
            self.stop = False
            self.reached.set()
            await self.go_on.wait()
        return record


async def content(storage: ProxyStorage, path: str) -> bytes:
    async with storage.open(path, verify=True) as file:
        return await file.read()


async def test_a_copy_never_has_the_bytes_of_one_file_and_the_checksum_of_another(arena: Arena) -> None:
    async with arena.storage(backend=SlowFiles) as storage:
        await storage.save("x.txt", b"old")
        files: Any = storage.get_original("a")
        files.slow = "copy"
        copying = asyncio.ensure_future(storage.copy("x.txt", "copy.txt"))
        await files.reached.wait()
        await storage.delete("x.txt")
        assert await storage.save("x.txt", b"new") == "x.txt"
        files.go_on.set()
        with contextlib.suppress(StorageError):
            await content(storage, await copying)  # raises IntegrityError, if anything; and then it is wrong:
        for path in [record.path async for record in storage.list()]:
            assert await content(storage, path) in (b"old", b"new")


async def test_a_cancelled_delete_removes_nothing_of_the_next_file_of_that_name(arena: Arena) -> None:
    async with arena.storage(backend=SlowFiles) as storage:
        await storage.save("x.txt", b"old")
        files: Any = storage.get_original("a")
        files.slow = "discard"
        deleting = asyncio.ensure_future(storage.delete("x.txt"))
        await files.reached.wait()
        late = files.late
        deleting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await deleting
        path = await storage.save("x.txt", b"new")
        files.go_on.set()
        await late
        assert await content(storage, path) == b"new"


async def test_a_late_removal_of_replaced_bytes_removes_nothing_else(arena: Arena) -> None:
    async with arena.storage(backend=SlowFiles, keep_replaced=0) as slow, arena.storage(keep_replaced=0) as other:
        await slow.save("x.txt", b"old")
        files: Any = slow.get_original("a")
        files.slow = "discard"
        replacing = asyncio.ensure_future(slow.replace("x.txt", b"newer"))
        await files.reached.wait()
        await other.tidy()
        await other.delete("x.txt")
        path = await other.save("x.txt", b"newest")
        files.go_on.set()
        await replacing
        assert await content(other, path) == b"newest"


async def test_a_reconcile_that_was_stopped_for_longer_than_its_lease_removes_nothing(arena: Arena) -> None:
    def storage(meta: type[SQLiteMetaBackend]) -> ProxyStorage:
        return ProxyStorage(
            "arena", originals={"a": FileSystemBackend(arena.root / "a")}, meta=meta(arena.database),
            lease=0.5, settle=0.5, keep_replaced=0.01,
        )  # fmt: skip

    async with storage(SlowRecords) as slow, storage(SQLiteMetaBackend) as other:
        await other.save("x.txt", b"old")
        await other.replace("x.txt", b"newer")
        arena.expire_leases()
        records: Any = slow.meta
        records.stop = True
        stopped = asyncio.ensure_future(reconcile(slow, dry_run=False))
        await records.reached.wait()
        await asyncio.sleep(0.6)  # longer than lease and settle
        assert (await reconcile(other, dry_run=False)).counts == {"cleared": 1}
        await other.delete("x.txt")
        assert await other.save("x.txt", b"newest") == "x.txt"
        records.go_on.set()
        await stopped
        assert await content(other, "x.txt") == b"newest"


class Both(Placement):
    """Try one original after the other."""

    async def candidates(self, request: Any, originals: Sequence[str]) -> Sequence[str]:
        return originals

    def falls_back(self, error: StorageError) -> bool:
        return True


class UnansweredFiles(FileSystemBackend):
    """A file system that stores the first file, and does not say so."""

    silent = True

    async def write(self, key: str, source: Any, **options: Any) -> Any:
        info = await super().write(key, source, **options)
        if self.silent:
            self.silent = False
            raise DeadlineExceeded("no answer", outcome_unknown=True)
        return info


async def test_a_doubtful_place_is_not_forgotten_when_the_file_beside_it_is_replaced(arena: Arena) -> None:
    originals = {"a": UnansweredFiles(arena.root / "a"), "b": FileSystemBackend(arena.root / "b")}
    async with ProxyStorage(
        "arena", originals=originals, meta=SQLiteMetaBackend(arena.database), placement=Both()
    ) as storage:
        await storage.save("x.txt", b"old")
        await storage.replace("x.txt", b"new", using="b")
        await reconcile(storage, dry_run=False, force=True)
        record = await storage.get("x.txt")
        assert arena.on_disk()[0] == {("b", record.original_storage_path)}


async def test_a_crash_between_two_mkdirs_leaves_no_directory(arena: Arena) -> None:
    async with arena.storage() as storage:
        record = MetaRecord("d/e/f/x.txt", "arena", "a", "d/e/f/x.txt", state=PENDING, token="T", version=1)
        await storage.meta.create(record, lease=60.0)
        (arena.root / "a" / "d" / "e").mkdir(parents=True)
        await reconcile(storage, dry_run=False, force=True)
        assert arena.on_disk() == (set(), [])


class TogetherRecords(SQLiteMetaBackend):
    """Answers the question for owners to two at once."""

    async def owners(self, original_storage_name: str, keys: Any) -> Any:
        answer = await super().owners(original_storage_name, keys)
        if not hasattr(self, "barrier"):
            self.barrier = asyncio.Barrier(2)
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(0.2):
                await self.barrier.wait()
        return answer


async def test_bytes_are_adopted_once(arena: Arena) -> None:
    (arena.root / "a" / "found.txt").write_bytes(b"found")
    async with arena.storage(meta=TogetherRecords) as storage:
        answers = await asyncio.gather(
            storage.adopt("found.txt", name="one.txt"),
            storage.adopt("found.txt", name="two.txt"),
            return_exceptions=True,
        )
        assert sum(isinstance(answer, str) for answer in answers) <= 1, answers
        assert all(isinstance(answer, str | AlreadyExists) for answer in answers), answers
