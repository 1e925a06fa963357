"""Every verb is cancelled at each of its suspensions, once and twice, in every way that asyncio and AnyIO know.

Whatever happens, a file is wholly there or not at all, and nothing is left behind: no bytes, no record, no task, no
thread, no descriptor.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import os
import threading
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Iterable
from contextlib import aclosing, asynccontextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from aproxy_storage import ProxyStorage
from aproxy_storage import threads as worker_threads
from aproxy_storage.backends.filesystem import FileSystemBackend
from aproxy_storage.backends.memory import MemoryBackend
from aproxy_storage.content import hash_workers
from aproxy_storage.errors import Conflict, NotFound
from aproxy_storage.feeds import lookers, readers
from aproxy_storage.meta_backends.memory import MemoryMetaBackend
from aproxy_storage.meta_backends.sqlite import SQLiteMetaBackend
from aproxy_storage.records import STORED, MetaRecord
from aproxy_storage.tools.reconcile import reconcile
from tests.proxy.stepping import Interrupted, Run, Stepped, cancelling, every_step, run_stepped
from tests.telling import Tell

PIECE = 512 << 10
OLD, NEW = b"o" * 1000, b"n" * 1200
OLD_BIG, NEW_BIG = os.urandom(PIECE) * 4, os.urandom(PIECE) * 4  # 2 MiB, two chunks

Possible = dict[str, tuple[bytes | None, ...]]  # file -> what may be in it; None: it is not there


# -- the storage under test


class World:
    """A storage with two originals, and what must be true of it."""

    def __init__(
        self, directory: Path, kind: str, keys: Any, *, big: bool = False, keep_replaced: float = 60.0
    ) -> None:
        self.directory = directory
        self.kind = kind
        self.big = big
        self.old, self.new = (OLD_BIG, NEW_BIG) if big else (OLD, NEW)
        self.originals: dict[str, Any]
        if kind == "memory":
            self.originals = {"a": MemoryBackend(), "b": MemoryBackend()}
            meta: Any = MemoryMetaBackend()
        else:
            self.originals = {name: FileSystemBackend(directory / name) for name in "ab"}
            meta = SQLiteMetaBackend(directory / "meta.db")
        self.storage = ProxyStorage(
            "media", originals=self.originals, meta=meta, keys=keys, keep_replaced=keep_replaced
        )
        self.runs = 0
        self.complaints: list[str] = []  # of the event loop: exceptions that nobody has taken

    def content(self, data: bytes) -> Any:
        """Return `data` as content: in memory, or streamed by an iterator of the caller's that is suspended too."""
        return _streamed(data) if self.big else data

    async def files(self, prefix: str) -> dict[str, bytes]:
        """Return what a reader sees."""
        found = {}
        async for record in self.storage.list(prefix):
            try:
                async with self.storage.open(record, verify=record.checksum is not None) as file:
                    found[record.path] = await file.read()
            except NotFound:  # a cancelled delete may land between the listing and the look
                assert not await self.storage.exists(record.path), f"{record.path} has a record and cannot be read"
        return found

    async def keys(self, original: str) -> list[str]:
        """Return all that lies in an original, temporary files and empty directories included."""
        if self.kind == "memory":
            return [info.key async for info in self.originals[original].list()]
        found = []
        for at, directories, names in os.walk(self.directory / original):
            found += [os.path.relpath(os.path.join(at, name), self.directory / original) for name in names]
            if not directories and not names and at != str(self.directory / original):
                found.append(os.path.relpath(at, self.directory / original) + "/")
        return sorted(found)

    async def settle(self) -> None:
        """Let cleanup end, then do what is left to do."""
        for owner in (self.storage, *self.originals.values(), self.storage.meta):
            await owner.cleanup.drain(within=30.0)
        await reconcile(self.storage, dry_run=False, force=True)

    async def check_undone(self) -> None:
        """No bytes are there but those of stored files, old ones kept for a while included."""
        good: dict[str, set[str]] = {"a": set(), "b": set()}
        kept: dict[str, set[str]] = {"a": set(), "b": set()}
        async for record in self.storage.meta.list():
            assert record.state != "pending", record
            for place in record.all_places():
                if record.state == STORED and place.state in ("good", "surplus"):
                    (good if place.state == "good" else kept)[place.original].add(place.key)
        for original in self.originals:
            keys = set(await self.keys(original))
            assert good[original] <= keys <= good[original] | kept[original]

    async def check_nothing_is_left(self) -> None:
        """All records are plain stored ones, and name all bytes there are."""
        named: dict[str, list[str]] = {"a": [], "b": []}
        async for record in self.storage.meta.list():
            assert record.state == STORED, record
            assert record.lease is None, record
            assert record.places == (), record
            named[record.original_storage_name].append(record.original_storage_path)
        for original, keys in named.items():
            assert await self.keys(original) == sorted(keys)


