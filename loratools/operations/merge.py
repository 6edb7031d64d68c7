"""merge: adapters into a base checkpoint of any layout, streamed.

    W' = round(W + Σ weight · ΔW)

Everything that headers can tell is checked first and reported at once; then every tensor is copied, or computed in blocks of rows,
in the base's own order; nothing has its name before all of it is written (and, with `verify`, read back and checked).
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from loratools.adapters.adapter import Adapter
from loratools.errors import UnsupportedError, UsageError
from loratools.mapping.architectures import Architecture
from loratools.mapping.dialects import DIALECTS
from loratools.mapping.selection import Selection, read_block_weights
from loratools.mapping.write import Plan
from loratools.operations.merging import lineage
from loratools.operations.merging.arithmetic import MergedTensor, Sums
from loratools.operations.merging.plan import FLOATS, MergePlan, prepare, settings_of
from loratools.operations.merging.residual import Residual, residual_of, residual_plan, residual_told
from loratools.operations.merging.storage import Rounding, ScaledStorage, Storage
from loratools.operations.merging.untying import edited_config, json_object
from loratools.operations.merging.verify import Verification, verify_merge
from loratools.operations.save import write_adapter
from loratools.tensors.checkpoint import write_checkpoint
from loratools.tensors.lazy import LazyTensor
from loratools.tensors.quantised import scaled_weights
from loratools.tensors.writer import write_text_file

SHOWN = 5  # tensors named as the worst

# Files of an adapter's folder that belong to a vocabulary it made larger.
_VOCABULARY = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.json", "merges.txt",
    "tokenizer.model", "spiece.model", "chat_template.jinja",
)  # fmt: skip

_CONFIG_DTYPES = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}


def merge(
    base: Path | str,
    adapters: Sequence[tuple[Path | str, float]],
    output: Path | str,
    *,
    component: Sequence[str] = (),
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    block_weights: Path | str | None = None,
    dtype: str | None = None,
    rounding: str = "nearest",
    seed: int = 0,
    residual: Path | str | None = None,
    verify: bool = False,
    report: Path | str | None = None,
    arch: str | None = None,
    alpha: float | None = None,
    hash_base: bool = False,
    threads: int | None = None,
    force: bool = False,
    dry_run: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, Any]:
    """Merge adapters into a base and write the result in the base's layout and dtypes.

    base: a checkpoint file, shards, or a folder; adapters: (path, weight), any dialects and kinds, summed in an order of their own;
    output: a file where the base is one, else a folder; component, include, exclude, block_weights: see `Selection`;
    dtype: safetensors name that all plain floating tensors are cast to; rounding: "nearest" | "stochastic" (seeded by tensor name);
    residual: where to write what rounding took, as a LoRA; verify: read the result back and check it before it gets its name;
    report: where to write the result as JSON, with every tensor; hash_base: record the sha256 of the whole base;
    progress: called with (bytes written, bytes in all).
    Returns the JSON object of the command. Raises UsageError (2), InputError and its children (3), WriteError (1), CheckFailed (4).
    """
    started = time.monotonic()
    if not adapters:
        raise UsageError("no adapter to merge", fix="loratools merge BASE ADAPTER OUT")
    blocks = read_block_weights(Path(block_weights)) if block_weights is not None else None
    selection = Selection(tuple(component), tuple(include), tuple(exclude), blocks)
    beside = [Path(path) for path in (residual, report) if path is not None]
    given = [(Path(path), weight) for path, weight in adapters]
    plan = prepare(Path(base), given, Path(output), selection=selection, arch=arch, alpha=alpha, force=force, beside=beside)
    if residual is not None:
        _check_residual_name(plan, Path(residual))
    work = _work(plan, dtype, Rounding(rounding == "stochastic", seed))
    if dry_run:
        told = _result(plan, work, Path(base), Path(output), given, started, None, None)
        return {**told, "plan": {"tensors": told["tensors"], "bytes": _nbytes(plan, work)}}
    options = {"component": component, "include": include, "exclude": exclude, "dtype": dtype, "arch": arch, "alpha": alpha,
               "rounding": rounding if rounding != "nearest" else None, "seed": seed or None}  # fmt: skip
    record = _record(plan, {name: value for name, value in options.items() if value}, block_weights, hash_base)
    workers = threads or len(os.sched_getaffinity(0))
    outcome, taken, planned = list[Verification](), list[Residual](), list[tuple[Adapter, Architecture, Plan] | None]()

    def check(path: Path) -> None:
        if verify:
            made = {**work.replaced, **{key: tensor for key, (_, tensor) in work.added.items()}}
            outcome.append(verify_merge(plan, path, made, workers))
        if residual is not None:
            taken.append(residual_of(plan, path, work.tensors, workers))
            planned.append(residual_plan(plan, taken[0]))  # before the rename: a dialect may have no name for a site

    write_checkpoint(
        plan.layout,
        Path(output),
        replaced=work.replaced,
        added=work.added,
        metadata=lambda old: lineage.merged_metadata(old, record),
        texts=_texts(plan, dtype),
        extra_files=_extra_files(plan),
        force=force,
        threads=workers,
        check=check,
        progress=(lambda done: progress(done, _nbytes(plan, work))) if progress else None,
    )
    recovered = None
    if residual is not None:
        if planned[0] is not None:
            adapter, architecture, made = planned[0]
            write_adapter(adapter, architecture, made, made.tensors, Path(residual), force=force)
        recovered = residual_told(taken[0], Path(residual), work.tensors)
    result = _result(plan, work, Path(base), Path(output), given, started, outcome[0] if outcome else None, recovered)
    if report is not None:
        write_text_file(report, json.dumps({**result, "tensors_changed": _rows(work)}, indent=2) + "\n", force=force)
    return result


def _check_residual_name(plan: MergePlan, path: Path) -> None:
    """A residual is written in the dialect of the adapter named first, and for PEFT that is a folder."""
    dialect = DIALECTS[next(one for one in plan.given if one.position == 0).adapter.dialect]
    if dialect.folder and path.suffix in (".safetensors", ".pt", ".bin"):
        fix = f"--residual {path.with_suffix('.' + dialect.name)}"
        raise UsageError(f"{path}: {dialect.name}, the dialect of the first adapter, is a folder, this is the name of a file", fix=fix)


@dataclass
class _Work:
    """The tensors a merge makes. tensors: those the adapters change; replaced and added: as the writer takes them."""

    tensors: dict[str, MergedTensor] = field(default_factory=dict)
    replaced: dict[str, LazyTensor] = field(default_factory=dict)
    added: dict[str, tuple[Path, LazyTensor]] = field(default_factory=dict)
    cast: list[str] = field(default_factory=list)  # of the unchanged ones, those whose dtype alone is another


def _work(plan: MergePlan, dtype: str | None, rounding: Rounding) -> _Work:
    """Every tensor that will differ from the base's, described; nothing is computed yet."""
    work, source = _Work(), plan.source.tensors
    config = settings_of(plan.config)
    scales = scaled_weights(source, config, plan.source.metadata)
    if scales and dtype is not None:
        raise UnsupportedError("--dtype: the weights are fp8 codes with scales, which would have to be taken out", details=list(scales)[:8])
    for key, regions in plan.placement.regions.items():
        base = plan.base_of(regions[0]) if regions else next(iter(plan.bases.values()))
        stored = key if key in source else (base.embedding or key)
        storage: Storage
        if stored in scales:
            storage = ScaledStorage(key, source[stored], scales[stored], source[scales[stored].scale], rounding)
            work.replaced[scales[stored].scale] = storage.scale_tensor
        else:
            wanted = dtype if dtype is not None and source[stored].dtype in FLOATS else source[stored].dtype
            storage = Storage(key, source[stored], wanted, plan.placement.grown.get(key, source[stored].shape), rounding)
        tensor = MergedTensor(key, storage, regions, base)
        work.tensors[key] = tensor
        if key in source:
            work.replaced[key] = tensor
        else:
            work.added[key] = (plan.layout.weights[plan.source.file_of[stored]], tensor)
    for key, plain in source.items() if dtype is not None else ():
        if key not in work.replaced and plain.dtype in FLOATS and plain.dtype != dtype:
            base = next(iter(plan.bases.values()))
            work.replaced[key] = MergedTensor(key, Storage(key, plain, str(dtype), plain.shape, rounding), [], base)
            work.cast.append(key)
    return work


