"""Sparse methods of combining deltas, one site at a time, on dense ΔW: TIES and DARE.

They act on deltas, never on factors (a sparse A and a sparse B make another product), and hold no absolute threshold:
method(k · τ) = k · method(τ). Tensors are float64 of one shape; inputs are not changed. Masks are drawn from (seed, site, position of the
input), so neither threads nor the order of sites and tensors make a difference.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

DENSITY = 0.5  # share of entries kept where none is asked for


@dataclass(frozen=True)
class Draw:
    """What a random method draws from: the seed of the command, the site, and the input's position."""

    seed: int
    site: str
    position: int

    def generator(self) -> torch.Generator:
        import torch

        text = f"{self.seed}\0{self.site}\0{self.position}".encode()
        return torch.Generator().manual_seed(int.from_bytes(hashlib.sha256(text).digest()[:8], "little") >> 1)


def ties(deltas: Sequence[torch.Tensor], weights: Sequence[float], density: float, draws: Sequence[Draw]) -> torch.Tensor:
    """Trim, elect a sign, disjoint mean (Yadav et al., 2023, arXiv:2306.01708).

    Each τ keeps its `density` largest entries by magnitude and is multiplied by its weight; an entry's sign is that of the sum; the
    result is the mean of the non-zero values that have it.
    """
    import torch

    trimmed = torch.stack([trim(delta, density) * weight for delta, weight in zip(deltas, weights, strict=True)])
    agreeing = trimmed * trimmed.sum(0).sign() > 0
    count = agreeing.sum(0).clamp(min=1)
    return torch.where(agreeing, trimmed, torch.zeros_like(trimmed)).sum(0) / count


def trim(delta: torch.Tensor, density: float) -> torch.Tensor:
    """The max(1, int(density · n)) entries of largest magnitude, zeros elsewhere; of equal ones the first in row order."""
    import torch

    size = delta.abs().flatten()
    kept = max(1, int(density * size.numel()))
    threshold = size.kthvalue(size.numel() - kept + 1).values
    mask = size > threshold
    equal = (size == threshold).nonzero().flatten()
    mask[equal[: kept - int(mask.sum())]] = True
    return torch.where(mask.reshape(delta.shape), delta, torch.zeros_like(delta))


def dare(deltas: Sequence[torch.Tensor], weights: Sequence[float], density: float, draws: Sequence[Draw]) -> torch.Tensor:
    """Drop and rescale (Yu et al., 2023, arXiv:2311.03099): each entry stays with probability `density`, divided by it; weighted sum."""
    import torch

    total = torch.zeros_like(deltas[0])
    for delta, weight, draw in zip(deltas, weights, draws, strict=True):
        kept = torch.rand(delta.shape, generator=draw.generator(), dtype=torch.float64) < density
        total += torch.where(kept, delta, torch.zeros_like(delta)) * (weight / density)
    return total


Method = Callable[["Sequence[torch.Tensor]", Sequence[float], float, Sequence[Draw]], "torch.Tensor"]
METHODS: dict[str, Method] = {"ties": ties, "dare": dare}
