"""Measure aproxy_storage beside hand-made floors and django-proxy-storage, in interleaved rounds; see README.md.

    python benchmarks/run.py [--rounds N] [--only PART] [--quick] [--directory DIR]

A whole run (neither --quick nor --only) writes results/DATE-pyX.Y.json and the table in README.md.
"""

import argparse
import asyncio
import contextlib
import datetime
import gc
import importlib
import importlib.metadata
import json
import os
import platform
import random
import shutil
import sqlite3
import statistics
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

MIB = 1024 * 1024
VERBS = ("save", "exists", "read", "delete")
LABELS = {"save": "save", "exists": "exists", "read": "open + read", "delete": "delete", "list": "one page of list"}
FLOORS = {
    "threads + aiosqlite": "benchmarks.floors.threads_aiosqlite:Store",
    "aiofiles + aiosqlite": "benchmarks.floors.aiofiles_aiosqlite:Store",
    "one thread": "benchmarks.floors.one_thread:Store",
}
PEERS = {
    "dps, sync_to_async": "benchmarks.peers.dps:SensitiveStore",
    "dps, 8 threads": "benchmarks.peers.dps:ThreadedStore",
}
OURS = "ours"
EXISTS_REPEATS = 4
DPS_GOALS = {"save": 4.0, "exists": 8.0, "read": 4.0, "delete": 6.0}
FLOOR_GOAL, BIG_GOAL, MANY_GOAL = 0.6, 0.9, 1.5

Samples = dict[str, list[float]]  # contender -> seconds, one per round


@dataclass(frozen=True)
class Plan:
    rounds: int
    tasks: int = 64
    files: int = 1024
    content_bytes: int = 4096
    big_bytes: int = 1024 * MIB
    few: int = 1_000
    many: int = 1_000_000
    only: str | None = None


QUICK = Plan(rounds=1, tasks=4, files=8, big_bytes=2 * MIB, few=10, many=100)


@dataclass
class Row:
    """One line of the table. `ratio` is how many times as fast as `base` the contender is; None: not measured."""

    what: str
    base: str
    ratio: float | None
    low: float | None = None
    high: float | None = None
    goal: float | None = None

    @property
    def met(self) -> bool | None:
        return None if self.ratio is None or self.goal is None else self.ratio >= self.goal


@dataclass
class Report:
    operations_per_second: dict[str, dict[str, float]] = field(default_factory=dict)
    rows: list[Row] = field(default_factory=list)
    missing: dict[str, str] = field(default_factory=dict)

    def compare(self, what: str, samples: Samples, base: str, *, label: str = "", goal: float | None = None) -> None:
        """Add the median of the ratios of each round: what slows a whole round down falls out."""
        if OURS not in samples or base not in samples:
            self.rows.append(Row(what, label or base, None, goal=goal))
            return
        ratios = [theirs / ours for theirs, ours in zip(samples[base], samples[OURS], strict=True)]
        self.rows.append(Row(what, label or base, statistics.median(ratios), min(ratios), max(ratios), goal))


def load(target: str, report: Report) -> Any:
    """Import "module:name"; None, with the reason in the report, where something it needs is not there."""
    module, _, name = target.partition(":")
    try:
        return getattr(importlib.import_module(module), name)
    except ImportError as error:
        report.missing[target] = str(error)
        print(f"--- left out: {target}: {error}")
        return None


def rotated(names: Iterable[str], by: int) -> list[str]:
    listed = list(names)
    return listed[by % len(listed) :] + listed[: by % len(listed)] if listed else []


def fastest(samples: Samples, names: Iterable[str]) -> str:
    present = [name for name in names if name in samples]
    return min(present, key=lambda name: statistics.median(samples[name])) if present else ""


async def timed(work: Awaitable[Any]) -> tuple[float, Any]:
    gc.collect()
    start = time.perf_counter()
    result = await work
    return time.perf_counter() - start, result


