"""Columns of the user's own: filled, read back, and what does not fit refused before a byte is written."""

from __future__ import annotations

import asyncio
import sqlite3
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from datetime import UTC, datetime
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio
from asgiref.sync import async_to_sync, sync_to_async
from django.db import connections, transaction
from django.test import override_settings

from aproxy_storage import (
    AccessDenied,
    ConfigurationError,
    Conflict,
    InvalidPath,
    MetaRecord,
    NotFound,
    NotSupported,
    ProxyStorage,
    Source,
)
from aproxy_storage.backends.filesystem import FileSystemBackend
from aproxy_storage.meta_backends.orm import ORMMetaBackend
from aproxy_storage.records import Revision
from aproxy_storage.testing.meta_backends import make_record
from aproxy_storage.tools.reconcile import reconcile
from sync_bridge.models import StoredFile
from tests.django_support.setup import forget_connections
from tests.django_support.shelf.models import (
    Document,
    Hidden,
    Invoice,
    Loose,
    Mark,
    Named,
    NamedFile,
    Note,
    Pin,
    PlainFile,
    Receipt,
    Reply,
    Shelf,
    Stamped,
    Ticket,
)

pytestmark = pytest.mark.asyncio

Make = Callable[..., ProxyStorage]


@pytest_asyncio.fixture
async def make(tmp_path: Path, database: str) -> AsyncIterator[Make]:
    made: list[ProxyStorage] = []

    def make(model: Any, kind: type[ProxyStorage] = ProxyStorage, **options: Any) -> ProxyStorage:
        backend = FileSystemBackend(tmp_path)
        originals = {"originals": backend} | options
        storage = kind("media", meta=ORMMetaBackend(model, database, **options.pop("meta", {})), **originals)
        made.append(storage)
        return storage

    yield make
    for storage in made:
        await storage.aclose()


def written(tmp_path: Path) -> list[str]:
    return sorted(path.name for path in tmp_path.iterdir() if not path.name.startswith(("django.sqlite3", ".")))


async def test_the_hook_fills_columns(make: Make, tmp_path: Path) -> None:
    class Titled(ProxyStorage):
        async def get_data_for_meta_backend_save(
            self, *, path: str, original_storage_path: str, original_name: str, content: Source, **kwargs: Any
        ) -> Mapping[str, Any]:
            head = await content.peek(64)
            return {
                "title": head.decode().title(),
                "pages": 3,
                "content_type_id": 7,
                "object_id": "uuid",
                "field": "cv",
            }

    storage = make(Document, Titled)
    path = await storage.save("cv.txt", b"a life")
    row = await Document.objects.using(storage.meta.using).aget(path=path)
    assert (row.title, row.pages, row.content_type_id, row.object_id, row.field) == ("A Life", 3, 7, "uuid", "cv")
    assert (row.size, row.state, row.original_storage_name) == (6, "stored", "default")
    record = await storage.get(path)
    assert dict(record.extra) == {
        "title": "A Life", "pages": 3, "content_type_id": 7, "object_id": "uuid", "field": "cv",
    }  # fmt: skip
    assert (record["id"], record["title"], record["tags"]) == (row.pk, "A Life", [])


async def test_values_of_every_kind_come_back(make: Make) -> None:
    storage = make(Document)
    using = storage.meta.using
    shelf = await Shelf.objects.using(using).acreate(title="top")
    due = datetime(2027, 1, 2, 3, 4, 5, 678901, tzinfo=UTC)
    extra = {"tags": ["a", {"b": None}], "due": due, "price": Decimal("12.50"), "shelf": shelf, "isbn": "x"}
    path = await storage.save("a.txt", b"1", extra=extra)
    record = await storage.get(path)
    assert record.extra == {
        "tags": ["a", {"b": None}], "due": due, "price": Decimal("12.50"), "shelf_id": shelf.pk, "isbn": "x",
    }  # fmt: skip
    [listed] = [each async for each in storage.list()]
    assert listed == record
    row = await Document.objects.using(using).aget()
    assert (row.tags, row.due, row.price, row.shelf_id) == (["a", {"b": None}], due, Decimal("12.50"), shelf.pk)


