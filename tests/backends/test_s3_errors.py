"""What S3 answers, and fails to answer, becomes the right error without a secret; what is safe is tried again."""

import asyncio
import base64
import contextlib
import errno
import itertools
import pickle
import socket
import zlib
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from typing import Any

import aiohttp
import pytest
from aiobotocore.credentials import AioCredentials, AioRefreshableCredentials
from aiobotocore.session import AioSession
from botocore.exceptions import EndpointConnectionError

from aproxy_storage import Fallback, ProxyStorage
from aproxy_storage.backends import _s3_client
from aproxy_storage.backends.memory import MemoryBackend
from aproxy_storage.backends.s3 import S3Backend
from aproxy_storage.errors import (
    AccessDenied,
    AlreadyExists,
    BackendUnavailable,
    ConfigurationError,
    Conflict,
    DeadlineExceeded,
    IntegrityError,
    InvalidPath,
    NotFound,
    NotSupported,
    OutOfSpace,
    StorageError,
)
from aproxy_storage.meta_backends.memory import MemoryMetaBackend
from aproxy_storage.records import ByteRange
from aproxy_storage.timeouts import Timeouts
from tests.backends.fake_s3 import Answer, Asked, FakeS3, error
from tests.backends.test_s3 import backend_of
from tests.services.s3 import S3Server

pytestmark = pytest.mark.asyncio


@pytest.fixture(autouse=True)
def _impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_s3_client, "_PATIENCE", 0.001)
    monkeypatch.setattr(_s3_client, "_LONG_PATIENCE", 0.001)


async def read(backend: S3Backend, key: str, **options: Any) -> bytes:
    async with backend.read(key, **options) as reader:
        return b"".join([chunk async for chunk in reader])


async def every_verb(backend: S3Backend) -> dict[str, StorageError]:
    """Return what each verb raises."""

    async def listing() -> None:
        async for _ in backend.list():
            pass

    async def deleting() -> None:
        if (error := (await backend.delete_many(["key"]))["key"]) is not None:
            raise error  # of this one, where the service removes only one by one

    verbs: dict[str, Callable[[], Any]] = {
        "write": lambda: backend.write("key", b"content"),
        "read": lambda: read(backend, "key"),
        "stat": lambda: backend.stat("key"),
        "discard": lambda: backend.discard("key"),
        "copy": lambda: backend.copy("key", "other"),
        "list": listing,
        "delete_many": deleting,
    }
    raised = {}
    for name, call in verbs.items():
        with pytest.raises(StorageError) as caught:
            await call()
        raised[name] = caught.value
        assert caught.value.operation == name
        assert caught.value.__cause__ is not None
        assert str(pickle.loads(pickle.dumps(caught.value))) == str(caught.value)
    return raised


def assert_no_secret(raised: StorageError) -> None:
    for secret in ("sEcReTkEy", "tOkEn", "a secret", "X-Amz-", "AKFAKE"):
        assert secret not in str(raised)


# -- what the service says


