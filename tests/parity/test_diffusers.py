"""diffusers as the reader and the writer: what it computes from our files is the hand merge, what it saves keeps its function.

Hand merge: W + (alpha / rank) · up · down in float64, rounded once. diffusers itself only ever gets files without alpha tensors
(it applies one module's alpha to another where they differ), and the number of modules it injected is always counted: a file whose
keys it does not know is loaded without an error.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open

from fixtures import adapters, make
from tests import reference
from tests.parity.support import apart, assert_deltas, expected, made, merged, save_kohya, truth_of

pytestmark = pytest.mark.parity

TOLERANCE = 2e-6  # of outputs, float32 forward against float32 forward
ALPHAS = (2.0, 1.0, None, 3.0, 8.0)  # dealt out in turn; None: the module has no alpha tensor, its scale is 1


def readable(of: make.Base) -> make.Base:
    """The models diffusers loads adapters into: Flux's T5 is not one of them."""
    return make.Base(
        of.architecture, {name: model for name, model in of.models.items() if of.architecture != "flux" or name != "text_encoder_2"}
    )


def loaded(of: make.Base, path: Path) -> tuple[make.Base, dict[str, int]]:
    """A copy of the base with the file loaded by its pipeline, and the number of adapter layers in each model."""
    copy = of.copy()
    make.pipeline(copy).load_lora_weights(path.parent, weight_name=path.name)
    counts = {
        folder: sum(bool(len(getattr(layer, "lora_A", ())) or len(getattr(layer, "lora_embedding_A", ()))) for layer in model.modules())
        for folder, model in copy.models.items()
    }
    return copy, counts


def check_forward(of: make.Base, path: Path, truth: dict[str, dict[str, torch.Tensor]]) -> None:
    """diffusers injects every module, and each model's output is the hand merge's."""
    copy, counts = loaded(of, path)
    assert counts == {folder: len(truth.get(folder, {})) for folder in of.models}
    outputs, wanted, bare = make.forward(copy), make.forward(merged(of, truth)), make.forward(of)
    for folder in truth:
        assert apart(wanted[folder], bare[folder]) > 1e-3, f"{folder}: the adapter does nothing, the test could not fail"
        assert apart(outputs[folder], wanted[folder]) <= TOLERANCE, folder


def header(path: Path) -> dict[str, Any]:
    with safe_open(path, "pt") as file:
        return json.loads((file.metadata() or {}).get("lora_adapter_metadata", "{}"))


@pytest.mark.parametrize("architecture", ["sd1", "sdxl", "flux"])
class TestKohyaToDiffusers:
    """A kohya file on every Linear and Conv, text encoders included, each module with its own alpha or none."""

    @pytest.fixture
    def adapter(self, architecture: str, tmp_path: Path, bases: Callable[[str], make.Base]) -> tuple[make.Base, Path, Any]:
        of = readable(bases(architecture))
        factors = made(of, ranks=(4, 4, 4, 4, 4, 6), alphas=ALPHAS)
        return of, save_kohya(tmp_path / "kohya.safetensors", architecture, factors), truth_of(factors)

    def test_forward_is_the_hand_merge(self, adapter: Any, architecture: str, convert: Callable[..., Path]) -> None:
        of, source, truth = adapter
        assert_deltas(reference.deltas(source), expected(architecture, truth, "kohya"))
        out = convert(source, "diffusers")
        assert_deltas(reference.deltas(out), expected(architecture, truth, "diffusers"))
        check_forward(of, out, truth)

    def test_kept_alpha_is_the_same_function(self, adapter: Any, architecture: str, convert: Callable[..., Path]) -> None:
        of, source, truth = adapter
        out = convert(source, "diffusers", keep_alpha=True)
        assert_deltas(reference.deltas(out), expected(architecture, truth, "diffusers"))
        check_forward(of, out, truth)


