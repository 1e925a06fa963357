from django.conf import settings
from django.db import models

from sync_bridge import ProxyStorageFileField


class Letter(models.Model):
    """What one user sends to another; its file goes when it is deleted."""

    author = models.ForeignKey(settings.AUTH_USER_MODEL, related_name="sent", on_delete=models.CASCADE)
    receiver = models.ForeignKey(settings.AUTH_USER_MODEL, related_name="received", on_delete=models.CASCADE)
    text = models.CharField(max_length=200)
    attachment = ProxyStorageFileField(upload_to="letters", blank=True, delete_with_object=True)

    def __str__(self) -> str:
        return self.text

    def may_be_read_by(self, user: models.Model) -> bool:
        return user.pk in (self.author_id, self.receiver_id)
