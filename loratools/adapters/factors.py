"""Lazy arithmetic on factors: each function says the result's dtype and shape at once and computes when asked.

Shapes in the comments: `up` (out, rank), `down` (rank, in, *kernel). Values are computed in float32 (float64 for F64 input)
and rounded once to the result's dtype. Pure row moves keep every bit. No torch at import.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import TYPE_CHECKING

from loratools.adapters.adapter import NotExact
from loratools.tensors.dtypes import DTYPES, torch_dtype
from loratools.tensors.lazy import BytesTensor, ComputedTensor, LazyTensor, same_bytes

if TYPE_CHECKING:
    import torch


def widest(tensors: Sequence[LazyTensor]) -> str:
    """The one dtype that holds all of these without loss: their common one, else F32 (F64 if any is)."""
    names = {tensor.dtype for tensor in tensors}
    if len(names) == 1:
        return names.pop()
    return "F64" if "F64" in names else "F32"


def holds(dtype: str, other: str) -> bool:
    """Is every value of `other` a value of `dtype`? The 16-bit and 8-bit formats hold only themselves."""
    width = {"F64": 2, "F32": 1}
    return dtype == other or width.get(dtype, 0) > width.get(other, 0)


def working(tensor: LazyTensor) -> torch.Tensor:
    """The values in the dtype arithmetic is done in: float32, or float64 where the file holds float64."""
    import torch

    return tensor.load().to(torch.float64 if tensor.dtype == "F64" else torch.float32)


def exact(tensor: LazyTensor) -> torch.Tensor:
    """The values in float64, in memory of their own."""
    import torch

    return tensor.load().to(torch.float64, copy=tensor.dtype == "F64")


def rows(tensor: LazyTensor, start: int, stop: int) -> LazyTensor:
    """Rows start..stop of the first axis, bit for bit."""
    return ComputedTensor(tensor.dtype, (stop - start, *tensor.shape[1:]), lambda: tensor.load()[start:stop].clone())


def columns(tensor: LazyTensor, start: int, stop: int) -> LazyTensor:
    """Columns start..stop of the second axis, bit for bit."""
    shape = (tensor.shape[0], stop - start, *tensor.shape[2:])
    return ComputedTensor(tensor.dtype, shape, lambda: tensor.load()[:, start:stop].clone())


def cat(tensors: Sequence[LazyTensor], axis: int = 0) -> LazyTensor:
    """Tensors of equal other axes joined along `axis`, in the widest of their dtypes."""
    import torch

    dtype = widest(tensors)
    shape = list(tensors[0].shape)
    shape[axis] = sum(tensor.shape[axis] for tensor in tensors)
    return ComputedTensor(dtype, tuple(shape), lambda: torch.cat([tensor.load().to(torch_dtype(dtype)) for tensor in tensors], axis))


def zeros(dtype: str, shape: tuple[int, ...]) -> LazyTensor:
    import torch

    return ComputedTensor(dtype, shape, lambda: torch.zeros(shape, dtype=torch_dtype(dtype)))


def blockdiag(blocks: Sequence[LazyTensor | None], heights: Sequence[int]) -> LazyTensor:
    """Block-diagonal (Σ heights, Σ widths, …) of 2-D or 1x1-conv blocks; a None block is `heights[i]` rows without columns."""
    import torch

    present = [block for block in blocks if block is not None]
    dtype = widest(present)
    tail = present[0].shape[2:]
    shape = (sum(heights), sum(block.shape[1] for block in present), *tail)

    def compute() -> torch.Tensor:
        result = torch.zeros(shape, dtype=torch_dtype(dtype))
        row = column = 0
        for block, height in zip(blocks, heights, strict=True):
            if block is not None:
                width = block.shape[1]
                result[row : row + height, column : column + width] = block.load().to(result.dtype)
                column += width
            row += height
        return result

    return ComputedTensor(dtype, shape, compute)


def swap_halves(tensor: LazyTensor, axis: int = 0) -> LazyTensor:
    """The two halves along `axis` exchanged, bit for bit. The axis must be even."""
    import torch

    half = tensor.shape[axis] // 2
    return ComputedTensor(tensor.dtype, tensor.shape, lambda: torch.roll(tensor.load(), half, axis))


def scaled(tensor: LazyTensor, factor: float) -> LazyTensor:
    """factor · tensor, computed in float32 (float64) and rounded once; exact for powers of two in range."""
    if factor == 1.0:
        return tensor
    return ComputedTensor(tensor.dtype, tensor.shape, lambda: (working(tensor) * factor).to(torch_dtype(tensor.dtype)))


def added(tensors: Sequence[LazyTensor]) -> LazyTensor:
    """The sum of tensors of one shape, computed in float64 and rounded once to the widest of their dtypes; one alone is itself."""
    if len(tensors) == 1:
        return tensors[0]
    dtype = widest(tensors)
    return ComputedTensor(dtype, tensors[0].shape, lambda: sum(exact(tensor) for tensor in tensors).to(torch_dtype(dtype)))  # type: ignore[union-attr]


def cast(tensor: LazyTensor, dtype: str) -> LazyTensor:
    """The values rounded once to another dtype."""
    if tensor.dtype == dtype:
        return tensor
    return ComputedTensor(dtype, tensor.shape, lambda: tensor.load().to(torch_dtype(dtype)))


def is_float(tensor: LazyTensor) -> bool:
    return tensor.dtype.startswith(("F", "BF")) and DTYPES[tensor.dtype][1] is not None


def full(dtype: str, shape: tuple[int, ...], value: float) -> LazyTensor:
    """A tensor of one value."""
    import torch

    return ComputedTensor(dtype, shape, lambda: torch.full(shape, value, dtype=torch_dtype(dtype)))


def filled(parts: Sequence[LazyTensor | None], sizes: Sequence[int], axis: int = 0, value: float = 0.0) -> LazyTensor:
    """`cat` along `axis` with `value` in place of each None, `sizes[i]` entries long."""
    present = [part for part in parts if part is not None]
    dtype, like = widest(present), present[0].shape

    def shaped(size: int) -> tuple[int, ...]:
        return (*like[:axis], size, *like[axis + 1 :])

    missing = [full(dtype, shaped(size), value) if part is None else part for part, size in zip(parts, sizes, strict=True)]
    return missing[0] if len(missing) == 1 else cat(missing, axis)


def transposed(tensor: LazyTensor) -> LazyTensor:
    """A matrix with its two axes exchanged, bit for bit."""
    return ComputedTensor(tensor.dtype, (tensor.shape[1], tensor.shape[0]), lambda: tensor.load().t().contiguous())


def pieces(tensor: LazyTensor, sizes: Sequence[int], axis: int = 0) -> list[LazyTensor]:
    """The tensor cut along axis 0 or 1 into `sizes`, bit for bit."""
    cut, start, result = (rows, columns)[axis], 0, []
    for size in sizes:
        result.append(cut(tensor, start, start + size))
        start += size
    return result


def integers(tensor: LazyTensor) -> tuple[int, ...]:
    """The values of a small tensor of whole numbers (shapes and sizes in a file), without torch."""
    data, size = b"".join(tensor.chunks()), DTYPES[tensor.dtype][0] // 8
    return tuple(int(BytesTensor(data[at : at + size], tensor.dtype, ()).scalar()) for at in range(0, len(data), size))


def all_same(tensors: Sequence[LazyTensor]) -> bool:
    """True when all hold the same dtype, shape and bits."""
    return all(same_bytes(tensors[0], tensor) for tensor in tensors[1:])


def support(tensor: LazyTensor) -> torch.Tensor:
    """True where an entry is not +0.0 (a -0.0 counts, so that leaving the rest out loses no bit)."""
    import torch

    values = tensor.load()
    if not values.is_floating_point():
        return values != 0
    values = values.to(torch.float32) if values.element_size() == 1 else values
    return (values != 0) | torch.signbit(values)


def zero_rows(tensor: LazyTensor, heights: Sequence[int]) -> list[bool]:
    """For each block of rows: is every entry +0.0?"""
    import torch

    return [not bool(block.any()) for block in torch.split(support(tensor), list(heights))]


def block_ranges(tensor: LazyTensor, heights: Sequence[int]) -> list[tuple[int, int]] | None:
    """Columns of each row block of `tensor` (Σ heights, R, …) if it is block-diagonal in this order, else None.

    Columns that no block uses go to a block without any that stands in their place, else to the block before them
    (leading ones: after). A block may end with an empty range. All zero, or R < 2, is dense.
    """
    import torch

    width = tensor.shape[1]
    if width < 2:
        return None
    spans: list[tuple[int, int] | None] = []
    for block in torch.split(support(tensor), list(heights)):
        used = block.reshape(block.shape[0], width, -1).any(2).any(0).nonzero().flatten().tolist()
        spans.append((used[0], used[-1] + 1) if used else None)
    present = [span for span in spans if span]
    if not present or any(left[1] > right[0] for left, right in itertools.pairwise(present)):
        return None
    ranges, current = [], 0
    for index, span in enumerate(spans):
        following = next((later[0] for later in spans[index + 1 :] if later), width)
        gap_is_next = index + 1 < len(spans) and spans[index + 1] is None
        stop = span[1] if span and gap_is_next else following
        ranges.append((current, stop))
        current = stop
    return ranges


def blocks_only(core: LazyTensor, ranges: Sequence[tuple[int, int]]) -> bool:
    """Is a core (R, R, …) +0.0 outside the diagonal blocks of these ranges?"""
    used = support(core)
    if used.shape[0] != used.shape[1]:
        return False
    for start, stop in ranges:
        used[start:stop, start:stop] = False
    return not bool(used.any())


# dtype → (exponent e of the smallest value 2^e, exponent E such that every finite value is below 2^E)
_EXPONENTS = {"F16": (-24, 16), "BF16": (-133, 128), "F32": (-149, 128), "F64": (-1074, 1024)}
_ANY = 1 << 12  # no limit


def _values(tensor: LazyTensor) -> torch.Tensor:
    """Every value that occurs in the tensor, in float64; of 16 bits there are 65,536 at most, each once."""
    import torch

    if tensor.dtype not in ("F16", "BF16"):
        return exact(tensor)
    import numpy

    occurs = numpy.zeros(1 << 16, dtype=bool)
    occurs[tensor.load().flatten().view(torch.uint16).numpy()] = True
    codes = numpy.flatnonzero(occurs).astype(numpy.uint16)
    return torch.from_numpy(codes).view(torch_dtype(tensor.dtype)).to(torch.float64)


def shift_range(tensor: LazyTensor) -> tuple[int, int]:
    """(lowest, highest) exponent e for which 2^e · tensor is exact in its own dtype, from the bits of its values."""
    import torch

    values = _values(tensor)
    values = values[(values != 0) & values.isfinite()].abs()
    if not values.numel():
        return -_ANY, _ANY
    mantissa, exponent = torch.frexp(values)  # value = mantissa · 2^exponent, mantissa in [1/2, 1)
    bits = (mantissa * 2.0**53).to(torch.int64)
    lowest_bit = torch.frexp((bits & -bits).to(torch.float64))[1] - 1
    smallest, largest = _EXPONENTS[tensor.dtype]
    return smallest - int((exponent - 53 + lowest_bit).min()), largest - int(exponent.max())


def times(tensor: LazyTensor, factor: float) -> LazyTensor:
    """factor · tensor, computed in float64 and rounded once to the tensor's dtype."""
    if factor == 1.0:
        return tensor
    return ComputedTensor(tensor.dtype, tensor.shape, lambda: (exact(tensor) * factor).to(torch_dtype(tensor.dtype)))


