"""GLoRA: ΔW = alpha / rank · (W a1 a2 + b1 b2); on a convolution a1 a2 acts on the input channels.

Shapes now: a1 (i, r), a2 (r, i), b1 (o, r), b2 (r, i[, *k]), optional core bm (r, r, *k) between b1 and b2 (r, i).
Older files name them the other way round: a1 (r, i), a2 (i, r), b1 (r, i[, *k]), b2 (o, r), ΔW = s (W a2 a1 + b2 b1).
The shapes tell which. On a square layer both fit, and the one of the smaller rank is meant, since the other's rank would exceed
its width; where o = i = r they cannot tell, and options["layout"] ("new" or "old") settles it.
LyCORIS `glora`; Chavan et al., 2023 (arXiv:2306.07967).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, ClassVar

from loratools.adapters import factors as fac
from loratools.adapters.adapter import Module, NotExact
from loratools.adapters.kinds import common
from loratools.adapters.kinds.common import Kind, Problem, register

if TYPE_CHECKING:
    from typing import Self

    import torch

ORDER = {"new": ("a1.weight", "a2.weight", "b1.weight", "b2.weight"), "old": ("a2.weight", "a1.weight", "b2.weight", "b1.weight")}


def settle_layouts(modules: Iterable[list[Module]]) -> None:
    """Give the GLoRA modules whose own shapes fit both layouts the one that all decided modules of the file have (in place)."""
    places = [(group, index, module) for group in modules for index, module in enumerate(group) if isinstance(module, Glora)]
    decided = {name for _, _, module in places if len(module.fitting()) == 1 for name in module.fitting()}
    if len(decided) == 1:
        for group, index, module in places:
            group[index] = replace(module, options={**module.options, "layout": next(iter(decided))})


@register
class Glora(Kind):
    """Generalised LoRA. Roles: a1.weight, a2.weight, b1.weight, b2.weight, optional bm.weight, alpha."""

    kind: ClassVar[str] = "glora"
    linear: ClassVar[bool] = False
    scaled: ClassVar[bool] = True
    roles: ClassVar[tuple[str, ...]] = ("alpha", "a1.weight", "a2.weight", "b1.weight", "b2.weight", "bm.weight")
    needs: ClassVar[tuple[frozenset[str], ...]] = (frozenset({"a1.weight", "a2.weight", "b1.weight", "b2.weight"}),)

    def fitting(self) -> dict[str, int]:
        """layout → rank, for each layout the shapes allow."""
        allowed = {name: order for name, order in ORDER.items() if self._fits(*(self.factors[role].shape for role in order))}
        return {name: self.factors[order[1]].shape[0] for name, order in allowed.items()}

    def layouts(self) -> list[str]:
        """The layouts the shapes allow, of the smallest rank: ["new"], ["old"], both, or none."""
        ranks = self.fitting()
        return [name for name, rank in ranks.items() if rank == min(ranks.values())]

    @staticmethod
    def _fits(a_in: tuple[int, ...], a_out: tuple[int, ...], up: tuple[int, ...], down: tuple[int, ...]) -> bool:
        """a_in (i, r), a_out (r, i), up (o, r), down (r, i, *k): do they agree, kernels on `down` only?"""
        if any(len(shape) < 2 for shape in (a_in, a_out, up, down)):
            return False
        flat = all(size == 1 for shape in (a_in, a_out, up) for size in shape[2:])
        return flat and a_in[1] == a_out[0] == up[1] == down[0] and a_in[0] == a_out[1] == down[1]

    @property
    def layout(self) -> str | None:
        """ "new", "old", or None: what options["layout"] says if it fits, else what the shapes decide."""
        asked = self.options.get("layout")
        if asked in self.fitting():
            return str(asked)
        found = self.layouts()
        return found[0] if len(found) == 1 else None

    def _order(self) -> tuple[str, str, str, str]:
        """Roles (a first applied to W, a second, up, down). Raises NotExact where the layout is undecided."""
        if self.layout is None:
            raise NotExact("the shapes of this GLoRA do not tell the older layout from the newer one")
        return ORDER[self.layout]

    @property
    def rank(self) -> int | None:
        layout = self.layout or next(iter(self.layouts()), None)
        return self.factors[ORDER[layout][1]].shape[0] if layout else None

    @property
    def shape(self) -> tuple[int | None, ...]:
        layout = self.layout or next(iter(self.layouts()), None)
        if layout is None:
            return (None, None)
        up, down = (self.factors[role].shape for role in ORDER[layout][2:])
        kernel = self.factors["bm.weight"].shape[2:] if "bm.weight" in self.factors else down[2:]
        return (up[0], down[1], *kernel)

    def shape_problems(self) -> list[Problem]:
        if not self.layouts():
            shapes = ", ".join(f"{role} {list(self.factors[role].shape)}" for role in ORDER["new"])
            return [("error", "bad-shape", f"the factors do not fit together in either layout: {shapes}")]
        if self.layout is None:
            return [("error", "ambiguous-layout", "out = in = rank: the older and the newer GLoRA layout both fit")]
        return common.expect(self.factors, {"bm.weight": (self.rank, self.rank)})

    def delta(self, weight: torch.Tensor | None = None) -> torch.Tensor:
        import torch

        first, second, up, down = (fac.exact(self.factors[role]) for role in self._order())
        if weight is None:
            raise NotExact("a GLoRA module multiplies the base weight: its delta needs it")
        base = weight.to(torch.float64)
        if "bm.weight" in self.factors:
            added = torch.einsum("mn...,om,ni->oi...", fac.exact(self.factors["bm.weight"]), up.flatten(1), down.flatten(1))
        else:
            added = up.flatten(1) @ down.flatten(1)
        inner = torch.einsum("oi...,ij->oj...", base, first.flatten(1) @ second.flatten(1))
        added = common.fitted(added.reshape([size for size in self.shape if size is not None]), base)
        return (inner + common.on_base(added, base)) * self.scale

    def split(self, rows: Sequence[int]) -> list[Self | None]:
        """Rows of the up factor (b1), everything else in every part; no part is absent."""
        up = self._order()[2]
        self.check_rows(rows)
        return [self.with_factors({**self.factors, up: piece}) for piece in fac.pieces(self.factors[up], rows)]

    @classmethod
    def fuse(cls, parts: Sequence[Self | None], rows: Sequence[int]) -> Self:
        """Up factors stacked, where every part is there and all else is equal. Raises NotExact otherwise."""
        present = common.parts_present(parts, rows)
        first, orders = present[0], {part._order() for part in present}
        if len(present) < len(parts) or len(orders) > 1 or len({(part.scale, frozenset(part.factors)) for part in present}) > 1:
            raise NotExact("GLoRA parts can be fused only if all are there, in one layout and of one scale")
        up = first._order()[2]
        if not all(fac.all_same([part.factors[role] for part in present]) for role in first.factors if role not in (up, "alpha")):
            raise NotExact("GLoRA parts can be fused only if all factors but the rows of b1 are equal")
        return first.with_factors({**first.factors, up: fac.cat([part.factors[up] for part in present])})

    def swap_halves(self) -> Self:
        up = self._order()[2]
        self.half()
        return self.with_factors({**self.factors, up: fac.swap_halves(self.factors[up])})
