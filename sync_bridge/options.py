"""From the OPTIONS of a `BridgeStorage` to its ProxyStorage. Used by `storage` and `checks`."""

from __future__ import annotations

import contextlib
import difflib
import hashlib
import inspect
import logging
import os
import threading
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from django.conf import Settings, UserSettingsHolder, settings
from django.core.exceptions import ImproperlyConfigured
from django.core.signals import setting_changed

from aproxy_storage import Backend, MetaBackend, ProxyStorage, StorageError
from aproxy_storage import registry as names
from aproxy_storage.meta_backends.memory import MemoryMetaBackend
from aproxy_storage.meta_backends.orm import ORMMetaBackend

from .bridge import bridge
from .conf import make_storage, proxy_storage_settings

__all__ = ["DESCRIBING", "PASSED_ON", "SETTINGS", "Options", "name_of_location", "proxy_of"]

#: The settings that a BridgeStorage obeys, so that it is made anew where a test changes one.
SETTINGS = frozenset(
    {
        "FILE_UPLOAD_DIRECTORY_PERMISSIONS",
        "FILE_UPLOAD_PERMISSIONS",
        "INSTALLED_APPS",
        "MEDIA_ROOT",
        "MEDIA_URL",
        "PROXY_STORAGE",
        "STORAGES",
    }
)

#: What a BridgeStorage passes on to ProxyStorage.
PASSED_ON = frozenset(inspect.signature(ProxyStorage.__init__).parameters) - {"self", "name", "originals", "meta"}
DESCRIBING = frozenset({"name", "config", "original", "originals", "meta"})

_log = logging.getLogger(__name__)

_lock = threading.RLock()
_made: dict[Any, ProxyStorage] = {}


def _renew_lock() -> None:
    global _lock
    _lock = threading.RLock()


# A thread of the parent that was just making a storage has the lock, and is not there in the child to give it back.
os.register_at_fork(after_in_child=_renew_lock)


@dataclass(frozen=True)
class Options:
    """What a BridgeStorage was given about its ProxyStorage, sorted into one of four forms.

    Attributes:
        storage: a ProxyStorage, what makes one, a dotted path, or a name of a known one.
        given: the other options.
        of_a_test: they were given while `override_settings` was in force.
    """

    storage: Any
    given: Mapping[str, Any]
    of_a_test: bool = field(default_factory=lambda: settings.configured and not _are_the_projects())

    def __post_init__(self) -> None:
        given = self.given
        for option in given:
            if option not in PASSED_ON | DESCRIBING:
                close = difflib.get_close_matches(option, PASSED_ON | DESCRIBING | {"storage", "location"}, 1)
                hint = f"; did you mean {close[0]!r}?" if close else ""
                raise ImproperlyConfigured(f"BridgeStorage has no option {option!r}{hint}")
        if self.storage is not None and given:
            raise ImproperlyConfigured(
                f"storage= is a whole storage: {', '.join(map(repr, given))} cannot be given beside it"
            )
        if "config" in given and given.keys() - {"config", "name"}:
            raise ImproperlyConfigured("config= describes the whole storage: only name= goes with it")
        if "original" in given and "originals" in given:
            raise ImproperlyConfigured("give original= for one, or originals= for several, not both")

    @property
    def is_local(self) -> bool:
        """Whether the files go to a directory that Django's settings name, as with FileSystemStorage."""
        return self.storage is None and not self.given.keys() & {"config", "original", "originals"}

    @property
    def is_in_model(self) -> bool:
        """Whether the records are kept by a model, whichever way that is named, and so in a database of Django's."""
        meta = self.given.get("meta")
        if isinstance(meta, MetaBackend):
            return isinstance(meta, ORMMetaBackend)
        return not isinstance(meta, str) or ":" not in meta or meta.lower().startswith("django-orm:")

    @property
    def name(self) -> str | None:
        """The name of the storage, as far as it is known without making it."""
        if isinstance(self.storage, ProxyStorage):
            return self.storage.name
        if self.storage is not None:
            return None
        name: str | None = self.given.get("name")
        return name or (None if self.is_named_by_file else "default")

    @property
    def is_named_by_file(self) -> bool:
        """Whether the name is the one in a TOML file, which has not been read yet."""
        return "config" in self.given and not self.given.get("name")


def proxy_of(options: Options, local: Mapping[str, Any]) -> ProxyStorage:
    """Return the storage that `options` describe, the same one for the same description.

    `local`: arguments for the FileSystemBackend of a storage in a directory, ``root`` among them.

    Raises:
        ImproperlyConfigured: it cannot be made, or another one has its name.
    """
    if options.storage is not None:
        return _whole(options.storage)
    stand_in = _needs_stand_in(options, local)
    key = (repr(sorted(options.given.items(), key=lambda item: item[0])), repr(sorted(local.items())), stand_in)
    with _lock:
        if key not in _made:
            try:
                made = _described(options, local, stand_in)
            except StorageError as error:
                raise ImproperlyConfigured(str(error)) from error
            _register(made)
            _made[key] = made
        return _made[key]


def _register(made: ProxyStorage) -> None:
    try:
        names.register(made)
    except StorageError as error:
        raise ImproperlyConfigured(
            f"{error}. Where a library makes its own BridgeStorage, without the OPTIONS in STORAGES, give it these "
            f"too, or storage={made.name!r}, which is the one in STORAGES: as OPTIONS in its setting, or as an "
            "attribute of a subclass"
        ) from error


