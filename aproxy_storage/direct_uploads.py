"""Uploads that go from a browser straight to an original, past this process, and become files all the same.

`begin` reserves the path for as long as the form is good, and names two places in the record: a key that nobody else
can have, where the browser puts the bytes, and the file's own. `finish` copies from the one to the other, on the
server, and commits. So whoever still holds the form cannot change a file that has been looked at; what he uploads
late lies at a key that is discarded once more when the form is no good any longer.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

from .backends.base import Backend
from .errors import AlreadyExists, ConfigurationError, Conflict, NotFound, NotSupported, outcome_unknown
from .paths import new_token
from .records import PENDING, STORED, MetaRecord, ObjectInfo, Place, UploadForm
from .sniffing import guess_content_type
from .timeouts import elapsed

if TYPE_CHECKING:
    from .proxy_writing import WritingVerbs

__all__ = ["DirectUpload", "begin", "finish"]

_MAX_NAMES = 100  # free names tried before giving up, as in `writing`


@dataclass(frozen=True, slots=True)
class DirectUpload:
    """An upload that has begun: give `form` to the browser, and `path` to `ProxyStorage.finish_upload` when it says
    that it is done."""

    path: str
    form: UploadForm = field(repr=False)


async def begin(
    storage: WritingVerbs,
    path: str,
    original: str | None,
    fields: Mapping[str, Any],
    *,
    max_bytes: int,
    expires_in: float,
    max_length: int | None,
) -> DirectUpload:
    """Reserve `path`, or the next free name, and return the form. See `ProxyStorage.begin_upload`."""
    if max_bytes < 1 or expires_in <= 0:
        raise ValueError("max_bytes and expires_in must be positive")
    original = original or _suitable(storage)
    backend = storage.get_original(original)
    _check(backend)
    writing = storage._writing
    if max_length is not None and len(path) > max_length:
        path = writing.next_name(path, [original], max_length)
    backend.check_key(path.removeprefix(storage.prefix))
    # Always one, in the form too: else the browser says what it likes, and a picture becomes a page.
    fields = {**fields, "content_type": fields.get("content_type") or _type_of(fields.get("name"))}
    for _ in range(_MAX_NAMES):
        token = new_token()
        upload = Place(original, writing._token_key(path, new_token(), original), "doubtful")
        form = await backend.upload_form(
            upload.key,
            token=token,
            expires_in=expires_in,
            max_bytes=max_bytes,
            content_type=fields["content_type"],
        )
        record = MetaRecord(
            path=path,
            proxy_storage_name=storage.name,
            original_storage_name=original,
            original_storage_path=writing._key(path, token, original, storage.keys),
            state=PENDING,
            token=token,
            version=1,
            places=(upload,),
            **fields,
        )
        spare = replace(record, original_storage_path=writing._key(path, token, original, "token"))
        try:
            reserved = await storage.meta.reserve(record, lease=expires_in + storage.journal.lease, spare=spare)
        except AlreadyExists:
            path = writing.next_name(path, [original], max_length)
            continue
        except BaseException as error:
            if outcome_unknown(error):  # nobody has the form, so nothing can land
                await writing._finish(storage.journal.undo(record, certain=True), "undo of a reservation")
            raise
        if reserved is None:
            raise NotSupported("an upload cannot begin inside a transaction: nobody else would see its reservation")
        return DirectUpload(path, form)
    raise AlreadyExists(f"no free name for {path!r} in {_MAX_NAMES} tries", operation="begin_upload", path=path)


def _suitable(storage: WritingVerbs) -> str:
    for name, backend in storage.originals.items():
        if backend.capabilities.upload_form:
            return name
    raise NotSupported(f"no original of storage {storage.name!r} takes uploads straight from browsers")


def _check(backend: Backend) -> None:
    if not backend.capabilities.upload_form:
        raise NotSupported(f"{backend} takes no uploads straight from browsers")
    if not (backend.capabilities.server_copy and backend.capabilities.tokens):
        raise ConfigurationError(f"{backend} cannot copy on its server, or keeps no tokens: uploads cannot be finished")


async def finish(storage: WritingVerbs, path: str) -> MetaRecord:
    """Make what has been uploaded a file. See `ProxyStorage.finish_upload`."""
    journal = storage.journal
    record = await storage.meta.get(path)
    if record.proxy_storage_name != storage.name:
        raise NotFound(f"storage {storage.name!r} has no upload {path!r}", operation="finish_upload", path=path)
    if record.state == STORED:
        return record  # said twice
    upload = _upload_of(record)
    backend = storage.get_original(upload.original)
    try:
        info = await backend.stat(upload.key)
    except NotFound as error:
        raise NotFound(f"nothing has been uploaded for {path!r}", operation="finish_upload", path=path) from error
    # The browser may be at it again until then.
    left = 0.0 if record.lease is None else max(0.0, (record.lease - datetime.now(UTC)).total_seconds())
    since = elapsed()
    # Whoever moves the version is the one who finishes.
    taken = await journal.change(record, {"places": record.places}, lease=left + journal.lease)
    # The same as one of the usual length that is taken `left` seconds later: not renewed, and so shortened, before.
    with journal.leases.hold(taken, since=since + left) as held:
        kind = record.content_type or _type_of(record.name, info.content_type)
        stored_info = await _copy(storage, backend, held, upload, kind)
        settling = replace(upload, state="settling")
        stored = await journal.publish(
            held.record,
            {
                "original_storage_path": held.record.original_storage_path,
                "places": (settling,),
                "size": stored_info.size,
                "content_type": kind,
            },
            lease=max(journal.lease_for([settling]) or 0.0, left + journal.settle),
        )
    await journal.discard([settling], stored)  # the form may still bring it back: reconcile discards it again
    return stored


def _upload_of(record: MetaRecord) -> Place:
    places = [place for place in record.places if place.key != record.original_storage_path]
    if record.state != PENDING or len(places) != 1:
        raise NotFound(f"there is no upload {record.path!r}", operation="finish_upload", path=record.path)
    return places[0]


def _type_of(name: str | None, declared: str | None = None) -> str:
    return guess_content_type(name, b"", declared) or "application/octet-stream"


async def _copy(storage: WritingVerbs, backend: Backend, held: Any, upload: Place, content_type: str) -> ObjectInfo:
    """Copy to the file's own key; where somebody else's object has it, to a token key."""
    for last in (False, True):
        record: MetaRecord = held.record
        key = record.original_storage_path
        held.check()
        try:
            return await backend.copy(
                upload.key, key, token=record.token, durable=storage.journal._durable, content_type=content_type
            )
        except AlreadyExists:
            found = await backend.stat(key)
            if found.token == record.token:
                return found  # of a finish that was interrupted
            if last:
                raise
            await storage._writing._give_token_key(held, record.primary)
        except NotFound as error:
            raise Conflict(f"the upload of {record.path!r} was taken away", path=record.path) from error
    raise AssertionError("unreachable")
