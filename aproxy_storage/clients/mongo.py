"""MongoDB databases, one per event loop, of either asynchronous driver; deadlines and errors of MongoDB.

Both drivers raise the errors of `pymongo` and take the same calls for what is used here, so that nothing else has to
know which one it has. Which one it is, is asked of the *type*: ``hasattr(database, "x")`` is true for any name, because
``database.x`` is a collection.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any, Generic, TypeVar

from ..errors import (
    AccessDenied,
    BackendUnavailable,
    ConfigurationError,
    DeadlineExceeded,
    InvalidPath,
    MissingDependency,
    NotSupported,
    OutOfSpace,
    StorageError,
)
from ..loops import PerLoop
from ..urls import URL, redacted

try:
    import pymongo
    from bson.codec_options import CodecOptions
    from bson.errors import BSONError
    from pymongo import AsyncMongoClient, IndexModel, ReadPreference, WriteConcern
    from pymongo import errors as native
    from pymongo.asynchronous.database import AsyncDatabase
    from pymongo.driver_info import DriverInfo
except ImportError as error:
    raise MissingDependency.of("pymongo", "mongo") from error

__all__ = [
    "DUPLICATE_KEY",
    "JOURNALLED",
    "Connected",
    "Databases",
    "collection_of",
    "ensure_indexes",
    "is_storable",
    "mongo_error",
    "runs_in_threads",
]

T = TypeVar("T")

#: What answered writes survive: the loss of any minority of the servers, and of the power of all.
JOURNALLED = WriteConcern(w="majority", j=True)

_INDEX_CONFLICT = (85, 86)  # IndexOptionsConflict, IndexKeySpecsConflict
_WHICH = ("partialFilterExpression", "collation")  # what says for which documents, and which texts, one is unique
_CONNECT = 10.0  # seconds for one connection

_WAY_OUT = (
    "pass pymongo.AsyncMongoClient(…)['name'], Motor's AsyncIOMotorClient(…)['name'], "
    "a text like 'mongodb://host/name', or a function without arguments that returns one of the first two"
)
_OTHER_LOOP = (
    "belongs to another event loop and cannot be used in this one. Pass a text like 'mongodb://host/name', or a "
    "function that returns a database of the running loop: both are asked once for each loop and process"
)

DUPLICATE_KEY = 11000
_UNAUTHORIZED, _AUTHENTICATION_FAILED, _ATLAS_ERROR = 13, 18, 8000
_OUT_OF_SPACE = frozenset({14031, 12501})  # OutOfDiskSpace; quota exceeded
_TOO_LARGE = frozenset({15, 10334, 17419, 17420})  # nested too deep, or a document larger than the server's limit
_INTERRUPTED_BY_TIME = frozenset({50, 262})  # MaxTimeMSExpired, ExceededTimeLimit


class Connected(Generic[T]):
    """What one event loop uses: a context manager that gives what was made of its database, and counts its users."""

    def __init__(self, made: T, owned: AsyncMongoClient[Any] | None) -> None:
        self._made = made
        self._owned = owned
        self._users = 0
        self._unused = asyncio.Event()
        self._unused.set()
        self._guard = self._closing()
        # Begun without a task: up to its `yield` it awaits nothing.
        with contextlib.suppress(StopIteration):
            self._guard.__anext__().send(None)

    def __enter__(self) -> T:
        self._users += 1
        self._unused.clear()
        return self._made

    def __exit__(self, *_: object) -> None:
        self._users -= 1
        if not self._users:
            self._unused.set()

    async def close(self, within: float) -> None:
        """Close a client of ours once the calls under way have ended; after `within` seconds in any case."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(within):
                await self._unused.wait()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(within):
                await self._guard.aclose()

    async def _closing(self) -> AsyncGenerator[None]:
        # ``asyncio.run`` ends the generators that were begun in its loop before it closes that: the last moment at
        # which somebody can close a client whose owner forgot to.
        try:
            yield
        finally:
            owned, self._owned = self._owned, None
            if owned is not None:
                await owned.close()