def _forget(*, setting: str, **_: Any) -> None:
    """Forget the storages that were made of a setting which has changed: in tests."""
    if setting in SETTINGS:
        with _lock:
            for made in _made.values():
                names.unregister(made.name)
            _made.clear()
            _metas.clear()
            if _are_the_projects():
                _stand_ins.clear()


def _without_overrides() -> Any:
    """Return the settings as they are without `override_settings`, which puts holders before them."""
    found: Any = settings._wrapped
    while isinstance(found, UserSettingsHolder) and isinstance(found.default_settings, UserSettingsHolder | Settings):
        found = found.default_settings
    return found


def _are_the_projects() -> bool:
    return settings._wrapped is _without_overrides()


def _needs_stand_in(options: Options, local: Mapping[str, Any]) -> bool:
    """Return whether a test has moved ``MEDIA_ROOT`` and nobody the records, which no test database of Django covers:
    those of the real files."""
    meta = options.given.get("meta")
    in_memory = isinstance(meta, MemoryMetaBackend) or str(meta).startswith("memory:")
    if not options.is_local or options.is_in_model or in_memory:
        return False
    project = _without_overrides()
    if local["root"] != os.path.abspath(settings.MEDIA_ROOT) or local["root"] == os.path.abspath(project.MEDIA_ROOT):
        return False
    real = [given.get("OPTIONS", {}).get("meta") for given in project.STORAGES.values()]
    return not options.of_a_test or meta in real


setting_changed.connect(_forget)

# What waits for a commit is awaited on the loop of the bridge, with its pools, from the thread that commits.
ORMMetaBackend.run_callback = staticmethod(lambda callback: bridge.call(callback))


def _whole(storage: Any) -> ProxyStorage:
    if isinstance(storage, str) and "." not in storage:
        try:
            return names.get_storage(storage)
        except StorageError as error:
            raise ImproperlyConfigured(str(error)) from error
    with _lock:
        if isinstance(storage, ProxyStorage) or storage not in _made:
            found = make_storage(storage)
            if found.name not in names.registered_names() and found.name not in proxy_storage_settings.names():
                names.register(found)
            if isinstance(storage, ProxyStorage):
                return found
            _made[storage] = found
        return _made[storage]


def _described(options: Options, local: Mapping[str, Any], stand_in: bool) -> ProxyStorage:
    from aproxy_storage import config

    given = dict(options.given)
    if "config" in given:
        found = config.load(given["config"])
        name = given.get("name") or (next(iter(found)) if len(found) == 1 else "default")
        if name not in found:
            raise ImproperlyConfigured(f"{given['config']} describes no storage {name!r}, only {', '.join(found)}")
        return found[name]
    meta = given.pop("meta", None)
    if stand_in:
        _log.info(
            "MEDIA_ROOT is overridden: records of files in %s are kept in memory, not where meta= says", local["root"]
        )
        meta = _stand_ins.setdefault((local["root"], repr(meta)), MemoryMetaBackend())
    else:
        meta = _meta(meta)
    name = given.pop("name", None) or "default"
    originals: Any
    if options.is_local:
        from aproxy_storage.backends.filesystem import FileSystemBackend

        # As FileSystemStorage does; the backend itself makes no directory above its root. Where it cannot be made here,
        # as where an image is built, the first use says so.
        with contextlib.suppress(OSError):
            os.makedirs(os.path.dirname(os.path.abspath(local["root"])), exist_ok=True)
        originals = FileSystemBackend(**local)
    elif "originals" in given:
        several = given.pop("originals")
        pairs = several.items() if isinstance(several, Mapping) else several
        originals = [(key, _original(value)) for key, value in pairs]
    else:
        originals = _original(given.pop("original"))
    return ProxyStorage(name, originals=originals, meta=meta, **given)


def _original(given: Any) -> Backend:
    from aproxy_storage import config

    return given if isinstance(given, Backend) else config.original_from_url(given)


def _meta(given: Any) -> MetaBackend:
    """Return the meta-backend for a URL, a model (or ``"app.Model"``), or nothing: the model of this app."""
    if isinstance(given, MetaBackend):
        return given
    if isinstance(given, str) and ":" in given:
        from aproxy_storage import config

        return config.meta_backend_from_url(given)
    from django.apps import apps

    if given is None:
        if not apps.is_installed("sync_bridge"):
            raise ImproperlyConfigured(
                'without meta= the records are kept by the model of this app: add "sync_bridge" to INSTALLED_APPS and '
                "migrate, or say where they are kept"
            )
        given = "sync_bridge.StoredFile"
    with _lock:
        key = ("meta", given if isinstance(given, str) else given._meta.label)
        if key not in _metas:
            try:
                _metas[key] = ORMMetaBackend(apps.get_model(given) if isinstance(given, str) else given)
            except (LookupError, ValueError) as error:
                raise ImproperlyConfigured(f"meta={given!r} is no model: {error}") from error
        return _metas[key]


_metas: dict[Any, MetaBackend] = {}
_stand_ins: dict[Any, MetaBackend] = {}  # of tests: by directory, and by what they stand in for


def name_of_location(location: str | os.PathLike[str]) -> str:
    """Return a name for the storage in that directory, for those who gave it none."""
    digest = hashlib.sha256(os.fspath(os.path.abspath(location)).encode()).hexdigest()
    return f"files-{digest[:12]}"
