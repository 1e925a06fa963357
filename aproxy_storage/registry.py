"""Named storages: finds the storage of a record. Filled by whoever configures the program; nothing at import."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from .errors import ConfigurationError

if TYPE_CHECKING:
    from .proxy import ProxyStorage

__all__ = ["add_finder", "get_storage", "register", "registered_names", "unregister"]

_storages: dict[str, ProxyStorage] = {}
_finders: list[Callable[[str], ProxyStorage | None]] = []


def add_finder(finder: Callable[[str], ProxyStorage | None]) -> None:
    """Have `finder` asked for storages that are not registered, by their names; adding it again changes nothing.

    For frameworks whose settings name storages that are made when somebody asks for them.
    """
    if finder not in _finders:
        _finders.append(finder)


def register(storage: ProxyStorage) -> ProxyStorage:
    """Make `storage` known under its name; return it. Registering the same object again changes nothing.

    Raises:
        ConfigurationError: another storage is registered under that name.
    """
    known = _storages.setdefault(storage.name, storage)
    if known is not storage:
        raise ConfigurationError(
            f"two storages are named {storage.name!r}; the name is written into every record, so it must tell them"
            " apart (unregister() the first if it was meant to be replaced)"
        )
    return storage


def unregister(name: str) -> None:
    """Forget the storage of that name, if any."""
    _storages.pop(name, None)


def get_storage(name: str) -> ProxyStorage:
    """Return the storage registered under `name`, or the one that a finder knows.

    Raises:
        ConfigurationError: there is none.
    """
    found = _storages.get(name)
    for finder in _finders:
        found = found or finder(name)
    if found is None:
        known = ", ".join(map(repr, sorted(_storages))) or "none"
        raise ConfigurationError(
            f"no storage named {name!r} is registered (known: {known}); call aproxy_storage.registry.register(storage)"
        )
    return found


def registered_names() -> tuple[str, ...]:
    """Return the names of all registered storages, sorted."""
    return tuple(sorted(_storages))
