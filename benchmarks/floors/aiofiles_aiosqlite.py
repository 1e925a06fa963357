"""Floor: records through one aiosqlite connection, files through aiofiles; reserve, write, link, commit."""

import hashlib
import os
import secrets
from pathlib import Path

import aiofiles
import aiofiles.os
import aiosqlite

TABLE = "create table files (path text primary key, state text, token text, size integer, checksum text) without rowid"


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
        target = self.directory / path
        await aiofiles.os.makedirs(target.parent, exist_ok=True)
        async with aiofiles.open(temporary := target.with_name(f".{token}"), "xb", buffering=0) as file:
            await file.write(content)
        await aiofiles.os.link(temporary, target)  # unlike a rename, never replaces a foreign file
        await aiofiles.os.unlink(temporary)
        commit = "update files set state = 'stored', size = ?, checksum = ? where path = ? and token = ?"
        await self.db.execute(commit, (len(content), hashlib.sha256(content).hexdigest(), path, token))
        return path

    async def exists(self, path: str) -> bool:
        query = "select 1 from files where path = ? and state = 'stored'"
        return bool(await self.db.execute_fetchall(query, (path,)))

    async def read(self, path: str) -> bytes:
        if not await self.exists(path):
            raise FileNotFoundError(path)
        async with aiofiles.open(self.directory / path, "rb") as file:
            return await file.read()

    async def delete(self, path: str) -> None:
        await self.db.execute("update files set state = 'deleting' where path = ? and state = 'stored'", (path,))
        await aiofiles.os.unlink(self.directory / path)
        await self.db.execute("delete from files where path = ? and state = 'deleting'", (path,))
