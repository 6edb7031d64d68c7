"""Kinds beyond plain LoRA in a conversion: kept where the dialect holds them, turned into LoRA exactly on request, else refused."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from loratools.operations.convert import convert
from tests.mapping.builders import Tensors, lora, noise, refusal, save, told

BLOCK = "lora_unet_up_blocks_3_attentions_0_"
PROJ = lora(f"{BLOCK}proj_in", (16, 16, 1, 1))
Q = f"{BLOCK}transformer_blocks_0_attn1_to_q"
CONV = "lora_unet_up_blocks_3_resnets_0_conv1"
NORM = "lora_unet_up_blocks_3_resnets_0_norm1"
COMFY_Q = "diffusion_model.output_blocks.9.1.transformer_blocks.0.attn1.to_q"


def made(stem: str, size: float = 0.1, **shapes: tuple[int, ...]) -> Tensors:
    """float64 factors: exact algebra is then exact to 1e-12."""
    return {f"{stem}.{leaf.replace('__', '.')}": noise(stem + leaf, shape, size) for leaf, shape in shapes.items()}


def wide(tensors: Tensors) -> Tensors:
    return {key: tensor.double() if tensor.is_floating_point() else tensor for key, tensor in tensors.items()}


def product(tensors: Mapping[str, torch.Tensor], stem: str) -> torch.Tensor:
    """The dense delta of a plain LoRA as a matrix."""
    up, down = tensors[f"{stem}.lora_up.weight"].double().flatten(1), tensors[f"{stem}.lora_down.weight"].double()
    alpha = tensors.get(f"{stem}.alpha")
    return (1.0 if alpha is None else float(alpha) / len(down)) * up @ down.flatten(1)


def rel(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


# ------------------------------------------------------------------------------------------------------------ C8: --kind lora


def loha(stem: str, alpha: float | None) -> tuple[Tensors, torch.Tensor, int]:
    tensors = made(stem, hada_w1_a=(16, 4), hada_w1_b=(4, 16), hada_w2_a=(16, 3), hada_w2_b=(3, 16))
    f = {key.rpartition(".")[2]: tensor for key, tensor in tensors.items()}
    scale = 1.0 if alpha is None else alpha / 4
    return _with(stem, tensors, alpha), scale * (f["hada_w1_a"] @ f["hada_w1_b"]) * (f["hada_w2_a"] @ f["hada_w2_b"]), 12


def lokr(stem: str, alpha: float | None) -> tuple[Tensors, torch.Tensor, int]:
    """A full 4x4 and a factorised 4x4 of rank 2: the Kronecker product has rank 8."""
    tensors = made(stem, lokr_w1=(4, 4), lokr_w2_a=(4, 2), lokr_w2_b=(2, 4))
    f = {key.rpartition(".")[2]: tensor for key, tensor in tensors.items()}
    scale = 1.0 if alpha is None else alpha / 2
    return _with(stem, tensors, alpha), scale * torch.kron(f["lokr_w1"], f["lokr_w2_a"] @ f["lokr_w2_b"]), 8


def lokr_full(stem: str, alpha: float | None) -> tuple[Tensors, torch.Tensor, int]:
    """Two full factors: alpha is stored and means nothing (C9)."""
    tensors = made(stem, lokr_w1=(4, 4), lokr_w2=(4, 4))
    f = {key.rpartition(".")[2]: tensor for key, tensor in tensors.items()}
    return _with(stem, tensors, alpha), torch.kron(f["lokr_w1"], f["lokr_w2"]), 16


def _with(stem: str, tensors: Tensors, alpha: float | None) -> Tensors:
    return tensors if alpha is None else {**tensors, f"{stem}.alpha": torch.tensor(alpha, dtype=torch.float64)}


@pytest.mark.parametrize("make", [loha, lokr, lokr_full])
@pytest.mark.parametrize("alpha", [None, 2.0, 1.4])
def test_kind_lora_is_exact(make: object, alpha: float | None, tmp_path: Path) -> None:
    """Khatri-Rao and Kronecker products, not an SVD: the rank is that of the algebra, the delta that of float64."""
    tensors, expected, rank = make(Q, alpha)  # type: ignore[operator]
    path = save(tmp_path / "a.safetensors", {**wide(PROJ), **tensors})
    result = convert(path, tmp_path / "b.safetensors", "kohya", kind="lora")
    found = load_file(tmp_path / "b.safetensors")
    assert rel(product(found, Q), expected) <= 1e-6
    assert found[f"{Q}.lora_down.weight"].shape[0] <= rank
    assert torch.linalg.matrix_rank(product(found, Q)) <= rank
    assert result["exact"] is True
    assert not any("hada" in key or "lokr" in key for key in found)


def tucker(alpha: float = 2.0) -> tuple[Tensors, torch.Tensor]:
    tensors = made(CONV, lora_up__weight=(16, 4, 1, 1), lora_mid__weight=(4, 4, 3, 3), lora_down__weight=(4, 32, 1, 1))
    up, mid, down = (tensors[f"{CONV}.lora_{side}.weight"] for side in ("up", "mid", "down"))
    dense = alpha / 4 * torch.einsum("op,pqhw,qi->oihw", up.flatten(1), mid, down.flatten(1))
    return {**tensors, f"{CONV}.alpha": torch.tensor(alpha)}, dense


@pytest.mark.parametrize(("dialect", "kind"), [("kohya", "lora"), ("diffusers", None), ("peft", None)])
def test_tucker_keeps_its_rank(dialect: str, kind: str | None, tmp_path: Path) -> None:
    """The core is worked into down, which keeps rank 4; asked for, or where the dialect has no core."""
    tensors, expected = tucker()
    path = save(tmp_path / "a.safetensors", {**wide(PROJ), **tensors})
    target = tmp_path / ("b" if dialect == "peft" else "b.safetensors")
    convert(path, target, dialect, kind=kind)
    found = load_file(target / "adapter_model.safetensors" if dialect == "peft" else target)
    up, down, scale = _lora_of(found, dialect)
    assert down.shape == (4, 32, 3, 3)
    if dialect == "peft":
        config = json.loads((target / "adapter_config.json").read_text())
        scale = config["lora_alpha"] / config["r"]
    assert rel(scale * up.double().flatten(1) @ down.double().flatten(1), expected.flatten(1)) <= 1e-6


def _lora_of(found: Mapping[str, torch.Tensor], dialect: str) -> tuple[torch.Tensor, torch.Tensor, float]:
    stem = {"kohya": CONV, "diffusers": "unet.up_blocks.3.resnets.0.conv1", "peft": "base_model.model.up_blocks.3.resnets.0.conv1"}[dialect]
    names = ("lora_up", "lora_down") if dialect == "kohya" else ("lora_B", "lora_A")
    up, down = (found[f"{stem}.{name}.weight"] for name in names)
    alpha = found.get(f"{stem}.alpha")
    return up, down, 1.0 if alpha is None else float(alpha) / len(down)


# ------------------------------------------------------------------------------------------------------------ C6: DoRA's axis


def dora(axis: str) -> Tensors:
    shape = (16, 1) if axis == "out" else (1, 16)
    return {**PROJ, **lora(Q, (16, 16)), f"{Q}.dora_scale": (1 + noise("m", shape)).float()}


def test_out_axis_dora_to_peft_and_back(tmp_path: Path) -> None:
    """A module of 16 x 16, where a wrong axis would be no shape error. PROJ goes without: PEFT has one kind a component."""
    tensors = {key: tensor for key, tensor in dora("out").items() if key.startswith(Q)}
    path = save(tmp_path / "a.safetensors", tensors)
    convert(path, tmp_path / "b", "peft", arch="sd1")
    found = load_file(tmp_path / "b" / "adapter_model.safetensors")
    (magnitude,) = (tensor for key, tensor in found.items() if "magnitude" in key)
    assert torch.equal(magnitude, tensors[f"{Q}.dora_scale"].flatten())
    assert magnitude.shape == (16,)
    assert json.loads((tmp_path / "b" / "adapter_config.json").read_text())["use_dora"] is True
    convert(tmp_path / "b", tmp_path / "c.safetensors", "kohya", arch="sd1")
    back = load_file(tmp_path / "c.safetensors")
    assert back.keys() == tensors.keys()
    assert all(torch.equal(back[key], tensors[key]) for key in tensors)


@pytest.mark.parametrize("dialect", ["peft", "diffusers"])
def test_in_axis_dora_is_refused_where_magnitudes_are_of_outputs(dialect: str, tmp_path: Path) -> None:
    path = save(tmp_path / "a.safetensors", dora("in"))
    error = refusal(convert, path, tmp_path / "b", dialect)
    assert error.exit_code == 3
    assert "attn1.to_q" in told(error)
    assert not (tmp_path / "b").exists()


@pytest.mark.parametrize("axis", ["in", "out"])
def test_dora_is_renamed_with_its_axis(axis: str, tmp_path: Path) -> None:
    tensors = dora(axis)
    convert(save(tmp_path / "a.safetensors", tensors), tmp_path / "b.safetensors", "comfy")
    assert torch.equal(load_file(tmp_path / "b.safetensors")[f"{COMFY_Q}.dora_scale"], tensors[f"{Q}.dora_scale"])


def test_in_axis_dora_is_not_cut_or_joined(tmp_path: Path) -> None:
    """The norm of a column couples the parts of a fused module."""
    stem = "lora_unet_double_blocks_0_img_attn_qkv"
    tensors = {**lora(stem, (48, 16)), f"{stem}.dora_scale": torch.ones(1, 16)}
    path = save(tmp_path / "a.safetensors", tensors)
    error = refusal(convert, path, tmp_path / "b.safetensors", "onetrainer", arch="flux")
    assert error.exit_code == 3
    assert "to_q" in told(error)
    out_axis = save(tmp_path / "c.safetensors", {**lora(stem, (48, 16)), f"{stem}.dora_scale": (1 + noise("m", (48, 1))).float()})
    convert(out_axis, tmp_path / "d.safetensors", "onetrainer", arch="flux")
    found = load_file(tmp_path / "d.safetensors")
    cut = [found[f"lora_transformer_transformer_blocks_0_attn_to_{name}.dora_scale"] for name in "qkv"]
    assert torch.equal(torch.cat(cut), load_file(out_axis)[f"{stem}.dora_scale"])


def test_dora_of_a_lokr_is_nothing_peft_knows(tmp_path: Path) -> None:
    tensors = {**made(Q, lokr_w1=(4, 4), lokr_w2=(4, 4)), f"{Q}.dora_scale": torch.ones(16, 1, dtype=torch.float64)}
    error = refusal(convert, save(tmp_path / "a.safetensors", tensors), tmp_path / "b", "peft", arch="sd1")
    assert error.exit_code == 3
    assert "attn1.to_q" in told(error)


@pytest.mark.parametrize("dialect", ["diffusers-dot", "diffusers-legacy", "thelastben", "xlabs"])
def test_dora_is_never_written_as_a_plain_lora(dialect: str, tmp_path: Path) -> None:
    """C7: a reader without magnitudes would apply another function."""
    stem = (
        "transformer.transformer_blocks.0.attn.to_q"
        if dialect in ("thelastben", "xlabs")
        else "unet.up_blocks.3.attentions.0.transformer_blocks.0.attn1.to_q"
    )
    tensors = {**lora(stem, (16, 16), alpha=None, scheme="peft"), f"{stem}.lora_magnitude_vector": torch.ones(16)}
    path = save(tmp_path / "a.safetensors", tensors)
    error = refusal(convert, path, tmp_path / "b.safetensors", dialect, arch="flux" if "transformer." in stem[:12] else "sd1")
    assert error.exit_code == 3
    assert not (tmp_path / "b.safetensors").exists()


# ----------------------------------------------------------------------------------------------------- C9: LoKr of two full factors


def test_full_lokr_to_peft_and_back(tmp_path: Path) -> None:
    """alpha 4 means nothing here and alpha / r in PEFT: what PEFT computes is the Kronecker product, and it comes back as it was."""
    tensors = {**{k: v.float() for k, v in made(Q, lokr_w1=(4, 4), lokr_w2=(4, 4)).items()}, f"{Q}.alpha": torch.tensor(4.0)}
    expected = torch.kron(tensors[f"{Q}.lokr_w1"].double(), tensors[f"{Q}.lokr_w2"].double())
    path = save(tmp_path / "a.safetensors", tensors)
    convert(path, tmp_path / "b", "peft", arch="sd1")
    config = json.loads((tmp_path / "b" / "adapter_config.json").read_text())
    found = load_file(tmp_path / "b" / "adapter_model.safetensors")
    one, two = (next(tensor for key, tensor in found.items() if key.endswith(leaf)) for leaf in ("lokr_w1", "lokr_w2"))
    assert config["peft_type"] == "LOKR"
    assert torch.equal(config["alpha"] / config["r"] * torch.kron(one.double(), two.double()), expected)
    convert(tmp_path / "b", tmp_path / "c.safetensors", "kohya", arch="sd1")
    back = load_file(tmp_path / "c.safetensors")
    assert back.keys() == tensors.keys()
    assert all(torch.equal(back[key], tensors[key]) for key in tensors)


def test_peft_scales_a_full_lokr_and_kohya_does_not(tmp_path: Path) -> None:
    """A PEFT file with alpha 2 r: the factor 2 must go into the numbers."""
    folder = tmp_path / "a"
    folder.mkdir()
    stem = "base_model.model.up_blocks.3.attentions.0.transformer_blocks.0.attn1.to_q"
    tensors = {k: v.float() for k, v in made(stem, lokr_w1=(4, 4), lokr_w2=(4, 4)).items()}
    save(folder / "adapter_model.safetensors", tensors)
    (folder / "adapter_config.json").write_text(json.dumps({"peft_type": "LOKR", "r": 8, "alpha": 16}))
    convert(folder, tmp_path / "b.safetensors", "kohya", arch="sd1")
    found = load_file(tmp_path / "b.safetensors")
    dense = torch.kron(found[f"{Q}.lokr_w1"].double(), found[f"{Q}.lokr_w2"].double())
    assert torch.equal(dense, 2 * torch.kron(tensors[f"{stem}.lokr_w1"].double(), tensors[f"{stem}.lokr_w2"].double()))


# --------------------------------------------------------------------------------------------------------- C10: dense entries


def dense_file() -> Tensors:
    return {
        **PROJ,
        **lora(Q, (16, 16)),
        f"{Q}.diff_b": noise("b", (16,)).float(),
        f"{CONV}.diff": noise("d", (16, 32, 3, 3)).float(),
        f"{CONV}.diff_b": noise("e", (16,)).float(),
        f"{NORM}.w_norm": noise("w", (32,)).float(),
        f"{NORM}.b_norm": noise("n", (32,)).float(),
    }


def test_dense_deltas_are_first_class(tmp_path: Path) -> None:
    tensors = dense_file()
    convert(save(tmp_path / "a.safetensors", tensors), tmp_path / "b.safetensors", "comfy")
    found = load_file(tmp_path / "b.safetensors")
    block = "diffusion_model.output_blocks.9.0.in_layers"
    for key, expected in (
        (f"{COMFY_Q}.diff_b", f"{Q}.diff_b"),
        (f"{block}.2.diff", f"{CONV}.diff"),
        (f"{block}.2.diff_b", f"{CONV}.diff_b"),
        (f"{block}.0.diff", f"{NORM}.w_norm"),
        (f"{block}.0.diff_b", f"{NORM}.b_norm"),
    ):
        assert torch.equal(found[key], tensors[expected]), key
    convert(tmp_path / "b.safetensors", tmp_path / "c.safetensors", "kohya")
    back = load_file(tmp_path / "c.safetensors")
    assert back.keys() == tensors.keys()
    assert all(torch.equal(back[key], tensors[key]) for key in tensors)


@pytest.mark.parametrize("dialect", ["peft", "diffusers", "diffusers-dot"])
def test_dense_deltas_are_refused_by_name(dialect: str, tmp_path: Path) -> None:
    error = refusal(convert, save(tmp_path / "a.safetensors", dense_file()), tmp_path / "b", dialect)
    assert error.exit_code == 3
    for site in ("attn1.to_q", "resnets.0.conv1", "resnets.0.norm1"):
        assert site in told(error)
    assert not (tmp_path / "b").exists()


def test_a_bias_of_lora_b_is_scaled_into_a_bias_delta(tmp_path: Path) -> None:
    """PEFT adds scale * lora_B.bias; ComfyUI's diff_b is added as it is."""
    folder = tmp_path / "a"
    folder.mkdir()
    stem = "base_model.model.up_blocks.3.attentions.0.transformer_blocks.0.attn1.to_q"
    bias = noise("bias", (16,)).float()
    save(folder / "adapter_model.safetensors", {**lora(stem, (16, 16), alpha=None, scheme="peft"), f"{stem}.lora_B.bias": bias})
    (folder / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 4, "lora_alpha": 2, "lora_bias": True}))
    convert(folder, tmp_path / "b.safetensors", "comfy", arch="sd1")
    assert torch.equal(load_file(tmp_path / "b.safetensors")[f"{COMFY_Q}.diff_b"], bias * 0.5)


