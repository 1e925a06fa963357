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


def get_content_object(record: Mapping[str, Any]) -> Model | None:
    """Return the model instance whose file field holds the file of `record`; None where nobody is known to.

    The record names it since a `ProxyStorageFileField` was saved. With one look-up it answers for files of any model
    and field: an authorisation view asks the object, and ``record["field"]`` says which field it is about. None too
    where the object is gone, or the key in the record is not one of its model.
    """
    from django.contrib.contenttypes.models import ContentType
    from django.core.exceptions import ValidationError

    kind, key = record.get("content_type_id"), record.get("object_id")
    if kind is None or key is None:
        return None
    try:
        model = ContentType.objects.get_for_id(int(kind)).model_class()
    except ContentType.DoesNotExist:
        return None
    if model is None:
        return None
    try:
        found: Model | None = model._base_manager.filter(pk=model._meta.pk.to_python(key)).first()
    except ValidationError:
        _log.warning("the record of %r names an object %r of %s", os.fspath(record["path"]), key, model._meta.label)
        return None
    return found


async def aget_content_object(record: Mapping[str, Any]) -> Model | None:
    """Return what `get_content_object` does, from asynchronous code."""
    from asgiref.sync import sync_to_async

    return await sync_to_async(get_content_object)(record)
