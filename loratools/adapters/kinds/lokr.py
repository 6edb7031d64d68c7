"""LoKr: ΔW = s · kron(w1, w2), each factor full or a product: w1 = w1_a w1_b, w2 = w2_a w2_b, or a Tucker core.

Shapes: w1 (o1, i1), w2 (o2, i2, *k), w2_b (r, i2 · kernel); core t2 (r, r, *k) with w2_a (r, o2), w2_b (r, i2).
Scale: alpha / rank with rank = rows of w1_b or w2_b; both factors full: 1, a stored alpha is ignored (LyCORIS, ComfyUI).
PEFT scales always: options["always_scale"] with options["rank"] for two full factors. LyCORIS (arXiv:2309.14859).
Exact LoRA: kron(a1 b1, a2 b2) = kron(a1, a2) kron(b1, b2). Singular values are the products of the factors' own.

A flattened w2_b does not tell a convolution's kernel: the shape is (o, i · kernel) unless options["kernel"] says it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, ClassVar

from loratools.adapters import factors as fac
from loratools.adapters.adapter import NotExact
from loratools.adapters.kinds import common
from loratools.adapters.kinds.common import Problem, Scaled, register
from loratools.adapters.kinds.lora import Lora
from loratools.tensors.dtypes import torch_dtype
from loratools.tensors.lazy import ComputedTensor, LazyTensor

if TYPE_CHECKING:
    from typing import Self

    import torch

W1 = (frozenset({"lokr_w1"}), frozenset({"lokr_w1_a", "lokr_w1_b"}))
W2 = (frozenset({"lokr_w2"}), frozenset({"lokr_w2_a", "lokr_w2_b", "lokr_t2"}), frozenset({"lokr_w2_a", "lokr_w2_b"}))
SECOND = ("lokr_w2", "lokr_w2_a", "lokr_w2_b", "lokr_t2")
TURNED = {  # role of the transposed module → the factor it is the transpose of
    "lokr_w1": "lokr_w1",
    "lokr_w1_a": "lokr_w1_b",
    "lokr_w1_b": "lokr_w1_a",
    "lokr_w2": "lokr_w2",
    "lokr_w2_a": "lokr_w2_b",
    "lokr_w2_b": "lokr_w2_a",
}


@register
class Lokr(Scaled):
    """Kronecker product. Roles: lokr_w1 or lokr_w1_a and _b; lokr_w2 or lokr_w2_a and _b, perhaps lokr_t2; alpha, diff_b."""

    kind: ClassVar[str] = "lokr"
    roles: ClassVar[tuple[str, ...]] = (
        "alpha", "lokr_t2", "lokr_w1", "lokr_w1_a", "lokr_w1_b", "lokr_w2", "lokr_w2_a", "lokr_w2_b", "diff_b",
    )  # fmt: skip
    needs: ClassVar[tuple[frozenset[str], ...]] = tuple(first | second for first in W1 for second in W2)

    @property
    def rank(self) -> int | None:
        """Rows of w1_b or w2_b; None where both factors are full."""
        found = next((self.factors[role].shape for role in ("lokr_w1_b", "lokr_w2_b") if role in self.factors), ())
        return found[0] if found else None

    @property
    def divisor(self) -> int | None:
        return self.options.get("rank") if self.rank is None and self.options.get("always_scale") else self.rank

    @property
    def spread_roles(self) -> tuple[str, str]:
        return self._row_role, "lokr_w2" if "lokr_w2" in self.factors else "lokr_w2_a"

    @property
    def _row_role(self) -> str:
        """The factor whose rows are blocks of output rows."""
        return "lokr_w1" if "lokr_w1" in self.factors else "lokr_w1_a"

    @property
    def _first_shape(self) -> tuple[int, int]:
        if "lokr_w1" in self.factors:
            o1, i1 = self.factors["lokr_w1"].shape[:2]
            return o1, i1
        return self.factors["lokr_w1_a"].shape[0], self.factors["lokr_w1_b"].shape[1]

    @property
    def _second_shape(self) -> tuple[int, ...]:
        """(o2, i2, *kernel), or (o2, i2 · kernel) where nothing tells the kernel."""
        if "lokr_w2" in self.factors:
            return self.factors["lokr_w2"].shape
        a, b = self.factors["lokr_w2_a"].shape, self.factors["lokr_w2_b"].shape
        if "lokr_t2" in self.factors:
            return (a[1], b[1], *self.factors["lokr_t2"].shape[2:])
        kernel = b[2:] or tuple(self.options.get("kernel", ()))
        return (a[0], b[1] if b[2:] else b[1] // math.prod(kernel), *kernel)

    @property
    def shape(self) -> tuple[int | None, ...]:
        if any(len(tensor.shape) < 2 for role, tensor in self.factors.items() if role.startswith("lokr_")):
            return (None, None)
        (o1, i1), (o2, i2, *kernel) = self._first_shape, self._second_shape
        return (o1 * o2, i1 * i2, *kernel)

    def shape_problems(self) -> list[Problem]:
        found = common.matrix_problems(self.factors, ("lokr_w1", "lokr_w1_a", "lokr_w1_b", "lokr_w2_a"))
        found += common.expect(self.factors, {"lokr_w2": (None, None), "lokr_w2_b": (None, None), "lokr_t2": (None, None, None)})
        if found:
            return found
        sizes = {role: tensor.shape for role, tensor in self.factors.items()}
        if "lokr_w1_b" in sizes:
            found += common.expect(self.factors, {"lokr_w1_a": (None, sizes["lokr_w1_b"][0])}, "rank-mismatch")
        if "lokr_t2" in sizes:
            rows, columns = sizes["lokr_t2"][:2]
            found += common.expect(self.factors, {"lokr_w2_a": (rows, None), "lokr_w2_b": (columns, None)}, "rank-mismatch")
        elif "lokr_w2_b" in sizes:
            found += common.expect(self.factors, {"lokr_w2_a": (None, sizes["lokr_w2_b"][0])}, "rank-mismatch")
        if "lokr_w1_b" in sizes and "lokr_w2_b" in sizes and sizes["lokr_w1_b"][0] != sizes["lokr_w2_b"][0]:
            ranks = f"{sizes['lokr_w1_b'][0]} and {sizes['lokr_w2_b'][0]}"
            found.append(("error", "rank-mismatch", f"lokr_w1_b and lokr_w2_b have ranks {ranks}: the scale is undecided"))
        return found + common.expect(self.factors, {"diff_b": (self.shape[0],)})

    def matrices(self) -> tuple[torch.Tensor, torch.Tensor]:
        """(w1 (o1, i1), w2 (o2, i2 · kernel)) in float64."""
        import torch

        value = {role: fac.exact(tensor) for role, tensor in self.factors.items() if role.startswith("lokr_")}
        first = value["lokr_w1"] if "lokr_w1" in value else value["lokr_w1_a"] @ value["lokr_w1_b"]
        if "lokr_w2" in value:
            second = value["lokr_w2"]
        elif "lokr_t2" in value:
            second = torch.einsum("ij...,ip,jr->pr...", value["lokr_t2"], value["lokr_w2_a"], value["lokr_w2_b"])
        else:
            second = value["lokr_w2_a"] @ value["lokr_w2_b"].flatten(1)
        return first, second.reshape(second.shape[0], -1)

    def delta(self, weight: torch.Tensor | None = None) -> torch.Tensor:
        import torch

        delta = torch.kron(*self.matrices()).mul_(self.scale).reshape([size for size in self.shape if size is not None])
        return common.fitted(delta, weight, flattened="lokr_w2_b" in self.factors)

    def norm(self, weight: torch.Tensor | None = None) -> float:
        first, second = self.matrices()
        return abs(self.scale) * float(first.norm()) * float(second.norm())

    def singular_values(self, weight: torch.Tensor | None = None) -> torch.Tensor:
        import torch

        first, second = (torch.linalg.svdvals(matrix) for matrix in self.matrices())
        return torch.outer(first, second).flatten().sort(descending=True).values * abs(self.scale)

    # --- row moves ---------------------------------------------------------------------------------------------------

    def _units(self, rows: Sequence[int]) -> list[int]:
        """Rows of w1 in each part. Raises NotExact unless every boundary is a multiple of the rows of w2."""
        block = self._second_shape[0]
        if any(height % block for height in rows):
            raise NotExact(f"a LoKr module can be cut at multiples of {block} rows (those of w2) only, not into {list(rows)}")
        return [height // block for height in rows]

    def rows_between(self, start: int, stop: int) -> Self:
        first, last = self._units([start, stop])
        cut = {self._row_role: fac.rows(self.factors[self._row_role], first, last)}
        if "diff_b" in self.factors:
            cut["diff_b"] = fac.rows(self.factors["diff_b"], start, stop)
        return self.with_factors({**self.factors, **cut})

    def split(self, rows: Sequence[int]) -> list[Self | None]:
        """Rows of w1 (w1_a; where that is block-diagonal beside a full w2, each part its own columns), the same w2."""
        self.check_rows(rows)
        units, role = self._units(rows), self._row_role
        silent = fac.zero_rows(self.factors[role], units)
        if "diff_b" in self.factors:
            silent = [both[0] and both[1] for both in zip(silent, fac.zero_rows(self.factors["diff_b"], rows), strict=True)]
        starts = [sum(rows[:index]) for index in range(len(rows))]
        parts = [self.rows_between(start, start + height) for start, height in zip(starts, rows, strict=True)]
        free = role == "lokr_w1_a" and "lokr_w2" in self.factors
        ranges = fac.block_ranges(self.factors[role], units) if free else None
        if ranges is not None and all((start == stop) <= empty for (start, stop), empty in zip(ranges, silent, strict=True)):
            return [None if a == b else self._block(part, a, b) for part, (a, b) in zip(parts, ranges, strict=True)]
        return list(parts) if all(silent) else [None if empty else part for part, empty in zip(parts, silent, strict=True)]

    def _block(self, part: Self, start: int, stop: int) -> Self:
        whole = self.rank or 1
        factors = dict(part.factors) if stop - start == whole else part.without_alpha()
        factors["lokr_w1_a"] = fac.columns(factors["lokr_w1_a"], start, stop)
        factors["lokr_w1_b"] = fac.rows(factors["lokr_w1_b"], start, stop)
        return part.with_factors(factors, alpha=common.part_alpha(self.alpha, stop - start, whole))

    @classmethod
    def fuse(cls, parts: Sequence[Self | None], rows: Sequence[int]) -> Self:
        """w1 stacked, where every part has the same w2 and the same scale. Raises NotExact otherwise."""
        present = common.parts_present(parts, rows)
        like = present[0]
        if len({frozenset(part.factors) - {"alpha", "diff_b"} for part in present}) > 1 or not all(
            fac.all_same([part.factors[role] for part in present]) for role in SECOND if role in like.factors
        ):
            raise NotExact("LoKr parts can be fused only if all have the same lokr_w2")
        if len({part.scale_of(part.alpha) for part in present}) > 1:
            raise NotExact("LoKr parts of different scales cannot be fused")
        units, role = like._units(rows), like._row_role
        firsts = [None if part is None else part.factors[role] for part in parts]
        inner = [part.factors["lokr_w1_b"] for part in present if role == "lokr_w1_a"]
        kept = {name: like.factors[name] for name in SECOND if name in like.factors}
        if not inner or fac.all_same(inner):
            alpha, stored = common.shared_alpha(present)
            factors = {**stored, **kept, role: fac.filled(firsts, units), **({"lokr_w1_b": inner[0]} if inner else {})}
        elif "lokr_w2" in kept:
            alpha = common.fused_alpha(present)
            factors = {**kept, role: fac.blockdiag(firsts, units), "lokr_w1_b": fac.cat(inner)}
        else:
            raise NotExact("LoKr parts with two factored sides can be fused only if all have the same lokr_w1_b")
        factors |= common.joined(("diff_b",), parts, rows)
        return like.with_factors(factors, alpha=alpha, options=common.common_options(present))

    def swap_halves(self) -> Self:
        self.half()
        role = self._row_role
        if self._first_shape[0] % 2:
            raise NotExact(f"{role} has {self._first_shape[0]} rows: the halves of the output are no rows of it")
        swapped = {name: fac.swap_halves(self.factors[name]) for name in (role, "diff_b") if name in self.factors}
        return self.with_factors({**self.factors, **swapped})

    # --- other forms -------------------------------------------------------------------------------------------------

    def transpose(self) -> Self:
        """kron(w1, w2)^T = kron(w1^T, w2^T)."""
        if len(self.shape) != 2 or "lokr_t2" in self.factors:
            raise NotExact("only the LoKr of a matrix can be transposed")
        turned = {role: fac.transposed(self.factors[other]) for role, other in TURNED.items() if role in self.factors}
        return self.with_factors({**self.factors, **turned})

    def to_lora(self, dtype: str = "F32") -> Lora:
        """up = kron(a1, a2), down = kron(b1, b2); a full factor is I · w or w · I, whichever is smaller. Rank r1 · r2.

        A factored side of more columns than the matrix it makes is multiplied out first.
        """
        import torch

        o1, i1 = self._first_shape
        o2, *inner = self._second_shape
        ranks = [min(o1, i1), min(o2, math.prod(inner))]
        for index, role in enumerate(("lokr_w1_b", "lokr_w2_b")):
            if role in self.factors:
                ranks[index] = min(ranks[index], self.factors[role].shape[0])
        rank = math.prod(ranks)
        kernel = inner[1:]
        shapes = (o1 * o2, rank, *(1 for _ in kernel)), (rank, i1 * inner[0], *kernel)

        def half(side: int) -> torch.Tensor:
            first, second = (pair[side] for pair in self._pairs(ranks))
            return torch.kron(first.contiguous(), second.contiguous()).reshape(shapes[side]).to(torch_dtype(dtype))

        factors: dict[str, LazyTensor] = {
            "up": ComputedTensor(dtype, shapes[0], lambda: half(0)),
            "down": ComputedTensor(dtype, shapes[1], lambda: half(1)),
        }
        factors |= {role: self.factors[role] for role in ("diff_b",) if role in self.factors}
        alpha = common.part_alpha(self.alpha, rank, self.divisor) if self.divisor else None
        return Lora(factors, alpha, self.alpha_source if alpha is not None else "assumed", self.options)

    def _pairs(self, ranks: Sequence[int]) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """Both matrices as products a (o*, rank) · b (rank, n*) in float64."""
        import torch

        result = []
        for name, matrix, rank in zip(("lokr_w1", "lokr_w2"), self.matrices(), ranks, strict=True):
            if f"{name}_b" in self.factors and rank == self.factors[f"{name}_b"].shape[0]:
                a, b = fac.exact(self.factors[f"{name}_a"]), fac.exact(self.factors[f"{name}_b"])
                if name == "lokr_w2" and "lokr_t2" in self.factors:
                    a, b = a.t(), torch.einsum("ij...,jr->ir...", fac.exact(self.factors["lokr_t2"]), b)
                result.append((a, b.flatten(1)))
            else:
                unit = torch.eye(rank, dtype=torch.float64)
                result.append((unit, matrix) if matrix.shape[0] == rank else (matrix, unit))
        return result
