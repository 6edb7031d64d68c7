"""Flux.1 (dev, schnell, Kontext, Fill, Krea): double-stream blocks `{d}`, single-stream blocks `{s}`.

Original names are Black Forest Labs'. qkv and linear1 are fused there; the final modulation keeps shift before scale, diffusers
the other way round (swap). The block modulations agree. Source: BFL `model.py`, diffusers `transformer_flux.py` and its
single-file converter. Published: h 3072, mlp 12288, 19 double and 38 single blocks.
"""

from __future__ import annotations

from loratools.mapping.architectures import Architecture
from loratools.mapping.architectures.components import transformer
from loratools.mapping.architectures.text_encoders import clip_l, t5
from loratools.mapping.rules import Row, Table, cat, indexed, norm, site, swap2

_DOUBLE, _SINGLE = "transformer_blocks.{d}", "single_transformer_blocks.{s}"

# What Chroma shares: everything but modulation, time, vector and guidance.
BLOCK_ROWS: tuple[Row, ...] = (
    site("img_in", "x_embedder", "h", "img"),
    site("txt_in", "context_embedder", "h", "txt"),
    cat("double_blocks.{d}.img_attn.qkv", f"{_DOUBLE}.attn.to_q .to_k .to_v", "h h h", "h"),
    cat("double_blocks.{d}.txt_attn.qkv", f"{_DOUBLE}.attn.add_q_proj .add_k_proj .add_v_proj", "h h h", "h"),
    site("double_blocks.{d}.img_attn.proj", f"{_DOUBLE}.attn.to_out.0", "h", "h"),
    site("double_blocks.{d}.txt_attn.proj", f"{_DOUBLE}.attn.to_add_out", "h", "h"),
    site("double_blocks.{d}.img_mlp.0", f"{_DOUBLE}.ff.net.0.proj", "mlp", "h"),
    site("double_blocks.{d}.img_mlp.2", f"{_DOUBLE}.ff.net.2", "h", "mlp"),
    site("double_blocks.{d}.txt_mlp.0", f"{_DOUBLE}.ff_context.net.0.proj", "mlp", "h"),
    site("double_blocks.{d}.txt_mlp.2", f"{_DOUBLE}.ff_context.net.2", "h", "mlp"),
    norm("double_blocks.{d}.img_attn.norm.query_norm", f"{_DOUBLE}.attn.norm_q", "head"),
    norm("double_blocks.{d}.img_attn.norm.key_norm", f"{_DOUBLE}.attn.norm_k", "head"),
    norm("double_blocks.{d}.txt_attn.norm.query_norm", f"{_DOUBLE}.attn.norm_added_q", "head"),
    norm("double_blocks.{d}.txt_attn.norm.key_norm", f"{_DOUBLE}.attn.norm_added_k", "head"),
    cat(
        "single_blocks.{s}.linear1",
        f"{_SINGLE}.attn.to_q {_SINGLE}.attn.to_k {_SINGLE}.attn.to_v {_SINGLE}.proj_mlp",
        "h h h mlp",
        "h",
    ),
    site("single_blocks.{s}.linear2", f"{_SINGLE}.proj_out", "h", "h+mlp"),
    norm("single_blocks.{s}.norm.query_norm", f"{_SINGLE}.attn.norm_q", "head"),
    norm("single_blocks.{s}.norm.key_norm", f"{_SINGLE}.attn.norm_k", "head"),
    site("final_layer.linear", "proj_out", "out", "h"),
)

_EMBEDDERS = (
    ("time_in", "timestep_embedder", "freq"),
    ("vector_in", "text_embedder", "vec"),
    ("guidance_in", "guidance_embedder", "freq"),  # dev and its children, not schnell
)

_ROWS = (
    *BLOCK_ROWS,
    *(site(f"{orig}.in_layer", f"time_text_embed.{diff}.linear_1", "h", in_) for orig, diff, in_ in _EMBEDDERS),
    *(site(f"{orig}.out_layer", f"time_text_embed.{diff}.linear_2", "h", "h") for orig, diff, _ in _EMBEDDERS),
    site("double_blocks.{d}.img_mod.lin", f"{_DOUBLE}.norm1.linear", "6h", "h"),
    site("double_blocks.{d}.txt_mod.lin", f"{_DOUBLE}.norm1_context.linear", "6h", "h"),
    site("single_blocks.{s}.modulation.lin", f"{_SINGLE}.norm.linear", "3h", "h"),
    swap2("final_layer.adaLN_modulation.1", "norm_out.linear", "2h", "h"),
)

# XLabs' attention processors: lora1 is the image stream, lora2 the text stream.
_XLABS = (
    cat("double_blocks.{d}.processor.qkv_lora1", f"{_DOUBLE}.attn.to_q .to_k .to_v", "h h h", "h"),
    cat("double_blocks.{d}.processor.qkv_lora2", f"{_DOUBLE}.attn.add_q_proj .add_k_proj .add_v_proj", "h h h", "h"),
    site("double_blocks.{d}.processor.proj_lora1", f"{_DOUBLE}.attn.to_out.0", "h", "h"),
    site("double_blocks.{d}.processor.proj_lora2", f"{_DOUBLE}.attn.to_add_out", "h", "h"),
)

# USO and UNO (ByteDance) add single blocks: q, k and v are the first 3h rows of linear1, whose other rows they leave alone.
_USO = (
    *_XLABS,
    cat("single_blocks.{s}.processor.qkv_lora", f"{_SINGLE}.attn.to_q .to_k .to_v", "h h h", "h"),
    site("single_blocks.{s}.processor.proj_lora", f"{_SINGLE}.proj_out", "h", "h+mlp"),
)

OMI_NAMES = {"img_in": "img_in.proj"}  # OneTrainer's one name that is not BFL's

FLUX = Table(
    "flux",
    _ROWS,
    {"d": 19, "s": 38},
    {"omi": indexed(_ROWS, OMI_NAMES), "xlabs": _XLABS, "uso": _USO},
)

ARCHITECTURES = (
    Architecture(
        "flux",
        "Flux.1",
        (
            transformer(FLUX, kohya=("lora_unet_", "oft_unet_")),
            clip_l(),
            t5("text_encoder_2", kohya=("lora_te3_", "lora_te2_"), onetrainer=("lora_te2_", "lora_te3_")),
        ),
        variants={"dev": {"h": 3072, "mlp": 12288, "head": 128, "txt": 4096, "vec": 768, "freq": 256, "out": 64, "d": 19, "s": 38}},
        base_versions={
            "flux1": "",  # sd-scripts: dev and schnell alike
            "flux-1": "",
            "flux-1-dev": "dev",
            "flux-1-schnell": "",
            "flux_kontext": "dev",  # musubi
            "Flux.1-dev": "dev",  # musubi
        },
        modelspec="flux-1-dev",
    ),
)
