"""What goes wrong with a database of Django's, and what it is called."""

from __future__ import annotations

import asyncio
import sqlite3
import threading
import time
import uuid
from pathlib import Path
from typing import Any

import psycopg
import pytest
from asgiref.sync import sync_to_async
from django.db import connections, models

from aproxy_storage import (
    AccessDenied,
    BackendUnavailable,
    ConfigurationError,
    DeadlineExceeded,
    Timeouts,
)
from aproxy_storage.config import meta_backend_from_url
from aproxy_storage.meta_backends.orm import ORMMetaBackend
from aproxy_storage.testing.meta_backends import make_record
from sync_bridge.models import StoredFile
from tests.django_support.setup import (
    postgres_settings,
    sqlite_settings,
)
from tests.services.postgres import PASSWORD_ROLE, PostgresServer

pytestmark = pytest.mark.asyncio


# -- put together wrongly


async def refused(meta: ORMMetaBackend, told: str) -> None:
    """Hold that setup and use say the same."""
    record = make_record("a")
    for work in (meta.setup, lambda: meta.create(record), lambda: meta.get("a"), lambda: meta.delete("a"), meta.count):
        with pytest.raises(ConfigurationError, match=told) as caught:
            await work()
        assert not caught.value.outcome_unknown


async def test_a_table_that_is_not_migrated(added: Any, tmp_path: Path, postgres_url: str) -> None:
    nowhere = postgres_settings(postgres_url, options="-c search_path=nowhere")  # other tests have tables in theirs
    for settings in (sqlite_settings(tmp_path / "empty.sqlite3"), nowhere):
        await refused(ORMMetaBackend("shelf.PlainFile", added(settings), original="fs"), r"run manage\.py migrate")


async def test_a_table_that_is_behind_its_model(django_database: Path) -> None:
    with sqlite3.connect(django_database) as direct:
        direct.execute("ALTER TABLE sync_bridge_storedfile DROP COLUMN checksum")
    direct.close()
    meta = ORMMetaBackend(StoredFile)
    with pytest.raises(ConfigurationError, match=r"no such column: sync_bridge_storedfile\.checksum.*run manage\.py"):
        await meta.setup()
    with pytest.raises(ConfigurationError, match=r"run manage\.py migrate"):
        await meta.get("a")


async def test_a_model_that_cannot_keep_records(django_database: Path) -> None:
    class Bare(models.Model):
        path = models.CharField(max_length=255, unique=True)
        proxy_storage_name = models.CharField(max_length=50)
        original_storage_path = models.CharField(max_length=255)

        class Meta:
            app_label = "shelf"

    class Heir(StoredFile):
        class Meta:
            app_label = "shelf"

    try:
        await refused(ORMMetaBackend(Bare), r"lacks the columns state, token.* inherit from\s+sync_bridge.models")
        await refused(ORMMetaBackend(Heir), "multi-table inheritance")
    finally:
        for name in ("bare", "heir"):
            del Bare._meta.apps.all_models["shelf"][name]
        Bare._meta.apps.clear_cache()
        StoredFile._meta._expire_cache()


async def test_names_that_nobody_has(django_database: Path) -> None:
    await refused(ORMMetaBackend("shelf.Nothing"), "there is no model 'shelf.Nothing'")
    await refused(ORMMetaBackend("nothing"), "there is no model 'nothing'")
    await refused(ORMMetaBackend(StoredFile, "nowhere"), "there is no database 'nowhere' in DATABASES")


async def test_a_password_that_is_wrong(added: Any, own_postgres: PostgresServer) -> None:
    with psycopg.connect(own_postgres.url, autocommit=True) as direct:
        direct.execute(f"CREATE ROLE {PASSWORD_ROLE} LOGIN PASSWORD 'right'")
    for url, told in (
        (own_postgres.url_of("postgres", user=PASSWORD_ROLE, password="wr0ng!"), "password authentication failed"),
        (own_postgres.url_of("nowhere"), 'database "nowhere" does not exist'),
    ):
        alias = added(postgres_settings(url))
        meta = ORMMetaBackend(StoredFile, alias)
        await refused(meta, told)
        with pytest.raises(ConfigurationError) as caught:
            await meta.count()
        assert f"DATABASES['{alias}']" in str(caught.value)
        link: BaseException | None = caught.value
        while link is not None:
            assert "wr0ng!" not in str(link)
            link = link.__cause__


async def test_missing_rights(added: Any, postgres_database: str, postgres_url: str) -> None:
    role = f"r{uuid.uuid4().hex[:8]}"
    with psycopg.connect(postgres_url, autocommit=True) as direct:
        direct.execute(f"CREATE ROLE {role}")
        direct.execute(f"GRANT USAGE ON SCHEMA {postgres_database} TO {role}")
    options = f"-c search_path={postgres_database} -c role={role}"
    meta = ORMMetaBackend(StoredFile, added(postgres_settings(postgres_url, options=options)))
    with pytest.raises(AccessDenied, match="permission denied"):
        await meta.create(make_record("a"))


