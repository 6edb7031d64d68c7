"""The grammar of the name tables: how a module of one namespace is made of sites, with the inverse derived.

A `Row` says that one module name is made of one or more sites:

    site    a rename                                 img_in = x_embedder
    cat     output rows joined in this order         img_attn.qkv = cat(to_q, to_k, to_v)
    swap2   the two halves of output rows exchanged  final_layer.adaLN_modulation.1 = swap2(norm_out.linear)
    transposed  stored (in, out)                      text_projection = transposed(text_projection)

A `Table` holds the rows of one model (a denoiser or a text encoder) for each namespace and looks names up both ways. Names are
templates: `{d}` stands for any block index. Lookup replaces each run of digits by `#` and finds the template in a dict, dotted
and flattened alike, so nothing is ever guessed from underscores. Dimensions are symbols ("h", "3h+mlp") solved from a file's
shapes, so a tiny model of the same structure works like the full one. A name two rows claim fails when the table is loaded.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache, cached_property

DIFF = "diff"  # the namespace of the sites themselves: diffusers' (transformers') module names
_DIGITS = re.compile(r"\d+")
_SLOT = re.compile(r"\{(\w+)\}|(\d+)")


@dataclass(frozen=True)
class Row:
    """One module name of a namespace and the sites it is made of.

    name, sites: templates with `{x}` for block indices; out: output rows of each site, as expressions over the table's symbols
    ("" where unknown); in_: input width; layer: linear | conv | norm | embedding | parameter; kernel: of a conv.
    """

    name: str
    sites: tuple[str, ...]
    out: tuple[str, ...] = ("",)
    in_: str = ""
    layer: str = "linear"
    kernel: tuple[int, ...] = ()
    swapped: bool = False
    transposed: bool = False  # the weight is stored (in, out)

    @property
    def total_out(self) -> str:
        return "+".join(self.out) if all(self.out) else ""


def _expand(paths: str) -> tuple[str, ...]:
    """ "a.b.to_q .to_k" → a.b.to_q, a.b.to_k: a part with a leading dot takes the first part's parent."""
    first, *rest = paths.split()
    parent = first.rpartition(".")[0]
    return (first, *(parent + part if part.startswith(".") else part for part in rest))


def site(name: str, path: str, out: str = "", in_: str = "") -> Row:
    """A Linear under another name."""
    return Row(name, (path,), (out,), in_)


def cat(name: str, paths: str, out: str, in_: str = "") -> Row:
    """A Linear whose output rows are those of `paths` in order; `out` has one expression a part, separated by spaces."""
    row = Row(name, _expand(paths), tuple(out.split()), in_)
    if len(row.sites) != len(row.out):
        raise ValueError(f"{name}: {len(row.sites)} parts but {len(row.out)} widths")
    return row


def swap2(name: str, path: str, out: str = "", in_: str = "") -> Row:
    """A Linear whose two halves of output rows (shift and scale) are exchanged against the site's."""
    return Row(name, (path,), (out,), in_, swapped=True)


def transposed(name: str, path: str, out: str = "", in_: str = "") -> Row:
    """A Linear whose weight is stored (in, out), the transpose of the site's; out and in_ are the stored matrix's."""
    return Row(name, (path,), (out,), in_, transposed=True)


def conv(name: str, path: str, out: str = "", in_: str = "", kernel: tuple[int, ...] = (3, 3)) -> Row:
    """A convolution under another name."""
    return Row(name, (path,), (out,), in_, "conv", kernel)


def norm(name: str, path: str, out: str = "") -> Row:
    """A normalisation layer: 1-D weight (and bias)."""
    return Row(name, (path,), (out,), "", "norm")


def embedding(name: str, path: str, out: str = "", in_: str = "") -> Row:
    """An embedding table [num, dim]: out = num, in_ = dim."""
    return Row(name, (path,), (out,), in_, "embedding")


def parameter(name: str, path: str) -> Row:
    """A bare parameter (no `.weight`): a modulation table, a class token."""
    return Row(name, (path,), ("",), "", "parameter")


def flat(name: str) -> str:
    """The flattened spelling of a dotted name."""
    return name.replace(".", "_")


def normal(name: str) -> str:
    """A name with each run of digits replaced by `#`, the key of every lookup."""
    return _DIGITS.sub("#", name)


