"""What an object remembers of its file: with which path it came from the database, and which it had before."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from django.db import models
from django.db.models.fields.files import FieldFile, FileDescriptor, ImageFileDescriptor

from .uncommitted import is_any_transaction_open

__all__ = ["Memory", "Remembering", "RememberingImage", "forget", "key_of", "key_of_held", "memory_of"]


@dataclass(frozen=True, slots=True)
class Memory:
    """What one object knows of its file in the database.

    Attributes:
        path: with which it came from there, or was saved last. That save may have been rolled back.
        owned: this object has written itself into the record of `path`. A record without an owner is then another.
        former: paths that it had before, each with its `owned`, until a commit has dealt with them.
        unsure: the row may have another path: the object was loaded without it, or no ``post_save`` has confirmed what
            was written, as after a bulk operation.
    """

    path: str = ""
    owned: bool = False
    former: tuple[tuple[str, bool], ...] = ()
    unsure: bool = False

    def without(self, path: str) -> tuple[tuple[str, bool], ...]:
        """Return what is former and not `path`."""
        return tuple(one for one in self.former if one[0] != path)


class Remembering(FileDescriptor):
    """Remembers the path with which an object came from the database, to tell later whether it has changed."""

    def __set__(self, instance: models.Model, value: Any) -> None:
        absent = self.field.attname not in instance.__dict__  # in the constructor, or where the field was deferred
        refreshed = _is_refreshed(self.field, instance, value)
        if refreshed and not is_any_transaction_open():  # what could be rolled back has been, before the row was read
            instance.__dict__.pop(key_of_held(self.field), None)
        if (absent and instance._state.adding) or refreshed:
            # Where it was deferred, the value is the file of another instance, which was loaded for it.
            path = value.name if isinstance(value, FieldFile) and value._committed else value
            path = path if isinstance(path, str) else ""
            instance.__dict__[key_of(self.field)] = Memory(path, former=memory_of(instance, self.field).without(path))
        elif absent:
            instance.__dict__[key_of(self.field)] = replace(memory_of(instance, self.field), unsure=True)
        super().__set__(instance, value)


class RememberingImage(Remembering, ImageFileDescriptor):
    """The same for images."""


def key_of(field: Any) -> str:
    """Return under which name an object keeps the `Memory` of a field."""
    return f"_{field.attname}_as_stored"


def key_of_held(field: Any) -> str:
    """Return under which name an object keeps what `hold` holds for a field until a commit."""
    return f"_{field.attname}_uncommitted"


def memory_of(instance: models.Model, field: Any) -> Memory:
    """Return what the object knows of its file."""
    found = instance.__dict__.get(key_of(field))
    return found if isinstance(found, Memory) else Memory()


def _is_refreshed(field: Any, instance: models.Model, value: Any) -> bool:
    """Return whether `value` is what ``refresh_from_db`` sets: the file of the same object, loaded once more."""
    other = value.instance if isinstance(value, FieldFile) else None
    return (
        other is not None
        and other is not instance
        and other._meta.concrete_model is instance._meta.concrete_model
        and other.pk is not None
        and other.pk == instance.pk
        and value._committed
        and (value.name or "") == memory_of(other, field).path
    )


def forget(instance: models.Model, field: Any, path: str) -> None:
    """Forget a file that was deleted: whatever has its path later is not it, unless a rollback brings it back."""
    memory = memory_of(instance, field)
    former = memory.without(path)
    if field.delete_on_replace:
        former = (*former, (path, True))  # of a record without an owner it could not be told which file it is
    kept = memory if memory.path != path else Memory()
    instance.__dict__[key_of(field)] = replace(kept, former=former)
