"""The pages keep their word: programs and commands run, links lead somewhere, tables agree with the code.

The blocks of one page run in their order, in one empty directory and, the Python ones, in one namespace and one event
loop. A comment above a block, on a line of its own, asks for more:

    <!-- file: upload.py -->     the block is written to that file, for commands further down
    <!-- needs: postgres -->     the fixture ``page_postgres`` (tests/services/pages.py) starts a server, and says which
                                 texts of the block stand for it

In a ``console`` block, what follows a command is compared with what it writes; ``…`` stands for anything.
"""

import ast
import asyncio
import inspect
import os
import pkgutil
import re
import shlex
import subprocess
import sys
import textwrap
import tomllib
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import pytest

import aproxy_storage
import aproxy_storage.tools
from aproxy_storage import StorageError, config, errors

ROOT = Path(__file__).parent.parent
PAGES = [
    *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md", "SECURITY.md")),
    *sorted((ROOT / "docs").rglob("*.md")),
]
NAMES = [str(page.relative_to(ROOT)) for page in PAGES]

# A block of another language is prose to every test below, so those that we use are named.
LANGUAGES = {"python", "shell", "console", "text", "toml", "sql", "{toctree}", "{eval-rst}"}

each_page = pytest.mark.parametrize("page", PAGES, ids=NAMES)


class Block(NamedTuple):
    """A fenced block: its language, its text, the line that the text begins in, and the comments above it."""

    language: str
    text: str
    line: int
    comments: dict[str, str]

    @property
    def file(self) -> str | None:
        """The file that it is written to."""
        return self.comments.get("file")

    @property
    def needs(self) -> list[str]:
        """The services that it talks to."""
        return self.comments.get("needs", "").replace(",", " ").split()


def blocks(page: Path) -> Iterator[Block]:
    """Find the fenced blocks of a page, indented ones (in a list) too."""
    lines = page.read_text().splitlines()
    at = 0
    comments: dict[str, str] = {}
    while at < len(lines):
        fence = re.match(r"( *)(`{3,}|~{3,}) *(\{[\w-]+\}|\w*)", lines[at])
        comment = re.fullmatch(r" *<!-- (\w+): (.+) -->", lines[at])
        at += 1
        if comment:
            comments[comment[1]] = comment[2]
        elif fence is None:
            comments = comments if not lines[at - 1].strip() else {}  # it may stand above an empty line
        else:
            begin = at
            while lines[at].strip() != fence[2]:
                at += 1
            yield Block(fence[3], textwrap.dedent("\n".join(lines[begin:at])) + "\n", begin + 1, comments)
            comments = {}
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
def test_what_a_page_says_runs(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: Any) -> None:
    for name in [name for name in os.environ if name.startswith("APROXY_")]:
        monkeypatch.delenv(name)
    place = tmp_path / "work"
    place.mkdir()
    monkeypatch.chdir(place)
    environment = shell_environment(tmp_path)
    names: dict[str, Any] = {"__name__": "page"}
    with asyncio.Runner() as runner:  # one loop for the page: what a block leaves open, the next one uses
        for block in blocks(page):
            where = f"{page.name}:{block.line}"
            text = with_services(block, request)
            if block.file is not None:
                target = place / block.file
                assert target.resolve().is_relative_to(place), where
                target.parent.mkdir(parents=True, exist_ok=True)
                target.write_text(text)
            elif block.language == "python":
                text = "\n" * (block.line - 1) + text  # so that a traceback shows the line of the page
                code = compile(text, str(page), "exec", flags=ast.PyCF_ALLOW_TOP_LEVEL_AWAIT)
                result = eval(code, names)
                if inspect.iscoroutine(result):
                    runner.run(result)
            elif block.language == "shell":
                run_shell(text, where, environment)
            elif block.language == "console":
                for command, expected in commands_of(text):
                    assert_written(run_shell(command, where, environment), expected, f"{where}: {command}")
            if block.language == "toml":
                check_toml(text, where, place)


def with_services(block: Block, request: Any) -> str:
    """Return the text of a block, in which what stands for a service is replaced by one that runs."""
    text = block.text
    for need in block.needs:
        stands_for = request.getfixturevalue(f"page_{need}")
        assert any(shown in text for shown in stands_for), f"nothing in the block stands for {need}: {stands_for}"
        for shown, real in stands_for.items():
            text = text.replace(shown, real)
    return text


def shell_environment(directory: Path) -> dict[str, str]:
    """Return an environment with the commands of this Python first, and stand-ins for two that must not run here."""
    stand_ins = directory / "bin"
    stand_ins.mkdir()
    # The tests run under make already, and pip would install what is installed; `test_commands_exist` checks them.
    (stand_ins / "make").write_text(f'#!/bin/sh\nexec /usr/bin/env -i PATH=/usr/bin:/bin make -n -C "{ROOT}" "$@"\n')
    (stand_ins / "pip").write_text("#!/bin/sh\n")
    (stand_ins / "aproxy").write_text(f'#!/bin/sh\nexec "{sys.executable}" -m aproxy_storage "$@"\n')
    (stand_ins / "python").write_text(f'#!/bin/sh\nexec "{sys.executable}" "$@"\n')
    for stand_in in stand_ins.iterdir():
        stand_in.chmod(0o755)
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("APROXY_", "COV_", "PYTEST_"))}
    return {
        **kept,
        "PATH": f"{stand_ins}:{Path(sys.executable).parent}:{os.environ['PATH']}",
        "PYTHONPATH": str(ROOT),
        "HOME": str(directory),
        "NO_COLOR": "1",
        "COLUMNS": "120",
        "LC_ALL": "C.UTF-8",
    }