def _nbytes(plan: MergePlan, work: _Work) -> int:
    """Bytes of everything that will be written: the base's, and what other dtypes and new tensors add to them."""
    grown = sum(tensor.nbytes - plan.source.tensors[key].nbytes for key, tensor in work.replaced.items())
    return plan.layout.nbytes + grown + sum(tensor.nbytes for _, tensor in work.added.values())


def _record(plan: MergePlan, options: Mapping[str, Any], block_weights: Path | str | None, whole: bool) -> dict[str, Any]:
    adapters = [{"name": lineage.text(one.name), "weight": one.weight, "sha256": one.digest} for one in plan.given]
    if block_weights is not None:
        options = {**options, "block_weights": Path(block_weights).read_text("utf-8")}
    return lineage.record_of(plan.source, adapters, options, whole=whole)


def _texts(plan: MergePlan, dtype: str | None) -> dict[Path, str]:
    """Configurations that have to say something else: an untied head, a larger vocabulary, another dtype."""
    if not plan.layout.folder:
        return {}
    found: dict[Path, str] = {}
    root = plan.source.path if plan.source.path.is_dir() else plan.source.path.parent
    for relative in plan.layout.copies:
        if relative.name != "config.json":
            continue
        content = json_object(root / relative)
        values: dict[str, Any] = dict(plan.edits.values) if plan.config == root / relative else {}
        if dtype is not None:
            values |= {key: _CONFIG_DTYPES[dtype] for key in ("torch_dtype", "dtype") if key in content}
        if values:
            found[relative] = edited_config((root / relative).read_text("utf-8"), values)
    return found


