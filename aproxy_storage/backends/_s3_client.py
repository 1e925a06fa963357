"""One client per event loop, its connections counted, and requests that are sent again where that is safe."""

from __future__ import annotations

import asyncio
import contextlib
import io
import random
from collections.abc import Callable, Iterator, Mapping
from contextlib import AsyncExitStack
from dataclasses import dataclass, field
from typing import Any

from ..errors import (
    AccessDenied,
    BackendUnavailable,
    ConfigurationError,
    DeadlineExceeded,
    MissingDependency,
    NotFound,
    StorageError,
)
from ..timeouts import Alarm, IdleWatch

try:
    from aiobotocore.config import AioConfig
    from botocore.exceptions import NoCredentialsError
    from botocore.handlers import add_expect_header
except ImportError as error:
    raise MissingDependency.of("aiobotocore", "s3") from error

from ._s3_endpoints import remember_endpoints
from ._s3_errors import (
    code_of,
    has_request_id,
    is_throttled,
    is_transient,
    map_error,
    was_answered_out_of_order,
    was_never_sent,
)
from ._s3_sessions import claim, loader_of, new_session

__all__ = ["Body", "Connection", "ConnectionOptions", "Slot"]

_SMALL = 256 << 10  # bytes; a body up to this size is with the system at once: there is no progress to watch
_RETRIES = 3  # after the first try
_PATIENCE = 0.1  # seconds that the first retry waits for at most; each further one twice as long
_LONG_PATIENCE = 0.5  # seconds, likewise, where the service asks to slow down

# What the service does by itself, for minutes where the object is large. It sends blanks before its answer meanwhile;
# `sock_read` of aiohttp, which is `idle` too, finds out that they cease to come.
_WORKING = {"complete_multipart_upload", "copy_object", "upload_part_copy"}
_WORKING_LIMIT = 900.0  # seconds for one of these requests

_LOOK_AGAIN = 5.0  # seconds from finding no credentials to looking for them once more


@dataclass(frozen=True, kw_only=True)
class ConnectionOptions:
    """How to reach the service: what `S3Backend` was given."""

    session: Any = field(default=None, repr=False)
    client: Any = field(default=None, repr=False)
    endpoint_url: str | None = None
    public_endpoint_url: str | None = None
    region: str | None = None
    access_key: str | None = None
    secret_key: str | None = field(default=None, repr=False)
    session_token: str | None = field(default=None, repr=False)
    profile: str | None = None
    addressing_style: str | None = None
    verify: bool | str | None = None
    proxies: Mapping[str, str] | None = field(default=None, repr=False)
    pool_size: int = 64
    pool_timeout: float | None = 20.0
    connect_timeout: float = 10.0
    idle: float | None = 60.0
    checksums: str | None = None
    sign_payload: bool = False
    config: Any = None
    every_request: Mapping[str, Any] = field(default_factory=dict)

    def parameters(self, operation: str, given: Mapping[str, Any]) -> dict[str, Any]:
        """Return the parameters of a request: those `given`, and those of every request that it has."""
        common = dict(self.every_request)
        if operation == "head_bucket":
            common.pop("RequestPayer", None)
        return {**common, **given}

    @property
    def connections(self) -> int:
        """How many requests may be under way. A further one would wait in the driver, without saying for what."""
        if self.client is not None:
            config = getattr(getattr(self.client, "meta", None), "config", None)
            return min(self.pool_size, getattr(config, "max_pool_connections", self.pool_size))
        return self.pool_size if self.config is None else int(self.client_config().max_pool_connections)

    def client_config(self) -> Any:
        """Return botocore's Config: what we need, what the caller was given, what he says beyond that."""
        checksums = self.checksums or ("when_required" if self.endpoint_url else "when_supported")
        s3: dict[str, Any] = {"payload_signing_enabled": self.sign_payload}
        if self.addressing_style is not None:
            s3["addressing_style"] = self.addressing_style
        config = AioConfig(
            signature_version="s3v4",
            user_agent="aproxy_storage",  # building botocore's own for each request takes a tenth of its time
            max_pool_connections=self.pool_size,
            connect_timeout=self.connect_timeout,
            read_timeout=self.idle,
            request_checksum_calculation=checksums,
            response_checksum_validation=checksums,
            retries={"mode": "standard", "total_max_attempts": 1},  # ours know what is safe
            proxies=dict(self.proxies) if self.proxies else None,
            s3=s3,
        )
        return config if self.config is None else config.merge(self.config)


