"""For each promise a backend that breaks it, and the proof that the suite notices.

A suite that passes everything proves nothing. Each mutant is `MemoryBackend` or `FileSystemBackend` with one fault;
the tests named with it have to fail, and with the unchanged backend every test has to pass.
"""

import asyncio
import contextlib
import inspect
import os
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from aproxy_storage.backends._draft import Draft
from aproxy_storage.backends.base import Backend, Reader
from aproxy_storage.backends.filesystem import FileSystemBackend
from aproxy_storage.backends.memory import MemoryBackend, _Object
from aproxy_storage.content import Source
from aproxy_storage.errors import AlreadyExists, NotFound
from aproxy_storage.records import ByteRange, ObjectInfo
from aproxy_storage.testing.backends import BackendTests
from tests.backends.test_filesystem import FilesBehind
from tests.backends.test_memory import MemoryBehind


class MemorySuite(MemoryBehind, BackendTests):
    memory_bytes = None
    writers = 4


class FilesSuite(FilesBehind, BackendTests):
    writers = 4


TESTS = [name for name, _ in inspect.getmembers(BackendTests, inspect.iscoroutinefunction) if name.startswith("test_")]


def fails(suite: BackendTests, backend: Backend, name: str) -> bool:
    """Run one test of the suite without pytest; return whether it fails."""

    async def run() -> None:
        try:
            # A mutant that waits for ever has been noticed too.
            async with asyncio.timeout(20):
                await getattr(suite, name)(backend)
        finally:
            with contextlib.suppress(Exception):
                await backend.aclose()

    try:
        asyncio.run(run())
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:  # pytest.fail and skip are none of Exception
        print(f"{name} with {backend}: {error!r}")
        return not isinstance(error, pytest.skip.Exception)
    return False


# -- mutants of the memory backend


class Overwrites(MemoryBackend):
    def _insert(self, found: _Object) -> ObjectInfo:
        self._objects[found.info.key] = found
        return found.info


class SeesNoTakenKey(MemoryBackend):
    async def _is_taken(self, key: str) -> bool:
        return False


class SeesNoFreeKey(MemoryBackend):
    async def _is_taken(self, key: str) -> bool:
        return True


class TakesTheKeyTooLate(MemoryBackend):
    """Looks first and writes later: two may pass the look."""

    async def _write(self, key: str, source: Source, **options: Any) -> ObjectInfo:
        if key in self._objects:
            raise AlreadyExists("taken")
        data = b"".join([chunk async for chunk in source.chunks()])
        await asyncio.sleep(0)
        self._objects[key] = _Object(ObjectInfo(key, size=len(data), token=options["token"]), data)
        return self._objects[key].info


class Streaming(MemoryBackend):
    """What its mutants have in common: an object that grows where it can be seen."""

    async def _grow(self, key: str, source: Source, token: str | None) -> ObjectInfo:
        self._insert(_Object(ObjectInfo(key, size=0, token=token), b""))
        async with contextlib.aclosing(source.chunks()) as chunks:
            async for chunk in chunks:
                data = self._objects[key].data + chunk
                self._objects[key] = _Object(ObjectInfo(key, size=len(data), token=token), data)
        return self._objects[key].info


class KeepsTruncated(Streaming):
    async def _write(self, key: str, source: Source, **options: Any) -> ObjectInfo:
        return await self._grow(key, source, options["token"])


class ShowsUnfinished(Streaming):
    async def _write(self, key: str, source: Source, **options: Any) -> ObjectInfo:
        try:
            return await self._grow(key, source, options["token"])
        except AlreadyExists:
            raise
        except BaseException:
            self._objects.pop(key, None)
            raise


class UndoesErrorsButNoCancellation(Streaming):
    async def _write(self, key: str, source: Source, **options: Any) -> ObjectInfo:
        try:
            return await self._grow(key, source, options["token"])
        except AlreadyExists:
            raise
        except Exception:
            self._objects.pop(key, None)
            raise


