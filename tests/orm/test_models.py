"""The models of `sync_bridge`: their tables, indexes and migrations."""

from __future__ import annotations

from pathlib import Path

import pytest
from django.core import checks
from django.core.management import call_command
from django.db import connection, models
from django.test.utils import isolate_apps

from tests.django_support.setup import configure

configure()

from sync_bridge.models import ProxyStorageModelBase, StoredFile  # noqa: E402
from tests.django_support.shelf.models import Document, NamedFile, PlainFile  # noqa: E402


def test_no_migration_is_missing(django_database: Path) -> None:
    call_command("makemigrations", "sync_bridge", check=True, dry_run=True, verbosity=0)


@pytest.mark.parametrize("model", [StoredFile, PlainFile, NamedFile, Document])
def test_every_model_has_the_indexes_whatever_the_order_of_its_bases(
    model: type[ProxyStorageModelBase], django_database: Path
) -> None:
    with connection.cursor() as cursor:
        found = connection.introspection.get_constraints(cursor, model._meta.db_table)
    assert {name[-4:] for name in found} >= {"_unf", "_key", "_plc"}
    assert model.check() == []


def test_a_model_whose_meta_forgets_the_indexes_is_warned_of() -> None:
    class Forgetful(ProxyStorageModelBase):
        class Meta:
            app_label = "shelf"

    try:
        assert [message.id for message in Forgetful.check()] == ["sync_bridge.W001"]
    finally:
        del Forgetful._meta.apps.all_models["shelf"]["forgetful"]
        Forgetful._meta.apps.clear_cache()


def test_a_model_without_a_table_of_records_of_its_own_needs_no_indexes() -> None:
    with isolate_apps("tests.django_support.shelf"):

        class Proxy(StoredFile):
            class Meta:
                proxy = True
                app_label = "shelf"

        class Child(StoredFile):
            remark = models.CharField(max_length=3, default="")

            class Meta:
                app_label = "shelf"

        found = [message.id for message in [*Proxy.check(), *Child.check()]]
        assert "sync_bridge.W001" not in found


def test_the_system_checks_are_content() -> None:
    assert checks.run_checks() == []
