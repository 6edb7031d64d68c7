"""combine: one adapter whose delta is Σ wᵢ ΔWᵢ, from any mix of dialects, ranks and kinds of one architecture.

Exact by concatenation of the factors; with a rank or an energy the best approximation of each module written, through the QR core of the
joined factors, and its error; TIES and DARE on dense deltas, one site at a time. Everything headers can tell is checked before the
first factor is read, and sites are computed in parallel with the same bytes for any number of threads.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from loratools.adapters.adapter import Adapter, Entry
from loratools.adapters.algebra import Criterion, in_parallel
from loratools.adapters.factors import is_float, widest
from loratools.adapters.sums import Combined
from loratools.errors import InputError, LoraToolsError, NotFiniteError, UsageError, counted, worst
from loratools.mapping.dialects import DIALECTS, Dialect
from loratools.mapping.fitting import fit_dtype, narrows
from loratools.mapping.memory import ALPHA, unfolded
from loratools.mapping.read import Reading, tables_of
from loratools.mapping.write import Plan, plan
from loratools.operations.combining.grouping import Input, check, groups
from loratools.operations.combining.recompress import Fit, Recipe, Unit, declared, distance, shrunk, sparse_norm, value
from loratools.operations.combining.request import form_problems, usage_problems
from loratools.operations.combining.result import Job, merged_from, record, told
from loratools.operations.combining.similarity import gram
from loratools.operations.combining.sparsify import DENSITY
from loratools.operations.combining.units import Target, entry_of, one_kind, with_module
from loratools.operations.finite import check_finite
from loratools.operations.inputs import read_together
from loratools.operations.save import write_adapter
from loratools.report import Report
from loratools.tensors.dtypes import dtype_named
from loratools.tensors.lazy import LazyTensor, same_bytes
from loratools.tensors.metadata import lora_adapter_metadata
from loratools.tensors.writer import check_output, output_problems

Made = list[tuple[Entry, list[Combined]]]


def combine(
    adapters: Sequence[tuple[Path | str, float]],
    output: Path | str,
    *,
    rank: int | None = None,
    energy: float | None = None,
    method: str = "sum",
    density: float | None = None,
    to: str | None = None,
    dtype: str | None = None,
    arch: str | None = None,
    alpha: float | None = None,
    base: Path | str | None = None,
    seed: int = 0,
    threads: int | None = None,
    force: bool = False,
    dry_run: bool = False,
) -> dict[str, Any]:
    """Write the weighted sum of adapters as one adapter.

    adapters: (path, weight); a weight of 0 leaves a file out. rank: of every module at most; energy: share of Σσ² kept, 0 < E <= 1;
    neither: exact. method: sum | ties | dare; density: share of entries ties and dare keep (0.5); to: a dialect, None for the first
    input's; dtype: of the factors, None for what holds the sum; arch, alpha, base: as for reading; threads: None for all cores.
    Returns the JSON object of the command. Raises UsageError (2), InputError and its children (3), WriteError (1).
    """
    given = [(Path(path), float(weight)) for path, weight in adapters]
    out, paths = Path(output), [path for path, _ in given]
    recipe = Recipe(method, Criterion(rank, energy), DENSITY if density is None else density, seed)
    problems = list(usage_problems(given, recipe, density, to))
    wanted = None
    try:
        wanted = dtype_named(dtype)
    except UsageError as error:
        problems.append(error)
    problems += output_problems(out, paths, force=force)
    try:
        readings, found = read_together(paths, arch=arch, alpha=alpha, base=Path(base) if base else None)
        target = DIALECTS[to if to in DIALECTS else found[0].dialect]
        problems += form_problems(out, target)
        job = _prepared(given, readings, found, target, recipe, wanted, threads)
    except LoraToolsError as error:
        problems.append(error)
    if problems:
        raise worst(problems)
    return _run(job, out, force, dry_run)


def _prepared(
    given: Sequence[tuple[Path, float]],
    readings: list[Reading],
    adapters: list[Adapter],
    dialect: Dialect,
    recipe: Recipe,
    dtype: str | None,
    threads: int | None,
) -> Job:
    """The job after all checks. Raises the worst of what is wrong, everything listed."""
    first = adapters[0]
    keeps = dialect.alpha in ("tensor", "config")
    inputs = [
        Input(position, path, weight, _own_forms(unfolded(adapter) if keeps else adapter, first.dialect))
        for position, ((path, weight), adapter) in enumerate(zip(given, adapters, strict=True))
        if weight
    ]
    problems = check(inputs)
    residue = _residue(inputs, problems)
    if problems:
        raise worst(problems)
    target = Target.of(tables_of(readings[0]), dialect, first, _dims(adapters))
    made = replace(recipe, dtype=dtype or _new_dtype(inputs), holds=dialect.holds)
    if recipe.method != "sum":
        found = groups(inputs, lambda sites: len(sites) == 1)
    else:
        found = groups(inputs, target.fits if recipe.shrinks else lambda _: True)
    return Job(list(given), readings, inputs, target, made, target.units(found), dtype, residue, threads)


def _dims(adapters: Sequence[Adapter]) -> dict[str, dict[str, int]]:
    """component → widths, of all inputs together; where two know one, the first's."""
    found: dict[str, dict[str, int]] = {}
    for adapter in adapters:
        for component, widths in adapter.dims.items():
            found[component] = {**widths, **found.get(component, {})}
    return found


