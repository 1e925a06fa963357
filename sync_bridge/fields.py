"""Model fields for files of a proxy storage: who owns a file is in its record, and every verb has an async twin."""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import partial
from types import TracebackType
from typing import Any

from asgiref.sync import sync_to_async
from django.apps import apps
from django.core import checks
from django.core.exceptions import ObjectDoesNotExist
from django.db import Error, connections, models, router, transaction
from django.db.models import signals
from django.db.models.fields.files import FieldFile, FileDescriptor, ImageFieldFile, ImageFileDescriptor

from aproxy_storage import MetaRecord, NotFound, StorageError

from .base import ConfiguredStorage
from .files import BridgeFile
from .storage import BridgeStorage
from .uncommitted import hold, is_any_transaction_open, make_again

__all__ = ["ProxyFieldFile", "ProxyImageFieldFile", "ProxyStorageFileField", "ProxyStorageImageField"]

_log = logging.getLogger(__name__)

#: What the record knows of the object that owns the file.
OWNER = ("content_type_id", "object_id", "field")


class ProxyFieldFile(FieldFile):
    """The file of one object. `asave`, `aopen`, `aread`, `adelete`, `asize` and `aurl` await the storage directly;
    ``async for`` gives chunks. A response takes `stream`: of a file itself Django would make a list of lines."""

    storage: BridgeStorage
    name: str | None

    def __exit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        file: Any = getattr(self, "_file", None)
        if exc_type is not None and isinstance(file, BridgeFile):
            file.abort()  # what was being written is not published
        self.close()

    def save(self, name: str, content: Any, save: bool = True) -> None:
        """Store `content` and set the field to it; then, with `save`, save the object."""
        super().save(name, content, save=False)
        self.instance.__dict__.pop(_key_of_held(self.field), None)
        storage = self.storage
        if is_any_transaction_open() and isinstance(storage, ConfiguredStorage):
            place = self.instance.__dict__, _key_of_held(self.field)
            storage._await(storage._works_here, hold, storage.proxy, self._required(), *place)
        if save:
            self.instance.save()

    save.alters_data = True  # type: ignore[attr-defined]

    async def asave(self, name: str, content: Any, save: bool = True) -> None:
        """Store `content` and set the field to it; then, with `save`, save the object.

        ``upload_to`` and the saving of the object run in Django's thread, the storing on this loop.

        Raises:
            As `BridgeStorage.asave`; the object is unchanged then.
        """
        name = await sync_to_async(self.field.generate_filename)(self.instance, name)
        self.name = await self.storage.asave(name, content, max_length=self.field.max_length)
        # An image is looked at for its dimensions.
        await sync_to_async(self._set_instance_attribute)(self.name, content)
        self._committed = True
        if isinstance(self.storage, ConfiguredStorage):
            await hold(self.storage.proxy, self.name, self.instance.__dict__, _key_of_held(self.field))
        if save:
            await self.instance.asave()

    asave.alters_data = True  # type: ignore[attr-defined]

    def delete(self, save: bool = True) -> None:
        """Delete the file and clear the field; then, with `save`, save the object. No file: nothing is done."""
        if not self.name:
            return
        gone = self.name
        super().delete(save=False)
        _forget(self.instance, self.field, gone)
        if save:
            self.instance.save()

    delete.alters_data = True  # type: ignore[attr-defined]

    async def adelete(self, save: bool = True) -> None:
        """Await the deletion of the file, as `delete`."""
        if not self.name:
            return
        if hasattr(self, "_file"):
            await sync_to_async(self.close)()
            del self.file
        if hasattr(self, "_dimensions_cache"):
            del self._dimensions_cache
        gone = self.name
        await self.storage.adelete(gone)
        _forget(self.instance, self.field, gone)
        self.name = None
        setattr(self.instance, self.field.attname, self.name)
        self._committed = False
        if save:
            await self.instance.asave()

    adelete.alters_data = True  # type: ignore[attr-defined]

    def aopen(self, mode: str = "rb") -> Any:
        """Open the stored file: ``async with document.file.aopen() as file``."""
        return self.storage.aopen(self._required(), mode)

    async def aread(self) -> bytes:
        """Return the whole content."""
        async with self.aopen() as file:
            data: bytes = await file.read()
        return data

    async def asize(self) -> int:
        """Return the size in bytes."""
        return await self.storage.asize(self._required())

    async def aurl(self, **options: Any) -> str:
        """Return the URL, as `BridgeStorage.aurl`."""
        return await self.storage.aurl(self._required(), **options)

    def stream(self) -> AsyncIterator[bytes]:
        """Return an asynchronous iterator over the chunks, for a StreamingHttpResponse; it closes itself."""
        return self.storage.astream(self._required())

    def __aiter__(self) -> AsyncIterator[bytes]:
        return self.stream()

    def _required(self) -> str:
        self._require_file()
        assert self.name is not None
        return self.name


