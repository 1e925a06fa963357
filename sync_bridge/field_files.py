"""The file of one object, as its field gives it: Django's `FieldFile` with an async twin of every verb."""

from __future__ import annotations

from collections.abc import AsyncIterator
from types import TracebackType
from typing import Any

from asgiref.sync import sync_to_async
from django.db.models.fields.files import FieldFile, ImageFieldFile

from .base import ConfiguredStorage
from .files import BridgeFile
from .remembering import forget, key_of_held
from .storage import BridgeStorage
from .uncommitted import hold, is_any_transaction_open

__all__ = ["ProxyFieldFile", "ProxyImageFieldFile"]


class ProxyFieldFile(FieldFile):
    """The file of one object. `asave`, `aopen`, `aread`, `adelete`, `asize` and `aurl` await the storage directly;
    ``async for`` gives chunks. A response takes `stream`: of a file itself Django would make a list of lines."""

    storage: BridgeStorage
    name: str | None

    def __exit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        file: Any = getattr(self, "_file", None)
        if exc_type is not None and isinstance(file, BridgeFile):
            file.abort()  # what was being written is not published
        self.close()

    def save(self, name: str, content: Any, save: bool = True) -> None:
        """Store `content` and set the field to it; then, with `save`, save the object."""
        super().save(name, content, save=False)
        self.instance.__dict__.pop(key_of_held(self.field), None)
        storage = self.storage
        if is_any_transaction_open() and isinstance(storage, ConfiguredStorage):
            place = self.instance.__dict__, key_of_held(self.field)
            storage._await(storage._works_here, hold, storage.proxy, self._required(), *place)
        if save:
            self.instance.save()

    save.alters_data = True  # type: ignore[attr-defined]

    async def asave(self, name: str, content: Any, save: bool = True) -> None:
        """Store `content` and set the field to it; then, with `save`, save the object.

        ``upload_to`` and the saving of the object run in Django's thread, the storing on this loop.

        Raises:
            As `BridgeStorage.asave`; the object is unchanged then.
        """
        name = await sync_to_async(self.field.generate_filename)(self.instance, name)
        self.name = await self.storage.asave(name, content, max_length=self.field.max_length)
        # An image is looked at for its dimensions.
        await sync_to_async(self._set_instance_attribute)(self.name, content)
        self._committed = True
        if isinstance(self.storage, ConfiguredStorage):
            await hold(self.storage.proxy, self.name, self.instance.__dict__, key_of_held(self.field))
        if save:
            await self.instance.asave()

    asave.alters_data = True  # type: ignore[attr-defined]

    def delete(self, save: bool = True) -> None:
        """Delete the file and clear the field; then, with `save`, save the object. No file: nothing is done."""
        if not self.name:
            return
        gone = self.name
        super().delete(save=False)
        forget(self.instance, self.field, gone)
        if save:
            self.instance.save()

    delete.alters_data = True  # type: ignore[attr-defined]

    async def adelete(self, save: bool = True) -> None:
        """Await the deletion of the file, as `delete`."""
        if not self.name:
            return
        if hasattr(self, "_file"):
            await sync_to_async(self.close)()
            del self.file
        if hasattr(self, "_dimensions_cache"):
            del self._dimensions_cache
        gone = self.name
        await self.storage.adelete(gone)
        forget(self.instance, self.field, gone)
        self.name = None
        setattr(self.instance, self.field.attname, self.name)
        self._committed = False
        if save:
            await self.instance.asave()

    adelete.alters_data = True  # type: ignore[attr-defined]

    def aopen(self, mode: str = "rb") -> Any:
        """Open the stored file: ``async with document.file.aopen() as file``."""
        return self.storage.aopen(self._required(), mode)

    async def aread(self) -> bytes:
        """Return the whole content."""
        async with self.aopen() as file:
            data: bytes = await file.read()
        return data

    async def asize(self) -> int:
        """Return the size in bytes."""
        return await self.storage.asize(self._required())

    async def aurl(self, **options: Any) -> str:
        """Return the URL, as `BridgeStorage.aurl`."""
        return await self.storage.aurl(self._required(), **options)

    def stream(self) -> AsyncIterator[bytes]:
        """Return an asynchronous iterator over the chunks, for a StreamingHttpResponse; it closes itself."""
        return self.storage.astream(self._required())

    def __aiter__(self) -> AsyncIterator[bytes]:
        return self.stream()

    def _required(self) -> str:
        self._require_file()
        assert self.name is not None
        return self.name


class ProxyImageFieldFile(ProxyFieldFile, ImageFieldFile):
    """The image of one object."""
