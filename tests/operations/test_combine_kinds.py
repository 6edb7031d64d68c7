"""combine over every kind and grouping: exact where a sum exists, itself where one is alone, refused with all names otherwise."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from loratools.errors import InputError, UnsupportedError
from loratools.operations.combine import combine
from loratools.operations.compare import compare
from tests.operations.made import ATTENTION, CONV, FF, PROJ, SHAPES, Make, Save, dense, factors, kohya, kohya_file, parts, render, written
from tests.reference import deltas

Peft = Callable[..., Path]
A, C = kohya(ATTENTION), kohya(CONV)


def anchor(randn: Make) -> dict[str, torch.Tensor]:
    """A module that only SD1 has, so that no file is a riddle."""
    return kohya_file({PROJ: factors(randn, SHAPES[PROJ])})


def kinds(randn: Make) -> dict[str, dict[str, torch.Tensor]]:
    """Every kind on a site of SD1, alpha / rank no power of two."""
    three = torch.tensor(3.0)
    lora = written(A, *factors(randn, (16, 16)), 3.0)
    return {
        "lora": lora,
        "lora-f16": {key: tensor.half() for key, tensor in lora.items()},
        "conv": written(C, *factors(randn, SHAPES[CONV]), 3.0),
        "tucker": {
            f"{C}.alpha": three,
            f"{C}.lora_down.weight": randn(4, 32, 1, 1),
            f"{C}.lora_mid.weight": randn(4, 4, 3, 3),
            f"{C}.lora_up.weight": randn(16, 4, 1, 1),
        },
        "loha": {
            f"{A}.alpha": three,
            f"{A}.hada_w1_a": randn(16, 2), f"{A}.hada_w1_b": randn(2, 16), f"{A}.hada_w2_a": randn(16, 2), f"{A}.hada_w2_b": randn(2, 16),
        },
        "lokr": {f"{A}.alpha": three, f"{A}.lokr_w1": randn(4, 2), f"{A}.lokr_w2_a": randn(4, 2), f"{A}.lokr_w2_b": randn(2, 8)},
        "lokr-full": {f"{A}.alpha": three, f"{A}.lokr_w1": randn(4, 4), f"{A}.lokr_w2": randn(4, 4)},
        "dense": {f"{A}.diff": randn(16, 16), f"{A}.diff_b": randn(16)},
        "lora+dense": {**lora, f"{A}.diff": randn(16, 16), f"{A}.diff_b": randn(16)},
        "dora": {**lora, f"{A}.dora_scale": randn(16, 1).abs()},
        "dora-in": {**lora, f"{A}.dora_scale": randn(1, 16).abs()},
        "oft": {f"{A}.oft_blocks": randn(4, 4, 4), f"{A}.alpha": torch.tensor(0.5)},
        "boft": {f"{A}.oft_blocks": randn(2, 4, 4, 4), f"{A}.alpha": torch.tensor(0.5)},
        "ia3": {f"{A}.weight": randn(16), f"{A}.on_input": torch.tensor(False)},
        "glora": {
            f"{A}.alpha": three,
            f"{A}.a1.weight": randn(16, 4), f"{A}.a2.weight": randn(4, 16), f"{A}.b1.weight": randn(16, 4), f"{A}.b2.weight": randn(4, 16),
        },
    }  # fmt: skip


LOW = ["lora", "lora-f16", "loha", "lokr", "lokr-full"]
ADDITIVE = [*LOW, "dense"]
FIXED = ["dora", "dora-in", "oft", "boft", "ia3", "glora"]
ALL = [*ADDITIVE, "conv", "tucker", "lora+dense", *FIXED]


def rest(path: Path) -> dict[str, torch.Tensor]:
    """The deltas of a file without its anchor; biases are checked on their own."""
    data = {key: tensor for key, tensor in load(path).items() if not key.endswith("diff_b")}
    bare = path.with_name(f"bare-{path.name}")
    bare.write_bytes(render(data))
    found = deltas(bare)
    return {name: delta.flatten(1) for name, delta in found.items() if name != kohya(PROJ)}


def load(path: Path) -> dict[str, torch.Tensor]:
    return load_file(path)


@pytest.mark.parametrize("kind", ALL)
def test_every_kind_alone_is_itself_to_the_byte(randn: Make, save: Save, tmp_path: Path, kind: str) -> None:
    """B5."""
    a = save("a.safetensors", {**kinds(randn)[kind], **anchor(randn)})
    out = tmp_path / "out.safetensors"
    combine([(a, 1.0)], out)
    assert parts(out)[1] == parts(a)[1]
    assert {key: entry for key, entry in parts(out)[0].items() if key != "__metadata__"} == parts(a)[0]


@pytest.mark.parametrize("kind", ["lora", "conv", "tucker", "loha", "lokr", "lokr-full", "lora-f16"])
@pytest.mark.parametrize("weight", [-0.3, 2.0])
def test_a_weight_on_one_kind_alone(randn: Make, save: Save, tmp_path: Path, kind: str, weight: float) -> None:
    tensors = kinds(randn)[kind]
    a = save("a.safetensors", {**tensors, **anchor(randn)})
    out = tmp_path / "out.safetensors"
    combine([(a, weight)], out)
    for name, delta in rest(a).items():
        torch.testing.assert_close(rest(out)[name], weight * delta, rtol=1e-6, atol=1e-7)
    after = load(out)
    assert set(after) == set(load(a))
    same = [key for key, tensor in tensors.items() if torch.equal(after[key], tensor)]
    assert len(same) == len(tensors) - (1 if weight > 0 or kind == "lokr-full" else 2)  # alpha, and with a minus one factor
    assert all(after[key].dtype == tensor.dtype for key, tensor in tensors.items() if not key.endswith("alpha"))


@pytest.mark.parametrize("first", ADDITIVE)
@pytest.mark.parametrize("second", ADDITIVE)
def test_any_two_additive_kinds_add_up(randn: Make, save: Save, tmp_path: Path, first: str, second: str) -> None:
    """B6."""
    one, two = kinds(randn), kinds(randn)
    a, b = save("a.safetensors", {**one[first], **anchor(randn)}), save("b.safetensors", {**two[second], **anchor(randn)})
    out = tmp_path / "out.safetensors"
    combine([(a, 0.7), (b, -1.5)], out)
    expected = 0.7 * rest(a)[A] - 1.5 * rest(b)[A]
    if (first in LOW) == (second in LOW):
        torch.testing.assert_close(rest(out)[A], expected, rtol=1e-5, atol=1e-6)
    else:  # a LoRA and a full delta stay beside each other
        tensors = load(out)
        low = {key: tensor for key, tensor in tensors.items() if key.startswith(A) and "diff" not in key}
        alone = rest(save("low.safetensors", low))[A]
        torch.testing.assert_close(alone + tensors[f"{A}.diff"].double(), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("first", "second"), [("tucker", "conv"), ("conv", "tucker"), ("tucker", "tucker"), ("conv", "conv")])
def test_convolutions_with_and_without_a_core(randn: Make, save: Save, tmp_path: Path, first: str, second: str) -> None:
    one, two = kinds(randn), kinds(randn)
    a, b = save("a.safetensors", {**one[first], **anchor(randn)}), save("b.safetensors", {**two[second], **anchor(randn)})
    result = combine([(a, 1.0), (b, 0.5)], tmp_path / "out.safetensors")
    torch.testing.assert_close(rest(tmp_path / "out.safetensors")[C], rest(a)[C] + 0.5 * rest(b)[C], rtol=1e-5, atol=1e-5)
    assert result["relative_error"] < 1e-6
    combine([(a, 1.0), (b, 0.5)], tmp_path / "r3.safetensors", rank=3)
    expected = rest(a)[C] + 0.5 * rest(b)[C]
    values = torch.linalg.svdvals(expected)
    error = float((rest(tmp_path / "r3.safetensors")[C] - expected).norm())
    assert error == pytest.approx(float(values[3:].norm()), rel=1e-5)


@pytest.mark.parametrize("rank", [None, 3])
def test_biases_are_one_sum(randn: Make, save: Save, tmp_path: Path, rank: int | None) -> None:
    """diff_b beside a LoRA, beside a full delta, and in a file of its own: Σ w b, whatever becomes of ΔW."""
    one, two = kinds(randn)["lora"], kinds(randn)["dense"]
    one[f"{A}.diff_b"] = randn(16)
    three = {f"{A}.diff_b": randn(16)}
    files = [save(f"{place}.safetensors", {**made, **anchor(randn)}) for place, made in enumerate((one, two, three))]
    out = tmp_path / "out.safetensors"
    combine(list(zip(files, (0.5, -1.0, 3.0), strict=True)), out, rank=rank)
    expected = 0.5 * one[f"{A}.diff_b"] - two[f"{A}.diff_b"] + 3 * three[f"{A}.diff_b"]
    torch.testing.assert_close(load(out)[f"{A}.diff_b"], expected, rtol=1e-6, atol=1e-6)
    assert (f"{A}.diff" in load(out)) == (rank is None)


def test_biases_of_loras_stay_under_their_scale(randn: Make, peft: Peft, tmp_path: Path) -> None:
    """PEFT's lora_B.bias: s · bias, summed over files of different scales."""
    name = f"base_model.model.{ATTENTION}"
    made, expected = [], torch.zeros(16, dtype=torch.float64)
    for place, (rank, alpha, weight) in enumerate(((4, 8, 1.0), (2, 3, -0.5))):
        up, down = factors(randn, (16, 16), rank)
        proj = factors(randn, SHAPES[PROJ], rank)
        bias = randn(16)
        tensors = {f"{name}.lora_A.weight": down, f"{name}.lora_B.weight": up, f"{name}.lora_B.bias": bias}
        tensors |= {f"base_model.model.{PROJ}.lora_A.weight": proj[1], f"base_model.model.{PROJ}.lora_B.weight": proj[0]}
        tensors[f"base_model.model.{PROJ}.lora_B.bias"] = randn(16)
        config = {"r": rank, "lora_alpha": alpha, "target_modules": ["to_q", "proj_in"], "lora_bias": True}
        made.append((peft(f"p{place}", tensors, config), weight))
        expected += weight * alpha / rank * bias.double()
    combine(made, tmp_path / "out")
    config = json.loads((tmp_path / "out/adapter_config.json").read_text())
    found = load(tmp_path / "out/adapter_model.safetensors")[f"{name}.lora_B.bias"].double()
    torch.testing.assert_close(found * config["lora_alpha"] / config["r"], expected, rtol=1e-6, atol=1e-6)


