"""Floor: sqlite3 and the files together in one worker thread, one hop an operation (a slow disk stops all)."""

import asyncio
import hashlib
import os
import secrets
import sqlite3
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

TABLE = "create table files (path text primary key, state text, token text, size integer, checksum text) without rowid"
RESERVE = "insert or ignore into files values (?, 'pending', ?, null, null)"


class Store:
    def __init__(self, directory: Path) -> None:
        self.directory, self.worker = directory, ThreadPoolExecutor(1)
        self.db = sqlite3.connect(directory / "meta.db", isolation_level=None, check_same_thread=False)
        for statement in ("pragma journal_mode=wal", "pragma synchronous=normal", TABLE):
            self.db.execute(statement)

    def __getattr__(self, verb: str):  # type: ignore[no-untyped-def]  # store.save(...) runs _save(...) in the worker
        work = object.__getattribute__(self, f"_{verb}")
        return lambda *args: asyncio.get_running_loop().run_in_executor(self.worker, work, *args)

    async def __aenter__(self) -> "Store":
        return self

    async def __aexit__(self, *_: object) -> None:
        self.worker.shutdown()
        self.db.close()

    def _save(self, name: str, content: bytes) -> str:
        path, token = name, secrets.token_hex(8)
        while self.db.execute(RESERVE, (path, token)).rowcount != 1:
            path = f"_{secrets.token_hex(4)}".join(os.path.splitext(name))
        target = self.directory / path
        target.parent.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(target.parent, os.O_TMPFILE | os.O_WRONLY, 0o644)
        os.write(descriptor, content)
        os.link(f"/proc/self/fd/{descriptor}", target, src_dir_fd=descriptor)
        os.close(descriptor)
        commit = "update files set state = 'stored', size = ?, checksum = ? where path = ? and token = ?"
        self.db.execute(commit, (len(content), hashlib.sha256(content).hexdigest(), path, token))
        return path

    def _exists(self, path: str) -> bool:
        return bool(self.db.execute("select 1 from files where path = ? and state = 'stored'", (path,)).fetchall())

    def _read(self, path: str) -> bytes:
        if not self._exists(path):
            raise FileNotFoundError(path)
        return (self.directory / path).read_bytes()

    def _delete(self, path: str) -> None:
        self.db.execute("update files set state = 'deleting' where path = ? and state = 'stored'", (path,))
        (self.directory / path).unlink()
        self.db.execute("delete from files where path = ? and state = 'deleting'", (path,))