# --------------------------------------------------------------------------------------------- C16: 1x1 convolution or linear layer


@pytest.mark.parametrize("dialect", ["diffusers", "peft", "comfy", "onetrainer"])
def test_a_1x1_convolution_stored_both_ways(dialect: str, tmp_path: Path) -> None:
    """[4, 16] and [4, 16, 1, 1] are the same delta, and both are written as the convolution they belong to."""
    stem = f"{BLOCK}proj_in"
    flat = {key: tensor.flatten(1) if tensor.dim() > 2 else tensor for key, tensor in PROJ.items()}
    outputs = []
    for name, tensors in (("kernel", PROJ), ("matrix", flat)):
        target = tmp_path / f"{name}.{dialect}"
        convert(save(tmp_path / f"{name}.safetensors", tensors), target, dialect, arch="sd1")
        outputs.append(load_file(target / "adapter_model.safetensors" if dialect == "peft" else target))
    assert outputs[0].keys() == outputs[1].keys()
    assert all(torch.equal(outputs[0][key], outputs[1][key]) for key in outputs[0])
    same = tmp_path / "same.safetensors"
    convert(tmp_path / "matrix.safetensors", same, "kohya", arch="sd1")
    assert load_file(same)[f"{stem}.lora_down.weight"].shape == (4, 16)


