"""PostgreSQL through asyncpg: a pool for each event loop, and what goes wrong in the words of this library.

Nothing here changes the state of a session, so that connections need no reset between two users (which would double
the round trips), and PgBouncer may stand in between; statements are prepared under names that no other process uses.
"""

from __future__ import annotations

import asyncio
import contextlib
import inspect
import random
import re
import secrets
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Mapping, Sequence
from typing import Any

from ..errors import (
    AccessDenied,
    BackendUnavailable,
    ConfigurationError,
    DeadlineExceeded,
    IntegrityError,
    MissingDependency,
    NotSupported,
    OutOfSpace,
    StorageError,
)
from ..loops import PerLoop
from ..urls import URL

try:
    import asyncpg  # type: ignore[import-untyped]
except ImportError as _error:
    raise MissingDependency.of("asyncpg", "postgres") from _error

__all__ = [
    "Connection",
    "Database",
    "NativeError",
    "UniqueViolation",
    "Using",
    "check_server",
    "identifier",
    "lock_timed_out",
    "locked",
    "map_error",
    "storable",
    "undid_itself",
]

#: What a statement that the server has refused raises.
NativeError: type[Exception] = asyncpg.PostgresError
UniqueViolation: type[Exception] = asyncpg.UniqueViolationError

_NATIVE = (OSError, asyncpg.PostgresError, asyncpg.InterfaceError, asyncpg.InternalClientError)

#: What has to be on for a commit to survive the loss of power.
_DURABLE = ("fsync", "full_page_writes", "synchronous_commit")

_COLLIDED = ("40001", "40P01")  # with another transaction, and did nothing
_REPEATS = 4  # of such a statement
_PAUSE = 0.01  # seconds before the first repeat, at most; each further one twice as long

_IDENTIFIER = re.compile(r"[A-Za-z_][A-Za-z0-9_]{0,62}")


class Connection(asyncpg.Connection):  # type: ignore[misc]
    """A connection that goes back to its pool as it is."""

    __slots__ = ()

    def get_reset_query(self) -> str:
        return ""

    def _get_unique_id(self, prefix: str) -> str:
        # asyncpg counts from 1 in each process. Behind a pooler that passes server connections on, a look-up of one
        # process would find there, and execute, the DELETE that another one has prepared under the same name.
        return f"__aproxy_{prefix}_{secrets.token_hex(8)}__"


class Database:
    """The way to one database: a pool per event loop, opened on first use, or the caller's own.

    Args:
        dsn: ``postgresql://user:password@host/database``; anything that asyncpg reads in one.
        pool: instead of `dsn`: an asyncpg pool, which serves its own event loop only and is never closed here; or a
            function that returns a new one, or an awaitable of one, for the running event loop.
        max_connections: of one event loop.
        connect_timeout: seconds that one attempt to connect may take.
        connect_options: further keyword arguments of `asyncpg.connect`: ``ssl``, ``passfile`` …
        grace: seconds that `aclose` waits for those who use a connection.
    """

    def __init__(
        self,
        dsn: str | None,
        pool: Any = None,
        *,
        max_connections: int,
        connect_timeout: float | None,
        connect_options: Mapping[str, Any] | None = None,
        grace: float = 10.0,
    ) -> None:
        if (dsn is None) == (pool is None):
            raise ConfigurationError("PostgreSQL is given either by dsn= or by pool=")
        if pool is not None and not isinstance(pool, asyncpg.Pool) and not callable(pool):
            raise ConfigurationError(
                f"pool= is an asyncpg pool or a function that makes one, not {type(pool).__name__}"
            )
        if max_connections < 1:
            raise ConfigurationError(f"max_connections must be at least 1, not {max_connections}")
        self._dsn = dsn
        self._pool = pool
        self._max_connections = max_connections
        self._options = {"timeout": connect_timeout, **(connect_options or {})}
        self._grace = grace
        self._entries: PerLoop[_Entry] = PerLoop(lambda: _Entry(self))
        self.name = "a pool" if dsn is None else _name_of(dsn)

    def __str__(self) -> str:
        return self.name

    @property
    def max_connections(self) -> int:
        """How many the running loop can have at a time; of a pool of the caller's it is known once that is open."""
        pool = self._entries.get().pool
        return self._max_connections if pool is None else int(pool.get_max_size())

    async def open(self) -> None:
        """Open the pool of the running loop, unless it is open. Errors as of `use`."""
        await self._entries.get().open()

    def use(self) -> Using:
        """Return an async context manager that gives a connection.

        Errors on the way to a connection come out mapped, with a known outcome: nothing was sent. Whatever ends the
        block otherwise than by an answer of the server (a cancellation, a timeout, a lost connection) ends the
        connection too, at once: nobody waits for a server that may hang.
        """
        return Using(self._entries.get())

    async def fetch(self, text: str, *values: Any) -> list[Any]:
        """Return the rows of one statement, which is a transaction of its own.

        Where the server has undone it, because it collided with another transaction, it is sent again, a few times:
        under another isolation than READ COMMITTED, which may be the default here, that is what one has to do.
        """
        rows: list[Any] = await self._send("fetch", text, values)
        return rows

    async def fetchrow(self, text: str, *values: Any) -> Any:
        """Return the first row of one statement, None if there is none; otherwise as `fetch`."""
        return await self._send("fetchrow", text, values)

    async def _send(self, method: str, text: str, values: Sequence[Any]) -> Any:
        for number in range(_REPEATS):
            try:
                async with self.use() as connection:
                    return await getattr(connection, method)(text, *values)
            except asyncpg.PostgresError as error:
                if error.sqlstate not in _COLLIDED:
                    raise
            await asyncio.sleep(random.uniform(0, _PAUSE * 2**number))
        async with self.use() as connection:
            return await getattr(connection, method)(text, *values)

    async def aclose(self) -> None:
        """Close the pool of the running loop, unless it is the caller's; idempotent."""
        entry = self._entries.pop()
        if entry is not None:
            await entry.close()

    async def open_pool(self) -> tuple[Any, bool]:
        """Return a pool for the running loop, and whether it is to be closed by us. Connects to nothing yet."""
        if self._dsn is not None:
            # No connection is kept open for its own sake: asyncpg would log a traceback a second while the server
            # is down. Those that are there stay for five minutes without use.
            pool = asyncpg.create_pool(
                self._dsn,
                min_size=0,
                max_size=self._max_connections,
                connection_class=Connection,
                **self._options,
            )
            return await pool, True
        if isinstance(self._pool, asyncpg.Pool):
            if self._pool._loop is not asyncio.get_running_loop():
                raise ConfigurationError(
                    "this asyncpg pool belongs to another event loop. Pass dsn=, or a function that makes a pool: "
                    "it is called once in each event loop"
                )
            return await self._pool, False  # which opens it, if nobody has
        made = self._pool()
        if inspect.isawaitable(made):
            made = await made
        return made, True


