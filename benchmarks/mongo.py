"""Measure MongoDB's records and GridFS beside the bare drivers, in interleaved rounds; see README.md.

    python benchmarks/mongo.py [--rounds N] [--quick] [--only records|files] [--drivers pymongo,motor]

The server is that of APROXY_TEST_MONGO_URL, else SecantusDB for the time of the run. It takes about as long for a
statement as the client does, so that a ratio against it flatters: what the client adds counts twice on a fast server.
The bare driver writes with our write concern (majority, journalled) to a collection with our indexes.
"""

import argparse
import asyncio
import contextlib
import os
import random
import statistics
import sys
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.run import OURS, QUICK, Plan, Report, at_once, rotated, table, timed

#: In this order: each works on what the ones before it have left.
VERBS = ("create", "get", "exists", "update", "delete")
RECORD_GOAL, FILE_GOAL = 0.85, 0.9
MIB = 1 << 20


def record(path: str) -> Any:
    from aproxy_storage import MetaRecord
    from aproxy_storage.paths import new_token

    checksum = "sha256:" + "0f" * 32
    return MetaRecord(path, "media", "fs", path, token=new_token(), size=4096, checksum=checksum, name=path)


class Ours:
    """Our backend, as `ProxyStorage` calls it."""

    def __init__(self, meta: Any) -> None:
        self.meta = meta

    async def create(self, made: Any) -> Any:
        return await self.meta.create(made)

    async def get(self, made: Any) -> Any:
        return await self.meta.get(made.path)

    async def exists(self, made: Any) -> Any:
        return await self.meta.exists(made.path, state="stored")

    async def update(self, made: Any) -> Any:
        return await self.meta.update(made.path, {"size": 1, "version": 1}, expect=made.revision)

    async def delete(self, made: Any) -> Any:
        await self.meta.delete(made.path, expect=made.revision._replace(version=1))
        return True


class Bare:
    """The same statements, as one would write them with the driver."""

    def __init__(self, files: Any) -> None:
        self.files = files

    async def create(self, made: Any) -> Any:
        import datetime

        now = datetime.datetime.now(datetime.UTC)
        fields = ("path", "proxy_storage_name", "original_storage_name", "original_storage_path", "state", "token")
        document = {name: getattr(made, name) for name in (*fields, "version", "size", "checksum", "name")}
        return await self.files.insert_one({**document, "created_at": now, "updated_at": now})

    async def get(self, made: Any) -> Any:
        return await self.files.find_one({"path": made.path})

    async def exists(self, made: Any) -> Any:
        return await self.files.find_one({"path": made.path, "state": "stored"}, {"_id": True})

    async def update(self, made: Any) -> Any:
        same = {"path": made.path, "token": made.token, "version": 0}
        return await self.files.find_one_and_update(same, {"$set": {"size": 1, "version": 1}}, return_document=True)

    async def delete(self, made: Any) -> Any:
        done = await self.files.delete_one({"path": made.path, "token": made.token, "version": 1})
        return done.deleted_count


async def records(plan: Plan, url: str, driver: str, report: Report) -> None:
    """Single operations at 64 tasks."""
    from aproxy_storage.clients.mongo import JOURNALLED, collection_of
    from aproxy_storage.meta_backends.mongo import MongoMetaBackend

    async with contextlib.AsyncExitStack() as stack:
        database = await stack.enter_async_context(connected(driver, url))
        meta = await stack.enter_async_context(MongoMetaBackend(database, "ours"))
        await stack.enter_async_context(MongoMetaBackend(database, "bare"))  # for its indexes
        bare = f"bare {driver}"
        contenders = {OURS: Ours(meta), bare: Bare(collection_of(database, "bare", JOURNALLED))}
        samples: dict[str, dict[str, list[float]]] = {verb: {} for verb in VERBS}
        for number in range(-1, plan.rounds):
            made = {name: [record(f"{number}/{file:05}.bin") for file in range(plan.files)] for name in contenders}
            for verb in VERBS:
                for name in rotated(contenders, number + 1):
                    seconds, answers = await timed(at_once(plan.tasks, made[name], getattr(contenders[name], verb)))
                    assert all(answer is not None and answer != 0 for answer in answers), (name, verb)
                    if number >= 0:
                        samples[verb].setdefault(name, []).append(seconds)
            print(f"MongoDB by {driver}, records: round {number + 1} of {plan.rounds}", flush=True)
    for verb, timings in samples.items():
        what = f"MongoDB meta by {driver}, {verb}, {plan.tasks} tasks"
        report.operations_per_second[what] = {
            name: plan.files / statistics.median(seconds) for name, seconds in timings.items()
        }
        report.compare(what, timings, bare, goal=RECORD_GOAL)


