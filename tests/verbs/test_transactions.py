"""J8: inside a caller's transaction the journal is one write, and no byte is removed before the commit."""

import asyncio
import contextlib
import os
import stat
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from aproxy_storage import (
    AlreadyExists,
    BackendUnavailable,
    ContentError,
    First,
    MetaRecord,
    NotFound,
    Placement,
    ProxyStorage,
    Replicate,
)
from aproxy_storage.backends.filesystem import FileSystemBackend
from aproxy_storage.backends.memory import MemoryBackend
from aproxy_storage.meta_backends.memory import MemoryMetaBackend
from aproxy_storage.tools.reconcile import reconcile
from tests.placement.test_fallback import Upload

pytestmark = pytest.mark.asyncio


class TransactionalMeta(MemoryMetaBackend):
    """Stands for Django's ORM, which a later issue brings: one transaction at a time, rolled back by copying."""

    def __init__(self) -> None:
        super().__init__()
        self.callbacks: list[Callable[[], Awaitable[None]]] | None = None

    async def _reserve(self, record: MetaRecord, lease: float, spare: MetaRecord) -> MetaRecord | None:
        return None if self.callbacks is not None else await super()._reserve(record, lease, spare)

    async def after_commit(self, callback: Callable[[], Awaitable[None]]) -> None:
        if self.callbacks is None:
            await callback()
        else:
            self.callbacks.append(callback)

    @asynccontextmanager
    async def atomic(self) -> AsyncIterator[None]:
        before = {path: list(row) for path, row in self._rows.items()}
        self.callbacks = []
        try:
            yield
        except BaseException:
            self.callbacks = None
            for path in list(self._rows):
                self._drop(self._rows[path])
            for row in before.values():
                self._put(row)
            raise
        callbacks, self.callbacks = self.callbacks, None
        for callback in callbacks:
            await callback()


class Rollback(Exception):
    pass


@pytest.fixture
def meta() -> TransactionalMeta:
    return TransactionalMeta()


@pytest.fixture
def storage(meta: TransactionalMeta) -> ProxyStorage:
    return ProxyStorage("media", originals=MemoryBackend(), meta=meta)


async def read(storage: ProxyStorage, path: str) -> bytes:
    async with storage.open(path, verify=True) as file:
        return await file.read()


async def keys(storage: ProxyStorage) -> list[str]:
    return [info.key async for info in storage.get_original().list()]


async def test_save_is_one_write_of_the_record(storage: ProxyStorage, meta: TransactionalMeta) -> None:
    async with meta.atomic():
        path = await storage.save("a.txt", b"1")
        assert await read(storage, path) == b"1"
        other = await storage.save("a.txt", b"2")
    record = await storage.get(path)
    assert (record.version, record.lease, record.size) == (1, None, 1)
    assert other != path
    assert await read(storage, other) == b"2"


async def test_a_rolled_back_save_leaves_bytes_that_a_scan_finds(
    storage: ProxyStorage, meta: TransactionalMeta
) -> None:
    with pytest.raises(Rollback):
        async with meta.atomic():
            await storage.save("a.txt", b"1")
            raise Rollback
    assert not await storage.exists("a.txt")
    assert await keys(storage) == ["a.txt"]
    assert (await reconcile(storage, dry_run=False, force=True)).counts == {}
    assert (await reconcile(storage, dry_run=False, scan=True)).counts == {"young": 1}
    assert (await reconcile(storage, scan=True, min_age=0)).counts == {"removed": 1}
    assert await keys(storage) == ["a.txt"]  # that was a dry run
    await reconcile(storage, dry_run=False, scan=True, min_age=0)
    assert await keys(storage) == []


