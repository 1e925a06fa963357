"""save, replace, delete, rename, copy, move, adopt and the listing verbs, on every storage of the fixture."""

import hashlib
import itertools
import re
from collections.abc import AsyncIterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from aproxy_storage import (
    AlreadyExists,
    ByteRange,
    CommonPrefix,
    ConfigurationError,
    Conflict,
    ContentError,
    IntegrityError,
    InvalidPath,
    MetaRecord,
    NotFound,
    NotSupported,
    ProxyStorage,
    Source,
)
from aproxy_storage.backends.memory import MemoryBackend
from aproxy_storage.meta_backends.memory import MemoryMetaBackend
from aproxy_storage.tools.reconcile import reconcile
from tests.verbs.conftest import Make, content_of, keys_of

pytestmark = pytest.mark.asyncio


async def test_save_stores_content_under_its_name(storage: ProxyStorage) -> None:
    path = await storage.save("dir/hello.txt", b"hello world")
    assert path == "dir/hello.txt"
    record = await storage.get(path)
    assert (record["path"], record["proxy_storage_name"], record["original_storage_name"]) == (path, "media", "a")
    assert record.original_storage_path == "dir/hello.txt"
    assert record.size == 11
    assert record.checksum == "sha256:" + hashlib.sha256(b"hello world").hexdigest()
    assert record.content_type == "text/plain"
    assert record.name == "dir/hello.txt"
    assert record.lease is None
    assert record.places == ()
    assert record.created_at is not None
    assert record.created_at.tzinfo is not None
    assert await content_of(storage, path) == b"hello world"
    assert await storage.size(path) == 11


async def test_a_taken_name_gets_the_next_free_one(storage: ProxyStorage) -> None:
    first = await storage.save("backup.tar.gz", b"1")
    second = await storage.save("backup.tar.gz", b"2")
    assert first == "backup.tar.gz"
    assert re.fullmatch(r"backup_[A-Za-z0-9]{7}\.tar\.gz", second)
    assert await content_of(storage, first) == b"1"
    assert await content_of(storage, second) == b"2"


@pytest.mark.parametrize(
    "name", ["日本語/ファイル.txt", "nai\u0308ve.txt", "na\u00efve.txt", "a b/ü%_.txt", ".hidden", "…"]
)
async def test_names_are_stored_exactly(storage: ProxyStorage, name: str) -> None:
    assert await storage.save(name, b"x") == name
    assert [record.path async for record in storage.list()] == [name]
    assert await content_of(storage, name) == b"x"


async def test_the_empty_file(storage: ProxyStorage) -> None:
    path = await storage.save("empty", b"")
    assert await content_of(storage, path) == b""
    assert await storage.size(path) == 0
    assert [chunk async for chunk in storage.stream(path)] == []


async def test_max_length_counts_characters_of_the_whole_path(storage: ProxyStorage) -> None:
    name = "d/" + "ü" * 60 + ".txt"
    first = await storage.save(name, b"1", max_length=40)
    second = await storage.save(first, b"2", max_length=40)
    for path in (first, second):
        assert len(path) <= 40
        assert path.endswith(".txt")
    assert first != second
    with pytest.raises(InvalidPath):
        await storage.save("d/" + "x" * 30 + ".txt", b"", max_length=9)


