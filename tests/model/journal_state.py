"""What the model of the journal is made of: states, statements, and what must always hold.

A *state* is one immutable value: the records of the meta-backend, the bytes of one original, what each actor is
doing, and the operations that are still under way although nobody waits for them any more (*late* operations). A
*statement* is one atomic request to the meta-backend or to the original; `apply` says what it does when it takes
effect.

Abstracted away: time (events replace clocks: a lease runs out, settle elapses), content (an identifier), chance (a
token is named after the reservation that drew it), several originals (one suffices: a place is a key), partial writes
(a backend's write is all or nothing by its contract), and columns without a bearing on safety.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import NamedTuple

STRANGER = "stranger"  # the content of an object that is older than every record and belongs to none


@dataclass(frozen=True)
class Rules:
    """The rules of the journal as switches: all on is the design, one off is a design with a bug."""

    write_ahead: bool = True  # J1: reserve before writing
    settle: bool = True  # J2: a record with anything unanswered goes only after settle
    remember_doubt: bool = True  # J2: a commit notes that a try of its save went unanswered
    plain_only: bool = True  # J2: only a record with nothing but settled good places may go at once
    compare_commit: bool = True  # J3: commit compares token and version
    compare_token: bool = True  # J3: comparing versions alone is not enough, for they start again at zero
    mark_first: bool = True  # J4: compare-and-set to `deleting` before any byte is discarded
    second_deleter_waits: bool = True  # J4: a deleter touches nothing of a record that is `deleting` already
    aside_if_committed: bool = True  # J4: only the record of a file that was committed steps aside
    know_what_stepped_aside: bool = True  # J4: a record that has stepped aside is still that of who deletes it
    follow_compares: bool = True  # J4: one that has stepped aside goes at once only if nothing else became of it
    takeover_moves_version: bool = True  # J4: taking over a `deleting` record is a change of version
    ask_owners: bool = True  # J5: after the reservation, ask whether another record names the key
    look_at_bytes: bool = True  # J4: at a place that was never good only bytes that carry the token are discarded ...
    ask_owners_again: bool = True  # J4: ... and none if another record names the key
    settle_again: bool = True  # J2: whoever finishes a record takes it for settle: its own discard may be lost too
    leave_what_is_lost: bool = True  # J4: a client whose record is no longer there discards nothing unasked
    surplus_waits: bool = True  # J2: a surplus place may be under somebody's discard: not plain
    fresh_key: bool = True  # J6: replace writes to a new key
    abandon_first: bool = True  # J6: reconcile compare-and-sets a doubtful place to abandoned before discarding it
    clear_compares: bool = True  # J6: clearing a surplus place compares token and version
    check_lease: bool = True  # J7: nothing is sent to an original once the own lease has run out


class Place(NamedTuple):
    """A key named by a record: good, doubtful, surplus, or abandoned (was doubtful, will never be good)."""

    key: str
    role: str = "doubtful"
    hot: bool = False  # good, but an unanswered try of the same save may still land on it


class Record(NamedTuple):
    """One row of the meta-backend; lease is live, out, or settled (out for longer than settle).

    Without `settle_again` it may be brief: live, and settled as soon as it is out.
    """

    path: str
    state: str
    token: str
    version: int
    content: str
    places: tuple[Place, ...]
    lease: str

    def names(self, key: str) -> bool:
        """Say whether a place of the record has this key."""
        return any(place.key == key for place in self.places)

    def role(self, key: str) -> str:
        """Return the role of the key in this record, or an empty string."""
        return next((place.role for place in self.places if place.key == key), "")


class Statement(NamedTuple):
    """One atomic request: create, update, remove (meta-backend); write, overwrite, discard (original)."""

    kind: str
    why: str  # the step it belongs to, for traces and for the bookkeeping of what was promised
    path: str = ""
    token: str = ""
    version: int = -1
    state: str = ""  # what an update changes; empty or None: unchanged
    content: str = ""
    places: tuple[Place, ...] | None = None
    lease: str = ""
    new_path: str = ""
    key: str = ""
    compare: bool = True


class Actor(NamedTuple):
    """A client or reconcile: where it stands (`step`) and what it knows."""

    todo: tuple[str, ...] = ()
    turn: int = 0
    step: str = "next"
    path: str = ""
    token: str = ""
    version: int = -1
    key: str = ""
    places: tuple[Place, ...] = ()  # as last read or written
    left: tuple[str, ...] = ()  # keys still to be discarded
    then: str = ""  # what follows when all of them are: remove, clear, or nothing
    lease: bool = False  # as its own clock says
    doubt: bool = False  # something it sent went unanswered
    sent: bool = False  # ... and that was its commit or swap
    results: tuple[str, ...] = ()


class State(NamedTuple):
    """Everything there is, and two notes of the observer: `truth` and `acknowledged`."""

    records: tuple[Record, ...]
    store: tuple[tuple[str, str], ...]
    actors: tuple[Actor, ...]
    late: tuple[Statement, ...] = ()
    faults: int = 0  # how many more things may go wrong
    truth: tuple[tuple[str, str], ...] = ()  # token -> the content last committed; "" once rightly deleted
    acknowledged: frozenset[str] = frozenset()  # tokens whose save was acknowledged
    stranger: str = ""  # the key of a stranger's object

    def record(self, path: str) -> Record | None:
        """Return the record of the path."""
        return next((record for record in self.records if record.path == path), None)

    def own(self, actor: Actor) -> Record | None:
        """Return the record of the actor's path, if it still carries the actor's token."""
        record = self.record(actor.path)
        return record if record is not None and record.token == actor.token else None

    def content(self, key: str) -> str | None:
        """Return what is at the key."""
        return next((content for at, content in self.store if at == key), None)

    def with_records(self, records: Iterable[Record]) -> State:
        """Return the state with these records, in order of path."""
        return self._replace(records=tuple(sorted(records)))

    def with_store(self, key: str, content: str | None) -> State:
        """Return the state with other bytes, or none, at a key."""
        rest = [item for item in self.store if item[0] != key]
        return self._replace(store=tuple(sorted([*rest, (key, content)] if content is not None else rest)))

    def with_actor(self, who: int, actor: Actor) -> State:
        """Return the state with one actor changed."""
        return self._replace(actors=(*self.actors[:who], actor, *self.actors[who + 1 :]))

    def with_truth(self, token: str, content: str) -> State:
        """Return the state with a note of what the token's file is now."""
        return self._replace(truth=tuple(sorted([*(t for t in self.truth if t[0] != token), (token, content)])))


