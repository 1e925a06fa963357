"""reconcile, tidy and verify: what crashed callers left, bytes without a record, damaged files."""

import asyncio
import hashlib
import logging
import unicodedata
from collections.abc import Callable
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from obstore.store import LocalStore, MemoryStore

from aproxy_storage import (
    Backend,
    BackendUnavailable,
    ByteRange,
    ConfigurationError,
    Conflict,
    IntegrityError,
    MetaRecord,
    NotFound,
    ObjectInfo,
    Place,
    ProxyStorage,
    Revision,
    Timeouts,
)
from aproxy_storage.backends.base import Reader
from aproxy_storage.backends.filesystem import FileSystemBackend
from aproxy_storage.backends.memory import MemoryBackend, _Object
from aproxy_storage.backends.obstore import ObstoreBackend
from aproxy_storage.meta_backends.memory import MemoryMetaBackend
from aproxy_storage.tools.reconcile import Finding, reconcile
from aproxy_storage.tools.verify import verify
from tests.verbs.conftest import Make, content_of, keys_of

pytestmark = pytest.mark.asyncio


async def leave_pending(storage: ProxyStorage, path: str, *, lease: float, token: str = "tokenOfADead") -> MetaRecord:
    """Do what a save has done when it dies between its write and its commit."""
    record = MetaRecord(
        path=path,
        proxy_storage_name=storage.name,
        original_storage_name="a",
        original_storage_path=path,
        state="pending",
        token=token,
        version=1,
    )
    reserved = await storage.meta.create(record, lease=lease)
    await storage.get_original("a").write(path, b"half a save", token=token)
    return reserved


def put_foreign(backend: Backend, key: str, data: bytes) -> None:
    """Put an object there as another program would: with no token."""
    if isinstance(backend, MemoryBackend):
        now = datetime.now(UTC)
        backend._objects[key] = _Object(ObjectInfo(key, size=len(data), modified_at=now, changed_at=now), data)
    else:
        target = Path(backend.full_path(key))
        target.parent.mkdir(exist_ok=True)  # the root is made by the backend's first write
        target.write_bytes(data)


async def test_a_dead_save_is_undone_in_two_rounds(make: Make) -> None:
    storage = make(settle=0.0, lease=0.5, keep_replaced=0.0)
    await leave_pending(storage, "x", lease=0.0)
    dry = await reconcile(storage)
    assert (dry.counts, dry.findings) == ({"undone": 1}, [Finding("undone", "x", "a")])
    assert await keys_of(storage.get_original("a")) == ["x"]
    first = await reconcile(storage, dry_run=False)
    assert first.counts == {"settling": 1}
    assert not first.clean
    assert await keys_of(storage.get_original("a")) == []
    await storage.get_original("a").write("x", b"late", token="tokenOfADead")  # it lands after its undo
    while not (second := await reconcile(storage, dry_run=False)).counts:  # until the shortest of leases is over
        pass
    assert second.counts == {"deleted": 1}
    assert second.clean
    assert await keys_of(storage.get_original("a")) == []
    assert await storage.meta.count() == 0


async def test_a_live_lease_is_respected_unless_forced(storage: ProxyStorage) -> None:
    await leave_pending(storage, "x", lease=60.0)
    assert (await reconcile(storage, dry_run=False)).counts == {}
    assert (await reconcile(storage, dry_run=False, force=True, older_than=3600.0)).counts == {"undone": 1}
    assert await storage.save("x", b"new") == "x"


