"""BridgeStorage held to Django's contract, over a directory and records of every kind."""

import asyncio
import copy
import dataclasses
import gc
import io
import mmap
import os
import pickle
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from asgiref.sync import sync_to_async
from django.conf import settings
from django.core.exceptions import ImproperlyConfigured, SuspiciousFileOperation
from django.core.files.base import ContentFile, File
from django.core.files.storage import FileSystemStorage, Storage, storages
from django.core.files.uploadedfile import (
    InMemoryUploadedFile,
    SimpleUploadedFile,
    TemporaryUploadedFile,
)
from django.core.management import call_command
from django.db import connections
from django.test import override_settings
from django.utils.module_loading import import_string

from aproxy_storage import Conflict, ContentError, MetaRecord, NotFound, Place, ProxyStorage
from aproxy_storage.backends.filesystem import FileSystemBackend
from aproxy_storage.backends.memory import MemoryBackend
from aproxy_storage.meta_backends.memory import MemoryMetaBackend
from aproxy_storage.meta_backends.orm import ORMMetaBackend
from aproxy_storage.meta_backends.sqlite import SQLiteMetaBackend
from sync_bridge import BridgeStorage, SyncCallOnEventLoop, twins
from sync_bridge.bridge import bridge
from sync_bridge.files import FIRST_BYTES