def apply(state: State, statement: Statement, rules: Rules) -> tuple[State, str]:
    """Let a statement take effect; return the state after it and the answer."""
    if statement.kind in ("write", "overwrite"):
        if statement.kind == "write" and state.content(statement.key) is not None:
            return state, "taken"
        return state.with_store(statement.key, statement.content), "ok"
    if statement.kind == "discard":
        return state.with_store(statement.key, None), "ok"
    found = state.record(statement.path)
    if statement.kind == "create":
        if found is not None:
            mine = found.token == statement.token and found.state == "pending"
            return state, "ok" if mine else "taken"
        places = statement.places or ()
        row = Record(statement.path, "pending", statement.token, 0, "", places, "live")
        return state.with_records([*state.records, row]), "ok"
    if found is None or (statement.compare and not _matches(found, statement, rules)):
        return state, "conflict"
    others = [record for record in state.records if record is not found]
    if statement.kind == "remove":
        return state.with_records(others), "ok"
    if statement.new_path and state.record(statement.new_path) is not None:
        return state, "taken"
    return _update(state.with_records(others), found, statement, rules), "ok"


def _matches(found: Record, statement: Statement, rules: Rules) -> bool:
    same_token = found.token == statement.token or not rules.compare_token
    return same_token and found.version == statement.version


def _update(rest: State, found: Record, statement: Statement, rules: Rules) -> State:
    moves = statement.why != "J7 renew" and (statement.why != "J4 take over" or rules.takeover_moves_version)
    row = found._replace(
        path=statement.new_path or found.path,
        state=statement.state or found.state,
        version=found.version + moves,
        content=statement.content or found.content,
        places=found.places if statement.places is None else statement.places,
        lease=statement.lease or found.lease,
    )
    if row.state == "stored" and all(place.role == "good" for place in row.places):
        row = row._replace(lease="settled")  # nothing to guard: the lease is given back
    after = rest.with_records([*rest.records, row])
    if statement.content:
        return after.with_truth(statement.token, statement.content)
    if statement.why == "J4 delete: mark" and found.token == statement.token:
        return after.with_truth(found.token, "")
    return after


def violation(state: State) -> str:
    """Return what is wrong in this state, whatever is going on; empty if nothing is."""
    for record in state.records:
        if record.state == "stored":
            good = [place.key for place in record.places if place.role == "good"]
            if len(good) != 1 or state.content(good[0]) != record.content:
                return f"lost bytes: {record.path!r} is stored, but its content is not at {good}"
    truth = dict(state.truth)
    stored = {record.token: record.content for record in state.records if record.state == "stored"}
    for token in state.acknowledged:
        if truth.get(token, "") and stored.get(token) != truth[token]:
            return f"lost file: {token} was acknowledged with {truth[token]!r} and is not stored"
    for token, content in state.truth:
        if not content and token in stored:
            return f"came back: {token} was deleted and is stored"
    if state.stranger and state.content(state.stranger) != STRANGER:
        return f"stranger: the object at {state.stranger!r} was not ours to remove"
    for key, content in state.store:
        if content != STRANGER and not any(record.names(key) for record in state.records):
            return f"untracked bytes: no record names {key!r}"
    return ""


def violation_at_rest(state: State) -> str:
    """Return what is wrong in a state in which nothing more can happen; empty if nothing is."""
    tokens = {record.token for record in state.records}
    for record in state.records:
        if record.state != "stored":
            return f"unfinished: {record.path!r} is {record.state} for ever"
        if len(record.places) != 1:
            return f"unfinished: {record.path!r} has leftovers for ever"
    for key, content in state.store:
        if content != STRANGER and not any(record.role(key) == "good" for record in state.records):
            return f"untracked bytes: {key!r} is no record's good place"
    for who, actor in enumerate(state.actors):
        if actor.step not in ("done", "idle"):
            return f"stuck: actor {who} stands at {actor.step!r}"
        for turn, result in enumerate(actor.results):
            if result == "failed" and any(token.startswith(f"T{who}{turn}") for token in tokens):
                return f"half done: save {turn} of client {who} failed and left a record"
    return ""
