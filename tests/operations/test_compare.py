"""compare on real files: the same function under other names is equal, another function is not, and the numbers are the dense ones.

Every expected number is computed here from dense float64 deltas.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from loratools.errors import AmbiguousError, InputError
from loratools.operations.compare import compare
from tests.operations.made import (
    ATTENTION,
    CONV,
    NATIVE,
    PROJ,
    SHAPES,
    Make,
    Save,
    dense,
    factors,
    four,
    kohya,
    kohya_file,
    written,
)

KEYS = {"equal", "max_relative_error", "sites", "only_in_a", "only_in_b", "worst", "cosine", "scale_ratio"}


def stacked(deltas: list[torch.Tensor]) -> torch.Tensor:
    return torch.cat([delta.flatten() for delta in deltas])


# --------------------------------------------------------------------------------------------------------------- equal files


def another_gauge(randn: Make, up: torch.Tensor, down: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(B G, G^-1 A) with a well-conditioned G: the same product from other factors."""
    rank = down.shape[0]
    turn = torch.linalg.qr(randn(rank, rank, dtype=torch.float64))[0] * torch.linspace(0.5, 2.0, rank, dtype=torch.float64)
    new_up = (up.double().flatten(1) @ turn).reshape(up.shape)
    new_down = torch.linalg.solve(turn, down.double().flatten(1)).reshape(down.shape)
    return new_up, new_down


def padded(up: torch.Tensor, down: torch.Tensor, more: int = 3) -> tuple[torch.Tensor, torch.Tensor]:
    """Rank `more` higher, the new columns of up zero."""
    return torch.cat([up, torch.zeros(up.shape[0], more, *up.shape[2:])], 1), torch.cat([down, torch.ones(more, *down.shape[1:])])


def test_a_file_is_itself(save: Save, randn: Make) -> None:
    path = save("a.safetensors", kohya_file(four(randn)))
    result = compare(path, path)
    assert (result["equal"], result["sites"], result["only_in_a"], result["only_in_b"]) == (True, 4, [], [])
    assert result["max_relative_error"] <= 1e-12
    assert (result["cosine"], result["scale_ratio"]) == pytest.approx((1.0, 1.0), abs=1e-12)


def test_another_gauge_is_equal(save: Save, randn: Make) -> None:
    """supermerger#118: tensor-wise comparison calls these different."""
    pairs = four(randn)
    other = {path: another_gauge(randn, *pair) for path, pair in pairs.items()}
    result = compare(save("a.safetensors", kohya_file(pairs)), save("b.safetensors", kohya_file(other)))
    assert result["equal"]
    assert result["max_relative_error"] < 1e-12  # float64 factors: only the arithmetic is left


def test_a_padded_rank_is_equal(save: Save, randn: Make) -> None:
    """Rank 4, alpha 2 and rank 7, alpha 3.5 have one scale."""
    pairs = four(randn)
    other = {path: padded(*pair) for path, pair in pairs.items()}
    result = compare(save("a.safetensors", kohya_file(pairs)), save("b.safetensors", kohya_file(other, 3.5)))
    assert result["equal"]
    assert result["max_relative_error"] < 1e-12


def test_another_dialect_is_equal(save: Save, randn: Make, peft: Any) -> None:
    """kohya with alpha 2, diffusers folded, PEFT with its config, ComfyUI with original names."""
    pairs = four(randn)
    a = save("a.safetensors", kohya_file(pairs))
    folded = {}
    for path, (up, down) in pairs.items():
        folded |= {f"unet.{path}.lora_A.weight": down, f"unet.{path}.lora_B.weight": up * 0.5}
    trained = {}
    for path, (up, down) in pairs.items():
        trained |= {f"base_model.model.{path}.lora_A.weight": down, f"base_model.model.{path}.lora_B.weight": up}
    comfy = {}
    for path, pair in pairs.items():
        comfy |= written(f"diffusion_model.{NATIVE[path]}", *pair)
    others = [
        save("b.safetensors", folded),
        peft("c", trained, {"r": 4, "lora_alpha": 2, "target_modules": list(pairs)}),
        save("d.safetensors", comfy),
    ]
    for other in others:
        result = compare(a, other)
        assert (result["equal"], result["sites"]) == (True, 4)
        assert result["max_relative_error"] < 1e-12


def test_a_1x1_convolution_as_matrix_and_as_kernel(save: Save, randn: Make) -> None:
    """[32, 640] and [32, 640, 1, 1] (diffusers#11286, kohya_ss#2653)."""
    up, down = factors(randn, SHAPES[PROJ])
    a = save("a.safetensors", written(kohya(PROJ), up, down))
    b = save("b.safetensors", written(kohya(PROJ), up.flatten(1), down.flatten(1)))
    c = save("c.safetensors", written(kohya(PROJ), up.flatten(1), down))
    for other in (b, c):
        assert compare(a, other, arch="sd1")["max_relative_error"] < 1e-14


