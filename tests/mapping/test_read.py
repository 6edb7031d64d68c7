"""Keys become modules: where alpha comes from, which spellings mean the same, and everything that is wrong told at once."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from loratools.adapters.adapter import Adapter, Site
from loratools.errors import AmbiguousError, InputError, UnknownError, UnsupportedError, UsageError
from loratools.mapping.read import analyse, read
from loratools.tensors.reader import open_source
from tests.mapping.builders import Tensors, lora, noise, refusal, save, told

# Block 3 of the up path has attention in SD1 and SD2 only; its 1x1 convolution is SD1's.
PROJ = lora("lora_unet_up_blocks_3_attentions_0_proj_in", (16, 16, 1, 1))
Q = "lora_unet_up_blocks_3_attentions_0_transformer_blocks_0_attn1_to_q"
SITE = Site("denoiser", "up_blocks.3.attentions.0.transformer_blocks.0.attn1.to_q")
LLM = "base_model.model.model.layers.0.self_attn.q_proj"


def opened(tmp_path: Path, tensors: Tensors, metadata: dict[str, str] | None = None, **options: Any) -> Adapter:
    return read(save(tmp_path / "a.safetensors", tensors, metadata), **options)


def problems(tmp_path: Path, tensors: Tensors, metadata: dict[str, str] | None = None) -> set[tuple[str, str]]:
    path = save(tmp_path / "a.safetensors", tensors, metadata)
    return {(finding.severity, finding.code) for finding in analyse(open_source(path)).findings}


def refused(tmp_path: Path, tensors: Tensors, metadata: dict[str, str] | None = None, **options: Any) -> str:
    error = refusal(read, save(tmp_path / "a.safetensors", tensors, metadata), **options)
    assert error.exit_code == 3
    return told(error)


def folder(tmp_path: Path, tensors: Tensors, config: dict[str, Any]) -> Path:
    path = tmp_path / "adapter"
    path.mkdir(exist_ok=True)
    save(path / "adapter_model.safetensors", tensors)
    (path / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", **config}))
    return path


def module_at(adapter: Adapter, site: Site) -> Any:
    (module,) = adapter.modules[site]
    return module


# ------------------------------------------------------------------------------------------------------------ lesson 3: alpha


@pytest.mark.parametrize(
    "alpha",
    [
        torch.tensor(2.0),
        torch.tensor([2.0]),
        torch.tensor(2),
        torch.tensor([2], dtype=torch.int32),
        torch.tensor(2.0, dtype=torch.bfloat16),
        torch.tensor(2.0, dtype=torch.float16),
        torch.tensor(2.0, dtype=torch.float64),
    ],
    ids=["0-d", "[1]", "int64", "int32 [1]", "bf16", "fp16", "fp64"],
)
def test_an_alpha_tensor_of_any_form(alpha: torch.Tensor, tmp_path: Path) -> None:
    module = module_at(opened(tmp_path, {**PROJ, **lora(Q, (16, 16), alpha=None), f"{Q}.alpha": alpha}), SITE)
    assert (module.alpha, module.alpha_source, module.scale) == (2.0, "tensor", 0.5)


def test_a_module_without_alpha_takes_its_own_rank(tmp_path: Path) -> None:
    """Never the majority's alpha: three modules say 2 of rank 4, the fourth says nothing, so its scale is 1."""
    others = {k: v for name in "kv" for k, v in lora(f"{Q[:-1]}{name}", (16, 16)).items()}
    module = module_at(opened(tmp_path, {**PROJ, **others, **lora(Q, (16, 16), rank=8, alpha=None)}), SITE)
    assert (module.alpha, module.scale, module.rank) == (None, 1.0, 8)


