"""extract: what headers can tell is told at once, before a byte of either model's values is read (mergekit#328: an error after 3 h)."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from fixtures import checkpoints, language_models
from fixtures.tuned import matrices, tuned
from loratools.errors import InputError, LoraToolsError, OutputExistsError, UsageError, WriteError
from loratools.operations.extract import extract
from loratools.tensors.lazy import ByteFile
from tests.operations.made import kohya_file, render
from tests.operations.merge_by_hand import QKV, flux, noise, save
from tests.operations.merged import Raw

pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Path, int]]:
    """(file, offset) of every read of a payload: of what lies behind a header."""
    found: list[tuple[Path, int]] = []
    for name in ("read", "read_into"):
        real = getattr(ByteFile, name)

        def counted(self: ByteFile, offset: int, what: Any, real: Callable[..., Any] = real) -> Any:
            if self.path.is_file() and offset >= 8 + int.from_bytes(self.path.open("rb").read(8), "little"):
                found.append((self.path, offset))
            return real(self, offset, what)

        monkeypatch.setattr(ByteFile, name, counted)
    return found


@pytest.fixture
def pair(tmp_path: Path) -> tuple[Path, Path]:
    tensors = flux()
    return save(tmp_path / "a.safetensors", tensors), save(tmp_path / "b.safetensors", tuned(tensors, only=matrices))


def told(error: LoraToolsError) -> str:
    return "\n".join([error.message, *error.details])


def test_every_difference_of_the_headers_at_once(tmp_path: Path, reads: list[tuple[Path, int]]) -> None:
    """X5: shapes, a bias of another length, tensors that one of them has not: one refusal with all, no payload byte, no file."""
    before = flux()
    after = tuned(before, only=matrices)
    after["img_in.weight"] = noise(32, 20)  # more channels
    after["double_blocks.0.img_attn.proj.bias"] = noise(20)
    after["double_blocks.0.img_attn.norm.query_norm.scale"] = noise(8)
    del after["double_blocks.0.txt_attn.proj.weight"], before["double_blocks.0.img_mlp.0.bias"]
    after["double_blocks.0.txt_mlp.0.weight"] = noise(128, 32)
    base, other = save(tmp_path / "a.safetensors", before), save(tmp_path / "b.safetensors", after)
    with pytest.raises(InputError) as caught:
        extract(base, other, tmp_path / "out.safetensors")
    assert caught.value.exit_code == 3
    text = told(caught.value)
    for words in (
        "BASE has [32, 16], TUNED [32, 20]",
        "BASE has [32], TUNED [20]",
        "BASE has [16], TUNED [8]",
        "double_blocks.0.txt_attn.proj.weight: only BASE has it",
        "double_blocks.0.img_mlp.0.bias: only TUNED has it",
        "double_blocks.0.txt_mlp.0.weight: only TUNED has it",
    ):
        assert words in text, words
    assert len(caught.value.details) == 6
    assert "--exclude" in str(caught.value.fix)
    assert reads == []
    assert not (tmp_path / "out.safetensors").exists()


def test_a_good_pair_is_read(pair: tuple[Path, Path], reads: list[tuple[Path, int]], tmp_path: Path) -> None:
    """The counter counts."""
    extract(*pair, tmp_path / "out.safetensors")
    assert len(reads) > 10
    assert {path for path, _ in reads} >= set(pair)


def test_a_plan_reads_nothing(pair: tuple[Path, Path], reads: list[tuple[Path, int]], tmp_path: Path) -> None:
    for settings in ({}, {"rank": "auto"}, {"energy": 0.9}, {"error": 0.1}, {"budget": 1.0}, {"to": "peft"}):
        name = "out" if "to" in settings else "out.safetensors"
        found = extract(*pair, tmp_path / name, dry_run=True, **settings)  # type: ignore[arg-type]
        assert found["modules"] == (17 if "to" in settings else 10)  # q, k and v apart
        assert found["plan"]["bytes"] > 0
        assert "relative_error" not in found
        assert reads == []
        assert not (tmp_path / name).exists()


@pytest.mark.parametrize("settings", [{"rank": 4}, {"rank": 400}, {"rank": 4, "dtype": "fp16"}, {"energy": 0.5}, {"budget": 0.05}])
def test_a_plan_is_no_smaller_than_the_file(settings: dict[str, Any], pair: tuple[Path, Path], tmp_path: Path) -> None:
    planned = extract(*pair, tmp_path / "out.safetensors", dry_run=True, **settings)["plan"]["bytes"]
    extract(*pair, tmp_path / "out.safetensors", **settings)
    assert (tmp_path / "out.safetensors").stat().st_size <= planned + 4096


def test_two_architectures(pair: tuple[Path, Path], tmp_path: Path, reads: list[tuple[Path, int]]) -> None:
    sdxl = checkpoints.single("sdxl", tmp_path / "sdxl.safetensors")
    llama = language_models.llama_folder(tmp_path / "llama")
    for other in (sdxl, llama):
        for base, tuned_ in ((pair[0], other), (other, pair[0])):
            with pytest.raises(InputError, match="two architectures") as caught:
                extract(base, tuned_, tmp_path / "out.safetensors")
            assert "flux" in caught.value.message
    assert reads == []
    assert not (tmp_path / "out.safetensors").exists()


def test_an_adapter_is_no_model(pair: tuple[Path, Path], tmp_path: Path) -> None:
    adapter = tmp_path / "style.safetensors"
    adapter.write_bytes(render(kohya_file({"up_blocks.3.attentions.0.proj_in": (noise(16, 4), noise(4, 16))})))
    for models in ((pair[0], adapter), (adapter, pair[0])):
        with pytest.raises(InputError, match="an adapter, and no model") as caught:
            extract(*models, tmp_path / "out.safetensors")
        assert caught.value.exit_code == 3


# ------------------------------------------------------------------------------------------------------------------- the output


def test_an_existing_output(pair: tuple[Path, Path], tmp_path: Path, reads: list[tuple[Path, int]]) -> None:
    out = tmp_path / "out.safetensors"
    out.write_bytes(b"old")
    for options in ({}, {"dry_run": True}):
        with pytest.raises(OutputExistsError, match="already there") as caught:
            extract(*pair, out, **options)  # type: ignore[arg-type]
        assert caught.value.exit_code == 2
        assert "--force" in str(caught.value.fix)
    assert (out.read_bytes(), reads) == (b"old", [])
    extract(*pair, out, force=True)
    assert Raw.of(out).entries


@pytest.mark.parametrize("how", ["path", "relative", "symlink", "hard link"])
@pytest.mark.parametrize("which", [0, 1])
def test_an_input_is_never_the_output(which: int, how: str, pair: tuple[Path, Path], tmp_path: Path, monkeypatch: Any) -> None:
    """W2: exit 2, forced or not; both models are as they were."""
    monkeypatch.chdir(tmp_path)
    target = {"path": pair[which], "relative": Path(pair[which].name)}.get(how, tmp_path / "other.safetensors")
    if how == "symlink":
        target.symlink_to(pair[which])
    elif how == "hard link":
        os.link(pair[which], target)
    before = [path.read_bytes() for path in pair]
    for force in (False, True):
        with pytest.raises(UsageError) as caught:
            extract(*pair, target, force=force)
        assert caught.value.exit_code == 2
    assert [path.read_bytes() for path in pair] == before


def test_a_shard_is_an_input_too(tmp_path: Path) -> None:
    base = language_models.llama_folder(tmp_path / "base", max_shard_size="20KB")
    other = language_models.llama_folder(tmp_path / "tuned")
    shard = sorted(base.glob("*.safetensors"))[0]
    for target in (shard, other / "model.safetensors", base, other):
        with pytest.raises(UsageError):
            extract(base, other, target, force=True)


@pytest.mark.parametrize("name", ["out.ckpt", "out.pt", "no/out.safetensors"])
def test_outputs_of_a_form_that_is_not_written(name: str, pair: tuple[Path, Path], tmp_path: Path) -> None:
    with pytest.raises((UsageError, WriteError)):
        extract(*pair, tmp_path / name)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.safetensors", "b.safetensors"]


def test_peft_is_a_folder(pair: tuple[Path, Path], tmp_path: Path) -> None:
    with pytest.raises(UsageError):
        extract(*pair, tmp_path / "out.safetensors", to="peft")


def test_a_full_disk(pair: tuple[Path, Path], tmp_path: Path, reads: list[tuple[Path, int]], monkeypatch: Any) -> None:
    """Exit 1 before the work; what is needed is the spool's and the file's."""
    planned = extract(*pair, tmp_path / "out.safetensors", dry_run=True)["plan"]["bytes"]
    usage = SimpleNamespace(total=10**9, used=0, free=int(1.5 * planned))
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    real = os.statvfs
    monkeypatch.setattr(os, "statvfs", lambda path: _with(real(path), usage.free))
    with pytest.raises(WriteError) as caught:
        extract(*pair, tmp_path / "out.safetensors")
    assert caught.value.exit_code == 1
    assert reads == []
    assert not (tmp_path / "out.safetensors").exists()


def _with(found: os.statvfs_result, free: int) -> Any:
    names = [name for name in dir(found) if name.startswith("f_")]
    return SimpleNamespace(
        **{name: getattr(found, name) for name in names} | {"f_bavail": free // found.f_frsize, "f_bfree": free // found.f_frsize}
    )


def test_lesson_5(tmp_path: Path, reads: list[tuple[Path, int]]) -> None:
    """Paths that cannot be read, an output that exists, a dialect nobody has heard of: all in one refusal, the code of the gravest."""
    (tmp_path / "torn.safetensors").write_bytes(b"\x10\x00\x00\x00\x00\x00\x00\x00{}")
    (tmp_path / "out.safetensors").write_bytes(b"old")
    with pytest.raises(LoraToolsError) as caught:
        extract(tmp_path / "torn.safetensors", tmp_path / "none.safetensors", tmp_path / "out.safetensors", to="kohia")
    text = told(caught.value)
    for words in ("torn.safetensors", "none.safetensors", "already there", "kohia"):
        assert words in text, words
    assert caught.value.exit_code == 3
    assert (tmp_path / "out.safetensors").read_bytes() == b"old"
    assert reads == []


def test_a_vocabulary_and_a_layer_more(tmp_path: Path, reads: list[tuple[Path, int]]) -> None:
    """X5: a tuned language model with tokens added and a layer more, in the same layout: all rows of it."""
    base = {"model.embed_tokens.weight": noise(100, 32), "model.layers.0.self_attn.q_proj.weight": noise(32, 32)}
    other = {**base, "model.embed_tokens.weight": noise(104, 32), "model.layers.1.self_attn.q_proj.weight": noise(32, 32)}
    for name, tensors in (("a", base), ("b", other)):
        (tmp_path / name).mkdir()
        save(tmp_path / name / "model.safetensors", tensors)
        (tmp_path / name / "config.json").write_text('{"model_type": "llama"}')
    with pytest.raises(InputError) as caught:
        extract(tmp_path / "a", tmp_path / "b", tmp_path / "out")
    text = told(caught.value)
    assert "BASE has [100, 32], TUNED [104, 32]" in text
    assert "model.layers.1.self_attn.q_proj.weight: only TUNED has it" in text
    assert reads == []


def test_qkv_is_one_shape(tmp_path: Path) -> None:
    """Fused rows that do not add up are said of the tensor that has them."""
    before = flux()
    after = dict(before) | {f"{QKV}.weight": torch.zeros(90, 32)}
    with pytest.raises(LoraToolsError) as caught:
        extract(save(tmp_path / "a.safetensors", before), save(tmp_path / "b.safetensors", after), tmp_path / "out.safetensors")
    assert caught.value.exit_code == 3
    assert QKV in told(caught.value)