class ProxyImageFieldFile(ProxyFieldFile, ImageFieldFile):
    """The image of one object."""


@dataclass(frozen=True, slots=True)
class _Memory:
    """What one object knows of its file in the database.

    Attributes:
        path: with which it came from there, or was saved last. That save may have been rolled back.
        owned: this object has written itself into the record of `path`. A record without an owner is then another.
        former: paths that it had before, each with its `owned`, until a commit has dealt with them.
        unsure: the row may have another path: the object was loaded without it, or no ``post_save`` has confirmed what
            was written, as after a bulk operation.
    """

    path: str = ""
    owned: bool = False
    former: tuple[tuple[str, bool], ...] = ()
    unsure: bool = False

    def without(self, path: str) -> tuple[tuple[str, bool], ...]:
        """Return what is former and not `path`."""
        return tuple(one for one in self.former if one[0] != path)


class _Remembering(FileDescriptor):
    """Remembers the path with which an object came from the database, to tell later whether it has changed."""

    def __set__(self, instance: models.Model, value: Any) -> None:
        absent = self.field.attname not in instance.__dict__  # in the constructor, or where the field was deferred
        refreshed = _is_refreshed(self.field, instance, value)
        if refreshed and not is_any_transaction_open():  # what could be rolled back has been, before the row was read
            instance.__dict__.pop(_key_of_held(self.field), None)
        if (absent and instance._state.adding) or refreshed:
            # Where it was deferred, the value is the file of another instance, which was loaded for it.
            path = value.name if isinstance(value, FieldFile) and value._committed else value
            path = path if isinstance(path, str) else ""
            instance.__dict__[_key(self.field)] = _Memory(path, former=_memory(instance, self.field).without(path))
        elif absent:
            instance.__dict__[_key(self.field)] = replace(_memory(instance, self.field), unsure=True)
        super().__set__(instance, value)


class _RememberingImage(_Remembering, ImageFileDescriptor):
    pass


def _key(field: Any) -> str:
    return f"_{field.attname}_as_stored"


def _key_of_held(field: Any) -> str:
    return f"_{field.attname}_uncommitted"


def _memory(instance: models.Model, field: Any) -> _Memory:
    found = instance.__dict__.get(_key(field))
    return found if isinstance(found, _Memory) else _Memory()


def _is_refreshed(field: Any, instance: models.Model, value: Any) -> bool:
    """Return whether `value` is what ``refresh_from_db`` sets: the file of the same object, loaded once more."""
    other = value.instance if isinstance(value, FieldFile) else None
    return (
        other is not None
        and other is not instance
        and other._meta.concrete_model is instance._meta.concrete_model
        and other.pk is not None
        and other.pk == instance.pk
        and value._committed
        and (value.name or "") == _memory(other, field).path
    )


