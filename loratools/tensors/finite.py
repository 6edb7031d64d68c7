"""Values are looked at while they stream by: a NaN or Inf is refused on the way out.

In every IEEE-like float format NaN and Inf are the codes whose exponent bits are all ones, so a bit mask finds them without a
conversion and without torch. numpy does the comparing.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from loratools.errors import NotFiniteError
from loratools.tensors.lazy import LazyTensor

if TYPE_CHECKING:
    import torch

# dtype → (numpy view, mask): a code is not finite when all bits of the mask are set. e4m3 has one NaN a sign and no Inf.
_MASKS = {
    "F64": ("<u8", 0x7FF0_0000_0000_0000),
    "F32": ("<u4", 0x7F80_0000),
    "F16": ("<u2", 0x7C00),
    "BF16": ("<u2", 0x7F80),
    "F8_E5M2": ("u1", 0x7C),
    "F8_E4M3": ("u1", 0x7F),
}


def first_not_finite(tensor: LazyTensor) -> bool:
    """True when a tensor holds a NaN or an Inf. Formats without such codes are finite."""
    return any(_not_finite(chunk, tensor.dtype) for chunk in tensor.chunks())


def _not_finite(chunk: bytes, dtype: str) -> bool:
    if dtype not in _MASKS:
        return False
    import numpy

    view, mask = _MASKS[dtype]
    codes = numpy.frombuffer(chunk, dtype=view)
    return bool(((codes & codes.dtype.type(mask)) == mask).any())


class FiniteTensor(LazyTensor):
    """A tensor that raises NotFiniteError, naming itself, when a NaN or Inf passes."""

    def __init__(self, name: str, base: LazyTensor) -> None:
        self.name, self.base, self.dtype, self.shape = name, base, base.dtype, base.shape

    def load(self) -> torch.Tensor:
        return self.base.load()

    def chunks(self) -> Iterator[bytes]:
        for chunk in self.base.chunks():
            if _not_finite(chunk, self.dtype):
                message = f"{self.name}: NaN or Inf in the input, or a value overflows {self.dtype}"
                raise NotFiniteError(self.name, message, fix="loratools inspect --check names every such tensor of the input")
            yield chunk
