"""ProxyStorage: one storage over one or several originals and a meta-backend."""

from __future__ import annotations

import contextlib
import logging
import os
import time
from collections.abc import AsyncIterable, AsyncIterator, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar, Literal, Self

from .backends.base import DEFAULT_CHUNK_BYTES, Backend
from .cleanup import Cleanup
from .content import Source
from .errors import (
    AlreadyExists,
    ConfigurationError,
    Conflict,
    InvalidPath,
    NotFound,
    StorageError,
)
from .files import AsyncWriter
from .journal import Journal, Marked
from .meta_backends.base import UNCHANGED, MetaBackend
from .paths import MAX_PATH_BYTES, alternative, check_path, new_token
from .placement import First, Placement, Request
from .proxy_reading import Path, ReadingVerbs
from .records import MetaRecord
from .sniffing import guess_content_type
from .timeouts import Timeouts
from .writing import Writing

__all__ = ["Health", "Path", "ProxyStorage"]

_log = logging.getLogger(__name__)

Originals = Backend | Mapping[str, Backend] | Iterable[tuple[str, Backend]]

_RECORD_FIELDS = frozenset(MetaRecord.__dataclass_fields__)


@dataclass(frozen=True, slots=True)
class Health:
    """The answer of one original or meta-backend to a small question."""

    name: str
    error: StorageError | None

    @property
    def ok(self) -> bool:
        """Whether it answered."""
        return self.error is None


