"""What can happen around the actors of the journal model: lost answers, crashes, late statements, clocks."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

from tests.model.journal_state import Actor, Rules, State, Statement, apply


class Plan(NamedTuple):
    """One step of an actor: what it sends (nothing, if it only looks), and how it goes on after each answer."""

    label: str
    on: Mapping[str, Sequence[Actor]]
    send: Statement | None = None


class World:
    """Yields every state that can follow a state; what the actors want to do is said by a subclass."""

    def __init__(self, rules: Rules) -> None:
        self.rules = rules

    def plans(self, state: State, who: int, actor: Actor) -> list[Plan]:
        """Return what the actor may do next."""
        raise NotImplementedError

    def steps(self, state: State) -> Iterator[tuple[str, State]]:
        """Yield (what happened, the state after it) for everything that can happen next."""
        for who, actor in enumerate(state.actors):
            name = f"client {who + 1}" if actor.todo else "reconcile"
            for plan in self.plans(state, who, actor):
                for answer, after in self._outcomes(state, who, plan):
                    label = f"{name}: {plan.label}"
                    if answer == "crash":
                        died = Actor(todo=actor.todo, step="done", results=(*actor.results, "crashed"))
                        yield (
                            f"{label} -> CRASH under way",
                            after.with_actor(who, died if actor.todo else Actor(step="idle")),
                        )
                        continue
                    for going_on in plan.on.get(answer, ()):
                        yield f"{label} -> {answer}" if answer else label, self._note(after, who, actor, going_on)
        yield from self._late(state)
        yield from self._clocks(state)

    def _outcomes(self, state: State, who: int, plan: Plan) -> Iterator[tuple[str, State]]:
        if plan.send is None:
            yield "", state
            return
        after, answer = apply(state, plan.send, self.rules)
        yield answer, after
        if state.faults:
            worse = state._replace(faults=state.faults - 1)
            if plan.send.kind == "write":
                yield "error", worse
            lost = worse._replace(late=tuple(sorted([*worse.late, plan.send], key=repr)))
            yield "lost", lost
            yield "crash", lost

    def _note(self, after: State, who: int, before: Actor, going_on: Actor) -> State:
        """Let an actor go on, and note a save that its caller now believes in."""
        if going_on.results != before.results and going_on.results[-1] == "saved":
            after = after._replace(acknowledged=after.acknowledged | {before.token})
        return after.with_actor(who, going_on)

    def _late(self, state: State) -> Iterator[tuple[str, State]]:
        for i, statement in enumerate(state.late):
            rest = state._replace(late=state.late[:i] + state.late[i + 1 :])
            after, answer = apply(rest, statement, self.rules)
            what = f"late {statement.kind} ({statement.why} {statement.key or statement.path} {statement.token})"
            if answer == "ok":
                yield f"{what} LANDS", after
            yield f"{what} evaporates", rest

    def _clocks(self, state: State) -> Iterator[tuple[str, State]]:
        for record in state.records:
            if record.lease == "settled":
                continue
            rest = [other for other in state.records if other is not record]
            if record.lease in ("live", "brief"):
                working = any(actor.token == record.token for actor in state.actors)
                if working and not state.faults:
                    continue
                lease = "out" if record.lease == "live" else "settled"
                actors = tuple(a._replace(lease=False) if a.token == record.token else a for a in state.actors)
                after = state.with_records([*rest, record._replace(lease=lease)])._replace(actors=actors)
                yield f"the lease of {record.token} runs out", after._replace(faults=state.faults - working)
                continue
            under_way = any(late.token == record.token or record.names(late.key) for late in state.late) or any(
                actor.step in ("writing", "dropping") and record.names(actor.key) for actor in state.actors
            )
            if not under_way:
                yield (
                    f"settle elapses for {record.token}",
                    state.with_records([*rest, record._replace(lease="settled")]),
                )
