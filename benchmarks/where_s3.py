"""Say what of a ProxyStorage costs how much CPU over S3, by leaving parts of it out; see README.md.

    python benchmarks/where_s3.py [--verb up|down] [--size BYTES] [--turns N]

Each contender has its turn in a random order, so that a slow phase of the machine falls to all of them.
"""

import argparse
import asyncio
import contextlib
import random
import statistics
import sys
import tempfile
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.run import MIB, roomy
from benchmarks.s3 import VERBS, Ours, Proxied, backend_of, batch

ALONE = "S3Backend alone"
OBJECTS = 60  # in a turn


class Hashed(Ours):
    async def up(self, key: str, content: bytes) -> None:
        from aproxy_storage import Source

        await self.backend.write(key, Source.of(content, checksum="sha256"))


@contextlib.asynccontextmanager
async def contenders(service: Any, directory: Path) -> AsyncIterator[dict[str, Any]]:
    from aproxy_storage import ProxyStorage
    from aproxy_storage.meta_backends.memory import MemoryMetaBackend
    from aproxy_storage.meta_backends.sqlite import SQLiteMetaBackend

    async with contextlib.AsyncExitStack() as stack:

        async def proxied(name: str, meta: Any, **options: Any) -> Proxied:
            backend = backend_of(service, prefix=name)
            return Proxied(await stack.enter_async_context(ProxyStorage(name, originals=backend, meta=meta, **options)))

        backend = await stack.enter_async_context(backend_of(service))
        yield {
            ALONE: Ours(backend),
            "S3Backend with SHA-256": Hashed(backend),
            "proxy": await proxied("whole", SQLiteMetaBackend(directory / "whole.sqlite3")),
            "proxy, no SHA-256": await proxied("sum", SQLiteMetaBackend(directory / "sum.sqlite3"), checksum=None),
            "proxy, records in memory": await proxied("memory", MemoryMetaBackend()),
        }


def remove_all(service: Any) -> None:
    """Remove the objects of a turn of everybody, so that a long run does not fill the server."""
    with contextlib.closing(service.client()) as client:
        there = client.list_objects_v2(Bucket=service.bucket)["Contents"]
        gone = {"Objects": [{"Key": one["Key"]} for one in there], "Quiet": True}
        client.delete_objects(Bucket=service.bucket, Delete=gone)


async def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--verb", choices=VERBS, default="up")
    parser.add_argument("--size", type=int, default=MIB, help="bytes of an object (1 MiB)")
    parser.add_argument("--turns", type=int, default=20, help="measured turns of each, after one to warm up (20)")
    options = parser.parse_args()

    from tests.services.s3 import S3Server

    content = random.Random(5).randbytes(options.size)
    found: dict[str, list[tuple[float, float]]] = {}
    fast = "/dev/shm" if Path("/dev/shm").is_dir() else None
    server = S3Server(roomy(fast), volume_mib=16 << 10)
    try:
        with tempfile.TemporaryDirectory(dir=fast) as directory:
            async with contenders(server.service, Path(directory)) as stores:
                for turn in range(options.turns + 1):
                    for name in random.sample(list(stores), len(stores)):
                        keys = [f"{name}/{turn}/{number}" for number in range(OBJECTS)]
                        figures = [await batch(stores[name], verb, keys, content) for verb in VERBS]
                        if turn:
                            found.setdefault(name, []).append(figures[VERBS.index(options.verb)])
                    remove_all(server.service)
    finally:
        server.stop()
    print(f"{options.size} bytes {options.verb}: time and CPU in µs, means of {options.turns} turns; CPU that is added")
    means = {name: [1e6 * statistics.mean(each) for each in zip(*some, strict=True)] for name, some in found.items()}
    for name in stores:
        elapsed, cpu = means[name]
        print(f"{name:26} {elapsed:7.0f} {cpu:7.0f} {cpu - means[ALONE][1]:+7.0f}")


if __name__ == "__main__":
    asyncio.run(main())
