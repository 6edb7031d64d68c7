"""An adapter in another dialect: grouping, halves, alpha and names, compared with dense matrices made by hand in float64."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from loratools.errors import UnsupportedError
from loratools.mapping.architectures import registry
from loratools.mapping.dialects import DIALECTS
from loratools.mapping.dimensions import evaluate
from loratools.mapping.read import read
from loratools.mapping.write import plan
from loratools.operations.convert import convert
from tests.mapping.builders import Tensors, delta, lora, noise, refusal, rel, save, told
from tests.mapping.dense import effects, worst

H = 16
DOUBLE, SINGLE = "transformer.transformer_blocks.0", "transformer.single_transformer_blocks.0"


def flux(*modules: Tensors) -> Tensors:
    """A file that is Flux by its modulation."""
    return {
        key: tensor for module in (lora(f"{DOUBLE}.norm1.linear", (6 * H, H), scheme="peft"), *modules) for key, tensor in module.items()
    }


# ------------------------------------------------------------------------------------------- C4: every Linear and Conv of a model

# Widths of a toy of each architecture; what no expression of its table names is taken as 6.
TOYS: dict[str, dict[str, int]] = {
    "sd1": {"c0": 8, "c1": 16, "c2": 24, "c3": 32, "ctx": 12, "temb": 20, "latent": 4, "out": 4},
    "sd2": {"c0": 8, "c1": 16, "c2": 24, "c3": 32, "ctx": 14, "temb": 20, "latent": 4, "out": 4},
    "sdxl": {"c0": 8, "c1": 16, "c2": 24, "ctx": 28, "temb": 20, "add": 36, "latent": 4, "out": 4},
    "flux": {"h": 16, "mlp": 40, "txt": 12, "vec": 10, "freq": 14, "img": 6, "out": 6},
    "chroma": {"h": 16, "mlp": 40, "txt": 12, "img": 6, "out": 6, "guide": 20, "guide_in": 9},
    "sd3": {"h": 16, "mlp": 40, "txt": 12, "vec": 10, "freq": 14, "latent": 4, "out": 6, "dual": 16},
    "wan": {"h": 16, "ffn": 40, "txt": 12, "freq": 14, "latent": 4, "out": 6, "img": 9, "img_kv": 16},
    "lumina2": {"h": 24, "kv": 8, "mlp": 40, "cond": 10, "txt": 12, "freq": 14, "img": 6, "out": 6},
}
UNLISTED = ("img_emb", "image_embedder", "vace", "distilled")  # what the names by hand leave out


def everything(arch: str) -> Tensors:
    """A LoRA of scale 5/4 on every Linear and Conv, in diffusers' names; two blocks of each kind."""
    table = registry()[arch].component("denoiser").table
    prefix = "unet." if arch in ("sd1", "sd2", "sdxl") else "transformer."
    found: Tensors = {}
    for row in table.namespaces["diff"]:
        if row.layer not in ("linear", "conv") or any(word in row.name for word in UNLISTED) or row.out == ("9h",):
            continue
        if row.out == ("2h",) and "norm1_context" in row.name:
            continue  # SD3's last block, told from the others by its shape: a test of its own
        out, in_ = evaluate(row.out[0], TOYS[arch]), evaluate(row.in_, TOYS[arch])
        for index in table.indices(row):
            if all(number < 2 for number in index.values()):
                found |= lora(prefix + row.name.format_map(index), (out or 6, in_ or 6, *row.kernel), rank=4, alpha=5.0, scheme="peft")
    return found


