"""Kill the process at every step of the journal, and at random moments: nothing acknowledged is lost, nothing is left.

The seed is printed; `APROXY_CRASH_SEED=…` repeats a run as far as the scheduling of processes allows.
"""

from __future__ import annotations

import os
import random
import time
from pathlib import Path

import pytest

from tests.crash.steps import CHILD_STEPS, RECONCILE_STEPS
from tests.crash.theatre import AT_RANDOM, play
from tests.telling import Tell

STEPS = [*CHILD_STEPS, *RECONCILE_STEPS]


def keeps_attributes(directory: Path) -> bool:
    """Return whether files here keep the token of their write; without it reconcile leaves what it cannot tell."""
    probe = directory / "probe"
    probe.touch()
    try:
        os.setxattr(probe, "user.aproxy.token", b"x")
    except OSError:
        return False
    finally:
        probe.unlink()
    return True


async def crash(root: Path, tell: Tell, *, each: int, at_random: int, at_least: int) -> None:
    if not keeps_attributes(root):
        pytest.skip(f"{root} keeps no extended attributes; point --basetemp at a file system that does")
    seed = int(os.environ.get("APROXY_CRASH_SEED", random.randrange(1 << 20)))
    steps = STEPS * each + [AT_RANDOM] * at_random
    random.Random(seed).shuffle(steps)
    began = time.monotonic()
    print(f"APROXY_CRASH_SEED={seed}")  # for a run that fails
    kills, acknowledged = await play(root, steps, seed=seed)
    seconds = time.monotonic() - began
    heading = f"{kills.total()} kills in {seconds:.0f} s, {acknowledged} acknowledgements held to ({seed=})"
    for step in [AT_RANDOM, *STEPS]:
        tell(heading, f"{kills[step]:6}  {step}")
    assert kills.total() >= at_least
    assert not {step: kills[step] for step in STEPS if kills[step] < 5}


@pytest.mark.asyncio
async def test_a_kill_loses_nothing_and_leaves_nothing(tmp_path: Path, tell: Tell) -> None:
    await crash(tmp_path, tell, each=5, at_random=10, at_least=100)


@pytest.mark.soak
@pytest.mark.asyncio
async def test_a_thousand_kills_lose_nothing_and_leave_nothing(tmp_path: Path, tell: Tell) -> None:
    await crash(tmp_path, tell, each=14, at_random=300, at_least=1000)
