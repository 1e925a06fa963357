"""Makes the table of `PostgresMetaBackend`, or looks whether one that is there will do."""

from __future__ import annotations

import re
from typing import Any

from ..clients.postgres import check_server, locked
from ..errors import ConfigurationError
from ._postgres_sql import SCHEMA_VERSION, Statements
from ._rows import COLUMNS

__all__ = ["prepare"]

_MARK = "aproxy-storage schema"

_LOOK = """
    SELECT obj_description(c.oid, 'pg_class') AS comment,
           (SELECT array_agg(a.attname::text) FROM pg_attribute AS a
             WHERE a.attrelid = c.oid AND a.attnum > 0 AND NOT a.attisdropped) AS columns,
           (SELECT l.collname::text FROM pg_attribute AS a JOIN pg_collation AS l ON l.oid = a.attcollation
             WHERE a.attrelid = c.oid AND a.attname = 'path') AS collation,
           (SELECT array_agg(i.relname::text) FROM pg_index AS x JOIN pg_class AS i ON i.oid = x.indexrelid
             WHERE x.indrelid = c.oid AND x.indisvalid) AS indexes,
           (SELECT array_agg(i.relname::text) FROM pg_index AS x JOIN pg_class AS i ON i.oid = x.indexrelid
             WHERE x.indrelid = c.oid AND NOT x.indisvalid) AS invalid
    FROM pg_class AS c WHERE c.oid = to_regclass($1)"""


async def prepare(connection: Any, statements: Statements, *, durable: bool) -> None:
    """Make schema, table and indexes where they are missing; idempotent, also under a race of processes.

    Raises:
        ConfigurationError: the server keeps texts in another encoding than UTF-8, or with `durable` would lose
            answered commits with the power; the table is newer than this library knows, or lacks columns.
        asyncpg's errors: as they come.
    """
    await check_server(connection, durable=durable)
    if not _missing(await _look(connection, statements), statements):
        return
    async with locked(connection, statements.name):
        await _make(connection, statements)


async def _look(connection: Any, statements: Statements) -> Any:
    return await connection.fetchrow(_LOOK, statements.name)


def _missing(found: Any, statements: Statements) -> list[str]:
    """Return the statements that make what is not there.

    Raises:
        ConfigurationError: as `prepare`.
    """
    if found is None:
        return [statements.create_table, *statements.create_indexes.values(), _mark(statements)]
    marked = re.fullmatch(rf"{_MARK} (\d+)", found["comment"] or "")
    if marked and int(marked[1]) > SCHEMA_VERSION:
        raise ConfigurationError(
            f"the table {statements.name} has schema version {marked[1]}, this library knows {SCHEMA_VERSION}: "
            "update aproxy-storage, or name another table"
        )
    lacking = set(COLUMNS) - set(found["columns"] or ())
    if lacking:
        raise ConfigurationError(
            f"the table {statements.name} lacks the columns {', '.join(sorted(lacking))}. If it was made by another "
            "program, docs/postgres.md has the statements that add them; else name another table"
        )
    indexes = dict(statements.create_indexes)
    if found["collation"] != "C":
        indexes |= statements.create_order_index
    invalid = sorted(set(indexes).intersection(found["invalid"] or ()))
    if invalid:
        where = "" if statements.schema is None else f'"{statements.schema}".'
        raise ConfigurationError(
            f"the index {invalid[0]} of the table {statements.name} is not valid: a CREATE INDEX CONCURRENTLY is under "
            f'way or has failed. Wait for its end, or DROP INDEX {where}"{invalid[0]}"; setup() makes it anew'
        )
    present = set(found["indexes"] or ())
    return [text for name, text in indexes.items() if name not in present]


async def _make(connection: Any, statements: Statements) -> None:
    """Make what is missing; called in a transaction, with the lock held."""
    schema = statements.schema
    # Not CREATE SCHEMA IF NOT EXISTS, which wants the right to make one even where it is there.
    if schema is not None and await connection.fetchval("SELECT to_regnamespace($1) IS NULL", f'"{schema}"'):
        await connection.execute(f'CREATE SCHEMA "{schema}"')
    for text in _missing(await _look(connection, statements), statements):
        await connection.execute(text)


def _mark(statements: Statements) -> str:
    return f"COMMENT ON TABLE {statements.name} IS '{_MARK} {SCHEMA_VERSION}'"
