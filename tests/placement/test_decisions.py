"""What falls back, which copies are wanted, where a route leads: tables, without a clock and without I/O."""

import asyncio
import errno
from typing import Any

import pytest

from aproxy_storage import (
    AccessDenied,
    AlreadyExists,
    BackendUnavailable,
    ConfigurationError,
    Conflict,
    ContentError,
    DeadlineExceeded,
    Fallback,
    IntegrityError,
    InvalidPath,
    Limits,
    MetaRecord,
    NotFound,
    NotSupported,
    Original,
    OutOfSpace,
    Place,
    Replicate,
    Request,
    Route,
    Source,
    StorageError,
    by_content_type,
    by_suffix,
)
from aproxy_storage.backends.memory import MemoryBackend
from aproxy_storage.errors import from_os_error
from aproxy_storage.fallback import names
from aproxy_storage.replicate import Todo, what_is_to_do


def caused(error: StorageError, cause: BaseException) -> StorageError:
    error.__cause__ = cause
    return error


def os_error(number: int) -> StorageError:
    return from_os_error(OSError(number, "x"), "write")


FALLS_BACK = [
    (BackendUnavailable("down"), True),
    (DeadlineExceeded("late"), True),
    (OutOfSpace("full"), True),
    (os_error(errno.EIO), True),
    (os_error(errno.EROFS), True),
    (os_error(errno.ESTALE), True),
    (os_error(errno.ENOSPC), True),
    (os_error(errno.EDQUOT), True),
    (os_error(errno.ECONNREFUSED), True),
    (caused(BackendUnavailable("no bucket", retryable=False), OSError()), True),
    (caused(BackendUnavailable("unexpected", retryable=False), IndexError()), False),  # a bug is not an outage
    (AccessDenied("no"), False),
    (NotFound("gone"), False),
    (AlreadyExists("taken"), False),
    (InvalidPath("a/../b"), False),
    (ContentError("short"), False),
    (Conflict("first"), False),
    (IntegrityError("differs"), False),
    (ConfigurationError("wrong"), False),
    (NotSupported("cannot"), False),
    (os_error(errno.ENAMETOOLONG), False),
]


@pytest.mark.parametrize(("error", "wanted"), FALLS_BACK, ids=lambda each: repr(each)[:40])
def test_what_falls_back(error: StorageError, wanted: bool) -> None:
    assert Fallback().falls_back(error) is wanted
    assert Replicate().falls_back(error) is wanted


NAMED: list[tuple[Any, StorageError, bool]] = [
    ((), AccessDenied("no"), False),
    ((AccessDenied,), AccessDenied("no"), True),
    ((PermissionError,), AccessDenied("no"), True),
    ((KeyError,), caused(BackendUnavailable("x", retryable=False), KeyError()), True),
    ((KeyError,), caused(AccessDenied("x"), caused(BackendUnavailable("y"), KeyError())), True),
    ((KeyError,), caused(BackendUnavailable("x", retryable=False), IndexError()), False),
    ((Exception,), ContentError("the caller's own"), False),
    ((Exception,), InvalidPath("the caller's own"), False),
    ((OSError,), AlreadyExists("somebody was first"), False),
    ((Exception,), Conflict("somebody was first"), False),
]


@pytest.mark.parametrize(("fallback_on", "error", "wanted"), NAMED)
def test_what_an_original_names_is_matched_with_the_error_and_its_causes(
    fallback_on: Any, error: StorageError, wanted: bool
) -> None:
    assert names(fallback_on, error) is wanted


def test_original_takes_one_class_as_python_does() -> None:
    assert Original(MemoryBackend(), fallback_on=KeyError).fallback_on == (KeyError,)  # type: ignore[arg-type]


@pytest.mark.parametrize("wrong", [{"fallback_on": ("IOError",)}, {"max_concurrency": 0}, {"max_concurrency": "4"}])
def test_original_is_checked(wrong: dict[str, Any]) -> None:
    with pytest.raises(ConfigurationError):
        Original(MemoryBackend(), **wrong)


@pytest.mark.parametrize(
    "wrong",
    [
        {"attempt_timeout": 0}, {"source_timeout": -1}, {"deadline": 0}, {"hedge_after": 0}, {"hedge_max_bytes": -1},
        {"spool_bytes": -1}, {"hedge_after": "0.1"}, {"deadline": True}, {"hedge_max_bytes": 1.5}, {"spool_bytes": "1"},
        {"order": "near"}, {"order": [1]}, {"breaker": 5},
    ],
)  # fmt: skip
def test_limits_are_checked(wrong: dict[str, Any]) -> None:
    with pytest.raises(ConfigurationError, match=next(iter(wrong))):
        Fallback(**wrong)


@pytest.mark.parametrize(
    "wrong", [{"copies": 0}, {"copies": 2, "quorum": 3}, {"copies": 2, "quorum": 0}, {"copies": "3"}]
)
def test_copies_are_checked(wrong: dict[str, Any]) -> None:
    with pytest.raises(ConfigurationError):
        Replicate(**wrong)


def test_quorum_lets_one_original_be_away() -> None:
    assert [Replicate(copies).limits.quorum for copies in (1, 2, 3, 5)] == [1, 1, 2, 4]


