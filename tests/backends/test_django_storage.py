"""Django's own storages, and one of django-storages, keep the promises of the suite as far as they can."""

import asyncio
import os
import threading
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio

from aproxy_storage import (
    AccessDenied,
    AlreadyExists,
    BackendUnavailable,
    ConfigurationError,
    Conflict,
    ContentError,
    DeadlineExceeded,
    NotFound,
    NotSupported,
    OutOfSpace,
    ProxyStorage,
    StorageError,
    Timeouts,
)
from aproxy_storage.config import original_from_url
from aproxy_storage.meta_backends.memory import MemoryMetaBackend
from aproxy_storage.records import Capabilities
from aproxy_storage.testing._backend_hooks import BackendHooks
from aproxy_storage.testing.backends import (
    BackendTests,
    CancellationTests,
    LifeTests,
    ListTests,
    ReadTests,
    WriteTests,
)
from aproxy_storage.tools.reconcile import reconcile
from tests.backends.test_s3 import ObjectsBehind
from tests.django_support.setup import configure

configure()

from django.core.files.base import ContentFile  # noqa: E402
from django.core.files.storage import FileSystemStorage, InMemoryStorage  # noqa: E402

from aproxy_storage.backends.django import DjangoStorageBackend  # noqa: E402


def files_below(root: Path) -> list[str]:
    """Return the files below `root`: the storage leaves empty directories, and so do we."""
    return [
        os.path.relpath(os.path.join(directory, name), root) for directory, _, names in os.walk(root) for name in names
    ]


class ShownWhileWritten:
    """What two of Django's own storages cannot do. Nobody asks for such a file: it has no record yet."""

    @pytest.mark.asyncio
    async def test_nothing_is_visible_before_the_end(self, backend: Any) -> None:
        pytest.skip(f"{backend} writes to the file's own name")

    @pytest.mark.asyncio
    async def test_unfinished_writes_are_not_listed(self, backend: Any) -> None:
        pytest.skip(f"{backend} writes to the file's own name")


class TestFileSystemStorage(ShownWhileWritten, BackendTests):
    root: Path

    @pytest_asyncio.fixture
    async def backend(self, tmp_path: Path) -> AsyncIterator[DjangoStorageBackend]:
        self.root = tmp_path / "root"
        async with DjangoStorageBackend(FileSystemStorage(self.root, base_url="/media/")) as backend:
            yield backend

    async def put_behind(self, backend: Any, key: str, data: bytes) -> None:
        path = self.root / key
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)

    async def get_behind(self, backend: Any, key: str) -> bytes | None:
        try:
            return await asyncio.to_thread((self.root / key).read_bytes)
        except (FileNotFoundError, NotADirectoryError, IsADirectoryError):
            return None

    async def list_behind(self, backend: Any) -> list[str]:
        return files_below(self.root)

    async def test_the_name_of_a_directory_is_taken(self, backend: DjangoStorageBackend) -> None:
        await backend.write("dir/key", b"1")
        assert await backend.is_taken("dir")
        with pytest.raises(AlreadyExists):
            await backend.write("dir", b"1")
        assert not await backend.is_taken("../dir"), "no name at all"


class TestInMemoryStorage(ShownWhileWritten, BackendTests):
    memory_bytes = None
    storage: InMemoryStorage

    @pytest_asyncio.fixture
    async def backend(self) -> AsyncIterator[DjangoStorageBackend]:
        self.storage = InMemoryStorage(location="/nowhere", base_url="/media/")
        # Its open files are one and the same, and it has no locks.
        async with DjangoStorageBackend(self.storage, max_workers=1) as backend:
            yield backend

    async def put_behind(self, backend: Any, key: str, data: bytes) -> None:
        self.storage.save(key, ContentFile(data))

    async def get_behind(self, backend: Any, key: str) -> bytes | None:
        try:
            file = self.storage.open(key)
        except (FileNotFoundError, IsADirectoryError, FileExistsError):
            return None
        file.seek(0)
        return bytes(file.read())

    async def list_behind(self, backend: Any) -> list[str]:
        return self._below("")

    def _below(self, directory: str) -> list[str]:
        directories, files = self.storage.listdir(directory)
        base = f"{directory}/" if directory else ""
        return [base + name for name in files] + [one for name in directories for one in self._below(base + name)]


