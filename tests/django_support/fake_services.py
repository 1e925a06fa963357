"""Stand-ins for what django-storages' Dropbox and FTP talk to, so that their real classes can be tried.

They keep files in memory, answer as the services do as far as those classes look, and refuse two calls at a time where
the real connection could not bear them.
"""

from __future__ import annotations

import contextlib
import ftplib
import posixpath
import sys
import threading
from collections.abc import Callable, Iterator
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

__all__ = ["FakeDropbox", "FakeFtp", "dropbox_storage", "ftp_storage"]


class ApiError(Exception):
    """As that of the client: it says nothing that a program could know without knowing Dropbox."""


class FolderMetadata:
    def __init__(self, name: str) -> None:
        self.name = name


class FakeDropbox:
    """The client of Dropbox, with its service."""

    def __init__(self) -> None:
        self.files: dict[str, bytes] = {}
        self.fetched = 0  # bytes
        self._sessions: dict[str, bytearray] = {}

    def files_upload(self, data: bytes, path: str, mode: Any) -> None:
        self.files[path] = bytes(data)

    def files_upload_session_start(self, data: bytes) -> Any:
        name = f"session{len(self._sessions)}"
        self._sessions[name] = bytearray(data)
        return SimpleNamespace(session_id=name)

    def files_upload_session_append_v2(self, data: bytes, cursor: Any) -> None:
        session = self._sessions[cursor.session_id]
        if cursor.offset != len(session):
            raise ApiError("incorrect_offset")
        session += data

    def files_upload_session_finish(self, data: bytes, cursor: Any, commit: Any) -> None:
        self.files_upload_session_append_v2(data, cursor)
        self.files[commit.path] = bytes(self._sessions.pop(cursor.session_id))

    def files_download(self, path: str) -> Any:
        self._known(path)
        self.fetched += len(self.files[path])
        return None, SimpleNamespace(status_code=200, content=self.files[path])

    def files_get_metadata(self, path: str) -> Any:
        if any(name.startswith(f"{path}/") for name in self.files):
            return FolderMetadata(posixpath.basename(path))
        self._known(path)
        return SimpleNamespace(size=len(self.files[path]))

    def files_delete(self, path: str) -> None:
        self._known(path)
        del self.files[path]

    def files_list_folder(self, path: str) -> Any:
        below = [name.removeprefix(f"{path}/") for name in self.files if name.startswith(f"{path}/")]
        if path and not below:
            raise ApiError("path/not_found")
        folders = {name.partition("/")[0] for name in below if "/" in name}
        files = [SimpleNamespace(name=name) for name in below if "/" not in name]
        return SimpleNamespace(entries=[*map(FolderMetadata, folders), *files])

    def _known(self, path: str) -> None:
        if path not in self.files:
            raise ApiError("path/not_found")


@contextlib.contextmanager
def dropbox_storage(patch: pytest.MonkeyPatch) -> Iterator[tuple[Any, FakeDropbox]]:
    """Yield a ``DropboxStorage`` of django-storages and its service."""
    client = FakeDropbox()
    package, errors, files = (ModuleType(name) for name in ("dropbox", "dropbox.exceptions", "dropbox.files"))
    package.Dropbox = lambda *_, **__: client  # type: ignore[attr-defined]
    errors.ApiError = ApiError  # type: ignore[attr-defined]
    for name in ("CommitInfo", "UploadSessionCursor"):
        setattr(files, name, SimpleNamespace)
    files.FolderMetadata = FolderMetadata  # type: ignore[attr-defined]
    files.WriteMode = str  # type: ignore[attr-defined]
    for module in (package, errors, files):
        patch.setitem(sys.modules, module.__name__, module)
    sys.modules.pop("storages.backends.dropbox", None)
    try:
        from storages.backends.dropbox import DropboxStorage

        yield DropboxStorage(oauth2_access_token="token", root_path="/"), client
    finally:
        sys.modules.pop("storages.backends.dropbox", None)


class FakeFtp:
    """One connection to a server of FTP, as ``ftplib.FTP`` has it; it can do one thing at a time."""

    encoding = "utf-8"

    def __init__(self) -> None:
        self.files: dict[str, bytes] = {}
        self.directories = {"/"}
        self.overlapped = False
        self._here = "/"
        self._busy = threading.Lock()

    @contextlib.contextmanager
    def _turn(self) -> Iterator[None]:
        alone = self._busy.acquire(blocking=False)
        self.overlapped |= not alone
        try:
            yield
        finally:
            if alone:
                self._busy.release()

    def _at(self, path: str) -> str:
        return posixpath.normpath(posixpath.join(self._here, path))

    def connect(self, host: str, port: int) -> None: ...

    def login(self, user: str, password: str) -> None: ...

    def pwd(self) -> str:
        with self._turn():
            return self._here

    def cwd(self, path: str) -> None:
        with self._turn():
            if self._at(path) not in self.directories:
                raise ftplib.error_perm("550 no such directory")
            self._here = self._at(path)

    def mkd(self, path: str) -> None:
        with self._turn():
            self.directories.add(self._at(path))

    def storbinary(self, command: str, file: Any, blocksize: int) -> None:
        with self._turn():
            path = self._at(command.removeprefix("STOR "))
            data = b""
            while block := file.read(blocksize):
                data += block
            self.files[path] = data

    def retrbinary(self, command: str, callback: Callable[[bytes], Any]) -> None:
        with self._turn():
            path = self._at(command.removeprefix("RETR "))
            if path not in self.files:
                raise ftplib.error_perm("550 no such file")
            callback(self.files[path])

    def retrlines(self, command: str, callback: Callable[[str], Any]) -> None:
        with self._turn():
            directory = self._at(command.removeprefix("LIST").strip())
            for name in self._names(directory):
                size = self.files.get(posixpath.join(directory, name))
                kind, count = ("d", 0) if size is None else ("-", len(size))
                callback(f"{kind}rw-r--r-- 1 user group {count} Jan 01 00:00 {name}")

    def nlst(self, directory: str) -> list[str]:
        with self._turn():
            return self._names(self._at(directory))

    def _names(self, directory: str) -> list[str]:
        if directory not in self.directories:
            raise ftplib.error_perm("550 no such directory")
        everything = {*self.files, *self.directories} - {"/"}
        return sorted(posixpath.basename(path) for path in everything if posixpath.dirname(path) == directory)

    def delete(self, path: str) -> None:
        with self._turn():
            if self._at(path) not in self.files:
                raise ftplib.error_perm("550 no such file")
            del self.files[self._at(path)]


@contextlib.contextmanager
def ftp_storage(patch: pytest.MonkeyPatch) -> Iterator[tuple[Any, FakeFtp]]:
    """Yield an ``FTPStorage`` of django-storages and its only connection."""
    from storages.backends.ftp import FTPStorage

    connection = FakeFtp()
    patch.setattr(ftplib, "FTP", lambda: connection)
    yield FTPStorage(location="ftp://user:password@host:21/"), connection
