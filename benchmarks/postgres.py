"""Measure both PostgreSQL backends beside a bare asyncpg pool, in interleaved rounds; see README.md.

    python benchmarks/postgres.py [--rounds N] [--quick] [--only records|files]

The server is that of APROXY_TEST_POSTGRES_URL, else one of our own for the time of the run (fsync off: what is compared
is what it costs to ask, not the disk). The bare pool resets nothing between two users, as ours does not.
"""

import argparse
import asyncio
import contextlib
import os
import random
import statistics
import sys
import tempfile
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.run import OURS, QUICK, Plan, Report, at_once, rotated, table, timed

BARE = "bare asyncpg pool"
ALONE = "ours, coalesce=False"
ONE_BY_ONE = "ours, one after the other"
#: In this order: each works on what the ones before it have left.
VERBS = ("create", "get", "exists", "update", "delete")
GOALS = {"create": 2.0, "get": 0.9, "exists": 0.9, "update": 0.9, "delete": 0.9}
MANY_GOAL = 10.0
COLUMNS = (
    "path", "proxy_storage_name", "original_storage_name", "original_storage_path", "state", "token", "version",
    "places", "size", "checksum", "content_type", "name", "extra",
)  # fmt: skip


def record(path: str) -> Any:
    from aproxy_storage import MetaRecord
    from aproxy_storage.paths import new_token

    return MetaRecord(
        path,
        "media",
        "fs",
        path,
        token=new_token(),
        size=4096,
        checksum="sha256:" + "0f" * 32,
        content_type="application/octet-stream",
        name=path,
        extra={"owner": 7},
    )


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


class Bare:
    """The same statements on the same table, as one would write them with asyncpg."""

    def __init__(self, pool: Any, name: str) -> None:
        self.pool = pool
        marks = ", ".join(f"${number}" for number in range(1, len(COLUMNS) + 1))
        self.create_text = (
            f"INSERT INTO {name} ({', '.join(COLUMNS)}, created_at, updated_at) VALUES ({marks}, now(), now()) "
            "ON CONFLICT (path) DO NOTHING RETURNING created_at"
        )
        self.get_text = f"SELECT * FROM {name} WHERE path = $1"
        self.exists_text = f"SELECT true FROM {name} WHERE path = $1 AND state = 'stored'"
        same = "WHERE path = $1 AND token = $2 AND version = $3"
        self.update_text = f"UPDATE {name} SET size = $4, version = $5, updated_at = now() {same} RETURNING *"
        self.delete_text = f"DELETE FROM {name} {same} RETURNING true"

    async def create(self, made: Any) -> Any:
        values = [made[column] for column in COLUMNS[:7]]
        values += ["[]", made.size, made.checksum, made.content_type, made.name, '{"owner":7}']
        row = await self.pool.fetchrow(self.create_text, *values)
        assert row is not None
        return row

    async def get(self, made: Any) -> Any:
        return await self.pool.fetchrow(self.get_text, made.path)

    async def exists(self, made: Any) -> Any:
        return await self.pool.fetchval(self.exists_text, made.path)

    async def update(self, made: Any) -> Any:
        row = await self.pool.fetchrow(self.update_text, made.path, made.token, 0, 1, 1)
        assert row is not None
        return row

    async def delete(self, made: Any) -> Any:
        assert await self.pool.fetchval(self.delete_text, made.path, made.token, 1)