class UndoRemovesTheOthersObject(MemoryBackend):
    async def _write(self, key: str, source: Source, **options: Any) -> ObjectInfo:
        try:
            return await super()._write(key, source, **options)
        except AlreadyExists:
            del self._objects[key]
            raise


class IgnoresTheDeclaredSize(MemoryBackend):
    async def _write(self, key: str, source: Source, **options: Any) -> ObjectInfo:
        source.size = None
        return await super()._write(key, source, **options)


class ForgetsTheChecksum(MemoryBackend):
    async def _write(self, key: str, source: Source, **options: Any) -> ObjectInfo:
        info = await super()._write(key, source, **options)
        if source.data is None:
            source.measured(info.size or 0, None)
        return info


class NormalisesNames(MemoryBackend):
    async def _write(self, key: str, source: Source, **options: Any) -> ObjectInfo:
        import unicodedata

        return await super()._write(unicodedata.normalize("NFC", key), source, **options)


class QuotesNames(MemoryBackend):
    async def _write(self, key: str, source: Source, **options: Any) -> ObjectInfo:
        from urllib.parse import unquote

        return await super()._write(unquote(key), source, **options)


class TakesAnyKey(MemoryBackend):
    def check_key(self, key: str) -> None:
        pass


class ChecksTheKeyAfterTheContent(MemoryBackend):
    def check_key(self, key: str) -> None:
        pass

    async def _write(self, key: str, source: Source, **options: Any) -> ObjectInfo:
        await source.peek()
        super().check_key(key)
        return await super()._write(key, source, **options)


class DiscardOfNothingRaises(MemoryBackend):
    async def _discard(self, key: str, *, token: str | None) -> None:
        self._get(key)
        await super()._discard(key, token=token)


class DiscardIgnoresTheToken(MemoryBackend):
    async def _discard(self, key: str, *, token: str | None) -> None:
        await super()._discard(key, token=None)


class DiscardTakesForeignObjectsForItsOwn(MemoryBackend):
    async def _discard(self, key: str, *, token: str | None) -> None:
        found = self._objects.get(key)
        if found and (token in (None, found.info.token) or found.info.token is None):
            del self._objects[key]


class DiscardRemovesBelow(MemoryBackend):
    async def _discard(self, key: str, *, token: str | None) -> None:
        for other in [other for other in self._objects if other.startswith(key)]:
            await super()._discard(other, token=token)


class RangeIsOffByOne(MemoryBackend):
    async def _read(self, key: str, byte_range: ByteRange | None, chunk_bytes: int) -> Reader:
        if byte_range and byte_range.end:
            byte_range = ByteRange(byte_range.start, byte_range.end + 1)
        return await super()._read(key, byte_range, chunk_bytes)


class SuffixIsTakenForAStart(MemoryBackend):
    async def _read(self, key: str, byte_range: ByteRange | None, chunk_bytes: int) -> Reader:
        if byte_range and byte_range.suffix is not None:
            byte_range = ByteRange(byte_range.suffix)
        return await super()._read(key, byte_range, chunk_bytes)


class InfoTellsOfTheRange(MemoryBackend):
    async def _read(self, key: str, byte_range: ByteRange | None, chunk_bytes: int) -> Reader:
        reader = await super()._read(key, byte_range, chunk_bytes)
        start, stop = (byte_range or ByteRange()).resolve(reader.info.size or 0)
        reader.info = ObjectInfo(key, size=stop - start)
        return reader


class ChunksAreTooLarge(MemoryBackend):
    async def _read(self, key: str, byte_range: ByteRange | None, chunk_bytes: int) -> Reader:
        return await super()._read(key, byte_range, chunk_bytes * 2)


class MissingIsFoundOutWhileReading(MemoryBackend):
    async def _read(self, key: str, byte_range: ByteRange | None, chunk_bytes: int) -> Reader:
        async def chunks() -> AsyncIterator[bytes]:
            async for chunk in await super(MissingIsFoundOutWhileReading, self)._read(key, byte_range, chunk_bytes):
                yield chunk

        return Reader(ObjectInfo(key, size=None), chunks())