async def test_delete_and_replace_remove_bytes_only_after_the_commit(
    storage: ProxyStorage, meta: TransactionalMeta
) -> None:
    await storage.save("a.txt", b"1")
    with pytest.raises(Rollback):
        async with meta.atomic():
            await storage.delete("a.txt")
            assert not await storage.exists("a.txt")
            raise Rollback
    assert await read(storage, "a.txt") == b"1"
    with pytest.raises(Rollback):
        async with meta.atomic():
            await storage.replace("a.txt", b"2")
            assert await read(storage, "a.txt") == b"2"
            raise Rollback
    assert await read(storage, "a.txt") == b"1"
    async with meta.atomic():
        await storage.delete("a.txt")
        assert "a.txt" in await keys(storage)
    assert "a.txt" not in await keys(storage)
    with pytest.raises(NotFound):
        await storage.get("a.txt")


async def test_a_rolled_back_replace_keeps_bytes_that_were_not_to_be_kept(meta: TransactionalMeta) -> None:
    storage = ProxyStorage("media", originals=MemoryBackend(), meta=meta, keep_replaced=0)
    await storage.save("a.txt", b"1")
    with pytest.raises(Rollback):
        async with meta.atomic():
            await storage.replace("a.txt", b"2")
            raise Rollback
    assert await read(storage, "a.txt") == b"1"
    async with meta.atomic():
        await storage.replace("a.txt", b"3")
        assert len(await keys(storage)) == 3  # the old bytes, those of the replacement rolled back, and the new ones
    assert await read(storage, "a.txt") == b"3"
    assert "a.txt" not in await keys(storage)
    assert (await storage.get("a.txt")).places == ()


async def test_a_taken_key_means_a_taken_name(storage: ProxyStorage, meta: TransactionalMeta) -> None:
    await storage.get_original().write("a.txt", b"foreign")
    async with meta.atomic():
        path = await storage.save("a.txt", b"mine")
        with pytest.raises(AlreadyExists):
            async with storage.open("a.txt", "xb") as file:
                await file.write(b"x")
    assert path != "a.txt"
    assert sorted(await keys(storage)) == sorted(["a.txt", path])


async def test_a_failed_create_takes_its_bytes_back(storage: ProxyStorage, meta: TransactionalMeta) -> None:
    async def fail(record: MetaRecord, *, lease: float | None = None) -> Any:
        raise BackendUnavailable("the database went away")

    async with meta.atomic():
        meta.create = fail  # type: ignore[method-assign]
        with pytest.raises(BackendUnavailable):
            await storage.save("a.txt", b"1")
        del meta.create
    assert await keys(storage) == []


async def test_a_create_without_an_answer_keeps_its_bytes(storage: ProxyStorage, meta: TransactionalMeta) -> None:
    create = meta.create

    async def lose_the_answer(record: MetaRecord, *, lease: float | None = None) -> Any:
        await create(record, lease=lease)
        raise BackendUnavailable("the answer was lost", outcome_unknown=True)

    async with meta.atomic():
        meta.create = lose_the_answer  # type: ignore[method-assign]
        with pytest.raises(BackendUnavailable):
            await storage.save("a.txt", b"1")
        del meta.create
    assert await read(storage, "a.txt") == b"1"


async def taken_by_another_storage(meta: TransactionalMeta, directory: Path) -> ProxyStorage:
    """Return a storage beside another one that has the path ``a.txt``, but not its key."""
    other = ProxyStorage("other", originals=MemoryBackend(), meta=meta)
    await other.save("a.txt", b"another")
    return ProxyStorage("media", originals=FileSystemBackend(directory / "media"), meta=meta)


