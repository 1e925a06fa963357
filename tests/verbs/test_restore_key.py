"""A file whose key is not its path gets it back, unless the key is somebody else's."""

import pytest

from aproxy_storage import IntegrityError, NotFound, ProxyStorage
from aproxy_storage.backends.memory import MemoryBackend
from aproxy_storage.meta_backends.memory import MemoryMetaBackend

pytestmark = pytest.mark.asyncio


@pytest.fixture
def storage() -> ProxyStorage:
    return ProxyStorage("media", originals=MemoryBackend(), meta=MemoryMetaBackend(), prefix="p")


async def files(storage: ProxyStorage) -> dict[str, bytes]:
    """Return what lies at every key."""
    found = {}
    async for info in storage.get_original().list():
        async with storage.get_original().read(info.key) as reading:
            found[info.key] = b"".join([chunk async for chunk in reading])
    return found


async def read(storage: ProxyStorage, path: str) -> bytes:
    async with storage.open(path, verify=True) as file:
        return await file.read()


async def test_after_a_replacement_and_a_renaming(storage: ProxyStorage) -> None:
    path = await storage.save("a.txt", b"old", extra={"tag": "x"})
    assert await storage.restore_key(path) == await storage.get(path)
    replaced = await storage.replace(path, b"new", content_type="text/x-own")
    assert replaced.original_storage_path != "a.txt"
    record = await storage.restore_key(path)
    assert (record.original_storage_path, record.places, record.lease) == ("a.txt", (), None)
    assert (record["tag"], record.content_type) == ("x", "text/x-own")
    assert await files(storage) == {"a.txt": b"new"}
    await storage.rename(path, "p/b.txt")
    await storage.restore_key("p/b.txt")
    assert await files(storage) == {"b.txt": b"new"}
    assert await read(storage, "p/b.txt") == b"new"
    with pytest.raises(NotFound):
        await storage.restore_key(path)


async def test_a_key_of_somebody_else_is_left_to_him(storage: ProxyStorage) -> None:
    path = await storage.save("a.txt", b"first")
    await storage.rename(path, "p/b.txt")
    await storage.get_original().write("b.txt", b"foreign")
    await storage.save("a.txt", b"second")
    assert (await storage.restore_key("p/a.txt")).original_storage_path != "a.txt"  # p/b.txt cannot give it up
    assert [await read(storage, name) for name in ("p/a.txt", "p/b.txt")] == [b"second", b"first"]
    await storage.restore_key("p/b.txt")
    assert (await files(storage))["b.txt"] == b"foreign"
    assert await read(storage, "p/b.txt") == b"first"
    await storage.delete("p/b.txt")
    assert (await files(storage))["b.txt"] == b"foreign"
    assert (await storage.restore_key("p/a.txt")).original_storage_path == "a.txt"
    assert await files(storage) == {"a.txt": b"second", "b.txt": b"foreign"}


@pytest.mark.parametrize(
    ("renamings", "wanted"),
    [
        ("at ba tz", {"a": b"b", "z": b"a"}),  # a chain: the key of the first belongs to the last
        ("at ba tb", {"a": b"b", "b": b"a"}),  # an exchange
        ("at ba cb tc", {"a": b"b", "b": b"c", "c": b"a"}),
    ],
)
async def test_names_that_are_passed_on(storage: ProxyStorage, renamings: str, wanted: dict[str, bytes]) -> None:
    for name in set(wanted.values()):
        await storage.save(name.decode(), name)
    for old, new in renamings.split():
        await storage.rename(f"p/{old}", f"p/{new}")
    record = await storage.restore_key("p/a")
    assert (record.original_storage_path, record.places) == ("a", ())
    for name, data in wanted.items():
        assert await read(storage, f"p/{name}") == data
        assert (await storage.restore_key(f"p/{name}")).places == ()
    assert await files(storage) == wanted


async def test_a_file_waits_for_none_that_cannot_give_its_key_up(
    storage: ProxyStorage, caplog: pytest.LogCaptureFixture
) -> None:
    for name in ("a", "b"):
        await storage.save(name, name.encode())
    for old, new in [("a", "t"), ("b", "a"), ("t", "b")]:
        await storage.rename(f"p/{old}", f"p/{new}")
    original = storage.get_original()
    await original.discard("a")
    await original.write("a", b"damaged: not as long as recorded")
    record = await storage.restore_key("p/a")
    assert record == await storage.get("p/a")
    assert await read(storage, "p/a") == b"b"
    assert "'p/b' keeps the key 'a'" in caplog.text
    with pytest.raises(IntegrityError):
        await storage.restore_key("p/b")


async def test_a_storage_with_token_keys_keeps_them() -> None:
    storage = ProxyStorage("media", originals=MemoryBackend(), meta=MemoryMetaBackend(), keys="token")
    record = await storage.get(await storage.save("a.txt", b"x"))
    assert await storage.restore_key("a.txt") == record
