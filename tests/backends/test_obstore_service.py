"""What goes wrong between `ObstoreBackend` and a service, and what is particular to obstore."""

import asyncio
import os
import random
import signal
import subprocess
import sys
import textwrap
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from obstore.store import AzureStore, GCSStore, LocalStore, MemoryStore, S3Store

from aproxy_storage import (
    AccessDenied,
    AlreadyExists,
    BackendUnavailable,
    ByteRange,
    ConfigurationError,
    ContentError,
    DeadlineExceeded,
    InvalidPath,
    NotFound,
    NotSupported,
    ObjectInfo,
    OutOfSpace,
    ProxyStorage,
    StorageError,
    Timeouts,
)
from aproxy_storage.backends import _obstore_body as body_module
from aproxy_storage.backends.obstore import ObstoreBackend
from aproxy_storage.config import original_from_url
from aproxy_storage.meta_backends.memory import MemoryMetaBackend
from aproxy_storage.records import Capabilities
from aproxy_storage.testing._backend_hooks import pattern, pieces
from aproxy_storage.tools.reconcile import reconcile
from tests.backends.test_obstore import backend_of, settings_of
from tests.services.s3 import S3Server, S3Service

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


def test_capabilities_are_these(tmp_path: Path) -> None:
    from dataclasses import replace

    assert ObstoreBackend.capabilities == ObstoreBackend("s3://bucket").capabilities == CLOUD
    assert ObstoreBackend("gs://bucket").capabilities == ObstoreBackend("az://container").capabilities == CLOUD
    assert ObstoreBackend(MemoryStore()).capabilities == replace(CLOUD, url=False)
    local = replace(CLOUD, url=False, metadata=False, content_type=False, tokens=False, max_segment_bytes=250)
    assert ObstoreBackend(LocalStore(tmp_path)).capabilities == local
    limited = ObstoreBackend("s3://bucket/pre", conditional_writes=False, max_segment_bytes=255).capabilities
    assert limited == replace(CLOUD, conditional_create=False, max_key_bytes=1020, max_segment_bytes=255)


# -- a service


often = pytest.mark.parametrize("times", [1, pytest.param(10, marks=pytest.mark.soak)])


@often
@pytest.mark.asyncio
async def test_of_eight_writers_one_wins(s3_service: S3Service, times: int) -> None:
    async def race(number: int) -> None:
        contents = [pattern(1000, seed=8 * number + writer) for writer in range(8)]
        results = await asyncio.gather(
            *(backend.write(f"key{number}", content) for content in contents), return_exceptions=True
        )
        won = [content for content, result in zip(contents, results, strict=True) if isinstance(result, ObjectInfo)]
        assert len(won) == 1, results
        assert sum(isinstance(result, AlreadyExists) for result in results) == 7, results
        async with backend.read(f"key{number}") as reader:
            assert b"".join([chunk async for chunk in reader]) == won[0]

    async with backend_of(s3_service) as backend:
        await asyncio.gather(*(race(number) for number in range(5 * times)))


@pytest.mark.asyncio
async def test_without_conditional_writes_it_looks_first(s3_service: S3Service) -> None:
    async with backend_of(s3_service, conditional_writes=False) as backend:
        await backend.write("key", b"first")
        with pytest.raises(AlreadyExists):
            await backend.write("key", b"second")
        async with backend.read("key") as reader:
            assert b"".join([chunk async for chunk in reader]) == b"first"


@often
@pytest.mark.asyncio
async def test_uploads_cancelled_at_random_leave_nothing(s3_service: S3Service, times: int) -> None:
    dice = random.Random(1)
    data = pattern(9 << 20)
    backend = backend_of(s3_service, memory_bytes=1 << 20)

    async def one(number: int) -> None:
        content = pieces(data) if number % 20 == 0 else pattern(20_000, seed=number)
        task = asyncio.ensure_future(backend.write(f"key{number}", content, token=f"token{number:07}"))
        await asyncio.sleep(dice.random() * (0.2 if number % 20 == 0 else 0.02))
        task.cancel()
        try:
            await task
        except asyncio.CancelledError:
            await backend.discard(f"key{number}", token=f"token{number:07}")
        else:
            await backend.discard(f"key{number}")

    for start in range(0, 20 * times, 20):
        await asyncio.gather(*(one(number) for number in range(start, start + 20)))
    await backend.aclose()
    await asyncio.sleep(0.2)
    client = s3_service.client()
    assert s3_service.everything(client) == []
    client.close()
    left = [task for task in asyncio.all_tasks() if task is not asyncio.current_task()]
    assert not left, "a leaked task"


