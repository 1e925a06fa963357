"""Names, keys and URLs where they are not the same, and where asking whether a name is free takes for ever."""

import asyncio
import io
import os
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from asgiref.sync import sync_to_async
from django.core.files.base import ContentFile
from django.core.management import call_command
from django.db import connections, transaction

from aproxy_storage import AlreadyExists, DeadlineExceeded, StorageError, Timeouts
from aproxy_storage.backends._posix import Tree
from aproxy_storage.backends.filesystem import FileSystemBackend
from aproxy_storage.meta_backends.memory import MemoryMetaBackend
from aproxy_storage.meta_backends.sqlite import SQLiteMetaBackend
from sync_bridge import BridgeStorage, twins
from sync_bridge.bridge import bridge
from tests.bridge.test_storage import content_of, written

# -- names and keys that differ


@pytest.fixture
def tenant(default: object, tmp_path: Path) -> BridgeStorage:
    return BridgeStorage(location=tmp_path / "t", name="tenant", base_url="/media/", prefix="tenant/of/us")


def test_names_with_a_prefix_are_whole_paths(tenant: BridgeStorage, tmp_path: Path) -> None:
    path = tenant.save("sub/a.txt", ContentFile(b"a"))
    assert path == "tenant/of/us/sub/a.txt"
    assert (tmp_path / "t" / "sub" / "a.txt").read_bytes() == b"a"
    assert tenant.url(path) == "/media/sub/a.txt"
    assert asyncio.run(aurl(tenant, path)) == "/media/sub/a.txt"
    assert tenant.base_url is None
    assert tenant.path(path) == str(tmp_path / "t" / "sub" / "a.txt")
    second = tenant.save("sub/a.txt", ContentFile(b"b"))
    assert second.startswith("tenant/of/us/sub/a_")
    assert tenant.get(second).original_storage_path == second.removeprefix("tenant/of/us/")
    tenant.replace(path, ContentFile(b"new"))
    assert (tmp_path / "t" / "sub" / "a.txt").read_bytes() == b"new", "it keeps its URL"


async def aurl(storage: BridgeStorage, path: str) -> str:
    try:
        return await storage.aurl(path)
    finally:
        await sync_to_async(connections.close_all)()


def test_a_prefix_is_walked_like_any_directory(tenant: BridgeStorage) -> None:
    assert tenant.listdir("") == tenant.listdir("tenant") == ([], [])
    paths = {tenant.save(name, ContentFile(b"x")) for name in ("a.txt", "sub/b.txt", "sub/deep/c.txt")}
    assert tenant.listdir("") == (["tenant"], [])
    assert tenant.listdir("tenant/of") == (["us"], [])
    assert tenant.listdir("sub") == ([], [])

    def walked(at: str) -> Iterator[str]:
        directories, files = tenant.listdir(at)
        yield from (os.path.join(at, name) for name in files)
        for name in directories:
            yield from walked(os.path.join(at, name))

    assert set(walked("")) == paths


def test_a_name_that_is_written_to_gets_the_prefix_once(tenant: BridgeStorage, tmp_path: Path) -> None:
    for line in (b"one\n", b"two\n"):
        with tenant.open("log.txt", "ab") as file:
            file.write(line)
        assert file.name == file.record.path == "tenant/of/us/log.txt"
    with tenant.open("tenant/of/us/log.txt", "ab") as file:
        file.write(b"three\n")
    assert (tmp_path / "t" / "log.txt").read_bytes() == b"one\ntwo\nthree\n"
    with pytest.raises(FileExistsError):
        tenant.open("log.txt", "xb")
    with tenant.open("log.txt", "r+") as text:
        assert text.read() == "one\ntwo\nthree\n"
    asyncio.run(written(tenant, "log.txt", b"anew"))
    assert content_of(tenant, "tenant/of/us/log.txt") == b"anew"
    with pytest.raises(FileNotFoundError):
        tenant.open("log.txt")


def test_a_prefix_does_not_change_what_is_taken(tenant: BridgeStorage, tmp_path: Path) -> None:
    (tmp_path / "t").mkdir()
    (tmp_path / "t" / "cv.txt").write_bytes(b"without a record")
    assert not tenant.is_name_available("cv.txt")
    assert tenant.is_name_available("tenant/of/us/cv.txt"), "names are put behind the prefix"
    assert tenant.save("cv.txt", ContentFile(b"new")) != "tenant/of/us/cv.txt"
    with pytest.raises(FileExistsError, match="adopt"), tenant.open("cv.txt", "wb") as file:
        file.write(b"x")


@pytest.mark.parametrize("base_url", [None, "/files/"])
def test_the_url_of_a_token_key_is_that_of_the_file(default: object, tmp_path: Path, base_url: str | None) -> None:
    storage = BridgeStorage(location=tmp_path / "t", name="tokens", base_url=base_url, keys="token")
    path = storage.save("a.txt", ContentFile(b"x"))
    url = storage.url(path)
    assert url == (base_url or "/media/") + storage.get(path).original_storage_path
    assert (tmp_path / "t" / url.rpartition("/")[2]).read_bytes() == b"x"


