"""Which stores of obstore there are, what each of them can do, and how one is made, in this process."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from datetime import timedelta
from typing import Any

from ..errors import ConfigurationError
from ..records import Capabilities
from ..timeouts import Timeouts
from ..urls import URL
from ._obstore_errors import NativeError

__all__ = [
    "CLOUD",
    "LOCAL",
    "MEMORY",
    "S3",
    "Kind",
    "Made",
    "kind_of",
    "parts_of",
    "place_of",
    "refuse_forked",
    "service_of",
]

#: What the services can do. Nothing is copied on the server: obstore cannot give the copy a token of its own.
CLOUD = Capabilities(
    conditional_create=True,
    range_read=True,
    list=True,
    url=True,
    modified_time=True,
    metadata=True,
    content_type=True,
    tokens=True,
)


@dataclass(frozen=True, slots=True)
class Kind:
    """What is to be known of one class of stores.

    `token` names the metadata that keeps the token of a write: Azure takes identifiers only, the others have the
    name that `S3Backend` uses. `sorts`: its listings come in byte order.
    """

    store: str
    scheme: str
    capabilities: Capabilities = CLOUD
    token: str = "aproxy-token"
    sorts: bool = True


_LOCAL = replace(CLOUD, url=False, metadata=False, content_type=False, tokens=False, max_segment_bytes=250)
S3 = Kind("S3Store", "s3")
GCS = Kind("GCSStore", "gs")
AZURE = Kind("AzureStore", "az", token="aproxy_token")
LOCAL = Kind("LocalStore", "file", _LOCAL, sorts=False)
MEMORY = Kind("MemoryStore", "memory", replace(CLOUD, url=False))
_KINDS = (S3, GCS, AZURE, LOCAL, MEMORY)
_BY_SCHEME = {kind.scheme: kind for kind in _KINDS}

# Where a store finds its address or account: settings, then variables of the environment.
_ADDRESSES: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "s3": (
        ("endpoint", "endpoint_url", "aws_endpoint", "aws_endpoint_url", "aws_endpoint_url_s3"),
        ("AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT", "AWS_ENDPOINT_URL"),
    ),
    "gs": (("base_url", "google_base_url"), ()),
    "az": (
        ("endpoint", "azure_endpoint", "azure_storage_endpoint", "account_name", "azure_storage_account_name"),
        ("AZURE_STORAGE_ACCOUNT_NAME",),
    ),
}


def parts_of(url: str) -> tuple[Kind, str, str]:
    """Return kind, bucket (of Azure the container, of files the directory) and prefix that a URL names.

    Raises:
        ConfigurationError: no store has its scheme, or something is missing or too much.
    """
    parsed = URL.parse(url)
    kind = _BY_SCHEME.get(parsed.scheme)
    if kind is None:
        raise ConfigurationError(f"{parsed}: no store of obstore has this scheme (known: {', '.join(_BY_SCHEME)})")
    if kind is LOCAL:
        return kind, parsed.local_path(), ""
    if parsed.username is not None or parsed.port is not None or parsed.query or "#" in url:
        raise ConfigurationError(f"{parsed}: only a name and a prefix; settings are arguments beside the URL")
    if kind is not MEMORY and not parsed.host:
        raise ConfigurationError(f"{parsed} names no bucket")
    return kind, parsed.host or "", parsed.path.strip("/")


def kind_of(store: Any) -> Kind:
    """Return the kind of a store.

    Raises:
        ConfigurationError: it is none that this library knows.
    """
    names = {cls.__name__ for cls in type(store).__mro__}
    for kind in _KINDS:
        if kind.store in names:
            return kind
    known = ", ".join(kind.store for kind in _KINDS)
    raise ConfigurationError(f"{type(store).__name__} is not a store for this; give a URL, or one of: {known}")


def place_of(kind: Kind, store: Any) -> str:
    """Return where a ready store keeps its objects, as the beginning of a name that a human would use."""
    if kind is LOCAL:
        return f"file://{store.prefix or ''}/"
    if kind is MEMORY:
        return "memory:///"
    name = store.config.get("container_name" if kind is AZURE else "bucket", "")
    return f"{kind.scheme}://{name}/{store.prefix + '/' if store.prefix else ''}"


def service_of(kind: Kind, config: Mapping[str, Any]) -> str | None:
    """Return the address that a store with these settings asks, or the account; None: that of the service's owner."""
    known = {name.lower(): value for name, value in config.items()}
    settings, variables = _ADDRESSES.get(kind.scheme, ((), ()))
    found = [*map(known.get, settings), *map(os.environ.get, variables)]
    return next((address for address in found if address), None)


class Made:
    """The store: the caller's, or one made of settings on first use, again in each process."""

    def __init__(self, kind: Kind, store: Any, name: str, config: Mapping[str, Any], timeouts: Timeouts) -> None:
        self._kind = kind
        self._given = store
        self._name = name
        self._config = dict(config)
        self._timeouts = timeouts
        self._store: Any = None
        self._pid = 0

    def get(self) -> Any:
        """Return the store for this process.

        Raises:
            ConfigurationError: it cannot be made of its settings, or obstore was in use when this process forked.
        """
        pid = os.getpid()
        if self._pid != pid:
            refuse_forked(pid)
            self._store = self._make() if self._given is None else self._given
            self._pid = pid
        return self._store

    def _make(self) -> Any:
        from obstore import store

        cls = getattr(store, self._kind.store)
        options = dict(self._config)
        try:
            if self._kind is LOCAL:
                return cls(self._name, **{"automatic_cleanup": True, "mkdir": True, **options})
            if self._kind is MEMORY:
                return cls(**options)
            # The deadlines are ours: a limit on a whole request would kill a large healthy one.
            client = {"timeout": "7d", "connect_timeout": "10s", **(options.pop("client_options", None) or {})}
            if str(options.get("endpoint", "")).startswith("http://"):
                client.setdefault("allow_http", True)
            within = timedelta(seconds=self._timeouts.operation or 30.0)
            retry = {"max_retries": 3, "retry_timeout": within, **(options.pop("retry_config", None) or {})}
            return cls(self._name, client_options=client, retry_config=retry, **options)
        except (NativeError, ValueError, TypeError, OSError) as error:
            settings = ", ".join(sorted(self._config)) or "no settings"
            raise ConfigurationError(
                f"obstore makes no {self._kind.store} for {self._name!r} with {settings}: {_reason(error)}"
            ) from error


def _reason(error: Exception) -> str:
    """Return the first line of what obstore says of a setting, unless it may hold the value of one."""
    line = str(error).partition("\n")[0]
    return line if line.startswith("Configuration key:") else f"{type(error).__name__}; see the cause"


_used_by: set[int] = set()


def refuse_forked(pid: int) -> None:
    """Note that obstore is used in this process; refuse where that can only hang.

    Its requests run in threads of its own, which begin with the first one and do not survive a fork. A child of a
    process that has used obstore would wait for them for ever.
    """
    if pid in _used_by:
        return
    if _used_by:
        raise ConfigurationError(
            "obstore was in use when this process was forked, and its threads did not survive that. Let the parent use "
            "no ObstoreBackend before it forks (its constructor is fine), or start processes by spawn or forkserver"
        )
    _used_by.add(pid)
