"""The tables of `SQLiteMetaBackend`, and the few statements it uses: a statement is prepared once per text."""

from __future__ import annotations

import re
import sqlite3

from ..errors import ConfigurationError
from ._rows import COLUMNS

__all__ = ["SCHEMA_VERSION", "Statements", "prepare"]

SCHEMA_VERSION = 1

# Not WITHOUT ROWID: rows of 300 bytes inside the tree of the paths make it deep, and an update then moves them all.
# Measured with 200,000 and 1,000,000 rows: inserts cost 1.4 times as much, updates 1.3 to 2.2 times; listings gain.
#
# Rows whose key is their path, most of them by far, need no entry in the index of owners: the primary key
# finds them. A row's further places are kept a second time in a table of their own, by triggers, so that whoever
# writes the rows, `owners` stays exact.
_SCHEMA = """
CREATE TABLE IF NOT EXISTS "{t}" (
    path TEXT NOT NULL PRIMARY KEY,
    proxy_storage_name TEXT NOT NULL DEFAULT '',
    original_storage_name TEXT NOT NULL DEFAULT '',
    original_storage_path TEXT NOT NULL DEFAULT '',
    state TEXT NOT NULL DEFAULT 'stored',
    token TEXT NOT NULL DEFAULT '',
    version INTEGER NOT NULL DEFAULT 0,
    places TEXT NOT NULL DEFAULT '[]',
    lease REAL,
    size INTEGER,
    checksum TEXT,
    content_type TEXT,
    name TEXT,
    created_at REAL,
    updated_at REAL,
    extra TEXT NOT NULL DEFAULT '{{}}'
);
CREATE INDEX IF NOT EXISTS "{t}_owner" ON "{t}" (original_storage_path, original_storage_name)
    WHERE original_storage_path <> path;
CREATE INDEX IF NOT EXISTS "{t}_unfinished" ON "{t}" (path) WHERE lease IS NOT NULL OR state <> 'stored';
CREATE TABLE IF NOT EXISTS "{t}_places" (
    key TEXT NOT NULL,
    original TEXT NOT NULL,
    path TEXT NOT NULL,
    PRIMARY KEY (key, original, path)
) WITHOUT ROWID;
CREATE TRIGGER IF NOT EXISTS "{t}_placed" AFTER INSERT ON "{t}" WHEN NEW.places <> '[]' BEGIN
    INSERT OR IGNORE INTO "{t}_places"
    SELECT json_extract(value, '$[1]'), json_extract(value, '$[0]'), NEW.path FROM json_each(NEW.places);
END;
CREATE TRIGGER IF NOT EXISTS "{t}_moved" AFTER UPDATE OF path, places ON "{t}"
WHEN OLD.places <> '[]' OR NEW.places <> '[]' BEGIN
    DELETE FROM "{t}_places" WHERE path = OLD.path AND (key, original) IN (
        SELECT json_extract(value, '$[1]'), json_extract(value, '$[0]') FROM json_each(OLD.places));
    INSERT OR IGNORE INTO "{t}_places"
    SELECT json_extract(value, '$[1]'), json_extract(value, '$[0]'), NEW.path FROM json_each(NEW.places);
END;
CREATE TRIGGER IF NOT EXISTS "{t}_gone" AFTER DELETE ON "{t}" WHEN OLD.places <> '[]' BEGIN
    DELETE FROM "{t}_places" WHERE path = OLD.path AND (key, original) IN (
        SELECT json_extract(value, '$[1]'), json_extract(value, '$[0]') FROM json_each(OLD.places));
END;
"""

_IDENTIFIER = re.compile(r"[A-Za-z_][A-Za-z0-9_]{0,62}")