class Databases(Generic[T]):
    """Gives each event loop, of each process, what `make` makes of a database for that loop.

    Args:
        database: a URI with the name of a database, a database of PyMongo Async or of Motor, or a function that
            returns such a database. Only clients that are made here, of a URI, are closed here.
        make: called once for each loop; does no I/O.
        seconds: limit of one call; None for ever.

    Raises:
        ConfigurationError: `database` is nothing of that kind.
    """

    def __init__(self, database: Any, make: Callable[[Any], T], *, seconds: float | None) -> None:
        self._given = database
        self._make = make
        self._seconds = seconds
        self._loops: PerLoop[Connected[T]] = PerLoop(self._connect)
        self.name = "(from a function)"
        if isinstance(database, str):
            self.name = _database_in(database)
        elif _is_database(database):
            self.name = str(database.name)
        elif _is_of_a_driver(database) or not callable(database):
            raise _not_a_database(database)

    def use(self) -> Connected[T]:
        """Return what the running loop uses, made now if there is nothing yet.

        Raises:
            ConfigurationError: the database cannot be used in this loop or process, or a function gave none.
        """
        return self._loops.get()

    def limit(self) -> AbstractContextManager[Any]:
        """Return a context in which the driver keeps the limit too, and tells the server of it: for statements that
        nobody cancels, and for those in Motor's threads, which end by nothing else. It costs a fifth of a look-up."""
        if self._seconds is None:
            return contextlib.nullcontext()
        # It should give up before our own deadline strikes, for it can tell why; it looks every half second.
        return pymongo.timeout(self._seconds - max(0.1 * self._seconds, min(0.7, 0.3 * self._seconds)))

    async def aclose(self, within: float) -> None:
        """Release what the running loop uses. What was borrowed stays open."""
        connected = self._loops.pop()
        if connected is not None:
            await connected.close(within)

    def _connect(self) -> Connected[T]:
        if isinstance(self._given, str):
            client = _client(self._given, self._seconds)
            return Connected(self._make(client[self.name]), client)
        database = self._given
        if not _is_database(database):
            database = database()
            if not _is_database(database):
                raise _not_a_database(database)
        _check_loop(database)
        return Connected(self._make(database), None)


def collection_of(database: Any, name: str, write_concern: WriteConcern) -> Any:
    """Return the collection with our own settings, whatever those of the client are: answered by the primary, moments
    in UTC."""
    return database.get_collection(
        name,
        codec_options=CodecOptions(tz_aware=True),
        write_concern=write_concern,
        read_preference=ReadPreference.PRIMARY,
    )


def is_storable(text: str) -> bool:
    """Return whether `text` can be in a database at all: no lone surrogates."""
    if text.isascii():
        return True
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


async def ensure_indexes(collection: Any, indexes: Sequence[IndexModel], what: str) -> None:
    """Make those `indexes` that are missing, whatever those there are called. That others do so at the same time is
    nothing to the server.

    Raises:
        ConfigurationError: one that has to be unique is there and is not, or documents or another index are in the
            way of it. `what` says of which collection.
    """
    there = await collection.index_information()
    missing = []
    in_the_way: set[str] = set()
    for index in indexes:
        wanted = index.document
        fields = list(wanted["key"].items())
        # Others may have the same fields, and not be unique, or not for the same documents.
        found = {name: one for name, one in there.items() if [tuple(field) for field in one["key"]] == fields}
        if wanted.get("unique"):
            alike = [one for one in found.values() if all(one.get(each) == wanted.get(each) for each in _WHICH)]
            if any(one.get("unique") for one in alike):
                continue
            if alike:
                names = ", ".join(wanted["key"])
                raise ConfigurationError(
                    f"{what} has an index on {names} that is not unique; drop it, and it is made anew"
                )
        elif found:
            continue
        missing.append(index)
        in_the_way |= found.keys() | ({wanted["name"]} & there.keys())
    if not missing:
        return
    try:
        await collection.create_indexes(missing)
    except native.OperationFailure as error:
        if error.code in _INDEX_CONFLICT:
            raise ConfigurationError(
                f"{what} cannot have its index beside {', '.join(sorted(in_the_way))}, which is another; drop that, or "
                "make it anew under another name"
            ) from error
        if error.code != DUPLICATE_KEY:
            raise
        twice = (error.details or {}).get("keyValue", "")
        raise ConfigurationError(
            f"{what} cannot have its unique index: some documents are the same in {twice}"
        ) from error


def mongo_error(error: BaseException, what: str) -> StorageError | None:
    """Return our error for one of the driver's, None for others. `what` says in words what was tried."""
    if isinstance(error, UnicodeEncodeError):
        return InvalidPath(f"could not {what}: text with lone surrogates cannot be stored")
    if isinstance(error, OverflowError):
        return NotSupported(f"could not {what}: MongoDB keeps integers of 64 bits")
    if isinstance(error, BSONError | native.DocumentTooLarge):
        return NotSupported(f"could not {what}: {_reason(error)}")
    if isinstance(error, RuntimeError) and "event loop" in str(error):
        return ConfigurationError(f"could not {what}: the database {_OTHER_LOOP}")
    if not isinstance(error, native.PyMongoError):
        return None
    if isinstance(error, native.ConfigurationError | native.InvalidName | native.InvalidURI):
        return ConfigurationError(f"could not {what}: {type(error).__name__}: {_reason(error)}")
    if isinstance(error, native.InvalidOperation):
        return ConfigurationError(f"could not {what}: the client that was passed has been closed")
    if isinstance(error, native.ServerSelectionTimeoutError | native.WaitQueueTimeoutError):
        # Nothing was sent: where something was, the driver raises the error of that.
        return BackendUnavailable(f"could not {what}: {_reason(error)}")
    if isinstance(error, native.OperationFailure) and (found := _by_code(error, what)) is not None:
        return found
    if error.timeout or getattr(error, "code", None) in _INTERRUPTED_BY_TIME:
        return DeadlineExceeded(f"could not {what} in time: {_reason(error)}", outcome_unknown=True)
    retryable = not isinstance(error, native.OperationFailure) or error.has_error_label("RetryableWriteError")
    return BackendUnavailable(f"could not {what}: {_reason(error)}", retryable=retryable, outcome_unknown=True)


