"""The management commands: adopt, copy, reconcile, verify."""

from __future__ import annotations

import contextlib
import hashlib
import io
import os
import threading
import weakref
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tests.django_support.setup import configure

configure()

from django.apps import apps  # noqa: E402
from django.conf import settings  # noqa: E402
from django.contrib.contenttypes.models import ContentType  # noqa: E402
from django.core.files.base import ContentFile  # noqa: E402
from django.core.files.storage import FileSystemStorage, Storage, default_storage, storages  # noqa: E402
from django.core.management import CommandError, call_command  # noqa: E402
from django.db.models import FileField  # noqa: E402
from django.test import override_settings  # noqa: E402

from aproxy_storage import MetaRecord, ProxyStorage, registry  # noqa: E402
from aproxy_storage.backends.filesystem import FileSystemBackend  # noqa: E402
from aproxy_storage.backends.memory import MemoryBackend  # noqa: E402
from aproxy_storage.meta_backends.memory import MemoryMetaBackend  # noqa: E402
from aproxy_storage.meta_backends.sqlite import SQLiteMetaBackend  # noqa: E402
from sync_bridge import BridgeStorage, base, get_content_object  # noqa: E402
from sync_bridge.bridge import bridge as default_bridge  # noqa: E402
from sync_bridge.management.base import StorageCommand, bridge_storage, unwrapped  # noqa: E402
from sync_bridge.models import StoredFile  # noqa: E402
from tests.bridge.desk.models import Message, Picture, Plain  # noqa: E402


def run(command: str, *arguments: Any, **options: Any) -> tuple[str, str]:
    """Run a command; return what it said, and what it complained about."""
    said, complained = io.StringIO(), io.StringIO()
    try:
        call_command(command, *arguments, stdout=said, stderr=complained, **options)
    except CommandError as error:
        complained.write(str(error))
    return said.getvalue(), complained.getvalue()


@pytest.fixture
def before(media: Path, django_database: Path) -> FileSystemStorage:
    """The storage that the site had before: files below MEDIA_ROOT, no records."""
    return FileSystemStorage(media)


def old_messages(before: FileSystemStorage, count: int) -> list[Message]:
    """Make messages as Django's own field had left them."""
    made = []
    for number in range(count):
        name = before.save(f"messages/{number} 写真.txt", ContentFile(f"letter {number}".encode()))
        made.append(Message(text=str(number), attach=name))
    Message.objects.bulk_create(made)
    return list(Message.objects.order_by("pk"))


# -- adopt


@pytest.mark.parametrize("batch", [2, 500])
def test_the_files_of_a_field_are_adopted(before: FileSystemStorage, batch: int) -> None:
    messages = old_messages(before, 5)
    Message.objects.create(text="without a file")
    said, complained = run("proxystorage_adopt", "desk.Message.attach", batch=batch)
    assert (said, complained) == ("5 adopted, 0 had a record.\n", "")
    for message in messages:
        path = message.attach.name
        assert message.attach.read() == f"letter {message.text}".encode()
        record = default_storage.get(path)
        assert record.original_storage_path == path
        assert get_content_object(record) == message
    assert run("proxystorage_adopt", "desk.Message.attach")[0] == "0 adopted, 5 had a record.\n"


def test_a_field_of_djangos_own_is_adopted_too(before: FileSystemStorage) -> None:
    Plain.objects.create(file=before.save("plain/x.txt", ContentFile(b"x")))
    assert run("proxystorage_adopt", "desk.Plain.file")[0] == "1 adopted, 0 had a record.\n"
    assert default_storage.exists("plain/x.txt")


def test_two_rows_with_one_file(before: FileSystemStorage) -> None:
    name = before.save("shared.txt", ContentFile(b"x"))
    Message.objects.bulk_create([Message(attach=name), Message(attach=name)])
    assert run("proxystorage_adopt", "desk.Message.attach")[1] == ""
    assert StoredFile.objects.count() == 1


