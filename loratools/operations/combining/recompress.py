"""A sum of modules brought to a rank, site by site, with the error of what is written.

The truth of a site is the float64 sum of its inputs, held as joined factors wherever it is low-rank (no matrix of the weight's size is
made), dense otherwise: beside a full delta, for the sparse methods, or where the joined rank reaches the weight's own sides. Errors are
‖written - truth‖, with the factors as the file will hold them, rounding included.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, cast

from loratools.adapters import algebra
from loratools.adapters import factors as fac
from loratools.adapters.adapter import Module, Site
from loratools.adapters.kinds import Dense, Lora
from loratools.adapters.sums import Combined, Term, bias_of, low_rank, plain_lora, with_bias
from loratools.operations.combining.grouping import Group
from loratools.operations.combining.sparsify import METHODS, Draw
from loratools.tensors.dtypes import torch_dtype
from loratools.tensors.lazy import LazyTensor, from_torch

if TYPE_CHECKING:
    import torch

    Value = algebra.Pair | torch.Tensor  # joined factors, or the dense (o, n) matrix


@dataclass(frozen=True)
class Recipe:
    """How sites are combined. criterion: of the rank, empty for the exact sum; dtype: of new factors; holds: what the target can hold."""

    method: str = "sum"
    criterion: algebra.Criterion = field(default_factory=algebra.Criterion)
    density: float = 1.0
    seed: int = 0
    dtype: str = "F32"
    holds: frozenset[str] = frozenset()

    @property
    def shrinks(self) -> bool:
        return self.criterion.asked


@dataclass(frozen=True)
class Unit:
    """What becomes one module: one group, or several that the target has fused (None: a part without a module)."""

    sites: tuple[Site, ...]
    groups: tuple[Group | None, ...]
    heights: tuple[int, ...] = ()

    @property
    def present(self) -> list[Group]:
        return [group for group in self.groups if group is not None]

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the weight; () where only biases change."""
        shape = max((group.shape for group in self.present), key=len)
        return (sum(self.heights), *shape[1:]) if shape and len(self.groups) > 1 else shape

    @property
    def joined_rank(self) -> int | None:
        """Rank of the joined factors; None where a full delta is among them."""
        modules = [term.module for group in self.present for term in group.terms if term.module.changes_weight]
        return sum(plain_lora(module).rank or 0 for module in modules) if all(map(low_rank, modules)) else None

    def declared_rank(self, recipe: Recipe) -> int | None:
        """The rank this will have at most, None where its exact sum is kept: of rank N or less, norms, biases, kinds without a sum."""
        shape, joined, rank = self.shape, self.joined_rank, recipe.criterion.rank
        if not recipe.shrinks or len(shape) < 2 or not all(group.additive for group in self.present):
            return None
        most = min(shape[0], math.prod(shape[1:]))
        asked = most if rank is None else min(rank, most)
        if recipe.method != "sum":
            return asked
        fits = rank is not None and not recipe.criterion.adaptive and rank >= (most if joined is None else joined)
        if fits and (joined is not None or "dense" in recipe.holds):
            return None
        return asked if joined is None else min(asked, joined)


@dataclass(frozen=True)
class Fit:
    """How far a written unit is off: squared norms of the error and of the truth."""

    error: float
    norm: float

    @property
    def relative_error(self) -> float:
        if not math.isfinite(self.error):
            return math.inf
        return math.sqrt(self.error / self.norm) if self.norm else (0.0 if not self.error else math.inf)


# ------------------------------------------------------------------------------------------------------------------- the truth


def value(terms: Sequence[Term]) -> Value:
    """Σ weight · ΔW in float64: (up, down) where the joined rank is below both sides of the weight, else the (o, n) matrix."""
    weighty = [term for term in terms if term.module.changes_weight]
    if all(low_rank(term.module) for term in weighty):
        loras = [plain_lora(term.module) for term in weighty]
        if sum(lora.rank or 0 for lora in loras) < min(_sides(loras[0].shape)):
            return algebra.joined([(term.weight * lora.scale, _matrices(term.module)) for term, lora in zip(weighty, loras, strict=True)])
    parts = [_matrix(term.module.delta()) * term.weight for term in weighty]
    return sum(parts[1:], start=parts[0])


def _matrices(module: Module) -> algebra.Pair:
    """(up, down) in float64 of a low-rank module, without its scale."""
    return cast(Lora, module.to_lora("F64")).matrices()


def _matrix(delta: torch.Tensor) -> torch.Tensor:
    return delta.reshape(delta.shape[0], -1)


def _sides(shape: tuple[int | None, ...]) -> tuple[int, int]:
    known = [size for size in shape if size is not None]
    return known[0], math.prod(known[1:])


def dense(found: Value) -> torch.Tensor:
    return found[0] @ found[1] if isinstance(found, tuple) else found


def truth(unit: Unit, recipe: Recipe) -> Value:
    """What the unit's module should be: the sum, or what the sparse method makes of it."""
    values = [None if group is None else _of_group(group, recipe) for group in unit.groups]
    return values[0] if len(values) == 1 and values[0] is not None else _stacked(values, unit.heights)


