"""Foreign keys to the rows of a model: whether they let a row go. Asked before the bytes of a file are removed, for
Django and the database would say it only when its row is deleted, after them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from typing import Any

from django.db import IntegrityError
from django.db.models import DO_NOTHING, QuerySet
from django.db.models.deletion import Collector

from ..errors import AccessDenied

__all__ = ["all_rows", "check_deletable", "refusal", "relations_to"]

_NAMED = 3  # rows that a message names
_PART = 100  # rows that are looked up among others in one statement

_ENFORCED = (
    "SELECT 1 FROM pg_constraint AS c JOIN pg_attribute AS a ON a.attrelid = c.conrelid AND a.attnum = ANY(c.conkey)"
    " WHERE c.contype = 'f' AND c.confdeltype IN ('a', 'r') AND c.conrelid = to_regclass(%s) AND a.attname = %s"
)


def relations_to(meta: Any) -> Iterator[Any]:
    """Yield the foreign keys of other models to the one of `meta`, those without a name included."""
    for relation in meta.get_fields(include_hidden=True):
        if relation.auto_created and not relation.concrete and (relation.one_to_one or relation.one_to_many):
            yield relation


def all_rows(model: type[Any], using: str) -> QuerySet:
    """Return the rows of `model`, whatever its managers hide."""
    return QuerySet(model, using=using)


def check_deletable(connection: Any, rows: Sequence[Any], path: str) -> None:
    """Fail as the deletion of `rows`, which the caller's transaction holds, would. Calls no signal.

    Raises:
        AccessDenied: other rows refer to them by a foreign key that forbids it; the message names some.
    """
    if not rows:
        return
    collector = Collector(using=connection.alias)
    try:
        collector.collect(rows)
    except IntegrityError as error:  # ProtectedError, RestrictedError
        raise refusal(error, path) from error
    # What Django leaves to the database.
    going = [(model, list(found)) for model, found in collector.data.items() if found]
    for model, found in [*going, *((queryset.model, queryset) for queryset in collector.fast_deletes)]:
        for relation in relations_to(model._meta):
            field = relation.field
            if field.remote_field.on_delete is not DO_NOTHING or not _is_enforced(connection, field):
                continue
            batches = collector.get_del_batches(found, [field]) if isinstance(found, list) else [found]
            for batch in batches:
                referring = all_rows(relation.related_model, connection.alias).filter(**{f"{field.name}__in": batch})
                left = list(islice(_staying(referring, collector), _NAMED + 1))
                if left:
                    raise AccessDenied(_told(left, path), path=path)


def _staying(rows: QuerySet, collector: Collector) -> Iterator[Any]:
    """Yield those of `rows` that are not among what `collector` would delete."""
    going = collector.data.get(rows.model, ())
    fast = [queryset for queryset in collector.fast_deletes if queryset.model is rows.model]
    staying = (row for row in rows.only("pk").iterator() if row not in going)
    while part := list(islice(staying, _PART)):
        keys = [row.pk for row in part]
        gone = {key for queryset in fast for key in queryset.filter(pk__in=keys).values_list("pk", flat=True)}
        yield from (row for row in part if row.pk not in gone)


def _is_enforced(connection: Any, field: Any) -> bool:
    """Return whether the database refuses to delete what `field` refers to. It may have an ON DELETE of its own."""
    if not getattr(field, "db_constraint", False):  # a ForeignObject has none
        return False
    table = connection.ops.quote_name(field.model._meta.db_table)
    with connection.cursor() as cursor:
        if connection.vendor == "postgresql":
            cursor.execute(_ENFORCED, (table, field.column))
            return cursor.fetchone() is not None
        cursor.execute(f"PRAGMA foreign_key_list({table})")
        return any(row[3] == field.column and row[6] in ("NO ACTION", "RESTRICT") for row in cursor.fetchall())


def refusal(error: IntegrityError, path: str) -> AccessDenied:
    """Return our error for that of Django, or of the database, when the row of `path` is to be deleted."""
    rows = getattr(error, "protected_objects", None) or getattr(error, "restricted_objects", None)
    if rows:
        return AccessDenied(_told(rows, path), path=path)
    why = str(error).strip().partition("\n")[0]
    return AccessDenied(f"the record of {path!r} cannot be deleted: {why}; delete or change what refers to it first")


def _told(rows: Iterable[Any], path: str) -> str:
    # Not their texts: those are whatever their models make of them.
    names = sorted(f"{row._meta.label} {row.pk}" for row in rows)
    more = f" and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
    return (
        f"{path!r} cannot be deleted: its record is referred to by {', '.join(names[:_NAMED])}{more}, and on_delete of"
        " the foreign key forbids it; delete or change that first"
    )
