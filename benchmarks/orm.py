"""Measure the meta-backend over Django's ORM beside the bare asynchronous ORM with model instances; see README.md.

    python benchmarks/orm.py [--rounds N] [--quick] [--only sqlite|postgres] [--json FILE] [--directory DIR]

PostgreSQL is the server of APROXY_TEST_POSTGRES_URL, else one of our own for the time of the run. A process of its own,
because one process can hold one configured Django.
"""

import argparse
import asyncio
import contextlib
import dataclasses
import json
import os
import statistics
import sys
import tempfile
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.run import OURS, QUICK, Plan, Report, at_once, rotated, table, timed

BARE = "bare async ORM"
GOAL = 1.0
#: In this order: each works on what the ones before it have left.
VERBS = ("create", "get", "exists", "update", "delete", "create_many", "get_many")
WORDS = {"create_many": "create, batches of 100", "get_many": "get, batches of 100"}
BATCH = 100


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

    def __init__(self, alias: str) -> None:
        from aproxy_storage.meta_backends.orm import ORMMetaBackend

        self.meta = ORMMetaBackend("sync_bridge.StoredFile", alias)

    async def create(self, path: str) -> Any:
        return await self.meta.create(record(path))

    async def get(self, path: str) -> Any:
        return await self.meta.get(path)

    async def exists(self, path: str) -> Any:
        return await self.meta.exists(path, state="stored")

    async def update(self, found: Any) -> Any:
        return await self.meta.update(found.path, {"size": 1, "version": 1}, expect=found.revision)

    async def delete(self, found: Any) -> Any:
        await self.meta.delete(found.path, expect=found.revision)

    async def create_many(self, paths: list[str]) -> Any:
        return await self.meta.create_many([record(path) for path in paths])

    async def get_many(self, paths: list[str]) -> Any:
        return await self.meta.get_many(paths)


class Bare:
    """The same statements, as one would write them with Django's asynchronous ORM and model instances."""

    def __init__(self, alias: str) -> None:
        from sync_bridge.models import StoredFile

        self.model = StoredFile
        self.rows = StoredFile.objects.using(alias)

    def instance(self, path: str) -> Any:
        from django.utils import timezone

        made = record(path)
        fields = ("proxy_storage_name", "original_storage_name", "original_storage_path", "token", "size", "checksum",
                  "content_type", "name")  # fmt: skip
        values = {name: getattr(made, name) for name in fields}
        now = timezone.now()
        return self.model(path=path, extra=dict(made.extra), created_at=now, updated_at=now, **values)

    async def create(self, path: str) -> Any:
        made = self.instance(path)
        await made.asave(using=self.rows.db, force_insert=True)
        return made

    async def get(self, path: str) -> Any:
        return await self.rows.aget(path=path)

    async def exists(self, path: str) -> Any:
        return await self.rows.filter(path=path, state="stored").aexists()

    async def update(self, found: Any) -> Any:
        from django.utils import timezone

        same = self.rows.filter(path=found.path, token=found.token, version=found.version)
        if not await same.aupdate(size=1, version=1, updated_at=timezone.now()):
            raise LookupError(found.path)

    async def delete(self, found: Any) -> Any:
        deleted, _ = await self.rows.filter(path=found.path, token=found.token, version=found.version).adelete()
        if not deleted:
            raise LookupError(found.path)

    async def create_many(self, paths: list[str]) -> Any:
        return await self.rows.abulk_create([self.instance(path) for path in paths])

    async def get_many(self, paths: list[str]) -> Any:
        return [found async for found in self.rows.filter(path__in=paths)]


async def one_round(plan: Plan, contender: Any, verb: str, label: str, state: dict[str, Any]) -> float:
    """Return the seconds that `contender` takes for `verb` on all files."""
    paths = [f"{label}/{number:05}.bin" for number in range(plan.files)]
    batches = [paths[start : start + BATCH] for start in range(0, len(paths), BATCH)]
    if verb == "create_many":
        paths, batches = [], [[f"many/{path}" for path in batch] for batch in batches]
        state["batches"] = batches
    items = {
        "create": paths,
        "get": paths,
        "exists": paths,
        "update": state.get("found"),
        "delete": state.get("changed"),
        "create_many": batches,
        "get_many": state.get("batches"),
    }[verb]
    seconds, answers = await timed(at_once(plan.tasks, items, getattr(contender, verb)))
    if verb == "get":
        state["found"] = answers
    elif verb == "exists":
        assert all(answers), label
    elif verb == "update":
        state["changed"] = await at_once(plan.tasks, paths, contender.get)
        assert all(each.size == 1 for each in state["changed"]), label
    elif verb == "get_many":
        assert sum(map(len, answers)) == plan.files, label
    return seconds


