"""The directory in which processes die and others clean up: two originals, one meta-backend, one log of promises."""

from __future__ import annotations

import os
import sqlite3
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from aproxy_storage import ProxyStorage
from aproxy_storage.backends.filesystem import FileSystemBackend
from aproxy_storage.meta_backends.sqlite import SQLiteMetaBackend

ORIGINALS = ("a", "b")


@dataclass(frozen=True)
class Arena:
    """Where everything of one series of crashes lies; crash follows crash in the same directories."""

    root: Path

    def make(self) -> Arena:
        for name in (*ORIGINALS, "nursery"):
            (self.root / name).mkdir(parents=True, exist_ok=True)
        return self

    @property
    def log(self) -> Path:
        """The intents and acknowledgements of the child, a line each."""
        return self.root / "log"

    @property
    def database(self) -> Path:
        return self.root / "meta.sqlite"

    def storage(
        self,
        *,
        keys: Literal["path", "token"] = "path",
        keep_replaced: float = 60.0,
        durability: Literal["process", "power"] = "process",
        backend: type[FileSystemBackend] = FileSystemBackend,
        meta: type[SQLiteMetaBackend] = SQLiteMetaBackend,
    ) -> ProxyStorage:
        return ProxyStorage(
            "arena",
            originals={name: backend(self.root / name) for name in ORIGINALS},
            meta=meta(self.database, durability=durability),
            keys=keys,
            keep_replaced=keep_replaced,
            durability=durability,
        )

    def sql(self, statement: str) -> list[tuple[object, ...]]:
        """Run one statement behind the library's back."""
        connection = sqlite3.connect(self.database, timeout=30, isolation_level=None)
        try:
            return connection.execute(statement).fetchall()
        finally:
            connection.close()

    def expire_leases(self) -> None:
        """Let time pass: every lease, settle and keep time is over by the database's clock."""
        self.sql("UPDATE aproxy_files SET lease = lease - 1000000 WHERE lease IS NOT NULL")
        earlier = "json_set(value, '$[3]', json_extract(value, '$[3]') - 1000000)"
        self.sql(
            "UPDATE aproxy_files SET places = (SELECT json_group_array(json(CASE json_array_length(value) WHEN 4 THEN "
            f"{earlier} ELSE value END)) FROM json_each(places)) WHERE places <> '[]'"
        )

    def on_disk(self) -> tuple[set[tuple[str, str]], list[str]]:
        """Return the files in the originals as (original, key), and the directories that are empty."""
        files, empty = set(), []
        for original in ORIGINALS:
            top = self.root / original
            for directory, inner, names in os.walk(top):
                here = os.path.relpath(directory, top)
                files |= {(original, os.path.normpath(os.path.join(here, name))) for name in names}
                if not inner and not names and here != ".":
                    empty.append(f"{original}:{here}")
        return files, empty
