"""ProxyStorage: one storage over one or several originals and a meta-backend."""

from __future__ import annotations

import logging
import time
from collections.abc import AsyncGenerator, AsyncIterable, Callable, Iterable, Mapping, Sequence
from functools import cached_property
from typing import Any, Literal, Self

from .attempts import Attempt
from .backends.base import DEFAULT_CHUNK_BYTES, Backend
from .cleanup import Cleanup
from .digest import hash_constructor
from .errors import ConfigurationError, StorageError
from .fallback import Original
from .gates import Gate
from .health import Health, check_health
from .journal import Journal
from .meta_backends.base import MetaBackend
from .paths import MAX_PATH_BYTES, check_path
from .placement import First, Placement
from .proxy_arranging import ArrangingVerbs
from .proxy_reading import Path
from .proxy_writing import NOT_FOR_HOOKS
from .timeouts import Timeouts
from .writing import Writing

__all__ = ["Health", "Path", "ProxyStorage"]

_log = logging.getLogger(__name__)

_LONGEST = 10 * 365 * 86_400.0  # seconds that a lease, or what goes by one, may take: databases have an end of time

#: What arguments are, where a wrong one would be found out by a save only.
_KINDS: Mapping[str, tuple[Any, str]] = {
    "prefix": (str, "text"),
    "placement": (Placement, "a Placement, such as Fallback()"),
    "timeouts": (Timeouts, "a Timeouts, such as Timeouts(operation=5)"),
    "chunk_bytes": (int, "a whole number of bytes"),
    "max_path_bytes": (int, "a whole number of bytes"),
    "lease": (int | float, "a number of seconds"),
    "settle": (int | float, "a number of seconds"),
    "keep_replaced": (int | float, "a number of seconds"),
    "tidy_every": (int | float | None, "a number of seconds, or None for never"),
    "on_attempt": (Callable | None, "a function, or None"),
}

Originals = Backend | Original | Mapping[str, Backend | Original] | Iterable[tuple[str, Backend | Original]]


