"""Measure the bridge beside asgiref, and BridgeStorage beside django-proxy-storage, call after call; see README.md.

    python benchmarks/bridge.py [--rounds N] [--quick] [--only calls|storage|stream] [--json FILE] [--directory DIR]

A process of its own, because one process can hold one configured Django; the memory of streams is measured in one each.
"""

import argparse
import asyncio
import dataclasses
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.run import MIB, OURS, QUICK, Plan, Report, Row, rotated, table

SQLITE, ORM, ATOMIC = "SQLite meta", "ORM meta", "ORM meta, inside atomic()"
DPS, DPS_ATOMIC = "dps", "dps, inside atomic()"
VERBS = ("save", "exists", "size", "url", "read", "delete")
WORDS = {"read": "open + read"}
GOALS: dict[str, dict[str, float]] = {
    SQLITE: {"save": 1.0, "exists": 1.0, "read": 1.0, "delete": 1.0},
    ORM: {"save": 0.6, "delete": 0.45, "exists": 0.9, "size": 0.9, "url": 0.9},
    ATOMIC: {"delete": 0.6},
}
STREAM_GOAL = 24 * MIB


def timed(function: Callable[[], Any], count: int) -> float:
    start = time.perf_counter()
    for _ in range(count):
        function()
    return time.perf_counter() - start


# -- calls that do nothing


async def nothing() -> None:
    pass


MAIN = "main thread"


def calls(plan: Plan, report: Report) -> None:
    """Call from a thread, as the workers of servers do, which runs the loop itself; and from the main thread."""
    from sync_bridge import Bridge

    bridge = Bridge()
    bridge.call(nothing)
    samples: dict[str, dict[str, list[float]]] = {"": {}, MAIN: {}}
    for number in range(-1, plan.rounds):
        with ThreadPoolExecutor(1) as pool:
            rounds = {"": pool.submit(call_round, plan, bridge, number + 1).result()}
        rounds[MAIN] = call_round(plan, bridge, number + 1)
        for where, seconds in rounds.items():
            for name, value in seconds.items() if number >= 0 else ():
                samples[where].setdefault(name, []).append(value)
    bridge.close()
    for where, of_calls in samples.items():
        what = ", ".join(filter(None, ("bridged no-op", where)))
        report.operations_per_second[what] = {name: 1 / statistics.median(s) for name, s in of_calls.items()}
        report.compare(what, of_calls, "run_coroutine_threadsafe", goal=1 / 1.5)
        report.compare(what, of_calls, "async_to_sync", goal=None if where else 7.0)


