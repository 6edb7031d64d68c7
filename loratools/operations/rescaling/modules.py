"""One module under another alpha, without one, or at another strength.

    alpha a      factors · (s / s'), s' = a / rank:  ΔW = s · up · down stays
    strength k   alpha · |k| where the file has a place for alpha, else factors · k;  diff, norms and biases without a scale · k
    fold         factors · s, and no alpha, or alpha = rank where a record must say one

A ratio goes into two factors (`factors.spread`): a power of two exactly, everything else rounded once, in the factors' own dtype or the
one asked for, balanced so that neither factor leaves its range. The error is measured against the module as the file has it.
Invariant: a module that need not change keeps its tensors, its alpha tensor included.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from fractions import Fraction

from loratools.adapters import factors as fac
from loratools.adapters.adapter import Module, NotExact, quotient
from loratools.adapters.kinds import Dense, Dora, Glora, Ia3
from loratools.adapters.kinds.common import Scaled
from loratools.adapters.kinds.glora import ORDER
from loratools.adapters.sums import BIASES, WEIGHTS
from loratools.mapping.fitting import fit_dtype, narrows, relative_change
from loratools.tensors.lazy import LazyTensor, scalar_tensor

LIMIT = 1e30  # of the size of an alpha or a strength, and 1 / LIMIT below: beyond it scales leave float32
_NOTES = ("rounded", "second_took")  # options that speak of the making of a module
_ROUNDS = (Scaled, Dora, Glora)  # kinds whose alpha is a scale


@dataclass(frozen=True)
class Request:
    """One of alpha (of every module, "rank" for its own), strength (what ΔW is multiplied by) and fold; and the factors' dtype."""

    alpha: float | str | None = None
    strength: float | None = None
    fold: bool = False
    dtype: str | None = None

    @property
    def factor(self) -> Fraction:
        """new ΔW / ΔW."""
        return Fraction(1 if self.strength is None else self.strength)


@dataclass(frozen=True)
class Place:
    """Where a file keeps a module's alpha.

    tensor: in a tensor of the module; recorded: in adapter_config.json or the header; both may be.
    header: may the header get a record where there is none? strength: is alpha what a strength goes into?
    """

    tensor: bool
    recorded: bool
    header: bool
    strength: bool


@dataclass(frozen=True)
class Rescaled:
    """The module as it will be written, and the relative error of its ΔW (or bias, if that is larger).

    rounded_to: dtypes of what was rounded, factors or else the alpha tensor.
    """

    module: Module
    error: float = 0.0
    rounded_to: frozenset[str] = frozenset()


def has_scale(module: Module) -> bool:
    """Is alpha / rank a factor of this module's ΔW? For the other kinds alpha is a constraint, or nothing."""
    return isinstance(module, _ROUNDS)


def constrained(module: Module) -> bool:
    """Is alpha a limit of a rotation (OFT, BOFT)? It stays whatever is asked for."""
    return module.alpha is not None and not has_scale(module) and not isinstance(module, Dense | Ia3)


def takes_strength(module: Module) -> bool:
    """Can the module say k · ΔW? Not if it multiplies or replaces the base weight; GLoRA's alpha can."""
    return module.linear or isinstance(module, Glora)


def rescaled(module: Module, request: Request, place: Place) -> Rescaled:
    """The module as the request wants it. Raises NotExact where its factors, or an alpha tensor, cannot hold the result."""
    narrower = request.dtype is not None and narrows(module, request.dtype)
    made = _changed(fit_dtype(module, request.dtype, narrow=True) if request.dtype else module, request, place)
    exact: Module = module
    if narrower or made.rounded:
        exact = _changed(fit_dtype(module, "F64"), request, place, made.options.get("second_took", 0))
    if narrower and request.dtype:  # balanced for the narrow dtype, rounded to it once
        made = fit_dtype(exact, request.dtype, narrow=True)
    factors = narrower or made.rounded
    error = _error(module, made, exact, request) if factors else _alpha_error(module, made, request)
    dtypes = {tensor.dtype for role, tensor in made.factors.items() if role != "alpha" and fac.is_float(tensor)} if factors else {"F32"}
    options = {name: value for name, value in made.options.items() if name not in _NOTES}
    return Rescaled(replace(made, options=options), error, frozenset(dtypes) if error else frozenset())


def _changed(module: Module, request: Request, place: Place, second_takes: int | None = None) -> Module:
    """The module with every factor in its own dtype. second_takes: the power of two the second factor has to take."""
    if request.strength is not None:
        return _stronger(module, request.factor, place, second_takes)
    if not isinstance(module, _ROUNDS):
        return _without_alpha(module) if request.fold and isinstance(module, Dense | Ia3) else module
    alpha = _wanted(module, request, place)
    if request.fold:
        place = replace(place, tensor=False)
    if alpha == module.alpha:
        return _labelled(module, module, alpha, place) if request.fold else module
    between = alpha if alpha is not None else float(_rank(module) or 1)
    moved = _glora_at(module, between) if isinstance(module, Glora) else module.with_alpha(between, second_takes)
    return _labelled(moved, module, alpha, place)


def _wanted(module: Module, request: Request, place: Place) -> float | None:
    """The alpha this module is to have: what is asked for, as precisely as the file can say it; None for none."""
    rank = _rank(module)
    if request.fold:
        return float(rank) if place.recorded and rank else None
    alpha = (float(rank) if rank else module.alpha) if isinstance(request.alpha, str) else request.alpha
    if alpha is None or alpha == module.alpha:
        return alpha
    if place.tensor:
        return scalar_tensor(alpha).scalar()
    if place.recorded or alpha != rank:
        return _checked(alpha, place)
    return None  # the readers of such a file take the rank for it