async def _streamed(data: bytes) -> AsyncIterator[bytes]:
    for start in range(0, len(data), PIECE):
        await asyncio.sleep(0)
        yield data[start : start + PIECE]


@asynccontextmanager
async def a_world(directory: Path, kind: str, keys: str, **options: Any) -> AsyncIterator[World]:
    """Give a storage; at the end it is closed, and tasks, threads and descriptors must be as before."""
    loop = asyncio.get_running_loop()
    tasks, threads, descriptors = asyncio.all_tasks(), set(threading.enumerate()), _descriptors()
    world = World(directory, kind, keys, **options)
    loop.set_exception_handler(lambda _, context: world.complaints.append(str(context)))
    async with asyncio.timeout(240):
        await world.storage.save("bystander", b"untouched")
        yield world
        assert await world.files("bystander") == {"bystander": b"untouched"}
        await world.storage.aclose()
        assert asyncio.all_tasks() == tasks
        left: Any = None
        gc.collect()
        for _ in range(1500):  # threads end by themselves, soon; no clock is compared with
            for shared in (hash_workers, lookers, readers):
                shared.shutdown()
            left = (set(threading.enumerate()) - threads, _descriptors() - descriptors)
            if not any(left):
                break
            await asyncio.sleep(0.01)
        assert not any(left), left
    loop.set_exception_handler(None)
    assert not world.complaints, world.complaints


def _descriptors() -> set[str]:
    found = set()
    for fd in os.listdir("/proc/self/fd"):
        with contextlib.suppress(FileNotFoundError):
            found.add(f"{fd} {os.readlink(f'/proc/self/fd/{fd}')}")
    return found