def call_round(plan: Plan, bridge: Any, by: int) -> dict[str, float]:
    from asgiref.sync import async_to_sync

    loop = bridge.call(running_loop)
    count = 20 if plan is QUICK else 1000
    contenders: dict[str, tuple[Callable[[], Any], int]] = {
        OURS: (lambda: bridge.call(nothing), count),
        "run_coroutine_threadsafe": (lambda: asyncio.run_coroutine_threadsafe(nothing(), loop).result(), count),
        "async_to_sync": (lambda: async_to_sync(nothing)(), count // 10),
    }
    return {name: timed(*contenders[name]) / contenders[name][1] for name in rotated(contenders, by)}


async def running_loop() -> asyncio.AbstractEventLoop:
    return asyncio.get_running_loop()


# -- the storage


Peer: Any = None  # looked up by its dotted name


def configure(directory: Path) -> None:
    """Set Django up with a database and the tables of both in `directory`."""
    global Peer
    import django
    from django.conf import settings
    from django.core.management import call_command

    from benchmarks.peers import dps_compat

    init = "pragma journal_mode=wal; pragma synchronous=normal"
    settings.configure(
        DATABASES={
            "default": {
                "ENGINE": "django.db.backends.sqlite3",
                "NAME": directory / "bridge.db",
                "OPTIONS": {"init_command": init, "transaction_mode": "IMMEDIATE", "timeout": 60},
            }
        },
        INSTALLED_APPS=["django.contrib.contenttypes", "sync_bridge"],
        PROXY_STORAGE={"PROXY_STORAGE_CLASSES": {"peer": "benchmarks.bridge.Peer"}},
        MEDIA_ROOT=str(directory / "media"),
        MEDIA_URL="/media/",
        USE_TZ=True,
    )
    django.setup()
    dps_compat.install()
    call_command("migrate", verbosity=0, interactive=False)

    from django.core.files.storage import FileSystemStorage
    from django.db import connection
    from proxy_storage.meta_backends.orm import ORMMetaBackend, ProxyStorageModelBase
    from proxy_storage.storages.base import ProxyStorageBase

    class Meta(ProxyStorageModelBase):  # type: ignore[misc]
        class Meta:
            app_label = "bench"

    class Storage(ProxyStorageBase):  # type: ignore[misc]
        original_storage = FileSystemStorage(location=directory / "dps")
        meta_backend = ORMMetaBackend(model=Meta)

        # It has neither; this is what one would write.
        def size(self, name: str) -> int:
            size: int = self.original_storage.size(self.meta_backend.get(path=name)["original_storage_path"])
            return size

        def url(self, name: str) -> str:
            url: str = self.original_storage.url(name)
            return url

    # The module that django-proxy-storage imports it from, whatever this one is called when it is run.
    import benchmarks.bridge as module

    module.Peer = Storage
    with connection.schema_editor() as editor:
        editor.create_model(Meta)


def storages(directory: Path) -> dict[str, Any]:
    import benchmarks.bridge as module
    from sync_bridge import BridgeStorage

    (directory / "sqlite").mkdir(parents=True)
    with_sqlite = BridgeStorage(
        name="bench-sqlite",
        original=f"file://{directory}/sqlite",
        meta=f"sqlite:///{directory}/sqlite.db",
        base_url="/media/",
    )
    with_orm, peer = BridgeStorage(), module.Peer()
    return {SQLITE: with_sqlite, ORM: with_orm, ATOMIC: with_orm, DPS: peer, DPS_ATOMIC: peer}


def one_verb(storage: Any, verb: str, paths: list[str], content: bytes) -> list[str]:
    from django.core.files.base import ContentFile

    if verb == "save":
        return [storage.save(path, ContentFile(content)) for path in paths]
    if verb == "read":
        for path in paths:
            with storage.open(path) as file:
                assert file.read() == content
        return paths
    call = getattr(storage, verb)
    for path in paths:
        call(path)
    return paths


def storage(plan: Plan, report: Report, directory: Path) -> None:
    from django.db import transaction

    configure(directory)
    contenders = storages(directory)
    content = os.urandom(1024)
    count = 4 if plan is QUICK else 200
    samples: dict[str, dict[str, list[float]]] = {verb: {name: [] for name in contenders} for verb in VERBS}
    for number in range(-1, plan.rounds):
        paths = {
            name: [f"{'in' if 'atomic' in name else 'out'}/{number + 1}/{file}.bin" for file in range(count)]
            for name in contenders
        }
        for verb in VERBS:
            for name in rotated(contenders, number + 1):
                # Transactions of one call each, as a view has them.
                inside: Callable[[], AbstractContextManager[Any]] = (
                    transaction.atomic if name in (ATOMIC, DPS_ATOMIC) else nullcontext
                )
                saved: list[str] = []
                start = time.perf_counter()
                for path in paths[name]:
                    with inside():
                        saved += one_verb(contenders[name], verb, [path], content)
                seconds = time.perf_counter() - start
                paths[name] = saved
                if number >= 0:
                    samples[verb][name].append(seconds)
        print(f"bridge: round {number + 1} of {plan.rounds}", flush=True)
    for verb, timings in samples.items():
        what = f"{WORDS.get(verb, verb)} through BridgeStorage, 1 KiB"
        report.operations_per_second[what] = {name: count / statistics.median(s) for name, s in timings.items()}
        for name in (SQLITE, ORM, ATOMIC):
            base = DPS_ATOMIC if name == ATOMIC else DPS
            pair = {OURS: timings[name], base: timings[base]}
            report.compare(f"{what}, {name}", pair, base, goal=GOALS[name].get(verb))


# -- a stream from an asynchronous view

STREAM = """
import asyncio, resource, sys
from pathlib import Path
sys.path.insert(0, sys.argv[1])
from django.conf import settings
directory, ours = Path(sys.argv[2]), sys.argv[3] == "ours"
settings.configure(ROOT_URLCONF="__main__", ALLOWED_HOSTS=["*"], MIDDLEWARE=[])
import django
django.setup()
from django.core.asgi import get_asgi_application
from django.http import FileResponse, StreamingHttpResponse
from django.urls import path
from sync_bridge import BridgeStorage

storage = BridgeStorage(name="s", original=f"file://{directory}/files", meta=f"sqlite:///{directory}/records.sqlite3")

async def view(request):
    if ours:
        return StreamingHttpResponse(storage.astream("big.bin"))
    return FileResponse(open(directory / "files" / "big.bin", "rb"))

urlpatterns = [path("", view)]

async def main():
    application = get_asgi_application()
    got = 0
    messages = [{"type": "http.request", "body": b"", "more_body": False}]

    async def receive():
        if not messages:
            await asyncio.sleep(3600)
        return messages.pop()

    async def send(message):
        nonlocal got
        got += len(message.get("body", b""))

    scope = {"type": "http", "method": "GET", "path": "/", "headers": [(b"host", b"x")], "query_string": b""}
    if ours:
        await storage.proxy.size("big.bin")
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    await application(scope, receive, send)
    print(got, (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024)

asyncio.run(main())
"""


def stream(plan: Plan, report: Report, directory: Path) -> None:
    """Compare how much the process grows: a file of 300 MiB is sent by an asynchronous view."""
    size = (2 if plan is QUICK else 300) * MIB
    home = directory / "stream"
    (home / "files").mkdir(parents=True)
    with (home / "files" / "big.bin").open("wb") as file:
        for _ in range(size // MIB):
            file.write(os.urandom(MIB))
    subprocess.run([sys.executable, "-c", ADOPT, str(ROOT), str(home)], check=True)
    grown = {}
    for name in ("ours", "FileResponse"):
        command = [sys.executable, "-W", "ignore", "-c", STREAM, str(ROOT), str(home), name]
        done = subprocess.run(command, check=True, capture_output=True, text=True)
        sent, grown[name] = map(int, done.stdout.split())
        assert sent == size
    what = f"memory while {size // MIB} MiB are streamed"
    report.operations_per_second[f"{what} (MiB of growth)"] = {name: bytes_ / MIB for name, bytes_ in grown.items()}
    goal = None if plan is QUICK else STREAM_GOAL
    ratio = STREAM_GOAL / max(grown["ours"], MIB)  # below that it is noise
    report.rows.append(Row(what, "a growth of 24 MiB", ratio, ratio, ratio, None if goal is None else 1.0))


ROOT = Path(__file__).resolve().parent.parent

ADOPT = """
import asyncio, sys
sys.path.insert(0, sys.argv[1])
from aproxy_storage.config import storage_from_urls

async def main():
    async with storage_from_urls(
        f"file://{sys.argv[2]}/files", f"sqlite:///{sys.argv[2]}/records.sqlite3", name="s"
    ) as storage:
        await storage.adopt("big.bin")

asyncio.run(main())
"""


def parts(chosen: str | None) -> Iterator[str]:
    yield from (part for part in ("calls", "storage", "stream") if chosen in (None, part))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, help="measured rounds, after one to warm up (7)")
    parser.add_argument("--quick", action="store_true", help="one tiny round, to see that it runs")
    parser.add_argument("--only", choices=("calls", "storage", "stream"))
    parser.add_argument("--json", help="write the figures to this file, for run.py")
    parser.add_argument("--directory", help="where the files lie (/dev/shm)")
    options = parser.parse_args()
    plan = QUICK if options.quick else Plan(rounds=options.rounds or 7)
    report = Report()
    parent = options.directory or ("/dev/shm" if Path("/dev/shm").is_dir() else None)
    with tempfile.TemporaryDirectory(prefix="bench-", dir=parent) as directory:
        for part in parts(options.only):
            if part == "calls":
                calls(plan, report)
            else:
                {"storage": storage, "stream": stream}[part](plan, report, Path(directory))
    print(f"\n{table(report)}\n")
    if options.json:
        Path(options.json).write_text(json.dumps(dataclasses.asdict(report)))


if __name__ == "__main__":
    main()
