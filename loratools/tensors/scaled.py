"""fp8 weights with a scale beside them, as numbers: what a scale covers, and the arithmetic of codes times scale.

    W = codes · scale        new scale = max|W| / largest code,  codes = round(W / new scale)

The scale is one value for the tensor, or one a row, or one a block (DeepSeek's 128x128); a weight too large to hold goes through its
blocks of rows. Which weights of a checkpoint are stored so is said by `loratools.tensors.quantised`.

Invariant: a scale keeps its shape and dtype, no finite value overflows under a new one, and the codes are rounded once. No torch at
import; the layout of a scale is known from headers.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from loratools.errors import MalformedError
from loratools.tensors.dtypes import dtype_name
from loratools.tensors.lazy import LazyTensor, tensor_bytes
from loratools.tensors.rounding import largest, rounded

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class ScaledWeight:
    """An fp8 weight and its scale.

    `weight`, `scale`: their keys. `shape`: of the scale: one value; (out,) or (out, 1); or one value a block.
    `block`: how much of each axis of the weight one value covers; the last block of an axis may be shorter.
    """

    weight: str
    scale: str
    shape: tuple[int, ...]
    block: tuple[int, ...]


def blocks_of(shape: Sequence[int], scale: Sequence[int], known: Sequence[int] | None = None) -> tuple[int, ...] | None:
    """How much of each axis of a weight one value of the scale covers; None where the two do not fit.

    The shapes alone leave the size of a block open where the last one is cut; writers use powers of two, and at most one of
    those fits when an axis has two blocks or more. `known`, of a config or of the whole weight, goes before.
    """
    if math.prod(scale) == 1:
        return tuple(shape)
    if tuple(scale) == tuple(shape[:1]):
        scale = (*scale, *[1] * (len(shape) - 1))
    if not shape or len(scale) != len(shape):
        return None
    hints = [*[0] * len(shape), *(known or ())][-len(shape) :]
    sizes = [_block(size, count, hint) for size, count, hint in zip(shape, scale, hints, strict=True)]
    return None if 0 in sizes else tuple(sizes)


def _block(size: int, count: int, hint: int) -> int:
    """The size of `count` blocks that cover an axis; 0 where none does."""
    if count in (1, size):
        return max(1, size // max(count, 1))
    if not 0 < count < size:
        return 0
    candidates = (hint, 1 << (math.ceil(size / count) - 1).bit_length(), size // count)
    return next((block for block in candidates if block > 0 and math.ceil(size / block) == count), 0)


class ScaledTensor(LazyTensor):
    """Codes and their scale as the float32 values they stand for."""

    def __init__(self, codes: LazyTensor, scaled: ScaledWeight, scale: LazyTensor) -> None:
        self.codes, self.scaled, self.scale, self.dtype, self.shape = codes, scaled, scale, "F32", codes.shape

    def load(self) -> torch.Tensor:
        return dequantised(self.codes.load(), self.scale.load(), self.scaled.block)

    def chunks(self) -> Iterator[bytes]:
        yield from tensor_bytes(self.load())


def row_step(scaled: ScaledWeight, out_rows: int) -> int:
    """A block of rows of a weight of `out_rows` rows must begin at a multiple of this."""
    return 1 if scaled.block[0] >= out_rows else scaled.block[0]


def scale_rows(scaled: ScaledWeight, scale: torch.Tensor, start: int, stop: int) -> torch.Tensor:
    """The part of the scale that rows start..stop of the weight use; `start` is a multiple of `row_step`."""
    step = scaled.block[0]
    return scale if _one_row(scaled) else scale[start // step : math.ceil(stop / step)]


def scale_at(scaled: ScaledWeight, scale: torch.Tensor, start: int, stop: int) -> tuple[torch.Tensor, tuple[int, ...]]:
    """(scale, block) of the weight's rows start..stop wherever a block begins: one row of the scale for each of them."""
    import torch

    if _one_row(scaled):
        return scale, scaled.block
    return scale[torch.arange(start, stop) // scaled.block[0]], (1, *scaled.block[1:])


def joined_peaks(scaled: ScaledWeight, parts: Sequence[torch.Tensor]) -> torch.Tensor:
    """The `peak` of a whole weight, from those of its blocks of rows in order."""
    import torch

    return torch.stack(list(parts)).amax(0) if _one_row(scaled) else torch.cat(list(parts))


def _one_row(scaled: ScaledWeight) -> bool:
    """Do all rows of the weight share their values of the scale?"""
    return math.prod(scaled.shape) == 1 or scaled.shape[0] == 1


def dequantised(codes: torch.Tensor, scale: torch.Tensor, block: Sequence[int] | None = None) -> torch.Tensor:
    """codes · scale in float32. `block` (ScaledWeight.block) settles what cut shapes leave open; needed for rows of a weight.

    Raises MalformedError where the scale does not fit the codes.
    """
    import torch

    return codes.to(torch.float32) * _spread(scale.to(torch.float32), codes.shape, block)


def peak(values: torch.Tensor, scale: torch.Tensor, block: Sequence[int] | None = None) -> torch.Tensor:
    """max|value| over what each value of the scale covers, in the scale's shape."""
    import torch

    result = values.abs()
    for axis, size in enumerate(_fitting(values.shape, scale.shape, block)):
        if size > 1:
            result = torch.cat([piece.amax(axis, keepdim=True) for piece in torch.split(result, size, axis)], axis)
    return result.reshape(scale.shape)


def scale_for(amax: torch.Tensor, scale_like: torch.Tensor, dtype: str) -> torch.Tensor:
    """The scale under which values up to `amax` fit `dtype`; shape and dtype of `scale_like`, the scale so far.

    The old value stays where the new codes still fill at least half of the range and fit it (a weight hardly changed keeps its
    codes), and where all values are zero. Else amax / largest, rounded up, so that nothing overflows; up to a power of two
    where all old ones are powers of two (DeepSeek's ue8m0 kernels read nothing else).
    """
    import torch

    old, wanted = scale_like.to(torch.float64), amax.reshape(scale_like.shape).to(torch.float64)
    reach = old * largest(dtype)
    keep = (wanted == 0) | ((wanted <= reach) & (wanted >= reach / 2))
    new = wanted / largest(dtype)
    if bool((torch.frexp(old)[0] == 0.5).all()):
        mantissa = torch.frexp(new)[0]  # new = mantissa · 2^e, 0.5 <= mantissa < 1
        new = torch.where(mantissa > 0.5, new / mantissa, new)
    return torch.where(keep, scale_like, _rounded_up(new, dtype_name(scale_like.dtype)))


def quantised(values: torch.Tensor, scale: torch.Tensor, dtype: str, block: Sequence[int] | None = None, **options: Any) -> torch.Tensor:
    """The codes of values under a scale: values / scale in float64, rounded once; what does not fit is NaN or Inf."""
    import torch

    wide = values.to(torch.float64)
    quotient = torch.where(wide == 0, wide, wide / _spread(scale.to(torch.float64), values.shape, block))  # 0 / 0 is 0 here
    return rounded(quotient, dtype, **options)


def _fitting(shape: Sequence[int], scale: Sequence[int], block: Sequence[int] | None) -> tuple[int, ...]:
    sizes = blocks_of(shape, scale, block)
    if sizes is None:
        raise MalformedError(f"a scale of shape {list(scale)} does not fit a weight of shape {list(shape)}")
    return sizes


def _spread(scale: torch.Tensor, shape: Sequence[int], block: Sequence[int] | None) -> torch.Tensor:
    """The scale in a shape that broadcasts over the weight's: repeated only along axes with several blocks of several."""
    sizes = _fitting(shape, scale.shape, block)
    if scale.numel() == 1:
        return scale.reshape(())
    result = scale.reshape(*scale.shape, *[1] * (len(shape) - scale.ndim))
    for axis, (size, length) in enumerate(zip(sizes, shape, strict=True)):
        if 1 < size < length:
            result = result.repeat_interleave(size, axis).narrow(axis, 0, length)
    return result


def _rounded_up(values: torch.Tensor, dtype: str) -> torch.Tensor:
    """Non-negative float64 values in `dtype`, never smaller."""
    import torch

    near = rounded(values, dtype)
    codes = {2: torch.int16, 4: torch.int32, 8: torch.int64}[near.element_size()]
    below = near.to(torch.float64) < values
    return (near.view(codes) + below.to(codes)).view(near.dtype)
