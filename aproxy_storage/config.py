"""URLs and TOML files -> storages.

A backend is found by the scheme of its URL: in the tables below, else among the entry points of installed packages
(groups ``aproxy_storage.backends`` and ``aproxy_storage.meta_backends``, named for the scheme). Nothing is imported
before a URL asks for it. The class makes itself: ``from_url(url)``.
"""

from __future__ import annotations

import builtins
import importlib
import inspect
import math
import os
import pkgutil
import re
import tomllib
from collections.abc import Callable, Mapping
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any, TypeVar, cast
from urllib.parse import quote

from . import errors
from .backends.base import Backend
from .breaker import Breaker
from .digest import hash_constructor
from .errors import ConfigurationError, MissingDependency, StorageError
from .fallback import Original
from .meta_backends.base import MetaBackend
from .placement import Placement
from .proxy import ProxyStorage
from .timeouts import Timeouts
from .urls import redacted, relative_to, scheme_of

__all__ = [
    "EMBEDDED",
    "META_BACKENDS",
    "ORIGINALS",
    "PLACEMENTS",
    "find_file",
    "load",
    "meta_backend_from_url",
    "original_from_url",
    "storage_from_urls",
]

#: Schemes of original backends.
ORIGINALS = {
    "az": "aproxy_storage.backends.obstore:ObstoreBackend",
    "django": "aproxy_storage.backends.django:DjangoStorageBackend",
    "file": "aproxy_storage.backends.filesystem:FileSystemBackend",
    "gs": "aproxy_storage.backends.obstore:ObstoreBackend",
    "gridfs+mongodb": "aproxy_storage.backends.gridfs:GridFSBackend",
    "gridfs+mongodb+srv": "aproxy_storage.backends.gridfs:GridFSBackend",
    "memory": "aproxy_storage.backends.memory:MemoryBackend",
    "obstore+s3": "aproxy_storage.backends.obstore:ObstoreBackend",
    "postgres": "aproxy_storage.backends.postgres:PostgresBackend",
    "postgresql": "aproxy_storage.backends.postgres:PostgresBackend",
    "s3": "aproxy_storage.backends.s3:S3Backend",
}

#: Schemes of meta-backends. One that is in both tables (``memory``) is told apart by which of them is asked.
META_BACKENDS = {
    "django-orm": "aproxy_storage.meta_backends.orm:ORMMetaBackend",
    "memory": "aproxy_storage.meta_backends.memory:MemoryMetaBackend",
    "mongodb": "aproxy_storage.meta_backends.mongo:MongoMetaBackend",
    "mongodb+srv": "aproxy_storage.meta_backends.mongo:MongoMetaBackend",
    "postgres": "aproxy_storage.meta_backends.postgres:PostgresMetaBackend",
    "postgresql": "aproxy_storage.meta_backends.postgres:PostgresMetaBackend",
    "sqlite": "aproxy_storage.meta_backends.sqlite:SQLiteMetaBackend",
}

#: Policies of ``placement = {policy = "…"}``; the other keys of that table are keyword arguments of the class.
PLACEMENTS = {
    "fallback": "aproxy_storage.fallback:Fallback",
    "first": "aproxy_storage.placement:First",
    "replicate": "aproxy_storage.replicate:Replicate",
    "route": "aproxy_storage.placement:route_by",
}

#: The directory, below the working directory, of the storage that needs no configuration.
EMBEDDED = "aproxy-data"

#: The file that is looked for in the working directory.
FILE = "aproxy.toml"

_GROUPS = {"original": "aproxy_storage.backends", "meta-backend": "aproxy_storage.meta_backends"}

T = TypeVar("T")


def original_from_url(url: str) -> Backend:
    """Return the original backend that `url` names. Nothing is opened or connected.

    Raises:
        ConfigurationError: the scheme is unknown, or the backend refuses the URL.
        MissingDependency: the driver is not installed; the message names the pip line.
    """
    return _from_url("original", ORIGINALS, Backend, url)  # type: ignore[type-abstract]


def meta_backend_from_url(url: str) -> MetaBackend:
    """Return the meta-backend that `url` names. Nothing is opened or connected.

    Raises:
        ConfigurationError, MissingDependency: as `original_from_url`.
    """
    return _from_url("meta-backend", META_BACKENDS, MetaBackend, url)  # type: ignore[type-abstract]


def storage_from_urls(original: str, meta: str, *, name: str = "default", **options: Any) -> ProxyStorage:
    """Return the storage `name` over one original and a meta-backend; `options` are those of `ProxyStorage`.

    Raises:
        ConfigurationError, MissingDependency: as `original_from_url`, and as `ProxyStorage`.
    """
    return ProxyStorage(name, originals=original_from_url(original), meta=meta_backend_from_url(meta), **options)


