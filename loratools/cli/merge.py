"""`loratools merge`: parse, call the operation, show what was written and what rounding took."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from loratools.cli import options
from loratools.cli.console import Output, number, size
from loratools.cli.options import PATH, WEIGHTED, command

EXAMPLES = """
loratools merge sd_xl_base_1.0.safetensors style.safetensors:0.8 merged.safetensors
loratools merge base.safetensors style.safetensors face.safetensors:0.5 merged.safetensors --verify
loratools merge pipeline_folder style.safetensors merged_folder --component denoiser
loratools merge llama_folder adapter_folder merged_folder --rounding stochastic --report merged.json
loratools merge merged.safetensors style.safetensors:-0.8 again.safetensors --dry-run
"""


@command("merge", examples=EXAMPLES)
@click.argument("base", metavar="BASE", type=PATH)
@click.argument("adapters", metavar="ADAPTER[:WEIGHT]...", type=WEIGHTED, nargs=-1, required=True)
@click.argument("out", metavar="OUT", type=PATH)
@click.option("--component", metavar="C", multiple=True, help="Merge this part alone (denoiser, text_encoder, …); may be repeated.")
@click.option("--include", metavar="GLOB", multiple=True, help="Merge only the sites that match; may be repeated.")
@click.option("--exclude", metavar="GLOB", multiple=True, help="Leave out the sites that match; may be repeated.")
@click.option("--block-weights", metavar="FILE", type=PATH, help="Weights by component, site or kohya block, in TOML.")
@options.dtype
@click.option(
    "--rounding",
    type=click.Choice(["nearest", "stochastic"]),
    default="nearest",
    show_default=True,
    help="How the sum becomes the file's dtype; stochastic keeps small deltas on average.",
)
@options.seed
@click.option("--residual", metavar="FILE", type=PATH, help="Write what rounding took, as far as a LoRA can hold it, to this file.")
@click.option("--verify", is_flag=True, help="Read the result back and check every site before it gets its name; exit 4 leaves no OUT.")
@click.option("--report", metavar="FILE", type=PATH, help="Write the result as JSON, every changed tensor with what rounding took.")
@click.option("--hash-base", is_flag=True, help="Record the sha256 of the whole base, not only of its header.")
@options.arch
@options.alpha
@options.threads
@options.force
@options.dry_run
def merge(output: Output, base: Path, adapters: tuple[tuple[Path, float], ...], out: Path, dry_run: bool, **settings: Any) -> int:
    """Merge adapters into a base checkpoint.

    BASE is a checkpoint file, a diffusers model or pipeline folder, or a language model's folder; OUT has the same layout and
    dtypes. Every adapter has a weight of its own (default 1; negative takes it out again). All tensors of the adapters find their
    weight in BASE, or nothing is written.
    """
    from loratools.operations.merge import merge as operation

    with output.progress(f"merging into {out}") as progress:
        result = operation(base, adapters, out, dry_run=dry_run, progress=None if dry_run else progress, **settings)
    for warning in result["warnings"]:
        output.warn(warning)
    if output.json:
        output.emit(result)
    elif not output.quiet:
        show(output, result)
    return 0


def show(output: Output, result: dict[str, Any]) -> None:
    """What went into which tensors, what rounding took of it, and what was checked."""
    for one in result["adapters"]:
        output.say(f"{one['path']}  weight {number(one['weight'])} · {one['dialect']} · {one['architecture']}")
    parts = [f"{result['changed']} of {counted(result['tensors'], 'tensor')} changed at {counted(result['sites'], 'site')}"]
    parts += [f"{result['cast']} cast"] if result["cast"] else []
    output.say(", ".join([*parts, f"{result['unchanged'] - result['cast']} copied"]))
    if result["delta_retained"] is not None:
        _rounding(output, result)
    if "residual" in result and result["residual"]["path"] is not None:
        _residual(output, result["residual"])
    if "verify" in result:
        sites, others = counted(result["verify"]["sites"], "site"), counted(result["verify"]["untouched_tensors"], "other tensor")
        output.say(f"verified: {sites} as the adapters say, {others} as in the base")
    if "plan" in result:
        output.say(f"plan: {counted(result['plan']['tensors'], 'tensor')}, {size(result['plan']['bytes'])}")
        output.say(f"would write {result['output']}")
        return
    memory = "" if result["peak_rss_mb"] is None else f", peak memory {number(result['peak_rss_mb'])} MB"
    output.say(f"wrote {result['output']} in {number(result['seconds'])} s{memory}")


def _rounding(output: Output, result: dict[str, Any]) -> None:
    told = f"delta retained {result['delta_retained']:.6g}, relative error of the delta {number(result['relative_error'])}"
    output.say(told)
    worst = [row for row in result["worst"] if abs(row["delta_retained"] - 1) > 0.01]
    for row in worst:
        output.say(f"  {row['tensor']}  retained {row['delta_retained']:.4g}")
    if worst and "residual" not in result:
        output.note("rounding took more than 1 % of some deltas: --rounding stochastic, --residual FILE or a wider --dtype keep them")


def _residual(output: Output, rest: dict[str, Any]) -> None:
    output.say(
        f"residual {rest['path']}: {counted(rest['sites'], 'site')}, rank up to {rest['max_rank']}; gives back "
        f"{rest['loss_recovered']:.1%} of the loss, delta retained {rest['delta_retained']:.6g} with it"
    )


def counted(number_of: int, what: str) -> str:
    """1 site, 2 sites."""
    return f"{number_of} {what}" if number_of == 1 else f"{number_of} {what}s"
