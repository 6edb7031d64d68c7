"""What all kinds share: the registry, which roles make a module, checks by shape, and a scale moved into the factors.

A kind is a class with its formula and its row in the registry; `claim` decides which of a module name's tensors it takes.
Rules for split, fuse and swap are exact or refused (`NotExact`); inputs are never changed, outputs never share memory.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from collections.abc import Set as AbstractSet
from fractions import Fraction
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar

from loratools.adapters import factors as fac
from loratools.adapters.adapter import Module, NotExact
from loratools.tensors.lazy import LazyTensor

if TYPE_CHECKING:
    from typing import Self

    import torch

Problem = tuple[str, str, str]  # severity, code, message

KINDS: dict[str, type[Kind]] = {}

K = TypeVar("K", bound="type[Kind]")
P = TypeVar("P", bound="Kind")
S = TypeVar("S", bound="Scaled")


def register(kind: K) -> K:
    """Enter a kind into the registry under its name."""
    KINDS[kind.kind] = kind
    return kind


class Kind(Module):
    """A registered kind. `needs`: alternative sets of roles, one of which must be there in full; other roles are extras."""

    needs: ClassVar[tuple[frozenset[str], ...]]
    constraint: ClassVar[bool] = False  # is alpha a constraint (0 is valid) and no scale?
    scaled: ClassVar[bool] = False  # does an alpha from a configuration belong to this kind?

    @classmethod
    def claim(cls, roles: AbstractSet[str]) -> frozenset[str] | None:
        """The roles among `roles` that form one module of this kind, None if it would be incomplete."""
        core = frozenset[str]().union(*cls.needs)
        for need in cls.needs:
            if need <= roles:
                return need | {role for role in roles if role in cls.roles and role not in core}
        return None

    def problems(self) -> list[Problem]:
        return [*alpha_problems(self), *dtype_problems(self.factors), *(empty_problems(self.factors) or self.shape_problems())]

    def shape_problems(self) -> list[Problem]:
        """What the shapes of this kind's factors say against each other."""
        return []

    def without_alpha(self) -> dict[str, LazyTensor]:
        """The factors without the stored alpha tensor, for a module whose alpha is another."""
        return {role: tensor for role, tensor in self.factors.items() if role != "alpha"}

    def check_rows(self, rows: Sequence[int]) -> None:
        if self.shape[0] is not None and sum(rows) != self.shape[0]:
            raise NotExact(f"a module of {self.shape[0]} output rows cannot be split into {list(rows)}")

    def half(self) -> int:
        """Half of the output rows. Raises NotExact for an odd number."""
        out = self.shape[0]
        if out is None or out % 2:
            raise NotExact(f"a {self.kind} module of {out} output rows has no two halves")
        return out // 2


class Scaled(Kind):
    """A kind with ΔW = alpha / rank · (a product of factors): the scale can be moved into two of them."""

    scaled: ClassVar[bool] = True

    @property
    def spread_roles(self) -> tuple[str, str]:
        """The two factors a scale is moved into."""
        raise NotImplementedError

    @property
    def divisor(self) -> int | None:
        """What alpha is divided by; None where alpha is ignored."""
        return self.rank

    @property
    def scale(self) -> float:
        return 1.0 if self.alpha is None or not self.divisor else self.alpha / self.divisor

    def scale_of(self, alpha: float | None) -> Fraction:
        """The scale this module has with `alpha`, exactly."""
        return Fraction(1) if alpha is None or not self.divisor else Fraction(alpha) / self.divisor

    def rows_between(self, start: int, stop: int) -> Self:
        """Output rows start..stop, every factor that the rows share as it is. Raises NotExact."""
        raise NotExact(f"a {self.kind} module cannot be cut at rows {start}:{stop}")

    def transpose(self) -> Scaled:
        raise NotExact(f"a {self.kind} module cannot be transposed")

    def with_alpha(self, alpha: float, second_takes: int | None = None) -> Self:
        """The same ΔW under another alpha: the ratio of the scales goes into the factors (see `factors.spread`).

        Exact for a power of two within the dtypes' range, else `rounded`. options["second_took"] remembers the power of two that
        the second factor took; its negative as `second_takes` is the way back. Raises NotExact for an alpha of 0.
        """
        return self._moved(alpha, self.options, second_takes)

    def folded(self) -> Self:
        """The same ΔW without alpha (scale 1); see `with_alpha`."""
        return self if self.alpha is None else self._moved(None, self.options)

    def fold_is_exact(self, alpha: float | None = None) -> bool:
        """Would `with_alpha(alpha)` (`folded()` for None) keep every bit of ΔW?"""
        moved = self.folded() if alpha is None else self.with_alpha(alpha)
        return self.rounded or not moved.rounded

    def _moved(self, alpha: float | None, options: Mapping[str, Any], second_takes: int | None = None) -> Self:
        old, new = self.scale_of(self.alpha), self.with_factors(self.factors, alpha=alpha, options=options).scale_of(alpha)
        if not old or not new:
            raise NotExact("a scale of 0 cannot be moved into the factors")
        factors = dict(self.factors) if alpha == self.alpha else self.without_alpha()
        first, second = self.spread_roles
        spread = fac.spread(factors[first], factors[second], old / new, second_takes)
        factors[first], factors[second], rounded = spread.first, spread.second, spread.rounded
        if "bias" in factors and old != new:
            factors["bias"], lost = fac.multiplied(factors["bias"], old / new)
            rounded = rounded or lost
        source = self.alpha_source if alpha is not None else "assumed"
        changed = {name: value for name, value in options.items() if name != "second_took"}
        changed |= {"rounded": True} if rounded else {}
        changed |= {"second_took": spread.second_took} if spread.second_took else {}
        return self.with_factors(factors, alpha=alpha, alpha_source=source, options=changed)

    def extra_bias(self) -> torch.Tensor | None:
        """`diff_b`, the part of the bias that no scale touches, in float64."""
        return fac.exact(self.factors["diff_b"]).flatten() if "diff_b" in self.factors else None

    def bias_delta(self, bias: torch.Tensor | None = None) -> torch.Tensor | None:
        return self.extra_bias()


