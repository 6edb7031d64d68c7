"""Does the written file hold what the adapters say? Read back before it gets its name, site by site, in float64.

For each site: W' as written, W of the base, and Δ = Σ weight · ΔW computed again (`expected`), compared within what rounding may do
(`bounds`): so a wrong alpha, a transposed factor, exchanged q and k or a layer that was left out is found. All other tensors must be
the base's, bit for bit, and every tensor must have the dtype and shape that was planned. Invariant: each defect is told once.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from loratools.adapters.adapter import Site
from loratools.adapters.algebra import in_parallel
from loratools.errors import CheckFailed, counted
from loratools.operations.merging.arithmetic import MergedTensor
from loratools.operations.merging.bounds import SiteCheck, SiteSums
from loratools.operations.merging.expected import Before, Expected, Part, contributions
from loratools.operations.merging.plan import MergePlan
from loratools.tensors.lazy import LazyTensor, same_bytes
from loratools.tensors.reader import open_source

if TYPE_CHECKING:
    import torch

WORST = 5  # sites told in JSON

# role of a tensor of a module → the property of an adapter's module that says whether it changes it
_CHANGES = {"weight": "changes_weight", "bias": "changes_bias"}


@dataclass
class Verification:
    """The result of a verification in which everything held."""

    sites: list[SiteCheck] = field(default_factory=list)
    untouched: int = 0

    def as_json(self) -> dict[str, Any]:
        """Counts, and the sites that are farthest from what was expected."""
        ranked = sorted(self.sites, key=lambda check: -check.deviation)
        return {
            "ok": True,
            "sites": len(self.sites),
            "untouched_tensors": self.untouched,
            "max_deviation": ranked[0].deviation if ranked else 0.0,
            "worst": [check.as_json() for check in ranked[:WORST]],
        }


def verify_merge(plan: MergePlan, path: Path, made: Mapping[str, LazyTensor], threads: int | None = None) -> Verification:
    """Check a finished file or folder against base and adapters.

    path: of the output, still under its temporary name; made: every tensor that is not the base's own: merged ones, those cast to
    another dtype, and new scales (which are checked with their codes).
    Raises CheckFailed naming every tensor that holds something else.
    """
    written = open_source(path).tensors
    planned = {**plan.source.tensors, **made}
    failures = _names_differ(planned, written)
    sound = {key for key, tensor in planned.items() if key in written and _form(written[key]) == _form(tensor)}
    failures += [
        f"{key}: no adapter changes it, but it is not the base's"
        for key, tensor in plan.source.tensors.items()
        if key in sound and key not in made and not same_bytes(tensor, written[key])
    ]
    tensors = {key: tensor for key, tensor in made.items() if isinstance(tensor, MergedTensor)}
    result = Verification(untouched=sum(key not in made for key in plan.source.tensors))
    for name, base in plan.bases.items():
        sites = _Sites(Before(plan, base, tensors), written, sound)
        for checks in in_parallel(sites.check, list(contributions(plan, name).items()), threads):
            result.sites += checks
    readable = [tensor for tensor in tensors.values() if sound.issuperset(tensor.storage.written)]
    gaps = [(tensor, start, stop) for tensor in readable for start, stop in _gaps(tensor)]
    kept = list(in_parallel(partial(_check_gap, written), gaps, threads))
    failures += [str(check) for check in [*result.sites, *kept] if check.reason]
    if failures:
        told = f"{path.name}: {counted(len(failures), 'check')} of what was written did not hold; nothing was put in place"
        raise CheckFailed(told, details=failures)
    return result


def _form(tensor: LazyTensor) -> tuple[str, tuple[int, ...]]:
    return tensor.dtype, tensor.shape


def _names_differ(planned: Mapping[str, LazyTensor], written: Mapping[str, LazyTensor]) -> list[str]:
    """Tensors that are missing, that nothing asked for, or that have another dtype or shape than was planned."""
    found = [f"{key}: is missing" for key in planned if key not in written]
    found += [f"{key}: was not in the base" for key in written if key not in planned]
    return found + [
        f"{key}: is {written[key].dtype} {list(written[key].shape)}, expected {tensor.dtype} {list(tensor.shape)}"
        for key, tensor in planned.items()
        if key in written and _form(written[key]) != _form(tensor)
    ]


def _gaps(tensor: MergedTensor) -> Iterator[tuple[int, int]]:
    """The rows of a tensor that are no region's: of a fused weight whose other parts an adapter changes, of one that is only cast."""
    height, reached = tensor.shape[0] if tensor.shape else 1, 0
    for start, stop in sorted((region.place.start, tensor.end_of(region.place)) for region in tensor.regions):
        if start > reached:
            yield reached, start
        reached = max(reached, stop)
    if reached < height:
        yield reached, height


def _check_gap(written: Mapping[str, LazyTensor], gap: tuple[MergedTensor, int, int]) -> SiteCheck:
    """Rows no adapter changes: the base's, in the output's dtype."""
    import torch

    tensor, start, stop = gap
    sums = SiteSums(tensor.storage.rounding.stochastic, tensor.dtype)
    for first, last in tensor.between(start, stop):
        base, found, unit = _values(tensor, written, first, last)
        sums.add(base, found, torch.zeros_like(base), unit)
    return sums.check(tensor.name, f"rows {start} to {stop}, which no adapter changes")


def _values(
    tensor: MergedTensor, written: Mapping[str, LazyTensor], first: int, last: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(W, W', the value of one code) of rows first..last in the file's order, (rows, columns), float64."""
    import torch

    base = tensor.storage.read(first, last).to(torch.float64).reshape(last - first, -1)
    found, unit = tensor.storage.reread(written[tensor.name], written, first, last)
    return base, found.reshape(base.shape), unit.reshape(base.shape) if unit.dim() else unit


class _Sites:
    """Both models, site by site. sound: the tensors of the output that have the planned form; the others are told of already."""

    def __init__(self, before: Before, written: Mapping[str, LazyTensor], sound: Collection[str]) -> None:
        self.before, self.written, self.sound = before, written, frozenset(sound)

    def check(self, item: tuple[Site, Sequence[Part]]) -> list[SiteCheck]:
        """The checks of a site's weight and bias."""
        site, parts = item
        acting = {role: [part for part in parts if getattr(part[0].module, changes)] for role, changes in _CHANGES.items()}
        found = [self._check(site, role, mine) for role, mine in acting.items() if mine]
        return [check for check in found if check is not None]

    def _check(self, site: Site, role: str, parts: Sequence[Part]) -> SiteCheck | None:
        """None where there is nothing to compare: an optional bias the base does not have, a tensor of the wrong form."""
        place = self.before.places.get((site, role))
        if place is None:
            needed = role == "weight" or any(entry.module.needs_bias for entry, _ in parts)
            return SiteCheck(str(site), str(site), 0.0, 1.0, 1.0, 0.0, "was not merged") if needed else None
        tensor = self.before.tensors[place.target]
        if not self.sound.issuperset(tensor.storage.written):
            return None
        return self._compared(tensor, Expected(self.before, site, role, place, parts))

    def _compared(self, tensor: MergedTensor, expected: Expected) -> SiteCheck:
        sums, place = SiteSums(tensor.storage.rounding.stochastic, tensor.dtype), expected.place
        for first, last in tensor.between(place.start, tensor.end_of(place)):
            base, found, unit = _values(tensor, self.written, first, last)
            sums.add(base, found, expected.rows(first - place.start, last - place.start), unit)
        return sums.check(tensor.name, f"{expected.site}" if expected.role == "weight" else f"{expected.site} {expected.role}")
