"""Families that are recognised and named, but not converted yet: Qwen-Image, Z-Image, LTX-Video, HiDream, Krea 2, Stable Cascade.

Each table has the original and diffusers' names with their dimensions, so that a file is told apart from the supported families
and a message can say what it is. Source: diffusers' transformer classes and single-file converters. Block index: `{d}`.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import replace

from loratools.mapping.architectures import Architecture
from loratools.mapping.architectures.components import transformer
from loratools.mapping.architectures.text_encoders import clip_g, clip_l, language_model, t5
from loratools.mapping.rules import Row, Table, cat, conv, norm, parameter, site


def _same(prefix: str, layers: Iterable[tuple[str, str, str]]) -> Iterator[Row]:
    """Linears whose original name is diffusers'."""
    for name, out, in_ in layers:
        yield site(f"{prefix}{name}", f"{prefix}{name}", out, in_)


def _same_norms(prefix: str, names: str, out: str) -> Iterator[Row]:
    for name in names.split():
        yield norm(f"{prefix}{name}", f"{prefix}{name}", out)


# ----------------------------------------------------------------------------------------------------------------- Qwen-Image

_QWEN_BLOCK = "transformer_blocks.{d}."
_QWEN = (
    *_same("", (("img_in", "h", "img"), ("txt_in", "h", "txt"), ("norm_out.linear", "2h", "h"), ("proj_out", "out", "h"))),
    *_same("time_text_embed.timestep_embedder.", (("linear_1", "h", "freq"), ("linear_2", "h", "h"))),
    *_same_norms("", "txt_norm", "txt"),
    *_same(f"{_QWEN_BLOCK}attn.", ((name, "h", "h") for name in ("to_q", "to_k", "to_v", "to_out.0"))),
    *_same(f"{_QWEN_BLOCK}attn.", ((name, "h", "h") for name in ("add_q_proj", "add_k_proj", "add_v_proj", "to_add_out"))),
    *_same_norms(f"{_QWEN_BLOCK}attn.", "norm_q norm_k norm_added_q norm_added_k", "head"),
    *_same(_QWEN_BLOCK, (("img_mod.1", "6h", "h"), ("txt_mod.1", "6h", "h"))),
    *_same(f"{_QWEN_BLOCK}img_mlp.net.", (("0.proj", "mlp", "h"), ("2", "h", "mlp"))),
    *_same(f"{_QWEN_BLOCK}txt_mlp.net.", (("0.proj", "mlp", "h"), ("2", "h", "mlp"))),
    cat(f"{_QWEN_BLOCK}img_mlp.gate_up", f"{_QWEN_BLOCK}img_mlp.gate_layer .proj", "mlp mlp", "h"),  # 2.1, ComfyUI
)

# -------------------------------------------------------------------------------------------------------------------- Z-Image


def _z_image_block(block: str, modulated: bool) -> Iterator[Row]:
    yield cat(f"{block}attention.qkv", f"{block}attention.to_q .to_k .to_v", "h h h", "h")
    yield site(f"{block}attention.out", f"{block}attention.to_out.0", "h", "h")
    yield norm(f"{block}attention.q_norm", f"{block}attention.norm_q", "head")
    yield norm(f"{block}attention.k_norm", f"{block}attention.norm_k", "head")
    yield from _same(f"{block}feed_forward.", (("w1", "mlp", "h"), ("w2", "h", "mlp"), ("w3", "mlp", "h")))
    yield from _same_norms(block, "attention_norm1 attention_norm2 ffn_norm1 ffn_norm2", "h")
    if modulated:
        yield from _same(block, (("adaLN_modulation.0", "4h", "cond"),))


