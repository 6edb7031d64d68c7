"""A base model as the adapters' sites see it: which tensor, which rows, in which orientation.

A base comes in many layouts: ldm and sgm single files (open_clip text encoders with a fused `in_proj_weight` included), bare DiT
files, all-in-one files, diffusers folders and pipelines, Hugging Face shards. Where a layout keeps each component is one table
here; how its modules are made of sites is the architecture's table, so fused q, k, v and exchanged halves need no code of their own.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from pathlib import Path

from loratools.adapters import factors
from loratools.adapters.adapter import Entry, Site
from loratools.errors import UnknownError
from loratools.mapping.architectures import Architecture, Component
from loratools.mapping.checkpoints import PREFIXES
from loratools.mapping.dimensions import choose_row, evaluate, vote_dims
from loratools.mapping.rules import DIFF, Match, Row, Table
from loratools.tensors.lazy import LazyTensor
from loratools.tensors.reader import TensorSource, open_source

_NAME = re.compile(r"[^a-z0-9]+")


def architecture_of_base(source: TensorSource) -> Architecture:
    """An architecture whose only table is the base's own module names: any model works.

    A module is whatever has a `.weight`; a tensor that is neither weight nor bias is a bare parameter. Prefixes of known checkpoint
    layouts are taken off. Names are the same in every dialect; only flattening, prefixes and suffixes differ. Raises UnknownError
    for a file without weights.
    """
    rows: dict[str, Row] = {}
    parameters: dict[str, Row] = {}
    for key, tensor in source.tensors.items():
        name, _, leaf = key.rpartition(".")
        prefix = next((row[0] for row in PREFIXES if row[1] != "hf" and key.startswith(row[0])), "")
        if leaf not in ("weight", "bias"):
            parameters[key[len(prefix) :]] = Row(key[len(prefix) :], (key[len(prefix) :],), layer="parameter")
        if leaf != "weight" or not tensor.shape:
            continue
        bare = name[len(prefix) :]
        layer = {1: "norm", 2: "linear"}.get(len(tensor.shape), "conv")
        in_ = str(tensor.shape[1]) if len(tensor.shape) > 1 else ""
        rows[bare] = Row(bare, (bare,), (str(tensor.shape[0]),), in_, layer, tensor.shape[2:])
    if not rows:
        raise UnknownError(f"{source.path}: no weights to take module names from")
    table = Table(source.path.stem, tuple({**parameters, **rows}.values()))
    prefixes = {
        "kohya": ("lora_unet_", "lora_te_"),
        "lycoris": ("lycoris_",),
        "onetrainer": ("lora_transformer_",),
        "diffusers": ("transformer.", "unet."),
        "comfy": ("diffusion_model.",),
        "omi": (),
    }
    component = Component("denoiser", table, prefixes)
    name = _NAME.sub("-", source.path.stem.lower()).strip("-") or "base"
    return Architecture(name, f"the modules of {source.path.name}", (component,))


_HF_CLIP = (DIFF, "flat-clip")  # transformers before and since version 5

# Where the layouts keep a component: component → (prefix of its tensors, namespaces its names may have there), tried in this
# order. A component's own `comfy` prefixes (`text_encoders.clip_l.transformer.`) and its diffusers folder come before these.
_PLACES: Mapping[str, tuple[tuple[str, tuple[str, ...]], ...]] = {
    "denoiser": (
        ("model.diffusion_model.", ("orig",)),  # ldm, sgm and all-in-one files
        ("diffusion_model.", ("orig", DIFF)),
        ("unet/", (DIFF,)),  # diffusers pipelines
        ("transformer/", (DIFF,)),
        ("net.", ("orig",)),  # Cosmos, Anima
        ("", ("orig", DIFF)),  # a bare file, a diffusers model folder
    ),
    "denoiser_2": (("transformer_2/", (DIFF,)),),
    "text_encoder": (
        ("cond_stage_model.transformer.", _HF_CLIP),  # SD1
        ("conditioner.embedders.0.transformer.", _HF_CLIP),  # SDXL
        ("cond_stage_model.model.", ("open_clip-weights",)),  # SD2
        ("conditioner.embedders.0.model.", ("open_clip-weights",)),  # SD2 in sgm's form
        ("", _HF_CLIP),
    ),
    "text_encoder_2": (
        ("conditioner.embedders.1.model.", ("open_clip-weights",)),  # SDXL
        ("conditioner.embedders.0.model.", ("open_clip-weights",)),  # SDXL refiner
        ("", _HF_CLIP),
    ),
}

# How versions of transformers and their wrappers spell one module: (start of the adapter's name, start of the base's).
_ALIASES = (
    ("", ""),
    ("model.", ""),
    ("", "model."),
    ("model.", "model.language_model."),
    ("model.language_model.", "model."),
    ("model.language_model.", "language_model.model."),
    ("language_model.model.", "model.language_model."),
    ("language_model.", ""),
    ("transformer.", ""),
    ("", "transformer."),
    ("", "language_model."),  # the head of a multimodal model, which transformers 4.52 took out of its text model
)

HEAD = "lm_head"
_EMBEDDINGS = (
    "model.embed_tokens",
    "model.language_model.embed_tokens",
    "language_model.model.embed_tokens",
    "model.decoder.embed_tokens",
    "embed_tokens",
    "transformer.wte",
    "wte",
    "gpt_neox.embed_in",
    "transformer.word_embeddings",  # Bloom, Falcon
    "word_embeddings",
    "backbone.embeddings",  # Mamba
    "transformer.tokens_embed",
    "model.tok_embeddings",
)

# The last part of the name of any embedding, those of positions and segments included.
_LOOKUPS = frozenset({name.rpartition(".")[2] for name in _EMBEDDINGS}) | {
    "wpe", "embed_positions", "position_embeddings", "positions_embed", "token_type_embeddings",
}  # fmt: skip

# transformers' models of Conv1D layers, and those layers
_CONV1D_MODELS = frozenset({"gpt2", "openai-gpt", "imagegpt", "decision_transformer", "gpt2_double_heads", "clvp"})
_CONV1D_LAYERS = frozenset({"c_attn", "q_attn", "c_proj", "c_fc"})

_LEAVES = {
    "weight": (".weight", ".scale", "_weight", ""),  # Flux' norms say scale, open_clip in_proj_weight, bare parameters nothing
    "bias": (".bias", "_bias"),
}


@dataclass(frozen=True)
class Place:
    """Where a site's weight or bias lies: rows start..stop of the tensor `key`, as the file stores it.

    swapped: the two halves of the rows are exchanged against the site's; transposed: stored (in, out); output: the tensor the
    result goes to, where that is a new one (the head of a language model that shares the embedding's tensor).
    """

    key: str
    start: int
    stop: int
    swapped: bool = False
    transposed: bool = False
    output: str = ""

    @property
    def target(self) -> str:
        return self.output or self.key


class Base:
    """A base model's tensors by site, whatever its layout. Opening reads headers only.

    values: what to read in place of tensors that hold codes (fp8 with a scale), by key; model_type: of a config.json beside them;
    scales: tensors that are part of those values.
    """

    def __init__(
        self,
        source: TensorSource | Path,
        architecture: Architecture,
        values: Mapping[str, LazyTensor] | None = None,
        model_type: str | None = None,
        scales: frozenset[str] = frozenset(),
    ) -> None:
        self.source = source if isinstance(source, TensorSource) else open_source(source)
        self.architecture, self.model_type, self.scales = architecture, model_type, scales
        self.tensors = {**self.source.tensors, **(values or {})}

    @cached_property
    def dims(self) -> dict[str, dict[str, int]]:
        """component → the widths of its table's symbols, from the base's own shapes."""
        return {component.name: self._widths(component) for component in self.architecture.components}

    def _widths(self, component: Component) -> dict[str, int]:
        pairs = []
        for prefix, namespaces in self._places(component):
            for key, tensor in self.tensors.items():
                if key.startswith(prefix):
                    name, leaf = _module_of(key[len(prefix) :])
                    for namespace in namespaces if leaf else ():
                        pairs += [(match.row, tensor.shape) for match in component.table.by_name(namespace, name)[:1]]
            if pairs:
                break
        return vote_dims([(row, shape if len(shape) > 1 else shape[:1]) for row, shape in pairs if shape])

    def _places(self, component: Component) -> Iterator[tuple[str, tuple[str, ...]]]:
        if component.name.startswith("text_encoder"):
            yield from ((prefix, _HF_CLIP) for prefix in component.prefixes.get("comfy", ()))
            yield f"{component.folder}/", _HF_CLIP
        yield from _PLACES.get(component.name, (("", (DIFF,)),))

    def place(self, site: Site, role: str = "weight") -> Place | None:
        """Where a site's "weight" or "bias" is; None where the base has none."""
        if self.architecture.open_names:
            return self._open_place(site, role)
        component = self.architecture.component(site.component)
        for prefix, namespaces in self._places(component):
            for namespace in namespaces:
                matches = component.table.by_site(namespace, site.path)
                found = [(match, key) for match in matches for key in self._keys(prefix + match.name, role)]
                if found:
                    return self._at(found, self.dims[site.component])
        return None

    def _keys(self, stem: str, role: str) -> list[str]:
        """The tensor of a module's weight or bias: a list of one, or of none."""
        return [key for leaf in _LEAVES[role] if (key := stem + leaf) in self.tensors][:1]

    def _open_place(self, site: Site, role: str) -> Place | None:
        """A language model's module is found under its own name, or under that of another version of the library."""
        for mine, theirs in _ALIASES:
            if site.path.startswith(mine):
                for key in self._keys(theirs + site.path[len(mine) :], role):
                    return Place(key, 0, (*self.tensors[key].shape, 0)[0])
        if site.path.rpartition(".")[2] == HEAD and role == "weight" and self.embedding is not None:
            return Place(self.embedding, 0, self.tensors[self.embedding].shape[0], output=f"{HEAD}.weight")
        return None

    def sites(self) -> Iterator[tuple[Site, str, str]]:
        """(site, "weight" or "bias", the tensor that holds it) of everything with a name, in the order of the base's tensors."""
        for key in self.source.tensors:
            for role, sites in self._readings(key):
                found = [site for site in sites if (place := self.place(site, role)) is not None and place.key == key]
                if found:
                    yield from ((site, role, key) for site in found)
                    break

    def _readings(self, key: str) -> Iterator[tuple[str, list[Site]]]:
        """(role, sites) that a tensor's name may mean, the likeliest first; a bare parameter is a weight of its own name."""
        for component in self.architecture.components:
            for prefix, namespaces in [("", ())] if self.architecture.open_names else self._places(component):
                rest = key.removeprefix(prefix) if key.startswith(prefix) else ""
                for role, leaf in [(kind, end) for kind in ("bias", "weight") for end in _LEAVES[kind] if rest.endswith(end)]:
                    name = rest.removesuffix(leaf)
                    matches = [match for namespace in namespaces for match in component.table.by_name(namespace, name)]
                    paths = [name] if self.architecture.open_names else [path for match in matches for path in match.sites]
                    yield role, [Site(component.name, path) for path in paths]

    def looks_up(self, site: Site) -> bool:
        """Is a language model's module an embedding, by its name?"""
        return self.architecture.open_names and site.path.rpartition(".")[2] in _LOOKUPS

    def conv1d(self, site: Site) -> bool | None:
        """Is a layer transformers' Conv1D, whose weight is stored (in, out)? None where nothing tells the model's type."""
        if self.model_type is None or not self.architecture.open_names:
            return None if self.architecture.open_names else False
        return self.model_type in _CONV1D_MODELS and site.path.rpartition(".")[2] in _CONV1D_LAYERS

    @cached_property
    def embedding(self) -> str | None:
        """The tensor of a language model's input embedding; a head without a tensor of its own shares it."""
        return next((f"{name}.weight" for name in _EMBEDDINGS if f"{name}.weight" in self.tensors), None)

    def _at(self, found: Sequence[tuple[Match, str]], dims: Mapping[str, int]) -> Place:
        """The rows of one site in its tensor; of several rows of the table the one whose widths the tensor has (SD3's last block)."""
        match, key = found[0]
        shape = self.tensors[key].shape
        if len(found) > 1:
            chosen, _ = choose_row([match for match, _ in found], shape, dims)
            match, key = next((other, key) for other, key in found if other is chosen)
        row = match.row
        if len(row.sites) == 1:
            return Place(key, 0, (*shape, 0)[0], row.swapped, row.transposed)
        heights = [evaluate(expression, dims) or 0 for expression in row.out]
        if not all(heights) or sum(heights) != shape[0]:
            raise UnknownError(f"{self.source.path}: {key} has {shape[0]} rows, expected {' + '.join(row.out)} of {match.sites}")
        stops = list(accumulate(heights))
        return Place(key, stops[match.part] - heights[match.part], stops[match.part])

    def stored(self, place: Place) -> LazyTensor:
        """The tensor's rows at a place, as the file has them."""
        tensor = self.tensors[place.key]
        whole = not tensor.shape or (place.start, place.stop) == (0, tensor.shape[0])
        return tensor if whole else factors.rows(tensor, place.start, place.stop)

    def oriented(self, place: Place) -> LazyTensor:
        """The tensor's rows at a place in the site's own order, weights (out, in, *kernel)."""
        tensor = self.stored(place)
        tensor = factors.swap_halves(tensor) if place.swapped else tensor
        return factors.transposed(tensor) if place.transposed else tensor

    def at(self, site: Site, role: str = "weight") -> LazyTensor:
        """One site's weight (out, in, *kernel) or bias, in the site's own order. Raises UnknownError."""
        place = self.place(site, role)
        if place is None:
            raise UnknownError(f"{self.source.path}: no {role} for {site}", fix="--base is the model the adapter was trained on")
        return self.oriented(place)

    def of(self, entry: Entry, role: str = "weight") -> LazyTensor:
        """The weight an entry's module changes: the parts of a fused one joined, halves as the entry has them. Raises UnknownError."""
        joined = [self.at(site, role) for site in entry.sites]
        weight = joined[0] if len(joined) == 1 else factors.cat(joined)
        return factors.swap_halves(weight) if entry.swapped else weight


def _module_of(key: str) -> tuple[str, str]:
    """A tensor's name as (module, leaf); leaf "" for what is no weight."""
    for leaf in _LEAVES["weight"][:-1]:
        if key.endswith(leaf):
            return key[: -len(leaf)], leaf
    return key, ""
