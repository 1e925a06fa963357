"""Models of users: from the barest to one with columns of its own."""

from __future__ import annotations

from django.db import models

from sync_bridge.models import ContentObjectFieldMixin, OriginalStorageNameMixin, ProxyStorageModelBase


class PlainFile(ProxyStorageModelBase):
    """Files of one original; no column but the necessary ones."""


class NamedFile(OriginalStorageNameMixin, ProxyStorageModelBase):
    """Files of several originals."""


class Shelf(models.Model):
    """Something that files belong to."""

    title = models.CharField(max_length=50)


class Document(OriginalStorageNameMixin, ContentObjectFieldMixin, ProxyStorageModelBase):
    """Files with columns of the user's own, of every awkward kind."""

    title = models.CharField(max_length=20, default="", blank=True)
    pages = models.PositiveIntegerField(null=True)
    tags = models.JSONField(default=list)
    due = models.DateTimeField(null=True)
    price = models.DecimalField(max_digits=8, decimal_places=2, null=True)
    isbn = models.CharField(max_length=20, null=True, unique=True)
    shelf = models.ForeignKey(Shelf, null=True, on_delete=models.SET_NULL)
    rating = models.IntegerField(null=True, default=5)


class Note(models.Model):
    """What goes with the document it is about."""

    document = models.ForeignKey(Document, on_delete=models.CASCADE)


class Stamped(OriginalStorageNameMixin, ProxyStorageModelBase):
    """Files with columns that fill themselves, and one that must be given."""

    owner = models.IntegerField()
    filed_at = models.DateTimeField(auto_now_add=True)
    touched_at = models.DateTimeField(auto_now=True)
    label = models.CharField(max_length=20, db_default="none")


class Mark(models.Model):
    """The same, unknown to the document."""

    document = models.ForeignKey(Document, on_delete=models.CASCADE, related_name="+")


class Invoice(models.Model):
    """What keeps its document."""

    document = models.ForeignKey(Document, on_delete=models.PROTECT)


class Receipt(models.Model):
    """The same, unless what it belongs to goes too."""

    note = models.ForeignKey(Note, null=True, on_delete=models.CASCADE)
    document = models.ForeignKey(Document, null=True, on_delete=models.RESTRICT)


class Ticket(models.Model):
    """The same, by the database alone, and whatever is about its note."""

    note = models.ForeignKey(Note, null=True, on_delete=models.DO_NOTHING)
    document = models.ForeignKey(Document, null=True, on_delete=models.DO_NOTHING)


class Loose(models.Model):
    """What may refer to a document that is gone."""

    document = models.ForeignKey(Document, on_delete=models.DO_NOTHING, db_constraint=False)


class Reply(models.Model):
    """What goes with the document it is about, and keeps the one that it quotes, which may be the same."""

    document = models.ForeignKey(Document, null=True, on_delete=models.CASCADE)
    quoted = models.ForeignKey(Document, on_delete=models.DO_NOTHING, related_name="+")


class Legacy(models.Model):
    """A table of another program, which is not in every database."""

    document = models.ForeignKey(Document, on_delete=models.DO_NOTHING)

    class Meta:
        managed = False


class Named(models.Model):
    """What knows its document by the path, without a constraint."""

    path = models.CharField(max_length=1024)
    document = models.ForeignObject(
        Document, on_delete=models.DO_NOTHING, from_fields=["path"], to_fields=["path"], related_name="+"
    )


class NoRows(models.Manager):
    """Hides what was deleted, say."""

    def get_queryset(self) -> models.QuerySet:
        return super().get_queryset().none()


class Hidden(ProxyStorageModelBase):
    """Files whose rows no manager shows."""

    objects = NoRows()

    class Meta(ProxyStorageModelBase.Meta):
        base_manager_name = "objects"


class Pin(models.Model):
    """What keeps such a file."""

    file = models.ForeignKey(Hidden, on_delete=models.PROTECT)
