"""Keys gathered into modules, before anything is known about the architecture.

A stem is what stands before the leaf: prefix and module name together. All keys of one stem form one module (rarely two). No
tensor is read here but alphas: shapes come from the header.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field

from loratools.mapping.leaves import Leaf, parse_key
from loratools.tensors.lazy import LazyTensor

# Path segments that wrappers leave in names: torch.compile, DataParallel, PEFT's tuner layers and adapter names.
_DEBRIS = re.compile(r"(?:^|(?<=\.))(?:_orig_mod|module|base_layer|default|modules_to_save\.\w+)(?:\.|$)")

REPEATED = ("the base model's own weight", "a second copy of a saved module")  # companions that say nothing of their own

# Tensors that ride along with an adapter and belong to no module: OneTrainer's embeddings, slider bookkeeping, and the base weights
# that PEFT saves beside the LoRA of an embedding (`save_embedding_layers="auto"`).
_COMPANIONS = (
    (re.compile(r"bundle_emb\."), "a bundled textual-inversion embedding"),
    (re.compile(r"_aux\."), "bookkeeping of a slider"),
    (re.compile(r".*\.(?:base_layer|original_module)\.(?:weight|bias)$"), REPEATED[0]),
)
_COPY = re.compile(r"(.*)\.modules_to_save\.(weight|bias)$")  # PEFT saves it a second time beside a vocabulary that grew


@dataclass
class Stem:
    """The factors found under one module name: role → tensor and role → key, with the scheme its LoRA leaves are spelled in."""

    name: str
    factors: dict[str, LazyTensor] = field(default_factory=dict)
    keys: dict[str, str] = field(default_factory=dict)
    leaves: dict[str, Leaf] = field(default_factory=dict)
    duplicates: list[str] = field(default_factory=list)

    @property
    def scheme(self) -> str | None:
        """The scheme of its leaves, None when every scheme spells them alike."""
        return next((leaf.scheme for leaf in self.leaves.values() if leaf.scheme), None)

    @property
    def is_adapter(self) -> bool:
        return any(leaf.is_adapter for leaf in self.leaves.values())

    def add(self, key: str, leaf: Leaf, tensor: LazyTensor) -> None:
        if leaf.role in self.factors:
            self.duplicates.append(key)
            return
        self.factors[leaf.role], self.keys[leaf.role], self.leaves[leaf.role] = tensor, key, leaf


@dataclass
class Stems:
    """All tensors of a file: stems in file order, companions with what they are, and keys no leaf is known for."""

    stems: dict[str, Stem]
    companions: dict[str, str]
    unknown: list[str]


def gather(tensors: Mapping[str, LazyTensor]) -> Stems:
    """Group keys by stem. Duplicated roles of a stem are kept aside in `Stem.duplicates`."""
    stems: dict[str, Stem] = {}
    companions: dict[str, str] = {}
    unknown: list[str] = []
    for key, tensor in tensors.items():
        companion = next((what for pattern, what in _COMPANIONS if pattern.match(key)), None)
        copy = _COPY.match(key)
        if copy and ".".join(copy.groups()) in tensors:
            companion = REPEATED[1]
        if companion:
            companions[key] = companion
            continue
        leaf = parse_key(key)
        if leaf is None:
            unknown.append(key)
            continue
        stems.setdefault(leaf.stem, Stem(leaf.stem)).add(key, leaf, tensor)
    for stem in stems.values():
        _settle_plain_weight(stem)
    return Stems(stems, companions, unknown)


def _settle_plain_weight(stem: Stem) -> None:
    """A `.weight` is IA3 with an `on_input` sibling; alone it replaces the module's own weight."""
    if "weight" in stem.factors and "on_input" not in stem.factors:
        stem.factors["set_weight"] = stem.factors.pop("weight")
        stem.keys["set_weight"] = stem.keys.pop("weight")
        stem.leaves["set_weight"] = stem.leaves.pop("weight")


def tidy(name: str) -> str:
    """A stem without wrapper debris: `_orig_mod.`, `module.`, `base_layer.`, adapter names, and a doubled prefix."""
    cleaned = _DEBRIS.sub("", name).rstrip(".")
    doubled = re.match(r"((?:[a-z_]+\.){1,2})\1", cleaned)
    while doubled:
        cleaned = cleaned[len(doubled.group(1)) :]
        doubled = re.match(r"((?:[a-z_]+\.){1,2})\1", cleaned)
    return cleaned
