"""Every server that Django runs under, started for real: forks, threads, loops, and a pool that outlives calls."""

import contextlib
import ctypes
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parent.parent.parent
SITE = "tests.bridge.site"
BIN = Path(sys.executable).parent
_PDEATHSIG = 1


def _die_with_the_run() -> None:
    ctypes.CDLL(None).prctl(_PDEATHSIG, signal.SIGKILL)


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with the migrated database of the site, to be copied."""
    directory = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "django", "migrate", "--settings", SITE, "--verbosity", "0"]
    subprocess.run(command, env=environment(directory), cwd=ROOT, check=True, timeout=60)
    return directory


def environment(directory: Path) -> dict[str, str]:
    kept = {key: value for key, value in os.environ.items() if not key.startswith(("COV", "PYTEST"))}
    return {
        **kept,
        "SITE_DIRECTORY": str(directory),
        "DJANGO_SETTINGS_MODULE": SITE,
        "PYTHONPATH": str(ROOT),
        "PYTHONUNBUFFERED": "1",
        "PATH": f"{BIN}:{os.environ.get('PATH', '')}",
    }


class Server:
    """One server process, its port and its output."""

    def __init__(self, command: list[str], directory: Path, port: int) -> None:
        self.url = f"http://127.0.0.1:{port}"
        self.log = directory / "log"
        self.directory = directory
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(
                command,
                env=environment(directory),
                cwd=ROOT,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
                preexec_fn=_die_with_the_run,
            )

    def get(self, path: str) -> Any:
        with urllib.request.urlopen(self.url + path, timeout=60) as response:
            return json.load(response)

    def wait(self) -> None:
        until = time.monotonic() + 60
        port = int(self.url.rpartition(":")[2])
        while time.monotonic() < until:
            assert self.process.poll() is None, self.text
            with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=1):
                return
            time.sleep(0.05)
        raise AssertionError(f"it does not listen: {self.text}")

    @property
    def text(self) -> str:
        return self.log.read_text(errors="replace")

    def stop(self, with_signal: int = signal.SIGTERM) -> None:
        """Ask it to end, as a process manager does; whoever hangs fails the test."""
        try:
            self.process.send_signal(with_signal)
            self.process.wait(30)
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()


@contextlib.contextmanager
def running(
    prepared: Path, tmp_path: Path, *command: str, stop: int = signal.SIGTERM, fails: bool = False
) -> Iterator[Server]:
    directory = tmp_path / "site"
    shutil.copytree(prepared, directory)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    server = Server([part.replace("PORT", str(port)) for part in command], directory, port)
    try:
        server.wait()
        yield server
    finally:
        server.stop(stop)
    if fails:
        return
    assert "Traceback" not in server.text, server.text
    assert not re.search(r"\w+Warning\b(?!:.*development server)", server.text), server.text


def assert_one_bridge(answers: list[dict[str, Any]]) -> None:
    assert all(answer["threads"] <= 1 for answer in answers)
    assert all(answer["threads"] == 1 for answer in answers if answer["alias"] == "threads")


def check(server: Server, requests: int = 24, at_once: int = 6) -> set[int]:
    """Send requests that save, read and delete over both storages; return the processes that answered."""
    paths = [f"/sync/{('default', 'threads')[number % 2]}?number={number}" for number in range(requests)]
    with ThreadPoolExecutor(at_once) as pool:
        answers = list(pool.map(server.get, paths))
    assert_one_bridge(answers)
    assert not list(server.directory.glob("*/*.txt")), "everything was deleted"
    return {answer["pid"] for answer in answers}


GUNICORN = (sys.executable, "-m", "gunicorn", "--bind=127.0.0.1:PORT", "--graceful-timeout=10")


@pytest.mark.parametrize(
    "options",
    [
        ("--workers=2", f"{SITE}:wsgi"),
        ("--workers=2", "--threads=4", "--worker-class=gthread", "--max-requests=10", f"{SITE}:wsgi"),
        ("--workers=2", "--preload", f"{SITE}:warm_wsgi"),
    ],
    ids=["sync", "gthread", "preload"],
)
def test_gunicorn(prepared: Path, tmp_path: Path, options: tuple[str, ...]) -> None:
    with running(prepared, tmp_path, *GUNICORN, *options) as server:
        assert server.process.pid not in check(server)


def test_gunicorn_with_gevent_is_refused(prepared: Path, tmp_path: Path) -> None:
    with running(prepared, tmp_path, *GUNICORN, "--worker-class=gevent", f"{SITE}:wsgi", fails=True) as server:
        for alias in ("default", "threads"):
            with pytest.raises(urllib.error.HTTPError):
                server.get(f"/sync/{alias}")
    assert "gevent has patched threading" in server.text


UWSGI = (
    *(str(BIN / "uwsgi"), "--http-socket=127.0.0.1:PORT", "--master", "--need-app", "--die-on-term"),
    *(f"--virtualenv={sys.prefix}", f"--module={SITE}_wsgi:application"),
)


def test_uwsgi(prepared: Path, tmp_path: Path) -> None:
    with running(prepared, tmp_path, *UWSGI, "--enable-threads", "--processes=2", "--threads=2") as server:
        assert check(server)


def test_uwsgi_without_threads_is_refused(prepared: Path, tmp_path: Path) -> None:
    with running(prepared, tmp_path, *UWSGI, fails=True) as server:
        with pytest.raises(urllib.error.HTTPError):
            server.get("/sync/threads")
    assert "--enable-threads" in server.text


def test_uvicorn(prepared: Path, tmp_path: Path) -> None:
    command = (sys.executable, "-m", "uvicorn", "--port=PORT", f"{SITE}:asgi")
    with running(prepared, tmp_path, *command) as server:
        check(server)
        for alias in ("default", "threads"):
            assert re.search(r"await \S*aexists\(\)", server.get(f"/async/{alias}")["refused"])


def test_runserver(prepared: Path, tmp_path: Path) -> None:
    command = (sys.executable, "-m", "django", "runserver", "--noreload", "127.0.0.1:PORT")
    with running(prepared, tmp_path, *command, stop=signal.SIGINT) as server:
        check(server, requests=8)


def test_celery_prefork(prepared: Path, tmp_path: Path) -> None:
    directory = tmp_path / "site"
    shutil.copytree(prepared, directory)
    command = [sys.executable, "-m", "celery", "-A", f"{SITE}:celery", "worker", "--pool=prefork", "--concurrency=2"]
    server = Server([*command, "--without-gossip", "--without-mingle", "--loglevel=WARNING"], directory, 0)
    ask = """
