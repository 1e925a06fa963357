"""What `test_memory` measures, each in a process of its own: ``python memory_scenarios.py SCENARIO DIRECTORY``.

Prints one line of JSON: by how many bytes the resident memory of the process has grown at most, and what was done.
"""

from __future__ import annotations

import asyncio
import json
import sys
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

from aproxy_storage import MetaRecord, ProxyStorage
from aproxy_storage.backends.filesystem import FileSystemBackend
from aproxy_storage.meta_backends.sqlite import SQLiteMetaBackend

MIB = 1 << 20
SAFETY = 240.0


class Memory:
    """The growth of the resident memory since it was made, its highest point included."""

    def __init__(self) -> None:
        # Resets the high-water mark to what is resident now.
        Path("/proc/self/clear_refs").write_text("5")
        self.before = _status("VmRSS")

    def grown(self) -> int:
        return max(0, _status("VmHWM") - self.before)


def _status(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        name, _, value = line.partition(":")
        if name == field:
            return int(value.split()[0]) * 1024
    raise LookupError(field)


async def _blocks(count: int) -> AsyncIterator[bytes]:
    """Yield `count` MiB, no two the same: one block whose first bytes vary."""
    rest = bytes(range(256)) * (MIB // 256 - 1)
    for number in range(count):
        yield number.to_bytes(256, "big") + rest


async def one_big_file(storage: ProxyStorage) -> dict[str, Any]:
    """Save 1 GiB whose length nobody knows, and read it back, comparing the checksum."""
    count = 1024
    memory = Memory()
    path = await storage.save("big.bin", _blocks(count))
    saved = memory.grown()
    memory = Memory()
    seen = 0
    async with storage.open(path, verify=True) as file:
        async for chunk in file:
            seen += len(chunk)
    read = memory.grown()
    assert seen == count * MIB == await storage.size(path)
    assert (await storage.get(path)).checksum.startswith("sha256:")  # type: ignore[union-attr]
    await storage.delete(path)
    return {"saved": saved, "read": read}


async def many_files(storage: ProxyStorage) -> dict[str, Any]:
    """Save 500 files of 1 MiB whose contents are made on the way; delete them."""
    rest = bytes(MIB - 8)

    def items() -> Iterator[tuple[str, bytes]]:
        for number in range(500):
            yield f"{number % 10}/{number}.bin", number.to_bytes(8, "big") + rest

    memory = Memory()
    done = 0
    async for result in storage.save_many(items(), concurrency=16):
        assert result.error is None
        done += 1
    saved = memory.grown()
    assert done == 500
    memory = Memory()
    async for result in storage.delete_many(f"{n % 10}/{n}.bin" for n in range(500)):
        assert result.error is None
    return {"saved": saved, "deleted": memory.grown()}


async def long_list(storage: ProxyStorage) -> dict[str, Any]:
    """List 50,000 records, flat and with a delimiter."""
    count = 50_000
    for start in range(0, count, 5000):
        numbers = range(start, start + 5000)
        records = [MetaRecord(f"{n % 100:02}/{n:06}.bin", "media", "files", f"{n}.bin", size=n) for n in numbers]
        answers = await storage.meta.create_many(records)
        assert all(isinstance(answer, MetaRecord) for answer in answers)
        del records, answers
    memory = Memory()
    seen = 0
    last = ""
    async for record in storage.list():
        assert last < record.path
        last = record.path
        seen += 1
    listed = memory.grown()
    assert seen == count
    memory = Memory()
    prefixes = [entry.path async for entry in storage.list(delimiter="/")]
    assert len(prefixes) == 100
    return {"listed": listed, "rolled up": memory.grown()}


async def many_readers(storage: ProxyStorage) -> dict[str, Any]:
    """Read one file of 64 MiB in 64 tasks at a time."""
    path = await storage.save("shared.bin", _blocks(64))

    async def read() -> None:
        seen = 0
        async with storage.open(path) as file:
            async for chunk in file:
                seen += len(chunk)
                await asyncio.sleep(0)
        assert seen == 64 * MIB

    memory = Memory()
    async with asyncio.TaskGroup() as group:
        for _ in range(64):
            group.create_task(read())
    return {"read": memory.grown()}


async def _warm_up(storage: ProxyStorage) -> None:
    """Import and start what every use needs once: that is no growth."""
    path = await storage.save("warm.bin", _blocks(4))
    async with storage.open(path, verify=True) as file:
        await file.read()
    await storage.delete(path)
    async for _ in storage.list():
        pass


async def main(scenario: str, directory: Path) -> None:
    async with asyncio.timeout(SAFETY):
        storage = ProxyStorage(
            "media",
            originals={"files": FileSystemBackend(directory / "files")},
            meta=SQLiteMetaBackend(directory / "meta.db"),
        )
        async with storage:
            await _warm_up(storage)
            figures = await SCENARIOS[scenario](storage)
    print(json.dumps(figures))


SCENARIOS = {work.__name__: work for work in (one_big_file, many_files, long_list, many_readers)}

if __name__ == "__main__":
    asyncio.run(main(sys.argv[1], Path(sys.argv[2])))