@pytest.mark.parametrize("dry_run", [True, False])
def test_records_without_an_owner_get_one(before: FileSystemStorage, dry_run: bool) -> None:
    names = [default_storage.save("messages/x.txt", ContentFile(b"x")) for _ in range(3)]
    default_storage.update(names[0], extra={"shelf": 3})
    Message.objects.bulk_create([Message(attach=names[0]), Message(attach=names[0]), Message(attach=names[1])])
    owner = Message.objects.create(attach=names[2])
    Message.objects.bulk_create([Message(attach=names[2])])
    said, complained = run("proxystorage_adopt", "desk.Message.attach", dry_run=dry_run)
    assert said.startswith("0 adopted, 5 had a record, 2 without an owner got one.")
    assert complained == ""
    found = [get_content_object(default_storage.get(name)) for name in names]
    rows = [Message.objects.filter(attach=name).order_by("pk").first() for name in names]
    assert found == [None if dry_run else rows[0], None if dry_run else rows[1], owner]
    assert default_storage.get(names[0])["shelf"] == 3
    if not dry_run:
        assert run("proxystorage_adopt", "desk.Message.attach")[0] == "0 adopted, 5 had a record.\n"


def test_a_dry_run_changes_nothing_and_finds_what_is_missing(before: FileSystemStorage) -> None:
    messages = old_messages(before, 3)
    before.delete(messages[1].attach.name)
    said, complained = run("proxystorage_adopt", "desk.Message.attach", dry_run=True)
    assert said == "2 adopted, 0 had a record. Nothing was changed.\n"
    assert complained.startswith(f"desk.Message.attach of {messages[1].pk}: 'messages/1 写真.txt'")
    assert "1 failed" in complained
    assert StoredFile.objects.count() == 0


def test_a_failed_file_is_reported_and_the_rest_goes_on(before: FileSystemStorage) -> None:
    messages = old_messages(before, 4)
    before.delete(messages[0].attach.name)
    Message.objects.filter(pk=messages[2].pk).update(attach="../etc/passwd")
    said, complained = run("proxystorage_adopt", "desk.Message.attach", batch=1)
    assert said == "2 adopted, 0 had a record.\n"
    assert f"desk.Message.attach of {messages[0].pk}" in complained
    assert f"desk.Message.attach of {messages[2].pk}: '../etc/passwd'" in complained
    assert "2 failed" in complained


def test_it_goes_on_after_a_key(before: FileSystemStorage) -> None:
    messages = old_messages(before, 4)
    said, _ = run("proxystorage_adopt", "desk.Message.attach", after=str(messages[1].pk))
    assert said.startswith("2 adopted")


def test_uploads_go_on_beside_it(before: FileSystemStorage) -> None:
    """What a live site stores meanwhile has its records, and keeps its owner."""
    old_messages(before, 40)
    stop, made = threading.Event(), []

    def site() -> None:
        from django.db import connections

        try:
            while not stop.wait(0.02):  # without a pause SQLite would let nobody else write
                made.append(Message(text="new"))
                made[-1].attach.save("new.txt", ContentFile(b"new"))
        finally:
            connections.close_all()

    thread = threading.Thread(target=site)
    thread.start()
    try:
        complaints = [run("proxystorage_adopt", "desk.Message.attach", batch=3)[1] for _ in range(3)]
    finally:
        stop.set()
        thread.join()
    assert complaints == ["", "", ""]
    for message in Message.objects.all():
        assert get_content_object(default_storage.get(message.attach.name)) == message


def test_everything_in_the_directory_is_adopted(before: FileSystemStorage) -> None:
    for name in ("a.txt", "sub/b.txt", "sub/写真.txt"):
        before.save(name, ContentFile(b"x"))
    assert default_storage.save("new.txt", ContentFile(b"x")) == "new.txt"
    said, complained = run("proxystorage_adopt", storage="default", batch=2)
    assert (said, complained) == ("3 adopted, 1 had a record.\n", "")
    assert default_storage.listdir("sub") == ([], ["b.txt", "写真.txt"])
    assert run("proxystorage_adopt", storage="default")[0] == "0 adopted, 4 had a record.\n"


