"""Bases of fp8 codes with a scale: W = codes · scale, one value for a tensor, a row, or a block; the merge makes new codes and scales.

mflux#440, ComfyUI#13637: a delta added to the codes is lost. Expected values are float64 by hand.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from loratools.errors import InputError, UnsupportedError
from loratools.operations.merge import merge
from tests.operations import merge_by_hand as hand
from tests.operations import test_merge_numbers as numbers
from tests.operations.merge_by_hand import UP, Q, Tensors
from tests.operations.test_merge_numbers import E4M3, WEIGHTS

Scale = Callable[[torch.Tensor], torch.Tensor]


def per_tensor(weight: torch.Tensor) -> torch.Tensor:
    return weight.abs().amax() / 448


def per_row(weight: torch.Tensor) -> torch.Tensor:
    return weight.abs().amax(1, keepdim=True) / 448


def in_blocks(weight: torch.Tensor) -> torch.Tensor:
    """32x64 blocks, the last of either axis cut."""
    rows = [part.split(64, 1) for part in weight.split(32, 0)]
    return torch.stack([torch.stack([block.abs().amax() for block in row]) for row in rows]) / 448


SCALES: dict[str, tuple[str, Scale]] = {
    "scale_weight": ("scale_weight", per_tensor),
    "per row": ("weight_scale", per_row),
    "blocks": ("weight_scale_inv", in_blocks),
}


def spread(scale: torch.Tensor, shape: torch.Size) -> torch.Tensor:
    if scale.dim() < 2 or scale.shape[1] == 1:
        return scale.double().expand(shape)
    return scale.double().repeat_interleave(32, 0)[: shape[0]].repeat_interleave(64, 1)[:, : shape[1]]


def scaled(leaf: str, scale_of: Scale, dtype: torch.dtype = E4M3) -> Tensors:
    """A language model whose matrices are codes with a scale; markers and activation scales beside them."""
    plain, found = hand.language_model(176, torch.float32), {"scaled_fp8": torch.empty(0, dtype=dtype)}
    for key, value in plain.items():
        if value.dim() < 2:
            found[key] = value.to(torch.bfloat16)
            continue
        scale = scale_of(value)
        found[key] = (value.double() / spread(scale, value.shape)).to(dtype)
        found[f"{key.removesuffix('.weight')}.{leaf}"] = scale
        found[f"{key.removesuffix('.weight')}.input_scale"] = torch.tensor(0.25)
    return found


@pytest.mark.parametrize("ratio", [0.05, 3.0], ids=["small", "large"])
@pytest.mark.parametrize("kind", SCALES)
def test_scaled_fp8(kind: str, ratio: float, tmp_path: Path) -> None:
    """mflux#440: codes times scale, plus Δ, with a new scale where the old one no longer serves; never Δ on the codes themselves."""
    leaf, scale_of = SCALES[kind]
    base = scaled(leaf, scale_of)
    values = {key: base[key].double() * spread(base[f"{key.removesuffix('.weight')}.{leaf}"], base[key].shape) for key in WEIGHTS}
    pairs = numbers.pairs_for(values, ratio)
    adapter = hand.peft(tmp_path / "adapter", pairs)
    source, out = hand.save(tmp_path / "base.safetensors", base), tmp_path / "out.safetensors"
    result = merge(source, [(adapter, 1.0)], out)
    scales = [f"{name}.{leaf}" for name in (Q, UP)]
    after = hand.assert_untouched(base, out, [*WEIGHTS, *scales])
    parts = []
    for key, scale in zip(WEIGHTS, scales, strict=True):
        unit = spread(after[scale], base[key].shape)
        delta = pairs[key.removesuffix(".weight")].delta()
        wanted, found = values[key] + delta, after[key].double() * unit
        apart = (found - wanted).abs() / (hand.step(wanted / unit, E4M3) * unit)
        assert float(apart.max()) <= 0.51, "more than half a step of fp8"
        assert float(after[key].double().abs().amax()) > 224, "the codes do not use their range"
        parts.append(hand.kept(values[key], found, delta))
        grew = float(after[scale].double().mean() / base[scale].double().mean())
        assert grew > 2 if ratio > 1 else grew < 1.5
    assert result["delta_retained"] == pytest.approx(hand.total(parts).retained, rel=0.01)
    assert result["relative_error"] == pytest.approx(hand.total(parts).relative_error, rel=0.01)


def test_kinds_that_multiply_the_weight_see_the_values_and_not_the_codes(tmp_path: Path) -> None:
    """IA3 and in-axis DoRA on scaled fp8: what they multiply is codes times scale."""
    values = hand.flux()
    names = {hand.QKV: "ia3", hand.LINEAR1: "dora", "double_blocks.0.img_attn.proj": "dora-out"}
    base, wanted, modules = dict(values), {}, {}
    for name, kind in names.items():
        key = f"{name}.weight"
        scale = per_tensor(values[key])
        base[key] = (values[key].double() / scale.double()).to(E4M3)
        base[f"{name}.scale_weight"] = scale
        old = base[key].double() * scale.double()
        modules[name], wanted[name] = multiplying(kind, old)
    adapter = hand.lycoris(tmp_path / "adapter.safetensors", modules)
    merge(hand.save(tmp_path / "base.safetensors", base), [(adapter, 1.0)], tmp_path / "out.safetensors", arch="flux", verify=True)
    after = load_file(tmp_path / "out.safetensors")
    for name, value in wanted.items():
        scale = after[f"{name}.scale_weight"].double()
        apart = (after[f"{name}.weight"].double() * scale - value).abs() / (hand.step(value / scale, E4M3) * scale)
        assert float(apart.max()) <= 0.51, name


def multiplying(kind: str, old: torch.Tensor) -> tuple[Tensors, torch.Tensor]:
    """The leaves of a module that multiplies its weight, and the weight it makes."""
    rows, columns = old.shape
    if kind == "ia3":
        vector = hand.noise(rows, seed=5) * 0.3
        return {"weight": vector, "on_input": torch.tensor(False)}, old * (1 + vector.double()[:, None])
    one = hand.pair((rows, columns), 2, 2.0, 6).sized(0.2, old)
    axis = 1 if kind == "dora-out" else 0
    magnitude = (1 + hand.noise(columns if axis == 0 else rows, seed=7).abs()).reshape((1, -1) if axis == 0 else (-1, 1))
    whole = old + one.delta()
    leaves = {"lora_up.weight": one.up, "lora_down.weight": one.down, "alpha": torch.tensor(2.0), "dora_scale": magnitude}
    return leaves, magnitude.double() * whole / whole.square().sum(axis, keepdim=True).sqrt()


def test_scaled_fp8_keeps_its_dtype(tmp_path: Path) -> None:
    base = scaled("scale_weight", per_tensor)
    plain = hand.language_model(176, torch.float32)
    error = numbers.failing(tmp_path, base, [(hand.peft(tmp_path / "adapter", numbers.pairs_for(plain, 0.01)), 1.0)], dtype="BF16")
    assert isinstance(error, UnsupportedError | InputError)
    assert error.exit_code == 3
    assert "--dtype" in error.message
