"""What a file is, from names and shapes: each rule that decides at published widths, and each pair that nothing can decide."""

from __future__ import annotations

import pytest

from loratools.mapping.detect import Detection, detect
from loratools.mapping.read import named_architecture
from tests.mapping.builders import blank

Shapes = dict[str, tuple[int, ...]]


def flat(name: str, out: int, in_: int, *kernel: int, prefix: str = "lora_unet_", rank: int = 8) -> Shapes:
    """A kohya module: the shapes of its three tensors."""
    stem = prefix + name.replace(".", "_")
    one = tuple(1 for _ in kernel)
    return {f"{stem}.lora_down.weight": (rank, in_, *kernel), f"{stem}.lora_up.weight": (out, rank, *one), f"{stem}.alpha": ()}


def peft(name: str, out: int, in_: int, rank: int = 8) -> Shapes:
    return {f"{name}.lora_A.weight": (rank, in_), f"{name}.lora_B.weight": (out, rank)}


def look(*modules: Shapes, metadata: dict[str, str] | None = None, arch: str | None = None) -> Detection:
    shapes = {key: shape for module in modules for key, shape in module.items()}
    return detect(blank(shapes), metadata or {}, arch=named_architecture(arch) if arch else None)


def names(found: Detection) -> set[str]:
    return {candidate.architecture.name for candidate in found.candidates}


def verdict(found: Detection) -> tuple[str | None, set[str], str | None]:
    best = found.best
    return found.dialect, names(found), best.variant if best and not found.ambiguous else None


_T0 = "attentions.0.transformer_blocks.0"
_H = 3072