@pytest.mark.parametrize("dry_run", [True, False])
def test_what_cannot_be_adopted_is_named(before: FileSystemStorage, media: Path, tmp_path: Path, dry_run: bool) -> None:
    before.save("a/b.txt", ContentFile(b"x"))
    (tmp_path / "big").mkdir()
    (tmp_path / "big" / "c.txt").write_bytes(b"x")
    (media / "uploads").symlink_to(tmp_path / "big")
    (media / "a" / "newest.txt").symlink_to("b.txt")
    os.mkfifo(media / "a" / "fifo")
    (media / os.fsdecode(b"r\xe9sum\xe9.txt")).write_bytes(b"x")
    (media / "a" / "bad\\name.txt").write_bytes(b"x")
    said, complained = run("proxystorage_adopt", storage="default", dry_run=dry_run)
    assert said.startswith("1 adopted, 0 had a record.")
    told = dict(line.split(": ", 1) for line in complained.splitlines()[:-1])
    assert told.keys() == {"uploads", "a/newest.txt", "a/fifo", "r\\xe9sum\\xe9.txt", "a/bad\\name.txt"}
    for link in ("uploads", "a/newest.txt"):
        assert told[link].startswith("a symbolic link: ")
        assert "mount" in told[link]
    assert told["a/fifo"] == "a special file: it holds no file; move it away"
    assert told["r\\xe9sum\\xe9.txt"] == "a file whose name is not UTF-8: rename it, also in the rows that name it"
    assert told["a/bad\\name.txt"].endswith("; rename it, also in the rows that name it")
    assert complained.splitlines()[-1].startswith("5 failed")


def test_a_link_to_the_directory_of_another_storage_is_no_failure(
    before: FileSystemStorage, private: FileSystemStorage, media: Path, tmp_path: Path
) -> None:
    """It is the way out that the command names; a web server may go by the link still."""
    before.save("a.txt", ContentFile(b"x"))
    private.save("deep/b.txt", ContentFile(b"x"))
    (media / "uploads").symlink_to(tmp_path / "private")
    (media / "deep").symlink_to(tmp_path / "private" / "deep")
    said, complained = run("proxystorage_adopt", storage="default")
    assert (said, complained) == ("1 adopted, 0 had a record, 2 left to originals inside this one.\n", "")


def test_a_name_that_another_storage_has_taken_is_changed_in_the_row(before: FileSystemStorage) -> None:
    message = old_messages(before, 1)[0]
    other = MetaRecord(path=message.attach.name, proxy_storage_name="other", original_storage_path="elsewhere")
    storage = bridge_storage("default")
    storage.bridge.call(storage.proxy.meta.create, other)
    assert run("proxystorage_adopt", "desk.Message.attach")[0] == "1 adopted, 0 had a record.\n"
    old = message.attach.name
    message.refresh_from_db()
    assert message.attach.name != old
    assert message.attach.read() == b"letter 0"


@pytest.fixture
def private(tmp_path: Path, before: FileSystemStorage) -> Iterator[FileSystemStorage]:
    """What a second storage has below a directory of its own. It shares the table, and calls its original the same."""

    options = {"name": "private", "location": str(tmp_path / "private")}
    aliases = {**settings.STORAGES, "private": {"BACKEND": "sync_bridge.BridgeStorage", "OPTIONS": options}}
    with override_settings(STORAGES=aliases):
        yield FileSystemStorage(tmp_path / "private")


@pytest.mark.parametrize("dry_run", [False, True])
def test_a_key_that_a_storage_with_the_same_table_has_is_a_failure(
    before: FileSystemStorage, private: FileSystemStorage, dry_run: bool
) -> None:
    """The records tell originals apart by their names."""
    before.save("a.txt", ContentFile(b"public"))
    private.save("a.txt", ContentFile(b"secret"))
    private.save("b.txt", ContentFile(b"secret"))
    assert run("proxystorage_adopt", storage="default")[0] == "1 adopted, 0 had a record.\n"
    said, complained = run("proxystorage_adopt", storage="private", dry_run=dry_run)
    assert said.startswith("1 adopted, 0 had a record.")
    assert "a.txt: " in complained
    assert "storage 'default'" in complained
    assert "a table of its own (meta=) or an original of another name" in complained
    assert "1 failed" in complained
    assert storages["private"].exists("b.txt") is not dry_run
    assert not storages["private"].exists("a.txt")


