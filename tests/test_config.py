"""URLs and TOML files become storages; every error names the file, the line and the way out, and no secret."""

import contextlib
import importlib.metadata
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from aproxy_storage import Backend, ConfigurationError, First, MetaBackend, MissingDependency, ProxyStorage, Timeouts
from aproxy_storage import config as config_module
from aproxy_storage.backends.filesystem import FileSystemBackend
from aproxy_storage.backends.memory import MemoryBackend
from aproxy_storage.config import (
    META_BACKENDS,
    ORIGINALS,
    find_file,
    load,
    meta_backend_from_url,
    original_from_url,
    storage_from_urls,
)
from aproxy_storage.meta_backends.memory import MemoryMetaBackend
from aproxy_storage.meta_backends.sqlite import SQLiteMetaBackend
from aproxy_storage.urls import URL, boolean, choice, mode, optional, redacted

SECRET = "s3cr3t"


@pytest.fixture(autouse=True)
def _in_an_empty_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("APROXY_CONFIG", raising=False)


def written(text: str, name: str = "here.toml") -> Path:
    path = Path(name)
    path.parent.mkdir(exist_ok=True, parents=True)
    path.write_text(text)
    return path


def refused(text: str) -> str:
    with pytest.raises(ConfigurationError) as caught:
        load(written(text))
    return str(caught.value)


# -- URLs


def test_a_url_in_its_parts() -> None:
    url = URL.parse("PostgreSQL://App:p%40ss@DB.example:5433/media%20files?table=a&sslmode=require")
    assert (url.scheme, url.username, url.password) == ("postgresql", "App", "p@ss")
    assert (url.host, url.port, url.path) == ("db.example", 5433, "/media files")
    assert list(url.query) == [("table", "a"), ("sslmode", "require")]


def test_several_hosts_stay_together() -> None:
    url = URL.parse("mongodb://u:p@A:1,b:2/media")
    assert (url.host, url.port, url.username) == ("a:1,b:2", None, "u")


def test_options_are_converted() -> None:
    url = URL.parse("x:?a=1&b=none&c=Yes&d=two&timeouts.operation=2.5&timeouts.idle=none")
    assert url.options(timeouts=True, a=int, b=optional(float), c=boolean, d=choice("one", "two"), e=str) == {
        "a": 1,
        "b": None,
        "c": True,
        "d": "two",
        "timeouts": Timeouts(operation=2.5, idle=None),
    }


@pytest.mark.parametrize(
    ("query", "says"),
    [
        ("z=1", "unknown parameter 'z' (known: a, timeouts.cleanup, timeouts.idle"),
        ("a=1&a=2", "gives the parameter 'a' twice"),
        ("a=one", "x:?a=***: a: int expected"),
        ("timeouts.idle=-7.5", "timeouts.idle: a positive number of seconds expected, or none"),
        ("timeouts.cleanup=none", "timeouts.cleanup: a positive number of seconds expected"),
    ],
)
def test_wrong_options_are_named(query: str, says: str) -> None:
    with pytest.raises(ConfigurationError) as caught:
        URL.parse(f"x:?{query}").options(timeouts=True, a=int)
    assert says in str(caught.value)
    assert "one" not in str(caught.value).replace("none", "")
    assert "7.5" not in str(caught.value)


def test_what_the_driver_understands_is_left_to_it() -> None:
    url = URL.parse("postgresql:///app?table=files&sslmode=require&timeouts.idle=3#x")
    assert url.options(timeouts=True, others=True, table=str) == {"table": "files", "timeouts": Timeouts(idle=3.0)}
    assert url.rest("table", "timeouts") == "postgresql:///app?sslmode=require#x"


@pytest.mark.parametrize(("text", "value"), [("0644", 0o644), ("0o2750", 0o2750), ("0600", 0o600)])
def test_modes_are_octal(text: str, value: int) -> None:
    assert mode(text) == value


@pytest.mark.parametrize("text", ["644", "420", "0888", "rw", ""])
def test_a_mode_that_could_be_decimal_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="octal"):
        mode(text)


