"""Servers that die, hang or are slow, and callers who go away: nothing is lost, nothing is left."""

import asyncio
import contextlib
import gc
import os
import random
import tracemalloc
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from aproxy_storage import ProxyStorage
from aproxy_storage.backends.s3 import S3Backend
from aproxy_storage.errors import AlreadyExists, BackendUnavailable, DeadlineExceeded
from aproxy_storage.meta_backends.sqlite import SQLiteMetaBackend
from aproxy_storage.records import ObjectInfo
from aproxy_storage.testing._backend_hooks import pattern, pieces
from aproxy_storage.timeouts import Timeouts
from aproxy_storage.tools.reconcile import reconcile
from tests.backends.test_s3 import backend_of
from tests.services.s3 import S3Server, S3Service

pytestmark = pytest.mark.asyncio

PARTS = 11 << 20  # bytes: three parts of a backend of these tests


@pytest.fixture(scope="module")
def victim() -> Iterator[S3Server]:
    """Give a server that dies and comes back; its objects stay."""
    server = S3Server()
    try:
        yield server
    finally:
        server.stop()


def everything(service: S3Service) -> list[str]:
    with contextlib.closing(service.client()) as client:
        return service.everything(client)


async def content(backend: S3Backend, key: str, **options: Any) -> bytes:
    async with backend.read(key, **options) as reader:
        return b"".join([chunk async for chunk in reader])


# -- races


async def test_eight_writers_of_fifty_keys(s3_service: S3Service) -> None:
    async with backend_of(s3_service) as backend:

        async def race(number: int) -> None:
            results = await asyncio.gather(
                *(backend.write(f"key{number}", b"%d" % writer) for writer in range(8)), return_exceptions=True
            )
            won = [writer for writer, result in enumerate(results) if isinstance(result, ObjectInfo)]
            assert len(won) == 1, results
            assert all(isinstance(result, ObjectInfo | AlreadyExists) for result in results), results
            assert await content(backend, f"key{number}") == b"%d" % won[0]

        await asyncio.gather(*(race(number) for number in range(50)))


# -- a server that dies


async def test_server_killed_amid_uploads(victim: S3Server, tmp_path: Path) -> None:
    service = victim.service.fresh()
    backend = backend_of(service, timeouts=Timeouts(cleanup=1.0))
    storage = ProxyStorage(
        "media", originals=backend, meta=SQLiteMetaBackend(tmp_path / "meta.sqlite3"), timeouts=Timeouts(cleanup=1.0)
    )
    async with storage:
        acknowledged = {await storage.save(f"before{number}", pattern(1000, number)): number for number in range(10)}
        begun = asyncio.Event()

        async def dying() -> AsyncIterator[bytes]:
            for number, piece in enumerate([pattern(1 << 20)] * 11):
                if number == 8:  # of the first part all has been sent
                    begun.set()
                    await asyncio.sleep(0.2)
                yield piece

        async def killing() -> None:
            await begun.wait()
            await asyncio.to_thread(victim.kill9)

        results = await asyncio.gather(storage.save("amid", dying()), killing(), return_exceptions=True)
        assert isinstance(results[0], BackendUnavailable), results
        with pytest.raises(BackendUnavailable):
            await storage.save("down", b"x")
        await asyncio.to_thread(victim.start)
        assert "amid (upload)" in await asyncio.to_thread(everything, service), "nothing for reconcile to do"
        for path, number in acknowledged.items():
            async with storage.open(path) as file:
                assert await file.read() == pattern(1000, number)
        assert (await reconcile(storage, force=True, dry_run=False)).clean
        assert await asyncio.to_thread(everything, service) == sorted(acknowledged), "something is left, or gone"
        assert await storage.save("after", b"x") == "after"


async def test_server_killed_amid_a_download(victim: S3Server) -> None:
    async with backend_of(victim.service.fresh()) as backend:
        await backend.write("key", pattern(PARTS))
        async with backend.read("key", chunk_bytes=1 << 16) as reader:
            got = await anext(reader)
            await asyncio.to_thread(victim.kill9)
            with pytest.raises(BackendUnavailable):
                async for chunk in reader:
                    got += chunk
        assert got == pattern(PARTS)[: len(got)]
        await asyncio.to_thread(victim.start)
        assert await content(backend, "key") == pattern(PARTS)


async def test_download_goes_on_when_the_server_is_back(victim: S3Server) -> None:
    async with backend_of(victim.service.fresh()) as backend:
        await backend.write("key", pattern(PARTS))
        async with backend.read("key", chunk_bytes=1 << 16) as reader:
            got = await anext(reader)
            await asyncio.to_thread(victim.kill9)
            await asyncio.to_thread(victim.start)
            async for chunk in reader:
                got += chunk
        assert got == pattern(PARTS)


# -- a server that hangs


async def test_hung_server_hits_the_limits(victim: S3Server) -> None:
    service = victim.service.fresh()
    async with backend_of(service) as backend:
        await backend.write("key", pattern(PARTS))
    timeouts = Timeouts(operation=1.0, idle=1.0, cleanup=0.5)
    async with backend_of(service, timeouts=timeouts) as backend:
        reading = backend.read("key", chunk_bytes=1 << 16)
        async with reading as reader:
            await anext(reader)
            victim.pause()
            try:
                with pytest.raises(DeadlineExceeded):
                    async for _ in reader:
                        pass
                for call in (
                    backend.write("small", b"x"),
                    backend.write("large", pieces(pattern(PARTS))),
                    backend.stat("key"),
                    backend.discard("key"),
                    content(backend, "key"),
                ):
                    with pytest.raises(DeadlineExceeded) as caught:
                        await call
                    assert "seconds" in str(caught.value) or "in time" in str(caught.value)
            finally:
                victim.resume()
    async with backend_of(victim.service.fresh()) as backend:  # it is well again
        await backend.write("key", b"x")


