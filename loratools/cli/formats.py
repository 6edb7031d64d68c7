"""`loratools formats`: the registries as tables, and what converts into what.

`tables` turns the registries into plain rows; the terminal and docs/formats.md (see `reference`) draw the same rows.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from loratools.cli.console import Output, clean
from loratools.cli.options import command

EXAMPLES = """
loratools formats
loratools formats --json
"""


class Sheet(NamedTuple):
    """A table, whoever draws it."""

    title: str
    columns: tuple[str, ...]
    rows: list[tuple[str, ...]]


# title of the table, registry, (heading, key of an entry)
SHEETS = (
    ("Dialects", "dialects", (("name", "name"), ("what", "title"), ("prefixes", "prefixes"), ("alpha", "alpha"), ("kinds", "kinds"))),
    ("Tools that write and read a dialect", "dialects", (("name", "name"), ("tools", "tools"))),
    ("Spelling", "dialects", (("name", "name"), ("leaves", "leaves"))),
    ("Architectures", "architectures", (("name", "name"), ("what", "title"), ("supported", "supported"), ("components", "components"))),
    ("Variants and dialects", "architectures", (("name", "name"), ("variants", "variants"), ("dialects", "dialects"))),
    ("Kinds", "kinds", (("name", "name"), ("what", "title"), ("becomes exactly", "exact_to"))),
)


@command("formats", examples=EXAMPLES)
def formats(output: Output) -> int:
    """List the dialects, architectures and kinds, and what converts exactly.

    The tables are the ones the program reads files with. Conversions: exact keeps the function bit for bit or up to rounding,
    folded puts the scale into the factors, refused needs another dialect or --kind lora.
    """
    from loratools.operations.formats import formats as operation

    registries = operation()
    if output.json:
        output.emit(registries)
    elif not output.quiet:
        from loratools.cli.spectrum_view import sheet_table

        console = output.console()
        for sheet in tables(registries):
            console.print(sheet_table(sheet))
    return 0


def tables(registries: Mapping[str, Any]) -> list[Sheet]:
    """The sheets that have something to say; a column that is empty everywhere is left out."""
    sheets = []
    for title, registry, columns in SHEETS:
        rows = [tuple(_cell(entry.get(key)) for _, key in columns) for entry in registries.get(registry) or []]
        used = [index for index in range(len(columns)) if any(row[index] for row in rows)]
        if len(used) > 1:
            sheets.append(Sheet(title, tuple(columns[index][0] for index in used), [tuple(row[index] for index in used) for row in rows]))
    return sheets + _conversions(registries.get("conversions") or {})


def _conversions(conversions: Mapping[str, Any]) -> list[Sheet]:
    """Target dialects down, kinds across."""
    kinds = list(dict.fromkeys(kind for row in conversions.values() for kind in row))
    rows = [(clean(dialect), *(_cell(row.get(kind)) or "-" for kind in kinds)) for dialect, row in conversions.items()]
    return [Sheet("Conversions: a kind written in a dialect", ("to", *kinds), rows)] if rows else []


def _cell(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, Mapping):
        return ", ".join(f"{clean(key)}: {_cell(item)}" for key, item in value.items())
    if isinstance(value, list | tuple | set | frozenset):
        return ", ".join(_cell(item) or "(none)" for item in value)
    return clean(value)
