"""The writing verbs of a ProxyStorage, and the hooks by which a subclass takes part in them."""

from __future__ import annotations

import abc
import asyncio
import itertools
import logging
import os
import random
import time
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any, ClassVar, TypeVar

from .attempts import spent_on
from .content import Source
from .direct_uploads import DirectUpload, begin, finish
from .errors import AlreadyExists, ConfigurationError, Conflict, InvalidPath, NotFound, NotSupported, StorageError
from .file_writer import AsyncWriter
from .journal import Journal, Marked
from .paths import check_path
from .placement import First, Request
from .proxy_reading import Path, ReadingVerbs
from .records import DELETING, STORED, MetaRecord, Revision
from .timeouts import Timeouts
from .writing import Writing

__all__ = ["NOT_FOR_HOOKS", "WritingVerbs"]

_log = logging.getLogger(__name__)

T = TypeVar("T")

_MAX_TRIES = 10  # of an overwriting save whose path is now taken, now free; of a change that leaves its record alone
_PATIENCE = 10.0  # seconds that an overwriting save waits for somebody else's save of the same name

#: By these the journal goes.
NOT_FOR_HOOKS = frozenset(
    {
        "path",
        "proxy_storage_name",
        "original_storage_name",
        "original_storage_path",
        "state",
        "token",
        "version",
        "places",
    }
)

_RECORD_FIELDS = frozenset(MetaRecord.__dataclass_fields__)