# ------------------------------------------------------------------------------------------------------ C17: wrapper debris


@pytest.mark.parametrize("debris", ["_orig_mod.", "module.", "_orig_mod._orig_mod.", "module._orig_mod."])
def test_debris_is_repaired(debris: str, tmp_path: Path) -> None:
    clean = "unet.up_blocks.3.attentions.0.proj_in"
    tensors = lora(clean, (16, 16, 1, 1), alpha=None, scheme="peft")
    dirty = {key.replace("unet.", f"unet.{debris}"): tensor for key, tensor in tensors.items()}
    result = convert(save(tmp_path / "a.safetensors", dirty), tmp_path / "b.safetensors", "diffusers")
    found = load_file(tmp_path / "b.safetensors")
    assert found.keys() == tensors.keys()
    assert all(torch.equal(found[key], tensors[key]) for key in tensors)
    assert any("debris" in warning for warning in result["warnings"])


def test_adapter_names_are_debris_to_other_dialects(tmp_path: Path) -> None:
    stem = "base_model.model.model.layers.0.self_attn.q_proj"
    plain = lora(stem, (8, 8), alpha=None, scheme="peft")
    named = {key.replace(".weight", ".default.weight"): tensor for key, tensor in plain.items()}
    convert(save(tmp_path / "a.safetensors", named), tmp_path / "b", "peft", alpha=4.0)
    found = load_file(tmp_path / "b" / "adapter_model.safetensors")
    assert found.keys() == plain.keys()
    assert all(torch.equal(found[key], plain[key]) for key in plain)


