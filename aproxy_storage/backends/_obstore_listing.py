"""Listings in byte order, whatever the store makes of prefixes: obstore's are whole directories."""

from __future__ import annotations

import asyncio
import contextlib
import re
from collections.abc import AsyncGenerator, AsyncIterator
from datetime import datetime
from typing import Any

import obstore

from ..errors import ConfigurationError
from ..paths import successor
from ..records import ObjectInfo

__all__ = ["CONTROLS", "list_flat", "list_one_level", "listed", "walk"]

_PAGE = 1000
CONTROLS = re.compile(r"[\x00-\x1f\x7f]")  # characters of no path that obstore knows


def listed(key: str, found: Any, **more: Any) -> ObjectInfo:
    """Return what the entry of a listing, or of an answer with `more`, says of the object."""
    moment: datetime | None = found["last_modified"]
    return ObjectInfo(key, size=found["size"], modified_at=moment, changed_at=moment, etag=found["e_tag"], **more)


async def list_flat(
    store: Any, prefix: str, after: str | None, seconds: float | None
) -> AsyncIterator[tuple[str, Any]]:
    """Yield (path, entry) of every object whose path begins with `prefix` and is greater than `after`, in byte order.
    Memory: one page.

    Relies on the service's order: that of the whole keys as bytes, in which a slash is a character like others. So
    ``2024-01/x`` comes before ``2024/y``, because ``-`` is less than ``/``; a walk through directories would have it
    the other way round. In that order everything with the prefix lies together. The listing begins right before it, at
    `offset`, and ends at the first path beyond it; of what lies between, `prefix` and `after` decide here, so that an
    offset which is too small costs a page, and one too great would lose objects.

    Raises:
        ConfigurationError: the service has another order.
    """
    directory = prefix[: prefix.rfind("/") + 1]
    offset = _sayable(max(after or "", _just_below(prefix) if prefix else ""))
    pages = aiter(obstore.list(store, directory.rstrip("/") or None, offset=offset or None, chunk_size=_PAGE))
    beyond = successor(prefix) if prefix else None
    last = ""
    while True:
        try:
            async with asyncio.timeout(seconds):
                page = await anext(pages)
        except StopAsyncIteration:
            return
        for entry in page:
            path = entry["path"]
            if path <= last:
                if f"{path}/" > last and not entry["size"]:
                    # In its place for a key with a slash at the end, which obstore has taken away: S3's console makes
                    # such a marker of a directory. As "2024" it comes after "2024-01/x", for it was "2024/".
                    last = f"{path}/"
                    continue
                raise ConfigurationError(
                    "the service does not list in the byte order of keys. If it walks directories, as SeaweedFS does, "
                    "pass flat_listings=False"
                )
            last = path
            if beyond is not None and path >= beyond:
                return
            if path.startswith(prefix) and (after is None or path > after):
                yield path, entry


def _just_below(prefix: str) -> str:
    """Return a text below everything that begins with `prefix`, and above most of what comes before it.

    It ends in the greatest text that begins with the character before the prefix's last one: of ``a/0b`` it is ``a/0a``
    and U+10FFFF, above ``a/0a``, ``a/0az`` and all others that begin so. The character before ``0`` is the slash, which
    would end a part of the path there (obstore refuses ``a//…``, and takes the slash of ``/…`` away, so that the
    listing would begin beyond everything); no path has it there, so the one before it does as well.
    """
    point = ord(prefix[-1]) - 1
    if point == ord("/"):
        point -= 1
    if 0xD800 <= point <= 0xDFFF:  # surrogates cannot be encoded
        point = 0xD7FF
    return prefix[:-1] + (chr(point) + "\U0010ffff" if point > 0x20 else "")


def _sayable(text: str) -> str:
    """Return the longest beginning of `text` that obstore takes for a path: without control characters and parts that
    are empty, ``.`` or ``..``. It is less than the text, so nothing is lost by beginning there: ``a`` for ``a/.``."""
    parts = CONTROLS.split(text, maxsplit=1)[0].split("/")
    for number, part in enumerate(parts):
        if part in ("", ".", ".."):
            return "/".join(parts[:number])
    return "/".join(parts)


async def list_one_level(
    store: Any, prefix: str, after: str | None, seconds: float | None
) -> AsyncIterator[tuple[str, Any]]:
    """Yield what lies in one directory, in byte order: (path, entry) of objects, (path ending in a slash, None) of
    directories. A directory that holds nothing greater than `after` is left out. Memory: the directory."""
    for path, entry in await _directory(store, prefix, seconds):
        if after is None or path > after:
            yield path, entry
        elif entry is None and after != path and after.startswith(path):
            async with contextlib.aclosing(walk(store, path, after, seconds)) as inside:
                async for _ in inside:
                    yield path, None
                    break


async def walk(
    store: Any, prefix: str, after: str | None, seconds: float | None
) -> AsyncGenerator[tuple[str, Any], None]:
    """As `list_flat`, for stores whose listings have no order: one directory after the other. Memory: one directory
    a level."""
    levels = [iter(await _directory(store, prefix, seconds))]
    while levels:
        path, entry = next(levels[-1], ("", None))
        if not path:
            levels.pop()
        elif entry is None:
            if after is None or path > after or after.startswith(path):
                levels.append(iter(await _directory(store, path, seconds)))
        elif after is None or path > after:
            yield path, entry


async def _directory(store: Any, prefix: str, seconds: float | None) -> list[tuple[str, Any]]:
    """Return what begins with `prefix` in its directory, in byte order; of directories the entry is None."""
    directory = prefix[: prefix.rfind("/") + 1]
    async with asyncio.timeout(seconds):
        found = await obstore.list_with_delimiter_async(store, directory.rstrip("/") or None)
    entries: list[tuple[str, Any]] = [(entry["path"], entry) for entry in found["objects"]]
    entries += [(path.rstrip("/") + "/", None) for path in found["common_prefixes"]]
    return sorted((pair for pair in entries if pair[0].startswith(prefix)), key=lambda pair: pair[0])
