"""(IA)^3: the weight's output rows, or its input columns, multiplied by a vector.

LyCORIS: `weight` (n) or (1, n, 1, 1) beside the flag `on_input`: W' = W · (1 + w), ΔW = W · w; the bias stays.
PEFT: `ia3_l` (o, 1), feed-forward (1, i), convolutions (1, n, 1, 1) either way: W' = W · l, and the bias is multiplied too
unless feed-forward. options["feedforward"] says which; without it a matrix tells by its shape and a convolution is read as
not feed-forward. Liu et al., 2022 (arXiv:2205.05638). A stored alpha is only kept.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, ClassVar

from loratools.adapters import factors as fac
from loratools.adapters.adapter import NotExact
from loratools.adapters.kinds import common
from loratools.adapters.kinds.common import Kind, Problem, register
from loratools.tensors.lazy import LazyTensor

if TYPE_CHECKING:
    from typing import Self

    import torch


@register
class Ia3(Kind):
    """A vector on one axis of W. Roles: weight and on_input (LyCORIS), or ia3_l (PEFT). The delta needs the base weight."""

    kind: ClassVar[str] = "ia3"
    linear: ClassVar[bool] = False
    constraint: ClassVar[bool] = True
    roles: ClassVar[tuple[str, ...]] = ("alpha", "weight", "on_input", "ia3_l")
    needs: ClassVar[tuple[frozenset[str], ...]] = (frozenset({"weight", "on_input"}), frozenset({"ia3_l"}))

    @property
    def peft(self) -> bool:
        return "ia3_l" in self.factors

    @property
    def vector(self) -> LazyTensor:
        return self.factors["ia3_l" if self.peft else "weight"]

    @property
    def on_input(self) -> bool:
        """Does the vector multiply input columns?"""
        if not self.peft:
            return self.factors["on_input"].numel == 1 and bool(self.factors["on_input"].scalar())
        shape = self.vector.shape
        guess = len(shape) == 2 and shape[0] == 1 and shape[1] != 1
        return bool(self.options.get("feedforward", guess))

    @property
    def shape(self) -> tuple[int | None, ...]:
        return (None, self.vector.numel) if self.on_input else (self.vector.numel, None)

    def shape_problems(self) -> list[Problem]:
        shape = self.vector.shape
        if max(shape[:2], default=1) != self.vector.numel:
            return [("error", "bad-shape", f"the vector has shape {list(shape)}, expected (n), (n, 1) or (1, n, 1, ..)")]
        if not self.peft and self.factors["on_input"].numel != 1:
            return [("error", "bad-shape", f"on_input has shape {list(self.factors['on_input'].shape)}, expected one value")]
        return []

    def _change(self) -> torch.Tensor:
        """The factor minus 1, (n), float64."""
        vector = fac.exact(self.vector).flatten()
        return vector - 1.0 if self.peft else vector

    def delta(self, weight: torch.Tensor | None = None) -> torch.Tensor:
        import torch

        if weight is None:
            raise NotExact("an IA3 module multiplies the base weight: its delta needs it")
        base, change = weight.to(torch.float64), self._change()
        lead = (1, -1) if self.on_input else (-1,)
        return base * change.reshape(*lead, *(1,) * (base.dim() - len(lead)))

    def bias_delta(self, bias: torch.Tensor | None = None) -> torch.Tensor | None:
        """PEFT off the input: b · (l - 1), None without a base bias (a layer without one has nothing to multiply)."""
        import torch

        if not self.peft or self.on_input or bias is None:
            return None
        return bias.to(torch.float64) * self._change()

    @property
    def changes_bias(self) -> bool:
        return self.peft and not self.on_input

    @property
    def _axis(self) -> int:
        """Axis of the stored vector along which its values lie."""
        return next((axis for axis, size in enumerate(self.vector.shape) if size != 1), 0)

    def _with_vector(self, vector: LazyTensor) -> Self:
        return self.with_factors({**self.factors, "ia3_l" if self.peft else "weight": vector})

    def split(self, rows: Sequence[int]) -> list[Self | None]:
        """Output vector: its slices. Input vector: the same one in every part."""
        if self.on_input:
            return [self] * len(rows)
        self.check_rows(rows)
        cut = [self._with_vector(piece) for piece in fac.pieces(self.vector, rows, self._axis)]
        if self.peft:
            return list(cut)
        silent = fac.zero_rows(self.vector.reshape((self.vector.numel,)), rows)
        return list(cut) if all(silent) else [None if empty else part for part, empty in zip(cut, silent, strict=True)]

    @classmethod
    def fuse(cls, parts: Sequence[Self | None], rows: Sequence[int]) -> Self:
        """Output vectors stacked, a missing part changes nothing. Input vectors must be there and equal."""
        present = common.parts_present(parts, rows)
        first = present[0]
        if len({(part.peft, part.on_input) for part in present}) > 1:
            raise NotExact("IA3 parts on different axes cannot be fused")
        if first.on_input:
            if len(present) < len(parts) or not fac.all_same([part.vector for part in present]):
                raise NotExact("IA3 parts on the input can be fused only if all are there and equal")
            return first
        vectors = [None if part is None else part.vector for part in parts]
        return first._with_vector(fac.filled(vectors, rows, first._axis, 1.0 if first.peft else 0.0))

    def swap_halves(self) -> Self:
        if self.on_input:
            return self
        self.half()
        return self._with_vector(fac.swap_halves(self.vector, self._axis))
