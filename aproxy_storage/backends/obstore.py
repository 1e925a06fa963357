"""Objects in S3, Google Cloud Storage or Azure (a directory, memory) through obstore: Rust's object_store."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator, Callable, Mapping
from dataclasses import replace
from datetime import timedelta
from email.errors import HeaderParseError
from email.header import Header, decode_header, make_header
from types import MappingProxyType
from typing import Any, Self, cast
from urllib.parse import quote

from ..content import Source
from ..errors import AlreadyExists, ConfigurationError, Conflict, InvalidPath, NotFound, NotSupported, StorageError
from ..futures import over, seen
from ..paths import MAX_PATH_BYTES, check_path, new_token, shown
from ..records import ByteRange, ObjectInfo
from ..threads import Workers
from ..timeouts import Alarm, Timeouts
from ..urls import URL, boolean, optional
from ._obstore_body import Body, collect
from ._obstore_errors import NativeError, map_error
from ._obstore_listing import CONTROLS, list_flat, list_one_level, listed, walk
from ._obstore_reading import Download, is_beyond_the_end, range_option
from ._obstore_stores import CLOUD, LOCAL, MEMORY, Made, kind_of, parts_of, place_of, service_of
from ._syncing import sync_file
from .base import Backend, Reader

import obstore  # isort: skip  after ours, which say what to install where it is missing

__all__ = ["ObstoreBackend"]

_QUICK = 8 << 20  # bytes; an upload up to this size is waited for when its caller is cancelled, a larger one cut short
_PATIENCE = 1.0  # seconds for which it is waited for before it is cut short


class ObstoreBackend(Backend):
    """Keeps objects in a store of obstore, or below a prefix of it.

    Args:
        store: a store of obstore (``S3Store``, ``GCSStore``, ``AzureStore``, ``LocalStore``, ``MemoryStore``), used
            as it is configured; or a URL: ``s3://bucket/prefix``, ``gs://bucket/prefix``, ``az://container/prefix``,
            ``file:///directory``, ``memory:///``.
        prefix: begins every key in the store, followed by a slash; keys of this backend are without it.
        base_url: what `url` puts before the quoted key, for what everybody may read (a CDN); None: URLs are signed.
        expires_in: seconds that signed URLs live unless the call says otherwise.
        conditional_writes: the service refuses to overwrite (``If-None-Match: *``). Without it a write looks first,
            and of two simultaneous writers of one key both may believe that they have won.
        flat_listings: the service lists in the byte order of keys. False goes through directories, with a request or
            more for each, as SeaweedFS needs it.
        memory_bytes: content up to this size is in memory while it is written; larger content goes into a temporary
            file first (in ``TMPDIR``).
        min_rate: bytes a second; an upload slower than this, and a grace of ``timeouts.idle``, has no progress.
        max_segment_bytes: what the service allows for one part of a key.
        timeouts: see `Timeouts`.
        config: further settings of a store that is named by a URL, as the constructor of its class in obstore takes
            them: ``endpoint``, ``region``, ``access_key_id``, ``account_name``, ``client_options``, ``retry_config`` …

    A read is one GET. A write is one conditional PUT, whatever its size: a multipart upload of obstore can neither be
    made conditional nor, after a crash, be found and ended, so there is none. What a service takes in one request is
    therefore the largest object: 5 GiB on S3, 5000 MiB on Azure, 5 TiB on Google's; `S3Backend` has no such limit.

    Objects carry the token of their write as metadata, where the store has metadata. `discard` with a token looks
    and then removes; obstore cannot do both at once. Nothing is copied on the server: `ProxyStorage.copy` reads and
    writes.

    Names that obstore has no way to say (with an empty part, ``.`` or ``..``) are not found, and a listing fails at
    one that somebody else has made.

    Requests run in threads of obstore's own, shared by all its users in the process; nothing is bound to an event
    loop. They do not survive a fork: a process whose parent has used obstore gets a ConfigurationError.

    Memory: of a write `memory_bytes` twice at most, of a read about two chunks. A mapped temporary file counts as
    resident too, but can be taken away by the system at any time.
    """

    capabilities = CLOUD

    def __init__(
        self,
        store: Any,
        *,
        prefix: str = "",
        base_url: str | None = None,
        expires_in: float = 3600.0,
        conditional_writes: bool = True,
        flat_listings: bool = True,
        memory_bytes: int = 4 << 20,
        min_rate: int = 256 << 10,
        max_segment_bytes: int | None = None,
        timeouts: Timeouts | None = None,
        **config: Any,
    ) -> None:
        if isinstance(store, os.PathLike):
            raise ConfigurationError("a directory is written as a URL, file:///srv/media; or take FileSystemBackend")
        if memory_bytes < 0 or min_rate < 1:
            raise ConfigurationError("memory_bytes must not be negative, and min_rate positive")
        name = ""
        if isinstance(store, str):
            kind, name, below = parts_of(store)
            prefix = "/".join(part for part in (below, prefix.strip("/")) if part)
            ready = None
            self._place = f"{kind.scheme}://{name}/"
        else:
            if config:
                raise ConfigurationError(
                    f"a ready store is used as it is; {', '.join(sorted(config))} would have no effect"
                )
            kind = kind_of(store)
            ready = store
            self._place = place_of(kind, store)
        self.prefix = f"{check_path(prefix.strip('/'))}/" if prefix.strip("/") else ""
        super().__init__(timeouts=timeouts)
        capabilities = replace(
            kind.capabilities,
            conditional_create=conditional_writes,
            url=kind.capabilities.url or base_url is not None,
            max_key_bytes=MAX_PATH_BYTES - len(self.prefix.encode()),
        )
        if max_segment_bytes is not None:
            capabilities = replace(capabilities, max_segment_bytes=max_segment_bytes)
        self.capabilities = capabilities
        self._kind = kind
        self._base_url = base_url if base_url is None or base_url.endswith("/") else base_url + "/"
        self._expires_in = expires_in
        self._sorts = kind.sorts and flat_listings
        self._memory_bytes = memory_bytes
        self._min_rate = min_rate
        known = config if ready is None else getattr(ready, "config", None) or {}
        self.endpoint = service_of(kind, known)
        self._made = Made(kind, ready, name, config, self.timeouts)
        self._workers = Workers(f"temporary files of {self}", 4, share=1)

    @classmethod
    def from_url(cls, url: str) -> Self:
        """Make one of ``obstore+s3://bucket/prefix?endpoint=…&region=…``, ``gs://bucket/prefix?service_account=…``, or
        ``az://container/prefix?account_name=…``.

        The parameters are arguments of the class, and settings of the store by their names in obstore;
        ``endpoint_url`` is understood too. ``obstore+s3://KEY:SECRET@bucket`` gives credentials, those of the
        environment are better.

        Raises:
            ConfigurationError: the URL cannot be understood.
        """
        parsed = URL.parse(url)
        types: dict[str, Callable[[str], Any]] = {
            "base_url": str,
            "expires_in": float,
            "conditional_writes": boolean,
            "flat_listings": boolean,
            "memory_bytes": int,
            "min_rate": int,
            "max_segment_bytes": optional(int),
        }
        options = parsed.options(timeouts=True, others=True, **types)
        config: dict[str, Any] = {}
        for name, value in parsed.query:
            if name not in types and not name.startswith("timeouts."):
                if name in config:
                    raise ConfigurationError(f"{parsed} gives the parameter {name!r} twice")
                config[name] = value
        if "endpoint_url" in config:
            config["endpoint"] = config.pop("endpoint_url")
        scheme = parsed.scheme.removeprefix("obstore+")
        if parsed.username is not None or parsed.password is not None:
            if scheme != "s3" or parsed.password is None:
                raise ConfigurationError(f"{parsed}: KEY:SECRET@ goes with obstore+s3: only")
            config |= {"access_key_id": parsed.username, "secret_access_key": parsed.password}
        if "://" not in url or not parsed.host:
            raise ConfigurationError(f"{parsed} names no bucket: {parsed.scheme}://bucket/prefix")
        return cls(f"{scheme}://{parsed.host}", prefix=parsed.path, **options, **config)

    def __str__(self) -> str:
        return f"{type(self).__name__}({self._place + self.prefix!r})"

    def full_path(self, key: str) -> str:
        return f"{self._place}{self.prefix}{key}"

    def check_key(self, key: str) -> None:
        super().check_key(key)
        if self._kind is LOCAL and any(_is_draft(part) for part in key.split("/")):
            raise InvalidPath(f"{shown(key)} is not a legal key here: obstore has such names for unfinished files")

    def _path(self, key: str, operation: str) -> str:
        """Return the path in the store of an object that may be there.

        Raises:
            NotFound: there can be no object of that name.
        """
        try:
            self.check_key(key)
        except InvalidPath as error:
            raise NotFound(f"could not {operation} {shown(key)} in {self}: there can be no such object") from error
        return self.prefix + key

    def _map_error(self, error: Exception, what: str) -> StorageError:
        return map_error(error, what) or super()._map_error(error, what)

    # -- writing

    async def _write(
        self,
        key: str,
        source: Source,
        *,
        content_type: str | None,
        metadata: Mapping[str, str],
        token: str | None,
        durable: bool,
    ) -> ObjectInfo:
        # Always a token, so that an object without one cannot be taken for one whose writer is unknown.
        token = token or new_token()
        store = self._made.get()
        try:
            body = await collect(source, self._workers, memory=self._memory_bytes, idle=self.timeouts.idle)
        except asyncio.CancelledError as error:
            error.outcome_unknown = False  # type: ignore[attr-defined]
            raise
        options: dict[str, Any] = {"mode": "create", "use_multipart": False}
        if self._kind.capabilities.metadata:
            options["attributes"] = attributes = {name: _encoded(text) for name, text in metadata.items()}
            attributes[self._kind.token] = token
            if content_type is not None:
                attributes["Content-Type"] = content_type
        if not self.capabilities.conditional_create:
            options["mode"] = "overwrite"
            await self._refuse_taken(store, key)
        if self._kind is MEMORY and not isinstance(body, bytes):
            body = bytes(body)  # it keeps what it is given, and with a mapping the file would be kept open
        size = len(body)
        if size <= _QUICK:
            etag = await self._put(store, key, body, options, token)
        else:
            async with source.watched(None) as watch:
                watch.pause()
                with Alarm(self._limit(size)):
                    etag = await self._put(store, key, body, options, token)
        if durable and self._kind is LOCAL:
            await self._workers.call(
                sync_file, os.path.join(store.prefix, self.prefix + key), timeout=self.timeouts.idle
            )
        kept = self._kind.capabilities.content_type
        return ObjectInfo(
            key,
            size=size,
            etag=etag,
            content_type=content_type if kept else None,
            metadata=MappingProxyType(dict(metadata) if kept else {}),
            token=token if self.capabilities.tokens else None,
        )

    def _limit(self, size: int) -> float | None:
        # Of one request nothing is seen until its end.
        return None if self.timeouts.idle is None else self.timeouts.idle + size / self._min_rate

    async def _refuse_taken(self, store: Any, key: str) -> None:
        try:
            await obstore.head_async(store, self.prefix + key)
        except FileNotFoundError:
            return
        raise AlreadyExists(f"could not write {key!r} in {self}: there is an object already")

    async def _put(self, store: Any, key: str, body: Body, options: dict[str, Any], token: str) -> str | None:
        """Send the one request that makes the object; return its ETag.

        A caller who is cancelled meanwhile waits a little for what becomes of it, and takes it back.
        """
        # A future already, whatever obstore's types say: the request is under way.
        future = cast(asyncio.Future[Any], obstore.put_async(store, self.prefix + key, body, **options))
        try:
            await over(future)
        except asyncio.CancelledError as error:
            future.add_done_callback(seen)
            certain = False

            async def take_back() -> None:
                nonlocal certain
                certain = await self._take_back(future, key, token, quick=len(body) <= _QUICK)

            await self.cleanup.finish(take_back(), within=self.timeouts.cleanup, name=f"undo of a write of {key!r}")
            error.outcome_unknown = not certain  # type: ignore[attr-defined]
            raise
        try:
            etag: str | None = future.result()["e_tag"]
        except Exception as error:
            return await self._settle(store, key, token, error)
        return etag

    async def _settle(self, store: Any, key: str, token: str, error: Exception) -> str | None:
        """Look whose object stands in our way: obstore may have sent the request again after a lost answer."""
        mapped = self._map_error(error, f"write {key!r} in {self}")
        if isinstance(mapped, NotFound):  # of a write: its bucket, or its directory
            raise ConfigurationError(f"could not write {key!r} in {self}: there is no such bucket") from error
        if not isinstance(mapped, AlreadyExists | Conflict):
            raise mapped from error
        try:
            found = await self._look(store, key)
        except NotFound:
            if isinstance(mapped, AlreadyExists):
                raise mapped from error
            raise Conflict(f"could not write {key!r} in {self}: another write was under way") from error
        except StorageError as unseen:
            unseen.outcome_unknown = True
            raise
        if self.capabilities.tokens and found.token == token:
            return found.etag
        raise AlreadyExists(f"could not write {key!r} in {self}: there is an object already") from error

    async def _take_back(self, future: asyncio.Future[Any], key: str, token: str, *, quick: bool) -> bool:
        """Remove what a cancelled write has made; return whether it is certain that nothing comes of it any more."""
        # A request can be cut short, but whether it has arrived is unknown then; a thread that writes a file cannot.
        await asyncio.wait((future,), timeout=self.timeouts.operation if quick or self._kind is LOCAL else _PATIENCE)
        if not future.done():
            future.cancel()
            await over(future)
        answered = not future.cancelled()
        error = future.exception() if answered else None
        if isinstance(error, Exception):
            mapped = self._map_error(error, "write")
            if not mapped.outcome_unknown and not isinstance(mapped, AlreadyExists | Conflict):
                return True
            answered = False
        if self.capabilities.tokens or (answered and error is None):
            await self._discard(key, token=token)
        return answered

    # -- reading

    async def _read(self, key: str, byte_range: ByteRange | None, chunk_bytes: int) -> Reader:
        path = self._path(key, "read")
        store = self._made.get()
        options: Any = None
        if byte_range is not None and byte_range != ByteRange():
            wanted = range_option(byte_range)
            if wanted is None:
                return Reader(await self._look(store, key))
            options = {"range": wanted}
        try:
            answer = await obstore.get_async(store, path, options=options)
        except (NativeError, OSError) as error:
            if options is not None and is_beyond_the_end(error):
                return Reader(await self._look(store, key))
            raise self._unread(error, key, "read") from error
        info = self._info(key, answer)
        start, stop = answer.range
        if stop - start <= chunk_bytes:
            data = bytes(await answer.bytes_async())
            if len(data) == stop - start:
                return Reader(info, data=data)
            answer = await obstore.get_async(store, path, options={"range": (start, stop), "if_match": info.etag})
        return Download(store, path, info, answer, chunk_bytes)

    def _info(self, key: str, answer: Any) -> ObjectInfo:
        attributes = answer.attributes  # a new dict
        token = attributes.pop(self._kind.token, None)
        content_type = attributes.pop("Content-Type", None)
        more: dict[str, Any] = {"token": token, "content_type": content_type}
        if attributes:
            metadata = {name: _decoded(text) for name, text in attributes.items() if name not in _HEADERS}
            more["metadata"] = MappingProxyType(metadata)
        return listed(key, answer.meta, **more)

    async def _stat(self, key: str) -> ObjectInfo:
        self._path(key, "look up")
        return await self._look(self._made.get(), key)

    async def _look(self, store: Any, key: str) -> ObjectInfo:
        try:
            return self._info(key, await obstore.get_async(store, self.prefix + key, options={"head": True}))
        except (NativeError, OSError) as error:
            raise self._unread(error, key, "look up") from error

    def _unread(self, error: Exception, key: str, operation: str) -> StorageError:
        mapped = self._map_error(error, f"{operation} {key!r} in {self}")
        mapped.outcome_unknown = False  # it changes nothing
        if isinstance(mapped, InvalidPath):  # a file in the place of a directory
            return NotFound(f"could not {operation} {key!r} in {self}: there is no such object")
        return mapped

    async def _discard(self, key: str, *, token: str | None) -> None:
        try:
            path = self._path(key, "discard")
        except NotFound:
            return
        store = self._made.get()
        try:
            if token is not None and self.capabilities.tokens and (await self._look(store, key)).token != token:
                return
            await obstore.delete_async(store, path)
        except (NotFound, FileNotFoundError):
            pass
        except NativeError as error:
            mapped = self._map_error(error, f"discard {key!r} in {self}")
            if isinstance(mapped, NotFound | InvalidPath):
                return
            raise mapped from error

    async def _url(self, key: str, *, expires_in: float | None, **options: Any) -> str:
        method = options.pop("method", "GET")
        if options:
            raise NotSupported(f"obstore signs no {', '.join(sorted(options))}; S3Backend does")
        path = self._path(key, "sign")
        if self._base_url is not None and method == "GET":
            if expires_in is not None:
                raise NotSupported("a URL below base_url never expires; leave base_url out, and URLs are signed")
            return self._base_url + quote(path, safe="/~!*()'")
        if not self._kind.capabilities.url:
            raise NotSupported(f"{self} signs no URLs")
        seconds = timedelta(seconds=self._expires_in if expires_in is None else expires_in)
        signed: str = await obstore.sign_async(self._made.get(), method, path, seconds)
        return signed

    # -- listing

    async def _list(self, prefix: str, *, after: str | None, delimiter: str | None) -> AsyncIterator[ObjectInfo]:
        wanted = self.prefix + prefix
        if any(part in ("", ".", "..") for part in wanted.split("/")[:-1]) or CONTROLS.search(wanted):
            return  # obstore has no name for such a directory
        store, seconds, cut = self._made.get(), self.timeouts.operation, len(self.prefix)
        beyond = None if after is None else self.prefix + after
        if delimiter == "/":
            async for path, entry in list_one_level(store, wanted, beyond, seconds):
                yield ObjectInfo(path[cut:], is_prefix=True) if entry is None else listed(path[cut:], entry)
            return
        last = after
        entries = (list_flat if self._sorts else walk)(store, wanted, beyond, seconds)
        async for path, entry in entries:
            key = path[cut:]
            at = key.find(delimiter, len(prefix)) if delimiter else -1
            if at < 0:
                yield listed(key, entry)
            elif (rolled := key[: at + len(delimiter or "")]) != last:
                last = rolled
                yield ObjectInfo(rolled, is_prefix=True)


_HEADERS = {"Cache-Control", "Content-Disposition", "Content-Encoding", "Content-Language", "Storage-Class"}


def _is_draft(part: str) -> bool:
    _, mark, number = part.rpartition("#")
    return bool(mark) and number.isdigit()


def _encoded(text: str) -> str:
    # Values are headers; what is not ASCII goes as in those of mail (RFC 2047), which is how S3 itself answers.
    if text.isascii() and "=?" not in text:  # which would be taken for what is encoded
        return text
    return Header(text, "utf-8", maxlinelen=100_000).encode()


def _decoded(text: str) -> str:
    if "=?" not in text:
        return text
    try:
        return str(make_header(decode_header(text)))
    except (ValueError, LookupError, HeaderParseError):
        return text
