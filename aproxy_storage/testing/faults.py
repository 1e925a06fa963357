"""Originals and meta-backends that are slow, hang, fail, lie or kill the process, on command.

::

    plan = Plan(write=Fail(BackendUnavailable("out of order")), stat=[None, Slow(0.1), Lie()])
    storage = ProxyStorage("x", originals=FaultyBackend(backend, plan), meta=FaultyMetaBackend(meta, plan))
    ...
    assert plan.calls["write"] == 1

A plan gives each operation one fault for every call, or a list with one for each call in turn (None, and what comes
after the end of the list: no fault). The wrapper keeps the deadlines of its own `timeouts`, as every backend has to:
it is the service behind it that misbehaves.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from typing import Any, TypeVar

from ..backends.base import Backend, Reader
from ..content import Source
from ..errors import DeadlineExceeded, StorageError
from ..meta_backends.base import MetaBackend
from ..records import ByteRange, Capabilities, ObjectInfo
from ..timeouts import Timeouts

__all__ = ["Crash", "Fail", "Fault", "FaultyBackend", "FaultyMetaBackend", "Hang", "Late", "Lie", "Plan", "Slow", "at"]

T = TypeVar("T")

Call = Callable[[], Awaitable[T]]


class Fault:
    """What happens to one call. This one: nothing."""

    async def __call__(self, call: Call[T]) -> T:
        return await call()


class Slow(Fault):
    """The service takes `seconds` before it acts."""

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds

    async def __call__(self, call: Call[T]) -> T:
        await asyncio.sleep(self.seconds)
        return await call()


class Hang(Fault):
    """The service does nothing until `release` is called, perhaps never; `reached` is set when somebody waits."""

    def __init__(self) -> None:
        self.reached = asyncio.Event()
        self._released = asyncio.Event()

    def release(self) -> None:
        self._released.set()

    async def __call__(self, call: Call[T]) -> T:
        self.reached.set()
        await self._released.wait()
        return await call()


class Fail(Fault):
    """The service does nothing but raise `error`: a StorageError, or a native one for the wrapped backend to map."""

    def __init__(self, error: Exception | type[Exception]) -> None:
        self.error = error

    async def __call__(self, call: Call[T]) -> T:
        raise self.error if isinstance(self.error, type) else _fresh(self.error)


class Lie(Fault):
    """The service does its work, but the answer is lost: the caller gets an error whose outcome is unknown."""

    def __init__(self, error: Exception | None = None) -> None:
        self.error = error or DeadlineExceeded("the answer was lost", outcome_unknown=True)

    async def __call__(self, call: Call[T]) -> T:
        await call()
        raise _fresh(self.error)


class Late(Fault):
    """The caller gets its error at once; the service acts when `land` is called, or never.

    A write has taken its content first, as into the buffers of a network.
    """

    def __init__(self, error: Exception | None = None) -> None:
        self.error = error or DeadlineExceeded("no answer in time", outcome_unknown=True)
        self._calls: list[Call[Any]] = []

    async def __call__(self, call: Call[T]) -> T:
        self._calls.append(call)
        raise _fresh(self.error)

    async def land(self) -> list[Any]:
        """Let everything that is on its way take effect; return the results and errors, oldest first."""
        calls, self._calls = self._calls, []
        results: list[Any] = []
        for call in calls:
            try:
                results.append(await call())
            except StorageError as error:
                results.append(error)
        return results


class Crash(Fault):
    """The process is killed, as by the kernel: before the operation takes effect, or right `after`."""

    def __init__(self, *, after: bool = False) -> None:
        self.after = after

    async def __call__(self, call: Call[T]) -> T:
        if self.after:
            await call()
        os.kill(os.getpid(), signal.SIGKILL)
        raise AssertionError("unreachable: killed")


def at(number: int, fault: Fault) -> list[Fault | None]:
    """Return the list that gives `fault` to the call with that number, counted from 1."""
    return [*[None] * (number - 1), fault]


class Plan:
    """Which fault meets which call; may be changed at any time. Counts the calls by operation.

    Operations are the public methods by name; ``"chunk"``: each chunk of a read; ``"item"``: each item of a listing.
    """

    def __init__(self, **faults: Fault | Sequence[Fault | None] | None) -> None:
        self.faults: dict[str, Fault | Sequence[Fault | None] | None] = dict(faults)
        self.calls: Counter[str] = Counter()
        self.log: list[tuple[str, str | None]] = []

    def set(self, **faults: Fault | Sequence[Fault | None] | None) -> None:
        """Change the faults of some operations; lists begin with the next call."""
        for operation, fault in faults.items():
            self.calls[operation] = 0
            self.faults[operation] = fault

    def next(self, operation: str, key: str | None = None) -> Fault:
        """Count one call and return its fault."""
        number = self.calls[operation]
        self.calls[operation] += 1
        self.log.append((operation, key))
        fault = self.faults.get(operation)
        if fault is None or isinstance(fault, Fault):
            return fault or Fault()
        return (fault[number] if number < len(fault) else None) or Fault()


class FaultyBackend(Backend):
    """`inner` with the faults of `plan`. `aclose` closes both."""

    def __init__(self, inner: Backend, plan: Plan | None = None, *, timeouts: Timeouts | None = None) -> None:
        self.inner = inner
        self.plan = plan or Plan()
        super().__init__(timeouts=timeouts or inner.timeouts)

    def __str__(self) -> str:
        return str(self.inner)

    @property
    def capabilities(self) -> Capabilities:  # type: ignore[override]
        return self.inner.capabilities

    def check_key(self, key: str) -> None:
        self.inner.check_key(key)

    def full_path(self, key: str) -> str:
        return self.inner.full_path(key)

    def _map_error(self, error: Exception, what: str) -> StorageError:
        return self.inner._map_error(error, what)

    async def _write(self, key: str, source: Source, **options: Any) -> ObjectInfo:
        fault = self.plan.next("write", key)
        if not isinstance(fault, Late):
            return await fault(lambda: self.inner.write(key, source, **options))
        async with contextlib.aclosing(source.chunks()) as chunks:
            data = b"".join([chunk async for chunk in chunks])
        return await fault(lambda: self.inner.write(key, data, **options))

    async def _read(self, key: str, byte_range: ByteRange | None, chunk_bytes: int) -> Reader:
        reading = self.inner.read(key, byte_range=byte_range, chunk_bytes=chunk_bytes)
        try:
            await self.plan.next("read", key)(reading.__aenter__)
        except BaseException:
            await reading.__aexit__(None, None, None)  # a lie has opened it nevertheless
            raise

        async def chunks() -> AsyncIterator[bytes]:
            try:
                while chunk := await self.plan.next("chunk", key)(lambda: anext(reading, b"")):
                    yield chunk
            finally:
                await reading.__aexit__(None, None, None)

        return _FaultyReader(reading.info, chunks(), reading)

    async def _stat(self, key: str) -> ObjectInfo:
        return await self.plan.next("stat", key)(lambda: self.inner.stat(key))

    async def _is_taken(self, key: str) -> bool:
        return await self.plan.next("is_taken", key)(lambda: self.inner.is_taken(key))

    async def _discard(self, key: str, *, token: str | None) -> None:
        await self.plan.next("discard", key)(lambda: self.inner.discard(key, token=token))

    async def _sync_discard(self, key: str) -> None:
        await self.inner._sync_discard(key)

    async def _list(self, prefix: str, *, after: str | None, delimiter: str | None) -> AsyncIterator[ObjectInfo]:
        async for info in self.inner.list(prefix, after=after, delimiter=delimiter):
            yield await self.plan.next("item", info.key)(lambda info=info: _value(info))  # type: ignore[misc]

    async def _copy(self, key: str, new_key: str, *, token: str | None, durable: bool) -> ObjectInfo:
        fault = self.plan.next("copy", key)
        return await fault(lambda: self.inner.copy(key, new_key, token=token, durable=durable))

    async def _url(self, key: str, *, expires_in: float | None, **options: Any) -> str:
        return await self.plan.next("url", key)(lambda: self.inner.url(key, expires_in=expires_in, **options))

    async def _aclose(self) -> None:
        await self.inner.aclose()


class _FaultyReader(Reader):
    """Closes what it reads from, even if its first chunk was never asked for."""

    def __init__(self, info: ObjectInfo, chunks: AsyncIterator[bytes], reading: Any) -> None:
        super().__init__(info, chunks)
        self._reading = reading

    async def aclose(self) -> None:
        await super().aclose()
        await self._reading.__aexit__(None, None, None)


def _delegated(operation: str) -> Any:
    async def method(self: FaultyMetaBackend, *args: Any, **options: Any) -> Any:
        key = args[0] if args and isinstance(args[0], str) else getattr(args[0], "path", None) if args else None
        self.inner.durable = self.durable
        fault = self.plan.next(operation, key)
        try:
            async with asyncio.timeout(self.timeouts.operation):
                return await fault(lambda: getattr(self.inner, operation)(*args, **options))
        except StorageError as error:
            error.located(operation=operation, path=key, backend=str(self))
            raise
        except (TypeError, ValueError):  # a wrong argument, not a fault of the service
            raise
        except Exception as error:
            mapped = self._map_error(error, f"{operation} in {self}")
            raise mapped.located(operation=operation, path=key, backend=str(self)) from error

    method.__name__ = operation
    return method


class FaultyMetaBackend(MetaBackend):
    """`inner` with the faults of `plan`. `aclose` closes both."""

    def __init__(self, inner: MetaBackend, plan: Plan | None = None, *, timeouts: Timeouts | None = None) -> None:
        self.inner = inner
        self.plan = plan or Plan()
        super().__init__(timeouts=timeouts or inner.timeouts)

    def __str__(self) -> str:
        return str(self.inner)

    create = _delegated("create")
    reserve = _delegated("reserve")
    get = _delegated("get")
    exists = _delegated("exists")
    update = _delegated("update")
    delete = _delegated("delete")
    create_many = _delegated("create_many")
    get_many = _delegated("get_many")
    update_many = _delegated("update_many")
    delete_many = _delegated("delete_many")
    list_unfinished = _delegated("list_unfinished")
    owners = _delegated("owners")
    count = _delegated("count")
    after_commit = _delegated("after_commit")
    setup = _delegated("setup")

    async def list(self, *args: Any, **options: Any) -> AsyncIterator[Any]:
        async for item in self.inner.list(*args, **options):
            call = self.plan.next("item", item.path)(lambda item=item: _value(item))  # type: ignore[misc]
            yield await self._call("list", item.path, call)

    def _map_error(self, error: Exception, what: str) -> StorageError:
        return self.inner._map_error(error, what)

    async def _aclose(self) -> None:
        await self.inner.aclose()

    # The hooks are never reached: every public method goes to that of `inner`.
    async def _never(self, *args: Any, **options: Any) -> Any:
        raise AssertionError("unreachable: the wrapper delegates public methods")

    _create = _get = _exists = _update = _delete = _page = _list_unfinished = _owners = _count = _never


async def _value(value: T) -> T:
    return value


def _fresh(error: Exception) -> Exception:
    """Return a new exception like `error`: one that is raised twice would gather the traces of both."""
    if isinstance(error, StorageError):
        function, args, state = error.__reduce__()
        copy: StorageError = function(*args)
        copy.__dict__.update(state)
        return copy
    return type(error)(*error.args)
