"""What happens to people: real servers that hang or die, a directory that is gone, a disk that blocks in the kernel."""

from __future__ import annotations

import asyncio
import contextlib
import shutil
import threading
import time
import tracemalloc
from collections import Counter
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from aproxy_storage import (
    Attempt,
    Backend,
    BackendUnavailable,
    Breaker,
    Fallback,
    NotFound,
    Original,
    Placement,
    ProxyStorage,
    Replicate,
    StorageError,
    Timeouts,
)
from aproxy_storage.backends.filesystem import FileSystemBackend
from aproxy_storage.meta_backends.base import MetaBackend
from aproxy_storage.meta_backends.sqlite import SQLiteMetaBackend
from aproxy_storage.threads import Workers
from aproxy_storage.tools.reconcile import reconcile
from tests.placement.support import content_of
from tests.services.mongo import MongoServer
from tests.services.s3 import S3Server

pytestmark = pytest.mark.asyncio

QUICK = Timeouts(operation=5.0, idle=5.0, cleanup=2.0)


class Story:
    """A storage over one original that gets into trouble, ``main``, and a directory, ``spare``."""

    def __init__(
        self, directory: Path, main: Backend | Original, placement: Placement, meta: MetaBackend | None = None
    ) -> None:
        self.attempts: list[Attempt] = []
        self.spare = directory / "spare"
        self.storage = ProxyStorage(
            "media",
            # A busy machine is not what these stories are about.
            originals={"main": main, "spare": Original(FileSystemBackend(self.spare), timeouts=Timeouts(idle=30.0))},
            meta=meta or SQLiteMetaBackend(directory / "meta.sqlite3"),
            placement=placement,
            on_attempt=self.attempts.append,
            timeouts=QUICK,
        )

    def outcomes(self) -> Counter[tuple[str, str]]:
        found = Counter((each.original, each.outcome) for each in self.attempts if each.kind == "write")
        self.attempts.clear()
        return found

    async def save(self, count: int, what: str) -> list[str]:
        return await asyncio.gather(
            *(self.storage.save(f"{what}/{number}", f"{what} {number}".encode()) for number in range(count))
        )

    async def assert_whole(self, paths: list[str]) -> None:
        for path in paths:
            name, _, number = path.partition("/")
            assert await content_of(self.storage, path) == f"{name} {number}".encode()

    async def assert_clean(self) -> None:
        """Hold that reconcile leaves in the originals exactly what the records name, without a scan."""
        for _ in range(6):
            report = await reconcile(self.storage, dry_run=False, force=True)
            if not report.counts:
                break
        assert report.counts == {}, report.findings
        named = {name: set[str]() for name in self.storage.originals}
        async for record in self.storage.list():
            for place in record.all_places():
                named[place.original].add(place.key)
        for name, backend in self.storage.originals.items():
            assert {info.key async for info in backend.list()} == named[name]


# -- real servers


async def s3(server: S3Server, **options: Any) -> Backend:
    from aproxy_storage.backends.s3 import S3Backend

    return S3Backend(**server.service.options, timeouts=QUICK, **options)


async def test_a_stopped_s3_server_costs_a_thousand_saves_one_timeout(tmp_path: Path, own_s3: S3Server) -> None:
    placement = Fallback(attempt_timeout=2.0, breaker=Breaker(failures=5, reset_after=3))
    story = Story(tmp_path, await s3(own_s3), placement)
    async with story.storage:
        with contextlib.suppress(NotFound):
            await story.storage.get_original("main").stat("nothing")  # its driver is imported, a connection made
        paths = await story.save(5, "healthy")
        assert story.outcomes()["main", "ok"]
        own_s3.pause()
        try:
            async with asyncio.timeout(60):  # if each batch of the pool waited for itself, it would take minutes
                paths += await story.save(1000, "hung")
            first = story.outcomes()
            assert first["spare", "ok"] == 1000
            assert first["main", "ok"] == 0
            assert first["main", "timeout"] >= 5
            paths += await story.save(200, "open")
            later = story.outcomes()
            assert later["spare", "ok"] == 200
            assert later["main", "timeout"] <= 2, "nobody but a probe asks while the circuit is open"
        finally:
            own_s3.resume()
        async with asyncio.timeout(60):
            while not story.outcomes()["main", "ok"]:
                paths += await story.save(1, f"back{len(paths)}")
                await asyncio.sleep(0.1)
        await story.assert_whole(paths[:20] + paths[-20:])
        await story.assert_clean()
        await story.assert_whole(paths[:20] + paths[-20:])


async def test_a_killed_s3_server_loses_no_save(tmp_path: Path, own_s3: S3Server) -> None:
    story = Story(tmp_path, await s3(own_s3), Fallback(attempt_timeout=5))
    async with story.storage:
        paths = await story.save(3, "healthy")
        own_s3.kill9()
        paths += await story.save(20, "dead")
        assert story.outcomes()["spare", "ok"] == 20
        with pytest.raises(BackendUnavailable):
            await content_of(story.storage, "healthy/0")
        own_s3.start()
        for gate in story.storage.gates.values():
            gate._fresh()
        await story.assert_whole(paths)
        await story.assert_clean()