@pytest.mark.parametrize(
    "url",
    [
        f"postgresql://u:{SECRET}@h/db",
        f"postgresql://u:{SECRET}/x@h/db",
        f"postgresql://u:{SECRET}?x@h/db",
        f"postgresql://u:{SECRET}#x@h/db",
        f"postgresql://u:a@{SECRET}@h/db",
        f"s3://bucket?secret_access_key={SECRET}",
        f"s3://bucket?x=1#{SECRET}",
        f"s3://bucket?x=1&{SECRET}",
        f"postgresql://u:a?{SECRET}=x@h/db",
        f"postgresql://u:{SECRET}?x=1@h/db",
        f"postgresql://u:{SECRET}/db",
        f"postgresql://u:{SECRET},b:1/db",
        f"u:{SECRET}@h/db",
        f"{SECRET}",
        *(
            f"{scheme}:{slashes}u:{SECRET}@h/db"
            for scheme in ("s3", "obstore+s3", "gs", "mongodb", "mongodb+srv", "gridfs+mongodb", "postgres", "nothing")
            for slashes in ("", "/", "///", "////")
        ),
        *(
            f"{scheme}:{slash}u:{password}@h/db"
            for scheme in ("postgresql", "S3", "mongodb")
            for slash in ("", "/")
            for password in (f"{SECRET}//x", f"x//{SECRET}", f"x//{SECRET}/y")
        ),
        *(f"{scheme}://h/db?timeouts.idle={SECRET}&part_bytes={SECRET}" for scheme in ("s3", "mongodb", "postgres")),
        f"file:x?max_workers={SECRET}",
        f"sqlite:x?readers={SECRET}",
    ],
)
def test_a_shown_url_holds_no_secret(url: str) -> None:
    assert SECRET not in redacted(url)
    with contextlib.suppress(ConfigurationError):
        parsed = URL.parse(url)
        assert SECRET not in f"{parsed} {parsed!r}"
    for make in (original_from_url, meta_backend_from_url):
        for one in (url, url.replace("postgresql", "nothing").replace("s3:", "nothing:")):
            try:
                shown = str(make(one))  # what messages say of it later
            except ConfigurationError as error:
                shown = str(error)
            assert SECRET not in shown


def test_what_is_not_secret_is_shown() -> None:
    assert redacted("file:///srv/a@b?max_workers=3") == "file:///srv/a@b?max_workers=***"
    assert redacted("postgresql://u:p@h:5/db") == "postgresql://u:***@h:5/db"
    assert redacted("mongodb://u:p@[::1]:5,h:6,i/db?w=1") == "mongodb://u:***@[::1]:5,h:6,i/db?w=***"
    assert redacted("s3:bucket") == "s3:bucket"
    assert redacted("POSTGRESQL://u:p@h/db") == "POSTGRESQL://u:***@h/db"
    assert redacted("sqlite:a//b:c@d?readers=3") == "sqlite:a//b:c@d?readers=***"


# -- backends


@pytest.mark.parametrize(
    ("url", "root"),
    [
        ("file:///srv/media", "/srv/media"),
        ("file:/srv/media", "/srv/media"),
        ("file://localhost/srv/a%20b", "/srv/a b"),
        ("file:media", "{cwd}/media"),
        ("file:./a/../media", "{cwd}/media"),
    ],
)
def test_paths_of_files(url: str, root: str, tmp_path: Path) -> None:
    backend = original_from_url(url)
    assert isinstance(backend, FileSystemBackend)
    assert backend.root == root.format(cwd=tmp_path)


@pytest.mark.parametrize(
    ("url", "path"),
    [
        ("sqlite:////srv/a.sqlite3", "/srv/a.sqlite3"),
        ("sqlite:/srv/a.sqlite3", "/srv/a.sqlite3"),
        ("sqlite:///a.sqlite3", "{cwd}/a.sqlite3"),
        ("sqlite:a.sqlite3", "{cwd}/a.sqlite3"),
    ],
)
def test_paths_of_databases(url: str, path: str, tmp_path: Path) -> None:
    meta = meta_backend_from_url(url)
    assert isinstance(meta, SQLiteMetaBackend)
    assert meta.path == path.format(cwd=tmp_path)


@pytest.mark.parametrize(
    "url",
    ["file://media/x", "file://u@localhost/x", "file:", "file:a#b", "file:a%00b", "file:a?max_workers=0"],
)
def test_what_a_directory_cannot_be_made_of_is_refused(url: str) -> None:
    with pytest.raises(ConfigurationError, match="file:"):
        original_from_url(url)