class Body(io.BytesIO):
    """The body of a request. `on_progress` is called as it is sent."""

    on_progress: Callable[[], None] | None = None
    _sent = False  # all of it may be on its way
    _withdrawn = False

    @property
    def size(self) -> int:
        return len(self.getvalue())

    def getbuffer(self) -> memoryview:
        """Return a view to look at, not to change: BytesIO's own copies the bytes that the body was made of, and
        aiohttp asks for it to learn their number."""
        return memoryview(self.getvalue())

    def read(self, size: int | None = -1, /) -> bytes:
        if self._withdrawn:
            raise ConnectionAbortedError("the content was withdrawn")
        piece = super().read(size)
        if self.on_progress is not None:
            self.on_progress()
        if not self._sent and self.tell() >= self.size:
            self._sent = True
        return piece

    def withdraw(self) -> bool:
        """Let nothing more of it be read; return whether that keeps the request from being whole."""
        self._withdrawn = True
        return not self._sent


class Slot:
    """One of the connections that may be used at a time."""

    __slots__ = ("_slots",)

    def __init__(self, slots: asyncio.Semaphore) -> None:
        self._slots: asyncio.Semaphore | None = slots

    def release(self) -> None:
        """Give it back; idempotent."""
        slots, self._slots = self._slots, None
        if slots is not None:
            slots.release()


