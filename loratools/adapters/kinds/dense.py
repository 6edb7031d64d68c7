"""Dense changes: ΔW = diff (LyCORIS full), norm deltas, replacements, and the extras that stand beside a LoRA.

W' = W + diff + w_norm + sparse(bias_indices, bias_values); b' = b + diff_b + b_norm. A replacement sets W' = set_weight or
b' = set_bias, so its delta needs the base. reshape_weight (ComfyUI) holds the shape W is zero-padded to before anything is
added; it changes no value by itself. There is no alpha: the scale is 1, a stored alpha tensor is only kept.
"""

from __future__ import annotations

from collections.abc import Sequence
from collections.abc import Set as AbstractSet
from typing import TYPE_CHECKING, ClassVar

from loratools.adapters import factors as fac
from loratools.adapters.adapter import NotExact, RowDelta
from loratools.adapters.kinds import common
from loratools.adapters.kinds.common import Kind, Problem, register
from loratools.errors import MalformedError

if TYPE_CHECKING:
    from typing import Self

    import torch

SPARSE = ("bias_indices", "bias_values", "bias_size")
WEIGHTS = ("diff", "w_norm", "set_weight", "weight")  # rows are output rows of W
BIASES = ("diff_b", "b_norm", "set_bias")
SETTING = ("set_weight", "weight", "set_bias")  # `weight` without IA3's on_input replaces W


@register
class Dense(Kind):
    """Additive dense change. Roles: diff (W's shape), diff_b (o), w_norm (d), b_norm (d), reshape_weight, the sparse three."""

    kind: ClassVar[str] = "dense"
    roles: ClassVar[tuple[str, ...]] = ("alpha", "diff", "diff_b", "w_norm", "b_norm", "reshape_weight", *SPARSE)
    needs: ClassVar[tuple[frozenset[str], ...]] = ()
    constraint: ClassVar[bool] = True  # a stored alpha means nothing here, so 0 is as good as any

    @classmethod
    def claim(cls, roles: AbstractSet[str]) -> frozenset[str] | None:
        found = {role for role in roles if role in cls.roles}
        if not set(SPARSE) <= found:
            found -= set(SPARSE)
        return frozenset(found) if found - {"alpha"} else None

    @property
    def shape(self) -> tuple[int | None, ...]:
        for role in WEIGHTS:
            if role in self.factors:
                return self.factors[role].shape
        if "bias_size" in self.factors:
            return fac.integers(self.factors["bias_size"])
        if "reshape_weight" in self.factors:
            return self.padded_shape
        return next(((tensor.shape[0], None) for role, tensor in self.factors.items() if role in BIASES and tensor.shape), (None, None))

    @property
    def padded_shape(self) -> tuple[int, ...]:
        """The shape reshape_weight asks W to be zero-padded to; () without it."""
        return fac.integers(self.factors["reshape_weight"]) if "reshape_weight" in self.factors else ()

    def shape_problems(self) -> list[Problem]:
        if "bias_size" in self.factors:
            indices, values, size = (self.factors[role].shape for role in SPARSE)
            if len(values) != 1 or len(size) != 1 or indices != size + values:
                return [("error", "bad-shape", f"{', '.join(SPARSE)} have shapes {indices}, {values}, {size}, expected (d, n), (n), (d)")]
        out = next((self.factors[role].shape[0] for role in WEIGHTS if role in self.factors and self.factors[role].shape), None)
        if out is None:
            return []
        return common.expect(self.factors, dict.fromkeys((*WEIGHTS, *BIASES), (out,)))

    def delta(self, weight: torch.Tensor | None = None) -> torch.Tensor:
        import torch

        found = [fac.exact(self.factors[role]) for role in ("diff", "w_norm") if role in self.factors]
        if "bias_values" in self.factors:
            found.append(self._sparse())
        if found:
            total = found[0]
            for other in found[1:]:
                total = total + common.on_base(common.fitted(other, total), total)
            return common.fitted(total, weight)
        shape = tuple(weight.shape) if weight is not None else self.shape
        if None in shape:
            raise NotExact("a change of the bias alone does not tell the shape of the weight")
        return torch.zeros([size for size in shape if size is not None], dtype=torch.float64)

    @property
    def changes_weight(self) -> bool:
        return any(role in self.factors for role in (*WEIGHTS, *SPARSE))

    def by_rows(self, dtype: torch.dtype) -> RowDelta | None:
        """One full tensor (`diff` or a replacement), its rows read when they are needed."""
        found = [role for role in (*WEIGHTS, *SPARSE) if role in self.factors]
        if len(found) != 1 or "reshape_weight" in self.factors:
            return None
        tensor, replaces = self.factors[found[0]], found[0] in SETTING

        def block(start: int, stop: int, weight: torch.Tensor) -> torch.Tensor:
            rows = tensor.load_rows(start, stop).to(dtype, copy=True).reshape(stop - start, -1)
            return rows.sub_(weight.reshape(stop - start, -1)) if replaces else rows

        def entries(rows: torch.Tensor, columns: torch.Tensor) -> torch.Tensor:
            first, last = int(rows.min()), int(rows.max()) + 1
            found: torch.Tensor = tensor.load_rows(first, last).reshape(last - first, -1)[rows - first, columns].to(change_dtype())
            return found

        return RowDelta(block, None if replaces else entries)

    def _sparse(self) -> torch.Tensor:
        """bias_values at bias_indices (dimensions, n) of zeros of shape bias_size. Raises MalformedError for an index outside."""
        import torch

        indices, values = self.factors["bias_indices"].load().to(torch.int64), fac.exact(self.factors["bias_values"])
        size = fac.integers(self.factors["bias_size"])
        limit = torch.tensor(size)[:, None]
        if indices.shape != (len(size), *values.shape) or bool(((indices < 0) | (indices >= limit)).any()):
            raise MalformedError(f"bias_indices does not point into a tensor of shape {list(size)} with {values.numel()} values")
        return torch.zeros(size, dtype=torch.float64).index_put(tuple(indices), values, accumulate=True)

    def bias_delta(self, bias: torch.Tensor | None = None) -> torch.Tensor | None:
        found = [fac.exact(self.factors[role]).flatten() for role in ("diff_b", "b_norm") if role in self.factors]
        return sum(found[1:], start=found[0]) if found else None

    def split(self, rows: Sequence[int]) -> list[Self | None]:
        """Rows of every tensor; a part of nothing but +0.0 is absent unless all parts are (a replacement never is)."""
        roles = self._row_roles("split")
        self.check_rows(rows)
        cut = {role: fac.pieces(self.factors[role], rows) for role in roles}
        rest = {role: tensor for role, tensor in self.factors.items() if role not in cut}
        parts = [self.with_factors({**rest, **{role: cut[role][index] for role in roles}}) for index in range(len(rows))]
        if any(role in SETTING for role in roles):
            return list(parts)
        silent = [all(zero) for zero in zip(*(fac.zero_rows(self.factors[role], rows) for role in roles), strict=True)]
        return list(parts) if all(silent) else [None if empty else part for part, empty in zip(parts, silent, strict=True)]

    @classmethod
    def fuse(cls, parts: Sequence[Self | None], rows: Sequence[int]) -> Self:
        """Every tensor stacked, zeros where a part has none. Raises NotExact where a replacement would have a gap."""
        present = common.parts_present(parts, rows)
        roles = list(dict.fromkeys(role for part in present for role in part._row_roles("fuse")))
        for role in roles:
            if role in SETTING and any(part is None or role not in part.factors for part in parts):
                raise NotExact(f"{role} replaces rows: it cannot be fused with a part that has none")
        kept = {role: tensor for role, tensor in present[0].factors.items() if role == "alpha"}
        return present[0].with_factors({**kept, **common.joined(roles, parts, rows)}, options=common.common_options(present))

    def swap_halves(self) -> Self:
        roles = self._row_roles("swap")
        self.half()
        return self.with_factors({**self.factors, **{role: fac.swap_halves(self.factors[role]) for role in roles}})

    def transpose(self) -> Self:
        matrices = [role for role in ("diff", *SETTING[:2]) if role in self.factors]
        self._row_roles("transpose")
        if any(len(self.factors[role].shape) != 2 for role in matrices):
            raise NotExact("only a dense matrix can be transposed")
        return self.with_factors({**self.factors, **{role: fac.transposed(self.factors[role]) for role in matrices}})

    def _row_roles(self, verb: str) -> list[str]:
        other = [role for role in (*SPARSE, "reshape_weight") if role in self.factors]
        if other:
            raise NotExact(f"cannot {verb} the rows of {', '.join(other)}")
        return [role for role in (*WEIGHTS, *BIASES) if role in self.factors]