@pytest.mark.parametrize("limits", [{}, {"prefix": "of/us"}, {"keys": "token"}, {"max_path_bytes": 200}])
@pytest.mark.parametrize("max_length", [None, 100])
async def test_a_name_that_is_too_long_is_shortened(make: Make, limits: dict[str, Any], max_length: int | None) -> None:
    """As an upload has it: within 100 characters, and in UTF-8 longer than a part of a path or a whole one may be."""
    storage = make(originals={"a": Narrow()}, **limits)
    for name in ("d/" + "日" * 90 + ".pdf", "d/" + "x" * 96 + ".pdf", "d/" + "日" * 500 + ".pdf"):
        paths = [await storage.save(name, b"%PDF-1.7", max_length=max_length) for _ in range(2)]
        for path in paths:
            directory, _, last = path.rpartition("/")
            assert directory == storage.prefix + "d"
            assert last.endswith(".pdf")
            assert last[0] == name[2]
            assert len(last.encode()) <= 90
            assert len(path.encode()) <= storage.max_path_bytes
            assert max_length is None or len(path) <= max_length
            assert await content_of(storage, path) == b"%PDF-1.7"
            assert len((await storage.get(path)).name or "") <= storage.max_path_bytes
        assert paths[0] != paths[1]
    for name in ("日" * 40 + "/a.pdf", "/".join(["d" * 90] * 12) + "/a.pdf", "日" * 400 + "\n.pdf", "日" * 400 + "/"):
        with pytest.raises(InvalidPath):
            await storage.save(name, b"", max_length=max_length)
    with pytest.raises(InvalidPath):  # no wish, but a name
        async with storage.open(storage.prefix + "日" * 90 + ".pdf", "xb") as file:
            await file.write(b"x")


class Narrow(MemoryBackend):
    def __init__(self) -> None:
        super().__init__()
        self.capabilities = replace(self.capabilities, max_segment_bytes=90, max_key_bytes=300)


async def test_the_name_may_come_from_the_content(storage: ProxyStorage, tmp_path: Path) -> None:
    file = tmp_path / "cv.pdf"
    file.write_bytes(b"%PDF-1.7")
    assert await storage.save(None, file) == "cv.pdf"
    assert file.read_bytes() == b"%PDF-1.7"  # never moved
    with pytest.raises(InvalidPath, match="name"):
        await storage.save(None, b"nameless")


async def test_a_failing_source_leaves_nothing(storage: ProxyStorage) -> None:
    async def broken() -> AsyncIterator[bytes]:
        yield b"x" * 100_000
        raise RuntimeError("the client went away")

    with pytest.raises(ContentError) as caught:
        await storage.save("upload.bin", broken())
    assert isinstance(caught.value.__cause__, RuntimeError)
    for size in (1, 99):
        with pytest.raises(ContentError):
            await storage.save("upload.bin", iter([b"x" * 10]), size=size)
    assert not await storage.exists("upload.bin")
    assert await keys_of(storage.get_original("a")) == []
    assert (await reconcile(storage, force=True)).counts == {}
    assert await storage.save("upload.bin", b"ok") == "upload.bin"  # the name is free again


async def test_using_is_for_one_call(make: Make) -> None:
    storage = make()
    await storage.save("x", b"b", using="b")
    await storage.save("y", b"a")
    assert (await storage.get("x")).original_storage_name == "b"
    assert (await storage.get("y")).original_storage_name == "a"
    with pytest.raises(ConfigurationError, match="'nope'"):
        await storage.save("z", b"", using="nope")
    assert await storage.meta.count() == 2


async def test_a_foreign_object_at_the_key_is_left_alone(storage: ProxyStorage) -> None:
    await storage.get_original("a").write("taken.txt", b"somebody else's")

    async def once() -> AsyncIterator[bytes]:
        yield b"streamed"

    for content, expected in ((b"mine", b"mine"), (once(), b"streamed")):
        path = await storage.save("taken.txt", content)
        record = await storage.get(path)
        assert record.original_storage_path != "taken.txt"
        assert await content_of(storage, path) == expected
        await storage.delete(path)
    async with storage.get_original("a").read("taken.txt") as reading:
        assert b"".join([chunk async for chunk in reading]) == b"somebody else's"


async def test_a_renamed_file_keeps_its_key(storage: ProxyStorage) -> None:
    await storage.save("a.txt", b"old")
    record = await storage.rename("a.txt", "b.txt")
    assert (record.path, record.original_storage_path) == ("b.txt", "a.txt")
    assert not await storage.exists("a.txt")
    path = await storage.save("a.txt", b"new")
    assert path == "a.txt"
    assert (await storage.get(path)).original_storage_path != "a.txt"
    await storage.delete("b.txt")
    assert await content_of(storage, "a.txt") == b"new"
    with pytest.raises(AlreadyExists):
        await storage.rename("a.txt", await storage.save("c.txt", b"c"))
    with pytest.raises(NotFound):
        await storage.rename("b.txt", "d.txt")
    assert (await storage.rename("a.txt", "a.txt")).path == "a.txt"


