"""Stable Diffusion 3 and 3.5: joint blocks `{d}` with an image stream (x_block) and a text stream (context_block).

The text stream of the last block only feeds attention: its modulation has two parts instead of six, and diffusers keeps scale
before shift there (swap), as in the final layer. 3.5 medium has a second attention in its first 13 blocks and nine parts of
modulation in them. So two pairs of rows have one name and are told apart by their shapes. Source: Stability's `mmdit.py`, diffusers
`transformer_sd3.py` and its single-file converter.
"""

from __future__ import annotations

from loratools.mapping.architectures import Architecture
from loratools.mapping.architectures.components import transformer
from loratools.mapping.architectures.text_encoders import clip_g, clip_l, t5
from loratools.mapping.rules import Table, cat, conv, indexed, norm, parameter, site, swap2

_X, _CONTEXT, _DIFF = "joint_blocks.{d}.x_block", "joint_blocks.{d}.context_block", "transformer_blocks.{d}"

_ROWS = (
    conv("x_embedder.proj", "pos_embed.proj", "h", "latent", (2, 2)),
    parameter("pos_embed", "pos_embed.pos_embed"),
    site("context_embedder", "context_embedder", "h", "txt"),
    site("t_embedder.mlp.0", "time_text_embed.timestep_embedder.linear_1", "h", "freq"),
    site("t_embedder.mlp.2", "time_text_embed.timestep_embedder.linear_2", "h", "h"),
    site("y_embedder.mlp.0", "time_text_embed.text_embedder.linear_1", "h", "vec"),
    site("y_embedder.mlp.2", "time_text_embed.text_embedder.linear_2", "h", "h"),
    # image stream
    cat(f"{_X}.attn.qkv", f"{_DIFF}.attn.to_q .to_k .to_v", "h h h", "h"),
    site(f"{_X}.attn.proj", f"{_DIFF}.attn.to_out.0", "h", "h"),
    site(f"{_X}.mlp.fc1", f"{_DIFF}.ff.net.0.proj", "mlp", "h"),
    site(f"{_X}.mlp.fc2", f"{_DIFF}.ff.net.2", "h", "mlp"),
    site(f"{_X}.adaLN_modulation.1", f"{_DIFF}.norm1.linear", "6h", "h"),
    norm(f"{_X}.attn.ln_q", f"{_DIFF}.attn.norm_q", "head"),  # 3.5
    norm(f"{_X}.attn.ln_k", f"{_DIFF}.attn.norm_k", "head"),
    # its second attention, 3.5 medium; "dual" equals h and is there to tell this size from SD3 medium
    cat(f"{_X}.attn2.qkv", f"{_DIFF}.attn2.to_q .to_k .to_v", "dual dual dual", "h"),
    site(f"{_X}.attn2.proj", f"{_DIFF}.attn2.to_out.0", "h", "dual"),
    site(f"{_X}.adaLN_modulation.1", f"{_DIFF}.norm1.linear", "9h", "h"),
    norm(f"{_X}.attn2.ln_q", f"{_DIFF}.attn2.norm_q", "head"),
    norm(f"{_X}.attn2.ln_k", f"{_DIFF}.attn2.norm_k", "head"),
    # text stream
    cat(f"{_CONTEXT}.attn.qkv", f"{_DIFF}.attn.add_q_proj .add_k_proj .add_v_proj", "h h h", "h"),
    site(f"{_CONTEXT}.attn.proj", f"{_DIFF}.attn.to_add_out", "h", "h"),
    site(f"{_CONTEXT}.mlp.fc1", f"{_DIFF}.ff_context.net.0.proj", "mlp", "h"),
    site(f"{_CONTEXT}.mlp.fc2", f"{_DIFF}.ff_context.net.2", "h", "mlp"),
    site(f"{_CONTEXT}.adaLN_modulation.1", f"{_DIFF}.norm1_context.linear", "6h", "h"),
    swap2(f"{_CONTEXT}.adaLN_modulation.1", f"{_DIFF}.norm1_context.linear", "2h", "h"),  # last block
    norm(f"{_CONTEXT}.attn.ln_q", f"{_DIFF}.attn.norm_added_q", "head"),  # 3.5
    norm(f"{_CONTEXT}.attn.ln_k", f"{_DIFF}.attn.norm_added_k", "head"),
    # final layer
    swap2("final_layer.adaLN_modulation.1", "norm_out.linear", "2h", "h"),
    site("final_layer.linear", "proj_out", "out", "h"),
)

SD3 = Table("sd3", _ROWS, {"d": 38}, {"omi": indexed(_ROWS)})

_COMMON = {"txt": 4096, "vec": 2048, "freq": 256, "head": 64, "latent": 16, "out": 64}
_MEDIUM = {**_COMMON, "h": 1536, "mlp": 6144, "d": 24}

ARCHITECTURES = (
    Architecture(
        "sd3",
        "Stable Diffusion 3",
        (
            transformer(SD3),
            clip_l(),
            clip_g(),
            t5("text_encoder_3", kohya=("lora_te3_",)),
        ),
        variants={
            "medium": _MEDIUM,
            "3.5-medium": {**_MEDIUM, "dual": 1536},
            "3.5-large": {**_COMMON, "h": 2432, "mlp": 9728, "d": 38},
        },
        base_versions={
            "medium": "medium",  # sd-scripts writes these three without a family
            "5-medium": "3.5-medium",
            "5-large": "3.5-large",
            "stable-diffusion-3-medium": "medium",
            "stable-diffusion-3-5-medium": "3.5-medium",
            "stable-diffusion-3-5-large": "3.5-large",
        },
        modelspec="stable-diffusion-3-medium",
    ),
)