async def test_update_replaces_the_whole_mapping(make: Make) -> None:
    storage = make(Document)
    path = await storage.save("a.txt", b"1", extra={"title": "one", "pages": 1})
    changed = await storage.update(path, extra={"pages": 2})
    assert changed.extra == {"pages": 2}
    row = await Document.objects.using(storage.meta.using).aget()
    assert (row.title, row.pages, row.version) == ("", 2, changed.version)


async def test_nothing_is_a_value_where_the_default_is_another(make: Make) -> None:
    """Or whoever adds to the mapping, as a file field does with the owner, would change the column."""
    storage = make(Document)
    path = await storage.save("a.txt", b"1", extra={"rating": None})
    record = await storage.get(path)
    assert record.extra == {"rating": None}
    assert (await storage.update(path, extra={**record.extra, "field": "cv"})).extra == {"rating": None, "field": "cv"}
    copy = await storage.copy(path, "b.txt")
    rows = Document.objects.using(storage.meta.using)
    assert [row.rating async for row in rows.all()] == [None, None]
    await storage.update(copy, extra={})
    assert (await rows.aget(path=copy)).rating == 5


async def test_copies_have_the_same_columns(make: Make) -> None:
    storage = make(Document)
    path = await storage.save("a.txt", b"1", extra={"title": "one"})
    copy = await storage.copy(path, "b.txt")
    assert (await storage.get(copy)).extra == {"title": "one"}


@pytest.mark.parametrize("in_transaction", [False, True])
@pytest.mark.parametrize(
    ("model", "name", "extra", "error", "told"),
    [
        (
            NamedFile,
            "a.txt",
            {"owner": 1},
            ConfigurationError,
            "no column for 'owner': add it, or a JSONField named extra",
        ),
        (Document, "a.txt", {"title": "x" * 21}, NotSupported, "title holds 20 characters, not the 21"),
        (Document, "a.txt", {"pages": "many"}, NotSupported, "Document.pages cannot hold 'many'"),
        (Document, "a.txt", {"title": None}, NotSupported, "title cannot be None"),
        (Document, "a.txt", {"title": "\ud800"}, NotSupported, "a lone surrogate"),
        (StoredFile, "a.txt", {"x": object()}, NotSupported, "representable in JSON"),
        (StoredFile, "a.txt", {"x": "\ud800"}, NotSupported, "a lone surrogate"),
        (Stamped, "a.txt", {}, ConfigurationError, "Stamped.owner has no default: give it in extra="),
    ],
)
async def test_what_has_no_column_is_refused_before_a_byte_is_written(
    make: Make,
    tmp_path: Path,
    database: str,
    model: Any,
    name: str,
    extra: dict[str, Any],
    error: type[Exception],
    told: str,
    in_transaction: bool,
) -> None:
    storage = make(model)

    def save() -> None:
        if not in_transaction:
            async_to_sync(storage.save)(name, b"1", extra=extra)
        else:
            with transaction.atomic(using=database):
                async_to_sync(storage.save)(name, b"1", extra=extra)

    with pytest.raises(error, match=told) as caught:
        await sync_to_async(save)()
    assert not getattr(caught.value, "outcome_unknown", True)
    assert written(tmp_path) == []
    assert await model.objects.using(database).acount() == 0


async def test_paths_that_do_not_fit_are_refused(make: Make, database: str) -> None:
    storage = make(StoredFile, max_path_bytes=4000)
    with pytest.raises(InvalidPath):
        await storage.save("/".join(["x" * 100] * 12), b"1")
    meta = storage.meta
    with pytest.raises(InvalidPath, match="path holds 1024 characters, not the 1025"):
        await meta.create(MetaRecord("x" * 1025))
    with pytest.raises(NotSupported, match="content_type holds 255 characters"):
        await meta.create(MetaRecord("x", content_type="x" * 256))


async def test_columns_that_fill_themselves(make: Make) -> None:
    storage = make(Stamped)
    path = await storage.save("a.txt", b"1", extra={"owner": 5})
    row = await Stamped.objects.using(storage.meta.using).aget()
    assert (row.owner, row.label) == (5, "none")
    assert row.filed_at is not None
    assert row.touched_at is not None
    changed = await storage.update(path, extra={"label": "new"})
    after = await Stamped.objects.using(storage.meta.using).aget()
    assert (after.owner, after.label) == (5, "new"), "what must not be empty stays"
    assert after.touched_at > row.touched_at
    assert changed["label"] == "new"


