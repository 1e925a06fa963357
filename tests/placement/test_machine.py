"""Random faults on three originals and the meta-backend, against a model, in a loop in which time is free.

What holds: an acknowledged file is there with its bytes, at the originals that its record names; a failed call has
changed nothing; one whose outcome is unknown has happened or not; after reconcile nothing lies about that no record
names, and every file has its number of copies.
"""

from __future__ import annotations

import asyncio
import os
from typing import Any

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, rule

from aproxy_storage import BackendUnavailable, Breaker, Fallback, OutOfSpace, Placement, Replicate, StorageError
from aproxy_storage.testing.faults import Fail, Fault, Hang, Late, Lie, Slow
from tests.placement.support import VirtualLoop, World, once

PLACEMENTS: dict[str, Any] = {
    "in turn": lambda: Fallback(attempt_timeout=5, breaker=Breaker(3, 20)),
    "in order": lambda: Fallback(["c", "a"], attempt_timeout=5, breaker=None),
    "hedged": lambda: Fallback(hedge_after=1, attempt_timeout=5, breaker=Breaker(3, 20)),
    "two copies": lambda: Replicate(2, attempt_timeout=5, hedge_after=1, breaker=Breaker(3, 20)),
    "three copies, all": lambda: Replicate(3, 3, attempt_timeout=5, breaker=None),
    "three copies, two will do": lambda: Replicate(3, 2, attempt_timeout=5, breaker=None),
}

kinds = st.sampled_from([None, None, None, "fail", "full", "lie", "late", "slow", "hang", "bug"])
plans = st.fixed_dictionaries({name: st.lists(kinds, max_size=3) for name in "abc"})
meta_plans = st.lists(st.sampled_from([None, None, None, None, "fail", "lie", "slow"]), max_size=5)
names = st.sampled_from(["x", "y", "d/x"])
contents = st.binary(max_size=8)
streamed = st.booleans()
any_index = st.integers(0, 100)


