"""Save while the first original is healthy, slow, hung, refuses and comes back, under four ways to fall back.

    python benchmarks/fallback.py [--quick] [--seconds 5] [--rounds 7] [--directory DIR] [--pictures docs/images]

All contenders run side by side, each with originals and records of its own, so that they meet the same machine. Saves
come at a fixed pace, whether earlier ones have ended or not. Prints tables of latencies and of what the policies cost
when all is well, and draws two pictures.

The first original is a directory behind a delay, which stands for a network; what it does in each phase is the
wrapper's doing. No figure but the ratios means anything on another machine.
"""

import argparse
import asyncio
import contextlib
import logging
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

from aproxy_storage import Attempt, Breaker, Fallback, First, Placement, ProxyStorage, Replicate, Timeouts  # noqa: E402
from aproxy_storage.backends.filesystem import FileSystemBackend  # noqa: E402
from aproxy_storage.meta_backends.sqlite import SQLiteMetaBackend  # noqa: E402
from benchmarks.pictures import Bars, Scatter  # noqa: E402

DELAY = 0.020  # seconds that each original takes for a save, when it is in order
SLOW = 0.150
ATTEMPT = 0.5  # attempt_timeout
HEDGE = 0.050  # hedge_after
PHASES = ("healthy", "slow", "hung", "refusing", "back")
CONTENT = b"x" * 4096


class Service(FileSystemBackend):
    """A directory behind a network, in the state that the script says."""

    def __init__(self, root: Path, weather: "Weather", *, first: bool) -> None:
        super().__init__(root, timeouts=Timeouts(idle=None, operation=None))
        self._weather = weather
        self._first = first

    async def _write(self, *args: Any, **options: Any) -> Any:
        if self._first:
            await self._weather.pass_through()
        else:
            await asyncio.sleep(DELAY)
        return await super()._write(*args, **options)


@dataclass
class Weather:
    """What the first originals of all contenders do just now."""

    phase: str = "healthy"
    changed: asyncio.Event = field(default_factory=asyncio.Event)

    def turn(self, phase: str) -> None:
        self.phase = phase
        self.changed.set()
        self.changed = asyncio.Event()

    async def pass_through(self) -> None:
        while self.phase == "hung":
            await self.changed.wait()
        if self.phase == "refusing":
            raise ConnectionRefusedError(111, "Connection refused")
        await asyncio.sleep(SLOW if self.phase == "slow" else DELAY)


BREAKER = Breaker(failures=5, reset_after=1.0)
CONTENDERS: dict[str, Callable[[], Placement]] = {
    "the second alone": First,
    "no timeouts": lambda: Fallback(attempt_timeout=None, deadline=None, breaker=None),
    "attempt_timeout": lambda: Fallback(attempt_timeout=ATTEMPT, breaker=None),
    "and breaker": lambda: Fallback(attempt_timeout=ATTEMPT, breaker=BREAKER),
    "and hedging": lambda: Fallback(attempt_timeout=ATTEMPT, breaker=BREAKER, hedge_after=HEDGE),
}


@dataclass(frozen=True)
class Save:
    """One save: when it began, since the start of the run, how long it took, in which phase it began."""

    at: float
    seconds: float
    phase: str
    ok: bool
    into: float  # seconds since the phase began


def storage_in(directory: Path, originals: dict[str, Any], placement: Placement, **options: Any) -> ProxyStorage:
    return ProxyStorage(
        "bench", originals=originals, meta=SQLiteMetaBackend(directory / "meta.sqlite3"), placement=placement, **options
    )


@contextlib.asynccontextmanager
async def storages(directory: Path, weather: Weather) -> AsyncIterator[dict[str, ProxyStorage]]:
    async with contextlib.AsyncExitStack() as stack:
        made = {}
        for number, (name, placement) in enumerate(CONTENDERS.items()):
            home = directory / str(number)
            home.mkdir()
            originals = {"second": Service(home / "second", weather, first=False)}
            if name != "the second alone":
                originals = {"first": Service(home / "first", weather, first=True), **originals}
            made[name] = await stack.enter_async_context(storage_in(home, originals, placement()))
        yield made