async def measure(plan: Plan, kind: str, alias: str, report: Report) -> None:
    contenders = {OURS: Ours(alias), BARE: Bare(alias)}
    samples: dict[str, dict[str, list[float]]] = {verb: {} for verb in VERBS}
    for number in range(-1, plan.rounds):
        states: dict[str, dict[str, Any]] = {name: {} for name in contenders}
        for verb in VERBS:
            for name in rotated(contenders, number + 1):
                seconds = await one_round(plan, contenders[name], verb, f"{name}-{number}", states[name])
                if number >= 0:
                    samples[verb].setdefault(name, []).append(seconds)
        print(f"ORM on {kind}: round {number + 1} of {plan.rounds}", flush=True)
    await contenders[OURS].meta.aclose()
    for verb, timings in samples.items():
        what = f"ORM meta on {kind}, {WORDS.get(verb, verb)}"
        rates = {name: plan.files / statistics.median(seconds) for name, seconds in timings.items()}
        report.operations_per_second[what] = rates
        report.compare(what, timings, BARE, goal=GOAL)


@contextlib.asynccontextmanager
async def prepared(alias: str, settings: dict[str, Any]) -> AsyncIterator[str]:
    """A database with the tables of `sync_bridge`, without it any more afterwards."""
    from asgiref.sync import sync_to_async
    from django.core.management import call_command

    from tests.django_support.setup import add_database, remove_database

    add_database(alias, settings)
    migrate: Callable[..., Awaitable[None]] = sync_to_async(call_command)
    await migrate("migrate", "sync_bridge", database=alias, verbosity=0, interactive=False)
    try:
        yield alias
    finally:
        await migrate("migrate", "sync_bridge", "zero", database=alias, verbosity=0, interactive=False)
        await asyncio.to_thread(remove_database, alias)


@contextlib.contextmanager
def postgres() -> Iterator[str]:
    """The URL of a server."""
    if url := os.environ.get("APROXY_TEST_POSTGRES_URL"):
        yield url
        return
    from tests.services.postgres import PostgresServer

    server = PostgresServer()
    try:
        server.start()
        yield server.url
    finally:
        server.stop()


async def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, help="measured rounds, after one to warm up (7)")
    parser.add_argument("--quick", action="store_true", help="one tiny round, to see that it runs")
    parser.add_argument("--only", choices=("sqlite", "postgres"))
    parser.add_argument("--json", help="write the figures to this file, for run.py")
    parser.add_argument("--directory", help="where the SQLite file lies")
    options = parser.parse_args()
    plan = QUICK if options.quick else Plan(rounds=options.rounds or 7)
    report = Report()

    from tests.django_support.setup import configure, postgres_settings, sqlite_settings

    configure()
    if options.only in (None, "sqlite"):
        with tempfile.TemporaryDirectory(prefix="bench-", dir=options.directory) as directory:
            # As our own SQLite meta-backend has it.
            init = "pragma journal_mode=wal; pragma synchronous=normal"
            settings = sqlite_settings(Path(directory) / "orm.db", init_command=init, transaction_mode="IMMEDIATE")
            async with prepared("sqlite", settings) as alias:
                await measure(plan, "SQLite", alias, report)
    if options.only in (None, "postgres"):
        try:
            with postgres() as url:
                async with prepared("postgres", postgres_settings(url)) as alias:
                    await measure(plan, "PostgreSQL", alias, report)
        except (ImportError, RuntimeError) as error:
            report.missing["ORM on PostgreSQL"] = str(error)
            print(f"--- left out: ORM on PostgreSQL: {error}")
    print(f"\n{table(report)}\n")
    if options.json:
        Path(options.json).write_text(json.dumps(dataclasses.asdict(report)))


if __name__ == "__main__":
    asyncio.run(main())
