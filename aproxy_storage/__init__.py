"""An asyncio-native storage library: bytes in original backends, one record per file in a meta-backend.

Backends are imported by their module (``aproxy_storage.backends.filesystem``), so that importing this package
imports no driver.
"""

from .attempts import Attempt
from .backends.base import Backend, Reader
from .breaker import Breaker
from .content import Source
from .direct_uploads import DirectUpload
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
from .fallback import Fallback, Original
from .file_writer import AsyncWriter
from .files import AsyncFile
from .gates import Traffic
from .meta_backends.base import MetaBackend
from .placement import First, Limits, Placement, Request, Route, by_content_type, by_suffix
from .proxy import Health, ProxyStorage
from .records import ByteRange, Capabilities, CommonPrefix, MetaRecord, ObjectInfo, Place, Revision, UploadForm
from .replicate import Replicate
from .timeouts import Timeouts

__all__ = [
    "AccessDenied",
    "AlreadyExists",
    "AsyncFile",
    "AsyncWriter",
    "Attempt",
    "Backend",
    "BackendUnavailable",
    "Breaker",
    "ByteRange",
    "Capabilities",
    "CommonPrefix",
    "ConfigurationError",
    "Conflict",
    "ContentError",
    "DeadlineExceeded",
    "DirectUpload",
    "Fallback",
    "First",
    "Health",
    "IntegrityError",
    "InvalidPath",
    "Limits",
    "MetaBackend",
    "MetaRecord",
    "MissingDependency",
    "NotFound",
    "NotSupported",
    "ObjectInfo",
    "Original",
    "OutOfSpace",
    "Place",
    "Placement",
    "ProxyStorage",
    "Reader",
    "Replicate",
    "Request",
    "Revision",
    "Route",
    "Source",
    "StorageError",
    "Timeouts",
    "Traffic",
    "UploadForm",
    "by_content_type",
    "by_suffix",
]