def _by_code(error: native.OperationFailure, what: str) -> StorageError | None:
    if error.code in (_AUTHENTICATION_FAILED, _ATLAS_ERROR):
        return ConfigurationError(
            f"could not {what}: MongoDB refuses the user name or the password. Check both, and that the URI names the "
            "database that keeps the user (…/name?authSource=admin); in a URI, @ : / are written %40 %3A %2F"
        )
    if error.code == _UNAUTHORIZED:
        return AccessDenied(f"could not {what}: {_reason(error)}; give the user the role readWrite of this database")
    if error.code in _OUT_OF_SPACE:
        return OutOfSpace(f"could not {what}: {_reason(error)}")
    if error.code in _TOO_LARGE:
        return NotSupported(f"could not {what}: {_reason(error)}")
    return None


def _reason(error: BaseException) -> str:
    """Return what an error says, without the whole topology and the whole reply that the driver adds."""
    text = str(error).partition(", Topology Description:")[0].partition(", full error:")[0]
    return text[:500] or type(error).__name__


# -- what was passed


def _database_in(uri: str) -> str:
    if not uri.startswith(("mongodb://", "mongodb+srv://")):
        raise ConfigurationError(f"{redacted(uri)} is not a MongoDB URI; they begin with mongodb:// or mongodb+srv://")
    parsed = URL.parse(uri)
    if not parsed.host:
        raise ConfigurationError(f"{redacted(uri)} names no host; write mongodb://user:password@host/name")
    name = parsed.path.removeprefix("/")
    if not name:
        raise ConfigurationError(f"{redacted(uri)} names no database; add it as in mongodb://host/name")
    return name


def _client(uri: str, seconds: float | None) -> AsyncMongoClient[Any]:
    given = {name.lower() for name, _ in URL.parse(uri).query}
    ours: dict[str, Any] = {"appName": "aproxy_storage"}
    if seconds is not None:
        ours["connectTimeoutMS"] = int(1000 * min(_CONNECT, seconds))
        ours["socketTimeoutMS"] = int(1000 * seconds)
        # It should give up before our own deadline strikes, for it can tell why; it looks every half second.
        ours["serverSelectionTimeoutMS"] = max(1, int(1000 * (0.8 * seconds - 0.5)))
    options = {name: value for name, value in ours.items() if name.lower() not in given}
    try:
        return AsyncMongoClient(uri, driver=DriverInfo("aproxy_storage"), **options)
    except (native.PyMongoError, ValueError, TypeError) as error:
        # Not a word of theirs, and no cause: they quote what may be part of the password.
        raise ConfigurationError(
            f"MongoDB's driver cannot use {redacted(uri)} ({type(error).__name__}): check hosts, ports and options; "
            "in user names and passwords, characters like / ? # @ : [ ] are written %2F %3F %23 %40 %3A %5B %5D"
        ) from None


def _is_database(given: Any) -> bool:
    if isinstance(given, AsyncDatabase):
        return True
    # Motor is not imported for this.
    return any((cls.__module__, cls.__name__) == _MOTOR for cls in type(given).__mro__)


_MOTOR = ("motor.motor_asyncio", "AsyncIOMotorDatabase")


def runs_in_threads(database: Any) -> bool:
    """Return whether the driver is Motor, of which a cancelled call goes on in its thread."""
    return type(database).__module__.partition(".")[0] == "motor"


def _is_of_a_driver(given: Any) -> bool:
    return any(cls.__module__.partition(".")[0] in ("pymongo", "motor") for cls in type(given).__mro__)


def _not_a_database(given: Any) -> ConfigurationError:
    kind = f"{type(given).__module__}.{type(given).__qualname__}"
    if kind.startswith("pymongo.synchronous"):
        return ConfigurationError(f"{kind} blocks the event loop and cannot be awaited; {_WAY_OUT}")
    return ConfigurationError(f"{kind} is not an asynchronous MongoDB database; {_WAY_OUT}")


def _check_loop(database: Any) -> None:
    client = database.client
    if _is_of_a_driver(client) and type(client).__module__.startswith("motor"):
        loop = client.get_io_loop()
    else:
        # Private, and all there is; without it the driver's RuntimeError tells, at the first call.
        loop = getattr(client, "_loop", None)
    if loop is not None and loop is not asyncio.get_running_loop():
        raise ConfigurationError(f"the database {str(database.name)!r} {_OTHER_LOOP}")
