"""What is written and what the report says about it: 16 bits and fp8, with and without scales, against float64 by hand."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

pytest.importorskip("diffusers")

from fixtures import checkpoints, layouts
from loratools.operations.merge import merge
from tests.parity import merging
from tests.parity.original import stacked

pytestmark = [pytest.mark.parity, pytest.mark.filterwarnings("ignore")]

MANTISSA = {"float8_e4m3fn": 3, "float8_e5m2": 2}  # bits


def flux_adapter(path: Path, size: float = 1.0) -> tuple[Path, dict[str, torch.Tensor]]:
    """An adapter on every layer of Flux' transformer, and ΔW by original weight key."""
    factors = merging.factors_of("flux", ranks=merging.RANKS, alphas=merging.ALPHAS)["transformer"]
    factors = {name: replace(part, up=part.up * size) for name, part in factors.items()}
    deltas = {name: part.delta() for name, part in factors.items()}
    adapter = merging.save_adapter(path, "flux", "diffusers", {"transformer": factors})
    return adapter, {f"{name}.weight": delta for name, delta in stacked(layouts.modules("flux", deltas), deltas).items()}


def retained(before: dict[str, torch.Tensor], after: dict[str, torch.Tensor], deltas: dict[str, torch.Tensor]) -> float:
    """⟨written − base, Δ⟩ / ⟨Δ, Δ⟩ over all changed tensors."""
    dot = sum(
        float(((after[key].double() - before[key].double()) * delta.reshape(before[key].shape)).sum()) for key, delta in deltas.items()
    )
    return dot / sum(float(delta.square().sum()) for delta in deltas.values())


@pytest.mark.parametrize("size", [1.0, 0.1, 0.02])
@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float8_e4m3fn", "float8_e5m2"])
def test_delta_retained_is_what_it_says(dtype: str, size: float, tmp_path: Path) -> None:
    """Rounding to few bits keeps little of a small delta; the report agrees with a float64 calculation to 1 % of the delta."""
    base = (checkpoints.flux_fp8 if "float8" in dtype else checkpoints.flux_bare)(tmp_path / "flux.safetensors", dtype)
    adapter, deltas = flux_adapter(tmp_path / "adapter.safetensors", size)
    result = merge(base, [(adapter, 1.0)], tmp_path / "out.safetensors")
    before, after = load_file(base), load_file(tmp_path / "out.safetensors")
    assert {key: value.dtype for key, value in after.items()} == {key: value.dtype for key, value in before.items()}
    assert result["delta_retained"] == pytest.approx(retained(before, after, deltas), abs=0.01)
    assert result["changed"] == len(deltas)


@pytest.mark.parametrize("dtype", ["float8_e4m3fn", "float8_e5m2"])
def test_plain_fp8_is_rounded_to_the_nearest_code(dtype: str, tmp_path: Path) -> None:
    base = checkpoints.flux_fp8(tmp_path / "flux.safetensors", dtype)
    adapter, deltas = flux_adapter(tmp_path / "adapter.safetensors")
    merge(base, [(adapter, 1.0)], tmp_path / "out.safetensors")
    before, after = load_file(base), load_file(tmp_path / "out.safetensors")
    for key, delta in deltas.items():
        within_half_a_step(after[key].double(), before[key].double() + delta, 1.0, dtype)


@pytest.mark.parametrize("dtype", ["float8_e4m3fn", "float8_e5m2"])
def test_scaled_fp8_is_dequantised_added_and_quantised_again(dtype: str, tmp_path: Path) -> None:
    """mflux#440: a delta added to the codes is lost. Codes times scale are W + ΔW to half a step, under the base's keys and dtypes."""
    base = checkpoints.flux_scaled_fp8(tmp_path / "flux.safetensors", dtype)
    adapter, deltas = flux_adapter(tmp_path / "adapter.safetensors")
    result = merge(base, [(adapter, 1.0)], tmp_path / "out.safetensors")
    before, after = load_file(base), load_file(tmp_path / "out.safetensors")
    assert {key: (value.dtype, value.shape) for key, value in after.items()} == {
        key: (value.dtype, value.shape) for key, value in before.items()
    }
    values: list[dict[str, torch.Tensor]] = [{}, {}]
    for key, delta in deltas.items():
        scale = f"{key.removesuffix('.weight')}.scale_weight"
        for found, tensors in zip(values, (before, after), strict=True):
            found[key] = tensors[key].double() * tensors[scale].double()
        within_half_a_step(values[1][key], values[0][key] + delta, float(after[scale]), dtype)
    assert result["delta_retained"] == pytest.approx(retained(*values, deltas), abs=0.01)
    others = before.keys() - deltas.keys() - {f"{key.removesuffix('.weight')}.scale_weight" for key in deltas}
    assert [key for key in others if not torch.equal(before[key].view(torch.uint8), after[key].view(torch.uint8))] == []


def within_half_a_step(found: torch.Tensor, wanted: torch.Tensor, scale: float, dtype: str) -> None:
    """Nearest code: half the distance of neighbours, which is even below the smallest normal; 1 % for float32's own rounding."""
    smallest = torch.finfo(getattr(torch, dtype)).tiny * scale
    exponent = torch.floor(torch.log2(wanted.abs().clamp(min=smallest) / scale))
    half = torch.exp2(exponent - MANTISSA[dtype] - 1) * scale
    assert bool(((found - wanted).abs() <= 1.01 * half).all())


@pytest.mark.parametrize("architecture", ["sd1", "sdxl"])
def test_a_result_that_verifies(architecture: str, tmp_path: Path) -> None:
    """`verify` reads the file back and agrees with a merge that is right, in every dtype."""
    factors = merging.factors_of(architecture, ranks=merging.RANKS, alphas=merging.ALPHAS)
    adapter = merging.save_adapter(tmp_path / "adapter.safetensors", architecture, "kohya", factors)
    for dtype in ("float32", "float16", "bfloat16"):
        base = checkpoints.single(architecture, tmp_path / f"{dtype}.safetensors", dtype)
        result = merge(base, [(adapter, 1.0)], tmp_path / f"{dtype}-out.safetensors", verify=True)
        assert result["changed"] > 200
