"""An application of the tests, with file fields of every kind."""

from pathlib import Path

from django.apps import AppConfig


class DeskConfig(AppConfig):
    name = "tests.bridge.desk"
    label = "desk"
    path = str(Path(__file__).parent)
    default_auto_field = "django.db.models.BigAutoField"
