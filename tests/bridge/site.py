"""A Django project for real servers: settings, views and a Celery task in one module.

``SITE_DIRECTORY`` says where its database and files are. `warm` makes a call over the bridge before a server forks.
"""

import os
import threading
from pathlib import Path
from typing import Any

DIRECTORY = Path(os.environ.get("SITE_DIRECTORY", "."))

SECRET_KEY = "not a secret"
ALLOWED_HOSTS = ["*"]
DEBUG = False
ROOT_URLCONF = __name__
USE_TZ = True
INSTALLED_APPS = ["django.contrib.contenttypes", "sync_bridge"]
MIDDLEWARE: list[str] = []
DATABASES = {
    "default": {
        "ENGINE": "django.db.backends.sqlite3",
        "NAME": str(DIRECTORY / "site.sqlite3"),
        "OPTIONS": {"timeout": 30, "transaction_mode": "IMMEDIATE", "init_command": "PRAGMA journal_mode=wal"},
    }
}
STORAGES = {
    "default": {"BACKEND": "sync_bridge.BridgeStorage"},
    "threads": {
        "BACKEND": "sync_bridge.BridgeStorage",
        "OPTIONS": {
            "name": "threads",
            "original": f"file://{DIRECTORY}/threads",
            "meta": f"sqlite:///{DIRECTORY}/records.sqlite3",
            "direct": False,
        },
    },
    "staticfiles": {"BACKEND": "django.contrib.staticfiles.storage.StaticFilesStorage"},
}
MEDIA_ROOT = str(DIRECTORY / "media")
MEDIA_URL = "/media/"
LOGGING = {
    "version": 1,
    "disable_existing_loggers": False,
    "handlers": {"console": {"class": "logging.StreamHandler"}},
    "root": {"handlers": ["console"], "level": "INFO"},
}


def round_trip(alias: str, number: str) -> dict[str, Any]:
    """Save, look, read and delete; say in which process, and how many bridge threads it has by now.

    What "threads" is asked for goes over the bridge, all of it; "default" does these small things without.
    """
    from django.core.files.base import ContentFile
    from django.core.files.storage import storages
    from django.db import transaction

    storage = storages[alias]
    data = number.encode() * 100
    with transaction.atomic():
        path = storage.save(f"{alias}.txt", ContentFile(data))
    with storage.open(path) as file:
        assert file.read() == data
    assert storage.exists(path)
    storage.delete(path)  # and by now the name may be another request's
    threads = [thread.name for thread in threading.enumerate()]
    return {"pid": os.getpid(), "alias": alias, "threads": threads.count("aproxy_storage-bridge")}


def sync_view(request: Any, alias: str) -> Any:
    from django.http import JsonResponse

    return JsonResponse(round_trip(alias, request.GET.get("number", "0")))


async def async_view(request: Any, alias: str) -> Any:
    """The same without the bridge, and what a synchronous call says here."""
    from django.core.files.storage import storages
    from django.http import JsonResponse

    from sync_bridge import SyncCallOnEventLoop

    storage: Any = storages[alias]
    path = await storage.asave("async.txt", b"async")
    try:
        storage.exists(path)
    except SyncCallOnEventLoop as error:
        refused = str(error)
    async with storage.aopen(path) as file:
        assert await file.read() == b"async"
    await storage.adelete(path)
    return JsonResponse({"pid": os.getpid(), "refused": refused})


async def streaming_view(request: Any, alias: str) -> Any:
    from django.core.files.storage import storages
    from django.http import StreamingHttpResponse

    return StreamingHttpResponse(storages[alias].astream(request.GET["path"]))


def get_urls() -> list[Any]:
    from django.urls import path

    return [
        path("sync/<alias>", sync_view),
        path("async/<alias>", async_view),
        path("stream/<alias>", streaming_view),
    ]


def prepare() -> None:
    """Set Django up for this module's settings."""
    import django

    os.environ["DJANGO_SETTINGS_MODULE"] = __name__
    django.setup()


def __getattr__(name: str) -> Any:
    """Make what each kind of server asks for, when it asks."""
    if name == "urlpatterns":
        return get_urls()
    if name in ("wsgi", "warm_wsgi"):
        prepare()
        from django.core.wsgi import get_wsgi_application

        if name == "warm_wsgi":
            for alias in ("default", "threads"):
                round_trip(alias, "warm")
        return get_wsgi_application()
    if name == "asgi":
        prepare()
        from django.core.asgi import get_asgi_application

        return get_asgi_application()
    if name == "celery":
        return make_celery()
    raise AttributeError(name)


def make_celery() -> Any:
    """Make a Celery application whose broker and results are directories."""
    from celery import Celery

    prepare()
    folders = {key: str(DIRECTORY / "broker") for key in ("data_folder_in", "data_folder_out", "control_folder")}
    (DIRECTORY / "broker").mkdir(exist_ok=True)
    (DIRECTORY / "results").mkdir(exist_ok=True)
    app = Celery("site", broker="filesystem://", backend=f"file://{DIRECTORY}/results")
    app.conf.update(broker_transport_options=folders, worker_hijack_root_logger=False)
    app.task(name="round_trip")(round_trip)
    round_trip("threads", "warm")  # before the workers are forked
    return app