class ReaderIsNotPinned(MemoryBackend):
    async def _read(self, key: str, byte_range: ByteRange | None, chunk_bytes: int) -> Reader:
        info = self._get(key).info
        start, stop = (byte_range or ByteRange()).resolve(info.size or 0)

        async def chunks() -> AsyncIterator[bytes]:
            for at in range(start, stop, chunk_bytes):
                found = self._objects.get(key)
                if found is None:
                    return
                yield found.data[at : min(stop, at + chunk_bytes)]

        return Reader(info, chunks())


class MissingObjectIsEmpty(MemoryBackend):
    async def _read(self, key: str, byte_range: ByteRange | None, chunk_bytes: int) -> Reader:
        try:
            return await super()._read(key, byte_range, chunk_bytes)
        except NotFound:
            return Reader(ObjectInfo(key, size=0))


class ModifiedTimeIsNaive(MemoryBackend):
    async def _stat(self, key: str) -> ObjectInfo:
        info = await super()._stat(key)
        object.__setattr__(info, "modified_at", info.modified_at and info.modified_at.replace(tzinfo=None))
        return info


class Forgets(MemoryBackend):
    """Forgets what `forgotten` names in `stat`."""

    forgotten: Any = None

    async def _stat(self, key: str) -> ObjectInfo:
        info = await super()._stat(key)
        return ObjectInfo(**{name: getattr(info, name) for name in ObjectInfo.__slots__} | self.forgotten)


class ForgetsTokens(Forgets):
    forgotten = {"token": None}  # noqa: RUF012


class ForgetsContentTypes(Forgets):
    forgotten = {"content_type": None, "metadata": {}}  # noqa: RUF012


class ForgetsTimes(Forgets):
    forgotten = {"modified_at": None}  # noqa: RUF012


class ListIsUnsorted(MemoryBackend):
    async def _list(self, prefix: str, **options: Any) -> AsyncIterator[ObjectInfo]:
        for info in reversed([info async for info in super()._list(prefix, **options)]):
            yield info


class ListSortsAsDirectoriesDo(MemoryBackend):
    async def _list(self, prefix: str, **options: Any) -> AsyncIterator[ObjectInfo]:
        infos = [info async for info in super()._list(prefix, **options)]
        for info in sorted(infos, key=lambda info: info.key.split("/")):
            yield info


class ListIncludesAfter(MemoryBackend):
    async def _list(self, prefix: str, *, after: str | None, delimiter: str | None) -> AsyncIterator[ObjectInfo]:
        if after is not None and after in self._objects and after.startswith(prefix):
            yield self._objects[after].info
        async for info in super()._list(prefix, after=after, delimiter=delimiter):
            yield info


class ListTakesThePrefixForADirectory(MemoryBackend):
    async def _list(self, prefix: str, *, after: str | None, delimiter: str | None) -> AsyncIterator[ObjectInfo]:
        prefix = prefix and prefix.rstrip("/") + "/"
        async for info in super()._list(prefix, after=after, delimiter=delimiter):
            yield info


class ListRepeatsCommonPrefixes(MemoryBackend):
    async def _list(self, prefix: str, *, after: str | None, delimiter: str | None) -> AsyncIterator[ObjectInfo]:
        if after is not None and delimiter and after.endswith(delimiter):
            async for info in super()._list(prefix, after=after[:-1], delimiter=delimiter):
                yield info
            return
        async for info in super()._list(prefix, after=after, delimiter=delimiter):
            yield info


class ListStopsAtAThousand(MemoryBackend):
    async def _list(self, prefix: str, **options: Any) -> AsyncIterator[ObjectInfo]:
        count = 0
        async for info in super()._list(prefix, **options):
            if (count := count + 1) > 1000:
                return
            yield info


class ListBreaksOnChanges(MemoryBackend):
    async def _list(self, prefix: str, **options: Any) -> AsyncIterator[ObjectInfo]:
        for key in [info.key async for info in super()._list(prefix, **options)]:
            yield self._objects[key].info


