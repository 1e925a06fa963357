"""What importing the library brings in, and what it asks an installer for."""

import pathlib
import subprocess
import sys

CHECK = pathlib.Path(__file__).parent.parent / ".ci" / "check_import.py"


def test_import_brings_in_no_driver(tmp_path: pathlib.Path) -> None:
    # In a process of its own: this one has long imported half of the drivers.
    done = subprocess.run([sys.executable, "-I", CHECK], cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert "imports cleanly" in done.stdout
