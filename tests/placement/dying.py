"""Processes that are killed in the middle of a hedged or replicated save, and others that clean up after them.

Run as ``python -m tests.placement.dying DIRECTORY``: forks one process for each way to die, and one to look at what is
left; prints a line of JSON for each case.
"""

from __future__ import annotations

import asyncio
import json
import os
import signal
import sys
import traceback
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any

from aproxy_storage import Fallback, NotFound, Placement, ProxyStorage, Replicate
from aproxy_storage.backends.filesystem import FileSystemBackend
from aproxy_storage.meta_backends.sqlite import SQLiteMetaBackend
from aproxy_storage.testing.faults import Crash, Fail, Fault, FaultyBackend, FaultyMetaBackend, Plan, Slow, at
from aproxy_storage.tools.reconcile import reconcile

SMALL = b"small content"
LARGE = b"large content, in chunks " * 60_000


class SlowCrash(Fault):
    """Takes its time, and then kills the process before or right after the write."""

    def __init__(self, seconds: float, *, after: bool) -> None:
        self.seconds, self.crash = seconds, Crash(after=after)

    async def __call__(self, call: Callable[[], Awaitable[Any]]) -> Any:
        await asyncio.sleep(self.seconds)
        return await self.crash(call)


class Stubborn(Fault):
    """Finishes the write when it is cancelled, as what is on its way to a server does."""

    async def __call__(self, call: Callable[[], Awaitable[Any]]) -> Any:
        try:
            await asyncio.sleep(60)
        except asyncio.CancelledError:
            return await call()


async def breaking_off() -> AsyncIterator[bytes]:
    for start in range(0, len(LARGE), 100_000):
        if start > len(LARGE) // 2:
            os.kill(os.getpid(), signal.SIGKILL)
        yield LARGE[start : start + 100_000]
        await asyncio.sleep(0)


def around(fault: Callable[[bool], Any]) -> dict[str, Any]:
    return {"before": fault(False), "after": fault(True)}


HEDGE = Fallback(hedge_after=0.02, attempt_timeout=5, breaker=None)
COPIES = Replicate(2, attempt_timeout=5, breaker=None)
IN_TURN = Fallback(attempt_timeout=5, breaker=None)

#: name: the placement, the faults of a, of b, and of the records, the content, what is done.
CASES: dict[str, tuple[Placement, dict[str, Any], dict[str, Any], dict[str, Any], Any, str]] = {}
for when in ("before", "after"):
    later = when == "after"
    CASES |= {
        f"hedge: {when} the winner's write": (HEDGE, {"write": Slow(9)}, {"write": Crash(after=later)}, {}, SMALL, ""),
        f"hedge: {when} the loser's write": (
            HEDGE, {"write": SlowCrash(0.04, after=later)}, {"write": Slow(0.2)}, {}, SMALL, "",
        ),
        f"hedge: {when} the commit": (HEDGE, {"write": Slow(9)}, {}, {"update": Crash(after=later)}, SMALL, ""),
        f"hedge: {when} both were done": (
            HEDGE, {"write": Slow(0.05)}, {"write": Slow(0.03)}, {"update": at(1, Crash(after=later))}, SMALL, "",
        ),
        f"hedge: {when} the loser is forgotten": (
            HEDGE, {"write": Stubborn()}, {}, {"update": at(2, Crash(after=later))}, SMALL, "wait",
        ),
        f"hedge: {when} the loser's bytes go": (
            HEDGE, {"write": Stubborn(), "discard": Crash(after=later)}, {}, {}, SMALL, "wait",
        ),
        f"hedge: {when} the swap of a replacement": (
            HEDGE, {"write": Slow(9)}, {}, {"update": at(2, Crash(after=later))}, SMALL, "replace",
        ),
        f"copies: {when} one write": (COPIES, {}, {"write": Crash(after=later)}, {}, SMALL, ""),
        f"copies: {when} one large write": (COPIES, {}, {"write": Crash(after=later)}, {}, LARGE, ""),
        f"copies: {when} the commit": (COPIES, {}, {}, {"update": Crash(after=later)}, SMALL, ""),
        f"copies: {when} the swap of a replacement": (
            COPIES, {}, {}, {"update": at(2, Crash(after=later))}, SMALL, "replace",
        ),
        f"copies: {when} reconcile names a copy": (
            COPIES, {}, {"write": at(1, Fail(OSError(5, "EIO")))}, {"update": at(2, Crash(after=later))}, SMALL, "mend",
        ),
        f"copies: {when} reconcile writes a copy": (
            COPIES, {}, {"write": [Fail(OSError(5, "EIO")), Crash(after=later)]}, {}, SMALL, "mend",
        ),
        f"copies: {when} reconcile counts a copy": (
            COPIES, {}, {"write": at(1, Fail(OSError(5, "EIO")))}, {"update": at(3, Crash(after=later))}, SMALL, "mend",
        ),
        f"in turn: {when} the second is named": (
            IN_TURN, {"write": Fail(OSError(5, "EIO"))}, {}, {"update": at(1, Crash(after=later))}, SMALL, "",
        ),
        f"in turn: {when} the second's write": (
            IN_TURN, {"write": Fail(OSError(5, "EIO"))}, {"write": Crash(after=later)}, {}, SMALL, "",
        ),
    }  # fmt: skip
