"""Flux.2 (dev, klein): recognised by name, not converted yet.

Double-stream blocks `{d}` are named as in Flux.1, with a gated feed-forward ([2 mlp, h], [h, mlp]); the single-stream blocks `{s}` keep
q, k, v and the feed-forward fused in both namespaces. Modulation is shared by all blocks of a kind; the final one is swapped. No
layer has a bias. Source: BFL `model.py`, diffusers `transformer_flux2.py` and its single-file converter.
"""

from __future__ import annotations

from loratools.mapping.architectures import Architecture
from loratools.mapping.architectures.components import transformer
from loratools.mapping.architectures.text_encoders import language_model
from loratools.mapping.rules import Table, cat, norm, site, swap2

_DOUBLE, _SINGLE = "transformer_blocks.{d}", "single_transformer_blocks.{s}"

_ROWS = (
    site("img_in", "x_embedder", "h", "img"),
    site("txt_in", "context_embedder", "h", "txt"),
    site("time_in.in_layer", "time_guidance_embed.timestep_embedder.linear_1", "h", "freq"),
    site("time_in.out_layer", "time_guidance_embed.timestep_embedder.linear_2", "h", "h"),
    site("guidance_in.in_layer", "time_guidance_embed.guidance_embedder.linear_1", "h", "freq"),  # dev
    site("guidance_in.out_layer", "time_guidance_embed.guidance_embedder.linear_2", "h", "h"),
    site("double_stream_modulation_img.lin", "double_stream_modulation_img.linear", "6h", "h"),
    site("double_stream_modulation_txt.lin", "double_stream_modulation_txt.linear", "6h", "h"),
    site("single_stream_modulation.lin", "single_stream_modulation.linear", "3h", "h"),
    cat("double_blocks.{d}.img_attn.qkv", f"{_DOUBLE}.attn.to_q .to_k .to_v", "h h h", "h"),
    cat("double_blocks.{d}.txt_attn.qkv", f"{_DOUBLE}.attn.add_q_proj .add_k_proj .add_v_proj", "h h h", "h"),
    site("double_blocks.{d}.img_attn.proj", f"{_DOUBLE}.attn.to_out.0", "h", "h"),
    site("double_blocks.{d}.txt_attn.proj", f"{_DOUBLE}.attn.to_add_out", "h", "h"),
    site("double_blocks.{d}.img_mlp.0", f"{_DOUBLE}.ff.linear_in", "2mlp", "h"),
    site("double_blocks.{d}.img_mlp.2", f"{_DOUBLE}.ff.linear_out", "h", "mlp"),
    site("double_blocks.{d}.txt_mlp.0", f"{_DOUBLE}.ff_context.linear_in", "2mlp", "h"),
    site("double_blocks.{d}.txt_mlp.2", f"{_DOUBLE}.ff_context.linear_out", "h", "mlp"),
    norm("double_blocks.{d}.img_attn.norm.query_norm", f"{_DOUBLE}.attn.norm_q", "head"),
    norm("double_blocks.{d}.img_attn.norm.key_norm", f"{_DOUBLE}.attn.norm_k", "head"),
    norm("double_blocks.{d}.txt_attn.norm.query_norm", f"{_DOUBLE}.attn.norm_added_q", "head"),
    norm("double_blocks.{d}.txt_attn.norm.key_norm", f"{_DOUBLE}.attn.norm_added_k", "head"),
    site("single_blocks.{s}.linear1", f"{_SINGLE}.attn.to_qkv_mlp_proj", "3h+2mlp", "h"),
    site("single_blocks.{s}.linear2", f"{_SINGLE}.attn.to_out", "h", "h+mlp"),
    norm("single_blocks.{s}.norm.query_norm", f"{_SINGLE}.attn.norm_q", "head"),
    norm("single_blocks.{s}.norm.key_norm", f"{_SINGLE}.attn.norm_k", "head"),
    swap2("final_layer.adaLN_modulation.1", "norm_out.linear", "2h", "h"),
    site("final_layer.linear", "proj_out", "out", "h"),
)

_COMMON = {"img": 128, "out": 128, "freq": 256, "head": 128}

ARCHITECTURES = (
    Architecture(
        "flux2",
        "Flux.2",
        (transformer(Table("flux2", _ROWS, {"d": 8, "s": 48})), language_model("mistral3_24b")),
        variants={
            "dev": {**_COMMON, "h": 6144, "mlp": 18432, "txt": 15360, "d": 8, "s": 48},
            "klein-9b": {**_COMMON, "h": 4096, "mlp": 12288, "txt": 12288, "d": 8, "s": 24},
            "klein-4b": {**_COMMON, "h": 3072, "mlp": 9216, "txt": 7680, "d": 5, "s": 20},
        },
        base_versions={
            "flux_2_dev": "dev",
            "flux_2_klein_4b": "klein-4b",
            "flux_2_klein_9b": "klein-9b",
            "Flux.2-dev": "dev",
            "Flux.2-klein-4b": "klein-4b",
            "Flux.2-klein-9b": "klein-9b",
        },
        modelspec="Flux.2-dev",
        supported=False,
    ),
)
