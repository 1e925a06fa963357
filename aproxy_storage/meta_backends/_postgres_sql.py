"""The table of `PostgresMetaBackend`, and the texts of its statements."""

from __future__ import annotations

from collections.abc import Sequence

from ..clients.postgres import identifier
from ._rows import COLUMNS

__all__ = ["SCHEMA_VERSION", "Statements"]

SCHEMA_VERSION = 1

# The types are those of the Django model in sync_bridge, so that both can use one table. COLLATE "C" makes the order
# that of the bytes, which is that of the code points, and one index serve lookups and listings.
#
# Rows whose key is their path, most of them by far, need no entry in the index of owners: the primary key finds
# them. Nor need those without further places one in the third index.
_TABLE = """
CREATE TABLE {t} (
    path text COLLATE "C" NOT NULL PRIMARY KEY,
    proxy_storage_name text NOT NULL DEFAULT '',
    original_storage_name text NOT NULL DEFAULT '',
    original_storage_path text COLLATE "C" NOT NULL DEFAULT '',
    state text NOT NULL DEFAULT 'stored',
    token text NOT NULL DEFAULT '',
    version bigint NOT NULL DEFAULT 0,
    places text NOT NULL DEFAULT '[]',
    lease double precision,
    size bigint,
    checksum text,
    content_type text,
    name text,
    created_at timestamptz,
    updated_at timestamptz,
    extra jsonb
)"""

_UNFINISHED = "(lease IS NOT NULL OR state <> 'stored')"
_PLACES = "(places::jsonb)"

_INDEXES = {
    "unfinished": f'(path COLLATE "C") WHERE {_UNFINISHED}',
    "key": '(original_storage_path COLLATE "C") WHERE original_storage_path <> path',
    "places": f"USING gin ({_PLACES} jsonb_path_ops) WHERE places <> '[]'",
    # Where the path's own index is in another order, in a table that another program has made.
    "order": '(path COLLATE "C")',
}

_NOW = "extract(epoch FROM clock_timestamp())::float8"
_TYPES = {
    "version": "bigint",
    "size": "bigint",
    "lease": "float8",
    "created_at": "timestamptz",
    "updated_at": "timestamptz",
}
_SELECTED = ", ".join("coalesce(extra::text, '{}')" if column == "extra" else column for column in COLUMNS)
_RETURNED = ", ".join("coalesce(t.extra::text, '{}')" if column == "extra" else f"t.{column}" for column in COLUMNS)
# No statement may wait long for a row that a transaction holds: it would keep waiting what shares it, and those who
# want its connection. The setting ends with the statement, which is a transaction of its own.
_HURRY = "(SELECT set_config('lock_timeout', '500ms', true)) AS hurry"


def _type(column: str) -> str:
    return _TYPES.get(column, "text")


def _value(column: str, given: str) -> str:
    """Return the SQL that makes the value of a column out of what was given."""
    if column == "lease":
        return f"{_NOW} + {given}"
    if column in ("created_at", "updated_at"):
        return f"coalesce({given}, now())"
    if column == "extra":
        return f"{given}::jsonb"
    return given


