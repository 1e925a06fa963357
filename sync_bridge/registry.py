"""From a name to its storage, from a record to the object that owns the file."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from aproxy_storage import ProxyStorage
from aproxy_storage import registry as names

from .conf import proxy_storage_settings

if TYPE_CHECKING:
    from django.db.models import Model

__all__ = ["aget_content_object", "get_content_object", "get_storage"]

_log = logging.getLogger(__name__)


def _find(name: str) -> ProxyStorage | None:
    """Find a storage of the setting ``PROXY_STORAGE``, or the one of a BridgeStorage in ``STORAGES`` or on a field."""
    from .base import find_proxy

    return proxy_storage_settings.find(name) or find_proxy(name)


names.add_finder(_find)


def get_storage(name: str) -> ProxyStorage:
    """Return the storage called `name`: of the setting ``PROXY_STORAGE``, of ``STORAGES``, or registered by hand.

    Raises:
        ConfigurationError: there is none. ImproperlyConfigured: it cannot be made.
    """
    return names.get_storage(name)


def get_content_object(record: Mapping[str, Any], *, using: str | None = None) -> Model | None:
    """Return the model instance whose file field holds the file of `record`; None where nobody is known to.

    The record names it since a `ProxyStorageFileField` was saved. With one look-up it answers for files of any model
    and field: an authorisation view asks the object, and ``record["field"]`` says which field it is about. An object is
    returned only while the field of that name holds the path of the record, in the storage of the record. So None
    too where the object is gone or has another file by now, where another one has its key, and where the key in the
    record is not one of its model, or ``content_type_id`` is no number.

    Args:
        using: the database to look in; by default that of the model, as its router says. The record does not name it.
    """
    from django.contrib.contenttypes.models import ContentType
    from django.core.exceptions import ValidationError

    kind, key = record.get("content_type_id"), record.get("object_id")
    if kind is None or key is None:
        return None
    try:
        number = int(kind)
    except (TypeError, ValueError, OverflowError):
        where = os.fspath(record["path"])
        _log.warning("the record of %r names an object %r of a content type %r, which is no number", where, key, kind)
        return None
    try:
        model = ContentType.objects.get_for_id(number).model_class()
    except ContentType.DoesNotExist:
        return None
    if model is None:
        return None
    objects = model._base_manager if using is None else model._base_manager.using(using)
    try:
        found: Model | None = objects.filter(pk=model._meta.pk.to_python(key)).first()
    except ValidationError:
        _log.warning("the record of %r names an object %r of %s", os.fspath(record["path"]), key, model._meta.label)
        return None
    return found if found is not None and _holds(found, record) else None


def _holds(owner: Model, record: Mapping[str, Any]) -> bool:
    """Return whether the field that the record names holds its file: nobody takes the owner out of the record of a
    file that was replaced or cleared, and a key may be used again."""
    from django.core.exceptions import FieldDoesNotExist
    from django.db.models import FileField

    from .base import ConfiguredStorage

    try:
        field: Any = owner._meta.get_field(record.get("field") or "")
    except FieldDoesNotExist:
        _log.warning("the record of %r names no field of %s", os.fspath(record["path"]), owner._meta.label)
        return False
    if not isinstance(field, FileField):
        return False
    name = (getattr(owner, field.attname).name or "").replace("\\", "/")  # as a storage is asked for it
    if name != os.fspath(record["path"]):
        return False
    named = record.get("proxy_storage_name")
    return named is None or not isinstance(field.storage, ConfiguredStorage) or bool(field.storage.name == named)


async def aget_content_object(record: Mapping[str, Any], *, using: str | None = None) -> Model | None:
    """Return what `get_content_object` does, from asynchronous code."""
    from asgiref.sync import sync_to_async

    return await sync_to_async(get_content_object)(record, using=using)