@dataclass(frozen=True)
class _Template:
    """A compiled template: its normal form, and for each run of digits either the literal or the slot it fills."""

    normal: str
    slots: tuple[str | int, ...]

    @staticmethod
    @cache
    def of(template: str) -> _Template:
        slots = tuple(slot or int(digits) for slot, digits in _SLOT.findall(template))
        return _Template(_SLOT.sub("#", template), slots)

    def match(self, numbers: Sequence[int]) -> dict[str, int] | None:
        """The indices that make the template equal the name, or None."""
        bound: dict[str, int] = {}
        for slot, number in zip(self.slots, numbers, strict=True):
            if isinstance(slot, int):
                if slot != number:
                    return None
            elif bound.setdefault(slot, number) != number:
                return None
        return bound


@dataclass(frozen=True)
class Match:
    """A name found in a table: the row, its block indices, and for a lookup by site which part of the row it is."""

    row: Row
    index: Mapping[str, int]
    part: int = 0

    @property
    def name(self) -> str:
        return self.row.name.format_map(self.index)

    @property
    def sites(self) -> tuple[str, ...]:
        return tuple(path.format_map(self.index) for path in self.row.sites)


class Candidates:
    """The templates of one normal form, by which of their numbers are literal and what those are: a lookup tries no template twice."""

    def __init__(self) -> None:
        self._by_literals: dict[tuple[int, ...], dict[tuple[int, ...], list[tuple[_Template, Row, int]]]] = {}

    def add(self, template: _Template, row: Row, part: int) -> None:
        positions = tuple(position for position, slot in enumerate(template.slots) if isinstance(slot, int))
        literals = tuple(slot for slot in template.slots if isinstance(slot, int))
        self._by_literals.setdefault(positions, {}).setdefault(literals, []).append((template, row, part))

    def matches(self, numbers: Sequence[int]) -> list[Match]:
        """The rows whose templates carry these numbers, with their indices bound."""
        found = []
        for positions, by_value in self._by_literals.items():
            for template, row, part in by_value.get(tuple(numbers[position] for position in positions), ()):
                index = template.match(numbers)
                if index is not None:
                    found.append(Match(row, index, part))
        return found


class _Index:
    """Templates by normal form."""

    def __init__(self) -> None:
        self._found: dict[str, Candidates] = {}

    def add(self, template: str, row: Row, part: int = 0, flattened: bool = False) -> None:
        compiled = _Template.of(template)
        key = flat(compiled.normal) if flattened else compiled.normal
        self._found.setdefault(key, Candidates()).add(compiled, row, part)

    def candidates(self, normal_form: str) -> Candidates | None:
        """The templates of this normal form, whatever their indices; None for most names."""
        return self._found.get(normal_form)

    def lookup(self, name: str) -> list[Match]:
        candidates = self.candidates(normal(name))
        return candidates.matches(numbers_in(name)) if candidates else []


def numbers_in(name: str) -> list[int]:
    """The digit runs of a name as numbers, left to right."""
    return [int(digits[:9]) if len(digits) < 10 else -1 for digits in _DIGITS.findall(name)]  # no model has a billion blocks