@pytest.mark.parametrize(
    ("config", "scale", "rank"),
    [
        ({"r": 4, "lora_alpha": 8}, 2.0, 4),
        ({"r": 4, "lora_alpha": 8, "use_rslora": True}, 4.0, 4),
        ({"r": 16, "lora_alpha": 16, "use_rslora": True}, 4.0, 16),
        ({"r": 64, "lora_alpha": 64, "use_rslora": True}, 8.0, 64),
        ({"r": 2, "lora_alpha": 8, "rank_pattern": {"q_proj": 4}}, 2.0, 4),
        ({"r": 4, "lora_alpha": 8, "alpha_pattern": {"q_proj": 2, "layers.0.self_attn.q_proj": 99}}, 0.5, 4),  # first match wins
        (
            {"r": 4, "lora_alpha": 8, "alpha_pattern": {"_proj": 2, r"model\.layers\.\d+\.self_attn\.q_proj": 12}},
            3.0,
            4,
        ),  # patterns are whole
        ({"r": 4, "lora_alpha": 8, "alpha_pattern": {"^model.layers.0.self_attn.q_proj": 1}}, 0.25, 4),  # diffusers' anchor
    ],
)
def test_alpha_of_a_peft_config(config: dict[str, Any], scale: float, rank: int, tmp_path: Path) -> None:
    path = folder(tmp_path, lora(LLM, (8, 8), rank=rank, alpha=None, scheme="peft"), config)
    module = module_at(read(path), Site("model", "model.layers.0.self_attn.q_proj"))
    assert module.scale == pytest.approx(scale, rel=1e-12)
    assert module.alpha_source == "adapter_config"


def test_peft_keys_without_a_config_are_assumed_and_said_so(tmp_path: Path) -> None:
    tensors = lora(LLM, (8, 8), alpha=None, scheme="peft")
    module = module_at(opened(tmp_path, tensors), Site("model", "model.layers.0.self_attn.q_proj"))
    assert (module.alpha, module.alpha_source, module.scale) == (None, "assumed", 1.0)
    assert ("warning", "alpha-assumed") in problems(tmp_path, tensors)
    settled = module_at(opened(tmp_path, tensors, alpha=8.0), Site("model", "model.layers.0.self_attn.q_proj"))
    assert settled.scale == 2.0


def test_alpha_option_is_only_for_files_without(tmp_path: Path) -> None:
    error = refusal(read, save(tmp_path / "a.safetensors", {**PROJ, **lora(Q, (16, 16))}), alpha=8.0)
    assert isinstance(error, UsageError)
    assert error.exit_code == 2


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, 0.0])
def test_bad_alphas_are_refused(value: float, tmp_path: Path) -> None:
    tensors = {**PROJ, **lora(Q, (16, 16), alpha=value)}
    assert Q in refused(tmp_path, tensors)


def test_alpha_zero_is_settled_by_the_option(tmp_path: Path) -> None:
    """sd-scripts reads a stored 0 as the rank, ComfyUI as no strength: nobody but the user knows."""
    module = module_at(opened(tmp_path, {**PROJ, **lora(Q, (16, 16), alpha=0.0)}, alpha=4.0), SITE)
    assert module.scale == 1.0


def test_a_negative_alpha_is_read_with_a_warning(tmp_path: Path) -> None:
    tensors = {**PROJ, **lora(Q, (16, 16), alpha=-2.0)}
    assert module_at(opened(tmp_path, tensors), SITE).scale == -0.5
    assert any(severity == "warning" and "alpha" in code for severity, code in problems(tmp_path, tensors))


def test_two_records_of_alpha_that_differ_are_refused(tmp_path: Path) -> None:
    """A tensor and the header: the header says 8 of rank 4, the tensor 2."""
    stem = "unet.up_blocks.3.attentions.0.transformer_blocks.0.attn1.to_q"
    proj = lora("unet.up_blocks.3.attentions.0.proj_in", (16, 16, 1, 1), alpha=None, scheme="peft")
    header = {"lora_adapter_metadata": json.dumps({"unet.r": 4, "unet.lora_alpha": 8})}
    tensors = {**proj, **lora(stem, (16, 16), alpha=2.0, scheme="peft")}
    told_ = refused(tmp_path, tensors, header)
    assert "attn1.to_q" in told_
    assert "8" in told_
    assert "2" in told_
    agreeing = {**proj, **lora(stem, (16, 16), alpha=8.0, scheme="peft")}
    assert module_at(opened(tmp_path, agreeing, header), SITE).scale == 2.0


