"""Lets children die in an arena, cleans up after each, and looks whether anything was lost or left."""

from __future__ import annotations

import asyncio
import hashlib
import json
import os
import random
import signal
import sys
from collections import Counter
from pathlib import Path
from typing import Any, Self

from aproxy_storage import ProxyStorage
from aproxy_storage.tools.reconcile import Report, reconcile
from tests.crash.arena import Arena
from tests.crash.ledger import Ledger

ROOT = Path(__file__).resolve().parents[2]
CONTESTED = [f"contested/{number}" for number in range(3)]
AT_RANDOM = "at a random moment"

#: What a child does more often than anything else, when it is to die at a step that begins so.
FOCUS = {
    "save: rekey": "plant", "save: reserve a spare key": "reuse", "adopt": "plant", "undo: give up": "failing replace",
    "undo: forget": "failing replace", "undo": "failing save",
    "save": "save", "replace": "replace", "surplus": "replace", "move": "move", "copy": "copy", "rename": "rename",
    "delete": "delete", "file: rmdir": "delete", "file: mkdir": "save", "file: unlink": "delete",
    "reconcile: take": "replace", "reconcile: discard the": "replace", "reconcile: forget": "replace",
}  # fmt: skip

#: A child that has not come to its step by then gives up, and another one is sent.
SECONDS = 5.0


