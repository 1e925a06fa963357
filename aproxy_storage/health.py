"""Whether the originals and the meta-backend of a storage answer."""

from __future__ import annotations

from collections.abc import Awaitable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from .backends.base import Backend
from .errors import NotFound, StorageError
from .meta_backends.base import MetaBackend
from .paths import new_token

__all__ = ["Health", "check_health"]


@dataclass(frozen=True, slots=True)
class Health:
    """The answer of one original or meta-backend to a small question."""

    name: str
    error: StorageError | None

    @property
    def ok(self) -> bool:
        """Whether it answered."""
        return self.error is None


async def check_health(originals: Mapping[str, Backend], meta: MetaBackend) -> Sequence[Health]:
    """Ask each for something that is not there; return their answers, ``"meta"`` last."""
    probe = f".health-{new_token()}"
    answers = [await _ask(name, backend.stat(probe)) for name, backend in originals.items()]
    return [*answers, await _ask("meta", meta.exists(probe))]


async def _ask(name: str, question: Awaitable[Any]) -> Health:
    try:
        await question
    except NotFound:
        pass
    except StorageError as error:
        return Health(name, error)
    return Health(name, None)
