"""The value objects that cross every boundary: records, places, object infos, ranges, capabilities."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, fields
from datetime import datetime
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

if TYPE_CHECKING:
    from .backends.base import Backend
    from .proxy import ProxyStorage

__all__ = [
    "DELETING",
    "PENDING",
    "STORED",
    "ByteRange",
    "Capabilities",
    "CommonPrefix",
    "MetaRecord",
    "ObjectInfo",
    "Place",
    "PlaceState",
    "Revision",
    "State",
    "UploadForm",
]

State = Literal["pending", "stored", "deleting"]
PENDING: State = "pending"
STORED: State = "stored"
DELETING: State = "deleting"

PlaceState = Literal["good", "doubtful", "surplus", "settling"]

#: The extra fields that say which object a file belongs to, named by django-proxy-storage. No copy has them.
OWNER_FIELDS = ("content_type_id", "object_id", "field")

#: Changes of a record that it takes at least until one of its keys has other bytes: others are swapped in, the key is
#: forgotten, named anew by `restore_key`, and swapped in.
CHANGES_TO_REUSE = 4

_EMPTY: Mapping[str, Any] = MappingProxyType({})


def _empty() -> Mapping[str, Any]:
    # As a factory: Python 3.11 takes a mappingproxy, which has no hash there, for a mutable default.
    return _EMPTY


def _picklable_state(self: Any) -> list[Any]:
    # In the form of dataclasses' own, which restores it. A read-only mapping cannot be pickled or deep-copied.
    values = (getattr(self, each.name) for each in fields(self))
    return [dict(value) if isinstance(value, MappingProxyType) else value for value in values]


class Revision(NamedTuple):
    """What every compare-and-set compares: the reservation's token, and the version it has reached."""

    token: str
    version: int


@dataclass(frozen=True, slots=True)
class Place:
    """One (original, key) that holds or may hold bytes of a record.

    `state` is ``"good"`` (whole bytes of this record), ``"doubtful"`` (a write may still land there, or never did),
    ``"surplus"`` (whole bytes that are not wanted any more, to be discarded when the record's lease has run out) or
    ``"settling"`` (discarded; to be discarded once more when the lease has run out, in case a late write landed).
    `due`: not before this moment, by the clock of the meta-backend's database, in seconds since 1970.
    """

    original: str
    key: str
    state: PlaceState = "good"
    due: float | None = None

    def as_list(self) -> list[Any]:
        """Return the arguments that make this place again, for JSON."""
        values = [self.original, self.key, self.state]
        return values if self.due is None else [*values, self.due]


@dataclass(frozen=True, slots=True)
class MetaRecord(Mapping[str, Any]):
    """What a meta-backend knows of one file. Reads like a mapping too: ``record["path"]``.

    `original_storage_name` and `original_storage_path` name the primary place; `places` names further ones (and
    the primary one again where its state differs from what `state` implies; see `all_places`).

    `lease` is set while something is left to do for the record, and is the moment, by the clock of the
    meta-backend's database, from which anybody may do it. A plain stored record has none.
    `native` holds what the database adds, ``id`` or ``_id`` above all.
    """

    path: str
    proxy_storage_name: str = ""
    original_storage_name: str = ""
    original_storage_path: str = ""
    state: State = STORED
    token: str = ""
    version: int = 0
    places: tuple[Place, ...] = ()
    lease: datetime | None = None
    size: int | None = None
    checksum: str | None = None
    content_type: str | None = None
    name: str | None = None
    created_at: datetime | None = None
    updated_at: datetime | None = None
    extra: Mapping[str, Any] = field(default_factory=_empty)
    native: Mapping[str, Any] = field(default_factory=_empty, compare=False, repr=False)

    @property
    def revision(self) -> Revision:
        """The pair that a compare-and-set of this record must find unchanged."""
        return Revision(self.token, self.version)

    @property
    def primary(self) -> Place:
        """The place that reads go to: as `places` says, else doubtful while ``pending`` and good from then on."""
        implied: PlaceState = "doubtful" if self.state == PENDING else "good"
        for place in self.places:
            if place.key == self.original_storage_path and place.original == self.original_storage_name:
                return place
        return Place(self.original_storage_name, self.original_storage_path, implied)

    def all_places(self) -> tuple[Place, ...]:
        """Return every place that holds or may hold bytes of this file, the primary one first."""
        primary = self.primary
        return (primary, *(place for place in self.places if place is not primary))

    def good_places(self) -> tuple[Place, ...]:
        """Return the places that hold the whole bytes of this file, the primary one first."""
        if not self.places:
            return (self.primary,)
        return tuple(place for place in self.all_places() if place.state == "good")

    def has_bytes_of(self, other: MetaRecord) -> bool:
        """Return whether both stand for the same bytes: the same place, given by the same reservation, and not reused.

        A key alone does not say so: deleted and saved anew, a file may have the key of the one before; replaced, it
        may have its own former one again. That tells the checksum; where there is none, few changes in between.
        """
        if (self.token, self.primary) != (other.token, other.primary):
            return False
        if self.checksum and other.checksum:
            return self.checksum == other.checksum
        return abs(self.version - other.version) < CHANGES_TO_REUSE

    def get_proxy_storage(self) -> ProxyStorage:
        """Return the registered storage that this record belongs to.

        Raises:
            ConfigurationError: no storage of that name is registered.
        """
        from .registry import get_storage

        return get_storage(self.proxy_storage_name)

    def get_original_storage(self) -> Backend:
        """Return the original backend that holds the bytes."""
        return self.get_proxy_storage().get_original(self.original_storage_name)

    def get_original_storage_full_path(self) -> str:
        """Return the name a human would use for the bytes, e.g. ``/srv/media/om.png``."""
        return self.get_original_storage().full_path(self.original_storage_path)

    __getstate__ = _picklable_state

    # Equality is that of the dataclass; only the reading side of Mapping is wanted.
    def __getitem__(self, key: str) -> Any:
        if key in _RECORD_FIELDS:
            return getattr(self, key)
        if key in self.native:
            return self.native[key]
        return self.extra[key]

    def __iter__(self) -> Iterator[str]:
        yield from _RECORD_FIELDS
        yield from (key for key in self.native if key not in _RECORD_FIELDS)
        yield from (key for key in self.extra if key not in _RECORD_FIELDS and key not in self.native)

    def __len__(self) -> int:
        return sum(1 for _ in self)

    def __bool__(self) -> bool:
        return True

    def __hash__(self) -> int:
        return hash((self.path, self.token, self.version))