class Statements:
    """The texts of all statements on one table.

    Raises:
        ConfigurationError: `table` or `schema` is not a plain SQL name.
    """

    def __init__(self, table: str, schema: str | None) -> None:
        name = identifier(table, "table")
        self.table = table
        self.schema = schema
        self.name = t = name if schema is None else f"{identifier(schema, 'schema')}.{name}"
        self.create_table = _TABLE.format(t=t)
        #: By the name of the index, the statement that makes it.
        self.create_indexes: dict[str, str] = {}
        self.create_order_index: dict[str, str] = {}
        for suffix, definition in _INDEXES.items():
            index = f"{table[: 62 - len(suffix)]}_{suffix}"  # PostgreSQL would cut a longer name, silently
            kept = self.create_order_index if suffix == "order" else self.create_indexes
            kept[index] = f'CREATE INDEX "{index}" ON {t} {definition}'

        columns = ", ".join(COLUMNS)
        marks = [f"${number}::{_type(column)}" for number, column in enumerate(COLUMNS, 1)]
        values = ", ".join(_value(column, mark) for column, mark in zip(COLUMNS, marks, strict=True))
        into = f"INSERT INTO {t} AS t ({columns})"
        filled_in = "RETURNING path, lease, created_at, updated_at"
        self.insert = f"{into} SELECT {values} FROM {_HURRY} ON CONFLICT (path) DO NOTHING {filled_in}"
        arrays = ", ".join(f"${number}::{_type(column)}[]" for number, column in enumerate(COLUMNS, 1))
        given = ", ".join(_value(column, f"u.{column}") for column in COLUMNS)
        self.insert_many = (
            f"{into} SELECT {given} FROM unnest({arrays}) AS u ({columns}), {_HURRY} "
            f"ON CONFLICT (path) DO NOTHING {filled_in}"
        )
        self.reserve = self._reservation(columns, arrays, len(COLUMNS))

        self.get = f"SELECT {_SELECTED} FROM {t} WHERE path = $1"
        self.get_many = f"SELECT {_SELECTED} FROM {t} WHERE path = ANY($1::text[])"
        self.exists = f"SELECT path, state, proxy_storage_name FROM {t} WHERE path = $1"
        self.exists_many = f"SELECT path, state, proxy_storage_name FROM {t} WHERE path = ANY($1::text[])"
        gone = f"DELETE FROM {t} USING {_HURRY} WHERE path = $1"
        self.delete = f"{gone} RETURNING path"
        self.delete_expected = f"{gone} AND token = $2 AND version = $3 RETURNING path"
        # A token that is NULL: whatever there is.
        self.delete_many = (
            f"DELETE FROM {t} AS t USING unnest($1::text[], $2::text[], $3::bigint[]) AS u (path, token, version), "
            f"{_HURRY} WHERE t.path = u.path AND (u.token IS NULL OR (t.token = u.token AND t.version = u.version)) "
            "RETURNING t.path"
        )
        self.index_columns = (
            "SELECT a.attname FROM pg_index AS i JOIN pg_class AS c ON c.oid = i.indexrelid JOIN pg_attribute AS a "
            "ON a.attrelid = i.indrelid AND a.attnum = ANY(i.indkey) "
            "WHERE i.indrelid = to_regclass($1) AND c.relname = $2"
        )
        self.renew_many = self._renewal()
        self.owners = self._owners()
        self._updates: dict[tuple[tuple[str, ...], bool, bool], str] = {}

    def update(self, columns: Sequence[str], *, expecting: bool, many: bool) -> str:
        """Return the statement that sets `columns` (and ``updated_at``) of one row, or of many.

        Arguments: the path, with `expecting` the token and the version, then a value for each column; of many,
        an array of each. The journal uses a handful of combinations.
        """
        key = (tuple(columns), expecting, many)
        text = self._updates.get(key)
        if text is None:
            text = self._updates[key] = self._update(columns, expecting=expecting, many=many)
        return text

    def _update(self, columns: Sequence[str], *, expecting: bool, many: bool) -> str:
        names = ["path", "token", "version"] if expecting else ["path"]
        types = [*map(_type, names), *map(_type, columns)]
        if many:
            given = [*(f"u.{name}" for name in names), *(f"u.new_{column}" for column in columns)]
            arrays = ", ".join(f"${number}::{kind}[]" for number, kind in enumerate(types, 1))
            aliases = ", ".join([*names, *(f"new_{column}" for column in columns)])
            rows = f"FROM unnest({arrays}) AS u ({aliases}), {_HURRY}"
        else:
            given = [f"${number}::{kind}" for number, kind in enumerate(types, 1)]
            rows = f"FROM {_HURRY}"
        changes = [
            f"{column} = {_value(column, value)}" for column, value in zip(columns, given[len(names) :], strict=True)
        ]
        where = " AND ".join(f"t.{name} = {value}" for name, value in zip(names, given, strict=False))
        return (
            f"UPDATE {self.name} AS t SET {', '.join([*changes, 'updated_at = now()'])} {rows} "
            f"WHERE {where} RETURNING {_RETURNED}" + (", u.path AS old_path" if many else "")
        )

    def _renewal(self) -> str:
        """Return the statement that sets the lease of each row which has not changed, and which nobody holds."""
        same = "t.path = {0}.path AND t.token = {0}.token AND t.version = {0}.version"
        return f"""
            WITH free AS (
                SELECT t.path, t.token, t.version, u.lease FROM {self.name} AS t
                  JOIN unnest($1::text[], $2::text[], $3::bigint[], $4::float8[]) AS u (path, token, version, lease)
                    ON {same.format("u")}
                FOR NO KEY UPDATE OF t SKIP LOCKED
            )
            UPDATE {self.name} AS t SET lease = {_value("lease", "free.lease")}, updated_at = now()
            FROM free WHERE {same.format("free")} RETURNING {_RETURNED}"""

    def page(self, *, inclusive: bool, bounded: bool) -> str:
        """Return the statement of one page: lower bound, storage, state, limit and, if `bounded`, the upper bound."""
        upper = ' AND path COLLATE "C" < $5' if bounded else ""
        return (
            f'SELECT {_SELECTED} FROM {self.name} WHERE path COLLATE "C" {">=" if inclusive else ">"} $1{upper} '
            "AND ($2::text IS NULL OR proxy_storage_name = $2) AND ($3::text IS NULL OR state = $3) "
            'ORDER BY path COLLATE "C" LIMIT $4'
        )

    def count(self, *, bounded: bool) -> str:
        upper = ' AND path COLLATE "C" < $4' if bounded else ""
        return (
            f'SELECT count(*) FROM {self.name} WHERE path COLLATE "C" >= $1{upper} '
            "AND ($2::text IS NULL OR proxy_storage_name = $2) AND ($3::text IS NULL OR state = $3)"
        )

    def unfinished(self, *, after: bool) -> str:
        """Return the statement of one page: storage, force, seconds, limit and, if `after`, the last path."""
        lower = ' AND path COLLATE "C" > $5' if after else ""
        return (
            f"SELECT {_SELECTED} FROM {self.name} WHERE {_UNFINISHED}{lower} "
            "AND ($1::text IS NULL OR proxy_storage_name = $1) "
            f"AND ($2::boolean OR lease IS NULL OR lease <= {_NOW} - $3::float8) "
            'ORDER BY path COLLATE "C" LIMIT $4'
        )

    def _owners(self) -> str:
        original = "($2::text IS NULL OR t.original_storage_name = $2)"
        wanted = "CASE WHEN $2::text IS NULL THEN jsonb_build_array(k.key) ELSE jsonb_build_array($2::text, k.key) END"
        # Containment knows no order: ["a", "b"] is found in ["b", "a", "good"] too. The last condition is exact.
        return f"""
            SELECT k.key, t.path FROM unnest($1::text[]) AS k (key) JOIN {self.name} AS t ON t.path = k.key
              WHERE t.original_storage_path = k.key AND {original}
            UNION
            SELECT k.key, t.path FROM unnest($1::text[]) AS k (key) JOIN {self.name} AS t
              ON t.original_storage_path COLLATE "C" = k.key WHERE t.original_storage_path <> t.path AND {original}
            UNION
            SELECT k.key, t.path FROM unnest($1::text[]) AS k (key) JOIN {self.name} AS t
              ON (t.places::jsonb) @> jsonb_build_array({wanted}) WHERE t.places <> '[]' AND EXISTS (
                SELECT 1 FROM jsonb_array_elements(t.places::jsonb) AS p
                WHERE p->>1 = k.key AND ($2::text IS NULL OR p->>0 = $2))"""

    def _reservation(self, columns: str, arrays: str, count: int) -> str:
        """Return the statement that inserts each row, or where others name one of its places, its spare.

        Further arguments: for each row the key and places of its spare; for each place of all rows its row's path,
        its original and its key. What another record names is seen in the statement's snapshot, whatever path that
        record has at the moment. Only a row of the same path, renamed while we waited for its path, could get past
        this; `was` tells that there was one.
        """
        first = count + 1
        given = {column: _value(column, f"u.{column}") for column in COLUMNS}
        given["original_storage_path"] = "CASE WHEN n.path IS NULL THEN u.original_storage_path ELSE u.spare_key END"
        given["places"] = "CASE WHEN n.path IS NULL THEN u.places ELSE u.spare_places END"
        t = self.name
        return f"""
            WITH p AS (
                SELECT * FROM unnest(${first + 2}::text[], ${first + 3}::text[], ${first + 4}::text[])
                  AS p (path, original, key)
            ), n AS (
                SELECT DISTINCT p.path FROM p WHERE EXISTS (
                    SELECT 1 FROM {t} AS o WHERE o.original_storage_path COLLATE "C" = p.key
                      AND o.original_storage_path <> o.path AND o.original_storage_name = p.original
                      AND o.path <> p.path
                ) OR (p.key <> p.path AND EXISTS (
                    SELECT 1 FROM {t} AS o WHERE o.path = p.key AND o.original_storage_path = p.key
                      AND o.original_storage_name = p.original
                )) OR EXISTS (
                    SELECT 1 FROM {t} AS o WHERE o.places <> '[]' AND o.path <> p.path
                      AND (o.places::jsonb) @> jsonb_build_array(jsonb_build_array(p.original, p.key))
                )
            )
            INSERT INTO {t} AS t ({columns})
            SELECT {", ".join(given.values())}
            FROM unnest({arrays}, ${first}::text[], ${first + 1}::text[]) AS u ({columns}, spare_key, spare_places)
              LEFT JOIN n ON n.path = u.path, {_HURRY}
            ON CONFLICT (path) DO NOTHING
            RETURNING path, lease, created_at, updated_at, original_storage_path, places,
              EXISTS (SELECT 1 FROM {t} AS b WHERE b.path = t.path) AS was"""
