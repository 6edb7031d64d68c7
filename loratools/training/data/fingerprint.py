"""What a run was trained on, so that a resumed run can tell whether it still is: dataset.json.

    {"format": "loratools-dataset", "version": 1, "settings": {…}, "samples": [{"id", "bytes", "sha256", "caption", "repeats"}]}

`sha256` is of the picture's file, `caption` the sha256 of the caption's UTF-8 (prefix and suffix included); `settings` is whatever of
the preprocessing shapes what the model sees. Invariants: contents only, so a copied or touched file is the same one; no absolute
path, so a moved folder is too; the same data give the same bytes. No torch, no pillow.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from loratools.errors import MalformedError, counted
from loratools.tensors.hashes import digest_range
from loratools.tensors.header import open_bytes, printable
from loratools.tensors.source import read_json
from loratools.tensors.writer import write_text_file

if TYPE_CHECKING:
    from loratools.training.data.samples import Sample

_FORMAT, _VERSION = "loratools-dataset", 1


@dataclass(frozen=True)
class Item:
    """One sample: its id, the size and sha256 of its file, the sha256 of its caption, its repeats."""

    id: str
    bytes: int
    sha256: str
    caption: str
    repeats: int


@dataclass(frozen=True)
class Fingerprint:
    """Items sorted by id; settings as JSON has them."""

    items: tuple[Item, ...]
    settings: Mapping[str, Any]

    @property
    def digest(self) -> str:
        """Hex sha256 of everything in it."""
        return hashlib.sha256(self.text().encode()).hexdigest()

    @property
    def settings_digest(self) -> str:
        """Hex sha256 of the settings alone."""
        return hashlib.sha256(json.dumps(self.settings, sort_keys=True).encode()).hexdigest()

    def text(self) -> str:
        """The content of dataset.json."""
        content = {"format": _FORMAT, "version": _VERSION, "settings": self.settings, "samples": [asdict(item) for item in self.items]}
        return json.dumps(content, indent=1, sort_keys=True) + "\n"


def fingerprint(samples: Sequence[Sample], settings: Mapping[str, Any]) -> Fingerprint:
    """Read every picture once and hash it. settings: JSON values. Raises InputError for a file that cannot be read."""
    items = (_item(sample) for sample in samples)
    plain = json.loads(json.dumps(dict(settings), allow_nan=False))  # tuples become lists, as they are when it is read back
    return Fingerprint(tuple(sorted(items, key=lambda item: item.id)), plain)


def _item(sample: Sample) -> Item:
    file, size = open_bytes(sample.path)
    return Item(sample.id, size, digest_range(file, 0, size), hashlib.sha256(sample.caption.encode()).hexdigest(), sample.repeats)


def write_fingerprint(path: Path, found: Fingerprint) -> None:
    """dataset.json, replaced as a whole if it is there. Raises WriteError."""
    write_text_file(path, found.text(), force=True)


def read_fingerprint(path: Path) -> Fingerprint:
    """A dataset.json. Raises MalformedError that lists what is wrong with it, InputError if it cannot be read."""
    content = read_json(path)
    if content.get("format") != _FORMAT or content.get("version") != _VERSION:
        raise MalformedError(f"{path}: not a fingerprint of a dataset (format {_FORMAT}, version {_VERSION})")
    rows, settings = content.get("samples"), content.get("settings")
    if not isinstance(rows, list) or not isinstance(settings, dict):
        raise MalformedError(f"{path}: expected samples (a list) and settings (an object)")
    expected = {field.name: int if field.type == "int" else str for field in fields(Item)}
    wrong = [f"sample {number}: expected {', '.join(expected)}" for number, row in enumerate(rows, 1) if not _fits(row, expected)]
    if wrong:
        raise MalformedError(f"{path}: samples that are not described completely", details=wrong)
    items = {row["id"]: Item(**row) for row in rows}
    if len(items) < len(rows):
        raise MalformedError(f"{path}: {counted(len(rows) - len(items), 'sample')} with the id of another")
    return Fingerprint(tuple(items[name] for name in sorted(items)), settings)


def _fits(row: Any, expected: Mapping[str, type]) -> bool:
    return isinstance(row, dict) and row.keys() == expected.keys() and all(type(row[key]) is kind for key, kind in expected.items())


def differences(old: Fingerprint, new: Fingerprint) -> list[str]:
    """What changed from old to new, one change a line; empty where a run can go on as if nothing had happened."""
    before, after = ({item.id: item for item in side.items} for side in (old, new))
    lines = list(_setting_changes(old.settings, new.settings))
    lines += [f"removed: {printable(name)}" for name in before if name not in after]
    lines += [f"added: {printable(name)}" for name in after if name not in before]
    for name in (name for name in before if name in after):
        was, now = before[name], after[name]
        if (was.sha256, was.bytes) != (now.sha256, now.bytes):
            lines.append(f"picture changed: {printable(name)} ({was.bytes} → {now.bytes} bytes)")
        if was.caption != now.caption:
            lines.append(f"caption changed: {printable(name)}")
        if was.repeats != now.repeats:
            lines.append(f"repeats changed: {printable(name)} ({was.repeats} → {now.repeats})")
    return lines


def _setting_changes(old: Mapping[str, Any], new: Mapping[str, Any]) -> Iterator[str]:
    before, after = dict(_flat(old)), dict(_flat(new))
    for name in sorted(before.keys() | after.keys()):
        was, now = (json.dumps(side[name]) if name in side else "absent" for side in (before, after))
        if was != now:
            yield f"setting changed: {printable(name)} ({was} → {now})"


def _flat(settings: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Settings by dotted names; lists stay whole."""
    for key, value in settings.items():
        if isinstance(value, dict) and value:
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield prefix + key, value
