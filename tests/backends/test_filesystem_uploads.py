"""A caller's temporary file that becomes an object without a copy: what it is, and whose, at each step."""

import asyncio
import errno
import os
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from aproxy_storage.backends import _draft, _handles, _taking, filesystem
from aproxy_storage.backends.filesystem import FileSystemBackend
from aproxy_storage.content import Source
from aproxy_storage.errors import AlreadyExists, OutOfSpace, StorageError
from aproxy_storage.testing._backend_hooks import BIG, pattern
from tests.backends.test_filesystem import content, everything_below
from tests.placement.test_fallback import Upload

pytestmark = pytest.mark.asyncio

DATA = pattern(BIG)


@pytest.fixture
def upload(tmp_path: Path) -> Path:
    path = tmp_path / "upload"
    path.touch(0o600)
    path.write_bytes(DATA)
    return path


def source_of(path: Path, **options: Any) -> Source:
    source = Source.of(path, **options)
    source.temporary_path, source.path = str(path), None
    return source


def assert_untouched(upload: Path) -> None:
    assert upload.read_bytes() == DATA
    assert mode_of(upload) == oct(0o600)
    assert os.listxattr(upload) == []


def mode_of(path: Path) -> str:
    return oct(stat.S_IMODE(path.stat().st_mode))


@pytest.mark.parametrize(
    ("before", "mode", "between"), [(0o600, 0o640, 0o600), (0o666, 0o640, 0o640), (0o640, 0o604, 0o600)]
)
async def test_nobody_else_reads_an_upload_before_its_old_name_is_gone(
    tmp_path: Path, upload: Path, monkeypatch: pytest.MonkeyPatch, before: int, mode: int, between: int
) -> None:
    """It got the mode of objects while it was still found under the name that its uploader had chosen."""
    modes: list[str] = []
    for name in ("fchmod", "unlink"):
        real = getattr(os, name)

        def seen(what: Any, *args: Any, real: Any = real, **options: Any) -> None:
            real(what, *args, **options)
            modes.extend(mode_of(upload) for _ in range(upload.exists()))

        monkeypatch.setattr(_taking.os, name, seen)
    upload.chmod(before)
    async with FileSystemBackend(tmp_path / "files", file_mode=mode) as backend:
        source = source_of(upload)
        await backend.write("a", source)
        modes.append(mode_of(upload))
        assert source.taken is not None
        await source.taken.release()
        assert set(modes) == {oct(between)}
        assert mode_of(Path(backend.root, "a")) == oct(mode)


def same_file(backend: FileSystemBackend, key: str, upload: Path) -> bool:
    return Path(backend.root, key).samefile(upload)


@pytest.mark.parametrize("checksum", ["sha256", None])
async def test_upload_has_both_names_until_it_is_released(
    backend: FileSystemBackend, upload: Path, checksum: str | None
) -> None:
    inode = upload.stat().st_ino
    source = source_of(upload, checksum=checksum)
    await backend.write("dir/a", source, token="tokenOfMove0")
    assert same_file(backend, "dir/a", upload)
    assert mode_of(upload) == oct(0o600), "under its old name, others could read it"
    assert (await backend.stat("dir/a")).token == "tokenOfMove0"
    assert source.taken is not None
    await source.taken.release()
    assert not upload.exists()
    assert Path(backend.root, "dir/a").stat().st_ino == inode
    assert mode_of(Path(backend.root, "dir/a")) == oct(0o644)
    assert await content(backend, "dir/a") == DATA


async def test_upload_that_is_written_as_it_is_has_given_up_its_name(backend: FileSystemBackend, upload: Path) -> None:
    given = Upload(upload)
    with given.file:
        await backend.write("a", given)
    assert not upload.exists()
    assert await content(backend, "a") == DATA


async def test_upload_is_given_back_when_the_object_is_gone(backend: FileSystemBackend, upload: Path) -> None:
    for end in ("give_back", "settle"):
        source = source_of(upload)
        await backend.write("a", source, token=f"tokenOf_{end}")
        assert source.taken is not None
        await backend.discard("a", token=f"tokenOf_{end}")
        await getattr(source.taken, end)()
        assert_untouched(upload)


