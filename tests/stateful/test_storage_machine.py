"""A storage against a dict, under faults, by Hypothesis.

A verb that has succeeded has exactly its effect. One that has raised has none, or, where its outcome is unknown, none
or all of it. In the end every record is a plain stored one, and every key with bytes is named by exactly one.
"""

from __future__ import annotations

import asyncio
import itertools
import os
import shutil
import tempfile
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Coroutine, Iterable
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule

from aproxy_storage import (
    AlreadyExists,
    BackendUnavailable,
    ByteRange,
    CommonPrefix,
    Conflict,
    IntegrityError,
    NotFound,
    ProxyStorage,
    StorageError,
    paths,
    proxy_writing,
)
from aproxy_storage.backends.filesystem import FileSystemBackend
from aproxy_storage.backends.memory import MemoryBackend
from aproxy_storage.errors import outcome_unknown
from aproxy_storage.meta_backends.memory import MemoryMetaBackend
from aproxy_storage.meta_backends.sqlite import SQLiteMetaBackend
from aproxy_storage.records import STORED
from aproxy_storage.testing.faults import Fail, Fault, FaultyBackend, FaultyMetaBackend, Late, Lie, Plan
from aproxy_storage.tools.reconcile import reconcile

SAFETY = 60.0
LEASE, SETTLE = 60.0, 900.0


class File(NamedTuple):
    """What the model knows of a stored file."""

    content: bytes
    original: str


Options = tuple[File | None, ...]  # what may be at a path; None: nothing


# -- faults


class Crashed(BaseException):
    """The process is dead: nothing that it does from here on reaches anybody."""


class Hangs(Fault):
    """The service never answers; its client gives up after a short while."""

    async def __call__(self, call: Any) -> Any:
        async with asyncio.timeout(0.002):
            await asyncio.Event().wait()


class Cancels(Fault):
    """The caller is cancelled while the call is under way."""

    async def __call__(self, call: Any) -> Any:
        task = asyncio.current_task()
        assert task is not None
        task.cancel()
        return await call()


_READS = {"get", "exists", "get_many", "list_unfinished", "owners", "count", "stat", "read", "chunk", "item", "url"}


class Schedule(Plan):
    """Gives the n-th call from now on, whatever it is, a fault."""

    def __init__(self) -> None:
        super().__init__()
        self.late = Late()
        self.on_their_way = 0  # late operations
        self.dead = False
        self.fired = 0
        self.arm({})

    def arm(self, faults: dict[int, str]) -> None:
        self.at = faults
        self.count = self.fired = 0
        self.down = False

    def next(self, operation: str, key: str | None = None) -> Fault:
        if operation in ("after_commit", "setup"):  # no service is asked
            return _Dead() if self.dead else Fault()
        self.count += 1
        kind = self.at.get(self.count)
        if kind is not None:
            self.fired += 1
        if self.dead or kind == "crash":
            self.dead = True
            return _Dead()
        self.down = self.down or kind == "down"
        if kind == "crash after":
            return _DiesAfter(self)
        if self.down or kind == "fail" or (kind in ("late", "lie") and operation in _READS):
            return Fail(BackendUnavailable("out of order"))
        if kind == "late":
            self.on_their_way += 1
            return self.late
        return {"lie": Lie, "hang": Hangs, "cancel": Cancels}.get(kind or "", Fault)()

    async def land(self) -> None:
        self.on_their_way = 0
        await self.late.land()


class _Dead(Fault):
    async def __call__(self, call: Any) -> Any:
        raise Crashed


class _DiesAfter(Fault):
    def __init__(self, schedule: Schedule) -> None:
        self._schedule = schedule

    async def __call__(self, call: Any) -> Any:
        try:
            await call()
        finally:
            self._schedule.dead = True
        raise Crashed


KINDS = ("fail", "lie", "late", "hang", "cancel", "down", "crash", "crash after")
one_fault = st.tuples(st.sampled_from(range(1, 9)), st.sampled_from(KINDS))
faults = st.one_of(
    st.just({}),
    one_fault.map(lambda fault: dict([fault])),
    one_fault.map(lambda fault: dict([fault])),
    st.tuples(one_fault, one_fault).map(dict),
)

