"""Exact arithmetic on factors: which powers of two a dtype can take, ratios, block structure."""

from __future__ import annotations

from fractions import Fraction

import pytest
import torch

from loratools.adapters import factors as fac
from loratools.adapters.adapter import NotExact
from loratools.tensors.lazy import from_torch

DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", [1.0, 1e-4, 3e4])
def test_shift_range_is_where_scaling_is_exact(rand, dtype, size):
    tensor = rand(40, dtype=dtype, size=size)
    values = tensor.load()
    low, high = fac.shift_range(tensor)

    def exact(exponent):
        scaled = (values.double() * 2.0**exponent).to(dtype)
        return bool(scaled.isfinite().all()) and torch.equal(torch.ldexp(scaled.double(), torch.tensor(-exponent)), values.double())

    if dtype != torch.float64:  # where float64 itself can hold the comparison
        assert exact(low)
        assert exact(high)
        assert not exact(low - 1)
        assert not exact(high + 1)
    assert low <= 0 <= high


def test_shift_range_of_nothing_is_unlimited():
    assert fac.shift_range(from_torch(torch.zeros(3, dtype=torch.float16))) == (-4096, 4096)


@pytest.mark.parametrize("ratio", [Fraction(1), Fraction(10, 16), Fraction(-3, 7), Fraction(1, 64), Fraction(5), Fraction(2**40, 3)])
def test_split_ratio(ratio):
    mantissa, exponent = fac.split_ratio(ratio)
    assert mantissa * Fraction(2) ** exponent == ratio
    assert 1 <= abs(mantissa) < 2


@pytest.mark.parametrize("dtype", DTYPES[:3])
@pytest.mark.parametrize("exponent", [-12, -3, 1, 7])
def test_spread_of_powers_of_two_keeps_every_product(rand, dtype, exponent):
    first, second = rand(6, 3, dtype=dtype, size=1e-2), rand(3, 5, dtype=dtype)
    spread = fac.spread(first, second, Fraction(2) ** exponent)
    new_first, new_second, rounded = spread.first, spread.second, spread.rounded
    before, after = (a.load().double() @ b.load().double() for a, b in ((first, second), (new_first, new_second)))
    assert (new_first.dtype, new_second.dtype) == (first.dtype, second.dtype)
    assert not rounded
    assert torch.equal(after, before * 2.0**exponent)


def test_second_factor_stays_where_the_first_has_room(rand):
    first, second = rand(6, 3), rand(3, 5)
    spread = fac.spread(first, second, Fraction(1, 8))
    assert torch.equal(spread.second.load(), second.load())
    assert spread.second_took == 0


def test_the_way_back_gives_each_factor_what_it_took(rand):
    first, second = rand(6, 3, dtype=torch.float16, size=1e-6), rand(3, 5, dtype=torch.float16)
    there = fac.spread(first, second, Fraction(1, 8))
    assert there.second_took < 0
    back = fac.spread(there.first, there.second, Fraction(8), -there.second_took)
    assert torch.equal(back.first.load(), first.load())
    assert torch.equal(back.second.load(), second.load())
    assert not torch.equal(fac.spread(there.first, there.second, Fraction(8)).first.load(), first.load())


def test_narrow_floats_are_widened():
    tensor = from_torch(torch.tensor([[1.5, -2.0]]).to(torch.float8_e4m3fn))
    value, rounded = fac.multiplied(tensor, Fraction(3))
    assert (value.dtype, rounded, value.load().tolist()) == ("F32", True, [[4.5, -6.0]])


def test_multiplied_says_when_it_rounds():
    tiny = from_torch(torch.tensor([2.0**-24], dtype=torch.float16))
    assert fac.multiplied(tiny, Fraction(1, 2))[1]
    assert not fac.multiplied(tiny, Fraction(2))[1]
    with pytest.raises(NotExact):
        fac.spread(from_torch(torch.tensor([6e4], dtype=torch.float16)), from_torch(torch.tensor([6e4], dtype=torch.float16)), Fraction(2))


def grid(text):
    return from_torch(torch.tensor([[float(mark == "x") for mark in row] for row in text.split()]))


@pytest.mark.parametrize(
    ("text", "heights", "expected"),
    [
        ("xx.. xx.. ..xx", [2, 1], [(0, 2), (2, 4)]),
        ("x... ..x.", [1, 1], [(0, 2), (2, 4)]),  # a gap belongs to the block before it, a tail to the last
        (".x.. ..xx", [1, 1], [(0, 2), (2, 4)]),  # leading columns: to the first block
        ("x... .... ...x", [1, 1, 1], [(0, 1), (1, 3), (3, 4)]),  # a block without columns takes the gap in its place
        ("x... .... .xxx", [1, 1, 1], [(0, 1), (1, 1), (1, 4)]),
        ("xx.. .xx.", [1, 1], None),  # overlap
        ("..xx xx..", [1, 1], None),  # out of order
        (".... ....", [1, 1], None),
        ("x .", [1, 1], None),  # rank 1
    ],
)
def test_block_ranges(text, heights, expected):
    assert fac.block_ranges(grid(text), heights) == expected


def test_filled_and_pieces_are_inverse(rand):
    tensor = rand(7, 4)
    for axis, sizes in ((0, [2, 4, 1]), (1, [3, 1])):
        assert torch.equal(fac.filled(fac.pieces(tensor, sizes, axis), sizes, axis).load(), tensor.load())
    gap = fac.filled([None, tensor], [2, 7], 0, 1.0)
    assert torch.equal(gap.load(), torch.cat([torch.ones(2, 4), tensor.load()]))


def test_integers_of_any_dtype():
    for dtype in (torch.int64, torch.int32, torch.int16, torch.float32, torch.float16, torch.bfloat16):
        assert fac.integers(from_torch(torch.tensor([3, 128], dtype=dtype))) == (3, 128)