async def test_token_keys_are_never_reused(make: Make) -> None:
    storage = make(keys="token", prefix="site/")
    seen = set()
    for _ in range(3):
        path = await storage.save("dir/a.tar.gz", b"x")
        assert path == "site/dir/a.tar.gz"
        key = (await storage.get(path)).original_storage_path
        assert re.fullmatch(r"dir/a_[A-Za-z0-9]{12}\.tar\.gz", key)
        seen.add(key)
        await storage.delete(path)
    assert len(seen) == 3


async def test_replace(storage: ProxyStorage) -> None:
    path = await storage.save("a.txt", b"old")
    before = await storage.get(path)
    after = await storage.replace(path, b"newer", expect_version=before.version)
    assert (after.path, after.token, after.size) == (path, before.token, 5)
    assert after.version > before.version
    assert after.original_storage_path != before.original_storage_path
    assert await content_of(storage, path) == b"newer"
    with pytest.raises(Conflict, match="version"):
        await storage.replace(path, b"x", expect_version=before.version)
    with pytest.raises(NotFound):
        await storage.replace("missing", b"x")
    with pytest.raises(ContentError):
        await storage.replace(path, b"short", size=9)
    assert await content_of(storage, path) == b"newer"


async def test_replaced_bytes_stay_for_open_handles_and_go_later(make: Make) -> None:
    storage = make(keep_replaced=60.0)
    path = await storage.save("a.txt", b"old bytes")
    file = await storage.open(path)
    await storage.replace(path, b"new")
    assert await file.read() == b"old bytes"
    await file.aclose()
    assert len(await keys_of(storage.get_original("a"))) == 2
    assert (await reconcile(storage, dry_run=False)).counts == {}  # not yet
    assert (await reconcile(storage, dry_run=False, force=True)).counts == {"cleared": 1}
    assert len(await keys_of(storage.get_original("a"))) == 1
    assert (await storage.get(path)).lease is None
    at_once = make(keep_replaced=0.0)
    await at_once.replace(path, b"newest")
    assert len(await keys_of(storage.get_original("a"))) == 1
    assert (await storage.get(path)).places == ()


async def test_delete(storage: ProxyStorage) -> None:
    path = await storage.save("d/a.txt", b"x")
    await storage.delete(path)
    assert not await storage.exists(path)
    assert await keys_of(storage.get_original("a")) == []
    assert await storage.meta.count() == 0
    with pytest.raises(NotFound):
        await storage.delete(path)
    await storage.delete(path, missing_ok=True)
    assert await storage.save("d/a.txt", b"y") == "d/a.txt"


async def test_delete_takes_a_record_that_has_moved_on(storage: ProxyStorage) -> None:
    record = await storage.get(await storage.save("a", b"1"))
    await storage.replace("a", b"2")
    await storage.delete(record)
    assert not await storage.exists("a")


async def test_a_record_stands_for_its_own_file(storage: ProxyStorage) -> None:
    await storage.save("a", b"1")
    stale = await storage.get("a")
    await storage.replace("a", b"2")
    assert (await storage.update(stale, extra={"k": 1})).extra == {"k": 1}  # the same file, which has moved on
    await storage.delete("a")
    await storage.save("a", b"somebody else's")
    new = await storage.get("a")
    with pytest.raises(NotFound):
        await storage.delete(stale)
    await storage.delete(stale, missing_ok=True)
    with pytest.raises(NotFound):
        await storage.update(stale, extra={"k": 2})
    with pytest.raises(Conflict):
        await storage.rename(stale, "b")
    first = replace(stale, version=new.version)  # every new file begins with the same one
    with pytest.raises(Conflict, match="another file"):
        await storage.replace("a", b"x", expect_version=first.revision)
    assert await storage.get("a") == new
    assert await content_of(storage, "a") == b"somebody else's"
    assert (await storage.replace("a", b"mine", expect_version=new.revision)).size == 4


