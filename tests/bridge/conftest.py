"""Django for the tests of the bridge: a database and a media directory of each test's own."""

import contextlib
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.django_support.setup import (
    add_database,
    close_connections,
    configure,
    django_database,  # noqa: F401
    make_tables,
    migrated_sqlite,  # noqa: F401
    postgres_settings,
    remove_database,
    sqlite_settings,
)

configure()


@pytest.fixture(autouse=True)
def nothing_left_behind() -> Iterator[None]:
    """Forget the storages that a test made known, which the scan of another would ask; close what it opened of SQLite.

    Python 3.13 warns of connections that are collected unclosed, in whatever test is running then.
    """
    from aproxy_storage import registry
    from aproxy_storage.meta_backends.sqlite import SQLiteMetaBackend
    from sync_bridge import options
    from sync_bridge.bridge import bridge

    made: list[SQLiteMetaBackend] = []

    def noted(self: SQLiteMetaBackend, *args: Any, **kwargs: Any) -> None:
        init(self, *args, **kwargs)
        made.append(self)

    init = SQLiteMetaBackend.__init__
    before, described = registry.registered_names(), set(options._made)
    with pytest.MonkeyPatch.context() as patch:  # not the test's own, which has to be undone before
        patch.setattr(SQLiteMetaBackend, "__init__", noted)
        yield
    for name in set(registry.registered_names()).difference(before):
        registry.unregister(name)
    for description in set(options._made) - described:
        del options._made[description]
    for meta in made:
        bridge.call(meta.aclose)


@pytest.fixture
def media(tmp_path: Path) -> Iterator[Path]:
    """Let MEDIA_ROOT be a fresh directory; return it."""
    from django.test import override_settings

    with override_settings(MEDIA_ROOT=tmp_path / "media"):
        yield tmp_path / "media"


@pytest.fixture(scope="session")
def postgres_default(postgres_url: str) -> Iterator[dict[str, Any]]:
    """Settings of a migrated database of the whole run, in PostgreSQL."""
    add_database("for_bridge", postgres_settings(postgres_url))
    make_tables("for_bridge")
    from django.db import connections

    yield connections.settings["for_bridge"]
    remove_database("for_bridge")


@pytest.fixture
def default_in_postgres(postgres_default: dict[str, Any]) -> Iterator[None]:
    """Let the database ``default`` be in PostgreSQL, and empty."""
    from django.core.management import call_command
    from django.db import connections

    close_connections()
    before, connections.settings["default"] = connections.settings["default"], postgres_default
    _forget_connections()
    try:
        yield
    finally:
        call_command("flush", interactive=False, verbosity=0)
        close_connections()
        connections.settings["default"] = before
        _forget_connections()


def _forget_connections() -> None:
    """Let the next use of ``default`` look at its settings, in this thread and in that of asgiref."""
    from asgiref.sync import SyncToAsync
    from django.db import connections

    def forget() -> None:
        with contextlib.suppress(AttributeError):
            del connections["default"]

    SyncToAsync.single_thread_executor.submit(forget).result(timeout=30)
    forget()


@pytest.fixture
def default(media: Path, request: pytest.FixtureRequest) -> object:
    """Return the default storage: files below `media`, records in a fresh database (SQLite, or as parametrized)."""
    on_postgres = getattr(request, "param", "sqlite") == "postgres"
    request.getfixturevalue("default_in_postgres" if on_postgres else "django_database")
    from django.core.files.storage import default_storage

    return default_storage


@pytest.fixture
def archive(django_database: Path, migrated_sqlite: Path, tmp_path: Path) -> Iterator[str]:  # noqa: F811
    """A second database, with the same tables."""
    shutil.copy(migrated_sqlite, tmp_path / "archive.sqlite3")
    add_database("archive", sqlite_settings(tmp_path / "archive.sqlite3"))
    yield "archive"
    remove_database("archive")
