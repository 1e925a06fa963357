"""The journal: how a record moves from state to state, so that a crash at any point loses and orphans nothing.

The rules J1 to J9 are those of docs/design.md; ``tests/model`` checks them exhaustively. In short: a place is named
in the record before a byte goes there, every change compares token and version, a file is marked ``deleting``
before its bytes go, and its record goes last, when nothing can land on its keys any more.

What the state of a place means for whoever removes:

* good, surplus: the bytes there are this file's for certain, they are discarded whatever they look like
* doubtful: a write may still land there or may have been kept out by a foreign file; only bytes that carry the
  record's token are discarded
* settling: discarded before, by somebody who had marked the record; once more when the lease (`settle`) is over,
  again only what carries the token, and then the place is forgotten
"""

from __future__ import annotations

import contextlib
import logging
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from typing import Any, NamedTuple

from .backends.base import Backend
from .cleanup import Cleanup
from .errors import Conflict, InvalidPath, NotFound, StorageError
from .leases import Leases
from .meta_backends.base import UNCHANGED, MetaBackend, Unchanged
from .paths import MAX_PATH_BYTES, alternative, new_token
from .records import DELETING, PENDING, STORED, MetaRecord, Place
from .timeouts import elapsed

__all__ = ["Journal", "Marked"]

_log = logging.getLogger(__name__)

_CERTAIN = frozenset({"good", "surplus"})  # the bytes at such a place are this file's
_SHORT = 60  # characters that every column for paths has room for
_ROUNDING = 0.01  # seconds by which a lease ends after what it is for is due: databases round to milliseconds


class Marked(NamedTuple):
    """A record that its holder has marked ``deleting``, and until when (`timeouts.elapsed`) he may act on it."""

    record: MetaRecord
    until: float