H, MLP = 24, 96


@pytest.mark.parametrize("shared", [False, True])
def test_fused_and_split_are_equal(shared: bool, save: Save, randn: Make) -> None:
    """kohya's fused qkv, block-diagonal or of one down, against diffusers' three; final_layer's halves are exchanged there."""
    ranks = (2, 2, 2) if shared else (2, 4, 3)
    down = [randn(2, H)] * 3 if shared else [randn(rank, H) for rank in ranks]
    up = [randn(H, rank) for rank in ranks]
    fused_down = down[0] if shared else torch.cat(down)
    fused_up = torch.cat(up) if shared else torch.block_diag(*up)
    rank = fused_down.shape[0]
    final_up, final_down = randn(2 * H, 2), randn(2, H)
    mod = (randn(6 * H, 2), randn(2, H))
    kohya_flux = {
        **written("lora_unet_double_blocks_0_img_attn_qkv", fused_up, fused_down, float(rank)),
        **written("lora_unet_double_blocks_0_img_mod_lin", *mod, 2.0),
        **written("lora_unet_final_layer_adaLN_modulation_1", final_up, final_down, 2.0),
    }
    diffusers_flux = {
        "transformer.transformer_blocks.0.norm1.linear.lora_A.weight": mod[1],
        "transformer.transformer_blocks.0.norm1.linear.lora_B.weight": mod[0],
        "transformer.norm_out.linear.lora_A.weight": final_down,
        "transformer.norm_out.linear.lora_B.weight": torch.cat([final_up[H:], final_up[:H]]),
    }
    for part, (part_up, part_down) in zip("qkv", zip(up, down, strict=True), strict=True):
        stem = f"transformer.transformer_blocks.0.attn.to_{part}"
        diffusers_flux |= {f"{stem}.lora_A.weight": part_down, f"{stem}.lora_B.weight": part_up}
    a, b = save("a.safetensors", kohya_flux), save("b.safetensors", diffusers_flux)
    result = compare(a, b)
    assert (result["equal"], result["sites"]) == (True, 5)
    assert result["max_relative_error"] < 1e-12
    unswapped = {**diffusers_flux, "transformer.norm_out.linear.lora_B.weight": final_up}
    wrong = compare(a, save("c.safetensors", unswapped))
    assert not wrong["equal"]
    assert wrong["worst"][0]["site"] == "denoiser.norm_out.linear"


def test_a_missing_part_of_a_fused_module_is_zero(save: Save, randn: Make) -> None:
    """Only q and v were trained: the fused module has zero rows for k."""
    down, up = [randn(2, H), randn(2, H)], [randn(H, 2), randn(H, 2)]
    fused_up = torch.zeros(3 * H, 4)
    fused_up[:H, :2], fused_up[2 * H :, 2:] = up
    mod = (randn(6 * H, 2), randn(2, H))
    a = {
        **written("lora_unet_double_blocks_0_img_attn_qkv", fused_up, torch.cat(down), 4.0),
        **written("lora_unet_double_blocks_0_img_mod_lin", *mod, 2.0),
    }
    b = {
        "transformer.transformer_blocks.0.norm1.linear.lora_A.weight": mod[1],
        "transformer.transformer_blocks.0.norm1.linear.lora_B.weight": mod[0],
    }
    for part, part_up, part_down in zip("qv", up, down, strict=True):
        stem = f"transformer.transformer_blocks.0.attn.to_{part}"
        b |= {f"{stem}.lora_A.weight": part_down, f"{stem}.lora_B.weight": part_up}
    result = compare(save("a.safetensors", a), save("b.safetensors", b))
    assert (result["equal"], result["only_in_a"], result["only_in_b"]) == (True, [], [])


# ----------------------------------------------------------------------------------------------------------- different files


def test_the_negative_the_double_and_the_orthogonal(save: Save, randn: Make) -> None:
    pairs = four(randn)
    a = save("a.safetensors", kohya_file(pairs))
    minus = compare(a, save("b.safetensors", kohya_file({path: (-up, down) for path, (up, down) in pairs.items()})))
    assert (minus["cosine"], minus["scale_ratio"], minus["max_relative_error"]) == pytest.approx((-1.0, 1.0, 2.0), abs=1e-12)
    double = compare(a, save("c.safetensors", kohya_file(pairs, 4.0)))
    assert (double["cosine"], double["scale_ratio"], double["max_relative_error"]) == pytest.approx((1.0, 2.0, 1.0), abs=1e-12)
    halves = {path: (up.clone(), up.clone(), down) for path, (up, down) in pairs.items()}
    for first, second, _ in halves.values():
        first[:8], second[8:] = 0.0, 0.0
    across = compare(
        save("d.safetensors", kohya_file({path: (first, down) for path, (first, _, down) in halves.items()})),
        save("e.safetensors", kohya_file({path: (second, down) for path, (_, second, down) in halves.items()})),
    )
    assert across["cosine"] == pytest.approx(0.0, abs=1e-15)
    assert [minus["equal"], double["equal"], across["equal"]] == [False] * 3


