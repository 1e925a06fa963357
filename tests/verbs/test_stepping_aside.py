"""An exact write to a name whose file is being deleted: the old record steps aside, and is finished all the same."""

from collections.abc import AsyncIterator, Mapping
from typing import Any

import pytest

from aproxy_storage import (
    AlreadyExists,
    BackendUnavailable,
    Conflict,
    MetaRecord,
    NotSupported,
    ObjectInfo,
    ProxyStorage,
)
from aproxy_storage.backends.memory import MemoryBackend
from aproxy_storage.meta_backends.memory import MemoryMetaBackend
from aproxy_storage.testing.faults import Fail, FaultyBackend, Plan, at
from aproxy_storage.tools.reconcile import reconcile
from tests.verbs.conftest import Make, content_of
from tests.verbs.test_narrow_windows import TokenlessBackend
from tests.verbs.test_transactions import TransactionalMeta, keys, read

pytestmark = pytest.mark.asyncio


async def overwrite(storage: ProxyStorage, content: bytes) -> None:
    await storage.write_to("a.txt", content, exclusive=False)


async def test_a_file_is_written_again_after_it_was_overwritten_and_deleted(make: Make) -> None:
    storage = make(settle=900.0, keep_replaced=60.0)
    await overwrite(storage, b"1")
    await overwrite(storage, b"2")
    await storage.delete("a.txt")  # its first bytes settle still
    await overwrite(storage, b"3")
    assert await content_of(storage, "a.txt") == b"3"
    assert [record.path async for record in storage.list()] == ["a.txt"]
    for _ in range(3):
        await reconcile(storage, dry_run=False, force=True)
    assert await content_of(storage, "a.txt") == b"3"
    assert len([info async for info in storage.get_original().list()]) == 1
    assert await storage.meta.count() == 1


async def test_an_exclusive_write_too(make: Make) -> None:
    storage = make()
    await overwrite(storage, b"1")
    await overwrite(storage, b"2")
    await storage.delete("a.txt")
    async with storage.open("a.txt", "xb") as file:
        await file.write(b"3")
    assert await content_of(storage, "a.txt") == b"3"
    with pytest.raises(AlreadyExists):
        await storage.write_to("a.txt", b"4", exclusive=True)


async def test_the_file_of_another_storage_does_not_step_aside(make: Make) -> None:
    one, other = make("one"), make("other")
    await overwrite(one, b"1")
    await one.journal.mark(await one.get("a.txt"))  # and then the process dies
    with pytest.raises(AlreadyExists):
        await overwrite(other, b"2")
    await overwrite(one, b"3")
    assert await content_of(one, "a.txt") == b"3"


@pytest.mark.parametrize("once", [False, True])
@pytest.mark.parametrize("saved_anew", [False, True])
async def test_an_overwriting_save_that_meets_a_delete(
    make: Make, monkeypatch: pytest.MonkeyPatch, saved_anew: bool, once: bool
) -> None:
    storage = make(settle=900.0)
    await overwrite(storage, b"1")
    backend = storage.get_original()
    write = backend.write

    async def write_and_delete(*args: Any, **options: Any) -> ObjectInfo:
        monkeypatch.setattr(backend, "write", write)
        info = await write(*args, **options)
        await storage.delete("a.txt")
        if saved_anew:
            await storage.save("a.txt", b"2")
        return info

    async def chunks() -> AsyncIterator[bytes]:
        yield b"whole"

    monkeypatch.setattr(backend, "write", write_and_delete)
    if once:  # there is nothing left to store
        with pytest.raises(Conflict):
            await storage.write_to("a.txt", chunks(), exclusive=False)
        assert await storage.exists("a.txt") is saved_anew
    else:
        await storage.write_to("a.txt", b"whole", exclusive=False)
        assert await content_of(storage, "a.txt") == b"whole"
    await overwrite(storage, b"3")  # the name is not blocked
    for _ in range(3):
        await reconcile(storage, dry_run=False, force=True)
    assert await content_of(storage, "a.txt") == b"3"
    assert len([info async for info in storage.get_original().list()]) == 1
    assert await storage.meta.count() == 1


async def test_a_save_finds_its_name_free_too(make: Make) -> None:
    storage = make(keep_replaced=60.0)
    await overwrite(storage, b"1")
    await overwrite(storage, b"2")
    await storage.delete("a.txt")
    assert await storage.save("a.txt", b"3") == "a.txt"
    assert (await storage.get("a.txt")).original_storage_path != "a.txt"  # a removal may be under way there