class ProxyStorage(ArrangingVerbs):
    """Files in one or several original backends, with one record per file in a meta-backend.

    Args:
        name: written into every record; tells storages that share a meta-backend apart.
        originals: one backend (then named ``"default"``), a mapping, or pairs of name and backend. An `Original`
            in place of a backend gives it rules of its own.
        meta: the meta-backend.
        placement: which original a new file goes to; the first one by default.
        prefix: begins every path of this storage; keys in the originals are without it.
        keys: ``"path"``: ``hello.txt`` is ``hello.txt`` on the disk; ``"token"``: ``hello_TOKEN.txt``, never reused.
        timeouts: how long the caller's content and an undo may take; originals and meta-backend have their own.
        checksum: a name known to hashlib, or None for no checksum.
        chunk_bytes: how much is read or written at a time.
        durability: what "stored" survives: the death of the process (``"process"``), or the loss of power too.
        lease: seconds after which a save that gives no sign of life may be undone by others.
        settle: seconds after which an operation without an answer can no longer take effect.
        keep_replaced: seconds that replaced bytes stay, for those who read them or hold a signed URL to them.
        max_path_bytes: how long a new path may be, in UTF-8.
        tidy_every: seconds between two `tidy` that saves, replacements and deletions start in the background; the
            first of them starts one at once. None: only `save_many` and `aclose` tidy up.
        on_attempt: called with an `Attempt` at the end of each, for metrics; in the task that made it, so it must
            not block. What it raises is logged.

    A subclass may give `name`, `originals`, `meta` and `placement` as class attributes instead. The constructor only
    stores; an instance is a module-level constant, to be used from any event loop and after a fork. No verb keeps
    state on it.

    Every verb raises a `StorageError`: BackendUnavailable or DeadlineExceeded where an original or the meta-backend
    cannot be reached, InvalidPath for a name that can never be stored, and what it says itself.
    """

    name: str = ""
    originals: Mapping[str, Backend]
    meta: MetaBackend
    placement: Placement = First()

    def __init__(
        self,
        name: str | None = None,
        *,
        originals: Originals | None = None,
        meta: MetaBackend | None = None,
        placement: Placement | None = None,
        prefix: str = "",
        keys: Literal["path", "token"] = "path",
        timeouts: Timeouts | None = None,
        checksum: str | None = "sha256",
        chunk_bytes: int = DEFAULT_CHUNK_BYTES,
        durability: Literal["process", "power"] = "process",
        lease: float = 60.0,
        settle: float = 900.0,
        keep_replaced: float = 60.0,
        max_path_bytes: int = MAX_PATH_BYTES,
        tidy_every: float | None = None,
        on_attempt: Callable[[Attempt], None] | None = None,
    ) -> None:
        self.name = name if name is not None else self.name
        given = originals if originals is not None else getattr(type(self), "originals", None)
        rules = _named(given)
        self.originals = {name: each.backend for name, each in rules.items()}
        meta = meta if meta is not None else getattr(type(self), "meta", None)
        if not self.name or not self.originals or meta is None:
            raise ConfigurationError("a ProxyStorage needs a name, at least one original and a meta-backend")
        self.meta = meta
        self.placement = placement if placement is not None else self.placement
        self.timeouts = timeouts or Timeouts()
        _check_kinds(
            prefix=prefix,
            placement=self.placement,
            timeouts=self.timeouts,
            chunk_bytes=chunk_bytes,
            max_path_bytes=max_path_bytes,
            lease=lease,
            settle=settle,
            keep_replaced=keep_replaced,
            tidy_every=tidy_every,
            on_attempt=on_attempt,
        )
        self.placement._check(list(self.originals))
        self.gates = {name: self._gate(name, original) for name, original in rules.items()}
        self.on_attempt = on_attempt
        if prefix:
            prefix = check_path(prefix.rstrip("/")) + "/"
        if keys not in ("path", "token"):
            raise ConfigurationError(f"keys={keys!r}: either 'path' or 'token'")
        if durability not in ("process", "power"):
            raise ConfigurationError(f"durability={durability!r}: either 'process' or 'power'")
        if durability == "power" and not meta.durable:
            raise ConfigurationError(
                f"durability='power' needs records that survive the loss of power, and {meta} {meta._durable_with}"
            )
        if lease <= 0 or settle < 0 or keep_replaced < 0 or chunk_bytes < 1:
            raise ConfigurationError("lease and chunk_bytes must be positive, settle and keep_replaced not negative")
        if max_path_bytes < 1:
            raise ConfigurationError(f"max_path_bytes={max_path_bytes}: bytes, at least 1")
        if checksum is not None:
            hash_constructor(checksum)
        if not all(seconds <= _LONGEST for seconds in (lease, settle, keep_replaced)):  # nor NaN
            raise ConfigurationError("lease, settle and keep_replaced are seconds, and at most ten years")
        if fixed := NOT_FOR_HOOKS.intersection(self.hook_may_set):
            raise ConfigurationError(f"hook_may_set names what only the library can set: {', '.join(sorted(fixed))}")
        if tidy_every is not None and not tidy_every > 0:  # nor NaN
            raise ConfigurationError(f"tidy_every={tidy_every}: seconds, more than 0, or None for never")
        self.prefix = prefix
        self.keys = keys
        self.checksum = checksum
        self.chunk_bytes = chunk_bytes
        self.durable = durability == "power"
        self.lease = lease
        self.settle = settle
        self.keep_replaced = keep_replaced
        self.max_path_bytes = max_path_bytes
        self.tidy_every = tidy_every
        self._tidy_at = 0.0  # by the monotonic clock
        self.cleanup = Cleanup(f"storage {self.name!r}")
        self.journal = Journal(
            meta,
            self.get_original,
            self.cleanup,
            lease=lease,
            settle=settle,
            keep_replaced=keep_replaced,
            durable=self.durable,
            max_path_bytes=self.max_path_bytes,
        )
        self._writing = Writing(self)

    def _gate(self, name: str, original: Original) -> Gate:
        limits = self.placement.limits
        return Gate(
            name,
            breaker=limits.breaker,
            max_concurrency=original.max_concurrency,
            fallback_on=original.fallback_on,
            attempt_timeout=limits.attempt_timeout if original.timeouts is None else original.timeouts.idle,
        )

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self.name!r}>"

    @cached_property
    def works_here(self) -> bool:
        """Whether a thread that may block can do all the work of a verb, see `blocking`: there is one original, nothing
        goes on beside a verb, and no code of others may need a loop."""
        parts: list[Backend | MetaBackend] = [self.meta, *self.originals.values()]
        return (
            type(self) is ProxyStorage
            and type(self.placement) is First
            and len(self.originals) == 1
            and self.tidy_every is None
            and not any(gate.has_slots for gate in self.gates.values())
            and all(vars(type(part)).get("works_here", False) for part in parts)
        )

    # -- many files

    def save_many(
        self, items: Iterable[Any] | AsyncIterable[Any], *, concurrency: int = 32, **options: Any
    ) -> AsyncGenerator[Any, None]:
        """Save many; see `tools.bulk.save_many`."""
        from .tools.bulk import save_many

        return save_many(self, items, concurrency=concurrency, **options)

    def delete_many(
        self, paths: Iterable[Path] | AsyncIterable[Path], *, concurrency: int = 32, missing_ok: bool = False
    ) -> AsyncGenerator[Any, None]:
        """Delete many; see `tools.bulk.delete_many`."""
        from .tools.bulk import delete_many

        return delete_many(self, paths, concurrency=concurrency, missing_ok=missing_ok)

    # -- life

    async def health(self) -> Sequence[Health]:
        """Ask every original and the meta-backend a small question; return their answers, ``"meta"`` last.

        With each, how the latest calls to it went: circuit, calls in flight, failures, quantiles of the times taken.
        """
        return await check_health(self.originals, self.meta, self.gates)

    async def tidy(self, *, limit: int = 500) -> int:
        """Finish what crashed or cancelled callers left and whose lease has run out; return how many records.

        A small `tools.reconcile.reconcile`; `save_many` and `aclose` call it too, and every `tidy_every` seconds
        a verb that writes does. Begins no further record after ``timeouts.cleanup`` seconds: with an original out
        of reach, each may take as long as its deadline. A record that cannot be finished is logged and passed over.

        Raises:
            BackendUnavailable, DeadlineExceeded: the meta-backend cannot list them.
        """
        done, until = 0, time.monotonic() + self.timeouts.cleanup
        for record in await self.meta.list_unfinished(proxy_storage_name=self.name, limit=limit):
            if time.monotonic() >= until:
                break
            try:
                await self.journal.finish(record)
            except StorageError as error:
                _log.warning("storage %r: what is left of %r could not be finished: %s", self.name, record.path, error)
            else:
                done += 1
        return done

    async def _tidy_quietly(self) -> None:
        try:
            await self.tidy()
        except StorageError as error:
            _log.info("storage %r could not tidy up: %s", self.name, error)

    async def aclose(self) -> None:
        """Let cleanup end, finish what is left from crashes, release what the running loop holds; idempotent.

        Its originals and meta-backend are closed too; all open again on the next use, also for others who share them.
        """
        await self.cleanup.drain(within=self.timeouts.cleanup)
        await self._tidy_quietly()
        for backend in self.originals.values():
            await backend.aclose()
        await self.meta.aclose()

    async def __aenter__(self) -> Self:
        await self.meta.setup()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.aclose()


def _check_kinds(**given: Any) -> None:
    for name, value in given.items():
        kind, instead = _KINDS[name]
        if not isinstance(value, kind):
            raise ConfigurationError(f"{name}={value!r}: give {instead}")


def _named(originals: Originals | None) -> dict[str, Original]:
    if originals is None:
        return {}
    if isinstance(originals, Backend | Original):
        originals = {"default": originals}
    pairs = list(originals.items() if isinstance(originals, Mapping) else originals)
    named = {name: each if isinstance(each, Original) else Original(each) for name, each in pairs}
    if len(named) != len(pairs):
        raise ConfigurationError(f"two originals have the same name: {[name for name, _ in pairs]}")
    if not all(isinstance(name, str) and name for name in named):
        raise ConfigurationError("every original needs a name that is not empty")
    return named
