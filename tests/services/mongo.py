"""A MongoDB wire server of our own for the tests: SecantusDB in a process of its own, on a free port, in a temporary
directory, killed with the run. ``APROXY_TEST_MONGO_URL`` points the same tests at a real mongod instead.

What kills or stops the server always gets one of its own.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import uuid
import warnings
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit, urlunsplit

import pymongo
import pytest
import pytest_asyncio
from pymongo import AsyncMongoClient

from tests.services.stopping import stop

__all__ = [
    "DRIVERS",
    "FORGOTTEN_SOCKETS",
    "Borrowed",
    "MongoServer",
    "forgotten_sockets",
    "in_database",
    "mongo_client",
    "mongo_database",
    "mongo_url",
    "own_mongo",
]

#: Both drivers get every test that says so.
DRIVERS = ("pymongo", "motor")

#: Cancelled or closed amid an attempt to connect, PyMongo leaves the socket to the garbage collector, which warns.
FORGOTTEN_SOCKETS = [
    pytest.mark.filterwarnings("ignore:Exception ignored in. <socket:pytest.PytestUnraisableExceptionWarning"),
    pytest.mark.usefixtures("forgotten_sockets"),
]

# On the end of its standard input, which is the end of whoever started it, the watchdog kills the server and removes
# its directory.
_WATCHDOG = """
cat >/dev/null
kill -KILL "$(cat "$0/pid")" 2>/dev/null
sleep 0.2
rm -rf "$0"
"""


class MongoServer:
    """One server: `start`, `kill9`, `pause` and `resume` as often as you like, then `stop`."""

    def __init__(self, *options: str) -> None:
        self._options = options
        self.directory = Path(tempfile.mkdtemp(prefix="aproxy-mongo-"))
        self.port = 0
        self._process: subprocess.Popen[bytes] | None = None
        self._watchdog = subprocess.Popen(
            ["/bin/sh", "-c", _WATCHDOG, str(self.directory)], stdin=subprocess.PIPE, start_new_session=True
        )

    @property
    def url(self) -> str:
        return f"mongodb://127.0.0.1:{self.port}"

    def start(self, *options: str, within: float = 60.0) -> None:
        """Start the server, on the same port as before if there was one, and wait until it answers."""
        program = Path(sys.executable).with_name("secantusd-py")
        until = time.monotonic() + within
        while True:
            port = self.port or _free_port()
            with (self.directory / "log").open("ab") as log:
                place = ["--host", "127.0.0.1", "--port", str(port), "--storage-path", str(self.directory / "data")]
                self._process = subprocess.Popen(
                    [program, *place, "--cache-size", "128M", "--log-level", "ERROR", *self._options, *options],
                    stdout=log,
                    stderr=log,
                    cwd=self.directory,  # it looks for a configuration where it stands
                )
            (self.directory / "pid").write_text(str(self._process.pid))
            while self._process.poll() is None and time.monotonic() < until:
                if _answers(port):
                    self.port = port
                    return
                time.sleep(0.02)
            if time.monotonic() > until:
                raise RuntimeError(f"SecantusDB does not start: {(self.directory / 'log').read_text()[-2000:]}")
            time.sleep(0.1)  # somebody else may have taken the port

    def kill9(self) -> None:
        """Kill the server, as a crash would."""
        assert self._process is not None
        self._process.kill()
        self._process.wait()

    def pause(self) -> None:
        """Stop the server without ending it: connections stay open, and nobody answers."""
        assert self._process is not None
        stop(self._process.pid)

    def resume(self) -> None:
        """Let it go on."""
        assert self._process is not None
        self._process.send_signal(signal.SIGCONT)

    def stop(self) -> None:
        """End the server and remove what it left; killed, because it takes seconds to end by itself."""
        if self._process is not None and self._process.poll() is None:
            self.kill9()
        assert self._watchdog.stdin is not None
        self._watchdog.stdin.close()
        self._watchdog.wait()
        shutil.rmtree(self.directory, ignore_errors=True)


def in_database(url: str, name: str) -> str:
    """Return the URL of a server, which may have a query, with the name of a database."""
    return urlunsplit(urlsplit(url)._replace(path=f"/{name}"))


def _free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port: int = found.getsockname()[1]
        return port


def _answers(port: int) -> bool:
    with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=0.5):
        client: pymongo.MongoClient[Any] = pymongo.MongoClient(
            "127.0.0.1", port, serverSelectionTimeoutMS=2000, directConnection=True
        )
        try:
            client.admin.command("ping")
            return True
        except pymongo.errors.PyMongoError:
            return False
        finally:
            client.close()
    return False


@pytest.fixture(scope="module")
def forgotten_sockets() -> Iterator[None]:
    """Let none of them be found in a test of another module."""
    yield
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ResourceWarning)
        gc.collect()


@pytest.fixture(scope="session")
def mongo_url() -> Iterator[str]:
    """Give the URL of the server that all tests share, without a database."""
    if given := os.environ.get("APROXY_TEST_MONGO_URL"):
        yield given
        return
    server = MongoServer()
    try:
        server.start()
        yield server.url
    finally:
        server.stop()


@pytest.fixture
def own_mongo() -> Iterator[MongoServer]:
    """Give a server for one test alone, which may kill and stop it."""
    server = MongoServer()
    try:
        server.start()
        yield server
    finally:
        server.stop()


@pytest_asyncio.fixture
async def mongo_client(mongo_url: str) -> AsyncIterator[AsyncMongoClient[Any]]:
    """Give a client of the test's own, to look behind the back of what it tests."""
    async with AsyncMongoClient(mongo_url, serverSelectionTimeoutMS=5000, tz_aware=True) as client:
        yield client


@pytest_asyncio.fixture
async def mongo_database(mongo_client: AsyncMongoClient[Any]) -> AsyncIterator[Any]:
    """Give an empty database, which is dropped after the test."""
    name = f"aproxy_{uuid.uuid4().hex[:12]}"
    yield mongo_client[name]
    await mongo_client.drop_database(name)


class Borrowed:
    """What a user may pass: a function that gives the running loop a database of `driver`, of a client that is his."""

    def __init__(self, driver: str, url: str, name: str, **options: Any) -> None:
        self._driver = driver
        self._url = url
        self._name = name
        self._options = options
        self.clients: list[Any] = []

    def __call__(self) -> Any:
        if self._driver == "motor":
            from motor.motor_asyncio import AsyncIOMotorClient

            client = AsyncIOMotorClient(self._url, io_loop=asyncio.get_running_loop(), **self._options)
        else:
            client = AsyncMongoClient(self._url, **self._options)
        self.clients.append(client)
        return client[self._name]

    async def close(self) -> None:
        """Close what was given, as its owner has to."""
        while self.clients:
            closing = self.clients.pop().close()
            if closing is not None:
                await closing