@pytest.mark.parametrize(
    ("answer", "expected", "hint"),
    [
        (error(403, "ExpiredToken"), AccessDenied, "have expired"),
        (error(400, "ExpiredToken"), AccessDenied, "have expired"),
        (error(403, "RequestTimeTooSkewed"), AccessDenied, "clock"),
        (error(403, "InvalidAccessKeyId"), AccessDenied, "access_key"),
        (error(403, "SignatureDoesNotMatch"), AccessDenied, "secret key"),
        (error(403, "AccessDenied"), AccessDenied, "right"),
        (error(400, "AuthorizationHeaderMalformed", Region="eu-west-3"), ConfigurationError, "'eu-west-3'"),
        (error(301, "PermanentRedirect", Endpoint="bucket.s3.eu-west-3.amazonaws.com"), ConfigurationError, "region="),
        (Answer(301, {}, b"<html>Moved Permanently</html>"), ConfigurationError, "https:?"),
        (Answer(302, {}, b"<html>Found</html>"), ConfigurationError, "https:?"),
        (error(404, "NoSuchBucket"), ConfigurationError, "bucket="),
        (error(500, "InternalError"), BackendUnavailable, "InternalError"),
        (error(503, "SlowDown"), BackendUnavailable, "slow down"),
        (error(503, "ServiceUnavailable"), BackendUnavailable, "out of order"),
        (Answer(502, {}, b"<html>Bad Gateway</html>"), BackendUnavailable, "out of order"),
        (error(507, "XMinioStorageFull"), OutOfSpace, "no room"),
        (error(501, "NotImplemented"), NotSupported, "conditional_writes="),
        (error(400, "SomethingNew"), BackendUnavailable, "SomethingNew"),
        (error(429, "RateLimitExceeded"), BackendUnavailable, "slow down"),
        (Answer(429, {}, b"<html>Too Many Requests</html>"), BackendUnavailable, "slow down"),
        (error(401, "Unauthorized"), AccessDenied, "signed"),
        (Answer(401, {}, b"<html>Unauthorized</html>"), AccessDenied, "signed"),
        (error(400, "XMinioParentIsObject"), InvalidPath, "in the place of a directory"),
        (error(409, "XMinioObjectExistsAsDirectory"), InvalidPath, "in the place of a directory"),
        (error(403, "ObjectNotInActiveTierError"), BackendUnavailable, "archived"),
        (Answer(413, {}, b"<html>Request Entity Too Large</html>"), OutOfSpace, "too large"),
    ],
    ids=lambda value: getattr(value, "status", "") if isinstance(value, Answer) else "",
)
async def test_answers_become_errors(answer: Answer, expected: type[StorageError], hint: str) -> None:
    async with FakeS3(lambda asked: answer).backend() as backend:
        for verb, raised in (await every_verb(backend)).items():
            assert_no_secret(raised)
            if verb in ("stat", "copy") and answer.status != 400:  # a HEAD is answered by the status alone
                assert isinstance(raised, StorageError)
                continue
            assert type(raised) is expected, verb
            assert hint in str(raised), verb
            assert "key" in str(raised) or verb in ("list", "delete_many")


async def test_of_a_refused_head_the_reason_is_asked_for() -> None:
    def service(reason: Answer) -> FakeS3:
        return FakeS3(lambda asked: Answer(400) if asked.method == "HEAD" else reason)

    for reason, expected, hint in (
        (error(400, "ExpiredToken"), AccessDenied, "have expired"),
        (error(400, "InvalidRequest"), BackendUnavailable, "InvalidRequest"),
        (error(404, "NoSuchKey"), BackendUnavailable, "expired"),
        (error(416, "InvalidRange"), BackendUnavailable, "expired"),
        (Answer(206, {"Content-Range": "bytes 0-0/5"}, b"x"), BackendUnavailable, "expired"),
    ):
        server = service(reason)
        async with server.backend(pool_size=1) as backend:
            for _ in range(2):  # it gives its connection back
                with pytest.raises(expected, match=hint) as caught:
                    await backend.stat("key")
            assert caught.value.operation == "stat"
        # botocore asks for the bucket too, of which the answer may name the region.
        asked = [(each.method, each.headers.get("range")) for each in server.asked if each.path == "/bucket/key"]
        assert asked == [("HEAD", None), ("GET", "bytes=0-0")] * 2


async def test_a_server_that_sends_everybody_elsewhere_is_not_asked_for_ever() -> None:
    server = FakeS3(lambda asked: Answer(301))
    async with server.backend() as backend:
        for raised in (await every_verb(backend)).values():
            assert type(raised) is ConfigurationError
            assert "endpoint_url=" in str(raised)
    assert len(server.asked) < 25


async def test_head_is_understood_by_its_status() -> None:
    for status, expected, hint, retryable in (
        (400, BackendUnavailable, "expired", False),  # AWS gives no reason here
        (401, AccessDenied, "signed", False),
        (403, AccessDenied, "right", False),
        (429, BackendUnavailable, "slow down", True),
        (500, BackendUnavailable, "out of order", True),
        (503, BackendUnavailable, "out of order", True),
    ):
        async with FakeS3(lambda asked, status=status: Answer(status)).backend() as backend:  # type: ignore[misc]
            with pytest.raises(expected, match=hint) as caught:
                await backend.stat("key")
            assert caught.value.retryable == retryable


