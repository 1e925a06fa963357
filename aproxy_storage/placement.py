"""Which originals a file may go to, in which order. Pure decisions: no I/O, no clock."""

from __future__ import annotations

import inspect
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

from .content import Source
from .errors import ConfigurationError, StorageError

__all__ = ["First", "Placement", "Request", "Route"]


@dataclass(frozen=True, slots=True)
class Request:
    """What a placement may look at: the name as given by the caller, the content, and the caller's `extra`."""

    name: str
    source: Source
    content_type: str | None = None
    extra: Mapping[str, Any] = field(default_factory=dict)


class Placement:
    """Decides for each save. The base class takes the first original only.

    `tries_several`: `candidates` may name more than one, so content that can be read only once is spooled.
    """

    tries_several: ClassVar[bool] = False

    async def candidates(self, request: Request, originals: Sequence[str]) -> Sequence[str]:
        """Return the names of the originals to try, in order; all are named in the record before the first byte."""
        return originals[:1]

    def falls_back(self, error: StorageError) -> bool:
        """Return whether the next candidate is tried after `error` of an attempt."""
        return False


class First(Placement):
    """Every file goes to the first original."""


class Route(Placement):
    """Send each file to the original that `choose` names.

    Args:
        choose: called with the `Request`; returns the name of an original, None for the first. May be async.

    An unknown name raises ConfigurationError before anything is written.
    """

    def __init__(self, choose: Callable[[Request], str | Awaitable[str | None] | None]) -> None:
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