def test_a_rank_the_config_denies_is_refused(tmp_path: Path) -> None:
    path = folder(tmp_path, lora(LLM, (8, 8), rank=4, alpha=None, scheme="peft"), {"r": 8, "lora_alpha": 8})
    error = refusal(read, path)
    assert isinstance(error, InputError)
    assert "rank 4" in told(error)


@pytest.mark.parametrize("field", ["target_parameters", "layer_replication", "trainable_token_indices", "use_qalora", "use_bdlora"])
def test_config_fields_that_mean_something_else_are_refused(field: str, tmp_path: Path) -> None:
    path = folder(tmp_path, lora(LLM, (8, 8), alpha=None, scheme="peft"), {"r": 4, "lora_alpha": 4, field: [[0, 1]]})
    error = refusal(read, path)
    assert error.exit_code == 3
    assert field in told(error)


@pytest.mark.parametrize("init", ["pissa", "olora", "corda", "loftq", "pissa_niter_16"])
def test_initialisations_that_changed_the_base_are_told(init: str, tmp_path: Path) -> None:
    path = folder(tmp_path, lora(LLM, (8, 8), alpha=None, scheme="peft"), {"r": 4, "lora_alpha": 4, "init_lora_weights": init})
    findings = analyse(open_source(path)).findings
    assert any(init in finding.message for finding in findings)


# --------------------------------------------------------------------------------------------------------- hostile adapter rows


def test_half_pairs_and_leftovers_are_all_listed(tmp_path: Path) -> None:
    block = "lora_unet_up_blocks_3_attentions_0_transformer_blocks_0_"
    tensors = {
        **PROJ,
        f"{block}attn1_to_q.lora_down.weight": noise("a", (4, 16)).float(),
        f"{block}attn1_to_k.lora_up.weight": noise("b", (16, 4)).float(),
        f"{block}attn1_to_v.alpha": torch.tensor(2.0),
        f"{block}attn1_to_out_0.dora_scale": torch.ones(16, 1),
        f"{block}attn2_to_q.lora_down.weight": noise("c", (4, 16)).float(),
        f"{block}attn2_to_q.lora_up.weight": noise("d", (16, 8)).float(),  # rank 8 against 4
        f"{block}attn2_to_out_0.lora_down.weight": torch.zeros(0, 16),
        f"{block}attn2_to_out_0.lora_up.weight": torch.zeros(16, 0),
        f"{block}ff_net_2.lora_down.weight": noise("e", (16,)).float(),
        f"{block}ff_net_2.lora_up.weight": noise("f", (16,)).float(),
    }
    said = refused(tmp_path, tensors)
    for name in ("attn1_to_q", "attn1_to_k", "attn1_to_v", "attn1_to_out_0", "attn2_to_q", "attn2_to_out_0", "ff_net_2"):
        assert block + name in said


def test_two_keys_for_one_site_are_refused(tmp_path: Path) -> None:
    """The same module flattened and dotted: ComfyUI keeps the last, here both are named."""
    dotted = "unet.up_blocks.3.attentions.0.transformer_blocks.0.attn1.to_q"
    said = refused(tmp_path, {**PROJ, **lora(Q, (16, 16)), **lora(dotted, (16, 16), alpha=None, scheme="peft")})
    assert Q in said
    assert dotted in said


