"""`loratools formats`: the registries as tables, and what converts into what.

`tables` turns the registries into plain rows; the terminal and docs/formats.md (see `reference`) draw the same rows, the page with
names where the terminal has room only for numbers and signs.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

from loratools.cli.console import Output, clean
from loratools.cli.options import command

if TYPE_CHECKING:
    from rich.table import Table

EXAMPLES = """
loratools formats
loratools formats --json
"""

# what becomes of a kind → (sign on the terminal, words on the page)
FATES = {
    "exact": ("=", "exact"),
    "folded": ("f", "scale folded"),
    "contracted": ("c", "core contracted"),
    "as-diff_b": ("b", "as diff_b"),
    "kind-lora": ("L", "--kind lora"),
    "refused": (".", "-"),
}
LEGEND = {
    "=": "the same numbers under other names",
    "f": "the scale goes into the factors: exact for powers of two, else rounded once and reported",
    "c": "the Tucker core is multiplied into the down factor",
    "b": "the scaled bias becomes a plain bias delta",
    "L": "only with --kind lora, by exact algebra",
    ".": "refused: the dialect has no place for it",
}


class Sheet(NamedTuple):
    """A table, whoever draws it."""

    title: str
    columns: tuple[str, ...]
    rows: list[tuple[str, ...]]


# title, registry, (heading, key of an entry), page only
SHEETS = (
    ("Dialects", "dialects", (("name", "name"), ("what", "title"), ("alpha is", "alpha")), False),
    ("Tools that write and read a dialect", "dialects", (("name", "name"), ("tools", "tools"), ("notes", "notes")), True),
    ("Spelling", "dialects", (("name", "name"), ("prefixes", "prefixes"), ("LoRA leaves", "leaves")), True),
    ("Architectures", "architectures", (("name", "name"), ("what", "title"), ("parts", "components"), ("converted", "supported")), False),
    ("Variants", "architectures", (("name", "name"), ("variants told apart by widths", "variants")), True),
    ("Kinds", "kinds", (("name", "name"), ("what", "title")), False),
)


@command("formats", examples=EXAMPLES)
def formats(output: Output) -> int:
    """List the dialects, architectures and kinds, and what converts exactly.

    The tables are the ones the program reads files with. The last two say which dialect can name which architecture, and what
    becomes of each kind in each dialect: exact, folded, or refused.
    """
    from loratools.operations.formats import formats as operation

    registries = operation()
    output.result(registries, lambda: show(output, registries))
    return 0


def show(output: Output, registries: Mapping[str, Any]) -> None:
    """The tables, and what the signs in them mean."""
    console = output.console()
    for sheet in tables(registries, page=False):
        console.print(sheet_table(sheet))
    for sign, meaning in LEGEND.items():
        console.print(f" {sign}  {meaning}", style="dim", highlight=False)


def tables(registries: Mapping[str, Any], *, page: bool) -> list[Sheet]:
    """The sheets that have something to say; a column that is empty everywhere is left out."""
    sheets = []
    for title, registry, columns, page_only in SHEETS:
        entries = registries.get(registry) or []
        rows = [tuple(_cell(entry.get(key)) for _, key in columns) for entry in entries]
        used = [index for index in range(len(columns)) if any(row[index] for row in rows)]
        if len(used) > 1 and (page or not page_only):
            headings = tuple(columns[index][0] for index in used)
            cells = [tuple(row[index] for index in used) for row in rows]
            if registry == "dialects" and not page:
                headings, cells = ("#", *headings), [(str(number), *row) for number, row in enumerate(cells, 1)]
            sheets.append(Sheet(title, headings, cells))
    return [*sheets, *_names_matrix(registries, page), *_kinds_matrix(registries, page)]


def _headings(registries: Mapping[str, Any], page: bool) -> list[tuple[str, str]]:
    """(dialect, column heading): names on the page, numbers of the first table on the terminal."""
    names = [str(dialect.get("name")) for dialect in registries.get("dialects") or []]
    return [(name, name if page else str(number)) for number, name in enumerate(names, 1)]


def _names_matrix(registries: Mapping[str, Any], page: bool) -> list[Sheet]:
    """Architectures down, dialects across: all parts, the denoiser alone, or none."""
    dialects = _headings(registries, page)
    rows = []
    for entry in registries.get("architectures") or []:
        known = entry.get("dialects") or {}
        total = len(entry.get("components") or [])
        signs = ("all", "part", "-") if page else ("=", "d", ".")
        cells = [signs[2] if not known.get(name) else signs[0 if len(known[name]) == total else 1] for name, _ in dialects]
        rows.append((clean(entry.get("name")), *cells))
    title = (
        "Which dialect names which architecture (all parts, or only some of them)"
        if page
        else "Who names what (=: all parts, d: some of them)"
    )
    return [Sheet(title, ("architecture", *(heading for _, heading in dialects)), rows)] if rows and dialects else []


def _kinds_matrix(registries: Mapping[str, Any], page: bool) -> list[Sheet]:
    """Kinds down, dialects across."""
    conversions = registries.get("conversions") or {}
    dialects = [(name, heading) for name, heading in _headings(registries, page) if name in conversions]
    kinds = list(dict.fromkeys(kind for row in conversions.values() for kind in row))
    sign = 1 if page else 0
    rows = [(clean(kind), *(FATES.get(conversions[name].get(kind, "refused"), ("?", "?"))[sign] for name, _ in dialects)) for kind in kinds]
    title = "What becomes of a kind in a dialect"
    return [Sheet(title, ("kind", *(heading for _, heading in dialects)), rows)] if rows and dialects else []


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


def sheet_table(sheet: Sheet) -> Table:
    """A sheet of `loratools formats`."""
    from rich.box import SIMPLE
    from rich.table import Table

    many = len(sheet.columns) > 8  # a matrix of signs: no room between its columns
    padding = (0, 1, 0, 0) if many else (0, 1)
    table = Table(title=sheet.title, title_justify="left", title_style="bold", box=SIMPLE, pad_edge=False, padding=padding)
    for index, heading in enumerate(sheet.columns):
        table.add_column(heading, overflow="fold", no_wrap=many or index == 0, style="cyan" if index == 0 else None)
    for row in sheet.rows:
        table.add_row(*row)
    return table
