"""A job that its caller was told had not begun is never run."""

from __future__ import annotations

import asyncio
import time
from collections import deque

import pytest

from aproxy_storage.errors import DeadlineExceeded
from aproxy_storage.threads import Job, Workers


class Slow(Workers):
    """Let the deadline strike right between the look at the job and its beginning."""

    def run_batch(self, batch: deque[Job]) -> None:
        job = batch.popleft()
        if self.claim(job):
            time.sleep(0.3)
            job.run()


@pytest.mark.asyncio
async def test_a_deadline_between_claim_and_run_leaves_the_outcome_unknown() -> None:
    ran: list[int] = []
    with pytest.raises(DeadlineExceeded) as caught:
        await Slow("slow", 1).call(lambda: ran.append(1), timeout=0.05)
    await asyncio.sleep(0.4)
    assert ran == [1]
    assert caught.value.outcome_unknown
