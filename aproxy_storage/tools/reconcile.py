"""Finish what crashed processes left (J7), and find bytes that no record names (J9)."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta

from ..backends.base import Backend
from ..errors import NotFound, StorageError
from ..mending import mend
from ..meta_backends.base import MetaBackend
from ..proxy import ProxyStorage
from ..records import MetaRecord, ObjectInfo

__all__ = ["Finding", "Report", "reconcile"]

_BATCH = 500


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing that was found, and what was done about it (or would be, in a dry run).

    `action`: ``undone`` (a save), ``deleted``, ``cleared`` (old bytes of a stored file), ``settling`` (again later),
    ``moved on`` (somebody else was first), ``failed``; of a scan ``removed`` (bytes without a record), ``young``
    (left, it may be a save in flight) and ``foreign`` (left, nothing says that this library wrote it). Where files
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
    min_age: float = 86_400.0,
    metas: Iterable[MetaBackend] = (),
) -> Report:
    """Finish every record of `storage` that somebody left unfinished; with `scan`, look for bytes without a record.

    Where the placement is `Replicate`, every file is brought to its number of copies too: each copy is asked for its
    size, missing ones are made from one whose checksum is right, surplus ones are removed after `keep_replaced`.

    Args:
        older_than: only records whose lease ran out at least so many seconds ago, by the database's clock.
        scan: list every original too; for bytes that a rolled-back transaction or a lost database left.
        dry_run: change nothing, only report.
        force: take leases, settle and keep times as over. Only when nothing else uses the storage: a live save
            would be undone (it fails with Conflict, and nothing is lost).
        min_age: seconds; a scan leaves younger objects alone.
        metas: further meta-backends whose records may name objects in these originals; without them a scan would
            take their files for orphans.

    Safe beside live callers and other reconciles: every change is a compare-and-set. Pages by keyset, in bounded
    memory; can be repeated at any time.

    Raises:
        BackendUnavailable, DeadlineExceeded: the meta-backend, or in a scan an original, cannot be listed. Errors
        with single files are findings.
    """
    report = Report(dry_run)
    after: tuple[str] | None = None
    while True:
        page = await storage.meta.list_unfinished(
            proxy_storage_name=storage.name, older_than=older_than, after=after, limit=_BATCH, force=force
        )
        for record in page:
            report.add(await _finish(storage, record, dry_run=dry_run, force=force))
        if len(page) < _BATCH:
            break
        after = (page[-1].path,)
    if storage.placement.limits.copies > 1:
        async for record in storage.list():
            for each in await mend(storage, record, dry_run=dry_run):
                report.add(Finding(each.action, record.path, each.original, each.error))
    if scan:
        known = [storage.meta, *metas]
        for name, backend in storage.originals.items():
            await _scan(storage, name, backend, known, report, dry_run=dry_run, min_age=min_age)
    return report


async def _finish(storage: ProxyStorage, record: MetaRecord, *, dry_run: bool, force: bool) -> Finding:
    if dry_run:
        would = {"pending": "undone", "deleting": "deleted", "stored": "cleared"}[record.state]
        return Finding(would, record.path, record.original_storage_name)
    try:
        return Finding(await storage.journal.finish(record, force=force), record.path, record.original_storage_name)
    except StorageError as error:
        return Finding("failed", record.path, record.original_storage_name, error)


async def _scan(
    storage: ProxyStorage,
    name: str,
    backend: Backend,
    metas: list[MetaBackend],
    report: Report,
    *,
    dry_run: bool,
    min_age: float,
) -> None:
    batch: dict[str, ObjectInfo] = {}

    async def look_up() -> None:
        # The listing came first, the records come after: what was saved in between is found in them.
        unknown = await _unknown(storage, name, batch, metas)
        await _remove(storage, name, backend, unknown, metas, report, dry_run=dry_run, min_age=min_age)
        batch.clear()

    async for info in backend.list():
        batch[info.key] = info
        if len(batch) == _BATCH:
            await look_up()
    await look_up()


async def _unknown(storage: ProxyStorage, name: str, keys: Iterable[str], metas: list[MetaBackend]) -> list[str]:
    """Return those of `keys` in the original `name` that no record names.

    Another storage may know the same original by another name, and so may this one have done: before it was renamed,
    or as an alias. So a key that a record names in whatever original counts as known, unless that is one that this
    storage has, and somewhere else.
    """
    unknown = dict.fromkeys(keys)
    for meta in metas:
        for key in await meta.owners(name, unknown):
            unknown.pop(key, None)
        elsewhere = await meta.owners(None, unknown)
        paths = sorted({path for owners in elsewhere.values() for path in owners})
        records = dict(zip(paths, await meta.get_many(paths), strict=True))
        for key, owners in elsewhere.items():
            if not all(_lies_elsewhere(storage, name, key, records[path]) for path in owners):
                unknown.pop(key, None)
    return list(unknown)


def _lies_elsewhere(storage: ProxyStorage, name: str, key: str, record: MetaRecord | None) -> bool:
    """Return whether what `record` names `key` is certainly another object than the one in the original `name`."""
    if record is None or record.proxy_storage_name != storage.name:
        return False
    here = storage.originals[name]
    for place in record.all_places():
        there = storage.originals.get(place.original or next(iter(storage.originals)))
        if place.key == key and (there in (None, here) or there.full_path(key) == here.full_path(key)):
            return False
    return True


async def _remove(
    storage: ProxyStorage,
    name: str,
    backend: Backend,
    unknown: list[str],
    metas: list[MetaBackend],
    report: Report,
    *,
    dry_run: bool,
    min_age: float,
) -> None:
    limit = datetime.now(UTC) - timedelta(seconds=min_age)
    for key in unknown:
        try:
            info = await backend.stat(key)  # a listing may know neither its times nor its token
            touched = info.changed_at or info.modified_at
            if touched is None or touched > limit:
                action = "young"
            elif backend.capabilities.tokens and info.token is None:
                action = "foreign"
            else:
                action = "removed"
                if not dry_run:
                    if not await _unknown(storage, name, [key], metas):
                        continue  # adopted since it was listed
                    await backend.discard(key, token=info.token)  # not what another scan has made room for since
            report.add(Finding(action, key, name))
        except NotFound:
            continue
        except StorageError as error:
            report.add(Finding("failed", key, name, error))
