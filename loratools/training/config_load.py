"""Reading a training configuration: a TOML file, values set on the command line, and everything that is wrong with them at once.

    load(path, ["train.steps=10", "save.name=test"])

A value set with --set stands where the file's stood: paths are relative to the file's folder in both. It is a TOML value, or
a bare word as text; nothing after the = takes the key out. Invariant: every problem is told, with the line or --set it is in.
"""

from __future__ import annotations

import difflib
import re
import tomllib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from loratools.errors import InputError, LoraToolsError, UsageError, counted, worst
from loratools.tensors.header import open_bytes, printable
from loratools.training.config import Config
from loratools.training.config_lines import Place, holds, lines_of
from loratools.training.config_problems import Problem, problems_of, shown
from loratools.training.config_types import FOLDER

_LARGEST = 1 << 20  # bytes; a configuration has a few thousand
_KEY = re.compile(r"[\w-]+(\.[\w-]+)*", re.ASCII)


def load(path: Path, overrides: Sequence[str] = ()) -> Config:
    """The configuration in the TOML file `path`, with `overrides` ("key.path=value") put in, the last of a key last.

    Relative paths become absolute, from the folder of the file. Raises InputError for a file that cannot be read, is no TOML,
    or has wrong keys and values, all listed; UsageError where only overrides are wrong.
    """
    from pydantic import ValidationError

    text = _text(path)
    given = _parsed(path, text)
    asked: dict[Place, str] = {}  # place → the override that was put there
    refused: list[str] = []
    for override in overrides:
        try:
            asked[_put(given, override)] = override
        except UsageError as error:
            refused.append(error.message)
    found: list[Problem] = []
    try:
        config = Config.model_validate(given, context={FOLDER: path.parent.absolute()})
    except ValidationError as error:
        found = problems_of(given, error.errors(include_url=False))
    if found or refused:
        raise _refusal(path, text, found, asked, refused)
    return config


def _text(path: Path) -> str:
    """What the file says, without its byte order mark and with line ends as TOML has them."""
    try:
        file, size = open_bytes(path)
    except InputError as error:
        near = difflib.get_close_matches(path.name, sorted({entry.name for entry in path.parent.glob("*.toml")} - {path.name}), 1)
        error.fix = f"did you mean {path.with_name(near[0])}?" if near else "loratools train takes a TOML file"
        raise
    if size > _LARGEST:
        raise InputError(f"{path}: {size} bytes are no configuration; at most {_LARGEST} are read")
    data = file.read(0, size)
    try:
        return data.decode("utf-8-sig").replace("\r\n", "\n")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise InputError(f"{path}: not TOML: line {line} is not UTF-8", fix="save the file as UTF-8") from error


def _parsed(path: Path, text: str) -> dict[str, Any]:
    try:
        return tomllib.loads(text)
    except (ValueError, RecursionError) as error:  # no TOML, a number of 5000 digits, brackets without end
        place = re.search(r"\(at line (\d+)", str(error))
        told = [f"line {place[1]}: {printable(text.split(chr(10))[int(place[1]) - 1].strip())[:100]}"] if place else []
        fix = "text needs quotes: name = \"style\"; a path with backslashes single ones: path = 'C:\\data'"
        raise InputError(f"{path}: not TOML: {error}", details=told, fix=fix) from error


def _put(given: dict[str, Any], override: str) -> Place:
    """Put one "key.path=value" into the tables, making those that are missing, and say where. Raises UsageError."""
    key, equals, written = (part.strip() for part in override.partition("="))
    if not equals or not _KEY.fullmatch(key):
        raise UsageError(f"--set {_brief(override)}: expected key.path=value, such as train.steps=1000")
    place = tuple(int(part) if part.isdigit() else part for part in key.split("."))
    table: Any = given
    for depth, part in enumerate(place):
        if not holds(table, part) and not (isinstance(table, dict) and isinstance(part, str)):
            counts = f"a list of {counted(len(table), 'entry', 'entries')}, counted from 0" if isinstance(table, list) else shown(table)
            raise UsageError(f"--set {_brief(override)}: {'.'.join(map(str, place[:depth])) or 'the file'} is {counts}")
        if depth < len(place) - 1:
            table = table[part] if holds(table, part) else table.setdefault(part, {})
    if written:
        table[place[-1]] = _value(written)
    elif holds(table, place[-1]):
        del table[place[-1]]
    return place


def _brief(override: str) -> str:
    return printable(override if len(override) <= 100 else f"{override[:100]}…")


def _value(written: str) -> Any:
    """A TOML value; what is none is text as it stands."""
    try:
        read = tomllib.loads(f"value = {written}")
    except (ValueError, RecursionError):
        return written
    return read["value"] if read.keys() == {"value"} else written


def _refusal(path: Path, text: str, found: Sequence[Problem], asked: dict[Place, str], refused: Sequence[str]) -> LoraToolsError:
    """One error for all problems: those of the file, each with its line, and those of --set."""
    lines = lines_of(text)
    from_file: list[tuple[int, str]] = []
    from_set = list(refused)
    for problem in found:
        override, line = _origin(problem, lines, asked)
        if override is not None:
            from_set.append(f"{problem.message} (--set {_brief(override)})")
        else:
            from_file.append((line or 0, f"{problem.message} (line {line})" if line else problem.message))
    errors: list[LoraToolsError] = []
    if from_file:
        told = [message for _, message in sorted(from_file, key=lambda entry: entry[0])]
        message = f"{path}: {counted(len(told), 'problem')} in the configuration"
        errors.append(InputError(message, details=told, fix="correct what is listed"))
    if from_set:
        message = f"{counted(len(from_set), 'problem')} with values of --set"
        errors.append(UsageError(message, details=from_set, fix="--set takes key.path=value; text that looks like a number needs quotes"))
    return worst(errors)


def _origin(problem: Problem, lines: dict[Place, int], asked: dict[Place, str]) -> tuple[str | None, int | None]:
    """The --set a problem comes from, or the line it stands in; neither for what nobody wrote."""
    for place in problem.places:
        for other, override in asked.items():
            if all(one == two for one, two in zip(place, other, strict=False)):
                return override, None
    for place in (*problem.places, *(place[:-1] for place in problem.places)):
        if place in lines:
            return None, lines[place]
    tables = {place[:-1] for place in problem.places} - {()}
    return next((override for other, override in asked.items() if other[:-1] in tables), None), None
