"""How single operations come together, and apart: `_coalescing`, without a server."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Sequence
from typing import Any

import pytest
import pytest_asyncio

from aproxy_storage.cleanup import Cleanup
from aproxy_storage.errors import BackendUnavailable, DeadlineExceeded, NotFound
from aproxy_storage.meta_backends import _coalescing
from aproxy_storage.meta_backends._coalescing import Coalescer

pytestmark = pytest.mark.asyncio


class Server:
    """Says who came alone and who together; `open` lets the statements be answered."""

    def __init__(self, seconds: float | None = 20.0) -> None:
        self.sent: list[Any] = []
        self.locked: set[Any] = set()
        self.waiting_for_a_lock = 0
        self.most_waiting = 0
        self.open = asyncio.Event()
        self.open.set()
        self.cleanup = Cleanup("test")
        self.coalescer = Coalescer(
            self.cleanup,
            seconds,
            apart=lambda error: isinstance(error, ValueError | BlockingIOError),
            held=lambda error: isinstance(error.__cause__ or error, BlockingIOError),
            places=lambda: 2,
            failed=lambda kind, item, error: NotFound(f"{kind} {item}: {error}"),
        )

    async def alone(self, item: Any) -> Any:
        self.sent.append(item)
        self.waiting_for_a_lock += 1
        self.most_waiting = max(self.most_waiting, self.waiting_for_a_lock)
        await asyncio.sleep(0.002)
        await self.open.wait()
        self.waiting_for_a_lock -= 1
        if item in self.locked:
            raise BlockingIOError("another transaction holds a row")
        if item == "evil":
            raise ValueError("evil")
        return item

    async def together(self, items: Sequence[Any]) -> Sequence[Any]:
        self.sent.append(list(items))
        await asyncio.sleep(0.002)
        await self.open.wait()
        if self.locked.intersection(items):
            raise BlockingIOError("another transaction holds a row")
        if "evil" in items:
            raise ValueError("one of them is evil")
        if "down" in items:
            raise OSError("down")
        return items

    def ask(self, item: Any, *, kind: str = "get", key: Any = None) -> asyncio.Task[Any]:
        return asyncio.ensure_future(self.coalescer.ask(kind, item, self.alone, self.together, key=key))


@pytest_asyncio.fixture
async def server() -> AsyncIterator[Server]:
    server = Server()
    yield server
    server.open.set()
    await server.cleanup.drain(within=5)


async def test_the_first_goes_alone_and_the_others_together(server: Server) -> None:
    assert await asyncio.gather(*(server.ask(number) for number in range(5))) == list(range(5))
    assert server.sent == [0, [1, 2, 3, 4]]
    # After company, all of them wait for each other, but not for longer than a turn of the loop.
    await asyncio.gather(*(server.ask(number) for number in range(3)))
    assert server.sent[2:] == [[0, 1, 2]]
    await server.ask("lone")
    await server.ask("lone again")
    assert server.sent[3:] == [["lone"], "lone again"]


async def test_kinds_do_not_mix_and_keys_do_not_meet(server: Server) -> None:
    asked = [server.ask(number, key=number % 2) for number in range(5)] + [server.ask("x", kind="delete")]
    await asyncio.gather(*asked)
    assert server.sent[:2] == [0, "x"]
    for together in server.sent[2:]:
        assert len({number % 2 for number in together}) == len(together)
    assert sorted(number for together in server.sent[2:] for number in together) == [1, 2, 3, 4]


async def test_one_evil_does_not_hurt_the_others(server: Server) -> None:
    asked = [server.ask(item) for item in ("first", "a", "evil", "b")]
    answers = await asyncio.gather(*asked, return_exceptions=True)
    assert [answers[0], answers[1], answers[3]] == ["first", "a", "b"]
    assert isinstance(answers[2], NotFound)
    assert str(answers[2]) == "get evil: evil"


async def test_held_rows_keep_only_their_own_waiting_and_few_connections(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_coalescing, "_PAUSE", 0.0)
    server.locked = set(range(10, 20))
    asked = [server.ask(number) for number in range(30)]
    free = [task for number, task in enumerate(asked) if number not in server.locked]
    async with asyncio.timeout(20):
        await asyncio.gather(*free)
        assert not any(asked[number].done() for number in server.locked)
        assert server.most_waiting == 2
        asked[10].cancel()  # nobody asks for it any more
        server.locked = {10}
        assert await asyncio.gather(*asked[11:20]) == list(range(11, 20))
    await server.cleanup.drain(within=5)


async def until_sent(server: Server, item: Any, times: int) -> None:
    async with asyncio.timeout(20):
        while server.sent.count(item) < times:  # noqa: ASYNC110
            await asyncio.sleep(0)


@pytest.mark.parametrize("company", [True, False])
async def test_who_comes_alone_waits_for_a_held_row_as_those_in_company(
    server: Server, monkeypatch: pytest.MonkeyPatch, company: bool
) -> None:
    monkeypatch.setattr(_coalescing, "_PAUSE", 0.0)
    server.locked = {"a", "b", "c"}
    if company:
        held = [server.ask(item, kind=item) for item in "abc"]
    else:
        held = [asyncio.ensure_future(server.coalescer.by_itself("get", item, server.alone)) for item in "abc"]
    for item in "abc":
        await until_sent(server, item, 2)
    server.most_waiting = server.waiting_for_a_lock
    for item in "abc":
        await until_sent(server, item, 4)
    assert server.most_waiting <= 2
    assert not server.coalescer._here.get().queues  # the next of each kind goes at once
    server.locked = {"b"}
    assert [await held[0], await held[2]] == ["a", "c"]
    held[1].cancel()
    await asyncio.wait(held)


async def test_an_answer_that_is_a_held_row_is_asked_for_again(server: Server) -> None:
    async def together(items: Sequence[Any]) -> Sequence[Any]:
        failure = BackendUnavailable("held")
        failure.__cause__ = BlockingIOError()
        return [failure if item == "held" else item for item in items]

    ask = [server.coalescer.ask("get", item, server.alone, together) for item in ("first", "held", "free")]
    assert await asyncio.gather(*ask) == ["first", "held", "free"]
    assert server.sent == ["first", "held"]


async def test_one_alone_in_a_statement_for_many_is_as_one_alone(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_coalescing, "_PAUSE", 0.0)
    for item in ("held", "evil"):
        server.locked = {"held"}
        server.sent.clear()
        asked = [server.ask("first", kind=item), server.ask(item, kind=item)]
        assert await asked[0] == "first"
        async with asyncio.timeout(20):
            while len(server.sent) < 3:  # noqa: ASYNC110
                await asyncio.sleep(0)
        assert server.sent[:2] == ["first", [item]]
        server.locked.clear()
        if item == "held":
            assert await asked[1] == item
        else:
            with pytest.raises(NotFound, match="evil: evil"):  # as `alone` has it
                await asked[1]


async def test_who_waited_for_a_held_row_in_vain_has_done_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_coalescing, "_PAUSE", 60.0)
    server = Server(seconds=0.1)
    server.locked = {1}
    asked = [server.ask(number) for number in range(3)]
    assert [await asked[0], await asked[2]] == [0, 2]
    with pytest.raises(DeadlineExceeded) as caught:
        await asked[1]
    assert not caught.value.outcome_unknown
    await server.cleanup.drain(within=5)


async def test_all_fail_with_what_concerns_all_each_with_an_error_of_its_own(server: Server) -> None:
    answers = await asyncio.gather(*(server.ask(item) for item in ("a", "down", "b")), return_exceptions=True)
    assert answers[0] == "a"
    assert [type(answer) for answer in answers[1:]] == [NotFound, NotFound]
    assert answers[1] is not answers[2]


async def test_who_gives_up_while_waiting_is_not_sent(server: Server) -> None:
    server.open.clear()
    asked = [server.ask(number) for number in range(4)]
    await asyncio.sleep(0)
    asked[2].cancel()
    server.open.set()
    await asyncio.gather(*asked, return_exceptions=True)
    assert server.sent == [0, [1, 3]]


async def test_the_deadline_counts_the_waiting() -> None:
    server = Server(seconds=0.3)
    server.open.clear()
    begun = asyncio.get_running_loop().time()
    asked = [server.ask("alone"), server.ask("sent")]
    await asyncio.sleep(0.1)  # two statements are under way, the others wait
    asked += [server.ask(number) for number in range(4)]
    answers = await asyncio.gather(*asked, return_exceptions=True)
    assert asyncio.get_running_loop().time() - begun < 20
    assert isinstance(answers[0], TimeoutError)
    assert all(isinstance(answer, DeadlineExceeded | NotFound) for answer in answers[1:]), answers
    server.open.set()
    await server.cleanup.drain(within=5)
    assert await server.ask("healed") == "healed"


async def test_what_has_run_out_of_time_is_not_sent() -> None:
    server = Server(seconds=0.2)
    server.open.clear()
    asked = [server.ask("alone"), server.ask("together")]
    await asyncio.sleep(0.01)
    asked.append(server.ask("late"))
    await asyncio.sleep(0)
    time.sleep(0.25)  # a loop that is kept busy
    with pytest.raises(DeadlineExceeded) as caught:
        await asked[2]
    assert not caught.value.outcome_unknown
    assert server.sent == ["alone", ["together"]]
    await asyncio.gather(*asked, return_exceptions=True)
    server.open.set()
    await server.cleanup.drain(within=5)


async def test_what_is_answered_is_let_go_of_beside_one_that_waits(server: Server) -> None:
    stuck = asyncio.Event()

    async def together(items: Sequence[Any]) -> Sequence[Any]:
        await stuck.wait()
        return items

    waiting = [
        asyncio.ensure_future(server.coalescer.ask("stuck", number, server.alone, together)) for number in range(3)
    ]
    for _ in range(20):
        await asyncio.gather(*(server.ask(number) for number in range(50)))
    await asyncio.sleep(3 * _coalescing._TICK)
    assert len(server.coalescer._here.get().watched) == 2  # the first of three went alone
    stuck.set()
    await asyncio.gather(*waiting)


async def test_too_many_are_told_at_once(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_coalescing, "_MAX_WAITING", 3)
    server.open.clear()
    asked = [server.ask(number) for number in range(6)]
    await asyncio.wait({asked[5]}, timeout=5)
    assert isinstance(asked[5].exception(), BackendUnavailable)
    server.open.set()
    answers = await asyncio.gather(*asked, return_exceptions=True)
    assert answers[:4] == [0, 1, 2, 3]


async def test_closing_does_not_wait_for_ever() -> None:
    server = Server(seconds=None)
    server.open.clear()
    asked = [server.ask(number) for number in range(3)]
    await asyncio.sleep(0.01)
    await server.cleanup.drain(within=0.05)
    for task in asked[1:]:
        with pytest.raises(BackendUnavailable) as caught:
            await task
        assert caught.value.outcome_unknown
    server.open.set()
    assert await asked[0] == 0
