"""Any one statement or operation goes without an answer, and takes effect at once, later, at the very end or never.

Whatever the moment, an acknowledged file is there and whole, an acknowledged delete stays, a failed call has happened
or has not, and nothing is left over. Exhaustive: each call of each verb in turn, each moment, with and without the
reads failing that would have settled it; by a deadline and by a cancellation.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from aproxy_storage import BackendUnavailable, DeadlineExceeded, ProxyStorage, Source, StorageError
from aproxy_storage.backends.filesystem import FileSystemBackend
from aproxy_storage.meta_backends.sqlite import SQLiteMetaBackend
from tests.proxy.support import SAFETY, assert_sound

pytestmark = pytest.mark.asyncio

Do = Callable[[], Awaitable[Any]]


@dataclass
class Script:
    """What goes wrong: the call number `at` (from 1) raises; it takes effect `after` so many further calls.

    0: at once, only the answer is lost; None: never; what is not due by the end of the verb, at the end of all.
    """

    at: int = 0
    after: int | None = None
    reads_fail: bool = False
    cancelled: bool = False
    on: bool = False
    log: list[str] = field(default_factory=list)
    late: Do | None = None

    async def call(self, label: str, do: Do) -> Any:
        if not self.on:
            return await do()
        self.log.append(label)
        if self.late is not None and self.after is not None and len(self.log) >= self.at + self.after:
            await self.land()
        if len(self.log) != self.at:
            return await do()
        if self.after == 0:
            with contextlib.suppress(StorageError):
                await do()
        elif self.after is not None:
            self.late = do
        if self.cancelled:
            raise asyncio.CancelledError
        raise DeadlineExceeded(f"no answer to {label}", outcome_unknown=True)

    async def read(self, label: str, do: Do) -> Any:
        if self.on and self.reads_fail and len(self.log) >= self.at > 0:
            self.reads_fail = False  # only the first
            raise BackendUnavailable(f"no {label} at this moment")
        return await do()

    async def land(self) -> None:
        late, self.late = self.late, None
        if late is not None:
            with contextlib.suppress(StorageError):
                await late()


class Meta(SQLiteMetaBackend):
    script: Script

    async def reserve(self, *args: Any, **kwargs: Any) -> Any:
        return await self.script.call("reserve", lambda: super(Meta, self).reserve(*args, **kwargs))

    async def create(self, *args: Any, **kwargs: Any) -> Any:
        return await self.script.call("create", lambda: super(Meta, self).create(*args, **kwargs))

    async def update(self, path: str, changes: Any, **kwargs: Any) -> Any:
        label = f"update {changes.get('state', '')}{'places' if 'places' in changes else ''}"
        return await self.script.call(label, lambda: super(Meta, self).update(path, changes, **kwargs))

    async def delete(self, *args: Any, **kwargs: Any) -> Any:
        return await self.script.call("delete", lambda: super(Meta, self).delete(*args, **kwargs))

    async def get(self, *args: Any, **kwargs: Any) -> Any:
        return await self.script.read("get", lambda: super(Meta, self).get(*args, **kwargs))

    async def owners(self, *args: Any, **kwargs: Any) -> Any:
        return await self.script.read("owners", lambda: super(Meta, self).owners(*args, **kwargs))


class Original(FileSystemBackend):
    script: Script

    async def write(self, key: str, source: Any, **kwargs: Any) -> Any:
        data = b"".join([chunk async for chunk in source.chunks()])  # which a late write has too

        async def do() -> Any:
            return await super(Original, self).write(key, Source.of(data), **kwargs)

        return await self.script.call("write", do)

    async def copy(self, *args: Any, **kwargs: Any) -> Any:
        return await self.script.call("copy", lambda: super(Original, self).copy(*args, **kwargs))

    async def discard(self, *args: Any, **kwargs: Any) -> Any:
        return await self.script.call("discard", lambda: super(Original, self).discard(*args, **kwargs))


Files = dict[str, bytes]
OLD: Files = {"a.txt": b"old"}


@dataclass
class Case:
    """A verb, given the directory to work in, and the files after it; before it there is `OLD`."""

    verb: Callable[[ProxyStorage, str], Awaitable[Any]]
    after: Files
    again: str  # the name that somebody saves right after
    options: dict[str, Any] = field(default_factory=dict)
    foreign: bool = False  # bytes that belong to nobody lie at n.txt


async def rewrite(storage: ProxyStorage, at: str) -> None:
    async with storage.open(f"{at}/a.txt", "wb") as file:
        await file.write(b"new")


SAVED = OLD | {"n.txt": b"new"}
REPLACED = {"a.txt": b"new"}
CASES = {
    "save": Case(lambda storage, at: storage.save(f"{at}/n.txt", b"new"), SAVED, "n.txt"),
    "save, token keys": Case(
        lambda storage, at: storage.save(f"{at}/n.txt", b"new"), SAVED, "n.txt", {"keys": "token"}
    ),
    "save onto foreign bytes": Case(
        lambda storage, at: storage.save(f"{at}/n.txt", b"new"), SAVED, "n.txt", foreign=True
    ),
    "replace": Case(lambda storage, at: storage.replace(f"{at}/a.txt", b"new"), REPLACED, "a.txt"),
    "replace, keep nothing": Case(
        lambda storage, at: storage.replace(f"{at}/a.txt", b"new"), REPLACED, "a.txt", {"keep_replaced": 0.0}
    ),
    "replace a version": Case(
        lambda storage, at: storage.replace(f"{at}/a.txt", b"new", expect_version=2), REPLACED, "a.txt"
    ),
    "rewrite": Case(rewrite, REPLACED, "a.txt"),
    "delete": Case(lambda storage, at: storage.delete(f"{at}/a.txt"), {}, "a.txt"),
    "rename": Case(lambda storage, at: storage.rename(f"{at}/a.txt", f"{at}/n.txt"), {"n.txt": b"old"}, "a.txt"),
    "copy": Case(lambda storage, at: storage.copy(f"{at}/a.txt", f"{at}/n.txt"), OLD | {"n.txt": b"old"}, "n.txt"),
    "move": Case(lambda storage, at: storage.move(f"{at}/a.txt", "other"), OLD, "a.txt"),
}


@dataclass
class Played:
    """What one play has to leave behind: `again` and one of `allowed`."""

    story: str
    again: str
    allowed: list[Files]


class Stage:
    """One storage for all plays of a case, each in a directory of its own."""

    def __init__(self, directory: Path, case: Case) -> None:
        self.case = case
        self.root = directory / "files"
        self.meta = Meta(directory / "meta.sqlite3")
        # The second lies in the first, so that one look at the disk finds everything.
        self.originals = {"fs": Original(self.root), "other": Original(self.root)}
        self.storage = ProxyStorage("media", originals=self.originals, meta=self.meta, **case.options)
        self.played: dict[str, Played] = {}

    async def play(self, script: Script, *, land_first: bool = False) -> None:
        """Play the case with `script`, then save `case.again`; what is not due lands before it, or after it."""
        case, storage, at = self.case, self.storage, str(len(self.played))
        for one in (self.meta, *self.originals.values()):
            one.script = script
        await storage.save(f"{at}/a.txt", OLD["a.txt"])
        if case.foreign:
            (self.root / at / "n.txt").write_bytes(b"foreign")
        script.on = True
        try:
            await case.verb(storage, at)
            allowed = [case.after]
        except (StorageError, asyncio.CancelledError):
            allowed = [OLD, case.after]
        await storage.cleanup.drain(within=10)
        script.on = False
        if land_first:
            await script.land()
        path = await storage.save(f"{at}/{case.again}", b"again")
        await script.land()
        story = f"{script} land_first={land_first}"
        async with storage.open(path) as file:
            assert await file.read() == b"again", story
        self.played[at] = Played(story, path, allowed)

    async def judge(self, directory: Path) -> None:
        await self.storage.aclose()
        if self.case.foreign:
            for path in self.root.glob("*/n.txt"):
                assert path.read_bytes() == b"foreign", self.played[path.parent.name].story
                path.unlink()
        files = await assert_sound(directory, "other", **self.case.options)
        for at, played in self.played.items():
            assert files.pop(played.again, None) == b"again", played.story
            left = {path.removeprefix(f"{at}/"): files.pop(path) for path in list(files) if path.startswith(f"{at}/")}
            assert left in played.allowed, f"{left} after {played.story}"
        assert files == {}


@pytest.mark.parametrize("cancelled", [False, True], ids=["deadline", "cancelled"])
@pytest.mark.parametrize("name", list(CASES))
async def test_any_call_without_an_answer(
    tmp_path: Path, name: str, cancelled: bool, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.CRITICAL)
    stage = Stage(tmp_path, CASES[name])
    async with asyncio.timeout(SAFETY):
        calm = Script()  # once without trouble, to learn how many calls there are
        await stage.play(calm)
        for at in range(1, len(calm.log) + 1):
            # `after` 1 to 4: amid the undo, before each of its calls; 99: after it.
            for after in (0, 1, 2, 3, 4, 99, None):
                await stage.play(Script(at, after, cancelled=cancelled))
                await stage.play(Script(at, after, cancelled=cancelled, reads_fail=True))
                if after == 99:
                    await stage.play(Script(at, after, cancelled=cancelled), land_first=True)
        await stage.judge(tmp_path)
    assert calm.log
