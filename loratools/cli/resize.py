"""`loratools resize`: smaller ranks, and what they cost."""

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

EXAMPLES = """
loratools resize style.safetensors small.safetensors --rank 8
loratools resize style.safetensors small.safetensors --energy 0.95 --max-rank 32
loratools resize paper-loha.safetensors small.safetensors --error 0.05 --conv-rank 4
loratools resize chat-peft served-adapter --for vllm --max-rank 16
loratools resize style.safetensors small.safetensors --ratio 10 --dry-run --json
"""

RANK = click.IntRange(min=1)


@command("resize", examples=EXAMPLES)
@click.argument("source", metavar="SRC", type=PATH)
@click.argument("output_path", metavar="OUT", type=PATH)
@click.option("--rank", type=RANK, metavar="N", help="The best approximation of rank N of every module.")
@click.option("--energy", type=float, callback=options.finite, metavar="E", help="The fewest ranks that keep this share of Σσ², up to 1.")
@click.option("--error", type=float, callback=options.finite, metavar="E", help="The fewest ranks within this relative error, by module.")
@click.option("--ratio", type=float, callback=options.finite, metavar="R", help="Singular values down to the largest / R.")
@click.option("--conv-rank", type=RANK, metavar="N", help="The largest rank of convolutions larger than 1x1.")
@click.option("--max-rank", type=RANK, metavar="N", help="The largest rank of all modules, whatever else is asked for.")
@click.option("--for", metavar="NAME", help="A loader with a limit: plain LoRA only, and one rank for all where it knows no other.")
@options.arch
@options.alpha
@options.base
@options.dtype
@options.threads
@options.force
@options.dry_run
def resize(output: Output, source: Path, output_path: Path, dry_run: bool, **settings: Any) -> int:
    """Write an adapter at smaller ranks.

    One of --rank, --energy, --error and --ratio says how many singular values of each module stay; --max-rank alone will do. The
    dialect, the keys and their order stay as they are, and so does every module whose rank fits.
    """
    from loratools.operations.resize import resize as operation

    loader = settings.pop("for")
    with output.working(f"resizing {source}"):
        result = operation(source, output_path, loader=loader, dry_run=dry_run, **settings)
    output.result(result, lambda: show(output, result))
    return 0


def show(output: Output, result: dict[str, Any]) -> None:
    """The ranks before and after, and what was lost."""
    plan, at_most = result.get("plan"), "at most " if result.get("plan") else ""
    what = f"{counted(result['modules'], 'module')} of {result['architecture']} as {result['dialect']}"
    output.say(f"{what}, {at_most}{result['changed']} changed")
    output.say(f"ranks {_histogram(result['ranks_before'])} -> {at_most}{_histogram(result['ranks_after'])}")
    if plan is not None:
        output.say(f"plan: {counted(plan['tensors'], 'tensor')}, {at_most}{size(plan['bytes'])}")
        output.say(f"would write {result['output']}")
        return
    error = result["relative_error"]
    output.say("exact" if error == 0 else f"{'exact up to rounding: ' if error < FLOOR else ''}relative error {number(error)}")
    for row in result["worst"][:SHOWN]:
        if row["relative_error"] >= FLOOR:
            output.say(f"  {row['site']}  rank {number(row['rank'])}, relative error {number(row['relative_error'])}")
    output.say(f"wrote {result['output']}")


def _histogram(ranks: dict[str, int]) -> str:
    return ", ".join(f"{rank} ({count})" for rank, count in ranks.items()) or "-"