def test_all_numbers_are_the_dense_ones(save: Save, randn: Make) -> None:
    """Gram matrices of the factors against dense deltas, to 1e-12."""
    ours, theirs = four(randn), {path: factors(randn, shape, 6) for path, shape in SHAPES.items()}
    result = compare(save("a.safetensors", kohya_file(ours)), save("b.safetensors", kohya_file(theirs, -1.5)), modules=True)
    deltas = {path: (dense(*ours[path], 2 / 4), dense(*theirs[path], -1.5 / 6)) for path in SHAPES}
    errors = {path: float((other - mine).norm() / mine.norm()) for path, (mine, other) in deltas.items()}
    rows = {row["site"].removeprefix("denoiser."): row for row in result["modules"]}
    assert set(rows) == set(SHAPES)
    for path, (mine, other) in deltas.items():
        assert rows[path]["relative_error"] == pytest.approx(errors[path], rel=1e-12)
        assert rows[path]["cosine"] == pytest.approx(float((mine * other).sum() / (mine.norm() * other.norm())), rel=1e-12, abs=1e-12)
    mine, other = (stacked([pair[side] for pair in deltas.values()]) for side in (0, 1))
    assert result["max_relative_error"] == pytest.approx(max(errors.values()), rel=1e-12)
    assert result["relative_error"] == pytest.approx(float((other - mine).norm() / mine.norm()), rel=1e-12)
    assert result["cosine"] == pytest.approx(float(mine @ other / (mine.norm() * other.norm())), rel=1e-12, abs=1e-12)
    assert result["scale_ratio"] == pytest.approx(float(other.norm() / mine.norm()), rel=1e-12)
    ranked = sorted(errors, key=lambda path: -errors[path])
    assert [row["site"].removeprefix("denoiser.") for row in result["worst"]] == ranked


def test_sites_of_one_side_only(save: Save, randn: Make) -> None:
    pairs = four(randn)
    less = {path: pair for path, pair in pairs.items() if path != CONV}
    a, b = save("a.safetensors", kohya_file(pairs)), save("b.safetensors", kohya_file(less))
    there, back = compare(a, b), compare(b, a)
    assert (there["only_in_a"], there["only_in_b"]) == ([f"denoiser.{CONV}"], [])
    assert (back["only_in_a"], back["only_in_b"]) == ([], [f"denoiser.{CONV}"])
    assert there["sites"] == back["sites"] == 4
    assert not there["equal"]
    assert not back["equal"]
    assert there["max_relative_error"] == pytest.approx(1.0)  # all of its delta is missing
    assert back["max_relative_error"] == math.inf


def test_tolerance_decides(save: Save, randn: Make, run: Any) -> None:
    pairs = four(randn)
    near = {path: (up.double() * (1 + 1e-4), down) for path, (up, down) in pairs.items()}
    a, b = save("a.safetensors", kohya_file(pairs)), save("b.safetensors", kohya_file(near))
    assert compare(a, b)["max_relative_error"] == pytest.approx(1e-4, rel=1e-6)
    assert run("compare", a, b).exit_code == 4
    assert run("compare", a, b, "--tolerance", "2e-4").exit_code == 0
    assert run("compare", a, b, "--tolerance", "0.5e-4").exit_code == 4


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("where", ["a", "b", "both"])
def test_nan_is_never_equal(where: str, value: float, save: Save, randn: Make, run: Any) -> None:
    """A NaN compares false with everything: sorted carelessly, it hides behind a site that is equal."""
    pairs = four(randn)
    spoilt = {**pairs, CONV: (pairs[CONV][0].clone().index_fill_(0, torch.tensor([3]), value), pairs[CONV][1])}
    a = save("a.safetensors", kohya_file(spoilt if where != "b" else pairs))
    b = save("b.safetensors", kohya_file(spoilt if where != "a" else pairs))
    result = compare(a, b)
    assert not result["equal"]
    assert result["worst"][0]["site"] == f"denoiser.{CONV}"
    assert run("compare", a, b).exit_code == 4


# ------------------------------------------------------------------------------------------------------ what is asked and said