def test_fallback_is_finite_without_arguments() -> None:
    limits = Fallback().limits
    assert limits == Limits(
        attempt_timeout=10.0, source_timeout=300.0, deadline=3600.0, breaker=limits.breaker, spool_bytes=1 << 20
    )
    assert limits.breaker is not None


def request(name: str = "a.txt", data: bytes = b"", **options: Any) -> Request:
    return Request(name, Source.of(data), **options)


@pytest.mark.parametrize(
    ("order", "wanted"), [(None, ["a", "b", "c"]), (["c", "a"], ["c", "a"]), (["nowhere"], ConfigurationError)]
)
@pytest.mark.parametrize("kind", [Fallback, Replicate])
def test_order(kind: Any, order: Any, wanted: Any) -> None:
    placement = kind(order=order)

    async def ask() -> Any:
        return list(await placement.candidates(request(), ["a", "b", "c"]))

    if isinstance(wanted, list):
        assert asyncio.run(ask()) == wanted
        assert list(placement.read_order(["b", "a", "c"])) == (["b", "a", "c"] if order is None else ["c", "a", "b"])
    else:
        with pytest.raises(wanted, match="nowhere"):
            asyncio.run(ask())


@pytest.mark.parametrize("kind", [Fallback, Replicate])
def test_order_names_each_original_once(kind: Any) -> None:
    with pytest.raises(ConfigurationError, match="'a'"):
        kind(order=["a", "b", "a"])


def test_replicate_needs_as_many_originals_as_copies() -> None:
    with pytest.raises(ConfigurationError, match="copies=3"):
        Replicate(3).targets(["a", "b"])


SUFFIXES = {".jpg": "images", ".tar.gz": "tape", ".gz": "disk"}


@pytest.mark.parametrize(
    ("name", "wanted"),
    [("a.jpg", "images"), ("A.JPG", "images"), ("a.tar.gz", "tape"), ("a.gz", "disk"), ("a", "a"), ("jpg", "a")],
)
def test_route_by_suffix(name: str, wanted: str) -> None:
    route = Route(by_suffix(SUFFIXES))
    assert asyncio.run(route.candidates(request(name), ["a", *SUFFIXES.values()]))[0] == wanted


@pytest.mark.parametrize(
    ("asked", "wanted"),
    [
        (request("a.bin", b"\x89PNG\r\n\x1a\n" + b"\0" * 30), "images"),
        (request("a.txt", b"text"), "texts"),
        (request("a.bin", b"", content_type="image/webp; q=1"), "images"),
        (request("a.txt", b"", content_type="application/pdf"), "rest"),
        (request("nothing", b"\0\1\2"), "rest"),
    ],
)
def test_route_by_content_type(asked: Request, wanted: str) -> None:
    route = Route(by_content_type({"image/*": "images", "text/plain": "texts"}, default="rest"))
    assert asyncio.run(route.candidates(asked, ["a", "images", "texts", "rest"])) == (wanted,)


def test_route_by_size_and_extra_and_asynchronously() -> None:
    def by_size(asked: Request) -> str | None:
        return "big" if (asked.source.size or 0) > 3 else None

    async def by_owner(asked: Request) -> str | None:
        return asked.extra.get("tenant")

    originals = ["a", "big", "t1"]
    assert asyncio.run(Route(by_size).candidates(request(data=b"long"), originals)) == ("big",)
    assert asyncio.run(Route(by_size).candidates(request(data=b"x"), originals)) == ["a"]
    assert asyncio.run(Route(by_owner).candidates(request(extra={"tenant": "t1"}), originals)) == ("t1",)


A, B, C = Place("a", "k"), Place("b", "k"), Place("c", "k")
TODO: list[tuple[list[Place], list[str], int, Todo]] = [
    ([A, B], ["a", "b", "c"], 2, Todo()),
    ([A], ["a", "b", "c"], 2, Todo(make=("b",), spare=("c",))),
    ([A], ["a", "b", "c"], 3, Todo(make=("b", "c"))),
    ([A, B, C], ["a", "b", "c"], 2, Todo(drop=(C,))),
    ([C, A, B], ["a", "b", "c"], 2, Todo(drop=(B,))),  # the primary one stays
    ([A, C], ["a", "b"], 2, Todo(make=("b",))),  # c goes only when b has it
    ([A, B, C], ["a", "b"], 2, Todo(drop=(C,))),
    ([A, Place("a", "twice"), B], ["a", "b"], 2, Todo(drop=(Place("a", "twice"),))),
    ([A], ["a"], 1, Todo()),
    ([A, B], ["b", "a"], 1, Todo(drop=(B,))),
]


@pytest.mark.parametrize(("good", "targets", "copies", "wanted"), TODO)
def test_what_brings_a_file_to_its_number_of_copies(
    good: list[Place], targets: list[str], copies: int, wanted: Todo
) -> None:
    record = MetaRecord(
        "x", original_storage_name=good[0].original, original_storage_path=good[0].key, places=tuple(good[1:])
    )
    todo = what_is_to_do(record, good, targets, copies)
    assert todo == wanted
    assert bool(todo) == bool(wanted.make or wanted.drop)
