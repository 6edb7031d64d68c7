"""Rounding against formats decoded by hand: every code, every tie, both sides of it, and what lies beyond the largest value."""

from __future__ import annotations

import itertools
import math
import random
from fractions import Fraction

import numpy
import pytest
import torch

from loratools.errors import UnsupportedError
from loratools.tensors.dtypes import torch_dtype
from loratools.tensors.rounding import FORMATS, largest, overflows, rounded, spacing

# dtype → (exponent bits, mantissa bits, bias, last finite code, code of an overflow), from the IEEE 754, OFP8 and FNUZ papers
LAYOUTS = {
    "F16": (5, 10, 15, 0x7BFF, 0x7C00),
    "BF16": (8, 7, 127, 0x7F7F, 0x7F80),
    "F8_E4M3": (4, 3, 7, 0x7E, 0x7F),
    "F8_E5M2": (5, 2, 15, 0x7B, 0x7C),
    "F8_E4M3FNUZ": (4, 3, 8, 0x7F, 0x80),
    "F8_E5M2FNUZ": (5, 2, 16, 0x7F, 0x80),
}
SMALL = [name for name in LAYOUTS if name.startswith("F8")]
SOURCES = [torch.float32, torch.float64]


def decode(code: int, dtype: str) -> Fraction:
    """The value of a non-negative code."""
    _, mantissa, bias, _, _ = LAYOUTS[dtype]
    exponent, fraction = code >> mantissa, Fraction(code & (2**mantissa - 1), 2**mantissa)
    return fraction * Fraction(2) ** (1 - bias) if exponent == 0 else (1 + fraction) * Fraction(2) ** (exponent - bias)


def finite(dtype: str) -> numpy.ndarray:  # type: ignore[type-arg]
    """All non-negative finite values in ascending order: the value at index i has code i."""
    return numpy.array([float(decode(code, dtype)) for code in range(LAYOUTS[dtype][3] + 1)])


def codes(tensor: torch.Tensor) -> list[int]:
    """The bits as unsigned integers."""
    width = tensor.element_size() * 8
    view = tensor.view({1: torch.int8, 2: torch.int16, 4: torch.int32}[tensor.element_size()])
    return [value % 2**width for value in view.flatten().tolist()]


def sign_bit(dtype: str) -> int:
    return 0x80 if dtype in SMALL else 0x8000


def negated(code: int, dtype: str) -> int:
    """The code of −x; FNUZ formats have one zero and one NaN, and their NaN is its own negation."""
    unsigned = dtype.endswith("FNUZ") and code in (0, 0x80)
    return code if unsigned else code ^ sign_bit(dtype)


def exactly(value: Fraction, dtype: str) -> int:
    """The code nearest to a value >= 0, ties to even, in rational arithmetic."""
    _, mantissa, bias, last, beyond = LAYOUTS[dtype]
    exponent = max(math.floor(math.log2(value)), 1 - bias) if value else 1 - bias
    while value >= Fraction(2) ** (exponent + 1):
        exponent += 1
    while exponent > 1 - bias and value < Fraction(2) ** exponent:
        exponent -= 1
    steps = round(value / Fraction(2) ** (exponent - mantissa))  # Fraction rounds half to even
    code = steps + ((exponent + bias - 1) << mantissa)  # a carry runs into the exponent, where it belongs
    return code if code <= last else beyond


@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.parametrize("dtype", LAYOUTS)
def test_every_value_stays(dtype: str, source: torch.dtype) -> None:
    values = torch.from_numpy(finite(dtype)).to(source)
    wanted = list(range(len(values)))
    for stochastic in (False, True):
        assert codes(rounded(values, dtype, stochastic=stochastic)) == wanted
        assert codes(rounded(-values, dtype, stochastic=stochastic)) == [negated(code, dtype) for code in wanted]


