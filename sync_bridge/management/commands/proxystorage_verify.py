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

    help = "Read every file and compare its size and checksum with its record. Changes nothing."

    def add_arguments(self, parser: CommandParser) -> None:
        parser.add_argument("storage", nargs="*", help="alias in STORAGES or name in PROXY_STORAGE; default: all")
        parser.add_argument("--prefix", default="", help="only the files whose path begins so")
        parser.add_argument("--after", help="only the files after this path: goes on where an earlier run ended")
        parser.add_argument("--concurrency", type=int, default=8, help="files read at a time")

    def handle(self, *, storage: list[str], prefix: str, after: str | None, concurrency: int, **_: Any) -> None:
        self._count = self._bytes = 0
        for one in bridge_storages(storage):
            try:
                one.bridge.call(self._verify, one.proxy, prefix, after, concurrency)
            except StorageError as error:
                self.failed(one.proxy.name, error)
        self.conclude(f"{self._count} files with {self._bytes} bytes were read.")

    async def _verify(self, proxy: ProxyStorage, prefix: str, after: str | None, concurrency: int) -> None:
        async with aclosing(verify(proxy, prefix, after=after, concurrency=concurrency)) as results:
            async for result in results:
                self._count += 1
                if result.error is not None:
                    self.failed(f"{proxy.name}: {result.item}", result.error)
                elif result.value is not None:
                    self._bytes += result.value.size or 0
                self.progress(f"{self._count} files, last: {result.item}")