class NarrowMeta(MemoryMetaBackend):
    """As a table whose column for paths has 80 characters."""

    async def _update(self, path: str, changes: Mapping[str, Any], *rest: Any) -> MetaRecord:
        if len(changes.get("path", "")) > 80:
            raise NotSupported("value too long for type character varying(80)")
        return await super()._update(path, changes, *rest)


@pytest.mark.parametrize("path", ["a", "a" * 76 + ".txt", "日本" * 40, "d" * 78 + "/a"])
async def test_the_other_path_fits_where_the_path_has_fitted(path: str) -> None:
    storage = ProxyStorage("media", originals=MemoryBackend(), meta=NarrowMeta())
    for content in (b"1", b"2"):
        await storage.write_to(path, content, exclusive=False)
    await storage.delete(path)
    assert await storage.save(path, b"3") == path
    await storage.aclose()


async def test_where_bytes_carry_no_token() -> None:
    storage = ProxyStorage("media", originals=TokenlessBackend(), meta=MemoryMetaBackend())
    await overwrite(storage, b"1")
    await overwrite(storage, b"2")
    await storage.delete("a.txt")
    await overwrite(storage, b"3")
    for _ in range(3):
        await reconcile(storage, dry_run=False, force=True)
    assert await read(storage, "a.txt") == b"3"
    assert len(await keys(storage)) == 1
    await storage.aclose()


async def test_a_save_that_is_undone_does_not_step_aside() -> None:
    """Its reservation, sent twice, could land once more."""
    lost = BackendUnavailable("no answer", outcome_unknown=True)
    backend = FaultyBackend(MemoryBackend(), Plan(write=at(1, Fail(lost))))
    storage = ProxyStorage("media", originals=backend, meta=MemoryMetaBackend())
    with pytest.raises(BackendUnavailable):
        await storage.save("a.txt", b"1")
    assert (await storage.meta.get("a.txt")).state == "deleting"
    with pytest.raises(AlreadyExists, match=r"reconcile \(or tidy\) .* from 20\d\d-.* UTC on"):
        await overwrite(storage, b"2")
    await storage.aclose()


async def test_what_could_not_be_removed_is_removed_later_under_its_other_name() -> None:
    backend = FaultyBackend(MemoryBackend(), Plan(discard=at(1, Fail(BackendUnavailable("out of reach")))))
    storage = ProxyStorage("media", originals=backend, meta=MemoryMetaBackend(), keep_replaced=0)
    await storage.save("a.txt", b"1")
    await storage.delete("a.txt")
    await overwrite(storage, b"2")
    assert sorted(await keys(storage)) == sorted(["a.txt", (await storage.get("a.txt")).original_storage_path])
    report = await reconcile(storage, dry_run=False, force=True)
    assert report.counts == {"deleted": 1}
    assert await keys(storage) == [(await storage.get("a.txt")).original_storage_path]
    assert await read(storage, "a.txt") == b"2"
    await storage.aclose()


async def test_deleted_and_written_again_in_one_transaction() -> None:
    meta = TransactionalMeta()
    storage = ProxyStorage("media", originals=MemoryBackend(), meta=meta)
    await storage.save("a.txt", b"1")
    async with meta.atomic():
        await storage.delete("a.txt")
        await overwrite(storage, b"2")
        assert await read(storage, "a.txt") == b"2"
    assert await read(storage, "a.txt") == b"2"
    assert await meta.count() == 1  # who has deleted the first file found its record under its other name
    assert "a.txt" not in await keys(storage)
    await storage.restore_key("a.txt")
    assert "a.txt" in await keys(storage)
    await storage.aclose()


async def test_replaced_deleted_and_written_again_in_one_transaction(caplog: pytest.LogCaptureFixture) -> None:
    meta = TransactionalMeta()
    storage = ProxyStorage("media", originals=MemoryBackend(), meta=meta)
    await storage.save("a.txt", b"1")
    async with meta.atomic():
        await storage.replace("a.txt", b"2")
        await storage.delete("a.txt")
        await overwrite(storage, b"3")
    assert "left to reconcile" not in caplog.text
    assert await keys(storage) == [(await storage.get("a.txt")).original_storage_path]
    (aside,) = set(meta._rows) - {"a.txt"}
    assert {place.state for place in (await meta.get(aside)).all_places()} == {"settling"}
    for _ in range(2):
        await reconcile(storage, dry_run=False, force=True)
    assert await meta.count() == 1
    await storage.restore_key("a.txt")
    assert await keys(storage) == ["a.txt"]
    await storage.aclose()