class CopyOverwrites(MemoryBackend):
    async def _copy(self, key: str, new_key: str, *, token: str | None, durable: bool) -> ObjectInfo:
        found = self._get(key)
        self._objects[new_key] = _Object(ObjectInfo(new_key, size=len(found.data), token=token), found.data)
        return self._objects[new_key].info


class CopyOfNothingOverwrites(CopyOverwrites):
    async def _copy(self, key: str, new_key: str, *, token: str | None, durable: bool) -> ObjectInfo:
        overwriting = super() if not self._get(key).data else super(CopyOverwrites, self)
        return await overwriting._copy(key, new_key, token=token, durable=durable)


class CopyMoves(MemoryBackend):
    async def _copy(self, key: str, new_key: str, *, token: str | None, durable: bool) -> ObjectInfo:
        info = await super()._copy(key, new_key, token=token, durable=durable)
        self._objects[new_key] = self._objects.pop(key)
        return info


class ClosedForGood(MemoryBackend):
    async def _aclose(self) -> None:
        self._lock = None  # type: ignore[assignment]


class ClosesOnlyOnce(MemoryBackend):
    async def _aclose(self) -> None:
        if hasattr(self, "gone"):
            raise RuntimeError("closed already")
        self.gone = True


class BoundToOneLoop(MemoryBackend):
    async def _stat(self, key: str) -> ObjectInfo:
        return await super()._stat(key)

    async def _write(self, key: str, source: Source, **options: Any) -> ObjectInfo:
        self.loop = getattr(self, "loop", asyncio.get_running_loop())
        if self.loop is not asyncio.get_running_loop():
            raise RuntimeError("attached to a different loop")
        return await super()._write(key, source, **options)


class NativeErrorEscapes(MemoryBackend):
    async def stat(self, key: str) -> ObjectInfo:
        return self._objects[key].info


class ErrorDoesNotSayWhere(MemoryBackend):
    async def stat(self, key: str) -> ObjectInfo:
        return await self._stat(key)


class LiesAboutItsOutcome(MemoryBackend):
    def _insert(self, found: _Object) -> ObjectInfo:
        try:
            return super()._insert(found)
        except AlreadyExists as error:
            error.outcome_unknown = True
            raise


class SwallowsCancellation(MemoryBackend):
    async def _write(self, key: str, source: Source, **options: Any) -> ObjectInfo:
        try:
            return await super()._write(key, source, **options)
        except asyncio.CancelledError:
            return ObjectInfo(key)


class ClaimsTooLittleOfItself(MemoryBackend):
    @property
    def capabilities(self) -> Any:
        return {"list": True}


class SupportsUnclaimedUrls(MemoryBackend):
    async def url(self, key: str, **options: Any) -> str:
        return "http://x"


# -- mutants of the filesystem backend


class LeavesTheDraft(FileSystemBackend):
    async def _give_up(self, draft: Draft) -> None:
        self.left = [*getattr(self, "left", []), draft]  # referenced, so that the descriptor is not closed either


class NeverSeesTheCancellation(FileSystemBackend):
    """The thread goes on and publishes, and nobody takes it back."""

    async def _give_up(self, draft: Draft) -> None:
        draft.withdraw = lambda: None  # type: ignore[method-assign]


class SaysItIsCertain(FileSystemBackend):
    """Claims that nothing was published without taking it back."""

    async def _give_up(self, draft: Draft) -> None:
        draft._withdrawn = False
        draft._handle = None
        draft._published = False


class LeavesEmptyDirectories(FileSystemBackend):
    def __init__(self, root: Any) -> None:
        super().__init__(root)
        self._tree.prune = lambda *_: None  # type: ignore[method-assign]


class ReadsItAllAtOnce(FileSystemBackend):
    async def _read(self, key: str, byte_range: ByteRange | None, chunk_bytes: int) -> Reader:
        reader = await super()._read(key, byte_range, 1 << 40)
        data = reader.data or b""

        async def chunks() -> AsyncIterator[bytes]:
            for start in range(0, len(data), chunk_bytes):
                yield data[start : start + chunk_bytes]

        return Reader(reader.info, chunks())


