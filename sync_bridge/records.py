"""The records of all storages that share a meta-backend, for synchronous code."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from aproxy_storage import MetaBackend, MetaRecord, NotFound
from aproxy_storage.records import STORED

from .bridge import Bridge, refuse_on_event_loop

__all__ = ["SyncMetaBackend"]


class SyncMetaBackend:
    """What a meta-backend knows, for synchronous code: the stored files of every storage that shares it."""

    def __init__(self, meta: MetaBackend, bridge: Bridge) -> None:
        self._meta = meta
        self._bridge = bridge

    def get(self, path: str) -> MetaRecord:
        """Return the record of a stored file, of whichever storage.

        Raises:
            NotFound: there is none.
        """
        refuse_on_event_loop(f"the synchronous side of {self._meta}.get()", "get() of the meta-backend itself")
        record = self._meta.look_here(path) if self._meta.looks_here else self._bridge.call(self._meta.get, path)
        if record is None or record.state != STORED:
            raise NotFound(f"{self._meta} holds no stored file {path!r}", operation="get", path=path)
        return record

    def get_many(self, paths: Sequence[str]) -> list[MetaRecord | None]:
        """Return the records of `paths` in their order, None where there is no stored file."""
        found = self._bridge.call(self._meta.get_many, paths)
        return [record if record is not None and record.state == STORED else None for record in found]

    def exists(self, path: str) -> bool:
        """Return whether a storage has a file of that path."""
        return self._bridge.call(self._meta.exists, path, state=STORED)

    def count(self, prefix: str = "", *, proxy_storage_name: str | None = None) -> int:
        """Return how many files begin with `prefix`."""
        return self._bridge.call(self._meta.count, prefix, proxy_storage_name=proxy_storage_name, state=STORED)

    def list(self, prefix: str = "", *, proxy_storage_name: str | None = None) -> Iterator[MetaRecord]:
        """Iterate over the files that begin with `prefix`, in byte order, a page at a time."""
        after = None
        while page := self._bridge.call(self._page, prefix, after, proxy_storage_name):
            yield from page
            after = page[-1].path

    async def _page(self, prefix: str, after: str | None, name: str | None) -> Sequence[MetaRecord]:
        found = self._meta.list(prefix, after=after, limit=500, proxy_storage_name=name, state=STORED)
        return [record async for record in found]
