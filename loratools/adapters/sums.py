"""Weighted sums of the modules of one site, exactly: Σ wᵢ ΔWᵢ as factors.

    LoRA, LoHa, LoKr    up = cat(upᵢ), down = cat(downᵢ), rank Σ rᵢ; LoHa, LoKr and tucker as their exact LoRA first
    scale               |wᵢ sᵢ| equal: factors as they are (but for signs), alpha = |w s| · rank; else wᵢ sᵢ in the factors, alpha = rank
    one module alone    its alpha times w, nothing else; a LoKr of two full factors, which ignores alpha: a factor times w
    dense               Σ wᵢ diffᵢ, beside the LoRA; biases: one sum for all

Summing factors instead of deltas (up₁ + up₂) is another function: it adds the cross terms. A power of two moves without a loss; where
another factor would be rounded to a 16-bit dtype, the factors become float32. Source: PEFT's `cat`, sd-scripts' `--concat`.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from typing import TYPE_CHECKING, Any

from loratools.adapters import factors as fac
from loratools.adapters.adapter import Module, NotExact
from loratools.adapters.kinds import Dense, Dora, Loha, Lokr, Lora
from loratools.adapters.kinds.common import Scaled
from loratools.tensors.dtypes import torch_dtype
from loratools.tensors.lazy import ComputedTensor, LazyTensor

if TYPE_CHECKING:
    import torch

WEIGHTS = ("diff", "w_norm", "bias_values")  # of a dense module: what changes W
BIASES = ("bias", "diff_b", "b_norm")
_HALF = ("F16", "BF16")
_OF_THE_SCALE = ("rounded", "second_took", "always_scale", "rank")  # options that speak of one module's own scale


@dataclass(frozen=True)
class Term:
    """One module of one input: weight · ΔW. position: of the input."""

    position: int
    weight: float
    module: Module


@dataclass(frozen=True)
class Combined:
    """A module of the sum. rounded: its ΔW is the sum's up to rounding; source: the module it is, if nothing was changed."""

    module: Module
    rounded: bool = False
    source: Module | None = None


def combined(terms: Sequence[Term], holds: Collection[str]) -> list[Combined]:
    """The modules whose ΔW and biases add up to Σ weight · (ΔW, bias) of additive modules: a low-rank one, a dense one, or both.

    holds: what the target can hold, which decides how a bias is kept. Raises NotExact where a scale exceeds every dtype.
    """
    if len({term.position for term in terms}) == 1 and terms[0].weight == 1.0:
        return [Combined(term.module, source=term.module) for term in terms]
    if len(terms) == 1:
        module = terms[0].module
        return [alone(module, terms[0].weight) if isinstance(module, Scaled) else _dense_alone(module, terms[0].weight)]
    bare = [replace(term, module=_without_bias(term.module)) for term in terms]
    low = [term for term in bare if isinstance(term.module, Scaled)]
    full = [term for term in bare if isinstance(term.module, Dense) and {*WEIGHTS, "reshape_weight"} & set(term.module.factors)]
    found: list[Combined] = []
    if low:
        found.append(alone(low[0].module, low[0].weight) if len(low) == 1 else concatenated(low))  # type: ignore[arg-type]
    if full:
        found.append(_dense_alone(full[0].module, full[0].weight) if len(full) == 1 else _dense_sum(full))
    return _with_bias(found, terms, holds)


def alone(module: Scaled, weight: float) -> Combined:
    """weight · ΔW of one module: only alpha changes; a negative sign goes into a factor, a LoKr without alpha's help takes all."""
    if weight == 1.0:
        return Combined(module, source=module)
    first, ratio, rounded = module.spread_roles[0], Fraction(weight), False
    factors = module.without_alpha()
    alpha = module.alpha
    if module.divisor:
        alpha = float(Fraction(alpha if alpha is not None else module.divisor) * abs(ratio))
        ratio = Fraction(1 if weight > 0 else -1)
    else:
        factors = dict(module.factors)
    changes = {first: ratio, "bias": ratio, "diff_b": Fraction(weight)}
    for role in factors.keys() & changes.keys():
        factors[role], lost = _times(factors[role], changes[role])
        rounded = rounded or lost
    source = module.alpha_source if module.alpha is not None else "tensor"
    return Combined(module.with_factors(factors, alpha=alpha, alpha_source=source), rounded)


