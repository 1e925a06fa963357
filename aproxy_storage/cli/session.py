"""What every command shares: which storage, what became of each file, how it ends."""

from __future__ import annotations

import asyncio
import contextlib
import importlib
import inspect
import os
import re
import signal
import sys
from collections.abc import Awaitable, Callable, Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any, TypeVar

import typer

from ..config import EMBEDDED, find_file, load, storage_from_urls
from ..errors import ConfigurationError, StorageError
from ..proxy import ProxyStorage
from .output import Output, Tally, reason

__all__ = ["FAILED", "INTERRUPTED", "TERMINATED", "WRONG", "Session", "command"]

FAILED, WRONG, INTERRUPTED, TERMINATED, PIPE_CLOSED = 1, 2, 130, 143, 141

F = TypeVar("F", bound=Callable[..., Awaitable[None]])


class Session:
    """One run of one command.

    Attributes:
        out: where results and messages go.
        tally: what became of the files so far; told at the end, also when it is interrupted.
    """

    def __init__(
        self,
        out: Output,
        *,
        config: Path | None = None,
        name: str | None = None,
        original: str | None = None,
        meta: str | None = None,
        creates: bool = False,
        arguments: Iterable[object] = (),
    ) -> None:
        self.out = out
        self.tally = Tally()
        self._config = config
        self._name = name
        self._urls = (original, meta)
        self._creates = creates
        self._arguments = [str(argument) for argument in arguments]
        self._storages: dict[str, ProxyStorage] | None = None
        self._opened: list[ProxyStorage] = []

    @property
    def storages(self) -> Mapping[str, ProxyStorage]:
        """All storages of the configuration, by name.

        Raises:
            ConfigurationError: as `config.load`; there is no storage here yet, and this command makes none.
        """
        if self._storages is None:
            self._storages = self._load()
        return self._storages

    @property
    def config_file(self) -> Path | None:
        """The file that the storages are described in; None where there is none."""
        return None if self._urls != (None, None) else self._config or find_file()

    def _load(self) -> dict[str, ProxyStorage]:
        original, meta = self._urls
        if original is not None and meta is not None:
            if self._config is not None:
                raise ConfigurationError("either --config, or --original and --meta")
            name = self._name or "default"
            return {name: storage_from_urls(original, meta, name=name)}
        if original is not None or meta is not None:
            raise ConfigurationError("--original and --meta go together")
        found = self._config or find_file()
        if found is None and self._name not in (None, "default"):
            raise ConfigurationError(
                f"there is no storage {self._name!r}: no APROXY_CONFIG and no ./aproxy.toml; name a file with --config"
            )
        if found is None and not self._creates and not os.path.isdir(EMBEDDED):
            raise ConfigurationError(
                f"there is no storage here: no APROXY_CONFIG, no ./aproxy.toml and no ./{EMBEDDED}; name one with"
                " --config or --original and --meta, or begin one with: aproxy put FILE"
            )
        return load(self._config)

    async def storage(self, name: str | None = None, *, setup: bool = True) -> ProxyStorage:
        """Return the storage `name`, by default the one that the user means; it is closed at the end. `setup`: its
        meta-backend is set up, and so has to answer.

        Raises:
            ConfigurationError: there is none of that name, or there are several and none is named.
        """
        storages = self.storages
        name = name or self._name
        if name is None:
            if len(storages) > 1 and "default" not in storages:
                raise ConfigurationError(f"which storage? --storage NAME, one of: {', '.join(storages)}")
            name = "default" if "default" in storages else next(iter(storages))
        if name not in storages:
            raise ConfigurationError(f"there is no storage {name!r}; there are: {', '.join(storages)}")
        storage = storages[name]
        if storage not in self._opened:
            self._opened.append(storage)
            if setup:
                await storage.meta.setup()
        return storage

    def let_go(self, storage: ProxyStorage) -> ProxyStorage:
        """Return `storage`, which the caller closes from here on."""
        self._opened.remove(storage)
        return storage

    def _set_up_django(self) -> None:
        """Set Django up, as ``manage.py`` does, where a URL is one of Django's and the environment names the settings.

        Raises:
            ConfigurationError: they cannot be imported, or something that they name.
        """
        settings = os.environ.get("DJANGO_SETTINGS_MODULE")
        texts = [*self._arguments, *(url for url in self._urls if url)]
        if settings and self.config_file is not None:
            with contextlib.suppress(OSError, UnicodeDecodeError):  # `load` says so
                texts.append(self.config_file.read_text("utf-8"))
        if not settings or not any(re.search(r"\bdjango(-orm)?:", text) for text in texts):
            return
        if os.getcwd() not in sys.path:
            sys.path.insert(0, os.getcwd())
        try:
            importlib.import_module("django").setup()
        except Exception as error:  # whatever settings and applications raise when they are imported
            text = f": {error}" if isinstance(error, ImportError) else ", see the cause"
            raise ConfigurationError(
                f"Django cannot be set up with DJANGO_SETTINGS_MODULE={settings}: {type(error).__name__}{text} (run"
                " this beside manage.py, or add that directory to PYTHONPATH)"
            ) from error

    def did(self, action: str, path: str, count: int | None = 0, *, told: bool = False, **fields: Any) -> None:
        """Count what became of one file of `count` bytes, and tell it; see `Output.done`."""
        self.tally.add(action, count)
        self.out.done(action, path, told=told, **fields)

    def failed(self, path: str, error: StorageError, **fields: Any) -> None:
        """Count one failure, and tell it; the exit code will be 1."""
        self.tally.failed += 1
        self.out.failed(path, error, **fields)

    def confirm(self, question: str, *, sure: bool) -> None:
        """Ask on the terminal; go on only after a yes, or where the user is `sure`.

        Raises:
            typer.Exit: no. ConfigurationError: nobody is there to be asked.
        """
        if sure:
            return
        if not (sys.stdin.isatty() and sys.stderr.isatty()):
            raise ConfigurationError(f"{question} Nobody is there to be asked; say --yes.")
        # The event loop takes the first Ctrl-C as a wish to stop at the next await, and here is none.
        before = signal.signal(signal.SIGINT, signal.default_int_handler)
        try:
            if not typer.confirm(question, err=True):
                raise typer.Exit(FAILED)
        finally:
            signal.signal(signal.SIGINT, before)

    async def aclose(self) -> None:
        """Close the storages that were used."""
        for storage in self._opened:
            await storage.aclose()

    def run(self, work: Callable[[Session], Awaitable[None]]) -> int:
        """Run `work` in an event loop; return the exit code.

        The first Ctrl-C (or SIGTERM) cancels it: files under way are undone or finished, and what was done is said.
        """
        try:
            self._set_up_django()
            asyncio.run(self._main(work))
            sys.stdout.flush()
        except StorageError as error:
            self.out.problem(reason(error))
            return WRONG if isinstance(error, ConfigurationError) else FAILED
        except KeyboardInterrupt:
            self._stopped("interrupted")
            return INTERRUPTED
        except asyncio.CancelledError:
            self._stopped("told to stop")
            return TERMINATED
        except BrokenPipeError:
            self._give_up_output()  # whoever read it has had enough
            return PIPE_CLOSED
        except OSError as error:  # a storage, and a local file, has a StorageError
            self._give_up_output()
            self.out.problem(f"could not write the output: {error.strerror}; what was under way is undone, or done")
            return FAILED
        self.out.summary(self.tally)
        return FAILED if self.tally.failed else 0

    @staticmethod
    def _give_up_output() -> None:
        """Let nothing be flushed to standard output at exit."""
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())

    async def _main(self, work: Callable[[Session], Awaitable[None]]) -> None:
        task = asyncio.current_task()
        assert task is not None
        with contextlib.suppress(NotImplementedError, RuntimeError, ValueError):  # not in the main thread
            asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, task.cancel)
        try:
            await work(self)
        finally:
            await self.aclose()

    def _stopped(self, why: str) -> None:
        done = self.tally.sentence() or "nothing was done"
        self.out.problem(
            f"{why}: {done}; what was under way is undone, or done. The same command again goes on from here; it says"
            " until when a path is taken about which a service has not answered."
        )