class Statements:
    """The texts of all statements on `table`.

    Raises:
        ConfigurationError: that is not a plain SQL name.
    """

    def __init__(self, table: str) -> None:
        if not _IDENTIFIER.fullmatch(table):
            raise ConfigurationError(f"{table!r} cannot name a table: use letters, digits and underscores")
        t = f'"{table}"'
        columns = ", ".join(COLUMNS)
        self.table = table
        self.schema = _SCHEMA.format(t=table)
        self.insert = (
            f"INSERT INTO {t} ({columns}) VALUES ({', '.join('?' * len(COLUMNS))}) ON CONFLICT (path) DO NOTHING"
        )
        self.get = f"SELECT {columns} FROM {t} WHERE path = ?"
        self.exists = f"SELECT state, proxy_storage_name FROM {t} WHERE path = ?"
        self.delete = f"DELETE FROM {t} WHERE path = ?"
        self.delete_expected = f"DELETE FROM {t} WHERE path = ? AND token = ? AND version = ?"
        filters = "(?3 IS NULL OR proxy_storage_name = ?3) AND (?4 IS NULL OR state = ?4)"
        page = f"SELECT {columns} FROM {t} WHERE path {{}} ?1 AND path < ?2 AND {filters} ORDER BY path LIMIT ?5"
        self.page_from, self.page_after = page.format(">="), page.format(">")
        self.count = f"SELECT count(*) FROM {t} WHERE path >= ?1 AND path < ?2 AND {filters}"
        # INDEXED BY: never a scan of the whole table, whatever the statistics say. The first condition is that of
        # the index, word by word, or SQLite would not see that it may use it.
        self.unfinished = f"""
            SELECT {columns} FROM {t} INDEXED BY "{table}_unfinished"
            WHERE (lease IS NOT NULL OR state <> 'stored') AND path > ?1
              AND (?2 IS NULL OR proxy_storage_name = ?2)
              AND (?3 OR lease IS NULL OR lease <= (julianday('now') - 2440587.5) * 86400.0 - ?4)
            ORDER BY path LIMIT ?5"""
        self.unfinished_from_start = self.unfinished.replace("AND path > ?1", "AND path >= ?1")
        self.owners = f"""
            SELECT path FROM {t} WHERE path = ?1
              AND original_storage_path = ?1 AND (?2 IS NULL OR original_storage_name = ?2)
            UNION
            SELECT path FROM {t} INDEXED BY "{table}_owner" WHERE original_storage_path <> path
              AND original_storage_path = ?1 AND (?2 IS NULL OR original_storage_name = ?2)
            UNION
            SELECT path FROM "{table}_places" WHERE key = ?1 AND (?2 IS NULL OR original = ?2)
            ORDER BY path"""
        self.is_named_elsewhere = f"""
            SELECT EXISTS (
                SELECT 1 FROM {t} INDEXED BY "{table}_owner" WHERE original_storage_path <> path
                  AND original_storage_path = ?1 AND original_storage_name = ?2 AND path <> ?3
            ) OR EXISTS (
                SELECT 1 FROM "{table}_places" WHERE key = ?1 AND original = ?2 AND path <> ?3
            ) OR ?1 <> ?3 AND EXISTS (
                SELECT 1 FROM {t} WHERE path = ?1 AND original_storage_path = ?1 AND original_storage_name = ?2
            )"""
        self._updates: dict[tuple[str, ...], str] = {}

    def update(self, columns: tuple[str, ...]) -> str:
        """Return the statement that sets `columns` of one row. The journal uses a handful of combinations."""
        text = self._updates.get(columns)
        if text is None:
            text = f'UPDATE "{self.table}" SET {", ".join(f"{column} = ?" for column in columns)} WHERE path = ?'
            self._updates[columns] = text
        return text


def prepare(cursor: sqlite3.Cursor, statements: Statements, path: str) -> None:
    """Make the tables where they are missing; called in the writer, not in a transaction.

    Raises:
        ConfigurationError: the schema there is newer, or SQLite too old, or the file's texts are in UTF-16.
        sqlite3.Error: as it comes.
    """
    if sqlite3.sqlite_version_info < (3, 24):
        raise ConfigurationError(f"SQLite 3.24 or newer is needed, this Python has {sqlite3.sqlite_version}")
    if cursor.execute("PRAGMA encoding").fetchone()[0] != "UTF-8":
        raise ConfigurationError(f"{path} keeps text in UTF-16, where listings are in another order; use a new file")
    if _version(cursor, path) == SCHEMA_VERSION and _complete(cursor, statements):
        return
    cursor.execute("BEGIN IMMEDIATE")
    try:
        _version(cursor, path)  # another process may have been first, and newer
        for statement in _split(statements.schema):
            cursor.execute(statement)
        cursor.execute(f"PRAGMA user_version = {SCHEMA_VERSION}")
        cursor.execute("COMMIT")
    except BaseException:
        if cursor.connection.in_transaction:
            cursor.execute("ROLLBACK")
        raise


def _version(cursor: sqlite3.Cursor, path: str) -> int:
    version = int(cursor.execute("PRAGMA user_version").fetchone()[0])
    if version > SCHEMA_VERSION:
        raise ConfigurationError(
            f"{path} has schema version {version}, this library knows {SCHEMA_VERSION}: update aproxy-storage, "
            "or name another file if this one belongs to another program"
        )
    return version


def _complete(cursor: sqlite3.Cursor, statements: Statements) -> bool:
    """Return whether this table is there; a file may hold several, each made in one transaction."""
    found = cursor.execute("SELECT 1 FROM sqlite_master WHERE name = ?", (f"{statements.table}_gone",)).fetchall()
    return bool(found)


def _split(script: str) -> list[str]:
    """Return the statements of `script`; not executescript, which would commit before it begins."""
    statements, begun = [], ""
    for line in script.splitlines(keepends=True):
        begun += line
        if sqlite3.complete_statement(begun):
            statements.append(begun)
            begun = ""
    return statements
