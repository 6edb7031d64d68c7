"""DoRA: W' = m · (W + D) / |W + D| with the delta D of a LoRA, LoHa or LoKr, so ΔW = W' - W. It needs the base weight.

The norm runs over all inputs of an output row (axis "out", m of shape (o, 1, ..)), or over outputs and kernel of an input
column (axis "in", m of shape (1, i, ..)): two different functions that do not convert into each other. Spellings:
dora_scale (LyCORIS; (o, 1, ..), (1, i, ..), 1-D is out axis) and magnitude (PEFT, ai-toolkit; (o) or (1, o, 1, 1), out axis).
Liu et al., 2024 (arXiv:2402.09353); axes as in LyCORIS (`wd_on_out`), OneTrainer and PEFT.
"""

from __future__ import annotations

from collections.abc import Sequence
from collections.abc import Set as AbstractSet
from functools import cached_property
from typing import TYPE_CHECKING, ClassVar

from loratools.adapters import factors as fac
from loratools.adapters.adapter import NotExact, RowDelta
from loratools.adapters.kinds import common
from loratools.adapters.kinds.common import Kind, Problem, Scaled, register
from loratools.adapters.kinds.loha import Loha
from loratools.adapters.kinds.lokr import Lokr
from loratools.adapters.kinds.lora import Lora
from loratools.tensors.lazy import LazyTensor

if TYPE_CHECKING:
    from typing import Self

    import torch

MAGNITUDES = ("dora_scale", "magnitude")
INNER: tuple[type[Scaled], ...] = (Lora, Loha, Lokr)