# -- callers who go away


async def test_two_hundred_uploads_cancelled_at_any_moment(s3_service: S3Service) -> None:
    draw = random.Random(7)
    async with backend_of(s3_service, multipart_bytes=1 << 16, pool_size=16) as backend:
        await backend.write("warm", b"x")
        tasks_before = asyncio.all_tasks()
        certain = []

        async def cancelled(number: int) -> None:
            size = 10 if number % 4 == 0 else 200_000
            work = asyncio.ensure_future(
                backend.write(f"key{number}", pieces(pattern(size)), token=f"token{number:07}")
            )
            await asyncio.sleep(draw.uniform(0, 0.06))
            work.cancel()
            await asyncio.wait([work])
            if work.cancelled():
                try:
                    await work
                except asyncio.CancelledError as error:
                    certain.append(not getattr(error, "outcome_unknown", True))
            else:
                assert work.exception() is None
                await backend.discard(f"key{number}")

        for start in range(0, 200, 10):
            await asyncio.gather(*(cancelled(number) for number in range(start, start + 10)))
        assert len(certain) > 100, "they were hardly ever cancelled"
        assert all(certain), "the outcome was left open although the server answers"
        await backend.cleanup.drain(within=10)
        assert asyncio.all_tasks() == tasks_before
        connection = backend._connections.get()
        assert connection._slots._value == 16, "a connection is counted as used"
        assert not backend._uploads
        assert await asyncio.to_thread(everything, s3_service) == ["warm"]
    port = int(str(s3_service.endpoint_url).rpartition(":")[2]) if s3_service.endpoint_url else 443
    left = [each for each in psutil.Process().net_connections() if each.raddr and each.raddr.port == port]
    # One is the tests' own client's.
    assert len([each for each in left if each.status == psutil.CONN_ESTABLISHED]) <= 2


async def test_readers_that_never_finish_do_not_hang_the_next(s3_service: S3Service) -> None:
    async with backend_of(s3_service, pool_size=20, pool_timeout=0.2) as backend:
        await backend.write("key", pattern(PARTS))
        async with contextlib.AsyncExitStack() as stack:
            for _ in range(20):
                await anext(await stack.enter_async_context(backend.read("key", chunk_bytes=1 << 16)))
            for call in (backend.stat("key"), content(backend, "key"), backend.write("other", b"x")):
                with pytest.raises(BackendUnavailable, match="all 20 connections were busy") as caught:
                    await call
                assert not caught.value.outcome_unknown
        assert (await backend.stat("key")).size == PARTS


async def test_hundred_and_first_reader(s3_service: S3Service) -> None:
    async with backend_of(s3_service, pool_size=100, pool_timeout=0.2) as backend:
        await backend.write("key", pattern(1 << 20))
        async with contextlib.AsyncExitStack() as stack:
            for _ in range(100):
                await stack.enter_async_context(backend.read("key", chunk_bytes=1000))
            with pytest.raises(BackendUnavailable, match="readers that are neither read nor closed"):
                await content(backend, "key", chunk_bytes=1000)
        # What is smaller than a chunk does not keep its connection.
        async with contextlib.AsyncExitStack() as stack:
            for _ in range(110):
                await stack.enter_async_context(backend.read("key", chunk_bytes=2 << 20))


async def test_forgotten_reader_gives_its_connection_back(s3_service: S3Service) -> None:
    async with backend_of(s3_service, pool_size=1, pool_timeout=5) as backend:
        await backend.write("key", pattern(PARTS))
        reading = backend.read("key", chunk_bytes=1000)
        await reading.__aenter__()
        del reading
        gc.collect()
        assert (await backend.stat("key")).size == PARTS


# -- memory


async def grown_by(service: S3Service, mebibytes: int) -> tuple[int, int]:
    """Return by how many bytes this process grows while it writes, and then reads, so much."""
    me = psutil.Process()
    piece = os.urandom(1 << 20)

    async def stream(pieces: int) -> AsyncIterator[bytes]:
        for _ in range(pieces):
            yield piece

    async def peak(work: Any) -> int:
        highest = before = me.memory_info().rss
        task = asyncio.ensure_future(work)
        while not task.done():
            highest = max(highest, me.memory_info().rss)
            await asyncio.sleep(0.02)
        await task
        return highest - before

    async def read() -> None:
        size = 0
        async with backend.read("key") as reader:
            async for chunk in reader:
                size += len(chunk)
        assert size == mebibytes << 20

    async with backend_of(service, part_bytes=8 << 20, parts=4) as backend:
        await backend.write("warm", stream(40))
        return await peak(backend.write("key", stream(mebibytes))), await peak(read())


LIMIT = 4 * (8 << 20) + (32 << 20)  # parts × size, and 32 MiB


async def test_memory_is_bounded(s3_service: S3Service) -> None:
    written, read = await grown_by(s3_service, 100)
    assert written < LIMIT
    assert read < LIMIT


async def test_content_in_memory_is_not_copied(s3_service: S3Service) -> None:
    content = os.urandom(6 << 20)
    async with backend_of(s3_service, part_bytes=8 << 20) as backend:
        await backend.write("warm", content)
        tracemalloc.start()
        try:
            await backend.write("key", content)
            peak = tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()
    assert peak < len(content) / 2


@pytest.mark.soak
async def test_memory_of_a_gibibyte_is_bounded(own_s3: S3Server) -> None:
    written, read = await grown_by(own_s3.service.fresh(), 1024)
    assert written < LIMIT
    assert read < LIMIT
