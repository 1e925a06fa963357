"""The asynchronous twins of a storage's methods: they await the ProxyStorage, and know nothing of the bridge."""

from __future__ import annotations

import asyncio
import logging
import os
from collections.abc import AsyncIterator, Mapping, Sequence
from contextvars import ContextVar
from datetime import UTC, datetime
from functools import partial
from typing import Any

from asgiref.sync import sync_to_async
from django.conf import settings
from django.core.files.utils import validate_file_name

from aproxy_storage import (
    AlreadyExists,
    AsyncWriter,
    Conflict,
    InvalidPath,
    MetaRecord,
    NotFound,
    NotSupported,
    StorageError,
)
from aproxy_storage.content import Source
from aproxy_storage.files import Opening, chunks_of
from aproxy_storage.paths import alternative

from .base import ConfiguredStorage, Saving, asked, file_of, plain, suspicious, url_below, wished

__all__ = ["AsyncTwins", "as_set", "awaited"]

_log = logging.getLogger(__name__)

_PAUSES = (0.0, 0.02, 0.05, 0.1, 0.2)  # seconds before each try to give a file that was overwritten its own key
_UNDER_WAY = frozenset({"doubtful", "settling", "surplus"})  # places of which somebody else takes care just now

#: Whether synchronous code is called for a coroutine, which has a deadline and whose thread others wait for.
awaited: ContextVar[bool] = ContextVar("sync_bridge.awaited", default=False)


