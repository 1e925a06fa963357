"""What a BridgeStorage is made of: its arguments, its ProxyStorage, its names. Used by `storage` and `twins`."""

from __future__ import annotations

import copy
import logging
import os
import pathlib
import posixpath
import weakref
from collections.abc import Mapping
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, ClassVar, Self
from urllib.parse import urljoin

from django.conf import settings
from django.core.exceptions import ImproperlyConfigured, SuspiciousFileOperation
from django.core.files.base import ContentFile, File
from django.core.files.storage import Storage, storages
from django.core.files.utils import validate_file_name
from django.core.signals import setting_changed
from django.utils.encoding import filepath_to_uri
from django.utils.module_loading import import_string

from aproxy_storage import Backend, InvalidPath, MetaBackend, MetaRecord, ProxyStorage, StorageError
from aproxy_storage.backends.filesystem import FileSystemBackend

from . import bridge as _bridge
from .bridge import Bridge
from .options import SETTINGS, Options, name_of_location, proxy_of

__all__ = [
    "ConfiguredStorage",
    "Saving",
    "SuspiciousPath",
    "asked",
    "file_of",
    "find_proxy",
    "live_storages",
    "named",
    "plain",
    "root_of",
    "saving",
    "suspicious",
    "url_below",
    "wished",
]


_log = logging.getLogger(__name__)

_UNKNOWN: Any = object()


class SuspiciousPath(InvalidPath, SuspiciousFileOperation):
    """A name that can never be stored: for Django a suspicious operation, for us an illegal path."""


@dataclass(frozen=True, slots=True)
class Saving:
    """What one call of `save` asks for beside what Django hands to ``_save``."""

    max_length: int | None = None
    using: str | None = None
    content_type: str | None = None
    extra: Mapping[str, Any] | None = None


# Of the call, not of the storage: two threads that save at once have nothing to do with each other.
saving: ContextVar[Saving | None] = ContextVar("sync_bridge.saving", default=None)


