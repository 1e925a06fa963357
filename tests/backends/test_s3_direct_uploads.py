"""Uploads from a browser straight to the service become files of the storage, or leave nothing."""

import asyncio
import contextlib
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import aiohttp
import pytest
import pytest_asyncio

from aproxy_storage import Conflict, DirectUpload, NotFound, NotSupported, ObjectInfo, ProxyStorage
from aproxy_storage.backends.memory import MemoryBackend
from aproxy_storage.meta_backends.memory import MemoryMetaBackend
from aproxy_storage.meta_backends.sqlite import SQLiteMetaBackend
from aproxy_storage.testing.interruptions import interruptions
from aproxy_storage.tools.reconcile import reconcile
from tests.backends.test_s3 import backend_of
from tests.services.s3 import S3Service

pytestmark = pytest.mark.asyncio


@pytest_asyncio.fixture
async def storage(s3_service: S3Service, tmp_path: Path) -> AsyncIterator[ProxyStorage]:
    async with ProxyStorage(
        "media",
        originals={"memory": MemoryBackend(), "s3": backend_of(s3_service)},
        meta=SQLiteMetaBackend(tmp_path / "meta.sqlite3"),
        prefix="media",
    ) as storage:
        yield storage


async def post(upload: DirectUpload, content: bytes, *, part_type: str | None = None, **changed: str) -> int:
    """Upload as a browser does; return the status."""
    data = aiohttp.FormData()
    for name, value in {**upload.form.fields, **changed}.items():
        data.add_field(name, value)
    data.add_field("file", content, filename="whatever.bin", content_type=part_type)
    async with aiohttp.ClientSession() as browser, browser.post(upload.form.url, data=data) as answer:
        return answer.status


async def behind(service: S3Service) -> list[str]:
    def look() -> list[str]:
        with contextlib.closing(service.client()) as client:
            return service.everything(client)

    return await asyncio.to_thread(look)


async def content(storage: ProxyStorage, path: str) -> bytes:
    async with storage.open(path) as file:
        return await file.read()


async def test_an_upload_becomes_a_file(storage: ProxyStorage, s3_service: S3Service) -> None:
    upload = await storage.begin_upload("cv.pdf", max_bytes=100, content_type="application/pdf", extra={"owner": 7})
    assert upload.path == "media/cv.pdf"
    assert not await storage.exists(upload.path), "it is not there yet"
    with pytest.raises(NotFound, match="nothing has been uploaded"):
        await storage.finish_upload(upload.path)
    assert await post(upload, b"x" * 101) >= 400
    assert await post(upload, b"%PDF") in (200, 204)
    record = await storage.finish_upload(upload.path)
    assert (record.path, record.size, record.content_type) == ("media/cv.pdf", 4, "application/pdf")
    assert (record.original_storage_name, record.original_storage_path) == ("s3", "cv.pdf")
    assert record.extra == {"owner": 7}
    assert await content(storage, upload.path) == b"%PDF"
    assert await behind(s3_service) == ["cv.pdf"]
    assert await storage.finish_upload(upload.path) == await storage.get(upload.path), "a second time is the same"


@pytest.mark.parametrize(
    ("name", "given", "expected"),
    [
        ("avatar.png", None, "image/png"),
        ("avatar", None, "application/octet-stream"),
        ("avatar.png", "image/webp", "image/webp"),
    ],
)
async def test_the_uploader_does_not_choose_the_type(
    name: str, given: str | None, expected: str, storage: ProxyStorage
) -> None:
    upload = await storage.begin_upload(name, max_bytes=100, content_type=given)
    assert await post(upload, b"<script>", **{"Content-Type": "text/html"}) == 403
    assert await post(upload, b"<script>", part_type="text/html") in (200, 204)
    record = await storage.finish_upload(upload.path)
    assert record.content_type == expected
    assert (await storage.get_original("s3").stat(name)).content_type == expected


@pytest.mark.parametrize(("said", "expected"), [("text/html", "application/octet-stream"), ("image/png", "image/png")])
async def test_forms_that_said_no_type_make_no_pages(said: str, expected: str, storage: ProxyStorage) -> None:
    """Such as were given by an earlier version."""
    upload = await storage.begin_upload("avatar", max_bytes=100, content_type=said)
    await post(upload, b"<script>")
    await storage.meta.update(upload.path, {"content_type": None})
    assert (await storage.finish_upload(upload.path)).content_type == expected
    assert (await storage.get_original("s3").stat("avatar")).content_type == expected


async def test_the_form_cannot_change_a_finished_file(storage: ProxyStorage, s3_service: S3Service) -> None:
    upload = await storage.begin_upload("cv.pdf", max_bytes=100)
    await post(upload, b"harmless")
    await storage.finish_upload(upload.path)
    assert await post(upload, b"harmful!") in (200, 204), "the form is good until it ends"
    assert await content(storage, upload.path) == b"harmless"
    assert len(await behind(s3_service)) == 2
    await reconcile(storage, dry_run=False)
    assert len(await behind(s3_service)) == 2, "not before the form has ended"
    await reconcile(storage, dry_run=False, force=True)
    assert await behind(s3_service) == ["cv.pdf"]
    await storage.delete(upload.path)
    assert await behind(s3_service) == []