def test_two_architectures_are_refused(save: Save, randn: Make, run: Any) -> None:
    a = save("a.safetensors", kohya_file(four(randn)))
    flux = {**written("lora_unet_double_blocks_0_img_mod_lin", randn(6 * H, 2), randn(2, H))}
    b = save("b.safetensors", {**flux, **written("lora_unet_single_blocks_0_modulation_lin", randn(3 * H, 2), randn(2, H))})
    with pytest.raises(InputError, match=r"sd1.*flux"):
        compare(a, b)
    assert run("compare", a, b).exit_code == 3


def test_all_shapes_that_differ_are_listed(save: Save, randn: Make) -> None:
    def file(name: str, width: int) -> Path:
        plain = written(kohya(PROJ), *factors(randn, (width, width, 1, 1)))
        full = {f"{kohya(ATTENTION)}.diff": randn(width, width)}
        return save(name, {**plain, **full})

    with pytest.raises(InputError) as caught:
        compare(file("a.safetensors", 16), file("b.safetensors", 32))
    assert [line.partition(":")[0] for line in caught.value.details] == [f"denoiser.{PROJ}", f"denoiser.{ATTENTION}"]
    assert all("16" in line and "32" in line for line in caught.value.details)


def ambiguous(randn: Make) -> tuple[dict[str, torch.Tensor], dict[str, tuple[torch.Tensor, torch.Tensor]]]:
    """Keys of Flux and of Chroma alike, without alpha."""
    pairs = {"double_blocks.0.img_attn.qkv": (randn(3 * H, 2), randn(2, H)), "double_blocks.0.img_mlp.0": (randn(MLP, 2), randn(2, H))}
    keys = {}
    for path, (up, down) in pairs.items():
        keys |= {f"diffusion_model.{path}.lora_A.weight": down, f"diffusion_model.{path}.lora_B.weight": up}
    return keys, pairs


def test_an_ambiguous_file_is_settled_by_the_other(save: Save, randn: Make) -> None:
    keys, pairs = ambiguous(randn)
    flux = {key: tensor for path, pair in pairs.items() for key, tensor in written(kohya(path), *pair, 8.0).items()}
    mod = (randn(6 * H, 2), randn(2, H))
    flux |= written("lora_unet_double_blocks_0_img_mod_lin", *mod, 8.0)
    a, b = save("a.safetensors", keys), save("b.safetensors", flux)
    with pytest.raises(AmbiguousError):
        compare(a, a)
    result = compare(a, b)
    assert result["only_in_b"] == ["denoiser.transformer_blocks.0.norm1.linear"]
    assert compare(b, a)["only_in_a"] == result["only_in_b"]
    settled = compare(a, b, alpha=8.0, modules=True)  # speaks for the file without alpha, settled by the other or not
    rows = {row["site"]: row["relative_error"] for row in settled["modules"]}
    assert max(error for site, error in rows.items() if "norm1" not in site) < 1e-12
    assert compare(a, a, arch="chroma")["equal"]


def test_alpha_is_for_the_file_that_records_none(save: Save, randn: Make, run: Any) -> None:
    pairs = four(randn)
    a = save("a.safetensors", kohya_file(pairs, 8.0))
    bare = {}
    for path, (up, down) in pairs.items():
        bare |= {f"base_model.model.{path}.lora_A.weight": down, f"base_model.model.{path}.lora_B.weight": up}
    b = save("b.safetensors", bare)
    assert compare(a, b)["scale_ratio"] == pytest.approx(0.5)  # scale 1 is assumed where 8 / 4 was trained
    assert compare(a, b, alpha=8.0)["equal"]
    assert compare(b, a, alpha=8.0)["equal"]
    assert run("compare", a, b, "--alpha", "8").exit_code == 0
    zero = save("c.safetensors", kohya_file(pairs, 0.0))
    assert run("compare", a, zero).exit_code == 3
    assert compare(a, zero, alpha=8.0)["equal"]
    needless = run("compare", a, a, "--alpha", "8")
    assert needless.exit_code == 2
    assert "--alpha" in needless.stderr


def test_the_json_of_the_contract(save: Save, randn: Make, run: Any) -> None:
    pairs = four(randn)
    a, b = save("a.safetensors", kohya_file(pairs)), save("b.safetensors", kohya_file(pairs, 4.0))
    found = run("compare", a, b, "--json")
    assert found.exit_code == 4
    result = json.loads(found.stdout)
    assert set(result) - {"relative_error"} == KEYS
    assert [set(row) for row in result["worst"]] == [{"site", "relative_error", "cosine"}] * 4
    assert set(json.loads(run("compare", a, a, "--json", "--modules").stdout)) - {"relative_error"} == KEYS | {"modules"}
    assert run("compare", a, a).exit_code == 0
