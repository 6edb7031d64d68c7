"""Every record of alpha arrives in every dialect: as a tensor, in the header, in adapter_config, or folded into the factors."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from loratools.mapping.dialects import DIALECTS
from loratools.mapping.read import read
from loratools.operations.convert import convert
from tests.mapping.builders import Tensors, delta, lora, refusal, rel, save, told


def header(path: Path) -> dict[str, str]:
    with safe_open(path, "pt") as file:
        return dict(file.metadata() or {})


# ------------------------------------------------------------------------------------------------------------- C2, C14: alpha

STEM = "up_blocks.3.attentions.0.transformer_blocks.0.attn1.to_{}"


def sd1(scheme: str, prefix: str, alphas: Mapping[str, float | None], ranks: Mapping[str, int]) -> Tensors:
    """q, k, v and the 1x1 projection that makes it SD1."""
    flat = prefix == "lora_unet_"
    found = lora(_stem(prefix, "up_blocks.3.attentions.0.proj_in", flat), (16, 16, 1, 1), alpha=alphas["q"], rank=ranks["q"], scheme=scheme)
    for name in "qkv":
        found |= lora(_stem(prefix, STEM.format(name), flat), (16, 16), rank=ranks[name], alpha=alphas[name], scheme=scheme)
    return found


def _stem(prefix: str, name: str, flat: bool) -> str:
    return prefix + (name.replace(".", "_") if flat else name)


UNIFORM, MIXED = dict.fromkeys("qkv", 4), {"q": 4, "k": 8, "v": 16}


@pytest.mark.parametrize("dialect", ["kohya", "diffusers", "peft", "comfy", "diffusers-dot", "onetrainer", "omi", "lycoris"])
@pytest.mark.parametrize("ranks", [UNIFORM, MIXED], ids=["one rank", "mixed ranks"])
@pytest.mark.parametrize("origin", ["tensor", "header", "config", "rslora", "none"])
def test_every_alpha_arrives(origin: str, ranks: dict[str, int], dialect: str, tmp_path: Path) -> None:
    """alpha from a tensor, the header, adapter_config (rsLoRA too) or nowhere: the delta is the same in every dialect (C2)."""
    path, expected = _with_alpha(origin, ranks, tmp_path)
    target = tmp_path / ("b.peft" if DIALECTS[dialect].folder else "b.safetensors")
    convert(path, target, dialect, arch="sd1")
    adapter = read(target, arch="sd1")
    for name in "qkv":
        (site,) = [site for site in adapter.modules if site.path == STEM.format(name)]
        assert rel(adapter.delta(site), expected[name]) <= 1e-6
    if dialect in ("diffusers", "diffusers-dot") and (origin, dialect) != ("header", "diffusers"):  # else it is a copy
        tensors = load_file(target)
        for name in "qkv":
            assert rel(delta(tensors, "unet." + STEM.format(name)), expected[name]) <= 1e-6


def _with_alpha(origin: str, ranks: dict[str, int], tmp_path: Path) -> tuple[Path, dict[str, torch.Tensor]]:
    alpha = {"q": 2.0, "k": 12.0, "v": 5.0}
    none: dict[str, float | None] = dict.fromkeys("qkv")
    scales = {name: alpha[name] / ranks[name] for name in "qkv"}
    if origin == "tensor":
        tensors, prefix = sd1("kohya", "lora_unet_", alpha, ranks), "lora_unet_"
        path = save(tmp_path / "a.safetensors", tensors)
    elif origin in ("header", "none"):
        prefix = "unet."
        tensors = sd1("peft", prefix, none, ranks)
        config = {
            "r": ranks["q"],
            "lora_alpha": 2,
            "alpha_pattern": {"to_k": 12, "to_v": 5},
            "rank_pattern": {f"to_{n}": ranks[n] for n in "kv"},
        }
        written = {"lora_adapter_metadata": json.dumps({f"unet.{key}": value for key, value in config.items()})}
        path = save(tmp_path / "a.safetensors", tensors, written if origin == "header" else None)
        scales = scales if origin == "header" else dict.fromkeys("qkv", 1.0)
    else:
        prefix = "base_model.model."
        tensors = sd1("peft", prefix, none, ranks)
        path = tmp_path / "a"
        path.mkdir()
        save(path / "adapter_model.safetensors", tensors)
        config = {"peft_type": "LORA", "r": ranks["q"], "lora_alpha": 2, "use_rslora": origin == "rslora"}
        config |= {"alpha_pattern": {"to_k": 12, "to_v": 5}, "rank_pattern": {f"to_{n}": ranks[n] for n in "kv"}}
        (path / "adapter_config.json").write_text(json.dumps(config))
        if origin == "rslora":
            scales = {name: alpha[name] / ranks[name] ** 0.5 for name in "qkv"}
    bare = {key: tensor for key, tensor in tensors.items() if not key.endswith(".alpha")}
    return path, {name: scales[name] * delta(bare, _stem(prefix, STEM.format(name), prefix == "lora_unet_")) for name in "qkv"}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_power_of_two_is_folded_bit_for_bit(dtype: torch.dtype, tmp_path: Path) -> None:
    """8/16 in bf16 moves exponents alone, and the way back finds every bit (C14)."""
    tensors = {
        key: (tensor + tensor.sign() / 8).to(dtype) if tensor.dim() else tensor.to(dtype)  # far from fp16's subnormal numbers
        for name in ("proj_in", "transformer_blocks_0_attn1_to_q")
        for key, tensor in lora(
            f"lora_unet_up_blocks_3_attentions_0_{name}", (16, 16, 1, 1) if name == "proj_in" else (16, 16), rank=16, alpha=8.0
        ).items()
    }
    path = save(tmp_path / "a.safetensors", tensors)
    result = convert(path, tmp_path / "b.safetensors", "diffusers")
    assert (result["exact"], result["max_relative_error"]) == (True, 0)
    stem = "lora_unet_up_blocks_3_attentions_0_transformer_blocks_0_attn1_to_q"
    there = load_file(tmp_path / "b.safetensors")
    assert not any(key.endswith(".alpha") for key in there)
    assert torch.equal(delta(there, "unet.up_blocks.3.attentions.0.transformer_blocks.0.attn1.to_q"), delta(tensors, stem))
    config = json.loads(header(tmp_path / "b.safetensors")["lora_adapter_metadata"])
    assert (config["unet.r"], config["unet.lora_alpha"]) == (16, 16)
    convert(tmp_path / "b.safetensors", tmp_path / "c.safetensors", "kohya")
    back = load_file(tmp_path / "c.safetensors")
    factors = [key for key in tensors if not key.endswith(".alpha")]
    assert all(torch.equal(back[key], tensors[key]) for key in factors)
    assert all(float(back[key]) == 8.0 for key in tensors if key.endswith(".alpha"))


def test_small_fp16_values_come_back_bit_for_bit(tmp_path: Path) -> None:
    """Halving an up factor of 1e-4 would lose bits, so down is halved; the way back doubles up instead."""
    stem = "lora_unet_up_blocks_3_attentions_0_proj_in"
    tensors = lora(stem, (16, 16, 1, 1), rank=16, alpha=8.0)
    tensors = {
        key: tensor if key.endswith("alpha") else (tensor * (1e-3 if "lora_up" in key else 1)).half() for key, tensor in tensors.items()
    }
    convert(save(tmp_path / "a.safetensors", tensors), tmp_path / "b.safetensors", "diffusers")
    convert(tmp_path / "b.safetensors", tmp_path / "c.safetensors", "kohya")
    back = load_file(tmp_path / "c.safetensors")
    assert rel(delta(back, stem), delta(tensors, stem)) == 0
    assert all(torch.equal(back[key], tensors[key]) for key in tensors)


def test_an_awkward_scale_in_bf16_is_reported(tmp_path: Path) -> None:
    """10/16 costs what one rounding of one bf16 factor costs: at most 2^-8, and the report says how much."""
    stem = "lora_unet_up_blocks_3_attentions_0_proj_in"
    tensors = {key: tensor.bfloat16() for key, tensor in lora(stem, (16, 16, 1, 1), rank=16, alpha=10.0).items()}
    result = convert(save(tmp_path / "a.safetensors", tensors), tmp_path / "b.safetensors", "diffusers")
    expected = delta(tensors, stem)
    error = rel(delta(load_file(tmp_path / "b.safetensors"), "unet.up_blocks.3.attentions.0.proj_in"), expected)
    assert 0 < error < 2**-8
    assert result["max_relative_error"] == pytest.approx(error, rel=1e-6)
    assert result["exact"] is False
    assert [row["site"] for row in result["approximated"]] == ["denoiser.up_blocks.3.attentions.0.proj_in"]


def test_a_small_scale_does_not_underflow(tmp_path: Path) -> None:
    """1/64 into one fp16 factor of 1e-5 would zero entries; spread over both it costs next to nothing."""
    stem = "lora_unet_up_blocks_3_attentions_0_proj_in"
    tensors = lora(stem, (16, 16, 1, 1), rank=64, alpha=1.0)
    tensors = {
        key: tensor if key.endswith("alpha") else (tensor * (1e-4 if "lora_up" in key else 1)).half() for key, tensor in tensors.items()
    }
    convert(save(tmp_path / "a.safetensors", tensors), tmp_path / "b.safetensors", "diffusers")
    found = delta(load_file(tmp_path / "b.safetensors"), "unet.up_blocks.3.attentions.0.proj_in")
    assert rel(found, delta(tensors, stem)) < 2e-3


def test_keep_alpha_leaves_the_factors_alone(tmp_path: Path) -> None:
    """--keep-alpha: the header carries it, the factors are the input's bits."""
    stem = "lora_unet_up_blocks_3_attentions_0_proj_in"
    tensors = lora(stem, (16, 16, 1, 1), rank=4, alpha=2.8)
    convert(save(tmp_path / "a.safetensors", tensors), tmp_path / "b.safetensors", "diffusers", keep_alpha=True)
    there = load_file(tmp_path / "b.safetensors")
    assert torch.equal(there["unet.up_blocks.3.attentions.0.proj_in.lora_B.weight"], tensors[f"{stem}.lora_up.weight"])
    config = json.loads(header(tmp_path / "b.safetensors")["lora_adapter_metadata"])
    assert config["unet.lora_alpha"] == pytest.approx(2.8)
    (site,) = read(tmp_path / "b.safetensors").modules
    assert rel(read(tmp_path / "b.safetensors").delta(site), delta(tensors, stem)) <= 1e-7


FORGED = {
    "loratools.alpha": ["{", "[]", "7", '{"*": "x"}', '{"*": [8]}', '{"*": [8, "x"]}', '{"*": [8, 0, "F99"]}', '{"*": NaN}', '{"*": 0}'],
    "loratools.spelling": ["{", '"x"', '{"kohya": 3}', '{"kohya": {"denoiser": ["a"]}}', '{"kohya": {"denoiser": 1}}'],
    "loratools.flat": ["[" * 9000, '{"kohya": {"denoiser.conv_in": "up"}}'],
}


@pytest.mark.parametrize(("entry", "text"), [(entry, text) for entry, texts in FORGED.items() for text in texts])
def test_a_forged_memory_is_refused_by_name(tmp_path: Path, entry: str, text: str) -> None:
    source = save(
        tmp_path / "a.safetensors", lora("unet.up_blocks.3.attentions.0.proj_in", (16, 16, 1, 1), scheme="peft", alpha=None), {entry: text}
    )
    error = refusal(convert, source, tmp_path / "b.safetensors", "kohya", arch="sd1")
    assert entry in told(error)
    assert not (tmp_path / "b.safetensors").exists()
