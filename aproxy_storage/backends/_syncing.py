"""Have a file on the disk that somebody else has written."""

from __future__ import annotations

import os

__all__ = ["sync_file"]


def sync_file(path: str) -> None:
    """Sync a file and every directory above it, whose entries may be new."""
    path = os.path.abspath(path)
    while True:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
        above = os.path.dirname(path)
        if above == path:
            return
        path = above
