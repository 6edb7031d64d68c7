"""`merge --verify` passes every merge that is right: dtypes, roundings, scales, kinds, layouts. What it finds: `test_merge_verify`."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from loratools.operations.merge import merge
from tests.operations import merge_by_hand as hand
from tests.operations import test_merge_numbers as numbers
from tests.operations import test_merge_paths as paths
from tests.operations import test_merge_scaled as scales
from tests.operations.merge_by_hand import UP
from tests.operations.test_merge_verify import SQUARE, model, pairs_of, sharded


@pytest.mark.parametrize("rounding", ["nearest", "stochastic"])
@pytest.mark.parametrize("dtype", hand.FORMATS, ids=numbers.named)
def test_every_dtype_passes(dtype: torch.dtype, rounding: str, tmp_path: Path) -> None:
    for ratio in (0.001, 0.1):
        base = model(dtype)
        adapter = hand.peft(tmp_path / f"{ratio}", pairs_of(base, ratio))
        result = merge(
            hand.save(tmp_path / "base.safetensors", base),
            [(adapter, 0.9)],
            tmp_path / f"{ratio}.safetensors",
            rounding=rounding,
            verify=True,
        )
        found = result["verify"]
        assert (found["ok"], found["sites"], found["untouched_tensors"]) == (True, 4, 2)
        expected = {row["tensor"]: row["expected_projection"] for row in found["worst"]}
        assert set(expected) == {f"{name}.weight" for name in (*SQUARE, UP)}
        assert found["max_deviation"] < (1e-3 if rounding == "nearest" or dtype in (torch.float32, torch.float64) else 0.5)


@pytest.mark.parametrize("rounding", ["nearest", "stochastic"])
@pytest.mark.parametrize("kind", scales.SCALES)
def test_scaled_fp8_passes(kind: str, rounding: str, tmp_path: Path) -> None:
    base = scales.scaled(*scales.SCALES[kind])
    plain = hand.language_model(176, torch.float32)
    for ratio in (0.01, 2.0):
        adapter = hand.peft(tmp_path / f"{ratio}", numbers.pairs_for(plain, ratio))
        source = hand.save(tmp_path / "base.safetensors", base)
        result = merge(source, [(adapter, 1.0)], tmp_path / f"{ratio}.safetensors", rounding=rounding, verify=True)
        assert (result["verify"]["ok"], result["verify"]["sites"]) == (True, 2)


@pytest.mark.parametrize("layout", ["fused", "apart"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=numbers.named)
@pytest.mark.parametrize("kind", [kind for kind in (*paths.SPLITTING, *paths.WHOLE_ONLY) if kind != "ia3 in"])
def test_every_kind_passes_in_16_bits(kind: str, dtype: torch.dtype, layout: str, tmp_path: Path) -> None:
    """Fused layers, split ones, exchanged halves; in float32 every kind is verified in `test_merge_paths`."""
    base = hand.flux(dtype)
    leaves = paths.KINDS[kind][0]
    modules = {name: leaves(tuple(base[f"{name}.weight"].shape)) for name in hand.FUSED}
    adapter = hand.lycoris(tmp_path / "adapter.safetensors", modules)
    source = hand.save(tmp_path / "base.safetensors", base if layout == "fused" else hand.split_flux(base))
    result = merge(source, [(adapter, 0.5)], tmp_path / "out.safetensors", arch="flux", verify=True)
    assert (result["verify"]["ok"], result["verify"]["sites"]) == (True, 16 if kind in ("dense", "set", "lora and diff_b") else 8)


def test_shards_and_a_cast_pass(tmp_path: Path) -> None:
    base = model(torch.float32)
    folder = sharded(tmp_path / "base", base)
    adapter = hand.peft(tmp_path / "adapter", pairs_of(base))
    for dtype in (None, "BF16", "F16"):
        result = merge(folder, [(adapter, 1.0)], tmp_path / f"out-{dtype}", dtype=dtype, verify=True)
        assert (result["verify"]["ok"], result["verify"]["sites"]) == (True, 4)


@pytest.mark.parametrize("rounding", ["nearest", "stochastic"])
@pytest.mark.parametrize("size", [0.0, 1e-4, 1.0])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=numbers.named)
def test_sums_that_cancel_pass(dtype: torch.dtype, size: float, rounding: str, tmp_path: Path) -> None:
    """64 products that cancel among themselves, W small or zero, W against Δ: what is left of a sum in float32 may be off by many steps
    of its own. Every large model has such entries, by chance."""
    base = {f"{name}.weight": (hand.noise(512, 512, seed=seed) * size).to(dtype) for seed, name in enumerate(SQUARE)}
    pairs = {name: hand.pair((512, 512), 64, 8.0, 10 * seed) for seed, name in enumerate(SQUARE)}
    base[f"{SQUARE[0]}.weight"] = hand.nearest(-pairs[SQUARE[0]].delta(), dtype).to(dtype)
    adapter = hand.peft(tmp_path / "adapter", pairs)
    source = hand.save(tmp_path / "base.safetensors", base)
    result = merge(source, [(adapter, 1.0)], tmp_path / "out.safetensors", rounding=rounding, verify=True)
    assert (result["verify"]["ok"], result["verify"]["sites"]) == (True, 3)