class TestS3Storage(ObjectsBehind, BackendHooks):
    """django-storages, on boto3, with what is its own; the rest goes the same way with all storages."""

    memory_bytes = 28 << 20  # boto3 holds parts, and wraps them

    test_capabilities_are_data = LifeTests.test_capabilities_are_data
    test_every_kind_of_content = WriteTests.test_every_kind_of_content
    test_taken_key_is_refused_and_untouched = WriteTests.test_taken_key_is_refused_and_untouched
    test_failing_content_leaves_nothing = WriteTests.test_failing_content_leaves_nothing
    test_nothing_is_visible_before_the_end = WriteTests.test_nothing_is_visible_before_the_end
    test_small_write_cancelled_at_every_await = CancellationTests.test_small_write_cancelled_at_every_await
    _interrupt = CancellationTests._interrupt
    _objects_behind = WriteTests._objects_behind
    test_missing_object_is_not_found_on_entering = ReadTests.test_missing_object_is_not_found_on_entering
    test_reader_is_pinned_to_one_version = ReadTests.test_reader_is_pinned_to_one_version
    test_stat = ReadTests.test_stat
    test_discard = ReadTests.test_discard
    KEYS = ListTests.KEYS
    test_listing_is_in_byte_order = ListTests.test_listing_is_in_byte_order
    test_url = LifeTests.test_url
    test_errors_say_where_they_happened = LifeTests.test_errors_say_where_they_happened
    test_memory_is_bounded = LifeTests.test_memory_is_bounded
    pytestmark = pytest.mark.asyncio

    @pytest_asyncio.fixture
    async def backend(self) -> AsyncIterator[DjangoStorageBackend]:
        async with DjangoStorageBackend(self.storage(), max_segment_bytes=255) as backend:
            yield backend

    def storage(self) -> Any:
        from boto3.s3.transfer import TransferConfig
        from storages.backends.s3 import S3Storage

        service = self.service
        return S3Storage(
            bucket_name=service.bucket,
            location=service.prefix,
            endpoint_url=service.endpoint_url,
            region_name=service.region,
            access_key=service.access_key,
            secret_key=service.secret_key,
            signature_version="s3v4",
            file_overwrite=True,
            max_memory_size=1 << 20,
            transfer_config=TransferConfig(use_threads=False, multipart_chunksize=5 << 20),
        )


# -- what is Django's own


def files(tmp_path: Path, **options: Any) -> DjangoStorageBackend:
    return DjangoStorageBackend(FileSystemStorage(tmp_path, **options))


def test_capabilities_are_these(tmp_path: Path) -> None:
    known = Capabilities(range_read=True, list=True, url=True, modified_time=True)
    assert DjangoStorageBackend.capabilities == DjangoStorageBackend("default").capabilities == known
    exclusive = replace(known, conditional_create=True, max_segment_bytes=255)
    assert files(tmp_path).capabilities == exclusive
    assert not files(tmp_path, allow_overwrite=True).capabilities.conditional_create
    assert not DjangoStorageBackend(Renaming(tmp_path)).capabilities.conditional_create
    assert DjangoStorageBackend("default", exclusive=True).capabilities.conditional_create


class Renaming(FileSystemStorage):
    """Gives every file another name, as some do."""

    def _save(self, name: str, content: Any) -> str:
        return str(super()._save(f"other-{name}", content))


@pytest.mark.asyncio
async def test_a_file_under_another_name_is_deleted_again(tmp_path: Path) -> None:
    async with DjangoStorageBackend(Renaming(tmp_path)) as backend:
        for content in (b"x", iter([b"x" * 300_000] * 3)):
            with pytest.raises(AlreadyExists, match="named 'key' otherwise"):
                await backend.write("key", content)
        assert files_below(tmp_path) == []


@pytest.mark.asyncio
async def test_a_file_under_another_name_that_stayed_is_found_by_a_scan(tmp_path: Path) -> None:
    """As after a crash between the two: nothing says which file it is but that no record names it."""
    (tmp_path / "files").mkdir()
    backend = DjangoStorageBackend(broken := Renaming(tmp_path / "files"))
    async with ProxyStorage("site", originals=backend, meta=MemoryMetaBackend(), keys="token") as storage:
        broken.delete = fail  # type: ignore[method-assign]
        with pytest.raises(StorageError):
            await storage.save("letter.txt", b"x")
        assert [name.startswith("other-letter_") for name in files_below(tmp_path)] == [False]
        assert Path(files_below(tmp_path / "files")[0]).name.startswith("other-letter_")
        del broken.delete
        await reconcile(storage, scan=True, min_age=-1.0, force=True, dry_run=False)
        assert files_below(tmp_path) == []


