"""Stable Diffusion 1 and 2: one UNet shape, two ways to enter a transformer (1x1 convolution, linear), two text widths.

kohya flattens diffusers' names, ComfyUI's `diffusion_model.` keys carry ldm's. Published: 282 Linear and Conv modules, 192 of
them in transformers.
"""

from __future__ import annotations

from loratools.mapping.architectures import Architecture
from loratools.mapping.architectures.components import unet
from loratools.mapping.architectures.text_encoders import clip_h, clip_l
from loratools.mapping.architectures.unet import processors, unet_rows
from loratools.mapping.rules import Table

_ATTENTION = (0, 1, 2)
_WIDTHS = {"c0": 320, "c1": 640, "c2": 1280, "c3": 1280, "temb": 1280, "t": 1}


def _table(name: str, conv_projections: bool) -> Table:
    rows = unet_rows(attention=_ATTENTION, blocks=4, conv_projections=conv_projections)
    spellings = {
        "processor": processors(rows),  # diffusers up to 0.21
        "omi": rows,  # OneTrainer OMI: ldm's names, nothing is fused
    }
    return Table(name, rows, {"t": 1}, spellings)


ARCHITECTURES = (
    Architecture(
        "sd1",
        "Stable Diffusion 1.x",
        (unet(_table("sd1", conv_projections=True)), clip_l(kohya=("lora_te_", "lora_te1_"))),
        kohya_namespace="diff",
        variants={"base": {**_WIDTHS, "ctx": 768}},
        base_versions={
            "sd_v1": "base",
            "sd_v1_v": "base",
            "stable-diffusion-v1": "base",
            "sd_1.5": "base",  # ai-toolkit
        },
        modelspec="stable-diffusion-v1",
    ),
    Architecture(
        "sd2",
        "Stable Diffusion 2.x",
        (unet(_table("sd2", conv_projections=False)), clip_h()),
        kohya_namespace="diff",
        variants={"base": {**_WIDTHS, "ctx": 1024}},
        base_versions={
            "sd_v2": "base",
            "sd_v2_v": "base",
            "stable-diffusion-v2-512": "base",
            "stable-diffusion-v2-768-v": "base",
            "sd_2.1": "base",  # ai-toolkit
        },
        modelspec="stable-diffusion-v2-768-v",
    ),
)
