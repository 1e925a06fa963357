"""Listings, of objects and of unfinished uploads, page by page; and the removal of many objects with one request."""

from __future__ import annotations

import asyncio
import heapq
from collections import deque
from collections.abc import AsyncIterator, Callable, Sequence
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from typing import Any, Protocol

from ..errors import AccessDenied, BackendUnavailable, ConfigurationError, NotFound, StorageError
from ..records import ObjectInfo
from ._s3_client import Connection
from ._s3_errors import code_of
from ._s3_objects import listed

__all__ = ["Bucket", "delete_objects", "list_objects", "unfinished_uploads"]

_LAST = "\U0010ffff"  # nothing that begins with the same text comes after it
_PER_REQUEST = 1000  # objects: a rule of S3
_AT_A_TIME = 8  # removals, where each takes a request
# What services answer to DeleteObjects that do not know it, or want the MD5 that botocore does not send any more.
_NO_BATCHES = {
    "InvalidArgument",
    "InvalidRequest",
    "MethodNotAllowed",
    "MissingContentMD5",
    "NotImplemented",
    "405",
    "501",
}

Entry = tuple[str, Any]  # a key and what the service says of it, or a group's name and None


class Bucket:
    """Where to list: pages of one bucket, with keys that have `base` taken off."""

    def __init__(self, connection: Callable[[], Connection], what: str, name: str, base: str) -> None:
        self._connection = connection
        self.what = what
        self.name = name
        self.base = base

    async def page(self, prefix: str, *, after: str | None = None, **params: Any) -> Any:
        """Return one page of ListObjectsV2."""
        if after is not None:
            params["StartAfter"] = self.base + after
        # Asked for each time, because the consumer may close the backend between two pages.
        return await self._connection().call(
            "list_objects_v2", self.what, Bucket=self.name, Prefix=self.base + prefix, **params
        )

    def token_after(self, page: Any, token: str | None) -> str | None:
        """Return where the page after `page` begins, which was asked for with `token`; None after the last one.

        Raises:
            BackendUnavailable: the service does not tell, and a listing without the rest would be taken for whole.
        """
        following: str | None = page.get("NextContinuationToken") if page.get("IsTruncated") else None
        if page.get("IsTruncated") and following in (None, "", token):
            raise _without_end(self.what)
        return following

    def key(self, full_key: str) -> str:
        return full_key.removeprefix(self.base)


def _without_end(what: str) -> BackendUnavailable:
    return BackendUnavailable(
        f"could not {what}: the service says that there is more, but not where it begins", retryable=False
    )


class _Order(Protocol):
    async def next(self) -> Entry | None:
        """Return the next entry in the byte order of the keys."""

    def pass_over(self, group: str) -> None:
        """Spare what follows that begins with `group`, where that is possible."""


class _Flat:
    """Keys as S3 lists them: in byte order, a thousand with one request."""

    def __init__(self, bucket: Bucket, prefix: str, after: str | None) -> None:
        self._bucket = bucket
        self._prefix = prefix
        self._start = after
        self._token: str | None = None  # of a page that was empty, and not the last
        self._last: str | None = None
        self._entries: deque[Any] = deque()
        self._ended = False

    async def next(self) -> Entry | None:
        while not self._entries:
            if self._ended:
                return None
            if self._token is None:
                page = await self._bucket.page(self._prefix, after=self._start)
            else:
                page = await self._bucket.page(self._prefix, ContinuationToken=self._token)
            self._entries.extend(page.get("Contents") or ())
            self._ended = not page.get("IsTruncated")
            if self._entries:
                self._start, self._token = self._bucket.key(self._entries[-1]["Key"]), None
            else:  # such pages are of services that pass over much: markers of deletions, keys of others
                self._token = self._bucket.token_after(page, self._token)
        entry = self._entries.popleft()
        key = self._bucket.key(entry["Key"])
        if self._last is not None and key <= self._last:
            raise ConfigurationError(
                f"could not {self._bucket.what}: the service does not list in the byte order of keys. If it walks "
                "directories, as SeaweedFS does, pass flat_listings=False"
            )
        self._last = key
        return key, entry

    def pass_over(self, group: str) -> None:
        if not self._ended and self._start is not None and self._start.startswith(group):
            self._start = group + _LAST


