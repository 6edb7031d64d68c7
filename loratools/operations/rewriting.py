"""Other modules in the place of a file's own: the same dialect, the file's own keys, in the file's own order.

A role the file had keeps its key, whatever its spelling; a new one (an alpha, the down of what was a LoHa) is spelled as the module's
form has it, and stands where the module's first tensor stood. A PEFT folder is spelled as PEFT finds it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from loratools.adapters.adapter import Adapter, Entry, Module
from loratools.errors import InputError
from loratools.mapping.architectures import Architecture
from loratools.mapping.dialects import DIALECTS
from loratools.mapping.leaves import COMMON_LEAF, SCHEMES, parse_key
from loratools.mapping.memory import ALPHA
from loratools.mapping.write import Plan, Written, plan
from loratools.report import Report
from loratools.tensors.lazy import LazyTensor


def rewritten(adapter: Adapter, architecture: Architecture, modules: Sequence[Module]) -> tuple[Adapter, Plan]:
    """The adapter (its order with the new keys in it) and what is written, one module for each of its entries.

    Raises UnsupportedError where a PEFT folder cannot hold these modules, InputError where a new key has no spelling.
    """
    pairs = list(zip(adapter.entries, modules, strict=True))
    dialect = DIALECTS[adapter.dialect]
    if dialect.folder:
        entries = tuple(replace(entry, module=module) for entry, module in pairs)
        bare = {key: text for key, text in adapter.metadata.items() if key != ALPHA}  # what it says of alphas is of the former modules
        return adapter, plan(adapter.replace(entries=entries, metadata=bare), architecture, dialect.name)
    written = [Written(entry.sites, entry.name, module, _keys(entry, module), (entry,)) for entry, module in pairs]
    tensors: dict[str, LazyTensor] = {key: one.module.factors[role] for one in written for role, key in one.keys.items()}
    return adapter.replace(order=_order(adapter, written)), Plan(dialect, tensors, written, Report())


def _keys(entry: Entry, module: Module) -> dict[str, str]:
    """role → key: those of the file, and new ones beside them."""
    known = parse_key(next(iter(entry.keys.values())))
    words = {**COMMON_LEAF, **SCHEMES[entry.form.scheme if entry.form and entry.form.scheme in SCHEMES else "kohya"]}
    new = [role for role in module.factors if role not in entry.keys]
    unnamed = [role for role in new if known is None or role not in words]
    if known is None or unnamed:
        raise InputError(f"{entry.sites[0]}: no name for {', '.join(unnamed or module.factors)} beside {next(iter(entry.keys.values()))}")
    return {role: entry.keys.get(role) or f"{known.stem}.{words[role]}" for role in module.factors}


def _order(adapter: Adapter, modules: Sequence[Written]) -> tuple[str, ...]:
    """The file's order without what is gone, the new keys of a module before its first tensor."""
    place = {key: position for position, key in enumerate(adapter.order)}
    kept = {key for one in modules for key in one.keys.values()} | set(adapter.residue)
    new: dict[str, list[str]] = {}
    for one in modules:
        first = min(one.sources[0].keys.values(), key=place.__getitem__)
        new.setdefault(first, []).extend(key for key in one.keys.values() if key not in place)
    return tuple(key for old in adapter.order for key in (*new.get(old, ()), *([old] if old in kept else [])))
