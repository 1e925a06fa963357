"""How an existing file gets other bytes (J6): replaced, moved, copied further; and what all that writes shares."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

from .attempts import Attempts, Job, Placed, Try
from .errors import Conflict, ContentError, NotFound, StorageError, outcome_unknown
from .leases import DatabaseTime
from .paths import alternative, new_token, token_key
from .records import STORED, MetaRecord, Place
from .timeouts import elapsed
from .writes import Transfer, Write

if TYPE_CHECKING:
    from .proxy import ProxyStorage

__all__ = ["Swapping", "no_lease"]

_log = logging.getLogger(__name__)

_MAX_RETRIES = 20  # compare-and-sets lost in a row to others who changed the same record


class Swapping:
    """The side of one storage that swaps bytes. Keeps no state of its own."""

    def __init__(self, storage: ProxyStorage) -> None:
        self._storage = storage
        self._attempts = Attempts(storage)

    # -- J6: new bytes for an existing file

    async def swap(
        self,
        record: MetaRecord,
        candidates: Sequence[str],
        write: Write,
        *,
        pinned: bool,
        forced: bool = False,
        same_bytes: bool = False,
        key: str | None = None,
    ) -> MetaRecord:
        """Write under new keys and make them the file's; the old bytes stay for `keep_replaced` seconds.

        `pinned`: only `record` as it is may be replaced; otherwise whatever it has become, while it is there.
        `key`: one that no other record names, instead of a new one.
        `same_bytes`: they are only moved, so that further copies stay what they are.
        """
        storage, journal = self._storage, self._storage.journal
        self._attempts.check_any(candidates, forced=forced)
        self._check_replayable(write, candidates)
        new = [Place(name, key or self._token_key(record.path, new_token(), name), "doubtful") for name in candidates]
        for place in new:
            storage.get_original(place.original).check_key(place.key)
        since = elapsed()
        named = await self._with_latest(record, pinned, lambda now: {"places": (*now.places, *new)})
        clock = DatabaseTime.of(named, journal.lease_for(named.places), since)
        made: list[Place] = []  # what this swap makes surplus
        with journal.leases.hold(named, since=since, follow=not pinned) as held:
            # No lease is asked for before each write: the keys are new, and can never be another's.
            job = Job(write, named.token, no_lease, forced=forced)
            try:
                placed = await self._attempts.place(job, new)
                fields, _ = self._placed(placed, job.unsure)

                def swapped(now: MetaRecord) -> dict[str, Any]:
                    if not set(new) <= set(now.places):  # reconcile took them for abandoned
                        raise Conflict(f"the replacement of {now.path!r} took longer than its lease", path=now.path)
                    gone = {(place.original, place.key) for place in new}
                    # The same key in another original is another place.
                    others = [at for at in now.places if (at.original, at.key) not in gone and at != now.primary]
                    stale = [at for at in others if at.state == "good" and not same_bytes]
                    made[:] = (replace(at, state="surplus", due=kept_until(0)) for at in (now.primary, *stale))
                    waiting = (self._dated(at, kept_until(journal.longest)) for at in others if at not in stale)
                    return {**fields, "places": (*made, *waiting, *fields["places"])}

                def kept_until(at_least: float) -> float | None:
                    # Where nothing is kept, we are at its removal at once; others wait for that as for anything.
                    seconds = max(storage.keep_replaced or journal.longest, at_least)
                    return None if clock is None else clock.latest() + seconds

                until = elapsed() + max(journal.settle, journal.lease)
                stored = await self._with_latest(held.record, pinned, swapped, clock)
            except BaseException as error:
                # Of a lost swap every place is doubtful; else those are certain that the attempts were sure of.
                unsure = new if outcome_unknown(error) else job.unsure
                await self._undo(write, self._take_back(held.record, new, unsure), "undo of a replacement", error)
                raise
        self._clear_losers(stored, job)
        await self._release_after_commit(write)
        if storage.keep_replaced <= 0:
            stored = await self._drop_after_commit(stored, made, until, clock)
        return stored

    @staticmethod
    def _dated(place: Place, due: float | None) -> Place:
        """Return `place` with a time of its own, so that its removal does not wait for the last of many replacements.

        Not a doubtful one: until when its writer is alive says the lease."""
        return place if place.state in ("good", "doubtful") or place.due is not None else replace(place, due=due)

    async def make_primary(self, record: MetaRecord, place: Place) -> MetaRecord:
        """Let reads and URLs of `record` go to `place`, one of its good ones; the former one becomes surplus, where
        one copy is wanted."""
        former = replace(record.primary, state="good" if self._storage.placement.limits.copies > 1 else "surplus")
        others = (other for other in record.places if other not in (place, record.primary))
        places = (former, *others)
        changes = {"original_storage_name": place.original, "original_storage_path": place.key, "places": places}
        journal = self._storage.journal
        return await journal.change(record, changes, lease=journal.lease_for(places))

    async def add_copy(self, record: MetaRecord, original: str, write: Transfer) -> MetaRecord:
        """Give a stored file one more copy, in `original`, by a `write` of its bytes; return the new record.

        The copy counts when it is whole and has the recorded checksum.

        Raises:
            IntegrityError: what was read is not the file. Conflict: it was changed meanwhile. And as `save`; what is
            ``write.failure`` is the fault of where the bytes are read.
        """
        journal = self._storage.journal
        new = Place(original, self._token_key(record.path, new_token(), original), "doubtful")
        since = elapsed()
        named = await self._with_latest(record, True, lambda now: {"places": (*now.places, new)})
        with journal.leases.hold(named, since=since) as held:
            job = Job(write, named.token, held.check, forced=True)
            try:
                await self._attempts.attempt(job, Try(new))

                def with_copy(now: MetaRecord) -> dict[str, Any]:
                    return {"places": tuple(replace(at, state="good") if at == new else at for at in now.places)}

                return await self._with_latest(held.record, True, with_copy)
            except BaseException as error:
                unsure = [new] if outcome_unknown(error) else job.unsure
                await self._finish(self._take_back(held.record, [new], unsure), "undo of a copy")
                raise

    async def _with_latest(
        self,
        record: MetaRecord,
        pinned: bool,
        change: Callable[[MetaRecord], dict[str, Any]],
        clock: DatabaseTime | None = None,
    ) -> MetaRecord:
        """Compare-and-set `record`; unless `pinned`, what others have made of it meanwhile.

        A conflict is also how the echo of our own statement looks, sent again by a driver after a lost connection,
        so what is there already is accepted.
        """
        journal = self._storage.journal
        for _ in range(_MAX_RETRIES):
            changes = change(record)
            lease = journal.lease_for(changes["places"], now=None if clock is None else clock.earliest())
            try:
                return await journal.change(record, changes, lease=lease)
            except StorageError as error:
                # A rule of the database's would refuse it again, whatever the record has become.
                if not error.outcome_unknown and not (isinstance(error, Conflict) and error.retryable):
                    raise
                lost = error
            try:
                current = await journal.meta.get(record.path)
            except StorageError:
                raise lost from None  # gone, or not to be settled: what is unknown of the change stays unknown
            ours = current.token == record.token and current.state == STORED
            if ours and current.version == record.version + 1 and current.places == changes["places"]:
                return current
            if not ours or pinned or not isinstance(lost, Conflict):
                raise lost
            record = current
        raise Conflict(f"{record.path!r} is changed by others faster than it can be replaced", path=record.path)

    async def _take_back(self, record: MetaRecord, new: Sequence[Place], unsure: Sequence[Place]) -> None:
        """Undo a replacement: first its places are given up by compare-and-set, so that a swap whose answer was lost
        cannot take effect any more; then the bytes go, then their names leave the record."""
        journal = self._storage.journal
        settling = tuple(replace(place, state="settling") for place in new)
        at, given_up = {(place.original, place.key) for place in new}, False
        for _ in range(_MAX_RETRIES):
            try:
                current = await journal.meta.get(record.path)
            except NotFound:
                current = None
            if current is None or current.token != record.token or current.state != STORED:
                await journal.discard(new, record)  # deleted, or renamed: then only if nobody names it
                return
            if any(replace(place, state="good") in current.good_places() for place in new):
                return  # swapped in after all
            # Another replacement may have dated what we have given up.
            ours = [place for place in current.places if (place.original, place.key) in at]
            if not any(place.state == ("settling" if given_up else "doubtful") for place in ours):
                if not given_up:  # but reconcile has
                    await journal.discard(new, record)
                return
            others = tuple(other for other in current.places if other not in ours)
            try:
                if not given_up:
                    places = (*others, *settling)
                    current = await journal.change(current, {"places": places}, lease=journal.lease_for(places))
                    given_up = True  # whatever becomes of the rest of the record now, these are ours to forget
                    if not await journal.discard(new, record) or len(unsure) == len(new):
                        return  # the lease runs out, and reconcile discards it again
                left = (*others, *(replace(place, state="settling") for place in unsure))
                await journal.change(current, {"places": left}, lease=journal.lease_for(left))
                return
            except Conflict as error:
                if not error.retryable:
                    raise

    async def _drop_after_commit(
        self, record: MetaRecord, surplus: Sequence[Place], until: float, clock: DatabaseTime | None
    ) -> MetaRecord:
        """Discard the old bytes now; in a caller's transaction when it commits, for it may be rolled back (J8)."""
        latest = record

        async def drop() -> None:
            nonlocal latest
            latest = await self._drop(record, surplus, until, clock)

        await self._storage.meta.after_commit(drop)
        return latest

    async def _drop(
        self, record: MetaRecord, surplus: Sequence[Place], until: float, clock: DatabaseTime | None
    ) -> MetaRecord:
        # Not what was surplus before: a discard of it may be without an answer, and not be over.
        journal = self._storage.journal
        others = tuple(place for place in record.places if place not in surplus)
        try:
            if await journal.discard(surplus, record, until=until):
                lease = journal.lease_for(others, now=None if clock is None else clock.earliest())
                return await journal.change(record, {"places": others}, lease=lease)
        except StorageError:
            pass  # it stays named: reconcile does it
        return record

    # -- what the attempts have come to

    def _placed(self, placed: Placed, unsure: Sequence[Place]) -> tuple[dict[str, Any], float | None]:
        """Return the changes that make a record one of a file that is whole at `placed`, and its lease."""
        first, *copies = (replace(place, state="good") for place in placed.good)
        changes = {
            "original_storage_name": first.original,
            "original_storage_path": first.key,
            "places": (*copies, *unsure),
            **placed.written.fields(),
        }
        return changes, self._storage.journal.lease_for(unsure)

    def _clear_losers(self, record: MetaRecord, job: Job) -> None:
        if job.losers:
            work = self._forget_losers(record, job.losers)
            name = f"removal of what lost the race for {record.path!r}"
            self._storage.cleanup.start(work, name=name, context=self._storage.meta._later())

    async def _forget_losers(self, record: MetaRecord, losers: Sequence[tuple[asyncio.Task[Any], Try]]) -> None:
        """Remove what attempts that were left behind have written, as far as it is known that nothing more comes.

        The rest stays named as doubtful, for `tidy` and reconcile.
        """
        journal = self._storage.journal
        await asyncio.wait([task for task, _ in losers], timeout=self._storage.timeouts.cleanup)
        places = [one.place for task, one in losers if task.done() and one.certain]
        if not places or not await journal.discard(places, record):
            return
        for _ in range(_MAX_RETRIES):
            rest = tuple(place for place in record.places if place not in places)
            try:
                await journal.change(record, {"places": rest}, lease=journal.lease_for(rest))
                return
            except Conflict:
                try:
                    current = await journal.meta.get(record.path)
                except NotFound:
                    return
                if current.token != record.token or current.state != STORED:
                    return  # whoever has deleted it removes these places too
                record = current

    # -- shared

    async def _finish(self, work: Any, name: str) -> None:
        storage = self._storage
        await storage.cleanup.finish(work, within=storage.timeouts.cleanup, name=name, context=storage.meta._later())

    async def _undo(self, write: Write, work: Awaitable[None], name: str, error: BaseException) -> None:
        """Do `work`, which removes what was written, and then give the caller's file back that was a part of it.

        After an `error` that leaves open whether the record is stored, `work` may leave all as it is.
        """
        unknown = outcome_unknown(error) or isinstance(error, Conflict)  # which may be the echo of our own statement
        taken, write.source.taken = write.source.taken, None

        async def undone() -> None:
            try:
                await work
            finally:
                if taken is not None:
                    await (taken.settle() if unknown else taken.give_back())

        await self._finish(undone(), name)

    async def _let_go(self, write: Write) -> None:
        """Leave the caller's name to a file of his that may be a stored one by now, which nobody knows."""
        taken, write.source.taken = write.source.taken, None
        if taken is not None:
            await self._finish(taken.settle(), "end of an upload")

    async def _release(self, write: Write) -> None:
        """Take the caller's name away from a file of his that is a stored one by now."""
        taken, write.source.taken = write.source.taken, None
        if taken is not None:
            await self._finish(taken.release(), "release of an upload")

    async def _release_after_commit(self, write: Write) -> None:
        """`_release`; in a caller's transaction when it commits: after a rollback the file is still his (J8)."""
        if write.source.taken is not None:
            try:
                await self._storage.meta.after_commit(partial(self._release, write))
            except StorageError as error:
                _log.warning("a stored upload keeps its second name: %s", error)
                await self._let_go(write)

    def _check_replayable(self, write: Write, candidates: Sequence[str]) -> None:
        if len(candidates) > 1 and self._storage.placement.limits.copies == 1 and not write.source.replayable:
            raise ContentError(
                "the content can be read only once and must not be kept (spool_bytes=None), so there is nothing for "
                "a second original; hand over bytes, a path or a file that can seek, or name one with using="
            )

    def _key(self, path: str, token: str, original: str, keys: str) -> str:
        if keys == "token":
            return self._token_key(path, token, original)
        return path[len(self._storage.prefix) :]

    def _token_key(self, path: str, token: str, original: str) -> str:
        capabilities = self._storage.get_original(original).capabilities
        return token_key(
            path.removeprefix(self._storage.prefix),
            token,
            max_bytes=capabilities.max_key_bytes,
            max_segment_bytes=capabilities.max_segment_bytes,
        )

    def next_name(self, path: str, candidates: Sequence[str], max_length: int | None) -> str:
        """Return the next name to try for `path`, legal for all `candidates`."""
        max_bytes, max_segment_bytes = self._limits(candidates)
        return alternative(path, max_length=max_length, max_bytes=max_bytes, max_segment_bytes=max_segment_bytes)

    def fitting(self, path: str, candidates: Sequence[str], max_length: int | None) -> str:
        """Return `path`, or where that is too long, or its last part is, the name that would be tried next."""
        max_bytes, max_segment_bytes = self._limits(candidates)
        last = path[path.rfind("/") + 1 :]
        if (
            len(path.encode()) <= max_bytes
            and (max_segment_bytes is None or len(last.encode()) <= max_segment_bytes)
            and (max_length is None or len(path) <= max_length)
        ):
            return path
        return self.next_name(path, candidates, max_length)

    def _limits(self, candidates: Sequence[str]) -> tuple[int, int | None]:
        """Return how many bytes a path may have, and one part of it, for its key to be legal for all `candidates`."""
        all_of_them = [self._storage.get_original(name).capabilities for name in candidates]
        segments = [one.max_segment_bytes for one in all_of_them if one.max_segment_bytes is not None]
        longest = min(one.max_key_bytes for one in all_of_them) + len(self._storage.prefix.encode())
        return min(self._storage.max_path_bytes, longest), min(segments, default=None)


def no_lease() -> None:
    """Stand in for the check of a lease where there is none that matters."""
