"""Adapter → keys: the right half of the road.

`plan` regroups the entries as the target namespace has them (a rename where the grouping is the same, else split and fuse),
makes each module fit the dialect (`fitting`), and spells the keys. It returns lazy tensors: nothing but what a decision needs is
read. All refusals are collected and raised together.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any

from loratools.adapters.adapter import Adapter, Entry, Form, Module, NotExact, Site
from loratools.adapters.kinds import Dense
from loratools.errors import UnsupportedError, counted
from loratools.mapping import peft_config
from loratools.mapping.architectures import Architecture, Component
from loratools.mapping.baking import approximated, baked
from loratools.mapping.bases import Base
from loratools.mapping.dialects import DIALECTS, Dialect
from loratools.mapping.dimensions import choose_row, evaluate
from loratools.mapping.fitting import fit_alpha, fit_dtype, fit_kind, fit_shape_of, flattened, narrows, relative_change
from loratools.mapping.leaves import COMMON_LEAF, SCHEMES
from loratools.mapping.memory import remembered_flat, remembered_forms, unfolded, usual_form
from loratools.mapping.names import open_match
from loratools.mapping.rules import DIFF, Match, flat
from loratools.report import Report
from loratools.tensors.lazy import LazyTensor

# What folding a scale into 16-bit factors may cost without being asked for: a few times bfloat16's rounding (2^-9).
_UNASKED = 0.01

# How a dialect spells a replaced weight; ComfyUI's own word elsewhere.
_SET_WEIGHT = {"bfl-control": "scale", "diffusers": "weight", "peft": "weight"}


@dataclass
class Written:
    """One output module: its sites, the name it has behind its prefix, and the module as it will be written."""

    sites: tuple[Site, ...]
    name: str
    module: Module
    keys: dict[str, str]  # role → key
    sources: tuple[Entry, ...]
    original_alpha: float | None = None  # before it was folded
    alpha_tensor: LazyTensor | None = None  # that held it
    reshaped: tuple[str, ...] = ()  # roles that had two dimensions in the file and have a kernel here


@dataclass
class Plan:
    """Everything a conversion will write, in order, before anything is computed."""

    dialect: Dialect
    tensors: dict[str, LazyTensor]
    modules: list[Written]
    report: Report
    configs: dict[str, dict[str, Any]] = field(default_factory=dict)  # component folder → adapter config

    @property
    def sites(self) -> set[Site]:
        return {site for written in self.modules for site in written.sites}


@dataclass(frozen=True)
class _Target:
    """A module of the target namespace: how it is spelled, its row, and the sites of the row."""

    form: Form
    component: Component
    match: Match
    sites: tuple[Site, ...]


def plan(
    adapter: Adapter,
    architecture: Architecture,
    dialect_name: str,
    *,
    plain: bool = False,
    keep_alpha: bool = False,
    dtype: str | None = None,
    base: Base | None = None,
    lossy: bool = False,
) -> Plan:
    """What `adapter` is in another dialect.

    plain: turn LoHa, LoKr and tucker into LoRA; keep_alpha: leave the scale to the header where the dialect has one;
    dtype: safetensors name of the dtype factors are rounded to (alpha is never rounded); base: weights for which modules that
    multiply the base weight are turned into full deltas (or low-rank approximations), where the dialect cannot hold them;
    lossy: let a folded scale cost more than a few roundings.
    Raises UnsupportedError listing every site the dialect has no name for, cannot hold, or cannot be converted to exactly.
    """
    dialect = DIALECTS[dialect_name]
    if not dialect.writable:
        raise UnsupportedError(f"{dialect.name} cannot be written: {dialect.notes}")
    if not dialect.serves(architecture):
        others = [other.name for other in DIALECTS.values() if other.writable and other.serves(architecture)]
        fix = f"dialects that have one: {', '.join(others)}"
        raise UnsupportedError(f"{dialect.name} has no spelling for {architecture.title}", fix=fix)
    writer = _Writer(adapter, architecture, dialect, plain=plain, keep_alpha=keep_alpha, dtype=dtype, base=base, lossy=lossy)
    return writer.plan()


class _Writer:
    def __init__(
        self,
        adapter: Adapter,
        architecture: Architecture,
        dialect: Dialect,
        *,
        plain: bool,
        keep_alpha: bool,
        dtype: str | None,
        base: Base | None,
        lossy: bool,
    ) -> None:
        self.base, self.lossy = base, lossy
        self.adapter = unfolded(adapter) if dialect.alpha in ("tensor", "config") else adapter
        self.source = {id(mine): theirs for mine, theirs in zip(self.adapter.entries, adapter.entries, strict=True)}
        self.architecture, self.dialect = architecture, dialect
        self.plain, self.dtype = plain, dtype
        self.keep_alpha = keep_alpha or adapter.dialect == dialect.name  # a rewrite leaves the scale where the file has it
        self.report = Report()
        self.refusals: list[str] = []
        self.remembered = remembered_forms(adapter, architecture, dialect)
        self.flat = remembered_flat(adapter, dialect)
        self.unsplit: dict[int, dict[Site, Module]] = {}
        self.made: dict[int, Entry] = {}
        self.at: dict[Site, list[Entry]] = {}
        for entry in self.adapter.entries:
            for site in entry.sites:
                self.at.setdefault(site, []).append(entry)

    def plan(self) -> Plan:
        modules: list[Written] = []
        for target, entries in self._targets():
            for group in _by_kind(entries):
                written = self._write(target, group)
                if written is not None:
                    modules.append(written)
        if self.refusals:
            raise UnsupportedError(
                f"{counted(len(self.refusals), 'module')} cannot be written as {self.dialect.name}",
                details=self.refusals,
                fix=self._fix(),
            )
        tensors = {key: written.module.factors[role] for written in modules for role, key in written.keys.items()}
        configs = self._configs(modules) if self.dialect.alpha in ("config", "header") else {}
        return Plan(self.dialect, tensors, modules, self.report, configs)

    def _fix(self) -> str | None:
        if any("does not fit into" in refusal for refusal in self.refusals):
            return "--dtype fp32 makes room for it, --allow-lossy takes the loss"
        kinds = {entry.module.kind for entry in self.adapter.entries}
        if kinds & {"loha", "lokr"} and not self.plain:
            return "--kind lora turns LoHa, LoKr and tucker modules into plain LoRA first"
        if self.base is None and any(not entry.module.linear for entry in self.adapter.entries):
            return "--base MODEL --allow-lossy turns modules that multiply the base weight into full deltas for that base"
        return "loratools formats shows what each dialect holds"

    # ---------------------------------------------------------------------------------------------------------- grouping

    def _targets(self) -> Iterator[tuple[_Target, list[Entry]]]:
        """Each module of the target namespace that some entry serves, in the order the source first mentions it."""
        done: set[tuple[str, str]] = set()
        for entry in self.adapter.entries:
            for site in entry.sites:
                try:
                    target = self._target(site, entry)
                except NotExact as refused:
                    self.refusals.append(str(refused))
                    continue
                if (site.component, target.match.name) in done:
                    continue
                done.add((site.component, target.match.name))
                serving = {id(other): other for part in target.sites for other in self.at.get(part, ())}
                yield target, list(serving.values())

    def _target(self, site: Site, entry: Entry) -> _Target:
        """The row of the target namespace that holds a site. Raises NotExact where the dialect has no name for it."""
        component = self._component(site.component)
        for form in self._forms(component):
            matches = self._rows(component, form.namespace, site.path)
            if matches:
                shape = entry.module.shape if len(entry.sites) == 1 and len(matches) > 1 else ()
                match, _ = choose_row(matches, shape, self.adapter.dims.get(site.component, {}))
                return _Target(form, component, match, tuple(Site(site.component, path) for path in match.sites))
        raise NotExact(f"{site}: {self.dialect.name} has no name for it")

    def _forms(self, component: Component) -> list[Form]:
        """How the dialect spells a component: as the file did when it was last in this dialect, else its first spelling."""
        usual = usual_form(self.dialect, self.architecture, component)
        remembered = self.remembered.get(component.name)
        return [form for form in (remembered, usual) if form is not None]

    def _component(self, name: str) -> Component:
        return self.architecture.component(name)

    def _rows(self, component: Component, namespace: str, path: str) -> list[Match]:
        if self.architecture.open_names:
            return [open_match(path)]
        return component.table.by_site(namespace, path)

    # ----------------------------------------------------------------------------------------------------------- writing

    def _write(self, target: _Target, entries: list[Entry]) -> Written | None:
        """One output module: regrouped, fitted, spelled. A refusal is noted and None returned."""
        where = ", ".join(str(site) for site in target.sites if site in self.at)
        try:
            module = self._fitted(target, entries)
            if module is None:
                return None
            stored = module
            reshaped: tuple[str, ...] = ()
            if self.adapter.dialect != self.dialect.name:
                module = fit_shape_of(module, target.match.row)
                reshaped = tuple(role for role in module.factors if module.factors[role].shape != stored.factors[role].shape)
                module = flattened(module, self.flat.get(str(target.sites[0]), ()))
            original, tensor = module.alpha, module.factors.get("alpha")
            wide = fit_dtype(module, "F32") if self.dtype else module  # the scale is folded in float32, then rounded once
            module = fit_alpha(wide, self.dialect, keep_alpha=self.keep_alpha)
            narrowed = self.dtype is not None and narrows(wide, self.dtype)
            module = fit_dtype(module, self.dtype, narrow=True) if self.dtype else module
        except NotExact as refused:
            self.refusals.append(f"{where}: {refused}")
            return None
        if module.rounded or narrowed:
            error = self._note_error(target, entries, module)
            if error > _UNASKED and self.dtype is None and not self.lossy:
                room = f"does not fit into {_dtypes(module)} factors, ΔW would be off by {error:.2g}"
                self.refusals.append(f"{where}: its scale {original} / {module.rank} {room}")
                return None
        name = self._spelled(target)
        prefix = self._folder(target.component) + target.form.prefix
        keys = {role: prefix + name + "." + self._leaf(role, module, target) for role in self._roles(module)}
        for entry in entries:
            self.report.mapped.update(entry.keys.values())
        sites = tuple(site for site in target.sites if site in self.at)
        return Written(sites, target.match.name, module, keys, tuple(entries), original, tensor, reshaped)

    def _fitted(self, target: _Target, entries: list[Entry]) -> Module | None:
        """The target's module as a kind the dialect holds; baked on the base, if there is one, where that is refused."""
        try:
            module = self._regroup(target, entries)
            return None if module is None else fit_kind(module, self.dialect, target.match.row, plain=self.plain)
        except NotExact:
            if self.base is None or all(entry.module.linear for entry in entries):
                raise
        module = self._regroup(target, [self._baked(entry, self.base) for entry in entries])
        if isinstance(module, Dense):
            module = self._low_rank(target, module)
        return None if module is None else fit_kind(module, self.dialect, target.match.row, plain=self.plain)

    def _baked(self, entry: Entry, base: Base) -> Entry:
        """The entry as a full delta on the base, if it multiplies the base weight; made once for all the parts it serves."""
        if entry.module.linear:
            return entry
        if id(entry) not in self.made:
            self.made[id(entry)] = replace(entry, module=baked(entry.module, base.of(entry)))
            self.source[id(self.made[id(entry)])] = self.source[id(entry)]
        return self.made[id(entry)]

    def _low_rank(self, target: _Target, module: Dense) -> Module:
        """A full delta as the dialect holds it, with the loss noted."""
        found, error = (module, 0.0) if "dense" in self.dialect.holds else approximated(module)
        for site in target.sites:
            if site in self.at:
                self.report.approximated[str(site)] = error
                self.report.lossy.add(str(site))
        return found

    def _regroup(self, target: _Target, entries: list[Entry]) -> Module | None:
        """The entries' modules as one module of the target's row; None for a part of a fused module whose rows are all zero."""
        row = target.match.row
        if len(entries) == 1 and entries[0].sites == target.sites:
            entry = entries[0]
            return entry.module if entry.swapped == row.swapped else entry.module.swap_halves()
        if len(target.sites) == 1:
            part = self._parts(entries[0]).get(target.sites[0])
            if part is None:
                self.report.mapped.update(entries[0].keys.values())
                self.report.warn("zero-rows", f"{target.sites[0]}: its rows of {entries[0].name} are all zero; nothing is written for it")
                return None
            return part.swap_halves() if row.swapped else part
        pieces, rows = self._pieces(target, entries)
        fused = type(next(piece for piece in pieces if piece is not None)).fuse(pieces, rows)
        return fused.swap_halves() if row.swapped else fused

    def _pieces(self, target: _Target, entries: list[Entry]) -> tuple[list[Module | None], list[int]]:
        """Modules in row order with their heights: an entry that serves a run of the parts whole is left in one piece."""
        pieces: list[Module | None] = []
        rows: list[int] = []
        position = 0
        while position < len(target.sites):
            site = target.sites[position]
            run = next((entry for entry in entries if entry.sites == target.sites[position : position + len(entry.sites)]), None)
            if run is not None and not run.swapped:
                pieces.append(run.module)
                rows.append(self._height(target, position, len(run.sites), run.module))
                position += len(run.sites)
                continue
            holder = next((entry for entry in entries if site in entry.sites), None)
            part = self._parts(holder).get(site) if holder else None
            pieces.append(part)
            rows.append(self._height(target, position, 1, part))
            position += 1
        return pieces, rows

    def _height(self, target: _Target, position: int, count: int, module: Module | None) -> int:
        if module is not None and module.shape and module.shape[0] is not None:
            return module.shape[0]
        dims = self.adapter.dims.get(target.component.name, {})
        values = [evaluate(expression, dims) for expression in target.match.row.out[position : position + count]]
        if any(value is None for value in values):
            raise NotExact(f"the width of {target.sites[position]} is unknown: no module of the file tells it")
        return sum(value for value in values if value is not None)

    def _parts(self, entry: Entry) -> dict[Site, Module]:
        if id(entry) not in self.unsplit:
            self.unsplit[id(entry)] = dict(entry.parts())
        return self.unsplit[id(entry)]

    def _note_error(self, target: _Target, entries: list[Entry], module: Module) -> float:
        """The relative error of ΔW at each site that rounding made, measured against the file's own modules; the largest of them."""
        module = module.swap_halves() if target.match.row.swapped else module
        before = {site: part for entry in entries for site, part in self._parts(self.source[id(entry)]).items()}
        heights = [self._height(target, position, 1, before.get(site)) for position, site in enumerate(target.sites)]
        pieces = module.split(heights) if len(target.sites) > 1 else [module]
        for site, piece in zip(target.sites, pieces, strict=True):
            if site in before and piece is not None:
                self.report.approximated[str(site)] = relative_change(before[site], piece)
        return max((self.report.approximated.get(str(site), 0.0) for site in target.sites), default=0.0)

    # ---------------------------------------------------------------------------------------------------------- spelling

    def _folder(self, component: Component) -> str:
        """Where a PEFT adapter has a folder for each component, the one this is in: two encoders share all their names."""
        several = self.dialect.folder and len(self.adapter.components) > 1
        return f"{component.folder}." if several else ""

    def _spelled(self, target: _Target) -> str:
        name = target.match.name
        return {"dotted": name, "flat": flat(name), "flat_": flat(name) + "_"}[target.form.spelling]

    def _leaf(self, role: str, module: Module, target: _Target) -> str:
        """The leaf of a role: the scheme's own word, or the common one. A tucker core has only kohya's words."""
        scheme = "kohya" if "mid" in module.factors else target.form.scheme
        if role == "set_weight":
            return _SET_WEIGHT.get(self.dialect.name, COMMON_LEAF[role])
        return SCHEMES[scheme].get(role) or COMMON_LEAF[role]

    @staticmethod
    def _roles(module: Module) -> list[str]:
        order = {role: position for position, role in enumerate(module.roles)}
        return sorted(module.factors, key=lambda role: order.get(role, len(order)))

    # ----------------------------------------------------------------------------------------------------------- configs

    def _configs(self, modules: list[Written]) -> dict[str, dict[str, Any]]:
        """adapter_config.json (or the header's equivalent) for each component, from the modules as written."""
        by_component: dict[str, list[Written]] = {}
        for written in modules:
            by_component.setdefault(written.sites[0].component, []).append(written)
        configs: dict[str, dict[str, Any]] = {}
        for component_name, group in by_component.items():
            component = self._component(component_name)
            known = () if self.architecture.open_names else tuple(row.name for row in component.table.namespaces[DIFF])
            named = {written.name: written.module for written in group}
            config = peft_config.config_for(named, known, peft_config.part_of(self.adapter.config, component.folder), self.dialect.name)
            configs[component.folder] = config
        return configs


def _dtypes(module: Module) -> str:
    return "/".join(sorted({tensor.dtype for role, tensor in module.factors.items() if role != "alpha"}))


def _by_kind(entries: list[Entry]) -> list[list[Entry]]:
    """Entries of one output module apart by kind: a LoRA and a dense delta at one site stay two modules of one name."""
    groups: dict[bool, list[Entry]] = {}
    for entry in entries:
        groups.setdefault(isinstance(entry.module, Dense), []).append(entry)
    return [group for _, group in sorted(groups.items())]
