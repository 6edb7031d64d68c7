"""rescale-alpha: the same adapter under another alpha, at another strength, or with its scale in the factors.

    --alpha a      alpha = a (or each module's rank) everywhere, ΔW as it was
    --strength k   k · ΔW: in alpha where the dialect has a place for it, else in the factors
    --fold         no alpha any more, ΔW as it was

SRC's dialect, keys and order stay. Tensors that need not change are copied bit for bit; the others are rounded once, and the largest
relative error of a ΔW is told. Alpha is written wherever the file has it: tensors (float32), adapter_config.json, the header.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from loratools.adapters.adapter import Adapter, Entry, Module, NotExact
from loratools.adapters.algebra import in_parallel
from loratools.adapters.kinds import Dora
from loratools.adapters.kinds.common import Scaled
from loratools.errors import InputError, LoraToolsError, NotFiniteError, UnsupportedError, UsageError, counted, worst
from loratools.mapping.architectures import Architecture
from loratools.mapping.dialects import DIALECTS
from loratools.mapping.read import Reading, tables_of
from loratools.mapping.write import Plan
from loratools.operations.combining.request import form_problems
from loratools.operations.finite import check_finite
from loratools.operations.inputs import read_together
from loratools.operations.rescaling.modules import LIMIT, Request, Rescaled, constrained, has_scale, rescaled, takes_strength
from loratools.operations.rescaling.records import Records
from loratools.operations.rewriting import rewritten
from loratools.operations.save import write_adapter
from loratools.report import Report
from loratools.tensors.dtypes import dtype_named
from loratools.tensors.writer import check_output, kept_aside

WORST = 5
_UNASKED = 0.01  # what rounding may take from a ΔW without being asked for, as in convert
_THREADS = 4  # modules measured at the same time: a LoHa or LoKr is measured dense


@dataclass(frozen=True)
class _Job:
    """Everything that is known before a byte is written. done: of every entry, in the file's order."""

    reading: Reading
    adapter: Adapter
    architecture: Architecture
    records: Records
    done: list[tuple[Entry, Rescaled]]

    @property
    def pairs(self) -> list[tuple[Entry, Module]]:
        return [(entry, found.module) for entry, found in self.done]

    @property
    def changed(self) -> int:
        """How many modules are not the file's own."""
        return sum(dict(entry.module.factors) != dict(module.factors) or entry.module.alpha != module.alpha for entry, module in self.pairs)


def rescale_alpha(
    source: Path | str,
    output: Path | str,
    *,
    alpha: float | str | None = None,
    strength: float | None = None,
    fold: bool = False,
    dtype: str | None = None,
    arch: str | None = None,
    base: Path | str | None = None,
    force: bool = False,
    dry_run: bool = False,
) -> dict[str, Any]:
    """Write an adapter under another alpha, at another strength, or folded; one of the three has to be asked for.

    alpha: a number above 0, or "rank" for each module's own rank; strength: what ΔW is multiplied by, not 0; fold: no alpha any more.
    dtype: fp32 | fp16 | bf16 | fp64 of the factors, rounded once, never of alpha; arch, base: as for reading.
    Returns the JSON object of the command. Raises UsageError (2), InputError and its children (3), WriteError (1).
    """
    path, out = Path(source), Path(output)
    problems = _usage_problems(alpha, strength, fold)
    request = Request(alpha, strength, fold)
    try:
        request = replace(request, dtype=dtype_named(dtype))
        check_output(out, [path], force)
    except LoraToolsError as error:
        problems.append(error)
    try:
        reading, adapter = _read(path, arch, Path(base) if base else None)
        problems += form_problems(out, DIALECTS[adapter.dialect])
        if not problems:
            job = _prepared(reading, adapter, request)
    except LoraToolsError as error:
        problems.append(error)
    if problems:
        raise worst(problems)
    return _run(job, out, request, force, dry_run)


