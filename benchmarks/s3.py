"""Measure S3Backend beside aioboto3, bare and with its transfer methods, and django-storages; see README.md.

    python benchmarks/s3.py [--rounds N] [--quick] [--only objects|large]

The server is one SeaweedFS of our own for the time of the run, on the same machine: of 2 cores it takes one. Nobody
sends "Expect: 100-continue". A process of its own, because django-storages needs a configured Django.
"""

import argparse
import asyncio
import contextlib
import dataclasses
import gc
import json
import os
import random
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.run import MIB, OURS, QUICK, SLICES, Plan, Report, Row, at_once, roomy, rotated, slices, table, timed

BARE = "aioboto3, same Config"
DEFAULT = "aioboto3, default Config"
TRANSFER = "aioboto3's transfer methods"
STORAGES = "django-storages, 16 threads"
TASKS = 16
SIZES = {"4 KiB": (4096, 300), "1 MiB": (MIB, 60)}
VERBS = ("up", "down")
LARGE = 256 * MIB


# -- contenders: each puts and gets whole objects


class Ours:
    def __init__(self, backend: Any) -> None:
        self.backend = backend

    async def up(self, key: str, content: bytes) -> None:
        from aproxy_storage import Source

        await self.backend.write(key, Source.of(content, checksum=None))

    async def down(self, key: str) -> bytes:
        async with self.backend.read(key) as reader:
            return b"".join([chunk async for chunk in reader])


class Bare:
    def __init__(self, client: Any, bucket: str) -> None:
        self.client = client
        self.bucket = bucket

    async def up(self, key: str, content: bytes) -> None:
        await self.client.put_object(Bucket=self.bucket, Key=key, Body=content)

    async def down(self, key: str) -> bytes:
        answer = await self.client.get_object(Bucket=self.bucket, Key=key)
        body = answer["Body"]
        try:
            return await body.read()  # type: ignore[no-any-return]
        finally:
            body.close()


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

    async def up(self, key: str, content: bytes) -> None:
        from django.core.files.base import ContentFile

        await self._call(lambda: self.storage.save(key, ContentFile(content)))

    async def down(self, key: str) -> bytes:
        def read() -> bytes:
            with self.storage.open(key) as file:
                return file.read()  # type: ignore[no-any-return]

        return await self._call(read)

    def _call(self, work: Callable[[], Any]) -> Awaitable[Any]:
        return asyncio.get_running_loop().run_in_executor(self.threads, work)


class Proxied:
    """The same backend below a ProxyStorage with SQLite, SHA-256 and all."""

    def __init__(self, storage: Any) -> None:
        self.storage = storage

    async def up(self, key: str, content: bytes) -> None:
        await self.storage.save(key, content)

    async def down(self, key: str) -> bytes:
        async with self.storage.open(key) as file:
            return await file.read()  # type: ignore[no-any-return]


@contextlib.asynccontextmanager
async def contenders(service: Any, directory: Path) -> AsyncIterator[dict[str, Any]]:
    import aioboto3

    from aproxy_storage import ProxyStorage
    from aproxy_storage.meta_backends.sqlite import SQLiteMetaBackend

    connection = {
        "endpoint_url": service.endpoint_url,
        "region_name": service.region,
        "aws_access_key_id": service.access_key,
        "aws_secret_access_key": service.secret_key,
    }
    session = aioboto3.Session()
    async with contextlib.AsyncExitStack() as stack:
        enter = stack.enter_async_context
        backend = await enter(backend_of(service))
        meta = SQLiteMetaBackend(directory / "s3.sqlite3")
        storage = await enter(ProxyStorage("bench", originals=backend_of(service, prefix="proxied"), meta=meta))
        same = backend._options.client_config()
        found: dict[str, Any] = {
            OURS: Ours(backend),
            BARE: Bare(await enter(session.client("s3", config=same, **connection)), service.bucket),
            DEFAULT: Bare(await enter(session.client("s3", **connection)), service.bucket),
            "proxy": Proxied(storage),
        }
        with contextlib.suppress(ImportError):
            found[STORAGES] = DjangoStorages(service)
        yield found


def backend_of(service: Any, **options: Any) -> Any:
    from aproxy_storage.backends.s3 import S3Backend

    return S3Backend(**service.options, flat_listings=False, max_segment_bytes=255, **options)


# -- many small objects


