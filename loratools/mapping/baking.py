"""Adapters that multiply the base weight, turned into additive ones for one base.

A DoRA, OFT, BOFT, IA3, GLoRA or replacement has a dense ΔW that depends on W: with W at hand it becomes a full delta (exact up to
float32), and where a dialect holds only low-rank factors, the best approximation of the module's own rank (Eckart and Young, 1936),
with its error. Both are losses of generality, so they happen only when they are asked for.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from loratools.adapters.adapter import Module, NotExact
from loratools.adapters.kinds import Dense, Lora
from loratools.tensors.lazy import ComputedTensor, LazyTensor

if TYPE_CHECKING:
    import torch

RANK = 64  # of a low-rank approximation of a kind that has no rank of its own


def baked(module: Module, weight: LazyTensor) -> Dense:
    """The module as a full delta on this weight, in float32.

    Raises NotExact where the module also changes the bias: a base's bias is not read, and nothing is dropped in silence.
    """
    if set(module.factors) & {"bias", "set_bias"} or (
        module.kind == "ia3" and "ia3_l" in module.factors and not module.options.get("feedforward")
    ):
        raise NotExact("it changes the bias too, which is not turned into a delta")

    def change() -> torch.Tensor:
        import torch

        loaded = weight.load().to(torch.float64)
        return module.delta(loaded).reshape(weight.shape).to(torch.float32)

    factors: dict[str, LazyTensor] = {"diff": ComputedTensor("F32", weight.shape, change)}
    if "diff_b" in module.factors:
        factors["diff_b"] = module.factors["diff_b"]
    return Dense(factors, options={"rank": module.rank or RANK})


def approximated(module: Dense) -> tuple[Lora, float]:
    """The LoRA nearest to a full delta, of rank options["rank"] at most, and its relative error (from the dropped singular values).

    Factors are balanced, sqrt(S) on both sides. up (o, r[, 1, 1]), down (r, i, *kernel), float32.
    """
    import torch

    from loratools.tensors.lazy import from_torch

    delta = module.delta()
    left, values, right = torch.linalg.svd(delta.reshape(delta.shape[0], -1), full_matrices=False)
    rank = min(int(module.options.get("rank", RANK)), values.numel())
    root = values[:rank].sqrt()
    up = (left[:, :rank] * root).to(torch.float32).reshape(delta.shape[0], rank, *(1 for _ in delta.shape[2:]))
    down = (root[:, None] * right[:rank]).to(torch.float32).reshape(rank, *delta.shape[1:])
    total = float(values.square().sum())
    error = (float(values[rank:].square().sum()) / total) ** 0.5 if total else 0.0
    extra = {role: tensor for role, tensor in module.factors.items() if role == "diff_b"}
    return Lora({"down": from_torch(down), "up": from_torch(up), **extra}), error
