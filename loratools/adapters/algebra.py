"""Low-rank algebra: sums of products, their singular values through a QR core, the best truncation, balanced factors.

A delta is a product up (o, r) · down (r, n), n = in · kernel. Its singular value decomposition comes from the QR factors of both sides,

    up = Q_u R_u,  downᵀ = Q_d R_d,  R_u R_dᵀ = L Σ Rᵀ   ⟹   up · down = (Q_u L) Σ (Q_d R)ᵀ,

so that nothing of size (o, n) is made. Keeping the largest singular values is the best approximation of its rank in the Frobenius
norm (Eckart and Young, 1936). Everything is float64, pure, and free of absolute thresholds: a scaled delta has scaled results.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    import torch

    Pair = tuple[torch.Tensor, torch.Tensor]  # up (o, r), down (r, n)
    Svd = tuple[torch.Tensor, torch.Tensor, torch.Tensor]  # left (o, k), sigma (k) largest first, right (k, n)

T = TypeVar("T")
R = TypeVar("R")

DIRECT = 512  # the smaller side of a dense matrix up to which LAPACK's own SVD is fast enough
_CONDITION = 1e6  # two rounds of Cholesky keep all digits up to about 1e8
_TIE = 1e-12  # shares of Σσ² and ratios this close are equal but for their rounding


def joined(parts: Sequence[tuple[float, Pair]]) -> Pair:
    """(up (o, Σ r), down (Σ r, n)) of Σ scaleᵢ · upᵢ · downᵢ; the scales go into up."""
    import torch

    return torch.cat([up * scale for scale, (up, _) in parts], 1), torch.cat([down for _, (_, down) in parts])


def gram_inner(up: torch.Tensor, down: torch.Tensor, other_up: torch.Tensor, other_down: torch.Tensor) -> float:
    """⟨up · down, other_up · other_down⟩ (Frobenius) from Gram matrices: Σ (upᵀ other_up) ∘ (down other_downᵀ)."""
    return float(((up.t() @ other_up) * (down @ other_down.t())).sum())


def core(up: torch.Tensor, down: torch.Tensor) -> torch.Tensor:
    """R_u R_dᵀ, at most (r, r): it has the singular values and the norm of up · down."""
    import torch

    left: torch.Tensor = torch.linalg.qr(up, mode="r")[1]
    right: torch.Tensor = torch.linalg.qr(down.t(), mode="r")[1]
    return left @ right.t()


def difference_norm(ours: Pair, theirs: Pair) -> float:
    """‖up · down - other_up · other_down‖ (Frobenius) from the core of the joined factors.

    Gram matrices would lose half of the digits to cancellation: their error is √eps of the norms, that of the core eps.
    """
    return float(core(*joined([(1.0, ours), (-1.0, theirs)])).norm())


def orthonormal(thin: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Q (n, l), R (l, l) of thin (n, l): two rounds of Cholesky, many times faster than Householder's, which has the hard cases."""
    import torch

    basis, core = thin, torch.eye(thin.shape[1], device=thin.device, dtype=thin.dtype)
    for _ in range(2):
        factor, failed = torch.linalg.cholesky_ex(basis.t() @ basis)
        diagonal = factor.diagonal()
        if int(failed) or not float(diagonal.min()) * _CONDITION > float(diagonal.max()):
            basis, core = torch.linalg.qr(thin)
            break
        basis = torch.linalg.solve_triangular(factor, basis.t(), upper=False).t()
        core = factor.t() @ core
    return basis, core


def core_svd(up: torch.Tensor, down: torch.Tensor) -> Svd:
    """SVD of up (o, r) · down (r, n) through the QR core; k = min(o, r, n)."""
    import torch

    outer, left_core = orthonormal(up)
    inner, right_core = orthonormal(down.t())
    left, sigma, right = torch.linalg.svd(left_core @ right_core.t(), full_matrices=False)
    return outer @ left, sigma, right @ inner.t()


