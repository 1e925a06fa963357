"""The promises of `write`: all or nothing, whatever happens."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import tempfile
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from ..errors import AlreadyExists, ContentError, InvalidPath, outcome_unknown
from ..records import ObjectInfo
from ._backend_hooks import BIG, PIECE, BackendHooks, pattern, pieces
from .interruptions import interruptions

__all__ = ["ILLEGAL_KEYS", "CancellationTests", "WriteTests"]

ILLEGAL_KEYS = [
    "",
    "/a",
    "a/",
    "a//b",
    ".",
    "..",
    "../a",
    "a/../b",
    "a/./b",
    "a\\b",
    "a\0b",
    "a\nb",
    "\ud800",
    "x" * 1025,
]

#: Different names that look alike, or that a careless client folds, quotes, cuts or resolves.
AWKWARD_KEYS = [
    "日本語/写真.jpg",
    "😀/👩‍👩‍👧.txt",
    "with space/ and more .txt",
    " lead",
    "trail ",
    ".hidden/.file",
    "...",
    "trailing.dot.",
    "100%.txt",
    "100%25.txt",
    "a%2Fb",
    "a+b",
    "q?x=1&y=#frag",
    "quo'te\"s`$;|<>*[]{}^~!@=,:",
    "-rf",
    "con.txt",
    "~user",
    "a.tar.gz/a.tar.gz",
    "ß/ẞ/ſ",
    "‮rtl",
]


class UploadedFile:
    """As much of Django's TemporaryUploadedFile as says that its file may be moved."""

    def __init__(self, data: bytes) -> None:
        self.directory = tempfile.TemporaryDirectory()
        self.file = open(Path(self.directory.name, "upload"), "w+b", buffering=0)  # noqa: SIM115
        self.file.write(data)
        self.file.seek(0)
        self.name = "upload"
        self.size = len(data)
        self.content_type = "text/plain"

    def temporary_file_path(self) -> str:
        return str(self.file.name)

    def chunks(self, chunk_size: int = PIECE) -> Any:
        self.file.seek(0)
        while chunk := self.file.read(chunk_size):
            yield chunk

    def read(self, size: int = -1) -> bytes:
        return self.file.read(size)

    def seek(self, offset: int, whence: int = 0) -> int:
        return self.file.seek(offset, whence)

    def close(self) -> None:
        self.file.close()
        self.directory.cleanup()


@contextlib.contextmanager
def file_of(data: bytes) -> Iterator[Path]:
    """Give the path of a file with `data`, for as long as the block lasts."""
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory, "content")
        path.write_bytes(data)
        yield path


def bytes_in(path: Path) -> bytes:
    """Return what the file holds."""
    return path.read_bytes()