def fail(*_: object) -> None:
    raise OSError("no answer")


class Occupied(InMemoryStorage):
    """Keeps every call until `free` is set, and counts those under way."""

    def __init__(self, full: int) -> None:
        super().__init__()
        self.full = full
        self.count = self.most = 0
        self.lock = threading.Lock()
        self.is_full = threading.Event()
        self.free = threading.Event()

    def listdir(self, path: str) -> tuple[list[str], list[str]]:
        with self.lock:
            self.count += 1
            self.most = max(self.most, self.count)
            if self.count == self.full:
                self.is_full.set()
        self.free.wait(30)
        with self.lock:
            self.count -= 1
        return [], []


@pytest.mark.asyncio
async def test_no_more_calls_at_a_time_than_there_are_threads() -> None:
    storage = Occupied(full=3)
    async with DjangoStorageBackend(storage, max_workers=3) as backend:
        looks = [asyncio.create_task(listed(backend)) for _ in range(20)]
        assert await asyncio.to_thread(storage.is_full.wait, 30)
        storage.free.set()
        assert await asyncio.gather(*looks) == [[]] * 20
    assert storage.most == 3


async def listed(backend: DjangoStorageBackend) -> list[str]:
    return [info.key async for info in backend.list()]


class Slow(InMemoryStorage):
    """Reads the first bytes of what it is given, and goes on when it may."""

    def __init__(self) -> None:
        super().__init__()
        self.begun = threading.Event()
        self.go_on = threading.Event()

    def _save(self, name: str, content: Any) -> str:
        first = content.read(1)
        self.begun.set()
        self.go_on.wait(30)
        return str(super()._save(name, ContentFile(first + content.read())))


@pytest.mark.asyncio
async def test_a_slow_storage_slows_the_content_down() -> None:
    storage, given = Slow(), 0

    async def chunks() -> AsyncIterator[bytes]:
        nonlocal given
        for _ in range(64):
            given += 1
            yield b"x" * (1 << 20)

    async with DjangoStorageBackend(storage) as backend:
        writing = asyncio.create_task(backend.write("key", chunks()))
        assert await asyncio.to_thread(storage.begun.wait, 30)
        before = -1
        while before != given:  # until no more is asked for
            before = given
            await asyncio.sleep(0.1)
        assert given < 8
        storage.go_on.set()
        assert (await writing).size == 64 << 20


@pytest.mark.asyncio
async def test_every_call_runs_in_threads_of_its_own(tmp_path: Path) -> None:
    seen: set[str] = set()

    class Watching(FileSystemStorage):
        def __getattribute__(self, name: str) -> Any:
            if name in ("save", "open", "delete", "exists", "listdir", "url"):
                seen.add(threading.current_thread().name)
            return super().__getattribute__(name)

    backend = DjangoStorageBackend(Watching(tmp_path, base_url="/media/"))
    seen.clear()
    await backend.write("dir/key", b"x")
    await backend.stat("dir/key")
    assert [info.key async for info in backend.list()] == ["dir/key"]
    assert await backend.url("dir/key") == "/media/dir/key"
    await backend.discard("dir/key")
    assert seen
    assert all(name.startswith("Django storage Watching") for name in seen)


@pytest.mark.asyncio
async def test_files_are_durable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    synced: list[str] = []
    monkeypatch.setattr(os, "fsync", lambda fd: synced.append(os.readlink(f"/proc/self/fd/{fd}")))
    for content in (b"x", iter([b"x" * 300_000] * 3)):
        await files(tmp_path).write(f"dir/{type(content).__name__}", content)
    assert not synced
    for number, content in enumerate((b"x", iter([b"x" * 300_000] * 3))):
        await files(tmp_path).write(f"dir/key{number}", content, durable=True)
        assert {str(tmp_path / f"dir/key{number}"), str(tmp_path / "dir"), str(tmp_path)} <= set(synced)


