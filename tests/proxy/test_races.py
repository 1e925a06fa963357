"""Many callers and one name: nobody's file is lost, nobody's bytes are left over, no reader sees a mixture."""

from __future__ import annotations

import asyncio
import contextlib
from collections import Counter
from collections.abc import AsyncIterator, Awaitable
from pathlib import Path
from typing import Any

import pytest

from aproxy_storage import AlreadyExists, Conflict, IntegrityError, NotFound, ProxyStorage, StorageError
from aproxy_storage.backends.filesystem import FileSystemBackend
from aproxy_storage.tools.reconcile import reconcile
from tests.proxy.support import SAFETY, assert_sound, contents, on_disk, process, storage_in

pytestmark = pytest.mark.asyncio

both_key_styles = pytest.mark.parametrize("keys", ["path", "token"])


async def outcomes(*calls: Awaitable[Any]) -> list[Any]:
    """Await all `calls` at once; return each one's result or StorageError."""

    async def outcome(call: Awaitable[Any]) -> Any:
        try:
            return await call
        except StorageError as error:
            return error

    async with asyncio.timeout(SAFETY), asyncio.TaskGroup() as group:
        tasks = [group.create_task(outcome(call)) for call in calls]
    return [task.result() for task in tasks]


# -- one name


@both_key_styles
async def test_200_tasks_in_4_processes_save_one_name(tmp_path: Path, keys: str) -> None:
    async with asyncio.timeout(SAFETY), contextlib.AsyncExitStack() as stack:
        workers = [
            await stack.enter_async_context(process("save_one_name", tmp_path, keys=keys, worker=number, tasks=50))
            for number in range(4)
        ]
        for worker in workers:
            await worker.expect("ready")
        for worker in workers:
            await worker.tell("go")
        saved = [pair for worker in workers for pair in await worker.hear()]
        for worker in workers:
            assert not await worker.end()

        assert len(saved) == 200
        by_path = dict(saved)
        assert len(by_path) == 200
        assert "reports/annual.tar.gz" in by_path
        assert all(path.startswith("reports/annual") and path.endswith(".tar.gz") for path in by_path)
        found = await assert_sound(tmp_path)
        assert found == {path: content.encode() for path, content in saved}


def hold_the_books(saved: list[Any], deleted: int, name: str, found: dict[str, bytes]) -> None:
    """Every acknowledged file is there, or was deleted by exactly one acknowledged delete."""
    paths = Counter(path for path, _ in saved)
    assert paths[name] - deleted == (name in found)
    assert all(count == 1 for path, count in paths.items() if path != name)
    contents = {path: content.encode() for path, content in saved}
    assert {path: contents[path] for path in found} == found
    assert found.keys() | {name} == paths.keys() | {name}


@both_key_styles
async def test_two_deleters_and_a_saver_in_3_processes(tmp_path: Path, keys: str) -> None:
    name = "a/b/notes.txt"
    async with asyncio.timeout(SAFETY), contextlib.AsyncExitStack() as stack:
        saver = await stack.enter_async_context(process("save_in_a_loop", tmp_path, keys=keys, name=name, rounds=100))
        deleters = [
            await stack.enter_async_context(process("delete_in_a_loop", tmp_path, keys=keys, name=name))
            for _ in range(2)
        ]
        for one in (saver, *deleters):
            await one.expect("ready")
        for one in (*deleters, saver):
            await one.tell("go")
        saved = await saver.hear()
        for one in deleters:
            await one.tell("stop")
        deleted = sum([await one.hear() for one in deleters])
        for one in (saver, *deleters):
            assert not await one.end()
        assert deleted > 0
        hold_the_books(saved, deleted, name, await assert_sound(tmp_path))