@pytest.mark.asyncio
async def test_killed_amid_uploads_and_downloads(own_s3: S3Server) -> None:
    limits = Timeouts(operation=3.0, idle=5.0, cleanup=0.5)
    backend = backend_of(own_s3.service.fresh(), timeouts=limits)
    storage = ProxyStorage("s", originals=backend, meta=MemoryMetaBackend(), settle=0.0)
    kept = {f"kept{number}": pattern(5000, seed=number) for number in range(20)}
    for name, data in kept.items():
        await storage.save(name, data)
    await storage.save("big", pattern(24 << 20))
    acknowledged: set[str] = set()
    failed: list[BaseException] = []

    async def upload(number: int) -> None:
        for turn in range(1000):
            try:
                acknowledged.add(await storage.save(f"up{number}-{turn}", pattern(300_000, seed=turn)))
            except BackendUnavailable as error:
                failed.append(error)
                return

    async def download() -> None:
        try:
            async with storage.open("big") as file:
                async for _ in file:
                    await asyncio.sleep(0.05)
        except BackendUnavailable as error:
            failed.append(error)

    async with asyncio.TaskGroup() as group:
        for number in range(4):
            group.create_task(upload(number))
        group.create_task(download())
        while len(acknowledged) < 10:  # noqa: ASYNC110
            await asyncio.sleep(0.01)
        await asyncio.to_thread(own_s3.kill9)
    assert len(failed) >= 4
    await asyncio.to_thread(own_s3.start)
    assert (await reconcile(storage, dry_run=False, force=True)).clean
    for name, data in kept.items():
        async with storage.open(name, verify=True) as file:
            assert await file.read() == data
    for path in acknowledged:
        async with storage.open(path, verify=True) as file:
            await file.read()
    client = own_s3.service.client()
    prefix = backend.prefix
    assert {key.removeprefix(prefix) for key in own_s3.service.everything(client)} == {*kept, *acknowledged, "big"}
    client.close()
    await storage.aclose()


@pytest.mark.asyncio
async def test_a_stalled_service_meets_the_idle_limit(own_s3: S3Server) -> None:
    limits = Timeouts(operation=1.0, idle=1.0, cleanup=0.3)
    backend = backend_of(own_s3.service, timeouts=limits)
    await backend.write("big", pattern(24 << 20))
    async with backend.read("big") as reader:
        await anext(reader)
        own_s3.pause()
        try:
            with pytest.raises(DeadlineExceeded):
                async for _ in reader:
                    pass
            for call in (lambda: backend.write("key", b"x"), lambda: backend.stat("big"), lambda: listing(backend)):
                with pytest.raises(DeadlineExceeded):
                    await call()
        finally:
            own_s3.resume()
    await backend.aclose()


async def listing(backend: ObstoreBackend) -> list[str]:
    return [info.key async for info in backend.list()]


@pytest.mark.asyncio
async def test_a_hundred_unfinished_readers_are_in_nobodys_way(s3_service: S3Service) -> None:
    backend = backend_of(s3_service, timeouts=Timeouts(idle=20.0))
    await backend.write("key", pattern(3 << 20))
    readers = [backend.read("key", chunk_bytes=1 << 16) for _ in range(100)]
    for reader in readers:
        await reader.__aenter__()
    async with backend.read("key") as last:
        assert sum([len(chunk) async for chunk in last]) == 3 << 20
    for reader in readers:
        await reader.__aexit__(None, None, None)


