"""Any text as a name: either refused before anything is asked or done, or stored exactly and found again."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio

from aproxy_storage import InvalidPath, NotFound, ProxyStorage
from aproxy_storage.backends.filesystem import FileSystemBackend
from aproxy_storage.meta_backends.sqlite import SQLiteMetaBackend
from tests.proxy.support import SAFETY, assert_sound, on_disk

pytestmark = pytest.mark.asyncio

NEVER = {
    "empty": "",
    "absolute": "/etc/passwd",
    "root": "/",
    "two slashes": "//host/share",
    "dot": ".",
    "dots": "..",
    "upwards": "../up.txt",
    "upwards within": "a/../../up.txt",
    "dot within": "a/./b",
    "dot at the end": "a/.",
    "dots at the end": "a/..",
    "empty part": "a//b",
    "slash at the end": "a/",
    "NUL": "a\0b",
    "NUL at the end": "a.txt\0.png",
    "newline": "a\nb",
    "carriage return": "a\rb",
    "tab": "a\tb",
    "escape": "\x1b[31mred",
    "delete": "a\x7f",
    "C1 control": "a\x85b",
    "line separator": "a\u2028b",
    "backslash": "a\\b",
    "Windows": "C:\\Windows\\win.ini",
    "upwards in Windows": "..\\up.txt",
    "lone surrogate": "a\ud800b",
    "undecodable byte": os.fsdecode(b"a\xffb"),
}

# Never a path, but what somebody wishes for may be shortened.
TOO_LONG = {
    "megabyte": "x" * (1 << 20),
    "megabyte of Japanese": "日" * (1 << 20),
    "1025 bytes": "/".join(["x" * 204] * 5) + "y",
    "1025 bytes in UTF-8": "/".join(["日" * 68] * 5) + "y",
    "1026 bytes, of 2 each": "é" * 513,
}
assert len(TOO_LONG["1025 bytes"].encode()) == len(TOO_LONG["1025 bytes in UTF-8"].encode()) == 1025

# Legal paths that cannot be keys below a directory.
NEVER_A_KEY = {
    "temporary": ".aproxy-x.part",
    "temporary directory": "a/.aproxy-x/b",
    "directory of 256 bytes": "x" * 256 + "/a.txt",
}
TOO_LONG_A_KEY = {
    "part of 256 bytes": "x" * 256,
    "part of 256 bytes in Japanese": "日" * 85 + "x",
}

ALWAYS = {
    "plain": "a.txt",
    "1024 bytes": "/".join(["x" * 204] * 5),
    "1024 bytes in UTF-8": "/".join(["日" * 68] * 5),
    "part of 255 bytes": "x" * 255,
    "part of 255 bytes in Japanese": "日" * 85,
    "part of 255 bytes with a suffix": "x" * 251 + ".txt",
    "upper case": "CASE/Straße.TXT",
    "lower case": "case/straße.txt",
    "NFC": "caf\u00e9.txt",
    "NFD": "cafe\u0301.txt",
    "device of Windows": "CON",
    "device of Windows with a suffix": "aux.txt",
    "hidden": ".hidden",
    "three dots": "...",
    "dots and more": "..a/..b",
    "nearly a temporary": ".aproxy",
    "spaces": " a b ",
    "space": " ",
    "no-break space": "a\u00a0b",
    "right to left": "\u202egnp.exe",
    "zero width": "a\u200bb\ufeff",
    "emoji": "👩\u200d👩\u200d👧.png",
    "astral": "𝔘𝔫𝔦/\U0010ffff",
    "noncharacter": "a\uffffb",
    "percent": "100%",
    "percent-encoded": "%2e%2e%2fetc",
    "LIKE": "a%b_c",
    "GLOB": "a*b?[c]",
    "quotes": "a'b\"c`d",
    "SQL": "'; DROP TABLE aproxy_files; --",
    "shell": "$(rm -rf ~) && a | b > c",
    "option": "-rf",
    "URL": "http:a?b=c&d#e",
    "colon": "a:b",
    "tilde": "~/a",
    "format": "{0} %s {name}",
}


class CountingMeta(SQLiteMetaBackend):
    calls: int = 0

    async def _write(self, *args: Any) -> Any:
        self.calls += 1
        return await super()._write(*args)

    async def _read(self, *args: Any) -> Any:
        self.calls += 1
        return await super()._read(*args)


class CountingFiles(FileSystemBackend):
    calls: int = 0

    async def _call(self, *args: Any, **kwargs: Any) -> Any:
        self.calls += 1
        return await super()._call(*args, **kwargs)


@pytest_asyncio.fixture
async def storage(tmp_path: Path) -> AsyncIterator[ProxyStorage]:
    originals = {"fs": CountingFiles(tmp_path / "files"), "other": CountingFiles(tmp_path / "files")}
    async with asyncio.timeout(SAFETY):
        async with ProxyStorage("media", originals=originals, meta=CountingMeta(tmp_path / "meta.sqlite3")) as storage:
            await storage.save("there.txt", b"there")
            yield storage


def calls(storage: ProxyStorage) -> int:
    return sum(one.calls for one in (*storage.originals.values(), storage.meta))  # type: ignore[attr-defined]


async def content() -> AsyncIterator[bytes]:
    raise AssertionError("the content was asked for")
    yield b""


@pytest.mark.parametrize("name", (NEVER | TOO_LONG).values(), ids=NEVER | TOO_LONG)
async def test_a_name_that_can_never_be_stored_is_refused_before_anything_happens(
    storage: ProxyStorage, tmp_path: Path, name: str
) -> None:
    (tmp_path / "files/lies.txt").write_bytes(b"lies")
    before = calls(storage)
    saves = (
        lambda: storage.save(name, content()),
        lambda: storage.save(name, content(), using="other", max_length=20),
    )
    for attempt in (
        *(saves if name in NEVER.values() else ()),
        lambda: storage.rename("there.txt", name),
        lambda: storage.copy("there.txt", name),
        lambda: storage.copy("there.txt", name, using="other"),
        lambda: storage.adopt("lies.txt", name=name),
        lambda: storage.open(name, "xb"),
    ):
        with pytest.raises(InvalidPath) as caught:
            await attempt()
        assert len(str(caught.value)) < 400
        assert caught.value.path is not None
        str(caught.value).encode()  # can be logged
    assert calls(storage) == before
    # Overwriting looks first: an old record may have such a path. But nothing is written.
    with pytest.raises(InvalidPath):
        await storage.open(name, "wb")
    assert storage.originals["fs"].calls + storage.originals["other"].calls <= before  # type: ignore[attr-defined]
    await storage.aclose()
    (tmp_path / "files/lies.txt").unlink()
    assert await assert_sound(tmp_path, "other") == {"there.txt": b"there"}


@pytest.mark.parametrize("name", (TOO_LONG | TOO_LONG_A_KEY).values(), ids=TOO_LONG | TOO_LONG_A_KEY)
async def test_a_wish_that_is_too_long_is_shortened(storage: ProxyStorage, tmp_path: Path, name: str) -> None:
    paths = [await storage.save(name, b"x"), await storage.save(name, b"x", max_length=name.rfind("/") + 30)]
    for path in paths:
        assert path.rpartition("/")[0] == name.rpartition("/")[0]
        assert len(path.encode()) <= 1024
        assert len(path.rpartition("/")[2].encode()) <= 255
        assert len((await storage.get(path)).name or "") <= 1024
    assert len(paths[1]) <= name.rfind("/") + 30
    await storage.aclose()
    assert await assert_sound(tmp_path, "other") == dict.fromkeys(paths, b"x") | {"there.txt": b"there"}


@pytest.mark.parametrize("name", (NEVER_A_KEY | TOO_LONG_A_KEY).values(), ids=NEVER_A_KEY | TOO_LONG_A_KEY)
async def test_a_name_that_cannot_be_a_key_is_refused_before_anything_happens(
    storage: ProxyStorage, tmp_path: Path, name: str
) -> None:
    if name in NEVER_A_KEY.values():
        before = calls(storage)
        with pytest.raises(InvalidPath):
            await storage.save(name, content())
        assert calls(storage) == before
    with pytest.raises(InvalidPath):
        await storage.copy("there.txt", name)
    for mode in ("wb", "xb"):
        with pytest.raises(InvalidPath):
            async with storage.open(name, mode) as file:  # type: ignore[call-overload]
                await file.write(b"x")
    # A path is not a key: it may be the new name of a file, whose bytes stay where they are.
    record = await storage.rename("there.txt", name)
    assert (record.path, record.original_storage_path) == (name, "there.txt")
    async with storage.open(name) as file:
        assert await file.read() == b"there"
    if ".aproxy-" in name:
        with pytest.raises(InvalidPath):  # its new key would be one of a temporary
            await storage.replace(name, b"new")
        expected = b"there"
    else:
        await storage.replace(name, expected := b"new")
    await storage.aclose()
    assert await assert_sound(tmp_path, "other") == {name: expected}


ODD = NEVER | TOO_LONG | NEVER_A_KEY | TOO_LONG_A_KEY


@pytest.mark.parametrize("name", ODD.values(), ids=ODD)
async def test_looking_up_any_text_finds_nothing_and_never_fails(storage: ProxyStorage, name: str) -> None:
    assert await storage.exists(name) is False
    for look in (
        lambda: storage.get(name),
        lambda: storage.size(name),
        lambda: storage.delete(name),
        lambda: storage.url(name),
        lambda: storage.open(name),
        lambda: anext(storage.stream(name)),
        lambda: storage.replace(name, content()),
        lambda: storage.rename(name, "new.txt"),
        lambda: storage.copy(name, "new.txt"),
        lambda: storage.move(name, "other"),
    ):
        with pytest.raises(NotFound) as caught:
            await look()
        assert len(str(caught.value)) < 400
    await storage.delete(name, missing_ok=True)
    assert await storage.get_many([name, "there.txt"]) == [None, await storage.get("there.txt")]
    found = [record.path async for record in storage.list(name)]
    assert found == (["there.txt"] if name == "" else [])
    assert len([entry async for entry in storage.list("t", after=name, delimiter="/")]) <= 1


async def test_legal_names_are_stored_exactly_and_tell_all_apart(storage: ProxyStorage, tmp_path: Path) -> None:
    """All in one storage: neither case, nor normal form, nor a pattern makes two names one."""
    for name in ALWAYS.values():
        assert await storage.save(name, name.encode()) == name
    for name in ALWAYS.values():
        assert await storage.exists(name)
        async with storage.open(name) as file:
            assert await file.read() == name.encode()
        record = await storage.get(name)
        assert (record.path, record.original_storage_path, record.name) == (name, name, name)
        assert [entry.path async for entry in storage.list(name) if entry.path == name] == [name]
    listed = [record.path async for record in storage.list()]
    assert listed == sorted([*ALWAYS.values(), "there.txt"], key=str.encode)
    assert on_disk(tmp_path).keys() == set(listed)
    # A second file of each name gets another one, within all limits, where that can be.
    for label, name in ALWAYS.items():
        if label in ("1024 bytes", "1024 bytes in UTF-8"):
            continue
        other = await storage.save(name, b"second")
        assert other != name
        assert len(other.encode()) <= 1024
        assert all(len(part.encode()) <= 255 for part in other.split("/"))
    for number, name in enumerate(ALWAYS.values()):
        copied = await storage.copy(name, f"copies/{number}")
        await storage.rename(copied, f"renamed/{number}")
        await storage.replace(name, b"replaced")
        async with storage.open(name) as file:
            assert await file.read() == b"replaced"
        await storage.delete(name)
        assert not await storage.exists(name)
    await storage.aclose()
    files = await assert_sound(tmp_path, "other")
    assert {path: text for path, text in files.items() if path.startswith("renamed/")} == {
        f"renamed/{number}": name.encode() for number, name in enumerate(ALWAYS.values())
    }


async def test_a_name_that_cannot_get_a_free_one_is_refused(storage: ProxyStorage, tmp_path: Path) -> None:
    name = "/".join(["d" * 203] * 5 + ["abc"])
    assert len(name) == 1023
    await storage.save(name, b"first")
    with pytest.raises(InvalidPath, match="no free name"):
        await storage.save(name, b"second")
    await storage.replace(name, b"third")  # under a key in fewer directories
    await storage.aclose()
    assert await assert_sound(tmp_path, "other") == {name: b"third", "there.txt": b"there"}


async def test_a_file_in_the_place_of_a_directory_and_the_other_way_round(
    storage: ProxyStorage, tmp_path: Path
) -> None:
    """Paths do not mind; keys below a directory of a disk do."""
    await storage.save("a", b"a file")
    with pytest.raises(InvalidPath, match="a file lies where"):
        await storage.save("a/b", b"below it")
    with pytest.raises(InvalidPath, match="a file lies where"):
        await storage.save("a/b/c", content_of(b"below it"))
    await storage.save("d/e", b"below a directory")
    assert await storage.save("d", b"in its place") == "d"
    async with storage.open("d") as file:
        assert await file.read() == b"in its place"
    await storage.delete("d")
    await storage.delete("a")
    assert await storage.save("a/b", b"below it") == "a/b"
    await storage.aclose()
    expected = {"a/b": b"below it", "d/e": b"below a directory", "there.txt": b"there"}
    assert await assert_sound(tmp_path, "other") == expected


async def content_of(data: bytes) -> AsyncIterator[bytes]:
    yield data