class Journal:
    """The transitions of the records of one storage.

    Args:
        meta: where the records are.
        original: gives the original backend of a place.
        cleanup: the owner's; renewals of leases run in it.
        lease, settle, keep_replaced: in seconds, see `ProxyStorage`.
        durable: bytes stay removed after the loss of power, before their name leaves the record.
        max_path_bytes: of a path, in UTF-8.
    """

    def __init__(
        self,
        meta: MetaBackend,
        original: Callable[[str], Backend],
        cleanup: Cleanup,
        *,
        lease: float,
        settle: float,
        keep_replaced: float,
        durable: bool = False,
        max_path_bytes: int = MAX_PATH_BYTES,
    ) -> None:
        self.meta = meta
        self.lease = lease
        self.settle = settle
        self.keep_replaced = keep_replaced
        self._durable = durable
        self._max_path_bytes = max_path_bytes
        self._original = original
        self.leases = Leases(meta, cleanup, lease)

    # -- J3: every change compares token and version

    async def change(
        self, record: MetaRecord, changes: Mapping[str, Any], *, lease: float | Unchanged | None = UNCHANGED
    ) -> MetaRecord:
        """Apply `changes` to `record` as the next version; return the new record.

        Raises:
            Conflict: it is gone or has moved on. And as `MetaBackend.update`.
        """
        return await self.meta.update(
            record.path, {**changes, "version": record.version + 1}, expect=record.revision, lease=lease
        )

    async def publish(
        self, record: MetaRecord, changes: Mapping[str, Any], *, lease: float | Unchanged | None = None
    ) -> MetaRecord:
        """Make `record` ``stored`` with `changes`; a lost answer is settled by reading the record."""
        wanted = {**changes, "state": STORED}
        try:
            return await self.change(record, wanted, lease=lease)
        except StorageError as error:
            if not error.outcome_unknown and not isinstance(error, Conflict):
                raise
            # A conflict too may be the echo of our own statement, sent again by a driver.
            try:
                current = await self.meta.get(wanted.get("path", record.path))
            except StorageError:
                raise error from None
            ours = current.token == record.token and current.version == record.version + 1 and current.state == STORED
            if ours and current.original_storage_path == wanted["original_storage_path"]:
                return current
            raise

    @property
    def longest(self) -> float:
        """Seconds after which a place may be dealt with whatever anybody is at."""
        return max(self.settle, self.lease, self.keep_replaced)

    def lease_for(self, places: Iterable[Place], *, now: float | None = None) -> float | None:
        """Return the lease, in seconds, that a stored record needs for its further `places`; never a shorter one
        than somebody who named one of them counts on. `now`, by the database's clock and no later than it is: where
        that is known, and every place says when it is due, the lease ends when the first of them is."""
        waiting = [place for place in places if place.state != "good"]
        if not waiting:
            return None
        dues = [place.due for place in waiting if place.due is not None]
        if now is not None and len(dues) == len(waiting):
            return max(min(dues) - now, 0.0) + _ROUNDING
        states = {place.state for place in waiting}
        if "settling" in states or any(place.state == "surplus" and place.due is None for place in waiting):
            return self.longest  # somebody may be at its removal
        if "doubtful" in states:
            return max(self.lease, self.keep_replaced)
        return self.keep_replaced or self.longest

    # -- J4: the one way to remove

    async def mark(self, record: MetaRecord, *, lease: float | None = None) -> Marked:
        """Take `record` out of sight, and its lease: from here on it can only be removed.

        Raises:
            Conflict: it is gone or has moved on; nothing may be removed then.
        """
        seconds = self.lease if lease is None else lease
        until = elapsed() + seconds  # from before the statement was sent
        places = record.all_places()
        if len(places) == 1 and places[0].state == "good":
            places = ()  # what an empty list means in a deleting record
        return Marked(await self.change(record, {"state": DELETING, "places": places}, lease=seconds), until)

    async def sweep(self, marked: Marked, *, certain: bool | None = None, force: bool = False) -> str:
        """Discard the bytes of a record that this caller has marked, then the record; return ``"gone"``,
        ``"settling"``, ``"failed"`` (said in the log) or ``"moved on"``, as `finish`.

        `certain`: nobody else's operation, nor a lost one of ours, can still land on its places. By default that is
        so when all are good; on a surplus one somebody's discard may be under way. Otherwise the record stays until
        `settle` is over (`force`: it is): under another path, where nothing could make it a file again.

        Raises:
            Conflict: it has moved on, and has not only stepped aside; or the database refuses to let it go.
        """
        record = marked.record
        places = record.all_places()
        if certain is None:
            certain = all(place.state == "good" for place in places)
        settled = force or all(place.state == "settling" for place in places)
        if not await self.discard(places, record, until=marked.until, careful=force):
            return "failed"  # the lease runs out and reconcile tries again
        if certain or settled:
            try:
                await self.meta.delete(record.path, expect=record.revision)
            except Conflict as error:
                if not error.retryable:  # a rule of the database's, which it would break again
                    raise
                if (aside := await self._find_aside(record, record.primary)) is None:
                    return "moved on"
                try:
                    await self.meta.delete(aside.path, expect=aside.revision)
                except Conflict:
                    return "moved on"
            return "gone"
        changes = {"places": _as_settling(places)}
        elsewhere = {"path": self._other_path(record.path)} if _was_committed(record) else {}
        try:
            await self.change(record, {**changes, **elsewhere}, lease=self.settle)
        except Conflict:
            if (aside := await self._find_aside(record, record.primary)) is None:
                raise
            await self.change(aside, changes, lease=self.settle)
        return "settling"

    async def _find_aside(self, record: MetaRecord, place: Place) -> MetaRecord | None:
        """Return what `record`, which names `place`, has become, if it has only stepped aside since it was marked."""
        owners = (await self.meta.owners(place.original, [place.key])).get(place.key, ())
        for found in await self.meta.get_many([owner for owner in owners if owner != record.path]):
            if found and found.revision == (record.token, record.version + 1) and found.state == DELETING:
                return found
        return None

    async def step_aside(self, record: MetaRecord) -> bool:
        """Let a file that is being deleted give its path up to a new one; return whether the path may be free now.

        Its record goes on under another path, and still names its keys, so that nobody else gets them; whoever is at
        its removal finds it changed and leaves it, or follows. Only that of a file that was committed, by statements
        that were answered: a reservation that lands once more, and a commit, would make an undone save a file again,
        under a path that is another's. A replacement may be under way: its keys are new, and stay named.

        Raises:
            As `MetaBackend.update`.
        """
        if record.state != DELETING or not _was_committed(record):
            return False
        with contextlib.suppress(Conflict):
            await self.change(record, {"path": self._other_path(record.path)})
        return True

    def _other_path(self, path: str) -> str:
        """Return a free path that is no longer than `path`, which has fitted into its column; or else a short one."""
        try:
            return alternative(path, max_length=max(len(path), _SHORT), max_bytes=self._max_path_bytes)
        except InvalidPath:  # all of it is directories
            return new_token()

    async def discard(
        self, places: Iterable[Place], record: MetaRecord, *, until: float | None = None, careful: bool = False
    ) -> bool:
        """Discard the bytes at `places`; return whether all are known to be gone. Failures are logged.

        Where a write of ours may have been kept out by somebody else's file, only what carries our token goes, and
        nothing that another record names. `until`: when our lease ends, by `timeouts.elapsed`; a process that was
        stopped or asleep for so long starts nothing more, because the keys may be somebody else's by now. `careful`:
        the records may be older than the bytes, and what carries another token stays at every place, not gone.
        """
        gone = True
        for place in places:
            if until is not None and elapsed() >= until:
                return False
            token = None if place.state in _CERTAIN else record.token
            if token is not None and await self._is_anothers(place, record):
                continue
            original = self._original(place.original)
            try:
                if careful and token is None and await _has_another_token(original, place.key, record.token):
                    gone = False
                    _log.warning(
                        "%s:%s stays, although %r names it: it carries the token of another save. Where the records "
                        "come out of a backup, reconcile(restored=True) lets go of it; where the bytes were adopted, "
                        "reconcile without force removes them",
                        place.original, place.key, record.path,
                    )  # fmt: skip
                    continue
                await original.discard(place.key, token=token, durable=self._durable)
            except StorageError as error:
                gone = False
                _log.warning(
                    "the bytes of %r at %s:%s could not be removed yet; reconcile will: %s",
                    record.path, place.original, place.key, error,
                )  # fmt: skip
        return gone

    async def undo(self, record: MetaRecord, *, certain: bool) -> None:
        """Take back a save whose last known record is `record`. `certain`: none of its writes can still land.

        Touches nothing if the save was committed after all; if the reservation was taken away or never came to be,
        only bytes that carry its token go.
        """
        try:
            marked = await self.mark(record)
        except Conflict:
            try:
                current = await self.meta.get(record.path)
            except NotFound:
                current = None
            if current is not None and current.token == record.token:
                if current.state == STORED:
                    return  # the commit had landed; only its answer was lost
                if current.state == PENDING:
                    # A statement of ours that landed without an answer (a new key, a lease) moved the version on.
                    await self.sweep(await self.mark(current), certain=False)
                    return
            await self.discard([replace(place, state="doubtful") for place in record.all_places()], record)
            return
        await self.sweep(marked, certain=certain)

    async def _is_anothers(self, place: Place, record: MetaRecord) -> bool:
        """Return whether another file's record names `place`: one of another path, because ours may have been committed
        and then renamed; or, where the original cannot tell by our token what is ours, a later file of our path."""
        owners = (await self.meta.owners(place.original, [place.key])).get(place.key, ())
        if any(owner != record.path for owner in owners):
            # What has only stepped aside since we have marked it is no other.
            aside = await self._find_aside(record, place) if record.state == DELETING else None
            return aside is None or list(owners) != [aside.path]
        if not owners or self._original(place.original).capabilities.tokens:
            return False
        try:
            return (await self.meta.get(record.path)).token != record.token
        except NotFound:
            return False

    # -- J7: what reconcile does with one record whose lease has run out

    async def finish(self, record: MetaRecord, *, force: bool = False, early: bool = False) -> str:
        """Do what is left to do for `record`, whose lease has run out; return in a word what was done.

        ``"undone"`` a save, ``"deleted"``, ``"cleared"`` places of a stored file, ``"settling"`` (again after
        `settle`), ``"failed"`` (an original could not be reached, or with `force` has bytes of another save),
        ``"moved on"`` (somebody else was first).
        `force`: nothing else is alive, so that leases and settle times count as over. `early`: replaced bytes are not
        kept until they are due.

        Raises:
            Conflict: the database refuses the change. And as `MetaBackend.update`.
        """
        try:
            if record.state == STORED:
                return await self._clear(record, force=force, early=early)
            verb = "undone" if record.state == PENDING else "deleted"
            # For `settle`, not for a lease: should this reconcile stop amid its discards, the next one has to wait
            # as long for them as for anybody else's.
            marked = await self.mark(record, lease=max(self.settle, self.lease))
            done = await self.sweep(marked, certain=False, force=force)
            return verb if done == "gone" else done
        except (Conflict, NotFound) as error:
            if isinstance(error, Conflict) and not error.retryable:
                raise  # a rule of the database's, which it would break again
            return "moved on"

    async def forget(self, record: MetaRecord) -> str:
        """End what is left to do for `record`, which came out of a backup, without removing any bytes; return in a word
        what was done, as `finish`. Only while nothing else is alive: its places are not named any more."""
        try:
            if record.state == STORED:
                kept = tuple(place for place in record.good_places() if place is not record.primary)
                await self.change(record, {"places": kept}, lease=None)
                return "cleared"
            await self.meta.delete(record.path, expect=record.revision)
            return "undone" if record.state == PENDING else "deleted"
        except (Conflict, NotFound):
            return "moved on"

    async def _clear(self, record: MetaRecord, *, force: bool, early: bool, now: float = 0.0) -> str:
        primary = record.primary
        others = [place for place in record.places if place is not primary]
        kept = tuple(place for place in others if place.state == "good")
        wanted_gone = [place for place in others if place.state != "good"]
        doubtful = [place for place in wanted_gone if place.state == "doubtful"]
        if doubtful and not force:
            # First the mark: from here on, the replace that named them can no longer swap them in.
            rest = [place for place in others if place.state != "doubtful"]
            places = (*rest, *_as_settling(doubtful))
            record = await self.change(record, {"places": places}, lease=self.lease_for(places))
            return "settling" if await self.discard(doubtful, record) else "failed"
        # Moving the version takes the lease: two reconciles do not discard side by side, and with `force` the
        # replace that named a doubtful place loses it.
        over = math.inf if force or early or record.lease is None else max(record.lease.timestamp(), now)
        later = tuple(place for place in wanted_gone if place.due is not None and place.due > over)
        # Until when we are at it says the lease, and not a time of their own.
        due = tuple(replace(place, due=None) for place in wanted_gone if place not in later)
        seconds, since = self.longest, elapsed()
        record = await self.change(record, {"places": (*kept, *due, *later)}, lease=seconds)
        until = since + seconds
        failed = tuple([place for place in due if not await self.discard([place], record, until=until, careful=force)])
        if failed:
            if failed != due:  # an original that refuses keeps no name in another one
                await self.change(record, {"places": (*kept, *failed, *later)})
            return "failed"
        now = 0.0 if record.lease is None else record.lease.timestamp() - seconds
        left = (*kept, *later)
        record = await self.change(record, {"places": left}, lease=self.lease_for(left, now=now))
        if any(place.due is not None and place.due <= now for place in later):
            # That the first was due is all that was known before; now we know what time it is.
            return await self._clear(record, force=force, early=early, now=now)
        return "cleared"

    async def doubt_removal(self, record: MetaRecord) -> None:
        """Note that a removal of replaced bytes may still be under way, so that their key is not used again before
        `settle` is over. From here on only what carries the token of `record` is removed there."""
        others = [place for place in record.places if place.state != "surplus"]
        places = (*others, *_as_settling(place for place in record.places if place.state == "surplus"))
        with contextlib.suppress(Conflict):
            await self.change(record, {"places": places}, lease=self.lease_for(places))


async def _has_another_token(original: Backend, key: str, token: str) -> bool:
    if not original.capabilities.tokens:
        return False
    try:
        return (await original.stat(key)).token not in (None, token)
    except NotFound:
        return False


def _was_committed(record: MetaRecord) -> bool:
    """Return whether a record that is being deleted was one of a stored file, whose bytes were not discarded yet."""
    return record.primary.state in _CERTAIN


def _as_settling(places: Iterable[Place]) -> tuple[Place, ...]:
    return tuple(replace(place, state="settling", due=None) for place in places)
