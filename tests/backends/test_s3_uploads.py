"""Uploads in parts: what becomes of the content, of the parts and of the upload when something fails or takes long."""

import asyncio
import contextlib
import tempfile
from collections.abc import AsyncIterator, Callable, Iterator
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from pathlib import Path
from typing import Any, ClassVar

import pytest
from botocore.exceptions import ClientError
from django.core.files.base import File

from aproxy_storage import Fallback, ProxyStorage
from aproxy_storage.backends import _s3_client, _s3_writing
from aproxy_storage.backends.memory import MemoryBackend
from aproxy_storage.backends.s3 import S3Backend
from aproxy_storage.errors import AccessDenied, BackendUnavailable, ContentError, DeadlineExceeded
from aproxy_storage.meta_backends.memory import MemoryMetaBackend
from aproxy_storage.testing._backend_hooks import pattern
from aproxy_storage.timeouts import IdleWatch, Timeouts
from tests.backends.fake_s3 import Answer, Asked, FakeS3
from tests.backends.test_s3 import backend_of
from tests.django_support.setup import configure
from tests.services.s3 import S3Service

configure()

pytestmark = pytest.mark.asyncio


@pytest.fixture(autouse=True)
def _impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_s3_client, "_PATIENCE", 0.001)
    monkeypatch.setattr(_s3_client, "_LONG_PATIENCE", 0.001)


def refusal(code: str, status: int) -> ClientError:
    """Return what botocore raises for an answer with this code."""
    metadata: Any = {"HTTPStatusCode": status, "HTTPHeaders": {"x-amz-request-id": "1"}}
    return ClientError({"Error": {"Code": code}, "ResponseMetadata": metadata}, "HeadObject")


class Client:
    """A client of a bucket without objects. Subclasses say what is different."""

    async def head_object(self, **params: Any) -> dict[str, Any]:
        raise refusal("404", 404)

    async def create_multipart_upload(self, **params: Any) -> dict[str, Any]:
        return {"UploadId": "1"}

    async def upload_part(self, **params: Any) -> dict[str, Any]:
        return {"ETag": f'"{params["PartNumber"]}"'}

    async def complete_multipart_upload(self, **params: Any) -> dict[str, Any]:
        return {"ETag": '"whole"'}

    async def abort_multipart_upload(self, **params: Any) -> dict[str, Any]:
        return {}


# -- a part that fails


@pytest.mark.parametrize("parts", [1, 4])
async def test_a_part_that_fails_leaves_the_content_for_the_next_original(parts: int) -> None:
    """It fails while the next chunk is waited for, or, as the only one in flight, right before that. An asynchronous
    generator that is cancelled there is over."""
    waited_for, given_up = asyncio.Event(), asyncio.Event()

    class Throttled(Client):
        tries = 0

        async def upload_part(self, **params: Any) -> dict[str, Any]:
            if parts > 1:
                await waited_for.wait()
            self.tries += 1
            if self.tries == 4:
                given_up.set()
            raise refusal("SlowDown", 503)

    content = pattern(13 << 20)
    first = (8 << 20) if parts == 1 else (12 << 20)

    async def chunks() -> AsyncIterator[bytes]:
        for start in range(0, first, 1 << 20):
            yield content[start : start + (1 << 20)]
        waited_for.set()
        await given_up.wait()
        for _ in range(100):  # turns of the loop, in which the upload learns of it
            await asyncio.sleep(0)
        yield content[first:]

    client = Throttled()
    memory = MemoryBackend()
    originals = {"s3": S3Backend("bucket", client=client, parts=parts), "memory": memory}
    async with ProxyStorage("m", originals=originals, meta=MemoryMetaBackend(), placement=Fallback()) as storage:
        path = await storage.save("key", chunks())
        async with memory.read(path) as reader:
            assert b"".join([chunk async for chunk in reader]) == content
    assert client.tries == 4, "the second part was sent although the first had failed"


# -- uploads of others


