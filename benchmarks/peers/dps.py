"""Peer: django-proxy-storage 0.1.2 over FileSystemStorage and the ORM on SQLite, called from async code.

It is a synchronous library, so async code has to send each call to a thread. `SensitiveStore` does what Django's
documentation says (`sync_to_async`: one thread, one connection); `ThreadedStore` uses 8 threads with a connection each.
One process can hold one configured Django, so both use one table and one directory; their names differ.
"""

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import proxy_storage  # noqa: F401  so that its absence is known at once
from asgiref.sync import sync_to_async

from benchmarks.peers import dps_compat

BenchStorage: Any = None  # looked up by its dotted name in PROXY_STORAGE_CLASSES


def configure(directory: Path) -> None:
    """Set Django up with a database and a media directory in `directory`; later calls change nothing."""
    global BenchStorage
    if BenchStorage is not None:
        return
    import django
    from django.conf import settings

    init = "pragma journal_mode=wal; pragma synchronous=normal"
    database = {
        "ENGINE": "django.db.backends.sqlite3",
        "NAME": directory / "dps.db",
        "OPTIONS": {"init_command": init, "transaction_mode": "IMMEDIATE", "timeout": 60},
    }
    classes = {"bench": f"{__name__}.BenchStorage"}
    settings.configure(DATABASES={"default": database}, PROXY_STORAGE={"PROXY_STORAGE_CLASSES": classes})
    django.setup()
    dps_compat.install()

    from django.core.files.storage import FileSystemStorage
    from django.db import connection
    from proxy_storage.meta_backends.orm import ORMMetaBackend, ProxyStorageModelBase
    from proxy_storage.storages.base import ProxyStorageBase

    class Meta(ProxyStorageModelBase):  # type: ignore[misc]
        class Meta:
            app_label = "bench"

    class Storage(ProxyStorageBase):  # type: ignore[misc]
        original_storage = FileSystemStorage(location=directory / "dps")
        meta_backend = ORMMetaBackend(model=Meta)

    BenchStorage = Storage
    with connection.schema_editor() as editor:
        editor.create_model(Meta)
    connection.close()


class SensitiveStore:
    def __init__(self, directory: Path) -> None:
        self.directory = directory

    async def __aenter__(self) -> "SensitiveStore":
        await asyncio.to_thread(configure, self.directory)
        self.storage = BenchStorage()
        return self

    async def __aexit__(self, *_: object) -> None:
        from django.db import connections

        await self.call(connections.close_all)

    async def call(self, function: Callable[..., Any], *args: object) -> Any:
        return await sync_to_async(function)(*args)

    async def save(self, name: str, content: bytes) -> str:
        from django.core.files.base import ContentFile

        path: str = await self.call(self.storage.save, name, ContentFile(content))
        return path

    async def exists(self, path: str) -> bool:
        found: bool = await self.call(self.storage.exists, path)
        return found

    async def read(self, path: str) -> bytes:
        def open_and_read() -> bytes:
            with self.storage.open(path) as file:
                content: bytes = file.read()
            return content

        content: bytes = await self.call(open_and_read)
        return content

    async def delete(self, path: str) -> None:
        await self.call(self.storage.delete, path)


class ThreadedStore(SensitiveStore):
    def __init__(self, directory: Path, threads: int = 8) -> None:
        super().__init__(directory)
        self.workers = ThreadPoolExecutor(threads)

    async def __aexit__(self, *_: object) -> None:
        self.workers.shutdown()

    async def call(self, function: Callable[..., Any], *args: object) -> Any:
        return await asyncio.get_running_loop().run_in_executor(self.workers, function, *args)
