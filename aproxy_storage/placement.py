"""Which originals a file may go to, in which order. Pure decisions: no I/O, no clock.

`First` and `Route` are here, `Fallback` and `Original` in `fallback`, `Replicate` in `replicate`. What they decide is
carried out by `attempts` and `replication`.
"""

from __future__ import annotations

import inspect
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Any, ClassVar

from .breaker import Breaker
from .content import Source
from .errors import ConfigurationError, StorageError
from .sniffing import guess_content_type
from .timeouts import is_number, is_whole

__all__ = [
    "Choose",
    "First",
    "Limits",
    "Placement",
    "Request",
    "Route",
    "as_order",
    "by_content_type",
    "by_suffix",
    "in_order",
    "route_by",
]


@dataclass(frozen=True, slots=True)
class Request:
    """What a placement may look at: the name as given by the caller, the content, and the caller's `extra`."""

    name: str
    source: Source
    content_type: str | None = None
    extra: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """How the attempts of a placement are made; see `Fallback` and `Replicate` for each of them."""

    attempt_timeout: float | None = None
    source_timeout: float | None = None
    deadline: float | None = None
    hedge_after: float | None = None
    hedge_max_bytes: int = 1 << 20
    breaker: Breaker | None = None
    spool_bytes: int | None = 1 << 20
    copies: int = 1
    quorum: int = 1

    def __post_init__(self) -> None:
        for name in ("attempt_timeout", "source_timeout", "deadline", "hedge_after"):
            seconds = getattr(self, name)
            if seconds is not None and not (is_number(seconds) and seconds > 0):
                raise ConfigurationError(f"{name}={seconds!r}: seconds, more than 0, or None for no limit")
        for name in ("hedge_max_bytes", "spool_bytes", "copies", "quorum"):
            count = getattr(self, name)
            if not (is_whole(count) or (count is None and name == "spool_bytes")):
                raise ConfigurationError(f"{name}={count!r}: a whole number")
        if self.breaker is not None and not isinstance(self.breaker, Breaker):
            raise ConfigurationError(f"breaker={self.breaker!r}: a Breaker, or None for none")
        if self.hedge_max_bytes < 0 or (self.spool_bytes or 0) < 0:
            raise ConfigurationError("hedge_max_bytes and spool_bytes must not be negative")
        if not 1 <= self.quorum <= self.copies:
            raise ConfigurationError(f"copies={self.copies}, quorum={self.quorum}: wanted is 1 <= quorum <= copies")


class Placement:
    """Decides for each save. The base class takes the first original only.

    `tries_several`: `candidates` may name more than one, so content that can be read only once is spooled.
    `limits`: how long attempts may take, and what is done about those that take longer.
    """

    tries_several: ClassVar[bool] = False
    limits: Limits = Limits()

    async def candidates(self, request: Request, originals: Sequence[str]) -> Sequence[str]:
        """Return the names of the originals to try, in order; all are named in the record before the first byte."""
        return originals[:1]

    def falls_back(self, error: StorageError) -> bool:
        """Return whether the next candidate is tried after `error` of an attempt.

        Not asked of what is nobody's outage: the name, the content, conflicts, the meta-backend, a cancellation.
        """
        return False

    def read_order(self, originals: Sequence[str]) -> Sequence[str]:
        """Return the order in which a file with copies in `originals` is looked for."""
        return originals

    def _check(self, originals: Sequence[str]) -> None:
        """Raise ConfigurationError if it can be seen by now that this is no placement for `originals`."""


class First(Placement):
    """Every file goes to the first original."""


Choose = Callable[[Request], str | Awaitable[str | None] | None]


class Route(Placement):
    """Send each file to the original that `choose` names.

    Args:
        choose: called with the `Request`; returns the name of an original, None for the first. May be async. It
            sees the name, the content type, ``source.size`` and the caller's ``extra``, and may look into the content
            with ``await request.source.peek(n)``. `by_suffix` and `by_content_type` make ready ones.

    An unknown name raises ConfigurationError before anything is written; a storage is not made with one in the
    tables of `by_suffix` and `by_content_type`.
    """

    def __init__(self, choose: Choose) -> None:
        self._choose = choose

    async def candidates(self, request: Request, originals: Sequence[str]) -> Sequence[str]:
        answer = self._choose(request)
        name = await answer if inspect.isawaitable(answer) else answer
        if name is None:
            return originals[:1]
        if name not in originals:
            raise ConfigurationError(
                f"the route of {request.name!r} leads to {name!r}, which is none of the originals {list(originals)}"
            )
        return (name,)

    def _check(self, originals: Sequence[str]) -> None:
        if unknown := [name for name in getattr(self._choose, _LEADS_TO, ()) if name not in originals]:
            raise ConfigurationError(f"the route leads to {unknown}, and the originals are {list(originals)}")


