"""dataset.json: equal for equal contents, and every change told in words."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from loratools.errors import InputError, MalformedError
from loratools.training.data.fingerprint import Fingerprint, differences, fingerprint, read_fingerprint, write_fingerprint
from loratools.training.data.samples import Sample

SETTINGS = {"resolution": 512, "buckets": {"step": 64, "sides": (256, 1024)}, "flip": False}


def samples(folder: Path) -> list[Sample]:
    folder.mkdir(exist_ok=True)
    for name in "ba":
        (folder / f"{name}.png").write_bytes(f"picture {name}".encode())
    return [Sample(f"{name}.png", folder / f"{name}.png", f"words of {name}", 4, 4, 1, folder) for name in "ba"]


def test_what_is_written(tmp_path: Path) -> None:
    found = fingerprint(samples(tmp_path), SETTINGS)
    write_fingerprint(tmp_path / "dataset.json", found)
    assert json.loads((tmp_path / "dataset.json").read_bytes()) == {
        "format": "loratools-dataset",
        "version": 1,
        "settings": {"resolution": 512, "buckets": {"step": 64, "sides": [256, 1024]}, "flip": False},
        "samples": [
            {
                "id": f"{name}.png",
                "bytes": 9,
                "sha256": hashlib.sha256(f"picture {name}".encode()).hexdigest(),
                "caption": hashlib.sha256(f"words of {name}".encode()).hexdigest(),
                "repeats": 1,
            }
            for name in "ab"
        ],
    }
    assert read_fingerprint(tmp_path / "dataset.json") == found
    assert str(tmp_path) not in found.text()


def test_a_touched_copied_and_reordered_dataset_is_the_same(tmp_path: Path) -> None:
    one = samples(tmp_path / "one")
    old = fingerprint(one, SETTINGS)
    for item in one:
        os.utime(item.path, (1, 1))
    assert differences(old, fingerprint(one, dict(reversed(SETTINGS.items())))) == []
    shutil.copytree(tmp_path / "one", tmp_path / "two")
    moved = [replace(item, path=tmp_path / "two" / item.id, folder=tmp_path / "two") for item in reversed(one)]
    new = fingerprint(moved, SETTINGS)
    assert differences(old, new) == []
    assert (new.digest, new.text()) == (old.digest, old.text())


def test_every_change_in_words(tmp_path: Path) -> None:
    first, second = samples(tmp_path)
    old = fingerprint([first, second], SETTINGS)
    (tmp_path / "b.png").write_bytes(b"another one")
    (tmp_path / "c.png").write_bytes(b"new")
    changed = [replace(first, caption="other words", repeats=4), replace(second, id="c.png", path=tmp_path / "c.png")]
    new = fingerprint(changed, {"resolution": 768, "buckets": {"step": 64, "sides": (256, 1536)}, "keep": 1})
    assert differences(old, new) == [
        "setting changed: buckets.sides ([256, 1024] → [256, 1536])",
        "setting changed: flip (false → absent)",
        "setting changed: keep (absent → 1)",
        "setting changed: resolution (512 → 768)",
        "removed: a.png",
        "added: c.png",
        "picture changed: b.png (9 → 11 bytes)",
        "caption changed: b.png",
        "repeats changed: b.png (1 → 4)",
    ]
    assert old.digest != new.digest


def test_items_are_sorted_by_id(tmp_path: Path) -> None:
    items = [replace(item, id=name) for item in samples(tmp_path) for name in ("c" + item.id, "a" + item.id, "b" + item.id)]
    assert [item.id for item in fingerprint(items, {}).items] == ["aa.png", "ab.png", "ba.png", "bb.png", "ca.png", "cb.png"]


def test_a_picture_of_the_same_size_with_another_content(tmp_path: Path) -> None:
    items = samples(tmp_path)
    old = fingerprint(items, {})
    (tmp_path / "a.png").write_bytes(b"picture A")
    assert differences(old, fingerprint(items, {})) == ["picture changed: a.png (9 → 9 bytes)"]


@pytest.mark.parametrize("change", [{"caption": "x"}, {"repeats": 2}, {"id": "z.png"}])
def test_the_digest_covers_every_field(change: dict[str, Any], tmp_path: Path) -> None:
    first, second = samples(tmp_path)
    assert fingerprint([first, second], {}).digest != fingerprint([replace(first, **change), second], {}).digest


def test_the_settings_have_a_digest_of_their_own(tmp_path: Path) -> None:
    items = samples(tmp_path)
    base = fingerprint(items, SETTINGS)
    assert base.settings_digest == fingerprint(items[:1], SETTINGS).settings_digest
    assert base.settings_digest != fingerprint(items, {**SETTINGS, "flip": True}).settings_digest


def test_an_empty_one(tmp_path: Path) -> None:
    write_fingerprint(tmp_path / "dataset.json", Fingerprint((), {}))
    assert read_fingerprint(tmp_path / "dataset.json") == Fingerprint((), {})


def test_a_picture_that_is_gone(tmp_path: Path) -> None:
    items = samples(tmp_path)
    (tmp_path / "a.png").unlink()
    with pytest.raises(InputError, match=r"a\.png: no such file"):
        fingerprint(items, {})


GOOD = {"id": "a", "bytes": 1, "sha256": "00", "caption": "00", "repeats": 1}


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ({"format": "other", "version": 1, "settings": {}, "samples": []}, "not a fingerprint"),
        ({"format": "loratools-dataset", "version": 2, "settings": {}, "samples": []}, "not a fingerprint"),
        ({"format": "loratools-dataset", "version": 1, "settings": [], "samples": []}, "expected samples"),
        ({"format": "loratools-dataset", "version": 1, "settings": {}}, "expected samples"),
        ({"format": "loratools-dataset", "version": 1, "settings": {}, "samples": [GOOD, GOOD]}, "1 sample with the id of another"),
    ],
)
def test_files_that_are_none(content: dict[str, object], words: str, tmp_path: Path) -> None:
    path = tmp_path / "dataset.json"
    path.write_text(json.dumps(content))
    with pytest.raises(MalformedError, match=words):
        read_fingerprint(path)


def test_samples_that_are_not_described_are_all_named(tmp_path: Path) -> None:
    wrong = [{**GOOD, "bytes": "1"}, GOOD, {**GOOD, "repeats": True}, "a", {"id": "a"}, {**GOOD, "more": 1}]
    path = tmp_path / "dataset.json"
    path.write_text(json.dumps({"format": "loratools-dataset", "version": 1, "settings": {}, "samples": wrong}))
    with pytest.raises(MalformedError) as caught:
        read_fingerprint(path)
    assert [line.split(":")[0] for line in caught.value.details] == ["sample 1", "sample 3", "sample 4", "sample 5", "sample 6"]