@pytest.fixture(params=["sqlite", "sqlite over the bridge", "orm", "orm over the bridge", "memory"])
def storage(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[BridgeStorage]:
    direct = not request.param.endswith("over the bridge")
    if request.param.startswith("orm"):
        request.getfixturevalue("default")
        storages["default"].direct = direct
        yield storages["default"]
        storages["default"].direct = True
        return
    sqlite = request.param != "memory"
    proxy = ProxyStorage(
        f"test-{request.param}",
        originals=FileSystemBackend(tmp_path / "files", base_url="/media/") if sqlite else MemoryBackend(),
        meta=SQLiteMetaBackend(tmp_path / "records.sqlite3") if sqlite else MemoryMetaBackend(),
    )
    yield BridgeStorage(storage=proxy, base_url="/media/", direct=direct)
    bridge.call(proxy.aclose)


def content_of(storage: Storage, name: str) -> bytes:
    with storage.open(name) as file:
        data: bytes = file.read()
    return data


async def written(storage: BridgeStorage, name: str, data: bytes, mode: str = "wb") -> None:
    try:
        async with storage.aopen(name, mode) as file:
            await file.write(data)
    finally:
        await sync_to_async(connections.close_all)()


# -- saving and names


def test_what_is_saved_is_there_until_it_is_deleted(storage: BridgeStorage) -> None:
    assert not storage.exists("a/hello.txt")
    assert storage.save("a/hello.txt", ContentFile(b"Hello")) == "a/hello.txt"
    assert storage.exists("a/hello.txt")
    assert storage.size("a/hello.txt") == 5
    assert content_of(storage, "a/hello.txt") == b"Hello"
    storage.delete("a/hello.txt")
    assert not storage.exists("a/hello.txt")
    storage.delete("a/hello.txt")  # silent
    with pytest.raises(ValueError, match="name"):
        storage.delete("")
    with pytest.raises(FileNotFoundError):
        storage.size("a/hello.txt")
    with pytest.raises(FileNotFoundError):
        storage.open("a/hello.txt")


def test_a_taken_name_gives_way(storage: BridgeStorage) -> None:
    first, second = (storage.save("t/x.tar.gz", ContentFile(data)) for data in (b"1", b"2"))
    assert first == "t/x.tar.gz"
    assert second.startswith("t/x_")
    assert second.endswith(".tar.gz")
    assert len(second) == len(first) + 8
    assert [content_of(storage, path) for path in (first, second)] == [b"1", b"2"]


def test_max_length_is_kept_also_when_the_name_is_taken(storage: BridgeStorage) -> None:
    paths = {storage.save("d/" + "n" * 30 + ".txt", ContentFile(b"x"), max_length=20) for _ in range(3)}
    assert len(paths) == 3
    assert all(len(path) <= 20 and path.endswith(".txt") for path in paths)
    with pytest.raises(SuspiciousFileOperation):
        storage.save("a.txt", ContentFile(b"x"), max_length=3)


@pytest.mark.parametrize("name", ["../up.txt", "a/../../up.txt", "/etc/passwd", "a/..", "", ".", "..\\up.txt"])
def test_names_that_lead_out_are_refused(storage: BridgeStorage, name: str) -> None:
    with pytest.raises(SuspiciousFileOperation):
        storage.save(name, ContentFile(b"x"))
    with pytest.raises(SuspiciousFileOperation):
        storage.open(name, "wb")
    with pytest.raises(SuspiciousFileOperation):
        asyncio.run(storage.asave(name, b"x"))
    if ".." in name:
        for ask in (storage.exists, storage.size, storage.open, storage.delete, storage.listdir):
            with pytest.raises(SuspiciousFileOperation):
                ask(name)


def test_a_directory_exists_while_there_is_a_file_below_it(storage: BridgeStorage) -> None:
    """So that code for FileSystemStorage, which asks before it lists, works."""
    directories = ("thumbs", "thumbs/", Path("thumbs/40"), "./thumbs//40")
    other = ("th", "thumbs/4", "thumbs/40/a.jpg/", "no", "a\x00b", "a\udcff", "n" * 10_000)

    def asked(names: Iterable[str | Path], ask: Callable[[Any], Any] = storage.exists) -> list[bool]:
        return [ask(name) for name in names]

    assert asked(["", ".", *directories]) == [True, True, *[False] * 4], "before there is any file"
    storage.save("thumbs/40/a.jpg", ContentFile(b"x"))
    assert asked(["", ".", *directories]) == [True] * 6
    assert not any(asked(other))

    async def main() -> None:
        try:
            assert [await storage.aexists(name) for name in ("", ".", *directories)] == [True] * 6
            assert not any([await storage.aexists(name) for name in other])
        finally:
            await sync_to_async(connections.close_all)()
            await storage.proxy.aclose()

    asyncio.run(main())
    assert not bridge.call(storage.proxy.exists, "thumbs"), "there it is about files"
    for found in ("thumbs", "no"):
        if storage.exists(found):
            for directory in storage.listdir(found)[0]:
                for name in storage.listdir(f"{found}/{directory}")[1]:
                    storage.delete(f"{found}/{directory}/{name}")
    assert asked(["", *directories]) == [True, *[False] * 4]


def test_directories_exist_with_a_prefix_and_without_what_others_store(tmp_path: Path) -> None:
    meta = MemoryMetaBackend()
    ours, theirs = (
        BridgeStorage(storage=ProxyStorage(name, originals={name: MemoryBackend()}, meta=meta, prefix=prefix))
        for name, prefix in (("ours", "site/media/"), ("theirs", "site/other/"))
    )
    theirs.save("t/x.txt", ContentFile(b"x"))
    names = ["", "site", "site/media", "site/media/t", "site/other", "site/other/t", "t"]
    assert [ours.exists(name) for name in names] == [True, *[False] * 6]
    ours.save("t/x.txt", ContentFile(b"x"))
    assert [ours.exists(name) for name in names] == [True, True, True, True, False, False, False]


def test_a_directory_takes_no_name(tmp_path: Path) -> None:
    """An original that has none keeps a file beside what lies below its name, as S3 does."""

    class Choosing(BridgeStorage):
        def get_alternative_name(self, file_root: str, file_ext: str) -> str:
            return super().get_alternative_name(file_root, file_ext)

    storage = Choosing(storage=ProxyStorage("no-directories", originals=MemoryBackend(), meta=MemoryMetaBackend()))
    for name in ("a/x", "b/x"):
        storage.save(name, ContentFile(b"x"))
    assert storage.is_name_available("a")
    assert storage.save("a", ContentFile(b"1")) == "a"
    with storage.open("b", "x") as file:
        file.write("2")
    assert (content_of(storage, "a"), content_of(storage, "b"), content_of(storage, "b/x")) == (b"1", b"2", b"x")


def test_a_name_that_cannot_be_stored_is_suspicious_and_no_file(storage: BridgeStorage) -> None:
    with pytest.raises(SuspiciousFileOperation, match="control"):
        storage.save("line\nbreak.txt", ContentFile(b"x"))
    assert storage.listdir("") == ([], [])


@pytest.mark.parametrize("name", ["x//y.txt", "./x/y.txt", "x/./y.txt", "x\\y.txt"])
def test_what_means_nothing_in_a_name_is_left_out(storage: BridgeStorage, name: str) -> None:
    assert asyncio.run(storage.asave(name, b"1")) == "x/y.txt"
    storage.delete("x/y.txt")
    assert storage.save(name, ContentFile(b"1")) == "x/y.txt"
    assert storage.rename("x\\y.txt", name.replace("y", "z")).path == "x/z.txt"
    assert storage.copy("x/z.txt", name) == "x/y.txt"
    assert storage.replace("x\\y.txt", b"22").size == 2
    assert [record and record.path for record in storage.get_many(["x\\y.txt", "../y"])] == ["x/y.txt", None]


@pytest.mark.parametrize("name", ["x//y.txt", "./x/y.txt"])
def test_what_means_nothing_in_a_name_finds_the_file_too(storage: BridgeStorage, name: str) -> None:
    with storage.open(name, "xb") as file:
        file.write(b"1")
    with storage.open(name, "ab") as file:
        file.write(b"2")
    assert file.record.path == file.name == "x/y.txt"
    assert storage.publish(name, b"123").path == "x/y.txt"
    assert storage.exists(name)
    assert storage.size(name) == 3
    assert content_of(storage, name) == b"123"
    assert storage.listdir("./x") == ([], ["y.txt"])
    assert storage.get(name).path == storage.get_many([name])[0].path == "x/y.txt"
    assert storage.update(name, extra={"tag": "x"})["tag"] == "x"
    storage.replace(name, b"1")
    assert storage.get_created_time(name)

    async def main() -> None:
        try:
            async with storage.aopen(name, "wb") as file:
                await file.write(b"12")
            assert await storage.aexists(name)
            assert await storage.asize(name) == 2
            async with storage.aopen(name) as file:
                assert await file.read() == b"12"
            await storage.adelete(name)
        finally:
            await sync_to_async(connections.close_all)()
            await storage.proxy.aclose()

    asyncio.run(main())
    assert not storage.exists("x/y.txt")
    storage.save(name, ContentFile(b"1"))
    storage.delete(name)
    assert not storage.exists("x/y.txt")


def test_a_record_with_such_a_name_goes_first(storage: BridgeStorage) -> None:
    record = storage.get(storage.save("o.txt", ContentFile(b"old")))
    bridge.call(storage.proxy.meta.update, record.path, {"path": "x//y.txt"}, expect=record.revision)
    storage.save("x/y.txt", ContentFile(b"new"))
    assert content_of(storage, "x//y.txt") == b"old"
    assert content_of(storage, "./x/y.txt") == b"new"
    storage.delete("x//y.txt")
    assert content_of(storage, "x//y.txt") == b"new"


def test_a_name_that_cannot_be_stored_is_suspicious_for_every_verb(storage: BridgeStorage) -> None:
    storage.save("a.txt", ContentFile(b"1"))
    for change in (storage.rename, storage.copy):
        for name in ("../a", "a\x00b"):
            with pytest.raises(SuspiciousFileOperation):
                change("a.txt", name)
    with pytest.raises(SuspiciousFileOperation), storage.open("a\x00b", "wb") as file:
        file.write(b"1")
    with pytest.raises(SuspiciousFileOperation):
        asyncio.run(written(storage, "a\x00b", b"1"))


def test_a_storage_is_copied_and_pickled_before_and_after_use(default: object, tmp_path: Path) -> None:
    storage = BridgeStorage(location=tmp_path / "o", name="o")
    for _ in range(2):
        for again in (pickle.loads(pickle.dumps(storage)), copy.deepcopy(storage), copy.copy(storage)):
            assert again is not storage
            assert again.deconstruct() == storage.deconstruct()
            assert again.proxy is storage.proxy  # in one process
        storage.save("a.txt", ContentFile(b"1"))
    with override_settings(MEDIA_URL="/elsewhere/"):
        assert again.url("a.txt") == "/elsewhere/a.txt"
    live = BridgeStorage(storage=storage.proxy)
    assert copy.deepcopy(live).proxy is storage.proxy


def test_paths_are_taken_and_text_is_given_back(storage: BridgeStorage) -> None:
    path = storage.save(Path("d") / "p.txt", ContentFile(b"x"))
    assert (path, type(path)) == ("d/p.txt", str)
    assert storage.exists(Path(path))
    assert storage.size(Path(path)) == 1
    assert storage.listdir(Path("d")) == ([], ["p.txt"])
    storage.delete(Path(path))


def test_a_subclass_has_a_say_in_names(storage: BridgeStorage) -> None:
    class Shouting(BridgeStorage):
        def get_available_name(self, name: str, max_length: int | None = None) -> str:
            return super().get_available_name(name.upper(), max_length)

    shouting = Shouting(storage=storage.proxy)
    assert shouting.save("a.txt", ContentFile(b"1")) == "A.TXT"
    assert asyncio.run(shouting.asave("b.txt", b"1")) == "B.TXT"


def test_a_subclass_may_wrap_the_saving(storage: BridgeStorage) -> None:
    class Zipping(BridgeStorage):
        def _save(self, name: str, content: Any) -> str:
            return super()._save(name + ".z", ContentFile(content.read()[::-1]))

    path = Zipping(storage=storage.proxy).save("n" * 20, ContentFile(b"abc"), max_length=15)
    assert len(path) <= 15
    assert content_of(storage, path) == b"cba"


# -- content of all kinds


class Tricky(ContentFile):
    """Has chunks of its own."""

    def chunks(self, chunk_size: int | None = None) -> Iterator[bytes]:
        yield b"from "
        yield b""
        yield b"chunks"


class Upper(File):
    """Reads in a way of its own, as a file that is encrypted while it is stored."""

    def read(self, *args: int) -> bytes:
        data: bytes = self.file.read(*args)
        return data.upper()


class UpperUpload(Upper, InMemoryUploadedFile):
    pass


class Failing(ContentFile):
    def chunks(self, chunk_size: int | None = None) -> Iterator[bytes]:
        yield b"half"
        raise OSError("the disk of the upload")


class Once(ContentFile):
    """Can be read once; `pieces` makes what it has."""

    def __init__(self, pieces: Callable[[], Iterator[bytes]]) -> None:
        super().__init__(b"")
        self.left = pieces()

    def seekable(self) -> bool:
        return False

    def chunks(self, chunk_size: int | None = None) -> Iterator[bytes]:
        yield from self.left


class OneShot(io.RawIOBase):
    """Can be read once, from where it is."""

    def __init__(self, data: bytes) -> None:
        self.left = data

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        count = min(len(buffer), len(self.left))
        buffer[:count], self.left = self.left[:count], self.left[count:]
        return count


BIG = os.urandom(3 << 20)


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (lambda: ContentFile(b"bytes"), b"bytes"),
        (lambda: ContentFile("täxt"), "täxt".encode()),
        (lambda: SimpleUploadedFile("x.bin", b"simple", "application/x-own"), b"simple"),
        (lambda: InMemoryUploadedFile(io.BytesIO(b"memory"), "f", "x.bin", "text/plain", 6, None), b"memory"),
        (lambda: Tricky(b"not this"), b"from chunks"),
        (lambda: Upper(io.BytesIO(b"not this")), b"NOT THIS"),
        (lambda: UpperUpload(io.BytesIO(b"nor this"), "f", "x.bin", "text/plain", 8, None), b"NOR THIS"),
        (lambda: io.BytesIO(b"no Django file"), b"no Django file"),
        (lambda: File(OneShot(BIG)), BIG),
        (lambda: b"just bytes", b"just bytes"),
        (lambda: "just text", b"just text"),
        (lambda: ContentFile(b""), b""),
        (lambda: ContentFile(BIG), BIG),
    ],
)
def test_content_of_every_kind(storage: BridgeStorage, content: Any, expected: bytes) -> None:
    path = storage.save("x.bin", content())
    assert content_of(storage, path) == expected
    assert storage.size(path) == len(expected)