@both_key_styles
async def test_two_deleters_two_savers_and_a_reader_in_tasks(tmp_path: Path, keys: Any) -> None:
    name, saved, deleted, seen = "a/b/notes.txt", [], 0, 0
    # Every process its own storage object; here two, so that no state of an object can help.
    async with asyncio.timeout(SAFETY), storage_in(tmp_path, keys=keys) as one, storage_in(tmp_path, keys=keys) as two:
        done = asyncio.Event()

        async def save(storage: ProxyStorage, letter: str) -> None:
            for number in range(80):
                content = letter * (number + 1)
                saved.append((await storage.save(name, content), content))

        async def delete(storage: ProxyStorage) -> None:
            nonlocal deleted
            while not done.is_set():
                try:
                    await storage.delete(name)
                    deleted += 1
                except NotFound:
                    await asyncio.sleep(0)

        async def read(storage: ProxyStorage) -> None:
            nonlocal seen
            while not done.is_set():
                with contextlib.suppress(NotFound, Conflict):
                    async with storage.open(name, verify=True) as file:
                        content = await file.read()
                    assert len(set(content)) == 1, "a mixture"
                    assert len(content) == file.size
                    seen += 1

        async with asyncio.TaskGroup() as group:
            for storage in (one, two):
                group.create_task(delete(storage))
                group.create_task(read(storage))
            async with asyncio.TaskGroup() as savers:
                savers.create_task(save(one, "x"))
                savers.create_task(save(two, "y"))
            done.set()
    assert deleted > 0
    hold_the_books(saved, deleted, name, await assert_sound(tmp_path))


# -- replace


@pytest.mark.parametrize("keep_replaced", [60.0, 0.0])
async def test_a_reader_beside_two_replacers_sees_whole_files(tmp_path: Path, keep_replaced: float) -> None:
    options = {"chunk_bytes": 16 << 10, "keep_replaced": keep_replaced}
    seen: Counter[bytes] = Counter()
    async with asyncio.timeout(SAFETY), storage_in(tmp_path, **options) as one, storage_in(tmp_path, **options) as two:
        path = await one.save("film.bin", b"0" * 300_000)
        done = asyncio.Event()

        async def replace(storage: ProxyStorage, letter: bytes) -> None:
            for number in range(12):
                await storage.replace(path, letter * (300_000 + 10_000 * number))

        async def read(storage: ProxyStorage, *, verify: bool) -> None:
            while not done.is_set():
                # Nothing may fail: old bytes stay for `keep_replaced`, and an open file of a file system longer.
                async with storage.open(path, verify=verify) as file:
                    chunks = [chunk async for chunk in file]
                content = b"".join(chunks)
                assert content == content[:1] * file.size, "a mixture"
                seen[content[:1]] += 1

        async with asyncio.TaskGroup() as group:
            group.create_task(read(one, verify=True))
            group.create_task(read(two, verify=False))
            async with asyncio.TaskGroup() as replacers:
                replacers.create_task(replace(one, b"a"))
                replacers.create_task(replace(two, b"b"))
            done.set()
        final = await one.get(path)
        assert final.size == 300_000 + 10_000 * 11
    assert sum(seen.values()) > 0
    assert (await assert_sound(tmp_path)).keys() == {path}


async def test_of_many_replacements_of_one_version_exactly_one_wins(tmp_path: Path) -> None:
    async with storage_in(tmp_path) as storage:
        path = await storage.save("a.txt", b"old")
        version = (await storage.get(path)).version
        results = await outcomes(
            *(storage.replace(path, f"new {number}", expect_version=version) for number in range(10))
        )
        won = [number for number, result in enumerate(results) if not isinstance(result, StorageError)]
        assert len(won) == 1
        assert all(isinstance(result, Conflict) for number, result in enumerate(results) if number not in won)
        with pytest.raises(Conflict):
            await storage.replace(path, b"late", expect_version=version)
    assert await assert_sound(tmp_path) == {"a.txt": f"new {won[0]}".encode()}


@pytest.mark.parametrize("delay", range(0, 40, 4))
async def test_replace_against_delete(tmp_path: Path, delay: int) -> None:
    async def later(call: Awaitable[Any]) -> Any:
        for _ in range(delay):
            await asyncio.sleep(0)
        return await call

    async with storage_in(tmp_path) as storage:
        path = await storage.save("a.txt", b"old")
        replaced, deleted = await outcomes(storage.replace(path, b"new"), later(storage.delete(path)))
        assert deleted is None
        assert not await storage.exists(path)
        assert not isinstance(replaced, StorageError) or isinstance(replaced, Conflict | NotFound)
    assert await assert_sound(tmp_path) == {}


