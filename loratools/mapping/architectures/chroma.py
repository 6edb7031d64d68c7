"""Chroma: Flux.1 whose modulation comes from one distilled guidance network instead of a layer in every block.

Names are Flux.1's, without modulation, time, vector and guidance; nothing is swapped. An adapter on attention and feed-forward
layers alone has exactly the names and shapes of one for Flux.1. Source: diffusers `transformer_chroma.py` and its single-file converter.
"""

from __future__ import annotations

from loratools.mapping.architectures import Architecture
from loratools.mapping.architectures.components import transformer
from loratools.mapping.architectures.flux import BLOCK_ROWS, OMI_NAMES
from loratools.mapping.architectures.text_encoders import t5
from loratools.mapping.rules import Table, indexed, norm, site

_GUIDANCE = "distilled_guidance_layer"

_ROWS = (
    *BLOCK_ROWS,
    site(f"{_GUIDANCE}.in_proj", f"{_GUIDANCE}.in_proj", "guide", "guide_in"),
    site(f"{_GUIDANCE}.layers.{{g}}.in_layer", f"{_GUIDANCE}.layers.{{g}}.linear_1", "guide", "guide"),
    site(f"{_GUIDANCE}.layers.{{g}}.out_layer", f"{_GUIDANCE}.layers.{{g}}.linear_2", "guide", "guide"),
    norm(f"{_GUIDANCE}.norms.{{g}}", f"{_GUIDANCE}.norms.{{g}}", "guide"),
    site(f"{_GUIDANCE}.out_proj", f"{_GUIDANCE}.out_proj", "h", "guide"),
)

CHROMA = Table("chroma", _ROWS, {"d": 19, "s": 38, "g": 5}, {"omi": indexed(_ROWS, OMI_NAMES)})

ARCHITECTURES = (
    Architecture(
        "chroma",
        "Chroma",
        (
            transformer(CHROMA, kohya=("lora_unet_",)),
            # sd-scripts keeps Flux.1's number; OneTrainer counts from one, or not at all in its OMI code
            t5("text_encoder", kohya=("lora_te3_", "lora_te1_", "lora_te_"), onetrainer=("lora_te1_", "lora_te_")),
        ),
        variants={"base": {"h": 3072, "mlp": 12288, "head": 128, "txt": 4096, "guide": 5120, "d": 19, "s": 38, "g": 5}},
        base_versions={"chroma": "base"},
        modelspec="chroma",
    ),
)
