"""resize and what a file says of its ranks outside of its tensors (R5): headers, adapter_config.json, order, keys, everything that is kept.

Expected ranks, alphas and scales are worked out from what was put into the files; PEFT itself loads what came out.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from loratools.operations.compare import compare
from loratools.operations.resize import resize
from tests.operations.made import ATTENTION, FF, PROJ, SHAPES, Make, Save, factors, kohya, parts, written
from tests.operations.resized import A, C, P, anchor, error_of, kind_of, rank_in, same, spectrum
from tests.reference import deltas

Peft = Callable[..., Path]


def header(path: Path) -> dict[str, str]:
    with safe_open(path, "pt") as file:
        return dict(file.metadata() or {})


def best(path: Path, stem: str, rank: int) -> float:
    sigma = spectrum(path, stem)
    return float((sigma[rank:].square().sum() / sigma.square().sum()).sqrt())


# --------------------------------------------------------------------------------------------------------------------- kohya


ARGS = {"conv_dim": "12", "conv_alpha": "3", "block_dims": "4,4", "dropout": "0.1", "algo": "locon"}


def linear_and_conv(randn: Make, save: Save, linear: int, conv: int, **metadata: str) -> Path:
    tensors = {**written(A, *factors(randn, (16, 16), linear), 4.0), **written(C, *factors(randn, (16, 32, 3, 3), conv), 3.0)}
    tensors |= written(P, *factors(randn, (16, 16, 1, 1), linear), 4.0)
    dims = {"ss_network_dim": str(linear), "ss_network_alpha": "4.0", "ss_network_module": "lycoris.kohya"}
    return save("a.safetensors", tensors, {**dims, "ss_network_args": json.dumps(ARGS), "ss_tag_frequency": "{}", **metadata})


def test_linear_8_and_conv_4(randn: Make, save: Save, tmp_path: Path) -> None:
    """R5: alpha of the last module for all, conv_dim stale."""
    a, out = linear_and_conv(randn, save, 16, 12), tmp_path / "out.safetensors"
    result = resize(a, out, rank=8, conv_rank=4)
    found = load_file(out)
    assert (rank_in(out, A), rank_in(out, P), rank_in(out, C)) == (8, 8, 4)
    assert {float(found[f"{stem}.alpha"]) for stem in (A, P)} == {4 / 16 * 8}
    assert float(found[f"{C}.alpha"]) == 3 / 12 * 4
    for stem, rank in ((A, 8), (P, 8), (C, 4)):
        assert error_of(a, out, stem) == pytest.approx(best(a, stem, rank), rel=1e-5)
    assert result["ranks_before"] == {"12": 1, "16": 2}
    assert result["ranks_after"] == {"4": 1, "8": 2}
    told = header(out)
    assert (told["ss_network_dim"], told["ss_network_alpha"], told["ss_network_module"]) == ("Dynamic", "Dynamic", "lycoris.kohya")
    assert json.loads(told["ss_network_args"]) == {"conv_dim": "4", "conv_alpha": "1", "dropout": "0.1", "algo": "locon"}
    assert told["ss_tag_frequency"] == "{}"


def test_one_rank_is_told_as_one(randn: Make, save: Save, tmp_path: Path) -> None:
    a, out = linear_and_conv(randn, save, 8, 6), tmp_path / "out.safetensors"
    resize(a, out, rank=4)
    assert header(out)["ss_network_dim"] == "4"
    assert header(out)["ss_network_alpha"] == "2"  # 4 / 8 · 4, and 3 / 6 · 4
    assert json.loads(header(out)["ss_network_args"])["conv_dim"] == "4"


def test_convolutions_of_several_ranks_are_told_as_none(randn: Make, save: Save, tmp_path: Path) -> None:
    other = kohya("up_blocks.3.resnets.1.conv1")
    tensors = {**written(C, *factors(randn, (16, 32, 3, 3), 8), 8.0), **written(other, *factors(randn, (16, 32, 3, 3), 2), 2.0)}
    a = save("a.safetensors", {**tensors, **anchor(randn)}, {"ss_network_args": json.dumps(ARGS), "ss_network_dim": "1"})
    resize(a, tmp_path / "out.safetensors", conv_rank=4)
    assert json.loads(header(tmp_path / "out.safetensors")["ss_network_args"]) == {"dropout": "0.1", "algo": "locon"}


@pytest.mark.parametrize("text", ["None", "no json", "[]", '{"conv_dim": "12"', "{}"])
def test_arguments_that_say_nothing_stay(text: str, randn: Make, save: Save, tmp_path: Path) -> None:
    a = linear_and_conv(randn, save, 8, 8, ss_network_args=text)
    resize(a, tmp_path / "out.safetensors", rank=4)
    assert header(tmp_path / "out.safetensors")["ss_network_args"] == text


def test_a_loha_that_becomes_lora_is_told_as_one(randn: Make, save: Save, tmp_path: Path) -> None:
    """Its keys are a LoRA's, at the place where its own were; the header speaks of no LoHa any more."""
    loha = kind_of("loha", randn)
    metadata = {"ss_network_module": "lycoris.kohya", "ss_network_dim": "3", "ss_network_args": '{"algo": "loha", "preset": "full"}'}
    tensors = {**loha, **anchor(randn)}
    bare, out = save("bare.safetensors", tensors), tmp_path / "out.safetensors"
    a = save("a.safetensors", {**tensors, "bundle_emb.x.string_to_param": randn(2, 16)}, metadata)
    result = resize(a, out, rank=5)
    order = [key for key in parts(out)[0] if key != "__metadata__"]
    pieces = [f"{A}.alpha", f"{A}.lora_down.weight", f"{A}.lora_up.weight"]
    assert sorted(order[:3]) == pieces
    assert order[3:6] == [key for key in parts(a)[0] if key.startswith(P)]
    assert order[6:] == ["bundle_emb.x.string_to_param"]
    assert float(load_file(out)[f"{A}.alpha"]) == 3 / 3 * 5
    assert json.loads(header(out)["ss_network_args"]) == {"preset": "full"}
    assert header(out)["ss_network_module"] == "networks.lora"
    assert result["ranks_before"] == {"1": 1, "9": 1}
    assert compare(a, out)["max_relative_error"] == pytest.approx(best(bare, A, 5), rel=1e-5)


