"""Who imports whom (docs/design.md, "Layout"), and a few more rules of the house, over the syntax trees."""

import ast
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "aproxy_storage"
MODULES = sorted(PACKAGE.rglob("*.py"))
NAMES = {path: ".".join(path.relative_to(PACKAGE).with_suffix("").parts).removesuffix("__init__") for path in MODULES}

# From the bottom up: a module imports from the rows above its own, and from its own row.
PURE = [
    {"errors", "records", "paths"},
    {"timeouts", "loops", "futures", "cleanup", "blocking", "threads", "sniffing", "urls"},
    {"digest", "feeds", "kinds", "looks", "spool", "content"},
    {"placement", "breaker", "fallback", "replicate"},
]
BASES = {"backends.base", "meta_backends.base"}
CORE = {
    "registry",
    "journal",
    "leases",
    "files",
    "file_writer",
    "writing",
    "swapping",
    "attempts",
    "gates",
    "openings",
    "otel",
    "replication",
    "mending",
    "writes",
    "adopting",
    "direct_uploads",
    "health",
    "proxy_reading",
    "proxy_writing",
    "proxy_arranging",
    "proxy",
}
ROOT_MODULE = ""  # aproxy_storage itself
PUBLIC_API = set().union(*PURE, BASES, CORE, {ROOT_MODULE})

# Inside functions only: imports against the arrows, each with its reason.
UPWARD = {
    ("records", "registry"): "a record finds its storage by name; the registry knows storages, storages know records",
    ("proxy", "tools.bulk"): "save_many and delete_many are verbs of the storage, and made of its other verbs",
}

# What a module may import besides the standard library.
DRIVERS = {
    "sniffing": {"puremagic"},
    "otel": {"opentelemetry"},
    "backends._s3_client": {"aiobotocore", "botocore"},
    "backends._s3_errors": {"aiohttp", "botocore"},
    "backends._s3_sessions": {"aiobotocore", "botocore"},
    "backends._s3_times": {"botocore"},
    "backends._s3_urls": {"botocore", "cryptography"},
    "backends._obstore_errors": {"obstore"},
    "backends._obstore_listing": {"obstore"},
    "backends._obstore_reading": {"obstore"},
    "backends._obstore_stores": {"obstore"},
    "backends.obstore": {"obstore"},
    "backends.gridfs": {"pymongo"},
    "backends._gridfs_files": {"pymongo"},
    "backends._gridfs_upload": {"pymongo"},
    "backends.mogilefs": {"aiohttp", "httpx"},
    "backends.django": {"django", "asgiref"},
    "meta_backends.mongo": {"pymongo", "bson"},
    "meta_backends._mongo_collection": {"pymongo"},
    "clients.mongo": {"pymongo", "bson"},
    "clients.postgres": {"asyncpg"},
    "meta_backends.orm": {"django", "asgiref"},
    "meta_backends._orm_dependents": {"django"},
    "meta_backends._orm_errors": {"django"},
    "meta_backends._orm_rows": {"django"},
    "meta_backends._orm_table": {"django"},
    "meta_backends._orm_thread": {"django", "asgiref"},
}


class Import(NamedTuple):
    """One import: of which module (of ours: without the package's name), in which line, where it stands."""

    module: str
    line: int
    ours: bool
    in_function: bool
    for_types: bool


@cache
def parsed(path: Path) -> ast.Module:
    return ast.parse(path.read_text())


@cache
def imports(path: Path) -> list[Import]:
    """Find every import of a module, at whatever depth."""
    package = path.relative_to(PACKAGE.parent).parent.parts
    return list(_imports(parsed(path), package, in_function=False, for_types=False))


def _imports(node: ast.AST, package: tuple[str, ...], *, in_function: bool, for_types: bool) -> Iterator[Import]:
    for child in ast.iter_child_nodes(node):
        found: list[str] = []
        if isinstance(child, ast.Import):
            found = [alias.name for alias in child.names]
        elif isinstance(child, ast.ImportFrom):
            above = package[: len(package) - child.level + 1] if child.level else ()
            base = ".".join((*above, child.module) if child.module else above)
            # `from . import x` imports the module x.
            found = [f"{base}.{alias.name}" if _is_module(f"{base}.{alias.name}") else base for alias in child.names]
        for module in found:
            ours = module == "aproxy_storage" or module.startswith("aproxy_storage.")
            name = module.removeprefix("aproxy_storage").removeprefix(".") if ours else module.partition(".")[0]
            yield Import(name, child.lineno, ours, in_function, for_types)  # type: ignore[attr-defined]
        yield from _imports(
            child,
            package,
            in_function=in_function or isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda),
            for_types=for_types or (isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test)),
        )


def _is_module(dotted: str) -> bool:
    path = ROOT.joinpath(*dotted.split("."))
    return path.with_suffix(".py").is_file() or (path / "__init__.py").is_file()


