"""Take the first store away while uploads run, and see where the files go.

    python examples/fallback_to_s3.py                                    # two directories
    python examples/fallback_to_s3.py --second 's3://KEY:SECRET@bucket?endpoint_url=http://localhost:8333'

Uploads go to ./aproxy-fallback/first (--data DIR: to DIR/first); ./aproxy-fallback must not be there yet. After a third
of them first is taken away, as an unmounted disk is gone, and after two thirds it is back. No upload fails, and at the
end every file is read back and compared.
"""

import argparse
import asyncio
import collections
import sys
from pathlib import Path
from urllib.parse import quote

from aproxy_storage import Attempt, Breaker, Fallback, ProxyStorage
from aproxy_storage.backends.filesystem import FileSystemBackend
from aproxy_storage.config import original_from_url
from aproxy_storage.meta_backends.sqlite import SQLiteMetaBackend
from aproxy_storage.tools.verify import verify


async def upload(storage: ProxyStorage, number: int) -> str:
    content = f"upload number {number}\n".encode() * 100
    return await storage.save(f"uploads/{number:04}.txt", content)


async def main(data: Path, second: str, count: int) -> bool:
    first = data / "first"
    outcomes: collections.Counter[tuple[str, str]] = collections.Counter()

    def on_attempt(attempt: Attempt) -> None:
        if attempt.kind == "write":
            outcomes[attempt.original, attempt.outcome] += 1

    storage = ProxyStorage(
        "uploads",
        originals={"first": FileSystemBackend(first), "second": original_from_url(second)},
        meta=SQLiteMetaBackend(data / "records.sqlite3"),
        placement=Fallback(attempt_timeout=5.0, breaker=Breaker(failures=3, reset_after=0.2)),
        on_attempt=on_attempt,
    )

    def tell(what: str) -> None:
        print(f"{what:<28}" + ", ".join(f"{name}: {how} {n}" for (name, how), n in sorted(outcomes.items())))
        outcomes.clear()

    async with storage:
        third = count // 3
        await asyncio.gather(*(upload(storage, number) for number in range(third)))
        tell("all is well")

        first.rename(data / "unmounted")
        await asyncio.gather(*(upload(storage, number) for number in range(third, 2 * third)))
        tell("the first is gone")

        (data / "unmounted").rename(first)
        await asyncio.sleep(0.3)  # `reset_after`: then one upload finds out
        for number in range(2 * third, count):
            await upload(storage, number)
        tell("the first is back")

        good = 0
        async for result in verify(storage):
            good += result.ok
            if not result.ok:
                print(f"{result.item}: {result.error}", file=sys.stderr)
        where = collections.Counter([record.original_storage_name async for record in storage.list("uploads/")])
        print(f"{good} of {count} files are whole: " + ", ".join(f"{n} in {name}" for name, n in sorted(where.items())))
    return good == count


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Take the first store away while uploads run.")
    parser.add_argument("--second", metavar="URL", help="of the second original; a directory in DIR unless given")
    parser.add_argument("--count", type=int, default=90, metavar="N", help="uploads")
    parser.add_argument("--data", type=Path, default=Path("aproxy-fallback"), metavar="DIR", help="must not exist yet")
    options = parser.parse_args()
    try:
        options.data.mkdir(parents=True)
    except FileExistsError:
        parser.error(f"{options.data} is there already; remove it, or name another directory with --data")
    second = options.second or f"file:{quote(str(options.data / 'second'))}"
    sys.exit(0 if asyncio.run(main(options.data, second, options.count)) else 1)
