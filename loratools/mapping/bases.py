"""Module names taken from a base model, for adapters of models no table covers."""

from __future__ import annotations

import re
from pathlib import Path

from loratools.errors import UnknownError
from loratools.mapping.architectures import Architecture, Component
from loratools.mapping.checkpoints import PREFIXES
from loratools.mapping.rules import Row, Table
from loratools.tensors.reader import open_source

_NAME = re.compile(r"[^a-z0-9]+")


def architecture_of_base(path: Path) -> Architecture:
    """An architecture whose only table is the base's own module names: any model works.

    A module is whatever has a `.weight` of two dimensions or more; prefixes of known checkpoint layouts are taken off. Names
    are the same in every dialect; only flattening, prefixes and suffixes differ. Raises UnknownError for a file without weights.
    """
    source = open_source(path)
    rows: dict[str, Row] = {}
    for key, tensor in source.tensors.items():
        name, _, leaf = key.rpartition(".")
        if leaf != "weight" or not tensor.shape:
            continue
        prefix = next((row[0] for row in PREFIXES if row[1] != "hf" and key.startswith(row[0])), "")
        bare = name[len(prefix) :]
        layer = {1: "norm", 2: "linear"}.get(len(tensor.shape), "conv")
        in_ = str(tensor.shape[1]) if len(tensor.shape) > 1 else ""
        rows[bare] = Row(bare, (bare,), (str(tensor.shape[0]),), in_, layer, tensor.shape[2:])
    if not rows:
        raise UnknownError(f"{path}: no weights to take module names from")
    table = Table(Path(path).stem, tuple(rows.values()))
    prefixes = {
        "kohya": ("lora_unet_", "lora_te_"),
        "lycoris": ("lycoris_",),
        "onetrainer": ("lora_transformer_",),
        "diffusers": ("transformer.", "unet."),
        "comfy": ("diffusion_model.",),
        "omi": (),
    }
    component = Component("denoiser", table, prefixes)
    name = _NAME.sub("-", Path(path).stem.lower()).strip("-") or "base"
    return Architecture(name, f"the modules of {Path(path).name}", (component,))
