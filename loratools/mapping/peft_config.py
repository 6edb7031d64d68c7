"""PEFT's adapter_config.json, read for what it says about scale and written from the tensors.

PEFT keeps rank and alpha only here: `r`, `lora_alpha`, and regular expressions in `rank_pattern` and `alpha_pattern` of which the
first that matches a module's name wins; scale = alpha / r, or alpha / sqrt(r) with `use_rslora`. diffusers stores the same
fields, prefixed by component, in its `lora_adapter_metadata` header entry. Source: PEFT 0.21 LoraConfig, get_pattern_key.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any

from loratools.adapters.adapter import Module
from loratools.adapters.kinds import Dense, InputOft
from loratools.errors import UnsupportedError
from loratools.mapping import peft_lycoris

# Fields whose non-default value changes what the tensors mean, in ways nothing here computes. field → what it does
UNSUPPORTED = {
    "target_parameters": "adapts bare parameters (mixture-of-experts weights)",
    "layer_replication": "repeats layers of the base model",
    "trainable_token_indices": "trains single embedding rows",
    "use_qalora": "groups the input (QA-LoRA)",
    "use_bdlora": "uses block-diagonal factors (BD-LoRA)",
    "alora_invocation_tokens": "applies only after a token (aLoRA)",
    "arrow_config": "routes between adapters (Arrow)",
    "velora_config": "compresses activations (VeLoRA)",
    "kasa_config": "decomposes the base (KaSA)",
    "monteclora_config": "samples the factors (MonteCLoRA)",
}

# Initialisations that change the base model: the factors fit only the changed base.
RESIDUAL_INITS = ("pissa", "olora", "corda", "loftq", "eva_residual", "lora_ga")

# CLIPTextModel lost this part of its module names in transformers 5; CLIPTextModelWithProjection has kept it. Both are matched.
_CLIP = "text_model."

# A group with a repetition or an alternative in it that is itself repeated, as in (a+)+ or (a|a)*: exponential time on some names.
_CLASS = re.compile(r"\\.|\[\^?\]?[^\]]*\]")
_NESTED = re.compile(r"\((?=[^()]*(?:[+*{|]|\([^()]*[+*{|][^()]*\))).*\)\s*[+*{]|[+*}][+*]")

# Fields of the others that a type of adapter does not have.
_FOREIGN_TO = {"OFT": ("alpha", "rank_pattern", "alpha_pattern"), "IA3": ("r", "alpha", "rank_pattern", "alpha_pattern")}

_KEPT = ("base_model_name_or_path", "task_type", "fan_in_fan_out", "revision")  # what a rewrite does not change

_TYPES = {"lora": "LORA", "dora": "LORA", "loha": "LOHA", "lokr": "LOKR", "oft-in": "OFT", "ia3": "IA3"}


def _pattern(patterns: Mapping[str, Any] | None, name: str) -> Any:
    """The value of the first pattern that matches a module name, as PEFT's get_pattern_key does it; None without one."""
    for pattern, value in (patterns or {}).items():
        if re.match(rf"(.*\.)?({pattern})$", name):
            return value
    return None


