"""File fields: their owner is in the record; files go on commit; every verb has an async twin; forms, fixtures."""

import asyncio
import io
import os
import pickle
import unittest
import uuid
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from asgiref.sync import async_to_sync, sync_to_async
from django.conf import settings
from django.core import serializers
from django.core.exceptions import FieldError
from django.core.files.base import ContentFile
from django.core.files.uploadedfile import SimpleUploadedFile
from django.core.management import call_command
from django.db import DatabaseError, connections, transaction
from django.db.migrations.writer import MigrationWriter
from django.forms import modelform_factory
from django.http import StreamingHttpResponse
from django.template import Context, Template
from django.test import RequestFactory, override_settings
from PIL import Image

from aproxy_storage import AlreadyExists, BackendUnavailable, MetaRecord, NotFound, ProxyStorage, registry
from aproxy_storage.backends.memory import MemoryBackend
from aproxy_storage.meta_backends.memory import MemoryMetaBackend
from sync_bridge import (
    BridgeStorage,
    ProxyStorageFileField,
    SyncCallOnEventLoop,
    aget_content_object,
    fields,
    get_content_object,
)
from tests.bridge.desk.models import Memo, Message, Notice, Paper, Person, Picture, Plain, Scan
from tests.django_support.setup import add_database, remove_database, sqlite_settings

pytestmark = pytest.mark.usefixtures("default")


BOTH = pytest.mark.parametrize("default", ["sqlite", "postgres"], indirect=True)


class Rollback(Exception):
    pass


@pytest.fixture
def person() -> Person:
    return Person.objects.create(name="Om")


def file(data: bytes = b"data", name: str = "f.txt") -> ContentFile:
    return ContentFile(data, name=name)


def run(function: Callable[[], Any]) -> Any:
    """Run an asynchronous test body, and close what Django opened for it in its own thread."""

    async def whole() -> Any:
        try:
            return await function()
        finally:
            await sync_to_async(connections.close_all)()

    return asyncio.run(whole())


# -- the owner


@BOTH
def test_the_record_names_the_owner(default: BridgeStorage) -> None:
    message = Message.objects.create(attach=file())
    assert message.attach.name == "messages/f.txt"
    record = default.get(message.attach.name)
    assert (record["object_id"], record["field"]) == (str(message.pk), "attach")
    assert get_content_object(record) == message
    assert get_content_object(default.get(default.copy(record.path, "copy.txt"))) is None


def test_the_owner_is_written_only_when_the_file_has_changed(
    default: BridgeStorage, django_assert_queries: Any
) -> None:
    message = Message.objects.create(attach=file())
    with django_assert_queries(1):
        message.save()
    loaded = Message.objects.get(pk=message.pk)
    loaded.text = "changed"
    with django_assert_queries(1):
        loaded.save()
    deferred = Message.objects.defer("attach").get(pk=message.pk)
    with django_assert_queries(1):
        deferred.save()
    assert deferred.attach.name == message.attach.name
    with django_assert_queries(1):
        deferred.save()
    loaded.attach = default.save("elsewhere.txt", file())
    loaded.save(update_fields=["text"])
    assert get_content_object(default.get("elsewhere.txt")) is None
    loaded.save()
    assert get_content_object(default.get("elsewhere.txt")) == message


@pytest.fixture
def django_assert_queries() -> Any:
    from django.db import connection
    from django.test.utils import CaptureQueriesContext

    class Exactly(CaptureQueriesContext):
        def __init__(self, count: int) -> None:
            super().__init__(connection)
            self.count = count

        def __exit__(self, *details: Any) -> None:
            super().__exit__(*details)
            statements = [query["sql"] for query in self.captured_queries]
            assert (
                sum(not text.startswith(("SAVEPOINT", "RELEASE", "BEGIN", "COMMIT")) for text in statements)
                == self.count
            )

    return Exactly


@pytest.mark.parametrize("cls", [Memo, Notice])
def test_a_proxy_or_child_names_the_model_that_has_the_column(default: BridgeStorage, cls: Any) -> None:
    written = cls.objects.create(attach=file())
    record = default.get(written.attach.name)
    assert get_content_object(record) == Message.objects.get(pk=written.pk)
    Message.objects.get(pk=written.pk).save()
    assert default.get(written.attach.name).extra == record.extra


@BOTH
def test_an_object_with_a_key_of_its_own_kind(default: BridgeStorage, person: Person) -> None:
    paper = Paper(owner=person)
    paper.file.save("p.txt", file(), save=False)
    assert get_content_object(default.get(paper.file.name)) is None
    paper.save()
    assert isinstance(paper.pk, uuid.UUID)
    assert paper.file.name == "papers/Om/p.txt"
    assert get_content_object(default.get(paper.file.name)) == paper


@BOTH
def test_no_record_is_no_reason_to_fail(default: BridgeStorage, caplog: pytest.LogCaptureFixture) -> None:
    message = Message.objects.create(attach="was/never/stored.txt")
    assert "has no record" in caplog.text
    assert Message.objects.get(pk=message.pk).attach.name == "was/never/stored.txt"


def test_fixtures(default: BridgeStorage, caplog: pytest.LogCaptureFixture, tmp_path: Path) -> None:
    message = Message.objects.create(attach=file())
    dumped = serializers.serialize("json", Message.objects.all())
    message.delete()
    (restored,) = serializers.deserialize("json", dumped)
    restored.save()
    assert Message.objects.get().attach.read() == b"data"
    (tmp_path / "messages.json").write_text(dumped.replace("messages/f.txt", "not/here.txt"))
    call_command("loaddata", tmp_path / "messages.json", verbosity=0)
    assert not caplog.records


