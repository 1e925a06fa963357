"""What users may rely on: the names, what importing them costs, that they are documented, how they are called."""

import inspect
import pkgutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import aproxy_storage
import sync_bridge
from aproxy_storage import Backend, MetaBackend, ProxyStorage

PUBLIC = [
    "AccessDenied",
    "AlreadyExists",
    "AsyncFile",
    "AsyncWriter",
    "Attempt",
    "Backend",
    "BackendUnavailable",
    "Breaker",
    "ByteRange",
    "Capabilities",
    "CommonPrefix",
    "ConfigurationError",
    "Conflict",
    "ContentError",
    "DeadlineExceeded",
    "DirectUpload",
    "Fallback",
    "First",
    "Health",
    "IntegrityError",
    "InvalidPath",
    "Limits",
    "MetaBackend",
    "MetaRecord",
    "MissingDependency",
    "NotFound",
    "NotSupported",
    "ObjectInfo",
    "Original",
    "OutOfSpace",
    "Place",
    "Placement",
    "ProxyStorage",
    "Reader",
    "Replicate",
    "Request",
    "Revision",
    "Route",
    "Source",
    "StorageError",
    "Timeouts",
    "Traffic",
    "UploadForm",
    "by_content_type",
    "by_suffix",
]

#: What `sync_bridge` offers, each imported when it is first used.
BRIDGE = [
    "Bridge",
    "BridgeClosed",
    "BridgeError",
    "BridgeStorage",
    "ProxyStorageFileField",
    "ProxyStorageImageField",
    "SyncCallOnEventLoop",
    "aget_content_object",
    "get_content_object",
    "get_storage",
    "proxy_storage_settings",
]

#: Modules that users import by name, with what they find there.
PUBLIC_MODULES = {
    "backends.filesystem": ["FileSystemBackend"],
    "backends.gridfs": ["GridFSBackend"],
    "backends.memory": ["MemoryBackend"],
    "backends.postgres": ["PostgresBackend"],
    "meta_backends.memory": ["MemoryMetaBackend"],
    "meta_backends.mongo": ["MongoMetaBackend"],
    "meta_backends.postgres": ["PostgresMetaBackend"],
    "meta_backends.sqlite": ["SQLiteMetaBackend"],
    "config": [
        "EMBEDDED",
        "META_BACKENDS",
        "ORIGINALS",
        "PLACEMENTS",
        "find_file",
        "load",
        "meta_backend_from_url",
        "original_from_url",
        "storage_from_urls",
    ],
    "otel": ["instrument"],
    "registry": ["add_finder", "get_storage", "register", "registered_names", "unregister"],
    "testing.backends": ["BackendTests"],
    "testing.meta_backends": ["MetaBackendTests", "make_record"],
    "tools.bulk": ["Result", "delete_many", "run_many", "save_many"],
    "tools.reconcile": ["Finding", "Report", "reconcile"],
    "tools.verify": ["verify"],
    "urls": ["URL", "boolean", "choice", "mode", "optional", "redacted", "relative_to", "scheme_of"],
}


def test_the_public_names_are_exactly_these() -> None:
    assert aproxy_storage.__all__ == PUBLIC
    assert sorted(PUBLIC) == PUBLIC
    assert sync_bridge.__all__ == BRIDGE


def test_the_root_defines_nothing_else() -> None:
    modules = {module.name for module in pkgutil.iter_modules(aproxy_storage.__path__)}
    others = {name for name in vars(aproxy_storage) if not name.startswith("__")} - set(PUBLIC) - modules
    assert not others


@pytest.mark.parametrize(("module", "names"), PUBLIC_MODULES.items())
def test_public_modules_offer_exactly_these(module: str, names: list[str]) -> None:
    assert sorted(pkgutil.resolve_name(f"aproxy_storage.{module}").__all__) == names


def all_modules() -> list[str]:
    return sorted(module.name for module in pkgutil.walk_packages(aproxy_storage.__path__, "aproxy_storage."))


@pytest.mark.parametrize("name", all_modules())
def test_every_module_names_what_it_offers(name: str) -> None:
    module = pkgutil.resolve_name(name)
    assert module.__doc__
    if not hasattr(module, "__path__"):  # a package without names of its own
        assert isinstance(module.__all__, list)
        assert all(hasattr(module, public) for public in module.__all__)


# -- importing


