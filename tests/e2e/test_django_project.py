"""The example site in a real browser, under uvicorn and under gunicorn: ``make test-e2e``.

Chromium is found in the PATH, or named by ``APROXY_CHROMIUM``.
"""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.e2e

ROOT = Path(__file__).parent.parent.parent
PROJECT = ROOT / "examples" / "django_project"


def environment(directory: Path) -> dict[str, str]:
    """Return that of the example: its data in `directory`, and its own settings, not those of other tests."""
    inherited = {name: value for name, value in os.environ.items() if name != "DJANGO_SETTINGS_MODULE"}
    return {**inherited, "PYTHONPATH": str(ROOT), "EXAMPLE_VAR": str(directory / "var")}


def png(size: int) -> bytes:
    """Return a picture of `size` by `size` pixels that a browser can show."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return len(data).to_bytes(4, "big") + kind + data + zlib.crc32(kind + data).to_bytes(4, "big")

    header = size.to_bytes(4, "big") * 2 + bytes([8, 2, 0, 0, 0])
    pixels = zlib.compress((b"\0" + os.urandom(3 * size)) * size)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", pixels) + chunk(b"IEND", b"")


def chromium() -> str:
    named = os.environ.get("APROXY_CHROMIUM")
    found = named or next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    assert found, "no Chromium found: apt-get install chromium, or name one by APROXY_CHROMIUM"
    return found


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        # Without its sandbox, which needs rights that root in a container has not.
        browser = playwright.chromium.launch(executable_path=chromium(), args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture(params=["uvicorn", "gunicorn"])
def site(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    """Serve the example over an empty database; return its address."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    log = tmp_path / "log"
    with log.open("wb") as output:
        server = subprocess.Popen(
            [sys.executable, str(PROJECT / "run.py"), request.param, "--port", str(port)],
            env=environment(tmp_path),
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    address = f"http://127.0.0.1:{port}"
    try:
        for _ in range(600):
            assert server.poll() is None, log.read_text()
            try:
                urllib.request.urlopen(f"{address}/accounts/login/", timeout=5).close()
                break
            except (urllib.error.URLError, ConnectionError):
                time.sleep(0.1)
        else:
            raise AssertionError(log.read_text())
        yield address
        server.send_signal(signal.SIGTERM)
        server.wait(timeout=30)
        said = log.read_text()
        assert "Traceback" not in said, said
    finally:
        if server.poll() is None:
            os.killpg(server.pid, signal.SIGKILL)
            server.wait()


def enter(browser: Any, site: str, name: str) -> Any:
    """Log in as `name`; return a page of a session of its own."""
    page = browser.new_context().new_page()
    page.set_default_timeout(15_000)
    page.goto(f"{site}/accounts/login/")
    page.fill("#id_username", name)
    page.fill("#id_password", "demo")
    page.click("#enter")
    page.wait_for_selector("#send")
    return page


@pytest.mark.parametrize("section", ["", "async/"])
def test_a_letter_with_a_picture(browser: Any, site: str, section: str, tmp_path: Path) -> None:
    picture = tmp_path / "om 写真.png"
    picture.write_bytes(png(64))

    ann = enter(browser, site, "ann")
    ann.goto(f"{site}/{section}")
    ann.select_option("#id_receiver", label="bob")
    ann.fill("#id_text", "Look at this")
    ann.set_input_files("#id_attachment", picture)
    ann.click("#send")
    link = ann.locator("#letters a")
    link.wait_for()
    assert link.inner_text() == "letters/om_写真.png"
    where = site + link.get_attribute("href")
    assert section in where

    bob, eve = enter(browser, site, "bob"), enter(browser, site, "eve")
    for page, status in ((ann, 200), (bob, 200), (eve, 403)):
        assert page.request.get(where).status == status
    assert bob.request.get(where).body() == picture.read_bytes()
    with bob.expect_download() as download:
        bob.goto(f"{site}/{section}")
        bob.click("#letters a")
    assert Path(download.value.path()).read_bytes() == picture.read_bytes()
    assert bob.request.get(where.replace("om_", "none_")).status == 404

    admin = enter(browser, site, "admin")
    admin.goto(f"{site}/admin/sync_bridge/storedfile/")
    admin.click("text=letters/om_写真.png")
    shown = admin.locator("img[src$='/preview/']")
    shown.wait_for()
    admin.wait_for_function("document.querySelector(\"img[src$='/preview/']\").naturalWidth === 64")
    assert admin.locator("text=Look at this").count() == 1, "the letter that the file belongs to"
    admin.click(".deletelink")
    admin.click('input[type=submit][value="Yes, I’m sure"]')
    admin.wait_for_selector("text=was deleted successfully")
    assert ann.request.get(where).status == 404
    assert not [file for file in (tmp_path / "var" / "attachments").rglob("*") if file.is_file()]