def test_an_owner_that_is_gone_is_none(default: BridgeStorage, caplog: pytest.LogCaptureFixture) -> None:
    message = Message.objects.create(attach=file())
    record = default.get(message.attach.name)
    message.delete()
    assert get_content_object(record) is None
    assert get_content_object({**record, "object_id": "not a number"}) is None
    assert get_content_object({**record, "content_type_id": 987654}) is None
    caplog.clear()
    for kind in ("desk.message", "1.0", [1], float("inf"), 10**40):
        assert get_content_object({**record, "content_type_id": kind}) is None
    assert "of a content type 'desk.message', which is no number" in caplog.messages[0]
    assert get_content_object({"path": "a"}) is None
    assert default.exists(record.path), "deleting a row does not delete the file, unless it is asked for"


@BOTH
@pytest.mark.parametrize("cls", [Message, Memo, Notice])
@pytest.mark.parametrize("how", ["replaced", "cleared"])
def test_a_file_that_the_field_holds_no_more_is_nobodys(
    default: BridgeStorage, cls: Any, how: str, django_assert_queries: Any
) -> None:
    owner = cls.objects.create(attach=file(b"secret"))
    record = default.get(owner.attach.name)
    message = Message.objects.get(pk=owner.pk)
    with django_assert_queries(1):
        assert get_content_object(record) == message
    owner.attach = file(b"harmless", "g.txt") if how == "replaced" else ""
    owner.save()
    assert get_content_object(default.get(record.path)) is None
    if how == "replaced":
        assert get_content_object(default.get("messages/g.txt")) == message


def test_the_next_object_of_that_key_owns_none_of_its_files(default: BridgeStorage) -> None:
    record = default.get(Message.objects.create(pk=77, attach=file()).attach.name)
    Message.objects.all().delete()
    Message.objects.create(pk=77, attach=file(name="g.txt"))
    assert get_content_object(record) is None


def test_an_owner_holds_its_file_in_the_field_and_storage_of_the_record(
    default: BridgeStorage, caplog: pytest.LogCaptureFixture
) -> None:
    record = {**default.get(Message.objects.create(attach=file()).attach.name)}
    assert get_content_object(record) == Message.objects.get()
    assert get_content_object({**record, "proxy_storage_name": "another"}) is None
    assert get_content_object({**record, "field": "text"}) is None
    assert not caplog.records
    assert get_content_object({**record, "field": "gone"}) is None
    assert "names no field of desk.Message" in caplog.text
    Message.objects.update(attach="messages\\f.txt")  # of a database from Windows
    assert get_content_object(record) == Message.objects.get()


# -- the seed's authorization: any file of any model, by one look-up


def may_read(storage: BridgeStorage, person: Person, path: str) -> bool:
    record = storage.meta_backend.get(path)
    owner: Any = get_content_object(record)
    return owner is not None and owner.may_be_read_by(person, record["field"])


def test_who_may_read_a_file_is_known_to_its_owner(default: BridgeStorage, person: Person) -> None:
    other, third = Person.objects.create(name="Nom"), Person.objects.create(name="Third")
    message = Message.objects.create(author=person, receiver=other, attach=file(name="om.png"))
    paper = Paper.objects.create(owner=person, file=file(name="om.png"))
    # The three problems of one directory for each model: equal names, a query for each model, no field to tell.
    assert message.attach.name != paper.file.name
    assert [may_read(default, one, message.attach.name) for one in (person, other, third)] == [True, True, False]
    assert [may_read(default, one, paper.file.name) for one in (person, other, third)] == [True, False, False]


def test_two_storages_share_their_records_and_every_record_finds_its_own(
    default: BridgeStorage, tmp_path: Path
) -> None:
    resumes = BridgeStorage(location=tmp_path / "resumes", name="resumes")
    first = default.save("om.png", file(b"attachment"))
    second = resumes.save("om.png", file(b"resume"))
    assert first != second, "a path is one file, whatever its storage"
    for path, expected in ((first, default), (second, resumes)):
        record = default.meta_backend.get(path)
        assert record.get_proxy_storage() is expected.proxy
        assert registry.get_storage(record.proxy_storage_name) is expected.proxy
    with pytest.raises(FileNotFoundError):
        default.get(second)
    assert default.meta_backend.get(second).get_original_storage_full_path() == resumes.path(second)


# -- the file as an attribute


def test_the_attribute_is_a_file(default: BridgeStorage) -> None:
    message = Message()
    assert not message.attach
    with pytest.raises(ValueError, match="no file"):
        message.attach.open()
    message.attach.save("a.txt", file(b"Hello"))
    message = Message.objects.get()
    assert (message.attach.size, message.attach.url) == (5, "/media/messages/a.txt")
    assert Path(message.attach.path).read_bytes() == b"Hello"
    with message.attach.open() as opened:
        assert opened.read() == b"Hello"
    with pytest.raises(RuntimeError), message.attach.open("wb") as opened:
        opened.write(b"half")
        raise RuntimeError
    assert default.open(message.attach.name).read() == b"Hello"
    message.attach.delete()
    assert not Message.objects.get().attach
    assert not default.exists("messages/a.txt")
    with pytest.raises(FieldError):
        Message.objects.create(attach=ContentFile(b"without a name"))


def test_max_length_of_the_column_is_kept(person: Person) -> None:
    papers = [Paper.objects.create(owner=person, file=file(name="n" * 90 + ".txt")) for _ in range(2)]
    assert all(len(paper.file.name) <= 60 for paper in papers)
    assert len({paper.file.name for paper in papers}) == 2


def test_djangos_own_field_works_over_it(default: BridgeStorage) -> None:
    plain = Plain.objects.create(file=file())
    assert default.get(plain.file.name).size == 4
    assert Plain.objects.get().file.read() == b"data"
    plain.file.close()


def png(width: int, height: int) -> bytes:
    out = io.BytesIO()
    Image.new("RGB", (width, height)).save(out, "PNG")
    return out.getvalue()


