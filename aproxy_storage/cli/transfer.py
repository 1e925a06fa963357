"""``put``, ``get`` and ``cat``: files in and out."""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
import sys
from collections.abc import AsyncIterator, Iterable, Iterator
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from stat import S_ISREG
from typing import Annotated

import typer

from ..config import EMBEDDED
from ..errors import AlreadyExists, ConfigurationError, ContentError, IntegrityError, StorageError
from ..proxy import ProxyStorage
from ..records import ByteRange, MetaRecord
from ..tools.bulk import run_many
from ..tools.migrate import why_taken
from .output import Bar, WatchedFile, duration, size
from .session import Session, command
from .trees import Draft, Local, batches, files_below, has_bytes_of, named, target_below, to_its_end

__all__ = ["OnConflict", "put_files", "register"]

_LARGE = 32 << 20  # bytes from which on a file moves the bar while it is under way
_LOOK_UP = 200  # files whose records are asked for at once

Concurrency = Annotated[int, typer.Option("--concurrency", "-j", min=1, help="Files at a time.")]


class OnConflict(StrEnum):
    """What to do with a file whose path is taken by one with other bytes."""

    fail = "fail"
    overwrite = "replace"
    keep_both = "keep-both"
    skip = "skip"


def register(app: typer.Typer) -> None:
    """Add these commands to `app`."""
    command(app, creates=True)(put)
    command(app)(get)
    command(app)(cat)


# -- put


@dataclass(frozen=True, slots=True)
class _Item:
    local: Local
    path: str
    record: MetaRecord | None


async def put(
    session: Session,
    sources: Annotated[
        list[str], typer.Argument(metavar="FILE", help="Files; - is standard input, ./- a file of that name.")
    ],
    to: Annotated[
        str | None,
        typer.Option("--to", "-t", metavar="PATH", help="Path of a single one; of several, or with a / at its end, "
                     "the directory.", show_default=False),
    ] = None,
    recursive: Annotated[bool, typer.Option("--recursive", "-r", help="Directories with all that is below.")] = False,
    on_conflict: Annotated[
        OnConflict, typer.Option("--on-conflict", help="If the path holds other bytes.")
    ] = OnConflict.fail,
    using: Annotated[
        str | None, typer.Option("--using", metavar="ORIGINAL", help="Where the bytes go.", show_default=False)
    ] = None,
    repair: Annotated[
        bool, typer.Option("--repair", help="Read what would be skipped, and replace it if it is damaged or gone.")
    ] = False,
    concurrency: Concurrency = 32,
) -> None:  # fmt: skip
    """Store files, or whole trees with -r.

    Files that are there already with the same checksum are skipped, so that the command can be repeated until all is
    there. Links to files are followed, links to directories are not. Below a directory, the configuration file and what
    its storages keep on this machine are left out.
    """
    storage = await session.storage()
    if using is not None:
        storage.get_original(using)
    with contextlib.suppress(StorageError):  # what a killed run was amid, and whose lease is over, is in our way
        await storage.tidy()
    if "-" in sources:
        if sources != ["-"] or not to or to.endswith("/"):
            raise ConfigurationError("standard input goes alone and needs a path: aproxy put - --to PATH")
        await _put_stdin(session, storage, to, on_conflict, using)
        return
    wanted = named([Path(source) for source in sources], to)
    spare = await asyncio.to_thread(_left_out, session, storage, sources)

    def files() -> Iterator[Local]:
        for source, name in wanted:
            yield from files_below(source, name, recursive=recursive, spare=spare)

    total = None
    if session.out.terminal:
        total = await asyncio.to_thread(lambda: sum(1 for _ in files()))
    began = asyncio.get_running_loop().time()
    with session.out.progress("storing", total) as bar:
        await put_files(
            session, storage, files(), bar,
            on_conflict=on_conflict, using=using, repair=repair, concurrency=concurrency,
        )  # fmt: skip
    took = asyncio.get_running_loop().time() - began
    if session.tally.counts.get("stored", 0) > 1:
        count, amount = session.tally.counts["stored"], session.tally.bytes
        speed = f"{count / took:,.0f} files/s, {size(round(amount / took))}/s"
        session.out.note(f"{size(amount)} in {duration(took)}: {speed}")


