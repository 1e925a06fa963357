"""The Starlette example under a real server: streamed both ways, ranges, conditions, clients that hang up."""

import contextlib
import http.client
import json
import os
import runpy
import socket
import sqlite3
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from starlette.requests import ClientDisconnect

ROOT = Path(__file__).parents[2]
DATA = bytes(range(256)) * 20_000


class Answer:
    def __init__(self, answer: http.client.HTTPResponse) -> None:
        self.status = answer.status
        self.headers = {name.lower(): value for name, value in answer.getheaders()}
        self.body = answer.read()


class Server:
    def __init__(self, port: int, directory: Path) -> None:
        self.port = port
        self.directory = directory

    def ask(self, method: str, path: str, body: bytes | None = None, **headers: str) -> Answer:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=30)
        with contextlib.closing(connection):
            sent = {name.replace("_", "-"): value for name, value in headers.items()}
            connection.request(method, f"/files/{path}", body, sent)
            return Answer(connection.getresponse())


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    directory = tmp_path_factory.mktemp("app")
    environment = {name: value for name, value in os.environ.items() if not name.startswith("APROXY_")}
    with socket.create_server(("127.0.0.1", 0)) as listening:
        # The server gets the listening socket itself, so that no port can be taken in between; it dies with its stdin.
        program = (
            "import os, sys, threading, uvicorn\n"
            "threading.Thread(target=lambda: (sys.stdin.read(), os._exit(1)), daemon=True).start()\n"
            f"uvicorn.run('examples.starlette_app:app', fd={listening.fileno()}, log_level='warning')\n"
        )
        process = subprocess.Popen(
            [sys.executable, "-c", program],
            cwd=directory,
            env={**environment, "PYTHONPATH": str(ROOT)},
            pass_fds=[listening.fileno()],
            stdin=subprocess.PIPE,
        )
        with process:
            try:
                yield Server(listening.getsockname()[1], directory)
            finally:
                process.terminate()
                process.wait(30)


def test_up_and_down(server: Server) -> None:
    answer = server.ask("PUT", "a/b%20c.bin", DATA, Content_Type="video/mp4")
    assert answer.status == 201
    assert answer.headers["location"] == "/files/a/b%20c.bin"
    assert json.loads(answer.body)["size"] == len(DATA)
    answer = server.ask("GET", "a/b%20c.bin")
    assert (answer.status, answer.body == DATA) == (200, True)
    assert answer.headers["content-type"] == "video/mp4"
    assert answer.headers["content-length"] == str(len(DATA))
    head = server.ask("HEAD", "a/b%20c.bin")
    assert (head.status, head.body, head.headers["content-length"]) == (200, b"", str(len(DATA)))
    again = server.ask("PUT", "a/b%20c.bin", b"other")
    assert again.status == 201
    assert again.headers["location"] != "/files/a/b%20c.bin", "nothing is overwritten"
    assert server.ask("DELETE", "a/b%20c.bin").status == 204
    assert server.ask("GET", "a/b%20c.bin").status == 404


@pytest.mark.parametrize(
    ("asked", "status", "start", "stop"),
    [
        ("bytes=0-9", 206, 0, 10),
        ("bytes=5119990-", 206, 5_119_990, 5_120_000),
        ("bytes=-3", 206, 5_119_997, 5_120_000),
        ("bytes=5119999-99999999", 206, 5_119_999, 5_120_000),
        ("bytes=5120000-", 416, 0, 0),
        ("bytes=9-1", 200, 0, 5_120_000),
        ("bytes=0-1,5-6", 200, 0, 5_120_000),
        ("apples=1-2", 200, 0, 5_120_000),
        (f"bytes={'9' * 5000}-", 200, 0, 5_120_000),
    ],
)
def test_ranges(server: Server, asked: str, status: int, start: int, stop: int) -> None:
    if server.ask("HEAD", "ranges.bin").status == 404:
        server.ask("PUT", "ranges.bin", DATA)
    answer = server.ask("GET", "ranges.bin", Range=asked)
    assert answer.status == status
    assert answer.body == DATA[start:stop]
    if status == 206:
        assert answer.headers["content-range"] == f"bytes {start}-{stop - 1}/{len(DATA)}"
    if status == 416:
        assert answer.headers["content-range"] == f"bytes */{len(DATA)}"


