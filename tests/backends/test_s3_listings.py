"""Listings of buckets in which others have a hand: folders made in a console, uploads of other processes."""

from typing import Any

import pytest

from aproxy_storage.backends.s3 import S3Backend
from aproxy_storage.errors import BackendUnavailable

pytestmark = pytest.mark.asyncio


class Bucket:
    """A client of a bucket that lists as S3 does."""

    def __init__(self, sizes: dict[str, int]) -> None:
        self.sizes = sizes

    async def list_objects_v2(self, *, Prefix: str, Delimiter: str = "", StartAfter: str = "", **_: Any) -> Any:  # noqa: N803
        files, groups = [], set()
        for key in sorted(self.sizes):
            if not key.startswith(Prefix) or key <= StartAfter:
                continue
            rest = key.removeprefix(Prefix)
            if Delimiter and Delimiter in rest:
                groups.add(Prefix + rest.partition(Delimiter)[0] + Delimiter)
            else:
                files.append({"Key": key, "Size": self.sizes[key]})
        return {"Contents": files, "CommonPrefixes": [{"Prefix": group} for group in sorted(groups)]}


@pytest.mark.parametrize("flat", [True, False])
@pytest.mark.parametrize("prefix", ["media", ""])
async def test_folders_made_in_a_console_are_no_files(prefix: str, flat: bool) -> None:
    """They are empty objects whose key ends in a slash, that of the prefix among them: no file can be named so."""
    base = f"{prefix}/" if prefix else ""
    sizes = {"a": 1, "sub/": 0, "sub/b": 2, "sub/empty/": 0, "z": 3}
    if prefix:
        sizes[""] = 0
    client = Bucket({base + key: size for key, size in sizes.items()})
    backend = S3Backend("bucket", prefix=prefix, client=client, flat_listings=flat)
    assert [info.key async for info in backend.list()] == ["a", "sub/b", "z"]
    assert [info.key async for info in backend.list("sub/")] == ["sub/b"]
    assert [info.key async for info in backend.list(after="a")] == ["sub/b", "z"]
    top = [(info.key, info.is_prefix) async for info in backend.list(delimiter="/")]
    assert top == [("a", False), ("sub/", True), ("z", False)]
    below = [(info.key, info.is_prefix) async for info in backend.list("sub/", delimiter="/")]
    assert below == [("sub/b", False), ("sub/empty/", True)]


class Pages:
    """A client that answers with these pages, the token of each being its number; the last one for ever."""

    def __init__(self, *pages: dict[str, Any]) -> None:
        self.pages = pages
        self.asked: list[dict[str, Any]] = []

    async def list_objects_v2(self, **params: Any) -> Any:
        self.asked.append(params)
        assert len(self.asked) < 20, "it does not end"
        return self.pages[min(int(params.get("ContinuationToken", 0)), len(self.pages) - 1)]

    async def list_multipart_uploads(self, **params: Any) -> Any:
        return await self.list_objects_v2(**params)


def page(*keys: str, following: str | None = None, **more: Any) -> dict[str, Any]:
    token = {} if following is None else {"NextContinuationToken": following}
    return {"Contents": [{"Key": key, "Size": 1} for key in keys], **token, "IsTruncated": bool(token), **more}


@pytest.mark.parametrize("flat", [True, False])
async def test_an_empty_page_is_not_the_end(flat: bool) -> None:
    client = Pages(page(following="1"), page(following="2"), page("a", "b"))
    backend = S3Backend("bucket", client=client, flat_listings=flat)
    assert [info.key async for info in backend.list()] == ["a", "b"]


@pytest.mark.parametrize("flat", [True, False])
@pytest.mark.parametrize("last", [page(IsTruncated=True), page(following="1")], ids=["no token", "the same token"])
async def test_a_listing_that_does_not_go_on_is_not_whole(flat: bool, last: dict[str, Any]) -> None:
    backend = S3Backend("bucket", client=Pages(page(following="1"), last), flat_listings=flat)
    with pytest.raises(BackendUnavailable, match="there is more"):
        async for _ in backend.list():
            pass


@pytest.mark.parametrize("marker", [{}, {"NextKeyMarker": "key"}, {"NextKeyMarker": "key", "NextUploadIdMarker": "1"}])
async def test_uploads_that_do_not_go_on_are_not_all(marker: dict[str, str]) -> None:
    backend = S3Backend("bucket", client=Pages({"IsTruncated": True, **marker}))
    with pytest.raises(BackendUnavailable, match="there is more"):
        await backend.discard("key", token="anyTokenAtAll")
