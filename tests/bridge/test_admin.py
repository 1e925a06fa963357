"""The records in the admin: found, shown, downloaded, deleted through their storage. On SQLite and on PostgreSQL."""

from __future__ import annotations

import re
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.django_support.setup import add_database, configure, make_tables, postgres_settings, remove_database

configure()

import psycopg  # noqa: E402
from asgiref.sync import async_to_sync, sync_to_async  # noqa: E402
from django.contrib.admin.models import DELETION, LogEntry  # noqa: E402
from django.contrib.auth.models import Permission, User  # noqa: E402
from django.core.exceptions import ImproperlyConfigured  # noqa: E402
from django.core.files.base import ContentFile  # noqa: E402
from django.test import AsyncClient, Client, override_settings  # noqa: E402
from django.urls import reverse  # noqa: E402

from aproxy_storage import AsyncFile, DeadlineExceeded, MetaRecord, ProxyStorage, registry  # noqa: E402
from aproxy_storage.backends.filesystem import FileSystemBackend  # noqa: E402
from aproxy_storage.meta_backends.orm import ORMMetaBackend  # noqa: E402
from sync_bridge import BridgeStorage, admin  # noqa: E402
from sync_bridge.admin import ProxyStorageAdmin  # noqa: E402
from sync_bridge.models import StoredFile  # noqa: E402
from tests.bridge.desk.models import Message, Person  # noqa: E402

PNG = bytes.fromhex("89504e470d0a1a0a0000000d49484452000000010000000108060000001f15c489")


class ToDatabase:
    """A router: everything to one database."""

    alias = "default"

    def db_for_read(self, model: Any, **hints: Any) -> str:
        return self.alias

    db_for_write = db_for_read


@pytest.fixture(scope="module")
def on_postgres(postgres_url: str) -> Iterator[str]:
    """The name of a database with all tables, in a schema of its own."""
    alias = f"admin{uuid.uuid4().hex[:8]}"
    with psycopg.connect(postgres_url, autocommit=True) as connection:
        connection.execute(f"CREATE SCHEMA {alias}")
    add_database(alias, postgres_settings(postgres_url, options=f"-c search_path={alias}"))
    make_tables(alias)
    yield alias
    remove_database(alias)
    with psycopg.connect(postgres_url, autocommit=True) as connection:
        connection.execute(f"DROP SCHEMA {alias} CASCADE")


@pytest.fixture(params=["sqlite", "postgresql"])
def database(request: pytest.FixtureRequest) -> Iterator[str]:
    request.getfixturevalue("django_database")
    if request.param == "sqlite":
        yield "default"
        return
    alias = request.getfixturevalue("on_postgres")
    router = type("Router", (ToDatabase,), {"alias": alias})()
    with override_settings(DATABASE_ROUTERS=[router]):
        yield alias
    for model in (LogEntry, StoredFile, Message, Person, User):
        model.objects.using(alias).all().delete()


@pytest.fixture
def storage(database: str, tmp_path: Path) -> Iterator[BridgeStorage]:
    originals = {"disk": FileSystemBackend(tmp_path / "disk"), "other": FileSystemBackend(tmp_path / "other")}
    proxy = ProxyStorage("shelf", originals=originals, meta=ORMMetaBackend(StoredFile, using=database))
    registry.register(proxy)
    with override_settings(ROOT_URLCONF="tests.bridge.admin_urls"):
        yield BridgeStorage(storage=proxy)
    registry.unregister("shelf")
    BridgeStorage.bridge.call(proxy.aclose)


@pytest.fixture
def client(storage: BridgeStorage) -> Client:
    client = Client()
    client.force_login(User.objects.create_superuser("root"))
    return client


def page_of(path: str, verb: str = "change") -> str:
    url: str = reverse(f"admin:sync_bridge_storedfile_{verb}", args=[StoredFile.objects.get(path=path).pk])
    return url


CHANGELIST = "/admin/sync_bridge/storedfile/"


def listed(client: Client, question: str) -> set[str]:
    page = client.get(f"{CHANGELIST}?{question}").content.decode()
    return set(re.findall(r'<th class="field-path"><a [^>]*>([^<]*)</a>', page))