async def at_once(tasks: int, items: Iterable[Any], work: Callable[[Any], Awaitable[Any]]) -> list[Any]:
    """Call `work` on each item from `tasks` tasks."""
    queue, results = iter(items), []

    async def worker() -> None:
        for item in queue:
            results.append(await work(item))  # noqa: PERF401  an async comprehension would publish nothing on error

    async with asyncio.TaskGroup() as group:
        for _ in range(tasks):
            group.create_task(worker())
    return results


# -- 64 tasks with 4 KiB files


async def small(plan: Plan, directory: Path, report: Report) -> None:
    content = random.Random(1).randbytes(plan.content_bytes)
    async with contextlib.AsyncExitStack() as stack:
        stores: dict[str, Any] = {}
        for name, target in {**FLOORS, OURS: "benchmarks.ours:Store", **PEERS}.items():
            if (kind := load(target, report)) is not None:
                home = directory / f"small-{len(stores)}"
                home.mkdir()
                stores[name] = await stack.enter_async_context(kind(home))
        samples: dict[str, Samples] = {verb: {name: [] for name in stores} for verb in VERBS}
        for round_number in range(-1, plan.rounds):  # the first one is a warm-up
            paths: dict[str, list[str]] = {}
            for verb in VERBS:
                for name in rotated(stores, round_number + 1):
                    seconds = await one_batch(plan, verb, name, stores[name], paths, round_number, content)
                    if round_number >= 0:
                        samples[verb][name].append(seconds)
            print(f"small: round {round_number + 1} of {plan.rounds}", flush=True)
    for verb in VERBS:
        count = plan.files * (EXISTS_REPEATS if verb == "exists" else 1)
        rates = {name: count / statistics.median(seconds) for name, seconds in samples[verb].items()}
        report.operations_per_second[f"{LABELS[verb]}, {plan.tasks} tasks"] = rates
        what = f"{LABELS[verb]}, {plan.tasks} tasks, {plan.content_bytes // 1024} KiB"
        dps = fastest(samples[verb], PEERS)
        report.compare(what, samples[verb], dps, label=dps or "dps", goal=DPS_GOALS[verb])
        floor = fastest(samples[verb], FLOORS)
        report.compare(what, samples[verb], floor, label=f"floor: {floor}", goal=FLOOR_GOAL)
        for other in FLOORS:
            if other != floor:
                report.compare(what, samples[verb], other, label=f"also: {other}")


async def one_batch(
    plan: Plan, verb: str, name: str, store: Any, paths: dict[str, list[str]], round_number: int, content: bytes
) -> float:
    if verb == "save":
        # Both dps contenders share a directory: a name of its own for each.
        label = f"{name.replace(', ', '-').replace(' ', '_')}/{round_number + 1:03}"
        names = [f"{label}/{number:05}.bin" for number in range(plan.files)]
        seconds, paths[name] = await timed(at_once(plan.tasks, names, lambda item: store.save(item, content)))
        assert len(set(paths[name])) == plan.files, name
        return seconds
    # 1,024 answers of `exists` take some 30 ms, too short to time well.
    asked = paths[name] * EXISTS_REPEATS if verb == "exists" else paths[name]
    seconds, answers = await timed(at_once(plan.tasks, asked, getattr(store, verb)))
    if verb == "exists":
        assert all(answers), name
    elif verb == "read":
        assert all(answer == content for answer in answers), name
    else:
        assert not await store.exists(paths[name][0]), name
    return seconds


# -- one big file


