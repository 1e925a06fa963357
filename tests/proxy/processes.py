"""What other processes do in the tests: ``python -m tests.proxy.processes <function> <directory> <arguments>``."""

from __future__ import annotations

import asyncio
import contextlib
import json
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

from aproxy_storage import BackendUnavailable, NotFound
from aproxy_storage.tools.reconcile import reconcile
from tests.proxy.support import SAFETY, storage_in


def say(message: Any) -> None:
    print(json.dumps(message), flush=True)


async def heard() -> Any:
    line = await asyncio.to_thread(sys.stdin.readline)
    return json.loads(line) if line else None


async def save_one_name(directory: Path, *, keys: str, worker: int, tasks: int) -> None:
    """Save one name in many tasks at once; say which path got which content."""
    async with storage_in(directory, keys=keys) as storage:
        say("ready")
        await heard()

        async def save(number: int) -> list[str]:
            content = f"{worker}.{number};" * (number + 1)
            return [await storage.save("reports/annual.tar.gz", content), content]

        async with asyncio.TaskGroup() as group:
            saves = [group.create_task(save(number)) for number in range(tasks)]
        say([save.result() for save in saves])


async def save_in_a_loop(directory: Path, *, keys: str, name: str, rounds: int) -> None:
    """Save `name` over and over; say which path got which content."""
    async with storage_in(directory, keys=keys) as storage:
        say("ready")
        await heard()
        saved = []
        for number in range(rounds):
            content = f"{number};" * (number + 1)
            saved.append([await storage.save(name, content), content])
        say(saved)


async def delete_in_a_loop(directory: Path, *, keys: str, name: str) -> None:
    """Delete `name` over and over until told to stop; say how often there was something to delete."""
    async with storage_in(directory, keys=keys) as storage:
        say("ready")
        await heard()
        stop = asyncio.ensure_future(heard())
        deleted = 0
        while not stop.done():
            try:
                await storage.delete(name)
                deleted += 1
            except NotFound:
                await asyncio.sleep(0.001)
        say(deleted)


async def upload(directory: Path, *, lease: float, settle: float, name: str) -> None:
    """Save `name`, the content of which comes line by line from the other side; say how it ended."""

    async def content() -> AsyncIterator[bytes]:
        while (line := await heard()) is not None and line != "end":
            yield line.encode()
            say("taken")

    async with storage_in(directory, lease=lease, settle=settle) as storage:
        say("ready")
        try:
            say(["saved", await storage.save(name, content())])
        except Exception as error:
            say([type(error).__name__, str(error)])
        await storage.cleanup.drain(within=10)
        say("bye")


async def reconcile_in_a_loop(directory: Path, *, lease: float, settle: float, hours_off: float = 0.0) -> None:
    """Reconcile over and over until told to stop; say what was found."""
    if hours_off:
        turn_clock(hours_off)
    async with storage_in(directory, lease=lease, settle=settle) as storage:
        say("ready")
        stop = asyncio.ensure_future(heard())
        counts: dict[str, int] = {}
        rounds = 0
        while not stop.done():
            with contextlib.suppress(BackendUnavailable):  # a frozen process may have taken the lock along
                report = await reconcile(storage, dry_run=False, scan=True)
                for action, count in report.counts.items():
                    counts[action] = counts.get(action, 0) + count
                rounds += 1
            await asyncio.sleep(0.02)
        say([rounds, counts])


async def upload_with_wrong_clock(directory: Path, *, hours_off: float, **arguments: Any) -> None:
    """As `upload`, on a host whose clock is off."""
    turn_clock(hours_off)
    await upload(directory, **arguments)


def turn_clock(hours: float) -> None:
    """Make this process believe that it is `hours` later; the monotonic clock goes on, as on a real host."""
    import datetime
    import time

    real_time, real_datetime = time.time, datetime.datetime

    class Wrong(real_datetime):  # type: ignore[misc, valid-type]
        @classmethod
        def now(cls, tz: Any = None) -> Any:
            return real_datetime.now(tz) + datetime.timedelta(hours=hours)

    time.time = lambda: real_time() + hours * 3600
    time.time_ns = lambda: int(time.time() * 1e9)
    for module in [module for name, module in sys.modules.items() if name.startswith("aproxy_storage")]:
        if getattr(module, "datetime", None) is real_datetime:
            module.datetime = Wrong  # type: ignore[attr-defined]


async def hold_lock(directory: Path) -> None:
    """Hold SQLite's write lock until told to let go."""
    import sqlite3

    with contextlib.closing(sqlite3.connect(directory / "meta.sqlite3", isolation_level=None)) as connection:
        connection.execute("BEGIN IMMEDIATE")
        say("locked")
        await heard()


async def main() -> None:
    name, directory, arguments = sys.argv[1:]
    asyncio.get_running_loop().slow_callback_duration = SAFETY  # of debug mode: a busy machine is no finding
    async with asyncio.timeout(SAFETY):
        await globals()[name](Path(directory), **json.loads(arguments))


if __name__ == "__main__":
    asyncio.run(main())
