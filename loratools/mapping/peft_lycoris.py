"""LoKr and LoHa as PEFT builds them: the fields of its config from which it derives every factor's shape.

PEFT factorises both widths of a layer by one `decompose_factor` for the whole adapter and decides by the rank what is left whole:

    w1 is (o1, i1), w2 is (o2, i2)          (o1, o2) = factorise(out), (i1, i2) = factorise(in), each m <= n
    w2 is whole where r >= max(o2, i2) / 2, w1 unless `decompose_both` and r < max(o1, i1) / 2
    `use_effective_conv2d`: decomposed factors of every convolution larger than 1x1 have a Tucker core

Source: PEFT 0.21 `tuners/lokr/layer.py`, `tuners/loha/layer.py`. An adapter of any other shapes cannot be loaded and is refused.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from loratools.adapters.adapter import Module
from loratools.errors import UnsupportedError

Pair = tuple[int, int]


@dataclass(frozen=True)
class _Shapes:
    """A LoKr's factors: (o1, i1), (o2, i2), which of them are whole, and whether w2 has a core or a kernel."""

    first: Pair
    second: Pair
    whole: tuple[bool, bool]
    core: bool
    kernel: int

    @classmethod
    def of(cls, module: Module) -> _Shapes:
        sizes = {role: tensor.shape for role, tensor in module.factors.items()}
        o1, i1 = sizes["lokr_w1"][:2] if "lokr_w1" in sizes else (sizes["lokr_w1_a"][0], sizes["lokr_w1_b"][1])
        out, in_, *kernel = (size or 0 for size in module.shape)
        return cls((o1, i1), (out // o1, in_ // i1), ("lokr_w1" in sizes, "lokr_w2" in sizes), "lokr_t2" in sizes, math.prod(kernel))

    def built_by(self, factor: int, rank: int, decompose_both: bool, effective_conv: bool) -> bool:
        """Does PEFT make factors of these shapes with these fields?"""
        halves = [factorise(one * two, factor) for one, two in zip(self.first, self.second, strict=True)]
        whole_first = not (decompose_both and rank < max(self.first) / 2)
        whole_second = rank >= max(self.second) / 2
        core = effective_conv and not whole_second and self.kernel > 1
        wanted = (self.whole, self.core) == ((whole_first, whole_second), core)
        return wanted and halves == list(zip(self.first, self.second, strict=True))


def factorise(dimension: int, factor: int) -> Pair:
    """dimension = m · n as PEFT and LyCORIS choose it: m = factor where that divides, else the largest m <= factor near the root."""
    if factor > 0 and dimension % factor == 0:
        return factor, dimension // factor
    limit = dimension if factor == -1 else factor
    divisors = [m for m in range(1, math.isqrt(dimension) + 1) if dimension % m == 0 and m <= max(limit, 1)]
    return divisors[-1], dimension // divisors[-1]


def whole_rank(module: Module) -> int:
    """The least rank with which PEFT leaves both factors of a LoKr whole."""
    shapes = _Shapes.of(module)
    return math.ceil(max(*shapes.first, *shapes.second) / 2)


def lokr_fields(modules: Mapping[str, Module], ranks: Mapping[str, int]) -> dict[str, Any]:
    """decompose_factor, decompose_both and use_effective_conv2d for these modules.

    Raises UnsupportedError naming the modules PEFT would build otherwise.
    """
    shapes = {name: _Shapes.of(module) for name, module in modules.items()}
    both = not all(found.whole[0] for found in shapes.values())
    effective = any(found.core for found in shapes.values())
    factors = [-1, *sorted({width for found in shapes.values() for width in found.first})]
    wrong = {
        factor: [name for name, found in shapes.items() if not found.built_by(factor, ranks[name], both, effective)] for factor in factors
    }
    best = min(factors, key=lambda factor: len(wrong[factor]))
    if wrong[best]:
        raise UnsupportedError(
            f"PEFT derives the factors of every LoKr module from one decompose_factor; {len(wrong[best])} have other shapes",
            details=[f"{name}: w1 {list(shapes[name].first)}, w2 {list(shapes[name].second)}, rank {ranks[name]}" for name in wrong[best]],
            fix="--kind lora turns them into plain LoRA",
        )
    return {"decompose_factor": best, "decompose_both": both, "use_effective_conv2d": effective}


def loha_fields(modules: Mapping[str, Module]) -> dict[str, Any]:
    """use_effective_conv2d for these modules. Raises UnsupportedError where convolutions with and without a core are mixed."""
    larger = {
        name: "hada_t1" in module.factors for name, module in modules.items() if math.prod(size or 0 for size in module.shape[2:]) > 1
    }
    if len(set(larger.values())) > 1:
        raise UnsupportedError(
            "PEFT gives a Tucker core to every convolution of a LoHa or to none",
            details=[f"{name}: {'a' if core else 'no'} Tucker core" for name, core in larger.items()],
            fix="--kind lora turns them into plain LoRA",
        )
    return {"use_effective_conv2d": any(larger.values())}