@pytest.mark.parametrize("offset", [2.0**-10, 2.0**-14, 2.0**-40])
@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.parametrize("dtype", LAYOUTS)
def test_every_tie_and_both_its_sides(dtype: str, source: torch.dtype, offset: float) -> None:
    values = finite(dtype)
    gap = numpy.diff(values)
    middle = values[:-1] + gap / 2
    low = numpy.arange(len(gap))
    even = low + low % 2
    cases = [(middle, even), (middle - gap * offset, low), (middle + gap * offset, low + 1)]
    for exact, wanted in cases:
        given = torch.from_numpy(exact).to(source)
        kept = (given.to(torch.float64).numpy() == exact) | (exact == 0)  # float32 cannot hold every one of these
        assert source == torch.float32 or kept.all()
        for sign in (1, -1):
            found = numpy.array(codes(rounded(sign * given, dtype)))
            expected = numpy.array([code if sign == 1 else negated(code, dtype) for code in wanted.tolist()])
            assert (found == expected)[kept].all()


@pytest.mark.parametrize("dtype", LAYOUTS)
def test_random_values_against_rational_arithmetic(dtype: str) -> None:
    draw = random.Random(7)
    lowest, highest = math.log2(float(decode(1, dtype))) - 3, math.log2(float(decode(LAYOUTS[dtype][3], dtype))) + 0.9
    exact = [draw.uniform(1, 2) * 2.0 ** draw.uniform(lowest, highest) for _ in range(2000)]
    exact = [value for value in exact if value <= float(FORMATS["F32"].largest)]
    for source in SOURCES:
        values = torch.tensor(exact, dtype=torch.float64).to(source)
        assert codes(rounded(values, dtype)) == [exactly(Fraction(value), dtype) for value in values.tolist()]


@pytest.mark.parametrize("dtype", ["F16", "BF16", "F8_E4M3", "F8_E5M2"])
def test_float64_is_not_rounded_twice(dtype: str) -> None:
    step = 2.0 ** -LAYOUTS[dtype][1]
    value = torch.tensor([1 + step / 2 + 2**-40, 1 + 3 * step / 2 - 2**-40], dtype=torch.float64)
    assert rounded(value, dtype).to(torch.float64).tolist() == [1 + step, 1 + step]
    twice = value.to(torch.float32).to(torch_dtype(dtype))
    assert twice.to(torch.float64).tolist() == [1.0, 1 + 2 * step]  # so the case is one where it matters


def test_wide_formats() -> None:
    values = torch.tensor([1 + 2**-24 + 2**-50, 1e300, 1e-320, -0.0], dtype=torch.float64)
    assert rounded(values, "F64").tolist() == values.tolist()
    assert rounded(values, "F32").tolist() == [1 + 2**-23, math.inf, 0.0, 0.0]
    single = torch.tensor([0.1, 3e38], dtype=torch.float32)
    for dtype in ("F32", "F64"):
        assert rounded(single, dtype, stochastic=True).tolist() == single.tolist()


@pytest.mark.parametrize("stochastic", [False, True])
@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.parametrize("dtype", LAYOUTS)
def test_overflow_is_seen(dtype: str, source: torch.dtype, stochastic: bool) -> None:
    last, beyond = LAYOUTS[dtype][3:]
    top = decode(last, dtype)
    limit = top + (top - decode(last - 1, dtype)) / 2  # half a step above the largest: a tie, and the code of the largest is odd or even
    inside, outside = limit - limit / 2**20, limit + limit / 2**20
    values = torch.tensor([float(v) for v in (top, inside, limit, outside)] + [math.inf, math.nan], dtype=torch.float64).to(source)
    at_tie = last if last % 2 == 0 else beyond
    result = rounded(values, dtype, stochastic=stochastic)
    assert codes(result)[:5] == [last, last, at_tie, beyond, beyond]
    assert result.to(torch.float64).isnan()[5]
    mirrored = rounded(-values, dtype, stochastic=stochastic)
    assert codes(mirrored)[:2] == [negated(last, dtype)] * 2
    seen = "-inf" if dtype in ("F16", "BF16", "F8_E5M2") else "nan"
    assert [str(value) for value in mirrored.to(torch.float64).tolist()[3:5]] == [seen, seen]
    assert overflows(values, dtype).tolist() == [False, False, at_tie == beyond, True, True, False]
    assert largest(dtype) == float(top)