async def files(plan: Plan, url: str, driver: str, report: Report) -> None:
    """One file of 64 MiB, up and down, beside the driver's own bucket."""
    from aproxy_storage.backends.gridfs import GridFSBackend

    size = 64 * MIB if plan.files > QUICK.files else 2 * MIB
    content = random.Random(2).randbytes(MIB)
    bucket_name = f"the bucket of {driver}"
    samples: dict[str, dict[str, list[float]]] = {"up": {}, "down": {}}
    async with contextlib.AsyncExitStack() as stack:
        database = await stack.enter_async_context(connected(driver, url))
        ours = await stack.enter_async_context(GridFSBackend(database, bucket="ours"))
        theirs = bucket_of(driver, database)

        async def up(name: str, key: str) -> int:
            if name == OURS:
                # Without a checksum: the bucket takes none either.
                return (await ours.write(key, source(content, size), size=size)).size or 0
            async with theirs.open_upload_stream(key) as stream:
                async for chunk in blocks(content, size):
                    await stream.write(chunk)
            return size

        async def down(name: str, key: str) -> int:
            if name == OURS:
                async with ours.read(key) as reader:
                    return sum([len(chunk) async for chunk in reader])
            stream = await theirs.open_download_stream_by_name(key)
            total = 0
            while chunk := await stream.read(MIB):
                total += len(chunk)
            return total

        for number in range(-1, plan.rounds):
            for way, work in (("up", up), ("down", down)):
                for name in rotated((OURS, bucket_name), number + 1):
                    seconds, moved = await timed(work(name, f"{number}.bin"))
                    assert moved == size, (name, way)
                    if number >= 0:
                        samples[way].setdefault(name, []).append(seconds)
            await ours.discard(f"{number}.bin")
            await theirs.delete((await theirs.open_download_stream_by_name(f"{number}.bin"))._id)
            print(f"GridFS by {driver}: round {number + 1} of {plan.rounds}", flush=True)
    for way, timings in samples.items():
        what = f"GridFS by {driver}, {size // MIB} MiB {way}"
        rates = {name: size / MIB / statistics.median(seconds) for name, seconds in timings.items()}
        report.operations_per_second[f"{what} (MiB/s)"] = rates
        report.compare(what, timings, bucket_name, goal=FILE_GOAL)


async def blocks(content: bytes, size: int) -> AsyncIterator[bytes]:
    for _ in range(size // len(content)):
        yield content


def source(content: bytes, size: int) -> Any:
    from aproxy_storage.content import Source

    return Source.of(blocks(content, size), checksum=None)


@contextlib.asynccontextmanager
async def connected(driver: str, url: str) -> AsyncIterator[Any]:
    """Give the database ``bench``, new, of a client of `driver`."""
    if driver == "motor":
        from motor.motor_asyncio import AsyncIOMotorClient

        client: Any = AsyncIOMotorClient(url)
    else:
        from pymongo import AsyncMongoClient

        client = AsyncMongoClient(url)
    await client.drop_database("aproxy_bench")
    try:
        yield client["aproxy_bench"]
    finally:
        await client.drop_database("aproxy_bench")
        closing = client.close()
        if closing is not None:
            await closing


def bucket_of(driver: str, database: Any) -> Any:
    from aproxy_storage.clients.mongo import JOURNALLED

    if driver == "motor":
        from motor.motor_asyncio import AsyncIOMotorGridFSBucket

        return AsyncIOMotorGridFSBucket(database, write_concern=JOURNALLED)
    from gridfs import AsyncGridFSBucket

    return AsyncGridFSBucket(database, write_concern=JOURNALLED)


@contextlib.contextmanager
def server() -> Iterator[str]:
    """Give the URL of a server."""
    if url := os.environ.get("APROXY_TEST_MONGO_URL"):
        yield url
        return
    from tests.services.mongo import MongoServer

    own = MongoServer()
    try:
        own.start()
        yield own.url
    finally:
        own.stop()


async def measure(
    plan: Plan, report: Report, only: str | None = None, drivers: tuple[str, ...] = ("pymongo", "motor")
) -> None:
    try:
        with server() as url:
            for driver in drivers:
                for name, part in (("records", records), ("files", files)):
                    if only in (None, name):
                        await part(plan, url, driver, report)
    except (ImportError, OSError, RuntimeError) as error:
        report.missing["MongoDB"] = str(error)
        print(f"--- left out: MongoDB: {error}")


async def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, help="measured rounds, after one to warm up (7)")
    parser.add_argument("--quick", action="store_true", help="one tiny round, to see that it runs")
    parser.add_argument("--only", choices=("records", "files"))
    parser.add_argument("--drivers", default="pymongo,motor")
    options = parser.parse_args()
    report = Report()
    plan = QUICK if options.quick else Plan(rounds=options.rounds or 7)
    await measure(plan, report, options.only, tuple(options.drivers.split(",")))
    print(f"\n{table(report)}\n")
    sys.exit(1 if report.missing else 0)


if __name__ == "__main__":
    asyncio.run(main())
