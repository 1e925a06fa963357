"""Copying between storages and from originals: resumable, concurrent, names kept, failures told one by one."""

import asyncio
import hashlib
import os
from collections.abc import AsyncGenerator, AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import pytest
from obstore.store import MemoryStore

from aproxy_storage import (
    AccessDenied,
    AlreadyExists,
    BackendUnavailable,
    ConfigurationError,
    IntegrityError,
    InvalidPath,
    MetaRecord,
    Place,
    ProxyStorage,
)
from aproxy_storage.backends.base import Backend, Reader
from aproxy_storage.backends.filesystem import FileSystemBackend
from aproxy_storage.backends.memory import MemoryBackend
from aproxy_storage.backends.obstore import ObstoreBackend
from aproxy_storage.config import original_from_url
from aproxy_storage.meta_backends.memory import MemoryMetaBackend
from aproxy_storage.meta_backends.sqlite import SQLiteMetaBackend
from aproxy_storage.records import ByteRange, ObjectInfo
from aproxy_storage.tools.bulk import Result
from aproxy_storage.tools.migrate import Copied, _own_keys, copy_files
from aproxy_storage.tools.reconcile import reconcile

FILES = {"a.txt": b"first", "dir/b.png": b"\x89PNG\r\n\x1a\n" + b"x" * 3_000_000, "日本/空.bin": b"", "z": b"last"}


def storage(name: str = "media", **options: Any) -> ProxyStorage:
    return ProxyStorage(name, originals=MemoryBackend(), meta=MemoryMetaBackend(), **options)


async def filled(files: dict[str, bytes] = FILES, **options: Any) -> ProxyStorage:
    made = storage(**options)
    for name, data in files.items():
        await made.save(name, data)
    return made


async def bucket(files: dict[str, bytes] = FILES) -> MemoryBackend:
    made = MemoryBackend()
    for name, data in files.items():
        await made.write(name, data)
    return made


async def contents(target: ProxyStorage) -> dict[str, bytes]:
    found = {}
    async for record in target.list():
        async with target.open(record, verify=True) as file:
            found[record.path] = await file.read()
    return found


async def run(*args: Any, **options: Any) -> dict[str, Result[str, Copied]]:
    return {result.item: result async for result in copy_files(*args, **options)}


def actions(results: dict[str, Result[str, Copied]]) -> dict[str, str]:
    return {name: result.value.action if result.value else "failed" for name, result in results.items()}


@pytest.mark.asyncio
@pytest.mark.parametrize("records", [True, False], ids=["storage", "bucket"])
async def test_everything_is_copied_once(records: bool) -> None:
    source: Any = await filled() if records else await bucket()
    target = storage("staging")
    assert actions(await run(source, target)) == dict.fromkeys(FILES, "copied")
    assert await contents(target) == FILES
    record = await target.get("dir/b.png")
    assert record.content_type == "image/png"
    assert record.checksum == f"sha256:{hashlib.sha256(FILES['dir/b.png']).hexdigest()}"
    again = await run(source, target)
    assert actions(again) == dict.fromkeys(FILES, "skipped")
    assert (await target.get("dir/b.png")).revision == record.revision, "it was written again"


@pytest.mark.asyncio
async def test_names_are_kept_below_the_prefixes_of_both() -> None:
    source = await filled(prefix="live")
    target = storage("staging", prefix="stage", keys="token")
    results = await run(source, target, "dir/")
    assert {name: result.value.path for name, result in results.items() if result.value} == {
        "dir/b.png": "stage/dir/b.png"
    }
    results = await run(source, target, after="dir/b.png")
    assert set(results) == {"日本/空.bin", "z"}


@pytest.mark.asyncio
async def test_extra_fields_and_content_types_go_along() -> None:
    source = storage()
    await source.save("a", b"x", content_type="text/x-mine", extra={"author": "me"})
    target = storage("staging")
    await run(source, target)
    record = await target.get("a")
    assert (record.content_type, dict(record.extra)) == ("text/x-mine", {"author": "me"})


