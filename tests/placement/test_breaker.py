"""The circuit breaker, as a table: what happens, at what time, and what it says then."""

import random

import pytest

from aproxy_storage import Breaker, ConfigurationError
from aproxy_storage.breaker import CircuitBreaker, Ticket

# Each step: the time, what happens ("begin", or how the call with the ticket of that name ends), what is answered.
N, P = "normal", "probe"
TABLES = {
    "a success in between forgets failures": [
        (0, "failed", N, False), (0, "succeeded", N, False), (0, "failed", N, False), (0, "begin", None, N),
    ],
    "failures in a row open it": [
        (0, "begin", None, N), (0, "failed", N, False), (1, "failed", N, True), (1, "begin", None, None),
        (10.9, "begin", None, None),
    ],
    "one task probes, the others wait": [
        (0, "failed", N, False), (0, "failed", N, True), (10, "begin", None, P), (10, "begin", None, None),
        (11, "succeeded", P, True), (11, "begin", None, N),
    ],
    "a probe that fails opens it for as long again": [
        (0, "failed", N, False), (0, "failed", N, True), (10, "begin", None, P), (12, "failed", P, True),
        (21, "begin", None, None), (22, "begin", None, P),
    ],
    "a probe that says nothing leaves the next one to find out": [
        (0, "failed", N, False), (0, "failed", N, True), (10, "begin", None, P), (10, "abandoned", P, None),
        (10, "begin", None, P),
    ],
    "a probe that takes for ever does not keep everybody out": [
        (0, "failed", N, False), (0, "failed", N, True), (10, "begin", None, P), (19, "begin", None, None),
        (20, "begin", None, P),
    ],
    "attempts from before it opened change nothing": [
        (0, "failed", N, False), (0, "failed", N, True), (5, "failed", N, False), (6, "succeeded", N, False),
        (9.9, "begin", None, None), (10, "begin", None, P), (11, "failed", N, False), (11, "begin", None, None),
    ],
}  # fmt: skip


@pytest.mark.parametrize("steps", TABLES.values(), ids=TABLES)
def test_breaker_by_table(steps: list[tuple[float, str, Ticket, object]]) -> None:
    circuit = CircuitBreaker(Breaker(failures=2, reset_after=10))
    for number, (now, what, ticket, wanted) in enumerate(steps):
        if what == "begin":
            assert circuit.allows(now) == (wanted is not None), number
            assert circuit.begin(now) == wanted, number
        elif what == "failed":
            assert circuit.failed(ticket, now) == wanted, number
        else:
            assert getattr(circuit, what)(ticket) == wanted, number


def test_breaker_states_have_names() -> None:
    circuit = CircuitBreaker(Breaker(failures=1, reset_after=10))
    assert circuit.state == "closed"
    circuit.failed("normal", 0)
    assert circuit.state == "open"
    circuit.begin(10)
    assert circuit.state == "half-open"


def test_breaker_never_gives_two_probes_at_a_time_and_never_stays_shut() -> None:
    for seed in range(300):
        dice = random.Random(seed)
        circuit = CircuitBreaker(Breaker(failures=3, reset_after=5))
        now, out = 0.0, list[Ticket]()
        probe_since: float | None = None
        for _ in range(60):
            now += dice.random()
            if dice.random() < 0.5:
                ticket = circuit.begin(now)
                if ticket == "probe":
                    assert probe_since is None or now - probe_since >= 5
                    probe_since = now
                if ticket is not None:
                    out.append(ticket)
            elif out:
                ticket = out.pop(dice.randrange(len(out)))
                what = dice.choice(["succeeded", "failed", "abandoned"])
                circuit.failed(ticket, now) if what == "failed" else getattr(circuit, what)(ticket)
                if ticket == "probe":
                    probe_since = None
        assert circuit.allows(now + 5.01)


@pytest.mark.parametrize("wrong", [{"failures": 0}, {"reset_after": 0}, {"reset_after": float("nan")}])
def test_breaker_settings_are_checked(wrong: dict[str, float]) -> None:
    with pytest.raises(ConfigurationError):
        Breaker(**wrong)  # type: ignore[arg-type]