def test_a_file_on_the_disk_is_read_from_its_start_and_left_open(storage: BridgeStorage, tmp_path: Path) -> None:
    (tmp_path / "source").write_bytes(BIG)
    with (tmp_path / "source").open("rb") as raw:
        raw.read(100)
        path = storage.save("x.bin", File(raw))
        assert not raw.closed
    assert content_of(storage, path) == BIG
    assert (tmp_path / "source").read_bytes() == BIG


def test_blocking_content_is_read_in_the_thread_of_the_caller(storage: BridgeStorage) -> None:
    import threading

    threads = set()

    class Watching(Tricky):
        def chunks(self, chunk_size: int | None = None) -> Iterator[bytes]:
            threads.add(threading.get_ident())
            yield b"x"

    storage.save("x", Watching(b""))
    assert threads == {threading.get_ident()}


def test_content_that_fails_leaves_nothing_and_its_own_error(storage: BridgeStorage) -> None:
    with pytest.raises(OSError, match="the disk of the upload"):
        storage.save("x.bin", Failing(b""))
    assert storage.listdir("") == ([], [])
    assert storage.save("x.bin", ContentFile(b"later")) == "x.bin"


def test_an_upload_on_the_same_disk_is_moved(default: BridgeStorage, media: Path) -> None:
    media.mkdir()
    with override_settings(FILE_UPLOAD_TEMP_DIR=media):
        upload = TemporaryUploadedFile("up.bin", "application/octet-stream", len(BIG), None)
        upload.write(BIG)
        upload.seek(0)
        inode = os.stat(upload.temporary_file_path()).st_ino
        path = default.save("up.bin", upload)
    assert not os.path.exists(upload.temporary_file_path())
    assert (media / path).stat().st_ino == inode
    assert (media / path).stat().st_mode & 0o777 == 0o644
    assert content_of(default, path) == BIG
    record = default.get(path)
    assert (record.size, record.content_type) == (len(BIG), "application/octet-stream")
    upload.close()


def test_an_upload_goes_anywhere_else_as_a_copy(storage: BridgeStorage) -> None:
    with TemporaryUploadedFile("up.bin", None, 9, None) as upload:
        upload.write(b"temporary")
        upload.seek(0)
        path = storage.save(None, upload)
    assert path == "up.bin"
    assert content_of(storage, path) == b"temporary"


def test_from_one_storage_into_another(storage: BridgeStorage) -> None:
    path = storage.save("a.bin", ContentFile(BIG))
    with storage.open(path) as file:
        other = storage.save("b.bin", file)
    assert content_of(storage, other) == BIG


# -- open files


def test_a_file_is_read_as_any_other(storage: BridgeStorage) -> None:
    lines = b"".join(b"line %d\n" % number for number in range(200_000))  # several blocks
    path = storage.save("lines.txt", ContentFile(lines))
    with storage.open(path) as file:
        assert (file.name, file.mode, file.size, len(file)) == (path, "rb", len(lines), len(lines))
        assert file.readline() == b"line 0\n"
        assert file.read(7) == b"line 1\n"
        assert file.seek(-7, io.SEEK_END) == len(lines) - 7
        assert file.read() == lines[-7:]
        assert file.read() == b""
        assert file.seek(1 << 20) == 1 << 20
        assert file.read(10) == lines[1 << 20 : (1 << 20) + 10]
        assert b"".join(file.chunks()) == lines
        file.seek(0)
        assert sum(1 for _ in file) == 200_000
        assert file.record.path == path
    assert file.closed
    with pytest.raises(ValueError, match="closed"):
        file.read()
    with storage.open(path, "r") as text:
        assert next(iter(text)) == "line 0\n"
    again = file.open()
    assert again is file
    assert file.read() == lines
    file.close()


def test_a_small_file_needs_no_further_call(storage: BridgeStorage, monkeypatch: pytest.MonkeyPatch) -> None:
    path = storage.save("small", ContentFile(bytes(256 << 10)))
    file = storage.open(path)
    monkeypatch.setattr(type(bridge), "call", None)
    assert len(file.read()) == 256 << 10
    file.close()


@pytest.mark.parametrize("size", [3, FIRST_BYTES + 1])
def test_a_file_for_reading_takes_no_writes(default: BridgeStorage, size: int) -> None:
    path = default.save("a.bin", ContentFile(b"x" * size))
    for mode, data in (("rb", b"new"), ("r", "new")):
        with default.open(path, mode) as file:
            assert not file.writable()
            for method, given in ((file.write, data), (file.writelines, [data]), (file.truncate, 0)):
                with pytest.raises(io.UnsupportedOperation):
                    method(given)
            assert file.seek(0) == 0
            assert len(file.read()) == size
    with default.open(path) as file:
        assert default.save("b.bin", file) == "b.bin"
        assert default.size("b.bin") == size


