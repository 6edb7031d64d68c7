"""resize: the same adapter at smaller ranks, each module the best approximation of its own ΔW.

SRC's dialect, keys and order stay, and so does every module whose rank fits, to the bit. LoHa, LoKr and tucker modules that do not fit
become LoRA. For a loader that knows one rank and one alpha only, all modules are filled up with zeros to one rank. Everything headers
can tell is checked first; the error that is told is that of the factors as written.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from loratools.adapters.adapter import Adapter, Entry, Module, NotExact
from loratools.adapters.algebra import Criterion, in_parallel
from loratools.adapters.kinds import Lora
from loratools.adapters.sums import low_rank
from loratools.errors import InputError, LoraToolsError, NotFiniteError, UnsupportedError, UsageError, counted, worst
from loratools.mapping.architectures import Architecture
from loratools.mapping.dialects import DIALECTS, PLAIN
from loratools.mapping.loaders import Loader, loader_named
from loratools.mapping.read import Reading, tables_of
from loratools.mapping.rules import Row
from loratools.mapping.write import Plan
from loratools.operations.combining.request import criterion_problems, form_problems
from loratools.operations.combining.units import Target
from loratools.operations.finite import check_finite
from loratools.operations.inputs import read_together
from loratools.operations.resizing.modules import Goal, Resized, common_scale, declared, padded, resizable, resized
from loratools.operations.resizing.records import alpha_rule, described
from loratools.operations.resizing.told import told
from loratools.operations.rewriting import rewritten
from loratools.operations.save import write_adapter
from loratools.report import Report
from loratools.tensors.dtypes import dtype_named
from loratools.tensors.lazy import LazyTensor
from loratools.tensors.writer import check_output, output_problems

Work = Callable[[Module, Goal, Row | None], Resized]


@dataclass(frozen=True)
class _Job:
    """Everything headers can tell. goal: of every module; loader: that the output is for."""

    reading: Reading
    adapter: Adapter
    architecture: Architecture
    goal: Goal
    loader: Loader | None
    rows: dict[int, Row | None]  # by place of the entry
    threads: int | None


def resize(
    source: Path | str,
    output: Path | str,
    *,
    rank: int | None = None,
    energy: float | None = None,
    error: float | None = None,
    ratio: float | None = None,
    conv_rank: int | None = None,
    max_rank: int | None = None,
    loader: str | None = None,
    dtype: str | None = None,
    arch: str | None = None,
    alpha: float | None = None,
    base: Path | str | None = None,
    threads: int | None = None,
    force: bool = False,
    dry_run: bool = False,
) -> dict[str, Any]:
    """Write an adapter at smaller ranks.

    rank: of every module at most; energy: share of Σσ² to keep, 0 < E <= 1; error: relative error of each module at most; ratio: keep
    σ₁/σ up to this; one of the four, or none where max_rank, conv_rank or loader say it all. conv_rank: of kernels larger than 1x1 at
    most; max_rank: of every module, whatever the rest says; loader: a name of `mapping.loaders`, for its limit and its one rank.
    dtype: of the factors, rounded once; arch, alpha, base: as for reading; threads: None for all cores.
    Returns the JSON object of the command. Raises UsageError (2), InputError and its children (3), WriteError (1).
    """
    path, out = Path(source), Path(output)
    criterion = Criterion(rank, energy, error, ratio)
    problems = list(_usage_problems(criterion, conv_rank, max_rank, loader))
    wanted, found = None, None
    try:
        wanted, found = dtype_named(dtype), loader_named(loader) if loader is not None else None
        max_rank = found.cap(max_rank) if found else max_rank
    except UsageError as wrong:
        problems.append(wrong)
    problems += output_problems(out, [path], force=force)
    try:
        readings, adapters = read_together([path], arch=arch, alpha=alpha, base=Path(base) if base else None)
        problems += form_problems(out, DIALECTS[adapters[0].dialect])
        conv = criterion if conv_rank is None else replace(criterion, rank=conv_rank)
        goal = Goal(_capped(criterion, max_rank), _capped(conv, max_rank), alpha_rule(adapters[0]), dtype=wanted)
        job = _prepared(readings[0], adapters[0], goal, found, threads)
    except LoraToolsError as wrong:
        problems.append(wrong)
    if problems:
        raise worst(problems)
    return _run(job, out, force, dry_run)


def _usage_problems(criterion: Criterion, conv_rank: int | None, max_rank: int | None, loader: str | None) -> Iterator[LoraToolsError]:
    """Everything that is wrong with the request itself."""
    yield from criterion_problems(criterion)
    for name, value in (("--conv-rank", conv_rank), ("--max-rank", max_rank)):
        if value is not None and value < 1:
            yield UsageError(f"{name} {value}: expected 1 or more")
    if not criterion.asked and (conv_rank, max_rank, loader) == (None, None, None):
        yield UsageError("nothing says how large a rank may be", fix="--rank N, --energy E, --error E or --ratio R")


def _capped(criterion: Criterion, most: int | None) -> Criterion:
    known = [rank for rank in (criterion.rank, most) if rank is not None]
    return replace(criterion, rank=min(known, default=None))


def _prepared(reading: Reading, adapter: Adapter, goal: Goal, loader: Loader | None, threads: int | None) -> _Job:
    """The job after all checks of the adapter itself. Raises UnsupportedError listing every module in the way."""
    architecture, dialect = tables_of(reading), DIALECTS[adapter.dialect]
    if not dialect.writable:
        fix = f"loratools convert {reading.source.path} OUT --to DIALECT"
        raise UnsupportedError(f"{dialect.name} cannot be written: {dialect.notes}", fix=fix)
    fixed = [entry for entry in adapter.entries if not resizable(entry.module)]
    if fixed:
        raise UnsupportedError(
            f"{counted(len(fixed), 'module')} of a kind that multiplies the base weight: a smaller rank of it is another function",
            details=[f"{', '.join(str(site) for site in entry.sites)}: {entry.module.kind}" for entry in fixed],
            fix=_as_lora(reading.source.path, architecture),
        )
    ranked = [entry.module for entry in adapter.entries if low_rank(entry.module)]
    if not ranked:
        kinds = ", ".join(sorted({entry.module.kind for entry in adapter.entries}))
        raise UnsupportedError(f"{reading.source.path.name}: no module has a rank ({kinds})")
    if loader is not None:
        goal = replace(goal, plain=True, scale=common_scale(ranked) if loader.uniform else None)
    target = Target.of(architecture, dialect, adapter, adapter.dims)
    rows = {place: target.row(entry.sites[0], entry.module.shape)[1] for place, entry in enumerate(adapter.entries)}
    return _Job(reading, adapter, architecture, goal, loader, rows, threads)


def _as_lora(path: Path, architecture: Architecture) -> str:
    """How modules that multiply the base weight become LoRA: by a dialect that has nothing else, or as the difference of two models."""
    plain = [dialect.name for dialect in DIALECTS.values() if dialect.writable and dialect.holds == PLAIN and dialect.serves(architecture)]
    if plain:
        return f"loratools convert {path} OUT --to {plain[0]} --kind lora --base MODEL --allow-lossy makes LoRA of them"
    return f"loratools merge MODEL {path} TUNED, and loratools extract MODEL TUNED OUT --rank N"


# ------------------------------------------------------------------------------------------------------------------------- run


def _run(job: _Job, out: Path, force: bool, dry_run: bool) -> dict[str, Any]:
    """Plan from shapes, compute, write, tell."""
    source = job.reading.source
    made = _made(job, declared)
    adapter, planned, _ = _planned(job, made)
    nbytes = sum(tensor.nbytes for tensor in (*planned.tensors.values(), *adapter.residue.values()))
    check_output(out, [source.path, *source.files], force, nbytes)
    if dry_run:
        size = {"tensors": len(planned.tensors) + len(adapter.residue), "bytes": nbytes}
        return {**told(job.reading, job.adapter, made, out, job.loader, done=False), "plan": size}
    check_finite([(source.path.name, source)], job.threads)
    made = _made(job, resized)
    adapter, planned, extra = _planned(job, made)
    report = Report(mapped={key for entry in job.adapter.entries for key in entry.keys.values()}, kept=list(adapter.residue))
    report.check_complete(source.tensors)
    tensors: dict[str, LazyTensor] = {**planned.tensors, **adapter.residue}
    try:
        write_adapter(adapter, job.architecture, planned, tensors, out, force=force, extra=extra)
    except NotFiniteError as wrong:
        raise InputError(f"a value overflows the dtype of {wrong.tensor}", fix="--dtype bf16 or fp32 has the range") from wrong
    return told(job.reading, job.adapter, made, out, job.loader)


def _made(job: _Job, work: Work) -> list[Resized]:
    """Every module as `work` makes it: of one kind where one configuration tells of all, of one rank where the loader wants it."""
    places = list(enumerate(job.adapter.entries))
    made = list(in_parallel(lambda item: _one(item[1], job.rows[item[0]], job.goal, work), places, job.threads))
    if job.goal.alpha == "config":
        plain = replace(job.goal, plain=True)
        kinds: dict[str, set[str]] = {}
        for entry, one in zip(job.adapter.entries, made, strict=True):
            if low_rank(one.module):
                kinds.setdefault(entry.component, set()).add(one.module.kind)
        again = [place for place, entry in places if len(kinds.get(entry.component, ())) > 1 and low_rank(entry.module)]
        for place in again:
            made[place] = _one(job.adapter.entries[place], job.rows[place], plain, work)
    if job.loader is not None and job.loader.uniform:
        most = max(one.module.rank or 0 for one in made if isinstance(one.module, Lora))
        made = [replace(one, module=padded(one.module, most, job.goal)) if isinstance(one.module, Lora) else one for one in made]
    return made


def _one(entry: Entry, row: Row | None, goal: Goal, work: Work) -> Resized:
    try:
        return work(entry.module, goal, row)
    except NotExact as refused:
        raise UnsupportedError(f"{entry.sites[0]}: {refused}", fix="--dtype fp32 has the range") from refused


def _planned(job: _Job, made: Sequence[Resized]) -> tuple[Adapter, Plan, dict[str, str]]:
    modules = [one.module for one in made]
    adapter, planned = rewritten(job.adapter, job.architecture, modules)
    return described(adapter, job.architecture, planned, modules)