def allowed(name: str) -> set[str]:
    """Return the modules of ours that the module `name` may import."""
    below: set[str] = set()
    for row in PURE:
        below |= row
        if name in row:
            return below
    if name in BASES:
        return below
    if name in CORE:
        return below | BASES | CORE
    if name == ROOT_MODULE:
        return PUBLIC_API - {ROOT_MODULE}
    folder, _, module = name.partition(".")
    siblings = {other for other in NAMES.values() if other.startswith(f"{folder}.")}
    if folder in ("backends", "meta_backends"):
        # Helpers (_x) are those of the modules beside them; a backend never imports another backend.
        helpers = {other for other in siblings if other.partition(".")[2].startswith("_")}
        clients = {other for other in NAMES.values() if other.startswith("clients.")}
        return (below | {f"{folder}.base"} | helpers | clients) if module else set()
    if folder == "clients":
        return below
    if folder in ("tools", "testing", "serving"):
        return PUBLIC_API | siblings
    if name in ("config", "__main__") or folder == "cli":
        return set(NAMES.values())
    raise AssertionError(f"{name!r} is in no row of docs/design.md: where does it belong?")


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_point_one_way(path: Path) -> None:
    name = NAMES[path].removesuffix(".")
    wrong = [
        f"line {found.line}: {name or 'the root'} imports {found.module or 'the root'}"
        for found in imports(path)
        if found.ours
        and found.module not in allowed(name)
        and not found.for_types
        and not (found.in_function and (name, found.module) in UPWARD)
    ]
    assert not wrong


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(ROOT)))
def test_types_only_imports_go_no_further_than_the_core(path: Path) -> None:
    """What is imported for annotations does nothing at run time, but says who knows whom all the same."""
    name = NAMES[path].removesuffix(".")
    wrong = [
        found
        for found in imports(path)
        if found.ours and found.for_types and found.module not in allowed(name) | BASES | CORE
    ]
    assert not wrong


def test_every_upward_import_exists() -> None:
    """An exception that is not needed any more is taken off the list."""
    found = {(NAMES[path], one.module) for path in MODULES for one in imports(path) if one.in_function and one.ours}
    assert set(UPWARD) <= found


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(ROOT)))
def test_a_module_imports_its_own_driver_only(path: Path) -> None:
    name = NAMES[path]
    own = set(sys.stdlib_module_names) | DRIVERS.get(name, set())
    if name.startswith("testing."):
        own |= {"pytest", "pytest_asyncio"}
    if name.startswith("cli."):
        own |= {"rich", "typer"}
    if name != "meta_backends.sqlite" and not name.startswith("meta_backends._sqlite"):
        own -= {"sqlite3"}
    wrong = [found for found in imports(path) if not found.ours and found.module not in own and not found.for_types]
    assert not wrong


def test_drivers_that_are_dear_to_import_are_imported_when_they_are_used() -> None:
    """At the top of a module that the root package imports there is the standard library and nothing else."""
    for path in MODULES:
        if NAMES[path].removesuffix(".") in PUBLIC_API:
            top = {found.module for found in imports(path) if not (found.ours or found.in_function or found.for_types)}
            assert top <= set(sys.stdlib_module_names), NAMES[path]


def test_neither_django_nor_the_bridge_is_known() -> None:
    for path in MODULES:
        foreign = {found.module for found in imports(path) if not found.ours}
        assert "sync_bridge" not in foreign, path
        if NAMES[path] not in ("backends.django", "meta_backends.orm") and not NAMES[path].startswith(
            "meta_backends._orm"
        ):
            assert not foreign & {"django", "asgiref"}, path


def calls(path: Path) -> Iterator[tuple[str, ast.Call]]:
    for node in ast.walk(parsed(path)):
        if isinstance(node, ast.Call):
            yield ast.unparse(node.func), node


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(ROOT)))
def test_tasks_are_made_by_their_owner(path: Path) -> None:
    """Bare tasks in cleanup.py alone, which holds them; elsewhere the tasks of a TaskGroup."""
    if NAMES[path] == "cleanup" or NAMES[path].startswith("testing."):
        return  # the suites play callers, who make what tasks they like
    groups = {
        item.optional_vars.id
        for node in ast.walk(parsed(path))
        if isinstance(node, ast.AsyncWith)
        for item in node.items
        if "TaskGroup" in ast.unparse(item.context_expr) and isinstance(item.optional_vars, ast.Name)
    }
    for name, call in calls(path):
        maker = name.rpartition(".")[2]
        assert maker not in ("ensure_future", "gather", "shield"), f"line {call.lineno}: {name}"
        if maker == "create_task":
            assert name.rpartition(".")[0] in groups, f"line {call.lineno}: {name}"


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(ROOT)))
def test_nothing_is_printed_and_logging_is_not_set_up(path: Path) -> None:
    for name, call in calls(path):
        assert name not in ("print", "logging.basicConfig", "warnings.simplefilter"), f"line {call.lineno}: {name}"


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(ROOT)))
def test_one_idea_per_module(path: Path) -> None:
    assert len(path.read_text().splitlines()) <= 600


def test_the_layout_is_on_the_page() -> None:
    page = (ROOT / "docs" / "design.md").read_text()
    layout = page[page.index("## 3. Layout") : page.index("Who may import whom")]
    missing = []
    for path in MODULES:
        name = NAMES[path].removesuffix(".")
        stem = path.stem
        if name.startswith("testing") or stem.startswith("_"):
            continue  # the suites are one thing to their users, and helpers belong to the module that they help
        if f"{stem}.py" not in layout and f" {stem}" not in layout:
            missing.append(name)
    assert not missing