async def test_an_abandoned_upload_is_undone(storage: ProxyStorage, s3_service: S3Service) -> None:
    uploads = [await storage.begin_upload("a.txt", max_bytes=100) for _ in range(2)]
    assert uploads[0].path != uploads[1].path, "the name is reserved"
    await post(uploads[0], b"abandoned")
    assert await storage.tidy() == 0, "its lease lasts as long as the form"
    await reconcile(storage, dry_run=False, force=True)
    assert await behind(s3_service) == []
    for upload in uploads:
        with pytest.raises(NotFound):
            await storage.finish_upload(upload.path)
    assert await storage.save("a.txt", b"x", using="s3") == "media/a.txt", "the name is free again"


async def test_taken_names_and_keys(storage: ProxyStorage, s3_service: S3Service) -> None:
    await storage.save("a.txt", b"first")
    upload = await storage.begin_upload("a.txt", max_bytes=100)
    assert upload.path.startswith("media/a_")
    foreign = await storage.begin_upload("b.txt", max_bytes=100)
    await storage.get_original("s3").write("b.txt", b"somebody else's")
    await post(foreign, b"mine")
    record = await storage.finish_upload(foreign.path)
    assert record.path == "media/b.txt"
    assert record.original_storage_path != "b.txt"
    assert await content(storage, record.path) == b"mine"
    async with storage.get_original("s3").read("b.txt") as reader:
        assert reader.data == b"somebody else's"


async def test_two_who_finish(storage: ProxyStorage, s3_service: S3Service) -> None:
    upload = await storage.begin_upload("a.txt", max_bytes=100)
    await post(upload, b"hello")
    results = await asyncio.gather(*(storage.finish_upload(upload.path) for _ in range(4)), return_exceptions=True)
    for result in results:
        assert isinstance(result, Conflict) or getattr(result, "path", None) == upload.path, results
    record = await storage.finish_upload(upload.path)
    assert await content(storage, record.path) == b"hello"
    assert await behind(s3_service) == ["a.txt"]


async def test_a_long_copy_keeps_the_lease_for_as_long_as_the_form_is_good(
    s3_service: S3Service, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Renewed for less, it would run out before the form, should this process die: nobody would look again."""
    backend = backend_of(s3_service)
    copy, seen = backend.copy, []

    async def slow_copy(*args: Any, **options: Any) -> ObjectInfo:
        for _ in range(10):
            await asyncio.sleep(0.05)
            seen.append((await storage.meta.get(upload.path)).lease)
        return await copy(*args, **options)

    monkeypatch.setattr(backend, "copy", slow_copy)
    meta = SQLiteMetaBackend(tmp_path / "meta.sqlite3")
    async with ProxyStorage("media", originals={"s3": backend}, meta=meta, lease=0.3) as storage:
        upload = await storage.begin_upload("a.txt", max_bytes=100, expires_in=60)
        await post(upload, b"hello")
        form_ends = (await storage.meta.get(upload.path)).lease
        await storage.finish_upload(upload.path)
        assert form_ends is not None
        assert [lease for lease in seen if lease is None or lease < form_ends] == []


async def test_finishing_may_be_cancelled_at_every_await(storage: ProxyStorage, s3_service: S3Service) -> None:
    async def work() -> None:
        await storage.finish_upload(upload.path)

    upload = await storage.begin_upload("a0.txt", max_bytes=100)
    await post(upload, b"hello")
    number = 0
    async for _ in interruptions(work, ways=("waiting", "answered")):
        assert (await storage.finish_upload(upload.path)).size == 5, "it could not be finished any more"
        assert await content(storage, upload.path) == b"hello"
        number += 1
        upload = await storage.begin_upload(f"a{number}.txt", max_bytes=100)
        await post(upload, b"hello")
    await storage.finish_upload(upload.path)
    await reconcile(storage, dry_run=False, force=True)
    assert await behind(s3_service) == sorted(f"a{each}.txt" for each in range(number + 1))


async def test_who_cannot_says_so(storage: ProxyStorage) -> None:
    with pytest.raises(NotSupported):
        await storage.begin_upload("a", max_bytes=1, using="memory")
    plain = ProxyStorage("plain", originals=MemoryBackend(), meta=MemoryMetaBackend())
    with pytest.raises(NotSupported, match="no original"):
        await plain.begin_upload("a", max_bytes=1)
    for wrong in ({"max_bytes": 0}, {"max_bytes": 1, "expires_in": 0}):
        with pytest.raises(ValueError, match="must be positive"):
            await storage.begin_upload("a", **wrong)  # type: ignore[arg-type]
    saved = await storage.save("saved", b"x")
    assert (await storage.finish_upload(saved)).path == saved
    with pytest.raises(NotFound):
        await storage.finish_upload("media/never")


async def test_names_that_cannot_be(storage: ProxyStorage) -> None:
    for name in ("../a", "a//b", "x" * 300):
        with pytest.raises(ValueError, match="legal"):
            await storage.begin_upload(name, max_bytes=1)
    short: Any = await storage.begin_upload("a-rather-long-name.txt", max_bytes=1, max_length=24)
    assert len(short.path) <= 24
