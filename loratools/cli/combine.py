"""`loratools combine`: one adapter from several, with their likeness and what the result cost."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import click

from loratools.cli import options
from loratools.cli.console import Output, clean, number, size
from loratools.cli.options import PATH, WEIGHTED, command, registry_names
from loratools.errors import counted

FIGHT, ALIKE = -0.1, 0.9  # cosines beyond which two inputs are worth a word
FLOOR = 1e-6  # a relative error below is rounding to float32
SHOWN = 3

EXAMPLES = """
loratools combine style.safetensors:0.8 peft_folder:0.5 both.safetensors
loratools combine a.safetensors b.safetensors:-0.3 out.safetensors --rank 32
loratools combine a.safetensors:0.5 b.safetensors:0.5 mean.safetensors
loratools combine a.safetensors b.safetensors out.safetensors --method ties --density 0.3 --rank 64 --dry-run
loratools combine a.safetensors b.safetensors out.safetensors --energy 0.99 --to diffusers --json
"""


@command("combine", examples=EXAMPLES)
@click.argument("adapters", metavar="ADAPTER[:WEIGHT]...", nargs=-1, type=WEIGHTED, required=True)
@click.argument("output_path", metavar="OUT", type=PATH)
@click.option("--rank", type=click.IntRange(min=1), metavar="N", help="The best approximation of rank N; exact without it.")
@click.option("--energy", type=float, callback=options.finite, metavar="E", help="The fewest ranks that keep this share of Σσ², up to 1.")
@click.option(
    "--method", type=click.Choice(["sum", "ties", "dare"]), default="sum", show_default=True, help="How the weight changes are combined."
)
@click.option("--density", type=float, callback=options.finite, metavar="D", help="Share of entries ties and dare keep.  [default: 0.5]")
@click.option(
    "--to", metavar="DIALECT", shell_complete=registry_names("dialects"), help="The dialect to write; the first adapter's without it."
)
@options.arch
@options.alpha
@options.base
@options.dtype
@options.seed
@options.threads
@options.force
@options.dry_run
def combine(output: Output, adapters: tuple[tuple[Path, float], ...], output_path: Path, dry_run: bool, **settings: Any) -> int:
    """Write the weighted sum of adapters as one adapter.

    Adapters of one architecture, in any mix of dialects, ranks and kinds. PATH:0.8 gives an adapter a weight, 1 without it;
    a negative one takes it away, 0 leaves it out.
    """
    from loratools.operations.combine import combine as operation

    with output.working(f"combining {counted(len(adapters), 'adapter')}"):
        result = operation(adapters, output_path, dry_run=dry_run, **settings)
    output.result(result, lambda: show(output, result))
    return 0


def show(output: Output, result: dict[str, Any]) -> None:
    """The inputs and how alike they are, what was made of them, and where it is furthest off."""
    names = [f"{Path(given['path']).name}:{given['weight']:g}" for given in result.get("inputs", [])]
    similar, plan = result.get("pairwise_cosine"), result.get("plan")
    if similar and len(names) > 1:
        output.console().print(_cosines(names, similar))
        for text in hints(names, [given["weight"] for given in result.get("inputs", [])], similar):
            output.say(text)
    ranks = ", ".join(f"{rank} ({count})" for rank, count in result.get("ranks_after", {}).items())
    output.say(f"{counted(result['sites'], 'site')} of {result.get('architecture')} as {result.get('dialect')}, ranks {ranks or '-'}")
    if plan is not None:
        output.say(f"plan: {counted(plan['tensors'], 'tensor')}, {size(plan.get('bytes', 0))}")
        output.say(f"would write {result.get('output')}")
        return
    error = result.get("relative_error") or 0.0
    output.say("exact" if error == 0 else f"{'exact up to rounding: ' if error < FLOOR else ''}relative error {number(error)}")
    for row in result.get("worst", [])[:SHOWN]:
        if row["relative_error"] >= FLOOR:
            output.say(f"  {row['site']}  rank {number(row['rank'])}, relative error {number(row['relative_error'])}")
    output.say(f"wrote {result.get('output')}")


def hints(names: list[str], weights: list[float], similar: list[list[float | None]]) -> list[str]:
    """A sentence for every two inputs that, at their weights, fight or are nearly the same."""
    found = []
    for i, row in enumerate(similar):
        for j, cosine in enumerate(row[:i]):
            at_weights = None if cosine is None else math.copysign(cosine, cosine * weights[i] * weights[j])
            if cosine is None or at_weights is None or FIGHT <= at_weights <= ALIKE:
                continue
            what = "work against each other" if at_weights < FIGHT else "are nearly the same: their weights add up"
            found.append(f"{names[j]} and {names[i]} {what} (cosine {cosine:.3g})")
    return found


def _cosines(names: list[str], similar: list[list[float | None]]) -> Any:
    """A row and a column for every input; adding 0.0 takes the sign off a rounded zero."""
    from rich.box import SIMPLE
    from rich.table import Table

    table = Table(title="cosine of the weight changes", title_justify="left", box=SIMPLE, pad_edge=False)
    table.add_column("", overflow="fold")
    for position in range(len(names)):
        table.add_column(str(position + 1), justify="right")
    for position, (name, row) in enumerate(zip(names, similar, strict=True)):
        table.add_row(f"{position + 1} {clean(name)}", *("-" if value is None else f"{round(value, 3) + 0.0:.3f}" for value in row))
    return table