class PlacementMachine(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.runner = asyncio.Runner(loop_factory=VirtualLoop)
        self.files: dict[str, set[bytes | None]] = {}  # what may be at each path; None: nothing
        self.loose: list[bytes] = []  # contents of saves that may have happened, under whatever name
        self.late: list[Late] = []

    def run(self, work: Any) -> Any:
        return self.runner.run(work)

    @initialize(placement=st.sampled_from(sorted(PLACEMENTS)), keys=st.sampled_from(["path", "token"]), slots=any_index)
    def begin(self, placement: str, keys: str, slots: int) -> None:
        async def make() -> World:
            rules = {"a": {"max_concurrency": 1}} if slots % 2 else {}
            made: Placement = PLACEMENTS[placement]()
            return World(made, "abc", rules, keys=keys, keep_replaced=0.0 if slots % 3 else 60.0)

        self.world = self.run(make())

    def fault(self, kind: str | None) -> Fault | None:
        if kind == "late":
            self.late.append(Late())
            return self.late[-1]
        return {
            None: lambda: None, "fail": lambda: Fail(BackendUnavailable("down")), "full": lambda: Fail(OutOfSpace("")),
            "lie": Lie, "slow": lambda: Slow(2), "hang": Hang, "bug": lambda: Fail(IndexError("a bug")),
        }[kind]()  # fmt: skip

    def attempt(self, work: Any, plan: dict[str, list[str | None]], meta: list[str | None]) -> tuple[Any, Any]:
        """Do something while calls fail; return its answer, and its error if it is a StorageError."""
        world = self.world
        for name in "abc":
            faults = [self.fault(kind) for kind in plan[name]]
            world.plan[name].set(write=faults, read=faults, copy=faults, discard=faults[1:])
        faults = [self.fault(kind) for kind in meta]
        for operation in ("reserve", "update", "delete"):
            world.meta_plan.set(**{operation: faults})
        try:
            return self.run(work()), None
        except StorageError as error:
            return None, error
        finally:
            world.heal()

    def pick(self, at: int) -> str | None:
        certain = sorted(path for path, options in self.files.items() if None not in options)
        return certain[at % len(certain)] if certain else None

    def look(self) -> None:
        """Compare what a reader sees with what may be; what was seen is certain from here on."""

        async def see() -> dict[str, bytes]:
            found = {}
            # A circuit that is open has nothing to do with what is there.
            for gate in self.world.storage.gates.values():
                gate._fresh()
            async for record in self.world.storage.list():
                assert record.size is not None
                for place in record.good_places():
                    async with self.world.inner[place.original].read(place.key) as reading:
                        data = b"".join([chunk async for chunk in reading])
                    assert len(data) == record.size
                    assert found.setdefault(record.path, data) == data, "two copies differ"
                async with self.world.storage.open(record, verify=True) as file:
                    assert await file.read() == found[record.path]
            return found

        seen = self.run(see())
        for path in seen.keys() | self.files.keys():
            data = seen.get(path)
            options = self.files.get(path, {None})
            if data not in options:
                assert data in self.loose, f"{path!r} holds {data!r}, and may hold {options}"
            self.files[path] = {data}

    @rule(name=names, content=contents, stream=streamed, plan=plans, meta=meta_plans)
    def save(self, name: str, content: bytes, stream: bool, plan: Any, meta: Any) -> None:
        given = once(content) if stream else content
        path, error = self.attempt(lambda: self.world.storage.save(name, given), plan, meta)
        if error is None:
            assert self.files.get(path, {None}) == {None} or path not in self.files
            self.files[path] = {content}
        elif error.outcome_unknown:
            self.loose.append(content)
        self.look()

    @rule(at=any_index, content=contents, stream=streamed, plan=plans, meta=meta_plans)
    def replace(self, at: int, content: bytes, stream: bool, plan: Any, meta: Any) -> None:
        path = self.pick(at)
        if path is None:
            return
        given = once(content) if stream else content
        _, error = self.attempt(lambda: self.world.storage.replace(path, given), plan, meta)
        if error is None:
            self.files[path] = {content}
        elif error.outcome_unknown:
            self.files[path] |= {content}
        self.look()

    @rule(at=any_index, plan=plans, meta=meta_plans)
    def delete(self, at: int, plan: Any, meta: Any) -> None:
        path = self.pick(at)
        if path is None:
            return
        _, error = self.attempt(lambda: self.world.storage.delete(path), plan, meta)
        if error is None:
            self.files[path] = {None}
        elif error.outcome_unknown:
            self.files[path] |= {None}
        self.look()

    @rule(at=any_index, name=names, using=st.sampled_from([None, "a", "b", "c"]), plan=plans, meta=meta_plans)
    def copy(self, at: int, name: str, using: str | None, plan: Any, meta: Any) -> None:
        path = self.pick(at)
        if path is None:
            return
        (content,) = self.files[path]
        new, error = self.attempt(lambda: self.world.storage.copy(path, name, using=using), plan, meta)
        if error is None:
            self.files[new] = {content}
        elif error.outcome_unknown and content is not None:
            self.loose.append(content)
        self.look()

    @rule(at=any_index, using=st.sampled_from("abc"), plan=plans, meta=meta_plans)
    def move(self, at: int, using: str, plan: Any, meta: Any) -> None:
        path = self.pick(at)
        if path is None:
            return
        record, error = self.attempt(lambda: self.world.storage.move(path, using), plan, meta)
        assert error is not None or record.original_storage_name == using
        self.look()

    @rule(at=any_index, plan=plans)
    def read(self, at: int, plan: Any) -> None:
        path = self.pick(at)
        if path is None:
            return

        async def work() -> bytes:
            async with self.world.storage.open(path, verify=True) as file:
                return await file.read()

        data, error = self.attempt(work, plan, [])
        if error is None:
            assert {data} == self.files[path]
        else:
            assert isinstance(error, BackendUnavailable | OutOfSpace), "what cannot be reached is not gone"

    @rule(plan=plans)
    def reconcile_beside(self, plan: Any) -> None:
        self.attempt(lambda: self.world.reconcile(force=False), plan, [])
        self.look()

    @rule(seconds=st.sampled_from([1, 30]))
    def wait(self, seconds: int) -> None:
        self.run(asyncio.sleep(seconds))

    @rule()
    def land(self) -> None:
        """What was given up takes effect after all."""
        late, self.late = self.late, []
        for each in late:
            self.run(each.land())
        self.look()

    @rule()
    def reconcile_alone(self) -> None:
        self.land()

        async def clean() -> None:
            for gate in self.world.storage.gates.values():
                gate._fresh()
            await self.world.assert_clean()
            wanted = self.world.storage.placement.limits.copies
            async for record in self.world.storage.list():
                assert len({place.original for place in record.good_places()}) == wanted, record

        self.run(clean())
        self.loose.clear()
        self.look()

    def teardown(self) -> None:
        try:
            if hasattr(self, "world"):
                self.reconcile_alone()
                self.run(self.world.storage.aclose())
        finally:
            self.runner.close()


def case(examples: int, steps: int) -> Any:
    test: Any = type("TestPlacement", (PlacementMachine.TestCase,), {})
    test.settings = settings(
        max_examples=examples,
        stateful_step_count=steps,
        deadline=None,
        derandomize=bool(os.environ.get("CI")),
        suppress_health_check=list(HealthCheck),
    )
    return test


TestPlacement = case(120, 20)
TestPlacementForLong = pytest.mark.soak(case(5000, 50))
