"""The records in Django's admin: to look at and to download from; to delete, through the storage; not to edit.

A change of a row behind the storage's back would part it from its bytes. For a model of your own::

    @admin.register(MyFile)
    class MyFileAdmin(ProxyStorageAdmin):
        list_display = (*ProxyStorageAdmin.list_display, "my_column")
"""

from __future__ import annotations

import functools
from collections.abc import AsyncIterator, Callable
from typing import Any
from urllib.parse import quote

from asgiref.sync import async_to_sync
from django.contrib import admin, messages
from django.contrib.admin.actions import delete_selected
from django.contrib.admin.utils import quote as quote_key
from django.contrib.admin.utils import unquote as unquote_key
from django.core.exceptions import ImproperlyConfigured, PermissionDenied
from django.core.handlers.asgi import ASGIRequest
from django.db.models import QuerySet
from django.http import (
    FileResponse,
    Http404,
    HttpRequest,
    HttpResponse,
    HttpResponseBase,
    HttpResponseRedirect,
    StreamingHttpResponse,
)
from django.template.defaultfilters import filesizeformat
from django.urls import NoReverseMatch, URLPattern, path, reverse
from django.utils.html import format_html
from django.utils.translation import gettext_lazy as _

from aproxy_storage import (
    AsyncFile,
    BackendUnavailable,
    ConfigurationError,
    Conflict,
    IntegrityError,
    MetaRecord,
    NotFound,
    StorageError,
)
from aproxy_storage.files import Opening

from .models import ProxyStorageModelBase, StoredFile
from .registry import get_content_object, get_storage
from .storage import BridgeStorage

__all__ = ["ProxyStorageAdmin"]

#: What a browser may show inside the admin. Not image/svg+xml: it can hold scripts.
PREVIEWED = frozenset({"image/png", "image/jpeg", "image/gif", "image/webp", "image/avif"})
PREVIEW_BYTES = 10 << 20

View = Callable[..., HttpResponseBase]

_HEADERS = {"X-Content-Type-Options": "nosniff", "Content-Security-Policy": "sandbox; default-src 'none'"}


def _unless_out_of_reach(view: View) -> View:
    """Have `view` answer 503, and say what is out of reach, where an original or the records are."""

    @functools.wraps(view)
    def answered(*args: Any, **kwargs: Any) -> HttpResponseBase:
        try:
            return view(*args, **kwargs)
        except BackendUnavailable as error:
            return HttpResponse(str(error), status=503, content_type="text/plain; charset=utf-8", headers=_HEADERS)

    return answered


