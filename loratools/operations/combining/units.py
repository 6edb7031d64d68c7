"""Groups as the target dialect will hold them: which of them it fuses into one module, and the exact sum of each.

A rank is asked for of the modules that are written, so groups are brought to the target's own grouping first: q, k and v one by one
where it has them apart, joined where it has one qkv.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from loratools.adapters.adapter import Adapter, Entry, Form, Site
from loratools.adapters.kinds import Dense
from loratools.adapters.kinds.common import Scaled
from loratools.adapters.sums import Combined, combined, low_rank, plain_lora, unscaled
from loratools.errors import InputError, counted
from loratools.mapping.architectures import Architecture
from loratools.mapping.dialects import Dialect
from loratools.mapping.dimensions import choose_row, evaluate
from loratools.mapping.memory import remembered_forms, usual_form
from loratools.mapping.rules import Row
from loratools.operations.combining.grouping import Group
from loratools.operations.combining.recompress import Unit


@dataclass(frozen=True)
class Target:
    """Where the output goes: its names, what it can hold, where it keeps alpha.

    like: the adapter whose spelling is kept where the dialect is its own; dims: component → widths, of all inputs together
    """

    architecture: Architecture
    dialect: Dialect
    like: Adapter
    dims: Mapping[str, Mapping[str, int]]
    remembered: dict[str, Form] = field(default_factory=dict)

    @staticmethod
    def of(architecture: Architecture, dialect: Dialect, like: Adapter, dims: Mapping[str, Mapping[str, int]]) -> Target:
        return Target(architecture, dialect, like, dims, remembered_forms(like, architecture, dialect))

    def row(self, site: Site, shape: Sequence[int | None] = ()) -> tuple[tuple[Site, ...], Row | None]:
        """The sites of the target's module that holds this one, and its row; the site alone where the target has no name for it."""
        if self.architecture.open_names:
            return (site,), None
        component = self.architecture.component(site.component)
        for form in (self.remembered.get(site.component), usual_form(self.dialect, self.architecture, component)):
            matches = component.table.by_site(form.namespace, site.path) if form is not None else []
            if matches:
                match, _ = choose_row(matches, tuple(shape) if len(matches) > 1 else (), self.dims.get(site.component, {}))
                return tuple(Site(site.component, path) for path in match.sites), match.row
        return (site,), None

    def fits(self, sites: tuple[Site, ...]) -> bool:
        """Does the target hold exactly these sites in one module?"""
        return self.row(sites[0])[0] == sites

    def units(self, groups: Sequence[Group]) -> list[Unit]:
        """One unit a module of the target; groups that it splits stay whole. Raises InputError for parts of unknown width."""
        home = {site: group for group in groups for site in group.sites}
        found: dict[tuple[Site, ...], Unit] = {}
        problems: list[str] = []
        for group in groups:
            sites, row = self.row(group.sites[0], group.shape)
            if len(group.sites) > 1 or len(sites) == 1 or row is None:
                found[group.sites] = Unit(group.sites, (group,))
                continue
            if sites in found:
                continue
            parts = tuple(part if (part := home.get(site)) is not None and len(part.sites) == 1 else None for site in sites)
            heights = [self._height(part, row, index, sites[0].component) for index, part in enumerate(parts)]
            problems += [f"{site}: its width is unknown" for site, height in zip(sites, heights, strict=True) if height is None]
            found[sites] = Unit(sites, parts, tuple(height or 0 for height in heights))
        if problems:
            raise InputError(f"no known width of {counted(len(problems), 'part')} of fused modules, which no input has", details=problems)
        return list(found.values())

    def _height(self, group: Group | None, row: Row, part: int, component: str) -> int | None:
        return group.shape[0] if group is not None and group.shape else evaluate(row.out[part], self.dims.get(component, {}))

    # ------------------------------------------------------------------------------------------------------------ exact sums

    def exact(self, unit: Unit) -> list[tuple[Entry, list[Combined]]]:
        """The exact sums of a unit's groups as entries; those the target fuses are made of one kind and one scale."""
        made = [(group, [self._held(part) for part in combined(group.terms, self.dialect.holds)]) for group in unit.present]
        if len(made) > 1:
            made = _alike(made)
        return [(entry_of(group), parts) for group, parts in made]

    def _held(self, made: Combined) -> Combined:
        """As a kind the target holds, at a scale it can say."""
        module = made.module
        if low_rank(module) and module.kind not in self.dialect.holds:
            made = _plain(made)
        keeps = self.dialect.alpha in ("tensor", "config") or (made.source is not None and self.like.dialect == self.dialect.name)
        return made if keeps else unscaled(made)


def entry_of(group: Group) -> Entry:
    """An entry for a group, its module still to be put in."""
    return Entry(group.sites, group.terms[0].module, group.rows, group.swapped, group.name, group.form)


def _alike(made: list[tuple[Group, list[Combined]]]) -> list[tuple[Group, list[Combined]]]:
    """Parts of one fused module: all plain LoRA where kinds differ, at scale 1 where scales do."""
    low = [part.module for _, parts in made for part in parts if isinstance(part.module, Scaled)]
    kinds, scales = {module.kind for module in low}, {module.scale for module in low}
    if len(kinds) == len(scales) == 1:
        return made
    if len(kinds) > 1:
        made = [(group, [_plain(part) for part in parts]) for group, parts in made]
    return made if len(scales) == 1 else [(group, [unscaled(part) for part in parts]) for group, parts in made]


def _plain(part: Combined) -> Combined:
    """LoHa and LoKr as plain LoRA; others as they are."""
    return Combined(plain_lora(part.module), True) if part.module.kind in ("loha", "lokr") else part


def one_kind(entries: list[tuple[Entry, list[Combined]]]) -> list[tuple[Entry, list[Combined]]]:
    """PEFT has one kind of module for a component: all plain LoRA where an adapter would have several."""
    kinds: dict[str, set[str]] = {}
    for entry, parts in entries:
        kinds.setdefault(entry.component, set()).update(part.module.kind for part in parts if not isinstance(part.module, Dense))
    mixed = {component for component, found in kinds.items() if len(found) > 1}
    return [(entry, [_plain(part) for part in parts] if entry.component in mixed else parts) for entry, parts in entries]


def with_module(entry: Entry, part: Combined) -> Entry:
    return replace(entry, module=part.module, keys={})
