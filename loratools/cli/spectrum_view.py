"""Modules as a table, and where in the model an adapter's change lies, as a bar chart of text.

A block's energy is Σ ‖ΔW‖² over its modules, its share is that over the whole adapter's.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table
from rich.text import Text

from loratools.cli.console import clean, number
from loratools.operations.plot import energies, group_blocks, short_name

_BAR = 40  # columns of the longest bar
_ROWS = 24  # rows of the chart; neighbouring blocks are taken together to stay below


def energy_chart(console: Console, rows: Iterable[Mapping[str, Any]]) -> Table:
    """The share of each block group, longest bar for the largest."""
    groups = group_blocks(energies(rows), _ROWS)
    total = sum(groups.values()) or 1.0
    largest = max(groups.values(), default=0.0) or 1.0
    width = max(8, min(_BAR, console.width - max((len(short_name(name)) for name in groups), default=0) - 12))
    mark = "#" if console.options.ascii_only else "█"
    table = Table.grid(padding=(0, 1))
    table.add_column(no_wrap=True)
    table.add_column(justify="right", no_wrap=True)
    table.add_column(no_wrap=True)
    table.add_row(Text("  energy by block", "bold"), Text("share", "dim"), Text(""))
    for name, energy in groups.items():
        bar = mark * round(width * energy / largest)
        table.add_row(Text("  " + clean(short_name(name)), "dim"), Text(f"{energy / total:.1%}"), Text(bar, "cyan"))
    return table


def module_table(rows: Iterable[Mapping[str, Any]]) -> Table:
    """A row a module; norm and ranks of the spectrum where they were computed."""
    rows = list(rows)
    spectrum = any(row.get("delta_norm") is not None for row in rows)
    table = Table(box=SIMPLE, pad_edge=False)
    table.add_column("module", overflow="fold")
    for heading in ("kind", "rank", "alpha", "scale", "shape", "dtype", *(("norm", "stable", "effective") if spectrum else ())):
        table.add_column(heading, justify="left" if heading in {"kind", "shape", "dtype"} else "right", no_wrap=True)
    for row in rows:
        shape = " × ".join(number(extent) for extent in row.get("shape") or [])
        values = [row.get("kind"), row.get("rank"), row.get("alpha"), row.get("scale"), shape, row.get("dtype")]
        values += [row.get(key) for key in ("delta_norm", "stable_rank", "effective_rank")] if spectrum else []
        table.add_row(clean(row.get("site")), *(number(value) for value in values))
    return table


def print_wide(console: Console, table: Table) -> None:
    """Print a table in full width where no terminal limits it, so that its lines can be searched."""
    if not console.is_terminal:
        wanted = console.measure(table, options=console.options.update(max_width=10_000)).maximum
        console.width = max(console.width, wanted)
    console.print(table)
