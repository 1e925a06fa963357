"""Finish what crashed processes left (J7), and find bytes that no record names (J9)."""

from __future__ import annotations

import contextlib
import os
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from itertools import chain, islice
from unicodedata import normalize

from ..backends.base import Backend
from ..errors import InvalidPath, NotFound, StorageError
from ..mending import mend
from ..meta_backends.base import MetaBackend
from ..paths import local_path
from ..proxy import ProxyStorage
from ..records import MetaRecord, ObjectInfo

__all__ = ["Finding", "Report", "reconcile"]

_BATCH = 500


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing that was found, and what was done about it (or would be, in a dry run).

    `action`: ``undone`` (a save), ``deleted``, ``cleared`` (old bytes of a stored file), ``settling`` (again later),
    ``moved on`` (somebody else was first), ``failed``; of a scan ``removed`` (bytes without a record), ``young``
    (left, it may be a save in flight), ``foreign`` (left, nothing says that this library wrote it) and ``ambiguous``
    (left: the original gives it by other spellings of its key too, and a record may have one of these). Where files
    have several copies: ``copied`` (one that was missing), ``dropped`` (a surplus one), ``missing`` (its bytes are
    gone), ``damaged`` (they are not the file).
    """

    action: str
    path: str
    original: str = ""
    error: StorageError | None = None


@dataclass(slots=True)
class Report:
    """What a reconcile found; `findings` holds the first `max_findings`, `counts` all."""

    dry_run: bool
    counts: dict[str, int] = field(default_factory=dict)
    findings: list[Finding] = field(default_factory=list)
    max_findings: int = 10_000

    def add(self, finding: Finding) -> None:
        """Count a finding, and keep it while there is room."""
        self.counts[finding.action] = self.counts.get(finding.action, 0) + 1
        if len(self.findings) < self.max_findings:
            self.findings.append(finding)

    @property
    def clean(self) -> bool:
        """Nothing was found that still wants something done."""
        return not self.counts.keys() & {"failed", "settling", "foreign", "damaged", "lost"}


async def reconcile(
    storage: ProxyStorage,
    *,
    older_than: float = 0.0,
    scan: bool = False,
    dry_run: bool = True,
    force: bool = False,
    restored: bool = False,
    min_age: float = 86_400.0,
    metas: Iterable[MetaBackend] = (),
    storages: Iterable[ProxyStorage] = (),
) -> Report:
    """Finish every record of `storage` that somebody left unfinished; with `scan`, look for bytes without a record.

    Where the placement is `Replicate`, every file is brought to its number of copies too: each copy is asked for its
    size, missing ones are made from one whose checksum is right, surplus ones are removed after `keep_replaced`.

    Args:
        older_than: only records whose lease ran out at least so many seconds ago, by the database's clock.
        scan: list every original too; for bytes that a rolled-back transaction or a lost database left.
        dry_run: change nothing, only report.
        force: take leases, settle and keep times as over. Only when nothing else uses the storage: a live save
            would be undone (it fails with Conflict, and nothing is lost). Bytes that carry the token of another save
            stay, where the original keeps tokens, and stay named: ``failed``, and the log says where. So do those of
            files that were adopted; they go without `force`, once lease and settle time are over.
        restored: the records came out of a backup, and the bytes may be newer. `force`, but no bytes are removed, nor
            copies made: records of saves and deletions that were under way go, and stored files forget what else they
            name. What no record names then, a scan finds (which removes nothing here either).
        min_age: seconds; a scan leaves younger objects alone.
        metas: further meta-backends whose records may name objects in these originals; without them a scan would
            take their files for orphans.
        storages: further storages, whose records are asked too. Those that are registered are known anyway, but only
            by records in a meta-backend that is asked. A record's storage is one that has its name and, as `meta`, the
            very object that gave the record.

    One original may lie inside another: in a directory or under a prefix of it. A scan takes an object for an orphan
    only where each record of a key that might be its own, counted from any directory above it, has its bytes, and
    they are another object. Of an original that is known by no storage here that cannot be told: the object stays.

    Safe beside live callers and other reconciles: every change is a compare-and-set. Pages by keyset, in bounded
    memory; can be repeated at any time.

    Raises:
        BackendUnavailable, DeadlineExceeded: the meta-backend, or in a scan an original, cannot be listed. Errors
        with single files are findings.
    """
    report = Report(dry_run)
    force = force or restored
    after: tuple[str] | None = None
    while True:
        page = await storage.meta.list_unfinished(
            proxy_storage_name=storage.name, older_than=older_than, after=after, limit=_BATCH, force=force
        )
        for record in page:
            report.add(await _finish(storage, record, dry_run=dry_run, force=force, restored=restored))
        if len(page) < _BATCH:
            break
        after = (page[-1].path,)
    if storage.placement.limits.copies > 1 and not restored:
        async for record in storage.list():
            for each in await mend(storage, record, dry_run=dry_run):
                report.add(Finding(each.action, record.path, each.original, each.error))
    if scan:
        every = list({id(other): other for other in (storage, *storages)}.values())
        asked = {id(meta): meta for meta in (*(other.meta for other in every), *metas)}
        # Where two have one name, a record does not say whose it is.
        names = Counter(other.name for other in every)
        known = {other.name: other if names[other.name] == 1 else None for other in every}
        for name in storage.originals:
            scan_of_one = _Scan(
                storage, name, list(asked.values()), known, report, dry_run=dry_run or restored, min_age=min_age
            )
            await scan_of_one.run()
    return report


async def _finish(storage: ProxyStorage, record: MetaRecord, *, dry_run: bool, force: bool, restored: bool) -> Finding:
    if dry_run:
        would = {"pending": "undone", "deleting": "deleted", "stored": "cleared"}[record.state]
        return Finding(would, record.path, record.original_storage_name)
    try:
        journal = storage.journal
        done = await (journal.forget(record) if restored else journal.finish(record, force=force))
        return Finding(done, record.path, record.original_storage_name)
    except StorageError as error:
        return Finding("failed", record.path, record.original_storage_name, error)


class _Scan:
    """Looks for objects of one original that no record names."""

    def __init__(
        self,
        storage: ProxyStorage,
        name: str,
        metas: list[MetaBackend],
        storages: Mapping[str, ProxyStorage | None],
        report: Report,
        *,
        dry_run: bool,
        min_age: float,
    ) -> None:
        self.name = name
        self.backend = storage.originals[name]
        self.metas = metas
        self.storages = storages
        self.report = report
        self.dry_run = dry_run
        self.min_age = min_age
        self._roots: tuple[str, str] | None = None

    async def run(self) -> None:
        """List the original, and deal with what nobody knows."""
        batch: list[str] = []
        async for info in self.backend.list():
            batch.append(info.key)
            if len(batch) == _BATCH:
                await self._look_up(batch)
                batch.clear()
        await self._look_up(batch)

    async def _look_up(self, batch: list[str]) -> None:
        # The listing came first, the records come after: what was saved in between is found in them.
        await self._remove(await self._unknown(batch))

    async def _unknown(self, keys: Iterable[str]) -> list[str]:
        """Return those of `keys` that no record names.

        Another storage may know the same original by another name, and so may this one have done: before it was
        renamed, or as an alias. Or its original lies inside this one, or around it, so that it knows the object by
        another key. So whatever a record might mean counts as known, unless it certainly is another object.
        """
        unknown = dict.fromkeys(keys)
        for meta in self.metas:
            for key in await meta.owners(self.name, unknown):
                unknown.pop(key, None)
            called = {key: self._names(key) for key in unknown}
            owners: dict[str, Sequence[str]] = {}
            for batch in _batches(dict.fromkeys(chain.from_iterable(called.values()))):
                owners.update(await meta.owners(None, batch))
            records: dict[str, MetaRecord | None] = {}
            for batch in _batches(dict.fromkeys(chain.from_iterable(owners.values()))):
                records.update(zip(batch, await meta.get_many(batch), strict=True))
            for key, names in called.items():
                for name in names:
                    named = [records[path] for path in owners.get(name, ())]
                    if key in unknown and not await self._are_others(key, name, named, meta):
                        del unknown[key]
        return list(unknown)

    def _names(self, key: str) -> list[str]:
        """Return what `key` is called in originals that have their root at any directory above it."""
        whole = self.backend.full_path(key)
        path = local_path(whole)
        addresses = {path or whole}
        if path is not None and path.endswith(key):
            if self._roots is None:
                root = path.removesuffix(key)
                self._roots = root, os.path.join(os.path.realpath(root), "")  # which has just been listed
            given, real = self._roots
            addresses.add(real + path.removeprefix(given))
        names = dict.fromkeys([key, *addresses])
        for address in addresses:
            parts = [part for part in address.split("/") if part]
            names.update(dict.fromkeys("/".join(parts[at:]) for at in range(len(parts))))
        forms = [normalize(form, name) for name in names if not name.isascii() for form in ("NFC", "NFD")]
        return list(dict.fromkeys([*names, *forms]))

    async def _are_others(self, key: str, name: str, records: Iterable[MetaRecord | None], meta: MetaBackend) -> bool:
        """Return whether what `records`, of `meta`, name `name` are certainly other objects than `key` here."""
        for record in records:
            storage = self._storage_of(record, meta)
            if record is None or storage is None:
                return False
            for place in record.all_places():
                if place.key != name:
                    continue
                there = storage.originals.get(place.original or next(iter(storage.originals)))
                if there is None or await _may_be_one(self.backend, key, there, name):
                    return False
        return True

    def _storage_of(self, record: MetaRecord | None, meta: MetaBackend) -> ProxyStorage | None:
        """Return the storage that `record`, of `meta`, belongs to; None where that is not known here. A name alone does
        not say it: a storage of another project may have the same."""
        if record is None:
            return None
        found = self.storages.get(record.proxy_storage_name)
        if record.proxy_storage_name not in self.storages:
            with contextlib.suppress(Exception):  # not known here, or a finder cannot make it
                found = record.get_proxy_storage()
        return found if found is not None and found.meta is meta else None

    async def _remove(self, unknown: list[str]) -> None:
        backend, report = self.backend, self.report
        limit = datetime.now(UTC) - timedelta(seconds=self.min_age)
        for key in unknown:
            try:
                info = await backend.stat(key)  # a listing may know neither its times nor its token
                touched = info.changed_at or info.modified_at
                if touched is None or touched > limit:
                    action = "young"
                elif backend.capabilities.tokens and info.token is None:
                    action = "foreign"
                elif await self._has_other_names(info):
                    action = "ambiguous"
                else:
                    action = "removed"
                    if not self.dry_run:
                        if not await self._unknown([key]):
                            continue  # adopted since it was listed
                        await backend.discard(key, token=info.token)  # not what another scan has made room for since
                report.add(Finding(action, key, self.name))
            except NotFound:
                continue
            except StorageError as error:
                report.add(Finding("failed", key, self.name, error))

    async def _has_other_names(self, info: ObjectInfo) -> bool:
        """Return whether the original gives the object by another spelling of its key too, because it tells case or
        normal forms not apart: then a record may name it by any, and no look-up finds that."""
        for name in _spellings(info.key):
            try:
                found = await self.backend.stat(name)
            except (NotFound, InvalidPath):
                continue
            if _are_alike(info, found):
                return True
        return False


def _spellings(key: str) -> Iterator[str]:
    """Yield other spellings of `key`, each of one part of it only: every directory may be of another kind."""
    parts = key.split("/")
    for at, part in enumerate(parts):
        others = [_swapped(part)]
        if not part.isascii():
            # Some know no case but that of ASCII.
            others += (_swapped(part, ascii_only=True), normalize("NFC", part), normalize("NFD", part))
        for other in dict.fromkeys(others):
            if other != part:
                yield "/".join((*parts[:at], other, *parts[at + 1 :]))


def _swapped(part: str, *, ascii_only: bool = False) -> str:
    """Return `part` in the other case, but for letters that have no single one."""

    def other(sign: str) -> str:
        swapped = sign.swapcase()
        return swapped if (sign.isascii() or not ascii_only) and swapped.swapcase() == sign else sign

    return "".join(map(other, part))


async def _may_be_one(here: Backend, key: str, there: Backend, other: str) -> bool:
    """Return whether `key` and `other` may be one object; also where it cannot be told, or `there` has none: a storage
    may have been given another place, and what it has lost lies here."""
    if here.full_path(key) == there.full_path(other):
        return True
    try:
        one, two = await here.stat(key), await there.stat(other)
    except StorageError:
        return True
    return _are_alike(one, two, etags=type(here) is type(there))


def _are_alike(one: ObjectInfo, two: ObjectInfo, *, etags: bool = True) -> bool:
    told = [(one.size, two.size), (one.token, two.token)]
    if etags:
        told.append((one.etag, two.etag))
    return all(a == b for a, b in told if a is not None and b is not None)


def _batches(names: Iterable[str]) -> Iterator[list[str]]:
    every = iter(names)
    while batch := list(islice(every, _BATCH)):
        yield batch