@pytest.mark.parametrize("arch", TOYS)
def test_every_linear_and_conv_arrives_in_every_dialect(arch: str, tmp_path: Path) -> None:
    """Sites in = sites out, equal deltas (alpha is not the rank), and the file that comes back has the keys it had."""
    tensors = everything(arch)
    path = save(tmp_path / "a.safetensors", tensors)
    before = effects(path, arch)
    assert len(before) * 3 == len(tensors) > 50
    taken = 0
    for name in DIALECTS:
        target = tmp_path / (name if DIALECTS[name].folder else f"{name}.safetensors")
        try:
            result = convert(path, target, name, arch=arch)
        except UnsupportedError:
            continue
        taken += 1
        after = effects(target, arch)
        assert set(after) == set(before), name
        assert worst(before, after) <= 1e-6, name
        assert (result["sites"], result["tensors_in"]) == (len(before), len(tensors))
        convert(target, tmp_path / "back.safetensors", "diffusers", arch=arch, force=True)
        back = tmp_path / "back.safetensors"
        if name != "diffusers":
            assert set(load_file(back)) == {key for key in tensors if not key.endswith(".alpha")}, name
        assert worst(before, effects(back, arch)) <= 1e-6, name
    assert taken >= 6


# ---------------------------------------------------------------------------------------------------------- C1: fusing keeps strength


@pytest.mark.parametrize("alphas", [(4.0, 8.0, 16.0), (2.0, 4.0, 8.0), (1.0, 4.0, 11.2), (None, None, None), (None, 4.0, 3.0)])
def test_fusing_three_ranks(alphas: tuple[float | None, ...], tmp_path: Path) -> None:
    """q, k, v of ranks 4, 8, 16: rank 28, block-diagonal, and the strength of each part as it was (sd-scripts #2204: a third)."""
    parts = [
        lora(f"{DOUBLE}.attn.to_{name}", (H, H), rank=rank, alpha=alpha, scheme="peft")
        for name, rank, alpha in zip("qkv", (4, 8, 16), alphas, strict=True)
    ]
    source = flux(*parts)
    path = save(tmp_path / "a.safetensors", source)
    result = convert(path, tmp_path / "b.safetensors", "kohya", arch="flux")
    written = load_file(tmp_path / "b.safetensors")
    stem = "lora_unet_double_blocks_0_img_attn_qkv"
    assert written[f"{stem}.lora_down.weight"].shape == (28, H)
    expected = torch.cat([delta(source, f"{DOUBLE}.attn.to_{name}") for name in "qkv"])
    error = rel(delta(written, stem), expected)
    assert error <= 1e-6
    scales = {1.0 if alpha is None else alpha / rank for alpha, rank in zip(alphas, (4, 8, 16), strict=True)}
    if len(scales) == 1:  # the same scale: factors verbatim, alpha = scale * 28
        assert error == 0
        assert result["exact"] is True
        assert torch.equal(written[f"{stem}.lora_down.weight"], torch.cat([part[next(k for k in part if "lora_A" in k)] for part in parts]))


def test_fusing_q_and_v_only(tmp_path: Path) -> None:
    """Absent parts are rows of zeros, exactly, and absent again on the way back."""
    source = flux(*(lora(f"{DOUBLE}.attn.to_{name}", (H, H), alpha=None, scheme="peft") for name in "qv"))
    path = save(tmp_path / "a.safetensors", source)
    convert(path, tmp_path / "b.safetensors", "kohya", arch="flux")
    fused = delta(load_file(tmp_path / "b.safetensors"), "lora_unet_double_blocks_0_img_attn_qkv")
    assert torch.equal(fused[H : 2 * H], torch.zeros(H, H, dtype=torch.float64))
    assert torch.equal(fused[:H], delta(source, f"{DOUBLE}.attn.to_q"))
    assert torch.equal(fused[2 * H :], delta(source, f"{DOUBLE}.attn.to_v"))
    convert(tmp_path / "b.safetensors", tmp_path / "c.safetensors", "diffusers", arch="flux")
    assert {key for key in load_file(tmp_path / "c.safetensors") if "attn" in key} == {key for key in source if "attn" in key}


def test_linear1_has_four_parts_of_two_widths(tmp_path: Path) -> None:
    parts = {"attn.to_q": H, "attn.to_k": H, "attn.to_v": H, "proj_mlp": 40}
    source = flux(*(lora(f"{SINGLE}.{name}", (out, H), alpha=None, scheme="peft") for name, out in parts.items()))
    convert(save(tmp_path / "a.safetensors", source), tmp_path / "b.safetensors", "comfy", arch="flux")
    found = delta(load_file(tmp_path / "b.safetensors"), "diffusion_model.single_blocks.0.linear1")
    assert torch.equal(found, torch.cat([delta(source, f"{SINGLE}.{name}") for name in parts]))


