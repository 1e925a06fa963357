"""Where the files are: bytes in a directory that no web server publishes, records in Django's own database.

Another original or database is a change of these lines: ``S3Backend(bucket="letters")``, or several originals with a
`Fallback`.
"""

from django.conf import settings

from aproxy_storage import ProxyStorage
from aproxy_storage.backends.filesystem import FileSystemBackend
from aproxy_storage.meta_backends.orm import ORMMetaBackend

attachments = ProxyStorage(
    "attachments",
    originals={"disk": FileSystemBackend(settings.VAR / "attachments")},
    meta=ORMMetaBackend("sync_bridge.StoredFile"),
    tidy_every=600.0,
)