# -- rename


@both_key_styles
async def test_of_many_renames_onto_one_name_exactly_one_wins(tmp_path: Path, keys: Any) -> None:
    async with storage_in(tmp_path, keys=keys) as storage:
        paths = [await storage.save(f"from/{number}.txt", f"{number}") for number in range(10)]
        results = await outcomes(*(storage.rename(path, "to/one.txt") for path in paths))
        won = [number for number, result in enumerate(results) if not isinstance(result, StorageError)]
        assert len(won) == 1
        assert all(isinstance(result, AlreadyExists) for number, result in enumerate(results) if number not in won)
    expected = {path: f"{number}".encode() for number, path in enumerate(paths) if number not in won}
    assert await assert_sound(tmp_path) == expected | {"to/one.txt": f"{won[0]}".encode()}


@both_key_styles
async def test_of_many_renames_of_one_file_exactly_one_wins(tmp_path: Path, keys: Any) -> None:
    async with storage_in(tmp_path, keys=keys) as storage:
        path = await storage.save("a.txt", b"a")
        results = await outcomes(*(storage.rename(path, f"b{number}.txt") for number in range(10)))
        won = [result for result in results if not isinstance(result, StorageError)]
        assert len(won) == 1
        assert all(isinstance(result, Conflict | NotFound) for result in results if result not in won)
    assert await assert_sound(tmp_path) == {won[0].path: b"a"}


@both_key_styles
@pytest.mark.parametrize("rounds", [20])
async def test_saves_and_renames_onto_one_name(tmp_path: Path, keys: Any, rounds: int) -> None:
    expected: dict[str, bytes] = {}
    async with storage_in(tmp_path, keys=keys) as storage:
        for number in range(rounds):
            target, old = f"{number}/target.txt", f"{number}/old.txt"
            await storage.save(old, b"renamed")
            # The old name too: the renamed file keeps the key that a new file of that name would like to have.
            renamed, saved, again = await outcomes(
                storage.rename(old, target), storage.save(target, b"saved"), storage.save(old, b"again")
            )
            if isinstance(renamed, AlreadyExists):
                expected[old] = b"renamed"
                assert saved == target
            else:
                expected[target] = b"renamed"
                assert saved != target
            expected |= {saved: b"saved", again: b"again"}
            assert len({saved, again, target, old}) >= 3
    assert await assert_sound(tmp_path) == expected


@both_key_styles
async def test_a_renamed_file_survives_new_files_of_its_old_name(tmp_path: Path, keys: Any) -> None:
    async with storage_in(tmp_path, keys=keys) as storage:
        await storage.save("a.txt", b"first")
        await storage.rename("a.txt", "b.txt")
        assert await storage.save("a.txt", b"second") == "a.txt"
        await storage.delete("a.txt")
        assert await storage.save("a.txt", b"third") == "a.txt"
        await storage.delete("b.txt")
    assert await assert_sound(tmp_path) == {"a.txt": b"third"}


# -- copy and move


@both_key_styles
@pytest.mark.parametrize("delay", range(0, 24, 3))
async def test_copy_and_move_against_delete(tmp_path: Path, keys: Any, delay: int) -> None:
    async def later(call: Awaitable[Any]) -> Any:
        for _ in range(delay):
            await asyncio.sleep(0)
        return await call

    originals = {"fs": FileSystemBackend(tmp_path / "files"), "other": FileSystemBackend(tmp_path / "files/other")}
    async with storage_in(tmp_path, keys=keys) as helper:
        storage = ProxyStorage("media", originals=originals, meta=helper.meta, keys=keys)
        path = await storage.save("a.txt", b"content")
        copied, moved, deleted = await outcomes(
            storage.copy(path, "copy.txt"), storage.move(path, "other"), later(storage.delete(path))
        )
        assert deleted is None
        for result in (copied, moved):
            assert not isinstance(result, StorageError) or isinstance(result, Conflict | NotFound), repr(result)
        await storage.aclose()
        expected = {} if isinstance(copied, StorageError) else {copied: b"content"}
        # The second original lies in the first, so that one look at the disk finds the bytes of both.
        await reconcile(storage, dry_run=False, force=True)
        assert await contents(storage) == expected
        assert sorted(on_disk(tmp_path).values()) == sorted(expected.values())


