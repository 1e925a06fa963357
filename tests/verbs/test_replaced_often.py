"""A file that is replaced again and again: old bytes go when each is due, not when replacing comes to rest."""

from collections.abc import AsyncIterator
from typing import Any

import pytest

from aproxy_storage import BackendUnavailable, ContentError, ProxyStorage
from aproxy_storage.backends.memory import MemoryBackend
from aproxy_storage.meta_backends.memory import MemoryMetaBackend
from aproxy_storage.testing.faults import Fail, FaultyBackend, Plan, at
from tests.verbs.test_transactions import keys, read

pytestmark = pytest.mark.asyncio


class Clock:
    now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


async def test_old_bytes_go_while_replacing_goes_on(clock: Clock) -> None:
    storage = ProxyStorage("media", originals=MemoryBackend(), meta=MemoryMetaBackend(clock=clock), keep_replaced=60.0)
    await storage.save("a.txt", b"0")
    for number in range(40):
        clock.now += 25
        await storage.tidy()
        await storage.replace("a.txt", b"%d" % number)
        record = await storage.get("a.txt")
        assert len(record.places) <= 4
        assert len(await keys(storage)) == len(record.places) + 1
    assert await read(storage, "a.txt") == b"39"
    clock.now += 61
    await storage.tidy()
    record = await storage.get("a.txt")
    assert (record.places, record.lease) == ((), None)
    await storage.aclose()


async def test_what_has_gathered_goes_at_once(clock: Clock) -> None:
    storage = ProxyStorage("media", originals=MemoryBackend(), meta=MemoryMetaBackend(clock=clock), keep_replaced=60.0)
    await storage.save("a.txt", b"0")
    for number in range(100):
        clock.now += 5
        await storage.replace("a.txt", b"%d" % number)
    clock.now += 32
    assert await storage.tidy() == 1
    assert len((await storage.get("a.txt")).places) == 6  # of the last 28 seconds
    await storage.aclose()


async def test_each_is_kept_until_it_is_due(clock: Clock) -> None:
    storage = ProxyStorage("media", originals=MemoryBackend(), meta=MemoryMetaBackend(clock=clock), keep_replaced=60.0)
    await storage.save("a.txt", b"first")
    first = await storage.open("a.txt")
    await storage.replace("a.txt", b"second")
    clock.now += 50
    second = await storage.open("a.txt")
    await storage.replace("a.txt", b"third")
    clock.now += 20  # the first is due, the second is not
    assert await storage.tidy() == 1
    assert await second.read() == b"second"
    assert len(await keys(storage)) == 2
    clock.now += 30
    assert await storage.tidy() == 0
    clock.now += 20
    assert await storage.tidy() == 1
    assert len(await keys(storage)) == 1
    for file in (first, second):
        await file.aclose()
    await storage.aclose()


async def test_a_place_whose_removal_is_without_an_answer_is_not_forgotten_by_the_next_replacement(
    clock: Clock,
) -> None:
    lost = BackendUnavailable("no answer", outcome_unknown=True)
    backend = FaultyBackend(MemoryBackend(), Plan(discard=at(1, Fail(lost))))
    storage = ProxyStorage("media", originals=backend, meta=MemoryMetaBackend(clock=clock), keep_replaced=0)
    await storage.save("a.txt", b"1")
    await storage.replace("a.txt", b"2")  # at `a.txt` a removal may still be under way
    clock.now += 100
    await storage.replace("a.txt", b"3")
    record = await storage.get("a.txt")
    assert [place.key for place in record.places] == ["a.txt"]
    await storage.rename("a.txt", "b.txt")
    again = await storage.get(await storage.save("a.txt", b"4"))
    assert again.original_storage_path != "a.txt"
    clock.now += 700  # 900 seconds, `settle`, since the first replacement are not over yet
    assert await storage.tidy() == 0
    clock.now += 200
    assert await storage.tidy() == 1
    assert (await storage.get("b.txt")).places == ()
    await storage.aclose()


async def test_a_replacement_does_not_end_the_time_of_who_is_at_the_removal(clock: Clock) -> None:
    storage = ProxyStorage("media", originals=MemoryBackend(), meta=MemoryMetaBackend(clock=clock), keep_replaced=60.0)
    await storage.save("a.txt", b"1")
    record = await storage.replace("a.txt", b"2")
    clock.now += 61
    backend = storage.get_original()
    discard = backend.discard

    async def replaced_meanwhile(key: str, **options: object) -> None:
        if not replaced:
            replaced.append(await storage.replace("a.txt", b"3"))
        await discard(key, **options)  # type: ignore[arg-type]

    replaced: list[object] = []
    backend.discard = replaced_meanwhile  # type: ignore[method-assign]
    assert await storage.journal.finish(record) == "moved on"
    del backend.discard
    clock.now += 100  # the second one is due; at the first a removal may be under way for `settle` seconds
    assert await storage.tidy() == 1
    assert [place.key for place in (await storage.get("a.txt")).places] == ["a.txt"]
    clock.now += 900
    assert await storage.tidy() == 1
    assert (await storage.get("a.txt")).places == ()
    await storage.aclose()


async def test_what_was_given_up_is_forgotten_whatever_others_do_meanwhile(clock: Clock) -> None:
    class Original(MemoryBackend):
        async def discard(self, key: str, **options: Any) -> bool:
            gone = await super().discard(key, **options)
            if not others:
                others.append(await storage.replace("a.txt", b"theirs"))  # between the discard and what notes it
            return gone

    others: list[Any] = []
    storage = ProxyStorage("media", originals=Original(), meta=MemoryMetaBackend(clock=clock), keep_replaced=60.0)
    await storage.save("a.txt", b"first")

    async def broken() -> AsyncIterator[bytes]:
        yield b"ours"
        raise OSError("the content breaks off")

    with pytest.raises(ContentError):
        await storage.replace("a.txt", broken())
    assert [place.state for place in (await storage.get("a.txt")).places] == ["surplus"]
    assert await read(storage, "a.txt") == b"theirs"
    assert len(await keys(storage)) == 2
    await storage.aclose()
