"""One module brought to a smaller rank: the best approximation of its ΔW as a LoRA (Eckart and Young, 1936), at the scale it had.

    ΔW = L Σ Rᵀ,  s = alpha / rank   ⟹   up = L_k √(Σ_k / s),  down = √(Σ_k / s) R_kᵀ,  alpha = s · k

A module whose rank fits stays the object it is, to the bit. Factors are computed in float64 and rounded once; an alpha that a tensor
will hold is rounded to float32 first, so that the factors make up for it.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from fractions import Fraction
from typing import TYPE_CHECKING

from loratools.adapters import factors as fac
from loratools.adapters.adapter import Module
from loratools.adapters.algebra import Criterion, balanced
from loratools.adapters.kinds import Lora, Replacement
from loratools.adapters.kinds.common import Scaled
from loratools.adapters.sums import Term, low_rank
from loratools.mapping.fitting import fit_dtype, fit_shape_of, narrows
from loratools.mapping.rules import Row
from loratools.operations.combining.recompress import Fit, distance, value
from loratools.operations.resizing.spectrum import spectrum_of
from loratools.tensors.dtypes import torch_dtype
from loratools.tensors.lazy import LazyTensor, from_torch, scalar_tensor

if TYPE_CHECKING:
    import torch

    from loratools.adapters.algebra import Svd

FLOATS = ("F16", "BF16", "F32", "F64")  # of new factors; those of a narrower dtype become float32


@dataclass(frozen=True)
class Goal:
    """What modules are brought to.

    linear, conv: what is kept of matrices and 1x1 convolutions, of larger kernels; plain: LoHa, LoKr and tucker become LoRA even where
    their rank fits; scale: one for all modules, None where each keeps its own; dtype: of all factors, None where each keeps its own
    alpha: where the file keeps it, "tensor" | "config" | "header" | "none"
    """

    linear: Criterion
    conv: Criterion
    alpha: str
    plain: bool = False
    scale: Fraction | None = None
    dtype: str | None = None

    def criterion(self, module: Module) -> Criterion:
        return self.conv if kernel(module) else self.linear

    def scale_of(self, module: Scaled) -> Fraction:
        """The scale its factors will stand under: 1 where no record could say another."""
        if self.alpha == "none" and "alpha" not in module.factors:
            return Fraction(1)
        return module.scale_of(module.alpha) if self.scale is None else self.scale


@dataclass(frozen=True)
class Resized:
    """A module as it will be written. fit: how far its ΔW is off; None where none can be told (biases, replaced weights)."""

    module: Module
    fit: Fit | None = None


def kernel(module: Module) -> bool:
    """Is it of a convolution larger than 1x1? (Factors of two dimensions do not say it, the layer does.)"""
    return any(size not in (1, None) for size in module.options.get("kernel") or module.shape[2:])


def resizable(module: Module) -> bool:
    """Can it be cut, or has it no rank to cut? Kinds that multiply the base weight are neither."""
    return module.linear or isinstance(module, Replacement)


def lora_rank(module: Module) -> int:
    """The rank of the exact LoRA of a low-rank module, from shapes: r of a LoRA, r² of a LoHa, the product of both ranks of a LoKr."""
    return module.to_lora().rank or 0


def common_scale(modules: Iterable[Module]) -> Fraction:
    """The scale that most modules have."""
    scales = Counter(module.scale_of(module.alpha) for module in modules if isinstance(module, Scaled))
    return scales.most_common(1)[0][0]


def _most(module: Module) -> int:
    """The rank up to which a module is kept as it is: that of a LoRA's factors; of other kinds, no more than ΔW can have."""
    rank = lora_rank(module)
    if isinstance(module, Lora):
        return rank
    known = [size for size in module.shape if size is not None]
    return min(rank, known[0], math.prod(known[1:]))


def _may_shrink(module: Module, criterion: Criterion) -> bool:
    return criterion.asked and (criterion.adaptive or (criterion.rank or 0) < _most(module))


# ------------------------------------------------------------------------------------------------------------------------- one


def resized(module: Module, goal: Goal, row: Row | None) -> Resized:
    """The module as the goal wants it, and how far it is off. row: of its site, for the shapes of new factors.

    Raises NotExact where the scale it has to stand under exceeds its factors' dtype.
    """
    if not low_rank(module):
        return _cast(module, module, goal)
    criterion = goal.criterion(module)
    if _may_shrink(module, criterion):
        spectrum = spectrum_of(module)
        rank = criterion.keeps(spectrum.sigma, spectrum.size)
        if rank < _most(module):
            kept = spectrum.top(rank)
            made = _truncated(module, kept, goal, row)
            return Resized(made, spectrum.fit(kept, made))
    return _cast(module, _kept(module, goal, row), goal)


def declared(module: Module, goal: Goal, row: Row | None) -> Resized:
    """The module as it will be at most, as far as shapes go: for the plan, never computed."""
    if not low_rank(module):
        return Resized(module if goal.dtype is None else fit_dtype(module, goal.dtype, narrow=True))
    criterion = goal.criterion(module)
    if not _may_shrink(module, criterion):
        made = module.to_lora(_dtype(module, goal)) if goal.plain else module
        return Resized(made if goal.dtype is None else fit_dtype(made, goal.dtype, narrow=True))
    known = [size for size in module.shape if size is not None]
    out, inner = known[0], math.prod(known[1:])
    rank = min(lora_rank(module), out, inner, *([] if criterion.rank is None else [criterion.rank]))
    dtype = _dtype(module, goal)
    return Resized(_lora(module, fac.zeros(dtype, (out, rank)), fac.zeros(dtype, (rank, inner)), goal, row))


