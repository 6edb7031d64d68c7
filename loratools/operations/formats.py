"""formats: the registries as data, so that what the tool prints and documents is what it does."""

from __future__ import annotations

from typing import Any

from loratools.adapters.kinds import KINDS
from loratools.mapping.architectures import Architecture, registry
from loratools.mapping.dialects import DIALECTS, Dialect
from loratools.mapping.leaves import SCHEMES
from loratools.mapping.memory import usual_form

# What dialects hold, in the words of `Dialect.holds`, with what each is.
HOLDABLE = {
    "lora": "LoRA, LoCon, DyLoRA: up · down of linear and convolution layers",
    "tucker": "LoRA of a convolution with a Tucker core (lora_mid)",
    "lora-bias": "a bias beside a LoRA, scaled with it (lora_B.bias)",
    "embedding": "LoRA of an embedding table",
    "dora": "a LoRA (LoHa, LoKr) with a magnitude per output row",
    "dora-in": "the same with a magnitude per input column",
    "loha": "LoHa: elementwise product of two low-rank matrices",
    "lokr": "LoKr: Kronecker product",
    "dense": "full deltas of weight and bias (diff, diff_b)",
    "norm": "deltas of normalisation layers (w_norm, b_norm)",
    "set": "replaced weights (set_weight, modules_to_save)",
    "qk-norm": "replaced query and key norms of FLUX.1 control adapters",
    "oft": "OFT: orthogonal blocks on the output rows (LyCORIS diag-oft)",
    "oft-list": "sd-scripts' own OFT of fused layers: always clamped, a list entry for each part",
    "boft": "BOFT: butterfly-ordered orthogonal blocks",
    "oft-in": "OFT on the input side (PEFT, OneTrainer)",
    "ia3": "(IA)3 in LyCORIS' form",
    "peft-ia3": "(IA)3 in PEFT's form",
    "glora": "GLoRA: W A + B",
}

_ALPHA = {
    "tensor": "an .alpha tensor per module",
    "header": "folded into the factors; lora_adapter_metadata repeats rank = alpha",
    "config": "adapter_config.json (r, lora_alpha and their patterns)",
    "none": "folded into the factors",
}


def formats() -> dict[str, Any]:
    """The registries of dialects, architectures and kinds, and how each kind fares in each dialect."""
    return {
        "dialects": [_dialect(dialect) for dialect in DIALECTS.values()],
        "architectures": [_architecture(architecture) for architecture in registry().values()],
        "kinds": [{"name": name, "title": title, "exact_to": _exact_to(name)} for name, title in HOLDABLE.items()],
        "modules": [{"name": name, "roles": list(kind.roles)} for name, kind in KINDS.items() if kind.roles],
        "conversions": {dialect.name: {name: conversion(dialect, name) for name in HOLDABLE} for dialect in DIALECTS.values()},
    }


def conversion(dialect: Dialect, kind: str) -> str:
    """What becomes of a kind in a dialect: exact | folded | contracted | as-diff_b | kind-lora | refused.

    folded: alpha goes into the factors, bit-exact for powers of two, else one rounding that is reported; contracted: a Tucker
    core is multiplied into the down factor; kind-lora: only with `--kind lora`, by exact algebra.
    """
    if not dialect.writable:
        return "refused"
    if kind in dialect.holds or (kind == "qk-norm" and "set" in dialect.holds):
        scaled = kind in ("lora", "lora-bias", "dora", "dora-in", "loha", "lokr", "glora", "tucker")
        return "folded" if scaled and dialect.alpha in ("header", "none") else "exact"
    if kind == "tucker" and "lora" in dialect.holds:
        return "contracted"
    if kind == "lora-bias" and "dense" in dialect.holds:
        return "as-diff_b"
    return "kind-lora" if kind in ("loha", "lokr") and "lora" in dialect.holds else "refused"


def _exact_to(kind: str) -> list[str]:
    return [dialect.name for dialect in DIALECTS.values() if conversion(dialect, kind) == "exact"]


def _dialect(dialect: Dialect) -> dict[str, Any]:
    served = [architecture for architecture in registry().values() if _spells(dialect, architecture)]
    prefixes = {
        prefix
        for architecture in served
        for component in architecture.components
        for spelling in dialect.spellings
        if spelling.applies(component)
        for prefix in spelling.prefixes_for(component)
    }
    schemes = dict.fromkeys(scheme for spelling in dialect.spellings for scheme in spelling.schemes)
    return {
        "name": dialect.name,
        "title": dialect.title,
        "rows": dialect.rows,
        "archs": [architecture.name for architecture in served],
        "prefixes": sorted(prefixes),
        "leaves": [leaf for scheme in schemes for leaf in SCHEMES.get(scheme, {}).values()],
        "alpha": _ALPHA[dialect.alpha],
        "kinds": sorted(dialect.holds),
        "tools": dialect.tools,
        "writable": dialect.writable,
        "folder": dialect.folder,
        "notes": dialect.notes,
    }


def _spells(dialect: Dialect, architecture: Architecture) -> bool:
    """Can the dialect name the architecture's main model?"""
    main = architecture.components[0]
    return dialect.serves(architecture) and (not dialect.spellings or usual_form(dialect, architecture, main) is not None)


def _architecture(architecture: Architecture) -> dict[str, Any]:
    return {
        "name": architecture.name,
        "title": architecture.title,
        "supported": architecture.supported,
        "components": [component.name for component in architecture.components],
        "variants": [variant for variant in architecture.variants if variant],
        "dialects": {
            dialect.name: [component.name for component in architecture.components if usual_form(dialect, architecture, component)]
            for dialect in DIALECTS.values()
            if dialect.writable and _spells(dialect, architecture)
        },
    }
