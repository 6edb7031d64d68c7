"""What a base model supplies to a conversion: module names where no table has them, and weights where a kind multiplies them."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

from loratools.adapters import factors
from loratools.adapters.adapter import Entry, Site
from loratools.errors import UnknownError
from loratools.mapping.architectures import Architecture, Component
from loratools.mapping.checkpoints import PREFIXES
from loratools.mapping.dimensions import evaluate
from loratools.mapping.rules import DIFF, Row, Table
from loratools.tensors.lazy import LazyTensor
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


# Where each layout keeps a component: component → (prefix of its tensors, namespace of its names), tried in this order.
_PLACES: Mapping[str, tuple[tuple[str, str], ...]] = {
    "denoiser": (
        ("model.diffusion_model.", "orig"),  # ldm single files
        ("diffusion_model.", "orig"),
        ("unet/", DIFF),  # diffusers pipelines
        ("transformer/", DIFF),
        ("", "orig"),  # bare
        ("", DIFF),  # a diffusers model folder
    ),
    "denoiser_2": (("transformer_2/", DIFF),),
    "text_encoder": (
        ("text_encoder/", DIFF),
        ("cond_stage_model.transformer.", DIFF),
        ("conditioner.embedders.0.transformer.", DIFF),
        ("cond_stage_model.model.", "open_clip"),
        ("text_encoders.clip_l.transformer.", DIFF),
    ),
    "text_encoder_2": (
        ("text_encoder_2/", DIFF),
        ("conditioner.embedders.1.model.", "open_clip"),
        ("text_encoders.clip_g.transformer.", DIFF),
        ("text_encoders.t5xxl.transformer.", DIFF),
    ),
    "text_encoder_3": (("text_encoder_3/", DIFF), ("text_encoders.t5xxl.transformer.", DIFF)),
    "model": (("", DIFF),),
}


class BaseWeights:
    """The weights of a base model by site, whatever its layout. Nothing is read before it is asked for."""

    def __init__(self, path: Path, architecture: Architecture) -> None:
        self.path, self.architecture = path, architecture
        self.tensors = open_source(path).tensors

    def of(self, entry: Entry, dims: Mapping[str, Mapping[str, int]]) -> LazyTensor:
        """The weight an entry's module changes, (out, in, *kernel): the parts of a fused one joined, halves as the entry has them.

        Raises UnknownError naming the site whose weight the base does not have.
        """
        joined = [self.at(site, dims.get(site.component, {})) for site in entry.sites]
        weight = joined[0] if len(joined) == 1 else factors.cat(joined)
        return factors.swap_halves(weight) if entry.swapped else weight

    def at(self, site: Site, dims: Mapping[str, int]) -> LazyTensor:
        """The weight of one site. Raises UnknownError."""
        if self.architecture.open_names:
            found = self.tensors.get(f"{site.path}.weight")
            if found is not None:
                return found
        else:
            table = self.architecture.component(site.component).table
            for prefix, namespace in _PLACES.get(site.component, ()):
                for match in table.by_site(namespace, site.path):
                    for leaf in (".weight", "_weight"):  # open_clip's in_proj_weight has no dot
                        tensor = self.tensors.get(prefix + match.name + leaf)
                        if tensor is not None:
                            return _part(tensor, match.row, match.part, dims)
        raise UnknownError(f"{self.path}: no weight for {site}", fix="--base is the model the adapter was trained on")


def _part(tensor: LazyTensor, row: Row, part: int, dims: Mapping[str, int]) -> LazyTensor:
    """The rows of one site in the weight of its row."""
    whole = factors.swap_halves(tensor) if row.swapped else tensor
    if len(row.sites) == 1:
        return whole
    heights = [evaluate(expression, dims) for expression in row.out]
    if any(height is None for height in heights):
        raise UnknownError(f"the widths of the parts of {row.name} are unknown")
    known = [height for height in heights if height is not None]
    return factors.rows(whole, sum(known[:part]), sum(known[: part + 1]))
