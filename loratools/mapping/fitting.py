"""Making one module fit what a dialect can hold: its kind, its alpha rule, the shapes its readers expect.

Nothing here knows a name. Each step is exact, or says how far it is off, or refuses with the reason.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from loratools.adapters.adapter import Module, NotExact, quotient
from loratools.adapters.factors import added, cast, exact, holds, is_float, scaled
from loratools.adapters.kinds import Dense, Dora, Loha, Lokr, Lora
from loratools.adapters.kinds.common import Scaled
from loratools.mapping.dialects import Dialect
from loratools.mapping.peft_lycoris import whole_rank
from loratools.mapping.rules import Row
from loratools.tensors.lazy import LazyTensor, scalar_tensor

_DENSE_WORDS = {"w_norm": "norm", "b_norm": "norm", "set_weight": "set", "set_bias": "set", "reshape_weight": "set"}


def requirements(module: Module, row: Row) -> set[str]:
    """What a dialect must be able to hold for this module, in the words of `Dialect.holds`."""
    words: set[str] = set()
    if isinstance(module, Dora):
        words |= {"dora"} if module.axis == "out" else {"dora-in"}
        words |= requirements(module.inner, row)
    elif module.kind == "lora":
        words.add("embedding" if "embedding_up" in module.factors else "lora")
        words |= {"tucker"} if "mid" in module.factors else set()
        words |= {"lora-bias"} if "bias" in module.factors else set()
    elif isinstance(module, Dense):
        words |= {_DENSE_WORDS.get(role, "dense") for role in module.factors if role != "alpha"}
        if "set" in words and row.layer == "norm":
            words = (words - {"set"}) | {"qk-norm"}
    elif module.kind == "oft":
        words.add("oft" if "oft_blocks" in module.factors else "oft-list")
    elif module.kind == "ia3":
        words.add("peft-ia3" if "ia3_l" in module.factors else "ia3")
    else:
        words.add(module.kind)
    if "diff_b" in module.factors:
        words.add("dense")
    return words


def fit_kind(module: Module, dialect: Dialect, row: Row, *, plain: bool) -> Module:
    """The module as a kind the dialect holds, by exact algebra only. plain: turn LoHa, LoKr and tucker into LoRA.

    Raises NotExact with what the dialect cannot hold.
    """
    if plain and isinstance(module, Loha | Lokr):
        module = module.to_lora()
    if isinstance(module, Lora) and "mid" in module.factors and (plain or "tucker" not in dialect.holds):
        module = module.to_lora()
    if isinstance(module, Lora) and "bias" in module.factors and "lora-bias" not in dialect.holds and "dense" in dialect.holds:
        factors = {role: tensor for role, tensor in module.factors.items() if role != "bias"}
        parts = [scaled(module.factors["bias"], module.scale), *([factors["diff_b"]] if "diff_b" in factors else [])]
        module = module.with_factors({**factors, "diff_b": added(parts)})
    if isinstance(module, Dora):
        module = _magnitude(module, dialect)
    module = _norm_roles(module, dialect, row)
    missing = requirements(module, row) - dialect.holds - ({"qk-norm"} if "set" in dialect.holds else set())
    if missing:
        raise NotExact(f"{dialect.name} cannot hold {' or '.join(_WORDS.get(word, word) for word in sorted(missing))}")
    return module


_WORDS = {
    "dense": "dense deltas (diff, diff_b)",
    "norm": "norm deltas",
    "set": "replaced weights",
    "qk-norm": "replaced norms",
    "dora": "DoRA magnitudes",
    "dora-in": "DoRA on the input axis",
    "tucker": "a tucker core",
    "lora-bias": "LoRA biases",
    "embedding": "embedding LoRA",
    "oft-list": "sd-scripts' own OFT",
}


def _magnitude(module: Dora, dialect: Dialect) -> Module:
    """The magnitude under the name (and shape) the dialect's readers look for."""
    role = "magnitude" if dialect.name in ("diffusers", "peft") else "dora_scale"
    if role == "magnitude" and not isinstance(module.inner, Lora):
        raise NotExact(f"{dialect.name} has DoRA of plain LoRA only, not of {module.inner.kind}")
    return module if role in module.factors else module.magnitude_as(role)


def _norm_roles(module: Module, dialect: Dialect, row: Row) -> Module:
    """Norm deltas are `w_norm`/`b_norm` to LyCORIS and `diff`/`diff_b` to ComfyUI: the same numbers."""
    if not isinstance(module, Dense) or row.layer != "norm":
        return module
    to_comfy = dialect.name == "comfy"
    renames = {"w_norm": "diff", "b_norm": "diff_b"} if to_comfy else {"diff": "w_norm", "diff_b": "b_norm"}
    return module.with_factors({renames.get(role, role): tensor for role, tensor in module.factors.items()})


