"""Does the written file hold what the adapters say? Read back before it gets its name, site by site, in float64.

For each site: W' as written, W of the base, and Δ = Σ weight · ΔW computed again, from whole modules in float64 and not by the code
that merged. What rounding may do is known: to the nearest, W' must be the value nearest to W + Δ (half a percent of the entries may
be its neighbour: sums in float32 decide close calls otherwise), stochastic, one of the two around it. Beside that the projection
⟨W' - W, Δ⟩ / ⟨Δ, Δ⟩ is compared with the one that rounding predicts, so that a wrong alpha, a transposed factor, exchanged q and k or a
layer that was left out is found where Δ is far below the dtype's resolution. All other tensors must be the base's, bit for bit.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from loratools.adapters.adapter import Entry, Module, NotExact, Site
from loratools.adapters.algebra import in_parallel
from loratools.adapters.factors import exact
from loratools.adapters.kinds.common import Scaled
from loratools.errors import CheckFailed, UnknownError
from loratools.mapping.bases import Base, Place
from loratools.operations.merging.arithmetic import MergedTensor
from loratools.operations.merging.placing import Given
from loratools.operations.merging.plan import MergePlan
from loratools.tensors.lazy import LazyTensor
from loratools.tensors.reader import open_source
from loratools.tensors.rounding import rounded, spacing

if TYPE_CHECKING:
    import torch

BLOCK = 1 << 19  # elements looked at at a time: a dozen float64 copies of them are in memory
SINGLE = 2.0**-20  # what a sum in float32 may be off by, relative to |W| + |Δ|
STRAYS = 0.005  # share of the entries that may be the other neighbour of the exact sum


@dataclass(frozen=True)
class SiteCheck:
    """One site: projection ⟨W' - W, Δ⟩ / ⟨Δ, Δ⟩ and residual |W' - W - Δ| / |Δ|, as found and as rounding predicts them."""

    tensor: str
    site: str
    projection: float
    expected_projection: float
    residual: float
    expected_residual: float
    reason: str = ""

    @property
    def deviation(self) -> float:
        return abs(self.projection - self.expected_projection)

    def as_json(self) -> dict[str, Any]:
        return {
            name: getattr(self, name) for name in ("tensor", "site", "projection", "expected_projection", "residual", "expected_residual")
        }

    def __str__(self) -> str:
        found = f"projection {self.projection:.4g}, expected {self.expected_projection:.4g}"
        return f"{self.tensor} ({self.site}): {self.reason}; {found}; residual {self.residual:.3g}, expected {self.expected_residual:.3g}"


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
            "worst": [check.as_json() for check in ranked[:5]],
        }


def verify_merge(plan: MergePlan, path: Path, made: Mapping[str, LazyTensor], threads: int | None = None) -> Verification:
    """Check a finished file or folder against base and adapters.

    path: of the output, still under its temporary name; made: every tensor that is not the base's own: merged ones, those cast to
    another dtype, and new scales (which are checked with their codes).
    Raises CheckFailed naming every tensor that holds something else.
    """
    tensors = {key: tensor for key, tensor in made.items() if isinstance(tensor, MergedTensor)}
    written = open_source(path)
    failures = _names_differ(plan, written.tensors, made) + _touched(plan, written.tensors, made)
    result = Verification(untouched=sum(key not in made for key in plan.source.tensors))
    for name, before in plan.bases.items():
        reader = _Reader(plan, before, Base(written, before.architecture), tensors)
        for checks in in_parallel(reader.check, list(_contributions(plan, name).items()), threads):
            result.sites += checks
    failures += [str(check) for check in result.sites if check.reason]
    gaps = [(tensor, start, stop) for tensor in tensors.values() for start, stop in _gaps(tensor)]
    for check in in_parallel(partial(_check_unchanged, written.tensors), gaps, threads):
        failures += [str(check)] if check.reason else []
    if failures:
        told = f"{path.name}: {len(failures)} checks of what was written did not hold; nothing was put in place"
        raise CheckFailed(told, details=failures)
    return result


def _names_differ(plan: MergePlan, written: Mapping[str, LazyTensor], made: Mapping[str, LazyTensor]) -> list[str]:
    """Tensors that are missing, that nothing asked for, or that have another dtype or shape than was planned."""
    expected = {**plan.source.tensors, **made}
    found = [f"{key}: is missing" for key in expected if key not in written]
    found += [f"{key}: was not in the base" for key in written if key not in expected]
    return found + [
        f"{key}: is {written[key].dtype} {list(written[key].shape)}, expected {tensor.dtype} {list(tensor.shape)}"
        for key, tensor in expected.items()
        if key in written and (written[key].dtype, written[key].shape) != (tensor.dtype, tensor.shape)
    ]


def _touched(plan: MergePlan, written: Mapping[str, LazyTensor], made: Collection[str]) -> list[str]:
    """Tensors no adapter changes whose bytes are not the base's."""
    found = []
    for key, tensor in plan.source.tensors.items():
        if key in made or key not in written:
            continue
        other = written[key]
        same = (tensor.dtype, tensor.shape) == (other.dtype, other.shape)
        if not same or not all(mine == theirs for mine, theirs in zip(tensor.chunks(), other.chunks(), strict=True)):
            found.append(f"{key}: no adapter changes it, but it is not the base's")
    return found