def test_two_spellings_of_one_factor_are_refused(tmp_path: Path) -> None:
    tensors = {**PROJ, **lora(Q, (16, 16))}
    stem = "unet.up_blocks.3.attentions.0.transformer_blocks.0.attn1.to_q"
    mixed = {**lora(stem, (16, 16), alpha=None, scheme="peft"), f"{stem}.lora.down.weight": noise("x", (4, 16)).float()}
    assert opened(tmp_path, tensors)
    assert stem in refused(tmp_path, mixed, arch="sd1")


def test_unknown_key_wrong_shape_and_renamed_prefix(tmp_path: Path) -> None:
    """Lesson 1: three planted faults, one refusal that names all three."""
    good = {**PROJ, **lora(Q, (16, 16)), **lora(Q[:-1] + "k", (16, 16)), **lora(Q[:-1] + "v", (16, 16))}
    assert len(opened(tmp_path, good).entries) == 4
    spoiled = {
        **{key: tensor for key, tensor in good.items() if not key.startswith(PROJ_STEM)},
        **{key.replace("lora_unet_", "lora_unex_"): tensor for key, tensor in PROJ.items()},
        "lora_unet_mid_block_gadget.lora_up.weight": torch.ones(4, 4),
        **lora(Q.replace("to_q", "to_out_0"), (24, 24)),
    }
    said = refused(tmp_path, spoiled, arch="sd1")
    for name in ("lora_unex_up_blocks_3_attentions_0_proj_in", "lora_unet_mid_block_gadget", "attn1_to_out_0"):
        assert name in said


PROJ_STEM = "lora_unet_up_blocks_3_attentions_0_proj_in"


def test_an_unknown_name_is_answered_with_the_nearest(tmp_path: Path) -> None:
    said = refused(tmp_path, {**PROJ, **lora(Q, (16, 16)), **lora("lora_unet_mid_block_atentions_0_proj_in", (16, 16, 1, 1))})
    assert "lora_unet_mid_block_attentions_0_proj_in" in said


def test_files_that_are_no_adapters(tmp_path: Path) -> None:
    for tensors in ({"a.weight": torch.ones(2, 2)}, {"emb_params": torch.ones(2, 8)}):
        assert isinstance(refusal(read, save(tmp_path / "a.safetensors", tensors)), UnknownError)
    unknown = lora("lora_unet_nobody_knows_this", (8, 8))
    error = refusal(read, save(tmp_path / "a.safetensors", unknown))
    assert isinstance(error, UnknownError)
    assert "--base" in told(error)


def test_ambiguous_files_ask_for_the_architecture(tmp_path: Path) -> None:
    path = save(tmp_path / "a.safetensors", lora(Q, (16, 16)))
    error = refusal(read, path)
    assert isinstance(error, AmbiguousError)
    assert "--arch" in told(error)
    assert "sd1" in told(error)
    assert "sd2" in told(error)
    assert read(path, arch="sd2").architecture == "sd2"
    assert isinstance(refusal(read, path, arch="sd9"), UsageError)


def test_cloneofsimo_is_told_by_name(tmp_path: Path) -> None:
    tensors = {f"unet:{n}:{side}": torch.ones((16, 4) if side == "up" else (4, 16)) for n in range(2) for side in ("up", "down")}
    error = refusal(read, save(tmp_path / "a.safetensors", tensors))
    assert isinstance(error, UnsupportedError)
    assert "cloneofsimo" in told(error)


# -------------------------------------------------------------------------------------------------------------- what is understood


