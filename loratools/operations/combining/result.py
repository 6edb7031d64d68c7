"""What is told about a combination: the JSON object of the command, and the record in the output's header."""

from __future__ import annotations

import hashlib
import json
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from loratools.adapters.adapter import Site
from loratools.adapters.kinds import Dense
from loratools.errors import counted
from loratools.mapping.read import Reading
from loratools.mapping.write import Plan
from loratools.operations.combining.grouping import Input
from loratools.operations.combining.recompress import Fit, Recipe, Unit
from loratools.operations.combining.similarity import Gram, cosines, summed, weighted_norm
from loratools.operations.combining.units import Target
from loratools.tensors.header import open_bytes
from loratools.tensors.lazy import CHUNK, LazyTensor
from loratools.tensors.writer import kept_aside

WORST = 5  # rows of the sites that are furthest off


@dataclass(frozen=True)
class Job:
    """A combination once everything headers can tell has been checked. dtype: what the user asked for."""

    given: list[tuple[Path, float]]  # every file and its weight
    readings: list[Reading]  # of all of them
    inputs: list[Input]  # those with a weight other than 0
    target: Target
    recipe: Recipe
    units: list[Unit]
    dtype: str | None
    residue: dict[str, LazyTensor]
    threads: int | None

    @property
    def verbatim(self) -> bool:
        """Is the output the first input as it is, in its own dialect?"""
        own = len(self.inputs) == 1 and self.inputs[0].position == 0 and self.inputs[0].weight == 1.0
        return own and not self.recipe.shrinks and self.target.like.dialect == self.target.dialect.name


def record(job: Job) -> str:
    """What was combined and how, for the header: names and hashes, no paths."""
    recipe = job.recipe
    inputs = [
        {"name": _text(path.name), "sha256": _sha256(reading.source.files), "weight": weight}
        for (path, weight), reading in zip(job.given, job.readings, strict=True)
    ]
    sparse = {"density": recipe.density, "seed": recipe.seed} if recipe.method != "sum" else {"density": None, "seed": None}
    asked = {"rank": recipe.criterion.rank, "energy": recipe.criterion.energy}
    return json.dumps({"method": recipe.method, **asked, **sparse, "inputs": inputs}, sort_keys=True, separators=(",", ":"))


def merged_from(job: Job) -> str:
    return ", ".join(_text(path.name) for path, _ in job.given)


def _text(name: str) -> str:
    """A file name as text, whatever its bytes are."""
    return name.encode("utf-8", "backslashreplace").decode()


def _sha256(files: Sequence[Path]) -> str:
    """Of the bytes of all files, one after the other."""
    digest = hashlib.sha256()
    for path in files:
        file, size = open_bytes(path)
        for offset in range(0, size, CHUNK):
            digest.update(file.read(offset, min(CHUNK, size - offset)))
    return digest.hexdigest()


def told(job: Job, out: Path, planned: Plan, grams: Sequence[Gram] = (), fits: Sequence[Fit | None] = ()) -> dict[str, Any]:
    """The JSON object. grams, fits: of every unit, in their order; () for a plan, whose figures are not known."""
    known = {unit.sites: fit for unit, fit in zip(job.units, fits, strict=True) if fit is not None} if fits else {}
    low = [written for written in planned.modules if not isinstance(written.module, Dense)]
    ranks = {site: written.module.rank for written in low for site in written.sites}
    ranked = sorted(known.items(), key=lambda item: (-item[1].relative_error, item[0]))[:WORST]
    count = Counter(written.module.rank for written in low if written.module.rank)
    return {
        "inputs": [
            {"path": str(path), "weight": weight, "dialect": reading.detection.dialect or ""}
            for (path, weight), reading in zip(job.given, job.readings, strict=True)
        ],
        "output": str(out),
        "dialect": job.target.dialect.name,
        "architecture": job.target.architecture.name,
        "method": job.recipe.method,
        "pairwise_cosine": cosines(summed(grams, len(job.given))) if grams else None,
        "ranks_after": {str(rank): count[rank] for rank in sorted(count)},
        "relative_error": _whole(job, grams, fits).relative_error if fits else None,
        "worst": [{"site": str(sites[0]), "rank": _rank(sites, ranks), "relative_error": fit.relative_error} for sites, fit in ranked],
        "sites": len(planned.sites),
        "only_in": _only_in(job),
        "warnings": _warnings(job, out),
    }


def _rank(sites: Sequence[Site], ranks: Mapping[Site, int | None]) -> int | None:
    """The rank of the module that serves these sites; a fused one may lack the first."""
    return next((ranks[site] for site in sites if site in ranks), None)


def _whole(job: Job, grams: Sequence[Gram], fits: Sequence[Fit | None]) -> Fit:
    """√(Σ‖error‖² / Σ‖ΔW‖²) over all units; an exact one has its norm from the inner products."""
    weights = [weight for _, weight in job.given]
    parts = [Fit(0.0, weighted_norm(found, weights)) if fit is None else fit for found, fit in zip(grams, fits, strict=True)]
    return Fit(math.fsum(part.error for part in parts), math.fsum(part.norm for part in parts))


def _only_in(job: Job) -> list[dict[str, Any]]:
    """How many sites of each input some other input lacks."""
    sites = {item.position: {site for entry in item.adapter.entries for site in entry.sites} for item in job.inputs}
    common = set.intersection(*sites.values())
    return [{"path": str(item.path), "sites": len(sites[item.position] - common)} for item in job.inputs]


def _warnings(job: Job, out: Path) -> list[str]:
    found = [finding.message for reading in job.readings for finding in reading.findings if finding.severity == "warning"]
    found += [f"{path.name} has weight 0 and is left out" for path, weight in job.given if not weight]
    apart = [(Path(row["path"]).name, row["sites"]) for row in _only_in(job) if row["sites"]]
    found += [f"{name} has {counted(count, 'site')} that not every input has" for name, count in apart]
    fixed = sum(not group.additive for unit in job.units for group in unit.present)
    if fixed:
        found.append(f"{counted(fixed, 'module')} that multiply or replace the base weight: passed through unchanged, in no cosine")
    aside = kept_aside(out) if job.target.dialect.folder else None
    if aside is not None:
        found.append(f"{out} holds other files than an adapter's: the old folder is kept as {aside.name}")
    return found
