"""A temporary file of the caller's is his until the record is stored, whatever becomes of the save."""

import asyncio
import contextlib
import os
import stat
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio

from aproxy_storage import BackendUnavailable, Conflict, MetaRecord, ProxyStorage
from aproxy_storage.backends import _taking
from aproxy_storage.backends.filesystem import FileSystemBackend
from aproxy_storage.meta_backends.memory import MemoryMetaBackend
from tests.placement.test_fallback import Upload
from tests.verbs.conftest import content_of, keys_of

pytestmark = pytest.mark.asyncio

DATA = b"uploaded" * 1000


class Meta(MemoryMetaBackend):
    """Its calls can be made to fail."""

    instead: Any = None  # of the update that commits

    async def update(self, path: str, changes: Any, **options: Any) -> MetaRecord:
        if self.instead is not None and "original_storage_path" in changes:
            instead, self.instead = self.instead, None
            await instead(super().update(path, changes, **options))
            raise AssertionError("unreachable")
        return await super().update(path, changes, **options)


@pytest_asyncio.fixture
async def storage(tmp_path: Path) -> AsyncIterator[ProxyStorage]:
    async with ProxyStorage("media", originals=FileSystemBackend(tmp_path / "media"), meta=Meta()) as storage:
        yield storage


@pytest.fixture
def uploaded(tmp_path: Path) -> Path:
    path = tmp_path / "upload"
    path.touch(0o600)
    path.write_bytes(DATA)
    return path


async def write(storage: ProxyStorage, verb: str, path: Path, name: str = "a.txt") -> MetaRecord:
    upload = Upload(path)
    with upload.file:
        if verb == "save":
            return await storage.get(await storage.save(name, upload))
        return await storage.replace(name, upload, expect_version=(await storage.get(name)).revision)


async def mode_of(storage: ProxyStorage, path: str) -> str:
    root = storage.get_original().root  # type: ignore[attr-defined]
    return oct(stat.S_IMODE(Path(root, (await storage.get(path)).original_storage_path).stat().st_mode))


@pytest.mark.parametrize("end", ["refused", "cancelled", "conflict"])
@pytest.mark.parametrize("verb", ["save", "replace"])
async def test_upload_whose_record_is_not_stored_is_as_it_was(
    storage: ProxyStorage, uploaded: Path, verb: str, end: str
) -> None:
    """It was removed with the bytes, so that there were none left."""
    reached = asyncio.Event()

    async def instead(update: Any) -> None:
        update.close()
        if end == "refused":
            raise BackendUnavailable("away for a moment")
        if end == "conflict":
            raise Conflict("somebody else was first")
        reached.set()
        await asyncio.Event().wait()

    if verb == "replace":
        await storage.save("a.txt", b"old")
    before = await keys_of(storage.get_original())
    storage.meta.instead = instead  # type: ignore[attr-defined]
    task = asyncio.ensure_future(write(storage, verb, uploaded))
    if end == "cancelled":
        await reached.wait()
        assert stat.S_IMODE(uploaded.stat().st_mode) == 0o600, "before the record is stored"
        task.cancel()
    with pytest.raises((BackendUnavailable, Conflict, asyncio.CancelledError)):
        await task
    assert uploaded.read_bytes() == DATA
    assert oct(stat.S_IMODE(uploaded.stat().st_mode)) == oct(0o600)
    assert os.listxattr(uploaded) == []
    assert await keys_of(storage.get_original()) == before
    inode = uploaded.stat().st_ino
    record = await write(storage, verb, uploaded)
    assert await content_of(storage, record.path) == DATA
    assert not uploaded.exists()
    root = storage.get_original().root  # type: ignore[attr-defined]
    assert Path(root, record.original_storage_path).stat().st_ino == inode
    assert await mode_of(storage, "a.txt") == oct(0o644)


