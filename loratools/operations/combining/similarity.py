"""How alike the inputs of a combination are: inner products of their deltas, without their weights.

⟨ΔW_i, ΔW_j⟩ over all sites from Gram matrices of the factors, dense where a delta is; a site an adapter lacks is a zero. Kinds that
multiply the base weight have no delta of their own and are left out.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

from loratools.adapters import algebra
from loratools.adapters.sums import Term
from loratools.operations.combining.recompress import Unit, value

if TYPE_CHECKING:
    from loratools.operations.combining.recompress import Value

Gram = list[list[float]]


def gram(unit: Unit, count: int) -> Gram:
    """Inner products of `count` inputs at one unit: entry [i][j] of the inputs at positions i and j."""
    found = [[0.0] * count for _ in range(count)]
    for group in unit.present:
        terms = [term for term in group.terms if term.module.changes_weight]
        if not group.additive or not terms:
            continue
        by_input: dict[int, list[Term]] = {}
        for term in terms:
            by_input.setdefault(term.position, []).append(Term(term.position, 1.0, term.module))
        values = {position: value(own) for position, own in by_input.items()}
        for i, first in values.items():
            for j, second in values.items():
                if i <= j:
                    found[i][j] += inner(first, second)
                    found[j][i] = found[i][j]
    return found


def inner(first: Value, second: Value) -> float:
    """⟨first, second⟩ of two deltas, each factors or a matrix."""
    if isinstance(first, tuple) and isinstance(second, tuple):
        return algebra.gram_inner(*first, *second)
    if isinstance(first, tuple):
        return float((first[0] * (second @ first[1].t())).sum()) if not isinstance(second, tuple) else 0.0
    if isinstance(second, tuple):
        return inner(second, first)
    return float((first * second).sum())


def cosines(total: Gram) -> list[list[float | None]]:
    """The cosine of every two inputs: 1.0 on the diagonal, None where a norm is 0."""
    norms = [math.sqrt(max(row[position], 0.0)) for position, row in enumerate(total)]
    return [
        [None if not (norms[i] and norms[j]) else 1.0 if i == j else value / (norms[i] * norms[j]) for j, value in enumerate(row)]
        for i, row in enumerate(total)
    ]


def summed(grams: Sequence[Gram], count: int) -> Gram:
    """The sum of all units, in their order."""
    return [[math.fsum(found[i][j] for found in grams) for j in range(count)] for i in range(count)]


def weighted_norm(found: Gram, weights: Sequence[float]) -> float:
    """‖Σ weight · ΔW‖² = wᵀ G w."""
    size = range(len(weights))
    return max(math.fsum(weights[i] * weights[j] * found[i][j] for i in size for j in size), 0.0)
