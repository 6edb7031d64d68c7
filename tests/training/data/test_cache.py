"""The cache: found by content, complete or not there, told when stale."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from loratools.errors import InputError, NotFiniteError, WriteError
from loratools.tensors.lazy import ByteFile
from loratools.training.data.cache import Cache, Key, text_key
from loratools.training.data.fingerprint import Fingerprint, Item
from loratools.training.data.transform import place

PLACEMENT = place((9, 4), (4, 4), (0.5, 0.0))


def data(settings: Mapping[str, Any] | None = None, **pictures: str) -> Fingerprint:
    """A fingerprint of pictures by id and content."""
    digests = {name: hashlib.sha256(content.encode()).hexdigest() for name, content in sorted(pictures.items())}
    return Fingerprint(tuple(Item(name, 1, digest, "", 1) for name, digest in digests.items()), settings or {"vae": "one"})


def latents(seed: int) -> dict[str, torch.Tensor]:
    mean, std = torch.randn(2, 4, 8, 6, generator=torch.Generator().manual_seed(seed))
    return {"mean": mean, "std": std.abs().to(torch.bfloat16)}


def same(found: Mapping[str, torch.Tensor], expected: Mapping[str, torch.Tensor]) -> bool:
    return found.keys() == expected.keys() and all(
        found[name].dtype == tensor.dtype and torch.equal(found[name], tensor) for name, tensor in expected.items()
    )


def packs(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.glob("*.safetensors"))


def test_put_and_get(tmp_path: Path) -> None:
    cache = Cache(tmp_path / "deep/cache", data(a="A", b="B"))
    keys = [cache.latents_key(name, PLACEMENT) for name in "ab"]
    assert not cache.has(keys[0])
    cache.put(keys[0], latents(0))
    cache.put_all({keys[1]: latents(1), text_key("words"): {"embedding": torch.arange(6).view(2, 3), "scalar": torch.tensor(2.5)}})
    for again in (cache, Cache(tmp_path / "deep/cache", data(a="A", b="B"))):
        assert all(again.has(key) for key in (*keys, text_key("words")))
        assert same(again.get(keys[0]), latents(0))
        assert same(again.get(keys[1]), latents(1))
        assert same(again.get(text_key("words")), {"embedding": torch.arange(6).view(2, 3), "scalar": torch.tensor(2.5)})
        assert again.notes == []


def test_what_makes_a_key(tmp_path: Path) -> None:
    """The picture's content and every part of the placement; not the sample's name, nor who else is there."""
    cache = Cache(tmp_path, data(a="A", b="B", copy="A"))
    cache.put(cache.latents_key("a", PLACEMENT), latents(0))
    assert cache.has(cache.latents_key("copy", PLACEMENT))
    others = [
        place((9, 4), (4, 4), (0.5, 0.0), flip=True),
        place((9, 4), (4, 4), (0.0, 0.0)),
        place((9, 4), (5, 4), (0.5, 0.0)),
        place((9, 8), (4, 4), (0.5, 0.0)),
        replace(PLACEMENT, resized=(10, 4)),
    ]
    assert not any(cache.has(cache.latents_key("a", other)) for other in others)
    assert not cache.has(cache.latents_key("b", PLACEMENT))
    assert not cache.has(Key("text", cache.latents_key("a", PLACEMENT).content, cache.latents_key("a", PLACEMENT).variant))
    assert not cache.has(text_key(""))


def test_a_sample_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(KeyError):
        Cache(tmp_path, data(a="A")).latents_key("b", PLACEMENT)


def test_an_entry_that_is_not_there(tmp_path: Path) -> None:
    cache = Cache(tmp_path, data(a="A"))
    with pytest.raises(InputError, match="no latents"):
        cache.get(cache.latents_key("a", PLACEMENT))


def test_an_edited_picture_is_made_again_and_the_others_stay(tmp_path: Path) -> None:
    before = Cache(tmp_path, data(a="A", b="B", c="C"))
    for seed, name in enumerate("abc"):
        before.put(before.latents_key(name, PLACEMENT), latents(seed))
    before.put(text_key("words"), latents(3))
    after = Cache(tmp_path, data(a="A", b="edited", d="D"))
    assert after.notes[1:-1] == ["removed: c", "added: d", "picture changed: b (1 → 1 bytes)"]
    assert "what changed is computed again" in after.notes[0]
    assert "2 stale packs removed" in after.notes[-1]
    assert len(packs(tmp_path)) == 2
    assert [after.has(after.latents_key(name, PLACEMENT)) for name in "abd"] == [True, False, False]
    assert same(after.get(after.latents_key("a", PLACEMENT)), latents(0))
    assert after.has(text_key("words"))
    assert Cache(tmp_path, data(a="A", b="edited", d="D")).notes == []


def test_a_pack_stays_while_anything_in_it_is_of_use(tmp_path: Path) -> None:
    before = Cache(tmp_path, data(a="A", b="B"))
    before.put_all({before.latents_key(name, PLACEMENT): latents(seed) for seed, name in enumerate("ab")})
    after = Cache(tmp_path, data(a="A", b="edited"))
    assert [after.has(after.latents_key(name, PLACEMENT)) for name in "ab"] == [True, False]
    assert same(after.get(after.latents_key("a", PLACEMENT)), latents(0))


def test_other_settings_start_again(tmp_path: Path) -> None:
    before = Cache(tmp_path, data(a="A"))
    before.put_all({before.latents_key("a", PLACEMENT): latents(0), text_key("words"): latents(1)})
    after = Cache(tmp_path, data({"vae": "two"}, a="A"))
    assert not after.has(after.latents_key("a", PLACEMENT))
    assert not after.has(text_key("words"))
    assert 'setting changed: vae ("one" → "two")' in after.notes
    assert packs(tmp_path) == []


def test_runs_with_other_settings_do_not_write_over_each_other(tmp_path: Path) -> None:
    first, second = Cache(tmp_path, data(a="A")), Cache(tmp_path, data({"vae": "two"}, a="A"))
    first.put(text_key("x"), latents(0))
    second.put(text_key("x"), latents(1))
    assert same(first.get(text_key("x")), latents(0))
    assert same(second.get(text_key("x")), latents(1))


def test_an_entry_that_is_there_stays_as_it_is(tmp_path: Path) -> None:
    cache = Cache(tmp_path, data(a="A", b="B"))
    first, second = (cache.latents_key(name, PLACEMENT) for name in "ab")
    cache.put(first, latents(0))
    cache.put_all({first: latents(5), second: latents(1)})
    assert same(cache.get(first), latents(0))
    assert same(cache.get(second), latents(1))
    cache.put(first, latents(6))
    assert len(packs(tmp_path)) == 2


def test_the_same_entries_are_the_same_bytes(tmp_path: Path) -> None:
    contents = []
    for name, order in (("one", "ab"), ("two", "ba")):
        cache = Cache(tmp_path / name, data(a="A", b="B"))
        entries = {
            cache.latents_key(picture, PLACEMENT): dict(sorted(latents(ord(picture)).items(), reverse=order == "ba")) for picture in order
        }
        cache.put_all(entries)
        contents.append({path: (tmp_path / name / path).read_bytes() for path in packs(tmp_path / name)})
    assert contents[0] == contents[1]


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_not_a_number_is_never_kept(value: float, tmp_path: Path) -> None:
    cache = Cache(tmp_path, data(a="A"))
    good, bad = text_key("x"), cache.latents_key("a", PLACEMENT)
    mean = torch.zeros(4, 4, dtype=torch.float16)
    mean[3, 2] = value
    with pytest.raises(NotFiniteError) as caught:
        cache.put_all({good: latents(0), bad: {"mean": mean}})
    assert caught.value.tensor == "latents mean"
    assert "fp32" in str(caught.value.fix)
    assert not cache.has(good)
    assert os.listdir(tmp_path) == ["dataset.json"]


def test_an_interrupted_pack_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache = Cache(tmp_path, data(a="A"))

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "pwrite", full)
    with pytest.raises(WriteError, match="the disk is full"):
        cache.put(text_key("x"), latents(0))
    monkeypatch.undo()
    assert os.listdir(tmp_path) == ["dataset.json"]
    assert not cache.has(text_key("x"))


@pytest.mark.parametrize("damage", ["cut", "empty", "no record", "other record"])
def test_a_broken_pack_is_told_and_made_again(damage: str, tmp_path: Path) -> None:
    cache = Cache(tmp_path, data(a="A"))
    cache.put(text_key("x"), latents(0))
    path = tmp_path / packs(tmp_path)[0]
    whole = path.read_bytes()
    if damage == "no record":
        save_file({"a/mean": torch.zeros(1)}, path)
    elif damage == "other record":
        save_file({"a/mean": torch.zeros(1)}, path, {"loratools.cache": '{"settings": "x", "entries": {"b": ["text", "y"]}}'})
    else:
        path.write_bytes({"cut": whole[:-1], "empty": b""}[damage])
    again = Cache(tmp_path, data(a="A"))
    assert not again.has(text_key("x"))
    assert len(again.notes) == 1
    assert str(path) in again.notes[0]
    again.put(text_key("x"), latents(0))
    assert path.read_bytes() == whole


def test_nothing_else_in_the_folder_is_touched(tmp_path: Path) -> None:
    names = ("model.safetensors", "pack-notes.safetensors", "pack-" + "0" * 31 + ".safetensors", "pack-" + "0" * 32 + ".safetensors.bak")
    for name in names:
        (tmp_path / name).write_text("mine")
    cache = Cache(tmp_path, data(a="A"))
    Cache(tmp_path, data({"vae": "two"}, a="A"))
    assert all((tmp_path / name).read_text() == "mine" for name in names)
    assert cache.notes == []


def test_a_broken_record_of_the_last_use_is_told(tmp_path: Path) -> None:
    (tmp_path / "dataset.json").write_text("{")
    assert any("dataset.json" in note for note in Cache(tmp_path, data(a="A")).notes)
    assert Cache(tmp_path, data(a="A")).notes == []


def test_reading_an_entry_reads_its_bytes_and_no_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache = Cache(tmp_path, data(a="A"))
    cache.put_all({text_key(str(number)): {"x": torch.full((1000,), float(number))} for number in range(50)})
    assert len(packs(tmp_path)) == 1
    read: list[int] = []
    real_read, real_into = ByteFile.read, ByteFile.read_into
    monkeypatch.setattr(ByteFile, "read", lambda self, offset, size: read.append(size) or real_read(self, offset, size))
    monkeypatch.setattr(ByteFile, "read_into", lambda self, offset, target: read.append(len(target)) or real_into(self, offset, target))
    assert cache.get(text_key("17"))["x"].tolist() == [17.0] * 1000
    assert read == [4000]


def test_what_is_got_belongs_to_the_caller(tmp_path: Path) -> None:
    cache = Cache(tmp_path, data(a="A"))
    cache.put(text_key("x"), latents(0))
    cache.get(text_key("x"))["mean"].zero_()
    assert same(cache.get(text_key("x")), latents(0))


def test_many_packs_do_not_use_up_the_descriptors(tmp_path: Path) -> None:
    cache = Cache(tmp_path, data(a="A"))
    before = len(os.listdir("/proc/self/fd"))
    for number in range(20):
        cache.put(text_key(str(number)), {"x": torch.tensor(number)})
    again = Cache(tmp_path, data(a="A"))
    assert [int(again.get(text_key(str(number)))["x"]) for number in range(20)] == list(range(20))
    assert len(os.listdir("/proc/self/fd")) <= before


def test_an_entry_without_tensors(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="needs a tensor"):
        Cache(tmp_path, data(a="A")).put(text_key("x"), {})


def test_a_folder_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(WriteError):
        Cache(tmp_path / "file/cache", data(a="A"))
