"""What may be passed for a MongoDB database, what is refused and with which words; documents and indexes of others."""

from __future__ import annotations

import asyncio
import contextlib
import subprocess
import sys
import traceback
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pymongo
import pytest
from motor.motor_asyncio import AsyncIOMotorClient
from pymongo import AsyncMongoClient, WriteConcern

from aproxy_storage import AccessDenied, BackendUnavailable, Conflict, ProxyStorage, StorageError, Timeouts
from aproxy_storage.backends.filesystem import FileSystemBackend
from aproxy_storage.backends.gridfs import GridFSBackend
from aproxy_storage.config import meta_backend_from_url, original_from_url
from aproxy_storage.errors import AlreadyExists, ConfigurationError
from aproxy_storage.meta_backends import _mongo_clock
from aproxy_storage.meta_backends._mongo_clock import ServerClock
from aproxy_storage.meta_backends.mongo import MongoMetaBackend
from aproxy_storage.records import DELETING, PENDING, Place, Revision
from aproxy_storage.testing.meta_backends import make_record
from tests.services.mongo import DRIVERS, FORGOTTEN_SOCKETS, Borrowed, MongoServer, in_database

pytestmark = FORGOTTEN_SOCKETS

ROOT = Path(__file__).parents[2]
SECRET = "p@ss/w:rd"
QUOTED = "p%40ss%2Fw%3Ard"


# -- what is passed


@pytest.mark.asyncio
@pytest.mark.parametrize("driver", DRIVERS)
async def test_borrowed_database_is_never_closed(driver: str, mongo_url: str, mongo_database: Any) -> None:
    borrowed = Borrowed(driver, mongo_url, mongo_database.name)
    database = borrowed()
    for _ in range(2):
        async with MongoMetaBackend(database) as meta, GridFSBackend(database) as backend:
            await meta.create(make_record(f"a{_}"))
            await backend.write(f"a{_}", b"x")
        assert await database.command("ping")
    assert str(meta) == f"MongoMetaBackend({mongo_database.name}.aproxy_files)"
    assert backend.full_path("a/b") == f"gridfs://{mongo_database.name}/fs/a/b"
    await borrowed.close()


@pytest.mark.asyncio
@pytest.mark.parametrize("kind", [MongoMetaBackend, GridFSBackend])
async def test_what_is_no_asynchronous_database(kind: Callable[[Any], Any], mongo_url: str) -> None:
    with pymongo.MongoClient(mongo_url, connect=False) as blocking:
        with pytest.raises(ConfigurationError, match=r"blocks the event loop.*AsyncMongoClient"):
            kind(blocking["app"])
        async with kind(lambda: blocking["app"]) if kind is GridFSBackend else GridFSBackend(lambda: 5) as backend:
            with pytest.raises(ConfigurationError, match="AsyncMongoClient"):
                await backend.stat("a")
    async with AsyncMongoClient(mongo_url, connect=False) as client:
        for wrong in (client, client["app"]["files"], None, 5, b"mongodb://x/y", AsyncIOMotorClient(connect=False)):
            with pytest.raises(ConfigurationError, match=r"not an asynchronous MongoDB database.*\['name'\]"):
                kind(wrong)


def test_uris_that_are_refused_tell_no_secret() -> None:
    for uri, word in [
        (f"mongodb://user:{QUOTED}@host", "names no database"),
        (f"mongodb://user:{QUOTED}@host/?w=1", "names no database"),
        (f"mysql://user:{QUOTED}@host/app", "not a MongoDB URI"),
        ("app", "not a MongoDB URI"),
    ]:
        for kind in (MongoMetaBackend, GridFSBackend):
            with pytest.raises(ConfigurationError, match=word) as caught:
                kind(uri)
            assert_silent(caught.value)


@pytest.mark.asyncio
async def test_uris_that_the_driver_refuses_tell_no_secret() -> None:
    for uri in (
        f"mongodb://user:{SECRET}@host/app",
        f"mongodb://user:{QUOTED}@host:port/app",
        f"mongodb://user:{QUOTED}@host/app?tls=true&tlsInsecure=true&tlsAllowInvalidCertificates=true",
        f"mongodb://user:{QUOTED}@host/a.b",
    ):
        with pytest.raises(ConfigurationError) as caught:
            async with MongoMetaBackend(uri) as meta:
                await meta.count()
        assert_silent(caught.value)


