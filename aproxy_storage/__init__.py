"""An asyncio-native storage library: bytes in original backends, one record per file in a meta-backend.

Backends are imported by their module (``aproxy_storage.backends.filesystem``), so that importing this package
imports no driver.
"""

from .backends.base import Backend, Reader
from .content import Source
from .errors import (
    AccessDenied,
    AlreadyExists,
    BackendUnavailable,
    ConfigurationError,
    Conflict,
    ContentError,
    DeadlineExceeded,
    IntegrityError,
    InvalidPath,
    MissingDependency,
    NotFound,
    NotSupported,
    OutOfSpace,
    StorageError,
)
from .files import AsyncFile, AsyncWriter
from .meta_backends.base import MetaBackend
from .placement import First, Placement, Request, Route
from .proxy import Health, ProxyStorage
from .records import ByteRange, Capabilities, CommonPrefix, MetaRecord, ObjectInfo, Place, Revision
from .timeouts import Timeouts

__all__ = [
    "AccessDenied",
    "AlreadyExists",
    "AsyncFile",
    "AsyncWriter",
    "Backend",
    "BackendUnavailable",
    "ByteRange",
    "Capabilities",
    "CommonPrefix",
    "ConfigurationError",
    "Conflict",
    "ContentError",
    "DeadlineExceeded",
    "First",
    "Health",
    "IntegrityError",
    "InvalidPath",
    "MetaBackend",
    "MetaRecord",
    "MissingDependency",
    "NotFound",
    "NotSupported",
    "ObjectInfo",
    "OutOfSpace",
    "Place",
    "Placement",
    "ProxyStorage",
    "Reader",
    "Request",
    "Revision",
    "Route",
    "Source",
    "StorageError",
    "Timeouts",
]