async def records(plan: Plan, url: str, report: Report) -> None:
    """Single operations at 64 tasks, and the calls that take many."""
    import asyncpg

    from aproxy_storage.clients.postgres import Connection
    from aproxy_storage.meta_backends.postgres import PostgresMetaBackend

    async with contextlib.AsyncExitStack() as stack:
        enter = stack.enter_async_context
        together = await enter(PostgresMetaBackend(url, table="bench_together"))
        alone = await enter(PostgresMetaBackend(url, table="bench_alone", coalesce=False))
        await enter(PostgresMetaBackend(url, table="bench_bare"))  # for its table, with all indexes
        pool = await enter(asyncpg.create_pool(url, min_size=10, max_size=10, connection_class=Connection))
        stack.push_async_callback(pool.execute, "DROP TABLE bench_together, bench_alone, bench_bare")
        contenders = {OURS: Ours(together), ALONE: Ours(alone), BARE: Bare(pool, "bench_bare")}
        samples: dict[str, dict[str, list[float]]] = {verb: {} for verb in VERBS}
        many: dict[str, dict[str, list[float]]] = {verb: {} for verb in VERBS if verb != "exists"}
        for number in range(-1, plan.rounds):
            made = {name: [record(f"{number}/{file:05}.bin") for file in range(plan.files)] for name in contenders}
            for verb in VERBS:
                for name in rotated(contenders, number + 1):
                    seconds, answers = await timed(at_once(plan.tasks, made[name], getattr(contenders[name], verb)))
                    assert verb == "delete" or all(answers), (name, verb)
                    if number >= 0:
                        samples[verb].setdefault(name, []).append(seconds)
            few = [record(f"few/{number}/{file:05}.bin") for file in range(max(plan.files // 4, 4))]
            lots = [record(f"lots/{number}/{file:05}.bin") for file in range(plan.files * 4)]
            for verb in many:
                seconds, _ = await timed(at_once(1, few, getattr(contenders[OURS], verb)))
                in_one, _ = await timed(_many(together, verb, lots))
                if number >= 0:
                    many[verb].setdefault(ONE_BY_ONE, []).append(seconds / len(few))
                    many[verb].setdefault(OURS, []).append(in_one / len(lots))
            print(f"PostgreSQL, records: round {number + 1} of {plan.rounds}", flush=True)
    for verb, timings in samples.items():
        what = f"PostgreSQL meta, {verb}, {plan.tasks} tasks"
        report.operations_per_second[what] = {
            name: plan.files / statistics.median(seconds) for name, seconds in timings.items()
        }
        report.compare(what, timings, BARE, goal=GOALS[verb])
        report.compare(f"{what}, each alone", {OURS: timings[ALONE], BARE: timings[BARE]}, BARE)
    for verb, timings in many.items():
        what = f"PostgreSQL meta, {verb}_many"
        report.operations_per_second[what] = {name: 1 / statistics.median(each) for name, each in timings.items()}
        report.compare(what, timings, ONE_BY_ONE, goal=MANY_GOAL)


async def _many(meta: Any, verb: str, made: list[Any]) -> None:
    if verb == "create":
        answers: list[Any] = await meta.create_many(made)
    elif verb == "get":
        answers = await meta.get_many([one.path for one in made])
    elif verb == "update":
        answers = await meta.update_many([(one.path, {"size": 1, "version": 1}, one.revision) for one in made])
    else:
        await meta.delete_many([(one.path, None) for one in made])
        return
    assert [answer.path for answer in answers] == [one.path for one in made]


async def files(plan: Plan, url: str, report: Report) -> None:
    """Objects in PostgreSQL beside objects in a directory: what it costs to have one database to back up."""
    from aproxy_storage.backends.filesystem import FileSystemBackend
    from aproxy_storage.backends.postgres import PostgresBackend

    mib = 1 << 20
    big = 64 * mib if plan.files > QUICK.files else 2 * mib
    sizes = {"4 KiB": (4096, plan.files), "1 MiB": (mib, max(plan.files // 32, 2)), f"{big // mib} MiB": (big, 2)}
    content = {size: random.Random(size).randbytes(size) for size, _ in sizes.values()}
    timings: dict[str, dict[str, list[float]]] = {}
    with tempfile.TemporaryDirectory(prefix="bench-") as directory:
        async with PostgresBackend(url, table="bench_objects") as postgres, FileSystemBackend(directory) as disk:
            backends = {OURS: postgres, "FileSystemBackend": disk}
            for number in range(-1, plan.rounds):
                for label, (size, count) in sizes.items():
                    keys = [f"{number}/{label}/{file:05}" for file in range(count)]
                    for verb in ("write", "read", "discard"):
                        for name in rotated(backends, number + 1):
                            backend = backends[name]
                            works: dict[str, Callable[[str], Awaitable[Any]]] = {
                                "write": lambda key, b=backend, s=size: b.write(key, _stream(content[s])),
                                "read": lambda key, b=backend: _read(b, key),
                                "discard": lambda key, b=backend: b.discard(key),
                            }
                            seconds, answers = await timed(at_once(min(plan.tasks, 8), keys, works[verb]))
                            assert verb != "read" or set(answers) == {size}
                            if number >= 0:
                                timings.setdefault(f"{verb} {label}", {}).setdefault(name, []).append(seconds)
                print(f"PostgreSQL, files: round {number + 1} of {plan.rounds}", flush=True)
            async with postgres._database.use() as connection:
                await connection.execute("DROP TABLE bench_objects, bench_objects_chunks")
    for what, samples in timings.items():
        size, count = sizes[what.partition(" ")[2]]
        if size < mib:
            rates = {name: count / statistics.median(seconds) for name, seconds in samples.items()}
            report.operations_per_second[f"PostgreSQL files, {what}, 8 tasks"] = rates
        else:
            rates = {name: size * count / mib / statistics.median(seconds) for name, seconds in samples.items()}
            report.operations_per_second[f"PostgreSQL files, {what}, 8 tasks (MiB/s)"] = rates
        report.compare(f"PostgreSQL files, {what}", samples, "FileSystemBackend")


async def _stream(data: bytes) -> AsyncIterator[bytes]:
    for start in range(0, len(data), 1 << 20):
        yield data[start : start + (1 << 20)]


async def _read(backend: Any, key: str) -> int:
    async with backend.read(key) as reader:
        return sum([len(chunk) async for chunk in reader])


@contextlib.contextmanager
def server() -> Iterator[str]:
    """Give the URL of a server."""
    if url := os.environ.get("APROXY_TEST_POSTGRES_URL"):
        yield url
        return
    from tests.services.postgres import PostgresServer

    own = PostgresServer()
    try:
        own.start()
        yield own.url
    finally:
        own.stop()


async def measure(plan: Plan, report: Report, only: str | None = None) -> None:
    try:
        with server() as url:
            for name, part in (("records", records), ("files", files)):
                if only in (None, name):
                    await part(plan, url, report)
    except (ImportError, RuntimeError) as error:
        report.missing["PostgreSQL"] = str(error)
        print(f"--- left out: PostgreSQL: {error}")


async def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, help="measured rounds, after one to warm up (7)")
    parser.add_argument("--quick", action="store_true", help="one tiny round, to see that it runs")
    parser.add_argument("--only", choices=("records", "files"))
    options = parser.parse_args()
    report = Report()
    await measure(QUICK if options.quick else Plan(rounds=options.rounds or 7), report, options.only)
    print(f"\n{table(report)}\n")
    sys.exit(1 if report.missing else 0)


if __name__ == "__main__":
    asyncio.run(main())