class ProxyStorageAdmin(admin.ModelAdmin):
    """The records of an ORM meta-backend, whatever storages they belong to.

    Nothing can be added or changed. Deleting goes through the storage of the record: the row is marked, the bytes go
    when the transaction commits. Only stored files can be deleted; what is pending or being deleted is finished by
    `reconcile`.
    """

    list_display = ("path", "shown_storage", "state", "content_type", "shown_size", "created_at", "download_link")
    search_fields = ("path", "name", "checksum")
    ordering = ("path",)
    show_full_result_count = False  # a count of millions of rows, for a line of text
    list_per_page = 50
    actions = ("delete_selected",)

    # -- what is shown

    def get_list_filter(self, request: HttpRequest) -> list[Any]:
        wanted = ("proxy_storage_name", "original_storage_name", "state", "content_type")
        names = {field.name for field in self.model._meta.get_fields()}
        return [(name, admin.AllValuesFieldListFilter) for name in wanted if name in names]

    def get_fields(self, request: HttpRequest, obj: Any = None) -> list[str]:
        hidden = {self.model._meta.pk.name, "content_type_id", "object_id"}
        own = [field.name for field in self.model._meta.fields if field.name not in hidden]
        return ["preview", "download_link", "owner", "shown_size", *own]

    def get_readonly_fields(self, request: HttpRequest, obj: Any = None) -> list[str]:
        return self.get_fields(request, obj)

    @admin.display(description=_("storage"), ordering="proxy_storage_name")
    def shown_storage(self, row: ProxyStorageModelBase) -> str:
        original = getattr(row, "original_storage_name", "")
        return f"{row.proxy_storage_name}: {original}" if original else row.proxy_storage_name

    @admin.display(description=_("size"), ordering="size")
    def shown_size(self, row: ProxyStorageModelBase) -> str:
        size: str = "-" if row.size is None else filesizeformat(row.size)
        return size

    @admin.display(description=_("download"))
    def download_link(self, row: ProxyStorageModelBase) -> str:
        if row.state != "stored":
            return "-"
        html: str = format_html('<a href="{}">{}</a>', self._url_of(row, "download"), _("download"))
        return html

    @admin.display(description=_("preview"))
    def preview(self, row: ProxyStorageModelBase) -> str:
        if not self._can_preview(row):
            return "-"
        style = "max-width: 20em; max-height: 20em"
        html: str = format_html('<img src="{}" alt="" style="{}">', self._url_of(row, "preview"), style)
        return html

    @admin.display(description=_("belongs to"))
    def owner(self, row: ProxyStorageModelBase) -> str:
        """The object whose field holds the file, with a link to its own page where it has one."""
        named = ("path", "proxy_storage_name", "content_type_id", "object_id", "field")
        owner = get_content_object({name: getattr(row, name, None) for name in named})
        if owner is None:
            return "-"
        shown = f"{owner._meta.verbose_name} {owner}, {getattr(row, 'field', '')}"
        try:
            where = f"{self.admin_site.name}:{owner._meta.app_label}_{owner._meta.model_name}_change"
            url = reverse(where, args=[quote_key(owner.pk)])
        except NoReverseMatch:  # its model is not in the admin
            return shown
        html: str = format_html('<a href="{}">{}</a>', url, shown)
        return html

    # -- what may be done

    def has_add_permission(self, request: HttpRequest) -> bool:
        return False

    def has_change_permission(self, request: HttpRequest, obj: Any = None) -> bool:
        return False

    def has_delete_permission(self, request: HttpRequest, obj: Any = None) -> bool:
        allowed: bool = super().has_delete_permission(request, obj)
        return allowed and (obj is None or obj.state == "stored")

    def delete_model(self, request: HttpRequest, obj: ProxyStorageModelBase) -> None:
        """Delete a file through its storage; one that is not there is deleted already.

        Raises:
            NotFound: it was deleted, and its path is another's by now.
            StorageError: it cannot be reached; the file is as it was.
        """
        storage = storage_of(obj)
        try:
            record = storage.get(obj.path)
        except NotFound:
            return
        storage.delete(_same_file(obj, record))

    def delete_view(self, request: HttpRequest, object_id: str, extra_context: Any = None) -> HttpResponseBase:
        """Delete one file, as Django's own view does; say why it cannot be deleted where the storage refuses."""
        try:
            page: HttpResponseBase = super().delete_view(request, object_id, extra_context)
        except (StorageError, ImproperlyConfigured) as error:  # what was begun is rolled back
            row = self.get_object(request, unquote_key(object_id))
            self._refused(request, row.path if row is not None else object_id, error)
            where = f"{self.admin_site.name}:{self.opts.app_label}_{self.opts.model_name}_change"
            return HttpResponseRedirect(reverse(where, args=[object_id], current_app=self.admin_site.name))
        return page

    def delete_queryset(self, request: HttpRequest, queryset: QuerySet) -> None:
        """Delete files through their storages; those that cannot be are told to the user, and the rest goes on."""
        self._delete_each(request, queryset)

    @admin.action(permissions=["delete"], description=_("Delete selected %(verbose_name_plural)s"))
    def delete_selected(self, request: HttpRequest, queryset: QuerySet) -> HttpResponseBase | None:
        """Ask for confirmation, as Django's own action does; then delete, and say how many files it were."""
        if not request.POST.get("post"):
            page: HttpResponseBase | None = delete_selected(self, request, queryset)
            return page
        # What goes along with the rows. Of those that are not stored nothing is deleted, and that is said.
        stored = [row for row in queryset if row.state == "stored"]
        _deleted, _count, perms_needed, protected = self.get_deleted_objects(stored, request)
        if protected:
            page = delete_selected(self, request, queryset)  # which says what stands against it
            return page
        if perms_needed:
            raise PermissionDenied
        deleted = self._delete_each(request, queryset)
        if deleted:
            messages.success(request, _("Deleted %(count)d files.") % {"count": deleted})
        return None

    def _delete_each(self, request: HttpRequest, queryset: QuerySet) -> int:
        deleted = 0
        for row in queryset.iterator(chunk_size=500):
            try:
                if row.state != "stored":
                    raise ConfigurationError("it is not stored; reconcile finishes it")
                self.delete_model(request, row)
            except (StorageError, ImproperlyConfigured) as error:
                self._refused(request, row.path, error)
            else:
                deleted += 1
                self.log_deletions(request, [row])
        return deleted

    def _refused(self, request: HttpRequest, path: str, error: Exception) -> None:
        messages.error(request, _("Not deleted: %(path)s. %(error)s") % {"path": path, "error": error})

    # -- the bytes

    def get_urls(self) -> list[URLPattern]:
        own = [
            path(f"<path:object_id>/{verb}/", self.admin_site.admin_view(view), name=self._name_of(verb))
            for verb, view in (("download", self.download_view), ("preview", self.preview_view))
        ]
        urls: list[URLPattern] = super().get_urls()
        return own + urls

    @_unless_out_of_reach
    def download_view(self, request: HttpRequest, object_id: str) -> HttpResponseBase:
        """Send the file, to be saved: it may be anything that a user has uploaded."""
        storage, record = self._found(request, object_id)
        name = (record.name or record.path).rpartition("/")[2]
        # RFC 6266; quoted, so that a name in Japanese or with a line break in it is safe.
        disposition = f"attachment; filename*=utf-8''{quote(name)}"
        return self._sent(request, storage, record, "application/octet-stream", disposition)

    @_unless_out_of_reach
    def preview_view(self, request: HttpRequest, object_id: str) -> HttpResponseBase:
        """Send a picture, to be shown in the page."""
        storage, record = self._found(request, object_id)
        if not self._can_preview(record):
            raise Http404(f"{record.path!r} is no picture that can be shown")
        return self._sent(request, storage, record, record.content_type or "", "inline")

    def _found(self, request: HttpRequest, object_id: str) -> tuple[BridgeStorage, MetaRecord]:
        row = self._visible(request, object_id)
        try:
            storage = storage_of(row)
            return storage, _same_file(row, storage.get(row.path))
        except (ConfigurationError, ImproperlyConfigured, NotFound) as error:
            raise Http404(str(error)) from error

    def _visible(self, request: HttpRequest, object_id: str) -> ProxyStorageModelBase:
        row: ProxyStorageModelBase | None = self.get_object(request, unquote_key(object_id))
        if row is None or row.state != "stored":
            raise Http404("there is no such file")
        if not self.has_view_permission(request, row):
            raise PermissionDenied
        return row

    def _sent(
        self, request: HttpRequest, storage: BridgeStorage, record: MetaRecord, content_type: str, disposition: str
    ) -> HttpResponseBase:
        """Open the file, then answer: what is gone is no answer that breaks off."""
        response: StreamingHttpResponse
        file: Any
        try:
            if isinstance(request, ASGIRequest):
                # On the server's own loop, which will read it. Django would read a synchronous iterator into memory.
                file = async_to_sync(_opened)(storage.proxy.open(record))
                response = StreamingHttpResponse(_Chunks(file), content_type=content_type)
            else:
                file = storage.open(record)
                response = FileResponse(file, content_type=content_type)
        except (ConfigurationError, NotFound, IntegrityError, Conflict) as error:
            raise Http404(str(error)) from error
        response.headers["Content-Length"] = str(file.size)
        response.headers["Content-Disposition"] = disposition
        for name, value in _HEADERS.items():
            response.headers[name] = value
        return response

    def _can_preview(self, row: ProxyStorageModelBase | MetaRecord) -> bool:
        return row.state == "stored" and row.content_type in PREVIEWED and (row.size or 0) <= PREVIEW_BYTES

    def _name_of(self, verb: str) -> str:
        return f"{self.opts.app_label}_{self.opts.model_name}_{verb}"

    def _url_of(self, row: ProxyStorageModelBase, verb: str) -> str:
        name = f"{self.admin_site.name}:{self._name_of(verb)}"
        url: str = reverse(name, args=[quote_key(row.pk)], current_app=self.admin_site.name)
        return url


