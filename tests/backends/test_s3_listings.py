"""Listings of buckets in which others have a hand: folders made in a console, uploads of other processes."""

from typing import Any

import pytest

from aproxy_storage.backends.s3 import S3Backend

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
