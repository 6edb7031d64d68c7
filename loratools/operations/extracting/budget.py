"""Ranks under a budget: which singular values of which site are worth their bytes.

A rank of a site costs one column of up and one row of down and takes σ² off the squared error. Singular values fall, so taking the
best σ² per byte again and again is the best a given number of bytes can do (but for the last few of them); every site keeps one.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

FIRST = 32  # singular values of a site that are looked at, until a budget asks for more of it

Spectra = Callable[[Mapping[str, int]], Mapping[str, Sequence[float]]]  # site → how many values, to site → those values


@dataclass(frozen=True)
class Cost:
    """What a rank of a site costs in bytes, and how many ranks it can have."""

    nbytes: int
    most: int


def spread(costs: Mapping[str, Cost], budget: int, spectra: Spectra) -> dict[str, int]:
    """Site → rank, with Σ rank · bytes within `budget` where a rank of 1 everywhere is.

    spectra is asked again, for twice as many values, for sites that would take all of those known.
    """
    depth = {name: min(FIRST, cost.most) for name, cost in costs.items()}
    known = dict(spectra(depth))
    while True:
        ranks = _greedy(costs, budget, known)
        short = {name: min(2 * depth[name], costs[name].most) for name, rank in ranks.items() if rank == depth[name] < costs[name].most}
        if not short:
            return ranks
        depth.update(short)
        known.update(spectra(short))


def _greedy(costs: Mapping[str, Cost], budget: int, known: Mapping[str, Sequence[float]]) -> dict[str, int]:
    ranks = dict.fromkeys(costs, 1)
    left = budget - sum(cost.nbytes for cost in costs.values())
    gains = [
        (-(value * value) / costs[name].nbytes, name)
        for name, values in known.items()
        for value in values[1:]
        if value > 0  # a site of rank 1 needs no second
    ]
    for _, name in sorted(gains):
        if costs[name].nbytes <= left:
            left -= costs[name].nbytes
            ranks[name] += 1
    return ranks
