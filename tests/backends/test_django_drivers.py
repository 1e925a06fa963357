"""The storages of django-storages whose ways are their own: the real classes, over services that are played."""

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio

from aproxy_storage import AccessDenied, BackendUnavailable, ByteRange, NotFound, Timeouts
from aproxy_storage.content import Source
from aproxy_storage.testing._backend_hooks import BackendHooks
from aproxy_storage.testing.backends import LifeTests, ListTests, ReadTests, WriteTests
from tests.django_support.fake_services import FakeDropbox, FakeFtp, dropbox_storage, ftp_storage
from tests.django_support.setup import configure

configure()

from django.core.files.storage import FileSystemStorage  # noqa: E402

from aproxy_storage.backends.django import DjangoStorageBackend  # noqa: E402

BIG = b"0123456789" * 900_000  # three parts of Dropbox's


async def pieces(data: bytes) -> AsyncIterator[bytes]:
    for start in range(0, len(data), 1 << 20):
        yield data[start : start + (1 << 20)]


async def whole(backend: Any, key: str, **options: Any) -> bytes:
    async with backend.read(key, **options) as reader:
        return b"".join([chunk async for chunk in reader])


class Driver(BackendHooks):
    """What has to work with every storage, so far as it does not ask the storage for more than it is."""

    service: Any

    test_every_kind_of_content = WriteTests.test_every_kind_of_content
    test_taken_key_is_refused_and_untouched = WriteTests.test_taken_key_is_refused_and_untouched
    _objects_behind = WriteTests._objects_behind
    test_failing_content_leaves_nothing = WriteTests.test_failing_content_leaves_nothing
    test_discard = ReadTests.test_discard
    KEYS = ListTests.KEYS
    test_listing_is_in_byte_order = ListTests.test_listing_is_in_byte_order
    test_errors_say_where_they_happened = LifeTests.test_errors_say_where_they_happened
    pytestmark = pytest.mark.asyncio

    async def put_behind(self, backend: Any, key: str, data: bytes) -> None:
        self.service.files[f"/{key}"] = data
        parts = key.split("/")[:-1]
        if hasattr(self.service, "directories"):
            self.service.directories |= {"/" + "/".join(parts[:count]) for count in range(1, len(parts) + 1)}

    async def get_behind(self, backend: Any, key: str) -> bytes | None:
        return self.service.files.get(f"/{key}")

    async def list_behind(self, backend: Any) -> list[str]:
        return [path.removeprefix("/") for path in self.service.files]

    async def test_large_content_of_every_size_that_may_be_known(self, backend: Any, tmp_path: Path) -> None:
        path = tmp_path / "file"
        path.write_bytes(BIG)
        with path.open("rb") as file:
            for name, content, size in (
                ("declared", pieces(BIG), len(BIG)),
                ("unknown", pieces(BIG), None),
                ("path", path, None),
                ("file", file, None),
            ):
                source = Source.of(content, size=size)
                assert (await backend.write(name, source)).size == source.seen_size == len(BIG)
                assert source.checksum is not None
                assert self.service.files[f"/{name}"] == BIG
        assert await whole(backend, "path", byte_range=ByteRange(8_999_993, 8_999_998)) == b"34567"

    async def test_missing_files_are_told_from_empty_ones(self, backend: Any) -> None:
        await backend.write("dir/empty", b"")
        assert (await backend.stat("dir/empty")).size == 0
        assert await whole(backend, "dir/empty") == b""
        for key in ("dir/missing", "no/such/directory", "missing"):
            with pytest.raises(NotFound):
                await backend.stat(key)
            with pytest.raises(NotFound):
                await whole(backend, key)
            await backend.discard(key)
        assert [info.key async for info in backend.list("no/such/")] == []
        await backend.discard("dir/empty")
        await backend.discard("dir/empty")
        assert self.service.files == {}


class TestDropboxStorage(Driver):
    service: FakeDropbox

    @pytest_asyncio.fixture
    async def backend(self, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[DjangoStorageBackend]:
        with dropbox_storage(monkeypatch) as (storage, self.service):
            async with DjangoStorageBackend(storage) as backend:
                yield backend

    async def test_to_look_a_file_up_does_not_fetch_it(self, backend: Any) -> None:
        await backend.write("key", b"0123456789")
        assert (await backend.stat("key")).size == 10
        assert self.service.fetched == 0

    async def test_an_error_that_says_nothing_is_not_a_missing_file(
        self, backend: Any, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        from tests.django_support.fake_services import ApiError

        def refuse(path: str) -> Any:
            raise ApiError("too_many_write_operations")

        await backend.write("dir/key", b"x")
        for name in ("files_delete", "files_list_folder", "files_download"):
            monkeypatch.setattr(self.service, name, refuse)
        with pytest.raises(BackendUnavailable):
            await backend.discard("dir/key")
        with pytest.raises(BackendUnavailable):
            await whole(backend, "dir/key")
        for directory in ("", "dir/"):
            with pytest.raises(BackendUnavailable):
                [info async for info in backend.list(directory)]
        assert self.service.files == {"/dir/key": b"x"}


class TestFTPStorage(Driver):
    service: FakeFtp

    @pytest_asyncio.fixture
    async def backend(self, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[DjangoStorageBackend]:
        with ftp_storage(monkeypatch) as (storage, self.service):
            async with DjangoStorageBackend(storage, max_workers=1) as backend:
                yield backend
        assert not self.service.overlapped

    async def test_one_thread_reads_and_writes(self, backend: Any) -> None:
        """Also a copy within the storage, whose write would wait for its read, and that for the thread."""
        backend.timeouts = Timeouts(idle=20.0)
        await backend.write("from", BIG)

        async def copy(number: int) -> None:
            async with backend.read("from", chunk_bytes=1 << 18) as reader:
                await backend.write(f"to{number}", reader)

        await asyncio.gather(*(copy(number) for number in range(3)))
        assert {self.service.files[f"/to{number}"] for number in range(3)} == {BIG}


class Answered(Exception):
    """As an error of requests: it carries the answer."""

    def __init__(self, status: int) -> None:
        self.response = type("Response", (), {"status_code": status})


class Elsewhere(FileSystemStorage):
    """A service with URLs, such as WebDAV's, whose client raises what it is answered."""

    refused = 0

    def path(self, name: str) -> str:
        raise NotImplementedError

    def exists(self, name: str) -> bool:
        return Path(super().path(name)).exists()

    def delete(self, name: str) -> None:
        if self.refused or not self.exists(name):
            raise Answered(self.refused or 404)
        Path(super().path(name)).unlink()


@pytest.mark.asyncio
async def test_a_file_that_is_gone_is_discarded_whatever_the_service_says(tmp_path: Path) -> None:
    storage = Elsewhere(tmp_path)
    (tmp_path / "key").write_bytes(b"x")
    async with DjangoStorageBackend(storage) as backend:
        await backend.discard("missing")
        for storage.refused, error in ((403, AccessDenied), (409, BackendUnavailable), (503, BackendUnavailable)):
            with pytest.raises(error):
                await backend.discard("key")
        assert (tmp_path / "key").exists()
        storage.refused = 0
        for _ in range(2):
            await backend.discard("key")
        assert not (tmp_path / "key").exists()
        storage.refused = 409
        await backend.discard("key")
