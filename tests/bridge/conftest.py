"""Django for the tests of the bridge: a database and a media directory of each test's own."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.django_support.setup import configure, django_database, migrated_sqlite  # noqa: F401

configure()


@pytest.fixture
def media(tmp_path: Path) -> Iterator[Path]:
    """Let MEDIA_ROOT be a fresh directory; return it."""
    from django.test import override_settings

    with override_settings(MEDIA_ROOT=tmp_path / "media"):
        yield tmp_path / "media"


@pytest.fixture
def default(media: Path, django_database: Path) -> object:  # noqa: F811
    """Return the default storage: files below `media`, records in a fresh database."""
    from django.core.files.storage import default_storage

    return default_storage
