"""LoHa: ΔW = alpha / rank · (w1_a w1_b) ∘ (w2_a w2_b), a Hadamard product of two low-rank matrices.

Shapes: w*_a (o, r), w*_b (r, i · kernel). With Tucker cores t1, t2 (r, r, *k) the outer factors lie the other way round,
w*_a (r, o), w*_b (r, i), and each matrix is einsum("ij..,ip,jr->pr..", t, w_a, w_b). FedPara (arXiv:2108.06098), LyCORIS.
Exact LoRA: the row-wise Khatri-Rao product of the a's times the column-wise one of the b's, rank r1 · r2.

Without cores the factors do not tell a convolution's kernel: the shape is (o, i · kernel) unless options["kernel"] says it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, ClassVar

from loratools.adapters import factors as fac
from loratools.adapters.adapter import NotExact, RowDelta
from loratools.adapters.kinds import common
from loratools.adapters.kinds.common import Problem, Scaled, register
from loratools.adapters.kinds.lora import Lora
from loratools.tensors.dtypes import torch_dtype
from loratools.tensors.lazy import ComputedTensor, LazyTensor

if TYPE_CHECKING:
    from typing import Self

    import torch

A, B, CORE = ("hada_w1_a", "hada_w2_a"), ("hada_w1_b", "hada_w2_b"), ("hada_t1", "hada_t2")
ROW_ROLES = ("diff_b",)


@register
class Loha(Scaled):
    """Hadamard product. Roles: hada_w1_a, hada_w1_b, hada_w2_a, hada_w2_b, hada_t1 and hada_t2 together, alpha, diff_b."""

    kind: ClassVar[str] = "loha"
    roles: ClassVar[tuple[str, ...]] = ("alpha", "hada_t1", "hada_t2", "hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b", "diff_b")
    needs: ClassVar[tuple[frozenset[str], ...]] = (frozenset({*A, *B, *CORE}), frozenset({*A, *B}))

    @property
    def tucker(self) -> bool:
        return CORE[0] in self.factors

    @property
    def spread_roles(self) -> tuple[str, str]:
        return A

    @property
    def rank(self) -> int | None:
        """Rank of the first pair, which alpha is divided by."""
        shape = self.factors["hada_w1_b"].shape
        return shape[0] if shape else None

    @property
    def shape(self) -> tuple[int | None, ...]:
        a, b = self.factors["hada_w1_a"].shape, self.factors["hada_w1_b"].shape
        if len(a) != 2 or len(b) != 2:
            return (None, None)
        if self.tucker:
            return (a[1], b[1], *self.factors["hada_t1"].shape[2:])
        kernel = tuple(self.options.get("kernel", ()))
        return (a[0], b[1] // math.prod(kernel), *kernel)

    def shape_problems(self) -> list[Problem]:
        found = common.matrix_problems(self.factors, (*A, *B)) + common.expect(self.factors, dict.fromkeys(CORE, (None, None, None)))
        if found:
            return found
        out, columns = self.shape[0], self.factors["hada_w1_b"].shape[1]
        for a, b, core in zip(A, B, CORE, strict=True):
            rank = self.factors[b].shape[0]
            if self.tucker:
                inner = self.factors[core].shape[:2]
                found += common.expect(self.factors, {a: (inner[0], None), b: (inner[1], None)}, "rank-mismatch")
                found += common.expect(self.factors, {a: (None, out), b: (None, columns)})
            else:
                found += common.expect(self.factors, {a: (None, rank)}, "rank-mismatch")
                found += common.expect(self.factors, {a: (out,), b: (None, columns)})
        if self.tucker:
            found += common.expect(self.factors, {"hada_t2": (None, None, *self.shape[2:])})
        return found + common.expect(self.factors, {"diff_b": (out,)})

    def pairs(self) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """[(a (o, r), b (r, i · kernel))] of both matrices in float64, cores contracted into b."""
        import torch

        result = []
        for a, b, core in zip(A, B, CORE, strict=True):
            left, right = fac.exact(self.factors[a]), fac.exact(self.factors[b])
            if self.tucker:
                left = left.t()
                right = torch.einsum("ij...,jr->ir...", fac.exact(self.factors[core]), right)
                right = right.reshape(right.shape[0], -1)
            result.append((left, right))
        return result

    def delta(self, weight: torch.Tensor | None = None) -> torch.Tensor:
        (a1, b1), (a2, b2) = self.pairs()
        delta = ((a1 @ b1) * (a2 @ b2)).mul_(self.scale).reshape([size for size in self.shape if size is not None])
        return common.fitted(delta, weight, flattened=not self.tucker)

    def by_rows(self, dtype: torch.dtype) -> RowDelta:
        (up1, down1), (up2, down2) = self.pairs()
        up1 = up1 * self.scale
        (a1, b1), (a2, b2) = ((up1.to(dtype), down1.to(dtype)), (up2.to(dtype), down2.to(dtype)))
        return RowDelta(
            lambda start, stop, _: (a1[start:stop] @ b1) * (a2[start:stop] @ b2),
            lambda rows, columns: (up1[rows] * down1.t()[columns]).sum(1) * (up2[rows] * down2.t()[columns]).sum(1),
            up1.norm(dim=1) * down1.norm(dim=0).max() * up2.norm(dim=1) * down2.norm(dim=0).max(),
        )

    # --- row moves ---------------------------------------------------------------------------------------------------

    @property
    def _row_axis(self) -> int:
        return 1 if self.tucker else 0

    def _outer(self, role: str) -> LazyTensor:
        """A row factor as (o, r)."""
        return fac.transposed(self.factors[role]) if self.tucker else self.factors[role]

    def rows_between(self, start: int, stop: int) -> Self:
        cut = (fac.rows, fac.columns)[self._row_axis]
        factors = {role: cut(self.factors[role], start, stop) for role in A}
        factors |= {role: fac.rows(self.factors[role], start, stop) for role in ROW_ROLES if role in self.factors}
        return self.with_factors({**self.factors, **factors})

    def split(self, rows: Sequence[int]) -> list[Self | None]:
        """Rows of w1_a and w2_a; where both are block-diagonal, each part its own columns and rank."""
        self.check_rows(rows)
        row_factors = [*(self._outer(role) for role in A), *(self.factors[role] for role in ROW_ROLES if role in self.factors)]
        silent = [all(zero) for zero in zip(*(fac.zero_rows(tensor, rows) for tensor in row_factors), strict=True)]
        starts = [sum(rows[:index]) for index in range(len(rows))]
        parts = [self.rows_between(start, start + height) for start, height in zip(starts, rows, strict=True)]
        ranges = self._block_ranges(rows, silent)
        if ranges is not None:
            return [None if silent[index] else self._block(part, index, ranges) for index, part in enumerate(parts)]
        return list(parts) if all(silent) else [None if empty else part for part, empty in zip(parts, silent, strict=True)]

    def _block_ranges(self, rows: Sequence[int], silent: Sequence[bool]) -> list[list[tuple[int, int]]] | None:
        """Column ranges of the parts in both pairs, None unless both pairs (and cores) are block-diagonal."""
        found = []
        for a, core in zip(A, CORE, strict=True):
            ranges = fac.block_ranges(self._outer(a), rows)
            if ranges is None or (self.tucker and not fac.blocks_only(self.factors[core], ranges)):
                return None
            if any((start == stop) != empty for (start, stop), empty in zip(ranges, silent, strict=True)):
                return None
            found.append(ranges)
        return found

    def _block(self, part: Self, index: int, ranges: Sequence[Sequence[tuple[int, int]]]) -> Self:
        factors = part.without_alpha()
        for a, b, core, spans in zip(A, B, CORE, ranges, strict=True):
            start, stop = spans[index]
            factors[a] = (fac.rows if self.tucker else fac.columns)(factors[a], start, stop)
            factors[b] = fac.rows(factors[b], start, stop)
            if self.tucker:
                factors[core] = fac.columns(fac.rows(factors[core], start, stop), start, stop)
        whole = self.rank or 1
        start, stop = ranges[0][index]
        if stop - start == whole and "alpha" in self.factors:
            factors["alpha"] = self.factors["alpha"]
        return part.with_factors(factors, alpha=common.part_alpha(self.alpha, stop - start, whole))

    @classmethod
    def fuse(cls, parts: Sequence[Self | None], rows: Sequence[int]) -> Self:
        """Same b's (and cores) and scale: a's stacked. Else a's and cores block-diagonal, b's stacked, alpha = scale · Σ rank."""
        present = common.parts_present(parts, rows)
        if len({(part.shape[1:], part.tucker) for part in present}) > 1:
            raise NotExact("LoHa parts of different input shapes or of different structure cannot be fused")
        parts, equal = common.equalised(parts)
        found = [part for part in parts if part is not None]
        inner = [role for role in (*B, *CORE) if role in found[0].factors]
        shared = equal and all(fac.all_same([part.factors[role] for part in found]) for role in inner)
        alpha, factors = common.shared_alpha(found) if shared else (common.fused_alpha(found), {})
        join = fac.filled if shared else fac.blockdiag
        for role in A:
            outer = join([None if part is None else part._outer(role) for part in parts], rows)
            factors[role] = fac.transposed(outer) if found[0].tucker else outer
        for role in inner:
            tensors = [part.factors[role] for part in found]
            stacked = fac.blockdiag(tensors, [tensor.shape[0] for tensor in tensors]) if role in CORE else fac.cat(tensors)
            factors[role] = tensors[0] if shared else stacked
        factors |= common.joined(ROW_ROLES, parts, rows)
        return found[0].with_factors(factors, alpha=alpha, options=common.common_options(found))

    def swap_halves(self) -> Self:
        self.half()
        swapped = {role: fac.swap_halves(self.factors[role], self._row_axis) for role in A}
        swapped |= {role: fac.swap_halves(self.factors[role]) for role in ROW_ROLES if role in self.factors}
        return self.with_factors({**self.factors, **swapped})

    # --- other forms -------------------------------------------------------------------------------------------------

    def transpose(self) -> Self:
        if self.tucker or len(self.shape) != 2:
            raise NotExact("only the LoHa of a matrix can be transposed")
        pairs = {**dict(zip(A, B, strict=True)), **dict(zip(B, A, strict=True))}
        return self.with_factors({**self.factors, **{role: fac.transposed(self.factors[other]) for role, other in pairs.items()}})

    def to_lora(self, dtype: str = "F32") -> Lora:
        """up[o, (p, q)] = a1[o, p] a2[o, q], down[(p, q), n] = b1[p, n] b2[q, n]; rank r1 · r2, the same scale."""
        import torch

        first, second = (self.factors[a].shape[0 if self.tucker else 1] for a in A)
        rank = first * second
        out, *inputs = (size for size in self.shape if size is not None)

        def up() -> torch.Tensor:
            (a1, _), (a2, _) = self.pairs()
            return torch.einsum("op,oq->opq", a1, a2).reshape(out, rank, *(1 for _ in inputs[1:])).to(torch_dtype(dtype))

        def down() -> torch.Tensor:
            (_, b1), (_, b2) = self.pairs()
            return torch.einsum("pn,qn->pqn", b1, b2).reshape(rank, *inputs).to(torch_dtype(dtype))

        factors: dict[str, LazyTensor] = {
            "up": ComputedTensor(dtype, (out, rank, *(1 for _ in inputs[1:])), up),
            "down": ComputedTensor(dtype, (rank, *inputs), down),
        }
        factors |= {role: self.factors[role] for role in ROW_ROLES if role in self.factors}
        return Lora(factors, common.part_alpha(self.alpha, rank, self.rank or 1), self.alpha_source, self.options)