def test_a_host_in_a_file_url_is_explained() -> None:
    with pytest.raises(ConfigurationError) as caught:
        meta_backend_from_url("sqlite://records.sqlite3")
    assert "an absolute path begins with sqlite:////, a relative one with sqlite:///" in str(caught.value)


def test_every_argument_of_a_shipped_backend_can_be_given() -> None:
    fs = original_from_url(
        "file:m?file_mode=0600&directory_mode=none&base_url=https://x/&create_root=no&max_workers=2&timeouts.idle=1"
    )
    assert isinstance(fs, FileSystemBackend)
    assert fs.base_url == "https://x/"
    assert fs.timeouts == Timeouts(idle=1.0)
    meta = meta_backend_from_url("sqlite:m?table=t&durability=power&readers=1&busy_timeout=2&timeouts.operation=9")
    assert meta.durable
    assert meta.timeouts.operation == 9.0


def test_one_scheme_in_both_tables_is_told_apart_by_who_asks() -> None:
    assert type(original_from_url("memory:")) is MemoryBackend
    assert type(meta_backend_from_url("memory://")) is MemoryMetaBackend


def test_storage_from_urls() -> None:
    storage = storage_from_urls("memory:", "memory:", name="media", prefix="a")
    assert (storage.name, storage.prefix, list(storage.originals)) == ("media", "a/", ["default"])


@pytest.mark.parametrize("table", [ORIGINALS, META_BACKENDS], ids=["originals", "meta"])
def test_every_scheme_of_the_tables_leads_to_a_class_that_reads_urls(table: dict[str, str]) -> None:
    base: type = Backend if table is ORIGINALS else MetaBackend
    for reference in table.values():
        module, _, name = reference.partition(":")
        cls = getattr(importlib.import_module(module), name)
        assert issubclass(cls, base)
        assert "from_url" in vars(cls)


def test_a_class_without_a_url_form_says_so() -> None:
    with pytest.raises(ConfigurationError, match="MetaBackend has no URL form; make it in Python"):
        MetaBackend.from_url("x:")
    with pytest.raises(ConfigurationError, match="Backend has no URL form"):
        Backend.from_url("x:")


def test_unknown_schemes_list_the_known_ones() -> None:
    with pytest.raises(ConfigurationError, match=r"no original for the scheme 'ftp' \(known: .*file, .*memory"):
        original_from_url("ftp://host")


# -- backends of others


class Pigeon(MemoryBackend):
    """A backend that another distribution brings."""

    @classmethod
    def from_url(cls, url: str) -> "Pigeon":
        return cls(**URL.parse(url).options(timeouts=True))


Announce = Callable[..., None]


@pytest.fixture
def announce(monkeypatch: pytest.MonkeyPatch) -> Announce:
    """Announce backends as an installed distribution would."""

    def announced(group: str, name: str, value: str) -> None:
        entry = importlib.metadata.EntryPoint(name, value, group)
        monkeypatch.setattr(config_module, "entry_points", lambda *, group: [entry] if group == entry.group else [])

    return announced


def test_entry_points_bring_further_schemes(announce: Announce, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "pigeons", SimpleNamespace(Pigeon=Pigeon))
    announce("aproxy_storage.backends", "pigeon", "pigeons:Pigeon")
    assert type(original_from_url("pigeon:?timeouts.idle=5")) is Pigeon
    with pytest.raises(ConfigurationError, match="no meta-backend for the scheme 'pigeon'"):
        meta_backend_from_url("pigeon:")
    with pytest.raises(ConfigurationError, match=r"known: .*pigeon"):
        original_from_url("dove:")


def test_an_entry_point_never_takes_a_scheme_of_ours(announce: Announce) -> None:
    announce("aproxy_storage.backends", "memory", "pigeons:Pigeon")
    assert type(original_from_url("memory:")) is MemoryBackend


@pytest.mark.parametrize("value", ["nowhere_at_all:X", "aproxy_storage.errors:X"])
def test_an_entry_point_that_cannot_be_imported(announce: Announce, value: str) -> None:
    announce("aproxy_storage.backends", "pigeon", value)
    with pytest.raises(ConfigurationError, match=f"'pigeon' cannot be imported from {value}"):
        original_from_url("pigeon:")


