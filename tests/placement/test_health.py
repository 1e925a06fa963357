"""What one can see of the originals: health, attempts, log entries, spans."""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import threading

import pytest

from aproxy_storage import Attempt, BackendUnavailable, Breaker, Fallback, First, Health, MissingDependency, Replicate
from aproxy_storage.gates import Gate, Traffic
from aproxy_storage.testing.faults import Fail, Hang, Slow
from tests.placement.support import World, content_of, run

DOWN = Fail(BackendUnavailable("out of order"))


def test_health_tells_circuits_flights_failures_and_latencies() -> None:
    async def main() -> None:
        placement = Fallback(attempt_timeout=50, breaker=Breaker(failures=2, reset_after=60))
        async with World(placement, rules={"b": {"max_concurrency": 1}}) as world:
            world.plan["a"].set(write=[None, None, DOWN, DOWN])
            world.plan["b"].set(write=[Slow(2), Slow(4), Slow(6), Hang(), Hang()])
            for _ in range(5):
                await world.storage.save("x", b"1")
            saving = [asyncio.ensure_future(world.storage.save("y", b"1")) for _ in range(2)]
            await asyncio.sleep(1)
            a, b, meta = await world.storage.health()
            assert (a.name, a.ok, b.name, b.ok, meta.name, meta.ok) == ("a", True, "b", True, "meta", True)
            assert a.writes == Traffic("open", 0, 0, calls=4, failures=2, p50=0.0, p99=0.0)
            assert b.writes == Traffic("closed", 1, 1, calls=3, failures=0, p50=4.0, p99=6.0)
            assert a.reads == Traffic("closed")
            assert (meta.writes, meta.reads) == (None, None)
            await content_of(world.storage, "x")
            world.plan["a"].set(stat=DOWN)
            a = (await world.storage.health())[0]
            assert not a.ok
            assert a.reads is not None
            assert a.reads.calls == 1
            for each in saving:
                each.cancel()
            await asyncio.wait(saving)
            await asyncio.sleep(301)
            a = (await world.storage.health())[0]
            assert a.writes == Traffic("open", calls=0), "five minutes later"

    run(main())


def test_health_asks_all_at_a_time() -> None:
    async def main() -> None:
        async with World(First(), "abc") as world:
            for name in "abc":
                world.plan[name].set(stat=Slow(20))
            answers = await world.storage.health()
            assert all(isinstance(each, Health) and each.ok for each in answers)
            assert asyncio.get_running_loop().time() == 20

    run(main())


def test_health_of_a_placement_without_circuits() -> None:
    async def main() -> None:
        async with World(First()) as world:
            await world.storage.save("x", b"1")
            a = (await world.storage.health())[0]
            assert a.writes is not None
            assert (a.writes.breaker, a.writes.calls) == (None, 1)

    run(main())


def test_every_attempt_is_told_once_with_its_outcome() -> None:
    async def main() -> None:
        placement = Fallback(attempt_timeout=5, breaker=Breaker(failures=2, reset_after=60))
        async with World(placement) as world:
            world.plan["a"].set(write=[None, DOWN, Hang()])
            for _ in range(4):
                await world.storage.save("x", b"1234")
            await content_of(world.storage, "x")
            told = [(each.original, each.kind, each.outcome, each.seconds, each.size) for each in world.attempts]
            assert told == [
                ("a", "write", "ok", 0.0, 4),
                ("a", "write", "failed", 0.0, None), ("b", "write", "ok", 0.0, 4),
                ("a", "write", "timeout", 5.0, None), ("b", "write", "ok", 0.0, 4),
                ("b", "write", "ok", 0.0, 4),
                ("a", "read", "ok", 0.0, 4),
            ]  # fmt: skip
            assert isinstance(world.attempts[1].error, BackendUnavailable)
            assert {each.storage for each in world.attempts} == {"media"}

    run(main())


def test_a_callback_that_fails_harms_no_save(caplog: pytest.LogCaptureFixture) -> None:
    def broken(attempt: Attempt) -> None:
        raise RuntimeError("metrics are down")

    async def main() -> None:
        async with World(Fallback()) as world:
            world.storage.on_attempt = broken
            assert await content_of(world.storage, await world.storage.save("x", b"1")) == b"1"

    run(main())
    assert "the attempt is not affected" in caplog.text


def test_log_entries_have_fields(caplog: pytest.LogCaptureFixture) -> None:
    async def main() -> None:
        async with World(Fallback(breaker=Breaker(failures=1, reset_after=60))) as world:
            world.plan["a"].set(write=[DOWN])
            await world.storage.save("x", b"1")
            await asyncio.sleep(60)
            await world.storage.save("y", b"1")

    with caplog.at_level(logging.DEBUG, "aproxy_storage"):
        run(main())
    entries = [vars(entry) for entry in caplog.records]
    told = [(entry["original"], entry["kind"], entry["outcome"]) for entry in entries if "outcome" in entry]
    assert told == [("a", "write", "failed"), ("b", "write", "ok"), ("a", "write", "ok")]
    assert [(e["original"], e["breaker"]) for e in entries if "breaker" in e] == [("a", "open"), ("a", "closed")]


# -- the gate by itself


