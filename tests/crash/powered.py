"""What `test_power.py` watches: one process that does one thing after the other, durably, and marks when.

Run as ``python -m tests.crash.powered DIRECTORY``.
"""

from __future__ import annotations

import asyncio
import os
import sys
from collections.abc import AsyncIterator
from pathlib import Path

from aproxy_storage.backends.filesystem import FileSystemBackend
from tests.crash.arena import Arena


async def main(root: Path) -> None:
    marks = os.open(root / "marks", os.O_WRONLY | os.O_CREAT)

    def mark(text: str) -> None:
        os.write(marks, f"{text};".encode())

    async def large() -> AsyncIterator[bytes]:
        for _ in range(12):
            yield b"x" * 100_000

    mark("make a root")
    async with FileSystemBackend(root / "made") as backend:
        await backend.write("x.txt", b"x", durable=True)
    mark("made a root")
    async with Arena(root).storage(durability="power", keep_replaced=0) as storage:
        mark("save small")
        await storage.save("small.txt", b"small")
        mark("saved small")
        mark("save large")
        await storage.save("d/e/large.bin", large())
        mark("saved large")
        mark("replace")
        await storage.replace("small.txt", b"smaller")
        mark("replaced")
        mark("move")
        await storage.move("d/e/large.bin", "b")
        mark("moved")
        mark("delete")
        await storage.delete("d/e/large.bin")
        mark("deleted")


if __name__ == "__main__":
    asyncio.run(main(Path(sys.argv[1])))
