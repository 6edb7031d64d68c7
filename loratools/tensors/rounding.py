"""Values rounded once to the dtype of a file.

A binary format with m mantissa bits and smallest normal exponent e₀ has the spacing

    ulp(x) = 2^(max(⌊log₂|x|⌋, e₀) − m)

nearest      the closest value of the format, ties to the even code (IEEE 754, roundTiesToEven).
stochastic   x lies between the neighbours a < x < b: b with probability (x − a) / (b − a), else a, so that E[result] = x.

A direct cast is not enough in two places. torch rounds float64 to 16 and 8 bits by way of float32, that is twice: here the
step to float32 is rounded to odd, which loses nothing that decides the second rounding (Boldo and Melquiond, "Emulation of
FMA and correctly rounded sums: proved algorithms using rounding to odd", 2008). And torch lets F8_E4M3 saturate at 448.

Invariants: exact values stay. A value that rounds beyond the largest finite one comes out as Inf, or as NaN where the format
has no Inf, never as the largest. A stochastic result depends on the values, seed, name and start alone.
"""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from loratools.errors import UnsupportedError
from loratools.tensors.dtypes import DTYPES, torch_dtype

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class FloatFormat:
    """A binary floating-point format: mantissa bits, exponent of the smallest normal, largest finite value."""

    mantissa: int
    minimum: int
    largest: float
    signed_zero: bool = True

    @property
    def maximum(self) -> int:
        """Exponent of the largest finite value."""
        return math.frexp(self.largest)[1] - 1

    @property
    def limit(self) -> tuple[float, bool]:
        """Where overflow begins: half a step above the largest, and whether that tie itself overflows (an odd last code)."""
        step = math.ldexp(1.0, self.maximum - self.mantissa)
        return self.largest + step / 2, self.largest / step % 2 == 1


# safetensors dtype → format; F8_E4M3 ends at the code 0x7E (0x7F is NaN), FNUZ formats use 0x80, elsewhere -0, as their NaN
FORMATS: dict[str, FloatFormat] = {
    "F64": FloatFormat(52, -1022, math.ldexp(2 - 2**-52, 1023)),
    "F32": FloatFormat(23, -126, math.ldexp(2 - 2**-23, 127)),
    "F16": FloatFormat(10, -14, 65504.0),
    "BF16": FloatFormat(7, -126, math.ldexp(2 - 2**-7, 127)),
    "F8_E4M3": FloatFormat(3, -6, 448.0),
    "F8_E5M2": FloatFormat(2, -14, 57344.0),
    "F8_E4M3FNUZ": FloatFormat(3, -7, 240.0, signed_zero=False),
    "F8_E5M2FNUZ": FloatFormat(2, -15, 57344.0, signed_zero=False),
}


def float_format(dtype: str) -> FloatFormat:
    """The format of a safetensors dtype. Raises UnsupportedError where values cannot be rounded to it."""
    if dtype not in FORMATS:
        raise UnsupportedError(f"values cannot be rounded to {dtype}", fix=f"one of {', '.join(FORMATS)}")
    return FORMATS[dtype]


def largest(dtype: str) -> float:
    """The largest finite value of a dtype."""
    return float_format(dtype).largest


def rounded(values: torch.Tensor, dtype: str, *, stochastic: bool = False, seed: int = 0, name: str = "", start: int = 0) -> torch.Tensor:
    """float32 or float64 values, any shape, as `dtype` (a safetensors name), rounded once; overflow is Inf or NaN.

    `name` and `start` (the index of the first element, where a tensor comes in blocks) choose the random numbers of
    stochastic rounding together with `seed`; the caller cuts the same blocks to get the same bytes.
    Raises UnsupportedError for a dtype without a rounding here.
    """
    float_format(dtype)
    near = _nearest(values, dtype)
    return _stochastic(values, near, dtype, f"{seed}:{name}:{start}") if stochastic else near