def test_a_gate_serves_loops_in_several_threads() -> None:
    gate = Gate("a", max_concurrency=3)
    lock = threading.Lock()
    now = most = done = 0

    async def one() -> None:
        nonlocal now, most, done
        admission = gate.start("write")
        try:
            await gate.slot(admission)
            with lock:
                now += 1
                most = max(most, now)
            try:
                await asyncio.sleep(0.0005)
                done += 1
            finally:
                with lock:
                    now -= 1
        finally:
            gate.finish(admission, "ok")

    async def many() -> None:
        tasks = [asyncio.ensure_future(one()) for _ in range(60)]
        await asyncio.sleep(0.003)
        for task in tasks[::5]:
            task.cancel()
        await asyncio.wait(tasks)

    threads = [threading.Thread(target=lambda: asyncio.run(many())) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert most == 3
    assert done > 100
    traffic = gate.traffic("write")
    assert (traffic.in_flight, traffic.waiting) == (0, 0)
    assert gate._busy == 0


def test_a_slot_is_not_lost_in_a_loop_that_is_closed() -> None:
    gate = Gate("a", max_concurrency=1)
    loop = asyncio.new_event_loop()
    first = gate.start("write")
    loop.run_until_complete(gate.slot(first))
    waiting = loop.create_task(gate.slot(gate.start("write")))
    loop.run_until_complete(asyncio.sleep(0))
    waiting._log_destroy_pending = False  # type: ignore[attr-defined]
    loop.close()
    gate.finish(first, "ok")
    assert gate._busy == 0
    waiting.get_coro().close()  # type: ignore[union-attr]


def test_a_child_begins_with_a_fresh_gate() -> None:
    gate = Gate("a", breaker=Breaker(failures=1), max_concurrency=1)
    gate.finish(gate.start("write"), "failed")
    admission = gate.start("read")
    pid = os.fork()
    if pid == 0:
        ok = False
        try:
            gate.finish(admission, "ok")  # of the parent's call
            child = gate.start("write")  # the parent's circuit is open, and none of the child's business
            gate.finish(child, "ok")
            ok = gate.traffic("read").in_flight == 0
        finally:
            os._exit(0 if ok else 1)
    assert os.waitpid(pid, 0)[1] == 0
    assert gate.traffic("read").in_flight == 1
    gate.finish(admission, "ok")


# -- OpenTelemetry


def test_spans_for_save_attempt_and_read() -> None:
    trace = pytest.importorskip("opentelemetry.sdk.trace")
    from opentelemetry.sdk.trace.export import SimpleSpanProcessor
    from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

    from aproxy_storage.otel import instrument

    exporter = InMemorySpanExporter()
    provider = trace.TracerProvider(shutdown_on_exit=False)
    provider.add_span_processor(SimpleSpanProcessor(exporter))

    async def main() -> None:
        async with World(Fallback()) as world:
            stop = instrument(world.storage, tracer_provider=provider, paths=True)
            world.plan["a"].set(write=[DOWN])
            path = await world.storage.save("x", b"1234")
            await content_of(world.storage, path)
            with pytest.raises(ValueError, match=r"\.\./x"):
                await world.storage.save("../x", b"")
            assert len(world.attempts) == 3, "the storage's own on_attempt is told too"
            stop()
            await world.storage.save("y", b"1")

    run(main())
    spans = exporter.get_finished_spans()
    found = [
        (span.name.removeprefix("aproxy_storage."), span.attributes.get("aproxy_storage.outcome")) for span in spans
    ]
    assert found == [
        ("attempt write", "failed"), ("attempt write", "ok"), ("save", None), ("attempt read", "ok"), ("open", None),
        ("save", None),
    ]  # fmt: skip
    assert [span.parent and span.parent.span_id for span in spans[:2]] == [spans[2].context.span_id] * 2
    assert spans[0].attributes["error.type"] == "BackendUnavailable"
    assert spans[2].attributes["aproxy_storage.path"] == "x"
    assert spans[5].status.status_code.name == "ERROR"


def test_spans_need_a_package_and_say_which(monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    from aproxy_storage.otel import instrument

    monkeypatch.setitem(sys.modules, "opentelemetry", None)

    async def main() -> None:
        async with World(Replicate()) as world:
            with pytest.raises(MissingDependency, match=r"aproxy-storage\[otel\]"):
                instrument(world.storage)

    run(main())


@pytest.mark.parametrize("ask", ["allows", "traffic", "finish"])
def test_a_child_does_not_wait_for_a_thread_of_its_parent(ask: str) -> None:
    gate = Gate("a", breaker=Breaker(failures=1))
    gate.finish(gate.start("write"), "failed")
    admission = gate.start("read")
    with gate._lock:  # as another thread of the parent would hold it at the moment of the fork
        pid = os.fork()
        if pid == 0:
            ok = False
            try:
                signal.alarm(20)
                if ask == "allows":
                    ok = gate.allows("write")
                elif ask == "traffic":
                    ok = gate.traffic("write") == Traffic("closed")
                else:
                    ok = gate.finish(admission, "ok") >= 0
            finally:
                os._exit(0 if ok else 1)
        assert os.waitpid(pid, 0)[1] == 0
    assert not gate.allows("write")
    gate.finish(admission, "ok")