@pytest.mark.asyncio
async def test_wrong_settings_and_rights_are_named(s3_server: S3Server, tmp_path: Path) -> None:
    service = s3_server.service.fresh()
    good = settings_of(service)
    cases: list[tuple[dict[str, Any], type[StorageError], str]] = [
        ({"access_key_id": "AKNOBODY"}, AccessDenied, "no such access key"),
        ({"secret_access_key": "s3cr3t"}, AccessDenied, "secret key does not belong"),
        ({"endpoint": "http://127.0.0.1:1"}, BackendUnavailable, "cannot be reached"),
        ({"client_options": {"allow_http": False}}, ConfigurationError, "plain http"),
        ({"nonsense": "s3cr3t"}, ConfigurationError, "nonsense"),
    ]
    for changed, expected, words in cases:
        limits = Timeouts(operation=2.0)
        backend = ObstoreBackend(
            f"s3://{service.bucket}", timeouts=limits, **{**good, "retry_config": {"max_retries": 0}, **changed}
        )
        with pytest.raises(expected, match=words) as caught:
            await backend.write("key", b"x")
        assert "s3cr3t" not in str(caught.value)
    with pytest.raises(ConfigurationError, match="no such bucket"):
        await ObstoreBackend("s3://no-such-bucket", **good).write("key", b"x")
    reader = s3_server.read_only
    backend = ObstoreBackend(f"s3://{reader.bucket}", **settings_of(reader))
    for call in (lambda: backend.write("key", b"x"), lambda: backend.discard("key")):
        with pytest.raises(AccessDenied):
            await call()
    missing = ObstoreBackend(f"file://{tmp_path}/none", mkdir=False)
    with pytest.raises(ConfigurationError):
        await missing.stat("key")


@pytest.mark.asyncio
async def test_signed_and_public_urls(s3_service: S3Service) -> None:
    import httpx

    async with backend_of(s3_service) as backend, httpx.AsyncClient(trust_env=False) as client:
        await backend.write("dir/日本 1.txt", b"hello", content_type="text/plain")
        answer = await client.get(await backend.url("dir/日本 1.txt", expires_in=60))
        assert (answer.status_code, answer.content, answer.headers["content-type"]) == (200, b"hello", "text/plain")
        answer = await client.get((await backend.url("dir/日本 1.txt")).partition("?")[0])
        assert answer.status_code == 403
        answer = await client.put(await backend.url("up", method="PUT"), content=b"sent")
        assert answer.status_code == 200
        assert (await backend.stat("up")).size == 4
        with pytest.raises(NotSupported, match="filename"):
            await backend.url("up", filename="x")
    public = ObstoreBackend("s3://bucket/pre", base_url="https://cdn.example/media")
    assert await public.url("a b") == "https://cdn.example/media/pre/a%20b"
    with pytest.raises(NotSupported, match="never expires"):
        await public.url("a b", expires_in=5)


@often
@pytest.mark.asyncio
async def test_much_in_little_memory(s3_service: S3Service, times: int) -> None:
    size = (64 << 20) * (16 if times > 1 else 1)
    backend = backend_of(s3_service)
    before = anonymous_memory()
    peak = 0

    async def content() -> AsyncIterator[bytes]:
        nonlocal peak
        for number in range(size >> 20):
            peak = max(peak, anonymous_memory())
            yield bytes([number % 251]) * (1 << 20)

    await backend.write("big", content())
    total = 0
    async with backend.read("big") as reader:
        async for chunk in reader:
            total += len(chunk)
            peak = max(peak, anonymous_memory())
    assert total == size
    assert peak - before < 48 << 20


def anonymous_memory() -> int:
    """Return the memory of this process that is backed by no file."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon"):
            return int(line.split()[1]) << 10
    raise AssertionError("no RssAnon")


# -- this machine


@pytest.mark.asyncio
async def test_a_full_disk_below_the_temporary_file_is_out_of_space(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(body_module._File, "_write", full)
    backend = ObstoreBackend(MemoryStore(), memory_bytes=1000)
    with pytest.raises(OutOfSpace, match="temporary file") as caught:
        await backend.write("key", pieces(pattern(5 << 20)))
    assert not caught.value.outcome_unknown
    with pytest.raises(ContentError):
        await backend.write("key", pieces(pattern(5 << 20), fail_after=1 << 20))
    with pytest.raises(NotFound):
        await backend.stat("key")


@pytest.mark.parametrize("used", [False, True], ids=["before first use", "after"])
def test_on_both_sides_of_a_fork(used: bool, tmp_path: Path) -> None:
    program = f"""
        import asyncio, os, sys
        from aproxy_storage import ConfigurationError
        from aproxy_storage.backends.obstore import ObstoreBackend
        backend = ObstoreBackend("file://{tmp_path}")
        if {used}:
            asyncio.run(backend.write("parent", b"x"))
        child = os.fork()
        try:
            asyncio.run(backend.write("child" if child == 0 else "later", b"x"))
        except ConfigurationError as error:
            print(error, flush=True)
        if child:
            os.waitpid(child, 0)
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(program)], capture_output=True, text=True, timeout=60, cwd=os.getcwd()
    )
    assert done.returncode == 0, done.stderr
    names = {path.name for path in tmp_path.iterdir()}
    if used:
        assert "its threads did not survive" in done.stdout
        assert names == {"parent", "later"}
    else:
        assert (done.stdout, names) == ("", {"child", "later"})


