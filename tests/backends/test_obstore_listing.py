"""Listings through obstore: in byte order, from anywhere on, past what others have left in a bucket."""

from collections.abc import AsyncIterator
from datetime import UTC, datetime
from typing import Any

import obstore
import pytest
from obstore.store import MemoryStore

from aproxy_storage import ConfigurationError
from aproxy_storage.backends import _obstore_listing
from aproxy_storage.backends.obstore import ObstoreBackend


@pytest.mark.parametrize("flat", [True, False])
@pytest.mark.asyncio
async def test_listings_begin_where_obstore_has_no_word_for_it(flat: bool) -> None:
    """A listing begins behind a name that obstore must be able to say, which not every prefix and `after` is."""
    keys = ["!", "-a", "0", "0a", "1", "a/!b", "a/-", "a/.b", "a/0", "a/0b", "a/1", "a/\x80b", "a0", "b/c"]
    keys = sorted(set(keys), key=str.encode)
    store = MemoryStore()
    for key in keys:
        await obstore.put_async(store, key, b"x")
    backend = ObstoreBackend(store, flat_listings=flat)
    for prefix in (
        "",
        "0",
        "a/0",
        "a/.",
        "a/..",
        "a/.!",
        "a/\x80",
        "a",
        "a/",
        "!",
        "a/!",
        "a/\n",
        "a//",
        "/",
        "a/./b",
        "\n/x",
    ):
        for after in (None, "", "0", "/", "/x", "a/.", "a/..", "a//b", "a/./b", "a/.\n", "a/\x7f", "a/0\nb", "a/", "a"):
            found = [info.key async for info in backend.list(prefix, after=after)]
            expected = [key for key in keys if key.startswith(prefix) and (after is None or key > after)]
            assert found == expected, (prefix, after)


def pages_of(monkeypatch: pytest.MonkeyPatch, *entries: tuple[str, int]) -> ObstoreBackend:
    """Return a backend whose service lists these paths and sizes, as obstore hands them on."""
    moment = datetime.now(UTC)

    async def pages() -> AsyncIterator[list[dict[str, Any]]]:
        for path, size in entries:
            yield [{"path": path, "size": size, "last_modified": moment, "e_tag": None}]

    monkeypatch.setattr(_obstore_listing.obstore, "list", lambda *_, **__: pages())
    return ObstoreBackend(MemoryStore())


@pytest.mark.asyncio
async def test_a_marker_of_a_directory_is_none_of_the_objects(monkeypatch: pytest.MonkeyPatch) -> None:
    """S3's console makes ``2024/``, and obstore hands it on without the slash, where it would have come earlier."""
    entries = [("2024-01/x.jpg", 1), ("2024", 0), ("2024/y.jpg", 1), ("2024/z.jpg", 1)]
    backend = pages_of(monkeypatch, *entries)
    assert [info.key async for info in backend.list()] == ["2024-01/x.jpg", "2024/y.jpg", "2024/z.jpg"]
    assert [info.key async for info in backend.list(after="2024-01/x.jpg")] == ["2024/y.jpg", "2024/z.jpg"]
    # beside an object of the same name
    backend = pages_of(monkeypatch, ("2024", 0), ("2024", 0), ("2024/y.jpg", 1))
    assert [info.key async for info in backend.list()] == ["2024", "2024/y.jpg"]


@pytest.mark.parametrize(
    "entries",
    [
        [("2024/y.jpg", 1), ("2024-01/x.jpg", 1)],  # a walk through directories
        [("2024-01/x.jpg", 1), ("2024", 5)],  # an object with content is no marker
        [("b", 0), ("a", 0)],
        [("2024/y.jpg", 1), ("2024", 0)],  # a marker would have come before what it holds
    ],
)
@pytest.mark.asyncio
async def test_another_order_is_still_refused(monkeypatch: pytest.MonkeyPatch, entries: list[tuple[str, int]]) -> None:
    backend = pages_of(monkeypatch, *entries)
    with pytest.raises(ConfigurationError, match="flat_listings=False"):
        [info async for info in backend.list()]
