"""Measure ObstoreBackend beside bare obstore and django-storages; see README.md.

    python benchmarks/obstore.py [--rounds N] [--quick] [--json FILE] [--directory DIR]

The server is one SeaweedFS of our own for the time of the run, on the same machine: of 2 cores it takes one. A process
of its own, because django-storages needs a configured Django. Bare obstore overwrites and takes no checksum, and large
content is a multipart upload there; ours creates exclusively, in one request. A large file is measured with and without
its SHA-256.
"""

import argparse
import asyncio
import contextlib
import dataclasses
import json
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

# Not the directory of this file, where `import obstore` would find this file.
sys.path.pop(0)
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.run import MIB, OURS, QUICK, SLICES, Plan, Report, at_once, roomy, rotated, slices, table

BARE = "bare obstore"
EXCLUSIVE = "bare obstore, exclusive"
STORAGES = "django-storages, 16 threads"
TASKS = 16
SIZES = {"4 KiB": (4096, 300), "1 MiB": (MIB, 60)}
LARGE = 256 * MIB
BARE_GOAL, STORAGES_GOAL = 0.9, 8.0


class Ours:
    def __init__(self, service: Any) -> None:
        from aproxy_storage.backends.obstore import ObstoreBackend

        self.backend = ObstoreBackend(store_of(service), prefix="ours", flat_listings=False)

    async def up(self, key: str, content: Any, checksum: str | None = None) -> None:
        from aproxy_storage import Source

        await self.backend.write(key, Source.of(content, checksum=checksum))

    async def down(self, key: str) -> int:
        size = 0
        async with self.backend.read(key) as reader:
            async for chunk in reader:
                size += len(chunk)
        return size

    async def remove(self, key: str) -> None:
        await self.backend.discard(key)


class Bare:
    def __init__(self, service: Any) -> None:
        self.store = store_of(service)

    async def up(self, key: str, content: Any, checksum: str | None = None) -> None:
        import obstore

        await obstore.put_async(self.store, key, content)

    async def down(self, key: str) -> int:
        import obstore

        answer = await obstore.get_async(self.store, key)
        if answer.meta["size"] <= MIB:
            return len(bytes(await answer.bytes_async()))
        size = 0
        async for chunk in answer.stream(min_chunk_size=MIB):
            size += len(chunk)
        return size

    async def remove(self, key: str) -> None:
        import obstore

        await obstore.delete_async(self.store, key)


class Exclusive(Bare):
    """It with the request that ours sends: the server looks for an object that is there already."""

    async def up(self, key: str, content: Any, checksum: str | None = None) -> None:
        import obstore

        await obstore.put_async(self.store, key, content, mode="create", use_multipart=False)


class DjangoStorages:
    def __init__(self, service: Any) -> None:
        from storages.backends.s3 import S3Storage

        self.storage = S3Storage(
            bucket_name=service.bucket,
            endpoint_url=service.endpoint_url,
            region_name=service.region,
            access_key=service.access_key,
            secret_key=service.secret_key,
        )
        self.threads = ThreadPoolExecutor(TASKS)

    async def up(self, key: str, content: bytes, checksum: str | None = None) -> None:
        from django.core.files.base import ContentFile

        await self._call(lambda: self.storage.save(key, ContentFile(content)))

    async def down(self, key: str) -> int:
        def read() -> int:
            with self.storage.open(key) as file:
                return len(file.read())

        return int(await self._call(read))

    async def remove(self, key: str) -> None:
        await self._call(lambda: self.storage.delete(key))

    def _call(self, work: Callable[[], Any]) -> Awaitable[Any]:
        return asyncio.get_running_loop().run_in_executor(self.threads, work)


def store_of(service: Any) -> Any:
    from obstore.store import S3Store

    return S3Store(
        service.bucket,
        endpoint=service.endpoint_url,
        region=service.region,
        access_key_id=service.access_key,
        secret_access_key=service.secret_key,
        client_options={"allow_http": True, "timeout": "1h"},
    )


async def timed(work: Awaitable[Any]) -> tuple[float, float]:
    """Return seconds, and seconds of this process's CPU."""
    start, cpu = time.perf_counter(), time.process_time()
    await work
    return time.perf_counter() - start, time.process_time() - cpu