def assert_silent(error: BaseException) -> None:
    told = "".join(traceback.format_exception(error))
    told = "".join(line for line in told.splitlines(True) if 'f"mongodb://' not in line)
    for secret in (SECRET, QUOTED, "w:rd", "w%3Ard"):
        assert secret not in str(error)
        assert secret not in repr(error)
        assert f"{secret}@" not in told


def test_urls() -> None:
    meta = meta_backend_from_url(
        f"mongodb://user:{QUOTED}@a:1,b:2/app?replicaSet=rs&collection=files&timeouts.operation=9&w=1"
    )
    assert isinstance(meta, MongoMetaBackend)
    assert (meta.collection, meta.timeouts.operation, meta.durable) == ("files", 9.0, True)
    assert meta._databases._given == f"mongodb://user:{QUOTED}@a:1,b:2/app?replicaSet=rs&w=1"
    assert str(meta) == "MongoMetaBackend(app.files)"
    backend = original_from_url("gridfs+mongodb+srv://host/app?bucket=photos&chunk_bytes=1048576&tls=true")
    assert isinstance(backend, GridFSBackend)
    assert (backend.bucket, backend.chunk_bytes) == ("photos", 1 << 20)
    assert backend._databases._given == "mongodb+srv://host/app?tls=true"
    assert backend.full_path("a/b") == "gridfs://app/photos/a/b"
    with pytest.raises(ConfigurationError, match="chunk_bytes"):
        original_from_url("gridfs+mongodb://host/app?chunk_bytes=many")


def test_settings_that_cannot_be() -> None:
    for wrong in ({"chunk_bytes": 0}, {"chunk_bytes": 16 << 20}, {"bucket": ""}):
        with pytest.raises(ConfigurationError):
            GridFSBackend("mongodb://host/app", **wrong)  # type: ignore[arg-type]
    with pytest.raises(ConfigurationError, match="acknowledge"):
        MongoMetaBackend("mongodb://host/app", write_concern=WriteConcern(w=0))
    assert not MongoMetaBackend("mongodb://host/app", write_concern=WriteConcern(w=1)).durable


def test_without_the_driver() -> None:
    for module in ("meta_backends.mongo", "backends.gridfs"):
        text = f"""
import sys
sys.modules["pymongo"] = None
import aproxy_storage
try:
    import aproxy_storage.{module}
except aproxy_storage.MissingDependency as error:
    print(error)
"""
        done = subprocess.run([sys.executable, "-c", text], capture_output=True, text=True, cwd=ROOT)
        assert "pip install 'aproxy-storage[mongo]'" in done.stdout, done.stderr


# -- loops


@pytest.mark.asyncio
@pytest.mark.parametrize("driver", DRIVERS)
async def test_database_of_another_loop(driver: str, mongo_url: str, mongo_database: Any) -> None:
    borrowed = Borrowed(driver, mongo_url, mongo_database.name)
    database = borrowed()
    await database.command("ping")

    async def elsewhere() -> list[BaseException]:
        errors = []
        for made in (MongoMetaBackend(database), MongoMetaBackend(lambda: database)):
            with pytest.raises(ConfigurationError) as caught:
                await made.count()
            errors.append(caught.value)
        with pytest.raises(ConfigurationError) as caught:
            await GridFSBackend(database).stat("a")
        return [*errors, caught.value]

    for error in await asyncio.to_thread(lambda: asyncio.run(elsewhere())):
        assert "another event loop" in str(error)
        assert "function" in str(error)
        assert "mongodb://" in str(error)
    async with MongoMetaBackend(database) as meta:  # its own
        assert await meta.count() == 0
    await borrowed.close()
    with pytest.raises(StorageError) as closed:
        await meta.count()
    assert isinstance(closed.value, ConfigurationError) or driver == "motor"


def test_clients_of_a_uri_are_closed_with_their_loop(mongo_url: str) -> None:
    """Nobody calls aclose; a client that is collected unclosed would warn, which is an error here."""
    meta = MongoMetaBackend(in_database(mongo_url, "aproxy_nobody"))
    for _ in range(3):
        assert asyncio.run(meta.count()) == 0


