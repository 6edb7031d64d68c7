"""`loratools rescale-alpha`: another alpha, another strength, or none; and what rounding took."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from loratools.cli import options
from loratools.cli.console import Output, number, size
from loratools.cli.options import PATH, command
from loratools.errors import counted

FLOOR = 1e-6  # a relative error below is rounding to float32
SHOWN = 3
NAMES = {"F16": "float16", "BF16": "bfloat16", "F32": "float32", "F64": "float64"}

EXAMPLES = """
loratools rescale-alpha style.safetensors style-rank.safetensors --alpha rank
loratools rescale-alpha style.safetensors style-16.safetensors --alpha 16 --dtype fp32
loratools rescale-alpha style.safetensors softer.safetensors --strength 0.7
loratools rescale-alpha adapter_folder folded_folder --fold
loratools rescale-alpha style.safetensors style-rank.safetensors --alpha rank --dry-run --json
"""


def alpha_or_rank(_context: click.Context, _parameter: click.Parameter, value: str | None) -> float | str | None:
    """A number, or the word rank. Raises click.BadParameter."""
    if value is None or value == "rank":
        return value
    try:
        return float(value)
    except ValueError as error:
        raise click.BadParameter(f"{value!r} is neither a number nor the word rank.") from error


@command("rescale-alpha", examples=EXAMPLES)
@click.argument("source", metavar="SRC", type=PATH)
@click.argument("output_path", metavar="OUT", type=PATH)
@click.option("--alpha", metavar="VALUE|rank", callback=alpha_or_rank, help="Write this alpha, or each module's rank; the function stays.")
@click.option("--strength", type=float, callback=options.finite, metavar="S", help="Multiply what the adapter does by S.")
@click.option("--fold", is_flag=True, help="Bake the scale into the factors and write no alpha; the function stays.")
@options.arch
@options.base
@options.dtype
@options.force
@options.dry_run
def rescale_alpha(output: Output, source: Path, output_path: Path, dry_run: bool, **settings: Any) -> int:
    """Change an adapter's alpha, its strength, or fold its scale.

    One of --alpha, --strength and --fold. The dialect, the keys and their order stay as they are; what need not change is copied
    bit for bit, and what rounding to the factors' dtype takes is told.
    """
    from loratools.operations.rescale import rescale_alpha as operation

    with output.working(f"rescaling {source}"):
        result = operation(source, output_path, dry_run=dry_run, **settings)
    output.result(result, lambda: show(output, result))
    return 0


def show(output: Output, result: dict[str, Any]) -> None:
    """The alphas before and after, the strength, and what it cost."""
    plan = result.get("plan")
    output.say(f"{counted(result['modules'], 'module')} of {result['architecture']} as {result['dialect']}, {result['changed']} changed")
    output.say(f"alpha {_histogram(result['alpha_before'])} -> {_histogram(result['alpha_after'])}")
    if result["strength"] != 1.0:
        output.say(f"{number(result['strength'])} times the strength")
    output.say(_quality(result))
    for row in result["worst"][:SHOWN]:
        if row["relative_error"] >= FLOOR:
            output.say(f"  {row['site']}  relative error {number(row['relative_error'])}")
    if plan is not None:
        output.say(f"plan: {counted(plan['tensors'], 'tensor')}, {size(plan['bytes'])}")
    output.say(f"{'wrote' if plan is None else 'would write'} {result['output']}")


def _histogram(alphas: dict[str, int]) -> str:
    return ", ".join(f"{alpha} ({count})" for alpha, count in alphas.items()) or "-"


def _quality(result: dict[str, Any]) -> str:
    """What rounding took, in words."""
    error = result["max_relative_error"]
    if not error:
        return "exact"
    names = " and ".join(NAMES.get(name, name) for name in result["rounded_to"])
    what = f"rounding to {names} takes up to {number(error)} of a weight change"
    return f"exact up to rounding: relative error {number(error)}" if error < FLOOR else what