async def objects(plan: Plan, service: Any, directory: Path, report: Report) -> None:
    async with contenders(service, directory) as stores:
        if STORAGES not in stores:
            report.missing[STORAGES] = "django-storages is not installed"
        for label, (size, count) in SIZES.items():
            count = 4 if plan is QUICK else count
            content = random.Random(5).randbytes(size)
            # One of them takes ten times as long.
            shares = {name: count // 4 if name == STORAGES else count for name in stores}
            seconds: dict[str, dict[str, list[float]]] = {verb: {name: [] for name in stores} for verb in VERBS}
            cpu: dict[str, dict[str, list[float]]] = {verb: {name: [] for name in stores} for verb in VERBS}
            for round_number in slices(plan):
                keys = {
                    name: [f"{size}/{place}/{round_number}/{number}" for number in range(shares[name])]
                    for place, name in enumerate(stores)
                }
                for verb in VERBS:
                    for name in rotated(stores, round_number + 1):
                        elapsed, spent = await batch(stores[name], verb, keys[name], content)
                        if round_number >= 0:
                            seconds[verb][name].append(elapsed)
                            cpu[verb][name].append(spent)
                await remove(stores[BARE].client, service.bucket, keys)
                if round_number % SLICES == SLICES - 1:
                    print(f"s3, {label}: round {round_number // SLICES + 1} of {plan.rounds}", flush=True)
            for verb in VERBS:
                what = f"S3, {label} {verb}, {TASKS} tasks"
                rates = {name: 1 / statistics.median(times) for name, times in seconds[verb].items()}
                report.operations_per_second[what] = rates
                report.operations_per_second[f"{what}, microseconds of CPU"] = {
                    name: statistics.median(times) * 1e6 for name, times in cpu[verb].items()
                }
                report.compare(what, seconds[verb], BARE, goal=0.95)
                report.compare(what, seconds[verb], DEFAULT, goal=1.1)
                goals = {"up": 2.5, "down": 4.0} if label == "4 KiB" else {}
                report.compare(what, seconds[verb], STORAGES, goal=goals.get(verb))
                proxy(report, label, verb, seconds[verb], cpu[verb])


def rounds(plan: Plan) -> range:
    """A round to warm up is the first, of number -1."""
    return range(0 if plan is QUICK else -1, plan.rounds)


async def batch(store: Any, verb: str, keys: list[str], content: bytes) -> tuple[float, float]:
    """Return seconds, and seconds of CPU, for each object."""
    gc.collect()

    async def up(key: str) -> None:
        await store.up(key, content)

    async def down(key: str) -> None:
        assert await store.down(key) == content

    start, cpu = time.perf_counter(), time.process_time()
    await at_once(TASKS, keys, down if verb == "down" else up)
    return (time.perf_counter() - start) / len(keys), (time.process_time() - cpu) / len(keys)


async def remove(client: Any, bucket: str, keys: dict[str, list[str]]) -> None:
    """Remove the objects of a slice, so that a long run does not fill the server. The proxy's are below its prefix."""
    for name, some in keys.items():
        named = [{"Key": f"proxied/{key}" if name == "proxy" else key} for key in some]
        await client.delete_objects(Bucket=bucket, Delete={"Objects": named, "Quiet": True})


def proxy(report: Report, label: str, verb: str, seconds: dict[str, list[float]], cpu: dict[str, list[float]]) -> None:
    """What the proxy adds: its time at 1 MiB, its CPU at 4 KiB."""
    if label == "1 MiB":
        report.compare(
            f"proxy over S3, {label} {verb}", {OURS: seconds["proxy"], "alone": seconds[OURS]}, "alone",
            label="S3Backend alone", goal=1 / 1.1,
        )  # fmt: skip
        return
    # A share of means, not a mean of shares: what is added is so small a difference that noise in one slice can make it
    # nothing, and the share endless.
    slices_of = list(zip(cpu[BARE], cpu["proxy"], cpu[OURS], strict=True))
    rounds_of = [share(slices_of[start : start + SLICES]) for start in range(0, len(slices_of), SLICES)]
    what = f"CPU that the proxy adds, {label} {verb}"
    report.rows.append(Row(what, f"{BARE}, its CPU", share(slices_of), min(rounds_of), max(rounds_of), 4.0))


def share(slices: list[tuple[float, float, float]]) -> float:
    """Return how many times what the proxy adds goes into what bare aioboto3 takes; at most 100."""
    bare, proxied, alone = (statistics.mean(column) for column in zip(*slices, strict=True))
    return bare / max(proxied - alone, bare / 100)


# -- one large object, each time in a process of its own for its memory


async def large(plan: Plan, service: Any, directory: Path, report: Report) -> None:
    size = 12 * MIB if plan is QUICK else LARGE
    source = directory / "large.bin"
    with source.open("wb") as file:
        block = random.Random(6).randbytes(MIB)
        for _ in range(size // MIB):
            file.write(block)
    seconds: dict[str, dict[str, list[float]]] = {verb: {OURS: [], TRANSFER: []} for verb in VERBS}
    memory: dict[str, dict[str, list[float]]] = {verb: {OURS: [], TRANSFER: []} for verb in VERBS}
    with contextlib.closing(service.client()) as client:
        for round_number in rounds(plan):
            for name in rotated((OURS, TRANSFER), round_number + 1):
                for verb in VERBS:
                    process = await asyncio.create_subprocess_exec(
                        sys.executable, __file__, "--large", name, "--verb", verb, "--file", str(source),
                        "--service", json.dumps(service.options), stdout=asyncio.subprocess.PIPE,
                    )  # fmt: skip
                    output, _ = await process.communicate()
                    assert process.returncode == 0, name
                    elapsed, grown = json.loads(output)
                    if round_number >= 0:
                        seconds[verb][name].append(elapsed)
                        memory[verb][name].append(grown)
                client.delete_object(Bucket=service.bucket, Key="large")
            print(f"s3, large: round {round_number + 1} of {plan.rounds}", flush=True)
    for verb, goal in (("up", 1.1), ("down", 1.3)):
        what = f"S3, {size // MIB} MiB {verb}"
        report.operations_per_second[f"{what} (MiB/s)"] = {
            name: size / MIB / statistics.median(times) for name, times in seconds[verb].items()
        }
        report.operations_per_second[f"{what}, memory (MiB)"] = {
            name: statistics.median(grown) / MIB for name, grown in memory[verb].items()
        }
        report.compare(what, seconds[verb], TRANSFER, goal=goal)
        report.compare(f"{what}, memory", memory[verb], TRANSFER, goal=2.0)


class Sink:
    """A file that keeps nothing."""

    def __init__(self) -> None:
        self.size = 0

    def write(self, piece: bytes) -> int:
        self.size += len(piece)
        return len(piece)


async def one_large(name: str, verb: str, options: dict[str, Any], path: Path) -> tuple[float, float]:
    """Return seconds and bytes of memory, at their highest above the start, of one verb."""
    import aioboto3

    key, size = "large", path.stat().st_size
    backend = backend_of(Options(options))
    connection = {
        "endpoint_url": options["endpoint_url"],
        "region_name": options["region"],
        "aws_access_key_id": options["access_key"],
        "aws_secret_access_key": options["secret_key"],
    }
    async with backend, aioboto3.Session().client("s3", **connection) as client:
        store = Ours(backend) if name == OURS else Bare(client, options["bucket"])
        await store.up(f"warm-{os.getpid()}", b"x")
        await store.down(f"warm-{os.getpid()}")

        async def up() -> None:
            if name == OURS:
                from aproxy_storage import Source

                await backend.write(key, Source.of(path, checksum=None))
            else:
                await client.upload_file(str(path), options["bucket"], key)

        async def down() -> None:
            sink = Sink()
            if name == OURS:
                async with backend.read(key) as reader:
                    async for chunk in reader:
                        sink.write(chunk)
            else:
                await client.download_fileobj(options["bucket"], key, sink)
            assert sink.size == size

        with Peak() as peak:
            elapsed, _ = await timed(up() if verb == "up" else down())
    return elapsed, peak.grown


@dataclasses.dataclass
class Options:
    options: dict[str, Any]


class Peak:
    """Watches the memory of this process from a thread."""

    def __enter__(self) -> "Peak":
        import psutil

        self._process = psutil.Process()
        self._start = self._highest = self._process.memory_info().rss
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._watch)
        self._thread.start()
        return self

    def _watch(self) -> None:
        while not self._over.wait(0.01):
            self._highest = max(self._highest, self._process.memory_info().rss)

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()
        self.grown = float(max(self._highest - self._start, MIB))  # below that it is noise


def send_at_once() -> None:
    """Let no contender ask before it sends: after SeaweedFS's "100 Continue" boto3 now and then waits for a minute."""
    from botocore import handlers

    handlers.BUILTIN_HANDLERS[:] = [each for each in handlers.BUILTIN_HANDLERS if each[1] != handlers.add_expect_header]


async def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, help="measured rounds, after one to warm up (5)")
    parser.add_argument("--quick", action="store_true", help="one tiny round, to see that it runs")
    parser.add_argument("--only", choices=("objects", "large"))
    parser.add_argument("--json", help="write the figures to this file, for run.py")
    parser.add_argument("--directory", help="where the large file lies")
    for hidden in ("--large", "--verb", "--file", "--service"):
        parser.add_argument(hidden, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.large:
        print(json.dumps(await one_large(options.large, options.verb, json.loads(options.service), Path(options.file))))
        return
    plan = QUICK if options.quick else Plan(rounds=options.rounds or 5)
    report = Report()

    from django.conf import settings

    from tests.services.s3 import S3Server

    settings.configure()
    send_at_once()
    server = S3Server(roomy(options.directory), volume_mib=16 << 10)
    try:
        with tempfile.TemporaryDirectory(prefix="bench-", dir=options.directory) as directory:
            if options.only in (None, "objects"):
                await objects(plan, server.service, Path(directory), report)
            if options.only in (None, "large"):
                await large(plan, server.service, Path(directory), report)
    finally:
        server.stop()
    print(f"\n{table(report)}\n")
    if options.json:
        Path(options.json).write_text(json.dumps(dataclasses.asdict(report)))


if __name__ == "__main__":
    asyncio.run(main())