def modules_after(statement: str) -> set[str]:
    """Return the top-level modules that `statement` imports in a new interpreter, and what these import."""
    program = f"import sys; before = set(sys.modules); {statement}; print(*sorted(set(sys.modules) - before))"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=True)
    return {name.partition(".")[0] for name in done.stdout.split()}


@pytest.mark.parametrize("package", ["aproxy_storage", "sync_bridge"])
def test_importing_the_root_imports_no_driver(package: str) -> None:
    # Not a list of drivers: nothing but ourselves and the standard library, and of that no database.
    loaded = modules_after(f"import {package}")
    assert not loaded - sys.stdlib_module_names - {"aproxy_storage", "sync_bridge"}
    assert not loaded & {"sqlite3", "_sqlite3"}


def test_a_module_of_a_backend_imports_its_own_driver_only() -> None:
    own = sys.stdlib_module_names | {"aproxy_storage"}
    assert not modules_after("import aproxy_storage.backends.filesystem, aproxy_storage.backends.memory") - own
    assert not modules_after("import aproxy_storage.meta_backends.memory") - own
    assert "sqlite3" not in modules_after("import aproxy_storage.meta_backends.memory")
    assert "sqlite3" in modules_after("import aproxy_storage.meta_backends.sqlite")
    assert "pytest" not in modules_after("import aproxy_storage.testing")