@pytest.fixture(autouse=True)
def idle_threads_end_soon(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(worker_threads, "_IDLE", 0.3)


# -- the verbs


@dataclass(frozen=True)
class Verb:
    """A verb, what it needs, and what each file may be when it was cancelled; the last possibility: when it was not."""

    prepare: Callable[[World, str], Awaitable[Any]]
    act: Callable[[World, str], Coroutine[Any, Any, Any]]
    possible: Callable[[World], Possible]
    #: Nothing comes after its decisive statement, which may still be under way when the cancelled caller goes on.
    may_land_later: bool = False


async def _nothing(world: World, at: str) -> None:
    pass


async def _old(world: World, at: str) -> None:
    await world.storage.save(f"{at}/x.txt", world.old)


async def _save(world: World, at: str) -> None:
    await world.storage.save(f"{at}/x.txt", world.content(world.new))


async def _replace(world: World, at: str) -> None:
    await world.storage.replace(f"{at}/x.txt", world.content(world.new))


async def _delete(world: World, at: str) -> None:
    await world.storage.delete(f"{at}/x.txt")


async def _read(world: World, at: str) -> None:
    async with world.storage.open(f"{at}/x.txt", verify=True) as file:
        assert b"".join([chunk async for chunk in file]) == world.old


async def _seek(world: World, at: str) -> None:
    async with world.storage.open(f"{at}/x.txt") as file:
        await file.seek(500)
        assert await file.read(300) == world.old[500:800]
        await file.seek(0)
        assert await file.read() == world.old


async def _stream(world: World, at: str) -> None:
    async with aclosing(world.storage.stream(f"{at}/x.txt")) as chunks:
        assert b"".join([chunk async for chunk in chunks]) == world.old


async def _write(world: World, at: str) -> None:
    async with world.storage.open(f"{at}/x.txt", "wb") as file:
        for start in range(0, len(world.new), PIECE):
            await file.write(world.new[start : start + PIECE])
            await asyncio.sleep(0)


async def _copy(world: World, at: str) -> None:
    await world.storage.copy(f"{at}/x.txt", f"{at}/y.txt")


async def _copy_across(world: World, at: str) -> None:
    await world.storage.copy(f"{at}/x.txt", f"{at}/y.txt", using="b")


async def _move(world: World, at: str) -> None:
    assert (await world.storage.move(f"{at}/x.txt", "b")).original_storage_name == "b"


async def _rename(world: World, at: str) -> None:
    await world.storage.rename(f"{at}/x.txt", f"{at}/y.txt")


async def _save_many(world: World, at: str) -> None:
    items = ((f"{at}/{n}.txt", world.content(world.new) if n == 1 else NEW) for n in range(4))
    async with aclosing(world.storage.save_many(items, concurrency=2)) as results:
        async for result in results:
            assert result.error is None
            await asyncio.sleep(0)


async def _delete_many(world: World, at: str) -> None:
    paths = [f"{at}/{number}.txt" for number in range(4)]
    async with aclosing(world.storage.delete_many(paths, concurrency=2)) as results:
        async for result in results:
            assert result.error is None


async def _four(world: World, at: str) -> None:
    for number in range(4):
        await world.storage.save(f"{at}/{number}.txt", world.old)


VERBS = {
    "save": Verb(_nothing, _save, lambda w: {"x.txt": (None, w.new)}),
    "replace": Verb(_old, _replace, lambda w: {"x.txt": (w.old, w.new)}),
    "delete": Verb(_old, _delete, lambda w: {"x.txt": (w.old, None)}, may_land_later=True),
    "open+read": Verb(_old, _read, lambda w: {"x.txt": (w.old,)}),
    "open+seek": Verb(_old, _seek, lambda w: {"x.txt": (w.old,)}),
    "stream": Verb(_old, _stream, lambda w: {"x.txt": (w.old,)}),
    "open('wb') new": Verb(_nothing, _write, lambda w: {"x.txt": (None, w.new)}),
    "open('wb') old": Verb(_old, _write, lambda w: {"x.txt": (w.old, w.new)}),
    "copy": Verb(_old, _copy, lambda w: {"x.txt": (w.old,), "y.txt": (None, w.old)}),
    "copy across": Verb(_old, _copy_across, lambda w: {"x.txt": (w.old,), "y.txt": (None, w.old)}),
    "move": Verb(_old, _move, lambda w: {"x.txt": (w.old,)}),
    "rename": Verb(_old, _rename, lambda w: {"x.txt": (w.old, None), "y.txt": (None, w.old)}, may_land_later=True),
    "save_many": Verb(_nothing, _save_many, lambda w: {f"{n}.txt": (None, w.new if n == 1 else NEW) for n in range(4)}),
    "delete_many": Verb(
        _four, _delete_many, lambda w: {f"{n}.txt": (w.old, None) for n in range(4)}, may_land_later=True
    ),
}
MAIN_VERBS = ("save", "replace", "delete", "open+read", "open('wb') new", "copy across", "move", "save_many")


async def interrupt_verb(
    world: World,
    verb: Verb,
    at: tuple[int, ...],
    interrupted: Interrupted,
    *,
    expect: Callable[[Run], None],
    repeats: bool = False,
) -> Run:
    """Run `verb` on files of its own, interrupted at the suspensions `at`, and check everything.

    `repeats`: one interruption cancels more than once.
    """
    world.runs += 1
    directory = f"run{world.runs}"
    await verb.prepare(world, directory)
    before = asyncio.all_tasks()
    run = await run_stepped(verb.act(world, directory), at, interrupted)
    left = asyncio.all_tasks() - before
    seen = await world.files(f"{directory}/")
    possible = verb.possible(world)
    whole = _whole(seen, directory, possible, done=run.error is None)
    assert whole, f"interrupted at {at}, {run.error!r}: {_short(seen)}"
    expect(run)
    at_most_once = run.interrupts <= (0 if repeats else 1)
    if at_most_once:
        # The undo was awaited by the caller.
        assert not left, f"interrupted at {at} once, it left {left}"
        if not verb.may_land_later:
            await world.check_undone()
    await world.settle()
    assert asyncio.all_tasks() == before
    await world.check_nothing_is_left()
    after = await world.files(f"{directory}/")
    assert _whole(after, directory, possible, done=run.error is None), f"interrupted at {at}: later {_short(after)}"
    if at_most_once and not verb.may_land_later:
        assert after == seen, f"interrupted at {at} once: {_short(seen)} has become {_short(after)}"
    for path in list(after):
        await world.storage.delete(path)
    return run


def _whole(seen: dict[str, bytes], directory: str, possible: Possible, *, done: bool) -> bool:
    if not seen.keys() <= {f"{directory}/{name}" for name in possible}:
        return False
    return all(seen.get(f"{directory}/{name}") in (what[-1:] if done else what) for name, what in possible.items())


def _short(files: dict[str, bytes]) -> dict[str, str]:
    return {path: f"{len(data)} bytes {data[:1]!r}" for path, data in files.items()}


def _cancelled(run: Run) -> None:
    """A cancellation that was delivered is never swallowed, and nothing else is raised in its place."""
    if run.interrupts:
        assert run.cancelled, run
    else:
        assert run.error is None, run


# -- the tests


STREAMED = ("save", "replace", "open+read", "open('wb') new", "copy across", "move", "save_many")
CASES = [
    *((kind, "path", False, verb) for kind in ("memory", "files") for verb in VERBS),
    *((kind, "path", True, verb) for kind in ("memory", "files") for verb in STREAMED),
    *((kind, "token", False, verb) for kind in ("memory", "files") for verb in MAIN_VERBS),
    *(("files", "token", True, verb) for verb in ("save", "replace")),
]


@pytest.mark.parametrize(
    ("kind", "keys", "big", "verb"),
    [pytest.param(*case, id=f"{case[0]}-{case[1]}-{'streamed' if case[2] else 'small'}-{case[3]}") for case in CASES],
)
@pytest.mark.asyncio
async def test_cancelled_at_every_suspension(
    tmp_path: Path, tell: Tell, kind: str, keys: str, big: bool, verb: str
) -> None:
    async with a_world(tmp_path, kind, keys, big=big) as world:
        for late in (False, True):

            async def one(at: tuple[int, ...], late: bool = late) -> Run:
                return await interrupt_verb(world, VERBS[verb], at, cancelling(late=late), expect=_cancelled)

            reached = [at async for at, run in every_step(one) if run.interrupts == 1]
            for first in reached:
                async for _ in every_step(one, first=first, quiet_runs=1):
                    pass
            tell(
                "suspensions at which each verb was cancelled",
                f"{len(reached):>4}  {verb}: {kind}, {'streamed' if big else 'small'}, keys={keys!r}",
            )


@pytest.mark.parametrize("verb", ["replace", "move", "open('wb') old"])
@pytest.mark.parametrize("kind", ["memory", "files"])
@pytest.mark.asyncio
async def test_replaced_bytes_that_go_at_once(tmp_path: Path, kind: str, verb: str) -> None:
    async with a_world(tmp_path, kind, "path", keep_replaced=0.0) as world:
        for late in (False, True):

            async def one(at: tuple[int, ...], late: bool = late) -> Run:
                return await interrupt_verb(world, VERBS[verb], at, cancelling(late=late), expect=_cancelled)

            reached = [at async for at, run in every_step(one) if run.interrupts == 1]
            for first in reached:
                async for _ in every_step(one, first=first, quiet_runs=1):
                    pass


def _by_timeout(work: Coroutine[Any, Any, Any], at: Iterable[int]) -> tuple[Coroutine[Any, Any, Any], Stepped]:
    limit = asyncio.timeout(None)

    def expire() -> None:
        limit.reschedule(asyncio.get_running_loop().time())

    stepped = Stepped(work, at, expire)

    async def run() -> Any:
        async with limit:
            return await stepped

    return run(), stepped


def _by_sibling(work: Coroutine[Any, Any, Any], at: Iterable[int]) -> tuple[Coroutine[Any, Any, Any], Stepped]:
    now = asyncio.Event()
    stepped = Stepped(work, at, now.set)

    async def sibling() -> None:
        await now.wait()
        raise ZeroDivisionError

    async def run() -> Any:
        async with asyncio.TaskGroup() as group:
            other = group.create_task(sibling())
            await stepped
            other.cancel()

    return run(), stepped


def _again_and_again(work: Coroutine[Any, Any, Any], at: Iterable[int]) -> tuple[Coroutine[Any, Any, Any], Stepped]:
    """As a cancelled scope of AnyIO does: at every turn of the loop, for as long as the task waits for something."""
    task: asyncio.Task[Any] | None = None

    def cancel() -> None:
        assert task is not None
        if not task.done():
            task.cancel()
            asyncio.get_running_loop().call_soon(cancel)

    stepped = Stepped(work, at, cancel)

    async def run() -> Any:
        nonlocal task
        task = asyncio.current_task()
        return await stepped

    return run(), stepped


def _by_scope(work: Coroutine[Any, Any, Any], at: Iterable[int]) -> tuple[Coroutine[Any, Any, Any], Stepped]:
    anyio = pytest.importorskip("anyio")
    scope: Any = None
    stepped = Stepped(work, at, lambda: scope.cancel())

    async def run() -> Any:
        nonlocal scope
        with anyio.CancelScope() as scope:
            await stepped
        if scope.cancelled_caught:
            raise asyncio.CancelledError

    return run(), stepped


def _by_two_timeouts(work: Coroutine[Any, Any, Any], at: Iterable[int]) -> tuple[Coroutine[Any, Any, Any], Stepped]:
    """The inner limit strikes, and while that is being handled the outer one."""
    inner, outer = asyncio.timeout(None), asyncio.timeout(None)

    def expire() -> None:
        now = asyncio.get_running_loop().time()
        (outer if stepped.interrupts > 1 else inner).reschedule(now)

    stepped = Stepped(work, [*at, *(step + 1 for step in at)], expire)

    async def run() -> Any:
        async with outer, inner:
            return await stepped

    return run(), stepped


WAYS: dict[str, tuple[Any, Callable[[BaseException | None], bool]]] = {
    "timeout": (_by_timeout, lambda error: isinstance(error, TimeoutError)),
    "two timeouts": (_by_two_timeouts, lambda error: isinstance(error, TimeoutError)),
    "sibling": (
        _by_sibling,
        lambda error: isinstance(error, ExceptionGroup) and isinstance(error.exceptions[0], ZeroDivisionError),
    ),
    "again and again": (_again_and_again, lambda error: isinstance(error, asyncio.CancelledError)),
    "anyio scope": (_by_scope, lambda error: isinstance(error, asyncio.CancelledError)),
}
REPEATING = ("again and again", "anyio scope")


@pytest.mark.parametrize("verb", MAIN_VERBS)
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.asyncio
async def test_interrupted_in_every_way(tmp_path: Path, way: str, verb: str) -> None:
    interrupted, is_expected = WAYS[way]

    def expect(run: Run) -> None:
        # A limit that strikes at the last moment may find the work done.
        assert is_expected(run.error) if run.error is not None else not run.interrupts or way != "again and again", run

    async with a_world(tmp_path, "files", "path", big=verb in ("save", "open('wb') new")) as world:

        async def one(at: tuple[int, ...]) -> Run:
            return await interrupt_verb(world, VERBS[verb], at, interrupted, expect=expect, repeats=way in REPEATING)

        async for _ in every_step(one, quiet_runs=2):
            pass


# -- a statement that lands after its caller has given up


class LateMeta(MemoryMetaBackend):
    """A database whose answer to a swap is too late: the statement lands when `land` is called."""

    def __init__(self) -> None:
        super().__init__()
        self.armed = False
        self.under_way = asyncio.Event()
        self._swap: Callable[[], Awaitable[Any]] | None = None

    async def _update(self, path: str, changes: Any, expect: Any, lease: Any) -> MetaRecord:
        if self.armed and "original_storage_path" in changes:
            self.armed = False
            self._swap = partial(super()._update, path, changes, expect, lease)
            self.under_way.set()
            await asyncio.Event().wait()
        return await super()._update(path, changes, expect, lease)

    async def land(self) -> None:
        swap, self._swap = self._swap, None
        if swap is not None:
            with contextlib.suppress(Conflict):
                await swap()


class MeetingBackend(MemoryBackend):
    """An original where the late statement lands right before bytes are discarded."""

    def __init__(self, meta: LateMeta) -> None:
        super().__init__()
        self._meta = meta

    async def _discard(self, key: str, *, token: str | None) -> None:
        await self._meta.land()
        await super()._discard(key, token=token)


@pytest.mark.parametrize("verb", ["replace", "move"])
@pytest.mark.parametrize("when", ["before the discard", "at last"])
@pytest.mark.asyncio
async def test_a_swap_that_lands_after_its_cancellation_finds_its_bytes(verb: str, when: str) -> None:
    """The worst case of a group commit with an fsync: the caller is cancelled while his swap is being committed."""
    async with asyncio.timeout(60):
        meta = LateMeta()
        backend = MeetingBackend if when == "before the discard" else lambda _: MemoryBackend()
        storage = ProxyStorage("media", originals={"a": backend(meta), "b": backend(meta)}, meta=meta)
        path = await storage.save("x.txt", OLD)
        meta.armed = True
        work = storage.replace(path, NEW) if verb == "replace" else storage.move(path, "b")
        task = asyncio.create_task(work)
        await meta.under_way.wait()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        await storage.cleanup.drain(within=30.0)
        await meta.land()
        for _ in range(2):
            async with storage.open(path, verify=True) as file:
                assert await file.read() in (OLD, NEW)
            await reconcile(storage, dry_run=False, force=True)
        await storage.aclose()