def _left_out(session: Session, storage: ProxyStorage, sources: Iterable[str]) -> frozenset[str]:
    """Return what is not sent of a tree that it lies in; but for the storage itself, what is in `sources` is."""
    others = {place for other in session.storages.values() for place in _own_places(other)}
    if session.config_file is not None:
        others.add(os.path.realpath(session.config_file))  # it may hold passwords
    return _own_places(storage) | (others - {os.path.realpath(source) for source in sources})


def _own_places(storage: ProxyStorage) -> frozenset[str]:
    """Return where the storage itself lies on this machine: a tree that it lies in is stored without it."""
    directories = [EMBEDDED, *(backend._local_root() for backend in storage.originals.values())]
    places = frozenset(os.path.realpath(place) for place in directories if place is not None)
    return places.union(storage.meta._local_files())


async def put_files(
    session: Session,
    storage: ProxyStorage,
    files: Iterator[Local],
    bar: Bar,
    *,
    on_conflict: OnConflict = OnConflict.fail,
    using: str | None = None,
    repair: bool = False,
    concurrency: int = 32,
) -> None:
    """Store `files`, a bounded number at a time; tell what became of each."""

    async def items() -> AsyncIterator[_Item]:
        async for batch in batches(files, _LOOK_UP):
            paths = [storage.prefix + local.name for local in batch]
            records = await storage.get_many(paths)
            for local, path, record in zip(batch, paths, records, strict=True):
                yield _Item(local, path, record)

    async def work(item: _Item) -> tuple[str, str]:
        return await _put_one(storage, item, bar, on_conflict, using, repair)

    results = run_many(storage, items(), work, name=lambda item: item.local, concurrency=concurrency)
    async with contextlib.aclosing(results):
        async for result in results:
            local: Local = result.item
            stored = False
            if result.error is not None:
                session.failed(local.name, result.error, file=str(local.file))
            else:
                assert result.value is not None
                action, path = result.value
                stored = action in ("stored", "replaced", "repaired")
                session.did(
                    action, path, local.size if stored else 0, told=path != storage.prefix + local.name,
                    file=str(local.file), size=local.size,
                )  # fmt: skip
            moved_itself = (stored or not result.ok) and _is_watched(bar, local.size)
            bar.advance(0 if moved_itself else local.size)
    with contextlib.suppress(StorageError):
        await storage.tidy()


async def _put_one(
    storage: ProxyStorage, item: _Item, bar: Bar, on_conflict: OnConflict, using: str | None, repair: bool
) -> tuple[str, str]:
    local, path, record = item.local, item.path, item.record
    if local.error is not None:
        raise local.error
    if record is None:
        try:
            # At exactly this path: another name would be another file each time that the command is repeated.
            with _content(local, bar) as content:
                return "stored", (await storage.write_to(path, content, exclusive=True, using=using)).path
        except AlreadyExists as error:
            (record,) = await storage.get_many([path])
            if record is None and not (on_conflict is OnConflict.keep_both and await _is_anothers(storage, path)):
                raise await why_taken(storage, path) from error
    if record is None:
        with _content(local, bar) as content:
            return "stored", await storage.save(local.name, content, using=using)
    if await has_bytes_of(local.file, record):
        if not repair or await _is_sound(storage, record):
            return "skipped", path
        action = "repaired"
    elif on_conflict is OnConflict.overwrite:
        action = "replaced"
    elif on_conflict is OnConflict.keep_both:
        with _content(local, bar) as content:
            return "stored", await storage.save(local.name, content, using=using)
    elif on_conflict is OnConflict.skip:
        return "kept", path
    else:
        raise _taken(path, record)
    with _content(local, bar) as content:
        await storage.replace(path, content, using=using)
    return action, path


