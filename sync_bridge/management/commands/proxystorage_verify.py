"""Read every file and compare it with its record."""

from __future__ import annotations

from contextlib import aclosing
from typing import Any

from django.core.management.base import CommandParser

from aproxy_storage import ProxyStorage, StorageError
from aproxy_storage.tools.verify import verify

from ..base import StorageCommand, bridge_storages


class Command(StorageCommand):
    """`aproxy_storage.tools.verify.verify` over the storages of the settings."""

    help = (
        "Read every file and compare its size and checksum with its record. Changes nothing without --record-missing."
    )

    def add_arguments(self, parser: CommandParser) -> None:
        parser.add_argument("storage", nargs="*", help="alias in STORAGES or name in PROXY_STORAGE; default: all")
        parser.add_argument("--prefix", default="", help="only the files whose path begins so")
        parser.add_argument("--after", help="only the files after this path: goes on where an earlier run ended")
        parser.add_argument("--concurrency", type=int, default=8, help="files read at a time")
        parser.add_argument(
            "--record-missing",
            action="store_true",
            help="record the checksum of what is read for files that have none, such as adopted ones",
        )

    def handle(self, *, storage: list[str], prefix: str, **options: Any) -> None:
        self._count = self._bytes = 0
        wanted = {name: options[name] for name in ("after", "concurrency", "record_missing")}
        for one in bridge_storages(storage):
            try:
                one.bridge.call(self._verify, one.proxy, prefix, **wanted)
            except StorageError as error:
                self.failed(one.proxy.name, error)
        self.conclude(f"{self._count} files with {self._bytes} bytes were read.")

    async def _verify(self, proxy: ProxyStorage, prefix: str, **wanted: Any) -> None:
        async with aclosing(verify(proxy, prefix, **wanted)) as results:
            async for result in results:
                self._count += 1
                if result.error is not None:
                    self.failed(f"{proxy.name}: {result.item}", result.error)
                elif result.value is not None:
                    self._bytes += result.value.size or 0
                self.progress(f"{self._count} files, last: {result.item}")
