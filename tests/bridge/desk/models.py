"""Objects that own files: by a plain key, a UUID, through a proxy, a child; images; files that go with their object."""

from __future__ import annotations

import uuid
from typing import Any

from django.db import models

from sync_bridge import ProxyStorageFileField, ProxyStorageImageField


class Person(models.Model):
    name = models.CharField(max_length=50)


class Message(models.Model):
    """The seed's: who wrote it and who got it may see what is attached."""

    author = models.ForeignKey(Person, related_name="+", null=True, on_delete=models.CASCADE)
    receiver = models.ForeignKey(Person, related_name="+", null=True, on_delete=models.CASCADE)
    text = models.CharField(max_length=200, blank=True)
    attach = ProxyStorageFileField(upload_to="messages", blank=True)

    def may_be_read_by(self, person: Person, field: str) -> bool:
        return field == "attach" and person.pk in (self.author_id, self.receiver_id)


class Notice(Message):
    """A message, by multi-table inheritance."""

    urgent = models.BooleanField(default=False)


class Memo(Message):
    """A message, by a proxy."""

    class Meta:
        proxy = True


def folder_of(paper: Any, name: str) -> str:
    return f"papers/{paper.owner.name}/{name}"


class Paper(models.Model):
    """Its key is a UUID, its folder is computed, and its file goes with it."""

    id = models.UUIDField(primary_key=True, default=uuid.uuid4)
    owner = models.ForeignKey(Person, on_delete=models.CASCADE)
    file = ProxyStorageFileField(
        upload_to=folder_of, max_length=60, delete_on_replace=True, delete_with_object=True, null=True, blank=True
    )

    def may_be_read_by(self, person: Person, field: str) -> bool:
        return field == "file" and person.pk == self.owner_id


class Picture(models.Model):
    width = models.PositiveIntegerField(null=True)
    height = models.PositiveIntegerField(null=True)
    image = ProxyStorageImageField(upload_to="pictures/%Y", width_field="width", height_field="height", blank=True)


class Plain(models.Model):
    """With Django's own field, over the same storage."""

    file = models.FileField(upload_to="plain")


class Scan(models.Model):
    """Its file is wholly its own: a former one goes when it gets another."""

    subject = models.CharField(max_length=50, blank=True)
    file = ProxyStorageFileField(upload_to="shared", delete_on_replace=True, blank=True)
