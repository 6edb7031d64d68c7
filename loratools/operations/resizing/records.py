"""What a file says of its ranks and alphas outside of its tensors, brought up to date with the modules that are written.

    adapter_config.json     r, rank_pattern, lora_alpha (alpha for LoHa, LoKr), alpha_pattern, use_rslora
    lora_adapter_metadata   the same fields in the header, by component
    ss_network_dim, _alpha  one number, "Dynamic" where modules differ
    ss_network_args         conv_dim and conv_alpha of kernels larger than 1x1; whatever else says a size there is taken out

Invariant: a file without a changed module has every record as it was; else only these fields change.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from loratools.adapters.adapter import Adapter, Module
from loratools.adapters.sums import low_rank
from loratools.mapping import peft_config
from loratools.mapping.architectures import Architecture
from loratools.mapping.dialects import DIALECTS
from loratools.mapping.memory import ALPHA
from loratools.mapping.rules import DIFF
from loratools.mapping.write import Plan
from loratools.operations.resizing.modules import kernel
from loratools.tensors.metadata import PEFT_KEY, json_field, lora_adapter_metadata, peft_metadata

_NETWORK = ("ss_network_dim", "ss_network_alpha", "ss_network_module")
_ARGS = "ss_network_args"
_SIZE = re.compile(r"(^|_)(dim|alpha)s?$")  # conv_dim, block_dims, img_attn_dim, …: what the modules had while they were trained
_OF_A_KIND = ("algo", "factor", "decompose_both", "full_matrix", "unbalanced_factorization", "use_tucker")
_FIELDS = ("r", "rank_pattern", "lora_alpha", "alpha", "alpha_pattern", "use_rslora")

Config = Mapping[str, Any]


def alpha_rule(adapter: Adapter) -> str:
    """Where the file keeps alpha: as its dialect does, or in a header it has although its dialect knows none."""
    rule = DIALECTS[adapter.dialect].alpha
    return "header" if rule == "none" and PEFT_KEY in adapter.metadata else rule


def described(adapter: Adapter, architecture: Architecture, made: Plan, modules: Sequence[Module]) -> tuple[Adapter, Plan, dict[str, str]]:
    """(the adapter without records that hold no more, the plan with its configs, header entries over the usual ones).

    modules: as they are written, one for each entry of the adapter.
    """
    changed = any(entry.module is not module for entry, module in zip(adapter.entries, modules, strict=True))
    configs = {folder: _config(config, peft_config.part_of(adapter.config, folder), changed) for folder, config in made.configs.items()}
    made = replace(made, configs=configs)
    if not changed:
        return adapter, made, {key: adapter.metadata[key] for key in _NETWORK if key in adapter.metadata}
    extra: dict[str, str] = {}
    gone = {ALPHA, PEFT_KEY}
    same_kinds = all(entry.module.kind == module.kind for entry, module in zip(adapter.entries, modules, strict=True))
    if same_kinds and "ss_network_module" in adapter.metadata:
        extra["ss_network_module"] = adapter.metadata["ss_network_module"]
    if _ARGS in adapter.metadata:
        extra[_ARGS] = _arguments(adapter.metadata, modules, same_kinds)
    if alpha_rule(adapter) == "header":
        gone.remove(PEFT_KEY)
        extra[PEFT_KEY] = lora_adapter_metadata({**peft_metadata(adapter.metadata), **_header(adapter, architecture, modules)})
    return adapter.replace(metadata={key: text for key, text in adapter.metadata.items() if key not in gone}), made, extra


def _header(adapter: Adapter, architecture: Architecture, modules: Sequence[Module]) -> dict[str, Config]:
    """The header's part for each component."""
    groups: dict[str, dict[str, Module]] = {}
    for entry, module in zip(adapter.entries, modules, strict=True):
        groups.setdefault(entry.component, {})[entry.name] = module
    previous = peft_metadata(adapter.metadata)
    found: dict[str, Config] = {}
    for name, named in groups.items():
        component = architecture.component(name)
        known = () if architecture.open_names else tuple(row.name for row in component.table.namespaces[DIFF])
        before = previous.get(component.folder, {})
        found[component.folder] = _config(peft_config.config_for(named, known, before, adapter.dialect), before, True)
    return found


def _config(rendered: Config, previous: Config, changed: bool) -> dict[str, Any]:
    """The previous config with the fields of rank and alpha of the rendered one; the rendered one where the type is another."""
    if previous.get("peft_type", rendered["peft_type"]) != rendered["peft_type"]:
        return dict(rendered)
    fields = {name: rendered[name] for name in _FIELDS if name in rendered} if changed else {}
    return {**rendered, **{name: value for name, value in previous.items() if value is not None or name not in rendered}, **fields}


def _arguments(metadata: Mapping[str, str], modules: Sequence[Module], same_kinds: bool) -> str:
    """ss_network_args with the sizes of what is written."""
    arguments = json_field(metadata, _ARGS)
    if not isinstance(arguments, dict):
        return metadata[_ARGS]
    ranked = [module for module in modules if low_rank(module)]
    convs = [module for module in ranked if kernel(module)]
    values: dict[str, set[float | int | None]] = {
        "conv_dim": {module.rank for module in convs},
        "conv_alpha": {module.rank if module.alpha is None else module.alpha for module in convs},
    }
    sizes = {name: found.pop() for name, found in values.items() if len(found) == 1 and found != {None}}
    plain = all(module.kind == "lora" and "mid" not in module.factors for module in ranked)
    gone = {name for name in arguments if _SIZE.search(name)} | set(_OF_A_KIND if plain and not same_kinds else ())
    kept = {name: value for name, value in arguments.items() if name not in gone or name in sizes}
    return json.dumps({name: f"{sizes[name]:g}" if name in sizes else value for name, value in kept.items()})
