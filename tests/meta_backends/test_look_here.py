"""`look_here`: a record in the calling thread, without an event loop."""

import asyncio
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from aproxy_storage import ConfigurationError, MetaRecord, NotSupported
from aproxy_storage.meta_backends.memory import MemoryMetaBackend
from aproxy_storage.meta_backends.sqlite import SQLiteMetaBackend


async def stored(meta: SQLiteMetaBackend, path: str) -> MetaRecord:
    return await meta.create(MetaRecord(path, "media", "fs", path, token=path, version=1, extra={"tag": "x"}))


def test_sqlite_answers_what_get_answers_once_its_file_is_there(tmp_path: Path) -> None:
    meta = SQLiteMetaBackend(tmp_path / "records.sqlite3")
    assert not meta.looks_here, "the tables are made by the writer, for which it needs a loop"

    async def work() -> None:
        record = await stored(meta, "a.txt")
        assert meta.looks_here
        assert meta.look_here("a.txt") == record == await meta.get("a.txt")
        await meta.update("a.txt", {"size": 5})
        found = meta.look_here("a.txt")
        assert found is not None
        assert found.size == 5, "what was answered is seen"
        assert meta.look_here("b.txt") is None
        assert meta.look_here("lone\udc80surrogate") is None
        with ThreadPoolExecutor(8) as pool:
            assert all(found.path == "a.txt" for found in pool.map(meta.look_here, ["a.txt"] * 200) if found)
        await meta.delete("a.txt")
        assert meta.look_here("a.txt") is None
        await meta.aclose()
        assert not meta.looks_here

    asyncio.run(work())


def test_a_child_looks_for_itself(tmp_path: Path) -> None:
    meta = SQLiteMetaBackend(tmp_path / "records.sqlite3")
    asyncio.run(stored(meta, "a.txt"))
    assert meta.look_here("a.txt")
    child = os.fork()
    if child == 0:
        os._exit(0 if meta.look_here("a.txt") is not None else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert meta.look_here("a.txt")
    asyncio.run(meta.aclose())


def test_errors_are_ours(tmp_path: Path) -> None:
    meta = SQLiteMetaBackend(tmp_path / "records.sqlite3")
    asyncio.run(stored(meta, "a.txt"))
    asyncio.run(meta.aclose())
    for name in os.listdir(tmp_path):
        (tmp_path / name).write_bytes(b"no database, but long enough to be looked at" * 100)
    with pytest.raises(ConfigurationError) as caught:
        meta.look_here("a.txt")
    assert (caught.value.operation, caught.value.path) == ("get", "a.txt")


def test_the_others_say_that_they_cannot() -> None:
    meta = MemoryMetaBackend()
    assert not meta.looks_here
    with pytest.raises(NotSupported, match="event loop"):
        meta.look_here("a.txt")