DECIDED: dict[str, tuple[list[Shapes], str, str, str | None]] = {
    "attn2 reads 768: SD1": ([flat(f"down_blocks.0.{_T0}.attn2.to_k", 320, 768)], "kohya", "sd1", "base"),
    "attn2 reads 1024: SD2": ([flat(f"down_blocks.0.{_T0}.attn2.to_k", 320, 1024)], "kohya", "sd2", "base"),
    "proj_in is a convolution: SD1": ([flat("down_blocks.0.attentions.0.proj_in", 320, 320, 1, 1)], "kohya", "sd1", "base"),
    "proj_in is linear: SD2": ([flat("down_blocks.0.attentions.0.proj_in", 320, 320)], "kohya", "sd2", "base"),
    "attn2 reads 2048: SDXL": ([flat(f"down_blocks.1.{_T0}.attn2.to_k", 640, 2048)], "kohya-diffusers", "sdxl", "base"),
    "transformer block 5: SDXL": (
        [flat("mid_block.attentions.0.transformer_blocks.5.attn1.to_q", 1280, 1280)],
        "kohya-diffusers",
        "sdxl",
        "base",
    ),
    "transformer block 1 of width 640: SDXL": (
        [flat("down_blocks.1.attentions.0.transformer_blocks.1.attn1.to_q", 640, 640)],
        "kohya-diffusers",
        "sdxl",
        "base",
    ),
    "attention in up_blocks.0: SDXL": ([flat(f"up_blocks.0.{_T0}.attn1.to_q", 1280, 1280)], "kohya-diffusers", "sdxl", "base"),
    "320 channels: SDXL base": ([flat("input_blocks.4.1.proj_in", 640, 640)], "kohya", "sdxl", "base"),
    "384 channels: the refiner": ([flat("input_blocks.4.1.proj_in", 768, 768)], "kohya", "sdxl-refiner", "refiner"),
    "attn2 reads 1280: the refiner": (
        [flat("input_blocks.4.1.transformer_blocks.0.attn2.to_k", 768, 1280)],
        "kohya",
        "sdxl-refiner",
        "refiner",
    ),
    "SD3 medium": ([flat("joint_blocks.0.x_block.attn.qkv", 4608, 1536)], "kohya", "sd3", "medium"),
    "a second attention: SD3.5 medium": (
        [flat("joint_blocks.0.x_block.attn2.qkv", 4608, 1536), flat("joint_blocks.0.x_block.attn.qkv", 4608, 1536)],
        "kohya",
        "sd3",
        "3.5-medium",
    ),
    "h 2432: SD3.5 large": ([flat("joint_blocks.3.x_block.attn.qkv", 7296, 2432)], "kohya", "sd3", "3.5-large"),
    "img_attn_qkv dotted: HunyuanVideo": (
        [peft("diffusion_model.double_blocks.0.img_attn_qkv", 9216, _H), peft("diffusion_model.double_blocks.0.img_mlp.fc1", 12288, _H)],
        "comfy",
        "hunyuan-video",
        "base",
    ),
    "img_attn.qkv and modulation: Flux": (
        [peft("diffusion_model.double_blocks.0.img_attn.qkv", 9216, _H), peft("diffusion_model.double_blocks.0.img_mod.lin", 18432, _H)],
        "comfy",
        "flux",
        "dev",
    ),
    "mod_lin: Flux": ([flat("double_blocks.0.img_mod.lin", 18432, _H)], "kohya", "flux", "dev"),
    "mod_linear and mlp_fc1: HunyuanVideo": (
        [flat("double_blocks.0.img_mod.linear", 18432, _H), flat("double_blocks.0.img_mlp.fc1", 12288, _H)],
        "kohya",
        "hunyuan-video",
        None,
    ),
    "vector_in: Flux": ([flat("vector_in.in_layer", _H, 768), flat("guidance_in.in_layer", _H, 256)], "kohya", "flux", "dev"),
    "distilled_guidance_layer: Chroma": (
        [flat("distilled_guidance_layer.layers.0.in_layer", 5120, 5120), flat("double_blocks.0.img_attn.qkv", 9216, _H)],
        "kohya",
        "chroma",
        "base",
    ),
    "linear1 of 27648 rows: klein 4B": ([flat("single_blocks.0.linear1", 27648, _H)], "kohya", "flux2", "klein-4b"),
    "linear2 reads 12288: klein 4B": ([flat("single_blocks.0.linear2", _H, 12288)], "kohya", "flux2", "klein-4b"),
    "mlp_0 of 18432 rows: klein 4B": ([flat("double_blocks.0.img_mlp.0", 18432, _H)], "kohya", "flux2", "klein-4b"),
    "txt_in reads 7680: klein 4B": ([flat("txt_in", _H, 7680)], "kohya", "flux2", "klein-4b"),
    "h 6144: Flux.2 dev": ([flat("double_blocks.0.img_attn.qkv", 18432, 6144)], "kohya", "flux2", "dev"),
    "h 4096: klein 9B": ([flat("double_blocks.0.img_attn.qkv", 12288, 4096)], "kohya", "flux2", "klein-9b"),
    "h 2304: Lumina2": ([flat("layers.0.attention.qkv", 3840, 2304)], "kohya", "lumina2", "base"),
    "h 3840: Z-Image": ([flat("layers.0.attention.qkv", 11520, 3840)], "kohya", "z-image", None),
    "adaLN_modulation_1: Lumina2": ([flat("layers.0.adaLN_modulation.1", 9216, 1024)], "kohya", "lumina2", "base"),
    "adaLN_modulation_0: Z-Image": ([flat("layers.0.adaLN_modulation.0", 15360, 256)], "kohya", "z-image", None),
    "img_mlp: Qwen-Image": (
        [peft("transformer.transformer_blocks.0.img_mlp.net.2", _H, 12288), peft("transformer.transformer_blocks.0.attn.to_q", _H, _H)],
        "diffusers",
        "qwen-image",
        None,
    ),
    "Wan 1.3B": ([flat("blocks.0.self_attn.q", 1536, 1536), flat("blocks.0.ffn.0", 8960, 1536)], "kohya", "wan", "2.1-t2v-1.3b"),
    "Wan 5B": ([flat("blocks.0.self_attn.q", 3072, 3072), flat("blocks.0.ffn.0", 14336, 3072)], "kohya", "wan", "2.2-ti2v-5b"),
    "Wan 14B": ([flat("blocks.0.self_attn.q", 5120, 5120), flat("blocks.0.ffn.0", 13824, 5120)], "kohya", "wan", "2.1-t2v-14b"),
    "k_img: Wan image to video": (
        [flat("blocks.0.self_attn.q", 5120, 5120), flat("blocks.0.cross_attn.k_img", 5120, 5120)],
        "kohya",
        "wan",
        "2.1-i2v-14b",
    ),
    "transformer. before original names: HunyuanVideo of diffusion-pipe": (
        [peft("transformer.double_blocks.0.img_attn_qkv", 9216, _H), peft("transformer.single_blocks.0.linear1", 21504, _H)],
        "diffusion-pipe",
        "hunyuan-video",
        "base",
    ),
    "transformer. before numbered parts: OMI": (
        [
            flat("x", 1, 1)
            and {
                f"transformer.double_blocks.0.img_attn.qkv.{n}.{leaf}": shape
                for n in range(3)
                for leaf, shape in (("lora_down.weight", (8, _H)), ("lora_up.weight", (_H, 8)), ("alpha", ()))
            }
        ],
        "omi",
        "flux",
        "dev",
    ),
    "transformer. before diffusers names with modulation: Flux": (
        [
            peft("transformer.transformer_blocks.0.attn.to_q", _H, _H),
            peft("transformer.single_transformer_blocks.37.norm.linear", 9216, _H),
            peft("transformer.time_text_embed.guidance_embedder.linear_1", _H, 256),
            peft("transformer.norm_out.linear", 6144, _H),
            peft("transformer.x_embedder", _H, 64),
        ],
        "diffusers",
        "flux",
        "dev",
    ),
}


