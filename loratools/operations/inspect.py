"""inspect: what is this file? From the header alone, unless values are asked for.

Says what a file is even when nothing else will take it: unknown, ambiguous and broken adapters are described with their problems.
Only a container that cannot be read raises.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from loratools.adapters.adapter import Entry, Module, NotExact
from loratools.adapters.kinds.common import Scaled
from loratools.errors import MalformedError
from loratools.mapping.checkpoints import identify
from loratools.mapping.detect import Detection
from loratools.mapping.read import Reading, adapter_keys, analyse, is_adapter
from loratools.operations.values import value_findings
from loratools.report import Finding
from loratools.tensors.finite import first_not_finite
from loratools.tensors.hashes import sha256_file, sshs_legacy_hash, sshs_model_hash, stored_hash_problems
from loratools.tensors.lazy import LazyTensor
from loratools.tensors.metadata import trigger_words
from loratools.tensors.privacy import private_values
from loratools.tensors.reader import TensorSource, open_source

# Files that only a training state has, in diffusers/accelerate, kohya and Trainer folders.
_STATE_FILES = (
    "optimizer.bin",
    "optimizer.pt",
    "scheduler.bin",
    "scheduler.pt",
    "random_states_0.pkl",
    "train_state.json",
    "trainer_state.json",
)


def inspect(
    path: Path | str,
    *,
    modules: bool = False,
    spectrum: bool = False,
    hashes: bool = False,
    check: bool = False,
    arch: str | None = None,
    alpha: float | None = None,
) -> dict[str, Any]:
    """Describe a file or folder as the JSON object of the command.

    modules: list every module; spectrum: norms and singular values, from the factors; hashes: sha256 and sshs hashes;
    check: read the values (NaN, Inf, dead factors, stored hashes); arch, alpha: as for reading.
    Raises MalformedError and its kin for a container that cannot be read, UsageError for an unknown `arch`.
    """
    path = Path(path)
    state = _training_state(path)
    if state is not None:
        return state
    source = open_source(path)
    reading = analyse(source, arch=arch, alpha=alpha)
    detection = reading.detection
    result = _identity(source, detection)
    findings = list(map(_as_told, reading.findings)) if result["kind"] == "adapter" else list(source.warnings)
    if result["kind"] == "adapter":
        result["adapter"] = _adapter_facts(reading)
        if modules or spectrum:
            result["modules"] = _module_rows(reading, spectrum)
    elif result["kind"] == "checkpoint":
        result["checkpoint"] = _checkpoint_facts(source, result)
        inside = adapter_keys(detection)
        if inside:
            told = f"{len(inside)} adapter keys inside a checkpoint: {inside[0]} …"
            findings.append(Finding("warning", "adapter-inside", inside[0], told))
    findings += [Finding("warning", "private-metadata", key, f"{key} {reason}") for key, reason in private_values(source.metadata)]
    if check:
        findings += value_findings(source.tensors, reading.adapter if result["kind"] == "adapter" else None)
        findings += [finding for file in _safetensors(source) for finding in stored_hash_problems(file, source.metadata)]
    result["problems"] = [finding.as_json() for finding in findings]
    if hashes:
        result["hashes"] = _hashes(source)
    return result


def _as_told(finding: Finding) -> Finding:
    """A finding as it weighs for somebody who asks about the file: names no loader finds are read here, and still an error."""
    return replace(finding, severity="error") if finding.code == "wrapper-debris" else finding


def _identity(source: TensorSource, detection: Detection) -> dict[str, Any]:
    """What the file is, before any detail."""
    kind = _kind(source, detection)
    best = detection.best
    settled = best is not None and not detection.ambiguous and kind == "adapter"
    candidates = [*detection.candidates, *detection.others][:6] if kind == "adapter" else []
    unknown = detection.unknown_keys if kind == "adapter" else []
    return {
        "path": str(source.path),
        "kind": kind,
        "container": source.container,
        "dialect": ("cloneofsimo" if detection.positional else detection.dialect) if kind == "adapter" else None,
        "architecture": best.architecture.published if settled and best else ("sd1" if detection.positional else None),
        "variant": best.variant or None if settled and best else None,
        "ambiguous": kind == "adapter" and detection.ambiguous,
        "candidates": [candidate.as_json() for candidate in candidates],
        "metadata": _metadata(source),
        "trigger_words": trigger_words(source.metadata),
        "unknown_keys": [] if detection.positional else unknown,
        "problems": [],
        "bytes": source.nbytes,
    }


def _kind(source: TensorSource, detection: Detection) -> str:
    """An adapter has adapter keys, and at least as many of them as plain weights; a checkpoint is mostly weights and biases."""
    if is_adapter(source, detection):
        return "adapter"
    weights = sum(key.endswith((".weight", ".bias")) for key in source.tensors)
    return "checkpoint" if weights and weights * 2 >= len(source.tensors) else "unknown"


def _metadata(source: TensorSource) -> dict[str, Any]:
    found: dict[str, Any] = dict(source.metadata)
    if source.config is not None:
        found["adapter_config.json"] = source.config
    return found


# ----------------------------------------------------------------------------------------------------------------- adapters


def _entries(reading: Reading) -> list[tuple[str, str | None, Module, tuple[LazyTensor, ...], Entry | None]]:
    """(name, component, module, its tensors, entry) of every module, named or not."""
    if reading.adapter is not None:
        return [
            (site_name(entry), entry.component, entry.module, tuple(entry.module.factors.values()), entry)
            for entry in reading.adapter.entries
        ]
    return [
        (name, None, module, tuple(module.factors.values()), None) for name, found in reading.detection.modules.items() for module in found
    ]


def site_name(entry: Entry) -> str:
    """A module's sites in one word: the parts of a fused one are joined by `|`."""
    first, *rest = (str(site) for site in entry.sites)
    parent = first.rpartition(".")[0] + "."
    return "|".join([first, *(name.removeprefix(parent) for name in rest)])