def test_importing_every_module_starts_no_thread_and_opens_no_file(tmp_path: Path) -> None:
    names = [name for name in all_modules() if ".testing" not in name]
    program = f"""
import importlib, sys, threading
opened = []
sys.addaudithook(lambda event, args: opened.append((event, args)) if event in watched else None)
watched = set()
import aproxy_storage.meta_backends.sqlite, aproxy_storage.backends.filesystem  # and the drivers they need
watched = {{"socket.connect", "sqlite3.connect", "subprocess.Popen", "os.mkdir", "tempfile.mkstemp", "os.fork"}}
for name in {names}:
    importlib.import_module(name)
assert threading.active_count() == 1, threading.enumerate()
assert not opened, opened
"""
    done = subprocess.run([sys.executable, "-c", program], cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("package", [aproxy_storage, sync_bridge])
def test_both_packages_say_that_they_are_typed(package: Any) -> None:
    assert (Path(package.__file__).parent / "py.typed").is_file()


# -- documentation


def public_classes() -> Iterator[type]:
    for name in PUBLIC:
        yield getattr(aproxy_storage, name)
    for module, names in PUBLIC_MODULES.items():
        for name in names:
            thing = getattr(pkgutil.resolve_name(f"aproxy_storage.{module}"), name)
            if inspect.isclass(thing) and not module.startswith("testing"):
                yield thing


@pytest.mark.parametrize("cls", list(public_classes()), ids=lambda cls: cls.__name__)
def test_every_public_method_has_a_docstring(cls: type) -> None:
    missing = [
        name
        for name, member in inspect.getmembers(cls)
        if not name.startswith("_")
        and (inspect.isroutine(member) or isinstance(member, property))
        and (getattr(member, "__module__", None) or cls.__module__).startswith("aproxy_storage")
        # Inherited where an override says nothing new, as inspect.getdoc() has it.
        and not inspect.getdoc(getattr(cls, name))
    ]
    assert not missing


@pytest.mark.parametrize("cls", list(public_classes()), ids=lambda cls: cls.__name__)
def test_every_argument_of_a_constructor_is_described(cls: type) -> None:
    doc = inspect.getdoc(cls) or ""
    if "__init__" not in vars(cls) or "Args:" not in doc:
        return
    assert [name for name in inspect.signature(cls).parameters if not name_is_described(name, doc)] == []


def name_is_described(name: str, doc: str) -> bool:
    described = {word.strip() for line in doc.splitlines() if ":" in line for word in line.partition(":")[0].split(",")}
    return name in described


# -- how things are called

#: Parameters that may be given by position, after which all others are keyword-only.
BY_POSITION = {
    "ProxyStorage.__init__": ["name"],
    "ProxyStorage.adopt": ["original_storage_path"],
    "ProxyStorage.begin_upload": ["name"],
    "ProxyStorage.finish_upload": ["path"],
    "ProxyStorage.copy": ["path", "name"],
    "ProxyStorage.delete": ["path"],
    "ProxyStorage.delete_many": ["paths"],
    "ProxyStorage.exists": ["path"],
    "ProxyStorage.get": ["path"],
    "ProxyStorage.get_many": ["paths"],
    "ProxyStorage.get_original": ["name"],
    "ProxyStorage.choose_original": ["name", "source"],
    "ProxyStorage.get_data_for_meta_backend_save": [],
    "ProxyStorage.list": ["prefix"],
    "ProxyStorage.move": ["path", "using"],
    "ProxyStorage.gate_of": ["original"],
    "ProxyStorage.open_bytes": ["record", "places", "byte_range"],
    "ProxyStorage.open": ["path", "mode"],
    "ProxyStorage.open_current": ["record"],
    "ProxyStorage.rename": ["path", "new_path"],
    "ProxyStorage.restore_key": ["path"],
    "ProxyStorage.replace": ["path", "content"],
    "ProxyStorage.save": ["name", "content"],
    "ProxyStorage.save_many": ["items"],
    "ProxyStorage.size": ["path"],
    "ProxyStorage.stream": ["path"],
    "ProxyStorage.tidy": [],
    "ProxyStorage.update": ["path"],
    "ProxyStorage.url": ["path"],
    "ProxyStorage.urls": ["paths"],
    "ProxyStorage.write_to": ["path", "content"],
    "ProxyStorage.aclose": [],
    "ProxyStorage.health": [],
    "Backend.__init__": [],
    "Backend.aclose": [],
    "Backend.check_key": ["key"],
    "Backend.copy": ["key", "new_key"],
    "Backend.discard": ["key"],
    "Backend.full_path": ["key"],
    "Backend.is_taken": ["key"],
    "Backend.list": ["prefix"],
    "Backend.read": ["key"],
    "Backend.stat": ["key"],
    "Backend.upload_form": ["key"],
    "Backend.url": ["key"],
    "Backend.write": ["key", "source"],
    "MetaBackend.__init__": [],
    "MetaBackend.aclose": [],
    "MetaBackend.after_commit": ["callback"],
    "MetaBackend.count": ["prefix"],
    "MetaBackend.create": ["record"],
    "MetaBackend.create_many": ["records"],
    "MetaBackend.delete": ["path"],
    "MetaBackend.delete_many": ["items"],
    "MetaBackend.exists": ["path"],
    "MetaBackend.get": ["path"],
    "MetaBackend.get_many": ["paths"],
    "MetaBackend.list": ["prefix"],
    "MetaBackend.list_unfinished": [],
    "MetaBackend.look_here": ["path"],
    "MetaBackend.owners": ["original_storage_name", "keys"],
    "MetaBackend.pin": ["record"],
    "MetaBackend.reserve": ["record"],
    "MetaBackend.setup": [],
    "MetaBackend.update": ["path", "changes"],
    "MetaBackend.update_many": ["updates"],
}


def methods(cls: type) -> Iterator[tuple[str, Any]]:
    for name, member in inspect.getmembers(cls, inspect.isfunction):
        if not name.startswith("_") or name == "__init__":
            yield f"{cls.__name__}.{name}", member


@pytest.mark.parametrize("cls", [ProxyStorage, Backend, MetaBackend])
def test_what_may_be_given_by_position_is_exactly_this(cls: type) -> None:
    actual = {
        name: [
            parameter.name
            for parameter in list(inspect.signature(member).parameters.values())[1:]
            if parameter.kind in (parameter.POSITIONAL_ONLY, parameter.POSITIONAL_OR_KEYWORD)
        ]
        for name, member in methods(cls)
    }
    assert actual == {name: given for name, given in BY_POSITION.items() if name.partition(".")[0] == cls.__name__}


@pytest.mark.parametrize(
    "name",
    [
        "backends.filesystem.FileSystemBackend",
        "backends.memory.MemoryBackend",
        "meta_backends.memory.MemoryMetaBackend",
        "backends.postgres.PostgresBackend",
        "meta_backends.postgres.PostgresMetaBackend",
        "meta_backends.sqlite.SQLiteMetaBackend",
        "tools.bulk.delete_many",
        "tools.bulk.save_many",
        "tools.reconcile.reconcile",
        "tools.verify.verify",
    ],
)
def test_settings_are_given_by_name(name: str) -> None:
    parameters = inspect.signature(pkgutil.resolve_name(f"aproxy_storage.{name}")).parameters.values()
    by_position = [p for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD]
    assert len(by_position) <= 2, by_position