_Z_IMAGE = (
    site("x_embedder", "all_x_embedder.2-1", "h", "img"),
    *_same_norms("", "cap_embedder.0", "txt"),
    *_same("", (("cap_embedder.1", "h", "txt"), ("t_embedder.mlp.0", "t_h", "freq"), ("t_embedder.mlp.2", "cond", "t_h"))),
    parameter("x_pad_token", "x_pad_token"),
    parameter("cap_pad_token", "cap_pad_token"),
    *_z_image_block("layers.{d}.", modulated=True),
    *_z_image_block("noise_refiner.{r}.", modulated=True),
    *_z_image_block("context_refiner.{c}.", modulated=False),
    site("final_layer.linear", "all_final_layer.2-1.linear", "out", "h"),
    site("final_layer.adaLN_modulation.1", "all_final_layer.2-1.adaLN_modulation.1", "h", "cond"),
)

# ------------------------------------------------------------------------------------------------------------------ LTX-Video

_LTX_BLOCK = "transformer_blocks.{d}."


def _ltx_attention(name: str, context: str) -> Iterator[Row]:
    attention = f"{_LTX_BLOCK}{name}."
    yield from _same(attention, (("to_q", "h", "h"), ("to_k", "h", context), ("to_v", "h", context), ("to_out.0", "h", "h")))
    yield norm(f"{attention}q_norm", f"{attention}norm_q", "h")
    yield norm(f"{attention}k_norm", f"{attention}norm_k", "h")


_LTX = (
    site("patchify_proj", "proj_in", "h", "latent"),
    site("adaln_single.emb.timestep_embedder.linear_1", "time_embed.emb.timestep_embedder.linear_1", "h", "freq"),
    site("adaln_single.emb.timestep_embedder.linear_2", "time_embed.emb.timestep_embedder.linear_2", "h", "h"),
    site("adaln_single.linear", "time_embed.linear", "6h", "h"),
    *_same("caption_projection.", (("linear_1", "h", "txt"), ("linear_2", "h", "h"))),
    *_ltx_attention("attn1", "h"),
    *_ltx_attention("attn2", "h"),
    *_same(f"{_LTX_BLOCK}ff.net.", (("0.proj", "mlp", "h"), ("2", "h", "mlp"))),
    parameter(f"{_LTX_BLOCK}scale_shift_table", f"{_LTX_BLOCK}scale_shift_table"),
    parameter("scale_shift_table", "scale_shift_table"),
    *_same("", (("proj_out", "out", "h"),)),
)

# ----------------------------------------------------------------------------------------------------------------- HiDream-I1


def _hidream_block(block: str, modulation: str) -> Iterator[Row]:
    yield from _same(block, (("adaLN_modulation.1", modulation, "h"),))
    yield from _same(f"{block}attn1.", ((name, "h", "h") for name in ("to_q", "to_k", "to_v", "to_out")))
    yield from _same_norms(f"{block}attn1.", "q_rms_norm k_rms_norm", "h")
    for experts, width in (("shared_experts", "shared"), ("experts.{e}", "expert")):
        yield from _same(f"{block}ff_i.{experts}.", (("w1", width, "h"), ("w2", "h", width), ("w3", width, "h")))
    yield from _same(f"{block}ff_i.", (("gate", "experts", "h"),))


_HIDREAM_DOUBLE = "double_stream_blocks.{d}.block."
_HIDREAM = (
    *_same("t_embedder.timestep_embedder.", (("linear_1", "h", "freq"), ("linear_2", "h", "h"))),
    *_same("p_embedder.pooled_embedder.", (("linear_1", "h", "vec"), ("linear_2", "h", "h"))),
    *_same("", (("x_embedder.proj", "h", "img"), ("caption_projection.{l}.linear", "h", "txt"))),
    *_hidream_block(_HIDREAM_DOUBLE, "12h"),
    *_same(f"{_HIDREAM_DOUBLE}attn1.", ((name, "h", "h") for name in ("to_q_t", "to_k_t", "to_v_t", "to_out_t"))),
    *_same_norms(f"{_HIDREAM_DOUBLE}attn1.", "q_rms_norm_t k_rms_norm_t", "h"),
    *_same(f"{_HIDREAM_DOUBLE}ff_t.", (("w1", "expert", "h"), ("w2", "h", "expert"), ("w3", "expert", "h"))),
    *_hidream_block("single_stream_blocks.{s}.block.", "6h"),
    *_same("final_layer.", (("linear", "out", "h"), ("adaLN_modulation.1", "2h", "h"))),
)