def concatenated(terms: Sequence[Term]) -> Combined:
    """Σ weight · ΔW of low-rank modules without biases as one LoRA of rank Σ rᵢ."""
    loras = [plain_lora(term.module) for term in terms]
    if len({lora.embedding for lora in loras}) > 1:
        loras = [_as_embedding(lora) for lora in loras]
    ratios = [Fraction(term.weight) * lora.scale_of(lora.alpha) for term, lora in zip(terms, loras, strict=True)]
    rank = sum(lora.rank or 0 for lora in loras)
    size = abs(ratios[0]) if len({abs(ratio) for ratio in ratios}) == 1 else Fraction(1)
    moved = [_moved(lora, ratio / size) for lora, ratio in zip(loras, ratios, strict=True)]
    rounded = any(lost for _, _, lost in moved)
    rounded = rounded or any(lora is not term.module for term, lora in zip(terms, loras, strict=True))
    first, second = loras[0].spread_roles
    tensors = [tensor for up, down, _ in moved for tensor in (up, down)]
    dtype = fac.widest(tensors)
    like = max(loras, key=lambda lora: (len(lora.factors[second].shape), len(lora.factors[first].shape)))
    tail, ones = like.factors[second].shape[1:], like.factors[first].shape[2:]
    ups = [fac.cast(up, dtype).reshape((*up.shape[:2], *ones)) for up, _, _ in moved]
    downs = [fac.cast(down, dtype).reshape((down.shape[0], *tail)) for _, down, _ in moved]
    options = {name: value for name, value in like.options.items() if name not in _OF_THE_SCALE}
    factors = {second: fac.cat(downs), first: fac.cat(ups, 1)}
    return Combined(Lora(factors, float(size * rank), "tensor", options), rounded)


def plain_lora(module: Module) -> Lora:
    """An additive low-rank module as LoRA without a core: new factors are float32, float64 where the module's are."""
    found = module.to_lora("F64" if any(tensor.dtype == "F64" for tensor in module.factors.values()) else "F32")
    if not isinstance(found, Lora):
        raise NotExact(f"a {module.kind} module is no LoRA")
    return found


def plain_dense(module: Dense) -> Dense:
    """A dense module with its sparse part written out, so that its rows can be cut."""
    kept = {role: tensor for role, tensor in module.factors.items() if role in ("diff_b", "b_norm")}
    return Dense({"diff": _delta_sum([Term(0, 1.0, module)]), **kept})


def unscaled(made: Combined) -> Combined:
    """The same ΔW at scale 1 (alpha = rank), for a place without alpha; float32 where a 16-bit dtype would round."""
    module = made.module
    if not isinstance(module, Scaled | Dora) or module.scale == 1.0:
        return made
    inner = module.inner if isinstance(module, Dora) else module
    rank = float(inner.divisor or inner.rank or 1)
    moved = module.with_alpha(rank)
    if moved.rounded and any(tensor.dtype in _HALF for tensor in module.factors.values()):
        moved = module.with_factors({role: tensor if role == "alpha" else _wide(tensor) for role, tensor in module.factors.items()})
        moved = moved.with_alpha(rank)
    options = {name: value for name, value in moved.options.items() if name not in ("rounded", "second_took")}
    return Combined(replace(moved, options=options), made.rounded or moved.rounded)


# -------------------------------------------------------------------------------------------------------------------- factors


def _wide(tensor: LazyTensor) -> LazyTensor:
    return fac.cast(tensor, "F32") if tensor.dtype in _HALF else tensor


def _times(tensor: LazyTensor, ratio: Fraction) -> tuple[LazyTensor, bool]:
    """(ratio · tensor, rounded?): in float32 where its own 16-bit dtype would round it."""
    found, lost = fac.multiplied(tensor, ratio)
    return fac.multiplied(_wide(tensor), ratio) if lost and tensor.dtype in _HALF else (found, lost)


def _moved(lora: Lora, ratio: Fraction) -> tuple[LazyTensor, LazyTensor, bool]:
    """(up, down, rounded?) with the ratio moved into them: a power of two exactly, the rest and the sign into up."""
    up, down = (lora.factors[role] for role in lora.spread_roles)
    if abs(ratio) == 1:
        return fac.times(up, float(ratio)), down, False
    try:
        spread = fac.spread(up, down, ratio)
    except NotExact:  # too large for a narrow dtype
        spread = fac.spread(_wide(up), _wide(down), ratio)
    if spread.rounded and {up.dtype, down.dtype} & set(_HALF):
        spread = fac.spread(_wide(up), _wide(down), ratio)
    return spread.first, spread.second, spread.rounded