class Connection:
    """What one event loop has: a client, made on first use, and the count of its connections."""

    def __init__(self, options: ConnectionOptions) -> None:
        self._options = options
        self._stack = AsyncExitStack()
        self._making = asyncio.Lock()
        self._client: Any = None
        self._signer: Any = None
        self._session: Any = options.session
        self._limit = options.connections
        self._slots = asyncio.Semaphore(self._limit)
        self._closed = False
        self._look_again_at: float | None = None  # for credentials, which the clients that there are have not
        self.bucket_seen = False  # an answer has shown that the bucket exists

    async def client(self) -> Any:
        """Return the client of this loop."""
        if self._client is None or self._look_again_at is not None:
            async with self._making:
                await self._forget_clients_without_credentials()
                if self._client is None:
                    self._refuse_closed()
                    self._client = self._options.client or await self._open(self._options.endpoint_url)
        return self._client

    async def signer(self) -> Any:
        """Return the client that signs URLs, with the endpoint that browsers see. It sends nothing."""
        if self._options.public_endpoint_url is None:
            return await self.client()
        if self._signer is None or self._look_again_at is not None:
            async with self._making:
                await self._forget_clients_without_credentials()
                if self._signer is None:
                    self._signer = await self._open(self._options.public_endpoint_url)
        return self._signer

    async def _open(self, endpoint_url: str | None) -> Any:
        self._refuse_closed()
        options = self._options
        if self._session is None:
            self._session = new_session(options.profile)
        elif self._session is options.session and options.access_key is None:
            await claim(self._session)
        verify = options.verify
        if verify is None and (endpoint_url or "").startswith("http:"):
            verify = False  # nothing to verify, and reading the certificates takes 30 ms
        make = getattr(self._session, "create_client", None) or self._session.client  # aiobotocore's, or aioboto3's
        client = await self._stack.enter_async_context(
            make(
                "s3",
                region_name=options.region,
                endpoint_url=endpoint_url,
                aws_access_key_id=options.access_key,
                aws_secret_access_key=options.secret_key,
                aws_session_token=options.session_token,
                verify=verify,
                config=options.client_config(),
            )
        )
        # Expect: 100-continue costs a round trip for each PUT, to spare the sending of what would be refused.
        client.meta.events.unregister("before-call.s3", add_expect_header)
        client.meta.events.register("before-call.s3.HeadBucket", _do_not_follow)
        remember_endpoints(client, loader_of(self._session))
        if self._closed:  # meanwhile
            await self._stack.aclose()
            self._refuse_closed()
        return client

    @contextlib.contextmanager
    def noting_credentials(self) -> Iterator[None]:
        """Let the credentials be looked for again, after a pause, if a client has found none when it was made: the
        server that gives those of a machine's role may have been away for a moment."""
        try:
            yield
        except NoCredentialsError:
            if self._look_again_at is None and self._options.client is None:
                self._look_again_at = asyncio.get_running_loop().time() + _LOOK_AGAIN
            raise

    async def _forget_clients_without_credentials(self) -> None:
        if self._look_again_at is None or asyncio.get_running_loop().time() < self._look_again_at:
            return
        self._look_again_at = None
        stack, self._stack = self._stack, AsyncExitStack()
        self._client = self._signer = None
        await stack.aclose()

    async def aclose(self) -> None:
        """End what is under way, and let nothing begin: who still has this one would make a client that nobody closes.
        Those who come after have a new connection."""
        self._closed = True
        self._client = self._signer = None
        await self._stack.aclose()

    def _refuse_closed(self, what: str = "make a client") -> None:
        if self._closed:
            raise BackendUnavailable(f"could not {what}: the backend was closed meanwhile")

    # -- requests

    async def call(
        self,
        operation: str,
        what: str,
        *,
        body: Body | None = None,
        on_progress: Callable[[], None] | None = None,
        again: bool = True,
        **params: Any,
    ) -> Any:
        """Send a request and return its parsed answer. It fails when nothing moves for `idle` seconds, or, where the
        service works by itself, when it is not ready in 15 minutes.

        `again`: the request may be sent again when its answer was lost; without it only when there was one.

        Raises:
            StorageError: ``outcome_unknown`` if any of the tries may have been, or may still be, carried out.
        """
        if body is not None:
            params["Body"] = body
        idle = self._options.idle
        # This clock is the request's alone. Those around it, which have other limits, only `on_progress` may start: see
        # `_s3_writing`.
        try:
            async with IdleWatch(_WORKING_LIMIT if operation in _WORKING and idle is not None else idle) as watch:
                if body is not None and body.size > _SMALL:

                    def progress() -> None:
                        watch.go_on()
                        if on_progress is not None:
                            on_progress()

                    body.on_progress = progress
                return await self._tried(operation, what, params, watch, again)
        except StorageError:
            raise
        except TimeoutError as error:
            raise DeadlineExceeded(f"could not {what}: {error}", outcome_unknown=True) from error

    async def _tried(self, operation: str, what: str, params: dict[str, Any], watch: IdleWatch, again: bool) -> Any:
        client = await self._client_for(what)
        params = self._options.parameters(operation, params)
        unsure = False
        for retries_left in reversed(range(_RETRIES + 1)):
            try:
                slot = await self.slot(what)
            except StorageError as error:
                error.outcome_unknown = error.outcome_unknown or unsure
                raise
            try:
                with self.noting_credentials():
                    answer = await getattr(client, operation)(**params)
                self.bucket_seen = True
                return answer
            except Exception as error:
                mapped = map_error(error, what)
                answered = was_answered_out_of_order(error) or not mapped.outcome_unknown
                may_send_again = again or answered or was_never_sent(error)
                if not retries_left or not may_send_again or not is_transient(error):
                    mapped.outcome_unknown = mapped.outcome_unknown or unsure
                    raise mapped from error
                unsure = unsure or mapped.outcome_unknown
                throttled = is_throttled(error)
            finally:
                slot.release()
            await pause(_RETRIES - retries_left, throttled=throttled)
            if "Body" in params:
                params["Body"].seek(0)
            watch.go_on()
        raise AssertionError("unreachable")

    async def head(self, what: str, **at: Any) -> Any:
        """Send HeadObject and return its parsed answer.

        Raises:
            NotFound: there is no such object, or no such bucket. BackendUnavailable: something else than the service
                has said so. StorageError.
        """
        try:
            return await self.call("head_object", what, **at)
        except NotFound as error:
            # There is no body that would show who has answered. A balancer without a server answers 404 to all.
            if not has_request_id(error):
                await self.check_bucket(what, at["Bucket"])
            raise
        except StorageError as error:
            if code_of(error) == "400":
                await self._ask_why(what, at)
            raise

    async def _ask_why(self, what: str, at: Mapping[str, Any]) -> None:
        """Raise what the service says of a GET, of which it has refused the HEAD: expired credentials are answered with
        a mere 400 there, and other regions are."""
        try:
            answer, slot = await self.stream("get_object", what, Range="bytes=0-0", **at)
        except StorageError as error:
            if isinstance(error, NotFound) or code_of(error) in ("400", "416", "InvalidRange"):
                return  # no reason to refuse it
            raise
        answer["Body"].close()
        slot.release()

    async def check_bucket(self, what: str, bucket: str) -> None:
        """Raise ConfigurationError if the bucket does not exist; BackendUnavailable if it did before."""
        try:
            await self.call("head_bucket", what, Bucket=bucket)
        except NotFound as error:
            if self.bucket_seen:
                raise BackendUnavailable(
                    f"could not {what}: neither the object nor the bucket is found now. Look at the balancer or proxy "
                    "in front of the service, or whether somebody has removed the bucket"
                ) from error.__cause__
            raise ConfigurationError(
                f"could not {what}: there is no such bucket at this endpoint. Create it, or look at bucket="
            ) from error.__cause__
        except AccessDenied:
            self.bucket_seen = True  # it is there, if not for us to see

    async def stream(self, operation: str, what: str, **params: Any) -> tuple[Any, Slot]:
        """Send a request whose answer has a body; return the answer, and the connection that the body occupies.

        The caller closes the body, then releases the slot.

        Raises:
            StorageError.
        """
        client = await self._client_for(what)
        params = self._options.parameters(operation, params)
        for retries_left in reversed(range(_RETRIES + 1)):
            slot = await self.slot(what)
            try:
                with self.noting_credentials():
                    answer = await getattr(client, operation)(**params)
                self.bucket_seen = True
                return answer, slot
            except BaseException as error:
                slot.release()
                if not isinstance(error, Exception):
                    raise
                if not retries_left or not is_transient(error):
                    raise map_error(error, what) from error
                throttled = is_throttled(error)
            await pause(_RETRIES - retries_left, throttled=throttled)
        raise AssertionError("unreachable")

    async def slot(self, what: str) -> Slot:
        """Wait for one of the `pool_size` connections.

        Without this aiohttp would let us wait for ever, when as many answers as there are connections are not read.

        Raises:
            BackendUnavailable: none became free within `pool_timeout`, or this was closed; nothing was sent.
        """
        if self._slots.locked():
            try:
                with Alarm(self._options.pool_timeout):
                    await self._slots.acquire()
            except TimeoutError as error:
                raise BackendUnavailable(
                    f"could not {what}: all {self._limit} connections were busy for "
                    f"{self._options.pool_timeout:g} seconds. Are there readers that are neither read nor closed? "
                    "Else enlarge pool_size, or max_pool_connections of config= or client="
                ) from error
        else:
            await self._slots.acquire()
        slot = Slot(self._slots)
        if self._closed:
            slot.release()
            self._refuse_closed(what)
        return slot

    async def _client_for(self, what: str) -> Any:
        if self._client is not None and self._look_again_at is None:
            return self._client
        try:
            return await self.client()
        except StorageError:
            raise
        except Exception as error:
            mapped = map_error(error, what)
            if isinstance(error, ValueError):
                mapped = ConfigurationError(f"could not {what}: {error}")  # "Invalid endpoint: …"
            raise mapped from error


def _do_not_follow(params: dict[str, Any], **_: Any) -> None:
    """Keep botocore from following what HeadBucket is answered. It asks that itself where another answer has sent it
    elsewhere, and of a server that sends everybody elsewhere, as from http: to https:, for ever."""
    params["context"].setdefault("s3_redirect", {})["redirected"] = True


async def pause(number: int, *, throttled: bool = False) -> None:
    """Wait before retry `number` (from 0 on), for a random time, so that those who failed together do not return so."""
    await asyncio.sleep(random.uniform(0, (_LONG_PATIENCE if throttled else _PATIENCE) * 2**number))
