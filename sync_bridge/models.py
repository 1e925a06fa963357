"""Models for `aproxy_storage.meta_backends.orm.ORMMetaBackend`: abstract bases for your own, and one that is ready.

The columns of django-proxy-storage keep their names, so that its tables can be taken over (docs/django-orm.md).
Every column that it did not have has a default in the database, so that what it still writes can be read.
"""

from __future__ import annotations

from typing import Any

from django.core import checks
from django.db import models
from django.db.models import F, Q

__all__ = [
    "ByteOrderField",
    "ContentObjectFieldMixin",
    "OriginalStorageNameMixin",
    "PartialIndex",
    "ProxyStorageModelBase",
    "StoredFile",
]


class ByteOrderField(models.CharField):
    """Text that the database compares and sorts byte by byte, whatever its locale.

    Listings go through the index of such a column in pages; under a locale's collation neither the order nor the
    index would be the right one. On PostgreSQL the column gets the collation ``C``; SQLite compares bytes anyway.
    """

    def db_type(self, connection: Any) -> str | None:
        kind: str | None = super().db_type(connection)
        if connection.vendor == "postgresql" and kind is not None:
            # The same type by its other name. Under the short one Django adds an index for LIKE queries beside that
            # of a unique column, which the collation makes superfluous; every write would pay for it.
            return kind.replace("varchar(", "character varying(")
        return kind

    def db_parameters(self, connection: Any) -> dict[str, Any]:
        parameters: dict[str, Any] = super().db_parameters(connection)
        if connection.vendor == "postgresql":
            parameters["collation"] = self.db_collation or "C"
        return parameters


class PartialIndex(models.Index):
    """An index over some of the rows, named after its model where it has no name.

    Django wants a name for every index with a condition, and one name cannot serve all models of an abstract base.
    In migrations it is a plain ``models.Index``.
    """

    def __init__(self, *, condition: Q, suffix: str = "idx", **options: Any) -> None:
        super().__init__(**options)
        self.condition = condition
        self.suffix = suffix

    def deconstruct(self) -> tuple[str, Any, dict[str, Any]]:
        _, expressions, options = super().deconstruct()
        return "django.db.models.Index", expressions, options

    def __eq__(self, other: object) -> bool:
        # Against the plain one of a migration too, or every `makemigrations` would find a change.
        if isinstance(other, models.Index):
            return bool(self.deconstruct() == other.deconstruct())
        return NotImplemented

    def clone(self) -> PartialIndex:
        _, _, options = self.deconstruct()
        return type(self)(suffix=self.suffix, **options)


#: Records with something left to do: few, however many files there are.
UNFINISHED = Q(lease__isnull=False) | ~Q(state="stored")
#: Records whose key is not their path, and those with further places: what `owners` cannot find by the path.
KEY_IS_NOT_PATH = ~Q(original_storage_path=F("path"))
HAS_PLACES = ~Q(places="[]")


class _Indexed:
    """The indexes. In the Meta of every base, because a model inherits that of its first base only."""

    abstract = True
    indexes = [  # noqa: RUF012  Django's own form
        PartialIndex(fields=["path"], condition=UNFINISHED, suffix="unf"),
        PartialIndex(fields=["original_storage_path"], condition=KEY_IS_NOT_PATH, suffix="key"),
        PartialIndex(fields=["path"], condition=HAS_PLACES, suffix="plc"),
    ]


class ProxyStorageModelBase(models.Model):
    """What every model of a meta-backend has. One row is one file.

    A subclass adds its own columns and fills them from ``get_data_for_meta_backend_save`` of its storage. One that
    gives a ``Meta`` of its own lets it inherit from ``ProxyStorageModelBase.Meta``, or has no indexes.
    """

    path = ByteOrderField(max_length=1024, unique=True)
    proxy_storage_name = models.CharField(max_length=50, blank=True)
    original_storage_path = ByteOrderField(max_length=1024)
    state = models.CharField(max_length=10, default="stored", db_default="stored", editable=False)
    token = models.CharField(max_length=50, default="", db_default="", blank=True, editable=False)
    version = models.PositiveBigIntegerField(default=0, db_default=0, editable=False)
    places = models.TextField(default="[]", db_default="[]", editable=False)
    #: Seconds since 1970 by the clock of the database.
    lease = models.FloatField(null=True, blank=True, editable=False)
    size = models.PositiveBigIntegerField(null=True, blank=True)
    checksum = models.CharField(max_length=255, null=True, blank=True)
    content_type = models.CharField(max_length=255, null=True, blank=True)
    name = models.CharField(max_length=1024, null=True, blank=True)
    created_at = models.DateTimeField(null=True, blank=True)
    updated_at = models.DateTimeField(null=True, blank=True)

    class Meta(_Indexed):
        pass

    def __str__(self) -> str:
        return self.path

    @classmethod
    def check(cls, **kwargs: Any) -> list[checks.CheckMessage]:
        messages: list[checks.CheckMessage] = super().check(**kwargs)
        if all(field.name != "path" for field in cls._meta.local_fields):
            return messages  # a proxy, or a child: the table, and its indexes, are the parent's
        conditions = [index.condition for index in cls._meta.indexes]
        if UNFINISHED not in conditions or KEY_IS_NOT_PATH not in conditions:
            messages.append(
                checks.Warning(
                    "The model lacks the indexes of ProxyStorageModelBase: clean-up reads the whole table.",
                    hint="Let its Meta inherit from ProxyStorageModelBase.Meta.",
                    obj=cls,
                    id="sync_bridge.W001",
                )
            )
        return messages


class OriginalStorageNameMixin(models.Model):
    """For storages with several originals: which one holds the file. Empty means the first."""

    original_storage_name = models.CharField(max_length=50, default="", db_default="", blank=True)

    class Meta(_Indexed):
        pass


class ContentObjectFieldMixin(models.Model):
    """Which object, and which of its file fields, a file belongs to.

    The object's id is kept as text, so that keys of any type fit. No foreign key: a file outlives its object.
    """

    content_type_id = models.PositiveIntegerField(null=True, blank=True)
    object_id = ByteOrderField(max_length=255, null=True, blank=True, db_index=True)
    field = models.CharField(max_length=255, default="", db_default="", blank=True)

    class Meta(_Indexed):
        pass


class StoredFile(OriginalStorageNameMixin, ContentObjectFieldMixin, ProxyStorageModelBase):
    """The model to take when you need no columns of your own: fields without a column go to `extra`."""

    extra = models.JSONField(null=True, blank=True)

    class Meta(ProxyStorageModelBase.Meta):
        abstract = False
        verbose_name = "stored file"
        verbose_name_plural = "stored files"
