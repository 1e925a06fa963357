"""The application that ``aproxy`` runs. A further group of commands is a module here and a line in `app`."""

from __future__ import annotations

from importlib.metadata import version
from typing import Annotated

import typer

from . import copying, demo, files, transfer, upkeep

__all__ = ["app"]

app = typer.Typer(
    name="aproxy",
    no_args_is_help=True,
    rich_markup_mode="markdown",
    pretty_exceptions_enable=False,  # it would print local variables, and with them secrets
    context_settings={"help_option_names": ["-h", "--help"]},
    epilog="Exit codes: 0 done, 1 something failed, 2 wrong usage or configuration, 130 interrupted.",
)

for _group in (transfer, copying, files, upkeep, demo):
    _group.register(app)


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"aproxy-storage {version('aproxy-storage')}")
        raise typer.Exit


@app.callback()
def _main(
    _: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    """Keep files in an aproxy_storage, from the command line.

    Which storage is meant is said by `--config FILE` (or `$APROXY_CONFIG`, or `./aproxy.toml`), or by `--original URL`
    and `--meta URL`. Without any of these it is the one in `./aproxy-data`.
    """