def split_ratio(ratio: Fraction) -> tuple[Fraction, int]:
    """ratio = m · 2^e with 1 <= |m| < 2, exactly. The ratio must not be 0."""
    exponent = abs(ratio.numerator).bit_length() - ratio.denominator.bit_length()
    mantissa = ratio / Fraction(2) ** exponent
    return (mantissa * 2, exponent - 1) if abs(mantissa) < 1 else (mantissa, exponent)


def multiplied(tensor: LazyTensor, ratio: Fraction) -> tuple[LazyTensor, bool]:
    """(ratio · tensor in its own dtype, rounded?)."""
    if ratio == 1:
        return tensor, False
    tensor = tensor if tensor.dtype in _EXPONENTS else cast(tensor, "F32")
    mantissa, exponent = split_ratio(ratio)
    low, high = shift_range(tensor)
    return times(tensor, float(ratio)), not (abs(mantissa) == 1 and low <= exponent <= high)


@dataclass(frozen=True)
class Spread:
    """Two factors with a ratio moved into them. rounded: not every bit was kept; second_took: the power of two the second took."""

    first: LazyTensor
    second: LazyTensor
    rounded: bool = False
    second_took: int = 0


def spread(first: LazyTensor, second: LazyTensor, ratio: Fraction, second_takes: int | None = None) -> Spread:
    """A product of two factors times `ratio`, in the factors' own dtypes.

    ratio = m · 2^e. The power of two goes to `first` as far as that is exact, judged by the bits of its values, and what is
    left to `second`; m and the sign go to `first`, rounded once. Where the dtypes are too narrow for the power of two it is
    divided so that the loss is least. second_takes: the power of two `second` has to take, for the way back of a former spread.
    Raises NotExact where the product is too large for the dtypes.
    """
    if ratio == 1:
        return Spread(first, second)
    first, second = (tensor if tensor.dtype in _EXPONENTS else cast(tensor, "F32") for tensor in (first, second))
    mantissa, exponent = split_ratio(ratio)
    (low1, high1), (low2, high2) = shift_range(first), shift_range(second)
    inexact = abs(mantissa) != 1
    high1 -= inexact
    if exponent > high1 + high2:
        raise NotExact(f"the factors times {float(ratio):g} exceed the range of {first.dtype} and {second.dtype}")
    lost = max(low1 + low2 - exponent, 0)
    if lost:
        share = min(range(low1 - lost, low1 + 1), key=lambda power: _loss(first, power) + _loss(second, exponent - power))
    else:
        share = min(max(exponent, low1, exponent - high2), high1, exponent - low2)
    if second_takes is not None and low2 <= second_takes <= high2 and low1 <= exponent - second_takes <= high1:
        share, lost = exponent - second_takes, 0
    new_first, new_second = times(first, float(mantissa) * 2.0**share), times(second, 2.0 ** (exponent - share))
    return Spread(new_first, new_second, bool(inexact or lost), exponent - share)


def _loss(tensor: LazyTensor, power: int) -> float:
    """Relative squared error of 2^power · tensor in the tensor's own dtype."""
    values = exact(tensor)
    scaled = values * 2.0**power
    total = float(scaled.square().sum())
    return float((exact(times(tensor, 2.0**power)) - scaled).square().sum()) / total if total else 0.0
