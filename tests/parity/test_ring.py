"""The ring PEFT → diffusers → kohya → comfy → PEFT on adapters PEFT itself made: the same function at every step."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from fixtures import adapters, make
from tests import reference
from tests.parity.support import assert_deltas, expected

pytestmark = [pytest.mark.parity, pytest.mark.filterwarnings("ignore")]

RING = ("diffusers", "kohya", "comfy", "peft")
# feed-forward layers apart from the rest: other ranks, other alphas
MIXED = {"rank_pattern": {r".*\.ff\.net\.\w+(\.proj)?": 8}, "alpha_pattern": {r".*\.ff\.net\.\w+(\.proj)?": 2}}


def trained(folder: Path, of: make.Base, **config: Any) -> dict[str, torch.Tensor]:
    """A PEFT folder on a base's denoiser; returns ΔW of every module as PEFT computes it."""
    model = of.models[of.denoiser]
    wrapped = adapters.peft_folder(folder, model, adapters.lora_config(model, **config), seed=7)
    layers = {
        name.removeprefix("base_model.model."): layer for name, layer in wrapped.named_modules() if hasattr(layer, "get_delta_weight")
    }
    assert sorted(layers) == sorted(adapters.layers(model))
    return {name: layer.get_delta_weight("default").detach() for name, layer in layers.items()}


def scales(folder: Path, model: torch.nn.Module) -> dict[str, float]:
    """Scale of every module when PEFT reads this folder."""
    from copy import deepcopy

    from peft import PeftModel

    wrapped = PeftModel.from_pretrained(deepcopy(model), folder)
    return {name: layer.scaling["default"] for name, layer in wrapped.named_modules() if hasattr(layer, "get_delta_weight")}


def around(folder: Path, convert: Callable[..., Path]) -> list[Path]:
    steps = [folder]
    for dialect in RING:
        steps.append(convert(steps[-1], dialect))
    return steps


def check_steps(of: make.Base, steps: list[Path], truth: dict[str, torch.Tensor]) -> None:
    for dialect, path in zip(RING[:-1], steps[1:-1], strict=True):
        assert_deltas(reference.deltas(path), expected(of.architecture, {of.denoiser: truth}, dialect))
    for path in (steps[0], steps[-1]):
        assert_deltas(reference.deltas(path), {f"base_model.model.{name}": delta for name, delta in truth.items()})


@pytest.mark.parametrize(
    ("architecture", "config"),
    [
        pytest.param("sd1", {"alpha": 8}, id="sd1-uniform"),
        pytest.param("sd1", {"alpha": 8, "use_rslora": True}, id="sd1-rslora"),
        pytest.param("sdxl", {"alpha": 8, **MIXED}, id="sdxl-mixed"),
        pytest.param("flux", {"alpha": 8}, id="flux-uniform"),
        pytest.param("flux", {"alpha": 8, **MIXED}, id="flux-mixed"),
        pytest.param("flux", {"alpha": 8, "use_rslora": True}, id="flux-rslora"),
    ],
)
def test_powers_of_two_come_back_to_the_bit(
    architecture: str, config: dict[str, Any], tmp_path: Path, bases: Callable[[str], make.Base], convert: Callable[..., Path]
) -> None:
    of = bases(architecture)
    folder = tmp_path / "trained"
    truth = trained(folder, of, **config)
    steps = around(folder, convert)
    check_steps(of, steps, truth)
    first, last = (load_file(path / "adapter_model.safetensors") for path in (steps[0], steps[-1]))
    assert first.keys() == last.keys()
    assert [key for key in first if not torch.equal(first[key], last[key])] == []
    assert scales(steps[0], of.models[of.denoiser]) == scales(steps[-1], of.models[of.denoiser])


@pytest.mark.parametrize("architecture", ["sd1", "flux"])
def test_other_alphas_come_back_within_one_rounding(
    architecture: str, tmp_path: Path, bases: Callable[[str], make.Base], convert: Callable[..., Path]
) -> None:
    of = bases(architecture)
    folder = tmp_path / "trained"
    truth = trained(folder, of, alpha=5)
    steps = around(folder, convert)
    check_steps(of, steps, truth)
    back = json.loads((steps[-1] / "adapter_config.json").read_text())
    assert (back["r"], back["lora_alpha"], back["alpha_pattern"], back["rank_pattern"]) == (4, 5, {}, {})


def test_parts_of_unequal_scales_survive_fusion(tmp_path: Path, bases: Callable[[str], make.Base], convert: Callable[..., Path]) -> None:
    """q, k and v of other ranks and scales in one fused layer: scales are moved into the factors, ΔW stays."""
    of = bases("flux")
    patterns = {
        "rank_pattern": {r".*\.attn\.(to_k|add_k_proj)": 8, r".*\.attn\.(to_v|add_v_proj)": 2},
        "alpha_pattern": {r".*\.attn\.(to_q|add_q_proj)": 3, r".*\.attn\.(to_k|add_k_proj)": 16},
    }
    folder = tmp_path / "trained"
    truth = trained(folder, of, alpha=1, **patterns)
    check_steps(of, around(folder, convert), truth)


def test_both_spellings_of_one_model_are_one_adapter(
    tmp_path: Path, bases: Callable[[str], make.Base], convert: Callable[..., Path]
) -> None:
    """`get_peft_model` writes base_model.model.…, `LoraModel` writes model.… and no config: alpha has to be said."""
    of = bases("sd1")
    folder, loose = tmp_path / "trained", tmp_path / "loose.safetensors"
    truth = {"unet": trained(folder, of, alpha=8)}
    model = of.models["unet"]
    adapters.lora_model_file(loose, model, adapters.lora_config(model, alpha=8), seed=7)
    assert all(key.startswith("model.") for key in load_file(loose))
    for source, options in ((folder, {}), (loose, {"alpha": 8.0})):
        assert_deltas(reference.deltas(convert(source, "kohya", **options)), expected("sd1", truth, "kohya"))
    half = {"unet": {name: delta / 2 for name, delta in truth["unet"].items()}}  # rank 4, alpha 8, and nobody told
    assert_deltas(reference.deltas(convert(loose, "kohya")), expected("sd1", half, "kohya"))


@pytest.mark.parametrize("build", [make.sd3_transformer, make.wan_transformer, make.lumina2_transformer], ids=["sd3", "wan", "lumina2"])
def test_other_transformers(
    build: Callable[[], torch.nn.Module], request: pytest.FixtureRequest, tmp_path: Path, convert: Callable[..., Path]
) -> None:
    """Renamed, fused, grouped-query and swapped modules: the ring ends where it began, and ‖ΔW‖ is the same at every step."""
    architecture = request.node.callspec.id
    of = make.Base(architecture, {"transformer": build()})
    truth = trained(tmp_path / "trained", of, alpha=8, rank_pattern={"norm_out.linear": 2}, alpha_pattern={"norm_out.linear": 2})
    steps = [tmp_path / "trained"]
    for dialect in RING:
        steps.append(convert(steps[-1], dialect, arch=architecture))
    norms = [sum(float(delta.norm()) ** 2 for delta in reference.deltas(path).values()) for path in steps]
    assert norms == pytest.approx([norms[0]] * len(steps), rel=1e-9)
    assert_deltas(reference.deltas(steps[-1]), {f"base_model.model.{name}": delta for name, delta in truth.items()})
    first, last = (load_file(path / "adapter_model.safetensors") for path in (steps[0], steps[-1]))
    assert first.keys() == last.keys()
    assert [key for key in first if not torch.equal(first[key], last[key])] == []