def test_an_open_file_goes_on_with_its_version(storage: BridgeStorage) -> None:
    path = storage.save("a.bin", ContentFile(BIG))
    with storage.open(path) as file:
        assert file.read(10) == BIG[:10]
        storage.replace(path, ContentFile(b"new"))
        assert file.read() == BIG[10:]
    assert content_of(storage, path) == b"new"


@pytest.mark.parametrize("data", [b"Ada's", BIG], ids=["small", "large"])
def test_what_is_opened_by_a_record_is_its_file_or_none(storage: BridgeStorage, data: bytes) -> None:
    record = storage.get(storage.save("cv.txt", ContentFile(data)))
    with storage.open(record) as file:
        assert (file.name, file.mode, file.record, file.size) == ("cv.txt", "rb", record, len(data))
        assert file.read() == data

    async def streamed() -> bytes:
        return b"".join([chunk async for chunk in storage.astream(record)])

    assert bridge.call(streamed) == data
    storage.delete("cv.txt")
    storage.save("cv.txt", ContentFile(data[::-1]))
    with pytest.raises(FileNotFoundError):
        storage.open(record)
    with pytest.raises(FileNotFoundError):
        file.open()
    with pytest.raises(FileNotFoundError):
        bridge.call(streamed)
    assert content_of(storage, "cv.txt") == data[::-1]
    with pytest.raises(ValueError, match="record"):
        storage.open(record, "wb")


