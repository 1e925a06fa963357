"""Does the suite notice? Each mutant breaks one promise of a meta-backend that keeps all; the named test must fail."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import pytest

from aproxy_storage.errors import AlreadyExists, NotFound, StorageError
from aproxy_storage.meta_backends.base import UNCHANGED, Unchanged
from aproxy_storage.meta_backends.memory import MemoryMetaBackend
from aproxy_storage.records import STORED, CommonPrefix, MetaRecord, Revision, State
from tests.meta_backends.test_memory import InMemory

Mutant = type[MemoryMetaBackend]
MUTANTS: list[tuple[str, Mutant]] = []

Changes = Mapping[str, Any]
Lease = float | Unchanged | None


def caught_by(*tests: str) -> Callable[[Mutant], Mutant]:
    """Name the tests of the suite that must fail for the class below."""

    def register(mutant: Mutant) -> Mutant:
        MUTANTS.extend((test, mutant) for test in tests)
        return mutant

    return register


def run(test: str, mutant: Mutant) -> None:
    async def main() -> None:
        await asyncio.wait_for(getattr(InMemory(), test)(mutant()), 60)

    asyncio.run(main())


# -- create, reserve


@caught_by("test_create_keeps_the_first_on_a_taken_path", "test_create_has_one_winner_among_200_tasks")
class CreateOverwrites(MemoryMetaBackend):
    async def _create(self, record: MetaRecord, lease: float | None) -> MetaRecord:
        self._rows.pop(record.path, None)
        self._paths = [path for path in self._paths if path != record.path]
        return await super()._create(record, lease)


@caught_by("test_create_has_one_winner_among_200_tasks")
class LooksBeforeItLeaps(MemoryMetaBackend):
    async def _create(self, record: MetaRecord, lease: float | None) -> MetaRecord:
        if record.path in self._rows:
            raise AlreadyExists(path=record.path)
        await asyncio.sleep(0)
        if record.path in self._rows:
            self._drop(self._rows[record.path])
        return await super()._create(record, lease)


@caught_by("test_create_again_with_the_own_token_succeeds", "test_create_many_answers_each")
class OwnTokenIsAConflict(MemoryMetaBackend):
    async def _create(self, record: MetaRecord, lease: float | None) -> MetaRecord:
        if record.path in self._rows:
            raise AlreadyExists(path=record.path)
        return await super()._create(record, lease)


@caught_by("test_create_again_with_the_own_token_succeeds")
class OwnTokenInsertsAgain(MemoryMetaBackend):
    async def _create(self, record: MetaRecord, lease: float | None) -> MetaRecord:
        row = self._rows.get(record.path)
        if row is not None and row[5] == record.token:
            self._drop(row)
        return await super()._create(record, lease)


@caught_by("test_an_empty_token_is_nobodys")
class EmptyTokenIsOurs(MemoryMetaBackend):
    async def _create(self, record: MetaRecord, lease: float | None) -> MetaRecord:
        row = self._rows.get(record.path)
        if row is not None and row[5] == record.token:
            return await self.get(record.path)
        return await super()._create(record, lease)


@caught_by("test_create_returns_what_get_returns")
class CreateReturnsTheArgument(MemoryMetaBackend):
    async def _create(self, record: MetaRecord, lease: float | None) -> MetaRecord:
        await super()._create(record, lease)
        return record


@caught_by("test_create_returns_what_get_returns")
class LosesPlaces(MemoryMetaBackend):
    async def _create(self, record: MetaRecord, lease: float | None) -> MetaRecord:
        return await super()._create(replace(record, places=()), lease)


@caught_by("test_create_fills_in_the_times_of_now_in_utc")
class NaiveTimes(MemoryMetaBackend):
    async def _create(self, record: MetaRecord, lease: float | None) -> MetaRecord:
        stored = await super()._create(record, lease)
        return replace(stored, created_at=stored.created_at and stored.created_at.replace(tzinfo=None))


@caught_by("test_paths_that_differ_in_case_or_normal_form_are_two", "test_exists_filters")
class FoldsCase(MemoryMetaBackend):
    async def _create(self, record: MetaRecord, lease: float | None) -> MetaRecord:
        return await super()._create(replace(record, path=record.path.lower()), lease)

    async def _get(self, path: str) -> MetaRecord | None:
        return await super()._get(path.lower())

    async def _exists(self, path: str, state: State | None, proxy_storage_name: str | None) -> bool:
        return await super()._exists(path.lower(), state, proxy_storage_name)


@caught_by("test_long_and_awkward_paths")
class CutsPathsAt255(MemoryMetaBackend):
    async def _create(self, record: MetaRecord, lease: float | None) -> MetaRecord:
        return await super()._create(replace(record, path=record.path[:255]), lease)


@caught_by("test_text_that_cannot_be_encoded")
class NativeEncodingErrors(MemoryMetaBackend):
    async def create(self, record: MetaRecord, *, lease: float | None = None) -> MetaRecord:
        record.path.encode()
        return await super().create(record, lease=lease)


@caught_by("test_lookups_take_any_text")
class LookupsEncode(MemoryMetaBackend):
    async def _exists(self, path: str, state: State | None, proxy_storage_name: str | None) -> bool:
        path.encode()
        return await super()._exists(path, state, proxy_storage_name)


@caught_by("test_reserve_is_seen_at_once")
class ReservesNothing(MemoryMetaBackend):
    async def _reserve(self, record: MetaRecord, lease: float, spare: MetaRecord) -> MetaRecord | None:
        return None


@caught_by("test_reserve_leaves_keys_that_others_name")
class NeverSpares(MemoryMetaBackend):
    async def _reserve(self, record: MetaRecord, lease: float, spare: MetaRecord) -> MetaRecord | None:
        return await self._create(record, lease)


@caught_by("test_reserve_is_seen_at_once", "test_reserve_leaves_keys_that_others_name")
class AlwaysSpares(MemoryMetaBackend):
    async def _reserve(self, record: MetaRecord, lease: float, spare: MetaRecord) -> MetaRecord | None:
        return await self._create(spare, lease)


@caught_by("test_reserve_leaves_keys_that_others_name")
class SparesByPrimaryPlacesOnly(MemoryMetaBackend):
    async def _reserve(self, record: MetaRecord, lease: float, spare: MetaRecord) -> MetaRecord | None:
        taken = any(row[3] == record.original_storage_path and row[0] != record.path for row in self._rows.values())
        return await self._create(spare if taken else record, lease)


# -- get, exists


@caught_by("test_get_of_nothing")
class MakesRecordsUp(MemoryMetaBackend):
    async def _get(self, path: str) -> MetaRecord | None:
        return await super()._get(path) or MetaRecord(path)


@caught_by("test_exists_filters")
class ExistsIgnoresState(MemoryMetaBackend):
    async def _exists(self, path: str, state: State | None, proxy_storage_name: str | None) -> bool:
        return await super()._exists(path, None, proxy_storage_name)


@caught_by("test_exists_filters")
class ExistsIgnoresTheStorage(MemoryMetaBackend):
    async def _exists(self, path: str, state: State | None, proxy_storage_name: str | None) -> bool:
        return await super()._exists(path, state, None)


@caught_by("test_exists_filters")
class TakesAnEmptyNameForNone(MemoryMetaBackend):
    async def _exists(self, path: str, state: State | None, proxy_storage_name: str | None) -> bool:
        return await super()._exists(path, state, proxy_storage_name or None)


@caught_by("test_rows_of_other_programs")
class FiltersMissStateless(MemoryMetaBackend):
    async def _page(self, *arguments: Any) -> Sequence[MetaRecord]:
        return [record for record in await super()._page(*arguments) if record.token or arguments[5] is None]


# -- update


class UpdateBase(MemoryMetaBackend):
    def seen(self, path: str, expect: Revision | None) -> Revision | None:
        raise NotImplementedError

    async def _update(self, path: str, changes: Changes, expect: Revision | None, lease: Lease) -> MetaRecord:
        return await super()._update(path, changes, self.seen(path, expect), lease)

    async def _delete(self, path: str, expect: Revision | None) -> bool:
        return await super()._delete(path, self.seen(path, expect))


@caught_by(
    "test_update_compares_the_token", "test_update_has_one_winner_per_version", "test_delete_compares_token_and_version"
)
class IgnoresExpect(UpdateBase):
    def seen(self, path: str, expect: Revision | None) -> Revision | None:
        return None if path in self._rows else expect


@caught_by("test_update_compares_the_token", "test_delete_compares_token_and_version")
class ComparesTheVersionOnly(UpdateBase):
    def seen(self, path: str, expect: Revision | None) -> Revision | None:
        row = self._rows.get(path)
        return expect._replace(token=row[5]) if row and expect else expect


@caught_by("test_update_compares_the_version", "test_delete_compares_token_and_version")
class ComparesTheTokenOnly(UpdateBase):
    def seen(self, path: str, expect: Revision | None) -> Revision | None:
        row = self._rows.get(path)
        return expect._replace(version=row[6]) if row and expect else expect


@caught_by("test_update_compares_the_version")
class AcceptsLaterVersions(UpdateBase):
    def seen(self, path: str, expect: Revision | None) -> Revision | None:
        row = self._rows.get(path)
        return expect._replace(version=row[6]) if row and expect and row[6] >= expect.version else expect


@caught_by("test_update_of_what_is_gone")
class GoneIsNotFoundEvenWithExpect(MemoryMetaBackend):
    async def _update(self, path: str, changes: Changes, expect: Revision | None, lease: Lease) -> MetaRecord:
        if path not in self._rows:
            raise NotFound(f"no {path!r}", path=path)
        return await super()._update(path, changes, expect, lease)


@caught_by("test_update_of_what_is_gone")
class Upserts(MemoryMetaBackend):
    async def _update(self, path: str, changes: Changes, expect: Revision | None, lease: Lease) -> MetaRecord:
        if path not in self._rows:
            await self._create(MetaRecord(path), None)
        return await super()._update(path, changes, expect, lease)


@caught_by("test_update_returns_the_new_record")
class UpdateReturnsTheOldRecord(MemoryMetaBackend):
    async def _update(self, path: str, changes: Changes, expect: Revision | None, lease: Lease) -> MetaRecord:
        old = await self._get(path)
        new = await super()._update(path, changes, expect, lease)
        return old or new


@caught_by("test_update_touches_only_what_it_names", "test_leases")
class UpdateEndsTheLease(MemoryMetaBackend):
    async def _update(self, path: str, changes: Changes, expect: Revision | None, lease: Lease) -> MetaRecord:
        return await super()._update(path, changes, expect, None if isinstance(lease, Unchanged) else lease)


@caught_by("test_leases", "test_unfinished_are_those_whose_lease_is_over")
class UpdateNeverMovesTheLease(MemoryMetaBackend):
    async def _update(self, path: str, changes: Changes, expect: Revision | None, lease: Lease) -> MetaRecord:
        return await super()._update(path, changes, expect, UNCHANGED)


@caught_by("test_update_moves_the_path")
class MovingKeepsTheOldPath(MemoryMetaBackend):
    async def _update(self, path: str, changes: Changes, expect: Revision | None, lease: Lease) -> MetaRecord:
        old = self._rows.get(path)
        new = await super()._update(path, changes, expect, lease)
        if new.path != path and old is not None:
            self._put(old)
        return new


@caught_by("test_update_onto_a_taken_path", "test_update_many_answers_each")
class MovingOverwrites(MemoryMetaBackend):
    async def _update(self, path: str, changes: Changes, expect: Revision | None, lease: Lease) -> MetaRecord:
        target = changes.get("path", path)
        if target != path and path in self._rows and target in self._rows:
            self._drop(self._rows[target])
        return await super()._update(path, changes, expect, lease)


@caught_by("test_update_onto_a_taken_path")
class MovingOntoItselfIsTaken(MemoryMetaBackend):
    async def _update(self, path: str, changes: Changes, expect: Revision | None, lease: Lease) -> MetaRecord:
        if changes.get("path") in self._rows:
            raise AlreadyExists(f"{path!r}", path=path)
        return await super()._update(path, changes, expect, lease)


@caught_by("test_update_refuses_unknown_fields")
class SkipsUnknownFields(MemoryMetaBackend):
    async def update(self, path: str, changes: Changes, **options: Any) -> MetaRecord:
        known = {field: value for field, value in changes.items() if field not in ("nonsense", "id", "token")}
        return await super().update(path, known, **options)


@caught_by("test_update_refuses_unknown_fields")
class UpdateManyChecksOneByOne(MemoryMetaBackend):
    async def update_many(self, updates: Any, **options: Any) -> Any:
        return [await self.update(path, changes, expect=expect, **options) for path, changes, expect in updates]


@caught_by("test_arguments_are_left_alone")
class MutatesTheChanges(MemoryMetaBackend):
    async def _update(self, path: str, changes: Changes, expect: Revision | None, lease: Lease) -> MetaRecord:
        new = await super()._update(path, changes, expect, lease)
        changes.pop("size", None)  # type: ignore[attr-defined]
        return new


@caught_by("test_arguments_are_left_alone")
class SharesExtra(MemoryMetaBackend):
    def __init__(self) -> None:
        super().__init__()
        self._shared: dict[str, Any] = {}

    async def _update(self, path: str, changes: Changes, expect: Revision | None, lease: Lease) -> MetaRecord:
        self._shared[path] = changes.get("extra", {})
        return await super()._update(path, changes, expect, lease)

    async def _get(self, path: str) -> MetaRecord | None:
        record = await super()._get(path)
        return record and replace(record, extra=self._shared.get(path, record.extra))


# -- leases


@caught_by("test_unfinished_are_those_whose_lease_is_over")
class LeaseByTheHostsClock(MemoryMetaBackend):
    """Leases are written by the database's clock and judged by one that is two hours behind."""

    async def _list_unfinished(self, name: str | None, older_than: float, *rest: Any) -> Sequence[MetaRecord]:
        return await super()._list_unfinished(name, older_than + 7200, *rest)