def _extra_files(plan: MergePlan) -> dict[Path, Path]:
    """The tokenizer of the adapter that brought new rows of the vocabulary."""
    if "vocab_size" not in plan.edits.values:
        return {}
    folders = [one.path for one in plan.given if one.path.is_dir() and (one.path / "tokenizer_config.json").is_file()]
    return {Path(name): folder / name for folder in folders for name in _VOCABULARY if (folder / name).is_file()}


def _peak_memory() -> float | None:
    """Largest resident memory of this process in MB (VmHWM; getrusage would count that of the parent it was forked from)."""
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:  # no Linux
        return None
    return next((round(int(line.split()[1]) / 1024, 1) for line in lines if line.startswith("VmHWM:")), None)


def _rows(work: _Work) -> list[dict[str, Any]]:
    return [_row(name, tensor.tally.total) for name, tensor in work.tensors.items()]


def _row(name: str, sums: Sums) -> dict[str, Any]:
    return {"tensor": name, "delta_retained": sums.delta_retained, "relative_error": sums.relative_error}


def _result(
    plan: MergePlan,
    work: _Work,
    base: Path,
    output: Path,
    given: Sequence[tuple[Path, float]],
    started: float,
    verification: Verification | None,
    recovered: Mapping[str, Any] | None,
) -> dict[str, Any]:
    sums = {name: tensor.tally.total for name, tensor in work.tensors.items()}
    total = sum(sums.values(), start=Sums())
    count = len(plan.source.tensors) + len(work.added)
    changed = len(work.tensors)
    worst = sorted((name for name in sums if sums[name].delta), key=lambda name: sums[name].delta_retained)
    result: dict[str, Any] = {
        "base": str(base),
        "output": str(output),
        "adapters": [
            {"path": str(one.path), "weight": one.weight, "dialect": one.adapter.dialect, "architecture": one.architecture.published}
            for one in sorted(plan.given, key=lambda one: one.position)
        ],
        "tensors": count,
        "changed": changed,
        "unchanged": count - changed,
        "cast": len(work.cast),
        "unmatched": [],
        "sites": len(
            {(region.site, region.role) for regions in plan.placement.regions.values() for region in regions if region.role == "weight"}
        ),
        "delta_retained": total.delta_retained if total.delta else None,
        "relative_error": total.relative_error if total.delta else None,
        "worst": [_row(name, sums[name]) for name in worst[:SHOWN]],
        "left_out": [{"path": str(path), "reason": reason} for path, reason in plan.layout.left_out],
        "warnings": plan.warnings,
        "seconds": round(time.monotonic() - started, 3),
        "peak_rss_mb": _peak_memory(),
    }
    if any(tensor.tally.blocks for tensor in work.tensors.values()) and not total.delta:
        result["warnings"] = [*result["warnings"], "the adapters change nothing: every delta, weights included, is 0"]
    if verification is not None:
        result["verify"] = verification.as_json()
    if recovered is not None:
        result["residual"] = dict(recovered)
        if recovered["path"] is None:
            result["warnings"] = [*result["warnings"], "residual: rounding took nothing, so there is none and no file was written"]
    return result