def test_a_file_that_is_opened_by_its_name_is_looked_up_once(
    storage: BridgeStorage, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = storage.save("a.txt", ContentFile(b"a"))
    meta = storage.proxy.meta
    asked: list[str] = []
    for name in ("get", "look_here"):
        look = getattr(meta, name)
        monkeypatch.setattr(meta, name, lambda path, look=look: (asked.append(path), look(path))[1])
    assert content_of(storage, path) == b"a"
    assert asked == [path]


def test_a_forgotten_file_is_closed_by_the_collector(storage: BridgeStorage, tmp_path: Path) -> None:
    path = storage.save("a.bin", ContentFile(BIG))
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(50):
        storage.open(path).read(1)
    gc.collect()
    bridge.call(asyncio.sleep, 0.2)
    assert len(os.listdir("/proc/self/fd")) < before + 25


@pytest.mark.parametrize("data", [b"small", BIG])
def test_a_file_is_written_whole_when_it_is_closed(storage: BridgeStorage, data: bytes) -> None:
    with storage.open("d/new.bin", "wb") as file:
        file.write(data)
        assert not storage.exists("d/new.bin")
        assert file.size == len(data)
    assert content_of(storage, "d/new.bin") == data
    assert file.record.size == len(data)
    with storage.open("d/new.bin", "wb") as file:
        pass
    assert content_of(storage, "d/new.bin") == b""


def test_every_mode(storage: BridgeStorage) -> None:
    with storage.open("t.txt", "w") as text:
        text.write("zwölf\n")
        text.writelines(["a\n", "b\n"])
    assert content_of(storage, "t.txt") == "zwölf\na\nb\n".encode()
    with storage.open("t.txt", "ab") as file:
        file.write(b"more")
    with storage.open("t.txt", "r+") as text:
        assert text.read(1) == "z"
        text.seek(0)
        text.write("Z")
    assert content_of(storage, "t.txt") == "Zwölf\na\nb\nmore".encode()
    version = storage.get("t.txt").version
    with storage.open("t.txt", "rb+") as file:
        assert file.read(1) == b"Z"
    assert storage.get("t.txt").version == version, "nothing was written, nothing is replaced"
    with storage.open("new.txt", "x") as text:
        text.write("new")
    for mode, name, error in (
        ("xb", "t.txt", FileExistsError),
        ("r+", "no.txt", FileNotFoundError),
        ("q", "t.txt", ValueError),
    ):
        with pytest.raises(error):
            storage.open(name, mode)
    with storage.open("appended.txt", "a") as text:
        text.write("first")
    assert content_of(storage, "appended.txt") == b"first"


def test_what_is_appended_goes_behind_what_others_have_written(storage: BridgeStorage) -> None:
    first, second = (storage.open("log.txt", "ab") for _ in range(2))  # a new file for both
    first.write(b"[1]")
    second.write(b"[2]")
    first.seek(0)
    first.write(b"[1b]")  # at the end all the same
    first.close()
    second.close()
    assert content_of(storage, "log.txt") == b"[1][1b][2]"
    third = storage.open("log.txt", "a")
    third.write("[3]")
    storage.replace("log.txt", b"new")
    third.close()
    assert content_of(storage, "log.txt") == b"new[3]"
    assert third.record == storage.get("log.txt")
    fourth = storage.open("log.txt", "ab")
    fourth.write(b"[4]")
    storage.delete("log.txt")
    fourth.close()
    assert content_of(storage, "log.txt") == b"[4]"  # what was deleted does not come back


def test_many_append_at_once(storage: BridgeStorage) -> None:
    def append(number: int) -> None:
        try:
            with storage.open("log.txt", "ab") as file:
                file.write(b"%d\n" % number)
        finally:
            connections.close_all()

    with ThreadPoolExecutor(4) as threads:
        list(threads.map(append, range(8)))
    assert sorted(content_of(storage, "log.txt").split()) == [b"%d" % number for number in range(8)]


def test_what_is_written_into_a_file_does_not_undo_what_others_did(storage: BridgeStorage) -> None:
    for others in (lambda: storage.replace("a.txt", b"theirs"), lambda: storage.delete("a.txt")):
        storage.save("a.txt", ContentFile(b"0123"))
        file = storage.open("a.txt", "r+b")
        file.write(b"ours")
        others()
        with pytest.raises((Conflict, NotFound)):
            file.close()
        assert not storage.exists("a.txt") or content_of(storage, "a.txt") == b"theirs"
        storage.delete("a.txt")
    storage.save("a.txt", ContentFile(b"0123"))
    cut = storage.open("a.txt", "ab")
    cut.truncate(2)
    storage.replace("a.txt", b"theirs")
    with pytest.raises(Conflict):
        cut.close()


def test_what_is_written_by_the_descriptor_is_kept(storage: BridgeStorage) -> None:
    for mode, expected in {
        "ab": b"01234567",
        "a": b"01234567",
        "a+b": b"X1234567",
        "r+b": b"X12356",
        "r+": b"X12356",
        "wb": b"456",
        "w+b": b"X56",
    }.items():
        with storage.open("a.txt", "wb") as file:
            file.write(b"0123")
        with storage.open("a.txt", mode) as file:
            if "r" not in mode:
                file.write(b"4" if "b" in mode else "4")
                file.flush()
            descriptor = file.fileno()
            if "+" in mode:
                file.seek(0)
                file.read(1)  # now all is in its buffer
            assert os.write(descriptor, b"56") == 2
            if "a" in mode:
                os.lseek(descriptor, 0, os.SEEK_SET)
                os.write(descriptor, b"7")
            if "+" in mode:
                with mmap.mmap(descriptor, 0) as mapped:
                    mapped[:1] = b"X"
        assert content_of(storage, "a.txt") == expected, mode


def test_what_is_appended_by_the_descriptor_overwrites_nobody(storage: BridgeStorage) -> None:
    new = storage.open("new.txt", "ab")
    os.write(new.fileno(), b"[2]")
    storage.save("new.txt", ContentFile(b"[1]"))
    new.close()
    assert content_of(storage, "new.txt") == b"[1][2]"
    old = storage.open("new.txt", "ab")
    os.ftruncate(old.fileno(), 2)
    storage.replace("new.txt", b"theirs")
    with pytest.raises(Conflict):  # it cannot be told what was done to the bytes that were there
        old.close()
    assert content_of(storage, "new.txt") == b"theirs"


def test_a_file_that_was_only_moved_is_written_into(storage: BridgeStorage) -> None:
    storage.save("a.txt", ContentFile(b"0123"))
    with storage.open("a.txt", "r+b") as file:
        file.write(b"4")
        storage.update("a.txt", extra={"seen": True})
    assert content_of(storage, "a.txt") == b"4123"


@pytest.fixture
def moving(tmp_path: Path, default: object) -> Iterator[BridgeStorage]:
    """A storage with two originals."""
    proxy = ProxyStorage(
        f"moving-{tmp_path.name}", originals={"a": MemoryBackend(), "b": MemoryBackend()}, meta=MemoryMetaBackend()
    )
    yield BridgeStorage(storage=proxy)
    bridge.call(proxy.aclose)


def test_content_that_can_be_read_once_is_not_stored_as_nothing(moving: BridgeStorage) -> None:
    """The bytes of the file are brought elsewhere while the content is read, so that storing begins anew."""
    moving.save("a.txt", ContentFile(b"old"))
    record = moving.get("a.txt")

    def pieces() -> Iterator[bytes]:
        yield b"new "
        moving.move("a.txt", "b")
        yield b"content"

    content = Once(pieces)
    with pytest.raises(ContentError):
        moving.publish("a.txt", content, over=record)
    assert content_of(moving, "a.txt") == b"old"
    with moving.open("a.txt", "r+b") as file:
        file.write(b"new")
        moving.move("a.txt", "a")
    assert content_of(moving, "a.txt") == b"new", "this can be read again"


def test_publishing_over_a_record_keeps_to_what_it_is_asked(storage: BridgeStorage) -> None:
    storage.save("a.txt", ContentFile(b"old"), extra={"mine": 1})
    asked = {"content_type": "text/x-own", "extra": {"tag": "x"}}
    record = storage.publish("a.txt", b"new", over=storage.get("a.txt"), **asked)
    assert (record.content_type, dict(record.extra)) == ("text/x-own", {"mine": 1, "tag": "x"})
    assert storage.get("a.txt").content_type == "text/x-own"
    assert content_of(storage, "a.txt") == b"new"


@pytest.mark.parametrize("mode", ["w", "wb", "xb", "ab"])
def test_a_file_for_writing_is_not_read(storage: BridgeStorage, mode: str) -> None:
    with storage.open("a.txt", mode) as file:
        for read in (file.read, file.readline, lambda: next(iter(file.file))):
            with pytest.raises(io.UnsupportedOperation):
                read()


def test_an_exception_publishes_nothing(storage: BridgeStorage) -> None:
    path = storage.save("old.txt", ContentFile(b"old"))
    for name in (path, "new.txt"):
        for mode in ("wb", "w"):
            with pytest.raises(RuntimeError), storage.open(name, mode) as file:
                file.write(b"half" if mode == "wb" else "half")
                raise RuntimeError
    assert content_of(storage, path) == b"old"
    assert storage.listdir("") == ([], ["old.txt"])


def test_a_file_that_is_never_closed_publishes_nothing(storage: BridgeStorage) -> None:
    file = storage.open("new.txt", "wb")
    file.write(b"half")
    with pytest.warns(ResourceWarning, match="nothing was published"):
        del file
    assert not storage.exists("new.txt")


# -- the rest of the contract


def test_listdir(storage: BridgeStorage) -> None:
    for name in ("a.txt", "b/c.txt", "b/d/e.txt", "f/g.txt"):
        storage.save(name, ContentFile(b""))
    assert storage.listdir("") == (["b", "f"], ["a.txt"])
    assert storage.listdir("b") == storage.listdir("b/") == (["d"], ["c.txt"])
    assert storage.listdir("nowhere") == ([], [])


@pytest.mark.parametrize("use_tz", [True, False])
def test_times_are_as_the_settings_want_them(storage: BridgeStorage, use_tz: bool) -> None:
    path = storage.save("a.txt", ContentFile(b""))
    with override_settings(USE_TZ=use_tz):
        now = datetime.now(UTC) if use_tz else datetime.now()  # noqa: DTZ005
        for moment in (storage.get_created_time(path), storage.get_modified_time(path)):
            assert (moment.tzinfo is not None) == use_tz
            assert abs(now - moment) < timedelta(minutes=1)
    with pytest.raises(FileNotFoundError):
        storage.get_modified_time("no.txt")


def test_url_needs_no_record(storage: BridgeStorage) -> None:
    assert storage.url("ä b/c?.txt") == "/media/%C3%A4%20b/c%3F.txt"
    assert storage.url(None) == storage.url("") == "/media/"

    async def on_a_loop() -> str:
        return storage.url("a.txt")

    assert asyncio.run(on_a_loop()) == "/media/a.txt"


def test_a_path_is_there_where_a_directory_is(storage: BridgeStorage) -> None:
    path = storage.save("a/b.txt", ContentFile(b"here"))
    if isinstance(storage.proxy.get_original(), MemoryBackend):
        for ask in (storage.path, storage.get_accessed_time):
            with pytest.raises(NotImplementedError):
                ask(path)
        return
    assert Path(storage.path(path)).read_bytes() == b"here"
    storage.replace(path, ContentFile(b"there"))
    assert Path(storage.path(path)).read_bytes() == b"there"
    assert Path(storage.path("")).is_dir()
    assert storage.path("no.txt").endswith("/no.txt")
    assert storage.get_accessed_time(path).tzinfo is not None
    for name in ("../up", "/etc/passwd"):
        with pytest.raises(SuspiciousFileOperation):
            storage.path(name)


# -- verbs beyond the contract


def test_the_verbs_of_a_proxy_storage(storage: BridgeStorage) -> None:
    path = storage.save("a.txt", ContentFile(b"1"), content_type="text/x-own", extra={"tag": "x"})
    record = storage.get(path)
    assert (record.content_type, record["tag"], record["original_storage_path"]) == ("text/x-own", "x", "a.txt")
    storage.update(path, extra={"tag": "y"})
    assert storage.rename(path, "b.txt")["tag"] == "y"
    copy = storage.copy("b.txt", "c.txt")
    storage.replace("b.txt", ContentFile(b"22"))
    assert [content_of(storage, name) for name in ("b.txt", copy)] == [b"22", b"1"]
    assert [found and found.path for found in storage.get_many(["c.txt", "a.txt"])] == ["c.txt", None]
    meta = storage.meta_backend
    assert meta.get("b.txt").size == 2
    assert meta.exists("b.txt")
    assert meta.count() == 2
    assert [found.path for found in meta.list(proxy_storage_name=storage.name)] == ["b.txt", "c.txt"]
    assert [found and found.path for found in meta.get_many(["x", "b.txt"])] == [None, "b.txt"]
    with pytest.raises(FileNotFoundError):
        meta.get("a.txt")


def test_the_verbs_of_a_record_change_its_file_only(storage: BridgeStorage) -> None:
    mine = storage.get(storage.save("a.txt", ContentFile(b"mine")))
    storage.update(mine, extra={"tag": "x"})
    storage.move(mine, mine.original_storage_name)
    assert (storage.size(mine), storage.copy(mine, "copy.txt")) == (4, "copy.txt")
    renamed = storage.rename(mine, "b.txt")
    assert (renamed.path, renamed["tag"]) == ("b.txt", "x")
    storage.save("a.txt", ContentFile(b"of another"))
    storage.delete(mine)
    bridge.call(storage.adelete, mine)
    for change in (lambda: storage.update(mine, extra={"tag": "y"}), lambda: storage.rename(mine, "c.txt")):
        with pytest.raises((NotFound, Conflict)):
            change()
    assert (content_of(storage, "a.txt"), dict(storage.get("a.txt").extra)) == (b"of another", {})
    assert bridge.call(storage.asize, renamed) == 4
    storage.delete(renamed)
    assert not storage.exists("b.txt")
    foreign = dataclasses.replace(renamed, proxy_storage_name="another")
    with pytest.raises(NotFound):
        storage.size(foreign)


def test_records_of_the_orm_are_looked_up_without_the_loop(
    default: BridgeStorage, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = default.save("a.txt", ContentFile(b"Hello"))
    monkeypatch.setattr(type(bridge), "call", None)
    assert default.exists(path)
    assert default.size(path) == 5
    assert default.get(path).size == 5
    assert not default.exists("b.txt")
    for ask in (default.size, default.get, default.open):
        with pytest.raises(FileNotFoundError):
            ask("b.txt")
    default.delete("b.txt")


def test_using_is_of_one_call_only(tmp_path: Path) -> None:
    proxy = ProxyStorage("two", originals={"one": MemoryBackend(), "other": MemoryBackend()}, meta=MemoryMetaBackend())
    storage = BridgeStorage(storage=proxy)
    chosen = [storage.save("x", ContentFile(b""), using=using) for using in (None, "other", None)]
    assert [storage.get(path).original_storage_name for path in chosen] == ["one", "other", "one"]
    assert storage.move(chosen[0], "other").original_storage_name == "other"


def test_a_file_that_is_in_the_original_is_taken_in(default: BridgeStorage, media: Path) -> None:
    media.mkdir()
    (media / "old.txt").write_bytes(b"old")
    assert not default.exists("old.txt")
    assert default.save(None, None, original_storage_path="old.txt") == "old.txt"
    assert default.adopt  # the verb itself
    assert content_of(default, "old.txt") == b"old"
    (media / "second.txt").write_bytes(b"2")
    assert asyncio.run(asave_adopting(default)) == "renamed.txt"


async def asave_adopting(storage: BridgeStorage) -> str:
    try:
        return await storage.asave("renamed.txt", None, original_storage_path="second.txt")
    finally:
        await sync_to_async(connections.close_all)()


# -- asynchronous twins


def test_the_twins_do_not_touch_the_bridge(storage: BridgeStorage, monkeypatch: pytest.MonkeyPatch) -> None:
    proxy = storage.proxy

    async def main() -> None:
        path = await storage.asave("a.txt", ContentFile(b"Hello"), max_length=50)
        assert path == "a.txt"
        assert await storage.aexists(path)
        assert await storage.asize(path) == 5
        assert (
            await storage.aurl(path) if not isinstance(proxy.get_original(), MemoryBackend) else "/media/a.txt"
        ) == "/media/a.txt"
        assert await storage.alistdir("") == ([], ["a.txt"])
        async with storage.aopen(path) as file:
            assert await file.read() == b"Hello"
        assert b"".join([chunk async for chunk in storage.astream(path)]) == b"Hello"
        async with storage.aopen("b.txt", "wb") as file:
            await file.write(b"written")
        assert abs(await storage.aget_modified_time(path) - datetime.now(UTC)) < timedelta(minutes=1)
        with pytest.raises(SyncCallOnEventLoop, match="asave"):
            storage.save("c.txt", ContentFile(b""))
        for call in (storage.open, storage.exists, storage.size, storage.delete, storage.listdir, storage.get):
            with pytest.raises(SyncCallOnEventLoop):
                call(path)
        await storage.adelete(path)
        await storage.adelete(path)
        assert not await storage.aexists(path)
        await proxy.aclose()

    with monkeypatch.context() as patch:
        patch.setattr(type(bridge), "_enter", None)
        asyncio.run(main())
    assert content_of(storage, "b.txt") == b"written"


# -- as FileSystemStorage


def test_it_takes_what_filesystemstorage_takes(default: object, tmp_path: Path) -> None:
    arguments: dict[str, Any] = {
        "location": tmp_path / "deep" / "down",
        "base_url": "/files",
        "file_permissions_mode": 0o640,
        "directory_permissions_mode": 0o750,
    }
    ours, theirs = BridgeStorage(**arguments), FileSystemStorage(**arguments)
    path = ours.save("a/b.txt", ContentFile(b"x"))
    assert content_of(theirs, path) == b"x"
    assert ours.path(path) == theirs.path(path)
    assert ours.url(path) == theirs.url(path) == "/files/a/b.txt"
    assert (ours.location, ours.base_url) == (theirs.location, theirs.base_url)
    assert Path(ours.path(path)).stat().st_mode & 0o777 == 0o640
    assert Path(ours.path("a")).stat().st_mode & 0o777 == 0o750


def test_bytes_whose_replacement_the_database_swallows_are_not_replaced_for_ever() -> None:
    class Meta(MemoryMetaBackend):
        tries = 0

        async def update(self, path: str, changes: Any, **options: Any) -> MetaRecord:
            if self.tries:
                self.tries += 1
                assert self.tries < 50
                raise Conflict("gone or has changed")
            return await super().update(path, changes, **options)

    async def overwritten() -> None:
        meta = Meta()
        async with ProxyStorage("swallowing", originals=MemoryBackend(), meta=meta) as proxy:
            record = await proxy.get(await proxy.save("a.txt", b"1"))
            meta.tries = 1
            with pytest.raises(Conflict):
                await BridgeStorage(storage=proxy)._replace_bytes(record, b"2", None)

    asyncio.run(overwritten())


def test_overwriting_keeps_the_key(default: object, tmp_path: Path) -> None:
    storage = BridgeStorage(location=tmp_path / "public", allow_overwrite=True)
    for data in (b"first", b"second"):
        assert storage.save("a.txt", ContentFile(data)) == "a.txt"
        assert (tmp_path / "public" / "a.txt").read_bytes() == data
    with storage.open("a.txt", "w") as file:
        file.write("third")
    assert (tmp_path / "public" / "a.txt").read_bytes() == b"third"
    assert asyncio.run(overwritten(storage)) == "a.txt"
    assert (tmp_path / "public" / "a.txt").read_bytes() == b"fourth"
    asyncio.run(written(storage, "a.txt", b"fifth"))
    assert (tmp_path / "public" / "a.txt").read_bytes() == b"fifth"
    assert storage.get("a.txt").original_storage_path == "a.txt"


@pytest.mark.parametrize(("lasting", "scan"), [(False, True), (True, True), (True, False)])
def test_overwriting_beside_others_keeps_the_key(
    default: BridgeStorage, media: Path, monkeypatch: pytest.MonkeyPatch, lasting: bool, scan: bool
) -> None:
    monkeypatch.setattr(storages["default"], "allow_overwrite", True)
    default.save("a.txt", ContentFile(b"first"))
    restore, calls = default.proxy.restore_key, 0

    async def beaten(path: str) -> MetaRecord:
        nonlocal calls
        calls += 1
        if lasting or calls == 1:
            raise Conflict("somebody has changed it")
        if calls == 2:
            record = await default.proxy.get(path)
            return dataclasses.replace(record, places=(Place("default", "k", "doubtful"),))
        return await restore(path)

    with monkeypatch.context() as context:
        context.setattr(twins, "_PAUSES", (0.0, 0.0, 0.0))
        context.setattr(default.proxy, "restore_key", beaten)
        default.save("a.txt", ContentFile(b"second"))
    assert calls == 3
    assert (media / "a.txt").read_bytes() == (b"first" if lasting else b"second")
    said, options = io.StringIO(), {"scan": scan, "force": True}
    call_command("proxystorage_reconcile", "default", **options, stdout=said)
    call_command("proxystorage_reconcile", "default", **options, apply=True, stdout=said)
    assert said.getvalue().count("1 with the key that their URL says") == (2 if lasting else 0)
    assert (media / "a.txt").read_bytes() == b"second"


async def overwritten(storage: BridgeStorage) -> str:
    path = await storage.asave("a.txt", b"fourth")
    await sync_to_async(connections.close_all)()
    return path


def test_overwriting_on_any_other_original(storage: BridgeStorage) -> None:
    overwriting = BridgeStorage(storage=storage.proxy, allow_overwrite=True)
    for data in (b"first", b"second"):
        assert overwriting.save("a.txt", ContentFile(data)) == "a.txt"
        assert content_of(storage, "a.txt") == data


def test_overwriting_keeps_to_what_it_is_asked(default: object, tmp_path: Path) -> None:
    storage = BridgeStorage(location=tmp_path / "public", name="public", allow_overwrite=True)
    for tag in ("x", "y"):
        path = storage.save("a.txt", ContentFile(b""), content_type="text/x-own", extra={"tag": tag})
        record = storage.get(path)
        assert (record.content_type, record["tag"], record.original_storage_path) == ("text/x-own", tag, "a.txt")
    assert storage.save("n" * 30 + ".txt", ContentFile(b""), max_length=10) == "nnnnnn.txt"
    with pytest.raises(SuspiciousFileOperation):
        storage.rename("a.txt", "../a.txt")


def test_a_file_without_a_record_is_never_taken_for_one_with(default: BridgeStorage, media: Path) -> None:
    """Its path stands in old rows, and its URL would show the new file's bytes, or the other way round."""
    media.mkdir()
    (media / "cv.txt").write_bytes(b"old and unknown")
    path = default.save("cv.txt", ContentFile(b"new"))
    assert path != "cv.txt"
    assert (media / path).read_bytes() == b"new"
    with pytest.raises(FileExistsError, match="adopt"), default.open("cv.txt", "wb") as file:
        file.write(b"x")
    assert (media / "cv.txt").read_bytes() == b"old and unknown"


def test_reading_through_gives_old_files_a_record(default: object, tmp_path: Path) -> None:
    root = tmp_path / "old"
    (root / "d").mkdir(parents=True)
    for number in range(6):
        (root / "d" / f"{number}.txt").write_bytes(b"old")
    storage = BridgeStorage(location=root, name="old", read_through=True)
    assert content_of(storage, "d/0.txt") == b"old"
    assert storage.exists("d/1.txt")
    assert not storage.exists("d/no.txt")
    assert storage.size("d/2.txt") == 3
    storage.delete("d/3.txt")
    assert not (root / "d" / "3.txt").exists()
    assert storage.get("d/4.txt").size == 3
    with storage.open("d/5.txt", "ab") as file:
        file.write(b"er")
    assert content_of(storage, "d/5.txt") == b"older"
    assert storage.listdir("d") == ([], ["0.txt", "1.txt", "2.txt", "4.txt", "5.txt"])
    with pytest.raises(FileNotFoundError):
        storage.open("d/no.txt")


# -- making one


def test_settings_are_obeyed_when_they_change(default: BridgeStorage, tmp_path: Path) -> None:
    path = default.save("a.txt", ContentFile(b"1"))
    assert default.url(path) == "/media/a.txt"
    with override_settings(MEDIA_ROOT=tmp_path / "other", MEDIA_URL="https://cdn.example/m/"):
        assert default.url(path) == "https://cdn.example/m/a.txt"
        assert default.save("b.txt", ContentFile(b"2")) == "b.txt"
        assert (tmp_path / "other" / "b.txt").exists()
    assert content_of(default, path) == b"1"
    with override_settings(FILE_UPLOAD_PERMISSIONS=0o600):
        assert os.stat(default.path(default.save("c.txt", ContentFile(b"")))).st_mode & 0o777 == 0o600


@pytest.mark.parametrize("described", ["in settings", "used before", "by a field"])
def test_an_overridden_media_root_leaves_records_at_a_url_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, described: str
) -> None:
    meta = f"sqlite:///{tmp_path}/r.sqlite3"
    given = {"default": {"BACKEND": "sync_bridge.BridgeStorage", "OPTIONS": {"meta": meta, "name": "of-project"}}}
    monkeypatch.setattr(settings, "MEDIA_ROOT", str(tmp_path / "media"))
    if described != "by a field":
        monkeypatch.setattr(settings, "STORAGES", given)
        monkeypatch.setattr(storages, "_backends", None)
        monkeypatch.setattr(storages, "_storages", {})
        monkeypatch.delattr(storages, "backends", raising=False)
    of_field = BridgeStorage(meta=meta, name="of-project")
    if described != "in settings":
        of_field.save("real.txt", ContentFile(b"the only copy"))

    def tested() -> BridgeStorage:
        return of_field if described == "by a field" else storages["default"]

    for _ in range(2):  # no name leaks from test to test
        with override_settings(MEDIA_ROOT=tmp_path / "test"):
            storage = tested()
            assert not storage.exists("real.txt")
            assert not storage.exists("left.txt")
            assert storage.save("real.txt", ContentFile(b"of a test")) == "real.txt"
            assert (tmp_path / "test" / "real.txt").read_bytes() == b"of a test"
            with override_settings(MEDIA_URL="/other/", STORAGES={**settings.STORAGES, "other": given["default"]}):
                assert content_of(tested(), "real.txt") == b"of a test"
            storage.delete("real.txt")
            storage.save("left.txt", ContentFile(b"of a test"))
        shutil.rmtree(tmp_path / "test")
    if described == "in settings":
        assert not (tmp_path / "r.sqlite3").exists()
    else:
        assert content_of(of_field, "real.txt") == b"the only copy"
    assert tested().save("real2.txt", ContentFile(b"2")) == "real2.txt"
    own = {"default": {**given["default"], "OPTIONS": {"meta": f"sqlite:///{tmp_path}/own.sqlite3", "name": "own"}}}
    with override_settings(MEDIA_ROOT=tmp_path / "test", STORAGES=own):
        storages["default"].save("a.txt", ContentFile(b"3"))
        assert (tmp_path / "own.sqlite3").exists(), "what a test asks for, it gets"


@pytest.mark.parametrize("meta", ["sync_bridge.StoredFile", "django-orm://sync_bridge.StoredFile", "live"])
def test_under_an_overridden_media_root_records_in_a_model_stay_in_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, meta: str
) -> None:
    monkeypatch.setattr(settings, "MEDIA_ROOT", str(tmp_path / "media"))
    storage = BridgeStorage(meta=ORMMetaBackend("sync_bridge.StoredFile") if meta == "live" else meta, name="in-model")
    with override_settings(MEDIA_ROOT=tmp_path / "test"):
        assert isinstance(storage.proxy.meta, ORMMetaBackend), "Django's test database covers it"


