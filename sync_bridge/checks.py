"""What can be seen to be wrong before a file is lost: Django's system checks for storages, settings and fields."""

from __future__ import annotations

import itertools
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from django.apps import apps
from django.conf import settings
from django.core.checks import CheckMessage, Error, Tags, Warning, register
from django.core.exceptions import ImproperlyConfigured
from django.core.files.storage import InvalidStorageError, storages
from django.db import connections, models, router
from django.db.utils import ConnectionDoesNotExist
from django.utils.module_loading import import_string

from aproxy_storage import Backend, MetaBackend, ProxyStorage, StorageError
from aproxy_storage.meta_backends.orm import ORMMetaBackend

from .base import ConfiguredStorage, root_of
from .conf import proxy_storage_settings

__all__ = ["check_field", "check_storages", "check_tables"]

_OWNER = ("content_type_id", "object_id", "field")


def check_storages(app_configs: Any = None, **_: Any) -> list[CheckMessage]:
    """Make every storage that the settings name, which opens and connects nothing, and look at it."""
    found: list[CheckMessage] = []
    for name in _setting_names(found):
        try:
            meta = proxy_storage_settings.storage(name).meta
        except (ImproperlyConfigured, StorageError) as error:
            found.append(Error(f"PROXY_STORAGE_CLASSES[{name!r}]: {error}", id="sync_bridge.E002"))
        else:
            found += _check_database(meta, f"PROXY_STORAGE_CLASSES[{name!r}]")
    made: dict[str, ProxyStorage] = {}
    for alias in _aliases():
        try:
            storage = storages[alias]
            made[alias] = proxy = storage.proxy
        except (ImproperlyConfigured, InvalidStorageError, StorageError, TypeError) as error:
            found.append(Error(f"STORAGES[{alias!r}]: {error}", id="sync_bridge.E001"))
            continue
        found += _check_one(alias, storage, proxy)
    for (alias, one), (second, other) in itertools.combinations(made.items(), 2):
        found += _check_names(alias, one, second, other)
    found += _check_places(made)
    return found


def _setting_names(found: list[CheckMessage]) -> Sequence[str]:
    try:
        return proxy_storage_settings.names()
    except ImproperlyConfigured as error:
        found.append(Error(str(error), id="sync_bridge.E002"))
        return ()


def _aliases() -> Iterator[str]:
    """Yield the aliases whose class is ours; others are none of our business, not even to import."""
    for alias, given in storages.backends.items():
        backend = given.get("BACKEND", "")
        try:
            cls = import_string(backend) if isinstance(backend, str) else backend
        except ImportError:
            continue  # Django says so itself
        if isinstance(cls, type) and issubclass(cls, ConfiguredStorage):
            yield alias


def _check_one(alias: str, storage: ConfiguredStorage, proxy: ProxyStorage) -> Iterator[CheckMessage]:
    where = f"STORAGES[{alias!r}]"
    static = getattr(settings, "STATIC_ROOT", None)
    if storage.options.is_local:
        if not storage.base_location:
            yield Error(
                f"{where} keeps its files in the working directory, whatever that is.",
                hint="Set MEDIA_ROOT, or give it a location.",
                id="sync_bridge.E003",
            )
        elif alias != "staticfiles" and static and _is_below(storage.location, static):
            yield Error(
                f"{where} keeps its files in {storage.location}, inside STATIC_ROOT: everybody can read them, and "
                "collectstatic --clear deletes them.",
                hint="Give it a directory of its own.",
                id="sync_bridge.E004",
            )
        if "location" in storage._given and "name" not in storage._given:
            yield Warning(
                f"{where} has a location and no name. The name that was made of the location is in every record: in "
                "another directory its files would not be found.",
                hint=f"Give it a name, name={alias!r} for example.",
                id="sync_bridge.W002",
            )
    file = getattr(proxy.meta, "path", None)
    if isinstance(file, str):
        for public in (settings.MEDIA_ROOT, static, storage.location if storage.options.is_local else None):
            if public and _is_below(file, public):
                yield Error(
                    f"{where} keeps its records in {file}, inside {public}, which web servers publish.",
                    hint="Keep the database elsewhere.",
                    id="sync_bridge.E005",
                )
                break
    if isinstance(proxy.meta, ORMMetaBackend) and len(proxy.originals) > 1:
        model = _model_of(proxy.meta)
        if model is not None and not _has(model, "original_storage_name"):
            yield Error(
                f"{where} has several originals, but {model._meta.label} has no column that says which has a file.",
                hint="Add sync_bridge.models.OriginalStorageNameMixin to the model.",
                id="sync_bridge.E006",
            )
    yield from _check_database(proxy.meta, where)