def test_rslora_is_resolved(randn: Make, save: Save, peft: Peft, tmp_path: Path) -> None:
    """B5: peft's add_weighted_adapter forgets √r."""
    up, down = factors(randn, (16, 16), 4)
    proj = factors(randn, SHAPES[PROJ], 4)
    tensors = {
        f"base_model.model.{path}.lora_{half}.weight": tensor
        for path, pair in ((ATTENTION, (down, up)), (PROJ, (proj[1], proj[0])))
        for half, tensor in zip("AB", pair, strict=True)
    }
    folder = peft("rs", tensors, {"r": 4, "lora_alpha": 6, "use_rslora": True, "target_modules": ["to_q", "proj_in"]})
    other = save("b.safetensors", kohya_file({ATTENTION: (up, down), PROJ: proj}, 2.0))
    combine([(folder, 0.5), (other, 1.0)], tmp_path / "out.safetensors", to="kohya")
    torch.testing.assert_close(deltas(tmp_path / "out.safetensors")[A], dense(up, down, 0.5 * 6 / 2 + 0.5), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("kind", FIXED)
def test_kinds_without_a_sum_pass_alone_and_are_refused_beside_others(randn: Make, save: Save, tmp_path: Path, kind: str) -> None:
    tensors = kinds(randn)
    a = save("a.safetensors", {**tensors[kind], **anchor(randn)})
    b = save("b.safetensors", {**anchor(randn), **kohya_file({FF: factors(randn, SHAPES[FF])})})
    c = save("c.safetensors", {**tensors["lora"], **anchor(randn)})
    out = tmp_path / "out.safetensors"
    result = combine([(a, 1.0), (b, 0.5)], out, rank=2)
    assert any("passed through" in warning for warning in result["warnings"])
    assert all(torch.equal(load(out)[key], tensor) for key, tensor in tensors[kind].items())
    for given, word in (([(a, 1.0), (c, 1.0)], "beside c.safetensors"), ([(a, 0.5), (b, 1.0)], "at weight 0.5")):
        with pytest.raises(UnsupportedError) as refused:
            combine(given, tmp_path / "no.safetensors")
        assert len(refused.value.details) == 1
        assert ATTENTION in refused.value.details[0]
        assert word in refused.value.details[0]
        assert "loratools merge" in (refused.value.fix or "")
    assert combine([(a, 0.0), (c, 1.0)], tmp_path / "without.safetensors")["relative_error"] == 0


def test_embeddings_are_concatenated(randn: Make, peft: Peft, tmp_path: Path) -> None:
    """ΔW = (B A)ᵀ s of a language model's table."""
    files, expected = [], torch.zeros(20, 8, dtype=torch.float64)
    for place, (rank, alpha, weight) in enumerate(((2, 4, 0.5), (3, 3, -1.0))):
        a, b = randn(rank, 20), randn(8, rank)
        stem = "base_model.model.model"
        tensors = {f"{stem}.embed_tokens.lora_embedding_A": a, f"{stem}.embed_tokens.lora_embedding_B": b}
        query = f"{stem}.layers.0.self_attn.q_proj"
        tensors |= {f"{query}.lora_A.weight": randn(rank, 8), f"{query}.lora_B.weight": randn(8, rank)}
        config = {"r": rank, "lora_alpha": alpha, "target_modules": ["embed_tokens", "q_proj"], "task_type": "CAUSAL_LM"}
        files.append((peft(f"e{place}", tensors, config), weight))
        expected += weight * alpha / rank * (b.double() @ a.double()).t()
    for rank in (None, 4):
        out = tmp_path / f"out{rank}"
        combine(files, out, rank=rank)
        config = json.loads((out / "adapter_config.json").read_text())
        found = load(out / "adapter_model.safetensors")
        a, b = (found[f"base_model.model.model.embed_tokens.lora_embedding_{half}"].double() for half in "AB")
        assert a.shape[0] == (5 if rank is None else 4)
        delta = (b @ a).t() * config["lora_alpha"] / config["r"]
        bound = 1e-6 if rank is None else float(torch.linalg.svdvals(expected)[4:].norm() / expected.norm()) * 1.0001 + 1e-6
        assert float((delta - expected).norm() / expected.norm()) <= bound


# ------------------------------------------------------------------------------------------------------------- fused and split

STEM = "lora_unet_double_blocks_0_img_attn_qkv"
H = 32


def flux_fused(randn: Make, rank: int, alpha: float) -> tuple[dict[str, torch.Tensor], list[torch.Tensor]]:
    """A fused qkv, a modulation that tells Flux from Chroma; the deltas of q, k, v."""
    up, down = factors(randn, (3 * H, H), rank)
    tensors = {**written(STEM, up, down, alpha), **flux_anchor(randn)}
    return tensors, list(dense(up, down, alpha / rank).split(H))


def flux_anchor(randn: Make) -> dict[str, torch.Tensor]:
    return written("lora_unet_double_blocks_0_img_mod_lin", *factors(randn, (6 * H, H), 2), 2.0)


def flux_split(randn: Make, ranks: Mapping[str, int]) -> tuple[dict[str, torch.Tensor], list[torch.Tensor]]:
    tensors, found = {}, []
    for part in ("to_q", "to_k", "to_v"):
        if part not in ranks:
            found.append(torch.zeros(H, H, dtype=torch.float64))
            continue
        up, down = factors(randn, (H, H), ranks[part])
        stem = f"transformer.transformer_blocks.0.attn.{part}"
        tensors |= {f"{stem}.lora_A.weight": down, f"{stem}.lora_B.weight": up}
        found.append(dense(up, down, 1.0))
    mod = factors(randn, (6 * H, H), 2)
    stem = "transformer.transformer_blocks.0.norm1.linear"
    return {**tensors, f"{stem}.lora_A.weight": mod[1], f"{stem}.lora_B.weight": mod[0]}, found


def qkv(path: Path, dialect: str) -> torch.Tensor:
    found = deltas(path)
    if dialect == "kohya":
        return found[STEM]
    return torch.cat([found[f"transformer.transformer_blocks.0.attn.{part}"] for part in ("to_q", "to_k", "to_v")])


@pytest.mark.parametrize("ranks", [{"to_q": 3, "to_k": 5, "to_v": 2}, {"to_q": 4, "to_v": 4}])
@pytest.mark.parametrize("dialect", ["kohya", "diffusers"])
def test_fused_and_split_flux_meet_at_the_parts(randn: Make, save: Save, tmp_path: Path, ranks: Mapping[str, int], dialect: str) -> None:
    (fused, first), (split, second) = flux_fused(randn, 4, 3.0), flux_split(randn, ranks)
    a, b = save("a.safetensors", fused), save("b.safetensors", split)
    expected = torch.cat([0.7 * x - 0.5 * y for x, y in zip(first, second, strict=True)])
    combine([(a, 0.7), (b, -0.5)], tmp_path / "out.safetensors", to=dialect)
    torch.testing.assert_close(qkv(tmp_path / "out.safetensors", dialect), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("method", ["sum", "ties"])
@pytest.mark.parametrize("dialect", ["kohya", "diffusers"])
@pytest.mark.parametrize("split", [True, False])
def test_a_rank_is_that_of_what_is_written(randn: Make, save: Save, tmp_path: Path, split: bool, dialect: str, method: str) -> None:
    """A fused qkv of rank 3 where the target fuses, rank 3 for each of q, k and v where it does not: the best of its rank each time."""
    (fused, first) = flux_fused(randn, 4, 3.0)
    other, second = flux_split(randn, {"to_q": 3, "to_v": 4}) if split else flux_fused(randn, 5, 2.0)
    a, b = save("a.safetensors", fused), save("b.safetensors", other)
    settings: dict[str, Any] = {"method": method, "density": 1.0} if method == "ties" else {}
    result = combine([(a, 1.0), (b, 2.0)], tmp_path / "out.safetensors", to=dialect, rank=3, **settings)
    pieces = [x + 2 * y for x, y in zip(first, second, strict=True)]
    if method == "ties":  # density 1: the mean of what has the sign of the sum
        pieces = []
        for x, y in zip(first, second, strict=True):
            agree = [(part * (x + 2 * y) > 0) for part in (x, 2 * y)]
            count = (agree[0].double() + agree[1].double()).clamp(min=1)
            pieces.append((x * agree[0] + 2 * y * agree[1]) / count)
    expected = torch.cat(pieces)
    error = float((qkv(tmp_path / "out.safetensors", dialect) - expected).norm())
    wholes = [expected] if dialect == "kohya" else pieces
    bound = sum(float(torch.linalg.svdvals(whole)[3:].square().sum()) for whole in wholes) ** 0.5
    assert error == pytest.approx(bound, rel=1e-5)
    assert max(map(int, result["ranks_after"])) == 3


def test_two_fused_files_stay_fused(randn: Make, save: Save, tmp_path: Path) -> None:
    (one, first), (two, second) = flux_fused(randn, 4, 3.0), flux_fused(randn, 5, 2.0)
    combine([(save("a.safetensors", one), 1.0), (save("b.safetensors", two), 1.0)], tmp_path / "out.safetensors")
    assert parts(tmp_path / "out.safetensors")[0][f"{STEM}.lora_down.weight"]["shape"] == [9, H]
    torch.testing.assert_close(qkv(tmp_path / "out.safetensors", "kohya"), torch.cat(first) + torch.cat(second), rtol=1e-5, atol=1e-5)


def test_swapped_halves_meet_in_their_own_order(randn: Make, save: Save, tmp_path: Path) -> None:
    """final_layer.adaLN_modulation of a kohya file is norm_out.linear of diffusers with its halves exchanged."""
    up, down = factors(randn, (2 * H, H), 4)
    other_up, other_down = factors(randn, (2 * H, H), 4)
    name = "lora_unet_final_layer_adaLN_modulation_1"
    a = save("a.safetensors", {**written(name, up, down, 4.0), **flux_fused(randn, 4, 4.0)[0]})
    split = flux_split(randn, {"to_q": 4})[0]
    stem = "transformer.norm_out.linear"
    b = save("b.safetensors", {**split, f"{stem}.lora_A.weight": other_down, f"{stem}.lora_B.weight": other_up})
    expected = dense(up, down, 1.0) + dense(other_up, other_down, 1.0).roll(H, 0)
    for settings in ({}, {"rank": 8}, {"rank": 32, "method": "dare", "density": 1.0}):
        out = tmp_path / f"out{len(settings)}.safetensors"
        combine([(a, 1.0), (b, 1.0)], out, **settings)
        torch.testing.assert_close(deltas(out)[name], expected, rtol=1e-4, atol=1e-4)


# ------------------------------------------------------------------------------------------------------------- where alpha lives


@pytest.mark.parametrize("target", ["kohya", "diffusers", "peft", "diffusers-dot", "comfy", "lycoris"])
@pytest.mark.parametrize("kind", ["lora", "loha", "lokr", "lokr-full"])
def test_every_target_gives_the_same_strength(randn: Make, save: Save, tmp_path: Path, target: str, kind: str) -> None:
    tensors = {**kinds(randn)[kind], **anchor(randn)}
    a, b = save("a.safetensors", tensors), save("b.safetensors", {**kinds(randn)["lora"], **anchor(randn)})
    alone, both = tmp_path / "alone", tmp_path / "both"
    combine([(a, -0.7)], tmp_path / "alone.safetensors")
    combine([(a, -0.7), (b, 0.4)], tmp_path / "both.safetensors")
    combine([(a, -0.7)], alone, to=target)
    combine([(a, -0.7), (b, 0.4)], both, to=target)
    for plain, other in ((tmp_path / "alone.safetensors", alone), (tmp_path / "both.safetensors", both)):
        result = compare(plain, other, arch="sd1")
        assert result["equal"], result["worst"]


def test_diffusers_writes_its_scale_into_the_factors_and_the_header_agrees(randn: Make, save: Save, tmp_path: Path) -> None:
    """Its older readers ignore the header, its newer ones trust it."""
    header = json.dumps({"unet.r": 4, "unet.lora_alpha": 3, "unet.target_modules": ["to_q"]})
    tensors: dict[str, torch.Tensor] = {}
    for path in (ATTENTION, PROJ):
        up, down = factors(randn, SHAPES[path])
        tensors |= {f"unet.{path}.lora_B.weight": up, f"unet.{path}.lora_A.weight": down}
    a = save("a.safetensors", tensors, {"lora_adapter_metadata": header})
    b = save("b.safetensors", kohya_file({path: factors(randn, SHAPES[path], 2) for path in (ATTENTION, PROJ)}, 5.0))
    out = tmp_path / "out.safetensors"
    combine([(a, 0.5), (b, 1.0)], out)
    assert json.loads(parts(out)[0]["__metadata__"]["lora_adapter_metadata"])["unet.lora_alpha"] == 6
    first, second = deltas(a), deltas(b)
    bare = deltas(save("bare.safetensors", load(out)))  # without the header: the same
    for path in (ATTENTION, PROJ):
        expected = 0.5 * first[f"unet.{path}"] + second[kohya(path)]
        torch.testing.assert_close(deltas(out)[f"unet.{path}"], expected, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(bare[f"unet.{path}"], expected, rtol=1e-5, atol=1e-6)


def test_norms_are_summed_and_sparsified(randn: Make, save: Save, tmp_path: Path) -> None:
    name = "lora_unet_up_blocks_3_attentions_0_norm"
    one, two = randn(16), randn(16)
    a, b = (save(f"{n}.safetensors", {f"{name}.w_norm": w, f"{name}.b_norm": w / 2, **anchor(randn)}) for n, w in (("a", one), ("b", two)))
    combine([(a, 0.5), (b, 1.0)], tmp_path / "sum.safetensors")
    found = load(tmp_path / "sum.safetensors")
    torch.testing.assert_close(found[f"{name}.w_norm"], 0.5 * one + two)
    torch.testing.assert_close(found[f"{name}.b_norm"], 0.25 * one + 0.5 * two)
    combine([(a, 0.5), (b, 1.0)], tmp_path / "ties.safetensors", method="ties", density=1.0, rank=4)
    found = load(tmp_path / "ties.safetensors")
    agree = [term * (0.5 * one + two) > 0 for term in (0.5 * one, two)]
    expected = (0.5 * one * agree[0] + two * agree[1]) / (agree[0].float() + agree[1].float())
    torch.testing.assert_close(found[f"{name}.w_norm"], expected)
    torch.testing.assert_close(found[f"{name}.b_norm"], 0.25 * one + 0.5 * two)


def test_a_norm_against_a_matrix_is_refused(randn: Make, save: Save, tmp_path: Path) -> None:
    a = save("a.safetensors", {f"{A}.diff": randn(16), **anchor(randn)})
    b = save("b.safetensors", {f"{A}.diff": randn(16, 16), **anchor(randn)})
    with pytest.raises(InputError):
        combine([(a, 1.0), (b, 1.0)], tmp_path / "out.safetensors")