CASES["copies: in the middle of the content"] = (COPIES, {}, {}, {}, "breaking off", "")


def storage_in(root: Path, placement: Placement, plans: dict[str, Plan]) -> ProxyStorage:
    return ProxyStorage(
        "media",
        originals={name: FaultyBackend(FileSystemBackend(root / name), plans.get(name, Plan())) for name in "ab"},
        meta=FaultyMetaBackend(SQLiteMetaBackend(root / "meta.sqlite3"), plans.get("meta", Plan())),
        placement=placement,
    )


async def live(root: Path, name: str) -> None:
    """Do what the case says, and die at it."""
    placement, a, b, meta, content, what = CASES[name]
    storage = storage_in(root, placement, {"a": Plan(**a), "b": Plan(**b), "meta": Plan(**meta)})
    # What is replaced is saved without a fault, and without a hedge: the number of its updates hangs on no clock.
    first = storage if what != "replace" else storage_in(root, IN_TURN if placement is HEDGE else placement, {})
    path = await first.save("x", breaking_off() if content == "breaking off" else content)
    (root / "promised").write_text(path)
    if what == "replace":
        await first.aclose()
        await storage.replace(path, b"replaced")
        (root / "replaced").write_text(path)
    elif what == "mend":
        await reconcile(storage, dry_run=False)
    elif what == "wait":
        await storage.cleanup.drain(within=10)


async def look(root: Path, name: str) -> None:
    """Clean up without a scan, and hold that what was promised is there, and nothing else."""
    placement, _, _, _, content, _ = CASES[name]
    async with storage_in(root, placement, {}) as storage:
        for _ in range(6):
            report = await reconcile(storage, dry_run=False, force=True)
            if not report.counts:
                break
        assert report.counts == {}, report.findings
        named = set()
        async for record in storage.list():
            assert record.lease is None, record
            places = record.all_places()
            assert len(places) == placement.limits.copies, record
            named |= {(place.original, place.key) for place in places}
            async with storage.open(record, verify=True) as file:
                read = await file.read()
            wanted = {b"replaced"} if (root / "replaced").exists() else {content, b"replaced"}
            assert read in wanted, read
        assert await storage.meta.count() == len({path async for path in storage.list()})
        if (root / "promised").exists():
            assert await storage.exists((root / "promised").read_text())
        lying = {(original, path.name) for original in "ab" for path in (root / original).glob("*")}
        assert lying == named, (lying, named)
        try:
            await storage.delete("x")
        except NotFound:
            assert not (root / "promised").exists()


def in_child(work: Callable[[], Any]) -> int:
    """Run `work` in a forked process; return how it ended."""
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            work()
            code = 0
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stderr.flush()
            os._exit(code)
    return os.waitpid(pid, 0)[1]


def main(directory: Path) -> None:
    for number, name in enumerate(CASES):
        root = directory / str(number)
        root.mkdir()
        died = in_child(lambda root=root, name=name: asyncio.run(live(root, name)))  # type: ignore[misc]
        left = in_child(lambda root=root, name=name: asyncio.run(look(root, name)))  # type: ignore[misc]
        killed = os.WIFSIGNALED(died) and os.WTERMSIG(died) == signal.SIGKILL
        print(json.dumps({"case": name, "killed": killed, "clean": left == 0}), flush=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