def _checked(alpha: float, place: Place) -> float:
    if not (place.tensor or place.recorded or place.header):
        raise NotExact("there is no place for alpha in this dialect: its readers take the rank for it (--alpha rank, or --fold)")
    return alpha


def _rank(module: Module) -> int | None:
    """What alpha is divided by."""
    inner = module.inner if isinstance(module, Dora) else module
    return inner.divisor if isinstance(inner, Scaled) else inner.rank


def _labelled(module: Module, before: Module, alpha: float | None, place: Place) -> Module:
    """The module with this alpha and, where the file keeps alphas in tensors, its tensor: float32 in the shape the file's had."""
    factors = {role: tensor for role, tensor in module.factors.items() if role != "alpha"}
    if place.tensor and alpha is not None:
        shape = before.factors["alpha"].shape if "alpha" in before.factors else ()
        factors["alpha"] = scalar_tensor(alpha, "F32", shape)
    return replace(module, factors=factors, alpha=alpha)


def _without_alpha(module: Module) -> Module:
    """A kind to which a stored alpha says nothing, without it."""
    return replace(module, factors={role: tensor for role, tensor in module.factors.items() if role != "alpha"}, alpha=None)


def _glora_at(module: Glora, alpha: float) -> Module:
    """ΔW = s (W a1 a2 + b1 b2) under another alpha: the ratio goes into one factor of each product. Raises NotExact."""
    if module.layout is None:
        raise NotExact("the shapes of this GLoRA do not tell the older layout from the newer one")
    _, second, up, _ = ORDER[module.layout]
    ratio = _scale(module, module.alpha) / _scale(module, alpha)
    return _times(module, {second: ratio, up: ratio})


def _scale(module: Module, alpha: float | None) -> Fraction:
    rank = _rank(module)
    return Fraction(1) if alpha is None or not rank else Fraction(alpha) / rank


# ------------------------------------------------------------------------------------------------------------------- strength


def _stronger(module: Module, factor: Fraction, place: Place, second_takes: int | None) -> Module:
    """factor · ΔW: in alpha, but for its sign, where that is a scale the file has a place for; else in the factors."""
    if factor == 1:
        return module
    if isinstance(module, Dense):
        return _times(module, dict.fromkeys((*WEIGHTS, *BIASES), factor))
    rank = _rank(module)
    in_alpha = bool(place.strength and rank)
    sign = Fraction(1 if factor > 0 else -1)
    ratio = sign if in_alpha else factor
    if isinstance(module, Scaled):
        moved: Module = _spread(module, ratio, second_takes)
        moved = _times(moved, {"bias": ratio, "diff_b": factor})
    elif isinstance(module, Glora) and module.layout is not None:
        _, second, up, _ = ORDER[module.layout]
        moved = _times(module, {second: ratio, up: ratio})
    else:
        raise NotExact(f"a {module.kind} module has no strength")
    if not in_alpha:
        return moved
    size = abs(factor) * (Fraction(module.alpha) if module.alpha is not None else Fraction(rank or 1))
    if not 1 / LIMIT < abs(size) < LIMIT:
        raise NotExact(f"its alpha would be {float(size):g}, expected a number between 1e-30 and 1e30")
    alpha = scalar_tensor(float(size)).scalar() if place.tensor else float(size)
    return _labelled(moved, module, alpha, place)


def _spread(module: Scaled, ratio: Fraction, second_takes: int | None) -> Module:
    """The ratio in two of the factors."""
    first, second = module.spread_roles
    spread = fac.spread(module.factors[first], module.factors[second], ratio, second_takes)
    notes = {"second_took": spread.second_took, **({"rounded": True} if spread.rounded else {})}
    return module.with_factors({**module.factors, first: spread.first, second: spread.second}, options={**module.options, **notes})


def _times(module: Module, ratios: Mapping[str, Fraction]) -> Module:
    """The module with these of its factors multiplied, each rounded once to its own dtype."""
    factors: dict[str, LazyTensor] = dict(module.factors)
    lost = False
    for role in factors.keys() & ratios.keys():
        factors[role], rounded = fac.multiplied(factors[role], ratios[role])
        lost = lost or rounded
    return replace(module, factors=factors, options={**module.options, "rounded": True} if lost else module.options)


# --------------------------------------------------------------------------------------------------------------------- errors


def _alpha_error(module: Module, made: Module, request: Request) -> float:
    """What rounding alpha to its tensor took from a strength, where no factor was rounded."""
    if request.strength is None or made.alpha is None or made.alpha == module.alpha:
        return 0.0
    exact = abs(request.factor) * _scale(module, module.alpha)
    return abs(float(_scale(made, made.alpha) / exact - 1))


def _error(module: Module, made: Module, exact: Module, request: Request) -> float:
    """‖written - factor · ΔW‖ / ‖factor · ΔW‖, the bias alike; exact: the new module in float64, for kinds that need a base."""
    factor = float(request.factor)
    if not module.linear:
        return relative_change(exact, made)
    found = 0.0
    if isinstance(module, Scaled) and _rank(module):
        alpha = float(module.alpha if module.alpha is not None else _rank(module) or 1)
        found = replace(module, alpha=alpha * factor).relative_error(made)
    elif module.changes_weight:
        wanted = module.delta() * factor
        found = quotient(float((made.delta() - wanted).norm()), float(wanted.norm()))
    before, after = module.bias_delta(), made.bias_delta()
    if before is not None and after is not None:
        found = max(found, quotient(float((after - before * factor).norm()), float((before * factor).norm())))
    return found