def test_a_storage_is_described_by_urls(tmp_path: Path) -> None:
    given = {"BACKEND": "sync_bridge.BridgeStorage"}
    urls = {"original": f"file://{tmp_path}/files", "meta": f"sqlite:///{tmp_path}/records.sqlite3", "name": "by-urls"}
    toml = tmp_path / "storages.toml"
    toml.write_text(
        f'[storages.by-toml]\noriginals = {{ fs = "file://{tmp_path}/files2" }}\nmeta = "sqlite:///{tmp_path}/two.sqlite3"\n'
    )
    several = {
        "originals": {"one": MemoryBackend(), "two": f"file://{tmp_path}/files3"},
        "meta": MemoryMetaBackend(),
        "name": "several",
        "keys": "token",
    }
    described = {
        "urls": urls,
        "toml": {"config": str(toml)},
        "several": several,
        "dotted": {"storage": f"{__name__}.made"},
    }
    with override_settings(STORAGES={alias: {**given, "OPTIONS": options} for alias, options in described.items()}):
        for alias in described:
            storage = storages[alias]
            path = storage.save("a.txt", ContentFile(b"x"))
            assert content_of(storage, path) == b"x"
            assert storage.get(path).get_proxy_storage() is storage.proxy
            bridge.call(storage.proxy.aclose)


