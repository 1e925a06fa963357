"""Files in the caller's transaction: seen with it, committed with it, rolled back with it (J8)."""

from __future__ import annotations

import threading
import unittest
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from asgiref.sync import async_to_sync
from django.db import connections, transaction
from django.test import TestCase

from aproxy_storage import (
    AlreadyExists,
    BackendUnavailable,
    ConfigurationError,
    Conflict,
    MetaRecord,
    NotFound,
    ProxyStorage,
)
from aproxy_storage.backends.filesystem import FileSystemBackend
from aproxy_storage.meta_backends.orm import ORMMetaBackend
from aproxy_storage.tools.reconcile import reconcile
from sync_bridge.bridge import bridge
from sync_bridge.models import StoredFile
from tests.django_support.shelf.models import Document


class Rollback(Exception):
    """Ends a transaction."""


Enter = Callable[..., Any]


def by_async_to_sync(function: Callable[..., Any], *args: Any, **options: Any) -> Any:
    return async_to_sync(function)(*args, **options)


class Files:
    """A storage in the hands of synchronous code. `enter` is its way into an event loop."""

    def __init__(self, storage: ProxyStorage, enter: Enter = by_async_to_sync) -> None:
        self.storage = storage
        self.enter = enter

    def __getattr__(self, verb: str) -> Callable[..., Any]:
        return partial(self.enter, getattr(self.storage, verb))

    def read(self, path: str) -> bytes:
        async def read() -> bytes:
            async with self.storage.open(path, verify=True) as file:
                return await file.read()

        content: bytes = self.enter(read)
        return content

    def keys(self, original: str = "fs") -> list[str]:
        async def keys() -> list[str]:
            return [info.key async for info in self.storage.get_original(original).list()]

        found: list[str] = self.enter(keys)
        return found

    def records(self) -> list[MetaRecord]:
        async def records() -> list[MetaRecord]:
            return [record async for record in self.storage.list()]

        found: list[MetaRecord] = self.enter(records)
        return found

    def reconcile(self, **options: Any) -> dict[str, int]:
        async def run() -> dict[str, int]:
            return dict((await reconcile(self.storage, dry_run=False, **options)).counts)

        counts: dict[str, int] = self.enter(run)
        return counts


@pytest.fixture
def make(tmp_path: Path, database: str) -> Iterator[Callable[..., Files]]:
    made: list[Files] = []

    def make(model: Any = StoredFile, *, enter: Enter = by_async_to_sync, **options: Any) -> Files:
        originals = {}
        for name in ("fs", "other"):
            (tmp_path / name).mkdir(exist_ok=True)
            originals[name] = FileSystemBackend(tmp_path / name)
        storage = ProxyStorage("media", originals=originals, meta=ORMMetaBackend(model, database), **options)
        files = Files(storage, enter)
        made.append(files)
        return files

    yield make
    for files in made:
        files.aclose()


@pytest.fixture(params=[("path", bridge.call), ("token", by_async_to_sync)], ids=["path-bridge", "token-async_to_sync"])
def files(make: Callable[..., Files], request: pytest.FixtureRequest) -> Files:
    keys, enter = request.param
    return make(keys=keys, enter=enter)


def elsewhere(function: Callable[[], Any]) -> Any:
    """Call `function` in another thread, with connections of its own."""
    answers: list[Any] = []

    def run() -> None:
        try:
            answers.append(function())
        except BaseException as error:
            answers.append(error)
        finally:
            connections.close_all()

    thread = threading.Thread(target=run)
    thread.start()
    thread.join(60)
    assert answers, "it hangs"
    if isinstance(answers[0], BaseException):
        raise answers[0]
    return answers[0]


def test_a_save_is_seen_inside_and_not_outside_before_the_commit(files: Files, database: str) -> None:
    with transaction.atomic(using=database):
        path = files.save("a.txt", b"1")
        assert path == "a.txt"
        assert files.read(path) == b"1"
        assert not elsewhere(lambda: files.exists(path))
        record = files.get(path)
        assert (record.state, record.version, record.lease) == ("stored", 1, None)
    assert elsewhere(lambda: files.exists(path))
    assert files.reconcile(scan=True, min_age=0) == {}


