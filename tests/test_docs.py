"""The pages keep their word: programs run, commands exist, links lead somewhere, tables agree with the code."""

import ast
import asyncio
import inspect
import pkgutil
import re
import shlex
import textwrap
import tomllib
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import pytest

import aproxy_storage
from aproxy_storage import StorageError, errors

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").rglob("*.md"))]
NAMES = [str(page.relative_to(ROOT)) for page in PAGES]

# A block of another language is prose to every test below, so those that we use are named.
LANGUAGES = {"python", "shell", "console", "text", "toml"}

each_page = pytest.mark.parametrize("page", PAGES, ids=NAMES)


class Block(NamedTuple):
    """A fenced block: its language, its text, and the line that the text begins in."""

    language: str
    text: str
    line: int


def blocks(page: Path) -> Iterator[Block]:
    """Find the fenced blocks of a page, indented ones (in a list) too."""
    lines = page.read_text().splitlines()
    at = 0
    while at < len(lines):
        fence = re.match(r"( *)(`{3,}|~{3,}) *(\w*)", lines[at])
        at += 1
        if fence is None:
            continue
        begin = at
        while lines[at].strip() != fence[2]:
            at += 1
        yield Block(fence[3], textwrap.dedent("\n".join(lines[begin:at])) + "\n", begin + 1)
        at += 1


def prose(page: Path) -> str:
    """Return a page without its blocks and its code spans."""
    text = re.sub(r"^ *(`{3,}|~{3,}).*?^ *\1 *$", "", page.read_text(), flags=re.MULTILINE | re.DOTALL)
    return re.sub(r"`[^`\n]*`", "", text)


# -- blocks


@each_page
def test_every_block_names_its_language(page: Path) -> None:
    unknown = [(block.line, block.language) for block in blocks(page) if block.language not in LANGUAGES]
    assert not unknown


