"""Floor: records through one aiosqlite connection, files through asyncio.to_thread; reserve, write, commit."""

import asyncio
import hashlib
import os
import secrets
from pathlib import Path

import aiosqlite

TABLE = "create table files (path text primary key, state text, token text, size integer, checksum text) without rowid"


def write(directory: Path, path: str, content: bytes) -> str:
    (target := directory / path).parent.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(target.parent, os.O_TMPFILE | os.O_WRONLY, 0o644)
    try:
        os.write(descriptor, content)
        os.link(f"/proc/self/fd/{descriptor}", target, src_dir_fd=descriptor)  # a plain link() would not follow
    finally:
        os.close(descriptor)
    return hashlib.sha256(content).hexdigest()


class Store:
    def __init__(self, directory: Path) -> None:
        self.directory = directory

    async def __aenter__(self) -> "Store":
        self.db = await aiosqlite.connect(self.directory / "meta.db", isolation_level=None)
        for statement in ("pragma journal_mode=wal", "pragma synchronous=normal", TABLE):
            await self.db.execute(statement)
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.db.close()

    async def save(self, name: str, content: bytes) -> str:
        path, token = name, secrets.token_hex(8)
        reserve = "insert or ignore into files values (?, 'pending', ?, null, null)"
        while (await self.db.execute(reserve, (path, token))).rowcount != 1:
            path = f"_{secrets.token_hex(4)}".join(os.path.splitext(name))
        checksum = await asyncio.to_thread(write, self.directory, path, content)
        commit = "update files set state = 'stored', size = ?, checksum = ? where path = ? and token = ?"
        await self.db.execute(commit, (len(content), checksum, path, token))
        return path

    async def exists(self, path: str) -> bool:
        query = "select 1 from files where path = ? and state = 'stored'"
        return bool(await self.db.execute_fetchall(query, (path,)))

    async def read(self, path: str) -> bytes:
        if not await self.exists(path):
            raise FileNotFoundError(path)
        return await asyncio.to_thread((self.directory / path).read_bytes)

    async def delete(self, path: str) -> None:
        await self.db.execute("update files set state = 'deleting' where path = ? and state = 'stored'", (path,))
        await asyncio.to_thread((self.directory / path).unlink)
        await self.db.execute("delete from files where path = ? and state = 'deleting'", (path,))