@pytest.mark.asyncio
async def test_copies_within_one_storage_do_not_wait_for_each_other(tmp_path: Path) -> None:
    """As many writes as there are threads, each of which waits for content that the same storage has to give."""
    backend = DjangoStorageBackend(FileSystemStorage(tmp_path), max_workers=2, timeouts=Timeouts(idle=20.0))
    data = b"x" * 3_000_000
    for number in range(2):
        await backend.write(f"from{number}", data)

    async def copy(number: int) -> None:
        async with backend.read(f"from{number}", chunk_bytes=1 << 18) as reader:
            await backend.write(f"to{number}", reader)

    await asyncio.gather(copy(0), copy(1))
    assert {(tmp_path / f"to{number}").read_bytes() for number in range(2)} == {data}


@pytest.mark.asyncio
async def test_a_storage_that_hangs_meets_the_idle_limit(tmp_path: Path) -> None:
    going_on = threading.Event()

    class Hanging(FileSystemStorage):
        def _save(self, name: str, content: Any) -> str:
            going_on.wait(30)
            return str(super()._save(name, content))

    limits = Timeouts(idle=0.2, cleanup=0.2)
    backend = DjangoStorageBackend(Hanging(tmp_path), timeouts=limits)
    with pytest.raises(DeadlineExceeded) as caught:
        await backend.write("key", b"x")
    assert caught.value.outcome_unknown
    going_on.set()
    await backend.aclose()
    async with asyncio.timeout(10):
        while files_below(tmp_path) or backend.cleanup._tasks.get():  # noqa: ASYNC110
            await asyncio.sleep(0.01)


@pytest.mark.parametrize(
    ("native", "expected"),
    [
        (OSError(28, "No space left on device"), OutOfSpace),
        (PermissionError(13, "Permission denied"), AccessDenied),
        (FileNotFoundError("gone"), NotFound),
        (NotImplementedError("no"), NotSupported),
        (TimeoutError(), DeadlineExceeded),
    ],
)
def test_errors_are_ours(native: Exception, expected: type[StorageError]) -> None:
    mapped = DjangoStorageBackend("default")._map_error(native, "read 'key'")
    assert type(mapped) is expected


def test_errors_of_drivers_are_ours_and_tell_no_secret() -> None:
    from botocore.exceptions import ClientError, EndpointConnectionError, NoCredentialsError, ReadTimeoutError

    def answer(status: int) -> ClientError:
        return ClientError({"Error": {"Code": "X"}, "ResponseMetadata": {"HTTPStatusCode": status}}, "PutObject")

    gone = ClientError({"Error": {"Code": "NoSuchBucket"}, "ResponseMetadata": {"HTTPStatusCode": 404}}, "DeleteObject")

    class ConnectionError(OSError):
        pass

    class ServiceRequestError(Exception):  # as that of azure.core, whose others have a status_code
        status_code = 503

    backend = DjangoStorageBackend("default")
    secret = "https://bucket/key?X-Amz-Signature=s3cr3t"
    for native, expected in (
        (answer(403), AccessDenied),
        (answer(404), NotFound),
        (gone, ConfigurationError),  # for whoever discards, no word that the object is gone
        (answer(503), BackendUnavailable),
        (answer(507), OutOfSpace),
        (EndpointConnectionError(endpoint_url=secret), BackendUnavailable),
        (ReadTimeoutError(endpoint_url=secret), DeadlineExceeded),
        (NoCredentialsError(), ConfigurationError),
        (ConnectionError(secret), BackendUnavailable),
        (ServiceRequestError(secret), BackendUnavailable),
    ):
        mapped = backend._map_error(native, "read 'key'")
        assert type(mapped) is expected, native
        assert "s3cr3t" not in str(mapped)


@pytest.mark.asyncio
async def test_storages_are_named_by_alias_path_or_url(tmp_path: Path) -> None:
    from django.core.files.storage import storages
    from django.test import override_settings

    made = {"BACKEND": "django.core.files.storage.FileSystemStorage", "OPTIONS": {"location": str(tmp_path)}}
    with override_settings(STORAGES={"default": made, "Media": made}):
        for backend in (
            DjangoStorageBackend("Media", prefix="pre"),
            original_from_url("django://Media/pre"),
            original_from_url("django://Media/pre?max_workers=2&timeouts.idle=5"),
        ):
            assert isinstance(backend, DjangoStorageBackend)
            await backend.write("key", b"x")
            assert files_below(tmp_path) == ["pre/key"]
            assert [info.key async for info in backend.list()] == ["key"]
            await backend.discard("key")
        for wrong in ("none", "no.such.Storage", "django.core.files.storage.NoSuch"):
            with pytest.raises(ConfigurationError, match=wrong):
                await DjangoStorageBackend(wrong).stat("key")
        assert storages["default"] is not None
    path = "django.core.files.storage.FileSystemStorage"
    with override_settings(MEDIA_ROOT=str(tmp_path)):
        await original_from_url(f"django://{path}").write("by-path", b"x")
    assert files_below(tmp_path) == ["by-path"]
    for url in ("django://", "django://user:s3cr3t@alias", "django://alias?nonsense=1"):
        with pytest.raises(ConfigurationError) as caught:
            original_from_url(url)
        assert "s3cr3t" not in str(caught.value)
    with pytest.raises(ConfigurationError, match="no Django storage"):
        DjangoStorageBackend(object())