def _as_embedding(lora: Lora) -> Lora:
    """up · down = (downᵀ upᵀ)ᵀ: a LoRA of an embedding table under PEFT's names for it."""
    if lora.embedding:
        return lora
    up, down = (fac.transposed(lora.factors[role].reshape(lora.factors[role].shape[:2])) for role in ("up", "down"))
    return lora.with_factors({"embedding_down": up, "embedding_up": down})


# ---------------------------------------------------------------------------------------------------------------------- dense


def _dense_alone(module: Module, weight: float) -> Combined:
    if weight == 1.0:
        return Combined(module, source=module)
    factors, rounded = dict(module.factors), False
    for role in factors.keys() & {*WEIGHTS, *BIASES}:
        factors[role], lost = _times(factors[role], Fraction(weight))
        rounded = rounded or lost
    return Combined(module.with_factors(factors), rounded)


def _dense_sum(terms: Sequence[Term]) -> Combined:
    """One dense change: norms keep the name norms have."""
    role = "w_norm" if any("w_norm" in term.module.factors for term in terms) else "diff"
    return Combined(Dense({role: _delta_sum(terms)}), True)


def _delta_sum(terms: Sequence[Term]) -> LazyTensor:
    """Σ weight · ΔW, summed in float64 and rounded once to float32 (float64 where an input is)."""
    shape = max((tuple(size for size in term.module.shape if size is not None) for term in terms), key=len)
    dtype = "F64" if any(tensor.dtype == "F64" for term in terms for tensor in term.module.factors.values()) else "F32"

    def compute() -> torch.Tensor:
        parts = [term.module.delta().reshape(shape) * term.weight for term in terms]
        return sum(parts[1:], start=parts[0]).to(torch_dtype(dtype))

    return ComputedTensor(dtype, shape, compute)


# --------------------------------------------------------------------------------------------------------------------- biases


def _without_bias(module: Module) -> Module:
    rest = {role: tensor for role, tensor in module.factors.items() if role not in BIASES}
    return module if len(rest) == len(module.factors) else replace(module, factors=rest)


def bias_of(terms: Sequence[Term]) -> tuple[LazyTensor | None, bool]:
    """(Σ weight · bias as (o), does every part of it stand under a scale?); None where no module changes a bias."""
    parts: list[tuple[Fraction, LazyTensor]] = []
    scaled = True
    for term in terms:
        for role in BIASES:
            if role in term.module.factors:
                inner = term.module.scale_of(term.module.alpha) if role == "bias" and isinstance(term.module, Lora) else Fraction(1)
                parts.append((Fraction(term.weight) * inner, term.module.factors[role]))
                scaled = scaled and role == "bias"
    if not parts:
        return None, scaled
    shape = (parts[0][1].numel,)
    if len(parts) == 1 and parts[0][0] == 1:
        return parts[0][1].reshape(shape), scaled
    dtype = "F64" if any(tensor.dtype == "F64" for _, tensor in parts) else "F32"

    def compute() -> torch.Tensor:
        return sum(fac.exact(tensor).flatten() * float(ratio) for ratio, tensor in parts).to(torch_dtype(dtype))  # type: ignore[union-attr]

    return ComputedTensor(dtype, shape, compute), scaled


def _with_bias(found: list[Combined], terms: Sequence[Term], holds: Collection[str]) -> list[Combined]:
    """The sum of all biases put where the target has a place for it: a LoRA's own (under its scale), or diff_b."""
    bias, scaled = bias_of(terms)
    if bias is None:
        return found
    if not found:
        return [Combined(Dense({"diff_b": bias}), True)]
    module = found[0].module
    return [Combined(with_bias(module, bias, scaled, holds), found[0].rounded), *found[1:]]


def with_bias(module: Module, bias: LazyTensor, scaled: bool, holds: Collection[str]) -> Module:
    """The module with a bias: under a LoRA's scale where all of it came from there or the target knows no other, else diff_b."""
    if isinstance(module, Lora) and (scaled or "dense" not in holds):
        scale: Any = module.scale_of(module.alpha)
        return module.with_factors({**module.factors, "bias": _times(bias, 1 / scale)[0]})
    role = "b_norm" if "w_norm" in module.factors else "diff_b"
    return replace(module, factors={**module.factors, role: bias})


def low_rank(module: Module) -> bool:
    """Is it one of the additive kinds that are products of factors?"""
    return isinstance(module, Lora | Loha | Lokr)