@pytest.mark.parametrize("body", [b"default backend - 404", b"<html><body>Not Found</body></html>"])
async def test_what_a_balancer_does_not_find_is_not_gone(body: bytes) -> None:
    """It answers for a service that is out of reach for a moment. What then counted as gone would be made anew, or
    forgotten while it is there."""
    there = Answer(200, {"ETag": '"1"', "Content-Length": "1", "x-amz-meta-aproxy-token": "ours00000000"})
    answers = [there]
    fake = FakeS3(lambda asked: answers[-1])
    async with fake.backend(conditional_writes=False) as backend:
        assert await backend.is_taken("key")
        answers.append(Answer(404, {"Content-Type": "text/html"}, body, foreign=True))
        backend._may_list_uploads = False
        verbs = await every_verb(backend)
        for name, call in (
            ("is_taken", backend.is_taken("key")), ("discard(token)", backend.discard("key", token="ours00000000")),
        ):  # fmt: skip
            with pytest.raises(StorageError) as caught:
                await call
            verbs[name] = caught.value
        for verb, raised in verbs.items():
            assert type(raised) is BackendUnavailable, (verb, raised)
            assert raised.retryable
            assert "balancer" in str(raised)


@pytest.mark.parametrize("bucket", [200, 403])
async def test_services_that_do_not_number_their_answers_are_asked_for_the_bucket(bucket: int) -> None:
    def answer(asked: Asked) -> Answer:
        return Answer(bucket if asked.path == "/bucket" else 404, foreign=True)

    fake = FakeS3(answer)
    async with fake.backend() as backend:
        for _ in range(2):
            assert not await backend.is_taken("key")
    assert [asked.path for asked in fake.asked] == ["/bucket/key", "/bucket"] * 2


async def test_transient_errors_are_tried_again() -> None:
    internal = error(500, "InternalError")
    for answers in ([error(503, "SlowDown")], [Answer(429)], [internal, Answer(cut=-1)], [Answer(cut=-1)] * 3):
        script = iter([*answers, Answer(200, {"ETag": '"1"', "Content-Length": "0"})])
        fake = FakeS3(lambda asked, script=script: next(script))  # type: ignore[misc]
        async with fake.backend() as backend:
            assert (await backend.stat("key")).etag == '"1"'
        assert len(fake.asked) >= len(answers) + 1


async def test_what_is_not_transient_is_asked_once() -> None:
    fake = FakeS3(lambda asked: error(403, "AccessDenied"))
    async with fake.backend() as backend:
        with pytest.raises(AccessDenied):
            await backend.write("key", b"x")
    assert len(fake.asked) == 1


@pytest.mark.parametrize("answer", [error(503, "SlowDown"), error(429, "RateLimitExceeded"), Answer(429)])
async def test_tries_end(answer: Answer) -> None:
    fake = FakeS3(lambda asked: answer)
    async with fake.backend() as backend:
        with pytest.raises(BackendUnavailable) as caught:
            await backend.write("key", b"x")
        assert not caught.value.outcome_unknown, "it was never carried out"
    assert len(fake.asked) == 4


# -- answers that are lost


class OneObject:
    """A service with one key, whose answers to what makes an object are lost at first."""

    def __init__(self, losses: int = 1, *, foreign: bool = False) -> None:
        self.losses = losses
        self.token: str | None = "somebodyElse" if foreign else None
        self.uploads = 0

    def __call__(self, asked: Asked) -> Answer:
        if asked.method == "HEAD":
            if self.token is None:
                return Answer(404)
            return Answer(200, {"ETag": '"1"', "x-amz-meta-aproxy-token": self.token})
        if asked.method == "PUT" and "partNumber" in asked.query:
            return Answer(200, {"ETag": '"part"'})
        if asked.method == "POST" and asked.query.startswith("uploads"):
            self.uploads += 1
            self.next_token = asked.headers["x-amz-meta-aproxy-token"]
            return Answer(200, {}, b"<R><UploadId>1</UploadId></R>")
        if asked.method == "DELETE":
            return Answer(204)
        if asked.method == "GET":
            return Answer(200, {}, b"<ListMultipartUploadsResult></ListMultipartUploadsResult>")
        assert asked.headers.get("if-none-match") == "*", f"{asked} would overwrite"
        if self.token is not None:
            if asked.method == "POST":
                return error(404, "NoSuchUpload")
            return error(412, "PreconditionFailed")
        self.token = asked.headers.get("x-amz-meta-aproxy-token") or self.next_token
        self.losses -= 1
        if self.losses >= 0:
            return Answer(cut=-1)
        return Answer(200, {"ETag": '"1"'}, b"<R><ETag>1</ETag></R>")


