"""merge: adapters into a base checkpoint of any layout, streamed.

    W' = round(W + Σ weight · ΔW)

Everything that headers can tell is checked first and reported at once; then every tensor is copied, or computed in blocks of rows,
in the base's own order; nothing has its name before all of it is written (and, with `verify`, read back and checked).
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from loratools.errors import UsageError
from loratools.mapping.dialects import DIALECTS
from loratools.mapping.selection import BlockWeights, Rules, Selection, read_block_weights
from loratools.operations.merging import lineage
from loratools.operations.merging.arithmetic import Sums
from loratools.operations.merging.folder import aside, extra_files, texts
from loratools.operations.merging.plan import MergePlan, prepare
from loratools.operations.merging.residual import PlannedResidual, Residual, residual_of, residual_plan, residual_told
from loratools.operations.merging.storage import Rounding
from loratools.operations.merging.verify import Verification, verify_merge
from loratools.operations.merging.work import Work, work_of
from loratools.operations.meter import Meter
from loratools.operations.save import write_adapter
from loratools.tensors.checkpoint import write_checkpoint
from loratools.tensors.dtypes import dtype_named
from loratools.tensors.writer import write_text_file

SHOWN = 5  # tensors named as the worst


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
    meter = Meter()
    if not adapters:
        raise UsageError("no adapter to merge", fix="loratools merge BASE ADAPTER OUT")
    blocks = read_block_weights(Path(block_weights)) if block_weights is not None else None
    selection = Selection(tuple(component), tuple(include), tuple(exclude), blocks)
    beside = [Path(path) for path in (residual, report) if path is not None]
    given = [(Path(path), weight) for path, weight in adapters]
    plan = prepare(Path(base), given, Path(output), selection=selection, arch=arch, alpha=alpha, force=force, beside=beside)
    plan.warnings += aside(plan, Path(output))
    if residual is not None:
        _check_residual_name(plan, Path(residual))
    wanted = dtype_named(dtype)
    work = work_of(plan, wanted, Rounding(rounding == "stochastic", seed))
    if dry_run:
        told = _result(plan, work, Path(base), Path(output))
        return {**told, **meter.read(), "plan": {"tensors": told["tensors"], "bytes": work.nbytes}}
    options = {"component": component, "include": include, "exclude": exclude, "dtype": wanted, "arch": arch, "alpha": alpha,
               "rounding": rounding if rounding != "nearest" else None, "seed": seed or None,
               "block_weights": _told(blocks) if blocks else None}  # fmt: skip
    record = _record(plan, {name: value for name, value in options.items() if value}, hash_base)
    finish = _Finish(plan, work, verify, residual is not None, threads or len(os.sched_getaffinity(0)))
    write_checkpoint(
        plan.layout,
        Path(output),
        replaced=work.replaced,
        added=work.added,
        metadata=lambda old: lineage.merged_metadata(old, record),
        texts=texts(plan, wanted),
        extra_files=extra_files(plan),
        force=force,
        threads=finish.threads,
        check=finish,
        progress=(lambda done: progress(done, work.nbytes)) if progress else None,
    )
    result = _result(plan, work, Path(base), Path(output))
    if finish.verification is not None:
        result["verify"] = finish.verification.as_json()
    if residual is not None:
        result["residual"] = finish.write_residual(Path(residual), force)
        if result["residual"]["path"] is None:
            result["warnings"].append("residual: rounding took nothing, so there is none and no file was written")
    result |= meter.read()
    if report is not None:
        write_text_file(report, json.dumps({**result, "tensors_changed": _rows(work)}, indent=2) + "\n", force=force)
    return result


@dataclass
class _Finish:
    """What is done with the output once it is complete and before it has its name: what fails here leaves none."""

    plan: MergePlan
    work: Work
    verify: bool
    residual: bool
    threads: int
    verification: Verification | None = None
    loss: Residual = field(default_factory=Residual)
    planned: PlannedResidual | None = None

    def __call__(self, path: Path) -> None:
        if self.verify:
            self.verification = verify_merge(self.plan, path, self.work.made, self.threads)
        if self.residual:
            self.loss = residual_of(self.plan, path, self.work.tensors, self.threads)
            self.planned = residual_plan(self.plan, self.loss)  # before the rename: a dialect may have no name for a site

    def write_residual(self, path: Path, force: bool) -> dict[str, Any]:
        """The residual's own file, where rounding took anything; what it gives back."""
        if self.planned is not None:
            adapter, architecture, made = self.planned
            write_adapter(adapter, architecture, made, made.tensors, path, force=force)
        return residual_told(self.loss, path, self.work.tensors)