def _kept(module: Module, goal: Goal, row: Row | None) -> Module:
    """The same ΔW: the object itself, or as plain LoRA, or under the scale it has to have."""
    made = module
    if goal.plain and (not isinstance(module, Lora) or module.tucker):
        made = fit_shape_of(module.to_lora(_dtype(module, goal)), row) if row else module.to_lora(_dtype(module, goal))
    if not isinstance(made, Scaled):
        return made
    scale = goal.scale_of(made)
    alpha, stored = _alpha(made, made.divisor or 0, scale, goal)
    if scale != made.scale_of(made.alpha):
        made = made.folded() if alpha is None else made.with_alpha(alpha)
    if stored is not None and "alpha" not in made.factors:
        made = made.with_factors({**made.factors, "alpha": stored}, alpha=alpha)
    return made


def _cast(before: Module, made: Module, goal: Goal) -> Resized:
    """In the dtype asked for, with what that (or another form) takes from ΔW."""
    narrowed = goal.dtype is not None and narrows(made, goal.dtype)
    if goal.dtype is not None and any(tensor.dtype != goal.dtype for role, tensor in made.factors.items() if role != "alpha"):
        made = fit_dtype(made, goal.dtype, narrow=True)
    if not before.changes_weight or not before.linear:
        return Resized(made)
    if made is before or not (narrowed or made.rounded or made.kind != before.kind or "mid" in before.factors.keys() - made.factors.keys()):
        return Resized(made, Fit(0.0, before.norm() ** 2))
    return Resized(made, distance(value([Term(0, 1.0, before)]), [made]))


# ------------------------------------------------------------------------------------------------------------------- new factors


def _truncated(module: Module, kept: Svd, goal: Goal, row: Row | None) -> Lora:
    """A LoRA of the kept part, balanced, under its scale."""
    left, sigma, right = kept
    scale = _lora(module, fac.zeros("F32", left.shape), fac.zeros("F32", right.shape), goal, row).scale
    up, down = balanced((left if scale > 0 else -left, sigma / abs(scale), right))
    dtype = _dtype(module, goal)

    def rounded(factor: torch.Tensor) -> LazyTensor:
        return from_torch(factor.to(torch_dtype(dtype)))

    return _lora(module, rounded(up), rounded(down), goal, row)


def _lora(module: Module, up: LazyTensor, down: LazyTensor, goal: Goal, row: Row | None) -> Lora:
    """up (o, k) and down (k, i · kernel) as a LoRA in the shapes of the module's own factors, with its biases."""
    assert isinstance(module, Scaled)
    rank, scale = up.shape[1], goal.scale_of(module)
    alpha, stored = _alpha(module, rank, scale, goal)
    pair = {"down": down, "up": up}
    if isinstance(module, Lora) and module.embedding:
        pair = {"embedding_down": fac.transposed(up), "embedding_up": fac.transposed(down)}
    elif isinstance(module, Lora) and not module.tucker:
        own = module.factors
        pair = {"down": down.reshape((rank, *own["down"].shape[1:])), "up": up.reshape((*up.shape, *own["up"].shape[2:]))}
    else:
        shape = tuple(size for size in module.shape if size is not None)
        pair = {"down": down.reshape((rank, *shape[1:])), "up": up.reshape((*up.shape, *(1 for _ in shape[2:])))}
    biases = {role: tensor for role, tensor in module.factors.items() if role in ("bias", "diff_b")}
    ratio = module.scale_of(module.alpha) / scale
    if "bias" in biases and ratio != 1:
        biases["bias"] = fac.multiplied(biases["bias"], ratio)[0]
    if goal.dtype is not None:
        biases = {role: fac.cast(tensor, goal.dtype) for role, tensor in biases.items()}
    options = {name: value for name, value in module.options.items() if name == "kernel"}
    factors = {**pair, **biases, **({} if stored is None else {"alpha": stored})}
    made = Lora(factors, alpha, module.alpha_source, options)
    changed = row is not None and (not isinstance(module, Lora) or module.tucker)
    fitted = fit_shape_of(made, row) if changed and row is not None else made
    assert isinstance(fitted, Lora)
    return fitted


def _alpha(module: Scaled, rank: int, scale: Fraction, goal: Goal) -> tuple[float | None, LazyTensor | None]:
    """alpha of a module of this rank at this scale, and its tensor where the file has one: float32, whatever the factors are."""
    stored = module.factors.get("alpha")
    if stored is None and (goal.alpha == "none" or (module.alpha is None and scale == 1)):
        return None, None
    value = float(scale * rank)
    if stored is None and goal.alpha != "tensor":
        return value, None
    tensor = scalar_tensor(value, "F64" if stored is not None and stored.dtype == "F64" else "F32", stored.shape if stored else ())
    return tensor.scalar(), tensor


def _dtype(module: Module, goal: Goal) -> str:
    """Of new factors: what is asked for, else what holds the module's own."""
    found = fac.widest([tensor for role, tensor in module.factors.items() if role != "alpha" and fac.is_float(tensor)])
    return goal.dtype or (found if found in FLOATS else "F32")


def padded(module: Lora, rank: int, goal: Goal) -> Lora:
    """The same ΔW at a larger rank: columns of zeros in up, rows of zeros in down, alpha at the same scale."""
    extra = rank - (module.rank or 0)
    if not extra:
        return module
    first, second = module.spread_roles
    up, down = module.factors[first], module.factors[second]
    factors = {
        **module.factors,
        first: fac.cat([up, fac.zeros(up.dtype, (up.shape[0], extra, *up.shape[2:]))], 1),
        second: fac.cat([down, fac.zeros(down.dtype, (extra, *down.shape[1:]))]),
    }
    alpha, stored = _alpha(module, rank, goal.scale_of(module), goal)
    return module.with_factors(factors if stored is None else {**factors, "alpha": stored}, alpha=alpha)
