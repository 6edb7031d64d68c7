"""The HunyuanVideo family: HunyuanVideo, FramePack, HunyuanImage 2.1. Recognised by name, not converted yet.

Double-stream blocks `{d}` and single-stream blocks `{s}` as in Flux.1 with other original names (`img_attn_qkv` for `img_attn.qkv`),
and a token refiner `{r}` in front. The final modulation is swapped, the refiner's is not. diffusers' names of the blocks are
Flux.1's. Source: Tencent `models.py`, diffusers `transformer_hunyuan_video.py`, `transformer_hunyuanimage.py`, single-file converter.
"""

from __future__ import annotations

from loratools.mapping.architectures import Architecture
from loratools.mapping.architectures.components import text_encoder, transformer
from loratools.mapping.architectures.text_encoders import LLM, LLM_WIDTHS, clip_l, language_model
from loratools.mapping.rules import Row, Table, cat, conv, indexed, norm, parameter, site, swap2

_DOUBLE, _SINGLE = "transformer_blocks.{d}", "single_transformer_blocks.{s}"
_REFINER = "txt_in.individual_token_refiner.blocks.{r}"
_REFINER_DIFF = "context_embedder.token_refiner.refiner_blocks.{r}"

_BLOCKS: tuple[Row, ...] = (
    cat("double_blocks.{d}.img_attn_qkv", f"{_DOUBLE}.attn.to_q .to_k .to_v", "h h h", "h"),
    cat("double_blocks.{d}.txt_attn_qkv", f"{_DOUBLE}.attn.add_q_proj .add_k_proj .add_v_proj", "h h h", "h"),
    site("double_blocks.{d}.img_attn_proj", f"{_DOUBLE}.attn.to_out.0", "h", "h"),
    site("double_blocks.{d}.txt_attn_proj", f"{_DOUBLE}.attn.to_add_out", "h", "h"),
    site("double_blocks.{d}.img_mlp.fc1", f"{_DOUBLE}.ff.net.0.proj", "mlp", "h"),
    site("double_blocks.{d}.img_mlp.fc2", f"{_DOUBLE}.ff.net.2", "h", "mlp"),
    site("double_blocks.{d}.txt_mlp.fc1", f"{_DOUBLE}.ff_context.net.0.proj", "mlp", "h"),
    site("double_blocks.{d}.txt_mlp.fc2", f"{_DOUBLE}.ff_context.net.2", "h", "mlp"),
    site("double_blocks.{d}.img_mod.linear", f"{_DOUBLE}.norm1.linear", "6h", "h"),
    site("double_blocks.{d}.txt_mod.linear", f"{_DOUBLE}.norm1_context.linear", "6h", "h"),
    norm("double_blocks.{d}.img_attn_q_norm", f"{_DOUBLE}.attn.norm_q", "head"),
    norm("double_blocks.{d}.img_attn_k_norm", f"{_DOUBLE}.attn.norm_k", "head"),
    norm("double_blocks.{d}.txt_attn_q_norm", f"{_DOUBLE}.attn.norm_added_q", "head"),
    norm("double_blocks.{d}.txt_attn_k_norm", f"{_DOUBLE}.attn.norm_added_k", "head"),
    cat(
        "single_blocks.{s}.linear1",
        f"{_SINGLE}.attn.to_q {_SINGLE}.attn.to_k {_SINGLE}.attn.to_v {_SINGLE}.proj_mlp",
        "h h h mlp",
        "h",
    ),
    site("single_blocks.{s}.linear2", f"{_SINGLE}.proj_out", "h", "h+mlp"),
    site("single_blocks.{s}.modulation.linear", f"{_SINGLE}.norm.linear", "3h", "h"),
    norm("single_blocks.{s}.q_norm", f"{_SINGLE}.attn.norm_q", "head"),
    norm("single_blocks.{s}.k_norm", f"{_SINGLE}.attn.norm_k", "head"),
)

_TOKEN_REFINER: tuple[Row, ...] = (
    site("txt_in.input_embedder", "context_embedder.proj_in", "h", "txt"),
    site("txt_in.t_embedder.mlp.0", "context_embedder.time_text_embed.timestep_embedder.linear_1", "h", "freq"),
    site("txt_in.t_embedder.mlp.2", "context_embedder.time_text_embed.timestep_embedder.linear_2", "h", "h"),
    site("txt_in.c_embedder.linear_1", "context_embedder.time_text_embed.text_embedder.linear_1", "h", "txt"),
    site("txt_in.c_embedder.linear_2", "context_embedder.time_text_embed.text_embedder.linear_2", "h", "h"),
    cat(f"{_REFINER}.self_attn_qkv", f"{_REFINER_DIFF}.attn.to_q .to_k .to_v", "h h h", "h"),
    site(f"{_REFINER}.self_attn_proj", f"{_REFINER_DIFF}.attn.to_out.0", "h", "h"),
    site(f"{_REFINER}.mlp.fc1", f"{_REFINER_DIFF}.ff.net.0.proj", "mlp", "h"),
    site(f"{_REFINER}.mlp.fc2", f"{_REFINER_DIFF}.ff.net.2", "h", "mlp"),
    site(f"{_REFINER}.adaLN_modulation.1", f"{_REFINER_DIFF}.norm_out.linear", "2h", "h"),
    norm(f"{_REFINER}.norm1", f"{_REFINER_DIFF}.norm1", "h"),
    norm(f"{_REFINER}.norm2", f"{_REFINER_DIFF}.norm2", "h"),
)

