"""`loratools compare`: are two adapters the same function? Exit 4 if they are not."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from loratools.cli import options
from loratools.cli.console import Output, number
from loratools.cli.options import PATH, command
from loratools.errors import counted

SHOWN = 10

EXAMPLES = """
loratools compare style.safetensors style.diffusers.safetensors
loratools compare a.safetensors b.safetensors --tolerance 1e-3 --modules
loratools compare a.safetensors peft_folder --json
"""


@command("compare", examples=EXAMPLES)
@click.argument("a", type=PATH)
@click.argument("b", type=PATH)
@options.base
@click.option(
    "--tolerance",
    type=float,
    callback=options.tolerance,
    default=1e-5,
    show_default=True,
    metavar="T",
    help="Largest relative error of a site that counts as equal.",
)
@options.arch
@options.alpha
@click.option("--modules", is_flag=True, help="List every site, not the worst alone.")
def compare(output: Output, a: Path, b: Path, tolerance: float, modules: bool, **settings: Any) -> int:
    """Tell whether two adapters are the same function.

    Their weight changes are compared site by site through the factors, so dialect, rank, kind and spelling do not matter.
    Exit 4 if a site differs by more than the tolerance, or is in one file only.
    """
    from loratools.operations.compare import compare as operation

    with output.working(f"comparing {a} and {b}"):
        result = operation(a, b, tolerance=tolerance, modules=modules, **settings)
    output.result(result, lambda: show(output, result, a, b, tolerance))
    return 0 if result["equal"] else 4


def show(output: Output, result: dict[str, Any], a: Path, b: Path, tolerance: float) -> None:
    """The verdict, what it rests on, and the sites that differ most."""
    from rich.text import Text

    console = output.console()
    verdict = Text("equal", style="bold green") if result["equal"] else Text("different", style="bold red")
    console.print(verdict + Text(f": largest relative error {number(result.get('max_relative_error'))} (tolerance {number(tolerance)})"))
    likeness = f"cosine {_digits(result.get('cosine'))}, scale ratio {_digits(result.get('scale_ratio'))}"
    output.say(f"{counted(result['sites'], 'site')}, {likeness}")
    for key, path in (("only_in_a", a), ("only_in_b", b)):
        sites = result.get(key, [])
        if sites:
            output.say(f"only in {path}: {len(sites)}")
            for site in sites[:SHOWN]:
                output.say(f"  {site}")
            if len(sites) > SHOWN:
                output.say(f"  and {len(sites) - SHOWN} more (--json lists all)")
    rows = result.get("modules") or ([] if result["equal"] else result.get("worst", []))
    if rows:
        console.print(_table(rows, "sites" if result.get("modules") else "largest differences"))


def _digits(value: float | None) -> str:
    return "-" if value is None else f"{value:.6g}"


def _table(rows: list[dict[str, Any]], title: str) -> Any:
    from rich.box import SIMPLE
    from rich.table import Table

    from loratools.cli.console import clean

    table = Table(title=title, title_justify="left", box=SIMPLE, pad_edge=False)
    table.add_column("site", overflow="fold")
    table.add_column("relative error", justify="right")
    table.add_column("cosine", justify="right")
    for row in rows:
        table.add_row(clean(row["site"]), number(row.get("relative_error")), _digits(row.get("cosine")))
    return table
