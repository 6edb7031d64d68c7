"""Edges of a merge that reviews found open: what PEFT really saves, orientation, outputs in each other's way, what verify compares."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from fixtures import language_models
from loratools.errors import CheckFailed, LoraToolsError, MalformedError, UnsupportedError
from loratools.operations.combine import combine
from loratools.operations.merge import merge
from loratools.operations.merging import arithmetic, placing
from loratools.tensors.reader import open_source
from tests.operations import merge_by_hand as hand

Q = "model.layers.0.self_attn.q_proj"


@pytest.fixture
def files(tmp_path: Path) -> tuple[dict[str, torch.Tensor], Path, Path]:
    """(tensors of the base, the base, an adapter for all its matrices)."""
    base = hand.language_model(64, torch.float32)
    pairs = {
        key.removesuffix(".weight"): hand.pair(value.shape, 4, 4.0) for key, value in base.items() if value.dim() == 2 and "_proj" in key
    }
    return base, hand.save(tmp_path / "base.safetensors", base), hand.peft(tmp_path / "adapter", pairs)


def refused(*arguments: Any, **options: Any) -> LoraToolsError:
    with pytest.raises(LoraToolsError) as caught:
        merge(*arguments, **options)
    return caught.value


def test_what_peft_saves_beside_a_grown_vocabulary(tmp_path: Path) -> None:
    """The saved module stands in the file three times: itself, its copy in the wrapper, and the base's own."""
    base = language_models.llama_folder(tmp_path / "base")
    weight = load_file(base / "model.safetensors")["lm_head.weight"]
    saved = torch.randn_like(weight)
    stem = "base_model.model.lm_head"
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    tensors = {f"{stem}.weight": saved, f"{stem}.modules_to_save.weight": saved.clone(), f"{stem}.original_module.weight": weight}
    tensors |= {f"base_model.model.{Q}.lora_{half}.weight": torch.ones(shape) for half, shape in (("A", (4, 32)), ("B", (32, 4)))}
    save_file(tensors, adapter / "adapter_model.safetensors")
    (adapter / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 4, "modules_to_save": ["lm_head"]}))
    result = merge(base, [(adapter, 1.0)], tmp_path / "out")
    assert float((load_file(tmp_path / "out" / "model.safetensors")["lm_head.weight"] - saved).abs().max()) < 1e-6
    assert any("original_module" in warning for warning in result["warnings"])


@pytest.mark.parametrize("flag", [True, False])
def test_the_base_says_which_layer_is_a_conv1d(flag: bool, tmp_path: Path) -> None:
    """PEFT records fan_in_fan_out of the layer it visited last: of a square c_proj and an lm_head together it says either."""
    base = language_models.gpt2_folder(tmp_path / "base")
    name = "transformer.h.0.attn.c_proj"
    key = next(key for key in load_file(base / "model.safetensors") if key.endswith("h.0.attn.c_proj.weight"))
    before = load_file(base / "model.safetensors")[key].double()
    pair = hand.pair(before.shape, 4, 8.0)
    adapter = hand.peft(tmp_path / "adapter", {name: pair})
    config = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps({**config, "fan_in_fan_out": flag}))
    merge(base, [(adapter, 1.0)], tmp_path / "out")
    after = load_file(tmp_path / "out" / "model.safetensors")[key].double()
    assert float((after - before - pair.delta().t()).abs().max()) < 1e-5
    assert before.shape[0] == before.shape[1], "the test is about layers whose shape tells nothing"


@pytest.mark.parametrize("content", ["[]", "{bad", b"\xff\xfe"])
def test_a_config_that_is_no_object(content: str | bytes, tmp_path: Path, files: Any) -> None:
    base = language_models.llama_folder(tmp_path / "folder")
    (base / "config.json").write_bytes(content if isinstance(content, bytes) else content.encode())
    error = refused(base, [(files[2], 1.0)], tmp_path / "out")
    assert isinstance(error, MalformedError)
    assert "config.json" in error.message
    assert not (tmp_path / "out").exists()


def test_outputs_in_each_others_way(tmp_path: Path, files: Any) -> None:
    _, base, adapter = files
    folder = language_models.llama_folder(tmp_path / "folder")
    same = refused(base, [(adapter, 1.0)], tmp_path / "out.safetensors", report=tmp_path / "x", residual=tmp_path / "x")
    inside = refused(folder, [(adapter, 1.0)], folder / "merged")
    named = refused(base, [(adapter, 1.0)], tmp_path / "out.safetensors", residual=tmp_path / "rest.safetensors")
    assert [error.exit_code for error in (same, named)] == [2, 2]
    assert "inside the base" in " ".join([inside.message, *inside.details])
    assert not (tmp_path / "out.safetensors").exists()
    assert not (folder / "merged").exists()