_Config = Annotated[
    Path | None,
    typer.Option("--config", "-c", metavar="FILE", help="TOML file.", show_default=False, rich_help_panel="Storage"),
]
_Name = Annotated[
    str | None,
    typer.Option(
        "--storage", "-s", metavar="NAME", help="Which storage of the file.", show_default=False,
        rich_help_panel="Storage",
    ),
]  # fmt: skip
_Original = Annotated[
    str | None,
    typer.Option("--original", metavar="URL", help="Where bytes are.", show_default=False, rich_help_panel="Storage"),
]
_Meta = Annotated[
    str | None,
    typer.Option("--meta", metavar="URL", help="Where records are.", show_default=False, rich_help_panel="Storage"),
]
_Json = Annotated[bool, typer.Option("--json", help="Print lines of JSON.")]
_Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Print problems and what was asked for, nothing else.")]

_SHARED: dict[str, Any] = {
    "as_json": _Json,
    "quiet": _Quiet,
    "config": _Config,
    "storage_name": _Name,
    "original": _Original,
    "meta": _Meta,
}


def command(app: typer.Typer, *, name: str | None = None, creates: bool = False) -> Callable[[F], F]:
    """Make a coroutine function ``f(session, …)`` a command, with the options that all commands share.

    `name`: that of the function unless given. `creates`: it may begin the storage in ``./aproxy-data``.
    """

    def register(function: F) -> F:
        own = list(inspect.signature(function, eval_str=True).parameters.values())[1:]

        def run(**given: Any) -> None:
            shared = {name: given.pop(name) for name in _SHARED}
            session = Session(
                Output(as_json=shared["as_json"], quiet=shared["quiet"]),
                config=shared["config"],
                name=shared["storage_name"],
                original=shared["original"],
                meta=shared["meta"],
                creates=creates,
                arguments=given.values(),
            )
            raise typer.Exit(session.run(lambda session: function(session, **given)))

        both = [
            *own,
            *(
                inspect.Parameter(
                    name,
                    inspect.Parameter.KEYWORD_ONLY,
                    default=False if name in ("as_json", "quiet") else None,
                    annotation=annotation,
                )
                for name, annotation in _SHARED.items()
            ),
        ]
        # Typer reads both; there is no way to share options between commands in Typer itself.
        run.__signature__ = inspect.Signature(  # type: ignore[attr-defined]
            [parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY) for parameter in both]
        )
        run.__annotations__ = {parameter.name: parameter.annotation for parameter in both}
        run.__doc__ = function.__doc__
        app.command(name or function.__name__)(run)
        return function

    return register