def test_dimensions_of_images(default: BridgeStorage) -> None:
    picture = Picture.objects.create(image=SimpleUploadedFile("p.png", png(30, 20), "image/png"))
    picture = Picture.objects.get(pk=picture.pk)
    assert (picture.width, picture.height, picture.image.width) == (30, 20, 30)
    assert default.get(picture.image.name).content_type == "image/png"
    picture.image.close()
    picture.image.save("q.png", SimpleUploadedFile("q.png", png(7, 8)))
    assert (Picture.objects.get().width, Picture.objects.get().height) == (7, 8)

    async def main() -> None:
        await picture.image.asave("r.png", SimpleUploadedFile("r.png", png(5, 6)))
        assert (await Picture.objects.aget()).width == 5
        await picture.image.adelete()
        assert (await Picture.objects.aget()).width is None

    run(main)


# -- asynchronous


@BOTH
def test_the_twins_of_the_attribute(default: BridgeStorage) -> None:
    async def main() -> None:
        message = Message()
        await message.attach.asave("a.txt", ContentFile(b"Hello"))
        message = await Message.objects.aget()
        assert await message.attach.aread() == b"Hello"
        assert await message.attach.asize() == 5
        assert await message.attach.aurl() == "/media/messages/a.txt"
        async with message.attach.aopen() as opened:
            assert await opened.read() == b"Hello"
        assert [chunk async for chunk in message.attach] == [b"Hello"]
        assert [chunk async for chunk in message.attach.stream()] == [b"Hello"]
        assert await aget_content_object(await default.proxy.get(message.attach.name)) == message
        await message.attach.adelete()
        assert not (await Message.objects.aget()).attach
        with pytest.raises(ValueError, match="no file"):
            await message.attach.aread()
        await message.attach.adelete()
        await default.proxy.aclose()

    run(main)


def test_a_stream_is_asynchronous_for_django_and_comes_in_chunks(default: BridgeStorage) -> None:
    data = os.urandom(1 << 20).replace(b"\n", b"x") * 5  # one line
    message = Message.objects.create(attach=file(data))

    async def main() -> None:
        response = StreamingHttpResponse(message.attach.stream())
        assert response.is_async
        chunks = [chunk async for chunk in response]
        assert b"".join(chunks) == data
        assert max(map(len, chunks)) <= default.proxy.chunk_bytes
        await default.proxy.aclose()

    run(main)


def test_a_synchronous_save_in_an_async_view_says_what_to_do(default: BridgeStorage) -> None:
    async def main() -> None:
        with pytest.raises(SyncCallOnEventLoop, match="asave"):
            Message().attach.save("a.txt", file())
        await sync_to_async(Message.objects.create)(attach=file())  # as the error says

    run(main)
    assert Message.objects.count() == 1


def test_a_template_on_the_loop_shows_the_url(default: BridgeStorage) -> None:
    message = Message.objects.create(attach=file(name="ä.txt"))
    unsigned = ProxyStorage("unsigned", originals=MemoryBackend(), meta=MemoryMetaBackend())
    without = BridgeStorage(storage=unsigned)

    async def main() -> None:
        loaded = await Message.objects.aget(pk=message.pk)
        assert Template("{{ m.attach.url }}").render(Context({"m": loaded})) == "/media/messages/%C3%A4.txt"
        with pytest.raises(SyncCallOnEventLoop, match="aurl"):
            without.url("a.txt")

    run(main)


# -- transactions


@BOTH
def test_a_save_that_is_rolled_back_is_no_file(default: BridgeStorage, media: Path) -> None:
    with pytest.raises(Rollback), transaction.atomic():
        message = Message.objects.create(attach=file())
        assert default.exists(message.attach.name)
        assert message.attach.read() == b"data"
        raise Rollback
    assert not default.exists(message.attach.name)
    assert (media / "messages" / "f.txt").exists(), "a scan finds it"

    from aproxy_storage.tools.reconcile import reconcile
    from sync_bridge.bridge import bridge

    report = bridge.call(reconcile, default.proxy, scan=True, min_age=0, dry_run=False)
    assert report.counts == {"removed": 1}
    assert not (media / "messages" / "f.txt").exists()


def saved_and_rolled_back(scan: Scan, how: str) -> None:
    """Let `scan` be stored in a transaction that is rolled back."""
    with pytest.raises((Rollback, DatabaseError)), transaction.atomic():
        if how == "bulk":
            Scan.objects.bulk_create([scan])
        elif how == "async":
            async_to_sync(scan.file.asave)("x.txt", scan.file.file, save=False)
        elif how == "not written":  # what fails is the row
            scan.save(force_insert=True)
        else:
            scan.save()
        raise Rollback


@pytest.mark.parametrize("how", ["saved", "not written", "bulk", "async"])
@pytest.mark.parametrize("nested", [False, True])
def test_an_object_that_is_saved_again_after_a_rollback_has_its_file(
    default: BridgeStorage, how: str, nested: bool
) -> None:
    Scan.objects.create(pk=5)
    scan = Scan(pk=5 if how == "not written" else 6, file=file(b"irreplaceable", "x.txt"))
    with transaction.atomic() if nested else nullcontext():
        saved_and_rolled_back(scan, how)
        assert not default.exists("shared/x.txt")
        scan.pk = 6
        for _ in range(2):
            scan.save()
    assert Scan.objects.get(pk=6).file.read() == b"irreplaceable"
    record = default.get("shared/x.txt")
    assert get_content_object(record) == scan
    assert record.checksum is not None
    with default.open(record, "rb") as opened:
        assert opened.read() == b"irreplaceable"


@BOTH
def test_a_replacement_that_is_saved_again_after_a_rollback(default: BridgeStorage, django_assert_queries: Any) -> None:
    scan = Scan.objects.create(file=file(b"1", "r1.txt"))
    scan.file = file(b"2", "r2.txt")
    for _ in range(2):
        saved_and_rolled_back(scan, "saved")
    scan.save()
    assert Scan.objects.get().file.read() == b"2"
    assert get_content_object(default.get("shared/r2.txt")) == scan
    assert default.listdir("shared")[1] == ["r2.txt"]
    with django_assert_queries(1):
        scan.save()


