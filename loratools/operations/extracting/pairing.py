"""Which tensors of BASE and TUNED belong together, whatever the layout of either: from headers alone.

Both models are seen by site. What becomes one module of the output is a `Piece`: its sites (several where the target has q, k and v
fused in one), with weight and bias of both models in the sites' own order. Every tensor of either model is in a piece, skipped with
its reason, or a problem.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial

from loratools.adapters import factors
from loratools.adapters.adapter import Site
from loratools.mapping.bases import HEAD, Base
from loratools.mapping.rules import Row
from loratools.mapping.selection import Selection
from loratools.operations.combining.units import Target
from loratools.tensors.lazy import LazyTensor, same_bytes

ROLES = ("weight", "bias")
Sites = Mapping[tuple[Site, str], str]  # (site, role) → tensor


@dataclass(frozen=True)
class Twin:
    """A weight (out, in, *kernel) or a bias (out) in both models, and the names of TUNED's tensors it comes from."""

    before: LazyTensor
    after: LazyTensor
    keys: tuple[str, ...]

    @property
    def shape(self) -> tuple[int, ...]:
        return self.after.shape

    def same(self) -> bool:
        """Are both bit for bit the same? Reads no more than it takes to see a difference."""
        return same_bytes(self.before, self.after)


@dataclass(frozen=True)
class Piece:
    """What one module of the output is made of. heights: output rows of each site; row: its row of the table, None without one."""

    sites: tuple[Site, ...]
    heights: tuple[int, ...]
    row: Row | None
    weight: Twin | None
    bias: Twin | None
    embedding: bool = False

    @property
    def name(self) -> str:
        return str(self.sites[0])

    @property
    def twins(self) -> list[Twin]:
        return [twin for twin in (self.weight, self.bias) if twin is not None]

    @property
    def low_rank(self) -> bool:
        """Is its weight a matrix, to be decomposed, and not a vector or a bare parameter (Mamba's A_log, fused experts)?"""
        if self.weight is None or len(self.weight.shape) < 2:
            return False
        return self.row.layer != "parameter" if self.row is not None else self.weight.keys[0].endswith(".weight")

    @property
    def kernel(self) -> bool:
        """Is it a convolution of more than one point?"""
        return self.weight is not None and any(size > 1 for size in self.weight.shape[2:])


@dataclass
class Pairing:
    """All tensors of both models. beside: tensors of no module, to be compared; skipped: (tensor, or part of a model; why)."""

    pieces: list[Piece] = field(default_factory=list)
    beside: list[Twin] = field(default_factory=list)
    skipped: list[tuple[str, str]] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)


def pair(base: Base, tuned: Base, target: Target, selection: Selection, *, one_layout: bool, tied: bool = False) -> Pairing:
    """Pair the sites of two models of one architecture.

    one_layout: do both name their tensors in the same way? Then one that only one of them has is a problem; of different layouts
    each has some of its own. tied: the head of these language models is the embedding's tensor, which an adapter changes in each
    of the two places by itself.
    """
    found = Pairing()
    sites = [{(site, role): key for site, role, key in model.sites()} for model in (base, tuned)]
    wanted = _common(found, base, tuned, sites, selection, one_layout)
    head = next((replace(site, path=HEAD) for (site, _), key in wanted.items() if key == tuned.embedding), None) if tied else None
    if head is not None and selection.selects(head):
        wanted[head, "weight"] = str(tuned.embedding)
    done: set[Site] = set()
    for site in dict.fromkeys(site for site, _ in wanted):
        if site in done:
            continue
        members, row = target.row(site, _shape(tuned, site))
        members = members if all((member, "weight") in wanted for member in members) else (site,)
        done.update(members)
        embedding = row.layer == "embedding" if row is not None else tuned.looks_up(site)
        _enter(found, partial(_twin, base, tuned, wanted), members, row, embedding)
    _unnamed(found, base, tuned, sites)
    return found


