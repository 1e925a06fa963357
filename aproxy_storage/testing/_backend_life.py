"""The promises of `copy`, `url` and `aclose`, of errors, of memory and of event loops."""

from __future__ import annotations

import asyncio
import pickle
import tracemalloc
from collections.abc import AsyncIterator
from typing import Any

import pytest

from ..errors import AlreadyExists, InvalidPath, NotFound, NotSupported, StorageError
from ..records import Capabilities, ObjectInfo
from ._backend_hooks import BIG, BackendHooks, pattern, pieces
from ._backend_writes import ILLEGAL_KEYS

__all__ = ["LifeTests"]


@pytest.mark.asyncio
class LifeTests(BackendHooks):
    async def test_capabilities_are_data(self, backend: Any) -> None:
        assert isinstance(backend.capabilities, Capabilities)
        assert isinstance(type(backend).capabilities, Capabilities), "it can be asked without an instance"

    async def test_what_is_not_claimed_is_not_supported(self, backend: Any) -> None:
        await backend.write("key", b"x")
        if not backend.capabilities.list:
            with pytest.raises(NotSupported):
                await self.keys(backend)
        if not backend.capabilities.server_copy:
            with pytest.raises(NotSupported):
                await backend.copy("key", "copy")
        if not backend.capabilities.url:
            with pytest.raises(NotSupported):
                await backend.url("key")

    async def test_copy(self, backend: Any) -> None:
        self.need(backend, "server_copy")
        for key, size in (("small", 10), ("big", BIG), ("empty", 0)):
            data = pattern(size)
            await self.put_behind(backend, key, data)
            info = await backend.copy(key, f"copies/{key}")
            assert isinstance(info, ObjectInfo)
            assert (info.key, info.size) == (f"copies/{key}", size)
            assert await self.get_behind(backend, key) == data, "the original is gone or changed"
            await backend.discard(key)
            assert await self.get_behind(backend, f"copies/{key}") == data

    async def test_copy_keeps_the_promises_of_write(self, backend: Any) -> None:
        self.need(backend, "server_copy")
        await backend.write("original", b"data")
        await backend.write("empty", b"")
        await backend.write("taken", b"kept")
        for key in ("original", "empty"):
            with pytest.raises(AlreadyExists):
                await backend.copy(key, "taken")
            assert await self.get_behind(backend, "taken") == b"kept"
        with pytest.raises(NotFound):
            await backend.copy("missing", "dir/copy")
        for key in ILLEGAL_KEYS:
            with pytest.raises(InvalidPath):
                await backend.copy("original", key)
        for key in ("original", "empty", "taken"):
            await backend.discard(key)
        await self.nothing_left(backend, "by copies")

    async def test_one_of_many_simultaneous_copies_wins(self, backend: Any) -> None:
        self.need(backend, "server_copy", "conditional_create")
        for number in range(8):
            await backend.write(f"original{number}", pattern(1000, seed=number))
        results = await asyncio.gather(
            *(backend.copy(f"original{number}", "copy") for number in range(8)), return_exceptions=True
        )
        won = [number for number, result in enumerate(results) if isinstance(result, ObjectInfo)]
        assert len(won) == 1, results
        assert all(isinstance(result, ObjectInfo | AlreadyExists) for result in results), results
        assert await self.get_behind(backend, "copy") == pattern(1000, seed=won[0])

    async def test_url(self, backend: Any) -> None:
        self.need(backend, "url")
        await backend.write("with space/日本.txt", b"x")
        url = await backend.url("with space/日本.txt")
        assert isinstance(url, str)
        assert url.isascii()
        assert " " not in url

    async def test_full_path_names_the_object(self, backend: Any) -> None:
        assert backend.full_path("dir/om.png").endswith("dir/om.png")
        assert isinstance(str(backend), str)

    async def test_aclose_is_idempotent_and_not_the_end(self, backend: Any) -> None:
        await backend.aclose()
        await backend.aclose()
        await backend.write("key", b"x")
        await backend.aclose()
        assert await self.content(backend, "key") == b"x"
        async with backend as same:
            assert same is backend
        assert (await backend.stat("key")).size == 1

    async def test_several_event_loops_at_once(self, backend: Any) -> None:
        await backend.write("shared", pattern(BIG))

        async def elsewhere(number: int) -> bool:
            try:
                assert await self.content(backend, "shared", chunk_bytes=1 << 18) == pattern(BIG)
                await backend.write(f"from/{number}", pieces(pattern(1000, seed=number)))
                with pytest.raises(AlreadyExists):
                    await backend.write(f"from/{number}", b"again")
                return True
            finally:
                await backend.aclose()

        ended = await asyncio.gather(
            *(asyncio.to_thread(lambda number: asyncio.run(elsewhere(number)), number) for number in range(4))
        )
        assert all(ended)
        for number in range(4):
            assert await self.content(backend, f"from/{number}") == pattern(1000, seed=number)

    async def test_errors_say_where_they_happened(self, backend: Any) -> None:
        await backend.write("taken", b"x")

        async def read(key: str) -> None:
            async with backend.read(key):
                pass

        for operation, key, call in (
            ("write", "taken", lambda: backend.write("taken", b"y")),
            ("read", "missing", lambda: read("missing")),
            ("stat", "missing", lambda: backend.stat("missing")),
        ):
            with pytest.raises(StorageError) as caught:
                await call()
            error = caught.value
            assert (error.operation, error.path, error.backend) == (operation, key, str(backend))
            assert key in str(error), "the message does not say what it is about"
            twin = pickle.loads(pickle.dumps(error))
            assert (type(twin), str(twin), twin.operation) == (type(error), str(error), operation)

    async def test_memory_is_bounded(self, backend: Any) -> None:
        if self.memory_bytes is None:
            pytest.skip(f"{backend} keeps objects in memory")
        size = 32 << 20

        async def content() -> AsyncIterator[bytes]:
            for start in range(0, size, 1 << 20):
                yield bytes([start >> 20]) * (1 << 20)

        await backend.write("warm/up", pieces(pattern(BIG)))
        tracemalloc.start()
        try:
            await backend.write("key", content())
            written = tracemalloc.get_traced_memory()[1]
            tracemalloc.reset_peak()
            total = 0
            async with backend.read("key", chunk_bytes=1 << 20) as reader:
                async for chunk in reader:
                    assert len(chunk) <= 1 << 20
                    total += len(chunk)
            read = tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()
        assert total == size
        assert written <= self.memory_bytes, f"a write took {written} bytes"
        assert read <= self.memory_bytes, f"a read took {read} bytes"
