"""What is wrong with a configuration, in the words of its file: one line a key, with the nearest name.

    [train] stpes: unknown key, did you mean 'steps'?
    [adapter] rank: expected at least 1, found 0

pydantic finds what is wrong with keys, `config_rules` what is wrong between them; both are put together here, so that a user
corrects a file once. Invariant: a rule speaks only when all of its keys are good for themselves.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, get_args

from loratools.tensors.header import printable
from loratools.training.config import Config, Settings
from loratools.training.config_dump import toml_value
from loratools.training.config_lines import Place, holds
from loratools.training.config_rules import broken, values_of

if TYPE_CHECKING:
    from pydantic_core import ErrorDetails

# pydantic's kind of error → what was expected
_EXPECTED = {
    "int_type": "a whole number",
    "float_type": "a number",
    "finite_number": "a finite number",
    "bool_type": "true or false",
    "string_type": "text",
    "string_too_short": "text that is not empty",
    "tuple_type": "a list",
    "dict_type": "a table",
    "model_type": "a table",
    "literal_error": "{expected}",
    "expected": "{words}",
    "greater_than": "more than {gt:.10g}",
    "greater_than_equal": "at least {ge:.10g}",
    "less_than": "less than {lt:.10g}",
    "less_than_equal": "at most {le:.10g}",
    "multiple_of": "a multiple of {multiple_of:.10g}",
    "too_short": "at least {min_length} of them",
    "too_long": "no more than {max_length} of them",
}


@dataclass(frozen=True)
class Problem:
    """What is wrong, and the keys it comes from."""

    message: str
    places: tuple[Place, ...]


def problems_of(given: dict[str, Any], errors: Iterable[ErrorDetails]) -> list[Problem]:
    """What is wrong with `given`, a whole file as nested dicts, for which pydantic found `errors`."""
    found: dict[Place, list[ErrorDetails]] = {}
    for error in errors:
        if error["loc"]:  # what has none are the rules, which are asked again below
            found.setdefault(_place(given, error), []).append(error)
    entries = {place[:depth] for place in found for depth in range(len(place))}  # a list is not told of beside its entries
    found = {place: kinds for place, kinds in found.items() if place not in entries}
    wrong = {".".join(str(part) for part in place[: _depth(place)]) for place in found}
    rules = broken(values_of(Config, given, wrong))
    told = [Problem(_said(given, place, kinds), (place,)) for place, kinds in found.items()]
    return told + [Problem(rule.message, tuple(tuple(key.split(".")) for key in rule.reads)) for rule in rules]


def shown(value: object) -> str:
    """A value that stands in a file, for a message."""
    if isinstance(value, Mapping):
        return "a table"
    if isinstance(value, list) and any(isinstance(entry, Mapping) for entry in value):
        return "a list of tables"
    text = toml_value(value)
    return printable(text if len(text) <= 60 else f"{text[:60]}…")


def _depth(place: Place) -> int:
    """How much of a place is keys: up to the first number."""
    return next((depth for depth, part in enumerate(place) if isinstance(part, int)), len(place))


def _place(given: Any, error: ErrorDetails) -> Place:
    """Where an error stands in the file: its location without the names of types that pydantic puts in between."""
    place: Place = ()
    for part in error["loc"]:
        if holds(given, part):
            given, place = given[part], (*place, part)
        elif error["type"] == "missing" and part == error["loc"][-1]:
            place = (*place, part)
    return place


def _said(given: Mapping[str, Any], place: Place, errors: Sequence[ErrorDetails]) -> str:
    """One line about one key."""
    found: Any = given
    for part in place:
        found = found[part] if holds(found, part) else None
    label = _label(place, found)
    if errors[0]["type"] == "extra_forbidden":
        return f"{label}: {_unknown(place, found)}"
    if errors[0]["type"] == "missing":
        return f"{label}: missing"
    words = list(dict.fromkeys(_expected(error) for error in errors))
    names = re.findall(r"'([^']+)'", " ".join(words))
    near = difflib.get_close_matches(found, names, 1) if isinstance(found, str) else []
    return f"{label}: expected {' or '.join(words)}, found {shown(found)}" + (f", did you mean '{near[0]}'?" if near else "")


def _expected(error: ErrorDetails) -> str:
    kind = error["type"]
    return _EXPECTED[kind].format(**error.get("ctx", {})) if kind in _EXPECTED else error["msg"]


def _label(place: Place, found: object) -> str:
    """A key as it is told: `[table] key`, `[table]`, `[table] key[n]` for an entry of a list."""
    *table, last = [printable(str(part)) for part in place]
    if len(place) == 1:
        return f"[{last}]" if last in Config.model_fields or isinstance(found, Mapping) else last
    if isinstance(place[-1], int):
        last = f"{table.pop()}[{last}]"
    return f"[{'.'.join(table)}] {last}"


def _unknown(place: Place, found: object) -> str:
    """What may have been meant by a key that no table, or another one, has."""
    tables = _tables(Config)
    name, keys = str(place[-1]), tables[".".join(part for part in place[:-1] if isinstance(part, str))]
    near = difflib.get_close_matches(name, keys, 1)
    what = "table" if isinstance(found, Mapping) else "key"
    if near:
        return f"unknown {what}, did you mean {f'[{near[0]}]' if len(place) == 1 else repr(near[0])}?"
    owners = [f"[{table}] {name}" for table, its in tables.items() if table and name in its]
    return f"unknown {what}, did you mean {' or '.join(owners)}?" if owners else f"unknown {what}; there are {', '.join(keys)}"


def _tables(model: type[Settings], where: str = "") -> dict[str, list[str]]:
    """Dotted name of a table → its keys, for a table and all in it; "" is the file itself."""
    found = {where: list(model.model_fields)}
    for name, field in model.model_fields.items():
        inner = _model_in(field.annotation)
        if inner is not None:
            found |= _tables(inner, f"{where}.{name}" if where else name)
    return found


def _model_in(annotation: object) -> type[Settings] | None:
    """The table a field holds, alone, optional or in a list."""
    if isinstance(annotation, type):
        return annotation if issubclass(annotation, Settings) else None
    return next((model for inner in get_args(annotation) if (model := _model_in(inner)) is not None), None)
