"""Give records to files that are there already; no byte moves."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from django.core.management.base import CommandError, CommandParser
from django.db import models

from aproxy_storage import AlreadyExists, ConfigurationError, InvalidPath, NotFound, ProxyStorage, StorageError
from aproxy_storage.backends.filesystem import FileSystemBackend
from aproxy_storage.paths import check_path

from ...storage import BridgeStorage
from ..base import (
    StorageCommand,
    bridge_storage,
    file_field,
    has_owner,
    owner_of,
    prefixes_of_others,
    roots_of_others,
    unwrapped,
)

AT_ONCE = 16  # adoptions under way at a time
_OF_OTHERS = "left to originals inside this one"
_WAYS_OUT = {
    "symbolic link": (
        "what it leads to is not reached. Put the files in its place, mount the directory there (mount --bind), or "
        "give that a storage of its own (location=)"
    ),
    "special file": "it holds no file; move it away",
}
_RENAME = "rename it, also in the rows that name it"


class Command(StorageCommand):
    """Adopts the files of a field, or all that lie in an original."""

    help = (
        "Give records to files that are there already; no byte moves. Either those that the rows of a file field name "
        "(app.Model.field, whose storage is a BridgeStorage by now), or, with --storage, all that lie in an original "
        "of that storage; what can be no file of it, such as links, is told then. Records that say nothing of their "
        "owner are told the row of the field. Can be repeated, and runs beside a live site."
    )

    def add_arguments(self, parser: CommandParser) -> None:
        parser.add_argument("field", nargs="?", help="app.Model.field")
        parser.add_argument("--storage", help="alias in STORAGES or name in PROXY_STORAGE: everything in its original")
        parser.add_argument("--using", help="the original, where there are several")
        parser.add_argument("--database", default="default", help="the database of the field's model")
        parser.add_argument("--after", help="go on after this primary key, or with --storage after this key")
        parser.add_argument("--batch", type=int, default=500, help="rows, or files, looked at in one go")
        parser.add_argument("--dry-run", action="store_true", help="only say what would be adopted")

    def handle(self, *, field: str | None, storage: str | None, **options: Any) -> None:
        if (field is None) == (storage is None):
            raise CommandError("give either app.Model.field or --storage")
        self._dry = options["dry_run"]
        self._using = options["using"]
        self._counts = {"adopted": 0, "had a record": 0}
        self._owned = 0  # records that were there, and got an owner
        if field is not None:
            self._adopt_field(file_field(field), options["database"], options["after"], options["batch"])
        else:
            assert storage is not None
            one = bridge_storage(storage)
            backend = one.proxy.get_original(self._original_of(one.proxy))
            self._others, self._roots = prefixes_of_others(backend), roots_of_others(backend)
            one.bridge.call(self._adopt_all, one.proxy, options["after"], options["batch"])
        counts = ", ".join(f"{count} {what}" for what, count in self._counts.items())
        if self._owned:
            counts += f", {self._owned} without an owner got one"
        self.conclude(f"{counts}.{' Nothing was changed.' if self._dry else ''}")

    # -- the files of a field

    def _adopt_field(self, field: models.FileField, database: str, after: Any, batch: int) -> None:
        label = f"{field.model._meta.label}.{field.name}"
        storage = unwrapped(field.storage)
        if not isinstance(storage, BridgeStorage):
            raise CommandError(
                f"the storage of {label} is {type(storage).__name__}; give the field its new storage first"
            )
        for rows in self._rows(field, database, after, batch):
            known = dict(zip(rows, storage.get_many(list(rows.values())), strict=True))
            missing = {key: name for key, name in rows.items() if known[key] is None}
            self._counts["had a record"] += len(rows) - len(missing)
            ownerless: dict[str, Any] = {}  # several rows may name one file
            for key, record in known.items():
                if record is not None and not has_owner(record):
                    ownerless.setdefault(record.path, key)
            for name, key in ownerless.items():
                self._write_owner(storage, name, owner_of(field, key), f"{label} of {key}")
            extras = {key: owner_of(field, key) for key in missing}
            answers = storage.bridge.call(self._adopt_many, storage.proxy, missing, extras)
            for key, answer in answers.items():
                if isinstance(answer, StorageError):
                    self.failed(f"{label} of {key}", f"{missing[key]!r}: {answer}")
                    continue
                self._counts["adopted"] += 1
                if answer != missing[key] and not self._dry:  # the name is that of another storage's file
                    rows_of = field.model._base_manager.using(database)
                    rows_of.filter(pk=key, **{field.attname: missing[key]}).update(**{field.attname: answer})
            self.progress(f"{label}: {sum(self._counts.values())} files, up to the key {next(reversed(rows))}")

    def _write_owner(self, storage: BridgeStorage, name: str, owner: Mapping[str, Any], what: str) -> None:
        """Write `owner` into the record of `name`, unless it has one by now."""
        try:
            if not owner or has_owner(record := storage.get(name)):
                return
            if not self._dry:
                storage.update(name, extra={**record.extra, **owner})
            self._owned += 1
        except StorageError as error:
            self.failed(what, f"{name!r}: {error}")

    @staticmethod
    def _rows(field: models.FileField, database: str, after: Any, batch: int) -> Iterator[dict[Any, str]]:
        """Yield the primary keys and names of the rows that have a file, by pages: the site may go on meanwhile."""
        found = field.model._base_manager.using(database).exclude(**{field.attname: ""}).order_by("pk")
        found = found.exclude(**{f"{field.attname}__isnull": True})
        last = field.model._meta.pk.to_python(after) if after is not None else None
        while True:
            page = found if last is None else found.filter(pk__gt=last)
            rows = dict(page.values_list("pk", field.attname)[:batch])
            if not rows:
                return
            yield rows
            last = next(reversed(rows))

    async def _adopt_many(
        self, proxy: ProxyStorage, names: Mapping[Any, str], extras: Mapping[Any, Mapping[str, Any]]
    ) -> dict[Any, str | StorageError]:
        """Adopt the files that are called `names`; return for each its path, or why it could not be."""
        answers: dict[Any, str | StorageError] = {}
        room = asyncio.Semaphore(AT_ONCE)

        async def adopt(key: Any, name: str) -> None:
            async with room:
                try:
                    answers[key] = await self._adopt(proxy, name, extras.get(key, {}))
                except StorageError as error:
                    answers[key] = error

        first: dict[str, Any] = {}  # several rows may name one file
        for key, name in names.items():
            first.setdefault(name, key)
        async with asyncio.TaskGroup() as group:
            for name, key in first.items():
                group.create_task(adopt(key, name))
        return {key: answers[first[name]] for key, name in names.items()}

    async def _adopt(self, proxy: ProxyStorage, name: str, extra: Mapping[str, Any]) -> str:
        key, original = name.removeprefix(proxy.prefix), self._original_of(proxy)
        if self._dry:
            check_path(proxy.prefix + key, max_bytes=proxy.max_path_bytes)
            await proxy.get_original(original).stat(key)
            if wrong := (await _owned(proxy, original, [key]))[1]:
                raise wrong[key]
            return name
        try:
            return await proxy.adopt(key, name=proxy.prefix + key, using=original, extra=extra)
        except AlreadyExists as error:
            if wrong := (await _owned(proxy, original, [key]))[1]:
                raise wrong[key] from error
            raise

    def _original_of(self, proxy: ProxyStorage) -> str:
        return self._using or next(iter(proxy.originals))

    # -- all files of an original

    async def _adopt_all(self, proxy: ProxyStorage, after: str | None, batch: int) -> None:
        original = self._original_of(proxy)
        keys: list[str] = []
        async for info in proxy.get_original(original).list(after=after):
            if info.key.startswith(self._others):
                self._counts[_OF_OTHERS] = self._counts.get(_OF_OTHERS, 0) + 1
                continue
            keys.append(info.key)
            if len(keys) >= batch:
                await self._adopt_keys(proxy, original, keys)
                keys.clear()
        await self._adopt_keys(proxy, original, keys)
        backend = proxy.get_original(original)
        if isinstance(backend, FileSystemBackend):
            async for path, kind in backend.list_strays():
                self._tell_stray(path, kind, backend.full_path(path))

    def _tell_stray(self, path: str, kind: str, full_path: str) -> None:
        """Tell what can have no record, unless it is of another storage, or a link to what is."""
        if path.startswith(self._others) or (kind == "symbolic link" and self._leads_to_others(full_path)):
            self._counts[_OF_OTHERS] = self._counts.get(_OF_OTHERS, 0) + 1
            return
        self.failed(os.fsencode(path).decode(errors="backslashreplace"), f"a {kind}: {_WAYS_OUT.get(kind, _RENAME)}")

    def _leads_to_others(self, link: str) -> bool:
        return bool(self._roots) and os.path.join(os.path.realpath(link), "").startswith(self._roots)

    async def _adopt_keys(self, proxy: ProxyStorage, original: str, keys: list[str]) -> None:
        """Adopt those of `keys` that no record names. They were listed first: a save in flight has its record."""
        owned, wrong = await _owned(proxy, original, keys)
        self._counts["had a record"] += len(owned)
        for key, error in wrong.items():
            self.failed(key, error)
        names = {key: proxy.prefix + key for key in keys if key not in owned and key not in wrong}
        for key, answer in (await self._adopt_many(proxy, names, {})).items():
            if isinstance(answer, NotFound):
                continue  # deleted meanwhile
            if isinstance(answer, AlreadyExists):
                self._counts["had a record"] += 1  # by now
            elif isinstance(answer, StorageError):
                self.failed(key, f"{answer}; {_RENAME}" if isinstance(answer, InvalidPath) else answer)
            else:
                self._counts["adopted"] += 1
                if answer != names[key]:
                    self.tell(f"{key}: adopted as {answer!r}, because its name is taken")
        if keys:
            self.progress(f"{original}: {sum(self._counts.values())} files, up to {keys[-1]}")


async def _owned(
    proxy: ProxyStorage, original: str, keys: Sequence[str]
) -> tuple[set[str], dict[str, ConfigurationError]]:
    """Return those of `keys` in `original` that records of `proxy` name, and an error for each that another storage's
    do: the records of storages that share a table tell originals apart by their names alone."""
    owners = await proxy.meta.owners(original, keys)
    paths = sorted({path for owning in owners.values() for path in owning})
    records = dict(zip(paths, await proxy.meta.get_many(paths), strict=True))
    owned: set[str] = set()
    wrong: dict[str, ConfigurationError] = {}
    for key, owning in owners.items():
        names = {record.proxy_storage_name for path in owning if (record := records[path]) is not None}
        if not names or proxy.name in names:
            owned.add(key)
            continue
        wrong[key] = ConfigurationError(
            f"storage {min(names)!r}, whose records are in the same table, has one of this key in its original"
            f" {original!r}. If that is another directory or bucket, give one of the two storages a table of its own"
            " (meta=) or an original of another name"
        )
    return owned, wrong