async def test_copy_has_bytes_of_its_own(storage: ProxyStorage) -> None:
    await storage.save("a.txt", b"content", extra={"owner": 7})
    within = await storage.copy("a.txt", "b.txt")
    across = await storage.copy("a.txt", "b.txt", using="b")
    assert within == "b.txt"
    assert re.fullmatch(r"b_[A-Za-z0-9]{7}\.txt", across)
    await storage.delete("a.txt")
    for path, original in ((within, "a"), (across, "b")):
        record = await storage.get(path)
        assert record.original_storage_name == original
        assert record.extra == {"owner": 7}
        assert await content_of(storage, path) == b"content"


async def test_a_copy_belongs_to_no_object(storage: ProxyStorage) -> None:
    owned = {"content_type_id": 3, "object_id": "5", "field": "scan", "note": "x"}
    await storage.save("a", b"1", extra=owned)
    await storage.save("b", b"1", extra={"field": "of wheat"})
    assert (await storage.get(await storage.copy("a", "c"))).extra == {"note": "x"}
    assert (await storage.get(await storage.copy("b", "d"))).extra == {"field": "of wheat"}
    assert (await storage.get("a")).extra == owned


async def test_move_keeps_the_path(make: Make) -> None:
    storage = make(keep_replaced=0.0)
    path = await storage.save("a.txt", b"content")
    record = await storage.move(path, "b")
    assert (record.path, record.original_storage_name) == (path, "b")
    assert await content_of(storage, path) == b"content"
    assert await keys_of(storage.get_original("a")) == []
    assert (await storage.move(path, "b")).version == record.version  # already there


async def test_damaged_bytes_are_neither_copied_nor_moved(storage: ProxyStorage) -> None:
    path = await storage.save("a.txt", b"content")
    original = storage.get_original("a")
    await original.discard("a.txt")
    await original.write("a.txt", b"CONTENT")
    with pytest.raises(IntegrityError):
        await storage.move(path, "b")
    with pytest.raises(IntegrityError):
        await storage.copy(path, "b.txt", using="b")
    assert await keys_of(storage.get_original("b")) == []
    with pytest.raises(IntegrityError):
        await content_of(storage, path)
    await original.discard("a.txt")
    await original.write("a.txt", b"short")
    with pytest.raises(IntegrityError, match="5 bytes"):
        await storage.open(path)
    await original.discard("a.txt")
    with pytest.raises(IntegrityError, match="gone"):
        await storage.open(path)


async def test_adopt(storage: ProxyStorage) -> None:
    original = storage.get_original("a")
    await original.write("old/cv.pdf", b"%PDF-1.7 ...")
    assert await storage.adopt("old/cv.pdf") == "old/cv.pdf"
    record = await storage.get("old/cv.pdf")
    assert (record.size, record.checksum, record.content_type) == (12, None, "application/pdf")
    assert [chunk async for chunk in storage.stream(record)] == [b"%PDF-1.7 ..."]
    with pytest.raises(AlreadyExists, match="belong"):
        await storage.adopt("old/cv.pdf", name="other.pdf")
    with pytest.raises(NotFound):
        await storage.adopt("missing")
    with pytest.raises(IntegrityError, match="no checksum"):
        await storage.open("old/cv.pdf", verify=True)
    await storage.delete("old/cv.pdf")
    assert await keys_of(original) == []


async def test_listing(storage: ProxyStorage) -> None:
    names = ["a/1", "a/2", "a/b/3", "a-b", "b", "é", "日"]
    for name in names:
        await storage.save(name, b"")
    assert [record.path async for record in storage.list()] == sorted(names, key=str.encode)
    assert [record.path async for record in storage.list("a/")] == ["a/1", "a/2", "a/b/3"]
    assert [record.path async for record in storage.list(after="a/2", limit=2)] == ["a/b/3", "b"]
    rolled = [entry async for entry in storage.list("a", delimiter="/")]
    assert [entry.path for entry in rolled] == ["a-b", "a/"]
    assert isinstance(rolled[1], CommonPrefix)
    assert [record and record.path for record in await storage.get_many(["b", "nope", "a/1"])] == ["b", None, "a/1"]


