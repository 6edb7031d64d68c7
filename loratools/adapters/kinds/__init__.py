"""Adapter kinds: one class with one formula each, a registry of them, and `build` from a module name's tensors.

Which kind a set of roles forms is decided by the roles alone (and, for OFT, by the number of dimensions); nothing is guessed
from values. Tensors that form no complete module end in an `Orphan`, whose `problems` say what is missing.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, ClassVar

from loratools.adapters.adapter import Module, NotExact
from loratools.adapters.kinds.common import KINDS, Kind, Problem, register
from loratools.adapters.kinds.dense import Dense, Replacement
from loratools.adapters.kinds.dora import Dora
from loratools.adapters.kinds.glora import Glora
from loratools.adapters.kinds.ia3 import Ia3
from loratools.adapters.kinds.loha import Loha
from loratools.adapters.kinds.lokr import Lokr
from loratools.adapters.kinds.lora import Lora
from loratools.adapters.kinds.oft import Boft, InputOft, Oft
from loratools.errors import MalformedError
from loratools.tensors.lazy import LazyTensor

if TYPE_CHECKING:
    import torch

__all__ = [
    "KINDS",
    "ROLES",
    "Boft",
    "Dense",
    "Dora",
    "Glora",
    "Ia3",
    "InputOft",
    "Loha",
    "Lokr",
    "Lora",
    "Oft",
    "Orphan",
    "Replacement",
    "build",
]


@register
class Orphan(Kind):
    """Tensors that form no complete module: up without down, alpha or a magnitude alone."""

    kind: ClassVar[str] = "orphan"
    roles: ClassVar[tuple[str, ...]] = ()
    needs: ClassVar[tuple[frozenset[str], ...]] = ()

    @property
    def shape(self) -> tuple[int | None, ...]:
        return (None, None)

    def missing(self) -> frozenset[str]:
        """The fewest roles that would complete a module of what is there; empty where nothing is known to."""
        here = frozenset(self.factors)
        wanted = [need - here for kind in KINDS.values() for need in kind.needs if need & here]
        return min(wanted, key=lambda need: (len(need), sorted(need)), default=frozenset())

    def shape_problems(self) -> list[Problem]:
        here, missing = ", ".join(self.factors), ", ".join(sorted(self.missing()))
        return [("error", "orphan", f"{here} without {missing or 'the factors it belongs to'}")]

    def delta(self, weight: torch.Tensor | None = None) -> torch.Tensor:
        raise NotExact(f"{', '.join(self.factors)} alone is no adapter module")


# in the order in which they take tensors: what two kinds could take (alpha, diff_b) goes to the first
_ORDER: tuple[type[Kind], ...] = (Dora, Lora, Loha, Lokr, Glora, Ia3, Boft, Oft, InputOft, Replacement, Dense)

ROLES: tuple[str, ...] = tuple(dict.fromkeys(role for kind in _ORDER for role in kind.roles))

_NO_OPTIONS: Mapping[str, Any] = MappingProxyType({})


def build(
    factors: Mapping[str, LazyTensor],
    *,
    alpha: float | None = None,
    alpha_source: str = "assumed",
    options: Mapping[str, Any] = _NO_OPTIONS,
) -> list[Module]:
    """The modules that the tensors of one module name form: one as a rule, two for a LoRA beside a dense change.

    factors: role → tensor; every one ends in exactly one of the modules. alpha: as a configuration says it; None takes the
    stored alpha tensor. Incomplete sets form an `Orphan`; nothing is raised, `problems` of the modules tell what is wrong.
    """
    if alpha is None and "alpha" in factors:
        alpha, alpha_source = _stored_alpha(factors["alpha"]), "tensor"
    remaining, modules = dict(factors), list[Module]()
    for kind in _ORDER:
        used = kind.claim(remaining.keys())
        if used is None or kind is _other_oft(remaining):
            continue
        taken = {role: remaining.pop(role) for role in list(remaining) if role in used}
        known = "alpha" in taken or (kind.scaled and "alpha" not in factors)
        modules.append(kind(taken, alpha if known else None, alpha_source if known else "assumed", options))
    if remaining:
        stored = "alpha" in remaining
        modules.append(Orphan(remaining, alpha if stored else None, alpha_source if stored else "assumed", options))
    return modules


def _stored_alpha(tensor: LazyTensor) -> float | None:
    """The value of an alpha tensor, None where it holds no single number (`problems` says so)."""
    try:
        return tensor.scalar()
    except MalformedError:
        return None


def _other_oft(factors: Mapping[str, LazyTensor]) -> type[Kind] | None:
    """Of the two kinds that spell their blocks alike, the one these are not: BOFT has four dimensions."""
    blocks = factors.get("oft_blocks")
    return None if blocks is None else Oft if len(blocks.shape) == 4 else Boft