@pytest.mark.parametrize("architecture", ["sd1", "sdxl", "flux"])
@pytest.mark.parametrize("metadata", [True, False], ids=["header", "no-header"])
def test_what_diffusers_saves_keeps_its_function(
    architecture: str, metadata: bool, tmp_path: Path, bases: Callable[[str], make.Base], convert: Callable[..., Path]
) -> None:
    """`save_lora_weights` with alpha 6 on rank 4 in its header; without the header every reader, diffusers too, takes scale 1."""
    of = readable(bases(architecture))
    configs = {folder: adapters.lora_config(model, alpha=6) for folder, model in of.models.items()}
    source = adapters.diffusers_file(tmp_path / "saved", of, configs, seed=5, metadata=metadata)
    assert (header(source) != {}) == metadata
    truth = {folder: {} for folder in of.models}
    for name, delta in reference.deltas(source).items():
        folder, _, module = name.partition(".")
        truth[folder][module] = delta
    assert {folder: sorted(found) for folder, found in truth.items()} == {
        folder: sorted(adapters.layers(model)) for folder, model in of.models.items()
    }
    if architecture == "sd1":  # the reference reads the file as diffusers does
        check_forward(of, source, truth)
    for dialect in ("kohya", "comfy"):
        assert_deltas(reference.deltas(convert(source, dialect)), expected(architecture, truth, dialect))


def test_the_header_of_a_converted_file_is_what_the_factors_mean(
    tmp_path: Path, bases: Callable[[str], make.Base], convert: Callable[..., Path]
) -> None:
    """Folded: lora_alpha = r for every module. Kept: rank and alpha of each, in patterns; no alpha tensor in either."""
    of = bases("sd1")
    source = save_kohya(tmp_path / "kohya.safetensors", "sd1", made(of, ranks=(4, 8), alphas=(2.0, None, 3.0)))
    for options in ({}, {"keep_alpha": True}):
        out = convert(source, "diffusers", **options)
        fields = header(out)
        with safe_open(out, "pt") as file:
            assert [key for key in file.keys() if "alpha" in key] == []  # noqa: SIM118
        for folder in ("unet", "text_encoder"):
            config = {key.removeprefix(f"{folder}."): value for key, value in fields.items() if key.startswith(f"{folder}.")}
            ranks = {config["r"], *config["rank_pattern"].values()}
            assert ranks == {4, 8}
            if not options:
                assert {config["lora_alpha"], *config["alpha_pattern"].values()} == ranks
            else:
                assert {config["lora_alpha"], *config["alpha_pattern"].values()} == {2, 3, 4, 8}


def test_dora(tmp_path: Path, bases: Callable[[str], make.Base], convert: Callable[..., Path]) -> None:
    """A DoRA kohya file (`dora_scale` on the output axis): diffusers drops that key and applies a plain LoRA; converted, it does not."""
    from safetensors.torch import load_file, save_file

    of = bases("sd1")
    unet = of.models["unet"]
    factors = {"unet": adapters.factors(unet, adapters.layers(unet), alphas=(2.0, 8.0))}
    source = save_kohya(tmp_path / "plain.safetensors", "sd1", factors)
    tensors, target = load_file(source), make.Base("sd1", {"unet": unet})
    noise = torch.Generator().manual_seed(3)
    changed = {}
    for name, part in factors["unet"].items():
        weight = unet.get_submodule(name).weight.double()
        moved = weight + part.delta().reshape(weight.shape)
        norm = moved.flatten(1).norm(dim=1)
        scale = (norm * (1 + 0.1 * torch.rand(norm.shape, generator=noise))).float()
        tensors[f"lora_unet_{name.replace('.', '_')}.dora_scale"] = scale.reshape(-1, *[1] * (weight.dim() - 1)).clone()
        changed[name] = moved * (scale.double() / norm).reshape(-1, *[1] * (weight.dim() - 1)) - weight
    path = tmp_path / "dora.safetensors"
    save_file(tensors, path)
    out = convert(path, "diffusers")
    copy, counts = loaded(target, out)
    assert counts == {"unet": len(changed)}
    assert apart(make.forward(copy)["unet"], make.forward(merged(target, {"unet": changed}))["unet"]) <= TOLERANCE
    plain = merged(target, truth_of(factors))
    assert apart(make.forward(plain)["unet"], make.forward(copy)["unet"]) > 1e-3