_Part = tuple[Given, Entry, float]


def _contributions(plan: MergePlan, architecture: str) -> dict[Site, list[_Part]]:
    """Site → what is to be added to it, from the adapters and the selection alone."""
    found: dict[Site, list[_Part]] = {}
    for given in plan.given:
        if given.architecture.name != architecture:
            continue
        for entry in given.adapter.entries:
            for site in entry.sites:
                weight = given.weight * (plan.selection.factor(site, given.architecture, given.name) or 0.0)
                if weight:
                    found.setdefault(site, []).append((given, entry, weight))
    return found


def _gaps(tensor: MergedTensor) -> Iterator[tuple[int, int]]:
    """The rows of a tensor that are no region's: of a fused weight whose other parts an adapter changes, of one that is only cast."""
    height, reached = tensor.shape[0] if tensor.shape else 1, 0
    for start, stop in sorted((region.place.start, tensor.end_of(region)) for region in tensor.regions):
        if start > reached:
            yield reached, start
        reached = max(reached, stop)
    if reached < height:
        yield reached, height


def _check_unchanged(written: Mapping[str, LazyTensor], gap: tuple[MergedTensor, int, int]) -> SiteCheck:
    """Rows no adapter changes: the base's, in the output's dtype."""
    import torch

    tensor, start, stop = gap
    storage, found = tensor.storage, written[tensor.name]
    sums = _Sums(storage.rounding.stochastic, found.dtype)
    step = max(BLOCK // max(math.prod(found.shape[1:]), 1) // storage.row_step, 1) * storage.row_step
    for first in range(start, stop, step):
        last = min(first + step, stop)
        base = storage.read(first, last).to(torch.float64)
        values, unit = storage.reread(found, written, first, last)
        sums.add(base, values.reshape(base.shape), torch.zeros_like(base), unit)
    return sums.check(tensor.name, f"rows {start} to {stop}, which no adapter changes")


class _Reader:
    """Both models, site by site."""

    def __init__(self, plan: MergePlan, before: Base, after: Base, tensors: Mapping[str, MergedTensor]) -> None:
        self.plan, self.before, self.after, self.tensors = plan, before, after, tensors
        self.places = {(region.site, region.role): region.place for regions in plan.placement.regions.values() for region in regions}

    def check(self, item: tuple[Site, Sequence[_Part]]) -> list[SiteCheck]:
        """The checks of a site's weight and bias."""
        return list(self._checks(*item))

    def _checks(self, site: Site, parts: Sequence[_Part]) -> Iterator[SiteCheck]:
        for role, changes in (("weight", "changes_weight"), ("bias", "changes_bias")):
            acting = [part for part in parts if getattr(part[1].module, changes)]
            place = self.places.get((site, role))
            if not acting or (place is None and role == "bias" and not any(entry.module.needs_bias for _, entry, _ in acting)):
                continue
            if place is None:
                yield SiteCheck(str(site), str(site), 0.0, 1.0, 1.0, 0.0, "was not merged")
            else:
                yield self._check(site, role, place, acting)

    def _check(self, site: Site, role: str, place: Place, parts: Sequence[_Part]) -> SiteCheck:
        wholes: dict[int, torch.Tensor] = {}  # ΔW of entries that give no rows by themselves, made once
        sums = _Sums(self.tensors[place.target].storage.rounding.stochastic, self.after.tensors[place.target].dtype)
        start, stop = place.start, self._stop(place)
        columns = max(math.prod(self.after.tensors[place.target].shape[1:]), 1)
        turned = place.swapped or place.transposed or role == "bias"
        step = stop - start if turned else max(BLOCK // columns, 1)
        step = max(step // self.tensors[place.target].storage.row_step, 1) * self.tensors[place.target].storage.row_step
        for first in range(start, stop, step):
            last = min(first + step, stop)
            base, found, unit = self._values(place, first, last)
            delta = self._delta(site, role, place, parts, first - start, last - start, wholes).reshape(base.shape)
            sums.add(base, found, delta, unit)
        return sums.check(place.target, f"{site}" if role == "weight" else f"{site} bias")

    def _stop(self, place: Place) -> int:
        """The last row, those of a grown tensor included."""
        grown = place.stop == self.before.tensors[place.key].shape[0]
        return self.after.tensors[place.target].shape[0] if grown else place.stop

    def _values(self, place: Place, first: int, last: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """(W, W', the value of one code) of these rows in the file's order, (rows, columns), float64."""
        import torch

        storage, tensor = self.tensors[place.target].storage, self.after.tensors[place.target]
        base = storage.read(first, last).to(torch.float64).reshape(last - first, -1)
        found, unit = storage.reread(tensor, self.after.tensors, first, last)
        return base, found.reshape(last - first, -1), unit if unit.dim() == 0 else unit.reshape(last - first, -1)

    def _delta(
        self, site: Site, role: str, place: Place, parts: Sequence[_Part], first: int, last: int, wholes: dict[int, torch.Tensor]
    ) -> torch.Tensor:
        """Σ weight · Δ of the site's rows first..last, in the file's order."""
        total: torch.Tensor | None = None
        for given, entry, weight in parts:
            del given
            offset = sum(entry.rows[: entry.sites.index(site)]) if len(entry.sites) > 1 else 0
            if role == "weight" and not (place.swapped or place.transposed or entry.swapped):
                part = self._rows(entry, weight, offset + first, offset + last, wholes)
            else:
                height = entry.rows[entry.sites.index(site)] if len(entry.sites) > 1 else None
                whole = self._whole_bias(entry, weight) if role == "bias" else self._whole(entry, weight, wholes)
                whole = _halves_swapped(whole) if entry.swapped else whole
                whole = whole[offset : offset + height] if height is not None else whole
                whole = _halves_swapped(whole) if place.swapped else whole
                part = (whole.t() if place.transposed else whole)[first:last]
            part = part.reshape(last - first, -1)
            total = part if total is None else total + part
        assert total is not None
        return total

    def _rows(self, entry: Entry, weight: float, first: int, last: int, wholes: dict[int, torch.Tensor]) -> torch.Tensor:
        """Rows of one entry's ΔW: through its factors' own rows where the kind has them, else of the whole."""
        module = entry.module
        if isinstance(module, Scaled) and type(module).delta_at is Module.delta_at:
            try:
                cut = module.rows_between(first, last)
                found: torch.Tensor = cut.delta() * weight
                return found
            except NotExact:
                pass
        return self._whole(entry, weight, wholes)[first:last]

    def _whole(self, entry: Entry, weight: float, wholes: dict[int, torch.Tensor]) -> torch.Tensor:
        import torch

        if id(entry) not in wholes:
            base = [self._padded(self._place(site, "weight")) for site in entry.sites]
            joined = torch.cat(base) if len(base) > 1 else base[0]
            wholes[id(entry)] = entry.module.delta_at(weight, _halves_swapped(joined) if entry.swapped else joined)
        return wholes[id(entry)]

    def _whole_bias(self, entry: Entry, weight: float) -> torch.Tensor:
        import torch

        base = torch.cat([exact(self.before.oriented(self._place(site, "bias"))) for site in entry.sites])
        change = entry.module.bias_delta(_halves_swapped(base) if entry.swapped else base)
        return torch.zeros_like(base) if change is None else change * weight

    def _place(self, site: Site, role: str) -> Place:
        """Where a site is; of one that the selection leaves out, too. Raises UnknownError."""
        place = self.places.get((site, role)) or self.before.place(site, role)
        if place is None:
            raise UnknownError(f"no {role} for {site}")
        return place

    def _padded(self, place: Place) -> torch.Tensor:
        """A site's weight in its own order, in float64, zero-padded where the output is larger."""
        import torch

        if place.target not in self.tensors:  # a part that the selection leaves out
            return exact(self.before.oriented(place))
        storage = self.tensors[place.target].storage
        values = storage.read(place.start, self._stop(place)).to(torch.float64)
        values = values.reshape(values.shape[0], *storage.shape[1:])
        values = _halves_swapped(values) if place.swapped else values
        return values.t().contiguous() if place.transposed else values


def _halves_swapped(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.roll(tensor.shape[0] // 2, 0)


# dtypes wide enough that a sum in the working precision, and not the last rounding, decides: relative to |W| + |Δ|
_WIDE = {"F32": 2e-6, "F64": 1e-12}


@dataclass
class _Sums:
    """What is summed over the blocks of a site. found and target: W' and W + Δ; step: the distance of two neighbours there."""

    stochastic: bool
    dtype: str
    count: int = 0
    strays: int = 0
    far: int = 0
    found: float = 0.0  # ⟨W' - W, Δ⟩
    expected: float = 0.0
    delta: float = 0.0  # ⟨Δ, Δ⟩
    noise: float = 0.0  # variance of ⟨W' - W, Δ⟩: of stochastic rounding, or of the entries that are not the nearest values
    size: float = 0.0  # |W|²
    residual: float = 0.0
    predicted: float = 0.0

    def add(self, base: torch.Tensor, found: torch.Tensor, delta: torch.Tensor, unit: torch.Tensor) -> None:
        """Take in a block: W, W' and Δ in float64, and what one code is worth (1 but for scaled codes)."""
        import torch

        target = base + delta
        near = target / unit if unit.dim() else target
        # by way of float32, twice rounded: what that changes is as rare as the close calls that are allowed anyway
        nearest = rounded(near if self.dtype == "F64" else near.to(torch.float32), self.dtype).to(torch.float64)
        nearest = nearest * unit if unit.dim() else nearest
        self.count += found.numel()
        moved = found - base
        self.found += _dot(moved, delta)
        self.delta += _dot(delta, delta)
        self.size += _dot(base, base)
        off = found - target
        self.residual += _dot(off, off)
        if self.stochastic:
            self._add_drawn(target, nearest, off, delta, unit)
            return
        other = found != nearest
        if not bool(other.any()):
            self.expected += _dot(moved, delta)
            self.predicted += _dot(off, off)
            return
        self.expected += _dot(nearest - base, delta)
        self.predicted += _dot(nearest - target, nearest - target)
        if self.dtype in _WIDE:
            return
        # The sum was made in float32, and where W and Δ cancel its error may be many steps of what is left.
        step = _steps(target[other], unit[other] if unit.dim() else unit, self.dtype)
        slack = SINGLE * (base[other].abs() + delta[other].abs())
        apart = (found - nearest)[other]
        self.strays += int((apart.abs() > 0.25 * step + slack).sum())
        self.far += int((apart.abs() > 1.001 * step + slack).sum())
        self.noise += _dot((apart * delta[other]).square(), torch.ones_like(apart))

    def _add_drawn(self, target: torch.Tensor, nearest: torch.Tensor, off: torch.Tensor, delta: torch.Tensor, unit: torch.Tensor) -> None:
        """Of a block that was rounded stochastically: each value is one of the two around its target, by chance."""
        step, away = _steps(target, unit, self.dtype), (target - nearest).abs()
        self.far += int((off.abs() > 1.75 * step).sum())  # the sum it was drawn from was a float32
        self.expected += _dot(delta, delta)
        variance = away * (step - away)
        self.noise += _dot(delta * delta, variance)
        self.predicted += float(variance.sum())

    def check(self, tensor: str, site: str) -> SiteCheck:
        scale = self.delta or 1.0
        projection, expected = self.found / scale, self.expected / scale
        residual, predicted = (math.sqrt(max(value, 0.0) / scale) for value in (self.residual, self.predicted))
        return SiteCheck(tensor, site, projection, expected, residual, predicted, self._reason(projection - expected))

    def _reason(self, deviation: float) -> str:
        """What did not hold; "" where everything did."""
        if not all(map(math.isfinite, (self.found, self.residual))):
            return "NaN or Inf was written"
        if self.dtype in _WIDE:
            allowed = _WIDE[self.dtype] * math.sqrt(self.size + self.delta)
            return "" if math.sqrt(self.residual) <= allowed else f"off by {math.sqrt(self.residual):.3g}, rounding allows {allowed:.3g}"
        if self.far:
            return f"{self.far} of {self.count} entries are off by more than one step of {self.dtype}"
        if self.strays > STRAYS * self.count + 3:
            return f"{self.strays} of {self.count} entries are not the nearest values"
        if abs(deviation) > 6 * math.sqrt(max(self.noise, 0.0)) / (self.delta or 1.0) + 1e-6:
            return "the projection on the delta is not what rounding predicts"
        return ""


def _steps(target: torch.Tensor, unit: torch.Tensor, dtype: str) -> torch.Tensor:
    """The distance of the two values of the file around each target; infinite where there is none above."""
    return (spacing(target / unit, dtype) * unit).nan_to_num(math.inf)


def _dot(first: torch.Tensor, second: torch.Tensor) -> float:
    return float(first.reshape(-1).dot(second.reshape(-1)))
