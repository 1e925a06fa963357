"""Upload a directory: thousands of files, a bounded number at a time, with progress, retries and a list of failures.

    python examples/batch_upload.py DIRECTORY

Where to is said by $APROXY_CONFIG or ./aproxy.toml, and without either it is ./aproxy-data. Stopped with Ctrl-C, what
was reported is stored, and the rest is stored whole or not at all. A second run uploads what is missing.
"""

import argparse
import asyncio
import contextlib
import os
import random
import sys
import time
from itertools import islice
from pathlib import Path

from aproxy_storage import StorageError
from aproxy_storage.config import load

ATTEMPTS = 4


def files_below(root, onerror):
    """Yield (name in the storage, local path); one directory is held at a time, so there may be millions.

    What cannot be listed goes to `onerror`, as an OSError: else its files would be left out without a word.
    """
    for directory, directories, names in os.walk(root, onerror=onerror):
        directories.sort()
        for name in sorted(names):
            path = Path(directory, name)
            yield path.relative_to(root.parent).as_posix(), path


async def missing(storage, files, batch=500):
    """Leave out what is stored already: one question for each 500 files."""
    files = iter(files)
    while chunk := list(islice(files, batch)):
        known = await storage.get_many([storage.prefix + name for name, _ in chunk])
        for pair, record in zip(chunk, known, strict=True):
            if record is None:
                yield pair


async def save(storage, name, path):
    """Save one file; where the storage says that it may work later, try again, later and later."""
    for attempt in range(1, ATTEMPTS + 1):
        try:
            return await storage.save(name, path, extra={"uploaded_from": str(path)})
        except StorageError as error:
            if not error.retryable or attempt == ATTEMPTS:
                raise
            await asyncio.sleep(random.uniform(0.5, 1) * 2**attempt)  # not all at once


async def upload(storage, root, *, concurrency, failures):
    """Upload what is missing; yield the path of each file as it is stored."""
    # save_many(storage, pairs) would do without the retries.
    from aproxy_storage.tools.bulk import run_many

    results = run_many(
        storage,
        missing(storage, files_below(root, lambda error: failures.append((error.filename, error)))),
        lambda pair: save(storage, *pair),
        name=lambda pair: pair[0],
        concurrency=concurrency,
    )
    async with contextlib.aclosing(results):
        async for result in results:
            if result.ok:
                yield result.value
            else:
                failures.append((result.item, result.error))


async def main(root, concurrency):
    storage = next(iter(load().values()))
    failures = []
    count, began, shown = 0, time.monotonic(), 0.0
    async with storage:
        async for _path in upload(storage, root, concurrency=concurrency, failures=failures):
            count += 1
            if (now := time.monotonic()) - shown > 0.5:
                shown = now
                print(f"\r{count:,} files, {count / (now - began):,.0f} a second", end="", file=sys.stderr, flush=True)
    print(f"\r{count:,} files stored, {len(failures):,} failed", file=sys.stderr)
    for name, error in failures:
        print(f"{name}: {error}", file=sys.stderr)
    return not failures


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Upload a directory.")
    parser.add_argument("directory", type=Path)
    parser.add_argument("--concurrency", type=int, default=32)
    options = parser.parse_args()
    if not options.directory.is_dir():
        parser.error(f"{options.directory} is no directory")
    try:
        sys.exit(0 if asyncio.run(main(options.directory.resolve(), options.concurrency)) else 1)
    except KeyboardInterrupt:
        sys.exit(130)