def test_an_entry_point_of_another_kind(announce: Announce) -> None:
    announce("aproxy_storage.backends", "pigeon", "aproxy_storage.meta_backends.memory:MemoryMetaBackend")
    with pytest.raises(ConfigurationError, match="is no Backend"):
        original_from_url("pigeon:")


# -- files

WHOLE = """
[storages.media]
originals.fs = "file:media"
originals.old = { url = "file:///mnt/old?create_root=no", max_workers = 4, timeouts.operation = 5 }
meta = "sqlite:///records.sqlite3?durability=power"
placement = { policy = "first" }
prefix = "m"
keys = "token"
checksum = "none"
chunk_bytes = 65536
durability = "power"
lease = 30
settle = 600.5
keep_replaced = 0
max_path_bytes = 200
timeouts = { operation = 3, source = "none" }

[storages.scratch]
originals = "memory:"
meta = "memory:"
"""


def test_a_whole_file(tmp_path: Path) -> None:
    storages = load(written(WHOLE, "etc/aproxy.toml"))
    assert list(storages) == ["media", "scratch"]
    media = storages["media"]
    assert media.name == "media"
    fs, old = media.originals["fs"], media.originals["old"]
    assert isinstance(fs, FileSystemBackend)
    assert isinstance(old, FileSystemBackend)
    assert fs.root == str(tmp_path / "etc" / "media"), "relative paths count from the file"
    assert old.timeouts.operation == 5.0
    assert isinstance(media.meta, SQLiteMetaBackend)
    assert media.meta.path == str(tmp_path / "etc" / "records.sqlite3")
    assert isinstance(media.placement, First)
    assert media.timeouts == Timeouts(operation=3, source=None)
    assert (media.prefix, media.keys, media.checksum, media.chunk_bytes) == ("m/", "token", None, 65536)
    assert (media.durable, media.lease, media.settle, media.keep_replaced) == (True, 30, 600.5, 0)
    assert media.max_path_bytes == 200
    assert list(storages["scratch"].originals) == ["default"]
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["aproxy.toml", "etc"], "nothing is opened"


def test_none_turns_a_limit_off() -> None:
    (storage,) = load(
        written(
            """storages.a = { originals.x = { url = "memory:", attempt_timeout = "none" }, meta = "memory:",
                tidy_every = "none", placement = { policy = "fallback" } }""".replace("\n", "")
        )
    ).values()
    assert (storage.gates["x"].attempt_timeout, storage.tidy_every) == (None, None)


def test_every_plain_argument_of_a_storage_can_be_given() -> None:
    import inspect

    others = {"self", "name", "originals", "meta", "placement", "timeouts", "on_attempt"}
    assert set(config_module._ARGUMENTS) == set(inspect.signature(ProxyStorage.__init__).parameters) - others


def test_equal_urls_are_one_object() -> None:
    storages = load(
        written("""
        storages.a = { originals = "file:f", meta = "sqlite:m" }
        storages.b = { originals = { x = "file:f", y = "file:g" }, meta = "sqlite:m", prefix = "b" }
        """)
    )
    assert storages["a"].meta is storages["b"].meta
    assert storages["a"].originals["default"] is storages["b"].originals["x"]
    assert storages["b"].originals["y"] is not storages["b"].originals["x"]


def test_variables_of_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PLACE", "file:from here")
    monkeypatch.setenv("PART", "a/b ?")
    storages = load(
        written('[storages.a]\noriginals = { x = "${PLACE}", y = "file:${PART}" }\nmeta = "memory:"\nkeys = "path"')
    )
    x, y = storages["a"].originals.values()
    assert isinstance(x, FileSystemBackend)
    assert isinstance(y, FileSystemBackend)
    assert x.root.endswith("/from here"), "a whole URL is taken as it is"
    assert y.root.endswith("/a/b ?"), "a part of one is quoted"
    assert "here.toml:2: the environment variable NOT_THERE is not set" in refused(
        '[storages.a]\noriginals = "file:${NOT_THERE}"\nmeta = "memory:"'
    )


