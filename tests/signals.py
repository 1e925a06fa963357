"""Saves in the calling thread while a signal handler raises at random: ``python -m tests.signals KIND DIRECTORY``.

Each error must reach the caller as it is; nothing may be locked, lost or left over. Prints how many errors arrived.
"""

import asyncio
import gc
import random
import signal
import sys
import warnings
from pathlib import Path
from typing import Any

from aproxy_storage import ProxyStorage, blocking
from aproxy_storage.backends.filesystem import FileSystemBackend
from aproxy_storage.blocking import run_blocking
from aproxy_storage.meta_backends.sqlite import SQLiteMetaBackend
from aproxy_storage.tools.reconcile import reconcile


class Signal(Exception):
    """What a soft time limit raises; like Ctrl-C, but an Exception."""


def main(kind: type[BaseException], directory: Path) -> int:
    sys.unraisablehook = lambda _: None  # what is raised in a destructor
    warnings.simplefilter("ignore")
    meta: Any = SQLiteMetaBackend(directory / "records.sqlite3")
    storage = ProxyStorage("signals", originals=FileSystemBackend(directory / "files"), meta=meta)
    run_blocking(storage.save("first.txt", b"x"))
    armed = False

    def handler(*_: object) -> None:
        nonlocal armed
        if armed:
            armed = False
            raise kind

    signal.signal(signal.SIGALRM, handler)
    dice = random.Random(7)
    acknowledged = {"first.txt"}
    arrived = 0
    for number in range(300):
        work = storage.save(f"{number}.txt", b"x" * 100)
        try:
            armed = True
            signal.setitimer(signal.ITIMER_REAL, dice.uniform(0.00002, 0.001))
            path = run_blocking(work)
            armed = False
            acknowledged.add(path)
        except kind:
            arrived += 1
        finally:
            armed = False
            signal.setitimer(signal.ITIMER_REAL, 0)
            work.close()
        assert asyncio._get_running_loop() is None
        assert not meta._engine._writing.lock.locked()
        loop = blocking._mine.owner.loop
        assert not loop.is_running()
        assert not loop._tasks
    gc.collect()
    run_blocking(reconcile(storage, dry_run=False, force=True))

    async def stored() -> dict[str, str]:
        return {record.path: record.original_storage_path async for record in storage.list("")}

    records = run_blocking(stored())
    assert acknowledged <= records.keys()
    assert set(records.values()) == {path.name for path in (directory / "files").iterdir()}
    run_blocking(storage.aclose())
    return arrived


if __name__ == "__main__":
    print(main({"KeyboardInterrupt": KeyboardInterrupt, "Signal": Signal}[sys.argv[1]], Path(sys.argv[2])))
