"""The steps of the journal, and a fuse that kills the process at one of them.

A step is named ``verb: what, before|after``: *before* it nothing of it has happened, *after* it all of it has, but
nobody has been told. The originals and the meta-backend are the real ones; subclasses of them, and a few wrapped
functions of `os`, only say where the process is.
"""

from __future__ import annotations

import contextvars
import os
import signal
import sqlite3
from collections.abc import Awaitable, Callable, Mapping
from typing import Any, TypeVar

from aproxy_storage.backends import _draft
from aproxy_storage.backends.filesystem import FileSystemBackend
from aproxy_storage.meta_backends import _sqlite_engine
from aproxy_storage.meta_backends.sqlite import SQLiteMetaBackend
from aproxy_storage.records import DELETING, STORED, MetaRecord, ObjectInfo

T = TypeVar("T")

#: Which verb of the child is at work; in tasks of the library's own, as the undo of a failed save, none is.
verb: contextvars.ContextVar[str] = contextvars.ContextVar("verb", default="")


def _around(*names: str) -> list[str]:
    return [f"{name}, {when}" for name in names for when in ("before", "after")]


#: Reached by the child's own verbs.
CHILD_STEPS = [
    *_around("save: reserve", "save: reserve a spare key", "save: write", "save: rekey", "save: commit"),
    *_around("replace: name the key", "replace: write", "replace: swap"),
    *_around("move: name the key", "move: write", "move: swap"),
    *_around("copy: reserve", "copy: on the server", "copy: commit"),
    *_around("rename: update", "adopt: create"),
    *_around("delete: mark", "delete: discard", "delete: delete the record"),
    *_around("undo: mark", "undo: discard", "undo: delete the record"),
    *_around("undo: give up the key", "undo: forget the key"),
    *_around("surplus: discard", "surplus: forget"),
    *_around("file: mkdir", "file: some bytes", "file: token", "file: link", "file: unlink", "file: rmdir"),
    *_around("file: link of a temporary", "file: unlink of a temporary"),
    *_around("database: COMMIT of a group"),
]

#: Reached by a reconcile that finds what a crash has left.
RECONCILE_STEPS = [
    *_around("reconcile: mark", "reconcile: discard", "reconcile: delete the record"),
    *_around("reconcile: take the surplus", "reconcile: discard the surplus", "reconcile: forget the surplus"),
    *_around("reconcile: note as settling"),
]


class Fuse:
    """Kills this process when `step` is reached for the `count`-th time after it was armed; counts nothing before."""

    def __init__(self, step: str = "", count: int = 1) -> None:
        self._step = step
        self._left = count
        self.armed = False

    def at(self, step: str) -> None:
        if step == self._step and self.armed:
            self._left -= 1
            if self._left == 0:
                os.kill(os.getpid(), signal.SIGKILL)

    async def around(self, step: str, work: Awaitable[T]) -> T:
        self.at(f"{step}, before")
        result = await work
        self.at(f"{step}, after")
        return result

    def wrapped(self, step: Callable[..., str], function: Callable[..., T]) -> Callable[..., T]:
        def wrapper(*args: Any, **kwargs: Any) -> T:
            name = step(*args, **kwargs)
            self.at(f"{name}, before")
            result = function(*args, **kwargs)
            self.at(f"{name}, after")
            return result

        return wrapper


class SteppedFiles(FileSystemBackend):
    """The original, saying where it is."""

    fuse = Fuse()

    async def write(self, key: str, source: Any, **options: Any) -> ObjectInfo:
        return await self.fuse.around(f"{verb.get()}: write", super().write(key, source, **options))

    async def copy(self, key: str, new_key: str, **options: Any) -> ObjectInfo:
        return await self.fuse.around(f"{verb.get()}: on the server", super().copy(key, new_key, **options))

    async def discard(self, key: str, **options: Any) -> None:
        who = {"": "undo", "replace": "surplus", "move": "surplus"}.get(verb.get(), verb.get())
        what = "discard the surplus" if clearing.get() else "discard"
        await self.fuse.around(f"{who}: {what}", super().discard(key, **options))


#: Whether reconcile is at the surplus of a stored record.
clearing: contextvars.ContextVar[bool] = contextvars.ContextVar("clearing", default=False)