@pytest.mark.parametrize("by", ["nothing", "another size", "another token", "another's file", "the same size"])
def test_no_row_names_a_file_whose_bytes_have_gone_after_a_rollback(
    default: BridgeStorage, media: Path, by: str
) -> None:
    scan = Scan(file=file(b"mine", "x.txt"))
    saved_and_rolled_back(scan, "saved")
    os.unlink(media / "shared/x.txt")
    if by == "another size":
        (media / "shared/x.txt").write_bytes(b"of others")
    elif by == "another token":
        os.rename(default.path(default.save("other.txt", b"four")), media / "shared/x.txt")
    elif by == "another's file":  # which gets the key, once a scan has removed the bytes
        bobs = Scan.objects.create(file=file(b"bobs", "x.txt"))
    elif by == "the same size":  # of a service that does not say by which write they came
        (media / "shared/x.txt").write_bytes(b"bobs")
    with pytest.raises(NotFound, match="give the field its file once more"):
        scan.save()
    assert Scan.objects.count() == (by == "another's file")
    if by == "another's file":
        assert get_content_object(default.get("shared/x.txt")) == bobs
    scan.file = file(b"once more", "x.txt")
    scan.save()
    assert Scan.objects.get(pk=scan.pk).file.read() == b"once more"


@pytest.mark.parametrize("found", ["the checksum", "no checksum"])
def test_bytes_that_do_not_say_by_which_write_they_came_are_told_by_their_checksum(
    default: BridgeStorage, media: Path, found: str
) -> None:
    scan = Scan(file=file(b"irreplaceable", "x.txt"))
    saved_and_rolled_back(scan, "saved")
    os.removexattr(media / "shared/x.txt", "user.aproxy.token")
    if found == "the checksum":
        scan.save()
        assert Scan.objects.get().file.read() == b"irreplaceable"
    else:
        scan.__dict__["_file_uncommitted"] = replace(scan.__dict__["_file_uncommitted"], checksum=None)
        with pytest.raises(NotFound, match="give the field its file once more"):
            scan.save()


def test_a_name_that_was_taken_after_a_rollback_is_left_to_its_file(default: BridgeStorage, media: Path) -> None:
    scan = Scan(file=file(b"mine", "x.txt"))
    saved_and_rolled_back(scan, "saved")
    default.bridge.call(default.proxy.save, "shared/x.txt", b"of others")
    scan.save()
    name = Scan.objects.get().file.name
    assert name != "shared/x.txt"
    assert (media / name).read_bytes() == Scan.objects.get().file.read() == b"mine"
    assert default.open("shared/x.txt").read() == b"of others"
    assert get_content_object(default.get(name)) == scan


def test_bytes_that_others_have_taken_in_after_a_rollback_are_not_named_twice(default: BridgeStorage) -> None:
    scan = Scan(file=file(b"mine", "x.txt"))
    saved_and_rolled_back(scan, "saved")
    default.adopt("shared/x.txt")
    scan.save()
    assert Scan.objects.get().file.read() == b"mine"
    saved_and_rolled_back(other := Scan(file=file(b"2", "y.txt")), "saved")
    default.bridge.call(default.proxy.adopt, "shared/y.txt", name="z.txt")
    default.bridge.call(default.proxy.save, "shared/y.txt", b"of others")
    for _ in range(2):
        with pytest.raises(AlreadyExists, match="another file by now"):
            other.save()
        default.delete("shared/y.txt")


@pytest.fixture(params=[True, False], ids=["published", "not published"])
def overwriting(default: BridgeStorage, request: pytest.FixtureRequest) -> Iterator[BridgeStorage]:
    """The default storage, with ``allow_overwrite``. Where nothing is published keys stay as they are."""
    elsewhere = {} if request.param else {"original": MemoryBackend(), "base_url": "/m/"}
    given = {"BACKEND": "sync_bridge.BridgeStorage", "OPTIONS": {"allow_overwrite": True, **elsewhere}}
    with override_settings(STORAGES={**settings.STORAGES, "default": given}):
        yield default


@pytest.mark.parametrize("since", ["nothing", "deleted", "renamed", "saved by others"])
def test_a_replacement_that_was_rolled_back_is_not_made_again(overwriting: BridgeStorage, since: str) -> None:
    scan = Scan.objects.create(file=file(b"old", "x.txt"))
    path = scan.file.name
    scan.file = file(b"irreplaceable", "x.txt")
    saved_and_rolled_back(scan, "saved")
    assert scan.file.name == path
    kept = {path: b"old"}
    if since == "renamed":
        overwriting.rename(path, "bobs.txt")
        kept = {"bobs.txt": b"old"}
    elif since != "nothing":
        overwriting.delete(path)
        kept = {}
    if since == "saved by others":
        kept = {overwriting.save(path, b"bobs"): b"bobs"}
    with pytest.raises(NotFound, match="was rolled back; give the field its file once more"):
        scan.save()
    call_command("proxystorage_reconcile", apply=True, force=True, verbosity=0)
    records = overwriting.bridge.call(every_record, overwriting)
    assert {record.path: overwriting.open(record).read() for record in records} == kept
    scan.file = file(b"once more", "x.txt")
    scan.save()
    assert Scan.objects.get().file.read() == b"once more"


@pytest.mark.parametrize("way", ["refreshed", "loaded anew"])
def test_an_object_that_was_loaded_after_a_rollback_has_its_old_file(overwriting: BridgeStorage, way: str) -> None:
    scan = Scan.objects.create(file=file(b"old", "x.txt"))
    scan.file = file(b"new", "x.txt")
    saved_and_rolled_back(scan, "saved")
    if way == "refreshed":
        scan.refresh_from_db()
    else:
        scan = Scan.objects.get()
    scan.subject = "x"
    scan.save()
    assert Scan.objects.get(subject="x").file.read() == b"old"


def test_a_refreshed_object_does_not_forget_in_a_transaction_what_it_replaced(overwriting: BridgeStorage) -> None:
    scan = Scan.objects.create(file=file(b"old", "x.txt"))
    with pytest.raises(Rollback), transaction.atomic():
        scan.file = file(b"new", "x.txt")
        scan.save()
        scan.refresh_from_db()
        scan.save()
        raise Rollback
    with pytest.raises(NotFound, match="was rolled back"):
        scan.save()