async def phases(directory: Path, seconds: float, pace: float) -> dict[str, list[Save]]:
    """Run all phases; return what became of the saves of each contender."""
    weather = Weather()
    saves: dict[str, list[Save]] = {name: [] for name in CONTENDERS}
    async with storages(directory, weather) as made:
        for storage in made.values():
            await storage.save("warm", CONTENT)
        begun = time.perf_counter()
        phase_begun = begun

        async def one(name: str, number: int, at: float, phase: str, into: float) -> None:
            ok = True
            since = time.perf_counter()
            try:
                await made[name].save(f"{phase}/{number}", CONTENT)
            except Exception:
                ok = False
            saves[name].append(Save(at, time.perf_counter() - since, phase, ok, into))

        async with asyncio.TaskGroup() as group:
            for phase in PHASES:
                weather.turn(phase)
                phase_begun = time.perf_counter()
                for number in range(int(seconds * pace)):
                    due = phase_begun + number / pace
                    await asyncio.sleep(max(0.0, due - time.perf_counter()))
                    now = time.perf_counter()
                    for name in made:
                        group.create_task(one(name, number, now - begun, phase, now - phase_begun))
    return saves


def quantile(values: Iterable[float], share: float) -> float:
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))] if ordered else float("nan")


def phase_table(saves: dict[str, list[Save]], seconds: float) -> str:
    lines = ["| milliseconds, p50 / p99 | " + " | ".join(PHASES) + " | hung, steady | failed |"]
    lines.append("|---" * (len(PHASES) + 3) + "|")
    for name, all_saves in saves.items():
        row = []
        for phase in (*PHASES, "steady"):
            times = [each.seconds for each in in_phase(all_saves, phase, seconds)]
            row.append(f"{1000 * quantile(times, 0.5):.0f} / {1000 * quantile(times, 0.99):.0f}")
        failed = sum(not each.ok for each in all_saves)
        lines.append(f"| {name} | " + " | ".join(row) + f" | {failed} of {len(all_saves)} |")
    return "\n".join(lines)


def in_phase(saves: list[Save], phase: str, seconds: float) -> list[Save]:
    if phase == "steady":  # when the circuit has opened
        return [each for each in saves if each.phase == "hung" and each.into > seconds / 2]
    return [each for each in saves if each.phase == phase]


def goals(saves: dict[str, list[Save]], seconds: float) -> str:
    def times(name: str, phase: str) -> list[float]:
        return [each.seconds for each in in_phase(saves[name], phase, seconds)]

    alone = times("the second alone", "steady")
    ratio = quantile(times("and breaker", "steady"), 0.5) / quantile(alone, 0.5)
    # Of all phases: what hedging is for.
    tail = max(quantile(times("and hedging", phase), 0.99) for phase in PHASES)
    worst = max(quantile(times("the second alone", phase), 0.99) for phase in PHASES)
    limit = HEDGE + 1.2 * worst
    ours = ("attempt_timeout", "and breaker", "and hedging")
    failed = sum(not each.ok for name in ours for each in saves[name])
    rows = [
        ("with breaker, steady while hung: p50 / the second alone", f"{ratio:.2f}", "<= 1.10", ratio <= 1.1),
        ("with hedging: p99 of the worst phase, ms", f"{1000 * tail:.0f}", f"<= {1000 * limit:.0f}", tail <= limit),
        ("failed saves with timeouts", str(failed), "0", failed == 0),
    ]
    return rows_of(rows)


def rows_of(rows: list[tuple[str, str, str, bool]]) -> str:
    lines = ["| what | measured | goal | |", "|---|---|---|---|"]
    lines += [
        f"| {what} | **{value}** | {goal} | {'met' if met else '**not met**'} |" for what, value, goal, met in rows
    ]
    return "\n".join(lines)


# -- what it costs when all is well


async def cost(directory: Path, rounds: int, files: int, big: int) -> str:
    placements: dict[str, Callable[[], Placement]] = {"First": First, "Fallback": Fallback}
    small: dict[str, list[float]] = {name: [] for name in placements}
    large: dict[str, list[float]] = {"one": [], "two": []}
    data = b"z" * big
    async with contextlib.AsyncExitStack() as stack:
        made = {}
        for name, placement in {**placements, "one": First, "two": lambda: Replicate(2)}.items():
            home = directory / f"cost-{name}"
            home.mkdir()
            originals = {each: FileSystemBackend(home / each) for each in "ab"}
            made[name] = await stack.enter_async_context(storage_in(home, originals, placement()))
        for round_number in range(-1, rounds):
            order = list(placements) if round_number % 2 else list(placements)[::-1]
            for name in order:
                seconds = await sixty_four(made[name], f"r{round_number}", files)
                if round_number >= 0:
                    small[name].append(seconds)
            for name in large:
                since = time.perf_counter()
                path = await made[name].save("big", data)
                if round_number >= 0:
                    large[name].append(time.perf_counter() - since)
                await made[name].delete(path)
    fallback = statistics.median(a / b for a, b in zip(small["First"], small["Fallback"], strict=True))
    copies = statistics.median(b / a for a, b in zip(large["one"], large["two"], strict=True))
    return rows_of(
        [
            ("saves a second, Fallback / First, 64 tasks", f"{fallback:.2f}", ">= 0.90", fallback >= 0.9),
            (f"seconds, two copies / one, {big >> 20} MiB", f"{copies:.2f}", "< 1.40", copies < 1.4),
        ]
    )