@pytest.mark.parametrize("content", ["one piece", "parts"])
async def test_taken_by_our_own_first_try_is_success(content: str) -> None:
    service = OneObject()
    async with FakeS3(service).backend(multipart_bytes=1 << 16) as backend:
        info = await backend.write("key", b"x" * (10 if content == "one piece" else 1 << 20), token="ours00000000")
        assert info.token == service.token == "ours00000000"
    assert service.losses < 0 or service.token == "ours00000000"


@pytest.mark.parametrize("size", [10, 1 << 20])
async def test_taken_by_somebody_else_is_not(size: int) -> None:
    service = OneObject(0, foreign=True)
    async with FakeS3(service).backend(multipart_bytes=1 << 16) as backend:
        with pytest.raises(AlreadyExists) as caught:
            await backend.write("key", b"x" * size, token="ours00000000")
        assert not caught.value.outcome_unknown
    assert service.uploads == 0, "everything was sent for nothing"


ENDED = pytest.mark.parametrize("cut", [pytest.param(-1, id="closed"), pytest.param(-2, id="reset")])


@ENDED
async def test_upload_whose_beginning_was_lost_is_not_begun_again(cut: int) -> None:
    """It would leave an upload that nobody knows of."""
    begun = 0

    def answer(asked: Asked) -> Answer:
        nonlocal begun
        if asked.method == "POST":
            begun += 1
            return Answer(cut=cut)
        return Answer(404)

    async with FakeS3(answer).backend(multipart_bytes=1 << 16) as backend:
        with pytest.raises(BackendUnavailable):
            await backend.write("key", b"x" * (1 << 20))
    assert begun == 1


@pytest.mark.parametrize("answer", [error(500, "InternalError"), error(503, "SlowDown"), Answer(502), Answer(429)])
async def test_upload_whose_beginning_was_refused_is_begun_again(answer: Answer) -> None:
    """At worst an upload without a part is left, and a large file is saved."""
    service, refused = OneObject(0), [answer]

    def once(asked: Asked) -> Answer:
        return refused.pop() if refused and asked.query.startswith("uploads") else service(asked)

    async with FakeS3(once).backend(multipart_bytes=1 << 16) as backend:
        await backend.write("key", b"x" * (1 << 20), token="ours00000000")
    assert not refused
    assert (service.token, service.uploads) == ("ours00000000", 1)


@ENDED
async def test_lost_answers_leave_the_outcome_unknown(cut: int) -> None:
    async with FakeS3(lambda asked: Answer(cut=cut)).backend() as backend:
        with pytest.raises(BackendUnavailable) as caught:
            await backend.write("key", b"x")
        assert caught.value.outcome_unknown
        assert caught.value.retryable


async def test_what_was_lost_once_stays_unknown_when_the_server_is_gone() -> None:
    """Whether the first try was carried out is not told by a second one that met nobody."""
    reset = aiohttp.ClientOSError(errno.ECONNRESET, "reset by peer")
    refused = aiohttp.ClientConnectorError(None, ConnectionRefusedError())  # type: ignore[arg-type]

    class Client:
        errors = (EndpointConnectionError(endpoint_url="", error=error) for error in (reset, *[refused] * 3))

        async def put_object(self, **params: Any) -> None:
            raise next(self.errors)

    async with S3Backend("bucket", client=Client()) as backend:
        with pytest.raises(BackendUnavailable, match="cannot be reached") as caught:
            await backend.write("key", b"x")
        assert caught.value.outcome_unknown


