"""Floor for a checksum of one big file: hashlib.file_digest in a thread."""

import asyncio
import hashlib
from pathlib import Path


def digest(source: Path) -> str:
    with source.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


async def run(source: Path, target: Path) -> None:
    await asyncio.to_thread(digest, source)