class _Walk:
    """Directory by directory, with a request or more for each: for services that have directories underneath, and
    list in their order: ``b/a`` before ``b!``, because ``b`` comes before ``b!``."""

    def __init__(self, bucket: Bucket, prefix: str, after: str | None, *, grouped: bool) -> None:
        self._bucket = bucket
        self._after = after
        self._grouped = grouped
        self._stack = [_Directory(bucket, prefix, after)]

    async def next(self) -> Entry | None:
        after = self._after
        while self._stack:
            found = await self._stack[-1].next()
            if found is None:
                self._stack.pop()
                continue
            key, entry = found
            if entry is not None:
                if after is None or key > after:
                    return key, entry
            elif after is not None and key <= after:
                if after.startswith(key):  # it may hold more
                    self._stack.append(_Directory(self._bucket, key, after))
            elif self._grouped:
                return key, None
            else:
                self._stack.append(_Directory(self._bucket, key, None))
        return None

    def pass_over(self, group: str) -> None:
        while len(self._stack) > 1 and self._stack[-1].prefix.startswith(group):
            self._stack.pop()


class _Directory:
    """The files and directories of one directory, in byte order, a directory's name ending in its slash."""

    def __init__(self, bucket: Bucket, prefix: str, after: str | None) -> None:
        self._bucket = bucket
        self.prefix = prefix
        self._params: dict[str, Any] = {"after": _start_in(prefix, after)}
        self._entries: deque[Entry] = deque()
        self._held: list[str] = []  # directories, until the files are given that come before their slash
        self._ended = False

    async def next(self) -> Entry | None:
        while not self._entries and not self._ended:
            await self._next_page()
        if self._held and not (self._entries and self._entries[0][0] < self._held[0]):
            return heapq.heappop(self._held), None
        if not self._entries:
            return None
        key, entry = self._entries.popleft()
        if entry is not None:
            return key, entry
        heapq.heappush(self._held, key)
        return await self.next()

    async def _next_page(self) -> None:
        page = await self._bucket.page(self.prefix, Delimiter="/", **self._params)
        found: list[Entry] = [(self._bucket.key(each["Key"]), each) for each in page.get("Contents") or ()]
        found += [(self._bucket.key(each["Prefix"]), None) for each in page.get("CommonPrefixes") or ()]
        found.sort(key=lambda entry: entry[0].rstrip("/"))
        self._entries.extend(found)
        self._ended = not page.get("IsTruncated")
        self._params = {"ContinuationToken": self._bucket.token_after(page, self._params.get("ContinuationToken"))}


def _start_in(prefix: str, after: str | None) -> str | None:
    """Return a place to start at from which on, by names, lies all that comes after `after`, by bytes. None: the start.

    What is found there too early is left out by `_Walk`.
    """
    # The service orders a directory by its name without the slash. So the orders differ only where one name begins with
    # another: the directory `b` comes before the file `b!` by names, but what is in it, `b/…`, comes after it by
    # bytes, because "!" is less than "/". To go on after `b!` by names would skip all of `b`.
    #
    # The directories that would be skipped have names that `after`'s begins with, followed by a character less than
    # "/". The shortest of them ends before the first such character: `b` of `b!x-y`. We start right before that one:
    # after all that begins with the character below its last, `a\U0010ffff`. The others are longer, and come later.
    # A file `b` may have a directory of the same name beside it, and is stepped back from as a whole. `b/c`, whose
    # name has no such character, is met on the way into `b`, and exact.
    directory, _, _ = prefix.rpartition("/")
    below = f"{directory}/" if directory else ""
    if after is None or not after.startswith(below) or after <= prefix:
        return None
    name, _, deeper = after[len(below) :].partition("/")
    cut = next((at for at, char in enumerate(name) if char < "/"), None)
    if cut is None:
        if deeper:
            return after
        cut = len(name)
    if cut == 0 or (before := ord(name[cut - 1]) - 1) < 0x20 or 0xD800 <= before <= 0xDFFF:
        return None
    return below + name[: cut - 1] + chr(before) + _LAST