# ---------------------------------------------------------------------------------------------- C20: kinds that multiply the base


MULTIPLY: dict[str, Tensors] = {
    "ia3": {f"{Q}.weight": (1 + noise("i", (16,))).float(), f"{Q}.on_input": torch.tensor(False)},
    "oft": {f"{Q}.oft_blocks": noise("o", (4, 4, 4), 0.02).float(), f"{Q}.alpha": torch.tensor(0.5)},
    "boft": {f"{Q}.oft_blocks": noise("o", (2, 4, 4, 4), 0.02).float(), f"{Q}.alpha": torch.tensor(0.5)},
    "glora": {k: v.float() for k, v in made(Q, a1__weight=(16, 4), a2__weight=(4, 16), b1__weight=(16, 4), b2__weight=(4, 16)).items()},
}


@pytest.mark.parametrize("kind", MULTIPLY)
def test_multiplicative_kinds_round_trip_and_are_refused_elsewhere(kind: str, tmp_path: Path) -> None:
    tensors = {**PROJ, **MULTIPLY[kind]}
    path = save(tmp_path / "a.safetensors", tensors)
    convert(path, tmp_path / "b.safetensors", "kohya")
    assert (tmp_path / "b.safetensors").read_bytes() == path.read_bytes()
    for dialect in ("diffusers", "peft", "diffusers-dot"):
        error = refusal(convert, path, tmp_path / "c", dialect)
        assert error.exit_code == 3
        assert "attn1.to_q" in told(error)
        assert not (tmp_path / "c").exists()
    convert(path, tmp_path / "d.safetensors", "omi")
    convert(tmp_path / "d.safetensors", tmp_path / "e.safetensors", "kohya")
    back = load_file(tmp_path / "e.safetensors")
    assert back.keys() == tensors.keys()
    assert all(torch.equal(back[key], tensors[key]) for key in tensors)


