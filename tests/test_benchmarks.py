"""Every benchmark runs once, tiny, so that none of them rots; no time is asserted."""

import importlib
import os
import pathlib
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parent.parent
FLOORS = ROOT / "benchmarks" / "floors"
STORES = ("threads_aiosqlite", "aiofiles_aiosqlite", "one_thread")
BIG = ("copyfile", "file_digest", "thread_reads", "thread_hops")


def test_floors_are_small_and_import_nothing_of_ours() -> None:
    modules = sorted(FLOORS.glob("*.py"))
    assert [module.stem for module in modules] == sorted((*STORES, *BIG))
    for module in modules:
        source = module.read_text()
        assert len(source.splitlines()) <= 60, module
        assert "aproxy_storage" not in source, module


@pytest.mark.asyncio
@pytest.mark.parametrize("name", STORES)
async def test_floor_keeps_its_promises(name: str, tmp_path: pathlib.Path) -> None:
    floor = importlib.import_module(f"benchmarks.floors.{name}")
    async with floor.Store(tmp_path) as store:
        first, second = [await store.save("a/b.tar", content) for content in (b"one", b"two")]
        assert first == "a/b.tar"
        assert second != first, "a taken name is never written over"
        assert [await store.read(path) for path in (first, second)] == [b"one", b"two"]
        await store.delete(first)
        assert [await store.exists(path) for path in (first, second)] == [False, True]
        assert not (tmp_path / first).exists()
        with pytest.raises(FileNotFoundError):
            await store.read(first)


@pytest.mark.asyncio
@pytest.mark.parametrize("name", BIG)
async def test_big_floor_runs(name: str, tmp_path: pathlib.Path) -> None:
    source = tmp_path / "source"
    source.write_bytes(bytes(3_000_000))
    await importlib.import_module(f"benchmarks.floors.{name}").run(source, tmp_path / "target")
    assert name != "copyfile" or (tmp_path / "target").read_bytes() == source.read_bytes()


def test_whole_run_tiny(tmp_path: pathlib.Path) -> None:
    before = (ROOT / "benchmarks" / "README.md").read_text()
    # A process of its own: the peer configures Django.
    command = [sys.executable, ROOT / "benchmarks" / "run.py", "--quick", "--directory", tmp_path]
    environment = {name: value for name, value in os.environ.items() if name != "DJANGO_SETTINGS_MODULE"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, cwd=tmp_path, env=environment)
    assert done.returncode == 0, done.stdout + done.stderr
    for contender in (
        "threads + aiosqlite",
        "one thread",
        "dps, sync_to_async",
        "file_digest",
        "bare async ORM",
        "run_coroutine_threadsafe",
        "dps, inside atomic()",
        "bare asyncpg pool",
        "aioboto3, same Config",
        "bare obstore",
        "goals met",
    ):
        assert contender in done.stdout
    assert "left out" not in done.stdout
    assert (ROOT / "benchmarks" / "README.md").read_text() == before, "a tiny run is not a result"


def test_the_profile_names_every_thread() -> None:
    command = [sys.executable, str(ROOT / "benchmarks" / "where.py"), "--files", "16", "--rounds", "1"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    for line, verb in zip(done.stdout.splitlines(), ("save", "delete"), strict=True):
        assert line.startswith(f"{verb}, microseconds each: wall clock")
        assert "event loop" in line
        assert "files" in line
        assert "writer" in line


@pytest.mark.soak
def test_the_profile_over_s3_leaves_parts_out() -> None:
    command = [sys.executable, str(ROOT / "benchmarks" / "where_s3.py"), "--turns", "1", "--size", "10"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    heading, *rows = done.stdout.splitlines()
    assert heading.startswith("10 bytes up")
    assert [row.split("  ")[0] for row in rows][:3] == ["S3Backend alone", "S3Backend with SHA-256", "proxy"]
