"""BridgeStorage: a `ProxyStorage` as Django's own kind of storage."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable, Coroutine, Mapping, Sequence
from datetime import UTC, datetime
from typing import Any, ParamSpec, TypeVar

from django.core.exceptions import SuspiciousFileOperation
from django.core.files.storage import Storage
from django.core.files.utils import validate_file_name

from aproxy_storage import AsyncFile, ContentError, InvalidPath, MetaRecord, NotFound, ProxyStorage
from aproxy_storage.backends.filesystem import FileSystemBackend
from aproxy_storage.blocking import run_blocking
from aproxy_storage.files import Opening
from aproxy_storage.paths import shown
from aproxy_storage.records import STORED

from .base import Saving, SuspiciousPath, asked, file_of, named, plain, saving, suspicious, url_below, wished
from .bridge import refuse_on_event_loop, who_patched_threads
from .files import (
    FIRST_BYTES,
    BridgeFile,
    ReadFirst,
    ReadingFile,
    WritingFile,
    in_callers_thread,
    is_small,
    open_for_reading,
    read_whole,
)
from .records import SyncMetaBackend
from .twins import AsyncTwins, as_set, awaited

__all__ = ["BridgeStorage", "SuspiciousPath"]

P = ParamSpec("P")
T = TypeVar("T")


class BridgeStorage(AsyncTwins):
    """A Django storage over a `ProxyStorage`, for ``STORAGES``, for file fields, and by itself.

    Without arguments it is what FileSystemStorage is, with records: files below ``MEDIA_ROOT``, records in the model
    `sync_bridge.models.StoredFile`. The first five arguments are those of FileSystemStorage.

    Args:
        location: the directory; ``MEDIA_ROOT`` by default.
        base_url: what `url` puts before the name, without any I/O; ``MEDIA_URL`` by default where the files are in
            such a directory. Otherwise URLs are those of the original.
        file_permissions_mode, directory_permissions_mode: by default as in the settings.
        allow_overwrite: `save` replaces a file of the same name instead of taking another name.
        storage: instead of all others but `base_url` and `allow_overwrite`: a ProxyStorage, a class or callable that
            makes one, the dotted path to any of these, or the name of one that ``PROXY_STORAGE`` or the registry knows.
        read_through: a file that is in the original and has no record gets one when it is first asked for.
        direct: where nothing of it needs an event loop (one directory; records in SQLite or a model), files of up to
            256 KiB are saved, opened and deleted in the calling thread, as Django's own storages do it, which takes
            half the time. False: always on the loop of the bridge, whose time limits release the caller from a
            system call that hangs, as it may on a network file system.
        options: a description: ``original="s3://…"`` or ``originals={"fs": "file:///…", "s3": "s3://…"}``,
            ``meta="postgresql://…"`` (or a model, or ``"app.Model"``; the model of this app by default); or
            ``config="aproxy.toml"``; ``name=`` for the records; and whatever ProxyStorage takes.

    The constructor only stores; the ProxyStorage, `proxy`, is made on first use. Thread-safe, and a file is stored by
    one call whatever its size. The synchronous methods raise SyncCallOnEventLoop in a thread with a running loop;
    there, await ``asave aopen adelete aexists asize aurl alistdir``, which go to the ProxyStorage directly.

    Raises:
        ImproperlyConfigured: an unknown option, or options that exclude each other. By every method, on first use,
            where the ProxyStorage cannot be made.
    """

    @property
    def meta_backend(self) -> SyncMetaBackend:
        """The records of all storages that share the meta-backend, for synchronous code."""
        return SyncMetaBackend(self.proxy.meta, self.bridge)

    # -- Django's contract

    def save(
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
        """Store `content` under `name`, or under the next free name; return the path.

        Args:
            content: a Django File, anything with ``read`` or ``chunks``, or bytes. Read in this thread; a
                TemporaryUploadedFile is moved where the original is on the same file system, not copied.
            max_length: of the path, in characters.
            using: the original to use, instead of what the placement says. For this call only.
            original_storage_path: the key of a file that is in the original already: it gets a record, nothing is
                written, `content` is not used.
            content_type, extra: as `ProxyStorage.save`.

        All or nothing. Inside a transaction of the meta-backend's database the record belongs to it; the bytes of a
        save that is rolled back are found by ``reconcile --scan``.

        Raises:
            SuspiciousFileOperation: the name leads out of the storage, or nothing fits into `max_length`.
            What the content raises; and as `ProxyStorage.save`.
        """
        refuse_on_event_loop(f"{self!r}.save()", "asave()")
        if original_storage_path:
            return self.adopt(original_storage_path, name=name, using=using, content_type=content_type, extra=extra)
        target, content = named(name, content)
        if self._has_to_choose(target, max_length) or (
            not self.allow_overwrite and self._is_on_disk(self.proxy.prefix + target)
        ):
            target = self.get_available_name(target, max_length=max_length)
            validate_file_name(target, allow_relative_path=True)
        token = saving.set(Saving(max_length, using, content_type, extra))
        try:
            path = self._save(target, content)
        finally:
            saving.reset(token)
        validate_file_name(path, allow_relative_path=True)
        return path

    def _save(self, name: str, content: Any) -> str:
        asks, prepared = saving.get() or Saving(), in_callers_thread(content)
        try:
            return self._await(self._works_here and is_small(prepared), self._store, name, prepared, asks)
        except InvalidPath as error:
            raise suspicious(error) from error
        except ContentError:
            # What Django's callers expect: the error of their own file.
            own: Exception | None = getattr(prepared, "error", None)
            if own is None:
                raise
            raise own from None

    def publish(
        self,
        name: str,
        content: Any,
        *,
        exclusive: bool = False,
        over: MetaRecord | None = None,
        content_type: str | None = None,
        extra: Mapping[str, Any] | None = None,
    ) -> MetaRecord:
        """Store at exactly `name`: a new file or, unless `exclusive`, new bytes for the one there; return its record.

        What a file opened for writing does when it is closed. Where the storage has a prefix, the name gets it unless
        it begins with it. `over`: only while the file has the bytes that this record of it says. `extra` is added to
        what a file that was there has.

        Raises:
            AlreadyExists: with `exclusive`; where the URL is the path also if something without a record lies there.
            NotFound, Conflict: with `over`. ContentError: also where storing had to
            begin anew, as when the file was moved meanwhile, and the content can be read only once. And as `save`.
        """
        prepared = in_callers_thread(content)
        try:
            return self._await(
                self._works_here and is_small(prepared),
                self._overwrite,
                name,
                prepared,
                exclusive=exclusive,
                over=over,
                saving=Saving(content_type=content_type, extra=extra),
            )
        except InvalidPath as error:
            raise suspicious(error) from error

    def open(self, name: str | os.PathLike[str] | MetaRecord, mode: str = "rb") -> BridgeFile:
        """Open a file, in any mode of the builtin ``open``.

        One for reading has its first 256 KiB at hand, and is pinned to one version of the file. One for writing
        is published when it is closed without an exception.

        Args:
            name: the path; or, for reading, a record: then it is the file of that record or none, whoever has its
                path by now. So a permission that was checked by the record holds for what is opened.

        Raises:
            FileNotFoundError; FileExistsError with ``"x"``; IntegrityError: its bytes are gone. Conflict: the file of
            the record has other bytes by now; get the record again.
        """
        refuse_on_event_loop(f"{self!r}.open()", "aopen()")
        if isinstance(name, MetaRecord):
            if mode not in ("r", "rb", "rt"):
                raise ValueError(f"invalid mode for a record: {mode!r}")
            return ReadingFile(self, self._opened(name, self.proxy.open), name, mode)
        file: BridgeFile = self._open(asked(name), mode)
        return file

    def _open(self, name: str, mode: str = "rb") -> BridgeFile:
        kind = mode.replace("b", "").replace("t", "").replace("+", "")
        if kind not in ("r", "w", "x", "a") or ("b" in mode and "t" in mode):
            raise ValueError(f"invalid mode: {mode!r}")
        if kind == "r" and "+" not in mode:
            return ReadingFile(self, self._opened(self._known(name), self._by_name), name, mode)
        validate_file_name(name, allow_relative_path=True)
        if plain(name) != name:
            name = self.bridge.call(self._spelled, name)
        return WritingFile(self, self._full(name), mode)

    def _opened(self, found: str | MetaRecord, opening: Callable[[Any], Opening[AsyncFile]]) -> ReadFirst:
        if isinstance(found, MetaRecord) and found.size is not None and found.size <= FIRST_BYTES and self._works_here:
            opened = run_blocking(read_whole(opening(found)))
            if opened is not None:
                return opened
        return self.bridge.call(self._open_first, found, opening)

    async def _open_first(self, name: str | MetaRecord, opening: Callable[[Any], Opening[AsyncFile]]) -> ReadFirst:
        found = await self._found(name) if isinstance(name, str) else name
        return await open_for_reading(opening(found))

    def _by_name(self, found: str | MetaRecord) -> Opening[AsyncFile]:
        """Open what was found by a name; where a subclass has its own `open`, by that."""
        proxy = self.proxy
        if isinstance(found, MetaRecord) and type(proxy).open is ProxyStorage.open:
            return proxy.open_current(found)
        return proxy.open(found)

    # -- what is synchronous by nature, without the loop

    @property
    def _works_here(self) -> bool:
        return (
            self.direct
            and self.proxy.works_here
            and asyncio._get_running_loop() is None
            and who_patched_threads() is None
        )

    def _await(self, here: bool, function: Callable[P, Coroutine[Any, Any, T]], *args: P.args, **kwargs: P.kwargs) -> T:
        """Await ``function(*args, **kwargs)``, in this thread or on the loop of the bridge."""
        if here:
            return run_blocking(function(*args, **kwargs))
        return self.bridge.call(function, *args, **kwargs)

    @property
    def _look(self) -> Callable[[str], MetaRecord | None] | None:
        """What looks a record up in this thread; None where that needs a loop, or more than a look."""
        proxy = self.proxy
        if (
            self.read_through
            or type(proxy).get is not ProxyStorage.get
            or type(proxy).exists is not ProxyStorage.exists
        ):
            return None
        return proxy.meta.look_here if proxy.meta.looks_here else None

    def _looked_up(self, look: Callable[[str], MetaRecord | None], name: str) -> MetaRecord | None:
        """Return the record of the file of that name, as `_spelled`, if there is one of this storage."""
        record = self._mine(look(name))
        return record if record is not None or plain(name) == name else self._mine(look(plain(name)))

    def _mine(self, record: MetaRecord | None) -> MetaRecord | None:
        """Return `record` if it is a stored file of this storage."""
        if record is None or record.state != STORED or record.proxy_storage_name != self.proxy.name:
            return None
        return record

    def _known(self, name: str) -> str | MetaRecord:
        """Return the record of `name` where it can be looked up here, else `name`."""
        if (look := self._look) is None or asyncio._get_running_loop() is not None:
            return name
        if (record := self._looked_up(look, name)) is None:
            raise NotFound(f"{self!r} has no file {shown(name)}", operation="get", path=name, backend=repr(self))
        return record

    def delete(self, name: str | os.PathLike[str] | MetaRecord) -> None:
        """Delete a file; one that is not there is deleted already.

        Inside a transaction its bytes go when that commits; rolled back, the file is as it was. Of a record: its file,
        never the one that somebody has saved under its path since.

        Raises:
            ValueError: `name` is empty. And as `ProxyStorage.delete`.
        """
        if not name:
            raise ValueError("The name must be given to delete().")
        given = file_of(name)
        if (look := self._look) is None:
            self.bridge.call(self.adelete, given)
            return
        refuse_on_event_loop(f"{self!r}.delete()", "adelete()")
        record = given if isinstance(given, MetaRecord) else self._looked_up(look, given)
        if record is not None:
            self._await(self._works_here, self.proxy.delete, record, missing_ok=True)

    def exists(self, name: str | os.PathLike[str]) -> bool:
        """Return whether there is a file of that name, or a directory: the root, or one with a file below it.

        One question to the meta-backend where there is a file, a second one where there is none.
        """
        text = asked(name)
        if (look := self._look) is None or not text:
            return self.bridge.call(self.aexists, text)
        refuse_on_event_loop(f"{self!r}.exists()", "aexists()")
        return self._looked_up(look, text) is not None or self._await(self._works_here, self._has_directory, text)

    def _has_file(self, name: str) -> bool:
        """Return whether a file has that name; where a subclass has an `exists` of its own, what that says."""
        if type(self).exists is not BridgeStorage.exists:
            return self.exists(name)
        text = asked(name)
        if (look := self._look) is None:
            return self.bridge.call(self._ahas_file, text)
        refuse_on_event_loop(f"{self!r}.exists()", "aexists()")
        return self._looked_up(look, text) is not None

    def size(self, name: str | os.PathLike[str] | MetaRecord) -> int:
        """Return the size in bytes.

        Raises:
            FileNotFoundError.
        """
        return self._size(name if isinstance(name, MetaRecord) else self._known(asked(name)))

    def _size(self, found: str | MetaRecord) -> int:
        if isinstance(found, MetaRecord) and found.size is not None and self._mine(found) is not None:
            return found.size
        return (
            self.bridge.call(self.asize, found) if isinstance(found, str) else self.bridge.call(self.proxy.size, found)
        )

    def url(self, name: str | os.PathLike[str] | None, **options: Any) -> str:
        """Return the URL of a file. With a `base_url` that is it and the path, without any I/O, in any thread.

        Below a directory of Django's settings that holds where keys are paths. With a `prefix`, or keys of another
        kind, the record is asked, as it is where the original makes the URLs.

        `options`: as `ProxyStorage.url` (``expires_in``), which is asked where there is no `base_url`.

        Raises:
            SyncCallOnEventLoop: there is no `base_url`, and this thread runs a loop: await `aurl`.
            FileNotFoundError, NotSupported.
        """
        base = self.base_url
        if base is not None and not options:
            return url_below(base, name) if name else base
        refuse_on_event_loop(f"{self!r}.url()", "aurl()")
        return self.bridge.call(self.aurl, asked(name or ""), **options)

    def path(self, name: str | os.PathLike[str]) -> str:
        """Return the path of the file on the local disk, where the original is a directory.

        Raises:
            NotImplementedError: it is not.
        """
        local, text = self._local_original(""), asked(name)
        if not text:
            return local.root
        try:
            record = self.get(text)
        except NotFound:
            if text.startswith("/"):
                raise SuspiciousFileOperation(f"{text!r} is not relative, and no record has it") from None
            return os.path.join(local.root, text.removeprefix(self.proxy.prefix))
        return self._local_original(record.original_storage_name).full_path(record.original_storage_path)

    def _local_original(self, name: str) -> FileSystemBackend:
        backend = self.proxy.get_original(name)
        if not isinstance(backend, FileSystemBackend):
            raise NotImplementedError(f"{backend} is no local directory: its files have no absolute path")
        return backend

    def listdir(self, path: str | os.PathLike[str]) -> tuple[list[str], list[str]]:
        """Return the names of the directories and of the files in a directory; both empty where there is none."""
        return self.bridge.call(self.alistdir, asked(path))

    def get_accessed_time(self, name: str | os.PathLike[str]) -> datetime:
        """Return when the bytes were last read, where the original is a directory and the system keeps it."""
        return as_set(datetime.fromtimestamp(os.path.getatime(self.path(name)), UTC))

    def get_created_time(self, name: str | os.PathLike[str]) -> datetime:
        """Return when the file was stored; aware where ``USE_TZ``, else naive in local time."""
        return self.bridge.call(self.aget_created_time, asked(name))

    def get_modified_time(self, name: str | os.PathLike[str]) -> datetime:
        """Return when the bytes were written; aware where ``USE_TZ``, else naive in local time."""
        return self.bridge.call(self.aget_modified_time, asked(name))

    def is_name_available(self, name: str, max_length: int | None = None) -> bool:
        if max_length and len(name) > max_length:
            return False
        path = self.proxy.prefix + name
        return self.allow_overwrite or not (self._is_on_disk(path) or self._has_file(path))

    def _is_on_disk(self, path: str) -> bool:
        directory = self._published
        if directory is None:
            return False
        if self._works_here and not awaited.get():
            return os.path.lexists(directory.full_path(path.removeprefix(self.proxy.prefix)))
        return self.bridge.call(self._ais_on_disk, path)

    def get_alternative_name(self, file_root: str, file_ext: str) -> str:
        if self.allow_overwrite:
            return f"{file_root}{file_ext}"
        name: str = super().get_alternative_name(file_root, file_ext)
        return name

    @property
    def _chooses_names(self) -> bool:  # type: ignore[override]
        """Whether a subclass has a say in names; otherwise ProxyStorage finds a free one, without a race."""
        cls = type(self)
        return (
            cls.get_available_name is not Storage.get_available_name
            or cls.is_name_available is not BridgeStorage.is_name_available
            or cls.get_alternative_name is not BridgeStorage.get_alternative_name
            or cls.exists is not BridgeStorage.exists
        )

    # -- verbs that Django's contract does not have. Given a record, those that change something mean its file only

    def get(self, name: str | os.PathLike[str]) -> MetaRecord:
        """Return the record of a file; see `ProxyStorage.get`."""
        known = self._known(asked(name))
        return known if isinstance(known, MetaRecord) else self.bridge.call(self._record, known)

    def get_many(self, names: Sequence[str]) -> Sequence[MetaRecord | None]:
        """Return the records of `names` in their order, None where there is no such file."""
        return self.bridge.call(self._get_many, [os.fspath(name).replace("\\", "/") for name in names])

    def update(self, name: str | MetaRecord, *, extra: Mapping[str, Any]) -> MetaRecord:
        """Replace the extra fields of a file's record; see `ProxyStorage.update`."""
        return self._await(self._works_here, self._update, file_of(name), extra)

    def replace(self, name: str, content: Any, **options: Any) -> MetaRecord:
        """Give an existing file new bytes, atomically; see `ProxyStorage.replace`.

        They go to another key. In a directory of Django's settings, where the URL is the path, they come back to that
        of the file before this returns, or when the transaction commits; replaced bytes are not kept there.
        """
        return self.bridge.call(self._replace, asked(name), in_callers_thread(content), **options)

    def rename(self, name: str | MetaRecord, new_name: str) -> MetaRecord:
        """Give a file another path; see `ProxyStorage.rename`. No byte moves, unless the URL is the path.

        Raises:
            AlreadyExists: the name is taken; where the URL is the path also by something without a record.
        """
        return self._to(new_name, self._rename, name)

    def copy(self, name: str | MetaRecord, new_name: str, *, using: str | None = None) -> str:
        """Copy a file to `new_name`, or the next free name; return it. See `ProxyStorage.copy`."""
        return self._to(new_name, self._copy, name, using=using)

    def _to(
        self,
        new_name: str,
        function: Callable[..., Coroutine[Any, Any, T]],
        name: str | MetaRecord,
        **options: Any,
    ) -> T:
        try:
            return self.bridge.call(function, file_of(name), wished(new_name), **options)
        except InvalidPath as error:
            raise suspicious(error) from error

    def move(self, name: str | MetaRecord, using: str) -> MetaRecord:
        """Move the bytes of a file into the original `using`; see `ProxyStorage.move`."""
        return self.bridge.call(self._move, file_of(name), using)

    def adopt(self, original_storage_path: str, *, name: str | os.PathLike[str] | None = None, **options: Any) -> str:
        """Take in a file that is in an original already; return its path. See `ProxyStorage.adopt`.

        Raises:
            AlreadyExists: also where the URL is the path, and something else without a record has that of `name`.
        """
        if name is not None:
            name = wished(name)
        return self.bridge.call(self._adopt, original_storage_path, name=name, **options)