async def _is_anothers(storage: ProxyStorage, path: str) -> bool:
    """Return whether a path is that of another storage, which shares the records."""
    record = (await storage.meta.get_many([path]))[0]
    return record is not None and record.proxy_storage_name != storage.name


def _is_watched(bar: Bar, count: int | None) -> bool:
    return bar.shown and (count or 0) >= _LARGE


@contextlib.contextmanager
def _content(local: Local, bar: Bar) -> Iterator[Path | WatchedFile]:
    """Give the path, which is fastest; of a large file, where somebody watches, a file that moves the bar."""
    if not _is_watched(bar, local.size):
        yield local.file
        return
    try:
        file = WatchedFile(local.file, bar)
    except OSError as error:
        raise ContentError(f"cannot read {local.file}: {error.strerror}") from error
    with file:
        yield file


async def _is_sound(storage: ProxyStorage, record: MetaRecord) -> bool:
    try:
        async with storage.open_current(record, verify=True) as file:
            async for _ in file:
                pass
    except IntegrityError:
        return False
    return True


def _taken(path: str, record: MetaRecord) -> AlreadyExists:
    why = "other bytes" if record.checksum else "bytes that cannot be compared, for want of a checksum"
    return AlreadyExists(
        f"{path!r} is stored already, with {why}; --on-conflict replace, keep-both or skip says what to do", path=path
    )


async def _put_stdin(
    session: Session, storage: ProxyStorage, name: str, on_conflict: OnConflict, using: str | None
) -> None:
    path = storage.prefix + name
    # Unbuffered, and not sys.stdin: a thread that waits in its lock would keep the interpreter from ending.
    with os.fdopen(os.dup(0), "rb", buffering=0) as stdin:
        taken = await storage.exists(path)
        if taken and on_conflict is OnConflict.fail:
            raise _taken(path, await storage.get(path))
        if taken and on_conflict is OnConflict.skip:
            session.did("kept", path, told=True)
        elif taken and on_conflict is OnConflict.overwrite:
            record = await storage.replace(path, stdin, using=using)
            session.did("replaced", path, record.size, told=True, size=record.size)
        else:
            if taken or (on_conflict is OnConflict.keep_both and await _is_anothers(storage, path)):
                record = await storage.get(await storage.save(name, stdin, using=using))
            else:
                try:
                    record = await storage.write_to(path, stdin, exclusive=True, using=using)
                except AlreadyExists as error:
                    raise await why_taken(storage, path) from error
            session.did("stored", record.path, record.size, told=True, size=record.size)


# -- get


async def get(
    session: Session,
    path: Annotated[str, typer.Argument(help="A path; with -r a directory, or . for everything.")],
    output: Annotated[
        str | None,
        typer.Option("--output", "-o", metavar="FILE", help="File to write to; a directory, if it is one or ends in /.",
                     show_default=False),
    ] = None,
    recursive: Annotated[bool, typer.Option("--recursive", "-r", help="All files below PATH.")] = False,
    force: Annotated[bool, typer.Option("--force", "-f", help="Overwrite local files with other bytes.")] = False,
    concurrency: Concurrency = 8,
) -> None:  # fmt: skip
    """Fetch a file, or a tree with -r; every checksum is verified.

    A local file appears when it is whole and verified. One that is there already with the same checksum is skipped.
    """
    storage = await session.storage()
    if not recursive:
        record = await storage.get(path)
        name = record.path.rpartition("/")[2]
        target = Path(output or name)
        if output and (output.endswith("/") or await asyncio.to_thread(os.path.isdir, output)):
            target = target_below(target, name)
        with session.out.progress("fetching", 1) as bar:
            action = await _get_one(storage, record, target, force, bar)
        session.did(action, path, record.size, told=True, file=str(target))
        return
    prefix = directory_prefix(storage, path)
    root = Path(output) if output is not None else Path(prefix.rstrip("/").rpartition("/")[2] or ".")

    async def work(record: MetaRecord) -> tuple[str, Path]:
        target = target_below(root, record.path.removeprefix(prefix))
        return await _get_one(storage, record, target, force, bar), target

    total = None
    if session.out.terminal:
        total = await storage.meta.count(prefix, proxy_storage_name=storage.name, state="stored")
    found = 0
    with session.out.progress("fetching", total) as bar:
        results = run_many(storage, storage.list(prefix), work, name=lambda record: record, concurrency=concurrency)
        async with contextlib.aclosing(results):
            async for result in results:
                found += 1
                record = result.item
                if result.error is not None:
                    session.failed(record.path, result.error)
                else:
                    assert result.value is not None
                    action, target = result.value
                    session.did(action, record.path, record.size if action == "fetched" else 0, file=str(target))
                bar.advance()
    if not found:
        raise ContentError(f"there is nothing below {prefix!r}")


