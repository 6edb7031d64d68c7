"""The arithmetic of a merge: W' = round(W + Σ weight · ΔW), one tensor at a time and a block of rows at a time.

Values are summed in float32 (float64 where a file holds float64) in the order of the terms, and rounded once. Each block says what
rounding did to it: ⟨W' - W, Δ⟩, ⟨Δ, Δ⟩ and |W' - W - Δ|², from which `delta_retained` and the relative error are made. A block is
computed by one thread with fixed bounds, so the bytes do not depend on how many threads there are.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING

from loratools.adapters import factors
from loratools.adapters.adapter import Module, NotExact, RowDelta
from loratools.errors import LoraToolsError, NotFiniteError
from loratools.mapping.bases import Base, Place
from loratools.operations.merging.placing import Region, Term
from loratools.operations.merging.storage import Once, ScaledStorage, Storage
from loratools.tensors.finite import first_not_finite
from loratools.tensors.lazy import LazyTensor
from loratools.tensors.rounding import float_format

if TYPE_CHECKING:
    import torch

BLOCK = 1 << 19  # elements computed at a time: small enough for a processor's cache, and for a dozen float64 copies
UNSURE = 2.0**-21  # error of a sum in float32 that is four times what is usual, relative to Σ |products| + |W|


@dataclass(frozen=True)
class Sums:
    """What rounding did: ⟨W' - W, Δ⟩, ⟨Δ, Δ⟩, |W' - W - Δ|²."""

    kept: float = 0.0
    delta: float = 0.0
    lost: float = 0.0

    def __add__(self, other: Sums) -> Sums:
        return Sums(self.kept + other.kept, self.delta + other.delta, self.lost + other.lost)

    @property
    def delta_retained(self) -> float:
        """The share of Δ that is in the file: 1 when rounding took nothing (and where there was nothing)."""
        return self.kept / self.delta if self.delta else 1.0

    @property
    def relative_error(self) -> float:
        return math.sqrt(self.lost / self.delta) if self.delta else 0.0


@dataclass
class Tally:
    """The sums of one tensor, by block."""

    blocks: dict[int, Sums] = field(default_factory=dict)

    @property
    def total(self) -> Sums:
        return sum((self.blocks[start] for start in sorted(self.blocks)), start=Sums())


def row_delta(term: Term, region: Region, base: Base, dtype: torch.dtype) -> RowDelta:
    """A term's ΔW at its region in the order the file stores it: (start, stop, those rows of W) → (stop - start, columns)."""
    streamed = _streamed(term, region, dtype)
    if streamed is not None:
        return streamed
    whole = Once(lambda: _matrix(whole_delta(term, region, base)))
    return RowDelta(
        lambda start, stop, _: whole()[start:stop].to(dtype, copy=True),
        lambda rows, columns: whole()[rows, columns],
    )


def _streamed(term: Term, region: Region, dtype: torch.dtype) -> RowDelta | None:
    """From the factors, block by block; None where the kind, its strength or the orientation needs the whole weight."""
    if term.module is None or type(term.module).delta_at is not Module.delta_at:
        return None
    try:
        module = term.module.swap_halves() if region.place.swapped else term.module
        module = module.transpose() if region.place.transposed else module
    except NotExact:
        return None
    delta = module.by_rows(dtype)
    return delta if delta is None or term.weight == 1.0 else delta.times(term.weight)


def _matrix(delta: torch.Tensor) -> torch.Tensor:
    return delta.reshape(delta.shape[0], -1)


def whole_delta(term: Term, region: Region, base: Base) -> torch.Tensor:
    """A term's ΔW at its region in float64, rows as the file stores them, computed on the weight its module serves."""
    import torch

    if term.module is not None:
        weight = base.oriented(region.place)
        shape = torch.empty(weight.shape, dtype=torch.float64, device="meta")  # all that a formula without W needs of it
        delta = term.module.delta_at(term.weight, shape if term.module.linear else factors.exact(weight))
    else:
        delta = _own_rows(term, term.entry.module.delta_at(term.weight, factors.exact(base.of(term.entry))))
    delta = halves_swapped(delta) if region.place.swapped else delta
    return delta.t().contiguous() if region.place.transposed else delta


def bias_delta(region: Region, base: Base) -> torch.Tensor:
    """Σ weight · Δb of a bias in float64, as the file stores it."""
    import torch

    total = torch.zeros(region.place.stop - region.place.start, dtype=torch.float64)
    for term in region.terms:
        if term.module is not None:
            change = term.module.bias_delta(factors.exact(base.oriented(region.place)))
        else:
            change = term.entry.module.bias_delta(factors.exact(base.of(term.entry, "bias")))
            change = None if change is None else _own_rows(term, change)
        if change is not None:
            total += change * term.weight
    return halves_swapped(total) if region.place.swapped else total


def _own_rows(term: Term, whole: torch.Tensor) -> torch.Tensor:
    """The site's rows of what was computed for its entry, in the site's order."""
    whole = halves_swapped(whole) if term.entry.swapped else whole
    return whole[term.start : term.stop] if len(term.entry.sites) > 1 else whole