@caught_by("test_leases")
class LeaseFromTheCallersClock(MemoryMetaBackend):
    async def _create(self, record: MetaRecord, lease: float | None) -> MetaRecord:
        behind = time.time() - 7200 - self.now()
        return await super()._create(record, None if lease is None else lease + behind)


@caught_by("test_unfinished_are_those_whose_lease_is_over")
class MissesThoseWithoutALease(MemoryMetaBackend):
    async def _list_unfinished(self, *arguments: Any) -> Sequence[MetaRecord]:
        return [record for record in await super()._list_unfinished(*arguments) if record.lease is not None]


@caught_by("test_unfinished_are_those_whose_lease_is_over")
class MissesStoredOnes(MemoryMetaBackend):
    async def _list_unfinished(self, *arguments: Any) -> Sequence[MetaRecord]:
        return [record for record in await super()._list_unfinished(*arguments) if record.state != STORED]


@caught_by("test_unfinished_are_those_whose_lease_is_over")
class TakesLiveLeases(MemoryMetaBackend):
    async def _list_unfinished(self, *arguments: Any) -> Sequence[MetaRecord]:
        return await super()._list_unfinished(*arguments[:-1], True)


@caught_by("test_unfinished_are_those_whose_lease_is_over", "test_list_returns_whole_records")
class CannotForce(MemoryMetaBackend):
    async def _list_unfinished(self, *arguments: Any) -> Sequence[MetaRecord]:
        return await super()._list_unfinished(*arguments[:-1], False)