def test_a_file_whose_name_is_taken_is_told_with_its_new_one(before: FileSystemStorage) -> None:
    before.save("a.txt", ContentFile(b"x"))
    other = MetaRecord(
        path="a.txt", proxy_storage_name="other", original_storage_name="elsewhere", original_storage_path="a.txt"
    )
    storage = bridge_storage("default")
    storage.bridge.call(storage.proxy.meta.create, other)
    said, complained = run("proxystorage_adopt", storage="default")
    assert said.startswith("a.txt: adopted as 'a_")
    assert said.endswith("1 adopted, 0 had a record.\n")
    assert complained == ""


def test_a_rival_of_another_storage_is_a_failure_too(
    before: FileSystemStorage, private: FileSystemStorage, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It came after the question, so that `ProxyStorage.adopt` meets it."""
    before.save("a.txt", ContentFile(b"public"))
    private.save("a.txt", ContentFile(b"secret"))
    proxy = storages["private"].proxy  # type: ignore[attr-defined]
    adopt = proxy.adopt

    async def late(*args: Any, **options: Any) -> str:
        await storages["default"].proxy.adopt("a.txt")  # type: ignore[attr-defined]
        path: str = await adopt(*args, **options)
        return path

    monkeypatch.setattr(proxy, "adopt", late)
    said, complained = run("proxystorage_adopt", storage="private")
    assert said == "0 adopted, 0 had a record.\n"
    assert "a table of its own (meta=)" in complained


@pytest.mark.parametrize("dry_run", [False, True])
def test_a_field_whose_keys_another_storage_has(
    before: FileSystemStorage, private: FileSystemStorage, monkeypatch: pytest.MonkeyPatch, dry_run: bool
) -> None:
    before.save("a.txt", ContentFile(b"public"))
    private.save("a.txt", ContentFile(b"secret"))
    assert run("proxystorage_adopt", storage="default")[1] == ""
    row = Plain.objects.create(file="a.txt")
    monkeypatch.setattr(Plain._meta.get_field("file"), "storage", storages["private"])
    said, complained = run("proxystorage_adopt", "desk.Plain.file", dry_run=dry_run)
    assert said.startswith("0 adopted, 0 had a record.")
    assert f"desk.Plain.file of {row.pk}: 'a.txt': " in complained
    assert "a table of its own (meta=) or an original of another name" in complained


@pytest.mark.parametrize(
    ("arguments", "options", "reason"),
    [
        ((), {}, "give either"),
        (("desk.Message.text",), {}, "is a CharField, not a file field"),
        (("desk.Message",), {}, "names no field"),
        (("desk.Message.attach",), {"storage": "default"}, "give either"),
        ((), {"storage": "nobody"}, "no storage 'nobody'"),
        ((), {"storage": "staticfiles"}, "is StaticFilesStorage, not a BridgeStorage"),
    ],
)
def test_mistakes_are_said(
    before: FileSystemStorage, arguments: tuple[str, ...], options: dict[str, Any], reason: str
) -> None:
    with pytest.raises(CommandError, match=reason):
        call_command("proxystorage_adopt", *arguments, **options)


# -- copy


@pytest.fixture
def live(tmp_path: Path, media: Path, django_database: Path) -> Iterator[FileSystemStorage]:
    """The storage of the live site, besides our own."""

    backend = "django.core.files.storage.FileSystemStorage"
    live = {"BACKEND": backend, "OPTIONS": {"location": str(tmp_path / "live")}}
    with override_settings(STORAGES={**settings.STORAGES, "live": live}):
        found = storages["live"]
        assert isinstance(found, FileSystemStorage)
        yield found


def test_the_files_of_all_models_are_copied(live: FileSystemStorage) -> None:
    names = [live.save(f"messages/{n} 写真.txt", ContentFile(b"x" * n)) for n in range(5)]
    Message.objects.bulk_create([Message(attach=name) for name in names])
    Picture.objects.bulk_create([Picture(width=1, height=1, image=live.save("pictures/om.png", ContentFile(b"png")))])
    live.save("of nobody.txt", ContentFile(b"no row names it"))
    dry, _ = run("proxystorage_copy", "live", "default", dry_run=True)
    assert dry == "6 copied, 0 there already. Nothing was changed.\n"
    assert StoredFile.objects.count() == 0
    assert run("proxystorage_copy", "live", "default") == ("6 copied, 0 there already.\n", "")
    assert StoredFile.objects.count() == 6
    for message in Message.objects.all():
        with message.attach.open() as copy, live.open(message.attach.name) as original:
            assert copy.read() == original.read()
    assert run("proxystorage_copy", "live", "default") == ("0 copied, 6 there already.\n", "")


def test_a_file_is_copied_beside_what_lies_below_its_name(live: FileSystemStorage) -> None:
    """A bucket has room for both."""
    options = {"name": "bucket", "original": MemoryBackend(), "meta": MemoryMetaBackend()}
    aliases = {**settings.STORAGES, "bucket": {"BACKEND": "sync_bridge.BridgeStorage", "OPTIONS": options}}
    Message.objects.create(attach=live.save("a", ContentFile(b"x")))
    with override_settings(STORAGES=aliases):
        storages["bucket"].save("a/b", ContentFile(b"below"))
        said, complained = run("proxystorage_copy", "live", "bucket", field=["desk.Message.attach"])
        assert (said, complained) == ("1 copied, 0 there already.\n", "")
        assert storages["bucket"].open("a").read() == b"x"


def test_a_failed_copy_is_reported_and_the_rest_goes_on(live: FileSystemStorage) -> None:
    names = [live.save(f"{n}.txt", ContentFile(b"x")) for n in range(6)]
    Message.objects.bulk_create([Message(attach=name) for name in names])
    live.delete(names[1])
    default_storage.save(names[3], ContentFile(b"another one"))
    said, complained = run("proxystorage_copy", "live", "default", concurrency=2)
    assert said == "4 copied, 0 there already.\n"
    assert "desk.Message.attach of 2: '1.txt'" in complained
    assert "desk.Message.attach of 4: '3.txt': the target has another file of that name" in complained
    assert default_storage.open(names[3]).read() == b"another one"


def test_one_field_and_back_into_a_storage_of_djangos_own(live: FileSystemStorage) -> None:
    message, picture = Message(text="x"), Picture()
    message.attach.save("letter.txt", ContentFile(b"letter"))
    picture.image.save("om.png", ContentFile(b"png"), save=False)
    said, _ = run("proxystorage_copy", "default", "live", field=["desk.Message.attach"])
    assert said == "1 copied, 0 there already.\n"
    with live.open(message.attach.name) as copy:
        assert copy.read() == b"letter"
    assert not live.exists(picture.image.name)


def test_a_target_that_renames_is_left_as_it_was(live: FileSystemStorage, monkeypatch: pytest.MonkeyPatch) -> None:
    message = Message(text="x")
    message.attach.save("letter.txt", ContentFile(b"letter"))
    monkeypatch.setattr(live, "get_available_name", lambda name, max_length=None: "renamed.txt")
    _, complained = run("proxystorage_copy", "default", "live")
    assert "would have called it 'renamed.txt'" in complained
    assert live.listdir("")[1] == []


@pytest.fixture
def staging(tmp_path: Path, media: Path, django_database: Path) -> Iterator[Callable[..., BridgeStorage]]:
    """Return a function that makes a target with records of its own."""

    with contextlib.ExitStack() as stack:

        def make(**options: Any) -> BridgeStorage:
            given = {
                "name": "staging",
                "location": str(tmp_path / "staging"),
                "meta": f"sqlite:///{tmp_path}/s.sqlite3",
            }
            alias = {"BACKEND": "sync_bridge.BridgeStorage", "OPTIONS": {**given, **options}}
            stack.enter_context(override_settings(STORAGES={**settings.STORAGES, "staging": alias}))
            found = storages["staging"]
            assert isinstance(found, BridgeStorage)
            return found

        yield make


def letter(**options: Any) -> Message:
    """Return a message with a file whose content type and extra field nobody could guess."""
    path = bridge_storage("default").save("letter.txt", ContentFile(b"Dear Ada"), **options)
    return Message.objects.create(attach=path)


def owner_in(record: MetaRecord) -> Any:
    """Return the object that the record names. Its field has another storage, for now."""
    if record.get("object_id") is None:
        return None
    assert get_content_object(record) is None
    return ContentType.objects.get_for_id(record["content_type_id"]).get_object_for_this_type(pk=record["object_id"])


def test_a_copy_has_owner_content_type_and_extra_fields(staging: Callable[..., BridgeStorage]) -> None:
    target = staging()
    message = letter(content_type="application/x-letter", extra={"shelf": 3})
    assert run("proxystorage_copy", "default", "staging") == ("1 copied, 0 there already.\n", "")
    record = target.get("letter.txt")
    assert owner_in(record) == message
    assert (record.content_type, record["shelf"], record["field"]) == ("application/x-letter", 3, "attach")


def test_files_of_a_directory_inside_are_not_adopted(media: Path, django_database: Path, no_others: None) -> None:
    options = {"name": "private", "location": str(media / "private")}
    aliases = {**settings.STORAGES, "private": {"BACKEND": "sync_bridge.BridgeStorage", "OPTIONS": options}}
    with override_settings(STORAGES=aliases):
        bridge_storage("private").save("secret.txt", ContentFile(b"secret"))
        (media / "private.txt").write_bytes(b"around")
        said, _ = run("proxystorage_adopt", storage="default")
        assert said == "1 adopted, 0 had a record, 1 left to originals inside this one.\n"
        assert StoredFile.objects.count() == 2
        assert run("proxystorage_adopt", storage="private")[0] == "0 adopted, 1 had a record.\n"


def test_files_from_a_storage_without_records_get_their_owner(live: FileSystemStorage) -> None:
    message = Message.objects.create(attach=live.save("a.txt", ContentFile(b"x")))
    assert run("proxystorage_copy", "live", "default")[1] == ""
    assert get_content_object(default_storage.get("a.txt")) == message


def test_a_copy_that_was_made_without_its_owner_gets_it(staging: Callable[..., BridgeStorage]) -> None:
    target, message = staging(), letter()
    target.publish("letter.txt", b"Dear Ada", extra={"shelf": 3})
    said = "0 copied, 1 there already."
    assert run("proxystorage_copy", "default", "staging", dry_run=True)[0].startswith(said)
    assert owner_in(target.get("letter.txt")) is None
    assert run("proxystorage_copy", "default", "staging") == (said + "\n", "")
    assert owner_in(target.get("letter.txt")) == message
    assert target.get("letter.txt")["shelf"] == 3


@pytest.mark.parametrize("database", ["default", "archive"])
@pytest.mark.parametrize("still", [True, False])
def test_a_copied_file_of_several_rows_keeps_its_owner(
    still: bool, database: str, staging: Callable[..., BridgeStorage], archive: str
) -> None:
    first, second = letter(), Message(text="forwarded")
    second.attach = first.attach.name
    second.save()  # which owns it now
    if not still:
        Message.objects.filter(pk=second.pk).update(attach="")
    if database != "default":
        Message.objects.using(database).bulk_create(list(Message.objects.all()))
        Message.objects.update(attach="")
    target = staging()
    assert run("proxystorage_copy", "default", "staging", database=database)[1] == ""
    assert owner_in(target.get("letter.txt")) == (second if still else first)


def test_what_the_records_of_the_target_have_no_room_for_is_said(staging: Callable[..., BridgeStorage]) -> None:
    target, _ = staging(meta="shelf.Document"), letter(extra={"title": "To Ada", "smell": "roses"})
    said, complained = run("proxystorage_copy", "default", "staging")
    assert (said.count("'smell' is not copied"), said.endswith("1 copied, 0 there already.\n")) == (1, True)
    assert complained == ""
    assert target.get("letter.txt")["title"] == "To Ada"


@pytest.mark.parametrize("dry_run", [True, False])
def test_a_target_that_puts_a_prefix_before_names_is_refused(
    dry_run: bool, staging: Callable[..., BridgeStorage]
) -> None:
    target = staging(prefix="live/")
    letter()
    said, complained = run("proxystorage_copy", "default", "staging", dry_run=dry_run)
    assert said.startswith("0 copied, 0 there already.")
    assert "'letter.txt': the target would have called it 'live/letter.txt'" in complained
    assert target.listdir("live")[1] == []


# -- reconcile and verify


def test_reconcile_and_verify(media: Path, django_database: Path) -> None:
    storage = bridge_storage("default")
    for name in ("good.txt", "bad.txt"):
        storage.save(name, ContentFile(b"content"))
    assert run("proxystorage_verify", "default") == ("2 files with 14 bytes were read.\n", "")
    (media / "bad.txt").write_bytes(b"CONTENT")
    said, complained = run("proxystorage_verify")
    assert said == "2 files with 7 bytes were read.\n"
    assert "bad.txt" in complained
    assert "1 failed" in complained

    name = storage.proxy.name
    assert run("proxystorage_reconcile")[0].startswith(f"{name}: nothing is left over\nNothing was changed")
    left = MetaRecord(
        path="half.txt",
        proxy_storage_name=name,
        original_storage_path="half.txt",
        state="pending",
        token="t",
        version=1,
    )
    storage.bridge.call(storage.proxy.meta.create, left, lease=0.0)
    assert f"{name}: 1 undone" in run("proxystorage_reconcile", "default")[0]
    assert StoredFile.objects.filter(state="pending").count() == 1
    said, complained = run("proxystorage_reconcile", "default", apply=True, force=True, verbosity=2)
    assert (f"{name}: undone half.txt" in said, complained) == (True, "")
    assert StoredFile.objects.filter(state="pending").count() == 0
    storage.bridge.call(storage.proxy.meta.create, replace(left, original_storage_path="good.txt"), lease=60.0)
    said, complained = run("proxystorage_reconcile", "default", apply=True, restored=True)
    assert (f"{name}: 1 undone" in said, complained) == (True, "")
    assert (StoredFile.objects.filter(state="pending").count(), (media / "good.txt").exists()) == (0, True)


def test_verify_records_the_checksums_of_adopted_files(before: FileSystemStorage) -> None:
    before.save("a.txt", ContentFile(b"content"))
    run("proxystorage_adopt", storage="default")
    assert "record_missing" in run("proxystorage_verify")[1]
    assert run("proxystorage_verify", record_missing=True) == ("1 files with 7 bytes were read.\n", "")
    assert run("proxystorage_verify") == ("1 files with 7 bytes were read.\n", "")
    assert default_storage.get("a.txt").checksum == f"sha256:{hashlib.sha256(b'content').hexdigest()}"


SCAN = {"scan": True, "apply": True, "min_age": -1.0}


@pytest.fixture
def no_others(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Let there be only the storages of the settings and of the models, none that another test has left behind."""
    fields = (field for model in apps.get_models() for field in model._meta.fields if isinstance(field, FileField))
    found = {unwrapped(field.storage) for field in fields} | {storages["default"]}
    kept = weakref.WeakSet(one for one in found if isinstance(one, BridgeStorage))
    before = base._instances
    monkeypatch.setattr(base, "_instances", kept)
    known = {one.proxy.name: one.proxy for one in kept}
    monkeypatch.setattr(registry, "_storages", known)
    yield
    before.update(kept)


def test_a_scan_finds_what_no_record_names(media: Path, django_database: Path, no_others: None) -> None:
    bridge_storage("default").save("known.txt", ContentFile(b"x"))
    StoredFile.objects.all().delete()  # as after the loss of a database
    assert run("proxystorage_reconcile", "default", **SCAN) == ("default: 1 removed\nDone.\n", "")
    assert not (media / "known.txt").exists()


@pytest.mark.parametrize("where", ["of a field", "live"])
def test_a_scan_knows_storages_that_the_settings_do_not_name(
    where: str, media: Path, tmp_path: Path, django_database: Path, no_others: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One in the same directory, with records of its own."""
    other = BridgeStorage(location=media, name=f"other {where}", meta=f"sqlite:///{tmp_path}/records.sqlite3")
    if where == "of a field":
        monkeypatch.setattr(Plain._meta.get_field("file"), "storage", other)
        base._instances.discard(other)  # as one that another thread has just made
    other.save("contract.txt", ContentFile(b"contract"))
    assert run("proxystorage_reconcile", "default", **SCAN) == ("default: nothing is left over\nDone.\n", "")
    assert other.open("contract.txt").read() == b"contract"


def test_two_storages_of_one_name_are_both_looked_at(
    media: Path, tmp_path: Path, django_database: Path, no_others: None
) -> None:
    second = ProxyStorage(
        bridge_storage("default").proxy.name,
        originals=FileSystemBackend(media),
        meta=SQLiteMetaBackend(tmp_path / "second.sqlite3"),
    )
    aliases = {
        **settings.STORAGES,
        "second": {"BACKEND": "sync_bridge.BridgeStorage", "OPTIONS": {"storage": second}},
    }
    with override_settings(STORAGES=aliases):
        for alias in ("default", "second"):
            bridge_storage(alias).save(f"{alias}.txt", ContentFile(b"x"))
        assert run("proxystorage_verify")[0] == "2 files with 2 bytes were read.\n"
        assert run("proxystorage_reconcile", **SCAN)[0].count("nothing is left over") == 2
        assert (media / "default.txt").exists()
        assert (media / "second.txt").exists()
    default_bridge.call(second.aclose)


def test_a_scan_is_refused_where_a_storage_cannot_be_made(media: Path, django_database: Path, no_others: None) -> None:
    broken = BridgeStorage(location=media, name="broken", meta="nowhere.Model")
    left = bridge_storage("default")
    left.save("known.txt", ContentFile(b"x"))
    StoredFile.objects.all().delete()
    complained = run("proxystorage_reconcile", "default", **SCAN)[1]
    assert f"{broken!r} cannot be made, so that nobody can tell its files" in complained
    assert (media / "known.txt").exists()
    assert run("proxystorage_reconcile", "default")[1] == ""


@pytest.mark.parametrize("scanned", ["default", "private"])
def test_a_scan_spares_the_files_of_a_directory_inside_or_around_it(
    scanned: str, media: Path, django_database: Path, no_others: None
) -> None:

    options = {"name": "private", "location": str(media / "private")}
    aliases = {**settings.STORAGES, "private": {"BACKEND": "sync_bridge.BridgeStorage", "OPTIONS": options}}
    with override_settings(STORAGES=aliases):
        bridge_storage("default").save("private/around.txt", ContentFile(b"around"))
        bridge_storage("private").save("secret.txt", ContentFile(b"secret"))
        assert "nothing is left over" in run("proxystorage_reconcile", scanned, **SCAN)[0]
        assert bridge_storage("default").open("private/around.txt").read() == b"around"
        assert bridge_storage("private").open("secret.txt").read() == b"secret"


# -- telling


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize(("stream", "shown"), [(Terminal, "\r\033[K1 files"), (io.StringIO, "1 files\n")])
def test_progress(stream: type[io.StringIO], shown: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(StorageCommand, "EVERY", (0.0, 0.0))

    class Command(StorageCommand):
        def handle(self, **_: Any) -> None:
            self.progress("1 files")
            self.failed("x", "reason")
            self.conclude("done")

    out, err = stream(), io.StringIO()
    with pytest.raises(CommandError, match="1 failed"):
        call_command(Command(), stdout=out, stderr=err)
    assert out.getvalue().startswith(shown)
    assert out.getvalue().endswith("done\n")
    assert err.getvalue() == "x: reason\n"


def test_the_lazy_default_is_unwrapped(media: Path) -> None:
    assert isinstance(unwrapped(default_storage), BridgeStorage)
    assert isinstance(unwrapped(storages["default"]), Storage)