# -- rights


@pytest.fixture(scope="module")
def guarded() -> Any:
    """Give a server that asks for passwords."""
    server = MongoServer()
    try:
        server.start("--sync-on-commit")
        with pymongo.MongoClient(server.url) as client:
            client["app"].command("createUser", "writer", pwd=SECRET, roles=["readWrite"])
            client["app"].command("createUser", "reader", pwd=SECRET, roles=["read"])
        server.kill9()
        server.start("--auth")
        yield server
    finally:
        server.stop()


def url_of(server: MongoServer, user: str, password: str) -> str:
    return server.url.replace("//", f"//{user}:{password}@") + "/app"


@pytest.mark.asyncio
async def test_passwords(guarded: MongoServer, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("DEBUG")
    async with MongoMetaBackend(url_of(guarded, "writer", QUOTED)) as meta:
        await meta.create(make_record("a"))
    for user, password in (("writer", "wrong" + QUOTED), ("nobody", QUOTED)):
        url = url_of(guarded, user, password)
        async with GridFSBackend(url) as backend:
            with pytest.raises(ConfigurationError, match=r"user name or the password.*authSource") as caught:
                await backend.stat("a")
            assert_silent(caught.value)
        meta = MongoMetaBackend(url)
        with pytest.raises(ConfigurationError, match=r"user name or the password.*authSource") as caught:
            await meta.count()
        assert_silent(caught.value)
        await meta.aclose()
    assert SECRET not in caplog.text
    assert QUOTED not in caplog.text


@pytest.mark.asyncio
async def test_rights(guarded: MongoServer) -> None:
    async with MongoMetaBackend(url_of(guarded, "writer", QUOTED)) as meta:
        await meta.setup()
    async with MongoMetaBackend(url_of(guarded, "reader", QUOTED)) as meta:
        await meta.count()  # the indexes are there
        with pytest.raises(AccessDenied, match="readWrite"):
            await meta.create(make_record("b"))


@pytest.mark.asyncio
async def test_nobody_there() -> None:
    limits = Timeouts(operation=None)
    meta = MongoMetaBackend("mongodb://127.0.0.1:1/app?serverSelectionTimeoutMS=300", timeouts=limits)
    with pytest.raises(StorageError) as caught:
        await meta.create(make_record("a"))
    assert type(caught.value).__name__ == "BackendUnavailable"
    assert not caught.value.outcome_unknown, "nothing was sent"
    assert "127.0.0.1:1" in str(caught.value)
    assert "Topology" not in str(caught.value)
    await meta.aclose()


# -- indexes


@pytest.mark.asyncio
async def test_indexes_are_made_once(mongo_url: str, mongo_database: Any) -> None:
    url = in_database(mongo_url, mongo_database.name)
    async with MongoMetaBackend(url) as meta:
        await meta.create(make_record("a"))
    made = await mongo_database["aproxy_files"].index_information()
    assert {name for name in made if name.startswith("aproxy")} == {
        "aproxy_original_storage_path",
        "aproxy_places_key",
        "aproxy_unfinished",
    }
    async with MongoMetaBackend(url) as meta:
        await meta.create(make_record("b"))
    assert await mongo_database["aproxy_files"].index_information() == made


@pytest.mark.asyncio
async def test_every_look_up_is_served_by_an_index(mongo_url: str, mongo_database: Any) -> None:
    async with MongoMetaBackend(in_database(mongo_url, mongo_database.name)) as meta:
        await meta.create_many([make_record(f"{n:03}", places=(Place("s3", f"k{n}"),)) for n in range(300)], lease=9.0)
    files = mongo_database["aproxy_files"]
    for wanted in (
        {"path": "007"},
        {"path": {"$in": ["007", "008"]}},
        {"path": {"$gte": "00", "$lt": "01"}},
        {"original_storage_path": {"$in": ["007"]}},
        {"places.key": {"$in": ["k7"]}},
        {"unfinished": True, "path": {"$gt": "100"}},
    ):
        plan = (await files.find(wanted).sort("path", 1).explain())["queryPlanner"]["winningPlan"]
        assert "IXSCAN" in str(plan), (wanted, plan)
        assert "COLLSCAN" not in str(plan), (wanted, plan)


@pytest.mark.asyncio
async def test_collections_that_cannot_be_used(mongo_url: str, mongo_database: Any) -> None:
    url = in_database(mongo_url, mongo_database.name)
    twice = mongo_database["twice"]
    await twice.insert_many([{"path": "a"}, {"path": "a"}])
    loose = mongo_database["loose"]
    await loose.create_index([("path", 1)])
    taken = mongo_database["taken"]
    await taken.create_index([("name", 1)], unique=True)
    for name, word in (("twice", "the same in"), ("loose", "not unique; drop it")):
        async with AsyncMongoClient(url) as client:
            meta = MongoMetaBackend(client[mongo_database.name], name)
            with pytest.raises(ConfigurationError, match=word):
                await meta.count()
    async with MongoMetaBackend(url, "taken") as meta:
        await meta.create(make_record("a", name="same"))
        with pytest.raises(ConfigurationError, match="unique index that is not ours"):
            await meta.create(make_record("b", name="same"))
        (told,) = await meta.create_many([make_record("b", name="same")])
        assert isinstance(told, ConfigurationError)
        assert "unique index that is not ours" in str(told)


@pytest.mark.parametrize(
    "options",
    [
        {"unique": True, "partialFilterExpression": {"public": True}},
        {"unique": True, "collation": {"locale": "en", "strength": 2}},
        {"partialFilterExpression": {"public": True}},
    ],
    ids=["partial", "collation", "not unique"],
)
@pytest.mark.asyncio
async def test_an_index_for_other_documents_is_not_taken_for_ours(
    mongo_url: str, mongo_database: Any, options: dict[str, Any]
) -> None:
    url = in_database(mongo_url, mongo_database.name)
    await mongo_database["beside"].create_index([("path", 1)], name="theirs", **options)
    await mongo_database["named"].create_index([("path", 1)], name="path_1", **options)
    async with MongoMetaBackend(url, "beside") as meta:
        await meta.create(make_record("a"))
    async with MongoMetaBackend(url, "beside") as meta:  # with both
        with pytest.raises(AlreadyExists):
            await meta.create(make_record("a", token="another"))
    with pytest.raises(ConfigurationError, match="beside path_1"):
        async with MongoMetaBackend(url, "named"):
            pass


@pytest.mark.asyncio
async def test_an_index_beside_ours(mongo_url: str, mongo_database: Any) -> None:
    url = in_database(mongo_url, mongo_database.name)
    await mongo_database["fs.files"].create_index([("filename", 1)])
    async with GridFSBackend(url) as files:
        await files.write("a", b"1")
        with pytest.raises(AlreadyExists):
            await files.write("a", b"2")
    async with GridFSBackend(url) as files:
        assert (await files.stat("a")).size == 1


@pytest.mark.asyncio
async def test_what_fails_for_many_is_the_error_of_each() -> None:
    nobody = "mongodb://127.0.0.1:9/nowhere?serverSelectionTimeoutMS=1"
    async with contextlib.aclosing(MongoMetaBackend(nobody)) as meta:
        for operation, answers in (
            ("create", await meta.create_many([make_record("a"), make_record("b")])),
            ("delete", await meta.delete_many([("a", None), ("b", None)])),
        ):
            errors = [answer for answer in answers if isinstance(answer, BackendUnavailable)]
            assert [(error.path, error.operation) for error in errors] == [("a", operation), ("b", operation)]
            assert errors[0] is not errors[1]


# -- documents of django-proxy-storage


@pytest.mark.asyncio
async def test_documents_of_django_proxy_storage(mongo_url: str, mongo_database: Any, tmp_path: Path) -> None:
    (tmp_path / "resume").mkdir()
    (tmp_path / "resume" / "cv.pdf").write_bytes(b"%PDF")
    files = mongo_database["files"]
    await files.create_index([("path", 1)], unique=True)  # as it makes it
    path = str(tmp_path / "resume" / "cv.pdf")
    theirs = {
        "path": path,
        "original_storage_path": "resume/cv.pdf",
        "proxy_storage_name": "media",
        "content_type_id": 7,
        "object_id": 42,
        "field": "cv",
    }
    inserted = await files.insert_one(dict(theirs))
    storage = ProxyStorage(
        "media",
        originals=FileSystemBackend(tmp_path),
        meta=MongoMetaBackend(in_database(mongo_url, mongo_database.name), "files"),
    )
    async with storage:
        record = await storage.get(path)
        assert (record["object_id"], record["field"], record["_id"]) == (42, "cv", inserted.inserted_id)
        assert (record.state, record.version, record.token) == ("stored", 0, "")
        async with storage.open(path) as file:
            assert await file.read() == b"%PDF"
        changed = await storage.update(path, extra={"note": "seen"})
        assert (changed["object_id"], changed["note"]) == (42, "seen")
        document = await files.find_one({"path": path})
        assert {name: document[name] for name in theirs} == theirs
        assert [one.path async for one in storage.list()] == [path]
        with pytest.raises(Conflict):
            await storage.meta.update(path, {"size": 1}, expect=Revision("", 1))
        with pytest.raises(Conflict):
            await storage.meta.update(path, {"size": 1}, expect=Revision("x", 0))
        assert (await storage.meta.update(path, {"size": 4}, expect=Revision("", 0))).size == 4
        assert [type(answer) for answer in await storage.meta.delete_many([(path, Revision("", 1))])] == [Conflict]
        moved = await storage.rename(path, "cv.pdf")
        assert moved["object_id"] == 42
        await storage.delete("cv.pdf")
    assert await files.count_documents({}) == 0
    assert not (tmp_path / "resume" / "cv.pdf").exists()


@pytest.mark.asyncio
async def test_finished_records_leave_the_small_index(mongo_url: str, mongo_database: Any) -> None:
    async with MongoMetaBackend(in_database(mongo_url, mongo_database.name)) as meta:
        files = mongo_database["aproxy_files"]

        async def unfinished() -> bool:
            return bool((await files.find_one({"path": "a"})).get("unfinished"))

        await meta.create(make_record("a", state=PENDING), lease=5.0)
        assert await unfinished()
        await meta.update("a", {}, lease=None)
        assert await unfinished(), "pending without a lease"
        await meta.update("a", {"state": "stored"})
        assert not await unfinished()
        await meta.update("a", {"size": 1}, lease=5.0)
        assert await unfinished()
        await meta.update("a", {"state": "stored"})
        assert await unfinished(), "stored, with a lease"
        await meta.update("a", {}, lease=None)
        assert not await unfinished()
        await meta.update("a", {"state": DELETING})
        assert await unfinished()
        await meta.update("a", {"state": "stored"}, lease=None)
        assert not await unfinished()


# -- the clock


class FakeServer:
    """A server whose clock is an hour off and can be set: no server of the tests has one."""

    def __init__(self, *, aware: bool) -> None:
        self.ahead = timedelta(hours=1)
        self.aware = aware
        self.asked = 0

    def time(self) -> datetime:
        return datetime.now(UTC) + self.ahead

    async def command(self, name: str) -> dict[str, Any]:
        assert name == "hello"
        self.asked += 1
        told = self.time().replace(microsecond=0)
        return {"localTime": told if self.aware else told.replace(tzinfo=None)}


@pytest.mark.asyncio
@pytest.mark.parametrize("aware", [True, False])
async def test_leases_are_begun_by_the_servers_clock(aware: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    server = FakeServer(aware=aware)
    clock = ServerClock(server)
    told = await asyncio.gather(*(clock.now() for _ in range(20)))
    assert server.asked == 1
    for moment in told:
        assert abs(moment - server.time()) < timedelta(seconds=2)
    read = await clock.read()
    assert read <= server.time()
    elapsed = _mongo_clock._elapsed
    monkeypatch.setattr(_mongo_clock, "_elapsed", lambda: elapsed() + 9.0)
    later = await clock.now()
    assert timedelta(seconds=7) < later - server.time() < timedelta(seconds=11), "it counts on by itself"
    monkeypatch.setattr(_mongo_clock, "_elapsed", lambda: elapsed() + 11.0)
    server.ahead = timedelta(hours=-1)
    assert abs(await clock.now() - server.time()) < timedelta(seconds=2), "asked anew"
    server.ahead = timedelta(hours=2)
    clock.forget()
    assert abs(await clock.now() - server.time()) < timedelta(seconds=2)