def alpha_problems(module: Kind) -> list[Problem]:
    """NaN, Inf and 0 are errors (0 is valid where alpha is a constraint), negative is a warning."""
    stored = module.factors.get("alpha")
    if stored is not None and stored.numel != 1:
        return [("error", "bad-alpha", f"alpha has shape {list(stored.shape)}, expected one value")]
    alpha = module.alpha
    if alpha is None:
        return [("error", "bad-alpha", f"alpha of dtype {stored.dtype} is no number")] if stored is not None else []
    if not math.isfinite(alpha):
        return [("error", "bad-alpha", f"alpha is {alpha}")]
    if alpha == 0 and not module.constraint:
        return [("error", "bad-alpha", "alpha is 0: some loaders read it as the rank, others as a scale of 0; --alpha settles it")]
    return [("warning", "bad-alpha", f"alpha is negative: {alpha:g}")] if alpha < 0 else []


def empty_problems(factors: Mapping[str, LazyTensor]) -> list[Problem]:
    empty = {role: tensor for role, tensor in factors.items() if tensor.numel == 0}
    return [("error", "empty-tensor", f"{role} has shape {list(tensor.shape)}, no element") for role, tensor in empty.items()]


# Roles that hold flags, sizes and indices; all others hold weights.
_COUNTS = ("alpha", "on_input", "reshape_weight", "bias_indices", "bias_size", "oft_R.scaled_oft")


def dtype_problems(factors: Mapping[str, LazyTensor]) -> list[Problem]:
    """Weights that are no numbers with a fraction: booleans, indices, quantised codes without their scale."""
    wrong = {role: tensor for role, tensor in factors.items() if role not in _COUNTS and not fac.is_float(tensor)}
    return [("error", "bad-dtype", f"{role} has dtype {tensor.dtype}, expected floating point") for role, tensor in wrong.items()]


def expect(factors: Mapping[str, LazyTensor], shapes: Mapping[str, tuple[int | None, ...]], code: str = "bad-shape") -> list[Problem]:
    """A problem for each factor that is there and whose leading dimensions are not those expected (None: any)."""
    found = []
    for role, expected in shapes.items():
        tensor = factors.get(role)
        if tensor is None:
            continue
        fits = len(tensor.shape) >= len(expected) and all(want in (None, got) for want, got in zip(expected, tensor.shape, strict=False))
        if not fits:
            wanted = ", ".join("?" if want is None else str(want) for want in expected)
            found.append(("error", code, f"{role} has shape {list(tensor.shape)}, expected [{wanted}]"))
    return found


def vector_problems(factors: Mapping[str, LazyTensor], role: str, size: int | None) -> list[Problem]:
    """A problem if the factor is there and does not hold `size` values along its one long axis."""
    tensor = factors.get(role)
    if tensor is None or tensor.numel == size == max(tensor.shape, default=1):
        return []
    return [("error", "bad-shape", f"{role} has shape {list(tensor.shape)}, expected {size} values along one axis")]


