"""Layouts of many writers: encoders under every prefix, mixed spellings, foreign tools, debris in names, language models."""

from __future__ import annotations

import pytest

from loratools.mapping.detect import Detection
from tests.mapping.builders import Shapes, flat, look, names, peft

_H = 3072
_T0 = "attentions.0.transformer_blocks.0"

# ------------------------------------------------------------------------------------------------------------ oddities, section 1


def te(prefix: str, layer: int, width: int) -> Shapes:
    return flat(f"text_model.encoder.layers.{layer}.self_attn.q_proj", width, width, prefix=prefix)


def t5(prefix: str) -> Shapes:
    return flat("encoder.block.0.layer.0.SelfAttention.q", 4096, 4096, prefix=prefix)


def components(found: Detection) -> dict[str, int]:
    counts: dict[str, int] = {}
    assert found.best is not None
    for assignment in found.best.assigned.values():
        name = assignment.hit.slot.component.name
        counts[name] = counts.get(name, 0) + 1
    return counts


SD1 = flat(f"down_blocks.0.{_T0}.attn2.to_k", 320, 768)
SDXL = flat("input_blocks.4.1.transformer_blocks.1.attn2.to_k", 640, 2048)
FLUX = flat("double_blocks.0.img_mod.lin", 18432, _H)
SD3 = flat("joint_blocks.0.x_block.attn.qkv", 4608, 1536)

TWO = {"denoiser": 1, "text_encoder": 1, "text_encoder_2": 1}

