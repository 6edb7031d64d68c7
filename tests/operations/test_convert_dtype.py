"""What a dtype costs: reported as `compare` finds it, with the scale folded before the one rounding."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from loratools.errors import UsageError
from loratools.operations.compare import compare
from loratools.operations.convert import convert

STEM = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn2_to_"


def adapter(path: Path, dtype: torch.dtype, *, alpha: float, rank: int) -> Path:
    """k and v of one SD1 cross-attention, published widths."""
    generator = torch.Generator().manual_seed(rank)
    tensors: dict[str, torch.Tensor] = {}
    for part in ("k", "v"):
        tensors[f"{STEM}{part}.lora_down.weight"] = (torch.randn(rank, 768, generator=generator) * 0.1).to(dtype)
        tensors[f"{STEM}{part}.lora_up.weight"] = (torch.randn(320, rank, generator=generator) * 0.1).to(dtype)
        tensors[f"{STEM}{part}.alpha"] = torch.tensor(alpha)
    save_file(tensors, path)
    return path


@pytest.mark.parametrize(("dialect", "dtype"), [("comfy", "bf16"), ("diffusers", "bf16"), ("kohya", "fp16"), ("diffusers-dot", "fp16")])
def test_a_narrower_dtype_is_not_exact(tmp_path: Path, dialect: str, dtype: str) -> None:
    source = adapter(tmp_path / "a.safetensors", torch.float32, alpha=4, rank=8)
    out = tmp_path / "b.safetensors"
    result = convert(source, out, dialect, dtype=dtype)
    found = compare(source, out)
    assert not result["exact"]
    assert len(result["approximated"]) == 2
    assert 1e-5 < result["max_relative_error"] == pytest.approx(found["max_relative_error"], rel=1e-6)


def test_a_wider_dtype_is_exact_and_the_scale_is_folded_in_it(tmp_path: Path) -> None:
    """0.3 folded in fp16 moves ΔW by 2e-4; folded in the fp32 that was asked for, by 3e-8."""
    source = adapter(tmp_path / "a.safetensors", torch.float16, alpha=3, rank=10)
    wide = convert(source, tmp_path / "wide.safetensors", "diffusers", dtype="fp32")
    assert wide["exact"]
    assert compare(source, tmp_path / "wide.safetensors")["max_relative_error"] < 1e-7
    narrow = convert(source, tmp_path / "narrow.safetensors", "diffusers")
    assert not narrow["exact"]
    assert 1e-5 < narrow["max_relative_error"] < 1e-3


def test_the_scale_is_folded_before_the_rounding(tmp_path: Path) -> None:
    """Each up factor is 0.3 times the source's, rounded once from float32: not the product of a rounded factor."""
    source = adapter(tmp_path / "a.safetensors", torch.float32, alpha=3, rank=10)
    convert(source, tmp_path / "b.safetensors", "diffusers", dtype="bf16")
    before, after = load_file(source), load_file(tmp_path / "b.safetensors")
    name = "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_k"
    up, down = after[f"{name}.lora_B.weight"].double(), after[f"{name}.lora_A.weight"].double()
    shift = 2.0 ** torch.round(torch.log2(down.norm() / before[f"{STEM}k.lora_down.weight"].double().norm()))
    wanted = (before[f"{STEM}k.lora_up.weight"].double() * 0.3 / shift).float().bfloat16().double()
    assert (up != wanted).float().mean() < 0.005  # ties that float32's own rounding decides


def test_a_folder_is_not_named_like_a_file(tmp_path: Path) -> None:
    source = adapter(tmp_path / "a.safetensors", torch.float32, alpha=4, rank=8)
    with pytest.raises(UsageError, match="is a folder"):
        convert(source, tmp_path / "b.safetensors", "peft")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.safetensors"]
