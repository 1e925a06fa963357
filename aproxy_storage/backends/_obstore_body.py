"""The content of one write as one buffer: small content in memory, the rest in a temporary file that is mapped."""

from __future__ import annotations

import asyncio
import contextlib
import mmap
import os
import tempfile
from typing import IO

from ..content import Source
from ..errors import BackendUnavailable, OutOfSpace
from ..feeds import seen
from ..threads import Workers

__all__ = ["Body", "collect"]

Body = bytes | mmap.mmap

_BATCH = 4 << 20  # bytes that go to the file in one hop


async def collect(source: Source, workers: Workers, *, memory: int, idle: float | None) -> Body:
    """Return the whole content, of which up to `memory` bytes are in memory.

    The file has no name, is ours alone, and goes with the buffer. A caller's file is never mapped: should somebody
    truncate it meanwhile, the process would die of a SIGBUS.

    Raises:
        ContentError: as `Source.chunks`. OutOfSpace, BackendUnavailable: of the temporary file.
    """
    if source.data is not None:
        await source.measure()
        return source.data
    file: IO[bytes] | None = None
    writing: asyncio.Future[None] | None = None
    waiting: list[bytes] = []
    size = count = 0
    try:
        async with contextlib.aclosing(source.chunks()) as chunks:
            async for chunk in chunks:
                waiting.append(chunk)
                count += len(chunk)
                if file is None and count <= memory:
                    continue
                if file is None:
                    file = await workers.call(_new_file, timeout=idle)
                if count < _BATCH:
                    continue
                if writing is not None:
                    await writing
                writing = workers.call(_write, file, waiting, timeout=idle)
                writing.add_done_callback(seen)
                size, waiting, count = size + count, [], 0
        if file is None:
            return waiting[0] if len(waiting) == 1 else b"".join(waiting)
        if writing is not None:
            await writing
        return await workers.call(_finish, file, waiting, size + count, timeout=idle)
    except OSError as error:
        if isinstance(error, BackendUnavailable):
            raise
        cls = OutOfSpace if error.errno in (27, 28, 122) else BackendUnavailable
        raise cls(
            f"could not keep the content in a temporary file in {tempfile.gettempdir()}: {error.strerror}"
        ) from error
    finally:
        if file is not None:
            # A worker that is still writing keeps its own reference.
            del file


def _new_file() -> IO[bytes]:
    return tempfile.TemporaryFile(prefix="aproxy-", buffering=0)


def _write(file: IO[bytes], chunks: list[bytes]) -> None:
    for chunk in chunks:
        view = memoryview(chunk)
        while view:
            view = view[file.write(view) :]


def _finish(file: IO[bytes], chunks: list[bytes], size: int) -> mmap.mmap:
    _write(file, chunks)
    found = os.fstat(file.fileno()).st_size
    if found != size:
        raise OSError(f"the temporary file has {found} bytes, not {size}")
    mapped = mmap.mmap(file.fileno(), size, access=mmap.ACCESS_READ)
    file.close()  # the mapping has a descriptor of its own
    return mapped
