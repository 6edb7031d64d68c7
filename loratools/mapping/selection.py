"""Which sites take part in a merge, and how strongly.

    W' = W + Σ_a weight_a · f_a(site) · ΔW_a(site)     f_a(site) = Selection.factor(site, architecture, a); None: left out

f_a is what the first of these says: the last glob of `sites` that matches, `components`, kohya's list, `default`. An adapter with
a table of its own follows that table alone.

A kohya list has one number a block of the UNet, by ldm's numbering: INn = input_blocks.n, MID = middle_block, OUTn =
output_blocks.n; BASE is what is in none of them. The four lists are BLOCKID12 … BLOCKID26 of sd-webui-lora-block-weight and LAYER12 …
LAYER26 of sd-scripts' svd_merge_lora.py. A block without a number gets 0 as in the former (the latter leaves it at 1).

Invariant: every factor is finite, and nothing a user wrote is without effect unsaid: `problems` names each glob, component and
table that meets no site.
"""

from __future__ import annotations

import difflib
import re
import sys
import tomllib
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from loratools.adapters.adapter import Site
from loratools.errors import InputError, LoraToolsError, UsageError, counted
from loratools.mapping.architectures import Architecture
from loratools.tensors.header import open_bytes, printable

BASE = "BASE"
_DENOISER = "denoiser"
_BLOCKS = {"input_blocks": "IN{:02d}", "middle_block": "MID", "output_blocks": "OUT{:02d}"}  # ldm's name → kohya's
_LARGEST = 1 << 20  # bytes; a file of block weights has a few hundred
_EXAMPLE = "--block-weights takes a TOML file; one with the line `default = 0.5` halves every weight"
_LIST_SITES = "loratools inspect ADAPTER --modules lists the sites"


@dataclass(frozen=True)
class KohyaList:
    """The blocks one length of list has numbers for, in order, and the architectures it is for."""

    architectures: tuple[str, ...]
    blocks: tuple[str, ...]


def _list(architectures: str, blocks: str) -> KohyaList:
    return KohyaList(tuple(architectures.split()), tuple(blocks.split()))


# 12 and 17: the blocks with attention, which is where a LoRA without convolutions is; 20 and 26: all blocks
KOHYA_LISTS: Mapping[int, KohyaList] = {
    12: _list("sdxl", "BASE IN04 IN05 IN07 IN08 MID OUT00 OUT01 OUT02 OUT03 OUT04 OUT05"),
    17: _list("sd1 sd2", "BASE IN01 IN02 IN04 IN05 IN07 IN08 MID OUT03 OUT04 OUT05 OUT06 OUT07 OUT08 OUT09 OUT10 OUT11"),
    20: _list(
        "sdxl",
        "BASE IN00 IN01 IN02 IN03 IN04 IN05 IN06 IN07 IN08 MID OUT00 OUT01 OUT02 OUT03 OUT04 OUT05 OUT06 OUT07 OUT08",
    ),
    26: _list(
        "sd1 sd2",
        "BASE IN00 IN01 IN02 IN03 IN04 IN05 IN06 IN07 IN08 IN09 IN10 IN11 MID "
        "OUT00 OUT01 OUT02 OUT03 OUT04 OUT05 OUT06 OUT07 OUT08 OUT09 OUT10 OUT11",
    ),
}


def block_of(site: Site, architecture: Architecture) -> str:
    """Kohya's name of the block a UNet's site is in (IN04, MID, OUT11); BASE for a text encoder and for what is in no block."""
    if site.component != _DENOISER:
        return BASE
    for match in architecture.component(site.component).table.by_site("orig", site.path)[:1]:
        head, _, rest = match.name.partition(".")
        if head in _BLOCKS:
            return _BLOCKS[head].format(int(rest.partition(".")[0]))
    return BASE


def matches(glob: str, site: Site) -> bool:
    """Does a glob (case-sensitive; `*` runs over dots) fit "component.path", or the path alone?"""
    return fnmatchcase(str(site), glob) or fnmatchcase(site.path, glob)


# ------------------------------------------------------------------------------------------------------------------- the weights