class AsyncTwins(ConfiguredStorage):
    """``asave aopen adelete aexists asize aurl alistdir`` and the like."""

    async def asave(
        self,
        name: str | os.PathLike[str] | None,
        content: Any,
        max_length: int | None = None,
        *,
        using: str | None = None,
        original_storage_path: str | None = None,
        content_type: str | None = None,
        extra: Mapping[str, Any] | None = None,
    ) -> str:
        """Store `content`, as `save`; it may also be an asynchronous file or iterator.

        Blocking content is read in a worker thread. A ``get_available_name`` of a subclass is called in a thread.

        Raises:
            ContentError: the content failed; its error is the cause. Otherwise as `save`.
        """
        if original_storage_path:
            given = wished(name) if name is not None else None
            return await self._adopt(
                original_storage_path, name=given, using=using, content_type=content_type, extra=extra
            )
        target = wished(content.name if name is None else name)
        if self._has_to_choose(target, max_length) or (
            not self.allow_overwrite and await self._ais_on_disk(self.proxy.prefix + target)
        ):
            token = awaited.set(True)
            try:
                target = await sync_to_async(self.get_available_name)(target, max_length=max_length)
            finally:
                awaited.reset(token)
            validate_file_name(target, allow_relative_path=True)
        try:
            path = await self._store(target, content, Saving(max_length, using, content_type, extra))
        except InvalidPath as error:
            raise suspicious(error) from error
        validate_file_name(path, allow_relative_path=True)
        return path

    def aopen(self, name: str | os.PathLike[str] | MetaRecord, mode: str = "rb") -> Opening[Any]:
        """Open a file: ``async with storage.aopen(name) as file``; see `ProxyStorage.open`, of a record too.

        Raises (when awaited or entered):
            AlreadyExists: for writing, where the URL is the path and something without a record lies there;
            with ``"xb"`` also a file. SuspiciousFileOperation. And as `ProxyStorage.open`.
        """
        if isinstance(name, MetaRecord) and mode == "rb":
            return self.proxy.open(name)
        text = name.path if isinstance(name, MetaRecord) else asked(name)
        if mode in ("wb", "xb"):
            return Opening(partial(self._open_writer, text, mode))
        if mode != "rb" or (plain(text) == text and not self.read_through):
            return self.proxy.open(text, mode)  # type: ignore[call-overload, no-any-return]

        async def opened() -> Any:
            found = await self._found(text)
            return await (self.proxy.open_current(found) if isinstance(found, MetaRecord) else self.proxy.open(found))

        return Opening(opened)

    async def _open_writer(self, name: str, mode: str) -> AsyncWriter:
        path = self._full(await self._spelled(name))
        await self._touched(path)
        await self._check_recorded(path)
        try:
            file: AsyncWriter = await self.proxy.open(path, mode)  # type: ignore[call-overload]
        except InvalidPath as error:
            raise suspicious(error) from error
        if isinstance(file, AsyncWriter):  # not what an `open` of a subclass makes
            file._then = self._with_its_key
        return file

    def astream(self, name: str | os.PathLike[str] | MetaRecord) -> AsyncIterator[bytes]:
        """Iterate over the chunks of a file, for a StreamingHttpResponse; it closes itself. Of a record: of its file,
        or none, as `ProxyStorage.stream`."""
        where = self.proxy.meta.pin(name if isinstance(name, MetaRecord) else None)
        return chunks_of(lambda: self.aopen(name), where)

    async def adelete(self, name: str | os.PathLike[str] | MetaRecord) -> None:
        """Delete a file, as `delete`."""
        if not name:
            raise ValueError("The name must be given to delete().")
        await self.proxy.delete(await self._found(file_of(name)), missing_ok=True)

    async def aexists(self, name: str | os.PathLike[str]) -> bool:
        """Return whether there is such a file or directory, as `exists`."""
        text = asked(name)
        return await self._ahas_file(text) or await self._has_directory(text)

    async def _ahas_file(self, name: str) -> bool:
        if not name:
            return False
        found = await self._found(name)
        return isinstance(found, MetaRecord) or (not self.read_through and await self.proxy.exists(found))

    async def _has_directory(self, name: str) -> bool:
        """Return whether `name` is the root, or a name below which `alistdir` would find something."""
        text = name.strip("/")
        spellings = dict.fromkeys((text, plain(text)))
        if not spellings.keys().isdisjoint(("", ".")):
            return True
        own = self.proxy.prefix
        for spelling in spellings:
            prefix = f"{spelling}/"
            if [record async for record in self.proxy.list(own if own.startswith(prefix) else prefix, limit=1)]:
                return True
        return False

    async def asize(self, name: str | os.PathLike[str] | MetaRecord) -> int:
        """Return the size in bytes. Raises FileNotFoundError."""
        return await self.proxy.size(await self._found(file_of(name)))

    async def aurl(self, name: str | os.PathLike[str], **options: Any) -> str:
        """Return the URL as the record says: exact also where `url` can only say what it was by its name."""
        try:
            return await self.proxy.url(await self._found(asked(name)), **options)
        except NotSupported:
            if (base := self._given.get("base_url")) is None or options:
                raise
            return url_below(base, name)

    async def alistdir(self, path: str | os.PathLike[str]) -> tuple[list[str], list[str]]:
        """Return the names of the directories and of the files in a directory."""
        text = asked(path).strip("/")
        found = await self._listed(text)
        return found if any(found) or plain(text) == text else await self._listed(plain(text))

    async def _listed(self, text: str) -> tuple[list[str], list[str]]:
        prefix, own = "" if text in ("", ".") else f"{text}/", self.proxy.prefix
        if len(prefix) < len(own) and own.startswith(prefix):  # there the way to the files is all that there is
            found = [record async for record in self.proxy.list(own, limit=1)]
            return [own[len(prefix) :].partition("/")[0] for _ in found], []
        directories: list[str] = []
        files: list[str] = []
        async for entry in self.proxy.list(prefix, delimiter="/"):
            name = entry.path[len(prefix) :]
            if isinstance(entry, MetaRecord):
                files.append(name)
            else:
                directories.append(name.rstrip("/"))
        return directories, files

    async def aget_created_time(self, name: str | os.PathLike[str]) -> datetime:
        """Return when the file was stored."""
        return as_set((await self._record(name)).created_at)

    async def aget_modified_time(self, name: str | os.PathLike[str]) -> datetime:
        """Return when the bytes were written."""
        record = await self._record(name)
        backend = self.proxy.get_original(record.original_storage_name)
        changed = record.updated_at or record.created_at
        if backend.capabilities.modified_time:
            changed = (await backend.stat(record.original_storage_path)).modified_at or changed
        return as_set(changed)

    async def _record(self, name: str | os.PathLike[str]) -> MetaRecord:
        found = await self._found(asked(name))
        return found if isinstance(found, MetaRecord) else await self.proxy.get(found)

    async def _spelled(self, name: str) -> str:
        """Return `name`, or, unless there is a file of exactly that name, what it is without what means nothing in it.

        Old records may have any names; new ones have plain ones.
        """
        return name if plain(name) == name or await self.proxy.exists(name) else plain(name)

    async def _named(self, name: str | MetaRecord) -> str | MetaRecord:
        return name if isinstance(name, MetaRecord) else await self._spelled(name)

    async def _found(self, name: str | MetaRecord) -> str | MetaRecord:
        return name if isinstance(name, MetaRecord) else await self._touched(await self._spelled(name))

    async def _touched(self, name: str) -> str | MetaRecord:
        """Return `name`; with `read_through` its record, which it gets now if only the original has it."""
        if not self.read_through or not name:
            return name
        proxy = self.proxy
        try:
            return await proxy.get(name)
        except NotFound:
            pass
        key = name.removeprefix(proxy.prefix)
        for original in proxy.originals:
            try:
                await proxy.adopt(key, name=name, using=original)
                return await proxy.get(name)
            except (NotFound, AlreadyExists, InvalidPath):
                continue  # not there; or somebody else's; or adopted by somebody else at this moment
        return name

    async def _store(self, name: str, content: Any, saving: Saving) -> str:
        if self.allow_overwrite:
            return (await self._overwrite(name, content, saving=saving)).path
        return await self.proxy.save(
            name,
            content,
            max_length=saving.max_length,
            using=saving.using,
            content_type=saving.content_type,
            extra=saving.extra,
        )

    async def _overwrite(
        self,
        name: str,
        content: Any,
        *,
        exclusive: bool = False,
        over: MetaRecord | None = None,
        saving: Saving | None = None,
    ) -> MetaRecord:
        """Store at exactly `name`, a new file or, unless `exclusive`, in the place of the one there, or of `over`."""
        proxy, path, asks = self.proxy, self._full(await self._spelled(name)), saving or Saving()
        if over is not None:
            replaced = await self._replace_bytes(over, content, asks.content_type)
            return await self._with_its_key(await self._with_extra(replaced, asks.extra))
        await self._check_recorded(path)
        record = await proxy.write_to(
            path, content, exclusive=exclusive, using=asks.using, content_type=asks.content_type, extra=asks.extra
        )
        record = await self._with_extra(record, asks.extra)  # it may have been there before
        return await self._with_its_key(record)

    async def _with_extra(self, record: MetaRecord, extra: Mapping[str, Any] | None) -> MetaRecord:
        """Add `extra` to a file's extra fields, where they differ; return its record."""
        if extra is None or all(record.get(key) == value for key, value in extra.items()):
            return record
        return await self.proxy.update(record, extra={**record.extra, **extra})

    async def _replace_bytes(self, record: MetaRecord, content: Any, content_type: str | None) -> MetaRecord:
        """Replace those bytes of a file that `record` says, wherever they have been brought meanwhile."""
        # One for all tries: what can be read only once is refused then, not stored empty.
        source = self.proxy._source(content, None)
        try:
            return await self._replace_from(source, record, content_type)
        finally:
            if source is not content:
                await source.aclose(within=self.proxy.timeouts.cleanup)

    async def _replace_from(self, source: Source, record: MetaRecord, content_type: str | None) -> MetaRecord:
        while True:
            try:
                return await self.proxy.replace(
                    record.path, source, content_type=content_type, expect_version=record.revision
                )
            except Conflict as error:
                current = await self.proxy.get(record.path)
                # Not by the key, which comes back in a directory that is published.
                if (
                    not error.retryable
                    or record.checksum is None
                    or current.revision == record.revision  # it would be the same again
                    or (current.token, current.checksum) != (record.token, record.checksum)
                ):
                    raise
                record = current

    async def _check_recorded(self, path: str) -> None:
        """Refuse a name under which something without a record lies in a directory that is published: its URL would
        lead to that.

        Raises:
            AlreadyExists.
        """
        if not await self._ais_on_disk(path) or await self._is_known(path) or await self._owners_of(path):
            return
        raise AlreadyExists(
            f"{path!r} is in {self.proxy.get_original()} without a record; adopt it first, or take another name",
            path=path, backend=repr(self),
        )  # fmt: skip

    async def _owners_of(self, path: str) -> list[str]:
        """Return the paths of those files of ours that have the key of `path`: renamed, say, in a transaction."""
        proxy, key = self.proxy, path.removeprefix(self.proxy.prefix)
        owners = (await proxy.meta.owners(next(iter(proxy.originals)), [key])).get(key, ())
        records = await proxy.meta.get_many(owners) if owners else ()
        return [record.path for record in records if record is not None and record.proxy_storage_name == proxy.name]

    async def _is_known(self, path: str) -> bool:
        """Return whether there is a record of `path`, of whichever state: in a transaction that has deleted the file,
        its bytes wait for the commit."""
        if await self._ahas_file(path):
            return True
        try:
            await self.proxy.meta.get(path)
        except NotFound:
            return False
        return True

    async def _with_its_key(self, record: MetaRecord) -> MetaRecord:
        """In a directory that is published, give a file that has new bytes or a new path the key that its URL
        says; inside a transaction when that commits. Return its record."""
        if self._published is None or self._has_its_key(record):
            return record
        latest = record

        async def restore() -> None:
            nonlocal latest
            problem: object = "somebody else is at it"
            for pause in _PAUSES:
                await asyncio.sleep(pause)
                try:
                    latest = await self.proxy.restore_key(record.path)
                except NotFound:  # deleted; or renamed, and then there is a key for that name to be restored
                    return
                except Conflict as error:  # replaced or deleted at the same moment
                    problem = error
                    continue
                except StorageError as error:
                    problem = error
                    break
                if self._has_its_key(latest):
                    return
                if latest.token != record.token:  # another file by now, of which somebody else takes care
                    return
                if not any(place.state in _UNDER_WAY for place in latest.places):
                    seconds = self.proxy.journal.longest
                    problem = f"another file has it, or one of which a removal may be under way for {seconds:.0f} s"
                    break
            # It is stored, and can be read; only its URL leads nowhere.
            _log.warning(
                "%r could not be given its own key again: %s; proxystorage_reconcile --scan --apply does it",
                record.path,
                problem,
            )

        await self.proxy.meta.after_commit(restore)
        return latest

    def _has_its_key(self, record: MetaRecord) -> bool:
        return record.original_storage_path == record.path.removeprefix(self.proxy.prefix)

    async def restore_keys(
        self, paths: Sequence[str] | None = None, *, dry_run: bool = False
    ) -> Mapping[str, StorageError | None]:
        """In a directory that is published, give those files their own keys that simultaneous overwritings left
        without, so that their URLs lead to them again: of `paths`, or of all. Return their paths, with what is in the
        way."""
        found: dict[str, StorageError | None] = {}
        if self._published is None:
            return found
        async for record in self.proxy.list() if paths is None else self._records(paths):
            if not self._has_its_key(record):
                await self._restore_into(found, record, dry_run)
        tried = 0
        while tried != len(blocked := [path for path, problem in found.items() if isinstance(problem, AlreadyExists)]):
            tried = len(blocked)  # maybe by one another
            async for record in self._records(blocked):
                await self._restore_into(found, record, dry_run)
        return found

    async def _restore_into(self, found: dict[str, StorageError | None], record: MetaRecord, dry_run: bool) -> None:
        try:
            latest = record if dry_run else await self.proxy.restore_key(record.path)
            if dry_run or self._has_its_key(latest):
                found[record.path] = None
            elif not any(place.state in _UNDER_WAY for place in latest.places):
                found[record.path] = await self._obstacle(latest)
        except StorageError as error:
            found[record.path] = error

    async def _records(self, paths: Sequence[str]) -> AsyncIterator[MetaRecord]:
        for record in await self.proxy.get_many(list(dict.fromkeys(paths))):
            if record is not None:
                yield record

    async def _obstacle(self, record: MetaRecord) -> AlreadyExists:
        """Return why a file cannot be given its own key."""
        owners = await self._owners_of(record.path)
        who = f"belongs to {owners[0]!r}" if owners else "has something without a record"
        way = "that has to get its own first" if owners else "adopt that under another name, or move it away"
        return AlreadyExists(f"the key that its URL says {who}; {way}", path=record.path, backend=repr(self))

    async def _replace(self, name: str, content: Any, **options: Any) -> MetaRecord:
        return await self._with_its_key(await self.proxy.replace(await self._spelled(name), content, **options))

    async def _rename(self, name: str | MetaRecord, new_name: str) -> MetaRecord:
        await self._check_recorded(new_name)
        return await self._with_its_key(await self.proxy.rename(await self._named(name), new_name))

    async def _copy(self, name: str | MetaRecord, new_name: str, **options: Any) -> str:
        proxy, path = self.proxy, self.proxy.prefix + new_name
        while await self._ais_on_disk(path):
            longest = proxy.get_original().capabilities.max_segment_bytes
            path = alternative(path, max_bytes=proxy.max_path_bytes, max_segment_bytes=longest)
        return await proxy.copy(await self._named(name), path.removeprefix(proxy.prefix), **options)

    async def _move(self, name: str | MetaRecord, using: str) -> MetaRecord:
        return await self.proxy.move(await self._named(name), using)

    async def _update(self, name: str | MetaRecord, extra: Mapping[str, Any]) -> MetaRecord:
        return await self.proxy.update(await self._named(name), extra=extra)

    async def _get_many(self, names: Sequence[str]) -> Sequence[MetaRecord | None]:
        return await self.proxy.get_many([await self._spelled(name) for name in names])

    async def _adopt(self, original_storage_path: str, *, name: str | None = None, **options: Any) -> str:
        path = original_storage_path if name is None else name
        if path.removeprefix(self.proxy.prefix) != original_storage_path:
            await self._check_recorded(path)
        return await self.proxy.adopt(original_storage_path, name=name, **options)


def as_set(moment: datetime | None) -> datetime:
    """Return `moment` as Django's settings want it."""
    if moment is None:
        raise NotSupported("neither the record nor its original knows that time")
    return moment.astimezone(UTC) if settings.USE_TZ else moment.astimezone().replace(tzinfo=None)