def test_listed_searched_and_filtered(client: Client, storage: BridgeStorage) -> None:
    storage.save("letters/a.txt", ContentFile(b"a" * 2048))
    storage.save("pictures/写真.png", ContentFile(PNG), using="other")
    shown = client.get(CHANGELIST).content.decode()
    assert "letters/a.txt" in shown
    assert "pictures/写真.png" in shown
    assert "2.0\xa0KB" in shown
    assert "shelf: other" in shown
    for question, expected in {
        "q=写真": {"pictures/写真.png"},
        "q=" + storage.get("letters/a.txt").checksum.partition(":")[2][:20]: {"letters/a.txt"},
        "original_storage_name=disk": {"letters/a.txt"},
        "content_type=image/png": {"pictures/写真.png"},
        "state=pending": set(),
        "proxy_storage_name=shelf": {"letters/a.txt", "pictures/写真.png"},
    }.items():
        assert listed(client, question) == expected, question


def test_a_record_is_shown_with_its_owner_and_a_preview(
    client: Client, storage: BridgeStorage, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Message._meta.get_field("attach"), "storage", storage)
    message = Message.objects.create(text="hello", attach=ContentFile(PNG, "om.png"))
    path = message.attach.name
    shown = client.get(page_of(path)).content.decode()
    assert f'href="/admin/desk/message/{message.pk}/change/"' in shown
    assert storage.get(path).checksum in shown
    preview = page_of(path, "preview")
    assert f'<img src="{preview}"' in shown
    answer = client.get(preview)
    assert b"".join(answer.streaming_content) == PNG
    assert answer.headers["Content-Type"] == "image/png"
    assert "sandbox" in answer.headers["Content-Security-Policy"]
    assert 'name="_save"' not in shown, "a record can be edited"
    assert client.get(f"{CHANGELIST}add/").status_code == 403


def test_what_could_hold_scripts_is_never_shown(client: Client, storage: BridgeStorage) -> None:
    path = storage.save("evil.svg", ContentFile(b"<svg onload='alert(1)'/>"), content_type="image/svg+xml")
    assert "<img" not in client.get(page_of(path)).content.decode().partition('id="content"')[2]
    assert client.get(page_of(path, "preview")).status_code == 404
    answer = client.get(page_of(path, "download"))
    assert answer.headers["Content-Type"] == "application/octet-stream"
    assert answer.headers["Content-Disposition"].startswith("attachment")
    assert answer.headers["X-Content-Type-Options"] == "nosniff"
    assert b"".join(answer.streaming_content).startswith(b"<svg")


def test_a_large_file_is_streamed_whatever_its_name(client: Client, storage: BridgeStorage) -> None:
    content = bytes(range(256)) * 4096 * 3
    path = storage.save("長い\n名前.bin".replace("\n", " "), ContentFile(content))
    answer = client.get(page_of(path, "download"))
    assert b"".join(answer.streaming_content) == content
    assert answer.headers["Content-Length"] == str(len(content))
    assert "filename*=utf-8''%E9%95%B7%E3%81%84%20%E5%90%8D%E5%89%8D.bin" in answer.headers["Content-Disposition"]


def test_under_asgi_it_is_streamed_too(client: Client, storage: BridgeStorage) -> None:
    path = storage.save("x.bin", ContentFile(b"x" * 3_000_000))
    user = User.objects.get()

    async def download() -> list[int]:
        browser = AsyncClient()
        await browser.aforce_login(user)
        answer = await browser.get(page)
        assert answer.is_async
        return [len(chunk) async for chunk in answer.streaming_content]

    page = page_of(path, "download")
    sizes = async_to_sync(download)()
    assert sum(sizes) == 3_000_000
    assert len(sizes) > 1
    # The loop of that call is gone; what it held of the storage is not waited for.


def test_deleting_goes_through_the_storage(client: Client, storage: BridgeStorage, tmp_path: Path) -> None:
    paths = [storage.save(f"{name}.txt", ContentFile(b"x")) for name in "abc"]
    assert client.post(page_of("a.txt", "delete"), {"post": "yes"}).status_code == 302
    assert not storage.exists("a.txt")
    rows = [StoredFile.objects.get(path=path).pk for path in paths[1:]]
    asked = client.post(CHANGELIST, {"action": "delete_selected", "_selected_action": rows})
    assert "Are you sure" in asked.content.decode()
    assert StoredFile.objects.count() == 2
    answer = client.post(CHANGELIST, {"action": "delete_selected", "_selected_action": rows, "post": "yes"})
    assert answer.status_code == 302
    assert LogEntry.objects.filter(action_flag=DELETION).count() == 3
    assert StoredFile.objects.count() == 0
    assert list((tmp_path / "disk").iterdir()) == []