@pytest.mark.parametrize("kind", ["loha", "lokr"])
def test_a_pointwise_module_becomes_a_pointwise_convolution(kind: str, randn: Make, save: Save, tmp_path: Path) -> None:
    """LyCORIS keeps a 1x1 kernel flat; readers of LoRA want the four dimensions of the layer."""
    tensors = {
        "loha": {f"{P}.hada_w{n}_{part}": randn(*shape) for n in (1, 2) for part, shape in (("a", (16, 3)), ("b", (3, 16)))},
        "lokr": {f"{P}.lokr_w1": randn(4, 4), f"{P}.lokr_w2": randn(4, 4)},
    }
    for loader in (None, "nunchaku"):
        a, out = save("a.safetensors", tensors[kind]), tmp_path / "out.safetensors"
        resize(a, out, rank=4 if loader is None else 64, arch="sd1", loader=loader, force=True)
        found = load_file(out)
        rank = {None: 4, "nunchaku": {"loha": 9, "lokr": 16}[kind]}[loader]
        assert found[f"{P}.lora_down.weight"].shape == (rank, 16, 1, 1)
        assert found[f"{P}.lora_up.weight"].shape == (16, rank, 1, 1)


def test_modules_that_fit_are_the_same_bits_among_others(randn: Make, save: Save, tmp_path: Path) -> None:
    """R7: factors and alpha of what fits, whatever their dtypes; keys, order and what belongs to no module."""
    small = written(P, *(tensor.half() for tensor in factors(randn, (16, 16, 1, 1), 2)), 100.3)
    small[f"{P}.alpha"] = small[f"{P}.alpha"].bfloat16().reshape(1)
    tensors = {"bundle_emb.a.x": randn(3), **kind_of("conv", randn), **small, **kind_of("loha", randn)}
    a, out = save("a.safetensors", tensors), tmp_path / "out.safetensors"
    result = resize(a, out, rank=4)
    found = load_file(out)
    assert same(tensors, found, ["bundle_emb.a.x", *small])
    order = [key for key in parts(a)[0] if "hada" not in key]
    assert [key for key in parts(out)[0] if key in order] == order
    assert result["changed"] == 2


