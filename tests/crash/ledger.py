"""What the child promised before it died, and whether that is what is there now.

The child writes a line before each operation (the intent) and one after it (the acknowledgement). Operations without
an acknowledgement may have happened or not, but wholly. Every path of an acknowledged file belongs to one task of
the child, except the *contested* ones, which many tasks write to at once.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

NEVER = 1 << 60


@dataclass(frozen=True)
class File:
    """An acknowledged file: the hash of its content, and which operation brought it to life."""

    sha: str
    born: int


@dataclass(frozen=True)
class Slot:
    """A record that an unfinished operation may have left, or (`required`) must have left, in one of some shapes."""

    why: str
    shapes: tuple[tuple[str, str | None], ...]  # (path or pattern, sha or None for any)
    required: bool

    def fits(self, path: str, sha: str | None) -> bool:
        return any(re.fullmatch(pattern, path) and wanted in (None, sha) for pattern, wanted in self.shapes)


@dataclass
class _Write:
    """One write to a contested path; a deletion writes None."""

    value: str | None
    begun: int
    ended: int = NEVER


@dataclass
class Ledger:
    """The sum of a log. `start` is what was there when the child began."""

    files: dict[str, File] = field(default_factory=dict)
    foreign: dict[tuple[str, str], str] = field(default_factory=dict)
    maybe_foreign: dict[tuple[str, str], str] = field(default_factory=dict)
    contested: dict[str, list[_Write]] = field(default_factory=dict)
    open: dict[int, dict[str, Any]] = field(default_factory=dict)
    wrong: list[str] = field(default_factory=list)
    acknowledged: int = 0
    numbers: set[int] = field(default_factory=lambda: {0})

    @classmethod
    def read(cls, log: Path, start: Mapping[str, Any]) -> Ledger:
        ledger = cls(
            files={path: File(sha, born) for path, sha, born in start["files"]},
            foreign={(original, key): sha for original, key, sha in start["foreign"]},
            contested={path: [_Write(sha, -1, -1)] for path, sha in start["contested"].items()},
        )
        lines = log.read_bytes().split(b"\n")
        for number, line in enumerate(lines[:-1]):  # what follows the last newline was cut off by the kill
            ledger._take(number, json.loads(line))
        return ledger

    def _take(self, number: int, line: dict[str, Any]) -> None:
        self.numbers.add(line.get("n", 0))
        if "do" in line:
            self.open[line["n"]] = line
            if line["do"] in ("overwrite", "erase"):
                line["write"] = _Write(line.get("sha"), number)
                self.contested[line["path"]].append(line["write"])
            return
        if "wrong" in line:
            self.wrong.append(line["wrong"])
            return
        if "unknown" in line:
            return  # as good as unfinished
        intent = self.open.pop(line["n"])
        if "no" in line:
            if "write" in intent:
                self.contested[intent["path"]].remove(intent["write"])
            return
        self.acknowledged += 1
        getattr(self, f"_did_{intent['do']}")(number, intent, line["ok"])

    # -- what an acknowledgement means

    def _did_save(self, number: int, intent: dict[str, Any], path: str) -> None:
        self.files[path] = File(intent["sha"], intent["n"])

    def _did_copy(self, number: int, intent: dict[str, Any], answer: list[str]) -> None:
        path, recorded = answer  # no checksum is recorded of the copy of an adopted file
        sha = intent["sha"] or recorded
        if recorded not in (None, sha):
            self.wrong.append(f"the record of the copy {path!r} says {recorded}, not {sha}")
        self.files[path] = File(sha, intent["n"])

    def _did_replace(self, number: int, intent: dict[str, Any], _: Any) -> None:
        self.files[intent["path"]] = File(intent["sha"], intent["born"])

    def _did_move(self, number: int, intent: dict[str, Any], _: Any) -> None:
        pass

    def _did_rename(self, number: int, intent: dict[str, Any], _: Any) -> None:
        file = self._forget(intent)
        self.files[intent["to"]] = file

    def _did_delete(self, number: int, intent: dict[str, Any], _: Any) -> None:
        self._forget(intent)

    def _did_plant(self, number: int, intent: dict[str, Any], _: Any) -> None:
        self.foreign[intent["original"], intent["key"]] = intent["sha"]

    def _did_adopt(self, number: int, intent: dict[str, Any], path: str) -> None:
        del self.foreign[intent["original"], intent["key"]]
        self.files[path] = File(intent["sha"], intent["n"])

    def _did_overwrite(self, number: int, intent: dict[str, Any], _: Any) -> None:
        intent["write"].ended = number

    _did_erase = _did_overwrite

    def _forget(self, intent: dict[str, Any]) -> File:
        file = self.files.get(intent["path"])
        if file is not None and file.born == intent["born"]:
            return self.files.pop(intent["path"])
        # Somebody else has got the name already, between the end of our operation and its line in the log.
        return File(intent["sha"], intent["born"])

    # -- what must, and what may be there

    def settle(self) -> list[Slot]:
        """Turn the unfinished operations into slots; `files` and `foreign` are then what must be there."""
        slots = []
        for intent in self.open.values():
            do, sha = intent["do"], intent.get("sha")
            why = f"{do} {intent.get('path') or intent.get('name') or intent.get('key')!r} ({intent['n']})"
            if do in ("save", "copy", "adopt"):
                slots.append(Slot(why, ((_like(intent["name"]), sha),), required=False))
                if do == "adopt":
                    key = (intent["original"], intent["key"])
                    self.maybe_foreign[key] = self.foreign.pop(key)
            elif do == "plant":
                self.maybe_foreign[intent["original"], intent["key"]] = intent["sha"]
            elif do in ("replace", "rename", "move", "delete"):
                file = self.files.get(intent["path"])
                if file is None or file.born != intent["born"]:
                    # It is done, and somebody else has got the name already: only the line is missing.
                    if do == "rename":
                        slots.append(Slot(why, ((re.escape(intent["to"]), sha),), required=True))
                    continue
                del self.files[intent["path"]]
                shapes = [(re.escape(intent["path"]), file.sha)]
                if do == "replace":
                    shapes.append((re.escape(intent["path"]), sha))
                elif do == "rename":
                    shapes.append((re.escape(intent["to"]), file.sha))
                slots.append(Slot(why, tuple(shapes), required=do != "delete"))
        return slots

    def judge(self, stored: Mapping[str, str | None]) -> list[str]:
        """Compare with the stored records, path and hash of the content; return what is wrong."""
        wrong = list(self.wrong)
        slots = self.settle()
        left = dict(stored)
        for path, file in self.files.items():
            if path not in left:
                wrong.append(f"acknowledged, but lost: {path!r}")
            elif (found := left.pop(path)) != file.sha:
                wrong.append(f"acknowledged with {file.sha}, but {path!r} has {found}")
        for path, writes in self.contested.items():
            value = left.pop(path, None)
            allowed = {
                write.value
                for write in writes
                if not any(other.begun > write.ended for other in writes if other.ended < NEVER)
            }
            if value not in allowed:
                wrong.append(f"{path!r} has {value}, but only {sorted(map(str, allowed))} can be")
        wrong += [
            f"nobody left this, or it was deleted: {path!r} with {left[path]}"
            for path in _unmatched(left, slots, lambda path, slot: slot.fits(path, left[path]))
        ]
        required = [slot for slot in slots if slot.required]
        wrong += [
            f"neither the old nor the new state is there after {slot.why}: {slot.shapes}"
            for slot in _unmatched(required, left, lambda slot, path: slot.fits(path, left[path]))
        ]
        return wrong


def _like(name: str) -> str:
    """Return the pattern of `name` and of the free names tried after it."""
    directory, _, base = name.rpartition("/")
    stem, dot, extension = base.partition(".")
    head = re.escape(f"{directory}/" if directory else "")
    return f"{head}{re.escape(stem)}(_[A-Za-z0-9]{{7}})?{re.escape(dot + extension)}"


def _unmatched(items: Iterable[Any], places: Iterable[Any], fits: Callable[[Any, Any], bool]) -> list[Any]:
    """Return the items that get no place of their own in a best matching."""
    places = list(places)
    taken: dict[int, Any] = {}

    def place(item: Any, seen: set[int]) -> bool:
        for index, candidate in enumerate(places):
            if index not in seen and fits(item, candidate):
                seen.add(index)
                if index not in taken or place(taken[index], seen):
                    taken[index] = item
                    return True
        return False

    return [item for item in items if not place(item, set())]