@pytest.mark.asyncio
class WriteTests(BackendHooks):
    async def test_written_bytes_are_there(self, backend: Any) -> None:
        for key, data in (("one.txt", b"hello"), ("deep/er/two.bin", pattern(BIG)), ("empty", b"")):
            info = await backend.write(key, data)
            assert isinstance(info, ObjectInfo)
            assert (info.key, info.size) == (key, len(data))
            assert await self.get_behind(backend, key) == data, key

    async def test_every_kind_of_content(self, backend: Any) -> None:
        for size in (0, 1000, BIG):
            data = pattern(size, seed=size)
            with file_of(data) as path:
                with path.open("rb") as file:
                    contents: dict[str, Any] = {"bytes": data, "stream": pieces(data), "path": path, "file": file}
                    for kind, content in contents.items():
                        key = f"{kind}-{size}"
                        info = await backend.write(key, content)
                        assert info.size == size, key
                        assert await self.get_behind(backend, key) == data, key
                assert bytes_in(path) == data, "a file that is the caller's was moved or changed"

    async def test_uploaded_file_is_moved_or_copied(self, backend: Any) -> None:
        for checksum in ("sha256", None):
            data = pattern(BIG, seed=3)
            upload = UploadedFile(data)
            try:
                source = self.source(upload, checksum=checksum)
                assert source.temporary_path, "content.py does not take this for an upload any more"
                info = await backend.write(f"upload-{checksum}", source)
                assert info.size == len(data)
                assert source.seen_size == len(data)
                assert source.checksum == (checksum and f"sha256:{hashlib.sha256(data).hexdigest()}")
                assert await self.get_behind(backend, f"upload-{checksum}") == data
                kept = bytes_in(Path(upload.temporary_file_path()))
                assert kept == data, "the caller's file is gone, and the record may never be stored"
                await source.aclose()
            finally:
                upload.close()

    async def test_source_knows_size_and_checksum_afterwards(self, backend: Any) -> None:
        for size in (0, 1000, BIG):
            data = pattern(size)
            with file_of(data) as path:
                for kind in ("bytes", "stream", "path"):
                    for checksum in ("sha256", None):
                        contents: dict[str, Any] = {"bytes": data, "stream": pieces(data), "path": path}
                        source = self.source(contents[kind], checksum=checksum)
                        await backend.write(f"{kind}-{size}-{checksum}", source)
                        assert source.seen_size == size, kind
                        expected = checksum and f"sha256:{hashlib.sha256(data).hexdigest()}"
                        assert source.checksum == expected, (kind, size)
                        await source.aclose()

    async def test_taken_key_is_refused_and_untouched(self, backend: Any) -> None:
        await backend.write("ours", b"first")
        await self.put_behind(backend, "theirs", b"foreign")
        for key, kept in (("ours", b"first"), ("theirs", b"foreign")):
            for content in (b"second", pieces(pattern(BIG))):
                with pytest.raises(AlreadyExists) as caught:
                    await backend.write(key, content)
                assert not caught.value.outcome_unknown, "nothing of ours can be there"
                assert await self.get_behind(backend, key) == kept
        assert sorted(await self._objects_behind(backend)) == ["ours", "theirs"]

    async def test_taken_keys_are_known_before_a_write(self, backend: Any) -> None:
        await backend.write("dir/ours", b"first")
        await self.put_behind(backend, "theirs", b"foreign")
        for key, taken in (("dir/ours", True), ("theirs", True), ("free", False), ("dir/free", False)):
            assert await backend.is_taken(key) is taken, key
        await backend.discard("dir/ours")
        assert not await backend.is_taken("dir/ours")

    async def _objects_behind(self, backend: Any) -> list[str]:
        await backend.aclose()  # its cleanup has ended
        return [name for name in await self.list_behind(backend) if not name.endswith("/")]

    async def test_one_of_many_simultaneous_writers_wins(self, backend: Any) -> None:
        self.need(backend, "conditional_create")
        for size in (10, BIG // 8):
            key = f"race/{size}"
            contents = [pattern(size, seed=number) for number in range(self.writers)]
            small = size < 100
            results = await asyncio.gather(
                *(backend.write(key, data if small else pieces(data)) for data in contents), return_exceptions=True
            )
            won = [number for number, result in enumerate(results) if isinstance(result, ObjectInfo)]
            lost = [result for result in results if not isinstance(result, ObjectInfo)]
            assert len(won) == 1, f"{len(won)} writers were told that they had won"
            assert all(isinstance(error, AlreadyExists) for error in lost), lost
            assert await self.get_behind(backend, key) == contents[won[0]]

    async def test_failing_content_leaves_nothing(self, backend: Any) -> None:
        for after in (0, 1, PIECE * 3, BIG - PIECE):
            with pytest.raises(ContentError) as caught:
                await backend.write("dir/key", pieces(pattern(BIG), fail_after=after))
            assert isinstance(caught.value.__cause__, OSError)
            assert not caught.value.outcome_unknown
            await self.nothing_at(backend, "dir/key", f"after content that failed at {after}")
            await self.nothing_left(backend, f"by content that failed at {after}")

    async def test_short_and_long_content_leaves_nothing(self, backend: Any) -> None:
        for real in (0, 100, BIG):
            for declared in (real - 1, real + 1, real + BIG):
                if declared < 0:
                    continue
                for content in (pattern(real), pieces(pattern(real))):
                    with pytest.raises(ContentError) as caught:
                        await backend.write("dir/key", content, size=declared)
                    assert not caught.value.outcome_unknown
                    await self.nothing_at(backend, "dir/key", f"after {real} bytes for {declared}")
        await self.nothing_left(backend, "by content of the wrong size")

    async def test_file_of_the_wrong_size_leaves_nothing(self, backend: Any) -> None:
        for real in (100, BIG):
            with file_of(pattern(real)) as path:
                for declared in (real - 1, real + 1):
                    with pytest.raises(ContentError):
                        await backend.write("dir/key", path, size=declared)
                    await self.nothing_at(backend, "dir/key", f"after a file of {real} bytes")
            with pytest.raises(ContentError):
                await backend.write("dir/key", path)  # it is gone now
        await self.nothing_left(backend, "by files of the wrong size")

    async def test_nothing_is_visible_before_the_end(self, backend: Any) -> None:
        seen: list[Any] = []

        async def watching() -> AsyncIterator[bytes]:
            async for piece in pieces(pattern(BIG)):
                yield piece
                seen.append(await self.get_behind(backend, "dir/key"))

        await backend.write("dir/key", watching())
        assert seen
        assert set(seen) == {None}

    async def test_illegal_keys_are_refused_before_anything_happens(self, backend: Any) -> None:
        touched = []

        async def content() -> AsyncIterator[bytes]:
            touched.append(True)
            yield b"x"

        limits = backend.capabilities
        illegal = [*ILLEGAL_KEYS, "é" * (limits.max_key_bytes // 2 + 1)]
        if limits.max_segment_bytes is not None:
            illegal.append("é" * (limits.max_segment_bytes // 2 + 1))
        for key in illegal:
            with pytest.raises(InvalidPath) as caught:
                await backend.write(key, content())
            assert not caught.value.outcome_unknown
        assert not touched, "the content was read for a key that cannot be"
        await self.nothing_left(backend, "by illegal keys")

    async def test_awkward_names_are_kept_exactly(self, backend: Any) -> None:
        keys = list(AWKWARD_KEYS)
        if self.keeps_case:
            keys += ["Case", "case", "CASE"]
        if self.keeps_normal_forms:
            keys += ["caf\u00e9", "cafe\u0301", "\ufb01", "fi"]
        for number, key in enumerate(keys):
            await backend.write(key, str(number).encode())
        for number, key in enumerate(keys):
            assert await self.get_behind(backend, key) == str(number).encode(), key
            assert await self.content(backend, key) == str(number).encode(), key
        if backend.capabilities.list:
            assert await self.keys(backend) == sorted(keys)
        for key in keys:
            await backend.discard(key)
        await self.nothing_left(backend, "by awkward names")

    async def test_longest_names_are_kept_exactly(self, backend: Any) -> None:
        limits = backend.capabilities
        segment = min(limits.max_segment_bytes or limits.max_key_bytes, limits.max_key_bytes)
        longest = ["s" * segment, "é" * (segment // 2)]
        path = "/".join(["d" * min(segment, 200)] * (limits.max_key_bytes // 201 + 1))[: limits.max_key_bytes]
        longest.append(path[:-1] + "x")
        for key in longest:
            await backend.write(key, key.encode())
            assert await self.get_behind(backend, key) == key.encode()
            assert await self.content(backend, key) == key.encode()
            with pytest.raises(AlreadyExists):
                await backend.write(key, pieces(pattern(BIG)))
        for key in longest:
            await backend.discard(key)
        await self.nothing_left(backend, "by the longest names")

    async def test_durable_write(self, backend: Any) -> None:
        for content in (b"small", pieces(pattern(BIG))):
            await backend.write("dir/key", content, durable=True)
            assert await self.get_behind(backend, "dir/key") is not None
            await backend.discard("dir/key")

    async def test_many_writes_and_discards_in_one_place(self, backend: Any) -> None:
        async def work(number: int) -> None:
            for turn in range(8):
                key = f"shared/dir/{number % 4}/{number}"
                data = f"{number} {turn}".encode()
                await backend.write(key, data)
                assert await self.content(backend, key) == data
                await backend.discard(key)

        async with asyncio.TaskGroup() as group:
            for number in range(24):
                group.create_task(work(number))
        await self.nothing_left(backend, "by many writers")


@pytest.mark.asyncio
class CancellationTests(BackendHooks):
    async def _interrupt(self, backend: Any, content: Callable[[], Any]) -> int:
        """Cancel a write at every await, and see that its CancelledError tells the truth; return how often."""
        token, count = "interrupted0", 0
        async for interruption in interruptions(lambda: backend.write("dir/key", content(), token=token)):
            if interruption.whole:
                assert await self.get_behind(backend, "dir/key") is not None
                await backend.discard("dir/key")
                continue
            count += 1
            error = interruption.error
            assert isinstance(error, asyncio.CancelledError), f"{interruption}: {error!r}"
            if not outcome_unknown(error):
                await self.nothing_at(backend, "dir/key", interruption)
            await backend.aclose()  # the cleanup that a second cancellation did not wait for
            await self.nothing_at(backend, "dir/key", interruption)
            await backend.discard("dir/key", token=token)
            await self.nothing_left(backend, interruption)
        return count

    async def test_small_write_cancelled_at_every_await(self, backend: Any) -> None:
        await self._interrupt(backend, lambda: b"small")

    async def test_short_stream_cancelled_at_every_await(self, backend: Any) -> None:
        assert await self._interrupt(backend, lambda: slowly(b"small"))

    async def test_large_write_cancelled_at_every_await(self, backend: Any) -> None:
        assert await self._interrupt(backend, lambda: slowly(pattern(PIECE * 12)))

    async def test_file_write_cancelled_at_every_await(self, backend: Any) -> None:
        with file_of(pattern(PIECE * 12)) as path:
            await self._interrupt(backend, lambda: path)

    async def test_copy_cancelled_at_every_await(self, backend: Any) -> None:
        self.need(backend, "server_copy")
        await backend.write("original", pieces(pattern(PIECE * 12)))
        async for interruption in interruptions(lambda: backend.copy("original", "dir/copy", token="interrupted0")):
            if not interruption.whole:
                assert isinstance(interruption.error, asyncio.CancelledError), f"{interruption}"
                await backend.aclose()
                await self.nothing_at(backend, "dir/copy", interruption)
            await backend.discard("dir/copy", token="interrupted0")

    async def test_read_cancelled_at_every_await(self, backend: Any) -> None:
        data = pattern(BIG)
        await self.put_behind(backend, "key", data)

        async def read() -> None:
            assert await self.content(backend, "key", chunk_bytes=1 << 18) == data

        async for interruption in interruptions(read):
            if not interruption.whole:
                assert isinstance(interruption.error, asyncio.CancelledError), f"{interruption}: {interruption.error!r}"
        assert await self.content(backend, "key") == data


async def slowly(data: bytes) -> AsyncIterator[bytes]:
    """Yield `data` with an await before and after each piece."""
    await asyncio.sleep(0)
    async for piece in pieces(data):
        yield piece
        await asyncio.sleep(0)