@pytest.mark.asyncio
async def test_the_default_storage_is_an_instance_like_others(tmp_path: Path) -> None:
    """``default_storage`` is a lazy object around what STORAGES says."""
    from django.core.files.storage import default_storage
    from django.test import override_settings

    made = {"BACKEND": "django.core.files.storage.FileSystemStorage", "OPTIONS": {"location": str(tmp_path)}}
    with override_settings(STORAGES={"default": made}):
        backend = DjangoStorageBackend(default_storage)
        assert backend.capabilities == files(tmp_path).capabilities
        assert str(backend) == "DjangoStorageBackend('FileSystemStorage')"
        await backend.write("key", b"x")
        with pytest.raises(AlreadyExists):
            await backend.write("key", b"y")
    assert files_below(tmp_path) == ["key"]


class Overtaken(FileSystemStorage):
    """Somebody else creates the file between the question and the save."""

    def exists(self, name: str) -> bool:
        if super().exists(name):
            return True
        Path(self.path(name)).write_bytes(b"the winner's")
        return False


@pytest.mark.asyncio
async def test_a_failed_write_never_deletes_the_file_of_the_winner(tmp_path: Path) -> None:
    async def failing() -> AsyncIterator[bytes]:
        for _ in range(20):
            yield b"x" * 100_000
        raise ConnectionResetError

    backend = DjangoStorageBackend(Overtaken(tmp_path))
    with pytest.raises((AlreadyExists, ContentError)):
        await backend.write("cv.pdf", failing())
    await backend.aclose()
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == {"cv.pdf": b"the winner's"}


# -- handles: there is no ETag that would tell one object from the next at the same key


OLD, NEW = b"A" * 1000, b"B" * 1000


def proxy(tmp_path: Path, **options: Any) -> ProxyStorage:
    return ProxyStorage("media", originals=files(tmp_path), meta=MemoryMetaBackend(), chunk_bytes=100, **options)


@pytest.mark.asyncio
@pytest.mark.parametrize("checksum", ["sha256", None])
@pytest.mark.parametrize("how", ["saved anew", "key restored"])
async def test_a_handle_never_mixes_two_files(tmp_path: Path, how: str, checksum: str | None) -> None:
    async with proxy(tmp_path, checksum=checksum) as storage:
        await storage.save("a.bin", OLD)
        async with storage.open("a.bin") as file:
            assert await file.read(100) == OLD[:100]
            if how == "saved anew":
                await storage.delete("a.bin")
                await storage.save("a.bin", NEW)
            else:
                await storage.replace("a.bin", NEW)
                await reconcile(storage, dry_run=False, force=True)
                await storage.restore_key("a.bin")
            assert (await storage.get("a.bin")).original_storage_path == "a.bin"
            await file.seek(500)
            for _ in range(2):
                with pytest.raises(Conflict, match="open it again"):
                    await file.read(100)


@pytest.mark.asyncio
async def test_a_handle_reads_on_while_its_file_is_there(tmp_path: Path) -> None:
    async with proxy(tmp_path) as storage:
        await storage.save("a.bin", OLD)
        await storage.replace("a.bin", NEW)
        async with storage.open("a.bin") as file:
            version = file.record.version
            await reconcile(storage, dry_run=False, force=True)  # the record moves on, the bytes do not
            assert (await storage.get("a.bin")).version > version
            await file.seek(500)
            assert await file.read(100) == NEW[500:600]


@pytest.mark.asyncio
async def test_a_handle_whose_file_was_deleted_says_so(tmp_path: Path) -> None:
    async with proxy(tmp_path) as storage:
        await storage.save("a.bin", OLD)
        async with storage.open("a.bin") as file:
            await storage.delete("a.bin")
            await file.seek(500)
            with pytest.raises(Conflict):
                await file.read(100)