def test_a_rolled_back_save_leaves_bytes_that_a_scan_finds(files: Files, database: str) -> None:
    with pytest.raises(Rollback):
        with transaction.atomic(using=database):
            files.save("a.txt", b"1")
            raise Rollback
    assert not files.exists("a.txt")
    assert len(files.keys()) == 1
    assert files.reconcile(force=True) == {}
    assert files.reconcile(scan=True) == {"young": 1}
    assert files.reconcile(scan=True, min_age=0) == {"removed": 1}
    assert files.keys() == []
    assert files.save("a.txt", b"2") == "a.txt"


@pytest.mark.parametrize(("enter", "keep_replaced"), [(by_async_to_sync, 0.0), (bridge.call, 60.0)])
def test_what_is_rolled_back_reads_as_before(
    make: Callable[..., Files], database: str, enter: Enter, keep_replaced: float
) -> None:
    files = make(enter=enter, keep_replaced=keep_replaced)
    for name in ("deleted", "replaced", "moved", "copied", "renamed", "all"):
        files.save(name, name.encode())
    before = sorted(files.keys())
    records = {record.path: record for record in files.records()}

    with pytest.raises(Rollback):
        with transaction.atomic(using=database):
            files.delete("deleted")
            files.replace("replaced", b"new")
            files.move("moved", "other")
            copy = files.copy("copied", "copy")
            files.rename("renamed", "another")
            files.replace("all", b"1")
            files.rename("all", "everything")
            files.move("everything", "other")
            files.delete("everything")
            assert not files.exists("deleted")
            assert files.read("replaced") == b"new"
            assert files.get("moved").original_storage_name == "other"
            assert files.read(copy) == b"copied"
            assert files.read("another") == b"renamed"
            assert set(before) <= set(files.keys()), "no byte goes before the commit"
            raise Rollback

    assert {record.path: record for record in files.records()} == records
    for name in ("deleted", "replaced", "moved", "copied", "renamed", "all"):
        assert files.read(name) == name.encode()
    files.reconcile(force=True, scan=True, min_age=0)
    assert sorted(files.keys()) == before
    assert files.keys("other") == []


@pytest.mark.parametrize("enter", [by_async_to_sync, bridge.call])
def test_bytes_go_when_the_transaction_commits(make: Callable[..., Files], database: str, enter: Enter) -> None:
    files = make(enter=enter, keep_replaced=0)
    for name in ("deleted", "replaced", "kept"):
        files.save(name, b"old")
    with transaction.atomic(using=database):
        files.delete("deleted")
        files.replace("replaced", b"new")
        with pytest.raises(Rollback):
            with transaction.atomic(using=database):
                files.delete("kept")
                raise Rollback
        assert sorted(files.keys())[:3] == ["deleted", "kept", "replaced"]
    left = files.keys()
    assert len(left) == 2
    assert not {"deleted", "replaced"} & set(left)
    assert (files.read("kept"), files.read("replaced")) == (b"old", b"new")
    with pytest.raises(NotFound):
        files.get("deleted")
    assert StoredFile.objects.using(database).filter(path="deleted").count() == 0
    assert files.reconcile(force=True, scan=True, min_age=0) == {}


def test_a_taken_name_does_not_break_the_transaction(files: Files, database: str) -> None:
    files.save("a.txt", b"old")
    with transaction.atomic(using=database):
        first, second = files.save("a.txt", b"1"), files.save("a.txt", b"2")
        with pytest.raises(AlreadyExists):
            files.rename(first, second)
        with pytest.raises(AlreadyExists):
            files.enter(files.storage.meta.create, MetaRecord("a.txt", "media", "fs", "x", token="other"))
        third = files.save("b.txt", b"3")
    assert [files.read(path) for path in ("a.txt", first, second, third)] == [b"old", b"1", b"2", b"3"]
    assert len({"a.txt", first, second}) == 3