def _usage_problems(alpha: float | str | None, strength: float | None, fold: bool) -> list[LoraToolsError]:
    """Everything that is wrong with the request itself."""
    wrong = {
        "one of --alpha, --strength and --fold has to be given, and no more": (alpha is not None) + (strength is not None) + fold != 1,
        f"--alpha {alpha}: expected a number between 1e-30 and 1e30, or rank": not (alpha in (None, "rank") or _in_range(alpha)),
        f"--strength {strength}: expected a number of a size between 1e-30 and 1e30": not (strength is None or _in_range(strength, True)),
    }
    return [UsageError(text) for text, holds in wrong.items() if holds]


def _in_range(value: float | str | None, signed: bool = False) -> bool:
    if isinstance(value, str) or value is None or not math.isfinite(value):
        return False
    return 1 / LIMIT < (abs(value) if signed else value) < LIMIT


def _read(path: Path, arch: str | None, base: Path | None) -> tuple[Reading, Adapter]:
    try:
        readings, adapters = read_together([path], arch=arch, base=base)
    except InputError as error:
        if error.fix and error.fix.startswith("--alpha "):  # here it is the alpha of the output
            error.fix = f"loratools convert {path} OUT --to DIALECT --alpha A settles an alpha of 0"
        raise
    return readings[0], adapters[0]


# ------------------------------------------------------------------------------------------------------------------------ work


def _prepared(reading: Reading, adapter: Adapter, request: Request) -> _Job:
    """Every module as it will be written. Raises with everything that stands in the way."""
    architecture = tables_of(reading)
    check_finite([(reading.source.path.name, reading.source)])
    if request.strength is not None:
        _check_linear(reading.source.path, adapter, request.strength)
    elif not any(has_scale(entry.module) for entry in adapter.entries):
        kinds = ", ".join(sorted({entry.module.kind for entry in adapter.entries}))
        raise UnsupportedError(f"{reading.source.path.name}: no module has a scale that alpha could say ({kinds})")
    records = Records(adapter, architecture, request)
    done: list[tuple[Entry, Rescaled]] = []
    refusals: list[str] = []
    threads = min(os.cpu_count() or 1, _THREADS)
    results = in_parallel(lambda entry: _one(entry, records, request), adapter.entries, threads)
    for entry, found in zip(adapter.entries, results, strict=True):
        if isinstance(found, str):
            refusals.append(found)
        else:
            done.append((entry, found))
    if refusals:
        text = f"{counted(len(refusals), 'module')} cannot be rescaled"
        raise UnsupportedError(text, details=refusals, fix="--dtype fp32 makes room in the factors")
    return _Job(reading, adapter, architecture, records, done)


def _one(entry: Entry, records: Records, request: Request) -> Rescaled | str:
    """A module rescaled, or why it cannot be."""
    where = ", ".join(str(site) for site in entry.sites)
    try:
        found = rescaled(entry.module, request, records.place(entry))
    except NotExact as refused:
        return f"{where}: {refused}{_named(entry)}"
    if found.error <= _UNASKED or (request.dtype is not None and math.isfinite(found.error)):
        return found
    if not math.isfinite(found.error):
        return f"{where}: a value overflows {'/'.join(sorted(found.rounded_to))}{_named(entry)}"
    dtypes = "/".join(sorted({tensor.dtype for role, tensor in entry.module.factors.items() if role != "alpha"}))
    return f"{where}: the result does not fit into {dtypes} factors, ΔW would be off by {found.error:.2g}{_named(entry)}"


def _named(entry: Entry) -> str:
    """The tensors that the scale would go into."""
    module = entry.module.inner if isinstance(entry.module, Dora) else entry.module
    roles = module.spread_roles if isinstance(module, Scaled) else [role for role in entry.keys if role != "alpha"]
    return f" ({', '.join(entry.keys[role] for role in roles if role in entry.keys)})"