# --------------------------------------------------------------------------------------------------------------------- Krea 2


def _krea_block(orig: str, diff: str, width: str, kv: str, mlp: str) -> Iterator[Row]:
    for name, path, out in (("wq", "to_q", width), ("wk", "to_k", kv), ("wv", "to_v", kv), ("wo", "to_out.0", width)):
        yield site(f"{orig}.attn.{name}", f"{diff}.attn.{path}", out, width)
    yield site(f"{orig}.attn.gate", f"{diff}.attn.to_gate", width, width)
    for name, out, in_ in (("gate", mlp, width), ("up", mlp, width), ("down", width, mlp)):
        yield site(f"{orig}.mlp.{name}", f"{diff}.ff.{name}", out, in_)
    yield norm(f"{orig}.attn.qknorm.qnorm", f"{diff}.attn.norm_q", "head")
    yield norm(f"{orig}.attn.qknorm.knorm", f"{diff}.attn.norm_k", "head")
    yield norm(f"{orig}.prenorm", f"{diff}.norm1", width)
    yield norm(f"{orig}.postnorm", f"{diff}.norm2", width)


_KREA = (
    site("first", "img_in", "h", "img"),
    site("tmlp.0", "time_embed.linear_1", "h", "freq"),
    site("tmlp.2", "time_embed.linear_2", "h", "h"),
    site("tproj.1", "time_mod_proj", "6h", "h"),
    norm("txtmlp.0", "txt_in.norm", "txt"),
    site("txtmlp.1", "txt_in.linear_1", "h", "txt"),
    site("txtmlp.3", "txt_in.linear_2", "h", "h"),
    site("txtfusion.projector", "text_fusion.projector", "1", "layers"),
    *_krea_block("txtfusion.layerwise_blocks.{l}", "text_fusion.layerwise_blocks.{l}", "txt", "txt", "txt_mlp"),
    *_krea_block("txtfusion.refiner_blocks.{r}", "text_fusion.refiner_blocks.{r}", "txt", "txt", "txt_mlp"),
    *_krea_block("blocks.{d}", "transformer_blocks.{d}", "h", "kv", "mlp"),
    parameter("blocks.{d}.mod.lin", "transformer_blocks.{d}.scale_shift_table"),  # flat [6h] against [6, h]
    norm("last.norm", "final_layer.norm", "h"),
    site("last.linear", "final_layer.linear", "out", "h"),
    parameter("last.modulation.lin", "final_layer.scale_shift_table"),
)

# ------------------------------------------------------------------------------------------------------------- Stable Cascade


def _cascade_side(side: str) -> Iterator[Row]:
    """Stage C: level `{b}`, block `{d}` in it; attention is torch's MultiheadAttention (`in_proj_weight`) in the original."""
    block = f"{side}_blocks.{{b}}.{{d}}."
    yield cat(f"{block}attention.attn.in_proj", f"{block}attention.to_q .to_k .to_v", "h h h", "h")
    yield site(f"{block}attention.attn.out_proj", f"{block}attention.to_out.0", "h", "h")
    yield conv(f"{block}depthwise", f"{block}depthwise", "h", "1")
    yield from _same(f"{block}channelwise.", (("0", "4h", ""), ("4", "h", "4h")))  # the up side also takes the skip connection
    yield from _same(block, (("kv_mapper.1", "h", "cond"), *((name, "2h", "ratio") for name in ("mapper", "mapper_sca", "mapper_crp"))))


_CASCADE = (
    *_same("", (("clip_txt_mapper", "cond", "txt"), ("clip_txt_pooled_mapper", "", "pooled"), ("clip_img_mapper", "", "img"))),
    conv("embedding.1", "embedding.1", "h", "latent", (1, 1)),
    *_cascade_side("down"),
    *_cascade_side("up"),
    conv("down_downscalers.1.0.blocks.0", "down_downscalers.1.0.blocks.0", "h", "h", (1, 1)),
    conv("up_upscalers.0.0.blocks.1", "up_upscalers.0.0.blocks.1", "h", "h", (1, 1)),
    conv("clf.1", "clf.1", "out", "h", (1, 1)),
)

