"""The singular values of a module's ΔW, and the vectors of the largest, without a matrix of ΔW's own size.

    LoRA, tucker, LoHa   from the QR core of the factors (the exact LoRA of a LoHa is its Khatri-Rao product, rank r²)
    LoKr                 A ⊗ B = (L_A ⊗ L_B)(Σ_A ⊗ Σ_B)(R_A ⊗ R_B)ᵀ: every value is a product of one of each (Van Loan, 2000)

A matrix is made only where the rank of the exact LoRA reaches a side of the weight: the factors are as large then. Everything is float64.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

from loratools.adapters import algebra
from loratools.adapters.adapter import Module
from loratools.adapters.kinds import Lokr, Lora
from loratools.adapters.sums import Term
from loratools.operations.combining.recompress import Fit, value

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Spectrum:
    """ΔW by its singular values.

    sigma: all of them, (k), largest first; size: the longer side of ΔW as a matrix; top: n → the SVD of the n largest
    """

    sigma: torch.Tensor
    size: int
    top: Callable[[int], algebra.Svd]

    def fit(self, kept: algebra.Svd, written: Lora) -> Fit:
        """How far a LoRA made of the kept part is from ΔW, the rounding of its factors included.

        What is left out is orthogonal to the rows and the columns that are kept, so that its square and that of the rounding add up,
        but for products of two roundings.
        """
        left, sigma, right = kept
        up, down = written.matrices()
        rounding = algebra.difference_norm((up * written.scale, down), (left * sigma, right))
        squares = self.sigma.square()
        return Fit(rounding**2 + float(squares[len(sigma) :].sum()), float(squares.sum()))


def spectrum_of(module: Module) -> Spectrum:
    """The spectrum of a LoRA, LoHa or LoKr, its scale included."""
    if isinstance(module, Lokr):
        return _kronecker(module)
    truth = value([Term(0, 1.0, module)])
    svd = algebra.core_svd(*truth) if isinstance(truth, tuple) else algebra.matrix_svd(truth)
    return Spectrum(svd[1], max(svd[0].shape[0], svd[2].shape[1]), partial(algebra.truncate, svd))


def _kronecker(module: Lokr) -> Spectrum:
    first, second = (algebra.matrix_svd(matrix) for matrix in module.matrices())
    products = first[1].outer(second[1]).flatten() * abs(module.scale)
    sigma, order = products.sort(descending=True, stable=True)
    sign = -1.0 if module.scale < 0 else 1.0

    def top(rank: int) -> algebra.Svd:
        """Columns of L_A ⊗ L_B and rows of (R_A ⊗ R_B)ᵀ, one of each factor for each value."""
        import torch

        one, two = order[:rank] // len(second[1]), order[:rank] % len(second[1])
        left = torch.einsum("or,pr->opr", first[0][:, one], second[0][:, two]).flatten(0, 1)
        right = torch.einsum("ri,rj->rij", first[2][one], second[2][two]).flatten(1)
        return left * sign, sigma[:rank], right

    sides = first[0].shape[0] * second[0].shape[0], first[2].shape[1] * second[2].shape[1]
    return Spectrum(sigma, max(sides), top)