async def sixty_four(storage: ProxyStorage, label: str, files: int) -> float:
    queue = iter(range(files))

    async def worker() -> None:
        for number in queue:
            await storage.save(f"{label}/{number}", CONTENT)

    since = time.perf_counter()
    async with asyncio.TaskGroup() as group:
        for _ in range(64):
            group.create_task(worker())
    return time.perf_counter() - since


# -- pictures


async def timelines(directory: Path) -> Bars:
    """Draw one save under each policy, with an original that hangs or is slow."""
    bars = Bars("One save while the first original hangs (measured)", "seconds since the save began")
    policies: dict[str, tuple[Placement, str]] = {
        "attempt_timeout": (Fallback(attempt_timeout=ATTEMPT, breaker=None), "hung"),
        "breaker, once it is open": (Fallback(attempt_timeout=ATTEMPT, breaker=Breaker(1, 60)), "hung"),
        "hedge_after": (Fallback(attempt_timeout=ATTEMPT, breaker=None, hedge_after=HEDGE), "hung"),
        "two copies at once": (Replicate(2, attempt_timeout=ATTEMPT, breaker=None), "hung"),
        "two copies, all in order": (Replicate(2, attempt_timeout=ATTEMPT, breaker=None), "healthy"),
    }
    for number, (name, (placement, phase)) in enumerate(policies.items()):
        home = directory / f"line-{number}"
        home.mkdir()
        weather = Weather(phase)
        attempts: list[tuple[float, Attempt]] = []
        originals = {
            "first": Service(home / "first", weather, first=True),
            "second": Service(home / "second", weather, first=False),
        }
        async with storage_in(
            home, originals, placement, on_attempt=lambda each, to=attempts: to.append((time.perf_counter(), each))
        ) as storage:
            if name.startswith("breaker"):
                await storage.save("before", CONTENT)
                attempts.clear()
            since = time.perf_counter()
            await storage.save("x", CONTENT)
            took = time.perf_counter() - since
            await storage.cleanup.drain(within=5)
            weather.turn("healthy")
        spans = [(a.original, max(0.0, end - since - a.seconds), end - since, a.outcome) for end, a in attempts]
        bars.add(name, [(who, begin, min(end, took + 0.02), what) for who, begin, end, what in spans], took)
    return bars


async def main(options: argparse.Namespace) -> None:
    base = Path(options.directory or ("/dev/shm" if Path("/dev/shm").is_dir() else tempfile.gettempdir()))
    directory = Path(tempfile.mkdtemp(prefix="aproxy-fallback-", dir=base))
    seconds, pace = (0.3, 20.0) if options.quick else (options.seconds, 25.0)
    try:
        saves = await phases(directory, seconds, pace)
        print(phase_table(saves, seconds), goals(saves, seconds), sep="\n\n")
        rounds, files, big = (1, 64, 1 << 20) if options.quick else (options.rounds, 1024, 64 << 20)
        print("\n" + await cost(directory, rounds, files, big))
        pictures = Path(options.pictures) if options.pictures else directory
        pictures.mkdir(parents=True, exist_ok=True)
        scatter = Scatter("Saves while the first original falls ill (measured)", "seconds", PHASES, seconds)
        for name, all_saves in saves.items():
            scatter.add(name, [(each.at, each.seconds, each.ok) for each in all_saves])
        (pictures / "fallback-phases.svg").write_text(scatter.svg())
        (pictures / "fallback-timelines.svg").write_text((await timelines(directory)).svg())
    finally:
        shutil.rmtree(directory, ignore_errors=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Measure what falling back costs, and what it saves.")
    parser.add_argument("--quick", action="store_true", help="a tiny run, to see that it works")
    parser.add_argument("--seconds", type=float, default=5.0, help="of each phase")
    parser.add_argument("--rounds", type=int, default=7, help="of the cost when all is well")
    parser.add_argument("--directory", help="where the files go while it runs")
    parser.add_argument("--pictures", help="where the two SVG files go; by default they are drawn and thrown away")
    logging.getLogger("aproxy_storage").setLevel(logging.ERROR)  # every fallback is a warning
    asyncio.run(main(parser.parse_args()))
