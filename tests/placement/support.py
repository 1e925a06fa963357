"""What the tests of placement share: storages whose originals fail on command, and a loop in which time is free."""

from __future__ import annotations

import asyncio
import selectors
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine
from typing import Any, TypeVar

from aproxy_storage import Attempt, Original, Placement, ProxyStorage
from aproxy_storage.backends.memory import MemoryBackend
from aproxy_storage.meta_backends.memory import MemoryMetaBackend
from aproxy_storage.records import STORED
from aproxy_storage.testing.faults import Fault, FaultyBackend, FaultyMetaBackend, Plan
from aproxy_storage.tools.reconcile import Report, reconcile

T = TypeVar("T")


class VirtualLoop(asyncio.SelectorEventLoop):
    """A loop that never sleeps: when all wait for timers, its clock goes to the next one. For what needs no I/O."""

    def __init__(self) -> None:
        self._now = 0.0
        super().__init__(_Hasty(self))

    def time(self) -> float:
        return self._now


class _Hasty(selectors.DefaultSelector):
    def __init__(self, loop: VirtualLoop) -> None:
        super().__init__()
        self._loop = loop

    def select(self, timeout: float | None = None) -> Any:
        if timeout is None:
            return super().select(60)  # somebody waits for what never comes: the run ends with no scheduled timer
        self._loop._now += max(0.0, timeout)
        return super().select(0)


def run(main: Coroutine[Any, Any, T]) -> T:
    """Run `main` in a loop in which hours take no time."""
    with asyncio.Runner(loop_factory=VirtualLoop) as runner:
        return runner.run(main)


class World:
    """A storage over originals in memory, one for each letter of `names`, each with a plan of faults, as its records.

    `attempts`: what `on_attempt` was told. `rules`: keyword arguments of `Original`, by name.
    """

    def __init__(
        self,
        placement: Placement,
        names: str = "ab",
        rules: dict[str, dict[str, Any]] | None = None,
        **options: Any,
    ) -> None:
        self.names = names
        self.inner = {name: MemoryBackend() for name in names}
        self.plan = {name: Plan() for name in names}
        self.meta = MemoryMetaBackend()
        self.meta_plan = Plan()
        self.attempts: list[Attempt] = []
        originals = {
            name: Original(FaultyBackend(self.inner[name], self.plan[name]), **(rules or {}).get(name, {}))
            for name in names
        }
        self.storage = ProxyStorage(
            "media",
            originals=originals,
            meta=FaultyMetaBackend(self.meta, self.meta_plan),
            placement=placement,
            on_attempt=self.attempts.append,
            **options,
        )
        # In a virtual loop the gates go by its clock, so that circuits close without waiting.
        for gate in self.storage.gates.values():
            gate._clock = lambda: asyncio.get_running_loop().time()

    def outcomes(self, kind: str = "write") -> list[tuple[str, str]]:
        return [(each.original, each.outcome) for each in self.attempts if each.kind == kind]

    async def keys(self, name: str) -> list[str]:
        return [info.key async for info in self.inner[name].list()]

    async def where(self, path: str) -> str:
        return (await self.storage.get(path)).original_storage_name

    def heal(self) -> None:
        for plan in (*self.plan.values(), self.meta_plan):
            plan.faults.clear()

    async def reconcile(self, *, force: bool = True) -> Report:
        return await reconcile(self.storage, dry_run=False, force=force)

    async def assert_clean(self) -> None:
        """Reconcile with everything in order, and hold that what lies in the originals is what the records name."""
        self.heal()
        await self.storage.cleanup.drain(within=60)
        for _ in range(5):  # what one has given up, the next one removes
            report = await self.reconcile()
            if not report.counts:
                break
        else:
            raise AssertionError(f"reconcile finds something every time: {report.findings}")
        named: Counter[tuple[str, str]] = Counter()
        async for record in self.meta.list():
            assert record.state == STORED
            assert record.lease is None
            named.update((place.original, place.key) for place in record.all_places())
        lying = {(name, key) for name in self.names for key in await self.keys(name)}
        assert lying == set(named)
        assert set(named.values()) <= {1}

    async def __aenter__(self) -> World:
        return self

    async def __aexit__(self, *_: object) -> None:
        self.heal()
        await self.storage.aclose()


async def content_of(storage: ProxyStorage, path: str) -> bytes:
    async with storage.open(path, verify=True) as file:
        return await file.read()


async def once(data: bytes, pieces: int = 4) -> AsyncIterator[bytes]:
    """Yield `data` as a source that can be read once."""
    size = max(1, len(data) // pieces)
    for at in range(0, len(data), size):
        yield data[at : at + size]


async def copies(world: World, path: str) -> list[str]:
    return [place.original for place in (await world.storage.get(path)).good_places()]


class Meanwhile(Fault):
    """Something happens right before the call."""

    def __init__(self, change: Callable[[], Awaitable[None]]) -> None:
        self.change = change

    async def __call__(self, call: Callable[[], Awaitable[Any]]) -> Any:
        await self.change()
        return await call()
