"""The content of one write as one buffer: small content in memory, the rest in a temporary file that is mapped."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import mmap
import os
import tempfile
from typing import IO

from ..content import Source
from ..errors import BackendUnavailable, OutOfSpace
from ..feeds import Handle
from ..futures import seen
from ..threads import Workers

__all__ = ["Body", "collect"]

Body = bytes | mmap.mmap

_BATCH = 4 << 20  # bytes that go to the file in one hop
_FULL = (errno.EFBIG, errno.ENOSPC, errno.EDQUOT)


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
    file: _File | None = None
    writing: asyncio.Future[None] | None = None
    waiting: list[bytes] = []
    size = count = 0
    try:
        async with contextlib.aclosing(source.chunks()) as chunks:
            async for chunk in chunks:
                waiting.append(chunk)
                count += len(chunk)
                if count <= memory if file is None else count < _BATCH:
                    continue
                file = file or _File()
                if writing is not None:
                    await writing
                writing = workers.call(file.write, waiting, timeout=idle)
                writing.add_done_callback(seen)
                size, waiting, count = size + count, [], 0
        if file is None:
            return waiting[0] if len(waiting) == 1 else b"".join(waiting)
        if writing is not None:
            await writing
        return await workers.call(file.finish, waiting, size + count, timeout=idle)
    except OSError as error:
        if isinstance(error, BackendUnavailable):
            raise
        cls = OutOfSpace if error.errno in _FULL else BackendUnavailable
        raise cls(
            f"could not keep the content in a temporary file in {tempfile.gettempdir()}: {error.strerror}"
        ) from error
    finally:
        if file is not None:
            with contextlib.suppress(BackendUnavailable):
                workers.submit(file.handle.close)


class _File:
    """A temporary file without a name; closed by whoever comes last, a worker that still writes or `collect`."""

    def __init__(self) -> None:
        self.handle = Handle(self._release)
        self._file: IO[bytes] | None = None

    def write(self, chunks: list[bytes]) -> None:
        self.handle.use(lambda: self._write(chunks), None)

    def _write(self, chunks: list[bytes]) -> None:
        if self._file is None:
            self._file = tempfile.TemporaryFile(prefix="aproxy-", buffering=0)  # noqa: SIM115  see `_release`
        for chunk in chunks:
            view = memoryview(chunk)
            while view:
                view = view[self._file.write(view) :]

    def finish(self, chunks: list[bytes], size: int) -> Body:
        nothing: Body = b""
        return self.handle.use(lambda: self._finish(chunks, size), nothing)

    def _finish(self, chunks: list[bytes], size: int) -> Body:
        self._write(chunks)
        assert self._file is not None
        found = os.fstat(self._file.fileno()).st_size
        if found != size:
            raise OSError(f"the temporary file has {found} bytes, not {size}")
        return mmap.mmap(self._file.fileno(), size, access=mmap.ACCESS_READ)  # with a descriptor of its own

    def _release(self) -> None:
        if self._file is not None:
            self._file.close()
