"""What lies where the filesystem backend looks: another root, links, special files; and what modes it gives."""

import errno
import os
import stat
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import pytest

from aproxy_storage.backends import _posix
from aproxy_storage.backends.filesystem import FileSystemBackend
from aproxy_storage.content import Source
from aproxy_storage.errors import (
    AccessDenied,
    AlreadyExists,
    BackendUnavailable,
    InvalidPath,
    NotFound,
)
from aproxy_storage.testing._backend_hooks import BIG, pattern, pieces
from tests.backends.test_filesystem import content, everything_below

pytestmark = pytest.mark.asyncio


# -- the root


async def test_root_is_made_but_not_its_parents(tmp_path: Path) -> None:
    made = FileSystemBackend(tmp_path / "new")
    assert not Path(made.root).exists(), "constructors only store"
    await made.write("a", b"x")
    assert os.listdir(made.root) == ["a"]
    with pytest.raises(BackendUnavailable, match="its parent"):
        await FileSystemBackend(tmp_path / "no" / "such").write("a", b"x")
    with pytest.raises(BackendUnavailable):
        await FileSystemBackend(tmp_path / "other", create_root=False).stat("a")
    assert os.listdir(tmp_path) == ["new"]


async def test_root_that_another_thread_makes_meanwhile(
    backend: FileSystemBackend, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first thread has found no root; before it asks why, the second has made it."""
    opened = os.open
    others = [backend._tree]

    def open_slowly(path: Any, flags: int, *args: Any, **options: Any) -> int:
        try:
            return opened(path, flags, *args, **options)
        except FileNotFoundError:
            if path == backend.root and others:
                others.pop().enter()
            raise

    monkeypatch.setattr(_posix.os, "open", open_slowly)
    await backend.write("a", b"x")
    assert not others
    assert await content(backend, "a") == b"x"


async def test_vanished_root_is_an_outage_and_is_not_made_anew(backend: FileSystemBackend, tmp_path: Path) -> None:
    await backend.write("a", b"x")
    os.rename(backend.root, tmp_path / "elsewhere")
    calls = {
        "write": lambda: backend.write("b", b"x"),
        "stream": lambda: backend.write("b", pieces(pattern(BIG))),
        "read": lambda: content(backend, "a"),
        "stat": lambda: backend.stat("a"),
        "discard": lambda: backend.discard("a"),
        "copy": lambda: backend.copy("a", "b"),
        "list": lambda: anext(aiter(backend.list())),
    }
    for again in (False, True):
        for name, call in calls.items():
            with pytest.raises(BackendUnavailable, match="root"):
                await call()
            assert not Path(backend.root).exists(), f"{name} has made the root again"
        if not again:
            await backend.aclose()  # not even then
    os.rename(tmp_path / "elsewhere", backend.root)
    assert await content(backend, "a") == b"x"


async def test_replaced_root_is_an_outage(backend: FileSystemBackend, tmp_path: Path) -> None:
    await backend.write("a", b"x")
    os.rename(backend.root, tmp_path / "elsewhere")
    os.mkdir(backend.root)  # as the mount point that an unmounted disk leaves
    with pytest.raises(BackendUnavailable, match="different directory"):
        await backend.stat("a")
    with pytest.raises(BackendUnavailable, match="different directory"):
        await backend.write("b", b"x")
    assert os.listdir(backend.root) == []
    os.rmdir(backend.root)
    Path(backend.root).write_bytes(b"a file")
    with pytest.raises(BackendUnavailable, match="not a directory"):
        await backend.discard("a")
    os.unlink(backend.root)
    os.mkdir(backend.root)
    await backend.aclose()  # the operator says that it is meant
    await backend.write("b", b"x")


async def test_root_replaced_during_a_write(backend: FileSystemBackend, tmp_path: Path) -> None:
    async def replacing() -> AsyncIterator[bytes]:
        yield pattern(BIG)
        yield pattern(BIG)
        os.rename(backend.root, tmp_path / "elsewhere")
        os.mkdir(backend.root)
        yield b"end"

    with pytest.raises(BackendUnavailable, match="different directory"):
        await backend.write("dir/a", replacing())
    assert os.listdir(backend.root) == []


async def test_root_may_be_a_link_itself(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to("real")
    linked = FileSystemBackend(tmp_path / "link")
    await linked.write("a/b", b"x")
    assert (tmp_path / "real" / "a" / "b").read_bytes() == b"x"
    assert linked.full_path("a/b") == f"{tmp_path}/link/a/b"


@pytest.mark.parametrize("linked", [False, True])
async def test_the_root_of_another_backend_is_not_taken_for_an_empty_directory(tmp_path: Path, linked: bool) -> None:
    if linked:
        (tmp_path / "outer" / "a" / "b").mkdir(parents=True)
        (tmp_path / "link").symlink_to("outer/a/b")
    outer = FileSystemBackend(tmp_path / "outer")
    await outer.write("a/b/c/file", b"x")
    inner = FileSystemBackend(tmp_path / "link" if linked else tmp_path / "outer" / "a" / "b")
    if linked:
        await inner.stat("c/file")  # from now on it knows which directory its root is
    await outer.discard("a/b/c/file")
    assert everything_below(inner.root) == []
    assert os.listdir(tmp_path / "outer" / "a") == ["b"]
    await inner.write("file", b"x")


# -- links and special files


async def test_no_link_below_the_root_is_followed(backend: FileSystemBackend, tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "secret").write_bytes(b"secret")
    await backend.write("inside/file", b"x")
    root = Path(backend.root)
    (root / "out").symlink_to(outside)
    (root / "up").symlink_to("..")
    (root / "in").symlink_to("inside")
    (root / "file").symlink_to(outside / "secret")
    (root / "dangling").symlink_to(outside / "new")
    for key in ("out/secret", "up/outside/secret", "in/file", "file", "dangling"):
        with pytest.raises(AccessDenied, match="symbolic link"):
            await content(backend, key)
        with pytest.raises(AccessDenied, match="symbolic link"):
            await backend.stat(key)
        with pytest.raises((AlreadyExists, AccessDenied)):
            await backend.write(key, b"overwritten")
        with pytest.raises(AccessDenied, match="symbolic link"):
            await backend.discard(key)  # it may have been moved there: who is told that it is gone forgets it
        await backend.discard(key, token="sometoken000")
    for key in ("out/new", "up/new", "out/dir/new"):
        with pytest.raises(AccessDenied, match="symbolic link"):
            await backend.write(key, b"x")
        with pytest.raises(AccessDenied, match="symbolic link"):
            await backend.write(key, pieces(pattern(BIG)))
    assert [info.key async for info in backend.list()] == ["inside/file"]
    assert [info.key async for info in backend.list("out/")] == []
    assert (outside / "secret").read_bytes() == b"secret"
    assert os.listdir(outside) == ["secret"]
    assert sorted(os.listdir(root)) == ["dangling", "file", "in", "inside", "out", "up"]


async def test_directory_swapped_for_a_link_while_writing(backend: FileSystemBackend, tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    root = Path(backend.root)
    await backend.write("dir/other", b"x")

    async def swapping() -> AsyncIterator[bytes]:
        yield pattern(BIG)
        yield pattern(BIG)
        (root / "dir").rename(root / "was")
        (root / "dir").symlink_to(outside)
        yield b"end"

    with pytest.raises(AccessDenied):
        await backend.write("dir/new", swapping())
    assert os.listdir(outside) == []


async def test_special_files_are_neither_opened_nor_removed(backend: FileSystemBackend) -> None:
    await backend.write("dir/file", b"x")
    fifo = Path(backend.root, "fifo")
    os.mkfifo(fifo)
    for key in ("fifo", "dir"):
        with pytest.raises(NotFound):
            await content(backend, key)
        with pytest.raises(NotFound):
            await backend.stat(key)
        with pytest.raises(AlreadyExists):
            await backend.write(key, b"x")
        await backend.discard(key)
        await backend.discard(key, token="sometoken000")
    assert fifo.is_fifo()
    assert [info.key async for info in backend.list()] == ["dir/file"]


async def test_what_a_listing_leaves_out_can_be_listed(backend: FileSystemBackend) -> None:
    root = Path(backend.root)
    assert [stray async for stray in backend.list_strays()] == []
    for key in ("a/deep/file", "b/file", "file"):
        await backend.write(key, b"x")
    (root / "a" / "deep" / ".aproxy-abc-00000000.part").write_bytes(b"half")
    (root / "a" / "deep" / "link").symlink_to("/")
    (root / "broken").symlink_to("nowhere")
    os.mkfifo(root / "b" / "fifo")
    (root / os.fsdecode(b"caf\xe9.txt")).write_bytes(b"x")
    (root / os.fsdecode(b"b/r\xe9sum\xe9s")).mkdir()
    (root / os.fsdecode(b"b/r\xe9sum\xe9s/link")).symlink_to("/")
    assert [stray async for stray in backend.list_strays()] == [
        ("broken", "symbolic link"),
        ("caf\udce9.txt", "file whose name is not UTF-8"),
        ("a/deep/link", "symbolic link"),
        ("b/fifo", "special file"),
        ("b/r\udce9sum\udce9s", "directory whose name is not UTF-8"),
    ]
    assert [info.key async for info in backend.list()] == ["a/deep/file", "b/file", "file"]
    root.rename(root.with_name("unmounted"))
    with pytest.raises(BackendUnavailable, match="the root"):
        [stray async for stray in backend.list_strays()]


async def test_whatever_lies_at_a_key_takes_it(backend: FileSystemBackend) -> None:
    root = Path(backend.root)
    await backend.write("d/a", b"x")
    (root / "link").symlink_to("nowhere")
    os.mkfifo(root / "fifo")
    (root / "outside").symlink_to("/")
    for key in ("d/a", "d", "link", "fifo", "d/a/b", "fifo/a/b", "outside/no such file"):
        assert await backend.is_taken(key), key
    for key in ("b", "d/b", "no/b", "n" * 300, "n" * 300 + "/b", "a\0b"):
        assert not await backend.is_taken(key), key
    root.rename(root.with_name("unmounted"))
    with pytest.raises(BackendUnavailable, match="the root"):
        await backend.is_taken("d/a")


@pytest.mark.parametrize("durable", [False, True])
async def test_what_could_never_be_a_name_is_discarded_in_silence(backend: FileSystemBackend, durable: bool) -> None:
    for key in ("n" * 300, "n" * 300 + "/f", "a\0b", ".."):
        await backend.discard(key, durable=durable)


async def test_file_where_a_directory_is_needed(backend: FileSystemBackend) -> None:
    await backend.write("a", b"x")
    for body in (b"y", pieces(pattern(BIG))):
        with pytest.raises(InvalidPath, match="needs a directory"):
            await backend.write("a/b", body)
    with pytest.raises(NotFound):
        await backend.stat("a/b")
    await backend.discard("a/b")
    assert everything_below(backend.root) == ["a"]


async def test_temporaries_are_no_keys(backend: FileSystemBackend) -> None:
    await backend.write("dir/a", b"x")
    hidden = Path(backend.root, "dir", ".aproxy-abc-00000000.part")
    hidden.write_bytes(b"half")
    key = f"dir/{hidden.name}"
    with pytest.raises(InvalidPath, match="temporaries"):
        await backend.write(key, b"x")
    with pytest.raises(NotFound):
        await backend.stat(key)
    await backend.discard(key)
    assert hidden.exists()
    assert [info.key async for info in backend.list()] == ["dir/a"]


async def test_names_that_are_not_utf8_are_not_listed(backend: FileSystemBackend) -> None:
    await backend.write("a", b"x")
    Path(backend.root, os.fsdecode(b"caf\xe9")).write_bytes(b"latin-1")
    assert [info.key async for info in backend.list()] == ["a"]


@pytest.mark.parametrize("name", ["lost+found", "private"])
async def test_directory_that_may_not_be_read(
    backend: FileSystemBackend, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, name: str
) -> None:
    await backend.write("a", b"x")
    await backend.write("z", b"x")
    hidden = Path(backend.root, name)
    hidden.mkdir()
    scan = hidden.stat().st_ino
    opened = os.open

    def forbidden(path: Any, flags: int, *args: Any, **options: Any) -> int:
        if path == "." and os.fstat(options["dir_fd"]).st_ino == scan:
            raise PermissionError(errno.EACCES, "Permission denied")
        return opened(path, flags, *args, **options)

    monkeypatch.setattr(_posix.os, "open", forbidden)
    if name == "private":
        with pytest.raises(AccessDenied):
            [info.key async for info in backend.list()]
    else:
        assert [info.key async for info in backend.list()] == ["a", "z"]
        assert "lost+found" in caplog.text


# -- modes


@pytest.fixture(params=[0o022, 0o077, 0o000])
def umask(request: pytest.FixtureRequest) -> Iterator[int]:
    before = os.umask(request.param)
    try:
        yield request.param
    finally:
        os.umask(before)


def mode_of(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


@pytest.mark.parametrize("anonymous", [None, False])
@pytest.mark.parametrize("file_mode", [None, 0o644, 0o600, 0o440, 0o666])
@pytest.mark.parametrize("directory_mode", [None, 0o755, 0o700, 0o777])
async def test_modes(
    tmp_path: Path, umask: int, file_mode: int | None, directory_mode: int | None, anonymous: bool | None
) -> None:
    root = tmp_path / "root"
    made = FileSystemBackend(root, file_mode=file_mode, directory_mode=directory_mode)
    made._tree.anonymous = anonymous
    upload = tmp_path / "upload"
    upload.touch(0o600)
    upload.write_bytes(b"uploaded")
    moved = Source.of(upload)
    moved.temporary_path, moved.path = str(upload), None
    for name, body in {"small": b"x", "big": pieces(pattern(BIG)), "path": Path(__file__), "moved": moved}.items():
        await made.write(f"a/b/{name}", body)
        if name == "moved" and file_mode is not None:
            assert moved.taken is not None
            assert mode_of(root / "a" / "b" / name) & 0o177 == 0, "nobody sees more of it while it has its old name"
            await moved.taken.release()  # as a storage does once the record is there
        wanted = 0o666 & ~umask if file_mode is None else file_mode
        assert oct(mode_of(root / "a" / "b" / name)) == oct(wanted), name
    for directory in (root, root / "a", root / "a" / "b"):
        assert mode_of(directory) == (0o777 & ~umask if directory_mode is None else directory_mode)


async def test_inherited_setgid_bit_stays(tmp_path: Path) -> None:
    root = tmp_path / "root"
    root.mkdir()
    root.chmod(0o2775)
    await FileSystemBackend(root, directory_mode=0o750).write("a/b", b"x")
    assert mode_of(root / "a") == 0o2750