async def test_hedging_beside_a_stopped_gridfs(tmp_path: Path, own_mongo: MongoServer) -> None:
    from aproxy_storage.backends.gridfs import GridFSBackend

    main = GridFSBackend(f"{own_mongo.url}/files", timeouts=QUICK)
    story = Story(tmp_path, main, Fallback(hedge_after=0.3, attempt_timeout=3, breaker=Breaker(5, 3)))
    async with story.storage:
        paths = await story.save(5, "healthy")
        story.outcomes()
        own_mongo.pause()
        try:
            paths += await story.save(100, "hung")
            assert story.outcomes()["spare", "ok"] == 100
            paths += await story.save(50, "open")
            assert story.outcomes()["main", "ok"] == 0
        finally:
            own_mongo.resume()
        await story.storage.cleanup.drain(within=10)  # what was on its way lands now, or does not
        await main.cleanup.drain(within=10)
        for gate in story.storage.gates.values():
            gate._fresh()
        await story.assert_whole(paths[:10] + paths[-10:])
        await story.assert_clean()
        await story.assert_whole(paths[:10] + paths[-10:])


async def test_copies_on_s3_and_gridfs_survive_each_server(
    tmp_path: Path, own_s3: S3Server, own_mongo: MongoServer
) -> None:
    from aproxy_storage.backends.gridfs import GridFSBackend

    storage = ProxyStorage(
        "media",
        originals={"s3": await s3(own_s3), "gridfs": GridFSBackend(f"{own_mongo.url}/files", timeouts=QUICK)},
        meta=SQLiteMetaBackend(tmp_path / "meta.sqlite3"),
        placement=Replicate(2, attempt_timeout=15, breaker=None),  # a killed server says so at once
        timeouts=QUICK,
    )
    data = b"0123456789" * 300_000
    async with storage:
        await storage.save("before", data)
        for server, other in ((own_s3, "gridfs"), (own_mongo, "s3")):
            server.kill9()
            assert await content_of(storage, "before") == data
            path = await storage.save("during", data)
            assert [place.original for place in (await storage.get(path)).good_places()] == [other]
            server.start()
        for _ in range(5):
            if not (await reconcile(storage, dry_run=False, force=True)).counts:
                break
        async for record in storage.list():
            assert sorted(place.original for place in record.all_places()) == ["gridfs", "s3"]
            assert await content_of(storage, record.path) == data


# -- the stories of the predecessor's author


async def test_rm_rf_of_the_first_originals_directory(tmp_path: Path) -> None:
    """Slides 97 to 101: the directory is removed, a save goes to the second original, and the record says so."""
    story = Story(tmp_path, FileSystemBackend(tmp_path / "media"), Fallback())
    async with story.storage:
        await story.storage.save("om.png", b"om")
        shutil.rmtree(tmp_path / "media")
        path = await story.storage.save("nom.png", b"nom")
        record = await story.storage.get(path)
        assert (record.original_storage_name, record.original_storage_path) == ("spare", "nom.png")
        assert not (tmp_path / "media").exists(), "an unmounted disk is not made anew"
        with pytest.raises(BackendUnavailable):
            await content_of(story.storage, "om.png")
        assert await content_of(story.storage, "nom.png") == b"nom"


async def test_a_file_where_the_root_directory_was(tmp_path: Path) -> None:
    for used in (True, False):
        root = tmp_path / f"media{used}"
        story = Story(tmp_path / str(used), FileSystemBackend(root), Fallback())
        (tmp_path / str(used)).mkdir()
        async with story.storage:
            if used:
                await story.storage.save("om.png", b"om")
                shutil.rmtree(root)
            root.write_text("a file")
            path = await story.storage.save("nom.png", b"nom")
            assert (await story.storage.get(path)).original_storage_name == "spare"
            assert await content_of(story.storage, path) == b"nom"
            assert root.read_text() == "a file"


async def test_the_true_story(django_database: Path, tmp_path: Path, mongo_url: str) -> None:
    """Slides 175 to 179: a Django storage that raises what `requests` raises, GridFS behind it, records in the ORM."""
    requests = pytest.importorskip("requests")
    from django.core.files.storage import Storage

    from aproxy_storage.backends.django import DjangoStorageBackend
    from aproxy_storage.backends.gridfs import GridFSBackend
    from aproxy_storage.meta_backends.orm import ORMMetaBackend
    from sync_bridge.models import StoredFile

    class Elliptics(Storage):
        """A store behind HTTP that is out of order."""

        def _save(self, name: str, content: Any) -> str:
            content.read(3)
            raise requests.exceptions.HTTPError("503 Service Unavailable")

        def exists(self, name: str) -> bool:
            return False

        def delete(self, name: str) -> None:
            return

        def listdir(self, path: str) -> tuple[list[str], list[str]]:
            return [], []

    database = f"{mongo_url}/story_{tmp_path.name.replace('-', '_')}"
    gridfs = GridFSBackend(database, timeouts=QUICK)
    storage = ProxyStorage(
        "main",
        originals={
            "elliptics": Original(
                DjangoStorageBackend(Elliptics()), fallback_on=(requests.exceptions.RequestException,)
            ),
            "gridfs": gridfs,
        },
        meta=ORMMetaBackend(StoredFile),
        placement=Fallback(),
    )
    async with storage:
        path = await storage.save("resumes/om.png", b"om")
        record = await storage.get(path)
        assert record.original_storage_name == "gridfs"
        assert (await StoredFile.objects.aget(path=path)).original_storage_name == "gridfs"
        assert await content_of(storage, path) == b"om"
        await storage.delete(path)
        assert [info.key async for info in gridfs.list()] == []