def overflows(values: torch.Tensor, dtype: str) -> torch.Tensor:
    """True where a value, Inf included, is rounded beyond the largest finite value of `dtype`; NaN is not. Shape of `values`."""
    limit, tie = float_format(dtype).limit
    magnitude = values.abs()
    return magnitude >= limit if tie else magnitude > limit


def spacing(values: torch.Tensor, dtype: str) -> torch.Tensor:
    """The distance between the two values of `dtype` around each value, in float64; NaN where a value is not finite.

    At a power of two it is the distance to the next larger magnitude, beyond the largest value that of the last step.
    """
    import torch

    shape = float_format(dtype)
    exponent = torch.frexp(values.to(torch.float64))[1] - 1  # value = m · 2^(exponent + 1), 0.5 <= m < 1
    exponent = torch.where(values == 0, shape.minimum, exponent).clamp(shape.minimum, shape.maximum) - shape.mantissa
    half = exponent // 2  # in two steps: 2^-1074 is no normal float64, 2^±537 is
    return torch.where(values.isfinite(), _power_of_two(half) * _power_of_two(exponent - half), math.nan)


def _power_of_two(exponent: torch.Tensor) -> torch.Tensor:
    """2^exponent, exact, from the bits of a normal float64."""
    import torch

    return ((exponent.to(torch.int64) + 1023) << 52).view(torch.float64)


def _nearest(values: torch.Tensor, dtype: str) -> torch.Tensor:
    import torch

    target = torch_dtype(dtype)
    if values.dtype == torch.float64 and target.itemsize < 4:
        values = _odd(values)
    result = values.to(target)
    if dtype == "F8_E4M3":  # torch saturates, Inf included
        result = result.view(torch.uint8).masked_fill(overflows(values, dtype), 0x7F).view(target)
    return result


def _odd(values: torch.Tensor) -> torch.Tensor:
    """float64 → float32, rounded to odd: towards zero, and the last bit set where that was not exact."""
    import torch

    single = values.to(torch.float32)
    back = single.to(torch.float64)
    bits = single.view(torch.int32)
    bits = bits - (back.abs() > values.abs()).to(torch.int32)  # the step towards zero, on either side of it
    return torch.where(back != values, bits | 1, bits).view(torch.float32)


def _stochastic(values: torch.Tensor, near: torch.Tensor, dtype: str, stream: str) -> torch.Tensor:
    """`near` replaced by the neighbour on the other side of the value with probability |value − near| / gap (at most 1/2)."""
    import torch

    exact, rough = values.to(torch.float64), near.to(torch.float64)
    codes = {8: torch.int8, 16: torch.int16, 32: torch.int32, 64: torch.int64}[DTYPES[dtype][0]]
    sign = torch.iinfo(codes).min
    # sign and magnitude apart: the next code is one up or down in magnitude, and zero belongs to both signs
    outward = exact.abs() > rough.abs()
    other = (near.view(codes) & ~sign) + torch.where(outward, 1, -1).to(codes)
    negative = (exact < 0) if FORMATS[dtype].signed_zero else (exact < 0) & (other != 0)
    other = torch.where(negative, other | sign, other)
    gap = (other.view(near.dtype).to(torch.float64) - rough).abs()
    # nothing moves where the value is exact (right side 0), not finite, or beyond the largest (left side Inf or NaN)
    moved = _uniform(values, stream) * gap < (exact - rough).abs()
    return torch.where(moved, other, near.view(codes)).view(near.dtype)


def _uniform(values: torch.Tensor, stream: str) -> torch.Tensor:
    """Random numbers in [0, 1), float64, of the shape of `values`: made on the CPU, one generator for one stream."""
    import torch

    generator = torch.Generator().manual_seed(int.from_bytes(hashlib.sha256(stream.encode("utf-8", "surrogatepass")).digest()[:8], "big"))
    return torch.rand(values.shape, generator=generator, dtype=torch.float64).to(values.device)
