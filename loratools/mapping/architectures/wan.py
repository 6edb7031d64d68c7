"""Wan 2.1 and 2.2: text to video and image to video, blocks `{blocks}`; VACE's control blocks `{vace}`.

Nothing is fused and nothing swapped, but one name is a trap: the affine norm before cross attention is `norm3` in the original and
`norm2` in diffusers (the other two have no weights). The 2.2 A14B models are a pair of denoisers, one for high noise (`transformer`)
and one for low noise (`transformer_2`), with one table. Source: Wan `model.py`, diffusers `transformer_wan.py` and its
single-file converter.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from loratools.mapping.architectures import Architecture
from loratools.mapping.architectures.components import NATIVE, transformer
from loratools.mapping.architectures.text_encoders import t5
from loratools.mapping.rules import Row, Table, conv, norm, parameter, site

_PATCH = (1, 2, 2)

_ENDS = (
    conv("patch_embedding", "patch_embedding", "h", "latent", _PATCH),
    site("text_embedding.0", "condition_embedder.text_embedder.linear_1", "h", "txt"),
    site("text_embedding.2", "condition_embedder.text_embedder.linear_2", "h", "h"),
    site("time_embedding.0", "condition_embedder.time_embedder.linear_1", "h", "freq"),
    site("time_embedding.2", "condition_embedder.time_embedder.linear_2", "h", "h"),
    site("time_projection.1", "condition_embedder.time_proj", "6h", "h"),
    # image to video, 2.1
    norm("img_emb.proj.0", "condition_embedder.image_embedder.norm1", "img"),
    site("img_emb.proj.1", "condition_embedder.image_embedder.ff.net.0.proj", "img", "img"),
    site("img_emb.proj.3", "condition_embedder.image_embedder.ff.net.2", "h", "img"),
    norm("img_emb.proj.4", "condition_embedder.image_embedder.norm2", "h"),
    parameter("img_emb.emb_pos", "condition_embedder.image_embedder.pos_embed"),  # first and last frame
    site("head.head", "proj_out", "out", "h"),
    parameter("head.modulation", "scale_shift_table"),
    conv("vace_patch_embedding", "vace_patch_embedding", "h", "control", _PATCH),
)


def _block(block: str) -> Iterator[Row]:
    for orig, diff in (("self_attn", "attn1"), ("cross_attn", "attn2")):
        for name, path in (("q", "to_q"), ("k", "to_k"), ("v", "to_v"), ("o", "to_out.0")):
            yield site(f"{block}.{orig}.{name}", f"{block}.{diff}.{path}", "h", "h")
        for name in ("norm_q", "norm_k"):
            yield norm(f"{block}.{orig}.{name}", f"{block}.{diff}.{name}", "h")
    yield site(f"{block}.ffn.0", f"{block}.ffn.net.0.proj", "ffn", "h")
    yield site(f"{block}.ffn.2", f"{block}.ffn.net.2", "h", "ffn")
    yield norm(f"{block}.norm3", f"{block}.norm2", "h")
    yield parameter(f"{block}.modulation", f"{block}.scale_shift_table")


_ROWS = (
    *_ENDS,
    *_block("blocks.{blocks}"),
    # image to video, 2.1: the image's own keys and values; "img_kv" equals h and tells this size from text to video
    site("blocks.{blocks}.cross_attn.k_img", "blocks.{blocks}.attn2.add_k_proj", "h", "img_kv"),
    site("blocks.{blocks}.cross_attn.v_img", "blocks.{blocks}.attn2.add_v_proj", "h", "img_kv"),
    norm("blocks.{blocks}.cross_attn.norm_k_img", "blocks.{blocks}.attn2.norm_added_k", "h"),
    *_block("vace_blocks.{vace}"),
    site("vace_blocks.{vace}.before_proj", "vace_blocks.{vace}.proj_in", "h", "h"),
    site("vace_blocks.{vace}.after_proj", "vace_blocks.{vace}.proj_out", "h", "h"),
)

WAN = Table("wan", _ROWS, {"blocks": 40, "vace": 8})

_COMMON = {"txt": 4096, "freq": 256}
_1B = {**_COMMON, "h": 1536, "ffn": 8960, "blocks": 30}
_5B = {**_COMMON, "h": 3072, "ffn": 14336, "blocks": 30}
_14B = {**_COMMON, "h": 5120, "ffn": 13824, "blocks": 40}

_DENOISER = transformer(
    WAN,
    kohya=("lora_unet_", "lora_unet__"),  # the second: Wan-Fun, VideoX-Fun
    diffusers=("transformer.", "transformer_1."),
    comfy=(*NATIVE, "diffusion_model.transformer_1."),  # the last: ai-toolkit, both experts in one file
)
# A file of one expert alone looks like any other Wan file; only these spellings say which it is.
_DENOISER_2 = replace(
    _DENOISER, name="denoiser_2", prefixes={"diffusers": ("transformer_2.",), "comfy": ("diffusion_model.transformer_2.",)}
)

ARCHITECTURES = (
    Architecture(
        "wan",
        "Wan 2.1 and 2.2",
        (_DENOISER, _DENOISER_2, t5("text_encoder", kohya=("lora_te_", "lora_te1_"), clip="umt5xxl")),
        variants={
            "2.1-t2v-1.3b": _1B,
            "2.1-t2v-14b": _14B,
            "2.1-i2v-14b": {**_14B, "img": 1280, "img_kv": 5120},
            "2.2-ti2v-5b": _5B,
            "2.2-a14b": _14B,
        },
        base_versions={"wan": "", "wan2.1": ""},  # musubi, whatever the size
        modelspec="wan2.1",
    ),
)
