"""The journal (docs/design.md, "How a file stays safe") as a model: what clients and reconcile do, step by step.

Read it beside the design: every function named `jN_...` is one step of rule JN.  A step either sends one statement
and says, for each answer, how its actor goes on (`Plan.on`), or only looks.

`World.steps` yields every state that can follow a state: any actor takes its next step; an answer is lost (`lost`:
the statement becomes late) or the caller dies with the statement under way (`crash`); a write is refused for good
(`error`); a late statement takes effect or evaporates; a lease runs out, also under the hands of a client that is
merely slow; settle elapses.  Lost answers, errors, crashes and slowness draw on a small budget (`State.faults`), so
that the state space is finite.  A late statement stays late for as long as it likes, but settle elapses only when
none is left for the record: that is what "longer than any deadline" means.

A renewal or a reading of `owners` is one step; looking at the own clock and sending are two (`j7_check_lease`,
`j5_write`), because a client may fall asleep in between.  Not modelled: J8 (a caller's transaction) and J9 (the
scan).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from tests.model.journal_state import Actor, Place, Record, Rules, State, Statement
from tests.model.journal_world import Plan, World


def _end(actor: Actor, result: str = "") -> Actor:
    """Finish a verb: forget everything but the results."""
    results = (*actor.results, result) if result else actor.results
    step = "begin" if actor.turn + 1 < len(actor.todo) else "done"
    return Actor(todo=actor.todo, turn=actor.turn + 1, step=step, results=results) if actor.todo else Actor(step="idle")


def _ack(actor: Actor, result: str) -> Actor:
    return actor._replace(results=(*actor.results, result))


def _keys(places: Sequence[Place]) -> tuple[str, ...]:
    return tuple(place.key for place in places)


class Model(World):
    """The steps of the journal under a set of rules and one key style ("path" or "token")."""

    def __init__(self, rules: Rules, keys: str) -> None:
        super().__init__(rules)
        self.keys = keys
        self._verbs: dict[str, Callable[[State, int, Actor], list[Plan]]] = {
            "save": self.j5_reserve,
            "replace": self.j6_look,
            "delete": self.j4_look,
            "rename": self.rename_look,
            "aside": self.aside_look,
        }
        self._steps: dict[str, Callable[[State, int, Actor], list[Plan]]] = {
            "begin": lambda state, who, actor: self._verbs[actor.todo[actor.turn].split()[0]](state, who, actor),
            "early write": self.j5_write_too_early,
            "owners": self.j5_ask_owners,
            "rekey": self.j5_take_a_token_key,
            "write": self.j7_check_lease,
            "writing": self.j5_write,
            "commit": self.j5_commit,
            "reread": self.j3_settle_the_commit,
            "undo": self.j4_undo,
            "mark": self.j4_mark,
            "drop": self.j4_next_place,
            "dropping": self.j4_discard,
            "remove": self.j4_remove,
            "follow": self.j4_follow,
            "name": self.j6_name_the_new_key,
            "in place": self.j6_write_in_place,
            "swap": self.j6_swap,
            "reswap": self.j6_settle_the_swap,
            "clear": self.j6_clear,
            "move": self.rename_move,
            "idle": self.j7_reconcile,
            "done": lambda state, who, actor: [],
        }

    def plans(self, state: State, who: int, actor: Actor) -> list[Plan]:
        """Return what the actor may do next."""
        return self._steps[actor.step](state, who, actor)

    # ---- J5: save ----

    def j5_reserve(self, state: State, who: int, actor: Actor) -> list[Plan]:
        """Reserve the path: a pending record that names the key before a byte goes there (J1)."""
        path = actor.path or actor.todo[actor.turn].split()[1]
        token = f"T{who}{actor.turn}{'' if len(path) == 1 else 'n'}"  # a new name gets a new token
        key = path if self.keys == "path" else f"{path}~{token}"
        me = actor._replace(path=path, token=token, key=key, places=(Place(key),), version=0)
        if not self.rules.write_ahead and state.content(key) is None:
            return self.j5_write_too_early(state, who, me)
        send = Statement("create", "J5 reserve", path, token, places=me.places)
        found = state.record(path)
        leased = found is None or found.lease == "live"  # the clock starts before the first try is sent
        taken = (
            _end(actor, "failed") if actor.path and len(path) > 1 else actor._replace(path=f"{path}{who}{actor.turn}")
        )
        reserved = me._replace(
            step="owners" if self.keys == "path" and self.rules.ask_owners else "write", lease=leased
        )
        if not self.rules.write_ahead:
            reserved = me._replace(step="commit", lease=True)
        doubtful = me._replace(doubt=True)
        on = {"ok": [reserved], "taken": [taken], "lost": [doubtful, doubtful._replace(step="undo")]}
        return [Plan(f"J5 reserve {path!r} for {token}, key {key!r}", on, send)]

    def j5_write_too_early(self, state: State, who: int, actor: Actor) -> list[Plan]:
        """Write before anything names the key: what J1 forbids."""
        send = Statement("write", "J5 write", token=actor.token, key=actor.key, content=f"c{who}{actor.turn}")
        on = {"ok": [actor._replace(step="begin")], "error": [_end(actor, "failed")], "lost": [_end(actor, "failed")]}
        return [Plan(f"J5 write {actor.key!r} unannounced", on, send)]

    def j5_ask_owners(self, state: State, who: int, actor: Actor) -> list[Plan]:
        """Ask, once the path is ours, whether another record (a renamed file's) names the key."""
        foreign = any(record.names(actor.key) for record in state.records if record.token != actor.token)
        return [
            Plan(f"J5 owners of {actor.key!r}: {foreign}", {"": [actor._replace(step="rekey" if foreign else "write")]})
        ]

    def j5_take_a_token_key(self, state: State, who: int, actor: Actor) -> list[Plan]:
        """Name a token key instead of a taken one, before writing there; keep the old place if a try is unanswered."""
        key = f"{actor.path}~{actor.token}"
        places = (*(actor.places if actor.doubt else ()), Place(key))
        send = self._update(actor, "J5 take a token key", places=places)
        me = actor._replace(step="write", key=key, places=places, version=actor.version + 1)
        lost = [_end(actor, "failed")]
        return [Plan(f"J5 name {key!r}", {"ok": [me], "conflict": lost, "lost": lost}, send)]

    def j7_check_lease(self, state: State, who: int, actor: Actor) -> list[Plan]:
        """Look at the own clock before sending anything to an original; renew a lease that has run out."""
        if actor.lease or not self.rules.check_lease:
            return [Plan(f"J7 start to write {actor.key!r}", {"": [actor._replace(step="writing")]})]
        own = state.own(actor)
        if own is None or own.state not in ("pending", "stored") or own.role(actor.key) != "doubtful":
            return [Plan("J7 the lease is lost: touch nothing", {"": [_end(actor, "failed")]})]
        send = Statement("update", "J7 renew", own.path, own.token, own.version, lease="live")
        return [Plan(f"J7 renew the lease of {own.token}", {"ok": [actor._replace(lease=True)]}, send)]

    def j5_write(self, state: State, who: int, actor: Actor) -> list[Plan]:
        """Write the bytes, exclusively; a key that our own unanswered try has taken is ours."""
        content = f"c{who}{actor.turn}"
        saving = actor.todo[actor.turn].startswith("save")
        mine = state.content(actor.key) == content
        written = actor._replace(step="commit" if saving else "swap")
        broken = actor._replace(step="undo") if saving else _end(actor, "failed")
        doubtful = actor._replace(step="write", doubt=True)
        lost = [doubtful, doubtful._replace(step="undo") if saving else _end(actor, "failed")]
        taken = [written if mine else actor._replace(step="rekey")]
        send = Statement("write", "J5 write", token=actor.token, key=actor.key, content=content)
        return [
            Plan(f"J5 write {actor.key!r}", {"ok": [written], "taken": taken, "error": [broken], "lost": lost}, send)
        ]

    def j5_commit(self, state: State, who: int, actor: Actor) -> list[Plan]:
        """Compare-and-set the record to stored; its place is good, and hot if a try went unanswered."""
        hot = actor.doubt and self.rules.remember_doubt
        rest = tuple(place for place in actor.places if place.key != actor.key)
        places = (*rest, Place(actor.key, "good", hot))
        send = self._update(actor, "J5 commit", state="stored", content=f"c{who}{actor.turn}", places=places)
        send = send._replace(compare=self.rules.compare_commit)
        lost = actor._replace(step="reread", doubt=True, sent=True)
        on = {"ok": [_end(actor, "saved")], "conflict": [actor._replace(step="reread")], "lost": [lost]}
        return [Plan(f"J5 commit {actor.token}", on, send)]

    def j3_settle_the_commit(self, state: State, who: int, actor: Actor) -> list[Plan]:
        """Settle a commit by reading: own token and stored is success; still pending: send it again, or undo."""
        own = state.own(actor)
        if own is not None and own.state == "stored":
            return [Plan("J3 read: stored, and ours", {"": [_end(actor, "saved")]})]
        if own is not None and own.state == "pending":
            again = actor._replace(step="commit", version=own.version)
            return [Plan("J3 read: still pending", {"": [again, actor._replace(step="undo")]})]
        return [
            Plan("J3 read: no longer ours, touch nothing", {"": [_end(actor, "unknown" if actor.sent else "failed")]})
        ]

    # ---- J4: undo, delete ----

    def j4_undo(self, state: State, who: int, actor: Actor) -> list[Plan]:
        """(a) of an undo: compare-and-set pending to deleting; only then is anything removed."""
        own = state.own(actor)
        if own is None and not self.rules.leave_what_is_lost:
            unasked = tuple(place._replace(role="surplus") for place in actor.places)
            me = _ack(actor, "unknown")._replace(step="drop", places=unasked, left=_keys(unasked), then="")
            return [Plan("J4 undo: no longer ours, discard all the same", {"": [me]})]
        if own is None or own.state != "pending":
            return self.j3_settle_the_commit(state, who, actor)
        me = actor._replace(version=own.version, places=own.places)
        then = "" if actor.doubt and self.rules.settle else "remove"
        marked = _ack(me, "unknown" if actor.sent else "failed")._replace(
            version=own.version + 1, step="drop", left=_keys(own.places), then=then, lease=True
        )
        send = self._update(me, "J4 undo: mark", state="deleting", lease="live")
        lost = [_end(actor, "unknown" if actor.sent else "failed")]
        return [Plan(f"J4 undo: mark {actor.token}", {"ok": [marked], "lost": lost}, send)]

    def j4_look(self, state: State, who: int, actor: Actor) -> list[Plan]:
        """Read the record to be deleted; it may go at once only if nothing can be under way to its places."""
        path = actor.todo[actor.turn].split()[1]
        found = state.record(path)
        waits = self.rules.second_deleter_waits
        if found is None or found.state == "pending" or (found.state == "deleting" and waits):
            return [Plan(f"J4 delete {path!r}: nothing there", {"": [_end(actor, "missing")]})]
        done = ("good",) if self.rules.surplus_waits else ("good", "surplus")
        plain = all(place.role in done and not place.hot for place in found.places)
        me = actor._replace(
            path=path, token=found.token, version=found.version, places=found.places, left=_keys(found.places),
            then="remove" if plain or not self.rules.plain_only or not self.rules.settle else "",
            step="mark", lease=True,
        )  # fmt: skip
        if found.state == "deleting" or not self.rules.mark_first:
            me = me._replace(step="drop")
        return [Plan(f"J4 delete {path!r}: found {found.token}", {"": [me]})]

    def j4_mark(self, state: State, who: int, actor: Actor) -> list[Plan]:
        """(a) of a delete: compare-and-set stored to deleting; from here on the file is deleted."""
        marked = _ack(actor, "deleted")._replace(step="drop", version=actor.version + 1, lease=True)
        again = Actor(todo=actor.todo, turn=actor.turn, step="begin", results=actor.results)
        send = self._update(actor, "J4 delete: mark", state="deleting", lease="live")
        on = {"ok": [marked], "conflict": [again], "lost": [_end(actor, "unknown")]}
        return [Plan(f"J4 delete: mark {actor.token}", on, send)]

    def j4_next_place(self, state: State, who: int, actor: Actor) -> list[Plan]:
        """(b) start to discard the next place, unless the lease has run out.

        At a place that was never good, only bytes that carry the record's token go, and
        none if another record names the key; our own that has stepped aside is no other.
        """
        if not actor.left:
            return [Plan("J4 all places gone", {"": [actor._replace(step=actor.then) if actor.then else _end(actor)]})]
        if not actor.lease and self.rules.check_lease:
            return [Plan("J7 the lease has run out: leave the rest to reconcile", {"": [_end(actor)]})]
        key = actor.left[0]
        never_good = next(place.role for place in actor.places if place.key == key) in ("doubtful", "abandoned")
        ours = "~" in key or state.content(key) in (None, f"c{actor.token[1:3]}")  # a token key is nobody else's
        aside = self.rules.know_what_stepped_aside and actor.then != "clear"
        named = any(
            record.names(key) and record.path != actor.path
            for record in state.records
            if not (aside and record.token == actor.token and record.state == "deleting")
        )
        if never_good and ((not ours and self.rules.look_at_bytes) or (named and self.rules.ask_owners_again)):
            return [Plan(f"J4 spare {key!r}, not ours", {"": [actor._replace(left=actor.left[1:])]})]
        return [Plan(f"J4 start to discard {key!r}", {"": [actor._replace(step="dropping", key=key)]})]

    def j4_discard(self, state: State, who: int, actor: Actor) -> list[Plan]:
        """(b) discard a place; unanswered: go on with the others, and leave the record."""
        me = actor._replace(step="drop", left=actor.left[1:])
        send = Statement("discard", "J4 discard", token=actor.token, key=actor.key)
        lost = me._replace(then="" if self.rules.settle else me.then)
        return [Plan(f"J4 discard {actor.key!r}", {"ok": [me], "lost": [lost]}, send)]

    def j4_remove(self, state: State, who: int, actor: Actor) -> list[Plan]:
        """(c) delete the record, comparing token and version."""
        send = Statement("remove", "J4 remove", actor.path, actor.token, actor.version)
        gone = [_end(actor)]
        on = {"ok": gone, "conflict": [actor._replace(step="follow")], "lost": gone}
        return [Plan(f"J4 remove the record {actor.token}", on, send)]

    def j4_follow(self, state: State, who: int, actor: Actor) -> list[Plan]:
        """(c) of a record that has stepped aside since, and nothing else: delete it where it is."""
        aside = next((record for record in state.records if record.token == actor.token), None)
        moved = aside is not None and aside.path != actor.path and aside.state == "deleting"
        if aside is None or not moved or (aside.version != actor.version + 1 and self.rules.follow_compares):
            return [Plan("J4 moved on: leave it", {"": [_end(actor)]})]
        me = actor._replace(path=aside.path, version=aside.version)
        return [Plan(f"J4 follow {actor.token} to {aside.path!r}", {"": [me._replace(step="remove")]})]

    # ---- J6: replace ----

    def j6_look(self, state: State, who: int, actor: Actor) -> list[Plan]:
        """Read the record to be given new bytes."""
        path = actor.todo[actor.turn].split()[1]
        found = state.record(path)
        if found is None or found.state != "stored":
            return [Plan(f"J6 replace {path!r}: nothing there", {"": [_end(actor, "missing")]})]
        me = actor._replace(path=path, token=found.token, version=found.version, places=found.places)
        me = me._replace(step="name", key=f"{path}~R{who}{actor.turn}")
        if not self.rules.fresh_key:
            me = me._replace(step="in place", key=next(place.key for place in found.places if place.role == "good"))
        return [Plan(f"J6 replace {path!r}: found {found.token}", {"": [me]})]

    def j6_name_the_new_key(self, state: State, who: int, actor: Actor) -> list[Plan]:
        """Name the new key as doubtful, taking the lease."""
        places = (*actor.places, Place(actor.key))
        me = actor._replace(step="write", places=places, version=actor.version + 1, lease=True)
        again = Actor(todo=actor.todo, turn=actor.turn, step="begin", results=actor.results)
        send = self._update(actor, "J6 name", places=places, lease="live")
        on = {"ok": [me], "conflict": [again], "lost": [_end(actor, "failed")]}
        return [Plan(f"J6 name {actor.key!r}", on, send)]

    def j6_write_in_place(self, state: State, who: int, actor: Actor) -> list[Plan]:
        """Overwrite the good place: what J6 forbids."""
        send = Statement("overwrite", "J6 overwrite", key=actor.key, content=f"c{who}{actor.turn}")
        on = {"ok": [actor._replace(step="swap")], "lost": [_end(actor, "failed")]}
        return [Plan(f"J6 overwrite {actor.key!r}", on, send)]

    def j6_swap(self, state: State, who: int, actor: Actor) -> list[Plan]:
        """Compare-and-set: the new place is good, the old one surplus."""
        hot = actor.doubt and self.rules.remember_doubt
        kept = tuple(p._replace(role="surplus") if p.role == "good" else p for p in actor.places if p.key != actor.key)
        places = (*kept, Place(actor.key, "good", hot))
        old = [p for p in actor.places if p.role == "good" and p.key != actor.key]
        send = self._update(actor, "J6 swap", content=f"c{who}{actor.turn}", places=places)
        swapped = _ack(actor, "replaced")._replace(
            version=actor.version + 1, places=places, left=_keys(old), step="drop"
        )
        swapped = swapped._replace(then="" if any(place.hot for place in old) and self.rules.settle else "clear")
        lost = actor._replace(step="reswap", sent=True, doubt=True)
        on = {"ok": [swapped], "conflict": [actor._replace(step="reswap")], "lost": [lost]}
        return [Plan(f"J6 swap to {actor.key!r}", on, send)]

    def j6_settle_the_swap(self, state: State, who: int, actor: Actor) -> list[Plan]:
        """Settle a swap by reading: still doubtful: again; good, or surplus by now: it was done; else it is lost."""
        own = state.own(actor)
        role = own.role(actor.key) if own is not None and own.state == "stored" else ""
        if own is not None and role == "doubtful":
            again = actor._replace(step="swap", version=own.version, places=own.places)
            lost = [_end(actor, "unknown")] if actor.sent else []
            return [Plan("J3 read: still doubtful", {"": [again, *lost]})]
        result = "replaced" if role in ("good", "surplus") else "unknown" if actor.sent else "failed"
        return [Plan(f"J3 read: {role or 'no longer ours'}", {"": [_end(actor, result)]})]

    def j6_clear(self, state: State, who: int, actor: Actor) -> list[Plan]:
        """Strike the discarded places off the record, comparing token and version."""
        kept = tuple(p for p in actor.places if (p.key != actor.key if actor.todo else p.role == "good"))
        send = self._update(actor, "J6 clear", places=kept)._replace(compare=self.rules.clear_compares)
        gone = [_end(actor)]
        return [Plan(f"J6 clear {actor.token}", {"ok": gone, "conflict": gone, "lost": gone}, send)]

    # ---- rename ----

    def rename_look(self, state: State, who: int, actor: Actor) -> list[Plan]:
        """Read the record to be renamed."""
        path = actor.todo[actor.turn].split()[1]
        found = state.record(path)
        if found is None or found.state != "stored":
            return [Plan(f"rename {path!r}: nothing there", {"": [_end(actor, "missing")]})]
        me = actor._replace(path=path, token=found.token, version=found.version, step="move")
        return [Plan(f"rename {path!r}: found {found.token}", {"": [me]})]

    def rename_move(self, state: State, who: int, actor: Actor) -> list[Plan]:
        """Compare-and-set the path: no byte moves, and the key stays with the record."""
        send = self._update(actor, "rename", new_path=actor.todo[actor.turn].split()[2])
        again = Actor(todo=actor.todo, turn=actor.turn, step="begin", results=actor.results)
        on = {"ok": [_end(actor, "renamed")], "taken": [_end(actor, "refused")], "conflict": [again]}
        return [Plan(f"rename to {send.new_path!r}", {**on, "lost": [_end(actor, "unknown")]}, send)]

    # ---- a name is wanted that a file on its way out still has ----

    def aside_look(self, state: State, who: int, actor: Actor) -> list[Plan]:
        """Let a `deleting` record give up its path by a rename; its keys stay named, and its lease stays.

        Only of a file that has been committed: of a save which is undone the reservation, sent twice, could land once
        more where it was, and commit. A replacement may still be under way, whose key is new and stays named.
        """
        _, path, other = actor.todo[actor.turn].split()
        found = state.record(path)
        certain = found is not None and any(p.role in ("good", "surplus") and not p.hot for p in found.places)
        if found is None or found.state != "deleting" or (self.rules.aside_if_committed and not certain):
            return [Plan(f"aside {path!r}: nothing that could give way", {"": [_end(actor)]})]
        me = actor._replace(path=path, token=found.token, version=found.version)
        on = {"ok": [_end(me)], "taken": [_end(me)], "conflict": [_end(me)], "lost": [_end(me)]}
        return [Plan(f"aside {path!r} of {found.token}", on, self._update(me, "step aside", new_path=other))]

    # ---- J7: reconcile ----

    def j7_reconcile(self, state: State, who: int, actor: Actor) -> list[Plan]:
        """Take any record that is due: see `_j7_take`."""
        plans = [self._j7_take(record) for record in state.records if record.lease in ("out", "settled")]
        return [plan for plan in plans if plan is not None]

    def _j7_take(self, record: Record) -> Plan | None:
        settled = record.lease == "settled" or not self.rules.settle
        roles = {place.role for place in record.places}
        me = Actor(
            step="drop", path=record.path, token=record.token, version=record.version + 1,
            places=record.places, left=_keys(record.places), lease=True,
        )  # fmt: skip
        idle = [Actor(step="idle")]
        if record.state == "pending":
            me = me._replace(then="" if self.rules.settle else "remove")
            send = self._update(me, "J4 undo: mark", state="deleting", lease="live")
            label = f"J7 undo {record.token}"
        elif record.state == "deleting":
            if not settled:
                return None
            me = me._replace(then="remove", version=record.version + self.rules.takeover_moves_version)
            send = self._update(me, "J4 take over", lease="live" if self.rules.settle_again else "brief")
            label = f"J7 finish {record.token}"
        elif "doubtful" in roles and self.rules.abandon_first:
            places = tuple(p._replace(role="abandoned") if p.role == "doubtful" else p for p in record.places)
            send = self._update(me, "J7 abandon", places=places, lease="live")
            label, me = f"J7 abandon doubtful places of {record.token}", idle[0]
        elif roles != {"good"} and settled:
            left = tuple(p.key for p in record.places if p.role != "good")
            me = me._replace(then="clear", left=left)
            if not self.rules.abandon_first:
                return Plan(f"J7 tidy {record.token}", {"": [me._replace(version=record.version)]})
            send = self._update(me, "J7 tidy", lease="live")
            label = f"J7 tidy {record.token}"
        else:
            return None
        send = send._replace(version=record.version)
        return Plan(label, {"ok": [me], "conflict": idle, "lost": idle}, send)

    @staticmethod
    def _update(
        actor: Actor, why: str, *, state: str = "", content: str = "", places: tuple[Place, ...] | None = None,
        lease: str = "", new_path: str = "",
    ) -> Statement:  # fmt: skip
        return Statement("update", why, actor.path, actor.token, actor.version, state, content, places, lease, new_path)