async def test_a_model_without_the_name_of_the_original(make: Make, tmp_path: Path) -> None:
    storage = make(PlainFile)
    path = await storage.save("a.txt", b"1")
    await storage.replace(path, b"2")
    async with storage.open(path) as file:
        assert await file.read() == b"2"
    assert (await storage.get(path)).original_storage_name == "default"
    assert await storage.meta.owners("default", ["a.txt"]) == {"a.txt": ["a.txt"]}
    assert await storage.meta.owners("other", ["a.txt"]) == {}
    await storage.delete(path)
    assert written(tmp_path) == ["a_" + name[2:] for name in written(tmp_path)]  # the replaced bytes, kept a while

    several = make(PlainFile, originals={"fs": FileSystemBackend(tmp_path), "other": FileSystemBackend(tmp_path)})
    with pytest.raises(ConfigurationError, match="OriginalStorageNameMixin"):
        await several.save("b.txt", b"1")
    assert "b.txt" not in written(tmp_path)


async def test_what_belongs_to_a_file_goes_with_it(make: Make) -> None:
    storage = make(Document)
    using = storage.meta.using
    path = await storage.save("a.txt", b"1")
    for model in (Note, Mark):
        await model.objects.using(using).acreate(document_id=(await storage.get(path))["id"])
    with pytest.raises(Conflict):
        await storage.meta.delete(path, expect=Revision("another", 1))
    await storage.delete(path)
    for model in (Note, Mark):
        assert await model.objects.using(using).acount() == 0
    with pytest.raises(NotFound):
        await storage.meta.delete(path)


def referring(kind: str, using: str, document_id: int) -> Any:
    """Refer to a document by a foreign key of `kind`; return the row that forbids its deletion."""
    if kind == "protected":
        return Invoice.objects.using(using).create(document_id=document_id)
    if kind == "restricted":
        return Receipt.objects.using(using).create(document_id=document_id)
    if kind == "by the database":
        return Ticket.objects.using(using).create(document_id=document_id)
    if kind == "by the database, beside what goes along":
        Reply.objects.using(using).create(document_id=document_id, quoted_id=document_id)
        return Reply.objects.using(using).create(quoted_id=document_id)
    note = Note.objects.using(using).create(document_id=document_id)
    return Ticket.objects.using(using).create(note=note)


@pytest.mark.parametrize("in_transaction", [False, True])
@pytest.mark.parametrize(
    "kind",
    [
        "protected",
        "restricted",
        "by the database",
        "by the database, of what goes along",
        "by the database, beside what goes along",
    ],
)
async def test_a_file_whose_record_cannot_go_keeps_its_bytes(
    make: Make, tmp_path: Path, kind: str, in_transaction: bool
) -> None:
    storage = make(Document, keep_replaced=0)
    using = storage.meta.using
    path = await storage.save("a.txt", b"1")
    row = await sync_to_async(referring)(kind, using, (await storage.get(path))["id"])

    def delete() -> None:
        if not in_transaction:
            async_to_sync(storage.delete)(path)
        else:
            with transaction.atomic(using=using):
                with pytest.raises(AccessDenied):
                    async_to_sync(storage.delete)(path)
                assert Document.objects.using(using).count() == 1, "the transaction is usable"
                async_to_sync(storage.delete)(path)

    with pytest.raises(AccessDenied, match=rf"{row._meta.label} {row.pk}, and on_delete") as caught:
        await sync_to_async(delete)()
    assert not caught.value.retryable
    assert not caught.value.outcome_unknown
    assert (await storage.get(path)).state == "stored"
    assert written(tmp_path) == ["a.txt"]
    assert [type(each.error) async for each in storage.delete_many([path])] == [AccessDenied]
    assert (await reconcile(storage, force=True, dry_run=False)).counts == {}

    await row.adelete()
    await storage.delete(path)
    assert written(tmp_path) == []
    assert await Document.objects.using(using).acount() == 0


