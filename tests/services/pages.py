"""Services for the programs in README and docs/: a block that has ``<!-- needs: NAME -->`` above gets ``page_NAME``.

Each fixture starts the service and gives a mapping: texts that stand for it on the page, such as a URL with a made-up
host, and what is put in their place before the block runs. What a page makes there is its own, and is gone after.
"""

from __future__ import annotations

import asyncio
import contextlib
import secrets
from collections.abc import Iterator, Mapping
from urllib.parse import urlsplit, urlunsplit

import pytest

from tests.services.s3 import S3Server

__all__ = ["page_live_bucket", "page_mongo", "page_postgres", "page_s3"]


def _in_database(url: str, name: str) -> str:
    return urlunsplit(urlsplit(url)._replace(path=f"/{name}"))


@pytest.fixture
def page_postgres(postgres_url: str) -> Iterator[Mapping[str, str]]:
    """Give a database of its own for ``postgresql://app@db.example/app``."""
    import asyncpg

    name = f"page_{secrets.token_hex(6)}"

    async def execute(statement: str) -> None:
        connection = await asyncpg.connect(postgres_url)
        try:
            await connection.execute(statement)
        finally:
            await connection.close()

    asyncio.run(execute(f"CREATE DATABASE {name}"))
    # By hand: urlunsplit makes postgresql:/x of a URL without a host.
    head, _, query = postgres_url.partition("?")
    url = f"{head.rpartition('/')[0]}/{name}" + (f"?{query}" if query else "")
    yield {"postgresql://app@db.example/app": url}
    asyncio.run(execute(f"DROP DATABASE {name} WITH (FORCE)"))


@pytest.fixture
def page_mongo(mongo_url: str) -> Iterator[Mapping[str, str]]:
    """Give a database of its own for ``mongodb://db.example/app``."""
    import pymongo

    name = f"page_{secrets.token_hex(6)}"
    yield {"mongodb://db.example/app": _in_database(mongo_url, name)}
    with pymongo.MongoClient(mongo_url) as client:
        client.drop_database(name)


@pytest.fixture
def page_s3(s3_server: S3Server, monkeypatch: pytest.MonkeyPatch) -> Mapping[str, str]:
    """Give a bucket for ``my-bucket`` at ``https://s3.example.org``, with credentials in the environment."""
    service = s3_server.service
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", str(service.access_key))
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", str(service.secret_key))
    monkeypatch.setenv("AWS_DEFAULT_REGION", str(service.region))
    bucket = f"page-{secrets.token_hex(6)}"
    with contextlib.closing(service.client()) as client:
        client.create_bucket(Bucket=bucket)
    return {"https://s3.example.org": str(service.endpoint_url), "my-bucket": bucket}


@pytest.fixture
def page_live_bucket(s3_server: S3Server) -> Mapping[str, str]:
    """Give a bucket with three files, and a key that may only read it, for one URL."""
    service, reader = s3_server.service, s3_server.read_only
    bucket = f"live-{secrets.token_hex(6)}"
    with contextlib.closing(service.client()) as client:
        client.create_bucket(Bucket=bucket)
        for name in ("about/team.jpg", "logo.png", "日本/写真.jpg"):
            client.put_object(Bucket=bucket, Key=name, Body=name.encode() * 1000)
    return {
        "obstore+s3://READER:SECRET@live-media?endpoint=https://s3.example": (
            f"obstore+s3://{reader.access_key}:{reader.secret_key}@{bucket}"
            f"?endpoint={reader.endpoint_url}&region={reader.region}&flat_listings=false"
        )
    }