def test_grouped_query_rows(tmp_path: Path) -> None:
    """Lumina2 rows 24 + 8 + 8: a dense up is cut, the down shared; the way back has rank 4 again (C13, C15)."""
    stem = "lora_unet_layers_0_attention_qkv"
    source = {**lora(stem, (40, 24)), **lora("lora_unet_layers_0_adaLN_modulation_1", (96, 10))}
    path = save(tmp_path / "a.safetensors", source)
    convert(path, tmp_path / "b.safetensors", "diffusers")
    split = load_file(tmp_path / "b.safetensors")
    whole = delta(source, stem)
    for name, rows in (("to_q", slice(0, 24)), ("to_k", slice(24, 32)), ("to_v", slice(32, 40))):
        assert torch.equal(delta(split, f"transformer.layers.0.attn.{name}"), whole[rows])
    convert(tmp_path / "b.safetensors", tmp_path / "c.safetensors", "kohya")
    back = load_file(tmp_path / "c.safetensors")
    assert back.keys() == source.keys()
    assert all(torch.equal(back[key], source[key]) for key in source)


# ----------------------------------------------------------------------------------------------------------------- C5: halves


FINAL = "final_layer.adaLN_modulation.1"


def _factors(**shapes: tuple[int, ...]) -> Tensors:
    return {f"{FINAL}.{leaf}": noise(leaf, shape).float() for leaf, shape in shapes.items()}


HALVES: dict[str, Tensors] = {
    "lora": lora(FINAL, (2 * H, H)),
    "dense": _factors(diff=(2 * H, H), diff_b=(2 * H,)),
    "loha": _factors(hada_w1_a=(2 * H, 4), hada_w1_b=(4, H), hada_w2_a=(2 * H, 4), hada_w2_b=(4, H)),
    "lokr": _factors(lokr_w1=(4, 4), lokr_w2=(8, 4)),
}


def dense_of(kind: str, tensors: Mapping[str, torch.Tensor]) -> torch.Tensor:
    stems = ("adaLN_modulation_1.", "adaLN_modulation.1.", "norm_out_linear.")
    by_leaf = {key.split(stem)[1]: tensor.double() for key, tensor in tensors.items() for stem in stems if stem in key}
    if kind == "lora":
        return (2.0 / 4.0) * by_leaf["lora_up.weight"] @ by_leaf["lora_down.weight"]
    if kind == "dense":
        return by_leaf["diff"]
    if kind == "loha":
        return (by_leaf["hada_w1_a"] @ by_leaf["hada_w1_b"]) * (by_leaf["hada_w2_a"] @ by_leaf["hada_w2_b"])
    return torch.kron(by_leaf["lokr_w1"], by_leaf["lokr_w2"])


@pytest.mark.parametrize("kind", HALVES)
@pytest.mark.parametrize("arch", ["flux", "sd3"])
def test_halves_are_exchanged_in_output_rows_alone(kind: str, arch: str, tmp_path: Path) -> None:
    """shift, scale in the original; scale, shift in diffusers. Twice is the identity; the inputs never move."""
    keep = lora(
        "diffusion_model.double_blocks.0.img_mod.lin" if arch == "flux" else "diffusion_model.joint_blocks.0.x_block.mlp.fc1", (96, H)
    )
    source = {f"diffusion_model.{key}": tensor for key, tensor in HALVES[kind].items()} | keep
    path = save(tmp_path / "a.safetensors", source)
    convert(path, tmp_path / "b.safetensors", "lycoris", arch=arch)
    there = {key: tensor for key, tensor in load_file(tmp_path / "b.safetensors").items() if "norm_out" in key}
    before, after = dense_of(kind, {k: v for k, v in source.items() if "final" in k}), dense_of(kind, there)
    assert torch.equal(after, torch.cat([before[H:], before[:H]]))
    if kind == "dense":
        bias = source["diffusion_model.final_layer.adaLN_modulation.1.diff_b"]
        assert torch.equal(there["lycoris_norm_out_linear.diff_b"], torch.cat([bias[H:], bias[:H]]))
    convert(tmp_path / "b.safetensors", tmp_path / "c.safetensors", "comfy", arch=arch)
    back = load_file(tmp_path / "c.safetensors")
    assert back.keys() == source.keys()
    assert all(torch.equal(back[key], source[key]) for key in source)