ENCODERS: dict[str, tuple[list[Shapes], str, dict[str, int]]] = {
    "SD1 with te1": ([SD1, te("lora_te1_", 0, 768)], "sd1", {"denoiser": 1, "text_encoder": 1}),
    "SD1 with te": ([SD1, te("lora_te_", 0, 768)], "sd1", {"denoiser": 1, "text_encoder": 1}),
    "SDXL with both and a projection": (
        [SDXL, te("lora_te1_", 0, 768), te("lora_te2_", 31, 1280), flat("text_projection", 1280, 1280, prefix="lora_te2_")],
        "sdxl",
        {"denoiser": 1, "text_encoder": 1, "text_encoder_2": 2},
    ),
    "SDXL, te2 alone": ([SDXL, te("lora_te2_", 0, 1280)], "sdxl", {"denoiser": 1, "text_encoder_2": 1}),
    "SDXL, a single te of CLIP-L": ([SDXL, te("lora_te_", 0, 768)], "sdxl", {"denoiser": 1, "text_encoder": 1}),
    "SDXL, a single te of CLIP-G": ([SDXL, te("lora_te_", 0, 1280)], "sdxl", {"denoiser": 1, "text_encoder_2": 1}),
    "Flux, CLIP and kohya's T5": ([FLUX, te("lora_te1_", 0, 768), t5("lora_te3_")], "flux", TWO),
    "Flux, CLIP and OneTrainer's T5": ([FLUX, te("lora_te1_", 0, 768), t5("lora_te2_")], "flux", TWO),
    "SD3, all three": (
        [SD3, te("lora_te1_", 0, 768), te("lora_te2_", 0, 1280), t5("lora_te3_")],
        "sd3",
        {"denoiser": 1, "text_encoder": 1, "text_encoder_2": 1, "text_encoder_3": 1},
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", ENCODERS)
def test_encoders_are_told_by_inner_path_and_width(case: str) -> None:
    modules, architecture, expected = ENCODERS[case]
    found = look(*modules)
    assert names(found) == {architecture}
    assert components(found) == expected
    assert found.unknown_keys == []
    assert all(assignment.fits for assignment in found.best.assigned.values()) if found.best else False


def test_encoder_only_files() -> None:
    """CLIP-L alone is SD1's, SDXL's, SD3's or Flux's; OpenCLIP-H is SD2's alone."""
    found = look(te("lora_te1_", 0, 768), te("lora_te1_", 11, 768))
    assert found.ambiguous
    assert {"sd1", "sdxl", "sd3", "flux"} <= names(found)
    assert "sd2" not in names(found)
    assert names(look(te("lora_te_", 0, 1024), te("lora_te_", 22, 1024))) == {"sd2"}


def test_original_and_diffusers_names_in_one_sdxl_file() -> None:
    found = look(SDXL, flat("mid_block.attentions.0.transformer_blocks.9.attn2.to_k", 1280, 2048))
    assert names(found) == {"sdxl"}
    assert found.unknown_keys == []


def test_peft_beside_dot_spelling() -> None:
    """Mixed #15 and #16: every key has its own dialect."""
    dot = {
        "unet.mid_block.attentions.0.proj_in.lora.down.weight": (8, 1280),
        "unet.mid_block.attentions.0.proj_in.lora.up.weight": (1280, 8),
    }
    found = look(dot, peft("unet.mid_block.attentions.0.transformer_blocks.9.attn2.to_k", 1280, 2048))
    assert names(found) == {"sdxl"}
    assert found.unknown_keys == []
    assert found.best is not None
    assert {assignment.hit.slot.dialect.name for assignment in found.best.assigned.values()} == {"diffusers", "diffusers-dot"}


def test_transformer_and_kohya_keys_in_one_file() -> None:
    found = look(FLUX, peft("transformer.transformer_blocks.1.norm1.linear", 18432, _H))
    assert names(found) == {"flux"}
    assert found.unknown_keys == []


def test_tiny_models_of_the_same_structure() -> None:
    """Geometry is solved from the shapes, not compared with 3072: width 32, two of five blocks, q alone, GQA rows 24 + 8 + 8."""
    tiny = look(
        flat("double_blocks.0.img_mod.lin", 192, 32), flat("double_blocks.4.img_attn.qkv", 96, 32), flat("single_blocks.2.linear1", 216, 32)
    )
    assert names(tiny) == {"flux"}
    assert tiny.best is not None
    assert tiny.best.dims["denoiser"] == {"h": 32, "mlp": 120}
    lumina = look(flat("layers.0.attention.qkv", 40, 24), flat("layers.0.adaLN_modulation.1", 96, 10))
    assert names(lumina) == {"lumina2"}
    assert lumina.best is not None
    assert lumina.best.dims["denoiser"] == {"h": 24, "kv": 8, "cond": 10}


# ------------------------------------------------------------------------------------------------------------------ foreign layouts


def test_bfl_control() -> None:
    """Bias deltas, norm replacements and an input widened to 128: all of one architecture."""
    shapes: Shapes = {
        **peft("double_blocks.0.img_attn.qkv", 9216, _H, 128),
        "double_blocks.0.img_attn.qkv.lora_B.bias": (9216,),
        **peft("double_blocks.0.img_mod.lin", 18432, _H, 128),
        "double_blocks.0.img_mod.lin.lora_B.bias": (18432,),
        "double_blocks.0.img_attn.norm.query_norm.scale": (128,),
        "double_blocks.0.img_attn.norm.key_norm.scale": (128,),
        **peft("img_in", _H, 128, 128),
        "img_in.lora_B.bias": (_H,),
        **peft("final_layer.linear", 64, _H, 64),
    }
    found = look(shapes)
    assert (found.dialect, names(found)) == ("bfl-control", {"flux"})
    assert found.unknown_keys == []
    assert found.best is not None
    assert all(assignment.fits for assignment in found.best.assigned.values())


def processors(template: str, *leaves: tuple[str, int, int], count: int = 2) -> Shapes:
    return {
        f"{template.format(n)}.{leaf}.{side}.weight": (16, in_) if side == "down" else (out, 16)
        for n in range(count)
        for leaf, out, in_ in leaves
        for side in ("down", "up")
    }


_DOUBLE = (("qkv_lora1", 9216, _H), ("proj_lora1", _H, _H), ("qkv_lora2", 9216, _H), ("proj_lora2", _H, _H))


def test_xlabs_and_uso() -> None:
    double = processors("double_blocks.{}.processor", *_DOUBLE)
    single = processors("single_blocks.{}.processor", ("qkv_lora", 9216, _H), ("proj_lora", _H, 15360))
    for found, dialect in ((look(double), "xlabs"), (look(double, single), "uso")):
        assert (found.dialect, names(found)) == (dialect, {"flux"})
        assert found.unknown_keys == []


def test_thelastben() -> None:
    found = look(flat("single_transformer_blocks.1.attn.to_k", _H, _H), flat("single_transformer_blocks.1.proj_out", _H, 15360))
    shapes = {key.replace(".", "_.", 1): shape for key, shape in flat("single_transformer_blocks.1.norm.linear", 9216, _H).items()}
    assert look(shapes).dialect == "thelastben"
    assert names(look(shapes)) == {"flux"}
    assert found.dialect != "thelastben"


def test_cloneofsimo_is_positional() -> None:
    found = look({f"unet:{n}:{side}": (320, 4) if side == "up" else (4, 320) for n in range(3) for side in ("up", "down")})
    assert found.positional
    assert not look(SD1).positional


def test_onetrainer_by_what_lies_beside() -> None:
    """`lora_unet_` over diffusers names is OneTrainer's only with its embeddings, its metadata or `lora_transformer_`."""
    sdxl = flat("mid_block.attentions.0.transformer_blocks.9.attn2.to_k", 1280, 2048)
    assert look(sdxl).dialect == "kohya-diffusers"
    assert look(sdxl, {"bundle_emb.token.clip_l": (2, 768)}).dialect == "onetrainer"
    assert look(sdxl, metadata={"ot_branch": "master"}).dialect == "onetrainer"
    flux = flat("transformer_blocks.0.norm1.linear", 18432, _H, prefix="lora_transformer_")
    assert look(flux).dialect == "onetrainer"


def test_simpletuner_and_ai_toolkit_kinds() -> None:
    lokr = {"lycoris_transformer_blocks_0_norm1_linear.lokr_w1": (16, 16), "lycoris_transformer_blocks_0_norm1_linear.lokr_w2": (1152, 192)}
    found = look(lokr)
    assert (found.dialect, names(found) & {"flux"}) == ("lycoris", {"flux"})
    dora = {
        **peft("diffusion_model.double_blocks.0.img_mod.lin", 18432, _H),
        "diffusion_model.double_blocks.0.img_mod.lin.magnitude": (18432,),
    }
    found = look(dora)
    assert (found.dialect, names(found)) == ("comfy", {"flux"})
    assert [module.kind for modules in found.modules.values() for module in modules] == ["dora"]


def test_lightx2v() -> None:
    """lora_down without alpha, bias deltas and norm deltas under `diffusion_model.`."""
    block = "diffusion_model.blocks.0"
    shapes: Shapes = {
        f"{block}.self_attn.q.lora_down.weight": (32, 5120),
        f"{block}.self_attn.q.lora_up.weight": (5120, 32),
        f"{block}.self_attn.q.diff_b": (5120,),
        f"{block}.self_attn.norm_q.diff": (5120,),
        f"{block}.norm3.diff": (5120,),
        f"{block}.norm3.diff_b": (5120,),
    }
    found = look(shapes)
    assert (found.dialect, names(found), found.unknown_keys) == ("comfy", {"wan"}, [])


@pytest.mark.parametrize(
    "prefix",
    [
        "",
        "diffusion_model.",
        "transformer.",
        "lora_unet_",
        "lora_unet__",
        "diffusion_model.transformer_1.",
        "diffusion_model.transformer_2.",
    ],
)
def test_spellings_of_wan(prefix: str) -> None:
    maker = flat if prefix.startswith("lora") else None
    native_name = "blocks.0.attn1.to_q" if prefix in ("transformer.", "") else "blocks.0.self_attn.q"
    shapes = maker(native_name, 5120, 5120, prefix=prefix) if maker else peft(prefix + native_name, 5120, 5120)
    found = look(shapes)
    assert names(found) == {"wan"}
    assert set(components(found)) == {"denoiser_2" if "transformer_2" in prefix else "denoiser"}


@pytest.mark.parametrize(
    "name",
    [
        "base_model.model.model.layers.0.self_attn.q_proj",  # llama, mistral, qwen
        "base_model.model.transformer.h.3.attn.c_attn",  # gpt2
        "base_model.model.gpt_neox.layers.0.attention.query_key_value",
        "base_model.model.model.decoder.layers.0.fc1",  # opt
        "base_model.model.model.language_model.layers.0.mlp.gate_proj",  # vision-language
        "base_model.model.lm_head",
        "model.layers.0.self_attn.v_proj",
        "layers.31.mlp.down_proj",
    ],
)
def test_language_models(name: str) -> None:
    found = look(peft(name, 64, 64))
    assert (found.dialect, names(found)) == ("peft", {"llm"})
    assert found.unknown_keys == []


@pytest.mark.parametrize("prefix", ["_orig_mod.", "module.", "base_layer.", "_orig_mod.module.", "module.module.", "_orig_mod._orig_mod."])
@pytest.mark.parametrize(
    "name",
    ["unet.{}mid_block.attentions.0.transformer_blocks.9.attn2.to_k", "{}unet.mid_block.attentions.0.transformer_blocks.9.attn2.to_k"],
)
def test_wrapper_debris_is_seen_through(prefix: str, name: str) -> None:
    """torch.compile, DataParallel and PEFT leave segments in names: understood, and known to be debris."""
    found = look(peft(name.format(prefix), 1280, 2048))
    assert (found.dialect, names(found)) == ("diffusers", {"sdxl"})
    assert found.unknown_keys == []
    assert list(found.tidied.values()) == ["unet.mid_block.attentions.0.transformer_blocks.9.attn2.to_k"]


def test_debris_after_the_module() -> None:
    key = "base_model.model.model.layers.0.self_attn.q_proj"
    shapes: Shapes = {f"{key}.lora_A.default.weight": (4, 64), f"{key}.lora_B.default.weight": (64, 4)}
    found = look(shapes)
    assert (found.dialect, names(found), found.unknown_keys) == ("peft", {"llm"}, [])


# -------------------------------------------------------------------------------------------------------- how deep an encoder is


@pytest.mark.parametrize(("layers", "verdict"), [(12, {"sd1"}), (23, {"sd2"}), (9, {"sd1", "sd2"}), (14, {"sd1", "sd2"})])
def test_the_depth_of_the_encoder_tells_where_widths_cannot(layers: int, verdict: set[str]) -> None:
    """Toy widths, attention only: a whole CLIP-L (12 layers) or OpenCLIP-H (23) settles what the UNet leaves open, a part does not."""
    unet = flat(f"down_blocks.0.{_T0}.attn2.to_q", 32, 32)
    found = look(unet, *(te("lora_te_", layer, 24) for layer in range(layers)))
    assert {candidate.architecture.name for candidate in found.candidates} == verdict