@pytest.mark.asyncio
async def test_another_file_of_that_name_is_a_conflict_of_that_file_alone() -> None:
    source, target = await bucket(), await filled({"a.txt": b"other", "z": b"lost"}, name="staging")
    results = await run(source, target)
    assert actions(results) == {"a.txt": "failed", "dir/b.png": "copied", "日本/空.bin": "copied", "z": "failed"}
    assert isinstance(results["a.txt"].error, AlreadyExists)
    assert (await contents(target))["a.txt"] == b"other"
    kept = await run(source, target, on_conflict="skip")
    assert (actions(kept)["a.txt"], (await contents(target))["z"]) == ("kept", b"lost")
    assert actions(await run(source, target, on_conflict="replace"))["a.txt"] == "replaced"
    assert await contents(target) == FILES
    with pytest.raises(ValueError, match="on_conflict"):
        await run(source, target, on_conflict="overwrite")


@pytest.mark.asyncio
async def test_checksums_of_different_kinds_are_compared_by_the_bytes() -> None:
    target = storage("staging", checksum=None)
    for source in (await filled(), await filled(checksum="md5"), await filled(checksum=None), await bucket()):
        results = await run(source, target, on_conflict="replace")
        assert set(actions(results).values()) <= {"copied", "skipped"}
    assert await contents_without_checksums(target) == FILES
    same_size = await filled({**FILES, "z": b"LAST"}, checksum="md5")
    assert actions(await run(same_size, target))["z"] == "failed"


async def contents_without_checksums(target: ProxyStorage) -> dict[str, bytes]:
    return {record.path: await read(target, record.path) async for record in target.list()}


async def read(target: ProxyStorage, path: str) -> bytes:
    async with target.open(path) as file:
        return await file.read()


def reservation(path: str, **fields: Any) -> MetaRecord:
    """What a save leaves in the records that was killed before its bytes were written."""
    given = {"proxy_storage_name": "staging", "original_storage_name": "default", "state": "pending", **fields}
    return MetaRecord(path=path, original_storage_path=path, token="abandoned", version=1, **given)


@pytest.mark.asyncio
async def test_what_a_killed_run_was_amid_is_told_with_the_way_out() -> None:
    source, target = await bucket(), storage("staging")
    record = reservation("z")
    await target.meta.reserve(record, lease=600.0, spare=record)
    results = await run(source, target)
    assert isinstance(results["z"].error, AlreadyExists)
    assert "'z' is taken until " in str(results["z"].error)
    assert "reconcile --apply --force frees it now" in str(results["z"].error)
    await reconcile(target, dry_run=False, force=True)
    assert actions(await run(source, target))["z"] == "copied"


@pytest.mark.asyncio
async def test_what_is_over_is_cleared_away_before_the_copy() -> None:
    source, target = await bucket(), storage("staging")
    places = (Place("default", "z", "settling"),)
    await target.meta.create(reservation("z", state="deleting", places=places), lease=0.0)
    assert actions(await run(source, target)) == dict.fromkeys(FILES, "copied")


class Guarded(MemoryBackend):
    """Gives, lists and nothing else: what a read-only key allows. Some files it does not give."""

    denied: frozenset[str] = frozenset()
    opened = 0
    most = 0

    async def _read(self, key: str, byte_range: ByteRange | None, chunk_bytes: int) -> Any:
        self.opened += 1
        self.most = max(self.most, self.opened)
        try:
            await asyncio.sleep(0)
            if key in self.denied:
                raise AccessDenied(f"{key} is not for you")
            return await super()._read(key, byte_range, chunk_bytes)
        finally:
            self.opened -= 1

    def freeze(self, *denied: str) -> None:
        self.denied = frozenset(denied)

        async def refuse(*_: Any, **__: Any) -> Any:
            raise AssertionError("the source was written to")

        self._write = self._discard = self._copy = refuse  # type: ignore[method-assign]


@pytest.mark.asyncio
async def test_a_failed_file_is_told_with_its_reason_and_the_rest_goes_on() -> None:
    source = Guarded()
    for name, data in FILES.items():
        await source.write(name, data)
    source.freeze("dir/b.png")
    target = storage("staging")
    results = await run(source, target)
    assert isinstance(results["dir/b.png"].error, AccessDenied)
    assert await contents(target) == {name: data for name, data in FILES.items() if name != "dir/b.png"}
    source.denied = frozenset()
    assert actions(await run(source, target))["dir/b.png"] == "copied"