# No name is the directory of another: on a file system there can be only one of them.
NAMES = ("a.txt", "b.txt", "d/a.txt", "d/e/x.tar.gz", "d/é ü.txt", "z")
names = st.sampled_from(NAMES)
originals = st.sampled_from(["a", "b"])
contents = st.one_of(
    st.binary(max_size=12),
    st.integers(0, 255).map(lambda n: bytes([n]) * 1500),  # more than a chunk
)
any_index = st.integers(0, 30)


async def _pieces(content: bytes) -> Any:
    for start in range(0, len(content), 400):
        await asyncio.sleep(0)
        yield content[start : start + 400]


class StorageMachine(RuleBasedStateMachine):
    """Rules are verbs, each with faults of its own, and what goes on between them."""

    in_memory = True

    def __init__(self) -> None:
        super().__init__()
        # Names are drawn in turn: what is listed in another order the next time cannot be played again.
        turn = itertools.count()
        self.drawn = mock.patch.object(paths, "_random", lambda length: f"{next(turn):0{length}}")
        self.drawn.start()
        self.patience = mock.patch.object(proxy_writing, "_PATIENCE", 0.01)  # with saves that were killed
        self.patience.start()
        self.runner = asyncio.Runner()
        self.directory = Path(tempfile.mkdtemp(prefix="aproxy-machine-"))
        self.files: dict[str, File] = {}
        # While operations are on their way that may still take effect:
        self.uncertain: dict[str, Options] = {}
        self.maybe: list[tuple[str, File]] = []  # (name, file): may appear under that name or one made of it
        self.foreign: dict[tuple[str, str], bytes] = {}  # (original, key) -> bytes that no record has ever named
        self.attempted: dict[tuple[str, str], bytes] = {}  # … of which somebody has tried to adopt
        self.passed = 0.0  # seconds that the database's clock is ahead

    @initialize(keys=st.sampled_from(["path", "token"]), keep_replaced=st.sampled_from([0.0, 60.0]))
    def begin(self, keys: Any, keep_replaced: float) -> None:
        if self.in_memory:
            self.inner: dict[str, Any] = {"a": MemoryBackend(), "b": MemoryBackend()}
            self.inner_meta: Any = MemoryMetaBackend(clock=lambda: time.monotonic() + self.passed)
        else:
            self.inner = {name: FileSystemBackend(self.directory / name) for name in "ab"}
            self.inner_meta = SQLiteMetaBackend(self.directory / "meta.db")
        self.plan = Schedule()
        self.keys, self.keep_replaced = keys, keep_replaced
        self.storage = self.new_storage()
        self.save("a.txt", b"first", False, None, {})
        self.save("d/a.txt", b"second", False, None, {})

    def new_storage(self) -> ProxyStorage:
        return ProxyStorage(
            "media",
            originals={name: FaultyBackend(backend, self.plan) for name, backend in self.inner.items()},
            meta=FaultyMetaBackend(self.inner_meta, self.plan),
            keys=self.keys,
            keep_replaced=self.keep_replaced,
            lease=LEASE,
            settle=SETTLE,
            chunk_bytes=1000,
        )

    def run(self, work: Coroutine[Any, Any, Any]) -> Any:
        async def safely() -> Any:
            async with asyncio.timeout(SAFETY):
                return await work

        return self.runner.run(safely())

    # -- one verb under faults

    def attempt(self, work: Callable[[], Awaitable[Any]], plan: dict[int, str]) -> tuple[Any, BaseException | None]:
        """Run a verb in a task of its own; let its cleanup end; return its value or its error."""

        async def attempt() -> tuple[Any, BaseException | None]:
            async def verb() -> Any:
                return await work()

            self.plan.arm(plan)
            task = asyncio.create_task(verb())
            await asyncio.wait({task})
            error = asyncio.CancelledError() if task.cancelled() else task.exception()
            await self.storage.cleanup.drain(within=SAFETY)
            self.plan.arm({})
            return (None, error) if error is not None else (task.result(), None)

        fired_before = self.plan.fired
        value, error = self.run(attempt())
        assert fired_before == 0
        if self.plan.dead:
            error = error or Crashed()  # an answer that nobody has got
            self.plan.dead = False
            self.storage = self.new_storage()
        assert error is None or isinstance(error, StorageError | Crashed | asyncio.CancelledError), repr(error)
        return value, error

    def settled(self, error: BaseException | None, plan: dict[int, str], *expected: type[Exception]) -> bool:
        """Return whether the verb may have had an effect although it raised; no error comes without a reason."""
        assert error is not None
        if not plan:
            assert isinstance(error, expected), repr(error)
        return outcome_unknown(error)

    def options(self, path: str) -> Options:
        return self.uncertain.get(path, (self.files.get(path),))

    def may_be(self, path: str, *files: File | None) -> None:
        self.uncertain[path] = tuple(dict.fromkeys((*self.options(path), *files)))

    def is_now(self, path: str, file: File | None) -> None:
        self.uncertain.pop(path, None)
        if file is None:
            self.files.pop(path, None)
        else:
            self.files[path] = file

    def look(self) -> None:
        """Compare what a reader sees with what may be; what cannot change any more is certain from here on."""

        async def see() -> dict[str, tuple[str | None, File]]:
            found = {}
            async for record in self.storage.list():
                async with self.storage.open(record, verify=record.checksum is not None) as file:
                    content = await file.read()
                assert record.size == len(content)
                found[record.path] = (record.name, File(content, record.original_storage_name))
            return found

        seen = self.run(see())
        for path in seen.keys() | self.files.keys() | self.uncertain.keys():
            name, file = seen.get(path, (None, None))
            options = self.options(path)
            if file in options:
                continue
            # Not where it should be: it can only be a save whose outcome was unknown, under a name that may be free.
            assert path not in self.files or None in options, f"{path!r} is {file}, and may be {options}"
            assert (name, file) in self.maybe, f"{path!r} is {file}: nobody has saved that"
            assert name is not None
            self.maybe.remove((name, file))
            self.is_now(path, file)
        if not self.plan.on_their_way:
            self.files = {path: file for path, (_, file) in seen.items()}
            self.uncertain.clear()
            self.maybe.clear()

    def pick(self, index: int, *, certain: bool = False) -> str | None:
        paths = sorted(path for path in self.files if not (certain and path in self.uncertain))
        return paths[index % len(paths)] if paths else None

    def is_unfinished(self, path: str) -> bool:
        """Return whether something invisible is in the way at `path`."""

        async def ask() -> bool:
            try:
                return (await self.inner_meta.get(path)).state != STORED
            except NotFound:
                return False

        return bool(self.run(ask()))

    # -- the verbs

    @rule(name=names, content=contents, streamed=st.booleans(), using=st.none() | originals, plan=faults)
    def save(self, name: str, content: bytes, streamed: bool, using: str | None, plan: dict[int, str]) -> None:
        free = not self.is_unfinished(name) and self.options(name) == (None,)
        given: Any = _pieces(content) if streamed else content
        path, error = self.attempt(lambda: self.storage.save(name, given, using=using), plan)
        file = File(content, using or "a")
        if error is None:
            assert path == name or not free or self.plan.on_their_way
            assert path not in self.files or path in self.uncertain, f"{path!r} was given away twice"
            self.is_now(path, file)
        elif self.settled(error, plan):
            self.maybe.append((name, file))
        self.look()

    @precondition(lambda self: self.files)
    @rule(at=any_index, content=contents, using=st.none() | originals, version=st.integers(-1, 2), plan=faults)
    def replace(self, at: int, content: bytes, using: str | None, version: int, plan: dict[int, str]) -> None:
        path = self.pick(at)
        if path is None:
            return
        before = self.options(path)
        expect = None
        if version >= 0 and before == (self.files[path],):
            expect = self.run(self.storage.get(path)).version + (version == 2)
        file = File(content, using or "a")
        _, error = self.attempt(lambda: self.storage.replace(path, content, using=using, expect_version=expect), plan)
        if error is None:
            assert version != 2 or expect is None
            self.is_now(path, file)
        elif isinstance(error, NotFound):
            assert None in before
        elif self.settled(error, plan, Conflict):
            self.may_be(path, file)
        else:
            assert plan or expect is not None
        self.look()

    @rule(path=names, content=contents, mode=st.sampled_from(["wb", "xb"]), breaks=st.booleans(), plan=faults)
    def write(self, path: str, content: bytes, mode: Any, breaks: bool, plan: dict[int, str]) -> None:
        before = self.options(path)
        blocked = self.is_unfinished(path) or self.plan.on_their_way
        file = File(content, "a")

        async def work() -> None:
            async with self.storage.open(path, mode) as handle:
                for start in range(0, len(content), 700):
                    await handle.write(content[start : start + 700])
                if breaks:
                    raise BackendUnavailable("the caller's own trouble")

        _, error = self.attempt(work, plan)
        if error is None:
            assert not breaks
            assert mode == "wb" or None in before
            self.is_now(path, file)
        elif breaks and not plan:
            assert "own trouble" in str(error) or isinstance(error, AlreadyExists)
        elif self.settled(error, plan, AlreadyExists, Conflict):  # the latter: a save of the name was killed
            self.may_be(path, file)
        elif not plan:
            assert blocked or mode == "xb"
        self.look()

    @precondition(lambda self: self.files)
    @rule(at=any_index, missing_ok=st.booleans(), plan=faults)
    def delete(self, at: int, missing_ok: bool, plan: dict[int, str]) -> None:
        path = self.pick(at)
        if path is None:
            return
        before = self.options(path)
        _, error = self.attempt(lambda: self.storage.delete(path, missing_ok=missing_ok), plan)
        if error is None:
            self.is_now(path, None)
        elif isinstance(error, NotFound):
            assert None in before
        elif self.settled(error, plan):
            self.may_be(path, None)
        self.look()

    @precondition(lambda self: self.files)
    @rule(at=any_index, goal=names, plan=faults)
    def rename(self, at: int, goal: str, plan: dict[int, str]) -> None:
        path = self.pick(at, certain=True)
        if path is None or goal in self.uncertain or goal == path:
            return
        taken = goal in self.files
        blocked = self.is_unfinished(goal) or self.plan.on_their_way
        file = self.files[path]
        name = self.run(self.storage.get(path)).name
        _, error = self.attempt(lambda: self.storage.rename(path, goal), plan)
        if error is None:
            assert not taken
            self.is_now(path, None)
            self.is_now(goal, file)
        elif isinstance(error, AlreadyExists) and not plan:
            assert taken or blocked
        elif self.settled(error, plan):
            self.may_be(path, None)
            self.maybe.append((name, file))  # under `goal`, even if that has become free only meanwhile
            if not self.plan.on_their_way:
                self.look()
                assert taken or (path in self.files) != (goal in self.files)
        self.look()

    @precondition(lambda self: self.files)
    @rule(at=any_index, name=names, using=st.none() | originals, plan=faults)
    def copy(self, at: int, name: str, using: str | None, plan: dict[int, str]) -> None:
        path = self.pick(at, certain=True)
        if path is None:
            return
        source = self.files[path]
        file = File(source.content, using or source.original)
        new, error = self.attempt(lambda: self.storage.copy(path, name, using=using), plan)
        if error is None:
            assert new not in self.files or new in self.uncertain
            self.is_now(new, file)
        elif self.settled(error, plan):
            self.maybe.append((name, file))
        self.look()

    @precondition(lambda self: self.files)
    @rule(at=any_index, using=originals, plan=faults)
    def move(self, at: int, using: str, plan: dict[int, str]) -> None:
        path = self.pick(at, certain=True)
        if path is None:
            return
        file = File(self.files[path].content, using)
        _, error = self.attempt(lambda: self.storage.move(path, using), plan)
        if error is None:
            self.is_now(path, file)
        elif self.settled(error, plan):
            self.may_be(path, file)
        self.look()

    @rule(original=originals, key=names, content=contents)
    def somebody_else_writes(self, original: str, key: str, content: bytes) -> None:
        async def put() -> bool:
            if (await self.inner_meta.owners(original, [key])).get(key):
                return False  # that would be our own file
            if not self.in_memory:  # by hand, so without a token
                file = self.directory / original / key
                file.parent.mkdir(parents=True, exist_ok=True)
                if file.exists():
                    return False
                file.write_bytes(content)
                return True
            try:
                await self.inner[original].write(key, content)
            except AlreadyExists:
                return False
            return True

        if self.run(put()):
            self.foreign[original, key] = content
            self.attempted.pop((original, key), None)

    @precondition(lambda self: self.foreign)
    @rule(at=any_index, plan=faults)
    def adopt(self, at: int, plan: dict[int, str]) -> None:
        original, key = sorted(self.foreign)[at % len(self.foreign)]
        content = self.foreign.pop((original, key))
        self.attempted[original, key] = content
        path, error = self.attempt(lambda: self.storage.adopt(key, using=original), plan)
        file = File(content, original)
        if error is None:
            assert path not in self.files or path in self.uncertain
            self.is_now(path, file)
        elif self.settled(error, plan, AlreadyExists):  # a failed save still names the key
            self.maybe.append((key, file))
        self.look()

    # -- reading

    @precondition(lambda self: self.files)
    @rule(at=any_index, start=st.integers(0, 1600), length=st.none() | st.integers(0, 1600), plan=faults)
    def read(self, at: int, start: int, length: int | None, plan: dict[int, str]) -> None:
        path = self.pick(at)
        if path is None:
            return
        byte_range = ByteRange(start, None if length is None else start + length)

        async def work() -> bytes:
            async with self.storage.open(path, byte_range=byte_range) as file:
                return b"".join([chunk async for chunk in file])

        data, error = self.attempt(work, plan)
        options = self.options(path)
        if error is None:
            wanted = slice(start, None if length is None else start + length)
            assert data in [file.content[wanted] for file in options if file is not None]
        else:
            assert not isinstance(error, IntegrityError), "the bytes of a stored file are gone"
            assert plan or (isinstance(error, NotFound) and None in options)

    @precondition(lambda self: not self.uncertain and not self.maybe)
    @rule(
        prefix=st.sampled_from(["", "d", "d/", "d/e/", "nothing", "z"]),
        after=st.none() | names,
        limit=st.none() | st.integers(0, 4),
        delimiter=st.none() | st.just("/"),
    )
    def list_files(self, prefix: str, after: str | None, limit: int | None, delimiter: Any) -> None:
        async def work() -> Any:
            entries = self.storage.list(prefix, after=after, limit=limit, delimiter=delimiter)
            return [(entry.path, isinstance(entry, CommonPrefix)) async for entry in entries]

        wanted: dict[tuple[str, bool], None] = {}
        for path in sorted(self.files, key=str.encode):
            if not path.startswith(prefix) or (after is not None and path.encode() <= after.encode()):
                continue
            at = path.find("/", len(prefix)) if delimiter else -1
            wanted[(path, False) if at < 0 else (path[: at + 1], True)] = None
        assert self.run(work()) == [*wanted][:limit]

    @precondition(lambda self: not self.uncertain and not self.maybe)
    @rule()
    def ask(self) -> None:
        async def work() -> None:
            asked = sorted({*NAMES, *self.files})
            for path, record in zip(asked, await self.storage.get_many(asked), strict=True):
                file = self.files.get(path)
                assert await self.storage.exists(path) == (file is not None)
                assert (record is not None) == (file is not None)
                if file is not None:
                    assert await self.storage.size(path) == len(file.content)
                    assert (await self.storage.get(path)).path == path

        self.run(work())

    # -- what goes on between

    @rule(what=st.sampled_from(["reconcile", "leases", "settle", "restart", "alone"]), plan=faults)
    def meanwhile(self, what: str, plan: dict[int, str]) -> None:
        if what == "leases" and self.in_memory:
            self.leases_run_out(plan)
        elif what == "settle" and self.in_memory:
            self.everything_settles(plan)
        elif what == "restart":
            self.restart()
        elif what == "alone":
            self.reconcile_alone()
        else:
            self.reconcile_beside(plan)

    def reconcile_beside(self, plan: dict[int, str]) -> None:
        """No file changes by it, whatever it finds."""
        _, error = self.attempt(lambda: reconcile(self.storage, dry_run=False), plan)
        assert error is None or plan
        self.look()

    def leases_run_out(self, plan: dict[int, str]) -> None:
        """What is on its way may be late, but no later than `settle`."""
        self.passed += LEASE + 1
        self.reconcile_beside(plan)

    def everything_settles(self, plan: dict[int, str]) -> None:
        self.land()
        self.passed += SETTLE + 1
        self.reconcile_beside(plan)

    @precondition(lambda self: self.plan.on_their_way)
    @rule()
    def land(self) -> None:
        """Operations that were given up take effect after all."""
        self.run(self.plan.land())
        self.look()

    def restart(self) -> None:
        self.storage = self.new_storage()
        self.look()

    def reconcile_alone(self) -> None:
        self.land()
        self.run(reconcile(self.storage, dry_run=False, force=True))
        # Every object has a token there: force leaves what was adopted to runs that wait, at most for two deadlines.
        for _ in range(2 if self.in_memory else 0):
            self.passed += LEASE + SETTLE + 1
            self.run(reconcile(self.storage, dry_run=False))
        self.look()
        self.run(self.check_nothing_is_left())

    async def check_nothing_is_left(self) -> None:
        owners: Counter[tuple[str, str]] = Counter()
        async for record in self.inner_meta.list():
            assert record.state == STORED, record
            assert record.lease is None, record
            assert record.places == (), record
            owners[record.original_storage_name, record.original_storage_path] += 1
        assert set(owners.values()) <= {1}, owners
        foreign = self.foreign | self.attempted
        for name, backend in self.inner.items():
            lying = {info.key async for info in backend.list()}
            named = {key for original, key in owners if original == name}
            assert named <= lying
            assert lying - named <= {key for original, key in foreign if original == name}
            assert lying >= {key for original, key in self.foreign if original == name}
            for key in lying - named:
                async with backend.read(key) as reading:
                    assert b"".join([chunk async for chunk in reading]) == foreign[name, key]
            if not self.in_memory:
                assert not list_hidden(self.directory / name)

    def teardown(self) -> None:
        try:
            if hasattr(self, "storage"):
                self.reconcile_alone()
                self.run(self.storage.aclose())
        finally:
            self.drawn.stop()
            self.patience.stop()
            self.runner.close()
            shutil.rmtree(self.directory, ignore_errors=True)


def list_hidden(directory: Path) -> Iterable[Path]:
    return [path for path in directory.rglob(".*") if path.is_file()]


class FilesMachine(StorageMachine):
    in_memory = False


def case(machine: type[StorageMachine], examples: int, steps: int) -> Any:
    """Return the test case of `machine`, so large."""
    test: Any = type(f"Test{machine.__name__}", (machine.TestCase,), {})
    test.settings = settings(
        max_examples=examples,
        stateful_step_count=steps,
        deadline=None,
        derandomize=bool(os.environ.get("CI")),
        phases=[Phase.explicit, Phase.reuse, Phase.generate, Phase.shrink],  # explaining takes minutes
        suppress_health_check=list(HealthCheck),
    )
    return test


SOAK = 10 if os.environ.get("APROXY_SOAK") else 1

TestInMemory = case(StorageMachine, 150, 30)
TestOnDisk = case(FilesMachine, 20, 25)
TestInMemoryForLong = pytest.mark.soak(case(StorageMachine, 100 * SOAK, 50))
TestOnDiskForLong = pytest.mark.soak(case(FilesMachine, 15 * SOAK, 50))
