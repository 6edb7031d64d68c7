"""extract: planted differences are found, and `merge` of what was extracted gives TUNED back, whatever the architecture and layer.

W_tuned = W + D,  D planted in float64 and of known rank;  |merge(BASE, extract(BASE, TUNED)) - W_tuned| ≤ 1e-6 · |W_tuned|
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from fixtures import checkpoints
from fixtures.tuned import difference, matrices, planted, tuned
from loratools.operations.extract import extract
from loratools.operations.inspect import inspect
from loratools.operations.merge import merge
from tests import reference
from tests.operations.merge_by_hand import flux, noise, save

pytestmark = pytest.mark.filterwarnings("ignore")

Tensors = Mapping[str, torch.Tensor]
NO_MODULES = ("first_stage_model.", "vae.", "model_ema.", "betas", "alphas_cumprod", "denoiser.sigmas")


@pytest.fixture(scope="module", autouse=True)
def _warm() -> None:
    """diffusers takes seconds to import: not in the first test's time."""
    checkpoints.models("sd1")


def a_module(key: str) -> bool:
    return not key.startswith(NO_MODULES) and not key.endswith("logit_scale")


def apart(found: torch.Tensor, wanted: torch.Tensor) -> float:
    """Relative Frobenius error in float64."""
    return float((found.double().flatten() - wanted.double().flatten()).norm() / wanted.double().norm())


def assert_back(base: Path, wanted: Tensors, adapter: Path, tolerance: float = 1e-6) -> None:
    """Merged into the base, the adapter gives every tensor of the tuned model."""
    out = adapter.with_name(f"{adapter.name}-merged.safetensors")
    merge(base, [(adapter, 1.0)], out)
    found = load_file(out)
    off = {key: apart(found[key], value) for key, value in wanted.items() if value.is_floating_point() and value.any()}
    worst = max(off, key=lambda key: off[key])
    assert off[worst] <= tolerance, f"{worst}: {off[worst]:.2e}"


# --------------------------------------------------------------------------------------------------- every known architecture


@pytest.mark.parametrize("architecture", ["sd1", "sd2", "sdxl", "sd3", "flux"])
@pytest.mark.parametrize("dialect", [None, "comfy"])
def test_single_files(architecture: str, dialect: str | None, tmp_path: Path) -> None:
    """Every tensor of denoiser and text encoders differs: linear, 1x1 and 3x3 convolutions, embeddings, biases, norms, parameters."""
    tensors = checkpoints.single_tensors(architecture)
    base = checkpoints.write(tmp_path / "base.safetensors", tensors, "base")
    after = tuned(tensors, only=a_module)
    told = extract(base, save(tmp_path / "tuned.safetensors", after), tmp_path / "out.safetensors", to=dialect)
    changed = [key for key in tensors if a_module(key) and difference({key: tensors[key]}, after)]
    assert len(changed) > 130
    assert told["dialect"] == (dialect or "kohya")
    assert not {row["tensor"] for row in told["skipped"]} & set(changed)
    assert_back(base, after, tmp_path / "out.safetensors")
    assert inspect(tmp_path / "out.safetensors", check=True)["problems"] == []


@pytest.mark.parametrize("architecture", ["sd1", "sdxl", "sd3", "flux"])
def test_no_name_is_flattened_over_a_prefix_of_the_checkpoint(architecture: str, tmp_path: Path) -> None:
    """X7: `lora_unet_model_diffusion_model_…` is nobody's module."""
    tensors = checkpoints.single_tensors(architecture)
    base = checkpoints.write(tmp_path / "base.safetensors", tensors, "base")
    extract(base, save(tmp_path / "tuned.safetensors", tuned(tensors, only=a_module)), tmp_path / "out.safetensors")
    keys = list(load_file(tmp_path / "out.safetensors"))
    assert any(key.startswith("lora_unet_") for key in keys)
    assert any(key.startswith("lora_te") for key in keys)
    for debris in ("model_diffusion_model", "cond_stage", "conditioner", "embedders", "first_stage", "module"):
        assert not [key for key in keys if debris in key], debris


# -------------------------------------------------------------------------------------------------------- how exact it is