def test_conditions(server: Server) -> None:
    server.ask("PUT", "cond.bin", b"0123456789")
    etag = server.ask("HEAD", "cond.bin").headers["etag"]
    assert server.ask("GET", "cond.bin", If_None_Match=etag).status == 304
    assert server.ask("GET", "cond.bin", Range="bytes=1-2", If_Range=etag).body == b"12"
    assert server.ask("GET", "cond.bin", Range="bytes=1-2", If_Range='"old"').body == b"0123456789"


def test_an_empty_file(server: Server) -> None:
    assert server.ask("PUT", "empty", b"").status == 201
    answer = server.ask("GET", "empty")
    assert (answer.status, answer.body) == (200, b"")
    assert server.ask("GET", "empty", Range="bytes=0-").status == 416


def test_wrong_names(server: Server) -> None:
    assert server.ask("PUT", "a/%2e%2e/b", b"x").status == 400
    assert server.ask("PUT", "a%5Cb", b"x").status == 400
    assert server.ask("GET", "nowhere").status == 404
    assert str(server.directory) not in server.ask("GET", "nowhere").body.decode()


def records_of(server: Server, path: str) -> int:
    with contextlib.closing(sqlite3.connect(server.directory / "aproxy-data" / "records.sqlite3")) as connection:
        found: int = connection.execute("SELECT count(*) FROM aproxy_files WHERE path = ?", (path,)).fetchone()[0]
        return found


def wait_until(holds: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 30
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_a_client_that_hangs_up_leaves_nothing(server: Server) -> None:
    head = b"PUT /files/half.bin HTTP/1.1\r\nHost: x\r\nContent-Length: 1000000\r\n\r\n"
    with socket.create_connection(("127.0.0.1", server.port)) as connection:
        connection.sendall(head + bytes(500_000))
        wait_until(lambda: records_of(server, "half.bin") == 1)
    wait_until(lambda: records_of(server, "half.bin") == 0)
    assert server.ask("GET", "half.bin").status == 404
    assert not list((server.directory / "aproxy-data" / "files").glob("half*"))


@pytest.fixture
def example(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Run the program in this process, with a storage of its own."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("APROXY_CONFIG", raising=False)
    return runpy.run_path(str(ROOT / "examples" / "starlette_app.py"))


def scope(method: str, path: str, **headers: str) -> dict[str, Any]:
    sent = [(name.replace("_", "-").encode(), value.encode()) for name, value in headers.items()]
    asgi = {"version": "3.0", "spec_version": "2.4"}
    return {
        "type": "http",
        "asgi": asgi,
        "method": method,
        "path": f"/files/{path}",
        "query_string": b"",
        "headers": sent,
    }


async def nothing() -> dict[str, Any]:
    return {"type": "http.request", "body": b"", "more_body": False}


@pytest.mark.asyncio
async def test_a_file_is_closed_where_the_client_is_gone_before_it_begins(
    example: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    storage = example["storage"]
    opened: list[Any] = []

    async def gone(message: Any) -> None:
        raise OSError("the client has hung up")

    async with storage:
        await storage.save("a.bin", DATA)
        open_file = storage.open

        async def remember(*args: Any, **options: Any) -> Any:
            opened.append(await open_file(*args, **options))
            return opened[0]

        monkeypatch.setattr(storage, "open", remember)
        with pytest.raises(ClientDisconnect):
            await example["app"](scope("GET", "a.bin"), nothing, gone)
        assert [file.closed for file in opened] == [True]


@pytest.mark.asyncio
async def test_a_length_that_is_none_is_refused(example: dict[str, Any]) -> None:
    """Some servers let it through."""
    sent: list[Any] = []

    async def send(message: Any) -> None:
        sent.append(message)

    async with example["storage"]:
        await example["app"](scope("PUT", "a.bin", content_length="x"), nothing, send)
    assert sent[0]["status"] == 400