_PRIOR = transformer(Table("cascade", _CASCADE, {"b": 2, "d": 72}), kohya=("lora_prior_unet_",), diffusers=("prior.", "unet."))
_PRIOR_TEXT = replace(
    clip_g(),
    name="text_encoder",
    prefixes={"kohya": ("lora_prior_te_",), "onetrainer": ("lora_prior_te_",), "diffusers": ("text_encoder.",)},
)

ARCHITECTURES = (
    Architecture(
        "qwen-image",
        "Qwen-Image",
        (transformer(Table("qwen-image", _QWEN, {"d": 60})), language_model("qwen25_7b")),
        variants={"base": {"h": 3072, "mlp": 12288, "head": 128, "txt": 3584, "freq": 256, "img": 64, "d": 60}},
        base_versions={
            "qwen_image": "base",
            "qwen_image_edit": "base",
            "qwen_image_layered": "base",
            "Qwen-Image": "base",
            "Qwen-Image-Edit": "base",
            "Qwen-Image-Edit-Plus": "base",
            "Qwen-Image-Edit-2511": "base",
            "Qwen-Image-Layered": "base",
        },
        modelspec="Qwen-Image",
        supported=False,
    ),
    Architecture(
        "z-image",
        "Z-Image",
        (transformer(Table("z-image", _Z_IMAGE, {"d": 30, "r": 2, "c": 2})), language_model("qwen3_4b")),
        kohya_namespace="diff",  # musubi
        comfy_namespace="diff",  # ai-toolkit
        also_read=("orig",),  # fused names: musubi's converter for ComfyUI, extracts
        variants={"base": {"h": 3840, "mlp": 10240, "cond": 256, "t_h": 1024, "txt": 2560, "head": 128, "d": 30, "r": 2, "c": 2}},
        base_versions={"z_image": "base", "Z-Image": "base"},
        modelspec="Z-Image",
        supported=False,
    ),
    Architecture(
        "ltx-video",
        "LTX-Video",
        (transformer(Table("ltx-video", _LTX, {"d": 48})), t5("text_encoder", kohya=("lora_te_",))),
        variants={
            "2b": {"h": 2048, "mlp": 8192, "txt": 4096, "latent": 128, "d": 28},
            "13b": {"h": 4096, "mlp": 16384, "txt": 4096, "latent": 128, "d": 48},
        },
        supported=False,
    ),
    Architecture(
        "hidream",
        "HiDream-I1",
        (
            transformer(Table("hidream", _HIDREAM, {"d": 16, "s": 32, "e": 4, "l": 49})),
            clip_l(),
            clip_g(),
            t5("text_encoder_3", kohya=("lora_te3_",)),
            language_model("llama", "text_encoder_4", kohya=("lora_te4_",)),
        ),
        variants={"base": {"h": 2560, "shared": 3584, "expert": 6912, "txt": 4096, "vec": 2048, "d": 16, "s": 32, "e": 4}},
        supported=False,
    ),
    Architecture(
        "krea2",
        "Krea 2",
        (transformer(Table("krea2", _KREA, {"d": 28, "l": 2, "r": 2})), language_model("qwen3_4b")),
        variants={"base": {"h": 6144, "kv": 1536, "mlp": 16384, "txt": 2560, "txt_mlp": 6912, "d": 28, "l": 2, "r": 2}},
        base_versions={"krea2": "base", "Krea-2": "base"},
        modelspec="Krea-2",
        supported=False,
    ),
    Architecture(
        "cascade",
        "Stable Cascade",
        (_PRIOR, _PRIOR_TEXT),
        variants={"stage-c": {"h": 2048, "cond": 2048, "txt": 1280, "ratio": 64, "b": 2}},
        supported=False,
    ),
)
