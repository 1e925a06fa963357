"""What a `FileSystemBackend` leaves out of its listings: what its workers run to name it."""

from __future__ import annotations

import os
from collections.abc import Sequence

from ..errors import AccessDenied
from ._directories import LISTED
from ._handles import HIDDEN, close_all
from ._posix import Tree, is_text

__all__ = ["scan"]


def scan(tree: Tree, names: Sequence[str]) -> tuple[list[tuple[str, str]], list[str]]:
    """Look through the directory `names`; return what no key names there, each with what it is, and the directories.

    Both in the order of their names. Not the tree's own temporaries. Links are not followed, not even to see what is at
    the end, which might hang.
    """
    strays: list[tuple[str, str]] = []
    inner: list[str] = []
    root = tree.enter()
    try:
        directories = tree.descend(root.fd, names)
    except (FileNotFoundError, NotADirectoryError, AccessDenied):
        return strays, inner
    try:
        fd = os.open(".", LISTED, dir_fd=directories[-1] if directories else root.fd)
        try:
            with os.scandir(fd) as entries:
                for entry in entries:
                    name = entry.name
                    if name.startswith(HIDDEN):
                        continue
                    if entry.is_symlink():
                        strays.append((name, "symbolic link"))
                    elif entry.is_dir(follow_symlinks=False):
                        if is_text(name):
                            inner.append(name)
                        else:
                            strays.append((name, "directory whose name is not UTF-8"))
                    elif not entry.is_file(follow_symlinks=False):
                        strays.append((name, "special file"))
                    elif not is_text(name):
                        strays.append((name, "file whose name is not UTF-8"))
        finally:
            os.close(fd)
    except FileNotFoundError:  # pruned at this moment
        pass
    except PermissionError:  # a listing tells
        if list(names) != ["lost+found"]:
            raise
    finally:
        close_all(directories)
    return sorted(strays), sorted(inner)