def _check_database(meta: MetaBackend, where: str, field: Any = None) -> Iterator[CheckMessage]:
    """Look whether the ORM can keep records in that model, and in its database; connects nothing."""
    from .models import ProxyStorageModelBase  # which can be imported when all apps are known

    model = _model_of(meta) if isinstance(meta, ORMMetaBackend) else None
    if model is None or not isinstance(meta, ORMMetaBackend):
        return
    missing = [column.name for column in ProxyStorageModelBase._meta.fields if not _has(model, column.name)]
    if missing:
        yield Error(
            f"{where} keeps its records in a model that cannot hold any: {model._meta.label} has no column"
            f" {', '.join(missing)}.",
            hint="Let it inherit from sync_bridge.models.ProxyStorageModelBase, then makemigrations and migrate.",
            obj=field,
            id="sync_bridge.E010",
        )
        return
    alias = _database_of(meta, model)
    if alias is None:
        return
    try:
        connection = connections[alias]
    except ConnectionDoesNotExist:
        wrong = "which is not in DATABASES"
    except ImproperlyConfigured:
        return  # Django says so itself
    else:
        if connection.vendor in meta.vendors:
            return
        wrong = f"which is {connection.display_name}: {model._meta.label} can be there, but keep no files"
    yield Error(
        f"{where} keeps its records in the database {alias!r}, {wrong}.",
        hint="Keep them on PostgreSQL or SQLite (using=), or give the storage another meta=, such as sqlite:///….",
        obj=field,
        id="sync_bridge.E009",
    )


def _check_names(alias: str, one: ProxyStorage, second: str, other: ProxyStorage) -> Iterator[CheckMessage]:
    if one is other or _table_of(one.meta) != _table_of(other.meta):
        return
    for name in one.originals.keys() & other.originals.keys():
        if _place_of(one.originals[name]) != _place_of(other.originals[name]):
            yield Warning(
                f"STORAGES[{alias!r}] and STORAGES[{second!r}] keep their records in one table, and both call an "
                f"original {name!r}, which are two places: the storages share one set of names, so that a name that "
                "is taken in one is taken in the other, and files that are there already may stand in each other's "
                "way when they are adopted.",
                hint="Give each its own meta=, or other names to the originals (originals={…}).",
                id="sync_bridge.W006",
            )
            return


def _check_places(made: Mapping[str, ProxyStorage]) -> Iterator[CheckMessage]:
    """Look for originals inside other ones, by their names: nothing is asked."""
    roots = [
        (f"the original {name!r} of STORAGES[{alias!r}]", root_of(backend))
        for alias, proxy in made.items()
        for name, backend in proxy.originals.items()
    ]
    for (outer, around), (inner, below) in itertools.permutations(roots, 2):
        if around.endswith("/") and below != around and below.startswith(around):
            yield Warning(
                f"{inner[0].upper()}{inner[1:]} keeps its files in {below}, inside {outer}, {around}: who may list or"
                " publish that has them too.",
                hint="Give each a directory, a prefix or a bucket of its own, beside the other.",
                id="sync_bridge.W007",
            )


def _table_of(meta: MetaBackend) -> object:
    """Return what is equal for meta-backends that keep their records in the same table."""
    if isinstance(meta, ORMMetaBackend) and (model := _model_of(meta)) is not None:
        return model._meta.label, _database_of(meta, model)
    # SQLite by its file, PostgreSQL by database and table; of others it cannot be told.
    return str(meta) if hasattr(meta, "path") or hasattr(meta, "table") else meta


def _place_of(backend: Backend) -> tuple[type[Backend], str]:
    return type(backend), backend.full_path("name")