def matrix_svd(delta: torch.Tensor, limit: int | None = None) -> Svd:
    """SVD of a dense (o, n) matrix, at most the `limit` largest.

    Beyond a smaller side of 512 it comes from the eigenvectors U of the smaller Gram matrix, many times faster. Squaring loses the
    singular values below √eps ≈ 1.5e-8 of the largest, whose share of Σσ² is below eps; the other side is Uᵀ · delta, so what is kept
    is an orthogonal projection of delta itself, and σ are the lengths of its rows.
    """
    import torch

    if min(delta.shape) <= DIRECT:
        left, sigma, right = torch.linalg.svd(delta, full_matrices=False)
        return left[:, :limit], sigma[:limit], right[:limit]
    if delta.shape[0] > delta.shape[1]:
        left, sigma, right = matrix_svd(delta.t(), limit)
        return right.t(), sigma, left.t()
    vectors = torch.linalg.eigh(delta @ delta.t())[1].flip(1)[:, :limit]
    rows = vectors.t() @ delta
    sigma = torch.linalg.vector_norm(rows, dim=1)
    order = sigma.argsort(descending=True, stable=True)
    vectors, rows, sigma = vectors[:, order], rows[order], sigma[order]
    return vectors, sigma, rows / torch.where(sigma > 0, sigma, torch.ones_like(sigma))[:, None]


def noise_floor(sigma: torch.Tensor, size: int) -> float:
    """Singular values below this are rounding: largest · eps · the longer side (numpy's and MATLAB's rank)."""
    return float(sigma.max()) * 2.0**-52 * size if sigma.numel() else 0.0


@dataclass(frozen=True)
class Criterion:
    """How many singular values to keep; with nothing set, all of them.

    energy: share E of Σσ² to keep, Σ_{i≤k}σ² >= E Σσ²; error: relative Frobenius error e to stay within, √(Σ_{i>k}σ² / Σσ²) <= e.
    The fewest k are kept that meet both. ratio: none with σ₁/σᵢ above R; rank: none beyond the first N. These two cap the others.
    """

    rank: int | None = None
    energy: float | None = None
    error: float | None = None
    ratio: float | None = None

    @property
    def asked(self) -> bool:
        """Is anything to be left out?"""
        return self != Criterion()

    @property
    def adaptive(self) -> bool:
        """Does the spectrum settle the rank, or a number alone?"""
        return (self.energy, self.error, self.ratio) != (None, None, None)

    def keeps(self, sigma: torch.Tensor, size: int, tail: float = 0.0) -> int:
        """How many of `sigma` (k), largest first, to keep; at least 1, and none that is rounding.

        size: the longer side of the matrix, for what counts as rounding; tail: Σσ² of the values that were not computed. It counts
        in every total, and is lost whatever is kept.
        """
        found = max(int((sigma > noise_floor(sigma, size)).sum()), 1)
        squares = sigma[:found].square()
        lost = squares.flip(0).cumsum(0).flip(0) + tail  # lost[k]: Σσ² that goes by keeping k
        counts = [found]
        if self.energy is not None or self.error is not None:
            counts.append(int((lost > self._allowed_loss * (float(squares.sum()) + tail)).sum()))
        if self.ratio is not None:
            counts.append(int((sigma * (self.ratio * (1.0 + _TIE)) >= sigma[:1]).sum()))
        if self.rank is not None:
            counts.append(self.rank)
        return max(min(counts), 1)

    @property
    def _allowed_loss(self) -> float:
        """The share of Σσ² that may go: the smaller of 1 - E and e², ties (equal but for their rounding) counted as met."""
        by_energy = math.inf if self.energy is None else 1.0 - self.energy + _TIE
        by_error = math.inf if self.error is None else self.error**2 * (1.0 + _TIE)
        return min(by_energy, by_error)


def truncate(svd: Svd, rank: int) -> Svd:
    """The best approximation of rank `rank` (Eckart and Young, 1936)."""
    left, sigma, right = svd
    return left[:, :rank], sigma[:rank], right[:rank]


def balanced(svd: Svd) -> Pair:
    """(up, down) with √σ on both sides: neither factor under- or overflows a narrow dtype before the other."""
    left, sigma, right = svd
    root = sigma.sqrt()
    return left * root, root[:, None] * right


def in_parallel(function: Callable[[T], R], items: Sequence[T], threads: int | None = None) -> Iterator[R]:
    """function(item) of all items in their order, `threads` of them at the same time (None: as many as there are cores).

    Each runs with one BLAS thread, whatever `threads` is: the results are the same bits for any number.
    """
    import torch

    before = torch.get_num_threads()
    pool = ThreadPoolExecutor(threads or os.cpu_count() or 1, initializer=torch.set_num_threads, initargs=(1,))
    try:
        yield from pool.map(function, items)
    finally:
        pool.shutdown(cancel_futures=True)
        torch.set_num_threads(before)
