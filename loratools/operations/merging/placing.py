"""Which rows of which base tensor each module of the adapters changes: everything a merge can know from headers.

A `Term` is one module at one site with its weight; a `Region` is the rows of a tensor that belong to one site, with all terms that
add to them. Problems are collected, never raised one by one: unmatched keys, shapes, biases a layer does not have.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from loratools.adapters.adapter import BIAS_ROLES, Adapter, Entry, Module, NotExact, Site
from loratools.adapters.kinds import Dense, Replacement
from loratools.errors import LoraToolsError
from loratools.mapping.architectures import Architecture
from loratools.mapping.bases import HEAD, Base, Place
from loratools.mapping.selection import Selection

_FLATTENED = ("loha", "lokr", "dora")  # kinds whose convolutions may come with the kernel folded into the inputs


@dataclass(frozen=True)
class Given:
    """One adapter of the command line. digest: sha256 of its weights; position: where the user named it."""

    path: Path
    weight: float
    adapter: Adapter
    architecture: Architecture
    digest: str
    position: int
    warnings: tuple[str, ...] = ()
    files: tuple[Path, ...] = ()
    beside: Mapping[str, str] = field(default_factory=dict)  # tensors of no module, by key, and why

    @property
    def name(self) -> str:
        return self.path.name


@dataclass(frozen=True)
class Term:
    """One module at one site, weight included.

    module: in the site's own order; None where the entry's module has no exact split or swap: then its ΔW is computed on the whole
    weight it serves and rows start..stop of it are the site's.
    """

    given: Given
    entry: Entry
    site: Site
    weight: float
    module: Module | None
    start: int = 0
    stop: int = 0

    @property
    def acting(self) -> Module:
        return self.module if self.module is not None else self.entry.module


@dataclass
class Region:
    """The rows of one base tensor that are one site's, and what is added to them. role: "weight" or "bias"."""

    place: Place
    site: Site
    role: str
    terms: list[Term] = field(default_factory=list)


@dataclass
class Placement:
    """Every change by output tensor, and everything that stands against the merge."""

    regions: dict[str, list[Region]] = field(default_factory=dict)
    unmatched: list[str] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    misfits: list[str] = field(default_factory=list)  # tensors of the base that have another shape than the adapter changes
    left_out: list[str] = field(default_factory=list)  # tensors of no module that --exclude names
    passed_over: int = 0  # sites the selection leaves out
    silent: int = 0  # sites of weight 0
    grown: dict[str, tuple[int, ...]] = field(default_factory=dict)  # tensor → its new shape

    def at(self, place: Place, site: Site, role: str) -> Region:
        """The region of these rows, made when it is first asked for."""
        regions = self.regions.setdefault(place.target, [])
        for region in regions:
            if region.place == place and region.role == role:
                return region
        made = Region(place, site, role)
        regions.append(made)
        regions.sort(key=lambda region: region.place.start)
        return made


def place_all(given: Sequence[Given], bases: Mapping[str, Base], selection: Selection) -> Placement:
    """Find the rows of every module. given: in the order in which terms are to be summed; bases: by architecture name."""
    placement = Placement()
    for one in given:
        base = bases[one.architecture.name]
        for entry in one.adapter.entries:
            for term in _terms(one, entry, selection, placement):
                _place(term, base, placement)
    return placement


def _terms(given: Given, entry: Entry, selection: Selection, placement: Placement) -> Iterator[Term]:
    """The entry at the finest split, what the selection leaves out and weights of 0 taken away."""
    for site, module, start, stop in _parts(entry, placement, given):
        factor = selection.factor(site, given.architecture, given.name)
        if factor is None:
            placement.passed_over += 1
            continue
        weight = given.weight * factor
        if weight == 0:
            placement.silent += 1
            continue
        yield Term(given, entry, site, weight, module, start, stop)


def _parts(entry: Entry, placement: Placement, given: Given) -> list[tuple[Site, Module | None, int, int]]:
    try:
        return [(site, module, 0, 0) for site, module in entry.parts()]
    except NotExact as error:
        if len(entry.sites) == 1:
            return [(entry.sites[0], None, 0, entry.module.shape[0] or 0)]
        if len(entry.rows) != len(entry.sites):
            placement.problems.append(f"{given.name}: {entry.name}: {error}")
            return []
    stops = [sum(entry.rows[: index + 1]) for index in range(len(entry.rows))]
    return [(site, None, stop - rows, stop) for site, rows, stop in zip(entry.sites, entry.rows, stops, strict=True)]