# -- a disk that hangs


@pytest.fixture
def hung(monkeypatch: pytest.MonkeyPatch) -> Iterator[threading.Event]:
    """Let whoever asks whether ``hung.txt`` is there wait, for as long as the test runs; tell when somebody does."""
    asked, over = threading.Event(), threading.Event()
    is_taken = Tree.is_taken

    def hanging(tree: Tree, key: str) -> bool:
        if key == "hung.txt":
            asked.set()
            over.wait(10)
        return is_taken(tree, key)

    monkeypatch.setattr(Tree, "is_taken", hanging)
    yield asked
    over.set()


def on_a_disk(tmp_path: Path, **options: Any) -> BridgeStorage:
    directory = FileSystemBackend(tmp_path / "files", base_url="/media/", timeouts=Timeouts(operation=0.2))
    return BridgeStorage(original=directory, meta=MemoryMetaBackend(), name=f"hung-{tmp_path.name}", **options)


@pytest.mark.parametrize("overwrite", [False, True])
def test_a_disk_that_hangs_does_not_stop_an_event_loop(tmp_path: Path, hung: threading.Event, overwrite: bool) -> None:
    storage = on_a_disk(tmp_path, allow_overwrite=overwrite)

    async def main() -> None:
        saving = asyncio.create_task(storage.asave("hung.txt", b"x"))
        assert await asyncio.to_thread(hung.wait, 10), "which takes turns of this loop"
        with pytest.raises(DeadlineExceeded):
            await saving

    asyncio.run(main())


@pytest.mark.parametrize("how", ["save", "overwrite", "write", "is available"])
def test_a_disk_that_hangs_does_not_stop_the_bridge(tmp_path: Path, hung: threading.Event, how: str) -> None:
    storage = on_a_disk(tmp_path, allow_overwrite=how == "overwrite", direct=False)
    call = {
        "save": lambda: storage.save("hung.txt", ContentFile(b"x")),
        "overwrite": lambda: storage.save("hung.txt", ContentFile(b"x")),
        "write": lambda: storage.publish("hung.txt", b"x"),
        "is available": lambda: storage.is_name_available("hung.txt"),
    }[how]
    with ThreadPoolExecutor(1) as pool:
        saving = pool.submit(call)
        assert hung.wait(10)
        bridge.call(asyncio.sleep, 0)
        assert isinstance(saving.exception(timeout=10), DeadlineExceeded)


def test_a_choice_of_names_on_a_disk_that_hangs_ends(tmp_path: Path, hung: threading.Event) -> None:
    class Choosing(BridgeStorage):
        def get_available_name(self, name: str, max_length: int | None = None) -> str:
            return super().get_available_name(name, max_length)

    directory = FileSystemBackend(tmp_path / "files", base_url="/media/", timeouts=Timeouts(operation=0.2))
    meta = SQLiteMetaBackend(tmp_path / "records.sqlite3")
    storage = Choosing(original=directory, meta=meta, name=f"choosing-{tmp_path.name}")
    assert storage._works_here

    async def main() -> None:
        try:
            with pytest.raises(DeadlineExceeded):
                await storage.asave("hung.txt", b"x")
        finally:
            await storage.proxy.aclose()

    asyncio.run(main())
    bridge.call(storage.proxy.aclose)


# -- names of files without a record, or of files with another name by now


def test_no_verb_gives_away_the_name_of_a_file_without_a_record(default: BridgeStorage, media: Path) -> None:
    default.save("mine.txt", ContentFile(b"public"))
    for name in ("cv.txt", "other.txt"):
        (media / name).write_bytes(b"old and unknown")
    copy = default.copy("mine.txt", "cv.txt")
    assert copy != "cv.txt"
    assert (media / copy).read_bytes() == b"public"

    def write(mode: str) -> None:
        asyncio.run(written(default, "cv.txt", b"x", mode))

    for give_away in (
        lambda: default.rename("mine.txt", "cv.txt"),
        lambda: default.adopt("other.txt", name="cv.txt"),
        lambda: default.save("cv.txt", None, original_storage_path="other.txt"),
        lambda: write("wb"),
        lambda: write("xb"),
        lambda: default.publish("cv.txt", b"x", exclusive=True),
    ):
        with pytest.raises(AlreadyExists, match="adopt"):
            give_away()
    assert not default.exists("cv.txt")
    assert default.adopt("cv.txt") == "cv.txt"
    assert default.adopt("other.txt", name="another.txt") == "another.txt"
    assert (media / "cv.txt").read_bytes() == b"old and unknown"


def test_a_name_is_free_whose_file_has_got_another_name(default: BridgeStorage, media: Path) -> None:
    default.save("a.txt", ContentFile(b"first"))
    default.save("b.txt", ContentFile(b"second"))
    with transaction.atomic():
        default.rename("a.txt", "c.txt")
        assert (media / "a.txt").exists(), "until the commit"
        default.rename("b.txt", "a.txt")
    assert [(media / name).read_bytes() for name in ("a.txt", "c.txt")] == [b"second", b"first"]