def test_what_cannot_be_deleted_is_said_and_stays(client: Client, storage: BridgeStorage) -> None:
    storage.save("kept.txt", ContentFile(b"x"))
    storage.save("gone.txt", ContentFile(b"x"))
    StoredFile.objects.filter(path="kept.txt").update(proxy_storage_name="nobody's")
    rows = list(StoredFile.objects.values_list("pk", flat=True))
    answer = client.post(
        CHANGELIST, {"action": "delete_selected", "_selected_action": rows, "post": "yes"}, follow=True
    )
    said = answer.content.decode()
    assert "Not deleted: kept.txt. no storage named" in said
    assert "Deleted 1 files." in said
    assert [row.path for row in StoredFile.objects.all()] == ["kept.txt"]


@pytest.mark.parametrize("how", ["row", "record", "gone"])
def test_the_next_file_of_the_path_is_not_deleted(
    client: Client, storage: BridgeStorage, monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    rows = [StoredFile.objects.get(path=storage.save(name, ContentFile(b"x"))).pk for name in ("a.txt", "b.txt")]
    delete_model, get = ProxyStorageAdmin.delete_model, BridgeStorage.get

    def meanwhile() -> None:
        storage.delete("b.txt")
        if how != "gone":
            storage.save("b.txt", ContentFile(b"of another"))

    def late_model(admin: Any, request: Any, row: Any) -> None:
        if row.path == "b.txt" and how != "record":
            meanwhile()
        delete_model(admin, request, row)

    def late_get(storage: Any, name: Any) -> Any:
        found = get(storage, name)
        if name == "b.txt" and how == "record":
            meanwhile()
        return found

    monkeypatch.setattr(ProxyStorageAdmin, "delete_model", late_model)
    monkeypatch.setattr(BridgeStorage, "get", late_get)
    question = {"action": "delete_selected", "_selected_action": rows, "post": "yes"}
    said = client.post(CHANGELIST, question, follow=True).content.decode()
    assert StoredFile.objects.filter(path="b.txt").count() == (how != "gone")
    assert ("another file by now" in said) == (how == "row")
    assert not storage.exists("a.txt")


def test_what_is_not_stored_is_left_to_reconcile(client: Client, storage: BridgeStorage) -> None:
    pending = MetaRecord(path="half.txt", proxy_storage_name="shelf", state="pending", token="t", version=1)
    storage.bridge.call(storage.proxy.meta.create, pending)
    for verb in ("download", "preview"):
        assert client.get(page_of("half.txt", verb)).status_code == 404
    assert client.post(page_of("half.txt", "delete"), {"post": "yes"}).status_code == 403
    assert listed(client, "state=pending") == {"half.txt"}
    assert StoredFile.objects.count() == 1


def test_only_those_who_may_see_the_records_get_the_bytes(client: Client, storage: BridgeStorage) -> None:
    path = storage.save("secret.txt", ContentFile(b"secret"))
    page = page_of(path, "download")
    assert Client().get(page).status_code == 302  # to the login
    clerk = User.objects.create_user("clerk", is_staff=True)
    browser = Client()
    browser.force_login(clerk)
    assert browser.get(page).status_code == 403
    clerk.user_permissions.add(Permission.objects.get(codename="view_storedfile"))
    assert b"".join(browser.get(page).streaming_content) == b"secret"
    assert browser.post(page_of(path, "delete"), {"post": "yes"}).status_code == 403


@pytest.mark.parametrize("why", ["perms_needed", "protected"])
def test_what_would_go_along_is_asked_about(
    client: Client, storage: BridgeStorage, monkeypatch: pytest.MonkeyPatch, why: str
) -> None:
    path = storage.save("kept.txt", ContentFile(b"x"))
    rows = list(StoredFile.objects.values_list("pk", flat=True))
    seen: list[list[str]] = []

    def get_deleted_objects(_: Any, objects: Any, request: Any) -> Any:
        seen.append([row.path for row in objects])
        found = {"perms_needed": set(), "protected": []} | {why: ["clips that refer to it"]}
        return ["kept.txt"], {"stored files": 1}, found["perms_needed"], found["protected"]

    monkeypatch.setattr(ProxyStorageAdmin, "get_deleted_objects", get_deleted_objects)
    answer = client.post(CHANGELIST, {"action": "delete_selected", "_selected_action": rows, "post": "yes"})
    assert answer.status_code == (403 if why == "perms_needed" else 200)
    if why == "protected":
        assert "clips that refer to it" in answer.content.decode()
    assert seen[0] == [path]
    assert storage.exists(path)
    assert not LogEntry.objects.exists()


def asked_by(server: str, page: str, method: str = "GET") -> tuple[int, Any, bytes]:
    """Return status, headers and content, as a server of that kind gets them."""
    user = User.objects.get()
    if server == "wsgi":
        client = Client()
        client.force_login(user)
        answer = client.generic(method, page)
        return answer.status_code, answer.headers, b"".join(answer) if answer.streaming else answer.content

    async def ask() -> tuple[int, Any, bytes]:
        browser = AsyncClient()
        await browser.aforce_login(user)
        answer = await browser.generic(method, page)
        if not answer.streaming:
            return answer.status_code, answer.headers, answer.content
        if not answer.is_async:  # to HEAD
            return answer.status_code, answer.headers, b"".join(await sync_to_async(list)(answer))
        return answer.status_code, answer.headers, b"".join([chunk async for chunk in answer])

    return async_to_sync(ask)()


SERVERS = pytest.mark.parametrize(
    ("server", "database"), [("wsgi", "sqlite"), ("asgi", "sqlite")], indirect=["database"]
)


@SERVERS
def test_bytes_that_are_gone_are_not_found(client: Client, storage: BridgeStorage, tmp_path: Path, server: str) -> None:
    path = storage.save("x.png", ContentFile(PNG))
    (tmp_path / "disk" / "x.png").unlink()
    for verb in ("download", "preview"):
        assert asked_by(server, page_of(path, verb))[0] == 404


@SERVERS
def test_what_is_out_of_reach_or_cannot_be_made_is_said(
    client: Client, storage: BridgeStorage, monkeypatch: pytest.MonkeyPatch, server: str
) -> None:
    pages = [page_of(storage.save("x.png", ContentFile(PNG)), verb) for verb in ("download", "preview")]

    async def hangs(*args: Any) -> Any:
        raise DeadlineExceeded("no answer from the disk within 10 seconds")

    def unmade(name: str) -> Any:
        raise ImproperlyConfigured("original: install 'aproxy-storage[s3]'")

    with monkeypatch.context() as patched:
        patched.setattr(FileSystemBackend, "_read", hangs)
        answers = [asked_by(server, page) for page in pages]
    assert [status for status, _, _ in answers] == [503, 503]
    assert all(b"no answer from the disk" in content for _, _, content in answers)
    monkeypatch.setattr(admin, "get_storage", unmade)
    assert [asked_by(server, page)[0] for page in pages] == [404, 404]
    monkeypatch.undo()
    monkeypatch.setattr(storage.proxy, "originals", {"other": storage.proxy.originals["other"]})
    assert [asked_by(server, page)[0] for page in pages] == [404, 404]


@SERVERS
def test_an_answer_tells_of_the_file_that_is_sent(
    client: Client, storage: BridgeStorage, monkeypatch: pytest.MonkeyPatch, server: str
) -> None:
    path = storage.save("x.txt", ContentFile(b"old"))
    page, visible = page_of(path, "download"), ProxyStorageAdmin._visible
    change: list[Any] = [lambda: storage.replace(path, ContentFile(b"a longer one"))]

    def late(*args: Any) -> Any:
        row = visible(*args)
        change.pop()()
        return row

    monkeypatch.setattr(ProxyStorageAdmin, "_visible", late)
    status, headers, content = asked_by(server, page)
    assert (status, headers["Content-Length"], content) == (200, "12", b"a longer one")

    def anew() -> None:
        storage.delete(path)
        storage.save(path, ContentFile(b"of another!!"))

    change.append(anew)
    assert asked_by(server, page)[0] == 404


@SERVERS
def test_a_file_whose_bytes_nobody_reads_is_closed(
    client: Client, storage: BridgeStorage, monkeypatch: pytest.MonkeyPatch, server: str
) -> None:
    path = storage.save("x.bin", ContentFile(bytes(1 << 20)))
    opened: list[AsyncFile] = []
    begin = AsyncFile.__init__
    monkeypatch.setattr(AsyncFile, "__init__", lambda file, *a: (begin(file, *a), opened.append(file))[0])
    status, headers, content = asked_by(server, page_of(path, "download"), "HEAD")
    assert (status, headers["Content-Length"], content) == (200, str(1 << 20), b"")
    assert [file.closed for file in opened] == [True]


def test_a_record_of_an_unknown_storage(client: Client, storage: BridgeStorage) -> None:
    path = storage.save("x.txt", ContentFile(b"x"))
    StoredFile.objects.update(proxy_storage_name="nobody's")
    assert client.get(page_of(path, "download")).status_code == 404
    answer = client.post(page_of(path, "delete"), {"post": "yes"}, follow=True)
    assert answer.redirect_chain == [(page_of(path), 302)]
    assert "Not deleted: x.txt. no storage named" in answer.content.decode()
    assert StoredFile.objects.count() == 1
    assert not LogEntry.objects.exists(), "nothing was deleted"