class _Entry:
    """The pool of one event loop, and who is using it."""

    def __init__(self, database: Database) -> None:
        self.database = database
        self.pool: Any = None
        self._ours = False
        self._opening = asyncio.Lock()
        self._users = 0
        self._left: asyncio.Event = asyncio.Event()
        self._ending: AsyncGenerator[None, None] | None = None

    async def open(self) -> Any:
        async with self._opening:
            if self.pool is None:
                try:
                    pool, self._ours = await self.database.open_pool()
                except Exception as error:
                    raise map_error(error, f"connect to {self.database}", sent=False) from error
                self._ending = _at_the_end_of_the_loop(self._shut)
                await anext(self._ending)
                self.pool = pool
        return self.pool

    def enter(self) -> None:
        self._users += 1

    def leave(self) -> None:
        self._users -= 1
        if not self._users:
            self._left.set()

    async def close(self) -> None:
        """Wait for those who use it, within the grace; then close it."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(self.database._grace):
                while self._users:
                    self._left.clear()
                    await self._left.wait()
        if self._ending is not None:
            await self._ending.aclose()

    async def _shut(self) -> None:
        pool, self.pool = self.pool, None
        if not self._ours:
            return
        try:
            async with asyncio.timeout(1.0):  # cancelled, it cuts the connections
                await pool.close()
        except _NATIVE:
            pool.terminate()


async def _at_the_end_of_the_loop(close: Callable[[], Awaitable[None]]) -> AsyncGenerator[None, None]:
    """Await `close` when this generator is closed; `asyncio.run` and its like do that before the loop ends."""
    try:
        yield
    finally:
        await close()


class Using:
    """One use of a connection, see `Database.use`."""

    __slots__ = ("_connection", "_entry", "_pool")

    def __init__(self, entry: _Entry) -> None:
        self._entry = entry

    async def __aenter__(self) -> Any:
        entry = self._entry
        entry.enter()
        try:
            self._pool = entry.pool or await entry.open()
            self._connection = await self._pool.acquire()
        except BaseException as error:
            entry.leave()
            if not isinstance(error, Exception) or isinstance(error, StorageError):
                raise
            raise map_error(error, f"connect to {entry.database}", sent=False) from error
        return self._connection

    async def __aexit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: Any) -> None:
        try:
            # What goes wrong here has cost the connection; the answer is there all the same.
            with contextlib.suppress(*_NATIVE):
                if error is not None and not isinstance(error, StorageError | asyncpg.PostgresError):
                    self._connection.terminate()
                await self._pool.release(self._connection)
        finally:
            self._entry.leave()


async def check_server(connection: Any, *, durable: bool) -> None:
    """Look whether the server is set up as its user expects.

    Raises:
        ConfigurationError: it keeps texts in another encoding than UTF-8; or with `durable`, it may lose answered
            commits when the power fails.
    """
    settings = dict(
        await connection.fetch(
            "SELECT name, setting FROM pg_settings WHERE name = ANY($1::text[])", ["server_encoding", *_DURABLE]
        )
    )
    if settings["server_encoding"] != "UTF8":
        raise ConfigurationError(
            f"the database keeps text as {settings['server_encoding']}; make one with ENCODING 'UTF8'"
        )
    off = [name for name in _DURABLE if settings.get(name) == "off"]
    if durable and off:
        raise ConfigurationError(
            f'durability="power" is not to be had from this server: {" and ".join(off)} is off for this user; turn it '
            "on in postgresql.conf, or with ALTER ROLE … SET"
        )


@contextlib.asynccontextmanager
async def locked(connection: Any, name: str) -> AsyncIterator[None]:
    """Run the block in a transaction that no other process runs for this `name` at the same time.

    What is no answer of the server (a cancellation, a lost connection) ends the connection: nobody waits for a
    ROLLBACK of a server that hangs.
    """
    # Each statement sees what was committed before it, with the lock that is, whatever the server's default.
    await connection.execute("BEGIN ISOLATION LEVEL READ COMMITTED")
    try:
        await connection.execute("SELECT pg_advisory_xact_lock(hashtextextended($1, 0))", f"aproxy-storage {name}")
        yield
        await connection.execute("COMMIT")
    except (StorageError, asyncpg.PostgresError):
        await connection.execute("ROLLBACK")
        raise
    except BaseException:
        connection.terminate()
        raise


def identifier(name: str, what: str) -> str:
    """Return `name` quoted for SQL.

    Raises:
        ConfigurationError: it is not a plain name.
    """
    if not _IDENTIFIER.fullmatch(name):
        raise ConfigurationError(f"{name!r} cannot name a {what}: use letters, digits and underscores")
    return f'"{name}"'


def storable(text: str) -> bool:
    """Return whether PostgreSQL can hold `text`: no NUL, no lone surrogate."""
    if "\0" in text:
        return False
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _name_of(dsn: str) -> str:
    """Return what may be shown of a DSN: host and database.

    Raises:
        ConfigurationError: it is none. The message holds no part of it that may be secret.
    """
    url = URL.parse(dsn)
    if url.scheme not in ("postgresql", "postgres"):
        raise ConfigurationError(f"a PostgreSQL URL begins with postgresql://, not with {url.scheme}:")
    if not dsn.partition(":")[2].startswith("//"):
        raise ConfigurationError(f"{url}: after postgresql: come two slashes, postgresql://user:password@host/database")
    authority, _, rest = dsn.partition("?")[0].partition("//")[2].partition("/")
    if authority.count("@") > 1 or "@" in rest or "#" in dsn:
        raise ConfigurationError(
            "cannot read the postgresql URL: in user names and passwords, characters like / @ # are written %2F %40 %23"
        )
    query = dict(url.query)
    host = url.host or query.get("host") or "localhost"
    port = f":{url.port}" if url.port else ""
    return f"{host}{port}/{url.path.lstrip('/') or query.get('database') or url.username or ''}"


# -- errors

_Kind = tuple[type[StorageError], str]

_POOLER: _Kind = (
    ConfigurationError,
    (
        "a pooler in between passes connections on without their prepared statements: set statement_cache_size=0 in "
        "connect_options (or where a pool of yours is made), or PgBouncer's max_prepared_statements"
    ),
)

#: By SQLSTATE, or by its first two characters, which are its class.
_BY_STATE: dict[str, _Kind] = {
    "08": (BackendUnavailable, "the connection was lost"),
    "22021": (NotSupported, "PostgreSQL cannot keep such a text (NUL characters, for example)"),
    "22P05": (NotSupported, "PostgreSQL cannot keep such a text (NUL characters, for example)"),
    "22": (NotSupported, "the table cannot keep such a value"),
    "23": (NotSupported, "a constraint of the table forbids it"),
    "25P03": (BackendUnavailable, "the content came too slowly for the server's idle_in_transaction_session_timeout"),
    "25006": (BackendUnavailable, "this server only reads; name the primary one, or add target_session_attrs=primary"),
    "26000": _POOLER,
    "28": (ConfigurationError, "the server does not accept this user with this password; see the URL and pg_hba.conf"),
    "3D000": (ConfigurationError, "there is no such database; make it with createdb, or name another one in the URL"),
    "3F000": (ConfigurationError, "there is no such schema; make it with CREATE SCHEMA, or name another one"),
    "40": (BackendUnavailable, "it collided with another transaction and was undone"),
    "42501": (AccessDenied, "this user may not do that; see GRANT"),
    "42P01": (ConfigurationError, "the table is not there; await setup(), or name the right table and schema"),
    "42P05": _POOLER,
    "42703": (ConfigurationError, "the table lacks a column; docs/postgres.md has the statements that add them"),
    "42": (ConfigurationError, "the table is not as this library makes it; see docs/postgres.md"),
    "53100": (OutOfSpace, "the server's disk is full"),
    "53300": (BackendUnavailable, "the server takes no more connections; lower max_connections, or use PgBouncer"),
    "53": (BackendUnavailable, "the server is short of resources"),
    "54": (NotSupported, "it is too big for PostgreSQL"),
    "55P03": (BackendUnavailable, "another transaction holds the row"),
    "55": (BackendUnavailable, "the server is not ready for it"),
    "57014": (DeadlineExceeded, "the server cancelled the statement, because of its statement_timeout perhaps"),
    "57P04": (ConfigurationError, "the database was dropped"),
    "57": (BackendUnavailable, "the server is starting, stopping or recovering"),
    "58": (BackendUnavailable, "the server's system failed"),
    "P0": (NotSupported, "a trigger of the table forbids it"),
    "XX001": (IntegrityError, "the data of the server are damaged"),
    "XX002": (IntegrityError, "an index of the server is damaged; see REINDEX"),
}

#: Classes after which the statement may have taken effect: the server went away, with the answer or before.
_UNKNOWN = ("08", "57P", "58", "XX")
#: Classes that have nothing to do with one of the rows.
_WHOLE = ("08", "25", "26", "28", "3D", "3F", "42", "53", "57", "58", "XX")


def map_error(error: Exception, what: str, *, sent: bool = True) -> StorageError:
    """Return our error for one that asyncpg, the server or the network raised while trying to `what`.

    `sent`: a statement may have been on its way, so that its outcome can be unknown. The native error's own text is
    shown where the server wrote it (it never holds a password), and not where a client library did.
    """
    if isinstance(error, StorageError):
        return error
    if isinstance(error, TimeoutError):
        return DeadlineExceeded(f"could not {what} in time", outcome_unknown=sent)
    if isinstance(error, asyncpg.PostgresError):
        state = _state_of(error)
        cls, reason = _BY_STATE.get(state) or _BY_STATE.get(state[:2]) or (BackendUnavailable, "unexpected")
        text = f"could not {what}: {reason} ({state} {error.args[0] if error.args else ''})"
        retryable = False if reason == "unexpected" else None
        return cls(text, retryable=retryable, outcome_unknown=sent and state.startswith(_UNKNOWN))
    if isinstance(error, UnicodeEncodeError):
        return NotSupported(f"could not {what}: text with lone surrogates cannot be stored")
    if isinstance(error, ValueError | TypeError) and (isinstance(error, asyncpg.InterfaceError) or not sent):
        return ConfigurationError(f"could not {what}: asyncpg does not understand the URL or the options")
    if isinstance(error, OSError):
        reason = error.strerror or type(error).__name__
        return BackendUnavailable(f"could not {what}: {reason}; is the server up?", outcome_unknown=sent)
    if isinstance(error, asyncpg.InterfaceError | asyncpg.InternalClientError):
        return BackendUnavailable(f"could not {what}: the connection was lost or closed", outcome_unknown=sent)
    return BackendUnavailable(
        f"could not {what}: unexpected {type(error).__name__}", retryable=False, outcome_unknown=sent
    )


def undid_itself(error: BaseException) -> bool:
    """Return whether a statement for many rows failed because of one of them, and did nothing at all."""
    if isinstance(error, UnicodeEncodeError):
        return True
    if not isinstance(error, asyncpg.PostgresError):
        return False
    state = _state_of(error)
    return state == "42501" or not state.startswith(_WHOLE)


def lock_timed_out(error: BaseException) -> bool:
    """Return whether nothing was done because another transaction held a row for longer than a statement waits."""
    if isinstance(error, StorageError) and not error.outcome_unknown:
        return error.__cause__ is not None and lock_timed_out(error.__cause__)
    return isinstance(error, asyncpg.PostgresError) and error.sqlstate == "55P03"


def _state_of(error: Any) -> str:
    if error.sqlstate == "08P01" and error.server_source_function == "exec_bind_message":
        return "26000"  # our values do not fit the statement of that name: it is somebody else's
    return error.sqlstate or ""
