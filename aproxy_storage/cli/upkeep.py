"""``verify``, ``reconcile``, ``health``: are all bytes what they were, is nothing left over, and does all answer."""

from __future__ import annotations

import contextlib
from typing import Annotated

import typer

from ..backends.base import Backend
from ..errors import ConfigurationError, NotFound, StorageError
from ..meta_backends.base import MetaBackend
from ..tools.reconcile import Report, reconcile
from ..tools.verify import verify
from .output import parse_duration, printable
from .session import Session, command
from .transfer import Concurrency

__all__ = ["register"]

_WORDS = {
    "undone": "saves that were never finished",
    "deleted": "deletions to be finished",
    "cleared": "stored files with bytes that are not wanted any more",
    "settling": "to be looked at again later: a write without an answer may still land",
    "moved on": "taken care of by somebody else meanwhile",
    "failed": "failed",
    "copied": "copies made that were missing",
    "dropped": "copies more than wanted",
    "missing": "copies whose bytes are gone",
    "damaged": "copies whose bytes are not the file",
    "lost": "files of which no copy is left",
    "removed": "bytes that no record names",
    "young": "bytes without a record, left because they may belong to a save in flight",
    "foreign": "bytes without a record, left because nothing says that this library wrote them",
    "ambiguous": "bytes that a record may name by another spelling of their key, left for that",
}


def register(app: typer.Typer) -> None:
    """Add these commands to `app`."""
    command(app, name="verify")(verify_files)
    command(app, name="reconcile")(reconcile_storage)
    command(app, name="health")(health)


async def verify_files(
    session: Session,
    prefix: Annotated[str, typer.Argument(help="Only paths that begin with this.")] = "",
    record_missing: Annotated[
        bool, typer.Option("--record-missing", help="Record the checksum of what is read for files that have none.")
    ] = False,
    concurrency: Concurrency = 8,
) -> None:
    """Read every file and compare it with its record; damaged ones are named, and make the exit code 1.

    So do files that have no checksum yet, such as adopted ones, unless it is to be recorded.
    """
    storage = await session.storage()
    total = None
    if session.out.terminal:
        total = await storage.meta.count(prefix or storage.prefix, proxy_storage_name=storage.name, state="stored")
    with session.out.progress("verifying", total) as bar:
        results = verify(storage, prefix, concurrency=concurrency, record_missing=record_missing)
        async with contextlib.aclosing(results):
            async for result in results:
                if result.error is not None:
                    session.failed(result.item, result.error)
                else:
                    assert result.value is not None
                    session.did("ok", result.item, result.value.size)
                bar.advance(result.value.size if result.value is not None else 0)
    if prefix and not session.tally.counts and not session.tally.failed:
        raise NotFound(f"there is no file whose path begins with {prefix!r}: nothing was verified")


async def reconcile_storage(
    session: Session,
    apply: Annotated[bool, typer.Option("--apply", help="Do it; without this it only says what it would do.")] = False,
    scan: Annotated[bool, typer.Option("--scan", help="Look for bytes that no record names, too.")] = False,
    min_age: Annotated[
        str, typer.Option("--min-age", metavar="TIME", help="A scan leaves younger bytes alone: 90m, 24h, 7d.")
    ] = "24h",
    older_than: Annotated[
        str, typer.Option("--older-than", metavar="TIME", help="Only what was given up so long ago.")
    ] = "0s",
    force: Annotated[
        bool, typer.Option("--force", help="Do not wait for leases; only if nothing else uses the storage.")
    ] = False,
    restored: Annotated[
        bool, typer.Option("--restored", help="The records came out of a backup: as --force, but remove no bytes.")
    ] = False,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")] = False,
) -> None:
    """Finish what crashed callers left: undo half saves, end deletions, drop old bytes.

    Safe beside live callers. A scan asks the records of every storage in the configuration file before it calls
    bytes an orphan; storages that are configured elsewhere it cannot know.
    """
    storage = await session.storage()
    # Every storage whose files may lie in the same originals, or around or below them.
    others = [other for other in session.storages.values() if other is not storage]
    # To close a storage is to tidy it up: not the others, and after a restore not this one either, come what may.
    untidied = [*others, session.let_go(storage)] if restored else others
    try:
        try:
            age, older = parse_duration(min_age), parse_duration(older_than)
        except ValueError as error:
            raise ConfigurationError(str(error)) from None
        if (force or restored) and apply:
            session.confirm(f"Does really nothing else use storage {storage.name!r} just now?", sure=yes)
        report = await reconcile(
            storage,
            older_than=older,
            scan=scan,
            dry_run=not apply,
            force=force,
            restored=restored,
            min_age=age,
            storages=others,
        )
    finally:
        for other in untidied:
            parts: list[Backend | MetaBackend] = [other.meta, *other.originals.values()]
            for part in parts:
                with contextlib.suppress(StorageError):
                    await part.aclose()
    _tell(session, report)


def _tell(session: Session, report: Report) -> None:
    for finding in report.findings:
        if finding.error is not None:
            session.failed(finding.path, finding.error)
        elif session.out.as_json:
            session.out.json({"action": finding.action, "path": finding.path, "original": finding.original})
        elif not session.out.quiet:
            session.out.line(f"{finding.action:<9} {printable(finding.path)}")
    session.tally.failed = report.counts.get("failed", 0) + report.counts.get("lost", 0)
    for action, count in sorted(report.counts.items()):
        session.out.note(f"{count:>6,}  {_WORDS[action]}")
    if not report.counts:
        session.out.note("nothing is left over")
    elif report.dry_run:
        session.out.note("Nothing was done; --apply does it.")


async def health(session: Session) -> None:
    """Ask every original and the meta-backend whether they answer; exit code 1 if one does not."""
    storage = await session.storage(setup=False)  # else its records' error would be all that is told
    for part in await storage.health():
        if part.error is not None:
            session.failed(part.name, part.error)
        else:
            session.did("ok", part.name, told=True)