class Shared(Client):
    """A bucket in which a part is refused, and another process's uploads of the key are under way."""

    def __init__(self, **ages: float) -> None:
        self.ages = ages
        self.aborted: list[str] = []

    async def upload_part(self, **params: Any) -> dict[str, Any]:
        raise refusal("InternalError", 500)

    async def list_multipart_uploads(self, *, Prefix: str, **_: Any) -> dict[str, Any]:  # noqa: N803
        now = datetime.now(UTC) - timedelta(days=3)  # by the service's clock
        uploads = [
            {"Key": Prefix, "UploadId": upload_id, "Initiated": now - timedelta(seconds=age)}
            for upload_id, age in self.ages.items()
        ]
        return {"Uploads": uploads, "ResponseMetadata": {"HTTPHeaders": {"date": format_datetime(now)}}}

    async def abort_multipart_upload(self, *, UploadId: str, **_: Any) -> dict[str, Any]:  # noqa: N803
        self.aborted.append(UploadId)
        return {}


async def test_a_broken_write_leaves_the_young_uploads_of_others() -> None:
    """Two processes upload under one name; the one that fails takes back what is its own."""
    client = Shared(young=600, old=1000)
    backend = S3Backend("bucket", client=client, multipart_bytes=1 << 16)
    with pytest.raises(BackendUnavailable):
        await backend.write("key", b"x" * (1 << 20), token="ours00000000")
    assert client.aborted == ["1"]
    await backend.discard("key", token="ours00000000")
    assert client.aborted == ["1", "old"], "one whose beginning was lost is found once nobody else's can be healthy"


async def test_the_uploads_of_a_process_that_died_are_aborted_whatever_their_age() -> None:
    client = Shared(young=600, old=1000)
    await S3Backend("bucket", client=client).discard("key", token="theirs000000")
    assert client.aborted == ["young", "old"]


async def test_an_own_upload_that_could_not_be_aborted_is_aborted_by_discard() -> None:
    class Down(Shared):
        down = True

        async def abort_multipart_upload(self, *, UploadId: str, **_: Any) -> dict[str, Any]:  # noqa: N803
            if self.down:
                raise refusal("InternalError", 500)
            return await super().abort_multipart_upload(UploadId=UploadId)

    client = Down(**{"1": 0, "other": 0})
    backend = S3Backend("bucket", client=client, multipart_bytes=1 << 16)
    for token in ("ours00000000", "another00000"):
        with pytest.raises(BackendUnavailable):
            await backend.write("key", b"x" * (1 << 20), token=token)
    client.down = False
    await backend.discard("key", token="ours00000000")
    assert client.aborted == [], "it was another write's"
    await backend.discard("key", token="another00000")
    assert client.aborted == ["1"]
    assert not backend._uploads


@pytest.mark.parametrize("code", ["InvalidAccessKeyId", "SignatureDoesNotMatch", "ExpiredToken"])
async def test_wrong_credentials_do_not_end_the_search_for_uploads(code: str) -> None:
    """Somebody sets them right, and the process goes on."""

    class Refusing(Shared):
        codes: ClassVar[Iterator[str]] = iter([code])

        async def list_multipart_uploads(self, **params: Any) -> dict[str, Any]:
            for each in self.codes:
                raise refusal(each, 403)
            return await super().list_multipart_uploads(**params)

    client = Refusing(left=60)
    backend = S3Backend("bucket", client=client)
    with pytest.raises(AccessDenied):
        await backend.discard("key", token="theirs000000")
    await backend.discard("key", token="theirs000000")
    assert client.aborted == ["left"]


@pytest.mark.parametrize(("code", "status"), [("AccessDenied", 403), ("NotImplemented", 501), ("Other", 501)])
async def test_who_may_not_list_uploads_can_discard(code: str, status: int) -> None:
    class Refusing(Shared):
        asked = 0

        async def list_multipart_uploads(self, **params: Any) -> dict[str, Any]:
            self.asked += 1
            raise refusal(code, status)

    client = Refusing()
    backend = S3Backend("bucket", client=client)
    await backend.discard("key", token="theirs000000")
    await backend.discard("key", token="theirs000000")
    assert client.asked == 1