def directory_prefix(storage: ProxyStorage, path: str) -> str:
    """Return what the paths of all files below the directory `path` begin with; ``.`` is the topmost.

    Raises:
        ConfigurationError: nothing is named, as by an unset variable of a script.
    """
    if not path.strip("/"):
        raise ConfigurationError(f"{path!r} names no directory; . is everything")
    return storage.prefix if path == "." else path.rstrip("/") + "/"


async def _get_one(storage: ProxyStorage, record: MetaRecord, target: Path, force: bool, bar: Bar) -> str:
    if await asyncio.to_thread(os.path.lexists, target):
        target = await asyncio.to_thread(_followed, target)
        if await asyncio.to_thread(os.path.isfile, target) and await has_bytes_of(target, record):
            return "skipped"
        if not force:
            raise AlreadyExists(f"{target} is there already, with other bytes; --force overwrites it")
    draft = Draft(target)
    try:
        async with storage.open_current(record, verify=record.checksum is not None) as file:
            await to_its_end(draft.create)
            async for chunk in file:
                await to_its_end(draft.write, chunk)
                bar.moved(len(chunk))
        await to_its_end(draft.publish, replace=force)
    finally:
        draft.withdraw()
    return "fetched"


def _followed(target: Path) -> Path:
    """Return the file that `target` is or, as a link, leads to; a link that leads nowhere itself.

    Raises:
        AlreadyExists: it is a directory, a device or the like, which no file is put in the place of.
    """
    try:
        status = target.stat()
    except OSError:
        return target
    if not S_ISREG(status.st_mode):
        raise AlreadyExists(f"{target} is there already, and is no regular file; cat writes to where > leads")
    return target.resolve()


# -- cat


async def cat(
    session: Session,
    paths: Annotated[list[str], typer.Argument(metavar="PATH")],
    byte_range: Annotated[
        str | None,
        typer.Option("--range", metavar="RANGE", help="As in HTTP: 0-99 the first hundred bytes, 100- all from there, "
                     "-100 the last hundred.", show_default=False),
    ] = None,
) -> None:  # fmt: skip
    """Write files to standard output."""
    part = None if byte_range is None else _range(byte_range)
    storage = await session.storage()
    sys.stdout.flush()
    for path in paths:
        try:
            async for chunk in storage.stream(path, byte_range=part):
                # In this thread: a write that waits for its reader is ended by a second Ctrl-C.
                sys.stdout.buffer.write(chunk)
                sys.stdout.buffer.flush()
        except StorageError as error:
            session.failed(path, error)


def _range(text: str) -> ByteRange:
    found = re.fullmatch(r"(\d*)-(\d*)", text.strip())
    if found is None or not (found[1] or found[2]):
        raise ConfigurationError(f"--range {text!r}: write 0-99, 100- or -100")
    first, last = found.groups()
    if not first:
        return ByteRange.last(int(last))
    if last and int(last) < int(first):
        raise ConfigurationError(f"--range {text!r} ends before it begins")
    return ByteRange(int(first), int(last) + 1 if last else None)