def test_a_variable_in_an_option_of_a_table_is_taken_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SITE", "https://x.org:8000/a b?c=1&d=2")
    for option in ("${SITE}", "${SITE}/media/", "and ${SITE}, ${SITE}"):
        given = f'originals = {{ url = "file:media", base_url = "{option}" }}'
        (storage,) = load(written(f'[storages.a]\n{given}\nmeta = "memory:"')).values()
        original = storage.get_original()
        assert isinstance(original, FileSystemBackend)
        plain = option.replace("${SITE}", "https://x.org:8000/a b?c=1&d=2")
        assert original.base_url == (plain if plain.endswith("/") else plain + "/")


@pytest.mark.parametrize(
    ("text", "line", "says"),
    [
        ("storages = ", 1, "this is not TOML"),
        ("", 1, "there is no storage; a first one: [storages.media]"),
        ("x = 1", 1, "'x' is unknown (known: storages)"),
        ("[storages]\nmedia = 1", 2, "storages.media must be a table"),
        ('[storages.media]\n\nmeta = "memory:"', 1, "storage 'media' needs originals"),
        ('[storages.media]\noriginals = "memory:"', 1, "storage 'media' needs meta"),
        ('[storages.a]\noriginals = "memory:"\nmeta = "memory:"\n\nmata = 1', 5, "'mata' is unknown in storages.a"),
        ('[storages.a]\noriginals = "memory:"\nmeta = "memory:"\nlease = "1"', 4, "lease must be a number"),
        ('[storages.a]\noriginals = "memory:"\nmeta = "memory:"\nlease = true', 4, "lease must be a number"),
        ('[storages.a]\noriginals = "memory:"\nmeta = "memory:"\nlease = 0', 1, "must be positive"),
        ('[storages.a]\noriginals = "memory:"\nmeta = "memory:"\nkeys = "x"', 1, "keys='x': either"),
        ('[storages.a]\noriginals.x = "memory:"\noriginals.y = "gopher:"\nmeta = "memory:"', 3, "known: "),
        ('[storages.a]\nmeta = "sqlite:x?tabel=y"\noriginals = "memory:"', 2, "unknown parameter 'tabel'"),
        ('[storages.a]\nmeta = "memory:"\n[storages.a.originals]\nx = { url = "file:x", tiemouts.idle = 3 }', 4,
         "unknown parameter 'tiemouts.idle'"),
        ('[storages.a]\nmeta = "memory:"\n[storages.a.originals.x]\nurl = "file:x"\nmax_workers = []', 5,
         "max_workers must be a text, a number, true or false"),
        ('[storages.a]\nmeta = 5\noriginals = "memory:"', 2, "a URL is expected"),
        ('[storages.a]\nmeta = "memory:"\noriginals = "memory:"\nplacement = { policy = "best" }', 4,
         "placement needs a policy, one of"),
        ('[storages.a]\nmeta = "memory:"\noriginals = "memory:"\nplacement = { policy = "first", x = 1 }', 4,
         "'x' is unknown in storages.a.placement"),
        ('[storages.a]\nmeta = "memory:"\noriginals = "memory:"\ntimeouts.idle = -1', 4, "seconds must be positive"),
        ('[storages.a]\nmeta = "memory:"\noriginals = "memory:"\ntimeouts.idel = 1', 4, "'idel' is unknown"),
        ('[storages."a b"]\nmeta = "memory:"\noriginals = "memory:"\n[storages."a b".timeouts]\nidle = "x"', 5,
         "idle must be a number"),
        ('[storages.a]\nmeta = "memory:"\noriginals = "memory:"\nchecksum = "nope"', 4,
         "checksum='nope': hashlib has no such algorithm"),
        ('[storages.a]\nmeta = "memory:"\noriginals = "memory:"\nchecksum = "shake_128"', 4,
         'hashlib has no such algorithm of a fixed length'),
        ('[storages.a]\nmeta = "memory:"\noriginals = "memory:"\nmax_path_bytes = 0', 4,
         'max_path_bytes must be at least 1'),
        ('[storages.a]\nmeta = "memory:"\noriginals = "memory:"\ntidy_every = nan', 4,
         'tidy_every must be a finite number'),
        ('[storages.a]\nmeta = "memory:"\noriginals = "memory:"\ntimeouts.idle = inf', 4,
         'idle must be a finite number'),
        ('[storages.a]\nmeta = "memory:"\noriginals = "memory:"\nplacement = { policy = ["x"] }', 4,
         'placement needs a policy, one of'),
        ('[storages.a]\nmeta = "memory:"\noriginals = "memory:"\nplacement = { policy = "fallback", breaker = 5 }', 4,
         'storages.a.placement.breaker must be a table'),
        ('storages.a={meta="memory:",originals="memory:",placement={policy="fallback",breaker={failures="5"}}}', 1,
         "failures must be a whole number"),
        ('[storages.a]\nmeta = "memory:"\noriginals = "memory:"\nplacement = { policy = "route", suffixes = "x" }', 4,
         "suffixes='x': a table"),
        ('[storages.a]\nmeta = "memory:"\noriginals = "s3://b?expires_in=nan"', 3,
         "expires_in: a finite number expected"),
        ('[storages.a]\nmeta = "memory:"\noriginals = {}', 1, "at least one original"),
    ],
)  # fmt: skip
def test_an_error_names_the_file_and_the_line(text: str, line: int, says: str) -> None:
    message = refused(text)
    assert says in message
    assert message.startswith(f"here.toml:{line}: " if "not TOML" not in says else "here.toml")