def test_a_residual_nobody_can_name_leaves_no_output(tmp_path: Path, files: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def unable(*_: Any, **__: Any) -> None:
        raise UnsupportedError("no name for a site")

    monkeypatch.setattr("loratools.operations.merging.residual.write_plan", unable)
    base = hand.save(tmp_path / "half.safetensors", {key: value.to(torch.bfloat16) for key, value in files[0].items()})
    assert refused(base, [(files[2], 1.0)], tmp_path / "out.safetensors", residual=tmp_path / "rest").exit_code == 3
    assert not (tmp_path / "out.safetensors").exists()


def test_an_adapter_that_changes_nothing_is_told(tmp_path: Path, files: Any) -> None:
    _, base, adapter = files
    result = merge(base, [(adapter, 0.5), (adapter, -0.5)], tmp_path / "out.safetensors")
    assert any("change nothing" in warning for warning in result["warnings"])
    result = merge(base, [(adapter, 0.5)], tmp_path / "other.safetensors")
    assert not any("change nothing" in warning for warning in result["warnings"])


def test_blocks_are_all_counted(tmp_path: Path, files: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """delta_retained of a tensor of many blocks is that of the whole tensor."""
    base = hand.save(tmp_path / "half.safetensors", {key: value.to(torch.bfloat16) for key, value in files[0].items()})
    whole = merge(base, [(files[2], 0.01)], tmp_path / "whole.safetensors")
    monkeypatch.setattr(arithmetic, "BLOCK", 500)
    parts = merge(base, [(files[2], 0.01)], tmp_path / "parts.safetensors")
    assert (tmp_path / "whole.safetensors").read_bytes() == (tmp_path / "parts.safetensors").read_bytes()
    assert parts["delta_retained"] == pytest.approx(whole["delta_retained"], rel=1e-5)
    assert parts["relative_error"] == pytest.approx(whole["relative_error"], rel=1e-5)


def test_verify_finds_a_site_that_was_never_placed(tmp_path: Path, files: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    _, base, adapter = files
    real = placing._place

    def forgetful(term: Any, *rest: Any) -> None:
        if term.site.path != Q:
            real(term, *rest)

    monkeypatch.setattr(placing, "_place", forgetful)
    with pytest.raises(CheckFailed) as caught:
        merge(base, [(adapter, 1.0)], tmp_path / "out.safetensors", verify=True)
    assert Q in " ".join(caught.value.details)


@pytest.mark.parametrize("spoil", ["missing", "extra", "dtype"])
def test_verify_compares_names_and_dtypes(spoil: str, tmp_path: Path, files: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from loratools.operations.merging import verify

    def other(path: Path) -> Any:
        source = open_source(path)
        name = "model.norm.weight" if "model.norm.weight" in source.tensors else next(iter(source.tensors))
        if spoil == "missing":
            del source.tensors[name]
        elif spoil == "extra":
            source.tensors["more.weight"] = source.tensors[name]
        else:
            source.tensors[name] = source.tensors[name].reshape((source.tensors[name].numel, 1))
        return source

    monkeypatch.setattr(verify, "open_source", other)
    with pytest.raises(CheckFailed):
        merge(files[1], [(files[2], 1.0)], tmp_path / "out.safetensors", verify=True)
    assert not (tmp_path / "out.safetensors").exists()


def test_the_record_holds_the_options(tmp_path: Path, files: Any) -> None:
    _, base, adapter = files
    merge(base, [(adapter, 1.0)], tmp_path / "out.safetensors", dtype="BF16", rounding="stochastic", seed=3, exclude=[f"*{Q}"])
    (record,) = json.loads(open_source(tmp_path / "out.safetensors").metadata["loratools.merge"])
    assert record["options"] == {"dtype": "BF16", "rounding": "stochastic", "seed": 3, "exclude": [f"*{Q}"]}


def test_combine_writes_no_pickle(tmp_path: Path, files: Any) -> None:
    with pytest.raises(LoraToolsError) as caught:
        combine([(files[2], 1.0)], tmp_path / "out.ckpt", to="diffusers")
    assert caught.value.exit_code in (2, 3)
    assert not (tmp_path / "out.ckpt").exists()


def test_an_embedding_under_another_models_name(tmp_path: Path) -> None:
    """Bloom's word_embeddings, which its head shares: the head becomes a tensor of its own."""
    from transformers import BloomConfig, BloomForCausalLM

    torch.manual_seed(0)
    BloomForCausalLM(BloomConfig(vocab_size=100, hidden_size=32, n_layer=1, n_head=4)).save_pretrained(tmp_path / "base")
    key = "transformer.word_embeddings"
    before = load_file(tmp_path / "base" / "model.safetensors")[f"{key}.weight"]
    up, down = torch.randn(32, 4), torch.randn(4, 100)
    stem = f"base_model.model.{key}"
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    save_file({f"{stem}.lora_embedding_A": down, f"{stem}.lora_embedding_B": up}, adapter / "adapter_model.safetensors")
    (adapter / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 4, "lora_alpha": 4}))
    merge(tmp_path / "base", [(adapter, 1.0)], tmp_path / "out", verify=True)
    after = load_file(tmp_path / "out" / "model.safetensors")
    assert torch.equal(after["lm_head.weight"], before)
    assert float((after[f"{key}.weight"] - before - (up @ down).t()).abs().max()) < 1e-5
    assert json.loads((tmp_path / "out" / "config.json").read_text())["tie_word_embeddings"] is False