def _divides(module: Module) -> bool:
    """Is alpha divided by something here? By the rank, or by what PEFT's config says of a LoKr of two full factors."""
    return bool(module.divisor if isinstance(module, Scaled) else module.rank)


def _adapter_facts(reading: Reading) -> dict[str, Any]:
    entries = _entries(reading)
    kinds, components, ranks, alphas = Counter[str](), Counter[str](), Counter[str](), Counter[str]()
    sources: Counter[str] = Counter()
    dtypes: Counter[str] = Counter()
    parameters = 0
    for _, component, module, tensors, _ in entries:
        kinds[module.kind] += 1
        components[component or "unknown"] += 1
        if module.rank:
            ranks[str(module.rank)] += 1
        if module.alpha is not None and _divides(module):
            alphas[f"{module.alpha:g}"] += 1
        if _divides(module):
            sources[module.alpha_source if module.alpha is not None else "assumed"] += 1
        dtypes.update(tensor.dtype for tensor in tensors)
        parameters += sum(tensor.numel for role, tensor in module.factors.items() if role not in ("alpha", "on_input"))
    return {
        "modules": len(entries),
        "parameters": parameters,
        "kinds": dict(kinds.most_common()),
        "components": dict(components),
        "ranks": dict(ranks.most_common()),
        "alphas": dict(alphas.most_common()),
        "alpha_source": sources.most_common(1)[0][0] if sources else "assumed",
        "dtypes": dict(dtypes.most_common()),
    }


def _module_rows(reading: Reading, spectrum: bool) -> list[dict[str, Any]]:
    rows = []
    for name, component, module, tensors, entry in _entries(reading):
        row: dict[str, Any] = {
            "site": name,
            "component": component,
            "kind": module.kind,
            "rank": module.rank,
            "alpha": module.alpha,
            "scale": module.scale,
            "shape": list(module.shape),
            "dtype": Counter(tensor.dtype for tensor in tensors).most_common(1)[0][0],
            "keys": list(entry.keys.values()) if entry else [],
        }
        if spectrum:
            row.update(_spectrum(module))
        rows.append(row)
    return rows