def test_a_savepoint_made_by_hand_is_rolled_back_too(default: BridgeStorage) -> None:
    with transaction.atomic():
        savepoint = getattr(transaction, "savepoint_create", transaction.savepoint)()  # its name since Django 6.1
        scan = Scan.objects.create(file=file(b"irreplaceable", "x.txt"))
        transaction.savepoint_rollback(savepoint)
        scan.save(force_insert=True)
    assert Scan.objects.get().file.read() == b"irreplaceable"


@pytest.mark.parametrize("replaced", [False, True])
@pytest.mark.parametrize("change", ["written", "replaced", "deleted and written anew"])
def test_an_object_is_saved_after_its_file_was_changed_in_its_transaction(
    overwriting: BridgeStorage, change: str, replaced: bool
) -> None:
    if replaced:
        Scan.objects.create(pk=5, file=file(b"old", "x.txt"))
    with transaction.atomic():
        scan = Scan(pk=5, file=file(b"1", "x.txt"))
        scan.save()
        path = scan.file.name
        if change == "written":
            with overwriting.open(path, "wb") as opened:
                opened.write(b"2")
        elif change == "replaced":
            overwriting.replace(path, b"2")
        else:
            overwriting.delete(path)
            overwriting.publish(path, b"2")
        scan.subject = "edited"
        scan.save()
    assert Scan.objects.get(subject="edited").file.read() == b"2"


def test_a_name_that_a_transaction_passes_on_is_another_file(default: BridgeStorage) -> None:
    with transaction.atomic():
        scan = Scan.objects.create(file=file(b"1", "x.txt"))
        default.rename("shared/x.txt", "y.txt")
        default.publish("shared/x.txt", b"2")
        with pytest.raises(AlreadyExists, match="set the field to the path"), transaction.atomic():
            scan.save()
        scan.file = "y.txt"
        scan.save()
    assert Scan.objects.get().file.read() == b"1"


@pytest.mark.parametrize("change", ["renamed", "deleted"])
def test_a_file_that_the_transaction_itself_takes_away_is_not_made_again(default: BridgeStorage, change: str) -> None:
    with transaction.atomic():
        scan = Scan.objects.create(file=file(b"1", "x.txt"))
        if change == "renamed":
            default.rename("shared/x.txt", "y.txt")
        else:
            default.delete("shared/x.txt")
        scan.save()
    assert [record.path for record in default.bridge.call(every_record, default)] == ["y.txt"] * (change == "renamed")


async def every_record(storage: BridgeStorage) -> list[Any]:
    return [record async for record in storage.proxy.meta.list()]


@BOTH
def test_what_is_deleted_or_replaced_is_as_it_was_after_a_rollback(default: BridgeStorage, media: Path) -> None:
    path = default.save("a.txt", file(b"old"))
    for change in (
        lambda: default.delete(path),
        lambda: default.replace(path, ContentFile(b"new")),
        lambda: default.rename(path, "b.txt"),
        lambda: default.open(path, "wb").close(),
    ):
        with pytest.raises(Rollback), transaction.atomic():
            change()
            raise Rollback
        with default.open(path) as opened:
            assert opened.read() == b"old"
    with transaction.atomic():
        default.delete(path)
        assert (media / path).exists(), "no byte goes before the commit"
        assert not default.exists(path)
    assert not (media / path).exists()


@BOTH
def test_on_commit_inside_a_testcase(default: BridgeStorage, media: Path) -> None:
    from django.test import TestCase

    class Case(TestCase):
        def runTest(self) -> None:
            with self.captureOnCommitCallbacks(execute=True):
                path = default.save("t.txt", file())
                default.delete(path)
                assert (media / path).exists()
            assert not (media / path).exists()
            Message.objects.create(attach=file())

    result = unittest.TestSuite([Case()]).run(unittest.TestResult())
    assert result.wasSuccessful(), (result.errors, result.failures)
    assert not Message.objects.exists()


@BOTH
def test_delete_on_replace(default: BridgeStorage, person: Person) -> None:
    paper = Paper.objects.create(owner=person, file=file(b"1", "first.txt"))
    first = paper.file.name
    with pytest.raises(Rollback), transaction.atomic():
        paper.file = file(b"2", "second.txt")
        paper.save()
        raise Rollback
    assert default.exists(first)
    paper = Paper.objects.get()
    copy = Paper.objects.create(owner=person, file=first)
    paper.file = file(b"3", "third.txt")
    paper.save()
    assert default.exists(first), "the copy of the object has it too"
    copy.file = None
    copy.save()
    assert not default.exists(first)


@pytest.mark.parametrize("change", ["replaced", "deleted"])
def test_a_row_of_another_database_keeps_its_file(
    default: BridgeStorage, person: Person, archive: str, change: str
) -> None:
    paper = Paper.objects.create(owner=person, file=file(b"1", "a.txt"))
    path = paper.file.name
    person.save(using=archive)
    paper.save(using=archive)  # as Django's documentation copies a row
    paper = Paper.objects.using("default").get()
    if change == "deleted":
        paper.delete()
    else:
        paper.file.save("b.txt", file(b"2"))
    copy = Paper.objects.using(archive).get()
    assert copy.file.read() == b"1"
    assert get_content_object(default.get(path)) is None
    assert get_content_object(default.get(path), using=archive) == copy
    copy.delete()
    assert not default.exists(path)


class NotHere:
    def allow_migrate(self, db: str, app_label: str, **hints: Any) -> bool:
        return db == "default"