made = ProxyStorage("made", originals=MemoryBackend(), meta=MemoryMetaBackend())


class SaysWhereItsRecordsAre(BridgeStorage):
    def __init__(self, **options: Any) -> None:
        options.setdefault("meta", "memory:")
        super().__init__(**options)


@pytest.mark.parametrize("keys", ["path", "token"])
def test_a_directory_with_records_elsewhere_is_made_again_with_them(tmp_path: Path, keys: str) -> None:
    options = {"meta": f"sqlite:///{tmp_path}/secret.sqlite3", "location": tmp_path, "base_url": "/o/", "keys": keys}
    for meta in (options["meta"], MemoryMetaBackend()):
        given = {"x": {"BACKEND": "sync_bridge.BridgeStorage", "OPTIONS": {**options, "meta": meta}}}
        with override_settings(STORAGES=given):
            dotted, args, kwargs = storages["x"].deconstruct()
            assert kwargs == {"storage": storages["x"].name}
            again = import_string(dotted)(*args, **kwargs)  # as Wagtail does, in another process too
            path = storages["x"].save("a.txt", ContentFile(b"1"))
            assert again.proxy is storages["x"].proxy
            assert again.url(path) == storages["x"].url(path)
            again.delete(path)
            assert not storages["x"].exists(path)
    for meta in ("sync_bridge.StoredFile", "django-orm://sync_bridge.StoredFile?durable=true"):
        assert BridgeStorage(meta=meta).deconstruct()[2] == {"meta": meta}
    live = BridgeStorage(meta=ORMMetaBackend("sync_bridge.StoredFile"), name="live")
    assert live.deconstruct()[2] == {"storage": "live"}
    assert SaysWhereItsRecordsAre(location="/x").deconstruct()[2] == {"location": "/x"}
    assert SaysWhereItsRecordsAre(meta="memory:", name="told").deconstruct()[2] == {"storage": "told"}