_FINAL = (
    site("final_layer.linear", "proj_out", "out", "h"),
    swap2("final_layer.adaLN_modulation.1", "norm_out.linear", "2h", "h"),
)


def _timestep(orig: str, diff: str) -> tuple[Row, Row]:
    return (site(f"{orig}.mlp.0", f"{diff}.linear_1", "h", "freq"), site(f"{orig}.mlp.2", f"{diff}.linear_2", "h", "h"))


_VIDEO = (
    conv("img_in.proj", "x_embedder.proj", "h", "latent", (1, 2, 2)),
    *_timestep("time_in", "time_text_embed.timestep_embedder"),
    *_timestep("guidance_in", "time_text_embed.guidance_embedder"),
    site("vector_in.in_layer", "time_text_embed.text_embedder.linear_1", "h", "vec"),
    site("vector_in.out_layer", "time_text_embed.text_embedder.linear_2", "h", "h"),
    *_TOKEN_REFINER,
    *_BLOCKS,
    *_FINAL,
)

# OneTrainer counts the feed-forward layers as the positions of the original's other models.
_OMI_NAMES = {row.name: row.name.replace(".fc1", ".fc0") for row in _VIDEO} | {
    "txt_in.t_embedder.mlp.0": "txt_in.t_embedder.linear_1",
    "txt_in.t_embedder.mlp.2": "txt_in.t_embedder.linear_2",
}

# What FramePack adds has one name only: it was published in diffusers' layout.
_FRAMEPACK = (
    *_VIDEO,
    conv("clean_x_embedder.proj", "clean_x_embedder.proj", "h", "latent", (1, 2, 2)),
    conv("clean_x_embedder.proj_2x", "clean_x_embedder.proj_2x", "h", "latent", (2, 4, 4)),
    conv("clean_x_embedder.proj_4x", "clean_x_embedder.proj_4x", "h", "latent", (4, 8, 8)),
    site("image_projection.up", "image_projection.up", "3h", "img"),
    site("image_projection.down", "image_projection.down", "h", "3h"),
)

_IMAGE = (
    conv("img_in.proj", "x_embedder.proj", "h", "latent", (1, 1)),
    *_timestep("time_in", "time_guidance_embed.timestep_embedder"),
    *_timestep("time_r_in", "time_guidance_embed.timestep_embedder_r"),  # MeanFlow, the distilled model
    *_timestep("guidance_in", "time_guidance_embed.guidance_embedder"),
    norm("byt5_in.layernorm", "context_embedder_2.norm", "glyph"),
    site("byt5_in.fc1", "context_embedder_2.linear_1", "glyph_h", "glyph"),
    site("byt5_in.fc2", "context_embedder_2.linear_2", "glyph_h", "glyph_h"),
    site("byt5_in.fc3", "context_embedder_2.linear_3", "h", "glyph_h"),
    parameter("cond_type_embedding", "cond_type_embedding"),
    *_TOKEN_REFINER,
    *_BLOCKS,
    *_FINAL,
)

_RANGES = {"d": 20, "s": 40, "r": 2}
_WIDTHS = {"h": 3072, "mlp": 12288, "head": 128, "txt": 4096, "vec": 768, "freq": 256, **_RANGES}

HUNYUAN_VIDEO = Table("hunyuan-video", _VIDEO, _RANGES, {"omi": indexed(_VIDEO, _OMI_NAMES)})

# OneTrainer numbers Llama first and CLIP second, as diffusers' pipeline does.
_ENCODERS = (
    text_encoder("text_encoder", LLM, LLM_WIDTHS["llama"], kohya=("lora_te1_",), onetrainer=("lora_te1_",), clip="llama"),
    clip_l("text_encoder_2", kohya=("lora_te2_",)),
)

ARCHITECTURES = (
    Architecture(
        "hunyuan-video",
        "HunyuanVideo",
        (transformer(HUNYUAN_VIDEO), *_ENCODERS),
        variants={"base": _WIDTHS},
        base_versions={"hunyuan_video": "base", "hunyuan-video": "base"},
        modelspec="hunyuan-video",
        supported=False,
    ),
    Architecture(
        "framepack",
        "FramePack",
        (transformer(Table("framepack", _FRAMEPACK, _RANGES)), *_ENCODERS),
        kohya_namespace="diff",  # musubi trains the diffusers layout
        comfy_namespace="diff",
        variants={"base": {**_WIDTHS, "img": 1152}},
        base_versions={"framepack": "base"},
        modelspec="framepack",
        supported=False,
    ),
    Architecture(
        "hunyuan-image",
        "HunyuanImage 2.1",
        (transformer(Table("hunyuan-image", _IMAGE, _RANGES)), language_model("qwen25_7b")),
        variants={"base": {"h": 3584, "mlp": 14336, "head": 128, "txt": 3584, "freq": 256, **_RANGES}},
        base_versions={"hunyuan-image-2.1": "base"},
        modelspec="hunyuan-image-2.1",
        supported=False,
    ),
)
