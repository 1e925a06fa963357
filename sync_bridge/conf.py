"""The setting ``PROXY_STORAGE``, read when it is asked for.

::

    PROXY_STORAGE = {"PROXY_STORAGE_CLASSES": {"media": "myapp.storages.media"}}

names storages: each value is a `ProxyStorage`, a class of one, a callable that makes one, or the dotted path to any of
these. The key is the name that the storage writes into its records.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Mapping
from typing import Any

from django.conf import settings
from django.core.exceptions import ImproperlyConfigured
from django.core.signals import setting_changed
from django.utils.module_loading import import_string

from aproxy_storage import ProxyStorage

__all__ = ["ProxyStorageSettings", "make_storage", "proxy_storage_settings"]

_KNOWN = frozenset({"PROXY_STORAGE_CLASSES"})


class ProxyStorageSettings:
    """The setting as an object. Every storage is made when it is first asked for, and forgotten when the setting
    changes."""

    def __init__(self) -> None:
        self._made: dict[str, ProxyStorage] = {}
        self._lock = threading.RLock()
        setting_changed.connect(self._forget)

    @property
    def given(self) -> Mapping[str, Any]:
        """The setting as it is, checked for unknown keys.

        Raises:
            ImproperlyConfigured.
        """
        given = getattr(settings, "PROXY_STORAGE", {})
        if not isinstance(given, Mapping) or not isinstance(given.get("PROXY_STORAGE_CLASSES", {}), Mapping):
            raise ImproperlyConfigured("PROXY_STORAGE has to be {'PROXY_STORAGE_CLASSES': {name: storage, …}}")
        if unknown := set(given) - _KNOWN:
            raise ImproperlyConfigured(
                f"PROXY_STORAGE has no key {', '.join(map(repr, sorted(unknown)))}; known: {', '.join(sorted(_KNOWN))}"
            )
        return given

    @property
    def PROXY_STORAGE_CLASSES(self) -> Mapping[str, ProxyStorage]:  # noqa: N802  as in the setting
        """All storages by their names, made now where they have not been."""
        return {name: self.storage(name) for name in self.names()}

    def names(self) -> tuple[str, ...]:
        """Return the names, in the order of the setting, without making a storage."""
        return tuple(self.given.get("PROXY_STORAGE_CLASSES", {}))

    def storage(self, name: str) -> ProxyStorage:
        """Return the storage called `name`.

        Raises:
            KeyError: the setting has none. ImproperlyConfigured: it cannot be made.
        """
        with self._lock:
            if name not in self._made:
                target = self.given.get("PROXY_STORAGE_CLASSES", {})[name]
                made = make_storage(target, name)
                if made.name != name:
                    raise ImproperlyConfigured(
                        f"PROXY_STORAGE_CLASSES has {made!r} under {name!r}, but it writes {made.name!r} into its "
                        "records: use the same name in both places"
                    )
                self._made[name] = made
            return self._made[name]

    def find(self, name: str) -> ProxyStorage | None:
        """Return the storage called `name`; None where the setting has none. For `aproxy_storage.registry`."""
        return self.storage(name) if settings.configured and name in self.names() else None

    def _renew_lock(self) -> None:
        self._lock = threading.RLock()

    def _forget(self, *, setting: str, **_: Any) -> None:
        if setting == "PROXY_STORAGE":
            self._made.clear()


def make_storage(target: Any, name: str | None = None) -> ProxyStorage:
    """Return the ProxyStorage that `target` is, makes, or is the dotted path to. `name` is for a class without one.

    Raises:
        ImproperlyConfigured: it is none of these, cannot be imported, or fails.
    """
    what = repr(target)
    if isinstance(target, str):
        try:
            target = import_string(target)
        except ImportError as error:
            raise ImproperlyConfigured(f"the proxy storage {what} cannot be imported: {error}") from error
    if not isinstance(target, ProxyStorage) and callable(target):
        make: Callable[..., Any] = target
        try:
            needs_name = isinstance(target, type) and issubclass(target, ProxyStorage) and not target.name
            target = make(name) if needs_name and name is not None else make()
        except Exception as error:
            raise ImproperlyConfigured(f"the proxy storage {what} cannot be made: {error}") from error
    target = getattr(target, "proxy", target)  # a BridgeStorage over it
    if not isinstance(target, ProxyStorage):
        raise ImproperlyConfigured(f"{what} is {type(target).__name__}, not a ProxyStorage, nor what makes one")
    return target


#: The setting of this project.
proxy_storage_settings = ProxyStorageSettings()

# A thread of the parent that was just making a storage has the lock, and is not there in the child to give it back.
os.register_at_fork(after_in_child=proxy_storage_settings._renew_lock)