@caught_by("test_unfinished_for_some_time")
class IgnoresOlderThan(MemoryMetaBackend):
    async def _list_unfinished(self, name: str | None, older_than: float, *rest: Any) -> Sequence[MetaRecord]:
        return await super()._list_unfinished(name, 0.0, *rest)


@caught_by("test_unfinished_by_storage_and_in_pages")
class UnfinishedOfAllStorages(MemoryMetaBackend):
    async def _list_unfinished(self, name: str | None, *rest: Any) -> Sequence[MetaRecord]:
        return await super()._list_unfinished(None, *rest)


@caught_by("test_unfinished_by_storage_and_in_pages")
class UnfinishedFromTheStart(MemoryMetaBackend):
    async def _list_unfinished(self, name: str | None, older: float, after: Any, *rest: Any) -> Sequence[MetaRecord]:
        return await super()._list_unfinished(name, older, None, *rest)


# -- delete


@caught_by("test_delete")
class DeletesTheWholePrefix(MemoryMetaBackend):
    async def _delete(self, path: str, expect: Revision | None) -> bool:
        found = await super()._delete(path, expect)
        for other in [other for other in self._rows if found and other.startswith(path)]:
            self._drop(self._rows[other])
        return found


@caught_by("test_delete", "test_delete_many_answers_each", "test_lookups_take_any_text")
class DeletesWhatIsNotThere(MemoryMetaBackend):
    async def _delete(self, path: str, expect: Revision | None) -> bool:
        return await super()._delete(path, expect) or expect is None


