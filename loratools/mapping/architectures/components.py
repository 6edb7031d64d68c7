"""Constructors of the components architectures are made of: which prefix each dialect gives a denoiser or a text encoder.

Prefix groups of a component; the first of each is written, all are read:

    kohya       sd-scripts, musubi, LyCORIS inside kohya: flattened names
    lycoris     the LyCORIS wrapper (SimpleTuner, ai-toolkit's old LoKr): flattened names
    onetrainer  OneTrainer's legacy format: flattened diffusers names
    diffusers   diffusers and PEFT: dotted diffusers names
    comfy       ComfyUI, ai-toolkit, diffusion-pipe: dotted names of the architecture's `comfy_namespace`
    omi         OneTrainer's OMI format: dotted names of the namespace "omi"

A prefix says which component a key may belong to; which of several it does is decided by the table that knows the rest of it.
"""

from __future__ import annotations

from collections.abc import Mapping

from loratools.mapping.architectures import Component
from loratools.mapping.rules import Table

NATIVE = ("diffusion_model.", "model.diffusion_model.")  # adapters; the second also heads checkpoints


def unet(table: Table) -> Component:
    """The UNet of a Stable Diffusion: `unet.`, and OFT files of sd-scripts beside its LoRA."""
    return Component(
        "denoiser",
        table,
        {
            "kohya": ("lora_unet_", "oft_unet_"),
            "lycoris": ("lycoris_",),
            "onetrainer": ("lora_unet_",),
            "diffusers": ("unet.",),
            "comfy": NATIVE,
            "omi": ("unet.",),
        },
    )


def transformer(
    table: Table,
    *,
    kohya: tuple[str, ...] = ("lora_unet_",),
    diffusers: tuple[str, ...] = ("transformer.",),
    comfy: tuple[str, ...] = NATIVE,
) -> Component:
    """A diffusion transformer: `transformer.` in diffusers, still `lora_unet_` in kohya's tools."""
    return Component(
        "denoiser",
        table,
        {
            "kohya": kohya,
            "lycoris": ("lycoris_",),
            "onetrainer": ("lora_transformer_", "lora_unet_"),
            "diffusers": diffusers,
            "comfy": comfy,
            "omi": ("transformer.",),
        },
    )


def text_encoder(
    name: str,
    table: Table,
    widths: Mapping[str, int],
    *,
    kohya: tuple[str, ...],
    onetrainer: tuple[str, ...],
    clip: str,
    omi: str = "",
) -> Component:
    """A text encoder. name: its folder in a diffusers pipeline; clip: its name in ComfyUI; omi: where OneTrainer differs."""
    return Component(
        name,
        table,
        {
            "kohya": kohya,
            "onetrainer": onetrainer,
            "diffusers": (f"{name}.",),
            "comfy": (f"text_encoders.{clip}.transformer.",),
            "omi": (f"{omi or clip}.",),
        },
        widths,
    )
