"""Endpoints of S3 that are remembered: those of botocore, found once, and only as far as no rule asks for the key."""

from __future__ import annotations

from collections.abc import AsyncIterator
from types import SimpleNamespace
from typing import Any

import pytest
import pytest_asyncio
from aiobotocore.config import AioConfig
from aiobotocore.session import AioSession

from aproxy_storage.backends import _s3_endpoints
from aproxy_storage.backends._s3_endpoints import remember_endpoints

KEYS = ("a", "b/é.txt", "c d", "{Key}")


@pytest.fixture(autouse=True)
def _nothing_is_known(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_s3_endpoints, "_asked_for", None)


@pytest_asyncio.fixture(params=["virtual", "path", "own"])
async def client(request: pytest.FixtureRequest) -> AsyncIterator[Any]:
    style = "path" if request.param == "path" else "virtual"
    async with AioSession().create_client(
        "s3",
        region_name="eu-central-1",
        endpoint_url="http://127.0.0.1:9" if request.param == "own" else None,
        aws_access_key_id="a",
        aws_secret_access_key="b",
        config=AioConfig(s3={"addressing_style": style}),
    ) as client:
        yield client


def loader() -> Any:
    return AioSession().get_component("data_loader")


async def signed(client: Any) -> list[str]:
    urls = [await client.generate_presigned_url("get_object", {"Bucket": "bucket", "Key": key}) for key in KEYS]
    return [url.partition("?")[0] for url in urls]


@pytest.mark.asyncio
async def test_urls_are_the_same_and_worked_out_once(client: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    before = await signed(client)
    provider = client._ruleset_resolver._provider
    asked: list[dict[str, Any]] = []
    resolve = provider.resolve_endpoint
    monkeypatch.setattr(provider, "resolve_endpoint", lambda **given: asked.append(given) or resolve(**given))
    remember_endpoints(client, loader())
    assert await signed(client) == before
    assert len(asked) == len(KEYS)
    assert all(given == asked[0] for given in asked), "so that botocore's own cache has the answer"
    provider.something_else = object()
    assert client._ruleset_resolver._provider.something_else is provider.something_else  # all else is passed on


@pytest.mark.parametrize("rules", [[{"ref": "Key"}], [{"url": "https://{Key#first}.s3"}]])
@pytest.mark.asyncio
async def test_what_a_rule_asks_for_is_not_left_out(client: Any, rules: Any) -> None:
    provider = client._ruleset_resolver._provider
    remember_endpoints(client, SimpleNamespace(load_service_model=lambda *names: {"rules": rules}))
    remembering = client._ruleset_resolver._provider
    assert remembering is not provider
    assert remembering._left_out == {"Prefix", "CopySource"}


@pytest.mark.asyncio
async def test_another_botocore_is_left_alone(client: Any) -> None:
    remember_endpoints(SimpleNamespace(), loader())
    remember_endpoints(SimpleNamespace(_ruleset_resolver=SimpleNamespace(_provider=object())), loader())
    provider = client._ruleset_resolver._provider

    def unknown(*names: str) -> Any:
        raise KeyError(names)

    _s3_endpoints._asked_for = None
    remember_endpoints(client, SimpleNamespace(load_service_model=unknown))
    assert client._ruleset_resolver._provider is provider