class OfTheSettings(BridgeStorage):
    storage = "default"


def test_what_is_described_twice_is_one_storage(default: BridgeStorage) -> None:
    assert BridgeStorage().proxy is default.proxy
    with pytest.raises(ImproperlyConfigured, match="named 'default'"):
        BridgeStorage(original="memory://", meta="memory://").proxy  # noqa: B018
    with pytest.raises(ImproperlyConfigured, match="or storage='default'"):
        BridgeStorage(keys="token").proxy  # noqa: B018  # as a library may, by the class alone
    assert BridgeStorage(storage="default").proxy is OfTheSettings().proxy is default.proxy


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"durabilty": "power"}, "did you mean 'durability'"),
        ({"storage": "x.y", "name": "z"}, "whole storage"),
        ({"config": "x.toml", "keys": "token"}, "only name="),
        ({"original": "memory://", "originals": {}}, "not both"),
        ({"original": "memory://", "location": "/x"}, "directory of its own"),
    ],
)
def test_options_that_make_no_sense_are_refused_at_once(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ImproperlyConfigured, match=message):
        BridgeStorage(**options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"storage": "no.such.module"}, "cannot be imported"),
        ({"storage": "os.path.join"}, "cannot be made"),
        ({"storage": "os.sep"}, "not a ProxyStorage"),
        ({"storage": "unknown"}, "no storage named 'unknown'"),
        ({"original": "gopher://x", "name": "g"}, "gopher"),
        ({"durability": "never", "name": "n"}, "'process' or 'power'"),
    ],
)
def test_a_storage_that_cannot_be_made_says_why_on_first_use(options: dict[str, Any], message: str) -> None:
    storage = BridgeStorage(**options)
    with pytest.raises(ImproperlyConfigured, match=message):
        storage.exists("x")


def test_temporary_files_of_writers_are_where_djangos_are(storage: BridgeStorage, tmp_path: Path) -> None:
    (tmp_path / "uploads").mkdir()
    with override_settings(FILE_UPLOAD_TEMP_DIR=tmp_path / "uploads"), storage.open("a", "wb") as file:
        file.write(BIG)
    assert tempfile.gettempdir() != str(tmp_path / "uploads")
    assert storage.size("a") == len(BIG)