def test_a_negative_scale_stays_negative(randn: Make, save: Save, tmp_path: Path) -> None:
    a, out = save("a.safetensors", {**written(A, *factors(randn, (16, 16), 8), -4.0), **anchor(randn)}), tmp_path / "out.safetensors"
    resize(a, out, rank=4)
    assert float(load_file(out)[f"{A}.alpha"]) == -2
    assert error_of(a, out, A) == pytest.approx(best(a, A, 4), rel=1e-5)


def test_an_alpha_that_was_said_is_written_down(randn: Make, save: Save, tmp_path: Path) -> None:
    tensors = {**written(A, *factors(randn, (16, 16), 8), None), **written(P, *factors(randn, (16, 16, 1, 1), 2), None)}
    a, out = save("a.safetensors", tensors), tmp_path / "out.safetensors"
    resize(a, out, rank=4, alpha=2.0)
    found = load_file(out)
    assert float(found[f"{A}.alpha"]) == 1  # 2 / 8 · 4
    assert float(found[f"{P}.alpha"]) == 2
    assert same(tensors, found, [f"{P}.lora_up.weight", f"{P}.lora_down.weight"])
    sigma = torch.linalg.svdvals(deltas(a, alpha=2.0)[A])
    error = (deltas(out)[A] - deltas(a, alpha=2.0)[A]).norm()
    assert float(error) == pytest.approx(float(sigma[4:].square().sum().sqrt()), rel=1e-5)


@pytest.mark.parametrize("said", [None, 3.0])
def test_a_dialect_without_a_place_for_alpha(said: float | None, randn: Make, save: Save, tmp_path: Path) -> None:
    """An alpha that was said goes into the factors, of what fits as well: no record could say it."""
    module = "unet.up_blocks.3.attentions.0.proj_in"
    up, down = factors(randn, (16, 16, 1, 1), 6)
    a, out = save("a.safetensors", {f"{module}.lora.up.weight": up, f"{module}.lora.down.weight": down}), tmp_path / "out.safetensors"
    for rank in (2, 6):
        resize(a, out, rank=rank, alpha=said, force=True)
        found = load_file(out)
        assert {*found} == {f"{module}.lora.up.weight", f"{module}.lora.down.weight"}
        delta = (1.0 if said is None else said / 6) * up.double().flatten(1) @ down.double().flatten(1)
        error = (
            found[f"{module}.lora.up.weight"].double().flatten(1) @ found[f"{module}.lora.down.weight"].double().flatten(1) - delta
        ).norm()
        lost = float(torch.linalg.svdvals(delta)[rank:].norm())
        assert float(error) == pytest.approx(lost, rel=1e-5, abs=1e-7 * float(delta.norm()))


# ----------------------------------------------------------------------------------------------------------------- diffusers


def diffusers_file(randn: Make, save: Save, recorded: Mapping[str, Any] | None, **metadata: str) -> Path:
    tensors = {}
    for path, rank in ((ATTENTION, 8), (PROJ, 8), (FF, 2)):
        up, down = factors(randn, SHAPES[path], rank)
        tensors |= {f"unet.{path}.lora_A.weight": down, f"unet.{path}.lora_B.weight": up}
    if recorded is not None:
        metadata["lora_adapter_metadata"] = json.dumps({f"unet.{key}": value for key, value in recorded.items()})
    return save("a.safetensors", tensors, {"format": "pt", **metadata})


RECORDED: dict[str, Any] = {
    "r": 8, "lora_alpha": 4, "rank_pattern": {FF: 2}, "alpha_pattern": {"ff.net.2": 6}, "lora_dropout": 0.1, "target_modules": ["to_q"],
}  # fmt: skip


@pytest.mark.parametrize("rslora", [False, True])
def test_the_header_of_diffusers(rslora: bool, randn: Make, save: Save, tmp_path: Path) -> None:
    """Every module at the scale it had (rsLoRA's too); what fits keeps its bits; other fields stay."""
    a, out = diffusers_file(randn, save, {**RECORDED, "use_rslora": rslora}, author="x"), tmp_path / "out.safetensors"
    before = load_file(a)
    resize(a, out, rank=4)
    assert same(before, load_file(out), [f"unet.{FF}.lora_A.weight", f"unet.{FF}.lora_B.weight"])
    config = {key.removeprefix("unet."): value for key, value in json.loads(header(out)["lora_adapter_metadata"]).items()}
    assert config["r"] == 4
    assert [*config["rank_pattern"].values()] == [2]
    scale = 4 / 8**0.5 if rslora else 4 / 8
    assert config["lora_alpha"] == pytest.approx(scale * 4)
    assert [*config["alpha_pattern"].values()] == pytest.approx([6 / 2**0.5 * 2 if rslora else 6])
    assert config["use_rslora"] is False
    assert (config["lora_dropout"], config["target_modules"], header(out)["author"]) == (0.1, ["to_q"], "x")
    first, second = deltas(a), deltas(out)
    assert torch.allclose(first[f"unet.{FF}"], second[f"unet.{FF}"], rtol=1e-12)
    assert error_of(a, out, f"unet.{ATTENTION}") == pytest.approx(best(a, f"unet.{ATTENTION}", 4), rel=1e-5)