def run_shell(text: str, where: str, environment: dict[str, str]) -> str:
    """Run commands with bash; return what they write. Any that fails fails the page."""
    command = ["bash", "-euo", "pipefail", "-c", text]
    done = subprocess.run(
        command, env=environment, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        text=True, timeout=120, check=False,
    )  # fmt: skip
    assert done.returncode == 0, f"{where}: exit code {done.returncode} of\n{text}\n{done.stdout}"
    return done.stdout


def commands_of(text: str) -> Iterator[tuple[str, list[str]]]:
    """Take a console block apart: each command with the lines below it."""
    command: str | None = None
    expected: list[str] = []
    for line in text.splitlines():
        if line.startswith("$ "):
            if command is not None:
                yield command, expected
            command, expected = line[2:], []
        else:
            assert command is not None, "a console block begins with a command"
            expected.append(line)
    if command is not None:
        yield command, expected


def assert_written(written: str, expected: list[str], what: str) -> None:
    """Compare lines; ``…`` stands for anything, on a line of its own for any lines."""
    pattern = "".join(
        r"(?:.*\n)*?" if line == "…" else re.escape(line).replace("…", ".*?") + r"\n" for line in expected
    )
    lines = "".join(line.rstrip() + "\n" for line in written.splitlines())
    assert re.fullmatch(pattern, lines), f"{what} wrote\n{written}"


def check_toml(text: str, where: str, place: Path) -> None:
    """Load a configuration file; of other TOML, that of a project, check the entry points."""
    document = tomllib.loads(text)
    if "storages" in document:
        file = place / ".block.toml"
        file.write_text(text)
        assert config.load(file), where
        return
    groups = document["project"]["entry-points"]
    assert groups.keys() <= set(config._GROUPS.values()), where


@each_page
def test_files_of_a_page_are_used(page: Path) -> None:
    """A block that is only written to a file would be a block that nobody runs."""
    found = list(blocks(page))
    for number, block in enumerate(found):
        if block.file is not None and block.file != "aproxy.toml":
            after = [other.text for other in found[number + 1 :]]
            assert any(Path(block.file).stem in text for text in after), f"{page.name}:{block.line}: {block.file}"


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
    """What has a stand-in when a page runs is checked here instead: targets of make, requirements of pip."""
    for block in blocks(page):
        if block.language in ("shell", "console"):
            for number, line in enumerate(block.text.splitlines(), block.line):
                if re.match(r"(\$ )?(make|pip) ", line):
                    problem = what_is_wrong_with(shlex.split(line.removeprefix("$ "), comments=True))
                    assert not problem, f"{page.name}:{number}: {problem}"


def what_is_wrong_with(words: list[str]) -> str | None:
    """Say what is wrong with a call of make or pip."""
    command, *args = words[: words.index("&&")] if "&&" in words else words
    if command == "pip":
        return wrong_requirement(args)
    makefile = (ROOT / "Makefile").read_text()
    targets = set(re.findall(r"^([a-z]+):", makefile, re.MULTILINE))
    variables = set(re.findall(r"^([A-Z_]+) \?=", makefile, re.MULTILINE))
    for arg in args:
        name, is_variable, value = arg.partition("=")
        if name not in (variables if is_variable else targets):
            return f"make knows no {arg}"
        if name == "PYTEST_ARGS":
            return next((f"no {word}" for word in value.split() if "/" in word and not (ROOT / word).exists()), None)
    return None


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


def test_the_figures_of_the_readme_are_those_of_the_benchmarks() -> None:
    measured = {tuple(row[:2]): row[2] for row in rows("benchmarks/README.md", 6)}
    shown = {tuple(row[:2]): row[2] for row in rows("README.md", 3) if row[2].startswith("**")}
    assert shown
    assert {key: measured.get(key) for key in shown} == shown
    (date,) = set(re.findall(r"\d{4}-\d\d-\d\d", (ROOT / "README.md").read_text()))
    assert f"\n{date}, " in (ROOT / "benchmarks" / "README.md").read_text()


def test_the_reference_has_every_public_module() -> None:
    page = (ROOT / "docs" / "reference.md").read_text()
    modules = {reference.partition(":")[0] for table in (config.ORIGINALS, config.META_BACKENDS) for reference in
               table.values()}  # fmt: skip
    modules |= {f"aproxy_storage.tools.{module.name}" for module in pkgutil.iter_modules(aproxy_storage.tools.__path__)}
    modules |= {"aproxy_storage.config", "aproxy_storage.registry", "aproxy_storage.urls"}
    assert not [module for module in sorted(modules) if f".. automodule:: {module}\n" not in page]


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
    doc = thing.__doc__ if inspect.isroutine(thing) else vars(thing).get("__doc__")  # not one that it inherits
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
                "backends.django.DjangoStorageBackend",
                "backends.obstore.ObstoreBackend",
                "meta_backends.sqlite.SQLiteMetaBackend",
                "meta_backends.memory.MemoryMetaBackend",
                "tools.bulk.save_many",
                "tools.bulk.delete_many",
                "tools.migrate.copy_files",
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
