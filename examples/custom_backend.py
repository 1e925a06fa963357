"""A backend of your own: objects as rows of one SQLite table. tests/examples holds it to the exported suite.

    python examples/custom_backend.py

Good for many small files that should travel as one. An object is in memory as a whole while it is written or read.
"""

import asyncio
import contextlib
import sqlite3

from aproxy_storage import AlreadyExists, Backend, BackendUnavailable, Capabilities, NotFound, ObjectInfo, Reader
from aproxy_storage.paths import new_token
from aproxy_storage.threads import Workers
from aproxy_storage.urls import URL

__all__ = ["TableBackend"]


class TableBackend(Backend):
    """Keeps objects in the table ``objects`` of the SQLite file `path`."""

    capabilities = Capabilities(conditional_create=True, range_read=True, list=True, tokens=True)

    def __init__(self, path, *, timeouts=None):
        self.path = path
        super().__init__(timeouts=timeouts)
        self._connection = None  # made on first use: constructors only store
        # One thread, so that what was asked for first is done first: a write that was given up lands before the
        # discard that is to undo it.
        self._workers = Workers(f"objects in {path}", 1)

    @classmethod
    def from_url(cls, url):
        """Make one of ``table:objects.sqlite3``; an entry point makes the scheme known."""
        parsed = URL.parse(url)
        return cls(parsed.local_path(), **parsed.options(timeouts=True))

    def __str__(self):
        return f"TableBackend({self.path})"

    def _execute(self, statement, *values):
        if self._connection is None:
            self._connection = sqlite3.connect(self.path, isolation_level=None, check_same_thread=False)
            self._connection.execute("CREATE TABLE IF NOT EXISTS objects (key TEXT PRIMARY KEY, data BLOB, token TEXT)")
        return self._connection.execute(statement, values).fetchall()

    def _run(self, statement, *values):
        return self._workers.call(self._execute, statement, *values, timeout=self.timeouts.operation)

    async def _write(self, key, source, *, content_type, metadata, token, durable):
        async with contextlib.aclosing(source.chunks()) as chunks:
            data = b"".join([chunk async for chunk in chunks])
        token = token or new_token()
        try:  # the last step, and in one piece: of two writers of one key, one wins
            await self._run("INSERT INTO objects VALUES (?, ?, ?)", key, data, token)
        except sqlite3.IntegrityError:
            raise AlreadyExists(f"{key!r} exists already") from None
        except BaseException as error:  # cancelled, or out of time: it may still land, so it is taken back
            await self.cleanup.finish(self._discard(key, token=token), within=self.timeouts.cleanup)
            error.outcome_unknown = False
            raise
        return ObjectInfo(key, size=len(data), token=token)

    async def _stat(self, key):
        with contextlib.suppress(UnicodeEncodeError):  # a name that could never have been written
            for size, token in await self._run("SELECT length(data), token FROM objects WHERE key = ?", key):
                return ObjectInfo(key, size=size, token=token)
        raise NotFound(f"there is no object {key!r}")

    async def _read(self, key, byte_range, chunk_bytes):
        with contextlib.suppress(UnicodeEncodeError):
            for (data,) in await self._run("SELECT data FROM objects WHERE key = ?", key):
                start, stop = byte_range.resolve(len(data)) if byte_range else (0, len(data))
                return Reader(ObjectInfo(key, size=len(data)), _slices(data, start, stop, chunk_bytes))
        raise NotFound(f"there is no object {key!r}")

    async def _discard(self, key, *, token):
        with contextlib.suppress(UnicodeEncodeError):
            await self._run("DELETE FROM objects WHERE key = ? AND coalesce(? = token, ? IS NULL)", key, token, token)

    async def _list(self, prefix, *, after, delimiter):
        page = "SELECT key, length(data), token FROM objects WHERE key > ? AND key >= ? ORDER BY key LIMIT 500"
        last, rolled = after or "", after
        while rows := await self._run(page, last, prefix):
            for key, size, token in rows:
                if not key.startswith(prefix):
                    return  # in byte order, none comes any more
                at = key.find(delimiter, len(prefix)) if delimiter else -1
                if at < 0:
                    yield ObjectInfo(key, size=size, token=token)
                elif key[: at + len(delimiter)] != rolled:
                    rolled = key[: at + len(delimiter)]
                    yield ObjectInfo(rolled, is_prefix=True)
            last = rows[-1][0]

    async def _aclose(self):
        await self._workers.call(self._disconnect, timeout=self.timeouts.operation)
        self._workers.shutdown(wait=False)

    def _disconnect(self):
        if self._connection is not None:
            self._connection.close()
        self._connection = None

    def _map_error(self, error, what):
        if isinstance(error, sqlite3.Error):
            return BackendUnavailable(f"could not {what}: {error}", outcome_unknown=True)
        return super()._map_error(error, what)


async def _slices(data, start, stop, count):
    for at in range(start, stop, count):
        yield data[at : min(at + count, stop)]


async def main():
    from aproxy_storage import ProxyStorage
    from aproxy_storage.meta_backends.memory import MemoryMetaBackend

    async with ProxyStorage("notes", originals=TableBackend("objects.sqlite3"), meta=MemoryMetaBackend()) as notes:
        path = await notes.save("hello.txt", "Hello from a table")
        async with notes.open(path, verify=True) as file:
            print(path, await file.read())
        await notes.delete(path)


if __name__ == "__main__":
    asyncio.run(main())