def _place(term: Term, base: Base, placement: Placement) -> None:
    """Enter a term at its weight and at its bias."""
    module, where = term.acting, f"{term.given.name}: {term.site}"
    try:
        weight = base.place(term.site) if module.changes_weight else None
        bias = base.place(term.site, "bias") if module.changes_bias else None
    except LoraToolsError as error:
        placement.problems.append(f"{where}: {error.message}")
        return
    if module.changes_weight and weight is None:
        placement.unmatched += [f"{term.given.name}: {key}: {_nearest(term.site, base)}" for key in _keys(term)]
        return
    if module.needs_bias and bias is None:
        keys = ", ".join(key for role, key in term.entry.keys.items() if role in BIAS_ROLES)
        placement.problems.append(f"{where}: the adapter changes a bias ({keys}), this layer of the base has none")
        return
    if weight is not None:
        weight = _oriented(term, weight, base)
        trouble = _misfit(term, base.tensors[weight.key].shape, weight, placement)
        if trouble:
            placement.problems.append(f"{where}: {trouble}")
            placement.misfits.append(weight.key)
            return
        placement.at(weight, term.site, "weight").terms.append(term)
    if bias is not None:
        placement.at(bias, term.site, "bias").terms.append(term)


def _keys(term: Term) -> list[str]:
    return list(term.entry.keys.values()) or [str(term.site)]


def _nearest(site: Site, base: Base) -> str:
    """Why a site finds nothing: its part of the pipeline is not there, or the module is not."""
    names = [key.rpartition(".")[0] for key in base.tensors]
    near = difflib.get_close_matches(site.path, names, 1, 0.7) if base.architecture.open_names else []
    return f"the base has no {site}" + (f"; the nearest is {near[0]}" if near else "")


def _oriented(term: Term, place: Place, base: Base) -> Place:
    """A Conv1D keeps its weight (in, out).

    The base says whether a layer is one (`Base.conv1d`); PEFT's fan_in_fan_out is that of the layer it visited last, so it counts
    only where the base has no config.json.
    """
    if len(base.tensors[place.key].shape) != 2 or isinstance(term.acting, Dense) or "embedding_up" in term.acting.factors:
        return place
    config: Mapping[str, Any] = term.given.adapter.config or {}
    turned = base.conv1d(term.site)
    turned = bool(config.get("fan_in_fan_out")) and term.site.path != HEAD if turned is None else turned
    return replace(place, transposed=True) if turned else place


def _misfit(term: Term, stored: tuple[int, ...], place: Place, placement: Placement) -> str | None:
    """What is wrong between a module's shape and the region's, (out, in, *kernel); None where it fits."""
    module = term.acting
    region = (place.stop - place.start, *stored[1:])
    region = region[::-1] if place.transposed else region
    padded = module.padded_shape if isinstance(module, Dense) else ()
    padded = padded or next((other.padded_shape for other in _beside(term) if isinstance(other, Dense) and other.padded_shape), ())
    grows = isinstance(module, Replacement) and module.shape[1:] == region[1:] and len(region) == 2 and (module.shape[0] or 0) > region[0]
    if grows:
        padded = tuple(size or 0 for size in module.shape)
    if padded:
        if len(padded) != len(region) or any(new < old for new, old in zip(padded, region, strict=True)) or region[0] != stored[0]:
            return f"the adapter widens the weight to {list(padded)}, the base has {list(region)}"
        placement.grown[place.target] = region = padded
    if term.module is None and term.stop:
        return None if region[0] == term.stop - term.start else f"{term.stop - term.start} rows for {region[0]} of the base"
    return misfit(module, region)


def _beside(term: Term) -> list[Module]:
    """The other modules of the same file at the same site."""
    return [entry.module for entry in term.given.adapter.entries if entry.sites == term.entry.sites and entry is not term.entry]


def misfit(module: Module, region: tuple[int, ...]) -> str | None:
    """Compare shapes: equal, but that a 1x1 convolution may be a matrix; nothing is broadcast."""
    shape = module.shape
    told = f"the adapter changes a weight of shape {_shown(shape)}, the base has {_shown(region)}"
    if len(region) == 1:
        return None if shape[0] in (None, region[0]) and all(size in (None, 1) for size in shape[1:]) else told
    if len(shape) < 2 or shape[0] not in (None, region[0]):
        return told
    same = shape[2:] == region[2:] if len(shape) == len(region) else {*shape[2:], *region[2:]} <= {1}
    if shape[1] in (None, region[1]) and (same or None in shape):
        return None
    return None if module.kind in _FLATTENED and len(shape) == 2 and shape[1] == math.prod(region[1:]) else told


def _shown(shape: Sequence[int | None]) -> str:
    return "[" + ", ".join("?" if size is None else str(size) for size in shape) + "]"