def halves_swapped(tensor: torch.Tensor) -> torch.Tensor:
    """The two halves of the rows exchanged."""
    return tensor.roll(tensor.shape[0] // 2, 0)


class MergedTensor(LazyTensor):
    """A base tensor with the changes of its regions, computed when its blocks are asked for.

    storage: how its values are read and written (plain, or quantised with a scale); regions: may be empty (a cast to another dtype).
    """

    def __init__(self, name: str, storage: Storage, regions: Sequence[Region], base: Base, tally: Tally | None = None) -> None:
        self.name, self.storage, self.regions, self.base = name, storage, regions, base
        self.dtype, self.shape, self.tally = storage.dtype, storage.shape, tally or Tally()
        if isinstance(storage, ScaledStorage):
            storage.summing = self._summing

    def load(self) -> torch.Tensor:
        import torch

        parts = [self._block(start, stop, delta) for start, stop, delta in self._bounds()]
        return torch.cat(parts) if self.shape else parts[0].reshape(())

    def chunks(self) -> Iterator[bytes]:
        for block in self.blocks():
            yield bytes(block())

    def blocks(self) -> Iterator[Callable[[], bytes | memoryview]]:
        for start, stop, delta in self._bounds():
            yield partial(self._bytes, start, stop, delta)

    def _bytes(self, start: int, stop: int, delta: Once[RowDelta]) -> memoryview:
        import torch

        view: memoryview = self._block(start, stop, delta).contiguous().reshape(-1).view(torch.uint8).numpy().data
        return view

    def _bounds(self, step: int = 1) -> Iterator[tuple[int, int, Once[RowDelta]]]:
        """Blocks of a multiple of `step` rows; all share the factors, which the first of them reads and the last forgets."""
        delta = Once(self._delta)
        for start, stop in self.between(0, self.shape[0] if self.shape else 1, step):
            yield start, stop, delta

    def between(self, start: int, stop: int, step: int = 1) -> Iterator[tuple[int, int]]:
        """Rows start..stop in blocks of about BLOCK elements, of a multiple of `step` rows."""
        rows = max(BLOCK // max(math.prod(self.shape[1:]), 1) // step, 1) * step
        for first in range(start, stop, rows):
            yield first, min(first + rows, stop)

    def _delta(self) -> RowDelta:
        """Σ of all terms over the tensor's rows; rows no region covers stay."""
        import torch

        dtype = self.storage.working
        ready: list[tuple[Region, list[RowDelta]]] = []
        for region in self.regions:
            if region.role == "bias":
                ready.append((region, [_of_bias(bias_delta(region, self.base), dtype)]))
            else:
                ready.append((region, [row_delta(term, region, self.base, dtype) for term in region.terms]))

        def block(start: int, stop: int, rows: torch.Tensor) -> torch.Tensor:
            """ΔW of rows start..stop; `rows` are those of W, (stop - start, columns)."""
            total: torch.Tensor | None = None
            for region, deltas in ready:
                first, last = max(start, region.place.start), min(stop, self.end_of(region.place))
                if first >= last:
                    continue
                mine = rows[first - start : last - start]
                found = [delta.rows(first - region.place.start, last - region.place.start, mine) for delta in deltas]
                for other in found[1:]:
                    found[0].add_(_same(self.name, other, found[0]))
                if (first, last) == (start, stop) and total is None:
                    total = _same(self.name, found[0].reshape(stop - start, -1), rows)
                    continue
                total = torch.zeros_like(rows) if total is None else total
                total[first - start : last - start] += _same(self.name, found[0].reshape(last - first, -1), mine)
            return torch.zeros_like(rows) if total is None else total

        if any(delta.entries is None for _, deltas in ready for delta in deltas):
            return RowDelta(block)
        return RowDelta(block, lambda rows, columns: self._entries(ready, rows, columns), self._reach(ready))

    def _entries(self, ready: Sequence[tuple[Region, list[RowDelta]]], rows: torch.Tensor, columns: torch.Tensor) -> torch.Tensor:
        """Σ of all terms at these places, in float64."""
        import torch

        total = torch.zeros(rows.numel(), dtype=torch.float64)
        for region, deltas in ready:
            mine = ((rows >= region.place.start) & (rows < self.end_of(region.place))).nonzero().flatten()
            for delta in deltas if mine.numel() else ():
                if delta.entries is not None:
                    total[mine] += delta.entries(rows[mine] - region.place.start, columns[mine])
        return total

    def _reach(self, ready: Sequence[tuple[Region, list[RowDelta]]]) -> torch.Tensor:
        """A bound of Σ |products| of all terms, by row."""
        import torch

        reach = torch.zeros(self.shape[0] if self.shape else 1, dtype=torch.float64)
        for region, deltas in ready:
            for delta in deltas:
                if delta.reach is not None:
                    reach[region.place.start : region.place.start + delta.reach.numel()] += delta.reach
        return reach

    def end_of(self, place: Place) -> int:
        """Where the rows of a place end: with the tensor where that has grown."""
        grown = self.shape and place.stop == self.base.tensors[place.key].shape[0]
        return self.shape[0] if grown else place.stop

    def _summed(self, start: int, stop: int, delta: RowDelta) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """(W, Δ, W + Δ) of rows start..stop, each (rows, columns), in the working dtype."""
        wide = self.storage.read(start, stop).reshape(stop - start, -1)
        change = delta.rows(start, stop, wide)
        total = wide + change
        self._sum_again(start, wide, change, total, delta)
        return wide, change, total

    def _sum_again(self, start: int, wide: torch.Tensor, change: torch.Tensor, total: torch.Tensor, delta: RowDelta) -> None:
        """Entries in which so much cancels that the error of a float32 sum would be a step of the output's dtype: in float64."""
        import torch

        form = float_format(self.dtype)
        if delta.entries is None or delta.reach is None or wide.dtype == torch.float64 or form.mantissa > 10:
            return
        largest = wide.abs().amax(1) + change.abs().amax(1)
        doubt = (delta.reach[start : start + wide.shape[0]] + largest) * UNSURE
        doubt[doubt < 2.0 ** (form.minimum - form.mantissa)] = 0.0  # below the dtype's smallest step
        if not bool(doubt.any()):
            return
        limit = (doubt * 2.0 ** (form.mantissa + 1)).to(total.dtype)[:, None]
        rows, columns = (total.abs() < limit).nonzero(as_tuple=True)
        if rows.numel():
            exact = wide[rows, columns].to(torch.float64) + delta.entries(rows + start, columns)
            total[rows, columns] = exact.to(total.dtype)

    def _summing(self) -> Iterator[tuple[int, int, torch.Tensor]]:
        for start, stop, delta in self._bounds(self.storage.row_step):
            yield start, stop, self._summed(start, stop, delta())[2]

    def _block(self, start: int, stop: int, delta: Once[RowDelta]) -> torch.Tensor:
        wide, change, total = self._summed(start, stop, delta() if self.regions else _NOTHING)
        stored = self.storage.write(total, start)
        back = self.storage.decode(stored, start)
        moved = back - wide
        sums = Sums(dot(moved, change), dot(change, change), _square(moved.sub_(change)))
        if not math.isfinite(sums.kept + sums.delta + sums.lost):
            self._diagnose(wide, change, back)
            sums = Sums(*(float(value) for value in _wide_sums(back, wide, change)))
        self.tally.blocks[start] = sums
        return stored.reshape(stop - start, *self.shape[1:]) if self.shape else stored

    def _diagnose(self, wide: torch.Tensor, change: torch.Tensor, back: torch.Tensor) -> None:
        """Raise NotFiniteError saying which of base, adapter and output dtype is at fault; return where only a sum was too large."""
        terms = [term for region in self.regions for term in region.terms]
        guilty = [term for term in terms if any(first_not_finite(factor) for factor in term.entry.module.factors.values())]
        names = ", ".join(dict.fromkeys(term.given.name for term in guilty or terms))
        advice = "loratools inspect --check names every such tensor" if guilty else "its factors are finite: a smaller weight"
        for tensor, message, fix in (
            (wide, "the base holds NaN or Inf here", "loratools inspect --check names every such tensor"),
            (change, f"the delta of {names} is NaN or Inf here{'' if guilty else ', at its weight'}", advice),
            (back, f"a value overflows {self.dtype}", "--dtype bf16 or fp32 has the range"),
        ):
            if not bool(tensor.isfinite().all()):
                raise NotFiniteError(self.name, f"{self.name}: {message}", fix=fix)


def _of_bias(change: torch.Tensor, dtype: torch.dtype) -> RowDelta:
    return RowDelta(lambda start, stop, _: change[start:stop].reshape(-1, 1).to(dtype, copy=True), lambda rows, _: change[rows])


_NOTHING = RowDelta(lambda start, stop, rows: rows.new_zeros(rows.shape))


def _same(name: str, delta: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    """The delta, if it has the very shape of what it is added to: nothing is ever broadcast."""
    if delta.numel() != rows.numel():
        raise LoraToolsError(f"{name}: a delta of {delta.numel()} values for {rows.numel()} of the base (a defect in loratools)")
    return delta.reshape(rows.shape)


def dot(first: torch.Tensor, second: torch.Tensor) -> float:
    """⟨first, second⟩ over all entries, in their own dtype."""
    return float(first.reshape(-1).dot(second.reshape(-1)))


def _square(tensor: torch.Tensor) -> float:
    return dot(tensor, tensor)


def _wide_sums(back: torch.Tensor, wide: torch.Tensor, change: torch.Tensor) -> tuple[float, float, float]:
    import torch

    moved, delta = back.to(torch.float64) - wide.to(torch.float64), change.to(torch.float64)
    return dot(moved, delta), _square(delta), _square(moved - delta)
