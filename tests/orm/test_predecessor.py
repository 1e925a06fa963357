"""A table that django-proxy-storage has made and filled, taken over by the migration that Django finds by itself."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from asgiref.sync import async_to_sync
from django.apps.registry import Apps
from django.core.files.base import ContentFile
from django.core.files.storage import FileSystemStorage
from django.db import connections
from django.db.migrations.autodetector import MigrationAutodetector
from django.db.migrations.state import ModelState, ProjectState

from aproxy_storage import NotFound, ProxyStorage
from aproxy_storage.backends.filesystem import FileSystemBackend
from aproxy_storage.meta_backends.orm import ORMMetaBackend
from aproxy_storage.tools.reconcile import reconcile
from benchmarks.peers import dps_compat
from sync_bridge import models as ours

PAGE = Path(__file__).parents[2] / "docs" / "django-orm.md"


def define(bases: tuple[type[Any], ...], registry: Any, **meta: Any) -> Any:
    options = type("Meta", (), {"app_label": "shop", "db_table": "shop_file", "apps": registry, **meta})
    return type("File", bases, {"__module__": "shop.models", "Meta": options})


@pytest.fixture
def old(tmp_path: Path, database: str) -> Iterator[SimpleNamespace]:
    """The predecessor at work: its table, its storage, and three files."""
    dps_compat.install()
    from proxy_storage.meta_backends import orm as theirs
    from proxy_storage.storages.base import MultipleOriginalStoragesMixin, ProxyStorageBase

    # Its models ask for columns of its own names; the database is the one that `using` names, by a manager.
    model = define(
        (theirs.OriginalStorageNameMixin, theirs.ContentObjectFieldMixin, theirs.ProxyStorageModelBase), Apps()
    )
    model.objects.db_manager(database)

    class Meta(theirs.ORMMetaBackend):  # type: ignore[misc]
        def _create(self, data: Any) -> Any:
            return self.model.objects.using(database).create(**data)

        def exists(self, path: str) -> bool:
            return bool(self.model.objects.using(database).filter(path=path).exists())

    class Storage(MultipleOriginalStoragesMixin, ProxyStorageBase):  # type: ignore[misc]
        original_storages = (
            ("one", FileSystemStorage(location=tmp_path / "one")),
            ("two", FileSystemStorage(location=tmp_path / "two")),
        )
        meta_backend = Meta(model=model)

        def get_name(self) -> str:
            return "media"

    connection = connections[database]
    with connection.schema_editor() as editor:
        editor.create_model(model)
    storage = Storage()
    paths = [
        storage.save("hello.txt", ContentFile(b"hello")),
        storage.save("hello.txt", ContentFile(b"again"), using="two"),
        storage.save("日本.txt", ContentFile("日本".encode()), using="one"),
    ]
    model.objects.using(database).filter(path=paths[0]).update(content_type_id=3, object_id=12, field="cv")
    yield SimpleNamespace(model=model, paths=paths)
    with connection.schema_editor() as editor:
        editor.execute("DROP TABLE shop_file")


def take_over(old_model: Any, database: str) -> Any:
    """Migrate the table to a model over our bases; return that model."""
    bases = (ours.OriginalStorageNameMixin, ours.ContentObjectFieldMixin, ours.ProxyStorageModelBase)
    model = define(bases, Apps(), indexes=ours.ProxyStorageModelBase.Meta.indexes)
    before, after = ProjectState(), ProjectState()
    before.add_model(ModelState.from_model(old_model))
    after.add_model(ModelState.from_model(model))
    [migration] = MigrationAutodetector(before, after)._detect_changes()["shop"]
    shown = re.findall(r"^(?:Add|Alter) field .* file$", PAGE.read_text(), re.MULTILINE)
    described = [each.describe() for each in migration.operations]
    assert [line for line in described if not line.startswith("Create index")] == shown
    assert len(described) == len(shown) + 3
    with connections[database].schema_editor(atomic=True) as editor:
        state = migration.apply(before, editor)
    assert MigrationAutodetector(state, after)._detect_changes() == {}
    return model


def test_a_table_of_the_predecessor(old: SimpleNamespace, tmp_path: Path, database: str) -> None:
    model = take_over(old.model, database)
    storage = ProxyStorage(
        "media",
        originals={"one": FileSystemBackend(tmp_path / "one"), "two": FileSystemBackend(tmp_path / "two")},
        meta=ORMMetaBackend(model, database),
        keep_replaced=0,
    )
    first, second, third = old.paths
    assert first == str(tmp_path / "one" / "hello.txt"), "its paths are absolute"

    async def read(path: str) -> bytes:
        async with storage.open(path) as file:
            return await file.read()

    async def use() -> None:
        await storage.meta.setup()
        assert [await read(path) for path in old.paths] == [b"hello", b"again", "日本".encode()]
        record = await storage.get(first)
        assert (record.state, record.version, record.token, record.lease) == ("stored", 0, "", None)
        assert (record.original_storage_name, record.original_storage_path) == ("one", "hello.txt")
        assert dict(record.extra) == {"content_type_id": 3, "object_id": "12", "field": "cv"}
        assert sorted(old.paths) == [record.path async for record in storage.list()]
        assert await storage.meta.owners("two", ["hello.txt"]) == {"hello.txt": [second]}

        new = await storage.save("hello.txt", b"new")
        assert new == "hello.txt"
        assert (await storage.get(new)).original_storage_path != "hello.txt", "another file has that key"
        await storage.replace(second, b"replaced")
        assert await read(second) == b"replaced"
        assert not (tmp_path / "two" / "hello.txt").exists()
        assert (await storage.rename(third, "renamed.txt")).original_storage_path == "日本.txt"
        await storage.delete(first)
        assert not (tmp_path / "one" / "hello.txt").exists()
        with pytest.raises(NotFound):
            await storage.get(first)
        assert await read(new) == b"new"
        assert (await reconcile(storage, dry_run=False, scan=True, min_age=0)).counts == {}
        await storage.aclose()

    async_to_sync(use)()


def test_its_own_code_still_writes_rows_that_can_be_read(old: SimpleNamespace, tmp_path: Path, database: str) -> None:
    model = take_over(old.model, database)
    old.model.objects.using(database).create(
        path="/late.txt", proxy_storage_name="media", original_storage_name="one", original_storage_path="late.txt"
    )
    meta = ORMMetaBackend(model, database)

    async def look() -> None:
        record = await meta.get("/late.txt")
        assert (record.state, record.version, record.places, record.extra) == ("stored", 0, (), {})
        await meta.aclose()

    async_to_sync(look)()
