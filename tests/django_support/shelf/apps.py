"""An application of the tests, with models of all kinds over `sync_bridge`'s bases."""

from pathlib import Path

from django.apps import AppConfig


class ShelfConfig(AppConfig):
    name = "tests.django_support.shelf"
    label = "shelf"
    path = str(Path(__file__).parent)  # tests/ is a namespace package: Django wants to be told where the app is
    default_auto_field = "django.db.models.BigAutoField"