def _spectrum(module: Module) -> Mapping[str, Any]:
    """Frobenius norm and singular values of ΔW from the factors; None where a kind needs the base weight or a module is broken.

    Stable rank is Σσ² / σ₁²; effective rank is exp(entropy of σ² / Σσ²) (Roy & Vetterli, 2007).
    """
    import torch

    nothing = {"delta_norm": None, "singular_values": None, "stable_rank": None, "effective_rank": None}
    broken = any(severity == "error" for severity, _, _ in module.problems())
    if broken or any(map(first_not_finite, module.factors.values())):
        return nothing
    try:
        values = module.singular_values().to(torch.float64)
    except NotExact:
        return nothing
    energy = values.square()
    total = float(energy.sum())
    shares = energy[energy > 0] / total if total else energy[:0]
    return {
        "delta_norm": total**0.5,
        "singular_values": [float(value) for value in values[: module.rank or 64]],
        "stable_rank": total / float(energy.max()) if total else 0.0,
        "effective_rank": float(torch.exp(-(shares * shares.log()).sum())) if total else 0.0,
    }


# -------------------------------------------------------------------------------------------------------------- checkpoints


def _checkpoint_facts(source: TensorSource, result: dict[str, Any]) -> dict[str, Any]:
    """Layout, components and sizes; fills in the architecture where the names settle it."""
    guess = identify({name: tensor.shape for name, tensor in source.tensors.items()})
    names = [architecture.published for architecture, _, _ in guess.candidates]
    if len(set(names)) == 1:
        result["architecture"] = names[0]
        result["variant"] = guess.variant
    result["ambiguous"] = len(set(names)) > 1
    result["candidates"] = [
        {"dialect": None, "architecture": architecture.published, "score": round(score, 4), "evidence": [f"{namespace} names"]}
        for architecture, namespace, score in guess.candidates
    ]
    return {
        "layout": guess.layout,
        "components": guess.components,
        "tensors": len(source.tensors),
        "parameters": sum(tensor.numel for tensor in source.tensors.values()),
        "bytes": source.nbytes,
        "dtypes": dict(Counter(tensor.dtype for tensor in source.tensors.values()).most_common()),
    }


def _training_state(path: Path) -> dict[str, Any] | None:
    """A folder with an optimizer or a random state beside its weights is where a run stopped."""
    if not path.is_dir():
        return None
    found = [name for name in _STATE_FILES if (path / name).is_file()]
    if not found:
        return None
    empty: Mapping[str, Any] = {"dialect": None, "architecture": None, "variant": None, "ambiguous": False, "candidates": []}
    rest: Mapping[str, Any] = {"metadata": {}, "trigger_words": [], "unknown_keys": [], "problems": []}
    return {"path": str(path), "kind": "training-state", "container": "diffusers", **empty, **rest, "state_files": found}


def _safetensors(source: TensorSource) -> list[Path]:
    return [file for file in source.files if file.suffix == ".safetensors"] if source.container in ("safetensors", "peft") else []


def _hashes(source: TensorSource) -> dict[str, str | None]:
    """Of a single file: sha256 of all of it, and sd-scripts' two hashes."""
    if len(source.files) != 1:
        raise MalformedError(f"{source.path}: hashes are those of one file; this is a set of {len(source.files)}")
    file = source.files[0]
    if source.container == "pickle":
        return {"sha256": sha256_file(file), "sshs_model_hash": None, "sshs_legacy_hash": None}
    return {"sha256": sha256_file(file), "sshs_model_hash": sshs_model_hash(file), "sshs_legacy_hash": sshs_legacy_hash(file)}
