"""PEFT's config as it comes from strangers: patterns that would never end, numbers that are none, types of other methods."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from loratools.errors import LoraToolsError, UsageError
from loratools.mapping.peft_config import sound
from loratools.operations.convert import convert
from loratools.operations.inspect import inspect


def folder(path: Path, **config: Any) -> Path:
    """A LoRA on one projection of a language model, rank 2."""
    path.mkdir()
    stem = "base_model.model.model.layers.0.self_attn.q_proj"
    save_file({f"{stem}.lora_A.weight": torch.ones(2, 8), f"{stem}.lora_B.weight": torch.ones(8, 2)}, path / "adapter_model.safetensors")
    plain = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["q_proj"]}
    (path / "adapter_config.json").write_text(json.dumps({**plain, **config}))
    return path


ENDLESS = ["([a-z_.0-9]+)+!", "(a+)+$", "((([a-z_.0-9]+)+)+)+!", "(a|a)*x", "(?:x{2,})*y", "a" * 2000]


@pytest.mark.parametrize("pattern", ENDLESS)
def test_a_pattern_that_would_never_end_is_refused_unmatched(tmp_path: Path, pattern: str) -> None:
    source = folder(tmp_path / "a", alpha_pattern={pattern: 2})
    assert "bad-config" in {problem["code"] for problem in inspect(source)["problems"]}
    with pytest.raises(LoraToolsError) as refused:
        convert(source, tmp_path / "b", "peft", dtype="fp16")
    assert refused.value.exit_code == 3
    assert not (tmp_path / "b").exists()


USUAL = [r"layers\.\d+\..*q_proj", "(layers|h)\\.[0-9]+", "^down\\.0\\.x", r".*\.(to_q|to_k)", r"(text_model\.)?encoder\.x", "q_proj"]


@pytest.mark.parametrize("pattern", USUAL)
def test_patterns_people_write_are_kept(pattern: str) -> None:
    assert sound({"rank_pattern": {pattern: 4}}) == ({"rank_pattern": {pattern: 4}}, [])


@pytest.mark.parametrize(
    "config",
    [{"lora_alpha": 10**400}, {"lora_alpha": True}, {"r": 0}, {"r": 2.5}, {"use_rslora": "false"}, {"lora_bias": 1}],
    ids=str,
)
def test_values_that_cannot_be_are_told(tmp_path: Path, config: dict[str, Any]) -> None:
    found = [problem for problem in inspect(folder(tmp_path / "a", **config))["problems"] if problem["severity"] == "error"]
    assert next(iter(config)) in found[0]["message"]


@pytest.mark.parametrize("kind", ["VERA", "PROMPT_TUNING", 5])
def test_other_methods_are_named(tmp_path: Path, kind: object) -> None:
    found = inspect(folder(tmp_path / "a", peft_type=kind), check=True)["problems"]
    assert any(str(kind) in problem["message"] for problem in found if problem["severity"] == "error")


def test_an_adapter_no_table_names_fails_its_check(tmp_path: Path) -> None:
    save_file({"lora_unet_x1.lora_down.weight": torch.ones(1, 4)}, tmp_path / "a.safetensors")
    codes = {problem["code"] for problem in inspect(tmp_path / "a.safetensors", check=True)["problems"] if problem["severity"] == "error"}
    assert {"unknown-architecture", "orphan"} <= codes


@pytest.mark.parametrize("alpha", [0.0, 1e39, 1e-39, float("nan"), float("inf")])
def test_an_alpha_no_file_can_hold_is_wrong_usage(tmp_path: Path, alpha: float) -> None:
    with pytest.raises(UsageError, match="--alpha"):
        convert(folder(tmp_path / "a"), tmp_path / "b", "peft", alpha=alpha)


@pytest.mark.parametrize("digits", [12, 5000])
def test_block_numbers_beyond_counting_are_unknown_names(tmp_path: Path, digits: int) -> None:
    stem = f"lora_unet_down_blocks_{'9' * digits}_attentions_0_proj_in"
    known = "lora_unet_down_blocks_0_attentions_0_proj_in"
    tensors = {f"{name}.lora_{half}.weight": torch.ones(2, 2) for name in (stem, known) for half in ("up", "down")}
    save_file(tensors, tmp_path / "a.safetensors")
    assert len(inspect(tmp_path / "a.safetensors", arch="sd2")["unknown_keys"]) == 2


@pytest.mark.parametrize("kind", ["oft", "ia3"])
def test_rotations_and_scalings_come_back_to_peft(tmp_path: Path, kind: str) -> None:
    """PEFT writes r = 0 beside oft_block_size, and no alpha for either; what we write it loads without a word."""
    peft = pytest.importorskip("peft")
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "vocab_size": 32}
    base = transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes))
    targets = ["q_proj", "down_proj"]
    config = {
        "oft": lambda: peft.OFTConfig(oft_block_size=4, r=0, target_modules=targets, init_weights=False),
        "ia3": lambda: peft.IA3Config(target_modules=targets, feedforward_modules=["down_proj"]),
    }[kind]()
    trained = peft.get_peft_model(base, config)
    for name, value in trained.named_parameters():
        if "ia3_l" in name:
            torch.nn.init.normal_(value, 1, 0.2)
    words = torch.arange(8)[None]
    wanted = trained(words).logits.detach()
    trained.save_pretrained(tmp_path / "a")
    plain = trained.unload()
    assert float((plain(words).logits - wanted).abs().max()) > 1e-5
    assert convert(tmp_path / "a", tmp_path / "b", "peft", dtype="fp32")["exact"]
    again = peft.PeftModel.from_pretrained(plain, tmp_path / "b")
    assert torch.equal(again(words).logits, wanted)
    shutil.rmtree(tmp_path / "a")
