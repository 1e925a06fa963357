"""Names of storages, the setting, system checks, and the storage of static files."""

import os
import threading
from collections.abc import Iterator
from contextlib import nullcontext
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
from django.apps import apps
from django.contrib.staticfiles.storage import ManifestFilesMixin
from django.core import checks
from django.core.exceptions import ImproperlyConfigured
from django.core.files.base import ContentFile
from django.core.files.storage import storages
from django.core.management import call_command
from django.db import connections, models
from django.test import override_settings
from django.test.utils import isolate_apps

from aproxy_storage import ConfigurationError, ProxyStorage, registry
from aproxy_storage.backends.memory import MemoryBackend
from aproxy_storage.meta_backends.memory import MemoryMetaBackend
from aproxy_storage.meta_backends.orm import ORMMetaBackend
from sync_bridge import BridgeStorage, ProxyStorageFileField, get_storage, proxy_storage_settings
from sync_bridge.bridge import bridge
from sync_bridge.checks import check_storages, check_tables
from tests.bridge.test_bridge import in_child
from tests.django_support.setup import add_database, migrated_sqlite  # noqa: F401


def make(name: str) -> ProxyStorage:
    return ProxyStorage(name, originals=MemoryBackend(), meta=MemoryMetaBackend())


instance = make("instance")
bridged = BridgeStorage(storage=make("bridged"))


def function() -> ProxyStorage:
    return make("function")


class Nameless(ProxyStorage):
    originals = {"m": MemoryBackend()}  # noqa: RUF012
    meta = MemoryMetaBackend()


class Named(Nameless):
    name = "named"


def setting(**targets: Any) -> Any:
    return override_settings(PROXY_STORAGE={"PROXY_STORAGE_CLASSES": targets})


# -- PROXY_STORAGE


def test_the_setting_names_storages() -> None:
    here = __name__
    with setting(
        instance=f"{here}.instance", function=f"{here}.function", named=f"{here}.Named", nameless=f"{here}.Nameless",
        bridged=f"{here}.bridged", live=make("live"),
    ):  # fmt: skip
        classes = proxy_storage_settings.PROXY_STORAGE_CLASSES
        assert {name: storage.name for name, storage in classes.items()} == {name: name for name in classes}
        assert classes["instance"] is instance
        assert get_storage("function") is classes["function"], "made once"
        assert registry.get_storage("named") is classes["named"]
        assert BridgeStorage(storage="nameless").proxy is classes["nameless"]
        assert not check_storages()
        path = BridgeStorage(storage="instance").save("a.txt", ContentFile(b""))
        assert bridge.call(instance.get, path).get_proxy_storage() is instance
    assert proxy_storage_settings.names() == ()
    with pytest.raises(ConfigurationError, match="'named'"):
        get_storage("named")


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"PROXY_STORAGE_CLASSES": {"other": f"{__name__}.instance"}}, "same name in both places"),
        ({"PROXY_STORAGE_CLASSES": {"x": "no.such.thing"}}, "cannot be imported"),
        ({"PROXY_STORAGE_CLASSES": {"x": "os.sep"}}, "not a ProxyStorage"),
        ({"PROXY_STORAGE_CLASSES": {"x": "os.path.join"}}, "cannot be made"),
        ({"PROXY_STORAGE_CLASS": {}}, "no key 'PROXY_STORAGE_CLASS'"),
        ({"PROXY_STORAGE_CLASSES": ["media"]}, "has to be"),
    ],
)
def test_mistakes_in_the_setting_are_found_at_start(given: Any, message: str) -> None:
    with override_settings(PROXY_STORAGE=given):
        (found,) = check_storages()
        assert found.id == "sync_bridge.E002"
        assert message in found.msg
        with pytest.raises(ImproperlyConfigured, match=message):
            _ = proxy_storage_settings.PROXY_STORAGE_CLASSES


def test_a_record_finds_a_storage_that_only_an_alias_describes(tmp_path: Path) -> None:
    options = {"name": "by-alias", "original": "memory://", "meta": f"sqlite:///{tmp_path}/r.sqlite3"}
    with override_settings(STORAGES={"x": {"BACKEND": "sync_bridge.BridgeStorage", "OPTIONS": options}}):
        found = registry.get_storage("by-alias")
        assert found is storages["x"].proxy


@pytest.fixture
def described(tmp_path: Path) -> Iterator[str]:
    """Return the TOML file of one storage, `of-toml`, which an alias names without a name."""
    toml = tmp_path / "aproxy.toml"
    toml.write_text('[storages.of-toml]\noriginals = "memory:"\nmeta = "memory:"\n')
    options = {"config": str(toml)}
    with override_settings(STORAGES={"x": {"BACKEND": "sync_bridge.BridgeStorage", "OPTIONS": options}}):
        yield str(toml)