def test_overflow_of_the_wide_formats() -> None:
    values = torch.tensor([3.5e38, 3.4e38, math.inf, 1e308], dtype=torch.float64)
    assert overflows(values, "F32").tolist() == [True, False, True, True]
    assert overflows(values, "F64").tolist() == [False, False, True, False]
    assert overflows(values.to(torch.float32), "F32").tolist() == [True, False, True, True]
    assert overflows(values.to(torch.float32), "F64").tolist() == [True, False, True, True]


@pytest.mark.parametrize("dtype", FORMATS)
def test_the_table_is_torch_s(dtype: str) -> None:
    info = torch.finfo(torch_dtype(dtype))
    shape = FORMATS[dtype]
    assert (shape.largest, 2.0**shape.minimum) == (info.max, info.smallest_normal)
    if dtype != "F8_E5M2FNUZ":  # torch says 2^-3, but 1 and 1.25 are neighbours
        assert 2.0**-shape.mantissa == info.eps
    assert largest(dtype) == info.max


@pytest.mark.parametrize("dtype", ["I8", "BOOL", "F8_E8M0", "F4", "nonsense"])
def test_other_dtypes_are_refused(dtype: str) -> None:
    for call in (lambda: rounded(torch.ones(1), dtype), lambda: spacing(torch.ones(1), dtype), lambda: largest(dtype)):
        with pytest.raises(UnsupportedError, match=dtype):
            call()


# the share of the way from the lower code to the next, at codes: zero, subnormal, last subnormal, one, below a power of two, top
def crossings(dtype: str) -> list[tuple[int, Fraction]]:
    _, mantissa, bias, last, _ = LAYOUTS[dtype]
    places = [0, 1, 2**mantissa - 1, bias << mantissa, (bias << mantissa) - 1, last - 1]
    return [(code, share) for code, share in itertools.product(places, [Fraction(1, 10), Fraction(1, 2), Fraction(15, 16)])]


@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("dtype", LAYOUTS)
def test_stochastic_rounding_keeps_the_mean(dtype: str, sign: int) -> None:
    count, seeds = 2000, 5
    for code, share in crossings(dtype):
        low, high = decode(code, dtype), decode(code + 1, dtype)
        value = float(low + share * (high - low))
        share = (Fraction(value) - low) / (high - low)  # of the value as float64 holds it
        values = torch.full((count,), sign * value, dtype=torch.float64)
        found = [c for seed in range(seeds) for c in codes(rounded(values, dtype, stochastic=True, seed=seed, name=f"{code}"))]
        # neighbours only; what becomes zero keeps its sign where the format has two zeros
        assert set(found) <= {c if sign == 1 else negated(c, dtype) for c in (code, code + 1)}
        up = sum(c & (sign_bit(dtype) - 1) == code + 1 for c in found)
        sigma = math.sqrt(count * seeds * share * (1 - share))
        assert abs(up - count * seeds * share) <= 5 * sigma


def test_stochastic_rounding_of_float32_values() -> None:
    values = torch.linspace(-3, 3, 40001)
    results = [rounded(values, "BF16", stochastic=True, seed=seed).to(torch.float64) for seed in range(200)]
    gap = spacing(values, "BF16")
    mean = torch.stack(results).mean(0)
    assert ((mean - values.to(torch.float64)).abs() <= gap * 0.5 / math.sqrt(200) * 6).all()  # 40001 values: 6 sigma each
    assert (torch.stack(results) - values.to(torch.float64)).abs().max() > 0
    assert ((torch.stack(results) - values.to(torch.float64)).abs() < gap).all()
    assert abs(float((mean - values.to(torch.float64)).sum())) <= 5 * float((gap**2 / 4 / 200).sum()) ** 0.5


def test_float64_to_float32_at_random() -> None:
    step = 2.0**-23
    values = torch.full((20000,), 1 + step / 4, dtype=torch.float64)
    result = rounded(values, "F32", stochastic=True)
    assert set(result.tolist()) == {1.0, 1 + step}
    assert abs(int((result > 1).sum()) - 5000) <= 5 * math.sqrt(20000 * 3 / 16)


