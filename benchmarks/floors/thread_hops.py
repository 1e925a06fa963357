"""Floor for streaming one big file by hand: 1 MiB reads, a hop to a thread for each, chunks seen by the loop."""

import asyncio
from pathlib import Path


async def run(source: Path, target: Path) -> None:
    with source.open("rb", buffering=0) as file:
        while await asyncio.to_thread(file.read, 1024 * 1024):
            pass