async def big(plan: Plan, directory: Path, report: Report) -> None:
    source, target = directory / "big-source.bin", directory / "big-target.bin"
    with source.open("wb") as file:
        block = random.Random(2).randbytes(MIB)
        for _ in range(plan.big_bytes // MIB):
            file.write(block)
    floors = {
        name: importlib.import_module(f"benchmarks.floors.{name}").run
        for name in ("copyfile", "file_digest", "thread_reads", "thread_hops")
    }
    cases: dict[str, dict[str, Callable[[], Awaitable[Any]]]] = {
        "save, checksum=None": {"copyfile": lambda: floors["copyfile"](source, target)},
        "save, SHA-256": {
            "copyfile": lambda: floors["copyfile"](source, target),
            "file_digest": lambda: floors["file_digest"](source, target),
        },
        "open + read": {
            "thread_reads": lambda: floors["thread_reads"](source, target),
            "thread_hops": lambda: floors["thread_hops"](source, target),
        },
    }
    samples: dict[str, Samples] = {case: {} for case in cases}
    async with contextlib.AsyncExitStack() as stack:
        if (kind := load("benchmarks.ours:Store", report)) is not None:
            plain = await stack.enter_async_context(kind(directory / "big-plain", checksum=None))
            summed = await stack.enter_async_context(kind(directory / "big-summed"))
            kept = await plain.save("kept.bin", source)
            cases["save, checksum=None"][OURS] = lambda: plain.save("big.bin", source)
            cases["save, SHA-256"][OURS] = lambda: summed.save("big.bin", source)
            cases["open + read"][OURS] = lambda: plain.stream(kept)
        for round_number in range(-1, plan.rounds):
            for case, contenders in cases.items():
                for name in rotated(contenders, round_number + 1):
                    seconds, answer = await timed(contenders[name]())
                    if round_number >= 0:
                        samples[case].setdefault(name, []).append(seconds)
                    target.unlink(missing_ok=True)
                    if name == OURS and case == "open + read":
                        assert answer == plan.big_bytes
                    elif name == OURS:
                        await (plain if case == "save, checksum=None" else summed).delete(answer)
            print(f"big: round {round_number + 1} of {plan.rounds}", flush=True)
    source.unlink()
    size = f"{plan.big_bytes // MIB} MiB"
    for case, timings in samples.items():
        rates = {name: plan.big_bytes / MIB / statistics.median(seconds) for name, seconds in timings.items()}
        report.operations_per_second[f"{size}, {case} (MiB/s)"] = rates
    report.compare(f"{size}, save, checksum=None", samples["save, checksum=None"], "copyfile", goal=BIG_GOAL)
    timings = samples["save, SHA-256"]
    slower = max(("copyfile", "file_digest"), key=lambda name: statistics.median(timings[name]))
    report.compare(f"{size}, save, SHA-256", timings, slower, label=f"the slower: {slower}", goal=BIG_GOAL)
    report.compare(f"{size}, open + read", samples["open + read"], "thread_reads", goal=BIG_GOAL)
    report.compare(f"{size}, open + read", samples["open + read"], "thread_hops", goal=BIG_GOAL)


# -- many records


async def many(plan: Plan, directory: Path, report: Report) -> None:
    if (kind := load("benchmarks.ours:Store", report)) is None:
        return
    content = random.Random(3).randbytes(plan.content_bytes)
    dice = random.Random(4)
    operations = min(plan.files, 1024)
    samples: dict[str, dict[int, list[float]]] = {verb: {} for verb in ("save", "exists", "read", "list")}
    async with contextlib.AsyncExitStack() as stack:
        stores: dict[int, tuple[Any, list[str], list[str]]] = {}
        for count in (plan.few, plan.many):
            store = await stack.enter_async_context(kind(directory / f"many-{count}"))
            paths = [f"d{number // 1000:04}/{number:07}.bin" for number in range(count)]
            await store.fill(paths)
            # Real files, spread over the key range, for the reads.
            saved = [await store.save(f"d{dice.randrange(1000):04}/real-{n}.bin", content) for n in range(operations)]
            stores[count] = (store, paths, saved)
            print(f"many: {count:,} records made", flush=True)
        for round_number in range(-1, plan.rounds):
            for count in sorted(stores, reverse=round_number % 2 == 0):
                store, paths, saved = stores[count]
                picked = [dice.choice(paths) for _ in range(operations)]
                names = [f"d{dice.randrange(1000):04}/{round_number}-{n}.bin" for n in range(operations)]
                works: dict[str, Awaitable[list[Any]]] = {
                    "save": at_once(plan.tasks, names, lambda name, s=store: s.save(name, content)),
                    "exists": at_once(plan.tasks, picked, store.exists),
                    "read": at_once(plan.tasks, saved, store.read),
                    "list": at_once(1, picked[:50], lambda path, s=store: s.page("", path, 100)),
                }
                for verb, work in works.items():
                    seconds, answers = await timed(work)
                    if round_number >= 0:
                        samples[verb].setdefault(count, []).append(seconds)
                    if verb == "save":
                        await at_once(plan.tasks, answers, store.delete)
            print(f"many: round {round_number + 1} of {plan.rounds}", flush=True)
    for verb, timings in samples.items():
        divisor = 50 if verb == "list" else operations
        rates = {f"{count:,} records": divisor / statistics.median(s) for count, s in timings.items()}
        report.operations_per_second[f"{LABELS[verb]}, ours"] = rates
        pair = {OURS: timings[plan.many], "few": timings[plan.few]}
        label = f"ours with {plan.few:,}"
        report.compare(f"{LABELS[verb]}, {plan.many:,} records", pair, "few", label=label, goal=1 / MANY_GOAL)


# -- what needs a process of its own


async def orm(plan: Plan, directory: Path, report: Report) -> None:
    await apart("orm.py", plan, directory, report)


async def bridge(plan: Plan, directory: Path, report: Report) -> None:
    await apart("bridge.py", plan, directory, report)


async def s3(plan: Plan, directory: Path, report: Report) -> None:
    await apart("s3.py", plan, directory, report)


async def obstore(plan: Plan, directory: Path, report: Report) -> None:
    await apart("obstore.py", plan, directory, report)


async def apart(script: str, plan: Plan, directory: Path, report: Report) -> None:
    """One process can hold one configured Django, and here the peer has its own."""
    figures = directory / f"{script}.json"
    options = ["--quick"] if plan is QUICK else ["--rounds", str(plan.rounds)]
    command = [sys.executable, str(HERE / script), *options, "--json", str(figures), "--directory", str(directory)]
    process = await asyncio.create_subprocess_exec(*command)
    if await process.wait():
        raise SystemExit(f"{' '.join(command)} failed")
    found = json.loads(figures.read_text())
    report.rows += [Row(**row) for row in found["rows"]]
    report.operations_per_second |= found["operations_per_second"]
    report.missing |= found["missing"]


# -- PostgreSQL


async def postgres(plan: Plan, directory: Path, report: Report) -> None:
    if (measure := load("benchmarks.postgres:measure", report)) is not None:
        await measure(plan, report)


# -- MongoDB


async def mongo(plan: Plan, directory: Path, report: Report) -> None:
    if (measure := load("benchmarks.mongo:measure", report)) is not None:
        await measure(plan, report)


# -- the report


def versions() -> dict[str, str]:
    found = {"python": platform.python_version(), "sqlite": sqlite3.sqlite_version}
    for name in ("aproxy-storage", "aiofiles", "aiosqlite", "django", "asgiref", "django-proxy-storage"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    return found


def machine(directory: Path) -> dict[str, str]:
    cpu = platform.machine()
    with contextlib.suppress(OSError):
        models = [line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
        cpu = models[0].partition(":")[2].strip() if models else cpu
    return {
        "cpu": cpu,
        "cores": str(os.cpu_count()),
        "system": f"{platform.system()} {platform.release().partition('-')[0]}",
        "load before": f"{os.getloadavg()[0]:.1f}",
        "files": "tmpfs" if directory.is_relative_to("/dev/shm") else "disk",
    }


def table(report: Report) -> str:
    lines = ["| what | compared with | ratio | rounds | goal | |", "|---|---|---|---|---|---|"]
    for row in report.rows:
        ratio = "not measured" if row.ratio is None else f"**{row.ratio:.2f}**"
        spread = "" if row.low is None else f"{row.low:.2f} – {row.high:.2f}"
        goal = "" if row.goal is None else f"≥ {row.goal:.2f}"
        met = {True: "met", False: "**not met**", None: ""}[row.met]
        lines.append(f"| {row.what} | {row.base} | {ratio} | {spread} | {goal} | {met} |")
    lines += ["", "Medians, operations a second (big files: MiB a second):", ""]
    for what, rates in report.operations_per_second.items():
        lines.append(f"- {what}: " + ", ".join(f"{name} {rate:,.0f}" for name, rate in rates.items()))
    return "\n".join(lines)


def write(report: Report, facts: dict[str, Any]) -> None:
    name = f"{facts['date']}-py{'.'.join(platform.python_version_tuple()[:2])}.json"
    rows = [{**vars(row), "met": row.met} for row in report.rows]
    result = {**facts, "rows": rows, "per_second": report.operations_per_second, "missing": report.missing}
    (HERE / "results").mkdir(exist_ok=True)
    (HERE / "results" / name).write_text(json.dumps(result, indent=1, ensure_ascii=False) + "\n")
    readme = HERE / "README.md"
    before, start, rest = readme.read_text().partition("<!-- results -->\n")
    _, end, after = rest.partition("<!-- end of results -->")
    assert start, "benchmarks/README.md has lost its markers"
    assert end, "benchmarks/README.md has lost its markers"
    told = ", ".join(f"{key} {value}" for key, value in facts["versions"].items())
    where = f"{facts['machine']['cpu']}, {facts['machine']['cores']} cores, "
    where += f"load before the run {facts['machine']['load before']}, files on {facts['machine']['files']}"
    heading = f"{facts['date']}, {facts['rounds']} rounds; {told}; {where}.\n\n"
    readme.write_text(f"{before}{start}\n{heading}{table(report)}\n\n{end}{after}")
    print(f"written: results/{name} and the table in README.md")


@contextlib.asynccontextmanager
async def workplace(chosen: str | None, plan: Plan) -> AsyncIterator[Path]:
    """A temporary directory on tmpfs, where it has room for three big files and the records; else said so."""
    needed = 3 * plan.big_bytes + 1024 * plan.many
    parent = Path(chosen) if chosen else Path("/dev/shm")
    if not chosen and (not parent.is_dir() or shutil.disk_usage(parent).free < needed):
        parent = Path(tempfile.gettempdir())
        print(f"--- /dev/shm has no room for {needed / MIB:,.0f} MiB: measuring on {parent}, disk included")
    directory = Path(tempfile.mkdtemp(prefix="bench-", dir=parent))
    try:
        yield directory
    finally:
        shutil.rmtree(directory, ignore_errors=True)


#: Of a round, for many small objects: the shorter the turns, the less a passing slowness falls to one contender.
SLICES = 4


def slices(plan: Plan) -> range:
    """The numbers of all slices; one to warm up is the first, of number -1."""
    return range(1) if plan is QUICK else range(-1, plan.rounds * SLICES)


def roomy(directory: str | None) -> Path | None:
    """Return where a server may keep some GiB for the time of a run: `directory`, or None for that of temporary files.

    A disk that is busy with what the contender before has written is not what is measured.
    """
    if directory is None or shutil.disk_usage(directory).free < 12 * 1024 * MIB:
        return None
    return Path(directory)


PARTS: dict[str, Callable[[Plan, Path, Report], Awaitable[None]]] = {
    "small": small,
    "big": big,
    "many": many,
    "orm": orm,
    "bridge": bridge,
    "postgres": postgres,
    "mongo": mongo,
    "s3": s3,
    "obstore": obstore,
}


async def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, help="measured rounds, after one to warm up (7)")
    parser.add_argument("--only", choices=PARTS)
    parser.add_argument("--quick", action="store_true", help="one tiny round, to see that it runs")
    parser.add_argument("--directory", help="where to measure (/dev/shm)")
    options = parser.parse_args()
    plan = QUICK if options.quick else Plan(rounds=options.rounds or 7)
    report = Report()
    async with workplace(options.directory, plan) as directory:
        facts = {
            "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
            "rounds": plan.rounds,
            "versions": versions(),
            "machine": machine(directory),
        }
        for name, part in PARTS.items():
            if options.only in (None, name):
                await part(plan, directory, report)
    print(f"\n{table(report)}\n")
    if report.missing:
        print(f"--- not written: {', '.join(report.missing)} left out")
    elif not options.quick and options.only is None:
        write(report, facts)
    missed = [f"{row.what} / {row.base}" for row in report.rows if row.met is False]
    print(f"{sum(row.met is True for row in report.rows)} goals met, {len(missed)} not met")


if __name__ == "__main__":
    asyncio.run(main())