@pytest.mark.parametrize("end", ["give_back", "settle"])
async def test_object_that_is_still_there_keeps_its_token(backend: FileSystemBackend, upload: Path, end: str) -> None:
    """The discard was not answered, and is done once more."""
    source = source_of(upload)
    await backend.write("a", source, token="tokenOfMove0")
    assert source.taken is not None
    await getattr(source.taken, end)()
    assert upload.exists()
    assert mode_of(upload) == oct(0o644 if end == "settle" else 0o600)
    await backend.discard("a", token="tokenOfMove0")
    assert everything_below(backend.root) == []
    assert upload.read_bytes() == DATA


@pytest.mark.parametrize("meanwhile", ["discarded", "another file", "renamed", "removed"])
async def test_release_takes_no_name_but_that_of_a_stored_file(
    backend: FileSystemBackend, upload: Path, meanwhile: str
) -> None:
    source = source_of(upload)
    await backend.write("a", source)
    assert source.taken is not None
    if meanwhile == "discarded":
        await backend.discard("a")
    elif meanwhile == "renamed":
        upload.rename(upload.with_name("elsewhere"))
    else:
        upload.unlink()
    if meanwhile in ("another file", "renamed"):
        upload.write_bytes(b"another")
    await source.taken.release()
    assert upload.exists() == (meanwhile != "removed")
    assert everything_below(backend.root) == ([] if meanwhile == "discarded" else ["a"])
    if meanwhile == "discarded":
        assert mode_of(upload) == oct(0o600)
    else:
        assert mode_of(Path(backend.root, "a")) == oct(0o644)


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EIO, errno.EXDEV, errno.EPERM])
async def test_upload_whose_link_fails_is_as_it_was(
    backend: FileSystemBackend, upload: Path, monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    """It was left with the mode and the token of an object."""
    link, links = os.link, []

    def refusing(*args: Any, **options: Any) -> None:
        links.append(args)
        if len(links) == 1:
            raise OSError(code, os.strerror(code))
        link(*args, **options)

    monkeypatch.setattr(_draft.os, "link", refusing)
    if code in (errno.EXDEV, errno.EPERM):
        await backend.write("dir/a", source_of(upload))
        assert await content(backend, "dir/a") == DATA
        assert not same_file(backend, "dir/a", upload)
    else:
        with pytest.raises(StorageError):
            await backend.write("dir/a", source_of(upload))
        assert everything_below(backend.root) == []
    assert_untouched(upload)


async def test_link_whose_answer_was_lost_is_found_to_be_ours(
    backend: FileSystemBackend, upload: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    link = os.link

    def again(*args: Any, **options: Any) -> None:
        link(*args, **options)
        link(*args, **options)

    monkeypatch.setattr(_draft.os, "link", again)
    source = source_of(upload)
    await backend.write("a", source)
    assert same_file(backend, "a", upload)
    assert source.taken is not None


@pytest.mark.parametrize("seen", [True, False])
@pytest.mark.parametrize("alias", [False, True])
async def test_upload_that_lies_at_its_key_is_not_removed(
    backend: FileSystemBackend, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, alias: bool, seen: bool
) -> None:
    """It was taken for the outcome of the link, and the only name that it had was removed."""
    directory = Path(backend.root, "in")
    directory.mkdir(parents=True)
    upload = directory / "cv.pdf"
    upload.touch(0o600)
    upload.write_bytes(DATA)
    path = upload
    if alias:
        (tmp_path / "uploads").symlink_to(directory)
        path = tmp_path / "uploads" / "cv.pdf"
    marked: list[bool] = []
    claim = _taking.TakenFile.claim
    monkeypatch.setattr(_taking.TakenFile, "claim", lambda *args: marked.append(claim(*args)) or marked[-1])
    if not seen:  # it came there after the last look
        monkeypatch.setattr(_draft.Draft, "_check_free", lambda *_: None)
    with pytest.raises(AlreadyExists):
        await backend.write("in/cv.pdf", source_of(path))
    assert marked == ([] if seen else [True]), "a crash would have left it as an object of this write"
    assert_untouched(upload)


async def test_key_that_is_taken_while_the_upload_is_hashed(
    backend: FileSystemBackend, upload: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    feed = filesystem.hash_part
    monkeypatch.setattr(
        filesystem, "hash_part", lambda *args: (Path(backend.root, "a").write_bytes(b"theirs"), feed(*args))[1]
    )
    monkeypatch.setattr(_taking.TakenFile, "claim", lambda *_: pytest.fail("marked for nothing"))
    with pytest.raises(AlreadyExists):
        await backend.write("a", source_of(upload))
    assert await content(backend, "a") == b"theirs"


@pytest.mark.parametrize("change", ["claimed", "linked", "renamed", "removed", None])
async def test_upload_is_claimed_only_while_it_is_the_callers_alone(upload: Path, change: str | None) -> None:
    """Whatever happens between the look at it and the claim."""
    file, other = (_draft.CallersFile.open(upload, -1) for _ in range(2))
    assert file is not None
    assert other is not None
    assert _taking.may_be_taken(file)
    if change == "claimed":
        assert _taking.TakenFile(other).claim("tokenOfOther", 0o640)
    elif change == "linked":
        os.link(upload, upload.with_name("second"))
    elif change == "renamed":
        upload.rename(upload.with_name("elsewhere"))
    elif change == "removed":
        upload.unlink()
    before = (os.fstat(file.fd).st_mode, [os.getxattr(file.fd, name) for name in os.listxattr(file.fd)])
    taken = _taking.TakenFile(file)
    assert taken.claim("tokenOfMove0", 0o644) == (change is None)
    if change is not None:
        assert before == (os.fstat(file.fd).st_mode, [os.getxattr(file.fd, name) for name in os.listxattr(file.fd)])


@pytest.mark.parametrize("key", ["a", "b"])
async def test_upload_with_another_name_is_copied(
    backend: FileSystemBackend, upload: Path, monkeypatch: pytest.MonkeyPatch, key: str
) -> None:
    """Somebody else's file at the key was taken for ours, and removed with ours."""
    monkeypatch.setattr(_taking.TakenFile, "claim", lambda *_: pytest.fail("known only after it was hashed"))
    Path(backend.root).mkdir()
    os.link(upload, Path(backend.root, "a"))
    if key == "a":
        with pytest.raises(AlreadyExists):
            await backend.write("a", source_of(upload))
    else:
        await backend.write("b", source_of(upload))
        assert not same_file(backend, "b", upload)
        assert await content(backend, "b") == DATA
    assert_untouched(upload)
    assert same_file(backend, "a", upload)


@pytest.mark.parametrize("keys", [("a", "b"), ("a", "a")])
async def test_two_writes_of_one_upload_share_nothing(
    backend: FileSystemBackend, upload: Path, monkeypatch: pytest.MonkeyPatch, keys: tuple[str, str]
) -> None:
    barrier = asyncio.Barrier(2)
    follow = FileSystemBackend._follow

    async def together(self: FileSystemBackend, draft: Any, source: Any, *args: Any) -> Any:
        if source is None:  # both have taken it, none has moved it
            await barrier.wait()
        return await follow(self, draft, source, *args)

    monkeypatch.setattr(FileSystemBackend, "_follow", together)
    sources = [source_of(upload) for _ in keys]
    answers = await asyncio.gather(
        *(backend.write(key, source) for key, source in zip(keys, sources, strict=True)), return_exceptions=True
    )
    taken = [source.taken for source in sources if source.taken is not None]
    assert len(taken) == 1
    await taken[0].release()
    if keys[0] == keys[1]:
        assert [type(answer) for answer in answers].count(AlreadyExists) == 1
        assert await content(backend, "a") == DATA
    else:
        tokens = {(await backend.stat(key)).token for key in keys}
        assert len(tokens) == 2
        await backend.discard("a")
        assert await content(backend, "b") == DATA


async def test_upload_that_a_crash_has_left_is_copied(backend: FileSystemBackend, upload: Path) -> None:
    """It has the token of a write whose undo may be still to come."""
    for names in (1, 2):
        os.setxattr(upload, _handles.TOKEN_XATTR, b"tokenOfCrash")
        if names == 2:
            os.link(upload, upload.with_name("object"))
        source = source_of(upload)
        await backend.write(f"{names}", source)
        assert source.taken is None
        assert await content(backend, f"{names}") == DATA
        assert os.getxattr(upload, _handles.TOKEN_XATTR) == b"tokenOfCrash"


@pytest.mark.parametrize("refused", ["setxattr", "fchmod"])
async def test_upload_that_cannot_be_marked_is_copied(
    backend: FileSystemBackend, upload: Path, monkeypatch: pytest.MonkeyPatch, refused: str
) -> None:
    real: Callable[..., Any] = getattr(os, refused)

    def refuse(fd: int, *args: Any) -> Any:
        if os.fstat(fd).st_ino == upload.stat().st_ino:
            raise PermissionError(errno.EPERM, "not yours")
        return real(fd, *args)

    monkeypatch.setattr(_taking.os, refused, refuse)
    source = source_of(upload)
    await backend.write("a", source)
    assert source.taken is None
    assert await content(backend, "a") == DATA
    assert_untouched(upload)


@pytest.mark.parametrize("when", ["hashed", "claimed"])
@pytest.mark.parametrize("size", [1000, BIG])
async def test_upload_that_vanishes_is_copied_from_where_it_is_open(
    backend: FileSystemBackend, upload: Path, monkeypatch: pytest.MonkeyPatch, when: str, size: int
) -> None:
    """It was said that the directory of the key was removed, a thousand times."""
    os.truncate(upload, size)
    if when == "hashed":
        feed = filesystem.hash_part
        monkeypatch.setattr(filesystem, "hash_part", lambda *args: (upload.unlink(missing_ok=True), feed(*args))[1])
    else:
        link = os.link

        def vanishing(*args: Any, **options: Any) -> None:
            upload.unlink(missing_ok=True)
            link(*args, **options)

        monkeypatch.setattr(_draft.os, "link", vanishing)
    source = source_of(upload)
    await backend.write("dir/a", source)
    assert source.taken is None
    assert await content(backend, "dir/a") == DATA[:size]
    assert source.checksum == Source.of(DATA[:size]).checksum


async def test_upload_whose_name_is_gone_is_read_where_the_caller_has_it_open(
    backend: FileSystemBackend, upload: Path
) -> None:
    """Another save was faster between the look at the upload and its turn."""
    for movable in (True, False):
        upload.write_bytes(DATA)
        given = Upload(upload)
        source = Source.of(given)
        if not movable:  # as an attempt that is not the last one has it
            source.temporary_path, source.path = None, upload
        upload.unlink()
        with given.file:
            await backend.write(f"{movable}", source)
        assert await content(backend, f"{movable}") == DATA


async def test_durable_upload_is_on_the_disk_before_it_is_seen(
    backend: FileSystemBackend, upload: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    steps: list[str] = []
    fsync, link, inode = os.fsync, os.link, upload.stat().st_ino

    def synced(fd: int) -> None:
        status = os.fstat(fd)
        if status.st_ino == inode:
            steps.append(f"synced as {stat.S_IMODE(status.st_mode):o} with {os.listxattr(fd)}")
        fsync(fd)

    def linked(*args: Any, **options: Any) -> None:
        steps.append("linked")
        link(*args, **options)

    monkeypatch.setattr(_draft.os, "fsync", synced)
    monkeypatch.setattr(_draft.os, "link", linked)
    source = source_of(upload)
    await backend.write("a", source, durable=True)
    assert steps == [f"synced as 600 with ['{_handles.TOKEN_XATTR}']", "linked"]
    assert source.taken is not None
    await source.taken.release()
    assert steps[2:] == [f"synced as 644 with ['{_handles.TOKEN_XATTR}']"]


async def test_write_that_is_full_after_the_link_gives_the_upload_back(
    backend: FileSystemBackend, upload: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, "no room for the directory")

    monkeypatch.setattr(backend._tree, "sync", full)
    with pytest.raises(OutOfSpace):
        await backend.write("a", source_of(upload), durable=True)
    assert_untouched(upload)
    assert everything_below(backend.root) == []
