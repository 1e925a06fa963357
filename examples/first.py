"""Store files, read them back, and say of each whether it came back unharmed.

    python examples/first.py README.md LICENSE

The bytes go to ./aproxy-data/files under their own names, what is known of them to ./aproxy-data/records.sqlite3.
Run it twice: no file is ever overwritten, the second README.md gets a name of its own.
"""

import argparse
import asyncio
import hashlib
import sys
from pathlib import Path

from aproxy_storage import ProxyStorage, StorageError
from aproxy_storage.backends.filesystem import FileSystemBackend
from aproxy_storage.meta_backends.sqlite import SQLiteMetaBackend


async def store_and_check(storage: ProxyStorage, file: Path) -> bool:
    path = await storage.save(file.name, file)
    record = await storage.get(path)

    digest = hashlib.sha256()
    async for chunk in storage.stream(path):
        digest.update(chunk)
    ok = record.checksum == f"sha256:{digest.hexdigest()}"

    print(f"{path:<32} {record.size:>10} bytes  sha256 {digest.hexdigest()[:12]}  {'ok' if ok else 'DAMAGED'}")
    return ok


async def main(files: list[Path], data: Path) -> bool:
    data.mkdir(parents=True, exist_ok=True)
    storage = ProxyStorage(
        "first",
        originals=FileSystemBackend(data / "files"),
        meta=SQLiteMetaBackend(data / "records.sqlite3"),
    )
    good = True
    async with storage:
        for file in files:
            try:
                good &= await store_and_check(storage, file)
            except StorageError as error:
                print(f"{file}: {error}", file=sys.stderr)
                good = False
    return good


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Store files, read them back and compare the checksums.")
    parser.add_argument("files", nargs="+", type=Path, metavar="FILE")
    parser.add_argument("--data", type=Path, default=Path("aproxy-data"), metavar="DIR", help="where to keep them")
    options = parser.parse_args()
    sys.exit(0 if asyncio.run(main(options.files, options.data)) else 1)