_RECORD_FIELDS = frozenset(f.name for f in fields(MetaRecord) if f.name != "native")


@dataclass(frozen=True, slots=True)
class CommonPrefix:
    """A "directory" of a listing with a delimiter: at least one path begins with `path`, which ends in it."""

    path: str


@dataclass(frozen=True, slots=True)
class ObjectInfo:
    """What an original backend knows of one object. Unknown is None.

    `changed_at` is when the service last touched the object (a file system's ctime), which no caller can set back;
    where it is None, `modified_at` serves. `token` is the one given to the write, for services that can keep it.
    With ``list(delimiter=…)`` an entry with `is_prefix` stands for all keys that begin with `key`.
    """

    key: str
    size: int | None = None
    modified_at: datetime | None = None
    changed_at: datetime | None = None
    etag: str | None = None
    content_type: str | None = None
    metadata: Mapping[str, str] = field(default_factory=_empty)
    token: str | None = None
    is_prefix: bool = False

    __getstate__ = _picklable_state


@dataclass(frozen=True, slots=True)
class ByteRange:
    """A part of a file: ``ByteRange(10, 20)`` is bytes 10 to 19, ``ByteRange(10)`` all from 10 on,
    ``ByteRange.last(5)`` the last five. Like a slice, it may reach beyond the end.
    """

    start: int = 0
    end: int | None = None
    suffix: int | None = None

    def __post_init__(self) -> None:
        if self.start < 0 or (self.end is not None and self.end < self.start) or (self.suffix or 0) < 0:
            raise ValueError(f"not a byte range: start={self.start}, end={self.end}, suffix={self.suffix}")
        if self.suffix is not None and (self.start, self.end) != (0, None):
            raise ValueError("a byte range is either start and end, or a suffix")

    @classmethod
    def last(cls, count: int) -> ByteRange:
        """Return the range of the last `count` bytes."""
        return cls(suffix=count)

    def resolve(self, size: int) -> tuple[int, int]:
        """Return (start, stop) for a file of `size` bytes, clipped to it; empty where nothing overlaps."""
        if self.suffix is not None:
            return max(0, size - self.suffix), size
        stop = size if self.end is None else min(self.end, size)
        return min(self.start, stop), stop


@dataclass(frozen=True, slots=True)
class Capabilities:
    """What an original backend can do: data, to be asked before the call, not found out by an exception.

    `conditional_create`: of several simultaneous writes to one key exactly one succeeds.
    `upload_form`: browsers can upload straight to the service, see `Backend.upload_form`.
    `tokens`: objects keep the token of their write, so that a doubtful object can be told from somebody else's.
    `max_key_bytes`, `max_segment_bytes`: limits in UTF-8 bytes of a key, and of one ``/``-separated part.
    """

    conditional_create: bool = False
    range_read: bool = False
    list: bool = False
    url: bool = False
    modified_time: bool = False
    server_copy: bool = False
    metadata: bool = False
    content_type: bool = False
    tokens: bool = False
    upload_form: bool = False
    max_key_bytes: int = 1024
    max_segment_bytes: int | None = None


@dataclass(frozen=True, slots=True)
class UploadForm:
    """What a browser needs for uploading straight to a service: these `fields`, then the file in a last field named
    ``file``, sent as ``multipart/form-data`` to `url`. Who has the fields may upload until `expires_at`."""

    url: str
    fields: Mapping[str, str] = field(repr=False)
    expires_at: datetime

    __getstate__ = _picklable_state