def _common(
    found: Pairing, base: Base, tuned: Base, sites: Sequence[Sites], selection: Selection, one_layout: bool
) -> dict[tuple[Site, str], str]:
    """(site, role) → TUNED's tensor, of what both have; the rest is noted."""
    names = ("BASE", "TUNED")
    parts = [{site.component for site, _ in mine} for mine in sites]
    for index, mine in enumerate(sites):
        alone = parts[index] - parts[1 - index]
        why = {key: f"{names[1 - index]} has no {site.component}" for (site, _), key in mine.items() if site.component in alone}
        found.skipped += why.items()
    out = dict.fromkeys(key for (site, _), key in sites[1].items() if not selection.selects(site))
    found.skipped += [(key, "left out by the selection") for key in out]
    common: dict[tuple[Site, str], str] = {}
    for index, (mine, other) in enumerate(zip(sites, (tuned, base), strict=True)):
        for (site, role), key in mine.items():
            if not selection.selects(site) or site.component not in parts[1 - index] or (site, role) in common:
                continue
            place = other.place(site, role)
            if place is not None:
                common[site, role] = place.key if index == 0 else key
            elif one_layout:
                found.problems.append(f"{key}: only {names[index]} has it")
            else:
                found.skipped.append((key, f"only {names[index]} has it"))
    return common


def _shape(model: Base, site: Site) -> tuple[int, ...]:
    place = model.place(site)
    return model.tensors[place.key].shape if place is not None else ()


def _enter(
    found: Pairing, twin: Callable[[tuple[Site, ...], str], Twin | None], members: tuple[Site, ...], row: Row | None, embedding: bool
) -> None:
    """The piece of these sites, or what is wrong with it."""
    weight, bias = (twin(members, role) for role in ROLES)
    fitting: list[Twin | None] = []
    for one in (weight, bias):
        fits = one is None or _alike(one)
        if one is not None and not fits:
            found.problems.append(f"{members[0]}: BASE has {list(one.before.shape)}, TUNED {list(one.after.shape)} ({one.keys[0]})")
        fitting.append(_reshaped(one) if one is not None and fits else None)
    if any(one is not None for one in fitting):
        heights = tuple(_height(twin, member) for member in members) if len(members) > 1 else ()
        found.pieces.append(Piece(members, heights, row, fitting[0], fitting[1], embedding))


def _height(twin: Callable[[tuple[Site, ...], str], Twin | None], site: Site) -> int:
    one = twin((site,), "weight")
    return one.shape[0] if one is not None else 0


def _twin(base: Base, tuned: Base, wanted: Sites, members: tuple[Site, ...], role: str) -> Twin | None:
    """Weights or biases of these sites, joined; None where not all of them have one."""
    if not all((site, role) in wanted for site in members):
        return None
    sides = [[_at(model, site, role) for site in members] for model in (base, tuned)]
    before, after = (parts[0] if len(parts) == 1 else factors.cat(parts) for parts in sides)
    return Twin(before, after, tuple(dict.fromkeys(wanted[site, role] for site in members)))


def _at(model: Base, site: Site, role: str) -> LazyTensor:
    """A site's weight (out, in, *kernel) or bias; a Conv1D of transformers keeps its weight (in, out)."""
    tensor = model.at(site, role)
    return factors.transposed(tensor) if model.conv1d(site) and len(tensor.shape) == 2 else tensor


def _alike(twin: Twin) -> bool:
    """Equal shapes, but for kernel axes of size 1: a projection is a 1x1 convolution in one layout and a matrix in another."""
    shapes = twin.before.shape, twin.after.shape
    if len(shapes[0]) == len(shapes[1]):
        return shapes[0] == shapes[1]
    return shapes[0][:2] == shapes[1][:2] and {*shapes[0][2:], *shapes[1][2:]} <= {1}


def _reshaped(twin: Twin) -> Twin:
    return replace(twin, before=twin.before.reshape(twin.shape)) if twin.before.shape != twin.shape else twin


def _beside(model: Base, named: Sites) -> dict[str, LazyTensor]:
    """A model's tensors that are neither a site's nor a scale that one of them is read with."""
    known = {*named.values(), *model.scales}
    return {key: tensor for key, tensor in model.tensors.items() if key not in known}


def _unnamed(found: Pairing, base: Base, tuned: Base, sites: Sequence[Sites]) -> None:
    """Tensors that are no module's (a VAE, buffers): of one name they are compared, of one model alone they are told."""
    mine, theirs = (_beside(model, named) for model, named in zip((base, tuned), sites, strict=True))
    for key, tensor in theirs.items():
        if key in mine:
            found.beside.append(Twin(mine[key], tensor, (key,)))
        else:
            found.skipped.append((key, "no module of the architecture, and only TUNED has it"))
    found.skipped += [(key, "no module of the architecture, and only BASE has it") for key in mine if key not in theirs]