@pytest.mark.asyncio
async def test_the_causes_of_an_error_come_to_an_end() -> None:
    class Breaking(MemoryBackend):
        async def _read(self, key: str, byte_range: ByteRange | None, chunk_bytes: int) -> Any:
            async def broken() -> AsyncGenerator[bytes, None]:
                yield b"x"
                try:
                    raise ConnectionResetError("the line is dead")
                except OSError as error:
                    raise BackendUnavailable("it broke off") from error

            return Reader(self._get(key).info, broken())

    source = Breaking()
    await source.write("a", b"xx")
    error: BaseException | None = (await run(source, storage("staging")))["a"].error
    causes = []
    while error is not None and len(causes) < 10:
        causes.append(type(error))
        error = error.__cause__
    assert causes == [BackendUnavailable, ConnectionResetError]


@pytest.mark.asyncio
async def test_damaged_and_vanished_bytes_of_the_source() -> None:
    source = await filled()
    backend = source.get_original("default")
    await backend.discard("z")
    await backend.discard("a.txt")
    await backend.write("a.txt", b"FIRST")
    target = storage("staging")
    results = await run(source, target)
    assert isinstance(results["z"].error, IntegrityError)
    assert isinstance(results["a.txt"].error, IntegrityError)
    assert set(await contents(target)) == {"dir/b.png", "日本/空.bin"}


@pytest.mark.asyncio
async def test_files_deleted_meanwhile_are_no_failure() -> None:
    class Vanishing(MemoryBackend):
        async def _list(self, prefix: str, *, after: str | None, delimiter: str | None) -> AsyncIterator[ObjectInfo]:
            yield ObjectInfo("gone", size=3)

    assert actions(await run(Vanishing(), storage("staging"))) == {"gone": "gone"}


@pytest.mark.asyncio
async def test_a_name_that_cannot_be_asked_for_is_a_failure() -> None:
    """Such a file is not found under its name either, which does not make it a deleted one."""
    store = MemoryStore()
    names = ("back\\slash.txt", "line\u2028separator.txt")
    for name in ("a.txt", *names):
        store.put(name, b"x")
    results = await run(ObstoreBackend(store), storage("staging"))
    assert actions(results) == {"a.txt": "copied", **dict.fromkeys(names, "failed")}
    for name in names:
        assert isinstance(results[name].error, InvalidPath)


@pytest.mark.asyncio
async def test_many_names_are_read_no_further_ahead_than_needed() -> None:
    given = 0

    class Endless(Guarded):
        async def _list(self, prefix: str, *, after: str | None, delimiter: str | None) -> AsyncIterator[ObjectInfo]:
            nonlocal given
            while True:
                given += 1
                yield ObjectInfo(f"{given:09}", size=1)

        def _get(self, key: str) -> Any:
            return self._objects["any"]

    source = Endless()
    await source.write("any", b"x")
    results = copy_files(source, storage("staging"), concurrency=4)
    for _ in range(100):
        await anext(results)
    await results.aclose()
    assert given <= 100 + 3 * 4
    assert 1 < source.most <= 4