def _check_linear(path: Path, adapter: Adapter, strength: float) -> None:
    fixed = [entry for entry in adapter.entries if not takes_strength(entry.module)]
    if fixed:
        raise UnsupportedError(
            f"{counted(len(fixed), 'module')} multiply or replace the base weight: no factor of theirs is a strength",
            details=[f"{', '.join(str(site) for site in entry.sites)}: {entry.module.kind}" for entry in fixed],
            fix=f"set the strength where the adapter is loaded, or merge it: loratools merge BASE {path}:{strength:g} OUT",
        )


# ------------------------------------------------------------------------------------------------------------------------- run


def _run(job: _Job, out: Path, request: Request, force: bool, dry_run: bool) -> dict[str, Any]:
    """Name, check, write, tell."""
    adapter, made = _planned(job)
    extra = job.records.metadata(job.pairs)
    tensors = {**made.tensors, **adapter.residue}
    nbytes = sum(tensor.nbytes for tensor in tensors.values())
    check_output(out, [job.reading.source.path, *job.reading.source.files], force, nbytes)
    told = _told(job, out, extra, request)
    if dry_run:
        return {**told, "plan": {"tensors": len(tensors), "bytes": nbytes}}
    report = Report(mapped={key for entry in job.adapter.entries for key in entry.keys.values()}, kept=list(adapter.residue))
    report.check_complete(job.reading.source.tensors)
    try:
        write_adapter(adapter, job.architecture, made, tensors, out, force=force, extra=extra)
    except NotFiniteError as error:
        raise InputError(f"a value overflows the dtype of {error.tensor}", fix="--dtype fp32 has the range") from error
    return told


def _planned(job: _Job) -> tuple[Adapter, Plan]:
    """What is written: the file's own keys in the file's order; a PEFT folder is spelled as PEFT finds it."""
    adapter = job.records.without_memory() if job.changed else job.adapter
    adapter, made = rewritten(adapter, job.architecture, [module for _, module in job.pairs])
    if made.dialect.folder:  # the folder's own configuration, but for what it says of alpha
        made = replace(made, configs=job.records.configs(job.pairs, made.configs))
    return adapter, made


# ------------------------------------------------------------------------------------------------------------------- the result


def _told(job: _Job, out: Path, extra: Mapping[str, str], request: Request) -> dict[str, Any]:
    """The JSON object."""
    errors = [(entry.sites, found.error) for entry, found in job.done if found.error]
    ranked = sorted(errors, key=lambda item: (-item[1], item[0]))
    return {
        "input": str(job.reading.source.path),
        "output": str(out),
        "dialect": job.adapter.dialect,
        "architecture": job.architecture.name,
        "modules": len(job.done),
        "changed": job.changed,
        "alpha_before": job.records.before(),
        "alpha_after": job.records.after(job.pairs, extra),
        "strength": float(request.factor),
        "max_relative_error": max((error for _, error in errors), default=0.0),
        "rounded_to": sorted({dtype for _, found in job.done for dtype in found.rounded_to}),
        "worst": [{"site": str(sites[0]), "relative_error": error} for sites, error in ranked[:WORST]],
        "warnings": _warnings(job, out, request),
    }


def _warnings(job: _Job, out: Path, request: Request) -> list[str]:
    found = []
    for finding in job.reading.findings:
        if finding.severity == "warning":
            text = finding.message.partition("; --alpha")[0] if finding.code == "alpha-assumed" else finding.message
            found.append(text)
    kept = sum(constrained(entry.module) for entry in job.adapter.entries)
    if kept and request.strength is None:
        found.append(f"{counted(kept, 'module')} with an alpha that is no scale (OFT's constraint): kept as it is")
    aside = kept_aside(out) if job.records.dialect.folder else None
    if aside is not None:
        found.append(f"{out} holds other files than an adapter's: the old folder is kept as {aside.name}")
    return found
