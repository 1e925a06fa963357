"""The journal's rules, checked exhaustively: with all of them nothing breaks, without any one of them something does.

Run with `-s` to see the number of states and the trace of each broken design.  `JOURNAL_MODEL_FAULTS=1` lets one more
thing go wrong in every scenario (minutes instead of seconds).
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass, fields, replace

import pytest

from tests.model.explorer import Exploration, explore
from tests.model.journal_model import Model
from tests.model.journal_state import (
    STRANGER,
    Actor,
    Place,
    Record,
    Rules,
    State,
    Statement,
    violation,
    violation_at_rest,
)

MORE_FAULTS = int(os.environ.get("JOURNAL_MODEL_FAULTS", "0"))


@dataclass(frozen=True)
class Scenario:
    """Who does what, to what is there; how much may go wrong; how many states that must give at least."""

    clients: tuple[tuple[str, ...], ...]
    floor: int
    stored: tuple[str, ...] = ()
    faults: int = 1
    stranger: str = ""

    def start(self, keys: str, more_faults: int = 0) -> State:
        """Return the state in which it begins."""
        key = {path: path if keys == "path" else f"{path}~T{path}" for path in self.stored}
        store = [(key[path], f"c{path}") for path in self.stored]
        if self.stranger:
            store.append((self.stranger, STRANGER))
        clients = tuple(Actor(todo=todo, step="begin") for todo in self.clients)
        return State(
            records=tuple(
                Record(path, "stored", f"T{path}", 1, f"c{path}", (Place(key[path], "good"),), "settled")
                for path in self.stored
            ),
            store=tuple(sorted(store)),
            actors=(*clients, Actor(step="idle")),
            faults=self.faults + more_faults,
            truth=tuple((f"T{path}", f"c{path}") for path in self.stored),
            acknowledged=frozenset(f"T{path}" for path in self.stored),
            stranger=self.stranger,
        )


SAVE, DELETE, REPLACE = ("save a",), ("delete a",), ("replace a",)
SCENARIOS = {
    "save": Scenario((SAVE,), 3000, faults=3),
    "save, delete, save": Scenario((SAVE + DELETE + SAVE,), 10_000, faults=2),
    "replace": Scenario((REPLACE,), 3000, stored=("a",), faults=3),
    "delete, save": Scenario((DELETE + SAVE,), 4000, stored=("a",), faults=2),
    "save | save": Scenario((SAVE, SAVE), 40_000, faults=2),
    "save | save, beside a stranger": Scenario((SAVE, SAVE), 2000, stranger="a"),
    "save | delete": Scenario((SAVE, DELETE), 15_000, stored=("a",), faults=2),
    "save | delete, save": Scenario((SAVE, DELETE + SAVE), 2000),
    "save, delete | save": Scenario((SAVE + DELETE, SAVE), 4000),
    "delete, save | save": Scenario((DELETE + SAVE, SAVE), 4000, stored=("a",)),
    "delete | delete": Scenario((DELETE, DELETE), 500, stored=("a",), faults=2),
    "delete | delete, save": Scenario((DELETE, DELETE + SAVE), 2000, stored=("a",)),
    "replace | replace": Scenario((REPLACE, REPLACE), 7000, stored=("a",)),
    "replace | delete": Scenario((REPLACE, DELETE), 15_000, stored=("a",), faults=2),
    "replace | delete, save": Scenario((REPLACE, DELETE + SAVE), 10_000, stored=("a",)),
    "save | replace": Scenario((SAVE, REPLACE), 2000, stored=("a",)),
    "save | replace what it saves": Scenario((SAVE, REPLACE), 3000, faults=2),
    "rename onto the name | save": Scenario((("rename b a",), SAVE), 3000, stored=("b",), faults=2),
    "rename away, delete | save": Scenario((("rename a b", "delete b"), SAVE), 2000, stored=("a",)),
    "save | rename away": Scenario((SAVE, ("rename a b",)), 1000, faults=2),
    "replace | rename away, save": Scenario((REPLACE, ("rename a b", "save a")), 5000, stored=("a",)),
    "delete | aside, save": Scenario((DELETE, ("aside a x", "save a")), 2000, stored=("a",)),
    "replace, delete | aside, save": Scenario((REPLACE + DELETE, ("aside a x", "save a")), 2000, stored=("a",)),
    "replace | delete, aside, save": Scenario((REPLACE, (*DELETE, "aside a x", "save a")), 10_000, stored=("a",)),
    "save, delete | aside, save": Scenario((SAVE + DELETE, ("aside a x", "save a")), 2000),
}


@pytest.mark.parametrize("keys", ["path", "token"])
@pytest.mark.parametrize("name", SCENARIOS)
def test_all_rules_together_keep_every_promise(name: str, keys: str) -> None:
    scenario = SCENARIOS[name]

    result = explore(scenario.start(keys, MORE_FAULTS), Model(Rules(), keys).steps)

    print(f"\n{name}, keys={keys!r}, {scenario.faults + MORE_FAULTS} faults: {result}")
    assert not result.problem, str(result)
    assert result.states > scenario.floor
    for event in ("CRASH", "-> lost", "LANDS", "evaporates", "runs out", "settle elapses"):
        assert any(event in label for label in result.labels), f"{event!r} never happened"


# rule left out -> (scenario, key style, how the violation begins)
BROKEN = {
    "write_ahead": ("save | save", "path", "untracked bytes"),
    "settle": ("delete, save | save", "path", "lost bytes"),  # the key is used again under a late operation
    "remember_doubt": ("save, delete | save", "token", "untracked bytes"),
    "plain_only": ("replace | delete", "token", "untracked bytes"),
    "compare_commit": ("save | save", "token", "lost bytes"),
    "compare_token": ("delete | delete, save", "token", "lost file"),  # versions start again at zero
    "mark_first": ("save | delete", "path", "lost bytes"),
    "second_deleter_waits": ("delete | delete, save", "path", "lost bytes"),
    "takeover_moves_version": ("save | delete", "path", "lost bytes"),
    "aside_if_committed": ("save, delete | aside, save", "path", "untracked bytes"),
    "know_what_stepped_aside": ("replace | delete, aside, save", "path", "untracked bytes"),
    "follow_compares": ("delete | aside, save", "path", "lost bytes"),
    "ask_owners": ("rename away, delete | save", "path", "lost bytes"),
    "look_at_bytes": ("save | save, beside a stranger", "path", "stranger"),
    "ask_owners_again": ("save | rename away", "token", "lost bytes"),
    "settle_again": ("replace | delete, save", "path", "lost bytes"),
    "leave_what_is_lost": ("save | rename away", "path", "lost bytes"),
    "surplus_waits": ("replace | delete, save", "path", "lost bytes"),
    "fresh_key": ("replace | replace", "path", "lost bytes"),
    "abandon_first": ("replace | replace", "token", "lost bytes"),
    "clear_compares": ("replace | replace", "token", "untracked bytes"),
    "check_lease": ("save | delete", "path", "lost bytes"),
}


def _without(rule: str) -> Exploration:
    name, keys, kind = BROKEN[rule]
    scenario = replace(SCENARIOS[name], faults=1)
    return explore(scenario.start(keys), Model(replace(Rules(), **{rule: False}), keys).steps, kind=kind)


@pytest.mark.parametrize("rule", BROKEN)
def test_without_one_rule_something_breaks(rule: str) -> None:
    result = _without(rule)

    print(f"\nwithout {rule}: {BROKEN[rule][0]}, keys={BROKEN[rule][1]!r}: {result}")
    assert result.problem.startswith(BROKEN[rule][2]), f"nothing breaks without {rule}: is the rule idle? {result}"
    assert result.trace


def test_every_rule_is_left_out_once() -> None:
    assert set(BROKEN) == {field.name for field in fields(Rules)}


def test_the_trace_of_a_late_discard_on_a_key_used_again_can_be_read() -> None:
    lines = str(_without("settle")).splitlines()

    assert lines[0].startswith("lost bytes: 'a' is stored")
    discards = [i for i, line in enumerate(lines) if "discard 'a' -> " in line or "late discard" in line]
    saved = next(i for i, line in enumerate(lines) if "J5 commit" in line and line.endswith("ok"))
    removed = next(i for i, line in enumerate(lines) if "remove the record Ta" in line)
    assert removed < saved
    assert discards


def _stored(**changes: object) -> State:
    return Scenario((), 0, stored=("a",)).start("path")._replace(**changes)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("check", "state", "kind"),
    [
        (violation, _stored(store=()), "lost bytes"),
        (violation, _stored(records=(), store=()), "lost file"),
        (violation, _stored(truth=(("Ta", ""),), acknowledged=frozenset()), "came back"),
        (violation, _stored(store=(("a", "ca"), ("b", "cb"))), "untracked bytes"),
        (violation, _stored(stranger="b"), "stranger"),
        (violation_at_rest, _stored(records=(Record("a", "deleting", "Ta", 2, "ca", (), "out"),)), "unfinished"),
        (violation_at_rest, _stored(actors=(Actor(todo=("save a",), step="write"),)), "stuck"),
    ],
)
def test_the_checks_see_what_they_are_for(check: Callable[[State], str], state: State, kind: str) -> None:
    assert check(state).startswith(kind)


def test_a_statement_whose_caller_is_gone_lands_late_or_never() -> None:
    late = Statement("discard", "J4 discard", token="Ta", key="a")
    state = _stored(late=(late,))

    after = {label.rsplit(" ", 1)[1]: following for label, following in Model(Rules(), "path").steps(state)}

    assert after["LANDS"].content("a") is None
    assert after["evaporates"].content("a") == "ca"
