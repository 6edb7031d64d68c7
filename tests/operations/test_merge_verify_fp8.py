"""Scaled fp8 under `merge --verify`: scales in bf16, and parts of a fused weight that begin within a block of the scale."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from loratools.errors import CheckFailed
from loratools.operations.merge import merge
from tests.operations import merge_by_hand as hand
from tests.operations import test_merge_numbers as numbers
from tests.operations import test_merge_scaled as scales
from tests.operations.merge_by_hand import BLOCK, QKV, UP, Q, Tensors
from tests.operations.test_merge_numbers import E4M3, WEIGHTS
from tests.operations.test_merge_verify import corrupted, flipped


def in_bf16(scale: torch.Tensor) -> torch.Tensor:
    """Up to a value of bf16, so that no code overflows."""
    return (scale * 1.008).bfloat16()


@pytest.mark.parametrize("rounding", ["nearest", "stochastic"])
@pytest.mark.parametrize("ratio", [0.05, 3.0], ids=["small", "large"])
@pytest.mark.parametrize("kind", scales.SCALES)
def test_a_scale_in_bf16_stays_in_bf16(kind: str, ratio: float, rounding: str, tmp_path: Path) -> None:
    """The codes are made for the scale as it is stored: half a step of fp8 each, not the 0.4 % that bf16 would add."""
    leaf, scale_of = scales.SCALES[kind]
    base = scales.scaled(leaf, lambda weight: in_bf16(scale_of(weight)))
    names = {key: f"{key.removesuffix('.weight')}.{leaf}" for key in WEIGHTS}
    values = {key: base[key].double() * scales.spread(base[scale], base[key].shape) for key, scale in names.items()}
    pairs = numbers.pairs_for(values, ratio)
    source, out = hand.save(tmp_path / "base.safetensors", base), tmp_path / "out.safetensors"
    result = merge(source, [(hand.peft(tmp_path / "adapter", pairs), 1.0)], out, rounding=rounding, verify=True)
    assert (result["verify"]["ok"], result["verify"]["sites"]) == (True, 2)
    after = load_file(out)
    for key, scale in names.items():
        assert (after[scale].dtype, after[scale].shape) == (torch.bfloat16, base[scale].shape)
        unit = scales.spread(after[scale], base[key].shape)
        wanted = values[key] + pairs[key.removesuffix(".weight")].delta()
        apart = (after[key].double() * unit - wanted).abs() / (hand.step(wanted / unit, E4M3) * unit)
        assert float(apart.max()) <= (0.51 if rounding == "nearest" else 1.001)
        grew = float(after[scale].double().mean() / base[scale].double().mean())
        assert grew > 2 if ratio > 1 else grew < 1.5


def test_a_wrong_scale_in_bf16(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One bit of its mantissa, 0.8 %."""
    base = scales.scaled("scale_weight", lambda weight: in_bf16(scales.per_tensor(weight)))
    adapter = hand.peft(tmp_path / "adapter", numbers.pairs_for(hand.language_model(176, torch.float32), 0.05))
    source = hand.save(tmp_path / "base.safetensors", base)
    corrupted(monkeypatch, f"{UP}.scale_weight", lambda data: bytearray([data[0] ^ 1]) + data[1:])
    with pytest.raises(CheckFailed) as caught:
        merge(source, [(adapter, 1.0)], tmp_path / "out.safetensors", verify=True)
    assert [line.split(" ")[0] for line in caught.value.details] == [f"{UP}.weight"]


# --- q, k and v of 96 rows in one weight, a value of the scale for 64x64

H, SQUARE = 96, 64


def fused() -> tuple[Tensors, torch.Tensor]:
    """(the base, the values of its fused weight in float64)"""
    base = hand.flux(torch.float32, H)
    weight = base[f"{QKV}.weight"].double()
    scale = torch.stack([torch.stack([block.abs().amax() / 448 for block in row.split(SQUARE, 1)]) for row in weight.split(SQUARE)]).float()
    base[f"{QKV}.weight"] = (weight / over(scale, weight.shape)).to(E4M3)
    base[f"{QKV}.weight_scale_inv"] = scale
    return base, base[f"{QKV}.weight"].double() * over(scale, weight.shape)


def over(scale: torch.Tensor, shape: torch.Size) -> torch.Tensor:
    return scale.double().repeat_interleave(SQUARE, 0)[: shape[0]].repeat_interleave(SQUARE, 1)[:, : shape[1]]


@pytest.mark.parametrize("parts", ["q", "k", "v", "qv", "qkv"])
def test_a_part_that_begins_within_a_block_of_the_scale(parts: str, tmp_path: Path) -> None:
    """Rows 96 to 192 of blocks of 64: what is read of a part starts at row 64."""
    base, values = fused()
    pairs = {f"{BLOCK}.to_{part}": hand.pair((H, H), 4, 4.0, seed).sized(0.05, values[:H]) for seed, part in enumerate(parts)}
    adapter = hand.diffusers(tmp_path / "adapter.safetensors", pairs)
    source, out = hand.save(tmp_path / "base.safetensors", base), tmp_path / "out.safetensors"
    residual = tmp_path / "residual.safetensors"
    result = merge(source, [(adapter, 1.0)], out, verify=True, residual=residual)
    assert (result["verify"]["ok"], result["verify"]["sites"]) == (True, len(parts))
    wanted = values.clone()
    for name, one in pairs.items():
        start = "qkv".index(name[-1]) * H
        wanted[start : start + H] += one.delta()
    after = load_file(out)
    unit = over(after[f"{QKV}.weight_scale_inv"], values.shape)
    apart = (after[f"{QKV}.weight"].double() * unit - wanted).abs() / (hand.step(wanted / unit, E4M3) * unit)
    assert float(apart.max()) <= 0.51
    assert result["residual"]["sites"] == len(parts)


@pytest.mark.parametrize("place", [0.1, 0.5, 0.9])
def test_a_wrong_code_in_any_part(place: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base, values = fused()
    adapter = hand.diffusers(tmp_path / "adapter.safetensors", {f"{BLOCK}.to_k": hand.pair((H, H), 4, 4.0).sized(0.05, values[:H])})
    source = hand.save(tmp_path / "base.safetensors", base)
    corrupted(monkeypatch, f"{QKV}.weight", flipped(7, place))
    with pytest.raises(CheckFailed) as caught:
        merge(source, [(adapter, 1.0)], tmp_path / "out.safetensors", verify=True)
    (line,) = caught.value.details
    where = {0.1: "rows 0 to 96,", 0.5: f"denoiser.{BLOCK}.to_k)", 0.9: "rows 192 to 288,"}[place]
    assert line.startswith(f"{QKV}.weight ({where}")


def test_a_site_with_codes_of_its_own_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base = scales.scaled(*scales.SCALES["blocks"])
    adapter = hand.peft(tmp_path / "adapter", numbers.pairs_for(hand.language_model(176, torch.float32), 0.05))
    source = hand.save(tmp_path / "base.safetensors", base)
    corrupted(monkeypatch, f"{Q}.weight", flipped(7, 0.3))
    with pytest.raises(CheckFailed) as caught:
        merge(source, [(adapter, 1.0)], tmp_path / "out.safetensors", verify=True)
    assert [line.split(":")[0] for line in caught.value.details] == [f"{Q}.weight (model.{Q})"]
