"""How many singular values a criterion keeps, worked out by hand from their squares."""

from __future__ import annotations

import math
from collections.abc import Sequence

import pytest
import torch

from loratools.adapters.algebra import Criterion


def of_squares(*squares: float) -> torch.Tensor:
    return torch.tensor(squares, dtype=torch.float64).sqrt()


@pytest.mark.parametrize(("energy", "expected"), [(1e-9, 1), (0.9, 1), (0.94, 2), (0.95, 2), (0.96, 3), (1.0, 3)])
def test_energy_is_the_fewest_with_its_share(energy: float, expected: int) -> None:
    """Shares 0.9, 0.05 and 0.05 of Σσ², in any unit."""
    for scale in (1.0, 1e-150, 1e100):
        assert Criterion(energy=energy).keeps(of_squares(0.9, 0.05, 0.05) * scale, 100) == expected


@pytest.mark.parametrize(
    ("error", "expected"),
    [(0.0, 3), (0.22, 3), (math.sqrt(0.05), 2), (0.3, 2), (math.sqrt(0.1), 1), (0.999, 1), (5.0, 1)],
)
def test_error_is_the_fewest_within_it(error: float, expected: int) -> None:
    """Keeping 1 is off by √0.1 = 0.316, keeping 2 by √0.05 = 0.2236."""
    for scale in (1.0, 1e-150, 1e100):
        assert Criterion(error=error).keeps(of_squares(0.9, 0.05, 0.05) * scale, 100) == expected


def test_a_small_error_is_taken_at_its_word() -> None:
    """An error of 1e-7 is a share of 1e-14: no slack may swallow it."""
    sigma = of_squares(1.0, 4e-14, 1e-14)
    assert [Criterion(error=error).keeps(sigma, 10) for error in (3e-7, 1.5e-7, 0.5e-7)] == [1, 2, 3]


@pytest.mark.parametrize(("ratio", "expected"), [(1.0, 2), (1.9, 2), (2.0, 3), (9.99, 3), (10.0, 4), (1e9, 4), (1e30, 4)])
def test_ratio_keeps_all_within_it_of_the_largest(ratio: float, expected: int) -> None:
    """σ = 10, 10, 5, 1 and one of rounding."""
    sigma = torch.tensor([10.0, 10.0, 5.0, 1.0, 1e-16], dtype=torch.float64)
    for scale in (1.0, 0.1, 1e-150, 1e100):
        assert Criterion(ratio=ratio).keeps(sigma * scale, 100) == expected


@pytest.mark.parametrize(
    ("criterion", "expected"),
    [
        (Criterion(), 3),
        (Criterion(rank=2), 2),
        (Criterion(rank=9), 3),
        (Criterion(rank=2, energy=1.0), 2),
        (Criterion(rank=2, energy=0.5), 1),
        (Criterion(rank=1, error=0.0), 1),
        (Criterion(rank=2, ratio=1e9), 2),
        (Criterion(rank=3, ratio=1.0), 1),
        (Criterion(energy=0.5, error=0.3), 2),
        (Criterion(energy=0.99, error=0.9), 3),
    ],
)
def test_rank_caps_and_the_stricter_share_counts(criterion: Criterion, expected: int) -> None:
    """Rounding (a share of 1e-33) is never kept: three values are."""
    assert criterion.keeps(of_squares(0.9, 0.05, 0.05, 1e-33), 100) == expected


@pytest.mark.parametrize(
    ("criterion", "tail", "expected"),
    [
        (Criterion(energy=0.9), 0.0, 1),
        (Criterion(energy=0.9), 0.053, 2),  # 0.95 of 1.053 is 0.902
        (Criterion(energy=0.9), 0.06, 3),  # 0.95 and 1 of 1.06: 0.896 and 0.943
        (Criterion(energy=0.9), 9.0, 3),  # out of reach: all that is known
        (Criterion(error=0.33), 0.0, 1),
        (Criterion(error=0.33), 0.05, 2),  # √(0.15 / 1.05) = 0.378, √(0.1 / 1.05) = 0.309
        (Criterion(ratio=2.0), 9.0, 1),
    ],
)
def test_what_was_not_computed_counts_in_the_total(criterion: Criterion, tail: float, expected: int) -> None:
    assert criterion.keeps(of_squares(0.9, 0.05, 0.05), 100, tail) == expected


@pytest.mark.parametrize("criterion", [Criterion(), Criterion(2), Criterion(energy=1.0), Criterion(error=0.0), Criterion(ratio=5.0)])
@pytest.mark.parametrize("sigma", [(0.0, 0.0, 0.0), (7.0,)])
def test_at_least_one_is_kept(criterion: Criterion, sigma: Sequence[float]) -> None:
    assert criterion.keeps(torch.tensor(sigma, dtype=torch.float64), 10) == 1


def test_a_truncated_spectrum_keeps_what_the_whole_one_does() -> None:
    squares = torch.tensor([8.0, 4.0, 2.0, 1.0, 0.5, 0.25], dtype=torch.float64)
    tail = float(squares[4:].sum())
    for criterion in (Criterion(energy=0.7), Criterion(energy=0.85), Criterion(error=0.6), Criterion(error=0.36), Criterion(ratio=2.0)):
        assert criterion.keeps(squares[:4].sqrt(), 50, tail) == criterion.keeps(squares.sqrt(), 50)


@pytest.mark.parametrize(
    ("criterion", "asked", "adaptive"),
    [
        (Criterion(), False, False),
        (Criterion(4), True, False),
        (Criterion(4, energy=0.9), True, True),
        (Criterion(error=0.0), True, True),
        (Criterion(ratio=2.0), True, True),
    ],
)
def test_what_is_asked_for(criterion: Criterion, asked: bool, adaptive: bool) -> None:
    assert (criterion.asked, criterion.adaptive) == (asked, adaptive)


@pytest.mark.parametrize("sigma", [(0.9, 0.3), (1.8, 0.6), (3.6, 0.6)])
def test_a_ratio_is_met_by_decimals_that_floats_miss(sigma: tuple[float, float]) -> None:
    """0.9 / 0.3 is 3, though 0.3 · 3 < 0.9 in float64: a tie but for its rounding is kept, a value that is truly below is not."""
    ratio = round(sigma[0] / sigma[1])
    assert sigma[1] * ratio < sigma[0]
    for criterion, expected in ((Criterion(ratio=float(ratio)), 2), (Criterion(ratio=ratio * (1 - 1e-9)), 1)):
        assert criterion.keeps(torch.tensor(sigma, dtype=torch.float64), 10) == expected


@pytest.mark.parametrize("scale", [1.0, 1e-100, 1e100])
def test_rounding_grows_with_the_longer_side(scale: float) -> None:
    """1e-14 of the largest is 45 eps: a value of a matrix of 10 columns, rounding of one of 100."""
    sigma = torch.tensor([1.0, 1e-14], dtype=torch.float64) * scale
    for criterion in (Criterion(), Criterion(2), Criterion(error=0.0), Criterion(ratio=1e30)):
        assert [criterion.keeps(sigma, size) for size in (10, 45, 46, 100, 20000)] == [2, 2, 1, 1, 1]