@pytest.mark.asyncio
async def test_names_of_a_local_store_that_obstore_keeps_for_itself(tmp_path: Path) -> None:
    backend = ObstoreBackend(LocalStore(tmp_path))
    with pytest.raises(InvalidPath, match="unfinished"):
        await backend.write("dir/a#12", b"x")
    await backend.write("a#12b", b"x")
    with pytest.raises(InvalidPath):
        await backend.write("a#12b/below", b"x")


@pytest.mark.asyncio
async def test_local_objects_are_durable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    synced: list[str] = []
    real = os.fsync
    monkeypatch.setattr(os, "fsync", lambda fd: (synced.append(os.readlink(f"/proc/self/fd/{fd}")), real(fd)))
    await ObstoreBackend(LocalStore(tmp_path)).write("dir/key", b"x", durable=True)
    assert {str(tmp_path / "dir/key"), str(tmp_path / "dir"), str(tmp_path)} <= set(synced)


# -- URLs and settings: all that can be held to of Google's and Azure's services here


def test_full_paths() -> None:
    azure = AzureStore("container", account_name="acc", account_key="a2V5")
    for backend, expected in (
        (ObstoreBackend("s3://bucket/a/b", prefix="c"), "s3://bucket/a/b/c/key"),
        (ObstoreBackend(S3Store("bucket", prefix="a", region="x"), prefix="b"), "s3://bucket/a/b/key"),
        (ObstoreBackend(GCSStore("bucket")), "gs://bucket/key"),
        (ObstoreBackend(azure), "az://container/key"),
        (ObstoreBackend(MemoryStore()), "memory:///key"),
    ):
        assert backend.full_path("key") == expected
        assert str(backend) == f"ObstoreBackend({expected.removesuffix('key')!r})"


@pytest.mark.asyncio
async def test_urls_of_three_services(s3_service: S3Service) -> None:
    azure = original_from_url("az://container/pre?account_name=acc&account_key=a2V5&min_rate=1000")
    assert isinstance(azure, ObstoreBackend)
    url = await azure.url("a b.txt", expires_in=60)
    assert url.startswith("https://acc.blob.core.windows.net/container/pre/a%20b.txt?")
    google = original_from_url("gs://bucket/pre?skip_signature=true&timeouts.idle=5")
    assert (google.full_path("key"), google.timeouts.idle) == ("gs://bucket/pre/key", 5.0)
    assert isinstance(google, ObstoreBackend)
    assert google._made.get().config["bucket"] == "bucket"
    found = (s3_service.access_key, s3_service.secret_key, s3_service.endpoint_url)
    if None not in found:
        s3 = original_from_url(
            f"obstore+s3://{found[0]}:{found[1]}@{s3_service.bucket}/{s3_service.prefix}"
            f"?endpoint_url={found[2]}&region={s3_service.region}&flat_listings=false"
        )
        await s3.write("key", b"x")
        assert [info.key async for info in s3.list()] == ["key"]
        assert str(found[1]) not in str(s3) + s3.full_path("key") + repr(s3)
    for wrong in (
        "obstore+s3:///prefix",
        "gs://user:s3cr3t@bucket",
        "obstore+s3://s3cr3t@bucket",
        "az://container?conditional_writes=perhaps",
        "gs://bucket?timeouts.idle=s3cr3t",
    ):
        with pytest.raises(ConfigurationError):
            original_from_url(wrong)
    with pytest.raises(ConfigurationError, match="region"):
        ObstoreBackend(MemoryStore(), region="x")
    for store in (object(), Path("/srv")):
        with pytest.raises(ConfigurationError):
            ObstoreBackend(store)
    with pytest.raises(ConfigurationError, match="nonsense"):
        await original_from_url("gs://bucket?nonsense=1").stat("key")


