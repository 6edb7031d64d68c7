"""Which modules of several adapters meet at a site, and whether their sum exists. Shapes and kinds are judged from headers.

A group is a set of sites that are combined as one: a fused module (q, k and v in one) stays one where every adapter that touches it
has it fused in the same way, else everything it meets is taken at the finest split. Kinds that multiply the base weight have no sum:
one alone, at weight 1, passes through.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from loratools.adapters.adapter import Adapter, Entry, Form, Module, NotExact, Site
from loratools.adapters.kinds import Dense
from loratools.adapters.sums import Term, low_rank, plain_dense, plain_lora
from loratools.errors import InputError, LoraToolsError, UnsupportedError, counted


@dataclass(frozen=True)
class Input:
    """One adapter of a combination. position: on the command line; weight 0 takes it out."""

    position: int
    path: Path
    weight: float
    adapter: Adapter

    @property
    def name(self) -> str:
        return self.path.name


@dataclass(frozen=True)
class Group:
    """Sites that are combined as one, with everything the inputs have there.

    rows, swapped, form, name: as of an Entry
    """

    sites: tuple[Site, ...]
    terms: tuple[Term, ...]
    rows: tuple[int, ...] = ()
    swapped: bool = False
    form: Form | None = None
    name: str = ""

    @property
    def additive(self) -> bool:
        return all(_additive(term.module) for term in self.terms)

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the weight, in the most dimensions an input gives it; () where no module tells it."""
        shapes = [tuple(size for size in term.module.shape if size is not None) for term in self.terms if term.module.changes_weight]
        return max(shapes, key=len, default=())


def _additive(module: Module) -> bool:
    """Has it a sum with others? A padding of W has none, nor has a kind that multiplies or replaces W."""
    return module.linear and "reshape_weight" not in module.factors


def check(inputs: Sequence[Input]) -> list[LoraToolsError]:
    """What stands against the sum, from headers alone: kinds without one, shapes that differ."""
    problems: list[LoraToolsError] = []
    fixed = list(_without_sum(inputs))
    if fixed:
        text = f"{counted(len(fixed), 'module')} without a sum: what multiplies or replaces the base weight stands alone, with weight 1"
        problems.append(UnsupportedError(text, details=fixed, fix="loratools merge puts such adapters into a base, one after the other"))
    shapes = list(_mismatches(inputs))
    if shapes:
        problems.append(InputError(f"the inputs have different shapes at {counted(len(shapes), 'site')}", details=shapes))
    return problems


def _without_sum(inputs: Sequence[Input]) -> Iterator[str]:
    """Modules that cannot be combined, one a line."""
    users: dict[Site, set[int]] = {}
    for given in inputs:
        for entry in given.adapter.entries:
            for site in entry.sites:
                users.setdefault(site, set()).add(given.position)
    for given in inputs:
        for entry in given.adapter.entries:
            others = set().union(*(users[site] for site in entry.sites)) - {given.position}
            if _additive(entry.module) or (not others and (given.weight == 1.0 or entry.module.linear)):
                continue
            met = ", ".join(other.name for other in inputs if other.position in others)
            reason = f"beside {met}" if met else f"at weight {given.weight:g}"
            yield f"{entry.sites[0]}: {entry.module.kind} of {given.name} {reason}"


def _mismatches(inputs: Sequence[Input]) -> Iterator[str]:
    """Sites whose weight has another shape in one input than in another: [out, in · kernel], from headers."""
    seen: dict[Site, dict[tuple[int, int | None], tuple[str, str]]] = {}
    for given in inputs:
        for entry in given.adapter.entries:
            heights = entry.rows if len(entry.rows) == len(entry.sites) else (entry.module.shape[0],) * (len(entry.sites) == 1)
            inner = entry.module.shape[1:]
            width = None if any(size is None for size in inner) else math.prod(size for size in inner if size is not None)
            for site, height in zip(entry.sites, heights, strict=False):
                if height is not None:
                    shown = "[" + ", ".join("?" if size is None else str(size) for size in (height, *inner)) + "]"
                    seen.setdefault(site, {}).setdefault((height, width), (given.name, shown))
    for site, found in seen.items():
        known = {key for key in found if key[1] is not None}
        if len(known) > 1 or len({height for height, _ in found}) > 1:
            yield f"{site}: " + ", ".join(f"{shape} in {name}" for name, shape in found.values())


def groups(inputs: Sequence[Input], whole: Callable[[tuple[Site, ...]], bool]) -> list[Group]:
    """The groups of all inputs, in the order the inputs first mention them.

    whole: may these sites, fused in one module, be combined as one? (They are split otherwise.)
    Raises UnsupportedError listing fused modules that have to be split and have no exact split.
    """
    found: list[Group] = []
    problems: list[str] = []
    for members in _connected(inputs):
        entries = [entry for _, entry in members]
        grouping = {(entry.sites, entry.rows, entry.swapped) for entry in entries}
        fixed = not all(_additive(entry.module) for entry in entries)
        if fixed or (len(grouping) == 1 and whole(entries[0].sites)):
            found.append(_as_one(members))
        else:
            try:
                found.extend(_finest(members))
            except NotExact as refused:
                problems.append(f"{entries[0].sites[0]}: {refused}")
    if problems:
        raise UnsupportedError(f"no exact split of {counted(len(problems), 'fused module')}", details=problems)
    return found


_Member = tuple[Input, Entry]


def _connected(inputs: Sequence[Input]) -> list[list[_Member]]:
    """Entries that share a site, directly or through others."""
    home: dict[Site, list[_Member]] = {}
    for given in inputs:
        for entry in given.adapter.entries:
            touched = {id(home[site]): home[site] for site in entry.sites if site in home}
            first, *others = touched.values() or [[]]
            for other in others:
                first.extend(other)
                home.update({site: first for _, moved in other for site in moved.sites})
            first.append((given, entry))
            home.update(dict.fromkeys(entry.sites, first))
    return list({id(members): members for members in home.values()}.values())


def _as_one(members: Sequence[_Member]) -> Group:
    first = members[0][1]
    terms = tuple(Term(given.position, given.weight, entry.module) for given, entry in members)
    return Group(first.sites, terms, first.rows, first.swapped, first.form, first.name)


def _finest(members: Sequence[_Member]) -> list[Group]:
    """A group a site, every fused module split."""
    terms: dict[Site, list[Term]] = {}
    for given, entry in members:
        for site, module in _parts(entry):
            terms.setdefault(site, []).append(Term(given.position, given.weight, module))
    single = {entry.sites[0]: entry for _, entry in reversed(members) if len(entry.sites) == 1}
    found = []
    for site, modules in terms.items():
        own = single.get(site)
        found.append(Group((site,), tuple(modules), form=own.form if own else None, name=own.name if own else ""))
    return found


def _parts(entry: Entry) -> list[tuple[Site, Module]]:
    """The parts of an entry; what has no exact split in its own kind has one as LoRA, or dense."""
    try:
        return list(entry.parts())
    except NotExact:
        plain: Module
        if low_rank(entry.module):
            plain = plain_lora(entry.module)
        elif isinstance(entry.module, Dense) and "bias_values" in entry.module.factors:
            plain = plain_dense(entry.module)
        else:
            raise
        return list(replace(entry, module=plain).parts())
