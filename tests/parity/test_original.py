"""The tests' own table of original names against diffusers' checkpoint converters, by the identity of tensors."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from fixtures import make
from tests.parity.original import original, stacked, unet_name

pytestmark = pytest.mark.parity


@pytest.mark.parametrize(("architecture", "attention_up"), [("sd1", (1, 2, 3)), ("sdxl", (0, 1))])
def test_unet_names_are_those_diffusers_converts(
    architecture: str, attention_up: tuple[int, ...], bases: Callable[[str], make.Base]
) -> None:
    from diffusers.loaders.single_file_utils import convert_ldm_unet_checkpoint

    model = bases(architecture).models["unet"]
    weights = {f"{name}.{leaf}": value for name, module in model.named_modules() for leaf, value in module.named_parameters(recurse=False)}
    checkpoint = {}
    for key, value in weights.items():
        name, leaf = key.rsplit(".", 1)
        checkpoint[f"model.diffusion_model.{unet_name(name, attention_up)}.{leaf}"] = value
    assert len(checkpoint) == len(weights)
    converted = convert_ldm_unet_checkpoint(checkpoint, dict(model.config))
    assert converted.keys() == weights.keys()
    assert [key for key in weights if converted[key] is not weights[key]] == []


def test_flux_modules_are_those_diffusers_converts(bases: Callable[[str], make.Base]) -> None:
    """The converter has Flux's own width, 3072, written into it: rows are that many, columns one."""
    from diffusers.loaders.single_file_utils import convert_flux_transformer_checkpoint_to_diffusers

    linear = {name: module for name, module in bases("flux").models["transformer"].named_modules() if isinstance(module, torch.nn.Linear)}
    noise = torch.Generator().manual_seed(0)
    weights = {name: torch.rand(module.out_features * 3072 // 32, 1, generator=noise) for name, module in linear.items()}
    named = stacked(original("flux", weights), weights)
    checkpoint = {f"{name}.{leaf}": value for name, value in named.items() for leaf in ("weight", "bias")}
    norms = [f"double_blocks.{at}.{stream}_attn.norm" for at in range(2) for stream in ("img", "txt")]
    norms += [f"single_blocks.{at}.norm" for at in range(2)]
    checkpoint |= {f"{norm}.{half}_norm.scale": torch.ones(1) for norm in norms for half in ("query", "key")}

    converted = convert_flux_transformer_checkpoint_to_diffusers(checkpoint)
    assert checkpoint == {}
    found = {key: value for key, value in converted.items() if ".norm_" not in key}
    assert found.keys() == {f"{name}.{leaf}" for name in weights for leaf in ("weight", "bias")}
    assert [key for key in found if not torch.equal(found[key], weights[key.rpartition(".")[0]])] == []