def sound(config: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """(the config without values of rank and alpha that cannot be, a message for each of them)."""
    kept, problems = dict(config), []
    rotation = config.get("peft_type") in ("OFT", "BOFT", "HRA")  # r = 0: the blocks are given by their size
    whole = ("a whole number", _is_number) if rotation else ("a whole number above 0", _is_rank)
    fields = {"r": whole, "lora_alpha": ("a number", _is_number), "alpha": ("a number", _is_number)}
    for field, (expected, fits) in fields.items():
        value = config.get(field)
        if value is not None and not fits(value):
            problems.append(f"{field} is {value!r}, expected {expected}")
            del kept[field]
    for field in ("use_rslora", "use_dora", "lora_bias", "fan_in_fan_out"):
        if not isinstance(config.get(field, False), bool | None):
            problems.append(f"{field} is {config[field]!r}, expected true or false")
            del kept[field]
    for field, fits in (("rank_pattern", _is_rank), ("alpha_pattern", _is_number)):
        patterns = config.get(field) or {}
        if not isinstance(patterns, dict):
            patterns, kept[field] = {}, {}
            problems.append(f"{field} is {config[field]!r}, expected an object of patterns")
        wrong = {pattern: value for pattern, value in patterns.items() if not fits(value) or not _is_pattern(pattern)}
        problems += [f"{field} has {pattern!r}: {value!r}, expected a regular expression and a number" for pattern, value in wrong.items()]
        if wrong:
            kept[field] = {pattern: value for pattern, value in patterns.items() if pattern not in wrong}
    return kept, problems


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 1e30 and not math.isnan(value)


def _is_rank(value: Any) -> bool:
    return _is_number(value) and value > 0 and float(value).is_integer()


def _is_pattern(text: str) -> bool:
    """A regular expression that cannot take forever: nothing unbounded is repeated without bound."""
    try:
        re.compile(text)
    except (re.error, RecursionError, OverflowError):
        return False
    return len(text) < 1000 and not _NESTED.search(_CLASS.sub("x", text))


def rank_of(config: Mapping[str, Any], name: str) -> int | None:
    """The rank the config gives a module."""
    value = _pattern(config.get("rank_pattern"), name)
    value = config.get("r") if value is None else value
    return int(value) if value is not None else None


def alpha_of(config: Mapping[str, Any], name: str, rank: int | None) -> float | None:
    """The alpha whose quotient by the rank is the scale PEFT uses: rsLoRA's alpha / sqrt(r) is resolved here, once."""
    value = _pattern(config.get("alpha_pattern"), name)
    if value is None:
        value = config.get("lora_alpha", config.get("alpha"))
    if value is None:
        return None
    return float(value) * (math.sqrt(rank) if config.get("use_rslora") and rank else 1.0)


def options_of(config: Mapping[str, Any], name: str, rank: int | None) -> dict[str, Any]:
    """What the config says that tensors cannot: how PEFT scales LoKr, which Cayley transform OFT uses, IA3's feed-forward modules."""
    kind = config.get("peft_type")
    if kind == "LOKR":
        return {"always_scale": True, "rank": rank_of(config, name) or rank}
    if kind == "OFT":
        names = ("use_cayley_neumann", "num_cayley_neumann_terms", "block_share", "coft", "eps")
        return {field: config[field] for field in names if field in config}
    if kind == "IA3":
        feedforward = config.get("feedforward_modules") or []
        listed = [feedforward] if isinstance(feedforward, str) else feedforward
        return {"feedforward": any(name == entry or name.endswith("." + entry) for entry in listed)}
    return {}


# Every field of PEFT 0.21's LoraConfig, LoHaConfig, LoKrConfig, OFTConfig and IA3Config, and some of older releases. Any other one
# may change what the tensors mean, so a file that sets it is refused.
KNOWN = frozenset({
    "alora_invocation_tokens", "alpha", "alpha_pattern", "arrow_config", "auto_mapping", "base_model_name_or_path", "bias", "block_share",
    "coft", "corda_config", "decompose_both", "decompose_factor", "enable_lora", "ensure_weight_tying", "eps", "eva_config",
    "exclude_modules", "fan_in_fan_out", "feedforward_modules", "inference_mode", "init_ia3_weights", "init_lora_weights", "init_weights",
    "is_prompt_learning", "kasa_config", "layer_replication", "layers_pattern", "layers_to_transform", "loftq_config", "lora_alpha",
    "lora_bias", "lora_dropout", "lora_ga_config", "megatron_config", "megatron_core", "merge_weights", "model_type", "module_dropout",
    "modules_to_save", "monteclora_config", "num_cayley_neumann_terms", "oft_block_size", "peft_type", "peft_version",
    "qalora_group_size", "r", "rank_dropout", "rank_dropout_scale", "rank_pattern", "revision", "runtime_config", "target_modules",
    "target_parameters", "task_type", "trainable_token_indices", "use_bdlora", "use_cayley_neumann", "use_dora", "use_effective_conv2d",
    "use_qalora", "use_rslora", "velora_config",
})  # fmt: skip


def residual_init(config: Mapping[str, Any]) -> str | None:
    """The initialisation that took a part of the base into the adapter (PiSSA, …), as the config says it; None for all others."""
    init = config.get("init_lora_weights")
    return f"init_lora_weights = {init!r}" if isinstance(init, str) and init.lower().startswith(RESIDUAL_INITS) else None


def complaints(config: Mapping[str, Any]) -> list[tuple[str, str]]:
    """(severity, message) for fields that make the tensors mean something else."""
    found = [
        ("error", f"adapter_config.json sets {field} = {config[field]!r}, which {what}; that is not handled")
        for field, what in UNSUPPORTED.items()
        if config.get(field)
    ]
    kind = config.get("peft_type")
    found += [
        ("error", f"adapter_config.json sets {field} = {config[field]!r}, a field not known here: it may change what the tensors mean")
        for field in sorted(config.keys() - KNOWN - UNSUPPORTED.keys())
        if kind is not None and config[field]
    ]
    if kind is not None and kind not in _TYPES.values():
        found.append(("error", f"peft_type {kind!r} is not supported; {', '.join(dict.fromkeys(_TYPES.values()))} are"))
    init = residual_init(config)
    if init is not None:
        found.append(("warning", f"{init} changed the base model: on the original base this adapter is wrong"))
    if config.get("bias") not in (None, "none"):
        found.append(("warning", f"bias = {config['bias']!r}: trained biases of the base are replacements, not deltas"))
    return found


def render(modules: Mapping[str, Module], site_names: Iterable[str], *, kind: str, alphas: Mapping[str, float]) -> dict[str, Any]:
    """A minimal valid config for these modules.

    modules: PEFT module name → Module; site_names: every module name of the model as far as known (normal forms of suffix
    collisions are avoided with it); alphas: module name → the alpha to record. Names are written in full, anchored and escaped.
    Raises UnsupportedError for factors of LoKr and LoHa whose shapes no config describes.
    """
    ranks = {name: rank for name, module in modules.items() if (rank := rank_written(module))}
    rank = Counter(ranks.values()).most_common(1)[0][0] if ranks else 1
    alpha = Counter(alphas.values()).most_common(1)[0][0] if alphas else float(rank)
    config: dict[str, Any] = {"peft_type": _TYPES[kind], "r": rank}
    config["lora_alpha" if _TYPES[kind] == "LORA" else "alpha"] = _number(alpha)
    config["rank_pattern"] = {_anchored(name): value for name, value in sorted(ranks.items()) if value != rank}
    config["alpha_pattern"] = {_anchored(name): _number(value) for name, value in sorted(alphas.items()) if value != alpha}
    config["target_modules"] = _targets(sorted(modules), site_names)
    if _TYPES[kind] == "LORA":
        config["use_dora"] = kind == "dora"
        config["use_rslora"] = False
        config["lora_bias"] = any("bias" in module.factors for module in modules.values())
        config["bias"] = "none"
        config["fan_in_fan_out"] = False
        config["init_lora_weights"] = True
    if kind == "lokr":
        config.update(peft_lycoris.lokr_fields(modules, ranks))
    if kind == "loha":
        config.update(peft_lycoris.loha_fields(modules))
    if _TYPES[kind] == "OFT":
        sizes = {module.block_size for module in modules.values() if isinstance(module, InputOft)}
        if len(sizes) > 1:
            raise UnsupportedError(f"PEFT has one oft_block_size for all modules, not {', '.join(map(str, sorted(sizes)))}")
        config.update({**next(iter(modules.values())).options, "r": 0, "oft_block_size": sizes.pop()})
    if _TYPES[kind] == "IA3":
        config["feedforward_modules"] = sorted(name for name, module in modules.items() if module.options.get("feedforward"))
    for field in _FOREIGN_TO.get(_TYPES[kind], ()):
        del config[field]
    config.update({"inference_mode": True, "base_model_name_or_path": None, "task_type": None})
    return config


def rank_written(module: Module) -> int | None:
    """The rank PEFT is told: that of the factors, or for two whole factors of a LoKr the one its alpha was set for."""
    return module.rank or module.options.get("rank")


def part_of(config: Mapping[str, Any] | None, folder: str) -> Mapping[str, Any]:
    """The config of one component: nested by folder where a file has several, {} where there is none."""
    nested = (config or {}).get(folder)
    return nested if isinstance(nested, dict) else config or {}


def config_for(modules: Mapping[str, Module], known: Iterable[str], previous: Mapping[str, Any], dialect: str) -> dict[str, Any]:
    """The config of one component from its modules as they are written.

    modules: PEFT module name → Module; known: every module name of the model; previous: the config this one replaces, of which it
    keeps which base it belongs to. Raises UnsupportedError where the modules are of several kinds: PEFT has one type a file.
    """
    additive = {name: module for name, module in modules.items() if not isinstance(module, Dense)}
    kinds = {module.kind for module in additive.values()}
    if len(kinds) > 1:
        shown = [f"{name}: {module.kind}" for name, module in additive.items()]
        raise UnsupportedError(f"{dialect} holds one kind of module per component, not {', '.join(sorted(kinds))}", details=shown)
    ranks = {name: rank for name, module in additive.items() if (rank := rank_written(module))}
    alphas = {name: float(rank if (alpha := additive[name].alpha) is None else alpha) for name, rank in ranks.items()}
    config = render(additive, known, kind=next(iter(kinds), "lora"), alphas=alphas)
    config.update({name: previous[name] for name in _KEPT if name in previous})
    saved = sorted(name for name, module in modules.items() if isinstance(module, Dense))
    return {**config, "modules_to_save": saved or None}


def _targets(names: list[str], site_names: Iterable[str]) -> list[str] | str:
    """Full names; as one regular expression where PEFT's suffix match would also hit a module that has no adapter."""
    wanted = set(names)
    suffixes = {"." + name for name in names}
    if any(other not in wanted and other.endswith(suffix) for other in site_names for suffix in suffixes if "." not in suffix[1:]):
        return "^(" + "|".join(_escaped(name) for name in names) + ")$"
    return [name.removeprefix(_CLIP) for name in names]  # PEFT matches the end of a name


def _anchored(name: str) -> str:
    return "^" + _escaped(name)


def _escaped(name: str) -> str:
    return rf"(?:{re.escape(_CLIP)})?{re.escape(name.removeprefix(_CLIP))}" if name.startswith(_CLIP) else re.escape(name)


def _number(value: float) -> float | int:
    return int(value) if float(value).is_integer() else value
