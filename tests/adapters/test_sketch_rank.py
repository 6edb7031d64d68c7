"""How many singular values a criterion keeps of a matrix, found from sketches, and where the noise begins."""

from __future__ import annotations

import math

import pytest
import torch

from loratools.adapters.algebra import Criterion
from loratools.adapters.sketch import decompose, noise_rank
from tests.adapters.test_sketch import F64, SHAPES, best_error, random, spectrum, with_values


def kept(delta: torch.Tensor, criterion: Criterion, **options: bool) -> int:
    return len(decompose(delta, criterion, seed=0, **options)[0][1])


def smallest_rank(delta: torch.Tensor, allowed: float) -> int:
    """The fewest values that leave no more than `allowed` of Σσ², from LAPACK's."""
    squares = torch.linalg.svdvals(delta.to(F64)).square()
    total = float(squares.sum())
    return next(rank for rank in range(1, len(squares) + 1) if float(squares[rank:].sum()) <= allowed * total)


@pytest.mark.parametrize("exact", [False, True])
@pytest.mark.parametrize(
    ("criterion", "allowed"),
    [
        (Criterion(energy=0.9), 0.1),
        (Criterion(energy=0.99), 0.01),
        (Criterion(error=0.2), 0.04),
        (Criterion(energy=0.5, error=0.15), 0.0225),
    ],
)
def test_the_smallest_rank_that_will_do(criterion: Criterion, allowed: float, exact: bool) -> None:
    """Of σᵢ = 1/i, 0.9 asks for 6 values and 0.99 for 54: one sketch, and two."""
    delta = spectrum("harmonic", *SHAPES[0])
    assert kept(delta, criterion, exact=exact) == smallest_rank(delta, allowed)


def test_a_search_doubles_and_ends_with_all_of_them() -> None:
    delta = spectrum("root", 600, 800)
    wanted = smallest_rank(delta, 0.1)
    assert wanted > 150
    (left, sigma, right), tail = decompose(delta, Criterion(energy=0.9), seed=0)
    assert len(sigma) == wanted
    assert float((delta.to(F64) - left * sigma @ right).norm()) == pytest.approx(best_error(delta, wanted), rel=1e-9)
    assert math.sqrt(tail) == pytest.approx(best_error(delta, wanted), rel=1e-9)


def test_a_rank_is_a_cap_on_every_other_wish() -> None:
    delta = spectrum("root", 600, 800)
    assert kept(delta, Criterion(rank=50, energy=0.99)) == 50
    assert kept(delta, Criterion(rank=5)) == 5
    assert kept(delta, Criterion(rank=50, ratio=4.06)) == 16, "1/√16 is a quarter, 1/√17 less than 1/4.1"
    assert kept(delta, Criterion(rank=5000)) == 600


def test_the_tail_counts_what_was_found_and_not_kept() -> None:
    delta = spectrum("harmonic", *SHAPES[0])
    (left, sigma, right), tail = decompose(delta, Criterion(energy=0.9), seed=0)
    assert len(sigma) < 32
    assert math.sqrt(tail) == pytest.approx(float((delta.to(F64) - left * sigma @ right).norm()), rel=1e-6)


def test_everything_is_kept_where_nothing_is_asked() -> None:
    delta = random(40, 60).float()
    (left, sigma, right), tail = decompose(delta, Criterion(), seed=0)
    assert float((delta.to(F64) - left * sigma @ right).norm()) <= 1e-12 * float(delta.norm())
    assert tail <= 1e-13 * float(delta.norm()) ** 2


# -------------------------------------------------------------------------------------------------------------------------- the noise


def planted(rank: int, out: int, inner: int, smallest: float = 0.05) -> torch.Tensor:
    return with_values(torch.linspace(1.0, smallest, rank, dtype=F64), out, inner, seed=11)


def noise(out: int, inner: int, edge: float, seed: int = 0) -> torch.Tensor:
    """Gaussian, the largest singular value about `edge`."""
    return random(out, inner, seed=seed) * (edge / (math.sqrt(out) + math.sqrt(inner)))


@pytest.mark.parametrize("shape", [(64, 64), (64, 200), (320, 400), (700, 300)])
@pytest.mark.parametrize("rank", [5, 16])
@pytest.mark.parametrize("level", [0.9, 0.5, 0.1, 1e-3])
def test_a_planted_rank_is_found_under_noise(rank: int, shape: tuple[int, int], level: float) -> None:
    """level: the largest singular value of the noise, of the smallest of the signal."""
    delta = (planted(rank, *shape) + noise(*shape, 0.05 * level)).float()
    assert abs(kept(delta, Criterion(), auto=True) - rank) <= 1


@pytest.mark.parametrize("shape", [(200, 200), (320, 400)])
def test_a_signal_a_quarter_above_the_noise_is_found_whole(shape: tuple[int, int]) -> None:
    delta = (with_values(torch.ones(16, dtype=F64), *shape) + noise(*shape, 0.8)).float()
    assert kept(delta, Criterion(), auto=True) == 16


@pytest.mark.parametrize("rank", [1, 5, 16])
@pytest.mark.parametrize("shape", [(64, 64), (96, 400), (320, 400)])
def test_rounding_is_noise(rank: int, shape: tuple[int, int]) -> None:
    signal = planted(rank, *shape)
    assert kept(signal, Criterion(), auto=True) == rank, "nothing but the rounding of float64"
    assert kept(signal.float(), Criterion(), auto=True) == rank, "each entry rounded to float32"
    weight = 0.02 * random(*shape)
    change = signal * (2e-4 / float(signal.std()))
    tuned, base = (weight + change).float(), weight.float()
    assert abs(kept(tuned - base, Criterion(), auto=True) - rank) <= 1
    halves = (weight + change).half().float() - weight.half().float()
    assert abs(kept(halves, Criterion(), auto=True) - rank) <= 1


@pytest.mark.parametrize("shape", [(30, 30), (64, 500), (300, 400)])
def test_noise_alone_has_a_rank_of_one(shape: tuple[int, int]) -> None:
    assert kept(random(*shape).float(), Criterion(), auto=True) == 1


def test_more_signal_than_the_first_sketch_holds() -> None:
    delta = (planted(60, 400, 600, smallest=0.3) + noise(400, 600, 0.1)).float()
    assert kept(delta, Criterion(), auto=True) == 60
    assert kept(delta, Criterion(rank=40), auto=True) == 40


def test_factors_are_never_larger_than_the_matrix() -> None:
    delta = with_values(torch.ones(60, dtype=F64), 60, 90).float()
    assert kept(delta, Criterion(), auto=True) <= 60 * 90 // 150


def test_all_that_was_computed_may_be_signal() -> None:
    """The result is then the number of values: more are needed to know."""
    values = torch.linalg.svdvals(planted(20, 300, 400) + noise(300, 400, 0.01))
    squares = values.square()
    assert noise_rank(values[:10], float(squares[10:].sum()), (300, 400)) == 10
    assert noise_rank(values[:30], float(squares[30:].sum()), (300, 400)) == 20
    assert noise_rank(values, 0.0, (300, 400)) == 20
