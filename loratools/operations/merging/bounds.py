"""What rounding may do to a merged tensor, and whether what was written stays within it.

For rows of a site with W, W' (as written) and Δ in float64: rounded to the nearest, W' must be the value nearest to W + Δ (half a
percent of the entries may be its neighbour: sums in float32 decide close calls otherwise); rounded stochastically, one of the two
around it; in float32 and float64 the sum itself decides, and |W' - W - Δ| is bounded by a multiple of |W| and |Δ|. Beside that the
projection ⟨W' - W, Δ⟩ / ⟨Δ, Δ⟩ must be the one that rounding predicts, within six standard deviations of chance: so what is wrong is
found where Δ is far below the dtype's resolution.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

from loratools.operations.merging.arithmetic import dot
from loratools.tensors.rounding import rounded, spacing

if TYPE_CHECKING:
    import torch

SINGLE = 2.0**-20  # what a sum in float32 may be off by, relative to |W| + |Δ|
STRAYS = 0.005  # share of the entries that may be the other neighbour of the exact sum
STEP = 1.001  # one step of the dtype, but for the rounding of this very comparison
SIGMAS = 6.0

# dtypes wide enough that a sum in the working precision, and not the last rounding, decides: relative to |W| + |Δ|
_WIDE = {"F32": 2e-6, "F64": 1e-12}


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


@dataclass(frozen=True)
class _Block:
    """Rows of a site: W, W' and Δ in float64, the target W + Δ, and the value of the file nearest to it."""

    dtype: str
    base: torch.Tensor
    found: torch.Tensor
    delta: torch.Tensor
    unit: torch.Tensor  # of every entry, or one for all

    @cached_property
    def target(self) -> torch.Tensor:
        return self.base + self.delta

    @cached_property
    def nearest(self) -> torch.Tensor:
        import torch

        codes = self.target / self.unit if self.unit.dim() else self.target
        # by way of float32, twice rounded: what that changes is as rare as the close calls that are allowed anyway
        nearest = rounded(codes if self.dtype == "F64" else codes.to(torch.float32), self.dtype).to(torch.float64)
        return nearest * self.unit if self.unit.dim() else nearest

    def steps(self, where: Any = ...) -> torch.Tensor:
        """The distance of the two values of the file around each target; infinite where there is none above."""
        unit = self.unit[where] if self.unit.dim() else self.unit
        return (spacing(self.target[where] / unit, self.dtype) * unit).nan_to_num(math.inf)

    def slack(self, where: Any = ...) -> torch.Tensor:
        """What the sum in float32 may be off by; where W and Δ cancel, many steps of what is left."""
        return SINGLE * (self.base[where].abs() + self.delta[where].abs())


@dataclass
class SiteSums:
    """What is summed over the blocks of a site written in `dtype`, and the verdict on it."""

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
        """Take in a block: W, W' and Δ in float64 and of one shape, and what one code is worth (1 but for scaled codes)."""
        block = _Block(self.dtype, base, found, delta, unit)
        off = found - block.target
        self.count += found.numel()
        self.found += dot(found - base, delta)
        self.delta += dot(delta, delta)
        self.size += dot(base, base)
        self.residual += dot(off, off)
        if self.stochastic:
            self._add_drawn(block, off)
        else:
            self._add_nearest(block)

    def _add_nearest(self, block: _Block) -> None:
        """Each value is the nearest to its target, but for close calls and for what cancelled in float32."""
        rounding = block.nearest - block.target
        self.expected += dot(block.nearest - block.base, block.delta)
        self.predicted += dot(rounding, rounding)
        other = block.found != block.nearest
        if self.dtype in _WIDE or not bool(other.any()):
            return
        step, slack = block.steps(other), block.slack(other)
        apart = (block.found - block.nearest)[other]
        self.strays += int((apart.abs() > 0.25 * step + slack).sum())
        self.far += int((apart.abs() > STEP * step + slack).sum())
        moved = apart * block.delta[other]
        self.noise += dot(moved, moved)

    def _add_drawn(self, block: _Block, off: torch.Tensor) -> None:
        """Each value is one of the two around its target, by chance; where nothing is added to a value of the dtype, that value."""
        step, away = block.steps(), (block.target - block.nearest).abs()
        still = (block.delta == 0) & (away == 0)
        self.far += int(((off.abs() > STEP * step + block.slack()) | (still & (off != 0))).sum())
        self.expected += dot(block.delta, block.delta)
        variance = away * (step - away)
        self.noise += dot(block.delta * block.delta, variance)
        self.predicted += float(variance.sum())

    def check(self, tensor: str, site: str) -> SiteCheck:
        """The verdict: a SiteCheck whose reason is "" where everything held."""
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
        if abs(deviation) > SIGMAS * math.sqrt(max(self.noise, 0.0)) / (self.delta or 1.0) + 1e-6:
            return "the projection on the delta is not what rounding predicts"
        return ""
