"""Memory is bounded by chunks in flight, whatever the size or the number of files."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.telling import Tell

MIB = 1 << 20
SCRIPT = Path(__file__).with_name("memory_scenarios.py")
ROOT = Path(__file__).parents[2]
SAFETY = 270.0
FREE = 3 << 30  # bytes that a disk must have free for files of 1 GiB

# By how many MiB the resident memory of a process may grow.
LIMITS = {
    "one_big_file": {"saved": 48, "read": 48},
    "many_files": {"saved": 64, "deleted": 16},
    "long_list": {"listed": 32, "rolled up": 32},
    "many_readers": {"read": 64 * 3},  # three chunks a reader
}
# Chunks come from the system and go back to it one by one. By default glibc begins to keep them for the thread that
# gave the first one back: up to twice of what is held, and not always the same.
ALLOCATOR = {"MALLOC_MMAP_THRESHOLD_": str(128 << 10)}


@pytest.mark.parametrize("scenario", LIMITS)
def test_memory_stays_bounded(scenario: str, tmp_path: Path, tell: Tell) -> None:
    """In a process of its own, so that nothing else grows in it; the fixture's directory is emptied at once."""
    if not os.path.exists("/proc/self/clear_refs"):
        pytest.skip("resident memory is measured by /proc, which this system has not")
    free = shutil.disk_usage(tmp_path).free
    if free < FREE:
        pytest.skip(f"{tmp_path} has {free >> 20} MiB free, {FREE >> 20} are needed")
    try:
        done = subprocess.run(
            [sys.executable, str(SCRIPT), scenario, str(tmp_path)],
            cwd=ROOT,
            env={**os.environ, **ALLOCATOR, "PYTHONPATH": str(ROOT), "COVERAGE_PROCESS_START": ""},
            capture_output=True,
            text=True,
            timeout=SAFETY,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        figures = {name: round(grown / MIB, 1) for name, grown in json.loads(done.stdout).items()}
    finally:
        shutil.rmtree(tmp_path / "files", ignore_errors=True)
    tell("resident memory: grown by MiB", f"{scenario:<14} {figures}")
    for name, limit in LIMITS[scenario].items():
        assert figures[name] < limit, f"{scenario}, {name}: grown by {figures[name]} MiB, {limit} are allowed"