@pytest.mark.asyncio
async def test_interrupted_at_any_moment_it_goes_on(tmp_path: Path) -> None:
    files = {f"{number % 3}/{number}": bytes([number]) * 5000 for number in range(30)}
    source = await bucket(files)
    originals: Backend = FileSystemBackend(tmp_path)
    target = ProxyStorage("staging", originals=originals, meta=MemoryMetaBackend(), settle=0.0)
    for stop in count_up():
        results = copy_files(source, target, concurrency=5)
        seen = 0
        async for _ in results:
            seen += 1
            if seen == stop:
                break
        await results.aclose()
        if seen < stop:
            break
    assert await contents(target) == files
    await target.aclose()
    assert {str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*") if path.is_file()} == set(files)


def count_up() -> Iterator[int]:
    yield from (1, 3, 7, 15, 1000)


# -- the source is the target


def in_directory(root: Path, original: str = "files") -> ProxyStorage:
    meta = SQLiteMetaBackend(root / "records.sqlite3")
    return ProxyStorage("media", originals=FileSystemBackend(root / original), meta=meta)


@pytest.mark.parametrize("given", ["the directory", "a link to it", "through obstore", "the same object"])
@pytest.mark.asyncio
async def test_files_are_not_copied_into_the_original_that_they_lie_in(tmp_path: Path, given: str) -> None:
    async with in_directory(tmp_path) as target:
        (tmp_path / "files").mkdir()
        (tmp_path / "files" / "a.txt").write_text("x")
        os.symlink("files", tmp_path / "link")
        source: Backend = target.originals["default"]
        if given == "through obstore":
            source = ObstoreBackend(f"file://{tmp_path}/files")
        elif given != "the same object":
            source = FileSystemBackend(tmp_path / ("link" if given == "a link to it" else "files"))
        with pytest.raises(ConfigurationError, match=r"is the original 'default' .*ProxyStorage.adopt"):
            await run(source, target)
        assert os.listdir(tmp_path / "files") == ["a.txt"]


@pytest.mark.asyncio
async def test_from_one_original_to_another_of_the_same_storage(tmp_path: Path) -> None:
    old, new = FileSystemBackend(tmp_path / "old"), FileSystemBackend(tmp_path / "new")
    await old.write("a.txt", b"x")
    target = ProxyStorage("media", originals={"old": old, "new": new}, meta=MemoryMetaBackend())
    assert {result.value for result in (await run(old, target, using="new")).values()} == {Copied("copied", "a.txt", 1)}
    with pytest.raises(ConfigurationError):
        await run(old, target, using="old")


@pytest.mark.asyncio
async def test_what_is_the_targets_inside_of_the_source_is_left_out(tmp_path: Path) -> None:
    live = tmp_path / "live"
    source = FileSystemBackend(live)
    names = {"a.txt", "staging.txt", "staging/not/ours.txt", "staging/records.sqlite3.bak"}
    for name in names:
        await source.write(name, name.encode())
    async with in_directory(live, "staging/files") as target:
        for _ in range(2):
            assert set(await run(source, target)) == names
        assert await contents(target) == {name: name.encode() for name in names}


@pytest.mark.parametrize(
    ("source", "original", "is_same"),
    [
        ("s3://live/p", "s3://live/p/", True),
        ("s3://live/p", "obstore+s3://live/p", True),
        ("s3://live/p", "s3://live/p?endpoint_url=https://s3.example", False),
        ("s3://live/p?endpoint_url=https://s3.example/", "obstore+s3://K:S@live/p?endpoint=https://s3.example", True),
        (
            "s3://live/p?endpoint_url=https://S3.example:443",
            "obstore+s3://live/p?aws_endpoint=https://s3.example",
            True,
        ),
        ("s3://live/p?endpoint_url=http://s3.example:8333", "s3://live/p?endpoint_url=http://s3.example", False),
        ("s3://live/p?endpoint_url=https://s3.eu-central-1.amazonaws.com", "obstore+s3://live/p", True),
        ("s3://live/p", "s3://live/q", False),
        ("az://live?azure_storage_account_name=one", "az://live?account_name=one", True),
        ("az://live?account_name=one", "az://live?account_name=two", False),
        ("gridfs+mongodb://live/db", "gridfs+mongodb://staging/db", False),
    ],
)
@pytest.mark.asyncio
async def test_a_bucket_is_the_same_where_service_name_and_prefix_are(
    source: str, original: str, is_same: bool
) -> None:
    target = ProxyStorage("media", originals=original_from_url(original), meta=MemoryMetaBackend())
    if is_same:
        with pytest.raises(ConfigurationError, match=r"adopt"):
            _own_keys(original_from_url(source), target, None)
    else:
        assert _own_keys(original_from_url(source), target, None) == ((), ())


@pytest.mark.parametrize("scheme", ["s3", "obstore+s3"])
@pytest.mark.asyncio
async def test_a_bucket_of_the_environments_service_is_the_same(scheme: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Copied into itself it would grow for ever."""
    monkeypatch.setenv("AWS_ENDPOINT_URL_S3", "http://127.0.0.1:8333/")
    original = original_from_url("s3://live?endpoint_url=http://127.0.0.1:8333")
    target = ProxyStorage("media", originals=original, meta=MemoryMetaBackend())
    with pytest.raises(ConfigurationError, match=r"adopt"):
        _own_keys(original_from_url(f"{scheme}://live"), target, None)


@pytest.mark.asyncio
async def test_a_prefix_of_the_source_that_is_the_targets() -> None:
    target = ProxyStorage("media", originals=original_from_url("s3://live/staging"), meta=MemoryMetaBackend())
    assert _own_keys(original_from_url("s3://live"), target, None) == (("staging/",), ())