class ProxyStorage(ReadingVerbs):
    """Files in one or several original backends, with one record per file in a meta-backend.

    Args:
        name: written into every record; tells storages that share a meta-backend apart.
        originals: one backend (then named ``"default"``), a mapping, or pairs of name and backend.
        meta: the meta-backend.
        placement: which original a new file goes to; the first one by default.
        prefix: begins every path of this storage; keys in the originals are without it.
        keys: ``"path"``: ``hello.txt`` is ``hello.txt`` on the disk; ``"token"``: ``hello_TOKEN.txt``, never reused.
        timeouts: how long the caller's content and an undo may take; originals and meta-backend have their own.
        checksum: a name known to hashlib, or None for no checksum.
        chunk_bytes: how much is read or written at a time.
        durability: what "stored" survives: the death of the process (``"process"``), or the loss of power too.
        lease: seconds after which a save that gives no sign of life may be undone by others.
        settle: seconds after which an operation without an answer can no longer take effect.
        keep_replaced: seconds that replaced bytes stay, for those who read them or hold a signed URL to them.
        max_path_bytes: how long a new path may be, in UTF-8.

    A subclass may give `name`, `originals`, `meta` and `placement` as class attributes instead. The constructor only
    stores; an instance is a module-level constant, to be used from any event loop and after a fork. No verb keeps
    state on it.

    Every verb raises a `StorageError`: BackendUnavailable or DeadlineExceeded where an original or the meta-backend
    cannot be reached, InvalidPath for a name that can never be stored, and what it says itself.
    """

    name: str = ""
    originals: Mapping[str, Backend]
    meta: MetaBackend
    placement: Placement = First()

    #: Fields of the record that `get_data_for_meta_backend_save` of a subclass may set, e.g. {"content_type"}.
    hook_may_set: ClassVar[frozenset[str]] = frozenset()

    def __init__(
        self,
        name: str | None = None,
        *,
        originals: Originals | None = None,
        meta: MetaBackend | None = None,
        placement: Placement | None = None,
        prefix: str = "",
        keys: Literal["path", "token"] = "path",
        timeouts: Timeouts | None = None,
        checksum: str | None = "sha256",
        chunk_bytes: int = DEFAULT_CHUNK_BYTES,
        durability: Literal["process", "power"] = "process",
        lease: float = 60.0,
        settle: float = 900.0,
        keep_replaced: float = 60.0,
        max_path_bytes: int = MAX_PATH_BYTES,
    ) -> None:
        self.name = name if name is not None else self.name
        given = originals if originals is not None else getattr(type(self), "originals", None)
        self.originals = _named(given)
        meta = meta if meta is not None else getattr(type(self), "meta", None)
        if not self.name or not self.originals or meta is None:
            raise ConfigurationError("a ProxyStorage needs a name, at least one original and a meta-backend")
        self.meta = meta
        self.placement = placement if placement is not None else self.placement
        if prefix:
            prefix = check_path(prefix.rstrip("/")) + "/"
        if keys not in ("path", "token"):
            raise ConfigurationError(f"keys={keys!r}: either 'path' or 'token'")
        if durability not in ("process", "power"):
            raise ConfigurationError(f"durability={durability!r}: either 'process' or 'power'")
        if durability == "power" and not meta.durable:
            raise ConfigurationError(f"durability='power' needs a durable meta-backend; give {meta} durability='power'")
        if lease <= 0 or settle < 0 or keep_replaced < 0 or chunk_bytes < 1:
            raise ConfigurationError("lease and chunk_bytes must be positive, settle and keep_replaced not negative")
        self.prefix = prefix
        self.keys = keys
        self.timeouts = timeouts or Timeouts()
        self.checksum = checksum
        self.chunk_bytes = chunk_bytes
        self.durable = durability == "power"
        self.lease = lease
        self.settle = settle
        self.keep_replaced = keep_replaced
        self.max_path_bytes = max_path_bytes
        self.cleanup = Cleanup(f"storage {self.name!r}")
        self.journal = Journal(
            meta,
            self.get_original,
            self.cleanup,
            lease=lease,
            settle=settle,
            keep_replaced=keep_replaced,
            durable=self.durable,
        )
        self._writing = Writing(self)

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self.name!r}>"

    # -- hooks for subclasses

    async def choose_original(self, name: str, source: Source, **kwargs: Any) -> str | None:
        """Return the name of the original for a new file, or None to let the placement decide."""
        return None

    async def get_data_for_meta_backend_save(
        self, *, path: str, original_storage_path: str, original_name: str, content: Source, **kwargs: Any
    ) -> Mapping[str, Any]:
        """Return further fields for the record of a new file; they go to ``extra``, or to a model's own columns.

        Called once, before the reservation. ``await content.peek(n)`` shows up to 64 KiB of the content. The
        library's own fields win unless the class lists them in `hook_may_set`.
        """
        return {}

    # -- writing

    async def save(
        self,
        name: str | os.PathLike[str] | None,
        content: Any,
        *,
        using: str | None = None,
        content_type: str | None = None,
        extra: Mapping[str, Any] | None = None,
        max_length: int | None = None,
        size: int | None = None,
    ) -> str:
        """Store `content` under `name`, or under the next free name; return the path.

        Args:
            name: the wished path; None takes the name that the content carries.
            content: bytes, text, a path, a sync or async file, Django's File, an iterator of bytes (see `Source`).
                Never closed, a path never moved.
            using: the original to use, instead of what the placement says.
            content_type: by default guessed from the name, checked against the first bytes.
            extra: further fields for the record.
            max_length: of the returned path, in characters.
            size: the declared length in bytes.

        All or nothing: the file appears whole or, after an error, a cancellation or a crash, not at all.

        Raises:
            InvalidPath, ConfigurationError: before anything is written.
            ContentError: the content failed, or was shorter or longer than declared.
            OutOfSpace, AccessDenied, BackendUnavailable, DeadlineExceeded.
        """
        record = await self._save(
            name, content, using=using, content_type=content_type, extra=extra, max_length=max_length, size=size
        )
        return record.path

    async def _save(
        self,
        name: str | os.PathLike[str] | None,
        content: Any,
        *,
        using: str | None = None,
        content_type: str | None = None,
        extra: Mapping[str, Any] | None = None,
        max_length: int | None = None,
        size: int | None = None,
        exact: bool = False,
    ) -> MetaRecord:
        source = self._source(content, size)
        try:
            given = os.fspath(name) if name is not None else source.name
            if given is None:
                raise InvalidPath("the content carries no name, so save() needs one")
            path = self._new_path(given, exact=exact)
            candidates = await self._candidates(given, source, using, content_type, extra or {})
            if max_length is not None and len(path) > max_length:
                path = self._writing.next_name(path, candidates, max_length)
            for candidate in candidates:
                self.get_original(candidate).check_key(path.removeprefix(self.prefix))
            own: dict[str, Any] = {"name": given}
            if content_type is not None:
                own["content_type"] = content_type
            data: Mapping[str, Any] = {}
            if self._has_hook("get_data_for_meta_backend_save"):
                data = await self.get_data_for_meta_backend_save(
                    path=path,
                    original_storage_path=path.removeprefix(self.prefix),
                    original_name=given,
                    content=source,
                )
            fields = self._fields(own, extra or {}, data)
            return await self._writing.store(
                path,
                candidates,
                self._writing.write_of(source, given, fields.get("content_type")),
                fields,
                exact=exact,
                max_length=max_length,
                careful=not source.replayable and self.keys == "path",
            )
        except StorageError as error:
            error.located(operation="save", path=str(name) if name is not None else None, backend=repr(self))
            raise
        finally:
            await source.aclose()

    async def replace(
        self,
        path: str | os.PathLike[str],
        content: Any,
        *,
        using: str | None = None,
        content_type: str | None = None,
        expect_version: int | None = None,
        size: int | None = None,
    ) -> MetaRecord:
        """Give an existing file new bytes; return its new record.

        Readers get the old or the new file, never a mixture: the new bytes go under a new key, the record changes
        over in one step, the old ones go after `keep_replaced` seconds. Of simultaneous replacements the last to
        finish wins, unless `expect_version` (the ``version`` of the record that was looked at) pins one.

        Raises:
            NotFound: there is no such file. Conflict: it was deleted meanwhile, or is not at `expect_version`.
            And as `save`; the file is unchanged then.
        """
        source = self._source(content, size)
        try:
            record = await self.get(path)
            if expect_version is not None and record.version != expect_version:
                raise Conflict(
                    f"{record.path!r} is at version {record.version}, not {expect_version}",
                    operation="replace", path=record.path,
                )  # fmt: skip
            original = using or (await self._candidates(record.path, source, None, content_type, record.extra))[0]
            self.get_original(original)
            write = self._writing.write_of(source, record.path, content_type)
            return await self._writing.swap(record, original, write, {}, pinned=expect_version is not None)
        finally:
            await source.aclose()

    async def write_to(self, path: str, content: Any, *, exclusive: bool) -> MetaRecord:
        """Store at exactly `path`: a new file, or, unless `exclusive`, new bytes for the one there."""
        if not exclusive and await self.exists(path):
            return await self.replace(path, content)
        try:
            return await self._save(path, content, exact=True)
        except AlreadyExists:
            # Raised by the reservation, before any content was read.
            if exclusive or not await self.exists(path):
                raise
            return await self.replace(path, content)

    async def copy(self, path: Path, name: str | os.PathLike[str], *, using: str | None = None) -> str:
        """Copy a file to `name`, or to the next free name; return the path. The copy has bytes of its own.

        Raises:
            NotFound, IntegrityError: of the file that is copied. And as `save`.
        """
        new_path = self._new_path(os.fspath(name), exact=False)
        record = await self._record(path)
        original = using or record.original_storage_name or next(iter(self.originals))
        self.get_original(original).check_key(new_path.removeprefix(self.prefix))
        fields = {"name": os.fspath(name), "extra": record.extra}
        stored = await self._writing.store(new_path, [original], self._writing.transfer_of(record), fields)
        return stored.path

    async def move(self, path: Path, using: str) -> MetaRecord:
        """Move the bytes of a file into the original `using`; the path stays. Return the new record.

        Raises:
            NotFound, IntegrityError, Conflict (deleted or replaced meanwhile); the file is where it was then.
        """
        self.get_original(using)
        record = await self._record(path)
        if record.original_storage_name == using:
            return record
        return await self._writing.swap(record, using, self._writing.transfer_of(record), {}, pinned=True)

    async def rename(self, path: Path, new_path: str | os.PathLike[str]) -> MetaRecord:
        """Give a file another path; no byte moves. Return the new record.

        Raises:
            NotFound; AlreadyExists: `new_path` is taken; Conflict: changed by somebody else meanwhile.
        """
        target = self._new_path(os.fspath(new_path), exact=True)
        record = await self._record(path)
        if target == record.path:
            return record
        return await self.journal.publish(
            record,
            {"path": target, "original_storage_path": record.original_storage_path},
            lease=UNCHANGED,
        )

    async def adopt(
        self,
        original_storage_path: str,
        *,
        name: str | os.PathLike[str] | None = None,
        using: str | None = None,
        content_type: str | None = None,
        extra: Mapping[str, Any] | None = None,
    ) -> str:
        """Take in a file that is in an original already; return its path. Its bytes are not touched.

        From then on it is a file like any other: `delete` removes its bytes. No checksum is recorded.

        Raises:
            NotFound: there is nothing at that key. AlreadyExists: a record names these bytes already.
        """
        given = os.fspath(name) if name is not None else original_storage_path
        path = self._new_path(given, exact=True)
        original = using or next(iter(self.originals))
        info = await self.get_original(original).stat(original_storage_path)
        owners = (await self.meta.owners(original, [original_storage_path])).get(original_storage_path, ())
        if owners:
            raise AlreadyExists(
                f"the bytes at {original}:{original_storage_path} belong to {owners[0]!r} already",
                operation="adopt", path=original_storage_path,
            )  # fmt: skip
        kind = content_type or info.content_type or guess_content_type(given, b"")
        while True:
            record = MetaRecord(
                path=path,
                proxy_storage_name=self.name,
                original_storage_name=original,
                original_storage_path=original_storage_path,
                token=new_token(),
                version=1,
                size=info.size,
                content_type=kind,
                name=given,
                extra=dict(extra or {}),
            )
            try:
                adopted = await self.meta.create(record)
            except AlreadyExists:
                path = alternative(path, max_bytes=self.max_path_bytes)
                continue
            await self._give_way_to_rivals(adopted)
            return adopted.path

    async def _give_way_to_rivals(self, adopted: MetaRecord) -> None:
        """Withdraw a record if somebody else has adopted its bytes at the same time: of two at least one sees the
        other. Bytes of two files they must not be, for the end of one would be the end of both."""
        original, key = adopted.original_storage_name, adopted.original_storage_path
        try:
            owners = (await self.meta.owners(original, [key])).get(key, ())
        except StorageError as error:
            error.outcome_unknown = True  # the question has failed, but the file is adopted
            raise
        rivals = [owner for owner in owners if owner != adopted.path]
        if not rivals:
            return
        with contextlib.suppress(Conflict):
            await self.meta.delete(adopted.path, expect=adopted.revision)
        raise AlreadyExists(
            f"the bytes at {original}:{key} were taken for {rivals[0]!r} at the same time",
            operation="adopt", path=key,
        )  # fmt: skip

    async def update(self, path: Path, *, extra: Mapping[str, Any]) -> MetaRecord:
        """Replace the extra fields of a file's record; return the new record. The version does not move."""
        record = await self._record(path)
        return await self.meta.update(record.path, {"extra": dict(extra)})

    async def delete(self, path: Path, *, missing_ok: bool = False) -> None:
        """Delete a file. Once this has returned it stays deleted, whatever happens to the process.

        The record is marked first, then the bytes go; where an original cannot be reached just now, that is logged
        and `reconcile` removes them. A cancellation leaves the file either whole or deleted.

        Raises:
            NotFound: there is no such file, unless `missing_ok`.
        """
        try:
            record = await self._record(path)
            marked: Marked | None = None
            while marked is None:
                try:
                    marked = await self.journal.mark(record)
                except Conflict:  # renamed, replaced or deleted by somebody else: look again
                    record = await self.get(record.path)
        except NotFound:
            if missing_ok:
                return
            raise
        # J8: inside a caller's transaction the bytes go when it commits.
        await self.meta.after_commit(partial(self._sweep, marked))

    async def _sweep(self, marked: Marked) -> None:
        try:
            await self.journal.sweep(marked)
        except StorageError as error:
            _log.warning("the removal of %r is left to reconcile: %s", marked.record.path, error)
        except BaseException:
            # A discard that was cancelled may still be under way: the key is not free before `settle` is over.
            work = self.journal.sweep(marked, certain=False)
            await self.cleanup.finish(work, within=self.timeouts.cleanup, name=f"removal of {marked.record.path!r}")
            raise

    async def _open_writer(self, path: Path, mode: str) -> AsyncWriter:
        text = path.path if isinstance(path, MetaRecord) else os.fspath(path)
        if mode == "xb" or not await self.exists(text):
            self._new_path(text, exact=True)
        if mode == "xb" and await self.exists(text):
            raise AlreadyExists(f"{text!r} exists", operation="open", path=text, backend=repr(self))
        return AsyncWriter(self, text, mode, self.chunk_bytes)

    # -- many files

    def save_many(
        self, items: Iterable[Any] | AsyncIterable[Any], *, concurrency: int = 32, **options: Any
    ) -> AsyncIterator[Any]:
        """Save many; see `tools.bulk.save_many`."""
        from .tools.bulk import save_many

        return save_many(self, items, concurrency=concurrency, **options)

    def delete_many(
        self, paths: Iterable[Path] | AsyncIterable[Path], *, concurrency: int = 32, missing_ok: bool = False
    ) -> AsyncIterator[Any]:
        """Delete many; see `tools.bulk.delete_many`."""
        from .tools.bulk import delete_many

        return delete_many(self, paths, concurrency=concurrency, missing_ok=missing_ok)

    # -- life

    async def health(self) -> Sequence[Health]:
        """Ask every original and the meta-backend a small question; return their answers, ``"meta"`` last."""
        probe = f".health-{new_token()}"
        answers = [await _probe(name, backend.stat(probe)) for name, backend in self.originals.items()]
        return [*answers, await _probe("meta", self.meta.exists(probe))]

    async def tidy(self, *, limit: int = 500) -> int:
        """Finish what crashed or cancelled callers left and whose lease has run out; return how many records.

        A small `tools.reconcile.reconcile`, called by `save_many` and `aclose` too. Begins no further record after
        ``timeouts.cleanup`` seconds: with an original out of reach, each may take as long as its deadline.
        """
        done, until = 0, time.monotonic() + self.timeouts.cleanup
        for record in await self.meta.list_unfinished(proxy_storage_name=self.name, limit=limit):
            if time.monotonic() >= until:
                break
            await self.journal.finish(record)
            done += 1
        return done

    async def aclose(self) -> None:
        """Let cleanup end, finish what is left from crashes, release what the running loop holds; idempotent.

        Its originals and meta-backend are closed too; all open again on the next use, also for others who share them.
        """
        await self.cleanup.drain(within=self.timeouts.cleanup)
        try:
            await self.tidy()
        except StorageError as error:
            _log.info("storage %r could not tidy up on closing: %s", self.name, error)
        for backend in self.originals.values():
            await backend.aclose()
        await self.meta.aclose()

    async def __aenter__(self) -> Self:
        await self.meta.setup()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.aclose()

    # -- shared

    def _source(self, content: Any, size: int | None) -> Source:
        return Source.of(
            content,
            size=size,
            chunk_bytes=self.chunk_bytes,
            checksum=self.checksum,
            timeout=self.timeouts.source,
            spool=self.placement.tries_several,
        )

    def _new_path(self, name: str, *, exact: bool) -> str:
        """Return the legal new path for `name`. `exact` names hold the prefix already."""
        if exact and self.prefix:
            if not name.startswith(self.prefix):
                raise InvalidPath(f"{name!r} lies outside the prefix {self.prefix!r} of storage {self.name!r}")
            return check_path(name, max_bytes=self.max_path_bytes)
        return check_path(self.prefix + name, max_bytes=self.max_path_bytes)

    async def _candidates(
        self, name: str, source: Source, using: str | None, content_type: str | None, extra: Mapping[str, Any]
    ) -> Sequence[str]:
        chosen = using
        if chosen is None and self._has_hook("choose_original"):
            chosen = await self.choose_original(name, source)
        if chosen is not None:
            self.get_original(chosen)
            return [chosen]
        names = list(self.originals)
        if type(self.placement) is First:
            return names[:1]
        candidates = await self.placement.candidates(Request(name, source, content_type, extra), names)
        for candidate in candidates:
            self.get_original(candidate)
        if not candidates:
            raise ConfigurationError(f"the placement of storage {self.name!r} names no original for {name!r}")
        return candidates

    def _has_hook(self, name: str) -> bool:
        """Return whether a subclass has its own; a small save cannot afford to await what does nothing."""
        return getattr(type(self), name) is not getattr(ProxyStorage, name)

    def _fields(self, own: dict[str, Any], extra: Mapping[str, Any], data: Mapping[str, Any]) -> dict[str, Any]:
        if not extra and not data:
            return own
        merged = dict(extra)
        for key, value in data.items():
            if key not in _RECORD_FIELDS:
                merged[key] = value
            elif key in self.hook_may_set:
                own[key] = value
            elif key == "extra":
                merged.update(value)
        return {**own, "extra": merged}


def _named(originals: Originals | None) -> dict[str, Backend]:
    if originals is None:
        return {}
    if isinstance(originals, Backend):
        return {"default": originals}
    pairs = list(originals.items() if isinstance(originals, Mapping) else originals)
    named = dict(pairs)
    if len(named) != len(pairs):
        raise ConfigurationError(f"two originals have the same name: {[name for name, _ in pairs]}")
    if not all(isinstance(name, str) and name for name in named):
        raise ConfigurationError("every original needs a name that is not empty")
    return named


async def _probe(name: str, question: Any) -> Health:
    try:
        await question
    except NotFound:
        pass
    except StorageError as error:
        return Health(name, error)
    return Health(name, None)
