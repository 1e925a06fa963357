"""The Django side of `aproxy_storage`: a standard storage, file fields, admin and commands over a `ProxyStorage`.

Add ``"sync_bridge"`` to ``INSTALLED_APPS``. What is named here is imported when it is first used, so that importing
this package imports neither Django nor a driver.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .bridge import Bridge, BridgeClosed, BridgeError, SyncCallOnEventLoop
    from .conf import proxy_storage_settings
    from .fields import ProxyStorageFileField, ProxyStorageImageField
    from .registry import aget_content_object, get_content_object, get_storage
    from .storage import BridgeStorage

__all__ = [
    "Bridge",
    "BridgeClosed",
    "BridgeError",
    "BridgeStorage",
    "ProxyStorageFileField",
    "ProxyStorageImageField",
    "SyncCallOnEventLoop",
    "aget_content_object",
    "get_content_object",
    "get_storage",
    "proxy_storage_settings",
]

_WHERE = {
    "Bridge": "bridge",
    "BridgeClosed": "bridge",
    "BridgeError": "bridge",
    "BridgeStorage": "storage",
    "ProxyStorageFileField": "fields",
    "ProxyStorageImageField": "fields",
    "SyncCallOnEventLoop": "bridge",
    "aget_content_object": "registry",
    "get_content_object": "registry",
    "get_storage": "registry",
    "proxy_storage_settings": "conf",
}


def __getattr__(name: str) -> Any:
    if name not in _WHERE:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f".{_WHERE[name]}", __name__), name)