async def test_what_refers_to_a_file_without_keeping_it(make: Make, tmp_path: Path, database: str) -> None:
    storage = make(Document)
    path = await storage.save("a.txt", b"1")
    document_id = (await storage.get(path))["id"]
    note = await Note.objects.using(database).acreate(document_id=document_id)
    # Restricted, but it goes along with the note.
    await Receipt.objects.using(database).acreate(document_id=document_id, note=note)
    await Loose.objects.using(database).acreate(document_id=document_id)
    await Named.objects.using(database).acreate(path=path)
    # Kept by the database, but it goes along by another foreign key.
    await Reply.objects.using(database).acreate(document_id=document_id, quoted_id=document_id)
    await storage.delete(path)
    assert written(tmp_path) == []
    counts = [await model.objects.using(database).acount() for model in (Document, Note, Receipt, Reply, Loose, Named)]
    assert counts == [0, 0, 0, 0, 1, 1]


async def test_a_manager_that_hides_the_row_of_a_file(make: Make, tmp_path: Path, database: str) -> None:
    storage = make(Hidden, keep_replaced=0)
    path = await storage.save("a.txt", b"1")
    pin = await Pin.objects.using(database).acreate(file_id=(await storage.get(path))["id"])
    with pytest.raises(AccessDenied, match=r"shelf\.Pin"):
        await storage.delete(path)
    assert written(tmp_path) == ["a.txt"]
    await pin.adelete()
    await storage.delete(path)
    assert written(tmp_path) == []
    assert not await storage.meta.exists(path)


@pytest.fixture
def tickets_that_go_along(database: str) -> Iterator[None]:
    """Let the database itself delete the tickets of a document: DO_NOTHING is what Django is told then."""

    def follow(rule: str) -> None:
        with connections[database].cursor() as cursor:
            if connections[database].vendor == "sqlite":
                if rule:
                    cursor.execute("DROP TABLE shelf_ticket")
                    cursor.execute(
                        "CREATE TABLE shelf_ticket (id integer PRIMARY KEY, note_id bigint REFERENCES shelf_note (id),"
                        f" document_id bigint REFERENCES shelf_document (id) {rule})"
                    )
                return
            cursor.execute(
                "SELECT conname FROM pg_constraint WHERE conrelid = 'shelf_ticket'::regclass"
                " AND confrelid = 'shelf_document'::regclass"
            )
            (name,) = cursor.fetchone()
            cursor.execute(
                f"ALTER TABLE shelf_ticket DROP CONSTRAINT {name}, ADD CONSTRAINT {name} FOREIGN KEY (document_id)"
                f" REFERENCES shelf_document {rule} DEFERRABLE INITIALLY DEFERRED"
            )

    follow("ON DELETE CASCADE")
    yield
    follow("")


async def test_a_foreign_key_that_the_database_follows(
    make: Make, tmp_path: Path, database: str, tickets_that_go_along: None
) -> None:
    storage = make(Document)
    path = await storage.save("a.txt", b"1")
    await Ticket.objects.using(database).acreate(document_id=(await storage.get(path))["id"])
    await storage.delete(path)
    assert await Ticket.objects.using(database).acount() == 0
    assert written(tmp_path) == []


@pytest.mark.parametrize("kind", ["protected", "by the database"])
async def test_what_begins_to_refer_to_a_file_that_is_being_deleted(make: Make, kind: str) -> None:
    storage = make(Document)
    path = await storage.save("a.txt", b"1")
    marked = await storage.journal.mark(await storage.get(path))
    row = await sync_to_async(referring)(kind, storage.meta.using, marked.record["id"])
    with pytest.raises(AccessDenied):
        await storage.journal.sweep(marked)
    report = await reconcile(storage, force=True, dry_run=False)
    assert report.counts == {"failed": 1}, "not moved on"
    assert f"{row._meta.label} {row.pk}" in str(report.findings[0].error)
    await row.adelete()
    assert (await reconcile(storage, force=True, dry_run=False)).counts == {"deleted": 1}