ANSWER = (
    "Generic {} error: Error performing PUT https://x/y?sig=s3cr3t in 1ms - Server returned non-2xx status code: {}: {}"
)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (ANSWER.format("GCS", "503 Service Unavailable", ""), BackendUnavailable),
        (ANSWER.format("GCS", "429 Too Many Requests", ""), BackendUnavailable),
        (ANSWER.format("GCS", "413 Payload Too Large", "<Code>EntityTooLarge</Code>"), OutOfSpace),
        (ANSWER.format("GCS", "404 Not Found", "<Code>NoSuchBucket</Code>"), ConfigurationError),
        (ANSWER.format("MicrosoftAzure", "404", "<Code>ContainerNotFound</Code>"), ConfigurationError),
        (ANSWER.format("MicrosoftAzure", "403", "<Code>AuthenticationFailed</Code>"), AccessDenied),
        (ANSWER.format("MicrosoftAzure", "413", "<Code>RequestBodyTooLarge</Code>"), OutOfSpace),
        (ANSWER.format("MicrosoftAzure", "503", "<Code>ServerBusy</Code>"), BackendUnavailable),
        (ANSWER.format("S3", "400", "<Code>ExpiredToken</Code>"), AccessDenied),
        (ANSWER.format("S3", "400", "<Code>XMinioParentIsObject</Code>"), InvalidPath),
        (ANSWER.format("S3", "403", "<Code>RequestTimeTooSkewed</Code>"), AccessDenied),
        (ANSWER.format("S3", "301", "<Code>PermanentRedirect</Code>"), ConfigurationError),
        (ANSWER.format("S3", "501", "<Code>NotImplemented</Code>"), NotSupported),
        ("Generic S3 error: http://169.254.169.254/latest/api/token: error sending request", ConfigurationError),
        ("Generic GCS error: metadata.google.internal: dns error", ConfigurationError),
        ("Generic S3 error: HTTP error: error sending request kind: Timeout", DeadlineExceeded),
        ("Generic S3 error: HTTP error: error sending request kind: Connect", BackendUnavailable),
        ("Generic LocalFileSystem error: Unable to copy data: No space left (os error 28)", OutOfSpace),
        ("Generic LocalFileSystem error: Unable to open: Permission denied (os error 13)", AccessDenied),
    ],
)
def test_errors_of_services_are_ours(text: str, expected: type[StorageError]) -> None:
    from obstore.exceptions import GenericError

    mapped = ObstoreBackend("gs://bucket")._map_error(GenericError(text), "write 'key'")
    assert type(mapped) is expected
    assert "s3cr3t" not in str(mapped)
    assert "write 'key'" in str(mapped)


@pytest.mark.asyncio
async def test_a_service_that_ignores_ranges_is_noticed(s3_service: S3Service) -> None:
    async with backend_of(s3_service) as backend:
        await backend.write("key", pattern(1000))
        async with backend.read("key", byte_range=ByteRange(10, 20)) as reader:
            assert b"".join([chunk async for chunk in reader]) == pattern(1000)[10:20]


@pytest.mark.asyncio
async def test_a_broken_download_goes_on_where_it_was(own_s3: S3Server) -> None:
    """The server is killed and started again between two chunks: the same object, so the same reader goes on."""
    backend = backend_of(own_s3.service, timeouts=Timeouts(operation=10.0, idle=20.0))
    data = pattern(24 << 20)
    await backend.write("big", data)
    got = bytearray()
    async with backend.read("big", chunk_bytes=1 << 20) as reader:
        async for chunk in reader:
            if not got:
                await asyncio.to_thread(own_s3.kill9)
                await asyncio.to_thread(own_s3.start)
            got += chunk
    assert bytes(got) == data
    await backend.aclose()


def test_signals_reach_a_process_that_waits_for_obstore(tmp_path: Path) -> None:
    """A Ctrl-C ends a program amid a request: no thread of obstore's keeps it alive."""
    program = """
        import asyncio, socket, sys
        from aproxy_storage.backends.obstore import ObstoreBackend
        server = socket.create_server(("127.0.0.1", 0))
        backend = ObstoreBackend("s3://bucket", endpoint="http://127.0.0.1:%d" % server.getsockname()[1],
                                 region="x", access_key_id="a", secret_access_key="b")
        print("waiting", flush=True)
        asyncio.run(backend.stat("key"))
    """
    process = subprocess.Popen([sys.executable, "-c", textwrap.dedent(program)], stdout=subprocess.PIPE, stderr=-3)
    assert process.stdout is not None
    assert process.stdout.readline() == b"waiting\n"
    import time

    time.sleep(0.3)
    process.send_signal(signal.SIGINT)
    assert process.wait(timeout=20) != 0
    process.stdout.close()