@register
class Replacement(Dense):
    """set_weight (or a bare weight) and set_bias in place of W and b, perhaps with additive roles; the delta needs the base."""

    kind: ClassVar[str] = "set"
    linear: ClassVar[bool] = False
    roles: ClassVar[tuple[str, ...]] = ("alpha", *SETTING, *Dense.roles[1:])

    @classmethod
    def claim(cls, roles: AbstractSet[str]) -> frozenset[str] | None:
        return super().claim(roles) if roles & set(SETTING) else None

    def delta(self, weight: torch.Tensor | None = None) -> torch.Tensor:
        role = next((role for role in SETTING[:2] if role in self.factors), None)
        if role is None:
            return super().delta(weight)
        if weight is None:
            raise NotExact(f"{role} replaces the weight: its delta needs the base weight")
        change = common.on_base(common.fitted(fac.exact(self.factors[role]), weight), weight) - weight.to(change_dtype())
        additive = {role: tensor for role, tensor in self.factors.items() if role not in SETTING}
        return change + common.on_base(Dense(additive).delta(weight), weight) if Dense.claim(set(additive)) else change

    def bias_delta(self, bias: torch.Tensor | None = None) -> torch.Tensor | None:
        added = super().bias_delta(bias)
        if "set_bias" not in self.factors:
            return added
        if bias is None:
            raise NotExact("set_bias replaces the bias: its delta needs the base bias")
        change = fac.exact(self.factors["set_bias"]).flatten() - bias.to(change_dtype())
        return change if added is None else change + added


def change_dtype() -> torch.dtype:
    """Deltas are computed in float64."""
    import torch

    return torch.float64
