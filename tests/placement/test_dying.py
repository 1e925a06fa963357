"""kill -9 in the middle of a hedged, replicated or falling-back save: reconcile leaves what was promised, no more."""

import json
import subprocess
import sys
from pathlib import Path

from tests.placement.dying import CASES

REPOSITORY = Path(__file__).parents[2]


def test_a_process_that_is_killed_in_any_step_leaves_nothing_after_reconcile(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "tests.placement.dying", str(tmp_path)],
        cwd=REPOSITORY, capture_output=True, text=True, timeout=240, check=True,
    )  # fmt: skip
    cases = [json.loads(line) for line in done.stdout.splitlines()]
    assert [case["case"] for case in cases] == list(CASES)
    assert [case for case in cases if not case["killed"]] == [], done.stderr[-3000:]
    assert [case for case in cases if not case["clean"]] == [], done.stderr[-3000:]