class GathersTheWholeContent(FileSystemBackend):
    async def _stream(self, source: Source, draft: Draft) -> os.stat_result:
        data = b"".join([chunk async for chunk in source.chunks()])
        return await self._step(draft, draft.create, data)


class MovesTheCallersFile(FileSystemBackend):
    async def _fill(self, source: Source, draft: Draft) -> os.stat_result:
        if source.path is not None:
            source.temporary_path = os.fspath(source.path)
        return await super()._fill(source, draft)


class ListsTemporaries(FileSystemBackend):
    def __init__(self, root: Any) -> None:
        super().__init__(root)
        self._tree.anonymous = False

    async def _children(self, base: str) -> list[str]:
        names = [entry.name for entry in os.scandir(os.path.join(self.root, base)) if entry.is_file()]
        return sorted({*names, *await super()._children(base)}, reverse=True)


MUTANTS: list[tuple[type[Backend], str]] = [
    (Overwrites, "test_taken_key_is_refused_and_untouched"),
    (SeesNoTakenKey, "test_taken_keys_are_known_before_a_write"),
    (SeesNoFreeKey, "test_taken_keys_are_known_before_a_write"),
    (TakesTheKeyTooLate, "test_one_of_many_simultaneous_writers_wins"),
    (KeepsTruncated, "test_failing_content_leaves_nothing"),
    (KeepsTruncated, "test_short_and_long_content_leaves_nothing"),
    (ShowsUnfinished, "test_nothing_is_visible_before_the_end"),
    (ShowsUnfinished, "test_unfinished_writes_are_not_listed"),
    (UndoesErrorsButNoCancellation, "test_large_write_cancelled_at_every_await"),
    (UndoesErrorsButNoCancellation, "test_short_stream_cancelled_at_every_await"),
    (UndoRemovesTheOthersObject, "test_taken_key_is_refused_and_untouched"),
    (IgnoresTheDeclaredSize, "test_short_and_long_content_leaves_nothing"),
    (IgnoresTheDeclaredSize, "test_file_of_the_wrong_size_leaves_nothing"),
    (ForgetsTheChecksum, "test_source_knows_size_and_checksum_afterwards"),
    (ForgetsTheChecksum, "test_uploaded_file_is_moved_or_copied"),
    (NormalisesNames, "test_awkward_names_are_kept_exactly"),
    (QuotesNames, "test_awkward_names_are_kept_exactly"),
    (TakesAnyKey, "test_illegal_keys_are_refused_before_anything_happens"),
    (TakesAnyKey, "test_copy_keeps_the_promises_of_write"),
    (ChecksTheKeyAfterTheContent, "test_illegal_keys_are_refused_before_anything_happens"),
    (DiscardOfNothingRaises, "test_discard"),
    (DiscardOfNothingRaises, "test_impossible_names_are_not_found_and_gone"),
    (DiscardIgnoresTheToken, "test_discard_with_a_token_takes_only_what_that_write_left"),
    (DiscardTakesForeignObjectsForItsOwn, "test_discard_with_a_token_takes_only_what_that_write_left"),
    (DiscardRemovesBelow, "test_discard_of_a_directory_or_below_a_file_does_nothing"),
    (RangeIsOffByOne, "test_ranges"),
    (SuffixIsTakenForAStart, "test_ranges"),
    (InfoTellsOfTheRange, "test_ranges"),
    (ChunksAreTooLarge, "test_chunks_are_as_large_as_asked_for_at_most"),
    (MissingIsFoundOutWhileReading, "test_missing_object_is_not_found_on_entering"),
    (ReaderIsNotPinned, "test_reader_is_pinned_to_one_version"),
    (MissingObjectIsEmpty, "test_impossible_names_are_not_found_and_gone"),
    (MissingObjectIsEmpty, "test_errors_say_where_they_happened"),
    (ModifiedTimeIsNaive, "test_stat"),
    (ForgetsTokens, "test_token_is_kept"),
    (ForgetsContentTypes, "test_content_type_and_metadata_are_kept"),
    (ForgetsTimes, "test_stat"),
    (ListIsUnsorted, "test_listing_is_in_byte_order"),
    (ListSortsAsDirectoriesDo, "test_listing_is_in_byte_order"),
    (ListIncludesAfter, "test_every_listing_agrees_with_the_keys"),
    (ListTakesThePrefixForADirectory, "test_every_listing_agrees_with_the_keys"),
    (ListRepeatsCommonPrefixes, "test_every_listing_agrees_with_the_keys"),
    (ListStopsAtAThousand, "test_many_keys_page_by_page"),
    (ListBreaksOnChanges, "test_listing_bears_changes_meanwhile"),
    (CopyOverwrites, "test_copy_keeps_the_promises_of_write"),
    (CopyOfNothingOverwrites, "test_copy_keeps_the_promises_of_write"),
    (CopyOverwrites, "test_one_of_many_simultaneous_copies_wins"),
    (CopyMoves, "test_copy"),
    (ClosedForGood, "test_aclose_is_idempotent_and_not_the_end"),
    (ClosesOnlyOnce, "test_aclose_is_idempotent_and_not_the_end"),
    (BoundToOneLoop, "test_several_event_loops_at_once"),
    (NativeErrorEscapes, "test_missing_object_is_not_found_on_entering"),
    (ErrorDoesNotSayWhere, "test_errors_say_where_they_happened"),
    (LiesAboutItsOutcome, "test_taken_key_is_refused_and_untouched"),
    (SwallowsCancellation, "test_short_stream_cancelled_at_every_await"),
    (ClaimsTooLittleOfItself, "test_capabilities_are_data"),
    (SupportsUnclaimedUrls, "test_what_is_not_claimed_is_not_supported"),
    (LeavesTheDraft, "test_failing_content_leaves_nothing"),
    (NeverSeesTheCancellation, "test_small_write_cancelled_at_every_await"),
    (SaysItIsCertain, "test_small_write_cancelled_at_every_await"),
    (LeavesEmptyDirectories, "test_discard"),
    (LeavesEmptyDirectories, "test_failing_content_leaves_nothing"),
    (LeavesEmptyDirectories, "test_many_writes_and_discards_in_one_place"),
    (ReadsItAllAtOnce, "test_memory_is_bounded"),
    (GathersTheWholeContent, "test_memory_is_bounded"),
    (MovesTheCallersFile, "test_every_kind_of_content"),
    (ListsTemporaries, "test_unfinished_writes_are_not_listed"),
]


