"""Two ways through a merge give one result: blocks of rows from the factors, and the whole weight at once.

Both are held against the module's own ΔW in float64, for every kind, on plain, fused, split, exchanged and transposed weights, with blocks
so small that regions begin in the middle of one, and once with a tensor larger than the block there is.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import loratools
from loratools.adapters.adapter import Module
from loratools.operations.merge import merge
from loratools.operations.merging import arithmetic
from tests.operations import merge_by_hand as hand
from tests.operations.made import ATTENTION, CONV, FF, NATIVE, PROJ, SHAPES
from tests.operations.merge_by_hand import BLOCK, FUSED, LAST, LINEAR1, NORM, QKV, UP, Q, Tensors, noise

Shape = tuple[int, ...]
RANK = 2


@pytest.fixture(params=["streamed", "whole"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Blocks of a few rows, by the factors wherever a kind can, or never; the list names the kinds that were streamed."""
    seen, streamed = [request.param], arithmetic._streamed

    def watched(term: Any, region: Any, dtype: torch.dtype) -> Any:
        found = streamed(term, region, dtype) if request.param == "streamed" else None
        if found is not None:
            seen.append(term.module.kind)
        return found

    monkeypatch.setattr(arithmetic, "_streamed", watched)
    monkeypatch.setattr(arithmetic, "BLOCK", 7 * hand.WIDTH)  # 7 rows where 32 wide: no boundary of a region is a multiple
    return seen


# ---------------------------------------------------------------------------------------------------------------- every kind


def lora(shape: Shape) -> Tensors:
    one = hand.pair(shape, RANK, 3.0, sum(shape))
    return {"lora_up.weight": one.up * 0.2, "lora_down.weight": one.down, "alpha": torch.tensor(3.0)}


def tucker(shape: Shape) -> Tensors:
    out, in_, *kernel = shape
    found = {"lora_up.weight": noise(out, RANK, 1, 1), "lora_down.weight": noise(RANK, in_, 1, 1, seed=1)}
    return found | {"lora_mid.weight": noise(RANK, RANK, *kernel, seed=2) * 0.3, "alpha": torch.tensor(1.0)}


def dora(axis: int, inner: Callable[[Shape], Tensors] = lora) -> Callable[[Shape], Tensors]:
    def made(shape: Shape) -> Tensors:
        size = [shape[place] if place == axis else 1 for place in range(len(shape))]
        return inner(shape) | {"dora_scale": 1 + noise(*size, seed=3).abs()}

    return made


def loha(shape: Shape) -> Tensors:
    columns = int(torch.tensor(shape[1:]).prod())
    a, b = (noise(shape[0], RANK, seed=seed) * 0.4 for seed in (4, 5))
    c, d = (noise(RANK, columns, seed=seed) for seed in (6, 7))
    return {"hada_w1_a": a, "hada_w1_b": c, "hada_w2_a": b, "hada_w2_b": d, "alpha": torch.tensor(1.0)}