# -- the same races, frozen at their worst moment


class Gated(FileSystemBackend):
    """Waits before reads and copies at a gate, if there is one."""

    gate: asyncio.Event | None = None
    reached: asyncio.Event

    async def _pass(self) -> None:
        if self.gate is not None:
            gate, self.gate = self.gate, None
            self.reached.set()
            await gate.wait()

    async def _read(self, *args: Any, **kwargs: Any) -> Any:
        await self._pass()
        return await super()._read(*args, **kwargs)

    async def _copy(self, *args: Any, **kwargs: Any) -> Any:
        await self._pass()
        return await super()._copy(*args, **kwargs)


@contextlib.asynccontextmanager
async def stopped(storage: ProxyStorage, call: Awaitable[Any]) -> AsyncIterator[asyncio.Task[Any]]:
    """Run `call` up to the gate, then the block, then the rest of `call`."""
    backend = storage.get_original()
    assert isinstance(backend, Gated)
    backend.gate = gate = asyncio.Event()
    backend.reached = asyncio.Event()
    async with asyncio.timeout(SAFETY):
        result = asyncio.ensure_future(call)
        await backend.reached.wait()
        yield result
        gate.set()
        await asyncio.wait([result])


async def read_verified(storage: ProxyStorage, path: str, *, verify: bool) -> bytes:
    async with storage.open(path, verify=verify) as file:
        return await file.read()


@pytest.mark.parametrize("verify", [False, True])
@pytest.mark.parametrize("new", [b"new!", b"quite another"], ids=["as long", "longer"])
async def test_open_of_a_file_deleted_and_saved_anew_meanwhile(tmp_path: Path, new: bytes, verify: bool) -> None:
    """The new file has the key of the old one, so its bytes are found under the old record."""
    async with storage_in(tmp_path, original=Gated(tmp_path / "files")) as storage:
        await storage.save("a.txt", b"old!")
        async with stopped(storage, read_verified(storage, "a.txt", verify=verify)) as reading:
            await storage.delete("a.txt")
            assert await storage.save("a.txt", new) == "a.txt"
        assert await reading == new


@pytest.mark.parametrize("new", [b"new!", b"quite another"], ids=["as long", "longer"])
async def test_copy_of_a_file_deleted_and_saved_anew_meanwhile(tmp_path: Path, new: bytes) -> None:
    """A copy with the bytes of one file and the checksum of another would be a damaged file."""
    async with storage_in(tmp_path, original=Gated(tmp_path / "files")) as storage:
        await storage.save("a.txt", b"old!")
        async with stopped(storage, storage.copy("a.txt", "copy.txt")) as copying:
            await storage.delete("a.txt")
            assert await storage.save("a.txt", new) == "a.txt"
        expected = {"a.txt": new}
        with contextlib.suppress(Conflict, NotFound):
            expected[await copying] = new
    assert await assert_sound(tmp_path) == expected


async def test_copy_of_a_file_deleted_meanwhile_is_not_found(tmp_path: Path) -> None:
    async with storage_in(tmp_path, original=Gated(tmp_path / "files")) as storage:
        await storage.save("a.txt", b"old!")
        async with stopped(storage, storage.copy("a.txt", "copy.txt")) as copying:
            await storage.delete("a.txt")
        with pytest.raises((Conflict, NotFound)):
            await copying
    assert await assert_sound(tmp_path) == {}


async def test_copy_of_a_file_whose_bytes_are_gone_says_so(tmp_path: Path) -> None:
    async with storage_in(tmp_path) as storage:
        await storage.save("a.txt", b"old!")
        (tmp_path / "files/a.txt").unlink()
        with pytest.raises(IntegrityError, match=r"a\.txt"):
            await storage.copy("a.txt", "copy.txt")
        with pytest.raises(IntegrityError, match=r"a\.txt"):
            async with storage.open("a.txt"):
                pass
        await storage.delete("a.txt")
    assert await assert_sound(tmp_path) == {}