def made(kind: type[Backend], tmp_path: Path) -> tuple[BackendTests, Backend]:
    """Return a suite and an empty backend of that kind for it."""
    tmp_path.mkdir(exist_ok=True)
    if issubclass(kind, FileSystemBackend):
        return FilesSuite(), kind(tmp_path / "root")
    return MemorySuite(), kind()


@pytest.mark.parametrize(("mutant", "test"), MUTANTS, ids=lambda value: getattr(value, "__name__", value))
def test_suite_notices(mutant: type[Backend], test: str, tmp_path: Path) -> None:
    assert fails(*made(mutant, tmp_path), test), f"{test} lets {mutant.__name__} pass"


@pytest.mark.parametrize("kind", [MemoryBackend, FileSystemBackend])
def test_nothing_fails_without_a_fault(kind: type[Backend], tmp_path: Path) -> None:
    failed = []
    for number, name in enumerate(TESTS):
        if fails(*made(kind, tmp_path / str(number)), name):
            failed.append(name)
    assert failed == []


def test_every_mutant_is_used() -> None:
    here = globals()
    mutants = {
        value
        for value in here.values()
        if inspect.isclass(value) and issubclass(value, Backend) and value.__module__ == __name__
    }
    assert mutants - {mutant for mutant, _ in MUTANTS} == {Streaming, Forgets}