# -- a service that takes its time


class Slow:
    """S3 says that it may take minutes to put an object together, and sends blanks meanwhile."""

    blanks = 30

    async def __call__(self, asked: Asked) -> Answer:
        if asked.method == "HEAD":
            is_there = asked.path.endswith("/there")
            return Answer(200, {"ETag": '"1"', "Content-Length": "9"}, b"x" * 9) if is_there else Answer(404)
        if asked.method == "DELETE":
            return Answer(204)
        if asked.method == "POST" and asked.query.startswith("uploads"):
            return Answer(200, {}, b"<R><UploadId>1</UploadId></R>")
        body = b"<R><ETag>1</ETag></R>"
        if asked.method == "POST" or "x-amz-copy-source" in asked.headers:
            return Answer(200, {}, body, blanks=self.blanks)
        return Answer(200, {"ETag": '"1"'})


async def test_a_completion_that_takes_longer_than_idle_is_waited_for() -> None:
    async with FakeS3(Slow()).backend(timeouts=Timeouts(idle=2.0), multipart_bytes=1 << 16) as backend:
        originals = {"s3": backend, "memory": MemoryBackend()}
        placement = Fallback(attempt_timeout=2.0)
        async with ProxyStorage("m", originals=originals, meta=MemoryMetaBackend(), placement=placement) as storage:
            path = await storage.save("key", b"x" * (1 << 20))
            assert (await storage.get(path)).good_places()[0].original == "s3"


@pytest.mark.parametrize("conditional", [True, False])
async def test_a_copy_that_takes_longer_than_idle_is_waited_for(conditional: bool) -> None:
    options: dict[str, Any] = {"timeouts": Timeouts(idle=2.0), "conditional_copies": conditional}
    async with FakeS3(Slow()).backend(**options) as backend:
        async with IdleWatch(2.0):  # of an attempt
            await backend.copy("there", "new")


async def test_a_completion_without_a_sign_of_life_is_given_up() -> None:
    class Silent(Slow):
        over = asyncio.Event()

        async def __call__(self, asked: Asked) -> Answer:
            if asked.method == "POST" and asked.query.startswith("uploadId"):
                await self.over.wait()
            return await super().__call__(asked)

    service = Silent()
    async with FakeS3(service).backend(timeouts=Timeouts(idle=0.5), multipart_bytes=1 << 16) as backend:
        with pytest.raises(DeadlineExceeded) as caught:
            await backend.write("key", b"x" * (1 << 20))
        service.over.set()
        assert caught.value.outcome_unknown


async def test_a_completion_that_never_ends_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_s3_client, "_WORKING_LIMIT", 0.5)
    async with FakeS3(Slow()).backend(multipart_bytes=1 << 16) as backend:
        with pytest.raises(DeadlineExceeded, match=r"0\.5 seconds") as caught:
            await backend.write("key", b"x" * (1 << 20))
        assert caught.value.outcome_unknown


# -- how many parts


def of_path(path: Path, stack: contextlib.ExitStack) -> Any:
    return path


def of_file(path: Path, stack: contextlib.ExitStack) -> Any:
    return stack.enter_context(path.open("rb"))


def of_text(path: Path, stack: contextlib.ExitStack) -> Any:
    return stack.enter_context(path.open())


def of_django(path: Path, stack: contextlib.ExitStack) -> Any:
    return File(stack.enter_context(path.open("rb")))


def of_named(path: Path, stack: contextlib.ExitStack) -> Any:
    file = stack.enter_context(tempfile.NamedTemporaryFile())  # noqa: SIM115
    file.write(path.read_bytes())
    file.flush()
    return file


