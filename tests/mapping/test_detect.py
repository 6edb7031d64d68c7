"""What a file is, from names and shapes: each rule that decides at published widths, and each pair that nothing can decide."""

from __future__ import annotations

import pytest

from loratools.mapping.detect import detect
from tests.mapping.builders import Shapes, blank, flat, look, names, peft

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