@ENDED
async def test_lost_answers_fall_back(cut: int) -> None:
    async with FakeS3(lambda asked: Answer(cut=cut)).backend() as backend:
        originals = {"s3": backend, "memory": MemoryBackend()}
        async with ProxyStorage("m", originals=originals, meta=MemoryMetaBackend(), placement=Fallback()) as storage:
            path = await storage.save("key", b"x")
            assert await originals["memory"].stat(path)


async def test_proxy_that_reaches_nobody_has_sent_nothing() -> None:
    """Its answer to CONNECT comes before anything of the request has left."""
    proxy = await asyncio.start_server(_bad_gateway, "127.0.0.1", 0)
    async with proxy, S3Backend(
        "bucket", endpoint_url="https://s3.example.org", access_key="a", secret_key="b", region="x", verify=False,
        proxies={"https": f"http://127.0.0.1:{proxy.sockets[0].getsockname()[1]}"},
    ) as backend:  # fmt: skip
        with pytest.raises(BackendUnavailable, match="cannot be reached") as caught:
            await backend.write("key", b"x")
        assert caught.value.retryable
        assert not caught.value.outcome_unknown


async def _bad_gateway(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    await reader.readuntil(b"\r\n\r\n")
    writer.write(b"HTTP/1.1 502 Bad Gateway\r\nContent-Length: 0\r\n\r\n")
    await writer.drain()
    writer.close()
    with contextlib.suppress(ConnectionError):
        await writer.wait_closed()


async def test_no_server_leaves_it_known() -> None:
    with contextlib.closing(socket.socket()) as taken:
        taken.bind(("127.0.0.1", 0))  # and nobody listens
        endpoint = f"http://127.0.0.1:{taken.getsockname()[1]}"
        async with S3Backend("bucket", endpoint_url=endpoint, access_key="a", secret_key="b") as backend:
            for raised in (await every_verb(backend)).values():
                assert type(raised) is BackendUnavailable
                assert not raised.outcome_unknown
                assert "cannot be reached" in str(raised)


async def test_conflicting_requests_are_told_apart() -> None:
    """409 says that another write is under way; only a look tells whether it has won."""

    def answer(asked: Asked) -> Answer:
        return Answer(404) if asked.method == "HEAD" else error(409, "ConditionalRequestConflict")

    async with FakeS3(answer).backend() as backend:
        with pytest.raises(Conflict):
            await backend.write("key", b"x")


@pytest.mark.parametrize("conditional", [True, False])
async def test_copy_of_what_was_replaced_meanwhile_is_a_conflict(conditional: bool) -> None:
    def answer(asked: Asked) -> Answer:
        if asked.method == "HEAD":
            return Answer(404) if asked.path.endswith("new") else Answer(200, {"ETag": '"1"', "Content-Length": "9"})
        if asked.method == "POST":
            return Answer(200, {}, b"<R><UploadId>1</UploadId></R>")
        if asked.method == "DELETE":
            return Answer(204)
        assert asked.headers["x-amz-copy-source-if-match"] == '"1"'
        return error(412, "PreconditionFailed")

    async with FakeS3(answer).backend(conditional_copies=conditional) as backend:
        with pytest.raises(Conflict, match="replaced"):
            await backend.copy("old", "new")


async def test_service_without_conditional_deletes_is_asked_again() -> None:
    deleted = []

    def answer(asked: Asked) -> Answer:
        if asked.method == "HEAD":
            return Answer(200, {"ETag": '"1"', "x-amz-meta-aproxy-token": "ours00000000"})
        if asked.method == "GET":
            return Answer(200, {}, b"<ListMultipartUploadsResult></ListMultipartUploadsResult>")
        if "if-match" in asked.headers:
            return error(501, "NotImplemented")
        deleted.append(asked.path)
        return Answer(204)

    async with FakeS3(answer).backend() as backend:
        await backend.discard("key", token="theirs000000")
        assert not deleted
        await backend.discard("key", token="ours00000000")
    assert deleted == ["/bucket/key"]


# -- reading


CONTENT = bytes(range(256)) * 4096  # 1 MiB


def ranged(asked: Asked, content: bytes = CONTENT, etag: str = '"1"', **how: Any) -> Answer:
    """Answer a GET as S3 does."""
    headers = {"ETag": etag}
    if asked.headers.get("if-match", etag) != etag:
        return error(412, "PreconditionFailed")
    if "range" not in asked.headers:
        return Answer(200, headers, content, **how)
    first, _, last = asked.headers["range"].removeprefix("bytes=").partition("-")
    start, stop = int(first), min(int(last or len(content)) + 1, len(content))
    headers["Content-Range"] = f"bytes {start}-{stop - 1}/{len(content)}"
    return Answer(206, headers, content[start:stop], **how)


@pytest.mark.parametrize("parallel", [1, 3])
async def test_broken_connections_are_taken_up_again(parallel: int) -> None:
    broken = itertools.count()
    fake = FakeS3(lambda asked: ranged(asked, cut=150_000 if next(broken) % 2 == 0 else None))
    async with fake.backend(parallel_reads=parallel) as backend:
        backend._range_bytes = 400_000
        assert await read(backend, "key", chunk_bytes=1 << 16) == CONTENT
        assert await read(backend, "key", chunk_bytes=1 << 21) == CONTENT
        part = ByteRange(1000, 900_000)
        assert await read(backend, "key", byte_range=part, chunk_bytes=1 << 16) == CONTENT[1000:900_000]
    resumed = [asked for asked in fake.asked if "if-match" in asked.headers]
    assert resumed
    assert all(asked.headers["if-match"] == '"1"' for asked in resumed)


async def test_what_has_come_of_a_range_is_handed_on() -> None:
    """Ranges that share a slow line take long to be whole, and the reader is given up when nothing comes."""
    more = asyncio.Event()
    fake = FakeS3(lambda asked: ranged(asked, hold=None if asked.headers["range"].startswith("bytes=0-") else more))
    async with fake.backend(parallel_reads=3) as backend, asyncio.timeout(30):
        backend._range_bytes = 400_000
        got = b""
        async with backend.read("key", chunk_bytes=1 << 16) as reader:
            try:
                while len(got) < 600_000:
                    got += await anext(reader)
            finally:
                more.set()
            async for chunk in reader:
                got += chunk
    assert got == CONTENT


async def test_a_parallel_read_that_closing_cuts_short_is_not_cancelled() -> None:
    more = asyncio.Event()
    fake = FakeS3(lambda asked: ranged(asked, hold=None if asked.headers["range"].startswith("bytes=0-") else more))
    async with fake.backend(parallel_reads=3, timeouts=Timeouts(cleanup=0.2)) as backend, asyncio.timeout(30):
        backend._range_bytes = 400_000
        async with backend.read("key", chunk_bytes=1 << 16) as reader:
            await anext(reader)
            await backend.aclose()
            more.set()
            with pytest.raises(BackendUnavailable, match="closed"):
                async for _ in reader:
                    pass


@pytest.mark.parametrize("parallel", [1, 3])
async def test_two_versions_are_never_spliced(parallel: int) -> None:
    versions = itertools.count()

    def answer(asked: Asked) -> Answer:
        version = next(versions)
        return ranged(asked, bytes([version]) * len(CONTENT), f'"{version}"', cut=150_000)

    async with FakeS3(answer).backend(parallel_reads=parallel) as backend:
        backend._range_bytes = 400_000
        got = b""
        with pytest.raises(Conflict, match="replaced"):
            async with backend.read("key", chunk_bytes=1 << 16) as reader:
                async for chunk in reader:
                    got += chunk
        assert got == bytes(len(got)), "a mixture"


async def test_service_that_ignores_if_match_is_found_out() -> None:
    versions = itertools.count()

    def answer(asked: Asked) -> Answer:
        asked.headers.pop("if-match", None)
        return ranged(asked, CONTENT, f'"{next(versions)}"', cut=150_000)

    async with FakeS3(answer).backend() as backend:
        with pytest.raises(Conflict):
            await read(backend, "key", chunk_bytes=1 << 16)


async def test_object_that_vanishes_amid_a_read_is_a_conflict() -> None:
    async with FakeS3(
        lambda asked: ranged(asked, cut=150_000) if "range" not in asked.headers else error(404, "NoSuchKey")
    ).backend() as backend:
        with pytest.raises(Conflict, match="removed"):
            await read(backend, "key", chunk_bytes=1 << 16)


async def test_read_without_progress_ends() -> None:
    cut = iter([1000])
    async with FakeS3(lambda asked: ranged(asked, cut=next(cut, 0))).backend() as backend:
        with pytest.raises(BackendUnavailable, match="5 times in a row at byte 1000"):
            await read(backend, "key", chunk_bytes=1 << 16)


async def test_service_that_ignores_ranges_is_found_out() -> None:
    async with FakeS3(lambda asked: Answer(200, {"ETag": '"1"'}, CONTENT)).backend() as backend:
        with pytest.raises(BackendUnavailable, match="ignored the range"):
            await read(backend, "key", byte_range=ByteRange(10, 20))


def sum_of(content: bytes) -> dict[str, str]:
    """Return the header that tells the checksum of an object, whatever part of it is answered."""
    return {"x-amz-checksum-crc32": base64.b64encode(zlib.crc32(content).to_bytes(4, "big")).decode()}


def summed(asked: Asked, checked: bytes = CONTENT, **how: Any) -> Answer:
    answer = ranged(asked, **how)
    answer.headers |= sum_of(checked)
    return answer


@pytest.mark.parametrize("chunk_bytes", [1 << 16, 1 << 20, 1 << 21])
async def test_damaged_bytes_are_found_out(chunk_bytes: int) -> None:
    got = b""
    async with FakeS3(lambda asked: summed(asked, b"other")).backend(checksums="when_supported") as backend:
        with pytest.raises(IntegrityError, match="checksum"):
            async with backend.read("key", chunk_bytes=chunk_bytes) as reader:
                async for chunk in reader:
                    got += chunk
        assert len(got) < len(CONTENT), "all of it was handed out before it was checked"
        assert backend._connections.get()._slots._value == 64


async def test_sound_bytes_are_not_found_fault_with() -> None:
    """What is answered with the checksum of the whole need not be the whole."""
    broken = itertools.count()
    fake = FakeS3(lambda asked: summed(asked, cut=150_000 if next(broken) == 1 else None))
    async with fake.backend(checksums="when_supported") as backend:
        assert await read(backend, "key", chunk_bytes=1 << 16) == CONTENT
        assert await read(backend, "key", chunk_bytes=1 << 16) == CONTENT, "it was taken up again"
        assert await read(backend, "key", byte_range=ByteRange(10, 20)) == CONTENT[10:20]
    assert next(broken) == 4


# -- a real service


async def test_wrong_credentials(s3_server: S3Server) -> None:
    service = s3_server.service.fresh()
    for wrong, hint in (
        ({"access_key": "AKNOBODY"}, "no such access key"),
        ({"secret_key": "sEcReTkEy"}, "secret key"),
    ):
        async with backend_of(service, **wrong) as backend:
            for verb, raised in (await every_verb(backend)).items():
                assert type(raised) is AccessDenied, verb
                assert hint in str(raised) or verb in ("stat", "copy")
                assert_no_secret(raised)


async def test_read_only_key(s3_server: S3Server) -> None:
    service = s3_server.read_only.fresh()
    async with backend_of(service) as backend:
        for call in (backend.write("key", b"x"), backend.discard("key")):
            with pytest.raises(AccessDenied):
                await call
        assert isinstance((await backend.delete_many(["key"]))["key"], AccessDenied)
        with pytest.raises(NotFound):
            await backend.stat("key")
        assert [info async for info in backend.list()] == []


async def test_missing_bucket_is_not_a_missing_object(s3_server: S3Server) -> None:
    async with backend_of(s3_server.service.fresh(), bucket="nowhere") as backend:
        for verb, raised in (await every_verb(backend)).items():
            if verb != "copy":
                assert isinstance(raised, ConfigurationError), (verb, raised)
                assert "bucket=" in str(raised)


@pytest.fixture
def no_credentials(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_PROFILE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", "/nowhere")
    monkeypatch.setenv("AWS_CONFIG_FILE", "/nowhere")


@pytest.mark.usefixtures("no_credentials")
@pytest.mark.parametrize("verb", ["stat", "read", "url", "url in public"])
async def test_credentials_that_are_missing_for_a_moment(verb: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """As when the server that gives those of a role does not answer while a client is made."""
    made = 0

    async def opened(self: Any, endpoint_url: str | None) -> Any:
        nonlocal made
        made += 1
        return await opening(self, endpoint_url)

    opening = _s3_client.Connection._open
    monkeypatch.setattr(_s3_client.Connection, "_open", opened)
    options: dict[str, Any] = {"access_key": None, "secret_key": None, "session_token": None}
    if verb == "url in public":
        options["public_endpoint_url"] = "http://files.example.org"

    async def ask(backend: S3Backend) -> None:
        await {"stat": backend.stat, "read": lambda key: read(backend, key)}.get(verb, backend.url)("key")

    async with FakeS3(lambda asked: Answer(200, {"ETag": '"1"'}, b"x")).backend(**options) as backend:
        for _ in range(2):
            with pytest.raises(ConfigurationError, match="has not answered"):
                await ask(backend)
        monkeypatch.setenv("AWS_ACCESS_KEY_ID", "a")
        monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "b")
        with pytest.raises(ConfigurationError):
            await ask(backend)
        assert made == 1, "not with every request"
        connection = backend._connections.get()
        assert connection._look_again_at is not None, "never again"
        connection._look_again_at = 0.0  # the pause is over
        for _ in range(2):
            await ask(backend)
        assert made == 2


async def test_renewed_credentials_are_those_of_one_loop() -> None:
    def session(credentials: Any) -> AioSession:
        made = AioSession()
        made._credentials = credentials
        return made

    async def renew() -> Any:
        raise AssertionError("they are good for long")

    async def look(session: AioSession) -> None:
        options = {"access_key": None, "secret_key": None, "session_token": None, "session": session}
        async with S3Backend("bucket", **{**known, **options}) as backend:
            await backend.stat("key")

    moment = (datetime.now(UTC) + timedelta(hours=9)).isoformat()
    data = {"access_key": "a", "secret_key": "b", "token": "c", "expiry_time": moment}
    renewed = session(AioRefreshableCredentials.create_from_metadata(data, refresh_using=renew, method="x"))
    fake = FakeS3(lambda asked: Answer(200, {"ETag": '"1"', "Content-Length": "0"}))
    async with fake.backend():
        known: dict[str, Any] = {"endpoint_url": f"http://127.0.0.1:{fake.port}", "region": "x"}
        for _ in range(2):
            await asyncio.to_thread(asyncio.run, look(renewed))  # their loops are closed
        for _ in range(2):
            await look(renewed)
        with pytest.raises(ConfigurationError, match="another one"):
            await asyncio.to_thread(asyncio.run, look(renewed))
        fixed = session(AioCredentials("a", "b"))
        await look(fixed)
        await asyncio.to_thread(asyncio.run, look(fixed))


@pytest.mark.usefixtures("no_credentials")
async def test_no_credentials() -> None:
    async with S3Backend("bucket", endpoint_url="http://127.0.0.1:1", region="x") as backend:
        with pytest.raises(ConfigurationError, match="AWS_ACCESS_KEY_ID"):
            await backend.stat("key")
    async with S3Backend("bucket", profile="nobody") as backend:
        with pytest.raises(ConfigurationError, match="profile"):
            await backend.stat("key")


async def test_endpoint_that_is_none() -> None:
    async with S3Backend("bucket", endpoint_url="nonsense", access_key="a", secret_key="b") as backend:
        with pytest.raises(ConfigurationError, match="endpoint"):
            await backend.stat("key")


async def test_silent_server_is_given_up() -> None:
    over = asyncio.Event()

    async def silence(asked: Asked) -> Answer:
        await over.wait()
        return Answer(cut=-1)

    timeouts = Timeouts(operation=0.2, idle=0.2, cleanup=0.2)
    async with FakeS3(silence).backend(timeouts=timeouts) as backend:
        for verb, raised in (await every_verb(backend)).items():
            assert isinstance(raised, DeadlineExceeded), verb
            assert raised.outcome_unknown, verb
        over.set()
