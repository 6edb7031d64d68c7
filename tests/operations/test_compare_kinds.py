"""compare on kinds beside plain LoRA: what determines their function is compared, with the base model's weights unknown."""

from __future__ import annotations

import pytest
import torch

from loratools.errors import InputError
from loratools.operations.compare import compare
from tests.operations.made import ATTENTION, CONV, FF, SHAPES, Make, Save, factors, kohya, written

H = 24  # width of a Flux whose qkv is fused

KINDS: dict[str, tuple[str, dict[str, tuple[int, ...]], str]] = {  # site, leaves, a leaf whose change must be seen
    "bias": (ATTENTION, {"lora_down.weight": (4, 16), "lora_up.weight": (16, 4), "diff_b": (16,)}, "diff_b"),
    "dora": (ATTENTION, {"lora_down.weight": (4, 16), "lora_up.weight": (16, 4), "dora_scale": (16, 1)}, "dora_scale"),
    "dora up": (ATTENTION, {"lora_down.weight": (4, 16), "lora_up.weight": (16, 4), "dora_scale": (16, 1)}, "lora_up.weight"),
    "loha": (ATTENTION, {"hada_w1_a": (16, 2), "hada_w1_b": (2, 16), "hada_w2_a": (16, 2), "hada_w2_b": (2, 16)}, "hada_w2_a"),
    "lokr": (ATTENTION, {"lokr_w1": (4, 4), "lokr_w2_a": (4, 2), "lokr_w2_b": (2, 4)}, "lokr_w2_b"),
    "tucker": (
        CONV,
        {"lora_down.weight": (4, 32, 1, 1), "lora_mid.weight": (4, 4, 3, 3), "lora_up.weight": (16, 4, 1, 1)},
        "lora_mid.weight",
    ),
    "full": (ATTENTION, {"diff": (16, 16), "diff_b": (16,)}, "diff"),
    "norm": ("up_blocks.3.resnets.0.norm1", {"w_norm": (32,), "b_norm": (32,)}, "b_norm"),
    "oft": (ATTENTION, {"oft_blocks": (4, 4, 4)}, "oft_blocks"),
    "boft": (ATTENTION, {"oft_blocks": (2, 4, 4, 4)}, "oft_blocks"),
    "ia3": (ATTENTION, {"weight": (16,), "on_input": ()}, "weight"),
    "glora": (ATTENTION, {"a1.weight": (16, 2), "a2.weight": (2, 16), "b1.weight": (16, 2), "b2.weight": (2, 16)}, "a1.weight"),
}


@pytest.mark.parametrize("name", KINDS)
def test_every_kind_equals_itself_and_not_a_changed_one(name: str, save: Save, randn: Make) -> None:
    path, leaves, changed = KINDS[name]
    tensors = {f"{kohya(path)}.{leaf}": randn(*shape) if shape else torch.tensor(False) for leaf, shape in leaves.items()}
    anchor = written(kohya(FF), *factors(randn, SHAPES[FF]))
    a = save("a.safetensors", {**anchor, **tensors})
    assert compare(a, save("same.safetensors", {**anchor, **{key: tensor.clone() for key, tensor in tensors.items()}}), arch="sd1")["equal"]
    key = f"{kohya(path)}.{changed}"
    other = compare(a, save("other.safetensors", {**anchor, **tensors, key: tensors[key] * 1.01}), arch="sd1")
    assert not other["equal"]
    assert other["worst"][0]["site"] == f"denoiser.{path}"


def test_a_large_magnitude_does_not_hide_a_small_change(save: Save, randn: Make) -> None:
    """A DoRA magnitude is as large as the weight's rows; ΔW is small beside it and still has to be right."""
    up, down = factors(randn, SHAPES[ATTENTION])
    scale = torch.full((16, 1), 100.0)
    a = {**written(kohya(ATTENTION), up * 1e-3, down), f"{kohya(ATTENTION)}.dora_scale": scale}
    b = {**written(kohya(ATTENTION), up * 1.01e-3, down), f"{kohya(ATTENTION)}.dora_scale": scale}
    result = compare(save("a.safetensors", a), save("b.safetensors", b), arch="sd1")
    assert not result["equal"]
    assert result["max_relative_error"] == pytest.approx(0.01, rel=1e-3)


