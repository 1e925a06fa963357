"""Files below a directory of a POSIX file system."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import hashlib
import os
from collections.abc import AsyncIterator, Callable, Mapping
from dataclasses import replace
from datetime import UTC, datetime
from typing import Any, Self, TypeVar
from urllib.parse import quote

from ..blocking import blocking_loop, came_from_outside
from ..content import Source
from ..errors import BackendUnavailable, ConfigurationError, ContentError, InvalidPath, NotSupported, StorageError
from ..futures import seen
from ..paths import new_token
from ..records import ByteRange, Capabilities, ObjectInfo
from ..threads import Workers
from ..timeouts import Timeouts, progress
from ..urls import URL, boolean, mode, optional
from ._draft import CallersFile, Draft, hash_part
from ._file_chunks import FileChunks
from ._handles import HIDDEN, Opened
from ._posix import Permit, Tree
from ._strays import scan
from ._taking import TakenFile
from .base import Backend, Reader

__all__ = ["FileSystemBackend"]

T = TypeVar("T")

_SMALL = 256 << 10  # bytes that are written in one hop, and gathered for one
_SLICE = 4 << 20  # bytes copied by the kernel between two looks at whether anybody still wants them
_STRETCH = 0.02  # seconds of such copying in one hop
_HASHED = 64 << 20  # bytes of a copied file hashed in one hop
_PAGE = 500  # files whose sizes are looked up in one hop
_GRACE = 0.5  # seconds that a failed write waits for its rests to go when they cannot be seen any more


class FileSystemBackend(Backend):
    """Keeps objects as files below `root`; the key is the relative path.

    Args:
        root: the directory; may be a symbolic link itself. Nothing below it is reached through one.
        file_mode: of new files, exactly, whatever the umask; None leaves it to the umask. As Django's
            ``FILE_UPLOAD_PERMISSIONS``, and with its default.
        directory_mode: of every directory made, exactly, but for an inherited setgid bit; None leaves it to the umask.
        base_url: what `url` puts before the quoted key; None: there are no URLs.
        create_root: make `root`, not its parents, on first use. A root that was there once and is gone, or is
            another directory than before, is an unmounted disk: BackendUnavailable, and never made anew.
            `aclose` makes the backend accept the directory that is there then.
        max_workers: threads of this backend, and as many that copy large files; a hung disk blocks these and
            nothing else.
        timeouts: ``operation`` limits a call, ``idle`` each step of a read or a write.

    An object is written to a file that has no name (O_TMPFILE; where the file system has none: a hidden name,
    ``.aproxy-*.part``, beside it) and then linked, which never replaces anything. After a crash at most such a hidden
    file is left: `discard` with the token of the write removes it. A cancelled write is not seen; one that had just
    been published is removed again before the CancelledError leaves, whose ``outcome_unknown`` is then False.
    A temporary upload (``Source.temporary_path``) on the same mount is linked instead, and has both names until
    ``Source.taken`` is released, and until then no more permissions than it had; with `file_mode` None, or another
    name or owner, it is copied.
    Directories are made as needed, and removed when the last object below them is discarded.

    The token of a write is kept in the extended attribute ``user.aproxy.token``. A file system without these works,
    but `discard` with a token leaves the object there and logs a warning: it could be somebody else's.

    What lies below the root and is no object is never touched and not listed: links (AccessDenied where a key leads
    through one), special files, names that are not UTF-8; `list_strays` tells it. A key with a directory in its
    place is NotFound to readers and AlreadyExists to writers; a file in the place of a directory is InvalidPath to
    writers.

    A file that is overwritten or truncated in place by somebody else while it is read raises Conflict; one that is
    discarded is read to its end. The file system must have hard links, and be local or NFS 4.

    Memory: about three chunks a read, three chunks and 256 KiB a write besides those of the source; a listing holds
    the names of one directory a level.
    """

    capabilities = Capabilities(
        conditional_create=True,
        range_read=True,
        list=True,
        modified_time=True,
        server_copy=True,
        tokens=True,
        max_segment_bytes=255,
    )
    keeps_deadlines = True
    works_here = True

    def __init__(
        self,
        root: str | os.PathLike[str],
        *,
        file_mode: int | None = 0o644,
        directory_mode: int | None = None,
        base_url: str | None = None,
        create_root: bool = True,
        max_workers: int = 8,
        timeouts: Timeouts | None = None,
    ) -> None:
        self.root = os.path.abspath(root)
        self.base_url = base_url if base_url is None or base_url.endswith("/") else base_url + "/"
        super().__init__(timeouts=timeouts)
        modes: dict[str, Any] = {"file_mode": file_mode, "directory_mode": directory_mode}
        for name, given in modes.items():
            if not isinstance(given, int | None):
                raise ConfigurationError(f"{name}={given!r}: give a number, such as 0o644, or None")
        if base_url is not None:
            self.capabilities = replace(self.capabilities, url=True)
        self._tree = Tree(self.root, create=create_root, file_mode=file_mode, directory_mode=directory_mode)
        self._workers = Workers(f"files of {self.root}", max_workers)
        # Copying and hashing large files: on the workers of the small jobs these would wait behind them.
        self._bulk = Workers(f"copies of {self.root}", max_workers, share=1)

    @classmethod
    def from_url(cls, url: str) -> Self:
        """Make one of ``file:///srv/media?max_workers=4``, or of a relative ``file:media``.

        The parameters are the arguments of the class; modes are written ``0640``.
        """
        parsed = URL.parse(url)
        options = parsed.options(
            file_mode=optional(mode),
            directory_mode=optional(mode),
            base_url=str,
            create_root=boolean,
            max_workers=int,
            timeouts=True,
        )
        return cls(parsed.local_path(), **options)

    def __str__(self) -> str:
        return f"{type(self).__name__}({self.root!r})"

    def check_key(self, key: str) -> None:
        super().check_key(key)
        if HIDDEN in key and any(part.startswith(HIDDEN) for part in key.split("/")):
            raise InvalidPath(f"{key!r} is not a legal key here: names that begin with {HIDDEN!r} are temporaries")

    def full_path(self, key: str) -> str:
        return os.path.join(self.root, key)

    async def is_taken(self, key: str) -> bool:
        """Return whether anything is at `key` or in its way: an object, a directory, a link; also a link or a file in
        the place of one of its directories.

        Raises:
            AccessDenied, BackendUnavailable, DeadlineExceeded.
        """
        return await self._call("is_taken", key, self._is_taken(key), self.timeouts.operation)

    async def _is_taken(self, key: str) -> bool:
        return await self._workers.call(self._tree.is_taken, key, timeout=self.timeouts.operation)

    # -- writing

    async def _write(
        self,
        key: str,
        source: Source,
        *,
        content_type: str | None,
        metadata: Mapping[str, str],
        token: str | None,
        durable: bool,
    ) -> ObjectInfo:
        return await self._drafted("write", key, token, durable, functools.partial(self._fill, source))

    async def _copy(self, key: str, new_key: str, *, token: str | None, durable: bool) -> ObjectInfo:
        async def fill(draft: Draft) -> os.stat_result:
            opened = await self._workers.call(self._tree.open, key, timeout=self.timeouts.idle)
            await self._copy_file(draft, opened, None)
            return await self._step(draft, draft.finish, b"")

        return await self._drafted("copy", new_key, token, durable, fill)

    async def _drafted(
        self, operation: str, key: str, token: str | None, durable: bool, fill: Callable[[Draft], Any]
    ) -> ObjectInfo:
        token = token or new_token()
        draft = Draft(self._tree, key, token, durable=durable)
        try:
            status = await fill(draft)
        except BaseException as error:
            await self._give_up(draft)
            unknown = not draft.certain
            if isinstance(error, StorageError | asyncio.CancelledError):
                error.outcome_unknown = unknown  # type: ignore[union-attr]
            elif unknown and isinstance(error, Exception) and not came_from_outside(error):
                mapped = self._located(error, operation, key)
                mapped.outcome_unknown = True
                raise mapped from error
            raise
        if draft.pinned:
            with contextlib.suppress(BackendUnavailable):  # too many jobs wait: then it is closed here
                self._workers.call(draft.unpin, timeout=None)
        return _info(key, status, token)

    async def _give_up(self, draft: Draft) -> None:
        draft.withdraw()
        if blocking_loop() is not None:
            draft.leave()
        if not draft.left:
            return
        within = min(_GRACE, self.timeouts.cleanup) if draft.certain else self.timeouts.cleanup
        try:
            await self.cleanup.finish(self._tidy(draft), within=within, name=f"undo of the write of {draft.key!r}")
        except asyncio.CancelledError as error:
            error.outcome_unknown = not draft.certain  # type: ignore[attr-defined]
            raise

    async def _tidy(self, draft: Draft) -> None:
        loop = asyncio.get_running_loop()
        idle = loop.create_future()

        def wake() -> None:
            with contextlib.suppress(RuntimeError):  # the loop is closed
                loop.call_soon_threadsafe(idle.set_result, None)

        if draft.when_idle(wake):
            await asyncio.wait([idle])  # unlike a plain await, leaves `idle` alone when cancelled
        if draft.left:
            await self._workers.call(draft.remove, timeout=self.timeouts.operation)

    def _step(self, draft: Draft, step: Callable[..., T], *args: Any) -> asyncio.Future[T]:
        return self._workers.call(draft.run, step, *args, timeout=self.timeouts.idle)

    def _bulk_step(self, draft: Draft, step: Callable[..., T], *args: Any) -> asyncio.Future[T]:
        return self._bulk.call(draft.run, step, *args, timeout=self.timeouts.idle)

    async def _fill(self, source: Source, draft: Draft) -> os.stat_result:
        data = source.data
        if data is not None and len(data) <= _SMALL:
            return await self._step(draft, draft.create, data)
        if data is not None:
            return await self._pour(source, data, draft)
        path = source.temporary_path or source.path
        if path is None:
            return await self._stream(source, draft)
        movable = source.temporary_path is not None
        try:
            opened = await source.ask(CallersFile.open, path, -1 if movable else _SMALL)
        except ContentError as error:
            if not isinstance(error.__cause__, FileNotFoundError):
                raise
            opened = None  # somebody else has moved an upload away, but the caller may have it open
        if opened is None:
            return await self._stream(source, draft)
        if movable:
            moved = await self._move(source, opened, draft)
            if moved is not None:
                return moved
            await source.ask(opened.read_all, _SMALL)
        if opened.data is not None:
            source.measured(len(opened.data), None)  # before anything is written: not if the size is wrong
            status, checksum = await self._step(draft, draft.create_hashed, opened.data, source.algorithm)
            source.measured(status.st_size, checksum)
            return status
        copied = None
        if opened.status.st_size > _SMALL:
            copied = await self._copy_file(draft, opened, source.algorithm)
        if copied is None:
            await source.ask(opened.close)
            return await self._stream(source, draft)
        source.measured(*copied)
        return await self._step(draft, draft.finish, b"")

    async def _move(self, source: Source, opened: CallersFile, draft: Draft) -> os.stat_result | None:
        size = await self._step(draft, draft.take, opened)
        if size is None:
            return None
        source.measured(*await self._follow(draft, None, size, size, source.algorithm))
        taken = await self._step(draft, draft.move)
        if taken is None:
            return None
        source.taken = _Taken(taken, self._workers, self.timeouts.operation)
        return draft.status

    async def _copy_file(self, draft: Draft, source: Opened, algorithm: str | None) -> tuple[int, str | None] | None:
        """Copy a whole file into the draft; return its size and checksum. None: see `Draft.copy_from`."""
        done = await self._bulk_step(draft, draft.copy_from, source, _SLICE, _STRETCH)
        if done is None:
            return None
        return await self._follow(draft, source, done, source.status.st_size, algorithm)

    async def _follow(
        self, draft: Draft, source: Opened | None, done: int, size: int, algorithm: str | None
    ) -> tuple[int, str | None]:
        """Copy what is left of `source` from `done` on, while what is there already is hashed, a stretch behind."""
        state = hashlib.new(algorithm) if algorithm is not None else None
        handle = draft.handle
        hashed = 0
        hashing: asyncio.Future[None] | None = None
        while done < size or (state is not None and hashed < done):
            progress()
            if state is not None and hashed < done:
                if hashing is not None:
                    await hashing
                start, hashed = hashed, min(done, hashed + _HASHED)
                hashing = self._bulk.call(hash_part, handle, state, start, hashed, timeout=self.timeouts.idle)
                hashing.add_done_callback(seen)
            if source is not None and done < size:
                before, done = done, await self._bulk_step(draft, draft.copy, source, _SLICE, _STRETCH)
                if done == before:
                    break
        if hashing is not None:
            await hashing
        progress()
        if source is not None and done != size:
            raise source.changed_error(f"{source.key!r} has changed while it was copied")
        return done, None if state is None else f"{algorithm}:{state.hexdigest()}"

    async def _pour(self, source: Source, data: bytes, draft: Draft) -> os.stat_result:
        """Write what is in memory, in slices of it, each being hashed at the same time."""
        state = None if source.algorithm is None else hashlib.new(source.algorithm)
        whole = memoryview(data)
        for start in range(0, len(data), _SLICE):
            part = whole[start : start + _SLICE]
            progress()
            hashing = None if state is None else self._bulk.call(state.update, part, timeout=self.timeouts.idle)
            if hashing is not None:
                hashing.add_done_callback(seen)
            await self._bulk_step(draft, draft.write, part)
            if hashing is not None:
                await hashing
        source.measured(len(data), None if state is None else f"{source.algorithm}:{state.hexdigest()}")
        return await self._step(draft, draft.finish, b"")

    async def _stream(self, source: Source, draft: Draft) -> os.stat_result:
        """Write what the source yields: while one hop writes, the source is asked for more."""
        gathered: list[bytes] = []
        count = 0
        writing: asyncio.Future[None] | None = None
        async with contextlib.aclosing(source.chunks()) as chunks:
            async for chunk in chunks:
                gathered.append(chunk)
                count += len(chunk)
                if count >= _SMALL:
                    if writing is not None:
                        await writing
                    writing = self._step(draft, draft.write, _joined(gathered))
                    writing.add_done_callback(seen)
                    gathered, count = [], 0
        if writing is None and not draft.begun:
            return await self._step(draft, draft.create, _joined(gathered))
        if writing is not None:
            await writing
        return await self._step(draft, draft.finish, _joined(gathered))

    # -- reading

    async def _read(self, key: str, byte_range: ByteRange | None, chunk_bytes: int) -> Reader:
        opened, start, stop, data = await self._workers.call(
            self._tree.read, key, byte_range, chunk_bytes, timeout=self.timeouts.idle
        )
        info = _info(key, opened.status)
        if stop - start <= chunk_bytes:
            return Reader(info, data=data)
        return Reader(info, FileChunks(self._workers, self.timeouts.idle, opened, start, stop, data, chunk_bytes))

    async def _stat(self, key: str) -> ObjectInfo:
        status, token = await self._workers.call(self._tree.stat, key, timeout=self.timeouts.operation)
        return _info(key, status, token, published=True)

    async def _discard(self, key: str, *, token: str | None) -> None:
        permit = Permit(self.timeouts.operation)
        try:
            await self._workers.call(self._tree.discard, key, token, permit, timeout=self.timeouts.operation)
        except BaseException:
            permit.withdraw()
            raise

    async def _sync_discard(self, key: str) -> None:
        await self._workers.call(self._tree.sync_discard, key, timeout=self.timeouts.operation)

    async def _url(self, key: str, *, expires_in: float | None, **options: Any) -> str:
        if self.base_url is None:
            raise NotSupported("no base_url is given")
        if expires_in is not None:
            raise NotSupported("a URL below base_url never expires; serve the file through a view that signs")
        return self.base_url + quote(key.lstrip("/"), safe="/~!*()'")

    # -- listing

    async def _list(self, prefix: str, *, after: str | None, delimiter: str | None) -> AsyncIterator[ObjectInfo]:
        if delimiter is None or delimiter == "/":
            async for info in self._walk(prefix, after, roll_up=delimiter is not None):
                yield info
            return
        last = after
        async for info in self._walk(prefix, after, roll_up=False):
            at = info.key.find(delimiter, len(prefix))
            if at < 0:
                yield info
            elif (rolled := info.key[: at + len(delimiter)]) != last:
                last = rolled
                yield ObjectInfo(rolled, is_prefix=True)

    async def _walk(self, prefix: str, after: str | None, *, roll_up: bool) -> AsyncIterator[ObjectInfo]:
        base = prefix[: prefix.rfind("/") + 1]
        if base and self._tree.parts(base[:-1]) is None:
            return
        # Directories still to be gone through: the key they stand for, and their children, the next one last.
        stack = [(base, await self._children(base))]
        while stack:
            base, children = stack[-1]
            files: list[str] = []
            inner = ""
            while children and not inner and len(files) < _PAGE:
                key = base + (name := children.pop())
                if name[-1] != "/":
                    if key.startswith(prefix) and (after is None or key > after):
                        files.append(name)
                elif key.startswith(prefix) and (after is None or key > after or after.startswith(key)):
                    inner = key
            if files:
                call = self._workers.call(
                    self._tree.statuses, base.split("/")[:-1], files, timeout=self.timeouts.operation
                )
                for name, status in await call:
                    yield _info(base + name, status)
            if inner and not roll_up:
                stack.append((inner, await self._children(inner)))
            elif inner and inner != after:
                async for _ in self._walk(inner, after, roll_up=False):
                    yield ObjectInfo(inner, is_prefix=True)
                    break
            elif not children:
                stack.pop()

    def list_strays(self) -> AsyncIterator[tuple[str, str]]:
        """Iterate over what lies below the root and `list` leaves out: its path, with what is not UTF-8 as Python's
        surrogate escapes, and what it is, such as ``"symbolic link"``. Not over what lies below that, nor over
        temporaries of this backend. Memory is that of a listing.

        Raises:
            AccessDenied, BackendUnavailable, DeadlineExceeded.
        """
        return self._mapped_iterator("list", "", self._list_strays())

    async def _list_strays(self) -> AsyncIterator[tuple[str, str]]:
        left = [""]
        while left:
            base = left.pop()
            names = base.split("/")[:-1]
            strays, inner = await self._workers.call(scan, self._tree, names, timeout=self.timeouts.operation)
            for name, kind in strays:
                yield base + name, kind
            left += [f"{base}{name}/" for name in reversed(inner)]

    async def _children(self, base: str) -> list[str]:
        names = base.split("/")[:-1]
        children = await self._workers.call(self._tree.children, names, timeout=self.timeouts.operation)
        children.reverse()
        return children

    # -- life

    async def _aclose(self) -> None:
        self._tree.leave()
        self._workers.shutdown(wait=False)
        self._bulk.shutdown(wait=False)


class _Taken:
    """What `Source.taken` says of a file that was moved in."""

    def __init__(self, file: TakenFile, workers: Workers, timeout: float | None) -> None:
        self._file = file
        self._workers = workers
        self._timeout = timeout

    async def release(self) -> None:
        await self._workers.call(self._file.release, timeout=self._timeout)

    async def give_back(self) -> None:
        await self._workers.call(self._file.give_back, timeout=self._timeout)

    async def settle(self) -> None:
        await self._workers.call(self._file.settle, timeout=self._timeout)


def _joined(chunks: list[bytes]) -> bytes:
    return chunks[0] if len(chunks) == 1 else b"".join(chunks)


def _info(key: str, status: os.stat_result, token: str | None = None, *, published: bool = False) -> ObjectInfo:
    return ObjectInfo(
        key,
        size=status.st_size,
        modified_at=datetime.fromtimestamp(status.st_mtime, UTC),
        # Before the file has got its name, its ctime is not the last one.
        changed_at=datetime.fromtimestamp(status.st_ctime, UTC) if published else None,
        etag=f"{status.st_ino:x}-{status.st_size:x}-{status.st_mtime_ns:x}",
        token=token,
    )