@pytest.mark.parametrize(
    ("arch", "orig", "diff", "out", "in_"),
    [
        ("lumina2", "diffusion_model.final_layer.adaLN_modulation.1", "lycoris_norm_out_linear_1", 24, 10),
        ("flux", "diffusion_model.double_blocks.0.img_mod.lin", "lycoris_transformer_blocks_0_norm1_linear", 96, 16),
        (
            "sd3",
            "diffusion_model.joint_blocks.0.context_block.adaLN_modulation.1",
            "lycoris_transformer_blocks_0_norm1_context_linear",
            96,
            16,
        ),
    ],
)
def test_where_nothing_is_exchanged(arch: str, orig: str, diff: str, out: int, in_: int, tmp_path: Path) -> None:
    source = lora(orig, (out, in_))
    convert(save(tmp_path / "a.safetensors", source), tmp_path / "b.safetensors", "lycoris", arch=arch)
    assert torch.equal(delta(load_file(tmp_path / "b.safetensors"), diff), delta(source, orig))


def test_the_last_context_block_of_sd3_is_exchanged(tmp_path: Path) -> None:
    """Two parts of modulation instead of six: told by the shape."""
    orig = "diffusion_model.joint_blocks.1.context_block.adaLN_modulation.1"
    source = {**lora("diffusion_model.joint_blocks.1.x_block.attn.qkv", (48, 16)), **lora(orig, (32, 16))}
    convert(save(tmp_path / "a.safetensors", source), tmp_path / "b.safetensors", "diffusers", arch="sd3")
    found = delta(load_file(tmp_path / "b.safetensors"), "transformer.transformer_blocks.1.norm1_context.linear")
    assert torch.equal(found, torch.roll(delta(source, orig), 16, 0))


# --------------------------------------------------------------------------------------------------------------- PEFT folders


def test_two_encoders_have_a_folder_each(tmp_path: Path) -> None:
    """Both name their modules alike; PEFT's own keys stand in each file, and nothing is lost between them."""
    te = "text_model_encoder_layers_0_self_attn_q_proj"
    tensors = {
        **lora("lora_unet_input_blocks_4_1_transformer_blocks_1_attn2_to_k", (16, 24)),
        **lora(f"lora_te1_{te}", (12, 12)),
        **lora(f"lora_te2_{te}", (20, 20), rank=8),
    }
    convert(save(tmp_path / "a.safetensors", tensors), tmp_path / "b", "peft", arch="sdxl")
    name = "base_model.model.text_model.encoder.layers.0.self_attn.q_proj"
    for folder, stem, rank in (("text_encoder", f"lora_te1_{te}", 4), ("text_encoder_2", f"lora_te2_{te}", 8)):
        found = load_file(tmp_path / "b" / folder / "adapter_model.safetensors")
        config: dict[str, Any] = json.loads((tmp_path / "b" / folder / "adapter_config.json").read_text())
        assert set(found) == {f"{name}.lora_A.weight", f"{name}.lora_B.weight"}
        assert config["r"] == rank
        (target,) = config["target_modules"]
        assert name.endswith("." + target)
        scale = config["lora_alpha"] / config["r"]
        assert torch.equal(scale * delta(found, name), delta(tensors, stem))
    assert (tmp_path / "b" / "unet" / "adapter_config.json").is_file()
    convert(tmp_path / "b", tmp_path / "c.safetensors", "kohya", arch="sdxl")
    back = load_file(tmp_path / "c.safetensors")
    assert back.keys() == tensors.keys()
    assert all(torch.equal(back[key], tensors[key]) for key in tensors)


