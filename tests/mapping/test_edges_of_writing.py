"""Prefixes, renames and atomic writes at their edges."""

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from loratools.errors import LoraToolsError
from loratools.operations.convert import convert
from tests.mapping.builders import lora, noise, save

BLOCK = "lora_unet_up_blocks_3_attentions_0_"
PROJ = lora(f"{BLOCK}proj_in", (16, 16, 1, 1))
Q = f"{BLOCK}transformer_blocks_0_attn1_to_q"


def test_the_module_of_a_loha_file_is_lycoris(tmp_path):
    native = "diffusion_model.output_blocks.9.1.transformer_blocks.0.attn1.to_q"
    hada = {
        f"{native}.hada_{leaf}": noise(leaf, (16, 4) if leaf.endswith("a") else (4, 16)).float()
        for leaf in ("w1_a", "w1_b", "w2_a", "w2_b")
    }
    source = {**lora("diffusion_model.output_blocks.9.1.proj_in", (16, 16, 1, 1)), **hada}
    convert(save(tmp_path / "a.safetensors", source), tmp_path / "b.safetensors", "kohya")
    with safe_open(tmp_path / "b.safetensors", "pt") as file:
        assert file.metadata()["ss_network_module"] == "lycoris.kohya"


U, NATIVE = (
    "unet.up_blocks.3.attentions.0.transformer_blocks.0.attn1.to_q",
    "model.diffusion_model.output_blocks.9.1.transformer_blocks.0.attn1.to_q",
)


@pytest.mark.parametrize("case", ["dora", "set"])
def test_baking_loses_no_bias(case, tmp_path):
    """A bias is written or the conversion is refused: it never vanishes."""
    base = save(
        tmp_path / "base.safetensors", {f"{NATIVE}.weight": noise("W", (16, 16)).float(), f"{NATIVE}.bias": noise("B", (16,)).float()}
    )
    if case == "dora":
        tensors = {
            **lora("unet.up_blocks.3.attentions.0.proj_in", (16, 16, 1, 1), alpha=None, scheme="peft"),
            **lora(U, (16, 16), alpha=None, scheme="peft"),
            f"{U}.lora_magnitude_vector": torch.ones(16),
            f"{U}.lora_B.bias": noise("b", (16,)).float(),
        }
        target = "diffusers-dot"
    else:
        stem = NATIVE.removeprefix("model.")
        tensors = {
            **lora("diffusion_model.output_blocks.9.1.proj_in", (16, 16, 1, 1)),
            f"{stem}.set_weight": noise("s", (16, 16)).float(),
            f"{stem}.bias": noise("b", (16,)).float(),
        }
        target = "kohya"
    try:
        convert(save(tmp_path / "a.safetensors", tensors), tmp_path / "b.safetensors", target, base=base, allow_lossy=True)
    except LoraToolsError:
        return
    assert any(key.endswith((".diff_b", "bias")) for key in load_file(tmp_path / "b.safetensors"))
