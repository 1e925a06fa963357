"""Whether the originals and the meta-backend of a storage answer, and how the latest calls went."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from .backends.base import Backend
from .errors import NotFound, StorageError
from .gates import Gate, Traffic
from .meta_backends.base import MetaBackend
from .paths import new_token

__all__ = ["Health", "check_health"]


@dataclass(frozen=True, slots=True)
class Health:
    """The answer of one original or meta-backend to a small question, and how the latest calls to it went.

    `writes` and `reads` count what verbs of this storage did in this process, the meta-backend has none.
    """

    name: str
    error: StorageError | None
    writes: Traffic | None = None
    reads: Traffic | None = None

    @property
    def ok(self) -> bool:
        """Whether it answered."""
        return self.error is None


async def check_health(
    originals: Mapping[str, Backend], meta: MetaBackend, gates: Mapping[str, Gate]
) -> Sequence[Health]:
    """Ask each for something that is not there; return their answers, ``"meta"`` last."""
    probe = f".health-{new_token()}"
    async with asyncio.TaskGroup() as group:
        asked = {name: group.create_task(_ask(backend.stat(probe))) for name, backend in originals.items()}
        last = group.create_task(_ask(meta.exists(probe)))
    answers = [
        Health(name, task.result(), gates[name].traffic("write"), gates[name].traffic("read"))
        for name, task in asked.items()
    ]
    return [*answers, Health("meta", last.result())]


async def _ask(question: Awaitable[Any]) -> StorageError | None:
    try:
        await question
    except NotFound:
        return None
    except StorageError as error:
        return error
    return None
