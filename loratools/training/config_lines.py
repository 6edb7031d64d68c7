"""The lines in which the keys of a TOML file stand, which tomllib does not tell.

Each statement (a header, or a key with its value) is parsed alone, so that quoted keys, dotted keys and values over several
lines are read by tomllib itself. Invariant: what is told is right; where a value is too long to follow, nothing more is told.
"""

from __future__ import annotations

import tomllib
from collections.abc import Iterator
from typing import Any

Place = tuple[str | int, ...]  # a key as its path of names; entries of lists by number, from 0

_LONGEST = 200  # lines of one value that are followed


def holds(table: object, part: str | int) -> bool:
    """Whether a table has that key, or a list that entry."""
    if isinstance(table, list):
        return isinstance(part, int) and part < len(table)
    return isinstance(table, dict) and part in table


def lines_of(text: str) -> dict[Place, int]:
    """Place → line, from 1, of every header and key of a valid TOML text with \\n line ends."""
    lines: dict[Place, int] = {}
    entries: dict[Place, int] = {}  # list of tables → how many there are so far
    table: Place = ()
    for line, is_header, parsed in _statements(text.split("\n")):
        if is_header:
            table = _opened(parsed, entries)
            lines.setdefault(table, line)
        else:
            for place in _places(parsed, table):
                lines.setdefault(place, line)
    return lines


def _statements(rows: list[str]) -> Iterator[tuple[int, bool, dict[str, Any]]]:
    """(line it starts in, whether it is a header, itself parsed) of each statement."""
    start = 0
    while start < len(rows):
        for end in range(start + 1, min(start + _LONGEST, len(rows)) + 1):
            try:
                parsed = tomllib.loads("\n".join(rows[start:end]))
            except tomllib.TOMLDecodeError:
                continue  # goes on in the next line
            yield start + 1, rows[start].lstrip().startswith("["), parsed
            start = end
            break
        else:
            return


def _opened(header: dict[str, Any], entries: dict[Place, int]) -> Place:
    """The table a header opens; [[x]] is the next entry of x, and [x.y] after it is in its last one."""
    place: Place = ()
    inside: Any = header
    while isinstance(inside, dict) and inside:
        ((name, inside),) = inside.items()
        place = (*place, name)
        if isinstance(inside, list):
            entries[place] = entries.get(place, 0) + 1
        if place in entries:
            place = (*place, entries[place] - 1)
    return place


def _places(value: Any, where: Place) -> Iterator[Place]:
    """Every key below a value."""
    entries = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, entry in entries:
        yield (*where, key)
        yield from _places(entry, (*where, key))
