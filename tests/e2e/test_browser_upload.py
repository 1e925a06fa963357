"""The example of uploads straight from the browser, in a real one: ``make test-e2e``."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pytest

from tests.e2e.test_django_project import browser  # noqa: F401
from tests.services.s3 import S3Server, S3Service

pytestmark = pytest.mark.e2e

ROOT = Path(__file__).parent.parent.parent


@pytest.fixture
def service(s3_server: S3Server) -> S3Service:
    return s3_server.service.fresh()


@pytest.fixture
def site(service: S3Service, tmp_path: Path) -> Iterator[str]:
    """Serve the example; return its address."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    query = f"endpoint_url={quote(str(service.endpoint_url))}&region={service.region}"
    program = [sys.executable, "-m", "uvicorn", "--app-dir", str(ROOT / "examples"), "--port", str(port)]
    log = tmp_path / "log"
    with log.open("wb") as output:
        server = subprocess.Popen(
            [*program, "browser_upload:app"],
            env={
                **os.environ,
                "PYTHONPATH": str(ROOT),
                "S3_URL": f"s3://{service.bucket}/{service.prefix}?{query}",
                "META_URL": f"sqlite:{tmp_path / 'meta.sqlite3'}",
                "AWS_ACCESS_KEY_ID": str(service.access_key),
                "AWS_SECRET_ACCESS_KEY": str(service.secret_key),
            },
            stdout=output,
            stderr=subprocess.STDOUT,
        )
    address = f"http://127.0.0.1:{port}"
    try:
        for _ in range(600):
            assert server.poll() is None, log.read_text()
            try:
                urllib.request.urlopen(address, timeout=5).close()
                break
            except (urllib.error.URLError, ConnectionError):
                time.sleep(0.1)
        yield address
        assert "Traceback" not in log.read_text(), log.read_text()
    finally:
        server.kill()
        server.wait()


def test_a_file_goes_straight_to_the_service(browser: Any, site: str, tmp_path: Path) -> None:  # noqa: F811
    content = os.urandom(3_000_000)
    chosen = tmp_path / "om 写真.bin"
    chosen.write_bytes(content)
    page = browser.new_context().new_page()
    page.set_default_timeout(30_000)
    asked: list[tuple[str, str]] = []
    page.on("request", lambda request: asked.append((request.method, request.url)))
    page.goto(site)
    page.set_input_files("#file", chosen)
    link = page.locator("#said a")
    link.wait_for()
    assert link.inner_text() == "om 写真.bin, 3000000 bytes"
    posts = [url for method, url in asked if method == "POST"]
    assert [url.removeprefix(site) for url in posts if url.startswith(site)] == ["/begin", "/finish"]
    assert len(posts) == 3, "the content has gone another way"
    assert page.request.get(site + link.get_attribute("href")).body() == content


def test_another_type_is_refused_by_the_service(browser: Any, site: str, tmp_path: Path) -> None:  # noqa: F811
    page = browser.new_context().new_page()
    page.set_default_timeout(30_000)
    page.route("**/begin", lambda route: route.continue_(post_data='{"name": "x.txt"}'))
    page.goto(site)
    chosen = tmp_path / "x.txt"
    chosen.write_bytes(b"no picture")
    page.evaluate(
        """() => { const append = FormData.prototype.append; FormData.prototype.append = function (name, value) {
            return append.call(this, name, name === "Content-Type" ? "text/html" : value); } }"""
    )
    page.set_input_files("#file", chosen)
    page.wait_for_function("document.getElementById('said').textContent.startsWith('refused: 403')")