def lokr(shape: Shape) -> Tensors:
    out, in_, *kernel = shape
    a, b = noise(out // 4, RANK, seed=8) * 0.3, noise(RANK, in_ // 4 * int(torch.tensor(kernel or [1]).prod()), seed=9)
    return {"lokr_w1": noise(4, 4, seed=10), "lokr_w2_a": a, "lokr_w2_b": b, "alpha": torch.tensor(3.0)}


def dense(shape: Shape) -> Tensors:
    return {"diff": noise(*shape, seed=11) * 0.2, "diff_b": noise(shape[0], seed=12) * 0.2}


def replacement(shape: Shape) -> Tensors:
    return {"set_weight": noise(*shape, seed=13), "bias": noise(shape[0], seed=14)}


def oft(shape: Shape) -> Tensors:
    return {"oft_blocks": noise(shape[0] // 4, 4, 4, seed=15) * 0.2, "alpha": torch.tensor(0.0)}


def boft(shape: Shape) -> Tensors:
    return {"oft_blocks": noise(2, shape[0] // 4, 4, 4, seed=16) * 0.2, "alpha": torch.tensor(0.0)}


def ia3(on_input: bool) -> Callable[[Shape], Tensors]:
    def made(shape: Shape) -> Tensors:
        vector = noise(shape[1 if on_input else 0], seed=17) * 0.3
        return {"weight": vector if len(shape) == 2 else vector.reshape(1, -1, 1, 1), "on_input": torch.tensor(on_input)}

    return made


def glora(shape: Shape) -> Tensors:
    out, in_ = shape[:2]
    found = {"a1.weight": noise(in_, RANK, seed=18), "a2.weight": noise(RANK, in_, seed=19) * 0.2, "b1.weight": noise(out, RANK, seed=20)}
    return found | {"b2.weight": noise(RANK, in_, seed=21) * 0.2, "alpha": torch.tensor(1.0)}


def with_bias(shape: Shape) -> Tensors:
    return lora(shape) | {"diff_b": noise(shape[0], seed=22) * 0.3}


MATRICES, CONVS = (ATTENTION, FF), (CONV, PROJ)
# name → leaves, sites, the kind that may be streamed
KINDS: dict[str, tuple[Callable[[Shape], Tensors], tuple[str, ...], str | None]] = {
    "lora": (lora, (*MATRICES, *CONVS), "lora"),
    "tucker": (tucker, (CONV,), "lora"),
    "lora and diff_b": (with_bias, (FF, CONV), "lora"),
    "dora out": (dora(0), (*MATRICES, *CONVS), "dora"),
    "dora in": (dora(1), (*MATRICES, *CONVS), None),
    "dora of loha": (dora(0, loha), (FF,), "dora"),
    "dora of lokr": (dora(1, lokr), (FF,), None),
    "loha": (loha, (*MATRICES, *CONVS), "loha"),
    "lokr": (lokr, (*MATRICES, *CONVS), None),
    "dense": (dense, (FF, CONV), "dense"),
    "set": (replacement, (FF, CONV), "set"),
    "oft": (oft, (*MATRICES, CONV), None),
    "boft": (boft, (*MATRICES, CONV), None),
    "ia3 out": (ia3(False), MATRICES, None),
    "ia3 in": (ia3(True), MATRICES, None),
    "glora": (glora, MATRICES, None),
}


def sd1() -> Tensors:
    """The four layers of `made` in ldm's names, with biases."""
    found = {f"model.diffusion_model.{NATIVE[site]}.weight": noise(*shape, seed=30) * 0.3 for site, shape in SHAPES.items()}
    return found | {f"model.diffusion_model.{NATIVE[site]}.bias": noise(shape[0], seed=31) * 0.3 for site, shape in SHAPES.items()}


@pytest.mark.parametrize("weight", [1.0, -0.7])
@pytest.mark.parametrize("kind", KINDS)
def test_every_kind(kind: str, weight: float, way: list[str], tmp_path: Path) -> None:
    leaves, sites, streamable = KINDS[kind]
    base = sd1()
    adapter = hand.lycoris(tmp_path / "adapter.safetensors", {site: leaves(SHAPES[site]) for site in sites})
    source = hand.save(tmp_path / "base.safetensors", base)
    merge(source, [(adapter, weight)], tmp_path / "out.safetensors", arch="sd1", verify=True)
    assert set(way[1:]) == ({streamable} if streamable and way[0] == "streamed" else set())
    wanted = dict(base)
    for entry in loratools.load(adapter, arch="sd1").entries:
        stem = f"model.diffusion_model.{NATIVE[entry.sites[0].path]}"
        add(wanted, stem, entry.module, weight, base)
    check(base, wanted, tmp_path / "out.safetensors")


def add(tensors: Tensors, stem: str, module: Module, weight: float, base: Tensors) -> None:
    """W + ΔW at this strength, and the bias, in float64."""
    old = base[f"{stem}.weight"].double()
    tensors[f"{stem}.weight"] = old + module.delta_at(weight, old).reshape(old.shape)
    change = module.bias_delta(base[f"{stem}.bias"].double()) if module.changes_bias else None
    if change is not None:
        tensors[f"{stem}.bias"] = base[f"{stem}.bias"].double() + weight * change


def check(base: Tensors, wanted: Tensors, out: Path) -> None:
    """Tensors of `wanted` in float64 are those that change."""
    changed = [key for key, value in wanted.items() if value.dtype == torch.float64]
    after = hand.assert_untouched(base, out, changed)
    for key in changed:
        size = float(wanted[key].norm())
        assert float((wanted[key] - base[key]).norm()) > 0.02 * size, f"{key}: nothing happens, the test could not fail"
        assert float((after[key].double() - wanted[key]).norm()) < 1e-6 * size, key


def test_norms(way: list[str], tmp_path: Path) -> None:
    """Norm deltas are vectors: one column, more rows than a block has."""
    base = sd1() | {f"model.diffusion_model.output_blocks.9.0.in_layers.0.{leaf}": noise(300, seed=40) for leaf in ("weight", "bias")}
    norm = "up_blocks.3.resnets.0.norm1"
    adapter = hand.lycoris(tmp_path / "adapter.safetensors", {norm: {"w_norm": noise(300, seed=41), "b_norm": noise(300, seed=42)}})
    merge(hand.save(tmp_path / "base.safetensors", base), [(adapter, 0.5)], tmp_path / "out.safetensors", arch="sd1", verify=True)
    wanted = base | {
        f"model.diffusion_model.output_blocks.9.0.in_layers.0.{leaf}": noise(300, seed=40).double() + 0.5 * noise(300, seed=seed).double()
        for leaf, seed in (("weight", 41), ("bias", 42))
    }
    check(base, wanted, tmp_path / "out.safetensors")
    assert set(way[1:]) <= {"dense"}


def test_embeddings_and_lora_biases(way: list[str], tmp_path: Path) -> None:
    """PEFT: ΔW of an embedding is scale · (B A)^T; lora_B.bias is scaled like B A."""
    from safetensors.torch import save_file

    base = hand.language_model(64, torch.float32)
    base |= {"model.embed_tokens.weight": noise(100, 64, seed=50), "lm_head.weight": noise(100, 64, seed=51)}
    a, b, one, bias = noise(RANK, 100, seed=52), noise(64, RANK, seed=53), hand.pair((64, 64), RANK, 3.0, 54), noise(64, seed=55)
    folder = hand.peft(tmp_path / "adapter", {Q: one})
    tensors = load_file(folder / "adapter_model.safetensors")
    tensors |= {"base_model.model.model.embed_tokens.lora_embedding_A": a, "base_model.model.model.embed_tokens.lora_embedding_B": b}
    save_file(tensors | {f"base_model.model.{Q}.lora_B.bias": bias}, folder / "adapter_model.safetensors")
    config = '{"peft_type": "LORA", "r": 2, "lora_alpha": 3.0, "lora_bias": true}'
    (folder / "adapter_config.json").write_text(config)
    source = hand.save(tmp_path / "base.safetensors", base)
    merge(source, [(folder, 1.0)], tmp_path / "out.safetensors", verify=True)
    wanted = base | {
        "model.embed_tokens.weight": base["model.embed_tokens.weight"].double() + 1.5 * (b.double() @ a.double()).T,
        f"{Q}.weight": base[f"{Q}.weight"].double() + one.delta(),
        f"{Q}.bias": base[f"{Q}.bias"].double() + 1.5 * bias.double(),
    }
    check(base, wanted, tmp_path / "out.safetensors")
    assert set(way[1:]) == ({"lora"} if way[0] == "streamed" else set())


def test_terms_of_several_kinds_on_one_weight(way: list[str], tmp_path: Path) -> None:
    """Each is a change of W, not of what the other makes of it; streamed and whole ones add up in one block."""
    base = sd1()
    source = hand.save(tmp_path / "base.safetensors", base)
    made = {"one": (lora, 1.0), "two": (dora(1), 0.5), "three": (oft, -0.4), "four": (loha, 2.0)}
    given = [(hand.lycoris(tmp_path / f"{name}.safetensors", {FF: leaves(SHAPES[FF])}), weight) for name, (leaves, weight) in made.items()]
    merge(source, given, tmp_path / "out.safetensors", arch="sd1", verify=True)
    key = f"model.diffusion_model.{NATIVE[FF]}.weight"
    old = base[key].double()
    deltas = [loratools.load(path, arch="sd1").entries[0].module.delta_at(weight, old) for path, weight in given]
    check(base, base | {key: old + torch.stack(deltas).sum(0)}, tmp_path / "out.safetensors")
    assert set(way[1:]) == ({"lora", "loha"} if way[0] == "streamed" else set())


# -------------------------------------------------------------------------------------------- fused, split, exchanged, transposed


def both_layouts(tmp_path: Path, adapter: Path, weight: float) -> Iterator[tuple[Tensors, Tensors]]:
    """(base, merged) of Flux in its original names, once merged fused and once merged split and fused again by hand."""
    base = hand.flux()
    merge(hand.save(tmp_path / "fused.safetensors", base), [(adapter, weight)], tmp_path / "a.safetensors", arch="flux", verify=True)
    yield base, load_file(tmp_path / "a.safetensors")
    apart = hand.split_flux(base)
    merge(hand.save(tmp_path / "apart.safetensors", apart), [(adapter, weight)], tmp_path / "b.safetensors", arch="flux", verify=True)
    merged = load_file(tmp_path / "b.safetensors")
    same = {f"{name}.{leaf}": merged[f"{mine}.{leaf}"] for name, mine in hand.SAME.items() for leaf in ("weight", "bias")}
    yield hand.fuse_flux(apart) | {key: base[key] for key in same}, hand.fuse_flux(merged) | same


SPLITTING = ["lora", "lora and diff_b", "dora out", "loha", "lokr", "dense", "set", "oft", "ia3 out", "ia3 in"]
WHOLE_ONLY = ["dora in", "boft", "glora"]


@pytest.mark.parametrize("kind", [*SPLITTING, *WHOLE_ONLY])
def test_fused_modules(kind: str, way: list[str], tmp_path: Path) -> None:
    """The formula holds on the fused, exchanged layers of the file as it stands; in-axis DoRA, BOFT and GLoRA cannot be split."""
    leaves, weight = KINDS[kind][0], 0.6
    names = [name for name in FUSED if (kind, name) != ("ia3 in", LINEAR1)]  # a vector over inputs does not tell how wide the mlp is
    modules = {name: leaves(tuple(hand.flux()[f"{name}.weight"].shape)) for name in names}
    adapter = hand.lycoris(tmp_path / "adapter.safetensors", modules)
    by_name = {entry.name: entry.module for entry in loratools.load(adapter, arch="flux").entries}
    for base, after in both_layouts(tmp_path, adapter, weight):
        wanted = dict(base)
        for name in names:
            module = next(found for key, found in by_name.items() if key.replace(".", "_") == name.replace(".", "_"))
            add(wanted, name, module, weight, base)
        for key, old in base.items():
            value, found = wanted[key].double(), after[key].double()
            assert float((found - value).norm()) <= 1e-6 * float(value.norm()), key
            if key.endswith(".weight") and key.removesuffix(".weight") in names:
                assert float((value - old).norm()) > 0.02 * float(value.norm())
            if wanted[key] is old:
                assert torch.equal(after[key], old), key


def test_modules_that_are_apart_go_to_the_rows_that_are_theirs(way: list[str], tmp_path: Path) -> None:
    """k and v, and the mlp, without q: the rows of the fused layers that no module is for stay, to the bit."""
    h = hand.WIDTH
    names = {f"{BLOCK}.to_k": (h, h), f"{BLOCK}.to_v": (h, h), f"{hand.SINGLE}.proj_mlp": (4 * h, h), "norm_out.linear": (2 * h, h)}
    pairs = {name: hand.pair(shape, RANK, 1.0, number * 7) for number, (name, shape) in enumerate(names.items())}
    adapter = hand.diffusers(tmp_path / "adapter.safetensors", pairs)
    k, v, mlp, last = (2 * one.delta() for one in pairs.values())  # alpha 1 over rank 2 is not in the file: scale 1
    none = torch.zeros(h, h, dtype=torch.float64)
    deltas = {QKV: torch.cat([none, k, v]), LINEAR1: torch.cat([none, none, none, mlp]), LAST: hand.exchanged(last)}
    for base, after in both_layouts(tmp_path, adapter, 1.0):
        for name, delta in deltas.items():
            old, found = base[f"{name}.weight"], after[f"{name}.weight"]
            wanted = old.double() + delta
            assert float((found.double() - wanted).norm()) < 1e-6 * float(wanted.norm()), name
            still = delta.abs().sum(1) == 0
            assert torch.equal(found[still], old[still])
        assert [key for key in after if key.removesuffix(".weight") not in deltas and not torch.equal(after[key], base[key])] == []


@pytest.mark.parametrize("kind", ["lora", "dora out", "dora in", "loha", "oft"])
def test_open_clip_s_joined_attention_and_turned_projection(kind: str, way: list[str], tmp_path: Path) -> None:
    """SDXL's second text encoder: q, k, v are rows of in_proj_weight, text_projection is stored (in, out)."""
    h, prefix, layer = 32, "conditioner.embedders.1.model", "text_model.encoder.layers.0.self_attn"
    block = f"{prefix}.transformer.resblocks.0.attn"
    base = {f"{block}.in_proj_weight": noise(3 * h, h, seed=60), f"{block}.in_proj_bias": noise(3 * h, seed=61)}
    base |= {f"{prefix}.text_projection": noise(h, h, seed=62), f"{prefix}.ln_final.weight": noise(h, seed=63)}
    base |= {f"{block}.out_proj.weight": noise(h, h, seed=64), f"{block}.out_proj.bias": noise(h, seed=65)}
    base |= {f"model.diffusion_model.label_emb.0.0.{leaf}": noise(*shape, seed=66) for leaf, shape in (("weight", (h, 8)), ("bias", (h,)))}
    leaves = KINDS[kind][0]
    modules = {f"{layer}.q_proj": leaves((h, h)), f"{layer}.v_proj": leaves((h, h)), "text_projection": leaves((h, h))}
    adapter = hand.lycoris(tmp_path / "adapter.safetensors", modules, "lora_te2_")
    source = hand.save(tmp_path / "base.safetensors", base)
    merge(source, [(adapter, 0.8)], tmp_path / "out.safetensors", arch="sdxl", verify=True)
    found = {entry.sites[0].path.rpartition(".")[2]: entry.module for entry in loratools.load(adapter, arch="sdxl").entries}
    joined = base[f"{block}.in_proj_weight"].double().clone()
    for part, name in ((0, "q_proj"), (2, "v_proj")):
        rows = joined[part * h : part * h + h]
        rows += found[name].delta_at(0.8, rows.clone())
    turned = base[f"{prefix}.text_projection"].double()
    turned = turned + found["text_projection"].delta_at(0.8, turned.T).T
    check(base, base | {f"{block}.in_proj_weight": joined, f"{prefix}.text_projection": turned}, tmp_path / "out.safetensors")


def test_regions_of_a_tensor_larger_than_a_block(tmp_path: Path) -> None:
    """With the block there is: k and v of a joined weight begin in the middle of one, in float32 and in bf16."""
    h = math.isqrt(arithmetic.BLOCK) + 12
    assert h % (arithmetic.BLOCK // h), "k begins where a block does"
    for dtype in (torch.float32, torch.bfloat16):
        base = hand.flux(dtype, h)
        pairs = {
            f"{BLOCK}.to_{part}": hand.pair((h, h), 8, 8.0, seed).sized(0.002, base[f"{QKV}.weight"]) for seed, part in enumerate("qkv")
        }
        adapter = hand.diffusers(tmp_path / f"{dtype}.safetensors", pairs)
        source, out = hand.save(tmp_path / "base.safetensors", base), tmp_path / f"{dtype}-out.safetensors"
        merge(source, [(adapter, 1.0)], out, threads=4, verify=True)
        after = hand.assert_untouched(base, out, [f"{QKV}.weight"])
        wanted = base[f"{QKV}.weight"].double() + torch.cat([one.delta() for one in pairs.values()])
        found = after[f"{QKV}.weight"].double()
        if dtype == torch.float32:
            assert float((found - wanted).norm()) < 1e-6 * float(wanted.norm())
        else:
            apart = hand.steps_apart(found, hand.nearest(wanted, dtype), dtype)
            assert float(apart.max()) <= 1
            assert float((apart > 0).double().mean()) <= 0.005
        assert {NORM, UP}.isdisjoint(after)