@each_page
def test_programs_run(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {"__name__": "page"}
    with asyncio.Runner() as runner:  # one loop for the page: what a block leaves open, the next one uses
        for block in blocks(page):
            if block.language == "python":
                text = "\n" * (block.line - 1) + block.text  # so that a traceback shows the line of the page
                code = compile(text, str(page), "exec", flags=ast.PyCF_ALLOW_TOP_LEVEL_AWAIT)
                result = eval(code, names)
                if inspect.iscoroutine(result):
                    runner.run(result)


@each_page
def test_programs_import_only_what_is_public(page: Path) -> None:
    for block in blocks(page):
        if block.language != "python":
            continue
        for node in ast.walk(compile(block.text, str(page), "exec", flags=ast.PyCF_ONLY_AST | 0x2000)):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("aproxy_storage"):
                module = pkgutil.resolve_name(str(node.module))
                private = {alias.name for alias in node.names} - set(module.__all__)
                assert not private, (
                    f"{page.name}:{block.line + node.lineno - 1}: {node.module} does not offer {private}"
                )


@each_page
def test_commands_exist(page: Path) -> None:
    for block in blocks(page):
        if block.language in ("shell", "console"):
            for number, line in enumerate(block.text.splitlines(), block.line):
                if block.language == "console":  # the rest is output
                    if not line.startswith("$ "):
                        continue
                    line = line[2:]
                words = shlex.split(line, comments=True)
                if words:
                    problem = what_is_wrong_with(words)
                    assert not problem, f"{page.name}:{number}: {problem}"


def what_is_wrong_with(words: list[str]) -> str | None:
    """Say what is wrong with a command of a page. One that is not known here cannot be checked, so it is wrong."""
    command, *args = words
    if command == "make":
        makefile = (ROOT / "Makefile").read_text()
        targets = set(re.findall(r"^([a-z]+):", makefile, re.MULTILINE))
        variables = set(re.findall(r"^([A-Z_]+) \?=", makefile, re.MULTILINE))
        for arg in args:
            name, is_variable, value = arg.partition("=")
            if name not in (variables if is_variable else targets):
                return f"make knows no {arg}"
            if name == "PYTEST_ARGS":
                return next(
                    (f"no {word}" for word in value.split() if "/" in word and not (ROOT / word).exists()), None
                )
        return None
    if command == "pip":
        return wrong_requirement(args)
    if command.startswith("python"):
        return None if args and (ROOT / args[0]).is_file() else f"no program {args}"
    return f"unknown command {command!r}"


def wrong_requirement(args: list[str]) -> str | None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    if not args or args[0] != "install":
        return f"pip {args}"
    for requirement in args[1:]:
        found = re.fullmatch(r"aproxy-storage(?:\[([\w,]+)\])?", requirement)
        if not found:
            return f"{requirement!r} is not ours"
        unknown = set((found[1] or "").split(",")) - {""} - set(project["optional-dependencies"])
        if unknown:
            return f"no extra {unknown}"
    return None


# -- links


def anchors(page: Path) -> set[str]:
    """Return the anchors that GitHub gives the headings of a page."""
    found: set[str] = set()
    without_blocks = re.sub(r"^ *(`{3,}).*?^ *\1 *$", "", page.read_text(), flags=re.MULTILINE | re.DOTALL)
    for heading in re.findall(r"^#{1,6} +(.+?) *$", without_blocks, re.MULTILINE):
        slug = re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")
        found.add(slug)
    return found


@each_page
def test_links_lead_somewhere(page: Path) -> None:
    wrong = []
    for target in re.findall(r"\]\(([^)\s]+)\)", prose(page)):
        if re.match(r"[a-z]+:", target):
            assert target.startswith("https://"), target
            continue
        where, _, anchor = target.partition("#")
        file = (page.parent / where).resolve() if where else page
        if (
            not file.exists()
            or not file.is_relative_to(ROOT)
            or (anchor and (file.suffix != ".md" or anchor not in anchors(file)))
        ):
            wrong.append(target)
    assert not wrong


@each_page
def test_every_page_can_be_found(page: Path) -> None:
    if page.name == "README.md":
        return
    others = [other for other in PAGES if other != page]
    linked = {
        (other.parent / target.partition("#")[0]).resolve()
        for other in others
        for target in re.findall(r"\]\(([^)\s]+)\)", prose(other))
        if ":" not in target
    }
    assert page in linked


# -- every public name is documented


@pytest.mark.parametrize("name", aproxy_storage.__all__)
def test_public_names_have_a_docstring_of_their_own(name: str) -> None:
    thing = getattr(aproxy_storage, name)
    doc = vars(thing).get("__doc__")
    assert doc, f"{name} has no docstring"
    # That of a dataclass or named tuple without one is its signature.
    assert not doc.startswith(f"{name}("), f"{name} has only a generated docstring"


def rows(page: str, columns: int) -> list[list[str]]:
    """Return the rows of all tables of so many columns on a page, without their heads."""
    lines = (ROOT / page).read_text().splitlines()
    tables = [
        line
        for line, below in zip(lines, [*lines[1:], ""], strict=True)
        if line.startswith("|") and not re.fullmatch(r"[|-]+", below) and not re.fullmatch(r"[|-]+", line)
    ]
    found = [[cell.strip() for cell in line.strip("|").split("|")] for line in tables]
    return [cells for cells in found if len(cells) == columns]


def bare(cell: str) -> str:
    return cell.strip("`")


ERRORS = {
    name: thing for name, thing in vars(errors).items() if isinstance(thing, type) and issubclass(thing, StorageError)
}


def test_the_table_of_errors_is_that_of_the_code() -> None:
    table = {bare(row[0]): row for row in rows("docs/errors.md", 4) if bare(row[0]) in ERRORS}
    assert table.keys() == ERRORS.keys()
    for name, (_, caught_as, retryable, _) in table.items():
        error = ERRORS[name]
        builtin = [base.__name__ for base in error.__bases__ if not issubclass(base, StorageError)]
        assert [bare(caught_as)] == (builtin or [""]), name
        assert retryable == ("yes" if error("").retryable else "no"), name


def test_every_error_has_advice() -> None:
    text = (ROOT / "docs/errors.md").read_text()
    missing = [name for name in ERRORS if name != "StorageError" and f"\n**`{name}`**" not in text]
    assert not missing


def test_every_attribute_of_an_error_is_listed() -> None:
    listed = {bare(row[0]) for row in rows("docs/errors.md", 2)}
    assert set(vars(StorageError(""))) - {"errno"} <= listed


def test_the_table_of_errnos_is_that_of_the_code() -> None:
    import errno

    table = {
        name: bare(row[1])
        for row in rows("docs/errors.md", 2)
        for name in re.findall(r"\bE[A-Z]+\b", row[0])
        if not row[0].startswith("all others")
    }
    mapped = {number: errors.from_os_error(OSError(number, ""), "x") for number in errno.errorcode}
    listed = {getattr(errno, name) for name in table}
    for name, cls in table.items():
        assert type(mapped[getattr(errno, name)]).__name__ == cls
    rest = {
        errno.errorcode[n] for n, e in mapped.items() if n not in listed and type(e).__name__ != "BackendUnavailable"
    }
    assert not rest


# -- the numbers of docs/limits.md


def value_of(text: str) -> Any:
    """Evaluate a number as the page writes it: ``1 << 20``, or None."""
    assert re.fullmatch(r"None|[\dxo_. <*]+", text), text
    return eval(text, {"__builtins__": {}})


def limits() -> Iterator[tuple[str, str, str]]:
    """Yield (callable, parameter, number) and (module, constant, number) for every row of the page."""
    for first, _ in rows("docs/limits.md", 2):
        code = bare(first)
        found = re.fullmatch(r"([\w.]+)\((\w+)=(.+)\)", code) or re.fullmatch(
            r"([\w.]+)\.(_?[A-Z][A-Z_]+) = (.+)", code
        )
        if found:
            yield found[1], found[2], found[3]
        else:  # the table of memory is in words
            assert "=" not in code or "open(" in code, f"{code!r} is neither a default nor a constant"


def constant_of(module: ModuleType, name: str) -> Any:
    """Return a constant of a module, or of the helpers beside it: to a reader they are one."""
    if hasattr(module, name):
        return getattr(module, name)
    package = pkgutil.resolve_name(module.__name__.rpartition(".")[0])
    helpers = [one.name for one in pkgutil.iter_modules(package.__path__) if one.name.startswith("_")]
    found = [pkgutil.resolve_name(f"{package.__name__}.{helper}") for helper in helpers]
    (value,) = {getattr(helper, name) for helper in found if hasattr(helper, name)}
    return value


def default_of(thing: Any, parameter: str) -> Any:
    if inspect.isclass(thing):
        thing = thing.__init__
    return inspect.signature(thing).parameters[parameter].default


@pytest.mark.parametrize(("where", "name", "number"), list(limits()))
def test_numbers_are_those_of_the_code(where: str, name: str, number: str) -> None:
    thing = pkgutil.resolve_name(f"aproxy_storage.{where}")
    actual = constant_of(thing, name) if inspect.ismodule(thing) else default_of(thing, name)
    assert actual == value_of(number)


def public_callables() -> Iterator[tuple[str, Any]]:
    """Yield what a caller calls: public classes and their methods, the concrete backends, the tools."""
    places = [
        *((name, getattr(aproxy_storage, name)) for name in aproxy_storage.__all__),
        *(
            (name, pkgutil.resolve_name(f"aproxy_storage.{name}"))
            for name in (
                "backends.filesystem.FileSystemBackend",
                "backends.memory.MemoryBackend",
                "meta_backends.sqlite.SQLiteMetaBackend",
                "meta_backends.memory.MemoryMetaBackend",
                "tools.bulk.save_many",
                "tools.bulk.delete_many",
                "tools.reconcile.Report",
                "tools.reconcile.reconcile",
                "tools.verify.verify",
            )
        ),
    ]
    for name, thing in places:
        yield name, thing
        if inspect.isclass(thing):
            for method in vars(thing):
                if not method.startswith("_") and callable(getattr(thing, method)):
                    yield f"{name}.{method}", getattr(thing, method)


def test_every_default_number_is_on_the_page() -> None:
    listed = {f"{where}({name})" for where, name, _ in limits()}
    missing = []
    for name, thing in public_callables():
        if inspect.isclass(thing) and (issubclass(thing, Exception | tuple) or "__init__" not in vars(thing)):
            continue
        function = thing.__init__ if inspect.isclass(thing) else thing
        for parameter in inspect.signature(function).parameters.values():
            number = parameter.default
            if isinstance(number, bool) or not isinstance(number, int | float):
                continue
            # Positions begin at 0 and limit nothing.
            if number not in (0, -1) and f"{name}({parameter.name})" not in listed:
                missing.append(f"{name}({parameter.name}={number})")
    assert not missing