async def test_by_force_no_bytes_of_another_save_are_removed(storage: ProxyStorage) -> None:
    # As after a restore: the records are older than the bytes, and "x" and "old" are other files' by now.
    original = storage.get_original("a")
    for path in ("x", "y", "z"):
        await storage.save(path, b"as recorded")
    await storage.journal.mark(await storage.get("x"), lease=0.0)
    await storage.journal.mark(await storage.get("y"), lease=0.0)
    surplus = Place("a", "old", "surplus")
    await storage.journal.change(await storage.get("z"), {"places": (surplus,)}, lease=0.0)
    await original.discard("x")
    await original.write("x", b"of Bob", token="tokenOfBobs1")
    await original.write("old", b"of Bob", token="tokenOfBobs2")
    report = await reconcile(storage, dry_run=False, force=True)
    assert report.counts == {"deleted": 1, "failed": 2}
    assert not report.clean
    assert await keys_of(original) == ["old", "x", "z"]
    assert (await storage.get("z")).places == (surplus,), "what stays is named"


@pytest.mark.parametrize("verb", ["replace", "delete"])
async def test_what_force_leaves_of_an_adopted_file_is_named_until_it_is_gone(make: Make, verb: str) -> None:
    storage = make(settle=0.0, lease=0.01, keep_replaced=0.001)
    original = storage.get_original("a")
    await original.write("x", b"adopted", token="tokenOfaSave")
    record = await storage.get(await storage.adopt("x"))
    if verb == "replace":  # and the process dies before the old bytes go
        surplus = Place("a", "x", "surplus")
        changes = {"original_storage_path": "y", "places": (surplus,)}
        await original.write("y", b"new", token=record.token)
        await storage.journal.change(record, changes, lease=60.0)
    else:
        await storage.journal.mark(record, lease=60.0)
    tells = original.capabilities.tokens
    assert (await reconcile(storage, dry_run=False, force=True)).counts.keys() == {
        "failed" if tells else "cleared" if verb == "replace" else "deleted"
    }
    assert ("x" in await keys_of(original)) == tells
    while await storage.meta.list_unfinished(force=True):
        await reconcile(storage, dry_run=False)  # once the lease is over
    assert await keys_of(original) == (["y"] if verb == "replace" else [])


@pytest.mark.parametrize("dry_run", [True, False])
async def test_after_a_restore_no_bytes_are_removed(storage: ProxyStorage, dry_run: bool) -> None:
    original = storage.get_original("a")
    await leave_pending(storage, "half", lease=60.0)
    for path in ("x", "z"):
        await storage.save(path, b"as recorded")
    await storage.journal.mark(await storage.get("x"))
    record = await storage.replace("z", b"newer")
    assert [place.state for place in record.all_places()] == ["good", "surplus"]
    keys = await keys_of(original)
    report = await reconcile(storage, restored=True, scan=True, min_age=0.0, dry_run=dry_run)
    assert report.counts.items() >= {"undone": 1, "deleted": 1, "cleared": 1}.items()
    assert await keys_of(original) == keys
    left = [found async for found in storage.list()]
    assert [(found.path, found.lease is None, len(found.all_places())) for found in left] == [
        ("z", not dry_run, 2 if dry_run else 1)
    ]
    assert len(await storage.meta.list_unfinished(force=True)) == (3 if dry_run else 0)
    if not dry_run:
        await storage.tidy()
        assert await keys_of(original) == keys
        assert report.counts["removed"] == 3  # would be: the page tells to look at them


async def test_older_than_leaves_what_ran_out_just_now(storage: ProxyStorage) -> None:
    await leave_pending(storage, "x", lease=-100.0)
    assert (await reconcile(storage, older_than=200.0)).counts == {}
    assert (await reconcile(storage, older_than=50.0)).counts == {"undone": 1}


async def test_undo_leaves_a_foreign_object_at_the_key(storage: ProxyStorage) -> None:
    original = storage.get_original("a")
    put_foreign(original, "x", b"was here before, with no token")
    record = MetaRecord("x", "media", "a", "x", state="pending", token="tokenOfADead", version=1)
    await storage.meta.create(record, lease=0.0)
    await reconcile(storage, dry_run=False, force=True)
    assert await storage.meta.count() == 0
    assert await keys_of(original) == ["x"]