def test_what_cannot_get_its_own_key_is_listed_with_the_reason(default: BridgeStorage, media: Path) -> None:
    default.save("mine.txt", ContentFile(b"public"))
    (media / "cv.txt").write_bytes(b"old and unknown")
    bridge.call(default.proxy.rename, "mine.txt", "cv.txt")
    problem = bridge.call(default.restore_keys)["cv.txt"]
    assert isinstance(problem, AlreadyExists)
    assert "without a record" in str(problem)
    assert default.adopt("cv.txt", name="found.txt") == "found.txt", "the way out"
    assert bridge.call(default.restore_keys) == {"cv.txt": None, "found.txt": None}
    assert [(media / name).read_bytes() for name in ("found.txt", "cv.txt")] == [b"old and unknown", b"public"]


# -- a name whose file is being deleted


@pytest.mark.parametrize("how", ["open", "save"])
def test_a_record_that_is_going_is_a_record(media: Path, default: BridgeStorage, how: str) -> None:
    storage = BridgeStorage(allow_overwrite=True)
    storage.save("b.txt", ContentFile(b"old"))
    said = ""
    with transaction.atomic():
        storage.delete("b.txt")
        assert (media / "b.txt").exists(), "until the commit"
        try:
            if how == "save":
                storage.save("b.txt", ContentFile(b"new"))
            else:
                with storage.open("b.txt", "wb") as file:
                    file.write(b"new")
        except (StorageError, FileExistsError) as error:
            said = str(error)
    assert "adopt" not in said


# -- names that change hands in one transaction


def write(storage: BridgeStorage, name: str, mode: str) -> None:
    with storage.open(name, mode) as file:
        file.write(b"new")


IN_ONE_TRANSACTION: dict[str, tuple[Callable[[BridgeStorage], Any], dict[str, bytes]]] = {
    "deleted, xb": (lambda s: (s.delete("a"), write(s, "a", "xb")), {"a": b"new", "b": b"b"}),
    "deleted, ab": (lambda s: (s.delete("a"), write(s, "a", "ab")), {"a": b"new", "b": b"b"}),
    "replaced, deleted": (lambda s: (s.replace("a", b"new"), s.delete("a")), {"b": b"b"}),
    "replaced, renamed": (lambda s: (s.replace("a", b"new"), s.rename("a", "z")), {"z": b"new", "b": b"b"}),
    "exchanged": (
        lambda s: (s.rename("a", "z"), s.rename("b", "a"), s.rename("z", "b")),
        {"a": b"b", "b": b"a"},
    ),
    "passed on": (
        lambda s: (s.rename("a", "y"), s.rename("b", "a"), s.rename("y", "z")),
        {"a": b"b", "z": b"a"},
    ),
}


@pytest.mark.parametrize("how", IN_ONE_TRANSACTION)
def test_urls_lead_to_the_files_after_a_transaction(
    media: Path, default: BridgeStorage, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    steps, wanted = IN_ONE_TRANSACTION[how]
    monkeypatch.setattr(twins, "_PAUSES", (0.0,))  # nothing has to be tried twice
    for name in "ab":
        default.save(name, ContentFile(name.encode()))
    with transaction.atomic():
        steps(default)
    assert {path.name: path.read_bytes() for path in media.iterdir()} == wanted
    assert {name: content_of(default, name) for name in wanted} == wanted
    assert not caplog.records


def test_a_url_that_leads_nowhere_for_a_while_is_told_of(
    media: Path, default: BridgeStorage, caplog: pytest.LogCaptureFixture
) -> None:
    default.save("a", ContentFile(b"old"))
    with transaction.atomic():
        default.replace("a", b"second")
        default.delete("a")
        write(default, "a", "wb")
    (warning,) = caplog.records
    assert "'a' could not be given its own key again: " in warning.getMessage()
    assert "for 900 s; proxystorage_reconcile --scan --apply does it" in warning.getMessage()
    assert content_of(default, "a") == b"new"
    call_command("proxystorage_reconcile", "default", "--scan", "--apply", "--force", stdout=io.StringIO())
    assert {path.name: path.read_bytes() for path in media.iterdir()} == {"a": b"new"}


# -- names that are too long in UTF-8


def test_a_name_within_the_column_is_stored_whatever_its_letters(default: BridgeStorage) -> None:
    name = "長" * 90 + ".pdf"
    default.save(name, ContentFile(b"1"), max_length=100)
    assert asyncio.run(saved(default, name)).endswith(".pdf")
    directories, files = default.listdir("")
    assert directories == []
    assert len(files) == 2
    assert all(len(one) <= 100 and len(one.encode()) <= 255 and one.startswith("長長") for one in files)


async def saved(storage: BridgeStorage, name: str) -> str:
    try:
        return await storage.asave(name, ContentFile(b"2"), max_length=100)
    finally:
        await sync_to_async(connections.close_all)()