async def list_objects(
    bucket: Bucket, prefix: str, *, after: str | None, delimiter: str | None, flat: bool
) -> AsyncIterator[ObjectInfo]:
    """Yield what lies below `prefix`, but no folders that were made in a console. See `Backend.list`."""
    # Groups are made here: services differ in what they make of a delimiter together with a place to start at, and
    # some know the slash only.
    order: _Order
    if flat:
        order = _Flat(bucket, prefix, after)
    else:
        order = _Walk(bucket, prefix, after, grouped=delimiter == "/")
    group: str | None = None  # the last one
    while (found := await order.next()) is not None:
        key, entry = found
        if group is not None and key.startswith(group):
            continue
        at = key.find(delimiter, len(prefix)) if delimiter else -1
        if at < 0:
            if not _is_marker(key, entry):
                yield listed(key, entry)
            continue
        group = key[: at + len(delimiter or "")]
        order.pass_over(group)
        if group != after:  # else it has been given
            yield ObjectInfo(group, is_prefix=True)


def _is_marker(key: str, entry: Any) -> bool:
    """Return whether it is the empty object that a console makes of a folder. No file can have such a name, so it could
    be neither read nor copied, and a scan would report it for ever. That of the prefix itself has no name at all."""
    return not key or (key.endswith("/") and not entry.get("Size"))


async def unfinished_uploads(connection: Connection, what: str, bucket: str, key: str) -> list[tuple[str, float]]:
    """Return the ids of the multipart uploads of exactly this key, each with its age in seconds, by the service's clock
    where that is told; 0 where the beginning is not.

    Raises:
        BackendUnavailable: the service does not tell all of them. StorageError.
    """
    found: list[tuple[str, float]] = []
    marker: dict[str, Any] = {}
    while True:
        page = await connection.call("list_multipart_uploads", what, Bucket=bucket, Prefix=key, **marker)
        now = _time_of(page)
        for upload in page.get("Uploads") or ():
            if upload["Key"] == key:
                begun = upload.get("Initiated")
                found.append((upload["UploadId"], (now - begun).total_seconds() if begun is not None else 0.0))
        # They come in the order of keys, and `key` is the first that begins with itself.
        following = page.get("NextKeyMarker", "")
        if not page.get("IsTruncated") or following > key:
            return found
        before, marker = marker, {"KeyMarker": following, "UploadIdMarker": page.get("NextUploadIdMarker", "")}
        if not following or marker == before:
            raise _without_end(what)


def _time_of(answer: Any) -> datetime:
    """Return when the service has sent `answer`."""
    text = answer.get("ResponseMetadata", {}).get("HTTPHeaders", {}).get("date", "")
    try:
        moment = parsedate_to_datetime(text)
    except ValueError:
        return datetime.now(UTC)
    return moment if moment.tzinfo is not None else moment.replace(tzinfo=UTC)


async def delete_objects(
    connection: Connection, what: str, bucket: str, base: str, keys: Sequence[str]
) -> dict[str, StorageError | None]:
    """Remove objects; return for each key None, or why it is still there."""
    results: dict[str, StorageError | None] = dict.fromkeys(keys)
    for start in range(0, len(keys), _PER_REQUEST):
        batch = [{"Key": base + key} for key in keys[start : start + _PER_REQUEST]]
        try:
            answer = await connection.call(
                "delete_objects", what, Bucket=bucket, Delete={"Objects": batch, "Quiet": True}
            )
        except StorageError as error:
            if code_of(error) not in _NO_BATCHES:
                raise
            return results | await _delete_singly(connection, bucket, base, keys[start:])
        for refused in answer.get("Errors") or ():
            code = refused.get("Code", "")
            if code == "NoSuchKey":
                continue
            cls: type[StorageError] = AccessDenied if code == "AccessDenied" else BackendUnavailable
            key = refused["Key"].removeprefix(base)
            results[key] = cls(f"could not delete {key!r}: the service says {code}")
    return results


async def _delete_singly(
    connection: Connection, bucket: str, base: str, keys: Sequence[str]
) -> dict[str, StorageError | None]:
    results: dict[str, StorageError | None] = {}
    remaining = iter(keys)

    async def work() -> None:
        for key in remaining:
            results[key] = None
            try:
                await connection.call("delete_object", f"delete {key!r}", Bucket=bucket, Key=base + key)
            except NotFound:
                continue
            except StorageError as error:
                results[key] = error

    async with asyncio.TaskGroup() as group:
        for _ in range(min(_AT_A_TIME, len(keys))):
            group.create_task(work())
    return results