def _own_forms(adapter: Adapter, dialect: str) -> Adapter:
    """Only the first input's dialect keeps its spelling; a module of another one is spelled anew."""
    if adapter.dialect == dialect:
        return adapter
    return adapter.replace(entries=tuple(replace(entry, form=None) for entry in adapter.entries))


def _residue(inputs: Sequence[Input], problems: list[LoraToolsError]) -> dict[str, LazyTensor]:
    """Tensors of no module (bundled embeddings), from every input; the same bytes once."""
    found: dict[str, tuple[str, LazyTensor]] = {}
    clashes = []
    for given in inputs:
        for key, tensor in given.adapter.residue.items():
            name, other = found.setdefault(key, (given.name, tensor))
            if other is not tensor and not same_bytes(other, tensor):
                clashes.append(f"{key}: of {name} and of {given.name}")
    if clashes:
        text = f"different values under one name: {counted(len(clashes), 'tensor')} of no module"
        problems.append(InputError(text, details=clashes, fix="rename or take out one of them before combining"))
    return {key: tensor for key, (_, tensor) in found.items()}


def _new_dtype(inputs: Sequence[Input]) -> str:
    """The dtype that holds every input's factors; float32 for narrower ones than 16 bits."""
    tensors = [
        tensor for given in inputs for entry in given.adapter.entries for role, tensor in entry.module.factors.items() if role != "alpha"
    ]
    found = widest([tensor for tensor in tensors if is_float(tensor)])
    return found if found in ("F16", "BF16", "F64") else "F32"


# ------------------------------------------------------------------------------------------------------------------------- run


def _run(job: Job, out: Path, force: bool, dry_run: bool) -> dict[str, Any]:
    """Plan from shapes, compute, write, tell."""
    made = list(in_parallel(lambda unit: _declared(job, unit), job.units, job.threads))
    adapter, planned = _planned(job, made)
    tensors = {**planned.tensors, **job.residue}
    nbytes = sum(tensor.nbytes for tensor in tensors.values())
    check_output(out, [path for path, _ in job.given], force, nbytes)
    if dry_run:
        return {**told(job, out, planned), "plan": {"tensors": len(tensors), "bytes": nbytes}}
    check_finite([(item.name, job.readings[item.position].source) for item in job.inputs], job.threads)
    done = list(in_parallel(lambda item: _computed(job, *item), list(zip(job.units, made, strict=True)), job.threads))
    if job.recipe.shrinks:
        adapter, planned = _planned(job, [entries for entries, _ in done])
    grams = list(in_parallel(lambda unit: gram(unit, len(job.given)), job.units, job.threads))
    _write(job, adapter, planned, out, force)
    return told(job, out, planned, grams, [fit for _, fit in done])