@pytest.mark.parametrize("kind", [of_path, of_file, of_text, of_django, of_named])
async def test_files_are_cut_into_as_few_parts_as_there_may_be(
    kind: Callable[[Path, contextlib.ExitStack], Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Their size is not declared, but a look at the file tells how large the parts have to be."""
    monkeypatch.setattr(_s3_writing, "MAX_PARTS", 3)
    path = tmp_path / "large"
    path.write_text("x" * 1_000_000)
    backend = S3Backend("bucket", client=Client(), multipart_bytes=1 << 16)
    backend._part_bytes = 1 << 16
    with contextlib.ExitStack() as stack:
        assert (await backend.write("key", kind(path, stack))).size == 1_000_000


async def test_a_file_in_memory_is_not_moved_to_the_disk_to_learn_its_size() -> None:
    backend = S3Backend("bucket", client=Client(), multipart_bytes=1 << 16)
    with tempfile.SpooledTemporaryFile(max_size=1 << 20) as file:
        file.write(b"x" * (1 << 17))
        await backend.write("key", file)
        assert not file._rolled  # type: ignore[attr-defined]


async def test_content_without_a_size_has_too_many_parts_at_some_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_s3_writing, "MAX_PARTS", 3)
    backend = S3Backend("bucket", client=Client(), multipart_bytes=1 << 16)
    backend._part_bytes = 1 << 16
    with pytest.raises(ContentError, match="declare its size"):
        await backend.write("key", (b"x" * 10_000 for _ in range(100)))


# -- checksums of parts


class Checking(Client):
    """S3 refuses to complete an upload that was begun with an algorithm unless it is told the checksum of each part."""

    def __init__(self) -> None:
        self.algorithm = ""
        self.completed: list[dict[str, Any]] = []

    async def head_object(self, **params: Any) -> dict[str, Any]:
        if params["Key"] != "there":
            raise refusal("404", 404)
        return {"ContentLength": 1_000_000, "ETag": '"1"'}

    async def create_multipart_upload(self, **params: Any) -> dict[str, Any]:
        self.algorithm = params.get("ChecksumAlgorithm", "")
        return {"UploadId": "1"}

    async def upload_part(self, **params: Any) -> dict[str, Any]:
        if params.get("ChecksumAlgorithm", "") != self.algorithm:
            raise refusal("InvalidRequest", 400)
        return self._part(params)

    async def upload_part_copy(self, **params: Any) -> dict[str, Any]:
        return {"CopyPartResult": self._part(params)}

    def _part(self, params: dict[str, Any]) -> dict[str, Any]:
        number = params["PartNumber"]
        return {
            "ETag": f'"{number}"',
            f"Checksum{self.algorithm or 'CRC32'}": f"sum {number}",
            "ChecksumCRC64NVME": "?",
        }

    async def complete_multipart_upload(self, **params: Any) -> dict[str, Any]:
        self.completed = params["MultipartUpload"]["Parts"]
        return {"ETag": '"whole"'}


@pytest.mark.parametrize("verb", ["write", "copy"])
@pytest.mark.parametrize("algorithm", ["SHA256", None])
async def test_checksums_that_were_asked_for_are_told_at_the_end(verb: str, algorithm: str | None) -> None:
    client = Checking()
    parameters = {"ChecksumAlgorithm": algorithm} if algorithm else {}
    backend = S3Backend("bucket", client=client, object_parameters=parameters, conditional_copies=False)
    backend._part_bytes = backend._multipart_bytes = backend._copy_part_bytes = 400_000
    if verb == "write":
        await backend.write("key", b"x" * 1_000_000)
    else:
        await backend.copy("there", "key")
    expected = [{"PartNumber": number, "ETag": f'"{number}"'} for number in (1, 2, 3)]
    if algorithm:
        expected = [{**part, "ChecksumSHA256": f"sum {part['PartNumber']}"} for part in expected]
    assert client.completed == expected


async def test_checksums_of_a_real_service(s3_service: S3Service) -> None:
    parameters = {"ChecksumAlgorithm": "SHA256"}
    async with backend_of(s3_service, multipart_bytes=1 << 16, object_parameters=parameters) as backend:
        content = pattern(6 << 20)
        await backend.write("key", content)
        await backend.write("small", b"x")
        async with backend.read("key") as reader:
            assert b"".join([chunk async for chunk in reader]) == content
