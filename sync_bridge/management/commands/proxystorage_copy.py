"""Copy the files of all models from one storage to another, under their names."""

from __future__ import annotations

import contextlib
import json
import queue
import threading
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from django.apps import apps
from django.core.management.base import CommandParser
from django.db import connections, models

from aproxy_storage import MetaRecord
from aproxy_storage.meta_backends.orm import ORMMetaBackend

from ...fields import OWNER
from ...registry import get_content_object
from ...storage import BridgeStorage
from ..base import StorageCommand, file_field, has_owner, owner_of, storage_of_alias, unwrapped


@dataclass(frozen=True, slots=True)
class Item:
    """One file, and the row that names it."""

    field: models.FileField
    key: Any
    name: str
    owner: Mapping[str, Any]

    def __str__(self) -> str:
        return f"{self.field.model._meta.label}.{self.field.name} of {self.key}: {self.name!r}"


class Command(StorageCommand):
    """Copies what the rows of the database name: of the live site's bucket into a staging copy of its database, say."""

    help = (
        "Copy the files that the rows of all models name from one alias of STORAGES to another, under the same names. "
        "Content type, extra fields and owner go along. What is there already is left alone (the same checksum or, "
        "where one of them knows none, the same size), but for an owner that its record lacks, so the command can be "
        "repeated. The source is only read."
    )

    def add_arguments(self, parser: CommandParser) -> None:
        parser.add_argument("source", help="alias in STORAGES; any storage that can be read")
        parser.add_argument("target", help="alias in STORAGES")
        parser.add_argument("--field", action="append", help="only app.Model.field; can be given several times")
        parser.add_argument("--database", default="default", help="the database whose rows name the files")
        parser.add_argument("--concurrency", type=int, default=4, help="files copied at a time, each in a thread")
        parser.add_argument("--dry-run", action="store_true", help="only say what would be copied")

    def handle(self, *, source: str, target: str, **options: Any) -> None:
        self._source, self._target = storage_of_alias(source), storage_of_alias(target)
        self._dry, self._database = options["dry_run"], options["database"]
        self._counts = {"copied": 0, "there already": 0}
        self._dropped: set[str] = set()
        self._names: set[str] = set()  # that are being copied
        self._changed = threading.Condition()
        fields = [file_field(label) for label in options["field"] or ()] or list(self._fields())
        items = self._items(fields, self._database)
        for item, answer in self._copied(items, options["concurrency"]):
            if isinstance(answer, Exception):
                self.failed(str(item), answer)
            else:
                self._counts[answer] += 1
                self.progress(f"{sum(self._counts.values())} files, last: {item.name}")
        counts = ", ".join(f"{count} {what}" for what, count in self._counts.items())
        self.conclude(f"{counts}.{' Nothing was changed.' if self._dry else ''}")

    def _fields(self) -> Iterator[models.FileField]:
        """Yield the file fields whose files belong into one of the two storages."""
        for model in apps.get_models(include_auto_created=True):
            for field in model._meta.local_concrete_fields:
                if isinstance(field, models.FileField) and not model._meta.proxy:
                    if unwrapped(field.storage) in (self._source, self._target):
                        yield field
                    else:
                        self.tell(f"{model._meta.label}.{field.name} is left out: its files are in another storage")

    @staticmethod
    def _items(fields: list[models.FileField], database: str) -> Iterator[Item]:
        for field in fields:
            rows = field.model._base_manager.using(database).exclude(**{field.attname: ""}).order_by("pk")
            rows = rows.exclude(**{f"{field.attname}__isnull": True}).values_list("pk", field.attname)
            last = None
            while page := list((rows if last is None else rows.filter(pk__gt=last))[:500]):
                yield from (Item(field, key, name, owner_of(field, key)) for key, name in page)
                last = page[-1][0]

    def _copied(self, items: Iterator[Item], concurrency: int) -> Iterator[tuple[Item, str | Exception]]:
        """Copy in threads of our own; yield what became of each. At most a few items wait on either side."""
        waiting: queue.Queue[Item | None] = queue.Queue(concurrency)
        done: queue.Queue[tuple[Item, str | Exception]] = queue.Queue()

        def work() -> None:
            try:
                while (item := waiting.get()) is not None:
                    try:
                        with self._alone_with(item.name):
                            done.put((item, self._copy(item)))
                    except Exception as error:
                        done.put((item, error))
            finally:
                connections.close_all()  # of this thread

        threads = [threading.Thread(target=work, name=f"copy-{n}", daemon=True) for n in range(max(1, concurrency))]
        for thread in threads:
            thread.start()
        under_way = 0
        try:
            for item in items:
                waiting.put(item)
                under_way += 1
                while not done.empty() or under_way > 2 * len(threads):
                    under_way -= 1
                    yield done.get()
            for _ in range(under_way):
                yield done.get()
        finally:
            for _ in threads:
                waiting.put(None)
            for thread in threads:
                thread.join()

    @contextlib.contextmanager
    def _alone_with(self, name: str) -> Iterator[None]:
        """Wait until no other thread copies the file `name`: several rows may name it."""
        with self._changed:
            self._changed.wait_for(lambda: name not in self._names)
            self._names.add(name)
        try:
            yield
        finally:
            with self._changed:
                self._names.remove(name)
                self._changed.notify_all()

    def _copy(self, item: Item) -> str:
        """Copy one file; return what was done.

        Raises:
            FileNotFoundError: the source has none. FileExistsError: the target has another one of that name, or would
            call it otherwise.
        """
        name, source, target = item.name, self._source, self._target
        if isinstance(target, BridgeStorage) and not name.startswith(target.proxy.prefix):
            raise FileExistsError(
                f"the target would have called it {target.proxy.prefix + name!r}, for it has a prefix"
            )
        if target._has_file(name) if isinstance(target, BridgeStorage) else target.exists(name):
            if not self._is_same(name):
                raise FileExistsError("the target has another file of that name")
            self._complete(item)
            return "there already"
        if self._dry:
            source.size(name)
            return "copied"
        with source.open(name) as file:
            if isinstance(target, BridgeStorage):
                record = source.get(name) if isinstance(source, BridgeStorage) else None
                content_type = record.content_type if record is not None else None
                target.publish(name, file, exclusive=True, content_type=content_type, extra=self._extra(item, record))
                return "copied"
            saved = target.save(name, file)
        if saved != name:
            target.delete(saved)
            raise FileExistsError(f"the target would have called it {saved!r}")
        return "copied"

    def _complete(self, item: Item) -> None:
        """Write the owner into a record of the target that has none: an earlier copy may have been made without."""
        target = self._target
        if self._dry or not isinstance(target, BridgeStorage) or has_owner(there := target.get(item.name)):
            return
        record = self._source.get(item.name) if isinstance(self._source, BridgeStorage) else None
        extra = self._extra(item, record)
        owner = {key: extra[key] for key in OWNER if key in extra}
        if owner:
            target.update(item.name, extra={**there.extra, **owner})

    def _extra(self, item: Item, record: MetaRecord | None) -> dict[str, Any]:
        """Return what the record of the copy says beside what it says of every file: what that of the source does, as
        far as it can be kept, and the owner.

        Where several rows name the file its owner stays who it is, if that is one of them, and else is the row.
        """
        extra = dict(record.extra) if record is not None else {}
        if not (item.owner and record is not None and _is_of_its_owner(record, item, self._database)):
            extra.update(item.owner)
        kept = {key: value for key, value in extra.items() if self._can_keep(key, value)}
        for key in extra.keys() - kept.keys() - self._dropped:
            self._dropped.add(key)
            self.tell(f"{key!r} is not copied: the records of the target have no room for it")
        return kept

    def _can_keep(self, key: str, value: Any) -> bool:
        meta = self._target.proxy.meta if isinstance(self._target, BridgeStorage) else None
        if isinstance(meta, ORMMetaBackend):
            model = apps.get_model(meta.model) if isinstance(meta.model, str) else meta.model
            names = {name for field in model._meta.concrete_fields for name in (field.name, field.attname)}
            if key in names or "extra" not in names:
                return key in names
        try:
            json.dumps(value)
        except (TypeError, ValueError):
            return False
        return True

    def _is_same(self, name: str) -> bool:
        """Return whether both have the same file: by their checksums where both know them, else by the size."""
        if self._target.size(name) != self._source.size(name):
            return False
        if not (isinstance(self._target, BridgeStorage) and isinstance(self._source, BridgeStorage)):
            return True
        sums = {storage.get(name).checksum for storage in (self._source, self._target)}
        return len(sums) == 1 or None in sums


def _is_of_its_owner(record: MetaRecord, item: Item, database: str) -> bool:
    """Return whether the object that `record` names has this file too, in `database`."""
    if not has_owner(record) or all(str(record.get(key)) == str(value) for key, value in item.owner.items()):
        return False
    owner = get_content_object(record, using=database)
    return bool(getattr(owner, str(record.get("field")), None) == item.name)