@dataclass(frozen=True)
class Rules:
    """What a file of block weights, or its table for one adapter, says.

    default: of a site nothing else names; kohya: a list as in KOHYA_LISTS, or empty; components: component → factor;
    sites: glob → factor, the last that matches counts.
    """

    default: float = 1.0
    kohya: tuple[float, ...] = ()
    components: Mapping[str, float] = field(default_factory=dict)
    sites: Mapping[str, float] = field(default_factory=dict)

    def factor(self, site: Site, architecture: Architecture) -> float:
        """The factor at a site. Raises UsageError where the kohya list is not one of the architecture's."""
        named = self._named(site)
        if named is not None or not self.kohya:
            return self.default if named is None else named
        return self._numbers(architecture).get(block_of(site, architecture), 0.0)

    def silent(self, site: Site, architecture: Architecture) -> bool:
        """Is a site's factor 0 only because the kohya list has no number for its block? Raises UsageError as `factor` does."""
        return bool(self.kohya) and self._named(site) is None and block_of(site, architecture) not in self._numbers(architecture)

    def _named(self, site: Site) -> float | None:
        """What `sites` and `components` say about a site."""
        matching = [factor for glob, factor in self.sites.items() if matches(glob, site)]
        return matching[-1] if matching else self.components.get(site.component)

    def _numbers(self, architecture: Architecture) -> dict[str, float]:
        """block → number of the kohya list. Raises UsageError."""
        own = {length: known.blocks for length, known in KOHYA_LISTS.items() if architecture.name in known.architectures}
        if len(self.kohya) in own:
            return dict(zip(own[len(self.kohya)], self.kohya, strict=True))
        lengths = f"its lists have {' or '.join(map(str, own))}" if own else "it has no such lists"
        raise UsageError(
            f"kohya: a list of {counted(len(self.kohya), 'number')} does not belong to {architecture.name}: {lengths}",
            fix="[components] and [sites] weigh the sites of any architecture",
        )

    def problems(self, where: str, sites: Collection[Site], architecture: Architecture) -> Iterator[LoraToolsError]:
        """What does not fit these sites. where: what the messages begin with."""
        try:
            if self.kohya:
                self._numbers(architecture)
        except UsageError as error:
            yield UsageError(where + error.message, fix=error.fix)
        yield from _strange_components(f"{where}components", self.components, sites)
        yield from _idle_globs(f"{where}sites", self.sites, sites)


@dataclass(frozen=True)
class BlockWeights:
    """A whole file: the rules of adapters without a table, and those of each adapter (by file name) that has one."""

    rules: Rules
    adapters: Mapping[str, Rules] = field(default_factory=dict)
    path: Path | None = None

    def of(self, adapter: str) -> Rules:
        """The rules of the adapter of this file name."""
        return self.adapters.get(adapter, self.rules)

    def problems(self, sites: Mapping[str, Collection[Site]], architecture: Architecture) -> Iterator[LoraToolsError]:
        """What in the file does not fit the adapters (file name → sites)."""
        where = f"{self.path}: " if self.path else ""
        for name in self.adapters:
            if name not in sites:
                message = f"{where}adapters.{_quoted(name)}: no adapter has this file name" + _near(name, sites)
                yield UsageError(message, fix=f"the adapters are {', '.join(map(repr, sites))}")
            else:
                yield from self.adapters[name].problems(f"{where}adapters.{_quoted(name)}.", sites[name], architecture)
        others = [site for name, group in sites.items() if name not in self.adapters for site in group]
        unused = [key for key in ("kohya", "components", "sites") if getattr(self.rules, key)]
        if others:
            yield from self.rules.problems(where, others, architecture)
        elif sites and unused:
            yield UsageError(f"{where}{', '.join(unused)}: unused, because every adapter has a table of its own under [adapters]")


