"""The large singular values of a dense matrix from a few passes over it, how many of them are signal, and the proof of what is lost.

A basis Q of width rank + oversample is multiplied by D and Dᵀ in turn and made orthonormal after each product (Halko, Martinsson and
Tropp, 2011, algorithms 4.4 and 5.1). Each product is a sketch already: with Dᵀ Q = P R, P orthonormal, and R = A Σ Cᵀ,

    D ≈ Q Qᵀ D = (Q C) Σ (P A)ᵀ,        ‖D - Q_k Q_kᵀ D‖² = ‖D‖² - Σ_{i≤k}σ²,

so Σσ² grows from pass to pass, and a pass that adds less than `tolerance` of what is lost is the last. Products of a float32 D are
made in float32 as long as their rounding is far below what is lost, and in float64 from there on; everything else is float64.

Where the signal ends: singular values of (o, n) noise of standard deviation s stay below s (√o + √n) (Marchenko and Pastur, 1967).

Invariants: the same seed gives the same bits for any number of threads; a matrix times a power of two gives values times that power
and the same vectors; beside D there is at most one copy of it (none in the usual range), and the factors. NaN and Inf are the
caller's business.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

from loratools.adapters.algebra import DIRECT, Criterion, orthonormal, truncate

if TYPE_CHECKING:
    import torch

    from loratools.adapters.algebra import Svd

    Choice = Callable[[torch.Tensor, float], int]  # (sigma, Σσ² of the others) → how many to keep

SMALL = 256  # the smaller side up to which an exact decomposition is as quick
FIRST = 32  # the rank a search begins with
OVERSAMPLE = 16
TOLERANCE = 1e-3
ITERATIONS = 8  # without convergence after these, the spectrum is too flat for a sketch
_ROUNDED = 2e-4  # a share of ‖D‖² below this is too near the rounding of float32 products, 1e-7 at worst
_FLOOR = 1e-14  # a share of ‖D‖² below this is the rounding of float64 sums
_EPS = 2.0**-23  # of float32: the rounding of an entry is 0.2 of it on average, more where large entries are close together
_SAFETY = 1.1  # 3 units of Tracy and Widom's law above the edge at a side of 32, where one matrix in a thousand is, 10 units at 200
_BLOCK = 1 << 17  # entries converted to float64 at a time: they stay in the cache
_COLUMNS = 256  # columns of a Gram matrix at a time: fewer, and adding up takes longer than multiplying
_PLAIN = 2.0**32  # within this of 1, float32 products cannot overflow and lose nothing to the smallest values


@dataclass(frozen=True)
class Sketch:
    """The largest singular values of a matrix (o, n) and their vectors, all float64, on the matrix's device.

    left (o, k), sigma (k) largest first, right (k, n); tail: Σσ² of the values that were not computed, ‖D‖² - Σσ².
    """

    left: torch.Tensor
    sigma: torch.Tensor
    right: torch.Tensor
    tail: float

    @property
    def svd(self) -> Svd:
        return self.left, self.sigma, self.right

    def kept(self, rank: int) -> Sketch:
        """The first `rank` values; the others join the tail."""
        return Sketch(*truncate(self.svd, rank), self.tail + float(self.sigma[rank:].square().sum()))

    def times(self, factor: float) -> Sketch:
        """Of the matrix times `factor`."""
        return Sketch(self.left, self.sigma * factor, self.right, self.tail * factor * factor)


def sketch(
    delta: torch.Tensor,
    rank: int,
    *,
    seed: int,
    oversample: int = OVERSAMPLE,
    iterations: int | None = None,
    tolerance: float = TOLERANCE,
) -> Sketch:
    """The `rank` largest singular values of `delta` (o, n), float32 or float64, on any device; k = min(rank, o, n).

    iterations: power iterations, two passes each beside the first two; None: as few as `tolerance` allows, and an exact decomposition
    where 8 do not do. tolerance: a pass that adds less than this share of what is lost is the last. A small matrix, or a rank near
    half of its smaller side, is decomposed exactly at once. The first basis is drawn on the CPU from `seed`.
    """
    with _one_thread():
        matrix, unit = _scaled(delta)
        found = _sketch(matrix, rank, seed, oversample, iterations, tolerance) or _exact(matrix, lambda sigma, tail: rank)
        return found.times(unit)


def decompose(
    delta: torch.Tensor,
    criterion: Criterion,
    *,
    seed: int,
    exact: bool = False,
    auto: bool = False,
    oversample: int = OVERSAMPLE,
    iterations: int | None = None,
) -> tuple[Svd, float]:
    """What of `delta` (o, n) `criterion` keeps, and the Σσ² of what it does not.

    A spectrum that has to be seen is sketched with rank 32, 64, … until it holds more than is kept, exactly beyond a quarter of the
    smaller side. exact: no sketch at all. auto: no more than stands above the noise (`noise_rank`), and no more than makes factors
    smaller than `delta`. Rank, energy, error and ratio are judged on the values found, which a sketch has to within its tolerance.
    """
    smaller, size = min(delta.shape), max(delta.shape)
    limit = min(criterion.rank or smaller, smaller, _useful(delta.shape) if auto else smaller)

    def choice(sigma: torch.Tensor, tail: float) -> int:
        count = min(criterion.keeps(sigma, size, tail), limit)
        return min(count, noise_rank(sigma, tail, delta.shape)) if auto else count

    with _one_thread():
        matrix, unit = _scaled(delta)
        found = None
        for rank in [] if exact else _ranks(limit, smaller) if auto or criterion.adaptive else [limit]:
            found = _sketch(matrix, rank, seed, oversample, iterations, TOLERANCE)
            if found is None or rank == limit or choice(found.sigma, found.tail) < rank:
                break
            found = None
        found = found or _exact(matrix, choice)
        result = found.kept(choice(found.sigma, found.tail)).times(unit)
    return result.svd, result.tail


def _ranks(limit: int, smaller: int) -> Iterator[int]:
    """What a search for at most `limit` values tries before it takes them all."""
    rank = min(FIRST, limit)
    while 4 * rank <= smaller:
        yield rank
        if rank == limit:
            return
        rank = min(2 * rank, limit)


def noise_rank(sigma: torch.Tensor, tail: float, shape: tuple[int, ...]) -> int:
    """How many of `sigma` (k), largest first, of a matrix (o, n) = `shape` stand above its noise; at least 1.

    The noise of what is left without the first r values has the variance s² = Σ_{i>r}σ² / ((o-r)(n-r)), tail included, and no less
    than the rounding of a float32 matrix has; r is lowered until it is the number of values above s (√o + √n). It begins at
    o·n / (o+n), beyond which factors are larger than the matrix. Where the answer is all of `sigma`, more are needed to know.
    """
    out, inner = shape
    lost = [*sigma.square().flip(0).cumsum(0).flip(0).tolist(), 0.0]
    least = _EPS**2 * (lost[0] + tail) / (out * inner)
    rank = min(len(sigma), _useful(shape))
    while True:
        variance = (lost[rank] + tail) / max((out - rank) * (inner - rank), 1)
        edge = _SAFETY * math.sqrt(max(variance, least)) * (math.sqrt(out) + math.sqrt(inner))
        above = int((sigma > edge).sum())
        if above >= rank:
            return max(rank, 1)
        rank = above


def residual_norms(delta: torch.Tensor, up: torch.Tensor, down: torch.Tensor, block: int | None = None) -> tuple[float, float]:
    """(‖delta - up · down‖², ‖delta‖²), Frobenius, of factors as they are written: the certificate.

    delta (o, n), up (o, r, …), down (r, …) of any float dtype and device. In float64, `block` rows at a time: a residual of 1e-6 of
    `delta` keeps nine digits, where ‖delta‖² - Σσ² would have four.
    """
    import torch

    inner = down.to(delta.device, torch.float64).reshape(down.shape[0], -1)
    residual = total = 0.0
    with _one_thread():
        for start, rows in _blocks(delta, 0, block):
            outer = up[start : start + rows.shape[0]].to(delta.device, torch.float64).reshape(rows.shape[0], -1)
            total += _square(rows)
            residual += _square(rows.addmm_(outer, inner, alpha=-1.0))
    return residual, total


# --------------------------------------------------------------------------------------------------------------------- the sketch


def _sketch(matrix: torch.Tensor, rank: int, seed: int, oversample: int, iterations: int | None, tolerance: float) -> Sketch | None:
    """`sketch` of a matrix in units of its own; None where an exact decomposition is as quick, or the passes did not settle."""
    import torch

    smaller, width = min(matrix.shape), rank + oversample
    if smaller <= SMALL or 2 * width >= smaller:
        return None
    total = _square_norm(matrix)
    draw = torch.randn(matrix.shape[1], width, generator=torch.Generator().manual_seed(seed))
    basis, dtype = orthonormal(_product(matrix, draw.to(matrix.device), matrix.dtype))[0], matrix.dtype
    captured, last = -math.inf, 2 * (ITERATIONS if iterations is None else iterations)
    for step in range(last + 1):
        side = matrix if step % 2 else matrix.t()
        image, (turn, sigma, back) = _image(side, basis, dtype)
        if dtype == torch.float32 and _lost(total, sigma[:rank]) < _ROUNDED * total:
            dtype = torch.float64
            image, (turn, sigma, back) = _image(side, basis, dtype)
        before, captured = captured, float(sigma[:rank].square().sum())
        settled = captured - before <= max(tolerance * (total - captured), _FLOOR * total)
        if step == last if iterations is not None else settled:
            new, old = image @ turn[:, :rank], back[:rank] @ basis.t()
            left, right = (new, old) if step % 2 else (old.t(), new.t())
            return Sketch(left, sigma[:rank], right, _lost(total, sigma[:rank]))
        basis = image
    return None


def _image(side: torch.Tensor, basis: torch.Tensor, dtype: torch.dtype) -> tuple[torch.Tensor, Svd]:
    """side (o, n) · basis (n, l) = Q R: Q (o, l), and the SVD of R (l, l), on the CPU as long as it is worked out."""
    image, core = orthonormal(_product(side, basis, dtype))
    found = _exact(core.cpu(), lambda sigma, tail: len(sigma))
    return image, (found.left.to(core.device), found.sigma.to(core.device), found.right.to(core.device))


def _product(matrix: torch.Tensor, thin: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """matrix (o, n) · thin (n, l) in float64, the sums in `dtype`."""
    import torch

    if matrix.dtype == dtype:
        return (matrix @ thin.to(dtype)).to(torch.float64)
    thin = thin.to(torch.float64)
    return torch.cat([rows @ thin for _, rows in _blocks(matrix)])


def _lost(total: float, sigma: torch.Tensor) -> float:
    return max(total - float(sigma.square().sum()), 0.0)


# ------------------------------------------------------------------------------------------------------------------ exact, and sturdy


def _exact(matrix: torch.Tensor, choice: Choice) -> Sketch:
    """As many values as `choice` wants, in float64: by LAPACK's SVD or from the smaller Gram matrix, each the other's way out.

    The Gram matrix is quicker and needs no second copy; what it cannot see, a float32 matrix cannot hold.
    """
    import torch

    small = matrix.dtype == torch.float64 and min(matrix.shape) <= DIRECT
    first, second = (_direct, _from_gram) if small else (_from_gram, _direct)
    try:
        return first(matrix, choice)
    except torch.linalg.LinAlgError:  # type: ignore[attr-defined]
        return second(matrix, choice)


def _direct(matrix: torch.Tensor, choice: Choice) -> Sketch:
    import torch

    left, sigma, right = torch.linalg.svd(matrix.to(torch.float64), full_matrices=False)
    found = Sketch(left, sigma, right, 0.0)
    return found.kept(choice(found.sigma, 0.0))


def _from_gram(matrix: torch.Tensor, choice: Choice) -> Sketch:
    """From the eigenvectors U of the smaller Gram matrix; only the rows Uᵀ · matrix that are wanted are made.

    Squaring loses the singular values below √eps ≈ 1.5e-8 of the largest, whose share of Σσ² is below eps; σ are the lengths of
    the rows, so that what is kept is an orthogonal projection of the matrix itself.
    """
    import torch

    if matrix.shape[0] > matrix.shape[1]:
        found = _from_gram(matrix.t(), choice)
        return Sketch(found.right.t(), found.sigma, found.left.t(), found.tail)
    gram = torch.zeros(matrix.shape[0], matrix.shape[0], device=matrix.device, dtype=torch.float64)
    for _, columns in _blocks(matrix, 1, _COLUMNS):
        gram.addmm_(columns, columns.t())
    total = float(gram.trace())
    values, vectors = torch.linalg.eigh(gram)
    count = choice(values.flip(0).clamp(min=0.0).sqrt(), 0.0)
    vectors = vectors.flip(1)[:, :count]
    rows = gram.new_empty(vectors.shape[1], matrix.shape[1])
    for start, columns in _blocks(matrix, 1, _COLUMNS):
        rows[:, start : start + columns.shape[1]] = vectors.t() @ columns
    sigma = torch.linalg.vector_norm(rows, dim=1)
    rows /= torch.where(sigma > 0, sigma, torch.ones_like(sigma))[:, None]
    order = sigma.argsort(descending=True, stable=True)
    return Sketch(vectors[:, order], sigma[order], rows[order], _lost(total, sigma))


# ------------------------------------------------------------------------------------------------------------------------- the parts


def _scaled(delta: torch.Tensor) -> tuple[torch.Tensor, float]:
    """(delta / unit, unit): the unit is a power of two, 1 where the largest entry is near enough to it."""
    low, high = (float(bound) for bound in delta.aminmax())
    peak = max(-low, high)
    if peak == 0 or 1 / _PLAIN <= peak <= _PLAIN:
        return delta, 1.0
    exponent = math.frexp(peak)[1]
    half = -exponent // 2  # in two steps: the reciprocal of a subnormal peak is beyond the dtype
    return (delta * 2.0**half).mul_(2.0 ** (-exponent - half)), 2.0**exponent


def _blocks(matrix: torch.Tensor, axis: int = 0, size: int | None = None) -> Iterator[tuple[int, torch.Tensor]]:
    """(start, rows or columns from there) in float64, each in memory of its own, `size` or a few megabytes at a time."""
    import torch

    size = size or max(_BLOCK // matrix.shape[1 - axis], 16)
    for start in range(0, matrix.shape[axis], size):
        part = matrix.narrow(axis, start, min(size, matrix.shape[axis] - start))
        yield start, part.to(torch.float64, copy=True)


def _square(matrix: torch.Tensor) -> float:
    return float(matrix.square().sum())


def _square_norm(matrix: torch.Tensor) -> float:
    """‖matrix‖² in float64, without a copy of the matrix."""
    return math.fsum(_square(rows) for _, rows in _blocks(matrix))


def _useful(shape: tuple[int, ...]) -> int:
    """The rank from which on factors are no smaller than the matrix (o, n): o·n / (o + n); at least 1."""
    return max(shape[0] * shape[1] // (shape[0] + shape[1]), 1)


@contextmanager
def _one_thread() -> Iterator[None]:
    """One BLAS thread: sums are made in the same order whatever the caller's number of threads is."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