def test_an_error_of_a_file_holds_no_secret() -> None:
    for url in (f"nothing://u:{SECRET}@h/x", f"memory:?key={SECRET}", f"file://u:{SECRET}@x/"):
        assert SECRET not in refused(f'[storages.a]\nmeta = "memory:"\noriginals = "{url}"')
    message = refused(f'[storages.a]\nmeta = "memory:"\noriginals = {{ url = "memory:", key = "{SECRET}" }}')
    assert SECRET not in message


def test_a_driver_that_is_not_installed(announce: Announce, monkeypatch: pytest.MonkeyPatch) -> None:
    class Absent(MemoryBackend):
        @classmethod
        def from_url(cls, url: str) -> "Absent":
            raise MissingDependency.of("pigeonlib", "pigeon")

    monkeypatch.setitem(__import__("sys").modules, "pigeons", SimpleNamespace(Absent=Absent))
    announce("aproxy_storage.backends", "pigeon", "pigeons:Absent")
    with pytest.raises(MissingDependency, match=r"here.toml:1: .*pip install 'aproxy-storage\[pigeon\]'"):
        load(written('storages.a = { originals = "pigeon:", meta = "memory:" }'))


def test_files_that_cannot_be_read(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigurationError, match=r"cannot read the configuration nowhere.toml: No such file"):
        load("nowhere.toml")
    monkeypatch.setenv("APROXY_CONFIG", "elsewhere.toml")
    with pytest.raises(ConfigurationError, match=r"elsewhere.toml \(named by APROXY_CONFIG\): No such file"):
        load()
    Path("latin.toml").write_bytes(b"# \xe4")
    with pytest.raises(ConfigurationError, match="it is not UTF-8"):
        load("latin.toml")


def test_which_file_is_read(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert find_file() is None
    text = 'storages.{} = {{ originals = "memory:", meta = "memory:" }}'
    written(text.format("here"), "aproxy.toml")
    assert list(load()) == ["here"]
    named = written(text.format("named"), "named.toml")
    monkeypatch.setenv("APROXY_CONFIG", str(named))
    assert list(load()) == ["named"]
    assert list(load("aproxy.toml")) == ["here"]


@pytest.mark.asyncio
async def test_without_any_configuration_there_is_a_storage_in_the_working_directory(tmp_path: Path) -> None:
    storages: dict[str, Any] = load()
    assert list(storages) == ["default"]
    async with storages["default"] as storage:
        await storage.save("a.txt", b"here")
    assert (tmp_path / "aproxy-data" / "files" / "a.txt").read_bytes() == b"here"
    assert (tmp_path / "aproxy-data" / "records.sqlite3").is_file()
    async with load()["default"] as again:
        assert await again.exists("a.txt")


def test_a_place_where_no_directory_can_be_made() -> None:
    Path("aproxy-data").write_text("a file")
    with pytest.raises(ConfigurationError, match=r"cannot make the directory .*aproxy-data: File exists"):
        load()