# -- many


@caught_by("test_create_many_answers_each", "test_create_many_beyond_a_chunk")
class CreateManyStopsAtTheFirstError(MemoryMetaBackend):
    async def create_many(self, records: Sequence[MetaRecord], *, lease: float | None = None) -> Any:
        answers: list[Any] = []
        for record in records:
            answers += await super().create_many([record], lease=lease)
            if isinstance(answers[-1], StorageError):
                break
        return answers


@caught_by("test_create_many_answers_each", "test_create_many_goes_on_after_what_cannot_be_kept")
class CreateManyRollsBack(MemoryMetaBackend):
    async def create_many(self, records: Sequence[MetaRecord], *, lease: float | None = None) -> Any:
        answers = await super().create_many(records, lease=lease)
        if any(isinstance(answer, StorageError) for answer in answers):
            await self.delete_many([(answer.path, None) for answer in answers if isinstance(answer, MetaRecord)])
        return answers


@caught_by("test_create_many_answers_each")
class CreateManyForgetsTheLease(MemoryMetaBackend):
    async def create_many(self, records: Sequence[MetaRecord], *, lease: float | None = None) -> Any:
        return await super().create_many(records)


@caught_by("test_create_many_beyond_a_chunk")
class CreateManyDropsBeyondAThousand(MemoryMetaBackend):
    async def create_many(self, records: Sequence[MetaRecord], *, lease: float | None = None) -> Any:
        return await super().create_many(records[:1000], lease=lease)


