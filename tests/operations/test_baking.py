"""`--base MODEL --allow-lossy`: kinds that multiply the base weight become full deltas on it, or LoRA with the error printed."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from loratools.errors import UnknownError, UnsupportedError
from loratools.operations.convert import convert

Tensors = dict[str, torch.Tensor]
OUT, IN, RANK = 24, 16, 4
PATH = "down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_k"  # out x ctx: not square, the axes differ
STEM = "lora_unet_" + PATH.replace(".", "_")
ORIG = "input_blocks.1.1.transformer_blocks.0.attn2.to_k"


@pytest.fixture
def rand() -> Callable[..., torch.Tensor]:
    generator = torch.Generator().manual_seed(11)
    return lambda *shape: torch.randn(*shape, generator=generator)


def dora(rand: Callable[..., torch.Tensor], axis: int) -> Tensors:
    scale = 1 + 0.1 * rand(OUT, 1) if axis == 1 else 1 + 0.1 * rand(1, IN)
    return {
        f"{STEM}.lora_up.weight": rand(OUT, RANK),
        f"{STEM}.lora_down.weight": rand(RANK, IN),
        f"{STEM}.alpha": torch.tensor(2.0),
        f"{STEM}.dora_scale": scale,
    }


def dora_delta(tensors: Tensors, weight: torch.Tensor, axis: int) -> torch.Tensor:
    """m (W + D) / |W + D| - W in float64, D = 2/4 · up · down, the norm over `axis`."""
    t = {key.removeprefix(STEM + "."): value.double() for key, value in tensors.items()}
    moved = weight.double() + t["alpha"] / RANK * t["lora_up.weight"] @ t["lora_down.weight"]
    return t["dora_scale"] * moved / moved.norm(dim=axis, keepdim=True) - weight.double()


BASES = {
    "ldm": (f"model.diffusion_model.{ORIG}.weight", "base.safetensors"),
    "bare": (f"{ORIG}.weight", "base.safetensors"),
    "diffusers": (f"{PATH}.weight", "unet.safetensors"),
}


def base(folder: Path, layout: str, weight: torch.Tensor) -> Path:
    key, name = BASES[layout]
    save_file({key: weight, key.replace("attn2", "attn1"): -weight}, folder / name)
    return folder / name


@pytest.mark.parametrize("layout", BASES)
@pytest.mark.parametrize("axis", [1, 0], ids=["out", "in"])
def test_dora_becomes_the_full_delta_of_its_formula(tmp_path: Path, rand: Callable[..., torch.Tensor], layout: str, axis: int) -> None:
    weight, tensors = rand(OUT, IN), dora(rand, axis)
    save_file(tensors, tmp_path / "a.safetensors")
    result = convert(
        tmp_path / "a.safetensors",
        tmp_path / "b.safetensors",
        "diffusers-dot",
        arch="sd1",
        base=base(tmp_path, layout, weight),
        allow_lossy=True,
    )
    written = load_file(tmp_path / "b.safetensors")
    found = written[f"unet.{PATH}.lora.up.weight"].double() @ written[f"unet.{PATH}.lora.down.weight"].double()
    wanted = dora_delta(tensors, weight, axis)
    (row,) = result["approximated"]
    error = float((found - wanted).norm() / wanted.norm())
    assert row["relative_error"] == pytest.approx(error, rel=1e-4)
    values = torch.linalg.svdvals(wanted)
    assert error == pytest.approx(float(values[RANK:].norm() / values.norm()), rel=1e-4)  # no rank-4 matrix is nearer (Eckart, Young)
    assert not result["exact"]


def test_ia3_becomes_a_full_delta_where_the_dialect_holds_one(tmp_path: Path, rand: Callable[..., torch.Tensor]) -> None:
    weight, scale = rand(OUT, IN), rand(OUT)
    save_file({f"{STEM}.weight": scale, f"{STEM}.on_input": torch.tensor(False)}, tmp_path / "a.safetensors")
    result = convert(
        tmp_path / "a.safetensors", tmp_path / "b.safetensors", "comfy", arch="sd1", base=base(tmp_path, "ldm", weight), allow_lossy=True
    )
    (found,) = load_file(tmp_path / "b.safetensors").values()
    assert torch.allclose(found.double(), weight.double() * scale.double()[:, None], rtol=1e-6, atol=1e-7)
    assert [row["site"] for row in result["approximated"]] == [f"denoiser.{PATH}"]


def test_a_fused_dora_is_baked_on_the_fused_weight(tmp_path: Path, rand: Callable[..., torch.Tensor]) -> None:
    """The in axis couples q, k and v: only with the whole weight can the delta be cut into parts."""
    h = 8
    stem, name = "lora_unet_double_blocks_0_img_attn_qkv", "double_blocks.0.img_attn.qkv.weight"
    weight = rand(3 * h, h)
    tensors = {
        f"{stem}.lora_up.weight": rand(3 * h, 2),
        f"{stem}.lora_down.weight": rand(2, h),
        f"{stem}.dora_scale": 1 + 0.1 * rand(1, h),
    }
    save_file(tensors, tmp_path / "a.safetensors")
    save_file({name: weight}, tmp_path / "base.safetensors")
    with pytest.raises(UnsupportedError) as refused:
        convert(tmp_path / "a.safetensors", tmp_path / "b.safetensors", "kohya-diffusers", arch="flux")
    assert "--base" in (refused.value.fix or "")
    convert(
        tmp_path / "a.safetensors",
        tmp_path / "b.safetensors",
        "kohya-diffusers",
        arch="flux",
        base=tmp_path / "base.safetensors",
        allow_lossy=True,
    )
    found = load_file(tmp_path / "b.safetensors")
    moved = weight.double() + tensors[f"{stem}.lora_up.weight"].double() @ tensors[f"{stem}.lora_down.weight"].double()
    wanted = tensors[f"{stem}.dora_scale"].double() * moved / moved.norm(dim=0, keepdim=True) - weight.double()
    parts = [found[f"lora_unet_transformer_blocks_0_attn_to_{part}.diff"].double() for part in "qkv"]
    assert torch.allclose(torch.cat(parts), wanted, rtol=1e-5, atol=1e-6)


def test_without_leave_nothing_is_baked(tmp_path: Path, rand: Callable[..., torch.Tensor]) -> None:
    save_file(dora(rand, 1), tmp_path / "a.safetensors")
    path = base(tmp_path, "ldm", rand(OUT, IN))
    with pytest.raises(UnsupportedError, match="cannot be written as diffusers-dot"):
        convert(tmp_path / "a.safetensors", tmp_path / "b.safetensors", "diffusers-dot", arch="sd1", base=path)
    assert not (tmp_path / "b.safetensors").exists()


def test_a_base_without_the_weight_is_refused_by_name(tmp_path: Path, rand: Callable[..., torch.Tensor]) -> None:
    save_file(dora(rand, 1), tmp_path / "a.safetensors")
    save_file({"model.diffusion_model.out.2.weight": rand(4, 4, 3, 3)}, tmp_path / "base.safetensors")
    with pytest.raises(UnknownError, match="no weight for denoiser"):
        convert(
            tmp_path / "a.safetensors",
            tmp_path / "b.safetensors",
            "diffusers-dot",
            arch="sd1",
            base=tmp_path / "base.safetensors",
            allow_lossy=True,
        )
    assert not (tmp_path / "b.safetensors").exists()
