"""The benchmark of fallbacks runs once, tiny, so that it does not rot; no time is asserted."""

import subprocess
import sys
import xml.etree.ElementTree as ET
from pathlib import Path

PROGRAM = Path(__file__).parents[2] / "benchmarks" / "fallback.py"


def test_it_prints_tables_and_draws_pictures(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-W", "error", PROGRAM, "--quick", "--directory", tmp_path, "--pictures", "pictures"],
        cwd=tmp_path, capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    for row in ("| the second alone |", "| and breaker |", "| and hedging |", "Fallback / First", "two copies / one"):
        assert row in done.stdout
    for name in ("fallback-phases", "fallback-timelines"):
        picture = ET.parse(tmp_path / "pictures" / f"{name}.svg").getroot()
        assert len(picture) > 20
    assert sorted(path.name for path in tmp_path.iterdir()) == ["pictures"], "what it has written is removed"