class SteppedRecords(SQLiteMetaBackend):
    """The meta-backend, saying what a statement is for."""

    fuse = Fuse()

    async def reserve(self, record: MetaRecord, *, lease: float, spare: MetaRecord) -> MetaRecord | None:
        step = f"{verb.get()}: reserve"
        self.fuse.at(f"{step}, before")
        named = await self.owners(record.original_storage_name, [record.original_storage_path])
        if any(owner != record.path for owner in named.get(record.original_storage_path, ())):
            step += " a spare key"
            self.fuse.at(f"{step}, before")
        reserved = await super().reserve(record, lease=lease, spare=spare)
        self.fuse.at(f"{step}, after")
        return reserved

    async def create(self, record: MetaRecord, *, lease: float | None = None) -> MetaRecord:
        return await self.fuse.around(f"{verb.get()}: create", super().create(record, lease=lease))

    async def update(self, path: str, changes: Mapping[str, Any], **options: Any) -> MetaRecord:
        return await self.fuse.around(_meaning(changes), super().update(path, changes, **options))

    async def delete(self, path: str, **options: Any) -> None:
        await self.fuse.around(f"{verb.get() or 'undo'}: delete the record", super().delete(path, **options))


def _meaning(changes: Mapping[str, Any]) -> str:
    who = verb.get()
    places = {place.state for place in changes.get("places", ())}
    if "path" in changes:
        return "rename: update"
    if changes.get("state") == DELETING:
        clearing.set(False)
        return f"{who or 'undo'}: mark"
    if changes.get("state") == STORED:
        return f"{who}: commit"
    if "original_storage_name" in changes:
        return f"{who}: swap"
    if "original_storage_path" in changes:
        return f"{who}: rekey"
    if who == "reconcile":
        if not places:
            return "reconcile: forget the surplus"
        if "surplus" not in places:
            return "reconcile: note as settling"
        clearing.set(True)
        return "reconcile: take the surplus"
    if "doubtful" in places:
        return f"{who}: name the key"
    if who in ("replace", "move"):
        return "surplus: forget"
    return "undo: give up the key" if "settling" in places else "undo: forget the key"


def install(fuse: Fuse) -> None:
    """Let this process notice its steps. It is a child that will be killed: nothing is ever put back."""
    SteppedFiles.fuse = SteppedRecords.fuse = fuse
    hidden = ".aproxy-"

    def link_step(source: str, target: str, **_: Any) -> str:
        return "file: link of a temporary" if hidden in source else "file: link"

    def unlink_step(name: str, **_: Any) -> str:
        return "file: unlink of a temporary" if hidden in str(name) else "file: unlink"

    os.link = fuse.wrapped(link_step, os.link)
    os.unlink = fuse.wrapped(unlink_step, os.unlink)
    os.mkdir = fuse.wrapped(lambda *_, **__: "file: mkdir", os.mkdir)
    os.rmdir = fuse.wrapped(lambda *_, **__: "file: rmdir", os.rmdir)
    os.setxattr = fuse.wrapped(lambda *_, **__: "file: token", os.setxattr)

    def write_by_halves(fd: int, data: bytes) -> None:
        fuse.at("file: some bytes, before")
        half = len(data) // 2
        write_all(fd, data[:half])
        fuse.at("file: some bytes, after")
        write_all(fd, data[half:])

    write_all, _draft.write_all = _draft.write_all, write_by_halves

    connect = _sqlite_engine.Engine._connect
    _sqlite_engine.Engine._connect = lambda self, mode: _Cursor(connect(self, mode), fuse)


class _Cursor:
    """A cursor that says when it commits."""

    def __init__(self, cursor: sqlite3.Cursor, fuse: Fuse) -> None:
        self._cursor = cursor
        self._fuse = fuse

    def execute(self, statement: str, *values: Any) -> Any:
        if statement != "COMMIT":
            return self._cursor.execute(statement, *values)
        self._fuse.at("database: COMMIT of a group, before")
        result = self._cursor.execute(statement)
        self._fuse.at("database: COMMIT of a group, after")
        return result

    def __getattr__(self, name: str) -> Any:
        return getattr(self._cursor, name)
