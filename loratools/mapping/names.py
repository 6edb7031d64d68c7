"""Every name every table knows, looked up in one step: stem → who calls a module so.

The index runs over prefixes: a stem is cut at each prefix that some dialect writes, and the rest is looked up in the tables
behind that prefix. Results are remembered by the rest's normal form, so a file of a thousand modules costs a few dozen lookups.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from loratools.adapters.adapter import Form
from loratools.mapping.architectures import Architecture, Component
from loratools.mapping.dialects import DIALECTS, Dialect
from loratools.mapping.leaves import FLAT_PREFIXES
from loratools.mapping.rules import Candidates, Match, Row, flat, normal, numbers_in


@dataclass(frozen=True)
class Slot:
    """One way some dialect may spell one component's modules behind a prefix."""

    architecture: Architecture
    component: Component
    dialect: Dialect
    order: int  # position of the spelling in its dialect, then of the prefix in the component: lower is more usual
    form: Form
    schemes: tuple[str, ...]

    @property
    def flattened(self) -> bool:
        return self.form.spelling != "dotted"


@dataclass(frozen=True)
class Hit:
    """A stem understood: the slot and the table's row(s) for it (several only where shapes tell them apart)."""

    slot: Slot
    matches: tuple[Match, ...]


def _candidates(slot: Slot, form: str) -> Candidates | None:
    """The slot's templates for a normal form as the file spells it."""
    if slot.architecture.open_names:
        return None
    if slot.form.spelling == "flat_":
        if not form.endswith("_"):
            return None
        form = form[:-1]
    return slot.component.table.candidates(slot.form.namespace, form, flattened=slot.flattened)


class NameIndex:
    """All slots of some architectures by prefix."""

    def __init__(self, architectures: Iterable[Architecture]) -> None:
        self._slots: dict[str, list[Slot]] = {}
        self._known: dict[tuple[str, str], list[tuple[Slot, Candidates | None]]] = {}
        for architecture in architectures:
            for dialect in DIALECTS.values():
                if dialect.serves(architecture):
                    self._add(architecture, dialect)
        self.lengths = sorted({len(prefix) for prefix in self._slots}, reverse=True)

    def _add(self, architecture: Architecture, dialect: Dialect) -> None:
        for order, spelling in enumerate(dialect.spellings):
            for component in architecture.components:
                if not spelling.applies(component):
                    continue
                for namespace in spelling.namespaces_for(architecture, component):
                    for rank, prefix in enumerate(spelling.prefixes_for(component)):
                        form = Form(prefix, spelling.spelling, namespace, spelling.schemes[0])
                        slot = Slot(architecture, component, dialect, order * 8 + rank, form, spelling.schemes)
                        self._slots.setdefault(prefix, []).append(slot)

    def hits(self, stem: str, scheme: str | None) -> list[Hit]:
        """Everything the tables have to say about a stem whose LoRA leaves are spelled in `scheme`."""
        found = []
        is_flat = stem.startswith(FLAT_PREFIXES)
        for length in self.lengths:
            prefix, rest = stem[:length], stem[length:]
            if not rest or prefix not in self._slots:
                continue
            numbers = numbers_in(rest)
            for slot, candidates in self._behind(prefix, normal(rest)):
                if slot.flattened != is_flat or (scheme is not None and scheme not in slot.schemes):
                    continue
                matches = [open_match(rest)] if slot.architecture.open_names else candidates.matches(numbers) if candidates else []
                if matches:
                    found.append(Hit(slot, tuple(matches)))
        return found

    def _behind(self, prefix: str, form: str) -> list[tuple[Slot, Candidates | None]]:
        """The slots of a prefix with their templates of this normal form; slots without any are left out."""
        key = (prefix, form)
        if key not in self._known:
            behind = [(slot, _candidates(slot, form)) for slot in self._slots[prefix]]
            self._known[key] = [(slot, candidates) for slot, candidates in behind if candidates or slot.architecture.open_names]
        return self._known[key]

    def near(self, stem: str, architecture: str | None) -> str | None:
        """The known spelling nearest to a stem, for the message about an unknown key."""
        import difflib

        best: tuple[float, str] | None = None
        for length in self.lengths:
            prefix = stem[:length]
            for slot in self._slots.get(prefix, ()):
                if architecture not in (None, slot.architecture.name) or slot.architecture.open_names:
                    continue
                dotted = {row.name.format_map(_Any()) for row in slot.component.table.namespaces[slot.form.namespace]}
                names = {flat(name) for name in dotted} if slot.flattened else dotted
                for name in difflib.get_close_matches(stem[length:], names, 1, 0.6):
                    ratio = difflib.SequenceMatcher(None, name, stem[length:]).ratio()
                    if best is None or ratio > best[0]:
                        best = (ratio, prefix + name)
        return best[1] if best else None


class _Any(dict[str, str]):
    """Fills every index of a template with N, for showing a name's shape."""

    def __missing__(self, key: str) -> str:
        return "0"


def open_match(name: str) -> Match:
    """An LLM's module is its own site."""
    return Match(Row(name.replace("{", "{{"), (name.replace("{", "{{"),)), {})