async def test_undo_leaves_the_bytes_of_a_renamed_file(storage: ProxyStorage) -> None:
    await storage.save("x", b"kept")
    record = await storage.rename("x", "y")
    ghost = replace(record, path="x", state="pending", token=record.token, version=1)
    await storage.meta.create(ghost, lease=0.0)  # a reservation that a driver sent twice
    await reconcile(storage, dry_run=False, force=True)
    assert await content_of(storage, "y") == b"kept"


async def test_an_interrupted_delete_is_finished(make: Make) -> None:
    storage = make(settle=0.0, lease=0.5, keep_replaced=0.0)
    for path in ("saved", "adopted"):
        await storage.get_original("a").write(path, b"x") if path == "adopted" else await make().save(path, b"x")
    await storage.adopt("adopted")
    for path in ("saved", "adopted"):
        await storage.journal.mark(await storage.get(path))
        with pytest.raises(NotFound):
            await storage.delete(path)  # the second deleter touches nothing
    assert await keys_of(storage.get_original("a")) == ["adopted", "saved"]
    while await storage.meta.count():
        await storage.tidy()
    assert await keys_of(storage.get_original("a")) == []


async def test_an_abandoned_replacement_is_cleared(make: Make) -> None:
    storage = make(settle=0.0, lease=0.5, keep_replaced=0.0)
    record = await storage.get(await make().save("x", b"old"))
    abandoned = Place("b", "x_abandoned", "doubtful")
    named = await storage.journal.change(record, {"places": (abandoned,)}, lease=0.0)
    await storage.get_original("b").write("x_abandoned", b"new", token=record.token)
    assert (await reconcile(storage, dry_run=False)).counts == {"settling": 1}
    while (await storage.get("x")).lease is not None:
        await storage.tidy()
    after = await storage.get("x")
    assert (after.places, after.version > named.version) == ((), True)
    assert await keys_of(storage.get_original("b")) == []
    assert await content_of(storage, "x") == b"old"


async def test_scan_removes_only_what_nobody_knows_and_this_library_wrote(make: Make) -> None:
    storage = make()
    other_meta = MemoryMetaBackend()
    other = ProxyStorage("other", originals=storage.originals, meta=other_meta)
    original = storage.get_original("a")
    await storage.save("known", b"1")
    await other.save("of another", b"2")
    await original.write("orphan", b"3", token="tokenOfADead")
    put_foreign(original, "foreign", b"4")
    young = await reconcile(storage, scan=True)
    assert young.counts == {"young": 3}
    report = await reconcile(storage, scan=True, min_age=0.0, dry_run=False, metas=[other_meta])
    assert {(finding.action, finding.path) for finding in report.findings} == {
        ("removed", "orphan"),
        ("foreign", "foreign"),
    }
    assert not report.clean
    assert sorted(await keys_of(original)) == ["foreign", "known", "of another"]


async def test_scan_spares_a_storage_that_knows_the_original_by_another_name(make: Make) -> None:
    first = make("first")
    second = make("second", originals={"disk": first.get_original("a")})
    await first.save("x", b"1")
    await second.save("y", b"2")
    await first.get_original("b").write("x", b"orphan", token="tokenOfADead")  # the same key, another object
    for storage in (first, second):
        report = await reconcile(storage, scan=True, min_age=0.0, dry_run=False)
        assert report.counts == ({"removed": 1} if storage is first else {})
    assert await content_of(first, "x") == b"1"
    assert await content_of(second, "y") == b"2"


@pytest.mark.parametrize("alias", [True, False])
@pytest.mark.parametrize("former", ["default", ""])
async def test_scan_spares_files_of_an_original_that_had_another_name(make: Make, alias: bool, former: str) -> None:
    disk = make().get_original("a")
    before = make(originals={"default": disk})
    await before.save("x", b"1")
    if not former:  # as in the tables of django-proxy-storage
        await before.meta.update("x", {"original_storage_name": ""})
    now = make(originals={"disk": disk, "default": disk} if alias else {"disk": disk})
    report = await reconcile(now, scan=True, min_age=0.0, dry_run=False)
    assert report.counts == {}
    assert await content_of(before, "x") == b"1"