@pytest.mark.parametrize("wrapper", ["_orig_mod.", "module.", "module.module.", "_orig_mod.module."])
def test_debris_changes_no_delta(wrapper: str, tmp_path: Path) -> None:
    """torch.compile and DataParallel in front of, and inside, the name."""
    clean = "unet.up_blocks.3.attentions.0.transformer_blocks.0.attn1.to_q"
    proj = lora("unet.up_blocks.3.attentions.0.proj_in", (16, 16, 1, 1), alpha=None, scheme="peft")
    factors = lora(clean, (16, 16), alpha=None, scheme="peft")
    expected = factors[f"{clean}.lora_B.weight"].double() @ factors[f"{clean}.lora_A.weight"].double()
    for dirty in (wrapper + clean, clean.replace("unet.", f"unet.{wrapper}"), clean.replace(".to_q", f".{wrapper}to_q")):
        adapter = opened(tmp_path, {**proj, **{key.replace(clean, dirty): tensor for key, tensor in factors.items()}})
        assert torch.equal(adapter.delta(SITE), expected)


@pytest.mark.parametrize("tail", ["base_layer", "default", "base_layer.default"])
def test_debris_behind_the_module(tail: str, tmp_path: Path) -> None:
    factors = lora(f"{LLM}.{tail}" if tail != "default" else LLM, (8, 8), alpha=None, scheme="peft")
    if "default" in tail:
        factors = {key.replace(".weight", ".default.weight"): tensor for key, tensor in factors.items()}
    adapter = opened(tmp_path, factors)
    assert set(adapter.modules) == {Site("model", "model.layers.0.self_attn.q_proj")}


def test_a_union_of_spellings_is_the_union_of_deltas(tmp_path: Path) -> None:
    """C11: kohya, diffusers and dot keys in one file, one third of the modules each."""
    stem = "unet.up_blocks.3.attentions.0.transformer_blocks.0.attn1.to_{}"
    parts = {
        "q": lora(Q, (16, 16), alpha=4.0),
        "k": lora(stem.format("k"), (16, 16), alpha=None, scheme="peft"),
        "v": lora(stem.format("v"), (16, 16), alpha=None, scheme="dot"),
    }
    adapter = opened(tmp_path, {**PROJ, **{key: tensor for part in parts.values() for key, tensor in part.items()}})
    for name, part in parts.items():
        up = next(tensor for key, tensor in part.items() if key.endswith(("up.weight", "lora_B.weight"))).double()
        down = next(tensor for key, tensor in part.items() if key.endswith(("down.weight", "lora_A.weight"))).double()
        found = adapter.delta(Site("denoiser", stem.format(name).removeprefix("unet.")))
        assert torch.allclose(found, up @ down, rtol=1e-14, atol=0)


def test_residue_is_kept_apart(tmp_path: Path) -> None:
    tensors = {**PROJ, **lora(Q, (16, 16)), "bundle_emb.token.clip_l": torch.ones(2, 8), "_aux.abc": torch.ones(3)}
    adapter = opened(tmp_path, tensors)
    assert set(adapter.residue) == {"bundle_emb.token.clip_l", "_aux.abc"}
    assert ("warning", "companion") in problems(tmp_path, tensors)


def test_module_names_of_a_base_nobody_has_a_table_for(tmp_path: Path) -> None:
    """--base: flattened names are looked up among the model's own, underscores and all."""
    base = save(
        tmp_path / "base.safetensors", {"tower.my_block.0.to_out_0.weight": torch.ones(8, 8), "tower.conv.weight": torch.ones(4, 3, 3, 3)}
    )
    tensors = {**lora("lora_unet_tower_my_block_0_to_out_0", (8, 8)), **lora("lora_unet_tower_conv", (4, 3, 3, 3))}
    assert isinstance(refusal(read, save(tmp_path / "a.safetensors", tensors)), UnknownError)
    adapter = opened(tmp_path, tensors, base=base)
    assert {site.path for site in adapter.modules} == {"tower.my_block.0.to_out_0", "tower.conv"}
    stranger = {**tensors, **lora("lora_unet_tower_none", (8, 8))}
    assert "lora_unet_tower_none" in refused(tmp_path, stranger, base=base)
    wrong = {**tensors, **lora("lora_unet_tower_conv", (4, 5, 3, 3))}
    assert "lora_unet_tower_conv" in refused(tmp_path, wrong, base=base)