async def test_a_rule_that_no_file_may_be_deleted(make: Make, tmp_path: Path, database: str) -> None:
    storage = make(StoredFile)
    path = await storage.save("a.txt", b"1")
    table = "sync_bridge_storedfile"
    add, remove = {
        "sqlite": (
            f"CREATE TRIGGER rule BEFORE UPDATE OF state ON {table} BEGIN SELECT RAISE(ABORT, 'broken rule'); END",
            "DROP TRIGGER rule",
        ),
        "postgresql": (
            f"ALTER TABLE {table} ADD CONSTRAINT rule CHECK (state <> 'deleting')",
            f"ALTER TABLE {table} DROP CONSTRAINT rule",
        ),
    }[connections[database].vendor]

    def do(text: str) -> None:
        with connections[database].cursor() as cursor:
            cursor.execute(text)

    await sync_to_async(do)(add)
    try:
        with pytest.raises(Conflict, match="rule") as caught:
            async with asyncio.timeout(20):  # and not again and again
                await storage.delete(path)
        assert not caught.value.retryable
        assert written(tmp_path) == ["a.txt"]
    finally:
        await sync_to_async(do)(remove)


async def test_writers_beside_a_deletion_on_sqlite_wait_for_it(tmp_path: Path, django_database: Path) -> None:
    """Without IMMEDIATE, a transaction that reads first may not write after another one has written."""
    storage = ProxyStorage(
        "media", originals=FileSystemBackend(tmp_path), meta=ORMMetaBackend(Document), keep_replaced=0
    )
    path = await storage.save("a.txt", b"1")
    other = sqlite3.connect(django_database, isolation_level=None, timeout=0, check_same_thread=False)
    other.execute("PRAGMA journal_mode=wal")
    refused = []

    def write_beside(execute: Callable[..., Any], *args: Any) -> Any:
        found = execute(*args)
        try:
            other.execute("INSERT INTO shelf_shelf (title) VALUES ('another')")
        except sqlite3.OperationalError as error:
            refused.append(str(error))
        return found

    def delete() -> None:
        with connections["default"].execute_wrapper(write_beside):
            async_to_sync(storage.delete)(path)

    await sync_to_async(delete)()
    assert set(refused) == {"database is locked"}
    assert other.execute("SELECT count(*) FROM shelf_shelf").fetchone() != (0,)
    assert other.execute("SELECT count(*) FROM shelf_document").fetchone() == (0,)
    other.close()
    await storage.aclose()


async def test_a_foreign_key_that_is_wrong_is_the_error_of_its_item(make: Make) -> None:
    """The database looks at it when the transaction of all items commits."""
    meta = make(Document).meta
    using = meta.using
    right = (await Shelf.objects.using(using).acreate(title="top")).pk
    shelves = [None, right, right + 1, None, right]
    records = [make_record(f"{number}", extra={"shelf_id": shelf}) for number, shelf in enumerate(shelves)]

    def kinds(answers: Sequence[Any]) -> list[type]:
        return [type(each) for each in answers]

    good, bad = MetaRecord, Conflict
    assert kinds(await meta.create_many(records)) == [good, good, bad, good, good]
    assert [record.path async for record in meta.list()] == ["0", "1", "3", "4"]
    changes = [("0", {"extra": {"shelf_id": right}}, None), ("1", {"extra": {"shelf_id": right + 1}}, None)]
    assert kinds(await meta.update_many(changes)) == [good, bad]
    assert [(await meta.get(path))["shelf_id"] for path in "01"] == [right, right]
    await Ticket.objects.using(using).acreate(document_id=(await meta.get("3"))["id"])
    answers = await meta.delete_many([("1", None), ("3", None), ("4", None)])
    assert kinds(answers) == [type(None), AccessDenied, type(None)]
    assert [record.path async for record in meta.list()] == ["0", "3"]


@pytest.fixture
def without_time_zones(database: str) -> Iterator[None]:
    with override_settings(USE_TZ=False, TIME_ZONE="Asia/Kolkata"):
        forget_connections(database)
        yield
    forget_connections(database)


async def test_local_time(make: Make, without_time_zones: None) -> None:
    storage = make(StoredFile)
    path = await storage.save("a.txt", b"1")
    record = await storage.get(path)
    assert record.created_at is not None
    assert abs((datetime.now(UTC) - record.created_at).total_seconds()) < 60
    row = await StoredFile.objects.using(storage.meta.using).aget()
    assert row.created_at.tzinfo is None
    assert (await storage.meta.update(path, {"size": 1})).created_at == record.created_at