def in_directories(root: Path) -> tuple[Backend, Backend]:
    return FileSystemBackend(root), FileSystemBackend(root / "private")


def behind_a_link(root: Path) -> tuple[Backend, Backend]:
    (root / "real").mkdir()
    (root / "link").symlink_to("real")
    return FileSystemBackend(root / "link"), FileSystemBackend(root / "real" / "private")


def with_prefixes(root: Path) -> tuple[Backend, Backend]:
    bucket = MemoryStore()
    return ObstoreBackend(bucket), ObstoreBackend(bucket, prefix="private")


def of_two_kinds(root: Path) -> tuple[Backend, Backend]:
    return ObstoreBackend(LocalStore(root)), FileSystemBackend(root / "private")


def behind_a_link_of_two_kinds(root: Path) -> tuple[Backend, Backend]:
    (root / "around" / "private").mkdir(parents=True)
    (root / "link").symlink_to(root / "around" / "private")
    return FileSystemBackend(root / "around"), ObstoreBackend(LocalStore(root / "link"))


@pytest.mark.parametrize(
    "nested", [in_directories, behind_a_link, with_prefixes, of_two_kinds, behind_a_link_of_two_kinds]
)
@pytest.mark.parametrize("one_table", [True, False])
async def test_a_scan_spares_files_of_an_original_inside_or_around_it(
    nested: Callable[[Path], tuple[Backend, Backend]], one_table: bool, tmp_path: Path
) -> None:
    around, within = nested(tmp_path)
    meta = MemoryMetaBackend()
    outer = ProxyStorage("outer", originals=around, meta=meta)
    inner = ProxyStorage("inner", originals=within, meta=meta if one_table else MemoryMetaBackend())
    async with outer, inner:
        await outer.save("public.txt", b"1")
        await outer.save("private/around.txt", b"22")
        await inner.save("secret.txt", b"333")
        await inner.save("deep/er/secret.txt", b"4444")
        await around.write("public/secret.txt", b"of nobody", token="tokenOfADead")
        await around.write("private/orphan", b"of nobody", token="tokenOfADead")
        for storage, other in ((outer, inner), (inner, outer)):
            report = await reconcile(storage, scan=True, min_age=-1.0, dry_run=False, storages=[other])
            removed = {each.path for each in report.findings if each.action == "removed"}
            assert removed == ({"public/secret.txt", "private/orphan"} if storage is outer else set())
            assert report.clean
        assert await content_of(outer, "public.txt") == b"1"
        assert await content_of(outer, "private/around.txt") == b"22"
        assert await content_of(inner, "secret.txt") == b"333"
        assert await content_of(inner, "deep/er/secret.txt") == b"4444"


async def test_a_scan_spares_what_a_storage_may_have_that_it_does_not_know(tmp_path: Path) -> None:
    """The records are in the same table; where the original of that storage lies nobody here can say."""
    around, within = in_directories(tmp_path)
    meta = MemoryMetaBackend()
    outer, inner = (ProxyStorage(name, originals=at, meta=meta) for name, at in (("o", around), ("i", within)))
    await inner.save("secret.txt", b"x")
    await around.write("orphan", b"of nobody", token="tokenOfADead")
    assert (await reconcile(outer, scan=True, min_age=-1.0, dry_run=False)).counts == {"removed": 1}
    assert await content_of(inner, "secret.txt") == b"x"


async def test_a_scan_spares_nested_originals_of_one_storage(tmp_path: Path) -> None:
    around, within = in_directories(tmp_path)
    storage = ProxyStorage("two", originals={"public": around, "private": within}, meta=MemoryMetaBackend())
    path = await storage.save("cv.pdf", b"%PDF", using="private")
    assert (await reconcile(storage, scan=True, min_age=-1.0, dry_run=False)).counts == {}
    assert await content_of(storage, path) == b"%PDF"


