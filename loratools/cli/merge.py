"""`loratools merge`: parse, call the operation, show what was written and what rounding took."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from loratools.cli import options
from loratools.cli.console import Output, cost, number, size
from loratools.cli.options import PATH, WEIGHTED, command
from loratools.errors import counted

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
    output.result(result, lambda: show(output, result, settings["rounding"]))
    return 0


def show(output: Output, result: dict[str, Any], rounding: str) -> None:
    """What went into which tensors, what rounding took of it, and what was checked."""
    for one in result["adapters"]:
        output.say(f"{one['path']}  weight {number(one['weight'])} · {one['dialect']} · {one['architecture']}")
    parts = [f"{result['changed']} of {counted(result['tensors'], 'tensor')} changed at {counted(result['sites'], 'site')}"]
    parts += [f"{result['cast']} cast"] if result["cast"] else []
    output.say(", ".join([*parts, f"{result['unchanged'] - result['cast']} copied"]))
    if result["delta_retained"] is not None:
        _rounding(output, result, rounding)
    if "residual" in result and result["residual"]["path"] is not None:
        _residual(output, result["residual"])
    if "verify" in result:
        sites, others = counted(result["verify"]["sites"], "site"), counted(result["verify"]["untouched_tensors"], "other tensor")
        output.say(f"verified: {sites} as the adapters say, {others} as in the base")
    if "plan" in result:
        output.say(f"plan: {counted(result['plan']['tensors'], 'tensor')}, {size(result['plan']['bytes'])}")
        output.say(f"would write {result['output']}")
        return
    output.say(f"wrote {result['output']} in {cost(result)}")


def _rounding(output: Output, result: dict[str, Any], rounding: str) -> None:
    output.say(f"delta retained {result['delta_retained']:.6g}, relative error of the delta {number(result['relative_error'])}")
    worst = [row for row in result["worst"] if abs(row["delta_retained"] - 1) > 0.01]
    for row in worst:
        output.say(f"  {row['tensor']}  retained {row['delta_retained']:.4g}")
    remedies = _remedies(result, [row["tensor"] for row in worst], rounding)
    if remedies:
        output.note(f"rounding changed some deltas by more than 1 %: {_either(remedies)} would keep them")


def _remedies(result: dict[str, Any], tensors: list[str], rounding: str) -> list[str]:
    """The options that would have kept the deltas of these tensors: none that was given, none that cannot."""
    from loratools.operations.inspect import inspect
    from loratools.tensors.reader import open_source

    if not tensors:
        return []
    written = open_source(Path(result["output"])).tensors
    pages = [inspect(one["path"])["adapter"] or {} for one in result["adapters"]]
    kinds = {kind for page in pages for kind in page.get("kinds", ())}
    remedies = {
        "--rounding stochastic": rounding != "stochastic",
        "--residual FILE": "residual" not in result and "lora" in kinds,  # a residual is made of their factors
        "--dtype fp32": all(written[name].dtype in ("F16", "BF16") for name in tensors),  # fp8 stays what it is
    }
    return [option for option, helps in remedies.items() if helps]


def _either(options: list[str]) -> str:
    """a; a or b; a, b or c."""
    return " or ".join([", ".join(options[:-1]), options[-1]] if len(options) > 1 else options)


def _residual(output: Output, rest: dict[str, Any]) -> None:
    output.say(
        f"residual {rest['path']}: {counted(rest['sites'], 'site')}, rank up to {rest['max_rank']}; gives back "
        f"{rest['loss_recovered']:.1%} of the loss, delta retained {rest['delta_retained']:.6g} with it"
    )
