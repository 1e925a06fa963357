"""Floor for saving one big file: shutil.copyfile in a thread."""

import asyncio
import shutil
from pathlib import Path


async def run(source: Path, target: Path) -> None:
    await asyncio.to_thread(shutil.copyfile, source, target)