@pytest.mark.parametrize("alpha", [0.0, 1e-9, 100.0])
def test_an_oft_constraint_is_no_scale(alpha: float, tmp_path: Path) -> None:
    """0 is a valid constraint (none), and nothing is folded or divided by a rank on the way."""
    tensors = {**PROJ, f"{Q}.oft_blocks": MULTIPLY["oft"][f"{Q}.oft_blocks"], f"{Q}.alpha": torch.tensor(alpha)}
    convert(save(tmp_path / "a.safetensors", tensors), tmp_path / "b.safetensors", "comfy")
    found = load_file(tmp_path / "b.safetensors")
    assert float(found[f"{COMFY_Q}.alpha"]) == pytest.approx(alpha)
    assert torch.equal(found[f"{COMFY_Q}.oft_blocks"], tensors[f"{Q}.oft_blocks"])


def test_several_kinds_in_one_peft_component_are_refused(tmp_path: Path) -> None:
    """adapter_config.json has one peft_type: a LoRA beside a LoKr cannot be said there."""
    tensors = {**PROJ, **{k: v.float() for k, v in made(Q, lokr_w1=(4, 4), lokr_w2=(4, 4)).items()}}
    error = refusal(convert, save(tmp_path / "a.safetensors", tensors), tmp_path / "b", "peft")
    assert error.exit_code == 3
    assert not (tmp_path / "b").exists()
    convert(tmp_path / "a.safetensors", tmp_path / "b", "peft", kind="lora")
    assert (tmp_path / "b" / "adapter_config.json").is_file()
