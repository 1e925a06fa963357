"""Breadth-first search through every state a model can reach, with the shortest trace to what is wrong."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from tests.model.journal_state import State, violation, violation_at_rest


@dataclass(frozen=True)
class Exploration:
    """What a search found: how many states, how many of them at rest, and the first violation with its trace."""

    states: int
    at_rest: int
    labels: frozenset[str]  # everything that happened on the way to some state
    problem: str = ""
    trace: tuple[str, ...] = ()

    def __str__(self) -> str:
        """Render the trace, one numbered step a line."""
        head = f"{self.problem or 'clean'} ({self.states} states, {self.at_rest} at rest)"
        return "\n".join([head, *(f"  {i:2}. {step}" for i, step in enumerate(self.trace, 1))])


def explore(
    start: State, steps: Callable[[State], Iterator[tuple[str, State]]], *, kind: str = "", limit: int = 1_000_000
) -> Exploration:
    """Visit every reachable state once; stop at the first violation (breadth first: its trace is as short as any).

    A state is at rest if nothing leads out of it.  With `kind`, only a violation that begins with it counts.  Raises
    RuntimeError when there are more than `limit` states.
    """
    came: dict[State, tuple[State, str] | None] = {start: None}
    queue = deque([start])
    at_rest = 0

    def labels() -> frozenset[str]:
        return frozenset(step[1] for step in came.values() if step is not None)

    def found(problem: str, state: State) -> Exploration:
        trace: list[str] = []
        step = came[state]
        while step is not None:
            trace.append(step[1])
            step = came[step[0]]
        return Exploration(len(came), at_rest, labels(), problem, tuple(reversed(trace)))

    while queue:
        state = queue.popleft()
        moved = False
        for label, after in steps(state):
            moved = moved or after != state
            if after in came:
                continue
            came[after] = (state, label)
            if (problem := violation(after)) and problem.startswith(kind):
                return found(problem, after)
            if len(came) > limit:
                raise RuntimeError(f"more than {limit} states")
            queue.append(after)
        if not moved:
            at_rest += 1
            if (problem := violation_at_rest(state)) and problem.startswith(kind):
                return found(problem, state)
    return Exploration(len(came), at_rest, labels())