@pytest.mark.parametrize("how", ["metas", "registered"])
async def test_a_scan_takes_no_storage_of_the_same_name_for_that_of_a_record(
    how: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Records of another project, whose storage has the name of one that is known here."""
    around, within = in_directories(tmp_path)
    ours = ProxyStorage("media" if how == "metas" else "ours", originals=around, meta=MemoryMetaBackend())
    theirs = ProxyStorage("media", originals=within, meta=MemoryMetaBackend())
    if how == "registered":
        elsewhere = ProxyStorage("media", originals=around, meta=MemoryMetaBackend())
        monkeypatch.setattr("aproxy_storage.registry._storages", {"media": elsewhere})
    await ours.save("logo.png", b"ours")
    await theirs.save("logo.png", b"and theirs")
    await around.write("orphan", b"of nobody", token="tokenOfADead")
    await around.write("a/logo.png", b"of nobody", token="tokenOfADead")
    report = await reconcile(ours, scan=True, min_age=-1.0, dry_run=False, metas=[theirs.meta])
    assert [each.path for each in report.findings] == ["orphan"]
    assert await content_of(theirs, "logo.png") == b"and theirs"


async def test_a_scan_spares_what_a_record_has_lost(tmp_path: Path) -> None:
    """A storage was given another place, and its bytes have not been moved there yet."""
    around, within = in_directories(tmp_path)
    meta = MemoryMetaBackend()
    await ProxyStorage("inner", originals=within, meta=meta).save("secret.txt", b"x")
    moved = ProxyStorage("inner", originals=FileSystemBackend(tmp_path / "new"), meta=meta)
    outer = ProxyStorage("outer", originals=around, meta=meta)
    assert (await reconcile(outer, scan=True, min_age=-1.0, dry_run=False, storages=[moved])).counts == {}
    assert await keys_of(within) == ["secret.txt"]


class Folding(MemoryBackend):
    """Gives a file by all spellings of its key that are `fold`ed to the same, and keeps the first of each directory."""

    def __init__(self, fold: Callable[[str], str]) -> None:
        super().__init__()
        self.fold = fold
        self.kept: dict[str, str] = {}

    def _real(self, key: str) -> str:
        real = ""
        for part in key.split("/"):
            real = self.kept.get(self.fold(real + part), real + part) + "/"
        return real[:-1]

    def _get(self, key: str) -> _Object:
        return super()._get(self._real(key))

    def _insert(self, found: _Object) -> ObjectInfo:
        key = self._real(found.info.key)
        for at in (*(at for at, sign in enumerate(key) if sign == "/"), len(key)):
            self.kept.setdefault(self.fold(key[:at]), key[:at])
        return super()._insert(replace(found, info=replace(found.info, key=key)))


def below_media(key: str) -> str:
    return key[:6] + key[6:].lower() if key.startswith("media/") else key


def nfc(key: str) -> str:
    return unicodedata.normalize("NFC", key)


def ascii_only(key: str) -> str:
    return "".join(sign.lower() if sign.isascii() else sign for sign in key)


@pytest.mark.parametrize(
    ("fold", "there", "path", "told"),
    [
        (str.casefold, "Photos/a.jpg", "photos/b.jpg", 1),
        (str.lower, "Stra\xdfe/a.jpg", "stra\xdfe/b.jpg", 1),
        (str.lower, "\xc4/1", "\xe4/2", 1),  # the only letter
        (ascii_only, "A\xe4/1", "a\xe4/2", 1),
        (below_media, "media/2024/P/a.jpg", "media/2024/p/b.jpg", 1),
        (nfc, "e\u0301/a", "\xe9/b", 0),  # what has but one other form is looked for under that
        (nfc, "e\u0301/a", "\xe9/e\u0301", 1),
    ],
)
async def test_a_scan_spares_what_the_original_gives_by_another_spelling(
    fold: Callable[[str], str], there: str, path: str, told: int
) -> None:
    original = Folding(fold)
    storage = ProxyStorage("media", originals=original, meta=MemoryMetaBackend())
    await storage.save(there, b"first")
    await storage.save(path, b"second")
    report = await reconcile(storage, scan=True, min_age=-1.0, dry_run=False)
    assert report.counts == ({"ambiguous": told} if told else {})
    assert report.clean
    assert await content_of(storage, path) == b"second"


async def test_a_scan_removes_orphans_beside_other_spellings_of_their_keys() -> None:
    """Where both are objects, neither is the other."""
    original = MemoryBackend()
    storage = ProxyStorage("media", originals=original, meta=MemoryMetaBackend())
    names = ["Photos/b.jpg", "\xe9"]
    for name in names:
        await storage.save(name, b"1")
        await original.write(unicodedata.normalize("NFD", name).lower(), b"1", token="tokenOfADead")
    assert (await reconcile(storage, scan=True, min_age=-1.0, dry_run=False)).counts == {"removed": 2}
    assert sorted(await keys_of(original)) == names


async def test_a_scan_removes_only_what_it_has_looked_at(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    storage = make()
    original = storage.get_original("a")
    await original.write("x", b"orphan", token="tokenOfADead")
    discard = original.discard

    async def after_another_scan(key: str, **options: Any) -> None:
        monkeypatch.undo()
        await discard(key)
        await storage.save("x", b"new")
        await discard(key, **options)

    monkeypatch.setattr(original, "discard", after_another_scan)
    await reconcile(storage, scan=True, min_age=0.0, dry_run=False)
    assert await content_of(storage, "x") == b"new"


async def test_verify_reports_every_file(storage: ProxyStorage) -> None:
    for name in ("good", "flipped", "gone"):
        await storage.save(name, b"content")
    original = storage.get_original("a")
    await original.write("adopted", b"no checksum")
    await storage.adopt("adopted")
    await original.discard("flipped")
    await original.write("flipped", b"c0ntent")
    await original.discard("gone")
    results = {result.item: result.error async for result in verify(storage)}
    assert results.keys() == {"good", "flipped", "gone", "adopted"}
    assert results["good"] is None
    for name, word in (("flipped", "differ"), ("gone", "gone"), ("adopted", "no checksum")):
        error = results[name]
        assert isinstance(error, IntegrityError)
        assert word in str(error)


async def test_verify_yields_in_order_so_that_it_can_be_resumed() -> None:
    """What has been said is everything up to there, however long an earlier file takes."""
    late = asyncio.Event()

    class Slow(MemoryBackend):
        async def _read(self, key: str, byte_range: ByteRange | None, chunk_bytes: int) -> Reader:
            if key == "a":
                await late.wait()
            elif key == "d":
                late.set()
            return await super()._read(key, byte_range, chunk_bytes)

    storage = ProxyStorage("media", originals=Slow(), meta=MemoryMetaBackend())
    for name in "abcde":
        await storage.save(name, name.encode())
    results = verify(storage, concurrency=2)
    first = await anext(results)
    await results.aclose()
    assert first.item == "a"
    assert [result.item async for result in verify(storage, after=first.item, concurrency=2)] == ["b", "c", "d", "e"]


async def test_verify_reads_not_far_ahead_of_a_slow_file(monkeypatch: pytest.MonkeyPatch) -> None:
    go_on, read = asyncio.Event(), []

    class Slow(MemoryBackend):
        async def _read(self, key: str, byte_range: ByteRange | None, chunk_bytes: int) -> Reader:
            read.append(key)
            if key == "00":
                await go_on.wait()
            return await super()._read(key, byte_range, chunk_bytes)

    storage = ProxyStorage("media", originals=Slow(), meta=MemoryMetaBackend())
    for number in range(50):
        await storage.save(f"{number:02}", b"x")
    monkeypatch.setattr("aproxy_storage.tools.verify._AHEAD", 10)
    results = verify(storage, concurrency=3)
    first = asyncio.ensure_future(anext(results))
    for _ in range(2000):
        await asyncio.sleep(0)
    assert 3 < len(read) <= 13
    go_on.set()
    assert (await first).item == "00"
    assert [result.item async for result in results] == [f"{number:02}" for number in range(1, 50)]


@pytest.mark.parametrize("algorithm", ["sha256", "md5"])
async def test_verify_records_missing_checksums(make: Make, algorithm: str) -> None:
    storage = make(checksum=algorithm)
    original = storage.get_original("a")
    contents = {"empty": b"", "large": b"x" * 3_000_000, "small": b"x"}
    for name, data in contents.items():
        await original.write(name, data)
        await storage.adopt(name)
    await storage.save("z", b"y")
    before = [record.revision async for record in storage.list()]
    results = [result async for result in verify(storage, record_missing=True)]
    assert [(result.item, result.error) for result in results] == [(name, None) for name in (*contents, "z")]
    for name, data in contents.items():
        assert (await storage.get(name)).checksum == f"{algorithm}:{hashlib.new(algorithm, data).hexdigest()}"
    assert [record.revision async for record in storage.list()] == before, "the bytes are what they were"
    assert [result.value for result in results] == [record async for record in storage.list()]
    assert [result.error async for result in verify(storage)] == [None] * 4
    await original.discard("small")
    await original.write("small", b"z")
    damaged = [result.item async for result in verify(storage, record_missing=True) if not result.ok]
    assert damaged == ["small"]


async def test_verify_records_no_wrong_checksum() -> None:
    """Of a file that is replaced while it is read the record is not given the checksum of the old bytes."""

    class Meddling(MemoryBackend):
        async def _read(self, key: str, byte_range: ByteRange | None, chunk_bytes: int) -> Reader:
            reader = await super()._read(key, byte_range, chunk_bytes)
            if key == "a":
                await storage.replace("a", b"new bytes")
            elif key == "b":
                await storage.delete("b")
            return reader

    storage = ProxyStorage("media", originals=Meddling(), meta=MemoryMetaBackend(), keep_replaced=600.0)
    for key in "ab":
        await storage.get_original("default").write(key, b"old")
        await storage.adopt(key)
    results = {result.item: result.error async for result in verify(storage, record_missing=True, concurrency=1)}
    assert results == {"a": None}
    assert (await storage.get("a")).checksum == f"sha256:{hashlib.sha256(b'new bytes').hexdigest()}"


async def test_verify_records_nothing_for_a_storage_without_checksums() -> None:
    storage = ProxyStorage("media", originals=MemoryBackend(), meta=MemoryMetaBackend(), checksum=None)
    with pytest.raises(ConfigurationError, match="computes no checksums"):
        await anext(verify(storage, record_missing=True))


async def test_a_reconcile_that_is_overtaken_moves_on(storage: ProxyStorage) -> None:
    record = await leave_pending(storage, "x", lease=0.0)
    await storage.meta.update("x", {"version": 2}, expect=Revision(record.token, 1))
    assert await storage.journal.finish(record) == "moved on"
    assert await keys_of(storage.get_original("a")) == ["x"]


async def test_tidy_begins_nothing_when_its_time_is_over(make: Make) -> None:
    storage = make(timeouts=Timeouts(cleanup=1e-9))
    await leave_pending(storage, "x", lease=0.0)
    assert await storage.tidy() == 0
    assert await keys_of(storage.get_original("a")) == ["x"]
    assert await make().tidy() == 1


async def test_tidy_goes_on_after_a_record_that_it_cannot_finish(
    make: Make, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    storage = make()
    for path in ("first", "second", "third"):
        await leave_pending(storage, path, lease=0.0)
    finish = storage.journal.finish

    async def refuse(record: MetaRecord) -> str:
        if record.path == "first":
            raise ConfigurationError("there is no such original any more")
        return await finish(record)

    monkeypatch.setattr(storage.journal, "finish", refuse)
    with caplog.at_level(logging.WARNING):
        assert await storage.tidy() == 2
    assert "'first' could not be finished: there is no such original any more" in caplog.text
    assert await keys_of(storage.get_original("a")) == ["first"]


async def test_tidy_goes_on_after_a_record_of_an_original_that_was_removed(make: Make) -> None:
    storage = make()
    left = await leave_pending(storage, "first", lease=0.0)
    await storage.meta.update("first", {"original_storage_name": "removed"}, expect=left.revision)
    await leave_pending(storage, "second", lease=0.0)
    await storage.tidy()
    assert await keys_of(storage.get_original("a")) == ["first"], "the second one was undone"


@pytest.mark.parametrize("verb", ["save", "replace", "delete"])
async def test_a_period_tidies_up_while_the_storage_is_in_use(make: Make, verb: str) -> None:
    plain, busy = make(), make(tidy_every=3600.0)
    await plain.save("x", b"")
    for name in ("left", "behind"):
        await leave_pending(plain, name, lease=0.0)
        # The first verb begins one at once, further ones not before the hour is over.
        await (busy.delete("x") if verb == "delete" else getattr(busy, verb)("x", b"new"))
        await busy.cleanup.drain(within=30.0)
        if verb == "delete":
            await plain.save("x", b"")
    assert [await plain.meta.count(state=state) for state in ("pending", "deleting")] == [1, 1]


async def test_a_period_that_is_none_or_fails_leaves_the_verbs_alone(make: Make) -> None:
    with pytest.raises(ConfigurationError, match="tidy_every=0"):
        make(tidy_every=0)
    quiet, failing = make(), make(tidy_every=1e-9)
    await leave_pending(quiet, "left", lease=0.0)
    await quiet.save("x", b"")
    await quiet.cleanup.drain(within=30.0)
    assert await quiet.meta.count(state="pending") == 1

    async def fails(**options: Any) -> Any:
        raise BackendUnavailable("gone")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(failing.meta, "list_unfinished", fails)
        assert await failing.save("x", b"") != "x"
        await failing.cleanup.drain(within=30.0)


class RefusingMeta(MemoryMetaBackend):
    """Has a rule that refuses changes of the record of ``x``, from the `after`-th on."""

    after: int | None = None

    async def _update(self, path: str, *args: Any) -> Any:
        if self.after is not None and path == "x":
            self.after -= 1
            if self.after < 0:
                raise Conflict("CHECK constraint files_places_ck failed", retryable=False)
        return await super()._update(path, *args)


@pytest.mark.parametrize("after", [0, 1])
async def test_a_rule_of_the_database_is_told_and_not_taken_for_somebody_else(after: int) -> None:
    meta, original = RefusingMeta(), MemoryBackend()
    storage = ProxyStorage("media", originals=original, meta=meta, keep_replaced=0.001)
    await storage.save("x", b"old")
    await storage.replace("x", b"new")
    meta.after = after
    with pytest.raises(Conflict, match="files_places_ck"):
        await storage.replace("x", b"newer")
    assert meta.after >= -2, "what is refused once is refused again"
    assert await content_of(storage, "x") == b"new"
    meta.after = 0
    report = await reconcile(storage, dry_run=False, force=True)
    assert report.counts == {"failed": 1}
    assert "files_places_ck" in str(report.findings[0].error)
    assert not report.clean
    meta.after = None
    await reconcile(storage, dry_run=False, force=True)
    assert len(await keys_of(original)) == 1


async def test_a_record_that_the_database_keeps_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    async def refuse(*_: Any, **__: Any) -> Any:
        raise Conflict("trigger files_keep", retryable=False)

    meta = MemoryMetaBackend()
    storage = ProxyStorage("media", originals=MemoryBackend(), meta=meta)
    await storage.save("x", b"abc")
    with monkeypatch.context() as context:
        context.setattr(meta, "delete", refuse)
        await storage.delete("x")
        report = await reconcile(storage, dry_run=False, force=True)
        assert report.counts == {"failed": 1}
        assert "files_keep" in str(report.findings[0].error)
    assert (await reconcile(storage, dry_run=False, force=True)).counts == {"deleted": 1}
    assert await meta.count() == 0