async def test_urls(django_database: Path) -> None:
    meta = meta_backend_from_url("django-orm://sync_bridge.StoredFile?using=default&timeouts.operation=3&durable=yes")
    assert isinstance(meta, ORMMetaBackend)
    assert (meta.model, meta.using, meta.timeouts.operation, meta.durable) == (
        "sync_bridge.StoredFile", "default", 3.0, True,
    )  # fmt: skip
    assert (await meta.create(make_record("a"))).path == "a"
    await meta.aclose()
    for url in ("django-orm://", "django-orm://StoredFile", "django-orm://a.B/c", "django-orm:a.B"):
        with pytest.raises(ConfigurationError, match=r"names no model: write django-orm://app\.Model"):
            meta_backend_from_url(url)
    with pytest.raises(ConfigurationError, match="unknown parameter"):
        meta_backend_from_url("django-orm://a.B?table=x")


# -- locked, lost, hung


async def test_a_database_that_is_locked(added: Any, django_database: Path) -> None:
    meta = ORMMetaBackend(StoredFile, added(sqlite_settings(django_database, timeout=0.1)))
    direct = sqlite3.connect(django_database, isolation_level=None)
    direct.execute("BEGIN IMMEDIATE")
    with pytest.raises(BackendUnavailable, match=r"is locked.*another connection holds") as caught:
        await meta.create(make_record("a"))
    assert caught.value.retryable
    assert not caught.value.outcome_unknown
    direct.execute("ROLLBACK")
    direct.close()
    assert (await meta.create(make_record("a"))).path == "a"
    await meta.aclose()


async def test_a_busy_thread_is_told_from_a_slow_database(django_database: Path) -> None:
    meta = ORMMetaBackend(StoredFile, timeouts=Timeouts(operation=1.0))
    release = threading.Event()
    blocker = asyncio.create_task(sync_to_async(release.wait)(30))
    await asyncio.sleep(0.05)
    began = time.monotonic()
    with pytest.raises(DeadlineExceeded, match="nothing was begun") as caught:
        await meta.create(make_record("a"))
    assert time.monotonic() - began < 10
    assert not caught.value.outcome_unknown
    task = asyncio.create_task(meta.create(make_record("b")))
    await asyncio.sleep(0.05)
    task.cancel()
    with pytest.raises(asyncio.CancelledError) as cancelled:
        await task
    assert cancelled.value.outcome_unknown is False  # type: ignore[attr-defined]
    release.set()
    await blocker
    assert await meta.count() == 0, "what was given up before it began is never begun"
    await meta.aclose()


async def test_statements_that_the_server_gives_up(added: Any, postgres_database: str, postgres_url: str) -> None:
    options = f"-c search_path={postgres_database} -c lock_timeout=50ms"
    meta = ORMMetaBackend(StoredFile, added(postgres_settings(postgres_url, options=options)))
    await meta.create(make_record("a"))
    with psycopg.connect(postgres_url) as direct:
        direct.execute(f"SELECT * FROM {postgres_database}.sync_bridge_storedfile FOR UPDATE")
        with pytest.raises(BackendUnavailable, match="lock timeout") as caught:
            await meta.update("a", {"size": 1})
        assert not caught.value.outcome_unknown
    assert (await meta.update("a", {"size": 1})).size == 1
    await meta.aclose()


# -- indexes


@pytest.mark.parametrize("work", ["get", "page", "unfinished", "owners", "count"])
async def test_every_look_up_goes_through_an_index(work: str, database: str) -> None:
    meta = ORMMetaBackend(StoredFile, database)
    await meta.create_many(
        [make_record(f"{number:04}", original_storage_path=f"k{number:04}") for number in range(600)]
    )
    seen: list[tuple[str, Any]] = []

    def watch(execute: Any, sql: str, params: Any, many: bool, context: Any) -> Any:
        seen.append((sql, params))
        return execute(sql, params, many, context)

    def explained() -> list[str]:
        connection = connections[database]
        with connection.cursor() as cursor:
            if connection.vendor == "postgresql":
                cursor.execute("ANALYZE sync_bridge_storedfile")
                cursor.execute("SET enable_seqscan = off")
            with connection.execute_wrapper(watch):
                rows = meta._rows
                {
                    "get": lambda: rows.get(connection, "0001"),
                    "page": lambda: rows.page(connection, "01", "0150", False, 10, None, None),
                    "unfinished": lambda: rows.unfinished(connection, None, 0.0, None, 10, False),
                    "owners": lambda: rows.owners(connection, ["k0001", "0002"]),
                    "count": lambda: rows.count(connection, "01", None, None),
                }[work]()
            sql, params = seen[0]
            cursor.execute(("EXPLAIN QUERY PLAN " if connection.vendor == "sqlite" else "EXPLAIN ") + sql, params)
            plan = [str(row[-1]) for row in cursor.fetchall()]
            if connection.vendor == "postgresql":
                cursor.execute("RESET enable_seqscan")
        return plan

    plan = await sync_to_async(explained)()
    text = "\n".join(plan)
    assert "Seq Scan" not in text, text
    assert "SCAN sync_bridge_storedfile\n" not in text + "\n", text
    assert "TEMP B-TREE" not in text, text
    assert "Sort" not in text, text
    await meta.aclose()