def test_mixed_ranks_without_a_header_get_one(randn: Make, save: Save, tmp_path: Path) -> None:
    """diffusers takes one alpha for all ranks where no header says more: rank 4 beside rank 2 would be at another scale."""
    a, out = diffusers_file(randn, save, None), tmp_path / "out.safetensors"
    resize(a, out, rank=4)
    config = json.loads(header(out)["lora_adapter_metadata"])
    assert (config["unet.r"], config["unet.lora_alpha"]) == (4, 4)
    assert [*config["unet.alpha_pattern"].values()] == [2]
    assert error_of(a, out, f"unet.{FF}") == 0


def test_a_diffusers_file_that_fits_is_the_same_file(randn: Make, save: Save, tmp_path: Path) -> None:
    for recorded in (None, RECORDED, {**RECORDED, "use_rslora": True}):
        a, out = diffusers_file(randn, save, recorded), tmp_path / "out.safetensors"
        resize(a, out, rank=8, force=True)
        assert parts(out) == parts(a)


# --------------------------------------------------------------------------------------------------------------------- PEFT


LAYERS = {  # a language model's modules: (shape, rank)
    "model.layers.0.self_attn.q_proj": ((24, 16), 16),
    "model.layers.0.self_attn.v_proj": ((8, 16), 8),
    "model.layers.0.mlp.down_proj": ((16, 40), 12),
    "model.layers.1.self_attn.q_proj": ((24, 16), 4),
}
CONFIG: dict[str, Any] = {
    "r": 16, "lora_alpha": 8, "rank_pattern": {"v_proj": 8, "down_proj": 12, "layers.1.self_attn.q_proj": 4},
    "alpha_pattern": {"down_proj": 24}, "target_modules": ["q_proj", "v_proj", "down_proj"], "task_type": None,
    "lora_dropout": 0.05, "base_model_name_or_path": "somebody/model",
}  # fmt: skip


def folder(randn: Make, peft: Peft, **fields: Any) -> Path:
    tensors = {}
    for name, (shape, rank) in LAYERS.items():
        up, down = factors(randn, shape, rank)
        tensors |= {f"base_model.model.{name}.lora_A.weight": down, f"base_model.model.{name}.lora_B.weight": up}
    return peft("a", tensors, {**CONFIG, **fields})


class Block(torch.nn.Module):
    """Modules under the names of a Llama's."""

    def __init__(self) -> None:
        super().__init__()
        for name, (shape, _) in LAYERS.items():
            owner: torch.nn.Module = self
            *path, last = name.split(".")
            for part in path:
                if not hasattr(owner, part):
                    owner.add_module(part, torch.nn.Module())
                owner = getattr(owner, part)
            owner.add_module(last, torch.nn.Linear(shape[1], shape[0], bias=False))


@pytest.mark.parametrize("rslora", [False, True])
def test_a_folder_of_mixed_ranks_to_8_is_loaded_by_peft(rslora: bool, randn: Make, peft: Peft, tmp_path: Path) -> None:
    """R5: r, patterns and alpha are rewritten, and PEFT's own merge of it is ΔW as told."""
    library = pytest.importorskip("peft")
    a, out = folder(randn, peft, use_rslora=rslora), tmp_path / "out"
    result = resize(a, out, rank=8)
    assert result["ranks_after"] == {"4": 1, "8": 3}
    config = json.loads((out / "adapter_config.json").read_text())
    assert (config["r"], config["use_rslora"], config["lora_dropout"]) == (8, False, 0.05)
    assert [*config["rank_pattern"].values()] == [4]
    assert config["base_model_name_or_path"] == "somebody/model"
    before = deltas(a)
    for path in (a, out):
        torch.manual_seed(1)
        model = Block()
        weights = {name: model.get_submodule(name).weight.detach().double().clone() for name in LAYERS}
        merged = library.PeftModel.from_pretrained(model, path).merge_and_unload()
        for name, (_, rank) in LAYERS.items():
            delta = before[f"base_model.model.{name}"]
            sigma = torch.linalg.svdvals(delta)
            kept = rank if path == a else min(rank, 8)
            error = float((merged.get_submodule(name).weight.detach().double() - weights[name] - delta).norm())
            assert error == pytest.approx(float(sigma[kept:].square().sum().sqrt()), rel=1e-4, abs=1e-5 * float(delta.norm()))


