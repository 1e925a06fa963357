"""Model fields for files of a proxy storage: who owns a file is in its record, and every verb has an async twin."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from typing import Any

from django.apps import apps
from django.core import checks
from django.core.exceptions import ObjectDoesNotExist
from django.db import Error, connections, models, router, transaction
from django.db.models import signals

from aproxy_storage import MetaRecord, NotFound, StorageError

from .base import ConfiguredStorage
from .field_files import ProxyFieldFile, ProxyImageFieldFile
from .remembering import Memory, Remembering, RememberingImage, key_of, key_of_held, memory_of
from .storage import BridgeStorage
from .uncommitted import hold, make_again

__all__ = ["ProxyFieldFile", "ProxyImageFieldFile", "ProxyStorageFileField", "ProxyStorageImageField"]

_log = logging.getLogger(__name__)

#: What the record knows of the object that owns the file.
OWNER = ("content_type_id", "object_id", "field")


class _OwnedFileMixin:
    """What both fields share.

    Args:
        delete_on_replace: when a save of the object has given it another file, or none, the old one is deleted.
        delete_with_object: when the object is deleted its file is deleted too.

    Both happen when the transaction commits, never if it rolls back, not while another row of the model has the same
    file, in whichever database the routers let the model live (where one cannot be asked the file stays), and not where
    the record says that the file is somebody else's: an object that was loaded a while ago may know a path that is
    another's by now.
    """

    storage: Any
    name: str
    attname: str
    max_length: int | None
    model: type[models.Model]

    def __init__(
        self, *args: Any, delete_on_replace: bool = False, delete_with_object: bool = False, **kwargs: Any
    ) -> None:
        self.delete_on_replace = delete_on_replace
        self.delete_with_object = delete_with_object
        super().__init__(*args, **kwargs)

    def deconstruct(self) -> Any:
        name, path, args, kwargs = super().deconstruct()  # type: ignore[misc]
        for option in ("delete_on_replace", "delete_with_object"):
            if getattr(self, option):
                kwargs[option] = True
        return name, path, args, kwargs

    def check(self, **kwargs: Any) -> list[checks.CheckMessage]:
        from .checks import check_field

        return [*super().check(**kwargs), *check_field(self)]  # type: ignore[misc]

    # -- before the object is saved

    def pre_save(self, model_instance: models.Model, add: bool) -> Any:
        self._make_again(model_instance)
        self._ask_the_row(model_instance)
        file = super().pre_save(model_instance, add)  # type: ignore[misc]
        memory = memory_of(model_instance, self)
        if (file.name or "") != memory.path:
            model_instance.__dict__[key_of(self)] = replace(memory, unsure=True)
        return file

    def _ask_the_row(self, instance: models.Model) -> None:
        """Find out which file `instance` is about to give up, where it cannot know."""
        memory = memory_of(instance, self)
        if not memory.unsure or not self.delete_on_replace or instance._state.adding:
            return
        key = self.model._meta.pk
        assert key is not None
        using = instance._state.db or router.db_for_write(self.model, instance=instance)
        rows = self.model._base_manager.using(using).filter(pk=getattr(instance, key.attname))
        path = rows.values_list(self.attname, flat=True).first()
        former = (*memory.without(path), (path, False)) if path and path != memory.path else memory.former
        instance.__dict__[key_of(self)] = replace(memory, former=former, unsure=False)

    def _make_again(self, instance: models.Model) -> None:
        """Make the record of the file again, if this object has stored it in a transaction that was rolled back.

        Raises:
            StorageError: that cannot be; no row may name a file that there is not, or another one.
        """
        file: ProxyFieldFile
        held = instance.__dict__.get(key_of_held(self))
        if held is None or not (file := getattr(instance, self.attname)) or not file._committed:
            return
        if file.name != held.path:
            return
        made = self.storage._await(self.storage._works_here, self._made_again, instance, held)
        if made is None:
            return
        file.name = made.path
        memory = memory_of(instance, self)
        if memory.path == held.path:  # as it was after a save of the object, which was rolled back too
            instance.__dict__[key_of(self)] = replace(memory, path="", owned=False)

    async def _made_again(self, instance: models.Model, held: MetaRecord) -> MetaRecord | None:
        storage: BridgeStorage = self.storage
        made = await make_again(storage.proxy, held, self.max_length)
        if made is not None:
            await hold(storage.proxy, made.path, instance.__dict__, key_of_held(self))
            await storage._with_its_key(made)
        return made

    # -- after the object was saved

    def remember_owner(self, instance: models.Model, created: bool, using: str, update_fields: Any) -> None:
        """Write into the record who owns the file, if the object has got another file by this save."""
        if self.attname not in instance.__dict__ or (update_fields is not None and self.name not in update_fields):
            return
        path, now = getattr(instance, self.attname).name or "", memory_of(instance, self)
        if path != now.path or created:
            former = now.former
            # A new row has had no other file: what the constructor was given need not be this object's.
            if now.path and self.delete_on_replace and (now.owned or not created):
                former = (*now.without(now.path), (now.path, now.owned))
            owned = bool(path) and self._write_owner(instance, path)
            now = Memory(path, owned, former)
            instance.__dict__[key_of(self)] = now = replace(now, former=now.without(path))
        if now.former:  # also those that a rollback has left
            _on_commit(partial(self._delete_former, instance, self._owner(instance), using), using)

    def _write_owner(self, instance: models.Model, path: str) -> bool:
        """Write `instance` into the record of `path`; return whether it is there."""
        owner = self._owner(instance)
        if not owner:
            return False
        storage: BridgeStorage = self.storage
        try:
            record = storage.get(path)
            if not _is_owned_by(record, owner):
                storage.update(record, extra={**record.extra, **owner})
            return True
        except NotFound:
            _log.warning("%s.%s of %r is %r, of which %r has no record", *_label(self), instance.pk, path, storage)
        except StorageError:
            # The object is saved, and its file too; who owns it is written at the next change.
            _log.warning("the owner of %r could not be recorded", path, exc_info=True)
        return False

    def _owner(self, instance: models.Model) -> dict[str, Any]:
        """Return what records say of `instance`, {} where they can say nothing."""
        if not isinstance(self.storage, ConfiguredStorage) or not apps.is_installed("django.contrib.contenttypes"):
            return {}
        return self.owner_of(instance)

    def owner_of(self, instance: models.Model) -> dict[str, Any]:
        """Return what the record is told: the model in whose table the column is, whatever the class of the object,
        so that a proxy or a child of it names the same object."""
        from django.contrib.contenttypes.models import ContentType

        key = self.model._meta.pk
        assert key is not None
        return {
            "content_type_id": ContentType.objects.get_for_model(self.model).pk,
            "object_id": key.value_to_string(instance),
            "field": self.name,
        }

    # -- what is not wanted any more

    def delete_with(self, instance: models.Model, using: str) -> None:
        """Delete the file of an object that is about to be deleted, on commit."""
        if not self.delete_with_object:
            return
        try:
            file = getattr(instance, self.attname)  # which is loaded now, where it was deferred
        except ObjectDoesNotExist:  # somebody else was faster
            return
        memory = memory_of(instance, self)
        path = (file.name or "") if file._committed else memory.path
        if path:
            owned = memory.owned and path == memory.path
            _on_commit(partial(self._delete_unused, path, self._owner(instance), owned, using), using)

    def _delete_former(self, instance: models.Model, owner: Mapping[str, Any], using: str) -> None:
        for path, owned in memory_of(instance, self).former:
            if self._delete_unused(path, owner, owned, using):
                memory = memory_of(instance, self)
                instance.__dict__[key_of(self)] = replace(memory, former=memory.without(path))

    def _delete_unused(self, path: str, owner: Mapping[str, Any], owned: bool, using: str) -> bool:
        """Delete the file of `owner`, unless it is somebody else's by now; return whether that is done with.

        A record that names nobody may be older than this field; not so where `owner` was written into it (`owned`).
        """
        try:
            self._delete_if_unused(path, owner, owned, using)
        except StorageError:  # it is committed that nobody wants the file
            _log.exception("%r, which %s.%s has given up, could not be deleted", path, *_label(self))
            return False
        return True

    def _delete_if_unused(self, path: str, owner: Mapping[str, Any], owned: bool, using: str) -> None:
        if owned and not owner:  # it was deleted, and no record tells whether this is what a rollback brought back
            return
        record: MetaRecord | None = None
        if isinstance(self.storage, ConfiguredStorage):
            try:
                record = self.storage.get(path)
            except NotFound:
                return
            if owner and not (_is_owned_by(record, owner) or (_has_no_owner(record) and not owned)):
                return
        try:
            other = self._row_with(path, using)
        except Exception:  # not only those of databases: a TestCase forbids the ones that it does not name
            _log.warning("%r is kept: not every database could say who has it", path, exc_info=True)
            return
        if other is None:
            # Not of whoever has saved a file under the path meanwhile. A subclass may know names only.
            ours = record is not None and self.storage.__class__.delete is BridgeStorage.delete
            self.storage.delete(record if ours else path)
        elif owner and record is not None and not _has_no_owner(record):
            self._write_owner(other, path)

    def _row_with(self, path: str, using: str) -> models.Model | None:
        """Return a row with the file `path`, of any database; of `using` first.

        Raises:
            Exception: one of them could not be asked.
        """
        for alias in (using, *(alias for alias in _homes_of(self.model) if alias != using)):
            rows = self.model._base_manager.using(alias).filter(**{self.attname: path})
            # What fails must not spoil a transaction of the caller's that is open there.
            safely = transaction.atomic(using=alias) if connections[alias].in_atomic_block else nullcontext()
            try:
                with safely:
                    found = rows.first()
            except Error:
                if _has_table(self.model, alias):
                    raise
                continue
            if found is not None:
                return found
        return None


class ProxyStorageFileField(_OwnedFileMixin, models.FileField):
    """A FileField whose files know the object they belong to: the record has ``content_type_id``, ``object_id`` and
    ``field``, written when the object is saved with another file. See `get_content_object`.

    The storage is a `BridgeStorage`; the default storage, where none is given, has to be one too.
    """

    attr_class = ProxyFieldFile
    descriptor_class = Remembering


class ProxyStorageImageField(_OwnedFileMixin, models.ImageField):
    """An ImageField, as `ProxyStorageFileField` is a FileField."""

    attr_class = ProxyImageFieldFile
    descriptor_class = RememberingImage


def _is_owned_by(record: MetaRecord, owner: Mapping[str, Any]) -> bool:
    return all(str(record.get(key)) == str(value) for key, value in owner.items())


def _has_no_owner(record: MetaRecord) -> bool:
    return record.get("content_type_id") is None or record.get("object_id") is None


def _homes_of(model: type[models.Model]) -> Iterator[str]:
    """Return the databases that may have rows of `model` of their own: none that mirrors another."""
    for alias in connections:
        given = connections.settings[alias]
        if given["ENGINE"] == "django.db.backends.dummy" or given.get("TEST", {}).get("MIRROR"):
            continue
        if router.allow_migrate_model(alias, model):
            yield alias


def _has_table(model: type[models.Model], alias: str) -> bool:
    """Return whether a database has the table of `model`; one that no router forbids need not.

    Raises:
        Error: it cannot be asked.
    """
    table = model._meta.db_table.strip('"')
    introspection = connections[alias].introspection
    return '"' in table or introspection.identifier_converter(table) in introspection.table_names()


def _on_commit(work: Callable[[], object], using: str) -> None:
    def unwanted_files_go() -> None:  # of what fails Django 5.2 logs the `__qualname__`, which a partial has not
        work()

    transaction.on_commit(unwanted_files_go, using=using, robust=True)


def _label(field: Any) -> tuple[str, str]:
    return field.model._meta.label, field.name


# -- signals, connected once for every model that has such a field: its own, or one of a parent's

_IDENTITY = "sync_bridge.fields"


def _watch(sender: type[models.Model], **_: Any) -> None:
    if sender.__module__ == "__fake__":  # a model of a migration
        return
    if any(isinstance(field, _OwnedFileMixin) for field in sender._meta.concrete_fields):
        signals.post_save.connect(_saved, sender=sender, dispatch_uid=_IDENTITY)
        signals.pre_delete.connect(_deleting, sender=sender, dispatch_uid=_IDENTITY)


def _saved(
    sender: type[models.Model],
    instance: models.Model,
    created: bool,
    using: str,
    raw: bool = False,
    update_fields: Any = None,
    **_: Any,
) -> None:
    if raw:  # a fixture: the ids in it are those of its records too, and tables may be half full
        return
    for field in sender._meta.concrete_fields:
        if isinstance(field, _OwnedFileMixin):
            field.remember_owner(instance, created, using, update_fields)


def _deleting(sender: type[models.Model], instance: models.Model, using: str, **_: Any) -> None:
    # Deleting a child deletes its parents, with a signal each; a proxy's fields are those of the model behind it.
    for field in sender._meta.concrete_model._meta.local_concrete_fields:
        if isinstance(field, _OwnedFileMixin):
            field.delete_with(instance, using)


signals.class_prepared.connect(_watch, dispatch_uid=_IDENTITY)
