"""Stable Diffusion XL, base and refiner: two UNets of different block structure, hence two tables.

kohya flattens ldm's names (unlike SD1), ComfyUI carries them dotted; LCM-LoRA, OneTrainer and others flatten diffusers'.
Published: 794 Linear and Conv modules in the base (722 in transformers), 554 in the refiner (462). SSD-1B and Vega are the base
with fewer transformer blocks.
"""

from __future__ import annotations

from loratools.mapping.architectures import Architecture
from loratools.mapping.architectures.components import unet
from loratools.mapping.architectures.text_encoders import clip_g, clip_l
from loratools.mapping.architectures.unet import processors, unet_rows
from loratools.mapping.rules import Table

_BASE = {"c0": 320, "c1": 640, "c2": 1280, "temb": 1280, "ctx": 2048, "add": 2816}
_REFINER = {"c0": 384, "c1": 768, "c2": 1536, "c3": 1536, "temb": 1536, "ctx": 1280, "add": 2560}


def _table(name: str, blocks: int, depth: int) -> Table:
    rows = unet_rows(attention=(1, 2), blocks=blocks, pooled=True)
    spellings = {
        "processor": processors(rows),  # diffusers up to 0.21
        "omi": rows,  # OneTrainer OMI: ldm's names, nothing is fused
    }
    return Table(name, rows, {"t": depth}, spellings)


ARCHITECTURES = (
    Architecture(
        "sdxl",
        "Stable Diffusion XL",
        (unet(_table("sdxl", blocks=3, depth=10)), clip_l(), clip_g()),
        variants={"base": {**_BASE, "t": 10}, "ssd-1b": {**_BASE, "t": 4}, "vega": {**_BASE, "t": 2}},
        base_versions={
            "sdxl_base_v1-0": "base",
            "stable-diffusion-xl-v1-base": "base",
            "sdxl_1.0": "base",  # ai-toolkit
        },
        modelspec="stable-diffusion-xl-v1-base",
    ),
    Architecture(
        "sdxl-refiner",
        "Stable Diffusion XL refiner",
        (unet(_table("sdxl-refiner", blocks=4, depth=4)), clip_g(kohya=("lora_te2_", "lora_te_", "lora_te1_"))),
        variants={"refiner": {**_REFINER, "t": 4}},
        base_versions={"stable-diffusion-xl-v1-refiner": "refiner"},
        modelspec="stable-diffusion-xl-v1-refiner",
        family="sdxl",
    ),
)