import json, sys
from tests.bridge import site
tasks = site.celery.tasks["round_trip"]
waiting = [tasks.delay(("default", "threads")[number % 2], str(number)) for number in range(12)]
print(json.dumps([one.get(timeout=60) for one in waiting]))
"""
    try:
        done = subprocess.run(
            [sys.executable, "-c", ask],
            env=environment(directory),
            cwd=ROOT,
            capture_output=True,
            text=True,
            timeout=90,
        )
    finally:
        server.stop()
    assert done.returncode == 0, done.stderr + server.text
    answers = json.loads(done.stdout)
    assert_one_bridge(answers)
    assert server.process.pid not in {answer["pid"] for answer in answers}
    assert "Traceback" not in server.text


PYTEST_DJANGO = """
import pytest
from django.core.files.base import ContentFile
from django.core.files.storage import default_storage
from django.db import connection, transaction

def save():
    return default_storage.save("a.txt", ContentFile(b"x"))

@pytest.fixture(autouse=True)
def media(settings, tmp_path):
    settings.MEDIA_ROOT = tmp_path

@pytest.mark.django_db
@pytest.mark.parametrize("again", [1, 2])
def test_each_test_is_rolled_back(again):
    assert save() == "a.txt"
    assert connection.in_atomic_block

@pytest.mark.django_db(transaction=True)
def test_with_real_transactions():
    with transaction.atomic():
        path = save()
    default_storage.delete(path)
    assert not default_storage.exists(path)

def test_without_the_mark_the_database_is_out_of_bounds():
    with pytest.raises(Exception, match="Database access not allowed|unexpected"):
        save()

@pytest.mark.django_db
def test_callbacks(django_capture_on_commit_callbacks, tmp_path):
    path = save()
    with django_capture_on_commit_callbacks(execute=True):
        default_storage.delete(path)
        assert (tmp_path / path).exists()
    assert not (tmp_path / path).exists()
"""


def test_pytest_django(tmp_path: Path) -> None:
    (tmp_path / "test_files.py").write_text(PYTEST_DJANGO)
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-p",
        "no:cacheprovider",
        "-p",
        "no:asyncio",
        "-W",
        "error",
        "--rootdir",
        str(tmp_path),
    ]
    done = subprocess.run(
        [*command, str(tmp_path)], cwd=tmp_path, env=environment(tmp_path), capture_output=True, text=True, timeout=90
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "5 passed" in done.stdout