@pytest.mark.parametrize(
    ("how", "kept"),
    [("unreachable", True), ("without tables", False), ("mirror", False), ("not allowed", False), ("dummy", False)],
)
def test_only_databases_with_rows_of_the_model_are_asked(
    default: BridgeStorage, person: Person, tmp_path: Path, how: str, kept: bool, caplog: pytest.LogCaptureFixture
) -> None:
    given = sqlite_settings(tmp_path / ("x" if how == "without tables" else "no such directory/x"))
    if how == "mirror":
        given["TEST"] = {"MIRROR": "default"}
    if how == "dummy":
        given = {}
    add_database("archive", given)
    try:
        with override_settings(DATABASE_ROUTERS=[NotHere()] if how == "not allowed" else []):
            paper = Paper.objects.create(owner=person, file=file())
            path = paper.file.name
            if how == "without tables":
                with transaction.atomic(using="archive"):
                    paper.delete()
                    connections["archive"].cursor().execute("SELECT 1")  # its transaction goes on
            else:
                paper.delete()
        assert default.exists(path) == kept
        assert ("is kept" in caplog.text) == kept
    finally:
        remove_database("archive")


def test_in_a_testcase_that_forbids_a_database_files_are_kept(
    default: BridgeStorage, archive: str, caplog: pytest.LogCaptureFixture
) -> None:
    from django.test import TestCase

    class Case(TestCase):
        def runTest(self) -> None:
            paper = Paper.objects.create(owner=Person.objects.create(), file=file())
            with self.captureOnCommitCallbacks(execute=True):
                paper.delete()
            assert default.exists(paper.file.name)

    result = unittest.TestSuite([Case()]).run(unittest.TestResult())
    assert result.wasSuccessful(), (result.errors, result.failures)
    assert "is kept" in caplog.text
    assert "are not allowed in this test" in caplog.text