class Nursery:
    """The process that children are forked from."""

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        self._process = process

    @classmethod
    async def start(cls) -> Self:
        process = await asyncio.create_subprocess_exec(
            sys.executable, "-m", "tests.crash.child", cwd=ROOT,
            stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE,
        )  # fmt: skip
        return cls(process)

    async def bear(self, life: dict[str, Any]) -> int:
        """Start a child; return its process id."""
        assert self._process.stdin is not None
        self._process.stdin.write((json.dumps(life) + "\n").encode())
        return int((await self._hear())["pid"])

    async def first_promise(self) -> None:
        """Wait until the child has acknowledged something, or is gone."""
        await self._hear()

    async def end(self) -> bool:
        """Wait until the child is gone; return whether it was killed rather than out of time."""
        answer = await self._hear()
        assert answer["killed"] or answer["status"] >> 8 in (0, 3), f"the child failed by itself: {answer}"
        return bool(answer["killed"])

    async def _hear(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = await self._process.stdout.readline()
        answer: dict[str, Any] = json.loads(line)
        return answer

    async def stop(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        await self._process.wait()


class Theatre:
    """One arena, one nursery, and one crash after the other; what a crash leaves is the start of the next."""

    def __init__(self, root: Path, seed: int) -> None:
        self.arena = Arena(root).make()
        self.random = random.Random(seed)
        self.seed = seed
        self.kills: Counter[str] = Counter()
        self.acknowledged = 0
        self.start: dict[str, Any] = {
            "files": [], "foreign": [], "contested": dict.fromkeys(CONTESTED), "number": 0,
        }  # fmt: skip

    async def play(self, steps: asyncio.Queue[str]) -> None:
        """Let a child die at each of `steps`, until there are none left."""
        nursery = await Nursery.start()
        try:
            while not steps.empty():
                step = steps.get_nowait()
                for attempt in range(10):
                    if await self.scene(nursery, step, attempt):
                        break
                else:
                    raise AssertionError(f"no child ever came to the step {step!r}")
        finally:
            await nursery.stop()

    async def scene(self, nursery: Nursery, step: str, attempt: int) -> bool:
        """Let a child live and die, clean up and look; return whether it died at `step`."""
        life = self._life(step, attempt)
        about = {key: value for key, value in life.items() if key != "start"}
        beside = step == AT_RANDOM and self.random.random() < 0.3
        if beside:
            life["keep_replaced"] = 0.01
        reached = await self._die(nursery, life, AT_RANDOM if life["what"] == "reconcile" else step, beside=beside)
        ledger = Ledger.read(self.arena.log, self.start)
        self.acknowledged += ledger.acknowledged
        if life["what"] == "reconcile":
            reached = await self._die_reconciling(nursery, life, step)
        problems = await self._clean_up(early=life["force"])
        problems += await self._look(ledger, life["number"])
        if problems:
            kept = self.arena.log.read_text().splitlines()[-400:]
            Path(self.arena.root / "log-of-failure").write_text("\n".join(kept))
            raise AssertionError(f"after a kill {about}:\n" + "\n".join(problems))
        return reached

    def _life(self, step: str, attempt: int) -> dict[str, Any]:
        self.arena.log.unlink(missing_ok=True)
        self.arena.log.touch()
        keep = 0.0 if step.startswith("surplus") else self.random.choice([60.0, 60.0, 0.01])
        number = self.start["number"]
        count = self.random.randint(1, max(1, 16 >> 2 * attempt))
        life = {
            "root": str(self.arena.root), "what": "work", "step": step, "count": count,
            "start": self.start, "seed": self.random.randrange(1 << 30), "number": number, "seconds": SECONDS,
            "keys": self.random.choice(["path", "path", "token"]), "keep_replaced": keep, "force": True,
            "focus": next((what for beginning, what in FOCUS.items() if step.startswith(beginning)), ""),
            "temporaries": "temporary" in step or (self.random.random() < 0.2 and "link" not in step),
        }  # fmt: skip
        if step.startswith("reconcile"):
            life |= {"what": "reconcile", "count": 1, "keep_replaced": 60.0, "force": "settling" not in step}
        if "spare" in step or "rekey" in step:
            life["keys"] = "path"
        return life

    async def _die(self, nursery: Nursery, life: dict[str, Any], step: str, *, beside: bool) -> bool:
        pid = await nursery.bear(life | {"what": "work", "step": "" if step == AT_RANDOM else step})
        await nursery.first_promise()
        if step == AT_RANDOM:
            pause = self.random.random() * 0.15
            if beside:
                await self._tidy_beside(pause)
            else:
                await asyncio.sleep(pause)
            os.kill(pid, signal.SIGKILL)
        reached = await nursery.end()
        if reached:
            self.kills[step] += 1
        return reached

    async def _tidy_beside(self, seconds: float) -> None:
        """Reconcile in this process, again and again, while the child is at work in its own."""
        loop = asyncio.get_running_loop()
        until = loop.time() + seconds
        async with self.arena.storage() as storage:
            while loop.time() < until:
                report = await reconcile(storage, dry_run=False)
                wrong = report.counts.keys() - {"cleared", "moved on", "settling"}
                assert not wrong, f"a reconcile beside a living child did {report.counts}"
                await asyncio.sleep(0.002)

    async def _die_reconciling(self, nursery: Nursery, life: dict[str, Any], step: str) -> bool:
        if not life["force"]:
            self.arena.expire_leases()
        await nursery.bear(life | {"start": None})
        await nursery.first_promise()
        reached = await nursery.end()
        if reached:
            self.kills[step] += 1
        return reached

    # -- afterwards

    async def _clean_up(self, *, early: bool) -> list[str]:
        """Reconcile, without a scan; return what is wrong with how that went."""
        problems = []
        async with self.arena.storage() as storage:
            if self.random.random() < 0.75:
                await reconcile(storage, dry_run=False, force=True)
            else:
                problems += await self._clean_up_patiently(storage, early=early)
            again = await reconcile(storage, dry_run=False, force=True)
            if again.counts:
                problems.append(f"another reconcile still finds {again.counts}: {again.findings}")
        return problems

    async def _clean_up_patiently(self, storage: ProxyStorage, *, early: bool) -> list[str]:
        """Reconcile as a cron job would, time passing in between; nothing is forced. `early`: begin too early."""
        if early and (counts := (await reconcile(storage, dry_run=False)).counts).keys() - {"cleared"}:
            return [f"leases that had not run out were taken: {counts}"]
        self.arena.expire_leases()
        unsure = self.arena.sql(
            """SELECT count(*) FROM aproxy_files WHERE state = 'pending' OR places LIKE '%"doubtful"%' OR
            state = 'deleting' AND (places = '[]' OR places LIKE '%"good"%' OR places LIKE '%"surplus"%')"""
        )
        first = await self._reconcile(storage)
        if first.counts.get("settling", 0) != unsure[0][0]:
            return [f"{unsure[0][0]} records want settling, and reconcile did {first.counts}"]
        hasty = await reconcile(storage, dry_run=False)
        if hasty.counts:
            return [f"reconcile did not wait for settle: {hasty.counts}"]
        second = await self._reconcile(storage)
        return [] if second.clean else [f"not clean after settle: {second.counts}"]

    async def _reconcile(self, storage: ProxyStorage) -> Report:
        self.arena.expire_leases()
        return await reconcile(storage, dry_run=False)

    async def _look(self, ledger: Ledger, number: int) -> list[str]:
        """Compare everything there is with what was promised; remember it as the start of the next scene."""
        problems = [
            f"not at rest: {row}"
            for row in self.arena.sql("SELECT * FROM aproxy_files WHERE state <> 'stored' OR places <> '[]' OR lease")
        ]
        stored: dict[str, str | None] = {}
        places: Counter[tuple[str, str]] = Counter()
        async with self.arena.storage() as storage:
            async for record in storage.list():
                places[record.original_storage_name, record.original_storage_path] += 1
                try:
                    async with storage.open(record, verify=record.checksum is not None) as file:
                        content = await file.read()
                except Exception as error:
                    problems.append(f"{record.path!r} cannot be read: {error!r}; {record}")
                    stored[record.path] = record.checksum
                else:
                    stored[record.path] = f"sha256:{hashlib.sha256(content).hexdigest()}"
        problems += ledger.judge(stored)
        problems += self._look_at_the_disk(ledger, places)
        self.start = {
            "files": [[path, sha, -1 - index] for index, (path, sha) in enumerate(stored.items())
                      if path not in CONTESTED],
            "foreign": [[*place, sha] for place, sha in ledger.foreign.items()],
            "contested": {path: stored.get(path) for path in CONTESTED},
            "number": max([number, *ledger.numbers]),
        }  # fmt: skip
        return problems

    def _look_at_the_disk(self, ledger: Ledger, places: Counter[tuple[str, str]]) -> list[str]:
        files, empty = self.arena.on_disk()
        for place in ledger.maybe_foreign:
            if place in files and place not in places:
                ledger.foreign[place] = ledger.maybe_foreign[place]
        problems = [f"bytes that no record names: {place}" for place in files - places.keys() - ledger.foreign.keys()]
        problems += [f"a record without bytes: {place}" for place in places.keys() - files]
        problems += [f"two records with the same bytes: {place}" for place, count in places.items() if count > 1]
        problems += [f"an empty directory was left: {directory}" for directory in empty]
        for (original, key), sha in ledger.foreign.items():
            path = self.arena.root / original / key
            if not path.exists():
                problems.append(f"a stranger's file is gone: {original}:{key}")
            elif f"sha256:{hashlib.sha256(path.read_bytes()).hexdigest()}" != sha:
                problems.append(f"a stranger's file was changed: {original}:{key}")
        return problems


async def play(root: Path, steps: list[str], *, seed: int, stages: int = 2) -> tuple[Counter[str], int]:
    """Let a child die at each of `steps`, on several stages at once; return the kills per step, and the number of
    acknowledgements that were held to."""
    queue: asyncio.Queue[str] = asyncio.Queue()
    for step in steps:
        queue.put_nowait(step)
    theatres = [Theatre(root / str(number), seed + number) for number in range(stages)]
    async with asyncio.TaskGroup() as group:
        for theatre in theatres:
            group.create_task(theatre.play(queue))
    return sum((theatre.kills for theatre in theatres), Counter()), sum(theatre.acknowledged for theatre in theatres)
