"""What is told about a resized adapter: the JSON object of the command."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from loratools.adapters.adapter import Adapter, Module
from loratools.adapters.sums import low_rank
from loratools.errors import counted
from loratools.mapping.dialects import DIALECTS
from loratools.mapping.loaders import Loader
from loratools.mapping.read import Reading
from loratools.operations.combining.recompress import Fit
from loratools.operations.resizing.modules import Resized, lora_rank
from loratools.tensors.writer import kept_aside

WORST = 5  # rows of the sites that are furthest off


def told(
    reading: Reading, adapter: Adapter, made: Sequence[Resized], out: Path, loader: Loader | None, *, done: bool = True
) -> dict[str, Any]:
    """The JSON object. made: of every entry of the adapter; done: False for a plan, whose errors are not known."""
    pairs = list(zip(adapter.entries, made, strict=True))
    after = ranks(one.module for one in made)
    off = [(str(entry.sites[0]), one) for entry, one in pairs if one.fit is not None and one.fit.error]
    ranked = sorted(off, key=lambda item: (-(item[1].fit or Fit(0, 0)).relative_error, item[0]))[:WORST]
    return {
        "input": str(reading.source.path),
        "output": str(out),
        "dialect": adapter.dialect,
        "architecture": adapter.architecture,
        "sites": len({site for entry in adapter.entries for site in entry.sites}),
        "modules": len(made),
        "changed": sum(entry.module is not one.module for entry, one in pairs),
        "ranks_before": ranks(entry.module for entry in adapter.entries),
        "ranks_after": after,
        "relative_error": _whole(made).relative_error if done else None,
        "worst": [
            {"site": site, "rank": one.module.rank, "relative_error": one.fit.relative_error} for site, one in ranked if one.fit is not None
        ],
        "warnings": [
            *_warnings(reading, adapter, out),
            *_grown([(entry.module, one.module) for entry, one in pairs]),
            *_setting(loader, after),
            *_untaken(loader, adapter),
        ],
    }


def ranks(modules: Iterable[Module]) -> dict[str, int]:
    """Rank of the exact LoRA → number of modules."""
    count = Counter(lora_rank(module) for module in modules if low_rank(module))
    return {str(rank): count[rank] for rank in sorted(count)}


def _whole(made: Sequence[Resized]) -> Fit:
    """√(Σ‖error‖² / Σ‖ΔW‖²) over all modules, full deltas and norms among them."""
    fits = [one.fit for one in made if one.fit is not None]
    return Fit(math.fsum(fit.error for fit in fits), math.fsum(fit.norm for fit in fits))


def _warnings(reading: Reading, adapter: Adapter, out: Path) -> list[str]:
    found = [finding.message for finding in reading.findings if finding.severity == "warning"]
    dense = sum(not low_rank(entry.module) for entry in adapter.entries)
    if dense:
        found.append(f"{counted(dense, 'module')} without a rank (full deltas, norms, biases): kept")
    aside = kept_aside(out) if DIALECTS[adapter.dialect].folder else None
    if aside is not None:
        found.append(f"{out} holds other files than an adapter's: the old folder is kept as {aside.name}")
    return found


def _grown(pairs: Sequence[tuple[Module, Module]]) -> list[str]:
    grown = sum(before.kind in ("loha", "lokr") and _nbytes(after) > _nbytes(before) for before, after in pairs)
    return [f"{counted(grown, 'LoHa or LoKr module')} take more room as LoRA than before"] if grown else []


def _nbytes(module: Module) -> int:
    return sum(tensor.nbytes for tensor in module.factors.values())


def _untaken(loader: Loader | None, adapter: Adapter) -> list[str]:
    """What a loader that reads a PEFT folder of plain LoRA will not apply, or not even load."""
    if loader is None or not loader.uniform:
        return []
    dense = sum(not low_rank(entry.module) for entry in adapter.entries)
    found = [f"{loader.title} takes plain LoRA alone: not {counted(dense, 'module')} without a rank in the output"] if dense else []
    if not DIALECTS[adapter.dialect].folder:
        found.append(f"{loader.title} reads PEFT folders, this is {adapter.dialect}: loratools convert OUT --to peft makes one")
    return found


def _setting(loader: Loader | None, after: dict[str, int]) -> list[str]:
    if loader is None or not loader.settings or not after:
        return []
    most = max(map(int, after))
    return [f"{loader.name} has to be started with {loader.option} {loader.setting(most)} or more"]