@pytest.mark.parametrize("case", DECIDED)
def test_decided_by(case: str) -> None:
    modules, dialect, architecture, variant = DECIDED[case]
    found = look(*modules)
    assert found.dialect == dialect
    assert names(found) == {architecture}
    assert found.best is not None
    assert found.best.evidence
    if variant is not None:
        assert found.best.variant == variant


def blocks(template: str, count: int, out: int, in_: int) -> list[Shapes]:
    return [peft(template.format(n), out, in_) for n in range(count)]


def flux_without_modulation(double: int, single: int, prefix: str = "transformer.") -> list[Shapes]:
    """diffusers names: attention and feed-forward of the first blocks."""
    found = []
    for name in ("to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out"):
        found += blocks(f"{prefix}transformer_blocks.{{}}.attn.{name}", double, _H, _H)
    for stream in ("ff", "ff_context"):
        found += blocks(f"{prefix}transformer_blocks.{{}}.{stream}.net.0.proj", double, 12288, _H)
        found += blocks(f"{prefix}transformer_blocks.{{}}.{stream}.net.2", double, _H, 12288)
    for name in ("attn.to_q", "attn.to_k", "attn.to_v"):
        found += blocks(f"{prefix}single_transformer_blocks.{{}}.{name}", single, _H, _H)
    found += blocks(f"{prefix}single_transformer_blocks.{{}}.proj_mlp", single, 12288, _H)
    return found + blocks(f"{prefix}single_transformer_blocks.{{}}.proj_out", single, _H, 15360)


def native(double: int, single: int) -> list[Shapes]:
    found = blocks("diffusion_model.double_blocks.{}.img_attn.qkv", double, 9216, _H)
    found += blocks("diffusion_model.double_blocks.{}.img_mlp.0", double, 12288, _H)
    return found + blocks("diffusion_model.single_blocks.{}.linear1", single, 21504, _H)


HUNYUAN = {"hunyuan-video", "framepack"}

