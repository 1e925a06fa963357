"""A proxy between a client and its server that loses an answer: the request has been carried out, and nobody knows."""

from __future__ import annotations

import asyncio
import contextlib
from typing import Self

__all__ = ["CuttingProxy"]


class CuttingProxy:
    """Listens on a TCP port of 127.0.0.1 and passes everything on to `upstream`, (host, port) or a Unix socket.

    After ``cut(marker)`` the next request that contains `marker` still reaches the server; when its answer comes, both
    connections are closed instead. `marker` is text of a value (a path, a token): statements are prepared, so that
    their own text does not travel with every call.
    """

    def __init__(self, upstream: tuple[str, int] | str) -> None:
        self._upstream = upstream
        self._marker = b""
        self._passed = 0
        self._tasks: set[asyncio.Task[None]] = set()
        self.cuts = 0  # answers lost so far

    async def __aenter__(self) -> Self:
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", 0)
        self.port: int = self._server.sockets[0].getsockname()[1]
        return self

    async def __aexit__(self, *_: object) -> None:
        self._server.close()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await self._server.wait_closed()

    def cut(self, marker: str | bytes, *, after: int = 0) -> None:
        """Lose the answer to the next request with `marker`, when `after` others have been answered."""
        self._marker = marker.encode() if isinstance(marker, str) else marker
        self._passed = after

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        writers = [writer]
        with contextlib.suppress(OSError, asyncio.CancelledError):  # one of the two has hung up, or the test is over
            try:
                if isinstance(self._upstream, str):
                    answers, requests = await asyncio.open_unix_connection(self._upstream)
                else:
                    answers, requests = await asyncio.open_connection(*self._upstream)
                writers.append(requests)
                doomed = asyncio.Event()
                ways = {
                    asyncio.ensure_future(self._pass_requests(reader, requests, doomed)),
                    asyncio.ensure_future(self._pass_answers(answers, writer, doomed)),
                }
                try:
                    await asyncio.wait(ways, return_when=asyncio.FIRST_COMPLETED)
                finally:
                    for way in ways:
                        way.cancel()
                    await asyncio.gather(*ways, return_exceptions=True)
            finally:
                for each in writers:
                    each.transport.abort()

    async def _pass_requests(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, doomed: asyncio.Event
    ) -> None:
        kept = b""  # a marker may come in two pieces
        while data := await reader.read(1 << 16):
            if self._marker and self._marker in kept + data:
                self._passed -= 1
                if self._passed < 0:
                    self._marker = b""
                    doomed.set()
                kept = b""
            else:
                kept = (kept + data)[-256:]
            writer.write(data)
            await writer.drain()

    async def _pass_answers(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, doomed: asyncio.Event
    ) -> None:
        while data := await reader.read(1 << 16):
            if doomed.is_set():
                self.cuts += 1
                return
            writer.write(data)
            await writer.drain()