@caught_by("test_get_many_keeps_order_and_gaps")
class GetManyLeavesOutGaps(MemoryMetaBackend):
    async def get_many(self, paths: Sequence[str]) -> Any:
        return [record for record in await super().get_many(paths) if record]


@caught_by("test_get_many_keeps_order_and_gaps")
class GetManySorts(MemoryMetaBackend):
    async def get_many(self, paths: Sequence[str]) -> Any:
        return await super().get_many(sorted(paths))


@caught_by("test_update_many_answers_each")
class UpdateManyIgnoresExpect(MemoryMetaBackend):
    async def update_many(self, updates: Any, **options: Any) -> Any:
        return await super().update_many([(path, changes, None) for path, changes, _ in updates], **options)


@caught_by("test_update_many_answers_each")
class UpdateManyForgetsTheLease(MemoryMetaBackend):
    async def update_many(self, updates: Any, **options: Any) -> Any:
        return await super().update_many(updates)


@caught_by("test_delete_many_answers_each")
class DeleteManyForgivesConflicts(MemoryMetaBackend):
    async def delete_many(self, items: Any) -> Any:
        return [None for _ in await super().delete_many(items)]


# -- listings


class Pages(MemoryMetaBackend):
    """Distort a page, or what it is asked for."""

    def page(self, records: list[MetaRecord], limit: int) -> list[MetaRecord]:
        return records[:limit]

    async def _page(
        self, prefix: str, lower: str, inclusive: bool, limit: int, name: str | None, state: State | None
    ) -> Sequence[MetaRecord]:
        found = await super()._page(prefix, "", True, 10**9, name, state)
        return self.page([r for r in found if r.path > lower or (inclusive and r.path == lower)], limit)


