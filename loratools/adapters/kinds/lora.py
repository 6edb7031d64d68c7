"""LoRA (LoCon, DyLoRA): ΔW = alpha / rank · up · down, for matrices, convolutions and PEFT embeddings.

Shapes: down (r, i, *k), up (o, r[, 1, 1]); with a Tucker core mid (p, q, *k), down (q, i), up (o, p):
ΔW[o, i, ..] = s Σ up[o, p] mid[p, q, ..] down[q, i]. Embedding: ΔW (num, dim) = s (B A)^T, A = embedding_down (r, num),
B = embedding_up (dim, r). Bias: s · bias + diff_b. Hu et al., 2021 (arXiv:2106.09685); LyCORIS for the core.
Norms, singular values and errors come from the QR cores of the factors: no (o, i) matrix is made for them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, ClassVar

from loratools.adapters import algebra
from loratools.adapters import factors as fac
from loratools.adapters.adapter import Module, NotExact, RowDelta, quotient
from loratools.adapters.kinds import common
from loratools.adapters.kinds.common import Problem, Scaled, register
from loratools.tensors.dtypes import torch_dtype
from loratools.tensors.lazy import ComputedTensor, LazyTensor

if TYPE_CHECKING:
    from typing import Self

    import torch

ROW_ROLES = ("bias", "diff_b")


@register
class Lora(Scaled):
    """Low-rank pair. Roles: down, up, optional mid, bias (scaled), diff_b (not scaled), alpha; or the embedding pair."""

    kind: ClassVar[str] = "lora"
    roles: ClassVar[tuple[str, ...]] = ("alpha", "down", "mid", "up", "bias", "diff_b", "embedding_down", "embedding_up")
    needs: ClassVar[tuple[frozenset[str], ...]] = (frozenset({"down", "up"}), frozenset({"embedding_down", "embedding_up"}))

    @property
    def embedding(self) -> bool:
        return "embedding_down" in self.factors

    @property
    def tucker(self) -> bool:
        return "mid" in self.factors

    @property
    def spread_roles(self) -> tuple[str, str]:
        return ("embedding_up", "embedding_down") if self.embedding else ("up", "down")

    @property
    def rank(self) -> int | None:
        shape = self.factors[self.spread_roles[1]].shape
        return shape[0] if shape else None

    @property
    def shape(self) -> tuple[int | None, ...]:
        up, down = (self.factors[role].shape for role in self.spread_roles)
        if len(up) < 2 or len(down) < 2:
            return (None, None)
        if self.embedding:
            return (down[1], up[0])
        return (up[0], down[1], *(self.factors["mid"].shape if self.tucker else down)[2:])

    def shape_problems(self) -> list[Problem]:
        up, down = (self.factors[role].shape for role in self.spread_roles)
        found = common.expect(self.factors, dict.fromkeys(self.spread_roles, (None, None)))
        found += common.expect(self.factors, {"mid": (None, None, None)})
        found += common.matrix_problems(self.factors, ("embedding_up", "embedding_down"))
        if found:
            return found
        inner = self.factors["mid"].shape[:2] if self.tucker else (down[0], down[0])
        if (up[1], down[0]) != inner:
            found.append(("error", "rank-mismatch", f"up has shape {list(up)}, down {list(down)}: ranks {up[1]} and {down[0]} differ"))
        if any(size != 1 for size in (*up[2:], *(down[2:] if self.tucker else ()))):
            found.append(("error", "bad-shape", f"up has shape {list(up)}, expected a kernel of size 1"))
        return found + common.expect(self.factors, {role: (up[0],) for role in ROW_ROLES if not self.embedding})

    def matrices(self) -> tuple[torch.Tensor, torch.Tensor]:
        """(up (o, r), down (r, i · kernel)) in float64 with ΔW = scale · up @ down; a core is contracted into down."""
        import torch

        up, down = (fac.exact(self.factors[role]) for role in self.spread_roles)
        if self.embedding:
            return down.t(), up.t()
        if self.tucker:
            core = fac.exact(self.factors["mid"])
            down = torch.einsum("pq...,qi->pi...", core, down.reshape(down.shape[0], -1))
        return up.reshape(up.shape[0], -1), down.reshape(down.shape[0], -1)

    def delta(self, weight: torch.Tensor | None = None) -> torch.Tensor:
        up, down = self.matrices()
        delta = (up @ down).mul_(self.scale).reshape([size for size in self.shape if size is not None])
        return common.fitted(delta, weight)

    def by_rows(self, dtype: torch.dtype) -> RowDelta:
        up, down = self.matrices()
        up = up * self.scale
        left, right = up.to(dtype), down.to(dtype)
        return RowDelta(
            lambda start, stop, _: left[start:stop] @ right,
            lambda rows, columns: (up[rows] * down.t()[columns]).sum(1),
            up.norm(dim=1) * down.norm(dim=0).max(),
        )

    def bias_delta(self, bias: torch.Tensor | None = None) -> torch.Tensor | None:
        extra = self.extra_bias()
        if "bias" not in self.factors:
            return extra
        scaled = fac.exact(self.factors["bias"]).flatten() * self.scale
        return scaled if extra is None else scaled + extra

    # --- sizes and errors, from the factors alone -------------------------------------------------------------------

    def norm(self, weight: torch.Tensor | None = None) -> float:
        return abs(self.scale) * float(algebra.core(*self.matrices()).norm())

    def singular_values(self, weight: torch.Tensor | None = None) -> torch.Tensor:
        import torch

        values: torch.Tensor = torch.linalg.svdvals(algebra.core(*self.matrices()))
        return values * abs(self.scale)

    def relative_error(self, other: Module, weight: torch.Tensor | None = None) -> float:
        import torch

        if not isinstance(other, Lora):
            return super().relative_error(other, weight)
        (up, down), (other_up, other_down) = self.matrices(), other.matrices()
        difference = algebra.core(torch.cat([other_up * other.scale, up * -self.scale], 1), torch.cat([other_down, down]))
        return quotient(float(difference.norm()), self.norm())

    # --- row moves ---------------------------------------------------------------------------------------------------

    def rows_between(self, start: int, stop: int) -> Self:
        """Output rows start..stop with every other factor as it is; those of an embedding's table are columns of its down."""
        if self.embedding:
            return self.with_factors({**self.factors, "embedding_down": fac.columns(self.factors["embedding_down"], start, stop)})
        cut = {role: fac.rows(self.factors[role], start, stop) for role in ("up", *ROW_ROLES) if role in self.factors}
        return self.with_factors({**self.factors, **cut})

    def split(self, rows: Sequence[int]) -> list[Self | None]:
        """Dense up: its rows, every part with the same down. Block-diagonal up: each part its own columns and rank."""
        self._refuse_embedding("split")
        self.check_rows(rows)
        silent = [all(zero) for zero in zip(*(fac.zero_rows(self.factors[role], rows) for role in self._row_roles()), strict=True)]
        ranges = fac.block_ranges(self.factors["up"], rows)
        fits = ranges is not None and (not self.tucker or fac.blocks_only(self.factors["mid"], ranges))
        if ranges is not None and fits and all(a < b or empty for (a, b), empty in zip(ranges, silent, strict=True)):
            return [None if a == b else self._block(part, a, b) for part, (a, b) in zip(self._dense_parts(rows), ranges, strict=True)]
        parts = self._dense_parts(rows)
        return list(parts) if all(silent) else [None if empty else part for part, empty in zip(parts, silent, strict=True)]

    def _row_roles(self) -> list[str]:
        return [role for role in ("up", *ROW_ROLES) if role in self.factors]

    def _dense_parts(self, rows: Sequence[int]) -> list[Self]:
        starts = [sum(rows[:index]) for index in range(len(rows))]
        return [self.rows_between(start, start + height) for start, height in zip(starts, rows, strict=True)]

    def _block(self, part: Self, start: int, stop: int) -> Self:
        """The part's own columns of up and rows of down."""
        rank = self.factors["down"].shape[0]
        factors = {**part.factors, "up": fac.columns(part.factors["up"], start, stop), "down": fac.rows(self.factors["down"], start, stop)}
        if self.tucker:
            factors["mid"] = fac.columns(fac.rows(self.factors["mid"], start, stop), start, stop)
        if stop - start != rank:
            factors.pop("alpha", None)
        return part.with_factors(factors, alpha=common.part_alpha(self.alpha, stop - start, rank))

    @classmethod
    def fuse(cls, parts: Sequence[Self | None], rows: Sequence[int]) -> Self:
        """Same down and scale: up stacked. Else down stacked, up block-diagonal, rank Σ r, alpha = scale · rank.

        Differing scales go into the factors first (`rounded` where one is no power of two).
        """
        present = common.parts_present(parts, rows)
        for part in present:
            part._refuse_embedding("fuse")
        if len({(part._input(), part.tucker) for part in present}) > 1:
            raise NotExact("LoRA parts of different input shapes or of different structure cannot be fused")
        parts, equal = common.equalised(parts)
        found = [part for part in parts if part is not None]
        inner = ("down", "mid") if found[0].tucker else ("down",)
        ups = [None if part is None else part._up_of(len(found[0].factors["up"].shape)) for part in parts]
        if equal and all(fac.all_same([part.factors[role] for part in found]) for role in inner):
            alpha, stored = common.shared_alpha(found)
            factors = {**stored, "up": fac.filled(ups, rows), **{role: found[0].factors[role] for role in inner}}
        else:
            alpha, stored = common.fused_alpha(found), {}
            factors = {"up": fac.blockdiag(ups, rows), "down": fac.cat([part._down_of(found[0]) for part in found])}
            if found[0].tucker:
                cores = [part.factors["mid"] for part in found]
                factors["mid"] = fac.blockdiag(cores, [core.shape[0] for core in cores])
        factors |= common.joined(ROW_ROLES, parts, rows)
        options = common.common_options(found)
        return found[0].with_factors(factors, alpha=alpha, options=options)

    def _input(self) -> tuple[int | None, ...]:
        """(in, *kernel), a kernel of ones left out: 2-D and 4-D spellings of a 1x1 convolution fit together."""
        return self.shape[1:] if any(size != 1 for size in self.shape[2:]) else self.shape[1:2]

    def _up_of(self, dimensions: int) -> LazyTensor:
        up = self.factors["up"]
        return up.reshape((*up.shape[:2], *(1,) * (dimensions - 2)))

    def _down_of(self, like: Lora) -> LazyTensor:
        down = self.factors["down"]
        return down.reshape((down.shape[0], *like.factors["down"].shape[1:]))

    def swap_halves(self) -> Self:
        self._refuse_embedding("swap")
        self.half()
        return self.with_factors({**self.factors, **{role: fac.swap_halves(self.factors[role]) for role in self._row_roles()}})

    def _refuse_embedding(self, verb: str) -> None:
        if self.embedding:
            raise NotExact(f"cannot {verb} the rows of an embedding")

    # --- other forms -------------------------------------------------------------------------------------------------

    def transpose(self) -> Self:
        """ΔW^T = s · down^T up^T; a bias stays as it is."""
        if self.embedding or self.tucker or len(self.shape) != 2 or len(self.factors["up"].shape) != 2:
            raise NotExact("only the LoRA of a matrix can be transposed")
        swapped = {"up": fac.transposed(self.factors["down"]), "down": fac.transposed(self.factors["up"])}
        return self.with_factors({**self.factors, **swapped})

    def to_lora(self, dtype: str = "F32") -> Lora:
        """Itself, or with the Tucker core contracted into down: same rank, same alpha."""
        if not self.tucker:
            return self
        rank = self.factors["mid"].shape[0]
        shape = (rank, *(size for size in self.shape[1:] if size is not None))
        factors = {role: tensor for role, tensor in self.factors.items() if role != "mid"}
        factors["down"] = ComputedTensor(dtype, shape, lambda: self.matrices()[1].reshape(shape).to(torch_dtype(dtype)))
        if rank != self.rank:
            factors.pop("alpha", None)
        return self.with_factors(factors, alpha=common.part_alpha(self.alpha, rank, self.rank or rank))