def _of_group(group: Group, recipe: Recipe) -> Value:
    if recipe.method == "sum":
        return value(group.terms)
    weighty = [term for term in group.terms if term.module.changes_weight]
    by_input = {term.position: [other for other in weighty if other.position == term.position] for term in weighty}
    deltas = [dense(value([Term(term.position, 1.0, term.module) for term in terms])) for terms in by_input.values()]
    weights = [terms[0].weight for terms in by_input.values()]
    draws = [Draw(recipe.seed, str(group.sites[0]), position) for position in by_input]
    return METHODS[recipe.method](deltas, weights, recipe.density, draws)


def _stacked(values: Sequence[Value | None], heights: Sequence[int]) -> Value:
    """Parts of a fused module one below the other: block-diagonal factors, or rows of a matrix."""
    import torch

    present = [found for found in values if found is not None]
    if all(isinstance(found, tuple) for found in present):
        pairs = cast("list[algebra.Pair]", present)
        up = torch.zeros(sum(heights), sum(pair[0].shape[1] for pair in pairs), dtype=torch.float64)
        column = 0
        for found, start, height in zip(values, itertools.accumulate(heights, initial=0), heights, strict=False):
            if isinstance(found, tuple):
                up[start : start + height, column : column + found[0].shape[1]] = found[0]
                column += found[0].shape[1]
        return up, torch.cat([pair[1] for pair in pairs])
    width = dense(present[0]).shape[1]
    zero = [torch.zeros(height, width, dtype=torch.float64) for height in heights]
    return torch.cat([empty if found is None else dense(found) for found, empty in zip(values, zero, strict=True)])


def distance(theirs: Value, written: Sequence[Module]) -> Fit:
    """How far written modules are from the truth: from the joined factors, free of cancellation, where both are low-rank."""
    ours = value([Term(0, 1.0, module) for module in written])
    if isinstance(ours, tuple) and isinstance(theirs, tuple):
        return Fit(algebra.difference_norm(ours, theirs) ** 2, float(algebra.core(*theirs).norm()) ** 2)
    whole = dense(theirs)
    return Fit(float((dense(ours) - whole).norm()) ** 2, float(whole.norm()) ** 2)


# ------------------------------------------------------------------------------------------------------------------- the factors


def shrunk(unit: Unit, recipe: Recipe) -> tuple[list[Combined], Fit] | None:
    """The unit's best approximation and its error; None where the criterion keeps the full joined rank: the exact sum is as small."""
    found, criterion = truth(unit, recipe), recipe.criterion
    limit = None if criterion.adaptive else criterion.rank
    svd = algebra.core_svd(*found) if isinstance(found, tuple) else algebra.matrix_svd(found, limit)
    rank = criterion.keeps(svd[1], max(svd[0].shape[0], svd[2].shape[1]))
    if recipe.method == "sum" and rank == unit.joined_rank:
        return None
    up, down = algebra.balanced(algebra.truncate(svd, rank))
    module = _lora(unit, recipe, from_torch(up.to(torch_dtype(recipe.dtype))), from_torch(down.to(torch_dtype(recipe.dtype))))
    return [Combined(_biased(unit, module, recipe.holds))], distance(found, [module])


def declared(unit: Unit, recipe: Recipe, rank: int) -> Combined:
    """The module `shrunk` will make, as far as shapes go: for the plan, never computed."""
    out, inner = unit.shape[0], math.prod(unit.shape[1:])
    module = _lora(unit, recipe, fac.zeros(recipe.dtype, (out, rank)), fac.zeros(recipe.dtype, (rank, inner)))
    return Combined(_biased(unit, module, recipe.holds))


def _lora(unit: Unit, recipe: Recipe, up: LazyTensor, down: LazyTensor) -> Lora:
    """up (o, k) and down (k, n) as factors of a LoRA of the unit's shape, alpha = k."""
    rank, shape = up.shape[1], unit.shape
    if any(isinstance(term.module, Lora) and term.module.embedding for group in unit.present for term in group.terms):
        return Lora({"embedding_down": fac.transposed(up), "embedding_up": fac.transposed(down)}, float(rank), "tensor")
    up = up.reshape((up.shape[0], rank, *(1 for _ in shape[2:])))
    return Lora({"down": down.reshape((rank, *shape[1:])), "up": up}, float(rank), "tensor")


def _biased(unit: Unit, module: Module, holds: Collection[str]) -> Module:
    """The module with the plain weighted sum of the biases, whatever the method."""
    parts = [(None, True) if group is None else bias_of(group.terms) for group in unit.groups]
    if all(bias is None for bias, _ in parts):
        return module
    bias = parts[0][0] if len(parts) == 1 else fac.filled([bias for bias, _ in parts], unit.heights)
    return module if bias is None else with_bias(module, bias, all(scaled for _, scaled in parts), holds)


def sparse_norm(unit: Unit, recipe: Recipe) -> tuple[list[Combined], Fit]:
    """A 1-D delta (a norm's) under a sparse method: no factors, a dense one of what the method leaves."""
    found = dense(truth(unit, recipe))
    role = "w_norm" if any("w_norm" in term.module.factors for group in unit.present for term in group.terms) else "diff"
    module = Dense({role: from_torch(found.flatten().to(torch_dtype(recipe.dtype)))})
    return [Combined(_biased(unit, module, recipe.holds))], distance(found, [module])
