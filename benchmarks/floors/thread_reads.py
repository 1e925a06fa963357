"""Floor for reading one big file: plain 1 MiB reads, all of them in one thread; no chunk reaches the event loop."""

import asyncio
from pathlib import Path


def read(source: Path) -> int:
    total = 0
    with source.open("rb", buffering=0) as file:
        while chunk := file.read(1024 * 1024):
            total += len(chunk)
    return total


async def run(source: Path, target: Path) -> None:
    await asyncio.to_thread(read, source)