@dataclass(frozen=True)
class Selection:
    """Which sites take part, and the factor each adapter's weight gets there.

    components: names as in Site.component, empty for all; include, exclude: globs as in `matches`, no `include` for all; a site
    takes part where its component and a glob of `include` say so and none of `exclude` does.
    """

    components: tuple[str, ...] = ()
    include: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()
    blocks: BlockWeights | None = None

    def selects(self, site: Site) -> bool:
        """Does a site take part at all?"""
        wanted = not self.components or site.component in self.components
        wanted = wanted and (not self.include or any(matches(glob, site) for glob in self.include))
        return wanted and not any(matches(glob, site) for glob in self.exclude)

    def factor(self, site: Site, architecture: Architecture, adapter: str) -> float | None:
        """Factor of the adapter's weight at a site, None where the site is not selected. adapter: its file name.

        Raises UsageError where a kohya list is not one of the architecture's.
        """
        if not self.selects(site):
            return None
        return 1.0 if self.blocks is None else self.blocks.of(adapter).factor(site, architecture)

    def silent(self, sites: Mapping[str, Collection[Site]], architecture: Architecture) -> dict[str, list[Site]]:
        """Adapter → its selected sites that get 0 because a kohya list has no number for their block; adapters without any left out.

        Raises UsageError as `factor` does.
        """
        if self.blocks is None:
            return {}
        found = {
            name: [site for site in group if self.selects(site) and self.blocks.of(name).silent(site, architecture)]
            for name, group in sites.items()
        }
        return {name: silent for name, silent in found.items() if silent}

    def problems(self, sites: Mapping[str, Collection[Site]], architecture: Architecture) -> list[LoraToolsError]:
        """Everything that does not fit the adapters (file name → sites), each with the nearest thing that exists.

        Globs, components and tables that meet no site (whether or not the rest of the selection leaves it in); a kohya list of
        another architecture; and, where all that is right, a selection that leaves nothing to merge.
        """
        everything = [site for group in sites.values() for site in group]
        found = [
            *_strange_components("--component", self.components, everything),
            *_idle_globs("--include", self.include, everything),
            *_idle_globs("--exclude", self.exclude, everything),
            *(self.blocks.problems(sites, architecture) if self.blocks else ()),
        ]
        return found or list(self._nothing_left(sites, architecture))

    def _nothing_left(self, sites: Mapping[str, Collection[Site]], architecture: Architecture) -> Iterator[LoraToolsError]:
        factors = [self.factor(site, architecture, name) for name, group in sites.items() for site in group]
        if factors and all(factor is None for factor in factors):
            yield UsageError(f"the selection leaves none of {counted(len(factors), 'site')}", fix=f"widen it; {_LIST_SITES}")
        elif factors and not any(factors):
            where = f"{self.blocks.path}: " if self.blocks and self.blocks.path else ""
            yield UsageError(f"{where}the factor is 0 at every selected site: nothing would be merged")


# -------------------------------------------------------------------------------------------------------------- what is not there


def _strange_components(where: str, names: Iterable[str], sites: Collection[Site]) -> Iterator[LoraToolsError]:
    """One error for each name that is no component of any site."""
    present = list(dict.fromkeys(site.component for site in sites))
    for name in names:
        if name not in present:
            message = f"{where}: no component {name!r}" + _near(name, present)
            yield UsageError(message, fix=f"the components are {', '.join(present)}" if present else None)


def _idle_globs(where: str, globs: Iterable[str], sites: Collection[Site]) -> Iterator[LoraToolsError]:
    """One error for each glob that matches no site."""
    for glob in globs:
        if not any(matches(glob, site) for site in sites):
            near = _near_glob(glob, sites)
            yield UsageError(f"{where}: {glob!r} matches no site" + (f"; did you mean {near!r}?" if near else ""), fix=_LIST_SITES)


def _near(name: str, names: Iterable[str]) -> str:
    near = difflib.get_close_matches(name, list(names), 1)
    return f"; did you mean {near[0]!r}?" if near else ""


def _near_glob(glob: str, sites: Collection[Site]) -> str | None:
    """A glob that does match, nearest to one that does not.

    The glob without its outer stars has n parts between dots; the nearest runs of n parts of the sites' names take its place.
    """
    core = glob.strip("*.")
    length = core.count(".") + 1
    names = [str(site).split(".") for site in sites]
    runs = {".".join(parts[start : start + length]) for parts in names for start in range(len(parts) - length + 1)}
    for near in difflib.get_close_matches(core, sorted(runs), 5):
        for attempt in (glob.replace(core, near), f"{near}.*", f"*.{near}", f"*.{near}.*"):
            if any(matches(attempt, site) for site in sites):
                return attempt
    return None


# --------------------------------------------------------------------------------------------------------------------- the file


def read_block_weights(path: Path) -> BlockWeights:
    """The block weights in a TOML file (UTF-8, with a byte order mark or without). Raises InputError with all problems at once."""
    table = _toml(path)
    found: list[str] = []
    own = table.pop("adapters", {})
    rules = _rules("", table, found)
    adapters = {}
    for name, entries in own.items() if isinstance(own, dict) else ():
        if isinstance(entries, dict):
            adapters[name] = _rules(f"adapters.{_quoted(name)}.", entries, found)
        else:
            found.append(f"adapters.{_quoted(name)}: expected a table with the keys {', '.join(_READ)}, found {_shown(entries)}")
    if not isinstance(own, dict):
        found.append(f'adapters: expected tables such as [adapters."style.safetensors"], found {_shown(own)}')
    if found:
        raise InputError(f"{path}: {counted(len(found), 'problem')} in the block weights", details=found, fix="correct the entries listed")
    return BlockWeights(rules, adapters, path)


