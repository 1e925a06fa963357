"""What a public repository is expected to have: CI with the targets that developers run, templates, a way to report."""

import re
import shutil
import subprocess
import tomllib
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parent.parent
GITHUB = ROOT / ".github"

pytestmark = pytest.mark.skipif(not GITHUB.is_dir(), reason="an unpacked sdist has no .github")


def test_ci_runs_targets_that_exist_on_every_supported_python() -> None:
    workflow = yaml.safe_load((GITHUB / "workflows" / "ci.yml").read_text())
    commands = [step["run"] for job in workflow["jobs"].values() for step in job["steps"] if "run" in step]
    targets = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    used = {command.removeprefix("make ") for command in commands if command.startswith("make ")}
    assert {"lint", "docs", "test", "demo"} <= used <= targets
    assert ".ci/run" in commands
    classifiers = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["classifiers"]
    supported = re.findall(r"Python :: (3\.\d+)", "\n".join(classifiers))
    assert workflow["jobs"]["test"]["strategy"]["matrix"]["python"] == supported


def test_ci_may_only_read() -> None:
    workflow = yaml.safe_load((GITHUB / "workflows" / "ci.yml").read_text())
    assert workflow["permissions"] == {"contents": "read"}
    assert all("timeout-minutes" in job for job in workflow["jobs"].values())


@pytest.mark.parametrize("name", ["bug.yml", "idea.yml"])
def test_issue_templates_are_forms(name: str) -> None:
    form = yaml.safe_load((GITHUB / "ISSUE_TEMPLATE" / name).read_text())
    assert {"name", "description", "body"} <= form.keys()
    ids = [part["id"] for part in form["body"] if part["type"] != "markdown"]
    assert len(ids) == len(set(ids))


def test_make_clean_leaves_what_users_keep_here(tmp_path: Path) -> None:
    """The storage without configuration, where the quickstart puts files, and the uploads of the example site."""
    shutil.copy(ROOT / "Makefile", tmp_path)
    kept = ["aproxy-data/records.sqlite3", "aproxy-data/files/src/__pycache__/a.pyc", "files/__pycache__/a.pyc",
            "examples/django_project/var/media/__pycache__/a.pyc"]  # fmt: skip
    gone = [".venv/x", "build/docs/x", "aproxy_storage/__pycache__/a.pyc", "tests/cli/__pycache__/a.pyc"]
    for name in kept + gone + [f"{name}/.x" for name in (".ci", "sync_bridge", "benchmarks", "docs")]:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    subprocess.run(["make", "clean"], cwd=tmp_path, check=True, capture_output=True, timeout=60)
    assert [name for name in kept if not (tmp_path / name).exists()] == []
    assert [name for name in gone if (tmp_path / name).exists()] == []