def fit_shape_of(module: Module, row: Row) -> Module:
    """1x1 convolutions as the layer has them: four dimensions on a conv, two on a linear layer. The same bytes."""
    inner = module.inner if isinstance(module, Dora) else module
    if inner.kind != "lora" or "down" not in inner.factors or "mid" in inner.factors:
        return module
    factors = dict(module.factors)
    up, down = factors.get("up"), factors.get("down")
    if up is None or down is None:
        return module
    if row.layer == "conv":
        tail = (1,) * len(row.kernel or down.shape[2:] or (1, 1))
        if len(down.shape) == 2 and set(row.kernel or (1,)) == {1}:
            factors["down"] = down.reshape((*down.shape, *tail))
        if len(up.shape) == 2:
            factors["up"] = up.reshape((*up.shape, *tail))
    elif row.layer == "linear":
        for role, tensor in (("down", down), ("up", up)):
            if len(tensor.shape) > 2 and set(tensor.shape[2:]) == {1}:
                factors[role] = tensor.reshape(tensor.shape[:2])
    return module.with_factors(factors)


def flattened(module: Module, roles: Sequence[str]) -> Module:
    """Factors of 1x1 kernels in two dimensions again, for a file that had them so (LyCORIS' DyLoRA). The same bytes."""
    shapes = {role: module.factors[role].shape for role in roles if role in module.factors}
    flat = {role: module.factors[role].reshape(shape[:2]) for role, shape in shapes.items() if set(shape[2:]) <= {1}}
    return module.with_factors({**module.factors, **flat}) if flat else module


def fit_alpha(module: Module, dialect: Dialect, *, keep_alpha: bool) -> Module:
    """The module under the dialect's alpha rule.

    "tensor": an `alpha` tensor where anything records one; "config": the value goes to adapter_config.json;
    "header" and "none": folded into the factors, so that readers without alpha give the same strength.
    """
    if not isinstance(module, Scaled | Dora):
        return module  # GLoRA's alpha is a tensor wherever it is held; the other kinds have none that scales
    bare: Mapping[str, LazyTensor] = {role: tensor for role, tensor in module.factors.items() if role != "alpha"}
    if dialect.alpha == "tensor":
        return _with_alpha_tensor(module, bare)
    if dialect.alpha == "config" or (dialect.alpha == "header" and keep_alpha):
        return _with_config_alpha(module, bare)
    folded = module.folded()
    return folded.with_factors({role: tensor for role, tensor in folded.factors.items() if role != "alpha"})


def _with_alpha_tensor(module: Scaled | Dora, bare: Mapping[str, LazyTensor]) -> Module:
    if module.options.get("always_scale") and module.rank is None:
        # PEFT scales a LoKr of two full factors by alpha / r, every other reader takes it as it is: the scale goes into a factor
        options = {name: value for name, value in module.options.items() if name not in ("always_scale", "rank")}
        return replace(module.folded(), options=options)
    stored, alpha = module.factors.get("alpha"), module.alpha
    if alpha is None:
        return replace(module, factors=bare)
    if stored is not None and stored.scalar() == alpha:
        return module
    return replace(module, factors={**bare, "alpha": scalar_tensor(alpha)})


def _with_config_alpha(module: Module, bare: Mapping[str, LazyTensor]) -> Module:
    """The alpha PEFT must be told for the module's scale: alpha / r is always applied there."""
    alpha = module.scale * module.rank if module.rank else module.alpha
    options: dict[str, Any] = dict(module.options)
    if module.kind == "lokr":
        rank = module.rank or module.options.get("rank") or whole_rank(module)
        options.update(always_scale=True, rank=rank)
        alpha = module.scale * rank
    return replace(module, factors=bare, alpha=alpha, options=options)


def narrows(module: Module, dtype: str) -> bool:
    """Would some factor lose bits in this dtype?"""
    return any(is_float(tensor) and not holds(dtype, tensor.dtype) for role, tensor in module.factors.items() if role != "alpha")


def fit_dtype(module: Module, dtype: str, *, narrow: bool = False) -> Module:
    """The factors in a dtype, rounded once where it is narrower (only with `narrow`); alpha and flags stay as they are."""
    factors = {
        role: cast(tensor, dtype) if role != "alpha" and is_float(tensor) and (narrow or holds(dtype, tensor.dtype)) else tensor
        for role, tensor in module.factors.items()
    }
    return module.with_factors(factors)


def relative_change(before: Module, after: Module) -> float:
    """The relative error of ΔW, or the largest of the factors where ΔW depends on a base weight."""
    if isinstance(before, Lora | Loha | Lokr) and isinstance(after, Scaled):
        return before.relative_error(after)
    if isinstance(before, Dora) and isinstance(after, Dora):
        return max(relative_change(before.inner, after.inner), _distance(before.magnitude, after.magnitude))
    shared = [role for role in before.factors if role in after.factors and is_float(before.factors[role])]
    return max((_distance(before.factors[role], after.factors[role]) for role in shared), default=0.0)


def _distance(before: LazyTensor, after: LazyTensor) -> float:
    """Relative Frobenius distance of two tensors of one size."""
    mine = exact(before).flatten()
    return quotient(float((exact(after).flatten() - mine).norm()), float(mine.norm()))