def check_field(field: Any) -> Iterator[CheckMessage]:
    """Look at a ProxyStorageFileField or ProxyStorageImageField."""
    storage = field.storage
    storage = getattr(storage, "_wrapped", storage) if not isinstance(storage, ConfiguredStorage) else storage
    if not isinstance(storage, ConfiguredStorage):
        yield Error(
            f"The storage of the field is {type(field.storage).__name__}, which keeps no records.",
            hint='Give it storage=BridgeStorage(…), or make "sync_bridge.BridgeStorage" the BACKEND of the default.',
            obj=field,
            id="sync_bridge.E007",
        )
        return
    if not apps.is_installed("django.contrib.contenttypes"):
        yield Warning(
            "Records will not say to which object a file belongs: django.contrib.contenttypes is not installed.",
            obj=field,
            id="sync_bridge.W005",
        )
    try:
        meta = storage.proxy.meta
    except (ImproperlyConfigured, StorageError) as error:
        yield Error(f"The storage of the field cannot be made: {error}", obj=field, id="sync_bridge.E001")
        return
    yield from _check_database(meta, "The storage of the field", field)
    model = _model_of(meta) if isinstance(meta, ORMMetaBackend) else None
    if model is not None and not _has(model, "extra"):
        missing = [name for name in _OWNER if not _has(model, name)]
        if missing:
            yield Error(
                f"{model._meta.label}, which keeps the records, has no column {', '.join(missing)}.",
                hint="Add sync_bridge.models.ContentObjectFieldMixin to the model.",
                obj=field,
                id="sync_bridge.E008",
            )


def check_tables(app_configs: Any = None, databases: Sequence[str] | None = None, **_: Any) -> list[CheckMessage]:
    """Look whether the tables are there, and whether files lie beside an empty one. Only where databases are named."""
    found: list[CheckMessage] = []
    if not databases or sys.argv[1:2] == ["migrate"]:  # which asks first, and is about to make the table
        return found
    for alias in _aliases():
        try:
            storage = storages[alias]
            meta = storage.proxy.meta
        except Exception:  # said by `check_storages`
            continue
        model = _model_of(meta) if isinstance(meta, ORMMetaBackend) else None
        if model is None:
            continue
        database = _database_of(meta, model)
        if database is None or database not in databases:
            continue
        if model._meta.db_table not in connections[database].introspection.table_names():
            found.append(
                Warning(
                    f"STORAGES[{alias!r}]: the table {model._meta.db_table!r} is not in the database {database!r}.",
                    hint="Run manage.py migrate.",
                    id="sync_bridge.W003",
                )
            )
        elif (
            storage.options.is_local
            and not storage.read_through
            and _has_files(storage.location)
            and not model._base_manager.using(database).exists()
        ):
            found.append(
                Warning(
                    f"STORAGES[{alias!r}]: {storage.location} holds files, and no record knows of any.",
                    hint=f"Run manage.py proxystorage_adopt --storage {alias}, or set read_through.",
                    id="sync_bridge.W004",
                )
            )
    return found


def _has_files(location: str) -> bool:
    try:
        with os.scandir(location) as entries:
            return any(not entry.name.startswith(".") for entry in entries)
    except OSError:
        return False


def _is_below(path: str, directory: str | os.PathLike[str]) -> bool:
    path, above = os.path.realpath(path), os.path.realpath(directory)
    return os.path.commonpath([path, above]) == above


def _model_of(meta: ORMMetaBackend) -> type[models.Model] | None:
    try:
        return apps.get_model(meta.model) if isinstance(meta.model, str) else meta.model
    except (LookupError, ValueError):
        return None


def _database_of(meta: ORMMetaBackend, model: type[models.Model]) -> str | None:
    """Return the database of the records, None where no router can say: some ask the request, and here is none."""
    try:
        return meta.using or str(router.db_for_write(model))
    except Exception:
        return None


def _has(model: type[models.Model], column: str) -> bool:
    return any(field.name == column for field in model._meta.concrete_fields)


register(Tags.files)(check_storages)
register(Tags.database)(check_tables)
