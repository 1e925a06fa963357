"""The databases of the ORM's tests: a fresh SQLite file, and a schema of our own in PostgreSQL."""

from __future__ import annotations

import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.django_support.setup import add_database, configure, make_tables, postgres_settings, remove_database

configure()

import psycopg  # noqa: E402
from django.apps import apps  # noqa: E402
from django.db import connections  # noqa: E402


@pytest.fixture(scope="session")
def migrated_postgres(postgres_url: str) -> Iterator[str]:
    """The name of a database whose tables lie in a schema of their own."""
    alias = f"pg{uuid.uuid4().hex[:8]}"
    with psycopg.connect(postgres_url, autocommit=True) as connection:
        connection.execute(f"CREATE SCHEMA {alias}")
    add_database(alias, postgres_settings(postgres_url, options=f"-c search_path={alias}"))
    try:
        make_tables(alias)
        yield alias
    finally:
        remove_database(alias)
        with psycopg.connect(postgres_url, autocommit=True) as connection:
            connection.execute(f"DROP SCHEMA {alias} CASCADE")


@pytest.fixture
def postgres_database(migrated_postgres: str) -> str:
    """The same, with empty tables."""
    tables = [
        model._meta.db_table
        for label in ("sync_bridge", "shelf")
        for model in apps.get_app_config(label).get_models()
        if model._meta.managed
    ]
    with connections[migrated_postgres].cursor() as cursor:
        cursor.execute(f"TRUNCATE {', '.join(tables)} RESTART IDENTITY")
    return migrated_postgres


@pytest.fixture
def added() -> Iterator[Callable[[dict[str, Any]], str]]:
    """Add databases for the time of a test."""
    aliases: list[str] = []

    def add(settings: dict[str, Any]) -> str:
        alias = f"db{uuid.uuid4().hex[:8]}"
        add_database(alias, settings)
        aliases.append(alias)
        return alias

    yield add
    for alias in aliases:
        remove_database(alias)


@pytest.fixture(params=["sqlite", "postgresql"])
def database(request: pytest.FixtureRequest) -> str:
    """The name of an empty database of either kind."""
    if request.param == "sqlite":
        assert isinstance(request.getfixturevalue("django_database"), Path)
        return "default"
    name: str = request.getfixturevalue("postgres_database")
    return name
