"""The example of uploads past this process, without the browser and the bucket that `tests/e2e` has."""

import json
import runpy
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from aproxy_storage import MetaRecord, ProxyStorage

ROOT = Path(__file__).parents[2]


@pytest.fixture
def example(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    monkeypatch.setenv("S3_URL", "s3://K:S@bucket?endpoint_url=http://127.0.0.1:9&region=r")
    monkeypatch.setenv("META_URL", f"sqlite:{tmp_path}/uploads.sqlite3")
    return runpy.run_path(str(ROOT / "examples" / "browser_upload.py"))


async def answer(app: Any, method: str, path: str, **data: str) -> tuple[int, dict[bytes, bytes], bytes]:
    sent: list[Any] = []

    async def receive() -> dict[str, Any]:
        return {"type": "http.request", "body": json.dumps(data).encode(), "more_body": False}

    async def send(message: Any) -> None:
        sent.append(message)

    await app({"type": "http", "method": method, "path": path, "query_string": b"", "headers": []}, receive, send)
    return sent[0]["status"], dict(sent[0]["headers"]), sent[1]["body"]


async def ask(app: Any, method: str, path: str, **data: str) -> tuple[int, bytes]:
    status, _, body = await answer(app, method, path, **data)
    return status, body


@pytest.mark.asyncio
async def test_what_a_browser_asks_wrongly_is_no_fault_of_the_server(example: dict[str, Any]) -> None:
    app = example["app"]
    async with example["storage"]:
        assert (await ask(app, "POST", "/begin", name="a/../b"))[0] == 400
        assert (await ask(app, "POST", "/finish", secret="none"))[0] == 404
        assert (await ask(app, "GET", "/files/nowhere"))[0] == 404


@pytest.mark.asyncio
async def test_uploads_that_were_begun_are_forgotten_in_the_end(
    example: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    async def begin_upload(self: ProxyStorage, name: str, **options: Any) -> Any:
        assert "content_type" not in options, "the browser's"
        return SimpleNamespace(path=name, form=SimpleNamespace(url="", fields={}))

    monkeypatch.setattr(ProxyStorage, "begin_upload", begin_upload)
    now = 0.0
    monkeypatch.setitem(example["begin"].__globals__, "time", SimpleNamespace(monotonic=lambda: now))
    for now in (0.0, 10.0, 90_000.0):
        assert (await ask(example["app"], "POST", "/begin", name=f"{now}", type="text/html"))[0] == 200
    assert [path for _, path in example["begun"].values()] == ["90000.0"]


@pytest.mark.asyncio
async def test_pages_that_were_uploaded_are_not_shown(example: dict[str, Any]) -> None:
    storage = example["storage"]
    async with storage:
        await storage.meta.create(
            MetaRecord(
                path="a/page.html",
                proxy_storage_name=storage.name,
                original_storage_name=next(iter(storage.originals)),
                original_storage_path="a/page.html",
            )
        )
        status, headers, _ = await answer(example["app"], "GET", "/files/a/page.html")
    assert status == 307
    assert b"response-content-disposition=attachment%3B%20filename%3D%22page.html%22" in headers[b"location"]