@dataclass(frozen=True)
class Table:
    """The names of one model.

    rows: the original namespace ("orig"); every site occurs in exactly one of them per shape
    ranges: how many blocks each index counts in the published models (evidence, never a limit); one number or, where the
    published sizes differ, the largest
    spellings: further namespaces ("omi", "xlabs", "processor", …)
    """

    name: str
    rows: tuple[Row, ...]
    ranges: Mapping[str, int] = field(default_factory=dict)
    spellings: Mapping[str, tuple[Row, ...]] = field(default_factory=dict)

    @cached_property
    def namespaces(self) -> dict[str, tuple[Row, ...]]:
        return {DIFF: tuple(identity(self.rows)), "orig": self.rows, **self.spellings}

    @cached_property
    def _indexes(self) -> dict[tuple[str, str], _Index]:
        """What `_index` has built so far."""
        return {}

    def _index(self, namespace: str, key: str) -> _Index:
        """Rows of a namespace by "name", "flat" name or "site", built when first asked for."""
        index = self._indexes.get((namespace, key))
        if index is None:
            index = self._indexes[namespace, key] = _Index()
            for row in self.namespaces.get(namespace, ()):
                if key == "site":
                    for part, path in enumerate(row.sites):
                        index.add(path, row, part)
                else:
                    index.add(row.name, row, flattened=key == "flat")
        return index

    def by_name(self, namespace: str, name: str, *, flattened: bool = False) -> list[Match]:
        """Rows that spell this module name; several only where shapes tell them apart (SD3's last block)."""
        return self._index(namespace, "flat" if flattened else "name").lookup(name)

    def candidates(self, namespace: str, normal_form: str, *, flattened: bool = False) -> Candidates | None:
        """What `by_name` would look through for a name of this normal form, for callers that look up many."""
        return self._index(namespace, "flat" if flattened else "name").candidates(normal_form)

    def by_site(self, namespace: str, path: str) -> list[Match]:
        """Rows of a namespace that hold this site."""
        return self._index(namespace, "site").lookup(path)

    def names(self, namespace: str) -> Iterator[tuple[str, Row]]:
        """Every module name of a namespace, indices run through `ranges`."""
        for row in self.namespaces.get(namespace, ()):
            for index in self.indices(row):
                yield row.name.format_map(index), row

    def indices(self, row: Row) -> Iterator[dict[str, int]]:
        """All index assignments of one row within `ranges`."""
        slots = list(dict.fromkeys(slot for slot, _ in _SLOT.findall(row.name) if slot))

        def run(position: int, bound: dict[str, int]) -> Iterator[dict[str, int]]:
            if position == len(slots):
                yield dict(bound)
                return
            for value in range(self.ranges[slots[position]]):
                yield from run(position + 1, {**bound, slots[position]: value})

        yield from run(0, {})

    def check(self) -> list[str]:
        """Defects of the table: names or flattened names two rows claim with the same shapes, sites named twice or never."""
        defects: list[str] = []
        for namespace in self.namespaces:
            for flattened in (False, True):
                seen: dict[str, Row] = {}
                for name, row in self.names(namespace):
                    key = flat(name) if flattened else name
                    other = seen.setdefault(key, row)
                    if other is not row and (other.out, other.in_) == (row.out, row.in_):
                        defects.append(f"{self.name}/{namespace}: {key} is claimed by two rows")
            owners: dict[tuple[str, tuple[str, ...]], str] = {}
            for row in self.namespaces[namespace]:
                for path in row.sites:
                    if owners.setdefault((path, row.out), row.name) != row.name:
                        defects.append(f"{self.name}/{namespace}: {path} has two names")
        return defects


def identity(rows: Iterable[Row]) -> Iterator[Row]:
    """The sites under their own names: what "diff" is."""
    seen: set[tuple[str, str]] = set()
    for row in rows:
        for path, out in zip(row.sites, row.out, strict=True):
            if (path, out) not in seen:
                seen.add((path, out))
                yield Row(path, (path,), (out,), row.in_, row.layer, row.kernel)


def indexed(rows: Iterable[Row], renames: Mapping[str, str] | None = None) -> tuple[Row, ...]:
    """OneTrainer's OMI names: original names, the parts of a fused module numbered `qkv.0`, `qkv.1`, …"""
    found = []
    for row in rows:
        name = (renames or {}).get(row.name, row.name)
        if len(row.sites) == 1:
            found.append(Row(name, row.sites, row.out, row.in_, row.layer, row.kernel, row.swapped))
        else:
            for part, (path, out) in enumerate(zip(row.sites, row.out, strict=True)):
                found.append(Row(f"{name}.{part}", (path,), (out,), row.in_, row.layer, row.kernel))
    return tuple(found)


def renamed(rows: Iterable[Row], pattern: str, replacement: str) -> tuple[Row, ...]:
    """Rows named after their only site with a regular expression applied to its template; sites it does not match are left out.

    Attention processors: `….attn1.to_q` is spelled `….attn1.processor.to_q_lora`.
    """
    compiled = re.compile(pattern)
    found = []
    for row in identity(rows):
        name, count = compiled.subn(replacement, row.name)
        if count:
            found.append(Row(name, row.sites, row.out, row.in_, row.layer, row.kernel))
    return tuple(found)