def test_a_storage_of_a_file_is_known_by_the_name_in_it(described: str) -> None:
    assert "of-toml" not in registry.registered_names(), "nobody has used it yet"
    assert get_storage("of-toml") is storages["x"].proxy
    with pytest.raises(ConfigurationError, match="'of-nobody'"):
        get_storage("of-nobody")
    storage = BridgeStorage(config=described)
    assert storage.options.name is None
    assert storage.name == "of-toml"
    assert "aproxy.toml" in repr(storage)
    assert storage.deconstruct()[2] == {"storage": "of-toml"}
    assert BridgeStorage(config=described, name="of-toml").options.name == "of-toml"


def test_a_file_that_cannot_be_read_keeps_no_other_name_from_being_found(
    described: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    broken = BridgeStorage(config=str(tmp_path / "not-there.toml"))
    with pytest.raises(ConfigurationError, match="no storage named 'nobody'"):
        get_storage("nobody")
    assert "not-there.toml" in caplog.text
    with pytest.raises(ImproperlyConfigured, match="not-there"):
        broken.exists("a.txt")


class Slow:
    """What makes a storage when it is told to."""

    def __init__(self) -> None:
        self.begun, self.go_on = threading.Event(), threading.Event()

    def __call__(self) -> ProxyStorage:
        self.begun.set()
        assert self.go_on.wait(60)
        return make("slow")


@pytest.mark.parametrize("where", ["options", "setting"])
def test_a_fork_while_another_thread_makes_a_storage(where: str) -> None:
    slow = Slow()
    with setting(slow=slow, function=f"{__name__}.function") if where == "setting" else nullcontext():
        storage = BridgeStorage(storage="slow" if where == "setting" else slow)
        other = BridgeStorage(storage="function" if where == "setting" else function)
        maker = threading.Thread(target=lambda: storage.proxy)
        maker.start()
        try:
            assert slow.begun.wait(60)
            assert in_child(lambda: other.proxy.name == "function")
        finally:
            slow.go_on.set()
            maker.join()
            registry.unregister("slow")
        assert storage.proxy.name == "slow"


def test_other_finders_are_asked_too() -> None:
    wanted = make("wanted")
    registry.add_finder(finder := lambda name: wanted if name == "wanted" else None)
    registry.add_finder(finder)
    assert registry.get_storage("wanted") is wanted
    registry._finders.remove(finder)


# -- checks


def ids(found: list[checks.CheckMessage]) -> list[str]:
    return [message.id or "" for message in found]


def with_default(**options: Any) -> Any:
    return override_settings(STORAGES={"default": {"BACKEND": "sync_bridge.BridgeStorage", "OPTIONS": options}})


@pytest.mark.parametrize(
    ("options", "expected", "message"),
    [
        ({}, [], ""),
        ({"durabilty": "power"}, ["sync_bridge.E001"], "did you mean 'durability'"),
        ({"storage": "no.such"}, ["sync_bridge.E001"], "cannot be imported"),
        ({"original": "gopher://x"}, ["sync_bridge.E001"], "gopher"),
        ({"meta": "no.Model"}, ["sync_bridge.E001"], "no.Model"),
        ({"meta": "shelf.Shelf"}, ["sync_bridge.E010"], "shelf.Shelf has no column path, proxy_storage_name"),
        ({"prefix": 3}, ["sync_bridge.E001"], "prefix=3"),
        ({"base_url": 3}, ["sync_bridge.E001"], "base_url=3"),
        ({"file_permissions_mode": "0644"}, ["sync_bridge.E001"], "file_mode='0644': give a number, such as 0o644"),
        ({"placement": "fallback"}, ["sync_bridge.E001"], "placement='fallback': give a Placement"),
        ({"timeouts": {"operation": 5}}, ["sync_bridge.E001"], "timeouts={'operation': 5}: give a Timeouts"),
        ({"checksum": "nope"}, ["sync_bridge.E001"], "checksum='nope'"),
        ({"max_path_bytes": 0}, ["sync_bridge.E001"], "max_path_bytes=0"),
        ({"lease": "60"}, ["sync_bridge.E001"], "lease='60': give a number"),
        ({"keep_replaced": None}, ["sync_bridge.E001"], "keep_replaced=None: give a number"),
        ({"on_attempt": 3}, ["sync_bridge.E001"], "on_attempt=3"),
        ({"location": "/dev/null/no/media", "name": "nowhere"}, [], ""),
        ({"location": "{tmp}/x"}, ["sync_bridge.W002"], "no name"),
        ({"location": "{tmp}/static/x", "name": "x"}, ["sync_bridge.E004"], "inside STATIC_ROOT"),
        ({"location": "", "name": "x"}, ["sync_bridge.E003"], "working directory"),
        ({"meta": "sqlite:///{tmp}/media/records.sqlite3"}, ["sync_bridge.E005"], "web servers publish"),
        ({"meta": "sqlite:///{tmp}/static/records.sqlite3"}, ["sync_bridge.E005"], "web servers publish"),
        ({"meta": "sqlite:///{tmp}/records.sqlite3"}, [], ""),
        (
            {"meta": "shelf.PlainFile", "originals": {"a": "memory://", "b": "memory://"}, "name": "n"},
            ["sync_bridge.E006"],
            "several originals",
        ),
        ({"meta": "shelf.NamedFile", "originals": {"a": "memory://", "b": "memory://"}, "name": "n"}, [], ""),
    ],
)
def test_mistakes_in_storages_are_found_at_start(
    options: dict[str, Any], expected: list[str], message: str, tmp_path: Path
) -> None:
    given = {
        key: value.replace("{tmp}", str(tmp_path)) if isinstance(value, str) else value
        for key, value in options.items()
    }
    with override_settings(MEDIA_ROOT=tmp_path / "media", STATIC_ROOT=tmp_path / "static"), with_default(**given):
        found = check_storages()
        assert ids(found) == expected
        assert all(message in one.msg for one in found)


@pytest.fixture
def unsupported() -> Iterator[str]:
    """A database that cannot keep records, and cannot be connected to."""
    add_database("unsupported", {"ENGINE": "django.db.backends.dummy"})
    assert connections["unsupported"].vendor == "unknown"
    yield "unsupported"
    del connections["unsupported"], connections.settings["unsupported"]


@pytest.mark.parametrize(
    ("using", "message"), [("unsupported", "which is unknown"), ("nowhere", "which is not in DATABASES")]
)
def test_records_in_a_database_that_cannot_keep_them(using: str, message: str, unsupported: str) -> None:
    meta = f"django-orm://shelf.Document?using={using}"
    with with_default(meta=meta, original="memory:", name="x"):
        (found,) = check_storages()
    assert (found.id, found.level) == ("sync_bridge.E009", checks.ERROR)
    assert f"STORAGES['default'] keeps its records in the database {using!r}, {message}" in found.msg
    storage = ProxyStorage("cv", originals=MemoryBackend(), meta=ORMMetaBackend("shelf.Document", using))
    with setting(cv=storage):
        assert "sync_bridge.E009" in ids(check_storages())


class OfNoRequest:
    """A router that knows a database only during a request."""

    def db_for_write(self, model: Any, **hints: Any) -> str:
        raise RuntimeError("outside of a request")

    db_for_read = db_for_write


def test_a_router_that_names_no_database_when_the_checks_run(default: BridgeStorage, tmp_path: Path) -> None:
    aliases = {
        alias: {"BACKEND": "sync_bridge.BridgeStorage", "OPTIONS": options}
        for alias, options in (("default", {}), ("second", {"location": f"{tmp_path}/second", "name": "second"}))
    }
    with override_settings(STORAGES=aliases, DATABASE_ROUTERS=[OfNoRequest()]):
        found = checks.run_checks(databases=["default"])
    # What needs no database is looked at all the same.
    assert [id for id in ids(found) if id.startswith("sync_bridge")] == ["sync_bridge.W006"]
    storage = ProxyStorage("cv", originals=MemoryBackend(), meta=ORMMetaBackend("shelf.Document"))
    with setting(cv=storage), override_settings(DATABASE_ROUTERS=[OfNoRequest()]):
        assert check_storages() == []


LOCAL = {"location": "{tmp}/private", "name": "private"}


@pytest.mark.parametrize(
    ("first", "second", "warned"),
    [
        ({}, LOCAL, True),
        ({}, {**LOCAL, "prefix": "private"}, True),
        ({}, {**LOCAL, "meta": "shelf.Document"}, False),
        ({}, {"location": "{tmp}/media", "name": "again"}, False),
        ({}, {}, False),
        ({}, {"originals": {"private": "file://{tmp}/private"}, "name": "private"}, False),
        (
            {"original": "file://{tmp}/a", "meta": "sqlite:///{tmp}/r.sqlite3", "name": "a"},
            {"original": "file://{tmp}/b", "meta": "sqlite:///{tmp}/r.sqlite3", "name": "b"},
            True,
        ),
        (
            {"original": "file://{tmp}/a", "meta": "sqlite:///{tmp}/r.sqlite3", "name": "a"},
            {"original": "file://{tmp}/b", "meta": "sqlite:///{tmp}/s.sqlite3", "name": "b"},
            False,
        ),
        (
            {"original": "memory:", "meta": "postgresql://app:secret@db.example/app", "name": "a"},
            {"original": "file://{tmp}/b", "meta": "postgresql://app:secret@db.example/app", "name": "b"},
            True,
        ),
        (
            {"original": "file://{tmp}/a", "meta": "memory:", "name": "a"},
            {"original": "file://{tmp}/b", "meta": "memory:", "name": "b"},
            False,
        ),
    ],
)
def test_storages_that_share_names_by_mistake_are_found(
    first: dict[str, Any], second: dict[str, Any], warned: bool, tmp_path: Path
) -> None:
    def placed(given: Any) -> Any:
        if isinstance(given, dict):
            return {key: placed(value) for key, value in given.items()}
        return given.replace("{tmp}", str(tmp_path))

    given = {
        alias: {"BACKEND": "sync_bridge.BridgeStorage", "OPTIONS": placed(options)}
        for alias, options in (("default", first), ("second", second))
    }
    with override_settings(MEDIA_ROOT=tmp_path / "media", STORAGES=given):
        found = check_storages()
        assert ids(found) == ["sync_bridge.W006"] * warned
        for message in found:
            assert "STORAGES['default'] and STORAGES['second']" in message.msg
            assert "one set of names" in message.msg
            assert "secret" not in message.msg
            assert "meta=" in (message.hint or "")


@pytest.mark.parametrize(
    ("options", "warned"),
    [
        ({"location": "{tmp}/media/private"}, True),
        ({"original": "file://{tmp}/media/private"}, True),
        ({"location": "{tmp}/link/private"}, True),
        ({"originals": {"a": "gs://bucket", "b": "gs://bucket/resumes"}}, True),
        ({"originals": {"a": "gs://bucket/cv", "b": "gs://bucket/cvs"}}, False),
        ({"location": "{tmp}/media-private"}, False),
        ({"location": "{tmp}/media"}, False),
    ],
)
def test_originals_inside_others_are_found(options: dict[str, Any], warned: bool, tmp_path: Path) -> None:
    (tmp_path / "media").mkdir()
    (tmp_path / "link").symlink_to("media")
    placed = {key: value.format(tmp=tmp_path) if isinstance(value, str) else value for key, value in options.items()}
    second = {"BACKEND": "sync_bridge.BridgeStorage", "OPTIONS": {**placed, "name": "second", "meta": "memory:"}}
    given = {"default": {"BACKEND": "sync_bridge.BridgeStorage"}, "second": second}
    with override_settings(MEDIA_ROOT=tmp_path / "media", STORAGES=given):
        assert ids(check_storages()) == ["sync_bridge.W007"] * warned


def test_a_missing_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    from aproxy_storage import config
    from aproxy_storage.errors import MissingDependency

    def fail(url: str) -> Any:
        raise MissingDependency.of("aioboto3", "s3")

    monkeypatch.setattr(config, "original_from_url", fail)
    with with_default(original="s3://bucket", name="x"):
        (found,) = check_storages()
    assert "pip install 'aproxy-storage[s3]'" in found.msg


def test_what_a_field_needs() -> None:
    def check(storage: Any) -> list[str]:
        with isolate_apps("tests.bridge.desk"):

            class Letter(models.Model):
                file = ProxyStorageFileField(storage=storage)

                class Meta:
                    app_label = "desk"

            return ids(Letter.check())

    from django.core.files.storage import FileSystemStorage, default_storage

    assert check(None) == check(default_storage) == []
    assert check(FileSystemStorage()) == ["sync_bridge.E007"]
    assert check(BridgeStorage(storage="unknown")) == ["sync_bridge.E001"]
    assert check(BridgeStorage(name="bare", original="memory://", meta="shelf.PlainFile")) == ["sync_bridge.E008"]
    assert check(BridgeStorage(name="own", original="memory://", meta="shelf.Document")) == []
    nowhere = "django-orm://shelf.Document?using=nowhere"
    assert check(BridgeStorage(name="lost", original="memory://", meta=nowhere)) == ["sync_bridge.E009"]
    without = [name for name in _installed() if name != "django.contrib.contenttypes"]
    with override_settings(INSTALLED_APPS=[name for name in without if "django.contrib" not in name]):
        assert check(BridgeStorage(name="x", original="memory://", meta="memory://")) == ["sync_bridge.W005"]


def _installed() -> list[str]:
    return [config.name for config in apps.get_app_configs()]


def test_tables_are_looked_at_where_databases_are_named(default: BridgeStorage, media: Path) -> None:
    assert check_tables() == []
    assert check_tables(databases=["default"]) == []
    media.mkdir()
    (media / "old.txt").write_bytes(b"")
    assert ids(check_tables(databases=["default"])) == ["sync_bridge.W004"]
    default.save("new.txt", ContentFile(b""))
    assert check_tables(databases=["default"]) == []
    from django.db import connection
    from django.db.utils import OperationalError

    from sync_bridge.models import StoredFile

    with connection.schema_editor() as editor:
        editor.delete_model(StoredFile)
    assert ids(check_tables(databases=["default"])) == ["sync_bridge.W003"]
    with pytest.raises((OperationalError, ConfigurationError)):
        default.exists("a.txt")


def test_the_whole_project_is_in_order(default: BridgeStorage) -> None:
    found = checks.run_checks(databases=["default"])
    assert not [message for message in found if (message.id or "").startswith("sync_bridge")]


# -- static files


class ManifestStorage(ManifestFilesMixin, BridgeStorage):
    pass


@pytest.fixture
def sources(tmp_path: Path) -> Iterator[Path]:
    (tmp_path / "src" / "css").mkdir(parents=True)
    (tmp_path / "src" / "css" / "site.css").write_text("body { background: url(dot.png) }")
    (tmp_path / "src" / "css" / "dot.png").write_bytes(b"dot")
    apps_ = [*(name for name in _installed() if name != "django.contrib.admin"), "django.contrib.staticfiles"]
    with override_settings(
        STATICFILES_DIRS=[tmp_path / "src"],
        STATICFILES_FINDERS=["django.contrib.staticfiles.finders.FileSystemFinder"],
        INSTALLED_APPS=[name for name in apps_ if "admin" not in name],
    ):
        yield tmp_path / "src"


def static_storage(tmp_path: Path, backend: str, kind: str) -> dict[str, Any]:
    options: dict[str, Any] = {"base_url": "/static/", "meta": f"sqlite:///{tmp_path}/static.sqlite3", "name": "static"}
    if kind == "directory":
        options["location"] = str(tmp_path / "public")
    else:
        options["original"] = MemoryBackend()
    return {"staticfiles": {"BACKEND": backend, "OPTIONS": options}}


@pytest.mark.parametrize("kind", ["directory", "memory"])
def test_collectstatic(sources: Path, tmp_path: Path, kind: str) -> None:
    with override_settings(STORAGES=static_storage(tmp_path, "sync_bridge.BridgeStorage", kind)):
        out = StringIO()
        for _ in range(2):
            call_command("collectstatic", interactive=False, stdout=out)
        assert "2 static files copied" in out.getvalue()
        assert "0 static files copied, 2 unmodified" in out.getvalue()
        os.utime(sources / "css" / "dot.png", (4_000_000_000, 4_000_000_000))
        (sources / "css" / "dot.png").write_bytes(b"changed")
        os.utime(sources / "css" / "dot.png", (4_000_000_000, 4_000_000_000))
        call_command("collectstatic", interactive=False, verbosity=0)
        storage = storages["staticfiles"]
        with storage.open("css/dot.png") as file:
            assert file.read() == b"changed"
        assert storage.url("css/dot.png") == "/static/css/dot.png"
        if kind == "directory":
            assert (tmp_path / "public/css/dot.png").read_bytes() == b"changed"
        for name in ("old.css", "css/old.css", "css/deep/old.css"):
            storage.save(name, ContentFile(b"of an earlier release"))
        call_command("collectstatic", interactive=False, clear=True, verbosity=0)
        assert storage.listdir("") == (["css"], [])
        assert storage.listdir("css") == ([], ["dot.png", "site.css"])
        bridge.call(storage.proxy.aclose)


@pytest.mark.parametrize("kind", ["directory", "memory"])
def test_the_manifest_mixin(sources: Path, tmp_path: Path, kind: str) -> None:
    with override_settings(DEBUG=False, STORAGES=static_storage(tmp_path, f"{__name__}.ManifestStorage", kind)):
        for _ in range(2):
            call_command("collectstatic", interactive=False, verbosity=0)
        storage = storages["staticfiles"]
        url = storage.url("css/site.css")
        assert url.startswith("/static/css/site.")
        assert url != "/static/css/site.css"
        with storage.open(url.removeprefix("/static/")) as file:
            assert b"dot." in file.read()
        again = type(storage)(**storage._given)
        assert again.url("css/site.css") == url, "the manifest is read back"
        bridge.call(storage.proxy.aclose)
