"""Check an installed copy: what importing the root packages brings in, and what the wheel asks for.

Run by `.ci/run` in an empty environment and by tests/test_packaging.py; it uses the standard library only.
"""

import importlib.metadata
import pathlib
import sys

DRIVERS = {
    *("aioboto3", "aiobotocore", "boto3", "botocore", "obstore", "aiohttp", "httpx"),
    *("pymongo", "motor", "gridfs", "bson"),
    *("asyncpg", "psycopg", "psycopg2", "sqlalchemy"),
    *("sqlite3", "aiosqlite"),
    *("django", "asgiref", "starlette", "puremagic", "aiofiles", "typer", "rich"),
}


def main() -> None:
    import aproxy_storage
    import sync_bridge

    loaded = DRIVERS & {name.partition(".")[0] for name in sys.modules}
    assert not loaded, f"importing the root packages also imported {sorted(loaded)}"
    for package in (aproxy_storage, sync_bridge):
        assert package.__file__ is not None
        assert (pathlib.Path(package.__file__).parent / "py.typed").is_file(), f"{package.__name__} has no py.typed"
    required = [r for r in importlib.metadata.requires("aproxy-storage") or [] if "extra ==" not in r]
    assert required == [], required
    version = importlib.metadata.version("aproxy-storage")
    print(f"aproxy-storage {version} imports cleanly on Python {sys.version.split()[0]} from {aproxy_storage.__file__}")


if __name__ == "__main__":
    main()
