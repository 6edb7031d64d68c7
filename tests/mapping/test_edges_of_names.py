"""More edges of names, headers and writes."""

import torch
from safetensors.torch import load_file

from loratools.mapping.read import read
from loratools.operations.convert import convert
from tests.mapping.builders import delta, lora, noise, save

C = "diffusion_model.output_blocks.9.1."
PROJ = lora(f"{C}proj_in", (16, 16, 1, 1))
Q, KQ = f"{C}transformer_blocks.0.attn1.to_q", "lora_unet_up_blocks_3_attentions_0_transformer_blocks_0_attn1_to_q"


def test_a_bias_of_lora_b_is_added_to_diff_b(tmp_path):
    bias, extra = noise("b", (16,)).float(), noise("e", (16,)).float()
    tensors = {**PROJ, **lora(Q, (16, 16), scheme="peft"), f"{Q}.lora_B.bias": bias, f"{Q}.diff_b": extra}
    convert(save(tmp_path / "a.safetensors", tensors), tmp_path / "b.safetensors", "kohya")
    assert torch.allclose(load_file(tmp_path / "b.safetensors")[f"{KQ}.diff_b"], 0.5 * bias + extra)


def test_a_replaced_weight_stays_one(tmp_path):
    tensors = {**PROJ, f"{Q}.set_weight": noise("s", (16, 16)).half()}
    convert(save(tmp_path / "a.safetensors", tensors), tmp_path / "b.safetensors", "comfy", dtype="fp32")
    assert set(load_file(tmp_path / "b.safetensors")) == set(tensors)


def test_replaced_norms_are_scales_in_bfl_control(tmp_path):
    stem, norm = "double_blocks.0.img_attn", noise("n", (8,)).float()
    tensors = {**lora(f"diffusion_model.{stem}.proj", (16, 16), alpha=None), f"diffusion_model.{stem}.norm.query_norm.set_weight": norm}
    convert(save(tmp_path / "a.safetensors", tensors), tmp_path / "b.safetensors", "bfl-control", arch="flux")
    assert torch.equal(load_file(tmp_path / "b.safetensors")[f"{stem}.norm.query_norm.scale"], norm)


def test_lora_and_diff_of_one_module(tmp_path):
    diff = noise("d", (16, 16)).float()
    tensors = {**PROJ, **lora(Q, (16, 16)), f"{Q}.diff": diff}
    convert(save(tmp_path / "a.safetensors", tensors), tmp_path / "b.safetensors", "kohya")
    found = load_file(tmp_path / "b.safetensors")
    assert torch.equal(found[f"{KQ}.diff"], diff)
    assert torch.allclose(delta(found, KQ), delta(tensors, Q))


def test_a_constraint_of_zero_holds_sd_scripts_oft_in_place(tmp_path):
    """sd-scripts' own module clamps always: a constraint of 0 allows no rotation. LyCORIS' takes 0 as none."""
    for prefix, turned in (("oft_unet_", False), ("lora_unet_", True)):
        stem = prefix + "up_blocks_3_attentions_0_transformer_blocks_0_attn1_to_q"
        tensors = {
            f"{prefix}up_blocks_3_attentions_0_proj_in.oft_blocks": noise("p", (4, 4, 4)).float(),
            f"{stem}.oft_blocks": noise("o", (4, 4, 4)).float(),
            f"{stem}.alpha": torch.tensor(0.0),
        }
        adapter = read(save(tmp_path / "a.safetensors", tensors), arch="sd1")
        site = next(site for site in adapter.modules if site.path.endswith("to_q"))
        assert (float(adapter.delta(site, torch.eye(16)).norm()) > 1e-6) is turned