async def test_storages_that_share_a_meta_backend_see_only_their_own(make: Make) -> None:
    one, two = make("one"), make("two", prefix="two")
    path = await one.save("x", b"1")
    assert await two.save("x", b"2") == "two/x"
    assert not await two.exists(path)
    with pytest.raises(NotFound):
        await two.get(path)
    with pytest.raises(NotFound):
        await two.delete(path)
    assert [record.path async for record in two.list()] == ["two/x"]
    assert await two.get_many([path, "two/x"]) == [None, await two.get("two/x")]
    with pytest.raises(InvalidPath, match="prefix"):
        await two.rename("two/x", "elsewhere")


@pytest.mark.parametrize("verb", ["open", "size", "url", "update", "delete", "rename", "move", "copy", "restore_key"])
async def test_records_that_are_no_file_of_this_storage_are_refused(make: Make, verb: str) -> None:
    one, two = make("one"), make("two", prefix="two")
    await two.save("x", b"2")
    foreign = await two.get("two/x")
    saving = replace(foreign, path="y", proxy_storage_name="one", state="pending", token="t", version=1, size=None)
    await one.meta.create(saving, lease=60)
    arguments: dict[str, Any] = {"update": {"extra": {}}, "move": {"using": "b"}}
    arguments |= {"rename": {"new_path": "z"}, "copy": {"name": "z"}}
    for record in (foreign, await one.meta.get("y")):
        with pytest.raises(NotFound):
            await getattr(one, verb)(record, **arguments.get(verb, {}))
    assert await two.get("two/x") == foreign
    assert await content_of(two, "two/x") == b"2"
    assert (await one.meta.get("y")).state == "pending"
    assert await one.meta.count() == 2


async def test_hooks_see_the_content_and_fill_the_record(make: Make) -> None:
    calls = []

    class Media(ProxyStorage):
        async def choose_original(self, name: str, source: Source, **kwargs: Any) -> str | None:
            return "b" if await source.peek(4) == b"\x89PNG" else None

        async def get_data_for_meta_backend_save(
            self, *, path: str, original_storage_path: str, original_name: str, content: Source, **kwargs: Any
        ) -> Mapping[str, Any]:
            calls.append((path, original_storage_path, original_name, await content.peek(3)))
            return {"owner": 7, "path": "ignored", "size": 0}

    async def once() -> AsyncIterator[bytes]:
        yield b"\x89P"
        yield b"NG..."

    storage = make(kind=Media, prefix="m")
    path = await storage.save("pic.png", once(), extra={"note": "hi"})
    record = await storage.get(path)
    assert calls == [("m/pic.png", "pic.png", "pic.png", b"\x89PN")]
    assert (record.path, record.size, record.original_storage_name) == ("m/pic.png", 7, "b")
    assert record.extra == {"note": "hi", "owner": 7}
    assert record["owner"] == 7
    assert await content_of(storage, path) == b"\x89PNG..."
    updated = await storage.update(path, extra={"owner": 8})
    assert (updated.extra, updated.version) == ({"owner": 8}, record.version)


async def test_class_attributes_in_place_of_arguments(make: Make) -> None:
    given = make()

    class Media(ProxyStorage):
        name = "declared"
        originals = given.originals
        meta = given.meta

    storage = Media()
    assert (await storage.get(await storage.save("x", b"1"))).proxy_storage_name == "declared"
    refused: list[dict[str, Any]] = [
        {"name": ""}, {"keys": "uuid"}, {"durability": "never"}, {"lease": 0}, {"originals": {}}, {"chunk_bytes": 1.5},
        {"tidy_every": float("nan")},
    ]  # fmt: skip
    for wrong in refused:
        with pytest.raises(ConfigurationError):
            Media(**wrong)
    power = "in memory" if isinstance(given.meta, MemoryMetaBackend) else "needs durability='power'"
    with pytest.raises(ConfigurationError, match=power):
        Media(durability="power")
    for seconds in (float("inf"), float("nan"), 1e12):
        for each in ("lease", "settle", "keep_replaced"):
            with pytest.raises(ConfigurationError, match="ten years"):
                Media(**{each: seconds})  # type: ignore[arg-type]

    class Overreaching(Media):
        hook_may_set = frozenset({"content_type", "path", "state"})

    with pytest.raises(ConfigurationError, match="path, state"):
        Overreaching()


