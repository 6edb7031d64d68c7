"""compare: are two adapters the same function, whatever they are called?

Per site: relative Frobenius error ‖ΔW_B - ΔW_A‖ / ‖ΔW_A‖ and the cosine of the two deltas, through the factors wherever both are
low-rank (QR of the joined factors; Gram matrices for the inner product), so another gauge (GA, BG⁻¹), a padded rank or another
dialect makes no difference. Kinds that multiply the base weight are compared by what determines them (ΔW and magnitude of a DoRA,
the rotations of an OFT), which needs no base.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from loratools.adapters import algebra
from loratools.adapters.adapter import Adapter, Entry, Module, NotExact, Site
from loratools.adapters.factors import exact
from loratools.adapters.kinds import Dense, Dora, Lora
from loratools.errors import InputError, counted
from loratools.operations.inputs import read_together

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class _Overlap:
    """What one site adds to the sums: ‖A‖², ‖B‖², ⟨A, B⟩, ‖B - A‖²; `parts`: those of ΔW, bias, magnitude where it has several."""

    a: float
    b: float
    inner: float
    error: float
    parts: tuple[_Overlap, ...] = ()

    @property
    def relative_error(self) -> float:
        """The largest of its parts (a magnitude is far larger than ΔW and must not hide it); inf where a value is NaN."""
        if self.parts:
            return max(part.relative_error for part in self.parts)
        if not (math.isfinite(self.error) and math.isfinite(self.a)):
            return math.inf
        return math.sqrt(self.error / self.a) if self.a else (0.0 if not self.error else math.inf)

    @property
    def cosine(self) -> float | None:
        return self.inner / math.sqrt(self.a * self.b) if self.a and self.b else None

    @staticmethod
    def total(parts: Collection[_Overlap]) -> _Overlap:
        a, b, inner, error = (sum(getattr(part, name) for part in parts) for name in ("a", "b", "inner", "error"))
        return _Overlap(a, b, inner, error)


def compare(
    a: Path | str,
    b: Path | str,
    *,
    base: Path | str | None = None,
    tolerance: float = 1e-5,
    arch: str | None = None,
    alpha: float | None = None,
    modules: bool = False,
) -> dict[str, Any]:
    """Compare two adapter files of any dialects.

    base: supplies module names where no table does; tolerance: largest relative error of a site that still counts as equal;
    arch, alpha: as for reading, for both files where they are needed.
    Returns the JSON object of the command. Raises InputError for files of two architectures, and what reading raises.
    """
    _, (first, second) = read_together([Path(a), Path(b)], arch=arch, alpha=alpha, base=Path(base) if base else None)
    ours, theirs = _parts(first), _parts(second)
    sites = _overlaps(ours, theirs)
    ranked = sorted(sites.items(), key=lambda item: -item[1].relative_error)
    total = _Overlap.total(sites.values())
    worst_error = ranked[0][1].relative_error if ranked else 0.0
    result: dict[str, Any] = {
        "equal": worst_error <= tolerance,
        "max_relative_error": worst_error,
        "relative_error": total.relative_error,
        "sites": len(sites),
        "only_in_a": [str(site) for site in ours if site not in theirs],
        "only_in_b": [str(site) for site in theirs if site not in ours],
        "worst": [_row(site, overlap) for site, overlap in ranked[:5]],
        "cosine": total.cosine,
        "scale_ratio": math.sqrt(total.b / total.a) if total.a else None,
    }
    if modules:
        result["modules"] = [_row(site, overlap) for site, overlap in sites.items()]
    return result


def _row(site: Site, overlap: _Overlap) -> dict[str, Any]:
    return {"site": str(site), "relative_error": overlap.relative_error, "cosine": overlap.cosine}


# -------------------------------------------------------------------------------------------------------------- one site


@dataclass(frozen=True)
class _Fused:
    """Rows start:stop of a fused module that cannot be split exactly: enough to be compared with."""

    module: Module
    sites: tuple[Site, ...]
    start: int
    stop: int


_Part = Module | _Fused
_Parts = Mapping[Site, tuple[_Part, ...]]


def _parts(adapter: Adapter) -> _Parts:
    """Every site with its modules, as `Adapter.modules`, but for fused modules without an exact split."""
    found: dict[Site, tuple[_Part, ...]] = {}
    for entry in adapter.entries:
        for site, part in _split(entry):
            found[site] = (*found.get(site, ()), part)
    return found


def _split(entry: Entry) -> list[tuple[Site, _Part]]:
    try:
        return list(entry.parts())
    except NotExact:
        if len(entry.rows) != len(entry.sites) or entry.swapped:
            raise
    stops = list(itertools.accumulate(entry.rows))
    return [
        (site, _Fused(entry.module, entry.sites, stop - rows, stop))
        for site, rows, stop in zip(entry.sites, entry.rows, stops, strict=True)
    ]


def _overlaps(ours: _Parts, theirs: _Parts) -> dict[Site, _Overlap]:
    """The sums of every site. Raises InputError that lists all sites that cannot be compared."""
    found: dict[Site, _Overlap] = {}
    problems: list[str] = []
    for site in sorted({*ours, *theirs}):
        try:
            found[site] = _overlap(ours.get(site, ()), theirs.get(site, ()))
        except _Incomparable as error:
            problems.append(f"{site}: {error}")
    if problems:
        raise InputError(f"{counted(len(problems), 'site')} of the two files cannot be compared", details=problems)
    return found


class _Incomparable(Exception):
    """The modules of a site change weights of different shapes, or one of them acts on several sites at once."""


def _overlap(ours: tuple[_Part, ...], theirs: tuple[_Part, ...]) -> _Overlap:
    """The sums of one site; a missing side is a delta of zero. Raises _Incomparable."""
    mine_plain, their_plain = ([part for part in side if isinstance(part, Lora) and part.bias_delta() is None] for side in (ours, theirs))
    if ours and theirs and len(mine_plain) == len(ours) and len(their_plain) == len(theirs):
        return _low_rank(_joined(mine_plain), _joined(their_plain))
    whole = [{part.sites for part in side if isinstance(part, _Fused) and not part.module.linear} for side in (ours, theirs)]
    if ours and theirs and whole[0] != whole[1]:
        raise _Incomparable("fused in one file and not in the other, in a kind that has no exact split")
    mine, other = _parameters(ours), _parameters(theirs)
    parts = []
    for name in {**mine, **other}:
        left, right = mine.get(name), other.get(name)
        left = left if left is not None else right.new_zeros(right.shape)  # type: ignore[union-attr]
        right = right if right is not None else left.new_zeros(left.shape)
        if left.numel() != right.numel():
            raise _Incomparable(f"{name} of shape {list(left.shape)} and {list(right.shape)}")
        left, right = left.flatten(), right.flatten()
        difference = right - left
        parts.append(_Overlap(float(left @ left), float(right @ right), float(left @ right), float(difference @ difference)))
    total = _Overlap.total(parts)
    return replace(total, parts=tuple(parts))


def _joined(modules: Sequence[Lora]) -> algebra.Pair:
    """(up, down) of the sum of LoRA modules, scales in up."""
    return algebra.joined([(module.scale, module.matrices()) for module in modules])


def _low_rank(ours: algebra.Pair, theirs: algebra.Pair) -> _Overlap:
    """The sums from the factors: Gram matrices for norms and inner product, a QR core for the difference."""
    (up, down), (other_up, other_down) = ours, theirs
    if (up.shape[0], down.shape[1]) != (other_up.shape[0], other_down.shape[1]):
        raise _Incomparable(f"{up.shape[0]} x {down.shape[1]} and {other_up.shape[0]} x {other_down.shape[1]}")
    return _Overlap(
        max(algebra.gram_inner(*ours, *ours), 0.0),
        max(algebra.gram_inner(*theirs, *theirs), 0.0),
        algebra.gram_inner(*ours, *theirs),
        algebra.difference_norm(theirs, ours) ** 2,
    )


def _parameters(parts: tuple[_Part, ...]) -> Mapping[str, torch.Tensor]:
    """What determines a site's function beside W itself: ΔW and bias for additive kinds, else the parts that act on W."""
    found: dict[str, torch.Tensor] = {}
    for part in parts:
        for name, value in (_of_fused(part) if isinstance(part, _Fused) else _of_module(part)).items():
            found[name] = found[name] + value if name in found else value
    return found


def _of_fused(part: _Fused) -> dict[str, torch.Tensor]:
    """The part's rows of an additive kind; all of a kind that acts on the fused weight as a whole."""
    whole = _of_module(part.module)
    return {name: value[part.start : part.stop] for name, value in whole.items()} if part.module.linear else whole


def _of_module(module: Module) -> dict[str, torch.Tensor]:
    if isinstance(module, Dora):
        return {**_of_module(module.inner), f"magnitude on the {module.axis} axis": exact(module.magnitude).flatten()}
    if isinstance(module, Dense) and module.linear:
        weights = {"diff", "w_norm", "bias_values"} & set(module.factors)
        found = {"ΔW": module.delta()} if weights else {}
    elif module.linear:
        found = {"ΔW": module.delta()}
    else:
        return {role: exact(tensor) for role, tensor in module.factors.items()}
    bias = module.bias_delta()
    return {**found, "bias": bias} if bias is not None else found
