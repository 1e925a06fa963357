"""A server that answers as a test tells it to: for faults that no real service can be made to show."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import struct
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import unquote

from aproxy_storage.backends.s3 import S3Backend

__all__ = ["Answer", "Asked", "FakeS3", "error"]


@dataclass
class Asked:
    """One request that came."""

    method: str
    path: str
    query: str
    headers: dict[str, str]
    body: bytes

    def __str__(self) -> str:
        return f"{self.method} {self.path}" + (f"?{self.query}" if self.query else "")


@dataclass
class Answer:
    """What to answer. `cut`: send only so many bytes of the body, then end the connection; -1: end it at once; -2: end
    it with a reset, as a balancer does whose server has died. `blanks`: so many are sent before the body, ten a second,
    as S3 does while it works. `hold`: the second half of the body is sent when that is set. `foreign`: it comes from
    something in front of the service."""

    status: int = 200
    headers: dict[str, str] = field(default_factory=dict)
    body: bytes = b""
    cut: int | None = None
    blanks: int = 0
    hold: asyncio.Event | None = None
    foreign: bool = False


def error(status: int, code: str, **more: str) -> Answer:
    """Return the answer with one of S3's error documents."""
    fields = "".join(f"<{name}>{value}</{name}>" for name, value in more.items())
    text = f"<?xml version='1.0'?><Error><Code>{code}</Code><Message>a secret</Message>{fields}</Error>"
    return Answer(status, {"Content-Type": "application/xml"}, text.encode())


class FakeS3:
    """Give it a function of a request; read what was asked from `asked`."""

    def __init__(self, answer: Callable[[Asked], Answer | Awaitable[Answer]]) -> None:
        self._answer = answer
        self._serving: set[asyncio.Task[Any]] = set()  # connections
        self.asked: list[Asked] = []
        self.port = 0

    @contextlib.asynccontextmanager
    async def backend(self, **options: Any) -> AsyncIterator[S3Backend]:
        """Serve, and give a backend for bucket ``bucket`` here."""
        server = await asyncio.start_server(self._serve, "127.0.0.1", 0)
        self.port = server.sockets[0].getsockname()[1]
        known = {"access_key": "AKFAKE", "secret_key": "sEcReTkEy", "region": "eu-north-1", "session_token": "tOkEn"}
        async with S3Backend(
            "bucket", endpoint_url=f"http://127.0.0.1:{self.port}", addressing_style="path", **{**known, **options}
        ) as backend:
            try:
                yield backend
            finally:
                await backend.aclose()
                server.close()
                for task in self._serving:
                    task.cancel()
                if self._serving:
                    await asyncio.wait(self._serving)
                await server.wait_closed()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._serving.add(task)
        task.add_done_callback(self._serving.discard)
        with contextlib.suppress(ConnectionError, asyncio.IncompleteReadError, asyncio.CancelledError):
            while await self._one(reader, writer):
                pass
        writer.close()
        with contextlib.suppress(ConnectionError):
            await writer.wait_closed()

    async def _one(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> bool:
        head = (await reader.readuntil(b"\r\n\r\n")).decode()
        first, *lines = head.split("\r\n")
        method, target, _ = first.split(" ")
        headers = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in lines if line)}
        body = await reader.readexactly(int(headers.get("content-length", "0")))
        path, _, query = target.partition("?")
        asked = Asked(method, unquote(path), query, headers, body)
        self.asked.append(asked)
        answer = self._answer(asked)
        if not isinstance(answer, Answer):
            answer = await answer
        if answer.cut == -2:
            lingering = struct.pack("ii", 1, 0)  # for no time at all
            writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, lingering)
            writer.transport.abort()
        if answer.cut in (-1, -2):
            return False
        lengths = {"Content-Length": str(answer.blanks + len(answer.body))} | answer.headers
        if not answer.foreign:
            lengths["x-amz-request-id"] = "1"
        writer.write(f"HTTP/1.1 {answer.status} X\r\n".encode())
        writer.write("".join(f"{name}: {value}\r\n" for name, value in lengths.items()).encode() + b"\r\n")
        for _ in range(answer.blanks):
            await asyncio.sleep(0.1)
            writer.write(b" ")
            await writer.drain()
        if method != "HEAD":
            body = answer.body if answer.cut is None else answer.body[: answer.cut]
            if answer.hold is not None:
                first, body = body[: len(body) // 2], body[len(body) // 2 :]
                writer.write(first)
                await writer.drain()
                await answer.hold.wait()
            writer.write(body)
        await writer.drain()
        return answer.cut is None
