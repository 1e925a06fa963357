"""``ls``, ``stat``, ``rm``, ``mv``, ``cp`` and ``adopt``: what is there, and under which path."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator, Iterable
from dataclasses import replace
from typing import Annotated

import typer

from ..errors import AlreadyExists, ConfigurationError, Conflict, NotFound, StorageError
from ..proxy import ProxyStorage
from ..records import CommonPrefix, MetaRecord
from .output import described, printable, size, when
from .session import Session, command
from .transfer import Concurrency, directory_prefix

__all__ = ["register"]

Using = Annotated[
    str | None, typer.Option("--using", metavar="ORIGINAL", help="Where the bytes go.", show_default=False)
]


def register(app: typer.Typer) -> None:
    """Add these commands to `app`."""
    for function in (ls, stat, rm, mv, cp, adopt):
        command(app)(function)


async def ls(
    session: Session,
    prefix: Annotated[str, typer.Argument(help="Only paths that begin with this; letters/ for a directory.")] = "",
    long: Annotated[bool, typer.Option("--long", "-l", help="Size, time and original too.")] = False,
    recursive: Annotated[bool, typer.Option("--recursive", "-r", help="Also what lies deeper.")] = False,
    after: Annotated[
        str | None, typer.Option("--after", metavar="PATH", help="Begin after this path.", show_default=False)
    ] = None,
    limit: Annotated[
        int | None, typer.Option("--limit", "-n", min=1, help="At most so many.", show_default=False)
    ] = None,
) -> None:
    """List files, in byte order of their paths; directories end in a slash."""
    storage = await session.storage()
    entries: AsyncIterator[MetaRecord | CommonPrefix]
    if recursive:
        entries = storage.list(prefix, after=after, limit=limit)
    else:
        entries = storage.list(prefix, after=after, limit=limit, delimiter="/")
    async for entry in entries:
        if session.out.as_json:
            session.out.json(described(entry) if isinstance(entry, MetaRecord) else {"directory": entry.path})
        elif long and isinstance(entry, MetaRecord):
            about = f"{size(entry.size):>10}  {when(entry.updated_at)}  {entry.original_storage_name:<10}"
            session.out.line(f"{about}  {printable(entry.path)}")
        else:
            session.out.line(" " * (45 if long else 0) + printable(entry.path))


async def stat(session: Session, paths: Annotated[list[str], typer.Argument(metavar="PATH")]) -> None:
    """Show the record of a file: where its bytes are, how many, their checksum."""
    storage = await session.storage()
    shown = 0
    for path in paths:
        try:
            record = await storage.get(path)
            where = storage.get_original(record.original_storage_name).full_path(record.original_storage_path)
        except StorageError as error:
            session.failed(path, error)
            continue
        if session.out.as_json:
            session.out.json({**described(record), "full_path": where})
            continue
        if shown:
            session.out.line("")
        shown += 1
        further = [(at.state, storage.get_original(at.original).full_path(at.key)) for at in record.all_places()[1:]]
        for name, value in describe(record, where, further):
            session.out.line(f"{name:>12}  {printable(value)}")


def describe(record: MetaRecord, where: str, further: Iterable[tuple[str, str]] = ()) -> list[tuple[str, str]]:
    """Return a record in words, line by line. `further`: the states of its other places, and where they are."""
    exact = f" ({record.size:,} bytes)" if record.size is not None and record.size >= 1000 else ""
    rows = [
        ("path", record.path),
        ("size", size(record.size) + exact),
        ("type", record.content_type or "?"),
        ("checksum", record.checksum or "none"),
        ("original", record.original_storage_name),
        ("bytes at", where),
        *(("copy at" if state == "good" else state, place) for state, place in further),
        ("stored", when(record.created_at)),
        ("changed", when(record.updated_at)),
        ("version", str(record.version)),
        ("given name", record.name or "?"),
    ]
    rows += [(f"extra {name}", str(value)) for name, value in record.extra.items()]
    return rows


async def rm(
    session: Session,
    paths: Annotated[list[str], typer.Argument(metavar="PATH", help="With -r directories, or . for everything.")],
    recursive: Annotated[bool, typer.Option("--recursive", "-r", help="All files below each PATH.")] = False,
    missing_ok: Annotated[bool, typer.Option("--missing-ok", help="Do not mind what is not there.")] = False,
    keep_bytes: Annotated[
        bool, typer.Option("--keep-bytes", help="Only their records: after a restore the bytes may be another file's.")
    ] = False,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")] = False,
    concurrency: Concurrency = 32,
) -> None:
    """Delete files. With -r it asks before, and says how many there are; a PATH may be a file, too."""
    storage = await session.storage()
    if keep_bytes:
        if recursive:
            raise ConfigurationError("--keep-bytes takes the paths of single files, without -r")
        for path in paths:
            try:
                await _forget(storage, path)
            except StorageError as problem:
                session.failed(path, problem)
            else:
                session.did("forgotten", path)
        return
    count = len(paths)
    if recursive:
        prefixes = {path: directory_prefix(storage, path) for path in paths}
        count = 0
        for path, prefix in prefixes.items():
            below = await storage.meta.count(prefix, proxy_storage_name=storage.name, state="stored")
            below += await storage.exists(path)
            if not below and not missing_ok:
                error = NotFound(f"there is no file {path!r}, and nothing below it", operation="delete", path=path)
                session.failed(path, error)
            count += below
        if count:
            session.confirm(f"Delete {count:,} files of storage {storage.name!r}?", sure=yes)

    async def wanted() -> AsyncIterator[str]:
        for path in paths:
            if not recursive:
                yield path
                continue
            if await storage.exists(path):
                yield path
            async for record in storage.list(prefixes[path]):
                yield record.path

    missing_ok = missing_ok or recursive  # then somebody else was faster
    with session.out.progress("deleting", count) as bar:
        results = storage.delete_many(wanted(), concurrency=concurrency, missing_ok=missing_ok)
        async with contextlib.aclosing(results):
            async for result in results:
                if result.error is not None:
                    session.failed(str(result.item), result.error)
                else:
                    session.did("deleted", str(result.item))
                bar.advance(0)


async def mv(
    session: Session,
    path: Annotated[str, typer.Argument()],
    new_path: Annotated[str | None, typer.Argument(show_default=False)] = None,
    using: Using = None,
) -> None:
    """Give a file another path, for which no byte moves, or move its bytes to another original with --using."""
    if new_path is None and using is None:
        raise ConfigurationError("where to? aproxy mv PATH NEW_PATH, or aproxy mv PATH --using ORIGINAL")
    storage = await session.storage()
    if using is not None:
        record = await storage.move(path, using)
        session.did("moved", path, record.size, told=True, original=using)
    if new_path is not None:
        target = beside(storage, path, new_path)
        await storage.rename(path, target)
        session.did("renamed", target, told=True, old_path=path)


async def cp(
    session: Session,
    path: Annotated[str, typer.Argument()],
    new_path: Annotated[str, typer.Argument()],
    using: Using = None,
) -> None:
    """Copy a file; the copy has bytes of its own. If the path is taken, it gets the next free one, which is printed."""
    storage = await session.storage()
    copied = await storage.copy(path, beside(storage, path, new_path).removeprefix(storage.prefix), using=using)
    session.did("copied", copied, told=True, source=path)


async def _forget(storage: ProxyStorage, path: str) -> None:
    record = await _settled(storage, path)
    await storage.meta.delete(record.path, expect=record.revision)


async def _settled(storage: ProxyStorage, path: str) -> MetaRecord:
    """Return the record of a file of which nobody is at anything."""
    record = await storage.get(path)
    if record.lease is not None:
        raise Conflict(
            f"something is left to do for {record.path!r}: after a restore aproxy reconcile --restored --apply ends"
            " it, else aproxy reconcile --apply",
            path=record.path,
        )
    return record


async def adopt(
    session: Session,
    key: Annotated[str, typer.Argument(help="Where the bytes are in the original.")],
    path: Annotated[str | None, typer.Argument(help="Its path; the key by default.", show_default=False)] = None,
    using: Annotated[
        str | None, typer.Option("--using", metavar="ORIGINAL", help="Where the bytes are.", show_default=False)
    ] = None,
    instead: Annotated[
        bool, typer.Option("--instead", help="PATH has a record: let it stand for these bytes, as they are now.")
    ] = False,
) -> None:
    """Give a record to bytes that are in an original already. They are not touched."""
    storage = await session.storage()
    if instead:
        adopted = beside(storage, key, key if path is None else path)
        await _adopt_instead(storage, key, adopted, using)
    else:
        name = None if path is None else beside(storage, key, path).removeprefix(storage.prefix)
        adopted = await storage.adopt(key, name=name, using=using)
    session.did("adopted", adopted, told=True, key=key)


async def _adopt_instead(storage: ProxyStorage, key: str, path: str, using: str | None) -> None:
    """Let the record of `path` name the bytes at `key`, of the size that they have. Copies of former ones go later.

    Raises:
        Conflict: they carry the token of another file. AlreadyExists: another record names them. And as `_settled`.
    """
    record = await _settled(storage, path)
    original = using or record.original_storage_name or next(iter(storage.originals))
    info = await storage.get_original(original).stat(key)
    if info.token not in (None, record.token):
        raise Conflict(
            f"the bytes at {original}:{key} were not written for {path!r}, but for another file: without --instead they"
            " get a record of their own",
            path=path,
        )
    owners = (await storage.meta.owners(original, [key])).get(key, ())
    if others := [owner for owner in owners if owner != record.path]:
        raise AlreadyExists(f"the bytes at {original}:{key} belong to {others[0]!r} already", path=key)
    # Out of a backup, a copy may be another file's by now: only what carries our token goes, where that can be told.
    copies = tuple(
        replace(place, state="settling")
        for place in record.places
        if (place.original, place.key) != (original, key) and storage.get_original(place.original).capabilities.tokens
    )
    changes = {
        "original_storage_name": original,
        "original_storage_path": key,
        "size": info.size,
        "checksum": None,
        "places": copies,
    }
    await storage.journal.change(record, changes, lease=storage.journal.lease_for(copies))


def beside(storage: ProxyStorage, path: str, new_path: str) -> str:
    """Return the full new path: below it, if it is a directory, within the prefix of the storage."""
    if new_path.endswith("/"):
        new_path += path.rpartition("/")[2]
    return new_path if new_path.startswith(storage.prefix) else storage.prefix + new_path
