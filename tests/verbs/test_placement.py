"""First, Route, and the seam for placements that try several originals."""

from collections.abc import AsyncIterator, Sequence
from typing import ClassVar

import pytest

from aproxy_storage import (
    BackendUnavailable,
    ConfigurationError,
    ContentError,
    Placement,
    ProxyStorage,
    Request,
    Route,
    StorageError,
)
from aproxy_storage.backends.memory import MemoryBackend
from tests.verbs.conftest import Make, content_of, keys_of

pytestmark = pytest.mark.asyncio


async def test_route_by_name_and_content(make: Make) -> None:
    def by_suffix(request: Request) -> str | None:
        return "b" if request.name.endswith(".jpg") else None

    async def by_content(request: Request) -> str | None:
        return "b" if (await request.source.peek(2)) == b"\xff\xd8" else "a"

    for placement, jpg, txt in ((Route(by_suffix), "b", "a"), (Route(by_content), "b", "a")):
        storage = make(placement=placement)
        assert (await storage.get(await storage.save("x.jpg", b"\xff\xd8"))).original_storage_name == jpg
        assert (await storage.get(await storage.save("x.txt", b"text"))).original_storage_name == txt
        assert (await storage.get(await storage.save("x.jpg", b"", using="a"))).original_storage_name == "a"


async def test_a_route_into_the_void_writes_nothing(make: Make) -> None:
    storage = make(placement=Route(lambda request: "nowhere"))
    with pytest.raises(ConfigurationError, match="nowhere"):
        await storage.save("x", b"")
    assert await storage.meta.count() == 0


class Both(Placement):
    tries_several: ClassVar[bool] = True

    async def candidates(self, request: Request, originals: Sequence[str]) -> Sequence[str]:
        return originals

    def falls_back(self, error: StorageError) -> bool:
        return isinstance(error, BackendUnavailable)


class Down(MemoryBackend):
    async def _write(self, key, source, **kwargs):  # type: ignore[no-untyped-def]
        async for _ in source.chunks():
            raise BackendUnavailable("down")
        raise BackendUnavailable("down")


async def test_candidates_are_tried_in_order_with_the_whole_content(make: Make) -> None:
    down, up = Down(), MemoryBackend()
    storage = make(originals={"a": down, "b": up}, placement=Both())

    async def once() -> AsyncIterator[bytes]:
        for _ in range(40):
            yield b"x" * 70_000

    for name, content in (("bytes", b"abc"), ("stream", once())):
        record = await storage.get(await storage.save(name, content))
        assert record.original_storage_name == "b"
        assert record.places == ()
        assert record.lease is None
    assert await content_of(storage, "stream") == b"x" * 2_800_000
    with pytest.raises(BackendUnavailable):
        await storage.save("y", b"", using="a")


async def test_the_last_error_is_raised_with_the_earlier_ones(make: Make) -> None:
    storage = make(originals={"a": Down(), "b": Down()}, placement=Both())
    with pytest.raises(BackendUnavailable) as caught:
        await storage.save("x", b"")
    assert len(caught.value.attempts) == 1
    assert any("tried before" in note for note in caught.value.__notes__)
    assert await storage.meta.count() == 0


async def test_errors_of_the_content_do_not_fall_back(make: Make) -> None:
    storage: ProxyStorage = make(placement=Both())
    with pytest.raises(ContentError):
        await storage.save("x", iter([b"abc"]), size=2)
    assert await storage.meta.count() == 0
    assert await keys_of(storage.get_original("b")) == []
