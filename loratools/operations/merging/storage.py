"""How the values of a base tensor are read and written: as they are, or as quantised codes with a scale beside them.

W is read in the working dtype (float32, float64 where input or output hold float64) and written with one rounding.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Generic, TypeVar

from loratools.tensors.dtypes import torch_dtype
from loratools.tensors.lazy import ComputedTensor, LazyTensor
from loratools.tensors.rounding import rounded
from loratools.tensors.scaled import ScaledWeight, dequantised, joined_peaks, peak, quantised, row_step, scale_at, scale_for, scale_rows

if TYPE_CHECKING:
    import torch

T = TypeVar("T")


class Once(Generic[T]):
    """A value made by the first thread that asks for it."""

    def __init__(self, make: Callable[[], T]) -> None:
        self._make, self._lock, self._made = make, threading.Lock(), list[T]()

    def __call__(self) -> T:
        with self._lock:
            if not self._made:
                self._made.append(self._make())
            return self._made[0]


@dataclass(frozen=True)
class Rounding:
    """How values become the output's dtype: to the nearest, or stochastically with a seed."""

    stochastic: bool = False
    seed: int = 0


class Storage:
    """A tensor's values in place. dtype, shape: of the output; row_step: blocks that are summed start at multiples of it."""

    row_step = 1

    def __init__(self, name: str, tensor: LazyTensor, dtype: str, shape: tuple[int, ...], rounding: Rounding) -> None:
        self.name, self.tensor, self.dtype, self.shape, self.rounding = name, tensor, dtype, shape, rounding

    @property
    def working(self) -> torch.dtype:
        import torch

        return torch.float64 if "F64" in (self.dtype, self.tensor.dtype) else torch.float32

    @property
    def written(self) -> tuple[str, ...]:
        """The tensors of the output that hold these values."""
        return (self.name,)

    def read(self, start: int, stop: int) -> torch.Tensor:
        """Rows start..stop of W; zeros where the output is larger than the base's tensor."""
        import torch

        if not self.shape:
            return self.tensor.load().to(self.working)
        if self.shape == self.tensor.shape:
            return self.tensor.load_rows(start, stop).to(self.working)
        wide = torch.zeros((stop - start, *self.shape[1:]), dtype=self.working)
        height = min(stop, self.tensor.shape[0]) - start
        if height > 0:
            corner = tuple(slice(0, size) for size in (height, *self.tensor.shape[1:]))
            wide[corner] = self.tensor.load_rows(start, start + height).to(self.working)
        return wide

    def write(self, values: torch.Tensor, start: int) -> torch.Tensor:
        """The values of rows from `start` on as they will be stored; overflow is Inf or NaN."""
        if values.dtype == torch_dtype(self.dtype):
            return values
        return rounded(values, self.dtype, **self._options(start))

    def _options(self, start: int) -> dict[str, Any]:
        """What stochastic rounding needs to draw the same numbers for the same block, whoever computes it."""
        return {"stochastic": True, "seed": self.rounding.seed, "name": self.name, "start": start} if self.rounding.stochastic else {}

    def decode(self, stored: torch.Tensor, start: int) -> torch.Tensor:
        """What a reader will see of `write`'s result, in the working dtype."""
        return stored.to(self.working)

    def reread(self, tensor: LazyTensor, beside: Mapping[str, LazyTensor], start: int, stop: int) -> tuple[torch.Tensor, torch.Tensor]:
        """(values, what one code is worth) of rows start..stop of the written tensor, in float64. beside: the written file's tensors."""
        import torch

        loaded = tensor.load_rows(start, stop) if tensor.shape else tensor.load()
        return loaded.to(torch.float64), torch.ones((), dtype=torch.float64)


class ScaledStorage(Storage):
    """fp8 codes with a scale beside them: W = codes · scale. The new scale needs the largest |W'| first, so W' is computed twice.

    summing: computes (start, stop, W + Δ of these rows), block by block; set by the tensor that owns this storage.
    """

    summing: Callable[[], Iterator[tuple[int, int, torch.Tensor]]]

    def __init__(self, name: str, tensor: LazyTensor, scaled: ScaledWeight, scale: LazyTensor, rounding: Rounding) -> None:
        super().__init__(name, tensor, tensor.dtype, tensor.shape, rounding)
        self.scaled, self.old, self.row_step = scaled, Once(scale.load), row_step(scaled, tensor.shape[0])
        self.new = Once(self._new_scale)
        self.scale_tensor: LazyTensor = ComputedTensor(scale.dtype, scale.shape, self.new)

    def _new_scale(self) -> torch.Tensor:
        peaks = []
        for start, stop, values in self.summing():
            shaped = values.reshape(stop - start, *self.shape[1:])
            peaks.append(peak(shaped, scale_rows(self.scaled, self.old(), start, stop), self.scaled.block))
        return scale_for(joined_peaks(self.scaled, peaks), self.old(), self.dtype)

    @property
    def written(self) -> tuple[str, ...]:
        return self.name, self.scaled.scale

    def read(self, start: int, stop: int) -> torch.Tensor:
        return dequantised(self.tensor.load_rows(start, stop), *scale_at(self.scaled, self.old(), start, stop))

    def write(self, values: torch.Tensor, start: int) -> torch.Tensor:
        stop = start + values.shape[0]
        shaped = values.reshape(stop - start, *self.shape[1:])
        scale, block = scale_at(self.scaled, self.new(), start, stop)
        return quantised(shaped, scale, self.dtype, block, **self._options(start))

    def decode(self, stored: torch.Tensor, start: int) -> torch.Tensor:
        wide = dequantised(stored, *scale_at(self.scaled, self.new(), start, start + stored.shape[0]))
        return wide.reshape(stored.shape[0], -1)

    def reread(self, tensor: LazyTensor, beside: Mapping[str, LazyTensor], start: int, stop: int) -> tuple[torch.Tensor, torch.Tensor]:
        import torch

        codes = tensor.load_rows(start, stop)
        scale, block = scale_at(self.scaled, beside[self.scaled.scale].load(), start, stop)
        unit = dequantised(torch.ones_like(codes, dtype=torch.float32), scale, block).to(torch.float64)
        return codes.to(torch.float64) * unit, unit
