"""The reading verbs of a ProxyStorage."""

from __future__ import annotations

import abc
import os
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, Literal, cast, overload

from .attempts import Attempt
from .backends.base import Backend
from .cleanup import Cleanup
from .errors import ConfigurationError, Conflict, IntegrityError, NotFound, NotSupported
from .file_writer import AsyncWriter
from .files import AsyncFile, Opening, chunks_of
from .gates import Gate
from .meta_backends.base import MetaBackend
from .openings import Opened, in_read_order, open_bytes
from .paths import shown
from .placement import Placement
from .records import CHANGES_TO_REUSE, STORED, ByteRange, CommonPrefix, MetaRecord, Place

__all__ = ["Path", "ReadingVerbs"]

#: Read verbs take the public name of a file, or its record.
Path = str | os.PathLike[str] | MetaRecord


class ReadingVerbs(abc.ABC):
    """What a storage does without changing anything. Readers see ``stored`` records of their own storage only."""

    name: str
    prefix: str
    keys: str
    chunk_bytes: int
    originals: Mapping[str, Backend]
    gates: Mapping[str, Gate]
    meta: MetaBackend
    placement: Placement
    cleanup: Cleanup
    on_attempt: Callable[[Attempt], None] | None

    def get_original(self, name: str = "") -> Backend:
        """Return the original backend of that name; of an empty one, as old tables have it, the first.

        Raises:
            ConfigurationError: there is none of that name.
        """
        if not name:
            return next(iter(self.originals.values()))
        try:
            return self.originals[name]
        except KeyError:
            raise ConfigurationError(
                f"storage {self.name!r} has no original {name!r} (it has {', '.join(self.originals)})"
            ) from None

    def gate_of(self, original: str) -> Gate:
        """Return the gate before the original of that name; of an empty one, the first's."""
        return self.gates[original or next(iter(self.gates))]

    async def open_bytes(
        self,
        record: MetaRecord,
        places: Sequence[Place],
        byte_range: ByteRange | None = None,
        *,
        slots: bool = True,
    ) -> Opened:
        """Open the bytes of `record` at one of `places`; see `openings.open_bytes`."""
        return await open_bytes(self, record, places, byte_range, slots=slots)

    @overload
    def open(
        self, path: Path, mode: Literal["rb"] = "rb", *, verify: bool = False, byte_range: ByteRange | None = None
    ) -> Opening[AsyncFile]: ...

    @overload
    def open(self, path: Path, mode: Literal["wb", "xb"]) -> Opening[AsyncWriter]: ...

    def open(
        self, path: Path, mode: str = "rb", *, verify: bool = False, byte_range: ByteRange | None = None
    ) -> Opening[Any]:
        """Open a file: ``async with storage.open(path) as f``, or ``f = await storage.open(path)``.

        Given a record, reading is pinned to what it stands for, so that whoever has checked a permission by it gets
        that file, or none. Where the original does not say whose object it has opened, or the key may have been used
        again by the same file (``keys="path"``), the record is looked up once more for that.

        Args:
            mode: ``"rb"``; ``"wb"`` writes a new file or new bytes for the one there, ``"xb"`` a new file only.
                Written bytes are published when the file is closed without an exception.
            verify: compare with the recorded checksum at the end.
            byte_range: only this part.

        Raises (when awaited or entered):
            NotFound: there is no such file; the one of the record was deleted, and another may have its path.
            Conflict: the file of the record has other bytes by now, and its own are gone, or were replaced so often
                that nothing tells them from later ones: get the record again.
            IntegrityError: its bytes are gone, or not as long as recorded.
            AlreadyExists: ``"xb"``, at the latest when it is closed.
        """
        if mode == "rb":
            if verify and byte_range is not None:
                raise NotSupported("verify=True reads the whole file; it goes with no byte_range")
            return Opening(partial(self._open_file, path, byte_range, verify))
        if mode in ("wb", "xb"):
            return Opening(partial(self._open_writer, path, mode))
        raise ValueError(f"mode {mode!r}: one of 'rb', 'wb', 'xb'")

    def open_current(self, record: MetaRecord, *, verify: bool = False) -> Opening[AsyncFile]:
        """Open whatever file has the path of `record`, as ``open(record.path)`` does, with a look-up less.

        For those who have found the record by a name just now, and have decided nothing by it.
        """
        return Opening(partial(self._open_file, record, None, verify, pinned=False))

    async def _open_file(
        self, path: Path, byte_range: ByteRange | None, verify: bool, *, pinned: bool = True
    ) -> AsyncFile:
        record = await self._record(path)
        given = path if pinned and isinstance(path, MetaRecord) else None
        avoided: list[Place] = []  # copies that are not as long as the record says
        while True:
            places = [place for place in record.good_places() if place not in avoided]
            try:
                opened = await open_bytes(self, record, places, byte_range)
            except NotFound as error:
                current = await self._current(record, given)  # NotFound if it was deleted meanwhile
                if not current.has_bytes_of(record):
                    record = current  # replaced, moved or saved anew: that is the file now
                    continue
                backend = self.get_original(record.original_storage_name)
                raise IntegrityError(
                    f"the bytes of {record.path!r} are gone from {backend.full_path(record.original_storage_path)}",
                    operation="open", path=record.path, backend=str(backend),
                ) from error  # fmt: skip
            reading, backend = opened.reading, opened.backend
            try:
                differs = None not in (record.size, reading.info.size) and record.size != reading.info.size
                # Deleted and saved anew since the record was read, the bytes may be those of the new file; replaced,
                # with the key restored, those of the replacement, which has the token of the old ones.
                tells = self.keys == "token" and reading.info.token
                unsure = given is not None and not (tells and given.token == tells)
                looked_up = differs or verify or unsure
                current = await self._current(record, given, opened.place) if looked_up else record
                if not current.has_bytes_of(record):
                    record = current
                elif not differs:
                    still_at = partial(self._still_at, record)
                    elsewhere = partial(self._elsewhere, record, opened.place) if len(places) > 1 else None
                    patience = self.gate_of(opened.place.original).attempt_timeout
                    return AsyncFile(
                        record, opened, byte_range, self.chunk_bytes, verify, still_at, elsewhere, patience
                    )
                elif len(places) > 1:
                    avoided.append(opened.place)
                else:
                    raise IntegrityError(
                        f"{record.path!r} has {reading.info.size} bytes in {backend}, its record says {record.size}",
                        operation="open", path=record.path, backend=str(backend),
                    )  # fmt: skip
            except BaseException:
                await opened.aclose()
                raise
            await opened.aclose()

    async def _current(self, record: MetaRecord, given: MetaRecord | None, place: Place | None = None) -> MetaRecord:
        """Return what `record` is by now; `given`, where its bytes were replaced after they were opened at `place`.

        Raises:
            NotFound: there is none, or one of another file than `given` is of. Conflict: of other bytes.
        """
        path = record.path
        with self.meta.pin(record):
            current = await self.get(path)
        if given is None:
            return current
        if not _is_same_file(current, given):
            raise NotFound(
                f"the file of the record of {path!r} was deleted; another one has its path", operation="open", path=path
            )
        if current.checksum == given.checksum if given.checksum else current.has_bytes_of(given):
            return current
        # One change more: what was swapped in there has to be replaced too, before the key is surplus once more.
        if (
            place is not None
            and current.version - given.version < CHANGES_TO_REUSE + 1
            and replace(place, state="surplus", due=None) in (replace(each, due=None) for each in current.places)
        ):
            return given
        raise Conflict(
            f"{path!r} was replaced since its record was read; get the record again", operation="open", path=path
        )

    async def _elsewhere(
        self, record: MetaRecord, first: Place, failed: Sequence[Place], byte_range: ByteRange
    ) -> Opened | None:
        """Open the rest of a file whose reading has broken off at another of its copies; None: there is none left.

        Raises:
            NotFound: it was deleted or replaced meanwhile, and what lies there is another file's.
        """
        places = [place for place in record.good_places() if place != first and place not in failed]
        while places:
            opened = await open_bytes(self, record, places, byte_range)
            try:
                whole = None in (record.size, opened.reading.info.size) or record.size == opened.reading.info.size
                if not await self._still_at(record, opened.place):
                    raise NotFound(f"{record.path!r} was replaced", operation="read", path=record.path)
            except BaseException:
                await opened.aclose()
                raise
            if whole:
                return opened
            await opened.aclose()
            places = [place for place in places if place != opened.place]
        return None

    async def _still_at(self, record: MetaRecord, place: Place) -> bool:
        """Return whether what was opened at `place` before this was asked is certainly the bytes of `record`.

        A key alone does not say so: deleted and saved anew, a file may have the key of the one before; and the key of
        replaced bytes may be that of the new ones, once it was restored. A version does not say so either: other
        places of the record may have come and gone.
        """
        try:
            with self.meta.pin(record):  # whatever routers say by now: a response is read when its request is over
                current = await self.get(record.path)
        except NotFound:
            return False
        same = current.version == record.version or (
            record.checksum is not None and current.checksum == record.checksum
        )
        return same and current.token == record.token and place in current.good_places()

    def stream(self, path: Path, *, byte_range: ByteRange | None = None) -> AsyncIterator[bytes]:
        """Iterate over the chunks of a file; it is opened when the first is asked for, and closes itself.

        Given a record, what comes is the file that it stands for, as with `open`, however late it is opened. Where
        routers of Django's decide by request, a path is looked up in the database that they name at this call.

        Raises:
            As `open`, at the first chunk.
        """
        where = self.meta.pin(path if isinstance(path, MetaRecord) else None)
        return chunks_of(lambda: self.open(path, byte_range=byte_range), where)

    async def get(self, path: str | os.PathLike[str]) -> MetaRecord:
        """Return the record of a stored file.

        Raises:
            NotFound: there is none in this storage.
        """
        text = os.fspath(path)
        try:
            record = await self.meta.get(text)
        except NotFound:
            record = None
        if record is None or not self._has(record):
            raise self._missing(text)
        return record

    def _has(self, record: MetaRecord) -> bool:
        """Return whether `record` is one of a file of this storage, and not of a save or a removal under way."""
        return record.state == STORED and record.proxy_storage_name == self.name

    def _missing(self, path: str) -> NotFound:
        return NotFound(
            f"storage {self.name!r} has no file {shown(path)}", operation="get", path=path, backend=repr(self)
        )

    async def get_many(self, paths: Sequence[str]) -> Sequence[MetaRecord | None]:
        """Return the records of `paths` in their order, None where there is no such file."""
        return [
            record if record is not None and self._has(record) else None for record in await self.meta.get_many(paths)
        ]

    async def exists(self, path: Path) -> bool:
        """Return whether there is such a file: one question to the meta-backend."""
        text = path.path if isinstance(path, MetaRecord) else os.fspath(path)
        return await self.meta.exists(text, state=STORED, proxy_storage_name=self.name)

    async def size(self, path: Path) -> int:
        """Return the size in bytes, from the record where it is known.

        Raises:
            NotFound.
        """
        record = await self._record(path)
        if record.size is not None:
            return record.size
        place = self._preferred(record)
        info = await self.get_original(place.original).stat(place.key)
        if info.size is None:
            raise NotSupported(f"the size of {record.path!r} is known neither to the record nor to its original")
        return info.size

    async def url(self, path: Path, *, expires_in: float | None = None, **options: Any) -> str:
        """Return the URL of the bytes, signed for `expires_in` seconds where the original signs.

        Raises:
            NotFound; NotSupported: the original has no URLs.
        """
        place = self._preferred(await self._record(path))
        return await self.get_original(place.original).url(place.key, expires_in=expires_in, **options)

    def _preferred(self, record: MetaRecord) -> Place:
        """Return the copy of a file that a read would be tried at first."""
        return in_read_order(self, record.good_places())[0]

    async def urls(self, paths: Sequence[str], *, expires_in: float | None = None, **options: Any) -> dict[str, str]:
        """Return the URLs of those of `paths` that exist, with one question to the meta-backend."""
        records = await self.get_many(paths)
        return {
            record.path: await self.url(record, expires_in=expires_in, **options)
            for record in records
            if record is not None
        }

    async def _record(self, path: Path) -> MetaRecord:
        if not isinstance(path, MetaRecord):
            return await self.get(path)
        if not self._has(path):
            raise self._missing(path.path)
        return path

    async def _again(self, path: Path, record: MetaRecord) -> MetaRecord:
        """Return what `record` is by now; `path` is what the caller gave.

        Raises:
            NotFound: it is gone. Whoever gave a record means its file, not the next one of that name.
        """
        current = await self.get(record.path)
        if isinstance(path, MetaRecord) and current.token != record.token:
            raise self._missing(record.path)
        return current

    @abc.abstractmethod
    async def _open_writer(self, path: Path, mode: str) -> AsyncWriter: ...

    @overload
    def list(
        self, prefix: str = "", *, after: str | None = None, limit: int | None = None, delimiter: None = None
    ) -> AsyncIterator[MetaRecord]: ...

    @overload
    def list(
        self, prefix: str = "", *, after: str | None = None, limit: int | None = None, delimiter: str
    ) -> AsyncIterator[MetaRecord | CommonPrefix]: ...

    def list(
        self, prefix: str = "", *, after: str | None = None, limit: int | None = None, delimiter: str | None = None
    ) -> AsyncIterator[Any]:
        """Iterate over the stored files whose path begins with `prefix` and is greater than `after`, in byte order.

        With a `delimiter` (``"/"``), what lies deeper is rolled up into `CommonPrefix` entries. Memory is bounded
        by one page, whatever the number of files.
        """
        return self.meta.list(
            prefix or self.prefix,
            after=after,
            limit=limit,
            delimiter=cast(Any, delimiter),
            proxy_storage_name=self.name,
            state=STORED,
        )


def _is_same_file(one: MetaRecord, other: MetaRecord) -> bool:
    """Return whether both are records of one file, whatever has become of it in between."""
    if one.token or other.token:
        return one.token == other.token
    # Written by django-proxy-storage: the database's own key tells, where the table has one of the usual name.
    keys = [record.native.get("_id", record.native.get("id")) for record in (one, other)]
    return None in keys or keys[0] == keys[1]