def test_kinds_of_one_function_are_equal(save: Save, randn: Make) -> None:
    """LoHa, LoKr, Tucker and a full delta against the LoRA of the same dense delta."""
    loha = {leaf: randn(*shape) for leaf, shape in KINDS["loha"][1].items()}
    product = 0.5 * (loha["hada_w1_a"].double() @ loha["hada_w1_b"].double()) * (loha["hada_w2_a"].double() @ loha["hada_w2_b"].double())
    lokr = {leaf: randn(*shape) for leaf, shape in KINDS["lokr"][1].items()}
    kron = 0.5 * torch.kron(lokr["lokr_w1"].double(), lokr["lokr_w2_a"].double() @ lokr["lokr_w2_b"].double())
    for leaves, delta in ((loha, product), (lokr, kron)):
        left, values, right = torch.linalg.svd(delta)
        plain = written(kohya(ATTENTION), left * values, right, None)
        special = {f"{kohya(ATTENTION)}.{leaf}": tensor for leaf, tensor in leaves.items()} | {
            f"{kohya(ATTENTION)}.alpha": torch.tensor(1.0)
        }
        full = {f"{kohya(ATTENTION)}.diff": delta}
        for other in (plain, full):
            result = compare(save("a.safetensors", special), save("b.safetensors", other), arch="sd1")
            assert result["equal"]
            assert result["max_relative_error"] < 1e-12
            assert result["cosine"] == pytest.approx(1.0)


def test_a_lora_is_no_dora(save: Save, randn: Make) -> None:
    tensors = written(kohya(ATTENTION), *factors(randn, SHAPES[ATTENTION]))
    dora = {**tensors, f"{kohya(ATTENTION)}.dora_scale": torch.ones(16, 1)}
    assert not compare(save("a.safetensors", tensors), save("b.safetensors", dora), arch="sd1")["equal"]


FUSED: dict[str, dict[str, tuple[int, ...]]] = {  # qkv of Flux, 72 x 24, in kinds that no split into three keeps exact
    "dora on the in axis": {"lora_down.weight": (4, H), "lora_up.weight": (3 * H, 4), "dora_scale": (1, H)},
    "lokr across the parts": {"lokr_w1": (2, 2), "lokr_w2": (36, 12)},
    "boft": {"oft_blocks": (2, 6, 12, 12)},
    "oft across the parts": {"oft_blocks": (2, 36, 36)},
}


@pytest.mark.parametrize("kind", FUSED)
def test_fused_modules_need_no_split_where_both_files_fuse_them(kind: str, save: Save, randn: Make) -> None:
    mod = written("lora_unet_double_blocks_0_img_mod_lin", randn(6 * H, 2), randn(2, H))
    stem = "lora_unet_double_blocks_0_img_attn_qkv"
    tensors = {f"{stem}.{leaf}": randn(*shape) for leaf, shape in FUSED[kind].items()}
    a = save("a.safetensors", {**mod, **tensors})
    assert compare(a, a)["equal"]
    key, tensor = next(iter(tensors.items()))
    other = compare(a, save("b.safetensors", {**mod, **tensors, key: tensor * 1.01}))
    assert not other["equal"]
    assert ".attn.to_" in other["worst"][0]["site"]


def test_a_fused_lokr_equals_its_dense_parts(save: Save, randn: Make) -> None:
    """w2 has 36 rows, q has 24: no LoKr for each, but one delta. A rotation of all rows has no parts at all."""
    mod = written("lora_unet_double_blocks_0_img_mod_lin", randn(6 * H, 2), randn(2, H))
    w1, w2 = randn(2, 2), randn(36, 12)
    stem = "lora_unet_double_blocks_0_img_attn_qkv"
    a = save("a.safetensors", {**mod, f"{stem}.lokr_w1": w1, f"{stem}.lokr_w2": w2})
    delta = torch.kron(w1.double(), w2.double())
    path = "lora_unet_transformer_blocks_0_attn_to_{}.diff"
    split = {path.format(part): delta[number * H : (number + 1) * H].clone() for number, part in enumerate("qkv")}
    b = save("b.safetensors", {**mod, **split})
    result = compare(a, b, arch="flux")
    assert (result["equal"], result["sites"]) == (True, 4)
    rotated = save("c.safetensors", {**mod, f"{stem}.oft_blocks": randn(2, 6, 12, 12)})
    with pytest.raises(InputError) as caught:
        compare(rotated, b, arch="flux")
    assert len(caught.value.details) == 3
