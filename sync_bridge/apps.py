"""The Django application ``sync_bridge``."""

from django.apps import AppConfig

__all__ = ["SyncBridgeConfig"]


class SyncBridgeConfig(AppConfig):
    """Brings the default model of the ORM meta-backend, `sync_bridge.models.StoredFile`, and its migrations."""

    name = "sync_bridge"
    verbose_name = "Stored files"
    default_auto_field = "django.db.models.BigAutoField"

    def ready(self) -> None:
        from . import checks, registry  # noqa: F401  the checks; the storages that settings name, for the records