@pytest.mark.parametrize(
    ("error", "mode"),
    [
        (BackendUnavailable("away for longer"), 0o600),
        (BackendUnavailable("no answer", outcome_unknown=True), 0o644),
        (Conflict("perhaps with ourselves"), 0o644),
    ],
    ids=["refused", "unknown", "conflict"],
)
@pytest.mark.parametrize("verb", ["save", "replace"])
async def test_upload_of_a_save_that_cannot_be_undone_now_is_private_unless_it_may_be_stored(
    storage: ProxyStorage, uploaded: Path, monkeypatch: pytest.MonkeyPatch, verb: str, error: Exception, mode: int
) -> None:
    async def instead(update: Any) -> None:
        update.close()
        for name in ("update", "get"):
            monkeypatch.setattr(storage.meta, name, away)
        raise error

    async def away(*_: Any, **__: Any) -> Any:
        raise BackendUnavailable("away for longer")

    if verb == "replace":
        await storage.save("a.txt", b"old")
    storage.meta.instead = instead  # type: ignore[attr-defined]
    with pytest.raises(type(error)):
        await write(storage, verb, uploaded)
    assert uploaded.stat().st_nlink == 2
    assert oct(stat.S_IMODE(uploaded.stat().st_mode)) == oct(mode)


@pytest.mark.parametrize("lost", ["create", "after_commit"])
async def test_upload_in_a_transaction_whose_answer_is_lost_is_stored_with_the_mode_of_all(
    storage: ProxyStorage, uploaded: Path, monkeypatch: pytest.MonkeyPatch, lost: str
) -> None:
    async def reserve(*_: Any, **__: Any) -> None:
        """Be in a transaction."""

    async def lose(*args: Any, **options: Any) -> None:
        if lost == "create":
            await create(*args, **options)
        raise BackendUnavailable("no answer", outcome_unknown=True)

    create = storage.meta.create
    monkeypatch.setattr(storage.meta, "reserve", reserve)
    monkeypatch.setattr(storage.meta, lost, lose)
    with pytest.raises(BackendUnavailable) if lost == "create" else contextlib.nullcontext():
        await write(storage, "save", uploaded)
    assert await content_of(storage, "a.txt") == DATA
    assert await mode_of(storage, "a.txt") == oct(0o644)
    assert uploaded.read_bytes() == DATA


async def test_upload_keeps_its_name_where_nobody_knows_whether_the_record_is_stored(
    storage: ProxyStorage, uploaded: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def instead(update: Any) -> None:
        await update
        monkeypatch.setattr(storage.meta, "get", away)
        raise BackendUnavailable("no answer", outcome_unknown=True)

    async def away(path: str) -> MetaRecord:
        monkeypatch.undo()
        raise BackendUnavailable("away for a moment")

    storage.meta.instead = instead  # type: ignore[attr-defined]
    with pytest.raises(BackendUnavailable, match="no answer"):
        await write(storage, "save", uploaded)
    assert uploaded.read_bytes() == DATA
    assert await content_of(storage, "a.txt") == DATA
    assert await mode_of(storage, "a.txt") == oct(0o644)
    record = await write(storage, "save", uploaded)  # and is copied now: it is the first file's
    await storage.delete("a.txt")
    assert await content_of(storage, record.path) == DATA
    assert uploaded.read_bytes() == DATA


async def test_upload_whose_name_cannot_be_taken_away_is_stored_all_the_same(
    storage: ProxyStorage, uploaded: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(path: str) -> None:
        raise PermissionError(13, "not yours", path)

    with monkeypatch.context() as patched:
        patched.setattr(_taking.os, "unlink", refuse)
        await write(storage, "save", uploaded)
    assert "keeps its second name" in caplog.text
    assert await mode_of(storage, "a.txt") == oct(0o644)
    assert await content_of(storage, "a.txt") == DATA
    assert uploaded.exists()


async def test_upload_that_lies_where_it_is_to_be_stored(storage: ProxyStorage) -> None:
    """It was removed, and the save acknowledged."""
    root = Path(storage.get_original().root)  # type: ignore[attr-defined]
    (root / "in").mkdir(parents=True)
    (root / "in" / "cv.pdf").write_bytes(DATA)
    record = await write(storage, "save", root / "in" / "cv.pdf", "in/cv.pdf")
    assert record.path == "in/cv.pdf"
    assert await content_of(storage, record.path) == DATA
    assert await keys_of(storage.get_original()) == [record.original_storage_path]


async def test_one_upload_saved_twice_at_the_same_time(storage: ProxyStorage, uploaded: Path) -> None:
    """Both were one file, and who deleted one deleted the other."""
    root = storage.get_original().root  # type: ignore[attr-defined]
    async with ProxyStorage("other", originals=FileSystemBackend(root), meta=MemoryMetaBackend()) as other:
        records = await asyncio.gather(write(storage, "save", uploaded), write(other, "save", uploaded))
        assert len({record.original_storage_path for record in records}) == 2
        await other.delete("a.txt")
        assert await content_of(storage, "a.txt") == DATA