def test_a_config_says_what_the_tensors_say(tmp_path: Path) -> None:
    """Mixed ranks and alphas as anchored patterns that match their own module alone."""
    base = "lora_unet_up_blocks_3_attentions_0_"
    tensors = {
        **lora(f"{base}proj_in", (16, 16, 1, 1), rank=4, alpha=2.0),
        **lora(f"{base}transformer_blocks_0_attn1_to_q", (16, 16), rank=8, alpha=8.0),
        **lora(f"{base}transformer_blocks_0_attn2_to_q", (16, 16), rank=4, alpha=2.0),
    }
    convert(save(tmp_path / "a.safetensors", tensors), tmp_path / "b", "peft")
    config = json.loads((tmp_path / "b" / "adapter_config.json").read_text())
    assert (config["peft_type"], config["r"], config["lora_alpha"]) == ("LORA", 4, 2)
    (rank_pattern,), (alpha_pattern,) = config["rank_pattern"].items(), config["alpha_pattern"].items()
    assert rank_pattern == (alpha_pattern[0], 8)
    assert alpha_pattern[1] == 8
    assert config["use_rslora"] is False
    assert config["bias"] == "none"


# -------------------------------------------------------------------------------------------------------------- what is refused


def test_refusals_are_listed_together(tmp_path: Path) -> None:
    """Every site that xlabs cannot spell, not the first one."""
    source = flux(lora(f"{SINGLE}.proj_out", (H, 56), scheme="peft"), lora(f"{DOUBLE}.attn.to_q", (H, H), scheme="peft"))
    error = refusal(convert, save(tmp_path / "a.safetensors", source), tmp_path / "b.safetensors", "xlabs", arch="flux")
    assert error.exit_code == 3
    assert "norm1.linear" in told(error)
    assert "single_transformer_blocks.0.proj_out" in told(error)
    assert not (tmp_path / "b.safetensors").exists()


@pytest.mark.parametrize("dialect", [name for name, dialect in DIALECTS.items() if not dialect.writable])
def test_dialects_that_cannot_be_written_say_why(dialect: str, tmp_path: Path) -> None:
    source = save(tmp_path / "a.safetensors", lora("lora_unet_up_blocks_3_attentions_0_proj_in", (16, 16, 1, 1)))
    error = refusal(convert, source, tmp_path / "b.safetensors", dialect)
    assert error.exit_code == 3
    assert DIALECTS[dialect].notes in told(error)


# ------------------------------------------------------------------------------------------------------------- C19: pure functions


def test_inputs_stay_and_outputs_share_nothing(tmp_path: Path) -> None:
    """Planning and computing change no input tensor; no two outputs share storage (diffusers does both)."""
    source = flux(
        lora(f"{DOUBLE}.attn.to_q", (H, H), alpha=3.0, scheme="peft"), lora(f"{DOUBLE}.attn.to_k", (H, H), alpha=None, scheme="peft")
    )
    path = save(tmp_path / "a.safetensors", source)
    before = path.read_bytes()
    for dialect in ("kohya", "comfy", "diffusers-dot", "omi"):
        made = plan(read(path, arch="flux"), registry()["flux"], dialect)
        loaded = {key: tensor.load() for key, tensor in made.tensors.items()}
        assert len({tensor.untyped_storage().data_ptr() for tensor in loaded.values()}) == len(loaded)
        again = {key: tensor.load() for key, tensor in made.tensors.items()}
        for tensor in loaded.values():
            tensor.zero_()
        assert all(torch.equal(again[key], made.tensors[key].load()) for key in again)
    assert path.read_bytes() == before


def test_no_output_name_is_used_twice(tmp_path: Path) -> None:
    source = flux(*(lora(f"{DOUBLE}.attn.{name}", (H, H), scheme="peft") for name in ("to_q", "to_k", "to_v", "to_out.0", "to_add_out")))
    path = save(tmp_path / "a.safetensors", source)
    for dialect in ("kohya", "kohya-diffusers", "lycoris", "comfy", "peft", "onetrainer", "omi"):
        made = plan(read(path, arch="flux"), registry()["flux"], dialect)
        assert sum(len(written.keys) for written in made.modules) == len(made.tensors)