async def test_urls(storage: ProxyStorage) -> None:
    path = await storage.save("a b.txt", b"")
    if storage.get_original("a").capabilities.url:
        assert (await storage.urls([path, "nope"])).keys() == {path}
    else:
        with pytest.raises(NotSupported):
            await storage.url(path)


async def test_health_names_every_part(storage: ProxyStorage) -> None:
    assert [(part.name, part.ok) for part in await storage.health()] == [("a", True), ("b", True), ("meta", True)]


async def test_lookups_of_impossible_names_find_nothing(storage: ProxyStorage) -> None:
    for name in ("", "/etc/passwd", "../x", "a\0b", "x" * 5000, "\ud800"):
        assert not await storage.exists(name)
        with pytest.raises(NotFound):
            await storage.open(name)
        with pytest.raises(NotFound):
            await storage.delete(name)


async def test_ranges(storage: ProxyStorage) -> None:
    path = await storage.save("digits", b"0123456789")
    cases = {
        ByteRange(2, 5): b"234",
        ByteRange(8): b"89",
        ByteRange.last(3): b"789",
        ByteRange(5, 500): b"56789",
        ByteRange(10): b"",
        ByteRange(99, 100): b"",
        ByteRange.last(99): b"0123456789",
    }
    for byte_range, expected in cases.items():
        assert b"".join([chunk async for chunk in storage.stream(path, byte_range=byte_range)]) == expected


@pytest.mark.parametrize("swallowed", [False, True])
async def test_what_the_database_refuses_is_not_tried_for_ever(
    swallowed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("aproxy_storage.proxy_writing._pauses", lambda: itertools.repeat(0.0))
    meta = RefusingMeta(swallowed)
    kind, words = (NotSupported, "row-level security") if swallowed else (Conflict, "constraint")
    async with ProxyStorage("m", originals=MemoryBackend(), meta=meta) as storage:
        record = await storage.get(await storage.save("a.txt", b"1"))
        for path in ("a.txt", record):
            for verb in (storage.update(path, extra={"rating": 11}), storage.delete(path)):
                meta.tries = 0
                with pytest.raises(kind, match=words) as caught:
                    await verb
                assert meta.tries == (10 if swallowed else 1)
                assert not swallowed or isinstance(caught.value.__cause__, Conflict)
        assert await storage.get("a.txt") == record


async def test_what_the_database_has_undone_is_tried_again(monkeypatch: pytest.MonkeyPatch) -> None:
    # A deadlock, or a serialisation failure: the record is as it was, and the same change succeeds a moment later.
    monkeypatch.setattr("aproxy_storage.proxy_writing._pauses", lambda: itertools.repeat(0.0))
    meta = RefusingMeta(True)
    async with ProxyStorage("m", originals=MemoryBackend(), meta=meta) as storage:
        record = await storage.get(await storage.save("a.txt", b"1"))
        for path in ("a.txt", record):
            meta.tries, meta.until = 0, 9
            assert (await storage.update(path, extra={"rating": 11}))["rating"] == 11
        meta.tries = 0
        await storage.delete(record)
        assert not await storage.exists("a.txt")


class RefusingMeta(MemoryMetaBackend):
    """Refuses changes of the fields, and removals, until so many were tried."""

    tries = 0
    until = 99

    def __init__(self, retryable: bool) -> None:
        super().__init__()
        self.retryable = retryable

    async def update(self, path: str, changes: Any, **options: Any) -> MetaRecord:
        if "extra" in changes or changes.get("state") == "deleting":
            self.tries += 1
            assert self.tries < 20
            if self.tries <= self.until:
                raise Conflict("no row was changed" if self.retryable else "a constraint", retryable=self.retryable)
        return await super().update(path, changes, **options)
