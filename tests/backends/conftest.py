"""A filesystem backend in both of its ways."""

from pathlib import Path

import pytest

from aproxy_storage.backends.filesystem import FileSystemBackend


@pytest.fixture(params=["unnamed", "hidden"])
def backend(request: pytest.FixtureRequest, tmp_path: Path) -> FileSystemBackend:
    made = FileSystemBackend(tmp_path / "root")
    if request.param == "hidden":
        made._tree.anonymous = False
    return made
