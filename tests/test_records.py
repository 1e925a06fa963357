"""The value objects: records that read like mappings, places, ranges."""

from __future__ import annotations

import copy
import dataclasses
import pickle

import pytest
from hypothesis import given
from hypothesis import strategies as st

from aproxy_storage.errors import ConfigurationError
from aproxy_storage.records import ByteRange, Capabilities, MetaRecord, ObjectInfo, Place, Revision

RECORD = MetaRecord(
    path="a/b.txt",
    proxy_storage_name="media",
    original_storage_name="fs",
    original_storage_path="b.txt",
    token="T",
    version=3,
    size=5,
    extra={"width": 7, "path": "shadowed", "id": "shadowed too"},
    native={"id": 12, "_id": "x"},
)


def test_record_reads_like_a_mapping() -> None:
    assert RECORD["path"] == RECORD.path == "a/b.txt"
    assert RECORD["width"] == 7
    assert RECORD["id"] == 12
    assert RECORD.get("missing") is None
    with pytest.raises(KeyError):
        RECORD["missing"]
    assert "width" in RECORD
    assert "missing" not in RECORD
    names = list(RECORD)
    assert len(names) == len(set(names)) == len(RECORD)
    assert {"path", "extra", "id", "_id", "width"} <= set(names)
    assert "native" not in names
    assert dict(RECORD)["size"] == 5
    assert dict(**RECORD)["path"] == "a/b.txt"
    assert bool(MetaRecord("x"))


def test_record_is_a_frozen_value() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        RECORD.path = "y"  # type: ignore[misc]
    same = dataclasses.replace(RECORD, native={"id": 99})
    assert same == RECORD
    assert hash(same) == hash(RECORD)
    assert dataclasses.replace(RECORD, version=4) != RECORD
    assert len({RECORD, same}) == 1
    assert RECORD.revision == Revision("T", 3) == ("T", 3)


def test_records_can_be_copied_and_sent_to_another_process() -> None:
    for record in (RECORD, MetaRecord("x"), ObjectInfo("k"), Capabilities(), ByteRange(3)):
        assert pickle.loads(pickle.dumps(record)) == record
        assert copy.deepcopy(record) == record
        assert copy.copy(record) == record


def test_defaults_cannot_be_changed_for_all() -> None:
    with pytest.raises(TypeError):
        MetaRecord("x").extra["a"] = 1  # type: ignore[index]


def test_places() -> None:
    assert RECORD.primary == Place("fs", "b.txt", "good")
    assert RECORD.all_places() == (Place("fs", "b.txt", "good"),)
    pending = dataclasses.replace(RECORD, state="pending", places=(Place("s3", "b.txt", "doubtful"),))
    assert pending.primary == Place("fs", "b.txt", "doubtful")
    assert pending.all_places() == (Place("fs", "b.txt", "doubtful"), Place("s3", "b.txt", "doubtful"))
    replicated = dataclasses.replace(
        RECORD, places=(Place("s3", "b.txt"), Place("fs", "old", "surplus"), Place("fs", "b.txt", "doubtful"))
    )
    assert replicated.primary == Place("fs", "b.txt", "doubtful")
    assert replicated.all_places()[0] == replicated.primary
    assert sorted(place.key for place in replicated.all_places()) == ["b.txt", "b.txt", "old"]


def test_record_of_an_unknown_storage() -> None:
    for ask in (RECORD.get_proxy_storage, RECORD.get_original_storage, RECORD.get_original_storage_full_path):
        with pytest.raises(ConfigurationError, match="media"):
            ask()


@given(st.integers(0, 60), st.none() | st.integers(0, 60), st.integers(0, 40))
def test_range_is_a_slice(start: int, end: int | None, size: int) -> None:
    data = bytes(range(size))
    if end is not None and end < start:
        with pytest.raises(ValueError, match="not a byte range"):
            ByteRange(start, end)
        return
    first, stop = ByteRange(start, end).resolve(size)
    assert 0 <= first <= stop <= size
    assert data[first:stop] == data[start:end]


@given(st.integers(0, 60), st.integers(0, 40))
def test_range_of_the_last_bytes(count: int, size: int) -> None:
    data = bytes(range(size))
    first, stop = ByteRange.last(count).resolve(size)
    assert data[first:stop] == (data[-count:] if count else b"")
    assert len(data[first:stop]) == min(count, size)


@pytest.mark.parametrize("arguments", [(-1,), (5, 4), (0, None, -1), (3, None, 5), (0, 9, 5)])
def test_nonsense_ranges_are_refused(arguments: tuple[int | None, ...]) -> None:
    with pytest.raises(ValueError, match="byte range"):
        ByteRange(*arguments)  # type: ignore[arg-type]