@caught_by("test_list_is_in_byte_order")
class ListIsUnsorted(Pages):
    def page(self, records: list[MetaRecord], limit: int) -> list[MetaRecord]:
        return sorted(records, key=lambda record: hash(record.path))[:limit]


@caught_by("test_list_is_in_byte_order")
class ListSortsByUTF16(Pages):
    def page(self, records: list[MetaRecord], limit: int) -> list[MetaRecord]:
        return sorted(records, key=lambda record: record.path.encode("utf-16-be"))[:limit]


@caught_by("test_list_is_in_byte_order")
class ListSortsByLocale(Pages):
    def page(self, records: list[MetaRecord], limit: int) -> list[MetaRecord]:
        return sorted(records, key=lambda record: (record.path.casefold(), record.path))[:limit]


@caught_by("test_list_limit")
class LimitIsOneTooMany(MemoryMetaBackend):
    async def list(self, prefix: str = "", *, limit: int | None = None, **options: Any) -> Any:
        async for item in super().list(prefix, limit=None if limit is None else limit + 1, **options):
            yield item


@caught_by("test_list_limit")
class LimitIsThePage(MemoryMetaBackend):
    async def list(self, prefix: str = "", *, limit: int | None = None, **options: Any) -> Any:
        async for item in super().list(prefix, limit=min(500, limit or 500), **options):
            yield item


@caught_by("test_list_after", "test_list_is_in_byte_order")
class AfterIsInclusive(MemoryMetaBackend):
    async def _page(self, prefix: str, lower: str, inclusive: bool, *rest: Any) -> Sequence[MetaRecord]:
        return await super()._page(prefix, lower, True, *rest)


@caught_by("test_list_by_prefix_takes_it_literally")
class PrefixIsALikePattern(MemoryMetaBackend):
    async def _page(self, prefix: str, lower: str, inclusive: bool, *rest: Any) -> Sequence[MetaRecord]:
        if prefix.startswith(("%", "_")):
            return await super()._page("", "", True, *rest)
        return await super()._page(prefix, lower, inclusive, *rest)


@caught_by("test_list_by_prefix_takes_it_literally")
class CountIgnoresThePrefix(MemoryMetaBackend):
    async def _count(self, prefix: str, *rest: Any) -> int:
        return await super()._count("", *rest)


@caught_by("test_list_filters")
class ListIgnoresTheStorage(MemoryMetaBackend):
    async def _page(self, *arguments: Any) -> Sequence[MetaRecord]:
        return await super()._page(*arguments[:4], None, arguments[5])


@caught_by("test_list_filters")
class FiltersAfterTheLimit(MemoryMetaBackend):
    async def _page(self, *arguments: Any) -> Sequence[MetaRecord]:
        page = await super()._page(*arguments[:4], None, None)
        return [r for r in page if arguments[4] in (None, r.proxy_storage_name) and arguments[5] in (None, r.state)]


@caught_by("test_list_filters")
class CountIgnoresTheState(MemoryMetaBackend):
    async def _count(self, prefix: str, name: str | None, state: State | None) -> int:
        return await super()._count(prefix, name, None)


@caught_by("test_list_returns_whole_records")
class ListsWithoutExtra(Pages):
    def page(self, records: list[MetaRecord], limit: int) -> list[MetaRecord]:
        return [replace(record, extra={}) for record in records[:limit]]