def _check_residual_name(plan: MergePlan, path: Path) -> None:
    """A residual is written in the dialect of the adapter named first, and for PEFT that is a folder."""
    dialect = DIALECTS[next(one for one in plan.given if one.position == 0).adapter.dialect]
    if dialect.folder and path.suffix in (".safetensors", ".pt", ".bin"):
        fix = f"--residual {path.with_suffix('.' + dialect.name)}"
        raise UsageError(f"{path}: {dialect.name}, the dialect of the first adapter, is a folder, this is the name of a file", fix=fix)


def _told(blocks: BlockWeights) -> dict[str, Any]:
    """A file of block weights as its keys, defaults left out: what a record can hold without a path or a comment of its writer."""
    tables = {name: _rules(rules) for name, rules in blocks.adapters.items()}
    return {**_rules(blocks.rules), **({"adapters": tables} if tables else {})}


def _rules(rules: Rules) -> dict[str, Any]:
    return {key: value for key, value in asdict(rules).items() if value != getattr(Rules(), key)}


def _record(plan: MergePlan, options: Mapping[str, Any], whole: bool) -> dict[str, Any]:
    adapters = [{"name": lineage.text(one.name), "weight": one.weight, "sha256": one.digest} for one in plan.given]
    return lineage.record_of(plan.source, adapters, options, whole=whole)


def _rows(work: Work) -> list[dict[str, Any]]:
    return [_row(name, tensor.tally.total) for name, tensor in work.tensors.items()]


def _row(name: str, sums: Sums) -> dict[str, Any]:
    return {"tensor": name, "delta_retained": sums.delta_retained, "relative_error": sums.relative_error}


def _result(plan: MergePlan, work: Work, base: Path, output: Path) -> dict[str, Any]:
    sums = {name: tensor.tally.total for name, tensor in work.tensors.items()}
    total = sum(sums.values(), start=Sums())
    worst = sorted((name for name in sums if sums[name].delta), key=lambda name: sums[name].delta_retained)
    count = len(plan.source.tensors) + len(work.added)
    regions = [region for regions in plan.placement.regions.values() for region in regions]
    nothing = any(tensor.tally.blocks for tensor in work.tensors.values()) and not total.delta
    return {
        "base": str(base),
        "output": str(output),
        "adapters": [
            {"path": str(one.path), "weight": one.weight, "dialect": one.adapter.dialect, "architecture": one.architecture.published}
            for one in sorted(plan.given, key=lambda one: one.position)
        ],
        "tensors": count,
        "changed": len(work.tensors),
        "unchanged": count - len(work.tensors),
        "cast": len(work.cast),
        "unmatched": [],
        "sites": len({region.site for region in regions if region.role == "weight"}),
        "delta_retained": total.delta_retained if total.delta else None,
        "relative_error": total.relative_error if total.delta else None,
        "worst": [_row(name, sums[name]) for name in worst[:SHOWN]],
        "left_out": [{"path": str(path), "reason": reason} for path, reason in plan.layout.left_out],
        "warnings": [*plan.warnings, *(["the adapters change nothing: every delta, weights included, is 0"] if nothing else [])],
    }