def test_a_constraint_of_the_models_own_does_not_break_the_transaction(
    make: Callable[..., Files], database: str
) -> None:
    files = make(Document)
    with transaction.atomic(using=database):
        files.save("a.txt", b"1", extra={"isbn": "1"})
        with pytest.raises(Conflict, match="isbn"):
            files.save("b.txt", b"2", extra={"isbn": "1"})
        files.save("c.txt", b"3", extra={"isbn": "3"})
        with pytest.raises(Conflict, match="isbn"):
            files.update("c.txt", extra={"isbn": "1"})
    assert [record.path for record in files.records()] == ["a.txt", "c.txt"]
    assert sorted(files.keys()) == ["a.txt", "c.txt"], "the bytes of what was refused are gone"


def test_a_broken_transaction_is_named(files: Files, database: str) -> None:
    with pytest.raises(BackendUnavailable, match="must be rolled back"), transaction.atomic(using=database):
        with pytest.raises(Rollback):
            with transaction.atomic(using=database, savepoint=False):
                raise Rollback
        files.save("a.txt", b"1")
    assert files.keys() == []


def test_transactions_by_hand_are_refused(files: Files, database: str) -> None:
    transaction.set_autocommit(False, using=database)
    try:
        with pytest.raises(ConfigurationError, match=r"use transaction\.atomic"):
            files.save("a.txt", b"1")
        assert files.keys() == []
    finally:
        transaction.rollback(using=database)
        transaction.set_autocommit(True, using=database)


@pytest.mark.parametrize("style", ["path", "token"])
def test_opposite_orders_do_not_deadlock(style: str, tmp_path: Path, postgres_database: str) -> None:
    """Two transactions save the same two names in opposite order, on a database that locks rows, not files."""
    (tmp_path / "fs").mkdir()
    meta = ORMMetaBackend(StoredFile, postgres_database)
    files = Files(ProxyStorage("media", originals={"fs": FileSystemBackend(tmp_path / "fs")}, meta=meta, keys=style))
    both = threading.Barrier(2)
    saved: dict[str, list[str]] = {}

    def save(me: str, names: list[str]) -> None:
        with transaction.atomic(using=postgres_database):
            saved[me] = [files.save(names[0], me.encode())]
            both.wait(30)
            saved[me].append(files.save(names[1], me.encode()))
            both.wait(30)

    def run(me: str, names: list[str]) -> None:
        elsewhere(lambda: save(me, names))

    threads = [threading.Thread(target=run, args=each) for each in (("one", ["a", "b"]), ("two", ["b", "a"]))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert {me: len(paths) for me, paths in saved.items()} == {"one": 2, "two": 2}
    assert {files.read(path) for path in saved["one"]} == {b"one"}
    assert {files.read(path) for path in saved["two"]} == {b"two"}
    assert sorted(path[0] for paths in saved.values() for path in paths) == ["a", "a", "b", "b"]
    files.aclose()


def test_nobody_waits_for_a_file_that_another_transaction_deletes(tmp_path: Path, postgres_database: str) -> None:
    (tmp_path / "fs").mkdir()
    meta = ORMMetaBackend(StoredFile, postgres_database)
    files = Files(ProxyStorage("media", originals={"fs": FileSystemBackend(tmp_path / "fs")}, meta=meta))
    files.save("a.txt", b"1")
    with transaction.atomic(using=postgres_database):
        files.delete("a.txt")
        assert elsewhere(lambda: files.save("a.txt", b"2")) != "a.txt"
    assert not files.exists("a.txt")
    files.aclose()


def test_an_atomic_test_case_of_django(make: Callable[..., Files], database: str) -> None:
    files = make()
    alias = database

    class Case(TestCase):
        databases = frozenset({alias})  # type: ignore[assignment]

        def test_save_and_delete(self) -> None:
            path = files.save("a.txt", b"1")
            assert files.read(path) == b"1"
            with self.captureOnCommitCallbacks(using=alias, execute=True):
                files.delete(path)
                assert files.keys() == ["a.txt"]
            assert files.keys() == []

        async def test_save_from_async_code(self) -> None:
            path = await files.storage.save("b.txt", b"2")
            assert await files.storage.exists(path)

    result = unittest.TestResult()
    unittest.defaultTestLoader.loadTestsFromTestCase(Case).run(result)
    assert result.wasSuccessful(), result.failures + result.errors
    assert result.testsRun == 2
    assert files.records() == []