def find_file() -> Path | None:
    """Return the configuration file that `load` reads: ``$APROXY_CONFIG``, else ``./aproxy.toml`` if it is there."""
    named = os.environ.get("APROXY_CONFIG")
    if named:
        return Path(named)
    return Path(FILE) if os.path.lexists(FILE) else None  # one that cannot be read is an error, not another storage


def load(path: str | os.PathLike[str] | None = None) -> dict[str, ProxyStorage]:
    """Return the storages that a TOML file describes, by their names, in the order of the file.

    The file is `path`, else ``$APROXY_CONFIG``, else ``./aproxy.toml``. Without any of them there is one storage,
    ``"default"``, in the directory ``./aproxy-data`` (files below ``files/``, records in ``records.sqlite3``), which
    is made. Equal URLs give the same object, so that storages share pools and threads. Nothing else is opened,
    connected or registered.

    Raises:
        ConfigurationError: names the file, the line and what to change.
        MissingDependency: a driver is not installed; the message names the pip line.
    """
    file = Path(path) if path is not None else find_file()
    if file is None:
        return {"default": embedded()}
    try:
        text = file.read_text("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "it is not UTF-8"
        said_so = "" if path is not None or file.name == FILE else " (named by APROXY_CONFIG)"
        raise ConfigurationError(f"cannot read the configuration {file}{said_so}: {reason}") from error
    return _File(file, text).storages()


def embedded(directory: str | os.PathLike[str] = EMBEDDED) -> ProxyStorage:
    """Return the storage ``"default"`` that needs no configuration; its directory is made.

    Raises:
        ConfigurationError: the directory cannot be made.
    """
    from .backends.filesystem import FileSystemBackend
    from .meta_backends.sqlite import SQLiteMetaBackend

    root = Path(directory).absolute()
    try:
        root.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigurationError(f"cannot make the directory {root}: {error.strerror}") from error
    return ProxyStorage(
        "default", originals=FileSystemBackend(root / "files"), meta=SQLiteMetaBackend(root / "records.sqlite3")
    )


# -- from a scheme to a class


def _from_url(kind: str, table: Mapping[str, str], base: type[T], url: str) -> T:
    scheme = scheme_of(url)
    cls = _resolve(kind, table, scheme, url)
    if not (isinstance(cls, type) and issubclass(cls, base)):
        raise ConfigurationError(f"{redacted(url)}: {cls!r}, which answers to {scheme!r}, is no {base.__name__}")
    try:
        return cast(T, cast(Any, cls).from_url(url))
    except StorageError:
        raise
    except ValueError as error:  # of a constructor, whose text names the argument
        raise ConfigurationError(f"{redacted(url)}: {error}") from error


def _resolve(kind: str, table: Mapping[str, str], scheme: str, url: str) -> Any:
    if scheme in table:
        return _import(table[scheme])
    found = {entry.name: entry for entry in entry_points(group=_GROUPS[kind])}
    if scheme in found:
        try:
            return found[scheme].load()
        except MissingDependency:
            raise
        except (ImportError, AttributeError) as error:
            raise ConfigurationError(
                f"the {kind} for {scheme!r} cannot be imported from {found[scheme].value}: {error}"
            ) from error
    known = ", ".join(sorted({*table, *found}))
    raise ConfigurationError(f"{redacted(url)}: there is no {kind} for the scheme {scheme!r} (known: {known})")


def _import(reference: str) -> Any:
    module, _, name = reference.partition(":")
    return getattr(importlib.import_module(module), name)


# -- the file


class _File:
    """One configuration file; every error that leaves it names the file and the line."""

    def __init__(self, file: Path, text: str) -> None:
        self._file = file
        self._text = text
        self._made: dict[tuple[str, str], Any] = {}

    def storages(self) -> dict[str, ProxyStorage]:
        try:
            document = tomllib.loads(self._text)
        except tomllib.TOMLDecodeError as error:
            found = re.search(r"at line (\d+)", str(error))
            at = f"{self._file}:{found[1]}" if found else f"{self._file}"
            raise ConfigurationError(f"{at}: this is not TOML: {error}") from error
        self._only((), document, {"storages"})
        tables = self._table(("storages",), document.get("storages", {}))
        if not tables:
            raise self._wrong((), 'there is no storage; a first one: [storages.media] originals = "file:media"')
        return {name: self._storage(name, table) for name, table in tables.items()}

    def _storage(self, name: str, given: Any) -> ProxyStorage:
        at = ("storages", name)
        table = self._table(at, given)
        self._only(at, table, {*_ARGUMENTS, "originals", "meta", "placement", "timeouts"})
        for needed in ("originals", "meta"):
            if needed not in table:
                raise self._wrong(at, f"storage {name!r} needs {needed}")
        options: dict[str, Any] = {
            key: None if (key, table[key]) == ("tidy_every", "none") else self._typed((*at, key), table[key], kinds)
            for key, kinds in _ARGUMENTS.items()
            if key in table
        }
        if options.get("checksum") == "none":
            options["checksum"] = None
        elif "checksum" in options:
            self._attempt((*at, "checksum"), lambda: hash_constructor(options["checksum"]))
        if options.get("max_path_bytes", 1) < 1:
            raise self._wrong((*at, "max_path_bytes"), "max_path_bytes must be at least 1")
        if "timeouts" in table:
            options["timeouts"] = self._timeouts((*at, "timeouts"), table["timeouts"])
        if "placement" in table:
            options["placement"] = self._placement((*at, "placement"), table["placement"])
        return self._attempt(
            at,
            lambda: ProxyStorage(
                name,
                originals=self._originals((*at, "originals"), table["originals"]),
                meta=self._made_from((*at, "meta"), table["meta"], meta_backend_from_url),
                **options,
            ),
        )

    def _originals(self, at: tuple[str, ...], given: Any) -> Original | dict[str, Original]:
        if isinstance(given, str) or (isinstance(given, dict) and isinstance(given.get("url"), str)):
            return self._original(at, given)
        table = self._table(at, given)
        return {name: self._original((*at, name), one) for name, one in table.items()}

    def _original(self, at: tuple[str, ...], given: Any) -> Original:
        """Make an original of a URL, or of a table which may hold its rules beside what is the backend's."""
        rules: dict[str, Any] = {}
        if isinstance(given, dict):
            given = dict(given)
            if "max_concurrency" in given:
                rules["max_concurrency"] = self._typed((*at, "max_concurrency"), given.pop("max_concurrency"), (int,))
            if "attempt_timeout" in given:
                seconds = given.pop("attempt_timeout")
                seconds = None if seconds == "none" else self._typed((*at, "attempt_timeout"), seconds, (int, float))
                rules["timeouts"] = self._attempt(at, lambda: Timeouts(idle=seconds))
            if "fallback_on" in given:
                named = given.pop("fallback_on")
                named = [named] if isinstance(named, str) else named
                rules["fallback_on"] = tuple(self._exception((*at, "fallback_on"), each) for each in named)
        backend = self._made_from(at, given, original_from_url)
        return self._attempt(at, lambda: Original(backend, **rules))

    def _exception(self, at: tuple[str, ...], name: Any) -> type[BaseException]:
        """Return the exception of that name: of Python, of this library, or of the module that it begins with."""
        try:
            if "." in name:
                found = pkgutil.resolve_name(name)
            else:
                found = getattr(errors, name, None) or getattr(builtins, name)
        except (AttributeError, ImportError, TypeError, ValueError) as error:
            raise self._wrong(at, f"{name!r} is no exception: {error}") from None
        return cast(type[BaseException], found)

    def _made_from(self, at: tuple[str, ...], given: Any, make: Callable[[str], T]) -> T:
        """Make a backend of a URL, or of a table with a ``url`` and what could be in its query."""
        options: dict[str, Any] = {}
        if isinstance(given, dict):
            options = dict(given)
            given = options.pop("url", None)
        if not isinstance(given, str):
            raise self._wrong(at, 'a URL is expected, like "file:media", or a table with one: {url = "file:media"}')
        url = self._with_variables(at, given)
        for name, value in _flat(options):
            if not isinstance(value, str | int | float):
                raise self._wrong((*at, *name.split(".")), f"{name} must be a text, a number, true or false")
            text = self._with_variables(at, value, quoted=False) if isinstance(value, str) else str(value)
            url += f"{'&' if '?' in url else '?'}{quote(name)}={quote(text, safe='')}"
        key = (make.__name__, url)
        if key not in self._made:
            with relative_to(self._file.absolute().parent):
                self._made[key] = self._attempt(at, lambda: make(url))
        return cast(T, self._made[key])

    def _with_variables(self, at: tuple[str, ...], text: str, *, quoted: bool = True) -> str:
        """Put environment variables in the place of ``${NAME}``; `quoted`, unless one is the whole text."""

        def value_of(found: re.Match[str]) -> str:
            try:
                value = os.environ[found[1]]
            except KeyError:
                raise self._wrong(at, f"the environment variable {found[1]} is not set") from None
            return quote(value, safe="") if quoted and found[0] != text else value

        return re.sub(r"\$\{(\w+)\}", value_of, text)

    def _timeouts(self, at: tuple[str, ...], given: Any) -> Timeouts:
        table = self._table(at, given)
        self._only(at, table, set(Timeouts.__dataclass_fields__))
        limits: dict[str, Any] = {
            name: None if value == "none" else self._typed((*at, name), value, (int, float))
            for name, value in table.items()
        }
        return self._attempt(at, lambda: Timeouts(**limits))

    def _placement(self, at: tuple[str, ...], given: Any) -> Placement:
        table = self._table(at, given)
        policy = table.get("policy")
        if not isinstance(policy, str) or policy not in PLACEMENTS:
            known = ", ".join(f'"{name}"' for name in sorted(PLACEMENTS))
            raise self._wrong(at, f"placement needs a policy, one of {known}: placement = {{policy = …}}")
        cls = _import(PLACEMENTS[policy])
        options = {name: value for name, value in table.items() if name != "policy"}
        self._only(at, options, set(inspect.signature(cls).parameters))
        # TOML has no null: "none" stands for it, as it does in timeouts.
        options = {name: None if value == "none" else value for name, value in options.items()}
        if (breaker := options.get("breaker")) is not None:
            breaker = self._table((*at, "breaker"), breaker)
            self._only((*at, "breaker"), breaker, set(Breaker.__dataclass_fields__))
            options["breaker"] = self._attempt((*at, "breaker"), lambda: Breaker(**breaker))
        return cast(Placement, self._attempt(at, lambda: cls(**options)))

    # -- checks

    def _table(self, at: tuple[str, ...], given: Any) -> dict[str, Any]:
        if not isinstance(given, dict):
            raise self._wrong(at, f"{'.'.join(at)} must be a table")
        return given

    def _only(self, at: tuple[str, ...], table: Mapping[str, Any], known: set[str]) -> None:
        for key in table:
            if key not in known:
                where = f" in {'.'.join(at)}" if at else ""
                raise self._wrong(
                    (*at, key), f"{key!r} is unknown{where} (known: {', '.join(sorted(known)) or 'none'})"
                )

    def _typed(self, at: tuple[str, ...], value: Any, kinds: tuple[type, ...]) -> Any:
        if isinstance(value, bool) or not isinstance(value, kinds):
            raise self._wrong(at, f"{at[-1]} must be {_KINDS[kinds[-1]]}")
        if isinstance(value, float) and not math.isfinite(value):
            raise self._wrong(at, f"{at[-1]} must be a finite number")
        return value

    def _attempt(self, at: tuple[str, ...], make: Callable[[], T]) -> T:
        try:
            return make()
        except (StorageError, ValueError, TypeError) as error:
            if str(error).startswith(f"{self._file}:"):
                raise
            wrapped = self._wrong(at, str(error))
            if isinstance(error, MissingDependency):
                wrapped = MissingDependency(str(wrapped))
            raise wrapped from error

    def _wrong(self, at: tuple[str, ...], message: str) -> ConfigurationError:
        return ConfigurationError(f"{self._file}:{_line_of(self._text, at)}: {message}")


#: Arguments of `ProxyStorage` that are given as they are.
_ARGUMENTS: dict[str, tuple[type, ...]] = {
    "prefix": (str,),
    "keys": (str,),
    "checksum": (str,),
    "chunk_bytes": (int,),
    "durability": (str,),
    "lease": (int, float),
    "settle": (int, float),
    "keep_replaced": (int, float),
    "max_path_bytes": (int,),
    "tidy_every": (int, float),
}

_KINDS = {str: "a text", int: "a whole number", float: "a number"}


def _flat(table: Mapping[str, Any], before: str = "") -> list[tuple[str, Any]]:
    """Return the values of nested tables under dotted names."""
    found: list[tuple[str, Any]] = []
    for name, value in table.items():
        found += _flat(value, f"{before}{name}.") if isinstance(value, dict) else [(before + name, value)]
    return found


def _line_of(text: str, at: tuple[str, ...]) -> int:
    """Return the line in which the key `at` stands, or the nearest table around it; 1 where there is none.

    tomllib keeps no positions. Lines are looked at one by one, so a key inside of a text of several lines could
    mislead; the message is still about the right file.
    """
    best, best_length = 1, 0
    table: tuple[str, ...] = ()
    for number, line in enumerate(text.splitlines(), 1):
        stripped = line.strip()
        if stripped.startswith("["):
            table = keys = _keys(stripped.partition("]")[0].lstrip("["))
        else:
            keys = (*table, *_keys(re.split(r"\s*=", stripped, maxsplit=1)[0])) if "=" in stripped else ()
        common = keys == at[: len(keys)]
        if common and len(keys) > best_length:
            best, best_length = number, len(keys)
        elif not common and keys[: len(at)] == at and len(at) > best_length:
            best, best_length = number, len(at)  # the first line of a table that is only written in dotted keys
    return best


def _keys(dotted: str) -> tuple[str, ...]:
    """Return the parts of a dotted TOML key, () where it is none."""
    try:
        value: Any = tomllib.loads(f"{dotted} = 0")
    except tomllib.TOMLDecodeError:
        return ()
    parts: list[str] = []
    while isinstance(value, dict) and len(value) == 1:
        ((key, value),) = value.items()
        parts.append(key)
    return tuple(parts)
