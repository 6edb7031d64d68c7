"""What the adapters say a merge adds to a site: Σ weight · Δ, computed a second time.

    Δ = Σ weight · ΔW

in float64, from the modules as the files have them (a fused one whole, or its own rows through its factors), and not by the code that
merges: only reading (`Storage.read`, `Base.place`) is shared. Invariant: `Expected.rows` gives rows in the order the file stores them.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from loratools.adapters.adapter import Entry, Module, NotExact, Site
from loratools.adapters.factors import exact
from loratools.adapters.kinds.common import Scaled
from loratools.errors import UnknownError
from loratools.mapping.bases import Base, Place
from loratools.operations.merging.arithmetic import MergedTensor, halves_swapped
from loratools.operations.merging.plan import MergePlan

if TYPE_CHECKING:
    import torch

Part = tuple[Entry, float]  # a module of an adapter, and the weight it is merged with at a site


def contributions(plan: MergePlan, architecture: str) -> dict[Site, list[Part]]:
    """Site → what is to be added to it, from the adapters and the selection alone."""
    found: dict[Site, list[Part]] = {}
    for given in plan.given:
        if given.architecture.name != architecture:
            continue
        for entry in given.adapter.entries:
            for site in entry.sites:
                weight = given.weight * (plan.selection.factor(site, given.architecture, given.name) or 0.0)
                if weight:
                    found.setdefault(site, []).append((entry, weight))
    return found


class Before:
    """The base by site and by module: where a weight lies, and its values as a module needs them."""

    def __init__(self, plan: MergePlan, base: Base, tensors: Mapping[str, MergedTensor]) -> None:
        self.base, self.tensors = base, tensors
        self.places = {(region.site, region.role): region.place for regions in plan.placement.regions.values() for region in regions}

    def weight(self, entry: Entry) -> torch.Tensor:
        """The weight a module serves in the module's own order, float64."""
        import torch

        parts = [self._padded(self._place(site, "weight")) for site in entry.sites]
        joined = torch.cat(parts) if len(parts) > 1 else parts[0]
        return halves_swapped(joined) if entry.swapped else joined

    def bias(self, entry: Entry) -> torch.Tensor:
        """The bias a module serves in the module's own order, float64."""
        import torch

        joined = torch.cat([exact(self.base.oriented(self._place(site, "bias"))) for site in entry.sites])
        return halves_swapped(joined) if entry.swapped else joined

    def _place(self, site: Site, role: str) -> Place:
        """Where a site is; of one that the selection leaves out, too. Raises UnknownError."""
        place = self.places.get((site, role)) or self.base.place(site, role)
        if place is None:
            raise UnknownError(f"no {role} for {site}")
        return place

    def _padded(self, place: Place) -> torch.Tensor:
        """A site's weight in its own order, in float64, zero-padded where the output is larger."""
        import torch

        if place.target not in self.tensors:  # a part that the selection leaves out
            return exact(self.base.oriented(place))
        tensor = self.tensors[place.target]
        values = tensor.storage.read(place.start, tensor.end_of(place)).to(torch.float64)
        values = values.reshape(values.shape[0], *tensor.shape[1:])
        values = halves_swapped(values) if place.swapped else values
        return values.t().contiguous() if place.transposed else values


class Expected:
    """Σ weight · Δ of one site's weight or bias (`role`), which the file keeps at `place`."""

    def __init__(self, before: Before, site: Site, role: str, place: Place, parts: Sequence[Part]) -> None:
        self.before, self.site, self.role, self.place, self.parts = before, site, role, place, parts
        self.columns = math.prod(before.tensors[place.target].shape[1:])
        self._wholes: dict[int, torch.Tensor] = {}  # position of a part that gives no rows by itself → its Δ, made once

    def rows(self, first: int, last: int) -> torch.Tensor:
        """Of the rows first..last of the site as the file stores it: (last - first, columns), float64."""
        import torch

        total = torch.zeros(last - first, self.columns, dtype=torch.float64)
        for number, (entry, weight) in enumerate(self.parts):
            cut = self._cut(entry, first, last)
            part = self._whole(number)[first:last] if cut is None else cut.delta() * weight
            total += part.reshape(total.shape)
        return total

    def _cut(self, entry: Entry, first: int, last: int) -> Module | None:
        """The module of these rows alone; None where the file's rows are no rows of the module, or its kind cannot be cut there."""
        module, turned = entry.module, self.place.swapped or self.place.transposed or entry.swapped
        if turned or self.role == "bias" or not isinstance(module, Scaled) or type(module).delta_at is not Module.delta_at:
            return None
        start = self._own(entry).start
        try:
            cut = module.rows_between(start + first, start + last)
        except NotExact:
            return None
        return cut if cut.shape[0] == last - first else None  # the LoRA of an embedding comes back whole

    def _whole(self, number: int) -> torch.Tensor:
        """weight · Δ of a part at all rows of the site, in the file's order."""
        if number not in self._wholes:
            entry, weight = self.parts[number]
            whole = self._bias(entry, weight) if self.role == "bias" else entry.module.delta_at(weight, self.before.weight(entry))
            whole = (halves_swapped(whole) if entry.swapped else whole)[self._own(entry)]
            whole = halves_swapped(whole) if self.place.swapped else whole
            self._wholes[number] = whole.t() if self.place.transposed else whole
        return self._wholes[number]

    def _bias(self, entry: Entry, weight: float) -> torch.Tensor:
        import torch

        base = self.before.bias(entry)
        change = entry.module.bias_delta(base)
        return torch.zeros_like(base) if change is None else change * weight

    def _own(self, entry: Entry) -> slice:
        """The site's rows in those of the entry's module."""
        if len(entry.sites) == 1:
            return slice(0, None)
        index = entry.sites.index(self.site)
        start = sum(entry.rows[:index])
        return slice(start, start + entry.rows[index])
