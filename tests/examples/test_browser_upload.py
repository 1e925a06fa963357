"""The example of uploads past this process, without the browser and the bucket that `tests/e2e` has."""

import json
import runpy
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from aproxy_storage import ProxyStorage

ROOT = Path(__file__).parents[2]


@pytest.fixture
def example(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    monkeypatch.setenv("S3_URL", "s3://K:S@bucket?endpoint_url=http://127.0.0.1:9&region=r")
    monkeypatch.setenv("META_URL", f"sqlite:{tmp_path}/uploads.sqlite3")
    return runpy.run_path(str(ROOT / "examples" / "browser_upload.py"))


async def ask(app: Any, method: str, path: str, **data: str) -> tuple[int, bytes]:
    sent: list[Any] = []

    async def receive() -> dict[str, Any]:
        return {"type": "http.request", "body": json.dumps(data).encode(), "more_body": False}

    async def send(message: Any) -> None:
        sent.append(message)

    await app({"type": "http", "method": method, "path": path, "query_string": b"", "headers": []}, receive, send)
    return sent[0]["status"], sent[1]["body"]


@pytest.mark.asyncio
async def test_what_a_browser_asks_wrongly_is_no_fault_of_the_server(example: dict[str, Any]) -> None:
    app = example["app"]
    async with example["storage"]:
        assert (await ask(app, "POST", "/begin", name="a/../b", type=""))[0] == 400
        assert (await ask(app, "POST", "/finish", secret="none"))[0] == 404
        assert (await ask(app, "GET", "/files/nowhere"))[0] == 404


@pytest.mark.asyncio
async def test_uploads_that_were_begun_are_forgotten_in_the_end(
    example: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    async def begin_upload(self: ProxyStorage, name: str, **options: Any) -> Any:
        return SimpleNamespace(path=name, form=SimpleNamespace(url="", fields={}))

    monkeypatch.setattr(ProxyStorage, "begin_upload", begin_upload)
    now = 0.0
    monkeypatch.setitem(example["begin"].__globals__, "time", SimpleNamespace(monotonic=lambda: now))
    for now in (0.0, 10.0, 90_000.0):
        assert (await ask(example["app"], "POST", "/begin", name=f"{now}", type=""))[0] == 200
    assert [path for _, path in example["begun"].values()] == ["90000.0"]
