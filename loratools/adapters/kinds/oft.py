"""Orthogonal fine-tuning: blocks of the weight's rows (diag-oft, BOFT) or columns (PEFT, OneTrainer) are rotated.

diag-oft: Q = B - B^T, |Q| held below alpha · out (alpha is a constraint, no scale; 0 is none), R = (I + Q)(I - Q)^-1, rows
of each block W' = R^T W, then times rescale. sd-scripts' Flux module holds a list, one entry for each part of a fused
weight, clamps each by its own rows and always, and has no rescale: options["clamp"].
BOFT: m butterfly stages; in stage l the rows are viewed as (-1, 2, 2^l b/2), the last two axes exchanged, multiplied by
the blocks R_l (not transposed), and the view undone. Input axis: see `InputOft`.
Qiu et al., 2023 (arXiv:2306.07280), Liu et al., 2023 (arXiv:2311.06243); LyCORIS, sd-scripts, PEFT and OneTrainer.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from collections.abc import Set as AbstractSet
from typing import TYPE_CHECKING, ClassVar

from loratools.adapters import factors as fac
from loratools.adapters.adapter import NotExact
from loratools.adapters.kinds import common
from loratools.adapters.kinds.common import Kind, Problem, register
from loratools.tensors.lazy import LazyTensor

if TYPE_CHECKING:
    from typing import Self

    import torch

LISTED = tuple(f"oft_blocks.{index}" for index in range(8))


class Rotation(Kind):
    """What the three kinds share: alpha is a constraint, the scale is 1, the delta needs the base weight."""

    linear: ClassVar[bool] = False
    constraint: ClassVar[bool] = True

    @property
    def scale(self) -> float:
        return 1.0

    def _base(self, weight: torch.Tensor | None) -> torch.Tensor:
        """The base weight in float64."""
        import torch

        if weight is None:
            raise NotExact("an OFT module rotates the base weight: its delta needs it")
        return weight.to(torch.float64)

    def _rescaled(self, weight: torch.Tensor) -> torch.Tensor:
        if "rescale" not in self.factors:
            return weight
        return weight * fac.exact(self.factors["rescale"]).reshape(-1, *(1,) * (weight.dim() - 1))

    def _limit(self, out: int) -> float | None:
        """Largest |Q| for `out` rows, None without a constraint."""
        if self.alpha is None or (self.alpha <= 0 and not self.options.get("clamp")):
            return None
        return max(self.alpha, 0.0) * out


def skew(blocks: torch.Tensor, limit: float | None = None) -> torch.Tensor:
    """Q = B - B^T, scaled down to a joint Frobenius norm of at most `limit`."""
    skewed = blocks - blocks.transpose(-1, -2)
    norm = float(skewed.norm())
    return skewed if limit is None or norm <= limit else skewed * (limit / norm)


def cayley(skewed: torch.Tensor) -> torch.Tensor:
    """(I + Q)(I - Q)^-1 for each block."""
    import torch

    unit = torch.eye(skewed.shape[-1], dtype=skewed.dtype)
    result: torch.Tensor = torch.linalg.solve(unit - skewed, unit + skewed, left=False)
    return result


@register
class Oft(Rotation):
    """diag-oft. Roles: oft_blocks (n, b, b) or the list oft_blocks.0, .1, …; rescale (o, 1, ..), alpha (the constraint)."""

    kind: ClassVar[str] = "oft"
    roles: ClassVar[tuple[str, ...]] = ("alpha", "oft_blocks", *LISTED, "rescale")
    needs: ClassVar[tuple[frozenset[str], ...]] = (frozenset({"oft_blocks"}),)

    @classmethod
    def claim(cls, roles: AbstractSet[str]) -> frozenset[str] | None:
        extras = {role for role in ("alpha", "rescale") if role in roles}
        if "oft_blocks" in roles:
            return frozenset({"oft_blocks"}) | extras
        listed: list[str] = []
        while (role := f"oft_blocks.{len(listed)}") in roles:
            listed.append(role)
        return frozenset(listed) | extras if listed else None

    @property
    def blocks(self) -> list[LazyTensor]:
        """The blocks of each part of the list, one entry where there is no list."""
        if "oft_blocks" in self.factors:
            return [self.factors["oft_blocks"]]
        return [self.factors[f"oft_blocks.{index}"] for index in range(sum(role.startswith("oft_blocks.") for role in self.factors))]

    @property
    def part_rows(self) -> list[int]:
        return [math.prod(blocks.shape[:2]) for blocks in self.blocks]

    @property
    def shape(self) -> tuple[int | None, ...]:
        return (sum(self.part_rows), None)

    def shape_problems(self) -> list[Problem]:
        wrong = [list(blocks.shape) for blocks in self.blocks if len(blocks.shape) != 3 or blocks.shape[1] != blocks.shape[2]]
        found: list[Problem] = [("error", "bad-shape", f"oft_blocks has shape {shape}, expected [n, b, b]") for shape in wrong]
        return found or common.vector_problems(self.factors, "rescale", self.shape[0])

    def delta(self, weight: torch.Tensor | None = None) -> torch.Tensor:
        import torch

        base, turned, start = self._base(weight), [], 0
        for blocks, height in zip(self.blocks, self.part_rows, strict=True):
            rotation = cayley(skew(fac.exact(blocks), self._limit(height)))
            part = base[start : start + height].reshape(*blocks.shape[:2], -1)
            turned.append((rotation.transpose(1, 2) @ part).reshape(height, *base.shape[1:]))
            start += height
        return self._rescaled(torch.cat(turned)) - base

    def _clamped(self, blocks: LazyTensor, rows: Sequence[int]) -> bool:
        """Does the constraint act on these blocks, as a whole or on one of their parts of `rows`?"""
        import torch

        skewed = skew(fac.exact(blocks))
        sizes = [height // blocks.shape[1] for height in rows]
        parts = [(skewed, sum(rows)), *zip(torch.split(skewed, sizes), rows, strict=True)]
        limits = [(float(part.norm()), self._limit(height)) for part, height in parts]
        return any(limit is not None and norm > limit for norm, limit in limits)

    def split(self, rows: Sequence[int]) -> list[Self | None]:
        """Blocks of the parts, where boundaries fall between blocks; no part is absent.

        A constraint that acts is first moved into the blocks. A list gives its own parts, each with its constraint as before.
        """
        self.check_rows(rows)
        if "oft_blocks" not in self.factors:
            if list(rows) != self.part_rows:
                raise NotExact(f"an OFT list of {self.part_rows} rows cannot be split into {list(rows)}")
            kept = {role: tensor for role, tensor in self.factors.items() if not role.startswith("oft_blocks")}
            options = {**self.options, "listed": True}
            return [self.with_factors({**kept, "oft_blocks": blocks}, options=options) for blocks in self.blocks]
        blocks = self.factors["oft_blocks"]
        self._check_boundaries(rows)
        if self._clamped(blocks, rows):
            return self.unconstrained().split(rows)
        cut = fac.pieces(blocks, [height // blocks.shape[1] for height in rows])
        scales = fac.pieces(self.factors["rescale"], rows) if "rescale" in self.factors else []
        return [
            self.with_factors({**self.factors, "oft_blocks": piece, **({"rescale": scales[index]} if scales else {})})
            for index, piece in enumerate(cut)
        ]

    def unconstrained(self) -> Self:
        """The same rotation under a constraint of 0 (none): what the constraint takes off is taken off the blocks (`rounded`)."""
        if self.options.get("clamp") or len(self.blocks) > 1:
            raise NotExact("the constraint of this OFT always acts, on each part by its own rows: it cannot be moved into the blocks")
        blocks, limit = self.blocks[0], self._limit(self.part_rows[0])
        norm = float(skew(fac.exact(blocks)).norm())
        acts = limit is not None and norm > limit
        factors = {**self.without_alpha(), "oft_blocks": fac.times(blocks, limit / norm) if limit is not None and acts else blocks}
        return self.with_factors(factors, alpha=0.0, options={**self.options, "rounded": True} if acts else self.options)

    def _check_boundaries(self, rows: Sequence[int]) -> None:
        size = self.blocks[0].shape[1]
        if any(height % size for height in rows):
            raise NotExact(f"boundaries {list(rows)} do not fall between OFT blocks of {size} rows")

    @classmethod
    def fuse(cls, parts: Sequence[Self | None], rows: Sequence[int]) -> Self:
        """Blocks of one size stacked; a missing part turns nothing. Parts of a list: the list again.

        Constraints that differ or act are first moved into the blocks.
        """
        present = common.parts_present(parts, rows)
        first = present[0]
        options = {name: value for name, value in first.options.items() if name != "listed"}
        alpha = {role: tensor for role, tensor in first.factors.items() if role == "alpha"}
        same = len({part.alpha for part in present}) == 1
        if same and all(part is not None and part.options.get("listed") for part in parts):
            listed = {f"oft_blocks.{index}": part.factors["oft_blocks"] for index, part in enumerate(present)}
            return first.with_factors({**alpha, **listed}, options=options)
        if any("oft_blocks" not in part.factors for part in present) or len({part.blocks[0].shape[1] for part in present}) > 1:
            raise NotExact("OFT parts of different block sizes cannot be fused")
        first._check_boundaries(rows)
        if not same or any(part._clamped(part.blocks[0], part.part_rows) for part in present):
            return cls.fuse([None if part is None else part.unconstrained() for part in parts], rows)
        size = first.blocks[0].shape[1]
        stacked = fac.filled([None if part is None else part.blocks[0] for part in parts], [height // size for height in rows])
        factors = {**alpha, "oft_blocks": stacked, **common.joined(("rescale",), parts, rows, 1.0)}
        return first.with_factors(factors, options=options)

    def swap_halves(self) -> Self:
        """The halves of the block list, where it is even."""
        blocks = self.blocks
        if len(blocks) > 1 or blocks[0].shape[0] % 2:
            raise NotExact("an OFT of an odd number of blocks, or a list of parts, has no two halves of blocks")
        role = "oft_blocks" if "oft_blocks" in self.factors else "oft_blocks.0"
        swapped = {name: fac.swap_halves(self.factors[name]) for name in (role, "rescale") if name in self.factors}
        return self.with_factors({**self.factors, **swapped})


@register
class Boft(Rotation):
    """Butterfly OFT. Roles: oft_blocks (m, n, b, b), rescale (o, 1, ..), alpha (the constraint). Strength acts in each stage."""

    kind: ClassVar[str] = "boft"
    roles: ClassVar[tuple[str, ...]] = ("alpha", "oft_blocks", "rescale")
    needs: ClassVar[tuple[frozenset[str], ...]] = (frozenset({"oft_blocks"}),)

    @property
    def shape(self) -> tuple[int | None, ...]:
        blocks = self.factors["oft_blocks"].shape
        return (blocks[1] * blocks[2], None)

    def shape_problems(self) -> list[Problem]:
        stages, _, size, other = self.factors["oft_blocks"].shape
        out = self.shape[0] or 0
        if size != other or size % 2 or out % (2**stages * (size // 2) or 1):
            return [("error", "bad-shape", f"oft_blocks has shape {list(self.factors['oft_blocks'].shape)}, no butterfly of {out} rows")]
        return common.vector_problems(self.factors, "rescale", out)

    def delta(self, weight: torch.Tensor | None = None) -> torch.Tensor:
        return self.delta_at(1.0, weight)

    def delta_at(self, strength: float, weight: torch.Tensor | None = None) -> torch.Tensor:
        """ΔW with every stage at I + strength (R_l - I), then rescale."""
        import torch

        base = self._base(weight)
        blocks = fac.exact(self.factors["oft_blocks"])
        _, count, size, _ = blocks.shape
        unit = torch.eye(size, dtype=torch.float64)
        stages = unit + strength * (cayley(skew(blocks, self._limit(count * size))) - unit)
        turned = base.reshape(base.shape[0], -1)
        for level, rotation in enumerate(stages):
            stride = 2**level * size // 2
            turned = turned.reshape(-1, 2, stride, turned.shape[-1]).transpose(1, 2).reshape(count, size, -1)
            turned = (rotation @ turned).reshape(-1, stride, 2, turned.shape[-1]).transpose(1, 2).reshape(count * size, -1)
        return self._rescaled(turned.reshape(base.shape)) - base

    def split(self, rows: Sequence[int]) -> list[Self | None]:
        raise NotExact("the stages of a BOFT mix all rows: it cannot be split without the base weight")


@register
class InputOft(Rotation):
    """Rotated input columns: W' = W R^T with R block-diagonal over the inputs (a convolution's flattened with its kernel).

    Roles: oft_R.weight (n, b(b-1)/2), the upper triangles of Q, one row for all blocks where it is shared;
    oft_R.scaled_oft, a flag: Q is divided by 2 sqrt(b - 1) (OneTrainer). Options: use_cayley_neumann (default True, R = I + 2Q +
    2Q² + 2Q³ + Q⁴; False: R = (I - Q)(I + Q)^-1), coft with eps (|Q| of a block held below eps / sqrt n), block_share,
    onetrainer (its convolutions use W R).
    """

    kind: ClassVar[str] = "oft-in"
    roles: ClassVar[tuple[str, ...]] = ("alpha", "oft_R.weight", "oft_R.scaled_oft")
    needs: ClassVar[tuple[frozenset[str], ...]] = (frozenset({"oft_R.weight"}),)

    @property
    def block_size(self) -> int:
        """b from b (b - 1) / 2 values."""
        return (1 + math.isqrt(1 + 8 * self.factors["oft_R.weight"].shape[1])) // 2

    @property
    def shared(self) -> bool:
        return bool(self.options.get("block_share", self.factors["oft_R.weight"].shape[0] == 1))

    @property
    def shape(self) -> tuple[int | None, ...]:
        shape = self.factors["oft_R.weight"].shape
        return (None, None if len(shape) != 2 or self.shared else shape[0] * self.block_size)

    def shape_problems(self) -> list[Problem]:
        shape = self.factors["oft_R.weight"].shape
        if len(shape) != 2 or self.block_size * (self.block_size - 1) // 2 != shape[1]:
            return [("error", "bad-shape", f"oft_R.weight has shape {list(shape)}, expected [n, b (b - 1) / 2]")]
        return []

    def rotation(self) -> torch.Tensor:
        """R of each block, (n, b, b), float64."""
        import torch

        values, size = fac.exact(self.factors["oft_R.weight"]), self.block_size
        triangle = torch.zeros(values.shape[0], size, size, dtype=torch.float64)
        rows, columns = torch.triu_indices(size, size, 1)
        triangle[:, rows, columns] = values
        skewed = triangle - triangle.transpose(1, 2)
        if self.options.get("coft"):
            limit = float(self.options.get("eps", 6e-5)) / math.sqrt(values.shape[0])
            norm = skewed.flatten(1).norm(dim=1)[:, None, None]
            skewed = torch.where(norm <= limit, skewed, skewed * (limit / norm))
        if "oft_R.scaled_oft" in self.factors:
            skewed = skewed / (2.0 * math.sqrt(size - 1))
        if not self.options.get("use_cayley_neumann", True):
            return cayley(-skewed)
        unit, square = torch.eye(size, dtype=torch.float64), skewed @ skewed
        return unit + 2.0 * (skewed + square + square @ skewed) + square @ square

    def delta(self, weight: torch.Tensor | None = None) -> torch.Tensor:
        base, rotation = self._base(weight), self.rotation()
        flat = base.reshape(base.shape[0], -1)
        count = flat.shape[1] // self.block_size
        turn = rotation if base.dim() > 2 and self.options.get("onetrainer") else rotation.transpose(1, 2)
        blocks = flat.reshape(-1, count, self.block_size).transpose(0, 1)
        return (blocks @ turn).transpose(0, 1).reshape(base.shape) - base

    def split(self, rows: Sequence[int]) -> list[Self | None]:
        """The same rotation in every part."""
        return [self] * len(rows)

    @classmethod
    def fuse(cls, parts: Sequence[Self | None], rows: Sequence[int]) -> Self:
        present = common.parts_present(parts, rows)
        equal = fac.all_same([part.factors["oft_R.weight"] for part in present])
        if len(present) < len(parts) or not equal or any(dict(part.options) != dict(present[0].options) for part in present):
            raise NotExact("input-axis OFT parts can be fused only if all are there and equal")
        return present[0]

    def swap_halves(self) -> Self:
        return self
