"""What rounding took from a merge, as far as it lies in the adapters' own subspace: a small LoRA beside the merged model.

Of E = W + Δ - W', the loss at a site, P_U E P_D is kept: P_U and P_D project on the columns of the adapters' ups and the rows of
their downs, so its rank is at most Σ r. Where Δ is below the dtype's resolution most entries of W do not move, E is close to a
multiple of Δ, and this gives it back; the noise of rounding lies in all directions and stays lost.
E is summed from blocks of rows through the orthonormal bases (QR) of both sides: no (out, in) matrix is made for it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from loratools.adapters.adapter import Adapter, Entry, NotExact
from loratools.adapters.algebra import in_parallel
from loratools.adapters.kinds import Lora
from loratools.errors import UnsupportedError
from loratools.mapping.architectures import Architecture
from loratools.mapping.bases import Base
from loratools.mapping.write import Plan
from loratools.mapping.write import plan as write_plan
from loratools.operations.merging.arithmetic import MergedTensor, Sums, row_delta
from loratools.operations.merging.placing import Region
from loratools.operations.merging.plan import MergePlan
from loratools.tensors.lazy import from_torch
from loratools.tensors.reader import open_source

if TYPE_CHECKING:
    import torch

BLOCK = 1 << 18


@dataclass
class Residual:
    """The part of the loss that was found. recovered: |P_U E P_D|² over all sites; gained: its inner product with Δ."""

    entries: list[Entry] = field(default_factory=list)
    recovered: float = 0.0
    gained: float = 0.0
    skipped: int = 0  # sites whose modules have no low-rank factors


def residual_of(plan: MergePlan, written_to: Path, tensors: Mapping[str, MergedTensor], threads: int | None = None) -> Residual:
    """The loss of every site between what was to be written and what the file or folder `written_to` holds, projected.

    Raises UnsupportedError where no site is changed by LoRAs alone: there is no subspace to keep it in.
    """
    written = open_source(written_to)
    result = Residual()
    afters = {name: Base(written, base.architecture) for name, base in plan.bases.items()}
    items = [
        (region, tensors[key])
        for key, regions in plan.placement.regions.items()
        for region in regions
        if region.role == "weight" and region.terms
    ]

    def project(item: tuple[Region, MergedTensor]) -> tuple[Lora | None, float, float] | None:
        before = plan.base_of(item[0])
        return _projected(item[0], before, afters[before.architecture.name], item[1])

    for (region, _), found in zip(items, in_parallel(project, items, threads), strict=True):
        if found is None:
            result.skipped += 1
            continue
        module, recovered, gained = found
        if module is not None:
            result.entries.append(Entry((region.site,), module, name=region.site.path))
        result.recovered += recovered
        result.gained += gained
    if result.skipped == len(items):
        raise UnsupportedError("no site is changed by LoRAs alone: a residual has no factors to be made of", fix="leave out --residual")
    return result


def _projected(region: Region, before: Base, after: Base, tensor: MergedTensor) -> tuple[Lora | None, float, float] | None:
    """(the LoRA, |P_U E P_D|², ⟨P_U E P_D, Δ⟩) of one site, no LoRA where nothing was lost; None where a term is no LoRA."""
    import torch

    place = region.place
    sides = _sides(region)
    if sides is None or tensor.shape != before.tensors[place.key].shape:
        return None
    left, right = (torch.linalg.qr(side)[0] for side in sides)  # (rows, R), (columns, R), in the file's orientation
    working = tensor.storage.working
    deltas = [row_delta(term, region, before, working) for term in region.terms]
    narrow = left.to(working), right.to(working)
    core, gain = (torch.zeros(left.shape[1], right.shape[1], dtype=torch.float64) for _ in range(2))
    step = max(BLOCK // right.shape[0] // tensor.storage.row_step, 1) * tensor.storage.row_step
    for start in range(place.start, place.stop, step):
        stop = min(start + step, place.stop)
        rows = tensor.storage.read(start, stop).reshape(stop - start, -1)
        change = deltas[0].rows(start - place.start, stop - place.start, rows)
        for delta in deltas[1:]:
            change += delta.rows(start - place.start, stop - place.start, rows)
        found, _ = tensor.storage.reread(after.tensors[place.target], after.tensors, start, stop)
        mine = narrow[0][start - place.start : stop - place.start].t()
        gain += mine @ (change @ narrow[1])
        core += mine @ (change.add_(rows).sub_(found.reshape(rows.shape)) @ narrow[1])
    first, values, second = torch.linalg.svd(core)
    kept = int((values > values.max() * 1e-6).sum()) if values.numel() and float(values.max()) else 0
    if not kept:  # every sum was a value of the dtype, or B is zero
        return None, 0.0, 0.0
    root = values[:kept].sqrt()
    up, down = (left @ first[:, : values.numel()])[:, :kept] * root, root[:, None] * (second[: values.numel()] @ right.t())[:kept]
    if place.swapped:
        up = up.roll(up.shape[0] // 2, 0)
    if place.transposed:
        up, down = down.t(), up.t()
    kernel = before.tensors[place.key].shape[2:]
    factors = {
        "down": from_torch(down.to(torch.float32).reshape(kept, -1, *kernel).contiguous()),
        "up": from_torch(up.to(torch.float32).reshape(-1, kept, *(1 for _ in kernel)).contiguous()),
    }
    return Lora(factors, float(kept)), float(values.square().sum()), float((core * gain).sum())


def _sides(region: Region) -> tuple[torch.Tensor, torch.Tensor] | None:
    """(all ups (rows, Σ r), all downs transposed (columns, Σ r)) in the file's orientation; None where a term has no such factors."""
    import torch

    ups, downs = [], []
    for term in region.terms:
        try:
            module = term.module.swap_halves() if term.module is not None and region.place.swapped else term.module
            module = module.transpose() if module is not None and region.place.transposed else module
        except NotExact:
            return None
        if not isinstance(module, Lora) or module.embedding:
            return None
        up, down = module.matrices()
        ups.append(up)
        downs.append(down.t())
    return torch.cat(ups, 1), torch.cat(downs, 1)


PlannedResidual = tuple[Adapter, Architecture, Plan]


def residual_plan(plan: MergePlan, residual: Residual) -> PlannedResidual | None:
    """The LoRA as it will be written, in the dialect of the adapter named first; None where rounding took nothing.

    Raises UnsupportedError where that dialect has no name for a site.
    """
    if not residual.entries:
        return None
    first = next(one for one in plan.given if one.position == 0)
    made = Adapter(
        first.adapter.architecture,
        first.adapter.dialect,
        tuple(residual.entries),
        variant=first.adapter.variant,
        dims=first.adapter.dims,
    )
    return made, first.architecture, write_plan(made, first.architecture, first.adapter.dialect)


def residual_told(residual: Residual, path: Path, tensors: Mapping[str, MergedTensor]) -> dict[str, Any]:
    """How much of the loss the residual gives back; "path" is None where there was nothing to write."""
    total = sum((tensor.tally.total for tensor in tensors.values()), start=Sums())
    ranks = [entry.module.rank or 0 for entry in residual.entries]
    return {
        "path": str(path) if residual.entries else None,
        "sites": len(residual.entries),
        "max_rank": max(ranks, default=0),
        "loss_recovered": residual.recovered / total.lost if total.lost else 1.0,
        "delta_retained": (total.kept + residual.gained) / total.delta if total.delta else 1.0,
        "relative_error": math.sqrt(max(total.lost - residual.recovered, 0.0) / total.delta) if total.delta else 0.0,
        "skipped_sites": residual.skipped,
    }