class ConfiguredStorage(Storage):
    """The arguments and names of a BridgeStorage."""

    #: For subclasses: what `storage` is where it is not given.
    storage: ClassVar[Any] = None
    bridge: ClassVar[Bridge] = _bridge.bridge
    #: Whether a subclass has a say in names.
    _chooses_names: bool

    def __new__(cls, *args: Any, **kwargs: Any) -> Self:
        self: Self = super().__new__(cls)
        self._was_told_meta = "meta" in kwargs  # by whoever makes it, not by the __init__ of a subclass
        return self

    def __init__(
        self,
        location: str | os.PathLike[str] | None = None,
        base_url: str | None = None,
        file_permissions_mode: int | None = None,
        directory_permissions_mode: int | None = None,
        allow_overwrite: bool = False,
        *,
        storage: Any = None,
        read_through: bool = False,
        direct: bool = True,
        **options: Any,
    ) -> None:
        given = {
            "location": location,
            "base_url": base_url,
            "file_permissions_mode": file_permissions_mode,
            "directory_permissions_mode": directory_permissions_mode,
            "storage": storage,
        }
        self._given = {name: value for name, value in given.items() if value is not None} | options
        if allow_overwrite:
            self._given["allow_overwrite"] = True
        if read_through:
            self._given["read_through"] = True
        if not direct:
            self._given["direct"] = False
        self.allow_overwrite = allow_overwrite
        self.read_through = read_through
        self.direct = direct
        if location is not None and "name" not in options:
            options = {"name": name_of_location(location), **options}
        self.options = Options(storage if storage is not None else self.storage, options)
        local = {"location", "file_permissions_mode", "directory_permissions_mode"} & self._given.keys()
        if base_url is not None and not hasattr(base_url, "endswith"):  # a lazy text is no str
            raise ImproperlyConfigured(f"base_url={base_url!r}: give text")
        if local and not self.options.is_local:
            raise ImproperlyConfigured(
                f"{', '.join(sorted(local))}: only for a storage in a directory of its own, not with storage=, "
                "config=, original= or originals="
            )
        self._begin()

    def _begin(self) -> None:
        self._proxy: ProxyStorage | None = None
        self._base_url: Any = _UNKNOWN
        setting_changed.connect(self._obey)
        _instances.add(self)

    def __getstate__(self) -> dict[str, Any]:
        """Return the arguments: what was made of them is for this process. (A live ProxyStorage cannot be pickled.)"""
        return {name: value for name, value in self.__dict__.items() if name not in ("_proxy", "_base_url")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._begin()

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        return copy.copy(self)  # what it was given stays shared: a backend is not copied

    def __repr__(self) -> str:
        shown = (
            self._given.get("name")
            or self._given.get("location")
            or self.options.name
            or self._given.get("storage")
            or self._given.get("config")
        )
        return f"<{type(self).__name__} {shown!r}>"

    def deconstruct(self) -> tuple[str, tuple[()], dict[str, Any]]:
        """Return what a migration needs to make this storage again.

        What describes originals and databases is not written down, since it may hold passwords and differs from host
        to host: such a storage, and a live one, is written by its name, under which `get_storage` knows it. So is one
        in a directory whose records are elsewhere than in a model, unless a subclass says where by itself.
        """
        cls = type(self)
        path = f"{cls.__module__}.{cls.__qualname__}".replace("sync_bridge.storage.", "sync_bridge.")
        given = dict(self._given)
        storage = given.get("storage")
        meta = given.pop("meta", None)
        in_words = self.options.is_in_model and not isinstance(meta, MetaBackend)  # nor is there a secret in them
        by_name = self.options.is_local and not in_words and self._was_told_meta
        if by_name or not (self.options.is_local or isinstance(storage, str)):
            kept: dict[str, Any] = {
                key: given[key] for key in ("base_url", "allow_overwrite", "read_through", "direct") if key in given
            }
            if by_name:
                kept.pop("base_url", None)  # the directory has it
            if storage is not None and not isinstance(storage, ProxyStorage):
                return path, (), {"storage": f"{storage.__module__}.{storage.__qualname__}", **kept}
            return path, (), kept if self.storage is not None else {"storage": self.name, **kept}
        if in_words and meta is not None:
            given["meta"] = meta if isinstance(meta, str) else meta._meta.label
        return path, (), given

    def _obey(self, *, setting: str, **_: Any) -> None:
        if setting in SETTINGS:
            self._proxy = None
            self._base_url = _UNKNOWN

    # -- what is below

    @property
    def proxy(self) -> ProxyStorage:
        """The ProxyStorage; await its verbs from asynchronous code."""
        proxy = self._proxy
        if proxy is None:
            proxy = proxy_of(self.options, self._local() if self.options.is_local else {})
            self.bridge.on_close(_Release(proxy))
            self._proxy = proxy
        return proxy

    def _local(self) -> dict[str, Any]:
        return {
            "root": os.path.abspath(self.location),
            "file_mode": self.file_permissions_mode,
            "directory_mode": self.directory_permissions_mode,
            "base_url": self._or_setting("base_url", "MEDIA_URL") or None,
        }

    @property
    def name(self) -> str:
        """The name in the records."""
        return self.options.name or self.proxy.name

    @property
    def base_location(self) -> str | os.PathLike[str]:
        """The directory as it was given, or ``MEDIA_ROOT``."""
        location: str | os.PathLike[str] = self._or_setting("location", "MEDIA_ROOT")
        return location

    @property
    def location(self) -> str:
        """The absolute path of the directory."""
        return os.path.abspath(self.base_location)

    @property
    def base_url(self) -> str | None:
        """What `url` puts before a name; None where the record has to be asked: URLs are those of the original, or
        have a key in them that is not the name."""
        if self._base_url is _UNKNOWN:  # a page may ask for a hundred URLs
            self._base_url = self._find_base_url()
        base: str | None = self._base_url
        return base

    def _find_base_url(self) -> str | None:
        base: str | None
        if self.options.is_local:
            given = self.options.given
            by_name = given.get("keys", "path") == "path" and not given.get("prefix")
            base = self._or_setting("base_url", "MEDIA_URL") if by_name else None
        elif "base_url" in self._given:
            base = self._given["base_url"]  # somebody else answers for it, by the name
        else:
            proxy = self.proxy
            alone = next(iter(proxy.originals.values())) if len(proxy.originals) == 1 else None
            base = getattr(alone, "base_url", None) if proxy.keys == "path" and not proxy.prefix else None
        return base if base is None or base.endswith("/") else base + "/"

    @property
    def file_permissions_mode(self) -> int | None:
        mode: int | None = self._or_setting("file_permissions_mode", "FILE_UPLOAD_PERMISSIONS")
        return mode

    @property
    def directory_permissions_mode(self) -> int | None:
        mode: int | None = self._or_setting("directory_permissions_mode", "FILE_UPLOAD_DIRECTORY_PERMISSIONS")
        return mode

    def _or_setting(self, option: str, setting: str) -> Any:
        return self._given[option] if option in self._given else getattr(settings, setting)

    @property
    def _published(self) -> FileSystemBackend | None:
        """The directory that a web server may publish as it is, for URLs that end with the key; None elsewhere.

        There every file has the key that its path says, so that its URL stays; and a file that somebody put there by
        hand, without a record, blocks its name: a new one of that name would get its URL, and its place in old rows.
        A directory of Django's settings is one, and so is an original that has a `base_url`, alone. Not where keys are
        made up, and not where a `base_url` of this storage says that somebody else answers for them.
        """
        proxy = self.proxy
        if proxy.keys != "path" or len(proxy.originals) != 1:
            return None
        alone = proxy.get_original()
        if not isinstance(alone, FileSystemBackend):
            return None
        has_urls = alone.base_url is not None and "base_url" not in self._given
        return alone if self.options.is_local or has_urls else None

    def _full(self, name: str) -> str:
        """Return the path for a name that is stored at exactly: it may have the prefix already."""
        prefix = self.proxy.prefix
        return name if name.startswith(prefix) else prefix + name

    def _has_to_choose(self, name: str, max_length: int | None) -> bool:
        """Return whether Django's way to an available name has to be gone, whatever is on the disk, before ProxyStorage
        goes its own."""
        too_long = max_length is not None and len(name) > max_length
        return self._chooses_names or (self.allow_overwrite and too_long)

    async def _ais_on_disk(self, path: str) -> bool:
        """Return whether something in a published directory has the key of `path`, with a record or without."""
        directory = self._published
        return directory is not None and await directory.is_taken(path.removeprefix(self.proxy.prefix))


_instances: weakref.WeakSet[ConfiguredStorage] = weakref.WeakSet()


def find_proxy(name: str) -> ProxyStorage | None:
    """Return the ProxyStorage called `name` that a BridgeStorage describes: one in ``STORAGES``, or a live one.

    A TOML file without a ``name`` beside it is read for that.
    """
    if not settings.configured:
        return None
    for alias, given in storages.backends.items():
        backend = given.get("BACKEND", "")
        cls = import_string(backend) if isinstance(backend, str) else backend
        if isinstance(cls, type) and issubclass(cls, ConfiguredStorage):
            storages[alias]  # now it is an instance
    live = list(_instances)
    for instance in live:
        if instance.options.name == name:  # not for those that are only known by a dotted path or a name
            return instance.proxy
    for instance in live:
        try:
            if instance.options.is_named_by_file and instance.proxy.name == name:
                return instance.proxy
        except ImproperlyConfigured as error:
            _log.warning("%r cannot be made, and so it is not known whether it is %r: %s", instance, name, error)
    return None


def live_storages() -> list[ConfiguredStorage]:
    """Return every BridgeStorage there is, of fields and of modules; of ``STORAGES`` those that were asked for."""
    return list(_instances)


def root_of(backend: Backend) -> str:
    """Return what the full paths of all keys in `backend` begin with; links in it are followed, nothing else asked."""
    root = backend.full_path("name").removesuffix("name")
    return os.path.join(os.path.realpath(root), "") if os.path.isabs(root) else root


class _Release:
    """Releases, at the end of the process, what the loop of the bridge holds of a storage. Tidies nothing up: by then
    a database of the same settings may be another one, as it is after a run of tests."""

    def __init__(self, proxy: ProxyStorage) -> None:
        self.proxy = weakref.ref(proxy)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Release) and other.proxy == self.proxy

    def __hash__(self) -> int:
        return hash(self.proxy)

    async def __call__(self) -> None:
        proxy = self.proxy()
        if proxy is None:
            return
        await proxy.cleanup.drain(within=proxy.timeouts.cleanup)
        parts: list[Backend | MetaBackend] = [*proxy.originals.values(), proxy.meta]
        for part in parts:
            try:
                await part.aclose()
            except StorageError as error:  # out of reach, or its database is not configured any more
                _log.debug("%s was not released: %s", part, error)


