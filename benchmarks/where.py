"""Say where the time of small saves and deletes goes: CPU microseconds an operation, by thread.

python benchmarks/where.py [--files N] [--rounds N]
"""

import argparse
import asyncio
import statistics
import sys
import tempfile
import threading
import time
from collections import defaultdict
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.ours import Store

TASKS = 64
CONTENT = b"x" * 4096


def spent() -> dict[str, float]:
    """Return the CPU seconds of every thread so far, by what the thread is for."""
    seconds: dict[str, float] = defaultdict(float)
    for thread in threading.enumerate():
        taken = Path(f"/proc/self/task/{thread.native_id}/schedstat")
        if taken.exists():
            name = thread.name.rpartition("-")[0].partition(" of ")[0]
            kind = "event loop" if thread is threading.main_thread() else name
            seconds[kind] += int(taken.read_text().split()[0]) / 1e9
    return seconds


async def at_once(names: list[str], work: Callable[[str], Awaitable[Any]]) -> None:
    waiting = iter(names)

    async def worker() -> None:
        for name in waiting:
            await work(name)

    async with asyncio.TaskGroup() as group:
        for _ in range(TASKS):
            group.create_task(worker())


async def measure(directory: Path, files: int, rounds: int) -> None:
    figures: dict[str, dict[str, list[float]]] = {verb: defaultdict(list) for verb in ("save", "delete")}
    async with Store(directory) as store:
        for round_number in range(-1, rounds):
            names = [f"d{number % 16}/{round_number}-{number}.bin" for number in range(files)]
            verbs = {"save": lambda name: store.save(name, CONTENT), "delete": store.delete}
            for verb, work in verbs.items():
                before, began = spent(), time.perf_counter()
                await at_once(names, work)
                wall, after = time.perf_counter() - began, spent()
                if round_number >= 0:
                    figures[verb]["wall clock"].append(wall)
                    for kind in after:
                        figures[verb][kind].append(after[kind] - before.get(kind, 0.0))
    for verb, parts in figures.items():
        listed = ", ".join(f"{kind} {statistics.median(s) / files * 1e6:.0f}" for kind, s in parts.items())
        print(f"{verb}, microseconds each: {listed}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--files", type=int, default=4096)
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    shared = Path("/dev/shm")
    with tempfile.TemporaryDirectory(dir=shared if shared.is_dir() else None) as name:
        asyncio.run(measure(Path(name), options.files, options.rounds))