def _declared(job: Job, unit: Unit) -> Made:
    """A unit's entries with the modules they will have, or ones of their shapes: enough to know what the dialect refuses."""
    rank = unit.declared_rank(job.recipe)
    return job.target.exact(unit) if rank is None else [(_entry(unit), [declared(unit, job.recipe, rank)])]


def _entry(unit: Unit) -> Entry:
    """The entry of a recompressed unit: its one group's, or the fused parts in their own order."""
    group = unit.present[0]
    return entry_of(group) if len(unit.groups) == 1 else Entry(unit.sites, group.terms[0].module, unit.heights)


def _computed(job: Job, unit: Unit, made: Made) -> tuple[Made, Fit | None]:
    """A unit's entries: shrunk to its rank, or the exact sum. With the error where rank or rounding made one."""
    recipe = job.recipe
    if unit.declared_rank(recipe) is not None:
        found = shrunk(unit, recipe)
        if found is not None:
            return [(_entry(unit), found[0])], found[1]
        made = job.target.exact(unit)
    elif recipe.method != "sum" and unit.shape and all(group.additive for group in unit.present):
        parts, fit = sparse_norm(unit, recipe)
        return [(_entry(unit), parts)], fit
    return made, _rounding(job, unit, made)


def _rounding(job: Job, unit: Unit, made: Made) -> Fit | None:
    """The error of an exact sum whose factors were rounded, to float32 or to the dtype asked for; None where no bit was."""
    parts = [part for _, found in made for part in found]
    if not any(part.rounded or (job.dtype is not None and narrows(part.module, job.dtype)) for part in parts):
        return None
    fits = []
    for group, (_, found) in zip(unit.present, made, strict=True):
        modules = [fit_dtype(part.module, job.dtype, narrow=True) if job.dtype else part.module for part in found]
        if group.additive and group.shape:
            fits.append(distance(value(group.terms), [module for module in modules if module.changes_weight]))
    return Fit(sum(fit.error for fit in fits), sum(fit.norm for fit in fits)) if fits else None


def _planned(job: Job, made: Sequence[Made]) -> tuple[Adapter, Plan]:
    """The combined adapter, with the first input's metadata, and its names and tensors."""
    first = job.target.like
    flat = [item for entries in made for item in entries]
    flat = one_kind(flat) if job.target.dialect.alpha == "config" else flat
    entries = [with_module(entry, part) for entry, parts in flat for part in parts]
    if job.dtype is not None:
        entries = [replace(entry, module=fit_dtype(entry.module, job.dtype, narrow=True)) for entry in entries]
    metadata = {key: text for key, text in first.metadata.items() if key != ALPHA or job.verbatim}
    adapter = first.replace(entries=tuple(entries), residue=job.residue, metadata=metadata, dims=job.target.dims)
    return adapter, plan(adapter, job.target.architecture, job.target.dialect.name)


def _write(job: Job, adapter: Adapter, planned: Plan, out: Path, force: bool) -> None:
    for item in job.inputs:
        report = Report(mapped={key for entry in item.adapter.entries for key in entry.keys.values()}, kept=list(item.adapter.residue))
        report.check_complete(job.readings[item.position].source.tensors)
    extra = {"loratools.combine": record(job), "modelspec.merged_from": merged_from(job)}
    if job.target.dialect.alpha == "header" and not job.verbatim:
        extra["lora_adapter_metadata"] = lora_adapter_metadata(planned.configs)
    tensors: Mapping[str, LazyTensor] = {**planned.tensors, **job.residue}
    try:
        write_adapter(adapter, job.target.architecture, planned, tensors, out, force=force, extra=extra)
    except NotFiniteError as error:
        raise InputError(f"a value overflows the dtype of {error.tensor}", fix="--dtype bf16 or fp32 has the range") from error
