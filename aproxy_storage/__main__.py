"""The command ``aproxy``, also ``aproxy-storage`` and ``python -m aproxy_storage``."""

from __future__ import annotations

import os
import sys

__all__ = ["main"]


def main() -> None:
    """Run the command line; without the extra ``cli``, say how to install it and exit with 2."""
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:  # closed by the shell; its number must not become that of a file
            setattr(sys, name, open(os.devnull, "w"))  # noqa: SIM115
    try:
        from .cli.app import app
    except ModuleNotFoundError as error:
        missing = (error.name or "").partition(".")[0]
        if missing not in ("rich", "typer"):
            raise
        way_out = "Install it with: pip install 'aproxy-storage[cli]'"
        sys.stderr.write(f"aproxy needs {missing}, which is not installed. {way_out}\n")
        sys.exit(2)
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(errors="backslashreplace")  # type: ignore[union-attr]  # names that the locale cannot show
    app(prog_name="aproxy")


if __name__ == "__main__":
    main()
