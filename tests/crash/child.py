"""The process that gets killed: many tasks that change files, each saying what it is about to do, and what it did.

Run as ``python -m tests.crash.child``, it is a nursery: it has imported the library and done nothing else, reads a line
of JSON for each child to be born, forks it, and answers with its process id, then with how it ended. So a kill costs
a fork, not the start of an interpreter.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import os
import random
import signal
import sys
import traceback
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any

from aproxy_storage import ProxyStorage, StorageError
from aproxy_storage.tools.reconcile import reconcile
from tests.crash.arena import ORIGINALS, Arena
from tests.crash.steps import Fuse, SteppedFiles, SteppedRecords, install, verb

TASKS = 16
MEBIBYTE = 1 << 20

#: New files want these names, so most get the next free one; and renamed files leave them with their keys.
NAMES = ["x.txt", "y.tar.gz", "d/x.txt", "d/e/z", "d/e/f/deep.bin", "привет.txt"]


def checksum(data: bytes) -> str:
    return f"sha256:{hashlib.sha256(data).hexdigest()}"


class Workload:
    """One child's life. `start` is what is there when it begins, as the ledger knows it."""

    def __init__(self, arena: Arena, storage: ProxyStorage, start: dict[str, Any], seed: int, focus: str) -> None:
        self.arena = arena
        self.storage = storage
        self.random = random.Random(seed)
        self.seed = seed
        self.focus = focus
        self.owned: list[tuple[str, str, int]] = [tuple(file) for file in start["files"]]  # path, sha, born
        self.foreign: list[tuple[str, str, str]] = [tuple(file) for file in start["foreign"]]
        self.contested = list(start["contested"])
        self.number = start["number"]
        self.log = os.open(arena.log, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
        self.on_first: Callable[[], None] = lambda: None

    # -- the log

    def write(self, line: dict[str, Any]) -> None:
        os.write(self.log, (json.dumps(line) + "\n").encode())

    def intend(self, do: str, **intent: Any) -> int:
        self.number += 1
        self.write({"n": self.number, "do": do, **intent})
        return self.number

    async def act(self, do: str, work: Callable[[], Awaitable[Any]], **intent: Any) -> tuple[bool, Any, int]:
        """Do one thing between two lines in the log; return whether it was done, its answer, and its number."""
        verb.set(do)
        number = self.intend(do, **intent)
        try:
            answer = await work()
        except StorageError as error:
            self.write({"n": number, "unknown" if error.outcome_unknown else "no": repr(error)})
            return False, error, number
        except asyncio.CancelledError:
            self.write({"n": number, "unknown": "cancelled"})
            return False, None, number
        self.write({"n": number, "ok": answer if isinstance(answer, str | list) else None})
        self.on_first()
        return True, answer, number

    # -- contents

    def content(self) -> tuple[Any, str, Callable[[], AsyncIterator[bytes]]]:
        """Return content, its checksum, and the same content in pieces; mostly small, sometimes large or empty."""
        self.number += 1
        mark = f"{self.seed}/{self.number} ".encode()
        kind = self.random.random()
        if kind < 0.05:
            data = b""
        elif kind < 0.12:
            data = (mark * (MEBIBYTE // len(mark) + 1))[:MEBIBYTE]
        else:
            data = mark * self.random.randint(1, 200)

        async def pieces() -> AsyncIterator[bytes]:
            for at in range(0, len(data), 100_000):
                yield data[at : at + 100_000]
                await asyncio.sleep(0)

        as_pieces = len(data) > 100_000 or self.random.random() < 0.1
        return pieces() if as_pieces else data, checksum(data), pieces

    def name(self) -> str:
        if self.random.random() < 0.7:
            return self.random.choice(NAMES)
        self.number += 1
        return f"n/{self.number % 7}/{self.number}.dat"

    def original(self) -> str:
        return self.random.choice(ORIGINALS)

    # -- the tasks

    async def run(self) -> None:
        async with asyncio.TaskGroup() as group:
            for index in range(TASKS):
                group.create_task(self.task(self.owned[index::TASKS], self.foreign[index::TASKS]))

    async def task(self, files: list[tuple[str, str, int]], foreign: list[tuple[str, str, str]]) -> None:
        verbs: dict[str, tuple[float, Callable[..., Awaitable[None]]]] = {
            "save": (20, self.save), "save many": (3, self.save_many), "failing save": (4, self.failing_save),
            "failing replace": (3, self.failing_replace),
            "cancelled": (4, self.cancelled), "plant": (3, self.plant), "overwrite": (6, self.overwrite),
            "erase": (4, self.erase), "copy contested": (2, self.copy_contested), "replace": (14, self.replace),
            "move": (8, self.move), "copy": (8, self.copy), "rename": (10, self.rename), "delete": (16, self.delete),
            "delete many": (3, self.delete_many), "read": (6, self.read), "reuse": (2, self.reuse),
        }  # fmt: skip
        weights = [weight for weight, _ in verbs.values()]
        while True:
            chosen = self.random.choices(list(verbs), weights)[0]
            if self.focus and self.random.random() < 0.4:
                chosen = self.focus
            if len(files) > 5:
                chosen = "delete many"
            elif not files and chosen in (
                "replace",
                "move",
                "copy",
                "rename",
                "delete",
                "delete many",
                "read",
                "reuse",
                "failing replace",
            ):
                chosen = "save"
            if chosen == "plant" and foreign:
                await self.take_in(files, foreign)
            elif chosen == "plant":
                await self.plant(files, foreign)
            else:
                await verbs[chosen][1](files)

    async def save(self, files: list[Any], name: str | None = None) -> None:
        name, (content, sha, _) = name or self.name(), self.content()
        using = self.random.choice([None, *ORIGINALS])
        done, path, number = await self.act(
            "save", lambda: self.storage.save(name, content, using=using), name=name, sha=sha
        )
        if done:
            files.append((path, sha, number))

    async def save_many(self, files: list[Any]) -> None:
        verb.set("save")
        items = {}
        for index in range(3):
            content, sha, _ = self.content()
            name = f"many/{self.number}-{index}.txt"
            items[name] = (content, sha, self.intend("save", name=name, sha=sha))
        pairs = [(name, content) for name, (content, _, _) in items.items()]
        async for result in self.storage.save_many(pairs, concurrency=2):
            _, sha, number = items[result.item]
            if result.ok:
                self.write({"n": number, "ok": result.value})
                self.on_first()
                files.append((result.value, sha, number))
            else:
                self.write({"n": number, "unknown" if result.error.outcome_unknown else "no": repr(result.error)})

    async def broken(self) -> AsyncIterator[bytes]:
        yield b"?" * self.random.choice([0, 10, 600_000])
        await asyncio.sleep(0)
        raise OSError("the caller's disk is broken")

    async def failing_save(self, files: list[Any]) -> None:
        name = self.name()
        done, _, _ = await self.act("save", lambda: self.storage.save(name, self.broken()), name=name, sha="none")
        if done:
            self.write({"wrong": f"content that failed was stored as {name!r}"})

    async def failing_replace(self, files: list[Any]) -> None:
        path, _, born = self.random.choice(files)
        done, _, _ = await self.act(
            "replace", lambda: self.storage.replace(path, self.broken()), path=path, sha="none", born=born
        )
        if done:
            self.write({"wrong": f"content that failed was put into {path!r}"})

    async def cancelled(self, files: list[Any]) -> None:
        name, (content, sha, _) = self.name(), self.content()
        after = self.random.random() * 0.01
        what = self.random.choice(["save", "save", "delete", "replace", "rename"])
        work: Callable[[], Awaitable[Any]]
        if what == "save" or not files:
            intent = {"do": "save", "name": name, "sha": sha}
            work = lambda: self.storage.save(name, content)  # noqa: E731
        else:
            path, old, born = files.pop()
            intent = {
                "do": what,
                "path": path,
                "born": born,
                "sha": old if what != "replace" else sha,
                "to": f"to/{born}",
            }
            work = {
                "delete": lambda: self.storage.delete(path),
                "replace": lambda: self.storage.replace(path, content),
                "rename": lambda: self.storage.rename(path, f"to/{born}"),
            }[what]

        async def limited() -> Any:
            task = asyncio.get_running_loop().create_task(work())  # type: ignore[arg-type]
            await asyncio.wait([task], timeout=after)
            task.cancel()
            return await task

        done, answer, number = await self.act(work=limited, **intent)
        if not done:
            return
        if intent["do"] == "save":
            files.append((answer, sha, number))
        elif what == "replace":
            files.append((path, sha, born))
        elif what == "rename":
            files.append((f"to/{born}", old, born))

    async def replace(self, files: list[Any]) -> None:
        index = self.random.randrange(len(files))
        path, _, born = files[index]
        content, sha, pieces = self.content()

        async def through_a_handle() -> None:
            async with self.storage.open(path, "wb") as file:
                async for piece in pieces():
                    await file.write(piece)

        work = (lambda: self.storage.replace(path, content)) if self.random.random() < 0.7 else through_a_handle
        done, _, _ = await self.act("replace", work, path=path, sha=sha, born=born)
        if done:
            files[index] = (path, sha, born)
        else:
            del files[index]

    async def move(self, files: list[Any]) -> None:
        path, sha, born = self.random.choice(files)
        using = self.original()
        await self.act("move", lambda: self.storage.move(path, using), path=path, sha=sha, born=born)

    async def copy(self, files: list[Any]) -> None:
        path, sha, _ = self.random.choice(files)
        await self._copy(files, path, sha)

    async def copy_contested(self, files: list[Any]) -> None:
        await self._copy(files, self.random.choice(self.contested), None)

    async def _copy(self, files: list[Any], path: str, sha: str | None) -> None:
        name = self.name()
        using = self.random.choice([None, *ORIGINALS])

        async def work() -> list[Any]:
            new = await self.storage.copy(path, name, using=using)
            return [new, (await self.storage.get(new)).checksum]

        done, answer, number = await self.act("copy", work, name=name, sha=sha)
        if done:
            files.append((answer[0], sha or answer[1], number))

    async def rename(self, files: list[Any]) -> None:
        index = self.random.randrange(len(files))
        path, sha, born = files[index]
        to = self.name()
        if to == path:
            return
        done, _, _ = await self.act(
            "rename", lambda: self.storage.rename(path, to), path=path, to=to, sha=sha, born=born
        )
        if done:
            files[index] = (to, sha, born)

    async def reuse(self, files: list[Any]) -> None:
        """Rename a file, and save another under the name it had, so that the key is taken and the path is free."""
        path, sha, born = files.pop(self.random.randrange(len(files)))
        self.number += 1
        to = f"from/{self.number}"
        done, _, _ = await self.act(
            "rename", lambda: self.storage.rename(path, to), path=path, to=to, sha=sha, born=born
        )
        if done:
            files.append((to, sha, born))
            await self.save(files, path)

    async def delete(self, files: list[Any]) -> None:
        path, sha, born = files.pop(self.random.randrange(len(files)))
        await self.act("delete", lambda: self.storage.delete(path), path=path, sha=sha, born=born)

    async def delete_many(self, files: list[Any]) -> None:
        verb.set("delete")
        going = {}
        for _ in range(min(3, len(files))):
            path, sha, born = files.pop(self.random.randrange(len(files)))
            going[path] = self.intend("delete", path=path, sha=sha, born=born)
        async for result in self.storage.delete_many(list(going)):
            number = going[str(result.item)]
            if result.ok:
                self.write({"n": number, "ok": None})
                self.on_first()
            else:
                self.write({"n": number, "unknown": repr(result.error)})

    async def read(self, files: list[Any]) -> None:
        path, sha, _ = self.random.choice(files)
        try:
            record = await self.storage.get(path)
            async with self.storage.open(record, verify=record.checksum is not None) as file:  # none: adopted
                found = checksum(await file.read())
        except StorageError as error:
            found = repr(error)
        if found != sha:
            self.write({"wrong": f"{path!r} was read as {found}, not {sha}"})

    async def overwrite(self, files: list[Any]) -> None:
        path, (_, sha, pieces) = self.random.choice(self.contested), self.content()

        async def work() -> None:
            async with self.storage.open(path, "wb") as file:
                async for piece in pieces():
                    await file.write(piece)

        await self.act("overwrite", work, path=path, sha=sha)

    async def erase(self, files: list[Any]) -> None:
        path = self.random.choice(self.contested)
        await self.act("erase", lambda: self.storage.delete(path), path=path)

    async def plant(self, files: list[Any], foreign: list[Any]) -> None:
        """Put a file into an original behind the library's back, and save under its name."""
        original, key = self.original(), f"planted-{self.number}.txt"
        data = f"a stranger's {self.seed}/{self.number}".encode()

        async def work() -> None:
            made = self.arena.root / "nursery" / key
            made.write_bytes(data)
            made.rename(self.arena.root / original / key)  # whole or not at all, and nobody else's name

        await self.act("plant", work, original=original, key=key, sha=checksum(data))
        foreign.append((original, key, checksum(data)))
        content, sha, _ = self.content()
        done, path, number = await self.act(
            "save", lambda: self.storage.save(key, content, using=original), name=key, sha=sha
        )
        if done:
            files.append((path, sha, number))

    async def take_in(self, files: list[Any], foreign: list[Any]) -> None:
        original, key, sha = foreign.pop()
        name = f"adopted/{key}"
        done, path, number = await self.act(
            "adopt", lambda: self.storage.adopt(key, name=name, using=original),
            original=original, key=key, name=name, sha=sha,
        )  # fmt: skip
        if done:
            files.append((path, sha, number))


async def live(life: dict[str, Any], born: int) -> None:
    """Live `life`, and write a byte to `born` when the first promise is made."""
    arena = Arena(Path(life["root"]))
    fuse = Fuse(life["step"], life["count"])
    install(fuse)
    storage = arena.storage(
        keys=life["keys"], keep_replaced=life["keep_replaced"], backend=SteppedFiles, meta=SteppedRecords
    )
    if life["temporaries"]:  # as on a file system without O_TMPFILE
        for backend in storage.originals.values():
            backend._tree.anonymous = False
    if life["what"] == "reconcile":
        fuse.armed = True
        verb.set("reconcile")
        await reconcile(storage, dry_run=False, force=life["force"])
        return

    workload = Workload(arena, storage, life["start"], life["seed"], life["focus"])

    def first() -> None:
        workload.on_first = lambda: None
        fuse.armed = True
        os.write(born, b"!")

    workload.on_first = first
    asyncio.get_running_loop().call_later(life["seconds"], os._exit, 3)
    await workload.run()


def nursery() -> None:
    """Fork children as told on standard input."""
    for line in sys.stdin:
        life = json.loads(line)
        first, born = os.pipe()
        pid = os.fork()
        if pid == 0:
            os.close(first)
            try:
                asyncio.run(live(life, born))
            except BaseException:
                traceback.print_exc()
                os._exit(1)
            os._exit(0)
        os.close(born)
        _tell({"pid": pid})
        os.read(first, 1)  # ends when the child does, at the latest
        os.close(first)
        _tell({"first": True})
        _, status = os.waitpid(pid, 0)
        _tell({"killed": os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL, "status": status})


def _tell(line: dict[str, Any]) -> None:
    print(json.dumps(line), flush=True)


if __name__ == "__main__":
    nursery()
