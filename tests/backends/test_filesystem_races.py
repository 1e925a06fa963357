"""Directories that come and go, forks, and what must not be left open."""

import asyncio
import contextlib
import multiprocessing
import os
import threading
from pathlib import Path
from typing import Any

import pytest

from aproxy_storage.backends import _handles, _posix
from aproxy_storage.backends.filesystem import FileSystemBackend
from aproxy_storage.errors import (
    AlreadyExists,
    ContentError,
    NotFound,
)
from aproxy_storage.testing._backend_hooks import BIG, pattern, pieces
from tests.backends.test_filesystem import content, everything_below, until_open

pytestmark = pytest.mark.asyncio


# -- races


def _storm(root: str, seed: int) -> None:
    async def storm() -> None:
        made = FileSystemBackend(root, max_workers=4)

        async def work(number: int) -> None:
            for turn in range(25):
                key = f"a/b{turn % 2}/{seed}-{number}"
                await made.write(key, b"x" if number % 2 else pieces(pattern(300_000)))
                await made.discard(key)

        async with asyncio.TaskGroup() as group:
            for number in range(8):
                group.create_task(work(number))
        await made.aclose()

    asyncio.run(storm())


async def test_directories_come_and_go_under_several_processes(tmp_path: Path) -> None:
    root = tmp_path / "root"
    root.mkdir()
    context = multiprocessing.get_context("spawn")
    processes = [context.Process(target=_storm, args=(str(root), seed)) for seed in range(4)]
    for process in processes:
        process.start()
    for process in processes:
        await asyncio.to_thread(process.join)
    assert [process.exitcode for process in processes] == [0] * 4
    assert everything_below(root) == []


async def test_prune_between_every_two_steps(backend: FileSystemBackend, monkeypatch: pytest.MonkeyPatch) -> None:
    """The directory is removed again right after it was made, and right before the link."""
    opened, linked = os.open, os.link
    root = Path(backend.root)
    left: dict[str, int] = {}

    def gone(step: str) -> None:
        if left.get(step):
            left[step] -= 1
            with contextlib.suppress(OSError):
                os.rmdir(root / "a" / "b")
                os.rmdir(root / "a")

    def open_after(path: Any, flags: int, *args: Any, **options: Any) -> int:
        gone(str(path))
        return opened(path, flags, *args, **options)

    def link_after(*args: Any, **options: Any) -> None:
        gone("link")
        linked(*args, **options)

    monkeypatch.setattr(_posix.os, "open", open_after)
    monkeypatch.setattr(_posix.os, "link", link_after)
    for key, data in (("a/b/small", b"x"), ("a/b/big", pattern(BIG))):
        hidden = _handles.temporary_name(key[4:], "tokenOfPrune")
        left.update({"a": 3, "b": 3, ".": 3, hidden: 3, "link": 3})
        await backend.write(key, pieces(data), token="tokenOfPrune")
        assert await content(backend, key) == data
        # Nothing can be pruned before a link where the file has a hidden name there already.
        used = {"a", "b"} | ({hidden} if backend._tree.anonymous is False else {".", "link"})
        assert not any(left[step] for step in used), left
        await backend.discard(key)


async def test_use_in_a_forked_child(backend: FileSystemBackend) -> None:
    await backend.write("parent", b"x")
    pid = os.fork()
    if pid == 0:  # a new loop in the child, as a prefork server has
        code = 1
        try:
            asyncio._set_running_loop(None)
            loop = asyncio.new_event_loop()
            loop.run_until_complete(backend.write("child", b"y"))
            loop.run_until_complete(backend.aclose())
            code = 0
        finally:
            os._exit(code)
    _, status = await asyncio.to_thread(os.waitpid, pid, 0)
    assert os.waitstatus_to_exitcode(status) == 0
    assert await content(backend, "child") == b"y"
    assert await content(backend, "parent") == b"x"


# -- leaks


async def test_no_descriptor_and_no_thread_is_left(backend: FileSystemBackend, tmp_path: Path) -> None:
    await backend.write("a", pattern(BIG))
    await backend.write("dir/b", b"x")
    for _ in range(3):
        await content(backend, "a", chunk_bytes=1 << 16)
        async with backend.read("a", chunk_bytes=1 << 16) as reader:
            await anext(reader)
        for body in (pieces(pattern(BIG), fail_after=BIG // 2), tmp_path / "missing"):
            with pytest.raises(ContentError):
                await backend.write("new/c", body)
        for key in ("a", "missing/x", "dir"):
            with contextlib.suppress(AlreadyExists):
                await backend.write(key, b"x")
            with contextlib.suppress(NotFound):
                await backend.stat(key + "/x")
        with pytest.raises(AlreadyExists):
            await backend.copy("a", "dir/b")
        assert len([info async for info in backend.list(delimiter="/")])
    await until_open(backend, backend.root)
    await backend.aclose()
    await until_open(backend)
    threads = [thread for thread in threading.enumerate() if backend.root in thread.name]
    for thread in threads:  # idle ones are told to end
        await asyncio.to_thread(thread.join, 10)
    assert not any(thread.is_alive() for thread in threads)