@pytest.mark.parametrize("seen", [True, False])
async def test_an_upload_is_not_lost_where_its_name_is_taken(
    meta: TransactionalMeta, tmp_path: Path, seen: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    storage = await taken_by_another_storage(meta, tmp_path)
    uploaded = tmp_path / "upload"
    uploaded.write_bytes(b"x" * 300_000)

    async def nothing(path: str, **_: Any) -> bool:
        return False

    if not seen:  # it is taken just after we have looked
        monkeypatch.setattr(meta, "exists", nothing)
    upload = Upload(uploaded)
    async with meta.atomic():
        path = await storage.save("a.txt", upload)
    upload.file.close()
    monkeypatch.undo()
    assert path != "a.txt"
    assert await read(storage, path) == b"x" * 300_000
    assert len(await keys(storage)) == 1


@pytest.mark.parametrize("end", ["committed", "rolled back", "refused"])
@pytest.mark.parametrize("verb", ["save", "replace"])
async def test_an_upload_is_the_callers_until_the_commit(
    meta: TransactionalMeta, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, verb: str, end: str
) -> None:
    storage = ProxyStorage("media", originals=FileSystemBackend(tmp_path / "media"), meta=meta)
    uploaded = tmp_path / "upload"
    uploaded.touch(0o600)
    uploaded.write_bytes(b"x" * 300_000)
    if verb == "replace":
        await storage.save("a.txt", b"old")
    before = await keys(storage)

    async def refuse(*args: Any, **options: Any) -> Any:
        if verb == "save" or "original_storage_path" in args[1]:
            monkeypatch.undo()
            raise BackendUnavailable("away for a moment")
        return await update(*args, **options)

    update = meta.update
    if end == "refused":
        monkeypatch.setattr(meta, "create" if verb == "save" else "update", refuse)
    upload = Upload(uploaded)
    with upload.file, contextlib.suppress(Rollback, BackendUnavailable):
        async with meta.atomic():
            await getattr(storage, verb)("a.txt", upload)
            assert stat.S_IMODE(uploaded.stat().st_mode) == 0o600, "it may be rolled back"
            if end == "rolled back":
                raise Rollback
    assert uploaded.exists() == (end != "committed")
    if end == "committed":
        assert await read(storage, "a.txt") == b"x" * 300_000
        key = (await storage.get("a.txt")).original_storage_path
        assert stat.S_IMODE((tmp_path / "media" / key).stat().st_mode) == 0o644
    elif end == "refused":
        assert await keys(storage) == before
        assert stat.S_IMODE(uploaded.stat().st_mode) == 0o600
        assert os.listxattr(uploaded) == []


async def test_content_that_is_there_only_once_is_not_lost_where_its_name_is_taken(
    meta: TransactionalMeta, tmp_path: Path
) -> None:
    storage = await taken_by_another_storage(meta, tmp_path)
    async with meta.atomic():
        path = await storage.save("a.txt", iter([b"x" * 300_000, b"y"]))
    assert await read(storage, path) == b"x" * 300_000 + b"y"


async def test_a_key_that_an_unfinished_record_names_is_not_taken(
    storage: ProxyStorage, meta: TransactionalMeta
) -> None:
    await storage.save("a.txt", b"1")
    renamed = await storage.rename("a.txt", "b.txt")
    marked = await storage.journal.mark(renamed)
    await storage.journal.discard(marked.record.all_places(), marked.record)  # and then the process dies
    async with meta.atomic():
        path = await storage.save("a.txt", b"2")
    await reconcile(storage, dry_run=False, force=True)
    assert await read(storage, path) == b"2"


async def test_overwriting_in_a_transaction_gives_up_where_the_key_is_taken_without_a_record() -> None:
    class Meta(MemoryMetaBackend):
        async def reserve(self, record: MetaRecord, **options: Any) -> None:
            """Be in a transaction."""

    original = MemoryBackend()
    await original.write("a.txt", b"somebody else's")
    async with ProxyStorage("m", originals=original, meta=Meta()) as storage:
        with pytest.raises(AlreadyExists):
            await storage.write_to("a.txt", b"x", exclusive=False)
    assert [info.key async for info in original.list()] == ["a.txt"]


@pytest.mark.parametrize("quorum", [1, 2])
async def test_a_copy_whose_key_is_taken_before_its_content_is_begun_goes_elsewhere(quorum: int) -> None:
    class Quick(MemoryBackend):
        async def _write(self, key: str, source: Any, **options: Any) -> Any:
            if key == "x.txt":  # the other one has the content by now, and this one refuses it before its body
                await begun.wait()
                raise AlreadyExists("taken")
            return await super()._write(key, source, **options)

    async def content() -> AsyncIterator[bytes]:
        yield b"mine, "
        begun.set()
        yield b"whole"

    begun = asyncio.Event()
    originals = {"a": MemoryBackend(), "b": Quick()}
    async with ProxyStorage(
        "m", originals=originals, meta=MemoryMetaBackend(), placement=Replicate(2, quorum)
    ) as storage:
        path = await storage.save("x.txt", content())
        places = (await storage.get(path)).good_places()
        assert [place.original for place in places] == ["a", "b"]
        for place in places:
            async with originals[place.original].read(place.key) as reading:
                assert b"".join([chunk async for chunk in reading]) == b"mine, whole"


PLACEMENTS = pytest.mark.parametrize("placement", [First(), Replicate(2, 1), Replicate(2, 2)], ids=["1", "1 of 2", "2"])


async def over_a_foreign_file(meta: MemoryMetaBackend, placement: Placement) -> ProxyStorage:
    originals = {"a": MemoryBackend(), "b": MemoryBackend()}
    await originals["a"].write("x.txt", b"somebody else's")
    return ProxyStorage("m", originals=originals, meta=meta, placement=placement)


@PLACEMENTS
async def test_content_that_is_there_only_once_is_not_begun_under_a_taken_key(
    meta: TransactionalMeta, placement: Placement
) -> None:
    storage = await over_a_foreign_file(meta, placement)
    content = iter([b"mine, ", b"whole"])
    async with meta.atomic():
        for exclusive in (True, False):
            with pytest.raises(AlreadyExists):
                await storage.write_to("x.txt", content, exclusive=exclusive)
        path = await storage.save("x.txt", content)
    assert path != "x.txt"
    assert await read(storage, path) == b"mine, whole"
    assert len((await storage.get(path)).good_places()) == placement.limits.copies
    assert sorted(await keys(storage)) == sorted(["x.txt", path])


@PLACEMENTS
async def test_an_original_that_is_away_does_not_keep_content_from_the_others(
    meta: TransactionalMeta, placement: Placement, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def fail(*_: Any, **__: Any) -> Any:
        raise BackendUnavailable("out of order")

    storage = await over_a_foreign_file(meta, placement)
    for name in ("_stat", "_write"):
        monkeypatch.setattr(storage.get_original("a"), name, fail)
    saving = storage.save("y.txt", iter([b"mine"]))
    async with meta.atomic():
        if placement.limits.quorum == 1 and placement.limits.copies == 2:
            assert await read(storage, await saving) == b"mine"
        else:
            with pytest.raises(BackendUnavailable):
                await saving


@PLACEMENTS
@pytest.mark.parametrize("inside", [True, False], ids=["inside", "outside"])
@pytest.mark.parametrize("verb", ["save", "write_to"])
async def test_content_that_is_spent_when_its_key_turns_out_to_be_taken_says_so(
    meta: TransactionalMeta, placement: Placement, inside: bool, verb: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def is_taken(key: str) -> bool:
        return False  # it comes to be just after the look

    storage = await over_a_foreign_file(meta, placement)
    monkeypatch.setattr(storage.get_original("a"), "is_taken", is_taken)
    meta.callbacks = [] if inside else None
    content = iter([b"mine"])
    saving = storage.save("x.txt", content) if verb == "save" else storage.write_to("x.txt", content, exclusive=False)
    if placement.limits.quorum < placement.limits.copies:
        await saving  # the other original has it
        return
    with pytest.raises(ContentError, match="save it again") as caught:
        await saving
    assert isinstance(caught.value.__cause__, AlreadyExists)
    assert await meta.count() == 0
    assert await keys(storage) == ["x.txt"]
    assert [info.key async for info in storage.get_original("b").list()] == []