def wide(dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """Flux' first layers at a width where rank 16 is low: 96."""
    return flux(dtype, 96)


@pytest.mark.parametrize("exact", [False, True])
def test_planted_rank_16_in_float32(exact: bool, tmp_path: Path) -> None:
    """X1: no clamp; what is planted comes back to 1e-5, at its own rank."""
    tensors = wide(torch.float32)
    after = tuned(tensors, rank=16, only=matrices)
    told = extract(
        save(tmp_path / "a.safetensors", tensors),
        save(tmp_path / "b.safetensors", after),
        tmp_path / "out.safetensors",
        rank=16,
        to="comfy",
        exact=exact,
    )
    found = reference.deltas(tmp_path / "out.safetensors")
    wanted = {f"diffusion_model.{key.removesuffix('.weight')}": value for key, value in difference(tensors, after).items()}
    assert found.keys() == wanted.keys()
    assert max(apart(found[name], wanted[name]) for name in wanted) <= 1e-5
    assert told["relative_error"] <= 1e-5
    assert told["ranks"] == {"16": len(wanted)}


@pytest.mark.parametrize(("dtype", "step"), [(torch.float16, 2.0**-11), (torch.bfloat16, 2.0**-8)])
def test_planted_rank_16_in_16_bits(dtype: torch.dtype, step: float, tmp_path: Path) -> None:
    """Each W + D was rounded: an error of step / √3 · |W| / |D| at most; that of the factors is half as much and relative to D."""
    tensors, ratio = wide(dtype), 0.3
    after = tuned(tensors, rank=16, ratio=ratio, only=matrices)
    save(tmp_path / "a.safetensors", tensors)
    save(tmp_path / "b.safetensors", after)
    extract(tmp_path / "a.safetensors", tmp_path / "b.safetensors", tmp_path / "out.safetensors", rank=16, to="comfy")
    found = reference.deltas(tmp_path / "out.safetensors")
    written = load_file(tmp_path / "out.safetensors")
    assert {value.dtype for key, value in written.items() if key.endswith((".lora_A.weight", ".lora_B.weight"))} == {dtype}
    for number, (key, value) in enumerate(tensors.items()):
        if matrices(key):
            truth = planted(value, 16, 1000 + number, ratio)
            limit = step * (1 + 1 / ratio)
            assert apart(found[f"diffusion_model.{key.removesuffix('.weight')}"], truth) <= limit, key


def test_a_bf16_pair_is_subtracted_in_float32(tmp_path: Path) -> None:
    """X10: W + D differs from W by a few steps of bf16; the difference of the stored values is exact in float32."""
    tensors = wide(torch.bfloat16)
    after = tuned(tensors, rank=4, ratio=0.02, only=matrices)
    save(tmp_path / "a.safetensors", tensors)
    save(tmp_path / "b.safetensors", after)
    told = extract(tmp_path / "a.safetensors", tmp_path / "b.safetensors", tmp_path / "out.safetensors", rank=96, dtype="fp32", to="comfy")
    found = reference.deltas(tmp_path / "out.safetensors")
    wanted = difference(tensors, after)
    stored = {key: (after[key] - tensors[key]).double() for key in wanted}  # the subtraction in bf16, which loses bits
    assert any(apart(stored[key], wanted[key]) > 1e-4 for key in wanted)
    assert max(apart(found[f"diffusion_model.{key.removesuffix('.weight')}"], wanted[key]) for key in wanted) <= 1e-5
    assert told["relative_error"] <= 1e-5


@pytest.mark.parametrize("dtypes", [("bfloat16", "float32"), ("float32", "float16"), ("float64", "float32"), ("float16", "bfloat16")])
def test_two_dtypes(dtypes: tuple[str, str], tmp_path: Path) -> None:
    """BASE and TUNED in different dtypes: the factors take BASE's where it is one of factors."""
    first, second = (getattr(torch, name) for name in dtypes)
    tensors = wide(first)
    after = {key: value.to(second) for key, value in tuned(tensors, rank=8, only=matrices).items()}
    save(tmp_path / "a.safetensors", tensors)
    save(tmp_path / "b.safetensors", after)
    options: dict[str, Any] = {"rank": 96, "dtype": "fp32", "to": "comfy", "dense_extras": "drop"}
    told = extract(tmp_path / "a.safetensors", tmp_path / "b.safetensors", tmp_path / "out.safetensors", **options)
    found = reference.deltas(tmp_path / "out.safetensors")
    for key, wanted in difference(tensors, after).items():
        if matrices(key):
            assert apart(found[f"diffusion_model.{key.removesuffix('.weight')}"], wanted) <= 1e-5, key
    assert told["dtype"] == "F32"
    told = extract(tmp_path / "a.safetensors", tmp_path / "b.safetensors", tmp_path / "own.safetensors", rank=8)
    assert told["dtype"] == {"bfloat16": "BF16", "float32": "F32", "float64": "F64", "float16": "F16"}[dtypes[0]]


# --------------------------------------------------------------------------------------------------------------- --rank auto


@pytest.mark.parametrize(("rank", "strength"), [(16, 1.0), (5, 1.0), (5, 0.3)])
def test_the_rank_that_stands_above_noise(rank: int, strength: float, tmp_path: Path) -> None:
    """X9: rank planted under noise of its own size per entry; one more or less is allowed."""
    shape, key = (320, 256), "double_blocks.0.img_mod.lin.weight"
    delta = noise(shape[0], rank, seed=1).double() @ noise(rank, shape[1], seed=2).double()
    hidden = strength * delta * (0.3 / float(delta.std())) + 0.1 * noise(*shape, seed=3).double()
    tensors = flux(width=32) | {key: noise(*shape, seed=4)}
    after = {**tensors, key: (tensors[key].double() + hidden * 0.01).float()}
    save(tmp_path / "a.safetensors", tensors)
    save(tmp_path / "b.safetensors", after)
    told = extract(tmp_path / "a.safetensors", tmp_path / "b.safetensors", tmp_path / "out.safetensors", rank="auto")
    (row,) = told["worst"]
    assert abs(row["rank"] - rank) <= 1


def test_options_of_the_sketch_change_what_is_drawn_and_not_what_is_found(tmp_path: Path) -> None:
    shape, key = (600, 520), "double_blocks.0.img_mod.lin.weight"
    tensors = flux(width=32) | {key: noise(*shape, seed=4)}
    after = {**tensors, key: (tensors[key].double() + planted(tensors[key], 12, 9)).float()}
    save(tmp_path / "a.safetensors", tensors)
    save(tmp_path / "b.safetensors", after)
    settings: dict[str, dict[str, Any]] = {
        "none": {}, "seed": {"seed": 7}, "oversample": {"oversample": 4}, "iterations": {"iterations": 1}, "exact": {"exact": True}
    }  # fmt: skip
    written = {}
    for name, options in settings.items():
        out = tmp_path / f"{name}.safetensors"
        extract(tmp_path / "a.safetensors", tmp_path / "b.safetensors", out, rank=12, **options)
        (found,) = reference.deltas(out).values()
        assert apart(found, difference(tensors, after)[key]) <= 1e-5, options
        written[name] = load_file(out)["lora_unet_double_blocks_0_img_mod_lin.lora_down.weight"]
    for name in ("seed", "oversample", "exact"):
        assert not torch.equal(written["none"], written[name]), name
