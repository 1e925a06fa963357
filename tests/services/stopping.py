"""Stopping a process for certain: a signal takes effect a moment after it was sent; a busy server may still answer."""

import contextlib
import os
import signal
import time
from pathlib import Path


def stop(pid: int) -> None:
    """Send SIGSTOP, and wait until every thread of the process stands still."""
    os.kill(pid, signal.SIGSTOP)
    tasks = Path(f"/proc/{pid}/task")
    for _ in range(500):
        states = []
        with contextlib.suppress(OSError):
            states = [(task / "stat").read_text().rpartition(")")[2].split()[0] for task in tasks.iterdir()]
        if all(state in "TZX" for state in states):
            return
        time.sleep(0.01)