def _forget(instance: models.Model, field: Any, path: str) -> None:
    """Forget a file that was deleted: whatever has its path later is not it, unless a rollback brings it back."""
    memory = _memory(instance, field)
    former = memory.without(path)
    if field.delete_on_replace:
        former = (*former, (path, True))  # of a record without an owner it could not be told which file it is
    kept = memory if memory.path != path else _Memory()
    instance.__dict__[_key(field)] = replace(kept, former=former)


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
        memory = _memory(model_instance, self)
        if (file.name or "") != memory.path:
            model_instance.__dict__[_key(self)] = replace(memory, unsure=True)
        return file

    def _ask_the_row(self, instance: models.Model) -> None:
        """Find out which file `instance` is about to give up, where it cannot know."""
        memory = _memory(instance, self)
        if not memory.unsure or not self.delete_on_replace or instance._state.adding:
            return
        key = self.model._meta.pk
        assert key is not None
        using = instance._state.db or router.db_for_write(self.model, instance=instance)
        rows = self.model._base_manager.using(using).filter(pk=getattr(instance, key.attname))
        path = rows.values_list(self.attname, flat=True).first()
        former = (*memory.without(path), (path, False)) if path and path != memory.path else memory.former
        instance.__dict__[_key(self)] = replace(memory, former=former, unsure=False)

    def _make_again(self, instance: models.Model) -> None:
        """Make the record of the file again, if this object has stored it in a transaction that was rolled back.

        Raises:
            StorageError: that cannot be; no row may name a file that there is not, or another one.
        """
        file: ProxyFieldFile
        held = instance.__dict__.get(_key_of_held(self))
        if held is None or not (file := getattr(instance, self.attname)) or not file._committed:
            return
        if file.name != held.path:
            return
        made = self.storage._await(self.storage._works_here, self._made_again, instance, held)
        if made is None:
            return
        file.name = made.path
        memory = _memory(instance, self)
        if memory.path == held.path:  # as it was after a save of the object, which was rolled back too
            instance.__dict__[_key(self)] = replace(memory, path="", owned=False)

    async def _made_again(self, instance: models.Model, held: MetaRecord) -> MetaRecord | None:
        storage: BridgeStorage = self.storage
        made = await make_again(storage.proxy, held, self.max_length)
        if made is not None:
            await hold(storage.proxy, made.path, instance.__dict__, _key_of_held(self))
            await storage._with_its_key(made)
        return made

    # -- after the object was saved

    def remember_owner(self, instance: models.Model, created: bool, using: str, update_fields: Any) -> None:
        """Write into the record who owns the file, if the object has got another file by this save."""
        if self.attname not in instance.__dict__ or (update_fields is not None and self.name not in update_fields):
            return
        path, now = getattr(instance, self.attname).name or "", _memory(instance, self)
        if path != now.path or created:
            former = now.former
            # A new row has had no other file: what the constructor was given need not be this object's.
            if now.path and self.delete_on_replace and (now.owned or not created):
                former = (*now.without(now.path), (now.path, now.owned))
            owned = bool(path) and self._write_owner(instance, path)
            now = _Memory(path, owned, former)
            instance.__dict__[_key(self)] = now = replace(now, former=now.without(path))
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
        memory = _memory(instance, self)
        path = (file.name or "") if file._committed else memory.path
        if path:
            owned = memory.owned and path == memory.path
            _on_commit(partial(self._delete_unused, path, self._owner(instance), owned, using), using)

    def _delete_former(self, instance: models.Model, owner: Mapping[str, Any], using: str) -> None:
        for path, owned in _memory(instance, self).former:
            if self._delete_unused(path, owner, owned, using):
                memory = _memory(instance, self)
                instance.__dict__[_key(self)] = replace(memory, former=memory.without(path))

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
    descriptor_class = _Remembering


class ProxyStorageImageField(_OwnedFileMixin, models.ImageField):
    """An ImageField, as `ProxyStorageFileField` is a FileField."""

    attr_class = ProxyImageFieldFile
    descriptor_class = _RememberingImage


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
