"""The filesystem backend keeps every promise of the suite, with both ways of making a file unseen."""

import asyncio
import contextlib
import gc
import os
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest_asyncio

from aproxy_storage.backends.filesystem import FileSystemBackend
from aproxy_storage.records import Capabilities
from aproxy_storage.testing.backends import BackendTests


class FilesBehind:
    """How the tests look into and change the directory of a `FileSystemBackend`."""

    async def put_behind(self, backend: Any, key: str, data: bytes) -> None:
        path = Path(backend.root, key)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)

    async def get_behind(self, backend: Any, key: str) -> bytes | None:
        try:
            return await asyncio.to_thread(Path(backend.root, key).read_bytes)
        except (FileNotFoundError, NotADirectoryError):
            return None

    async def list_behind(self, backend: Any) -> list[str]:
        return everything_below(backend.root)


def everything_below(root: str | Path) -> list[str]:
    """Return every name below `root`; directories end in a slash."""
    found = []
    for directory, names, files in os.walk(root):
        base = os.path.relpath(directory, root)
        found += [os.path.normpath(os.path.join(base, name)) + "/" for name in names]
        found += [os.path.normpath(os.path.join(base, name)) for name in files]
    return found


async def content(backend: FileSystemBackend, key: str, **options: Any) -> bytes:
    """Return the bytes of an object."""
    async with backend.read(key, **options) as reader:
        return b"".join([chunk async for chunk in reader])


def descriptors(backend: FileSystemBackend) -> list[str]:
    """Return what this process holds open at or below the root."""
    gc.collect()
    found = []
    for name in os.listdir("/proc/self/fd"):
        with contextlib.suppress(OSError):
            target = os.readlink(f"/proc/self/fd/{name}")
            if target.startswith(backend.root):
                found.append(target.replace(" (deleted)", ""))
    return sorted(found)


async def until_open(backend: FileSystemBackend, *expected: str) -> None:
    """Wait until only these are open: a job that nobody waits for lets go of its file within a tick of the workers."""
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(10):
            while descriptors(backend) != sorted(expected):  # noqa: ASYNC110
                await asyncio.sleep(0.01)
    assert descriptors(backend) == sorted(expected)


class TestUnnamedFiles(FilesBehind, BackendTests):
    """Files without a name, as Linux makes them on its own file systems."""

    anonymous: bool | None = None

    @pytest_asyncio.fixture
    async def backend(self, tmp_path: Path) -> AsyncIterator[FileSystemBackend]:
        async with FileSystemBackend(tmp_path / "root", base_url="/media/") as backend:
            backend._tree.anonymous = self.anonymous
            yield backend


class TestHiddenFiles(TestUnnamedFiles):
    """Hidden files beside the object, as elsewhere."""

    anonymous = False


def test_capabilities_are_these() -> None:
    capabilities = {
        "conditional_create": True,
        "range_read": True,
        "list": True,
        "modified_time": True,
        "server_copy": True,
        "tokens": True,
        "max_segment_bytes": 255,
    }
    assert FileSystemBackend.capabilities == Capabilities(**capabilities)
    assert FileSystemBackend("/x", base_url="/media").capabilities == Capabilities(**capabilities, url=True)