# What is undecidable, and who must be among the answers; nobody else may be but those named second.
UNDECIDABLE: dict[str, tuple[list[Shapes], set[str], set[str]]] = {
    "ai-toolkit Flux and Chroma": (native(19, 38), {"flux", "chroma"}, set()),
    "kohya Flux and Chroma": ([flat(f"double_blocks.{n}.img_attn.qkv", 9216, _H) for n in range(19)]
                              + [flat(f"double_blocks.{n}.img_mlp.0", 12288, _H) for n in range(19)], {"flux", "chroma"}, set()),
    "diffusers Flux, some blocks": (flux_without_modulation(5, 7), {"flux", "chroma", *HUNYUAN}, set()),
    "attention of low blocks: Qwen too": (
        [peft(f"transformer.transformer_blocks.{n}.attn.{name}", _H, _H) for n in range(4) for name in ("to_q", "add_k_proj")],
        {"flux", "chroma", "qwen-image", *HUNYUAN},
        {"flux2"},  # klein 4B has the same width and names
    ),
    "SD1 and SD2, attn1 only": (
        [flat(f"{place}.{_T0}.attn1.to_q", width, width) for place, width in (("down_blocks.0", 320), ("up_blocks.3", 320))],
        {"sd1", "sd2"},
        set(),
    ),
    "a slider of down_blocks 1 and 2": (
        [flat(f"down_blocks.{n}.{_T0}.attn1.to_q", width, width) for n, width in ((1, 640), (2, 1280))],
        {"sd1", "sd2", "sdxl"},
        set(),
    ),
    "klein 4B, attention only": ([flat(f"double_blocks.{n}.img_attn.qkv", 9216, _H) for n in range(5)]
                                 + [flat(f"double_blocks.{n}.img_attn.proj", _H, _H) for n in range(5)],
                                 {"flux", "chroma", "flux2"}, {"hunyuan-video"}),
    "kohya HunyuanVideo and Flux, attention and linear1/2": (
        [flat(f"double_blocks.{n}.img_attn.qkv", 9216, _H) for n in range(4)] + [flat("single_blocks.0.linear1", 21504, _H)],
        {"flux", "chroma", "hunyuan-video"},
        set(),
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", UNDECIDABLE)
def test_what_nothing_can_decide_is_called_ambiguous(case: str) -> None:
    modules, must, may = UNDECIDABLE[case]
    found = look(*modules)
    assert found.ambiguous
    assert must <= names(found) <= must | may
    for candidate in found.candidates:
        assert candidate.evidence
    name = sorted(must)[0]
    assert names(look(*modules, arch=name)) == {name}


@pytest.mark.parametrize(
    ("metadata", "case", "expected"),
    [
        ({"ss_base_model_version": "flux1"}, "ai-toolkit Flux and Chroma", "flux"),
        ({"ss_base_model_version": "chroma"}, "ai-toolkit Flux and Chroma", "chroma"),
        ({"modelspec.architecture": "flux-1-dev/lora"}, "kohya Flux and Chroma", "flux"),
        ({"modelspec.architecture": "chroma/lora"}, "kohya Flux and Chroma", "chroma"),
        ({"ss_base_model_version": "sd_v1"}, "SD1 and SD2, attn1 only", "sd1"),
        ({"ss_base_model_version": "sd_v2_v"}, "SD1 and SD2, attn1 only", "sd2"),
        ({"ss_base_model_version": "sdxl_base_v1-0"}, "a slider of down_blocks 1 and 2", "sdxl"),
        ({"modelspec.architecture": "stable-diffusion-v1/lora"}, "a slider of down_blocks 1 and 2", "sd1"),
        ({"ss_base_model_version": "qwen_image"}, "attention of low blocks: Qwen too", "qwen-image"),
        ({"ss_base_model_version": "flux_2_klein_4b"}, "klein 4B, attention only", "flux2"),
        ({"modelspec.architecture": "hunyuan-video/lora"}, "diffusers Flux, some blocks", "hunyuan-video"),
    ],
)
def test_metadata_settles_what_is_tied(metadata: dict[str, str], case: str, expected: str) -> None:
    found = look(*UNDECIDABLE[case][0], metadata=metadata)
    assert names(found) == {expected}
    assert found.metadata_conflict is None


def test_metadata_never_overrules_tensors() -> None:
    """A copied header says SDXL; the keys are SD1's. The tensors win, and the contradiction is told."""
    found = look(flat(f"down_blocks.0.{_T0}.attn2.to_k", 320, 768), metadata={"ss_base_model_version": "sdxl_base_v1-0"})
    assert names(found) == {"sd1"}
    assert found.metadata_conflict is not None
    assert "sdxl_base_v1-0" in found.metadata_conflict
    assert "sd1" in found.metadata_conflict


def test_metadata_that_names_none_of_the_tied_leaves_them_tied() -> None:
    found = look(*UNDECIDABLE["SD1 and SD2, attn1 only"][0], metadata={"ss_base_model_version": "flux1"})
    assert names(found) == {"sd1", "sd2"}
    assert found.metadata_conflict is not None


@pytest.mark.parametrize("case", [*DECIDED])
def test_one_foreign_key_keeps_the_verdict(case: str) -> None:
    modules, dialect, architecture, _ = DECIDED[case]
    found = look(*modules, {"stranger.thing.weight": (3, 3)})
    assert (found.dialect, names(found)) == (dialect, {architecture})
    assert found.unknown_keys == ["stranger.thing.weight"]


@pytest.mark.parametrize(
    "shapes",
    [
        {},
        {"a": (1,)},
        {"hello.world": (2, 2)},
        {"model.diffusion_model.out.2.weight": (4, 320, 3, 3), "first_stage_model.decoder.conv_in.weight": (512, 4, 3, 3)},
        {"lora_unet_no_such_module.lora_up.weight": (4, 4), "lora_unet_no_such_module.lora_down.weight": (4, 4)},
        {"emb_params": (4, 768)},
        {"lora_unet_.lora_up.weight": (4, 4)},
        {".lora_up.weight": (4, 4), "..lora_down.weight": (4, 4)},
        {"lora_te_text_model_encoder_layers_0_mlp_fc1.alpha": ()},
    ],
)
def test_nothing_known_is_never_a_success(shapes: Shapes) -> None:
    """An empty set of matches is no match (and no crash)."""
    found = detect(blank(shapes), {})
    assert found.best is None or found.best.matched > 0
    assert found.best is None or any("alpha" in key for key in shapes)


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