def matrix_problems(factors: Mapping[str, LazyTensor], roles: Sequence[str]) -> list[Problem]:
    """A problem for each of these factors that is there and no matrix."""
    wrong = {role: factors[role].shape for role in roles if role in factors and len(factors[role].shape) != 2}
    return [("error", "bad-shape", f"{role} has shape {list(shape)}, expected a matrix") for role, shape in wrong.items()]


def parts_present(parts: Sequence[P | None], rows: Sequence[int]) -> list[P]:
    """The parts that are there, checked against their rows. Raises ValueError where none is, NotExact on other rows."""
    present = [part for part in parts if part is not None]
    if not present:
        raise ValueError("nothing to fuse: every part is absent")
    for part, height in zip(parts, rows, strict=True):
        if part is not None and part.shape[0] not in (None, height):
            raise NotExact(f"a part of {part.shape[0]} output rows cannot fill {height}")
    if len({part.kind for part in present}) > 1:
        raise NotExact("parts of different kinds cannot be fused: " + ", ".join(part.kind for part in present))
    return present


def fused_alpha(parts: Sequence[Scaled]) -> float | None:
    """alpha of a block-diagonal fusion of parts of one scale s: s · Σ rank. None where no part has one."""
    if all(part.alpha is None for part in parts):
        return None
    return math.fsum(part.alpha if part.alpha is not None else float(part.divisor or 0) for part in parts)


def shared_alpha(parts: Sequence[Scaled]) -> tuple[float | None, dict[str, LazyTensor]]:
    """alpha of parts that keep their factors, and its stored tensor where all hold the same value."""
    if all(part.alpha is None for part in parts):
        return None, {}
    values = {part.alpha for part in parts}
    stored = [part.factors["alpha"] for part in parts if "alpha" in part.factors]
    if len(values) == 1 and stored:
        return parts[0].alpha, {"alpha": stored[0]}
    return next(part.alpha for part in parts if part.alpha is not None), {}


def equalised(parts: Sequence[S | None]) -> tuple[list[S | None], bool]:
    """(parts of one scale, were they already?): differing scales are moved into the factors, alpha becomes the rank."""
    scales = {part.scale_of(part.alpha) for part in parts if part is not None}
    if len(scales) == 1:
        return list(parts), True
    return [None if part is None else part.with_alpha(float(part.divisor or 1)) for part in parts], False


def common_options(parts: Sequence[Kind]) -> dict[str, Any]:
    """The first part's options; rounded if any part is."""
    options = {name: value for name, value in parts[0].options.items() if name != "rounded"}
    return {**options, "rounded": True} if any(part.rounded for part in parts) else options


def part_alpha(alpha: float | None, rank: int, whole: int) -> float | None:
    """alpha of a module of `rank` columns instead of `whole`, at the same scale."""
    return None if alpha is None else float(Fraction(alpha) * rank / whole)


def fitted(delta: torch.Tensor, weight: torch.Tensor | None, flattened: bool = False) -> torch.Tensor:
    """The delta in the weight's own shape, where the two differ by kernel axes of size 1, or (flattened) a flattened kernel.

    Anything else is left as it is, to be refused by whoever compares the shapes: nothing is ever broadcast.
    """
    if weight is None or delta.shape[0] != weight.shape[0] or delta.numel() != weight.numel():
        return delta
    kernels = [tuple(size for size in shape[2:] if size != 1) for shape in (delta.shape, weight.shape)]
    fits = delta.shape[:2] == weight.shape[:2] and kernels[0] == kernels[1]
    return delta.reshape(weight.shape) if fits or (flattened and delta.dim() == 2) else delta


def on_base(delta: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """A delta about to be added to the base weight. Raises NotExact where it has another shape."""
    if delta.shape != weight.shape:
        raise NotExact(f"a delta of shape {list(delta.shape)} does not fit the base weight of shape {list(weight.shape)}")
    return delta


def joined(roles: Sequence[str], parts: Sequence[Kind | None], rows: Sequence[int], value: float = 0.0) -> dict[str, LazyTensor]:
    """Row-wise tensors (biases, …) of the parts stacked; `value` where a part has none."""
    result = {}
    for role in roles:
        found = [None if part is None else part.factors.get(role) for part in parts]
        if any(tensor is not None for tensor in found):
            result[role] = fac.filled(found, rows, 0, value)
    return result