@pytest.mark.parametrize("change", ["deleted", "replaced"])
@pytest.mark.parametrize("kind", [BackendUnavailable, RuntimeError])
def test_a_file_that_cannot_be_deleted_on_commit_stops_no_other_hook(
    default: BridgeStorage,
    person: Person,
    change: str,
    kind: type[Exception],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    papers = [Paper.objects.create(owner=person, file=file(name=name)) for name in ("a.txt", "b.txt")]
    paths = [paper.file.name for paper in papers]
    ran: list[str] = []
    delete = BridgeStorage.delete

    def failing(storage: BridgeStorage, record: MetaRecord) -> None:
        if record.path == paths[0]:
            raise kind("of this test")
        delete(storage, record)

    monkeypatch.setattr(BridgeStorage, "delete", failing)
    with transaction.atomic():
        for paper in papers:
            if change == "deleted":
                paper.delete()
            else:
                paper.file.save("new.txt", file())
        transaction.on_commit(lambda: ran.append("mail"))
    assert ran == ["mail"]
    assert [default.exists(path) for path in paths] == [True, False]
    assert "of this test" in caplog.text
    monkeypatch.undo()
    if change == "replaced":
        papers[0].save()
        assert not default.exists(paths[0]), "it is tried again with the next save"


@pytest.mark.parametrize("how", ["instance", "queryset"])
def test_delete_with_object(default: BridgeStorage, person: Person, how: str) -> None:
    paper = Paper.objects.create(owner=person, file=file())
    path = paper.file.name
    with pytest.raises(Rollback), transaction.atomic():
        Paper.objects.all().delete()
        raise Rollback
    assert default.exists(path)
    if how == "instance":
        paper.delete()
    else:
        Paper.objects.all().delete()
    assert not default.exists(path)
    message = Message.objects.create(attach=file())
    message.delete()
    assert default.exists(message.attach.name)


@pytest.mark.parametrize("cls", [Message, Paper])
@pytest.mark.parametrize("how", ["only", "defer", "gone"])
def test_objects_are_deleted_whose_file_was_not_loaded(
    default: BridgeStorage, person: Person, cls: Any, how: str
) -> None:
    if cls is Paper:
        path = Paper.objects.create(owner=person, file=file()).file.name
    else:
        path = Message.objects.create(attach=file()).attach.name
    if how == "only":
        cls.objects.only("pk").delete()
    else:
        deferred = cls.objects.only("pk").get()
        if how == "gone":
            cls.objects.all().delete()
        deferred.delete()
    assert not cls.objects.exists()
    assert default.exists(path) == (cls is Message)


# -- a former file is deleted only while it is this object's


def changed_elsewhere() -> Scan:
    """Return a scan as it was loaded before another request gave it another file, and a message its old name."""
    Scan.objects.create(file=file(b"scan", "x.txt"))
    held = Scan.objects.get()
    elsewhere = Scan.objects.get()
    elsewhere.file.save("y.txt", file(b"new scan"))
    message = Message()
    message.attach.storage.save("shared/x.txt", file(b"of the message"))
    message.attach = "shared/x.txt"
    message.save()
    return held


def test_a_file_that_is_somebody_elses_by_now_is_not_deleted(default: BridgeStorage) -> None:
    held = changed_elsewhere()
    held.file.save("z.txt", file(b"newest"))
    assert default.open("shared/x.txt").read() == b"of the message"
    assert get_content_object(default.get("shared/x.txt")) == Message.objects.get()


@pytest.mark.parametrize("storage", ["BridgeStorage", "a subclass"])
def test_what_is_saved_while_others_are_asked_is_not_deleted(
    default: BridgeStorage, person: Person, monkeypatch: pytest.MonkeyPatch, storage: str
) -> None:
    paper, row_with = Paper.objects.create(owner=person, file=file(b"1", "a.txt")), fields._OwnedFileMixin._row_with
    path, deleted = paper.file.name, []

    def late(*args: Any) -> Any:
        found = row_with(*args)
        default.delete(path)
        assert default.save(path, file(b"of another request")) == path
        return found

    class Own(BridgeStorage):
        def delete(self, name: str) -> None:
            deleted.append(name)

    if storage == "a subclass":
        monkeypatch.setattr(Paper._meta.get_field("file"), "storage", Own())
    monkeypatch.setattr(fields._OwnedFileMixin, "_row_with", late)
    Paper.objects.get().file.save("b.txt", file(b"2"))
    assert default.open(path).read() == b"of another request"
    assert deleted == ([path] if storage == "a subclass" else [])


def test_an_owner_is_not_written_into_the_next_file_of_the_path(
    default: BridgeStorage, monkeypatch: pytest.MonkeyPatch
) -> None:
    get = BridgeStorage.get

    def late(storage: BridgeStorage, name: str) -> Any:
        found = get(storage, name)
        storage.delete(name)
        storage.save(name, file(b"of another request"))
        return found

    message = Message(attach=default.save("a.txt", file(b"1")))
    monkeypatch.setattr(BridgeStorage, "get", late)
    message.save()
    monkeypatch.undo()
    assert dict(default.get("a.txt").extra) == {}


def test_what_is_remembered_follows_a_refresh(default: BridgeStorage) -> None:
    held = changed_elsewhere()
    held.refresh_from_db()
    held.subject = "changed"
    held.save()
    assert default.open("shared/x.txt").read() == b"of the message"
    held.file.save("z.txt", file(b"newest"))
    assert not default.exists("shared/y.txt"), "which the refresh has brought"
    assert default.exists("shared/x.txt")


def test_deleting_an_object_that_is_out_of_date_leaves_what_is_somebody_elses(
    default: BridgeStorage, person: Person
) -> None:
    Paper.objects.create(owner=person, file=file(b"1", "a.txt"))
    held = Paper.objects.get()
    Paper.objects.get().file.save("b.txt", file(b"2"))
    taken = Message.objects.create(attach=default.save("papers/Om/a.txt", file(b"of the message")))
    held.delete()
    assert default.open(taken.attach.name).read() == b"of the message"


@pytest.mark.parametrize("how", ["sync", "async", "loaded", "without contenttypes"])
def test_a_deleted_file_is_not_remembered(default: BridgeStorage, how: str, monkeypatch: pytest.MonkeyPatch) -> None:
    scan = Scan.objects.create(file=file(b"first", "x.txt"))
    if how == "loaded":
        scan = Scan.objects.get()
    if how == "without contenttypes":
        monkeypatch.setattr(ProxyStorageFileField, "_owner", lambda *_: {})
    if how != "async":
        scan.file.delete(save=False)
    else:
        run(lambda: scan.file.adelete(save=False))
    # Another request, which has saved and has not yet said whose it is.
    default.save("shared/x.txt", file(b"of another"))
    scan.save()
    assert default.open("shared/x.txt").read() == b"of another"
    assert not Scan.objects.get().file


def test_a_file_without_an_owner_in_its_record_is_deleted(default: BridgeStorage) -> None:
    Scan.objects.create(file=file(b"1", "x.txt"))
    default.update("shared/x.txt", extra={})
    Scan.objects.get().file.save("y.txt", file(b"2"))
    assert not default.exists("shared/x.txt")


def replaced_by_one_that_was_loaded_without_it(new: Any) -> None:
    scan = Scan.objects.only("subject").get()
    scan.file = new
    scan.save()


def replaced_after_a_rolled_back_deletion(new: Any) -> None:
    scan = Scan.objects.get()
    with pytest.raises(Rollback), transaction.atomic():
        scan.file.delete()
        raise Rollback
    scan.file = new
    scan.save()


def replaced_after_a_bulk_creation(new: Any) -> None:
    Scan.objects.get().file.delete()
    Scan.objects.all().delete()
    (scan,) = Scan.objects.bulk_create([Scan(file=file(b"1", "x.txt"))])
    scan.file = new
    scan.save()


@pytest.mark.parametrize("cleared", [False, True])
@pytest.mark.parametrize(
    "replace",
    [
        replaced_by_one_that_was_loaded_without_it,
        replaced_after_a_rolled_back_deletion,
        replaced_after_a_bulk_creation,
    ],
)
def test_an_object_that_did_not_know_its_former_file_deletes_it(
    default: BridgeStorage, replace: Callable[[Any], None], cleared: bool
) -> None:
    Scan.objects.create(file=file(b"1", "x.txt"))
    replace("" if cleared else file(b"2", "y.txt"))
    assert default.listdir("shared")[1] == ["y.txt"] * (not cleared)
    if not cleared:
        assert get_content_object(default.get("shared/y.txt")) == Scan.objects.get()


def test_what_no_row_has_had_is_not_deleted(default: BridgeStorage) -> None:
    path = default.save("of/others.txt", b"1")
    scan = Scan(pk=Scan.objects.create().pk, file=path)
    with pytest.raises(DatabaseError):
        Scan.objects.bulk_create([scan])
    scan.pk = None
    scan.file = file(b"2", "y.txt")
    scan.save()
    loaded = Scan.objects.only("subject").get(pk=scan.pk)
    loaded.file = "shared/y.txt"
    loaded.save()
    assert default.exists(path)
    assert default.exists("shared/y.txt")


def test_a_rollback_loses_no_former_file_from_memory(default: BridgeStorage) -> None:
    Scan.objects.create(file=file(b"1", "r1.txt"))
    scan = Scan.objects.get()
    with pytest.raises(Rollback), transaction.atomic():
        scan.file.save("r2.txt", file(b"2"))
        raise Rollback
    assert default.exists("shared/r1.txt")
    Path(default.path(scan.file.name)).unlink()  # as a scan does
    taken = default.save("taken.txt", file(b"of somebody without a word in the record"))
    default.rename(taken, scan.file.name)
    scan.file.save("r3.txt", file(b"3"))
    assert not default.exists("shared/r1.txt")
    assert default.exists("shared/r2.txt"), "the one that was rolled back is no file of this object"
    scan.file.save("r4.txt", file(b"4"))
    assert default.listdir("shared")[1] == ["r2.txt", "r4.txt"]


def test_a_refresh_after_a_rollback_keeps_what_the_row_has(default: BridgeStorage) -> None:
    Scan.objects.create(file=file(b"1", "r1.txt"))
    scan = Scan.objects.get()
    with pytest.raises(Rollback), transaction.atomic():
        scan.file.save("r2.txt", file(b"2"))
        raise Rollback
    scan.refresh_from_db()
    assert scan.file.name == "shared/r1.txt"
    scan.save()
    assert default.exists("shared/r1.txt")
    scan.file.save("r3.txt", file(b"3"))
    assert default.listdir("shared")[1] == ["r3.txt"]


def test_several_replacements_in_one_transaction_leave_the_last(default: BridgeStorage) -> None:
    scan = Scan.objects.create(file=file(b"1", "r1.txt"))
    with transaction.atomic():
        for name in ("r2.txt", "r3.txt"):
            scan.file.save(name, file())
    assert default.listdir("shared")[1] == ["r3.txt"]


def test_an_object_that_was_kept_elsewhere_remembers(default: BridgeStorage) -> None:
    Scan.objects.create(file=file(b"1", "x.txt"))
    scan = pickle.loads(pickle.dumps(Scan.objects.get()))
    scan.file.save("y.txt", file(b"2"))
    assert default.listdir("shared")[1] == ["y.txt"]


def test_an_upload_that_was_not_saved_is_no_file_to_delete(default: BridgeStorage, person: Person) -> None:
    paper = Paper.objects.create(owner=person, file=file(b"1", "a.txt"))
    default.save("b.txt", file(b"of somebody"))
    paper.file = SimpleUploadedFile("b.txt", b"2")
    paper.delete()
    assert default.exists("b.txt")
    assert not default.exists("papers/Om/a.txt")


def test_a_file_of_two_objects_belongs_to_the_one_that_keeps_it(default: BridgeStorage) -> None:
    scan = Scan.objects.create(file=file(b"1", "x.txt"))
    copy = Scan.objects.create(file=scan.file.name)
    assert get_content_object(default.get("shared/x.txt")) == copy
    copy.file.save("y.txt", file(b"2"))
    assert get_content_object(default.get("shared/x.txt")) == scan
    scan.file = ""
    scan.save()
    assert default.listdir("shared")[1] == ["y.txt"]


# -- forms, uploads


def test_a_form_uploads_changes_and_clears(default: BridgeStorage, person: Person) -> None:
    form_class = modelform_factory(Paper, fields=["file"])

    def submit(instance: Paper, files: dict[str, Any], **data: Any) -> Paper:
        form = form_class(data, files, instance=instance)
        assert form.is_valid(), form.errors
        saved: Paper = form.save()
        return saved

    paper = submit(Paper(owner=person), {"file": SimpleUploadedFile("a.txt", b"1")})
    first = paper.file.name
    assert "papers/Om/a.txt" in str(form_class(instance=paper))
    submit(Paper.objects.get(), {})
    assert Paper.objects.get().file.name == first
    submit(Paper.objects.get(), {"file": SimpleUploadedFile("b.txt", b"2")})
    assert not default.exists(first)
    paper = submit(Paper.objects.get(), {}, **{"file-clear": "on"})
    assert not Paper.objects.get().file
    assert default.listdir("papers/Om") == ([], [])


@pytest.mark.parametrize("memory", [0, 1 << 20])
def test_an_upload_through_a_request(default: BridgeStorage, memory: int) -> None:
    data = bytes(range(256)) * 400
    with override_settings(FILE_UPLOAD_MAX_MEMORY_SIZE=memory):
        request = RequestFactory().post("/", {"attach": SimpleUploadedFile("u.own", data, "application/x-own")})
        message = Message.objects.create(attach=request.FILES["attach"])
        request.close()
    record = default.get(message.attach.name)
    assert (record.size, record.content_type) == (len(data), "application/x-own")
    with default.open(message.attach.name) as opened:
        assert opened.read() == data


@pytest.mark.parametrize(("name", "stored"), [("u.zzz", None), ("u.html", "text/html")])
@pytest.mark.parametrize("declared", ["text/html", "text/\x01html", "x" * 300])
def test_an_upload_does_not_choose_a_type_that_is_executed(
    default: BridgeStorage, name: str, stored: str | None, declared: str
) -> None:
    def upload() -> SimpleUploadedFile:
        return SimpleUploadedFile(name, b"\0<script>alert(1)</script>", declared)

    assert default.get(default.save(name, upload())).content_type == stored
    assert default.get(run(lambda: default.asave(name, upload()))).content_type == stored
    given = default.save("given", upload(), content_type="text/html")
    assert default.get(given).content_type == "text/html", "what the programmer says counts"


# -- migrations


live = ProxyStorage("live", originals=MemoryBackend(), meta=MemoryMetaBackend())


def make_live() -> ProxyStorage:
    return live


def test_migrations_write_names_and_no_secrets(default: BridgeStorage) -> None:
    def written(storage: BridgeStorage) -> str:
        return MigrationWriter.serialize(ProxyStorageFileField(storage=storage, upload_to="x"))[0]

    assert "storage=sync_bridge.BridgeStorage(storage='live')" in written(BridgeStorage(storage=live))
    assert f"storage='{__name__}.make_live'" in written(BridgeStorage(storage=make_live))
    assert f"storage='{__name__}.live'" in written(BridgeStorage(storage=f"{__name__}.live"))
    assert "location='/srv/x', name='x'" in written(BridgeStorage(location="/srv/x", name="x", keys="path")).replace(
        ", keys='path'", ""
    )
    secret = BridgeStorage(name="described", original="memory://user:password@host", meta="memory://")
    assert "password" not in written(secret)
    assert "storage='described'" in written(secret)
    kept = BridgeStorage(storage=live)
    assert BridgeStorage(storage="live").proxy is kept.proxy is live
    field = ProxyStorageFileField(delete_on_replace=True, delete_with_object=True)
    assert field.deconstruct()[3] == {"delete_on_replace": True, "delete_with_object": True, "upload_to": ""}
    again = BridgeStorage(storage=live)
    assert again.deconstruct() == BridgeStorage(storage=live).deconstruct()


def test_makemigrations_finds_nothing_to_do() -> None:
    call_command("makemigrations", "sync_bridge", check=True, dry_run=True, verbosity=0)
