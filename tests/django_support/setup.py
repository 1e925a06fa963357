"""One configured Django for the whole test process, and databases for it that come and go with a test.

`configure` is called by whoever needs Django, any number of times. A test takes the fixture ``django_database``
(a fresh SQLite file as the database ``default``), or adds databases under names of its own.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

import pytest

__all__ = [
    "add_database",
    "close_connections",
    "configure",
    "django_database",
    "forget_connections",
    "make_tables",
    "migrated_sqlite",
    "postgres_settings",
    "remove_database",
    "sqlite_settings",
]


def configure() -> None:
    """Set Django up with `tests.django_support.settings`; the second call does nothing."""
    import django
    from django.conf import settings

    if not settings.configured:
        os.environ.setdefault("DJANGO_SETTINGS_MODULE", "tests.django_support.settings")
        django.setup()


def sqlite_settings(path: Path, **options: Any) -> dict[str, Any]:
    """Return the entry of DATABASES for an SQLite file; ``options`` are Django's OPTIONS."""
    return {"ENGINE": "django.db.backends.sqlite3", "NAME": str(path), "OPTIONS": options}


def postgres_settings(url: str, **options: Any) -> dict[str, Any]:
    """Return the entry of DATABASES for a ``postgresql://`` URL."""
    parts = urlsplit(url)
    query = {name: values[-1] for name, values in parse_qs(parts.query).items()}
    return {
        "ENGINE": "django.db.backends.postgresql",
        "NAME": unquote(parts.path.lstrip("/")),
        "USER": unquote(parts.username or ""),
        "PASSWORD": unquote(parts.password or ""),
        "HOST": parts.hostname or query.pop("host", ""),
        "PORT": str(parts.port or query.pop("port", "")),
        "OPTIONS": {**query, **options},
    }


def add_database(alias: str, given: dict[str, Any]) -> None:
    """Make a database known under `alias`, to every thread."""
    from django.db import connections

    whole = connections.configure_settings({"default": connections.settings["default"], alias: given})
    connections.settings[alias] = whole[alias]


def remove_database(alias: str) -> None:
    """Close its connections, of this thread and of asgiref's, and forget it."""
    from django.db import connections

    forget_connections(alias)
    del connections.settings[alias]


def forget_connections(alias: str) -> None:
    """Close the connections to one database, of this thread and of asgiref's, with all that they know."""
    from django.db import connections

    def forget() -> None:
        connections[alias].close()
        del connections[alias]

    _in_both_threads(forget)


def close_connections() -> None:
    """Close all connections of this thread and of the one in which asgiref runs synchronous code."""
    from django.db import connections

    _in_both_threads(connections.close_all)


def _in_both_threads(function: Any) -> None:
    from asgiref.sync import SyncToAsync

    executor: ThreadPoolExecutor = SyncToAsync.single_thread_executor
    executor.submit(function).result(timeout=30)
    function()


def make_tables(alias: str) -> None:
    """Migrate the database; models without migrations get their tables too."""
    from django.core.management import call_command

    call_command("migrate", database=alias, run_syncdb=True, interactive=False, verbosity=0)


@pytest.fixture(scope="session")
def migrated_sqlite(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An SQLite file with all tables, to be copied: migrating takes a second, copying nothing."""
    configure()
    path = tmp_path_factory.mktemp("django") / "migrated.sqlite3"
    add_database("template", sqlite_settings(path))
    try:
        make_tables("template")
    finally:
        remove_database("template")
    return path


@pytest.fixture
def django_database(migrated_sqlite: Path, tmp_path: Path) -> Iterator[Path]:
    """Give the database ``default`` a fresh SQLite file with all tables; return its path."""
    from django.db import connections

    path = tmp_path / "django.sqlite3"
    shutil.copyfile(migrated_sqlite, path)
    settings = connections.settings["default"]
    before = settings["NAME"]
    close_connections()
    settings["NAME"] = str(path)
    try:
        yield path
    finally:
        close_connections()
        settings["NAME"] = before
