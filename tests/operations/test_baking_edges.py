"""Baking does not lose what stands beside the weight."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from loratools.operations.convert import convert
from tests.mapping.builders import delta, lora, noise, refusal, rel, save, told

BLOCK = "lora_unet_up_blocks_3_attentions_0_"
PROJ = lora(f"{BLOCK}proj_in", (16, 16, 1, 1))
Q = f"{BLOCK}transformer_blocks_0_attn1_to_q"
SITE = "up_blocks.3.attentions.0.transformer_blocks.0.attn1.to_q"
NATIVE = "model.diffusion_model.output_blocks.9.1.transformer_blocks.0.attn1.to_q"


def test_a_dora_is_baked_for_its_base_only_when_allowed(tmp_path: Path) -> None:
    tensors, scale, weight = {**PROJ, **lora(Q, (16, 16))}, 1 + noise("m", (16, 1)), noise("W", (16, 16), 1.0)
    path = save(tmp_path / "a.safetensors", {**tensors, f"{Q}.dora_scale": scale.float()})
    base, out = save(tmp_path / "base.safetensors", {f"{NATIVE}.weight": weight.float()}), tmp_path / "b.safetensors"
    refusal(convert, path, out, "diffusers-dot", base=base)
    assert not out.exists()
    result = convert(path, out, "diffusers-dot", base=base, allow_lossy=True)
    moved = weight.float().double() + delta(tensors, Q)
    expected = scale.float().double() * moved / moved.norm(dim=1, keepdim=True) - weight.float().double()
    error = rel(delta(load_file(out), f"unet.{SITE}"), expected)
    values = torch.linalg.svdvals(expected)
    assert error == pytest.approx(float(values[4:].norm() / values.norm()), rel=1e-4)  # rank 4 stays, and nothing does it better
    assert result["approximated"] == [{"site": f"denoiser.{SITE}", "relative_error": pytest.approx(error, rel=1e-4)}]
    assert result["exact"] is False


def test_a_bias_is_not_lost_in_the_baking(tmp_path: Path) -> None:
    tensors = {**PROJ, **lora(Q, (16, 16)), f"{Q}.dora_scale": (1 + noise("m", (16, 1))).float(), f"{Q}.diff_b": noise("b", (16,)).float()}
    base = save(tmp_path / "base.safetensors", {f"{NATIVE}.weight": noise("W", (16, 16), 1.0).float()})
    error = refusal(
        convert, save(tmp_path / "a.safetensors", tensors), tmp_path / "b.safetensors", "diffusers-dot", base=base, allow_lossy=True
    )
    assert "diff_b" in told(error)


def test_a_swapped_module_is_baked_on_swapped_rows(tmp_path: Path) -> None:
    stem = "lora_unet_final_layer_adaLN_modulation_1"
    vector, weight = noise("v", (32,)).float(), noise("W", (32, 16), 1.0).float()
    tensors = {
        **lora("lora_unet_double_blocks_0_img_attn_proj", (16, 16)),
        f"{stem}.weight": vector,
        f"{stem}.on_input": torch.tensor(False),
    }
    base, out = save(tmp_path / "base.safetensors", {"final_layer.adaLN_modulation.1.weight": weight}), tmp_path / "b.safetensors"
    convert(save(tmp_path / "a.safetensors", tensors), out, "comfy", base=base, allow_lossy=True, arch="flux")
    found = load_file(out)["diffusion_model.final_layer.adaLN_modulation.1.diff"]
    assert torch.allclose(found, weight * vector[:, None], rtol=1e-6)