def test_a_folder_that_fits_keeps_its_config(randn: Make, peft: Peft, tmp_path: Path) -> None:
    a, out = folder(randn, peft, use_rslora=True), tmp_path / "out"
    resize(a, out, rank=16)
    before, after = (json.loads((path / "adapter_config.json").read_text()) for path in (a, out))
    assert {key: after[key] for key in before} == before
    first, second = (load_file(path / "adapter_model.safetensors") for path in (a, out))
    assert set(first) == set(second)
    assert same(first, second, [*first])


def test_embeddings_and_biases(randn: Make, peft: Peft, tmp_path: Path) -> None:
    """An embedding's factors lie the other way round; a LoRA's bias stands under the scale, which stays."""
    head, table = "base_model.model.model.layers.0.self_attn.q_proj", "base_model.model.model.embed_tokens"
    tensors = {
        f"{head}.lora_A.weight": randn(6, 16), f"{head}.lora_B.weight": randn(16, 6), f"{head}.lora_B.bias": randn(16),
        f"{table}.lora_embedding_A": randn(6, 40), f"{table}.lora_embedding_B": randn(16, 6),
    }  # fmt: skip
    config = {"r": 6, "lora_alpha": 3, "target_modules": ["q_proj", "embed_tokens"], "lora_bias": True}
    a, out = peft("a", tensors, config), tmp_path / "out"
    resize(a, out, rank=2)
    found = load_file(out / "adapter_model.safetensors")
    assert found[f"{table}.lora_embedding_A"].shape == (2, 40)
    assert found[f"{table}.lora_embedding_B"].shape == (16, 2)
    assert same(tensors, found, [f"{head}.lora_B.bias"])
    written_ = json.loads((out / "adapter_config.json").read_text())
    assert (written_["r"], written_["lora_alpha"], written_["lora_bias"]) == (2, 1, True)
    delta = 0.5 * (tensors[f"{table}.lora_embedding_B"].double() @ tensors[f"{table}.lora_embedding_A"].double()).t()
    after = 0.5 * (found[f"{table}.lora_embedding_B"].double() @ found[f"{table}.lora_embedding_A"].double()).t()
    sigma = torch.linalg.svdvals(delta)
    assert float((after - delta).norm()) == pytest.approx(float(sigma[2:].square().sum().sqrt()), rel=1e-5)


def test_a_folder_has_one_kind(randn: Make, peft: Peft, tmp_path: Path) -> None:
    """PEFT: one LoHa that has to become LoRA takes the others with it, exactly."""
    layers = [f"base_model.model.model.layers.{n}.self_attn.q_proj" for n in (0, 1)]
    tensors = {}
    for layer, rank in zip(layers, (4, 2), strict=True):
        tensors |= {f"{layer}.hada_w{n}_{part}": randn(*shape) for n in (1, 2) for part, shape in (("a", (24, rank)), ("b", (rank, 32)))}
    a = peft(
        "a",
        tensors,
        {"peft_type": "LOHA", "r": 4, "alpha": 2, "rank_pattern": {"layers.1.self_attn.q_proj": 2}, "target_modules": ["q_proj"]},
    )
    result = resize(a, tmp_path / "out", rank=8)
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert (config["peft_type"], config["r"]) == ("LORA", 8)
    assert [*config["rank_pattern"].values()] == [4]
    assert result["ranks_before"] == {"4": 1, "16": 1}
    assert error_of(a, tmp_path / "out", layers[1]) < 2e-7
    assert error_of(a, tmp_path / "out", layers[0]) == pytest.approx(best(a, layers[0], 8), rel=1e-5)