async def objects(plan: Plan, service: Any, report: Report) -> None:
    """16 tasks with many small objects."""
    stores: dict[str, Any] = {OURS: Ours(service), BARE: Bare(service), EXCLUSIVE: Exclusive(service)}
    try:
        stores[STORAGES] = DjangoStorages(service)
    except ImportError as error:
        report.missing[STORAGES] = str(error)
    for label, (size, count) in SIZES.items():
        count = 4 if plan is QUICK else count
        # One of them takes ten times as long.
        shares = {name: count // 4 if name == STORAGES else count for name in stores}
        content = random.Random(5).randbytes(size)
        samples: dict[str, dict[str, list[float]]] = {verb: {name: [] for name in stores} for verb in ("up", "down")}
        spent: dict[str, dict[str, list[float]]] = {verb: {name: [] for name in stores} for verb in ("up", "down")}
        for number in slices(plan):
            keys = {
                name: [f"{place}/{size}/{number}/{each}" for each in range(shares[name])]
                for place, name in enumerate(stores)
            }
            for verb in ("up", "down"):
                for name in rotated(stores, number + 1):
                    store = stores[name]
                    work = store.down if verb == "down" else lambda key, store=store, data=content: store.up(key, data)
                    seconds, cpu = await timed(at_once(TASKS, keys[name], work))
                    if number >= 0:
                        samples[verb][name].append(seconds / shares[name])
                        spent[verb][name].append(cpu / shares[name])
            for name in stores:
                await at_once(TASKS, keys[name], stores[name].remove)
            if number % SLICES == SLICES - 1:
                print(f"obstore, {label}: round {number // SLICES + 1} of {plan.rounds}", flush=True)
        for verb in ("up", "down"):
            what = f"obstore, {label} {verb}, {TASKS} tasks"
            rates = {name: 1 / statistics.median(seconds) for name, seconds in samples[verb].items()}
            report.operations_per_second[what] = rates
            report.operations_per_second[f"{what}, microseconds of CPU"] = {
                name: statistics.median(seconds) * 1e6 for name, seconds in spent[verb].items()
            }
            report.compare(what, samples[verb], BARE, goal=BARE_GOAL)
            if verb == "up":
                report.compare(what, samples[verb], EXCLUSIVE)
            report.compare(what, samples[verb], STORAGES, goal=STORAGES_GOAL if label == "4 KiB" else None)


async def large(plan: Plan, service: Any, directory: Path, report: Report) -> None:
    """One large file from the disk, and its bytes back."""
    size = 12 * MIB if plan is QUICK else LARGE
    path = directory / "large.bin"
    with path.open("wb") as file:
        block = random.Random(6).randbytes(MIB)
        for _ in range(size // MIB):
            file.write(block)
    stores: dict[str, Any] = {OURS: Ours(service), BARE: Bare(service)}
    cases = ("up", "up, SHA-256", "down")
    samples: dict[str, dict[str, list[float]]] = {case: {name: [] for name in stores} for case in cases}
    for number in range(-1, plan.rounds):
        for case in cases:
            for name in rotated(stores, number + 1):
                store, key = stores[name], f"large-{number}"
                if case == "down":
                    work = store.down(key)
                else:
                    work = store.up(key, path, checksum="sha256" if case != "up" else None)
                seconds, _ = await timed(work)
                if number >= 0:
                    samples[case][name].append(seconds)
                if case != "up, SHA-256":  # that one is read back
                    await store.remove(key)
        print(f"obstore, large: round {number + 1} of {plan.rounds}", flush=True)
    for case in cases:
        what = f"obstore, {size // MIB} MiB {case}"
        rates = {name: size / MIB / statistics.median(seconds) for name, seconds in samples[case].items()}
        report.operations_per_second[f"{what} (MiB/s)"] = rates
        report.compare(what, samples[case], BARE, goal=None if case == "up, SHA-256" else BARE_GOAL)


async def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, help="measured rounds, after one to warm up (5)")
    parser.add_argument("--quick", action="store_true", help="one tiny round, to see that it runs")
    parser.add_argument("--only", choices=("objects", "large"))
    parser.add_argument("--json", help="write the figures to this file, for run.py")
    parser.add_argument("--directory", help="where the large file lies")
    options = parser.parse_args()
    plan = QUICK if options.quick else Plan(rounds=options.rounds or 5)
    report = Report()

    from django.conf import settings

    from tests.services.s3 import S3Server

    settings.configure()
    server = S3Server(roomy(options.directory), volume_mib=16 << 10)
    try:
        with tempfile.TemporaryDirectory(prefix="bench-", dir=options.directory) as directory:
            if options.only in (None, "objects"):
                await objects(plan, server.service, report)
            if options.only in (None, "large"):
                await large(plan, server.service, Path(directory), report)
    finally:
        with contextlib.suppress(OSError):
            server.stop()
    print(f"\n{table(report)}\n")
    if options.json:
        Path(options.json).write_text(json.dumps(dataclasses.asdict(report)))


if __name__ == "__main__":
    asyncio.run(main())
