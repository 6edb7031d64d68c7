"""`loratools extract`: parse, call the operation, show what was found, how far it is off, and what no adapter holds."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import click

from loratools.cli import options
from loratools.cli.console import Output, cost, number, size
from loratools.cli.options import PATH, command, registry_names
from loratools.errors import counted

SHOWN = 3  # tensors named for each reason they are not in the adapter

EXAMPLES = """
loratools extract sd_xl_base_1.0.safetensors tuned.safetensors difference.safetensors
loratools extract base.safetensors tuned_pipeline_folder difference.safetensors --rank 64 --conv-rank 16
loratools extract base.safetensors tuned.safetensors difference.safetensors --rank auto --component denoiser
loratools extract base.safetensors tuned.safetensors difference.safetensors --budget 100 --to comfy
loratools extract llama_folder tuned_folder adapter_folder --error 0.05 --device auto
"""


def rank_or_auto(_context: click.Context, _parameter: click.Parameter, value: str | None) -> int | str | None:
    """A whole number, or the word auto. Raises click.BadParameter."""
    if value is None or value == "auto":
        return value
    if not value.isdecimal() or not int(value):
        raise click.BadParameter(f"{value!r} is neither a number of 1 or more nor the word auto.")
    return int(value)


@command("extract", examples=EXAMPLES)
@click.argument("base", metavar="BASE", type=PATH)
@click.argument("tuned", metavar="TUNED", type=PATH)
@click.argument("out", metavar="OUT", type=PATH)
@click.option("--rank", callback=rank_or_auto, metavar="N|auto", help="Rank of every module; auto: what stands above noise.  [default: 32]")
@click.option("--energy", type=float, callback=options.finite, metavar="E", help="The fewest ranks that keep this share of Σσ², up to 1.")
@click.option("--error", type=float, callback=options.finite, metavar="E", help="The fewest ranks within this error, module by module.")
@click.option("--budget", type=float, callback=options.finite, metavar="MB", help="The best ranks for a file of at most this size.")
@click.option("--conv-rank", type=click.IntRange(min=1), metavar="N", help="Rank of convolutions with a kernel larger than 1x1.")
@click.option("--to", metavar="DIALECT", shell_complete=registry_names("dialects"), help="The dialect to write; BASE's layout settles it.")
@click.option(
    "--dense-extras",
    type=click.Choice(["keep", "drop"]),
    default="keep",
    show_default=True,
    help="Changed biases, norms and bare parameters, where the dialect holds them.",
)
@click.option("--component", metavar="C", multiple=True, help="Extract this part alone (denoiser, text_encoder, …); may be repeated.")
@click.option("--include", metavar="GLOB", multiple=True, help="Extract only the sites that match; may be repeated.")
@click.option("--exclude", metavar="GLOB", multiple=True, help="Leave out the sites that match; may be repeated.")
@click.option("--exact", is_flag=True, help="Exact singular values instead of the randomized ones that have converged.")
@click.option("--oversample", type=click.IntRange(min=0), metavar="N", help="Further directions of the randomized SVD.  [default: 16]")
@click.option("--iterations", type=click.IntRange(min=0), metavar="N", help="Power iterations; without it until they change nothing more.")
@options.dtype
@options.arch
@options.seed
@options.device
@options.threads
@options.force
@options.dry_run
def extract(output: Output, base: Path, tuned: Path, out: Path, dry_run: bool, **settings: Any) -> int:
    """Write what a tuned model has that its base has not, as a LoRA.

    BASE and TUNED are checkpoints of one architecture, in any layouts and dtypes. Every module that differs is decomposed; the error
    that is printed is that of the factors as they are written.
    """
    from loratools.operations.extract import extract as operation

    with output.progress(f"extracting into {out}") as progress:
        result = operation(base, tuned, out, dry_run=dry_run, progress=None if dry_run else progress, **settings)
    output.result(result, lambda: show(output, result))
    return 0


def show(output: Output, result: dict[str, Any]) -> None:
    """Modules and ranks, the certificate, and every tensor that is not in the adapter, by reason."""
    where = f"{result['architecture']} as {result['dialect']}, {result['dtype']}"
    if "plan" in result:
        output.say(f"{counted(result['modules'], 'module')} of {where}")
        output.say(f"plan: at most {counted(result['plan']['tensors'], 'tensor')}, {size(result['plan']['bytes'])}")
        output.say(f"would write {result['output']}")
        return
    ranks = ", ".join(f"{rank} ({count})" for rank, count in result["ranks"].items())
    dense = result["modules"] - sum(result["ranks"].values())
    beside = f", {counted(dense, 'dense module')} beside them" if dense else ""
    output.say(f"{counted(result['modules'], 'module')} of {where}, ranks {ranks or '-'}{beside}")
    output.say(f"relative error {number(result['relative_error'])}; furthest off:")
    for row in result["worst"]:
        output.say(f"  {row['site']}  rank {row['rank']}, relative error {number(row['relative_error'])}")
    _left_out(output, result["skipped"])
    output.say(f"wrote {result['output']} in {cost(result)}")


def _left_out(output: Output, skipped: list[dict[str, str]]) -> None:
    for reason, count in Counter(row["reason"] for row in skipped).items():
        names = [row["tensor"] for row in skipped if row["reason"] == reason]
        shown = ", ".join(names[:SHOWN]) + (f" and {count - SHOWN} more" if count > SHOWN else "")
        output.say(f"{counted(count, 'tensor')} not in it: {reason} ({shown})")
