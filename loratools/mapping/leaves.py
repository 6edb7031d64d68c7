"""The last part of a key: which factor of which kind it names, and how each suffix scheme spells it.

A scheme is one trainer family's spelling of the LoRA factors; the leaves of the other kinds are the same everywhere. Roles are
those of `adapters.kinds`. Source: the key tables of sd-scripts, LyCORIS, PEFT, diffusers, ComfyUI and ai-toolkit.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import cache

# scheme → role → leaf. The first scheme of a dialect's spelling is the one it writes.
SCHEMES: dict[str, dict[str, str]] = {
    "kohya": {  # sd-scripts, musubi, LyCORIS, OneTrainer, ComfyUI
        "down": "lora_down.weight",
        "up": "lora_up.weight",
        "mid": "lora_mid.weight",
        "dora_scale": "dora_scale",
    },
    "peft": {  # PEFT, diffusers since 0.22, ai-toolkit
        "down": "lora_A.weight",
        "up": "lora_B.weight",
        "bias": "lora_B.bias",
        "magnitude": "lora_magnitude_vector",
        "embedding_down": "lora_embedding_A",
        "embedding_up": "lora_embedding_B",
    },
    "peft-bare": {"down": "lora_A", "up": "lora_B"},  # Mochi
    "dot": {"down": "lora.down.weight", "up": "lora.up.weight"},  # diffusers 0.20-0.22
    "linear-layer": {  # diffusers <= 0.21, text encoders
        "down": "lora_linear_layer.down.weight",
        "up": "lora_linear_layer.up.weight",
    },
    "updown": {"down": "down.weight", "up": "up.weight"},  # attention processors, XLabs: the module name ends in `_lora`
}

# Leaves that mean the same in every scheme.
COMMON: dict[str, str] = {
    leaf: role
    for role, *leaves in (
        ("alpha", "alpha"),
        ("dora_scale", "dora_scale"),  # LyCORIS, OneTrainer
        ("magnitude", "lora_magnitude_vector.weight", "magnitude"),  # raw PEFT dumps; ai-toolkit
        ("diff", "diff"),
        ("diff_b", "diff_b"),
        ("w_norm", "w_norm"),
        ("b_norm", "b_norm"),
        ("set_weight", "set_weight", "scale"),  # ComfyUI; BFL control's norm `scale` is a replacement
        ("set_bias", "bias"),
        ("weight", "weight"),  # IA3 with `on_input`, else a replacement
        ("on_input", "on_input"),
        ("reshape_weight", "reshape_weight"),
        ("bias_indices", "bias_indices"),
        ("bias_values", "bias_values"),
        ("bias_size", "bias_size"),
        *((f"hada_{x}", f"hada_{x}") for x in ("w1_a", "w1_b", "w2_a", "w2_b", "t1", "t2")),
        *((f"lokr_{x}", f"lokr_{x}") for x in ("w1", "w1_a", "w1_b", "w2", "w2_a", "w2_b", "t2")),
        ("oft_blocks", "oft_blocks"),
        *((f"oft_blocks.{part}", f"oft_blocks.{part}") for part in range(4)),  # sd-scripts: one list entry a split part
        ("rescale", "rescale"),
        ("oft_R.weight", "oft_R.weight"),  # PEFT, OneTrainer
        ("oft_R.scaled_oft", "oft_R.scaled_oft"),
        ("ia3_l", "ia3_l"),
        *((f"{x}.weight", f"{x}.weight") for x in ("a1", "a2", "b1", "b2", "bm")),
    )
    for leaf in leaves
}

# role → leaf for writing what is common; a role with two leaves is written as the first one listed.
COMMON_LEAF: dict[str, str] = {}
for _text, _role in COMMON.items():
    COMMON_LEAF.setdefault(_role, _text)
COMMON_LEAF["set_weight"] = "set_weight"

# Leaves that no base checkpoint has: one of them makes a file an adapter.
_AMBIGUOUS = {"alpha", "weight", "bias", "scale", "down.weight", "up.weight"}
_PROCESSOR = re.compile(r"_lora\d?$")

_SUFFIXES: dict[str, tuple[str, str | None]] = {leaf: (role, None) for leaf, role in COMMON.items()}
_SUFFIXES.update((leaf, (role, scheme)) for scheme, leaves in SCHEMES.items() for role, leaf in leaves.items() if leaf != "dora_scale")
_NAMED = {
    "lora_A": "down",
    "lora_B": "up",
    "lora_magnitude_vector": "magnitude",
    "lora_embedding_A": "embedding_down",
    "lora_embedding_B": "embedding_up",
}
FLAT_PREFIXES = ("lora_", "lycoris_", "oft_")


@dataclass(frozen=True)
class Leaf:
    """A key taken apart: `stem` (prefix and module name), role, scheme (None: every scheme has it), the adapter's name if any."""

    stem: str
    text: str
    role: str
    scheme: str | None
    adapter_name: str | None = None

    @property
    def is_adapter(self) -> bool:
        """True for leaves that only adapters have; attention processors say it in the module's name (`to_q_lora`, `qkv_lora1`)."""
        return self.text not in _AMBIGUOUS or (self.scheme == "updown" and _PROCESSOR.search(self.stem) is not None)


@cache
def _leaf(text: str) -> tuple[str, str | None] | None:
    return _SUFFIXES.get(text)


def parse_key(key: str) -> Leaf | None:
    """Split a key into stem and leaf: at the first dot in a flattened name, at the longest known suffix in a dotted one."""
    if key.startswith(FLAT_PREFIXES):
        stem, _, text = key.partition(".")
        found = _leaf(text)
        return Leaf(stem, text, *found) if found and stem else _named(key)
    pieces = key.split(".")
    for count in (3, 2, 1):
        if len(pieces) > count:
            text = ".".join(pieces[-count:])
            found = _leaf(text)
            if found:
                return Leaf(".".join(pieces[:-count]), text, *found)
            if count == 3:
                named = _named(key)
                if named:
                    return named
    return None


def _named(key: str) -> Leaf | None:
    """`….lora_A.<adapter>.weight`, `….lora_embedding_A.<adapter>`, `….lora_magnitude_vector.<adapter>[.weight]`."""
    pieces = key.split(".")
    for back in (3, 2):
        if len(pieces) > back and pieces[-back] in _NAMED:
            factor, name, *rest = pieces[-back:]
            if name not in ("weight", "bias") and rest in ([], ["weight"], ["bias"]):
                role = "bias" if rest == ["bias"] else _NAMED[factor]
                return Leaf(".".join(pieces[:-back]), ".".join(pieces[-back:]), role, "peft-named", name)
    return None