def _toml(path: Path) -> dict[str, Any]:
    data = _bytes(path)
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise InputError(f"{path}: not TOML: line {line} is not UTF-8", fix="save the file as UTF-8") from error
    try:
        return tomllib.loads(text)
    except (ValueError, RecursionError) as error:  # not TOML, a number of 5000 digits, brackets without end
        place = re.search(r"\(at line (\d+)", str(error))
        told = [f"line {place[1]}: {printable(text.split(chr(10))[int(place[1]) - 1].strip())[:100]}"] if place else []
        fix = 'names with dots or stars need quotes: "denoiser.mid_block.*" = 0.5'
        raise InputError(f"{path}: not TOML: {error}", details=told, fix=fix) from error


def _bytes(path: Path) -> bytes:
    try:
        file, size = open_bytes(path)
    except InputError as error:
        near = difflib.get_close_matches(path.name, sorted({entry.name for entry in path.parent.glob("*.toml")} - {path.name}), 1)
        error.fix = f"did you mean {path.with_name(near[0])}?" if near else _EXAMPLE
        raise
    if size > _LARGEST:
        raise InputError(f"{path}: {size} bytes are no block weights; at most {_LARGEST} are read", fix=_EXAMPLE)
    return file.read(0, size)


def _rules(where: str, table: Mapping[str, object], found: list[str]) -> Rules:
    """One table as rules; what is wrong with it is appended to `found`. where: "" for the file's own, else the adapter's."""
    values: dict[str, Any] = {}
    for key, value in table.items():
        if key in _READ:
            values[key] = _READ[key](where + key, value, found)
        else:
            found.append(f"{where}{_quoted(key)}: unknown key{_hint(key, value, where)}")
    rules = Rules(**values)
    if rules.kohya and _DENOISER in rules.components:
        found.append(f"{where}components.{_DENOISER}: kohya has the denoiser's numbers already; remove one of the two")
    return rules


def _hint(key: str, value: object, where: str) -> str:
    """What may have been meant by a key that is not known."""
    keys = (*_READ,) if where else (*_READ, "adapters")
    quotes = "; a file name with dots needs quotes" if where and isinstance(value, dict) else ""
    return _near(key, keys) or f"; the keys are {', '.join(keys)}{quotes}"


def _number(where: str, value: object, found: list[str]) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float):
        found.append(f"{where}: expected a number, found {_shown(value)}")
    elif not abs(value) <= sys.float_info.max:  # NaN, infinities, integers no float can hold
        found.append(f"{where}: expected a finite number, found {_shown(value)}")
    else:
        return float(value)
    return 0.0


def _numbers(where: str, value: object, found: list[str]) -> dict[str, float]:
    if isinstance(value, dict):
        return {name: _number(f"{where}.{_quoted(name)}", number, found) for name, number in value.items()}
    found.append(f"{where}: expected a table of numbers, found {_shown(value)}")
    return {}


def _kohya(where: str, value: object, found: list[str]) -> tuple[float, ...]:
    """A list of numbers, or the same as text ("1,0,0.5", with or without the brackets of --lbws)."""
    entries = [_parsed(part) for part in value.strip().removeprefix("[").removesuffix("]").split(",")] if isinstance(value, str) else value
    if not isinstance(entries, list):
        found.append(f"{where}: expected a list of numbers, found {_shown(value)}")
    elif len(entries) not in KOHYA_LISTS:
        kinds = ", ".join(f"{length} ({', '.join(known.architectures)})" for length, known in KOHYA_LISTS.items())
        found.append(f"{where}: {counted(len(entries), 'number')}, but the lists have {kinds}")
    else:
        blocks = KOHYA_LISTS[len(entries)].blocks
        return tuple(_number(f"{where} ({block})", entry, found) for block, entry in zip(blocks, entries, strict=True))
    return ()


def _parsed(text: str) -> float | str:
    try:
        return float(text)
    except ValueError:
        return text.strip()


def _quoted(name: str) -> str:
    """A key as it would be written in TOML."""
    return name if name.isidentifier() and name.isascii() else f'"{printable(name)}"'


def _shown(value: object) -> str:
    """What stands there instead, for a message."""
    words: dict[type, str] = {dict: "a table (a name with dots needs quotes)", list: "a list"}
    return words.get(type(value)) or f"{value!r:.60}"


# key of a table → how its value is read
_READ: Mapping[str, Callable[[str, object, list[str]], Any]] = {
    "default": _number,
    "kohya": _kohya,
    "components": _numbers,
    "sites": _numbers,
}