# -- large content that can be read once


async def large(mebibytes: int) -> AsyncIterator[bytes]:
    for number in range(mebibytes):
        yield number.to_bytes(4, "big") * (1 << 18)


class Breaks(FileSystemBackend):
    """A disk that takes 150 MiB, and then no more."""

    count = 0

    def _step(self, draft: Any, step: Any, *args: Any) -> Any:
        self.count += 1
        if self.count > 150:
            raise OSError(5, "Input/output error")
        return super()._step(draft, step, *args)


async def test_a_one_shot_source_of_200_mib_falls_back_after_150(tmp_path: Path) -> None:
    story = Story(tmp_path, Breaks(tmp_path / "main"), Fallback(spool_bytes=1 << 20))
    async with story.storage:
        tracemalloc.start()
        try:
            path = await story.storage.save("big", large(200))
            peak = tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()
        assert peak < 24 << 20, f"{peak >> 20} MiB: more than what is spooled in memory and a few chunks"
        record = await story.storage.get(path)
        assert (record.original_storage_name, record.size) == ("spare", 200 << 20)
        number = 0
        async with story.storage.open(path) as file:
            while data := await file.read(1 << 20):
                assert data == number.to_bytes(4, "big") * (1 << 18)
                number += 1
        assert number == 200
        assert list((tmp_path / "main").iterdir()) == []


class Unhurried(FileSystemBackend):
    """A disk that takes longer for a file than an attempt may go without progress."""

    def _bulk_step(self, draft: Any, step: Any, *args: Any) -> Any:
        def slowly(*given: Any) -> Any:
            time.sleep(0.2)
            return step(*given)

        return super()._bulk_step(draft, slowly, *args)


async def test_a_large_copy_by_the_kernel_is_never_killed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file that is copied without a chunk passing through the process tells its progress all the same."""
    for name, value in {"_SLICE": 1 << 20, "_STRETCH": 0.0, "_HASHED": 1 << 20}.items():
        monkeypatch.setattr(f"aproxy_storage.backends.filesystem.{name}", value)
    main = Unhurried(tmp_path / "main")
    story = Story(tmp_path, main, Fallback(attempt_timeout=1.0))
    source = tmp_path / "source"
    source.write_bytes(b"0123456789abcdef" * (12 << 16))  # 12 MiB: more than two seconds
    async with story.storage:
        path = await story.storage.save("big", source)
        assert (await story.storage.get(path)).original_storage_name == "main"
        copy = await story.storage.copy(path, "copy")
        assert (await story.storage.get(copy)).original_storage_name == "main"
        assert story.outcomes() == {("main", "ok"): 2}
        assert await content_of(story.storage, copy) == source.read_bytes()


# -- a disk that blocks in the kernel


class Blocked(FileSystemBackend):
    """A disk whose system calls do not come back until `free` is set."""

    def __init__(self, root: Path) -> None:
        super().__init__(root, timeouts=Timeouts(operation=1.0, idle=30.0, cleanup=1.0))
        self._workers = Workers("blocked", 2, max_waiting=10, share=1)
        self.free = threading.Event()

    def _step(self, draft: Any, step: Any, *args: Any) -> Any:
        def blocked(*given: Any) -> Any:
            self.free.wait(60)
            return draft.run(*given)

        return self._workers.call(blocked, step, *args, timeout=self.timeouts.idle)


async def test_a_write_blocked_in_the_kernel_holds_up_nothing_else(tmp_path: Path) -> None:
    main = Blocked(tmp_path / "main")
    story = Story(tmp_path, main, Fallback(attempt_timeout=1.0, breaker=None))
    async with story.storage:
        paths = await story.save(60, "hung")
        outcomes = story.outcomes()
        assert outcomes["spare", "ok"] == 60
        assert outcomes["main", "timeout"] == 12, "two that block, and ten that wait for a thread"
        assert outcomes["main", "failed"] == 48, "its pool is full, and says so at once"
        errors = [each.error for each in story.attempts]
        assert all(isinstance(error, StorageError) for error in errors)
        async with asyncio.timeout(30):
            await story.assert_whole(paths)
            await asyncio.gather(*(story.storage.save(f"n{number}", b"1", using="spare") for number in range(50)))
        with pytest.raises(BackendUnavailable):
            await story.storage.save("x", b"1", using="main")
        main.free.set()
        await main.cleanup.drain(within=10)
        await story.assert_clean()
        await story.assert_whole(paths)
