"""What the commands share: naming storages and file fields, telling progress, and going on after a failure."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any

from django.apps import apps
from django.conf import settings
from django.core.exceptions import FieldDoesNotExist, ImproperlyConfigured
from django.core.files.storage import InvalidStorageError, Storage, storages
from django.core.management.base import BaseCommand, CommandError
from django.db import models

from aproxy_storage import Backend, ConfigurationError, MetaRecord, ProxyStorage
from aproxy_storage.registry import registered_names

from ..base import ConfiguredStorage, live_storages, root_of
from ..conf import proxy_storage_settings
from ..fields import ProxyStorageFileField, ProxyStorageImageField
from ..registry import get_storage
from ..storage import BridgeStorage

__all__ = [
    "StorageCommand",
    "bridge_storage",
    "bridge_storages",
    "file_field",
    "has_owner",
    "known_storages",
    "owner_of",
    "prefixes_of_others",
    "roots_of_others",
    "storage_of_alias",
    "unwrapped",
]


class StorageCommand(BaseCommand):
    """A command over many files. One that fails is told at once and counted; the rest goes on; the end says it."""

    #: Seconds between two signs of life, on a terminal and in a log.
    EVERY = (0.2, 10.0)

    def execute(self, *args: Any, **options: Any) -> str | None:
        self._failed = 0
        self._told_at = time.monotonic()
        self._line_is_open = False
        answer: str | None = super().execute(*args, **options)
        return answer

    def progress(self, text: str) -> None:
        """Show how far it is, now and then: a line that changes on a terminal, further lines elsewhere."""
        terminal = self.stdout.isatty()
        now = time.monotonic()
        if now - self._told_at >= self.EVERY[0 if terminal else 1]:
            self._told_at = now
            self._line_is_open = terminal
            self.stdout.write(f"\r\033[K{text}" if terminal else text, ending="" if terminal else "\n")
            self.stdout.flush()

    def tell(self, text: str) -> None:
        """Show a line that stays."""
        self._close_line()
        self.stdout.write(text)

    def failed(self, what: str, reason: object) -> None:
        """Tell that one item failed; the command will end with an error."""
        self._failed += 1
        self._close_line()
        self.stderr.write(f"{what}: {reason}")

    def conclude(self, text: str) -> None:
        """Tell the result.

        Raises:
            CommandError: something failed.
        """
        self.tell(text)
        if self._failed:
            raise CommandError(f"{self._failed} failed, as said above; the command can be repeated")

    def _close_line(self) -> None:
        if self._line_is_open:
            self.stdout.write("\r\033[K", ending="")
            self._line_is_open = False


def bridge_storage(name: str) -> BridgeStorage:
    """Return the storage of that alias in ``STORAGES``, or of that name in ``PROXY_STORAGE`` or the registry.

    Raises:
        CommandError: there is none, or it is none of ours.
    """
    if name in settings.STORAGES:
        storage = unwrapped(storages[name])
        if not isinstance(storage, BridgeStorage):
            raise CommandError(f"STORAGES[{name!r}] is {type(storage).__name__}, not a BridgeStorage")
        return storage
    try:
        return BridgeStorage(storage=get_storage(name))
    except (ConfigurationError, ImproperlyConfigured) as error:
        raise CommandError(f"no storage {name!r}: {error}") from error


def bridge_storages(names: list[str]) -> Iterator[BridgeStorage]:
    """Yield the storages of those names; without any, all that the settings know, each once."""
    seen = set()  # not of names: two may have been given the same one
    for name in names or [*settings.STORAGES, *proxy_storage_settings.names()]:
        if not names and name in settings.STORAGES and not isinstance(unwrapped(storages[name]), BridgeStorage):
            continue
        storage = bridge_storage(name)
        if id(storage.proxy) not in seen:
            seen.add(id(storage.proxy))
            yield storage


def known_storages() -> list[ProxyStorage]:
    """Return all storages that may have files: of the settings, of the fields of all models, and of whoever made one.

    Raises:
        CommandError: one of them cannot be made.
    """
    found = [storage.proxy for storage in bridge_storages([])]
    for storage in [*_storages_of_fields(), *live_storages()]:
        try:
            found.append(storage.proxy)
        except (ConfigurationError, ImproperlyConfigured) as error:
            raise CommandError(f"{storage!r} cannot be made, so that nobody can tell its files: {error}") from error
    found += [get_storage(name) for name in registered_names()]
    return list({id(proxy): proxy for proxy in found}.values())


def prefixes_of_others(original: Backend) -> tuple[str, ...]:
    """Return how the keys in `original` begin of files that lie in other originals, which are inside it.

    Raises:
        CommandError: a storage cannot be made.
    """
    around = root_of(original)
    return tuple(root.removeprefix(around) for root in roots_of_others(original) if root.startswith(around))


def roots_of_others(original: Backend) -> tuple[str, ...]:
    """Return the roots of all other originals, as `root_of`; none where `original` has no directories.

    Raises:
        CommandError: a storage cannot be made.
    """
    own = root_of(original)
    if not own.endswith("/"):
        return ()
    roots = {root_of(backend) for proxy in known_storages() for backend in proxy.originals.values()}
    return tuple(roots - {own})


def _storages_of_fields() -> Iterator[ConfiguredStorage]:
    for model in apps.get_models(include_auto_created=True):
        for field in model._meta.local_concrete_fields:
            if isinstance(field, models.FileField):
                storage = unwrapped(field.storage)
                if isinstance(storage, ConfiguredStorage):
                    yield storage


def storage_of_alias(alias: str) -> Storage:
    """Return the storage of an alias in ``STORAGES``, of whatever kind.

    Raises:
        CommandError: there is none.
    """
    try:
        return unwrapped(storages[alias])
    except InvalidStorageError as error:
        raise CommandError(f"STORAGES has no {alias!r}, or it cannot be made: {error}") from error


def file_field(label: str) -> models.FileField:
    """Return the field of ``app.Model.field``.

    Raises:
        CommandError: there is none, or it holds no files.
    """
    try:
        app, model, name = label.split(".")
        field = apps.get_model(app, model)._meta.get_field(name)
    except (ValueError, LookupError, FieldDoesNotExist) as error:
        raise CommandError(f"{label!r} names no field, as in app.Model.field: {error}") from error
    if not isinstance(field, models.FileField):
        raise CommandError(f"{label!r} is a {type(field).__name__}, not a file field")
    return field


def owner_of(field: models.FileField, key: Any) -> dict[str, Any]:
    """Return what a record is told of the row `key` of the field's model; {} where the field tells records nothing."""
    owns = isinstance(field, ProxyStorageFileField | ProxyStorageImageField)
    if not owns or not apps.is_installed("django.contrib.contenttypes"):
        return {}
    found: dict[str, Any] = field.owner_of(field.model(pk=key))
    return found


def has_owner(record: MetaRecord) -> bool:
    """Return whether the record says whose file it is."""
    return record.get("content_type_id") is not None and record.get("object_id") is not None


def unwrapped(storage: Storage) -> Storage:
    """Return the storage itself, where it is Django's lazy default."""
    if hasattr(storage, "_setup") and hasattr(storage, "_wrapped"):
        storage.base_url  # noqa: B018  any attribute sets it up
        return storage._wrapped
    return storage