class WritingVerbs(ReadingVerbs):
    """What changes the files of a storage. Each verb is done wholly or not at all."""

    timeouts: Timeouts
    checksum: str | None
    max_path_bytes: int
    lease: float
    settle: float
    tidy_every: float | None
    journal: Journal
    _writing: Writing
    _tidy_at: float

    #: Fields of the record that `get_data_for_meta_backend_save` of a subclass may set, e.g. {"content_type"}. None of
    #: those that say what and where the file is: a ConfigurationError.
    hook_may_set: ClassVar[frozenset[str]] = frozenset()

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
            name: the wished path; None takes the name that the content carries. A last part that is too long for the
                original is shortened, as the next free name would be.
            content: bytes, text, a path, a sync or async file, Django's File, an iterator of bytes (see `Source`).
                Never closed, a path never moved.
            using: the original to use, instead of what the placement says.
            content_type: by default guessed from the name, checked against the first bytes; where neither tells, what
                an upload declares, unless a browser would execute that.
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
            path = self._new_path(given, exact=exact, fits=exact)
            candidates = await self._candidates(given, source, using, content_type, extra or {})
            if not exact:
                path = self._writing.fitting(path, candidates, max_length)
            for candidate in candidates:
                self.get_original(candidate).check_key(path.removeprefix(self.prefix))
            # A wish of any length is no text for a column.
            own: dict[str, Any] = {"name": given if len(given) <= self.max_path_bytes else path}
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
                forced=using is not None,
            )
        except StorageError as error:
            error.located(operation="save", path=str(name) if name is not None else None, backend=repr(self))
            raise
        finally:
            if source is not content:
                await source.aclose(within=self.timeouts.cleanup)
            self._tidy_when_due()

    async def replace(
        self,
        path: str | os.PathLike[str],
        content: Any,
        *,
        using: str | None = None,
        content_type: str | None = None,
        expect_version: int | Revision | None = None,
        size: int | None = None,
    ) -> MetaRecord:
        """Give an existing file new bytes; return its new record.

        Readers get the old or the new file, never a mixture: the new bytes go under a new key, the record changes
        over in one step, the old ones go after `keep_replaced` seconds. Of simultaneous replacements the last to
        finish wins, unless `expect_version` pins one: the ``revision`` of the record that was looked at. A bare
        ``version`` cannot tell a file from one that was deleted and saved anew, because every new file begins with the
        same. The version moves with the places of the bytes too, as when `tidy` forgets replaced ones: a Conflict need
        not be a change of the file, so get the record again and compare what matters, its ``checksum`` above all.

        Raises:
            NotFound: there is no such file. Conflict: it was deleted meanwhile, or is not at `expect_version`.
            And as `save`; the file is unchanged then.
        """
        source = self._source(content, size)
        try:
            record = await self.get(path)
            if expect_version is not None:
                _check_revision(record, expect_version)
            candidates = await self._candidates(record.path, source, using, content_type, record.extra)
            write = self._writing.write_of(source, record.path, content_type)
            return await self._writing.swap(
                record, candidates, write, pinned=expect_version is not None, forced=using is not None
            )
        finally:
            if source is not content:
                await source.aclose(within=self.timeouts.cleanup)
            self._tidy_when_due()

    async def write_to(
        self,
        path: str,
        content: Any,
        *,
        exclusive: bool,
        using: str | None = None,
        content_type: str | None = None,
        extra: Mapping[str, Any] | None = None,
        size: int | None = None,
    ) -> MetaRecord:
        """Store at exactly `path`: a new file, or, unless `exclusive`, new bytes for the one there.

        The options are those of `save`; `extra` is for a new file only. Where somebody else is just saving a file of
        that name, that is waited for, unless `exclusive`.

        Raises:
            AlreadyExists: `exclusive`, and there is a file; or the path belongs to another storage.
            Conflict: somebody else has been saving a file of that name for more than 10 seconds. And as `save`.
        """
        source = self._source(content, size)  # one for both: a hook or the placement may look into it before `replace`
        options: dict[str, Any] = {"using": using, "content_type": content_type}
        try:
            for tries in itertools.count(1):
                if not exclusive and (found := await self._found(path)) is not None:
                    try:
                        return await self.replace(path, source, **options)
                    except (NotFound, Conflict):  # deleted meanwhile, perhaps while the content was written
                        now = await self._found(path)
                        if source.spent or tries == _MAX_TRIES or (now is not None and now.token == found.token):
                            raise
                        if now is not None:
                            continue
                try:
                    return await self._save(path, source, exact=True, extra=extra, **options)
                except AlreadyExists as error:
                    if exclusive:
                        raise
                    # Mostly raised by the reservation, before the content was read; else it is read again, or refused.
                    if source.spent:
                        raise spent_on(error)  # noqa: B904  it has its cause
                    # Where nobody has the path each time, its key is taken by something that has no record.
                    if tries == _MAX_TRIES or not await self._settles(path):
                        raise
            raise AssertionError("the last try returns or raises")
        finally:
            await source.aclose(within=self.timeouts.cleanup)

    async def _found(self, path: str) -> MetaRecord | None:
        try:
            return await self.get(path)
        except NotFound:
            return None

    async def _settles(self, path: str) -> bool:
        """Wait until `path`, at which nothing could be saved, is a file of ours, or free; return whether it ever is.

        Raises:
            Conflict: not while it was waited for.
        """
        until: float | None = None
        for pause in _pauses():
            try:
                record = await self.meta.get(path)
            except NotFound:
                return True
            if record.proxy_storage_name != self.name or record.state == DELETING:
                return False
            if record.state == STORED:
                return True
            now = time.monotonic()
            until = now + _PATIENCE if until is None else until
            if now >= until:
                break
            await asyncio.sleep(pause)
        raise Conflict(
            f"{path!r} is being saved by somebody else, or a save of it was killed; try again later",
            operation="save", path=path, backend=repr(self),
        )  # fmt: skip

    async def begin_upload(
        self,
        name: str | os.PathLike[str],
        *,
        max_bytes: int,
        using: str | None = None,
        content_type: str | None = None,
        extra: Mapping[str, Any] | None = None,
        max_length: int | None = None,
        expires_in: float = 3600.0,
    ) -> DirectUpload:
        """Reserve a name for a file that a browser uploads straight to an original; return its path and the form.

        The original, the first one that can unless `using` says which, refuses more than `max_bytes` bytes and another
        `content_type`, by default that of the name, else ``application/octet-stream``. There is no file until
        `finish_upload`; without that, reconcile undoes it some time after `expires_in` seconds.

        Raises:
            NotSupported: the original takes no such uploads, or the caller is inside a transaction.
            And as `save`.
        """
        own: dict[str, Any] = {"name": os.fspath(name)}
        if content_type is not None:
            own["content_type"] = content_type
        try:
            return await begin(
                self,
                self._new_path(os.fspath(name), exact=False),
                using,
                self._fields(own, extra or {}, {}),
                max_bytes=max_bytes,
                expires_in=expires_in,
                max_length=max_length,
            )
        finally:
            self._tidy_when_due()

    async def finish_upload(self, path: str) -> MetaRecord:
        """Make what was uploaded for `path` a file; return its record. Once finished, again is the same.

        Its bytes are copied on the server to where nobody can upload any more. No checksum is recorded. After an
        error or a cancellation it may be finished again while the form is good. Whether the caller may finish this
        path is not asked here.

        Raises:
            NotFound: nothing was uploaded yet, or there is no such upload (any more).
            Conflict: it is being finished, or undone, by somebody else. And as `copy`.
        """
        return await finish(self, path)

    async def update(self, path: Path, *, extra: Mapping[str, Any]) -> MetaRecord:
        """Replace the extra fields of a file's record; return the new record. The version does not move.

        Raises:
            NotFound: there is no such file; for a record also where another one has its name now.
            NotSupported: the database swallows the change without an error.
        """
        fields = {"extra": dict(extra)}
        return await self._change(path, lambda record: self.meta.update(record.path, fields, expect=record.revision))

    async def delete(self, path: Path, *, missing_ok: bool = False) -> None:
        """Delete a file. Once this has returned it stays deleted, whatever happens to the process.

        The record is marked first, then the bytes go; where an original cannot be reached just now, that is logged
        and `reconcile` removes them. A cancellation leaves the file either whole or deleted.

        Raises:
            NotFound: there is no such file, unless `missing_ok`; for a record also where another one has its name now.
            AccessDenied, NotSupported: the database would not let its record go; the file is as it was.
        """
        try:
            marked = await self._change(path, self.journal.mark)
        except NotFound:
            if missing_ok:
                return
            raise
        # J8: inside a caller's transaction the bytes go when it commits.
        await self.meta.after_commit(partial(self._sweep, marked))
        self._tidy_when_due()

    async def _change(self, path: Path, change: Callable[[MetaRecord], Awaitable[T]]) -> T:
        """Apply `change` to the record of `path`; where that has moved on meanwhile, to what it is by then.

        Where it has not, the database has undone the change, as in a deadlock, and does it a moment later; or never.

        Raises:
            NotFound: as `_again`. NotSupported: the record is as it was after every one of some tries.
        """
        record = await self._record(path)
        tries, pauses = 0, _pauses()
        while True:
            try:
                return await change(record)
            except Conflict as error:
                if not error.retryable:  # a rule of the database's, which it would break again
                    raise
                current = await self._again(path, record)
                tries = tries + 1 if current.revision == record.revision else 0
                if tries == _MAX_TRIES:
                    raise NotSupported(
                        f"{self.meta} does not change the record of {record.path!r}, though it is as it was: a trigger "
                        "or a row-level security policy swallows the change, or a transaction reads what others have "
                        f"changed since (the last try: {error})",
                        path=record.path,
                    ) from error
            if tries:
                await asyncio.sleep(next(pauses))
            record = current

    async def _sweep(self, marked: Marked) -> None:
        try:
            await self.journal.sweep(marked)
        except StorageError as error:
            _log.warning("the removal of %r is left to reconcile: %s", marked.record.path, error)
        except BaseException:
            work = self._sweep_again(marked)
            name = f"removal of {marked.record.path!r}"
            await self.cleanup.finish(work, within=self.timeouts.cleanup, name=name, context=self.meta._later())
            raise

    async def _sweep_again(self, marked: Marked) -> None:
        """Go on with a removal that was cancelled: a discard may still be under way, so that the key is not free
        before `settle` is over; or all was done, and path and key are another file's by now."""
        seconds = max(self.settle, self.lease)
        try:
            marked = await self.journal.mark(marked.record, lease=seconds)
        except Conflict:
            return
        await self.journal.sweep(marked, certain=False)

    async def _open_writer(self, path: Path, mode: str) -> AsyncWriter:
        text = path.path if isinstance(path, MetaRecord) else os.fspath(path)
        if mode == "xb" or not await self.exists(text):
            self._new_path(text, exact=True)
        if mode == "xb" and await self.exists(text):
            raise AlreadyExists(f"{text!r} exists", operation="open", path=text, backend=repr(self))
        return AsyncWriter(self, text, mode, self.chunk_bytes)

    # -- shared

    def _source(self, content: Any, size: int | None) -> Source:
        limits = self.placement.limits
        return Source.of(
            content,
            size=size,
            chunk_bytes=self.chunk_bytes,
            checksum=self.checksum,
            timeout=limits.source_timeout or self.timeouts.source,
            spool=self.placement.tries_several and limits.copies == 1 and limits.spool_bytes is not None,
            spool_bytes=limits.spool_bytes or 0,
        )

    def _new_path(self, name: str, *, exact: bool, fits: bool = True) -> str:
        """Return the legal new path for `name`. `exact` names hold the prefix already. Not `fits`: of any length."""
        if exact and self.prefix:
            if not name.startswith(self.prefix):
                raise InvalidPath(f"{name!r} lies outside the prefix {self.prefix!r} of storage {self.name!r}")
            return check_path(name, max_bytes=self.max_path_bytes)
        path = self.prefix + name
        return check_path(path, max_bytes=self.max_path_bytes if fits else 4 * len(path))

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
        return getattr(type(self), name) is not getattr(WritingVerbs, name)

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

    def _tidy_when_due(self) -> None:
        if self.tidy_every is not None and (now := time.monotonic()) >= self._tidy_at:
            self._tidy_at = now + self.tidy_every  # before it runs: not a second one beside it
            self.cleanup.start(self._tidy_quietly(), name="tidy", context=self.meta._later())

    @abc.abstractmethod
    async def _tidy_quietly(self) -> None: ...


def _pauses() -> Iterator[float]:
    """Yield the seconds between two looks at somebody else's save, without an end."""
    longest = 0.005
    while True:
        yield random.uniform(longest / 2, longest)
        longest = min(2 * longest, 0.2)


def _check_revision(record: MetaRecord, expected: int | Revision) -> None:
    token, version = (record.token, expected) if isinstance(expected, int) else expected
    if token != record.token:
        problem = f"{record.path!r} is another file by now: it was deleted, and saved anew"
    elif version != record.version:
        problem = f"{record.path!r} is at version {record.version}, not {version}"
    else:
        return
    raise Conflict(problem, operation="replace", path=record.path)
