"""The metadata of what is written: carried, corrected where it describes the tensors, and extended by where it came from.

Carried entries keep their order; new ones are sorted. Private paths are never added: a source is named by its base name.
Source: sd-scripts (ss_*), Stability's modelspec, diffusers' lora_adapter_metadata.
"""

from __future__ import annotations

from collections import Counter
from typing import Any

from loratools.adapters.adapter import Adapter
from loratools.mapping import memory
from loratools.mapping.architectures import Architecture
from loratools.mapping.dialects import DIALECTS
from loratools.mapping.write import Plan
from loratools.tensors.metadata import lora_adapter_metadata

_HASHES = ("sshs_model_hash", "sshs_legacy_hash")
_OWN = "loratools."

# sd-scripts' network module of a plain LoRA, by architecture.
_NETWORK_MODULES = {
    "flux": "networks.lora_flux",
    "chroma": "networks.lora_flux",
    "sd3": "networks.lora_sd3",
    "lumina2": "networks.lora_lumina",
    "wan": "networks.lora_wan",
}


def metadata_for(adapter: Adapter, architecture: Architecture, plan: Plan, *, version: str) -> dict[str, str]:
    """The header of the output: carried entries in their order, then new ones sorted.

    A rewrite in the same dialect adds no lineage: only what describes the tensors is brought up to date.
    """
    moved = adapter.dialect != plan.dialect.name
    carried = {
        key: value
        for key, value in adapter.metadata.items()
        if key not in _HASHES and not (moved and (key == "lora_adapter_metadata" or key.startswith(_OWN)))
    }
    new = {"format": "pt", **_lineage(adapter, architecture, plan, version)} if moved else {}
    if moved and plan.dialect.alpha == "header":
        new["lora_adapter_metadata"] = lora_adapter_metadata(plan.configs)
    if moved and plan.dialect.alpha != "tensor":
        before = adapter.metadata.get(memory.ALPHA) if DIALECTS[adapter.dialect].alpha != "tensor" else None
        new[memory.ALPHA] = before or memory.of_alphas(_alphas(plan), complete=len(plan.modules))
    described = _network(plan, architecture)
    carried.update({key: value for key, value in described.items() if key in carried})
    if moved and plan.dialect.hashes:
        new.update({**described, **_minimum(architecture, adapter)})
    return {**carried, **dict(sorted((key, value) for key, value in new.items() if key not in carried))}


def new_metadata(adapter: Adapter, architecture: Architecture, plan: Plan, *, version: str) -> dict[str, str]:
    """The header of an adapter that comes from no file: what its dialect's readers look for."""
    found = {"format": "pt", _OWN + "architecture": architecture.name, _OWN + "dialect": plan.dialect.name, _OWN + "version": version}
    if plan.dialect.alpha == "header":
        found["lora_adapter_metadata"] = lora_adapter_metadata(plan.configs)
    if plan.dialect.hashes:
        found |= {**_network(plan, architecture), **_minimum(architecture, adapter)}
    return dict(sorted(found.items()))


def _lineage(adapter: Adapter, architecture: Architecture, plan: Plan, version: str) -> dict[str, str]:
    """Where the output came from: dialect, architecture, spelling, and the base name of the source."""
    found = {
        _OWN + "architecture": architecture.name,
        _OWN + "converted_from": adapter.dialect,
        _OWN + "dialect": plan.dialect.name,
        _OWN + "version": version,
    }
    reshaped = {str(written.sites[0]): [*written.reshaped] for written in plan.modules if written.reshaped}
    entries = {memory.SPELLING: memory.of_spelling(adapter, architecture), memory.FLAT: memory.of_shapes(adapter, reshaped)}
    found.update({key: text for key, text in entries.items() if text is not None})
    if adapter.path is not None:
        found[_OWN + "source"] = adapter.path.name.encode("utf-8", "backslashreplace").decode()  # a name may be no text
    return found


def _alphas(plan: Plan) -> dict[str, list[Any]]:
    """site → [alpha before it was folded, the power of two the second factor took, dtype and shape of its tensor]."""
    return {
        str(written.sites[0]): [
            written.original_alpha,
            int(written.module.options.get("second_took", 0)),
            *([written.alpha_tensor.dtype, *written.alpha_tensor.shape] if written.alpha_tensor is not None else []),
        ]
        for written in plan.modules
        if written.original_alpha is not None
    }


def _network(plan: Plan, architecture: Architecture) -> dict[str, str]:
    """ss_network_dim, _alpha and _module of the tensors as written; "Dynamic" where modules differ."""
    modules = [written.module for written in plan.modules]
    ranks = Counter(module.rank for module in modules if module.rank)
    alphas = Counter(module.alpha if module.alpha is not None else float(module.rank or 0) for module in modules if module.rank)
    plain = all(module.kind in ("lora", "dora") and "mid" not in module.factors for module in modules)
    return {
        "ss_network_dim": _uniform(ranks),
        "ss_network_alpha": _uniform(alphas),
        "ss_network_module": _NETWORK_MODULES.get(architecture.name, "networks.lora") if plain else "lycoris.kohya",
    }


def _uniform(values: Counter[int] | Counter[float]) -> str:
    if len(values) != 1:
        return "Dynamic" if values else "None"
    return f"{next(iter(values)):g}"


def _minimum(architecture: Architecture, adapter: Adapter) -> dict[str, str]:
    """What sd-scripts' readers look for beside the network's own entries."""
    variants = {variant: version for version, variant in reversed(list(architecture.base_versions.items()))}
    version = variants.get(adapter.variant or "", next(iter(architecture.base_versions), ""))
    found = {"ss_v2": str(architecture.name == "sd2"), "ss_network_args": "{}"}
    return {**found, "ss_base_model_version": version} if version else found