_LEADS_TO = "_leads_to"  # where a ready function of `Route` says which originals it may name


def _leading_to(choose: Choose, originals: Mapping[str, str], default: str | None) -> Choose:
    setattr(choose, _LEADS_TO, dict.fromkeys([*originals.values(), *([] if default is None else [default])]))
    return choose


def by_suffix(originals: Mapping[str, str], default: str | None = None) -> Choose:
    """Return a `Route` function by the end of the name: ``by_suffix({".jpg": "s3", ".tar.gz": "tape"})``.

    Of several that fit the longest wins; case does not matter. What fits none goes to `default` (None: the first).
    """
    suffixes = sorted(((suffix.casefold(), name) for suffix, name in originals.items()), key=lambda pair: -len(pair[0]))

    def choose(request: Request) -> str | None:
        wanted = request.name.casefold()
        return next((name for suffix, name in suffixes if wanted.endswith(suffix)), default)

    return _leading_to(choose, originals, default)


def by_content_type(originals: Mapping[str, str], default: str | None = None) -> Choose:
    """Return a `Route` function by the content type: ``by_content_type({"image/*": "s3", "text/plain": "fs"})``.

    The type is the caller's, else guessed from the name and the first bytes, as the one in the record is. The first
    pattern that fits wins. What fits none goes to `default` (None: the first).
    """

    async def choose(request: Request) -> str | None:
        kind = request.content_type
        if kind is None:
            kind = guess_content_type(request.name, await request.source.peek(), request.source.content_type)
        essence = (kind or "").partition(";")[0].strip().lower()
        return next((name for pattern, name in originals.items() if fnmatchcase(essence, pattern.lower())), default)

    return _leading_to(choose, originals, default)


def route_by(
    *,
    suffixes: Mapping[str, str] | None = None,
    content_types: Mapping[str, str] | None = None,
    default: str | None = None,
) -> Route:
    """Return the `Route` that a configuration file can express: by suffix, then by content type, then `default`."""
    for name, table in (("suffixes", suffixes), ("content_types", content_types)):
        if not isinstance(table or {}, Mapping):
            raise ConfigurationError(f"{name}={table!r}: a table from each to the name of an original")
    first = by_suffix(suffixes or {})
    second = by_content_type(content_types or {}, default)

    async def choose(request: Request) -> str | None:
        found = first(request) if suffixes else None
        if found is None:
            found = second(request) if content_types else default
        return await found if inspect.isawaitable(found) else found

    every = {**(suffixes or {}), **(content_types or {})}  # no suffix is a content type
    return Route(_leading_to(choose, every, default))


def as_order(order: Sequence[str] | None) -> tuple[str, ...] | None:
    """Return the wished `order` of originals, as a placement keeps it.

    Raises:
        ConfigurationError: it names one twice, where a second attempt or a second copy would be no other one.
    """
    if order is None:
        return None
    given: Any = order
    if isinstance(given, str) or not (isinstance(given, Sequence) and all(isinstance(name, str) for name in given)):
        raise ConfigurationError(f"order={order!r}: the names of originals, one after the other")
    if twice := sorted({name for name in order if order.count(name) > 1}):
        raise ConfigurationError(f"order={list(order)} names {twice} more than once")
    return tuple(order)


def in_order(order: Sequence[str] | None, originals: Sequence[str]) -> Sequence[str]:
    """Return `originals` in the wished `order`; None: as they are.

    Raises:
        ConfigurationError: `order` names one that is not there.
    """
    if order is None:
        return originals
    if unknown := [name for name in order if name not in originals]:
        raise ConfigurationError(f"order names {unknown}, and the originals are {list(originals)}")
    return order