@register
class Dora(Kind):
    """An additive module with a magnitude. Roles: those of the inner kind and dora_scale or magnitude."""

    kind: ClassVar[str] = "dora"
    linear: ClassVar[bool] = False
    scaled: ClassVar[bool] = True
    needs: ClassVar[tuple[frozenset[str], ...]] = ()
    roles: ClassVar[tuple[str, ...]] = (
        "alpha",
        *MAGNITUDES,
        *dict.fromkeys(role for kind in INNER for role in kind.roles if role != "alpha"),
    )

    @classmethod
    def claim(cls, roles: AbstractSet[str]) -> frozenset[str] | None:
        role = next((role for role in MAGNITUDES if role in roles), None)
        inner = next((found for kind in INNER if (found := kind.claim(roles)) is not None), None)
        return inner | {role} if inner is not None and role is not None else None

    @cached_property
    def inner(self) -> Scaled:
        """The additive module without the magnitude."""
        factors = {role: tensor for role, tensor in self.factors.items() if role not in MAGNITUDES}
        kind = next(kind for kind in INNER if kind.claim(factors.keys()) is not None)
        return kind(factors, self.alpha, self.alpha_source, self.options)

    @property
    def magnitude_role(self) -> str:
        return next(role for role in MAGNITUDES if role in self.factors)

    @property
    def magnitude(self) -> LazyTensor:
        return self.factors[self.magnitude_role]

    @property
    def axis(self) -> str:
        """ "out" or "in": whose norms the magnitude sets."""
        shape = self.magnitude.shape
        if self.magnitude_role == "magnitude" or len(shape) < 2 or shape[0] != 1:
            return "out"
        return "in" if shape[1] != 1 or self.inner.shape[0] not in (None, 1) else "out"

    @property
    def shape(self) -> tuple[int | None, ...]:
        return self.inner.shape

    @property
    def rank(self) -> int | None:
        return self.inner.rank

    @property
    def scale(self) -> float:
        return self.inner.scale

    def shape_problems(self) -> list[Problem]:
        found = self.inner.shape_problems()
        size = self.shape[0 if self.axis == "out" else 1]
        if self._flattened() and size and not size % self.magnitude.numel:
            size = self.magnitude.numel
        return found + common.vector_problems(self.factors, self.magnitude_role, size)

    def _flattened(self) -> bool:
        """Are the inputs of a convolution flattened with its kernel, so that their number is unknown?"""
        return self.axis == "in" and len(self.shape) == 2 and len(self.magnitude.shape) > 2 and not isinstance(self.inner, Lora)

    def delta(self, weight: torch.Tensor | None = None) -> torch.Tensor:
        import torch

        if weight is None:
            raise NotExact("a DoRA module scales the base weight: its delta needs it")
        if isinstance(self.inner, Lora) and self.inner.embedding:
            raise NotExact("DoRA of an embedding is not supported")
        base = weight.to(torch.float64)
        direction = base + common.on_base(self.inner.delta(base), base)
        kept = 0 if self.axis == "out" else 1
        others = [axis for axis in range(base.dim()) if axis != kept]
        norm = torch.linalg.vector_norm(direction, dim=others, keepdim=True)
        magnitude = fac.exact(self.magnitude).reshape(norm.shape)
        return torch.where(norm > 0, magnitude / norm, torch.zeros_like(norm)) * direction - base

    def by_rows(self, dtype: torch.dtype) -> RowDelta | None:
        """Out axis only: each row has its own norm. A column's norm needs all rows."""
        inner = self.inner.by_rows(dtype)
        if inner is None or self.axis == "in" or (isinstance(self.inner, Lora) and self.inner.embedding):
            return None
        import torch

        magnitude = fac.exact(self.magnitude).reshape(-1, 1).to(dtype)

        def block(start: int, stop: int, weight: torch.Tensor) -> torch.Tensor:
            base = weight.reshape(stop - start, -1)
            direction = inner.rows(start, stop, weight) + base
            norm = torch.linalg.vector_norm(direction, dim=1, keepdim=True)
            factor = torch.where(norm > 0, magnitude[start:stop] / norm, torch.zeros_like(norm))
            return direction.mul_(factor).sub_(base)

        return RowDelta(block)

    def bias_delta(self, bias: torch.Tensor | None = None) -> torch.Tensor | None:
        return self.inner.bias_delta(bias)

    def magnitude_as(self, role: str) -> Dora:
        """The same module with its magnitude under the other spelling, reshaped bit for bit.

        dora_scale: (o, 1, ..) out axis, as it is on the in axis. magnitude: (o) for a matrix, (1, o, 1, ..) for a convolution;
        raises NotExact on the in axis, which PEFT's magnitude cannot say.
        """
        tensor, out = self.magnitude, self.magnitude.numel
        dimensions = max(len(self.shape), len(tensor.shape))
        if self.axis == "in":
            if role == "magnitude":
                raise NotExact("the magnitude runs over inputs (in axis), the target's runs over outputs: another function")
            shape = tensor.shape
        elif role == "dora_scale":
            shape = (out, *(1,) * (dimensions - 1))
        else:
            shape = (out,) if dimensions == 2 else (1, out, *(1,) * (dimensions - 2))
        rest = {name: factor for name, factor in self.factors.items() if name not in MAGNITUDES}
        return self.with_factors({**rest, role: tensor.reshape(shape)})

    def with_alpha(self, alpha: float, second_takes: int | None = None) -> Self:
        """The same D under another alpha; see `Scaled.with_alpha`."""
        return self._around(self.inner.with_alpha(alpha, second_takes))

    def folded(self) -> Self:
        """The same D without alpha; see `Scaled.folded`."""
        return self._around(self.inner.folded())

    def fold_is_exact(self, alpha: float | None = None) -> bool:
        return self.inner.fold_is_exact(alpha)

    def _around(self, inner: Scaled, magnitude: LazyTensor | None = None) -> Self:
        """This magnitude (or another) around another inner module."""
        tensor = self.magnitude if magnitude is None else magnitude
        factors = {**inner.factors, self.magnitude_role: tensor}
        return self.with_factors(factors, alpha=inner.alpha, alpha_source=inner.alpha_source, options=inner.options)

    @property
    def _magnitude_axis(self) -> int:
        """Axis of the magnitude tensor along which its rows lie (out axis)."""
        return 1 if len(self.magnitude.shape) > 1 and self.magnitude.shape[0] == 1 and self.magnitude_role == "magnitude" else 0

    def split(self, rows: Sequence[int]) -> list[Self | None]:
        """Out axis: rows of the inner module and of the magnitude; no part is absent."""
        self._refuse_in_axis("split")
        cut = fac.pieces(self.magnitude, rows, self._magnitude_axis)
        parts = self.inner.split(rows)
        starts = [sum(rows[:index]) for index in range(len(rows))]
        whole = [
            self.inner.rows_between(start, start + height) if part is None else part
            for part, start, height in zip(parts, starts, rows, strict=True)
        ]
        return [self._around(part, magnitude) for part, magnitude in zip(whole, cut, strict=True)]

    @classmethod
    def fuse(cls, parts: Sequence[Self | None], rows: Sequence[int]) -> Self:
        """Out axis: inner modules fused, magnitudes stacked. A missing part's magnitude would be the norms of W: NotExact."""
        present = common.parts_present(parts, rows)
        if len(present) < len(parts):
            raise NotExact("a missing part of a fused DoRA would need the norms of the base weight")
        for part in present:
            part._refuse_in_axis("fuse")
        if len({(type(part.inner), part.magnitude_role, len(part.magnitude.shape)) for part in present}) > 1:
            raise NotExact("DoRA parts of different inner kinds or magnitude shapes cannot be fused")
        inner = type(present[0].inner).fuse([part.inner for part in present], rows)
        return present[0]._around(inner, fac.cat([part.magnitude for part in present], present[0]._magnitude_axis))

    def swap_halves(self) -> Self:
        """Rows of the inner module, and of an out-axis magnitude; an in-axis one is a norm over all rows and stays."""
        swapped = self.inner.swap_halves()
        return self._around(swapped, fac.swap_halves(self.magnitude, self._magnitude_axis) if self.axis == "out" else None)

    def transpose(self) -> Dora:
        """A matrix transposed: the magnitude's axis becomes the other one (as dora_scale)."""
        inner = self.inner.transpose()
        size = self.magnitude.numel
        shape = (1, size) if self.axis == "out" else (size, 1)
        return self.with_factors({**inner.factors, "dora_scale": self.magnitude.reshape(shape)})

    def _refuse_in_axis(self, verb: str) -> None:
        if self.axis == "in":
            raise NotExact(f"cannot {verb} a DoRA whose magnitude runs over inputs: the column norms couple the parts")