async def _opened(opening: Opening[AsyncFile]) -> AsyncFile:
    return await opening


class _Chunks:
    """The chunks of an open file, for a response under ASGI; closed with it, also where nobody has asked for one."""

    def __init__(self, file: AsyncFile) -> None:
        self._file = file

    async def __aiter__(self) -> AsyncIterator[bytes]:
        async with self._file:
            async for chunk in self._file:
                yield chunk

    def close(self) -> None:
        if not self._file.closed:
            async_to_sync(self._file.aclose)()


def _same_file(row: ProxyStorageModelBase, record: MetaRecord) -> MetaRecord:
    """Return `record`, of the path of `row`, if it is of the same file.

    Raises:
        NotFound: it is another one's.
    """
    key = record.native.get(row._meta.pk.attname, row.pk)
    if record.token != row.token or (not row.token and key != row.pk):  # django-proxy-storage knew no tokens
        raise NotFound(f"{row.path!r} was deleted, and is another file by now", operation="get", path=row.path)
    return record


def storage_of(row: ProxyStorageModelBase) -> BridgeStorage:
    """Return the storage of a row, for synchronous code.

    Raises:
        ConfigurationError: no storage of that name is known here.
    """
    return BridgeStorage(storage=get_storage(row.proxy_storage_name))


admin.site.register(StoredFile, ProxyStorageAdmin)