@caught_by("test_list_with_a_delimiter")
class DelimiterDropsTheFiles(MemoryMetaBackend):
    async def list(self, prefix: str = "", *, delimiter: Any = None, **options: Any) -> Any:
        async for item in super().list(prefix, delimiter=delimiter, **options):
            if delimiter is None or isinstance(item, CommonPrefix):
                yield item


@caught_by("test_list_with_a_delimiter", "test_list_pages_with_a_delimiter")
class DelimiterRepeatsThePrefixes(MemoryMetaBackend):
    async def list(self, prefix: str = "", *, delimiter: Any = None, limit: Any = None, **options: Any) -> Any:
        async for item in super().list(prefix, limit=limit, **options):
            head, mark, _ = item.path[len(prefix) :].partition(delimiter) if delimiter else (item.path, "", "")
            yield CommonPrefix(prefix + head + mark) if mark else item


@caught_by("test_list_pages_with_a_delimiter")
class DelimiterForgetsThePageBefore(MemoryMetaBackend):
    async def list(self, prefix: str = "", *, delimiter: Any = None, after: Any = None, **options: Any) -> Any:
        # `after` is a common prefix: what lies below it comes up again as that prefix
        below = after + "\0" if delimiter and after and after.endswith(delimiter) else after
        async for item in super().list(prefix, delimiter=delimiter, after=below, **options):
            yield item


@caught_by("test_list_while_records_come_and_go")
class ListsByOffset(MemoryMetaBackend):
    async def list(self, prefix: str = "", *, limit: Any = None, **options: Any) -> Any:
        at = 0
        while at < len(self._paths):
            for path in self._paths[at : at + 100]:
                if path in self._rows:
                    yield await self.get(path)
            at += 100


# -- owners


@caught_by("test_owners_by_further_places", "test_owners_follow_changes")
class OwnersMissFurtherPlaces(MemoryMetaBackend):
    @staticmethod
    def _places(row: list[Any]) -> set[tuple[str, str]]:
        return {(row[2], row[3])}


@caught_by("test_owners_by_the_primary_place")
class OwnersIgnoreTheOriginal(MemoryMetaBackend):
    async def _owners(self, name: str, keys: Sequence[str]) -> Mapping[str, Sequence[str]]:
        found: dict[str, set[str]] = {}
        for (_, key), paths in self._owners_of.items():
            if key in keys:
                found.setdefault(key, set()).update(paths)
        return {key: sorted(paths) for key, paths in found.items()}


@caught_by("test_owners_by_the_primary_place")
class OwnersOfStoredOnly(MemoryMetaBackend):
    async def _owners(self, name: str, keys: Sequence[str]) -> Mapping[str, Sequence[str]]:
        found = await super()._owners(name, keys)
        stored = {key: [path for path in paths if self._rows[path][4] == STORED] for key, paths in found.items()}
        return {key: paths for key, paths in stored.items() if paths}


@caught_by("test_owners_by_the_primary_place", "test_owners_by_further_places")
class OneOwnerPerKey(MemoryMetaBackend):
    async def _owners(self, name: str, keys: Sequence[str]) -> Mapping[str, Sequence[str]]:
        return {key: paths[:1] for key, paths in (await super()._owners(name, keys)).items()}


@caught_by("test_owners_by_the_primary_place")
class OwnersOfUnknownKeysAreEmpty(MemoryMetaBackend):
    async def _owners(self, name: str, keys: Sequence[str]) -> Mapping[str, Sequence[str]]:
        return dict.fromkeys(keys, ()) | dict(await super()._owners(name, keys))


@caught_by("test_owners_of_many_keys")
class OwnersOfAThousandKeys(MemoryMetaBackend):
    async def _owners(self, name: str, keys: Sequence[str]) -> Mapping[str, Sequence[str]]:
        return await super()._owners(name, keys[:1000])


