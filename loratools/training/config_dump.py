"""A training configuration as TOML text, and what changed between two of them.

`dump` writes every key, defaults included, in the order of the models; keys without a value (None) are left out, as TOML has no
word for them. Invariant: the text loads to an equal configuration, and equal configurations give equal text.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from datetime import date, time
from fnmatch import fnmatchcase
from typing import Any

from loratools.training.config import Config

# What a resumed run may change: these have no part in the weights. Everything else makes another run.
FREE = (
    "save.*",
    "validation.*",
    "log.*",
    "data.cache_folder",
    "train.nan_check_every",
)

_DECIMAL = 2**64  # integers up to here are written in decimals
_BARE = re.compile(r"[A-Za-z0-9_-]+")


@dataclass(frozen=True)
class Difference:
    """One key on which two configurations differ; None where it has no value."""

    field: str  # dotted, entries of lists by number: "data.folders.0.repeats"
    old: Any
    new: Any


def dump(config: Config) -> str:
    """The configuration as TOML, fully resolved."""
    return "\n".join(_table("", config.model_dump()))


def differences(old: Config, new: Config) -> list[Difference]:
    """Where two configurations differ in what a resumed run has to keep (all but FREE), in the order of the models.

    A table or an entry that only one of them has is reported key by key.
    """
    before, after = dict(_leaves(old.model_dump())), dict(_leaves(new.model_dump()))
    return [
        Difference(key, before.get(key), after.get(key))
        for key in {**before, **after}
        if before.get(key) != after.get(key) and not any(fnmatchcase(key, free) for free in FREE)
    ]


def toml_value(value: object) -> str:
    """One value in TOML's spelling."""
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, int) and value > _DECIMAL:
        return hex(value)  # Python writes no decimals of more than 4300 digits
    if isinstance(value, int | float):
        return repr(value)
    if isinstance(value, date | time):
        return value.isoformat()
    if isinstance(value, list | tuple):
        return f"[{', '.join(toml_value(entry) for entry in value)}]"
    if isinstance(value, Mapping):
        return f"{{{', '.join(f'{_key(key)} = {toml_value(entry)}' for key, entry in value.items())}}}"
    return json.dumps(str(value), ensure_ascii=False).replace("\x7f", "\\u007f")


def _key(name: str) -> str:
    return name if _BARE.fullmatch(name) else toml_value(name)


def _table(name: str, table: Mapping[str, Any]) -> Iterable[str]:
    """The lines of a table: its own keys, then the tables in it."""
    inner = {key: value for key, value in table.items() if isinstance(value, Mapping) or _is_tables(value)}
    own = [f"{_key(key)} = {toml_value(value)}" for key, value in table.items() if value is not None and key not in inner]
    yield from [*own, ""] if own else ()
    for key, value in inner.items():
        path = f"{name}.{_key(key)}" if name else _key(key)
        if isinstance(value, Mapping):
            yield from [f"[{path}]", *_table(path, value)] if value else ()
        else:
            for entry in value:
                yield from [f"[[{path}]]", *_table(path, entry)]


def _is_tables(value: object) -> bool:
    return isinstance(value, list | tuple) and any(isinstance(entry, Mapping) for entry in value)


def _leaves(value: Mapping[str, Any] | Iterable[Any], where: str = "") -> Iterable[tuple[str, Any]]:
    """(dotted key, value) of everything that is no table."""
    entries = value.items() if isinstance(value, Mapping) else enumerate(value)
    for key, entry in entries:
        if isinstance(entry, Mapping) or _is_tables(entry):
            yield from _leaves(entry, f"{where}{key}.")
        else:
            yield f"{where}{key}", entry