def test_the_stream_is_named_by_seed_name_and_start() -> None:
    values = torch.rand(3, 1000, generator=torch.Generator().manual_seed(3))
    first = rounded(values, "F8_E4M3", stochastic=True, seed=1, name="a", start=0)
    state = torch.random.get_rng_state()
    again = rounded(values, "F8_E4M3", stochastic=True, seed=1, name="a", start=0)
    assert codes(first) == codes(again)
    assert torch.equal(torch.random.get_rng_state(), state)  # the global generator is not touched
    assert first.shape == values.shape
    for other in ({"seed": 2, "name": "a", "start": 0}, {"seed": 1, "name": "b", "start": 0}, {"seed": 1, "name": "a", "start": 3000}):
        assert codes(rounded(values, "F8_E4M3", stochastic=True, **other)) != codes(first)  # type: ignore[arg-type]
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        assert codes(rounded(values, "F8_E4M3", stochastic=True, seed=1, name="a")) == codes(first)
    finally:
        torch.set_num_threads(threads)


def test_nearest_takes_no_notice_of_the_seed() -> None:
    values = torch.rand(1000)
    assert codes(rounded(values, "BF16", seed=1)) == codes(rounded(values, "BF16", seed=2, name="x"))
    assert codes(rounded(values, "BF16")) == codes(values.to(torch.bfloat16))


@pytest.mark.parametrize("dtype", LAYOUTS)
def test_spacing_between_all_neighbours(dtype: str) -> None:
    values = finite(dtype)
    gap = torch.from_numpy(numpy.diff(values))
    low, middle = torch.from_numpy(values[:-1]), torch.from_numpy(values[:-1] + numpy.diff(values) / 2)
    for given in (low, middle, -low, -middle):
        assert torch.equal(spacing(given, dtype), gap)
    assert float(spacing(torch.tensor([values[-1], 1e300], dtype=torch.float64), dtype)[1]) == float(gap[-1])


def test_spacing_of_the_wide_formats() -> None:
    for value in (0.0, 5e-324, 2.0**-1022, 1.0, 1.5, math.nextafter(2.0, 0), 2.0, -3.0, 1e308):
        assert float(spacing(torch.tensor(value, dtype=torch.float64), "F64")) == math.ulp(value)
    for value in (0.0, 2.0**-149, 2.0**-126, 1.0, 1.5, 2.0, 1e38):
        expected = float(numpy.spacing(numpy.float32(value)))
        assert float(spacing(torch.tensor(value), "F32")) == expected
    assert spacing(torch.tensor([math.inf, -math.inf, math.nan]), "BF16").isnan().all()
    assert spacing(torch.ones(2, 3), "BF16").shape == (2, 3)


@pytest.mark.parametrize("dtype", LAYOUTS)
def test_nearest_is_within_half_a_step(dtype: str) -> None:
    top = min(largest(dtype), 1e30)
    values = (torch.rand(5000, generator=torch.Generator().manual_seed(1), dtype=torch.float64) - 0.5) * top
    error = (rounded(values, dtype).to(torch.float64) - values).abs()
    assert (error <= spacing(values, dtype) / 2).all()
    assert (error > spacing(values, dtype) * 0.49).any()


@pytest.mark.parametrize("dtype", FORMATS)
def test_shapes_strides_and_nothing_written_to(dtype: str) -> None:
    base = torch.rand(4, 6, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    kept = base.clone()
    for stochastic in (False, True):
        turned = rounded(base.t(), dtype, stochastic=stochastic)
        assert (turned.shape, turned.dtype) == ((6, 4), torch_dtype(dtype))
        assert rounded(base[0, 0], dtype, stochastic=stochastic).shape == ()
        assert rounded(base[:0], dtype, stochastic=stochastic).shape == (0, 6)
        whole = rounded(base.t().contiguous(), dtype, stochastic=stochastic)
        assert torch.equal(turned.to(torch.float64), whole.to(torch.float64))
    assert torch.equal(base, kept)