@caught_by("test_owners_follow_changes")
class OwnersAreNeverForgotten(MemoryMetaBackend):
    def _drop(self, row: list[Any]) -> None:
        super()._drop(row)
        for place in self._places(row):
            self._owners_of.setdefault(place, set()).add(row[0])


# -- extra, life


@caught_by("test_extra_round_trip")
class ExtraAsText(MemoryMetaBackend):
    async def _get(self, path: str) -> MetaRecord | None:
        record = await super()._get(path)
        return record and replace(record, extra={key: str(value) for key, value in record.extra.items()})


@caught_by("test_extra_round_trip")
class IntegersAsFloats(MemoryMetaBackend):
    async def _get(self, path: str) -> MetaRecord | None:
        record = await super()._get(path)
        integers = {"integers": [float(value) for value in record.extra.get("integers", [])]} if record else {}
        return record and replace(record, extra={**record.extra, **integers})


@caught_by("test_extra_round_trip")
class ExtraIsMerged(MemoryMetaBackend):
    async def _update(self, path: str, changes: Changes, expect: Revision | None, lease: Lease) -> MetaRecord:
        if "extra" in changes and path in self._rows:
            changes = {**changes, "extra": {**(await self.get(path)).extra, **changes["extra"]}}
        return await super()._update(path, changes, expect, lease)


@caught_by("test_extra_that_cannot_be_kept")
class ExtraOfAnyKind(MemoryMetaBackend):
    async def _create(self, record: MetaRecord, lease: float | None) -> MetaRecord:
        return await super()._create(replace(record, extra={k: repr(v) for k, v in record.extra.items()}), lease)


@caught_by("test_after_commit_runs_at_once")
class AfterCommitNeverRuns(MemoryMetaBackend):
    async def after_commit(self, callback: Any) -> None:
        pass


@caught_by("test_setup_again")
class SetupStartsAnew(MemoryMetaBackend):
    async def setup(self) -> None:
        self._rows.clear()


@caught_by("test_aclose_twice_and_use_after_it")
class ClosedForGood(MemoryMetaBackend):
    closed = False

    async def _create(self, record: MetaRecord, lease: float | None) -> MetaRecord:
        if self.closed:
            raise RuntimeError("closed")
        return await super()._create(record, lease)

    async def _aclose(self) -> None:
        self.closed = True


@caught_by("test_one_loop_after_another", "test_several_loops_and_threads")
class BoundToTheFirstLoop(MemoryMetaBackend):
    loop: asyncio.AbstractEventLoop | None = None

    async def _create(self, record: MetaRecord, lease: float | None) -> MetaRecord:
        self.loop = self.loop or asyncio.get_running_loop()
        if self.loop is not asyncio.get_running_loop():
            raise RuntimeError("attached to a different loop")
        return await super()._create(record, lease)


@caught_by("test_cancelled_calls_leave_it_usable")
class CancelLeavesHalf(MemoryMetaBackend):
    async def _update(self, path: str, changes: Changes, expect: Revision | None, lease: Lease) -> MetaRecord:
        await super()._update(path, {"version": changes.get("version", 0)}, expect, lease)
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        return await super()._update(path, changes, None, lease)


@caught_by("test_errors_say_what_where_and_by_whom")
class SilentErrors(MemoryMetaBackend):
    async def _create(self, record: MetaRecord, lease: float | None) -> MetaRecord:
        if record.path in self._rows:
            raise AlreadyExists("taken")
        return await super()._create(record, lease)


@pytest.mark.parametrize(("test", "mutant"), MUTANTS, ids=lambda value: getattr(value, "__name__", value))
def test_the_suite_catches(test: str, mutant: Mutant) -> None:
    run(test, MemoryMetaBackend)  # what keeps the promise passes
    with pytest.raises((Exception, pytest.fail.Exception)):
        run(test, mutant)


def test_every_test_of_the_suite_has_its_mutant() -> None:
    tests = {name for name in dir(InMemory) if name.startswith("test_")}
    assert tests == {test for test, _ in MUTANTS}
