"""The exception tree: as documented, picklable, and caught as the builtins it stands beside."""

from __future__ import annotations

import copy
import errno
import inspect
import pickle

import pytest

from aproxy_storage import errors
from aproxy_storage.errors import (
    AccessDenied,
    AlreadyExists,
    BackendUnavailable,
    ConfigurationError,
    Conflict,
    ContentError,
    DeadlineExceeded,
    IntegrityError,
    InvalidPath,
    MissingDependency,
    NotFound,
    NotSupported,
    OutOfSpace,
    StorageError,
    from_os_error,
    outcome_unknown,
)

CLASSES = [
    value for value in vars(errors).values() if inspect.isclass(value) and issubclass(value, StorageError)
]  # fmt: skip


def test_tree_is_that_of_the_docstring() -> None:
    assert errors.__doc__ is not None
    parents: dict[int, str] = {}
    documented = {}
    for line in errors.__doc__.splitlines():
        bare = line.lstrip(" │├└─")
        if not bare or not line.startswith("    "):
            continue
        depth = (len(line) - len(bare)) // 4
        name = bare.split()[0]
        parents[depth] = name
        builtin = bare.split("(")[1].split(")")[0] if f"{name} " in bare and "(" in bare else None
        documented[name] = (parents.get(depth - 1) if depth > 1 else None, builtin)
    actual = {}
    for cls in CLASSES:
        ours = [base.__name__ for base in cls.__bases__ if issubclass(base, StorageError)]
        builtins = [base.__name__ for base in cls.__bases__ if base.__module__ == "builtins" and base is not Exception]
        actual[cls.__name__] = (ours[0] if ours else None, builtins[0] if builtins else None)
    assert documented == actual
    assert set(errors.__all__) == {*actual, "from_os_error", "outcome_unknown"}


@pytest.mark.parametrize("cls", CLASSES)
@pytest.mark.parametrize("again", [lambda e: pickle.loads(pickle.dumps(e)), copy.copy, copy.deepcopy])
def test_pickles_with_all_it_knows(cls: type[StorageError], again: object) -> None:
    assert callable(again)
    error = cls("it broke", operation="save", path="a/b", backend="s3", retryable=True, outcome_unknown=True)
    error.attempts = (NotFound("earlier", path="x"),)
    error.add_note("tried before: fs")
    other = again(error)
    assert type(other) is cls
    assert str(other) == str(error) == "it broke"
    for name in ("operation", "path", "backend", "retryable", "outcome_unknown", "errno", "__notes__"):
        assert getattr(other, name, None) == getattr(error, name, None), name
    assert [(type(e), str(e), e.path) for e in other.attempts] == [(NotFound, "earlier", "x")]  # type: ignore[attr-defined]
    assert str(again(cls())) == ""


@pytest.mark.parametrize(
    ("cls", "builtin", "number"),
    [
        (NotFound, FileNotFoundError, errno.ENOENT),
        (AlreadyExists, FileExistsError, errno.EEXIST),
        (InvalidPath, ValueError, None),
        (AccessDenied, PermissionError, errno.EACCES),
        (NotSupported, NotImplementedError, None),
        (BackendUnavailable, ConnectionError, None),
        (DeadlineExceeded, TimeoutError, errno.ETIMEDOUT),
        (DeadlineExceeded, BackendUnavailable, errno.ETIMEDOUT),
        (OutOfSpace, OSError, errno.ENOSPC),
        (MissingDependency, ImportError, None),
        (MissingDependency, ConfigurationError, None),
    ],
)
def test_is_caught_as_its_builtin(cls: type[StorageError], builtin: type[Exception], number: int | None) -> None:
    with pytest.raises(builtin) as caught:
        raise cls("why")
    assert isinstance(caught.value, StorageError)
    assert getattr(caught.value, "errno", None) == number
    assert str(caught.value) == "why"


def test_what_can_be_retried() -> None:
    retryable = {cls for cls in CLASSES if cls("x").retryable}
    assert retryable == {Conflict, BackendUnavailable, DeadlineExceeded}
    assert not BackendUnavailable("x", retryable=False).retryable
    assert ContentError("x", retryable=True).retryable


def test_located_keeps_what_is_nearer() -> None:
    error = IntegrityError("gone", path="key")
    assert error.located(operation="read", path="other", backend="fs") is error
    assert (error.operation, error.path, error.backend) == ("read", "key", "fs")
    error.located(operation="open", path="path", backend="proxy")
    assert (error.operation, error.path, error.backend) == ("read", "key", "fs")


def test_missing_dependency_names_the_pip_line() -> None:
    error = MissingDependency.of("asyncpg", "postgres")
    assert "pip install 'aproxy-storage[postgres]'" in str(error)
    assert "asyncpg" in str(error)


@pytest.mark.parametrize(
    ("number", "cls"),
    [
        (errno.ENOENT, NotFound),
        (errno.EEXIST, AlreadyExists),
        (errno.EACCES, AccessDenied),
        (errno.EPERM, AccessDenied),
        (errno.ENAMETOOLONG, InvalidPath),
        (errno.ELOOP, InvalidPath),
        (errno.ENOSPC, OutOfSpace),
        (errno.EDQUOT, OutOfSpace),
        (errno.ETIMEDOUT, DeadlineExceeded),
        (errno.EIO, BackendUnavailable),
        (errno.EROFS, BackendUnavailable),
        (errno.ESTALE, BackendUnavailable),
        (None, BackendUnavailable),
    ],
)
def test_native_errors(number: int | None, cls: type[StorageError]) -> None:
    native = OSError(number, "as the system says") if number is not None else OSError("as the system says")
    error = from_os_error(native, "write 'a.txt'")
    assert type(error) is cls
    assert str(error) == "could not write 'a.txt': as the system says"
    assert from_os_error(OSError(), "x").args == ("could not x: OSError",)


def test_unknown_outcome_is_the_cautious_answer() -> None:
    assert outcome_unknown(KeyboardInterrupt())
    assert outcome_unknown(OSError())
    assert not outcome_unknown(NotFound("x"))
    assert outcome_unknown(DeadlineExceeded("x", outcome_unknown=True))
    cancelled = BaseException()
    cancelled.outcome_unknown = False  # type: ignore[attr-defined]
    assert not outcome_unknown(cancelled)
