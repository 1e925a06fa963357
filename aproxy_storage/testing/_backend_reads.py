"""The promises of `read`, `stat` and `list`."""

from __future__ import annotations

import contextlib
from typing import Any

import pytest

from ..errors import Conflict, NotFound
from ..paths import successor
from ..records import ByteRange
from ._backend_hooks import BIG, BackendHooks, pattern, pieces
from ._backend_writes import ILLEGAL_KEYS

__all__ = ["ListTests", "ReadTests"]


@pytest.mark.asyncio
class ReadTests(BackendHooks):
    async def test_reads_what_was_put_behind_its_back(self, backend: Any) -> None:
        for key, data in (("small", b"hello"), ("deep/er/big", pattern(BIG)), ("empty", b"")):
            await self.put_behind(backend, key, data)
            async with backend.read(key) as reader:
                assert (reader.info.key, reader.info.size) == (key, len(data))
                assert b"".join([chunk async for chunk in reader]) == data, key

    async def test_chunks_are_as_large_as_asked_for_at_most(self, backend: Any) -> None:
        data = pattern(100_000)
        await backend.write("key", data)
        for chunk_bytes in (1000, 4096, 99_999, 100_000, 100_001, 1 << 20):
            async with backend.read("key", chunk_bytes=chunk_bytes) as reader:
                chunks = [chunk async for chunk in reader]
            assert b"".join(chunks) == data
            assert max(map(len, chunks)) <= chunk_bytes
            assert all(chunks), "an empty chunk"
        with pytest.raises(ValueError, match="chunk_bytes"):
            backend.read("key", chunk_bytes=0)

    async def test_missing_object_is_not_found_on_entering(self, backend: Any) -> None:
        await backend.write("dir/there", b"x")
        for key in ("missing", "dir/missing", "dir/there/below", "dir", "missing/missing"):
            with pytest.raises(NotFound):
                async with backend.read(key):
                    pytest.fail("entered")
            with pytest.raises(NotFound):
                await backend.stat(key)

    async def test_impossible_names_are_not_found_and_gone(self, backend: Any) -> None:
        await backend.write("a", b"x")
        for key in [*ILLEGAL_KEYS, "a/../a", "./a", "x" * 100_000, "y" * 1000 + "/z", "\udc80"]:
            with pytest.raises(NotFound):
                async with backend.read(key):
                    pytest.fail(f"{key!r} was read")
            with pytest.raises(NotFound):
                await backend.stat(key)
            await backend.discard(key)
            await backend.discard(key, token="sometoken")
        assert await self.get_behind(backend, "a") == b"x"

    async def test_ranges(self, backend: Any) -> None:
        self.need(backend, "range_read")
        for key, size in (("small", 100), ("big", BIG), ("empty", 0)):
            data = pattern(size)
            await backend.write(key, data)
            places = sorted({0, 1, size // 2, max(size - 1, 0), size, size + 1, size * 2 + 9, 1 << 18})
            ranges = [
                ByteRange(start, end) for start in places for end in (*places, None) if end is None or end >= start
            ]
            ranges += [ByteRange.last(count) for count in places]
            for byte_range in ranges:
                start, stop = byte_range.resolve(size)
                async with backend.read(key, byte_range=byte_range, chunk_bytes=1 << 18) as reader:
                    assert reader.info.size == size, "info tells of the whole object"
                    chunks = [chunk async for chunk in reader]
                    assert b"".join(chunks) == data[start:stop], (key, byte_range)

    async def test_reader_is_pinned_to_one_version(self, backend: Any) -> None:
        old, new = pattern(BIG, seed=1), pattern(BIG, seed=2)
        for replaced in (False, True):
            await backend.write("key", old)
            got = b""
            with contextlib.suppress(Conflict):
                async with backend.read("key", chunk_bytes=1 << 16) as reader:
                    got += await anext(reader)
                    await backend.discard("key")
                    if replaced:
                        await backend.write("key", new)
                    async for chunk in reader:
                        got += chunk
                    assert len(got) == len(old), "the end came too early, and without a word"
            assert got == old[: len(got)], "a mixture of two objects"
            await backend.discard("key")

    async def test_reader_may_be_left_early(self, backend: Any) -> None:
        await backend.write("key", pattern(BIG))
        for chunks in range(3):
            async with backend.read("key", chunk_bytes=1 << 16) as reader:
                for _ in range(chunks):
                    await anext(reader)
            with pytest.raises(StopAsyncIteration):
                await anext(reader)
        await backend.discard("key")
        await self.nothing_left(backend, "by readers that were left")

    async def test_stat(self, backend: Any) -> None:
        for key, size in (("small", 5), ("dir/big", BIG), ("empty", 0)):
            await backend.write(key, pattern(size))
            info = await backend.stat(key)
            assert (info.key, info.size, info.is_prefix) == (key, size, False)
            for moment in (info.modified_at, info.changed_at):
                assert moment is None or moment.utcoffset() is not None, "a moment without a zone"
            assert info.modified_at is not None or not backend.capabilities.modified_time

    async def test_token_is_kept(self, backend: Any) -> None:
        self.need(backend, "tokens")
        await backend.write("small", b"x", token="tokenOfSmall")
        await backend.write("big", pieces(pattern(BIG)), token="tokenOfBig00")
        await self.put_behind(backend, "foreign", b"x")
        assert (await backend.stat("small")).token == "tokenOfSmall"
        assert (await backend.stat("big")).token == "tokenOfBig00"
        assert (await backend.stat("foreign")).token is None
        if backend.capabilities.server_copy:
            await backend.copy("small", "copy", token="tokenOfCopy0")
            assert (await backend.stat("copy")).token == "tokenOfCopy0"

    async def test_content_type_and_metadata_are_kept(self, backend: Any) -> None:
        metadata = {"author": "x", "note": "plain text", "word": "=?utf-8?q?x?="}  # as in a header of mail
        await backend.write("key", b"x", content_type="text/x-test", metadata=metadata)
        info = await backend.stat("key")
        if backend.capabilities.content_type:
            assert info.content_type == "text/x-test"
        if backend.capabilities.metadata:
            assert {name: info.metadata[name] for name in metadata} == metadata

    async def test_discard(self, backend: Any) -> None:
        await backend.write("dir/ours", pattern(BIG))
        await self.put_behind(backend, "theirs", b"x")
        for key in ("dir/ours", "theirs"):
            for _ in range(2):
                await backend.discard(key)
                await self.nothing_at(backend, key)
        await backend.discard("never/was")
        await self.nothing_left(backend, "by discard")

    async def test_discard_with_a_token_takes_only_what_that_write_left(self, backend: Any) -> None:
        await backend.write("key", b"kept", token="tokenOfKept0")
        if backend.capabilities.tokens:
            await backend.discard("key", token="tokenOfOther")
            assert await self.get_behind(backend, "key") == b"kept"
            await self.put_behind(backend, "foreign", b"foreign")
            await backend.discard("foreign", token="tokenOfOther")
            assert await self.get_behind(backend, "foreign") == b"foreign"
            await backend.discard("foreign")
        for _ in range(2):
            await backend.discard("key", token="tokenOfKept0")
            await self.nothing_at(backend, "key")
        await self.nothing_left(backend, "by discard")

    async def test_discard_of_a_directory_or_below_a_file_does_nothing(self, backend: Any) -> None:
        await backend.write("dir/key", b"x")
        for key in ("dir", "dir/", "dir/key/below", "d", "dir/ke"):
            await backend.discard(key)
            await backend.discard(key, token="sometoken000")
        assert await self.get_behind(backend, "dir/key") == b"x"


@pytest.mark.asyncio
class ListTests(BackendHooks):
    #: Byte order differs from the order of directories, of locales and of UTF-16 here.
    KEYS = tuple("a,a-b/x,b!,b/a,b/b/c,b/b/d,b/c,b0,c-d,c/e,c0,Z,_,~,é/é,日本/語,ﬀ,😀".split(","))  # noqa: SIM905

    async def test_listing_is_in_byte_order(self, backend: Any) -> None:
        self.need(backend, "list")
        assert await self.keys(backend) == []
        for key in self.KEYS:
            await backend.write(key, key.encode())
        infos = [info async for info in backend.list()]
        assert [info.key for info in infos] == sorted(self.KEYS)
        assert all(info.size in (None, len(info.key.encode())) and not info.is_prefix for info in infos)

    async def test_every_listing_agrees_with_the_keys(self, backend: Any) -> None:
        self.need(backend, "list")
        for key in self.KEYS:
            await backend.write(key, b"")
        prefixes = ["", "b", "b/", "b/b", "b/b/", "c", "c/", "c/e", "z", "é", "日本/", "b//", "../", "/", "b/b/c/"]
        afters = [None, "", "a", "b", "b/", "b/b", "b/b/", "b/b/c", "b/b/zzz", "b/z", "c-", "zzz", "\U0010ffff"]
        for prefix in prefixes:
            for after in afters:
                for delimiter in (None, "/", "b", "-"):
                    expected = expected_listing(self.KEYS, prefix, after, delimiter)
                    got = [
                        (info.key, info.is_prefix)
                        async for info in backend.list(prefix, after=after, delimiter=delimiter)
                    ]
                    assert got == expected, f"list({prefix!r}, after={after!r}, delimiter={delimiter!r})"

    async def test_many_keys_page_by_page(self, backend: Any) -> None:
        self.need(backend, "list")
        keys = sorted([f"page/{number:04}" for number in range(1050)] + [f"page/sub{n % 7}/{n}" for n in range(70)])
        for start in range(0, len(keys), 50):
            for key in keys[start : start + 50]:
                await self.put_behind(backend, key, b"")
        assert await self.keys(backend) == keys
        assert await self.keys(backend, "page/00") == keys[:100]
        after: str | None = None
        seen: list[str] = []
        while True:  # as somebody does who keeps nothing but the last key
            page: list[str] = []
            async for info in backend.list("page/", after=after):
                page.append(info.key)
                if len(page) == 400:
                    break
            seen += page
            if len(page) < 400:
                break
            after = page[-1]
        assert seen == keys

    async def test_listing_bears_changes_meanwhile(self, backend: Any) -> None:
        self.need(backend, "list")
        keys = [f"dir{number % 5}/{number:03}" for number in range(100)]
        for key in keys:
            await backend.write(key, b"")
        doomed = keys[::2]
        seen = []
        async for info in backend.list():
            seen.append(info.key)
            while doomed:
                await backend.discard(doomed.pop())
        assert set(keys[1::2]) <= set(seen) <= set(keys)
        assert seen == sorted(seen)

    async def test_listing_may_be_left(self, backend: Any) -> None:
        self.need(backend, "list")
        for key in self.KEYS:
            await backend.write(key, b"")
        async with contextlib.aclosing(backend.list()) as items:
            async for _ in items:
                break
        assert await self.keys(backend) == sorted(self.KEYS)

    async def test_unfinished_writes_are_not_listed(self, backend: Any) -> None:
        self.need(backend, "list")
        seen = []

        async def content() -> Any:
            async for piece in pieces(pattern(BIG)):
                yield piece
                seen.append(await self.keys(backend))

        await backend.write("dir/key", content())
        assert seen
        assert not any(seen), "a listing has shown what is not there yet"


def expected_listing(
    keys: tuple[str, ...], prefix: str, after: str | None, delimiter: str | None
) -> list[tuple[str, bool]]:
    """Return what a listing has to give, as (key, is_prefix)."""
    expected: list[tuple[str, bool]] = []
    for key in sorted(keys):
        if not key.startswith(prefix):
            continue
        at = key.find(delimiter, len(prefix)) if delimiter else -1
        rolled = key[: at + len(delimiter or "")] if at >= 0 else None
        # A group that `after` itself names has been given; one that `after` lies in may hold more.
        beyond = successor(after) if after is not None and rolled == after else None
        if (after is not None and key <= after) or (beyond is not None and key < beyond):
            continue
        entry = (key, False) if rolled is None else (rolled, True)
        if entry not in expected:
            expected.append(entry)
    return expected
