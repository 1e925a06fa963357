"""``copy``: the files of another storage, or of a bucket that nobody keeps records of."""

from __future__ import annotations

import contextlib
from enum import Enum
from typing import Annotated

import typer

from ..backends.base import Backend
from ..config import original_from_url
from ..errors import ConfigurationError
from ..proxy import ProxyStorage
from ..tools.migrate import copy_files
from .session import Session, command
from .transfer import Concurrency

__all__ = ["register"]


class OnOther(Enum):
    """What happens to a file that DST has under the same name, with other bytes."""

    fail = "fail"
    replace = "replace"
    skip = "skip"


def register(app: typer.Typer) -> None:
    """Add this command to `app`."""
    command(app, name="copy")(copy)


async def copy(
    session: Session,
    source: Annotated[
        str, typer.Argument(metavar="SRC", help="A storage of the configuration, or the URL of an original.")
    ],
    target: Annotated[str, typer.Argument(metavar="DST", help="A storage of the configuration.")],
    prefix: Annotated[str, typer.Option("--prefix", metavar="TEXT", help="Only names that begin with this.")] = "",
    after: Annotated[
        str | None,
        typer.Option("--after", metavar="NAME", help="Only names after this one, in byte order.", show_default=False),
    ] = None,
    on_conflict: Annotated[
        OnOther, typer.Option("--on-conflict", help="What to do with a file that DST has with other bytes.")
    ] = OnOther.fail,
    using: Annotated[
        str | None, typer.Option("--using", metavar="NAME", help="The original of DST to use.", show_default=False)
    ] = None,
    verify: Annotated[bool, typer.Option(help="Compare what is read with the checksums of SRC.")] = True,
    concurrency: Concurrency = 8,
) -> None:
    """Copy all files of SRC to DST, under their names.

    What DST has with the same checksum is skipped, so that the same command goes on where it was interrupted. SRC is
    only read; a bucket without records will do. A file that fails is named with the reason, and the rest goes on.
    """
    to = await session.storage(target)
    origin: ProxyStorage | Backend
    if source in session.storages:
        origin = await session.storage(source)
    elif ":" in source:
        origin = original_from_url(source)
    else:
        raise ConfigurationError(
            f"SRC {source!r} is neither a storage of the configuration ({', '.join(session.storages)}) nor a URL"
        )
    if origin is to:
        raise ConfigurationError(f"SRC and DST are both the storage {target!r}")
    total = None
    if session.out.terminal and isinstance(origin, ProxyStorage):
        total = await origin.meta.count(origin.prefix + prefix, proxy_storage_name=origin.name, state="stored")
    try:
        with session.out.progress("copying", total) as bar:
            results = copy_files(
                origin,
                to,
                prefix,
                after=after,
                using=using,
                on_conflict=on_conflict.value,
                verify=verify,
                concurrency=concurrency,
            )
            async with contextlib.aclosing(results):
                async for result in results:
                    if result.error is not None:
                        session.failed(result.item, result.error)
                        bar.advance(0)
                        continue
                    assert result.value is not None
                    moved = result.value.size if result.value.action in ("copied", "replaced") else 0
                    session.did(result.value.action, result.value.path, moved, size=result.value.size)
                    bar.advance(result.value.size)
    finally:
        if isinstance(origin, Backend):
            await origin.aclose()