def asked(name: str | os.PathLike[str]) -> str:
    """Return the name that is asked for. It need not be one that could be stored today, but must not lead upwards."""
    text = os.fspath(name).replace("\\", "/")
    if ".." in text and ".." in pathlib.PurePosixPath(text).parts:
        raise SuspiciousFileOperation(f"Detected path traversal attempt in {text!r}")
    return text


def file_of(name: str | os.PathLike[str] | MetaRecord) -> str | MetaRecord:
    """Return the record that was given, or the name that is asked for."""
    return name if isinstance(name, MetaRecord) else asked(name)


def plain(name: str) -> str:
    """Return a name without what means nothing in it, as in ``a//./b``."""
    if not name or name.endswith("/") or (".." in name and ".." in name.split("/")):
        return name
    return posixpath.normpath(name)


def url_below(base: str, name: str | os.PathLike[str]) -> str:
    """Return the URL of a path below `base`, quoted."""
    return urljoin(base, str(filepath_to_uri(os.fspath(name)) or "").lstrip("/"))


def suspicious(error: InvalidPath) -> SuspiciousPath:
    return SuspiciousPath(str(error), operation=error.operation, path=error.path, backend=error.backend)


def named(name: str | os.PathLike[str] | None, content: Any) -> tuple[str, Any]:
    if name is None:
        name = content.name
    if isinstance(content, bytes | bytearray | memoryview | str):
        content = ContentFile(content if isinstance(content, str) else bytes(content))
    elif not hasattr(content, "chunks"):
        content = File(content, name)
    return wished(name), content


def wished(name: str | os.PathLike[str]) -> str:
    """Return the name under which something is to be stored, without what means nothing in it, as in ``a//./b``.

    Raises:
        SuspiciousFileOperation: it leads out of the storage, or names no file.
    """
    target = os.fspath(name).replace("\\", "/")
    validate_file_name(target, allow_relative_path=True)
    return posixpath.normpath(target)
